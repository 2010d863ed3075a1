"""Files of MXNet: arrays and names of every version of the format; damaged files are refused."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from maskwright.checkpoints import read_state
from maskwright.checkpoints.mxnet import FIRST, SECOND, THIRD
from maskwright.errors import CheckpointError
from tests.parity.weights import mxnet_file

KINDS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
STATE = {
    "arg:conv_weight": np.arange(24, dtype="float32").reshape(4, 3, 2, 1),
    "aux:mean": np.array([0.5, -1.5], "float64"),
    "arg:half": np.array([[1, 2, 3]], "float16"),
    "arg:counts": np.array([7, -7], "int64"),
}


def written(version: int | None, state: dict[str, np.ndarray] = STATE, kind: int = 0) -> bytes:
    """The arrays in a version of the format; None is the oldest."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(state))]
    for array in state.values():
        if version is not None:
            parts.append(struct.pack("<I", version))
        if version in (SECOND, THIRD):
            parts.append(struct.pack("<i", kind))
        sizes = "I" if version is None else "q"
        parts.append(struct.pack(f"<I{array.ndim}{sizes}", array.ndim, *array.shape))
        parts.append(struct.pack("<iii", 1, 0, KINDS[array.dtype.name]) + array.tobytes())
    parts.append(struct.pack("<Q", len(state)))
    parts.extend(struct.pack("<Q", len(name)) + name.encode() for name in state)
    return b"".join(parts)


@pytest.mark.fast
@pytest.mark.parametrize("version", [None, FIRST, SECOND, THIRD])
def test_arrays_of_every_version_are_read(version: int | None, tmp_path: Path):
    path = tmp_path / "fcis_coco-0000.params"
    path.write_bytes(written(version))
    state, about = read_state(path)
    assert about["format"] == "mxnet"
    assert state.keys() == STATE.keys()
    for name, array in STATE.items():
        assert torch.equal(state[name], torch.from_numpy(array))
        assert state[name].dtype == torch.from_numpy(array).dtype


@pytest.mark.fast
def test_the_writer_of_the_recordings_has_the_same_format(tmp_path: Path):
    path = tmp_path / "x.params"
    path.write_bytes(mxnet_file({"arg:conv_weight": STATE["arg:conv_weight"]}))
    assert torch.equal(read_state(path)[0]["arg:conv_weight"], torch.from_numpy(STATE["arg:conv_weight"]))


@pytest.mark.fast
@pytest.mark.parametrize("version", [None, SECOND])
def test_damaged_files_are_refused_with_a_sentence(version: int | None, tmp_path: Path):
    path, data = tmp_path / "x.params", written(version)
    for end in range(16, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|does not write"):
            read_state(path)
    generator = np.random.RandomState(0)
    for _ in range(200):
        changed = bytearray(data)
        changed[generator.randint(16, len(data))] = generator.randint(256)
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            read_state(path)


@pytest.mark.fast
def test_sparse_arrays_and_lists_without_names_are_refused(tmp_path: Path):
    path = tmp_path / "x.params"
    path.write_bytes(written(SECOND, kind=1))
    with pytest.raises(CheckpointError, match="array 0 is sparse"):
        read_state(path)
    unnamed = written(FIRST, {"a": STATE["aux:mean"]})
    path.write_bytes(unnamed[: -8 - 8 - 1] + struct.pack("<Q", 0))
    with pytest.raises(CheckpointError, match="has 1 arrays and 0 names"):
        read_state(path)
