"""Files of MXNet (.params): a list of arrays and their names, as data.

A file is a mark, the arrays, and the names ("arg:conv1_weight"); all numbers are little-endian. An array is its shape,
its device, a number for its type, and its elements. Later versions put a mark and the kind of storage before the shape,
and write 64-bit instead of 32-bit sizes.
"""

from __future__ import annotations

import math
import struct
from functools import partial

import torch

from maskwright.checkpoints.binary import BinaryReader
from maskwright.checkpoints.budget import Budget
from maskwright.checkpoints.records import StorageRecord, TensorRecord
from maskwright.errors import CheckpointError

MARK = struct.pack("<QQ", 0x112, 0)  # first bytes of a file
FIRST, SECOND, THIRD = 0xF993FAC8, 0xF993FAC9, 0xF993FACA  # marks of an array, by version; the oldest has none
DENSE = 0  # kind of storage
TYPES = (
    torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int8, torch.int64, torch.bool,
)  # fmt: skip
MOST_AXES = 32


def read_mxnet(data: bytes, budget: Budget) -> dict[str, TensorRecord]:
    """Read the arrays of an MXNet file.

    Args:
        data: Content of the file.
        budget: What reading the file may cost.

    Returns:
        The arrays by name; `unpickling.settle` turns them into tensors.

    Raises:
        CheckpointError: If the file is damaged, or its arrays have no names or are sparse.
    """
    reader = _Reader(data, budget.path)
    reader.bytes(len(MARK))
    count = reader.numbers("Q", 1)[0]
    arrays: list[TensorRecord | None] = []
    for _ in range(count):
        budget.spend_nodes(1)
        arrays.append(reader.array(len(arrays)))
    names: list[str] = []
    for _ in range(reader.numbers("Q", 1)[0]):
        budget.spend_nodes(1)
        names.append(bytes(reader.bytes(reader.numbers("Q", 1)[0])).decode("utf-8", "replace"))
    if len(names) != len(arrays):
        raise CheckpointError(
            f"{budget.path}: has {len(arrays)} arrays and {len(names)} names; save a dict of arrays with mx.nd.save"
        )
    return {name: array for name, array in zip(names, arrays, strict=True) if array is not None}


class _Reader(BinaryReader):
    """Reader of the values of a file."""

    def __init__(self, data: bytes, path: str):
        super().__init__(data, path, "MXNet")

    def array(self, number: int) -> TensorRecord | None:
        """The next array; None if it is empty."""
        axes, sizes = self.numbers("I", 1)[0], "I"
        if axes in (FIRST, SECOND, THIRD):
            if axes != FIRST and self.numbers("i", 1)[0] != DENSE:
                raise CheckpointError(f"{self.path}: array {number} is sparse; only dense arrays can be read")
            axes, sizes = self.numbers("I", 1)[0], "q"
        if axes > MOST_AXES:
            raise self.damaged(f"an array of {axes} axes")
        shape = self.numbers(sizes, axes)
        if not axes or min(shape) < 0:
            return None
        self.numbers("i", 2)  # the device
        kind = self.numbers("i", 1)[0]
        if not 0 <= kind < len(TYPES):
            raise self.damaged(f"an array of type {kind}")
        dtype, count = TYPES[kind], math.prod(shape)
        content = self.bytes(count * dtype.itemsize)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(axes))
        return TensorRecord(
            StorageRecord(str(number), dtype, count, partial(bytearray, content)), 0, shape, stride, dtype
        )
