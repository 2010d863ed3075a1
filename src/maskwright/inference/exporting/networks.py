"""From networks to ONNX, by `torch.export`: each form of each network is a part of one model."""

# The protocol buffers of onnx and the expressions of sympy have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator, Sequence
from typing import Any, cast

import jaxtyping
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskwright.checkpoints.budget import shown
from maskwright.checkpoints.call_specs import Spec, flatten, leaves, rebuild, sizes_of, tensors_of
from maskwright.errors import MissingExtraError, UsageError
from maskwright.inference.exporting.capturing import Form
from maskwright.inference.exporting.stages import report
from maskwright.systems import System

OPSET = 20
LARGEST = (1 << 31) - (1 << 20)  # bytes of one ONNX file; a protocol buffer ends at 2 GB


class VaryingSizesError(UsageError):
    """A network cannot be exported with sizes that vary; with one size it may."""


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
        with Convertible():
            return tuple(flatten(self.network(*arguments), []))


class Convertible(TorchFunctionMode):
    """Computes in other operators what torch.onnx cannot convert.

    `torch.tensor` and `Tensor.new_tensor` of sizes keep them as symbols; traced as they are, sizes become fixed. Stable
    sorting is TopK, which puts the first of equal values first in ONNX. `searchsorted` counts comparisons, and
    `repeat_interleave` expands. ONNX Runtime has no Where of booleans.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("sort", "argsort") and kwargs.get("stable"):
            return _sorted(*args, indices=name == "argsort", **kwargs)
        if name == "where" and len(args) == 3 and all(_is_bool(value) for value in args[1:]):
            condition, first, second = args
            return (condition & first) | (~condition & second)
        if name == "repeat_interleave" and len(args) == 2 and isinstance(args[1], int | torch.SymInt):
            return _repeated(*args, **kwargs)
        if name == "searchsorted" and set(kwargs) <= {"right"}:
            edges, values = args
            reached = edges[..., None, :] <= values[..., None] if kwargs.get("right") else None
            return (edges[..., None, :] < values[..., None] if reached is None else reached).sum(-1)
        if name in ("tensor", "new_tensor"):
            own = function is not torch.tensor
            data = args[1] if own else args[0]
            if any(isinstance(value, torch.SymInt | torch.SymFloat) for value in _numbers(data)):
                like: Any = args[0] if own else None
                dtype = kwargs.get("dtype") or (like.dtype if own else None)
                device = kwargs.get("device") or (like.device if own else "cpu")
                return _stacked(data, dtype, torch.device(device))
        return function(*args, **kwargs)


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _sorted(values: Tensor, dim: int = -1, descending: bool = False, *, stable: bool, indices: bool) -> Any:
    found = values.topk(values.shape[dim], dim, largest=descending)
    return found.indices if indices else found


def _repeated(values: Tensor, times: Any, dim: int | None = None) -> Tensor:
    values, axis = (values.flatten(), 0) if dim is None else (values, dim % values.ndim)
    sizes = [-1] * (values.ndim + 1)
    sizes[axis + 1] = times
    return values.unsqueeze(axis + 1).expand(sizes).flatten(axis, axis + 1)


def _numbers(data: Any) -> list[Any]:
    if isinstance(data, list | tuple):
        return [number for each in cast(Sequence[Any], data) for number in _numbers(each)]
    return [data]


def _stacked(data: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Nested numbers, some of them symbols, as a tensor."""
    if isinstance(data, list | tuple):
        return torch.stack([_stacked(each, dtype, device) for each in cast(Sequence[Any], data)])
    if dtype is None:
        whole = isinstance(data, int | torch.SymInt) and not isinstance(data, bool)
        dtype = torch.int64 if whole else torch.float32
    return torch.scalar_tensor(data, dtype=dtype, device=device)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """The block without the warnings and log messages of torch.export and torch.onnx, whose errors are raised.

    Shape annotations, where a program checks them, are not checked: sizes are symbols while a network is traced.
    """
    checked = jaxtyping.config.jaxtyping_disable
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "torch._dynamo")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        jaxtyping.config.update("jaxtyping_disable", True)
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def export_form(system: System, form: Form) -> Any:
    """One form of one network as an ONNX model (`onnx.ModelProto`).

    Args:
        system: A prepared system on the CPU.
        form: The form. Dimensions that turn out to be fixed lose their names in its specs.

    Raises:
        VaryingSizesError: If torch cannot export the network with sizes that vary.
        UsageError: If torch cannot export the network.
    """
    network = system.networks()[form.network]
    arguments = tensors_of(form.inputs)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(leaf["shape"]) if isinstance(size, str)}
        for leaf in arguments
    )
    names = [[leaf["t"] for leaf in tensors_of(spec)] for spec in (form.inputs, form.output)]
    model, sizes = convert(
        _Flat(network, form.inputs), form.tensors, dynamic, *names, what=f"{system.name}: {form.network}"
    )
    for leaf, tensor, own in zip(arguments, form.tensors, sizes, strict=True):
        for axis, varies in enumerate(own):
            if not varies and isinstance(leaf["shape"][axis], str):
                _rename(form, leaf["shape"][axis], tensor.shape[axis])
    # Sizes that are computed with fractions are fixed without a trace in the arguments.
    results = zip(tensors_of(form.output), model.graph.output, strict=True)
    if any(
        isinstance(size, str) and not dim.dim_param
        for leaf, value in results
        for size, dim in zip(leaf["shape"], value.type.tensor_type.shape.dim, strict=True)
    ):
        for leaf, tensor in zip(arguments, form.tensors, strict=True):
            for axis, size in enumerate(leaf["shape"]):
                if axis and isinstance(size, str):
                    _rename(form, size, tensor.shape[axis])
    return model


