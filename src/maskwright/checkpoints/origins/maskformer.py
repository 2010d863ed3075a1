"""MaskFormer in the layouts of its authors and of Hugging Face's transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints import folders
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.mask2former import (
    DENSE,
    DETECTRON2_BACKBONE,
    IGNORED,
    TRANSFORMERS_ALIASES,
    TRANSFORMERS_BACKBONE,
    TRANSFORMERS_LAYERS,
    Rules,
    backbone_of,
    count,
    named_classes,
    split,
    whole,
)

# Levels are numbered from the finest, from 1. Published files lack "pixel_decoder."; the current code writes it.
OFFICIAL: Rules = [
    *DETECTRON2_BACKBONE,
    (r"^sem_seg_head\.(?!predictor\.)(?:pixel_decoder\.)*", "pixel_decoder."),
    (r"^pixel_decoder\.adapter_(\d)\.(?=norm)", lambda m: f"pixel_decoder.lateral.{int(m[1]) - 1}."),
    (r"^pixel_decoder\.adapter_(\d)\.", lambda m: f"pixel_decoder.lateral.{int(m[1]) - 1}.conv."),
    (r"^pixel_decoder\.layer_(\d)\.(?=norm)", lambda m: f"pixel_decoder.output.{int(m[1]) - 1}."),
    (r"^pixel_decoder\.layer_(\d)\.", lambda m: f"pixel_decoder.output.{int(m[1]) - 1}.conv."),
    (r"^pixel_decoder\.input_proj\.", "pixel_decoder.project."),
    (r"^pixel_decoder\.transformer\.encoder\.layers\.", "pixel_decoder.encoder."),
    (r"^(pixel_decoder\.encoder\.\d+)\.norm2\.", r"\1.feed_forward.norm."),
    (r"^sem_seg_head\.predictor\.transformer\.decoder\.norm\.", "norm."),
    (r"^sem_seg_head\.predictor\.transformer\.decoder\.layers\.", "decoder."),
    (r"^(decoder\.\d+)\.norm2\.", r"\1.cross_attention.norm."),
    (r"^(decoder\.\d+)\.norm3\.", r"\1.feed_forward.norm."),
    (r"^((?:pixel_decoder\.en|de)coder\.\d+)\.norm1\.", r"\1.self_attention.norm."),
    (r"^((?:pixel_decoder\.en|de)coder\.\d+)\.self_attn\.", r"\1.self_attention.attention."),
    (r"^(decoder\.\d+)\.multihead_attn\.", r"\1.cross_attention.attention."),
    (r"\.out_proj\.", ".output."),
    (r"\.linear1\.", ".feed_forward.expand."),
    (r"\.linear2\.", ".feed_forward.reduce."),
    (r"^sem_seg_head\.predictor\.query_embed\.", "queries."),
    (r"^sem_seg_head\.predictor\.input_proj\.", "project."),
    (r"^sem_seg_head\.predictor\.class_embed\.", "class_head."),
    (r"^sem_seg_head\.predictor\.mask_embed\.", "mask_head."),
    DENSE,
]
_FPN = r"^model\.pixel_level_module\.decoder\.fpn\."
TRANSFORMERS: Rules = [
    *TRANSFORMERS_BACKBONE,
    (_FPN + r"stem\.0\.", "pixel_decoder.output.3.conv."),
    (_FPN + r"stem\.1\.", "pixel_decoder.output.3.norm."),
    (_FPN + r"layers\.(\d)\.proj\.0\.", lambda m: f"pixel_decoder.lateral.{2 - int(m[1])}.conv."),
    (_FPN + r"layers\.(\d)\.proj\.1\.", lambda m: f"pixel_decoder.lateral.{2 - int(m[1])}.norm."),
    (_FPN + r"layers\.(\d)\.block\.0\.", lambda m: f"pixel_decoder.output.{2 - int(m[1])}.conv."),
    (_FPN + r"layers\.(\d)\.block\.1\.", lambda m: f"pixel_decoder.output.{2 - int(m[1])}.norm."),
    (r"^model\.pixel_level_module\.decoder\.mask_projection\.", "pixel_decoder.mask_features."),
    (r"^model\.transformer_module\.queries_embedder\.", "queries."),
    (r"^model\.transformer_module\.input_projection\.", "project."),
    (r"^model\.transformer_module\.decoder\.layernorm\.", "norm."),
    (r"^model\.transformer_module\.decoder\.layers\.", "decoder."),
    *TRANSFORMERS_LAYERS,
    (r"^class_predictor\.", "class_head."),
    (r"^mask_embedder\.(\d)\.0\.", r"mask_head.layers.\1."),
    DENSE,
]


def _official(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    head = "sem_seg_head.predictor."
    layer = f"{head}transformer.decoder.layers."
    if f"{layer}0.multihead_attn.in_proj_weight" not in shapes or f"{head}mask_embed.layers.2.weight" not in shapes:
        return None
    encoder = count(shapes, r"^sem_seg_head\.(?:pixel_decoder\.)*transformer\.encoder\.layers\.(\d+)\.self_attn\.in_")
    # Without an encoder or projection the features of the backbone would have to be as wide as the decoder.
    if not encoder and f"{head}input_proj.weight" not in shapes:
        return None
    return _options(
        shapes, backbone_of(shapes), f"{head}query_embed.weight", f"{head}class_embed.weight", layer, "linear1", encoder
    )


def _transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    layer = "model.transformer_module.decoder.layers."
    if f"{layer}0.encoder_attn.q_proj.weight" not in shapes or "mask_embedder.0.0.weight" not in shapes:
        return None
    options = _options(
        shapes, backbone_of(shapes, "model.pixel_level_module.encoder.model.encoder.", "attention.self."),
        "model.transformer_module.queries_embedder.weight", "class_predictor.weight", layer, "fc1", 0,
    )  # fmt: skip
    if options is None:
        return None
    decoder = options["decoder"]
    heads = folders.heads(
        about, decoder["width"], "decoder_attention_heads", "num_attention_heads", inside="decoder_config"
    )
    decoder["heads"] = heads or decoder["heads"]
    images = folders.images(about, "maskformer", options["in_channels"], divide=1.0)
    return {**options, "resize": {**options["resize"], **images}}


def _options(
    shapes: Shapes, backbone: dict[str, Any] | None, queries: str, classes: str, layer: str, forward: str, encoder: int
) -> dict[str, Any] | None:
    hidden = shapes.get(f"{layer}0.{forward}.weight")
    if backbone is None or hidden is None or not {queries, classes} <= shapes.keys():
        return None
    width = shapes[queries][1]
    decoder = {
        "width": width, "heads": 8 if width % 32 == 0 else 4, "queries": shapes[queries][0],
        "layers": count(shapes, rf"^{re.escape(layer)}(\d+)\."), "hidden": hidden[0],
    }  # fmt: skip
    # Panoptic models do not pad single images; semantic ones do, but no file tells them apart.
    return {
        **backbone, "decoder": decoder, "encoder_layers": encoder, "resize": {"multiple": 1},
        **named_classes(shapes[classes][0]),
    }  # fmt: skip


ORIGINS = [
    Origin(
        name="facebookresearch/MaskFormer",
        system="maskformer",
        rename=OFFICIAL,
        recognise=_official,
        finish=split,
        ignore=IGNORED,
        code_licence="CC-BY-NC-4.0",
        weights_licence="CC-BY-NC-4.0",
    ),
    Origin(
        name="transformers",
        system="maskformer",
        rename=TRANSFORMERS,
        recognise=_transformers,
        finish=whole,
        aliases=TRANSFORMERS_ALIASES,
        ignore=IGNORED,
        code_licence="Apache-2.0",
        weights_licence="CC-BY-NC-4.0",
    ),
]
