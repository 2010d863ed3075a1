"""Selecting, joining, placing and exporting objects with all their fields."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from maskwright.errors import UsageError
from maskwright.evaluation.records import instances_from_records
from maskwright.inference.outputs import load_objects, save_objects
from maskwright.structures import Batch, Instances, Masks, Placement
from maskwright.structures.drawing import draw

pytestmark = pytest.mark.fast


def objects(count: int, size=(12, 16)) -> Instances:
    """Object k: label k % 3, score 1 / (k + 1), a 2 x 3 block at its own position."""
    k = torch.arange(count)
    planes = torch.zeros(count, *size, dtype=torch.bool)
    for number in range(count):
        y, x = number % (size[0] - 2), (2 * number) % (size[1] - 3)
        planes[number, y : y + 2, x : x + 3] = True
    masks = Masks.from_dense(planes).pack()
    points = torch.stack([k, k, k], 1)[:, None].expand(-1, 4, 3).float()
    return Instances(size, masks.boxes(), k % 3, masks, 1 / (k + 1), points, k % 2 == 1, k + 100)


def same(a: Instances, b: Instances) -> bool:
    names = ("boxes", "labels", "scores", "keypoints", "crowd", "ids")
    assert a.masks is not None
    assert b.masks is not None
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.masks.rle() == b.masks.rle()


@pytest.mark.thorough
@given(st.integers(0, 6), st.data())
def test_selection_applies_to_all_fields(count, data):
    all_of_them = objects(count)
    numbers = data.draw(st.lists(st.integers(0, count - 1), max_size=4)) if count else []
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    for index in (torch.tensor(numbers, dtype=torch.int64), numbers, flags, slice(1, 3), slice(None, None, 2)):
        chosen = all_of_them[index]
        expected = torch.arange(count)[index] if not isinstance(index, list) else torch.tensor(index, dtype=torch.int64)
        assert chosen.ids is not None
        assert chosen.ids.tolist() == (expected + 100).tolist()
        assert chosen.masks is not None
        assert chosen.scores is not None
        assert chosen.keypoints is not None
        assert torch.equal(chosen.masks.boxes(), chosen.boxes)
        assert chosen.labels.tolist() == (expected % 3).tolist()
        assert chosen.keypoints[:, 0, 0].tolist() == expected.tolist()
        assert chosen.image_size == all_of_them.image_size


def test_one_object_by_position():
    assert objects(3)[-1].ids.tolist() == [102]  # pyright: ignore
    assert len(objects(3)[1]) == 1
    with pytest.raises(IndexError):
        objects(3)[3]


@pytest.mark.thorough
@given(st.integers(0, 5), st.integers(0, 5))
def test_splitting_and_joining(count, cut):
    whole = objects(count)
    assert same(Instances.join([whole[:cut], whole[cut:]]), whole)


def test_a_field_that_a_part_lacks_is_dropped_when_joining():
    first, second = objects(2), objects(2)
    second.scores = None
    joined = Instances.join([first, second])
    assert joined.scores is None
    assert len(joined) == 4
    assert joined.ids is not None


def test_empty_parts_do_not_change_which_fields_are_joined():
    whole = objects(2)
    boxes = Instances(whole.image_size, whole.boxes, whole.labels, scores=whole.scores)
    bare = Instances.empty(whole.image_size, masks=False, scores=False)
    full = Instances.empty(whole.image_size, keypoints=4)
    assert same(Instances.join([bare, whole, full]), whole)
    joined = Instances.join([full, boxes])
    assert joined.masks is None
    assert joined.keypoints is None
    assert joined.scores is not None
    assert Instances.join([whole, boxes]).masks is None, "not all objects have masks"
    assert Instances.join([full, full]).masks is not None
    assert Instances.join([full, bare]).masks is None


def test_parts_that_cannot_be_joined():
    with pytest.raises(ValueError, match="at least one part"):
        Instances.join([])
    with pytest.raises(ValueError, match=r"images of different sizes cannot be joined: \[\(12, 16\), \(13, 16\)\]"):
        Instances.join([objects(1), objects(1, (13, 16))])
    other = replace(objects(1), keypoints=torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match=r"different numbers of keypoints cannot be joined: \[4, 5\]"):
        Instances.join([objects(1), other])


def test_empty_results_have_only_the_fields_that_are_asked_for():
    none = Instances.empty((5, 7), masks=False, scores=False)
    assert (none.masks, none.scores, none.keypoints) == (None, None, None)
    full = Instances.empty((5, 7), keypoints=17)
    assert full.masks is not None
    assert full.scores is not None
    assert full.keypoints is not None
    assert full.keypoints.shape == (0, 17, 3)


def test_objects_without_masks():
    whole = objects(3)
    boxes = replace(whole, masks=None)
    assert "segmentation" not in boxes.to_coco(1)[0]
    assert [r["bbox"] for r in boxes.to_coco(1)] == [r["bbox"] for r in whole.to_coco(1)]
    assert boxes[[True, False, True]].masks is None
    assert Instances.join([boxes, boxes[:1]]).masks is None
    assert boxes.place(Placement.resize((12, 16), (24, 32))).masks is None
    image = torch.full((3, 12, 16), 90, dtype=torch.uint8)
    assert boxes.draw(image).size == (16, 12)
    assert draw(image, boxes, things=torch.tensor([True, False, True])).size == (16, 12)
    assert boxes.to("cpu").masks is None


def test_indices_of_numpy_and_python():
    whole = objects(4)
    for index, ids in (
        ([True, False, False, True], [100, 103]),
        (np.array([False, True, False, False]), [101]),
        (np.array([-1, 0]), [103, 100]),
        (np.int64(2), [102]),
        (slice(None, None, -2), [103, 101]),
        ([], []),
        (..., [100, 101, 102, 103]),
        (np.array([3, 0])[::-1], [100, 103]),
        (np.array([3, 0], ">i4"), [103, 100]),
        (np.array([1, 2], np.uint8), [101, 102]),
        (torch.tensor([1, 2], dtype=torch.uint8), [101, 102]),
        ([torch.tensor(1), torch.tensor(3)], [101, 103]),
        ([torch.tensor(True), torch.tensor(False), torch.tensor(False), torch.tensor(True)], [100, 103]),
        (torch.tensor(2), [102]),
        (range(1, 3), [101, 102]),
        (-4, [100]),
        (slice(9, None), []),
    ):
        chosen = whole[index].ids
        assert chosen is not None
        assert chosen.tolist() == ids
    wrong = [[True], [4], -5, np.array([1.0]), [0.0], True, [None], [[0, 1]], [[0], [1, 2]], "a"]
    for index in [*wrong, np.zeros(0, bool), np.zeros(5, bool), torch.zeros(4), np.array(["a"])]:
        with pytest.raises(IndexError, match=r"for each of 4 objects|out of range for 4 objects|must be an integer"):
            whole[index]


def test_inconsistent_fields_are_an_error():
    with pytest.raises(ValueError, match="`masks` has 0 rows, but `boxes` has 1"):
        Instances((4, 4), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), Masks.empty((4, 4)))
    with pytest.raises(ValueError, match=r"`masks` have size \(5, 4\), but the image has \(4, 4\)"):
        Instances((4, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), Masks.empty((5, 4)))


def test_empty_results():
    none = Instances.empty((5, 7))
    assert len(none) == 0
    assert none.to_coco(1) == []
    placed = none.place(Placement.resize((5, 7), (10, 14)).then_mirror())
    assert len(placed) == 0
    assert placed.image_size == (10, 14)
    assert len(Instances.join([none, none])) == 0
    assert len(none[torch.zeros(0, dtype=torch.bool)]) == len(none[[]]) == len(none[:3]) == 0
    assert none.draw(torch.zeros(3, 5, 7, dtype=torch.uint8)).size == (7, 5)
    assert none.to("cpu").scores is not None


def test_coco_records_are_read_by_pycocotools():
    found = objects(3)
    records = json.loads(json.dumps(found.to_coco("a.jpg", category_ids=[7, 90, 1])))
    assert [r["category_id"] for r in records] == [7, 90, 1]
    assert all(r["image_id"] == "a.jpg" for r in records)
    for record, box, score in zip(records, found.boxes.tolist(), [1, 1 / 2, 1 / 3], strict=True):
        assert record["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]])
        assert coco.toBbox(record["segmentation"]).tolist() == pytest.approx(record["bbox"])
        assert record["score"] == pytest.approx(score)
        assert len(record["keypoints"]) == 12
    assert [r["category_id"] for r in found.to_coco(5)] == [1, 2, 3], "the default category id is label + 1"


@pytest.mark.thorough
def test_conversion_to_supervision():
    pytest.importorskip("supervision")
    found = objects(3)
    theirs = found.to_supervision()
    assert len(theirs) == 3
    assert theirs.mask.shape == (3, 12, 16)
    assert theirs.class_id.tolist() == [0, 1, 2]


# ---- batches -------------------------------------------------------------------------------------------------------


def test_images_of_different_sizes_in_a_batch():
    images = [torch.full((3, 40, 20), 1.0), torch.full((3, 33, 50), 2.0)]
    placements = [Placement.identity((40, 20)), Placement.identity((33, 50))]
    batch = Batch.collate(images, placements, multiple=32, value=9.0, names=["a", "b"])
    assert batch.images.shape == (2, 3, 64, 64)
    assert len(batch) == 2
    for plane, image in zip(batch.images, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(plane[:, :height, :width], image), "at the upper left"
        assert (plane[:, height:] == 9).all()
        assert (plane[:, :, width:] == 9).all()
    assert Batch.collate(images[:1], placements[:1], multiple=1).images.shape == (1, 3, 40, 20)
    moved = batch.to("cpu")
    assert moved.names == ["a", "b"]
    assert moved.targets is None


def test_targets_move_with_their_batch():
    batch = Batch.collate([torch.zeros(3, 12, 16)], [Placement.identity((12, 16))], [objects(2)])
    assert batch.to("cpu").targets is not None
    assert len(batch.to("cpu").targets[0]) == 2


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_detected_in_the_test_run():
    from tests.shapes import ENABLED

    if not ENABLED:
        pytest.skip("shape checking is disabled")
    with pytest.raises(Exception, match="points_to_input"):
        Placement.identity((4, 4)).points_to_input(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(Exception, match="from_dense"):
        Masks.from_dense(torch.zeros(4, 4, dtype=torch.bool))


def test_drawing_on_an_image_of_another_size_is_an_error():
    with pytest.raises(UsageError, match=r"the image is 5 x 5, but the objects belong to an image of 12 x 16"):
        objects(1).draw(torch.zeros(3, 5, 5, dtype=torch.uint8))


def test_ids_of_tracked_predictions_are_written_and_read(tmp_path: Path):
    masks = Masks.from_polygons([[[1, 1, 5, 1, 5, 5]], [[2, 2, 9, 2, 9, 7]]], (12, 16))
    objects = Instances((12, 16), masks.boxes(), torch.tensor([0, 1]), masks, torch.tensor([0.9, 0.8]))
    assert "track_id" not in objects.to_coco(1)[0]
    objects.ids = torch.tensor([7, 3])
    records = objects.to_coco(1)
    assert [record["track_id"] for record in records] == [7, 3]
    assert instances_from_records(records, (12, 16), lambda number: number - 1).ids.tolist() == [7, 3]
    del records[1]["track_id"]
    assert instances_from_records(records, (12, 16), lambda number: number - 1).ids is None
    read, _ = load_objects(save_objects(objects, tmp_path / "objects.npz"))
    assert read.ids.tolist() == [7, 3]
    assert objects[[1]].ids.tolist() == [3]
    objects.scores = None  # annotations, whose ids are no tracks
    assert "track_id" not in objects.to_coco(1)[0]
