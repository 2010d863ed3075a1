"""Comparison of systems: rounds, elimination, interruption, failures, what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskwright.checkpoints import save
from maskwright.comparison import Comparison, compare, running
from maskwright.comparison.state import Candidate
from maskwright.data import Scenes, Subset
from maskwright.errors import TrainingError, UsageError
from tests.systems.tiny import build

CLASSES = ("disc", "ring")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(10, (64, 64), classes=CLASSES, empty=0)


class Trainer:
    """Stands for training: the weights are those of a small random system."""

    def __init__(self, fail: str = "", stop: str = ""):
        self.specs: list[dict[str, Any]] = []
        self.fail, self.stop = fail, stop

    def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        name = Path(spec["folder"]).parent.name
        if name == self.stop:
            self.stop = ""
            raise KeyboardInterrupt
        self.specs.append(dict(spec))
        if name == self.fail:
            return {"error": "the loss is not finite"}
        torch.manual_seed(len(name))
        path = Path(spec["folder"]) / "best.safetensors"
        save(build("solov2", classes=CLASSES), path)
        return {"weights": str(path), "seconds": 1.0}


def _compare(folder: Path, scenes: Scenes, names: list[str], **options: Any) -> Comparison:
    chosen: dict[str, Any] = {"steps": 70, "footprint": False, "short": 64, **options}
    return compare(names, Subset(scenes, range(6)), val=Subset(scenes, range(6, 10)), out=folder, **chosen)


FIVE = ["solov2-small", "yolact-small", "polarmask-small", "mask-rcnn-small", "fcos-small"]


def test_the_better_ones_go_on_with_twice_the_budget(tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer()
    monkeypatch.setattr(running, "_train", trainer)
    state = _compare(tmp_path, scenes, FIVE)
    rounds = [(Path(spec["folder"]).parent.name, spec["steps"]) for spec in trainer.specs]
    assert [steps for _, steps in rounds] == [23] * 5 + [47] * 3
    assert len({name for name, _ in rounds[5:]}) == 3
    assert [c.out for c in state.candidates].count(0) == 2
    assert state.finished
    for spec in trainer.specs[5:]:
        first = next(s for s in trainer.specs[:5] if s["system"] == spec["system"])
        assert spec["weights"] == str(Path(first["folder"]) / "best.safetensors"), "a round starts from the one before"
        assert spec["seed"] != first["seed"]
    names = [path.name for path in tmp_path.iterdir()]
    assert {"index.html", "table.csv", "table.md", "comparison.json", *FIVE} <= set(names)
    page = (tmp_path / "index.html").read_text()
    assert all(name in page for name in FIVE)
    assert "not finished" not in page
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == [c.label for c in state.ranking()]
    assert {row["steps"] for row in rows} == {"23", "70"}

    again = Trainer()
    monkeypatch.setattr(running, "_train", again)
    assert _compare(tmp_path, scenes, FIVE).finished
    assert not again.specs, "nothing is repeated"
    with pytest.raises(UsageError, match="holds a comparison with other systems, data or options"):
        _compare(tmp_path, scenes, FIVE[:4])


def test_an_interrupted_comparison_has_an_answer_and_continues(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(stop="polarmask-small")
    monkeypatch.setattr(running, "_train", trainer)
    folder = tmp_path / "before"
    with pytest.raises(
        KeyboardInterrupt, match=r"index\.html has what is known so far, and the same command continues"
    ):
        _compare(folder, scenes, FIVE)
    assert len(trainer.specs) == 2
    assert "not finished" in (folder / "index.html").read_text()
    steps = json.loads((folder / "comparison.json").read_text())["candidates"][2]["rounds"][0]["steps"]
    monkeypatch.chdir(folder.rename(tmp_path / "after").parent)
    found = _compare(Path("after"), scenes, FIVE)
    assert found.finished
    assert all(Path(each.weights or "").parts[0] == "after" for each in found.candidates)
    assert [Path(spec["folder"]).parent.name for spec in trainer.specs[:5]] == FIVE
    assert trainer.specs[2]["steps"] == steps, "the budget of the interrupted run is kept"


def test_training_starts_from_installed_weights_where_they_fit(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer()
    monkeypatch.setattr(running, "_train", trainer)
    monkeypatch.setattr(
        "maskwright.training.pretrained.fitting_weights",
        lambda system, wanted: "some-scenes" if (system.name, wanted) == ("mask-rcnn", "scenes") else None,
    )
    found = _compare(tmp_path / "a", scenes, ["mask-rcnn-small", "solov2-small"])
    assert [spec["pretrained"] for spec in trainer.specs] == ["some-scenes", None]
    start = "training starts: mask-rcnn-small from the installed weights some-scenes, solov2-small from random weights"
    assert start in found.notes
    assert start in (tmp_path / "a" / "index.html").read_text()
    found = _compare(tmp_path / "b", scenes, ["mask-rcnn-small", "solov2-small"], pretrained=None)
    assert trainer.specs[2]["pretrained"] is None
    assert not any("installed" in note for note in found.notes)


def test_weights_of_the_caller_keep_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of the same relative name in the folder of the comparison is another one."""
    monkeypatch.chdir(tmp_path)
    for place in (Path("a"), Path("out/a")):
        place.mkdir(parents=True)
        (place / "w.safetensors").touch()
    given = [{"steps": 0, "weights": "a/w.safetensors"}]
    made = Candidate("a/w.safetensors", "a", trained=False, rounds=given)
    Comparison("data", {}, candidates=[made]).save(Path("out"))
    found = Comparison.load(Path("out"))
    assert found is not None
    assert found.candidates[0].rounds == given


