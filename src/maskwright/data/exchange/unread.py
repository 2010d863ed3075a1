"""Exports of labelling tools that are not read: recognizing them, so that messages can say what to export instead."""

from __future__ import annotations

import re
from pathlib import Path

from maskwright.data.exchange.files import files_below, is_image_name
from maskwright.data.image_names import is_file

_MOST = 200  # files that are looked into
_HEAD = 1 << 14  # bytes of a file that are looked at
_SUFFIXES = (".json", ".csv", ".xml", ".txt", ".npy", ".data")
_NUMBERS = re.compile(rb"\s*\d+(\s+[-+.\deE]+){4,}\s*(\n|\r|$)")
_MAP_FOLDERS = ("masks", "labels", "instances")


def unread(folder: Path) -> tuple[str, str] | None:
    """Return what annotations a folder has that no format reads, and what to do; None if it has none that are known.

    Args:
        folder: A folder in which no format has found a data set.

    Returns:
        A phrase such as "a.csv is an export of VIA as CSV", and advice.
    """
    files = list(files_below(folder, lambda name: name.lower().endswith(_SUFFIXES), 4))[:_MOST]
    for file in files:
        if not is_file(folder / file):
            continue
        try:
            with (folder / file).open("rb") as opened:
                head = opened.read(_HEAD)
        except OSError:
            continue
        known = _kind(folder, file, head)
        if known is not None:
            return f"{file} {known[0]}", known[1]
    images = files_below(folder, is_image_name, 4)
    lossy = next((f for f in images if f.lower().endswith((".jpg", ".jpeg")) and _in_map_folder(f)), None)
    if lossy is not None:
        return f"{lossy} is a JPEG, which cannot hold object numbers", "save the maps as PNG or TIFF"
    return None


def _in_map_folder(file: str) -> bool:
    return any(part.lower() in _MAP_FOLDERS for part in file.split("/")[:-1])


def _kind(folder: Path, file: str, head: bytes) -> tuple[str, str] | None:
    """What a file is, without the subject, and advice."""
    suffix = Path(file).suffix.lower()
    if suffix == ".csv" and b"region_shape_attributes" in head:
        return "is an export of VIA as CSV", "export the annotations as JSON"
    if suffix == ".json" and b'"vid_list"' in head:
        return "is a project of VIA 3", "only those of VIA 1 and 2 are read; export the annotations as COCO"
    if suffix == ".json" and b'"result"' in head and b'"original_width"' in head:
        return "is an export of Label Studio as JSON", "export the project as COCO or YOLO with images"
    if suffix == ".json" and (b'"classTitle"' in head or b'"geometryType"' in head):
        return "is an annotation of Supervisely", "export the project as COCO"
    if suffix == ".xml" and b"<annotation" in head and b"<bndbox" in head:
        return "has Pascal VOC boxes without masks", "masks are read from SegmentationObject and SegmentationClass"
    if suffix == ".data" and b"names" in head and b"train" in head:
        return "is a setting of Darknet YOLO, which has boxes only", "export outlines (Ultralytics YOLO segmentation)"
    if suffix == ".npy" and file.lower().endswith("_seg.npy"):
        return "is a file of Cellpose's user interface", "save the masks as PNG or TIFF (NAME_masks.tif)"
    if suffix == ".txt" and _NUMBERS.match(head):
        stem = (folder / file).with_suffix("")
        if any(is_image_name(p.name) and p.stem == stem.name for p in stem.parent.iterdir()):
            advice = "move the images to a folder 'images' and the label files to 'labels' beside it"
            return "is a YOLO label file beside its image", advice
    return None
