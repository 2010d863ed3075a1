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
import math
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import CheckpointError, UnsafeCheckpointError

EXPANDED = 1 << 24  # maximum number of elements of a tensor that repeats those of its storage (stride 0)


def unpickle(
    file: io.BufferedIOBase, size: int, path: str, storages: Callable[[Any], StorageRecord] | None = None
) -> Any:
    """Read one pickle.

    Args:
        file: A binary file.
        size: Number of bytes left in the file.
        path: The file, for messages.
        storages: Function from torch's persistent ids to storages; None if there must be none.

    Returns:
        Containers with records, to be passed to `settle`. Byte strings of Python 2 are decoded as latin-1.

    Raises:
        UnsafeCheckpointError: If the pickle uses a name that is not in the list.
        CheckpointError: If the pickle is damaged.
    """
    try:
        return _Machine(_Bounded(file, size, path), path, storages).load()
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, EOFError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"{path}: the pickle is truncated or damaged ({_words(e)}); download the file again"
        ) from None
    except (MemoryError, RecursionError):
        raise CheckpointError(f"{path}: the pickle needs more memory than a checkpoint should; not read") from None


def settle(value: Any, path: str) -> Any:
    """Convert the records inside plain containers to tensors and arrays.

    Args:
        value: What `unpickle` returned; not modified.
        path: The file, for messages.

    Returns:
        The same containers with tensors. Objects that occur several times are converted once.

    Raises:
        UnsafeCheckpointError: If an array holds objects other than numbers and strings.
        CheckpointError: If a record does not match the available bytes.
    """
    seen: dict[int, Any] = {}
    keep: list[Any] = []  # keeps the objects alive, whose ids are the keys of `seen`

    def visit(item: Any, depth: int) -> Any:
        if isinstance(item, TensorRecord | ArrayRecord | dict | list | tuple):
            if id(item) in seen:
                return seen[id(item)]
            if depth > 64:
                raise CheckpointError(f"{path}: containers nested more than 64 deep; this is not a checkpoint")
            keep.append(item)
        if isinstance(item, TensorRecord):
            result: Any = item.tensor(path)
        elif isinstance(item, ArrayRecord):
            result = item.value(path)
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
                f"{path}: storage {self.name!r} claims {claimed} bytes, but the file has {len(self._bytes)} for it; "
                "it is truncated or damaged, download it again"
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

    def tensor(self, path: str) -> Tensor:
        """The tensor; CheckpointError if it does not fit into its storage."""
        whole = (self.offset, *self.size, *self.stride)
        if (
            len(self.size) != len(self.stride)
            or len(self.size) > 16
            or not all(isinstance(v, int) and 0 <= v < 1 << 48 for v in whole)
        ):
            raise CheckpointError(
                f"{path}: a tensor with an invalid size or stride; the file is damaged, download it again"
            )
        elements = self.storage.typed(self.dtype, path)
        count = math.prod(self.size)
        offset = self.offset + self.storage.shift
        if not count:
            return torch.empty(self.size, dtype=elements.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if last >= len(elements) or (count > len(elements) and count > EXPANDED):
            raise CheckpointError(
                f"{path}: a tensor of size {self.size} does not fit into its storage {self.storage.name!r} of "
                f"{len(elements)} elements; the file is damaged, download it again"
            )
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
                f"{path}: an array of type {self.letters!r} may contain objects of any class; only numbers and strings "
                "are supported, nothing was executed"
            )
        try:
            return np.dtype(self.letters)
        except TypeError:
            raise CheckpointError(
                f"{path}: invalid array type {self.letters!r}; the file is damaged, download it again"
            ) from None

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
        self.shape, self.type, self.fortran, self.raw = state[-4:]

    def value(self, path: str) -> Any:
        """A tensor for an array of numbers, nested lists for one of strings."""
        if not isinstance(self.type, TypeRecord):
            raise CheckpointError(f"{path}: an array without a type; the file is damaged, download it again")
        dtype = self.type.dtype(path)
        raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in shape) or len(shape) > 16:
            raise CheckpointError(f"{path}: an array with an invalid shape; the file is damaged, download it again")
        if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: an array of shape {shape} and type {dtype} needs {math.prod(shape) * dtype.itemsize} bytes, "
                f"the file has {len(raw) if isinstance(raw, bytes | bytearray) else 'none'}; download it again"
            )
        array = np.frombuffer(raw, dtype) if dtype.itemsize and len(raw) else np.empty(0, dtype)
        array = array.reshape(shape, order="F" if self.fortran else "C")
        if dtype.kind in "SU":
            return array.tolist()
        # torch needs a writable array in native byte order.
        return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C", copy=True))


class Plain(dict):
    """The attributes of an object of a class that is known to be harmless.

    Attributes:
        kind: Name of the class in the file.
    """

    kind = ""

    def build(self, state: Any) -> None:
        """Apply the pickled state."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


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

    def __init__(self, file: _Bounded, path: str, storages: Callable[[Any], StorageRecord] | None):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        module = re.sub(r"^numpy\._core\b", "numpy.core", module)
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in _VALUES:
            return _VALUES[full]
        if full in _FUNCTIONS:
            return _Maker(full, _FUNCTIONS[full])
        if full == "torch.storage._load_from_bytes":
            return _Maker(full, self.nested)
        if _PLAIN.fullmatch(full):
            return _Maker(full, _plain(full))
        raise UnsafeCheckpointError(
            f"{self.path}: needs {module}.{name}, which is neither a tensor nor a plain container; refused, nothing "
            "was executed. Ask the author for a state dict"
        )

    def nested(self, data: Any) -> StorageRecord:
        """A storage that was pickled as a nested torch file; read by `storages`."""
        if self.storages is None or not isinstance(data, bytes | bytearray):
            raise UnsafeCheckpointError(
                f"{self.path}: a torch file inside a tensor storage; refused, nothing was executed"
            )
        return self.storages(("nested", bytes(data)))

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
        flat = all(isinstance(v, _SCALARS) for v in value) if isinstance(value, tuple) else isinstance(value, _SCALARS)
        if not flat:
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
    return TensorRecord(storage, offset, tuple(size), tuple(stride), dtype)


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if not isinstance(function, _Maker) or not function.name.startswith("torch._utils._rebuild"):
        raise ValueError("a tensor that is not rebuilt by a function of torch")
    return function.function(*arguments)


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    items = next((a for a in arguments if isinstance(a, list | tuple | dict)), ())
    pairs = items.items() if isinstance(items, dict) else items
    return {k: v for k, v in pairs if isinstance(k, _SCALARS)}


def _members(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda items=(): kind(v for v in items if isinstance(v, _SCALARS))


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


def _scalar(type_: Any, raw: Any = b"\0") -> Any:
    record = ArrayRecord()
    record.shape, record.type, record.raw = (), type_, raw
    value = record.value("a scalar")
    return value.item() if isinstance(value, Tensor) else value


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
    "numpy.core.multiarray.scalar": _scalar,
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


def from_bytes(data: bytes, path: str) -> Any:
    """Read a pickle in memory; see `unpickle`."""
    return unpickle(io.BytesIO(data), len(data), path)
