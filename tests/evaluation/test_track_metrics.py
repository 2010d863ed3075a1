"""Metrics of clips: equal to TrackEval's, equal to numbers stored from it, and those of cases worked out by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from maskwright.data import MovingScenes, read_davis
from maskwright.errors import UsageError
from maskwright.evaluation.clip_evaluator import Counted
from maskwright.evaluation.davis import contour_of, davis_summary, object_scores, statistics
from maskwright.evaluation.track_ap import clip_tracks, track_ap
from maskwright.evaluation.track_metrics import pairs_of
from maskwright.structures import Instances, Masks
from tests.data import making
from tests.evaluation import trackeval_reference as reference
from tests.evaluation.tracked import Frames, annotated, disturbed, objects

pytestmark = pytest.mark.fast
SHARED = making.SHARED / "clips"
needs_trackeval = pytest.mark.skipif(
    importlib.util.find_spec("trackeval") is None or importlib.util.find_spec("cv2") is None,
    reason="TrackEval is not installed (pip install trackeval)",
)
Clips = Sequence[tuple[Frames, Frames]]


def tracking(clips: Clips) -> dict[str, float]:
    return sum((Counted.of(pairs_of(*clip)) for clip in clips), Counted.zero()).summary()


def contours_and_regions(clips: Clips, **options: Any) -> dict[str, float]:
    return davis_summary([object_scores(*clip, **options) for clip in clips])


def average_precision(clips: Clips, labels: int = 1) -> dict[str, float]:
    return track_ap([clip_tracks(*clip, labels) for clip in clips])


def generated(seed: int, frames: int = 8, clips: int = 2) -> Clips:
    scenes = MovingScenes(clips, frames, (40, 56), seed, ("disc", "ring", "star"), difficulty=0.1 * (seed % 10))
    return [(annotated(clip), disturbed(annotated(clip), 10 * seed + n, 3)) for n, clip in enumerate(scenes.clips)]


SIZE = (30, 40)
NOTHING = objects(SIZE, [], [])


def walking(x: int, number: int, start: int = 4, **more: Any) -> Instances:
    return objects(SIZE, [(start + x, 5, start + x + 8, 15)], [number], **more)


def hard() -> dict[str, tuple[Frames, Frames]]:
    """Cases that implementations disagree on."""
    two = [objects(SIZE, [(4 + x, 5, 12 + x, 15), (20, 18, 30, 28)], [1, 2]) for x in range(6)]
    back = [walking(x, 9) if x not in (2, 3) else NOTHING for x in range(6)]
    overlapping = [objects(SIZE, [(4, 5, 16, 15), (5, 6, 17, 16)], [70, 3], scores=[0.5, 0.9]) for _ in range(6)]
    switched = [walking(x, 1 if x < 3 else 2) for x in range(6)]
    crowd = [objects(SIZE, [(4, 5, 12, 15), (20, 0, 40, 30)], [1, 2], crowd=[False, True]) for _ in range(4)]
    near = [objects(SIZE, [(4, 5, 12, 15), (22, 3, 30, 9), (15, 3, 24, 9)], [5, 6, 8]) for _ in range(4)]
    one = [objects(SIZE, [(4, 5, 12, 15)], [1])] * 4
    return {
        "perfect, other ids": (
            two,
            [objects(SIZE, [(4 + x, 5, 12 + x, 15), (20, 18, 30, 28)], [900, 33]) for x in range(6)],
        ),
        "no predictions": (two, [NOTHING] * 6),
        "no annotated objects": ([NOTHING] * 6, two),
        "nothing at all": ([NOTHING] * 3, [NOTHING] * 3),
        "leaves and returns": (back, [walking(x, 1) for x in range(6)]),
        "a predicted gap": ([walking(x, 1) for x in range(6)], back),
        "identity switch": ([walking(x, 1) for x in range(6)], switched),
        "identity switch in a gap": (back, [walking(x, 1 if x < 3 else 2) for x in range(6)]),
        "overlapping predictions": ([walking(0, 1)] * 6, overlapping),
        "overlapping annotations": (overlapping, [walking(0, 1)] * 6),
        "IoU of exactly one half": (one, [objects(SIZE, [(4, 5, 12, 10)], [1])] * 4),
        "just below one half": (one, [objects(SIZE, [(4, 5, 12, 9)], [1])] * 4),
        "crowd": (crowd, near),
        "a single frame": (two[:1], overlapping[:1]),
        "at the border": (
            [objects(SIZE, [(0, 0, 40, 3), (32, 10, 40, 30)], [1, 2])] * 3,
            [objects(SIZE, [(0, 0, 40, 2), (30, 12, 40, 30), (0, 0, 40, 30)], [1, 2, 3])] * 3,
        ),
        "more objects than tracks": (
            [objects(SIZE, [(2, 2, 8, 8), (12, 2, 18, 8), (22, 2, 28, 8)], [1, 2, 3])] * 3,
            [objects(SIZE, [(2, 2, 8, 8)], [4])] * 3,
        ),
    }  # fmt: skip


# ---- TrackEval ---------------------------------------------------------------------------------------------------


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-9)


@needs_trackeval
@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(5))
def test_figures_of_generated_clips_are_those_of_trackeval(seed: int):
    clips = generated(seed)
    assert_equal(tracking(clips), reference.metrics(clips))
    assert_equal(average_precision(clips, 3), reference.track_ap(clips, 3))
    assert_equal(contours_and_regions(clips, assignment="J"), reference.davis(clips, "J"))


@needs_trackeval
@pytest.mark.thorough
@pytest.mark.parametrize("by", ["J", "J&F"])
def test_both_rules_of_assignment_are_those_of_trackeval(by: Any):
    clips = generated(4, frames=6)
    assert_equal(contours_and_regions(clips, assignment=by), reference.davis(clips, by))


@needs_trackeval
@pytest.mark.thorough
@pytest.mark.parametrize("name", hard())
def test_figures_of_hard_cases_are_those_of_trackeval(name: str):
    truth, found = hard()[name]
    assert_equal(tracking([(truth, found)]), reference.metrics([(truth, found)]))
    assert_equal(average_precision([(truth, found)]), reference.track_ap([(truth, found)], 1))
    if name not in ("no annotated objects", "nothing at all"):  # TrackEval averages no numbers there
        real = [frame if frame.crowd is None else frame[~frame.crowd] for frame in truth]
        assert_equal(contours_and_regions([(truth, found)], assignment="J"), reference.davis([(real, found)]))


@needs_trackeval
def test_contours_of_given_objects_are_those_of_trackeval():
    (truth, found), *_ = generated(6, frames=7, clips=1)
    number = int(truth[0].ids[0])
    mine = [frame[:1] for frame in found]
    for frame in mine:
        frame.ids = torch.full((len(frame),), number)
    scores = object_scores(truth, mine, semi_supervised=True)
    expected = reference.contours(truth, mine, number)[1:-1]
    assert scores.contours[list(scores.ids).index(number)] == pytest.approx(expected, abs=1e-12)


@needs_trackeval
@pytest.mark.thorough
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared clips are not on this machine")
def test_figures_of_davis_clips_are_those_of_trackeval():
    clips = []
    for number, clip in enumerate(read_davis(SHARED, "full_masks").clips):
        truth = [clip.target(frame) for frame in range(0, len(clip), 7)]
        clips.append((truth, disturbed(truth, number)))
    assert_equal(tracking(clips), reference.metrics(clips))
    assert_equal(average_precision(clips), reference.track_ap(clips, 1))
    assert_equal(contours_and_regions(clips, assignment="J"), reference.davis(clips, "J"))


# ---- stored numbers, computed with TrackEval 1.3.0 ----------------------------------------------------------------

GENERATED = {
    "HOTA": 0.454859392876, "DetA": 0.352370982002, "AssA": 0.62166661879, "DetRe": 0.473684210526,
    "DetPr": 0.483552631579, "AssRe": 0.675343563359, "AssPr": 0.777551309134, "LocA": 0.774193786095,
    "MOTA": -0.040816326531, "MOTP": 0.771583349265, "sMOTSA": -0.148032305447, "IDSW": 0, "FP": 25, "FN": 26,
    "Frag": 4, "MT": 1, "PT": 3, "ML": 3, "IDF1": 0.474226804124, "IDP": 0.479166666667, "IDR": 0.469387755102,
    "J": 0.534465504395, "J recall": 0.535714285714, "J decay": 0.038154407871, "F": 0.623790359235,
    "F recall": 0.696428571429, "F decay": -0.02038632948, "J&F": 0.579127931815, "AP": 0.042244224422,
    "AP50": 0.084158415842, "AP75": 0.021452145215, "APs": 0.042244224422, "APm": -1, "APl": -1, "AR1": 0, "AR10": 0.1,
}  # fmt: skip
HARD = {
    "HOTA": 0.591423479198, "DetA": 0.422083821528, "AssA": 0.842046219151, "DetRe": 0.592828224407,
    "DetPr": 0.573908174692, "AssRe": 0.875986700987, "AssPr": 0.9477838741, "LocA": 0.898137776414,
    "MOTA": 0.263736263736, "MOTP": 0.864512471655, "sMOTSA": 0.174403827465, "IDSW": 2, "FP": 34, "FN": 31, "Frag": 0,
    "MT": 13, "PT": 1, "ML": 7, "IDF1": 0.594594594595, "IDP": 0.585106382979, "IDR": 0.604395604396,
    "AP": 0.208462989156, "AP50": 0.409064120698, "AP75": 0.119519094767, "APs": 0.208462989156, "APm": -1, "APl": -1,
    "AR1": 0.228571428571, "AR10": 0.338095238095,
}  # fmt: skip


def test_figures_of_generated_clips_are_the_stored_ones():
    clips = generated(3)
    ours = {**tracking(clips), **contours_and_regions(clips, assignment="J"), **average_precision(clips, 3)}
    assert_equal(ours, GENERATED)


def test_figures_of_all_hard_cases_together_are_the_stored_ones():
    clips = list(hard().values())
    assert_equal({**tracking(clips), **average_precision(clips)}, HARD)


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_an_identity_switch_costs_identity_and_association_but_no_detection():
    truth = [walking(x, 1) for x in range(6)]
    figures = tracking([(truth, [walking(x, 1 if x < 3 else 2) for x in range(6)])])
    assert figures["IDSW"] == 1
    assert figures["MOTA"] == pytest.approx(5 / 6)
    assert figures["DetA"] == 1
    assert figures["AssA"] == pytest.approx(0.5)
    assert figures["IDF1"] == pytest.approx(0.5)
    assert figures["HOTA"] == pytest.approx(0.5**0.5)


def test_predictions_in_crowd_regions_are_left_out_unless_they_match():
    truth, found = hard()["crowd"]
    figures = tracking([(truth, found)])
    # Of id 6 everything lies in the region, of id 8 four ninths.
    assert (figures["FP"], figures["FN"], figures["IDSW"]) == (4, 0, 0)


def test_a_track_has_one_overlap_over_all_frames():
    truth = [walking(x, 1) for x in range(4)]
    found = [walking(x, 7, scores=[0.5]) if x < 3 else NOTHING for x in range(4)]
    figures = average_precision([(truth, found)])
    assert figures["AP"] == pytest.approx(0.6)  # an overlap of 0.75 reaches six of ten thresholds
    assert (figures["AP50"], figures["AP75"], figures["AR1"]) == pytest.approx((1, 1, 0.6))


def test_the_score_of_a_track_is_its_mean_and_its_class_the_most_certain():
    truth = [walking(x, 1, labels=[1]) for x in range(4)]
    found = [walking(x, 7, scores=[0.9 if x == 0 else 0.2], labels=[0 if x == 0 else 1]) for x in range(4)]
    figures = average_precision([(truth, found)], 2)
    assert figures["AP"] == 0
    found = [walking(x, 7, scores=[0.5], labels=[0 if x == 0 else 1]) for x in range(4)]
    assert average_precision([(truth, found)], 2)["AP"] == pytest.approx(1)


def test_the_contour_is_the_difference_to_the_right_and_lower_neighbours():
    plane = np.zeros((6, 7), bool)
    plane[2:4, 3:5] = True
    contour = contour_of(Masks.from_dense(torch.from_numpy(plane[None])).rle()[0]["counts"], (6, 7), 1)
    expected = {(1, 2), (1, 3), (1, 4), (2, 2), (3, 2), (2, 4), (3, 3), (3, 4)}
    assert set(zip(contour.rows.tolist(), contour.columns.tolist(), strict=True)) == expected
    whole = contour_of(Masks.from_dense(torch.ones(1, 6, 7, dtype=torch.bool)).rle()[0]["counts"], (6, 7), 1)
    assert len(whole.rows) == 0


def test_a_displaced_contour_is_right_within_the_tolerance_only():
    def score(offset: int) -> float:
        truth = [objects((300, 400), [(50, 50, 150, 120)], [1])] * 3
        found = [objects((300, 400), [(50 + offset, 50, 150 + offset, 120)], [1])] * 3
        return float(object_scores(truth, found, semi_supervised=True).contours[0, 0])

    assert score(0) == score(4) == 1  # 0.8 % of the diagonal of 500 pixels
    assert 0.5 < score(5) < 1


def test_decay_compares_the_first_and_the_last_quarter():
    values = np.linspace(1, 0, 9)
    assert statistics(values) == (pytest.approx(0.5), pytest.approx(4 / 9), pytest.approx(0.75))
    assert statistics(np.ones(400)) == (1, 1, 0)
    assert statistics(np.repeat([1.0, 0.0], 500))[2] == 1  # more frames than 8 bits count
    assert statistics(np.ones(1)) == (1, 1, 0)


def test_given_objects_are_compared_by_id_without_the_first_and_last_frame():
    truth = [objects(SIZE, [(4, 5, 12, 15), (20, 18, 30, 28)], [1, 2])] * 4
    late = objects(SIZE, [(4, 5, 12, 15), (20, 18, 30, 28), (32, 2, 38, 6)], [1, 2, 3])
    swapped = objects(SIZE, [(4, 5, 12, 15), (20, 18, 30, 28)], [2, 1])
    found = [NOTHING, truth[0], swapped, NOTHING]
    scores = object_scores([*truth[:3], late], found, semi_supervised=True)
    assert scores.ids == (1, 2)  # not the object that appears later
    assert scores.regions.tolist() == [[1, 0], [1, 0]]
    free = object_scores([*truth[:3], late], found)
    assert free.ids == (1, 2, 3)
    assert free.regions[2].tolist() == [1, 1, 1, 0]  # a track that is nowhere
    with pytest.raises(UsageError, match="has 2 annotated frames"):
        object_scores(truth[:2], truth[:2], semi_supervised=True)


def test_objects_without_ids_or_with_equal_ids_are_refused():
    twice = objects(SIZE, [(4, 5, 12, 15), (20, 18, 30, 28)], [4, 4])
    with pytest.raises(UsageError, match="the clip, frame 1: several objects have the id 4"):
        pairs_of([NOTHING, NOTHING], [NOTHING, twice])
    twice.ids = None
    for function in (pairs_of, object_scores):
        with pytest.raises(UsageError, match="frame 0: the objects have no ids"):
            function([NOTHING], [twice])
