"""Progress is a share of the run: what is left to train, and at which rate, when a run continues differently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from maskwright.errors import UsageError
from maskwright.training import Recipe
from maskwright.training.state import Progress
from tests.training.test_run import Numbers, rows
from tests.training.tiny_system import Shapes, Tiny, fit


class StopAt(Numbers):
    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == self.step and "lr" in values:
            raise KeyboardInterrupt


COMMON: dict[str, Any] = {"val": False, "epochs": 4, "log_every": 1, "warmup": 0, "save_minutes": 0, "lr": 1.0}
COMMON |= {"lr": 1e-3, "schedule": "cosine", "accumulate": 1}


def rates(folder: Path) -> dict[int, float]:
    return {step: value for step, _, name, value in rows(folder) if name == "lr"}


@pytest.mark.parametrize(
    ("changes", "steps", "said"),
    [
        ({}, 16, ""),
        ({"batch": 4}, 8, "batch: 2 -> 4"),
        ({"batch": 1}, 32, "batch: 2 -> 1"),
        ({"accumulate": 2}, 8, "accumulate: 1 -> 2"),
        ({"data": Shapes(32)}, 32, "images in an epoch: 16 -> 32"),
        ({"data": Shapes(8)}, 8, "images in an epoch: 16 -> 8"),
        ({"batch": 8, "data": Shapes(32)}, 8, "batch: 2 -> 8"),
        ({"epochs": 8}, 48, "epochs: 4 -> 8"),
    ],
    ids=["same", "larger batch", "smaller batch", "accumulate", "grown", "shrunk", "grown and larger", "longer"],
)
def test_the_epochs_that_are_left_are_trained_at_the_rates_of_the_schedule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], steps: int, said: str
):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", data=Shapes(16), logger=StopAt(17), **COMMON)
    capsys.readouterr()
    fit(tmp_path / "run", resume=True, **{"data": Shapes(16), **COMMON, **changes})
    assert said in capsys.readouterr().err
    # Sixteen steps are half of the run: two of four epochs (a quarter, if the run is made longer).
    later = {step: rate for step, rate in rates(tmp_path / "run").items() if step > 16}
    assert list(later) == list(range(17, 17 + steps))
    done = 2 / changes.get("epochs", 4)
    wanted = [Recipe(lr=1e-3).final + (1 - 0.01) * (1 + math.cos(math.pi * (done + (1 - done) * k / steps))) / 2
              for k in range(steps)]  # fmt: skip
    assert list(later.values()) == pytest.approx([1e-3 * w for w in wanted])


def test_a_change_of_batch_is_kept_by_the_next_resumption(tmp_path: Path):
    data = Shapes(16)
    for name in ("once", "twice"):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / name, data=data, logger=StopAt(17), **COMMON)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "twice", data=data, resume=True, **{**COMMON, "batch": 4}, logger=StopAt(20))
    for name in ("once", "twice"):
        fit(tmp_path / name, data=data, resume=True, **{**COMMON, "batch": 4})
    assert rates(tmp_path / "once") == rates(tmp_path / "twice")
    assert max(rates(tmp_path / "once")) == 24


def settle(old: Recipe, new: Recipe, images: tuple[int, int], **where: Any) -> Progress:
    progress = Progress(images=images[0], **where)
    progress.continue_with(old, new, images[1])
    return progress


@pytest.mark.fast
def test_within_an_epoch_no_image_is_seen_twice_and_the_end_is_met():
    old, new = Recipe(batch=2, epochs=3), Recipe(batch=8, epochs=3)
    # 10 of 40 images of epoch 1 are seen; two batches of 8 are taken as seen, 3 of 5 are left.
    here = settle(old, new, (40, 40), step=25, epoch=1, seen=10)
    assert (here.seen, here.step + here.shift) == (16, 5 + 2)
    # A quarter of an epoch over 40 images is a quarter of one over 80.
    here = settle(old, old, (40, 80), step=25, epoch=1, seen=10)
    assert (here.seen, here.step + here.shift) == (20, 40 + 10)
    # An epoch that is over stays over, whatever the last batch was filled with.
    here = settle(old, new, (39, 39), step=40, epoch=1, seen=40)
    assert (here.seen, here.step + here.shift) == (40, 10)
    # With accumulation the steps that are left count.
    here = settle(old, Recipe(batch=2, accumulate=3, epochs=3), (40, 40), step=25, epoch=1, seen=10)
    assert here.step + here.shift == 2 * 7 - 5


@pytest.mark.fast
def test_the_warm_up_goes_on_where_it_was():
    old, new = Recipe(batch=2, epochs=100, warmup=100), Recipe(batch=4, epochs=100, warmup=100)
    here = settle(old, new, (40, 40), step=50, epoch=2, seen=20)
    assert here.step + here.warm_shift == 50  # not capped: 100 steps, of any size
    assert here.step + here.shift == 25
    short, shorter = Recipe(batch=2, epochs=4, warmup=100), Recipe(batch=4, epochs=4, warmup=100)
    here = settle(short, shorter, (40, 40), step=10, epoch=0, seen=20)
    assert here.step + here.warm_shift == 5  # half of a quarter of the run, as before
    here = settle(short, shorter, (40, 40), step=60, epoch=3, seen=0)
    assert here.step + here.warm_shift >= 10


@pytest.mark.fast
def test_a_number_of_steps_is_kept_whatever_a_step_is():
    old, new = Recipe(batch=2, steps=100), Recipe(batch=8, steps=100)
    here = settle(old, new, (40, 40), step=50, epoch=2, seen=20)
    assert here.shift == 0


@pytest.mark.fast
def test_the_lower_loss_is_better_among_equal_scores():
    here = Progress()
    assert here.improve("segm/AP", 0.0, 3.0)
    assert here.improve("segm/AP", 0.0, 2.0)
    assert not here.improve("segm/AP", 0.0, 2.5)
    assert here.stale == 1
    assert here.improve("segm/AP", 0.1, 2.7)
    assert here.stale == 0
    # A lower loss than ever is an improvement, though not the best weights.
    assert not here.improve("segm/AP", 0.05, 1.5)
    assert here.stale == 0
    assert not here.improve("segm/AP", 0.1, 2.8)
    assert not here.improve("segm/AP", 0.1, math.nan)
    assert here.stale == 2
    assert here.improve("segm/AP", 0.1, 2.6)
    assert (here.best, here.best_loss, here.lowest_loss) == (0.1, 2.6, 1.5)
    assert Progress(best=math.nan, measure="-loss").improve("-loss", -2.0, 2.0)


def test_a_score_of_zero_does_not_end_a_run_whose_loss_falls(tmp_path: Path):
    from maskwright.training.state import load_state

    class Blind(Tiny):
        def decode(self, raw: Any, placements: Any, score_threshold: float = 0.5) -> Any:
            return [found[:0] for found in super().decode(raw, placements, score_threshold)]

    fit(tmp_path / "run", system=Blind(("red", "green")), epochs=6, patience=1, lr=3e-3)
    progress = load_state(tmp_path / "run" / "last.ckpt")["progress"]
    losses = [(v, s) for s, _, n, v in rows(tmp_path / "run") if n == "val/loss"]
    assert progress["best"] == 0
    assert progress["step"] == 36
    assert (progress["best_loss"], progress["best_step"]) == min(losses)


def test_objects_of_unknown_classes_are_counted_at_start_and_at_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for resume in (False, True):
        fit(tmp_path / "run", system=Tiny(("red", "blue")), data=Shapes(12), epochs=1, resume=resume)
        said = " ".join(capsys.readouterr().err.split())
        # Every fourth image of Shapes is empty, and it would have been green.
        assert "the training set shapes has 3 objects of classes that the system does not have (3 of 'green')" in said
        assert "they are left out. The system has red, blue" in said
        assert "the validation set shapes has 1 object of classes" in said
    fit(tmp_path / "all", system=Tiny(("green", "blue", "red")), data=Shapes(12), epochs=1)
    assert "does not have" not in capsys.readouterr().err


def test_new_rows_of_a_head_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import maskwright as mw
    from maskwright.training.setup import make_system
    from tests.systems.tiny import build

    system = build("mask-rcnn", classes=("cat", "dog"))
    mw.save(system, tmp_path / "two.safetensors")
    said: list[str] = []
    make_system("mask-rcnn", ("dog", "cow"), tmp_path / "two.safetensors", None, (), said)
    assert len(said) == 1
    assert "two.safetensors: the rows of dog are kept; those of cow start from random values, in " in said[0]
    assert all(head in said[0] for head in system.class_rows())
    said.clear()
    make_system("mask-rcnn", ("cow",), tmp_path / "two.safetensors", None, (), said)
    assert "no class has the same name; the rows of cow start from random values" in said[0]
    said.clear()
    make_system("mask-rcnn", ("cat", "dog"), tmp_path / "two.safetensors", None, (), said)
    assert said == []


def test_weights_of_another_network_than_the_preset_are_mentioned(tmp_path: Path):
    import maskwright as mw
    from maskwright.training.setup import make_system
    from tests.systems.tiny import build

    weights = tmp_path / "tiny.safetensors"
    mw.save(build("sam"), weights)
    said: list[str] = []
    make_system("sam-vit-b", ("cell",), weights, {"lora": 2}, said=said)
    assert len(said) == 1
    assert "the network of the weights is trained, of " in said[0]
    assert said[0].endswith("million parameters, and not that of sam-vit-b, of 93.7 million")
    again: list[str] = []
    make_system("sam", ("cell",), weights, None, said=again)
    assert again == []


@pytest.mark.fast
@pytest.mark.parametrize("entry", [{"step": "3"}, {"step": -1}, {"best": "x"}, {"sums": {"a": None}}, {"seen": 1.5},
                                   {"other": 1}, {"sums": {"a": 1.0}, "terms": 0}, {"step": True}])  # fmt: skip
def test_progress_of_other_types_is_refused(entry: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(entry))):
        Progress.from_dict(entry)


@pytest.mark.parametrize(("amp", "native"), [("bf16", False), ("bf16", True), ("no", False)])
def test_emulated_bfloat16_is_named(
    amp: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from maskwright.training import setup

    monkeypatch.setattr(setup, "has_bfloat16", lambda device: native)
    fit(tmp_path, steps=1, amp=amp, device="cpu")
    words = "this processor has no instructions for bfloat16 and emulates it; amp 'no' is faster"
    assert capsys.readouterr().err.count(words) == (amp == "bf16" and not native)
