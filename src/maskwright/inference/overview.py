"""Drawing of a large image at reduced resolution, with objects painted as they become complete."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskwright.data.windows import WindowSource, overview_step
from maskwright.inference.seams import PlacedObjects
from maskwright.structures.drawing import PALETTE

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = 1 << 24  # of the drawing


class Overview:
    """Every n-th pixel of every n-th row, with the masks (or boxes) of objects in colours.

    Args:
        source: The image.
        pixels: Number of pixels of the drawing, approximately.
    """

    def __init__(self, source: WindowSource, pixels: int = PIXELS):
        self._source, self._pixels = source, pixels
        self._step = overview_step(source.size, pixels)
        height, width = (-(-side // self._step) for side in source.size)
        self._colours: npt.NDArray[np.uint8] = np.zeros((height, width), np.uint8)  # position in PALETTE + 1
        self._count = 0

    def add(self, objects: PlacedObjects) -> None:
        """Paint objects."""
        for row in range(len(objects)):
            colour = self._count % len(PALETTE) + 1
            self._count += 1
            if objects.masks is None:
                self._frame(objects.boxes[row], colour)
                continue
            starts, ends = objects.masks[row]
            column, top = np.divmod(starts, self._source.size[0] + 1)
            bottom = ends - starts + top
            shown = column % self._step == 0
            spans = np.stack([column, -(-top // self._step), -(-bottom // self._step)], 1)[shown]
            for x, y0, y1 in spans.tolist():
                self._colours[y0:y1, x // self._step] = colour

    def image(self) -> Image:
        """Return the drawing; the image is read once more.

        Raises:
            ImageError: If it cannot be read.
        """
        from PIL import Image

        small: Any = self._source.overview(self._pixels)
        small = small[:3] if len(small) >= 3 else small[:1].expand(3, -1, -1)
        pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(small.permute(1, 2, 0).numpy())
        colours = np.array([[int(text[at : at + 2], 16) for at in (1, 3, 5)] for text in PALETTE], np.uint8)
        for start in range(0, len(pixels), 256):  # to bound memory
            rows = slice(start, start + 256)
            painted = self._colours[rows] > 0
            own = colours[self._colours[rows][painted] - 1]
            pixels[rows][painted] = (pixels[rows][painted] // 2) + (own // 2)
        return Image.fromarray(pixels)

    def _frame(self, box: npt.NDArray[Any], colour: int) -> None:
        height, width = self._colours.shape
        x0, y0, x1, y1 = (int(v / self._step) for v in box)
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width - 1), min(y1, height - 1)
        self._colours[y0 : y1 + 1, [x0, x1]] = colour
        self._colours[[y0, y1], x0 : x1 + 1] = colour
