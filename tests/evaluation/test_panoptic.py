"""Panoptic quality against a count by hand that follows the reference's rules segment by segment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskwright.data import Dataset, Scenes
from maskwright.errors import UsageError
from maskwright.evaluation import PanopticEvaluator, Result, SemanticEvaluator, panoptic_counts, report
from maskwright.structures import Panoptic

pytestmark = pytest.mark.fast
CLASSES = 4


def divided(rng: np.random.Generator, count: int, crowd: bool = False) -> Panoptic:
    plane = rng.integers(0, count + 1, (5, 6)).repeat(5, 0).repeat(4, 1)
    labels = torch.from_numpy(rng.integers(0, CLASSES, count))
    flags = torch.from_numpy(rng.random(count) < 0.25) if crowd else None
    return Panoptic.from_map(torch.from_numpy(plane), labels, torch.ones(count, dtype=torch.bool), crowd=flags)


def disturbed(rng: np.random.Generator, truth: Panoptic) -> Panoptic:
    plane = np.roll(truth.map().numpy(), int(rng.integers(3)), int(rng.integers(2)))
    for _ in range(3):
        y, x = rng.integers(20), rng.integers(18)
        plane[y : y + 6, x : x + 5] = rng.integers(0, len(truth) + 1)
    labels = truth.segments.labels.clone()
    labels[rng.integers(len(labels))] = rng.integers(CLASSES)
    return Panoptic.from_map(torch.from_numpy(plane.astype(np.int64)), labels, truth.things)


def by_hand(truth: Panoptic, found: Panoptic) -> np.ndarray:
    """(K, 4): IoU, matches, found alone, missed; one segment after the other, from planes."""
    out = np.zeros((CLASSES, 4))
    there, guessed = truth.segments.masks.dense().numpy(), found.segments.masks.dense().numpy()
    crowd = truth.segments.crowd.numpy() if truth.segments.crowd is not None else np.zeros(len(there), bool)
    nothing = ~there.any(0)
    kinds, names = truth.segments.labels.tolist(), found.segments.labels.tolist()
    right, taken = set(), set()
    for i, a in enumerate(there):
        for j, b in enumerate(guessed):
            union = (a | b).sum() - (b & nothing).sum()
            if not crowd[i] and kinds[i] == names[j] and union and (a & b).sum() / union > 0.5:
                out[kinds[i], :2] += (a & b).sum() / union, 1
                right.add(i), taken.add(j)
    for i, a in enumerate(there):
        out[kinds[i], 3] += bool(a.any() and i not in right and not crowd[i])
    for j, b in enumerate(guessed):
        own = [i for i in range(len(there)) if crowd[i] and kinds[i] == names[j]]
        free = (b & nothing).sum() + (b & there[own[-1]]).sum() if own else (b & nothing).sum()
        out[names[j], 2] += bool(b.any() and j not in taken and free / b.sum() <= 0.5)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_rules(seed: int):
    rng = np.random.default_rng(seed)
    truth = divided(rng, 6, crowd=True)
    found = disturbed(rng, truth)
    counts, expected = panoptic_counts(truth, found, CLASSES), by_hand(truth, found)
    assert np.allclose(np.stack([counts.iou, counts.tp, counts.fp, counts.fn], 1), expected)


def test_a_perfect_division_is_one_and_nothing_is_zero():
    truth = divided(np.random.default_rng(3), 6)
    perfect = panoptic_counts(truth, truth, CLASSES).quality()
    assert perfect == {"PQ": 1.0, "SQ": 1.0, "RQ": 1.0}
    nothing = panoptic_counts(truth, Panoptic.empty(truth.image_size), CLASSES).quality()
    assert nothing == {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0}
    empty = Panoptic.empty(truth.image_size)
    assert panoptic_counts(empty, empty, CLASSES).quality()["PQ"] == -1


def test_a_prediction_on_a_crowd_of_its_class_is_no_mistake():
    plane = torch.zeros(10, 20, dtype=torch.int64)
    plane[:, :10], plane[:, 10:] = 1, 2
    both = torch.tensor([True, True])
    truth = Panoptic.from_map(plane, torch.tensor([0, 1]), both, crowd=torch.tensor([True, False]))
    inside = torch.zeros_like(plane)
    inside[2:5, 2:6] = 1
    one = torch.tensor([True])
    for label, fp in ((0, 0), (1, 1)):
        found = Panoptic.from_map(inside, torch.tensor([label]), one)
        assert int(panoptic_counts(truth, found, 2).fp.sum()) == fp


def scenes() -> Dataset:
    return Scenes(3, (48, 64), stuff=True, difficulty=0.2)


@pytest.mark.thorough
def test_an_evaluator_adds_images_up(tmp_path):
    dataset = scenes()
    evaluator = PanopticEvaluator(dataset)
    evaluator.add(1, dataset.panoptic(0))
    other = PanopticEvaluator(dataset)
    other.add_at(1, dataset.panoptic(1)[~dataset.panoptic(1).things])
    evaluator.merge([other.partial()])
    with pytest.raises(UsageError, match="added twice"):
        evaluator.add(1, dataset.panoptic(0))
    with pytest.raises(UsageError, match="no image 17"):
        evaluator.add(17, dataset.panoptic(0))
    result = evaluator.result()
    assert result.missing == 1
    assert 0 < result["panoptic/PQ"] < 1
    assert result["panoptic/SQ"] == pytest.approx(result["panoptic/PQ"] / result["panoptic/RQ"], rel=0.5)
    assert "things" in str(result)
    assert "stuff" in str(result)
    assert Result.load(result.save(tmp_path / "result.json")).summary == result.summary
    page = report(result, tmp_path / "page.html").read_text()
    assert "Panoptic quality" in page
    assert any(name in page for name in dataset.stuff)


@pytest.mark.thorough
def test_labels_of_pixels_are_compared(tmp_path):
    dataset = scenes()
    evaluator = SemanticEvaluator(dataset)
    for index in range(3):
        evaluator.add_at(index, dataset.panoptic(index).semantic())
    assert evaluator.result()["semantic/mIoU"] == evaluator.result()["semantic/accuracy"] == 1.0
    with pytest.raises(UsageError, match="was added twice"):
        evaluator.add_at(0, dataset.panoptic(0).semantic())
    evaluator.reset()
    for index in range(3):
        labels = dataset.panoptic(index).semantic()
        labels[:, :32] = -1
        evaluator.add_at(index, labels)
    result = evaluator.result()
    assert result["semantic/accuracy"] == 0.5
    assert "mIoU" in str(result)
    assert "Overlap of labels" in report(result, tmp_path / "page.html").read_text()


def test_pixels_of_a_image_that_was_not_added_were_taken_for_nothing():
    dataset = scenes()
    evaluator = SemanticEvaluator(dataset)
    evaluator.add_at(0, dataset.panoptic(0).semantic())
    result = evaluator.result()
    pixels = [int((dataset.panoptic(index).semantic() >= 0).sum()) for index in range(3)]
    assert result["semantic/accuracy"] == pytest.approx(pixels[0] / sum(pixels))
    assert result.missing == 2
    with pytest.raises(UsageError, match="the data set has no image 'no such'"):
        evaluator.add("no such", dataset.panoptic(1).semantic())
    with pytest.raises(UsageError, match="map labels with match_classes first"):
        evaluator.add_at(1, dataset.panoptic(1).semantic() + 100)
