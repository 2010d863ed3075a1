"""Reading images: every supported file becomes 8-bit RGB; every other one is an error that names it.

Conversion of unusual images:

    more than 8 bits    scaled to 8 bits, see `data.pixel_values`; 12-bit data in 16-bit files have all their levels
    grey, 1-bit         three equal channels, 0 ... 255
    alpha               dropped; transparent pixels keep their stored colour (as in detectron2 and OpenCV)
    palette             looked up; a transparent entry keeps its colour
    CMYK, YCbCr         converted without colour management; embedded colour profiles are not applied
    more bands          an error, unless the bands to read are specified (TIFF)
    EXIF orientation    applied
    animation           the first frame

The format is detected from the content, not from the file name. Formats that execute programs when opened
(PostScript) are not supported.
"""

# torch.from_numpy has no type.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.deep_images import TiffLayout, decode_png, decode_tiff, png_header, silence_libtiff, tiff_layout
from maskwright.data.findings import DataWarning
from maskwright.data.pixel_values import declared_end, range_end, to_8_bits
from maskwright.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage
    from PIL.ImageFile import ImageFile

# Width times height. A header with more pixels is refused before memory is allocated; RGB of this size is 0.8 GB.
MAX_PIXELS = 1 << 28

# No EPS or other PostScript: Pillow starts Ghostscript for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # a JPEG or TIFF with several images is not an animation
_ORIENTATION = 0x0112
_SAMPLED = 256  # images whose values decide the range of a data set

Array = npt.NDArray[Any]


# ---- how images are read ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How files with other than 8-bit RGB values are read.

    Attributes:
        white: The value that becomes 255, for values of more than 8 bits; None: judged by data set or image.
        bands: Numbers of the bands that become the channels, from 1; None: the colour channels.
    """

    white: int | None = None
    bands: tuple[int, ...] | None = None


@runtime_checkable
class _Rules(Protocol):
    """What `reading` needs of a `Preprocess`."""

    @property
    def white(self) -> int | None: ...

    @property
    def bands(self) -> tuple[int, ...] | None: ...


_reading: ContextVar[Reading | None] = ContextVar("maskwright_reading", default=None)


@contextlib.contextmanager
def reading(rules: _Rules) -> Generator[None, None, None]:
    """Read all images inside the `with` block as a system's preprocessing specifies, in data sets of any kind too."""
    token = _reading.set(Reading(rules.white, rules.bands))
    try:
        yield
    finally:
        _reading.reset(token)


def current_reading() -> Reading:
    """How images are read at this place of the program; see `reading`."""
    return _reading.get() or Reading()


def read_image(
    path: str | Path,
    max_pixels: int = MAX_PIXELS,
    *,
    warn: bool = True,
    white: int | Callable[[], int | None] | None = None,
    bands: Sequence[int] | None = None,
) -> UInt8[Tensor, "c H W"]:
    """Read an image file as 8-bit RGB, with the EXIF orientation applied.

    Args:
        path: The file.
        max_pixels: Largest width times height that is decoded.
        warn: Emit a `DataWarning` for an animation, of which the first frame is returned, and for a range of values
            that is judged by this image alone.
        white: The value that becomes 255, if the file has more than 8 bits and does not declare its range; a function
            is called only then. None: judged by the image. The preprocessing of a system takes precedence.
        bands: Numbers of the bands to return, from 1, for files with other bands than RGB.

    Returns:
        Pixels (3, H, W), uint8; a view whose channels are last in memory. With `bands`, one channel for each.

    Raises:
        ImageError: If the file is missing, damaged, too large or not an image.
    """
    path = Path(path)
    with readable(path), path.open("rb") as file:
        return decode(file, os.fspath(path), max_pixels, warn=warn, white=white, bands=bands)


