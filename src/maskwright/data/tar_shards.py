"""Data sets of tar files (WebDataset): the members of a sample share a name, KEY.jpg with KEY.json.

The JSON file of a sample has a list "annotations" of COCO records: "segmentation" (polygons or run lengths),
"iscrowd", "id", and the class as "category" or "category_name" (text), or as "category_id" with the names in a list
"categories" of the sample, or in a file ``classes.txt`` beside the tar files, one name in each line from id 0. Samples
without any class, as those of SA-1B, have the class "object".

Tar files are not unpacked: their members are listed when the data set is opened, and read at their place in the file.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from maskwright.data.dataset import Dataset, Sample
from maskwright.data.exchange.collecting import matches_of, unwanted
from maskwright.data.findings import DataWarning, first_few
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.images import MAX_PIXELS, common_white_of, decode, opened, orientation_of, readable, white_of
from maskwright.data.splits import kind_of
from maskwright.data.values import clean_name, parse_flag, parse_int, shortened
from maskwright.errors import AnnotationError, ImageError
from maskwright.structures import Instances, Masks

NAME = "tar shards"
LAYOUT = "{split}-*.tar with an image and a JSON file for each sample (WebDataset)"
ANONYMOUS = "object"  # the class of samples without classes
_IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp")
_LARGEST_JSON = 256 << 20


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find tar files in a folder and its subfolders, or recognize one by its suffix and its members."""
    path = Path(source)
    if unwanted(request):
        return []
    if path.is_file():
        fits = path.suffix.lower() == ".tar" and _has_samples(path)
        return [Match(str(path), CERTAIN, path.name)] if fits else []
    if not path.is_dir():
        return []
    counts: dict[str | None, int] = {}
    for file in _tar_files(path):
        split = _split_of(file, path)
        counts[split] = counts.get(split, 0) + 1
    if not counts or not _has_samples(_tar_files(path)[0]):
        return []
    found = {split: f"{count} tar files{f' of {split}' if split else ''}" for split, count in counts.items()}
    return matches_of(found, request, CERTAIN, lambda split: str(path))


def read(match: Match, request: Request) -> TarDataset:
    """List the samples of one split."""
    path = Path(match.location)
    if path.is_file():
        return TarDataset([path])
    files = _tar_files(path)
    return TarDataset([file for file in files if _split_of(file, path) == match.split], match.split, files)


def _tar_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.tar") if file.is_file() and not file.name.startswith("."))


def _split_of(file: Path, root: Path) -> str | None:
    """The split in a name such as train-00017.tar, or in that of a folder."""
    parts = [*file.relative_to(root).parts[:-1], file.stem.split("-")[0].split("_")[0]]
    return next((part for part in parts if kind_of(part) is not None), None)


def _has_samples(path: Path) -> bool:
    """Whether the first members of a tar file are an image and a JSON file of one name."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for _, member in zip(range(64), tar, strict=False) if member.isfile()]
    except (tarfile.TarError, OSError, EOFError):
        return False
    keys = [_key(member.name) for member in members]
    images = {key for key, kind in keys if kind in _IMAGES}
    return any(kind == "json" and key in images for key, kind in keys)


def _key(name: str) -> tuple[str, str]:
    """The key of a member and its kind: the name up to the first dot of the file name, and what follows it."""
    path = PurePosixPath(name)
    stem, _, kind = path.name.partition(".")
    return str(path.with_name(stem or path.name)), kind.lower()


# ---- the data set ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A member of a tar file: the file, its name, and where its content is."""

    tar: Path
    name: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"

    def read(self) -> bytes:
        """The content."""
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise ImageError(f"{self}: cannot be read ({error.strerror or error})") from None
        if len(data) < self.length:
            raise ImageError(f"{self}: the tar file is truncated; copy it again or remove it")
        return data

    def white(self) -> int | None:
        """The value of white of an image with more than 8 bits; None for 8 bits."""
        path = Path(str(self))
        with readable(path):
            return white_of(io.BytesIO(self.read()), path)


