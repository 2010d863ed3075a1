"""The repaired copy: its layout, what is omitted, and what decides about the exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskwright import cli
from maskwright.data import Scenes, check, open_dataset, read_panoptic
from maskwright.errors import DataError
from tests.data.making import content, write

pytestmark = pytest.mark.fast


def two_splits(folder: Path, names: tuple[str, str] = ("train", "val")) -> Path:
    """Two splits whose images have the same names and other content."""
    write(folder, content(2), names[0])
    write(folder, content(2), names[1])
    for number in (1, 2):
        path = folder / names[1] / f"{number}.png"
        path.write_bytes((folder / names[0] / "1.png").read_bytes() + b"val")
    return folder


def contents(folder: Path, suffix: str = ".png") -> set[bytes]:
    return {p.name.encode() + p.read_bytes() for p in folder.rglob(f"*{suffix}")}


@pytest.mark.parametrize("source", ["set", "set/annotations", "set/annotations/../annotations"])
@pytest.mark.parametrize("names", [("train", "val"), ("train2017", "val2017")])
def test_images_of_equal_names_in_two_splits_stay_apart(tmp_path: Path, source: str, names: tuple[str, str]):
    two_splits(tmp_path / "set", names)
    report = check(tmp_path / source, tmp_path / "copy", decode=False)
    assert contents(tmp_path / "copy") == contents(tmp_path / "set")
    assert report.usable
    for split in ("train", "val"):
        old, new = (open_dataset(tmp_path / part, split, strict=True) for part in ("set", "copy"))
        assert len(new) == len(old) == 2


def test_the_copy_keeps_the_layout_of_roboflow(tmp_path: Path):
    two_splits(tmp_path / "set", ("train", "valid"))
    for split in ("train", "valid"):
        (tmp_path / f"set/annotations/instances_{split}.json").rename(tmp_path / f"set/{split}/_annotations.coco.json")
    (tmp_path / "set/annotations").rmdir()
    assert check(tmp_path / "set", tmp_path / "copy", decode=False).usable
    old, new = ({p.relative_to(f) for p in f.rglob("*")} for f in (tmp_path / "set", tmp_path / "copy"))
    assert old == new


def test_links_out_of_the_folder_are_followed_only_if_requested(tmp_path: Path):
    write(tmp_path / "set", content(3))
    secret = tmp_path / "secret.png"
    (tmp_path / "set/train/2.png").rename(secret)
    (tmp_path / "set/train/2.png").symlink_to(secret)
    (tmp_path / "set/train/3.png").unlink()
    (tmp_path / "set/train/3.png").symlink_to("1.png")
    report = check(tmp_path / "set", tmp_path / "copy")
    (skip,) = report.skips
    assert "2.png" in skip.file
    assert "is a symbolic link to" in skip.sentence
    assert "--follow-links" in skip.sentence
    assert open_dataset(tmp_path / "copy", strict=True).image_ids() == [1, 3]
    assert not any(p.is_symlink() for p in (tmp_path / "copy").rglob("*"))
    assert check(tmp_path / "set", tmp_path / "all", follow_links=True).copy is not None
    assert open_dataset(tmp_path / "all", strict=True).image_ids() == [1, 2, 3]
    assert not (tmp_path / "all/train/2.png").is_symlink()


def test_one_damaged_map_does_not_end_the_repair(tmp_path: Path):
    Scenes(3, (32, 32), stuff=True).write(tmp_path / "set")
    maps = sorted((tmp_path / "set/annotations/panoptic_train").iterdir())
    maps[1].write_bytes(maps[1].read_bytes()[:-40])
    (tmp_path / "set/annotations/instances_train.json").unlink(missing_ok=True)
    report = check(tmp_path / "set", tmp_path / "copy")
    assert any(maps[1].name in str(f) for f in report.errors), str(report)
    assert report.usable, str(report)
    copy = read_panoptic(tmp_path / "copy/annotations/panoptic_train.json", strict=True)
    assert len(copy) == 2
    assert len(list((tmp_path / "copy").rglob("*.png"))) + len(list((tmp_path / "copy").rglob("*.jpg"))) == 4


def test_file_names_that_are_not_utf8_are_kept(tmp_path: Path):
    data = content(2)
    name = os.fsdecode(b"caf\xe9.png")
    data["images"][1]["file_name"] = name
    try:
        write(tmp_path / "set", data)
    except OSError:
        pytest.skip("this file system has no such names")
    assert check(tmp_path / "set", tmp_path / "copy").usable
    dataset = open_dataset(tmp_path / "copy", strict=True)
    assert dataset[1].path == tmp_path / "copy/train" / name
    assert r"caf\xe9" in str(check(tmp_path / "set/train" / name))


def test_the_findings_of_the_copy_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = content(2)
    for annotation in data["annotations"]:
        annotation["segmentation"], annotation["image_id"] = [[1, 2, 3, 4]], 1
    write(tmp_path / "set", data)
    report = check(tmp_path / "set", tmp_path / "copy")
    assert report.fixed is not None
    assert not report.usable
    assert "the copy still has:\nerror" in str(report)
    assert cli.main(["check", str(tmp_path / "set"), "--fix", str(tmp_path / "other")]) == 1
    capsys.readouterr()


@pytest.mark.thorough
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    two_splits(tmp_path / "good")
    write(tmp_path / "val-only", content(1), "val")
    write(tmp_path / "two", content(1), "train2014")
    write(tmp_path / "two", content(1), "train2017")
    other = content(1)
    other["categories"] = [{"id": 3, "name": "fork"}, {"id": 90, "name": "plate"}]
    write(tmp_path / "differs", content(1))
    write(tmp_path / "differs", other, "val")
    codes = {
        "good": 0,
        "val-only": 1,
        "val-only --split val": 0,
        "two": 1,
        "two --split train2017": 0,
        "good --split test": 2,
        "good/train": 1,
        "differs": 1,
        "nowhere": 2,
        "good --images nowhere": 2,
    }
    for line, code in codes.items():
        name, *options = line.split()
        assert cli.main(["check", str(tmp_path / name), *options]) == code, line
    capsys.readouterr()


def test_classes_that_differ_between_splits_are_counted(tmp_path: Path):
    other = content(2)
    other["categories"][1]["name"] = "tablespoon"
    write(tmp_path, content(3))
    write(tmp_path, other, "val")
    (note,) = check(tmp_path).notes
    assert note.kind == "classes"
    assert note.sentence == (
        "1 of 2 classes are not in instances_train.json: 'tablespoon' (2 objects); "
        "1 of 2 classes of instances_train.json are not here: 'spoon' (3 objects)"
    )
    assert note.advice.endswith("is 'tablespoon' the same as 'spoon'?")


def test_two_files_of_one_name_are_an_error(tmp_path: Path):
    from maskwright.data.repair import Copying, _Copy

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_text(folder)
    copy = _Copy(tmp_path / "copy", Copying())
    assert copy.add(tmp_path / "a/1.png", tmp_path, Path("1.png"), "image 1")
    assert copy.add(tmp_path / "a/1.png", tmp_path, Path("1.png"), "image 1"), "the same file"
    with pytest.raises(DataError, match=r"1\.png: two different files would have this name in the copy"):
        copy.add(tmp_path / "b/1.png", tmp_path, Path("1.png"), "image 1")
    assert (tmp_path / "copy/1.png").read_text() == "a"
