"""Damaged data sets in the formats of other tools: one sentence names the file, the line or the object."""

# ruff: noqa: E501 - one case in each line

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskwright.data import Dataset, DataWarning, check, open_dataset
from maskwright.data.convert import convert_data
from maskwright.data.exchange.files import FileProblem
from maskwright.data.exchange.planes import read_plane
from maskwright.errors import AnnotationError, UsageError
from maskwright.structures import Masks
from tests.data.test_round_trips import CLASSES, LEFT, OVER, RIGHT, Drawn, made

SIZE = (24, 36)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two images in every format."""
    root = tmp_path_factory.mktemp("sources")
    masks = [Masks.from_polygons([[LEFT], [RIGHT]], SIZE), Masks.from_polygons([[OVER]], SIZE)]
    dataset = Drawn(root / "images", [made(masks[0], [0, 1]), made(masks[1], [2], first=3)])
    for to in ("yolo", "labelme", "via", "cvat", "voc", "label-maps"):
        convert_data(dataset, root / to, to)
    return root


@pytest.fixture
def copy(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(sources / name, tmp_path / name))

    return copied


def found(path: Path, severity: str) -> list[str]:
    """The findings of one severity."""
    report = check(path)
    return [str(f) for f in report.findings if f.severity == severity]


@contextlib.contextmanager
def ended_after(seconds: int) -> Iterator[None]:
    """Fail instead of waiting forever inside the block."""

    def end(*_: object) -> None:
        raise AssertionError("a named pipe was opened")  # no OSError, which readers turn into findings

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opened(path: Path) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return open_dataset(path)


def counts(path: Path) -> list[int]:
    dataset = opened(path)
    return [len(dataset.targets(i)) for i in range(len(dataset))]


def the(findings: list[str], words: str) -> str:
    """The only finding with these words."""
    matching = [line for line in findings if words in line]
    assert len(matching) == 1, findings
    return matching[0]


LABELS = "labels/train/image 0.txt"

# What is done to a label file, the level of the finding, and its words.
LINES = {
    "an odd number of values": ("0 0.1 0.1 0.5 0.1 0.5\n", "skip", f"'{LABELS}:1' on 'images/train/image 0.png' has 5 values after the class"),
    "not a number": ("0 0.1 0.1 half 0.1 0.5 0.5\n", "skip", f"'{LABELS}:1' on 'images/train/image 0.png' has 'half' where a number is expected"),
    "not finite": ("0 0.1 0.1 nan 0.1 0.5 0.5\n", "skip", "has a value that is not a finite number"),
    "above 1": ("0 0.1 0.1 1.7 0.1 0.5 0.5\n", "skip", "has the coordinate 1.7; expected shares of the image's width and height, 0 ... 1"),
    "negative": ("0 -0.6 0.1 0.9 0.1 0.5 0.5\n", "skip", "has the coordinate -0.6"),
    "an unknown class": ("7 0.1 0.1 0.9 0.1 0.5 0.5\n", "skip", "has class 7, but the classes are 0 to 2"),
    "a negative class": ("-1 0.1 0.1 0.9 0.1 0.5 0.5\n", "skip", "has class -1; expected a class number from 0 on"),
    "two points": ("0 0.1 0.1\n", "skip", "has 1 points; at least 3 are needed"),
    "collinear": ("0 0.1 0.1 0.2 0.2 0.3 0.3\n", "skip", "has a polygon without area"),
    "slightly outside": ("0 -0.01 0.1 1.02 0.1 0.5 0.5\n", "note", "1 outlines reach slightly out of their images"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(LINES))
def test_a_bad_line_of_yolo_is_named(case: str, copy: Callable[[str], Path]) -> None:
    text, severity, words = LINES[case]
    root = copy("yolo")
    good = "1 0.6 0.2 0.9 0.2 0.9 0.8\n"
    (root / LABELS).write_text(text + good)
    assert words in the(found(root, severity), words)
    assert counts(root) == [2 if severity == "note" else 1, 1]


def test_yolo_with_windows_line_ends_a_byte_order_mark_and_commas_is_read(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    text = (root / LABELS).read_text()
    (root / LABELS).write_bytes(b"\xef\xbb\xbf" + text.replace(" ", ", ").replace("\n", "\r\n\r\n").encode())
    settings = (root / "data.yaml").read_text()
    (root / "data.yaml").write_bytes(settings.replace("\n", "\r\n").encode("utf-16"))
    assert counts(root) == [2, 1]
    assert open_dataset(root).classes == CLASSES


def test_yolo_in_pixels_is_an_error_that_is_repaired(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("yolo")
    for name, label in (("image 0", 0), ("image 1", 1)):
        (root / f"labels/train/{name}.txt").write_text(f"{label} " + " ".join(map(str, LEFT)) + "\n")
    words = "2 of 2 objects have coordinates in pixels; YOLO's are shares of the width and height"
    assert the(found(root, "error"), words)
    report = check(root, fix=tmp_path / "fixed")
    assert report.usable
    fixed = open_dataset(tmp_path / "fixed")
    assert fixed.targets(0).masks.areas().tolist() == [12 * 18]  # type: ignore[union-attr]


SETTINGS = {
    "two classes of one number": ("names:\n  0: cat\n  0: dog\n", "has key 0 twice, for 'cat' and 'dog' (line 3); give each its own key"),
    "two classes of one number as text": ("names: {0: cat, '00': dog}\n", "class number 0 is used for both 'cat' and 'dog'"),
    "too few names": ("nc: 4\nnames: [cat, dog]\n", "'nc' is 4, but 'names' lists 2 classes"),
    "no names": ("train: images/train\n", "has neither 'names' nor 'nc'"),
    "not yaml": ("names: [cat\ntrain: x\n", "is invalid YAML"),
    "an alias": ("a: &a [cat, dog]\nnames: *a\n", "has an alias (*name) in line 2"),
    "poses": ("names: [a]\nkpt_shape: [17, 3]\n", "it is a data set of poses, not of masks"),
    "empty names": ("names: []\n", "has neither 'names' nor 'nc'"),
    "names as text": ("names: cat\n", "'names' is 'cat'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SETTINGS))
def test_bad_settings_of_yolo_are_one_error(case: str, copy: Callable[[str], Path]) -> None:
    text, words = SETTINGS[case]
    root = copy("yolo")
    train = "" if "train:" in text else "train: images/train\n"
    (root / "data.yaml").write_text(text + train)
    errors = found(root, "error")
    assert the(errors, words).startswith(f"{root}/data.yaml: ")


def test_yaml_with_python_objects_is_not_executed(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("yolo")
    target = tmp_path / "executed"
    (root / "data.yaml").write_text(f'names: !!python/object/apply:os.mkdir ["{target}"]\ntrain: images/train\n')
    assert the(found(root, "error"), "is invalid YAML (could not determine a constructor")
    assert not target.exists()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("../train/images", "'train' is '../train/images', which is not a folder or list of images in"),
        ("/etc", "'train' is '/etc', which is not a folder or list of images in"),
        ("images/nowhere", "'train' is 'images/nowhere'"),
    ],
)
def test_paths_that_leave_the_folder_are_not_read(train: str, words: str, copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root.parent / "train" / "images").mkdir(parents=True)
    (root / "data.yaml").write_text(f"train: {train}\nnames: {json.dumps(list(CLASSES))}\n")
    assert words in the(found(root, "error"), words)


@pytest.mark.parametrize(
    "text", ["../images/train", "./images/train", "[images/train]", "/home/me/set/images/train", "train.txt"]
)
def test_the_forms_of_paths_in_data_yaml(text: str, copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "train.txt").write_text("./images/train/image 0.png\n/data/images/train/image 1.png\n")
    (root / "data.yaml").write_text(f"path: .\ntrain: {text}\nval: ''\ntest:\nnames: {json.dumps(list(CLASSES))}\n")
    assert counts(root) == [2, 1]


def test_labels_and_images_without_their_other_half(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "images/train/image 1.png").unlink()
    Image.new("RGB", (36, 24), (9, 200, 30)).save(root / "images/train/other.png")
    assert the(found(root, "skip"), "1 label files have no image: 'labels/train/image 1.txt'")
    assert the(found(root, "note"), "1 of 2 images have no label file: 'images/train/other.png'")
    (root / LABELS).write_text("")
    assert counts(root) == [0, 0]


def test_two_images_of_one_label_file_are_named(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    Image.new("RGB", (36, 24)).save(root / "images/train/image 0.jpg")
    assert the(found(root, "note"), "1 label files belong to several images, such as 'images/train/image 0.jpg'")


def test_yolo_without_settings_is_read_with_classes_txt(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert open_dataset(root).classes == ("a", "b", "c")
    assert counts(root) == [2, 1]


# ---- LabelMe ---------------------------------------------------------------------------------------------------------


def change(path: Path, **changes: object) -> dict[str, object]:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **changes}), "utf-8")
    return content


SHAPES = {
    "unknown": ({"shape_type": "spline"}, "has the shape type 'spline'; expected polygon, rectangle, circle or mask"),
    "line": ({"shape_type": "linestrip"}, "has the shape type 'linestrip'"),
    "two points": ({"points": [[1, 1], [5, 5]]}, "has 2 points; at least 3 are needed"),
    "text": ({"points": [[1, 1], ["a", 5], [9, 9]]}, "has a coordinate that is not a finite number"),
    "no pairs": ({"points": [[1, 1, 3], [2, 5], [9, 9]]}, "has points that are not pairs x, y"),
    "no label": ({"label": None}, "has label None; expected the name of a class"),
    "a mask of another size": ({"shape_type": "mask", "points": [[1, 1], [9, 9]], "mask": "PNG"}, "is a mask of 4 x 4 pixels for corners 9 x 9"),
    "a damaged mask": ({"shape_type": "mask", "points": [[1, 1], [4, 4]], "mask": "!!"}, "is a mask that is not base64 text"),
    "a circle of one point": ({"shape_type": "circle", "points": [[1, 1]]}, "is a circle of 1 points; expected 2"),
    "outside": ({"points": [[90, 90], [95, 90], [95, 99]]}, "has a polygon outside its image of 36 x 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SHAPES))
def test_a_bad_shape_of_labelme_is_named(case: str, copy: Callable[[str], Path]) -> None:
    changes, words = SHAPES[case]
    root = copy("labelme")
    path = root / "image 0.json"
    shapes = json.loads(path.read_text("utf-8"))["shapes"]
    if changes.get("mask") == "PNG":
        changes = {**changes, "mask": png(np.ones((4, 4), bool))}
    change(path, shapes=[{**shapes[0], **changes}, shapes[1]])
    line = the(found(root, "skip"), words)
    assert "annotation 'image 0.json: shapes[0]' on 'image 0.png'" in line
    assert counts(root) == [1, 1]


def png(plane: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(plane).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_the_shapes_of_labelme_have_their_areas(copy: Callable[[str], Path]) -> None:
    root = copy("labelme")
    plane = np.ones((4, 6), bool)
    plane[1:3, 1:3] = False
    shapes = [
        {"label": "a", "shape_type": "rectangle", "points": [[10, 12], [2, 2]]},
        {"label": "b", "shape_type": "circle", "points": [[20, 12], [20, 20]], "group_id": None},
        {"label": "c", "shape_type": "mask", "points": [[28, 3], [33, 6]], "mask": png(plane)},
        {"label": "d", "points": [[-5, -5], [4, -5], [4, 6], [-5, 6]]},
    ]
    change(root / "image 0.json", shapes=[{"flags": {}, **shape} for shape in shapes])
    dataset = opened(root)
    target = dataset.targets(0)
    areas = dict(zip([dataset.classes[k] for k in target.labels.tolist()], target.masks.areas().tolist(), strict=True))  # type: ignore[union-attr]
    assert areas["a"] == 80
    assert abs(areas["b"] - np.pi * 64) < 6
    assert areas["c"] == 20
    assert areas["d"] == 24


def test_images_that_are_only_embedded_are_repaired(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("labelme")
    for name in ("image 0", "image 1"):
        data = (root / f"{name}.png").read_bytes()
        change(root / f"{name}.json", imageData=base64.b64encode(data).decode(), imagePath="C:\\work\\photo.png")
        (root / f"{name}.png").unlink()
    line = the(found(root, "error"), "2 of 2 images exist only in their JSON files (imageData)")
    assert "check --fix" in line
    report = check(root, fix=tmp_path / "fixed")
    assert report.usable, report
    assert counts(tmp_path / "fixed") == [2, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "image 0.json is empty"),
        (b'{"version": "5", "shapes": [{"label": ', "image 0.json is truncated JSON"),
        (b'{"version": "5", "shapes": 3, "imagePath": "a"}', "image 0.json has no list 'shapes'"),
        (b'{"version": "5", "shapes": [], "imagePath": "\xff"}', "image 0.json is not UTF-8 text (byte 4"),
    ],
)
def test_a_damaged_file_of_labelme_is_named_and_the_others_are_read(
    content: bytes, words: str, copy: Callable[[str], Path]
) -> None:
    root = copy("labelme")
    (root / "image 0.json").write_bytes(content)
    assert the(found(root, "skip"), words)
    assert counts(root) == [1]


def test_a_missing_image_of_labelme_is_named(copy: Callable[[str], Path]) -> None:
    root = copy("labelme")
    (root / "image 1.png").unlink()
    assert the(found(root, "error"), "1 of 2 images are not in")


def test_images_stored_turned_are_read_upright(copy: Callable[[str], Path]) -> None:
    """LabelMe shows images upright and lists that size."""
    root = copy("labelme")
    for name in ("image 0", "image 1"):
        pixels = Image.open(root / f"{name}.png").transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise to display
        pixels.save(root / f"{name}.jpg", exif=exif)
        (root / f"{name}.png").unlink()
        change(root / f"{name}.json", imagePath=f"{name}.jpg")
    dataset = open_dataset(root)
    assert dataset.sizes() == [SIZE, SIZE]
    assert dataset.targets(0).masks.areas().tolist() == [12 * 18, 9 * 7]  # type: ignore[union-attr]


# ---- VIA, CVAT -------------------------------------------------------------------------------------------------------


REGIONS = {
    "polyline": ({"name": "polyline", "all_points_x": [1, 2], "all_points_y": [1, 2]}, "has the shape 'polyline'"),
    "lengths": ({"name": "polygon", "all_points_x": [1, 9, 9], "all_points_y": [1, 2]}, "has a polygon with 3 x and 2 y coordinates"),
    "few": ({"name": "polygon", "all_points_x": [1, 9], "all_points_y": [1, 2]}, "has a polygon of 2 points"),
    "no radius": ({"name": "circle", "cx": 3, "cy": 4}, "is a circle without the numbers cx, cy, r"),
    "text": ({"name": "rect", "x": 3, "y": 4, "width": "wide", "height": 3}, "is a rect without the numbers"),
    "no area": ({"name": "rect", "x": 3, "y": 4, "width": 0, "height": 3}, "is a rect without area"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REGIONS))
def test_a_bad_region_of_via_is_named(case: str, copy: Callable[[str], Path]) -> None:
    shape, words = REGIONS[case]
    root = copy("via")
    path = root / "via_region_data.json"
    content = json.loads(path.read_text("utf-8"))
    entry = next(iter(content["_via_img_metadata"].values()))
    entry["regions"][0]["shape_attributes"] = shape
    path.write_text(json.dumps(content), "utf-8")
    assert "annotation 'image 0.png: regions[0]' on 'image 0.png'" in the(found(root, "skip"), words)
    assert counts(root) == [1, 1]


@pytest.mark.parametrize("names", [("train", "val"), ("train2017", "val2017")])
def test_splits_of_via_have_the_same_classes_wherever_they_are_opened(
    names: tuple[str, str], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        shutil.copytree(sources / "via", tmp_path / "set" / name)
    path = tmp_path / "set" / names[1] / "via_region_data.json"
    content = json.loads(path.read_text("utf-8"))
    metadata = content["_via_img_metadata"]
    only = next(iter(metadata.values()))
    only["regions"] = only["regions"][:1]
    path.write_text(json.dumps({"_via_img_metadata": {"a": only}}), "utf-8")  # without the list of classes
    every = open_dataset(tmp_path / "set", names[0]).classes
    assert len(every) == 3
    assert open_dataset(tmp_path / "set", names[1]).classes == every
    assert open_dataset(tmp_path / "set" / names[1]).classes == every
    monkeypatch.chdir(tmp_path / "set" / names[1])
    assert open_dataset(".").classes == every


def _project(path: Path, listed: dict[str, str], image: str, classes: list[str]) -> None:
    """A VIA project of one image with an object of each class."""
    shape = {"name": "rect", "x": 2, "y": 2, "width": 9, "height": 9}
    regions = [{"shape_attributes": shape, "region_attributes": {"class": name}} for name in classes]
    content = {
        "_via_img_metadata": {image: {"filename": image, "size": 1, "regions": regions, "file_attributes": {}}},
        "_via_attributes": {"region": {"class": {"type": "dropdown", "options": listed}}, "file": {}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
    Image.new("RGB", (SIZE[1], SIZE[0])).save(path.parent / image)


def test_via_files_of_two_splits_in_one_folder(tmp_path: Path) -> None:
    _project(tmp_path / "via_val.json", {"cup": "", "spoon": ""}, "b.png", ["cup"])
    assert len(open_dataset(tmp_path, "test")) == 1  # a single file serves as any split, whatever its name
    _project(tmp_path / "via_train.json", {"fork": "", "cup": ""}, "a.png", ["cup", "fork"])
    (tmp_path / "via_old.json").write_text((tmp_path / "via_val.json").read_text("utf-8"), "utf-8")
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    assert [[path.name for path in d.paths() if path is not None] for d in (train, val)] == [["a.png"], ["b.png"]]
    assert train.classes == val.classes == ("fork", "cup", "spoon")
    assert [d.targets(0).labels.tolist() for d in (train, val)] == [[1, 0], [1]]
    assert open_dataset(tmp_path / "via_val.json").classes == train.classes
    with pytest.raises(UsageError, match=r"no annotations of split 'test'; found via_train.json, via_val.json"):
        open_dataset(tmp_path, "test")


def test_via_files_of_two_splits_in_folders_of_other_names(tmp_path: Path) -> None:
    _project(tmp_path / "a" / "via_train.json", {"fork": "", "cup": ""}, "a.png", ["cup", "fork"])
    _project(tmp_path / "b" / "via_val.json", {"cup": "", "spoon": ""}, "b.png", ["cup"])
    train, val = open_dataset(tmp_path, "train"), open_dataset(tmp_path, "val")
    assert [[path.name for path in d.paths() if path is not None] for d in (train, val)] == [["a.png"], ["b.png"]]
    assert train.classes == val.classes == ("fork", "cup", "spoon")
    with pytest.raises(UsageError, match=r"no annotations of split 'test'"):
        open_dataset(tmp_path, "test")


def test_images_of_a_second_via_file_are_named(tmp_path: Path) -> None:
    _project(tmp_path / "via_export.json", {"cup": ""}, "a.png", ["cup"])
    (tmp_path / "via_project.json").write_text((tmp_path / "via_export.json").read_text("utf-8"), "utf-8")
    assert len(open_dataset(tmp_path)) == 1  # the same images twice are no loss
    _project(tmp_path / "via_more.json", {"cup": ""}, "b.png", ["cup"])
    with pytest.warns(DataWarning, match=r"via_more.json lists 1 image that via_export.json does not have"):
        assert len(open_dataset(tmp_path)) == 1
    assert len(open_dataset(tmp_path / "via_more.json")) == 1
    damaged = {"a.png": {"filename": ["b.png"], "regions": []}, "b.png": {"filename": "", "regions": []}}
    (tmp_path / "via_more.json").write_text(json.dumps({"_via_img_metadata": damaged}), "utf-8")
    assert len(open_dataset(tmp_path)) == 1  # its entries are no images


@pytest.mark.filterwarnings("ignore:.*listed under other names")  # the images are in train_data
def test_names_of_via_files_count_more_than_that_of_their_folder(tmp_path: Path) -> None:
    """Otherwise both files would be of a split "train_data", or the first one would be read for "val" in val_data."""
    for split, image in (("train", "a.png"), ("val", "b.png")):
        for folder in ("train_data", "val_data"):
            _project(tmp_path / folder / folder / f"via_{split}.json", {}, image, ["cup"])
    for folder in ("train_data", "val_data"):
        opened = {split: open_dataset(tmp_path / folder, split) for split in ("train", "val")}
        assert [path.name for data in opened.values() for path in data.paths() if path] == ["a.png", "b.png"]


@pytest.mark.filterwarnings("ignore:.*listed under other names")  # b.png is images/b.png below the folder of the split
@pytest.mark.parametrize("folder", ["{}", "{}/images"])
def test_classes_that_only_one_via_project_lists_are_known_to_all_splits(folder: str, tmp_path: Path) -> None:
    """Also where a file in train/images is opened itself."""
    files = {split: tmp_path / folder.format(split) / "via.json" for split in ("val", "train")}
    _project(files["val"], {"cup": "", "spoon": ""}, "b.png", [])
    _project(files["train"], {"fork": "", "cup": ""}, "a.png", ["cup", "fork"])
    for split, file in files.items():
        for dataset in (open_dataset(tmp_path, split), open_dataset(file.parent), open_dataset(file)):
            assert dataset.classes == ("fork", "cup", "spoon")


def test_other_folders_of_via_files_are_no_splits(sources: Path, tmp_path: Path) -> None:
    """A folder whose name begins like that of a split has nothing to do with its neighbours."""
    for name in ("test_photos", "training-data"):
        shutil.copytree(sources / "via", tmp_path / name / "deep")
        shutil.copytree(sources / "via", tmp_path / name / "via")
    path = tmp_path / "test_photos" / "via" / "via_region_data.json"
    content = json.loads(path.read_text("utf-8"))
    metadata = content["_via_img_metadata"]
    only = next(iter(metadata.values()))
    only["regions"] = only["regions"][:1]
    path.write_text(json.dumps({"_via_img_metadata": {"a": only}}), "utf-8")
    assert len(open_dataset(path).classes) == len(open_dataset(path.parent).classes) == 1


@pytest.mark.parametrize("form", ["project", "bare", "via 1", "checkboxes", "one attribute of several"])
def test_the_forms_of_via(form: str, copy: Callable[[str], Path]) -> None:
    root = copy("via")
    path = root / "via_region_data.json"
    content = json.loads(path.read_text("utf-8"))
    entries = content["_via_img_metadata"]
    for entry in entries.values():
        for region in entry["regions"]:
            name = region["region_attributes"]["class"]
            if form == "checkboxes":
                region["region_attributes"]["class"] = {name: True, "other": False}
            elif form == "one attribute of several":
                region["region_attributes"] = {"quality": "good", "species": name, "comment": ""}
        if form == "via 1":
            entry["regions"] = {str(n): region for n, region in enumerate(entry["regions"])}
    path.write_text(json.dumps(content if form == "project" else entries), "utf-8")
    assert counts(root) == [2, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        assert sorted(open_dataset(root).classes) == sorted(CLASSES)


MARKS = {
    "truncated": (lambda t: t[: len(t) // 2], "error", "annotations.xml: the file is truncated XML"),
    "entities": (
        lambda t: t.replace("<annotations>", '<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><annotations>'),
        "error", "declares XML entities, which are not read",
    ),
    "external": (
        lambda t: t.replace("<annotations>", '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotations>'),
        "error", "declares XML entities, which are not read",
    ),
    "empty": (lambda t: "", "error", "the file is empty"),
    "no number": (lambda t: t.replace("2,2;", "2,x;", 1), "skip", "has a coordinate that is not a finite number"),
    "no pair": (lambda t: t.replace("2,2;", "2;", 1), "skip", "has points that are not pairs x,y"),
    "no label": (lambda t: t.replace('<polygon label="car"', '<polygon label=""'), "skip", "has no label"),
    "other shapes": (
        lambda t: t.replace("</image>", '<points label="car" points="1,1"/></image>', 1), "skip", "has shapes that are no areas: 1 points",
    ),
    "a tracking export": (
        lambda t: "<annotations><track/></annotations>", "error", "it is an export 'CVAT for video'",
    ),
    "a leaving name": (lambda t: t.replace('name="image 0.png"', 'name="../../etc/x.png"'), "error", "is outside the image folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(MARKS))
def test_damaged_xml_of_cvat_is_named(case: str, copy: Callable[[str], Path]) -> None:
    damage, severity, words = MARKS[case]
    root = copy("cvat")
    path = root / "annotations.xml"
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    assert words in the(found(root, severity), words)


def test_the_shapes_of_cvat_have_their_areas(copy: Callable[[str], Path]) -> None:
    root = copy("cvat")
    path = root / "annotations.xml"
    shapes = """<box label="a" xtl="2" ytl="2" xbr="12" ybr="10" occluded="1"/>
    <ellipse label="b" cx="20" cy="12" rx="6" ry="8"/>
    <mask label="c" rle="0, 2, 2, 2" left="30" top="4" width="3" height="2"/>
    <polygon label="d" points="1,15;5,15;5,20;1,20" group_id="4"/>
    <polygon label="d" points="7,15;11,15;11,20;7,20" group_id="4"/>"""
    name = 'name="image 0.png" width="36" height="24">'
    text = path.read_text("utf-8")
    first = text.index(name) + len(name)
    path.write_text(text[:first] + shapes + text[text.index("</image>") :], "utf-8")
    dataset = opened(root)
    target = dataset.targets(0)
    areas = dict(zip([dataset.classes[k] for k in target.labels.tolist()], target.masks.areas().tolist(), strict=True))  # type: ignore[union-attr]
    assert areas["a"] == 80
    assert abs(areas["b"] - np.pi * 48) < 5
    assert areas["c"] == 4
    assert areas["d"] == 40
    assert len(target) == 4


def test_the_subsets_of_cvat_are_splits(copy: Callable[[str], Path]) -> None:
    root = copy("cvat")
    path = root / "annotations.xml"
    text = (
        path.read_text("utf-8")
        .replace('id="0"', 'id="0" subset="Train"')
        .replace('id="1"', 'id="1" subset="Validation"')
    )
    path.write_text(text, "utf-8")
    assert len(open_dataset(root, "train")) == 1
    assert len(open_dataset(root, "val").targets(0)) == 1


def test_class_names_keep_their_text(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "data.yaml").write_text("train: images/train\nnc: 3\nnames: [no, 007, 1e3]\n")
    assert opened(root).classes == ("no", "007", "1e3")


def test_label_files_of_yolo_with_an_uppercase_suffix_are_read(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    for path in sorted((root / "labels").rglob("*.txt")):
        path.rename(path.with_suffix(".TXT"))
    assert counts(root) == [2, 1]


def test_classes_of_yolo_counted_from_1_are_noted(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    for path in sorted((root / "labels").rglob("*.txt")):
        rows = [line.split(" ", 1) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{int(number) + 1} {rest}\n" for number, rest in rows))
    assert the(found(root, "note"), "no object has class 0, but 1 have class 3, which is not listed")


def test_unreadable_labels_of_yolo_exclude_their_image(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / LABELS).write_bytes(b"0 0.1 \xff\xfe\n")
    assert the(found(root, "skip"), f"{LABELS} is not UTF-8 text")
    assert counts(root) == [1]


def test_yolo_exports_of_label_studio_with_their_notes_are_read(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cup"}], "info": {"version": "1.0"}}')
    assert not found(root, "error")
    assert counts(root) == [2, 1]


def test_images_of_two_splits_are_noted(copy: Callable[[str], Path]) -> None:
    root = copy("yolo")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/train\nnames: {json.dumps(list(CLASSES))}\n")
    assert the(found(root, "note"), "2 of the 2 images of 'val' are also images to train on")


def test_images_of_labelme_without_a_file_are_noted(copy: Callable[[str], Path]) -> None:
    root = copy("labelme")
    file = next(root.rglob("image 0.png"))
    Image.open(file).save(file.with_name("other.png"))
    assert the(found(root, "note"), "1 images have no JSON file")
    assert counts(root) == [2, 1]


UNREAD = {
    "via.csv": ("filename,region_shape_attributes\n", "is an export of VIA as CSV"),
    "via3.json": ('{"project": {"vid_list": ["1"]}}', "is a project of VIA 3"),
    "tasks.json": ('[{"annotations": [{"result": [{"original_width": 9}]}]}]', "is an export of Label Studio as JSON"),
    "image.jpg.json": ('{"objects": [{"classTitle": "cat"}]}', "is an annotation of Supervisely"),
    "image.xml": ("<annotation><object><bndbox/></object></annotation>", "has Pascal VOC boxes without masks"),
    "obj.data": ("train = train.txt\nnames = obj.names\n", "is a setting of Darknet YOLO, which has boxes only"),
    "image.txt": ("0 0.1 0.1 0.5 0.5 0.1 0.5\n", "is a YOLO label file beside its image"),
    "image_seg.npy": ("", "is a file of Cellpose's user interface"),
}


@pytest.mark.parametrize("name", list(UNREAD))
def test_exports_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    text, words = UNREAD[name]
    Image.new("RGB", (9, 9)).save(tmp_path / "image.jpg")
    (tmp_path / name).write_text(text)
    assert f"{name} {words}; " in the(found(tmp_path, "error"), "there are no annotations")
    with pytest.raises(UsageError, match=words):
        open_dataset(tmp_path)


# ---- maps ------------------------------------------------------------------------------------------------------------


def test_a_map_of_another_size_is_named(copy: Callable[[str], Path]) -> None:
    for name, file in (("voc", "SegmentationObject/image 0.png"), ("label-maps", "masks/image 0.png")):
        root = copy(name)
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(root / file)
        line = the(found(root, "skip"), "is 40 x 30, but its image is 36 x 24")
        assert file in line
        assert counts(root) == [1]  # not background


def test_a_map_for_the_image_as_stored_is_named(copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    Image.fromarray(np.zeros((36, 24), np.uint8)).save(root / "masks/image 0.png")
    assert the(found(root, "skip"), "turn it as the image is displayed (EXIF orientation)")


def test_damaged_and_unsuitable_maps_are_named(copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    (root / "masks/image 0.png").write_bytes((root / "masks/image 0.png").read_bytes()[:60])
    assert the(found(root, "skip"), "masks/image 0.png is damaged")
    Image.new("L", (36, 24), 3).save(root / "masks/image 0.png", "JPEG")
    assert the(found(root, "skip"), "was saved as JPEG, which changes the numbers in its pixels")


def test_maps_with_negative_numbers_are_excluded(copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    plane = np.asarray(Image.open(root / "masks/image 0.png")).astype(np.int32)
    (root / "masks/image 0.png").unlink()
    Image.fromarray(plane - 1).save(root / "masks/image 0.tif")
    assert the(found(root, "skip"), "masks/image 0.tif has the value -1; expected 0 for the background")
    assert counts(root) == [1]


def test_images_and_maps_without_their_other_half_are_named(copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    (root / "masks/image 0.png").rename(root / "masks/other.png")
    assert "'masks/other.png'" in the(found(root, "skip"), "1 maps have no image")
    assert "'images/image 0.png'" in the(found(root, "note"), "1 images have no map")


def test_maps_of_ones_in_several_pieces_are_noted(tmp_path: Path) -> None:
    plane = np.zeros((20, 30), np.uint8)
    plane[2:6, 2:6] = plane[10:15, 10:15] = 1
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(plane).save(tmp_path / folder / "a.png")
    assert the(found(tmp_path, "note"), "each map is read as one object, some in several pieces")


def test_foreground_masks_are_an_error(copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    for path in sorted((root / "masks").glob("*.png")):
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    assert the(found(root, "error"), "all 2 maps have the only value 255: they mark the foreground")


def test_truncated_xml_of_voc_is_a_note_while_the_pngs_have_the_classes(copy: Callable[[str], Path]) -> None:
    root = copy("voc")
    path = root / "Annotations" / "image 0.xml"
    path.write_text(path.read_text()[:80])
    assert counts(root) == [2, 1]
    assert not found(root, "error")
    (root / "SegmentationClass" / "image 0.png").unlink()
    assert the(found(root, "skip"), "Annotations/image 0.xml is truncated XML")


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32"])
def test_maps_of_all_depths_are_read(kind: str, copy: Callable[[str], Path]) -> None:
    root = copy("label-maps")
    plane = np.asarray(Image.open(root / "masks/image 0.png"))
    (root / "masks/image 0.png").unlink()
    largest = {"uint8": 200, "uint16": 60_000, "int32": 1_000_000, "float32": 70_000}[kind]
    Image.fromarray(np.where(plane == 2, largest, plane).astype(kind)).save(root / "masks/image 0.tif")
    assert counts(root) == [2, 1]


def test_colours_of_vocs_palette_are_numbers(copy: Callable[[str], Path]) -> None:
    from maskwright.data.exchange.voc import palette

    root = copy("voc")
    colours = np.array(palette(), np.uint8)
    for path in [*root.glob("SegmentationObject/*.png"), *root.glob("SegmentationClass/*.png")]:
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    dataset = open_dataset(root)
    assert dataset.classes == CLASSES
    assert [dataset.targets(i).labels.tolist() for i in range(2)] == [[0, 1], [2]]


LAYOUTS = {
    "folders in a split": ("train/images/{n}.tif", "train/masks/{n}.tif"),
    "splits in the folders": ("images/train/{n}.png", "labels/train/{n}.png"),
    "cellpose": ("{n}_img.png", "{n}_masks.png"),
    "beside": ("set/{n}.tif", "set/{n}_cp_masks.png"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layouts_of_maps(layout: str, tmp_path: Path) -> None:
    plane = np.zeros((40, 50), np.uint16)
    plane[2:9, 3:9], plane[20:30, 20:33] = 1, 7
    for number in range(2):
        image, mask = (tmp_path / name.format(n=number) for name in LAYOUTS[layout])
        for path, values in ((image, (plane > 3).astype(np.uint8) * 9), (mask, plane)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
    dataset = open_dataset(tmp_path)
    assert [dataset.targets(i).masks.areas().tolist() for i in range(2)] == [[42, 130]] * 2  # type: ignore[union-attr]


def test_one_mask_for_each_object(tmp_path: Path) -> None:
    for number, sizes in enumerate(([4, 6], [5])):
        for folder in ("images", "masks"):
            (tmp_path / f"{number}/{folder}").mkdir(parents=True)
        Image.new("RGB", (30, 20)).save(tmp_path / f"{number}/images/{number}.png")
        for side in sizes:
            mask = np.zeros((20, 30), np.uint8)
            mask[2 : 2 + side, side : 2 * side] = 255
            Image.fromarray(mask).save(tmp_path / f"{number}/masks/object{side}.png")
    dataset = open_dataset(tmp_path)
    assert [dataset.targets(i).masks.areas().tolist() for i in range(2)] == [[16, 36], [25]]  # type: ignore[union-attr]


def test_several_formats_in_one_folder_are_named(copy: Callable[[str], Path], sources: Path) -> None:
    root = copy("yolo")
    (root / "annotations.xml").write_bytes((sources / "cvat" / "annotations.xml").read_bytes())
    with pytest.raises(UsageError, match=r"2 formats fit equally well: yolo \(data.yaml\), cvat \(annotations.xml\)"):
        open_dataset(root)
    assert len(open_dataset(f"yolo:{root}")) == 2


def test_the_copy_of_fix_has_the_format_of_the_source(copy: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("labelme", "via", "cvat", "voc", "label-maps", "yolo"):
        root = copy(name)
        image = next(
            p for p in sorted(root.rglob("image 1.png")) if "images" in str(p) or p.parent.name in (name, "JPEGImages")
        )
        image.write_bytes(image.read_bytes()[:200])
        report = check(root, fix=tmp_path / f"{name}-fixed")
        assert report.usable, report
        assert counts(tmp_path / f"{name}-fixed") == [2], name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["yolo", "labelme", "via", "cvat", "voc", "label-maps"])
def test_named_pipes_beside_the_files_are_not_opened(name: str, copy: Callable[[str], Path]) -> None:
    root = copy(name)
    expected = counts(root)
    for suffix in ("json", "xml", "yaml", "csv", "txt"):
        os.mkfifo(root / f"pipe.{suffix}")
    with ended_after(20):
        assert counts(root) == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pipe.json", "no annotations of split 'train'"),
        ("pipe.xml", "no annotations of split 'train'"),
        ("data.yaml", "is not a regular file; remove it"),
        ("instances_train.json", "is a named pipe, not a file"),
    ],
)
def test_a_named_pipe_is_no_annotation_file(name: str, words: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with ended_after(20), pytest.raises((UsageError, AnnotationError), match=words):
        open_dataset(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_named_pipe_is_no_map(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "map.png")
    with ended_after(20), pytest.raises(FileProblem, match="is a named pipe; remove it"):
        read_plane(tmp_path / "map.png")
