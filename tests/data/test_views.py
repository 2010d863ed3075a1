"""Views of a data set keep everything that belongs to an object, and document their order."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from maskwright.data import (
    Dataset,
    OneClass,
    Renamed,
    Sample,
    Scenes,
    Subset,
    evenly_spaced,
    things_only,
    without_keypoints,
)
from maskwright.structures import Instances

pytestmark = pytest.mark.fast


class Numbered(Dataset):
    """Scenes whose objects have their own areas and ids: 1000 index + number."""

    def __init__(self):
        self.inner = Scenes(5, size=(64, 64), seed=3)
        self.name, self.classes, self.category_ids = "numbered", self.inner.classes, self.inner.category_ids
        self.stuff = self.classes[1:2]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        return self.inner[index]

    def sizes(self):
        return self.inner.sizes()

    def image_ids(self):
        return [f"image {k}" for k in range(len(self))]

    def targets(self, index: int) -> Instances:
        return self.inner.targets(index)

    def areas(self, index: int) -> np.ndarray:
        return 1000.0 * index + np.arange(len(self.targets(index)))

    def annotation_ids(self, index: int) -> list:
        return [f"{index}/{k}" for k in range(len(self.targets(index)))]


def rows_of(view, index: int) -> list[tuple]:
    """Class, box, area and id of each object of an image."""
    target, sample = view.targets(index), view[index]
    assert torch.equal(target.labels, sample.target.labels)
    assert torch.equal(target.boxes, sample.target.boxes)
    names = [view.classes[k] for k in target.labels.tolist()]
    boxes = [tuple(b) for b in target.boxes.tolist()]
    return list(zip(names, boxes, view.areas(index).tolist(), view.annotation_ids(index), strict=True))


@pytest.mark.thorough
def test_renamed_objects_keep_their_areas_and_ids():
    data = Numbered()
    names = ("unknown", data.classes[2], data.classes[0])
    view = Renamed(data, names)
    assert view.classes == names
    assert view.category_ids[1:] == (data.category_ids[2], data.category_ids[0])
    assert len(set(view.category_ids)) == 3
    for index in range(len(data)):
        assert rows_of(view, index) == [row for row in rows_of(data, index) if row[0] in names]
    assert any(len(rows_of(view, k)) < len(rows_of(data, k)) for k in range(len(data))), "some were omitted"


@pytest.mark.thorough
def test_stuff_is_omitted_with_its_areas():
    data = Numbered()
    view = things_only(data)
    assert (view.stuff, view.name) == ((), "numbered")
    assert view.classes == tuple(c for c in data.classes if c not in data.stuff)
    for index in range(len(data)):
        assert rows_of(view, index) == [row for row in rows_of(data, index) if row[0] not in data.stuff]


@pytest.mark.thorough
def test_one_class_contains_all_objects_in_the_order_of_their_labels():
    data = Numbered()
    view = OneClass(data, "thing")
    for index in range(len(data)):
        rows = sorted(rows_of(data, index), key=lambda row: data.classes.index(row[0]))
        assert rows_of(view, index) == [("thing", *row[1:]) for row in rows]


def test_a_subset_of_images():
    data = Numbered()
    view = Subset(data, [4, 1])
    assert view.image_ids() == ["image 4", "image 1"]
    assert view.sizes() == [data.sizes()[4], data.sizes()[1]]
    assert rows_of(view, 0) == rows_of(data, 4)
    assert evenly_spaced(data, 2).image_ids() == ["image 0", "image 2"]
    assert evenly_spaced(data, None) is evenly_spaced(data, 5) is data


def test_views_of_views_can_be_pickled():
    view = pickle.loads(pickle.dumps(OneClass(Subset(things_only(Numbered()), [3, 0]))))
    assert view.image_ids() == ["image 3", "image 0"]
    assert len(rows_of(view, 0)) == len(things_only(Numbered()).targets(3))


def test_views_keep_the_attributes_of_the_data_set():
    data = Numbered()
    data.origin, data.strict, data.has_areas, data.keypoint_names = "somewhere", True, False, ("tip",)
    for view in (Subset(data, [0]), Renamed(data, data.classes), things_only(data), OneClass(data)):
        assert (view.name, view.origin, view.strict, view.has_areas) == ("numbered", "somewhere", True, False)
        assert view.keypoint_names == ("tip",)
    assert Renamed(data, data.classes).stuff == data.stuff
    assert Renamed(data, data.classes[:1]).stuff == ()


@pytest.mark.thorough
def test_keypoints_can_be_dropped():
    data = Scenes(2, (64, 64), keypoints=True, empty=0)
    view = without_keypoints(data)
    assert view.keypoint_names is None
    assert view.targets(0).keypoints is None
    assert view[1].target.keypoints is None
    assert torch.equal(view.targets(0).boxes, data.targets(0).boxes)
    assert without_keypoints(view) is view
