"""Images with an EXIF orientation: which frame the annotations are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskwright.data import DataWarning, check, read_coco
from maskwright.errors import AnnotationError

pytestmark = pytest.mark.fast

STORED = (40, 60)  # H, W as stored; upright 60 x 40
LOW = (18, 30, 34, 52)  # x0, y0, x1, y1 on the upright image: beyond the stored height
SMALL = (6, 8, 20, 30)  # inside both frames
TURNED = {  # from a box on the upright image (60 x 40) to the one on the stored image, for each orientation
    5: lambda x0, y0, x1, y1: (y0, x0, y1, x1),
    6: lambda x0, y0, x1, y1: (y0, 40 - x1, y1, 40 - x0),
    7: lambda x0, y0, x1, y1: (60 - y1, 40 - x1, 60 - y0, 40 - x0),
    8: lambda x0, y0, x1, y1: (60 - y1, x0, 60 - y0, x1),
}


def write_set(
    folder: Path, boxes: list[Any], orientation: int = 6, *, stored: bool, listed: tuple[int, int] = STORED,
    code: bool = False,
) -> Path:  # fmt: skip
    """One image for each box on the upright image, which is red there; outlines as stored if `stored`."""
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for number, (x0, y0, x1, y1) in enumerate(boxes, 1):
        upright = np.zeros((60, 40, 3), np.uint8)
        upright[y0:y1, x0:x1, 0] = 255
        plain = upright[:, ::-1] if orientation in (6, 7) else upright
        plain = plain[::-1] if orientation in (7, 8) else plain
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(plain.transpose(1, 0, 2))).save(folder / f"images/{number}.png", exif=exif)
        if stored:
            x0, y0, x1, y1 = TURNED[orientation](x0, y0, x1, y1)
        size = STORED if stored else (60, 40)
        plane = np.zeros(size, np.uint8, order="F")
        plane[y0:y1, x0:x1] = 1
        packed = coco_mask.encode(plane)
        shape: Any = {"size": packed["size"], "counts": packed["counts"].decode()}
        images.append({"id": number, "file_name": f"{number}.png", "height": listed[0], "width": listed[1]})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "segmentation": shape if code else [[x0, y0, x1, y0, x1, y1, x0, y1]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
        )
    path = folder / "result.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}]})
    )
    return path


def exact(path: Path) -> bool:
    """Whether every mask covers the red pixels, and every box is that of its mask."""
    dataset = read_coco(path)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.target.masks is not None
        if not (sample.target.masks.dense()[0].bool() == (sample.image[0] > 128)).all():
            return False
        if sample.target.boxes.tolist() != sample.target.masks.boxes().tolist():
            return False
    return True


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_upright_annotations_of_images_listed_as_stored_are_used(tmp_path: Path, orientation: int, code: bool):
    path = write_set(tmp_path / "set", [LOW, SMALL, LOW], orientation, stored=False, code=code)
    with pytest.warns(DataWarning, match=r"3 of 3 images have an EXIF orientation .* annotations are for the upright"):
        assert exact(path)
    assert check(path, tmp_path / "copy").ok
    raw = json.loads((tmp_path / "copy/annotations/result.json").read_text())
    assert (raw["images"][0]["height"], raw["images"][0]["width"]) == (60, 40)
    assert exact(tmp_path / "copy/annotations/result.json")


@pytest.mark.thorough
@pytest.mark.parametrize("listed", [STORED, (60, 40)])
@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_stored_image_are_turned_by_fix(
    tmp_path: Path, orientation: int, code: bool, listed: tuple[int, int]
):
    path = write_set(tmp_path / "set", [LOW, SMALL, LOW], orientation, stored=True, listed=listed, code=code)
    with pytest.raises(AnnotationError, match=r"the annotations are for the images as stored .*turn the annotations"):
        read_coco(path)
    check(path, tmp_path / "copy")
    assert exact(tmp_path / "copy/annotations/result.json")


@pytest.mark.parametrize("code", [False, True])
def test_annotations_of_images_turned_by_180_degrees_follow_the_others(tmp_path: Path, code: bool):
    path = write_set(tmp_path / "set", [LOW, LOW, LOW, LOW], stored=True, code=code)
    for number, orientation in ((2, 3), (3, 2), (4, 1)):
        file = path.parent / f"images/{number}.png"
        with Image.open(file) as image:
            pixels = np.asarray(image)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, exif=exif)
    report = check(path, fix=tmp_path / "copy")
    assert "so are those of 2 turned by 180 degrees or mirrored" in str(report)
    assert exact(tmp_path / "copy/annotations/result.json")


def test_both_possibilities_are_named_where_it_cannot_be_decided(tmp_path: Path):
    path = write_set(tmp_path / "set", [SMALL, SMALL], stored=False)
    words = (
        r"it cannot be decided which they are for; if they are for the upright images, correct width and height; "
        r"if they are for the images as stored, remove the EXIF orientation from the files$"
    )
    with pytest.raises(AnnotationError, match=words):
        read_coco(path)
    path = write_set(tmp_path / "both", [SMALL, LOW], stored=False)
    data = json.loads(path.read_text())
    data["annotations"][0]["segmentation"] = [[45, 5, 55, 5, 55, 20]]
    path.write_text(json.dumps(data))
    with pytest.raises(
        AnnotationError, match=r"1 are annotated upright, 1 as stored; correct width and height of those"
    ):
        read_coco(path)


def test_a_correct_list_and_images_without_annotations_are_left_alone(tmp_path: Path):
    path = write_set(tmp_path / "right", [SMALL, LOW], stored=False, listed=(60, 40))
    assert not check(path).findings
    path = write_set(tmp_path / "empty", [SMALL], stored=False)
    data = json.loads(path.read_text())
    data["annotations"] = []
    path.write_text(json.dumps(data))
    with pytest.warns(DataWarning, match="they have no annotations; the upright size is used"):
        assert read_coco(path).sizes() == [(60, 40)]
