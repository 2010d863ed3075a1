"""Latency and memory of weights, measured in a process of its own: `python -m maskwright.comparison.footprint`.

The forms that this machine can run are tried, and a form counts only if its predictions agree with those of float32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError

_AGREE = 0.95  # fraction of the objects that a form has to predict alike


def measure_footprint(weights: str | Path, images: Sequence[Path], timeout: float = 600.0) -> dict[str, Any]:
    """Measure in another process.

    Args:
        weights: The file.
        images: Image files; the first one warms up.
        timeout: Seconds after which the process is ended.

    Returns:
        "ms" (median time per image from the decoded image to masks at its own size), "MB" (largest resident memory),
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


def forms() -> list[str]:
    """The types of weights and activations that this machine computes in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        flags = []
    return ["float32", *(["bfloat16"] if {"avx512_bf16", "amx_bf16"} & set(flags) else [])]


def _main(weights: str, images: Sequence[str]) -> dict[str, Any]:
    from maskwright.checkpoints import load
    from maskwright.data import read_image
    from maskwright.inference import predict

    system = load(weights)
    pixels = [read_image(path) for path in images]
    timed: dict[str, float] = {}
    expected: list[Any] = []
    for form in forms():
        found: list[Any] = []
        seconds: list[float] = []
        for image in pixels:
            start = time.perf_counter()
            found.append(predict(system, image, dtype=form, score_threshold=0.3).instances)
            seconds.append(time.perf_counter() - start)
        expected = expected or found
        if form == "float32" or _alike(expected, found) >= _AGREE:
            timed[form] = 1000 * statistics.median(seconds[1:] or seconds)
    best = min(timed, key=lambda form: timed[form])
    return {"ms": timed[best], "MB": _resident(), "form": best, "forms": timed}


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


def _resident() -> float | None:
    """Largest resident memory of this process in MB; None if it cannot be measured."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20) if sys.platform == "darwin" else most / 1024


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        answer = _main(sys.argv[1], sys.argv[2:])
    except MaskwrightError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
