"""Outer borders of masks, and filled outlines."""

from __future__ import annotations

import zlib

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskwright.errors import UsageError
from maskwright.ops.contours import MISSING, encode_rays, fourier_coefficients, fourier_rays, ray_points, rays_from
from maskwright.ops.outlines import fill_contours, outer_contours
from maskwright.structures import Masks


def masks(*planes: str) -> Masks:
    """Masks from drawings, in which # is foreground."""
    dense = [[[c == "#" for c in row] for row in plane.split()] for plane in planes]
    return Masks.from_dense(torch.tensor(dense))


def border(own: Masks, index: int = 0) -> set[tuple[int, int]]:
    contours = outer_contours(own)
    start, count = int(contours.starts[index]), int(contours.counts[index])
    return {(int(x), int(y)) for x, y in contours.points[start : start + count].tolist()}


def plain_border(plane: np.ndarray) -> tuple[set[tuple[int, int]], float]:
    """The border by flood fill: of the part that encloses the largest area, and twice that area."""
    height, width = plane.shape
    outside, todo = set(), [(-1, -1)]
    while todo:
        x, y = todo.pop()
        if (x, y) in outside or not (-1 <= x <= width and -1 <= y <= height):
            continue
        if 0 <= x < width and 0 <= y < height and plane[y, x]:
            continue
        outside.add((x, y))
        todo += [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
    solid = {(x, y) for x in range(width) for y in range(height)} - outside
    best, largest, rest = set(), -1, set(solid)
    for first in sorted(solid, key=lambda p: (p[1], p[0])):
        if first not in rest:
            continue
        part, todo = set(), [first]
        while todo:
            x, y = todo.pop()
            if (x, y) in rest:
                rest.discard((x, y))
                part.add((x, y))
                todo += [(x + u, y + v) for u in (-1, 0, 1) for v in (-1, 0, 1)]
        area = 0
        for x, y in {(x - u, y - v) for x, y in part for u in (0, 1) for v in (0, 1)}:
            area += max(0, len(part & {(x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1)}) - 2)
        if area >= largest:
            best, largest = part, area
    free = {(x, y) for x, y in best if outside & {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)}}
    return free, float(max(largest, 0))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.8]))
def test_borders_equal_those_of_a_flood_fill(seed, height, width, share):
    planes = np.random.default_rng(seed).random((3, height, width)) < share
    own = Masks.from_dense(torch.from_numpy(planes))
    for index, plane in enumerate(planes):
        assert border(own, index) == plain_border(plane)[0]


@pytest.mark.fast
def test_holes_and_smaller_parts_do_not_count():
    ring = masks("......... .#####... .#...#.#. .#.#.#.#. .#...#... .#####... .........")
    assert border(ring) == {(x, y) for x in range(1, 6) for y in range(1, 6) if x in (1, 5) or y in (1, 5)}
    contours = outer_contours(ring)
    assert contours.centres.tolist() == [[3, 3]]


@pytest.mark.fast
def test_single_pixels_lines_and_empty_masks_have_a_border_or_none():
    own = masks("..... ..... .....", "..... .###. .....", "....# ..... .....")
    contours = outer_contours(own)
    assert contours.counts.tolist() == [0, 3, 1]
    assert contours.centres[1:].tolist() == [[2, 1], [4, 0]]
    assert contours.centres[0].isnan().all()
    assert len(outer_contours(Masks.empty((5, 5))).counts) == 0
    rays, centres = encode_rays(own, 36)
    assert rays.shape == (3, 36)
    assert (rays[0] == 0).all()
    assert rays[1, [9, 27]].tolist() == [1, 1]
    assert centres[2].tolist() == [4, 0]


@pytest.mark.fast
def test_rays_of_a_disc_have_equal_lengths():
    y, x = np.mgrid[:101, :121]
    disc = Masks.from_dense(torch.from_numpy((x - 60) ** 2 + (y - 50) ** 2 <= 40**2)[None])
    rays, centres = encode_rays(disc, 72)
    assert centres.tolist() == [[60, 50]]
    assert (rays - 40).abs().max() < 1
    filled = fill_contours(ray_points(centres, rays), (101, 121))
    assert disc.iou(filled).item() > 0.97


@pytest.mark.fast
def test_directions_start_downwards_and_turn_to_the_right():
    bar = Masks.from_dense(torch.zeros(1, 60, 60, dtype=torch.bool).index_fill(2, torch.tensor([30]), True))
    contours = outer_contours(bar)
    rays = rays_from(contours, torch.zeros(2, dtype=torch.int64), torch.tensor([[30.0, 20.0], [20.0, 30.0]]), 36)
    assert rays[0, [0, 18]].tolist() == [39, 20]
    assert rays[0, 9].item() == pytest.approx(MISSING)
    assert rays[1, 9].item() == 10
    assert rays[1, 27].item() == pytest.approx(MISSING)


@pytest.mark.fast
def test_a_closed_border_gives_all_rays_of_small_objects_a_length():
    y, x = np.mgrid[:40, :40]
    discs = Masks.from_dense(torch.from_numpy(np.stack([(x - 20) ** 2 + (y - 20) ** 2 <= r**2 for r in (3, 6, 16)])))
    by_pixels, _ = encode_rays(discs, 36)
    by_line, _ = encode_rays(discs, 36, border="outline")
    assert ((by_pixels <= MISSING).sum(1) > 0).tolist() == [True, True, False]
    assert (by_line - torch.tensor([[3.0], [6], [16]])).abs().amax() < 1
    same = by_pixels > MISSING
    same[:, 0] = False  # degree 0 has neighbours on one side only
    assert ((by_line - by_pixels)[same].abs() <= 1).all()
    # From outside the border is not closed: rays that do not cross the object meet nothing.
    outside = rays_from(outer_contours(discs), torch.tensor([2]), torch.tensor([[1.0, 20.0]]), 36, border="outline")[0]
    assert (outside[18:] <= MISSING).all()
    assert outside[9].item() == 35


