"""Sets that are wrong throughout: one finding with the cause and the count, and right values where they are certain."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskwright.data import DataWarning, InstanceDataset, check, read_coco
from maskwright.data.coco import read_table
from maskwright.data.table import Table
from maskwright.errors import AnnotationError
from maskwright.structures import rle
from tests.data.making import content, shared, write

pytestmark = pytest.mark.fast

HEIGHT, WIDTH = 48, 80
Change = Callable[[dict[str, Any]], None]


def made(images: int = 6, seed: int = 0) -> dict[str, Any]:
    """Two objects on each image of 80 x 48: rectangles with one corner cut off, anywhere in the image."""
    rng = np.random.default_rng(seed)
    data = content(images, (HEIGHT, WIDTH))
    for annotation in data["annotations"]:
        width, height = int(rng.integers(9, 30)), int(rng.integers(9, 20))
        x, y = int(rng.integers(0, WIDTH - width + 1)), int(rng.integers(0, HEIGHT - height + 1))
        ring = [x, y, x + width, y, x + width, y + height - 4, x + width - 4, y + height, x, y + height]
        annotation.update(
            segmentation=[[float(v) for v in ring]], bbox=[x, y, width, height], area=width * height - 8.0
        )
    return data


def saved(folder: Path, data: dict[str, Any]) -> Path:
    return write(folder, data, sizes={e["file_name"]: (HEIGHT, WIDTH) for e in data["images"]})


def objects(data: dict[str, Any], change: Callable[[dict[str, Any]], None], every: int = 0) -> dict[str, Any]:
    """The data with each annotation changed, except for every so-many-th one."""
    data = copy.deepcopy(data)
    for number, annotation in enumerate(data["annotations"]):
        if not every or number % every:
            change(annotation)
    return data


def points(annotation: dict[str, Any]) -> np.ndarray:
    return np.array(annotation["segmentation"][0]).reshape(-1, 2)


def table_of(folder: Path, data: dict[str, Any]) -> Table:
    return read_table(saved(folder, data))


def one_finding(table: Table, severity: str, *words: str) -> None:
    """There is one finding only, of this severity and with these words."""
    assert len(table.findings) == 1, [str(f) for f in table.findings]
    assert table.findings[0].severity == severity
    for word in words:
        assert word in str(table.findings[0])


def assert_right(table: Table, data: dict[str, Any], *, masks: bool = True, areas: bool = True) -> None:
    """The table has the boxes, masks and areas of `data`."""
    entries = {a["id"]: a for a in data["annotations"]}
    assert sorted(table.ids, key=str) == sorted(entries, key=str)
    true = [entries[number] for number in table.ids]
    xywh = np.array([a["bbox"] for a in true], float)
    np.testing.assert_allclose(table.boxes, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), atol=0.01)
    dataset = InstanceDataset(table)
    for index, size in enumerate(table.sizes):
        own = [a for a in true if a["image_id"] == table.image_ids[index]]
        target = dataset.targets(index)
        if masks:
            assert target.masks is not None
            expected = [int(a["area"] + 8) for a in own]  # the cut corner has 8 pixels
            assert np.abs(np.array(target.masks.areas()) - expected).max() <= 10
            x, y, width, height = own[0]["bbox"]
            plane = target.masks.dense()[0]
            assert plane.shape == size
            assert bool(plane[y + 1, x + 1])
            assert not bool(plane[y + height - 1, x + width - 1])  # masks are not mirrored
        else:
            assert target.masks is None
        if areas:
            assert np.abs(dataset.areas(index) - [a["area"] for a in own]).max() <= 10


# ---- boxes ---------------------------------------------------------------------------------------------------------

BOXES: dict[str, tuple[Callable[[float, float, float, float], list[float]], str]] = {
    "corners": (lambda x, y, w, h: [x, y, x + w, y + h], "corners x0, y0, x1, y1"),
    "centers": (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "center x, center y"),
    "bottom": (lambda x, y, w, h: [x, HEIGHT - y - h, w, h], "counted from the bottom"),
    "bottom edge": (lambda x, y, w, h: [x, y + h, w, h], "the bottom edge as y"),
    "shares": (lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], "shares of the image"),
    "shares of centers": (
        lambda x, y, w, h: [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT],
        "center x, center y, width, height as shares of the image",
    ),
    "y first": (lambda x, y, w, h: [y, x, y + h, x + w], "y0, x0, y1, x1"),
}


@pytest.mark.parametrize("form", BOXES)
@pytest.mark.parametrize("every", [0, 10])
def test_boxes_in_another_format_are_converted(tmp_path: Path, form: str, every: int):
    convert, words = BOXES[form]
    data = made(15)
    table = table_of(tmp_path, objects(data, lambda a: a.update(bbox=convert(*a["bbox"])), every))
    one_finding(table, "note", "boxes are", words, "they are converted")
    assert_right(table, data)


@pytest.mark.parametrize("form", ["corners", "centers", "shares", "shares of centers"])
@pytest.mark.parametrize("areas", [False, True])
def test_boxes_without_masks_are_converted_by_the_sizes_of_the_images(tmp_path: Path, form: str, areas: bool):
    data = made(20)
    for annotation in data["annotations"]:
        del annotation["segmentation"]
        if not areas:
            del annotation["area"]
    convert, words = BOXES[form]
    table = table_of(tmp_path, objects(data, lambda a: a.update(bbox=convert(*a["bbox"]))))
    assert [f.severity for f in table.findings] == ["note", "note"]
    assert words in str(table.findings[0])
    assert_right(table, data, masks=False, areas=areas)


def test_areas_tell_corners_from_sizes_where_images_do_not(tmp_path: Path):
    data = made(4)
    for annotation in data["annotations"]:
        annotation.update(segmentation=[], bbox=[2, 3, 12, 11], area=132)
    wrong = objects(data, lambda a: a.update(bbox=[2, 3, 14, 14]))
    table = table_of(tmp_path, wrong)
    assert "corners x0, y0, x1, y1, as their areas show" in str(table.findings[0])
    assert table.boxes.tolist() == [[2, 3, 14, 14]] * 8


def test_boxes_that_fit_in_two_formats_are_an_error_that_names_both(tmp_path: Path):
    data = made(1)
    for annotation, x in zip(data["annotations"], (0.4, 0.5), strict=True):
        annotation.update(segmentation=[], bbox=[x, 0.4, 0.45, 0.41])
    with pytest.raises(AnnotationError, match="they fit as x, y, width, height as shares of the image and as center"):
        read_coco(saved(tmp_path, data))


def test_single_wrong_boxes_stay_findings_of_single_annotations(tmp_path: Path):
    data = made(20)
    x, y, width, height = data["annotations"][5]["bbox"]
    data["annotations"][5]["bbox"] = [y, x, y + height, x + width]
    one_finding(table_of(tmp_path, data), "note", "annotation 6 has bbox")


# ---- outlines ------------------------------------------------------------------------------------------------------

OUTLINES: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "pairs": (lambda p: [p.tolist()], "lists of points [x, y]"),
    "one list of pairs": (lambda p: p.tolist(), "lists of points [x, y]"),
    "points with names": (lambda p: [[{"x": x, "y": y} for x, y in p.tolist()]], "lists of points"),
    "nested twice": (lambda p: [[p.ravel().tolist()]], "nested too deeply"),
    "shares": (lambda p: [(p / [WIDTH, HEIGHT]).ravel().tolist()], "relative to the image (0 ... 1)"),
}


@pytest.mark.parametrize("form", OUTLINES)
@pytest.mark.parametrize("every", [0, 10])
def test_outlines_in_another_form_are_read_rightly(tmp_path: Path, form: str, every: int):
    convert, words = OUTLINES[form]
    data = made(10)
    table = table_of(tmp_path, objects(data, lambda a: a.update(segmentation=convert(points(a))), every))
    one_finding(table, "note", words, f"{18 if every else 20} of 20")
    assert_right(table, data)


@pytest.mark.parametrize("boxes", [True, False])
def test_exchanged_x_and_y_are_an_error_that_the_copy_repairs(tmp_path: Path, boxes: bool):
    data = made(10)
    wrong = objects(data, lambda a: a.update(segmentation=[points(a)[:, ::-1].ravel().tolist()]))
    if not boxes:
        wrong = objects(wrong, lambda a: a.pop("bbox"))
    table = table_of(tmp_path / "set", wrong)
    one_finding(table, "error", "20 of 20" if boxes else "of 20 outlines reach out", "x and y exchanged", "--fix")
    with pytest.raises(AnnotationError, match="x and y exchanged"):
        read_coco(tmp_path / "set/annotations/instances_train.json")
    report = check(tmp_path / "set", tmp_path / "copy")
    assert not report.ok
    again = read_table(tmp_path / "copy/annotations/instances_train.json")
    assert not again.findings
    assert_right(again, data)


def test_outlines_for_larger_images_are_scaled_by_their_boxes(tmp_path: Path):
    data = made(10)
    wrong = objects(data, lambda a: a.update(segmentation=[(2.5 * points(a)).ravel().tolist()]))
    table = table_of(tmp_path, wrong)
    one_finding(table, "error", "0.4 times as large", "the boxes lie inside the images", "--fix")
    assert_right(table, data)


def scaled(data: dict[str, Any], factor: float) -> dict[str, Any]:
    return objects(
        data,
        lambda a: a.update(
            segmentation=[(factor * points(a)).ravel().tolist()],
            bbox=[factor * v for v in a["bbox"]],
            area=factor * factor * a["area"],
        ),
    )


@pytest.mark.parametrize("images", [2, 12])
def test_images_that_were_reduced_are_an_error_and_not_repaired_without_evidence(tmp_path: Path, images: int):
    path = saved(tmp_path / "set", scaled(made(images), 2))
    with pytest.raises(AnnotationError, match="outlines reach out of their images, up to 2 times as far"):
        read_coco(path)
    report = check(tmp_path / "set", tmp_path / "copy")
    assert not report.ok
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("codes", [False, True])
def test_listed_sizes_tell_how_images_were_resized(tmp_path: Path, factor: float, codes: bool):
    data = made(12)
    wrong = scaled(data, factor)
    height, width = int(HEIGHT * factor), int(WIDTH * factor)
    for entry in wrong["images"]:
        entry.update(height=height, width=width)
    if codes:
        from maskwright.structures import Masks

        for annotation in wrong["annotations"]:
            code = Masks.from_polygons([[points(annotation)]], (height, width)).rle()[0]
            annotation["segmentation"] = {"size": [height, width], "counts": code["counts"].decode()}
    table = table_of(tmp_path, wrong)
    one_finding(table, "error", "12 of 12 images have another size than listed", "the images were resized", "--fix")
    assert_right(table, data) if factor > 1 or not codes else None
    assert len(table.ids) == 24


def test_wrong_listed_sizes_are_told_from_resized_images(tmp_path: Path):
    data = made(12)
    wrong = copy.deepcopy(data)
    for entry in wrong["images"]:
        entry.update(height=HEIGHT // 2, width=WIDTH // 2)
    table = table_of(tmp_path, wrong)
    one_finding(table, "error", "the annotations are for the size of the file", "--fix")
    assert_right(table, data)


def test_listed_sizes_that_nothing_decides_are_an_error(tmp_path: Path):
    data = made(1)
    for annotation in data["annotations"]:
        annotation.update(segmentation=[[1, 1, 15, 1, 15, 12]], bbox=[1, 1, 14, 11], area=77)
    data["images"][0].update(height=2 * HEIGHT, width=2 * WIDTH)
    one_finding(table_of(tmp_path, data), "error", "cannot be decided")


# ---- run-length codes ----------------------------------------------------------------------------------------------


def coded(order: str, *, turned: bool = False, text: bool = False) -> Callable[[dict[str, Any]], None]:
    """A change to a run-length code counted in NumPy's order "F" (column by column) or "C"."""

    def change(annotation: dict[str, Any]) -> None:
        from maskwright.structures import Masks

        plane = Masks.from_polygons([[points(annotation)]], (HEIGHT, WIDTH)).dense()[0].numpy()
        flat = np.concatenate([[False], plane.ravel(order=order), [True]])
        counts = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])]))
        if counts.sum() < plane.size:
            counts = np.append(counts, plane.size - counts.sum())
        annotation["segmentation"] = {
            "size": [WIDTH, HEIGHT] if turned else [HEIGHT, WIDTH],
            "counts": rle.encode_counts(counts).decode() if text else counts.tolist(),
        }

    return change


