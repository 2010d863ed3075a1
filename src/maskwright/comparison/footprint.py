"""Latency and memory of weights, measured in a process of its own: `python -m maskwright.comparison.footprint`.

PyTorch in float32 and bfloat16, and the exported forms whose extras are installed, are tried; a form counts only if its
predictions agree with those of float32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from maskwright.errors import MaskwrightError
from maskwright.evaluation.speed import largest_resident

_FILES = {"ONNX Runtime": "model.onnx", "OpenVINO": "model.xml", "OpenVINO bfloat16": "model.xml"}
_AGREE = 0.95  # fraction of the objects that a form has to predict alike


def measure_footprint(weights: str | Path, images: Sequence[Path], timeout: float = 600.0) -> dict[str, Any]:
    """Measure in another process.

    Args:
        weights: The file.
        images: Image files; the first one warms up.
        timeout: Seconds after which the process is ended.

    Returns:
        "ms" (median time per image from the decoded image to masks at its own size), "MB" (largest resident memory of
        a process that only predicts in this form),
        "form" and "forms" (milliseconds of each form); only "error" if it could not be measured.
    """
    command = [sys.executable, "-m", "maskwright.comparison.footprint", str(weights), *map(str, images)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not measured within {timeout:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"the process ended with {done.returncode}"}


def _main(weights: str, images: Sequence[str]) -> dict[str, Any]:
    from maskwright.data import read_image

    pixels = [read_image(path) for path in images]
    timed: dict[str, float] = {}
    expected: list[Any] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for form, load in _forms(weights, images, folder):
            try:
                system, dtype = load()
            except MaskwrightError:  # cannot be exported, or is not equal
                continue
            found, milliseconds = _timed(system, pixels, dtype)
            expected = expected or found
            if form == "float32" or _alike(expected, found) >= _AGREE:
                timed[form] = milliseconds
        best = min(timed, key=lambda form: timed[form])
        # In a process of its own, which has not exported anything.
        file = folder / _FILES[best] if best in _FILES else weights
        memory = _resident(file, "bfloat16" if best.endswith("bfloat16") else "float32", images)
    return {"ms": timed[best], "MB": memory, "form": best, "forms": timed}


def _forms(weights: str, images: Sequence[str], folder: Path) -> Iterator[tuple[str, Callable[[], tuple[Any, str]]]]:
    """The forms of a system that this machine and the installed extras can compute, and how to load each."""
    from maskwright.checkpoints import load
    from maskwright.ops.precision import has_bfloat16

    exportable = Path(weights).suffix == ".safetensors"
    yield "float32", lambda: (load(weights), "float32")
    fast = has_bfloat16(torch.device("cpu"))
    if fast and exportable:
        yield "bfloat16", lambda: (load(weights), "bfloat16")
    if exportable and find_spec("onnxruntime") and find_spec("onnxscript"):
        yield "ONNX Runtime", lambda: (load(_exported(weights, folder / _FILES["ONNX Runtime"], images[0])), "float32")
    if exportable and find_spec("openvino") and find_spec("onnxscript"):
        yield "OpenVINO", lambda: (load(_exported(weights, folder / _FILES["OpenVINO"], images[0])), "float32")
        if fast:
            yield "OpenVINO bfloat16", lambda: (load(folder / _FILES["OpenVINO"]), "bfloat16")


def _exported(weights: str, path: Path, image: str) -> Path:
    from maskwright.inference.exporting import export

    export(weights, path, image=image)
    return path


def _timed(system: Any, images: Sequence[Any], dtype: str) -> tuple[list[Any], float]:
    """The objects of each image, and the median milliseconds per image without the first."""
    from maskwright.inference import predict

    found: list[Any] = []
    seconds: list[float] = []
    for image in images:
        start = time.perf_counter()
        found.append(cast(Any, predict)(system, image, dtype=dtype, score_threshold=0.3).instances)
        seconds.append(time.perf_counter() - start)
    return found, 1000 * statistics.median(seconds[1:] or seconds)


def _alike(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """Fraction of the objects for which there is one of the same class with IoU of at least 0.8; 1 without objects."""
    total = sum(max(len(a), len(b)) for a, b in zip(expected, found, strict=True))
    good = 0
    for a, b in zip(expected, found, strict=True):
        if len(a) and len(b):
            iou = a.masks.iou(b.masks) if a.masks is not None else _box_iou(a.boxes, b.boxes)
            good += int(((iou >= 0.8) & (a.labels[:, None] == b.labels[None])).any(1).sum())
    return good / total if total else 1.0


def _box_iou(a: Any, b: Any) -> Any:
    from maskwright.ops.boxes import pairwise_iou

    return pairwise_iou(a, b)


def _resident(weights: str | Path, dtype: str, images: Sequence[str]) -> float | None:
    """Largest resident memory in MB of a process that loads a file and predicts; None if it cannot be measured."""
    command = [sys.executable, "-m", "maskwright.comparison.footprint", "--resident", dtype, str(weights), *images]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def _predict_alone(dtype: str, weights: str, images: Sequence[str]) -> float | None:
    from maskwright.checkpoints import load
    from maskwright.data import read_image

    _timed(load(weights), [read_image(path) for path in images], dtype)
    most = largest_resident()
    return None if most is None else most / (1 << 20)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if sys.argv[1] == "--resident":
            answer = _predict_alone(sys.argv[2], sys.argv[3], sys.argv[4:])
        else:
            answer = _main(sys.argv[1], sys.argv[2:])
    except MaskwrightError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
