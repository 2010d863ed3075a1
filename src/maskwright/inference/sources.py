"""Sources of images for prediction: paths, folders, globs, images in memory, and iterables of these."""

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

# Suffixes that a folder is searched for. Files given by path or glob may have any name.
SUFFIXES = frozenset(
    ".avif .bmp .gif .j2k .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Item:
    """One image that has not been read yet.

    Attributes:
        path: Its file; None for an image in memory.
        given: The array, tensor or PIL image.
    """

    path: Path | None
    given: Any = None

    @property
    def name(self) -> str:
        """What messages call the image."""
        return str(self.path) if self.path is not None else "the image"


def is_single(source: Any) -> bool:
    """Whether `source` is one image, for which `predict` returns one prediction instead of an iterator."""
    if isinstance(source, (str, Path)):
        return not _is_glob(source) and not Path(source).expanduser().is_dir()
    if isinstance(source, (np.ndarray, Tensor)):
        return source.ndim < 4
    return _is_pillow(source)


def items(source: Any, recursive: bool) -> list[Item] | Iterator[Item]:
    """The images of a source in order.

    Args:
        source: A path, a folder, a glob, an array, a tensor, a PIL image, or an iterable of these.
        recursive: Whether to search subfolders.

    Returns:
        A list if the number of images is known in advance, otherwise an iterator.

    Raises:
        UsageError: If a folder, glob or list contains no images, or the type is not supported.
    """
    if isinstance(source, (str, Path)):
        return _named(source, recursive)
    if is_single(source):
        return [Item(None, source)]
    if isinstance(source, (list, tuple, np.ndarray, Tensor)):
        found = [item for entry in source for item in items(entry, recursive)]
        if not found:
            raise UsageError("no images to predict on: the list is empty")
        return found
    if isinstance(source, Iterable):
        return (item for entry in source for item in items(entry, recursive))
    raise UsageError(
        f"images must be a path, a folder, a glob, an array, a tensor, a PIL image or an iterable of these, got "
        f"{type(source).__name__}"
    )


def read(item: Item, preprocess: Preprocess) -> Tensor:
    """Read an image with the number of channels that the network expects.

    Args:
        item: The image.
        preprocess: The preprocessing of the system.

    Returns:
        The image as (C, H, W) uint8.

    Raises:
        ImageError: If the image cannot be read or has other channels.
    """
    try:
        return preprocess.match_channels(_loaded(item))
    except UsageError as error:
        raise ImageError(f"{item.name}: {error}") from None


def displayed(item: Item) -> Tensor:
    """Read an image for drawing.

    Args:
        item: The image.

    Returns:
        The first three channels as (3, H, W) uint8; for one or two channels the first one, repeated.

    Raises:
        ImageError: If the image cannot be read.
    """
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
        # The EXIF orientation is not applied; it is left to the caller, who opened the image.
        return torch.from_numpy(np.array(given.convert("RGB"))).permute(2, 0, 1)
    shape = tuple(given.shape)
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8:
            raise ImageError(f"an array must have dtype uint8, with values from 0 to 255; got {given.dtype}")
        if given.ndim not in (2, 3):
            raise ImageError(f"an array must have shape (H, W, C) or (H, W), got {shape}")
        array = np.ascontiguousarray(given if given.ndim == 3 else given[..., None])
        if not array.flags.writeable:
            array = array.copy()
        return torch.from_numpy(array).permute(2, 0, 1)
    if given.dtype != torch.uint8:
        raise ImageError(f"a tensor must have dtype uint8, with values from 0 to 255; got {given.dtype}")
    if given.ndim not in (2, 3):
        raise ImageError(f"a tensor must have shape (C, H, W) or (H, W), got {shape}")
    if given.ndim == 3 and shape[0] > 8 and shape[2] <= 4:
        raise ImageError(f"a tensor must have shape (C, H, W), channels first, got {shape}; use permute(2, 0, 1)")
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
                else "; subfolders were not searched (use recursive=True)"
            )
            raise UsageError(f"{path}: no images in this folder{deeper}")
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
