"""Resizing whole planes of probabilities from the network's grid to the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.ops.interpolation import cubic_weights, weights
from maskwright.structures import Masks, Placement


def place_planes(
    probabilities: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    *,
    threshold: float = 0.5,
    steps: Literal[1, 2] = 2,
    cubic: bool = False,
    budget: int = 64 << 20,
) -> Masks:
    """Resizes planes that cover the network's input to masks of the image.

    Both steps are bilinear, with half-pixel centres and without anti-aliasing: to the grid of the input, of which the
    valid part is kept, and from there to the image. Each is linear along each axis, so that one small matrix per axis
    does both at once; padding is not read.

    Args:
        probabilities: Planes on a grid that covers the input.
        placement: How the image was placed in the input.
        size: Height and width of the input, padding included.
        threshold: Pixels above it belong to a mask; at least 0.
        steps: 1 to resize to the image directly (YOLACT).
        cubic: Whether interpolation is cubic; with one step only. All pixels of the image are then computed.
        budget: Bytes of scratch memory. On an accelerator whole planes are computed, as many at a time as fit. On the
            host each mask is computed only on the pixels that its probabilities above the threshold reach, and this
            many bytes are kept before they are packed.
    """
    return place_measured(
        probabilities, placement, size, None, threshold=threshold, steps=steps, cubic=cubic, budget=budget
    )[0]


def place_measured(
    planes: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    measure: Callable[[Tensor, Tensor], Tensor] | None,
    *,
    threshold: float = 0.5,
    steps: Literal[1, 2] = 2,
    cubic: bool = False,
    budget: int = 64 << 20,
) -> tuple[Masks, Float[Tensor, " n"]]:
    """Resizes planes as `place_planes`, and computes a number for each mask.

    Args:
        planes: Planes on a grid that covers the input.
        placement: See `place_planes`.
        size: See `place_planes`.
        measure: Computes the numbers of k masks from the values on the image's grid and from which of them are in the
            mask, both (k, h, w). It must not depend on pixels outside of the mask, not all of which it receives.
        threshold: See `place_planes`.
        steps: See `place_planes`.
        cubic: See `place_planes`.
        budget: See `place_planes`.

    Returns:
        The masks, and the numbers; zeros without `measure`.
    """
    planes = planes.float()
    if not len(planes):
        return Masks.empty(placement.image_size), planes.new_zeros(0)
    height, width = placement.image_size
    down, across = axes(planes, placement, size, steps, cubic)
    if planes.device.type != "cpu":
        step = max(1, budget // (height * max(width, planes.shape[2]) * (9 if measure is None else 17)))
        masks, numbers = [], []
        for part in planes.split(step):
            values = down @ part @ across.T
            solid = values > threshold
            numbers.append(planes.new_zeros(len(part)) if measure is None else measure(values, solid))
            masks.append(Masks.from_dense(solid).pack())
        return Masks.join(masks), torch.cat(numbers)
    # An interpolated value is above the threshold only if one of its neighbours is.
    solid = torch.ones_like(planes, dtype=torch.bool) if cubic else planes > threshold
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


def place_stable(
    logits: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    *,
    margin: float = 1.0,
    least: float = 0.0,
    steps: Literal[1, 2] = 2,
    cubic: bool = False,
    frame: tuple[int, int, tuple[int, int]] | None = None,
    budget: int = 64 << 20,
) -> tuple[Masks, Float[Tensor, " k"], Int[Tensor, " k"]]:
    """Resizes mask logits to the image and keeps the masks that hardly depend on the threshold (SAM).

    The stability of a mask is the ratio of its areas at the thresholds `margin` and -`margin`, on the image's grid; NaN
    if both are 0. Pixels that no logit above -`margin` reaches are not computed.

    Args:
        logits: Mask logits on a grid that covers the input.
        placement: How the image was placed in the input.
        size: Height and width of the input, padding included.
        margin: See above.
        least: Masks of less stability are dropped, those without a stability too, unless it is 0.
        steps: See `place_planes`.
        cubic: See `place_planes`.
        frame: Left and upper edge of the image in a larger one, and its height and width, in which masks are returned;
            None: the image itself.
        budget: Bytes of scratch memory.

    Returns:
        The k masks that are kept, their stability, and their numbers among the n.
    """
    left, top, whole = frame or (0, 0, placement.image_size)
    logits = logits.float()
    if not len(logits):
        return Masks.empty(whole), logits.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    down, across = axes(logits, placement, size, steps, cubic)
    numbers, ratios, masks = list[Tensor](), list[Tensor](), list[Masks]()

    def keep(values: Tensor) -> tuple[Tensor, Tensor]:
        inner = (values > margin).flatten(1).sum(1)
        ratio = inner.float() / (values > -margin).flatten(1).sum(1)
        return ratio, ratio >= least if least > 0 else torch.ones_like(ratio, dtype=torch.bool)

    if logits.device.type != "cpu":
        height, width = placement.image_size
        step = max(1, budget // (height * max(width, logits.shape[2]) * 11))
        for first in range(0, len(logits), step):
            values = down @ logits[first : first + step] @ across.T
            ratio, good = keep(values)
            rows = good.nonzero()[:, 0].cpu()
            planes = functional.pad(values[good] > 0, (left, whole[1] - left - width, top, whole[0] - top - height))
            masks.append(Masks.from_dense(planes).pack())
            numbers.append(rows + first)
            ratios.append(ratio[good].cpu())
        return Masks.join(masks), torch.cat(ratios), torch.cat(numbers)
    solid = torch.ones_like(logits, dtype=torch.bool) if cubic else logits > -margin
    rows, columns = _reached(solid.any(2), down), _reached(solid.any(1), across)
    windows = torch.cat([rows, _used(down, rows), columns, _used(across, columns)], 1).tolist()
    crops, corners, held = list[Tensor](), list[tuple[int, int]](), 0
    for number, (plane, window) in enumerate(zip(logits, windows, strict=True)):
        above, below, upper, lower, before, after, near, far = window
        values = down[above:below, upper:lower] @ plane[upper:lower, near:far] @ across[before:after, near:far].T
        ratio, good = keep(values[None])
        if bool(good[0]):
            crops.append(values > 0)
            corners.append((before + left, above + top))
            numbers.append(torch.tensor([number]))
            ratios.append(ratio)
            held += values.numel()
        if held > budget:
            masks.append(Masks.from_crops(crops, torch.tensor(corners), whole))
            crops, corners, held = [], [], 0
    masks.append(Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), whole))
    if not numbers:
        return Masks.empty(whole), logits.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    return Masks.join(masks), torch.cat(ratios), torch.cat(numbers)


def axes(
    like: Float[Tensor, "n p q"],
    placement: Placement,
    size: tuple[int, int],
    steps: Literal[1, 2] = 2,
    cubic: bool = False,
) -> tuple[Float[Tensor, "h p"], Float[Tensor, "w q"]]:
    """The matrices that resize planes to the image: `down @ planes @ across.T`.

    Args:
        like: Planes of the size, dtype and device in question.
        placement: How the image was placed in the input.
        size: Height and width of the input, padding included.
        steps: See `place_planes`.
        cubic: See `place_planes`.

    Returns:
        The weights of the rows of a plane for each row of the image, and those of the columns for each column; zeros
        for pixels outside of the input.
    """
    (height, width), (x, y) = placement.image_size, placement.scale
    down = _axis(like, 1, size[0], placement.size[0], height, y, placement.offset[1], False, steps, cubic)
    across = _axis(like, 2, size[1], placement.size[1], width, x, placement.offset[0], placement.mirrored, steps, cubic)
    return down, across


def label_plane(
    logits: Float[Tensor, "k p q"], placement: Placement, size: tuple[int, int], *, budget: int = 64 << 20
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "h w"]]:
    """The class of each pixel of the image, from logits on a grid that covers the network's input.

    Padding is cut off, the logits are resized to the image bilinearly with half-pixel centres, and then the best class
    is chosen (detectron2).

    Args:
        logits: Logits of each class.
        placement: How the image was placed in the input.
        size: Height and width of the input, padding included.
        budget: Bytes of scratch memory; it limits how many rows of the image are computed at a time.

    Returns:
        The best class, -1 for pixels outside of the input, and its probability among all classes, 0 there.
    """
    height, width = placement.image_size
    rows, columns = logits.shape[1] / size[0], logits.shape[2] / size[1]
    down = _neighbours(logits, height, placement.size[0], rows, placement.scale[1], placement.offset[1], False)
    across = _neighbours(
        logits, width, placement.size[1], columns, placement.scale[0], placement.offset[0], placement.mirrored
    )
    labels = torch.full((height, width), -1, dtype=torch.int64, device=logits.device)
    probability = logits.new_zeros(height, width, dtype=torch.float32)
    step = max(1, budget // (16 * len(logits) * max(width, logits.shape[2])))
    for first in range(0, height, step):
        band = slice(first, min(height, first + step))
        upper, lower, part, seen = (v[band] for v in down)
        lines = logits[:, upper].float().lerp(logits[:, lower].float(), part[:, None])
        values = lines[..., across[0]].lerp(lines[..., across[1]], across[2])  # (K, rows, W)
        best = values.argmax(0)
        probability[band] = (values.amax(0) - values.logsumexp(0)).exp() * seen[:, None] * across[3]
        labels[band] = torch.where(seen[:, None] & across[3], best, -1)
    return labels, probability


def _neighbours(
    like: Tensor, pixels: int, valid: int, ratio: float, scale: float, offset: float, mirrored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of the image's pixels along one axis: the cells before and after it, its position between them, and
    whether it is in the valid part of the input. `ratio`: cells per pixel of the input."""
    number = torch.arange(pixels, device=like.device, dtype=torch.float32) + 0.5
    place = (pixels - number if mirrored else number) * scale + offset
    seen = (place > 0) & (place < valid)
    place = (place * ratio - 0.5).clamp(0, max(0.0, valid * ratio - 1))
    first = place.floor().long()
    last = max(0, math.ceil(valid * ratio) - 1)
    return first, (first + 1).clamp(max=last), place - first, seen


