"""Bilinear resampling as two small matrices.

Reading a P x P grid at every crossing of some rows and some columns is separable: `rows @ grid @ columns.T`, where a
row of each matrix holds the at most two weights of one sample. Next to gathering four neighbours per sample this moves
hardly any memory, and it is a matrix product, which every device is best at.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def weights(
    positions: Float[Tensor, "*n s"], length: int, outside: Literal["zeros", "border"] = "zeros"
) -> Float[Tensor, "*n s length"]:
    """Weights on `length` cells of samples at `positions`, counted in cells from the centre of the first.

    "zeros": the grid is surrounded by zeros; "border": positions beyond the outer cells' centres read those cells.
    """
    if outside == "border":
        positions = positions.clamp(0, length - 1)
    cells = torch.arange(length, device=positions.device, dtype=positions.dtype)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
