"""The files that `predict` writes."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from maskwright.errors import DataError, ImageError
from maskwright.evaluation.tasks import task_called
from maskwright.inference.writer import PredictionWriter
from maskwright.structures import Instances, Masks, Panoptic

pytestmark = pytest.mark.fast

CLASSES = ("cat", "dög")


def found(size=(20, 30)) -> Instances:
    """Two overlapping rectangles and a third one elsewhere, best first."""
    boxes = torch.tensor([[2.0, 2, 12, 12], [6, 6, 20, 18], [22, 1, 29, 9]])
    planes = torch.zeros(3, *size, dtype=torch.bool)
    for plane, (x0, y0, x1, y1) in zip(planes, boxes.long().tolist(), strict=True):
        plane[y0:y1, x0:x1] = True
    masks = Masks("dense", planes, size)
    return Instances(size, boxes, torch.tensor([1, 0, 1]), masks, torch.tensor([0.9, 0.8, 0.7]))


@pytest.fixture
def image(tmp_path):
    def make(name: str, size=(20, 30)):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size[1], size[0]), (90, 120, 150)).save(path)
        return path

    return make


def test_the_three_kinds(image, tmp_path):
    path = image("a.png")
    writer = PredictionWriter(tmp_path / "out", ("drawn", "coco", "masks"), CLASSES, [path])
    writer.add(path, found())
    writer.close()

    drawn = Image.open(tmp_path / "out/drawn/a.jpg")
    assert drawn.size == (30, 20)
    assert np.asarray(drawn).std() > 5, "something is drawn on the plain image"

    numbers = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    assert numbers.dtype == np.uint16
    planes = found().masks.dense().numpy()
    assert (numbers[planes[0]] == 1).all(), "the best object lies on top"
    assert (numbers[planes[1] & ~planes[0]] == 2).all()
    assert (numbers[planes[2]] == 3).all()
    assert (numbers[~planes.any(0)] == 0).all()

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [r["category_id"] for r in results] == [2, 1, 2]
    assert results[0]["bbox"] == [2, 2, 10, 10]
    assert [round(r["score"], 4) for r in results] == [0.9, 0.8, 0.7]
    decoded = coco.decode([r["segmentation"] for r in results]).transpose(2, 0, 1).astype(bool)
    assert (decoded == planes).all(), "overlaps are whole in the COCO results"
    about = json.loads((tmp_path / "out/pictures.json").read_text())
    assert about["images"] == [{"id": 1, "file_name": str(path), "height": 20, "width": 30}]
    assert about["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dög"}]


def test_only_the_requested_kinds_are_written(image, tmp_path):
    path = image("a.png")
    writer = PredictionWriter(tmp_path / "out", ("masks",), CLASSES, [path])
    writer.add(path, found())
    writer.close()
    files = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert files == ["masks/a.png"]


def test_an_image_without_objects_is_written_too(image, tmp_path):
    path = image("empty.png")
    writer = PredictionWriter(tmp_path / "out", ("drawn", "coco", "masks"), CLASSES, [path])
    writer.add(path, Instances.empty((20, 30)))
    writer.close()
    assert not np.asarray(Image.open(tmp_path / "out/masks/empty.png")).any()
    assert json.loads((tmp_path / "out/results.json").read_text()) == []
    assert len(json.loads((tmp_path / "out/pictures.json").read_text())["images"]) == 1


def test_names_do_not_collide_and_do_not_leave_the_folder(image, tmp_path):
    paths = [image(name) for name in ("x/a.png", "y/a.png", "x/a.jpg", "x/deep/a.png")]
    writer = PredictionWriter(tmp_path / "out", ("masks",), CLASSES, [tmp_path / "in/x", tmp_path / "in/y/*.png"])
    for path in paths:
        writer.add(path, found())
    names = sorted(p.relative_to(tmp_path / "out/masks").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert names == ["a.jpg.png", "a.png", "a.png.png", "deep/a.png"]
    writer.add(paths[0], found())
    assert (tmp_path / "out/masks/a-2.png").exists(), "an image named twice is written twice"


def test_a_skipped_image_is_remembered(tmp_path):
    writer = PredictionWriter(tmp_path / "out", ("drawn", "coco"), CLASSES)
    writer.add("bad.jpg", None, ImageError("bad.jpg: cannot be decoded"))
    writer.close()
    assert writer.skipped == [("bad.jpg", "bad.jpg: cannot be decoded")]
    assert writer.images == []


def test_a_full_disk_leaves_nothing_half_written(image, tmp_path, monkeypatch):
    from pathlib import Path

    path = image("a.png")
    writer = PredictionWriter(tmp_path / "out", ("masks",), CLASSES, [path])

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match=r"a\.png: cannot be written: the disk is full"):
        writer.add(path, found())
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(("task", "values"), [("panoptic", {0, 1, 2}), ("semantic", {0, 1, 2})])
def test_segments_are_written_as_coco_panoptic(image, tmp_path, task, values):
    path = image("a.png")
    labels = torch.full((20, 30), -1)
    labels[:10], labels[10:15] = 0, 1
    writer = PredictionWriter(tmp_path / "out", ("coco", "masks"), CLASSES, [path], CLASSES, task_called(task))
    writer.add(path, Panoptic.from_semantic(labels))
    writer.close()
    document = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert document["images"] == [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}]
    assert [c["isthing"] for c in document["categories"]] == [0, 0]
    assert {s["category_id"] for s in document["annotations"][0]["segments_info"]} == {1, 2}
    numbers = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    assert set(np.unique(numbers).tolist()) == values
    assert not (tmp_path / "out/results.json").exists()


def test_a_run_without_predictions_writes_empty_documents(tmp_path):
    for task, name in (("instances", "results.json"), ("panoptic", "panoptic.json")):
        writer = PredictionWriter(tmp_path / task, ("coco",), CLASSES, task=task_called(task))
        writer.add("bad.jpg", None, ImageError("bad.jpg: cannot be decoded"))
        writer.close()
        content = json.loads((tmp_path / task / name).read_text())
        assert (content if task == "instances" else content["annotations"]) == []
