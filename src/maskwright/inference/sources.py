"""Sources of images for prediction: paths, folders, globs, images in memory, and iterables of these.

An image in memory is a PIL image, an array, a tensor, or an encoded file as bytes or as an object with `read`. All of
them, and image files, become 8 bits per channel by one rule (`data.pixel_values`).
"""

# torch.from_numpy has no type.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import glob
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskwright.data.findings import DataWarning
from maskwright.data.images import Reading, common_white, decode, read_image, reading, rgb, white_words
from maskwright.data.pixel_values import to_8_bits
from maskwright.data.slides import SLIDES, is_slide
from maskwright.errors import ImageError, UsageError
from maskwright.inference.naming import without_outputs
from maskwright.structures import Preprocess

# Suffixes that a folder is searched for. Files given by path or glob may have any name.
SUFFIXES = SLIDES | frozenset(
    ".avif .bmp .gif .j2k .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
KINDS = "a path, a folder, a glob, an array, a tensor, a PIL image, bytes, a file object or an iterable of these"
_ORIENTATION = 0x0112


class Encoded:
    """The content of an image file in memory; a file object is read once, when its content is needed."""

    def __init__(self, source: Any):
        self._source: Any = source
        self._data: bytes | None = None

    def data(self) -> bytes:
        """Return the bytes.

        Raises:
            ImageError: If a file object does not return bytes or cannot be read.
        """
        if self._data is None:
            self._data = bytes(self._source) if _is_bytes(self._source) else _content(self._source)
            self._source = None
        return self._data


@dataclass(frozen=True)
class Item:
    """One image that has not been read yet.

    Attributes:
        path: Its file; None for an image in memory.
        given: The array, tensor, PIL image or `Encoded`.
        reading: How it is read if it has other than 8-bit RGB values.
    """

    path: Path | None
    given: Any = None
    reading: Reading = field(default_factory=Reading, compare=False)

    @property
    def name(self) -> str:
        """What messages call the image."""
        return str(self.path) if self.path is not None else "the image"


def is_single(source: Any) -> bool:
    """Return whether `source` is one image, for which `predict` returns one prediction instead of an iterator."""
    if isinstance(source, (str, os.PathLike)):
        path = cast("str | os.PathLike[str]", source)
        return not _is_glob(path) and not Path(path).expanduser().is_dir()
    if _is_names(source):
        return False
    if isinstance(source, (np.ndarray, Tensor)):
        return source.ndim < 4
    return _is_pillow(source) or _is_bytes(source) or _is_file(source) or _is_array_like(source)


def items(source: Any, recursive: bool) -> list[Item] | Iterator[Item]:
    """Return the images of a source in order. Images in memory are checked for their kind, shape and type at once.

    Args:
        source: A path, a folder, a glob, an array, a tensor, a PIL image, bytes, a file object, or an iterable of
            these.
        recursive: Whether to search subfolders.

    Returns:
        A list if the number of images is known in advance, otherwise an iterator.

    Raises:
        UsageError: If a folder, glob or list contains no images, or the type is not supported.
        ImageError: If an array or tensor cannot be an image.
    """
    if isinstance(source, (str, os.PathLike)):
        return _named(cast("str | os.PathLike[str]", source), recursive)
    if _is_bytes(source) or _is_file(source):
        return [Item(None, Encoded(source))]
    if _is_pillow(source):
        return [Item(None, source)]
    if _is_array_like(source):
        source = np.asarray(source)
    if _is_names(source):
        source = source.tolist()
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim < 4:
        _check_array(cast(Any, source))
        return [Item(None, source)]
    if isinstance(source, (list, tuple, np.ndarray, Tensor)):
        found = [item for entry in cast("Iterable[Any]", source) for item in items(entry, recursive)]
        if not found:
            raise UsageError("no images to predict on: the list is empty")
        return found
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        return (item for entry in cast("Iterable[Any]", source) for item in items(entry, recursive))
    raise UsageError(f"images must be {KINDS}, got {type(cast(object, source)).__name__}")


def reading_of(wanted: list[Item] | Iterator[Item], preprocess: Preprocess) -> Reading:
    """Return how images are read: as the preprocessing specifies, otherwise with the range of all files together.

    Args:
        wanted: The images; only a list of them is examined.
        preprocess: The preprocessing of the system.
    """
    white = preprocess.white
    if white is None and isinstance(wanted, list) and len(wanted) > 1:
        white = common_white([item.path for item in wanted if item.path is not None])
        if white is not None and white < 0xFFFF:
            warnings.warn(white_words(white), DataWarning, stacklevel=3)
    return Reading(white, preprocess.bands)


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
    if item.path is not None and is_slide(item.path):
        raise ImageError(f"{item.path}: whole-slide images are predicted in tiles; give the side of a tile, 1024 say")
    with reading(item.reading):
        if item.path is not None:
            image = read_image(item.path)
        elif isinstance(item.given, Encoded):
            image = decode(io.BytesIO(item.given.data()), item.name)
        elif _is_pillow(item.given):
            image = _of_pillow(item.given, item)
        else:
            image = _of_array(item.given, item)
    if not image.numel():
        raise ImageError(f"{item.name} has no pixels: {image.shape[1]} x {image.shape[2]}")
    return image


# ---- images in memory ------------------------------------------------------------------------------------------------


def _of_pillow(given: Any, item: Item) -> Tensor:
    """A PIL image as (C, H, W). The EXIF orientation is not applied, so that results fit the image that was given."""
    file: Any = getattr(given, "fp", None)
    if getattr(given, "tile", None) and file is not None and not getattr(given, "is_animated", False):
        return _of_unloaded(given, file, item)
    try:
        orientation: Any = given.getexif().get(_ORIENTATION, 1) if hasattr(given, "getexif") else 1
        values = rgb(given, item.name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise ImageError(f"{item.name} cannot be read ({error or type(error).__name__})") from None
    if orientation not in (1, None):
        _mention_orientation()
    return _channels_first(to_8_bits(values, item.name, white=item.reading.white, mention_full=True))


def _of_unloaded(given: Any, file: Any, item: Item) -> Tensor:
    """A PIL image whose pixels have not been decoded: read as its file, which may hold more than Pillow decodes."""
    try:
        position = file.tell()
        file.seek(0)
        data: bytes = file.read()
        file.seek(position)
    except (OSError, ValueError, AttributeError):
        given.load()
        return _of_pillow(given, item)
    size = (given.height, given.width)
    pixels = decode(io.BytesIO(data), item.name, turn=False)
    orientation: Any = given.getexif().get(_ORIENTATION, 1)  # decodes the pixels of some formats
    if tuple(pixels.shape[1:]) != size:  # Image.draft has chosen another size
        given.load()
        return _of_pillow(given, item)
    if orientation not in (None, 1) and given.format != "TIFF":
        _mention_orientation()
    return pixels


def _mention_orientation() -> None:
    text = "the EXIF orientation of a PIL image is not applied; apply PIL.ImageOps.exif_transpose to it first"
    warnings.warn(text, DataWarning, stacklevel=3)


def _of_array(given: npt.NDArray[Any] | Tensor, item: Item) -> Tensor:
    """An array (H, W, C) or a tensor (C, H, W), with any type of values, as (C, H, W) uint8."""
    if isinstance(given, Tensor):
        tensor = given.detach().cpu()
        if tensor.dtype == torch.uint8:
            return tensor if tensor.ndim == 3 else tensor[None]
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        values = tensor.numpy()
        values = values if values.ndim == 3 else values[None]
        converted = to_8_bits(values, item.name, white=item.reading.white, mention_full=True)
        return torch.from_numpy(np.ascontiguousarray(converted))
    values = given if given.ndim == 3 else given[..., None]
    return _channels_first(to_8_bits(values, item.name, white=item.reading.white, mention_full=True))


def _channels_first(values: npt.NDArray[np.uint8]) -> Tensor:
    array = np.ascontiguousarray(values)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).permute(2, 0, 1)


def _check_array(given: npt.NDArray[Any] | Tensor) -> None:
    """Refuse what cannot be an image, whatever its values."""
    shape = tuple(given.shape)
    if isinstance(given, np.ndarray):
        if given.dtype.kind not in "buif":
            raise ImageError(f"an array must have real numbers as values, uint8 for instance; got {given.dtype}")
        if given.ndim not in (2, 3):
            raise ImageError(f"an array must have shape (H, W, C) or (H, W), got {shape}")
        if given.ndim == 3 and 1 <= shape[0] <= 4 and shape[2] > 8:
            raise ImageError(f"an array must have shape (H, W, C), channels last, got {shape}; use transpose(1, 2, 0)")
        return
    if given.is_complex() or given.is_quantized or given.layout != torch.strided:
        raise ImageError(f"a tensor must be dense with real numbers as values, uint8 for instance; got {given.dtype}")
    if given.ndim not in (2, 3):
        raise ImageError(f"a tensor must have shape (C, H, W) or (H, W), got {shape}")
    if given.ndim == 3 and shape[0] > 8 and shape[2] <= 4:
        raise ImageError(f"a tensor must have shape (C, H, W), channels first, got {shape}; use permute(2, 0, 1)")


def _content(source: Any) -> bytes:
    """The content of a file object from its position on; from its start if it is at its end."""
    try:
        data = source.read()
        if isinstance(data, str):
            raise ImageError("the image file is open in text mode; open it in binary mode ('rb')")
        if not data and hasattr(source, "seek"):
            source.seek(0)
            data = source.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"the image file cannot be read ({error})") from None
    if not _is_bytes(data):
        raise ImageError(f"the image file must return bytes, got {type(data).__name__}")
    return bytes(data)


