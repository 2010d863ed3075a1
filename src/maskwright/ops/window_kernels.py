"""`window_tensors.swap_align2nat` as one kernel on the GPU, written in Triton.

The PyTorch form gathers along the rows' pair of axes, turns the tensor, gathers along the columns' pair, turns it back
and adds what was padded: it reads and writes memory several times. Here each value of the result is summed where it is
written, from at most four times four entries. Backwards each value's gradient is added to the same entries, in float32
and in no fixed order. Both have been compared with the PyTorch form in Triton's interpreter; on a GPU they have NOT
been measured yet, so that nothing uses them unless asked (see `swap_align2nat`). `benchmarks/windows.py` measures them.

Imported only where it is asked for: Triton comes with torch's CUDA builds alone.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 128  # neighbouring windows of a row that one programme makes


@triton.jit
def _forward(
    values, result, row_index, row_weight, column_index, column_weight, pad,
    V, U, H, W, V_OUT, U_OUT, H_OUT, W_OUT,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A programme is (picture, v', u', y') and a block of x'.
    line = tl.program_id(0).to(tl.int64)
    y_out, rest = line % H_OUT, line // H_OUT
    u_out, rest = rest % U_OUT, rest // U_OUT
    v_out, picture = rest % V_OUT, rest // V_OUT
    x_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x_out < W_OUT
    total = tl.full((BLOCK,), 0.0, tl.float32)
    down = 0.0
    across = tl.full((BLOCK,), 0.0, tl.float32)
    for j in tl.static_range(COLUMNS):
        across += tl.load(column_weight + (u_out * W_OUT + x_out) * COLUMNS + j, mask=inside, other=0.0)
    for i in tl.static_range(ROWS):
        entry = tl.load(row_index + (v_out * H_OUT + y_out) * ROWS + i).to(tl.int64)
        share = tl.load(row_weight + (v_out * H_OUT + y_out) * ROWS + i)
        down += share
        base = ((picture * V + entry // H) * U * H + entry % H) * W
        for j in tl.static_range(COLUMNS):
            place = (u_out * W_OUT + x_out) * COLUMNS + j
            cell = tl.load(column_index + place, mask=inside, other=0).to(tl.int64)
            weight = share * tl.load(column_weight + place, mask=inside, other=0.0)
            read = tl.load(values + base + (cell // W) * (H * W) + cell % W, mask=inside & (weight != 0.0), other=0.0)
            total += weight * read.to(tl.float32)
    total += pad * (1.0 - down * across)
    tl.store(result + line * W_OUT + x_out, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gradient, result, row_index, row_weight, column_index, column_weight,
    V, U, H, W, V_OUT, U_OUT, H_OUT, W_OUT,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    y_out, rest = line % H_OUT, line // H_OUT
    u_out, rest = rest % U_OUT, rest // U_OUT
    v_out, picture = rest % V_OUT, rest // V_OUT
    x_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x_out < W_OUT
    own = tl.load(gradient + line * W_OUT + x_out, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        entry = tl.load(row_index + (v_out * H_OUT + y_out) * ROWS + i).to(tl.int64)
        share = tl.load(row_weight + (v_out * H_OUT + y_out) * ROWS + i)
        base = ((picture * V + entry // H) * U * H + entry % H) * W
        for j in tl.static_range(COLUMNS):
            place = (u_out * W_OUT + x_out) * COLUMNS + j
            cell = tl.load(column_index + place, mask=inside, other=0).to(tl.int64)
            weight = share * tl.load(column_weight + place, mask=inside, other=0.0)
            target = result + base + (cell // W) * (H * W) + cell % W
            tl.atomic_add(target, weight * own, mask=inside & (weight != 0.0))


@torch.library.custom_op("maskwright::swap_windows", mutates_args=())
def swap_windows_fused(
    values: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor, pad: float
) -> Tensor:
    """(N, V, U, H, W) -> (N, V', U', H', W'), contiguous. The tables are int32 and float32, (V', H', taps) of entries
    v * H + y and (U', W', taps) of entries u * W + x."""
    values = values.contiguous()
    result = _empty(values, row_index, column_index)
    if result.numel():
        _forward[_grid(result)](
            values, result, row_index, row_weight, column_index, column_weight, pad, *values.shape[1:],
            *result.shape[1:], row_index.shape[-1], column_index.shape[-1], BLOCK,
        )  # fmt: skip
    return result


@torch.library.custom_op("maskwright::swap_windows_backward", mutates_args=())
def _gradient(
    gradient: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor,
    shape: list[int],
) -> Tensor:  # fmt: skip
    gradient = gradient.contiguous()
    result = torch.zeros(shape, dtype=torch.float32, device=gradient.device)
    if gradient.numel():
        _backward[_grid(gradient)](
            gradient, result, row_index, row_weight, column_index, column_weight, *shape[1:], *gradient.shape[1:],
            row_index.shape[-1], column_index.shape[-1], BLOCK,
        )  # fmt: skip
    return result.to(gradient.dtype)


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


def _grid(result: Tensor) -> tuple[int, int]:
    return result.numel() // result.shape[-1], triton.cdiv(result.shape[-1], BLOCK)
