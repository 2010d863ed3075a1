"""Maps of segment ids: RGB images in which red + 256 green + 65536 blue is the id of the segment at a pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from maskwright.data.images import MAX_PIXELS, opened, read_size
from maskwright.errors import AnnotationError, ImageError
from maskwright.structures.panoptic import colours_to_ids, ids_to_colours


def read_map(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a map of segment ids.

    Args:
        path: An RGB or RGBA image file.
        size: Expected H, W; None: any.

    Returns:
        Ids (H, W), int32.

    Raises:
        AnnotationError: If the file is missing or damaged, of another mode or another size.
    """
    try:
        actual = read_size(path)
        if size is not None and actual != tuple(size):
            raise AnnotationError(size_mismatch(path, actual, size))
        with path.open("rb") as file, opened(file, path, MAX_PIXELS) as image:
            if image.mode not in ("RGB", "RGBA"):
                raise AnnotationError(
                    f"{path}: has image mode {image.mode}; a map of segments must be an RGB PNG whose pixels are "
                    "segment ids, red + 256 green + 65536 blue"
                )
            if image.format == "JPEG":
                raise AnnotationError(
                    f"{path}: was saved as JPEG, which changes the segment ids in its pixels; a map of segments must "
                    "be an RGB PNG"
                )
            return colours_to_ids(np.asarray(image))
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such map of segments") from None
    except ImageError as error:
        raise AnnotationError(str(error)) from None
    except AnnotationError:
        raise
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise AnnotationError(f"{path}: the map of segments is damaged ({error}); restore it") from None


def map_bytes(ids: np.ndarray) -> bytes:
    """Return ids (H, W) as the PNG that `read_map` reads."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(ids_to_colours(ids)).save(data, "PNG")
    return data.getvalue()


def size_mismatch(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> str:
    """Return the message about a map of another size than its image; both sizes are H, W."""
    return (
        f"the map {path} is {size[1]} x {size[0]}, but its image is {expected[1]} x {expected[0]}; "
        "restore the map that belongs to this image"
    )
