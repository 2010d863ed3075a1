"""Drawing: pixels, colours, labels, keypoints, unusual input, and memory."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks
from maskwright.structures.drawing import GREY, PALETTE, _ink, colour, draw
from tests.structures.strategies import planes

pytestmark = pytest.mark.fast

PLAIN = {"boxes": False, "labels": False, "keypoints": False}


def scene(size=(120, 160)) -> Instances:
    """A large block, a small one inside it, and a crowd region."""
    dense = torch.zeros(3, *size, dtype=torch.bool)
    dense[0, 20:100, 20:120] = True
    dense[1, 40:60, 40:70] = True
    dense[2, 60:118, 125:158] = True
    masks = Masks.from_dense(dense).pack()
    return Instances(size, masks.boxes(), torch.tensor([1, 0, 0]), masks, crowd=torch.tensor([False, False, True]))


def grey(size=(120, 160)) -> torch.Tensor:
    return torch.full((3, *size), 90, dtype=torch.uint8)


def test_only_pixels_of_masks_change():
    drawn = np.asarray(scene().draw(grey(), **PLAIN))
    changed = (drawn != 90).any(2)
    inside = scene().masks.union().dense()[0].numpy()  # pyright: ignore
    assert changed[inside].mean() > 0.99
    soft = np.zeros_like(inside)
    soft[1:-1, 1:-1] = inside[2:, 1:-1] | inside[:-2, 1:-1] | inside[1:-1, 2:] | inside[1:-1, :-2]
    soft[1:-1, 1:-1] |= inside[2:, 2:] | inside[:-2, :-2] | inside[2:, :-2] | inside[:-2, 2:] | inside[1:-1, 1:-1]
    assert not changed[~soft].any(), "the soft edge is one pixel wide"


def test_alpha_is_the_opacity_and_the_border_is_opaque():
    drawn = np.asarray(scene()[:1].draw(grey(), alpha=0.25, line_width=3, **PLAIN)).astype(float)
    expected = 90 * 0.75 + np.array(colour(0)) * 0.25
    assert np.abs(drawn[60, 100] - expected).max() <= 2
    assert np.abs(drawn[21, 80] - np.array(colour(0))).max() <= 30, "just inside the edge"
    bare = np.asarray(scene()[:1].draw(grey(), alpha=0.25, contours=False, **PLAIN)).astype(float)
    assert np.abs(bare[22, 80] - expected).max() <= 2


def test_a_small_object_stays_visible_on_a_large_one_in_any_order():
    for order in ([0, 1], [1, 0]):
        drawn = np.asarray(scene()[order].draw(grey(), alpha=1.0, colour_by="class", **PLAIN))
        assert drawn[50, 55].tolist() == list(colour(0))
        assert drawn[80, 80].tolist() == list(colour(1))


def test_crowd_regions_are_grey_and_hatched():
    drawn = np.asarray(scene()[2:].draw(torch.zeros(3, 120, 160, dtype=torch.uint8), alpha=0.8, **PLAIN)).astype(int)
    region = drawn[70:110, 132:150]
    assert (np.ptp(region, axis=2) == 0).all(), "no hue"
    values = np.unique(region[..., 0])
    assert values.min() < 0.4 * GREY[0] < 0.7 * GREY[0] < values.max(), "stripes"


def test_colours_by_object_and_by_class():
    two = scene()[[1, 1]]
    two.labels = torch.tensor([4, 4])
    by_class = np.asarray(two.draw(grey(), colour_by="class", alpha=1.0, **PLAIN))
    assert by_class[50, 55].tolist() == list(colour(4))
    with pytest.raises(UsageError, match=r"`alpha` must be in .0, 1., got 1\.5"):
        two.draw(grey(), alpha=1.5)


def test_all_types_of_images_give_the_same_drawing_and_are_not_modified():
    tensor = torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8)
    before = tensor.clone()
    array = tensor.permute(1, 2, 0).numpy()
    expected = np.asarray(scene().draw(tensor))
    for image in (
        array,
        np.asfortranarray(array),
        Image.fromarray(array),
        tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ):
        assert np.array_equal(np.asarray(scene().draw(image)), expected)
    with_alpha = np.dstack([array, np.full((120, 160), 7, np.uint8)])
    assert np.array_equal(np.asarray(scene().draw(with_alpha)), expected)
    assert torch.equal(tensor, before)
    flat = scene().draw(tensor[:1])
    assert np.array_equal(np.asarray(flat), np.asarray(scene().draw(array[..., 0])))
    assert flat.mode == "RGB"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(3, 120, 160), "uint8"),
        (np.zeros((120, 160, 3)), "uint8, 0 ... 255, got float64"),
        (torch.zeros(120, 160, 3, dtype=torch.uint8), r"\(3, H, W\)"),
        ("photo.jpg", "must be a tensor, an array or a PIL image, got str"),
    ],
)
def test_an_invalid_image_is_an_error(image, says):
    with pytest.raises(UsageError, match=says):
        draw(image, scene())


def test_labels_are_legible():
    plain = np.asarray(scene().draw(grey(), ["cat", "dog"], boxes=False, labels=False))
    named = np.asarray(scene().draw(grey(), ["cat", "dog"], boxes=False))
    where = (plain != named).any(2)
    assert where.sum() > 300
    assert not where[101:, :120].any(), "above the box if there is space"
    for number in range(100):
        paint = np.array(colour(number)) / 255
        linear = np.where(paint <= 0.04045, paint / 12.92, ((paint + 0.055) / 1.055) ** 2.4)
        luminance = float(linear @ [0.2126, 0.7152, 0.0722])
        ink = 0.0 if _ink(colour(number)) == (0, 0, 0) else 1.0
        contrast = (max(ink, luminance) + 0.05) / (min(ink, luminance) + 0.05)
        assert contrast >= 4.5, f"colour {number}: WCAG AA"


def test_any_class_name_can_be_drawn():
    for name in ("", "a\nb", "Öl 猫 ж", "x" * 300, "\x00\x07"):
        scene().draw(grey(), [name, name])
    scene().draw(grey(), [])  # fewer names than labels


def test_the_first_colours_are_distinct():
    values = np.array([colour(n) for n in range(8)], float)
    for a, b in itertools.combinations(range(8), 2):
        assert np.abs(values[a] - values[b]).max() > 60
    assert len({colour(n) for n in range(3 * len(PALETTE))}) == 3 * len(PALETTE)


def test_a_skeleton_and_its_unlabelled_keypoints():
    person = scene()[:1]
    person.keypoints = torch.zeros(1, 17, 3)
    person.masks = None
    person.keypoints[0, 5] = torch.tensor([30.0, 30, 2])
    person.keypoints[0, 7] = torch.tensor([90.0, 90, 1])
    drawn = np.asarray(person.draw(grey(), boxes=False, labels=False))
    changed = (drawn != 90).any(2)
    assert changed[[30, 60, 90], [30, 60, 90]].all(), "two keypoints and the line between them"
    assert not changed[:15, :15].any(), "unlabelled keypoints are not drawn at the corner"
    person.scores = torch.tensor([0.9])
    person.keypoints[0, 7, 2] = 0.01
    hidden = np.asarray(person.draw(grey(), boxes=False, labels=False))
    assert not (hidden != 90).any(2)[90, 90], "a keypoint with a low score is not drawn"
    person.keypoints = torch.full((1, 4, 3), 50.0)
    person.draw(grey())  # other keypoints have no lines
    assert np.array_equal(
        np.asarray(person.draw(grey(), keypoints=False, boxes=False, labels=False)), np.full((120, 160, 3), 90)
    )


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 2)
@given(planes(0, 3))
def test_all_masks_can_be_drawn(dense):
    size = (dense.shape[1], dense.shape[2])
    masks = Masks.from_dense(dense)
    objects = Instances(size, masks.boxes(), torch.zeros(len(dense), dtype=torch.int64), masks, torch.ones(len(dense)))
    objects.crowd = torch.arange(len(dense)) % 2 == 1
    assert objects.draw(torch.zeros(3, *size, dtype=torch.uint8), ["thing"]).size == (size[1], size[0])


def test_boxes_that_are_not_finite_or_outside_the_image():
    boxes = torch.tensor([[float("nan")] * 4, [-50.0, -50, 500, 500], [5.0, 5, 5, 5], [200.0, 200, 300, 300]])
    found = Instances((120, 160), boxes, torch.zeros(4, dtype=torch.int64), scores=torch.ones(4))
    assert found.draw(grey()).size == (160, 120)


@pytest.mark.thorough
def test_a_hundred_objects_on_a_large_image():
    """The time limit is only exceeded if full planes are made."""
    y, x = np.mgrid[:300, :400]
    disc = (x - 200) ** 2 / 200**2 + (y - 150) ** 2 / 150**2 < 1
    corners = torch.stack([torch.arange(100) * 36, torch.arange(100) * 27], 1)
    masks = Masks.from_crops([disc] * 100, corners, (3000, 4000))
    found = Instances((3000, 4000), masks.boxes(), torch.zeros(100, dtype=torch.int64), masks, torch.ones(100))
    image = np.zeros((3000, 4000, 3), np.uint8)
    tracemalloc.start()
    start = time.perf_counter()
    drawn = found.draw(image, ["thing"])
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.size == (4000, 3000)
    assert peak < 2.5 * image.nbytes, "little more than the copy of the image"
    assert seconds < 60


def test_thousands_of_small_objects_take_little_time():
    """Neither columns of the image nor tables are computed for each object."""
    count = 4000
    corners = torch.stack([torch.arange(count) * 37 % 3980, torch.arange(count) * 101 % 3980], 1)
    masks = Masks.from_crops([np.ones((12, 9), bool)] * count, corners, (4000, 4000))
    found = Instances((4000, 4000), masks.boxes(), torch.zeros(count, dtype=torch.int64), masks, torch.ones(count))
    start = time.process_time()
    found.draw(np.zeros((4000, 4000, 3), np.uint8), ["cell"])
    assert time.process_time() - start < 10


def test_a_tracked_object_has_the_colour_of_its_id():
    def drawn(order: list[int]) -> np.ndarray:
        masks = Masks.from_polygons([[[2, 2, 12, 2, 12, 12, 2, 12]], [[22, 2, 32, 2, 32, 12, 22, 12]]], (16, 40))
        objects = Instances((16, 40), masks.boxes(), torch.tensor([0, 0]), masks, ids=torch.tensor([4, 9]))[order]
        image = objects.draw(np.zeros((16, 40, 3), np.uint8), colour_by="id", labels=False)
        return np.asarray(image)

    assert (drawn([0, 1]) == drawn([1, 0])).all()
    assert tuple(drawn([0, 1])[7, 7]) != tuple(drawn([0, 1])[7, 27])
    objects = Instances((16, 40), torch.zeros(1, 4), torch.tensor([0]))
    with pytest.raises(UsageError, match="`colour_by` is 'id', but the objects have no ids"):
        objects.draw(np.zeros((16, 40, 3), np.uint8), colour_by="id")
