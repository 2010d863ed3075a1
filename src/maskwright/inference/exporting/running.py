"""Graphs in the runtime that they were exported for."""

# onnxruntime has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from maskwright.checkpoints.runtimes import import_onnxruntime, import_openvino
from maskwright.errors import MissingExtraError
from maskwright.inference.exporting.networks import import_onnx


def require_runtime(path: Path) -> None:
    """Fails before anything is computed if the runtime of a file is not installed.

    Raises:
        MissingExtraError: If it is not.
    """
    if path.suffix.lower() == ".xml":
        import_openvino()
    elif importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "export")
    import_onnx()


def open_session(path: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Loads an .onnx or .xml file: a function from inputs to outputs, both by name, on the CPU.

    Raises:
        MissingExtraError: If the runtime is not installed.
    """
    if path.suffix.lower() == ".xml":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = import_openvino().Core().compile_model(path, "CPU", settings)
        ports = [(name, output) for output in model.outputs for name in output.get_names()]

        def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = model(dict(inputs))
            return {name: np.array(found[output]) for name, output in ports}

        return compute
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, cast(list[np.ndarray], session.run(names, dict(inputs))), strict=True))

    return run
