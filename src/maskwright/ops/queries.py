"""From queries, with class probabilities and mask logits each, to objects, segments and labels on the image.

Masks are logits on a coarse grid that covers the network's input. They are resized to the image's own grid, in two
bilinear steps by way of the input's grid, before any decision is made (Mask2Former, arXiv 2112.01527; MaskFormer,
arXiv 2107.06278).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops.planes import axes, place_measured
from maskwright.ops.suppression import mask_nms
from maskwright.structures import Instances, Panoptic, Placement

MaskLogits = Callable[[Tensor], Tensor]  # indices of R queries -> logits of their masks (R, h, w)


@dataclass(frozen=True)
class Selection:
    """Which queries become objects.

    Attributes:
        detections: Number of (query, class) pairs with the largest class probability that are considered.
        score_threshold: Lower bound of the final score, class probability x mean mask probability inside the mask.
        best_class: A query becomes an object of its best class only; as published, it may become one of several.
        nms_threshold: Overlap (IoU) above which the lower scored of two masks of one class is dropped; None: none is
            dropped, as published.
        max_overlap: Share of a mask that may be lost when the objects compete for pixels as the segments of a panoptic
            result do; an object that loses more is dropped, whatever its class. None: none is dropped, as published.
    """

    detections: int = 100
    score_threshold: float = 0.0
    best_class: bool = False
    nms_threshold: float | None = None
    max_overlap: float | None = None


def mean_inside(logits: Float[Tensor, "n h w"], inside: Bool[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Mean probability inside each mask; zero for an empty mask."""
    return (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)


@torch.no_grad()
def select_instances(
    scores: Float[Tensor, "n k"],
    masks_of: MaskLogits,
    placement: Placement,
    size: tuple[int, int],
    selection: Selection,
    things: Bool[Tensor, " k"] | None = None,
) -> Instances:
    """Converts the queries of one image to objects (Mask2Former, section 4 and the official inference code).

    Args:
        scores: Class probabilities of each query, without "no object".
        masks_of: Returns the mask logits of some queries.
        placement: How the image was placed in the network's input.
        size: Height and width of the input, padding included.
        selection: Which queries become objects.
        things: Classes whose objects are kept. Those of other classes are removed after they have competed for the
            `detections`. None: all.

    Returns:
        The objects, best first. Empty masks are dropped.
    """
    if selection.best_class:
        scores = scores * torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1])
    classes = scores.shape[1]
    best, pair = scores.flatten().topk(min(selection.detections, scores.numel()))
    wanted = (best >= selection.score_threshold) & (best > 0)  # the mask's factor can only lower a score
    if things is not None:
        wanted &= things[pair % classes]
    best, pair = best[wanted], pair[wanted]
    queries, which = pair.div(classes, rounding_mode="floor").unique(return_inverse=True)
    masks, quality = place_measured(masks_of(queries), placement, size, mean_inside, threshold=0.0)
    final, areas = best * quality[which], masks.areas().to(best.device)
    keep = ((final >= selection.score_threshold) & (areas[which] > 0)).nonzero().flatten()
    keep = keep[final[keep].argsort(descending=True, stable=True)]
    which = which[keep]
    boxes = masks.boxes().to(best.device)[which]
    found = Instances(placement.image_size, boxes, pair[keep] % classes, masks[which], final[keep])
    if selection.nms_threshold is not None:
        assert found.masks is not None
        rows = mask_nms(found.masks.iou(found.masks).to(best.device), found.labels, selection.nms_threshold)
        found, which = found[rows], which[rows]
    if selection.max_overlap is not None and len(found):
        found = _without_losers(found, masks_of(queries[which]), placement, size, selection.max_overlap)
    return found


def _without_losers(
    found: Instances, logits: Tensor, placement: Placement, size: tuple[int, int], max_loss: float
) -> Instances:
    """The objects that lose at most `max_loss` of their mask when each pixel is assigned to the best of them."""
    assert found.scores is not None
    assert found.masks is not None
    won = torch.zeros(len(found), dtype=torch.int64, device=logits.device)
    for values, _ in resized_bands(logits, placement, size):
        best = _best_query(found.scores, values)
        own = values.gather(0, best[None])[0] > 0
        won += best[own].bincount(minlength=len(found))
    areas = found.masks.areas().to(won.device)
    return found[areas - won <= max_loss * areas]


