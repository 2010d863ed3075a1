"""Layouts of published checkpoints: one `Origin` each, as a table in `origins/SYSTEM.py`.

Modules of this package define `ORIGINS`, a list of `Origin`, or parts that several share. Modules are discovered; no
list has to be edited.

    ORIGINS = [
        Origin(
            name="detectron2",
            system="mask-rcnn",
            rename=(
                (r"^backbone\\.bottom_up\\.", "backbone."),
                (r"^backbone\\.fpn_lateral(\\d)\\.", lambda m: f"neck.lateral.{int(m[1]) - 2}."),
            ),
            recognise=options_of,
            ignore=(r"^proposal_generator\\.anchor_generator\\.", r"^pixel_(mean|std)$"),
        ),
    ]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from maskwright.checkpoints.names import named_by
from maskwright.errors import UnknownLayoutError

Shapes = Mapping[str, tuple[int, ...]]
State = dict[str, Tensor]
Replacement = str | Callable[[re.Match[str]], str]
Compiled = Sequence[tuple[re.Pattern[str], Replacement]]


@dataclass(frozen=True)
class Candidate:
    """A published variant that a file may hold.

    Attributes:
        variant: Name of the variant, as passed to `load`; "" if there is only one.
        options: Options of the system's constructor.
    """

    variant: str
    options: Mapping[str, Any]


def keep(state: State, options: Mapping[str, Any]) -> State:
    """Returns the state dict unchanged: the default of `Origin.finish`."""
    return state


def no_explanation(shapes: Shapes, about: Mapping[str, Any]) -> str:
    """Returns an empty string: the default of `Origin.explain`."""
    return ""


def compiled(rules: Sequence[tuple[str, Replacement]]) -> Compiled:
    """Compile the patterns of (pattern, replacement) pairs."""
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


def renamed(key: str, rules: Compiled) -> str:
    """Apply all rules to a key, each to the result of the previous one."""
    for pattern, replacement in rules:
        key = pattern.sub(replacement, key)
    return key


@dataclass(frozen=True)
class Origin:
    """The layout in which a code base stores the weights of a system.

    Attributes:
        name: The code base: "detectron2", "torchvision", "mmdet", "transformers", ...
        system: Name of the system in the registry.
        rename: (pattern of the file's keys, replacement) pairs. All of them are applied to each key in order, each by
            `re.sub` to the result of the previous one; a table therefore renames large parts first and common suffixes
            (numbers of norms and convolutions) once, at the end. A replacement may be a function of the match.
        recognise: Function of (shapes by key, what `read_state` returned about the file; its entry "tensors" has the
            tensors by key, for what shapes do not determine). It returns the options of the constructor, including
            "classes", if the keys and shapes are of this layout, and None otherwise; a list of `Candidate` if they
            match several published variants, of which `load` then requires `variant`.
        finish: Function of (state, options) that returns the state dict; applied after renaming, to permute, split or
            drop tensors. It must not modify its arguments.
        ignore: Patterns of the file's keys that are dropped before renaming.
        absent: Patterns of the system's keys that the file may lack; the constructor's values are kept for them.
        code_licence: Licence of the code base; "" if it states none.
        weights_licence: Licence of files in this layout, unless the catalogue states another; "" if there is none.
        explain: Function of (shapes by key, what `read_state` returned about the file) that returns, for a file of the
            code base that no layout matches, the end of an error message; "" for other files.
        aliases: (pattern, name) pairs that unify the spellings of different versions of the code base; applied first.
    """

    name: str
    system: str
    rename: Sequence[tuple[str, Replacement]]
    recognise: Callable[[Shapes, Mapping[str, Any]], Mapping[str, Any] | Sequence[Candidate] | None]
    finish: Callable[[State, Mapping[str, Any]], State] = keep
    ignore: Sequence[str] = ()
    absent: Sequence[str] = field(default=(r"\.num_batches_tracked$",))
    code_licence: str = ""
    weights_licence: str = ""
    explain: Callable[[Shapes, Mapping[str, Any]], str] = no_explanation
    aliases: Sequence[tuple[str, Replacement]] = ()

    def candidates(self, shapes: Shapes, about: Mapping[str, Any]) -> list[Candidate]:
        """The variants of this layout that a file matches; empty if it has another layout.

        Args:
            shapes: Shapes of the tensors by key.
            about: What `read_state` returned about the file.
        """
        if self.aliases:
            rules = compiled(self.aliases)
            shapes = {renamed(key, rules): shape for key, shape in shapes.items()}
        found = self.recognise(shapes, about)
        if found is None:
            return []
        every = [Candidate("", found)] if isinstance(found, Mapping) else found
        return [replace(candidate, options=named_by(about, candidate.options)) for candidate in every]

    def translate(self, state: State, options: Mapping[str, Any], path: str = "the file") -> State:
        """Convert a state dict of this layout to the keys of the system.

        Args:
            state: The state dict of the file.
            options: Options of the candidate.
            path: The file, for messages.

        Raises:
            UnknownLayoutError: If two keys are renamed to the same one.
        """
        ignored = [re.compile(p) for p in self.ignore]
        aliases, rules = compiled(self.aliases), compiled(self.rename)
        ours: State = {}
        origin: dict[str, str] = {}
        for theirs, value in state.items():
            key = renamed(theirs, aliases)
            if any(p.search(key) for p in ignored):
                continue
            key = renamed(key, rules)
            if key in ours:
                raise UnknownLayoutError(
                    f"{path}: keys {origin[key]!r} and {theirs!r} both become {key!r} in the {self.name} layout of "
                    f"{self.system}; the file holds several networks, keep one of them"
                )
            ours[key], origin[key] = value, theirs
        return self.finish(ours, options)


@cache
def origins() -> tuple[Origin, ...]:
    """All known layouts; the modules of this package are imported at the first call."""
    modules = sorted(m.name for m in iter_modules(__path__))
    found = (import_module(f"{__name__}.{name}") for name in modules)
    return tuple(origin for module in found for origin in getattr(module, "ORIGINS", ()))
