from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.errors import MissingExtraError, TrainingError, UsageError
from maskwright.training.state import load_state
from tests.training.tiny_system import Shapes, Tiny, fit


def rows(folder: Path) -> list[tuple[int, int, str, float]]:
    with (folder / "log.csv").open(encoding="utf-8") as file:
        return [(int(r["step"]), int(r["epoch"]), r["name"], float(r["value"])) for r in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "last.ckpt")["model"]


class Numbers:
    def __init__(self):
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seen.append((step, values))


def test_a_run_leaves_its_folder_behind(tmp_path: Path):
    numbers = Numbers()
    best = fit(tmp_path / "run", logger=numbers, tensorboard=True, jsonl=True)
    assert best == tmp_path / "run" / "best.safetensors"
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {
        "recipe.json", "log.csv", "log.jsonl", "tensorboard", "last.ckpt", "last.safetensors", "best.safetensors",
    }  # fmt: skip
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    told = rows(tmp_path / "run")
    # 22 images in batches of 2, two batches to a step, the last step of an epoch has one: 6 steps, twice.
    assert [s for s, _, n, _ in told if n == "train/loss"] == [2, 4, 6, 8, 10, 12]
    assert [s for s, _, n, _ in told if n == "val/segm/AP"] == [6, 12]
    assert {"train/loss_mask", "train/loss_second", "val/loss", "val/loss_mask", "lr", "time/step"} <= {
        r[2] for r in told
    }
    assert {e for s, e, _, _ in told if s <= 6} == {0}
    assert {e for s, e, _, _ in told if s > 6} == {1}
    for step in (2, 12):
        parts = {n: v for s, _, n, v in told if s == step}
        assert parts["train/loss"] == pytest.approx(parts["train/loss_mask"] + parts["train/loss_second"], rel=1e-6)
    flat = [(s, n, v) for s, values in numbers.seen for n, v in values.items()]
    assert flat == [(s, n, v) for s, _, n, v in told]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [s for s, _ in numbers.seen]


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit(tmp_path / name, seed=seed)
    a, b, c = (weights(tmp_path / n) for n in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_it_learns(tmp_path: Path):
    fit(tmp_path / "run", epochs=8, data=Shapes(24), lr=3e-2, val_every=4)
    values = {n: [v for _, _, m, v in rows(tmp_path / "run") if m == n] for n in ("val/loss", "val/segm/AP")}
    assert values["val/loss"][-1] < values["val/loss"][0]
    assert max(values["val/segm/AP"]) > 0.5


def test_the_running_mean_is_what_is_measured_and_kept(tmp_path: Path):
    from safetensors.torch import load_file

    fit(tmp_path / "run")
    state = load_state(tmp_path / "run" / "last.ckpt")
    kept = load_file(tmp_path / "run" / "last.safetensors")
    assert kept.keys() == state["model"].keys()
    assert all(torch.equal(kept[n], state["average"]["model"][n]) for n in kept)
    assert not torch.equal(kept["head.weight"], state["model"]["head.weight"])
    fit(tmp_path / "plain", ema=None)
    kept = load_file(tmp_path / "plain" / "last.safetensors")
    assert all(torch.equal(kept[n], v) for n, v in weights(tmp_path / "plain").items())


def test_accumulated_batches_give_the_step_of_one_large_batch(tmp_path: Path):
    # Without dropout and with frozen statistics an image does not notice its neighbours, and without empty images
    # nor sizes that differ, the mean over two batches is close to, but not, that of one batch: the losses divide by
    # counts per batch. So the data are one image over and over, where they agree.
    def run(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        system = Tiny(("red", "green"), dropout=0.0)
        data = Shapes(8, empty=0)
        data.__class__ = type("Same", (Shapes,), {"__getitem__": lambda self, i: Shapes.__getitem__(self, 1)})
        fit(tmp_path / name, system=system, data=data, freeze=("backbone.1.*",), optimizer="sgd", clip=None, **changes)
        return weights(tmp_path / name)

    one, two = run("one", batch=4, accumulate=1), run("two", batch=2, accumulate=2)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


def test_frozen_parts_stay_as_they_were(tmp_path: Path):
    torch.manual_seed(5)
    before = {n: v.clone() for n, v in Tiny(("red", "green")).state_dict().items()}
    fit(tmp_path / "run", freeze=("backbone",))
    after = weights(tmp_path / "run")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        "head.weight", "head.bias", "second.weight", "second.bias",
    }  # fmt: skip


def test_patience_ends_a_run_that_does_not_improve(tmp_path: Path):
    # A rate that changes next to nothing: the second and third validation are no better than the first.
    fit(tmp_path / "run", epochs=30, lr=1e-12, patience=2, ema=None, weight_decay=0.0, freeze=("backbone",))
    state = load_state(tmp_path / "run" / "last.ckpt")
    assert state["progress"]["step"] == 3 * 6
    assert state["progress"]["best_step"] == 6
    # Resumed, it knows that it was done.
    fit(tmp_path / "run", resume=True)
    assert load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"] == 3 * 6


def test_without_a_validation_set_the_last_weights_are_the_best(tmp_path: Path):
    from safetensors.torch import load_file

    fit(tmp_path / "run", val=False)
    best, last = (load_file(tmp_path / "run" / f"{n}.safetensors") for n in ("best", "last"))
    assert all(torch.equal(best[n], last[n]) for n in last)
    assert not [r for r in rows(tmp_path / "run") if r[2].startswith("val/")]


def test_without_objects_to_find_the_validation_loss_decides(tmp_path: Path):
    fit(tmp_path / "run", val=Shapes(4, empty=1))
    progress = load_state(tmp_path / "run" / "last.ckpt")["progress"]
    assert progress["measure"] == "-loss"
    losses = [v for _, _, n, v in rows(tmp_path / "run") if n == "val/loss"]
    assert -progress["best"] == min(losses)


def test_validation_can_be_bounded_and_rare(tmp_path: Path):
    seen = []

    class Watched(Shapes):
        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    fit(tmp_path / "run", val=Watched(9), val_max_images=3, val_every=2, epochs=3)
    assert seen == [0, 3, 6] * 2  # evenly spread; after epoch 2, and at the end
    assert [s for s, _, n, _ in rows(tmp_path / "run") if n == "val/loss"] == [12, 18]


def test_a_number_of_steps_may_end_within_an_epoch(tmp_path: Path):
    fit(tmp_path / "run", steps=8)
    state = load_state(tmp_path / "run" / "last.ckpt")
    assert (state["progress"]["step"], state["progress"]["epoch"]) == (8, 1)
    assert [s for s, _, n, _ in rows(tmp_path / "run") if n == "val/loss"] == [6, 8]


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"channels_last": True}], ids=["bf16", "channels-last"])
def test_other_ways_to_compute_reach_about_the_same(tmp_path: Path, changes: dict):
    fit(tmp_path / "plain")
    fit(tmp_path / "other", **changes)
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "other")[name], value, rtol=0.1, atol=0.05)


