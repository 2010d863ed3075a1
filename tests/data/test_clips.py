"""Data sets of clips: DAVIS, YouTube-VIS and generated clips, and what is said about damaged ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import (
    Clips,
    MovingScenes,
    open_dataset,
    read_davis,
    read_youtube_vis,
    write_davis,
    write_youtube_vis,
)
from maskwright.data.davis import write_map
from maskwright.errors import AnnotationError, DataError, ImageError, UsageError
from maskwright.structures import Instances, Masks
from tests.data import making

pytestmark = pytest.mark.fast
SHARED = making.SHARED / "clips"


@pytest.fixture(scope="module")
def moving() -> MovingScenes:
    return MovingScenes(3, frames=5, size=(48, 64), seed=7, difficulty=0.7)


def same(a: Instances, b: Instances) -> bool:
    assert a.masks is not None
    assert b.masks is not None
    return a.masks.rle() == b.masks.rle() and a.boxes.equal(b.boxes)


# ---- generated clips ---------------------------------------------------------------------------------------------


def test_a_generated_clip_is_the_same_in_any_order_and_process(moving: MovingScenes):
    again: MovingScenes = pickle.loads(pickle.dumps(MovingScenes(3, frames=5, size=(48, 64), seed=7, difficulty=0.7)))
    for index in (9, 2, 14):
        assert moving[index].image.equal(again[index].image)
        assert same(moving.targets(index), again.targets(index))
    other = MovingScenes(1, frames=5, size=(48, 64), seed=8, difficulty=0.7)
    assert not other[0].image.equal(moving[0].image)


def test_objects_keep_id_and_class_and_masks_do_not_overlap(moving: MovingScenes):
    for clip in moving.clips:
        labels: dict[int, int] = {}
        for frame in range(len(clip)):
            target = clip.target(frame)
            assert target.masks is not None
            assert target.ids is not None
            assert int(target.masks.dense().sum(0).max()) <= 1
            assert target.masks.boxes().equal(target.boxes)
            for number, label in zip(target.ids.tolist(), target.labels.tolist(), strict=True):
                assert labels.setdefault(number, label) == label


def test_objects_move_leave_and_return():
    clips = MovingScenes(8, frames=20, size=(64, 64), seed=1, difficulty=0.8)
    left = moved = 0
    for clip in clips.clips:
        ids = [set(clip.target(frame).ids.tolist()) for frame in range(20)]
        left += sum(number not in own for number in set.union(*ids) for own in ids)
        first, second = clip.target(0), clip.target(5)
        both = set(first.ids.tolist()) & set(second.ids.tolist())
        moved += sum(not first.boxes[first.ids == number].equal(second.boxes[second.ids == number]) for number in both)
    assert left > 10
    assert moved > 10


def test_a_still_clip_differs_in_its_noise_only():
    clip = MovingScenes(1, frames=3, size=(48, 48), difficulty=0.0, speed=0.0).clips[0]
    assert same(clip.target(0), clip.target(2))
    difference = (clip.image(0).int() - clip.image(2).int()).abs()
    assert 0 < float(difference.float().mean()) < 6


def test_text_describes_generated_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train = open_dataset("clips:count=8,frames=4,size=32x40,seed=3,classes=disc+ring", "train")
    val = open_dataset("clips:count=8,frames=4,size=32x40,seed=3,classes=disc+ring", "val")
    assert isinstance(train, Clips)
    assert isinstance(val, Clips)
    assert (len(train.clips), len(val.clips), len(train), train.classes) == (8, 2, 32, ("disc", "ring"))
    assert train.clips[0].size == (32, 40)
    assert not train[0].image.equal(val[0].image)
    with pytest.raises(UsageError, match="unknown option 'speed2=1'"):
        open_dataset("clips:speed2=1")
    with pytest.raises(UsageError, match="must be numbers"):
        open_dataset("clips:count=many")
    with pytest.raises(UsageError, match="difficulty in"):
        open_dataset("clips:difficulty=2")
    with pytest.raises(UsageError, match="distinct names"):
        MovingScenes(1, classes=("disc", "disc"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    with pytest.raises(UsageError, match="no annotations"):  # a folder of this name is a folder
        open_dataset("clips")


# ---- as a data set -----------------------------------------------------------------------------------------------


def test_annotated_frames_are_the_images_of_the_data_set(moving: MovingScenes):
    assert len(moving) == 15
    assert moving.image_ids()[6] == "clip0002/00001"
    assert moving[6].id == "clip0002/00001"
    assert moving.sizes() == [(48, 64)] * 15
    assert moving.paths() == [None] * 15
    assert moving.locate(-1) == (moving.clips[2], 4)
    assert moving.subset(["clip0003"])[0].image.equal(moving[10].image)
    assert moving.clip("clip0002") is moving.clips[1]
    with pytest.raises(UsageError, match="no clip 'none'; its clips are clip0001"):
        moving.clip("none")
    with pytest.raises(UsageError, match="two clips are named 'clip0001'"):
        Clips([moving.clips[0], moving.clips[0]], moving.classes)


# ---- DAVIS -------------------------------------------------------------------------------------------------------


def test_davis_is_written_and_read(moving: MovingScenes, tmp_path: Path):
    write_davis(moving, tmp_path)
    read = open_dataset(tmp_path, "val")
    assert isinstance(read, Clips)
    assert read.classless
    assert read.classes == ("object",)
    assert [clip.name for clip in read.clips] == ["clip0001", "clip0002", "clip0003"]
    for index in range(len(moving)):
        assert read[index].image.equal(moving[index].image)
        assert same(read.targets(index), moving.targets(index))
        assert read.targets(index).ids.tolist() == moving.targets(index).ids.tolist()
    with pytest.raises(UsageError, match="no annotations of split 'train'"):
        open_dataset(tmp_path, "train")
    with pytest.raises(UsageError, match="has no list 'test-dev' in ImageSets; it has val"):
        read_davis(tmp_path, "test-dev")


def frames(folder: Path, count: int, size: tuple[int, int] = (8, 10)) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", size[::-1]).save(folder / f"{number:05d}.jpg")


def id_map(path: Path, values: Any, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).convert(mode).save(path)


def test_frames_without_a_map_are_not_annotated_and_void_pixels_are_no_object(tmp_path: Path):
    frames(tmp_path / "JPEGImages" / "480p" / "a", 4)
    plane = np.zeros((8, 10))
    plane[:2], plane[4:6, :5], plane[7] = 3, 200, 255
    id_map(tmp_path / "Annotations" / "480p" / "a" / "00002.png", plane, "L")
    clips = read_davis(tmp_path)
    clip = clips.clips[0]
    assert (len(clip), clip.annotated, len(clips)) == (4, (2,), 1)
    assert clip.target(2).ids.tolist() == [3, 200]
    assert clip.target(2).masks.areas().tolist() == [20, 10]
    void = clip.void(2)
    assert void is not None
    assert void.areas().tolist() == [10]
    with pytest.raises(UsageError, match="frame 0 of the clip a is not annotated"):
        clip.target(0)


def test_frames_are_ordered_by_their_numbers(tmp_path: Path):
    folder = tmp_path / "JPEGImages" / "a"
    folder.mkdir(parents=True)
    for number in (9, 10, 100):
        Image.new("RGB", (10, 8)).save(folder / f"{number}.png")
    assert [path.stem for path in read_davis(tmp_path).clips[0].paths] == ["9", "10", "100"]


def test_mistakes_in_davis_are_named(tmp_path: Path):
    images, masks = tmp_path / "JPEGImages" / "480p", tmp_path / "Annotations" / "480p"
    frames(images / "a", 2)
    id_map(masks / "a" / "00000.png", np.ones((7, 10)))
    with pytest.raises(AnnotationError, match=r"00000.png: is 10 x 7, but the frames of its clip are 10 x 8"):
        read_davis(tmp_path).targets(0)
    Image.new("RGB", (10, 8)).save(masks / "a" / "00000.png")
    with pytest.raises(AnnotationError, match="has image mode RGB; expected a palette PNG"):
        read_davis(tmp_path).targets(0)
    (masks / "a" / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(AnnotationError, match=r"00000\.png"):
        read_davis(tmp_path).targets(0)
    id_map(masks / "a" / "00007.png", np.ones((8, 10)))
    with pytest.raises(AnnotationError, match="there is no frame 00007"):
        read_davis(tmp_path)
    (masks / "a" / "00007.png").unlink()
    Image.new("RGB", (12, 8)).save(images / "a" / "00001.jpg")
    with pytest.raises(ImageError, match=r"00001.jpg: is 12 x 8, but the clip a is 10 x 8"):
        read_davis(tmp_path).clips[0].image(1)
    lists = tmp_path / "ImageSets"
    lists.mkdir()
    (lists / "val.txt").write_text("a\nb\n")
    with pytest.raises(AnnotationError, match=r"b: has no frames; add them, or remove b"):
        read_davis(tmp_path, "val")
    (lists / "val.txt").write_text("..\n")
    with pytest.raises(AnnotationError, match=r"'\.\.' is not the name of a clip"):
        read_davis(tmp_path, "val")
    (lists / "val.txt").write_text("/JPEGImages/480p/a/00000.jpg /Annotations/480p/a/00000.png\n" * 2)
    assert [clip.name for clip in read_davis(tmp_path, "val").clips] == ["a"]
    with pytest.raises(UsageError, match="no folder JPEGImages"):
        read_davis(images)


def test_a_map_of_ids_gives_overlapping_pixels_to_the_better_object(tmp_path: Path):
    planes = torch.zeros(2, 4, 6, dtype=torch.bool)
    planes[0, :3], planes[1, 1:] = True, True
    objects = Instances((4, 6), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), Masks.from_dense(planes))
    objects.ids, objects.scores = torch.tensor([9, 4]), torch.tensor([0.2, 0.9])
    write_map(tmp_path / "map.png", objects)
    assert np.asarray(Image.open(tmp_path / "map.png"))[:, 0].tolist() == [9, 4, 4, 4]
    objects.ids = torch.tensor([255, 4])
    with pytest.raises(UsageError, match=r"ids 1 ... 254, got 255"):
        write_map(tmp_path / "map.png", objects)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared clips are not on this machine")
def test_the_clips_of_davis_are_read():
    clips = open_dataset(SHARED, "full_masks")
    assert isinstance(clips, Clips)
    assert [(clip.name, len(clip), len(clip.annotated)) for clip in clips.clips] == [
        ("camel", 30, 30),
        ("libby", 40, 40),
    ]
    assert clips.clips[0].target(0).ids.tolist() == [1]
    assert clips.clips[0].image(0).shape == (3, 480, 854)
    every = read_davis(SHARED, "all")
    assert {clip.name: clip.annotated for clip in every.clips if len(clip.annotated) < 10} == {
        "bmx-trees": (0,), "judo": (0, 5, 8, 13), "bedroom": (),
    }  # fmt: skip
    assert every.clip("judo").target(13).ids.tolist() == [4]


# ---- YouTube-VIS -------------------------------------------------------------------------------------------------


def test_youtube_vis_is_written_and_read(moving: MovingScenes, tmp_path: Path):
    path = write_youtube_vis(moving, tmp_path / "val.json")
    for read in (open_dataset(path), open_dataset(tmp_path, "val"), read_youtube_vis(path)):
        assert isinstance(read, Clips)
        assert read.classes == moving.classes
        assert not read.classless
        assert [clip.name for clip in read.clips] == ["clip0001", "clip0002", "clip0003"]
        for index in range(len(moving)):
            assert same(read.targets(index), moving.targets(index))
            assert read.targets(index).labels.equal(moving.targets(index).labels)
    ids = [number for index in range(len(moving)) for number in read.targets(index).ids.tolist()]
    document = json.loads(path.read_text())
    assert sorted(set(ids)) == [entry["id"] for entry in document["annotations"]]
    with pytest.raises(ImageError, match="clip0001"):
        read.clips[0].image(0)


def document(**changes: Any) -> dict[str, Any]:
    square = [[1, 1, 4, 1, 4, 4, 1, 4]]
    return {
        "videos": [{"id": 5, "height": 8, "width": 10, "file_names": ["v/0.jpg", "v/1.jpg", "v/2.jpg"]}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {
                "id": 11, "video_id": 5, "category_id": 7, "iscrowd": 0,
                "segmentations": [square, None, {"size": [8, 10], "counts": [0, 4, 76]}],
            }
        ],
        **changes,
    }  # fmt: skip


def test_polygons_and_both_kinds_of_run_lengths_are_read(tmp_path: Path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(document()))
    clips = open_dataset(path)
    assert isinstance(clips, Clips)
    assert clips.classes == ("dog", "cat")
    assert clips.category_ids == (3, 7)
    assert [clips.targets(frame).masks.areas().tolist() for frame in range(3)] == [[9], [], [4]]
    assert clips.targets(2).ids.tolist() == [11]
    assert clips.targets(2).labels.tolist() == [1]
    path.write_text(json.dumps({key: value for key, value in document().items() if key != "annotations"}))
    clips = open_dataset(path)
    assert (len(clips), clips.clips[0].annotated, len(clips.clips[0])) == (0, (), 3)


def entry(**changes: Any) -> dict[str, Any]:
    return document(annotations=[{**document()["annotations"][0], **changes}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "contains a list"),
        (document(videos=None), "videos is missing"),
        (document(videos=[3]), "entry 0 of videos must be an object, got 3"),
        (document(videos=[{"id": 1, "height": 0, "width": 3, "file_names": ["a"]}]), "video 0 needs an id, a height"),
        (document(videos=document()["videos"] * 2), "two videos have the same id"),
        (document(videos=[{"id": 5, "height": 8, "width": 10, "file_names": ["../x.jpg"]}]), "no relative file name"),
        (document(categories=[{"id": 1}]), "category 0 needs an integer id and a name"),
        (document(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "two categories have the id 1"),
        (entry(video_id=6), "annotation 11 is of the video 6, which is not listed"),
        (entry(video_id=None), "annotation 11 is of the video None"),
        (entry(category_id=1), "annotation 11 has the category 1, which is not listed"),
        (entry(iscrowd=2), "iscrowd must be 0 or 1"),
        (entry(segmentations=[None]), "has 1 segmentations for 3 frames"),
        (entry(segmentations=None), "has no segmentations for 3 frames"),
        (entry(segmentations=[None, 3, None]), "annotation 11, frame 1: 3 is neither"),
        (entry(segmentations=[None, {"size": [8, 9], "counts": "x"}, None]), "annotation 11, frame 1: mask 0 is 8 x 9"),
        (entry(segmentations=[None, [[1, 1, 2]], None]), "annotation 11, frame 1"),
    ],
)
def test_mistakes_in_youtube_vis_are_named(content: Any, message: str, tmp_path: Path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=message) as caught:
        read_youtube_vis(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_written_is_named(moving: MovingScenes, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_youtube_vis(moving, tmp_path / "file" / "set.json")
