"""DETR in the layouts of its authors and of transformers, with the mask head or without.

Backbones of stride 32 and dilated ones (DC5) have the same keys and shapes: the variant must be given, unless the
config.json of a folder contains it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maskwright.checkpoints import folders
from maskwright.checkpoints.names import COCO, COCO_IDS, COCO_STUFF
from maskwright.checkpoints.origins import Candidate, Origin, Shapes, State
from maskwright.errors import CheckpointError

BLOCKS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
STUFF_IDS = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, 184, 185, 186, 187, 188, 189, 190, 191, 192,
    193, 194, 195, 196, 197, 198, 199, 200,
)  # fmt: skip

# ---- names -----------------------------------------------------------------------------------------------------------

RESNET = [
    (r"^backbone\.conv1\.", "backbone.stem.conv."),
    (r"^backbone\.bn1\.", "backbone.stem.norm."),
    (r"^backbone\.layer(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^(backbone\.stages\..*)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(backbone\.stages\..*\.conv\d)\.weight$", r"\1.conv.weight"),
]
MASKS = [
    (r"^bbox_attention\.q_linear\.", "masks.attention.query."),
    (r"^bbox_attention\.k_linear\.", "masks.attention.key."),
    (r"^mask_head\.lay(\d)\.", lambda m: f"masks.convs.{int(m[1]) - 1}."),
    (r"^mask_head\.gn(\d)\.", lambda m: f"masks.norms.{int(m[1]) - 1}."),
    (r"^mask_head\.adapter(\d)\.", lambda m: f"masks.adapters.{int(m[1]) - 1}."),
    (r"^mask_head\.out_lay\.", "masks.output."),
]
LAYERS = [
    (r"^(encoder|decoder)\.(\d+)\.self_attn\.", r"\1.\2.self_attention.attention."),
    (r"\.out_proj\.", ".output."),
    (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
]
# The last rule of each table: everything but the mask head belongs to the network "dense".
DENSE = [(r"^(?!masks\.)", "dense.")]
OFFICIAL = [
    (r"^detr\.", ""),
    (r"^backbone\.0\.body\.", "backbone."),
    *RESNET,
    (r"^input_proj\.", "project."),
    (r"^query_embed\.", "queries."),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "box_head."),
    (r"^transformer\.decoder\.norm\.", "decoder_norm."),
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^decoder\.(\d+)\.multihead_attn\.", r"decoder.\1.cross_attention.attention."),
    *LAYERS,
    (r"^(encoder|decoder)\.(\d+)\.norm1\.", r"\1.\2.self_attention.norm."),
    (r"^encoder\.(\d+)\.norm2\.", r"encoder.\1.feed_forward.norm."),
    (r"^decoder\.(\d+)\.norm2\.", r"decoder.\1.cross_attention.norm."),
    (r"^decoder\.(\d+)\.norm3\.", r"decoder.\1.feed_forward.norm."),
    (r"\.linear1\.", ".feed_forward.expand."),
    (r"\.linear2\.", ".feed_forward.reduce."),
    *MASKS,
    *DENSE,
]
TRANSFORMERS = [
    (r"^detr\.", ""),
    (r"^model\.", ""),
    (r"^backbone\.conv_encoder\.model\.(?:_backbone\.)?", "backbone."),
    *RESNET,
    (r"^input_projection\.", "project."),
    (r"^query_position_embeddings\.", "queries."),
    (r"^class_labels_classifier\.", "class_head."),
    (r"^bbox_predictor\.", "box_head."),
    (r"^decoder\.layernorm\.", "decoder_norm."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"^decoder\.(\d+)\.encoder_attn\.", r"decoder.\1.cross_attention.attention."),
    (r"^decoder\.(\d+)\.encoder_attn_layer_norm\.", r"decoder.\1.cross_attention.norm."),
    *LAYERS,
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.self_attn_layer_norm\.", ".self_attention.norm."),
    (r"\.final_layer_norm\.", ".feed_forward.norm."),
    (r"\.fc1\.", ".feed_forward.expand."),
    (r"\.fc2\.", ".feed_forward.reduce."),
    *MASKS,
    *DENSE,
]

# transformers 5 writes the names above, but its modules have others, which torch.save and save_original_format=False
# write into files; and the backbone may be transformers' own ResNet instead of timm's.
ALIASES = [
    (r"^((?:detr\.)?model\.backbone\.)model\.", r"\1conv_encoder.model."),
    (r"\.embedder\.embedder\.convolution\.", ".conv1."),
    (r"\.embedder\.embedder\.normalization\.", ".bn1."),
    (r"\.encoder\.stages\.(\d)\.layers\.", lambda m: f".layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc(\d)\.", r".fc\1."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv(\d)\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv(\d)\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.fpn_stages\.(\d)\.fpn_adapter\.", lambda m: f"mask_head.adapter{int(m[1]) + 1}."),
    (r"^mask_head\.fpn_stages\.(\d)\.refine\.conv\.", lambda m: f"mask_head.lay{int(m[1]) + 3}."),
    (r"^mask_head\.fpn_stages\.(\d)\.refine\.norm\.", lambda m: f"mask_head.gn{int(m[1]) + 3}."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
]


def split(state: State, options: Mapping[str, Any]) -> State:
    """Splits the matrix in which torch's attention keeps the projections of queries, keys and values."""
    ours: State = {}
    for key, value in state.items():
        before, joined, kind = key.rpartition(".in_proj.")
        if not joined:
            ours[key] = value
            continue
        for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
            ours[f"{before}.{name}.{kind}"] = part
    return ours


# ---- options ---------------------------------------------------------------------------------------------------------