def test_losses_are_float32_under_bf16(tmp_path: Path):
    class Checked(Tiny):
        def losses(self, raw: Any, targets: Any) -> dict[str, torch.Tensor]:
            if self.training:
                assert raw.logits.dtype == torch.bfloat16
            return {"bf16": raw.logits.mean() ** 2, **super().losses(raw, targets)}

    from maskwright.training import Objective

    system = Checked(("red", "green"))
    sample = Shapes(1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        terms = Objective(system)(sample.image[None].float() / 255, [sample.target])
    assert {t.dtype for t in terms.values()} == {torch.float32}


def test_sizes_of_the_recipe_travel_with_the_system(tmp_path: Path):
    torch.manual_seed(0)
    system = Tiny(("red", "green"))
    fit(tmp_path / "run", system=system, short=(24, 40), long=48)
    assert (system.preprocess.short, system.preprocess.long) == (40, 48)


def test_classes_in_another_order_are_renamed_and_others_left_out(tmp_path: Path):
    fit(tmp_path / "run", system=Tiny(("green", "blue", "red")), epochs=8, data=Shapes(24), lr=3e-2, val_every=4)
    assert max(v for _, _, n, v in rows(tmp_path / "run") if n == "val/segm/AP") > 0.5
    with pytest.raises(UsageError, match="the system has the classes cat, the data red, green: none in common"):
        fit(tmp_path / "none", system=Tiny(("cat",)))


def test_data_without_objects_stop_before_anything_starts(tmp_path: Path):
    with pytest.raises(TrainingError, match="training set shapes has 6 images and no objects of the classes red"):
        fit(tmp_path / "run", data=Shapes(6, empty=1))
    with pytest.raises(TrainingError, match="training set shapes has no images"):
        fit(tmp_path / "run", data=Shapes(0))
    assert not (tmp_path / "run").exists()


def test_options_that_cannot_be(tmp_path: Path):
    with pytest.raises(UsageError, match="no training option 'learning_rate'"):
        fit(tmp_path / "run", learning_rate=1)
    with pytest.raises(UsageError, match="no augmentation 'warp'; known are"):
        fit(tmp_path / "run", augment={"warp": 1})
    with pytest.raises(UsageError, match="weights and options apply to a system's name"):
        fit(tmp_path / "run", weights="x.safetensors")
    assert not (tmp_path / "run").exists()


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'maskwright\[train\]'"):
        fit(tmp_path / "run")


def test_quiet_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path / "run", epochs=1)
    told = capsys.readouterr()
    assert not told.out
    lines = told.err.strip().splitlines()
    assert lines[0].startswith("step 6/6  epoch 1  loss ")
    assert lines[-1].startswith("finished after 6 steps; best: segm/AP ")
    assert len(lines) == 3


