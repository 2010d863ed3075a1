"""Runtimes that compute exported networks: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import stat
import sys
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
import torch

from maskwright.checkpoints.budget import shown
from maskwright.errors import CheckpointError, MissingExtraError, UsageError

SUFFIXES = (".onnx", ".xml")
KEY = "maskwright"  # of our metadata in OpenVINO's runtime information
CRC = "weights_crc32"
BIN_CRC = "bin_crc32"  # of the file with the weights of an .xml file
LARGEST_ONNX = (1 << 31) - 1  # bytes, of protocol buffers
_DOMAINS = ("", "ai.onnx")
# Operators that repeat others, as often as a value says; no network that is exported here has any.
_LOOPS = ("Loop", "Scan", "SequenceMap", "TensorIterator")
_MOST_CALLS = 100_000  # of functions, each within the others counted


class Runtime(ABC):
    """Computes the parts of an exported file.

    Attributes:
        name: Name of the runtime.
        precisions: What `prepare` accepts.
        metadata: Our entries in the file.
        size: Size of the file in bytes.
    """

    name: str
    precisions: ClassVar[tuple[str, ...]]
    metadata: dict[str, str]
    size: int

    def __deepcopy__(self, memo: Any) -> Runtime:
        return self  # a copy of a system computes with the same sessions

    @abstractmethod
    def prepare(self, parts: Sequence[str], dtype: str = "float32") -> None:
        """Compiles parts of the file, for a precision.

        Raises:
            UsageError: If the runtime does not have this precision.
            CheckpointError: If a part is invalid.
        """

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights, by part and name: "dense/network.head.conv.weight"."""

    @abstractmethod
    def run(self, part: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Computes one part; names are those inside of the part."""


def open_runtime(path: Path) -> Runtime:
    """The runtime for a file: ONNX Runtime for .onnx, OpenVINO for .xml.

    Raises:
        CheckpointError: If the file cannot be read, or was not exported by this library.
        MissingExtraError: If the runtime is not installed.
    """
    kind = OpenVino if path.suffix.lower() == ".xml" else OnnxRuntime
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file; pass the path of an exported model")
    return kind(path)


def import_onnxruntime() -> Any:
    """The package onnxruntime, which does not report its use.

    Its builds for Windows give events of models and sessions to the telemetry of Windows, unless told not to.

    Raises:
        MissingExtraError: If onnxruntime is not installed.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("onnxruntime", "export") from None
    runtime: Any = onnxruntime
    runtime.disable_telemetry_events()
    return runtime


def import_openvino() -> Any:
    """The package openvino, which does not report its use.

    Importing openvino (and nncf) sends a usage event, and writes an identifier into the home directory, through the
    package openvino_telemetry. Without that package both use a stub of their own; it is made unavailable here.

    Raises:
        MissingExtraError: If openvino is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] - None blocks the import
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino") from None
    return openvino


def import_nncf() -> Any:
    """The package nncf, which does not report its use; see `import_openvino`.

    Raises:
        MissingExtraError: If nncf is not installed.
    """
    import_openvino()
    try:
        import nncf  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise MissingExtraError("nncf", "openvino") from None
    return nncf


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


class OnnxRuntime(Runtime):
    """The parts of an ONNX file, each a session of ONNX Runtime on the CPU."""

    name = "ONNX Runtime"
    precisions = ("float32",)

    def __init__(self, path: Path):
        self._ort: Any = import_onnxruntime()
        try:
            import onnx
        except ImportError:
            raise MissingExtraError("onnx", "export") from None
        self.path, self._onnx = path, onnx
        self.size = path.stat().st_size
        if self.size > LARGEST_ONNX:
            raise CheckpointError(f"{path}: larger than 2 GB, which an ONNX file cannot be; export the system again")
        try:
            self.model: Any = onnx.load_model_from_string(path.read_bytes())
        except Exception as error:  # google.protobuf's DecodeError, among others
            raise CheckpointError(
                f"{path}: not an ONNX file, or a truncated one ({type(error).__name__}); export the system again"
            ) from None
        self.metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        self._sessions: dict[str, Any] = {}
        _refuse_foreign_parts(self.model, path)
        self._external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _all_tensors(self.model))
        if self._external:
            _load_external(onnx, self.model, path)
        if CRC in self.metadata and self.metadata[CRC] != weights_crc(self.model):
            raise CheckpointError(f"{path}: its weights do not match their checksum; the file is damaged, export again")

    def prepare(self, parts: Sequence[str], dtype: str = "float32") -> None:
        if dtype not in self.precisions:
            raise UsageError(
                f"{self.path}: ONNX Runtime computes an exported system in the precision of the file (float32 or "
                f"int8), not in {dtype}; export to OpenVINO for bfloat16"
            )
        for part in parts:
            if part not in self._sessions:
                self._sessions[part] = self._session(part)

    def _session(self, part: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        # Waiting threads would take the processor from torch, which computes between the networks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            data = self.part(part).SerializeToString()
            return self._ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: ONNX Runtime cannot load the network {shown(part)} ({shown(error, 160)}); export "
                "the system again"
            ) from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tuple(tensor.dims) for tensor in self.model.graph.initializer}

    def part(self, part: str) -> Any:
        """The nodes, weights, inputs and outputs of one part as a model."""
        model = self._onnx.ModelProto()
        model.ir_version = self.model.ir_version
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        model.graph.name = part
        prefix = f"{part}/"
        for kind in ("node", "initializer", "input", "output"):
            entries = [entry for entry in getattr(self.model.graph, kind) if entry.name.startswith(prefix)]
            getattr(model.graph, kind).extend(entries)
        return model

    def run(self, part: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        feeds = {f"{part}/{name}": value for name, value in inputs.items()}
        try:
            return self._sessions[part].run([f"{part}/{name}" for name in outputs], feeds)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: ONNX Runtime cannot compute the network {shown(part)} ({shown(error, 200)}); export "
                "the system again"
            ) from None


def weights_crc(model: Any) -> str:
    """The checksum of the weights of an ONNX model."""
    value = 0
    for tensor in model.graph.initializer:
        value = zlib.crc32(tensor.raw_data, zlib.crc32(tensor.name.encode(), value))
    return f"{value:08x}"


def file_crc(path: Path) -> str:
    """The checksum of a file."""
    value = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


def _all_tensors(model: Any) -> Iterable[Any]:
    """Every tensor of a model, those of its functions included."""
    yield from _tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _tensors_in(node)


def _tensors(graph: Any) -> Iterable[Any]:
    """Every tensor of a graph, those in attributes and in graphs inside of it included."""
    yield from graph.initializer
    for tensor in graph.sparse_initializer:
        yield tensor.values
        yield tensor.indices
    for node in graph.node:
        yield from _tensors_in(node)


def _tensors_in(node: Any) -> Iterable[Any]:
    for attribute in node.attribute:
        yield attribute.t
        yield from attribute.tensors
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)


def _nodes(graph: Any) -> Iterable[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _refuse_foreign_parts(model: Any, path: Path) -> None:
    """Raises a CheckpointError for operators that are not ONNX's own or functions of the file, and for loops."""
    own = {(function.domain, function.name): function for function in model.functions}
    nodes = [*_nodes(model.graph), *(node for function in model.functions for node in _nodes(function))]
    for node in nodes:
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own:
            raise CheckpointError(
                f"{path}: has the operator {shown(node.op_type)!r} of {shown(node.domain)!r}, not one of ONNX's; not "
                "loaded"
            )
        _refuse_loop(node.op_type, path)
    try:
        calls = _calls(model.graph.node, own, {}) if own else 0
    except RecursionError:
        calls = _MOST_CALLS + 1
    if calls > _MOST_CALLS:
        raise CheckpointError(f"{path}: its functions call one another without end or far too often; not loaded")


def _refuse_loop(kind: str, path: Path) -> None:
    if kind in _LOOPS:
        raise CheckpointError(f"{path}: has the operator {kind!r}, which may never end; not loaded")


def _calls(nodes: Iterable[Any], own: Mapping[tuple[str, str], Any], known: dict[tuple[str, str], int]) -> int:
    """How many calls of functions nodes cause, those of functions included; a function in itself counts as endless."""
    count = 0
    for node in nodes:
        name = (node.domain, node.op_type)
        if name in own:
            if name not in known:
                known[name] = _MOST_CALLS + 1
                known[name] = _calls(own[name].node, own, known)
            count += 1 + known[name]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                count += _calls(inner.node, own, known)
    return min(count, _MOST_CALLS + 1)


def _load_external(onnx: Any, model: Any, path: Path) -> None:
    """Reads weights that lie in other files of the same folder.

    Raises:
        CheckpointError: If a file lies elsewhere, or is missing or too short.
    """
    folder, left = path.parent.resolve(), LARGEST_ONNX
    for tensor in _all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        pure = (PurePosixPath(location), PureWindowsPath(location))
        outside = not location or any(p.is_absolute() or p.drive or ".." in p.parts for p in pure)
        try:
            target = (folder / location).resolve()
            outside = outside or not target.is_relative_to(folder)
        except (OSError, ValueError, RuntimeError):
            outside = True
            target = folder
        if outside:
            raise CheckpointError(
                f"{path}: weights are said to lie in {shown(location)!r}, outside of the folder of the file; not loaded"
            )
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
            size = target.stat().st_size
            if offset < 0 or offset + max(length, 0) > size or not target.is_file():
                raise ValueError("it is too short")
            length = length if length >= 0 else size - offset
            left -= length
            if left < 0:
                raise ValueError("there are more than 2 GB")
            with target.open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its weights in {shown(location)!r} cannot be read ({shown(error)}); keep both files together"
            ) from None
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


