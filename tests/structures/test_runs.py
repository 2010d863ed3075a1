"""Runs: coding, union, and outlines that fill to the same mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from maskwright.structures import Masks, polygons, rle, runs

pytestmark = pytest.mark.fast
planes = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda size: arrays(bool, size))


def of(plane: np.ndarray):
    size = plane.shape
    return runs.decoded([rle.from_crop(plane, 0, 0, size)], size[0])


@pytest.mark.thorough
@given(planes)
def test_coding_and_cropping_lose_nothing(plane):
    height, width = plane.shape
    starts, ends, owner = of(plane)
    assert not owner.any()
    assert (ends - starts).sum() == plane.sum()
    assert runs.encoded([starts], [ends], plane.shape) == [rle.from_crop(plane, 0, 0, plane.shape)]
    assert np.array_equal(runs.crop(starts, ends, height, (0, 0, width, height)), plane)
    x0, y0, x1, y1 = runs.frame(starts, ends, height)
    assert plane[y0:y1, x0:x1].sum() == plane.sum()
    window = (width // 3, height // 3, width, height)
    assert np.array_equal(runs.crop(starts, ends, height, window), plane[height // 3 :, width // 3 :])


@pytest.mark.thorough
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_union_is_that_of_planes(height, width, data):
    a, b = (data.draw(arrays(bool, (height, width))) for _ in range(2))
    first, second = of(a), of(b)
    starts, ends = runs.union(*(np.concatenate([first[k], second[k]]) for k in (0, 1)))
    assert runs.encoded([starts], [ends], a.shape) == [rle.from_crop(a | b, 0, 0, a.shape)]


@pytest.mark.thorough
@given(planes, planes)
def test_outlines_fill_to_the_mask(first, second):
    for plane in (first, second):
        starts, ends, owner = of(plane)
        (rings,) = runs.outlines(starts, ends, owner, 1, plane.shape[0])
        filled = Masks.from_polygons([rings], plane.shape, fill="even-odd").dense()[0].numpy()
        assert np.array_equal(filled, plane)
        edges = sum(int(np.abs(np.diff(np.vstack([r, r[:1]]), axis=0)).sum()) for r in rings)
        border = np.pad(plane, 1)
        assert edges == sum(int((np.diff(border.astype(int), axis=k) != 0).sum()) for k in (0, 1)), "no edge twice"
        for ring in rings:
            turned = np.diff(np.vstack([ring, ring[:1]]), axis=0)
            assert ((turned[:, 0] == 0) != (turned[:, 1] == 0)).all(), "corners only"
            area = ring[:, 0] @ np.roll(ring[:, 1], -1) - ring[:, 1] @ np.roll(ring[:, 0], -1)
            x, y = ring[np.lexsort((ring[:, 1], ring[:, 0]))[0]]
            assert (area > 0) == bool(plane[y, x]), "outer borders are clockwise on the screen"


def test_several_masks_are_traced_as_each_alone():
    masks = [np.pad(np.ones((3, 2), bool), 1), np.pad(np.ones((1, 1), bool), ((2, 2), (0, 3))), np.zeros((5, 4), bool)]
    strings = [rle.from_crop(mask, 0, 0, (5, 4)) for mask in masks]
    traced = runs.outlines(*runs.decoded(strings, 5), 3, 5)
    assert [len(rings) for rings in traced] == [1, 1, 0]
    assert traced[0][0].tolist() == polygons.trace(masks[0], 0, 0)[0].tolist()
    assert traced[1][0].tolist() == [[0, 2], [1, 2], [1, 3], [0, 3]]
