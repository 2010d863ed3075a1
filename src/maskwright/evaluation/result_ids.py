"""Which image and which class of a data set the ids in a results file stand for.

Ids are accepted as annotation files may have them: 1, 1.0 and "1" are the same, and so is "0001" if nothing else is
meant. The file `pictures.json`, which `predict` writes beside its results, names the images and classes that the ids
stand for; it is used if it lists every id of the results. Results of another data set are refused:
their average precision would be 0, whatever the quality of the predictions.
"""

from __future__ import annotations

import json
import math
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, cast

from maskwright.data.findings import DataWarning
from maskwright.data.values import parse_float, parse_id, parse_int, parse_length, shortened
from maskwright.errors import AnnotationError

Id = int | str
PICTURES = "pictures.json"  # written beside results.json
_COMPARED = 8  # number of files whose bytes are compared

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The images and classes of a data set.

    Attributes:
        sizes: Height and width of each image by id.
        category_ids: Category id of each class.
        classes: Class names; empty if unknown.
        paths: File of each image by id; images without a file are absent.
    """

    sizes: Mapping[Id, tuple[int, int]]
    category_ids: Sequence[int]
    classes: Sequence[str] = ()
    paths: Mapping[Id, Path] = field(default_factory=dict[Id, Path])


@dataclass(frozen=True)
class Listing:
    """Images and categories that a file lists beside its predictions.

    Attributes:
        path: The file.
        images: File name and size (None if not listed) of each image by id.
        categories: Name of each category by id.
    """

    path: Path
    images: Mapping[Id, tuple[str, tuple[int, int] | None]]
    categories: Mapping[Id, str]

    @classmethod
    def of(cls, path: Path, document: Any) -> Listing | None:
        """The lists "images" and "categories" of a document; None if it does not have both."""
        if not isinstance(document, dict):
            return None
        about = cast(dict[str, Any], document)
        images, categories = _entries(about.get("images")), _entries(about.get("categories"))
        if images is None or categories is None:
            return None
        names: dict[Id, tuple[str, tuple[int, int] | None]] = {}
        for number, entry in images:
            height, width = parse_length(entry.get("height")), parse_length(entry.get("width"))
            size = None if height is None or width is None else (height, width)
            names[number] = (str(entry.get("file_name") or ""), size)
        return cls(path, names, {number: str(entry.get("name")) for number, entry in categories})


def listing_beside(path: Path) -> Listing | None:
    """The `pictures.json` in the folder of a results file; None if there is none, or if it cannot be read."""
    about = path.parent / PICTURES
    try:
        return Listing.of(about, json.loads(about.read_text("utf-8-sig")))
    except (OSError, ValueError, RecursionError):
        return None


def checked_id(value: Any, where: str, key: str) -> Id:
    """An id of a record as an integer or a string.

    Raises:
        AnnotationError: If it is null, a fraction, a list or the like.
    """
    number = parse_id(value)
    if number is None or number == "":
        raise AnnotationError(
            f"{where} has {key} {_json(value)}; expected the id of {'an image' if key == 'image_id' else 'a category'}"
        )
    return number


@dataclass(frozen=True)
class Matched:
    """What the ids in a results file stand for.

    Attributes:
        images: Id in the data set of each image id.
        labels: Label of each category id; -1 for a class that the data set does not have.
        images_by: How images were matched: by id, by names of files that stand in place of ids, or by a listing.
        classes_by: How classes were matched: by id, by names that stand in place of ids, or by a listing.
    """

    images: Mapping[Id, Id]
    labels: Mapping[Id, int]
    images_by: Literal["id", "name", "listing"]
    classes_by: Literal["id", "name", "listing"]


def match_ids(
    path: Path, images: Mapping[Id, int], categories: Mapping[Id, int], reference: Reference, listing: Listing | None
) -> Matched:
    """Finds the images and classes that the ids in a results file stand for.

    Args:
        path: The file, for messages.
        images: Each image id in the file, and the number of the first record that has it.
        categories: Each category id, likewise.
        reference: The data set.
        listing: What the ids stand for; it is ignored if it does not list all of them.

    Raises:
        AnnotationError: If an id stands for nothing in the data set.
    """
    if listing is not None and not (
        _all_in(images, listing.images) and _all_in(categories, listing.categories)  # it belongs to another file
    ):
        listing = None
    by_listing = None
    if listing is not None and reference.paths:
        by_listing = _images_by_listing(path, images, reference, listing)
    found, how = (by_listing, "listing") if by_listing is not None else _images_by_id(path, images, reference)
    if listing is not None and reference.classes:
        return Matched(found, _labels_by_listing(path, categories, reference, listing), how, "listing")
    labels, classes_by = _labels_by_id(path, categories, reference)
    return Matched(found, labels, how, classes_by)


# ---- images ----------------------------------------------------------------------------------------------------------


def _images_by_id(
    path: Path, images: Mapping[Id, int], reference: Reference
) -> tuple[dict[Id, Id], Literal["id", "name"]]:
    """The images if all ids are known, or all are names of files."""
    lookup = _Lookup({number: number for number in reference.sizes})
    found = {value: lookup(value) for value in images}
    unknown = [value for value, number in found.items() if number is None]
    if unknown and reference.paths:
        named = ImageNames(reference.paths)
        by_name = {value: named(str(value)) for value in images}
        if None not in by_name.values() and len(set(by_name.values())) == len(by_name):
            example = next(iter(images))
            _warn(f"{path}: image ids are names of files, such as {_json(example)}; they are matched by name")
            return cast(dict[Id, Id], by_name), "name"
    if unknown:
        first = min(unknown, key=images.__getitem__)
        raise AnnotationError(
            f"{path}: record {images[first]} is of image {first!r}, which the data set does not have; "
            f"{_counted(unknown, images, reference.sizes, 'image id')}. {_cause_of_images(images, reference)}"
        )
    return cast(dict[Id, Id], found), "id"


def _images_by_listing(
    path: Path, images: Mapping[Id, int], reference: Reference, listing: Listing
) -> dict[Id, Id] | None:
    """Images by the file names that a listing gives to their ids; None if it has no names."""
    listed = _Lookup(dict(listing.images))
    entries = {value: cast(tuple[str, tuple[int, int] | None], listed(value)) for value in images}
    if not all(name for name, _ in entries.values()):
        return None
    named = ImageNames(reference.paths)
    found = {value: named(name) for value, (name, _) in entries.items()}
    unknown = [entries[value][0] for value, number in found.items() if number is None]
    if unknown:
        raise AnnotationError(
            f"{path}: {len(unknown)} of {len(found)} images, such as {unknown[0]!r} (named in {listing.path.name}), "
            "are not in the data set; the predictions are probably of another split or data set"
        )
    numbers = cast(dict[Id, Id], found)
    for value, (name, size) in entries.items():
        expected = reference.sizes[numbers[value]]
        if size is not None and size != expected:
            raise AnnotationError(
                f"{path}: image {name!r} is {size[1]} x {size[0]} in {listing.path.name}, but {expected[1]} x "
                f"{expected[0]} in the data set; the predictions are of another image, or of another size of it"
            )
    twice = len(numbers) - len(set(numbers.values()))
    if twice:
        raise AnnotationError(
            f"{path}: {twice} of {len(numbers)} images are predicted more than once, or share their name with another "
            f"(named in {listing.path.name}); predict each image of the data set once"
        )
    pairs = [(Path(entries[value][0]), reference.paths[number]) for value, number in numbers.items()]
    _check_same_files(path, pairs)
    return numbers


def _check_same_files(path: Path, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Refuses predictions of files that have the names of the data set's images, but another content."""
    try:
        others = [(a, b) for a, b in pairs if a.is_file() and b.is_file() and not a.samefile(b)][:_COMPARED]
        if others and all(a.read_bytes() != b.read_bytes() for a, b in others):
            raise AnnotationError(
                f"{path}: the predictions are of {others[0][0]}, which is not the image {others[0][1]} of the data "
                "set, though it has its name; they are probably of another split"
            )
    except OSError:  # unreadable files are no evidence against the predictions
        return


