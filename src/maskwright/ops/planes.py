"""Putting whole planes of probabilities, on the network's grid, onto the image's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.ops.interpolation import weights
from maskwright.structures import Masks, Placement


def place_planes(
    probabilities: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    steps: Literal[1, 2] = 2,
    budget: int = 64 << 20,
) -> Masks:
    """Masks on the image from planes that cover the network's input of `size` (H, W), padding included.

    Both steps are bilinear, by pixel centres and without anti-aliasing: to the input's grid, of which only the valid
    part is kept, then from there to the image's. Kept are values > threshold (which is 0 or above). Both steps are
    linear along each axis, so one small matrix per axis does them at once, and padding is never read.

    steps   1: straight to the image's grid instead (YOLACT)
    budget  bytes of scratch on an accelerator, where whole planes are made, as many at a time as fit. On the host each
            mask is made on the pixels alone that its probabilities above the threshold reach, and so many bytes of them
            are held before they are packed
    """
    return place_measured(probabilities, placement, size, None, threshold=threshold, steps=steps, budget=budget)[0]


def place_measured(
    planes: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    measure: Callable[[Tensor, Tensor], Tensor] | None,
    *,
    threshold: float = 0.5,
    steps: Literal[1, 2] = 2,
    budget: int = 64 << 20,
) -> tuple[Masks, Float[Tensor, " n"]]:
    """As `place_planes`, with a number for each mask: `measure` of values on the image's grid and of which of them
    are in the mask, both (k, h, w), gives k of them. It must not depend on pixels outside the mask, of which it is not
    shown all. Without it the numbers are zeros."""
    planes = planes.float()
    if not len(planes):
        return Masks.empty(placement.image_size), planes.new_zeros(0)
    height, width = placement.image_size
    down, across = axes(planes, placement, size, steps)
    if planes.device.type != "cpu":
        step = max(1, budget // (height * max(width, planes.shape[2]) * (9 if measure is None else 17)))
        masks, numbers = [], []
        for part in planes.split(step):
            values = down @ part @ across.T
            solid = values > threshold
            numbers.append(planes.new_zeros(len(part)) if measure is None else measure(values, solid))
            masks.append(Masks.from_dense(solid).pack())
        return Masks.join(masks), torch.cat(numbers)
    # A mean of neighbours is above the threshold only if one of them is.
    solid = planes > threshold
    rows, columns = _reached(solid.any(2), down), _reached(solid.any(1), across)
    corners, parts, crops, held = torch.stack([columns[:, 0], rows[:, 0]], 1), [], [], 0
    numbers = []
    windows = torch.cat([rows, _used(down, rows), columns, _used(across, columns)], 1).tolist()
    for plane, (top, bottom, upper, lower, left, right, near, far) in zip(planes, windows, strict=True):
        small = down[top:bottom, upper:lower] @ plane[upper:lower, near:far] @ across[left:right, near:far].T
        crops.append(small > threshold)
        if measure is not None:
            numbers.append(measure(small[None], crops[-1][None]))
        held += small.numel()
        if held > budget:
            parts.append(Masks.from_crops(crops, corners[: len(crops)], placement.image_size))
            corners, crops, held = corners[len(crops) :], [], 0
    masks = Masks.join([*parts, Masks.from_crops(crops, corners, placement.image_size)])
    return masks, torch.cat(numbers) if numbers else planes.new_zeros(len(planes))


def axes(
    like: Float[Tensor, "n p q"], placement: Placement, size: tuple[int, int], steps: Literal[1, 2] = 2
) -> tuple[Float[Tensor, "h p"], Float[Tensor, "w q"]]:
    """What each of the image's rows takes of each row of planes that cover the input of `size`, and likewise for the
    columns; zeros for what lies outside the input. Planes on the image are `down @ planes @ across.T`."""
    (height, width), (x, y) = placement.image_size, placement.scale
    down = _axis(like, 1, size[0], placement.size[0], height, y, placement.offset[1], False, steps)
    across = _axis(like, 2, size[1], placement.size[1], width, x, placement.offset[0], placement.mirrored, steps)
    return down, across


def label_plane(
    logits: Float[Tensor, "k p q"], placement: Placement, size: tuple[int, int], *, budget: int = 64 << 20
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w"]]:
    """Each of the image's pixels: the best class, -1 where the input does not show it, and that class's probability
    among all, from logits that cover the network's input of `size` (H, W), padding included.

    The padding is cut off, the rest is brought to the image's grid bilinearly, by pixel centres, and only then the
    best is chosen (detectron2). `budget`: bytes of scratch; so many rows of the image are made at a time.
    """
    height, width = placement.image_size
    rows, columns = logits.shape[1] / size[0], logits.shape[2] / size[1]
    down = _neighbours(logits, height, placement.size[0], rows, placement.scale[1], placement.offset[1], False)
    across = _neighbours(
        logits, width, placement.size[1], columns, placement.scale[0], placement.offset[0], placement.mirrored
    )
    labels = torch.full((height, width), -1, dtype=torch.int64, device=logits.device)
    surety = logits.new_zeros(height, width, dtype=torch.float32)
    step = max(1, budget // (16 * len(logits) * max(width, logits.shape[2])))
    for first in range(0, height, step):
        band = slice(first, min(height, first + step))
        upper, lower, part, seen = (v[band] for v in down)
        lines = logits[:, upper].float().lerp(logits[:, lower].float(), part[:, None])
        values = lines[..., across[0]].lerp(lines[..., across[1]], across[2])  # (K, rows, W)
        best = values.argmax(0)
        surety[band] = (values.amax(0) - values.logsumexp(0)).exp() * seen[:, None] * across[3]
        labels[band] = torch.where(seen[:, None] & across[3], best, -1)
    return labels, surety


def _neighbours(
    like: Tensor, pixels: int, valid: int, ratio: float, scale: float, offset: float, mirrored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of the image's pixels along one axis the cells before and after it, how far it is between them, and
    whether the valid part of the input shows it. `ratio`: cells for each pixel of the input."""
    number = torch.arange(pixels, device=like.device, dtype=torch.float32) + 0.5
    place = (pixels - number if mirrored else number) * scale + offset
    seen = (place > 0) & (place < valid)
    place = (place * ratio - 0.5).clamp(0, max(0.0, valid * ratio - 1))
    first = place.floor().long()
    last = max(0, math.ceil(valid * ratio) - 1)
    return first, (first + 1).clamp(max=last), place - first, seen


