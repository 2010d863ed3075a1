"""Dividing data sets, near-duplicates, and conversion of splits."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from maskwright.data import DataWarning, open_dataset
from maskwright.data.convert import convert_data
from maskwright.data.splitting import divided, near_duplicates, share_or_source, stratified
from maskwright.errors import UsageError
from maskwright.structures import Masks
from tests.data.test_round_trips import LEFT, RIGHT, SIZE, Drawn, made


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(4))
def test_every_class_has_the_same_share_on_both_sides(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = [np.sort(random.choice(5, random.integers(0, 6), p=[0.6, 0.2, 0.1, 0.07, 0.03])) for _ in range(300)]
    held_out = stratified(labels, 5, 0.2, seed)
    assert len(held_out) == 60
    whole = np.bincount(np.concatenate(labels), minlength=5)
    part = np.bincount(np.concatenate([labels[i] for i in held_out]), minlength=5)
    assert np.abs(part / whole - 0.2).max() < 0.08
    assert held_out == stratified(labels, 5, 0.2, seed)
    assert held_out != stratified(labels, 5, 0.2, seed + 1)


@pytest.mark.fast
def test_a_rare_class_is_on_both_sides() -> None:
    labels = [np.array([0])] * 18 + [np.array([0, 1])] * 2
    held_out = stratified(labels, 2, 0.5, 0)
    assert len(held_out) == 10
    assert sum(1 in labels[i] for i in held_out) == 1


def picture(seed: int, size: tuple[int, int] = (36, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def pictures(folder: Path, images: list[Image.Image], suffix: str = ".png") -> Drawn:
    dataset = Drawn(folder, [made(Masks.from_polygons([[LEFT]], SIZE), [n % 2]) for n in range(len(images))])
    for path, image in zip(dataset.paths(), images, strict=True):
        image.save(path)  # type: ignore[arg-type]
    return dataset


def test_near_duplicates_are_found_after_scaling_compression_and_brightening(tmp_path: Path) -> None:
    train = pictures(tmp_path / "a", [picture(n) for n in range(6)])
    changed = [
        picture(0).resize((200, 150), Image.Resampling.BICUBIC),
        picture(1).point(lambda v: min(255, int(v * 0.8 + 30))),
        picture(2).filter(ImageFilter.GaussianBlur(1)),
        picture(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        picture(77),
        Image.new("RGB", (36, 24), (3, 3, 3)),
    ]
    val = pictures(tmp_path / "b", changed)
    pairs = [(one.name, two.name) for one, two in near_duplicates(train, val)]
    assert pairs == [(f"image {n}.png", f"image {n}.png") for n in range(3)]


def test_a_division_names_duplicates_across_it(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "a", [picture(n // 2) for n in range(12)])
    with pytest.warns(DataWarning, match=r"images for validation are nearly the same as images for training: 'image "):
        train, val = divided(dataset, 0.5, 1)
    assert (len(train), len(val)) == (6, 6)
    assert set(train.image_ids()) | set(val.image_ids()) == set(range(1, 13))


@pytest.mark.fast
def test_a_share_must_be_one(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "a", [picture(0), picture(1)])
    for share in (0.0, 1.0, 20.0):
        with pytest.raises(UsageError, match="must be between 0 and 1"):
            divided(dataset, share)
    assert share_or_source("0.25") == 0.25
    assert share_or_source("20%") == 0.2
    assert share_or_source("some/folder") == "some/folder"


@pytest.mark.parametrize("to", ["coco", "yolo", "labelme", "via", "cvat", "voc", "label-maps"])
def test_splits_are_written_and_found_again(tmp_path: Path, to: str) -> None:
    dataset = pictures(tmp_path / "a", [picture(n) for n in range(8)])
    result = convert_data(dataset, tmp_path / "out", to, val=0.25)
    assert result.counts == [("train", 6, 6), ("val", 2, 2)]
    train, val = (open_dataset(tmp_path / "out", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 2)
    assert train.classes == val.classes == dataset.classes
    again = convert_data(tmp_path / "out", tmp_path / "again", "coco")
    assert again.counts == [("train", 6, 6), ("val", 2, 2)]


def test_another_data_set_becomes_the_split_for_validation(tmp_path: Path) -> None:
    one, two = (pictures(tmp_path / name, [picture(n + 5 * k) for n in range(3)]) for k, name in enumerate("ab"))
    convert_data(one, tmp_path / "one", "labelme")
    convert_data(two, tmp_path / "two", "cvat")
    result = convert_data(tmp_path / "one", tmp_path / "out", "yolo", val=tmp_path / "two")
    assert result.counts == [("train", 3, 3), ("val", 3, 3)]


def test_generated_scenes_are_written_with_their_pixels(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        convert_data("scenes:count=3,size=64", tmp_path / "out", "yolo", allow_loss=True)
        scenes, written = open_dataset("scenes:count=3,size=64"), open_dataset(tmp_path / "out")
    assert bool((scenes[1].image == written[1].image).all())
    assert len(written.targets(1)) == len(scenes.targets(1))


def test_nothing_is_left_of_a_data_set_that_cannot_be_written(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "a", [picture(n) for n in range(3)])
    dataset.paths()[2].unlink()  # type: ignore[union-attr]
    from maskwright.errors import DataError

    with pytest.raises(DataError, match=r"image 2\.png: no such image; restore it"):
        convert_data(dataset, tmp_path / "out", "voc")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "full").mkdir()
    with pytest.raises(UsageError, match="exists already; give a new folder"):
        convert_data(dataset, tmp_path / "full", "voc")


def test_names_that_differ_in_suffix_only_are_told_apart(tmp_path: Path) -> None:
    dataset = Drawn(tmp_path / "a", [made(Masks.from_polygons([[ring]], SIZE), [0]) for ring in (LEFT, RIGHT)])
    paths = dataset.paths()
    Image.open(paths[1]).save(tmp_path / "a" / "image 0.bmp")  # type: ignore[arg-type]
    dataset._paths[1] = tmp_path / "a" / "image 0.bmp"
    for to in ("yolo", "labelme", "voc", "label-maps"):
        result = convert_data(dataset, tmp_path / to, to)
        assert result.renamed == [("image 0.bmp", "image 0-2.bmp")]
        back = open_dataset(tmp_path / to)
        areas = sorted(int(back.targets(i).masks.areas()[0]) for i in range(2))  # type: ignore[union-attr]
        assert areas == [63, 216], to


def test_predictions_go_back_to_a_labelling_tool(tmp_path: Path) -> None:
    import json

    dataset = pictures(tmp_path / "a", [picture(n) for n in range(2)])
    masks = Masks.from_polygons([[LEFT], [RIGHT]], SIZE).rle()
    results = [
        {"image_id": 1, "category_id": 2, "score": 0.75, "bbox": [2, 2, 12, 18],
         "segmentation": {"size": list(SIZE), "counts": mask["counts"].decode()}}
        for mask in masks
    ]  # fmt: skip
    images = [{"id": n + 1, "file_name": str(p), "height": 24, "width": 36} for n, p in enumerate(dataset.paths())]
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(dataset.classes)]
    for path in dataset.paths():
        Image.new("RGB", (36, 24), (200, 10, 60)).save(path)  # type: ignore[arg-type]
    found = tmp_path / "found"
    found.mkdir()
    (found / "results.json").write_text(json.dumps(results))
    (found / "pictures.json").write_text(json.dumps({"images": images, "categories": categories}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        convert_data(found / "results.json", tmp_path / "labelme", "labelme")
        convert_data(found, tmp_path / "cvat", "cvat")
    shapes = json.loads((tmp_path / "labelme" / "image 0.json").read_text("utf-8"))["shapes"]
    assert [(s["label"], s["score"]) for s in shapes] == [("person", 0.75)] * 2
    text = (tmp_path / "cvat" / "annotations.xml").read_text("utf-8")
    assert text.count('<attribute name="score">0.75</attribute>') == 2
    # Names that lead elsewhere are not opened.
    images[0]["file_name"] = "/etc/passwd"
    (found / "pictures.json").write_text(json.dumps({"images": images, "categories": categories}))
    from maskwright.errors import AnnotationError

    with pytest.raises(AnnotationError, match="is outside the image folder"):
        convert_data(found, tmp_path / "other", "cvat")
