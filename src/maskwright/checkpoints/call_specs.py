"""Calls of a network as data: which tensors go in and come out, and the structure around them.

An exported network has tensors as inputs and outputs. Our networks also take and return tuples, dataclasses, integers
that follow from sizes, and None. A `Spec` describes such a value without its tensors, as JSON, so that a file can hold
it: flattening a value gives tensors and a spec, and a spec with tensors gives the value again.

Specs, one-letter keys:

- `{"t": name, "dtype": "float32", "shape": [2, "rows", 14]}`: a tensor; a dimension is a number or a name.
- `{"d": name, "scale": [p, q]}`: an integer, the size of the dimension called `name` times p / q, rounded up.
- `{"i": value}`: a number, flag, text or None.
- `{"l": [...]}`, `{"u": [...]}`: a list, a tuple.
- `{"c": "maskwright.systems.yolact:Raw", "f": {...}}`: a dataclass or named tuple of this library, by fields.
"""

# Whether a class is a dataclass is not known statically.
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from maskwright.errors import CheckpointError

Spec = dict[str, Any]

_HOME = re.compile(r"maskwright\.(systems|blocks|ops|structures)(\.[a-z0-9_]+)*")
_CONSTANTS = (int, float, bool, str, type(None))
DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}
MOST_NODES = 10_000  # entries of one spec