@pytest.mark.parametrize("text", [False, True])
def test_codes_counted_row_by_row_are_read_so_if_their_boxes_show_it(tmp_path: Path, text: bool):
    data = made(6)
    assert not table_of(tmp_path, objects(data, coded("F", text=text))).findings
    table = table_of(tmp_path, objects(data, coded("C", text=text)))
    one_finding(table, "note", "12 of 12 run-length codes are counted row by row")
    assert_right(table, data)


def test_codes_counted_row_by_row_without_boxes_are_an_error_that_the_copy_repairs(tmp_path: Path):
    data = made(6)
    wrong = objects(objects(data, coded("C")), lambda a: a.pop("bbox"))
    table = table_of(tmp_path, wrong)
    one_finding(table, "error", "compact row by row", "--fix")
    assert_right(table, data)


def test_codes_in_the_notation_of_bytes_are_read(tmp_path: Path):
    data = made(6)
    wrong = objects(data, coded("F", text=True))
    for annotation in wrong["annotations"]:
        code = annotation["segmentation"]
        code["counts"] = str(code["counts"].encode())
    table = table_of(tmp_path, wrong)
    one_finding(table, "note", "12 of 12 run-length codes are Python's notation of bytes")
    assert_right(table, data)


@pytest.mark.parametrize("order", ["F", "C"])
def test_codes_with_width_before_height(tmp_path: Path, order: str):
    data = made(6)
    table = table_of(tmp_path, objects(data, coded(order, turned=True)))
    one_finding(table, "note", "12 of 12 run-length codes have a size [width, height]")
    assert_right(table, data)
    wrong = objects(objects(data, coded(order, turned=True)), lambda a: a.pop("bbox"))
    one_finding(table_of(tmp_path, wrong), "error", "cannot be decided")


