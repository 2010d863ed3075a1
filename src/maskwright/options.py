"""Typed options: values checked against annotations, and groups of options that are passed as one.

The keyword arguments of a system's constructor are its configuration. Options that recur in many systems form a group,
a frozen dataclass derived from `OptionGroup`, that is accepted in three forms:

    create("solo", backbone="resnet18")                              # a bare string: the group's first field
    create("solo", backbone={"name": "resnet18", "norm": "frozen"})  # a mapping: these fields; others keep the default
    create("solo", backbone=Backbone("resnet18", norm="frozen"))     # a value: every field

Checkpoints and recipes hold the mapping, as JSON; on the command line a field is written `backbone.norm=frozen`.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from maskwright.errors import UsageError

LARGEST_OPTION = 1 << 20  # the largest published integer is 12544; a network cannot be built with far larger ones
UNBOUNDED = ("long", "ranges")  # bounds in pixels, for which a huge number means that there is none

# Endings of names of options that count something a network cannot lack. Others may be 0.
_POSITIVE = (
    "width", "channels", "hidden", "heads", "queries", "points", "side", "sides", "grids", "rays", "prototypes",
    "coefficients", "bases", "kernel_size", "stride", "window", "windows", "groups", "levels", "octaves", "parts",
    "patch", "multiple", "depth", "depths", "most_contours", "anchor_sizes", "canvas", "deform_every",
)  # fmt: skip
_MAY_BE_ZERO = ("many_queries", "simulation.points")


@dataclass(frozen=True)
class OptionGroup:
    """Base class of option groups. Subclasses are frozen dataclasses whose fields have defaults and JSON values.

    Lists are stored as tuples. Values are checked against the annotations of the fields when a group is constructed.

    Attributes:
        label: The name of the group in error messages.
        shorthand: The field that a bare string sets; None if a string is not accepted.
    """

    label: ClassVar[str] = "options"
    shorthand: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, _frozen(value))
            check_option(f"{self.label}.{field.name}", value, hints[field.name])

    @classmethod
    def read(cls, value: Any, default: Self | None = None) -> Self:
        """Converts a string, a mapping or a group to a group.

        Args:
            value: What the caller passed. A string sets the field `shorthand`, a mapping sets the fields it names.
            default: The group whose fields apply where `value` does not set them; default `cls()`.

        Returns:
            The group.

        Raises:
            UsageError: If a field does not exist or its value has the wrong type.
        """
        base = cls() if default is None else default
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and cls.shorthand is not None:
            value = {cls.shorthand: value}
        if not isinstance(value, Mapping):
            short = f"a {cls.shorthand}, " if cls.shorthand else ""
            raise UsageError(f"{cls.label} must be {short}a mapping or a {cls.__name__}, got {value!r}")
        known = [field.name for field in fields(cls)]
        given = cast(Mapping[str, Any], value)
        for name in given:
            if name not in known:
                raise UsageError(
                    f"{cls.label} has no option {name!r}{_suggestion(name, known)}; its options are {', '.join(known)}"
                )
        return base.changed(given)

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Returns a copy in which the fields named by `values` are replaced; UsageError for one of the wrong type."""
        hints = _hints(type(self))
        for name, value in values.items():
            check_option(f"{self.label}.{name}", value, hints[name])
        return replace(self, **{name: _frozen(value) for name, value in values.items()})

    def check_at_least(self, least: float, *names: str) -> None:
        """Raises a UsageError for the first of these fields that is less than `least`, or not finite."""
        for name in names:
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise UsageError(f"{self.label}.{name} must be at least {least}, got {value}")

    @classmethod
    def merged(cls, before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merges two mappings of fields, of which `changes` takes precedence."""
        return {**before, **changes}

    def to_options(self) -> dict[str, Any]:
        """Returns the fields as JSON values: what a checkpoint stores."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}


_Group = TypeVar("_Group", bound=OptionGroup)


# ---- options of a callable -------------------------------------------------------------------------------------------


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a function or constructor, without `self`."""
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


def groups_of(function: Callable[..., Any]) -> dict[str, type[OptionGroup]]:
    """The parameters that take an option group, with the class of the group."""
    return {name: kind for name, hint in _hints(function).items() if (kind := _group_in(hint)) is not None}


def resolve(function: Callable[..., Any], given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Checks arguments against the annotations of `function` and returns all options as JSON values.

    Args:
        function: A constructor with typed parameters.
        given: Arguments by name. Missing ones take their default.
        owner: Name for error messages.

    Returns:
        Every parameter with its value; groups as mappings.

    Raises:
        UsageError: If an option does not exist or has an invalid value.
    """
    parameters, hints, groups = parameters_of(function), _hints(function), groups_of(function)
    options: dict[str, Any] = {}
    for name in given:
        if name not in parameters:
            raise UsageError(
                f"{owner} has no option {name!r}{_suggestion(name, list(parameters))}; its options are "
                f"{', '.join(parameters)}"
            )
    for name, parameter in parameters.items():
        value = given.get(name, parameter.default)
        if name in groups and not (value is None and _fits(None, hints[name])):
            if isinstance(value, bool) and _fits(value, hints[name]):
                options[name] = value
                continue
            try:
                options[name] = read_group(groups[name], value, parameter.default).to_options()
                for field, own in options[name].items():
                    check_range(f"{name}.{field}", own)
            except UsageError as error:
                raise UsageError(f"{owner}: {error}") from None
            continue
        options[name] = plain(value)
        if name in hints:
            try:
                check_option(name, options[name], hints[name])
                check_range(name, options[name])
            except UsageError as error:
                raise UsageError(f"{owner}: {error}") from None
    return options


def read_group(kind: type[_Group], value: Any, default: Any) -> _Group:
    """`kind.read(value, default)` for a default in any of the accepted forms, None and False included."""
    if default is inspect.Parameter.empty or default is None or isinstance(default, bool):
        default = None
    else:
        default = kind.read(default)
    return kind.read(value, default)


def merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], groups: Mapping[str, type[OptionGroup]]
) -> dict[str, Any]:
    """Options in which `changes` replace those of `base`; groups are merged field by field.

    Args:
        base: Options, for example those of a preset.
        changes: Options that take precedence. A group given as a value replaces the whole group.
        groups: The options that are groups, see `groups_of`.
    """
    result = dict(base)
    for name, value in changes.items():
        kind, before = groups.get(name), result.get(name)
        if kind is not None and isinstance(value, str) and kind.shorthand is not None:
            value = {kind.shorthand: value}
        if kind is not None and isinstance(before, str) and kind.shorthand is not None:
            before = {kind.shorthand: before}
        if isinstance(before, OptionGroup) and isinstance(value, Mapping):
            value = type(before).merged(before.to_options(), cast(Mapping[str, Any], value))
        elif kind is not None and isinstance(value, Mapping) and isinstance(before, Mapping):
            value = kind.merged(cast(Mapping[str, Any], before), cast(Mapping[str, Any], value))
        result[name] = value
    return result


