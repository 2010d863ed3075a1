"""Decoding images with more than 8 bits per channel, with other bands than RGB, or with separate planes.

Pillow reduces 16-bit colour to the upper byte, and reads planar 16-bit TIFF wrongly or not at all. Two methods give the
full values with Pillow's own decoders: a PNG is decoded once for each byte of its samples, and a TIFF is presented to
the decoder as a plane of bytes, whose samples are then assembled here.
"""

# Pillow's tags have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Pillow logs errors that it also raises; without a handler, Python prints them to stderr. Its warnings about single
# tags do not name the file.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


# ---- PNG -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PngHeader:
    """What the chunks of a PNG file declare.

    Attributes:
        bits: Bits per sample.
        colour: Colour type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
        significant: Largest number of significant bits of a sample (chunk sBIT); None if not declared.
        late_metadata: Whether chunks after the pixels may contain an EXIF orientation.
    """

    bits: int
    colour: int
    significant: int | None = None
    late_metadata: bool = False


def png_header(file: io.BufferedIOBase) -> PngHeader | None:
    """Return what the chunks of a PNG file declare; None if it is not a PNG file. The position of `file` is kept."""
    position = file.tell()
    file.seek(0)
    try:
        start = file.read(33)
        if not start.startswith(b"\x89PNG\r\n\x1a\n") or len(start) < 33:
            return None
        bits, colour = start[24], start[25]
        significant, pixels, late = None, False, False
        while len(chunk := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", chunk)
            after = file.tell() + length + 4
            if kind == b"sBIT" and 1 <= length <= 4:
                samples = file.read(length)
                significant = max(samples[:-1] if colour in (4, 6) and len(samples) > 1 else samples, default=0)
            pixels |= kind == b"IDAT"
            late |= pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
            if kind == b"IEND":
                break
            file.seek(after)
        return PngHeader(bits, colour, significant if significant and significant <= bits else None, late)
    finally:
        file.seek(position)


def decode_png(header: PngHeader, reopen: Callable[[], Any]) -> Array:
    """Return the samples of a 16-bit PNG file with colour or alpha.

    Args:
        header: Its header.
        reopen: Returns the file, opened by Pillow and not decoded.

    Returns:
        (H, W, C) uint16, without alpha.
    """
    first = reopen()
    if header.colour == 4:
        first.tile = [tile._replace(args="RGBA") for tile in first.tile]
        pairs = np.asarray(first).astype(np.uint16)  # L high, L low, A high, A low
        return pairs[:, :, :1] << 8 | pairs[:, :, 1:2]
    second = reopen()
    second.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in second.tile]  # the other byte
    return (np.asarray(first).astype(np.uint16) << 8 | np.asarray(second))[:, :, :3]


# ---- TIFF ------------------------------------------------------------------------------------------------------------

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_ROWS, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323
_ORIENTATION, _SAMPLES, _MAXIMUM, _PLANAR, _PREDICTOR, _EXTRA, _FORMAT = 274, 277, 281, 284, 317, 338, 339
_FILL_ORDER = 266
# Codecs of bytes, whatever the bytes mean: none, LZW, Deflate (two numbers), PackBits, LZMA, Zstandard.
_CODECS = (1, 5, 8, 32773, 32946, 34925, 50000)
_KINDS = {1: "unsigned integer", 2: "signed integer", 3: "float", 5: "complex integer", 6: "complex"}
_MAX_BYTES = 1 << 31


@dataclass(frozen=True)
class TiffLayout:
    """How the first image of a TIFF file is stored.

    Attributes:
        width: Pixels in a row.
        height: Rows.
        samples: Bands.
        bits: Bits per sample, of all bands.
        kind: The tag SampleFormat: 1 unsigned, 2 signed, 3 float.
        photometric: The tag PhotometricInterpretation.
        planar: Whether every band is stored on its own.
        compression: The tag Compression.
        predictor: The tag Predictor.
        extra: The tag ExtraSamples.
        orientation: The tag Orientation.
        declared: The tag MaxSampleValue, the largest of all bands; None if there is none.
        order: "<" or ">", the byte order.
        tags: All tags.
    """

    width: int
    height: int
    samples: int
    bits: tuple[int, ...]
    kind: int
    photometric: int
    planar: bool
    compression: int
    predictor: int
    extra: tuple[int, ...]
    orientation: int
    declared: int | None
    order: str
    tags: Any

    @property
    def depth(self) -> int:
        """Bits per sample of the first band."""
        return self.bits[0]

    @property
    def deep(self) -> bool:
        """Whether the file has to be decoded here, because Pillow would refuse it or reduce its values."""
        if self.depth < 8 or (self.compression not in _CODECS and self.depth == 8):
            return False
        bands = self.samples > 4 or (self.samples > 1 and self.photometric in (0, 1) and self.samples != 2)
        return self.depth > 8 or self.planar or bands

    def __str__(self) -> str:
        bands = f"{self.samples} bands of " if self.samples > 1 else ""
        return f"{bands}{self.depth}-bit {_KINDS.get(self.kind, 'unknown')} values"


