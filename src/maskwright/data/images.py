"""Images from files: whatever is inside, out comes 8-bit RGB, or a sentence that names the file.

What odd images become, always and everywhere:

    16-bit grey         scaled over the whole 16-bit range to 8 bits
    grey, 1-bit         three equal channels, 0 ... 255
    alpha               dropped; the colour stored below transparent pixels stays (as detectron2 and OpenCV do)
    palette             looked up; a transparent entry keeps its colour
    CMYK, YCbCr         converted without colour management; embedded colour profiles are not applied
    EXIF orientation    applied
    animation           the first frame
    32-bit int, float   refused: nobody can know their range

The format is told by the content, never by the file's name. Formats that run programmes when opened are refused.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.findings import DataWarning
from maskwright.errors import ImageError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# Width times height. A header that claims more is refused before memory is taken; RGB of this size is 0.8 GB.
MAX_PIXELS = 1 << 28

# No EPS or other PostScript: Pillow starts ghostscript for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # a JPEG or TIFF of several images is no animation
_ORIENTATION = 0x0112


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, *, warn: bool = True) -> UInt8[Tensor, "3 H W"]:
    """The image as RGB, 0 ... 255, the way it is meant to be looked at (EXIF applied).

    The tensor is a view with channels last in memory. ImageError names the file and what is wrong with it. Of an
    animation the first frame is given, with a `DataWarning` unless `warn` is off.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, opened(file, path, max_pixels) as image:
            animated = bool(getattr(image, "is_animated", False)) and image.format in _ANIMATED
            pixels = _rgb(image, path)
            turned = _turn(pixels, _orientation(image))
    except ImageError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # a decoder fed with foreign bytes may raise anything
        raise ImageError(f"{path}: the image is damaged ({_reason(error)}); replace it or leave it out") from None
    if animated and warn:
        warnings.warn(f"{path}: is animated; its first frame is taken", DataWarning, stacklevel=2)
    return torch.from_numpy(np.require(turned, requirements=["C", "W"])).permute(2, 0, 1)


def is_animated(path: str | Path) -> bool:
    """Whether it is an image of several frames, by the header."""
    path = Path(path)
    with path.open("rb") as file, opened(file, path, MAX_PIXELS) as image:
        return bool(getattr(image, "is_animated", False)) and image.format in _ANIMATED


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """H, W as looked at (EXIF applied), from the header alone: nothing is decoded."""
    return _header(Path(path), max_pixels)[0]


def probe(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, int], tuple[int, int]]:
    """H, W as looked at and H, W as stored; ImageError for headers that are broken and for files that were cut off.

    Quick: only where the end of the file lacks its format's mark is the image decoded, to be sure.
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
            read_image(path, max_pixels)
    return size, stored


def _header(path: Path, max_pixels: int) -> tuple[tuple[int, int], tuple[int, int], str]:
    try:
        with path.open("rb") as file, opened(file, path, max_pixels) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
            return ((width, height) if turned else (height, width)), (height, width), image.format or ""
    except ImageError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception as error:
        raise ImageError(f"{path}: the header is damaged ({_reason(error)}); replace it or leave it out") from None


def opened(file: BinaryIO, path: Path, max_pixels: int) -> ImageFile:
    """The image with its header read. Pillow's own `open` checks sizes by a global setting of the user's."""
    from PIL import Image

    Image.init()
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{path}: the file is empty (0 bytes); replace it or leave it out")
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            image = factory(file, os.fspath(path))
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            raise ImageError(
                f"{path}: begins like a {name} file, but its header is damaged ({_reason(error)}); "
                "replace it or leave it out"
            ) from None
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{path}: its header claims {width} x {height} pixels, more than the {max_pixels} that are allowed; "
                "refused before reading further. Shrink or tile the image"
            )
        if width < 1 or height < 1:
            raise ImageError(f"{path}: its header claims {width} x {height} pixels; replace it or leave it out")
        return image
    raise ImageError(f"{path}: is not an image (it begins with {_shown(prefix)}); replace it or leave it out")


def _rgb(image: ImageFile, path: Path) -> np.ndarray:
    mode = image.mode
    if mode == "RGB":
        return np.asarray(image)
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode in ("I", "F"):
        kind = "32-bit integer" if mode == "I" else "float"
        raise ImageError(f"{path}: holds {kind} values of unknown range; convert it to 8 or 16 bits per channel")
    if mode in ("P", "PA"):  # by way of alpha, which is then dropped: a transparent entry keeps its colour
        return np.asarray(image.convert("RGBA"))[:, :, :3]
    return np.asarray(image.convert("RGB"))


def _orientation(image: ImageFile) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF beside a good image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored (H, W, 3) -> as looked at. Orientations 5 to 8 exchange height and width."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _unreadable(path: Path, error: OSError) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{path}: there is no such file")
    if isinstance(error, IsADirectoryError):
        return ImageError(f"{path}: is a folder, not an image")
    if error.errno is not None:
        return ImageError(f"{path}: cannot be read ({error.strerror})")
    reason = _reason(error)
    if "truncated" in reason:
        return ImageError(f"{path}: the image is cut off ({reason}); fetch it again or leave it out")
    return ImageError(f"{path}: the image is damaged ({reason}); replace it or leave it out")


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _shown(prefix: bytes) -> str:
    return repr(prefix.decode("ascii", "replace").strip("\x00")[:12])
