"""Image files that are listed under names other than their own."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from maskwright.data import DataWarning, check, read_coco
from maskwright.data.image_names import match_names
from maskwright.errors import AnnotationError
from tests.data.making import content, pixels, write

pytestmark = pytest.mark.fast
LATIN = os.fsdecode(b"caf\xe9.jpg")


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("listed", "file", "reason"),
    [
        ("/data/upload/1/abc-p1.jpg", "p1.jpg", "upload prefix"),
        ("1/1a2b3c4d-p1.jpg", "p1.jpg", "upload prefix"),
        ("p1.jpg", "1a2b3c4d-p1.jpg", "upload prefix"),
        ("upload/1a2b3c4d-my_photo_1.jpg", "my photo (1).jpg", "upload prefix"),
        ("C:\\Users\\me\\p1.jpg", "p1.jpg", "folder"),
        ("..\\..\\media\\upload\\4\\p1.jpg", "p1.jpg", "folder"),
        ("../../../p1.jpg", "a/b/p1.jpg", "folder"),
        ("s3://bucket/set/p1.jpg", "p1.jpg", "folder"),
        ("https://host/p1.jpg?token=1", "p1.jpg", "folder"),
        ("/data/local-files/?d=set/p1.jpg", "set/p1.jpg", "folder"),
        ("images/p%201.jpg", "p 1.jpg", "URL encoding"),
        ("gr%C3%BCn.jpg", "grün.jpg", "URL encoding"),
        ("P1.JPG", "p1.jpg", "letter case"),
        ("p1.jpeg", "p1.jpg", "suffix"),
        ("p1.jpg", "p1.PNG", "suffix"),
        (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg"), "Unicode form"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.jpg"), "Unicode form"),
        ("café.jpg", LATIN, "encoding"),
    ],
)
def test_a_name_is_matched_with_the_one_file_that_fits(tmp_path: Path, listed: str, file: str, reason: str):
    files(tmp_path, file, "other.jpg", "notes.txt")
    found = match_names(tmp_path, [listed], [])
    assert (found.files, found.ambiguous, dict(found.reasons)) == ({listed: file}, {}, {reason: 1})


def test_trailing_folders_decide_between_files_of_one_name(tmp_path: Path):
    files(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    found = match_names(tmp_path, ["x/B/1.jpg", "d/1.jpg"], ["a/1.jpg"])
    assert found.files == {"x/B/1.jpg": "b/1.jpg"}
    assert found.ambiguous == {"d/1.jpg": ["b/1.jpg", "c/1.jpg"]}


def test_a_file_belongs_to_one_name_only(tmp_path: Path):
    files(tmp_path, "1.jpg", "2.jpg")
    found = match_names(tmp_path, ["a/1.jpg", "b/1.jpg", "b/2.jpg"], ["2.jpg"])
    assert found.files == {}, "2.jpg is listed under its own name"
    assert found.ambiguous == {"a/1.jpg": ["1.jpg"], "b/1.jpg": ["1.jpg"]}


def test_other_folders_are_searched_only_if_no_image_is_in_the_first(tmp_path: Path):
    files(tmp_path, "train/1.jpg", "val/2.jpg", "val/1.jpg", "photos/3.jpg", "photos/x/4.jpg")
    assert match_names(tmp_path / "train", ["2.jpg"], ["1.jpg"], [tmp_path]).files == {}
    found = match_names(tmp_path / "none", ["3.jpg", "4.jpg"], [], [tmp_path], "train")
    assert (found.folder, found.files) == (tmp_path / "photos", {"3.jpg": "3.jpg", "4.jpg": "x/4.jpg"})
    assert match_names(tmp_path / "none", ["2.jpg"], [], [tmp_path], "train").files == {}, "of another split"
    assert match_names(tmp_path / "none", ["2.jpg"], [], [tmp_path], "val2017").files == {"2.jpg": "2.jpg"}


def test_a_set_with_other_names_is_read_with_one_note(tmp_path: Path):
    data = content(3)
    path = write(tmp_path, data)
    for entry in data["images"]:
        entry["file_name"] = f"/data/upload/1/{entry['id']}abcdef0-{entry['file_name']}"
    path = write(tmp_path, data)
    with pytest.warns(DataWarning) as told:
        dataset = read_coco(path, strict=True)
    assert dataset.files == ["1.png", "2.png", "3.png"]
    assert "3 of 3 images are listed under other names than their files" in str(told[0].message)
    assert "(upload prefix: 3): '/data/upload/1/1abcdef0-1.png' is '1.png'" in str(told[0].message)
    check(path, tmp_path / "copy")
    assert not check(tmp_path / "copy/annotations/instances_train.json").findings, (
        "the copy lists the names of the files"
    )


def test_ambiguous_names_are_named(tmp_path: Path):
    data = content(2)
    data["images"][1]["file_name"] = "x/3.png"
    path = write(tmp_path, data)
    for folder in ("a", "b"):
        (tmp_path / "train" / folder).mkdir()
        Image.fromarray(pixels()).save(tmp_path / "train" / folder / "3.png")
    with pytest.raises(
        AnnotationError, match=r"1 of 2 images cannot be .*: 'x/3\.png' by 'a/3\.png', 'b/3\.png'; correct"
    ):
        read_coco(path)


def test_names_outside_of_the_folder_are_never_opened(tmp_path: Path):
    data = content(1)
    data["images"][0]["file_name"] = "../secret.png"
    path = write(tmp_path / "set", data)
    Image.fromarray(pixels()).save(tmp_path / "secret.png")
    Image.fromarray(pixels()).save(tmp_path / "set" / "secret.png.bak.png")
    with pytest.raises(
        AnnotationError, match=r"'\.\./secret\.png', which is outside the image folder; it was not opened"
    ):
        read_coco(path)


def test_images_without_a_file_name_are_found_by_their_address(tmp_path: Path):
    data = content(2)
    for entry in data["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/train2017/{entry.pop('file_name')}"
    path = write(tmp_path, data).rename(tmp_path / "lvis_v1_train.json")
    (tmp_path / "train2017").mkdir()
    for number in (1, 2):
        Image.fromarray(pixels()).save(tmp_path / "train2017" / f"{number}.png")
    assert read_coco(path, strict=True).files == ["train2017/1.png", "train2017/2.png"]


@pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "a/" * 3000 + "1.jpg", "1.jpg\0", "\ud800.jpg", "."])
def test_names_that_no_file_can_have_are_missing_files(tmp_path: Path, name: str):
    data = content(2)
    data["images"][1]["file_name"] = name
    path = write(tmp_path, {**data, "images": data["images"][:1]})
    path.write_text(json.dumps(data))
    with pytest.raises(AnnotationError, match=r"1 of 2 images are not in|outside the image folder") as told:
        read_coco(path)
    assert len(str(told.value)) < 1000
    report = check(path, tmp_path / "copy")
    assert report.fixed is not None
    assert read_coco(tmp_path / "copy/annotations/instances_train.json", strict=True).image_ids() == [1]
