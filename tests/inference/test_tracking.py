"""Ids through time: association by the IoU of masks, and the trackers of a library behind the same interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from maskwright.data import MovingScenes
from maskwright.errors import UsageError
from maskwright.evaluation.clip_evaluator import Counted
from maskwright.evaluation.track_metrics import pairs_of
from maskwright.inference.tracking import LibraryTracker, ObjectTracker, Tracker, make_tracker, track
from maskwright.structures import Instances, Masks
from tests.evaluation.tracked import annotated, objects

pytestmark = pytest.mark.fast
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("trackers") is None, reason="trackers is not installed (the extra `track`)"
)
SIZE = (40, 80)
NOTHING = objects(SIZE, [], [], scores=[])


def square(x: int, y: int = 5, *, score: float = 0.9, label: int = 0, side: int = 10) -> Instances:
    return replace(objects(SIZE, [(x, y, x + side, y + side)], [0], [label], [score]), ids=None)


def ids(frames: list[Instances], tracker: ObjectTracker | None = None, **options: Any) -> list[list[int]]:
    return [frame.ids.tolist() for frame in track(frames, tracker or Tracker(**options))]


def test_a_moving_object_keeps_its_id_and_a_new_one_gets_the_next():
    frames = [square(3 * t) for t in range(6)]
    frames[3:] = [Instances.join([frame, square(60, 25)]) for frame in frames[3:]]
    assert ids(frames) == [[1]] * 3 + [[1, 2]] * 3


def test_input_is_unchanged_and_the_order_of_detections_is_kept():
    first = Instances.join([square(5), square(50)])
    second = Instances.join([square(51), square(6), square(30, score=0.05)])
    tracker = Tracker()
    tracker.update(first)
    found = tracker.update(second)
    assert second.ids is None
    assert found.ids.tolist() == [2, 1]
    assert found.boxes.equal(second.boxes[:2])
    assert found.masks.rle() == second.masks[:2].rle()
    assert len(second) == 3


def test_an_object_that_scores_less_for_a_while_is_kept_but_starts_no_track():
    frames = [square(0), square(2, score=0.2), square(4, score=0.2), square(6)]
    assert ids(frames) == [[1]] * 4
    assert ids([square(0, score=0.2), square(1, score=0.4)]) == [[], []]
    # Of objects with low scores only those of the frame before are continued.
    assert ids([square(0), NOTHING, square(0, score=0.2)]) == [[1], [], []]
    assert ids(frames, low=0.3) == [[1], [], [], [1]]


def test_a_lost_object_is_found_where_its_motion_leads_it():
    frames = [square(4 * t) for t in range(4)] + [NOTHING] * 4 + [square(30)]
    assert ids(frames)[-1] == [1]
    # Without motion it is expected at 12, too far away.
    assert ids(frames, motion=False, match_again=1)[-1] == [2]
    assert ids(frames, match_again=1)[-1] == [1]


def test_a_lost_track_ends_after_the_frames_that_it_is_remembered_for():
    frames = [square(10), square(10), *[NOTHING] * 3, square(10)]
    assert ids(frames, memory=3)[-1] == [1]
    assert ids(frames, memory=2)[-1] == [2]
    assert ids([square(10), square(10), NOTHING, square(10)], memory=0)[-1] == [2]


def test_a_jump_is_followed_by_enlarged_boxes():
    frames = [square(10), square(22)]
    assert ids(frames, match_again=1) == [[1], [2]]
    assert ids(frames) == [[1], [1]]
    assert ids([square(10), square(60)]) == [[1], [2]]


def test_objects_of_another_class_are_other_objects():
    frames = [square(10), square(11, label=1), square(12)]
    assert ids(frames) == [[1], [2], [1]]
    found = list(track(frames, Tracker(same_class=False)))
    assert [frame.ids.tolist() for frame in found] == [[1]] * 3
    assert [frame.labels.tolist() for frame in found] == [[0], [0], [0]]


def test_masks_decide_where_boxes_are_equal():
    def diagonals(first: bool) -> Instances:
        upper = torch.ones(20, 20, dtype=torch.bool).triu()
        plane = torch.zeros(2, *SIZE, dtype=torch.bool)
        plane[0, 5:25, 5:25], plane[1, 5:25, 5:25] = upper, ~upper
        frame = objects(SIZE, [(5, 5, 25, 25)] * 2, [0, 0], scores=[0.9, 0.9])
        frame = replace(frame, masks=Masks.from_dense(plane), ids=None)
        return frame if first else frame[[1, 0]]

    assert ids([diagonals(True), diagonals(False), diagonals(True)]) == [[1, 2], [2, 1], [1, 2]]


def test_the_assignment_is_the_best_one_for_all():
    # Greedy association would give the second square to the first track, and nothing to the second.
    first = Instances.join([square(10), square(14)])
    second = Instances.join([square(13), square(19)])
    assert ids([first, second], match=0.05, match_again=1) == [[1, 2], [1, 2]]


def test_boxes_without_masks_are_tracked():
    frames = [replace(square(4 * t), masks=None) for t in range(4)]
    assert ids([*frames, NOTHING, replace(square(20), masks=None)]) == [[1]] * 4 + [[], [1]]


def test_objects_are_returned_once_they_are_confirmed():
    frames = [square(10), square(11), NOTHING, square(12), square(60, 20), NOTHING, square(60, 20)]
    assert ids(frames, confirm=2) == [[], [1], [], [1], [], [], []]


def test_empty_masks_and_missing_scores_are_accepted():
    empty = objects(SIZE, [(0, 0, 0, 0), (3, 3, 9, 9)], [0, 0], scores=[0.9, 0.9])
    assert ids([empty, empty]) == [[1], [1]]
    assert ids([replace(square(3), scores=None)] * 2) == [[1], [1]]
    nan = replace(square(3), scores=torch.tensor([float("nan")]))
    assert ids([square(3), nan]) == [[1], []]


@pytest.mark.parametrize("name", ["iou", pytest.param("bytetrack", marks=needs_library)])
def test_boxes_that_are_not_finite_are_left_out(name):
    boxes = torch.tensor([[torch.nan, 1, 9, 9], [5.0, 5, 20, 20], [0, 0, torch.inf, 9]])
    found = Instances(SIZE, boxes, torch.zeros(3).long(), scores=torch.full((3,), 0.9))
    assert ids([found] * 3, make_tracker(name))[1:] == [[1], [1]]


def test_an_object_that_leaves_the_image_is_no_error():
    frames = [square(50 + 8 * t) for t in range(4)]
    assert ids([*frames, *[NOTHING] * 5, square(0)]) == [[1]] * 4 + [[]] * 5 + [[2]]


def test_the_same_frames_give_the_same_ids_after_a_reset():
    tracker = Tracker()
    frames = [Instances.join([square(t), square(40 - t, 20)]) for t in range(5)]
    first = ids(frames, tracker)
    tracker.reset()
    assert ids(frames, tracker) == first == [[1, 2]] * 5


def test_frames_of_another_size_and_wrong_options_are_refused():
    tracker = Tracker()
    tracker.update(square(3))
    with pytest.raises(UsageError, match=r"the frame is 20 x 30, but those before it were 40 x 80"):
        tracker.update(objects((20, 30), [], [], scores=[]))
    for options, message in (
        ({"low": 0.6}, "`low` must be at least 0 and at most `high`"),
        ({"match": 0}, "lowest IoUs must be above 0"),
        ({"memory": -1}, "`memory` must be at least 0"),
        ({"colour": 1}, "invalid option of the tracker iou"),
    ):
        with pytest.raises(UsageError, match=message):
            make_tracker("iou", **options)
    with pytest.raises(UsageError, match="one of iou, bytetrack, sort, ocsort, got 'best'"):
        make_tracker("best")


def detections(seed: int) -> Callable[[Instances], Instances]:
    """Annotated objects as an imperfect system finds them."""
    rng = np.random.default_rng(seed)

    def found(target: Instances) -> Instances:
        count = len(target)
        scores = torch.from_numpy(np.where(rng.random(count) < 0.2, 0.3, 0.9)).float()
        return replace(target, ids=None, crowd=None, scores=scores)[torch.from_numpy(rng.random(count) > 0.06)]

    return found


def figures(clips: MovingScenes, tracker: ObjectTracker) -> dict[str, float]:
    total = Counted.zero()
    for clip in clips.clips:
        tracker.reset()
        imperfect = detections(clip.number)
        truth = annotated(clip)
        total = total + Counted.of(pairs_of(truth, list(track(map(imperfect, truth), tracker))))
    return total.summary()


@pytest.fixture(scope="module")
def clips() -> MovingScenes:
    return MovingScenes(4, frames=20, size=(64, 80), seed=5, difficulty=0.5)


@pytest.mark.thorough
def test_imperfect_detections_of_generated_clips_are_tracked(clips: MovingScenes):
    ours = figures(clips, Tracker())
    assert ours["IDF1"] > 0.9
    assert ours["HOTA"] > 0.85
    assert ours["IDSW"] <= 4
    still = figures(clips, Tracker(motion=False, match_again=1))
    assert still["HOTA"] < ours["HOTA"]


@pytest.mark.thorough
@needs_library
def test_the_trackers_of_the_library_have_the_same_interface(clips: MovingScenes):
    options = {"minimum_consecutive_frames": 1, "track_activation_threshold": 0.5, "high_conf_det_threshold": 0.5}
    theirs = figures(clips, LibraryTracker("bytetrack", **options))
    assert theirs["HOTA"] > 0.8
    tracker = make_tracker("sort")
    frames = [Instances.join([square(t), square(t, 20, label=1)]) for t in range(6)]
    found = list(track(frames, tracker))
    assert found[-1].ids.tolist() == [1, 2]
    assert found[-1].masks.rle() == frames[-1].masks.rle()
    assert found[-1].labels.tolist() == [0, 1]
    tracker.reset()
    assert list(track(frames, tracker))[-1].ids.tolist() == [1, 2]
    assert len(tracker.update(NOTHING)) == 0
    with pytest.raises(UsageError, match="invalid option of the tracker bytetrack"):
        make_tracker("bytetrack", speed=3)
