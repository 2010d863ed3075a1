"""The operators against naive definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskwright.errors import UsageError
from maskwright.ops import boxes, interpolation, keypoints, mask_targets, matching, paste, pooling
from maskwright.structures import Masks

pytestmark = pytest.mark.fast


def some_boxes(count: int, size: float = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * size
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=generator) * size], 1)


@pytest.mark.thorough
@given(st.integers(0, 1000), st.booleans())
def test_decoding_undoes_encoding(seed, plus_one):
    a, b = some_boxes(5, seed=seed), some_boxes(5, seed=seed + 1)
    weights = (10.0, 10.0, 5.0, 5.0)
    back = boxes.decode(a, boxes.encode(a, b, weights, plus_one), weights, plus_one)
    torch.testing.assert_close(back, b, rtol=1e-4, atol=1e-3)


def test_overlap_is_zero_where_nothing_overlaps_and_without_area():
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 9]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 4, 2], [5, 5, 5, 9]])
    torch.testing.assert_close(boxes.pairwise_iou(a, b), torch.tensor([[1 / 7, 0, 0], [0, 0, 0]]))
    assert boxes.pairwise_iou(a[:0], b).shape == (0, 3)


@pytest.mark.thorough
@given(st.integers(0, 200), st.booleans())
def test_overlaps_of_whole_pixels_are_counts_of_pixels(seed, plus_one):
    """Boxes of the frame of whole pixels, drawn as masks; with `plus_one` they end at their last pixel."""
    generator = torch.Generator().manual_seed(seed)
    low, sides = (torch.randint(k, 9, (2, 4, 2), generator=generator) for k in (0, 1))
    a, b = torch.cat([low, low + sides], 2).unbind(0)
    y, x = torch.arange(20)[:, None], torch.arange(20)
    masks = [
        (x >= v[:, 0, None, None]) & (x < v[:, 2, None, None]) & (y >= v[:, 1, None, None]) & (y < v[:, 3, None, None])
        for v in (a, b)
    ]
    first, second = (m.flatten(1).double() for m in masks)
    both, areas = first @ second.T, [m.sum(1) for m in (first, second)]
    last = torch.tensor([0, 0, 1, 1]) if plus_one else 0
    ours = [(v - last).double() for v in (a, b)]
    torch.testing.assert_close(boxes.area(ours[0], plus_one), areas[0])
    union = areas[0][:, None] + areas[1] - both
    torch.testing.assert_close(boxes.pairwise_iou(*ours, plus_one=plus_one), both / union)
    torch.testing.assert_close(boxes.pairwise_ioa(*ours, plus_one=plus_one), both / areas[0][:, None])
    inside = boxes.clip(ours[0], (6, 7), plus_one)
    assert torch.equal(inside, torch.minimum(ours[0], torch.tensor([7.0, 6, 7, 6]) - (1 if plus_one else 0)))


def test_intersection_over_area_is_zero_without_area():
    a, b = torch.tensor([[0.0, 0, 4, 4], [1, 1, 1, 3]]), torch.tensor([[2.0, 0, 9, 9], [0, 0, 4, 2]])
    torch.testing.assert_close(boxes.pairwise_ioa(a, b), torch.tensor([[0.5, 0.5], [0, 0]]))
    assert boxes.pairwise_ioa(a[None], b[None, :0]).shape == (1, 2, 0)


def test_suppression_keeps_groups_apart_however_many_boxes_there_are():
    box, scores = torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1), torch.tensor([0.5, 0.9, 0.7])
    assert boxes.nms(box, scores, torch.tensor([0, 0, 1]), 0.5).tolist() == [1, 2]
    assert boxes.nms(box[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []
    many, marks = some_boxes(3000, 900), torch.rand(3000, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(3000) % 7
    kept = boxes.nms(many, marks, groups, 0.3)
    from torchvision.ops import nms

    alone = torch.cat(
        [rows[nms(many[rows], marks[rows], 0.3)] for g in range(7) for rows in [(groups == g).nonzero().flatten()]]
    )
    assert sorted(kept.tolist()) == sorted(alone.tolist())
    assert (marks[kept].diff() <= 0).all()


@pytest.mark.parametrize("limit", [0, 1, 5, 40, 300])
@pytest.mark.parametrize("steps", [7, 100_000])
def test_the_best_survivors_alone_are_the_first_of_all(limit: int, steps: int):
    generator = torch.Generator().manual_seed(limit)
    corner = torch.rand(3000, 2, generator=generator) * 60
    box = torch.cat([corner, corner + 5 + torch.rand(3000, 2, generator=generator) * 20], 1)
    scores = (torch.rand(3000, generator=generator) * steps).floor() / steps  # with few steps most have their equals
    groups = torch.randint(0, 3, (3000,), generator=generator)
    assert torch.equal(boxes.nms(box, scores, groups, 0.5, limit), boxes.nms(box, scores, groups, 0.5)[:limit])


def test_suppression_of_boxes_that_end_at_their_last_pixel():
    box = torch.tensor([[0.0, 0, 3, 3], [2, 0, 5, 3]])  # 8 of 24 pixels, or 3 of 15 in continuous coordinates
    scores, groups = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert boxes.nms(box, scores, groups, 0.3).tolist() == [0, 1]
    assert boxes.nms(box, scores, groups, 0.3, plus_one=True).tolist() == [0]


@pytest.mark.parametrize(("scores", "groups"), [(2, 3), (3, 4), (0, 3)])
@pytest.mark.parametrize("limit", [None, 0, 1])
def test_suppression_needs_one_score_and_one_group_per_box(scores, groups, limit):
    words = f"one entry per box, got {scores} scores and {groups} groups for 3 boxes"
    with pytest.raises(UsageError, match=words):
        boxes.nms(some_boxes(3), torch.rand(scores), torch.zeros(groups, dtype=torch.int64), 0.5, limit)


@pytest.mark.parametrize("rescue", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_matching_without_objects_or_without_boxes_has_no_positives(shape, rescue):
    nearest, matched = matching.match(torch.zeros(shape), 0.3, 0.7, rescue=rescue)
    assert nearest.tolist() == [0] * shape[1]
    assert matched.tolist() == [matching.NEGATIVE] * shape[1]
    objects, candidates = (some_boxes(count) if count else torch.zeros(0, 4) for count in shape)
    assert matching.match_each(objects, candidates, 0.3, 0.7)[1].tolist() == [matching.NEGATIVE] * shape[1]


def test_an_object_that_no_box_overlaps_rescues_none():
    iou = torch.tensor([[0.0, 0, 0, 0], [0.1, 0.2, 0.2, 0]])
    _, matched = matching.match(iou, 0.3, 0.7, rescue=True)
    assert matched.tolist() == [matching.NEGATIVE, 1, 1, matching.NEGATIVE]


def test_a_sample_holds_at_most_its_share_of_positives():
    positive = torch.arange(100) < 60
    chosen, others = matching.sample(positive, ~positive, 40, 0.25)
    assert len(chosen) == 10
    assert len(others) == 30
    assert positive[chosen].all()
    assert not positive[others].any()
    chosen, others = matching.sample(positive & (torch.arange(100) < 3), ~positive, 40, 0.25)
    assert (len(chosen), len(others)) == (3, 37)


@pytest.mark.thorough
@given(st.integers(1, 9), st.integers(0, 500))
def test_weights_read_what_grid_sampling_reads(cells, seed):
    generator = torch.Generator().manual_seed(seed)
    grid, places = torch.rand(1, 1, 1, cells, generator=generator), torch.rand(7, generator=generator) * (cells + 4) - 2
    for outside in ("zeros", "border"):
        ours = interpolation.weights(places, cells, outside) @ grid[0, 0, 0]
        scaled = (places + 0.5) / cells * 2 - 1
        points = torch.stack([scaled, torch.zeros(7)], 1)[None, None]
        theirs = torch.nn.functional.grid_sample(grid, points, padding_mode=outside, align_corners=False)[0, 0, 0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("rule", ["continuous", "padded"])
@given(seed=st.integers(0, 300))
def test_pasting_inside_boxes_equals_pasting_on_whole_planes(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (37, 53)
    corners = torch.rand(4, 2, generator=generator) * 80 - 20
    own = torch.cat([corners, corners + torch.rand(4, 2, generator=generator) * 60], 1)
    own[0, 2:] = own[0, :2]  # a box without extent
    grids = torch.rand(4, 7, 7, generator=generator)
    values = paste.paste_values(grids, own, size, rule=rule)
    sure = (values - 0.5).abs() > 1e-5
    assert torch.equal(paste.paste_masks(grids, own, size, rule=rule).dense()[sure], (values >= 0.5)[sure])


def test_pasting_no_boxes_gives_no_masks():
    assert len(paste.paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (10, 12))) == 0


@pytest.mark.thorough
@given(st.integers(0, 200))
def test_targets_from_crops_equal_those_from_whole_planes(seed):
    generator = torch.Generator().manual_seed(seed)
    planes = torch.zeros(3, 40, 50, dtype=torch.bool)
    for plane in planes:
        x, y = (int(v) for v in torch.randint(0, 30, (2,), generator=generator))
        plane[y : y + 17, x : x + 23] = torch.rand(17, 23, generator=generator)[: 40 - y, : 50 - x] > 0.3
    owners = torch.tensor([0, 2, 1, 0])
    own = boxes.clip(some_boxes(4, 35, seed), (40, 50))
    for rule, aligned in (("soft", False), ("binary", True)):
        ours = mask_targets.mask_targets(Masks.from_dense(planes), owners, own, 14, rule=rule)
        rois = torch.cat([owners[:, None].float(), own], 1)
        theirs = pooling.roi_align(planes.float()[:, None], rois, 14, aligned=aligned)[:, 0]
        if rule == "binary":
            sure = (theirs - 0.5).abs() > 1e-4
            assert torch.equal(ours[sure], (theirs >= 0.5).float()[sure])
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_roi_warp_has_a_gradient_with_respect_to_the_box():
    features = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 2, 8, 8)
    rois = torch.tensor([[0.0, 4, 4, 24, 20]], requires_grad=True)
    pooling.roi_warp(features, rois, 3, 0.25).sum().backward()
    assert rois.grad is not None
    assert rois.grad[0, 1:].abs().min() > 0
    whole = pooling.roi_warp(torch.ones(1, 1, 8, 8), rois.detach(), 3, 0.25)
    torch.testing.assert_close(whole, torch.ones(1, 1, 3, 3))


@pytest.mark.thorough
@given(st.integers(0, 300))
def test_a_keypoint_is_decoded_at_the_peak_of_its_map(seed):
    generator = torch.Generator().manual_seed(seed)
    own = some_boxes(2, 50, seed) + torch.tensor([0, 0, 30.0, 30.0])
    cells = torch.randint(8, 48, (2, 5, 2), generator=generator)
    maps = torch.zeros(2, 5, 56, 56)
    for box in range(2):
        for keypoint in range(5):
            x, y = cells[box, keypoint].tolist()
            maps[box, keypoint, y, x] = 8.0
    found = keypoints.decode(maps, own)
    place, counts = keypoints.encode(found, own, 56)
    assert counts.all()
    away = (torch.stack([place % 56, place // 56], -1) - cells).abs()
    assert away.max() <= 1


@pytest.mark.thorough
@given(st.integers(0, 1000), st.sampled_from([0, 1, 2, 3]), st.booleans(), st.sampled_from([1, 7]))
def test_roi_align_by_rows_equals_the_reference_kernel_and_its_gradient(seed, samples, aligned, side):
    from torchvision.ops import roi_align

    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, pooling.FEW_CHANNELS, 9, 13, generator=generator, dtype=torch.float64)
    corners = torch.rand(6, 2, generator=generator) * 60 - 12
    sides = torch.rand(6, 2, generator=generator) * 70 - 3  # some are empty or have negative sides
    rois = torch.cat([torch.arange(6)[:, None] % 2, corners, corners + sides], 1)
    results = []
    for kernel in (pooling.roi_align, roi_align):
        values = features.clone().requires_grad_()
        boxes = rois if kernel is pooling.roi_align else rois.double()
        cut = kernel(values, boxes, side, 0.25, samples, aligned)
        cut.sin().sum().backward()
        results.append((cut.detach(), values.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_pooling_no_boxes_gives_no_features():
    features = torch.randn(1, pooling.FEW_CHANNELS, 4, 4, requires_grad=True)
    cut = pooling.roi_align(features, torch.zeros(0, 5), 7)
    assert cut.shape == (0, pooling.FEW_CHANNELS, 7, 7)
    cut.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [4, pooling.FEW_CHANNELS])
@pytest.mark.parametrize("pool", [pooling.roi_align, pooling.roi_pool, pooling.roi_warp])
def test_pooled_features_keep_their_dtype_on_a_grid_that_is_not_square(pool, channels, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, channels, 9, 13, generator=generator).to(dtype)
    rois = torch.tensor([[0.0, 3, 5, 40, 30], [1, 0, 0, 52, 36]])
    wide = pool(features, rois, (3, 7), 0.25)
    assert wide.shape == (2, channels, 3, 7)
    assert wide.dtype == dtype
    square = pool(features.float(), rois, 7, 0.25)
    if pool is pooling.roi_pool:  # three rows of the whole box contain what seven rows contain
        torch.testing.assert_close(wide.float().amax((2, 3)), square.amax((2, 3)))
    else:
        torch.testing.assert_close(wide.float().mean((2, 3)), square.mean((2, 3)), atol=0.4, rtol=0)


def test_a_grid_that_is_not_square_is_that_of_the_reference_kernel():
    from torchvision.ops import roi_align

    features = torch.randn(2, pooling.FEW_CHANNELS, 9, 13, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0.0, 3, 5, 40, 30], [1, 0, 0, 52, 36]])
    for samples in (0, 2):
        theirs = roi_align(features, rois, (3, 7), 0.25, samples, True)
        torch.testing.assert_close(
            pooling.roi_align(features, rois, (3, 7), 0.25, samples), theirs, rtol=1e-4, atol=1e-5
        )
