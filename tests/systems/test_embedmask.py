"""EmbedMask: three generations, masks from embeddings, and the memory of an image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from maskwright.errors import UsageError
from maskwright.ops.mask_targets import seen_at
from maskwright.structures import Masks, Placement
from maskwright.systems import embedmask
from maskwright.systems.embedmask import Raw
from tests.systems.tiny import SIZE, build, objects

OPTIONS = {
    "generation 1": {"generation": 1},
    "generation 2": {"generation": 2},
    "generation 1 without smoothing": {"generation": 1, "smooth_weight": 0.0, "crop": -1.0},
    "fixed margins": {"fixed_margin": True},
    "smoothing, few dimensions, a crop": {"smooth_weight": 0.1, "dimensions": 4, "crop": 0.1},
    "boxes instead of centres": {"radius": None, "in_mask": False},
    "inclusive boxes": {"inclusive": True, "splits": (32, 64, 128, 256)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_detects(options):
    system = build("embedmask", **options)
    images = torch.randn(2, 3, *SIZE)
    raw = system(images)
    for targets in ([objects(3), objects(0)], [objects(0), objects(0)]):
        terms = system.losses(raw, targets)
        sum(terms.values(), torch.zeros(())).backward(retain_graph=True)
        assert all(torch.isfinite(v) for v in terms.values()), terms
        assert ("smooth" in terms) == bool(system.smooth_weight)
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found = system.decode(raw, [Placement.identity(SIZE)] * 2, score_threshold=0.0, detections=5)
    assert all(len(own.masks) == len(own) for own in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": (64, 128)}, r"embedmask: splits must be 4 numbers, for five levels, got \[64, 128\]"),
        ({"prior_margin": 0.0}, "embedmask: prior_margin must be above 0, got 0.0"),
        ({"dimensions": 2}, "embedmask of generation 3: dimensions must be at least 3, got 2"),
        ({"backbone": "resnet51"}, "there is no backbone 'resnet51'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        build("embedmask", **options)


def planted(system, size: tuple[int, int], boxes: torch.Tensor) -> tuple[Raw, torch.Tensor]:
    """An output in which every box is detected, with an ellipse inside that is near its embedding."""
    height, width = size
    levels = [(height // s, width // s) for s in (8, 16, 32, 64, 128)]
    y, x = torch.meshgrid(torch.arange(height // 8) * 8 + 3.5, torch.arange(width // 8) * 8 + 3.5, indexing="ij")
    near = []
    for box in boxes:
        middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        near.append(((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 < 1)
    dimensions = system.dense.proposal_embedding.out_channels
    pixels = torch.zeros(1, dimensions, height // 8, width // 8)
    logits, distances, centerness, embeddings, margins = [], [], [], [], []
    for level, (h, w) in enumerate(levels):
        logits.append(torch.full((1, len(system.classes), h, w), -9.0))
        distances.append(torch.zeros(1, 4, h, w))
        centerness.append(torch.full((1, 1, h, w), 3.0))
        embeddings.append(torch.zeros(1, dimensions, h, w))
        margins.append(torch.full((1, dimensions, h, w), math.log(2) / 4))
        if level:
            continue
        for number, box in enumerate(boxes):
            place = ((box[:2] + box[2:]) / 2).long() // 8
            spot = place * 8 + 4
            own = (0, slice(None), int(place[1]), int(place[0]))
            logits[0][0, number % 2, own[2], own[3]] = 4.0 - number * 1e-3
            distances[0][own] = torch.cat([spot - box[:2], box[2:] - spot]) / 8
            embeddings[0][own] = torch.eye(dimensions)[number % dimensions] * 4
            pixels[0, :, near[number]] = embeddings[0][own][:, None]
    return Raw(tuple(logits), tuple(distances), tuple(centerness), tuple(embeddings), tuple(margins), pixels), near


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_pixels_near_a_detection_in_the_embedding_are_its_mask(generation):
    system = build("embedmask", generation=generation)
    boxes = torch.tensor([[16.0, 16, 112, 80], [120, 8, 184, 120]])
    raw, near = planted(system, (128, 192), boxes)
    found = system.decode(raw, [Placement.resize((256, 384), (128, 192))])[0]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.boxes, boxes * 2)
    for mask, own in zip(found.masks.dense(), near, strict=True):
        truth = functional.interpolate(own[None, None].float(), size=(256, 384), mode="bilinear")[0, 0] > 0.5
        assert (mask & truth).sum() / (mask | truth).sum() > 0.85


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_the_lowest_and_the_highest_mask_threshold_leave_the_region_and_nothing(generation):
    system = build("embedmask", generation=generation)
    boxes = torch.tensor([[16.0, 16, 112, 80], [120, 8, 184, 120]])  # of unlike size: their windows are larger
    raw, _ = planted(system, (128, 192), boxes)
    place = Placement.resize((250, 380), (128, 192))
    usual, lowest, low, highest = (
        system.decode(raw, [place], mask_threshold=t)[0].masks for t in (0.5, 0.0, 1e-6, 1.0)
    )
    assert (highest.areas() == 0).all()
    assert ((lowest.dense() | low.dense()) == lowest.dense()).all()
    assert ((lowest.dense() | usual.dense()) == lowest.dense()).all()
    reach = 4 * embedmask.CELL * 2  # the region is at most three cells wider than the box, on an image twice as large
    apart = lowest.boxes() - boxes * 2
    assert (apart.abs() <= reach).all()
    assert (lowest.areas() > usual.areas()).all()


def test_a_mask_threshold_that_is_not_a_probability_is_refused():
    system = build("embedmask")
    raw, _ = planted(system, (128, 192), torch.tensor([[16.0, 16, 112, 80]]))
    for threshold in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match=f"mask_threshold must be a probability between 0 and 1, got {threshold}"):
            system.decode(raw, [Placement.identity((128, 192))], mask_threshold=threshold)


def test_the_score_threshold_is_of_the_class_up_to_the_published_value_and_of_the_object_above():
    system = build("embedmask")
    raw, _ = planted(system, (128, 192), torch.tensor([[16.0, 16, 112, 80], [120, 8, 184, 120]]))
    half = tuple(torch.full_like(v, 0.0) for v in raw.centerness)  # 0.98 * 0.5
    raw = replace(raw, centerness=half)
    counts = [len(system.detect(raw, [(128, 192)], t, 0.6, 100)[0].boxes) for t in (0.05, 0.3, 0.6)]
    assert counts == [2, 2, 0]
    low = replace(raw, logits=tuple(v.clamp(max=-2.5) for v in raw.logits))  # 0.076 * 0.5
    assert len(system.detect(low, [(128, 192)], 0.05, 0.6, 100)[0].boxes) == 2


def test_inclusive_boxes_end_at_their_last_pixel():
    boxes, place = torch.tensor([[16.0, 16, 112, 80]]), Placement.resize((256, 384), (128, 192))
    system = build("embedmask", inclusive=True)
    raw, _ = planted(system, (128, 192), boxes)
    straight = system.decode(raw, [place])[0].boxes
    torch.testing.assert_close(straight, boxes * 2 + torch.tensor([0.0, 0, 1, 1]))
    mirrored = system.decode(raw, [place.then_mirror()])[0].boxes
    torch.testing.assert_close(mirrored, torch.tensor([[384.0 - 225, 32, 384 - 32, 161]]))


def test_losses_in_parts_are_the_losses(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    system = build("embedmask", crop=0.1)
    pixels = torch.randn(16, 24, 32, generator=generator, requires_grad=True)
    embeddings = torch.randn(5, 16, generator=generator, requires_grad=True)
    margins = torch.rand(5, 16, generator=generator) / 10
    target = objects(5)
    truth = torch.rand(5, 24, 32, generator=generator) > 0.5
    gradients = []
    for budget in (1, 1 << 30):
        losses = system.object_losses(pixels, embeddings, margins, truth, target.boxes, budget)
        gradients.append([losses, *torch.autograd.grad(losses.sum(), (pixels, embeddings))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_an_embedding_that_coincides_with_a_pixel_has_a_finite_loss():
    system = build("embedmask")
    pixels = torch.zeros(16, 4, 4, requires_grad=True)
    losses = system.object_losses(
        pixels, torch.zeros(1, 16), torch.ones(1, 16), torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, 4)
    )
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(pixels.grad).all()


def test_a_masks_cells_are_what_bilinear_shrinking_leaves():
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(3, 45, 61, generator=generator) > 0.9
    grid = (12, 16)
    places = torch.tensor([[4.0, 4.0], [60, 44], [64, 64]])
    on_mask, cells = seen_at(Masks.from_dense(planes), places, grid, 4, budget=1)
    padded = functional.pad(planes, (0, 64 - 61, 0, 48 - 45))[None].float()
    assert torch.equal(cells, functional.interpolate(padded, size=grid, mode="bilinear", align_corners=False)[0] > 0)
    assert torch.equal(on_mask[0], planes[:, 4, 4])
    assert torch.equal(on_mask[1], planes[:, 44, 60])
    assert not on_mask[2].any()


def test_good_locations_are_those_that_overlap_or_else_the_best():
    iou = torch.tensor([0.6, 0.7, 0.7, 0.2, 0.4, 0.4])
    group = torch.tensor([0, 0, 0, 0, 2, 2])
    good, best = embedmask.good_locations(iou, group, 3)
    assert good.tolist() == [True, True, True, False, True, True]
    assert best.tolist() == [False, True, False, False, True, False]


def test_masks_on_a_large_image_need_megabytes():
    system = build("embedmask")
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(30, 2, generator=generator) * torch.tensor([900.0, 600.0])
    boxes = torch.cat([corners, corners + 20 + torch.rand(30, 2, generator=generator) * 140], 1)
    boxes[0] = torch.tensor([0.0, 0.0, 1060, 790])
    pixels = torch.randn(16, 200, 272, generator=generator)
    place = Placement.resize((3000, 4000), (800, 1066))
    embeddings, margins = torch.randn(30, 16, generator=generator), torch.full((30, 16), 0.02)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        masks = system.masks(pixels, boxes, embeddings, margins, place, 0.53, budget=16 << 20)
    assert masks.kind == "rle"
    assert (masks.areas() > 0).all()
    assert _peak(profile) < 80 << 20  # one object covers the whole image, whose bools alone are 12 MB


def _peak(profile: torch.profiler.profile) -> int:
    """The most that tensors held at once."""
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