def decode(
    file: io.BufferedIOBase,
    name: str,
    max_pixels: int = MAX_PIXELS,
    *,
    warn: bool = True,
    white: int | Callable[[], int | None] | None = None,
    bands: Sequence[int] | None = None,
    turn: bool = True,
) -> UInt8[Tensor, "c H W"]:
    """`read_image` for an open file that can be searched.

    Args:
        file: The file.
        name: What messages call it.
        max_pixels: See `read_image`, as `warn`, `white` and `bands`.
        warn: See there.
        white: See there.
        bands: See there.
        turn: Apply the EXIF orientation; that of TIFF files is always applied, as Pillow does.

    Returns:
        Pixels (C, H, W), uint8.
    """
    path = Path(name)
    with readable(path):
        rules = current_reading()
        chosen = rules.bands or (None if bands is None else tuple(bands))
        given = rules.white if rules.white is not None else white
        with _source(file, path, max_pixels) as source:
            animated = source.animated
            values, declared = source.values(chosen)
            orientation = source.orientation if turn or source.format == "TIFF" else 1
        if values.dtype != np.uint8:
            end = given() if callable(given) and declared is None else None if callable(given) else given
            values = to_8_bits(values, name, white=end, declared=declared, warn=warn)
        if source.inverted:
            values = 255 - values
        values = apply_orientation(_as_colour(values, source.cmyk, chosen), orientation)
    if animated and warn:
        warnings.warn(f"{path}: is animated; the first frame is used", DataWarning, stacklevel=3)
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).permute(2, 0, 1)


def common_white(paths: Sequence[Path]) -> int | None:
    """Return the value that becomes 255 in all files of a set with more than 8 bits.

    It is the end of the smallest range of 8, 10, 12, 14 or 16 bits that contains the values of all files (of 256 of
    them, evenly spaced, if there are more), or that the files declare. Unreadable files are ignored.

    Args:
        paths: The files of the set.

    Returns:
        The value; None if no file has more than 8 bits.
    """
    return common_white_of(len(paths), lambda number: _own_white(paths[number]))


