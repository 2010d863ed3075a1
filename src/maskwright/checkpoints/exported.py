"""Systems whose networks are computed by ONNX Runtime or OpenVINO, from files that `export` wrote.

The system is built as usual, without weights, and each of its networks calls the runtime. Decoding, and with it
prediction, evaluation and tiles, do not differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from maskwright.checkpoints import call_specs
from maskwright.checkpoints.budget import shown, unexpected_as_errors
from maskwright.checkpoints.building import check_values, checked_outline
from maskwright.checkpoints.call_specs import Spec
from maskwright.checkpoints.ours import parse_metadata, preprocess_of
from maskwright.checkpoints.runtimes import Runtime, open_runtime
from maskwright.errors import CheckpointError, UnknownSystemError, UsageError
from maskwright.systems import System, system_class
from maskwright.systems.kinds.classless import classless
from maskwright.systems.kinds.promptable import PromptableSystem

FORMAT = "maskwright-networks"
GRAPH_FORMAT = "maskwright-graph"


@dataclass(frozen=True)
class Part:
    """One form of one network in a file.

    Attributes:
        name: Its name in the file, the prefix of its tensors.
        network: The network.
        inputs: Spec of the list of arguments.
        output: Spec of the result.
    """

    name: str
    network: str
    inputs: Spec
    output: Spec

    def to_json(self) -> dict[str, Any]:
        """The part as JSON values."""
        return {"name": self.name, "network": self.network, "inputs": self.inputs, "output": self.output}


def is_exported(system: System) -> bool:
    """Whether a runtime other than torch computes the networks of a system."""
    return runtime_of(system) is not None


def runtime_of(system: System) -> Runtime | None:
    """The runtime that computes the networks of a system; None for torch."""
    return system.__dict__.get("_runtime")


def parts_of(system: System) -> list[Part]:
    """The parts of the file of an exported system."""
    calls = [network.forward for network in system.networks().values()]
    return [part for call in calls if isinstance(call, ExportedNetwork) for part in call.parts.values()]


def load_exported(
    path: Path, classes: Sequence[str] | None = None, variant: str | None = None, overrides: Mapping[str, Any] = {}
) -> System:
    """The system of a file that `export` wrote; the arguments are those of `load`.

    Raises:
        CheckpointError: If the file cannot be used.
        UsageError: If options or classes are given, which are fixed in an exported file.
        MissingExtraError: If its runtime is not installed.
    """
    if classes is not None or variant is not None or overrides:
        given = ", ".join(
            [*overrides, *(["classes"] if classes is not None else []), *(["variant"] if variant else [])]
        )
        raise UsageError(
            f"{path}: {given} cannot be changed in an exported file; change the checkpoint, and export it again"
        )
    runtime = open_runtime(path)
    with unexpected_as_errors(path):
        return _assembled(path, runtime)


def _assembled(path: Path, runtime: Runtime) -> System:
    about = runtime.metadata
    if about.get("format") == GRAPH_FORMAT:
        raise CheckpointError(
            f"{path}: a graph from image to masks for other programs, whose thresholds are fixed; to load it here, "
            "export the system with form='networks'"
        )
    if about.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not exported by maskwright, so that its outputs are unknown; `maskwright export` writes "
            "such files"
        )
    known = parse_metadata({"path": str(path), "metadata": about})
    parts = _parts(path, about.get("networks", ""))
    system = _without_weights(path, known, runtime.size)
    forms: dict[str, list[Part]] = {}
    for part in parts:
        if part.network not in system.networks():
            raise CheckpointError(f"{path}: {system.name} has no network {shown(part.network)!r}; export it again")
        forms.setdefault(part.network, []).append(part)
    _compare_weights(path, system, parts, runtime)
    runtime.prepare([part.name for part in parts])
    for name, network in system.networks().items():
        call = ExportedNetwork(f"{path}: {name}", type(network).forward, forms.get(name, []), runtime)
        network.to("meta")  # the parameters keep their shapes, without memory
        network.forward = call
    system.losses = partial(_no_losses, path)
    if isinstance(system, PromptableSystem):
        system.uniform = True
        system.pin_fingerprint(shown(about.get("fingerprint", ""), 80))
    system.__dict__["_runtime"] = runtime
    if known["source"].get("classless") is True:
        system = classless(system)
    system.source = {**known["source"], "file": path.name, "runtime": runtime.name}
    return system.eval().requires_grad_(False)


def _no_losses(path: Path, *_: Any, **__: Any) -> dict[str, Tensor]:
    raise UsageError(f"{path}: an exported system cannot be trained; train the checkpoint it was exported from")


def _parts(path: Path, text: str) -> list[Part]:
    """The parts that the metadata of a file describe."""
    try:
        entries: Any = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path}: its description of the networks is missing; export the system again")
    result: list[Part] = []
    for entry in cast(list[Any], entries):
        own = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        name, network = own.get("name"), own.get("network")
        if not isinstance(name, str) or not isinstance(network, str) or "/" in name:
            raise CheckpointError(f"{path}: its description of the networks is invalid; export the system again")
        inputs, output = (call_specs.check(own.get(kind), str(path)) for kind in ("inputs", "output"))
        call_specs.check_sizes(inputs, output, str(path))
        result.append(Part(name, network, inputs, output))
    return result


def _compare_weights(path: Path, system: System, parts: Sequence[Part], runtime: Runtime) -> None:
    """Compares the weights that kept their names with the system that options and classes describe.

    Raises:
        CheckpointError: If one has another shape: answers of the networks would mean something else.
    """
    shapes = runtime.shapes()
    for part in parts:
        for name, parameter in system.networks()[part.network].named_parameters():
            found = shapes.get(f"{part.name}/network.{name}")
            if found is not None and sorted(found) != sorted(parameter.shape):  # a matrix may be transposed
                raise CheckpointError(
                    f"{path}: {shown(name)} is {found}, but has the shape {tuple(parameter.shape)} with the options "
                    "and classes in the file; the file is damaged, export the system again"
                )


class _WithoutInitialisation(TorchFunctionMode):
    """Random initialisation, which takes most of the time of building a network, is left out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "trunc_normal_"):
            own: dict[str, Any] = kwargs or {}
            return args[0] if args else own.get("tensor")
        return function(*args, **(kwargs or {}))


