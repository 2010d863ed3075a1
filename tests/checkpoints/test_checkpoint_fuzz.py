"""Damaged files of every format are either read or raise a CheckpointError, quickly."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from maskwright.checkpoints import read_state
from maskwright.errors import CheckpointError


def written(kind: str, path: Path) -> bytes:
    state = {"layer.weight": torch.randn(3, 4), "layer.bias": torch.randn(3), "count": torch.tensor(2)}
    if kind == "safetensors":
        save_file(state, path)
    elif kind.startswith("pickle"):
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=int(kind[-1])))
    else:
        torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["safetensors", "pickle-0", "pickle-2", "pickle-4", "pickle-5", "zip", "legacy"])
def test_damaged_files_raise_checkpoint_errors_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.pkl"
    whole = written(kind, path)
    draw = random.Random(kind)
    refused = 0
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(len(damaged))
            if draw.random() < 0.2:
                del damaged[place : place + draw.randrange(1, 9)]
            else:
                damaged[place] = draw.randrange(256)
        path.write_bytes(damaged)
        words = ""
        try:
            state, _ = read_state(path)
        except CheckpointError as error:
            words = str(error)
        refused += bool(words)
        assert (str(path) in words and len(words) < 700) or all(isinstance(v, torch.Tensor) for v in state.values())
    assert refused > 20


NUMBERS = hnp.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<f2", ">f4", "<i8", "<i4", "|u1", "|b1"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.integers(0, 1),
)


@given(arrays=st.dictionaries(st.text(min_size=1), NUMBERS, min_size=1), protocol=st.integers(0, 5))
def test_any_arrays_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], protocol: int
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
    state, _ = read_state(path)
    assert len(state) == len(arrays)
    for (key, array), value in zip(arrays.items(), state.values(), strict=True):
        assert tuple(value.shape) == array.shape, key
        np.testing.assert_array_equal(value.numpy(), array)
