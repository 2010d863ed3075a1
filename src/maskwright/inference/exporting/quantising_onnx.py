"""int8 by NNCF; for ONNX Runtime, pairs of QuantizeLinear and DequantizeLinear in the parts of an ONNX file."""

# Neither onnx nor nncf has complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskwright.checkpoints.runtimes import import_nncf

_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")


def quantised_part(model: Any, name: str, examples: Any, level: str) -> Any | None:
    """One part of a file in int8.

    Args:
        model: The part as an ONNX model, whose names begin with `name` and a slash.
        name: The part.
        examples: Its inputs, for calibration.
        level: "every": all layers; "backbone": those of the backbone; otherwise all but the output layers.

    Returns:
        The model; None if the part has no such layers.
    """
    kept = list[str]()
    if level != "every":
        kept = outside_of_backbone(model) if level == "backbone" else output_layers(model)
    if len(kept) >= sum(node.op_type in _WEIGHTED for node in model.graph.node):
        return None
    attention = any(node.op_type == "Softmax" for node in model.graph.node)
    found = in_int8(model, examples, kept, attention)
    _name(found.graph, f"{name}/")
    return found


def in_int8(model: Any, examples: Any, kept: Sequence[str], attention: bool) -> Any:
    """A model of ONNX or OpenVINO whose layers are in int8, except those named in `kept`.

    Args:
        model: The model.
        examples: Its inputs, for calibration.
        kept: Names of layers that stay in float.
        attention: Whether it is a transformer, whose products of activations NNCF treats in ways of their own.
    """
    nncf = import_nncf()
    return nncf.quantize(
        model,
        nncf.Dataset(examples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(examples),
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
        ignored_scope=nncf.IgnoredScope(names=list(kept), validate=False),
    )


def output_layers(model: Any) -> list[str]:
    """The last layers with weights before each output that no other layer with weights reads.

    Classes, boxes and masks are read from them; the others make feature maps for other networks.
    """
    makers = {value: node for node in model.graph.node for value in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for value in filter(None, node.input):  # left out inputs have the name ""
            readers.setdefault(value, []).append(node)
    found = set[str]()
    for output in model.graph.output:
        waiting, seen = [output.name], set[str]()
        while waiting:
            value = waiting.pop()
            node = makers.get(value)
            if value in seen or node is None:
                continue
            seen.add(value)
            if node.op_type not in _WEIGHTED:
                waiting += node.input
            elif not _is_read(node, readers):
                found.add(node.name)
    return sorted(found)


def _is_read(layer: Any, readers: Mapping[str, Sequence[Any]]) -> bool:
    """Whether another layer with weights uses what a layer computes."""
    waiting, seen = [*layer.output], set[str]()
    while waiting:
        value = waiting.pop()
        for node in readers.get(value, ()):
            if node.op_type in _WEIGHTED:
                return True
            if node.op_type != "Shape":
                waiting += [other for other in node.output if other not in seen]
                seen.update(node.output)
    return False


def outside_of_backbone(model: Any) -> list[str]:
    """The layers whose weights are not those of a backbone."""
    makers = {value: node for node in model.graph.node for value in node.output}

    def of_backbone(value: str, depth: int = 0) -> bool:  # through transpositions of the weights
        if ".backbone." in value:
            return True
        node = makers.get(value)
        return node is not None and depth < 4 and bool(node.input) and of_backbone(node.input[0], depth + 1)

    return [node.name for node in model.graph.node if node.op_type in _WEIGHTED and not of_backbone(node.input[1])]


def _name(graph: Any, prefix: str) -> None:
    """Lets all names begin with that of the part, as those of the nodes and values that NNCF adds do not."""

    def named(value: str) -> str:
        return value if not value or value.startswith(prefix) else prefix + value

    for node in graph.node:
        node.name = named(node.name)
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                values[place] = named(value)
    for entry in (*graph.initializer, *graph.value_info):
        entry.name = named(entry.name)
