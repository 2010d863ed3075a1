"""How a system calls its networks: recorded while it decodes images."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.checkpoints.call_specs import Spec, arguments_of, describe, leaves, signature
from maskwright.errors import UsageError
from maskwright.evaluation.tasks import checked_options
from maskwright.structures import Placement, Preprocess, Prompts
from maskwright.systems import PanopticSystem, System
from maskwright.systems.kinds.promptable import PromptableSystem


@dataclass
class Form:
    """One way in which a system calls a network: which arguments are given, and what comes back.

    Attributes:
        network: Name of the network.
        inputs: Spec of the list of arguments; dimensions that vary have names.
        output: Spec of the result.
        tensors: Tensors of one call.
    """

    network: str
    inputs: Spec
    output: Spec
    tensors: list[Tensor]
    results: list[Tensor] = field(default_factory=list[Tensor])


@dataclass
class _Call:
    arguments: Spec
    output: Spec
    tensors: list[Tensor]
    results: list[Tensor]


@contextlib.contextmanager
def _recorded(system: System, calls: dict[str, list[_Call]]) -> Generator[None]:
    handles: list[Any] = []
    for name, network in system.networks().items():

        def hook(module: nn.Module, args: Any, keywords: Any, output: Any, name: str = name) -> None:
            tensors, results = list[Tensor](), list[Tensor]()
            inputs = describe(arguments_of(type(module).forward, args, keywords), "x", tensors)
            calls.setdefault(name, []).append(_Call(inputs, describe(output, "y", results), tensors, results))

        handles.append(network.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sizes_for_tracing(preprocess: Preprocess) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes of the network's input; equal where the preprocessing gives a single one."""
    if preprocess.fit in ("inside", "stretch", "letterbox"):
        size = preprocess.padded_size(64, 64)
        return size, size
    multiple = preprocess.multiple
    step = -(-32 // multiple) * multiple
    # Sides whose halves, rounded up, differ at every level, so that no two feature maps have an equal side by chance,
    # and of which even the coarsest level has more than one cell. Where sides need not be multiples of the strides,
    # those of the second size are none, so that integers that the networks return follow from all sizes alike.
    height, width = (-(-side // multiple) * multiple for side in (7 * step + 5, 9 * step + 3))
    return (10 * step, 13 * step), (7 * step, 9 * step) if multiple % 32 == 0 else (height, width)


@torch.no_grad()
def forms_of(system: System, seed: int = 0) -> list[Form]:
    """Every form in which decoding calls the networks of a prepared system, found by decoding two batches of noise.

    Raises:
        UsageError: If the system calls a network with arguments of unsupported types.
    """
    runs: list[dict[str, list[_Call]]] = []
    generator = torch.Generator().manual_seed(seed)
    for count, objects, size in zip((2, 3), (20, 17), sizes_for_tracing(system.preprocess), strict=True):
        images = torch.rand(count, len(system.preprocess.mean), *size, generator=generator) * 4 - 2
        calls: dict[str, list[_Call]] = {}
        try:
            with _recorded(system, calls):
                decode_everything(system, images, objects)
        except TypeError as error:
            if "cannot be exported" not in str(error):
                raise
            raise UsageError(f"{system.name}: {error}") from None
        runs.append(calls)
    forms: list[Form] = []
    for name in system.networks():
        groups: dict[Any, tuple[list[_Call], list[_Call]]] = {}
        for number, run in enumerate(runs):
            for call in run.get(name, []):
                groups.setdefault(signature(call.arguments), ([], []))[number].append(call)
        for first, second in groups.values():
            try:
                form = _form(name, first, second)
            except TypeError as error:
                raise UsageError(f"{system.name}: {name}: {error}") from None
            if form is not None:
                forms.append(form)
    return forms


def decode_everything(system: System, images: Tensor, objects: int) -> None:
    """Decodes a batch in every way that the system has, so that every network is called, for a few objects."""
    size = (images.shape[2], images.shape[3])
    placements = [Placement.identity(size)] * len(images)
    raw = system(*system.inputs(images, [size] * len(images)))
    if isinstance(system, PromptableSystem):
        _answer_prompts(system, raw, placements[0], objects)
        return
    options = {"score_threshold": 0.0, "detections": objects}
    system.decode(raw, placements, **checked_options(system.decode, system.name, options))
    if isinstance(system, PanopticSystem) and "panoptic" in system.tasks:
        system.decode_panoptic(raw, placements)
        system.decode_semantic(raw, placements)


def _answer_prompts(system: PromptableSystem, raw: Any, placement: Placement, objects: int) -> None:
    """Answers prompts of as many points as there are objects modulo 8, with and without boxes and masks."""
    features = raw.of(0)
    height, width = placement.image_size
    places = torch.rand(objects, 1 + objects % 8, 2) * torch.tensor([width, height])
    boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2]]).expand(objects, -1)
    prompts = Prompts(placement.image_size, places, torch.ones(places.shape[:2], dtype=torch.int64), boxes=boxes)
    if system.reads_masks:
        logits = torch.rand(objects, 4 * features.image.shape[-2], 4 * features.image.shape[-1])
        prompts = replace(prompts, logits=logits)
    system.answer(features, system.slots(prompts, placement, features))


