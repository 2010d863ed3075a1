"""COCO results: the results.json that `predict` writes, with the images and classes of pictures.json beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskwright.data import coco
from maskwright.data.exchange.collecting import new_table
from maskwright.data.exchange.files import FileProblem, add_file_problem, as_dict, as_list, read_json
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.image_names import is_file
from maskwright.data.table import Table

NAME = "COCO results"
LAYOUT = "results.json with pictures.json (predictions)"

RESULTS, PICTURES = "results.json", "pictures.json"


def sniff(source: str, request: Request) -> list[Match]:
    """Recognize a list of results beside a pictures.json, or the folder of both."""
    path = Path(source)
    if request.keypoints or request.panoptic:
        return []
    if path.is_dir():
        there = is_file(path / RESULTS) and is_file(path / PICTURES)
        return [Match(str(path / RESULTS), CERTAIN, RESULTS)] if there and _is_list(path / RESULTS) else []
    if path.suffix.lower() != ".json" or not is_file(path.parent / PICTURES) or not _is_list(path):
        return []
    return [Match(str(path), CERTAIN, path.name)]


def _is_list(path: Path) -> bool:
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"[")
    except OSError:
        return False


def read(match: Match, request: Request) -> Table:
    """Read predictions as a table with scores."""
    path = Path(match.location)
    pictures = path.parent / PICTURES
    try:
        results, about = read_json(path), as_dict(read_json(pictures))
    except FileProblem as problem:
        table = new_table(path, path.parent, path.parent.name)
        add_file_problem(table, path, problem)
        table.usable = False
        return table
    images = [as_dict(entry) for entry in as_list(about.get("images"))]
    folder, files = _placed([str(entry.get("file_name")) for entry in images], path, request.images)
    entries = [{**entry, "file_name": file} for entry, file in zip(images, files, strict=True)]
    found = [{**_without_box(as_dict(entry)), "id": number} for number, entry in enumerate(as_list(results), 1)]
    raw: dict[str, Any] = {"images": entries, "annotations": found, "categories": as_list(about.get("categories"))}
    table = coco.read_table(path, folder, request.verify, raw)
    table.name = path.resolve().parent.name
    return table


def _without_box(entry: dict[str, Any]) -> dict[str, Any]:
    """A result without its box if it has a mask: systems predict the two separately, so they prove nothing."""
    return {key: value for key, value in entry.items() if key != "bbox" or not entry.get("segmentation")}


def _placed(names: Sequence[str], path: Path, images: Path | None) -> tuple[Path, list[str]]:
    """The folder of the images, and their names relative to it.

    `predict` writes names as it was given them. Only files below the folder of images are looked up; if none is given,
    below the current folder, that of the results, or the one above it.
    """
    here = path.resolve().parent
    roots = [Path.cwd().resolve(), here, here.parent] if images is None else [images.resolve()]
    places: list[str | None] = []
    for name in names:
        found = next((p for p in (Path(name), here / name) if is_file(p)), None)
        place = None if found is None else os.path.normpath(found.absolute())
        inside = place is not None and any(Path(place).is_relative_to(root) for root in roots)
        places.append(place if inside else None)
    if images is not None:
        pairs = zip(names, places, strict=True)
        return images, [name if p is None else Path(p).relative_to(roots[0]).as_posix() for name, p in pairs]
    known = [place for place in places if place is not None]
    if not known or len(known) < len(places):
        return here, list(names)
    folder = Path(os.path.commonpath([os.path.dirname(place) for place in known]))  # noqa: PTH120
    return folder, [Path(place).relative_to(folder).as_posix() for place in known]


def image_folder(path: Path) -> Path | None:
    """Return the folder that all images of a pictures.json are below; None if there is none."""
    try:
        names = [str(as_dict(entry).get("file_name")) for entry in as_list(as_dict(read_json(path)).get("images"))]
    except FileProblem:
        return None
    parents = [os.path.dirname(os.path.abspath(name)) for name in names]  # noqa: PTH100, PTH120
    return Path(os.path.commonpath(parents)) if parents else None
