"""Sampling and selection of points of maps and masks."""

from __future__ import annotations

import pytest
import torch

from maskwright.ops import points as ops
from maskwright.structures import Masks

pytestmark = pytest.mark.fast


def discs(count: int = 3, size: tuple[int, int] = (40, 56)) -> torch.Tensor:
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    return torch.stack([(y - 12 - 7 * n) ** 2 + (x - 15 - 12 * n) ** 2 < (8 + 2 * n) ** 2 for n in range(count)])


def test_cell_centres_sample_the_cells():
    maps = torch.randn(2, 3, 5, 7)
    read = ops.point_sample(maps, ops.grid_points(2, 5, 7))
    torch.testing.assert_close(read, maps.flatten(2), rtol=1e-5, atol=1e-5)
    assert ops.point_sample(maps.bfloat16(), ops.grid_points(2, 5, 7)).dtype == torch.bfloat16
    assert (ops.point_sample(maps, torch.tensor([[[-0.2, 0.5], [1.2, 0.5]]]).expand(2, -1, -1)) == 0).all()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("kind", ["dense", "rle"])
def test_masks_are_sampled_like_their_planes(mode: str, kind: str):
    planes = discs()
    planes[2] = False  # empty
    masks = Masks.from_dense(planes)
    owners = torch.tensor([2, 0, 1, 0])
    share = torch.rand(4, 300, 2) * 1.1 - 0.05
    expected = ops.point_sample(planes[owners].float()[:, None], share, mode)[:, 0]  # pyright: ignore[reportArgumentType]
    pixels = share * torch.tensor([56.0, 40.0])
    read = ops.mask_sample(masks if kind == "dense" else masks.pack(), pixels, owners, mode)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=2e-5)
    assert ops.mask_sample(masks[:0], pixels[:0]).shape == (0, 300)


def test_all_rows_can_share_points():
    own, same = ops.uniform_points(3, 5), ops.uniform_points(3, 5, shared=True)
    assert own.shape == same.shape == (3, 5, 2)
    assert same.stride(0) == 0
    assert bool((same[0] == same[2]).all())
    assert not bool((own[0] == own[2]).all())


def test_more_points_are_drawn_where_the_map_is_uncertain():
    torch.manual_seed(0)
    logits = torch.linspace(-8, 8, 64).expand(2, 1, 64, 64)  # uncertain in the middle column
    far = (ops.uncertain_points(logits, 400, ops.mask_uncertainty)[..., 0] - 0.5).abs()
    assert far.shape == (2, 400)
    assert far[:, :300].max() < 0.2 < 0.4 < far[:, 300:].max()  # the last quarter is drawn from everywhere
    even = ops.uncertain_points(logits, 400, ops.mask_uncertainty, candidates=1, important=0)
    assert ((even[..., 0] - 0.5).abs() > 0.25).float().mean() > 0.4
    every = ops.uncertain_points(logits, 400, ops.mask_uncertainty, important=1.0)
    assert (every[..., 0] - 0.5).abs().max() < 0.25
    assert ops.uncertain_points(logits[:0], 8, ops.mask_uncertainty).shape == (0, 8, 2)


def test_uncertainty_of_classes_is_the_difference_of_the_two_largest_logits():
    logits = torch.tensor([[[3.0, 1.0], [1.0, 0.9], [-5.0, 0.0]]])
    torch.testing.assert_close(ops.class_uncertainty(logits), torch.tensor([[-2.0, -0.1]]))


def test_fractions_of_boxes_are_converted_to_their_frame():
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    points = torch.tensor([[[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]]])
    assert ops.box_points(boxes, points).tolist() == [[[10, 20], [20, 30], [30, 60]]]


def test_subdivision_recovers_a_fine_outline_with_few_predictions():
    y, x = torch.arange(128)[:, None] + 0.5, torch.arange(128) + 0.5
    truth = 20 - ((y - 60) ** 2 + (x - 70) ** 2).sqrt()
    predicted = []

    def predict(points: torch.Tensor) -> torch.Tensor:
        predicted.append(points.shape[1])
        return ops.point_sample(truth[None, None], points)

    coarse = ops.point_sample(truth[None, None], ops.grid_points(1, 16, 16)).view(1, 1, 16, 16)
    fine = ops.subdivide(coarse, predict, ops.mask_uncertainty, steps=3, points=600)
    assert fine.shape == (1, 1, 128, 128)
    assert predicted == [600, 600, 600]
    assert ((fine[0, 0] > 0) == (truth > 0)).float().mean() > 0.999
    small = ops.subdivide(coarse[..., :4, :4], predict, ops.mask_uncertainty, steps=1, points=600)
    assert small.shape == (1, 1, 8, 8)
    assert predicted[-1] == 64  # at most the number of cells