@dataclass(frozen=True)
class _Entry:
    """A sample: its members, and what its JSON file says that is needed without reading it again."""

    key: str
    image: _Place
    annotations: _Place
    size: tuple[int, int]
    labels: npt.NDArray[np.int64]


class TarDataset(Dataset):
    """Samples of tar files; images and annotations are read on access.

    Args:
        files: The tar files.
        split: Name of the split, for messages.
        all_files: The tar files of all splits, which have the same classes; None: `files`.

    Raises:
        AnnotationError: If a tar file is damaged or compressed, or has no samples.

    Warns:
        DataWarning: Once, about samples and annotations that were skipped.
    """

    def __init__(self, files: Sequence[Path], split: str | None = None, all_files: Sequence[Path] | None = None):
        self.files = list(files)
        self.name = "/".join(filter(None, [files[0].resolve().parent.name, split or files[0].stem]))
        self._listed = _listed_classes(files[0])
        self._skipped: list[str] = []
        parsed = [(place, _parsed(place[2])) for file in (all_files or files) for place in _samples(file)]
        names = {_class_of(record, raw, self._listed) for _, raw in parsed for record in _records(raw)}
        self.classes = self._listed or tuple(sorted(names)) or (ANONYMOUS,)
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        own = set(files)
        self._entries = [
            entry for place, raw in parsed if place[1].tar in own and (entry := self._entry(*place, raw)) is not None
        ]
        if not self._entries:
            raise AnnotationError(f"{files[0]}: no sample has an image and annotations that can be used")
        if self._skipped:
            text = f"{self.name}: {len(self._skipped)} entries were skipped: {first_few(self._skipped)}"
            warnings.warn(text, DataWarning, stacklevel=2)
        self._white: int | None = None
        self._white_known = False

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        count = sum(len(entry.labels) for entry in self._entries)
        return f"{self.name}: {len(self)} images, {count} objects, {len(self.classes)} classes"

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[range(len(self))[index]]
        image = decode(io.BytesIO(entry.image.read()), str(entry.image), white=self.white)
        size = (image.shape[1], image.shape[2])
        if size != entry.size:
            raise ImageError(f"{entry.image}: is {size[1]} x {size[0]}, but its header declares another size")
        return Sample(image, self.targets(index), entry.key)

    def sizes(self) -> list[tuple[int, int]]:
        return [entry.size for entry in self._entries]

    def image_ids(self) -> list[int | str]:
        return [entry.key for entry in self._entries]

    def image_labels(self, index: int) -> npt.NDArray[np.int64]:
        return self._entries[range(len(self))[index]].labels

    def white(self) -> int | None:
        if not self._white_known:
            self._white = common_white_of(len(self), lambda at: self._entries[at].image.white())
            self._white_known = True
        return self._white

    def targets(self, index: int) -> Instances:
        """Return the objects of one image."""
        entry = self._entries[range(len(self))[index]]
        found = [found for found, _ in self._objects(_parsed(entry.annotations), entry.size) if found is not None]
        masks = Masks.join([mask for mask, _, _, _ in found]) if found else Masks.empty(entry.size)
        return Instances(
            entry.size,
            masks.boxes(),
            torch.tensor([label for _, label, _, _ in found], dtype=torch.int64),
            masks,
            crowd=torch.tensor([crowd for _, _, crowd, _ in found], dtype=torch.bool),
            ids=torch.tensor([number for _, _, _, number in found], dtype=torch.int64),
        )

    def _entry(self, key: str, image: _Place, annotations: _Place, raw: dict[str, Any] | None) -> _Entry | None:
        """A sample; None if it cannot be used."""
        if raw is None or not isinstance(raw.get("annotations"), list):
            self._skipped.append(f'{annotations} (it is not a JSON object with a list "annotations")')
            return None
        try:
            with opened(io.BytesIO(image.read()), Path(str(image)), MAX_PIXELS) as header:
                turned = orientation_of(header) >= 5
                size = (header.width, header.height) if turned else (header.height, header.width)
        except ImageError as error:
            self._skipped.append(str(error))
            return None
        labels: list[int] = []
        for found, problem in self._objects(raw, size):
            if found is None:
                self._skipped.append(f"{annotations}, {problem}")
            else:
                labels.append(found[1])
        return _Entry(key, image, annotations, size, np.array(labels, np.int64))

    def _objects(
        self, raw: dict[str, Any] | None, size: tuple[int, int]
    ) -> Iterator[tuple[tuple[Masks, int, bool, int] | None, str]]:
        """Mask, label, crowd flag and id of each annotation; None, with the reason, if it cannot be used."""
        for number, record in enumerate(_records(raw)):
            name = _class_of(record, raw, self._listed)
            if name not in self.classes:
                yield None, f"annotation {number}: unknown class {shortened(name)}"
                continue
            shape: Any = record.get("segmentation")
            try:
                coded = isinstance(shape, dict)
                mask = (
                    Masks.from_rle([cast(Any, shape)]) if coded else Masks.from_polygons([cast(Any, shape or [])], size)
                )
                mask = mask.pack()
                if mask.size != size:
                    raise ValueError(f"its mask is for an image of {mask.size[1]} x {mask.size[0]}")
                if not int(mask.areas()[0]):
                    raise ValueError("its mask is empty")
            except (ValueError, TypeError, KeyError, AnnotationError) as error:
                yield None, f"annotation {number}: {error}"
                continue
            own = parse_int(record.get("id"))
            small = own is not None and abs(own) < 1 << 63
            crowd = bool(parse_flag(record.get("iscrowd", 0)))
            yield (mask, self.classes.index(name), crowd, own if small and own is not None else number), ""


