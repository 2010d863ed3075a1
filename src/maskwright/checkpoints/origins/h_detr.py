"""H-Deformable-DETR in the layout of its authors: two stages, box refinement, a learned content of each query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskwright.checkpoints.names import class_names, coco_by_id
from maskwright.checkpoints.origins import Origin, Shapes
from maskwright.checkpoints.origins.detr import BLOCKS, LAYERS, RESNET, count, split

MANY = 1500  # queries of the second group, in every published file

OFFICIAL = [
    (r"^backbone\.0\.body\.", "backbone."),
    *RESNET,
    (r"^input_proj\.(\d+)\.0\.", r"project.\1.conv."),
    (r"^input_proj\.(\d+)\.1\.", r"project.\1.norm."),
    (r"^query_embed\.", "queries."),
    (r"^class_embed\.", "class_heads."),
    (r"^bbox_embed\.", "box_heads."),
    (r"^transformer\.level_embed$", "levels"),
    (r"^transformer\.enc_output\.", "proposal."),
    (r"^transformer\.enc_output_norm\.", "proposal_norm."),
    (r"^transformer\.pos_trans\.", "position."),
    (r"^transformer\.pos_trans_norm\.", "position_norm."),
    (r"^transformer\.(encoder|decoder)\.layers\.", r"\1."),
    (r"^encoder\.(\d+)\.self_attn\.", r"encoder.\1.attention."),
    (r"^decoder\.(\d+)\.cross_attn\.", r"decoder.\1.cross_attention."),
    *LAYERS,
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".output."),
    (r"^encoder\.(\d+)\.norm1\.", r"encoder.\1.norm."),
    (r"^encoder\.(\d+)\.norm2\.", r"encoder.\1.feed_forward.norm."),
    (r"^decoder\.(\d+)\.norm1\.", r"decoder.\1.norm."),
    (r"^decoder\.(\d+)\.norm2\.", r"decoder.\1.self_attention.norm."),
    (r"^decoder\.(\d+)\.norm3\.", r"decoder.\1.feed_forward.norm."),
    (r"\.linear1\.", ".feed_forward.expand."),
    (r"\.linear2\.", ".feed_forward.reduce."),
    (r"^", "dense."),
]


def _options(shapes: Shapes, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options by keys and shapes; None for another network."""
    body = "backbone.0.body."
    stem, levels = shapes.get(f"{body}conv1.weight"), shapes.get("transformer.level_embed")
    queries, hidden = shapes.get("query_embed.weight"), shapes.get("transformer.encoder.layers.0.linear1.weight")
    sampled = shapes.get("transformer.encoder.layers.0.self_attn.attention_weights.weight")
    depth = BLOCKS.get(tuple(count(shapes, rf"^backbone\.0\.body\.layer{n}\.(\d+)\.") for n in range(1, 5)))
    layers = count(shapes, r"^transformer\.decoder\.layers\.(\d+)\.")
    rows = shapes.get(f"class_embed.{layers}.weight")
    needed = (stem, levels, queries, hidden, sampled, depth, rows, shapes.get("transformer.pos_trans.weight"))
    if any(n is None for n in needed):
        return None
    assert stem is not None and levels is not None and queries is not None and hidden is not None  # noqa: PT018
    assert sampled is not None and depth is not None and rows is not None  # noqa: PT018
    if queries[1] != levels[1]:  # a position and a content each: one stage
        return None
    if f"{body}layer1.0.conv3.weight" not in shapes:
        depth = {50: 34}.get(depth, depth)
    many = MANY if queries[0] > MANY else 0
    return {
        # The rows of the authors' heads are COCO's category ids, used or not, from 0 on.
        "classes": ("N/A", *coco_by_id()) if rows[0] == 91 else class_names(rows[0]),
        "backbone": {"name": f"resnet{depth}", "width": stem[0], "norm": "frozen", "frozen": 2},
        "in_channels": stem[1],
        "transformer": {
            "width": levels[1], "heads": 8, "hidden": hidden[0], "levels": levels[0],
            "points": sampled[0] // (8 * levels[0]), "decoder_layers": layers,
            "encoder_layers": count(shapes, r"^transformer\.encoder\.layers\.(\d+)\."),
            "queries": queries[0] - many,
        },
        "many_queries": many,
    }  # fmt: skip


ORIGINS = [
    Origin(
        name="H-Deformable-DETR",
        system="h-detr",
        rename=OFFICIAL,
        recognise=_options,
        finish=split,
        # The decoder holds the heads a second time.
        ignore=(r"^transformer\.decoder\.(class|bbox)_embed\.", r"\.num_batches_tracked$"),
        code_licence="MIT",
        weights_licence="MIT",
    ),
]
