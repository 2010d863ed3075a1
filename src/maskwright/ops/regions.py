"""Small holes and small parts of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy import ndimage
from torch import Tensor


def without_small_regions(
    crop: Bool[Tensor, "h w"], frame: Int[Tensor, " four"], size: tuple[int, int], least: int
) -> tuple[Bool[Tensor, "_h _w"], tuple[int, int], bool]:
    """Fills the holes of a mask that are smaller than `least` pixels, then drops parts that are smaller.

    Regions are 8-connected. Background at the edge of the image counts as a hole too. If all parts are small, the
    largest is kept.

    Args:
        crop: The mask in its window.
        frame: The window x0, y0, x1, y1.
        size: H, W of the image.
        least: Pixels.

    Returns:
        The mask in a larger window, the left and upper edge of that, and whether the mask has changed.
    """
    # A region that is cut off this far from the mask is not small, because it extends over as many pixels.
    x0, y0, x1, y1 = (int(v) for v in frame)
    left, top = min(x0, least), min(y0, least)
    room = ((top, min(size[0] - y1, least)), (left, min(size[1] - x1, least)))
    mask = np.pad(crop.numpy(), room)
    labels, sizes = _parts(~mask)
    small = sizes < least
    small[0] = False
    holes = bool(small.any())
    if holes:
        mask = mask | small[labels]
    labels, sizes = _parts(mask)
    large = sizes >= least
    large[0] = False
    parts = bool((~large[1:]).any())
    if parts:
        if not large.any():
            large[1 + int(sizes[1:].argmax())] = True
        mask = large[labels]
    return torch.from_numpy(mask), (x0 - left, y0 - top), holes or parts


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the 8-connected region of each pixel, 0 for none, and the size of each region."""
    labels: Any = ndimage.label(mask, np.ones((3, 3), int))[0]  # pyright: ignore[reportIndexIssue]
    return labels, np.bincount(labels.ravel())
