"""Generated scenes: reproducible, with masks that match the images; writing and reading back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maskwright.data import PERSON_KEYPOINTS, Scenes, check, mirrored_keypoints, open_dataset, read_coco
from maskwright.data.scenes import parse_scenes
from maskwright.errors import UsageError
from maskwright.structures.instances import PERSON_KEYPOINTS_MIRRORED

pytestmark = pytest.mark.fast


def test_a_scene_depends_only_on_seed_and_index():
    one, two = Scenes(9, (64, 80), seed=3), Scenes(4, (64, 80), seed=3)
    _ = one[7], one[0]
    a, b = one[2], two[2]
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.target.boxes, b.target.boxes)
    assert a.target.masks is not None
    assert b.target.masks is not None
    assert a.target.masks.rle() == b.target.masks.rle()
    assert not torch.equal(a.image, one[3].image)
    assert not torch.equal(a.image, Scenes(9, (64, 80), seed=4)[2].image)


def test_targets_match_the_samples():
    scenes = Scenes(6)
    for index in range(6):
        sample, alone = scenes[index], scenes.targets(index)
        assert torch.equal(sample.target.boxes, alone.boxes)
        assert sample.image.shape == (3, 192, 192)
        assert sample.image.dtype == torch.uint8


@pytest.mark.thorough
@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_masks_are_the_visible_parts(difficulty: float):
    scenes = Scenes(40, difficulty=difficulty, empty=0)
    for index in range(0, 40, 5):
        target = scenes.targets(index)
        assert target.masks is not None
        planes = target.masks.dense()
        assert (planes.sum(0) <= 1).all(), "visible parts cannot overlap"
        assert (target.masks.areas() >= 12).all()
        assert torch.equal(target.boxes, target.masks.boxes())
        assert target.crowd is not None
        assert not target.crowd.any()
    counts = [len(scenes.targets(i)) for i in range(20)]
    assert min(counts) >= 1


@pytest.mark.thorough
def test_difficulty_gives_more_and_smaller_objects():
    easy, hard = Scenes(30, difficulty=0, empty=0), Scenes(30, difficulty=1, empty=0)
    counts = [np.mean([len(s.targets(i)) for i in range(30)]) for s in (easy, hard)]
    areas = [np.median(np.concatenate([s.areas(i) for i in range(30)])) for s in (easy, hard)]
    assert counts[1] > 2 * counts[0]
    assert areas[1] < areas[0] / 2


def test_objects_overlap_unless_difficulty_is_low():
    def covered(scenes: Scenes) -> int:
        layouts = [scenes._layout(i) for i in range(20)]
        return sum(
            thing.area > np.count_nonzero(layout.owner == n)
            for layout in layouts
            for n, thing in enumerate(layout.things)
        )

    assert covered(Scenes(20, difficulty=0)) == 0
    assert covered(Scenes(20, difficulty=0.6)) > 20


def test_rings_have_holes():
    scenes = Scenes(8, classes=("ring",), difficulty=0, empty=0)
    holes = 0
    for index in range(8):
        masks = scenes.targets(index).masks
        assert masks is not None
        holes += sum(len(rings) > 1 for rings in masks.polygons())
    assert holes > 4


@pytest.mark.thorough
def test_all_classes_occur():
    scenes = Scenes(40)
    labels = torch.cat([scenes.targets(i).labels for i in range(40)])
    assert set(labels.tolist()) == set(range(len(scenes.classes)))
    assert set(Scenes(9, classes=("heart", "triangle")).targets(1).labels.tolist()) <= {0, 1}


def test_the_fraction_of_empty_images():
    assert any(len(Scenes(60, empty=0.2).targets(i)) == 0 for i in range(60))
    assert all(len(Scenes(1, empty=1.0)[0].target) == 0 for _ in range(1))


@pytest.mark.thorough
def test_figures_have_keypoints_left_and_right():
    scenes = Scenes(12, keypoints=True, empty=0)
    assert scenes.classes == ("figure",)
    assert scenes.keypoint_names == PERSON_KEYPOINTS
    seen = torch.zeros(3, dtype=torch.int64)
    for index in range(12):
        target = scenes.targets(index)
        points = target.keypoints
        assert points is not None
        assert points.shape == (len(target), 17, 3)
        seen += torch.bincount(points[..., 2].long().flatten(), minlength=3)
        assert (points[points[..., 2] == 0] == 0).all()
        assert target.masks is not None
        planes = target.masks.dense()
        for keypoints, plane in zip(points, planes, strict=True):
            x, y = keypoints[keypoints[:, 2] == 2][:, :2].long().unbind(1)
            assert plane[y, x].all(), "a visible keypoint lies on its figure"
        # The figures face the viewer: their left side is on the right.
        both = (points[:, 5, 2] > 0) & (points[:, 6, 2] > 0)
        assert (points[both, 5, 0] > points[both, 6, 0]).all()
    assert (seen > 10).all(), f"unlabelled, hidden and visible keypoints should all occur: {seen}"


def test_a_flip_swaps_left_and_right_keypoints():
    assert mirrored_keypoints(PERSON_KEYPOINTS) == PERSON_KEYPOINTS_MIRRORED
    assert mirrored_keypoints(("tip", "left_fin", "right_fin", "L_eye", "R_eye")) == (0, 2, 1, 4, 3)
    assert mirrored_keypoints(("leftover", "nose")) == (0, 1)
    assert mirrored_keypoints(None) is None


@pytest.mark.thorough
@pytest.mark.parametrize("keypoints", [False, True])
def test_writing_and_reading_back(tmp_path: Path, keypoints: bool):
    scenes = Scenes(5, (48, 64), seed=2, keypoints=keypoints)
    scenes.write(tmp_path)
    read = open_dataset(tmp_path, strict=True, keypoints=keypoints)
    assert read.classes == scenes.classes
    assert read.keypoint_names == scenes.keypoint_names
    assert check(tmp_path).ok
    for index in range(5):
        a, b = scenes[index], read[index]
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.target.boxes, b.target.boxes)
        assert a.target.masks is not None
        assert b.target.masks is not None
        assert a.target.masks.rle() == b.target.masks.rle()
        assert a.id == b.id
        if keypoints:
            assert a.target.keypoints is not None
            assert b.target.keypoints is not None
            torch.testing.assert_close(a.target.keypoints, b.target.keypoints, atol=1e-3, rtol=0)
    assert len(read_coco(tmp_path / "annotations" / "instances_train.json")) == 5


def test_options_in_the_source_text():
    scenes = parse_scenes("scenes:count=12,size=32x48,seed=4,difficulty=0.9,classes=disc+star,empty=0.5,val=3", "train")
    assert (len(scenes), scenes.size, scenes.seed, scenes.difficulty) == (12, (32, 48), 4, 0.9)
    assert scenes.classes == ("disc", "star")
    held = parse_scenes("scenes:count=12,size=32x48,seed=4,val=3", "val")
    assert len(held) == 3
    assert held.seed != scenes.seed
    assert len(parse_scenes("scenes", "train")) == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenes:colour=red", "unknown option 'colour=red'; expected NAME=VALUE with a name of count, size"),
        ("scenes:count=many", "option values must be numbers"),
        ("scenes:size=1x2x3", "option values must be numbers"),
        ("scenes:classes=disc+dog", "classes must be distinct names of disc, ring"),
        ("scenes:difficulty=3", "difficulty and empty must be in"),
        ("scenes:count=3,count=5", "the option 'count' is given twice"),
        ("scenes:seed=-1", "seed must not be negative"),
        ("scenes:size=100000", r"sides in \[16, 8192\]"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_invalid_options_are_named(text: str, words: str, split: str):
    with pytest.raises(UsageError, match=words):
        parse_scenes(text, split)
