"""Selection and sampling of single points of maps (PointRend, arXiv 1912.08193).

A point is (x, y) as a fraction of the map's width and height: (0, 0) is the upper left corner, (1, 1) the lower right
one, and the centre of cell i of n is at (i + 0.5) / n. Fractions are valid for maps of every resolution that cover the
same region: the image with its padding, or the inside of a box.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.structures import Masks

Uncertainty = Callable[[Tensor], Tensor]  # logits (N, K, P) -> uncertainty of each point (N, P)


def point_sample(
    maps: Float[Tensor, "b c h w"], points: Float[Tensor, "b p 2"], mode: Literal["bilinear", "nearest"] = "bilinear"
) -> Float[Tensor, "b c p"]:
    """Samples each map at its points; maps are surrounded by zeros.

    Many maps that are sampled at the same points (all queries of an image) should be channels of one map. Maps of half
    precision are sampled in float32, because coordinates need more than eight bits.

    Args:
        maps: One map per row.
        points: Points of each row, as fractions of the map's width and height.
        mode: Interpolation.

    Returns:
        The values, in the dtype of the maps.
    """
    values = maps if maps.dtype == torch.float64 else maps.float()
    grid = (2 * points - 1).to(values.dtype)[:, :, None]
    read = torch.nn.functional.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return read[..., 0].to(maps.dtype)


def mask_sample(
    masks: Masks, points: Float[Tensor, "r p 2"], owners: Int[Tensor, " r"] | None = None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "r p"]:  # fmt: skip
    """Samples masks at points given in pixels. Outside the image is background.

    Masks stay compact: memory holds the contents of their boxes and four numbers per point.

    Args:
        masks: The masks.
        points: Points of each row in *pixels* of the masks' frame. Points that all rows share may be an expanded view.
        owners: Index of each row's mask; default: row r samples mask r.
        mode: Interpolation; "bilinear" gives values between 0 and 1.

    Returns:
        The values, on the device of the points.
    """
    rows = torch.arange(len(points)) if owners is None else owners.cpu()
    if not len(rows):
        return points.new_zeros(points.shape[:2], dtype=torch.float32)
    chosen, which = rows.unique(return_inverse=True)
    frames, crops = masks[chosen].crops()
    sizes = torch.tensor([crop.numel() for crop in crops])
    # One flat table of the contents of all boxes; its last entry is background, for points outside a box.
    table = torch.cat([*(crop.flatten() for crop in crops), torch.zeros(1, dtype=torch.bool)]).to(points.device)
    facts = torch.cat([frames, (sizes.cumsum(0) - sizes)[:, None]], 1)[which].to(points.device)
    x0, y0, x1, y1, first = facts[:, :, None].unbind(1)  # (R, 1)

    def read(x: Tensor, y: Tensor) -> Tensor:
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        return table[torch.where(inside, first + (y - y0) * (x1 - x0) + (x - x0), len(table) - 1)].float()

    points = points.float()
    if mode == "nearest":
        x, y = points.floor().long().unbind(-1)
        return read(x, y)
    corner = (points - 0.5).floor()
    (across, down), (x, y) = (points - 0.5 - corner).unbind(-1), corner.long().unbind(-1)
    upper = read(x, y).lerp(read(x + 1, y), across)
    return upper.lerp(read(x, y + 1).lerp(read(x + 1, y + 1), across), down)


def uniform_points(
    rows: int, count: int, *, shared: bool = False, device: torch.device | str | None = None
) -> Float[Tensor, "rows count 2"]:
    """Draws uniform random points for each row; with `shared` the same for all rows, as an expanded view."""
    return torch.rand(1 if shared else rows, count, 2, device=device).expand(rows, count, 2)


@torch.no_grad()
def uncertain_points(
    maps: Float[Tensor, "n k h w"],
    count: int,
    uncertainty: Uncertainty,
    *,
    candidates: float = 3.0,
    important: float = 0.75,
) -> Float[Tensor, "n count 2"]:
    """Draws random points of each map, biased towards uncertain ones (PointRend, section 3.2).

    Args:
        maps: Logits.
        count: Number of points per map.
        uncertainty: Uncertainty of sampled logits.
        candidates: Uniform points that are drawn for each point of the result.
        important: Share of the result that are the most uncertain candidates; the others are drawn anew, uniformly.
            `candidates` 1 and `important` 0 give uniform points.
    """
    chosen = int(important * count)
    drawn = uniform_points(len(maps), int(candidates * count) if chosen else 0, device=maps.device)
    best = uncertainty(point_sample(maps, drawn)).topk(chosen, dim=1).indices
    kept = drawn.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([kept, uniform_points(len(maps), count - chosen, device=maps.device)], 1)


def mask_uncertainty(logits: Float[Tensor, "n 1 p"]) -> Float[Tensor, "n p"]:
    """Uncertainty of a binary mask: the negative distance of the logit from 0."""
    return -logits[:, 0].abs()


def class_uncertainty(logits: Float[Tensor, "n k p"]) -> Float[Tensor, "n p"]:
    """Uncertainty of a classification: the second largest minus the largest logit."""
    best, second = logits.topk(2, dim=1).values.unbind(1)
    return second - best


def grid_points(
    rows: int, height: int, width: int, device: torch.device | str | None = None
) -> Float[Tensor, "rows p 2"]:
    """Centres of the cells of a height x width grid, row by row, for each of `rows` maps, as an expanded view."""
    cells = torch.arange(height * width, device=device)
    return cell_centres(cells, height, width).expand(rows, -1, 2)


def cell_centres(cells: Int[Tensor, "*n p"], height: int, width: int) -> Float[Tensor, "*n p 2"]:
    """Converts cells of a height x width grid, numbered row by row, to their centres."""
    row = cells.div(width, rounding_mode="floor")
    return torch.stack([(cells - row * width + 0.5) / width, (row + 0.5) / height], -1).float()


def box_points(boxes: Float[Tensor, "r 4"], points: Float[Tensor, "r p 2"]) -> Float[Tensor, "r p 2"]:
    """Converts points given as fractions of each box to the frame of the boxes."""
    return boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])


def subdivide(
    logits: Float[Tensor, "n k h w"],
    predict: Callable[[Float[Tensor, "n p 2"]], Float[Tensor, "n k p"]],
    uncertainty: Uncertainty,
    *,
    steps: int,
    points: int,
) -> Float[Tensor, "n k _h _w"]:
    """Refines masks by adaptive subdivision (PointRend, section 3.1).

    In each step the grid is upsampled bilinearly by two, and its most uncertain cells are predicted anew.

    Args:
        logits: Coarse logits.
        predict: Predicts logits at points.
        uncertainty: Uncertainty of logits.
        steps: Number of steps.
        points: Upper bound of the cells that are predicted in a step.
    """
    for _ in range(steps):
        logits = torch.nn.functional.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        count, kinds, height, width = logits.shape
        cells = uncertainty(logits.flatten(2)).topk(min(points, height * width), dim=1).indices
        found = predict(cell_centres(cells, height, width))
        flat = logits.flatten(2).scatter(2, cells[:, None].expand(-1, kinds, -1), found.to(logits.dtype))
        logits = flat.view(count, kinds, height, width)
    return logits
