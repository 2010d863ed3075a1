"""Pickles of weights, read without running anything in them.

A pickle is a small programme for a stack machine. Python's machine lets it import any name and call it; this one knows
a fixed list of names, and each stands for a function of ours that builds a tensor, an array or a plain container. No
object of the file's choosing is ever imported, called, or has an attribute set. Everything outside the list ends the
reading with an error that names it.

What comes out first are descriptions (`TensorRecord`, `ArrayRecord`); `settle` turns them into tensors after checking
that what they claim fits into the bytes that are there, so that a few bytes cannot ask for gigabytes.
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

EXPANDED = 1 << 24  # a tensor may repeat the elements of its storage (stride 0) up to so many; beyond, it is a bomb


def unpickle(
    file: io.BufferedIOBase, size: int, path: str, storages: Callable[[Any], StorageRecord] | None = None
) -> Any:
    """One pickle from `file`, of which `size` bytes are left; `storages` answers torch's persistent ids.

    The result holds records; pass it through `settle`. Python 2's byte strings are read as latin-1.
    """
    try:
        return _Machine(_Bounded(file, size, path), path, storages).load()
    except CheckpointError:
        raise
    except (pickle.UnpicklingError, EOFError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"{path}: its pickle is cut short or damaged ({_words(e)}); fetch the file again"
        ) from None
    except (MemoryError, RecursionError):
        raise CheckpointError(f"{path}: its pickle asks for more memory than any checkpoint needs; not read") from None


def settle(value: Any, path: str) -> Any:
    """Records inside plain containers -> tensors and arrays. Shared parts stay shared; no container is changed."""
    seen: dict[int, Any] = {}
    keep: list[Any] = []  # ids stay valid only while their objects live

    def visit(item: Any, depth: int) -> Any:
        if isinstance(item, TensorRecord | ArrayRecord | dict | list | tuple):
            if id(item) in seen:
                return seen[id(item)]
            if depth > 64:
                raise CheckpointError(f"{path}: its containers are nested more than 64 deep; this is no checkpoint")
            keep.append(item)
        if isinstance(item, TensorRecord):
            result: Any = item.tensor(path)
        elif isinstance(item, ArrayRecord):
            result = item.value(path)
        elif isinstance(item, dict):
            result = seen[id(item)] = {}  # entered before its contents: a container may hold itself
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
    """A run of elements that tensors are views of; `read` gives its bytes and is called at most once."""

    name: str
    dtype: torch.dtype | None  # None: bytes, typed by the tensor
    count: int
    read: Callable[[], bytearray]
    shift: int = 0  # elements into the storage at which this view of it begins
    _bytes: bytearray | None = None

    def typed(self, dtype: torch.dtype | None, path: str) -> Tensor:
        """All elements, one-dimensional, sharing memory with every other tensor of this storage."""
        dtype = dtype or self.dtype or torch.uint8
        if self._bytes is None:
            self._bytes = self.read()
        claimed = self.count * (self.dtype or torch.uint8).itemsize
        if claimed > len(self._bytes):
            raise CheckpointError(
                f"{path}: storage {self.name!r} claims {claimed} bytes, the file holds {len(self._bytes)} for it; "
                "it is cut short or damaged, fetch it again"
            )
        if len(self._bytes) < dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=len(self._bytes) // dtype.itemsize)


@dataclass(eq=False)
class TensorRecord:
    """A tensor as torch pickles it: a strided view of a storage."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None

    def tensor(self, path: str) -> Tensor:
        whole = (self.offset, *self.size, *self.stride)
        if (
            len(self.size) != len(self.stride)
            or len(self.size) > 16
            or not all(isinstance(v, int) and 0 <= v < 1 << 48 for v in whole)
        ):
            raise CheckpointError(
                f"{path}: a tensor whose size or stride cannot be; the file is damaged, fetch it again"
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
                f"{len(elements)} elements; the file is damaged"
            )
        view = elements.as_strided(self.size, self.stride, offset)
        # A small piece must not hold a large storage alive, and every later step may rely on plain order.
        return view.clone(memory_format=torch.contiguous_format) if count < len(elements) else view.contiguous()


class TypeRecord:
    """A numpy dtype: its letters, and the byte order that its state names."""

    def __init__(self, letters: Any, *_: Any):
        self.letters = letters if isinstance(letters, str) else "O"

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else ""
        if isinstance(order, str) and order in ("<", ">", "=", "|"):
            self.letters = order + self.letters.lstrip("<>=|")

    def dtype(self, path: str) -> np.dtype:
        if not re.fullmatch(r"[<>=|]?([biufcSU]\d{1,9}|\?)", self.letters):
            raise UnsafeCheckpointError(
                f"{path}: it holds an array of {self.letters!r}, which may carry objects of any kind; only numbers and "
                "text are read, nothing was executed"
            )
        try:
            return np.dtype(self.letters)
        except TypeError:
            raise CheckpointError(
                f"{path}: an array of type {self.letters!r}, which does not exist; the file is damaged, fetch it again"
            ) from None

    def __str__(self) -> str:
        return self.letters


