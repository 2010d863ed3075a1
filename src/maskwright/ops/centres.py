"""Objects as points (CenterNet, arXiv 1904.07850): one heat map per class, with a peak at the centre of each object."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

PRIOR = -2.19  # bias of a heat map's last layer: an initial probability of 0.1


def gaussian_radius(sizes: Float[Tensor, "n 2"], overlap: float = 0.7, exact: bool = False) -> Int[Tensor, " n"]:
    """Number of cells by which the corners of a box may move so that its IoU with the original remains high.

    CornerNet (arXiv 1808.01244) considers three cases (both corners inside, both outside, one of each) and takes the
    smallest radius. For the quadratic equations a r^2 + b r + c = 0 of the first and the last case its code uses the
    larger root instead of the smaller one, and for all of them it divides by 2 instead of 2 a; all published weights
    were trained with this.

    Args:
        sizes: Width and height of each box, in cells.
        overlap: The lowest IoU.
        exact: Whether to solve the equations as they are.

    Returns:
        The radius of each box, rounded down.
    """
    w, h = sizes.unbind(-1)
    around, area = w + h, w * h
    sign, inner, outer = (-1, 8, 8 * overlap) if exact else (1, 2, 2)
    moved = (around + sign * (around**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    inside = (2 * around + sign * (4 * around**2 - 16 * (1 - overlap) * area).clamp(min=0).sqrt()) / inner
    outside = (4 * overlap**2 * around**2 + 16 * overlap * (1 - overlap) * area).sqrt()
    outside = (-2 * overlap * around + outside) / outer
    return torch.stack([moved, inside, outside]).amin(0).clamp(min=0).long()


def paint_gaussians(
    cells: Int[Tensor, "n 2"], radii: Int[Tensor, " n"], planes: Int[Tensor, " n"], shape: tuple[int, int, int]
) -> Float[Tensor, "k h w"]:
    """Paints heat maps (CornerNet, arXiv 1808.01244).

    Around each cell the value at distance d is exp(-d^2 / 2 sigma^2), within a square of side 2 r + 1; sigma is a sixth
    of this side. Where several objects meet, the largest value counts. Memory is proportional to the number of cells of
    all squares.

    Args:
        cells: x, y of each object.
        radii: Radius r of each object, in cells.
        planes: The heat map of each object.
        shape: Number of heat maps, height and width.
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


def centre_focal_sum(
    logits: Float[Tensor, "*n"], heat: Float[Tensor, "*n"], alpha: float = 2.0, beta: float = 4.0
) -> Float[Tensor, ""]:
    """Sum of the focal loss of a heat map (CornerNet, arXiv 1808.01244, eq. 1); to be divided by the number of centres.

    Args:
        logits: The predicted heat map.
        heat: The target: 1 at centres, below 1 elsewhere.
        alpha: Exponent of the error of the prediction.
        beta: Exponent of 1 - `heat`, which reduces the loss close to a centre.
    """
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = heat == 1
    at = (1 - probability).pow(alpha) * probability.log()
    beside = (1 - heat).pow(beta) * probability.pow(alpha) * (1 - probability).log()
    return -torch.where(centre, at, beside).sum()


def find_peaks(
    logits: Float[Tensor, "b k h w"], count: int, window: int = 3
) -> tuple[Float[Tensor, "b d"], Int[Tensor, "b d"], Int[Tensor, "b d"]]:
    """Finds the highest cells of heat maps that are maxima of their neighbourhood.

    Args:
        logits: Heat maps of each class.
        count: Maximum number of peaks of an image.
        window: Side of the neighbourhood, an odd number of cells.

    Returns:
        Probability, class and cell (y * W + x) of d = min(count, K * H * W) cells of each image, in descending order of
        probabilities. A cell that is not a peak has probability 0.
    """
    cells = logits.shape[2] * logits.shape[3]
    heat = logits.float().sigmoid()
    heat = heat * (torch.nn.functional.max_pool2d(heat, window, 1, window // 2) == heat)
    scores, places = heat.flatten(1).topk(min(count, logits.shape[1] * cells))
    return scores, places.div(cells, rounding_mode="floor"), places % cells
