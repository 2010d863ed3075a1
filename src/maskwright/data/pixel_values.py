"""Conversion of pixel values of any type to 8 bits: one rule for files, arrays, tensors and images in memory.

    8 bits              unchanged
    bool                0 and 255
    integers            0 ... `white` becomes 0 ... 255; values up to 255 in a signed or 32-bit type are unchanged
    float               0 ... 1 becomes 0 ... 255; values up to 255 are rounded

`white` is, in this order: what the file declares; what the caller specifies (`Preprocess.white` of the system, or what
the data set holds); or the end of the smallest range of 8, 10, 12, 14 or 16 bits that contains all values of the image.
Negative, infinite and larger values are an error, because their range is unknown.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwright.data.findings import DataWarning
from maskwright.errors import ImageError

Array = npt.NDArray[Any]

# Cameras and scanners deliver these numbers of bits.
_DEPTHS = (8, 10, 12, 14, 16)


def range_end(largest: int) -> int:
    """Return the end of the smallest range of 8, 10, 12, 14 or 16 bits that contains `largest`."""
    return next(((1 << bits) - 1 for bits in _DEPTHS if largest < 1 << bits), (1 << 16) - 1)


def declared_end(values: Array, bits: int) -> int | None:
    """Return the value of white in 16-bit samples that are declared to have fewer significant bits.

    The PNG specification stores them in the upper bits, with the lower ones filled; many programs store them unchanged.

    Args:
        values: The samples.
        bits: The declared number of significant bits.

    Returns:
        The value; None if the declaration does not fit the values.
    """
    if bits <= 8 or bits >= 16:
        return None
    end = (1 << bits) - 1
    if int(values.max(initial=0)) > end:
        return (1 << 16) - 1
    upper = values.astype(np.uint32)
    upper = upper >> (16 - bits)
    filled = upper << (16 - bits) | upper >> (2 * bits - 16)
    return (1 << 16) - 1 if bool((filled == values).all()) and bool(values.any()) else end


def to_8_bits(
    values: Array,
    name: str,
    *,
    white: int | None = None,
    declared: int | None = None,
    warn: bool = True,
    mention_full: bool = False,
) -> npt.NDArray[np.uint8]:
    """Convert pixel values to 8 bits.

    Args:
        values: Pixels of any shape and real type.
        name: What messages call the image.
        white: The value that becomes 255, for values of more than 8 bits; None: judged by the image.
        declared: The same as declared by the file; ignored if values exceed it.
        warn: Emit a `DataWarning` if the range had to be judged by the image and is not the full one of 16 bits.
        mention_full: Emit it for the full range too.

    Returns:
        The pixels, uint8, of the same shape.

    Raises:
        ImageError: If the range of the values is unknown or their type is not supported.
    """
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "uif":
        raise ImageError(f"{name}: pixel values of type {values.dtype} are not supported; use uint8, uint16 or float")
    if not values.size:
        return values.astype(np.uint8)
    if kind == "f":
        return _float(values, name, white, warn)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ImageError(
            f"{name}: contains {values.dtype} values from {low} to {high}, whose range is unknown; "
            "convert them to 8 or 16 bits"
        )
    # Arithmetic on 8-bit images gives wider types; in unsigned 16 bits, values up to 255 are unusual.
    plain = high <= 255 and values.dtype.newbyteorder("=") != np.uint16
    if declared is not None and high <= declared:
        end = declared
    elif white is not None:
        end = white
        _mention_clipped(high, white, warn)
    elif plain:
        return values.astype(np.uint8)
    else:
        end = range_end(high)
        if warn and (mention_full or end < 0xFFFF):
            _mention(f"{values.dtype.name} values are scaled to 8 bits: {end} becomes 255")
    if end == 255:
        return np.minimum(values, 255).astype(np.uint8)
    wide = np.minimum(values, end).astype(np.uint32)
    return ((wide * 255 + end // 2) // end).astype(np.uint8)


def _float(values: Array, name: str, white: int | None, warn: bool) -> npt.NDArray[np.uint8]:
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError(f"{name}: contains values that are not finite (NaN or infinity); replace them")
    if low < 0:
        raise ImageError(
            f"{name}: contains float values from {low:g} to {high:g}, whose range is unknown; "
            "convert them to 0 ... 1, or to 8 or 16 bits"
        )
    if high <= 1:
        factor, words = 255.0, "0 ... 1 becomes 0 ... 255"
    elif white is not None:
        factor, words = 255.0 / white, f"{white} becomes 255"
        _mention_clipped(high, white, warn)
    elif high <= 255:
        factor, words = 1.0, "they are taken as 0 ... 255"
    else:
        raise ImageError(
            f"{name}: contains float values of unknown range, up to {high:g}; convert it to 8 or 16 bits per channel, "
            "or set resize.white to the value that is white"
        )
    if warn:
        _mention(f"float values are rounded to 8 bits: {words}")
    return np.minimum(values * factor + 0.5, 255).astype(np.uint8)


def _mention_clipped(high: float, white: int, warn: bool) -> None:
    if high > white and warn:
        _mention(f"pixel values above {white}, the value of white, are cut off; resize.white changes it")


def _mention(text: str) -> None:
    # Python shows equal warnings of one place once; the text therefore names no file.
    warnings.warn(text, DataWarning, stacklevel=3)
