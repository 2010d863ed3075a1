"""Locations, assignment and losses of FCOS."""

from __future__ import annotations

import pytest
import torch

from maskwright.blocks import fcos
from maskwright.ops.boxes import pairwise_iou

pytestmark = pytest.mark.fast


def points(size=(64, 96), strides=(8, 16)):
    levels = fcos.locations([torch.zeros(1, 1, size[0] // s, size[1] // s) for s in strides], strides)
    return torch.cat(levels), fcos.per_location(levels, list(map(float, strides))), levels


def test_locations_lie_at_the_centres_of_their_cells():
    _, _, levels = points()
    assert levels[0][:2].tolist() == [[4, 4], [12, 4]]
    assert levels[1][0].tolist() == [8, 8]
    assert len(levels[0]) == 8 * 12


@pytest.mark.thorough
@pytest.mark.parametrize("radius", [None, 1.5])
def test_assignment_equals_the_rule_written_out(radius):
    generator = torch.Generator().manual_seed(0)
    spots, strides, levels = points()
    ranges = fcos.per_location(levels, [(-1.0, 20.0), (20.0, 1e8)])
    corners = torch.rand(200, 2, generator=generator) * torch.tensor([70.0, 40.0])
    boxes = torch.cat([corners, corners + 3 + torch.rand(200, 2, generator=generator) * 50], 1)
    owner, inner = fcos.assign(spots, strides, ranges, boxes, radius=radius, at_once=64)
    for index, (spot, stride, span) in enumerate(zip(spots, strides, ranges, strict=True)):
        best, best_area = -1, float("inf")
        for number, box in enumerate(boxes):
            d = torch.cat([spot - box[:2], box[2:] - spot])
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            near = radius is None or bool(((spot - (box[:2] + box[2:]) / 2).abs() < stride * radius).all())
            if d.min() > 0 and near and span[0] <= d.max() <= span[1] and area < best_area:
                best, best_area = number, area
        assert owner[index] == best
        if best >= 0:
            torch.testing.assert_close(inner[index], torch.cat([spot - boxes[best, :2], boxes[best, 2:] - spot]))


def test_without_objects_no_location_is_assigned():
    spots, strides, levels = points()
    ranges = fcos.per_location(levels, [(-1.0, 20.0), (20.0, 1e8)])
    owner, inner = fcos.assign(spots, strides, ranges, torch.zeros(0, 4))
    assert (owner == -1).all()
    assert inner.shape == (len(spots), 4)


def test_centerness_is_one_at_the_centre_and_zero_at_the_border():
    inner = torch.tensor([[5.0, 5, 5, 5], [0, 5, 10, 5], [2, 4, 8, 4]])
    torch.testing.assert_close(fcos.centerness(inner), torch.tensor([1.0, 0.0, 0.5]))
    spots = torch.tensor([[10.0, 20.0]])
    box = torch.tensor([[5.0, 15, 20, 22]])
    assert torch.equal(fcos.boxes_from_distances(spots, fcos.distances(spots, box)), box)


def test_overlap_is_that_of_the_boxes_and_smoothing_is_an_argument():
    from torchvision.ops import generalized_box_iou

    generator = torch.Generator().manual_seed(0)
    inner, other = (torch.rand(50, 4, generator=generator) * 9 + 0.1 for _ in range(2))
    spots = torch.zeros(50, 2)
    boxes, others = fcos.boxes_from_distances(spots, inner), fcos.boxes_from_distances(spots, other)
    torch.testing.assert_close(fcos.overlap(inner, other), pairwise_iou(boxes, others).diagonal())
    whole = generalized_box_iou(boxes, others).diagonal()
    torch.testing.assert_close(fcos.overlap(inner, other, generalised=True), whole)
    nothing = torch.zeros(1, 4)
    torch.testing.assert_close(fcos.overlap(nothing, torch.full((1, 4), 0.5), smooth=1.0), torch.tensor([0.5]))
    assert float(fcos.overlap(nothing, nothing, generalised=True, smooth=1.0)) == 1.0


def test_losses_equal_the_formulas_written_out():
    generator = torch.Generator().manual_seed(0)
    logits, central = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, generator=generator)
    said, goal = (torch.rand(2, 5, 4, generator=generator) * 4 + 0.1 for _ in range(2))
    positive = torch.tensor([[True, False, True, False, False], [False, False, False, False, True]])
    labels = torch.tensor([0, 2, 1])
    terms = fcos.location_losses(logits, said, central, positive, labels, goal)
    middle = fcos.centerness(goal[positive])
    box = ((1 - fcos.overlap(said, goal, generalised=True, smooth=1.0))[positive] * middle).sum() / middle.sum()
    torch.testing.assert_close(terms["box"], box)
    p, expected = logits.sigmoid().flatten(0, 1), 0.0
    for place in range(10):
        for kind in range(3):
            right = (place, kind) in ((0, 0), (2, 2), (9, 1))
            q = p[place, kind] if right else 1 - p[place, kind]
            expected += (0.25 if right else 0.75) * (1 - q) ** 2 * -q.log()
    torch.testing.assert_close(terms["class"], expected / 3)
    nothing = fcos.location_losses(logits, said, central, torch.zeros_like(positive), labels[:0], goal)
    assert float(nothing["box"]) == float(nothing["centerness"]) == 0.0
