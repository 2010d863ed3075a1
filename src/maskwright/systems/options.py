"""Options of a system against the annotations of its constructor: one check for all systems, in words of a person."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from maskwright.errors import UsageError


def check_options(kind: type, options: Mapping[str, Any]) -> None:
    """UsageError for the first option that is of another kind than the constructor of `kind` says, or a word that it
    does not know. Options are JSON values; a whole number is a number too, a flag is none."""
    hints = _hints(kind)
    for name, value in options.items():
        if name in hints and not _fits(value, hints[name]):
            words = _words(hints[name]) if isinstance(value, str) else []
            near = get_close_matches(value, words, 1) if words else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{kind.name}: {name} is {_told(hints[name])}, not {value!r}{hint}")  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind.__init__)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == word and isinstance(value, bool) == isinstance(word, bool) for word in get_args(hint))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> list[str]:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return [word for word in parts if isinstance(word, str)]
    return [word for part in parts for word in _words(part)] if get_origin(hint) in (Union, types.UnionType) else []


def _told(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_told(part) for part in parts)
    if origin is Literal:
        return " or ".join(repr(word) for word in parts)
    if origin is not None and issubclass(origin, Mapping):
        return "a table of options"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {_several(parts[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return "none" if hint in (None, type(None)) else names.get(hint, str(hint))


def _several(hint: Any) -> str:
    names = {int: "whole numbers", float: "numbers", bool: "flags", str: "words"}
    return names.get(hint) or f"lists of {_several(get_args(hint)[0])}"
