"""Making a state fit a system: other classes, other channels, and the comparison before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskwright.errors import CheckpointError, UsageError
from maskwright.systems import ClassRows, System

State = dict[str, Tensor]
LISTED = 10  # keys named in an error before only their number is given


def adapt_classes(
    state: Mapping[str, Tensor], system: System, old_classes: Sequence[str], new_classes: Sequence[str] | None = None
) -> tuple[State, tuple[str, ...]]:
    """A state for `old_classes` -> one for the system's classes, and the names whose rows were kept.

    Rows go by name, without regard to case or surrounding blanks; the background's row is kept. Rows of names that the
    old classes lack are as the system's constructor made them. Which parameters have rows the system says itself
    (`System.class_rows`).
    """
    new = [_fold(name) for name in (system.classes if new_classes is None else new_classes)]
    place = {_fold(name): i for i, name in reversed(list(enumerate(old_classes)))}
    pairs = [(i, place[name]) for i, name in enumerate(new) if name in place]
    fresh = system.state_dict()
    adapted = dict(state)
    for key, spec in system.class_rows().items():
        if key not in fresh:
            raise UsageError(f"{system.name}: class_rows names {key!r}, which is no parameter of it")
        if key in adapted:
            several: Any = spec if isinstance(spec[0], tuple) else (spec,)
            specs = [ClassRows(*one) for one in several]
            adapted[key] = _rows(adapted[key], fresh[key], specs, pairs, (len(old_classes), len(new)), key)
    return adapted, tuple((system.classes if new_classes is None else tuple(new_classes))[i] for i, _ in pairs)


def _rows(
    old: Tensor, fresh: Tensor, specs: Sequence[ClassRows], pairs: list[tuple[int, int]], counts: tuple[int, int],
    key: str,
) -> Tensor:  # fmt: skip
    part, targets = old, []
    for spec in specs:
        places = []
        for tensor, classes, chosen in ((fresh, counts[1], 0), (old, counts[0], 1)):
            entries = classes + spec.background_last
            length = spec.before + spec.repeats * entries * spec.per_class
            if tensor.shape[spec.axis] != length:
                raise CheckpointError(
                    f"{key}: {tensor.shape[spec.axis]} rows where {classes} classes need {length}; "
                    "the classes named for this file are not the ones it was trained on"
                )
            named = [pair[chosen] for pair in pairs if pair[0] >= spec.first]
            wanted = [*range(spec.first), *named] + [classes] * spec.background_last
            block = torch.arange(spec.before, length).view(spec.repeats, entries, spec.per_class)
            places.append(torch.cat([torch.arange(spec.before), block[:, wanted].flatten()]))
        part = part.index_select(spec.axis, places[1])
        targets.append((spec.axis, places[0]))
    return _put(fresh.clone(), part.to(fresh), targets)


def _put(whole: Tensor, part: Tensor, targets: Sequence[tuple[int, Tensor]]) -> Tensor:
    """`part` at these places of each axis of `whole`."""
    (axis, places), *others = targets
    inner = _put(whole.index_select(axis, places), part, others) if others else part
    return whole.index_copy(axis, places, inner)


def _fold(name: str) -> str:
    return name.strip().casefold()


def widen_input(weight: Float[Tensor, "out channels *kernel"], channels: int) -> Float[Tensor, "out _ *kernel"]:
    """A first convolution for images of other channels: the first ones kept, each further one the mean of the old.

    For fewer channels the mean is scaled so that an image whose channels are all equal gives the same answer.
    """
    have = weight.shape[1]
    mean = weight.mean(dim=1, keepdim=True)
    if channels < have:
        return (mean * (have / channels)).expand(-1, channels, *weight.shape[2:]).contiguous()
    return torch.cat([weight, mean.expand(-1, channels - have, *weight.shape[2:])], dim=1)


def renamed(state: Mapping[str, Tensor], system: System) -> State:
    """A state with the parameter names of an earlier version converted to today's, see `System.renamed_parameters`."""
    known = system.state_dict().keys()
    prefixes = sorted(system.renamed_parameters.items(), key=lambda pair: -len(pair[0]))

    def today(key: str) -> str:
        if key in known:
            return key
        return next((new + key[len(old) :] for old, new in prefixes if key.startswith(old)), key)

    return {today(key): value for key, value in state.items()}


def fit(state: Mapping[str, Tensor], system: System, path: str, layout: str, absent: Sequence[str] = ()) -> State:
    """The state, completed by the system's own values for `absent` keys, once all names and shapes agree.

    Everything that does not agree is said in one error: what is missing, what is left over, which shapes differ.
    """
    target = system.state_dict()
    tolerated = [re.compile(pattern) for pattern in (*absent, r"(^|\.)num_batches_tracked$")]
    missing = [k for k in target if k not in state and not any(p.search(k) for p in tolerated)]
    over = [k for k in state if k not in target and not tolerated[-1].search(k)]
    shapes = [
        f"{k} {_shape(state[k])} in the file, {_shape(target[k])} here"
        for k in target
        if k in state and state[k].shape != target[k].shape
    ]
    faults = [_listed(missing, "missing"), _listed(over, "left over"), _listed(shapes, "of another shape")]
    if any(faults):
        raise CheckpointError(
            f"{path}: its weights do not fit {layout}: {'; '.join(f for f in faults if f)}. "
            "Give the options it was trained with, or the file that belongs to them"
        )
    return {k: state.get(k, v) for k, v in target.items()}


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