def _cause_of_images(images: Mapping[Id, int], reference: Reference) -> str:
    for shift in (1, -1):
        if all(isinstance(v, int) and v + shift in reference.sizes for v in images):
            return f"All ids are known after adding {shift}: count them as the annotation file does"
    if all(isinstance(v, str) and parse_int(v) is None for v in images):
        return "They appear to be names of files, but not of this data set's: give the annotations of the same split"
    return "The predictions are probably of another split or data set: give the annotations that belong to them"


# ---- classes ---------------------------------------------------------------------------------------------------------


def _labels_by_id(
    path: Path, categories: Mapping[Id, int], reference: Reference
) -> tuple[dict[Id, int], Literal["id", "name"]]:
    """The labels if all ids are known, or all are names of classes."""
    lookup = _Lookup({number: label for label, number in enumerate(reference.category_ids)})
    found = {value: lookup(value) for value in categories}
    unknown = [value for value, label in found.items() if label is None]
    if unknown and len(set(reference.classes)) == len(reference.classes):
        by_name = {value: _label_of(str(value), reference.classes) for value in categories}
        if min(by_name.values()) >= 0:
            return by_name, "name"
    if unknown:
        first = min(unknown, key=categories.__getitem__)
        raise AnnotationError(
            f"{path}: record {categories[first]} has category {first!r}, which the data set does not have; "
            f"{_counted(unknown, categories, reference.category_ids, 'category id')}. "
            f"{_cause_of_categories(categories, reference)}"
        )
    return cast(dict[Id, int], found), "id"