class ArrayRecord:
    """A numpy array: shape, dtype and bytes, as its state names them."""

    shape: Any = ()
    type: Any = None
    raw: Any = b""
    fortran = False

    def build(self, state: Any) -> None:
        self.shape, self.type, self.fortran, self.raw = state[-4:]

    def value(self, path: str) -> Any:
        """A tensor if it holds numbers, else nested lists of text."""
        if not isinstance(self.type, TypeRecord):
            raise CheckpointError(f"{path}: an array without a type; the file is damaged, fetch it again")
        dtype = self.type.dtype(path)
        raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        shape = self.shape if isinstance(self.shape, tuple) else (self.shape,)
        if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in shape) or len(shape) > 16:
            raise CheckpointError(f"{path}: an array whose shape cannot be; the file is damaged, fetch it again")
        if not isinstance(raw, bytes | bytearray) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: an array of shape {shape} and type {dtype} claims {math.prod(shape) * dtype.itemsize} bytes, "
                f"{len(raw) if isinstance(raw, bytes | bytearray) else 'no'} are there; fetch the file again"
            )
        array = np.frombuffer(raw, dtype) if dtype.itemsize and len(raw) else np.empty(0, dtype)
        array = array.reshape(shape, order="F" if self.fortran else "C")
        if dtype.kind in "SU":
            return array.tolist()
        # A copy in the machine's own byte order, writable, which torch asks for.
        return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C", copy=True))


class Plain(dict):
    """An object of a known harmless kind, as its attributes alone; `kind` is what the file called it."""

    kind = ""

    def build(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)


class _Maker:
    """What stands on the stack for a name the file asked for: it can be called, and nothing else."""

    __slots__ = ("function", "name")

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function

    def __str__(self) -> str:
        return self.name


class _Bounded:
    """A file that gives no more than is left of it, however much is asked: lengths in a pickle are only claims."""

    def __init__(self, file: io.BufferedIOBase, size: int, path: str):
        self.file, self.left, self.path = file, size, path

    def read(self, count: int) -> bytes:
        if count > self.left or count < 0:
            raise CheckpointError(
                f"{self.path}: it claims {count} bytes where {self.left} are left; "
                "it is cut short or damaged, fetch it again"
            )
        data = self.file.read(count)
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data


_BASE: Any = pickle._Unpickler  # the one in Python: the one in C has no opcodes to replace


class _Machine(_BASE):
    """Python's own reading of opcodes, with every one that could reach an object of the file's choosing replaced."""

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
            f"{self.path}: it wants {module}.{name}, which is neither a tensor nor a plain container; it was refused "
            "and nothing was executed. If you trust its author, ask for the weights alone, as a state dict"
        )

    def nested(self, data: Any) -> StorageRecord:
        """A storage that was pickled as a torch file inside this one; `unpickle` is told how to read these."""
        if self.storages is None or not isinstance(data, bytes | bytearray):
            raise UnsafeCheckpointError(
                f"{self.path}: a torch file inside a tensor storage; it was refused, not executed"
            )
        return self.storages(("nested", bytes(data)))

    def persistent_load(self, pid: Any) -> Any:
        if self.storages is None:
            raise UnsafeCheckpointError(f"{self.path}: it refers to things outside itself; refused")
        return self.storages(pid)

    def call(self, maker: Any, arguments: Any, keywords: Mapping[str, Any] | None = None) -> Any:
        if not isinstance(maker, _Maker) or not isinstance(arguments, tuple):
            raise UnsafeCheckpointError(
                f"{self.path}: it calls a {type(maker).__name__}, which no checkpoint does; "
                "refused, nothing was executed"
            )
        return maker.function(*arguments, **(keywords or {}))

    def plain(self, value: Any, kinds: tuple[type, ...]) -> Any:
        if type(value) not in kinds:
            raise UnsafeCheckpointError(
                f"{self.path}: it fills a {type(value).__name__} as if it were a {kinds[0].__name__}, which no "
                "checkpoint does; refused, nothing was executed"
            )
        return value

    def key(self, value: Any) -> Any:
        # Only flat keys: hashing a tuple of tuples of tuples takes for ever.
        flat = all(isinstance(v, _SCALARS) for v in value) if isinstance(value, tuple) else isinstance(value, _SCALARS)
        if not flat:
            raise UnsafeCheckpointError(f"{self.path}: a {type(value).__name__} as a key or member of a set; refused")
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
        elif not isinstance(target, dict | TensorRecord):  # an OrderedDict's or tensor's attributes are not weights
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
        raise UnsafeCheckpointError(f"{self.path}: it uses pickle's extension registry; refused, nothing was executed")

    def load_buffer(self) -> None:
        raise CheckpointError(f"{self.path}: its arrays lie in another file that is not there; save it as one file")

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

# ---- what a file may ask for ----------------------------------------------------------------------------------------

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
    """The type of a storage, as a persistent id names it."""

    dtype: torch.dtype | None


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, dtype: torch.dtype | None = None) -> TensorRecord:
    if not isinstance(storage, StorageRecord):
        raise ValueError("a tensor without a storage")
    return TensorRecord(storage, offset, tuple(size), tuple(stride), dtype)


def _rebuild_from_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if not isinstance(function, _Maker) or not function.name.startswith("torch._utils._rebuild"):
        raise ValueError("a tensor that is not rebuilt by torch")
    return function.function(*arguments)


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    items = next((a for a in arguments if isinstance(a, list | tuple | dict)), ())
    pairs = items.items() if isinstance(items, dict) else items
    return {k: v for k, v in pairs if isinstance(k, _SCALARS)}


def _members(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda items=(): kind(v for v in items if isinstance(v, _SCALARS))


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise ValueError("a list of something that is no list")
    return list(items)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding.replace("-", "") not in ("latin1", "utf8", "ascii"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def _bytes(*arguments: Any) -> bytes:
    if arguments and not isinstance(arguments[0], bytes | bytearray | str):
        raise ValueError("bytes of something that is no bytes")
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

# Kinds of object that code bases of the field put beside the weights (arguments, configuration, histories, dates).
# They become `Plain`: their attributes, none of their code.
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
    """Whether raw storages of this byte order can be used as they are on this machine."""
    return little == (sys.byteorder == "little")


def from_bytes(data: bytes, path: str) -> Any:
    """A pickle that lies in memory: see `unpickle`."""
    return unpickle(io.BytesIO(data), len(data), path)
