"""Cutting feature maps into windows and joining them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def to_windows(x: Float[Tensor, "b h w c"], side: int) -> Float[Tensor, "_n {side} {side} c"]:
    """Cuts maps into windows without overlap; zeros are appended at the bottom and the right where they do not fit.

    Args:
        x: Maps, channels last.
        side: Side of a window in cells.

    Returns:
        The windows of all maps, row by row.
    """
    _, height, width, _ = x.shape
    x = functional.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # (B, down, side, across, side, C)
    return x.transpose(2, 3).flatten(0, 2)


def from_windows(windows: Float[Tensor, "n s s c"], size: tuple[int, int]) -> Float[Tensor, "b {size[0]} {size[1]} c"]:
    """Joins what `to_windows` has cut from maps of `size` (h, w); what was appended is dropped."""
    side = windows.shape[1]
    down, across = -(-size[0] // side), -(-size[1] // side)
    x = windows.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]
