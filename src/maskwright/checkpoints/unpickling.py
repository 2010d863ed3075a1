"""Reading of pickled weights without executing code.

A pickle is a program for a stack machine. Python's implementation lets the program import and call any name. This one
supports a fixed list of names, and maps each to a function of this module that builds a tensor, an array or a plain
container. Nothing that the file names is imported or called, and no attribute of it is set. Any other name raises an
error.

The result first consists of descriptions (`TensorRecord`, `ArrayRecord`). `settle` turns them into tensors after
checking that their size matches the available bytes, so that a small file cannot allocate gigabytes.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskwright.checkpoints.budget import Budget, shown
from maskwright.checkpoints.records import ArrayRecord, Plain, StorageRecord, TensorRecord, TypeRecord
from maskwright.errors import CheckpointError, UnsafeCheckpointError

# What the reading of a damaged program raises.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
    AssertionError, SystemError, struct.error,
)  # fmt: skip
_LARGEST_KEY = 1 << 60  # hashes of larger integers can be chosen to collide, which makes dicts quadratic


def unpickle(
    file: io.BufferedIOBase,
    size: int,
    path: str,
    storages: Callable[[Any], StorageRecord] | None = None,
    budget: Budget | None = None,
) -> Any:
    """Read one pickle.

    Args:
        file: A binary file.
        size: Number of bytes left in the file.
        path: The file, for messages.
        storages: Function from torch's persistent ids to storages; None if there must be none.
        budget: That of the whole file; None: one for `size`.

    Returns:
        Containers with records, to be passed to `settle`. Byte strings of Python 2 are decoded as latin-1.

    Raises:
        UnsafeCheckpointError: If the pickle uses a name that is not in the list.
        CheckpointError: If the pickle is damaged.
    """
    try:
        budget = budget or Budget.for_size(path, size)
        return _Machine(_Bounded(file, size, path), path, storages, budget).load()
    except CheckpointError:
        raise
    except _DAMAGE as e:
        raise CheckpointError(
            f"{path}: the pickle is truncated or damaged ({_words(e)}); download the file again"
        ) from None
    except (MemoryError, RecursionError):
        raise CheckpointError(f"{path}: the pickle needs more memory than a checkpoint should; not read") from None


def settle(value: Any, budget: Budget) -> Any:
    """Convert the records inside plain containers to tensors and arrays.

    Args:
        value: What `unpickle` returned; not modified.
        budget: What the file may still cost.

    Returns:
        The same containers with tensors. Objects that occur several times are converted once.

    Raises:
        UnsafeCheckpointError: If an array holds objects other than numbers and strings.
        CheckpointError: If a record does not match the available bytes.
    """
    path = budget.path
    seen: dict[int, Any] = {}
    keep: list[Any] = []  # keeps the objects alive, whose ids are the keys of `seen`

    def visit(item: Any, depth: int) -> Any:
        if isinstance(item, TensorRecord | ArrayRecord | dict | list | tuple):
            if id(item) in seen:
                return seen[id(item)]
            if depth > 64:
                raise CheckpointError(f"{path}: containers nested more than 64 deep; this is not a checkpoint")
            keep.append(item)
        if isinstance(item, dict | list | tuple):
            budget.spend_nodes(len(item))
        if isinstance(item, TensorRecord):
            result: Any = item.tensor(budget)
        elif isinstance(item, ArrayRecord):
            result = item.value(budget)
        elif isinstance(item, dict):
            result = seen[id(item)] = {}  # registered before its contents, because a container may contain itself
            result.update((k, visit(v, depth + 1)) for k, v in item.items())
        elif isinstance(item, list):
            result = seen[id(item)] = []
            result.extend(visit(v, depth + 1) for v in item)
        elif isinstance(item, tuple):
            result = tuple(visit(v, depth + 1) for v in item)
        elif isinstance(item, TypeRecord | _Maker):
            return str(item)
        else:
            return item
        seen[id(item)] = result
        return result

    return visit(value, 0)


class _Maker:
    """The object on the stack for a name in the file; it can only be called."""

    __slots__ = ("function", "name")

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function

    def __str__(self) -> str:
        return self.name


class _Bounded:
    """A file that refuses to read more bytes than it has left, because lengths in a pickle are only claims."""

    def __init__(self, file: io.BufferedIOBase, size: int, path: str):
        self.file, self.left, self.path = file, size, path

    def read(self, count: int) -> bytes:
        if count > self.left or count < 0:
            raise CheckpointError(
                f"{self.path}: claims {count} bytes, but {self.left} are left; the file is truncated or damaged, "
                "download it again"
            )
        data = self.file.read(count)
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data


_BASE: Any = pickle._Unpickler  # the implementation in Python; opcodes of the one in C cannot be replaced


class _Machine(_BASE):
    """Python's unpickler with every opcode replaced that could import, call or modify objects named by the file."""

    dispatch: ClassVar[dict[int, Any]] = dict(_BASE.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(self, file: _Bounded, path: str, storages: Callable[[Any], StorageRecord] | None, budget: Budget):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.path, self.storages, self.budget = path, storages, budget

    def find_class(self, module: str, name: str) -> Any:
        module = re.sub(r"^numpy\._core\b", "numpy.core", module)
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in _VALUES:
            return _VALUES[full]
        if full in _FUNCTIONS:
            return _Maker(full, _FUNCTIONS[full])
        if full == "torch.storage._load_from_bytes":
            return _Maker(full, self.nested)
        if full == "numpy.core.multiarray.scalar":
            return _Maker(full, self.scalar)
        if _PLAIN.fullmatch(full):
            return _Maker(full, _plain(full))
        raise UnsafeCheckpointError(
            f"{self.path}: needs {shown(module)}.{shown(name)}, which is neither a tensor nor a plain container; "
            "refused, nothing was executed. Ask the author for a state dict"
        )

    def nested(self, data: Any) -> StorageRecord:
        """A storage that was pickled as a nested torch file; read by `storages`."""
        if self.storages is None or not isinstance(data, bytes | bytearray):
            raise UnsafeCheckpointError(
                f"{self.path}: a torch file inside a tensor storage; refused, nothing was executed"
            )
        return self.storages(("nested", bytes(data)))

    def scalar(self, type_: Any, raw: Any = b"\0") -> Any:
        """A NumPy scalar: a number or a string."""
        record = ArrayRecord()
        record.shape, record.type, record.raw = (), type_, raw
        value = record.value(self.budget)
        return value.item() if isinstance(value, Tensor) else value

    def persistent_load(self, pid: Any) -> Any:
        if self.storages is None:
            raise UnsafeCheckpointError(
                f"{self.path}: refers to objects outside the file; refused, nothing was executed"
            )
        return self.storages(pid)

    def call(self, maker: Any, arguments: Any, keywords: Mapping[str, Any] | None = None) -> Any:
        if not isinstance(maker, _Maker) or not isinstance(arguments, tuple):
            raise UnsafeCheckpointError(
                f"{self.path}: calls a {type(maker).__name__}, which no checkpoint does; refused, nothing was executed"
            )
        for argument in arguments:  # which most functions copy
            if isinstance(argument, list | tuple | dict | set | frozenset | str | bytes | bytearray):
                self.budget.spend_nodes(len(argument))
        return maker.function(*arguments, **(keywords or {}))

    def plain(self, value: Any, kinds: tuple[type, ...]) -> Any:
        """`value` if it is exactly of one of these types."""
        if type(value) not in kinds:
            raise UnsafeCheckpointError(
                f"{self.path}: modifies a {type(value).__name__} as if it were a {kinds[0].__name__}, which no "
                "checkpoint does; refused, nothing was executed"
            )
        return value

    def key(self, value: Any) -> Any:
        # Only flat keys, because hashing deeply nested tuples takes exponential time.
        parts = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple):
            self.budget.spend_nodes(len(value))  # hashed again at every use
        if not all(map(_is_key, parts)):
            raise UnsafeCheckpointError(
                f"{self.path}: a {type(value).__name__} as key of a dict or element of a set; refused, nothing was "
                "executed"
            )
        return value

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments, self.plain(keywords, (dict,)))

    def load_obj(self) -> None:
        maker, *arguments = self.pop_mark()
        self.append(self.call(maker, tuple(arguments)))

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self.call(self.find_class(module, name), tuple(self.pop_mark())))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, TypeRecord | ArrayRecord | Plain):
            for part in state if isinstance(state, tuple) else (state,):
                self.budget.spend_nodes(len(part) if isinstance(part, dict) else 1)
            target.build(state)
        elif not isinstance(target, dict | TensorRecord):  # attributes of an OrderedDict or a tensor are not weights
            self.plain(target, (dict,))

    def load_append(self) -> None:
        value = self.stack.pop()
        self.plain(self.stack[-1], (list,)).append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self.plain(self.stack[-1], (list,)).extend(values)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.plain(self.stack[-1], (dict, Plain))[self.key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.plain(self.stack[-1], (dict, Plain)).update(
            (self.key(k), v) for k, v in zip(items[::2], items[1::2], strict=True)
        )

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({self.key(k): v for k, v in zip(items[::2], items[1::2], strict=True)})

    def load_additems(self) -> None:
        values = self.pop_mark()
        self.plain(self.stack[-1], (set,)).update(map(self.key, values))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(self.key, self.pop_mark())))

    def load_bytearray8(self) -> None:
        count = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(count)))

    def load_extension(self) -> None:
        raise UnsafeCheckpointError(f"{self.path}: uses pickle's extension registry; refused, nothing was executed")

    def load_buffer(self) -> None:
        raise CheckpointError(f"{self.path}: the arrays are stored outside the file; save it as one file")

    for _opcode, _function in {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_newobj,
        pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.OBJ: load_obj,
        pickle.INST: load_inst,
        pickle.BUILD: load_build,
        pickle.APPEND: load_append,
        pickle.APPENDS: load_appends,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.DICT: load_dict,
        pickle.ADDITEMS: load_additems,
        pickle.FROZENSET: load_frozenset,
        pickle.BYTEARRAY8: load_bytearray8,
        pickle.EXT1: load_extension,
        pickle.EXT2: load_extension,
        pickle.EXT4: load_extension,
        pickle.NEXT_BUFFER: load_buffer,
    }.items():
        dispatch[_opcode[0]] = _function


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names

