"""Objects as points (CenterNet, arXiv 1904.07850): a heat map per class that peaks at every object's middle.

How the map is painted (CornerNet, arXiv 1808.01244), learnt from, and read.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gaussian_radius(sizes: Float[Tensor, "n 2"], overlap: float = 0.7) -> Int[Tensor, " n"]:
    """How many cells a box of (width, height) may be moved and still overlap itself by `overlap`, rounded down.

    CornerNet looks at three cases (both corners inside, both outside, one of each) and takes the smallest. Its code
    solves each quadratic equation a r^2 + b r + c = 0 with a division by 2 where it should be by 2 a, and all
    published weights were trained that way.
    """
    w, h = sizes.unbind(-1)
    around, area = w + h, w * h
    moved = (around + (around**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    inside = (2 * around + (4 * around**2 - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / 2
    outside = (-2 * overlap * around + (4 * overlap**2 * around**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.stack([moved, inside, outside]).amin(0).clamp(min=0).long()


def paint_gaussians(
    cells: Int[Tensor, "n 2"], radii: Int[Tensor, " n"], planes: Int[Tensor, " n"], shape: tuple[int, int, int]
) -> Float[Tensor, "k h w"]:
    """Heat maps of `shape` (planes, H, W): around each cell (x, y) on its plane exp(-d^2 / 2 sigma^2), with sigma a
    sixth of the diameter 2 r + 1, inside the square of that side; the largest where several meet.

    Costs as many numbers as all squares have cells.
    """
    count, height, width = shape
    heat = torch.zeros(count * height * width, device=cells.device)
    if len(cells):
        diameter = 2 * radii + 1
        owner = torch.arange(len(cells), device=cells.device).repeat_interleave(diameter**2)
        first = (diameter**2).cumsum(0) - diameter**2
        within = torch.arange(len(owner), device=cells.device) - first[owner]
        side = diameter[owner]
        offset = torch.stack([within % side, within.div(side, rounding_mode="floor")], 1) - radii[owner, None]
        place = cells[owner] + offset
        value = torch.exp(-(offset**2).sum(1) / (2 * (side / 6) ** 2))
        x, y = place.unbind(1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = (planes[owner] * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
        heat = heat.scatter_reduce(0, index, torch.where(inside, value, 0.0).to(heat), "amax")
    return heat.view(count, height, width)


def centre_focal_sum(logits: Float[Tensor, "*n"], heat: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """CornerNet's focal loss (eq. 1; alpha 2, beta 4), summed: a cell of value 1 is a centre, all others are less
    wrong the higher the map is there. Divide by the number of ones."""
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = heat == 1
    at = (1 - probability).square() * probability.log()
    beside = (1 - heat).pow(4) * probability.square() * (1 - probability).log()
    return -torch.where(centre, at, beside).sum()


def find_peaks(
    logits: Float[Tensor, "b k h w"], count: int
) -> tuple[Float[Tensor, "b d"], Int[Tensor, "b d"], Int[Tensor, "b d"]]:
    """Probability, class and cell (y * W + x) of the `count` highest cells that are not below any of their eight
    neighbours of the same class, best first; what is no peak has probability 0. d = min(count, K * H * W)."""
    cells = logits.shape[2] * logits.shape[3]
    heat = logits.float().sigmoid()
    heat = heat * (torch.nn.functional.max_pool2d(heat, 3, 1, 1) == heat)
    scores, places = heat.flatten(1).topk(min(count, logits.shape[1] * cells))
    return scores, places.div(cells, rounding_mode="floor"), places % cells


PRIOR = -2.19  # bias of a heat map's last layer: everywhere a probability of 0.1 at the beginning
