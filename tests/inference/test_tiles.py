"""Tiled prediction gives the objects of the whole image: none split, duplicated or merged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.inference import predict
from maskwright.inference.tiles import cover, join_tiles, predict_tiled
from maskwright.structures import Instances, Masks
from tests.inference.painted import Painted, blocks, paint, save, seen

pytestmark = pytest.mark.fast


def pattern(kind: str, size: tuple[int, int], t: int) -> torch.Tensor:
    """A plane of object numbers; all objects touch their neighbours, are connected, and most span many tiles."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    if kind == "columns":
        return x // t
    if kind == "diagonals":
        return (x + y) // t
    if kind == "rings":
        return torch.minimum(torch.minimum(x, y), torch.minimum(width - 1 - x, height - 1 - y)) // t
    if kind == "combs":  # two that grip each other
        return ((x >= t) & ((y % (2 * t) >= t) | (x >= width - t))).long()
    if kind == "islands":  # many small ones, with space between
        numbers = y // (2 * t) * (width // (2 * t) + 1) + x // (2 * t)
        return torch.where((y % (2 * t) < t) & (x % (2 * t) < t), numbers, -1)
    return torch.zeros(size, dtype=torch.int64)  # one that fills the image


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 3)
@given(
    st.sampled_from(["columns", "diagonals", "rings", "combs", "islands", "whole"]),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    st.integers(8, 30),
    st.integers(30, 60),
    st.floats(0.1, 0.5),
    st.integers(1, 5),
)
def test_a_perfect_system_sees_the_same_in_tiles(kind, size, thick, tile, overlap, batch):
    numbers = pattern(kind, size, thick)
    numbers = torch.where(numbers < 250, numbers, -1)
    image = paint(numbers)  # all of one class
    whole = seen(image)
    found = predict_tiled(lambda crops: [seen(c) for c in crops], image, tile, overlap, batch)
    assert found.image_size == whole.image_size
    assert len(found) == len(whole)
    assert found.masks is not None
    assert whole.masks is not None
    assert found.masks.rle() == whole.masks.rle(), "pixel by pixel, best first"
    assert torch.equal(found.scores, whole.scores)
    assert torch.equal(found.boxes, whole.boxes)


@pytest.mark.thorough
@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(16, 900), st.floats(0, 0.9))
def test_tiles_cover_everything_and_overlap_enough(size, tile, overlap):
    tiles = cover(size, tile, overlap)
    for axis, length in ((0, size[1]), (1, size[0])):
        spans = sorted({((t.x, t.x + t.width), (t.y, t.y + t.height))[axis] for t in tiles})
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end - start >= int(tile * overlap) - 1
        assert all(b - a == min(tile, length) for a, b in spans), "all of one size, as the network likes it"


def two_tiles(first: Instances, second: Instances) -> Instances:
    """Tiles of 40 x 40 side by side on an image of 40 x 64: they share columns 24 ... 39."""
    tiles = cover((40, 64), 40, 0.4)
    assert [(t.x, t.width) for t in tiles] == [(0, 40), (24, 40)]
    return join_tiles([first, second], tiles, (40, 64))


def block(x0: int, x1: int, label: int = 0, score: float = 0.9, y0: int = 10, y1: int = 30) -> Instances:
    plane = torch.zeros(1, 40, 40, dtype=torch.bool)
    plane[0, y0:y1, x0:x1] = True
    masks = Masks.from_dense(plane).pack()
    return Instances((40, 40), masks.boxes(), torch.tensor([label]), masks, torch.tensor([score]))


def test_the_union_has_the_best_score_and_the_box_of_all():
    joined = two_tiles(block(10, 40, score=0.6), block(0, 30, score=0.8))
    assert joined.boxes.tolist() == [[10, 10, 54, 30]]
    assert joined.scores.tolist() == pytest.approx([0.8])
    assert joined.masks.areas().tolist() == [44 * 20]


def test_other_classes_are_not_joined():
    assert len(two_tiles(block(10, 40), block(0, 30, label=1))) == 2


def test_inexact_edges_do_not_duplicate_an_object():
    joined = two_tiles(block(10, 40, y0=10, y1=30), block(0, 30, y0=11, y1=33))
    assert len(joined) == 1


def test_an_object_inside_one_tile_keeps_its_mask():
    # columns 26 ... 38 of the image: whole in both tiles; the second one's mask is a little smaller
    joined = two_tiles(block(26, 38, score=0.7), block(2, 13, score=0.9))
    assert joined.boxes.tolist() == [[26, 10, 37, 30]], "the better one's own mask, no union of both"
    assert joined.masks.areas().tolist() == [11 * 20]


def test_a_truncated_fragment_is_joined_to_its_object():
    # The second tile saw only the upper part of what comes in from its left.
    joined = two_tiles(block(5, 34), block(0, 10, y0=10, y1=16))
    assert len(joined) == 1
    assert joined.masks.areas().tolist() == [29 * 20]


def test_a_small_object_within_a_large_one_stays():
    large, small = block(5, 38), block(6, 10, y0=14, y1=18)  # the small one lies in the strip, cut off nowhere
    assert len(two_tiles(large, small)) == 2


