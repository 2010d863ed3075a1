"""Chebyshev codes of outlines, the regions that they represent, and resampled outlines."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops import contours
from maskwright.structures import Masks


def plane(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (60, 80)) -> torch.Tensor:
    result = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        result[y0:y1, x0:x1] = True
    return result


def disc(x: float, y: float, radius: float, size: tuple[int, int] = (60, 80)) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


U = plane((10, 10, 16, 50), (44, 10, 50, 50), (10, 44, 50, 50))
SHAPES = {
    "disc": disc(30.3, 25.8, 14),
    "U": U,
    "cross": plane((10, 20, 60, 26), (30, 5, 36, 50)),
    "line": plane((7, 9, 40, 10)),
}


def cast(shape: torch.Tensor, x: float, y: float) -> np.ndarray:
    """The last point inside along each ray, step by step."""
    far = np.arange(0, 120, 0.01)
    angles = np.deg2rad(np.arange(360))[:, None]
    column = np.floor(x + far * np.cos(angles) + 1e-9).astype(int)
    row = np.floor(y - far * np.sin(angles) + 1e-9).astype(int)
    within = (column >= 0) & (column < shape.shape[1]) & (row >= 0) & (row < shape.shape[0])
    hits = np.zeros(within.shape, bool)
    hits[within] = shape.numpy()[row[within], column[within]]
    return np.where(hits.any(1), far[hits.shape[1] - 1 - hits[:, ::-1].argmax(1)], np.nan)


@pytest.mark.parametrize("name", SHAPES)
def test_exact_radii_end_where_the_ray_leaves_the_mask(name):
    frames, crops = Masks.from_dense(SHAPES[name][None]).crops()
    centres, _ = contours.inner_centres(crops, frames[:, :2])
    centres = centres + torch.tensor([[0.31, 0.17]])  # so that no ray runs along the border of pixels
    ours = contours.degree_radii(crops, frames[:, :2], centres)[0].numpy()
    theirs = cast(SHAPES[name], *centres[0].tolist())
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    assert np.nanmax(np.abs(ours - theirs)) < 0.02


@pytest.mark.fast
def test_degree_0_is_right_90_up_and_rays_along_the_axes_are_exact():
    frames, crops = Masks.from_dense(plane((10, 20, 50, 40))[None]).crops()
    centres, well = contours.inner_centres(crops, frames[:, :2])
    assert centres.tolist() == [[30, 30]]
    assert well.all()
    radii = contours.degree_radii(crops, frames[:, :2], centres + torch.tensor([5.0, 2.0]))[0]
    assert radii[[0, 90, 180, 270]].tolist() == pytest.approx([15, 12, 25, 8])
    outline = contours.degree_points(contours.degree_radii(crops, frames[:, :2], centres), centres)
    assert Masks.from_polygons([[r] for r in outline.numpy()], (60, 80)).areas().item() == 800


@pytest.mark.fast
def test_inner_centres_have_all_neighbours_in_the_mask_if_possible():
    masks = Masks.from_dense(torch.stack([U, disc(30, 30, 12) & ~disc(30, 30, 8), plane((7, 9, 40, 10)), plane()]))
    frames, crops = masks.crops()
    centres, well = contours.inner_centres(crops, frames[:, :2])
    assert well.tolist() == [True, True, False, False]
    for shape, (x, y) in zip(masks.dense()[:3], centres[:3].long().tolist(), strict=True):
        assert shape[y, x]
    x, y = centres[0].long().tolist()
    assert U[y - 1 : y + 2, x - 1 : x + 2].all()


@pytest.mark.fast
def test_solid_masks_are_one_region_without_holes():
    apart, corner = plane((5, 10, 25, 50), (45, 20, 65, 40)), plane((5, 5, 10, 10), (10, 10, 15, 15))
    ring = disc(30, 30, 12) & ~disc(30, 30, 8)
    solid = contours.solid(Masks.from_dense(torch.stack([apart, ring, corner, U, plane()]))).dense()
    bridge = plane((25, 20, 45, 40))
    assert (solid[0] | (apart | bridge)).equal(solid[0])
    assert solid[0].sum() - (apart | bridge).sum() < 40  # the bridge runs from corner to corner
    assert torch.equal(solid[1], disc(30, 30, 12))
    for number, shape in ((2, corner), (3, U), (4, plane())):
        assert torch.equal(solid[number], shape)
    assert len(contours.solid(Masks.empty((10, 10)))) == 0


@pytest.mark.fast
def test_the_fit_equals_numpys_and_inverts_evaluation():
    radii = torch.rand(3, 360, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = contours.chebyshev_fit(radii, 18)
    theirs = np.polynomial.chebyshev.chebfit(np.linspace(-1, 1, 360), radii.numpy().T, 17).T
    assert np.abs(ours.numpy() - theirs).max() < 1e-12
    torch.testing.assert_close(contours.chebyshev_fit(contours.chebyshev_radii(ours), 18), ours)


@pytest.mark.fast
@pytest.mark.parametrize("count", [100, 150, 240, 360])
def test_many_coefficients_stay_small_and_are_accurate(count):
    masks = Masks.from_dense(torch.stack([SHAPES["disc"], plane((10, 20, 50, 40)), SHAPES["cross"]]))
    code, centres, _ = contours.encode_chebyshev(masks, count)
    assert code.abs().max() < 5  # in diagonals
    outlines = contours.decode_chebyshev(code, centres, masks.boxes().float())
    again = Masks.from_polygons([[ring.numpy()] for ring in outlines], masks.size)
    assert again.iou(masks).diagonal().min() > 0.97


@pytest.mark.fast
@pytest.mark.parametrize("count", [18, 36, 100])
def test_up_to_a_hundred_coefficients_are_those_of_plain_least_squares(count):
    radii = torch.rand(3, 360, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = np.polynomial.chebyshev.chebvander(np.linspace(-1, 1, 360), count - 1)
    plain = radii @ torch.from_numpy(np.linalg.pinv(basis)).T
    assert torch.equal(contours.chebyshev_fit(radii, count), plain)


@pytest.mark.fast
@pytest.mark.parametrize("count", [0, -1, 500])
def test_a_number_of_coefficients_out_of_range_is_an_error(count):
    with pytest.raises(UsageError, match=f"count must be between 1 and 360, the number of radii, got {count}"):
        contours.encode_chebyshev(Masks.empty((10, 10)), count)


@pytest.mark.fast
def test_misspelt_words_are_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which otherwise reports it first
    with pytest.raises(UsageError, match="reach must be 'exact' or 'corner', got 'corners'"):
        contours.encode_chebyshev(Masks.empty((10, 10)), reach="corners")
    with pytest.raises(UsageError, match="longest must be 'count' or 'length', got 'edge'"):
        contours.resample(torch.ones(1, 4, 2), 8, longest="edge")


@pytest.mark.fast
def test_a_gap_gets_the_next_radius_with_wrap_around():
    radii = torch.full((2, 360), torch.nan)
    radii[0, 10], radii[0, 200] = 3.0, 5.0
    closed = contours.close_gaps(radii)
    assert (closed[0, :11] == 3).all()
    assert (closed[0, 11:201] == 5).all()
    assert (closed[0, 201:] == 3).all()
    assert (closed[1] == 0).all()


@pytest.mark.fast
def test_few_coefficients_represent_a_round_shape_and_turn_rotates_it():
    masks = Masks.from_dense(torch.stack([disc(30, 30, 20), disc(50.5, 21.5, 7)]))
    code, centres, there = contours.encode_chebyshev(masks, 12)
    assert there.all()
    outlines = contours.decode_chebyshev(code, centres, masks.boxes())
    again = Masks.from_polygons([[ring] for ring in outlines.numpy()], masks.size)
    assert again.iou(masks).diagonal().min() > 0.97
    code = 0.1 * code
    code[:, 1] = 0.05
    boxes = torch.tensor([[-500, -500, 500, 500.0]] * 2)
    plain = contours.decode_chebyshev(code, centres, boxes)
    turned = contours.decode_chebyshev(code, centres, boxes, turn=90)
    away = plain - centres[:, None]
    torch.testing.assert_close(
        turned - centres[:, None], torch.stack([away[..., 1], -away[..., 0]], -1), atol=1e-3, rtol=0
    )


@pytest.mark.fast
def test_empty_masks_are_marked():
    code, centres, there = contours.encode_chebyshev(Masks.from_dense(torch.stack([plane(), disc(30, 30, 9)])))
    assert there.tolist() == [False, True]
    assert torch.isfinite(code).all()
    assert torch.isfinite(centres).all()
    assert contours.encode_chebyshev(Masks.empty((10, 10)))[0].shape == (0, 18)


@pytest.mark.fast
@pytest.mark.parametrize("longest", ["count", "length"])
def test_vertices_are_evenly_spaced_and_corners_kept(longest):
    square = torch.tensor([[0, 0], [0, 10], [20, 10], [20, 0.0]])
    triangle = torch.tensor([[0, 0], [0, 9], [12, 0], [99, 99.0]])
    found = contours.resample(torch.stack([square, triangle]), 24, torch.tensor([4, 3]), longest=longest)
    sides = (found.roll(-1, 1) - found).norm(dim=-1)
    assert sides[0].tolist() == pytest.approx([2.5] * 24)
    assert sides.sum(1).tolist() == pytest.approx([60, 36], rel=1e-5)
    for corner in (*square, *triangle[:3]):
        assert (found - corner).norm(dim=-1).min() < 1e-4


@pytest.mark.fast
def test_of_too_many_vertices_those_with_the_longest_edges_are_kept():
    points = torch.tensor([[[0, 0], [0, 10], [1, 10], [20, 10], [20, 0.0]]])
    assert contours.resample(points, 4)[0].tolist() == [[0, 0], [1, 10], [20, 10], [20, 0]]


@pytest.mark.fast
def test_an_outline_without_extent_has_points():
    assert (contours.resample(torch.ones(1, 4, 2), 16) == 1).all()


@pytest.mark.fast
@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_points_below_1_is_an_error(count):
    points, lengths = torch.ones(1, 4, 2), torch.tensor([4])
    with pytest.raises(UsageError, match=f"count must be at least 1, got {count}"):
        contours.resample(points, count)
    with pytest.raises(UsageError, match=f"count must be at least 1, got {count}"):
        contours.resample_from(points, count, lengths, points[:, 0])


def test_a_basis_cached_in_inference_mode_can_be_used_in_training():
    with torch.inference_mode():
        contours.chebyshev_radii(torch.randn(2, 7), 24)
    coefficients = torch.randn(2, 7, requires_grad=True)
    contours.chebyshev_radii(coefficients, 24).sum().backward()
    assert coefficients.grad is not None