def convert(
    module: nn.Module, tensors: Sequence[Tensor], dynamic: Any, inputs: Sequence[str], outputs: Sequence[str], what: str
) -> tuple[Any, list[list[bool]]]:
    """A module as an ONNX model, and which axes of each argument may vary in it.

    Args:
        module: Takes and returns tensors.
        tensors: Example arguments.
        dynamic: As `dynamic_shapes` of `torch.export.export`, one entry for each argument.
        inputs: Names of the arguments.
        outputs: Names of the results.
        what: For messages.

    Raises:
        VaryingSizesError: If torch cannot export it with the dimensions of `dynamic`.
        UsageError: If torch cannot export it.
    """
    import_onnx()
    shapes = (dynamic,) if isinstance(module, _Flat) else dynamic
    report(f"{what}: tracing")
    with _explained(what), quiet(), torch.no_grad():
        program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=False)
    report(f"{what}: converting")
    with _explained(what), quiet(), torch.no_grad():
        converted = _converted(program, inputs, outputs)
    report(f"{what}: optimising")
    with _explained(what), quiet(), torch.no_grad():
        converted.optimize()
        # The optimiser of onnxscript 0.7.2 removes a constant that two clamps of one tensor share.
        if not _is_complete(converted.model_proto):
            converted = _converted(program, inputs, outputs)
    model = converted.model_proto
    if model.ByteSize() > LARGEST:
        raise UsageError(f"{what} has more than 2 GB of weights, which one ONNX file cannot hold")
    del model.metadata_props[:]
    for node in model.graph.node:  # stack traces with paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    return model, _varying(program, len(tensors))


@contextlib.contextmanager
def _explained(what: str) -> Generator[None]:
    """Raises what torch raises in the block in words."""
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = shown(" ".join(str(root).split()), 300)
        kind = VaryingSizesError if _is_about_sizes(root) else UsageError
        raise kind(f"{what} cannot be exported ({type(root).__name__}: {reason})") from error


def _converted(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """A traced program as an ONNX model, not optimised."""
    return torch.onnx.export(
        program, (), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
        input_names=list(inputs), output_names=list(outputs), optimize=False,
    )  # fmt: skip


def _is_about_sizes(error: BaseException) -> bool:
    """Whether torch could not trace a network because sizes vary: one must be fixed, or sympy cannot solve for it."""
    from torch._dynamo.exc import UserError, UserErrorType
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    if isinstance(error, UserError):
        return error.error_type == UserErrorType.CONSTRAINT_VIOLATION
    return isinstance(error, ConstraintViolationError) or (
        isinstance(error, NotImplementedError) and "cannot be solved" in str(error)
    )


def _is_complete(model: Any) -> bool:
    """Whether every value that a node reads exists."""
    known = {"", *(value.name for value in (*model.graph.input, *model.graph.initializer))}
    known |= {name for node in model.graph.node for name in node.output}
    return all(name in known for node in model.graph.node for name in node.input)


def _varying(program: torch.export.ExportedProgram, count: int) -> list[list[bool]]:
    """For each axis of each argument whether its size may vary: not if tracing has fixed it, or bounded it."""
    names = set(program.graph_signature.user_inputs)
    result: list[list[bool]] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            own: list[bool] = []
            for size in node.meta["val"].shape:
                expression: Any = size.node.expr if isinstance(size, torch.SymInt) else None
                symbols: Any = () if expression is None else expression.free_symbols
                bounds = [program.range_constraints.get(symbol) for symbol in symbols]
                own.append(bool(symbols) and all(b is None or not b.upper < 1 << 14 for b in bounds))
            result.append(own)
    assert len(result) == count
    return result


def _rename(form: Form, name: str, size: int) -> None:
    """Replaces a name of a dimension in the specs of a form by its size."""
    for leaf in (*leaves(form.inputs), *leaves(form.output)):
        if leaf.get("d") == name:
            p, q = leaf["scale"]
            leaf.clear()
            leaf["i"] = -(-size * p // q)
        elif "shape" in leaf:
            leaf["shape"] = [size if each == name else each for each in leaf["shape"]]


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
    for name, model in parts:
        onnx.compose.add_prefix(model, f"{name}/", inplace=True)
    return joined([model for _, model in parts])


def joined(models: Sequence[Any]) -> Any:
    """Models side by side in one; their names must differ."""
    merged = import_onnx().ModelProto()
    merged.ir_version = max(model.ir_version for model in models)
    merged.producer_name = "maskwright"
    merged.graph.name = "networks"
    domains: dict[str, int] = {}
    for model in models:
        for entry in model.opset_import:
            domains[entry.domain] = max(entry.version, domains.get(entry.domain, 0))
        for kind in ("node", "initializer", "input", "output", "value_info"):
            getattr(merged.graph, kind).extend(getattr(model.graph, kind))
        merged.functions.extend(model.functions)
    for domain, version in domains.items():
        merged.opset_import.add(domain=domain, version=version)
    return merged