def _samples(file: Path) -> list[tuple[str, _Place, _Place]]:
    """Key, image and JSON file of each sample of a tar file, in order."""
    images: dict[str, _Place] = {}
    texts: dict[str, _Place] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, kind = _key(member.name)
                place = _Place(file, member.name, member.offset_data, member.size)
                if kind in _IMAGES:
                    images.setdefault(key, place)
                elif kind == "json":
                    texts.setdefault(key, place)
    except tarfile.ReadError as error:
        raise AnnotationError(
            f"{file}: cannot be read as an uncompressed tar file ({error}); decompress it, or copy it again"
        ) from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise AnnotationError(f"{file}: the tar file is damaged ({error}); copy it again") from None
    return [(key, images[key], texts[key]) for key in images if key in texts]


def _parsed(place: _Place) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is not an object."""
    if place.length > _LARGEST_JSON:
        return None
    try:
        value: Any = json.loads(place.read())
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _records(raw: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The annotations of a sample; entries of another kind become empty ones, which cannot be used."""
    entries: Any = [] if raw is None else raw.get("annotations")
    if not isinstance(entries, list):
        return []
    return [cast("dict[str, Any]", e) if isinstance(e, dict) else {} for e in cast("list[Any]", entries)]


def _class_of(record: dict[str, Any], raw: dict[str, Any] | None, listed: Sequence[str]) -> str:
    """The name of the class of an annotation."""
    for key in ("category_name", "category"):
        if isinstance(record.get(key), str):
            return clean_name(record[key]) or ANONYMOUS
    number = parse_int(record.get("category_id"))
    if number is None:
        return ANONYMOUS if not listed else str(record.get("category_id"))
    categories: Any = (raw or {}).get("categories")
    for entry in cast("list[Any]", categories) if isinstance(categories, list) else ():
        if isinstance(entry, dict) and parse_int(cast(Any, entry).get("id")) == number:
            name: Any = cast(Any, entry).get("name")
            return clean_name(name) if isinstance(name, str) and clean_name(name) else str(number)
    return listed[number] if 0 <= number < len(listed) else str(number)


def _listed_classes(file: Path) -> tuple[str, ...]:
    """The names of a classes.txt beside a tar file, or in the folder above."""
    for folder in (file.parent, file.parent.parent):
        path = folder / "classes.txt"
        if path.is_file():
            try:
                lines = path.read_text("utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise AnnotationError(f"{path}: cannot be read as text ({error})") from None
            return tuple(clean_name(line) for line in lines if clean_name(line))
    return ()