@pytest.mark.fast
def test_a_bar_on_a_terminal():
    import io

    from rich.console import Console

    from maskwright.training.logs import Display

    told = io.StringIO()
    with Display(40, start=10, console=Console(file=told, force_terminal=True, width=120)) as display:
        display.update(12, 0, 1.25, 2e-4)
        display.say("a line that stays")
        display.update(40, 3, 0.5, 1e-5)
    text = told.getvalue()
    assert "a line that stays" in text
    assert "epoch 4" in text
    assert "40/40" in text
    assert "loss 0.5000  lr 1.00e-05" in text


@pytest.mark.fast
@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")])
def test_time_left(seconds: float, shown: str):
    from maskwright.training.logs import _clock

    assert _clock(seconds) == shown


@pytest.mark.slow
def test_mask_rcnn_by_name_on_generated_scenes(tmp_path: Path):
    import maskwright as mw

    backbone = {"name": "resnet18", "width": 8, "norm": "batch"}
    narrow = {"backbone": backbone, "neck_width": 16, "boxes": {"width": 32}, "masks": {"width": 16}}
    best = mw.train(
        "mask-rcnn",
        "scenes:count=6,size=64",
        out=tmp_path / "run",
        options=narrow,
        epochs=1,
        batch=2,
        short=64,
        long=64,
        workers=0,
        val_max_images=2,
        device="cpu",
        tensorboard=False,
        log_every=1,
    )
    names = {name for _, _, name, _ in rows(tmp_path / "run")}
    assert {"train/loss_mask", "train/loss_rpn_box", "val/loss_class", "val/segm/AP", "val/bbox/AP"} <= names
    again = mw.load(best)
    assert again.name == "mask-rcnn"
    assert again.preprocess.short == 64
    assert mw.train("mask-rcnn", "scenes:count=6,size=64", out=tmp_path / "run", resume=True) == best
    with pytest.raises(UsageError, match="the run trains mask-rcnn, not keypoint-rcnn"):
        mw.train("keypoint-rcnn", "scenes:count=6,size=64", out=tmp_path / "run", resume=True)
