"""Deformable convolution (arXiv 1703.06211; modulated: 1811.11168)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskwright.errors import UsageError
from maskwright.ops.pooling import FEW_CHANNELS, kernel_type

Pair = tuple[int, int]


def deform_conv(
    x: Float[Tensor, "b c h w"],
    offset: Float[Tensor, "b t2 p q"],
    weight: Float[Tensor, "d g kh kw"],
    bias: Float[Tensor, " d"] | None = None,
    mask: Float[Tensor, "b t p q"] | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Float[Tensor, "b d p q"]:
    """Deformable convolution: every tap of the kernel reads the input at an offset from its regular position.

    Values are interpolated bilinearly; cells outside of the input are zeros. On the CPU the input is sampled again in
    the backward pass instead of kept, since the samples are kh x kw times as large as the input.

    Args:
        x: Input. Half precision is sampled in float32.
        offset: (dy, dx) of every tap in cells, taps row by row, for each of T / (kh kw) offset groups: with N of them
            each N-th part of the channels of `x` is read at offsets of its own. 2 T channels.
        weight: Kernels; with C / G input channels the convolution has G groups.
        bias: Added to each output channel.
        mask: Factor of every tap (modulated deformable convolution), laid out as `offset`. T channels.
        stride: Along rows and columns.
        padding: Along rows and columns, on both sides.
        dilation: Along rows and columns.

    Returns:
        The output in the dtype of `x`.

    Raises:
        UsageError: If the channels do not fit the kernel, the groups and the offset groups.
    """
    _check(x, offset, weight, mask)
    if x.device.type == "cpu" and x.shape[1] >= FEW_CHANNELS and not torch.compiler.is_compiling():
        how = (x, offset, weight, bias, mask, stride, padding, dilation)
        return checkpoint(_by_rows, *how, use_reentrant=False) if torch.is_grad_enabled() else _by_rows(*how)
    from torchvision.ops import deform_conv2d

    kind = kernel_type(x)
    mask, bias = (None if v is None else v.to(kind) for v in (mask, bias))
    return deform_conv2d(
        x.to(kind), offset.to(kind), weight.to(kind), bias, stride, padding, dilation, mask
    ).to(x.dtype)  # fmt: skip


def _check(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    """Raises a UsageError if the channels do not fit."""
    channels, taps = x.shape[1], weight.shape[2] * weight.shape[3]
    parts = offset.shape[1] // (2 * taps)
    if parts < 1 or offset.shape[1] % (2 * taps) or channels % parts:
        raise UsageError(
            f"deform_conv: offset must have {2 * taps} channels for each offset group, and the {channels} channels of "
            f"x must divide into the offset groups; got {offset.shape[1]}"
        )
    if mask is not None and mask.shape[1] != parts * taps:
        raise UsageError(f"deform_conv: mask must have {parts * taps} channels, got {mask.shape[1]}")
    if channels % weight.shape[1] or weight.shape[0] % (channels // weight.shape[1]):
        raise UsageError(
            f"deform_conv: {channels} channels and a weight of shape {tuple(weight.shape)} do not divide into groups"
        )


def _by_rows(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: Pair, padding: Pair, dilation: Pair,
) -> Float[Tensor, "b d p q"]:  # fmt: skip
    """The same as weighted sums of four rows of a table of cells, whose C channels are adjacent in memory, and one
    matrix product: the fastest way on a CPU. The result is channels-last."""
    batch, channels = x.shape[:2]
    out, each, *kernel = weight.shape
    taps, (rows, columns) = kernel[0] * kernel[1], offset.shape[-2:]
    parts = offset.shape[1] // (2 * taps)  # offset groups
    masks = [None] * parts if mask is None else mask.chunk(parts, 1)
    read = torch.cat(
        [
            _taps(own, shift, share, (kernel[0], kernel[1]), stride, padding, dilation)
            for own, shift, share in zip(x.chunk(parts, 1), offset.chunk(parts, 1), masks, strict=True)
        ],
        -1,
    )  # (B P Q, T, C)
    matrix = weight.to(x.dtype).permute(2, 3, 1, 0).reshape(taps, each, out)
    if each == channels:
        y = read.flatten(1) @ matrix.flatten(0, 1)
    else:
        groups = channels // each
        pairs = zip(read.unflatten(2, (groups, each)).unbind(2), matrix.chunk(groups, 2), strict=True)
        y = torch.cat([part.flatten(1) @ own.flatten(0, 1) for part, own in pairs], 1)
    y = y if bias is None else y + bias.to(x.dtype)
    return y.view(batch, rows, columns, out).permute(0, 3, 1, 2)


def _taps(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Float[Tensor, "n t c"]:
    """The value that each tap of each position reads, for channels that share their offsets."""
    batch, channels, height, width = x.shape
    taps, (rows, columns) = kernel[0] * kernel[1], offset.shape[-2:]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    # (B, P, Q, T): where each tap of each position reads
    shift = offset.to(kind).view(batch, taps, 2, rows, columns).permute(2, 0, 3, 4, 1)
    number = torch.arange(taps)
    starts = (number // kernel[1] * dilation[0] - padding[0], number % kernel[1] * dilation[1] - padding[1])
    down_at = shift[0] + (torch.arange(rows)[:, None, None] * stride[0] + starts[0])
    across_at = shift[1] + (torch.arange(columns)[:, None] * stride[1] + starts[1])
    top, left = down_at.detach().floor(), across_at.detach().floor()
    down, across = down_at - top, across_at - left
    cells, shares = [], []
    first = (torch.arange(batch) * (height * width))[:, None, None, None]
    for row, row_share in ((top, 1 - down), (top + 1, down)):
        for column, column_share in ((left, 1 - across), (left + 1, across)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cells.append(first + torch.where(inside, row, 0).long() * width + torch.where(inside, column, 0).long())
            shares.append(row_share * column_share * inside)  # NaN for an offset that is not a number
    share = torch.stack(shares, -1)
    if mask is not None:
        share = share * mask.to(kind).permute(0, 2, 3, 1)[..., None]
    table = x.permute(0, 2, 3, 1).reshape(-1, channels).to(kind)
    read = torch.nn.functional.embedding_bag(
        torch.stack(cells, -1).view(-1, 4), table, mode="sum", per_sample_weights=share.reshape(-1, 4)
    )
    return read.view(-1, taps, channels).to(x.dtype)
