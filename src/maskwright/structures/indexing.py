"""Indexing objects as NumPy indexes the first axis of an array."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = SupportsIndex | slice | EllipsisType | Tensor | npt.NDArray[Any] | Sequence[Any]


def selection(index: Index, count: int) -> slice | Tensor:
    """Return an index in the form that tensors and lists of objects accept.

    Args:
        index: An integer, which selects one object (the result keeps its axis); a slice; integers, negative ones
            counting from the end; or one bool for each object. Integers and bools may be in a sequence, an array or a
            tensor. An ellipsis selects all.
        count: Number of objects.

    Returns:
        A slice with positive step, or int64 positions on the device of `index`.

    Raises:
        IndexError: If a position is out of range, the number of bools is not `count`, or the type is wrong.
    """
    if index is ...:
        return slice(None)
    if isinstance(index, slice):
        return index if index.step is None or index.step > 0 else torch.tensor(range(count)[index], dtype=torch.int64)
    if isinstance(index, Tensor):
        positions = index
    else:
        positions = torch.from_numpy(_integers_or_bools(index))
    if positions.dtype == torch.bool:
        if positions.ndim != 1 or len(positions) != count:
            raise IndexError(f"a bool index must have one value for each of {count} objects, got {_shape(positions)}")
        return positions.nonzero().flatten()
    if positions.is_floating_point() or positions.is_complex() or positions.ndim > 1:
        raise IndexError(
            "an index must be an integer, a slice, or one axis of integers or bools; got "
            f"{_shape(positions)} of {str(positions.dtype).removeprefix('torch.')}"
        )
    positions = positions.reshape(-1).long()
    if positions.device.type == "cpu":  # elsewhere the check would wait for the device, and indexing checks itself
        wrong = (positions < -count) | (positions >= count)
        if bool(wrong.any()):
            raise IndexError(f"index {int(positions[wrong][0])} is out of range for {count} objects")
        positions = torch.where(positions < 0, positions + count, positions)
    return positions


def _integers_or_bools(index: Any) -> npt.NDArray[np.int64] | npt.NDArray[np.bool_]:
    """An index as an array that torch accepts: contiguous, writable, in native byte order."""
    try:
        values = np.asarray(index)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths
        values = np.empty(1, object)
    if values.dtype == object and isinstance(index, Sequence):  # tensors without axes
        items: list[Any] = [getattr(item, "item", lambda item=item: item)() for item in cast(Sequence[Any], index)]
        values = np.asarray(items) if all(isinstance(item, (int, float)) for item in items) else values
    if values.dtype.kind == "b":
        return values.astype(np.bool_)
    if values.dtype.kind not in "iu" and values.shape != (0,):
        what = repr(values[()]) if values.ndim == 0 else f"values of {values.dtype}"
        raise IndexError(f"an index must be an integer, a slice, or one axis of integers or bools; got {what}")
    return values.astype(np.int64)


def pick(values: list[Any], chosen: slice | Tensor) -> list[Any]:
    """Return the elements of a list at a `selection`."""
    if isinstance(chosen, slice):
        return values[chosen]
    return [values[i] for i in cast(list[int], chosen.tolist())]


def _shape(positions: Tensor) -> str:
    return f"shape {tuple(positions.shape)}"