# ---- areas and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 10])
def test_areas_of_the_images_are_replaced(tmp_path: Path, every: int):
    data = made(10)
    table = table_of(tmp_path, objects(data, lambda a: a.update(area=HEIGHT * WIDTH), every))
    one_finding(table, "note", f"{18 if every else 20} of 20 areas are height * width of the image")
    assert_right(table, data)


@pytest.mark.parametrize("factor", [0.01, 3.7, 1 / (HEIGHT * WIDTH)])
def test_areas_in_another_unit_are_replaced(tmp_path: Path, factor: float):
    data = made(8)
    table = table_of(tmp_path, objects(data, lambda a: a.update(area=a["area"] * factor)))
    one_finding(table, "note", "16 of 16 areas are")
    assert_right(table, data)


def test_areas_of_boxes_are_used_as_given(tmp_path: Path):
    data = made(12)
    triangles = objects(data, lambda a: a.update(segmentation=[points(a)[[0, 1, 4]].ravel().tolist()]))
    for annotation in triangles["annotations"]:
        annotation["area"] = float(annotation["bbox"][2] * annotation["bbox"][3])
    table = table_of(tmp_path, triangles)
    assert not table.findings
    assert sorted(table.areas) == sorted(a["area"] for a in triangles["annotations"])
    alone = objects(data, lambda a: a.update(segmentation=[], area=0.6 * a["area"]))
    one_finding(table_of(tmp_path, alone), "note", "boxes, but no masks")


