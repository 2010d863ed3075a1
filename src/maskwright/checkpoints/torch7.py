"""Binary files of Torch 7 (.t7): Lua's numbers, strings, tables and objects, read as data without executing code.

A value is a tag (four bytes, little-endian) followed by its content. Tables and objects have a number; when one occurs
again, only the number is stored. An object is the name of its class followed, except for tensors and storages, by the
table of its fields. Lua functions are skipped. Networks are containers whose field "modules" is a list. Their
parameters get flat names: "trunk.5.1.weight" is `weight` of the first module of the fifth module of the field `trunk`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from maskwright.checkpoints.binary import BinaryReader
from maskwright.checkpoints.budget import Budget, shown
from maskwright.checkpoints.records import StorageRecord, TensorRecord
from maskwright.errors import CheckpointError

MARKS = (b"\x03\0\0\0", b"\x04\0\0\0")  # first bytes of a file that holds a table or an object
NIL, NUMBER, STRING, TABLE, OBJECT, BOOLEAN, FUNCTION, OLD_CLOSURE, CLOSURE = range(9)
DEEPEST = 64  # maximum depth of nesting
KINDS = {
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Half": torch.float16, "Float": torch.float32, "Double": torch.float64, "": torch.float32,
}  # fmt: skip
LARGEST_KEY = 1 << 60  # larger integers can be chosen so that their hashes collide
KEPT = ("weight", "bias", "a", "b", "running_mean", "running_var")  # fields of a module; others are buffers


@dataclass
class LuaObject:
    """An object of any class except tensors and storages.

    Attributes:
        kind: Name of the class.
        fields: The fields by name.
    """

    kind: str
    fields: dict[Any, Any] = field(default_factory=dict)


def read_torch7(data: bytes, budget: Budget) -> dict[str, TensorRecord]:
    """Read the parameters of the network in a Torch 7 file.

    Args:
        data: Content of the file.
        budget: What reading the file may cost.

    Returns:
        The parameters by name; `unpickling.settle` turns them into tensors.

    Raises:
        CheckpointError: If the file is damaged or contains no network.
    """
    path = budget.path
    content = _Reader(data, path).value(0)
    if isinstance(content, dict):
        content = content.get("model", content)
    if not isinstance(content, LuaObject | dict):
        raise CheckpointError(f"{path}: expected a Torch 7 network, got a {type(content).__name__}")
    fields = content.fields if isinstance(content, LuaObject) else content
    walk = _Walk(budget)
    if "modules" in fields:
        walk.visit(content, "", frozenset())
    for name, value in fields.items():
        if isinstance(value, LuaObject) and isinstance(name, str):
            walk.visit(value, f"{name}.", frozenset())
    return walk.found


class _Walk:
    """Depth-first traversal of the modules of a network."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self.found: dict[str, TensorRecord] = {}

    def visit(self, module: Any, prefix: str, above: frozenset[int]) -> None:
        """Collect the parameters of a module and of the modules in it; `above` are those that contain it."""
        fields = module.fields if isinstance(module, LuaObject) else module
        if not isinstance(fields, dict) or id(fields) in above:
            return
        if len(above) > DEEPEST:
            raise CheckpointError(
                f"{self.budget.path}: modules nested more than {DEEPEST} deep; this is not a checkpoint"
            )
        self.budget.spend_nodes(1 + len(KEPT) + len(prefix) // 8)
        for name in KEPT:
            if isinstance(fields.get(name), TensorRecord):
                self.found[f"{prefix}{name}"] = fields[name]
        inner = fields.get("modules")
        for number, child in inner.items() if isinstance(inner, dict) else ():
            self.visit(child, f"{prefix}{number}.", above | {id(fields)})


class _Reader(BinaryReader):
    """Reader of the values of a file."""

    def __init__(self, data: bytes, path: str):
        super().__init__(data, path, "Torch 7")
        self.seen: dict[int, Any] = {}

    def value(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise CheckpointError(f"{self.path}: tables nested more than {DEEPEST} deep; this is not a checkpoint")
        tag = self.integer()
        if tag == NIL:
            return None
        if tag == NUMBER:
            number = self.numbers("d", 1)[0]
            return int(number) if number.is_integer() else number
        if tag == STRING:
            return self.text()
        if tag == BOOLEAN:
            return self.integer() == 1
        if tag == FUNCTION:
            self.skip_function(depth)
            return None
        if tag not in (TABLE, OBJECT, OLD_CLOSURE, CLOSURE):
            raise self.damaged(f"a value of kind {tag}")
        number = self.integer()
        if number in self.seen:
            return self.seen[number]
        if tag == TABLE:
            table = self.seen[number] = {}
            return self.filled(table, depth)
        if tag == OBJECT:
            return self.object(number, depth)
        self.seen[number] = None
        self.skip_function(depth)
        return None

    def object(self, number: int, depth: int) -> Any:
        kind = self.text()
        if re.fullmatch(r"V \d+", kind):
            kind = self.text()
        found = re.fullmatch(r"torch\.(?:Cuda)?(\w*?)(Tensor|Storage)", kind)
        if found is None:
            result = self.seen[number] = LuaObject(kind)
            fields = self.value(depth + 1)
            if not isinstance(fields, dict):
                raise self.damaged(f"an object of class {shown(kind, 40)!r} without fields")
            result.fields = fields
            return result
        if found[1] not in KINDS:
            raise self.damaged(f"a {shown(kind, 40)}")
        if found[2] == "Storage":
            dtype, count = KINDS[found[1]], self.numbers("q", 1)[0]
            content = self.bytes(count * dtype.itemsize)
            self.seen[number] = StorageRecord(str(number), dtype, count, lambda: bytearray(content))
            return self.seen[number]
        self.seen[number] = None
        axes = self.integer()
        if not 0 <= axes <= 16:
            raise self.damaged(f"a tensor of {axes} axes")
        size, stride = self.numbers("q", axes), self.numbers("q", axes)
        first = self.numbers("q", 1)[0] - 1
        storage = self.value(depth + 1)
        if isinstance(storage, StorageRecord) and axes:
            self.seen[number] = TensorRecord(storage, first, size, stride, storage.dtype)
        return self.seen[number]

    def filled(self, table: dict[Any, Any], depth: int) -> dict[Any, Any]:
        for _ in range(self.integer()):
            key = self.value(depth + 1)
            value = self.value(depth + 1)
            if isinstance(key, str | float) or (isinstance(key, int) and abs(key) < LARGEST_KEY):
                table[key] = value
        return table

    def skip_function(self, depth: int) -> None:
        """Skip the code of a function and the values that it captures."""
        self.bytes(self.integer())
        self.value(depth + 1)

    def text(self) -> str:
        return bytes(self.bytes(self.integer())).decode("utf-8", "replace")

    def integer(self) -> int:
        return self.numbers("i", 1)[0]
