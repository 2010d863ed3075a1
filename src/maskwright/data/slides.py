"""Whole-slide images and TIFF files that need a library to read windows of: by OpenSlide and tifffile.

    OpenSlide   Aperio, Hamamatsu, MIRAX, Leica, Ventana, Philips, Sakura and Trestle; the highest resolution
    tifffile    OME-TIFF whose bands are images of their own; JPEG 2000 and other codecs (with imagecodecs); the highest
                resolution

All other files are read without them, see `windows`. Both are in the extra ``slides``, imagecodecs in ``codecs``.
"""

# tifffile and openslide have no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
from __future__ import annotations

import io
import math
import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.deep_images import TiffLayout, tiff_layout
from maskwright.data.findings import DataWarning
from maskwright.data.images import MAX_PIXELS, current_reading, decode, read_size
from maskwright.data.windows import (
    CACHE,
    TILES,
    WhiteRange,
    WindowedImage,
    WindowSource,
    is_huge,
    overview_of,
    overview_step,
)
from maskwright.errors import ImageError

SLIDES = frozenset(".bif .mrxs .ndpi .scn .svs .svslide .vms .vmu".split())  # noqa: SIM905 - read by OpenSlide only
WHOLE = 1 << 25  # pixels of an image that is decoded whole although it is predicted in tiles
_VENDORS = ("Aperio", "Hamamatsu", "Leica", "Philips", "Ventana", "<iScan")
_PILLOW = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000, 50001)  # codecs of its libtiff
_ROOM = 1 << 40


def is_slide(path: str | Path) -> bool:
    """Whether the suffix is that of a whole-slide format that is no ordinary TIFF file."""
    return Path(path).suffix.lower() in SLIDES


def read_in_windows(path: Path) -> bool:
    """Whether an image that is predicted in tiles is read in windows too, because it is large or a slide.

    Unreadable files, and formats without windows up to `MAX_PIXELS`, are not.
    """
    if is_slide(path) or is_huge(path):
        return True
    try:
        with path.open("rb") as file:
            start = file.read(8)
        height, width = read_size(path, _ROOM)
    except (ImageError, OSError):
        return False
    windowed = start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or start.startswith((b"BM", b"P5", b"P6"))
    return windowed and height * width > WHOLE


