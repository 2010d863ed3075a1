"""Outlines as vertices and centres as heat maps, compared with plain loops and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from maskwright.ops.centres import centre_focal_sum, find_peaks, gaussian_radius, paint_gaussians
from maskwright.ops.contours import resample_from
from maskwright.ops.vertices import bounds, extreme_points, octagons, outlines_of, read_at, signed_areas, tidy_outlines
from maskwright.structures import Masks

pytestmark = pytest.mark.fast
SQUARE = np.array([[2.0, 2], [10, 2], [10, 10], [2, 10]])


@pytest.mark.parametrize("align", [True, False])
def test_sampled_features_equal_those_of_grid_sample(align):
    features, points = torch.randn(2, 3, 7, 9), torch.rand(5, 11, 2) * torch.tensor([12.0, 10.0]) - 1.5
    points.requires_grad_()
    owners = torch.tensor([0, 1, 1, 0, 1])
    ours = read_at(features, points, owners, align_corners=align)
    grid = points / torch.tensor([9 / 2, 7 / 2]) - 1
    theirs = functional.grid_sample(features[owners], grid[:, :, None], align_corners=align)[..., 0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    mine, other = (torch.autograd.grad(v.square().sum(), points)[0] for v in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_outlines_are_clipped_oriented_and_without_repeated_points():
    assert signed_areas([SQUARE, SQUARE[::-1]]).tolist() == [64.0, -64.0]
    crumb, doubled = SQUARE / 8, np.concatenate([SQUARE[::-1], SQUARE[:1]])
    points, lengths, kept = tidy_outlines([SQUARE, crumb, doubled, SQUARE + 100], (8.0, 9.0), smallest=2.0)
    assert kept.tolist() == [0, 2]
    assert lengths.tolist() == [4, 4]
    assert points[0].tolist() == [[2, 8], [9, 8], [9, 2], [2, 2]]
    assert points[1].tolist() == points[0].tolist()
    assert bounds(points, lengths).tolist() == [[2, 2, 9, 8]] * 2
    points, lengths, kept = tidy_outlines([], (8.0, 9.0))
    assert (len(points), len(lengths), len(kept)) == (0, 0, 0)
    assert extreme_points(points, lengths).shape == (0, 4, 2)


def test_outlines_of_polygons_and_of_run_lengths_have_the_same_owners():
    rings = [[[0, 0, 8, 0, 8, 8, 0, 8], [12, 0, 20, 0, 20, 8]], [[3, 3, 9, 3, 9, 9, 3, 9]]]
    polygons = Masks.from_polygons(rings, (20, 24))
    for masks in (polygons, polygons.pack()):
        points, owners = outlines_of(masks)
        assert owners.tolist() == [0, 0, 1]
        assert points[2].min() == 3
    plane = torch.ones(1, 9, 9, dtype=torch.bool)
    plane[0, 3:6, 3:6] = False
    assert len(outlines_of(Masks.from_dense(plane))[0]) == 1


def test_extreme_points_are_the_midpoints_of_flat_sides():
    house = torch.tensor([[[5.0, 0.0], [0, 4], [0, 10], [10, 10], [10, 4], [0, 0], [0, 0]]], dtype=torch.float64)
    found = extreme_points(house, torch.tensor([5]))
    assert found[0].tolist() == [[5, 0], [0, 7], [5, 10], [10, 7]]
    octagon = octagons(found)
    assert octagon[0, 0].tolist() == [5, 0]
    assert octagon[0, 1].tolist() == [3.75, 0]
    assert bounds(octagon, torch.tensor([12])).tolist() == [[0, 0, 10, 10]]


def test_points_start_at_the_nearest_one_and_are_evenly_spaced():
    square = torch.from_numpy(SQUARE)[None]
    padded = torch.cat([square, torch.full((1, 3, 2), 7.0, dtype=torch.float64)], 1)
    found = resample_from(padded, 32, torch.tensor([4]), torch.tensor([[6.0, 1.0]], dtype=torch.float64))
    assert found[0, 0].tolist() == [6, 2]
    torch.testing.assert_close((found.roll(-1, 1) - found).abs().sum(-1), torch.ones(1, 32, dtype=torch.float64))


def test_heat_maps_are_the_maximum_of_gaussians():
    cells, radii = torch.tensor([[3, 2], [5, 2], [0, 9]]), torch.tensor([2, 3, 1])
    heat = paint_gaussians(cells, radii, torch.tensor([0, 0, 1]), (2, 10, 8))
    expected = torch.zeros(2, 10, 8)
    for (x, y), r, plane in zip(cells.tolist(), radii.tolist(), (0, 0, 1), strict=True):
        for i in range(max(0, y - r), min(10, y + r + 1)):
            for j in range(max(0, x - r), min(8, x + r + 1)):
                value = np.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                expected[plane, i, j] = max(float(expected[plane, i, j]), value)
    torch.testing.assert_close(heat, expected)
    assert gaussian_radius(torch.tensor([[0.0, 0.0], [10.0, 10.0], [100.0, 40.0]])).tolist() == [0, 2, 15]


def test_peaks_are_ordered_by_score_and_an_exact_map_has_no_loss():
    logits = torch.full((1, 2, 5, 6), -9.0)
    logits[0, 1, 2, 3], logits[0, 1, 2, 4], logits[0, 0, 4, 5] = 3.0, 2.0, 1.0
    scores, labels, cells = find_peaks(logits, 2)
    assert labels.tolist() == [[1, 0]]
    assert cells.tolist() == [[15, 29]]
    torch.testing.assert_close(scores, torch.tensor([[3.0, 1.0]]).sigmoid())
    heat = (logits == 3).float()
    assert float(centre_focal_sum(heat * 40 - 20, heat)) < 1e-3
    assert float(centre_focal_sum(logits, heat)) > 1
