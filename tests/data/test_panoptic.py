"""COCO panoptic data sets: reading, messages about damage, writing and reading back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning, Scenes, check, open_dataset, read_panoptic, things_only
from maskwright.errors import AnnotationError, UsageError
from maskwright.structures.panoptic import colours_to_ids, ids_to_colours
from tests.data.making import pixels, shared

pytestmark = pytest.mark.fast


def small_set(folder: Path, split: str = "val") -> Path:
    """Two images of 40 x 60: sky (id 70,000), two cups (1 and 300) and an unlabelled corner."""
    plane = np.full((40, 60), 70_000, np.int32)
    plane[10:30, 5:25], plane[10:30, 30:50], plane[:4, :4] = 1, 300, 0
    images, records = [], []
    maps = folder / "annotations" / f"panoptic_{split}"
    maps.mkdir(parents=True)
    (folder / split).mkdir()
    for number in (1, 2):
        Image.fromarray(pixels(seed=number)).save(folder / split / f"{number}.png")
        Image.fromarray(ids_to_colours(plane)).save(maps / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 60})
        segments = [
            {"id": 70_000, "category_id": 90, "iscrowd": 0},
            {"id": 1, "category_id": 3, "iscrowd": 0},
            {"id": 300, "category_id": 3, "iscrowd": 1},
        ]
        records.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    categories = [{"id": 3, "name": "cup", "isthing": 1}, {"id": 90, "name": "sky", "isthing": 0}]
    path = folder / "annotations" / f"panoptic_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": records, "categories": categories}))
    return path


def changed(path: Path, change) -> Path:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_things_and_stuff_are_read(tmp_path: Path):
    small_set(tmp_path)
    dataset = open_dataset(tmp_path, "val", strict=True)
    assert (dataset.classes, dataset.stuff, dataset.category_ids) == (("cup", "sky"), ("sky",), (3, 90))
    target = dataset.targets(1)
    assert target.ids is not None
    assert target.ids.tolist() == [70_000, 1, 300]
    assert target.labels.tolist() == [1, 0, 0]
    assert target.crowd is not None
    assert target.crowd.tolist() == [False, False, True]
    panoptic = dataset.panoptic(1)
    assert panoptic.things.tolist() == [False, True, True]
    assert int((panoptic.map() == 0).sum()) == 16
    assert dataset[0].image.shape == (3, 40, 60)
    things = things_only(dataset)
    assert (things.classes, things.category_ids) == (("cup",), (3,))
    assert things.targets(0).labels.tolist() == [0, 0]
    assert things_only(things) is things


def remove(path: Path) -> None:
    path.unlink()


def other_size(path: Path) -> None:
    Image.fromarray(np.zeros((20, 60, 3), np.uint8)).save(path)


def grey(path: Path) -> None:
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(path)


def jpeg(path: Path) -> None:
    with Image.open(path) as image:
        image.save(path, "JPEG")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, r"1 of 2 maps of segments are not in .*panoptic_val: '2.png'; put the PNGs there"),
        (other_size, r"2.png is 60 x 20, but its image is 60 x 40; restore the map"),
        (jpeg, r"2.png: was saved as JPEG, which changes the segment ids"),
        (grey, r"2.png: has image mode L; a map of segments must be an RGB PNG"),
    ],
)
def test_an_invalid_map_is_an_error(tmp_path: Path, damage, words: str):
    path = small_set(tmp_path)
    damage(path.with_suffix("") / "2.png")
    with pytest.raises(AnnotationError, match=words):
        read_panoptic(path)
    assert not check(tmp_path).ok


@pytest.mark.parametrize(
    ("order", "words"), [((2, 1, 0), "with red and blue exchanged they are"), ((1, 1, 1), "none of")]
)
def test_maps_of_other_ids_are_one_error(tmp_path: Path, order: tuple[int, int, int], words: str):
    path = small_set(tmp_path)
    for file in path.with_suffix("").glob("*.png"):
        with Image.open(file) as image:
            pixels = np.asarray(image)
        other = pixels[:, :, list(order)] if order == (2, 1, 0) else np.where(pixels > 0, 77, pixels).astype(np.uint8)
        Image.fromarray(np.ascontiguousarray(other)).save(file)
    with pytest.raises(AnnotationError, match=words) as caught:
        read_panoptic(path)
    assert str(caught.value).count("none of the listed segments is in the maps (2 were read)") == 1


def test_a_truncated_map_is_an_error(tmp_path: Path):
    path = small_set(tmp_path)
    cut(path.with_suffix("") / "2.png")
    with pytest.raises(AnnotationError, match=r"2\.png"):
        read_panoptic(path, strict=True)


def test_an_empty_map_and_a_file_without_records_are_errors(tmp_path: Path):
    path = small_set(tmp_path)
    (path.with_suffix("") / "2.png").write_bytes(b"")
    with pytest.raises(AnnotationError, match=r"2\.png.* is empty \(0 bytes\)"):
        read_panoptic(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(AnnotationError, match="none of its images has a list of segments"):
        read_panoptic(path)


def test_maps_have_the_size_limit_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = small_set(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit
    assert len(read_panoptic(path, strict=True)) == 2


SKIPS = {
    "a segment without pixels": (
        lambda d: d["annotations"][0]["segments_info"].append({"id": 9, "category_id": 3}),
        r"segments 9 of image 1 have no pixels in .*1.png",
    ),
    "pixels without a segment": (
        lambda d: d["annotations"][0]["segments_info"].pop(1),
        r"400 pixels of .*1.png have ids that are not listed for image 1: 1",
    ),
    "an unknown category": (
        lambda d: d["annotations"][0]["segments_info"][0].update(category_id=7),
        r"segment 70000 of image 1 has category_id 7, which is not in the list",
    ),
    "an id above 24 bits": (
        lambda d: d["annotations"][0]["segments_info"][0].update(id=2**24),
        r"segment 0 of image 1 has id 16777216; expected 1 ... 16777215",
    ),
    "an id used twice": (
        lambda d: d["annotations"][0]["segments_info"][0].update(id=1),
        r"two segments of image 1 share id 1; the first one gets all its pixels",
    ),
    "no record": (lambda d: d["annotations"].pop(1), r"1 of 2 images have no list of segments: 2"),
    "no segments": (
        lambda d: d["annotations"][0].pop("segments_info"),
        r"annotations\[0\] has no list 'segments_info'",
    ),
}


@pytest.mark.parametrize("name", SKIPS)
def test_a_damaged_record_is_skipped_with_a_message(tmp_path: Path, name: str):
    change, words = SKIPS[name]
    path = changed(small_set(tmp_path), change)
    with pytest.raises(AnnotationError, match=words):
        read_panoptic(path, strict=True)
    with pytest.warns(DataWarning, match=words):
        dataset = read_panoptic(path)
    for index in range(len(dataset)):
        masks = dataset.targets(index).masks
        assert masks is not None
        assert bool((masks.areas() > 0).all())
    with pytest.warns(DataWarning, match=words):
        assert len(open_dataset(tmp_path, "val")) == len(dataset)


def test_an_unusable_file_is_an_error(tmp_path: Path):
    path = changed(small_set(tmp_path), lambda d: d["categories"][1].pop("isthing"))
    with pytest.raises(AnnotationError, match=r"category 90 \('sky'\) has isthing None; expected 1"):
        read_panoptic(path)
    path = changed(small_set(tmp_path / "b"), lambda d: d["annotations"][0].update(file_name="../x.png"))
    with pytest.raises(AnnotationError, match=r"has file name '../x.png'; expected the name of a PNG inside"):
        read_panoptic(path)
    path = changed(small_set(tmp_path / "c"), lambda d: d["annotations"][0].update(image_id=2))
    with pytest.raises(AnnotationError, match="image 2 has two records"):
        read_panoptic(path)
    with pytest.raises(UsageError, match="no such folder of maps"):
        read_panoptic(path, maps=tmp_path / "none")


def test_a_panoptic_file_with_another_name_is_recognized(tmp_path: Path):
    path = small_set(tmp_path)
    path.rename(path.with_name("instances_val.json"))
    with pytest.raises(AnnotationError, match=r"COCO panoptic.*read_panoptic"):
        open_dataset(tmp_path, "val")


def test_the_repaired_copy_can_be_read_in_strict_mode(tmp_path: Path):
    def change(data) -> None:
        for name in ("a segment without pixels", "pixels without a segment"):
            SKIPS[name][0](data)

    changed(small_set(tmp_path / "set"), change)
    report = check(tmp_path / "set", tmp_path / "copy")
    assert len(report.skips) == 2
    assert report.fixed == tmp_path / "copy"
    copy = open_dataset(tmp_path / "copy", "val", strict=True)
    ids = copy.targets(0).ids
    assert ids is not None
    assert ids.tolist() == [70_000, 300]
    assert check(tmp_path / "copy", split="val").ok
    assert not check(tmp_path / "copy").ok, "there is no split to train on"
    plane = colours_to_ids(np.asarray(Image.open(tmp_path / "copy/annotations/panoptic_val/1.png")))
    assert set(np.unique(plane).tolist()) == {0, 300, 70_000}


def test_maps_with_the_same_name_in_two_folders(tmp_path: Path):
    def change(data) -> None:
        for number, record in enumerate(data["annotations"], 1):
            record["file_name"] = f"{number}/map.png"
        data["annotations"][1]["segments_info"].pop()

    path = changed(small_set(tmp_path / "set"), change)
    for number in (1, 2):
        target = path.with_suffix("") / str(number) / "map.png"
        target.parent.mkdir()
        (path.with_suffix("") / f"{number}.png").rename(target)
    check(tmp_path / "set", tmp_path / "copy")
    copy = open_dataset(tmp_path / "copy", "val", strict=True)
    assert [len(copy.targets(index)) for index in range(2)] == [3, 2]


@pytest.mark.thorough
def test_scenes_with_stuff_label_every_pixel_and_are_read_back_exactly(tmp_path: Path):
    scenes = Scenes(3, (48, 64), seed=4, stuff=True)
    assert scenes.stuff == scenes.classes[-4:]
    for index in range(3):
        assert bool((scenes.panoptic(index).map() > 0).all())
        regions = scenes.targets(index).labels[~scenes.panoptic(index).things]
        assert len(regions.unique()) == len(regions) > 0, "one region per class"
    scenes.write(tmp_path, "val")
    dataset = open_dataset(tmp_path, "val", strict=True)
    assert (dataset.classes, dataset.stuff) == (scenes.classes, scenes.stuff)
    for index in range(3):
        assert torch.equal(dataset[index].image, scenes[index].image)
        assert torch.equal(dataset.panoptic(index).semantic(), scenes.panoptic(index).semantic())
    named = open_dataset("scenes:count=2,size=48,stuff=1", "val")
    assert len(named.stuff) == 4
    with pytest.raises(UsageError, match="either figures with keypoints or a background of stuff"):
        Scenes(1, keypoints=True, stuff=True)


def test_scenes_without_stuff_are_what_they_were():
    plain, divided = Scenes(2, (48, 48), empty=0.0), Scenes(2, (48, 48), empty=0.0, stuff=True)
    assert plain.stuff == ()
    count = len(plain.targets(0))
    assert torch.equal(plain.targets(0).boxes, divided.targets(0).boxes[:count])


def test_the_genuine_set_is_whole():
    dataset = open_dataset(shared("coco-panoptic"), "val", strict=True)
    assert (len(dataset), len(dataset.classes), len(dataset.stuff)) == (2, 133, 53)
    assert [len(dataset.targets(i)) for i in range(2)] == [18, 32]
    raw = json.loads((shared("coco-panoptic") / "annotations/panoptic_val.json").read_text())
    for index, record in enumerate(raw["annotations"]):
        ours = dataset.panoptic(index).to_coco(record["image_id"], dataset.category_ids, record["file_name"])
        for mine, theirs in zip(ours["segments_info"], record["segments_info"], strict=True):
            assert {k: mine[k] for k in theirs} == theirs
