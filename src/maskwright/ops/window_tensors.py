"""Masks of sliding windows as 4-D tensors with units (TensorMask, arXiv 1903.12174, section 3).

At every cell (y, x) of a grid there is a window with a mask of V x U cells. A mask tensor therefore has two spatial
domains, each with a unit in pixels: `cell` (s_HW), the distance of neighbouring windows, and `step` (s_VU), the
distance of neighbouring cells of a mask. Along an axis of length V, v is counted from the centre: index i is
v = i - V / 2 + 0.5.

    natural   F(v, u, y, x) is the mask value at (y + a v, x + a u) of the window at (y, x); a = step / cell
    aligned   G(v, u, y, x) is the mask value at (y, x) of the window at (y - a v, x - a u)

The functions convert between the two representations and between resolutions. They are linear and separable: rows
(V, H) and columns (U, W) are multiplied by sparse matrices with at most four entries per row, so that time and memory
are proportional to input and output, and the gradient is the transposed product. Outside of a tensor the value is
`pad`, a logit, which takes part in the interpolation (the published kernel does not clamp at borders); -6 is a
probability of 0.0025.
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
    """A mask tensor with its representation and units.

    Attributes:
        values: Mask logits.
        aligned: Whether the representation is aligned; otherwise it is natural.
        cell: Distance of neighbouring windows in pixels.
        step: Distance of neighbouring cells of a mask in pixels.

    Raises:
        UsageError: If the values are not a floating-point tensor with five axes, or a unit is not positive.
    """

    values: Float[Tensor, "n v u h w"]
    aligned: bool
    cell: float = 1.0
    step: float = 1.0

    def __post_init__(self) -> None:
        if self.values.dim() != 5 or not self.values.is_floating_point():
            raise UsageError(
                "values must be a floating-point tensor of shape (N, V, U, H, W), got "
                f"{self.values.dtype} of shape {tuple(self.values.shape)}"
            )
        for name, unit in (("cell", self.cell), ("step", self.step)):
            if not (math.isfinite(unit) and unit > 0):
                raise UsageError(f"{name} must be a finite number of pixels above 0, got {unit}")

    @property
    def alpha(self) -> float:
        """Distance of neighbouring cells of a mask, in cells of the grid."""
        return self.step / self.cell


def align2nat(tensor: MaskTensor, pad: float = PAD) -> MaskTensor:
    """Converts aligned to natural with the same units: F(v, u, y, x) = G(v, u, y + a v, x + a u)."""
    _expect(tensor, True)
    values = _resampled(tensor.values, 1.0, 1.0, tensor.alpha, pad, "bilinear")
    return replace(tensor, values=values, aligned=False)


def nat2align(tensor: MaskTensor, pad: float = PAD) -> MaskTensor:
    """Converts natural to aligned with the same units: G(v, u, y, x) = F(v, u, y - a v, x - a u).

    It is the inverse of `align2nat` except for values outside of the tensor.
    """
    _expect(tensor, False)
    values = _resampled(tensor.values, 1.0, 1.0, -tensor.alpha, pad, "bilinear")
    return replace(tensor, values=values, aligned=True)


def up_align2nat(tensor: MaskTensor, factor: float, pad: float = PAD, mode: Mode = "bilinear") -> MaskTensor:
    """Upsamples the masks of an aligned tensor and converts it to natural, on the same grid (section 3.4).

    Args:
        tensor: An aligned tensor.
        factor: Ratio of the resolutions in (V, U); `factor` times V and U must be integers, for example 1.5 for 10.
        pad: Value outside of the tensor.
        mode: "bilinear" with half-pixel centres; "nearest" for the cell that contains the centre of a finer cell;
            "floor" for the one that contains its lower edge, which is the same for integer factors.
    """
    _expect(tensor, True, factor, mode)
    values = _resampled(tensor.values, factor, 1.0, tensor.alpha / factor, pad, mode)
    return replace(tensor, values=values, aligned=False, step=tensor.step / factor)


def swap_align2nat(
    tensor: MaskTensor, factor: float, pad: float = PAD, mode: Mode = "bilinear", fused: bool | None = None
) -> MaskTensor:
    """Applies `up_align2nat` and keeps every `factor`-th window (section 4.2), without the large intermediate tensor.

    The result has as many values as the input. The grid becomes ceil(H / factor) x ceil(W / factor).

    Args:
        tensor: An aligned tensor.
        factor: See `up_align2nat`.
        pad: Value outside of the tensor.
        mode: See `up_align2nat`.
        fused: Whether to use a Triton kernel (`ops.window_kernels`), which agrees with the PyTorch implementation in
            Triton's interpreter and has not been measured on a GPU. None uses it for CUDA tensors if the environment
            variable MASKWRIGHT_FUSED_WINDOWS is 1. Tensors that are too wide for the kernel use PyTorch.

    Raises:
        UsageError: If `fused` is True and Triton is not installed.
    """
    _expect(tensor, True, factor, mode)
    if fused or (fused is None and FUSED and tensor.values.is_cuda):
        values = _fused(tensor.values, factor, factor, tensor.alpha / factor, pad, mode)
    else:
        values = _resampled(tensor.values, factor, factor, tensor.alpha / factor, pad, mode)
    return replace(tensor, values=values, aligned=False, cell=tensor.cell * factor, step=tensor.step / factor)


def subsample(tensor: MaskTensor, every: int) -> MaskTensor:
    """Keeps every `every`-th window along both axes, starting with the first."""
    if not isinstance(every, int) or every < 1:
        raise UsageError(f"every must be an integer of at least 1, got {every!r}")
    return replace(tensor, values=tensor.values[..., ::every, ::every], cell=tensor.cell * every)


def upsample(tensor: MaskTensor, factor: float, mode: Mode = "bilinear") -> MaskTensor:
    """Upsamples each mask of a natural tensor, clamped at its borders (figure 6c).

    Args:
        tensor: A natural tensor.
        factor: Ratio of the resolutions.
        mode: See `up_align2nat`.
    """
    _expect(tensor, False, factor, mode)
    n, v, u, h, w = tensor.values.shape
    size = (_whole(v * factor, "V"), _whole(u * factor, "U"))
    planes = tensor.values.permute(0, 3, 4, 1, 2).reshape(n * h * w, 1, v, u)
    kind = {"align_corners": False} if mode == "bilinear" else {}
    named = {"bilinear": "bilinear", "nearest": "nearest-exact", "floor": "nearest"}[mode]  # the names in torch
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
    """Computes `swap_align2nat` for some windows only.

    Args:
        tensor: An aligned tensor.
        factor: See `up_align2nat`.
        windows: Index in the batch, y and x of each window, on the grid of the result.
        pad: Value outside of the tensor.
        mode: See `up_align2nat`.
        subsampled: False for the windows of `up_align2nat`.
        budget: Bytes of scratch memory; it limits how many windows are computed at a time.

    Returns:
        The masks of the windows.

    Raises:
        UsageError: If a window is outside of the grid (checked on the host only).
    """
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
    if torch.compiler.is_exporting():  # few operators, and all windows at a time
        return _read_windows(values, windows, rows, columns, pad)
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


def _read_windows(
    values: Tensor, windows: Int[Tensor, "k 3"], rows: _Taps, columns: _Taps, pad: float
) -> Float[Tensor, "k v u"]:
    """What `swap_windows` returns, with the taps of columns read together."""
    _, v, u, h, w = values.shape
    image, y, x = windows.unbind(1)
    row, row_weight = rows.index[:, y].transpose(0, 1), rows.weight[:, y].transpose(0, 1).to(values)  # (k, V', taps)
    column, column_weight = (t[:, x].transpose(0, 1) for t in (columns.index, columns.weight))  # (k, U', taps)
    column_weight = column_weight.to(values)
    beside = column.div(w, rounding_mode="floor") * (h * w) + column % w
    place = ((image[:, None, None] * v + row.div(h, rounding_mode="floor")) * u * h + row % h) * w
    flat, total = values.reshape(-1), pad * (1 - row_weight.sum(-1)[:, :, None] * column_weight.sum(-1)[:, None])
    for tap in range(row.shape[-1]):
        read = flat[place[..., tap, None, None] + beside[:, None]]  # (k, V', U', taps)
        total = total + (read * column_weight[:, None]).sum(-1) * row_weight[..., tap, None]
    return total


# ---- inside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taps:
    """For each (mask cell, window) of the result along one pair of axes: which entries of the flattened pair it reads
    and with what weights, both (V', H', taps); a weight is 0 if the entry is outside."""

    index: Tensor
    weight: Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # cached tensors are also used in training, where inference tensors are not allowed
def _taps(cells: int, windows: int, factor: float, stride: float, alpha: float, mode: Mode, device: str) -> _Taps:
    """The taps for an input of `cells` (V) and `windows` (H) and a result of factor * V and ceil(H / stride)."""
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
    """The entries before and after a position and their weights, which are 0 outside of 0 ... length - 1."""
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
            f"fused=True requires Triton, which is part of torch's CUDA builds ({error}); use fused=False"
        ) from None
    _, v, u, h, w = values.shape
    rows = _taps(v, h, factor, stride, alpha, mode, str(values.device))
    columns = _taps(u, w, factor, stride, alpha, mode, str(values.device))
    if not fits(u, w, *columns.index.shape[:2]):
        return _resampled(values, factor, stride, alpha, pad, mode)
    tables = [t for taps in (rows, columns) for t in (taps.index.int(), taps.weight.float())]
    return swap_windows_fused(values, *tables, float(pad))


def _sums(table: Tensor, taps: _Taps) -> Tensor:
    """Weighted sums of rows of `table`, one for each entry of the result."""
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
        raise UsageError(f"factor must make {axis} an integer, got {value:g} cells")
    return number


def _expect(tensor: MaskTensor, aligned: bool, factor: float = 1.0, mode: str = "bilinear") -> None:
    if tensor.aligned != aligned:
        names = ("natural", "aligned")
        raise UsageError(f"the mask tensor must be {names[aligned]}, it is {names[tensor.aligned]}")
    if not (math.isfinite(factor) and factor > 0):
        raise UsageError(f"factor must be a finite number above 0, got {factor}")
    if mode not in get_args(Mode):
        raise UsageError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")


def _check_windows(windows: Tensor, limits: tuple[int, int, int]) -> None:
    """Raises a UsageError if a window is outside; on the host only, to avoid a synchronisation."""
    if windows.device.type != "cpu" or torch.compiler.is_compiling() or not len(windows):
        return
    wrong = ((windows < 0) | (windows >= windows.new_tensor(limits))).any(1).nonzero().flatten()
    if len(wrong):
        raise UsageError(
            f"windows must be (index, y, x) of at least 0 and below {limits}, got {tuple(windows[wrong[0]].tolist())}"
        )