def _without_weights(path: Path, metadata: Mapping[str, Any], size: int) -> System:
    name = metadata["system"]
    try:
        kind = system_class(name)
    except UnknownSystemError:
        raise CheckpointError(f"{path}: holds system {shown(name)!r}, which this version does not have") from None
    check_values(metadata["options"], str(path))
    options = {**metadata["options"], "classes": metadata["classes"]}
    # What the file can hold at most, with one byte for each weight.
    final = checked_outline(kind, options, {"file": torch.empty(size, dtype=torch.uint8, device="meta")}, str(path))
    with torch.random.fork_rng(devices=[]), _WithoutInitialisation():  # pyright: ignore[reportUnknownMemberType]
        system = kind.rebuild(final)
    preprocess = preprocess_of({**metadata, "path": str(path)})
    if preprocess is not None:
        system.preprocess = preprocess
    return system


class ExportedNetwork:
    """The `forward` of a network that a runtime computes.

    Args:
        label: File and name of the network, for messages.
        forward: The function that it replaces, for the order of arguments.
        parts: The forms in which it can be called.
        runtime: What computes them.
    """

    def __init__(self, label: str, forward: Any, parts: Sequence[Part], runtime: Runtime):
        self.label, self.runtime, self._forward = label, runtime, forward
        self.parts = {call_specs.signature(part.inputs): part for part in parts}

    def __deepcopy__(self, memo: Any) -> ExportedNetwork:
        return self  # a copy of a system computes with the same sessions

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        tensors: list[Tensor] = []
        arguments = call_specs.arguments_of(self._forward, args, keywords)
        # A runtime computes in the precision that it was compiled for, and takes and gives float32.
        arguments = tree_map_only(Tensor, _single, arguments)
        given = call_specs.describe(arguments, "x", tensors)
        part = self.parts.get(call_specs.signature(given))
        if part is None:
            raise UsageError(
                f"{self.label} was not exported for this call; options of decoding that call networks in another way, "
                "and losses, need the checkpoint"
            )
        sizes = self._checked_sizes(part, given)
        empty = {name for name, size in sizes.items() if size == 0}
        feeds = {
            leaf["t"]: _filled(tensor.detach().cpu(), leaf["shape"], empty).numpy()
            for leaf, tensor in zip(call_specs.tensors_of(part.inputs), tensors, strict=True)
        }
        wanted = call_specs.tensors_of(part.output)
        found = self.runtime.run(part.name, feeds, [leaf["t"] for leaf in wanted])
        device = tensors[0].device if tensors else torch.device("cpu")
        results = {
            leaf["t"]: _emptied(torch.as_tensor(value), leaf["shape"], empty).to(device)
            for leaf, value in zip(wanted, found, strict=True)
        }
        return call_specs.rebuild(part.output, results, sizes)

    def _checked_sizes(self, part: Part, given: Spec) -> dict[str, int]:
        """Sizes of the named dimensions; UsageError for a dimension that has another size in the file."""
        sizes: dict[str, int] = {}
        for wanted, own in zip(call_specs.tensors_of(part.inputs), call_specs.tensors_of(given), strict=True):
            for fixed, size in zip(wanted["shape"], own["shape"], strict=True):
                if isinstance(fixed, str):
                    sizes.setdefault(fixed, size)
                elif fixed != size:
                    raise UsageError(
                        f"{self.label} was exported for an input of {_words(wanted['shape'])}, got "
                        f"{_words(own['shape'])}; export the system for this size or batch"
                    )
        return sizes


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _words(shape: Sequence[int | str]) -> str:
    return " x ".join("any" if isinstance(size, str) else str(size) for size in shape)


def _filled(tensor: Tensor, shape: Sequence[int | str], empty: set[str]) -> Tensor:
    """A tensor with one entry of zeros along axes that have none, for runtimes that do not take empty tensors."""
    if empty and any(name in empty for name in shape):
        return tensor.new_zeros([1 if name in empty else size for name, size in zip(shape, tensor.shape, strict=True)])
    return tensor.contiguous()


def _emptied(tensor: Tensor, shape: Sequence[int | str], empty: set[str]) -> Tensor:
    """The results without those of the entries that `_filled` added."""
    for axis, name in enumerate(shape):
        if name in empty:
            tensor = tensor.narrow(axis, 0, 0)
    return tensor