@torch.no_grad()
def select_segments(
    probabilities: Float[Tensor, "n k1"],
    masks_of: MaskLogits,
    placement: Placement,
    size: tuple[int, int],
    things: Bool[Tensor, " k"],
    *,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    inside: bool = True,
) -> Panoptic:
    """Divides one image among its queries (MaskFormer, section 3.4).

    Queries whose best class scores more than `score_threshold` compete: a pixel is assigned to the largest product of
    score and mask probability. Segments of one stuff class are joined.

    Args:
        probabilities: Class probabilities of each query, "no object" last.
        masks_of: Returns the mask logits of some queries.
        placement: How the image was placed in the network's input.
        size: Height and width of the input, padding included.
        things: True for each class that is a countable object.
        score_threshold: Lower bound of a query's class probability.
        overlap_threshold: A segment is dropped if it wins less than this share of its mask (probability >= 0.5).
        inside: A segment is what its query wins inside the query's own mask (Mask2Former); if False, all that its query
            wins (MaskFormer).
    """
    scores, labels = probabilities.max(1)
    confident = ((labels < len(things)) & (scores > score_threshold)).nonzero().flatten()
    if not len(confident):
        return Panoptic.empty(placement.image_size, probabilities.device)
    scores, labels = scores[confident], labels[confident]
    count = len(confident)
    won, whole, kept = torch.zeros(3, count, dtype=torch.int64, device=scores.device)
    plane = torch.full(placement.image_size, -1, dtype=torch.int32, device=scores.device)
    for values, band in resized_bands(masks_of(confident), placement, size):
        best, mask = _best_query(scores, values), values >= 0
        own = mask.gather(0, best[None])[0] if inside else torch.ones_like(best, dtype=torch.bool)
        whole += (mask & band.valid).flatten(1).sum(1)
        won += best[band.valid].bincount(minlength=count)
        own = own & band.valid
        kept += best[own].bincount(minlength=count)
        plane[band.rows] = torch.where(own, best, -1).int()
    good = (kept > 0) & (whole > 0) & (won.double() / whole.clamp(min=1) >= overlap_threshold)
    if not good.any():
        return Panoptic.empty(placement.image_size, probabilities.device)
    # Segments are numbered in the order of the queries; a stuff segment has the number of the first of its class.
    chosen = good.nonzero().flatten()
    countable = things[labels[chosen]]
    same = (labels[chosen][:, None] == labels[chosen]) & ~countable[:, None]
    leader = torch.where(countable, torch.arange(len(chosen), device=chosen.device), same.int().argmax(1))
    leaders, number = leader.unique(return_inverse=True)
    table = torch.zeros(count + 1, dtype=torch.int64, device=scores.device)  # the last entry: no segment
    table[chosen] = number + 1
    values = scores.new_zeros(len(leaders)).scatter_reduce(0, number, scores[chosen], "amax")
    rows = chosen[leaders]
    return Panoptic.from_map(table[plane.long()], labels[rows], things[labels[rows]], scores=values)


@torch.no_grad()
def semantic_labels(
    scores: Float[Tensor, "n k"],
    masks_of: MaskLogits,
    placement: Placement,
    size: tuple[int, int],
    *,
    classes_first: bool = False,
) -> Int[Tensor, "_h _w"]:
    """Labels each pixel of one image: the class with the largest sum over the queries of class probability x mask
    probability (MaskFormer, section 3.4).

    Args:
        scores: Class probabilities of each query, without "no object".
        masks_of: Returns the mask logits of some queries.
        placement: How the image was placed in the network's input.
        size: Height and width of the input, padding included.
        classes_first: Sum over the queries on the input's grid and resize the sums; otherwise resize the masks first.

    Returns:
        The label of each pixel of the image; -1 for those outside the network's input.
    """
    maps = semantic_maps(scores, masks_of, placement, size, classes_first=classes_first)
    return torch.cat([values.argmax(0).where(band.valid, -1) for values, band in maps])


def semantic_maps(
    scores: Float[Tensor, "n k"],
    masks_of: MaskLogits,
    placement: Placement,
    size: tuple[int, int],
    *,
    classes_first: bool = False,
) -> Iterator[tuple[Float[Tensor, "k _h _w"], Band]]:
    """The sums whose largest `semantic_labels` returns, band by band from the top; arguments as there."""
    logits = masks_of(torch.arange(len(scores), device=scores.device))
    if classes_first:
        whole = Placement.identity(size)
        sums = [torch.einsum("nk,nhw->khw", scores, v.sigmoid()) for v, _ in resized_bands(logits, whole, size)]
        yield from resized_bands(torch.cat(sums, 1), placement, size, at_input=True)
        return
    for values, band in resized_bands(logits, placement, size):
        yield torch.einsum("nk,nhw->khw", scores, values.sigmoid()), band


@dataclass(frozen=True)
class Band:
    """Some rows of an image.

    Attributes:
        rows: Which rows.
        valid: True for the pixels that the network's input shows.
    """

    rows: slice
    valid: Bool[Tensor, "h w"]


def resized_bands(
    planes: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    *,
    at_input: bool = False,
    budget: int = 128 << 20,
) -> Iterator[tuple[Float[Tensor, "n _h w"], Band]]:
    """Resizes planes to the image's grid, some rows at a time, so that memory is bounded.

    Args:
        planes: Values on a grid that covers the network's input.
        placement: How the image was placed in the network's input.
        size: Height and width of the input, padding included.
        at_input: The planes already have the input's resolution.
        budget: Bytes of scratch for the planes of a band and what is computed from them.
    """
    planes = planes.float()
    if at_input:
        planes, size = planes[:, : placement.size[0], : placement.size[1]], placement.size
    down, across = axes(planes, placement, size)
    valid = (down > 0).any(1)[:, None] & (across > 0).any(1)[None]
    height, width = placement.image_size
    step = max(1, budget // (16 * max(1, len(planes)) * width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        yield down[rows] @ planes @ across.T, Band(rows, valid[rows])


def _best_query(scores: Tensor, values: Tensor) -> Tensor:
    """The query with the largest score x mask probability at each pixel."""
    return (scores[:, None, None] * values.sigmoid()).argmax(0)