def tiff_layout(file: io.BufferedIOBase) -> TiffLayout | None:
    """Return how the first image of a TIFF file is stored; None if the file is no TIFF or its tags are unusual.

    Args:
        file: The file; its position is changed.
    """
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    silence_libtiff()
    file.seek(0)
    start = file.read(8)
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    start += file.read(8) if b"+" in start[:4] else b""
    try:
        tags = ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(cast(IO[bytes], file))
        samples = int(tags.get(_SAMPLES, 1))
        bits = tuple(int(b) for b in tags.get(_BITS, (1,)))
        kinds = _row(tags.get(_FORMAT, (1,)))
        largest = _row(tags.get(_MAXIMUM, ()))
        layout = TiffLayout(
            width=int(tags[_WIDTH]),
            height=int(tags[_LENGTH]),
            samples=samples,
            bits=bits,
            kind=int(kinds[0]),
            photometric=int(tags.get(_PHOTOMETRIC, 1)),
            planar=int(tags.get(_PLANAR, 1)) == 2 and samples > 1,
            compression=int(tags.get(_COMPRESSION, 1)),
            predictor=int(tags.get(_PREDICTOR, 1)),
            extra=tuple(int(v) for v in _row(tags.get(_EXTRA, ()))),
            orientation=int(tags.get(_ORIENTATION, 1)),
            declared=max((int(v) for v in largest), default=None),
            order="<" if start[:2] == b"II" else ">",
            tags=tags,
        )
    except Exception:  # damaged tags: Pillow reports them
        return None
    if layout.width < 1 or layout.height < 1 or samples < 1 or not bits or min(bits) < 1:
        return None
    return layout


def decode_tiff(file: io.BufferedIOBase, layout: TiffLayout) -> Array:
    """Return the samples of a TIFF file.

    Args:
        file: The file.
        layout: Its layout.

    Returns:
        (H, W, samples), of the dtype that the file holds; samples of 9 to 15 bits as uint16.

    Raises:
        ValueError: If the layout is not supported; the message names it.
        OSError: If the data are damaged or truncated.
    """
    _check_supported(layout)
    file.seek(0)
    data = file.read()
    planes = layout.samples if layout.planar else 1
    together = layout.samples // planes  # samples of a pixel that are stored together
    parts = [_plane(data, layout, number, planes, together) for number in range(planes)]
    return parts[0] if planes == 1 else np.concatenate(parts, 2)


@functools.cache
def silence_libtiff() -> None:
    """Stop libtiff from printing to stderr what Pillow raises as well; without effect where it is not found."""
    import PIL

    folder = Path(PIL.__file__).parent
    found = [*folder.parent.glob("pillow.libs/libtiff*"), *folder.glob(".dylibs/libtiff*")]
    for path in found:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))  # the copy that Pillow has loaded
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                function = getattr(library, name)
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
                function(None)


def _check_supported(layout: TiffLayout) -> None:
    whole = layout.depth in (8, 16, 32, 64)
    packed = 8 < layout.depth < 16 and layout.kind == 1 and layout.predictor == 1
    if len(set(layout.bits)) > 1:
        raise ValueError(f"bands of {', '.join(map(str, layout.bits))} bits")
    if layout.compression not in _CODECS:
        raise ValueError(f"{layout}, compressed by a method that is not supported for them ({layout.compression})")
    if not (whole or packed) or layout.kind not in (1, 2, 3) or (layout.kind == 3 and layout.depth == 8):
        raise ValueError(str(layout))
    if int(layout.tags.get(_FILL_ORDER, 1)) != 1:
        raise ValueError(f"{layout} with reversed bits")
    if layout.predictor not in (1, 2, 3) or (layout.predictor == 3 and layout.kind != 3):
        raise ValueError(f"{layout} with predictor {layout.predictor}")
    if layout.photometric not in (0, 1, 2, 5):
        raise ValueError(f"{layout} in a colour space that is not supported (photometric {layout.photometric})")
    if layout.width * layout.height * layout.samples * layout.depth // 8 > _MAX_BYTES:
        raise ValueError(f"{layout}, more than {_MAX_BYTES >> 30} GiB")


