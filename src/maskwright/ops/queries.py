"""From what queries say, a class distribution and a mask each, to objects, segments and labels on the image.

Masks are logits on a coarse grid that covers the network's input. They are brought to the image's own grid, in two
bilinear steps over the input's, before anything is decided (Mask2Former, arXiv 2112.01527; MaskFormer, 2107.06278).
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

MasksOf = Callable[[Tensor], Tensor]  # indices of R queries -> logits of their masks (R, h, w)


@dataclass(frozen=True)
class Choice:
    """Which answers of the queries become objects.

    detections       so many (query, class) pairs of the largest class score are looked at
    score_threshold  of the finished score, class score x mean mask probability inside the mask
    best_class       a query is an object of its best class alone; as published it may be one of several classes
    nms_threshold    None: as published, duplicates stay; else of masks of one class that overlap by more than this the
                     better one alone
    max_overlap      None: as published; else the objects compete for pixels as segments of a panoptic result do, and
                     those that lose more than this share of their mask to others are dropped, whatever their class
    """

    detections: int = 100
    score_threshold: float = 0.0
    best_class: bool = False
    nms_threshold: float | None = None
    max_overlap: float | None = None


def mean_inside(values: Float[Tensor, "n h w"], solid: Bool[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Mean probability inside each mask; zero for an empty one."""
    return (values.sigmoid() * solid).flatten(1).sum(1) / (solid.flatten(1).sum(1) + 1e-6)


@torch.no_grad()
def objects(
    scores: Float[Tensor, "n k"],
    masks_of: MasksOf,
    placement: Placement,
    size: tuple[int, int],
    choice: Choice,
    things: Bool[Tensor, " k"] | None = None,
) -> Instances:
    """Objects of one image, best first; `scores` are of the classes without "no object", `size` the input's.

    With `things` only objects of these classes stay, those of others having had their chance among the `detections`.
    Empty masks are dropped.
    """
    if choice.best_class:
        scores = scores * torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1])
    kinds = scores.shape[1]
    best, place = scores.flatten().topk(min(choice.detections, scores.numel()))
    wanted = (best >= choice.score_threshold) & (best > 0)  # what comes can only lower a score
    if things is not None:
        wanted &= things[place % kinds]
    best, place = best[wanted], place[wanted]
    queries, which = place.div(kinds, rounding_mode="floor").unique(return_inverse=True)
    masks, sure = place_measured(masks_of(queries), placement, size, mean_inside, threshold=0.0)
    final, areas = best * sure[which], masks.areas().to(best.device)
    keep = ((final >= choice.score_threshold) & (areas[which] > 0)).nonzero().flatten()
    keep = keep[final[keep].argsort(descending=True, stable=True)]
    which = which[keep]
    boxes = masks.boxes().to(best.device)[which]
    found = Instances(placement.image_size, boxes, place[keep] % kinds, masks[which], final[keep])
    if choice.nms_threshold is not None:
        assert found.masks is not None
        rows = mask_nms(found.masks.iou(found.masks).to(best.device), found.labels, choice.nms_threshold)
        found, which = found[rows], which[rows]
    if choice.max_overlap is not None and len(found):
        found = _left(found, masks_of(queries[which]), placement, size, choice.max_overlap)
    return found


def _left(found: Instances, logits: Tensor, placement: Placement, size: tuple[int, int], lost: float) -> Instances:
    """Objects that lose at most this share of their mask where every pixel goes to the best of them."""
    assert found.scores is not None
    assert found.masks is not None
    won = torch.zeros(len(found), dtype=torch.int64, device=logits.device)
    for values, _ in _bands(logits, placement, size):
        best = _best(found.scores, values)
        own = values.gather(0, best[None])[0] > 0
        won += best[own].bincount(minlength=len(found))
    areas = found.masks.areas().to(won.device)
    return found[areas - won <= lost * areas]


