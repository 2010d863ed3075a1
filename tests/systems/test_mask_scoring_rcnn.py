"""Mask Scoring R-CNN: the head, its targets, and the order of objects."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops.mask_targets import share_inside
from maskwright.structures import Masks, Placement
from maskwright.systems import create
from tests.systems.tiny import SIZE, build, objects, tiny_options


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["polygons", "pixels"])
def test_the_share_of_an_object_inside_a_box(kind: str):
    square = torch.zeros(1, 40, 60, dtype=torch.bool)
    square[0, 10:30, 10:30] = True
    ring = torch.tensor([10.0, 10, 30, 10, 30, 30, 10, 30]).double().numpy()
    masks = Masks.from_polygons([[ring]], (40, 60)) if kind == "polygons" else Masks.from_dense(square)
    boxes = torch.tensor([[0.0, 0, 50, 35], [10, 10, 20, 30], [10, 20, 30, 35], [40, 0, 50, 10], [10, 10, 30, 30]])
    shares = share_inside(masks, torch.zeros(5, dtype=torch.int64), boxes)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 0.5, 0.0, 1.0]), atol=0.06, rtol=0)


def test_scores_are_those_of_boxes_times_the_predicted_iou():
    system = build("mask-scoring-rcnn").eval()
    torch.nn.init.constant_(system.mask_iou.iou.bias, 0.5)
    raw = system(images(1))
    place = [Placement.identity(SIZE)]
    by_mask = system.decode(raw, place, score_threshold=0.0)[0]
    by_box = system.decode(raw, place, score_threshold=0.0, score_of="box")[0]
    assert len(by_mask) == len(by_box)
    assert (by_mask.scores.diff() <= 0).all()
    assert (by_box.scores.diff() <= 0).all()
    assert ((by_mask.scores >= 0) & (by_mask.scores <= 1)).all()
    found = system.find(raw, [SIZE], 0.0, 0.5, 100)
    masks, _ = system.read_boxes(raw, [found[0].boxes], [found[0].labels])
    expected = system.mask_scores(raw, found, masks)[0].clamp(0, 1)
    torch.testing.assert_close(by_mask.scores, expected.sort(descending=True).values)


def test_a_high_threshold_applies_to_both_scores():
    system = build("mask-scoring-rcnn").eval()
    torch.nn.init.constant_(system.mask_iou.iou.bias, 0.5)
    raw = system(images(1))
    middle = float(system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0)[0].scores.median())
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=max(0.06, middle))[0]
    assert (found.scores > max(0.06, middle)).all()


def test_the_gradient_flows_through_the_mask():
    system = build("mask-scoring-rcnn")
    torch.nn.init.constant_(system.masks.logits.bias, 3.0)  # masks that meet their objects
    losses = system.losses(system(images()), [objects(3), objects(2)])
    losses["mask_iou"].backward()
    assert losses["mask_iou"] > 0
    assert float(system.masks.logits.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("system", ["mask-rcnn", "mask-scoring-rcnn"])
@pytest.mark.parametrize("rules", ["detectron2", "maskrcnn-benchmark"])
def test_every_convention_has_the_head(system: str, rules: str):
    network = build(system, rules=rules, mask_iou={"convs": 2, "width": 16, "fc_width": 16})
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = network.losses(network(images()), targets)
        assert all(torch.isfinite(v) for v in terms.values())
        assert "mask_iou" in terms
        network.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]
    found = network.eval().decode(network(images(1)), [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert len(found)


def test_boxes_that_include_their_last_pixel_are_returned_in_continuous_coordinates():
    system = build("mask-rcnn", rules="maskrcnn-benchmark").eval()
    raw = system(images(1))
    inner = system.find(raw, [SIZE], 0.0, 0.5, 100)[0]
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0)[0]
    torch.testing.assert_close(found.boxes, inner.boxes + torch.tensor([0.0, 0, 1, 1]))
    assert (found.boxes[:, 2] <= SIZE[1]).all()
    assert (found.boxes[:, 3] <= SIZE[0]).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("mask-rcnn", {"mask_iou": True, "masks": False}, "mask_iou requires masks with loss='sigmoid'"),
        ("mask-rcnn", {"mask_iou": True, "points": True}, "and points=False"),
        ("mask-scoring-rcnn", {"mask_iou": {"convs": 0}}, "mask_iou.convs must be at least 1"),
    ],
)
def test_invalid_options_are_refused(system: str, options, words: str):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create(system, **{**tiny_options(system), **options})
