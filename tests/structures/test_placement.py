"""Composed placements equal their steps, for points, boxes, masks and keypoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maskwright.structures import Instances, Masks, Placement
from tests.structures.strategies import SIZES, placements, planes

pytestmark = pytest.mark.fast


@pytest.mark.thorough
@given(placements(), st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=5))
def test_mapping_points_is_invertible(placement, points):
    points = torch.tensor(points, dtype=torch.float64)
    there = placement.points_to_input(points)
    assert torch.allclose(placement.points_to_image(there), points, atol=1e-9)
    assert torch.allclose(placement.points_to_input(placement.points_to_image(points)), points, atol=1e-9)


@pytest.mark.thorough
@given(placements(), st.data())
def test_mapped_boxes_are_valid_boxes(placement, data):
    low = [data.draw(st.floats(-20, 20)) for _ in range(2)]
    box = torch.tensor([[*low, low[0] + data.draw(st.floats(0, 20)), low[1] + data.draw(st.floats(0, 20))]]).double()
    there = placement.boxes_to_input(box)
    assert (there[:, 2:] >= there[:, :2]).all(), "also after a flip"
    assert torch.allclose(placement.boxes_to_image(there), box, atol=1e-9)
    area = (there[:, 2:] - there[:, :2]).prod()
    scale = placement.scale[0] * placement.scale[1]
    assert torch.allclose(area, (box[:, 2:] - box[:, :2]).prod() * scale, atol=1e-9)


@pytest.mark.thorough
@given(placements(), st.data())
def test_flip_resize_and_crop(placement, data):
    points = torch.tensor([[data.draw(st.floats(-20, 20)), data.draw(st.floats(-20, 20))]]).double()
    x, y = placement.points_to_input(points)[0].tolist()
    height, width = placement.size
    size = data.draw(SIZES)

    mirrored = placement.then_mirror()
    assert mirrored.size == placement.size
    assert mirrored.points_to_input(points)[0].tolist() == pytest.approx([width - x, y], abs=1e-6)
    resized = placement.then_resize(size)
    assert resized.size == size
    assert resized.points_to_input(points)[0].tolist() == pytest.approx(
        [x * size[1] / width, y * size[0] / height], abs=1e-6
    )
    cropped = placement.then_crop(3, -2, size)
    assert cropped.size == size
    assert cropped.points_to_input(points)[0].tolist() == pytest.approx([x - 3, y + 2], abs=1e-6)


@given(placements())
def test_two_flips_are_the_identity(placement):
    twice = placement.then_mirror().then_mirror()
    assert twice.mirrored == placement.mirrored
    assert twice.size == placement.size
    assert twice.offset == pytest.approx(placement.offset)
    assert twice.scale == placement.scale


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 2)
@given(planes(1, 2), st.data())
def test_placing_masks_in_one_step_equals_several_steps(dense, data):
    """Steps by integers are exact, so that the composed placement must give identical masks."""
    masks, placement = Masks.from_dense(dense), Placement.identity((dense.shape[1], dense.shape[2]))
    step_by_step = masks
    for _ in range(data.draw(st.integers(1, 4))):
        identity, kind = Placement.identity(step_by_step.size), data.draw(st.sampled_from(["crop", "mirror", "double"]))
        if kind == "crop":
            # Inside the image, because later steps cannot restore what an earlier crop has removed.
            height, width = step_by_step.size
            x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
            size = (data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x)))
            placement, once = placement.then_crop(x, y, size), identity.then_crop(x, y, size)
        elif kind == "mirror":
            placement, once = placement.then_mirror(), identity.then_mirror()
        else:
            size = (step_by_step.size[0] * 2, step_by_step.size[1] * 2)
            placement, once = placement.then_resize(size), identity.then_resize(size)
        step_by_step = step_by_step.place(once)
    assert torch.equal(masks.place(placement).dense(), step_by_step.dense())


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 2)
@given(planes(1, 2), placements())
def test_placed_masks_are_inside_their_placed_boxes(dense, placement):
    assume(placement.image_size != (0, 0))
    masks = Masks.from_dense(dense).resize(placement.image_size)
    placed = masks.place(placement)
    assert placed.size == placement.size
    reach = placement.boxes_to_input(masks.boxes().double())
    boxes = placed.boxes().double()
    there = placed.areas() > 0
    assert (boxes[there, :2] >= reach[there, :2] - 0.501).all(), "at most half a pixel, as pixel centers decide"
    assert (boxes[there, 2:] <= reach[there, 2:] + 0.501).all()


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 3)
@given(placements(), st.data())
def test_all_fields_of_an_object_are_placed(placement, data):
    height, width = placement.image_size
    dense = data.draw(planes(1, 3, size=(height, width)))
    masks = Masks.from_dense(dense)
    keypoints = torch.rand(len(dense), 17, 3) * torch.tensor([width, height, 1.0])
    keypoints[..., 2] = 2
    objects = Instances(
        (height, width), masks.boxes(), torch.zeros(len(dense), dtype=torch.int64), masks, keypoints=keypoints
    )
    placed = objects.place(placement)

    assert placed.image_size == placement.size
    assert len(placed) == len(objects), "objects outside are kept"
    limits = torch.tensor([placement.size[1], placement.size[0]] * 2)
    assert (placed.boxes >= 0).all()
    assert (placed.boxes <= limits).all()
    assert placed.masks is not None
    assert torch.equal(placed.masks.dense(), masks.place(placement).dense())
    assert placed.keypoints is not None
    seen = placed.keypoints[..., 2] > 0
    assert not placed.keypoints[~seen].any(), "keypoints outside are unlabelled, with coordinates 0"
    assert (placed.keypoints[..., :2] <= limits[:2]).all()
    assert (placed.keypoints >= 0).all()


def test_a_flip_swaps_left_and_right_keypoints():
    keypoints = torch.zeros(1, 17, 3)
    keypoints[0, 5] = torch.tensor([2.0, 3.0, 2.0])  # the left shoulder
    person = Instances(
        (10, 10), torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(1, dtype=torch.int64), keypoints=keypoints
    )
    mirrored = person.place(Placement.identity((10, 10)).then_mirror()).keypoints
    assert mirrored is not None
    assert mirrored[0, 6].tolist() == [8, 3, 2], "the right shoulder after the flip"
    assert not mirrored[0, 5].any()
    other = person.place(Placement.identity((10, 10)).then_mirror(), mirrored_keypoints=None).keypoints
    assert other is not None
    assert other[0, 5].tolist() == [8, 3, 2]


def test_a_resize_with_known_values():
    placement = Placement.resize((100, 50), (50, 100))
    assert placement.scale == (2.0, 0.5)
    assert placement.points_to_input(torch.tensor([[25.0, 50.0]])).tolist() == [[50.0, 25.0]]
    assert np.allclose(placement.boxes_to_input(torch.tensor([[0.0, 0, 50, 100]])), [[0, 0, 100, 50]])
