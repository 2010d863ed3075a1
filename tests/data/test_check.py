"""Checking a data set, and writing a repaired copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskwright.data import check, open_dataset, read_coco
from maskwright.errors import DataError, UsageError
from tests.data.making import content, write

pytestmark = pytest.mark.fast


def damaged_set(folder: Path) -> Path:
    """Two splits: an invalid outline, a truncated and a missing image, a shared annotation id, a wrong box."""
    data = content(5)
    notes = data["annotations"]
    notes[1]["segmentation"] = [[1, 2, 3, 4]]
    notes[2]["id"] = 1
    notes[4]["bbox"] = [0, 0, -1, 0]
    notes[5]["area"] = float("nan")
    notes[5]["extra"] = {"by": "somebody"}
    write(folder, data)
    (folder / "train" / "4.png").write_bytes((folder / "train" / "4.png").read_bytes()[:-30])
    (folder / "train" / "5.png").unlink()
    write(folder, content(2), "val")
    return folder


@pytest.mark.thorough
def test_an_intact_data_set_has_no_findings(tmp_path: Path):
    write(tmp_path, content(2))
    report = check(tmp_path)
    assert report.ok
    assert not report.findings
    assert "2 images, 4 objects, 2 classes" in str(report)
    assert str(report).splitlines()[-1] == f"{tmp_path}: 0 errors, 0 skips, 0 notes"


def test_all_problems_are_found_at_once(tmp_path: Path):
    report = check(damaged_set(tmp_path))
    assert not report.ok
    assert [(f.kind, f.severity) for f in report.errors] == [("missing", "error")]
    assert {(f.annotation, f.image) for f in report.skips} == {(2, 1), (None, 4)}
    assert {f.kind for f in report.notes} == {"duplicate", "box", "area"}
    text = str(report)
    for words in (
        "'5.png'",
        "annotation 2 on '1.png' has a polygon of 2 points",
        "4.png",
        "instances_val.json: 2 imag",
    ):
        assert words in text
    assert f"maskwright check {tmp_path} --fix {tmp_path}-fixed" in text


@pytest.mark.thorough
def test_the_repaired_copy_can_be_read_in_strict_mode_and_keeps_everything_else(tmp_path: Path):
    source = damaged_set(tmp_path / "set")
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    report = check(source, tmp_path / "copy")
    assert report.fixed == tmp_path / "copy"
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before
    again = check(tmp_path / "copy")
    assert again.ok
    assert not again.findings, str(again)
    dataset = open_dataset(tmp_path / "copy", strict=True)
    assert dataset.image_ids() == [1, 2, 3]
    assert [len(dataset[i].target) for i in range(3)] == [1, 2, 2]
    ids = [n for i in range(3) for n in dataset.annotation_ids(i)]
    assert len(set(ids)) == len(ids)
    assert dataset.targets(2).boxes[0].tolist() == [10, 5, 30, 25]
    assert dataset.areas(2).tolist() == [400, 300]
    raw = json.loads((tmp_path / "copy/annotations/instances_train.json").read_text())
    assert {"by": "somebody"} in [a.get("extra") for a in raw["annotations"]]
    assert len(open_dataset(tmp_path / "copy", "val", strict=True)) == 2
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["annotations", "train", "val"]
    assert not list(tmp_path.glob(".*"))


def test_images_are_copied_and_linked_only_if_requested(tmp_path: Path):
    write(tmp_path / "set", content(1))
    source = tmp_path / "set/train/1.png"
    check(tmp_path / "set", tmp_path / "copy")
    copy = tmp_path / "copy/train/1.png"
    assert not source.samefile(copy)
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_mtime == source.stat().st_mtime
    check(tmp_path / "set", tmp_path / "links", link=True)
    assert source.samefile(tmp_path / "links/train/1.png")


def test_an_existing_folder_is_not_written_into(tmp_path: Path):
    write(tmp_path / "set", content(1))
    (tmp_path / "copy").mkdir()
    with pytest.raises(UsageError, match="copy: exists already; specify a new folder"):
        check(tmp_path / "set", tmp_path / "copy")


def test_a_full_disk_leaves_no_partial_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "set", content(2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskwright.data.repair._reflink", lambda *_: False)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(DataError, match="copy: cannot be written: the disk is full"):
        check(tmp_path / "set", tmp_path / "copy")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_data_set_without_objects_is_noted(tmp_path: Path):
    data = content(3)
    data["annotations"] = []
    report = check(write(tmp_path, data))
    assert not report.ok, "train refuses it"
    assert "its 3 images have no annotated object; add annotations before training" in str(report)


def test_classes_without_objects_and_narrow_images_are_noted(tmp_path: Path):
    data = content(1)
    data["categories"].append({"id": 4, "name": "fork"})
    data["images"].append({"id": 2, "file_name": "2.png", "height": 1, "width": 4000})
    text = str(check(write(tmp_path, data, sizes={"2.png": (1, 4000)})))
    assert "1 of 3 classes have no object: 'fork'" in text
    assert "1 images have a side of less than 8 pixels: '2.png'" in text


def test_many_findings_are_summarized(tmp_path: Path):
    data = content(60)
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[1, 2, 3, 4]]
    report = check(write(tmp_path, data), decode=False)
    assert len(report.skips) == 120
    assert "none of its 120 annotations can be used" in str(report)
    assert "and 110 more of the same kind" in str(report)
    assert len(str(report).splitlines()) < 20


def test_a_folder_of_images_and_one_image(tmp_path: Path):
    write(tmp_path / "set", content(3))
    folder = tmp_path / "set" / "train"
    (folder / "2.png").write_bytes(b"<html>")
    report = check(folder, tmp_path / "good")
    assert "2 of 3 images can be read" in str(report)
    assert [f.file for f in report.skips] == [str(folder / "2.png")]
    assert sorted(p.name for p in (tmp_path / "good").iterdir()) == ["1.png", "3.png"]
    (only,) = check(folder / "1.png").findings
    assert only.sentence == "there are no annotations; only the images were checked"
    report = check(folder / "2.png")
    assert not report.ok
    assert "not a supported image" in str(report)


def test_sources_that_cannot_be_checked(tmp_path: Path):
    with pytest.raises(UsageError, match="none: no such file or folder"):
        check(tmp_path / "none")
    with pytest.raises(UsageError, match=r"contains neither annotations .* nor images"):
        check(tmp_path)
    (tmp_path / "a.json").write_text("{")
    report = check(tmp_path / "a.json", tmp_path / "copy")
    assert not report.ok
    assert "nothing could be repaired" in str(report)


def test_the_copy_keeps_keypoints(tmp_path: Path):
    data = content(1)
    for entry in data["categories"]:
        entry.update(keypoints=["tip"], skeleton=[[1, 1]])
    data["annotations"][0]["keypoints"] = [12, 7, 2]
    check(write(tmp_path / "set", data), tmp_path / "copy")
    raw = json.loads((tmp_path / "copy/annotations/instances_train.json").read_text())
    assert raw["categories"][0]["skeleton"] == [[1, 1]]
    assert raw["annotations"][0]["keypoints"] == [12, 7, 2]
    points = read_coco(tmp_path / "copy/annotations/instances_train.json").targets(0).keypoints
    assert points is not None
    assert points[0].tolist() == [[12.5, 7.5, 2]]
