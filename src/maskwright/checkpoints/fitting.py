"""Adapting a state dict to a system: other classes, other input channels, and the comparison before loading."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.timm_backbone import TimmBackbone
from maskwright.errors import CheckpointError, UsageError
from maskwright.systems import ClassRows, PanopticSystem, System

State = dict[str, Tensor]
LISTED = 10  # maximum number of keys that an error message lists


def adapt_classes(
    state: Mapping[str, Tensor],
    system: System,
    old_classes: Sequence[str],
    new_classes: Sequence[str] | None = None,
    old_stuff: Sequence[str] = (),
) -> tuple[State, tuple[str, ...]]:
    """Rearrange the class-specific rows of a state dict for other classes.

    Rows are matched by class name, ignoring case and surrounding whitespace. The background row is kept. Rows of new
    names keep the values that the system's constructor gave them. `System.class_rows` lists the parameters with
    class-specific rows.

    Args:
        state: State dict for `old_classes`.
        system: The system that the result is for.
        old_classes: Class names in the order of the rows of `state`.
        new_classes: Class names in the order of the result; default: those of the system.
        old_stuff: Those of `old_classes` that are regions.

    Returns:
        The new state dict, and the class names whose rows were kept.

    Raises:
        CheckpointError: If a parameter has another number of rows than `old_classes` need.
        UsageError: If `System.class_rows` names a parameter that the system does not have.
    """
    names = tuple(system.classes if new_classes is None else new_classes)
    rows: dict[str, Any] = dict(system.class_rows())
    new_stuff: Sequence[str] = ()
    if isinstance(system, PanopticSystem):
        rows |= system.stuff_rows()
        new_stuff = system.stuff
    old, new = (
        {
            "all": list(every),
            "things": [name for name in every if name not in stuff],
            "stuff": [name for name in every if name in stuff],
        }
        for every, stuff in ((old_classes, old_stuff), (names, new_stuff))
    )
    pairs = {kind: _pairs(old[kind], new[kind]) for kind in new}
    fresh = system.state_dict()
    adapted = dict(state)
    for key, spec in rows.items():
        if key not in fresh:
            raise UsageError(f"{system.name}: class_rows names {key!r}, which is not one of its parameters")
        if key in adapted:
            several: Any = spec if isinstance(spec[0], tuple) else (spec,)
            specs = [ClassRows(*one) for one in several]
            kind = specs[0].kind
            counts = (len(old[kind]), len(new[kind]))
            adapted[key] = _rows(adapted[key], fresh[key], specs, pairs[kind], counts, key)
    kinds = (
        ("things", "stuff") if any(isinstance(s, ClassRows) and s.kind != "all" for s in rows.values()) else ("all",)
    )
    kept = {new[kind][i] for kind in kinds for i, _ in pairs[kind]}
    return adapted, tuple(name for name in names if name in kept)


def _pairs(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Places (new, old) of the names that are in both."""
    place = {_fold(name): i for i, name in reversed(list(enumerate(old)))}
    return [(i, place[_fold(name)]) for i, name in enumerate(new) if _fold(name) in place]


def _rows(
    old: Tensor, fresh: Tensor, specs: Sequence[ClassRows], pairs: list[tuple[int, int]], counts: tuple[int, int],
    key: str,
) -> Tensor:  # fmt: skip
    """`fresh` with the rows of the class pairs (new, old) copied from `old`."""
    part = old
    targets: list[tuple[int, Tensor]] = []
    for spec in specs:
        places: list[Tensor] = []
        for tensor, classes, chosen in ((fresh, counts[1], 0), (old, counts[0], 1)):
            entries = classes + spec.background_last
            length = spec.before + spec.repeats * entries * spec.per_class
            if tensor.shape[spec.axis] != length:
                raise CheckpointError(
                    f"{key}: has {tensor.shape[spec.axis]} rows, but {classes} classes need {length}; "
                    "the classes stated for this file are not those that it was trained on"
                )
            named = [pair[chosen] for pair in pairs if pair[0] >= spec.first]
            wanted = [*range(spec.first), *named] + [classes] * spec.background_last
            block = torch.arange(spec.before, length).view(spec.repeats, entries, spec.per_class)
            places.append(torch.cat([torch.arange(spec.before), block[:, wanted].flatten()]))
        part = part.index_select(spec.axis, places[1])
        targets.append((spec.axis, places[0]))
    return _put(fresh.clone(), part.to(fresh), targets)