def place_bits(planes: Bool[Tensor, "n h w"], placement: Placement) -> Masks:
    """Resizes masks of the valid part of the network's input to the image by nearest neighbours (DETR).

    Each pixel of the image is that of the input which contains its upper left corner, as in torch's mode "nearest".

    Args:
        planes: Masks of the input.
        placement: How the image was placed in the input.
    """
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
    """The input's pixel for each of the image's along one axis; -1 outside of the input."""
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
    cubic: bool = False,
) -> Float[Tensor, "_image _cells"]:
    """The weight of each cell for each of the image's pixels along one axis."""
    cells = like.shape[axis]
    pixels = torch.arange(image, device=like.device, dtype=torch.float32) + 0.5
    place = (image - pixels if mirrored else pixels) * scale + offset - 0.5
    seen = (place > -0.5) & (place < valid - 0.5)
    if cubic:
        return cubic_weights((place + 0.5) * (cells / padded) - 0.5, cells) * seen[:, None]
    if steps == 1:
        return weights((place + 0.5) * (cells / padded) - 0.5, cells, "border") * seen[:, None]
    inner = torch.arange(valid, device=like.device, dtype=torch.float32)
    onto_input = weights((inner + 0.5) * (cells / padded) - 0.5, cells, "border")  # (valid, cells)
    place = place.clamp(0, valid - 1)
    first = place.floor().long()
    second = (first + 1).clamp(max=valid - 1)
    return onto_input[first].lerp(onto_input[second], (place - first)[:, None]) * seen[:, None]


def _reached(solid: Tensor, axis: Tensor) -> Tensor:
    """For each object the range of pixels along one axis, first ... last + 1, to which its solid cells contribute."""
    hit = solid.float() @ (axis != 0).float().T > 0  # (n, pixels)
    steps = torch.arange(hit.shape[1])
    first = torch.where(hit, steps, hit.shape[1]).amin(1)
    last = torch.where(hit, steps + 1, 0).amax(1)
    return torch.stack([torch.minimum(first, last), last], 1)


def _used(axis: Tensor, pixels: Int[Tensor, "n 2"]) -> Int[Tensor, "n 2"]:
    """The range of cells that a range of pixels of each object reads. It follows from the outer pixels, because later
    pixels read later cells, or earlier ones if the image is mirrored."""
    reads = axis != 0
    first, last = reads.int().argmax(1), axis.shape[1] - reads.flip(1).int().argmax(1)
    start, stop = pixels.unbind(1)
    ends = torch.stack([start.clamp(max=len(axis) - 1), (stop - 1).clamp(min=0)], 1)
    cells = torch.stack([first[ends].amin(1), last[ends].amax(1)], 1)
    return torch.where((stop > start)[:, None], cells, 0)
