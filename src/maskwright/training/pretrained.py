"""Starting from installed weights: a whole network where the systems are alike, otherwise a backbone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from maskwright.checkpoints import load, read_metadata
from maskwright.checkpoints.folders import CheckpointWarning
from maskwright.checkpoints.shipping import SCENES, Shipped, find_shipped, missing, shipped
from maskwright.errors import CheckpointError, UsageError
from maskwright.options import plain
from maskwright.systems import System

IRRELEVANT = ("pretrained", "frozen")  # fields of a backbone that do not change what it computes


@dataclass(frozen=True)
class _Offer:
    """What a system can take from others' weights.

    Attributes:
        entry: The weights.
        giver: The system that they belong to.
        parts: The names of the parts that fit.
        tensors: Values for the state dict of the taker.
        rows: Parameters of these parts whose rows belong to classes, and are not taken.
    """

    entry: Shipped
    giver: System
    parts: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    rows: tuple[str, ...]


def take_pretrained(system: System, name: str) -> list[str]:
    """Copies installed weights into a system with random ones, as far as they fit.

    Weights of the same system give every part (module of `System.groups`) whose parameters have the same names and
    shapes, without rows that belong to classes. Weights of other systems give their backbone. The backbones must have
    the same options, except `frozen`. The image normalisation of the weights is taken too.

    Args:
        system: The system; changed in place.
        name: "scenes" for the best fitting of all installed weights, or the name of some.

    Returns:
        Lines that state what was taken, and what still starts from random values.

    Raises:
        UsageError: If nothing fits; the message says why.
        CheckpointError: If weights that were named are not installed or damaged. With "scenes", damaged ones are
            ignored with a warning.
    """
    best, reasons = _best(system, name)
    if best is None:
        raise UsageError(
            f"no installed weights fit this {system.name}: {'; '.join(reasons) or missing(name)}. Omit "
            "pretrained, or use the backbone options of such weights"
        )
    system.load_state_dict({**system.state_dict(), **best.tensors})
    there = best.giver.preprocess
    if len(there.mean) == len(system.preprocess.mean):
        system.preprocess = replace(
            system.preprocess, mean=there.mean, std=there.std, divide=there.divide, channels=there.channels
        )
    system.source = {
        "pretrained": best.entry.name, "weights_licence": best.entry.licence, "commercial": "yes",
        "taken": list(best.parts),
    }  # fmt: skip
    return _said(system, best)


def fitting_weights(system: System, pretrained: str = SCENES) -> str | None:
    """The name of the installed weights that `take_pretrained` takes for a system; None if none fit."""
    best, _ = _best(system, pretrained)
    return None if best is None else best.entry.name


def _best(system: System, name: str) -> tuple[_Offer | None, list[str]]:
    """The weights of this name that give a system most, and why others give nothing."""
    if name == SCENES:
        entries = sorted(shipped(), key=lambda entry: entry.system != system.name)  # those of the same system first
    else:
        entry = find_shipped(name)
        if entry is None:
            raise UsageError(
                f"pretrained must be {SCENES!r} or the name of installed weights, got {name!r}; {missing(name)}"
            )
        entries = [entry]
    reasons: list[str] = []
    best: _Offer | None = None
    for entry in entries:
        if best is not None and best.entry.system == system.name != entry.system:
            break  # others have no more than the backbone
        try:
            offer = _offer(system, entry)
        except CheckpointError as error:
            if name != SCENES:
                raise
            warnings.warn(f"the weights {entry.name} are ignored: {error}", CheckpointWarning, stacklevel=4)
            offer = f"cannot be used ({error})"
        if isinstance(offer, str):
            reasons.append(f"{entry.name} {offer}")
        elif best is None or _size(offer) > _size(best):
            best = offer
    return best, reasons


def _offer(system: System, entry: Shipped) -> _Offer | str:
    """What a system can take from weights, or why nothing."""
    stored = cast("dict[str, Any]", read_metadata(entry.verified())["options"])
    name, other = (_backbone_of(options).get("name") for options in (system.options, stored))
    same = entry.system == system.name
    if name != other or (name is None and not same):
        return f"has the backbone {other}, not {name}" if name and other else "has another kind of image encoder"
    channels = system.options.get("in_channels", 3)
    giver = load(entry.path, **({"in_channels": channels} if channels != stored.get("in_channels", 3) else {}))
    if words := _differing(_backbone_of(system.options), _backbone_of(giver.options)):
        return f"has another backbone ({words})"
    own, theirs = _parts(system), _parts(giver)
    rows = {key for kind in (system, giver) for key in kind.class_rows()}
    taken: dict[str, Tensor] = {}
    parts: list[str] = []
    left: list[str] = []
    why = "has no part in common"
    for part in own if same else _labels(system)["backbone"]:
        faults = [key for key in own[part] if _fault(own[part][key], theirs.get(part, {}).get(key), rows)]
        if faults or len(own[part]) != len(theirs.get(part, {})):
            where = faults[0] if faults else next(iter(set(theirs[part]) - set(own[part])))
            why = f"differs in {where} of the {part}" if not parts else why
            continue
        parts.append(part)
        for key, (name, _) in own[part].items():
            if name in rows:
                left.append(name)
            else:
                taken[name] = theirs[part][key][1]
    return _Offer(entry, giver, tuple(parts), taken, tuple(left)) if taken else why


def _parts(system: System) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """The parts of a system: key in the state dict of the module -> key in that of the system, and value."""
    state, names = system.state_dict(), _names(system)
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for modules, labels in zip(system.groups().values(), _labels(system).values(), strict=True):
        for label, module in zip(labels, modules, strict=True):
            if id(module) in names:
                keys = {key: f"{names[id(module)]}.{key}" for key in module.state_dict()}
            else:  # a container made for the group, of parameters that lie in no module of their own
                keys = {names[id(value)].rpartition(".")[2]: names[id(value)] for value in module.parameters()}
            parts[label] = {key: (name, state[name]) for key, name in keys.items()}
    return parts


def _labels(system: System) -> dict[str, list[str]]:
    """The names of the parts in each group: that of the group, or those of its modules if there are several."""
    names = _names(system)

    def label(module: nn.Module) -> str:
        return names.get(id(module)) or ", ".join(names[id(value)] for value in module.parameters())

    return {
        group: [group] if len(modules) == 1 else [label(module) for module in modules]
        for group, modules in system.groups().items()
    }


def _names(system: System) -> dict[int, str]:
    """The names of all modules and parameters, by their identity."""
    return {id(one): name for name, one in cast("Any", (*system.named_modules(), *system.named_parameters()))}


def _fault(own: tuple[str, Tensor], theirs: tuple[str, Tensor] | None, rows: set[str]) -> bool:
    """Whether a tensor is missing or has another shape; rows of classes may differ in number."""
    return theirs is None or (own[0] not in rows and own[1].shape != theirs[1].shape)


def _backbone_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a backbone that determine what it computes."""
    given = plain(options.get("backbone"))
    if not isinstance(given, Mapping):
        return {}
    return {name: value for name, value in cast("Mapping[str, Any]", given).items() if name not in IRRELEVANT}


def _differing(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The options of two backbones that differ, in words; "" if none do."""
    values = {name: (json.dumps(theirs.get(name)), json.dumps(own.get(name))) for name in sorted({*own, *theirs})}
    return ", ".join(f"{name} is {there} there and {here} here" for name, (there, here) in values.items()
                     if there != here)  # fmt: skip


def _size(offer: _Offer) -> int:
    return sum(value.numel() for value in offer.tensors.values())


def _said(system: System, offer: _Offer) -> list[str]:
    """What was taken, in words."""
    name = offer.entry.name
    rest: list[str] = []
    for group, parts in _labels(system).items():
        left = [part for part in parts if part not in offer.parts]
        rest += left if len(left) < len(parts) else [group]
    share = f"{len(offer.tensors)} of {len(system.state_dict())} tensors"
    random = [*rest, f"the rows of classes in {_few(offer.rows)}"] if offer.rows else rest
    tail = f"; from random values: {', '.join(random)}" if random else ""
    whole = rest and offer.entry.system == system.name
    hint = f". `train {name}` takes all of it, with its options" if whole else ""
    return [f"pretrained, from {name}: {', '.join(offer.parts)} ({share}){tail}{hint}"]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
