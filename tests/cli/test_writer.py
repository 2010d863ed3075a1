"""The files that `predict` writes."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from maskwright.errors import DataError, ImageError, UsageError
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


@pytest.mark.thorough
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


@pytest.mark.parametrize("kinds", [("masks",), ("coco",), ("drawn", "labels")])
def test_masks_of_a_data_set_are_not_replaced(kinds, image, tmp_path):
    path = image("a.png")
    theirs = tmp_path / "in" / "masks" / "a.png"
    theirs.parent.mkdir()
    Image.new("L", (30, 20), 7).save(theirs)
    before = theirs.read_bytes()
    for _ in range(2):  # what an earlier run has written is replaced
        with PredictionWriter(tmp_path / "out", (*kinds, "masks"), CLASSES, [path]) as writer:
            writer.add(path, found())
    with PredictionWriter(tmp_path / "in", kinds, CLASSES, [path]) as writer:
        if "masks" in kinds:
            with pytest.raises(
                DataError, match=r"in/masks/a\.png exists and was not written by .*another output folder"
            ):
                writer.add(path, found())
        else:
            writer.add(path, found())
    assert theirs.read_bytes() == before


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
    with pytest.raises(DataError, match=r"a\.png: cannot be written: the disk is full"), writer:
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


def read(path):
    return json.loads(path.read_text())


def broken_off(writer, pairs, error=KeyboardInterrupt):
    with writer:
        for path, objects in pairs:
            writer.add(path, objects)
        raise error


def test_an_interrupted_run_leaves_earlier_results_whole_and_keeps_its_own_apart(image, tmp_path):
    paths, out = [image(f"{k}.png") for k in range(3)], tmp_path / "out"
    with PredictionWriter(out, ("coco", "masks"), CLASSES, paths) as writer:
        for path in paths:
            writer.add(path, found())
    before = {name: (out / name).read_bytes() for name in ("results.json", "pictures.json")}
    with pytest.raises(KeyboardInterrupt) as stop:
        broken_off(PredictionWriter(out, ("coco",), ("other", "names"), paths, total=3), [(paths[2], found())])
    assert str(stop.value) == (
        f"interrupted: 1 of 3 images are complete, their results are in {out}/results.partial.json; "
        f"{out}/results.json of an earlier run is unchanged"
    )
    assert {name: (out / name).read_bytes() for name in before} == before
    assert len(read(out / "results.partial.json")) == 3
    about = read(out / "pictures.partial.json")
    assert [entry["file_name"] for entry in about["images"]] == [str(paths[2])]
    assert [c["name"] for c in about["categories"]] == ["other", "names"]
    # A run that ends replaces both.
    with PredictionWriter(out, ("coco",), CLASSES, paths) as writer:
        writer.add(paths[0], found())
    assert sorted(p.name for p in out.iterdir()) == ["masks", "pictures.json", "results.json"]
    assert len(read(out / "results.json")) == 3


def test_an_error_does_not_pass_for_a_complete_run(image, tmp_path):
    path, out = image("a.png"), tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        broken_off(PredictionWriter(out, ("coco",), CLASSES, [path]), [(path, found())], ZeroDivisionError)
    assert sorted(p.name for p in out.iterdir()) == ["pictures.partial.json", "results.partial.json"]
    with pytest.raises(KeyboardInterrupt, match="0 images are complete"):
        broken_off(PredictionWriter(out, ("coco",), CLASSES), [])


def test_an_interrupted_run_of_segments(image, tmp_path):
    path, out = image("a.png"), tmp_path / "out"
    panoptic = Panoptic(found()[:1], torch.tensor([True]))
    with pytest.raises(KeyboardInterrupt):
        broken_off(PredictionWriter(out, ("coco",), CLASSES, [path], task=task_called("panoptic")), [(path, panoptic)])
    assert not (out / "panoptic.json").exists()
    assert len(read(out / "panoptic.partial.json")["annotations"]) == 1


def test_one_run_at_a_time_has_the_folder(image, tmp_path):
    import os

    first = PredictionWriter(tmp_path, ("coco",), CLASSES)
    with pytest.raises(UsageError, match=rf"another process writes predictions here: process {os.getpid()} on"):
        PredictionWriter(tmp_path, ("masks",), CLASSES)
    first.close()
    PredictionWriter(tmp_path, ("masks",), CLASSES).close()


def test_temporary_files_of_killed_runs_are_removed(image, tmp_path):
    from maskwright.files import _HOST

    dead = f".a.png.{2**22 + 1}.{_HOST}01234567.part"
    for folder in ("", "drawn", "masks/deep", "panoptic"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / dead).touch()
        (tmp_path / folder / "mine.part").touch()
    PredictionWriter(tmp_path, ("masks",), CLASSES).close()
    assert {p.name for p in tmp_path.rglob("*.part")} == {"mine.part"}


def test_files_of_an_earlier_run_are_listed(image, tmp_path):
    out, paths = tmp_path / "out", [image("sub/A.png"), image("b.png")]
    with PredictionWriter(out, ("drawn", "coco", "masks"), CLASSES, [tmp_path / "in"]) as writer:
        for path in paths:
            writer.add(path, found())
    assert writer.others() == []
    with PredictionWriter(out, ("drawn", "coco", "masks"), CLASSES, [tmp_path / "in"]) as writer:
        for path in paths:
            writer.add(path, found())
    assert writer.others() == []  # all replaced
    with PredictionWriter(out, ("drawn",), CLASSES, [tmp_path / "in"]) as writer:
        writer.add(paths[1], found())
    expected = ["drawn/sub/A.jpg", "masks/b.png", "masks/sub/A.png", "pictures.json", "results.json"]
    assert writer.others() == expected
    assert all((out / name).is_file() for name in expected)
