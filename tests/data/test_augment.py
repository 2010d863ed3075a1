"""Augmentation: image, masks, boxes and keypoints stay aligned for all parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.data import Augment, Sample, Scenes
from maskwright.data.augment import Placed, place_image, place_target
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement, Preprocess

pytestmark = pytest.mark.fast

RULE = Preprocess(short=96, long=160)


def painted(boxes: list[tuple[int, int, int, int]], size: tuple[int, int] = (60, 90), kind: str = "rle") -> Sample:
    """A black image with rectangles of brightness 60 (n + 1), each with a keypoint in its upper left corner."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    planes = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        image[:, y0:y1, x0:x1] = 60 * (number + 1)
        planes[number, y0:y1, x0:x1] = True
    masks = Masks.from_dense(planes).pack()
    if kind == "polygon":
        masks = Masks.from_polygons([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes], size)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    points = torch.cat([corners[:, :2] + 0.5, torch.full((len(boxes), 1), 2.0)], 1)[:, None]
    target = Instances(
        size,
        corners,
        torch.arange(len(boxes)),
        masks,
        keypoints=points,
        crowd=torch.zeros(len(boxes), dtype=torch.bool),
        ids=torch.arange(len(boxes)) + 1,
    )
    return Sample(image, target, 1)


def check_aligned(laid: Placed) -> None:
    """Every object's mask covers its brightness, except at the resampled edge."""
    target = laid.target
    assert tuple(laid.image.shape[1:]) == target.image_size == laid.placement.size
    assert target.masks is not None
    assert target.masks.kind in ("rle", "polygon")
    planes = target.masks.dense()
    grey = laid.image.float()[0]
    soft = 2 + int(np.ceil(max(laid.placement.scale)))
    assert (grey[_shrunk(~planes.any(0), soft)] < 2).all(), "outside all masks the image is black"
    for label, plane, box in zip(target.labels.tolist(), planes, target.boxes, strict=True):
        bright = (grey - 60 * (label + 1)).abs() < 2
        assert plane.any()
        core = _shrunk(plane, soft)
        assert bright[core].all(), "inside a mask the image has the brightness of the object"
        y, x = plane.nonzero().T
        tight = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        assert (tight - box).abs().max() <= 1.01


def _shrunk(plane: torch.Tensor, by: int) -> torch.Tensor:
    """The mask eroded by `by` pixels, also at the image border."""
    outside = torch.nn.functional.pad((~plane).float()[None, None], (by, by, by, by), value=1)
    return torch.nn.functional.max_pool2d(outside, 2 * by + 1, 1)[0, 0] == 0


OPTIONS = {
    "mirror": Augment(flip=1.0),
    "short sides": Augment(flip=0.5, short=(48, 72, 120)),
    "range": Augment(flip=0.5, short=(48, 120), sampling="range", long=140),
    "window": Augment(flip=0.5, crop=0.3),
    "large-scale jitter": Augment(flip=0.5, jitter=(0.3, 2.0), size=(100, 100)),
    "jitter without canvas": Augment(flip=0.5, jitter=(0.5, 2.0)),
    "canvas": Augment(flip=0.5, size=(64, 128)),
    "everything": Augment(flip=0.5, crop=0.5, crop_chance=0.5, jitter=(0.5, 2.0), size=(120, 90)),
}


@pytest.mark.thorough
@pytest.mark.parametrize("resample", ["pillow", "tensor"])
@pytest.mark.parametrize("kind", ["rle", "polygon"])
@pytest.mark.parametrize("name", OPTIONS)
def test_image_masks_and_boxes_stay_aligned(name: str, kind: str, resample):
    augment = OPTIONS[name]
    sample = painted([(5, 8, 35, 40), (50, 20, 85, 55)], kind=kind)
    for seed in range(8):
        drawn = augment.draw(np.random.default_rng(seed), (60, 90), RULE)
        check_aligned(augment.apply(sample, drawn, resample=resample))


@pytest.mark.thorough
@settings(max_examples=30)
@given(st.integers(0, 10_000), st.tuples(st.integers(20, 80), st.integers(20, 80)))
def test_placements_stay_inside_the_image_and_the_canvas(seed: int, size: tuple[int, int]):
    augment = Augment(crop=0.3, jitter=(0.1, 2.0), size=(64, 48))
    placement = augment.draw(np.random.default_rng(seed), size, RULE).placement
    assert 1 <= placement.size[0] <= 64
    assert 1 <= placement.size[1] <= 48
    height, width = placement.size
    corners = placement.points_to_image(torch.tensor([[0.0, 0.0], [width, height]]))
    assert (corners > -0.01).all()
    assert (corners < torch.tensor([size[1], size[0]]) + 0.01).all()
    assert torch.allclose(placement.points_to_input(corners), torch.tensor([[0.0, 0.0], [width, height]]), atol=1e-3)