def place_bits(planes: Bool[Tensor, "n h w"], placement: Placement) -> Masks:
    """Masks on the image from masks on the valid part of the network's input, each pixel taken from the one that its
    upper left corner falls into, as torch's "nearest" does (DETR)."""
    height, width = placement.image_size
    rows = _corners(height, placement.size[0], placement.scale[1], placement.offset[1], False)
    columns = _corners(width, placement.size[1], placement.scale[0], placement.offset[0], placement.mirrored)
    crops, places = [], []
    for plane in planes.cpu():
        parts = []
        for hit, source in ((plane.any(1), rows), (plane.any(0), columns)):
            inside = ((source >= 0) & hit[source.clamp(min=0)]).nonzero().flatten()
            first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            parts.append((first, source[first:last]))
        (top, down), (left, across) = parts
        crops.append(plane[down.clamp(min=0)][:, across.clamp(min=0)] & (down >= 0)[:, None] & (across >= 0))
        places.append((left, top))
    return Masks.from_crops(crops, torch.tensor(places, dtype=torch.int64).reshape(-1, 2), placement.image_size)


def _corners(image: int, valid: int, scale: float, offset: float, mirrored: bool) -> Int[Tensor, " _p"]:
    """The input's pixel under each of the image's along one axis; -1 where there is none."""
    pixels = torch.arange(image, dtype=torch.float64)
    place = (image - 1 - pixels if mirrored else pixels) * scale + offset
    source = (place + 1e-6 * scale).floor()
    return torch.where((source >= 0) & (source < valid), source, -1).long()


def _axis(
    like: Tensor,
    axis: int,
    padded: int,
    valid: int,
    image: int,
    scale: float,
    offset: float,
    mirrored: bool,
    steps: int,
) -> Float[Tensor, "_image _cells"]:
    """What each of the image's pixels takes of each cell along one axis."""
    cells = like.shape[axis]
    pixels = torch.arange(image, device=like.device, dtype=torch.float32) + 0.5
    place = (image - pixels if mirrored else pixels) * scale + offset - 0.5
    seen = (place > -0.5) & (place < valid - 0.5)
    if steps == 1:
        return weights((place + 0.5) * (cells / padded) - 0.5, cells, "border") * seen[:, None]
    inner = torch.arange(valid, device=like.device, dtype=torch.float32)
    onto_input = weights((inner + 0.5) * (cells / padded) - 0.5, cells, "border")  # (valid, cells)
    place = place.clamp(0, valid - 1)
    first = place.floor().long()
    second = (first + 1).clamp(max=valid - 1)
    return onto_input[first].lerp(onto_input[second], (place - first)[:, None]) * seen[:, None]


def _reached(solid: Tensor, axis: Tensor) -> Tensor:
    """For each object the pixels first ... last + 1 along one axis that its solid cells have a part in."""
    hit = solid.float() @ (axis > 0).float().T > 0  # (n, pixels)
    steps = torch.arange(hit.shape[1])
    first = torch.where(hit, steps, hit.shape[1]).amin(1)
    last = torch.where(hit, steps + 1, 0).amax(1)
    return torch.stack([torch.minimum(first, last), last], 1)


def _used(axis: Tensor, pixels: Int[Tensor, "n 2"]) -> Int[Tensor, "n 2"]:
    """The cells first ... last + 1 that pixels first ... last + 1 of each object read, where both ends read some. Later
    pixels read later cells, or earlier ones throughout (mirrored), so that the ends tell."""
    reads = axis > 0
    first, last = reads.int().argmax(1), axis.shape[1] - reads.flip(1).int().argmax(1)
    start, stop = pixels.unbind(1)
    ends = torch.stack([start.clamp(max=len(axis) - 1), (stop - 1).clamp(min=0)], 1)
    cells = torch.stack([first[ends].amin(1), last[ends].amax(1)], 1)
    return torch.where((stop > start)[:, None], cells, 0)
