"""Converting data sets between formats: what is lost is found, and reported, before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from maskwright.data.dataset import Dataset, as_dataset
from maskwright.data.exchange.losses import Loss, find_losses
from maskwright.data.exchange.writing import ImageFiles, Part
from maskwright.data.findings import DataWarning, first_few
from maskwright.data.formats import FORMATS, Request, load_format
from maskwright.data.opening import best_match, find_matches, open_dataset
from maskwright.data.splitting import divided
from maskwright.data.views import Renamed
from maskwright.errors import DataError, UsageError
from maskwright.files import atomic_folder
from maskwright.text import printable

_SHOWN = 10  # objects that are named for each kind of loss


class LossError(DataError):
    """A conversion that would lose annotations and was not told to; nothing was written.

    Attributes:
        losses: What would be lost.
    """

    def __init__(self, message: str, losses: Sequence[Loss]):
        super().__init__(message)
        self.losses = list(losses)


@dataclass
class Converted:
    """The result of `convert_data`; `str()` summarizes it.

    Attributes:
        folder: The data set that was written.
        format: Name of its format.
        counts: Split, number of images and number of objects of each part.
        losses: What was lost, and what is worth knowing.
        renamed: Earlier and new name of images that were renamed.
    """

    folder: Path
    format: str
    counts: list[tuple[str | None, int, int]] = field(default_factory=list[tuple[str | None, int, int]])
    losses: list[Loss] = field(default_factory=list[Loss])
    renamed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def __str__(self) -> str:
        lines = [line for loss in self.losses for line in loss.lines(_SHOWN if loss.severe else 3)]
        if self.renamed:
            old, new = self.renamed[0]
            lines.append(
                f"{len(self.renamed)} images have new names, such as {first_few([new])} for {first_few([old])}"
            )
        for split, images, objects in self.counts:
            name = "" if split is None else f"{split}: "
            lines.append(f"{name}{images} image{'s' * (images != 1)}, {objects} object{'s' * (objects != 1)}")
        lines.append(f"{self.folder} ({load_format(self.format).NAME})")
        return "\n".join(printable(line) for line in lines)


def writable_formats() -> list[str]:
    """Return the names of the formats that can be written."""
    return [name for name in FORMATS if hasattr(load_format(name), "write") and hasattr(load_format(name), "HOLDS")]


def convert_data(
    source: Any,
    target: str | Path,
    to: str,
    *,
    split: str | None = None,
    format: str | None = None,
    images: str | Path | None = None,
    val: float | str | Path | None = None,
    seed: int = 0,
    allow_loss: bool = False,
    link: bool = False,
) -> Converted:
    """Write a data set in another format.

    All splits of the source are written. Objects keep their masks, parts and holes wherever the new format can hold
    them; which of them would lose what is found before anything is written. The folder appears complete or not at all.

    Args:
        source: What `open_dataset` opens; a `Dataset`, or a mapping from names of splits to data sets; COCO results
            (results.json of `predict`), whose scores are kept where the format has them.
        target: The new folder; must not exist.
        to: Name of the format, see `writable_formats`.
        split: Write this split only; None: all.
        format: Name of the format of the source; None: detected.
        images: The folder of the images of the source; None: searched for.
        val: A share in (0, 1): divide the only split into "train" and "val", stratified by class; or a source whose
            images become the split "val".
        seed: Seed of the division.
        allow_loss: Write although objects lose something.
        link: Make hard links to the images instead of copies.

    Returns:
        What was written and lost.

    Raises:
        LossError: If objects would lose something and `allow_loss` is False. Nothing has been written.
        UsageError: If `target` exists, or there is no such format or split.
        AnnotationError: If the source cannot be used.
        DataError: If a file cannot be written; nothing is left of the folder.

    Warns:
        DataWarning: About what is skipped in the source, and about near-duplicates across `val`.
    """
    target = Path(target)
    writer = _writer(to)
    if target.exists():
        raise UsageError(f"{target}: exists already; give a new folder")
    parts = open_parts(source, split, format, images)
    if val is not None:
        parts = _with_val(parts, val, seed, format)
    parts = with_equal_classes(parts)
    _refuse_empty(parts, source)
    losses = find_losses(parts, load_format(to).NAME, writer)
    severe = [loss for loss in losses if loss.severe]
    if severe and not allow_loss:
        lines = [line for loss in severe for line in loss.lines(_SHOWN)]
        head = f"{load_format(to).NAME} cannot hold everything, and nothing was written:"
        advice = "allow it with --allow-loss (allow_loss=True), or choose another format, such as coco"
        raise LossError("\n".join([head, *lines, advice]), severe)
    result = Converted(target, to, losses=losses)
    with atomic_folder(target, DataError) as folder:
        files = ImageFiles(folder, link)
        writer.write(folder, parts, files)
        result.renamed = files.renamed
    for part in parts:
        result.counts.append((part.split, len(part.dataset), _objects(part.dataset)))
    return result


def open_parts(
    source: Any, split: str | None = None, format: str | None = None, images: str | Path | None = None
) -> list[Part]:
    """Open the splits of a source; arguments as of `convert_data`.

    Raises:
        UsageError: If there is no such split, or several formats fit equally well.
    """
    if not isinstance(source, (str, Path)):
        if isinstance(source, dict):
            given = cast(dict[str | None, Any], source)
            return [Part(name, as_dataset(data)) for name, data in given.items() if split in (None, name)]
        return [Part(split, as_dataset(source))]
    folder = None if images is None else Path(images)
    text = str(source)
    if split is not None:
        _, match = best_match(text, Request(split, images=folder), format)
        return [Part(match.split, open_dataset(source, split, format=format, images=folder))]
    matches = find_matches(text, Request(None, images=folder), format)
    names = list(dict.fromkeys(match.split for _, match in matches if match.split is not None))
    if not names:
        best_match(text, Request("train", images=folder), format)  # raises if there is none
        return [Part(None, open_dataset(source, "train", format=format, images=folder))]
    return [Part(name, open_dataset(source, name, format=format, images=folder)) for name in names]


def _writer(name: str) -> Any:
    """The module of a format that can be written."""
    if name in FORMATS:
        module = load_format(name)
        if hasattr(module, "write") and hasattr(module, "HOLDS"):
            return module
    raise UsageError(f"cannot write data sets in the format {name!r}; expected one of {', '.join(writable_formats())}")


def _with_val(parts: list[Part], val: float | str | Path, seed: int, format: str | None) -> list[Part]:
    """The parts with a split for validation."""
    if isinstance(val, (int, float)):
        if len(parts) != 1:
            listed = ", ".join(str(part.split) for part in parts)
            raise UsageError(f"the data set is divided already ({listed}); name one of its splits (--split train)")
        train, held_out = divided(parts[0].dataset, float(val), seed)
        return [Part("train", train), Part("val", held_out)]
    others = open_parts(val, None, format)
    held_out = next((part for part in others if part.split == "val"), others[0])
    from maskwright.data.splitting import warn_about_duplicates

    kept = [part for part in parts if part.split != "val"]
    warn_about_duplicates(kept[0].dataset, held_out.dataset)
    return [Part(part.split or "train", part.dataset) for part in kept] + [Part("val", held_out.dataset)]


def with_equal_classes(parts: list[Part]) -> list[Part]:
    """Return the parts with one list of classes: those of the first part, then further ones of the others."""
    first = parts[0].dataset
    names = list(dict.fromkeys(name for part in parts for name in part.dataset.classes))
    if all(part.dataset.classes == first.classes for part in parts):
        return parts
    missing = [name for name in names if name not in first.classes]
    if missing:
        what = f"the splits have different classes: {first_few(missing)} are not in {parts[0].split!r}"
        warnings.warn(f"{what}; all splits are written with all classes", DataWarning, stacklevel=4)
    ids = dict(zip(first.classes, first.category_ids, strict=True))
    following = 1 + max([*ids.values(), 0])
    for name in names:
        if name not in ids:
            ids[name] = following
            following += 1
    views: list[Part] = []
    for part in parts:
        view = Renamed(part.dataset, names)
        view.category_ids = tuple(ids[name] for name in names)
        views.append(Part(part.split, view))
    return views


def _refuse_empty(parts: Sequence[Part], source: Any) -> None:
    if not any(len(part.dataset) for part in parts):
        raise DataError(f"{source}: has no images; there is nothing to write")


def _objects(dataset: Dataset) -> int:
    count: Callable[[int], int] = lambda index: len(dataset.image_labels(index))  # noqa: E731
    return sum(count(index) for index in range(len(dataset)))
