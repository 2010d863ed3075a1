"""Parts of two-stage systems: anchors, pooling from a pyramid, box stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maskwright.blocks.box_stage import (
    BoxRules,
    Foreground,
    assign_boxes,
    box_losses,
    decode_boxes,
    detect,
    foreground_rows,
    own_deltas,
    sample_boxes,
)
from maskwright.blocks.roi_heads import Pooler
from maskwright.blocks.rpn import Anchors, anchor_shapes
from maskwright.ops.boxes import encode
from maskwright.structures import Instances

pytestmark = pytest.mark.fast

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 30]])
TARGET = Instances((50, 60), BOXES, torch.tensor([1, 0]))


def test_anchors_of_detectron_are_those_of_its_published_table():
    shapes = anchor_shapes([128], (0.5, 1.0, 2.0), "maskrcnn-benchmark", 16)
    assert shapes.tolist() == [[-84, -40, 99, 55], [-56, -56, 71, 71], [-36, -80, 51, 95]]


def test_an_offset_moves_anchors_to_the_centres_of_cells():
    feature = torch.zeros(1, 1, 2, 3)
    corner, centre = (Anchors([[32]], [8], (1.0,), offset=offset)([feature], (16, 24))[0] for offset in (0.0, 0.5))
    assert corner[0].tolist() == [-16, -16, 16, 16]
    torch.testing.assert_close(centre - corner, torch.full((6, 4), 4.0))


def test_pooling_without_images_or_boxes_gives_no_features():
    features = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    for strides in ((4,), (4, 8)):
        pooler = Pooler(strides)
        assert pooler(features, [], 7).shape == (0, 4, 7, 7)
        assert pooler(features, [torch.zeros(0, 4)], (3, 5)).shape == (0, 4, 3, 5)


def test_boxes_are_pooled_in_their_order_whatever_their_level():
    features = [torch.full((1, 2, 64 >> level, 64 >> level), float(level)) for level in range(4)]
    boxes = torch.tensor([[0.0, 0, 250, 250], [0, 0, 20, 20], [0, 0, 130, 130]])
    pooled = Pooler((4, 8, 16, 32))(features, [boxes], (2, 3))
    assert pooled.shape == (3, 2, 2, 3)
    assert pooled.amax((1, 2, 3)).tolist() == [2, 0, 1]


def test_every_box_is_assigned_without_sampling():
    boxes = torch.cat([BOXES + 1, torch.tensor([[40.0, 40, 50, 50]]), BOXES[:1]])
    assigned = assign_boxes(boxes, TARGET, 2, BoxRules(overlap=0.5))
    assert assigned.labels.tolist() == [1, 0, 2, 1]
    assert assigned.foreground.tolist() == [0, 1, 3]
    assert assigned.owners.tolist() == [0, 1, 0]
    assert torch.equal(assigned.boxes, boxes)
    strict = assign_boxes(boxes, TARGET, 2, BoxRules(overlap=0.7))
    assert strict.labels.tolist() == [2, 0, 2, 1]


def test_sampling_adds_the_boxes_of_objects():
    sampled = sample_boxes(torch.zeros(0, 4), TARGET, 2, BoxRules(positives=1.0))
    assert sorted(sampled.labels.tolist()) == [0, 1]
    assert torch.equal(sampled.boxes[sampled.foreground], BOXES[sampled.owners])


def test_the_foreground_of_a_batch_is_selected_by_image():
    assigned = [assign_boxes(BOXES, TARGET, 2, BoxRules()), assign_boxes(BOXES + 100, TARGET, 2, BoxRules())] * 2
    rois = Foreground.from_assigned(assigned)
    assert [len(own) for own in rois.boxes] == [2, 0, 2, 0]
    assert foreground_rows(assigned).tolist() == [0, 1, 4, 5]
    none = torch.zeros(0, dtype=torch.bool)
    some = rois.select([torch.tensor([True, False]), none, torch.tensor([False, True]), none])
    assert some.labels.tolist() == [1, 0]
    assert [own.tolist() for own in some.owners] == [[0], [], [1], []]


def test_stages_of_a_cascade_refine_the_boxes_of_the_stage_before():
    """Perfect deltas of one stage give boxes that the next stage assigns at a higher overlap."""
    first = BoxRules(overlap=0.5)
    second = replace(first, overlap=0.7, weights=(20.0, 20.0, 10.0, 10.0))
    boxes = BOXES + torch.tensor([1.0, 1, 2, 1])
    assigned = assign_boxes(boxes, TARGET, 2, first)
    assert assign_boxes(boxes, TARGET, 2, second).labels.tolist() == [2, 0]
    deltas = encode(boxes, BOXES, first.weights).requires_grad_()
    terms = box_losses(torch.zeros(2, 3), deltas, [assigned], [TARGET], first)
    assert float(terms["box"].detach()) == 0
    refined = decode_boxes(deltas.detach(), boxes, first)[:, 0]
    torch.testing.assert_close(refined, BOXES, atol=1e-4, rtol=0)
    assert assign_boxes(refined, TARGET, 2, second).labels.tolist() == [1, 0]


def test_deltas_of_a_class_or_of_all_classes():
    each = torch.arange(16.0).view(2, 8)
    assert own_deltas(each, torch.tensor([1, 0])).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(own_deltas(each[:, :4], torch.tensor([1, 0])), each[:, :4])


def test_a_class_agnostic_box_is_detected_once_per_class():
    scores = torch.tensor([[0.6, 0.3], [0.1, 0.02], [0.9, 0.05]])
    found = detect(
        scores, BOXES[[0, 0, 1], None], [2, 1], [(50, 60)] * 2, BoxRules(),
        score_threshold=0.05, nms_threshold=0.5, detections=10,
    )  # fmt: skip
    assert found[0].labels.tolist() == [0, 1]
    assert torch.equal(found[0].boxes, BOXES[[0, 0]])
    assert found[1].labels.tolist() == [0]