def test_all_objects_marked_crowd_are_an_error_that_the_copy_repairs(tmp_path: Path):
    data = made(3)
    path = saved(tmp_path / "set", objects(data, lambda a: a.update(iscrowd=1)))
    with pytest.raises(AnnotationError, match="6 of 6 annotations are marked crowd"):
        read_coco(path)
    assert not check(tmp_path / "set", tmp_path / "copy").ok
    copied = read_table(tmp_path / "copy/annotations/instances_train.json")
    assert not copied.findings
    assert not copied.crowd.any()
    wrong = objects(data, lambda a: a.update(iscrowd=1), 5)
    one_finding(read_table(saved(tmp_path / "set", wrong)), "note", "4 of 6 annotations are marked crowd")
    one_finding(table := read_table(saved(tmp_path / "set", objects(data, lambda a: a.update(ignore=1), 2))), "note")
    assert "3 of 6 annotations have the flag 'ignore'" in str(table.findings[0])
    assert table.crowd.tolist() == [False, True] * 3
    both = objects(data, lambda a: a.update(ignore=1, iscrowd=1), 2)
    assert not read_table(saved(tmp_path / "set", both)).findings


# ---- ids, images and objects that occur twice ----------------------------------------------------------------------


def test_annotations_without_ids_are_numbered(tmp_path: Path):
    data = made(3)
    table = table_of(tmp_path, objects(data, lambda a: a.pop("id")))
    one_finding(table, "note", "6 of 6 annotations have no valid id")
    assert table.ids == [1, 2, 3, 4, 5, 6]
    wrong = objects(data, lambda a: a.update(id=None), 3)
    assert table_of(tmp_path, wrong).ids == [1, 5, 6, 4, 7, 8]


