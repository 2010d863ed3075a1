"""The option group for the size and the normalisation of a network's input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures.preprocess import Preprocess


@dataclass(frozen=True)
class Resize(OptionGroup):
    """How images are resized and normalised, as options of a system. None keeps what the system was published with.

    The group changes a published `Preprocess` (see there for the rules in full): a system holds the published one
    and calls `apply`.

    Attributes:
        short: Length of the short side after resizing, in pixels.
        long: Upper bound of the long side, in pixels.
        fit: The resize rule, see `Preprocess.fit`.
        canvas: Height and width of the input, for the rules "inside", "stretch" and "letterbox", in pixels.
        multiple: The padded batch is a multiple of this many pixels.
        mean: Mean per channel in the network's channel order, of values divided as published.
        std: Standard deviation per channel, likewise.
        white: The value that becomes 255 in images with more than 8 bits per channel, see `Preprocess.white`.
        bands: Numbers of the bands, from 1, that are read from image files with other bands than RGB.
    """

    label: ClassVar[str] = "resize"

    short: int | None = None
    long: int | None = None
    fit: Literal["short", "inside", "stretch", "letterbox", "pad", "own"] | None = None
    canvas: Sequence[int] | None = None
    multiple: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    white: int | None = None
    bands: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short", "long", "multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"resize.{name} must be at least 1, got {value}")
        if self.white is not None and not 1 <= self.white <= 0xFFFF:
            raise UsageError(f"resize.white must be in 1 ... 65535, got {self.white}")
        if self.bands is not None and (not self.bands or min(self.bands) < 1):
            raise UsageError(f"resize.bands must be numbers of bands, counted from 1, got {list(self.bands)}")
        if self.canvas is not None and (len(self.canvas) != 2 or min(self.canvas) < 1):
            raise UsageError(f"resize.canvas must be a height and a width of at least 1, got {list(self.canvas)}")

    def apply(self, published: Preprocess, in_channels: int = 3) -> Preprocess:
        """Returns `published` with the fields of this group, for images of `in_channels` channels.

        Raises:
            UsageError: If a mean or std does not fit the number of channels.
        """
        changed = published
        if self.white is not None:
            changed = replace(changed, white=self.white)
        if self.bands is not None:
            if len(self.bands) not in (1, in_channels):
                raise UsageError(
                    f"resize.bands names {len(self.bands)} bands, but the system has {in_channels} channels "
                    "(in_channels)"
                )
            changed = replace(changed, bands=tuple(self.bands))
        if self.canvas is not None:
            canvas = int(self.canvas[0]), int(self.canvas[1])
            if changed.fit == "inside" and canvas[0] != canvas[1]:
                raise UsageError(f"resize.canvas must be a square for this system, got {list(canvas)}")
            changed = replace(
                changed, canvas=canvas, multiple=canvas[0] if changed.fit == "inside" else changed.multiple
            )
            if self.fit is None and changed.fit not in ("inside", "stretch", "letterbox"):
                changed = replace(changed, fit="letterbox")
        if self.fit is not None:
            try:
                inside = self.fit == "inside" and changed.canvas is not None
                multiple = changed.canvas[0] if inside and changed.canvas else changed.multiple
                changed = replace(changed, fit=self.fit, multiple=multiple)
            except UsageError as error:
                raise UsageError(f"resize: {error}") from None
        if self.multiple is not None:
            changed = replace(changed, multiple=self.multiple)
        if self.canvas is None or self.short is not None:
            changed = changed.at(self.short, self.long)
        return normalization_for(changed, in_channels, self.mean, self.std)


ResizeLike = Mapping[str, Any] | Resize


def normalization_for(
    preprocess: Preprocess, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Preprocess:
    """Returns `preprocess` with another mean or std where given, for images of `in_channels` channels.

    Channels beyond RGB are centred on middle grey, and so are one or two channels alone.

    Raises:
        UsageError: If a mean or std has the wrong length, or a std is not positive.
    """
    if in_channels < 1:
        raise UsageError(f"in_channels must be at least 1, got {in_channels}")
    rows: list[tuple[float, ...]] = []
    for name, given, own in (("mean", mean, preprocess.mean), ("std", std, preprocess.std)):
        row = own if given is None else tuple(float(v) for v in given)
        if given is not None and len(row) != in_channels and not len(row) == 3 < in_channels:
            raise UsageError(f"{name} has {len(row)} entries; expected one for each of {in_channels} channels")
        if not all(math.isfinite(v) and (name == "mean" or v > 0) for v in row):
            raise UsageError(f"{name} must hold finite numbers{' above 0' * (name == 'std')}, got {row}")
        if len(row) > in_channels:
            row = (sum(row) / len(row),) * in_channels
        rows.append(row + (sum(row) / len(row) if name == "mean" else row[0],) * (in_channels - len(row)))
    channels = preprocess.channels if in_channels >= 3 else "RGB"
    return replace(preprocess, mean=rows[0], std=rows[1], channels=channels)