@torch.no_grad()
def segments(
    probabilities: Float[Tensor, "n k1"],
    masks_of: MasksOf,
    placement: Placement,
    size: tuple[int, int],
    things: Bool[Tensor, " k"],
    *,
    score_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    inside: bool = True,
) -> Panoptic:
    """One image divided among queries; `probabilities` with "no object" last.

    Queries that are sure of a class compete: a pixel goes to the largest score x mask probability. A segment is dropped
    if it wins less than `overlap_threshold` of its mask (probability >= 0.5); regions of one class are joined.

    inside  a segment is what it wins of its own mask (Mask2Former); without, all that it wins (MaskFormer)
    """
    scores, labels = probabilities.max(1)
    sure = ((labels < len(things)) & (scores > score_threshold)).nonzero().flatten()
    if not len(sure):
        return Panoptic.empty(placement.image_size, probabilities.device)
    scores, labels = scores[sure], labels[sure]
    count = len(sure)
    won, whole, kept = torch.zeros(3, count, dtype=torch.int64, device=scores.device)
    plane = torch.full(placement.image_size, -1, dtype=torch.int32, device=scores.device)
    for values, seen in _bands(masks_of(sure), placement, size):
        best, mask = _best(scores, values), values >= 0
        own = mask.gather(0, best[None])[0] if inside else torch.ones_like(best, dtype=torch.bool)
        whole += (mask & seen.valid).flatten(1).sum(1)
        won += best[seen.valid].bincount(minlength=count)
        own = own & seen.valid
        kept += best[own].bincount(minlength=count)
        plane[seen.rows] = torch.where(own, best, -1).int()
    good = (kept > 0) & (whole > 0) & (won.double() / whole.clamp(min=1) >= overlap_threshold)
    if not good.any():
        return Panoptic.empty(placement.image_size, probabilities.device)
    # Numbers in the order of the queries; a region takes the number of the first of its class.
    chosen = good.nonzero().flatten()
    countable = things[labels[chosen]]
    same = (labels[chosen][:, None] == labels[chosen]) & ~countable[:, None]
    leader = torch.where(countable, torch.arange(len(chosen), device=chosen.device), same.int().argmax(1))
    leaders, number = leader.unique(return_inverse=True)
    table = torch.zeros(count + 1, dtype=torch.int64, device=scores.device)  # the last entry is nothing
    table[chosen] = number + 1
    values = scores.new_zeros(len(leaders)).scatter_reduce(0, number, scores[chosen], "amax")
    rows = chosen[leaders]
    return Panoptic.from_map(table[plane.long()], labels[rows], things[labels[rows]], scores=values)


@torch.no_grad()
def semantic(
    scores: Float[Tensor, "n k"],
    masks_of: MasksOf,
    placement: Placement,
    size: tuple[int, int],
    *,
    classes_first: bool = False,
) -> Int[Tensor, "_h _w"]:
    """The label of each pixel: of the largest sum over the queries of class score x mask probability; -1 outside what
    the network saw.

    classes_first  sums are made on the input's grid and brought to the image, as where a system was published for
                   this task alone
    """
    maps = semantic_maps(scores, masks_of, placement, size, classes_first=classes_first)
    return torch.cat([values.argmax(0).where(seen.valid, -1) for values, seen in maps])


def semantic_maps(
    scores: Float[Tensor, "n k"],
    masks_of: MasksOf,
    placement: Placement,
    size: tuple[int, int],
    *,
    classes_first: bool = False,
) -> Iterator[tuple[Float[Tensor, "k _h w"], Band]]:
    """What `semantic` takes the largest of, band by band from the top."""
    logits = masks_of(torch.arange(len(scores), device=scores.device))
    if classes_first:
        whole = Placement.identity(size)
        mixed = [torch.einsum("nk,nhw->khw", scores, v.sigmoid()) for v, _ in _bands(logits, whole, size)]
        yield from _bands(torch.cat(mixed, 1), placement, size, straight=True)
        return
    for values, seen in _bands(logits, placement, size):
        yield torch.einsum("nk,nhw->khw", scores, values.sigmoid()), seen


@dataclass(frozen=True)
class Band:
    """Some rows of the image."""

    rows: slice
    valid: Bool[Tensor, "h w"]  # what the network saw of them


def _bands(
    planes: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    *,
    straight: bool = False,
    budget: int = 128 << 20,
) -> Iterator[tuple[Float[Tensor, "n _h w"], Band]]:
    """Planes on the image's grid, so many rows at a time that they and what is made of them take `budget` bytes.

    straight  the planes already have the input's resolution
    """
    planes = planes.float()
    if straight:
        planes, size = planes[:, : placement.size[0], : placement.size[1]], placement.size
    down, across = axes(planes, placement, size)
    seen = (down > 0).any(1)[:, None] & (across > 0).any(1)[None]
    height, width = placement.image_size
    step = max(1, budget // (16 * max(1, len(planes)) * width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        yield down[rows] @ planes @ across.T, Band(rows, seen[rows])


def _best(scores: Tensor, values: Tensor) -> Tensor:
    """Whose score x probability is largest at each pixel."""
    return (scores[:, None, None] * values.sigmoid()).argmax(0)
