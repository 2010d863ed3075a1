"""Windows of one size that slide over every place of a pyramid of resized images, and what they find.

What DeepMask and InstanceFCN share: the pyramid, where the windows are, which of them learn from an object, and how the
best become proposals. Objects have no class here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.paste import Rule, paste_masks
from maskwright.structures import Instances, Masks, Placement


@dataclass(frozen=True)
class Windows:
    """All windows of a pyramid, level by level and row by row."""

    boxes: Float[Tensor, "n 4"]  # in the pixels of the network's input; they may reach beyond it
    places: Int[Tensor, "n 3"]  # level, y, x
    scales: Float[Tensor, " n"]  # pixels of their level per pixel of the input

    @property
    def centres(self) -> Float[Tensor, "n 2"]:
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


@dataclass(frozen=True)
class Assigned:
    """Which windows learn what: rows of `Windows`."""

    positive: Bool[Tensor, " n"]
    owners: Int[Tensor, " n"]  # the object of each positive one
    negative: Bool[Tensor, " n"]


def resized(images: Float[Tensor, "b c h w"], scale: float, corners: bool) -> Float[Tensor, "b c _h _w"]:
    """Images bilinearly at round(side * scale), without anti-aliasing; `corners`: the outer pixels' centres stay."""
    size = [max(1, int(side * scale + 0.5)) for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=corners)


