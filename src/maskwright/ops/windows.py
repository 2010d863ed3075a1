"""Resizing windows of coarse maps to masks, at the cost of the part of the image that each window covers."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.structures import Masks


def paste_windows(
    values: Float[Tensor, "n h w"],
    corners: Int[Tensor, "n 2"],
    grid: tuple[int, int],
    stretched: tuple[int, int],
    size: tuple[int, int],
    *,
    threshold: float,
    shift: tuple[float, float] = (0.0, 0.0),
    mirrored: bool = False,
    budget: int = 64 << 20,
) -> Masks:
    """Masks of the pixels where a map, resized bilinearly, is above a threshold; only a window of each map is given.

    Everything around a window counts as below the threshold, and so must its own outer cells, except at the borders of
    the map. Interpolation is that of whole maps with half-pixel centres (`align_corners=False`).

    Args:
        values: The windows of N maps.
        corners: The cell x, y of the map at which each window starts; it may be outside of the map.
        grid: Height and width of the maps, in cells.
        stretched: Height and width of the resized maps, in pixels.
        size: Height and width of the masks.
        threshold: The threshold.
        shift: The pixel x, y of the resized map at which the image starts.
        mirrored: Whether the map shows the image flipped left to right.
        budget: Bytes of scratch memory: windows are pasted some at a time, large ones in strips of rows.
    """
    if not len(values):
        return Masks.empty(size)
    height, width = size
    parts: list[Masks] = []
    down = _axis(corners[:, 1], values.shape[1], grid[0], stretched[0], height, shift[1])
    across = _axis(corners[:, 0], values.shape[2], grid[1], stretched[1], width, shift[0])
    rows, columns = down[1].shape[1], across[1].shape[1]
    step = max(1, budget // (13 * rows * columns))  # three float32 planes and a bool one
    for part in range(0, len(values), step):
        chosen = slice(part, part + step)
        kept = _resized_above(
            values[chosen], [t[chosen] for t in down[1:]], [t[chosen] for t in across[1:]], threshold, budget
        )
        left, top = across[0][chosen], down[0][chosen]
        if mirrored:
            kept, left = kept.flip(-1), width - left - columns
        parts.append(Masks.from_crops(list(kept.cpu()), torch.stack([left, top], 1).cpu(), size))
    return Masks.join(parts)


def _resized_above(
    values: Tensor, down: list[Tensor], across: list[Tensor], threshold: float, budget: int
) -> Bool[Tensor, "n r c"]:
    """Whether each pixel of the resized windows is above the threshold; `down` and `across` are cells and shares."""
    index, share = across
    right = (index + 1).clamp(max=values.shape[2] - 1)
    index, right = (i[:, None].expand(-1, values.shape[1], -1) for i in (index, right))
    share = share[:, None]
    wide = values.gather(2, index) * (1 - share) + values.gather(2, right) * share  # (n, h, c)
    index, share = down
    lower = (index + 1).clamp(max=values.shape[1] - 1)
    own = torch.arange(len(values), device=values.device)[:, None]
    at_once = max(1, budget // (12 * len(values) * wide.shape[2]))
    strips: list[Tensor] = []
    for i, j, s in zip(index.split(at_once, 1), lower.split(at_once, 1), share.split(at_once, 1), strict=True):
        strips.append(wide[own, i] * (1 - s)[..., None] + wide[own, j] * s[..., None] > threshold)
    return torch.cat(strips, 1)


def _axis(
    first: Tensor, cells: int, length: int, stretched: int, image: int, shift: float
) -> tuple[Int[Tensor, " n"], Int[Tensor, "n s"], Float[Tensor, "n s"]]:
    """Along one axis: the image's pixel at which each window starts, and for it and the pixels after it the preceding
    cell of the window and the share of the next cell."""
    scale = length / stretched
    count = min(math.ceil(cells / scale) + 4, image)
    start = ((first + 0.5) / scale - 0.5 - shift).floor().long() - 1
    start = start.clamp(0, max(0, image - count))
    pixels = start[:, None] + torch.arange(count, device=first.device)
    place = ((pixels + (0.5 + shift)).float() * scale - 0.5).clamp(0, length - 1)
    place = (place - first[:, None]).clamp(0, cells - 1)  # outside of a window its outer cells are read
    index = place.floor()
    return start, index.long(), place - index
