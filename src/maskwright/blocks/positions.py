"""Sinusoidal position encodings of maps and boxes (arXiv 1706.03762, section 3.5, as used by DETR)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sine_code(
    values: Float[Tensor, "*n"], features: int = 128, *, temperature: float = 10000.0
) -> Float[Tensor, "*n {features}"]:
    """Encodes values by sine and cosine in turn, with wavelengths from 2 pi to 2 pi * `temperature`."""
    number = torch.arange(features, device=values.device, dtype=torch.float32)
    period = temperature ** (2 * number.div(2, rounding_mode="floor") / features)
    angles = values[..., None] / period
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def sine_positions(
    size: tuple[int, int],
    features: int = 128,
    *,
    padding: Bool[Tensor, "b h w"] | None = None,
    temperature: float = 10000.0,
    normalise: bool = True,
    shift: float = 0.0,
    epsilon: float = 1e-6,
    device: torch.device | str | None = None,
) -> Float[Tensor, "_b c h w"]:
    """Encodes the row, then the column, of each cell of a map.

    Args:
        size: Height and width of the map.
        features: Channels of each of the two encodings.
        padding: True where a map of the batch holds padding; cells are then counted, and the count is normalised,
            without padding, as in DETR. None: one encoding for all, with batch size 1.
        temperature: See `sine_code`.
        normalise: Map the counts 1 ... h to 2 pi / h ... 2 pi.
        shift: Added to the counts before that; -0.5 in Deformable DETR.
        epsilon: Added to the divisor.
        device: Device of the result, without `padding`.

    Returns:
        An encoding of 2 * `features` channels.
    """
    if padding is None:
        rows = torch.arange(1, size[0] + 1, device=device, dtype=torch.float32)[None, :, None].expand(1, *size)
        columns = torch.arange(1, size[1] + 1, device=device, dtype=torch.float32)[None, None].expand(1, *size)
    else:
        valid = (~padding).float()
        rows, columns = valid.cumsum(1), valid.cumsum(2)
    if normalise:
        rows = (rows + shift) / (rows[:, -1:, :] + epsilon) * (2 * math.pi)
        columns = (columns + shift) / (columns[:, :, -1:] + epsilon) * (2 * math.pi)
    codes = [sine_code(axis, features, temperature=temperature) for axis in (rows, columns)]
    return torch.cat(codes, -1).permute(0, 3, 1, 2)


def padding_of(valid: Int[Tensor, "b 2"], size: tuple[int, int], shape: tuple[int, int]) -> Bool[Tensor, "b h w"]:
    """Finds the cells of a map that are padding, by nearest resizing of the input as in torch.

    Args:
        valid: Height and width of the part of each image that is not padding.
        size: Height and width of the network's input.
        shape: Height and width of the map.

    Returns:
        True where a cell is padding.
    """
    # Not `interpolate`: exported, it multiplies with the rounded quotient of the sizes, and cells that start exactly at
    # a pixel take the one before.
    axes: list[Tensor] = []
    for axis in (0, 1):
        before, after = (valid.new_full((1,), length[axis], dtype=torch.float32) for length in (size, shape))
        start = (torch.arange(shape[axis], device=valid.device) * (before / after)).floor()
        axes.append(start < valid[:, axis, None])
    return ~(axes[0][:, :, None] & axes[1][:, None])
