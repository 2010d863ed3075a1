"""Mask2Former in the layouts of its authors and of Hugging Face's transformers; their backbones, for MaskFormer too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from maskwright.checkpoints import folders
from maskwright.checkpoints.names import segment_names
from maskwright.checkpoints.origins import Origin, Replacement, Shapes, State
from maskwright.errors import CheckpointError

DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
Rules = list[tuple[str, Replacement]]
# The last rule of each table: all of the following belong to the network "dense".
DENSE: tuple[str, Replacement] = (
    r"^(?=(?:backbone|pixel_decoder|project|queries|decoder|norm|class_head|mask_head)\.)", "dense.",
)  # fmt: skip

# ---- backbones -------------------------------------------------------------------------------------------------------

DETECTRON2_BACKBONE: Rules = [
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.stem.norm."),
    (r"^backbone\.stem\.conv1\.", "backbone.stem.conv."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 2}."),
    (r"^(backbone\.stages\..*\.(?:conv\d|shortcut))\.weight$", r"\1.conv.weight"),
    # Swin Transformer, in the layout of its authors
    (r"^backbone\.patch_embed\.proj\.", "backbone.stem."),
    (r"^backbone\.patch_embed\.norm\.", "backbone.stem_norm."),
    (r"^backbone\.layers\.(\d+)\.blocks\.", r"backbone.stages.\1."),
    (r"^backbone\.layers\.(\d+)\.downsample\.reduction\.", r"backbone.merges.\1.reduce."),
    (r"^backbone\.layers\.(\d+)\.downsample\.", r"backbone.merges.\1."),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
    (r"^(backbone\..*)\.attn\.relative_position_bias_table$", r"\1.attention.table"),
    (r"^(backbone\..*)\.attn\.proj\.", r"\1.attention.output."),
    (r"^(backbone\..*)\.attn\.", r"\1.attention."),
    (r"^(backbone\..*)\.mlp\.fc1\.", r"\1.expand."),
    (r"^(backbone\..*)\.mlp\.fc2\.", r"\1.reduce."),
]
TRANSFORMERS_BACKBONE: Rules = [
    *DETECTRON2_BACKBONE[:4],  # ResNets, after `TRANSFORMERS_ALIASES`
    (r"^model\.pixel_level_module\.encoder\.hidden_states_norms\.stage(\d)\.",
     lambda m: f"backbone.norms.{int(m[1]) - 1}."),
    (r"^model\.pixel_level_module\.encoder\.hidden_states_norms\.", "backbone.norms."),
    (r"^model\.pixel_level_module\.encoder\.(?:model\.)?embeddings\.patch_embeddings\.projection\.", "backbone.stem."),
    (r"^model\.pixel_level_module\.encoder\.(?:model\.)?embeddings\.norm\.", "backbone.stem_norm."),
    (r"^model\.pixel_level_module\.encoder\.(?:model\.)?encoder\.layers\.", "backbone.layers."),
    (r"^backbone\.layers\.(\d+)\.blocks\.", r"backbone.stages.\1."),
    (r"^backbone\.layers\.(\d+)\.downsample\.reduction\.", r"backbone.merges.\1.reduce."),
    (r"^backbone\.layers\.(\d+)\.downsample\.", r"backbone.merges.\1."),
    (r"^(backbone\..*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(backbone\..*)\.layernorm_after\.", r"\1.norm2."),
    (r"^(backbone\..*)\.attention\.self\.relative_position_bias_table$", r"\1.attention.table"),
    (r"^(backbone\..*)\.attention\.self\.", r"\1.attention."),  # query, key and value are joined by `whole`
    (r"^(backbone\..*)\.attention\.output\.dense\.", r"\1.attention.output."),
    (r"^(backbone\..*)\.intermediate\.dense\.", r"\1.expand."),
    (r"^(backbone\.stages\.\d+\.\d+)\.output\.dense\.", r"\1.reduce."),
]  # fmt: skip
# The ResNets of transformers under the names of detectron2; and the names inside the networks of transformers 5, which
# torch.save and save_original_format=False write, under those of the published files.
_ENCODER = r"^model\.pixel_level_module\.encoder\."
TRANSFORMERS_ALIASES: Rules = [
    (_ENCODER + r"embedder\.embedder\.convolution\.", "backbone.stem.conv1."),
    (_ENCODER + r"embedder\.embedder\.normalization\.", "backbone.stem.conv1.norm."),
    (_ENCODER + r"encoder\.stages\.(\d)\.layers\.", lambda m: f"backbone.res{int(m[1]) + 2}."),
    (r"^(backbone\..*)\.layer\.(\d)\.convolution\.", lambda m: f"{m[1]}.conv{int(m[2]) + 1}."),
    (r"^(backbone\..*)\.layer\.(\d)\.normalization\.", lambda m: f"{m[1]}.conv{int(m[2]) + 1}.norm."),
    (r"^(backbone\..*)\.shortcut\.convolution\.", r"\1.shortcut."),
    (r"^(backbone\..*)\.shortcut\.normalization\.", r"\1.shortcut.norm."),
    (_ENCODER + r"swin\.", "model.pixel_level_module.encoder."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc(\d)\.", r".fc\1."),
]
# Derived values: indices of relative positions, class weights of the loss; and a norm that is not used.
IGNORED = (
    r"\.relative_position_index$", r"^criterion\.empty_weight$", r"^pixel_(mean|std)$", r"\.num_batches_tracked$",
    r"^model\.pixel_level_module\.encoder\.(model\.)?layernorm\.",
)  # fmt: skip
# A layer of the decoders of transformers, and of their encoders.
TRANSFORMERS_LAYERS: Rules = [
    (r"\.(?:cross_attn|encoder_attn)_layer_norm\.", ".cross_attention.norm."),
    (r"^(decoder\.\d+)\.self_attn_layer_norm\.", r"\1.self_attention.norm."),
    (r"^(decoder\.\d+)\.(?:cross_attn|encoder_attn)\.", r"\1.cross_attention.attention."),
    (r"^(decoder\.\d+)\.self_attn\.", r"\1.self_attention.attention."),
    (r"^(decoder\..*)\.(?:out_proj)\.", r"\1.output."),
    (r"^(decoder\..*)\.q_proj\.", r"\1.query."),
    (r"^(decoder\..*)\.k_proj\.", r"\1.key."),
    (r"^(decoder\..*)\.v_proj\.", r"\1.value."),
    (r"\.fc1\.", ".feed_forward.expand."),
    (r"\.fc2\.", ".feed_forward.reduce."),
    (r"\.final_layer_norm\.", ".feed_forward.norm."),
]


def split(state: State, options: Mapping[str, Any]) -> State:
    """Splits the joint projection of torch's attention into those of query, key and value."""
    ours: State = {}
    for key, value in state.items():
        prefix, found, kind = key.rpartition(".in_proj_")
        if not found:
            ours[key] = value
            continue
        for name, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
            ours[f"{prefix}.{name}.{kind}"] = rows
    return ours


