"""Types of arguments that several commands have, and the reading of their values."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from maskwright.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Tracker = Literal["iou", "bytetrack", "sort", "ocsort"]
KeyValues = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]
Output = Annotated[Path, arg(aliases=("-o",), metavar="PATH")]
Weights = Annotated[str | None, arg(aliases=("-w",), metavar="FILE|NAME")]
Directory = Annotated[str | None, arg(metavar="DIR")]
Name = Annotated[str | None, arg(metavar="NAME")]
ClassNames = Annotated[str | None, arg(metavar="NAME,...")]
Integer = Annotated[int | None, arg(metavar="INT")]
Number = Annotated[float | None, arg(metavar="FLOAT")]


def value_of(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option on the command line, before the line is parsed."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def key_values(pairs: Sequence[str], own: Collection[str] = ()) -> dict[str, Any]:
    """KEY=VALUE pairs, with other keys than `own`; values are JSON if they parse as JSON, otherwise text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{pair!r} is not KEY=VALUE; write, for example, flip=0.5")
        if key in own:
            raise UsageError(f"{pair}: {key} is an option of the command itself, --{key.replace('_', '-')}")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value; for the others the system's default applies."""
    return {name: value for name, value in options.items() if value is not None}


def changed(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Of options given as pairs of value and default, the values that are not the default."""
    return {name: value for name, (value, usual) in options.items() if value != usual}


def options_as_words(names: Collection[str]) -> str:
    """Names of options as they are written on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def device_named(name: str) -> str | None:
    """The device; None, which selects one, for `auto`."""
    return None if name == "auto" else name
