"""Images whose pixels are numbers of objects or classes: reading them, and the objects in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from maskwright.data.deep_images import decode_tiff, tiff_layout
from maskwright.data.exchange.collecting import run_length_code
from maskwright.data.exchange.files import FileProblem
from maskwright.data.images import MAX_PIXELS, opened
from maskwright.errors import ImageError

Plane = npt.NDArray[np.int64]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_AT_ONCE = 32  # files that are decoded ahead


def read_plane(path: Path, size: tuple[int, int] | None = None, colours: Mapping[int, int] | None = None) -> Plane:
    """Return the numbers in the pixels of an image.

    Args:
        path: A PNG, TIFF, BMP or GIF file with one channel of up to 64 bits, a palette (whose indices are returned), or
            an RGB image (red + 256 green + 65536 blue is returned).
        size: Expected H, W; None: any.
        colours: The numbers of colours (red + 256 green + 65536 blue), which replace these in RGB images.

    Returns:
        Numbers (H, W), int64.

    Raises:
        FileProblem: If the file is missing, damaged, of another size, or cannot hold exact numbers.
    """
    values = _values(path)
    height, width = values.shape[:2]
    if size is not None and (height, width) != tuple(size):
        turned = "; turn it as the image is displayed (EXIF orientation)" if (width, height) == tuple(size) else ""
        raise FileProblem(
            f"is {width} x {height}, but its image is {size[1]} x {size[0]}"
            + (turned or "; restore the file that belongs to this image")
        )
    if values.ndim == 3:
        if values.shape[2] >= 3 and colours is not None:
            return _numbered(values[:, :, :3].astype(np.int64), colours)
        values = values[:, :, 0] if values.shape[2] < 3 else _as_number(values[:, :, :3])
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.round(values)) & (values < 2**63)).all():
        raise FileProblem("has values that are not numbers of objects; expected integers from 0 on")
    if values.dtype.kind in "if" and values.size and values.min() < 0:
        raise FileProblem(f"has the value {values.min():.0f}; expected 0 for the background and objects from 1 on")
    return values.astype(np.int64)


def _as_number(values: npt.NDArray[Any]) -> Plane:
    wide = values.astype(np.int64)
    equal = (wide[:, :, 0] == wide[:, :, 1]).all() and (wide[:, :, 0] == wide[:, :, 2]).all()
    return wide[:, :, 0] if equal else wide[:, :, 0] + (wide[:, :, 1] << 8) + (wide[:, :, 2] << 16)


def _numbered(values: Plane, colours: Mapping[int, int]) -> Plane:
    """Colours as numbers. Greys that are not in the table are numbers themselves; other colours keep their own code."""
    codes = values[:, :, 0] + (values[:, :, 1] << 8) + (values[:, :, 2] << 16)
    found, inverse = np.unique(codes, return_inverse=True)
    numbers = [colours.get(code, code & 0xFF if code == (code & 0xFF) * 0x10101 else code) for code in found.tolist()]
    return np.array(numbers, np.int64)[inverse].reshape(codes.shape)


def _values(path: Path) -> npt.NDArray[Any]:
    """The values of an image file, (H, W) or (H, W, C), with palette indices unchanged."""
    if path.is_fifo():
        raise FileProblem("is a named pipe; remove it")  # opening it would wait for its other end
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start[:2] in (b"II", b"MM"):
                layout = tiff_layout(file)
                file.seek(0)
                if layout is not None and layout.deep:
                    if layout.width * layout.height > MAX_PIXELS:
                        raise FileProblem(f"has more than {MAX_PIXELS} pixels; cut the image into tiles")
                    return decode_tiff(file, layout)
            with opened(file, path, MAX_PIXELS) as image:
                if image.format == "JPEG":
                    raise FileProblem("was saved as JPEG, which changes the numbers in its pixels; restore the PNG")
                image.load()
                if image.mode not in ("1", "L", "P", "LA", "PA", "I", "F", "RGB", "RGBA") and image.mode[0] != "I":
                    raise FileProblem(f"has image mode {image.mode}; expected one channel, a palette or RGB")
                return np.asarray(image)
    except FileNotFoundError:
        raise FileProblem("does not exist; restore it") from None
    except FileProblem:
        raise
    except ImageError as error:
        what = str(error).removeprefix(f"{path}: ")
        raise FileProblem(what if what.startswith(("is ", "has ")) else f"cannot be read: {what}") from None
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise FileProblem(f"is damaged ({error}); restore it") from None


def objects_of(plane: Plane, size: tuple[int, int], omitted: Sequence[int] = (0,)) -> list[tuple[int, dict[str, Any]]]:
    """Return each number of a plane with the run-length code of its pixels, in ascending order.

    Args:
        plane: Numbers (H, W).
        size: H, W.
        omitted: Numbers that are no objects.
    """
    return [(number, run_length_code(crop, x0, y0, size)) for number, crop, x0, y0 in crops_of(plane, omitted)]


def crops_of(plane: Plane, omitted: Sequence[int] = (0,)) -> Iterator[tuple[int, npt.NDArray[np.bool_], int, int]]:
    """Yield each number of a plane, its pixels (h, w) in the tightest window, and x, y of the window's corner."""
    from scipy import ndimage  # pyright: ignore[reportMissingTypeStubs] - no types

    find_objects: Any = ndimage.find_objects  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - no types
    numbers, inverse = np.unique(plane, return_inverse=True)
    places = inverse.reshape(plane.shape).astype(np.int32) + 1
    for index, window in enumerate(find_objects(places)):
        number = int(numbers[index])
        if window is None or number in omitted:
            continue
        yield number, places[window] == index + 1, int(window[1].start), int(window[0].start)


def majority(codes: Plane, crop: npt.NDArray[np.bool_], x0: int, y0: int) -> tuple[int, float]:
    """Return the number that most pixels of an object have in another plane, and their share."""
    inside = codes[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]][crop]
    numbers, counts = np.unique(inside, return_counts=True)
    best = int(counts.argmax())
    return int(numbers[best]), float(counts[best] / counts.sum())


def ahead(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Apply a function to items in threads, in order, with a bounded number of results that wait."""
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as threads:
        for first in range(0, len(items), _AT_ONCE):
            yield from threads.map(function, items[first : first + _AT_ONCE])


def background_first(names: Sequence[str]) -> list[str]:
    """Return class names whose first is the background, which is added if the list has none."""
    first = names[0].strip("_ ").lower() if names else ""
    return list(names) if first in ("background", "bg") else ["background", *names]