def arguments_of(forward: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call in the order of the parameters, defaults included.

    Args:
        forward: The function of the class of a network, with `self`.
        args: Arguments by position, without `self`.
        keywords: Arguments by name.
    """
    bound = inspect.signature(forward).bind(None, *args, **keywords)
    bound.apply_defaults()
    return list(bound.arguments.values())[1:]


def describe(value: Any, prefix: str, tensors: list[Tensor]) -> Spec:
    """The spec of a value, with the sizes that its tensors have.

    Args:
        value: Tensors, constants, lists, tuples, dataclasses and named tuples of these.
        prefix: Beginning of the names of the tensors.
        tensors: The tensors are appended to this list, in the order of the spec.

    Raises:
        TypeError: If there is anything else in it.
    """
    if isinstance(value, Tensor):
        place = next((n for n, known in enumerate(tensors) if known is value), len(tensors))  # the same one twice
        name = f"{prefix}{place}"
        if place == len(tensors):
            tensors.append(value)
        return {"t": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": [int(n) for n in value.shape]}
    if isinstance(value, _CONSTANTS):
        return {"i": value}
    named: Any = value if isinstance(value, tuple) and hasattr(cast(Any, value), "_fields") else None
    if named is not None:
        own = {name: describe(getattr(named, name), prefix, tensors) for name in named._fields}
        return {"c": _name_of(type(named)), "f": own}
    if isinstance(value, list | tuple):
        entries = [describe(each, prefix, tensors) for each in cast(Sequence[Any], value)]
        return {"l" if isinstance(value, list) else "u": entries}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: describe(getattr(value, f.name), prefix, tensors) for f in fields(value) if f.init}
        return {"c": _name_of(type(value)), "f": own}
    raise TypeError(f"a network takes or returns a {type(value).__name__}, which cannot be exported")


def _name_of(kind: type) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not _HOME.fullmatch(kind.__module__):
        raise TypeError(f"a network takes or returns a {name}, which cannot be exported")
    return name


def signature(spec: Spec) -> Any:
    """What must be equal for two calls to be of the same form: everything but names and sizes of tensors."""
    if "t" in spec:
        return ("t", spec["dtype"], len(spec["shape"]))
    if "d" in spec:
        return ("d",)
    if "i" in spec:
        # Integers may follow from sizes; flags and texts select a form.
        return ("d",) if type(spec["i"]) is int else ("i", spec["i"])
    if "c" in spec:
        return ("c", spec["c"], tuple((name, signature(each)) for name, each in spec["f"].items()))
    kind = "l" if "l" in spec else "u"
    return (kind, tuple(signature(each) for each in spec[kind]))


def leaves(spec: Spec) -> list[Spec]:
    """The entries of a spec without parts, in order."""
    if "c" in spec:
        return [leaf for each in spec["f"].values() for leaf in leaves(each)]
    if "l" in spec or "u" in spec:
        return [leaf for each in spec.get("l", spec.get("u", [])) for leaf in leaves(each)]
    return [spec]


def tensors_of(spec: Spec) -> list[Spec]:
    """The different tensors of a spec, in order."""
    return list({leaf["t"]: leaf for leaf in leaves(spec) if "t" in leaf}.values())


def flatten(value: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Appends the different tensors of a value to a list, in the order of `describe`, and returns the list."""
    if isinstance(value, Tensor):
        if not any(known is value for known in tensors):
            tensors.append(value)
    elif isinstance(value, list | tuple):
        for each in cast(Sequence[Any], value):
            flatten(each, tensors)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.init:
                flatten(getattr(value, field.name), tensors)
    return tensors


def sizes_of(spec: Spec, tensors: Sequence[Tensor]) -> dict[str, int]:
    """The size of every named dimension of tensors, the first of each name."""
    found: dict[str, int] = {}
    for leaf, tensor in zip(tensors_of(spec), tensors, strict=True):
        for name, size in zip(leaf["shape"], tensor.shape, strict=True):
            if isinstance(name, str):
                found.setdefault(name, size)
    return found


def rebuild(spec: Spec, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
    """The value of a spec.

    Args:
        spec: The spec.
        tensors: Its tensors by name.
        sizes: The sizes of its named dimensions.
    """
    if "t" in spec:
        return tensors[spec["t"]]
    if "d" in spec:
        p, q = spec["scale"]
        return -(-sizes[spec["d"]] * p // q)
    if "i" in spec:
        return spec["i"]
    if "c" in spec:
        kind = _class_of(spec["c"])
        return kind(**{name: rebuild(each, tensors, sizes) for name, each in spec["f"].items()})
    if "l" in spec:
        return [rebuild(each, tensors, sizes) for each in spec["l"]]
    return tuple(rebuild(each, tensors, sizes) for each in spec["u"])


def _class_of(name: str) -> Callable[..., Any]:
    """The dataclass or named tuple of this library that a spec names.

    Raises:
        CheckpointError: If it is none; nothing else is ever imported or called.
    """
    module, _, attribute = name.partition(":")
    if _HOME.fullmatch(module) and attribute.isidentifier():
        try:
            kind = getattr(import_module(module), attribute, None)
        except ImportError:
            kind = None
        if isinstance(kind, type) and (is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))):
            return cast(Any, kind)
    raise CheckpointError(
        f"an exported network returns {name[:80]!r}, which this version does not have; export it again"
    )


def check(spec: Any, path: str) -> Spec:
    """A spec from a file, which is checked completely.

    Raises:
        CheckpointError: If it is no spec.
    """
    count = 0

    def visit(value: Any, depth: int) -> bool:
        nonlocal count
        count += 1
        if count > MOST_NODES or depth > 16 or not isinstance(value, dict):
            return False
        entry = cast(dict[str, Any], value)
        if "t" in entry:
            shape: Any = entry.get("shape")
            return (
                isinstance(entry["t"], str)
                and entry.get("dtype") in DTYPES
                and isinstance(shape, list)
                and len(cast(list[Any], shape)) <= 8
                and all(_is_size(size) for size in cast(list[Any], shape))
            )
        if "d" in entry:
            scale: Any = entry.get("scale")
            return (
                isinstance(entry["d"], str)
                and isinstance(scale, list)
                and len(cast(list[Any], scale)) == 2
                and all(type(n) is int and 0 < n < 1 << 16 for n in cast(list[Any], scale))
            )
        if "i" in entry:
            return isinstance(entry["i"], _CONSTANTS)
        if "c" in entry:
            own: Any = entry.get("f")
            if not isinstance(entry["c"], str) or not isinstance(own, dict):
                return False
            if not _fits(_class_of(entry["c"]), cast(dict[str, Any], own)):
                return False
            return all(visit(each, depth + 1) for each in cast(dict[str, Any], own).values())
        parts: Any = entry.get("l", entry.get("u"))
        return isinstance(parts, list) and all(visit(each, depth + 1) for each in cast(list[Any], parts))

    if not visit(spec, 0):
        raise CheckpointError(f"{path}: its description of the networks is invalid; export the system again")
    return cast(Spec, spec)


def _fits(kind: Any, values: Mapping[str, Any]) -> bool:
    """Whether a dataclass or named tuple can be made from values of these names."""
    if is_dataclass(kind):
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind) if f.init}
    else:
        known = {name: name not in kind._field_defaults for name in kind._fields}
    return set(values) <= set(known) and all(name in values for name, needed in known.items() if needed)


def check_sizes(inputs: Spec, output: Spec, path: str) -> None:
    """Checks that the integers of a call follow from dimensions of its arguments.

    Raises:
        CheckpointError: If one follows from a dimension that no argument has.
    """
    known = {size for leaf in tensors_of(inputs) for size in leaf["shape"] if isinstance(size, str)}
    if any("d" in leaf and leaf["d"] not in known for leaf in (*leaves(inputs), *leaves(output))):
        raise CheckpointError(f"{path}: its description of the networks is invalid; export the system again")


def _is_size(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and 0 <= value < 1 << 31)
