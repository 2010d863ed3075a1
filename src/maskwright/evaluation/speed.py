"""Time and memory of a system, per network and for the arithmetic between them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from maskwright.evaluation.result import Speed
from maskwright.systems import System

ARITHMETIC = "arithmetic"  # what is computed between and after the networks: proposals, suppression, pasting of masks


@dataclass
class Stopwatch:
    """Measures batches of images: each network of the system by itself, and what remains.

    On a GPU every measurement waits for the device, which costs a little where networks are small.

    Attributes:
        device: Where the system computes.
    """

    device: torch.device
    _images: list[int] = field(default_factory=list[int])
    _batches: list[dict[str, float]] = field(default_factory=list[dict[str, float]])  # seconds of each batch, by stage
    _running: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    _current: dict[str, float] = field(default_factory=dict[str, float])
    _begun: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def watching(self, system: System) -> Generator[None]:
        """Times the networks of `system` within the block; they must not be called by two threads at once."""
        handles: list[RemovableHandle] = []
        for name, network in system.networks().items():
            handles.append(network.register_forward_pre_hook(self._starts(name)))
            handles.append(network.register_forward_hook(self._ends, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def batch(self, images: int) -> Generator[None]:
        """One batch of images. Batches within a batch are parts of it, for example tiles of one image."""
        if self._running:  # inside another batch
            yield
            return
        begin = self._now()
        self._current, self._running = {}, [(ARITHMETIC, begin)]
        try:
            yield
        finally:
            self._running = []
        total = self._now() - begin
        self._current[ARITHMETIC] = total - sum(self._current.values())
        self._batches.append(self._current)
        self._images.append(images)

    def _starts(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if self._running:
                self._running.append((name, self._now()))

        return hook

    def _ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if len(self._running) < 2:
            return
        name, begin = self._running.pop()
        if len(self._running) == 1:  # a network within a network belongs to the outer one
            self._current[name] = self._current.get(name, 0.0) + self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def speed(self, parameters: int) -> Speed:
        """The measured speed. The first batch warms up caches and compiles; it is left out if there are others."""
        if not self._images:
            return Speed(parameters=parameters)
        skip = 1 if len(self._images) > 1 else 0
        counts = np.array(self._images[skip:])
        names = [n for n in dict.fromkeys(n for b in self._batches for n in b) if n != ARITHMETIC]
        stages = {
            name: 1000 * np.array([b.get(name, 0.0) for b in self._batches[skip:]]) / counts
            for name in (*names, ARITHMETIC)
        }
        each = np.repeat(np.sum(list(stages.values()), axis=0), counts)
        return Speed(
            milliseconds=float(np.median(each)),
            milliseconds_p90=float(np.quantile(each, 0.9)),
            images_per_second=float(sum(self._images) / (time.perf_counter() - self._begun)),
            stages={name: float(np.average(values, weights=counts)) for name, values in stages.items()},
            peak_memory=_peak(self.device),
            parameters=parameters,
        )


def _peak(device: torch.device) -> int | None:
    """Peak memory in bytes, of the GPU or of this process since it began; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return largest_resident() if device.type == "cpu" else None


def largest_resident() -> int | None:
    """Largest resident memory of this process since it began, in bytes; None if it is not known."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `getrusage` includes the memory of the process that started this one
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
