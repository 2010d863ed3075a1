"""Images as a browser shows them: the file itself where a browser reads it as we do, otherwise JPEG or PNG."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from maskwright.data.images import opened, orientation_of
from maskwright.errors import ImageError
from maskwright.web.sources import Source

HELD = 256 << 20  # bytes of decoded images in memory
LOSSLESS = 4 << 20  # pixels up to which PNG is sent
_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png"}


@dataclass(frozen=True)
class Shown:
    """What is sent to a browser.

    Attributes:
        body: The content of an image file.
        media: Its type.
    """

    body: bytes
    media: str


class Shower:
    """Reads the images of a source for browsers; may be used from any thread.

    Args:
        source: The images.
    """

    def __init__(self, source: Source):
        self.source = source
        self._lock = threading.Lock()
        self._held = OrderedDict[int, tuple[str, Tensor]]()

    def tag(self, index: int, most: int | None) -> str:
        """Return the ETag of an image at a size."""
        text = f"{self.source.path.absolute()}|{self.source.stamp(index)}|{index}|{most}"
        return f'"{hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]}"'

    def show(self, index: int, most: int | None = None) -> Shown:
        """Return an image for a browser.

        Args:
            index: The image.
            most: Longest side in pixels; None: as it is.

        Raises:
            ImageError: If it cannot be read.
        """
        file = self.source.file(index)
        height, width = self.source.size(index)
        small = most is None or max(height, width) <= most
        if small and file is not None and (kind := plain_kind(file, self.source.max_pixels)) is not None:
            try:
                return Shown(file.read_bytes(), _TYPES[kind])
            except OSError as error:
                raise ImageError(f"{self.source.name(index)}: cannot be read ({error.strerror})") from None
        image = Image.fromarray(np.ascontiguousarray(self.pixels(index).permute(1, 2, 0).numpy()))
        if most is not None and not small:
            image.thumbnail((most, most), Image.Resampling.BILINEAR, reducing_gap=2.0)
        data = io.BytesIO()
        if image.width * image.height <= LOSSLESS and (most is None or most > 512):
            image.save(data, "PNG", compress_level=1)
            return Shown(data.getvalue(), "image/png")
        image.save(data, "JPEG", quality=92 if most is None or most > 512 else 80)
        return Shown(data.getvalue(), "image/jpeg")

    def pixels(self, index: int) -> Tensor:
        """Return the pixels of an image, (3, H, W) uint8; those that were read last are kept."""
        stamp = self.source.stamp(index)
        with self._lock:
            held = self._held.get(index)
            if held is not None and held[0] == stamp:
                self._held.move_to_end(index)
                return held[1]
        pixels = self.source.read(index)
        with self._lock:
            self._held[index] = stamp, pixels
            while len(self._held) > 1 and sum(value.nbytes for _, value in self._held.values()) > HELD:
                self._held.popitem(last=False)
        return pixels


def plain_kind(file: Path, max_pixels: int) -> str | None:
    """Return "JPEG" or "PNG" for a file that every browser shows as it is read here: 8-bit grey or RGB, not turned, not
    animated, without transparency. None for others.
    """
    try:
        with file.open("rb") as given, opened(given, file, max_pixels) as image:
            if image.format not in _TYPES or image.mode not in ("RGB", "L") or "transparency" in image.info:
                return None
            if getattr(image, "is_animated", False):
                return None
            return image.format if orientation_of(image, header_only=True) == 1 else None
    except (ImageError, OSError):
        return None
