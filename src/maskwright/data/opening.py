"""Opening a data set: every registered format inspects the source, and the best match is read.

Which data set is read when a source has several, if the caller does not ask for one kind:

1. `instances_SPLIT.json` before `panoptic_SPLIT.json` before `person_keypoints_SPLIT.json`.
2. With `keypoints=True`, `person_keypoints_SPLIT.json` before `instances_SPLIT.json`; no other.
3. With `panoptic=True`, `panoptic_SPLIT.json`; no other.
4. Other formats by their confidence. Formats with equal confidence are an error that lists them; the caller then names
   the annotation file or the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskwright.data.dataset import Dataset
from maskwright.data.exchange.files import listed_once
from maskwright.data.exchange.unread import unread
from maskwright.data.formats import FORMATS, Format, Match, Request, load_format
from maskwright.data.table import Table
from maskwright.data.table_datasets import dataset_from_table
from maskwright.data.views import things_only, without_keypoints
from maskwright.errors import DataError, UsageError


def open_dataset(
    source: str | Path,
    split: str = "train",
    *,
    strict: bool = False,
    keypoints: bool | None = None,
    panoptic: bool | None = None,
    format: str | None = None,
    images: str | Path | None = None,
) -> Dataset:
    """Open the data set at `source`.

    Args:
        source: A folder DIR with DIR/annotations/instances_{split}.json (or panoptic_{split}.json or
            person_keypoints_{split}.json) and the images in DIR/{split}; a COCO JSON file, which is panoptic if its
            name starts with "panoptic"; the folder of another layout of COCO files (`coco_json.annotation_files` lists
            them), such as Roboflow's; a data set in the format of another tool (`formats.FORMATS`); or generated
            images, "scenes" or "scenes:count=200,size=192,seed=0,difficulty=0.5". The name of a format in front, as in
            "yolo:DIR", selects it.
        split: The split. "train", "val" (or "valid") and "test" also stand for the one split whose name begins so,
            such as train2017. A single annotation file serves as any split.
        strict: Raise for damaged annotations and images instead of skipping them.
        keypoints: True: a data set with keypoints is required. False: keypoints are dropped. None: keypoints are kept
            if the data set has them.
        panoptic: True: a data set with stuff classes is required. False: stuff is dropped. None: stuff is kept if
            the data set has it.
        format: Name of the format, one of `formats.FORMATS`; None: detected.
        images: Folder that image files are relative to; None: searched for.

    Returns:
        The data set; its `origin` says what was read, and in which format.

    Raises:
        UsageError: If the source does not exist, has no such split, or has several formats.
        AnnotationError: If the annotations cannot be used.
        DataError: If keypoints or stuff are required and missing.
    """
    request = Request(split, keypoints, panoptic, None if images is None else Path(images))
    text = str(source)
    name, match = best_match(text, request, format)
    reader = load_format(name)
    data = reader.read(match, request)
    dataset = dataset_from_table(data, strict) if isinstance(data, Table) else data
    dataset.origin = f"{match.reason} ({reader.NAME})"
    if panoptic and not dataset.stuff:
        raise DataError(
            f"{match.location}: has no stuff classes, which panoptic data needs; give a COCO panoptic file, "
            "panoptic_SPLIT.json"
        )
    if keypoints and dataset.keypoint_names is None:
        raise DataError(f"{match.location}: no category lists keypoints; give a data set with keypoints")
    if panoptic is False:
        dataset = things_only(dataset)
    return without_keypoints(dataset) if keypoints is False else dataset


def has_split(
    source: str | Path,
    split: str,
    *,
    keypoints: bool | None = None,
    panoptic: bool | None = None,
    format: str | None = None,
) -> bool:
    """Return whether `source` has a split of this name. False for a source that is not divided into splits.

    Args:
        source: As for `open_dataset`.
        split: Name of the split.
        keypoints: As for `open_dataset`.
        panoptic: As for `open_dataset`.
        format: As for `open_dataset`.
    """
    request = Request(split, keypoints, panoptic)
    return any(match.split is not None for _, match in find_matches(str(source), request, format))


def find_matches(source: str, request: Request, format: str | None = None) -> list[tuple[str, Match]]:
    """Return all data sets at `source` that fit the request.

    Args:
        source: A path, or a text that is no path.
        request: What the caller wants.
        format: Name of a format; None: every format.

    Returns:
        Pairs of the format's name and the match, highest confidence first.
    """
    source, format = without_prefix(source, format)
    names = FORMATS if format is None else [format]
    with listed_once():
        matches = [(name, match) for name in names for match in load_format(name).sniff(source, request)]
    return sorted(matches, key=lambda pair: -pair[1].confidence)


def without_prefix(source: str, format: str | None = None) -> tuple[str, str | None]:
    """Return a source without the name of a format in front of it, as in "yolo:DIR", and that name.

    Args:
        source: A path, or a text that is no path.
        format: Name of the format that the caller has given; it is kept.
    """
    name, _, rest = source.partition(":")
    if format is not None or name not in FORMATS or not rest or Path(source).exists() or not Path(rest).exists():
        return source, format
    return rest, name


def best_match(source: str, request: Request, format: str | None) -> tuple[str, Match]:
    """Return the format and the match with the highest confidence.

    Raises:
        UsageError: If there is none, or more than one.
    """
    matches = find_matches(source, request, format)
    if not matches:
        raise UsageError(_no_match(source, request, format))
    best = [(name, match) for name, match in matches if match.confidence == matches[0][1].confidence]
    if len(best) > 1 and len({name for name, _ in best}) == 1:
        raise UsageError(several_splits(source, request.split or "", [match for _, match in best]))
    if len(best) > 1:
        listed = ", ".join(f"{name} ({match.reason})" for name, match in best)
        raise UsageError(
            f"{source}: {len(best)} formats fit equally well: {listed}; name the annotation file instead of the "
            f"folder, or give format={best[0][0]!r} ({best[0][0]}:{source} on the command line)"
        )
    return best[0]


def several_splits(source: str, split: str, matches: Sequence[Match]) -> str:
    """The message for the name of a split that several splits fit."""
    listed = " or ".join(f"{match.split} ({match.reason})" for match in matches)
    return f"{source}: split {split!r} can be {listed}; give the split by its full name (--split {matches[0].split})"


def _no_match(source: str, request: Request, format: str | None) -> str:
    """The message for a source at which nothing fits the request."""
    source, format = without_prefix(source, format)
    path = Path(source)
    if not path.exists():
        return f"{source}: no such file or folder; give the folder of a data set, an annotation file or 'scenes'"
    names = list(FORMATS) if format is None else [format]
    if path.is_file():
        listed = ", ".join(load_format(name).NAME for name in names)
        return f"{source}: not an annotation file of a supported format ({listed})"
    wanted = "" if request.keypoints is None else f", {'with' if request.keypoints else 'without'} keypoints"
    wanted += "" if request.panoptic is None else f", {'panoptic' if request.panoptic else 'not panoptic'}"
    others = find_matches(source, Request(split=None), format)
    if others:
        there = ", ".join(match.reason for _, match in others)
        named = next((match.split for _, match in others if match.split is not None), None)
        hint = f"; name the split (--split {named})" if named is not None and not wanted else ""
        hint = "; name one of these files" if named is None and len(others) > 1 else hint
        return f"{source}: no annotations of split {request.split!r}{wanted}; found {there}{hint}"
    known = None if wanted or format is not None else unread(path)
    if known is not None:
        return f"{source}: no annotations that can be read; {known[0]}; {known[1]}"
    layouts = ", ".join(_layout(load_format(name), request.split) for name in names)
    return f"{source}: no annotations of split {request.split!r}{wanted}; expected one of {layouts}"


def _layout(reader: Format, split: str | None) -> str:
    return reader.LAYOUT.format(split=split or "SPLIT")
