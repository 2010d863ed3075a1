"""Windows of coarse maps give the same masks as whole maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from maskwright.ops.windows import paste_windows

GRID, STRETCHED, SIZE = (20, 28), (208, 281), (195, 262)


def windows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole maps with -10 around random regions, windows of them, and the first cell of each window."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.stack(
        [torch.randint(0, 20, (6,), generator=generator), torch.randint(0, 12, (6,), generator=generator)], 1
    )
    low[0], low[1] = torch.tensor([0, 0]), torch.tensor([20, 12])
    values = torch.randn(6, 8, 8, generator=generator) * 3
    whole = torch.full((6, GRID[0] + 2, GRID[1] + 2), -10.0)
    for plane, own, (x, y) in zip(whole, values, low.tolist(), strict=True):
        plane[y + 1 : y + 9, x + 1 : x + 9] = own
    framed = functional.pad(values, (1, 1, 1, 1), value=-10.0)
    return whole[:, 1:-1, 1:-1], framed, low - 1


@pytest.mark.parametrize("budget", [1, 1 << 16, 64 << 20])
def test_windows_give_the_same_masks_as_whole_maps(budget):
    whole, values, corners = windows()
    planes = functional.interpolate(whole[:, None], size=STRETCHED, mode="bilinear", align_corners=False)[:, 0]
    masks = paste_windows(values, corners, GRID, STRETCHED, SIZE, threshold=-0.6, budget=budget)
    expected = planes[:, : SIZE[0], : SIZE[1]] > -0.6
    assert expected.any((1, 2)).all()
    assert (masks.dense() != expected).sum() <= 2  # values at the threshold


def test_the_image_may_start_inside_the_map_and_be_mirrored():
    whole, values, corners = windows(1)
    planes = functional.interpolate(whole[:, None], size=STRETCHED, mode="bilinear", align_corners=False)[:, 0] > 0
    size = (100, 150)
    shifted = paste_windows(values, corners, GRID, STRETCHED, size, threshold=0.0, shift=(40.0, 30.0)).dense()
    assert (shifted != planes[:, 30:130, 40:190]).sum() <= 2
    mirrored = paste_windows(values, corners, GRID, STRETCHED, SIZE, threshold=0.0, mirrored=True).dense()
    assert (mirrored != planes[:, : SIZE[0], : SIZE[1]].flip(-1)).sum() <= 2


def test_no_windows_give_no_masks():
    nothing = torch.zeros(0, 4, 4)
    assert len(paste_windows(nothing, torch.zeros(0, 2, dtype=torch.int64), GRID, STRETCHED, SIZE, threshold=0.0)) == 0
