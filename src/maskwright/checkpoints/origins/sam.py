"""SAM, MobileSAM, EfficientSAM and EdgeSAM in the layouts of their authors, and SAM in that of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints import folders
from maskwright.checkpoints.origins import Origin, Shapes, State, compiled, renamed

CLASSES: Mapping[str, Any] = {"classes": ("object",)}
PREFIXES = ("image_encoder.", "prompt_encoder.", "mask_decoder.")

# ---- prompt encoder and mask decoder ---------------------------------------------------------------------------------

PROMPTS = [
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "prompt_encoder.positions.frequencies"),
    (r"^prompt_encoder\.point_embeddings\.(\d)\.weight$", r"prompt_encoder.labels.\1"),
    (r"^prompt_encoder\.not_a_point_embed\.weight$", "prompt_encoder.nothing"),
    (r"^prompt_encoder\.no_mask_embed\.weight$", "prompt_encoder.no_mask"),
    (r"^prompt_encoder\.mask_downscaling\.", "prompt_encoder.masks."),
]
DECODER = [
    (r"^(mask_decoder\..*)\.q_proj\.", r"\1.query."),
    (r"^(mask_decoder\..*)\.k_proj\.", r"\1.key."),
    (r"^(mask_decoder\..*)\.v_proj\.", r"\1.value."),
    (r"^(mask_decoder\..*)\.out_proj\.", r"\1.output."),
    (r"\.self_attn\.", ".among_tokens."),
    (r"\.cross_attn_token_to_image\.", ".to_image."),
    (r"\.cross_attn_image_to_token\.", ".to_tokens."),
    (r"\.final_attn_token_to_image\.", ".to_image."),
    (r"\.norm_final_attn\.", ".norm."),
    (r"^(mask_decoder\.transformer\..*)\.mlp\.lin(\d)\.", lambda m: f"{m[1]}.mlp.layers.{int(m[2]) - 1}."),
    (r"^mask_decoder\.iou_token\.weight$", "mask_decoder.score_token"),
    (r"^mask_decoder\.mask_tokens\.weight$", "mask_decoder.mask_tokens"),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.up1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.up_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.up2."),
    (r"^mask_decoder\.output_hypernetworks_mlps\.", "mask_decoder.kernels."),
    (r"^mask_decoder\.iou_prediction_head\.", "mask_decoder.score."),
]
HEADS = [*PROMPTS, *DECODER]


def decoder_options(shapes: Shapes) -> dict[str, Any] | None:
    """Options of prompt encoder and mask decoder; None if the keys are not those of SAM."""
    tokens = shapes.get("mask_decoder.mask_tokens.weight")
    hidden = shapes.get("mask_decoder.transformer.layers.0.mlp.lin1.weight")
    layers = _count(shapes, r"^mask_decoder\.transformer\.layers\.(\d+)\.")
    scores = [
        shape for key, shape in sorted(shapes.items())
        if re.match(r"^mask_decoder\.iou_prediction_head\.layers\.\d+\.weight$", key)
    ]  # fmt: skip
    if tokens is None or hidden is None or not scores or "prompt_encoder.no_mask_embed.weight" not in shapes:
        return None
    return {
        "width": tokens[1], "depth": layers, "hidden": hidden[0], "answers": tokens[0],
        "score_hidden": scores[0][0], "score_layers": len(scores),
    }  # fmt: skip


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers the group of a pattern takes among the keys."""
    return len({m[1] for key in shapes if (m := re.match(pattern, key))})


def _own(shapes: Shapes) -> bool:
    """Whether all keys belong to the three networks."""
    return all(key.startswith(PREFIXES) for key in shapes)


# ---- SAM -------------------------------------------------------------------------------------------------------------

SAM = [
    *HEADS,
    (r"^image_encoder\.pos_embed$", "image_encoder.positions"),
    (r"^image_encoder\.patch_embed\.proj\.", "image_encoder.patches."),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.proj\.", r"\1.attention.output."),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.rel_pos_h$", r"\1.attention.rows"),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.rel_pos_w$", r"\1.attention.columns"),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"^(image_encoder\.blocks\.\d+)\.mlp\.lin1\.", r"\1.expand."),
    (r"^(image_encoder\.blocks\.\d+)\.mlp\.lin2\.", r"\1.reduce."),
]


