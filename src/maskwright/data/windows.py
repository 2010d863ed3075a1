"""Reading windows of images that are too large to be decoded whole.

A window is decoded from the part of the file that holds it: strips and tiles of a TIFF file one by one, rows of a PNG
file in order, rows of BMP and PPM files directly. Each part becomes a small file in memory that `images.decode` reads,
so that all kinds of pixels have the meaning that they have in other images. Memory is bounded by the rows of a window.
"""

# Pillow's tags and tiles have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.deep_images import tiff_layout
from maskwright.data.findings import DataWarning
from maskwright.data.images import (
    MAX_PIXELS,
    apply_orientation,
    decode,
    opened,
    orientation_of,
    read_size,
    white_of,
    white_words,
)
from maskwright.errors import ImageError

CACHE = 256 << 20  # bytes of decoded strips that are kept: those of a row of windows
TILES = 64 << 20  # bytes of decoded tiles that are kept
_HUGE = 1 << 62
_ADVICE = "convert it to a tiled TIFF file, or to PNG without interlacing"


class _Blocks(Protocol):
    """The stored image."""

    def window(self, x: int, y: int, width: int, height: int) -> UInt8[Tensor, "c h w"]:
        """Decode a window of the stored image."""
        ...


class WhiteRange:
    """The value of white of an image whose header does not declare it, from all of its pixels, as in small images."""

    def __init__(self, path: Path):
        self.path = path
        self.files: Callable[[], Iterator[bytes]] = lambda: iter(())  # the image in parts, each as a file
        self.known = False
        self.white: int | None = None

    def __call__(self) -> int | None:
        if not self.known:
            ends = [white_of(io.BytesIO(file), self.path, floats=True) for file in self.files()]
            white = max((end for end in ends if end is not None), default=None)
            if white == 255 and 1 in ends:
                raise ImageError(
                    f"{self.path}: contains float values in other ranges than 0 ... 1, of which windows cannot be "
                    "read; convert them to 8 or 16 bits"
                )
            self.white = None if white == 1 else white
            self.known = True
            if self.white is not None and self.white < 0xFFFF:
                warnings.warn(white_words(self.white), DataWarning, stacklevel=2)
        return self.white


