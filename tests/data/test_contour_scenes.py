"""Generated scenes whose classes are outlines: reproducible, with masks that match the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskwright.data import check, open_dataset
from maskwright.data.contour_scenes import ContourScenes, draw_outline, outline
from maskwright.errors import UsageError

pytestmark = pytest.mark.fast


def test_an_image_depends_only_on_the_settings_and_its_index():
    one, two = ContourScenes(9, (96, 80), seed=3), ContourScenes(4, (96, 80), seed=3)
    _ = one[7], one[0]
    a, b = one[2], two[2]
    assert a.image.shape == (3, 96, 80)
    assert torch.equal(a.image, b.image)
    assert a.target.masks is not None
    assert b.target.masks is not None
    assert a.target.masks.rle() == b.target.masks.rle()
    assert torch.equal(one.targets(2).boxes, a.target.boxes)
    assert not torch.equal(a.image, ContourScenes(4, (96, 80), seed=4)[2].image)


@pytest.mark.thorough
def test_masks_are_visible_parts_of_at_least_12_pixels():
    scenes = ContourScenes(24, crowd=0.3, empty=0)
    counts = []
    for index in range(24):
        target = scenes.targets(index)
        assert target.masks is not None
        assert (target.masks.dense().sum(0) <= 1).all(), "visible parts cannot overlap"
        assert (target.masks.areas() >= 12).all()
        assert torch.equal(target.boxes, target.masks.boxes())
        counts.append(len(target))
    assert min(counts) >= 1
    assert max(counts) > 40, "some images are crowds"


def test_crowds_are_small_and_numerous_and_other_images_hold_at_most_the_given_number():
    crowds, few = ContourScenes(6, crowd=1, empty=0), ContourScenes(12, objects=5, crowd=0, empty=0)
    for index in range(6):
        target = crowds.targets(index)
        assert len(target) >= 25
        assert len(target.labels.unique()) <= 2
        assert float((target.boxes[:, 2:] - target.boxes[:, :2]).max()) < 64
    assert all(1 <= len(few.targets(index)) <= 5 for index in range(12))
    assert len(ContourScenes(3, empty=1).targets(1)) == 0


def test_classes_are_distinct_outlines_that_every_data_set_shares():
    points = np.stack([outline(label).points for label in range(254)])
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1).mean(-1) + np.eye(254)
    alike = [(a, b) for a, b in np.argwhere(apart < 0.02).tolist() if outline(a).rings == outline(b).rings]
    same = [
        (a, b)
        for a, b in alike
        if abs(outline(a).aspect - outline(b).aspect) < 0.02 and outline(a).hole == outline(b).hole
    ]
    assert not same
    assert outline(0).points is outline(0).points
    assert sum(outline(label).hole > 0 for label in range(254)) > 10
    assert sum(outline(label).rings > 0 for label in range(254)) > 60


def test_an_outline_is_drawn_at_its_place_with_its_hole():
    rng = np.random.default_rng(0)
    ring = next(label for label in range(254) if outline(label).hole > 0.4 and label != 1)
    stamp, shown = draw_outline(rng, ring, (50.0, 60.0), 20.0, hollow=False)
    assert stamp.alpha[60 - stamp.y0, 50 - stamp.x0] == 0, "the centre is in the hole"
    assert shown is None
    stamp, shown = draw_outline(rng, 0, (50.0, 60.0), 20.0, hollow=True)
    assert stamp.alpha[60 - stamp.y0, 50 - stamp.x0] == 255
    assert shown is not None
    assert shown.alpha[60 - stamp.y0, 50 - stamp.x0] < 90
    assert shown.alpha.max() == 255
    assert 30 < max(stamp.alpha.shape) <= 46


def test_a_text_opens_them_with_disjoint_splits(tmp_path):
    train, val = (
        open_dataset("contours:count=30,size=64x96,seed=2,classes=10,val=4", split) for split in ("train", "val")
    )
    assert (len(train), len(val)) == (30, 4)
    assert train.classes == tuple(f"contour-{label:03d}" for label in range(10))
    assert train.sizes()[0] == (64, 96)
    assert not torch.equal(train[0].image, val[0].image)
    with pytest.raises(UsageError, match="unknown option 'sides=3'"):
        open_dataset("contours:sides=3", "train")
    for split in ("train", "val"):
        for name in ("seed", "count"):
            with pytest.raises(UsageError, match=f"{name} must not be negative"):
                open_dataset(f"contours:{name}=-1", split)
    with pytest.raises(UsageError, match="option values must be numbers"):
        open_dataset("contours:size=axb", "train")
    for size in ((16, 64), (64, 100_000)):
        with pytest.raises(UsageError, match=r"sides in \[32, 8192\]"):
            ContourScenes(3, size)
    with pytest.raises(UsageError, match=r"objects in \[1, 1000\]"):  # otherwise ids of two images are equal
        ContourScenes(3, objects=1001)


@pytest.mark.thorough
def test_written_and_read_back_they_pass_the_check(tmp_path):
    ContourScenes(6, (64, 64), crowd=0.4).write(tmp_path)
    again = open_dataset(tmp_path, "train")
    first = ContourScenes(6, (64, 64), crowd=0.4)[1]
    assert torch.equal(again[1].image, first.image)
    assert torch.equal(again[1].target.boxes, first.target.boxes)
    report = check(tmp_path, split="train")
    assert [finding.kind for finding in report.findings] == ["class"], "only the note about classes without objects"
