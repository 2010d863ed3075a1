"""Masks are equal in all representations, and agree with pycocotools."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from maskwright.errors import MaskCodeError, UsageError
from maskwright.structures import Masks, Placement, rle
from tests.structures.strategies import SIZES, planes

pytestmark = pytest.mark.fast
few = settings(max_examples=settings.default.max_examples // 3)  # each example checks three representations


def codes_of(dense: torch.Tensor) -> list[dict]:
    return coco.encode(np.asfortranarray(dense.permute(1, 2, 0).numpy().astype(np.uint8)))


def forms(dense: torch.Tensor) -> list[Masks]:
    """The same masks as planes, run-length codes and polygons."""
    size = (dense.shape[1], dense.shape[2])
    masks = Masks.from_dense(dense)
    return [masks, masks.pack(), Masks.from_polygons(masks.polygons(), size, fill="even-odd")]


# ---- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@few
@given(planes())
def test_all_representations_are_equal(dense):
    for masks in forms(dense):
        assert torch.equal(masks.dense(), dense), masks
        assert torch.equal(masks.pack().dense(), dense), masks
        assert [c["counts"] for c in masks.rle()] == [c["counts"] for c in codes_of(dense)], (
            "the strings of pycocotools"
        )
        outlines = Masks.from_polygons(masks.pack().polygons(), masks.size, fill="even-odd")
        assert torch.equal(outlines.dense(), dense)


@pytest.mark.thorough
@given(planes())
def test_compressed_and_uncompressed_run_lengths_are_read(dense):
    size = (dense.shape[1], dense.shape[2])
    strings = [c["counts"] for c in codes_of(dense)]
    plain = [{"size": list(size), "counts": rle.decode_counts(s).tolist()} for s in strings]
    texts = [{"size": list(size), "counts": s.decode()} for s in strings]
    for codes in (strings, plain, texts):
        assert torch.equal(Masks.from_rle(codes, size).dense(), dense)


def test_parts_that_touch_at_a_corner_are_separate():
    dense = torch.tensor([[[1, 0], [0, 1]]]).bool()
    (rings,) = Masks.from_dense(dense).polygons()
    assert len(rings) == 2
    assert all(len(ring) == 4 for ring in rings)


def test_a_hole_is_a_separate_ring():
    dense = torch.ones(1, 5, 5).bool()
    dense[0, 2, 2] = False
    (rings,) = Masks.from_dense(dense).polygons()
    assert sorted(len(r) for r in rings) == [4, 4]
    assert Masks.from_polygons([rings], (5, 5), fill="union").areas().tolist() == [25], "COCO has no holes"
    assert Masks.from_polygons([rings], (5, 5), fill="even-odd").areas().tolist() == [24]


@pytest.mark.thorough
@given(st.lists(st.tuples(st.floats(-30, 60), st.floats(-30, 60)), min_size=3, max_size=9), SIZES)
def test_polygons_are_filled_as_pycocotools_fills_them(points, size):
    flat = [v for p in points for v in p]
    theirs = coco.decode(coco.frPyObjects([flat], *size))[..., 0]
    ours = Masks.from_polygons([[flat]], size)
    assert np.array_equal(ours.dense()[0].numpy(), theirs.astype(bool))


@pytest.mark.thorough
@given(
    st.lists(st.tuples(st.floats(allow_nan=True, allow_infinity=True), st.floats()), min_size=3, max_size=6),
    SIZES,
)
def test_any_coordinates_give_a_mask_or_an_error(points, size):
    flat = np.array(points).ravel()
    if not np.isfinite(flat).all():
        with pytest.raises(ValueError, match="not finite"):
            Masks.from_polygons([[flat]], size)
        return
    masks = Masks.from_polygons([[flat]], size)  # coordinates of 1e300 among them
    assert 0 <= int(masks.areas()) <= size[0] * size[1]
    boxes = masks.boxes()[0]
    assert torch.isfinite(boxes).all()


def test_a_huge_square_fills_the_image():
    ring = [-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]
    assert Masks.from_polygons([[ring]], (7, 9)).areas().tolist() == [63]


@pytest.mark.parametrize(
    ("ring", "says"),
    [
        ([1, 2, 3, 4], "2 points; at least 3"),
        ([1, 2, 3, 4, 5, 6, 7], "odd number of coordinates (7)"),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], "not a list of x, y pairs"),
        ([], "0 points"),
        ([0, 0, 1, float("nan"), 2, 2], "not finite"),
    ],
)
def test_an_invalid_ring_is_an_error(ring, says):
    with pytest.raises(ValueError, match="polygon 1 ") as caught:
        Masks.from_polygons([[[0, 0, 4, 0, 4, 4], ring]], (8, 8))
    assert says in str(caught.value)


# ---- invalid strings -----------------------------------------------------------------------------------------------


@given(st.binary(max_size=40), SIZES)
def test_random_bytes_are_an_error_or_a_valid_mask(text, size):
    try:
        masks = Masks.from_rle([text], size)
    except ValueError:
        with pytest.raises(ValueError, match="mask 0"):
            Masks.from_rle([text], size)
        return
    area = int(masks.areas())
    assert int(masks.dense().sum()) == area == int(coco.area({"size": list(size), "counts": text}))


@pytest.mark.thorough
@given(planes(1, 1), st.data())
def test_a_damaged_string_is_an_error_or_covers_the_image(dense, data):
    text = bytearray(codes_of(dense)[0]["counts"])
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    size = (dense.shape[1], dense.shape[2])
    try:
        masks = Masks.from_rle([bytes(text)], size)
    except ValueError:
        return
    assert masks.dense().shape == (1, *size)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        ([{"size": [2, 2], "counts": [4]}, {"size": [2, 3], "counts": [6]}], "mask 1 is 2 x 3, expected 2 x 2"),
        ([{"size": [2, 2], "counts": [3]}], "mask 0 cover 3 pixels, but its image has 4"),
        ([{"size": [2, 2], "counts": [5, -1]}], "negative run"),
        ([{"size": [2, 2], "counts": "é"}], "mask 0 is not a valid run-length code"),
        ([{"size": [2, 2], "counts": [1e30]}], "mask 0"),
        ([{"size": [2, 2], "counts": ["x"]}], "mask 0"),
        ([b"4"], "need the argument `size`"),
        ([], "the argument `size` is needed"),
        ([{"size": [445], "counts": [1.5, 2]}], "mask 0 has the size [445], expected [height, width]"),
        ({"size": [2, 2], "counts": [4]}, "codes must be a list of run-length codes of masks, got a single dict"),
    ],
)
def test_an_invalid_code_is_an_error(codes, says):
    with pytest.raises(MaskCodeError, match=r"mask|size") as caught:
        Masks.from_rle(codes)
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.thorough
@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_encoding_and_decoding_counts(counts):
    assert rle.decode_counts(rle.encode_counts(np.array(counts))).tolist() == counts


@pytest.mark.thorough
@given(planes(0, 6))
def test_decoding_many_equals_decoding_each(dense):
    height = dense.shape[1]
    texts = [code["counts"] for code in codes_of(dense)]
    counts, lengths = rle.decode_all(texts)
    assert lengths.tolist() == [len(rle.decode_counts(text)) for text in texts]
    assert counts.tolist() == [n for text in texts for n in rle.decode_counts(text).tolist()]
    assert rle.frames(texts, height) == [rle.frame(text, height) for text in texts]
    starts, ends, owner = rle.runs_all(texts)
    for number, (text, (frame, crop)) in enumerate(zip(texts, rle.to_crops(texts, height), strict=True)):
        own = owner == number
        assert [starts[own].tolist(), ends[own].tolist()] == [part.tolist() for part in rle.runs(text)]
        x0, y0, x1, y1 = frame
        assert np.array_equal(crop, dense[number, y0:y1, x0:x1].numpy())
        assert int(dense[number].sum()) == int((ends - starts)[own].sum()) == crop.sum()


# ---- crops ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@given(planes(0, 4), SIZES, st.data())
def test_masks_from_crops(dense, size, data):
    corners = [[data.draw(st.integers(-30, 30)), data.draw(st.integers(-30, 30))] for _ in dense]
    masks = Masks.from_crops(list(dense), torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), size)
    wide = torch.zeros(len(dense), size[0] + 120, size[1] + 120, dtype=torch.bool)
    for plane, crop, (x, y) in zip(wide, dense, corners, strict=True):
        plane[y + 60 : y + 60 + crop.shape[0], x + 60 : x + 60 + crop.shape[1]] = crop
    assert torch.equal(masks.dense(), wide[:, 60 : 60 + size[0], 60 : 60 + size[1]])


@pytest.mark.thorough
@few
@given(planes())
def test_crops_are_tight(dense):
    for masks in forms(dense):
        frames, crops = masks.crops()
        assert frames.shape == (len(dense), 4)
        for (x0, y0, x1, y1), crop, plane in zip(frames.tolist(), crops, dense, strict=True):
            assert torch.equal(crop, plane[y0:y1, x0:x1])
            assert int(crop.sum()) == int(plane.sum())
            if crop.numel():
                assert crop[0].any()
                assert crop[-1].any()
                assert crop[:, 0].any()
                assert crop[:, -1].any()


def test_no_masks():
    for masks in [Masks.empty((5, 6)), Masks.from_dense(torch.zeros(0, 5, 6).bool()), Masks.from_polygons([], (5, 6))]:
        assert len(masks) == 0
        assert masks.size == (5, 6)
        assert masks.dense().shape == (0, 5, 6)
        assert masks.areas().shape == (0,)
        assert masks.boxes().shape == (0, 4)
        assert masks.iou(masks).shape == (0, 0)
        assert masks.polygons() == []
        assert masks.rle() == []
        assert masks.nbytes == 0
        assert masks.resize((2, 3)).size == (2, 3)
        assert masks.union().areas().tolist() == [0]
        assert len(masks[:0]) == 0
        assert len(masks[torch.zeros(0, dtype=torch.bool)]) == 0
    assert Masks.from_polygons([[]], (4, 4)).areas().tolist() == [0], "an object without rings"


# ---- measurement ---------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@few
@given(planes(1))
def test_areas_boxes_and_iou_agree_with_pycocotools(dense):
    codes = codes_of(dense)
    boxes = coco.toBbox(codes)
    boxes[:, 2:] += boxes[:, :2]
    there = dense.flatten(1).any(1)
    crowd = torch.arange(len(dense)) % 2 == 0
    for masks in forms(dense):
        assert masks.areas().tolist() == coco.area(codes).tolist()
        assert torch.equal(masks.boxes()[there], torch.from_numpy(boxes).float()[there])
        assert not masks.boxes()[~there].any(), "an empty mask has an empty box"
        for flags in (None, crowd):
            theirs = coco.iou(codes, codes, [0] * len(dense) if flags is None else flags.int().tolist())
            assert np.allclose(masks.iou(masks, flags).numpy(), theirs, atol=1e-6)


@pytest.mark.thorough
@given(planes(1))
def test_the_union_of_all(dense):
    for masks in forms(dense):
        assert torch.equal(masks.union().dense(), dense.any(0, keepdim=True))


# ---- selection and joining -----------------------------------------------------------------------------------------


@pytest.mark.thorough
@few
@given(planes(1), st.data())
def test_indexing_equals_that_of_a_tensor(dense, data):
    count = len(dense)
    indices = [
        slice(data.draw(st.integers(-5, 5)), data.draw(st.integers(-5, 5)), data.draw(st.sampled_from([None, 1, 2]))),
        torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=5)), dtype=torch.int64),
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        data.draw(st.lists(st.integers(-count, count - 1), min_size=1, max_size=5)),
    ]
    for masks in forms(dense):
        for index in indices:
            assert torch.equal(masks[index].dense(), dense[index]), (masks, index)
        for number in range(-count, count):
            assert torch.equal(masks[number].dense(), dense[[number]])
        assert [int(m.areas()) for m in masks] == dense.sum((1, 2)).tolist()


def test_invalid_positions_are_an_index_error():
    for masks in forms(torch.ones(2, 3, 3).bool()):
        for number in (2, -3):
            with pytest.raises(IndexError):
                masks[number]
        with pytest.raises(IndexError):
            masks[torch.ones(3, dtype=torch.bool)]


def test_numpy_indices():
    dense = torch.eye(4).bool()[:, None].expand(4, 3, 4)
    indices = {
        (True, False, False, True): [0, 3],
        (0, -2): [0, 2],
        (): [],
    }
    arrays = [(np.array([False, True, True, False]), [1, 2]), (np.array([3, 0], np.uint8), [3, 0])]
    others = [(np.int32(2), [2]), (torch.tensor(-1), [3]), (np.array([]), []), (slice(None, None, -1), [3, 2, 1, 0])]
    for masks in forms(dense):
        for index, expected in [*((list(k), v) for k, v in indices.items()), *indices.items(), *arrays, *others]:
            assert torch.equal(masks[index].dense(), dense[expected]), (masks, index)
        for index in (4, [0, -5], [True], np.ones(5, bool), np.array([0.5]), np.zeros((2, 2), int), True):
            with pytest.raises(IndexError, match=r"out of range|must have one value|must be an integer"):
                masks[index]


def test_planes_with_a_channel_axis_are_an_error():
    from_dense = inspect.unwrap(Masks.from_dense.__func__)  # without the shape checks of the test run
    with pytest.raises(UsageError, match=r"shape \(N, H, W\), got \(2, 1, 4, 4\); remove the channel axis"):
        from_dense(Masks, torch.zeros(2, 1, 4, 4))
    with pytest.raises(UsageError, match=r"shape \(N, H, W\), got \(4, 4\)$"):
        from_dense(Masks, torch.zeros(4, 4))


@pytest.mark.thorough
@few
@given(planes(1), planes(0, 3))
def test_joining(dense, others):
    if dense.shape[1:] != others.shape[1:]:
        if len(others):
            with pytest.raises(ValueError, match="different sizes"):
                Masks.join([Masks.from_dense(dense), Masks.from_dense(others)])
        others = dense[:0]
    both = torch.cat([dense, others])
    for first in forms(dense):
        for second in forms(others):
            assert torch.equal(Masks.join([first, second]).dense(), both)


def test_masks_can_be_pickled_and_copied():
    for masks in forms(torch.ones(2, 3, 3).bool()):
        for twin in (pickle.loads(pickle.dumps(masks)), copy.deepcopy(masks)):
            assert torch.equal(twin.dense(), masks.dense())
            assert twin.kind == masks.kind
            assert twin.size == (3, 3)


# ---- transformation ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@few
@given(planes(), st.integers(1, 4), st.integers(1, 4))
def test_enlarging_and_reducing_is_the_identity(dense, tall, wide):
    size = (dense.shape[1], dense.shape[2])
    for masks in forms(dense):
        large = masks.resize((size[0] * tall, size[1] * wide))
        expected = dense.repeat_interleave(tall, 1).repeat_interleave(wide, 2)
        assert torch.equal(large.dense(), expected), masks
        assert torch.equal(large.resize(size).dense(), dense), masks


@pytest.mark.thorough
@given(planes(), SIZES)
def test_resizing_uses_the_nearest_pixel(dense, size):
    rows = ((torch.arange(size[0]) + 0.5) * dense.shape[1] / size[0]).floor().long()
    columns = ((torch.arange(size[1]) + 0.5) * dense.shape[2] / size[1]).floor().long()
    assert torch.equal(Masks.from_dense(dense).resize(size).dense(), dense[:, rows][:, :, columns])


@pytest.mark.thorough
@few
@given(planes())
def test_a_flip_is_exact_and_its_own_inverse(dense):
    mirror = Placement.identity((dense.shape[1], dense.shape[2])).then_mirror()
    for masks in forms(dense):
        assert torch.equal(masks.place(mirror).dense(), dense.flip(2)), masks
        assert torch.equal(masks.place(mirror).place(mirror).dense(), dense), masks


@pytest.mark.thorough
@few
@given(planes(), st.integers(-9, 30), st.integers(-9, 30), SIZES)
def test_a_crop_is_a_window_of_the_plane(dense, x, y, size):
    placement = Placement.identity((dense.shape[1], dense.shape[2])).then_crop(x, y, size)
    wide = torch.nn.functional.pad(dense.byte(), (40, 60, 40, 60)).bool()
    expected = wide[:, y + 40 : y + 40 + size[0], x + 40 : x + 40 + size[1]]
    for masks in forms(dense):
        assert torch.equal(masks.place(placement).dense(), expected), masks


def test_a_placement_of_another_image_size_is_an_error():
    with pytest.raises(ValueError, match=r"masks of size \(4, 4\) do not fit a placement of images of \(5, 4\)"):
        Masks.empty((4, 4)).place(Placement.identity((5, 4)))


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_hundred_large_objects_need_less_than_a_megabyte():
    y, x = torch.meshgrid(torch.arange(300), torch.arange(400), indexing="ij")
    disc = (x - 200) ** 2 / 200**2 + (y - 150) ** 2 / 150**2 < 1
    corners = torch.stack([torch.arange(100) * 36, torch.arange(100) * 27], 1)
    masks = Masks.from_crops([disc] * 100, corners, (3000, 4000))
    assert masks.nbytes < 1 << 20
    assert masks.areas().unique().tolist() == [int(disc.sum())]
