"""Exports of annotations: formats, losses, provenance, and what was imported."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("websockets", reason="needs the extra web")
pytest.importorskip("uvicorn", reason="needs the extra web")

from maskwright.data import open_dataset
from maskwright.data.convert import convert_data, writable_formats
from maskwright.errors import UsageError
from maskwright.web.annotating import AnnotationServer
from maskwright.web.datasets import open_source
from maskwright.web.exporting import LossyError, export
from maskwright.web.project import Project
from tests.web.photos import SIZE, add, drawn, photos, rle, serving
from tests.web.test_project import coco, opened, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos")


def test_every_format_that_can_be_written_is_read_again(folder):
    with opened(folder) as project:
        saved(project, 0, add("a", 5), add("b", 40, label=1))
        saved(project, 2, {"do": "done", "value": True})
        for format in writable_formats():
            allow = format == "cityscapes"  # which has no cats and dogs
            found = export(project, format, allow_loss=allow)
            assert found.path == project.folder / "exports" / f"{format}-1"
            assert found.images == 2  # with objects, or done
            assert bool(found.losses) is allow
            if allow:
                continue
            dataset = open_dataset(found.path, format=format)
            assert len(dataset) == 2
            sizes = sorted(len(dataset.targets(n)) for n in range(2))
            assert sizes == [0, 2]
            target = max((dataset.targets(n) for n in range(2)), key=len)
            assert target.masks is not None
            assert target.masks.areas().tolist() == [100, 100]
            assert sorted(dataset.classes[label] for label in target.labels) == ["cat", "dog"]
        assert export(project, "coco").path.name == "coco-2"


def test_a_format_that_cannot_hold_everything_is_not_written_unless_told_to(folder):
    with serving(AnnotationServer(opened(folder))) as page, page.live() as live:
        assert page.ask("POST", "/api/export", {"format": "coco"})[0] == 400
        live.edit(0, add("a", 5), add("b", 9), add("c", 60, label=None))
        status, _, body = page.ask("POST", "/api/export", {"format": "voc"})
        assert status == 409
        losses = json.loads(body)["losses"]
        assert losses[0] == "1 of 3 objects (without a class): they are left out"
        assert "covered by others in part" in losses[1]
        assert not (folder / ".maskwright" / "exports").exists()
        status, _, body = page.ask("POST", "/api/export", {"format": "voc", "allow_loss": True})
        found = json.loads(body)
        assert (status, found["images"], found["objects"]) == (200, 1, 2)
        assert len(found["losses"]) == 2
        for value in ({"format": "../../x"}, {"format": None}, {}, {"format": "coco", "allow_loss": "yes"}):
            assert page.ask("POST", "/api/export", value)[0] == 400
    dataset = open_dataset(found["path"])
    assert sorted(dataset.targets(0).masks.areas().tolist()) == [40, 100]  # as was said


def test_who_made_what_is_exported(folder):
    (folder / "=cmd.png").write_bytes((folder / "photo-1.png").read_bytes())
    steps = [{"by": "ann", "how": "click", "clicks": 3}, {"by": "sam", "how": "propagated", "clicks": 0}]
    with opened(folder) as project:
        index = next(n for n in range(4) if project.source.key(n) == "=cmd.png")
        saved(project, index, {"do": "add", "object": {**drawn("a"), "made": steps, "track": 4}})
        place = export(project, "coco").path
    document = json.loads((place / "annotations" / "instances_default.json").read_bytes())
    assert document["annotations"][0]["made"] == steps
    assert document["annotations"][0]["track_id"] == 4
    with (place / "made.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["object"], row["class"], row["how"], row["clicks"]) for row in rows] == [
        ("'=cmd.png", "a", "cat", "click", "3"), ("'=cmd.png", "a", "cat", "propagated", "0"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (place / "made.jsonl").read_text().splitlines()]
    assert lines[0]["image"] == "=cmd.png"
    assert lines[0]["made"] == steps
    assert lines[0]["annotation"] == document["annotations"][0]["id"]


def test_annotations_that_nobody_has_changed_are_exported_as_they_were(tmp_path):
    folder = coco(tmp_path / "set")
    before = convert_data(folder, tmp_path / "before", "coco").folder / "annotations" / "person_keypoints_train.json"
    with opened(folder, classes=()) as project:
        same = export(project, "coco").path / "annotations" / "person_keypoints_train.json"
        expected, found = json.loads(before.read_bytes()), json.loads(same.read_bytes())
        for one in found["annotations"]:
            assert one.pop("made") == [{"by": "COCO", "how": "import", "clicks": 0}]
        assert found == expected
        saved(project, 0, {"do": "replace", "id": "12", "was": 0, "object": drawn("12", 30)}, add("new", 60))
        changed = export(project, "coco").path / "annotations" / "person_keypoints_train.json"
    records = {one["id"]: one for one in json.loads(changed.read_bytes())["annotations"]}
    originals = {one["id"]: one for one in expected["annotations"]}
    assert set(records) == {30, 12, 99, 100}  # the new one follows the largest id of the data set
    triangle = {**originals[30]}
    assert records[30]["bbox"] == triangle["bbox"]
    assert records[30]["keypoints"] == triangle["keypoints"]
    assert (records[12]["iscrowd"], records[12]["category_id"]) == (1, 3)
    assert records[12]["segmentation"] == rle(30, 5, 40, 15)
    assert (records[100]["iscrowd"], records[100]["area"], records[100]["num_keypoints"]) == (0, 100.0, 0)
    assert records[99]["segmentation"] == originals[99]["segmentation"]


@pytest.mark.filterwarnings("ignore:.*but no masks")
def test_boxes_beside_masks_are_announced(tmp_path):
    photos(tmp_path / "set" / "images", 2)
    labels = tmp_path / "set" / "labels"
    labels.mkdir()
    for n in (1, 2):
        (labels / f"photo-{n}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "set" / "data.yaml").write_text("path: .\ntrain: images\nnames: [cat]\n")
    with opened(tmp_path / "set", classes=()) as project:
        shown = project.state(0).objects
        box = next(iter(shown.values()))
        assert box.public(SIZE)["box_only"] is True
        assert box.counts == rle(30, 15, 50, 45)["counts"]
        saved(project, 0, {"do": "done", "value": True})
        assert open_dataset(export(project, "coco").path).targets(0).masks is None  # still boxes
        saved(project, 0, add("mask", 5))
        with pytest.raises(LossyError, match=r"boxes without masks, beside objects with masks\): they are filled"):
            export(project, "coco")
        written = open_dataset(export(project, "coco", allow_loss=True).path)
        assert sorted(written.targets(0).masks.areas().tolist()) == [100, 600]


@pytest.mark.fast
def test_without_annotations_there_is_nothing_to_export(folder):
    with opened(folder) as project, pytest.raises(UsageError, match="nothing to export yet"):
        export(project, "coco")


def test_without_classes_objects_are_of_one_class(folder):
    with Project(open_source(folder), folder / ".maskwright") as project:
        saved(project, 0, add("a", label=None))
        assert open_dataset(export(project, "coco").path).classes == ("object",)


def test_exports_inside_of_the_folder_are_not_what_is_annotated_next(folder):
    with opened(folder) as project:
        saved(project, 0, add("a"))
        for format in ("coco", "yolo", "labelme"):
            export(project, format)
    source = open_source(folder)
    assert (len(source), source.format) == (3, None)


def test_images_that_are_gone_do_not_prevent_an_export(folder):
    with opened(folder) as project:
        for image in range(2):
            saved(project, image, add("a", 5))
        (folder / "photo-1.png").unlink()
        with pytest.raises(LossyError, match=r"the file of photo-1\.png is gone: left out with 1 objects"):
            export(project, "coco")
        found = export(project, "coco", allow_loss=True)
        assert (found.images, found.objects) == (1, 1)
        assert found.losses == ["the file of photo-1.png is gone: left out with 1 objects, which are kept here"]
        assert len(project.state(0).objects) == 1
        (folder / "photo-2.png").unlink()
        with pytest.raises(UsageError, match="the images with objects are gone"):
            export(project, "coco", allow_loss=True)