# ---- OpenVINO --------------------------------------------------------------------------------------------------------


class OpenVino(Runtime):
    """The parts of an OpenVINO file (.xml and .bin), each compiled for the CPU."""

    name = "OpenVINO"
    precisions = ("float32", "bfloat16")

    def __init__(self, path: Path):
        self.path, self._ov = path, import_openvino()
        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise CheckpointError(f"{path}: the file {weights.name} with its weights is missing; keep both together")
        self.size = path.stat().st_size + weights.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
        if head.lstrip()[:5] not in (b"<?xml", b"<net "):
            raise CheckpointError(f"{path}: not a model of OpenVINO; export the system again")
        try:
            self.model: Any = self._ov.Core().read_model(path, weights)
            about = {
                name: str(value.astype(str)) if hasattr(value, "astype") else str(value)
                for name, value in (self.model.get_rt_info(KEY).value.items() if self.model.has_rt_info(KEY) else ())
            }
        except Exception as error:
            raise CheckpointError(
                f"{path}: OpenVINO cannot read it ({shown(error, 160)}); it may be damaged, export the system again"
            ) from None
        for operator in self.model.get_ops():
            _refuse_loop(operator.get_type_name(), path)
        if BIN_CRC in about and about[BIN_CRC] != file_crc(weights):
            raise CheckpointError(
                f"{path}: its weights in {weights.name} do not match their checksum; the file is damaged or that of "
                "another model, export again"
            )
        self.metadata = about
        self._compiled: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()  # a compiled model answers one call at a time
        self._dtype = "float32"

    def prepare(self, parts: Sequence[str], dtype: str = "float32") -> None:
        if dtype not in self.precisions:
            raise UsageError(f"{self.path}: OpenVINO computes on the CPU in float32 or bfloat16, not in {dtype}")
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._dtype = dtype
        for part in parts:
            if (part, dtype) in self._compiled:
                continue
            try:
                own = self.part(part)
                self._compiled[part, dtype] = self._ov.Core().compile_model(own, "CPU", settings)
            except Exception as error:
                raise CheckpointError(
                    f"{self.path}: OpenVINO cannot load the network {shown(part)} ({shown(error, 160)}); export "
                    "the system again"
                ) from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        weights = (op for op in self.model.get_ops() if op.get_type_name() == "Constant")
        return {op.get_friendly_name(): tuple(op.get_output_shape(0)) for op in weights}

    def part(self, part: str) -> Any:
        """The inputs and outputs of one part, and what lies between them, as a model of OpenVINO."""
        prefix = f"{part}/"
        inputs = [p for p in self.model.get_parameters() if p.friendly_name.startswith(prefix)]
        outputs = [
            r for r in self.model.get_results() if any(n.startswith(prefix) for n in r.input(0).get_tensor().names)
        ]
        return self._ov.Model(outputs, inputs, part)

    def run(self, part: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        compiled = self._compiled[part, self._dtype]
        try:
            # A request of its own, whose outputs are not overwritten by the next: maps of features are large to copy.
            request = compiled.create_infer_request()
            with self._lock:
                found = request.infer(
                    {f"{part}/{name}": value for name, value in inputs.items()}, share_inputs=True, share_outputs=True
                )
            return [found[f"{part}/{name}"] for name in outputs]
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: OpenVINO cannot compute the network {shown(part)} ({shown(error, 200)}); export "
                "the system again"
            ) from None