def test_the_same_draw_gives_the_same_result_and_another_seed_another():
    augment = Augment(crop=0.5, brightness=0.5, hue=0.2)
    draws = [augment.draw(np.random.default_rng(s), (60, 90), RULE) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    sample = painted([(5, 8, 35, 40)])
    assert torch.equal(augment.apply(sample, draws[0]).image, augment.apply(sample, draws[1]).image)
    assert (sample.image == painted([(5, 8, 35, 40)]).image).all(), "the sample is not modified"


def test_flipping_twice_is_the_identity():
    sample = Scenes(3)[1]
    mirror = Placement.identity((192, 192)).then_mirror()
    once = place_image(sample.image, mirror)
    assert torch.equal(once, sample.image.flip(-1))
    assert torch.equal(place_image(once, mirror), sample.image)
    target = sample.target.place(mirror).place(mirror)
    assert torch.equal(target.boxes, sample.target.boxes)


def test_resizing_alone_equals_what_preprocessing_does():
    image = Scenes(3)[1].image
    for resample in ("pillow", "tensor"):
        rule = Preprocess(short=131, long=400, resample=resample)
        laid, placement = rule.apply(image)
        augment = Augment(flip=0)
        drawn = augment.draw(np.random.default_rng(0), (192, 192), rule)
        assert drawn.placement == placement
        ours = rule.normalize(place_image(image, drawn.placement, resample))
        torch.testing.assert_close(ours, laid, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resample", ["pillow", "tensor"])
def test_cropping_then_resizing_equals_resizing_then_cropping(resample: str):
    image = Scenes(3)[1].image
    whole = place_image(image, Placement.resize((192, 192), (384, 384)), resample).float()
    window = Placement.resize((192, 192), (384, 384)).then_crop(31, 57, (100, 140))
    part = place_image(image, window, resample).float()
    assert (part - whole[:, 57:157, 31:171]).abs().max() <= 1.01
    mirrored = place_image(image, window.then_mirror(), resample).float()
    assert (mirrored - part.flip(-1)).abs().max() <= 1.01


def test_keypoints_swap_in_a_flip_and_become_unlabelled_outside():
    sample = painted([(10, 10, 30, 30)])
    points = torch.tensor([[[12.0, 15, 2], [28.0, 15, 2], [80.0, 15, 1]]])
    sample.target = replace(sample.target, keypoints=points)
    placement = Placement.identity((60, 90)).then_crop(0, 0, (60, 50)).then_mirror()
    placed = place_target(sample.target, placement, (1, 0, 2)).keypoints
    assert placed is not None
    assert placed.tolist() == [[[22, 15, 2], [38, 15, 2], [0, 0, 0]]]


def test_objects_outside_the_crop_are_dropped_and_cut_ones_get_tight_boxes():
    for kind in ("rle", "polygon"):
        sample = painted([(5, 5, 25, 25), (60, 30, 80, 50)], kind=kind)
        placement = Placement.identity((60, 90)).then_crop(15, 0, (60, 40))
        target = place_target(sample.target, placement, None)
        assert target.ids is not None
        assert target.ids.tolist() == [1]
        assert target.boxes.tolist() == [[0, 5, 10, 25]]


def test_a_triangle_cut_by_the_crop_has_the_box_of_its_remaining_mask():
    ring = [0.0, 0.0, 80.0, 0.0, 80.0, 40.0]  # at x = 20 the triangle is 10 pixels high
    masks = Masks.from_polygons([[ring]], (60, 90))
    target = Instances((60, 90), torch.tensor([[0.0, 0, 80, 40]]), torch.zeros(1, dtype=torch.int64), masks)
    placed = place_target(target, Placement.identity((60, 90)).then_crop(0, 0, (60, 20)), None)
    assert placed.boxes[0, 3] <= 11
    assert placed.boxes[0, 2] == 20


def test_uncut_objects_keep_their_annotated_boxes():
    sample = painted([(10, 10, 30, 30)])
    sample.target.boxes[0] = torch.tensor([9.0, 8, 32, 31])
    target = place_target(sample.target, Placement.resize((60, 90), (120, 180)), None)
    assert target.boxes.tolist() == [[18, 16, 64, 62]]


def test_small_objects_are_dropped_only_if_they_were_cut():
    sample = painted([(5, 5, 25, 25), (60, 30, 64, 34)])
    placement = Placement.identity((60, 90)).then_crop(23, 0, (60, 67))
    target = place_target(sample.target, placement, None, min_area=50)
    assert target.ids is not None
    assert target.ids.tolist() == [2], "the first has 40 pixels left; the second has 16, but was not cut"


def test_colour_operations_change_only_the_image():
    sample = Scenes(3)[1]
    augment = Augment(flip=0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    drawn = augment.draw(np.random.default_rng(0), (192, 192), Preprocess(short=192, long=400))
    assert [name for name, _ in drawn.colours] == ["brightness", "contrast", "saturation", "hue"]
    laid = augment.apply(sample, drawn)
    assert laid.image.dtype == torch.uint8
    assert not torch.equal(laid.image, sample.image)
    assert torch.equal(laid.target.boxes, sample.target.boxes)
    other = augment.apply(sample, drawn, resample="tensor").image
    assert (other - laid.image.float()).abs().mean() < 2


# ---- copy-paste ----------------------------------------------------------------------------------------------------


def overlaid(augment: Augment, below: Sample, above: Sample, seed: int = 0) -> Placed:
    def laid(sample: Sample) -> Placed:
        size = (sample.image.shape[1], sample.image.shape[2])
        return augment.apply(
            sample, drawn=replace(augment.draw(np.random.default_rng(0), size), placement=Placement.identity(size))
        )

    class Always(np.random.Generator):
        def random(self, *args, **kwargs):  # selects every object
            return np.zeros(args[0])

    return augment.overlay(Always(np.random.PCG64(seed)), laid(below), laid(above))


def test_pasted_objects_cover_those_below():
    below, above = painted([(10, 10, 50, 50), (60, 5, 80, 25)]), painted([(30, 20, 70, 40)])
    above.image[above.image > 0] = 240
    result = overlaid(Augment(), below, above)
    assert result.target.masks is not None
    planes = result.target.masks.dense()
    assert result.target.labels.tolist() == [0, 1, 0]
    assert (result.image[0][planes[2]] == 240).all()
    assert not (planes[0] & planes[2]).any()
    assert result.target.masks.areas().tolist() == [40 * 40 - 20 * 20, 400 - 10 * 5, 800]
    assert result.target.boxes.tolist() == [[10, 10, 50, 50], [60, 5, 80, 25], [30, 20, 70, 40]]
    assert (result.image[0][planes[0]] == 60).all()


def test_fully_covered_objects_are_dropped_and_partly_covered_ones_get_new_boxes():
    below, above = painted([(30, 20, 40, 30), (20, 10, 60, 30)]), painted([(25, 5, 65, 45)])
    result = overlaid(Augment(), below, above)
    assert result.target.ids is not None
    assert result.target.ids.tolist() == [2, 1]
    assert result.target.boxes.tolist() == [[20, 10, 25, 30], [25, 5, 65, 45]]


def test_covered_keypoints_become_hidden():
    result = overlaid(Augment(), painted([(10, 10, 50, 50)]), painted([(5, 5, 20, 20)]))
    assert result.target.keypoints is not None
    assert result.target.keypoints[:, 0, 2].tolist() == [1, 2]


def test_only_an_image_on_a_canvas_grows_to_contain_pasted_objects():
    below, above = painted([(5, 5, 20, 20)], (30, 40)), painted([(50, 30, 70, 50)], (60, 90))
    grown = overlaid(Augment(size=(100, 100)), below, above)
    assert grown.placement.size == grown.target.image_size == (60, 90)
    assert tuple(grown.image.shape[1:]) == (60, 90)
    assert grown.target.boxes.tolist() == [[5, 5, 20, 20], [50, 30, 70, 50]]
    assert grown.placement.image_size == (30, 40)
    same = overlaid(Augment(), below, above)
    assert same.target.image_size == (30, 40)
    assert len(same.target) == 1


def test_either_image_of_copy_paste_may_have_no_objects():
    below, empty = painted([(5, 5, 20, 20)]), painted([])
    assert overlaid(Augment(), below, empty).target.ids is not None
    assert len(overlaid(Augment(), below, empty).target) == 1
    assert len(overlaid(Augment(), empty, below).target) == 1


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_accept_values_from_json():
    augment = Augment(short=[640, 800], jitter=[0.1, 2.0], size=[64, 64])  # type: ignore[arg-type]
    assert (augment.short, augment.jitter, augment.size) == ((640, 800), (0.1, 2.0), (64, 64))
    assert Augment(size=512).size == (512, 512)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": 2}, "`flip` must be a probability in .0, 1., got 2"),
        ({"crop": 0.0}, "`crop` must be a fraction in .0, 1., got 0.0"),
        ({"jitter": (2.0, 0.1)}, "`jitter` must be a pair of positive factors, smallest first"),
        ({"hue": 0.7}, "`hue` must be in .0, 0.5., got 0.7"),
        ({"short": (0,)}, "`short` must be lengths of at least 1 pixel"),
        ({"sampling": "some"}, "'choice' or 'range'"),
    ],
)
def test_invalid_options_are_named(options: dict, words: str):
    with pytest.raises(UsageError, match=words):
        Augment(**options)
