"""What predictions are asked for: paths, folders, globs, images in memory, and any mixture and stream of these."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import ImageError, UsageError
from maskwright.structures import Preprocess

# What a folder is searched for. A file named by itself or by a glob may be called anything.
SUFFIXES = frozenset(
    ".avif .bmp .gif .j2k .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Item:
    """One image, not yet read: a path, or what was given."""

    path: Path | None
    given: Any = None

    @property
    def name(self) -> str:
        return str(self.path) if self.path is not None else "the image"


def is_single(source: Any) -> bool:
    """Whether this is one image: its result is a prediction and not a stream of them."""
    if isinstance(source, (str, Path)):
        return not _is_glob(source) and not Path(source).expanduser().is_dir()
    if isinstance(source, (np.ndarray, Tensor)):
        return source.ndim < 4
    return _is_pillow(source)


def items(source: Any, recursive: bool) -> list[Item] | Iterator[Item]:
    """Every image of `source`, in order; a list where the number is known, and then nothing is left to expand.

    UsageError for a folder or glob without images, before anything is computed.
    """
    if isinstance(source, (str, Path)):
        return _named(source, recursive)
    if is_single(source):
        return [Item(None, source)]
    if isinstance(source, (list, tuple, np.ndarray, Tensor)):
        found = [item for entry in source for item in items(entry, recursive)]
        if not found:
            raise UsageError("there are no images to predict on: the list is empty")
        return found
    if isinstance(source, Iterable):
        return (item for entry in source for item in items(entry, recursive))
    raise UsageError(
        f"{type(source).__name__} is no image: give a path, a folder, a glob, an array, a tensor or a PIL image"
    )


def read(item: Item, preprocess: Preprocess) -> Tensor:
    """The image as (C, H, W) uint8 with the channels that the network takes. ImageError says what is wrong."""
    try:
        return preprocess.match_channels(_loaded(item))
    except UsageError as error:
        raise ImageError(f"{item.name}: {error}") from None


def displayed(item: Item) -> Tensor:
    """The image as (3, H, W) uint8, to be drawn on: of many channels the first three, of two the first."""
    image = _loaded(item)
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _loaded(item: Item) -> Tensor:
    if item.path is not None:
        from maskwright.data import read_image

        image = read_image(item.path)
    else:
        image = _pixels(item.given)
    if not image.numel():
        raise ImageError(f"{item.name} has no pixels: {image.shape[1]} x {image.shape[2]}")
    return image


def _pixels(given: Any) -> Tensor:
    if _is_pillow(given):
        # As it stands: whoever opened it decided about its orientation.
        return torch.from_numpy(np.array(given.convert("RGB"))).permute(2, 0, 1)
    shape = tuple(given.shape)
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8:
            raise ImageError(f"an array is uint8, 0 ... 255; this one is {given.dtype}")
        if given.ndim not in (2, 3):
            raise ImageError(f"an array is (H, W, C) or (H, W); this one is {shape}")
        array = np.ascontiguousarray(given if given.ndim == 3 else given[..., None])
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).permute(2, 0, 1)
    if given.dtype != torch.uint8:
        raise ImageError(f"a tensor is uint8, 0 ... 255; this one is {given.dtype}")
    if given.ndim not in (2, 3):
        raise ImageError(f"a tensor is (C, H, W) or (H, W); this one is {shape}")
    if given.ndim == 3 and shape[0] > 8 and shape[2] <= 4:
        raise ImageError(f"a tensor is (C, H, W), channels first; this one is {shape}: permute(2, 0, 1) it")
    return (given if given.ndim == 3 else given[None]).detach().cpu()


def _named(source: str | Path, recursive: bool) -> list[Item]:
    path = Path(source).expanduser()
    if path.is_dir():
        walk = path.rglob("*") if recursive else path.iterdir()
        found = sorted(p for p in walk if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
        if not found:
            deeper = (
                ""
                if recursive or not any(p.is_dir() for p in path.iterdir())
                else "; its sub-folders were not searched (recursive=True does)"
            )
            raise UsageError(f"{path}: there are no images in this folder{deeper}")
        return [Item(p) for p in found]
    if _is_glob(source):
        names = sorted(glob.glob(os.fspath(path), recursive=True))  # noqa: PTH207 - absolute patterns too
        found = [Path(n) for n in names if Path(n).is_file()]
        if not found:
            raise UsageError(f"{source}: no file matches this pattern")
        return [Item(p) for p in found]
    return [Item(path)]


def _is_glob(source: str | Path) -> bool:
    return glob.has_magic(os.fspath(source)) and not Path(source).expanduser().exists()


def _is_pillow(source: Any) -> bool:
    return hasattr(source, "convert") and hasattr(source, "getbands")