def whole(state: State, options: Mapping[str, Any]) -> State:
    """Splits as `split` does, and joins the three projections of Swin, which are one here."""
    ours = split(state, options)
    for key in [k for k in ours if k.startswith("dense.backbone.") and ".attention.query." in k]:
        names = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
        ours[key.replace(".query.", ".qkv.")] = torch.cat([ours.pop(name) for name in names])
    return ours


def count(shapes: Shapes, pattern: str) -> int:
    """Number of different values of the first group of `pattern` among the keys."""
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def backbone_of(shapes: Shapes, prefix: str = "backbone.", blocks: str = "attn.") -> dict[str, Any] | None:
    """Options of the backbone: a ResNet of detectron2, or a Swin Transformer.

    Args:
        shapes: Shapes by key.
        prefix: What precedes "layers" in the keys of a Swin Transformer.
        blocks: What precedes the table of relative positions in a block.
    """
    if "backbone.stem.conv1.weight" in shapes:
        first = "backbone.res2.0."
        depth = DEPTHS.get(tuple(count(shapes, rf"^backbone\.res{n}\.(\d+)\.") for n in range(2, 6)))
        if depth is None:
            return None
        if f"{first}conv3.weight" not in shapes:
            depth = {50: 34}.get(depth, depth)
        stem = shapes["backbone.stem.conv1.weight"]
        norm = "frozen" if "backbone.stem.conv1.norm.running_mean" in shapes else "group"
        return {"backbone": {"name": f"resnet{depth}", "width": stem[0], "norm": norm}, "in_channels": stem[1]}
    layers = f"{prefix}layers."
    stages = count(shapes, rf"^{re.escape(layers)}(\d+)\.")
    tables = [shapes.get(f"{layers}{n}.blocks.0.{blocks}relative_position_bias_table") for n in range(stages)]
    stem = next((shapes[k] for k in shapes if k.startswith(prefix.removesuffix("encoder.")) and len(shapes[k]) == 4
                 and re.search(r"(patch_embed\.proj|patch_embeddings\.projection)\.weight$", k)), None)  # fmt: skip
    if stages != 4 or stem is None or any(t is None for t in tables):
        return None
    depths = [count(shapes, rf"^{re.escape(layers)}{n}\.blocks\.(\d+)\.") for n in range(stages)]
    heads = [t[1] for t in tables if t]
    window = (round(next(t[0] for t in tables if t) ** 0.5) + 1) // 2
    name = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}.get((stem[0], depths[2]), "tiny")
    backbone = {
        "name": f"swin-{name}", "width": stem[0], "depths": depths, "heads": heads, "window": window, "drop_path": 0.3,
    }  # fmt: skip
    return {"backbone": backbone, "in_channels": stem[1]}


