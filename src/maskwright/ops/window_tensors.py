"""Masks of sliding windows as 4-D tensors that know their units (TensorMask, arXiv 1903.12174, section 3).

A window stands at every cell (y, x) of a grid, and holds a mask of V x U cells of its own. So a mask tensor has two
spatial domains, each with a unit in pixels: `cell` (s_HW), between neighbouring windows, and `step` (s_VU), between
neighbouring cells of a mask. Along an axis of length V, v counts from the middle: index i is v = i - V / 2 + 0.5.

    natural   F(v, u, y, x) is the mask value at (y + a v, x + a u) of the window at (y, x); a = step / cell
    aligned   G(v, u, y, x) is the mask value AT (y, x) of the window at (y - a v, x - a u)

Everything here changes one into the other, finer or coarser. All of it is linear and separable: rows (V, H) and columns
(U, W) are two sparse matrices with at most four entries a row, so time and memory are those of input and output, and
the gradient is the transposed product. A value that would be read outside its tensor is `pad`, as a logit: -6 is
"certainly not", and it takes part in the interpolation (the published kernel does not clamp at borders).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.errors import UsageError

Mode = Literal["bilinear", "nearest", "floor"]
PAD = -6.0
FUSED = os.environ.get("MASKWRIGHT_FUSED_WINDOWS") == "1"


@dataclass(frozen=True)
class MaskTensor:
    """Values (N, V, U, H, W), which of the two representations they are in, and their units in pixels."""

    values: Float[Tensor, "n v u h w"]
    aligned: bool
    cell: float = 1.0
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.values.dim() != 5 or not self.values.is_floating_point():
            raise UsageError(
                f"values are {self.values.dtype} of shape {tuple(self.values.shape)}; expected (N, V, U, H, W) of "
                "floating point"
            )
        for name, unit in (("cell", self.cell), ("step", self.step)):
            if not (math.isfinite(unit) and unit > 0):
                raise UsageError(f"{name} is {unit}; expected pixels, a number above 0")

    @property
    def alpha(self) -> float:
        """Cells of the grid from one cell of a mask to the next."""
        return self.step / self.cell


def align2nat(tensor: MaskTensor, pad: float = PAD) -> MaskTensor:
    """F(v, u, y, x) = G(v, u, y + a v, x + a u): aligned to natural in the same units."""
    _expect(tensor, True)
    values = _resampled(tensor.values, 1.0, 1.0, tensor.alpha, pad, "bilinear")
    return replace(tensor, values=values, aligned=False)


def nat2align(tensor: MaskTensor, pad: float = PAD) -> MaskTensor:
    """G(v, u, y, x) = F(v, u, y - a v, x - a u): natural to aligned. Undoes `align2nat` but for what fell outside."""
    _expect(tensor, False)
    values = _resampled(tensor.values, 1.0, 1.0, -tensor.alpha, pad, "bilinear")
    return replace(tensor, values=values, aligned=True)


def up_align2nat(tensor: MaskTensor, factor: float, pad: float = PAD, mode: Mode = "bilinear") -> MaskTensor:
    """Aligned and coarse in (V, U) to natural and `factor` times as fine in it, on the same grid (section 3.4).

    The sub-tensor is upsampled first, by pixel centres; "nearest" repeats its cells instead, "floor" too, but the cell
    that a pixel's lower edge lies in (the same for whole factors). `factor` times V and U must be whole numbers: 1.5
    takes 10 to 15.
    """
    _expect(tensor, True, factor, mode)
    values = _resampled(tensor.values, factor, 1.0, tensor.alpha / factor, pad, mode)
    return replace(tensor, values=values, aligned=False, step=tensor.step / factor)


def swap_align2nat(
    tensor: MaskTensor, factor: float, pad: float = PAD, mode: Mode = "bilinear", fused: bool | None = None
) -> MaskTensor:
    """`up_align2nat`, then every `factor`-th window (section 4.2), without the large tensor between them: as many
    values come out as go in, whatever the factor. The grid becomes ceil(H / factor) x ceil(W / factor).

    fused  True: by one Triton kernel (`ops.window_kernels`), which agrees with the PyTorch form in Triton's interpreter
           and has not been measured on a GPU yet; UsageError where Triton is missing. None: where the environment says
           MASKWRIGHT_FUSED_WINDOWS=1 and the tensor is on a CUDA device; otherwise, and by default, the PyTorch form,
           which also makes what is too wide for the kernel
    """
    _expect(tensor, True, factor, mode)
    if fused or (fused is None and FUSED and tensor.values.is_cuda):
        values = _fused(tensor.values, factor, factor, tensor.alpha / factor, pad, mode)
    else:
        values = _resampled(tensor.values, factor, factor, tensor.alpha / factor, pad, mode)
    return replace(tensor, values=values, aligned=False, cell=tensor.cell * factor, step=tensor.step / factor)


def subsample(tensor: MaskTensor, every: int) -> MaskTensor:
    """Every so many-th window in both directions, from the first on."""
    if not isinstance(every, int) or every < 1:
        raise UsageError(f"every is {every!r}; expected a whole number of at least 1")
    return replace(tensor, values=tensor.values[..., ::every, ::every], cell=tensor.cell * every)


def upsample(tensor: MaskTensor, factor: float, mode: Mode = "bilinear") -> MaskTensor:
    """Each mask `factor` times as fine, by itself, clamped at its border: the natural head of figure 6c."""
    _expect(tensor, False, factor, mode)
    n, v, u, h, w = tensor.values.shape
    size = (_whole(v * factor, "V"), _whole(u * factor, "U"))
    planes = tensor.values.permute(0, 3, 4, 1, 2).reshape(n * h * w, 1, v, u)
    kind = {"align_corners": False} if mode == "bilinear" else {}
    named = {"bilinear": "bilinear", "nearest": "nearest-exact", "floor": "nearest"}[mode]  # torch's words for these
    planes = torch.nn.functional.interpolate(planes, size=size, mode=named, **kind)
    return replace(tensor, values=planes.view(n, h, w, *size).permute(0, 3, 4, 1, 2), step=tensor.step / factor)


def swap_windows(
    tensor: MaskTensor,
    factor: float,
    windows: Int[Tensor, "k 3"],
    pad: float = PAD,
    mode: Mode = "bilinear",
    subsampled: bool = True,
    budget: int = 64 << 20,
) -> Float[Tensor, "k v u"]:
    """`swap_align2nat` at some windows alone, (index in the batch, y, x) on the coarser grid: what remains to be done
    where few windows survive scoring. Not `subsampled` it is `up_align2nat`. `budget` bounds the bytes of scratch."""
    _expect(tensor, True, factor, mode)
    stride = factor if subsampled else 1.0
    values = tensor.values
    count, v, u, h, w = values.shape
    _check_windows(windows, (count, math.ceil(h / stride - 1e-9), math.ceil(w / stride - 1e-9)))
    rows = _taps(v, h, factor, stride, tensor.alpha / factor, mode, str(values.device))
    columns = _taps(u, w, factor, stride, tensor.alpha / factor, mode, str(values.device))
    v_out, u_out = rows.index.shape[0], columns.index.shape[0]
    flat, parts = values.reshape(-1), []
    at_once = max(1, budget // (v_out * u_out * 4 * (8 + 4)))
    for some in windows.split(at_once):
        image, y, x = some.unbind(1)
        row, row_weight = rows.index[:, y], rows.weight[:, y]  # (V', k, taps): v * H + y
        column, column_weight = columns.index[:, x], columns.weight[:, x]
        own_v, own_y, own_u, own_x = row // h, row % h, column // w, column % w
        total = values.new_zeros(len(some), v_out, u_out)
        for i in range(row.shape[-1]):
            place = ((image[None] * v + own_v[..., i]) * u * h + own_y[..., i]).T[:, :, None] * w  # (k, V', 1)
            share = row_weight[..., i].T[:, :, None].to(total)
            for j in range(column.shape[-1]):
                beside = (own_u[..., j] * (h * w) + own_x[..., j]).T[:, None]  # (k, 1, U')
                weight = share * column_weight[..., j].T[:, None].to(total)
                total = total + flat[place + beside] * weight
        covered = row_weight.sum(-1).T[:, :, None] * column_weight.sum(-1).T[:, None]
        parts.append(total + pad * (1 - covered).to(total))
    return torch.cat(parts) if parts else values.new_zeros(0, v_out, u_out)


# ---- inside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taps:
    """What each (mask cell, window) of the result reads along one pair of axes: entries of the flattened pair and
    their weights, both (V', H', taps); a weight is 0 where the entry would lie outside."""

    index: Tensor
    weight: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept serves training too, which takes no tensor of inference mode
def _taps(cells: int, windows: int, factor: float, stride: float, alpha: float, mode: Mode, device: str) -> _Taps:
    """`cells` (V) and `windows` (H) of the input; the result has factor * V and ceil(H / stride)."""
    fine, coarse = _whole(cells * factor, "V"), math.ceil(windows / stride - 1e-9)
    number = torch.arange(fine, dtype=torch.float64)
    inner = (number + 0.5) / factor - 0.5
    if mode == "nearest":
        inner = (inner + 0.5).floor()
    elif mode == "floor":
        inner = (number / factor + 1e-9).floor()
    middle = number - fine / 2 + 0.5
    outer = torch.arange(coarse, dtype=torch.float64) * stride + (alpha * middle)[:, None]  # (V', H')
    index, weight = [], []
    for v, v_share in _two(inner.round(decimals=9), cells):
        for y, y_share in _two(outer.round(decimals=9), windows):
            index.append(v[:, None] * windows + y)
            weight.append(v_share[:, None] * y_share)
    used = [n for n in range(len(weight)) if bool(weight[n].any())] or [0]
    return _Taps(
        torch.stack([index[n] for n in used], -1).to(device), torch.stack([weight[n] for n in used], -1).to(device)
    )


def _two(place: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """The entries before and after a place and their shares: 0 outside of 0 ... length - 1."""
    low = place.floor()
    part = place - low
    result = []
    for entry, share in ((low, 1 - part), (low + 1, part)):
        inside = (entry >= 0) & (entry < length)
        result.append((entry.clamp(0, length - 1).long(), share * inside))
    return result


def _resampled(values: Tensor, factor: float, stride: float, alpha: float, pad: float, mode: Mode) -> Tensor:
    n, v, u, h, w = values.shape
    rows = _taps(v, h, factor, stride, alpha, mode, str(values.device))
    columns = _taps(u, w, factor, stride, alpha, mode, str(values.device))
    v_out, h_out = rows.index.shape[:2]
    u_out, w_out = columns.index.shape[:2]
    table = values.permute(1, 3, 0, 2, 4).reshape(v * h, n * u * w)
    table = _sums(table, rows).view(v_out * h_out, n, u, w)
    table = table.permute(2, 3, 1, 0).reshape(u * w, n * v_out * h_out)
    result = _sums(table, columns).view(u_out, w_out, n, v_out, h_out).permute(2, 3, 0, 4, 1)
    if pad == 0:
        return result
    down, across = rows.weight.sum(-1).to(values), columns.weight.sum(-1).to(values)  # (V', H'), (U', W')
    return result + pad * (1 - down[:, None, :, None] * across[None, :, None, :])


def _fused(values: Tensor, factor: float, stride: float, alpha: float, pad: float, mode: Mode) -> Tensor:
    try:
        from maskwright.ops.window_kernels import fits, swap_windows_fused
    except ImportError as error:
        raise UsageError(
            f"fused windows need Triton, which comes with torch's CUDA builds ({error}); use fused=False"
        ) from None
    _, v, u, h, w = values.shape
    rows = _taps(v, h, factor, stride, alpha, mode, str(values.device))
    columns = _taps(u, w, factor, stride, alpha, mode, str(values.device))
    if not fits(u, w, *columns.index.shape[:2]):
        return _resampled(values, factor, stride, alpha, pad, mode)
    tables = [t for taps in (rows, columns) for t in (taps.index.int(), taps.weight.float())]
    return swap_windows_fused(values, *tables, float(pad))


def _sums(table: Tensor, taps: _Taps) -> Tensor:
    """Weighted sums of rows of `table`, one for each entry of `taps`."""
    count = taps.index.shape[-1]
    return torch.nn.functional.embedding_bag(
        taps.index.reshape(-1, count),
        table,
        mode="sum",
        per_sample_weights=taps.weight.reshape(-1, count).to(table.dtype),
    )


def _whole(value: float, axis: str) -> int:
    number = round(value)
    if abs(value - number) > 1e-6 or (number < 1 and value > 0):
        raise UsageError(f"{axis} would become {value:g} cells; the factor must make it a whole number")
    return number


def _expect(tensor: MaskTensor, aligned: bool, factor: float = 1.0, mode: str = "bilinear") -> None:
    if tensor.aligned != aligned:
        words = ("a natural", "an aligned")
        raise UsageError(
            f"the mask tensor is in {words[tensor.aligned]} representation; {words[aligned]} one is needed"
        )
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(f"factor is {factor}; expected a number above 0")
    if mode not in get_args(Mode):
        raise UsageError(f"mode is {mode!r}; expected {', '.join(get_args(Mode))}")


def _check_windows(windows: Tensor, limits: tuple[int, int, int]) -> None:
    """UsageError where one lies outside; on the host alone, since a GPU would have to be waited for."""
    if windows.device.type != "cpu" or torch.compiler.is_compiling() or not len(windows):
        return
    wrong = ((windows < 0) | (windows >= windows.new_tensor(limits))).any(1).nonzero().flatten()
    if len(wrong):
        raise UsageError(
            f"windows has {tuple(windows[wrong[0]].tolist())}; expected (index, y, x) from 0 on and below {limits}"
        )
