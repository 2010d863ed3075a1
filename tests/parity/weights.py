"""Reproducible weights for a checkpoint layout, written to disk as the original's own kind of file.

A layout lists keys and shapes; each value depends on its key, its shape and a seed alone. So a checkpoint of hundreds
of megabytes is a few kilobytes here, and two programmes that never met hold the same one.
"""

from __future__ import annotations

import fnmatch
import json
import math
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch


def value(key: str, shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """The entry `key`: normal noise scaled to keep activations alive; norms near one; counters zero."""
    if not kind.startswith(("float", "bfloat")):
        return np.zeros(shape, "int64")
    stream = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    noise = np.asarray(stream.standard_normal(shape or None), "float32")
    if key.endswith("running_var"):
        return (1 + 0.25 * np.tanh(noise)).astype("float32")
    if len(shape) >= 2:
        return (noise * math.sqrt(1 / max(1, math.prod(shape[1:])))).astype("float32")
    if key.endswith("weight") or not shape:
        return (1 + 0.1 * noise).astype("float32")
    return (0.1 * noise).astype("float32")


def write_checkpoint(layout: Path, folder: Path, seed: int = 0, overrides: dict[str, Any] | None = None) -> Path:
    """The layout filled with `seed`, as a file like the published one: a pickle of arrays, or a torch file.

    `overrides`: key, or pattern with `*` -> a number or nested list, broadcast to the shape, that replaces the values.
    """
    about = json.loads(layout.read_text())
    state = {k: value(k, tuple(shape), kind, seed) for k, (shape, kind) in about["tensors"].items()}
    fixup = about.get("fill_fixup", "")
    for ending, more in re.findall(r"(?:keys ending |\*)(\S+) \+= ([\d.]+)", fixup):
        state |= {k: v + np.float32(more) for k, v in state.items() if k.endswith(ending)}
    for ending in re.findall(r"\*(\S+) = 1 \+ 0\.25\*tanh\(10\*v\)", fixup):
        state |= {k: (1 + 0.25 * np.tanh(10 * v)).astype("float32") for k, v in state.items() if k.endswith(ending)}
    for key, factor in re.findall(r"(\S+) \*= ([\d.]+)", fixup):
        state[key] = state[key] * np.float32(factor)
    for pattern, given in (overrides or {}).items():
        keys = fnmatch.filter(state, pattern)
        if not keys:
            raise KeyError(pattern)
        for key in keys:
            state[key] = np.broadcast_to(np.asarray(given, state[key].dtype), state[key].shape).copy()
    wrapper = about.get("wrapper", "")
    if wrapper.startswith("pickle"):
        path = folder / f"{layout.stem}.pkl"
        path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
        return path
    if wrapper.startswith("MXNet"):
        path = folder / f"{layout.stem}-0000.params"
        path.write_bytes(mxnet_file(state))
        return path
    path = folder / f"{layout.stem}.pth"
    tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in state.items()}
    torch.save({"model": tensors} if wrapper.startswith("{'model'") else tensors, path)
    return path


def mxnet_file(state: dict[str, np.ndarray]) -> bytes:
    """The arrays as MXNet 0.9 to 0.12 saved them, in float32."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(state))]
    for array in state.values():
        parts.append(struct.pack(f"<II{array.ndim}qiii", 0xF993FAC8, array.ndim, *array.shape, 1, 0, 0))
        parts.append(np.ascontiguousarray(array, "<f4").tobytes())
    parts.append(struct.pack("<Q", len(state)))
    parts.extend(struct.pack("<Q", len(name)) + name.encode() for name in state)
    return b"".join(parts)
