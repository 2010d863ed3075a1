"""Windows of several sizes around every cell of a pyramid, and the objects that they are assigned to (TensorMask)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class Layout(NamedTuple):
    """All windows, in the order level, row, column, size.

    Attributes:
        boxes: In pixels of the input; they may extend beyond it.
        places: Level, y, x and index of the size.
    """

    boxes: Float[Tensor, "n 4"]
    places: Int[Tensor, "n 4"]


class Assigned(NamedTuple):
    """The positive windows.

    Attributes:
        windows: Rows of the layout.
        owners: The object of each.
    """

    windows: Int[Tensor, " p"]
    owners: Int[Tensor, " p"]


def window_layout(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], sides: Sequence[int], device: torch.device
) -> Layout:
    """Places windows at every cell of every level, each centred on the upper left corner of its cell.

    Args:
        shapes: Rows and columns of each level.
        strides: Stride of each level in pixels.
        sides: Sides of the windows on the first level, in its strides; they double from level to level.
        device: Device of the result.
    """
    boxes: list[Tensor] = []
    places: list[Tensor] = []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        axes = [torch.arange(n, device=device) for n in (height, width, len(sides))]
        own = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)  # y, x, size
        side = own.new_tensor([side * strides[0] * 2**level for side in sides], dtype=torch.float32)
        corner = own[:, [1, 0]].float() * stride
        half = side[own[:, 2], None] / 2
        boxes.append(torch.cat([corner - half, corner + half], 1))
        places.append(functional.pad(own, (1, 0), value=level))
    return Layout(torch.cat(boxes), torch.cat(places))


def assign_windows(
    layout: Layout,
    boxes: Float[Tensor, "g 4"],
    strides: Sequence[int],
    smallest: int,
    *,
    rule: Literal["code", "paper"],
    one_grid: bool,
) -> Assigned:
    """Assigns windows to objects.

    A window is positive for an object if it contains the object's box, if its side suits the longer side of the box,
    and if their centres are close. A window that is positive for several objects is assigned to none.

    With rule "code" (detectron2), window side - stride <= max(2 * longer side, side - stride of the smallest window),
    and centres are at most one stride of the level apart. With "paper" (section 5), the longer side is at least half
    the window's or the window is of the smallest size, and centres are at most one cell of the mask apart.

    Args:
        layout: The windows.
        boxes: Boxes of the objects, in pixels.
        strides: Stride of each level in pixels.
        smallest: Side of the smallest window in pixels.
        rule: Which rule.
        one_grid: Whether masks of all levels have the cells of the first level, as in a bipyramid.
    """
    windows, levels = layout.boxes, layout.places[:, 0]
    boxes = boxes.to(windows)
    if not len(boxes):
        none = levels.new_zeros(0)
        return Assigned(none, none)
    stride_of = torch.tensor(strides, device=windows.device, dtype=windows.dtype)[levels]
    side = windows[:, 2] - windows[:, 0]
    contains = ((boxes[None, :, :2] >= windows[:, None, :2]) & (boxes[None, :, 2:] <= windows[:, None, 2:])).all(-1)
    longest = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    centres, middles = (windows[:, :2] + windows[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    distance = (centres[:, None] - middles[None]).square().sum(-1).sqrt()
    if rule == "code":
        suits = (side - stride_of)[:, None] <= (2 * longest).clamp(min=smallest - strides[0])[None]
        close = distance <= stride_of[:, None]
    else:
        suits = (side[:, None] <= 2 * longest[None]) | (side <= smallest)[:, None]
        unit = torch.full_like(stride_of, strides[0]) if one_grid else stride_of
        close = distance <= unit[:, None]
    positive = contains & suits & close  # (N, G)
    chosen = (positive.sum(1) == 1).nonzero().flatten()
    return Assigned(chosen, positive[chosen].long().argmax(1))
