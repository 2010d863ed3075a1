"""Image and category ids of an annotated data set, for predictions on its images."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maskwright.data import Dataset, DataWarning
from maskwright.data.formats import LIKELY, Request
from maskwright.data.opening import find_matches, open_dataset
from maskwright.errors import MaskwrightError, UsageError
from maskwright.evaluation import match_classes
from maskwright.evaluation.result_ids import Id, ImageNames
from maskwright.inference.sources import SUFFIXES

LARGEST_SEARCHED = 64 << 20  # bytes of an annotation file that is read without being named


class DatasetIds:
    """Ids of the images and classes of a data set; what it does not have gets ids that it does not use.

    Args:
        dataset: The data set.
        classes: Class names of the predictions.

    Attributes:
        dataset: The data set.
        category_ids: Category id of each of `classes`.
        unknown_classes: Those of `classes` that the data set does not have.
        unknown_images: Number of images so far that the data set does not have.
        exact: Image id by file.

    Raises:
        UsageError: If no class is a class of the data set.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str]):
        self.dataset = dataset
        labels = [int(label) for label in match_classes(classes, dataset.classes)]
        unused = 1 + max(dataset.category_ids, default=0)
        self.category_ids = [
            dataset.category_ids[label] if label >= 0 else unused + number for number, label in enumerate(labels)
        ]
        self.unknown_classes = [name for name, label in zip(classes, labels, strict=True) if label < 0]
        self.unknown_images = 0
        ids = dataset.image_ids()
        self._paths = {i: p.resolve() for i, p in zip(ids, dataset.paths(), strict=True) if p is not None}
        self.exact = {path: image_id for image_id, path in self._paths.items()}
        self._names = ImageNames(self._paths)
        self._unused = 1 + max((i for i in ids if isinstance(i, int)), default=0)
        self._given: set[Id] = set()

    def find(self, path: Path) -> Id | None:
        """The id of an image of the data set; None if it has no such image."""
        exact = self.exact.get(path.resolve())
        return exact if exact is not None else self._names(str(path))

    def image_id(self, path: Path) -> Id:
        """The id for the predictions on an image; each is given once."""
        image_id = self.find(path)
        if image_id is None or image_id in self._given:
            image_id = self._unused + self.unknown_images
            self.unknown_images += 1
        self._given.add(image_id)
        return image_id

    def categories(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The list of categories for the files that are written."""
        own = dict(zip(self.dataset.category_ids, self.dataset.classes, strict=True))
        return [{"id": int(i), "name": own.get(i, name)} for i, name in zip(self.category_ids, classes, strict=True)]

    @property
    def summary(self) -> str:
        """Which ids are used, in one sentence."""
        text = f"image and category ids are those of {self.dataset.name}"
        if self.unknown_images:
            text += f"; {self.unknown_images} images are not in it"
        if self.unknown_classes:
            text += f"; it has no class {', '.join(map(repr, self.unknown_classes[:5]))}"
            text += ", ..." if len(self.unknown_classes) > 5 else ""
        return text


def opened_data(source: str | Path, split: str | None, images: Sequence[str | Path] = ()) -> Dataset:
    """Opens the data set that images belong to.

    Args:
        source: A folder or an annotation file.
        split: The split; None: the one that has the images, or "val" if there are no images.
        images: Files, folders and globs.

    Raises:
        UsageError: If there is no such split, or no split has the images.
    """
    if split is not None or not images:
        return open_dataset(source, split or "val")
    splits = list(dict.fromkeys(match.split for _, match in find_matches(str(source), Request(split=None))))
    if len(splits) < 2:
        return open_dataset(source, splits[0] or "val" if splits else "val")
    examples = _examples(images)
    found: dict[str, int] = {}
    for name in filter(None, splits):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            there = {path.resolve() for path in open_dataset(source, name).paths() if path is not None}
        found[name] = sum(path.resolve() in there for path in examples)
    best = max(found, key=found.__getitem__)
    if not found[best]:
        raise UsageError(f"{source}: no split has the images; its splits are {', '.join(found)} (--split chooses one)")
    return open_dataset(source, best)


def find_ids(images: Sequence[str | Path], classes: Sequence[str]) -> DatasetIds | None:
    """Looks for the data set that a folder of images belongs to, as DIR/SPLIT belongs to DIR/annotations.

    Args:
        images: Files, folders and globs.
        classes: Class names of the predictions.

    Returns:
        Its ids; None unless all images are in one folder of a data set with at least one of the classes.
    """
    examples = _examples(images)
    folders = {path.resolve().parent for path in examples}
    if len(folders) != 1:
        return None
    folder = folders.pop()
    for root in (folder.parent, folder.parent.parent):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)
                matches = find_matches(str(root), Request(folder.name, verify="none"))
                if not matches or matches[0][1].confidence < LIKELY or matches[0][1].split != folder.name:
                    continue
                location = Path(matches[0][1].location)
                if not location.is_file() or location.stat().st_size > LARGEST_SEARCHED:
                    continue
                ids = DatasetIds(open_dataset(root, folder.name), classes)
        except (MaskwrightError, OSError):
            continue
        if examples and all(path.resolve() in ids.exact for path in examples):
            return ids
    return None


def _examples(images: Iterable[str | Path], count: int = 20) -> list[Path]:
    """Some of the image files, from every source."""
    found: list[Path] = []
    for source in images:
        path = Path(source)
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)[:count]
        elif path.is_file():
            found.append(path)
        else:
            found += [Path(p) for p in sorted(glob.glob(str(path.expanduser())))[:count]]  # noqa: PTH207
    return found