def sam(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for SAM's own layout; None for another network."""
    table, decoder = shapes.get("image_encoder.pos_embed"), decoder_options(shapes)
    patch = shapes.get("image_encoder.patch_embed.proj.weight")
    if table is None or len(table) != 4 or patch is None or decoder is None or not _own(shapes):
        return None
    if "image_encoder.blocks.0.attn.rel_pos_h" not in shapes:
        return None
    depth, width = _count(shapes, r"^image_encoder\.blocks\.(\d+)\."), table[3]
    lengths = [shapes[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)]
    everywhere = [i for i, shape in enumerate(lengths) if shape[0] == 2 * table[1] - 1]
    windows = {(shape[0] + 1) // 2 for i, shape in enumerate(lengths) if i not in everywhere}
    encoder: dict[str, Any] = {
        "width": width, "depth": depth, "heads": width // lengths[0][1], "everywhere": everywhere,
        "window": max(windows, default=14), "patch": patch[2], "table": table[1],
    }  # fmt: skip
    hidden = shapes["image_encoder.blocks.0.mlp.lin1.weight"][0]
    if hidden != 4 * width:
        encoder["hidden"] = hidden
    options: dict[str, Any] = {**CLASSES, "encoder": encoder, "decoder": decoder, "in_channels": patch[1]}
    side = table[1] * patch[2]
    return options | ({"resize": {"canvas": [side, side]}} if side != 1024 else {})


# ---- SAM in transformers ---------------------------------------------------------------------------------------------

THREE = {"proj_in": 0, "layers.0": 1, "proj_out": 2}  # of a network of three linear layers
TRANSFORMERS = [
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
    (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
    (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
    (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"^(mask_decoder\.output_hypernetworks_mlps\.\d+|mask_decoder\.iou_prediction_head)\.(proj_in|layers\.0|proj_out)\.",
     lambda m: f"{m[1]}.layers.{THREE[m[2]]}."),
    (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
    (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
]  # fmt: skip
TIED = "prompt_encoder.shared_embedding.positional_embedding"  # the same tensor; files have either or both


def transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the layout of transformers; None for another network."""
    if not any(key.startswith("vision_encoder.") for key in shapes):
        return None
    rules = compiled(TRANSFORMERS)
    options = sam({renamed(key, rules): shape for key, shape in shapes.items() if key != TIED}, about)
    if options is None:
        return None
    eps = folders.number(about, "layer_norm_eps")
    if eps not in (None, 1e-6):
        folders.warn(about, "sam", {"layer_norm_eps": eps})
    return options


def untied(state: State, options: Mapping[str, Any]) -> State:
    """Takes the frequencies of the position encoding from either of their two names."""
    result = dict(state)
    copy = result.pop(TIED, None)
    if copy is not None:
        result.setdefault("prompt_encoder.positions.frequencies", copy)
    return result


# ---- MobileSAM -------------------------------------------------------------------------------------------------------

MBCONV = {"1": "expand", "2": "depthwise", "3": "reduce"}
MERGING = {"1": "project", "2": "depthwise", "3": "output"}
MOBILE_SAM = [
    *HEADS,
    (r"^image_encoder\.patch_embed\.seq\.(0|2)\.", lambda m: f"image_encoder.stem.{int(m[1]) // 2}."),
    (r"^image_encoder\.layers\.", "image_encoder.stages."),
    (r"\.downsample\.conv(\d)\.", lambda m: f".merging.{MERGING[m[1]]}."),
    (r"^(image_encoder\.stages\.0\.blocks\.\d+)\.conv(\d)\.", lambda m: f"{m[1]}.{MBCONV[m[2]]}."),
    (r"^(image_encoder\.stages\..*)\.attn\.attention_biases$", r"\1.attention.bias"),
    (r"^(image_encoder\.stages\..*)\.attn\.proj\.", r"\1.attention.output."),
    (r"^(image_encoder\.stages\..*)\.attn\.", r"\1.attention."),
    (r"^(image_encoder\.stages\..*)\.mlp\.norm\.", r"\1.norm."),
    (r"^(image_encoder\.stages\..*)\.mlp\.fc1\.", r"\1.expand."),
    (r"^(image_encoder\.stages\..*)\.mlp\.fc2\.", r"\1.reduce."),
    (r"^(image_encoder\.stages\..*)\.local_conv\.", r"\1.depthwise."),
    (r"^(image_encoder\.(?:stem|stages)\..*)\.c\.", r"\1.conv."),
    (r"^(image_encoder\.(?:stem|stages)\..*)\.bn\.", r"\1.norm."),
]  # fmt: skip


def mobile_sam(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for MobileSAM's layout; None for another network."""
    stem, decoder = shapes.get("image_encoder.patch_embed.seq.0.c.weight"), decoder_options(shapes)
    if stem is None or decoder is None or not _own(shapes):
        return None
    biases = [shapes.get(f"image_encoder.layers.{i}.blocks.0.attn.attention_biases") for i in (1, 2, 3)]
    outputs = [shapes.get(f"image_encoder.layers.{i}.downsample.conv3.c.weight") for i in (0, 1, 2)]
    if any(shape is None for shape in (*biases, *outputs)):
        return None
    encoder = {
        "widths": [shapes["image_encoder.patch_embed.seq.2.c.weight"][0], *(s[0] for s in outputs if s)],
        "depths": [_count(shapes, rf"^image_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(4)],
        "heads": [s[0] for s in biases if s],
        "windows": [math.isqrt(s[1]) for s in biases if s],
    }
    return {**CLASSES, "encoder": encoder, "decoder": decoder, "in_channels": stem[1]}


# ---- EdgeSAM ---------------------------------------------------------------------------------------------------------


def _edge_layer(match: re.Match[str]) -> str:
    """A layer of a block of RepViT. The second network of a block is convolution, GELU, convolution."""
    names = {"token_mixer.0.conv1": "pointwise", "token_mixer.0.conv": "depthwise", "token_mixer.0": "depthwise",
             "token_mixer.1.fc1": "excitation.reduce", "token_mixer.1.fc2": "excitation.expand",
             "token_mixer.2": "project", "channel_mixer.m.0": "expand", "channel_mixer.m.2": "reduce"}  # fmt: skip
    return f"{match[1]}.{names[match[2]]}."


EDGE_SAM = [
    *HEADS,
    (r"^image_encoder\.features\.0\.(0|2)\.", lambda m: f"image_encoder.stem.{int(m[1]) // 2}."),
    (r"^(image_encoder\.features\.\d+)\.(token_mixer\.0\.conv1|token_mixer\.0\.conv|token_mixer\.0|token_mixer\.1\.fc1|"
     r"token_mixer\.1\.fc2|token_mixer\.2|channel_mixer\.m\.0|channel_mixer\.m\.2)\.", _edge_layer),
    (r"^image_encoder\.fuse_stage2\.", "image_encoder.fine."),
    (r"^image_encoder\.fuse_stage3\.op_list\.0\.", "image_encoder.coarse."),
    (r"^(image_encoder\.(?:stem|features)\..*)\.c\.", r"\1.conv."),
    (r"^(image_encoder\.(?:stem|features)\..*)\.bn\.", r"\1.norm."),
]  # fmt: skip


def _edge_shape(shapes: Shapes) -> tuple[list[int], list[int]]:
    """Widths and depths of the stages, from the blocks, which are numbered throughout."""
    widths, depths = list[int](), list[int]()
    for number in range(1, 1 + _count(shapes, r"^image_encoder\.features\.(\d+)\.channel_mixer\.")):
        width = shapes[f"image_encoder.features.{number}.channel_mixer.m.2.c.weight"][0]
        if f"image_encoder.features.{number}.token_mixer.2.c.weight" in shapes or not widths:
            widths.append(width)
            depths.append(0)
        depths[-1] += 1
    return widths, depths


def edge_sam(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for EdgeSAM's layout; None for another network."""
    stem, decoder = shapes.get("image_encoder.features.0.0.c.weight"), decoder_options(shapes)
    if stem is None or decoder is None or "image_encoder.fuse_stage2.weight" not in shapes:
        return None
    widths, depths = _edge_shape(shapes)
    return {**CLASSES, "encoder": {"widths": widths, "depths": depths}, "decoder": decoder, "in_channels": stem[1]}


def staged(state: State, options: Mapping[str, Any]) -> State:
    """Numbers the blocks of RepViT by stages."""
    places = [(stage, block) for stage, depth in enumerate(options["encoder"]["depths"]) for block in range(depth)]

    def place(match: re.Match[str]) -> str:
        stage, block = places[int(match[1]) - 1]
        return f"image_encoder.stages.{stage}.{block}."

    return {re.sub(r"^image_encoder\.features\.(\d+)\.", place, key): value for key, value in state.items()}


# ---- EfficientSAM ----------------------------------------------------------------------------------------------------

EFFICIENT_SAM = [
    (r"^prompt_encoder\.invalid_points\.weight$", "prompt_encoder.nothing"),
    (r"^prompt_encoder\.point_embeddings\.weight$", "prompt_encoder.labels.0"),
    (r"^prompt_encoder\.bbox_top_left_embeddings\.weight$", "prompt_encoder.labels.1"),
    (r"^prompt_encoder\.bbox_bottom_right_embeddings\.weight$", "prompt_encoder.labels.2"),
    (r"^(mask_decoder\.transformer\..*)\.mlp\.layers\.0\.0\.", r"\1.mlp.layers.0."),
    (r"^(mask_decoder\.transformer\..*)\.mlp\.fc\.", r"\1.mlp.layers.1."),
    (r"^(mask_decoder\.(?:output_hyp|iou_pred).*)\.layers\.(\d)\.0\.", r"\1.layers.\2."),
    (r"^(mask_decoder\.(?:output_hyp|iou_pred).*)\.fc\.", r"\1.layers.2."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.0\.", "mask_decoder.up1."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.1\.", "mask_decoder.up_norm."),
    (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.up2."),
    *HEADS,
    (r"^image_encoder\.pos_embed$", "image_encoder.positions"),
    (r"^image_encoder\.patch_embed\.proj\.", "image_encoder.patches."),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.proj\.", r"\1.attention.output."),
    (r"^(image_encoder\.blocks\.\d+)\.attn\.", r"\1.attention."),
    (r"^(image_encoder\.blocks\.\d+)\.mlp\.fc1\.", r"\1.expand."),
    (r"^(image_encoder\.blocks\.\d+)\.mlp\.fc2\.", r"\1.reduce."),
]


def efficient_sam(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for EfficientSAM's layout; None for another network."""
    table, tokens = shapes.get("image_encoder.pos_embed"), shapes.get("mask_decoder.mask_tokens.weight")
    patch = shapes.get("image_encoder.patch_embed.proj.weight")
    if table is None or len(table) != 3 or tokens is None or patch is None or not _own(shapes):
        return None
    if "prompt_encoder.invalid_points.weight" not in shapes:
        return None
    depth, width = _count(shapes, r"^image_encoder\.blocks\.(\d+)\."), table[2]
    decoder = {
        "width": tokens[1], "answers": tokens[0],
        "depth": _count(shapes, r"^mask_decoder\.transformer\.layers\.(\d+)\."),
        "hidden": shapes["mask_decoder.transformer.layers.0.mlp.fc.weight"][1],
        "score_hidden": shapes["mask_decoder.iou_prediction_head.fc.weight"][1],
        "score_layers": 1 + _count(shapes, r"^mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
    }  # fmt: skip
    encoder = {
        "width": width, "depth": depth, "heads": max(1, width // 64), "patch": patch[2],
        "table": math.isqrt(table[1] - 1),
    }  # fmt: skip
    return {**CLASSES, "encoder": encoder, "decoder": decoder, "in_channels": patch[1]}


def squared(state: State, options: Mapping[str, Any]) -> State:
    """Drops the class token's position, and gives the table of positions rows and columns."""
    table, side = state["image_encoder.positions"], options["encoder"]["table"]
    return {**state, "image_encoder.positions": table[:, 1:].unflatten(1, (side, side))}


LICENCE = "Apache-2.0"
ORIGINS = [
    Origin(
        name="segment-anything", system="sam", rename=SAM, recognise=sam, code_licence=LICENCE, weights_licence=LICENCE
    ),
    Origin(
        name="transformers", system="sam", rename=[*TRANSFORMERS, *SAM], recognise=transformers, finish=untied,
        code_licence=LICENCE, weights_licence=LICENCE,
    ),
    Origin(
        name="mobilesam", system="mobile-sam", rename=MOBILE_SAM, recognise=mobile_sam,
        ignore=(r"^image_encoder\.(norm_head|head)\.", r"\.attention_bias_idxs$", r"\.ab$"),
        code_licence=LICENCE, weights_licence=LICENCE,
    ),
    Origin(
        name="efficientsam", system="efficient-sam", rename=EFFICIENT_SAM, recognise=efficient_sam, finish=squared,
        code_licence=LICENCE, weights_licence=LICENCE,
    ),
    Origin(
        name="edgesam", system="edge-sam", rename=EDGE_SAM, recognise=edge_sam, finish=staged,
        ignore=(r"^(rpn_head|fpn)\.",), code_licence="S-Lab License 1.0 (non-commercial)",
        weights_licence="S-Lab License 1.0 (non-commercial)",
    ),
]  # fmt: skip