def _plane(data: bytes, layout: TiffLayout, number: int, planes: int, together: int) -> Array:
    """One plane of a file: (H, W, together)."""
    tiled = _TILES in layout.tags
    across = int(layout.tags[_TILE_WIDTH]) if tiled else layout.width
    down = int(layout.tags[_TILE_LENGTH] if tiled else layout.tags.get(_ROWS, layout.height))
    if across < 1 or down < 1:
        raise OSError("the header declares strips or tiles of no size")
    columns = -(-layout.width // across) if tiled else 1
    width = columns * across  # with the padding of the last tile
    row = -(-across * together * layout.depth // 8)  # bytes of a row of a strip or tile
    blocks = -(-layout.height // down) * columns
    offsets = _row(layout.tags[_TILES if tiled else _STRIPS])[number * blocks : (number + 1) * blocks]
    sizes = _row(layout.tags.get(_TILE_BYTES if tiled else _STRIP_BYTES, ()))
    sizes = sizes[number * blocks : (number + 1) * blocks] if len(sizes) >= planes * blocks else ()
    if len(offsets) < blocks:
        raise OSError(f"the header lists {len(offsets)} of {blocks} strips or tiles")
    if layout.compression == 1:
        sizes = [row * min(down, layout.height - at // columns * down) if not tiled else row * down
                 for at in range(blocks)]  # fmt: skip
        if any(o + s > len(data) for o, s in zip(offsets, sizes, strict=True)):
            raise OSError("image file is truncated")
        whole = np.zeros((-(-layout.height // down) * down, columns, row), np.uint8)
        for at, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            block = np.frombuffer(data, np.uint8, size, offset).reshape(-1, row)
            y, x = divmod(at, columns)
            whole[y * down : y * down + len(block), x] = block
        raw = whole[: layout.height]
    else:
        if not sizes:
            raise OSError("the header lists no sizes of strips or tiles")
        raw = _unpacked(data, layout, (columns * row, row, down), offsets, sizes, tiled)
        raw = raw.reshape(layout.height, columns, row)
    # Predictors and the order of bytes are those of the rows of a strip or tile.
    values = _samples(raw, layout, across, together)
    return values.reshape(layout.height, width, together)[:, : layout.width]


def _unpacked(
    data: bytes, layout: TiffLayout, sides: tuple[int, int, int], offsets: Sequence[int], sizes: Sequence[int],
    tiled: bool,
) -> Array:  # fmt: skip
    """The decompressed bytes (H, width) of strips or tiles, decoded by Pillow as an 8-bit grey image."""
    from PIL.TiffImagePlugin import TiffImageFile

    width, across, down = sides
    pieces = [data[o : o + s] for o, s in zip(offsets, sizes, strict=True)]
    if sum(map(len, pieces)) < sum(sizes):
        raise OSError("image file is truncated")
    padded = across
    if tiled and across % 16:  # libtiff requires tiles of a multiple of 16
        raise ValueError(f"{layout} in tiles of {across} bytes")
    at, places = 8, list[int]()
    for piece in pieces:
        places.append(at)
        at += len(piece)
    entries: dict[int, list[int]] = {
        _WIDTH: [width], _LENGTH: [layout.height], _BITS: [8], _COMPRESSION: [layout.compression], _PHOTOMETRIC: [1],
        _SAMPLES: [1], _PLANAR: [1],
    }  # fmt: skip
    if tiled:
        entries |= {_TILE_WIDTH: [padded], _TILE_LENGTH: [down], _TILES: places, _TILE_BYTES: list(sizes)}
    else:
        entries |= {_ROWS: [down], _STRIPS: places, _STRIP_BYTES: list(sizes)}
    at += at % 2
    body = b"".join(pieces).ljust(at - 8, b"\0")
    table = struct.pack("<H", len(entries))
    after = at + 2 + 12 * len(entries) + 4
    arrays = b""
    for tag, values in sorted(entries.items()):
        table += struct.pack("<HHI", tag, 4, len(values))
        if len(values) == 1:
            table += struct.pack("<I", values[0])
        else:
            table += struct.pack("<I", after + len(arrays))
            arrays += struct.pack(f"<{len(values)}I", *values)
    file = b"II*\0" + struct.pack("<I", at) + body + table + struct.pack("<I", 0) + arrays
    with TiffImageFile(io.BytesIO(file)) as image:
        return np.array(image)


def _samples(raw: Array, layout: TiffLayout, across: int, together: int) -> Array:
    """Samples of rows of bytes (H, columns, bytes): (H, columns, across, together)."""
    depth = layout.depth
    shape = (*raw.shape[:2], across, together)
    if depth not in (8, 16, 32, 64):
        bits = np.unpackbits(raw, axis=2)[:, :, : across * together * depth]
        weights = (1 << np.arange(depth - 1, -1, -1)).astype(np.uint16)
        return (bits.reshape(*raw.shape[:2], -1, depth) * weights).sum(-1, dtype=np.uint16).reshape(shape)
    letter = {1: "u", 2: "i", 3: "f"}[layout.kind]
    size = depth // 8
    if layout.predictor == 3:  # bytes are differences, and sorted by their place, the most significant ones first
        total = np.cumsum(raw.reshape(*raw.shape[:2], -1, together), 2, dtype=np.uint8)
        planes = total.reshape(*raw.shape[:2], size, across * together)
        joined = np.ascontiguousarray(np.moveaxis(planes, 2, 3))
        return joined.view(f">f{size}").astype(f"f{size}").reshape(shape)
    values = np.ascontiguousarray(raw).view(f"{layout.order}{'u' if layout.predictor == 2 else letter}{size}")
    values = values.astype(values.dtype.newbyteorder("="))
    if layout.predictor == 2:  # horizontal differences of whole samples
        values = np.cumsum(values.reshape(shape), 2, dtype=values.dtype).view(f"{letter}{size}")
    return values.reshape(shape)


def _row(value: Any) -> Sequence[Any]:
    """A tag's value as a sequence."""
    return value if isinstance(value, (tuple, list)) else (value,)
