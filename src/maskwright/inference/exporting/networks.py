"""From networks to ONNX, by `torch.export`: each form of each network is a part of one model."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.checkpoints.call_specs import Spec, flatten, rebuild, sizes_of, tensors_of
from maskwright.errors import MissingExtraError, UsageError
from maskwright.inference.exporting.capturing import Form
from maskwright.systems import System

OPSET = 20
LARGEST = (1 << 31) - (1 << 20)  # bytes of one ONNX file; a protocol buffer ends at 2 GB


def import_onnx() -> Any:
    """The package onnx.

    Raises:
        MissingExtraError: If it, or the converter of torch.onnx, is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 # pyright: ignore[reportUnusedImport] - torch.onnx needs it
    except ImportError:
        raise MissingExtraError("onnx with onnxscript", "export") from None
    return onnx


class _Flat(nn.Module):
    """A network that takes and returns tensors alone."""

    def __init__(self, network: nn.Module, inputs: Spec):
        super().__init__()
        self.network, self.inputs, self.names = network, inputs, [leaf["t"] for leaf in tensors_of(inputs)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sizes = sizes_of(self.inputs, tensors)
        arguments = rebuild(self.inputs, dict(zip(self.names, tensors, strict=True)), sizes)
        return tuple(flatten(self.network(*arguments), []))


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """The block without the warnings and log messages of torch.export and torch.onnx, whose errors are raised."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "torch._dynamo")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def export_form(system: System, form: Form) -> Any:
    """One form of one network as an ONNX model (`onnx.ModelProto`).

    Args:
        system: A prepared system on the CPU.
        form: The form. Dimensions that turn out to be fixed lose their names in its specs.

    Raises:
        UsageError: If torch cannot export the network.
    """
    network = system.networks()[form.network]
    leaves = tensors_of(form.inputs)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(leaf["shape"]) if isinstance(size, str)}
        for leaf in leaves
    )
    names = [[leaf["t"] for leaf in tensors_of(spec)] for spec in (form.inputs, form.output)]
    model = convert(_Flat(network, form.inputs), form.tensors, dynamic, *names, what=f"{system.name}: {form.network}")
    _fix(form, model)
    return model


def convert(
    module: nn.Module, tensors: Sequence[Tensor], dynamic: Any, inputs: Sequence[str], outputs: Sequence[str], what: str
) -> Any:
    """A module as an ONNX model.

    Args:
        module: Takes and returns tensors.
        tensors: Example arguments.
        dynamic: As `dynamic_shapes` of `torch.export.export`, one entry for each argument.
        inputs: Names of the arguments.
        outputs: Names of the results.
        what: For messages.

    Raises:
        UsageError: If torch cannot export it.
    """
    import_onnx()
    try:
        with quiet(), torch.no_grad():
            shapes = (dynamic,) if isinstance(module, _Flat) else dynamic
            program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=False)
            converted = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
                input_names=list(inputs), output_names=list(outputs),
            )  # fmt: skip
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{what} cannot be exported ({type(error).__name__}: {reason})") from error
    assert converted is not None
    model = converted.model_proto
    if model.ByteSize() > LARGEST:
        raise UsageError(f"{what} has more than 2 GB of weights, which one ONNX file cannot hold")
    del model.metadata_props[:]
    for node in model.graph.node:  # stack traces with paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    return model


def _fix(form: Form, model: Any) -> None:
    """Replaces the names of dimensions that the exported model has fixed by their sizes."""
    for leaf, value, tensor in zip(tensors_of(form.inputs), model.graph.input, form.tensors, strict=True):
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if isinstance(leaf["shape"][axis], str) and not dim.dim_param:
                _rename(form, leaf["shape"][axis], tensor.shape[axis])


def _rename(form: Form, name: str, size: int) -> None:
    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("d") == name:
                p, q = value["scale"]
                value.clear()
                value["i"] = -(-size * p // q)
            shape = value.get("shape")
            if isinstance(shape, list):
                value["shape"] = [size if each == name else each for each in shape]
            for each in list(value.values()):
                visit(each)
        elif isinstance(value, list):
            for each in value:
                visit(each)

    visit(form.inputs)
    visit(form.output)


def merge(parts: Sequence[tuple[str, Any]]) -> Any:
    """Several models side by side in one. Names of values and nodes begin with the name of their part and a slash.

    Args:
        parts: Name and model of each part.

    Raises:
        UsageError: If they have more than 2 GB of weights together.
    """
    onnx = import_onnx()
    if sum(model.ByteSize() for _, model in parts) > LARGEST:
        raise UsageError("the networks have more than 2 GB of weights together, which one ONNX file cannot hold")
    merged = onnx.ModelProto()
    merged.ir_version = max(model.ir_version for _, model in parts)
    merged.producer_name = "maskwright"
    merged.graph.name = "networks"
    domains: dict[str, int] = {}
    for name, model in parts:
        onnx.compose.add_prefix(model, f"{name}/", inplace=True)
        for entry in model.opset_import:
            domains[entry.domain] = max(entry.version, domains.get(entry.domain, 0))
        for kind in ("node", "initializer", "input", "output", "value_info"):
            getattr(merged.graph, kind).extend(getattr(model.graph, kind))
        merged.functions.extend(model.functions)
    for domain, version in domains.items():
        merged.opset_import.add(domain=domain, version=version)
    return merged
