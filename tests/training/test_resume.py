"""An interrupted run that goes on is the uninterrupted run, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from maskwright.errors import CheckpointError, TrainingError, UsageError
from maskwright.training.state import load_state
from tests.training.test_run import Numbers, rows, weights
from tests.training.tiny_system import Shapes, Tiny, fit

SLOW_PICTURE = 0.02  # seconds, so that a kill falls into an epoch


def same(one: Any, other: Any, place: str = "state") -> None:
    """Equal to the last bit, all the way down."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            same(one[key], other[key], f"{place}.{key}")
    else:
        assert one == other, place


def same_runs(one: Path, other: Path) -> None:
    """Weights, their mean, the optimizer, the progress and every logged number but the times."""
    states = [load_state(folder / "last.ckpt") for folder in (one, other)]
    for state in states:
        state.pop("logs")  # lengths: times have as many digits as they like
        state["recipe"].pop("save_minutes")
        state["progress"]["sums"].pop("time", None)
    same(*states)
    logs = [[row for row in rows(folder) if not row[2].startswith("time/")] for folder in (one, other)]
    assert logs[0] == logs[1]
    same(kept(one), kept(other), "best.safetensors")


def kept(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "best.safetensors", "pt") as file:  # its keys are stored in no particular order
        return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in sorted(file.keys())}}


def victim(out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    fit(out, data=Shapes(22, delay=SLOW_PICTURE), resume=resume)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    kills = 0
    checkpoint = tmp_path / "killed" / "last.ckpt"
    for number in range(3):
        process = context.Process(target=victim, args=(tmp_path / "killed", number > 0))
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process.start()
        deadline = time.monotonic() + 120
        while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before) and process.is_alive():
            assert time.monotonic() < deadline, "the child never saved"
            time.sleep(0.005)
        time.sleep(random.Random(number).uniform(0, 0.25))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 2
    assert load_state(checkpoint)["progress"]["step"] < 12, "the last kill came too late to prove anything"
    fit(tmp_path / "killed", resume=True)
    fit(tmp_path / "whole")
    same_runs(tmp_path / "killed", tmp_path / "whole")


class Interrupting(Numbers):
    """Presses Ctrl-C in the middle of step 8."""

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def heard():
    """Ctrl-C as at a terminal: what starts tests in the background may have told them to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 8; resume the run in .*run with resume=True"):
        fit(tmp_path / "run", logger=Interrupting(), save_minutes=60)
    assert "stopping after this step; press Ctrl-C again to stop at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"] == 8
    fit(tmp_path / "run", resume=True, save_minutes=60)
    said = capsys.readouterr().err
    assert "resuming from step 8 of 12" in said
    assert "changed" not in said
    fit(tmp_path / "whole")
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_what_was_logged_after_the_checkpoint_is_cut_off(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", logger=Interrupting(), jsonl=True)
    for name, text in (("log.csv", "9,1,train/loss,7\n10,1,train/lo"), ("log.jsonl", '{"step": 9')):
        with (tmp_path / "run" / name).open("a") as file:
            file.write(text)
    fit(tmp_path / "run", resume=True, jsonl=True)
    fit(tmp_path / "whole", jsonl=True)
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_run_draws_nothing_from_the_process_it_runs_in(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", logger=Interrupting())
    torch.manual_seed(99)
    random.seed(99)
    torch.rand(17)
    # The weights come from the file, whatever the system was made with.
    fit(tmp_path / "run", resume=True, system_seed=77)
    fit(tmp_path / "whole")
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_changed_option_is_applied_and_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", logger=Interrupting())
    capsys.readouterr()
    fit(tmp_path / "run", resume=True, lr=0.5, epochs=4, batch=4, schedule="constant")
    said = capsys.readouterr().err
    for line in ("epochs: 2 -> 4", "batch: 2 -> 4", "lr: 0.01 -> 0.5", "schedule: cosine -> constant"):
        assert f"changed since the run began: {line}" in said
    rates = {s: v for s, _, n, v in rows(tmp_path / "run") if n == "lr"}
    assert rates[8] < 0.01
    assert rates[10] == 0.5
    # With batches of 4 an epoch has 6, that is 3 steps. Eight images of epoch 1 were seen: of its steps two are left,
    # then come two epochs.
    last = load_state(tmp_path / "run" / "last.ckpt")
    assert (last["progress"]["step"], last["progress"]["epoch"], last["progress"]["seen"]) == (8 + 2 + 2 * 3, 4, 0)
    assert last["recipe"]["lr"] == 0.5


def test_another_optimizer_or_freezing_can_be_changed_to(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", logger=Interrupting())
    before = weights(tmp_path / "run")
    fit(tmp_path / "run", resume=True, freeze=("backbone",), optimizer="sgd", lr=1e-3)
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("backbone"))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path):
    best = fit(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != "last.ckpt"}
    assert fit(tmp_path / "run", resume=True) == best
    assert {p: p.read_bytes() for p in before} == before


def test_a_run_folder_is_not_overwritten(tmp_path: Path):
    fit(tmp_path / "run", epochs=1)
    with pytest.raises(
        UsageError, match=r"run already holds a run; resume it \(resume=True, --resume\) or give another folder"
    ):
        fit(tmp_path / "run")


def test_resuming_what_never_saved_starts_anew_with_its_recipe(tmp_path: Path):
    fit(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text((tmp_path / "whole" / "recipe.json").read_text())
    (tmp_path / "run" / "log.csv").write_text("step,epoch,name,value\n2,0,train/loss,5.0\n")
    fit(tmp_path / "run", resume=True)
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_network_cannot_change_within_a_run(tmp_path: Path):
    fit(tmp_path / "run", epochs=1)
    with pytest.raises(UsageError, match="the run trains tiny with other options; resume it with the same system"):
        fit(tmp_path / "run", resume=True, system=Tiny(("red", "green"), width=4))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"\x80\x02}q\x00."], ids=["empty", "torn", "other"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last.ckpt: not the checkpoint of an interrupted run"):
        fit(tmp_path, resume=True)


def test_a_checkpoint_that_wants_to_run_code_does_not(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": "maskwright-run", "model": Trap()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="not the checkpoint of an interrupted run"):
        fit(tmp_path, resume=True)
    assert not (tmp_path / "sprung").exists()


class Filling(Numbers):
    """At step 8 the disk is full: no file may grow beyond what a log needs."""

    def log(self, step: int, values: dict[str, float]) -> None:
        super().log(step, values)
        if step == 8:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path: Path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            TrainingError, match=r"last.ckpt: cannot be written: the disk is full .* Existing files are unchanged"
        ):
            fit(tmp_path / "run", logger=Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"] == 7
    assert not list((tmp_path / "run").glob("*.part"))
    fit(tmp_path / "run", resume=True)
    fit(tmp_path / "whole")
    same_runs(tmp_path / "run", tmp_path / "whole")
