"""Indexing objects as NumPy indexes the first axis of an array."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Index = SupportsIndex | slice | Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[bool]


def selection(index: Index, count: int) -> slice | Tensor:
    """Return an index in the form that tensors and lists of objects accept.

    Args:
        index: An integer, which selects one object (the result keeps its axis); a slice; integers, negative ones
            counting from the end; or one bool for each object. Integers and bools may be in a sequence, an array or a
            tensor.
        count: Number of objects.

    Returns:
        A slice with positive step, or int64 positions on the device of `index`.

    Raises:
        IndexError: If a position is out of range, the number of bools is not `count`, or the type is wrong.
    """
    if isinstance(index, slice):
        return index if index.step is None or index.step > 0 else torch.tensor(range(count)[index], dtype=torch.int64)
    if isinstance(index, Tensor):
        positions = index
    else:
        values = np.asarray(index)
        positions = torch.from_numpy(values if values.size else values.astype(np.int64))
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


def pick(values: list[Any], chosen: slice | Tensor) -> list[Any]:
    """Return the elements of a list at a `selection`."""
    if isinstance(chosen, slice):
        return values[chosen]
    return [values[i] for i in cast(list[int], chosen.tolist())]


def _shape(positions: Tensor) -> str:
    return f"shape {tuple(positions.shape)}"