@pytest.mark.parametrize("form", [str, float, "{:08d}".format, "{:.1f}".format])
def test_ids_as_text_or_floats_are_matched(tmp_path: Path, form: Callable[[int], Any]):
    data = made(3)
    change: Callable[[dict[str, Any]], None] = lambda a: a.update(  # noqa: E731
        image_id=form(a["image_id"]), category_id=form(a["category_id"])
    )
    table = table_of(tmp_path, objects(data, change))
    assert_right(table, data | {"annotations": data["annotations"]})
    for entry in data["images"]:
        entry["id"] = f"{entry['id']:06d}"
    table = table_of(tmp_path, data)
    assert table.image_ids == ["000001", "000002", "000003"]
    assert table.image_index.tolist() == [0, 0, 1, 1, 2, 2]


def test_annotations_that_name_the_file_or_the_class(tmp_path: Path):
    data = made(3)
    wrong = objects(data, lambda a: a.update(image_id=f"{a['image_id']}.png"))
    one_finding(table := table_of(tmp_path, wrong), "note", "6 of 6 annotations name the file of their image")
    assert table.image_index.tolist() == [0, 0, 1, 1, 2, 2]
    wrong = objects(data, lambda a: a.update(category_id="cup"))
    one_finding(table := table_of(tmp_path, wrong), "note", "have the name of a category")
    assert table.labels.tolist() == [0] * 6


def test_ids_of_nothing_are_one_error(tmp_path: Path):
    data = made(3)
    wrong = objects(data, lambda a: a.update(image_id=a["image_id"] + 100))
    one_finding(table_of(tmp_path, wrong), "error", "6 of 6 annotations have an image_id", "'101'", "the list has 1, 2")
    wrong = objects(data, lambda a: a.update(category_id=7))
    one_finding(table_of(tmp_path, wrong), "error", "6 of 6 annotations have category_id 7", "3 ('cup'), 90 ('spoon')")
    one = objects(data | {"categories": data["categories"][:1]}, lambda a: a.update(category_id=0))
    one_finding(table := table_of(tmp_path, one), "note", "the only category is 3 ('cup')")
    assert table.labels.tolist() == [0] * 6


def test_category_ids_that_count_from_zero_are_not_read_as_others(tmp_path: Path):
    data = made(3)
    data["categories"] = [{"id": 1, "name": "cup"}, {"id": 2, "name": "spoon"}]
    wrong = objects(data, lambda a: a.update(category_id={3: 0, 90: 1}[a["category_id"]]))
    one_finding(table_of(tmp_path, wrong), "error", "3 of 6 annotations have category_id 0, and none has 2")


def test_exact_copies_of_objects_are_read_once(tmp_path: Path):
    data = made(3)
    wrong = data | {"annotations": [*data["annotations"], *({**a, "id": a["id"] + 50} for a in data["annotations"])]}
    one_finding(table := table_of(tmp_path, wrong), "note", "6 of 12 annotations are exact copies", "read once")
    assert_right(table, data)