def named_classes(rows: int) -> dict[str, Any]:
    """`classes` and `stuff` for a head whose last row is "no object"."""
    classes, stuff = segment_names(rows - 1)
    return {"classes": classes, "stuff": stuff}


# ---- Mask2Former -----------------------------------------------------------------------------------------------------

OFFICIAL: Rules = [
    *DETECTRON2_BACKBONE,
    # Files may lack "pixel_decoder.", or have it twice if the official loader has written them again.
    (r"^sem_seg_head\.(?!predictor\.)(?:pixel_decoder\.)*", "pixel_decoder."),
    (r"^pixel_decoder\.transformer\.level_embed$", "pixel_decoder.levels"),
    (r"^pixel_decoder\.input_proj\.(\d)\.0\.", r"pixel_decoder.project.\1.conv."),
    (r"^pixel_decoder\.input_proj\.(\d)\.1\.", r"pixel_decoder.project.\1.norm."),
    (r"^pixel_decoder\.adapter_1\.norm\.", "pixel_decoder.lateral.norm."),
    (r"^pixel_decoder\.adapter_1\.", "pixel_decoder.lateral.conv."),
    (r"^pixel_decoder\.layer_1\.norm\.", "pixel_decoder.output.norm."),
    (r"^pixel_decoder\.layer_1\.", "pixel_decoder.output.conv."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm2\.", r"pixel_decoder.encoder.\1.feed_forward.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.norm1\.", r"pixel_decoder.encoder.\1.norm."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.", "pixel_decoder.encoder."),
    (r"^(pixel_decoder\..*)\.self_attn\.sampling_offsets\.", r"\1.attention.offsets."),
    (r"^(pixel_decoder\..*)\.self_attn\.attention_weights\.", r"\1.attention.weights."),
    (r"^(pixel_decoder\..*)\.self_attn\.(value|output)_proj\.", r"\1.attention.\2."),
    (r"\.linear1\.", ".feed_forward.expand."),
    (r"\.linear2\.", ".feed_forward.reduce."),
    (r"^sem_seg_head\.predictor\.transformer_(self|cross)_attention_layers\.(\d+)\.norm\.",
     r"decoder.\2.\1_attention.norm."),
    (r"^sem_seg_head\.predictor\.transformer_(self|cross)_attention_layers\.(\d+)\.(?:self_attn|multihead_attn)\.",
     r"decoder.\2.\1_attention.attention."),
    (r"^(decoder\..*)\.out_proj\.", r"\1.output."),
    (r"^sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.\1.feed_forward.norm."),
    (r"^sem_seg_head\.predictor\.transformer_ffn_layers\.", "decoder."),
    (r"^sem_seg_head\.predictor\.decoder_norm\.", "norm."),
    (r"^sem_seg_head\.predictor\.(?:static_query|query_feat)\.weight$", "queries.content"),
    (r"^sem_seg_head\.predictor\.query_embed\.weight$", "queries.positions"),
    (r"^sem_seg_head\.predictor\.level_embed\.weight$", "queries.levels"),
    (r"^sem_seg_head\.predictor\.class_embed\.", "class_head."),
    (r"^sem_seg_head\.predictor\.mask_embed\.", "mask_head."),
    DENSE,
]  # fmt: skip
_DECODER = r"^model\.pixel_level_module\.decoder\."
TRANSFORMERS: Rules = [
    *TRANSFORMERS_BACKBONE,
    (_DECODER + r"level_embed$", "pixel_decoder.levels"),
    (_DECODER + r"input_projections\.(\d)\.0\.", r"pixel_decoder.project.\1.conv."),
    (_DECODER + r"input_projections\.(\d)\.1\.", r"pixel_decoder.project.\1.norm."),
    (_DECODER + r"adapter_1\.0\.", "pixel_decoder.lateral.conv."),
    (_DECODER + r"adapter_1\.1\.", "pixel_decoder.lateral.norm."),
    (_DECODER + r"layer_1\.0\.", "pixel_decoder.output.conv."),
    (_DECODER + r"layer_1\.1\.", "pixel_decoder.output.norm."),
    (_DECODER + r"mask_projection\.", "pixel_decoder.mask_features."),
    (_DECODER + r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"pixel_decoder.encoder.\1.norm."),
    (_DECODER + r"encoder\.layers\.", "pixel_decoder.encoder."),
    (r"^(pixel_decoder\..*)\.self_attn\.sampling_offsets\.", r"\1.attention.offsets."),
    (r"^(pixel_decoder\..*)\.self_attn\.attention_weights\.", r"\1.attention.weights."),
    (r"^(pixel_decoder\..*)\.self_attn\.(value|output)_proj\.", r"\1.attention.\2."),
    (r"^model\.transformer_module\.queries_features\.weight$", "queries.content"),
    (r"^model\.transformer_module\.queries_embedder\.weight$", "queries.positions"),
    (r"^model\.transformer_module\.level_embed\.weight$", "queries.levels"),
    (r"^model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"mask_head.layers.\1."),
    (r"^model\.transformer_module\.decoder\.layernorm\.", "norm."),
    (r"^model\.transformer_module\.decoder\.layers\.", "decoder."),
    *TRANSFORMERS_LAYERS,
    (r"^class_predictor\.", "class_head."),
    DENSE,
]


def _official(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    head = "sem_seg_head.predictor."
    if f"{head}transformer_cross_attention_layers.0.multihead_attn.in_proj_weight" not in shapes:
        return None
    content = any(f"{head}{name}.weight" in shapes for name in ("static_query", "query_feat"))
    layers = count(shapes, rf"^{re.escape(head)}transformer_cross_attention_layers\.(\d+)\.")
    deformable = r"^sem_seg_head\.(?:pixel_decoder\.)*transformer\.encoder\.layers\.(\d+)\."
    return _options(
        shapes, backbone_of(shapes), f"{head}query_embed.weight", f"{head}class_embed.weight",
        f"{head}transformer_ffn_layers.0.linear1.weight", deformable, r"linear1\.weight$", content, layers,
    )  # fmt: skip


def _transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    head, layer = "model.transformer_module.", "model.transformer_module.decoder.layers."
    if f"{layer}0.cross_attn.in_proj_weight" not in shapes or "class_predictor.weight" not in shapes:
        return None
    options = _options(
        shapes, backbone_of(shapes, "model.pixel_level_module.encoder.encoder.", "attention.self."),
        f"{head}queries_embedder.weight", "class_predictor.weight", f"{layer}0.fc1.weight",
        r"^model\.pixel_level_module\.decoder\.encoder\.layers\.(\d+)\.", r"fc1\.weight$",
        f"{head}queries_features.weight" in shapes, count(shapes, rf"^{re.escape(layer)}(\d+)\."),
    )  # fmt: skip
    if options is None:
        return None
    decoder = options["decoder"]
    heads = folders.heads(about, decoder["width"], "num_attention_heads")
    if heads is not None:
        each = decoder["heads"] * options["encoder_points"]
        if each % heads:
            raise CheckpointError(
                f"{about.get('path')}/config.json: num_attention_heads is {heads}, which does not divide the {each} "
                "points per level of the pixel decoder; use the config.json that belongs to the weights"
            )
        decoder["heads"] = heads
        options["encoder_points"] = each // heads
    return {**options, "resize": folders.images(about, "mask2former", options["in_channels"], divide=1.0)}


def _options(
    shapes: Shapes, backbone: dict[str, Any] | None, queries: str, classes: str, forward: str, deformable: str,
    inner: str, content: bool, layers: int,
) -> dict[str, Any] | None:  # fmt: skip
    def shape_of(name: str) -> Sequence[int] | None:
        return next((s for k, s in shapes.items() if re.match(deformable, k) and re.search(name, k)), None)

    weights, hidden = shape_of(r"attention_weights\.weight$"), shape_of(inner)
    if backbone is None or weights is None or hidden is None or not {queries, classes, forward} <= shapes.keys():
        return None
    each = weights[0] // 3  # heads x points of a level; every published network has eight heads
    heads = 8 if each % 8 == 0 else next(h for h in (4, 2, 1) if each % h == 0)
    decoder = {
        "width": shapes[queries][1], "heads": heads, "queries": shapes[queries][0], "layers": layers,
        "hidden": shapes[forward][0],
    }  # fmt: skip
    return {
        **backbone, "decoder": decoder, "encoder_layers": count(shapes, deformable), "encoder_hidden": hidden[0],
        "encoder_points": each // heads, "learned_content": content, **named_classes(shapes[classes][0]),
    }  # fmt: skip


ORIGINS = [
    Origin(
        name="facebookresearch/Mask2Former",
        system="mask2former",
        rename=OFFICIAL,
        recognise=_official,
        finish=split,
        ignore=IGNORED,
        code_licence="MIT",
        weights_licence="CC-BY-NC-4.0",
    ),
    Origin(
        name="transformers",
        system="mask2former",
        rename=TRANSFORMERS,
        recognise=_transformers,
        finish=whole,
        aliases=TRANSFORMERS_ALIASES,
        ignore=IGNORED,
        code_licence="Apache-2.0",
        weights_licence="CC-BY-NC-4.0",
    ),
]
