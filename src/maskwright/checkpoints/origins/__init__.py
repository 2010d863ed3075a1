"""Layouts that others published: one `Origin` each, as a table in `origins/SYSTEM.py`.

A module of this package gives `ORIGINS`, a list of `Origin`. It is found by being here; nothing else has to be edited.

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
    """One of several published variants that a file may be: `variant` is what a person passes to `load` to choose."""

    variant: str
    options: Mapping[str, Any]


def keep(state: State, options: Mapping[str, Any]) -> State:
    """The state as it is: the `finish` of an origin whose tensors need no change."""
    return state


def compiled(rules: Sequence[tuple[str, Replacement]]) -> Compiled:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


def renamed(key: str, rules: Compiled) -> str:
    """All rules applied, each to what the earlier ones left."""
    for pattern, replacement in rules:
        key = pattern.sub(replacement, key)
    return key


@dataclass(frozen=True)
class Origin:
    """How one code base lays one system out in a file.

    name        the code base: "detectron2", "torchvision", "mmdet", "transformers"
    system      the registry's name of our system
    rename      (their pattern, ours) pairs. ALL are applied to each key, from the first to the last, each by `re.sub`
                to what the earlier ones left: so a table says the large parts first and the small ones (norm, conv
                numbers) once, below. A replacement may be a function of the match, for arithmetic on indices.
    recognise   (shapes, about) -> the options for `create(system, **options)`, "classes" among them, if THEIR keys and
                shapes are of this layout, else None. Where published variants cannot be told apart by keys and shapes,
                a list of `Candidate`: loading then asks for `variant=`. `about` is what `read_state` says of the file.
    finish      (state, options) -> state, after renaming: tensors permuted, split, dropped. Changes nothing in place.
    ignore      patterns of THEIR keys that may be left over and are dropped before renaming
    absent      patterns of OUR keys that the file need not have: they keep what the constructor gave them
    code_licence, weights_licence
                what the code base says of files in this layout in general, "" where it says nothing; a file from the
                catalogue carries its own
    aliases     (pattern, usual name) pairs for what other versions of the code base call the same: applied to each key
                before anything else, so that all the rest knows one spelling
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
    aliases: Sequence[tuple[str, Replacement]] = ()

    def candidates(self, shapes: Shapes, about: Mapping[str, Any]) -> list[Candidate]:
        """What the file may be in this layout; empty if it is not of this layout."""
        if self.aliases:
            rules = compiled(self.aliases)
            shapes = {renamed(key, rules): shape for key, shape in shapes.items()}
        found = self.recognise(shapes, about)
        if found is None:
            return []
        every = [Candidate("", found)] if isinstance(found, Mapping) else found
        return [replace(candidate, options=named_by(about, candidate.options)) for candidate in every]

    def translate(self, state: State, options: Mapping[str, Any], path: str = "the file") -> State:
        """Their state -> ours: ignored keys dropped, the others renamed, then finished."""
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
                    f"{path}: its keys {origin[key]!r} and {theirs!r} both become {key!r} in the {self.name} layout of "
                    f"{self.system}; the file holds more than one network, keep one of them"
                )
            ours[key], origin[key] = value, theirs
        return self.finish(ours, options)


@cache
def origins() -> tuple[Origin, ...]:
    """Every layout we know, from the modules of this package; they are imported when first asked for."""
    modules = sorted(m.name for m in iter_modules(__path__))
    return tuple(origin for name in modules for origin in import_module(f"{__name__}.{name}").ORIGINS)
