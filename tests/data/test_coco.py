"""Reading COCO files: intact entries are read exactly; damaged ones are skipped with a message, or an error."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from maskwright.data import DataWarning, read_coco
from maskwright.errors import AnnotationError, ImageError, UsageError
from tests.data.making import OTHER, SQUARE, content, pixels, write

pytestmark = pytest.mark.fast


def second(**changes: Any) -> dict[str, Any]:
    """A data set whose annotation 2 is changed; None removes a key."""
    data = content()
    data["annotations"][1].update(changes)
    for key in [k for k, v in changes.items() if v is None]:
        del data["annotations"][1][key]
    return data


def rle(plane: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(plane.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def plane(x0: int = 35, y0: int = 20, x1: int = 55, y1: int = 35, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    result = np.zeros(size, bool)
    result[y0:y1, x0:x1] = True
    return result


# ---- intact data ---------------------------------------------------------------------------------------------------


def test_an_intact_data_set_is_read_exactly(tmp_path: Path):
    dataset = read_coco(write(tmp_path, content(2)), strict=True)
    assert (dataset.classes, dataset.category_ids) == (("cup", "spoon"), (3, 90))
    assert dataset.image_ids() == [1, 2]
    assert dataset.sizes() == [(40, 60), (40, 60)]
    sample = dataset[1]
    assert (sample.image.permute(1, 2, 0).numpy() == pixels()).all()
    assert sample.path == tmp_path / "train" / "2.png"
    target = sample.target
    assert target.labels.tolist() == [0, 1]
    assert target.boxes.tolist() == [[10, 5, 30, 25], [35, 20, 55, 35]]
    assert target.ids is not None
    assert target.ids.tolist() == [3, 4]
    assert target.crowd is not None
    assert not target.crowd.any()
    assert target.masks is not None
    assert target.masks.kind == "polygon"
    assert (target.masks.dense().numpy() == np.stack([plane(10, 5, 30, 25), plane()])).all()
    assert dataset.areas(1).tolist() == [400, 300]


def test_annotations_are_read_without_decoding_images(tmp_path: Path):
    path = write(tmp_path, content())
    dataset = read_coco(path)
    (tmp_path / "train" / "1.png").unlink()
    assert len(dataset.targets(0)) == 2
    with pytest.raises(ImageError, match=r"1\.png: no such file"):
        dataset[0]


@pytest.mark.parametrize("form", ["compressed", "counts"])
def test_compressed_and_uncompressed_run_lengths(tmp_path: Path, form: str):
    lengths = [35 * 40 + 20, *([15, 25] * 19), 15, 5 + 5 * 40]
    code = rle(plane()) if form == "compressed" else {"size": [40, 60], "counts": lengths}
    target = read_coco(write(tmp_path, second(segmentation=code)), strict=True).targets(0)
    assert target.masks is not None
    assert (target.masks.dense()[1].numpy() == plane()).all()
    assert target.masks.areas().tolist() == [400, 300]


def test_crowd_regions_are_marked(tmp_path: Path):
    target = read_coco(write(tmp_path, second(iscrowd=1)), strict=True).targets(0)
    assert target.crowd is not None
    assert target.crowd.tolist() == [False, True]


def test_objects_with_several_parts(tmp_path: Path):
    target = read_coco(write(tmp_path, second(segmentation=[OTHER, SQUARE], bbox=None)), strict=True).targets(0)
    assert target.masks is not None
    assert target.masks.areas().tolist() == [400, 700]
    assert target.boxes[1].tolist() == [10, 5, 55, 35]


def test_images_without_objects_are_part_of_the_data_set(tmp_path: Path):
    data = content(3)
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 2]
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert [len(dataset[i].target) for i in range(3)] == [2, 0, 2]
    assert dataset[1].target.masks is not None


def test_a_file_without_annotations_is_a_data_set_of_empty_images(tmp_path: Path):
    data = content(2)
    data["annotations"] = []
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert [len(dataset.targets(i)) for i in range(2)] == [0, 0]
    assert dataset.areas(0).shape == (0,)


def test_a_byte_order_mark_and_non_ascii_names(tmp_path: Path):
    data = content()
    data["images"][0]["file_name"] = "Ünïcödé 图片 (1).png"
    data["categories"][0]["name"] = "行人 🚶"
    path = write(tmp_path, data)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset = read_coco(path, strict=True)
    assert dataset.classes[0] == "行人 🚶"
    assert dataset[0].path is not None
    assert dataset[0].path.name == "Ünïcödé 图片 (1).png"


def test_ids_stay_exact_beyond_64_bits(tmp_path: Path):
    data = content()
    data["images"][0]["id"] = 2**63
    for number, annotation in enumerate(data["annotations"]):
        annotation.update(image_id=2**63, id=10**18 + 7 + number)
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert dataset.image_ids() == [2**63]
    assert dataset.annotation_ids(0) == [10**18 + 7, 10**18 + 8]
    ids = dataset.targets(0).ids
    assert ids is not None
    assert ids.tolist() == [10**18 + 7, 10**18 + 8]
    data["annotations"][1]["id"] = 2**64
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert dataset.annotation_ids(0) == [10**18 + 7, 2**64]
    ids = dataset.targets(0).ids
    assert ids is not None
    assert ids.tolist() == [0, 1]


def test_string_ids_are_kept_and_numeric_strings_are_matched(tmp_path: Path):
    data = content(2)
    data["images"][0]["id"] = "abc"
    for annotation in data["annotations"]:
        annotation["image_id"] = "abc" if annotation["image_id"] == 1 else "2"
        annotation["category_id"] = str(annotation["category_id"])
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert dataset.image_ids() == ["abc", 2]
    assert [len(dataset.targets(i)) for i in range(2)] == [2, 2]


@pytest.mark.parametrize("ids", [(0, 1), (90, 3), (1000, 7)])
def test_labels_follow_category_ids_in_ascending_order(tmp_path: Path, ids: tuple[int, int]):
    data = content()
    for entry, number in zip(data["categories"], ids, strict=True):
        entry["id"] = number
    for annotation, number in zip(data["annotations"], ids, strict=True):
        annotation["category_id"] = number
    dataset = read_coco(write(tmp_path, data), strict=True)
    assert dataset.category_ids == tuple(sorted(ids))
    named = [dataset.classes[label] for label in dataset.targets(0).labels.tolist()]
    assert named == ["cup", "spoon"]
    back = [r["category_id"] for r in dataset.targets(0).to_coco(1, dataset.category_ids)]
    assert back == list(ids)


def test_keypoints_are_shifted_by_half_a_pixel(tmp_path: Path):
    data = content()
    for entry in data["categories"]:
        entry["keypoints"] = ["left_tip", "right_tip"]
    data["annotations"][0]["keypoints"] = [12, 7, 2, 0, 0, 0]
    dataset = read_coco(write(tmp_path, data))
    assert dataset.keypoint_names == ("left_tip", "right_tip")
    points = dataset.targets(0).keypoints
    assert points is not None
    assert points.tolist() == [[[12.5, 7.5, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    data["annotations"][1]["keypoints"] = [12, 7, 2]
    with pytest.warns(DataWarning, match="annotation 2 has keypoints that are not 2 times x, y and 0, 1 or 2"):
        assert len(read_coco(write(tmp_path, data)).targets(0)) == 2


# ---- annotations that are repaired or skipped ----------------------------------------------------------------------

SKIPPED = {
    "two points": ({"segmentation": [[10, 10, 50, 30]]}, "a polygon of 2 points; at least 3 are needed"),
    "odd count": ({"segmentation": [[*OTHER, 3.0]]}, "a polygon of 9 numbers, an odd count"),
    "NaN": ({"segmentation": [[*OTHER[:4], math.nan, *OTHER[5:]]]}, "a coordinate that is not a finite number"),
    "infinity": ({"segmentation": [[*OTHER[:4], -math.inf, *OTHER[5:]]]}, "a coordinate that is not a finite number"),
    "far away": ({"segmentation": [[*OTHER[:4], 1e300, *OTHER[5:]]]}, "a coordinate beyond the limit of 1e.07 pixels"),
    "null inside": ({"segmentation": [[*OTHER[:4], None, *OTHER[5:]]]}, "a coordinate that is not a finite number"),
    "words": ({"segmentation": [[*OTHER[:4], "far", *OTHER[5:]]]}, "a coordinate that is not a finite number"),
    "mixed nesting": ({"segmentation": [[[1, 2], 3, 4, 5, 9, 8]]}, "not a flat list x, y"),
    "outside": ({"segmentation": [[100, 100, 120, 100, 120, 130]]}, "a polygon outside its image of 60 x 40"),
    "beside": ({"segmentation": [[-40, 5, -5, 5, -5, 30]]}, "a polygon outside its image"),
    "on a line": ({"segmentation": [[10, 10, 20, 20, 30, 30]]}, "a polygon without area: its points are collinear"),
    "one point": ({"segmentation": [[9, 9] * 4]}, "a polygon without area: its points are collinear"),
    "too thin": ({"segmentation": [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]]}, "covers no pixel of its image"),
    "no shape": ({"segmentation": []}, "an empty segmentation; a mask is required"),
    "no key": ({"segmentation": None}, "no segmentation; a mask is required"),
    "a number": ({"segmentation": 7}, "a segmentation of type int; expected polygons"),
    "short code": ({"segmentation": {"size": [40, 60], "counts": [100, 50]}}, "of 150 pixels, but its image has 2400"),
    "long code": ({"segmentation": {"size": [40, 60], "counts": [2400, 50]}}, "of 2450 pixels"),
    "wrapping code": (
        {"segmentation": {"size": [40, 60], "counts": [2**62, 2**62, 2**62, 2**62, 2400]}},
        "pixels, but its image has 2400",
    ),
    "negative code": ({"segmentation": {"size": [40, 60], "counts": [2500, -100]}}, "run-length code"),
    "broken runs": ({"segmentation": {"size": [40, 60], "counts": [2300.5, 99.5]}}, "2300.5 is not a run length"),
    "other size": (
        {"segmentation": {"size": [80, 120], "counts": [9600 - 5, 5]}},
        "of size .80, 120., but its image is",
    ),
    "swapped": ({"segmentation": {"size": [60, 40], "counts": [2395, 5]}}, "that is .width, height.; expected"),
    "garbage": ({"segmentation": {"size": [40, 60], "counts": "\x01\x02 ~~"}}, "an invalid run-length code"),
    "cut": ({"segmentation": {"size": [40, 60], "counts": rle(plane())["counts"][:9]}}, "run-length code"),
    "not ascii": ({"segmentation": {"size": [40, 60], "counts": "图片"}}, "an invalid run-length code"),
    "empty code": ({"segmentation": {"size": [40, 60], "counts": [2400]}}, "without foreground pixels"),
    "no runs": ({"segmentation": {"size": [40, 60], "counts": []}}, "run-length code of 0 pixels"),
    "no size": ({"segmentation": {"counts": [2400]}}, "without a size"),
    "no image": ({"image_id": 777}, "has image_id 777, which is not in the list of images"),
    "no class": ({"category_id": 55}, "has category_id 55, which is not in the list of categories"),
    "crowd": ({"iscrowd": "no"}, "has iscrowd 'no'; expected 0 or 1"),
}


@pytest.mark.parametrize("damage", SKIPPED)
def test_a_damaged_annotation_is_skipped_or_an_error(tmp_path: Path, damage: str):
    changes, words = SKIPPED[damage]
    path = write(tmp_path, second(**changes))
    with pytest.warns(
        DataWarning, match=f"instances_train.json: annotation 2 .*{words}.*; the annotation is skipped"
    ) as caught:
        dataset = read_coco(path)
    assert len(caught) == 1
    target = dataset.targets(0)
    assert dataset.annotation_ids(0) == [1]
    assert target.masks is not None
    assert target.masks.areas().tolist() == [400]
    with pytest.raises(AnnotationError, match=f"annotation 2 .*{words}"):
        read_coco(path, strict=True)


REPAIRED = {
    "no bbox": ({"bbox": None}, None),
    "null bbox": ({"bbox": [None] * 4}, "the box of the mask is used"),
    "negative bbox": ({"bbox": [5, 5, -20, 0]}, "the box of the mask is used"),
    "bbox elsewhere": ({"bbox": [0, 0, 5, 5]}, r"has bbox \[0, 0, 5, 5\], which does not match its mask"),
    "bbox in words": ({"bbox": "10,10,50,50"}, "the box of the mask is used"),
    "bbox NaN": ({"bbox": [math.nan, 1, 2, 3]}, "the box of the mask is used"),
    "flat list": ({"segmentation": OTHER}, "flat list of numbers as its segmentation, which is read as one polygon"),
    "stray part": ({"segmentation": [OTHER, [1, 1, 2, 2]]}, "1 polygons with fewer than 3 points among others"),
}


@pytest.mark.parametrize("damage", REPAIRED)
def test_unambiguous_errors_are_repaired(tmp_path: Path, damage: str):
    changes, words = REPAIRED[damage]
    path = write(tmp_path, second(**changes))
    if words is None:
        dataset = read_coco(path)
    else:
        with pytest.warns(DataWarning, match=f"annotation 2 .*{words}"):
            dataset = read_coco(path)
    target = dataset.targets(0)
    assert target.boxes.tolist() == [[10, 5, 30, 25], [35, 20, 55, 35]]
    assert target.masks is not None
    assert target.masks.areas().tolist() == [400, 300]


def test_a_box_slightly_larger_than_the_mask_is_kept(tmp_path: Path):
    dataset = read_coco(write(tmp_path, second(bbox=[34, 19, 22, 17])))
    assert dataset.targets(0).boxes[1].tolist() == [34, 19, 56, 36]


@pytest.mark.parametrize("area", [None, "many", -3, 0, math.nan, 1e12])
def test_invalid_areas_are_replaced_by_those_of_the_masks(tmp_path: Path, area: Any):
    path = write(tmp_path, second(area=area))
    if area is None:
        dataset = read_coco(path)
    else:
        with pytest.warns(DataWarning, match="annotation 2 has invalid area .*the area of the mask is used"):
            dataset = read_coco(path)
    assert dataset.areas(0).tolist() == [400, 300]


def test_polygons_are_clipped_at_the_image_border(tmp_path: Path):
    ring = [-20.0, -20.0, 20.0, -20.0, 20.0, 20.0, -20.0, 20.0]
    target = read_coco(write(tmp_path, second(segmentation=[ring], bbox=None))).targets(0)
    assert target.masks is not None
    assert target.masks.areas().tolist() == [400, 400]
    assert target.boxes[1].tolist() == [0, 0, 20, 20]


def test_a_bow_tie_is_filled_on_both_sides(tmp_path: Path):
    ring = [10.0, 10.0, 50.0, 30.0, 50.0, 10.0, 10.0, 30.0]
    target = read_coco(write(tmp_path, second(segmentation=[ring], bbox=None))).targets(0)
    assert target.masks is not None
    mask = target.masks.dense()[1]
    assert mask[20, 12]
    assert mask[20, 48]
    assert abs(int(mask.sum()) - 400) < 40


def test_large_coordinates_need_no_memory(tmp_path: Path):
    ring = [-9e6, -9e6, 9e6, -9e6, 9e6, 9e6, -9e6, 9e6]
    target = read_coco(write(tmp_path, second(segmentation=[ring], bbox=None))).targets(0)
    assert target.masks is not None
    assert target.masks.areas().tolist() == [400, 2400]


def test_annotations_with_the_same_id_are_both_kept(tmp_path: Path):
    with pytest.warns(DataWarning, match=r"annotations\[0\] and annotations\[1\] share id 1; both are kept"):
        dataset = read_coco(write(tmp_path, second(id=1)))
    assert len(dataset.targets(0)) == 2


def test_a_warning_about_many_findings_is_short(tmp_path: Path):
    data = content(40)
    for annotation in data["annotations"]:
        if annotation["category_id"] == 90:
            annotation["segmentation"] = [[1, 2, 3, 4]]
    with pytest.warns(DataWarning, match="and 37 more of the same kind") as caught:
        read_coco(write(tmp_path, data))
    assert str(caught[0].message).count("\n") == 3


# ---- unusable data sets --------------------------------------------------------------------------------------------


def test_classes_with_the_same_name_are_kept_apart(tmp_path: Path):
    data = content()
    data["categories"][1]["name"] = "cup"
    with pytest.warns(DataWarning, match="categories 3 and 90 have the same name 'cup'; both are kept"):
        dataset = read_coco(write(tmp_path, data))
    assert dataset.classes == ("cup", "cup (90)")
    assert dataset.targets(0).labels.tolist() == [0, 1]


def damaged(change) -> dict[str, Any]:
    data = content(2)
    change(data)
    return data


UNUSABLE = {
    "image ids": (lambda d: d["images"][1].update(id=1), "two images share id 1"),
    "category ids": (lambda d: d["categories"][1].update(id=3), "category id 3 is used for both 'cup' and 'spoon'"),
    "no annotations": (lambda d: d.pop("annotations"), "key 'annotations' is missing"),
    "no categories": (lambda d: d.pop("categories"), "key 'categories' is missing"),
    "no images": (lambda d: d.pop("images"), "key 'images' is missing"),
    "empty categories": (lambda d: d.update(categories=[]), "'categories' is empty"),
    "annotations of another kind": (
        lambda d: d.update(annotations={}),
        "'annotations' must be a list, got a value of type dict",
    ),
    "upwards": (
        lambda d: d["images"][0].update(file_name="../../etc/passwd"),
        "is outside the image folder; it was not opened",
    ),
    "absolute": (
        lambda d: d["images"][0].update(file_name="/etc/hostname"),
        "is outside the image folder; it was not opened",
    ),
    "backslash": (
        lambda d: d["images"][0].update(file_name="..\\secret.png"),
        "is outside the image folder; it was not opened",
    ),
    "drive": (
        lambda d: d["images"][0].update(file_name="C:\\secret.png"),
        "is outside the image folder; it was not opened",
    ),
    "size": (
        lambda d: d["images"][1].update(width=120, height=80),
        r"image 2 is listed as 120 x 80, but .*2\.png is 60 x 40",
    ),
}


@pytest.mark.parametrize("damage", UNUSABLE)
def test_an_unusable_data_set_is_an_error(tmp_path: Path, damage: str):
    change, words = UNUSABLE[damage]
    with pytest.raises(AnnotationError, match=f"instances_train.json: .*{words}"):
        read_coco(write(tmp_path, damaged(change)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"the file is empty \(0 bytes\)"),
        ('{"images": [', "truncated JSON: .* at line 1, column 13"),
        ('{"images": nonsense}', "invalid JSON: .* at line 1, column 12"),
        ('[{"image_id": 1, "category_id": 1, "score": 0.5}]', "contains COCO results, not a data set"),
        ("7", "contains a value of type int, not an object"),
        ("[" * 200_000, "invalid JSON|truncated JSON"),
        ('{"images": ' + "9" * 5000 + "}", "invalid JSON"),
    ],
)
def test_files_that_are_not_data_sets_are_described(tmp_path: Path, text: str, words: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AnnotationError, match=f"a.json: ({words})"):
        read_coco(tmp_path / "a.json")


def test_missing_images_are_counted_and_the_first_named(tmp_path: Path):
    path = write(tmp_path, content(6))
    for number in range(2, 7):
        (tmp_path / "train" / f"{number}.png").unlink()
    words = r"5 of 6 images are not in .*train: '2\.png', '3\.png', '4\.png' and 2 more; add them"
    with pytest.raises(AnnotationError, match=words):
        read_coco(path)


def test_file_names_are_normalized(tmp_path: Path):
    path = write(tmp_path, content())
    data = content()
    for name in ("a/../1.png", "./1.png", "a\\..\\1.png"):
        data["images"][0]["file_name"] = name
        path.write_text(json.dumps(data))
        assert read_coco(path, strict=True)[0].path == tmp_path / "train" / "1.png"


def test_missing_sizes_are_read_from_the_images(tmp_path: Path):
    data = content()
    data["images"][0].update(width=None, height=None)
    assert read_coco(write(tmp_path, data), strict=True).sizes() == [(40, 60)]


def test_sizes_have_the_exif_orientation_applied(tmp_path: Path):
    path = write(tmp_path, content())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels())).save(tmp_path / "train" / "1.png", exif=exif)
    dataset = read_coco(path, strict=True)
    assert (dataset[0].image.permute(1, 2, 0).numpy() == pixels()).all()
    Image.fromarray(pixels()).save(tmp_path / "train" / "1.png", exif=exif)
    words = (
        r"with its EXIF orientation applied, and the annotations are for the images as stored \(as those of 1 show\)"
    )
    with pytest.raises(AnnotationError, match=words):
        read_coco(path)


def test_damaged_images_are_skipped_when_opening(tmp_path: Path):
    path = write(tmp_path, content(4))
    (tmp_path / "train" / "2.png").write_bytes((tmp_path / "train" / "2.png").read_bytes()[:-30])
    (tmp_path / "train" / "3.png").write_bytes(b"")
    with pytest.warns(DataWarning, match=r"(?s)image 2, .*2\.png: .*image 3, .*3\.png: the file is empty"):
        dataset = read_coco(path)
    assert dataset.image_ids() == [1, 4]
    assert [len(dataset[i].target) for i in range(2)] == [2, 2]
    with pytest.raises(AnnotationError, match=r"(?s)2\.png.*3\.png"):
        read_coco(path, strict=True)


def test_an_image_that_changes_size_later_is_an_error(tmp_path: Path):
    dataset = read_coco(write(tmp_path, content()))
    Image.fromarray(pixels(20, 30)).save(tmp_path / "train" / "1.png")
    with pytest.raises(ImageError, match=r"1\.png: is 30 x 20, but .*instances_train.json lists 60 x 40"):
        dataset[0]


def test_images_may_be_in_another_folder(tmp_path: Path):
    path = write(tmp_path / "set", content())
    (tmp_path / "set/train").rename(tmp_path / "photos")
    with pytest.raises(
        AnnotationError, match=r"1 of 1 images are not in .*; specify the folder that contains the images"
    ):
        read_coco(path)
    assert len(read_coco(path, tmp_path / "photos", strict=True)) == 1
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'none'}: no such folder of images")):
        read_coco(path, tmp_path / "none")
    (tmp_path / "photos").rename(tmp_path / "set" / "photos")
    with pytest.warns(
        DataWarning, match=r"1 of 1 images .* \(folder: 1\): '1\.png' is 'photos/1\.png'; each name fits one"
    ):
        assert len(read_coco(path)) == 1


def test_targets_are_copies(tmp_path: Path):
    dataset = read_coco(write(tmp_path, content()))
    dataset.targets(0).boxes.zero_()
    dataset.targets(0).labels.fill_(7)
    assert dataset.targets(0).labels.tolist() == [0, 1]
    assert torch.equal(dataset.targets(0).boxes[0], torch.tensor([10.0, 5, 30, 25]))
