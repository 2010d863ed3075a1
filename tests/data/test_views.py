"""Views of a data set show the same objects, with everything that belongs to them, in the order they say."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from maskwright.data import Chosen, Dataset, OneClass, Renamed, Sample, Scenes, spread, things_only
from maskwright.structures import Instances

pytestmark = pytest.mark.fast


class Numbered(Dataset):
    """Scenes whose objects have areas and ids of their own: 1000 index + number."""

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


def told(view, index: int) -> list[tuple]:
    """Each object of an image: its class, where it is, and what the set says of it."""
    target, sample = view.targets(index), view[index]
    assert torch.equal(target.labels, sample.target.labels)
    assert torch.equal(target.boxes, sample.target.boxes)
    names = [view.classes[k] for k in target.labels.tolist()]
    boxes = [tuple(b) for b in target.boxes.tolist()]
    return list(zip(names, boxes, view.areas(index).tolist(), view.annotation_ids(index), strict=True))


def test_renamed_objects_keep_their_areas_and_ids():
    data = Numbered()
    names = ("nobody", data.classes[2], data.classes[0])
    view = Renamed(data, names)
    assert view.classes == names
    assert view.category_ids[1:] == (data.category_ids[2], data.category_ids[0])
    assert len(set(view.category_ids)) == 3
    for index in range(len(data)):
        assert told(view, index) == [row for row in told(data, index) if row[0] in names]
    assert any(len(told(view, k)) < len(told(data, k)) for k in range(len(data))), "some were left out"


def test_stuff_is_left_out_with_its_areas():
    data = Numbered()
    view = things_only(data)
    assert (view.stuff, view.name) == ((), "numbered")
    assert view.classes == tuple(c for c in data.classes if c not in data.stuff)
    for index in range(len(data)):
        assert told(view, index) == [row for row in told(data, index) if row[0] not in data.stuff]


def test_one_class_has_all_objects_in_the_order_of_their_labels():
    data = Numbered()
    view = OneClass(data, "thing")
    for index in range(len(data)):
        rows = sorted(told(data, index), key=lambda row: data.classes.index(row[0]))
        assert told(view, index) == [("thing", *row[1:]) for row in rows]


def test_chosen_images():
    data = Numbered()
    view = Chosen(data, [4, 1])
    assert view.image_ids() == ["image 4", "image 1"]
    assert view.sizes() == [data.sizes()[4], data.sizes()[1]]
    assert told(view, 0) == told(data, 4)
    assert spread(data, 2).image_ids() == ["image 0", "image 2"]
    assert spread(data, None) is spread(data, 5) is data


def test_views_of_views_travel_to_workers():
    view = pickle.loads(pickle.dumps(OneClass(Chosen(things_only(Numbered()), [3, 0]))))
    assert view.image_ids() == ["image 3", "image 0"]
    assert len(told(view, 0)) == len(things_only(Numbered()).targets(3))


def test_a_set_without_areas_has_none_in_a_view_either():
    class Bare:
        classes, category_ids = ("a",), (1,)

        def __len__(self):
            return 0

    assert Renamed(Bare(), ("a",)).areas is None
