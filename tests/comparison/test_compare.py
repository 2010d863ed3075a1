"""Comparison of systems: rounds, elimination, interruption, failures, what is written."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from maskwright.checkpoints import save
from maskwright.comparison import Comparison, DataProfile, compare, division, running
from maskwright.comparison.division import divided
from maskwright.comparison.page import verdict
from maskwright.comparison.state import Candidate
from maskwright.data import Renamed, Scenes, Subset
from maskwright.errors import TrainingError, UsageError
from maskwright.locks import FolderLock
from maskwright.structures import Instances
from maskwright.systems.kinds.classless import classless
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


def test_weights_are_found_through_symbolic_links(tmp_path: Path):
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "a" / "round-1").mkdir(parents=True)
    link.symlink_to(real, target_is_directory=True)
    best = real / "a" / "round-1" / "best.safetensors"
    best.touch()
    made = Candidate("a-small", "a", rounds=[{"steps": 1, "weights": str(best)}])
    Comparison("data", {}, candidates=[made]).save(link)
    stored = json.loads((real / "comparison.json").read_text())["candidates"][0]["rounds"][0]["weights"]
    assert stored == "a/round-1/best.safetensors"


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


def test_the_same_command_tries_failed_systems_again(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(running, "_train", Trainer(fail="yolact-small"))
    before = {c.label: c for c in _compare(tmp_path, scenes, FIVE).candidates}
    assert [label for label, c in before.items() if c.failed] == ["yolact-small"]
    assert "The same command tries what failed again." in (tmp_path / "index.html").read_text()
    capsys.readouterr()
    again = Trainer()
    monkeypatch.setattr(running, "_train", again)
    state = _compare(tmp_path, scenes, FIVE)
    assert "trying again what failed: yolact-small" in capsys.readouterr().out
    assert state.finished
    assert {Path(spec["folder"]).parent.name for spec in again.specs} == {"yolact-small"}, "nothing else is repeated"
    assert [spec["steps"] for spec in again.specs] == [23, 47][: len(again.specs)], "with the budget of the others"
    for candidate in state.candidates:
        assert candidate.failed is None
        if candidate.label != "yolact-small":
            assert (candidate.out, candidate.rounds) == (before[candidate.label].out, before[candidate.label].rounds)
    assert "failed" not in (tmp_path / "index.html").read_text()


def test_a_system_that_is_tried_again_gets_the_time_of_the_others(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0

    class Clocked(Trainer):
        def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal now
            now += spec["steps"]
            return super().__call__(spec)

    monkeypatch.setattr(running, "_pilot", lambda spec: 1.0)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: now))
    first, second = Clocked(fail="yolact-small"), Clocked()
    monkeypatch.setattr(running, "_train", first)
    _compare(tmp_path, scenes, FIVE[:3], steps=None, hours=1.0)
    monkeypatch.setattr(running, "_train", second)
    monkeypatch.setattr(running, "_pilot", lambda spec: 2.0)
    assert _compare(tmp_path, scenes, FIVE[:3], steps=None, hours=1.0).finished
    assert [spec["steps"] for spec in second.specs] == [first.specs[0]["steps"] // 2]


def test_systems_that_failed_in_different_rounds_are_tried_again(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    class Failing(Trainer):
        def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
            self.fail = "fcos-small" if "round-1" in spec["folder"] else "solov2-small"
            return super().__call__(spec)

    def measure(self: Any, candidate: Any, number: int) -> None:
        if candidate.rounds[number].get("weights"):
            candidate.rounds[number]["AP"] = 0.5  # the first three go on

    monkeypatch.setattr(running._Comparing, "_measure", measure)
    monkeypatch.setattr(running._Comparing, "_write", lambda self, final: self._save())
    monkeypatch.setattr(running, "_pilot", lambda spec: 1.0)
    monkeypatch.setattr(running, "_train", Failing())
    hours: dict[str, Any] = {"steps": None, "hours": 1.0}
    failed = [c.label for c in _compare(tmp_path, scenes, FIVE, **hours).candidates if c.failed]
    assert failed == ["solov2-small", "fcos-small"]
    monkeypatch.setattr(running, "_train", again := Trainer())
    assert _compare(tmp_path, scenes, FIVE, **hours).finished
    tried = [(Path(spec["folder"]).parent.name, Path(spec["folder"]).name) for spec in again.specs]
    assert tried == [("fcos-small", "round-1"), ("solov2-small", "round-2")]


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
    for wrong, right in (("mask-rcn", "mask-rcnn"), ("solov2-smal", "solov2-small")):
        with pytest.raises(
            UsageError, match=f"'{wrong}' is neither a system or preset nor a file .*; did you mean '{right}'"
        ):
            _compare(tmp_path, scenes, [wrong])
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


@pytest.mark.fast
def test_the_time_of_a_run_that_was_killed_counts(tmp_path: Path):
    made = [Candidate("a-small", "a", rounds=[{"steps": 9, "weights": "w", "AP": 0.1}, {"steps": 9}]),
            Candidate("b-small", "b", rounds=[{"steps": 9, "weights": "w", "AP": 0.1}])]  # fmt: skip
    state = Comparison("data", {}, candidates=made)
    assert running._unsaved(state, tmp_path) == 0
    saved = state.save(tmp_path).stat().st_mtime
    for name, later in (("a/round-2/log.csv", 500), ("a/round-1/log.csv", 800), ("b/round-1/last.ckpt", 900)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (saved + later, saved + later))
    assert running._unsaved(state, tmp_path) == pytest.approx(500), "of the training that has not ended"
    os.utime(tmp_path / "comparison.json", (saved + 600, saved + 600))
    assert running._unsaved(state, tmp_path) == 0


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_there_must_be_something_to_measure_on(tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch):
    empty = Subset(Scenes(3, (64, 64), classes=CLASSES, empty=1), range(3))
    for judged in (empty, Subset(scenes, [])):
        with pytest.raises(UsageError, match=r"[03] images to measure on have no objects"):
            compare(["solov2-small"], scenes, val=judged, out=tmp_path, steps=3)
    with pytest.raises(UsageError, match=r"classes 'disc', 'ring', those to measure on 'nut', 'bolt': none in common"):
        compare(["solov2-small"], scenes, val=_named(scenes, "nut", "bolt"), out=tmp_path, steps=3)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(division, "_has_objects", lambda dataset, index: index == 5)
    for seed in range(6):
        _, judged, _ = divided(scenes, "train", None, "val", seed)
        assert len(judged) == 2
        assert scenes.image_ids()[5] in judged.image_ids()


def _named(scenes: Scenes, *names: str) -> Renamed:
    renamed = Renamed(scenes, scenes.classes)
    renamed.classes = names
    return renamed


@pytest.mark.fast
def test_a_split_to_measure_on_is_never_replaced_by_another(tmp_path: Path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in range(6)]
    square = {"category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
    objects = [{"id": n + 1, "image_id": n, **square} for n in range(6)]
    document = {"images": images, "categories": [{"id": 1, "name": "disc"}], "annotations": objects}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for image in images:
            Image.new("RGB", (8, 8)).save(tmp_path / split / str(image["file_name"]))
        (folder / f"instances_{split}.json").write_text(json.dumps(document))
    train, judged, notes = divided(tmp_path, "train", None, "test", 0)
    assert (len(train), len(judged), notes) == (6, 6, [])
    train, judged, notes = divided(tmp_path, "train", None, "val", 0)
    assert (len(train), len(judged), len(notes)) == (4, 2, 1)
    with pytest.raises(UsageError, match="has no split 'tset'; omit `val_split`"):
        divided(tmp_path, "train", None, "tset", 0)
    with pytest.raises(UsageError, match="the split 'test' is trained on"):
        divided(tmp_path, "test", None, "test", 0)


@pytest.mark.fast
def test_stuff_is_not_measured():
    _, judged, _ = divided(Scenes(10, (64, 64), stuff=True, empty=0), "train", None, "val", 0)
    assert judged.stuff == ()
    assert len(judged.classes) == 6


@pytest.mark.fast
def test_one_process_writes_a_folder(tmp_path: Path, scenes: Scenes):
    with (
        FolderLock(tmp_path, "compare", "another comparison writes to this folder"),
        pytest.raises(UsageError, match="another comparison writes to this folder: process"),
    ):
        _compare(tmp_path, scenes, FIVE)


@pytest.mark.fast
def test_data_that_changed_are_not_mixed(tmp_path: Path, scenes: Scenes):
    before = DataProfile.create(scenes)
    Comparison("data", {"seed": 0}, before.to_dict()).save(tmp_path)
    assert running._found(tmp_path, {"seed": 0, "images": [8, 2]}, before) is not None, "of an earlier version"
    with pytest.raises(UsageError, match="the images or annotations have changed since"):
        running._found(tmp_path, {"seed": 0}, replace(before, objects=before.objects + 1))
    with pytest.raises(UsageError, match="with other systems, data or options"):
        running._found(tmp_path, {"seed": 1}, before)


@pytest.mark.fast
def test_no_system_has_the_folder_of_something_else(tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images.safetensors", "a/b.safetensors", "A/b.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    names = ["images.safetensors", "a/b.safetensors", "A/b.safetensors"]
    labels = [c.label for c in running._candidates(names, DataProfile.create(scenes), 6)]
    assert labels[0] == "images-2"
    assert len({label.casefold() for label in labels}) == 3


def _refusing(error: Exception) -> Callable[..., Any]:
    def refuse(*values: Any, **options: Any) -> Any:
        raise error

    return refuse


def test_a_system_whose_prediction_fails_does_not_end_the_comparison(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    import maskwright.inference

    evaluate = maskwright.inference.evaluate

    def broken(*values: Any, title: str, **options: Any) -> Any:
        if title == "yolact-small":
            raise RuntimeError("shapes differ")
        return evaluate(*values, title=title, **options)

    monkeypatch.delenv("MASKWRIGHT_DEBUG", raising=False)
    monkeypatch.setattr(running, "_train", Trainer())
    monkeypatch.setattr(maskwright.inference, "evaluate", broken)
    state = _compare(tmp_path, scenes, ["solov2-small", "yolact-small"])
    assert [c.failed for c in state.candidates] == [None, "RuntimeError: shapes differ"]
    assert state.finished
    assert "yolact-small failed: RuntimeError: shapes differ" in (tmp_path / "index.html").read_text()


def test_a_system_that_cannot_be_made_does_not_end_the_comparison(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    import maskwright.systems

    monkeypatch.delenv("MASKWRIGHT_DEBUG", raising=False)
    monkeypatch.setattr(maskwright.systems, "create", _refusing(ValueError("of an own system")))
    made = [Candidate("solov2-small", "a")]
    assert running._started(made, "scenes", CLASSES) == []
    assert made[0].start == ""


def test_a_pilot_that_fails_leaves_the_report_to_the_training(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    import maskwright.training

    monkeypatch.delenv("MASKWRIGHT_DEBUG", raising=False)
    monkeypatch.setattr(maskwright.training, "train", _refusing(RuntimeError("a kernel failed")))
    spec = {"system": "solov2-small", "folder": str(tmp_path / "a" / "round-1"), "train": scenes, "recipe": {},
            "seed": 0, "batch": 2, "device": "cpu"}  # fmt: skip
    assert running._pilot(spec) == 1.0


def test_training_that_ended_just_before_a_kill_is_not_repeated(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
):
    class Leaving(Trainer):
        def __call__(self, spec: Mapping[str, Any]) -> dict[str, Any]:
            done = super().__call__(spec)
            (Path(spec["folder"]) / "last.ckpt").touch()
            return done

    kept, save_state = tmp_path / "solov2-small" / "round-1" / "last.ckpt", Comparison.save
    killed: list[bool] = []

    def dying(self: Comparison, folder: Path) -> Path:
        if self.candidates[0].weights and not killed:
            killed.append(True)
            raise SystemExit(137)
        return save_state(self, folder)

    monkeypatch.setattr(running, "_train", Leaving())
    monkeypatch.setattr(Comparison, "save", dying)
    with pytest.raises(SystemExit):
        _compare(tmp_path, scenes, ["solov2-small"])
    assert kept.exists(), "from which the training continues, that is, ends at once"
    assert _compare(tmp_path, scenes, ["solov2-small"]).finished
    assert not kept.exists()


def test_licences_and_kinds_of_given_weights_are_stated(tmp_path: Path, scenes: Scenes):
    torch.manual_seed(0)
    published, merged = build("solov2", classes=CLASSES), classless(build("solov2", classes=CLASSES))
    published.source, merged.source = {"weights_licence": "CC BY-NC 4.0"}, {"classless": True}
    save(published, tmp_path / "published.safetensors")
    save(merged, tmp_path / "merged.safetensors")
    state = _compare(
        tmp_path / "out", scenes, [str(tmp_path / f"{name}.safetensors") for name in ("published", "merged")]
    )
    assert [c.measured["licence"] for c in state.candidates] == ["CC BY-NC 4.0", "not stated"]
    assert [c.task for c in state.candidates] == ["masks", "masks of any class"]
    assert [c.label for c in state.finalists()] == [state.candidates[0].label]
    assert "masks of any class" in (tmp_path / "out" / "table.md").read_text()


def test_data_without_masks_are_compared_by_boxes(tmp_path: Path):
    class Boxes(Subset):
        def apply(self, target: Instances) -> Instances:
            return replace(super().apply(target), masks=None)

    torch.manual_seed(0)
    save(build("solov2", classes=CLASSES), tmp_path / "mine.safetensors")
    data = Boxes(Scenes(10, (64, 64), classes=CLASSES, empty=0), range(10))
    state = compare([str(tmp_path / "mine.safetensors")], data, out=tmp_path / "out", steps=1, footprint=False)
    assert [(c.failed, c.task) for c in state.candidates] == [(None, "boxes")]
    assert state.finished
    assert "; without masks" in (tmp_path / "out" / "index.html").read_text()
    assert verdict(state)


class Cluster:
    """Stands for Ray: tasks are computed when they are waited for, the last one first."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, lost: str = "", gpus: int = 0):
        self.lost, self.gpus, self.asked = lost, gpus, dict[str, Any]()
        self.tasks: dict[int, Any] = {}
        self.functions: dict[int, Callable[..., Any]] = {}

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": float(self.gpus)} if self.gpus else {}

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.asked = options

        def submit(function: Callable[..., Any], spec: dict[str, Any]) -> int:
            self.functions[len(self.tasks)] = function
            self.tasks[len(self.tasks)] = spec
            return len(self.tasks) - 1

        return lambda function: SimpleNamespace(remote=partial(submit, function))

    def wait(self, waiting: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return waiting[-1:], waiting[:-1]

    def get(self, number: int) -> dict[str, Any]:
        spec = self.tasks[number]
        if Path(spec["folder"]).parent.name == self.lost:
            raise self.exceptions.RayError("the worker has died")
        return self.functions[number](spec)


@pytest.mark.parametrize(("gpus", "waves"), [(0, (5, 3)), (2, (3, 2)), (8, (1, 1))])
def test_hours_count_what_a_cluster_trains_at_the_same_time_once(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch, gpus: int, waves: tuple[int, int]
):
    def measure(self: Any, candidate: Any, number: int) -> None:
        candidate.rounds[number]["AP"] = 0.5

    cluster, trainer = Cluster(gpus=gpus), Trainer()
    monkeypatch.setattr(running, "importlib", SimpleNamespace(import_module=lambda name: cluster))
    monkeypatch.setattr(running._Comparing, "_measure", measure)
    monkeypatch.setattr(running._Comparing, "_write", lambda self, final: self._save())
    monkeypatch.setattr(running, "_train", trainer)
    monkeypatch.setattr(running, "_pilot", lambda spec: 1.0)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: 0.0))
    assert _compare(tmp_path, scenes, FIVE, steps=None, hours=1.0, ray="local").finished
    assert len(cluster.tasks) == 13, "the speed is measured on the cluster too"
    steps = [spec["steps"] for spec in trainer.specs]
    assert steps[:5] == [int(0.75 * 3600 / (waves[0] + 2 * waves[1]))] * 5
    assert steps[5:] == [int(0.75 * 3600 * 2 / (2 * waves[1]))] * 3, "nothing was spent, as the clock stands"
    assert all(each <= 3600 for each in steps)


def test_a_lost_machine_of_a_cluster_costs_one_system(tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster("yolact-small", gpus=2)
    monkeypatch.delenv("MASKWRIGHT_DEBUG", raising=False)
    monkeypatch.setattr(running, "importlib", SimpleNamespace(import_module=lambda name: cluster))
    monkeypatch.setattr(running, "_train", Trainer())
    monkeypatch.chdir(tmp_path)
    state = _compare(Path("out"), scenes, FIVE[:3], ray="local")
    assert [c.failed for c in state.candidates] == [None, "RayError: the worker has died", None]
    assert all(Path(spec["folder"]).is_absolute() for spec in cluster.tasks.values())
    assert cluster.asked == {"max_retries": 2, "num_gpus": 1}
    stored = json.loads(Path("out/comparison.json").read_text())["candidates"][0]["rounds"][0]["weights"]
    assert stored == "solov2-small/round-1/best.safetensors"
    assert [
        place for place, _ in running._over_ray("local", [{"folder": "a/b", "weights": None, "device": "cpu"}])
    ] == [0]
    assert cluster.asked == {"max_retries": 2}, "no GPU where the CPU is asked for"
    assert (running._places("local", "auto"), running._places("local", "cpu")) == (2, 1)
