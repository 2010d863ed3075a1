"""The interface of data sets, and the adapter for user-defined ones."""

from __future__ import annotations

import pickle

import pytest
import torch

from maskwright.data import Augment, Dataset, Sample, Scenes, as_dataset, make_loader
from maskwright.errors import UsageError
from maskwright.structures import Instances, Preprocess

pytestmark = pytest.mark.fast

SCENES = Scenes(3, (48, 64), empty=0)


class Minimal:
    """The least that a data set needs; items are pairs."""

    classes = SCENES.classes

    def __len__(self) -> int:
        return len(SCENES)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Instances]:
        sample = SCENES[index]
        return sample.image, sample.target


class Partial(Minimal):
    """Some attributes and methods of the interface; items are samples."""

    name, category_ids, stuff, strict = "partial", (7, 8, 9, 10, 11, 12), ("disc",), True
    keypoint_names = ("tip",)

    def __getitem__(self, index: int) -> Sample:
        return SCENES[index]

    def sizes(self):
        return [(1, 2)] * 3

    def image_ids(self):
        return ["a", "b", "c"]

    def areas(self, index: int):
        return [1.5] * len(SCENES.targets(index))


def test_a_dataset_is_returned_unchanged():
    assert as_dataset(SCENES) is SCENES


@pytest.mark.thorough
def test_what_a_minimal_data_set_lacks_is_derived():
    data = as_dataset(Minimal())
    assert isinstance(data, Dataset)
    assert (data.classes, data.category_ids) == (SCENES.classes, (1, 2, 3, 4, 5, 6))
    assert (data.name, data.stuff, data.keypoint_names, data.strict) == ("unnamed", (), None, False)
    assert not data.has_areas
    assert data.sizes() == [(48, 64)] * 3
    assert data.image_ids() == [1, 2, 3]
    sample = data[-1]
    assert sample.id == 3
    assert torch.equal(sample.image, SCENES[2].image)
    target = data.targets(1)
    assert torch.equal(target.boxes, SCENES.targets(1).boxes)
    assert data.areas(1).tolist() == SCENES.areas(1).tolist()
    assert data.annotation_ids(1) == SCENES.annotation_ids(1)
    batch = next(iter(make_loader(Minimal(), Preprocess(short=32), batch_size=2, training=True, augment=Augment())))
    assert len(batch) == 2


def test_what_a_data_set_defines_is_used():
    data = as_dataset(Partial())
    assert (data.name, data.category_ids, data.stuff, data.strict) == (
        "partial",
        (7, 8, 9, 10, 11, 12),
        ("disc",),
        True,
    )
    assert data.keypoint_names == ("tip",)
    assert data.has_areas
    assert data.sizes() == [(1, 2)] * 3
    assert data.image_ids() == ["a", "b", "c"]
    assert set(data.areas(0).tolist()) == {1.5}
    assert data[0].id == 1
    again = pickle.loads(pickle.dumps(data))
    assert again.name == "partial"


def test_other_objects_are_an_error():
    with pytest.raises(UsageError, match="a data set needs classes, which 'list' does not have"):
        as_dataset([1, 2])
    with pytest.raises(UsageError, match="__len__ and __getitem__ and classes, which 'int'"):
        as_dataset(3)


def test_areas_of_objects_without_masks_are_those_of_their_boxes():
    class Boxes(Dataset):
        classes = ("a",)

        def targets(self, index: int) -> Instances:
            return Instances((9, 9), torch.tensor([[0.0, 0, 2, 3]]), torch.zeros(1, dtype=torch.int64))

    assert Boxes().areas(0).tolist() == [6]
    with pytest.raises(ValueError, match="masks"):
        Boxes().panoptic(0)
