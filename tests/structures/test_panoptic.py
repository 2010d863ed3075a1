"""Panoptic segments: conversion from and to maps, files and drawings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskwright.structures import Instances, Masks, Panoptic
from maskwright.structures.panoptic import colours_to_ids, ids_to_colours
from tests.structures.strategies import SIZES

pytestmark = pytest.mark.fast


@st.composite
def maps(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A map of numbers 0 ... N in blocks, with labels and whether they are things."""
    height, width = draw(SIZES)
    count = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    plane = rng.integers(0, count + 1, (-(-height // 3), -(-width // 2))).repeat(3, 0).repeat(2, 1)[:height, :width]
    plane = torch.from_numpy(plane.astype(np.int64))
    labels = torch.from_numpy(rng.integers(0, 9, count))
    things = torch.from_numpy(rng.random(count) < 0.5)
    return plane, labels, things


def segments(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, Panoptic]:
    """The map, and its segments with scores and ids."""
    plane, labels, things = case
    count = len(labels)
    return plane, Panoptic.from_map(
        plane, labels, things, scores=torch.linspace(0, 1, count), ids=torch.arange(count) + 7
    )


@pytest.mark.thorough
@given(maps())
def test_a_map_and_its_segments_are_equivalent(case):
    plane, panoptic = segments(case)
    assert torch.equal(panoptic.map().long(), plane)
    assert panoptic.map().dtype == torch.int32
    masks = panoptic.segments.masks
    assert masks.kind == "rle"
    expected = torch.stack([plane == k + 1 for k in range(len(panoptic))]) if len(panoptic) else masks.dense()
    assert torch.equal(masks.dense(), expected)
    assert torch.equal(panoptic.segments.boxes, Masks.from_dense(expected).boxes())


@pytest.mark.thorough
@given(maps())
def test_every_pixel_has_the_label_of_its_segment(case):
    plane, panoptic = segments(case)
    labels = torch.cat([torch.tensor([-5]), panoptic.segments.labels])
    assert torch.equal(panoptic.semantic(void=-5).long(), labels[plane])


@pytest.mark.thorough
@given(maps())
def test_segments_may_have_any_numbers(case):
    plane, panoptic = segments(case)
    numbers = torch.tensor([0, 900_000, 3, 17_000_000, 12, 5])[: len(panoptic) + 1]
    same = Panoptic.from_map(numbers[plane].int(), panoptic.segments.labels, panoptic.things, numbers=numbers[1:])
    assert torch.equal(same.map(), panoptic.map())


@pytest.mark.thorough
@given(maps())
def test_the_png_and_the_record_describe_all_segments(case):
    plane, panoptic = segments(case)
    record = panoptic.to_coco("a", [label * 10 for label in range(9)])
    ids = colours_to_ids(np.asarray(panoptic.to_png()))
    assert np.array_equal(ids, np.where(plane > 0, plane + 6, 0))
    areas = dict(zip(*np.unique(ids, return_counts=True), strict=True))
    assert {s["id"] for s in record["segments_info"]} == set(areas) - {0}, "segments without pixels are omitted"
    for segment in record["segments_info"]:
        assert segment["area"] == areas[segment["id"]]
        assert segment["category_id"] == 10 * int(panoptic.segments.labels[segment["id"] - 7])
        x, y, width, height = segment["bbox"]
        rows, columns = np.nonzero(ids == segment["id"])
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
    assert record["file_name"] == "a.png"


@pytest.mark.thorough
@given(maps())
def test_instances_are_the_things(case):
    _, panoptic = segments(case)
    things = panoptic.instances()
    assert isinstance(things, Instances)
    assert torch.equal(things.ids, panoptic.segments.ids[panoptic.things])
    rest = panoptic[~panoptic.things]
    assert int((panoptic.map() > 0).sum()) == int(things.masks.areas().sum() + (rest.map() > 0).sum())


@given(st.integers(0, 2**24 - 1))
def test_encoding_and_decoding_colours(number):
    colours = ids_to_colours(np.array([[number]]))
    assert colours[0, 0].tolist() == [number % 256, number // 256 % 256, number // 65536]
    assert colours_to_ids(colours)[0, 0] == number


def test_ids_that_cannot_be_encoded_are_replaced():
    plane = torch.tensor([[1, 2]])
    labels, things = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    for ids in ([5, 5], [0, 4], [3, 2**24]):
        panoptic = Panoptic.from_map(plane, labels, things, ids=torch.tensor(ids))
        assert panoptic.numbers() == [1, 2]
    assert Panoptic.from_map(plane, labels, things).numbers() == [1, 2]


def test_invalid_segments_are_an_error():
    planes = torch.ones(2, 4, 4, dtype=torch.bool)
    masks = Masks.from_dense(planes)
    both = Instances((4, 4), masks.boxes(), torch.tensor([0, 1]), masks)
    with pytest.raises(ValueError, match="segments overlap; the masks of panoptic segments must be disjoint"):
        Panoptic(both, torch.tensor([True, False])).map()
    with pytest.raises(ValueError, match="`segments` must have masks"):
        Panoptic(Instances((4, 4), masks.boxes(), torch.tensor([0, 1])), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="`things` has 1 rows, but there are 2 segments"):
        Panoptic(both, torch.tensor([True]))


@pytest.mark.thorough
def test_many_segments_of_a_large_image_need_little_memory():
    plane = torch.arange(300, dtype=torch.int32).reshape(15, 20).repeat_interleave(200, 0).repeat_interleave(200, 1)
    panoptic = Panoptic.from_map(plane, torch.zeros(299, dtype=torch.int64), torch.ones(299, dtype=torch.bool))
    assert panoptic.segments.masks.nbytes < 1 << 20
    assert torch.equal(panoptic.map(), plane)


def test_no_segments():
    panoptic = Panoptic.empty((6, 8))
    assert panoptic.map().eq(0).all()
    assert panoptic.semantic().eq(-1).all()
    assert panoptic.to_coco(3)["segments_info"] == []
    assert panoptic.draw(np.zeros((6, 8, 3), np.uint8)).size == (8, 6)


def test_regions_are_drawn_without_a_box_and_named_inside():
    plane = torch.ones(120, 200, dtype=torch.int64)
    plane[40:80, 20:60] = 2
    panoptic = Panoptic.from_map(plane, torch.tensor([1, 0]), torch.tensor([False, True]))
    image = panoptic.draw(np.full((120, 200, 3), 200, np.uint8), ("cat", "grass"), labels=False, contours=False)
    assert isinstance(image, Image.Image)
    corner, inside = image.getpixel((3, 3)), image.getpixel((150, 60))
    assert corner == inside, "no border at the edge of the image"
    assert image.getpixel((20, 60)) != image.getpixel((40, 60)), "the object has a box"
    named = np.asarray(panoptic.draw(np.full((120, 200, 3), 200, np.uint8), ("cat", "grass"), contours=False))
    changed = (named != np.asarray(image)).any(-1)
    assert changed[:, 100:].any(), "the name is inside the region"
    assert not changed[:10].any()