def test_images_that_are_listed_twice(tmp_path: Path):
    data = made(3)
    wrong = data | {"images": [*data["images"], *data["images"]]}
    one_finding(table := table_of(tmp_path, wrong), "note", "3 of 6 entries of images occur twice")
    assert_right(table, data)
    again = [{**e, "id": e["id"] + 10} for e in data["images"]]
    wrong = data | {"images": [*data["images"], *again]}
    one_finding(table := table_of(tmp_path, wrong), "note", "3 of 3 image files are listed under several ids")
    assert_right(table, data)
    copies = [{**a, "id": a["id"] + 50, "image_id": a["image_id"] + 10} for a in data["annotations"]]
    both = wrong | {"annotations": [*data["annotations"], *copies]}
    assert_right(table_of(tmp_path, both), data)
    other = [{**a, "id": a["id"] + 50, "image_id": a["image_id"] + 10} for a in made(3, seed=5)["annotations"]]
    wrong["annotations"] = [*data["annotations"], *other]
    one_finding(table_of(tmp_path, wrong), "error", "3 of 3 image files", "with different objects", "images 1 and 11")


# ---- keys and names ------------------------------------------------------------------------------------------------


def with_key_twice(folder: Path, data: dict[str, Any], first: str, second: str) -> Table:
    path = saved(folder, data)
    text = path.read_text()
    assert first in text
    path.write_text(text.replace(first, second))
    return read_table(path)


def test_keys_that_occur_twice(tmp_path: Path):
    data = made(2)
    two = json.dumps(data["annotations"][:1])
    one_finding(
        with_key_twice(tmp_path, data, '"annotations":', f'"annotations": {two}, "annotations":'),
        "error", "key 'annotations' occurs more than once at the top level, with different values",
    )  # fmt: skip
    table = with_key_twice(tmp_path, data, '"annotations":', '"annotations": [], "annotations":')
    one_finding(table, "note", "key 'annotations' occurs more than once")
    assert_right(table, data)
    table = with_key_twice(tmp_path, data, '"categories":', '"annotations": [], "categories":')
    assert_right(table, data)
    one_finding(
        with_key_twice(tmp_path, data, '"iscrowd": 0', '"iscrowd": 0, "iscrowd": 1'),
        "error", "key 'iscrowd' occurs more than once in 4 objects",
    )  # fmt: skip
    one_finding(with_key_twice(tmp_path, data, '"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0'), "note", "in 4 objects")


def test_class_names_are_one_line_of_text(tmp_path: Path):
    data = made(2)
    names = ["", " \t", "a\nb\r\n c ", "x" * 3000, "\x1b[31mred", None, 7]
    data["categories"] = [{"id": 3 + number, "name": name} for number, name in enumerate(names)]
    for annotation in data["annotations"]:
        annotation["category_id"] = 3
    table = table_of(tmp_path, data)
    assert table.classes[:3] == ("category 3", "category 4", "a b c")
    assert table.classes[3] == "x" * 197 + "..."
    assert table.classes[4:] == ("[31mred", "category 8", "7")
    assert [f.severity for f in table.findings] == ["note", "note"]
    assert "3 of 7 categories have no name" in str(table.findings[0])
    assert "4 of 7 class names are not one line of text" in str(table.findings[1])
    assert "\x1b" not in str(table.findings[1])


def test_class_names_that_are_nearly_the_same(tmp_path: Path):
    data = made(2)
    data["categories"] = [{"id": n, "name": name} for n, name in ((3, "cup"), (5, "Cup"), (90, "c up"), (91, "dish"))]
    one_finding(table := table_of(tmp_path, data), "note", "3 class names differ only in case or blanks", "'Cup'")
    assert table.classes == ("cup", "Cup", "c up", "dish")


# ---- boxes and keypoints without masks -----------------------------------------------------------------------------


def test_sets_with_boxes_only_are_read(tmp_path: Path):
    data = made(3)
    path = saved(tmp_path / "set", objects(data, lambda a: a.update(segmentation=[])))
    with pytest.warns(DataWarning, match="its 6 annotations have boxes, but no masks; systems of boxes can be trained"):
        dataset = read_coco(path, strict=True)
    assert dataset.targets(0).masks is None
    assert dataset.targets(0).boxes.shape == (2, 4)
    assert dataset.areas(0).tolist() == [a["area"] for a in data["annotations"][:2]]
    assert check(tmp_path / "set", tmp_path / "copy").ok
    assert_right(read_table(tmp_path / "copy/annotations/instances_train.json"), data, masks=False)


