"""EoMT in the layouts of its authors (on DINOv2 of timm or DINOv3 of transformers) and of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from maskwright.checkpoints import folders
from maskwright.checkpoints.names import segment_names
from maskwright.checkpoints.origins import Candidate, Origin, Shapes, State
from maskwright.errors import CheckpointError

LICENCE = "MIT"
DERIVED = (r"^criterion\.empty_weight$", r"pixel_(mean|std)$")

# ---- names -----------------------------------------------------------------------------------------------------------

# The last rule of each table: all of the following belong to the network "dense".
DENSE = (r"^(?=(?:backbone|class_head|mask_head|upscale)\.|(?:queries|mask_probability)$)", "dense.")
HEADS = [
    (r"^network\.", ""),
    (r"^q\.weight$", "queries"),
    (r"^attn_mask_probs$", "mask_probability"),
    (r"^upscale\.(\d)\.conv1\.", r"upscale.\1.up."),
    (r"^upscale\.(\d)\.conv2\.", r"upscale.\1.depthwise."),
    (r"^encoder\.backbone\.", "backbone.body."),
]
# Queries, keys and values are joined by `joined`.
DINOV3 = [
    *HEADS,
    (r"\.patch_embed\.(cls_token|register_tokens)$", r".\1"),
    (r"\.register_tokens$", ".reg_token"),
    (r"\.patch_embed\.patch_embeddings\.", ".patch_embed.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    DENSE,
]
TRANSFORMERS = [
    (r"^query\.weight$", "queries"),
    (r"^attn_mask_probs$", "mask_probability"),
    (r"^class_predictor\.", "class_head."),
    (r"^mask_head\.fc(\d)\.", lambda m: f"mask_head.{2 * int(m[1]) - 2}."),
    (r"^upscale_block\.block\.(\d)\.conv1\.", r"upscale.\1.up."),
    (r"^upscale_block\.block\.(\d)\.conv2\.", r"upscale.\1.depthwise."),
    (r"^upscale_block\.block\.(\d)\.layernorm2d\.", r"upscale.\1.norm."),
    (r"^embeddings\.cls_token$", "backbone.body.cls_token"),
    (r"^embeddings\.register_tokens$", "backbone.body.reg_token"),
    (r"^embeddings\.patch_embeddings\.projection\.", "backbone.body.patch_embed.proj."),
    (r"^embeddings\.patch_embeddings\.", "backbone.body.patch_embed.proj."),
    (r"^embeddings\.position_embeddings\.weight$", "backbone.body.pos_embed"),
    (r"^layernorm\.", "backbone.body.norm."),
    (r"^norm\.", "backbone.body.norm."),
    (r"^layers\.", "backbone.body.blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(out|o)_proj\.", ".attn.proj."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
]
SCALES = {True: (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"), False: (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma")}


# ---- options from shapes ---------------------------------------------------------------------------------------------

SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
HEADS_OF = {384: 6, 768: 12, 1024: 16, 1536: 24}


def _options(shapes: Shapes, names: Mapping[str, str], rotary: bool) -> dict[str, Any] | None:
    """Options from shapes; `names` are the keys that determine them in this layout."""
    blocks = {int(m[1]) for key in shapes if (m := re.match(names["block"], key))}
    if not blocks or any(names[part] not in shapes for part in ("queries", "classes", "patch", "share")):
        return None
    queries, width = shapes[names["queries"]]
    count, patch = shapes[names["classes"]][0] - 1, shapes[names["patch"]][2]
    if width not in SIZES:
        return None
    family = "patch16_dinov3_qkvb" if rotary else "patch14_reg4_dinov2"
    classes, stuff = segment_names(count)
    found: dict[str, Any] = {
        "classes": classes,
        "stuff": stuff,
        "backbone": {"name": f"vit_{SIZES[width]}_{family}"},
        "queries": queries,
        "last_blocks": shapes[names["share"]][0],
        "patch": patch,
        "in_channels": shapes[names["patch"]][1],
    }
    if len(blocks) != {384: 12, 768: 12, 1024: 24, 1536: 40}[width]:
        found["backbone"]["depth"] = len(blocks)
    if not rotary:
        side = math.isqrt(shapes[names["table"]][-2])
        found |= {"resize": {"canvas": [side * patch, side * patch]}, "table": side}
    return found


OFFICIAL_NAMES = {
    "block": r"^network\.encoder\.backbone\.blocks\.(\d+)\.",
    "queries": "network.q.weight",
    "classes": "network.class_head.weight",
    "patch": "network.encoder.backbone.patch_embed.proj.weight",
    "table": "network.encoder.backbone.pos_embed",
    "share": "network.attn_mask_probs",
}
DINOV3_NAMES = {**OFFICIAL_NAMES, "patch": "network.encoder.backbone.patch_embed.patch_embeddings.weight"}
TRANSFORMERS_NAMES = {
    "block": r"^layers\.(\d+)\.",
    "queries": "query.weight",
    "classes": "class_predictor.weight",
    "patch": "embeddings.patch_embeddings.projection.weight",
    "table": "embeddings.position_embeddings.weight",
    "share": "attn_mask_probs",
}
TRANSFORMERS_DINOV3_NAMES = {**TRANSFORMERS_NAMES, "patch": "embeddings.patch_embeddings.weight"}


def official(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the authors' layout on DINOv2; None for another network."""
    return _options(shapes, OFFICIAL_NAMES, rotary=False)


