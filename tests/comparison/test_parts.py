"""The parts of a comparison: profile of the data, choice of systems, intervals, calibration, agreement, verdict."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskwright.comparison import Candidate, Comparison, DataProfile, choose_systems
from maskwright.comparison.agreement import agreement
from maskwright.comparison.intervals import bootstrap, calibration, interval
from maskwright.comparison.page import next_command, pareto_front, verdict, write_page, write_tables
from maskwright.comparison.running import _continuing, _rounds, _side
from maskwright.data import ContourScenes, Scenes, Subset
from maskwright.errors import UsageError
from maskwright.evaluation import Evaluator
from maskwright.evaluation.coco import Detections, Truth, coco_ap
from maskwright.evaluation.confusion import hits
from maskwright.structures import Instances

pytestmark = pytest.mark.fast


def _columns(scenes: Scenes, drop: float = 0.0, seed: int = 0) -> tuple[Truth, Detections]:
    """The annotations and, as predictions, the annotated objects without a random share of them."""
    rng = np.random.default_rng(seed)
    judge = Evaluator(scenes, ("segm",))
    for index in range(len(scenes)):
        target = scenes.targets(index)
        kept = torch.from_numpy(rng.random(len(target)) >= drop)
        found = target[kept]
        judge.add_at(index, replace(found, scores=torch.linspace(0.9, 0.6, len(found)), crowd=None, ids=None))
    return judge.columns()


def test_a_profile_describes_sizes_counts_and_shapes():
    crowds = DataProfile.create(ContourScenes(8, (128, 128), crowd=1, empty=0, classes=4))
    few = DataProfile.create(Scenes(8, (128, 128), difficulty=0, empty=0))
    assert crowds.density > 25 > few.density
    assert crowds.size < 0.15 < few.size + 0.05
    assert crowds.small >= few.small
    assert few.crowded == 0
    assert (few.images, few.side, few.classes) == (8, 128.0, 6)
    assert "objects per image" in few.words()
    assert _side(crowds) >= _side(few) >= 160


def test_systems_are_chosen_by_the_profile_with_reasons():
    plain = DataProfile(120, 376, 1, 300, 2, 8, 0.3, 0.01, 0.0, 0.01, 0.2, 0.3)
    names = [name for name, _ in choose_systems(plain)]
    assert len(names) == len(set(names)) == 6
    assert names[0] == "mask-rcnn-small"
    assert "pointrend-small" in names[:3], "objects are large"
    crowded = replace(plain, crowded=0.3, nested=0.2)
    reasons = dict(choose_systems(crowded))
    assert "mask2former-small" in reasons
    assert "30 % of the objects" in reasons["solov2-small"] or "20 %" in reasons["solov2-small"]
    cells = replace(plain, small=0.9, density=60, size=0.04, rough=0.05, elongated=0.05)
    reasons = dict(choose_systems(cells))
    assert "simple blobs" in reasons["polarmask-small"]
    assert "small" in reasons["centermask-small"]
    assert len(choose_systems(plain, 3)) == 3


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (3, [3]), (4, [4, 3]), (6, [6, 3]), (12, [12, 6, 3]), (7, [7, 4, 3])]
)
def test_rounds_halve_until_three_are_left(count: int, sizes: list[int]):
    assert _rounds(count) == sizes


def test_a_bootstrap_surrounds_the_figure_and_pairs_the_systems():
    scenes = Scenes(12, (64, 64), empty=0)
    truth, good = _columns(scenes, 0.1)
    _, bad = _columns(scenes, 0.6, seed=1)
    drawn = bootstrap(truth, {"good": good, "bad": bad, "same": good}, samples=40)
    for name, found in {"good": good, "bad": bad}.items():
        low, high = interval(drawn[name])
        assert low <= coco_ap(truth, found).average()["AP"] <= high
        assert len(drawn[name]) == 40
    assert interval(drawn["good"] - drawn["bad"])[0] > 0
    assert interval(drawn["good"] - drawn["same"]) == (0.0, 0.0)
    again = bootstrap(truth, {"good": good}, samples=40)
    assert np.array_equal(again["good"], drawn["good"]), "draws depend on the seed alone"
    assert math.isnan(interval(np.zeros(0))[0])


def test_a_draw_of_every_image_once_gives_the_figure_itself(monkeypatch: pytest.MonkeyPatch):
    scenes = Scenes(5, (64, 64), empty=0)
    truth, found = _columns(scenes, 0.3)

    class InOrder:
        def integers(self, high: int, size: int) -> np.ndarray:
            return np.arange(size)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: InOrder())
    drawn = bootstrap(truth, {"a": found}, samples=1)
    assert drawn["a"].tolist() == [coco_ap(truth, found).average()["AP"]]


def test_calibration_compares_scores_with_precision():
    found = Detections(
        np.zeros(4, int), np.zeros(4, int), np.array([0.95, 0.95, 0.45, 0.45]), np.zeros((4, 4)), None, None
    )
    assert calibration(found, np.array([True, True, True, False])) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert calibration(found, np.array([False, False, False, False])) == pytest.approx(0.7)
    assert math.isnan(calibration(replace(found, scores=np.zeros(0)), np.zeros(0, bool)))


def test_hits_are_matches_of_the_same_class():
    scenes = Scenes(6, (64, 64), empty=0)
    truth, found = _columns(scenes)
    assert hits(truth, found).all()
    wrong = replace(found, labels=(found.labels + 1) % 6)
    assert hits(truth, wrong).mean() < 0.2


def test_agreement_is_the_f1_of_one_system_against_another():
    scenes = Scenes(6, (64, 64), empty=0)
    truth, found = _columns(scenes)
    nothing = Detections(np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros((0, 4)), [], None)
    assert agreement(truth, {"a": found, "b": found}).tolist() == [1.0] * 6
    assert agreement(truth, {"a": found, "b": nothing}).tolist() == [0.0] * 6
    assert agreement(truth, {"a": nothing, "b": nothing}).tolist() == [1.0] * 6
    assert agreement(truth, {"a": found, "b": found, "c": nothing}).tolist() == pytest.approx([1 / 3] * 6)


def _state(b: tuple[float, float] = (0.3, 0.4), **leads: tuple[float, float]) -> Comparison:
    """A comparison in which `b` is the interval of AP of the second."""
    candidates = [
        Candidate("a-small", "a", rounds=[{"steps": 9, "weights": "a.safetensors", "AP": 0.4}], measured={"ms": 90.0}),
        Candidate("b-small", "b", rounds=[{"steps": 9, "weights": "b.safetensors", "AP": 0.39}], measured={"ms": 30.0}),
        Candidate("c-small", "c", rounds=[{"steps": 9, "weights": "c.safetensors", "AP": 0.2}], measured={"ms": 50.0}),
        Candidate("d-small", "d", rounds=[{"steps": 3, "weights": "d.safetensors", "AP": 0.5}], out=0),
    ]
    intervals = {"AP": {"a": (0.35, 0.45), "b": b, "c": (0.1, 0.3)}, "leads": {"b": (-0.01, 0.03), **leads}}
    return Comparison("data", {}, candidates=candidates, intervals=intervals)


def test_there_is_a_winner_only_if_no_interval_reaches_its_own():
    certain, open_ = _state(b=(0.3, 0.349)), _state(c=(0.1, 0.3))
    winner = certain.winner()
    assert winner is not None
    assert winner.label == "a"
    assert "a has the highest AP, 40.0 (95 % interval 35.0 to 45.0), which no interval of another" in verdict(certain)
    assert open_.winner() is None
    text = verdict(open_)
    assert text.startswith("There is no winner: a has the highest AP")
    assert "the intervals of b overlap with it. Of these, b is the fastest" in text
    assert "b is the fastest (30 ms)" in text
    assert [c.label for c in open_.ranking()] == ["a", "b", "c", "d"], "those left out earlier come last"
    assert pareto_front(open_.candidates) == {"a", "b"}
    assert next_command(open_, "images") == (
        "maskwright train a-small --data images --weights a.safetensors --steps 1000 --out runs/a"
    )


def test_a_lead_on_the_same_images_is_said_but_does_not_make_a_winner():
    candidates = _state().candidates
    intervals = {"AP": {"a": (0.35, 0.45), "b": (0.34, 0.44), "c": (0.1, 0.3)}, "leads": {"b": (0.004, 0.02)}}
    ahead = Comparison("data", {}, candidates=candidates, intervals=intervals)
    assert ahead.winner() is None
    assert "On the same images it is ahead of b by 0.4 to 2.0, but each was trained once." in verdict(ahead)
    unknown = Comparison("data", {}, candidates=candidates, intervals={"AP": {"a": (0.35, 0.45)}})
    assert unknown.winner() is None, "a finalist without an interval may be as good"


def test_a_lead_on_a_few_images_is_never_certain():
    state = _state(b=(0.1, 0.2), c=(0.1, 0.3))
    assert state.winner() is not None
    state.intervals["images"] = 5
    assert state.winner() is None
    assert "a lead is never certain on 5 images with objects, only on 6 or more" in verdict(state)
    state.intervals["images"] = 6
    assert state.winner() is not None


def test_nothing_is_certain_before_all_have_been_trained_equally_long():
    state = _state(b=(0.1, 0.2), c=(0.1, 0.3))
    state.candidates[0].rounds.append({"steps": 20, "weights": "a2.safetensors", "AP": 0.6})
    state.candidates[1].rounds.append({"steps": 20})  # planned, not trained
    assert state.winner() is None
    assert verdict(state).startswith("So far a has the highest AP, 60.0 (95 % interval 35.0 to 45.0). Not all systems")
    assert [c.steps for c in state.candidates] == [29, 9, 9, 3], "of the weights that were measured"
    for candidate in state.candidates[1:3]:
        candidate.rounds[1:] = [{"steps": 20, "weights": "x.safetensors", "AP": 0.3}]
    assert state.winner() is not None


def test_a_finalist_that_failed_is_not_compared():
    state = _state(b=(0.1, 0.2), c=(0.1, 0.3))
    state.candidates[0].failed = "the loss is not finite"
    assert [c.label for c in state.ranking()] == ["b", "c", "d", "a"]
    assert "b has the highest AP, 39.0" in verdict(state)
    assert "--weights b.safetensors" in next_command(state, "images")
    for candidate in state.candidates[1:3]:
        candidate.failed = "the loss is not finite"
    assert verdict(state).startswith("All finalists have failed. In the rounds before, d has the highest AP, 50.0")


def test_ap_of_another_kind_is_shown_and_not_compared(tmp_path: Path):
    state = _state(c=(0.1, 0.3))
    state.candidates[1].measured |= {"task": "boxes", "AP": 0.6}
    state.candidates[1].rounds[0]["AP"] = 0.6
    assert [c.label for c in state.ranking()] == ["a", "c", "b", "d"]
    winner = state.winner()
    assert winner is not None
    assert winner.label == "a"
    assert verdict(state).endswith("Not compared, because their AP is of another kind: b (boxes).")
    assert pareto_front(state.ranking()) == {"a", "c"}
    write_tables(state, tmp_path)
    assert "| b | boxes | 60.0 |" in (tmp_path / "table.md").read_text()


def test_an_interval_that_is_not_known_is_no_lead():
    state = _state(b=(math.nan, math.nan), c=(0.1, 0.3))
    assert state.winner() is None
    assert "the intervals of b overlap with it" in verdict(state)


def test_text_of_files_stays_in_its_cell(tmp_path: Path):
    state = _state(b=(0.1, 0.2), c=(0.1, 0.3))
    state.candidates[0].measured["licence"] = "mine\n| <b>yours</b> & more"
    write_tables(state, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert len(table.splitlines()) == 2 + 2 + 4
    assert r"| mine\n\| &lt;b>yours&lt;/b> &amp; more |" in table


def test_the_next_command_can_be_pasted():
    state = _state(b=(0.1, 0.2), c=(0.1, 0.3))
    state.candidates[0].rounds[0]["weights"] = "my out/a's/best.safetensors"
    recipe = {"short": (192,), "long": 384, "amp": "bf16"}
    options = _continuing("train2017", Path("my val"), "val", 8, recipe)
    words = shlex.split(next_command(state, "my data; rm x", options))
    assert words == [
        "maskwright", "train", "a-small", "--data", "my data; rm x", "--split", "train2017", "--val", "my val",
        "--batch", "8", "--short", "192", "--long", "384", "--amp", "bf16", "--weights", "my out/a's/best.safetensors",
        "--steps", "1000", "--out", "runs/a",
    ]  # fmt: skip
    assert _continuing("train", None, "val", 4, {}) == []


def test_systems_for_masks_are_not_chosen_for_data_without_masks():
    class Boxes(Subset):
        def apply(self, target: Instances) -> Instances:
            return replace(super().apply(target), masks=None)

    profile = DataProfile.create(Boxes(Scenes(4, (64, 64), empty=0), range(4)))
    assert not profile.masks
    assert profile.words().endswith("; without masks")
    with pytest.raises(UsageError, match="name systems that need boxes alone"):
        choose_systems(profile)


def test_the_page_says_what_was_not_measured_in_place_of_empty_tables(tmp_path: Path):
    request = {"hours": None, "steps": 9, "batch": 4, "seed": 0}
    profile = DataProfile.create(Scenes(4, (64, 64), empty=0)).to_dict()
    made = [Candidate("a-small", "a", failed="the loss is not finite"), Candidate("b-small", "b")]
    state = Comparison("data", request, profile, made)
    page = write_page(state, tmp_path, {}, [], "data").read_text()
    write_tables(state, tmp_path)
    assert "There are no figures, as no system has been measured." in page
    assert "<li>a failed: the loss is not finite</li>" in page
    assert "<li>b has not been measured yet</li>" in page
    assert "<table" not in page
    assert "What each is bad at" not in page
    assert "The finalists were chosen" not in page
    assert (tmp_path / "table.md").read_text() == "Nothing has been measured yet.\n"
    made[1].failed = "another reason"
    assert verdict(state).startswith("Nothing has been measured, as all systems have failed; the same command tries")


def test_columns_without_figures_are_left_out_for_readers(tmp_path: Path):
    state = _state()
    write_tables(state, tmp_path)
    assert "| ms |" in (tmp_path / "table.md").read_text()
    for candidate in state.candidates:
        candidate.measured.clear()
    write_tables(state, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| system | 95 % interval | steps |"
    assert lines[4] == "| a | 35.0 to 45.0 | 9 |"
    assert ",ms,MB," in (tmp_path / "table.csv").read_text().splitlines()[0], "the columns of the file stay the same"


def test_without_figures_nothing_is_claimed():
    assert verdict(Comparison("data", {})) == "Nothing has been measured yet."
    low = _state()
    for candidate in low.candidates:
        candidate.rounds[0]["AP"] = 0.004
    assert verdict(low).startswith("No system has learned enough to be compared: the highest AP is 0.4.")


def test_empty_instances_have_a_profile_error():
    with pytest.raises(UsageError, match="has no objects"):
        DataProfile.create(Scenes(3, (64, 64), empty=1))
    assert len(Instances.empty((4, 4))) == 0
