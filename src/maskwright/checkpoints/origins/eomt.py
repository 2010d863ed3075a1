"""EoMT as its authors lay it out (on timm's DINOv2 or transformers' DINOv3), and as transformers does."""

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

HEADS = [
    (r"^network\.", ""),
    (r"^q\.weight$", "queries"),
    (r"^attn_mask_probs$", "mask_probability"),
    (r"^upscale\.(\d)\.conv1\.", r"upscale.\1.up."),
    (r"^upscale\.(\d)\.conv2\.", r"upscale.\1.depthwise."),
    (r"^encoder\.backbone\.", "backbone.body."),
]
# Queries, keys and values stay apart until `joined` lays them into one matrix.
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
    """`names`: where this layout keeps what tells the options."""
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
        "backbone": f"vit_{SIZES[width]}_{family}",
        "queries": queries,
        "last_blocks": shapes[names["share"]][0],
        "patch": patch,
        "in_channels": shapes[names["patch"]][1],
    }
    if len(blocks) != {384: 12, 768: 12, 1024: 24, 1536: 40}[width]:
        found["depth"] = len(blocks)
    if not rotary:
        side = math.isqrt(shapes[names["table"]][-2])
        found |= {"size": side * patch, "table": side}
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
    return _options(shapes, OFFICIAL_NAMES, rotary=False)


def official_dinov3(shapes: Shapes, about: Mapping[str, Any]) -> Sequence[Candidate] | None:
    """The published files hold what is to be added to DINOv3's own weights; files made of them may hold the sum."""
    options = _options(shapes, DINOV3_NAMES, rotary=True)
    if options is None:
        return None
    return [Candidate("sum", options), Candidate("difference to DINOv3", {**options, "pretrained": True})]


def transformers(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    return _of_folder(_options(shapes, TRANSFORMERS_NAMES, rotary=False), about)


def transformers_dinov3(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whole weights: whoever converted the published differences added DINOv3's own."""
    return _of_folder(_options(shapes, TRANSFORMERS_DINOV3_NAMES, rotary=True), about)


def _of_folder(options: dict[str, Any] | None, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """With what the JSON files of a folder say: the size of the input, heads, the norms' epsilon."""
    if options is None:
        return None
    width, own_heads = next((w, HEADS_OF[w]) for w, name in SIZES.items() if f"vit_{name}_" in options["backbone"])
    heads, eps = folders.heads(about, width, "num_attention_heads"), folders.number(about, "layer_norm_eps")
    if heads not in (None, own_heads):
        options["heads"] = heads
    if eps not in (None, 1e-5 if "dinov3" in options["backbone"] else 1e-6):
        options["norm_eps"] = eps
    images = folders.prepared(about, options["in_channels"], do_pad=True)
    asked = dict(images.asked)
    if images.short is not None and images.long != images.short:
        asked["size"] = about["preprocessor"]["size"]  # of no square
    elif images.short is not None:
        options["size"] = _agreed(options, images.short, "preprocessor_config.json: size", about)
    asked |= {k: list(v) for k, v in (("mean", images.mean), ("std", images.std)) if v is not None}
    folders.warn(about, "eomt", asked)
    image = folders.side(about)
    # Rotated positions are of any size; there images are as large as their own file says.
    if image is not None and ("table" in options or "size" not in options):
        options["size"] = _agreed(options, image, "config.json: image_size", about)
    return options


def _agreed(options: Mapping[str, Any], said: int, name: str, about: Mapping[str, Any]) -> int:
    """The size of the input that a file says, where the table of positions is of no other."""
    if "table" in options and said != options["size"]:
        raise CheckpointError(
            f"{about.get('path')}/{name} is {said}, and the weights beside it have positions for {options['size']}; "
            "put the file there that belongs to the weights"
        )
    return said


# ---- tensors ---------------------------------------------------------------------------------------------------------


def joined(state: State, options: Mapping[str, Any]) -> State:
    """q, k and v laid into one matrix, as timm has them; the table of positions with its batch axis."""
    result = {key: value for key, value in state.items() if not re.search(r"\.attn\.[qkv]\.", key)}
    for key in state:
        match = re.fullmatch(r"(.*\.attn)\.q\.(weight|bias)", key)
        if match is None:
            continue
        stem, kind = match[1], match[2]
        if kind == "bias" and "dinov3" in options["backbone"]:  # keys have none
            result |= {f"{stem}.{part}_bias": state[f"{stem}.{part}.bias"] for part in "qv"}
        else:
            result[f"{stem}.qkv.{kind}"] = torch.cat([state[f"{stem}.{part}.{kind}"] for part in "qkv"])
    table = "backbone.body.pos_embed"
    if table in result and result[table].ndim == 2:
        result[table] = result[table][None]
    return result


def summed(state: State, options: Mapping[str, Any]) -> State:
    """Differences with DINOv3's own weights added, which timm fetches (they have a licence of their own)."""
    state = joined(state, options)
    if not options.get("pretrained"):
        return state
    import timm

    base = timm.create_model(options["backbone"], pretrained=True, num_classes=0).state_dict()
    added = {key: value + base.get(key.removeprefix("backbone.body."), 0) for key, value in state.items()}
    # Of what is no parameter the file holds the difference to its value at the start, which is one.
    return {**added, "mask_probability": state["mask_probability"] + 1}


ORIGINS = [
    Origin(
        name="eomt", system="eomt", rename=HEADS, recognise=official, finish=joined, ignore=DERIVED,
        code_licence="MIT", weights_licence=LICENCE,
    ),
    Origin(
        name="eomt-dinov3", system="eomt", rename=DINOV3, recognise=official_dinov3, finish=summed, ignore=DERIVED,
        code_licence="MIT", weights_licence="MIT; DINOv3's weights are under Meta's DINOv3 licence",
    ),
    Origin(
        name="transformers", system="eomt", rename=[*TRANSFORMERS, SCALES[False]], recognise=transformers,
        finish=joined, ignore=DERIVED, code_licence="Apache-2.0", weights_licence=LICENCE,
    ),
    Origin(
        name="transformers-dinov3", system="eomt", rename=[*TRANSFORMERS, SCALES[True]],
        recognise=transformers_dinov3, finish=joined, ignore=(*DERIVED, r"^embeddings\.mask_token$"),
        code_licence="Apache-2.0", weights_licence="MIT; DINOv3's weights are under Meta's DINOv3 licence",
    ),
]  # fmt: skip