def official_dinov3(shapes: Shapes, about: Mapping[str, Any]) -> Sequence[Candidate] | None:
    """Variants of the authors' layout on DINOv3.

    The published files contain differences from the weights of DINOv3; converted files may contain the sum.
    """
    options = _options(shapes, DINOV3_NAMES, rotary=True)
    if options is None:
        return None
    difference = {**options, "backbone": {**options["backbone"], "pretrained": True}}
    return [Candidate("sum", options), Candidate("difference to DINOv3", difference)]


def transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the layout of transformers on DINOv2; None for another network."""
    return _of_folder(_options(shapes, TRANSFORMERS_NAMES, rotary=False), about)


def transformers_dinov3(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options for the layout of transformers on DINOv3, whose files contain the sum of DINOv3 and the differences."""
    return _of_folder(_options(shapes, TRANSFORMERS_DINOV3_NAMES, rotary=True), about)


def _of_folder(options: dict[str, Any] | None, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Adds options from the JSON files of a folder: the size of the input, heads, the epsilon of the norms."""
    if options is None:
        return None
    backbone = options["backbone"]
    width, own_heads = next((w, HEADS_OF[w]) for w, name in SIZES.items() if f"vit_{name}_" in backbone["name"])
    heads, eps = folders.heads(about, width, "num_attention_heads"), folders.number(about, "layer_norm_eps")
    if heads not in (None, own_heads):
        backbone["heads"] = heads
    if eps not in (None, 1e-5 if "dinov3" in backbone["name"] else 1e-6):
        backbone["norm_eps"] = eps
    images = folders.prepared(about, options["in_channels"], do_pad=True)
    asked = dict(images.asked)
    resize: dict[str, Any] = {**options.get("resize", {}), **folders.normalization(images)}
    if images.short is not None and images.long != images.short:
        asked["size"] = about["preprocessor"]["size"]  # not a square
    elif images.short is not None:
        resize["canvas"] = _agreed(options, images.short, "preprocessor_config.json: size", about)
    folders.warn(about, "eomt", asked)
    image = folders.side(about)
    # Rotary positions do not determine the size; then that of preprocessor_config.json takes precedence.
    if image is not None and ("table" in options or "canvas" not in resize):
        resize["canvas"] = _agreed(options, image, "config.json: image_size", about)
    return {**options, "resize": resize} if resize else options


def _agreed(options: Mapping[str, Any], side: int, name: str, about: Mapping[str, Any]) -> list[int]:
    """The canvas for a side that a file states; a CheckpointError if the table of positions is of another size."""
    canvas = [side, side]
    if "table" in options and canvas != options["resize"]["canvas"]:
        raise CheckpointError(
            f"{about.get('path')}/{name} is {side}, but the weights have positions for "
            f"{options['resize']['canvas'][0]}; use the file that belongs to the weights"
        )
    return canvas


# ---- tensors ---------------------------------------------------------------------------------------------------------


def joined(state: State, options: Mapping[str, Any]) -> State:
    """Joins q, k and v into one matrix, as in timm, and gives the table of positions its batch axis."""
    result = {key: value for key, value in state.items() if not re.search(r"\.attn\.[qkv]\.", key)}
    for key in state:
        match = re.fullmatch(r"(.*\.attn)\.q\.(weight|bias)", key)
        if match is None:
            continue
        stem, kind = match[1], match[2]
        if kind == "bias" and "dinov3" in options["backbone"]["name"]:  # keys have none
            result |= {f"{stem}.{part}_bias": state[f"{stem}.{part}.bias"] for part in "qv"}
        else:
            result[f"{stem}.qkv.{kind}"] = torch.cat([state[f"{stem}.{part}.{kind}"] for part in "qkv"])
    table = "dense.backbone.body.pos_embed"
    if table in result and result[table].ndim == 2:
        result[table] = result[table][None]
    return result


def summed(state: State, options: Mapping[str, Any]) -> State:
    """Adds the weights of DINOv3 to the differences; timm downloads them (they have their own licence)."""
    state = joined(state, options)
    if not options["backbone"].get("pretrained"):
        return state
    import timm

    base = timm.create_model(options["backbone"]["name"], pretrained=True, num_classes=0).state_dict()
    added = {key: value + base.get(key.removeprefix("dense.backbone.body."), 0) for key, value in state.items()}
    # Of a buffer the file holds the difference to its initial value, which is 1.
    return {**added, "dense.mask_probability": state["dense.mask_probability"] + 1}


ORIGINS = [
    Origin(
        name="eomt", system="eomt", rename=[*HEADS, DENSE], recognise=official, finish=joined, ignore=DERIVED,
        code_licence="MIT", weights_licence=LICENCE,
    ),
    Origin(
        name="eomt-dinov3", system="eomt", rename=DINOV3, recognise=official_dinov3, finish=summed, ignore=DERIVED,
        code_licence="MIT", weights_licence="MIT; DINOv3's weights are under Meta's DINOv3 licence",
    ),
    Origin(
        name="transformers", system="eomt", rename=[*TRANSFORMERS, SCALES[False], DENSE], recognise=transformers,
        finish=joined, ignore=DERIVED, code_licence="Apache-2.0", weights_licence=LICENCE,
    ),
    Origin(
        name="transformers-dinov3", system="eomt", rename=[*TRANSFORMERS, SCALES[True], DENSE],
        recognise=transformers_dinov3, finish=joined, ignore=(*DERIVED, r"^embeddings\.mask_token$"),
        code_licence="Apache-2.0", weights_licence="MIT; DINOv3's weights are under Meta's DINOv3 licence",
    ),
]  # fmt: skip
