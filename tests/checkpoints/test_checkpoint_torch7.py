"""Files of Torch 7: networks become flat state dicts, damaged files are refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskwright as mw
from maskwright.checkpoints.budget import Budget
from maskwright.checkpoints.reading import read_state
from maskwright.checkpoints.torch7 import LuaObject, _Walk
from maskwright.errors import CheckpointError
from tests.parity.weights import value

pytestmark = pytest.mark.fast
LAYOUT = Path(__file__).parents[1] / "parity" / "layouts" / "deepmask-r50.json"


class Writer:
    """Lua values in the format of Torch 7: a tag, then the content."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.count = 0

    def number(self) -> bytes:
        self.count += 1
        return struct.pack("<i", self.count)

    def text(self, text: str) -> bytes:
        return struct.pack("<i", len(text)) + text.encode()

    def write(self, thing: Any) -> Writer:
        if thing is None:
            self.parts.append(struct.pack("<i", 0))
        elif isinstance(thing, bool):
            self.parts.append(struct.pack("<ii", 5, thing))
        elif isinstance(thing, int | float):
            self.parts.append(struct.pack("<id", 1, thing))
        elif isinstance(thing, str):
            self.parts.append(struct.pack("<i", 2) + self.text(thing))
        elif isinstance(thing, dict):
            self.parts.append(struct.pack("<i", 3) + self.number() + struct.pack("<i", len(thing)))
            for key, inner in thing.items():
                self.write(key).write(inner)
        elif isinstance(thing, np.ndarray):
            array = np.ascontiguousarray(thing, "<f4")
            strides = [s // 4 for s in array.strides]
            self.parts.append(
                struct.pack("<i", 4) + self.number() + self.text("V 1") + self.text("torch.FloatTensor")
                + struct.pack(f"<i{2 * array.ndim}qq", array.ndim, *array.shape, *strides, 1)
                + struct.pack("<i", 4) + self.number() + self.text("V 1") + self.text("torch.FloatStorage")
                + struct.pack("<q", array.size) + array.tobytes()
            )  # fmt: skip
        else:
            kind, fields = thing
            self.parts.append(struct.pack("<i", 4) + self.number() + self.text("V 1") + self.text(kind))
            self.write(fields)
        return self

    def bytes(self) -> bytes:
        return b"".join(self.parts)


def modules(state: dict[str, Any]) -> Any:
    """Names such as "5.1.weight" as the containers that they come from, with modules without parameters between."""
    plain = {k: v for k, v in state.items() if "." not in k}
    if plain:
        return ("nn.Layer", {**plain, "gradWeight": np.zeros(3), "train": False, "output": None})
    numbers = sorted({int(k.split(".")[0]) for k in state})
    inner = {
        n: modules({k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{n}.")})
        if n in numbers
        else ("nn.ReLU", {"inplace": True, "val": 0.5})
        for n in range(1, numbers[-1] + 1)
    }
    return ("nn.Sequential", {"modules": inner, "train": False})


def narrow() -> dict[str, np.ndarray]:
    state = {}
    for key, (shape, kind) in json.loads(LAYOUT.read_text())["tensors"].items():
        own = [512, 1600] if key == "trunk.12.weight" else shape
        state[key] = value(key, tuple(n // 8 if n in (64, 128, 256, 512, 1024) else n for n in own), kind, 0)
    return state


def model(state: dict[str, np.ndarray]) -> bytes:
    parts = {}
    for name in ("trunk", "maskBranch", "scoreBranch"):
        parts[name] = modules({k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{name}.")})
    criterion = ("nn.SoftMarginCriterion", {"weight": np.ones(3), "sizeAverage": True})
    content = {
        "model": ("nn.DeepMask", {**parts, "km": 32, "criterion": criterion}),
        "config": {"iSz": 160, "name": "x"},
    }
    return Writer().write(content).bytes()


@pytest.mark.thorough
def test_the_released_network_is_read_from_its_own_kind_of_file(tmp_path):
    state = narrow()
    (tmp_path / "model.t7").write_bytes(model(state))
    read, about = read_state(tmp_path / "model.t7")
    assert about["format"] == "torch7"
    assert {k: v.shape for k, v in read.items() if not k.startswith("criterion")} == {
        k: torch.Size(v.shape) for k, v in state.items()
    }
    assert all(np.array_equal(read[k].numpy(), v) for k, v in state.items())
    system = mw.load(tmp_path / "model.t7")
    assert system.name == "deepmask"
    assert system.options["border"] == "symmetric"
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "flat.pth")
    other = mw.load(tmp_path / "flat.pth").state_dict()
    assert all(torch.equal(v, other[k]) for k, v in system.state_dict().items())


def test_repeated_objects_are_shared_and_functions_are_skipped(tmp_path):
    array = Writer().write(np.arange(6.0).reshape(2, 3)).bytes()
    again = struct.pack("<ii", 4, 2)  # the object with the number 2, which the tensor has
    function = struct.pack("<ii", 8, 9) + struct.pack("<i", 4) + b"\x1bLua" + struct.pack("<iii", 3, 10, 0)
    fields = {"weight": array, "bias": again, "forward": function}
    parts = [struct.pack("<ii", 4, 20), Writer().text("V 1"), Writer().text("nn.Linear"), struct.pack("<iii", 3, 21, 3)]
    for name, content in fields.items():
        parts += [struct.pack("<i", 2), Writer().text(name), content]
    data = b"".join(parts).replace(struct.pack("<ii", 4, 1), struct.pack("<ii", 4, 2), 1)
    storage = Writer().text("V 1") + Writer().text("torch.FloatStorage")
    data = data.replace(struct.pack("<ii", 4, 2) + storage, struct.pack("<ii", 4, 3) + storage)
    head = struct.pack("<iii", 3, 30, 1) + struct.pack("<i", 2) + Writer().text("layer")
    (tmp_path / "x.t7").write_bytes(head + data)
    read, _ = read_state(tmp_path / "x.t7")
    assert torch.equal(read["layer.weight"], torch.arange(6.0).view(2, 3))
    assert torch.equal(read["layer.bias"], read["layer.weight"])


@pytest.mark.thorough
def test_files_that_are_cut_short_or_damaged_are_refused_in_words(tmp_path):
    data = model(narrow())
    path = tmp_path / "x.t7"
    rng = np.random.default_rng(0)
    for length in (4, 8, 40, 200, *rng.integers(0, len(data), 4).tolist()):
        path.write_bytes(data[:length])
        with pytest.raises(
            CheckpointError, match=r"truncated or damaged|does not write|expected a Torch 7|is empty|unsupported file"
        ):
            read_state(path)
    for _ in range(12):
        broken = bytearray(data)
        for place in rng.integers(4, 3000, 3):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):
            read_state(path)
    path.write_bytes(struct.pack("<iii", 3, 1, 2**31 - 1))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_state(path)
    path.write_bytes(b"".join(struct.pack("<iii", 3, n, 1) + struct.pack("<id", 1, 1) for n in range(1, 400)))
    with pytest.raises(CheckpointError, match="nested more than 64 deep"):
        read_state(path)


def test_a_module_that_occurs_very_often_is_refused():
    module = LuaObject("nn.ReLU")
    for _ in range(40):  # each level holds the one below it twice: 2 ** 40 places
        module = LuaObject("nn.Sequential", {"modules": {1: module, 2: module}})
    with pytest.raises(CheckpointError, match=r"x\.t7: its containers repeat one another far more often"):
        _Walk(Budget.for_size("x.t7", 4000)).visit(module, "", frozenset())