@pytest.mark.fast
def test_a_small_budget_gives_the_same_rays():
    own = Masks.from_dense(torch.rand(4, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.3)
    contours = outer_contours(own)
    origins = torch.randint(0, 40, (50, 2), generator=torch.Generator().manual_seed(0)).float()
    owners = torch.arange(50) % 4
    whole = rays_from(contours, owners, origins, 90)
    assert torch.equal(rays_from(contours, owners, origins, 90, budget=1), whole)
    assert torch.equal(rays_from(contours, owners, origins, 90, budget=60 * 400), whole)


@pytest.mark.fast
@pytest.mark.parametrize("count", [7, 0, -1, 720])
def test_a_number_of_rays_that_does_not_divide_360_is_an_error(count):
    own = Masks.from_dense(torch.ones(1, 9, 9, dtype=torch.bool))
    with pytest.raises(UsageError, match=f"count must be a divisor of 360, got {count}"):
        encode_rays(own, count)


@pytest.mark.fast
def test_a_misspelt_border_is_an_error(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which otherwise reports it first
    own = Masks.from_dense(torch.ones(1, 9, 9, dtype=torch.bool))
    with pytest.raises(UsageError, match="border must be 'pixels' or 'outline', got 'line'"):
        encode_rays(own, 36, border="line")


@pytest.mark.fast
def test_a_square_is_filled_with_its_border():
    square = torch.tensor([[[2.9, 3.2], [6.0, 3.0], [6.0, 8.5], [2.0, 8.0]]])
    filled = fill_contours(square, (12, 12)).dense()[0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:9, 2:7] = True
    assert torch.equal(filled, expected)


@pytest.mark.fast
def test_outlines_may_leave_the_image_or_have_no_extent():
    far = torch.tensor([[[-50.0, -50], [70, -50], [70, 70], [-50, 70]], [[100.0, 100]] * 4, [[4.0, 4]] * 4])
    filled = fill_contours(far, (20, 30))
    assert filled.areas().tolist() == [600, 0, 1]
    extreme = fill_contours(torch.tensor([[[0.0, 0], [torch.inf, 5], [torch.nan, 1e30]]]), (20, 30))
    assert extreme.size == (20, 30)
    assert len(fill_contours(torch.zeros(0, 36, 2), (20, 30))) == 0


# What cv2.fillPoly (OpenCV 5.0.0) fills.
CLIPPED = {
    "right": (
        [[3, 3], [20, 5], [3, 7]],
        "........ ........ ........ ...###.. ...##### ...##### ...##### ...###.. ........",
    ),
    "left and above": ([[5, -9], [-6, 3], [5, 3]], "######.. ######.. ######.. ######.. ........ ........"),
    "a line": (
        [[-30, 4], [40, 5]],
        ".......... .......... .......... .......... #####..... .....##### .......... ..........",
    ),
    "intersecting itself": (
        [[-5, -5], [12, 1], [2, 14], [12, -4]],
        ".........# .........# ........## ........## .......### ......###. ......###. .....###..",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize(("points", "rows"), CLIPPED.values(), ids=CLIPPED)
def test_outlines_are_clipped_at_the_image_like_opencv(points, rows):
    expected = masks(rows)
    assert torch.equal(fill_contours(torch.tensor([points]).float(), expected.size).dense(), expected.dense())


def test_random_outlines_are_filled_like_opencv():
    random, checksum = np.random.RandomState(0), 0
    for reach in (0, 30, 300, 5000, 1 << 20):
        for _ in range(60):
            height, width = random.randint(1, 50, 2).tolist()
            count, beyond = random.randint(1, 20), max(1, min(reach, 300))
            points = random.randint([-reach, -beyond], [width + reach, height + beyond], (count, 2))
            filled = fill_contours(torch.from_numpy(points).double()[None], (height, width)).dense().numpy()
            checksum = zlib.crc32(np.packbits(filled).tobytes(), checksum)
    assert checksum == 0x6CBE9051  # of what cv2.fillPoly fills in versions 4.12.0 and 5.0.0


def test_many_objects_need_little_memory_and_a_small_budget_gives_the_same_masks():
    origins = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4000.0, 3000.0])
    ends = ray_points(origins, torch.full((60, 36), 150.0))
    whole = fill_contours(ends, (3000, 4000))
    assert whole.nbytes < 2 << 20
    parts = fill_contours(ends, (3000, 4000), budget=1)
    assert whole.rle() == parts.rle()


@pytest.mark.fast
def test_an_outline_that_intersects_itself_has_a_hole_and_includes_its_own_pixels():
    bow = torch.tensor([[[0.0, 0], [10, 10], [10, 0], [0, 10]]])
    filled = fill_contours(bow, (11, 11)).dense()[0]
    assert filled[5, 5]
    assert not filled[1, 5]
    assert filled[5].sum() == 11


@pytest.mark.fast
def test_more_fourier_coefficients_are_more_accurate():
    steps = torch.arange(90) * 2 * torch.pi / 90
    rays = (3 + 0.4 * torch.cos(2 * steps) + 0.2 * torch.sin(7 * steps)).exp()[None]
    errors = [(fourier_rays(fourier_coefficients(rays, k), 90) - rays).norm().item() for k in (1, 3, 8, 46)]
    assert errors[0] > 2 * errors[1] > 100 * errors[2]
    assert errors[3] < 1e-3
