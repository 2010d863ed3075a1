"""Reading images: every supported file becomes 8-bit RGB; every other one is an error that names it.

Conversion of unusual images:

    16-bit grey         the full 16-bit range is scaled to 8 bits
    grey, 1-bit         three equal channels, 0 ... 255
    alpha               dropped; transparent pixels keep their stored colour (as in detectron2 and OpenCV)
    palette             looked up; a transparent entry keeps its colour
    CMYK, YCbCr         converted without colour management; embedded colour profiles are not applied
    EXIF orientation    applied
    animation           the first frame
    32-bit int, float   an error, because the range of the values is unknown

The format is detected from the content, not from the file name. Formats that execute programs when opened
(PostScript) are not supported.
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

# Width times height. A header with more pixels is refused before memory is allocated; RGB of this size is 0.8 GB.
MAX_PIXELS = 1 << 28

# No EPS or other PostScript: Pillow starts Ghostscript for it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # a JPEG or TIFF with several images is not an animation
_ORIENTATION = 0x0112


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, *, warn: bool = True) -> UInt8[Tensor, "3 H W"]:
    """Read an image file as 8-bit RGB, with the EXIF orientation applied.

    Args:
        path: The file.
        max_pixels: Largest width times height that is decoded.
        warn: Emit a `DataWarning` for an animation, of which the first frame is returned.

    Returns:
        Pixels (3, H, W), uint8; a view whose channels are last in memory.

    Raises:
        ImageError: If the file is missing, damaged, too large or not an image.
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
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise ImageError(f"{path}: the image is damaged ({_reason(error)}); replace or remove it") from None
    if animated and warn:
        warnings.warn(f"{path}: is animated; the first frame is used", DataWarning, stacklevel=2)
    return torch.from_numpy(np.require(turned, requirements=["C", "W"])).permute(2, 0, 1)


def is_animated(path: str | Path) -> bool:
    """Return whether the header of an image file declares an animation."""
    path = Path(path)
    with path.open("rb") as file, opened(file, path, MAX_PIXELS) as image:
        return bool(getattr(image, "is_animated", False)) and image.format in _ANIMATED


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return H, W of an image file with the EXIF orientation applied; only the header is read.

    Raises:
        ImageError: If the header is damaged, or declares more than `max_pixels`.
    """
    return _header(Path(path), max_pixels)[0]


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
        raise ImageError(f"{path}: the header is damaged ({_reason(error)}); replace or remove it") from None


def opened(file: BinaryIO, path: Path, max_pixels: int) -> ImageFile:
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
        file.seek(0)
        try:
            image = factory(file, os.fspath(path))
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            raise ImageError(
                f"{path}: starts like a {name} file, but the header is damaged ({_reason(error)}); replace or remove it"
            ) from None
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{path}: the header declares {width} x {height} pixels, more than the limit of {max_pixels}; "
                "resize or tile the image"
            )
        if width < 1 or height < 1:
            raise ImageError(f"{path}: the header declares {width} x {height} pixels; replace or remove it")
        return image
    raise ImageError(f"{path}: not a supported image (it starts with {_shown(prefix)}); replace or remove it")


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
        raise ImageError(f"{path}: contains {kind} values of unknown range; convert it to 8 or 16 bits per channel")
    if mode in ("P", "PA"):  # through RGBA, so that a transparent entry keeps its colour
        return np.asarray(image.convert("RGBA"))[:, :, :3]
    return np.asarray(image.convert("RGB"))


def _orientation(image: ImageFile) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data in an intact image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation to (H, W, 3); orientations 5 to 8 exchange height and width."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


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