def common_white_of(count: int, white: Callable[[int], int | None]) -> int | None:
    """`common_white` for images that are not files.

    Args:
        count: Number of images.
        white: The value of white of an image by its position, see `white_of`; an `ImageError` if it cannot be read.
    """
    sampled = min(count, _SAMPLED)
    result: int | None = None
    for number in range(sampled):
        try:
            end = white(number * count // sampled)
        except ImageError:
            continue
        result = end if result is None else result if end is None else max(result, end)
        if result is not None and result >= 0xFFFF:
            break
    return result


def white_words(white: int) -> str:
    """The sentence about the range of a data set."""
    return (
        f"images with more than 8 bits hold {white.bit_length()}-bit values: {white} becomes 255 (resize.white changes "
        "it)"
    )


def is_animated(path: str | Path) -> bool:
    """Return whether the header of an image file declares an animation."""
    path = Path(path)
    with path.open("rb") as file, _source(file, path, MAX_PIXELS) as source:
        return source.animated


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return H, W of an image file with the EXIF orientation applied; only the header is read.

    Raises:
        ImageError: If the header is damaged, or declares more than `max_pixels`.
    """
    return _header(Path(path), max_pixels)[0]


def read_orientation(path: str | Path) -> int:
    """Return the EXIF orientation of an image file, 1 to 8; 1 if it has none. Only the header is read.

    Raises:
        ImageError: If the header is damaged.
    """
    path = Path(path)
    with readable(path, "the header"), path.open("rb") as file, _source(file, path, MAX_PIXELS) as source:
        return source.orientation


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check an image file by its header and its end; decode it only if the end marker of its format is missing.

    Returns:
        H, W with the EXIF orientation applied, and H, W as stored.

    Raises:
        ImageError: If the header is damaged, or the file is truncated.
    """
    path = Path(path)
    size, stored, format_name = _header(path, max_pixels)
    marks = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
    mark = marks.get(format_name)
    if mark is not None:
        with path.open("rb") as file:
            file.seek(-len(mark), os.SEEK_END)
            whole = file.read() == mark
        if not whole:
            read_image(path, max_pixels, warn=False)
    return size, stored


def _header(path: Path, max_pixels: int) -> tuple[tuple[int, int], tuple[int, int], str]:
    with readable(path, "the header"), path.open("rb") as file, _source(file, path, max_pixels) as source:
        height, width = source.size
        turned = source.orientation >= 5
        return ((width, height) if turned else (height, width)), (height, width), source.format


def _own_white(path: Path) -> int | None:
    """The value of white of one file; None for 8 bits, and for float values."""
    with readable(path), path.open("rb") as file:
        return white_of(file, path)


def white_of(file: io.BufferedIOBase, path: Path, *, floats: bool = False) -> int | None:
    """Return the value of white of an opened file; None for 8 bits.

    Args:
        file: The file.
        path: What messages call it.
        floats: Return that of float values too: 1 if none is larger, otherwise 255.
    """
    with _source(file, path, MAX_PIXELS) as source:
        if not source.deep:
            return None
        bands = tuple(range(1, source.layout.samples + 1)) if isinstance(source, _TiffSource) else None
        values, declared = source.values(bands)
        if values.dtype.kind == "f" and floats:
            return 1 if values.max(initial=0) <= 1 else 255
        if values.dtype.kind not in "ui" or values.dtype == np.uint8:
            return None
        largest = int(values.max(initial=0))
        return declared if declared is not None and largest <= declared else range_end(largest)


# ---- files -----------------------------------------------------------------------------------------------------------


class _Source:
    """An opened image file: its header, and its values on request.

    Attributes:
        path: The file, for messages.
        size: H, W as stored.
        format: Pillow's name of the format.
        orientation: The EXIF orientation that remains to be applied.
        animated: Whether it has several frames.
        deep: Whether it has more than 8 bits per channel.
        inverted: Whether 0 is white.
        cmyk: Whether the channels are cyan, magenta, yellow and black.
    """

    path: Path
    size: tuple[int, int]
    format: str
    orientation: int
    animated = False
    deep = False
    inverted = False
    cmyk = False

    def values(self, bands: tuple[int, ...] | None) -> tuple[Array, int | None]:
        """Return the values (H, W, C), and the value of white if the file declares it."""
        raise NotImplementedError


class _PillowSource(_Source):
    """A file that Pillow decodes."""

    def __init__(self, image: ImageFile, file: io.BufferedIOBase, path: Path):
        self.image, self.file, self.path = image, file, path
        self.format = image.format or ""
        self.animated = bool(getattr(image, "is_animated", False)) and self.format in _ANIMATED
        self.png = png_header(file) if self.format == "PNG" else None
        self.orientation = orientation_of(image, self.png is not None and not self.png.late_metadata)
        width, height = image.size
        if self.format == "TIFF" and self.orientation >= 5:  # Pillow reports the turned size
            width, height = height, width
        self.size = (height, width)
        self.maximum = _maximum(image) if self.format == "PPM" else 0
        self.deep = image.mode[0] in "IF" or self.maximum > 255 or (self.png is not None and self.png.bits == 16)

    def values(self, bands: tuple[int, ...] | None) -> tuple[Array, int | None]:
        if bands is not None:
            colours = np.asarray(_plain(self.image))
            return _chosen(colours[:, :, None] if colours.ndim == 2 else colours, bands, self.path), None
        if self.png is not None and self.png.bits == 16:
            if self.png.colour in (2, 4, 6):
                self.file.seek(0)
                data = self.file.read()
                values = decode_png(self.png, lambda: opened(io.BytesIO(data), self.path, MAX_PIXELS))
            else:
                values = np.asarray(self.image)[:, :, None]
            significant = self.png.significant
            return values, None if significant is None else declared_end(values, significant)
        if self.format == "TIFF":  # Pillow turns images as it decodes them
            values = rgb(self.image, self.path)
            self.orientation = 1
            return values, None
        if self.maximum > 255:
            declared = None if self.maximum == 0xFFFF else self.maximum  # 65535 is what most programs write
            if self.image.tile[0].codec_name != "ppm_plain":
                return self._netpbm(), declared
            return rgb(self.image, self.path), None if declared is None else 0xFFFF  # Pillow has scaled them
        return rgb(self.image, self.path), None

    def _netpbm(self) -> Array:
        """The 16-bit values of a binary PGM or PPM file, which Pillow reduces to the upper byte."""
        height, width = self.size
        count = 3 if self.image.mode == "RGB" else 1
        self.file.seek(self.image.tile[0].offset)
        data = self.file.read(height * width * count * 2)
        if len(data) < height * width * count * 2:
            raise OSError("image file is truncated")
        return np.frombuffer(data, ">u2").reshape(height, width, count).astype(np.uint16)


class _TiffSource(_Source):
    """A TIFF file that is decoded by `deep_images`."""

    format = "TIFF"

    def __init__(self, file: io.BufferedIOBase, layout: TiffLayout, path: Path, max_pixels: int):
        self.file, self.layout, self.path = file, layout, path
        self.size = (layout.height, layout.width)
        _check_size(layout.width, layout.height, max_pixels, path)
        self.orientation = layout.orientation if 1 <= layout.orientation <= 8 else 1
        self.deep = layout.depth > 8
        self.inverted = layout.photometric == 0
        self.cmyk = layout.photometric == 5

    def values(self, bands: tuple[int, ...] | None) -> tuple[Array, int | None]:
        layout = self.layout
        try:
            if bands is None:
                self._check_bands()
            values = decode_tiff(self.file, layout)
        except ValueError as error:
            raise ImageError(
                f"{self.path}: contains {error}, which is not supported; convert it to 8- or 16-bit RGB or grey"
            ) from None
        self.cmyk = self.cmyk and bands is None
        if bands is not None:
            values = _chosen(values, bands, self.path)
        else:
            values = values[:, :, : 4 if self.cmyk else 3 if layout.samples >= 3 else 1]  # without alpha
        return values, self._declared()

    def _check_bands(self) -> None:
        layout = self.layout
        colours = {2: 3, 5: 4}.get(layout.photometric, 1)
        extra = layout.samples - colours
        grey = colours == 1 and (layout.samples <= 3)  # three bands without declared meaning are RGB, as in GDAL
        if layout.samples < colours:
            raise ImageError(f"{self.path}: the header declares a single band of colour; replace or remove it")
        if (extra > 1 and not grey) or (extra == 1 and colours == 4):
            raise ImageError(
                f"{self.path}: has {layout}; specify which of them are read, for example "
                "resize.bands=[1,2,3] (train --option) or read_image(..., bands=(1, 2, 3))"
            )

    def _declared(self) -> int | None:
        layout = self.layout
        if layout.kind != 1 or layout.depth <= 8:
            return None
        if layout.depth < 16:
            return (1 << layout.depth) - 1
        if layout.declared is not None and 255 < layout.declared <= 0xFFFF:
            return (1 << layout.declared.bit_length()) - 1
        return None


@contextlib.contextmanager
def _source(file: io.BufferedIOBase, path: Path, max_pixels: int) -> Generator[_Source, None, None]:
    start = file.read(4)
    file.seek(0)
    if start[:2] in (b"II", b"MM"):
        layout = tiff_layout(file)
        file.seek(0)
        if layout is not None and layout.deep:
            yield _TiffSource(file, layout, path, max_pixels)
            return
    with opened(file, path, max_pixels) as image:
        yield _PillowSource(image, file, path)


def opened(file: io.BufferedIOBase, path: Path, max_pixels: int) -> ImageFile:
    """Return the image with its header read. Pillow's own `open` limits sizes by a global setting of the user."""
    from PIL import Image

    Image.init()
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{path}: the file is empty (0 bytes); replace or remove it")
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is not True:
            continue
        if name == "TIFF":
            silence_libtiff()
        file.seek(0)
        try:
            # With a name, Pillow maps uncompressed TIFF files into memory and then gets turned images wrong.
            image = factory(cast(IO[bytes], file), "" if name == "TIFF" else os.fspath(path))
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            layout = tiff_layout(file) if name == "TIFF" else None
            if layout is not None and "mode" in str(error):
                raise ImageError(
                    f"{path}: contains {layout} in a form that is not supported (photometric {layout.photometric}, "
                    f"compression {layout.compression}); convert it to 8- or 16-bit RGB or grey"
                ) from None
            raise ImageError(
                f"{path}: starts like a {name} file, but the header is damaged ({_reason(error)}); replace or remove it"
            ) from None
        _check_size(*image.size, max_pixels, path)
        return image
    raise ImageError(f"{path}: not a supported image (it starts with {_shown(prefix)}); replace or remove it")


def _check_size(width: int, height: int, max_pixels: int, path: Path) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: the header declares {width} x {height} pixels, more than the limit of {max_pixels}; "
            "resize it, or predict with `tile` (PNG, TIFF, BMP and PPM files are then read in windows)"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{path}: the header declares {width} x {height} pixels; replace or remove it")


# ---- values ----------------------------------------------------------------------------------------------------------


def rgb(image: PillowImage, path: str | Path) -> Array:
    """Return a Pillow image of any mode as (H, W, 3) uint8 or, for wider values, as (H, W, 1) of their own type.

    Raises:
        ImageError: If the mode cannot be converted.
    """
    mode = image.mode
    if mode == "RGB":
        return np.asarray(image)
    if mode[0] in "IF":
        return np.asarray(image)[:, :, None]
    if mode in ("RGBa", "La"):  # colours multiplied by alpha
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    if mode in ("P", "PA"):  # through RGBA, so that a transparent entry keeps its colour
        return np.asarray(image.convert("RGBA"))[:, :, :3]
    if mode == "LAB":
        raise ImageError(f"{path}: mode LAB is not supported; convert it to RGB")
    return np.asarray(image.convert("RGB"))


def _maximum(image: ImageFile) -> int:
    """The largest value that the header of a PGM or PPM file declares."""
    tile = image.tile[0]
    arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    if tile.codec_name == "raw":
        return 0xFFFF if "I;16B" in arguments else 255
    return next((a for a in arguments if isinstance(a, int)), 255)


def _plain(image: PillowImage) -> PillowImage:
    return image.convert("RGBA" if "A" in image.getbands() else "RGB") if image.mode in ("P", "PA", "1") else image


def _chosen(values: Array, bands: tuple[int, ...], path: Path) -> Array:
    count = values.shape[2]
    for band in bands:
        if not 1 <= band <= count:
            raise ImageError(f"{path}: has {count} bands, but band {band} is to be read; bands are counted from 1")
    return values[:, :, [band - 1 for band in bands]]


def _as_colour(values: npt.NDArray[np.uint8], cmyk: bool, bands: tuple[int, ...] | None) -> npt.NDArray[np.uint8]:
    if cmyk:
        from PIL import Image

        return np.asarray(Image.fromarray(np.ascontiguousarray(values), "CMYK").convert("RGB"))
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 and bands is None else values


def orientation_of(image: PillowImage, header_only: bool = False) -> int:
    """The EXIF orientation. For PNG files Pillow decodes the pixels first, unless `header_only`."""
    from PIL.Image import Image

    try:
        value = (Image.getexif(image) if header_only else image.getexif()).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data in an intact image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def apply_orientation(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Apply the EXIF orientation to (H, W, C); orientations 5 to 8 exchange height and width."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


# ---- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable(path: Path, what: str = "the image") -> Generator[None, None, None]:
    """Exceptions of decoders as `ImageError`."""
    try:
        yield
    except (ImageError, DataWarning):  # a warning, where warnings are errors
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise ImageError(f"{path}: {what} is damaged ({_reason(error)}); replace or remove it") from None


def _unreadable(path: Path, error: OSError) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{path}: no such file")
    if isinstance(error, IsADirectoryError):
        return ImageError(f"{path}: is a folder, expected an image file")
    if error.errno is not None:
        return ImageError(f"{path}: cannot be read ({error.strerror})")
    reason = _reason(error)
    if "truncated" in reason:
        return ImageError(f"{path}: the image is truncated ({reason}); copy it again or remove it")
    return ImageError(f"{path}: the image is damaged ({reason}); replace or remove it")


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _shown(prefix: bytes) -> str:
    return repr(prefix.decode("ascii", "replace").strip("\x00")[:12])
