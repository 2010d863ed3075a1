"""Prediction on large images in overlapping tiles, so that small objects keep the size they had in training.

Neighbouring tiles overlap in a strip; `joining` compares the objects there and `seams` joins them. Masks stay
run-length encoded, no array of the image's size is allocated, and tiles are views of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from maskwright.data.windows import WindowSource
from maskwright.errors import UsageError
from maskwright.inference.joining import Tile
from maskwright.inference.seams import join_tiles
from maskwright.structures import Instances

__all__ = ["Tile", "check_tiles", "cover", "join_tiles", "predict_tiled", "tile_words"]


def cover(size: tuple[int, int], tile: int, overlap: float) -> list[Tile]:
    """Cover an image with tiles of equal size.

    Args:
        size: Height and width of the image.
        tile: Side of the tiles in pixels. Along a shorter side of the image there is one tile of that length.
        overlap: Minimum overlap of neighbouring tiles as a share of `tile`.

    Returns:
        The tiles, evenly spaced, row by row.
    """

    def along(length: int) -> list[int]:
        if length <= tile:
            return [0]
        step = max(1, math.floor(tile * (1 - overlap)))
        count = math.ceil((length - tile) / step) + 1
        return [number * (length - tile) // (count - 1) for number in range(count)]

    height, width = size
    return [Tile(x, y, min(tile, width), min(tile, height)) for y in along(height) for x in along(width)]


def check_tiles(tile: int | None, overlap: float, task: str) -> None:
    """Check the arguments for tiled prediction.

    Args:
        tile: Side of the tiles in pixels; None for no tiles.
        overlap: Overlap of neighbouring tiles as a share of `tile`.
        task: Name of the task.

    Raises:
        UsageError: If a value is out of range, or the task segments whole images, which tiling does not support.
    """
    if tile is None:
        return
    if tile < 16 or not 0 <= overlap <= 0.9:
        raise UsageError(
            f"`tile` must be at least 16 pixels and `overlap` in [0, 0.9], got tile={tile}, overlap={overlap}"
        )
    if task in ("panoptic", "semantic"):
        raise UsageError(f"tiles are supported for objects only; omit `tile` with task {task!r}")


def tile_words(tile: int, overlap: float) -> str:
    """The tiles in words, for the protocol of an evaluation."""
    return f"tiles of {tile} pixels, overlapping by {100 * overlap:g} %, each: "


def predict_tiled(
    find: Callable[[Sequence[Tensor]], list[Instances]],
    image: Tensor | WindowSource,
    tile: int,
    overlap: float,
    batch: int = 1,
) -> Instances:
    """Predict the objects of a large image tile by tile.

    Args:
        find: Function from a batch of tiles (C, h, w) to their objects, on each tile's grid and on the CPU.
        image: The image (C, H, W), or a file of which windows are read.
        tile: Side of the tiles in pixels.
        overlap: Minimum overlap of neighbouring tiles as a share of `tile`.
        batch: Tiles per call of `find`.

    Returns:
        The objects on the image's grid, without duplicates; see `join_tiles`.
    """
    size = (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else image.size
    tiles = cover(size, tile, overlap)
    if not isinstance(image, Tensor):
        source = image
        tiles = sorted(tiles, key=lambda t: source.order(t.x, t.y, t.width, t.height))
    found: list[Instances] = []
    for start in range(0, len(tiles), batch):
        found += find([_crop(image, t) for t in tiles[start : start + batch]])
    return join_tiles(found, tiles, size)


def _crop(image: Tensor | WindowSource, t: Tile) -> Tensor:
    if isinstance(image, Tensor):
        return image[:, t.y : t.y + t.height, t.x : t.x + t.width]
    return image.window(t.x, t.y, t.width, t.height)