def test_objects_without_masks_are_joined_by_their_boxes():
    def bare(objects: Instances) -> Instances:
        objects.masks = None
        objects.keypoints = torch.tensor([[[20.0, 20.0, 0.5]]])
        return objects

    joined = two_tiles(bare(block(10, 40, score=0.6)), bare(block(0, 30, score=0.8)))
    assert joined.masks is None
    assert joined.boxes.tolist() == [[10, 10, 54, 30]]
    assert joined.keypoints.tolist() in ([[[20.0, 20.0, 0.5]]], [[[44.0, 20.0, 0.5]]])
    none = Instances((40, 40), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    assert len(two_tiles(none, none)) == 0


def test_nothing_found():
    empty = Instances.empty((40, 40))
    joined = two_tiles(empty, empty)
    assert len(joined) == 0
    assert joined.image_size == (40, 64)
    assert len(two_tiles(empty, block(5, 10))) == 1


@pytest.mark.thorough
def test_by_way_of_predict(tmp_path):
    system = Painted().eval()
    paths = [save(blocks(5, (90, 130)), tmp_path / "a.png"), save(blocks(3, (30, 30)), tmp_path / "b.png")]
    (tmp_path / "c.png").write_bytes(b"broken")
    paths.append(tmp_path / "c.png")
    stream = predict(system, paths, tile=48, overlap=0.25, batch=4)
    tiled = list(stream)
    assert [p.path.name for p in stream.skipped] == ["c.png"]
    for prediction, path in zip(tiled[:2], paths[:2], strict=True):
        plain = predict(system, path).found()
        assert prediction.found().masks.rle() == plain.masks.rle()
        assert prediction.found().labels.tolist() == plain.labels.tolist()


@pytest.mark.thorough
def test_a_very_large_image_needs_little_memory():
    """Forty objects in an image of 200 million pixels, of which only the tiles are read."""
    image = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, 10_000, 20_000)

    def find(crops):
        return [block_in(crop) for crop in crops]

    def block_in(crop: torch.Tensor) -> Instances:
        size = (crop.shape[1], crop.shape[2])
        masks = Masks.from_crops([np.ones((100, 100), bool)], torch.tensor([[900, 900]]), size)
        return Instances(size, masks.boxes(), torch.tensor([0]), masks, torch.tensor([0.5]))

    found = predict_tiled(find, image, 2500, 0.1)
    tiles = cover((10_000, 20_000), 2500, 0.1)
    assert len(found) == len(tiles)
    assert found.masks.nbytes < 100_000
    assert found.masks.areas().unique().tolist() == [10_000]


# ---- touching objects ------------------------------------------------------------------------------------------------


def discs(size: tuple[int, int], radius: int, step: int) -> list[torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return [
        (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        for cy in range(radius, size[0], step)
        for cx in range(radius, size[1], step)
    ]


def rectangle(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    plane = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        plane[y0:y1, x0:x1] = True
    return plane


SIZE = (160, 240)
TOUCHING = {
    "discs": discs(SIZE, 10, 20),
    "U": [rectangle(SIZE, (20, 20, 35, 140), (205, 20, 220, 140), (20, 125, 220, 140))],
    "bars": [rectangle(SIZE, (3, 12 + 12 * k, 237, 22 + 12 * k)) for k in range(8)],
    "around a corner": [rectangle(SIZE, (60, 60, 120, 120)), rectangle(SIZE, (120, 62, 150, 118))],
    "pair on a line": [rectangle(SIZE, (30, 20, 90, 50)), rectangle(SIZE, (30, 50, 90, 80))],
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", TOUCHING)
@pytest.mark.parametrize(("tile", "overlap"), [(64, 0.2), (80, 0.0), (96, 0.5)])
def test_touching_objects_stay_separate_and_long_ones_whole(kind, tile, overlap):
    truth = torch.stack(TOUCHING[kind])
    codes = torch.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    image = torch.stack([(codes >> shift & 255).to(torch.uint8) for shift in (16, 8, 0)])

    def find(crops):
        found = []
        for crop in crops:
            place = int(crop[0, 0, 0]) << 16 | int(crop[1, 0, 0]) << 8 | int(crop[2, 0, 0])
            y, x = divmod(place, SIZE[1])
            part = truth[:, y : y + crop.shape[1], x : x + crop.shape[2]]
            masks = Masks.from_dense(part[part.any(2).any(1)]).pack()
            count = len(masks)  # all of one class and one score
            labels = torch.zeros(count, dtype=torch.int64)
            found.append(Instances(masks.size, masks.boxes(), labels, masks, torch.full((count,), 0.9)))
        return found

    joined = predict_tiled(find, image, tile, overlap)
    assert joined.masks is not None
    if tile == 80 and kind == "around a corner":
        return  # the two share a whole edge of tiles that have no pixel in common: undecidable
    assert len(joined) == len(truth)
    assert joined.masks.iou(Masks.from_dense(truth)).amax(0).min() > 0.95


def test_a_remnant_joins_the_object_that_continues_beyond_the_border():
    # Columns 24 ... 39 are common. The first tile shows a whole disc and two columns of its right neighbour.
    first = Instances.join([block(20, 38, score=0.9), block(38, 40, score=0.5, y0=15, y1=25)])
    second = Instances.join([block(0, 14, score=0.9), block(14, 30, score=0.8)])
    joined = two_tiles(first, second)
    assert sorted(joined.boxes.tolist()) == [[20, 10, 38, 30], [38, 10, 54, 30]]
    assert joined.scores.tolist() == pytest.approx([0.9, 0.8])