# ---- kinds of sources ------------------------------------------------------------------------------------------------


def _named(source: str | os.PathLike[str], recursive: bool) -> list[Item]:
    path = Path(source).expanduser()
    if path.is_dir():
        walk = path.rglob("*") if recursive else path.iterdir()
        named = sorted(p for p in walk if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
        found = without_outputs(named, path)
        if named and not found:
            raise UsageError(f"{path}: all images in this folder were written by earlier predictions")
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
        named = [Path(n) for n in names if Path(n).is_file()]
        found = without_outputs(named, path)
        if named and not found:
            raise UsageError(f"{source}: all files that match this pattern were written by earlier predictions")
        if not found:
            raise UsageError(f"{source}: no file matches this pattern")
        return [Item(p) for p in found]
    return [Item(path)]


def _is_glob(source: str | os.PathLike[str]) -> bool:
    return glob.has_magic(os.fspath(source)) and not Path(source).expanduser().exists()


def _is_pillow(source: Any) -> bool:
    return hasattr(source, "convert") and hasattr(source, "getbands")


def _is_bytes(source: Any) -> bool:
    return isinstance(source, (bytes, bytearray, memoryview))


def _is_file(source: Any) -> bool:
    return callable(getattr(source, "read", None)) and not isinstance(source, type)


def _is_names(source: Any) -> bool:
    """Whether an array or a column of a table holds paths or other objects instead of pixels."""
    dtype: Any = getattr(source, "dtype", None)
    return getattr(dtype, "kind", "") in ("O", "U", "T") and getattr(source, "ndim", 0) == 1


def _is_array_like(source: Any) -> bool:
    return hasattr(source, "__array__") and not isinstance(source, (np.ndarray, Tensor)) and not _is_pillow(source)