def test_damaged_boxes_of_sets_without_masks_are_skipped(tmp_path: Path):
    data = objects(made(6), lambda a: a.pop("segmentation"))
    for annotation, box in zip(data["annotations"], ([500, 5, 10, 10], [1, 2, 0, 5], None, [1, 2, 3]), strict=False):
        annotation["bbox"] = box
    table = table_of(tmp_path, data)
    assert table.ids == [5, 6, 7, 8, 9, 10, 11, 12]
    assert [f.annotation for f in table.findings_with("skip")] == [1, 2, 3, 4]
    words = str(table.findings)
    assert "outside its image of 80 x 48" in words
    assert "has neither a segmentation nor a bbox" in words


def test_sets_with_keypoints_only_are_read(tmp_path: Path):
    data = objects(made(2), lambda a: (a.pop("segmentation"), a.pop("bbox"), a.pop("area")))
    for entry in data["categories"]:
        entry["keypoints"] = ["head", "hand", "foot"]
    for annotation in data["annotations"]:
        annotation["keypoints"] = [10, 20, 2, 30, 12, 1, 0, 0, 0]
    table = table_of(tmp_path, data)
    assert [f.severity for f in table.findings] == ["note", "note"]
    assert "the box around the keypoints is used" in str(table.findings[0])
    assert "boxes and keypoints, but no masks" in str(table.findings[1])
    target = InstanceDataset(table).targets(0)
    assert target.boxes.tolist() == [[10.5, 12.5, 30.5, 20.5]] * 2
    assert target.keypoints is not None
    assert target.keypoints[0, 0].tolist() == [10.5, 20.5, 2]


def test_a_set_without_masks_and_boxes_is_an_error(tmp_path: Path):
    data = objects(made(2), lambda a: (a.pop("segmentation"), a.pop("bbox")))
    one_finding(table_of(tmp_path, data), "error", "4 annotations have neither a segmentation nor a valid bbox")


def test_few_masks_missing_among_many(tmp_path: Path):
    data = objects(made(10), lambda a: a.update(segmentation=[]), 3)
    table = table_of(tmp_path, data)
    one_finding(table, "skip", "13 of 20 annotations have no segmentation: 2, 3, 5 and 10 more")
    assert len(table.ids) == 7


# ---- no false alarms -----------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_correct_sets_of_any_size_have_no_findings(tmp_path: Path, images: int, seed: int):
    data = made(images, seed)
    for wrong in (data, objects(data, coded("F")), objects(data, lambda a: (a.pop("bbox"), a.pop("area")))):
        assert not table_of(tmp_path, wrong).findings
    alone = objects(data, lambda a: a.update(segmentation=[]))
    one_finding(table := table_of(tmp_path, alone), "note", "boxes, but no masks")
    assert_right(table, data, masks=False)
    corner = objects(data, lambda a: a.update(segmentation=[[0, 0, 9, 0, 9, 9 + a["id"]]], bbox=None, area=None))
    assert not table_of(tmp_path, corner).findings


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["coco-mini", "pedestrians", "nuclei", "balloons", "fruits-nuts", "formats/coco"])
def test_real_sets_have_no_findings(name: str):
    folder = shared(name)
    for path in sorted(folder.rglob("*.json")):
        table = read_table(path, verify="none")
        assert not table.findings, [str(f) for f in table.findings]
        raw = json.loads(path.read_text())
        assert len(table.ids) == len(raw["annotations"])
        # A few images of a set are a set too.
        for number in range(4):
            some = {e["id"] for e in raw["images"][number :: max(4, len(raw["images"]) // 2)]}
            part = {
                **raw,
                "images": [e for e in raw["images"] if e["id"] in some],
                "annotations": [a for a in raw["annotations"] if a["image_id"] in some],
            }
            assert_no_finding(part, table.folder)


def assert_no_finding(data: dict[str, Any], folder: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Path(place) / "instances_part.json"
        path.write_text(json.dumps(data))
        table = read_table(path, folder, verify="none")
    assert not table.findings, [str(f) for f in table.findings]