def _put(whole: Tensor, part: Tensor, targets: Sequence[tuple[int, Tensor]]) -> Tensor:
    """`whole` with `part` at the given places of each axis."""
    (axis, places), *others = targets
    inner = _put(whole.index_select(axis, places), part, others) if others else part
    return whole.index_copy(axis, places, inner)


def _fold(name: str) -> str:
    return name.strip().casefold()


def widen_input(weight: Float[Tensor, "out channels *kernel"], channels: int) -> Float[Tensor, "out _ *kernel"]:
    """Adapt the weight of the first convolution to another number of image channels.

    Args:
        weight: The weight.
        channels: New number of input channels.

    Returns:
        With more channels: the old weights followed by their mean for each new channel. With fewer: the mean, scaled so
        that the output for an image with equal channels is unchanged.
    """
    have = weight.shape[1]
    mean = weight.mean(dim=1, keepdim=True)
    if channels < have:
        return (mean * (have / channels)).expand(-1, channels, *weight.shape[2:]).contiguous()
    return torch.cat([weight, mean.expand(-1, channels - have, *weight.shape[2:])], dim=1)


def renamed(state: Mapping[str, Tensor], system: System) -> State:
    """The state dict with parameter names of earlier versions replaced; see `System.renamed_parameters`.

    Layers that earlier versions kept after a backbone's last level are left out.
    """
    known = system.state_dict().keys()
    prefixes = sorted(system.renamed_parameters.items(), key=lambda pair: -len(pair[0]))

    def today(key: str) -> str:
        if key in known:
            return key
        return next((new + key[len(old) :] for old, new in prefixes if key.startswith(old)), key)

    modules = cast(Iterator[tuple[str, nn.Module]], system.named_modules())
    unused = tuple(
        f"{name}.{layer}." for name, module in modules if isinstance(module, TimmBackbone) for layer in module.removed
    )
    return {new: value for key, value in state.items() if not (new := today(key)).startswith(unused)}


def fit(state: Mapping[str, Tensor], system: System, path: str, layout: str, absent: Sequence[str] = ()) -> State:
    """Check that all names and shapes of a state dict match a system, and complete it.

    Args:
        state: The state dict.
        system: The system.
        path: The file, for the message.
        layout: What the state dict was compared with, for the message.
        absent: Patterns of keys that may be missing; the system's own values are used for them.

    Returns:
        A state dict with exactly the system's keys.

    Raises:
        CheckpointError: If keys are missing, unexpected or of another shape; one message lists all of them.
    """
    target = system.state_dict()
    tolerated = [re.compile(pattern) for pattern in (*absent, r"(^|\.)num_batches_tracked$")]
    missing = [k for k in target if k not in state and not any(p.search(k) for p in tolerated)]
    over = [k for k in state if k not in target and not tolerated[-1].search(k)]
    shapes = [
        f"{k} {_shape(state[k])} in the file, {_shape(target[k])} expected"
        for k in target
        if k in state and state[k].shape != target[k].shape
    ]
    faults = [_listed(missing, "missing"), _listed(over, "unexpected"), _listed(shapes, "of another shape")]
    if any(faults):
        raise CheckpointError(
            f"{path}: the weights do not match {layout}: {'; '.join(f for f in faults if f)}. "
            "Pass the options that the file was trained with, or choose the file that belongs to these options"
        )
    return {k: state.get(k, v) for k, v in target.items()}


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
