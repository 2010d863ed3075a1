"""Proposals without prompts for single objects: everything in an image, and objects similar to a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from maskwright.structures import Embedding, Instances, Masks, Placement, Prompts
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.web.assistant import Assistant

OVERLAP = 0.5  # IoU with an object that is there, or share of a proposal inside it, above which nothing is proposed
LEAST_PIXELS = 9
MOST = 400  # proposals of an image
POINTS = 96  # places that are tried for objects like a given one


def everything(assistant: Assistant, index: int) -> Instances:
    """Return everything that a promptable system finds in an image, best first.

    Systems predict the quality of their masks differently: if none reaches the published thresholds, lower ones apply.

    Args:
        assistant: The system.
        index: The image.
    """
    embedding = assistant.embedding(index)
    raw = assistant.system.features(embedding)
    with torch.no_grad():
        found = assistant.system.decode(raw, [embedding.placement], detections=MOST)[0]
        if not len(found):
            found = assistant.system.decode(
                raw, [embedding.placement], detections=MOST, score_threshold=0.3, stability_score_thresh=0.8
            )[0]
    return packed(found)


def similar(assistant: Assistant, index: int, example: Masks) -> Instances:
    """Return the objects of an image that look like a given one, most similar first.

    The features of the embedding are averaged inside the example; places whose features have a similar direction are
    prompted with points, and answers that are similar themselves, and of similar size, are kept.

    Args:
        assistant: The system.
        index: The image.
        example: The mask of the given object.
    """
    embedding = assistant.embedding(index)
    system = assistant.system
    features = functional.normalize(embedding.tensors["image"].float().cpu(), dim=0)  # (C, h, w)
    share = shares(example, embedding, features.shape[1:])
    own = mean_direction(features, share)[0]
    likeness = torch.einsum("chw,c->hw", features, own)
    inside = likeness[share[0] > 0.5]
    least = 0.6 * float(inside.mean() if len(inside) else likeness.max())
    points = peaks(likeness, embedding, least)
    if not len(points):
        return Instances.empty(embedding.image_size)
    prompts = Prompts.from_points(embedding.image_size, points[:, None])
    found = packed(system.segment(embedding, prompts).best())
    assert found.masks is not None
    directions = mean_direction(features, shares(found.masks, embedding, features.shape[1:]))
    scores = directions @ own
    ratio = found.masks.areas() / max(1, int(example.areas()[0]))
    good = (scores > least) & (ratio > 0.25) & (ratio < 4)
    found = replace(found, scores=scores.clamp(0, 1))[good]
    return suppressed(found)


def peaks(likeness: Float[Tensor, "h w"], embedding: Embedding, least: float) -> Float[Tensor, "p 2"]:
    """Return x, y on the image of the cells that are at least as similar as their neighbours, most similar first."""
    highest = functional.max_pool2d(likeness[None], 3, 1, 1)[0]
    rows, columns = ((likeness == highest) & (likeness > least)).nonzero().unbind(1)
    order = likeness[rows, columns].argsort(descending=True)[:POINTS]
    cells = torch.stack([columns[order], rows[order]], 1).float() + 0.5
    height, width = embedding.input_size
    cells = cells * cells.new_tensor([width / likeness.shape[1], height / likeness.shape[0]])
    points = embedding.placement.points_to_image(cells)
    limit = points.new_tensor([embedding.image_size[1], embedding.image_size[0]])
    return points[((points >= 0) & (points <= limit)).all(1)]


def shares(masks: Masks, embedding: Embedding, grid: Sequence[int]) -> Float[Tensor, "n h w"]:
    """Return the cells of an embedding that masks cover; of masks between the cells, the nearest one."""
    place, (height, width) = embedding.placement, embedding.input_size
    factor = (grid[1] / width, grid[0] / height)
    onto = Placement(
        place.image_size,
        (int(grid[0]), int(grid[1])),
        (place.scale[0] * factor[0], place.scale[1] * factor[1]),
        (place.offset[0] * factor[0], place.offset[1] * factor[1]),
        place.mirrored,
    )
    planes = masks.place(onto).dense().float()
    boxes = onto.boxes_to_input(masks.boxes())
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).long()
    x, y = centres[:, 0].clamp(0, grid[1] - 1), centres[:, 1].clamp(0, grid[0] - 1)
    missing = (planes.flatten(1).sum(1) == 0).nonzero()[:, 0]
    planes[missing, y[missing], x[missing]] = 1.0
    return planes


def mean_direction(features: Float[Tensor, "c h w"], planes: Float[Tensor, "n h w"]) -> Float[Tensor, "n c"]:
    """Return the direction of the mean feature inside each mask."""
    return functional.normalize(torch.einsum("chw,nhw->nc", features, planes), dim=1)


def suppressed(found: Instances, most: float = 0.5) -> Instances:
    """Return objects, best first, without those that overlap with a better one by an IoU above `most`."""
    assert found.masks is not None
    assert found.scores is not None
    found = found[found.scores.argsort(descending=True)]
    assert found.masks is not None
    overlaps = found.masks.iou(found.masks) > most
    kept: list[int] = []
    for n in range(len(found)):
        if not bool(overlaps[n, kept].any()):
            kept.append(n)
    return found[torch.tensor(kept, dtype=torch.int64)]


def packed(found: Instances) -> Instances:
    """Return objects on the host whose masks are compact and have some pixels."""
    found = found.to("cpu")
    assert found.masks is not None
    found = replace(found, masks=found.masks.pack())
    assert found.masks is not None
    return found[found.masks.areas() >= LEAST_PIXELS][:MOST]


def free_of(masks: Masks, others: Masks) -> list[bool]:
    """Return which masks are not on one of `others` already.

    Args:
        masks: Proposals.
        others: Objects that are there.
    """
    if not len(others) or not len(masks):
        return [True] * len(masks)
    overlap = masks.iou(others).amax(1)
    crowd = torch.ones(len(others), dtype=torch.bool)
    inside = masks.iou(others, crowd).amax(1)  # the share of a proposal that is inside of an object
    return cast("list[bool]", cast(Any, (overlap <= OVERLAP) & (inside <= 0.8)).tolist())


def answers_by_box(system: PromptableSystem, embedding: Embedding, boxes: Tensor) -> Instances:
    """Return the mask for each box."""
    return packed(system.segment(embedding, Prompts.from_boxes(boxes, embedding.image_size)).best())
