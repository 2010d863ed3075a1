"""Prediction on images of any size, whose objects are given out as they become complete.

Memory does not depend on the size of the image: windows are read and predicted one after the other in the order in
which they are stored, and an object leaves memory when all tiles that could show it have been predicted (`seams`). The
objects of every batch of tiles are recorded in a journal first, so that a killed run continues, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from maskwright.data.images import Reading, reading
from maskwright.data.windows import WindowSource
from maskwright.inference.joining import Tile
from maskwright.inference.journal import TileJournal
from maskwright.inference.memory import release_memory
from maskwright.inference.reading_ahead import ahead
from maskwright.inference.seams import Joiner, PlacedObjects, collected
from maskwright.inference.tiles import cover
from maskwright.structures import Instances

RELEASE = 4  # batches after which free memory is returned to the operating system

Find = Callable[[Sequence[Tensor]], list[Instances]]


@dataclass
class ObjectStream:
    """The objects of a large image, in pieces; iterated over once, which computes them.

    Every batch of tiles gives a piece, with those objects that it has completed. No object occurs in two pieces.

    Attributes:
        source: The image.
        find: Function from a batch of tiles (C, h, w) to their objects, on each tile's grid and on the host.
        tile: Side of the tiles in pixels.
        overlap: Minimum overlap of neighbouring tiles as a share of `tile`.
        batch: Tiles per call of `find`.
        reading: How the image is read.
        journal: File that records the objects of tiles; None: none.
        about: What the records depend on.
    """

    source: WindowSource
    find: Find
    tile: int
    overlap: float = 0.2
    batch: int = 1
    reading: Reading = field(default_factory=Reading)
    journal: Path | None = None
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        source = self.source
        tiles = cover(source.size, self.tile, self.overlap)
        self._tiles = sorted(tiles, key=lambda t: source.order(t.x, t.y, t.width, t.height))

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.source.size

    def __len__(self) -> int:
        """Return the number of pieces."""
        return -(-len(self._tiles) // self.batch)

    def __iter__(self) -> Iterator[PlacedObjects]:
        """Iterate over the pieces.

        Raises:
            ImageError: If a window cannot be read.
            DataError: If the journal cannot be written.
        """
        joiner = Joiner(self._tiles, self.size)
        journal = None if self.journal is None else TileJournal(self.journal, self._identity())
        try:
            done = 0
            if journal is not None:
                for found in journal.records():
                    done += 1
                    yield _added(joiner, found)
            batches = [self._tiles[start : start + self.batch] for start in range(0, len(self._tiles), self.batch)]
            for crops in ahead(self._read, batches[done:], 1, 1):
                found = self.find(crops)
                if journal is not None:
                    journal.add(found)
                done += 1
                if not done % RELEASE:
                    release_memory()
                yield _added(joiner, found)
        finally:
            if journal is not None:
                journal.close()

    def instances(self) -> Instances:
        """Compute and collect all objects, best first, on the image's grid."""
        return collected(iter(self), self.size)

    def _identity(self) -> dict[str, Any]:
        own = {"size": list(self.size), "tile": self.tile, "overlap": self.overlap, "batch": self.batch}
        rules = [self.reading.white, self.reading.bands]
        return {**own, "reading": rules, **self.about}

    def _read(self, tiles: Sequence[Tile]) -> list[Tensor]:
        with reading(self.reading):  # in the thread that reads
            return [self.source.window(t.x, t.y, t.width, t.height) for t in tiles]


def _added(joiner: Joiner, found: Sequence[Instances]) -> PlacedObjects:
    return PlacedObjects.join([joiner.add(objects) for objects in found])
