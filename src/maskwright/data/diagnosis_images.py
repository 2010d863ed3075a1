"""Images that were resized after annotation, and files that several image entries name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maskwright.data.columns import Columns, Floats, every, some
from maskwright.data.diagnosis_codes import resize_codes
from maskwright.data.findings import Cause, first_few
from maskwright.data.table import Table, report_sizes

_MANY = 10  # annotations that together show which size they are for although each fits both


# ---- sizes ---------------------------------------------------------------------------------------------------------


def listed_sizes(table: Table, columns: Columns) -> Iterator[Cause]:
    """Images whose files have another size than listed: the images were resized, or the list is wrong."""
    sizes = np.array(table.sizes, np.float64).reshape(-1, 2)
    listed = np.array(table.listed_sizes, np.float64).reshape(-1, 2)
    wrong = some(sizes != listed)
    count = int(wrong.sum())
    if not count:
        return
    if count < len(sizes) and count < 0.5 * len(sizes):
        report_sizes(table)
        table.usable = False
        return
    factors = sizes / listed
    middle = np.median(factors[wrong], 0)
    common = (np.abs(listed * middle - sizes).max(1) <= 1.5)[wrong].all()
    proportional = (np.abs(factors[:, 0] - factors[:, 1]) * listed.max(1) <= 1.5)[wrong].all()
    first = int(np.flatnonzero(wrong)[0])
    (high, wide), (height, width) = table.listed_sizes[first], table.sizes[first]
    what = (
        f"{count} of {len(sizes)} images have another size than listed: image {table.image_ids[first]!r} is listed as "
        f"{wide} x {high}, but {table.folder / table.files[first]} is {width} x {height}"
    )
    if not (common or proportional):
        yield Cause("error", "size", what, "restore the images that were annotated, or correct the listed sizes")
        return
    for_listed, for_files = _evidence(columns, sizes, listed, wrong)
    if for_listed and not for_files:
        _scale(columns, factors[:, ::-1], wrong, sizes)
        what += ", and the annotations are for the listed size: the images were resized after annotation"
        advice = "restore the images, or scale the annotations, as `maskwright check --fix` does"
        yield Cause("error", "size", what, advice, repaired=True)
    elif for_files and not for_listed:
        what += ", and the annotations are for the size of the file"
        yield Cause("error", "size", what, "correct the listed sizes, as `maskwright check --fix` does", repaired=True)
    else:
        what += "; whether the annotations are for the one or the other cannot be decided"
        yield Cause("error", "size", what, "correct the listed sizes, or restore the images that were annotated")


def _evidence(columns: Columns, sizes: Floats, listed: Floats, wrong: np.ndarray) -> tuple[bool, bool]:
    """Whether annotations of wrong images show that they are for the listed sizes, and for the sizes of the files."""
    about = wrong[columns.image_index]
    own_sizes, own_listed = sizes[columns.image_index][about], listed[columns.image_index][about]
    codes = columns.code_sizes[about]
    coded = columns.shapes.coded[about]
    if coded.any():
        for_listed = bool(every(codes == own_listed)[coded].mean() > 0.9)
        for_files = bool(every(codes == own_sizes)[coded].mean() > 0.9)
        if for_listed or for_files:
            return for_listed, for_files
    placed = np.where(columns.shapes.present()[:, None], columns.shapes.extents()[:, 2:], np.nan)
    ends = np.fmax(placed, columns.corners()[:, 2:])[about]
    valid = every(np.isfinite(ends)) & ~coded
    if not valid.any():
        return False, False
    ends, own_sizes, own_listed = ends[valid], own_sizes[valid], own_listed[valid]
    beyond_files = _beyond(ends, own_sizes)
    beyond_listed = _beyond(ends, own_listed)
    few = 0.02 * len(ends)
    if beyond_files > few and beyond_listed <= few:
        return True, False
    if beyond_listed > few and beyond_files <= few:
        return False, True
    if len(ends) < _MANY or beyond_files > few:
        return False, False
    # All fit both sizes: they are for the smaller one, which they would otherwise not use half of.
    reach = (ends / np.maximum(own_sizes, own_listed)[:, ::-1]).max(0)
    smaller = (np.minimum(own_sizes, own_listed) / np.maximum(own_sizes, own_listed)).min()
    if smaller > 0.9 or (reach < 0.5 * smaller).all():
        return False, False
    return bool(own_listed[0].sum() < own_sizes[0].sum()), bool(own_sizes[0].sum() < own_listed[0].sum())


def _beyond(ends: Floats, sizes: Floats) -> int:
    limits = sizes[:, ::-1]
    return int(some(ends > limits + np.maximum(2, 0.02 * limits)).sum())


def _scale(columns: Columns, factors: Floats, wrong: np.ndarray, sizes: Floats) -> None:
    chosen = wrong[columns.image_index]
    own = factors[columns.image_index]
    columns.scale(chosen, own)
    columns.areas[chosen] *= own[chosen].prod(1)
    resize_codes(columns, chosen, sizes[columns.image_index])


# ---- files ---------------------------------------------------------------------------------------------------------


def repeated_files(table: Table, columns: Columns) -> Iterator[Cause]:
    """Files that several image entries name, as after merging annotation files."""
    groups: dict[str, list[int]] = {}
    for index, file in enumerate(table.files):
        groups.setdefault(file, []).append(index)
    repeated = {file: members for file, members in groups.items() if len(members) > 1}
    if not repeated:
        return
    keys: dict[int, set[tuple[object, ...]]] = {i: set() for members in repeated.values() for i in members}
    for index, key in zip(columns.image_index.tolist(), columns.keys(), strict=True):
        if index in keys:
            keys[index].add(key)
    conflicts = [file for file, members in repeated.items() if _conflict([keys[i] for i in members])]
    if conflicts:
        members = repeated[conflicts[0]]
        ids = " and ".join(repr(table.image_ids[i]) for i in members[:3])
        what = (
            f"{len(conflicts)} of {len(groups)} image files are listed under several ids, with different objects: "
            f"{first_few(conflicts)} (the first as images {ids})"
        )
        advice = (
            "if both entries are the same image, give their annotations one image_id; if a file of one of several "
            "merged sets has replaced another, rename the files and correct 'file_name'"
        )
        yield Cause("error", "file", what, advice)
        return
    what = f"{len(repeated)} of {len(groups)} image files are listed under several ids, with the same objects"
    yield Cause("note", "file", f"{what}: {first_few(list(repeated))}", "each is read once", repaired=True)
    _merge_images(table, columns, repeated)


def _conflict(objects: list[set[tuple[object, ...]]]) -> bool:
    """Whether two entries of a file have objects of which neither's include the other's."""
    largest = max(objects, key=len)
    return any(not own <= largest for own in objects)


def _merge_images(table: Table, columns: Columns, repeated: dict[str, list[int]]) -> None:
    """Give all annotations of a file to its first entry, and remove the others."""
    target = np.arange(len(table.files))
    for members in repeated.values():
        target[members] = members[0]
    kept = np.unique(target)
    columns.image_index = np.searchsorted(kept, target[columns.image_index])
    chosen: list[int] = kept.tolist()
    table.image_ids = [table.image_ids[i] for i in chosen]
    table.files = [table.files[i] for i in chosen]
    table.sizes = [table.sizes[i] for i in chosen]
    table.listed_sizes = [table.listed_sizes[i] for i in chosen]
    table.stored_sizes = [table.stored_sizes[i] for i in chosen]
    table.image_rows = [table.image_rows[i] for i in chosen]