class WindowSource(Protocol):
    """An image of any size, of which windows are read.

    Attributes:
        path: The file.
        size: H, W.
    """

    path: Path
    size: tuple[int, int]

    def order(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """A sort key that puts windows into the order in which they are stored."""
        ...

    def window(self, x: int, y: int, width: int, height: int) -> UInt8[Tensor, "c h w"]:
        """Read a window; see `WindowedImage.window`."""
        ...

    def overview(self, pixels: int) -> UInt8[Tensor, "c h w"]:
        """Every n-th pixel of every n-th row, so that about `pixels` remain; see `overview_step`."""
        ...


def overview_step(size: tuple[int, int], pixels: int) -> int:
    """The n for which every n-th pixel of every n-th row gives about `pixels`."""
    return max(1, int(np.ceil((size[0] * size[1] / pixels) ** 0.5)))


def overview_of(image: WindowSource, pixels: int) -> UInt8[Tensor, "c h w"]:
    """The overview of an image, from its windows."""
    height, width = image.size
    step = overview_step(image.size, pixels)
    side = max(step, 1024 // step * step)
    spots = [(x, y, min(side, width - x), min(side, height - y)) for y in range(0, height, side)
             for x in range(0, width, side)]  # fmt: skip
    small = torch.zeros(0, -(-height // step), -(-width // step), dtype=torch.uint8)
    for x, y, w, h in sorted(spots, key=lambda spot: image.order(*spot)):
        part = image.window(x, y, w, h)[:, ::step, ::step]
        if not len(small):
            small = small.new_zeros(len(part), *small.shape[1:])
        small[:, y // step : y // step + part.shape[1], x // step : x // step + part.shape[2]] = part
    return small


class WindowedImage:
    """An image file of any size, of which windows are read.

    Args:
        path: A TIFF, PNG, BMP or PPM file.

    Attributes:
        path: The file.
        size: H, W with the EXIF orientation applied.

    Raises:
        ImageError: If the file is damaged, or windows of it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path.open("rb")
        try:
            layout = tiff_layout(file)
            file.seek(0)
            if layout is not None and layout.deep:
                self._orientation = layout.orientation if 1 <= layout.orientation <= 8 else 1
                height, width = stored = (layout.height, layout.width)
                self.size = (width, height) if self._orientation >= 5 else stored
                self._blocks = _Tiff(self.path, dict(layout.tags), stored, layout.order)
                return
            with opened(file, self.path, _HUGE) as image:
                # Without `header_only`, Pillow would decode all pixels of a PNG file.
                self._orientation = orientation_of(image, header_only=True)
                # Pillow reports the turned size of TIFF files.
                turned = image.format == "TIFF" and self._orientation >= 5
                stored = (image.width, image.height) if turned else (image.height, image.width)
                self.size = (stored[1], stored[0]) if self._orientation >= 5 else stored
                self._blocks = _blocks(image, self.path, stored)
        except ImageError:
            raise
        except Exception as error:  # decoders raise exceptions of any class on damaged data
            raise ImageError(f"{self.path}: the header is damaged ({error}); replace or remove it") from None
        finally:
            file.close()

    def order(self, x: int, y: int, width: int, height: int) -> tuple[int, int]:
        """A sort key that puts windows into the order in which they are stored."""
        x, y, _, _ = self._stored(x, y, width, height)
        return y, x

    def window(self, x: int, y: int, width: int, height: int) -> UInt8[Tensor, "c h w"]:
        """Read a window as 8-bit RGB, or with the bands that `images.reading` specifies.

        Values of more than 8 bits are scaled as in `read_image`, with one value of white for the whole image.

        Args:
            x: Left edge in pixels.
            y: Top edge in pixels.
            width: Width in pixels.
            height: Height in pixels.

        Raises:
            ImageError: If the file is damaged or truncated.
        """
        try:
            pixels = self._blocks.window(*self._stored(x, y, width, height))
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{self.path}: the image is damaged ({error}); replace or remove it") from None
        turned = apply_orientation(pixels.permute(1, 2, 0).numpy(), self._orientation)
        return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)

    def overview(self, pixels: int) -> UInt8[Tensor, "c h w"]:
        """Every n-th pixel of every n-th row, so that about `pixels` remain; see `overview_step`."""
        return overview_of(self, pixels)

    def _stored(self, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
        """The window in the frame of the stored image."""
        if self._orientation in (2, 3, 6, 7):
            x = self.size[1] - x - width
        if self._orientation in (3, 4, 7, 8):
            y = self.size[0] - y - height
        return (y, x, height, width) if self._orientation >= 5 else (x, y, width, height)


def is_huge(path: Path) -> bool:
    """Whether the header of an image declares more pixels than are decoded at once; False if it cannot be read."""
    try:
        height, width = read_size(path, _HUGE)
        return height * width > MAX_PIXELS
    except (ImageError, OSError):
        return False


def _blocks(image: Any, path: Path, size: tuple[int, int]) -> _Blocks:
    """The reader for the format of an image."""
    if image.format == "TIFF":
        return _Tiff(path, dict(image.tag_v2), size, "<" if image.tag_v2.prefix[:2] == b"II" else ">")
    if image.format == "PNG":
        return _Png(path)
    if image.tile and image.tile[0][0] == "raw" and image.mode in ("L", "RGB") and len(image.tile) == 1:
        return _Rows(path, image.mode, size, image.tile[0])
    raise ImageError(
        f"{path}: the header declares {size[1]} x {size[0]} pixels, more than the limit of {MAX_PIXELS}, and "
        f"windows of {image.format} files cannot be read; {_ADVICE}"
    )


def _check_band(width: int, rows: int, path: Path) -> None:
    if width * rows > MAX_PIXELS:
        raise ImageError(
            f"{path}: {rows} x {width} pixels have to be decoded at once, more than the limit of {MAX_PIXELS}; "
            f"{_ADVICE}"
        )


# ---- TIFF ------------------------------------------------------------------------------------------------------------

# Tags that decide how a strip or tile is decoded.
_TAGS = (258, 259, 262, 266, 277, 281, 284, 301, 317, 320, 338, 339, 347, 530, 531, 532)


class _Tiff:
    """The strips or tiles of a TIFF file."""

    def __init__(self, path: Path, tags: dict[int, Any], size: tuple[int, int], order: str):
        self.path, self.tags, self.size = path, tags, size
        self.order = order
        self.white = WhiteRange(path)
        self.white.files = lambda: (self._small(number) for number in range(len(self.offsets) // self.planes))
        height, width = size
        tiled = 324 in tags
        samples = int(_first(tags.get(277, 1)))
        self.planes = samples if int(_first(tags.get(284, 1))) == 2 else 1
        if self.planes > 1 and int(_first(tags.get(259, 1))) in (6, 7):
            raise ImageError(f"{path}: windows of JPEG-compressed separate planes cannot be read; {_ADVICE}")
        self.offsets = _numbers(tags[324 if tiled else 273])
        self.lengths = _numbers(tags[325 if tiled else 279])
        self.block = (
            (int(_first(tags[323])), int(_first(tags[322])))
            if tiled
            else (min(height, int(_first(tags.get(278, height)))), width)
        )
        if not tiled and int(_first(tags.get(259, 1))) == 1:
            self._split_strips()
        _check_band(self.block[1], self.block[0], path)
        self.across = -(-width // self.block[1])
        self.tiled = tiled
        self.cache: OrderedDict[int, Tensor] = OrderedDict()
        self.cached = 0  # bytes in the cache

    def _split_strips(self) -> None:
        """Uncompressed strips can be read in part: make small ones of them."""
        height, width = self.size
        bits = sum(_numbers(self.tags.get(258, 1))) if 258 in self.tags else 1
        samples = int(_first(self.tags.get(277, 1)))
        bits = bits if len(_numbers(self.tags.get(258, 1))) == samples else bits * samples
        bits //= self.planes
        row = (width * bits + 7) // 8
        rows = max(1, min(self.block[0], (8 << 20) // row))
        offsets: list[int] = []
        lengths: list[int] = []
        if self.block[0] % rows:
            single = len(self.offsets) == self.planes
            rows = next(r for r in range(rows, 0, -1) if self.block[0] % r == 0 or single)
        for number, offset in enumerate(self.offsets):
            inside = min(self.block[0], height - number % (len(self.offsets) // self.planes) * self.block[0])
            for start in range(0, inside, rows):
                offsets.append(offset + start * row)
                lengths.append(min(rows, inside - start) * row)
        self.offsets, self.lengths, self.block = offsets, lengths, (rows, width)

    def window(self, x: int, y: int, width: int, height: int) -> Tensor:
        block_height, block_width = self.block
        result = torch.zeros(0, height, width, dtype=torch.uint8)
        for row in range(y // block_height, -(-(y + height) // block_height)):
            for column in range(x // block_width, -(-(x + width) // block_width)):
                pixels = self._decoded(row * self.across + column)
                if not len(result):
                    result = result.new_zeros(len(pixels), height, width)
                top, left = row * block_height, column * block_width
                y0, y1 = max(y, top), min(y + height, top + pixels.shape[1])
                x0, x1 = max(x, left), min(x + width, left + pixels.shape[2])
                result[:, y0 - y : y1 - y, x0 - x : x1 - x] = pixels[:, y0 - top : y1 - top, x0 - left : x1 - left]
        return result

    def _decoded(self, number: int) -> Tensor:
        if number in self.cache:
            self.cache.move_to_end(number)
            return self.cache[number]
        pixels = decode(io.BytesIO(self._small(number)), os.fspath(self.path), white=self.white).contiguous()
        self.cache[number] = pixels
        self.cached += pixels.nbytes
        while len(self.cache) > 1 and self.cached > (TILES if self.tiled else CACHE):
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return pixels

    def _small(self, number: int) -> bytes:
        """A strip or tile as a file."""
        parts: list[bytes] = []
        with self.path.open("rb") as file:
            for place in range(number, len(self.offsets), len(self.offsets) // self.planes):
                file.seek(self.offsets[place])
                parts.append(file.read(self.lengths[place]))
                if len(parts[-1]) < self.lengths[place]:
                    raise ImageError(f"{self.path}: the image is truncated; copy it again or remove it")
        height, width = self.block
        if not self.tiled:
            height = min(height, self.size[0] - number * height)
        return self._file(parts, height, width)

    def _file(self, parts: Sequence[bytes], height: int, width: int) -> bytes:
        """A TIFF file with one strip, or with one for each plane."""
        values: dict[int, Any] = {tag: self.tags[tag] for tag in _TAGS if tag in self.tags}
        starts = [8 + sum(map(len, parts[:number])) for number in range(len(parts))]
        values |= {256: width, 257: height, 278: height, 273: starts, 279: [len(part) for part in parts]}
        data = b"".join(parts)
        entries: list[bytes] = []
        extra = b""
        data += b"\0" * (len(data) % 2)
        start = 8 + len(data)
        table = 2 + 12 * len(values) + 4
        for tag in sorted(values):
            kind, count, packed = self._packed(tag, values[tag])
            if len(packed) <= 4:
                field = packed.ljust(4, b"\0")
            else:
                field = struct.pack(self.order + "I", start + table + len(extra))
                extra += packed + b"\0" * (len(packed) % 2)
            entries.append(struct.pack(self.order + "HHI", tag, kind, count) + field)
        mark = b"II" if self.order == "<" else b"MM"
        head = mark + struct.pack(self.order + "HI", 42, start)
        return head + data + struct.pack(self.order + "H", len(entries)) + b"".join(entries) + b"\0" * 4 + extra

    def _packed(self, tag: int, value: Any) -> tuple[int, int, bytes]:
        """Type, number and bytes of a tag's values."""
        if isinstance(value, bytes):
            return 7, len(value), value
        if tag == 532:  # rational
            pairs = [(round(float(v) * 65536), 65536) for v in value]
            return 5, len(pairs), b"".join(struct.pack(self.order + "II", *pair) for pair in pairs)
        numbers = _numbers(value)
        kind, code = (3, "H") if max(numbers) < 1 << 16 else (4, "I")
        return kind, len(numbers), struct.pack(f"{self.order}{len(numbers)}{code}", *numbers)


def _numbers(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


# ---- PNG -------------------------------------------------------------------------------------------------------------

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}  # colour type of 8 bits whose pixels have this many bytes


class _Png:
    """The rows of a PNG file, in order; a window above the last one starts again at the first row."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            file.seek(8)
            head = file.read(25)
        self.width, self.height, self.bits, self.kind, _, _, interlaced = struct.unpack(">IIBBBBB", head[8:21])
        if interlaced:
            raise ImageError(f"{path}: windows of interlaced PNG files cannot be read; {_ADVICE}")
        pixel = self.bits * _CHANNELS[self.kind]
        self.bytes = max(1, pixel // 8)  # bytes per pixel, for the filters
        if self.bytes not in _KINDS:
            raise ImageError(f"{path}: windows of PNG files with 16 bits per colour cannot be read; {_ADVICE}")
        self.row = (self.width * pixel + 7) // 8
        self.chunks: list[tuple[bytes, bytes]] = []  # before the pixels
        self.white = WhiteRange(path)
        self.white.files = self._parts
        self._restart()

    def _restart(self) -> None:
        self.chunks = []
        self.first = 0  # number of the first row in `rows`
        self.rows: npt.NDArray[np.uint8] = np.zeros((0, self.row), np.uint8)
        self.before: npt.NDArray[np.uint8] = np.zeros((1, self.row), np.uint8)  # the row above the next one
        self.rest = b""
        self.data = self._inflated()

    def _inflated(self) -> Iterator[bytes]:
        """The decompressed rows, about a megabyte at a time."""
        unzip = zlib.decompressobj()
        with self.path.open("rb") as file:
            file.seek(8)
            for name, data in _chunks(file):
                if name == b"IDAT":
                    while data:
                        yield unzip.decompress(data, 1 << 20)
                        data = unzip.unconsumed_tail
                elif name == b"IEND":
                    break
                elif name in (b"PLTE", b"tRNS", b"sBIT"):
                    self.chunks.append((name, data))

    def window(self, x: int, y: int, width: int, height: int) -> Tensor:
        small, skipped = self._small(x, y, width, height)
        return decode(io.BytesIO(small), os.fspath(self.path), white=self.white)[:, :, skipped:]

    def _parts(self) -> Iterator[bytes]:
        for y in range(0, self.height, 256):
            yield self._small(0, y, self.width, min(256, self.height - y))[0]

    def _small(self, x: int, y: int, width: int, height: int) -> tuple[bytes, int]:
        """A window as a file, and how many columns of it are in front of the window."""
        _check_band(self.width, height, self.path)
        if y < self.first:
            self._restart()
        while self.first + len(self.rows) < y + height:
            self._advance(y, min(512, y + height - self.first - len(self.rows)))
        rows = self.rows[y - self.first : y - self.first + height]
        pixel = self.bits * _CHANNELS[self.kind]
        start = x * pixel // 8
        skipped = x - start * 8 // pixel
        part = rows[:, start : -(-(x + width) * pixel // 8)]
        return self._file(part, skipped + width, self.bits, self.kind, self.chunks), skipped

    def _advance(self, keep: int, count: int) -> None:
        """Decode `count` further rows; forget those above row `keep`."""
        need = count * (self.row + 1)
        parts, size = [self.rest], len(self.rest)
        while size < need:
            piece = next(self.data, None)
            if piece is None:
                raise ImageError(f"{self.path}: the image is truncated; copy it again or remove it")
            parts.append(piece)
            size += len(piece)
        data = b"".join(parts)
        self.rest = data[need:]
        filtered = np.frombuffer(data[:need], np.uint8).reshape(count, self.row + 1)
        # The filters of rows depend on the row above. Pillow applies them, in an image of 8 bits per channel.
        above = np.hstack([np.zeros((1, 1), np.uint8), self.before])
        stacked = np.vstack([above, filtered])
        small = _png(stacked.tobytes(), self.row // self.bytes, count + 1, 8, _KINDS[self.bytes], [])
        with opened(io.BytesIO(small), self.path, _HUGE) as image:
            new = np.asarray(image).reshape(count + 1, self.row)[1:]
        self.before = new[-1:].copy()
        forget = max(0, min(keep - self.first, len(self.rows)))
        self.rows = np.vstack([self.rows[forget:], new])
        self.first += forget

    @staticmethod
    def _file(
        rows: npt.NDArray[np.uint8], width: int, bits: int, kind: int, chunks: list[tuple[bytes, bytes]]
    ) -> bytes:
        filtered = np.hstack([np.zeros((len(rows), 1), np.uint8), rows])
        return _png(filtered.tobytes(), width, len(rows), bits, kind, chunks)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of chunks; long ones of pixels in parts."""
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        while length > 0:
            data = file.read(min(length, 1 << 20))
            if not data:
                return
            length -= len(data)
            if name == b"IDAT" or length == 0:
                yield name, data
            elif name not in (b"PLTE", b"tRNS", b"sBIT"):
                file.seek(length, os.SEEK_CUR)
                length = 0
        if name == b"IEND":
            return
        file.seek(4, os.SEEK_CUR)


def _png(rows: bytes, width: int, height: int, bits: int, kind: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of filtered rows, without compression."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    chunk = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk)


# ---- BMP and PPM -----------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of an uncompressed file."""

    def __init__(self, path: Path, mode: str, size: tuple[int, int], tile: Any):
        self.path, self.mode, self.size = path, mode, size
        _, _, self.offset, arguments = tile
        if isinstance(arguments, str):
            arguments = (arguments, 0, 1)
        self.raw, stride, self.direction = arguments
        pixel = {"L": 1, "RGB": 3, "BGR": 3, "BGRX": 4}.get(self.raw)
        if pixel is None:
            raise ImageError(f"{path}: windows of files with pixels of kind {self.raw!r} cannot be read; {_ADVICE}")
        self.stride = stride or size[1] * pixel

    def window(self, x: int, y: int, width: int, height: int) -> Tensor:
        from PIL import Image

        _check_band(self.size[1], height, self.path)
        first = y if self.direction == 1 else self.size[0] - y - height
        with self.path.open("rb") as file:
            file.seek(self.offset + first * self.stride)
            data = file.read(height * self.stride)
        size = (self.size[1], height)
        image = Image.frombytes(self.mode, size, data, "raw", self.raw, self.stride, self.direction)
        part = np.array(image.crop((x, 0, x + width, height)).convert("RGB"))
        return torch.from_numpy(part).permute(2, 0, 1)
