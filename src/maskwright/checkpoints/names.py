"""Class names of common data sets. Official files usually lack them: label k of a file trained on COCO is `COCO[k]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

# fmt: off
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# The stuff classes of COCO panoptic in the order of their ids; "-merged" marks those that combine several classes.
COCO_STUFF = (
    "banner", "blanket", "bridge", "cardboard", "counter", "curtain", "door-stuff", "floor-wood", "flower", "fruit",
    "gravel", "house", "light", "mirror-stuff", "net", "pillow", "platform", "playingfield", "railroad", "river",
    "road", "roof", "sand", "sea", "shelf", "snow", "stairs", "tent", "towel", "wall-brick", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "window-blind", "window-other", "tree-merged", "fence-merged", "ceiling-merged",
    "sky-other-merged", "cabinet-merged", "table-merged", "floor-other-merged", "pavement-merged", "mountain-merged",
    "grass-merged", "dirt-merged", "paper-merged", "food-other-merged", "building-other-merged", "rock-merged",
    "wall-other-merged", "rug-merged",
)
# The stuff classes of COCO-Stuff, ids 92 to 182.
COCO_STUFF_ONLY = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower",
    "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves",
    "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow",
    "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof",
    "rug", "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone",
    "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick",
    "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops",
    "window-blind", "window-other", "wood",
)
# fmt: on
COCO_PANOPTIC = (*COCO, *COCO_STUFF)
# Category ids of the data set, 1 to 90 with gaps; torchvision's heads have a row for each of 0 to 90.
_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(i for i in range(1, 91) if i not in _GAPS)
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CITYSCAPES_REGIONS = (  # the 19 classes of semantic segmentation; the last eight are things
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
CITYSCAPES_STUFF = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky",
)  # fmt: skip
CITYSCAPES_PANOPTIC = (*CITYSCAPES_STUFF, *CITYSCAPES)  # in the order of the training ids


def coco_by_id() -> tuple[str, ...]:
    """Class names for COCO's category ids 1 to 90; "N/A" for the ten unused ids."""
    names = dict(zip(COCO_IDS, COCO, strict=True))
    return tuple(names.get(i, "N/A") for i in range(1, 91))


def class_names(count: int) -> tuple[str, ...]:
    """Class names for a head with `count` classes.

    Args:
        count: Number of classes, without background.

    Returns:
        The names of COCO for 80 classes, of VOC for 20, of Cityscapes for 8; otherwise "class 0", "class 1", ...
    """
    known = {len(COCO): COCO, len(VOC): VOC, len(CITYSCAPES): CITYSCAPES}
    return known.get(count) or tuple(f"class {k}" for k in range(count))


def is_placeholder(name: str) -> bool:
    """Whether a class name is one that `class_names` makes up."""
    return re.fullmatch(r"class \d+", name) is not None


def has_names(about: Mapping[str, Any], count: int) -> bool:
    """Whether the file, or the folder, has names for `count` classes; see `named_by`."""
    return len(_stored_names(about)) == count


def segment_names(count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names for a panoptic head with `count` classes.

    Args:
        count: Number of thing and stuff classes.

    Returns:
        The names, and those of them that are stuff: COCO panoptic for 133 classes, Cityscapes for 19; otherwise the
        result of `class_names` without stuff.
    """
    if count == len(COCO_PANOPTIC):
        return COCO_PANOPTIC, COCO_STUFF
    if count == len(CITYSCAPES_PANOPTIC):
        return CITYSCAPES_PANOPTIC, CITYSCAPES_STUFF
    return class_names(count), ()


def stored_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names stored beside the weights, see `named_by`; empty if there are none."""
    return _stored_names(about)


def named_by(about: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace assumed class names by those stored beside the weights.

    Names are read from `id2label` in a folder's config.json (transformers) and from `meta` in a file (mmdet). They are
    ignored if their number differs from that of the head's classes.

    Args:
        about: What `read_state` returned about the file.
        options: Options of the system with assumed "classes".

    Returns:
        The options. New names are all things, because the files do not say which classes are stuff.
    """
    assumed, stored = tuple(options.get("classes", ())), _stored_names(about)
    if len(stored) != len(assumed) or [c.casefold() for c in stored] == [c.casefold() for c in assumed]:
        return options
    return {**options, "classes": stored, **({"stuff": ()} if "stuff" in options else {})}


def _stored_names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names stored beside the weights; empty if there are none, or invalid or repeated ones."""
    table, meta = _table(about.get("config", {}).get("id2label")), _table(about.get("container", {}).get("meta"))
    found: Any = None
    if table is not None and set(table) == {str(k) for k in range(len(table))}:
        found = [table[str(k)] for k in range(len(table))]
        if found == [f"LABEL_{k}" for k in range(len(table))]:  # the default of transformers
            return ()
    elif meta is not None:
        newer = _table(meta.get("dataset_meta")) or {}
        found = meta.get("CLASSES") or newer.get("classes") or newer.get("CLASSES")
        found = [found] if isinstance(found, str) else found
    stored = cast(list[Any], found) if isinstance(found, list) else []
    if not all(isinstance(n, str) and n.strip() for n in stored):
        return ()
    names = [cast(str, n).strip() for n in stored]
    return tuple(names) if len({n.casefold() for n in names}) == len(names) else ()


def _table(value: Any) -> Mapping[str, Any] | None:
    """`value` if it is a mapping."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else None