def test_hours_are_divided_equally_and_end_also_after_an_interruption(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    speeds = dict(zip(FIVE, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))

    class Clocked(Trainer):
        def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal now
            done = super().__call__(spec)
            now += spec["steps"] * speeds[spec["system"]]
            return done

    def measure(self: Any, candidate: Any, number: int) -> None:
        candidate.rounds[number]["AP"] = 0.5

    monkeypatch.setattr(running._Comparing, "_measure", measure)
    monkeypatch.setattr(running._Comparing, "_write", lambda self, final: self._save())
    trainer = Clocked(stop="polarmask-small")
    monkeypatch.setattr(running, "_train", trainer)
    monkeypatch.setattr(running, "_pilot", lambda spec: speeds[spec["system"]])
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(KeyboardInterrupt):
        _compare(tmp_path, scenes, FIVE, steps=None, hours=10.0)
    assert Comparison.load(tmp_path).spent == pytest.approx(now)  # pyright: ignore[reportOptionalMemberAccess]
    used, now = now, 1e6  # continued days later
    assert _compare(tmp_path, scenes, FIVE, steps=None, hours=10.0).finished
    seconds = [spec["steps"] * speeds[spec["system"]] for spec in trainer.specs]
    assert seconds[:5] == pytest.approx([seconds[0]] * 5, rel=0.01)
    assert seconds[5:] == pytest.approx([seconds[5]] * 3, rel=0.01)
    assert 2 * seconds[0] <= seconds[5] < 2.5 * seconds[0], "what evaluation did not need is used too"
    assert 0.6 * 36_000 < used + now - 1e6 <= 36_000


def test_a_candidate_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running, "_train", Trainer(fail="yolact-small"))
    state = _compare(tmp_path, scenes, FIVE[:3])
    failed = [c for c in state.candidates if c.failed]
    assert [(c.label, c.failed) for c in failed] == [("yolact-small", "the loss is not finite")]
    assert state.finished
    assert len(state.ranking()) == 2
    assert "yolact-small failed: the loss is not finite" in (tmp_path / "index.html").read_text()


def test_weights_are_measured_as_they_are(tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    save(build("solov2", classes=CLASSES), tmp_path / "mine.safetensors")
    trainer = Trainer()
    monkeypatch.setattr(running, "_train", trainer)
    state = _compare(tmp_path / "out", scenes, [str(tmp_path / "mine.safetensors"), "yolact-small"])
    assert [spec["system"] for spec in trainer.specs] == ["yolact-small"]
    mine = next(c for c in state.candidates if not c.trained)
    assert mine.label.endswith("-mine")
    assert mine.measured["licence"] == "not stated"
    assert mine in state.ranking()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": None}, "either hours .* or steps"),
        ({"hours": 1.0}, "either hours .* or steps"),
        ({"steps": 0}, "must be positive"),
        ({"steps": None, "hours": -1.0}, "must be positive"),
    ],
)
@pytest.mark.fast
def test_budgets_are_checked(tmp_path: Path, scenes: Scenes, options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        _compare(tmp_path, scenes, FIVE, **options)


@pytest.mark.fast
def test_unknown_systems_and_small_sets_are_refused(tmp_path: Path, scenes: Scenes):
    with pytest.raises(UsageError, match="'mask-rcn' is neither a system or preset"):
        _compare(tmp_path, scenes, ["mask-rcn"])
    with pytest.raises(UsageError, match="has 3 images and no split 'val'"):
        compare(["solov2-small"], Subset(scenes, range(3)), out=tmp_path, steps=3)
    assert not (tmp_path / "comparison.json").exists()


def test_two_systems_are_trained_and_compared(tmp_path: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]):
    state = compare(["solov2-small", "fcos-small"], scenes, out=tmp_path, steps=2, batch=2, short=64, footprint=False)
    assert state.finished
    assert state.notes[:1] == ["there is no split 'val': 2 of 10 images, chosen at random with seed 0, are measured on"]
    tasks = {c.label: c.measured["task"] for c in state.candidates}
    assert tasks == {"solov2-small": "masks", "fcos-small": "boxes"}
    assert all(c.rounds[0]["steps"] == 2 and c.score >= 0 for c in state.candidates)
    assert not list(tmp_path.glob("*/round-1/last.*"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TrainingError("there is nothing to learn from"), "there is nothing to learn from"),
        (RuntimeError("a kernel failed"), "RuntimeError: a kernel failed"),
    ],
)
def test_a_failure_of_training_is_recorded(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
):
    import maskwright.training

    def refuse(*values: Any, **options: Any) -> Path:
        raise error

    monkeypatch.delenv("MASKWRIGHT_DEBUG", raising=False)

    monkeypatch.setattr(maskwright.training, "train", refuse)
    spec = {"system": "solov2-small", "weights": None, "folder": str(tmp_path), "train": scenes, "recipe": {},
            "seed": 0, "batch": 2, "device": "cpu", "steps": 3}  # fmt: skip
    assert running._train(spec) == {"error": words}
