"""Bilinear resampling as two small matrices.

Sampling a P x P grid at every crossing of some rows and some columns is separable: `rows @ grid @ columns.T`, where a
row of each matrix holds the at most two weights of one sample. Compared to gathering four neighbours per sample, this
moves little memory, and it is a matrix product, which every device computes fast.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def weights(
    positions: Float[Tensor, "*n s"], length: int, outside: Literal["zeros", "border"] = "zeros"
) -> Float[Tensor, "*n s length"]:
    """Weights of the cells of a row for linear interpolation.

    Args:
        positions: Sample positions, in cells, counted from the centre of the first cell.
        length: Number of cells.
        outside: "zeros" if the row is surrounded by zeros; "border" if positions beyond the centres of the outer cells
            read those cells.
    """
    if outside == "border":
        positions = positions.clamp(0, length - 1)
    cells = torch.arange(length, device=positions.device, dtype=positions.dtype)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)


def cubic_weights(positions: Float[Tensor, " s"], length: int) -> Float[Tensor, "s length"]:
    """Weights of the cells of a row for cubic interpolation, as in torch (a = -0.75).

    Beyond the border, the outer cells are repeated.

    Args:
        positions: Sample positions, in cells, counted from the centre of the first cell.
        length: Number of cells.
    """
    first = positions.floor()
    offsets = torch.arange(-1, 3, device=positions.device, dtype=positions.dtype)
    apart = (positions[:, None] - first[:, None] - offsets).abs()
    near = (1.25 * apart - 2.25) * apart * apart + 1
    far = ((-0.75 * apart + 3.75) * apart - 6) * apart + 3
    values = torch.where(apart <= 1, near, torch.where(apart < 2, far, 0))
    cells = (first[:, None] + offsets).long().clamp(0, length - 1)
    return positions.new_zeros(positions.shape[0], length).scatter_add_(1, cells, values)
