"""`window_tensors.swap_align2nat` as one Triton kernel for GPUs.

The PyTorch implementation sums along the axes of rows, transposes the tensor, sums along the axes of columns and
transposes it back, so that memory is read and written several times. Here a program computes all windows and mask
columns (U', W') of one line (v', y'): it sums the lines (v, y) that this one depends on, with contiguous reads, and
gathers from that sum in registers. Each value is read about four times (through the cache) and written once. The
backward pass is the same kernel with transposed tables, without atomic additions, so that it is deterministic.

Both agree with the PyTorch implementation in Triton's interpreter, and compile. An earlier kernel, which gathered from
global memory, was measured on an H200: 3 times as fast as PyTorch at factor 1, 1.3 times at 2 and 4, slower from 8 on
and in every backward pass from 2 on. This one has not been measured and is therefore not used by default (see
`swap_align2nat`); `benchmarks/windows.py` measures it.

The module is imported only on request, because Triton is part of torch's CUDA builds only.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LARGEST = 16384  # entries of one line, (U, W), that fit into registers and shared memory in float32


@triton.jit
def _lines(
    values, result, row_index, row_weight, column_index, column_weight, pad,
    V, U, H, W, V_OUT, U_OUT, H_OUT, W_OUT,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    y_out, rest = line % H_OUT, line // H_OUT
    v_out, image = rest % V_OUT, rest // V_OUT

    entry = tl.arange(0, READ)
    place = (entry // W) * (H * W) + entry % W
    there = entry < U * W
    mixed = tl.full((READ,), 0.0, tl.float32)
    down = 0.0
    for i in tl.static_range(ROWS):
        own = tl.load(row_index + (v_out * H_OUT + y_out) * ROWS + i).to(tl.int64)
        share = tl.load(row_weight + (v_out * H_OUT + y_out) * ROWS + i)
        down += share
        start = values + ((image * V + own // H) * U * H + own % H) * W
        mixed += share * tl.load(start + place, mask=there, other=0.0).to(tl.float32)

    cell = tl.arange(0, WRITTEN)
    inside = cell < U_OUT * W_OUT
    total = tl.full((WRITTEN,), 0.0, tl.float32)
    across = tl.full((WRITTEN,), 0.0, tl.float32)
    for j in tl.static_range(COLUMNS):
        own = tl.load(column_index + j * (U_OUT * W_OUT) + cell, mask=inside, other=0).to(tl.int32)
        share = tl.load(column_weight + j * (U_OUT * W_OUT) + cell, mask=inside, other=0.0)
        across += share
        total += share * tl.gather(mixed, own, 0)
    total += pad * (1.0 - down * across)
    start = result + (image * V_OUT + v_out) * U_OUT * (H_OUT * W_OUT) + y_out * W_OUT
    target = (cell // W_OUT) * (H_OUT * W_OUT) + cell % W_OUT
    tl.store(start + target, total.to(result.dtype.element_ty), mask=inside)


def fits(u: int, w: int, u_out: int, w_out: int) -> bool:
    """Whether lines of (U, W) and (U', W') entries fit into registers and shared memory."""
    return max(u * w, u_out * w_out) <= LARGEST


@torch.library.custom_op("maskwright::swap_windows", mutates_args=())
def swap_windows_fused(
    values: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor, pad: float
) -> Tensor:
    """Applies two tables of taps to a mask tensor.

    Args:
        values: (N, V, U, H, W).
        row_index: (V', H', taps), entries v * H + y as integers.
        row_weight: Their weights in float32.
        column_index: (U', W', taps), entries u * W + x as integers.
        column_weight: Their weights in float32.
        pad: Value outside of the tensor.

    Returns:
        (N, V', U', H', W'), contiguous.
    """
    values = values.contiguous()
    result = _empty(values, row_index, column_index)
    _run(values, result, (row_index, row_weight), (column_index, column_weight), pad)
    return result


@torch.library.custom_op("maskwright::swap_windows_backward", mutates_args=())
def _gradient(
    gradient: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor,
    shape: list[int],
) -> Tensor:  # fmt: skip
    gradient = gradient.contiguous()
    result = gradient.new_empty(shape)
    _, v, u, h, w = shape
    rows, columns = transposed(row_index, row_weight, v, h), transposed(column_index, column_weight, u, w)
    _run(gradient, result, rows, columns, 0.0)
    return result


def transposed(index: Tensor, weight: Tensor, cells: int, windows: int) -> tuple[Tensor, Tensor]:
    """Transposes a table: for each entry of the input, the entries of the result that read it, and their weights.

    Args:
        index: Entries of the input that each entry of the result reads, with taps on the last axis.
        weight: Their weights.
        cells: Mask cells of the input along the axis.
        windows: Windows of the input along the axis.

    Returns:
        Index and weight, (cells, windows, taps), with as many taps as the entry with most readers; unused ones have
        weight 0.
    """
    count = cells * windows
    used = weight.flatten() != 0
    reader = torch.arange(index[..., 0].numel(), device=index.device).repeat_interleave(index.shape[-1])[used]
    entry, share = index.flatten().long()[used], weight.flatten()[used]
    order = entry.argsort(stable=True)
    entry, reader, share = entry[order], reader[order], share[order]
    reads = torch.bincount(entry, minlength=count)
    taps = max(1, int(reads.max()) if count else 1)
    slot = torch.arange(len(entry), device=index.device) - (reads.cumsum(0) - reads)[entry]
    back = index.new_zeros(count, taps)
    back_weight = weight.new_zeros(count, taps)
    back[entry, slot], back_weight[entry, slot] = reader.to(index.dtype), share
    return back.view(cells, windows, taps), back_weight.view(cells, windows, taps)


def _run(
    values: Tensor, result: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], pad: float
) -> None:
    n, _, u, _, w = values.shape
    _, v_out, u_out, h_out, w_out = result.shape
    if not result.numel():
        return
    # Taps on the first axis, so that neighbouring threads read neighbouring entries.
    across = [table.permute(2, 0, 1).reshape(table.shape[-1], -1).contiguous() for table in columns]
    _lines[(n * v_out * h_out,)](
        values, result, *rows, *across, pad, *values.shape[1:], *result.shape[1:], rows[0].shape[-1],
        columns[0].shape[-1], triton.next_power_of_2(u * w), triton.next_power_of_2(u_out * w_out), num_warps=8,
    )  # fmt: skip


@swap_windows_fused.register_fake
def _(values, row_index, row_weight, column_index, column_weight, pad):
    return _empty(values, row_index, column_index)


@_gradient.register_fake
def _(gradient, row_index, row_weight, column_index, column_weight, shape):
    return gradient.new_empty(shape)


def _keep(ctx, inputs, output) -> None:
    values, *tables, _ = inputs
    ctx.shape = list(values.shape)
    ctx.save_for_backward(*tables)


def _back(ctx, gradient):
    return _gradient(gradient, *ctx.saved_tensors, ctx.shape), None, None, None, None, None


swap_windows_fused.register_autograd(_back, setup_context=_keep)


def _empty(values: Tensor, row_index: Tensor, column_index: Tensor) -> Float[Tensor, "n v u h w"]:
    (v, h, _), (u, w, _) = row_index.shape, column_index.shape
    return values.new_empty(values.shape[0], v, u, h, w)