def _form(name: str, first: Sequence[_Call], second: Sequence[_Call]) -> Form | None:
    """The form of calls of one network; None if none of them has anything to compute."""

    def rank(call: _Call) -> tuple[bool, int]:
        return all(size > 1 for t in call.tensors for size in t.shape[:1]), sum(t.numel() for t in call.tensors)

    usable = [call for call in first if all(t.numel() for t in call.tensors)]
    if not usable:
        return None
    example = max(usable, key=rank)
    others = [call for call in (*first, *second) if call is not example]
    _name_varying(example.arguments, example.output, [(call.arguments, call.output) for call in others])
    return Form(name, example.arguments, example.output, example.tensors, example.results)


def _name_varying(inputs: Spec, output: Spec, others: Sequence[tuple[Spec, Spec]]) -> None:
    """Names dimensions of tensors that differ between calls, and integers that follow from sizes, in place."""
    ins, outs = leaves(inputs), leaves(output)
    rest = [(leaves(a), leaves(b)) for a, b in others]
    known: dict[tuple[int, ...], str] = {}  # sizes in all calls -> name
    for position, leaf in enumerate(ins):
        for axis, size in enumerate(leaf.get("shape", ())):
            series = (size, *(own[position]["shape"][axis] for own, _ in rest))
            # The first axis may vary although it happens not to: images, or boxes. An axis of 1 stays one.
            if len(set(series)) > 1 or (axis == 0 and size > 1):
                known.setdefault(series, f"n{len(known)}")
                leaf["shape"][axis] = known[series]
    firsts = {leaf["shape"][0] for leaf in ins if leaf.get("shape")}
    for position, leaf in enumerate(outs):
        for axis, size in enumerate(leaf.get("shape", ())):
            series = (size, *(own[position]["shape"][axis] for _, own in rest))
            if len(set(series)) > 1 or (axis == 0 and series in known):
                leaf["shape"][axis] = known.get(series, "")
    for part, position, leaf in [*((0, n, e) for n, e in enumerate(ins)), *((1, n, e) for n, e in enumerate(outs))]:
        if type(leaf.get("i")) is not int:
            continue
        series = (leaf["i"], *(own[part][position]["i"] for own in rest))
        if len(set(series)) > 1:
            found = _as_size(series, {sizes: name for sizes, name in known.items() if name not in firsts})
            if found is None:
                raise TypeError(f"a network takes or returns the number {leaf['i']}, which cannot be exported")
            leaf.clear()
            leaf.update(found)


def _as_size(series: tuple[int, ...], known: dict[tuple[int, ...], str]) -> Spec | None:
    """Integers as sizes of a dimension, or as fractions of them."""
    for sizes, name in known.items():
        for q in (1, 2, 4, 8, 16, 32, 64, 128):
            if all(-(-size // q) == value for size, value in zip(sizes, series, strict=True)):
                return {"d": name, "scale": [1, q]}
        for p in (2, 4, 8, 16, 32):
            if all(size * p == value for size, value in zip(sizes, series, strict=True)):
                return {"d": name, "scale": [p, 1]}
    return None
