"""Choosing and reading single points of maps: what PointRend (arXiv 1912.08193) brought, and Mask2Former took over.

A point is (x, y) as a share of the map's width and height, (0, 0) its upper left corner and (1, 1) the lower right one;
the centre of cell i of n lies at (i + 0.5) / n. Shares fit maps of every resolution that cover the same thing: the
image (padding included), or the inside of a box.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.structures import Masks

Uncertainty = Callable[[Tensor], Tensor]  # logits (N, K, P) -> how unsure each point is, (N, P); larger is less sure


def point_sample(
    maps: Float[Tensor, "b c h w"], points: Float[Tensor, "b p 2"], mode: Literal["bilinear", "nearest"] = "bilinear"
) -> Float[Tensor, "b c p"]:
    """Values of each map at its points; a map is surrounded by zeros. Cells' centres are at (i + 0.5) / n.

    Where many maps are read at the same points (all queries of an image), let them be channels of one map. Maps of
    half precision are read in float32: eight bits of a place are too few.
    """
    values = maps if maps.dtype == torch.float64 else maps.float()
    grid = (2 * points - 1).to(values.dtype)[:, :, None]
    read = torch.nn.functional.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return read[..., 0].to(maps.dtype)


def mask_sample(
    masks: Masks, points: Float[Tensor, "r p 2"], owners: Int[Tensor, " r"] | None = None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Float[Tensor, "r p"]:  # fmt: skip
    """For each row r the mask `owners[r]` (without `owners`, mask r) at points IN PIXELS of the masks' frame, on the
    points' device; "bilinear" gives values between 0 and 1. Outside the image lies background.

    Masks stay compact: what is held is their insides and four numbers a point. Points that all masks share may be
    `expand`ed views.
    """
    rows = torch.arange(len(points)) if owners is None else owners.cpu()
    if not len(rows):
        return points.new_zeros(points.shape[:2], dtype=torch.float32)
    chosen, which = rows.unique(return_inverse=True)
    frames, crops = masks[chosen].crops()
    sizes = torch.tensor([crop.numel() for crop in crops])
    # One flat table of all insides; its last entry is background, where whatever lies outside a frame reads.
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
    """Random points, of each row its own; with `shared` the same for all rows, as a view that takes no memory."""
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
    """`count` random points of each map, more of them where it is unsure (section 3.2 of PointRend).

    Of `candidates` times as many uniform points the least sure are kept, a share `important` of the result; the rest
    is drawn anew, uniformly. `candidates` 1 and `important` 0 give uniform points.
    """
    chosen = int(important * count)
    drawn = uniform_points(len(maps), int(candidates * count) if chosen else 0, device=maps.device)
    best = uncertainty(point_sample(maps, drawn)).topk(chosen, dim=1).indices
    kept = drawn.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([kept, uniform_points(len(maps), count - chosen, device=maps.device)], 1)


def mask_uncertainty(logits: Float[Tensor, "n 1 p"]) -> Float[Tensor, "n p"]:
    """-|logit|: nearest to the decision between object and background is least sure."""
    return -logits[:, 0].abs()


def class_uncertainty(logits: Float[Tensor, "n k p"]) -> Float[Tensor, "n p"]:
    """Second best minus best logit."""
    best, second = logits.topk(2, dim=1).values.unbind(1)
    return second - best


def grid_points(
    rows: int, height: int, width: int, device: torch.device | str | None = None
) -> Float[Tensor, "rows p 2"]:
    """Centres of the cells of a height x width grid, row by row, for each of `rows` maps: a view."""
    cells = torch.arange(height * width, device=device)
    return cell_centres(cells, height, width).expand(rows, -1, 2)


def cell_centres(cells: Int[Tensor, "*n p"], height: int, width: int) -> Float[Tensor, "*n p 2"]:
    """Cells of a height x width grid, numbered row by row -> their centres as points."""
    row = cells.div(width, rounding_mode="floor")
    return torch.stack([(cells - row * width + 0.5) / width, (row + 0.5) / height], -1).float()


def box_points(boxes: Float[Tensor, "r 4"], points: Float[Tensor, "r p 2"]) -> Float[Tensor, "r p 2"]:
    """Points of the inside of each box -> the frame that the boxes are in, pixels mostly."""
    return boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])


def subdivide(
    logits: Float[Tensor, "n k h w"],
    answer: Callable[[Float[Tensor, "n p 2"]], Float[Tensor, "n k p"]],
    uncertainty: Uncertainty,
    *,
    steps: int,
    points: int,
) -> Float[Tensor, "n k _h _w"]:
    """Adaptive subdivision (section 3.1 of PointRend): `steps` times, the grid is doubled bilinearly and its least sure
    cells, `points` at most, are asked again of `answer`. A cell that is sure costs nothing but its interpolation."""
    for _ in range(steps):
        logits = torch.nn.functional.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        count, kinds, height, width = logits.shape
        cells = uncertainty(logits.flatten(2)).topk(min(points, height * width), dim=1).indices
        found = answer(cell_centres(cells, height, width))
        flat = logits.flatten(2).scatter(2, cells[:, None].expand(-1, kinds, -1), found.to(logits.dtype))
        logits = flat.view(count, kinds, height, width)
    return logits