def _labels_by_listing(
    path: Path, categories: Mapping[Id, int], reference: Reference, listing: Listing
) -> dict[Id, int]:
    lookup = _Lookup(dict(listing.categories))
    names = {value: cast(str, lookup(value)) for value in categories}
    found = {value: _label_of(name, reference.classes) for value, name in names.items()}
    unknown = [names[value] for value, label in found.items() if label < 0]
    if unknown and len(unknown) == len(found):
        raise AnnotationError(
            f"{path}: no class of the predictions ({_some(unknown)}, named in {listing.path.name}) is a class of the "
            f"data set ({_some(reference.classes)})"
        )
    if unknown:
        _warn(f"{path}: {len(unknown)} classes are not in the data set and are left out: {_some(unknown)}")
    return found


def _label_of(name: str, classes: Sequence[str]) -> int:
    """Position of a name, compared exactly and then as `match_classes` does; -1 if there is none."""
    for form in (str, folded):
        forms = [form(each) for each in classes]
        if form(name) in forms:
            return forms.index(form(name))
    return -1


def _cause_of_categories(categories: Mapping[Id, int], reference: Reference) -> str:
    numbers = [number for value in categories if (number := parse_int(value)) is not None]
    count = len(reference.category_ids)
    if len(numbers) == len(categories):
        for first, name in ((0, "labels"), (1, "labels + 1")):
            if all(first <= number < count + first for number in numbers):
                return (
                    f"They appear to be {name} ({first} ... {count + first - 1}) instead of category ids: write "
                    "`category_ids[label]` of the data set"
                )
        for shift in (1, -1):
            if all(number + shift in reference.category_ids for number in numbers):
                return f"All ids are known after adding {shift}: count them as the annotation file does"
    return "The predictions are probably of another data set: give the annotations that belong to them"


# ---- shared ----------------------------------------------------------------------------------------------------------


