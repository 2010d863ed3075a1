"""Tensors and arrays as files describe them, and their conversion, which checks every claim against the bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.checkpoints.budget import Budget, shown
from maskwright.errors import CheckpointError, UnsafeCheckpointError

LARGEST = 1 << 48  # bound of sizes, strides and offsets


@dataclass(eq=False)
class StorageRecord:
    """A contiguous block of elements that tensors are views of.

    Attributes:
        name: Its key in the file.
        dtype: Type of the elements; None for bytes, whose type the tensor states.
        count: Number of elements.
        read: Returns the bytes; called at most once.
        shift: Elements before the start of this view of the storage.
    """

    name: str
    dtype: torch.dtype | None
    count: int
    read: Callable[[], bytearray]
    shift: int = 0
    _bytes: bytearray | None = None

    def typed(self, dtype: torch.dtype | None, path: str) -> Tensor:
        """All elements as a one-dimensional tensor that shares memory with the other tensors of this storage."""
        dtype = dtype or self.dtype or torch.uint8
        if self._bytes is None:
            self._bytes = self.read()
        claimed = self.count * (self.dtype or torch.uint8).itemsize
        if claimed > len(self._bytes):
            raise CheckpointError(
                f"{path}: storage {shown(self.name)!r} claims {claimed} bytes, but the file has {len(self._bytes)} for "
                "it; it is truncated or damaged, download it again"
            )
        if len(self._bytes) < dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=len(self._bytes) // dtype.itemsize)


@dataclass(eq=False)
class TensorRecord:
    """A tensor as torch pickles it: a strided view of a storage.

    Attributes:
        storage: The storage.
        offset: Index of the first element.
        size: Shape.
        stride: Strides in elements.
        dtype: Type, if the storage has none.
    """

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None

    def tensor(self, budget: Budget) -> Tensor:
        """The tensor; CheckpointError if it does not fit into its storage, or the budget is used up."""
        path = budget.path
        if len(self.size) != len(self.stride) or not _sizes(self.size) or not _lengths((self.offset, *self.stride)):
            raise CheckpointError(
                f"{path}: a tensor with an invalid size or stride; the file is damaged, download it again"
            )
        elements = self.storage.typed(self.dtype, path)
        count = math.prod(self.size)
        offset = self.offset + self.storage.shift
        if not count:
            return torch.empty(self.size, dtype=elements.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if last >= len(elements):
            raise CheckpointError(
                f"{path}: a tensor of size {shown(self.size)} does not fit into its storage "
                f"{shown(self.storage.name)!r} of {len(elements)} elements; the file is damaged, download it again"
            )
        budget.spend_bytes(count * elements.dtype.itemsize)
        view = elements.as_strided(self.size, self.stride, offset)
        # Cloned so that a small view does not keep a large storage alive; always contiguous.
        return view.clone(memory_format=torch.contiguous_format) if count < len(elements) else view.contiguous()


class TypeRecord:
    """A NumPy dtype as pickled: its type code, and the byte order from its state."""

    def __init__(self, letters: Any, *_: Any):
        self.letters = letters if isinstance(letters, str) else "O"

    def build(self, state: Any) -> None:
        """Apply the pickled state."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else ""
        if isinstance(order, str) and order in ("<", ">", "=", "|"):
            self.letters = order + self.letters.lstrip("<>=|")

    def dtype(self, path: str) -> np.dtype:
        """The dtype; UnsafeCheckpointError for types other than numbers and strings."""
        if not re.fullmatch(r"[<>=|]?([biufcSU]\d{1,9}|\?)", self.letters):
            raise UnsafeCheckpointError(
                f"{path}: an array of type {shown(self.letters)!r} may contain objects of any class; only numbers "
                "and strings are supported, nothing was executed"
            )
        try:
            dtype = np.dtype(self.letters)
        except (TypeError, ValueError, OverflowError, SystemError, MemoryError):  # NumPy raises all of these
            dtype = None
        if dtype is None or not dtype.itemsize:
            raise CheckpointError(
                f"{path}: invalid array type {shown(self.letters)!r}; the file is damaged, download it again"
            )
        return dtype

    def __str__(self) -> str:
        return self.letters


