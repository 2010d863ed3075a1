"""Stability of detections in consecutive frames."""

from __future__ import annotations

import numpy as np
import pytest

from maskwright.data import MovingScenes
from maskwright.evaluation.stability import Stability, displacement, stability
from maskwright.structures import Instances
from tests.evaluation.tracked import annotated, objects

pytestmark = pytest.mark.fast
SIZE = (30, 60)


def square(x: int, **more: object) -> Instances:
    return objects(SIZE, [(x, 5, x + 10, 15)], [1], **more)  # type: ignore[arg-type]


NOTHING = objects(SIZE, [], [])


def test_the_displacement_has_the_largest_intersection():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.random(rng.integers(1, 8, 2)) < 0.7 for _ in range(2))
        if not a.any() or not b.any():
            continue
        plane, other = (np.zeros((50, 50)) for _ in range(2))
        plane[20 : 20 + a.shape[0], 23 : 23 + a.shape[1]] = a
        other[18 : 18 + b.shape[0], 25 : 25 + b.shape[1]] = b
        x, y = displacement(((23, 20), a), ((25, 18), b))
        every = [(np.roll(plane, (v, u), (0, 1)) * other).sum() for v in range(-12, 12) for u in range(-12, 12)]
        assert (np.roll(plane, (y, x), (0, 1)) * other).sum() == max(every)
    assert displacement(((3, 4), np.ones((0, 0), bool)), ((3, 4), np.ones((2, 2), bool))) == (0, 0)


def test_motion_is_compensated_by_that_of_the_annotated_object():
    truth = [square(10), square(15)]
    exact = stability(truth, truth).summary()
    assert exact["IoU"] == pytest.approx(1 / 3)
    assert exact["aligned IoU"] == exact["annotated aligned IoU"] == 1
    assert exact["flicker"] == 0
    # The detection lags behind by two pixels in the second frame: motion of the annotation, not of the detection.
    late = stability([square(10, scores=[0.9]), square(13, scores=[0.6])], truth).summary()
    assert late["IoU"] == pytest.approx(7 / 13)
    assert late["aligned IoU"] == pytest.approx(8 / 12)
    assert late["score change"] == pytest.approx(0.3)
    assert stability([square(10), square(13)]).summary()["aligned IoU"] == 1


def test_an_object_that_is_found_in_one_of_two_frames_flickers():
    truth = [square(10), square(11), square(12), NOTHING, NOTHING]
    found = [square(10), NOTHING, square(12), NOTHING, square(40)]
    own = stability(found, truth)
    assert (own.pairs, own.flickers, own.both) == (2, 2, 0)
    assert own.summary()["IoU"] == -1
    free = stability(found)
    assert (free.pairs, free.flickers, free.both) == (4, 4, 0)
    assert stability([NOTHING, NOTHING]) == Stability()


def test_frames_without_annotations_are_left_out():
    own = stability([square(10), square(11), square(12)], [square(10), None, square(12)])
    assert own == Stability()


def test_detections_of_another_class_do_not_match():
    one, two = square(10, labels=[0]), square(10, labels=[1])
    assert stability([one, two]).flickers == 2
    assert stability([one, two], classes=False).flickers == 0
    assert stability([one, two], [square(10), square(10)]).flickers == 1


def test_crowd_regions_do_not_count():
    truth = [square(10, crowd=[True]), square(11, crowd=[True])]
    assert stability([square(10), square(11)], truth) == Stability()


def test_the_annotations_themselves_are_stable():
    clips = MovingScenes(2, frames=6, size=(48, 64), seed=2, difficulty=0.4)
    total = sum((stability(annotated(clip), annotated(clip)) for clip in clips.clips), Stability()).summary()
    assert total["flicker"] == 0
    assert total["aligned IoU"] == total["annotated aligned IoU"] > total["IoU"]
    assert total["aligned IoU"] > 0.8
    assert total["IoU"] > 0.3