def names(count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the rows of a head, and which of them are stuff.

    The rows of the authors' heads are COCO's category ids, used or not: 91 (0 ... 90) for boxes, 250 for panoptic
    segmentation, where ids up to 90 are things.
    """
    known = dict(zip(COCO_IDS, COCO, strict=True))
    if count == 91:
        return tuple(known.get(i, "N/A") for i in range(count)), ()
    if count == 250:
        known |= dict(zip(STUFF_IDS, COCO_STUFF, strict=True))
        classes = tuple(known.get(i, "N/A" if i <= 90 else "N/A stuff") for i in range(count))
        return classes, (*COCO_STUFF, "N/A stuff")
    return tuple(f"class {k}" for k in range(count)), ()


def count(shapes: Shapes, pattern: str) -> int:
    """Number of different values of the first group of `pattern` among the keys."""
    return len({m[1] for k in shapes if (m := re.match(pattern, k))})


def _options(
    shapes: Shapes, backbone: str, layers: str, feed: str, project: str, queries: str, classes: str, masks: bool
) -> dict[str, Any] | None:
    """Options by keys and shapes; the arguments are the layout's names of each part. None for another network."""
    stem = shapes.get(f"{backbone}conv1.weight")
    depth = BLOCKS.get(tuple(count(shapes, rf"^{re.escape(backbone)}layer{n}\.(\d+)\.") for n in range(1, 5)))
    needed = [shapes.get(f"{name}.weight") for name in (project, queries, classes)]
    first = shapes.get(f"{layers}encoder.layers.0.{feed}.weight") or shapes.get(
        f"{layers}decoder.layers.0.{feed}.weight"
    )
    if stem is None or depth is None or first is None or any(s is None for s in needed):
        return None
    projection, embeddings, rows = (s for s in needed if s is not None)
    width = projection[0]
    # Later systems have several projections, and queries of twice the width.
    if len(projection) != 4 or embeddings[1] != width:
        return None
    if f"{backbone}layer1.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    labels, stuff = names(rows[0] - 1)
    heads = shapes["mask_head.lay1.weight"][0] - width if masks else 8
    return {
        "classes": labels, "stuff": stuff, "masks": "joint" if masks else "none", "in_channels": stem[1],
        "backbone": {"name": f"resnet{depth}", "width": stem[0], "norm": "frozen", "frozen": 2},
        "transformer": {
            "width": width, "heads": heads, "hidden": first[0], "queries": embeddings[0],
            "encoder_layers": count(shapes, rf"^{re.escape(layers)}encoder\.layers\.(\d+)\."),
            "decoder_layers": count(shapes, rf"^{re.escape(layers)}decoder\.layers\.(\d+)\."),
        },
    }  # fmt: skip


def _variants(options: dict[str, Any] | None, dilated: bool | None = None) -> Sequence[Candidate] | None:
    """The published variants with these keys and shapes."""
    if options is None:
        return None
    depth = options["backbone"]["name"].removeprefix("resnet")
    kind = "-panoptic" if options["masks"] != "none" and options["stuff"] else ""
    both = [
        Candidate(f"detr-r{depth}{kind}", {**options, "dilated": False}),
        Candidate(f"detr-r{depth}-dc5{kind}", {**options, "dilated": True}),
    ]
    return both if dilated is None else [both[dilated]]


def _official(shapes: Shapes, about: Mapping[str, Any]) -> Sequence[Candidate] | None:
    masks = "mask_head.lay1.weight" in shapes
    own = "detr." if "detr.query_embed.weight" in shapes else ""
    if masks != bool(own):
        return None
    transformer = f"{own}transformer."
    return _variants(
        _options(
            shapes, f"{own}backbone.0.body.", transformer, "linear1", f"{own}input_proj", f"{own}query_embed",
            f"{own}class_embed", masks,
        )
    )  # fmt: skip


def _transformers(shapes: Shapes, about: Mapping[str, Any]) -> Sequence[Candidate] | None:
    masks = "mask_head.lay1.weight" in shapes
    own = "detr." if masks else ""
    model = f"{own}model."
    backbone = f"{model}backbone.conv_encoder.model."
    backbone = f"{backbone}_backbone." if f"{backbone}_backbone.conv1.weight" in shapes else backbone
    options = _options(
        shapes, backbone, model, "fc1", f"{model}input_projection", f"{model}query_position_embeddings",
        f"{own}class_labels_classifier", masks,
    )  # fmt: skip
    if options is None:
        return None
    sizes: dict[str, Any] = options["transformer"]
    heads = folders.heads(
        about, sizes["width"], "encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"
    )
    if masks and heads not in (None, sizes["heads"]):
        raise CheckpointError(
            f"{about.get('path')}/config.json: it has {heads} attention heads, but the mask head in the weights has "
            f"{sizes['heads']}; use the config.json that belongs to the weights"
        )
    sizes["heads"] = heads or sizes["heads"]
    options["resize"] = folders.images(about, "detr", options["in_channels"])
    config = about.get("config", {})
    dilated, backbone_config = config.get("dilation"), config.get("backbone_config")
    if not isinstance(dilated, bool) and isinstance(backbone_config, Mapping):
        dilated = backbone_config.get("output_stride") == 16
    return _variants(options, dilated if isinstance(dilated, bool) else None)


ORIGINS = [
    Origin(
        name="facebookresearch",
        system="detr",
        rename=OFFICIAL,
        recognise=_official,
        finish=split,
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
    ),
    Origin(
        name="transformers",
        system="detr",
        rename=TRANSFORMERS,
        recognise=_transformers,
        finish=split,
        aliases=ALIASES,
        ignore=(r"\.num_batches_tracked$",),
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0",
    ),
]
