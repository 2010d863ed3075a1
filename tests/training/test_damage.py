"""Damaged files of a run: every changed bit of a checkpoint is noticed, every entry of another type is named."""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.checkpoints.building import compare_with_meta
from maskwright.errors import CheckpointError, MaskwrightError, TrainingError, UsageError
from maskwright.systems import describe
from maskwright.training import Recipe, load_batch
from maskwright.training.state import load_state, save_state
from tests.training.test_resume import same
from tests.training.tiny_system import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(folder, epochs=1)
    return folder


def test_every_flipped_bit_is_noticed(run: Path, tmp_path: Path):
    whole = (run / "last.ckpt").read_bytes()
    size, chance = len(whole), random.Random(0)
    ends = [0, 1, 5, size - 1, size - 40, size - 64, size - 65, size - 70, size - 82, size - 83, size - 84, size - 100]
    for place in [*ends, *(chance.randrange(size) for _ in range(200))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "last.ckpt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"last.ckpt: (damaged|not the checkpoint)"):
            load_state(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="damaged: its content does not match its checksum; remove it to start"):
        fit(tmp_path, resume=True)


@pytest.mark.parametrize("cut", [1, 64, 82, 200, -1], ids=["byte", "digest", "seal", "end", "longer"])
def test_another_length_is_noticed(run: Path, tmp_path: Path, cut: int):
    whole = (run / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[:-cut] if cut > 0 else whole + b"\n")
    with pytest.raises(CheckpointError, match=r"last.ckpt: (damaged|not the checkpoint)"):
        load_state(tmp_path / "last.ckpt")


def test_the_seal_does_not_change_what_is_read(run: Path, tmp_path: Path):
    state = load_state(run / "last.ckpt")
    assert "sealed" not in state
    save_state(tmp_path / "again.ckpt", state)
    same(load_state(tmp_path / "again.ckpt"), state)
    assert torch.load(run / "last.ckpt", weights_only=True)["format"] == "maskwright-run", "torch reads it too"
    # Earlier versions wrote no checksum; torch's own of each entry are compared then.
    torch.save(state, tmp_path / "old.ckpt")
    same(load_state(tmp_path / "old.ckpt"), state)
    old = bytearray((tmp_path / "old.ckpt").read_bytes())
    weight = state["model"]["head.weight"].numpy().tobytes()
    old[old.index(weight) + 5] ^= 1
    (tmp_path / "old.ckpt").write_bytes(old)
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(tmp_path / "old.ckpt")


def test_a_kept_batch_is_compared_too(tmp_path: Path):
    save_state(tmp_path / "batch.pt", {"format": "maskwright-batch", "images": torch.zeros(4000)})
    damaged = bytearray((tmp_path / "batch.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 8
    (tmp_path / "batch.pt").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"batch.pt: damaged"):
        load_batch(tmp_path / "batch.pt")
    save_state(tmp_path / "batch.pt", {"format": "maskwright-batch", "images": 3})
    with pytest.raises(CheckpointError, match=r"batch.pt: holds an invalid entry"):
        load_batch(tmp_path / "batch.pt")


VALUES: list[Any] = [None, True, -1, 3, 2.5, float("nan"), 10**30, "", "x", b"x", [], ["a"], {}, {"a": 1}, {1: 2},
                     torch.zeros(2), torch.zeros(0, dtype=torch.int64)]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*place, key))


def changed(state: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return state


def test_entries_of_other_types_are_sentences(run: Path, tmp_path: Path):
    state = load_state(run / "last.ckpt")
    cases = [(place, value) for place in places(state) for value in [*VALUES, KeyError]]
    said = 0
    for place, value in random.Random(1).sample(cases, 150):
        save_state(tmp_path / "last.ckpt", changed(state, place, value))
        try:
            fit(tmp_path, resume=True, epochs=1)
        except MaskwrightError:
            said += 1
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}: {error!r}") from error
    assert said > 50


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("progress", "step"), "3", "step must be an integer, got '3'"),
        (("model",), {}, "Missing key"),
        (("model", "head.weight"), torch.zeros(3), "size mismatch"),
        (("model", "head.weight"), 3, "head.weight must be a tensor, got int"),
        (("optimizer", "state", "head.weight"), [], "optimizer.state of 'head.weight' must be a mapping"),
        (("optimizer", "state", "head.weight", "exp_avg"), torch.zeros(2), "exp_avg of head.weight has the shape"),
        (("recipe", "batch"), "many", "batch must be an integer, got 'many'"),
        (("logs", "csv"), -5, "logs.csv must be a length in bytes, got -5"),
        (("preprocess",), KeyError, "preprocess is missing"),
        (("average",), {"updates": 3}, "average.model is missing"),
    ],
)
def test_the_entry_is_named(run: Path, tmp_path: Path, place: tuple[str, ...], value: Any, words: str):
    save_state(tmp_path / "last.ckpt", changed(load_state(run / "last.ckpt"), place, value))
    with pytest.raises(CheckpointError, match=r"last.ckpt: holds an invalid entry") as caught:
        fit(tmp_path, resume=True, epochs=1)
    assert words in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"neck_width": 1 << 30}, "option 'neck_width' in its header is 1073741824, which is out of range"),
        ({"neck_width": 1 << 19}, "a system with its options needs"),
        ({"neck_width": 64}, r"is \(256, .*, but has the shape \(64, "),
        ({"neck_width": -1}, "neck_width must be at least 1, got -1"),
    ],
)
def test_options_in_a_checkpoint_are_compared_with_its_weights_before_memory_is_allocated(
    changes: dict[str, Any], words: str | None
):
    system = describe("solov2")
    state, options = system.state_dict(), {**system.options, **changes}
    if words is None:
        compare_with_meta(type(system), options, state, "last.ckpt")
        return
    with pytest.raises(CheckpointError, match=words):
        compare_with_meta(type(system), options, state, "last.ckpt")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"batch": {}}', "batch must be an integer"),
        (b'{"lr": NaN}', "lr must be finite"),
        (b'{"betas": [0.9]}', "betas must be two numbers"),
        (b'{"rates": {"backbone": "x"}}', "rates must be numbers"),
        (b'{"epochs": 1' + b"0" * 400 + b"}", "epochs must be finite"),
        (b"[" * 100_000, "must be a JSON object"),
        (b"", "must be a JSON object"),
    ],
    ids=["bytes", "list", "object", "nan", "short", "text", "huge", "deep", "empty"],
)
def test_a_damaged_recipe_is_a_sentence(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe.json: is not a recipe: ") as caught:
        Recipe.load(tmp_path / "recipe.json")
    assert words in str(caught.value)
    with pytest.raises(UsageError, match=r"recipe.json: is not a recipe: "):
        fit(tmp_path, resume=True)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full (no space left on device)"), (errno.EDQUOT, "the disk quota is used up"),
     (errno.EFBIG, "the disk is full or the file exceeds a size limit"), (errno.EIO, "Input/output error")],
)  # fmt: skip
def test_why_a_checkpoint_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
):
    import os

    from maskwright.training import state as module

    save_state(tmp_path / "last.ckpt", {"a": torch.zeros(10)})
    before = (tmp_path / "last.ckpt").read_bytes()
    count = 0

    def put(self: Any, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module._Sealing, "_put", put)
    with pytest.raises(TrainingError) as caught:
        save_state(tmp_path / "last.ckpt", {"a": torch.ones(10)})
    assert str(caught.value).startswith(f"{tmp_path / 'last.ckpt'}: cannot be written: {words}")
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before