def nested(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Converts assignments of the command line to options.

    `backbone.norm` = "frozen" becomes {"backbone": {"norm": "frozen"}}; a bare `backbone` = "resnet18" beside it sets
    the field "name" of the same group.

    Raises:
        UsageError: If a name is used both for a value and for a group.
    """
    options: dict[str, Any] = {}
    for key, value in pairs:
        head, _, rest = key.partition(".")
        before = options.get(head)
        if not rest:
            if isinstance(before, dict):
                added = cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {"name": value}
                value = {**cast(dict[str, Any], before), **added}
            options[head] = value
            continue
        if before is None:
            before = {}
        elif isinstance(before, str):
            before = {"name": before}
        elif not isinstance(before, dict):
            raise UsageError(f"{head} is given as {before!r} and as a group ({key}); use one form")
        if "." in rest:
            raise UsageError(f"{key}: options are nested by one dot at most")
        options[head] = {**before, rest: value}
    return options


# ---- checking --------------------------------------------------------------------------------------------------------


def check_option(name: str, value: Any, hint: Any) -> None:
    """Raises a UsageError if `value` does not fit the annotation `hint`.

    An integer is accepted as a number; a bool is neither.
    """
    if _fits(value, hint):
        return
    words = _words(hint) if isinstance(value, str) else []
    raise UsageError(f"{name} must be {describe(hint)}, got {value!r}{_suggestion(value, words)}")


def check_range(name: str, value: Any) -> None:
    """Raises a UsageError for an integer that no network can be built with: negative, far too large, or 0 as a width.

    Args:
        name: Name of the option, with a dot between a group and its field.
        value: Its value; lists are checked entry by entry, and what is no integer is ignored.
    """
    if isinstance(value, Mapping):
        for key, own in cast(Mapping[str, Any], value).items():
            check_range(f"{name}.{key}", own)
    elif isinstance(value, (list, tuple)):
        for own in cast(Sequence[Any], value):
            check_range(name, own)
    elif isinstance(value, int) and not isinstance(value, bool):
        field = name.rpartition(".")[2]
        least = int(field.endswith(_POSITIVE) and not {field, name} & {*_MAY_BE_ZERO})
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
        if value > LARGEST_OPTION and field not in UNBOUNDED:
            raise UsageError(f"{name} must be at most {LARGEST_OPTION}, got {str(value)[:30]}")


def describe(hint: Any) -> str:
    """An annotation in plain English, for error messages: "an integer", "one of 'a', 'b'", "a list of numbers"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in parts))
    if origin is Literal:
        words = ", ".join(repr(word) for word in parts)
        return f"one of {words}" if len(parts) > 1 else words
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {_plural(parts[0])}"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    return "None" if hint in (None, type(None)) else names.get(hint, f"a {getattr(hint, '__name__', hint)}")


def plain(value: Any) -> Any:
    """Converts tuples to lists and option groups to mappings, recursively: what JSON gives back."""
    if isinstance(value, OptionGroup):
        return value.to_options()
    if isinstance(value, Mapping):
        return {key: plain(own) for key, own in cast(Mapping[Any, Any], value).items()}
    return [plain(v) for v in cast(Sequence[Any], value)] if isinstance(value, (tuple, list)) else value


@cache
def _hints(target: Any) -> dict[str, Any]:
    hints = get_type_hints(target)
    return {name: hint for name, hint in hints.items() if name != "return" and get_origin(hint) is not ClassVar}


def _group_in(hint: Any) -> type[OptionGroup] | None:
    if isinstance(hint, type) and issubclass(hint, OptionGroup):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        return next((kind for part in get_args(hint) if (kind := _group_in(part)) is not None), None)
    return None


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value == word and isinstance(value, bool) == isinstance(word, bool) for word in get_args(hint))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(v, get_args(hint)[0]) for v in cast(Sequence[Any], value))
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


def _suggestion(word: Any, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, 1) if isinstance(word, str) and known else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _plural(hint: Any) -> str:
    names = {int: "integers", float: "numbers", bool: "booleans", str: "strings"}
    if hint in names:
        return names[hint]
    inner = get_args(hint)
    return f"lists of {_plural(inner[0])}" if inner else "values"


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in cast(Sequence[Any], value)) if isinstance(value, (list, tuple)) else value
