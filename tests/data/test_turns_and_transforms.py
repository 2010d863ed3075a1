"""Up-down flips, quarter turns, the user's own transforms and class-balanced sampling."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import Augment, Sample, Scenes, make_loader, read_coco
from maskwright.data.loader import repeat_factors
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.training import Recipe, show_batch
from tests.data.making import content, write

pytestmark = pytest.mark.fast
OWN = Preprocess(fit="own", mean=(0, 0, 0), std=(1, 1, 1), divide=1)
PAIR = (1, 0)  # left and right


def sample(kind: str = "rle", size: tuple[int, int] = (40, 60)) -> Sample:
    """Three objects whose masks are where the image has their brightness, with a left and a right keypoint."""
    planes = torch.zeros(3, *size, dtype=torch.bool)
    planes[0, 3:11, 5:22] = planes[1, 20:37, 30:41] = planes[2, 30:40, 50:60] = True
    planes[0, 3:6, 5:9] = False
    image = (planes * torch.tensor([60, 120, 180]).view(3, 1, 1)).sum(0).to(torch.uint8)
    masks = Masks.from_dense(planes)
    if kind == "polygon":
        masks = Masks.from_polygons(masks.polygons(), size)
    boxes = Masks.from_dense(planes).boxes()
    left = torch.stack([boxes[:, 0] + 0.5, boxes[:, 3] - 0.5, torch.full((3,), 2.0)], 1)
    right = torch.stack([boxes[:, 2] - 0.5, boxes[:, 3] - 0.5, torch.full((3,), 1.0)], 1)
    right[2] = 0  # unlabelled
    target = Instances(
        size, boxes, torch.arange(3), masks if kind == "dense" else masks.pack() if kind == "rle" else masks,
        keypoints=torch.stack([left, right], 1),
    )  # fmt: skip
    return Sample(image.expand(3, -1, -1).contiguous(), target, 1)


@pytest.mark.parametrize("kind", ["rle", "polygon", "dense"])
@pytest.mark.parametrize("quarters", range(-1, 5))
def test_quarter_turns_are_exact(kind: str, quarters: int):
    target = sample(kind).target
    turned = target.turned(quarters)
    assert target.masks is not None
    assert turned.masks is not None
    assert turned.masks.kind == kind
    planes = torch.rot90(target.masks.dense(), quarters, (1, 2))
    assert turned.image_size == tuple(planes.shape[1:])
    assert torch.equal(turned.masks.dense(), planes)
    assert torch.equal(turned.boxes, Masks.from_dense(planes).boxes())
    assert turned.keypoints is not None
    assert turned.keypoints[2, 1].tolist() == [0, 0, 0]
    for number, keypoints in enumerate(turned.keypoints[:2].tolist()):
        assert all(planes[number, int(y), int(x)] for x, y, _ in keypoints)
    back = turned.turned(-quarters)
    assert torch.equal(back.boxes, target.boxes)
    assert torch.equal(back.keypoints, target.keypoints)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["rle", "polygon"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"vertical_flip": 1.0}, {(2, True)}),
        ({"quarter_turns": 1.0}, {(1, False), (2, False), (3, False)}),
        ({"vertical_flip": 0.5, "quarter_turns": 0.75, "flip": 0.5}, {(t, m) for t in range(4) for m in (False, True)}),
    ],
)
def test_image_masks_boxes_and_keypoints_stay_aligned(kind: str, options: dict, expected: set):
    augment = Augment(**{"flip": 0.0, **options})
    given = sample(kind)
    seen = set()
    for seed in range(60):
        drawn = augment.draw(np.random.default_rng(seed), (40, 60), OWN)
        placed = augment.apply(given, drawn, mirrored_keypoints=PAIR)
        target = placed.target
        assert target.masks is not None
        assert target.keypoints is not None
        assert tuple(placed.image.shape[1:]) == target.image_size == placed.placement.size
        assert target.labels.tolist() == [0, 1, 2]
        planes = target.masks.dense()
        for number, plane in enumerate(planes):
            assert torch.equal(plane, placed.image[0] == 60 * (number + 1))
        assert torch.equal(target.boxes, target.masks.boxes())
        for number in range(2):
            for x, y, _ in target.keypoints[number].tolist():
                assert planes[number, int(y), int(x)]
        reversed_ = drawn.placement.mirrored
        visible = target.keypoints[:2, :, 2].tolist()
        assert visible == ([[1, 2]] * 2 if reversed_ else [[2, 1]] * 2), "left and right change in a reflection only"
        seen.add((drawn.turns, reversed_))
    assert seen == expected


def test_an_up_down_flip_turns_the_image_upside_down():
    given = sample()
    augment = Augment(flip=0.0, vertical_flip=1.0)
    placed = augment.apply(given, augment.draw(np.random.default_rng(0), (40, 60), OWN))
    assert torch.equal(placed.image, given.image.flip(1))


def test_what_is_off_changes_no_other_random_choice():
    one, two = Augment(flip=0.5, crop=0.5), Augment(flip=0.5, crop=0.5, vertical_flip=0.0, quarter_turns=0.0)
    for seed in range(5):
        draws = [a.draw(np.random.default_rng(seed), (40, 60), OWN) for a in (one, two)]
        assert draws[0] == draws[1]


# ---- the user's own transforms ---------------------------------------------------------------------------------------


def brighten(image, target):
    return (image.int() + 50).clamp(0, 255).to(torch.uint8), target


def shifted(image, target, rng):
    """Crops a random number of columns; with a generator."""
    columns = int(rng.integers(1, 9))
    placement = Placement.identity(target.image_size).then_crop(columns, 0, (40, 60 - columns))
    return image[:, :, columns:], target.place(placement)


def noisy(image, target):
    noise = torch.randint(0, 9, image.shape) + np.random.randint(3) + random.randrange(3)  # noqa: NPY002
    return (image.int() + noise).clamp(0, 255).to(torch.uint8), target


class Stored(Scenes):
    def __getitem__(self, index: int) -> Sample:
        return replace(sample(), id=index)

    def sizes(self) -> list[tuple[int, int]]:
        return [(40, 60)] * len(self)


def batch(transform, seed: int = 0, workers: int = 0):
    augment = Augment(flip=0.0, transform=transform)
    scenes = Stored(2, (40, 60), classes=("disc", "ring", "star"))
    return next(
        iter(make_loader(scenes, OWN, batch_size=2, training=True, augment=augment, seed=seed, workers=workers))
    )


def test_a_transform_of_the_user_changes_image_and_objects():
    assert set(batch(brighten).images[:, :, :40, :60].unique().tolist()) == {50, 110, 170, 230}
    shifted_batch = batch(shifted)
    assert shifted_batch.targets is not None
    for number, target in enumerate(shifted_batch.targets):
        assert 51 <= target.image_size[1] < 60
        assert target.masks is not None
        plane = shifted_batch.images[number, 0, :40, : target.image_size[1]]
        assert torch.equal(target.masks.dense()[0], plane == 60)


@pytest.mark.thorough
def test_random_transforms_are_reproducible_and_change_no_other_random_state():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = batch(noisy).images
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(first, batch(noisy).images)
    assert torch.equal(first, batch(noisy, workers=1).images)
    assert not torch.equal(first, batch(noisy, seed=1).images)


def test_a_transform_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_to_import.py").write_text("def darken(image, target):\n    return image // 2, target\n")
    by_file = batch(f"{tmp_path / 'mine_to_import.py'}:darken").images
    assert set(by_file[:, :, :40, :60].unique().tolist()) == {0, 30, 60, 90}
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert torch.equal(batch("mine_to_import:darken").images, by_file)
    for name, says in [
        ("mine_to_import:lighten", "has no attribute 'lighten'"),
        ("absent_module:f", "No module named 'absent_module'"),
        ("darken", "or its name as 'module:function'"),
        ("sys:path", "is not a function"),
        (str(tmp_path / "no.py:f"), "cannot be imported"),
    ]:
        with pytest.raises(UsageError, match=says):
            Augment(transform=name)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "says"),
    [
        (lambda image, target: image, "must return an image and its objects, got Tensor"),
        (lambda image, target: (image.float(), target), "as a uint8 tensor"),
        (lambda image, target: (image[:1], target), "must keep the 3 channels, got 1"),
        (lambda image, target: (image, None), "as Instances, got NoneType"),
        (lambda image, target: (image[:, :-1], target), "is 39 x 60, but the image_size of its objects is 40 x 60"),
    ],
)
def test_what_a_transform_returns_is_checked(transform, says, workers):
    with pytest.raises(UsageError, match=f"<lambda>: .*{says}"):
        batch(transform, workers=workers)


def test_a_recipe_stores_the_name_of_a_transform():
    recipe = Recipe(augment={"flip": 0.5, "transform": brighten})
    stored = Recipe.from_json(recipe.to_json())
    assert stored.augment["transform"].endswith("test_turns_and_transforms:brighten")
    assert recipe.differences(stored) == []


# ---- class-balanced sampling -----------------------------------------------------------------------------------------


def rare(tmp_path: Path):
    """20 images with class 0, of which one also has class 1, and one image without objects."""
    data = content(21)
    data["categories"] = [{"id": 1, "name": "usual"}, {"id": 2, "name": "rare"}]
    first = {}
    for annotation in data["annotations"]:
        annotation["category_id"] = 1
        first.setdefault(annotation["image_id"], annotation)
    images = [image["id"] for image in data["images"]]
    first[images[3]]["category_id"] = 2
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != images[7]]
    return read_coco(write(tmp_path, data), tmp_path / "train")


def test_repeat_factors_are_those_of_lvis(tmp_path: Path):
    dataset = rare(tmp_path)
    factors = repeat_factors(dataset, 0.5)
    assert factors[3] == pytest.approx(np.sqrt(0.5 * 21))
    assert (np.delete(factors, 3) == 1).all()
    assert (repeat_factors(dataset, 0.001) == 1).all()


def test_images_of_rare_classes_are_repeated(tmp_path: Path):
    dataset = rare(tmp_path)
    seen = np.zeros(21)
    for epoch in range(40):
        loader = make_loader(dataset, OWN, batch_size=1, training=True, balance=0.5)
        order = [index for indices in loader.indices(epoch) for index in indices]
        assert len(order) == len(loader) == 24, "20 + 3.24, rounded up"
        assert set(order) == set(range(21)), "no image is lost"
        seen += np.bincount(order, minlength=21)
    assert seen[3] / 40 == pytest.approx(np.sqrt(10.5) * 24 / 23.24, abs=0.3)
    assert loader.indices(1) != loader.indices(2)
    assert len(make_loader(dataset, OWN, batch_size=1, training=True)) == 21


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_images_of_other_channels_are_resized(channels: int):
    image = torch.randint(0, 256, (channels, 40, 60), dtype=torch.uint8)
    given = replace(sample(), image=image)
    rule = replace(OWN, fit="short", short=30, long=60)
    for options in ({"flip": 0.0}, {"flip": 1.0, "jitter": (0.5, 2.0)}):
        augment = Augment(**options)
        placed = augment.apply(given, augment.draw(np.random.default_rng(0), (40, 60), rule))
        assert placed.image.shape == (channels, *placed.placement.size)
    with pytest.raises(UsageError, match="needs 1 or 3 channels") if channels != 1 else contextlib.nullcontext():
        augment = Augment(brightness=0.5)
        augment.apply(given, augment.draw(np.random.default_rng(0), (40, 60), rule))


# ---- the sheet -------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_training_batch_is_drawn(tmp_path: Path):
    path = show_batch(
        "mask-rcnn", Scenes(6, (96, 128), seed=1), tmp_path / "batch.png", batch=4, short=(96,), long=128,
        augment={"vertical_flip": 1.0, "quarter_turns": 0.5},
    )  # fmt: skip
    with Image.open(path) as sheet:
        assert sheet.size[0] > 2 * 128
    with pytest.raises(UsageError, match="there is no batch 9; an epoch has 2 batches"):
        show_batch("mask-rcnn", Scenes(6, (96, 128)), tmp_path / "b.png", batch=4, number=9)


def test_a_loader_that_is_dropped_after_an_error_leaves_no_workers():
    for _ in range(2):
        with pytest.raises(UsageError, match="must return an image and its objects"):
            batch(lambda image, target: image, workers=1)
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 3  # torch's own way of ending them takes 10 s for each
    assert not multiprocessing.active_children()