class ArrayRecord:
    """A NumPy array as pickled: shape, dtype and bytes from its state."""

    shape: Any = ()
    type: Any = None
    raw: Any = b""
    fortran = False

    def build(self, state: Any) -> None:
        """Apply the pickled state."""
        if not isinstance(state, tuple) or len(cast(tuple[Any, ...], state)) < 4:
            raise ValueError("an array without shape, type and bytes")
        self.shape, self.type, self.fortran, self.raw = cast(tuple[Any, ...], state)[-4:]

    def value(self, budget: Budget) -> Any:
        """A tensor for an array of numbers, nested lists for one of strings."""
        path = budget.path
        if not isinstance(self.type, TypeRecord):
            raise CheckpointError(f"{path}: an array without a type; the file is damaged, download it again")
        dtype = self.type.dtype(path)
        shape: tuple[Any, ...] = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not _sizes(shape):
            raise CheckpointError(f"{path}: an array with an invalid shape; the file is damaged, download it again")
        raw = self._bytes()
        needed = math.prod(shape) * dtype.itemsize
        if raw is None or len(raw) != needed:
            raise CheckpointError(
                f"{path}: an array of shape {shape} and type {dtype} needs {needed} bytes, the file has "
                f"{'none' if raw is None else len(raw)}; download it again"
            )
        if dtype.kind in "SU":
            budget.spend_nodes(math.prod(max(1, n) for n in shape))
            try:
                return cast(Any, _array(raw, dtype, shape, bool(self.fortran)).tolist())
            except (ValueError, SystemError):  # characters beyond the last one of Unicode
                raise CheckpointError(f"{path}: an array of invalid strings; download the file again") from None
        if not needed:
            shape = tuple(int(n) for n in shape)
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, _native(dtype, path))).dtype)
        budget.spend_bytes(2 * needed)
        # torch needs a writable array in native byte order.
        array = np.array(
            _array(raw, dtype, shape, bool(self.fortran)), dtype=_native(dtype, path), order="C", copy=True
        )
        return torch.from_numpy(array)

    def _bytes(self) -> bytes | bytearray | None:
        """The elements; None if they are not bytes. Python 2's strings have been decoded as latin-1."""
        if isinstance(self.raw, str):
            try:
                return self.raw.encode("latin-1")
            except UnicodeEncodeError:
                return None
        return self.raw if isinstance(self.raw, bytes | bytearray) else None


def _sizes(values: tuple[Any, ...]) -> bool:
    """Whether these are the sizes of at most 16 axes, with a product that torch can represent."""
    return _lengths(values) and len(values) <= 16 and math.prod(max(1, int(v)) for v in values) < 1 << 62


def _lengths(values: tuple[Any, ...]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < LARGEST for v in values)


def _array(raw: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> np.ndarray[Any, Any]:
    flat = np.frombuffer(raw, dtype) if len(raw) else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _native(dtype: np.dtype[Any], path: str) -> np.dtype[Any]:
    """The type in the machine's byte order; CheckpointError if torch has no such type."""
    native = dtype.newbyteorder("=")
    try:
        torch.from_numpy(np.empty(0, native))
    except TypeError:
        raise CheckpointError(
            f"{path}: an array of type {dtype}, which torch does not have; convert it to float32"
        ) from None
    return native


class Plain(dict[Any, Any]):
    """The attributes of an object of a class that is known to be harmless.

    Attributes:
        kind: Name of the class in the file.
    """

    kind = ""

    def build(self, state: Any) -> None:
        """Apply the pickled state."""
        for part in cast(tuple[Any, ...], state) if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(cast(dict[Any, Any], part))
