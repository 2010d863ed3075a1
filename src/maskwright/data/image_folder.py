"""The folder and the files of the images that an annotation file lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskwright.data import splits
from maskwright.data.findings import first_few
from maskwright.data.image_names import NameMatches, is_file, match_names
from maskwright.data.table import ImageEntry, Table, Verify
from maskwright.data.values import relative_path

_FIRST = 20  # images that are looked up to choose the folder


def locate_images(
    table: Table, entries: Sequence[ImageEntry], images: Path | None, verify: Verify | None
) -> list[ImageEntry]:
    """Find the folder of the images, and the files of those that are listed under other names.

    Args:
        table: The table; its `folder` is set, and findings are added.
        entries: The images; `file` is the name as listed.
        images: The folder; None: searched for in the usual places.
        verify: As for `add_images`. With "none", names are compared with files only if one of the first has no file.

    Returns:
        The images with `file` relative to the folder. Images whose names lead out of the folder, and those with
        several possible files, are omitted.
    """
    normal = {entry.file: relative_path(entry.file) for entry in entries}
    inside = [file for file in dict.fromkeys(normal.values()) if file is not None]
    table.folder = images if images is not None else find_folder(table.path, inside)
    suspects = inside if verify != "none" else inside[:_FIRST]
    missing = {file for file in suspects if not is_file(table.folder / file)}
    if verify == "none" and missing:
        missing = {file for file in inside if not is_file(table.folder / file)}
    unmatched = [name for name, file in normal.items() if file is None or file in missing]
    if not unmatched:
        return [entry._replace(file=normal[entry.file] or "") for entry in entries]
    roots = [] if images is not None else _roots(table.path)
    present = [file for file in inside if file not in missing]
    matches = match_names(table.folder, unmatched, present, roots, split_of_path(table.path))
    table.folder = matches.folder
    _report(table, matches, len(entries))
    located: list[ImageEntry] = []
    for entry in entries:
        file = matches.files.get(entry.file, normal[entry.file])
        if entry.file in matches.ambiguous:
            continue
        if file is None:
            what = f"image {entry.id!r} has file name {entry.file!r}, which is outside the image folder"
            advice = "specify a path inside the folder"
            table.add_finding("error", "path", f"{what}; it was not opened", advice, image=entry.id)
            continue
        located.append(entry._replace(file=file))
    return located


def _report(table: Table, matches: NameMatches, total: int) -> None:
    """Add one note about all names that were matched, and one error about those with several candidates."""
    if matches.files:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in matches.reasons.most_common())
        name, file = next(iter(matches.files.items()))
        what = (
            f"{len(matches.files)} of {total} images are listed under other names than their files in "
            f"{table.folder} ({reasons}): {first_few([name])} is {first_few([file])}"
        )
        table.add_finding("note", "name", what, "each name fits one file, which is used")
    if matches.ambiguous:
        shown = "; ".join(f"{first_few([n])} by {first_few(c)}" for n, c in list(matches.ambiguous.items())[:3])
        what = f"{len(matches.ambiguous)} of {total} images cannot be matched with one file in {table.folder}: {shown}"
        table.add_finding("error", "missing", what, "correct 'file_name', or remove the files that do not belong")


def find_folder(path: Path, files: Sequence[str]) -> Path:
    """Return the folder of the images of an annotation file.

    Args:
        path: The annotation file.
        files: Image files relative to the folder.

    Returns:
        The usual place that contains most of the first files; the first one that exists if none contains any.
    """
    candidates = _candidates(path)
    first = files[:_FIRST]
    hits = [sum(is_file(candidate / file) for file in first) for candidate in candidates]
    if any(hits):
        return candidates[hits.index(max(hits))]
    return next((c for c in candidates if c.is_dir()), path.parent)


def split_of_path(path: Path) -> str | None:
    """Return the split that an annotation file is for, by its name: "val" for instances_val.json.

    For _annotations.coco.json it is the name of the folder.
    """
    if path.stem.startswith("_annotations"):
        return path.parent.name
    stem = path.stem
    for prefix in ("instances_", "person_keypoints_", "panoptic_", "lvis_v1_", "lvis_v0.5_"):
        stem = stem.removeprefix(prefix)
    return (stem if splits.kind_of(stem) is not None else stem.rsplit("_", 1)[-1]) or None


def _roots(path: Path) -> list[Path]:
    """The folders that the images of an annotation file may be in."""
    parents = [path.parent, path.parent.parent]
    return parents[::-1] if path.parent.name == "annotations" else parents[:1]


def _candidates(path: Path) -> list[Path]:
    """The usual places of the images, most usual first."""
    split = split_of_path(path) or ""
    parents = [path.parent, path.parent.parent]
    roots = parents[::-1] if path.parent.name == "annotations" else parents
    places: list[Path] = []
    for root in roots:
        names = [split, f"images/{split}"]
        for parent in ("", "images"):
            folder = root / parent
            if splits.kind_of(split) is not None and folder.is_dir():
                fitting = splits.fitting(split, [p.name for p in sorted(folder.iterdir()) if p.is_dir()])
                names += [f"{parent}/{name}".lstrip("/") for name in fitting]
        places += [root / name for name in dict.fromkeys([*names, "images", "data", ""])]
    return places
