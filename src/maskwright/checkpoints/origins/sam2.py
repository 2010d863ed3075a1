"""SAM 2 and 2.1 in the layouts of its authors and of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.blocks.hiera import HIERAS
from maskwright.checkpoints.origins import Origin, Shapes, State

# ---- names -----------------------------------------------------------------------------------------------------------

# Numbers of blocks and of levels, and the joined embeddings of transformers, are changed by `arranged`.
DECODER = [
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.self_attn\.", r"mask_decoder.transformer.layers.\1.among_tokens."),
    (r"\.cross_attn_token_to_image\.", ".to_image."),
    (r"\.cross_attn_image_to_token\.", ".to_tokens."),
    (r"^mask_decoder\.transformer\.final_attn_token_to_image\.", "mask_decoder.transformer.to_image."),
    (r"^mask_decoder\.iou_token\.weight$", "mask_decoder.score_token"),
    (r"^mask_decoder\.mask_tokens\.weight$", "mask_decoder.mask_tokens"),
    (r"^mask_decoder\.obj_score_token\.weight$", "mask_decoder.present_token"),
    (r"^mask_decoder\.output_hypernetworks_mlps\.", "mask_decoder.kernels."),
    (r"^mask_decoder\.iou_prediction_head\.", "mask_decoder.score."),
    (r"^mask_decoder\.pred_obj_score_head\.", "mask_decoder.present."),
    (r"^mask_decoder\.conv_s(\d)\.", r"image_encoder.finer.\1."),
    (r"^prompt_encoder\.not_a_point_embed\.weight$", "prompt_encoder.nothing"),
    (r"^prompt_encoder\.no_mask_embed\.weight$", "prompt_encoder.no_mask"),
]
MEMORY = [
    (r"^memory_attention\.layers\.(\d+)\.self_attn\.", r"memory_attention.layers.\1.self_attention."),
    (r"^memory_attention\.layers\.(\d+)\.cross_attn_image\.", r"memory_attention.layers.\1.cross_attention."),
    (r"^memory_attention\.layers\.(\d+)\.linear1\.", r"memory_attention.layers.\1.expand."),
    (r"^memory_attention\.layers\.(\d+)\.linear2\.", r"memory_attention.layers.\1.reduce."),
]
PROJECTIONS = [
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.(out|o)_proj\.(weight|bias)$", r".output.\2"),
]
OFFICIAL = [
    (r"^image_encoder\.trunk\.", "image_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"image_encoder.neck.convs.\1."),
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".positions.frequencies"),
    (r"^prompt_encoder\.point_embeddings\.(\d)\.weight$", r"prompt_encoder.labels.\1"),
    (r"^prompt_encoder\.mask_downscaling\.", "prompt_encoder.masks."),
    (r"\.output_upscaling\.0\.", ".up1."),
    (r"\.output_upscaling\.1\.", ".up_norm."),
    (r"\.output_upscaling\.3\.", ".up2."),
    (r"\.norm_final_attn\.", ".norm."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.", "memory_encoder.mask."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.features."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.dwconv\.", r"memory_encoder.blocks.\1.depthwise."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.pwconv1\.", r"memory_encoder.blocks.\1.expand."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.pwconv2\.", r"memory_encoder.blocks.\1.reduce."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.gamma$", r"memory_encoder.blocks.\1.scale"),
    (r"^memory_encoder\.fuser\.layers\.", "memory_encoder.blocks."),
    (r"\.patch_embed\.proj\.", ".stem."),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.output."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.proj\.", r"\1.shortcut."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.attn\.qkv\.", r"\1.qkv."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.mlp\.layers\.0\.", r"\1.expand."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.mlp\.layers\.1\.", r"\1.reduce."),
    *DECODER,
    *MEMORY,
    (r"^memory_encoder\.out_proj\.", "memory_encoder.output."),
    *PROJECTIONS,
    (r"^obj_ptr_proj\.", "pointer.project."),
    (r"^obj_ptr_tpos_proj\.", "memory_attention.pointer_position."),
    (r"^mask_downsample\.", "mask_prompt."),
    (r"^maskmem_tpos_enc$", "memory_attention.step"),
    (r"^no_mem_embed$", "image_encoder.no_memory"),
    (r"^no_obj_ptr$", "pointer.absent"),
    (r"^no_obj_embed_spatial$", "memory_encoder.absent"),
]
# Multi-layer networks of three layers in transformers: proj_in, layers.0, proj_out.
_THREE = r"(mask_decoder\.(?:kernels\.\d|score|present)|pointer\.project)"
TRANSFORMERS = [
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".stem."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.attn\.proj\.", r"\1.output."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.proj\.", r"\1.shortcut."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.attn\.qkv\.", r"\1.qkv."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.mlp\.proj_in\.", r"\1.expand."),
    (r"(image_encoder\.backbone\.blocks\.\d+)\.mlp\.proj_out\.", r"\1.reduce."),
    (r"(\.layers\.\d\.mlp)\.proj_in\.", r"\1.layers.0."),
    (r"(\.layers\.\d\.mlp)\.proj_out\.", r"\1.layers.1."),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$", "prompt_encoder.positions.frequencies"),
    (r"^prompt_encoder\.point_embed\.weight$", "prompt_encoder.labels"),
    (r"^prompt_encoder\.mask_embed\.conv(\d)\.", lambda m: f"prompt_encoder.masks.{3 * int(m[1]) - 3}."),
    (r"^prompt_encoder\.mask_embed\.norm(\d)\.", lambda m: f"prompt_encoder.masks.{3 * int(m[1]) - 2}."),
    (r"\.upscale_conv(\d)\.", r".up\1."),
    (r"\.upscale_layer_norm\.", ".up_norm."),
    (r"\.layer_norm_final_attn\.", ".norm."),
    (r"^memory_attention\.layer_norm\.", "memory_attention.norm."),
    (r"^memory_encoder\.mask_downsampler\.layers\.(\d)\.conv\.", lambda m: f"memory_encoder.mask.{3 * int(m[1])}."),
    (
        r"^memory_encoder\.mask_downsampler\.layers\.(\d)\.layer_norm\.",
        lambda m: f"memory_encoder.mask.{3 * int(m[1]) + 1}.",
    ),
    (r"^memory_encoder\.mask_downsampler\.final_conv\.", "memory_encoder.mask.12."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.features."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.depthwise_conv\.", r"memory_encoder.blocks.\1.depthwise."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.pointwise_conv1\.", r"memory_encoder.blocks.\1.expand."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.pointwise_conv2\.", r"memory_encoder.blocks.\1.reduce."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.layer_norm\.", r"memory_encoder.blocks.\1.norm."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d+)\.scale$", r"memory_encoder.blocks.\1.scale"),
    (r"^memory_encoder\.projection\.", "memory_encoder.output."),
    *DECODER,
    *MEMORY,
    *PROJECTIONS,
    (r"^object_pointer_proj\.", "pointer.project."),
    (rf"^{_THREE}\.layers\.0\.", r"\1.layers.1."),
    (rf"^{_THREE}\.proj_in\.", r"\1.layers.0."),
    (rf"^{_THREE}\.proj_out\.", r"\1.layers.2."),
    (r"^temporal_positional_encoding_projection_layer\.", "memory_attention.pointer_position."),
    (r"^mask_downsample\.", "mask_prompt."),
    (r"^memory_temporal_positional_encoding$", "memory_attention.step"),
    (r"^no_memory_embedding$", "image_encoder.no_memory"),
    (r"^no_object_pointer$", "pointer.absent"),
    (r"^occlusion_spatial_embedding_parameter$", "memory_encoder.absent"),
]


# ---- options from shapes ---------------------------------------------------------------------------------------------


def _options(shapes: Shapes, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Options from shapes; `names` are the keys that determine them in this layout."""
    if any(names[part] not in shapes for part in ("stem", "table", "step", "hidden", "pointers", "attention")):
        return None
    block = re.compile(names["block"])
    outputs = {int(m[1]): shape[0] // 3 for key, shape in shapes.items() if (m := block.match(key))}
    widths = sorted(set(outputs.values()))
    depths = tuple(sum(own == width for own in outputs.values()) for width in widths)
    stem, layers = shapes[names["stem"]], {m[1] for key in shapes if (m := re.match(names["layer"], key))}
    steps, attention = shapes[names["step"]], shapes[names["attention"]]
    found: dict[str, Any] = {
        "classes": ("object",),
        "backbone": _backbone(stem[0], depths),
        "version": "2.1" if names["placed"] in shapes else "2",
        "decoder": {"width": shapes[names["pointers"]][-1], "hidden": shapes[names["hidden"]][0]},
        "in_channels": stem[1],
        "memory": {"frames": steps[0], "width": steps[-1], "layers": len(layers), "hidden": attention[0]},
    }
    return found


def _backbone(width: int, depths: tuple[int, ...]) -> dict[str, Any]:
    """The published Hiera with these numbers; otherwise the smallest one with its width and depths changed."""
    for name, shape in HIERAS.items():
        if (shape.width, shape.depths) == (width, depths):
            return {"name": f"hiera-{name}"}
    return {"name": "hiera-tiny", "width": width, "depths": depths}


OFFICIAL_NAMES = {
    "stem": "image_encoder.trunk.patch_embed.proj.weight",
    "table": "image_encoder.trunk.pos_embed",
    "block": r"^image_encoder\.trunk\.blocks\.(\d+)\.attn\.qkv\.weight$",
    "step": "maskmem_tpos_enc",
    "hidden": "sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight",
    "pointers": "no_obj_ptr",
    "placed": "obj_ptr_tpos_proj.weight",
    "layer": r"^memory_attention\.layers\.(\d+)\.",
    "attention": "memory_attention.layers.0.linear1.weight",
}
TRANSFORMERS_NAMES = {
    "stem": "vision_encoder.backbone.patch_embed.projection.weight",
    "table": "vision_encoder.backbone.pos_embed",
    "block": r"^vision_encoder\.backbone\.blocks\.(\d+)\.attn\.qkv\.weight$",
    "step": "memory_temporal_positional_encoding",
    "hidden": "mask_decoder.transformer.layers.0.mlp.proj_in.weight",
    "pointers": "no_object_pointer",
    "placed": "temporal_positional_encoding_projection_layer.weight",
    "layer": r"^memory_attention\.layers\.(\d+)\.",
    "attention": "memory_attention.layers.0.linear1.weight",
}


def official(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the authors' layout; None for another network."""
    return _options(shapes, OFFICIAL_NAMES)


def transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the layout of transformers' Sam2VideoModel; None for another network."""
    return _options(shapes, TRANSFORMERS_NAMES)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def arranged(state: State, options: Mapping[str, Any]) -> State:
    """Numbers blocks by stage and levels from the finest, and gives vectors and tables the shapes of the system."""
    result: State = {}
    depths = _depths(options)
    for key, value in state.items():
        match = re.match(r"^image_encoder\.backbone\.blocks\.(\d+)\.(.*)$", key)
        if match is not None:
            stage, number = _place(int(match[1]), depths)
            key = f"image_encoder.backbone.stages.{stage}.{number}.{match[2]}"
        match = re.match(r"^image_encoder\.neck\.convs\.(\d)\.(.*)$", key)
        if match is not None:
            key = f"image_encoder.neck.lateral.{len(depths) - 1 - int(match[1])}.{match[2]}"
        key = key.replace("backbone.pos_embed_window", "backbone.window_position")
        key = key.replace("backbone.pos_embed", "backbone.position")
        if key.startswith("image_encoder.backbone.") and key.endswith("position"):
            value = value[0]
        elif key == "memory_attention.step":
            value = value.flatten(1)
        elif key in ("image_encoder.no_memory", "pointer.absent", "memory_encoder.absent"):
            value = value.flatten()
        elif key == "prompt_encoder.labels":
            result |= {f"{key}.{row}": value[row : row + 1] for row in range(len(value))}
            continue
        result[key] = value
    return result


def _depths(options: Mapping[str, Any]) -> tuple[int, ...]:
    backbone = options["backbone"]
    return tuple(backbone.get("depths") or HIERAS[backbone["name"].removeprefix("hiera-")].depths)


def _place(block: int, depths: tuple[int, ...]) -> tuple[int, int]:
    """Stage of a block and its number in it."""
    for stage, depth in enumerate(depths):
        if block < depth:
            return stage, block
        block -= depth
    return len(depths), block


LICENCE = "Apache-2.0"
ORIGINS = [
    Origin(
        name="facebookresearch", system="sam2", rename=OFFICIAL, recognise=official, finish=arranged,
        ignore=[r"^no_mem_pos_enc$"], code_licence="Apache-2.0", weights_licence=LICENCE,
    ),
    Origin(
        name="transformers", system="sam2", rename=TRANSFORMERS, recognise=transformers, finish=arranged,
        ignore=[r"^no_memory_positional_encoding$", r"^shared_image_embedding\."], code_licence="Apache-2.0",
        weights_licence=LICENCE,
    ),
]  # fmt: skip