# ---- supported names ------------------------------------------------------------------------------------------------

_SCALARS = (str, bytes, int, float, bool, type(None))


def _is_key(value: Any) -> bool:
    """Whether a value is a key that dicts find in constant time."""
    return isinstance(value, _SCALARS) and not (isinstance(value, int) and abs(value) >= _LARGEST_KEY)


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}


@dataclass(frozen=True)
class StorageKind:
    """The type of a storage in a persistent id.

    Attributes:
        dtype: Type of its elements; None for bytes.
    """

    dtype: torch.dtype | None


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, dtype: torch.dtype | None = None) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor without a storage")
    if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise ValueError("a tensor without size and stride")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor with an invalid type")
    return TensorRecord(storage, offset, tuple(size), tuple(stride), dtype)


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if not isinstance(function, _Maker) or not function.name.startswith("torch._utils._rebuild"):
        raise ValueError("a tensor that is not rebuilt by a function of torch")
    return function.function(*arguments)


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    items = next((a for a in arguments if isinstance(a, list | tuple | dict)), ())
    pairs = items.items() if isinstance(items, dict) else items
    return {k: v for k, v in pairs if _is_key(k)}


def _members(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda items=(): kind(v for v in items if _is_key(v))


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise ValueError("a list made from something else than a list")
    return list(items)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding.replace("-", "") not in ("latin1", "utf8", "ascii"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def _bytes(*arguments: Any) -> bytes:
    if arguments and not isinstance(arguments[0], bytes | bytearray | str):
        raise ValueError("bytes made from something else than bytes")
    return bytes(arguments[0], "latin-1") if arguments and isinstance(arguments[0], str) else bytes(*arguments[:1])


def _array_from_buffer(raw: Any, type_: Any, shape: Any, order: Any = "C", *_: Any) -> ArrayRecord:
    record = ArrayRecord()
    record.shape, record.type, record.fortran, record.raw = shape, type_, order == "F", raw
    return record


def _plain(name: str) -> Callable[..., Plain]:
    def make(*arguments: Any, **keywords: Any) -> Plain:
        made = Plain(keywords)
        made.kind = name
        if arguments:
            made["arguments"] = list(arguments)
        return made

    return make


def _reconstruct_object(maker: Any, *_: Any) -> Any:
    if not isinstance(maker, _Maker):
        raise ValueError("an object without a class")
    return maker.function()


_VALUES: dict[str, Any] = {
    **{f"torch.{name}Storage": StorageKind(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": StorageKind(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.storage.{name}": StorageKind(None) for name in ("UntypedStorage", "_UntypedStorage")},
    "torch.UntypedStorage": StorageKind(None),
    **{
        str(dtype): dtype
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
        for dtype in [getattr(torch, name)]
    },
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "builtins.dict": _dictionary,
    "collections.deque": _sequence,
    "builtins.list": _sequence,
    "builtins.tuple": lambda items=(): tuple(_sequence(items)),
    "builtins.set": _members(set),
    "builtins.frozenset": _members(frozenset),
    "builtins.object": _plain("object"),
    "builtins.int": lambda value=0: value if isinstance(value, int) else 0,
    "builtins.float": lambda value=0.0: value if isinstance(value, float) else 0.0,
    "builtins.complex": lambda real=0.0, imag=0.0: [real, imag],
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda *arguments: bytearray(_bytes(*arguments)),
    "builtins.slice": lambda *arguments: list(arguments),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstruct_object,
    "copyreg.__newobj__": lambda maker, *arguments: _reconstruct_object(maker),
    "torch._utils._rebuild_tensor": lambda storage, offset, size, stride: _rebuild(storage, offset, size, stride),
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _rebuild(
        storage, offset, size, stride
    ),
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, _grad, _hooks, dtype, *_: _rebuild(
        storage, offset, size, stride, dtype
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data=None, *_: data,
    "torch.nn.parameter.Buffer": lambda data=None, *_: data,
    "torch.Tensor": lambda *arguments: None,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch.Size": lambda size=(): tuple(_sequence(size)),
    "torch.device": lambda *arguments: ":".join(str(a) for a in arguments if isinstance(a, str | int)),
    "torch.serialization._get_layout": lambda name: name if isinstance(name, str) else "",
    "numpy.core.multiarray._reconstruct": lambda *_: ArrayRecord(),
    "numpy.ndarray": lambda *_: ArrayRecord(),
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy.dtype": TypeRecord,
    **{
        f"numpy.{name}": lambda value=0, *_: value if isinstance(value, int | float) else 0
        for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool_", "bool")
    },
}

# Classes of objects that code bases store beside the weights (arguments, configuration, histories, dates). They are
# read as `Plain`, which has their attributes only.
_PLAIN = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|datetime\.(datetime|date|timedelta|timezone)|"
    r"pathlib\.(Pure)?(Posix|Windows)?Path|pathlib\._local\.(Pure)?(Posix|Windows)?Path|uuid\.UUID|collections\.Counter|"
    r"easydict\.EasyDict|addict\.(addict\.)?Dict|yacs\.config\.CfgNode|fvcore\.common\.config\.CfgNode|"
    r"detectron2\.config\.config\.CfgNode|mmcv\.utils\.config\.(ConfigDict|Config)|"
    r"mmengine\.config\.config\.(ConfigDict|Config)|mmengine\.logging\.history_buffer\.HistoryBuffer|"
    r"mmengine\.logging\.message_hub\.MessageHub|omegaconf\.[\w.]+|ml_collections\.[\w.]+|"
    r"(lightning\.pytorch|pytorch_lightning)\.utilities\.parsing\.AttributeDict|"
    r"(lightning\.pytorch|pytorch_lightning)\.callbacks\.[\w.]+|typing\.Any|torch\.torch_version\.TorchVersion"
)


def _words(error: BaseException) -> str:
    text = str(error).split("\n")[0].strip()
    return text[:120] if text else type(error).__name__


def byte_order_fits(little: bool) -> bool:
    """Whether this machine has the byte order of a file.

    Args:
        little: Whether the file is little-endian.
    """
    return little == (sys.byteorder == "little")
