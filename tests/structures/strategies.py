"""Random masks and placements, with many edge cases: holes, parts, borders, empty masks, single pixels."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from maskwright.structures import Placement

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def planes(draw, least: int = 0, most: int = 4, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Bool (N, H, W)."""
    size = size or draw(SIZES)
    count = draw(st.integers(least, most))
    kinds = st.sampled_from(["noise", "block", "ring", "checks", "empty", "full"])
    return torch.stack(
        [_plane(draw, draw(kinds), size) for _ in range(count)] or [torch.zeros(0, *size).bool()]
    ).reshape(count, *size)


def _plane(draw, kind: str, size: tuple[int, int]) -> torch.Tensor:
    plane = torch.zeros(size, dtype=torch.bool)
    height, width = size
    if kind == "noise":
        return torch.from_numpy(draw(arrays.arrays(np.bool_, size)))
    if kind == "full":
        return ~plane
    if kind == "checks":  # pixels touch only at corners
        return (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    if kind == "empty":
        return plane
    y0, x0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    y1, x1 = draw(st.integers(y0 + 1, height)), draw(st.integers(x0 + 1, width))
    plane[y0:y1, x0:x1] = True
    if kind == "ring":
        plane[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
        plane[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True  # an island inside the hole
    return plane


@st.composite
def placements(draw, image: tuple[int, int] | None = None) -> Placement:
    """Up to four crops, resizes and flips."""
    placement = Placement.identity(image or draw(SIZES))
    for _ in range(draw(st.integers(0, 4))):
        placement = step(draw, placement)
    return placement


def step(draw, placement: Placement) -> Placement:
    kind = draw(st.sampled_from(["crop", "resize", "mirror"]))
    if kind == "mirror":
        return placement.then_mirror()
    size = draw(SIZES)
    if kind == "resize":
        return placement.then_resize(size)
    return placement.then_crop(draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), size)
