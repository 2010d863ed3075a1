"""Classes and score thresholds by class select objects in prediction and evaluation."""

from __future__ import annotations

import pytest

from maskwright.errors import UsageError
from maskwright.inference import predict
from maskwright.inference.selecting import parse_thresholds, split_names
from tests.inference.painted import Painted, blocks

pytestmark = pytest.mark.fast


def labels_and_numbers(found):
    """Label and number of each object; object k scores 1 - k / 300."""
    numbers = ((1 - found.scores) * 300).round().int().tolist()
    return list(zip(found.labels.tolist(), numbers, strict=True))


def test_only_the_named_classes_are_kept():
    found = predict(Painted(), blocks(7, (60, 90)), classes=["dog"]).found()
    assert labels_and_numbers(found) == [(1, 1), (1, 3), (1, 5)]
    everything = predict(Painted(), blocks(7, (60, 90)), classes=("cat", "dog")).found()
    assert len(everything) == 7


def test_the_limit_counts_selected_objects_only():
    found = predict(Painted(), blocks(9, (60, 90)), classes=["dog"], detections=3).found()
    assert labels_and_numbers(found) == [(1, 1), (1, 3), (1, 5)]


def test_thresholds_by_class_may_be_below_or_above_the_common_one():
    image = blocks(9, (60, 90))
    low = 1 - 2.5 / 300
    found = predict(Painted(), image, score_threshold=low, threshold={"dog": 1 - 5.5 / 300}).found()
    assert labels_and_numbers(found) == [(0, 0), (1, 1), (0, 2), (1, 3), (1, 5)]
    found = predict(Painted(), image, threshold={"dog": 1.0}).found()
    assert found.labels.tolist() == [0] * 5, "cats keep the default"
    assert len(predict(Painted(), image, threshold=low).found()) == 3
    found = predict(Painted(), image, classes=["cat"], threshold={"cat": low, "dog": 0.0}).found()
    assert labels_and_numbers(found) == [(0, 0), (0, 2)]


@pytest.mark.thorough
def test_tiles_select_too():
    found = predict(Painted(), blocks(9, (120, 160)), tile=64, overlap=0.5, classes=["dog"]).found()
    assert labels_and_numbers(found) == [(1, 1), (1, 3), (1, 5), (1, 7)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["dgo"]}, r"unknown class 'dgo'; did you mean 'dog'\?"),
        ({"classes": ["Dog"]}, r"did you mean 'dog'\?"),
        ({"classes": ["zebra"]}, "the system's classes are cat, dog"),
        ({"classes": []}, "at least one class"),
        ({"classes": "dog"}, "must be a list of class names"),
        ({"threshold": {"ct": 0.5}}, r"did you mean 'cat'\?"),
        ({"threshold": {"cat": 1.5}}, "threshold of 'cat' must be a number from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, "from 0 to 1, got nan"),
        ({"threshold": 0.3, "score_threshold": 0.4}, "the same option"),
    ],
)
def test_mistakes_are_explained(options, words):
    with pytest.raises(UsageError, match=words):
        predict(Painted(), blocks(3), **options)


def test_command_line_lists():
    assert parse_thresholds(["person=0.7,car=0.3"]) == (None, {"person": 0.7, "car": 0.3})
    assert parse_thresholds(["0.4, person = 0.7"]) == (0.4, {"person": 0.7})
    assert parse_thresholds(["a=b=0.7"]) == (None, {"a=b": 0.7})
    assert split_names(["a, b,", "c,d"], ["c,d"]) == ["a", "b", "c,d"]
    for wrong in ("person=", "person=x", "=", "a=1,a=0.5", "0.3,0.4", "a=2"):
        with pytest.raises(UsageError, match="--threshold"):
            parse_thresholds([wrong])