def planes_of(shape: Sequence[int], sizes: Sequence[Sequence[int]], multiple: int) -> list[tuple[int, int]]:
    """What each image of `sizes` (H, W) would fill alone, rounded up to `multiple`, of a batch of `shape`."""
    height, width = shape[-2:]
    return [(min(-(-h // multiple) * multiple, height), min(-(-w // multiple) * multiple, width)) for h, w in sizes]


def inputs_of(images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]], multiple: int) -> tuple[Tensor, ...]:
    """What `forward` is called with: `sizes` only where some image is smaller than the batch, and on the host, where
    they decide which images go through the network together."""
    if all(plane == tuple(images.shape[-2:]) for plane in planes_of(images.shape, sizes, multiple)):
        return (images,)
    return images, torch.tensor([list(size) for size in sizes], dtype=torch.int64)


def pyramid(
    images: Float[Tensor, "b c h w"],
    sizes: Int[Tensor, "b 2"] | None,
    multiple: int,
    scales: Sequence[float],
    level: Callable[[Tensor, float], Tensor],
    network: Callable[[Tensor], tuple[Tensor, ...]],
    fills: Sequence[float],
    shared: bool = False,
) -> tuple[list[tuple[Tensor, ...]], tuple[Bool[Tensor, "b 1 _h _w"], ...]]:
    """What a network says of each level of a pyramid of images, and which places of it are each image's own (none
    said: all are).

    Images of different planes go through it one after the other, those of one plane together: many layers see where a
    plane ends, and a group norm sees all of it, so that nothing laid around a smaller image would give what it
    gives alone.

    sizes, multiple  of the images, on the host, see `planes_of`; None: every image fills the batch
    level    images, scale -> a level; what is beyond one is zero
    network  a level -> outputs on one grid; those of smaller images are filled up with `fills`
    shared   the batch goes through it at once all the same, zeros beyond smaller images: see `shares_norms`
    """
    if sizes is None:
        return [network(level(images, scale)) for scale in scales], ()
    planes = planes_of(images.shape, sizes.tolist(), multiple)
    lots = {plane: [n for n, own in enumerate(planes) if own == plane] for plane in dict.fromkeys(planes)}
    order = torch.tensor([row for rows in lots.values() for row in rows], device=images.device).argsort()
    result, there = [], []
    for scale in scales:
        levels = [level(images[rows, :, :height, :width], scale) for (height, width), rows in lots.items()]
        if shared:
            result.append(network(_joined(levels, 0.0)[order]))
            continue
        outputs = [network(own) for own in levels]
        own = [torch.ones_like(first[:, :1], dtype=torch.bool) for first, *_ in outputs]
        parts = zip(zip(*outputs, strict=True), fills, strict=True)
        result.append(tuple(_joined(each, fill)[order] for each, fill in parts))
        there.append(_joined(own, 0.0)[order])
    return result, tuple(there)


def _joined(parts: Sequence[Tensor], fill: float) -> Tensor:
    """One batch of planes of different sizes, `fill` right of and below the smaller ones."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return torch.cat([functional.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2]), value=fill) for p in parts])


def shares_norms(module: nn.Module) -> bool:
    """Whether batch norms learn here: their statistics are those of a whole batch, and processes that share them must
    come to each as often as the others."""
    return any(isinstance(child, _BatchNorm) and child.training for child in module.modules())


def windows_of(
    maps: Sequence[Tensor], scales: Sequence[float], stride: int, side: float, first: float = 0.0
) -> Windows:
    """Windows of `side` pixels of their level, `stride` apart; the first one's centre is at `first` pixels."""
    boxes, places, factors = [], [], []
    for level, (values, scale) in enumerate(zip(maps, scales, strict=True)):
        height, width = values.shape[-2:]
        rows, columns = (torch.arange(n, device=values.device) for n in (height, width))
        y, x = (v.flatten() for v in torch.meshgrid(rows, columns, indexing="ij"))
        corner = torch.stack([x, y], 1).float() * stride + (first - side / 2)
        boxes.append(torch.cat([corner, corner + side], 1) / scale)
        places.append(torch.stack([torch.full_like(y, level), y, x], 1))
        factors.append(torch.full((len(y),), scale, device=values.device))
    return Windows(torch.cat(boxes), torch.cat(places), torch.cat(factors))


def assign(
    windows: Windows, target: Instances, *, canonical: float, shift: float, octaves: float, margin: float, far: float
) -> Assigned:
    """Positive is a window that an object is centred in and fits: at the window's scale, its longer side is within
    2 ** `octaves` of `canonical` and its box's centre at most `shift` pixels from the window's, in x and in y. The
    nearest such object is the owner. Negative is one with no object within `margin` pixels and 2 ** `far` of scale;
    what is between learns nothing."""
    boxes = target.boxes.to(windows.boxes)
    count = len(windows.boxes)
    if not len(boxes):
        none = torch.zeros(count, dtype=torch.bool, device=boxes.device)
        return Assigned(none, none.long(), ~none)
    middles, longer = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1)
    away = (windows.centres[:, None] - middles[None]).abs().amax(-1) * windows.scales[:, None]  # (N, G)
    octave = (longer[None] * windows.scales[:, None] / canonical).clamp(min=1e-6).log2().abs()
    fits = (away <= shift) & (octave <= octaves + 1e-6)
    owners = torch.where(fits, away, torch.inf).argmin(1)
    return Assigned(fits.any(1), owners, ~((away < margin) & (octave < far)).any(1))


def reachable(windows: Windows, size: tuple[int, int], stride: int) -> Bool[Tensor, " n"]:
    """Windows whose centres lie on an image of `size` (H, W), or less than a place beyond it: not on padding."""
    limit = windows.boxes.new_tensor([size[1], size[0]])
    return ((windows.centres - limit) * windows.scales[:, None] < stride).all(1)


def own_places(there: Sequence[Bool[Tensor, "b 1 _h _w"]], image: int, windows: Windows) -> Bool[Tensor, " n"]:
    """Windows that an image has alone too, see `pyramid`."""
    if not there:
        return torch.ones(len(windows.boxes), dtype=torch.bool, device=windows.boxes.device)
    return torch.cat([level[image].flatten() for level in there])


def proposals(
    scores: Float[Tensor, " n"],
    windows: Windows,
    masks_of: Callable[[Int[Tensor, " k"]], Float[Tensor, "k v u"]],
    placement: Placement,
    *,
    score_threshold: float,
    nms_threshold: float | None,
    detections: int,
    candidates: int,
    rule: Rule,
) -> Instances:
    """The best windows of one image as objects, best first, on its own grid.

    masks_of    what is in the masks of some windows, above zero
    nms         on the tight boxes of the masks, which are also the objects' boxes
    candidates  best windows whose masks are made at all
    rule        how a mask is laid into its window, see `paste_masks`
    """
    best, rows = scores.topk(min(candidates if nms_threshold is not None else detections, len(scores)))
    rows, best = rows[best >= score_threshold], best[best >= score_threshold]
    values = masks_of(rows).float()
    tight = Masks.from_dense(values > 0).boxes().to(windows.boxes)
    own = windows.boxes[rows]
    step = (own[:, 2:] - own[:, :2]) / own.new_tensor([values.shape[2], values.shape[1]])
    boxes = own[:, :2].repeat(1, 2) + tight * step.repeat(1, 2)
    solid = (tight[:, 2:] > tight[:, :2]).all(1)
    values, own, boxes, best = values[solid], own[solid], boxes[solid], best[solid]
    if nms_threshold is not None:
        kept = box_ops.nms(boxes, best, torch.zeros_like(best, dtype=torch.int64), nms_threshold)
        values, own, best = values[kept], own[kept], best[kept]
    values, own, best = values[:detections], own[:detections], best[:detections]
    values = values.flip(-1) if placement.mirrored else values
    size = placement.image_size
    masks = paste_masks(values, placement.boxes_to_image(own), size, rule=rule, threshold=0.0, strict=True)
    frames = masks.boxes()
    there = (frames[:, 2:] > frames[:, :2]).all(1)
    masks, frames, best = masks[there], frames[there].to(best), best[there.to(best.device)]
    return Instances(size, frames, torch.zeros_like(best, dtype=torch.int64), masks, best)


def logit_of(threshold: float) -> float:
    """The logit at which a mask's probability is `threshold`; UsageError where there is none."""
    if not 0 < threshold < 1:
        raise UsageError(f"mask_threshold is {threshold}; expected a probability between 0 and 1")
    return math.log(threshold / (1 - threshold))


def scales_between(low: float, high: float, step: float) -> tuple[float, ...]:
    """2 to the powers low, low + step, ... high."""
    return tuple(2.0 ** (low + n * step) for n in range(math.floor((high - low) / step + 1.5)))


def checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Scales of a pyramid as numbers; UsageError where there is none, or one that is not above zero."""
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UsageError(
            f"scales is {tuple(scales)}; expected at least one number, all above 0: pixels of a level per "
            "pixel of the input"
        )
    return tuple(float(scale) for scale in scales)