class _Lookup:
    """Entries by id: exact, or the only one with the same integer value."""

    def __init__(self, entries: Mapping[Id, Any]):
        self.entries = entries
        self.by_value = _unambiguous((parse_int(key), value) for key, value in entries.items())

    def __call__(self, value: Id) -> Any:
        """The entry; None if there is none."""
        if value in self.entries:
            return self.entries[value]
        number = parse_int(value)
        if number is None and math.isfinite(real := parse_float(value)) and real.is_integer():  # "1.0"
            number = int(real)
        return None if number is None else self.by_value.get(number)


class ImageNames:
    """Image ids by the names of files: the path itself, or the image whose path has the same end."""

    def __init__(self, paths: Mapping[Id, Path]):
        self.paths = {number: _parts(str(path)) for number, path in paths.items()}
        self.exact = _unambiguous((path.absolute(), number) for number, path in paths.items())
        self.groups: dict[str, list[Id]] = {}
        for number, parts in self.paths.items():
            for form in {parts[-1], PurePosixPath(parts[-1]).stem}:
                self.groups.setdefault(form, []).append(number)
        self.numbered = _unambiguous((parse_int(PurePosixPath(p[-1]).stem), n) for n, p in self.paths.items())

    def __call__(self, name: str) -> Id | None:
        """The id; None if no image, or more than one, fits."""
        if (same := self.exact.get(Path(name).absolute())) is not None:
            return same
        parts = _parts(name)
        group = self.groups.get(parts[-1]) if parts else None
        if group is None:
            number = parse_int(name)
            return None if number is None else self.numbered.get(number)
        shared = [_common_end(parts[:-1], self.paths[number][:-1]) for number in group]
        best = [number for number, length in zip(group, shared, strict=True) if length == max(shared)]
        return best[0] if len(best) == 1 else None


def folded(name: str) -> str:
    """A class name without regard to case, spaces, hyphens and underscores."""
    return "".join(c for c in name.casefold() if c not in " -_")


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).parts


def _common_end(one: Sequence[str], two: Sequence[str]) -> int:
    length = 0
    while length < min(len(one), len(two)) and one[-1 - length] == two[-1 - length]:
        length += 1
    return length


def _unambiguous(pairs: Iterable[tuple[Any, T]]) -> dict[Any, T]:
    """A dict of the pairs whose key is not None and occurs once."""
    found: dict[Any, T] = {}
    repeated: set[Any] = set()
    for key, value in pairs:
        if key in found:
            repeated.add(key)
        found[key] = value
    return {key: value for key, value in found.items() if key is not None and key not in repeated}


def _all_in(values: Iterable[Id], entries: Mapping[Id, Any]) -> bool:
    lookup = _Lookup(dict(entries))
    return all(lookup(value) is not None for value in values)


def _entries(listed: Any) -> list[tuple[Id, dict[str, Any]]] | None:
    """Ids and entries of a list of a COCO document; None unless all have one."""
    if not isinstance(listed, list):
        return None
    entries = [cast(dict[str, Any], e) for e in cast(list[Any], listed) if isinstance(e, dict)]
    numbers = [parse_id(entry.get("id")) for entry in entries]
    if len(entries) < len(cast(list[Any], listed)) or None in numbers:
        return None
    return list(zip(cast(list[Id], numbers), entries, strict=True))


def _counted(unknown: Sequence[Id], there: Mapping[Id, Any], known: Iterable[Id], what: str) -> str:
    ids = list(known)
    return (
        f"{len(unknown)} of {len(there)} {what}s are unknown ({_some(unknown)}), the data set has {len(ids)} "
        f"({_some(ids)})"
    )


def _some(values: Sequence[Any], count: int = 5) -> str:
    return ", ".join(shortened(v, 40) for v in values[:count]) + (", ..." if len(values) > count else "")


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _warn(sentence: str) -> None:
    warnings.warn(sentence, DataWarning, stacklevel=6)
