"""The formats of annotated data sets, and what each of their modules provides.

A format is one module, registered in `FORMATS` under a short name. The module defines

    NAME        name for messages, such as "COCO instances"
    LAYOUT      what it reads, for messages, with "{split}" where the name of the split goes
    sniff       which data sets of the format exist at a source (see `Format.sniff`)
    read        one of them (see `Format.read`)

and, optionally, `HOLDS` and `write` (see `exchange.writing.Writer`) and, for `maskwright check --fix`, `repaired` (see
`coco.repaired`). Modules are imported when a source is
opened, so that unused formats cost nothing. Another package adds a format with `register_format`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from maskwright.data.dataset import Dataset
from maskwright.data.table import Table, Verify
from maskwright.errors import UsageError

FORMATS: dict[str, str] = {
    "coco": "maskwright.data.coco",
    "coco-panoptic": "maskwright.data.panoptic",
    "contours": "maskwright.data.contour_scenes",
    "scenes": "maskwright.data.scenes",
    "clips": "maskwright.data.moving_scenes",
    "davis": "maskwright.data.davis",
    "youtube-vis": "maskwright.data.youtube_vis",
    "yolo": "maskwright.data.exchange.yolo",
    "labelme": "maskwright.data.exchange.labelme",
    "via": "maskwright.data.exchange.via",
    "cvat": "maskwright.data.exchange.cvat",
    "voc": "maskwright.data.exchange.voc",
    "cityscapes": "maskwright.data.exchange.cityscapes",
    "label-maps": "maskwright.data.exchange.label_maps",
    "tar-shards": "maskwright.data.tar_shards",
    "results": "maskwright.data.exchange.results",
}

# Degrees of confidence of a `Match`.
CERTAIN = 1.0  # the names or the content belong to this format alone
LIKELY = 0.75  # the content fits, but other formats could have it too
POSSIBLE = 0.5  # only the suffix of the file fits


@dataclass(frozen=True)
class Request:
    """What the caller of `open_dataset` wants.

    Attributes:
        split: Name of the split; None: every split.
        keypoints: True: with keypoints; False: without; None: whatever the source has.
        panoptic: True: with stuff; False: without; None: whatever the source has.
        images: Folder that image files are relative to; None: searched for.
        verify: Number of image headers that are read; see `add_images`.
    """

    split: str | None = "train"
    keypoints: bool | None = None
    panoptic: bool | None = None
    images: Path | None = None
    verify: Verify | None = None


@dataclass(frozen=True)
class Match:
    """A data set that a format has found at a source.

    Attributes:
        location: What `read` opens: a file or folder, or a text such as "scenes:count=8".
        confidence: How certain it is that the source has this format and serves the request, above 0 and up to 1. The
            highest wins; formats with equal confidence are an error that lists them.
        reason: What the confidence rests on, for messages: "annotations/instances_train.json".
        split: The split it belongs to; None if the source is not divided into splits and serves as any of them.
        direct: Whether the caller named the location itself, so that files beside it are not expected to be read.
    """

    location: str
    confidence: float
    reason: str
    split: str | None = None
    direct: bool = False


class Format(Protocol):
    """What a module of a format defines."""

    NAME: str
    LAYOUT: str

    def sniff(self, source: str, request: Request) -> Sequence[Match]:
        """Find data sets of this format, without reading annotations in full.

        Args:
            source: What the caller wants to open: a path, or a text that is no path. It may not exist.
            request: What the caller wants. With `request.split` None, matches of all splits are returned.

        Returns:
            At most one match for each split that fits the request, empty if there is none.
        """
        ...

    def read(self, match: Match, request: Request) -> Table | Dataset:
        """Read one of the data sets that `sniff` has found.

        Args:
            match: A match of this format.
            request: What the caller wants.

        Returns:
            A table with findings, which never raises for what is in the file; or a data set, if the format has no
            annotation files.
        """
        ...


def register_format(name: str, module: str) -> None:
    """Add a format.

    Args:
        name: Short name, for `open_dataset(format=...)`.
        module: Dotted name of the module; it is imported on first use.

    Raises:
        UsageError: If another module is registered under this name.
    """
    if FORMATS.get(name, module) != module:
        raise UsageError(f"format {name!r} is registered already, for {FORMATS[name]}; choose another name")
    FORMATS[name] = module


def load_format(name: str) -> Format:
    """Return the module of a format.

    Raises:
        UsageError: If there is no format of this name.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown data set format {name!r}; expected one of {', '.join(FORMATS)}")
    return cast(Format, importlib.import_module(FORMATS[name]))