def open_windows(path: str | Path) -> WindowSource:
    """Open an image of which windows are read.

    Args:
        path: A file of any supported kind.

    Raises:
        ImageError: If the file is damaged, windows of it cannot be read, or an optional library is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path}: no such file")
    if is_slide(path):
        return SlideImage(path)
    with path.open("rb") as file:
        layout = tiff_layout(file)
    if layout is not None:
        description = str(layout.tags.get(270, ""))
        if description.startswith(_VENDORS) and layout.compression not in _PILLOW:
            return SlideImage(path)
        if _needs_tifffile(layout, description):
            return SeriesImage(path)
    return WindowedImage(path)


def _needs_tifffile(layout: TiffLayout, description: str) -> bool:
    """Whether bands are stored as images of their own, or Pillow lacks the codec."""
    several = "<OME" in description and layout.samples == 1 and 'SizeC="1"' not in description
    return several or layout.compression not in _PILLOW


class SlideImage:
    """A whole-slide image, read by OpenSlide at its highest resolution.

    Regions that were not scanned have the background colour that the file declares, or white.

    Attributes:
        path: The file.
        size: H, W.

    Raises:
        ImageError: If OpenSlide is not installed or does not support the file.
    """

    def __init__(self, path: Path):
        try:
            import openslide
        except ImportError:
            raise ImageError(_install(path, "whole-slide images are read by OpenSlide")) from None
        self.path = path
        try:
            self._slide: Any = openslide.OpenSlide(os.fspath(path))
        except openslide.OpenSlideUnsupportedFormatError:
            raise ImageError(f"{path}: is not a whole-slide image that OpenSlide supports") from None
        except Exception as error:  # of the library, and of the file system
            raise ImageError(f"{path}: cannot be opened by OpenSlide ({error}); replace or remove it") from None
        width, height = self._slide.dimensions
        self.size: tuple[int, int] = (int(height), int(width))
        self._background = "#" + str(self._slide.properties.get("openslide.background-color", "ffffff"))

    def order(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """A sort key that puts windows into the order in which they are stored."""
        return y, x

    def window(self, x: int, y: int, width: int, height: int) -> UInt8[Tensor, "c h w"]:
        """Read a window as 8-bit RGB; see `WindowedImage.window`."""
        return self._region(x, y, 0, width, height)

    def overview(self, pixels: int) -> UInt8[Tensor, "c h w"]:
        """About every n-th pixel of every n-th row, from a stored image of lower resolution; see `overview_step`."""
        step = overview_step(self.size, pixels)
        shape = (-(-self.size[0] // step), -(-self.size[1] // step))
        try:
            level = self._slide.get_best_level_for_downsample(step)
            width, height = self._slide.level_dimensions[level]
        except Exception as error:
            raise self._damaged(error) from None
        if width * height > max(4 * pixels, MAX_PIXELS):
            return overview_of(self, pixels)
        whole = self._region(0, 0, level, width, height)
        rows = (torch.arange(shape[0]) * step * height // self.size[0]).clamp(max=height - 1)
        columns = (torch.arange(shape[1]) * step * width // self.size[1]).clamp(max=width - 1)
        return whole[:, rows][:, :, columns]

    def _region(self, x: int, y: int, level: int, width: int, height: int) -> Tensor:
        from PIL import Image

        try:
            region = self._slide.read_region((x, y), level, (width, height))
            plain = Image.new("RGB", region.size, self._background)
            plain.paste(region, mask=region.getchannel("A"))
        except Exception as error:  # OpenSlide refuses all further calls after an error
            raise self._damaged(error) from None
        return torch.from_numpy(np.array(plain)).permute(2, 0, 1)

    def _damaged(self, error: Exception) -> ImageError:
        return ImageError(f"{self.path}: the slide is damaged ({error}); replace or remove it")


class SeriesImage:
    """The first image of a TIFF file at its highest resolution, read by tifffile.

    Attributes:
        path: The file.
        size: H, W.

    Raises:
        ImageError: If tifffile is not installed, the file is damaged, or the image has other axes than bands, rows and
            columns.
    """

    def __init__(self, path: Path):
        try:
            import tifffile
        except ImportError:
            what = "TIFF files whose bands are separate images, or with this compression, are read by tifffile"
            raise ImageError(_install(path, what)) from None
        self.path = path
        try:
            self._file: Any = tifffile.TiffFile(path)
            weakref.finalize(self, self._file.close)
            series = self._file.series[0].levels[0]
            axes, shape = str(series.axes), tuple(int(side) for side in series.shape)
            self._pages: list[Any] = [page for page in series.pages if page is not None]
            self._key: Any = self._pages[0].keyframe
        except Exception as error:  # of any class on damaged data
            raise ImageError(f"{path}: cannot be read as TIFF ({error}); replace or remove it") from None
        sides = dict(zip(axes, shape, strict=True))
        others = {axis: side for axis, side in sides.items() if axis not in "YXSC" and side > 1}
        if others or "Y" not in sides or "X" not in sides:
            words = " x ".join(f"{axis}={side}" for axis, side in sides.items())
            raise ImageError(f"{path}: has the axes {words}; write one plane of it (channels, Y, X) to a file")
        self.size: tuple[int, int] = (sides["Y"], sides["X"])
        self._rgb = int(self._key.photometric) in (2, 6) and self._key.samplesperpixel >= 3
        tiled = bool(self._key.is_tiled)
        self._block = (
            (int(self._key.tilelength), int(self._key.tilewidth))
            if tiled
            else (min(self.size[0], int(self._key.rowsperstrip)), self.size[1])
        )
        if math.prod(self._block) > MAX_PIXELS:
            raise ImageError(
                f"{path}: strips or tiles of {self._block[1]} x {self._block[0]} pixels have to be decoded at once, "
                f"more than the limit of {MAX_PIXELS}; convert it to a tiled TIFF file"
            )
        self._grid = (-(-self.size[0] // self._block[0]), -(-self.size[1] // self._block[1]))
        self._planes = int(self._key.samplesperpixel) if int(self._key.planarconfig) == 2 else 1
        self._cache: OrderedDict[tuple[int, int], npt.NDArray[Any]] = OrderedDict()
        self._cached = 0
        self._mentioned = False
        self._white = WhiteRange(path)
        self._white.files = self._parts
        self._plane(0, 0, 0, 0, 1, 1)  # a missing codec is reported at once

    def order(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """A sort key that puts windows into the order in which they are stored."""
        return y, x

    def window(self, x: int, y: int, width: int, height: int) -> UInt8[Tensor, "c h w"]:
        """Read a window as 8-bit RGB, or with the bands that are to be read; see `WindowedImage.window`."""
        return decode(io.BytesIO(self._small(x, y, width, height)), os.fspath(self.path), white=self._white)

    def overview(self, pixels: int) -> UInt8[Tensor, "c h w"]:
        """Every n-th pixel of every n-th row, so that about `pixels` remain; see `overview_step`."""
        return overview_of(self, pixels)

    def _parts(self) -> Iterator[bytes]:
        """The image in parts, each as a file."""
        height, width = self.size
        for y in range(0, height, 512):
            for x in range(0, width, 4096):
                yield self._small(x, y, min(4096, width - x), min(512, height - y))

    def _small(self, x: int, y: int, width: int, height: int) -> bytes:
        """A window as an uncompressed TIFF file with interleaved bands."""
        import tifffile

        pages = len(self._pages)
        if pages > 1 and current_reading().bands is None:  # as other readers do, which see the first page only
            pages = 1
            if not self._mentioned:
                self._mentioned = True
                text = f"{self.path}: has {len(self._pages)} bands; the first is read (resize.bands selects others)"
                warnings.warn(text, DataWarning, stacklevel=2)
        bands = [self._plane(page, plane, x, y, width, height)
                 for page in range(pages) for plane in range(self._planes)]  # fmt: skip
        values = bands[0] if len(bands) == 1 else np.concatenate(bands, 2)
        kind = "rgb" if self._rgb else "miniswhite" if int(self._key.photometric) == 0 else "minisblack"
        several = values.shape[2] > 1
        file = io.BytesIO()
        tifffile.imwrite(
            file,
            values if several else values[:, :, 0],
            photometric=kind,
            planarconfig="contig" if several else None,
            extrasamples=None if not several else ["unspecified"] * (values.shape[2] - (3 if self._rgb else 1)),
            metadata=None,
        )
        return file.getvalue()

    def _plane(self, page: int, plane: int, x: int, y: int, width: int, height: int) -> npt.NDArray[Any]:
        """A window (height, width, bands) of one page, or of one of its planes."""
        rows, columns = self._block
        result: npt.NDArray[Any] | None = None
        for row in range(y // rows, -(-(y + height) // rows)):
            for column in range(x // columns, -(-(x + width) // columns)):
                index = (plane * self._grid[0] + row) * self._grid[1] + column
                block = self._decoded(page, index)
                if result is None:
                    result = np.zeros((height, width, block.shape[2]), block.dtype)
                top, left = row * rows, column * columns
                y0, y1 = max(y, top), min(y + height, top + block.shape[0])
                x0, x1 = max(x, left), min(x + width, left + block.shape[1])
                result[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - top : y1 - top, x0 - left : x1 - left]
        assert result is not None
        return result

    def _decoded(self, page: int, index: int) -> npt.NDArray[Any]:
        """A strip or tile."""
        known = self._cache.get((page, index))
        if known is not None:
            self._cache.move_to_end((page, index))
            return known
        own, key = self._pages[page], self._key
        try:
            count = int(own.databytecounts[index])
            self._file.filehandle.seek(int(own.dataoffsets[index]))
            data: bytes = self._file.filehandle.read(count)
            if len(data) < count:
                raise ImageError(f"{self.path}: the image is truncated; copy it again or remove it")
            segment, _, shape = key.decode(data or None, index, jpegtables=key.jpegtables)
            if segment is None:  # a tile that the file leaves out
                segment = np.zeros(shape, key.dtype)
        except ImageError:
            raise
        except Exception as error:  # tifffile reports a missing codec as ValueError
            if "imagecodecs" in str(error):
                what = f"decoding {key.compression.name} requires imagecodecs"
                raise ImageError(_install(self.path, what, "codecs")) from None
            raise ImageError(f"{self.path}: the image is damaged ({error}); replace or remove it") from None
        block = np.ascontiguousarray(segment[0])
        self._cache[page, index] = block
        self._cached += block.nbytes
        while len(self._cache) > 1 and self._cached > (TILES if self._key.is_tiled else CACHE):
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return block


def _install(path: Path, what: str, extra: str = "slides") -> str:
    return f"{path}: {what}; run: pip install 'maskwright[{extra}]'"
