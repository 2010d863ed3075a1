"""Label images of any size: a tiled BigTIFF file with 32-bit numbers of objects, written as objects become complete."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskwright.errors import DataError
from maskwright.files import AtomicFile, write_errors_as
from maskwright.inference.naming import MARK
from maskwright.inference.seams import PlacedObjects
from maskwright.structures import runs
from maskwright.structures.rle import Ints

Labels = npt.NDArray[np.uint32]
SIDE = 256  # of the tiles of the file
MEMORY = 48 << 20  # bytes of tiles that are kept uncompressed
_LEVEL = 1  # of the compression: higher ones save little


class LabelImage:
    """Pixels are 0 for background and k for the k-th object; where objects overlap, the one with the higher score.

    Tiles are compressed and written when they have not been used for a while; one that is needed again later is read
    back and written anew, so that objects may come in any order.

    Args:
        path: The file. Missing folders are created.
        size: H, W of the image.

    Attributes:
        path: The file.
        size: H, W.
        count: Number of objects so far.

    Raises:
        DataError: By all methods, if the file cannot be written.
    """

    def __init__(self, path: str | Path, size: tuple[int, int]):
        self.path, self.size, self.count = Path(path), size, 0
        self._grid = (-(-size[0] // SIDE), -(-size[1] // SIDE))
        tiles = self._grid[0] * self._grid[1]
        self._offsets = np.zeros(tiles, np.uint64)
        self._lengths = np.zeros(tiles, np.uint64)
        self._open: OrderedDict[int, Labels] = OrderedDict()
        self._scores: npt.NDArray[np.float32] = np.zeros(1, np.float32)  # by number; 0 is background
        self._file = AtomicFile(self.path, DataError)
        # Byte order, version 43, 8-byte offsets; the place of the directory is filled in at the end.
        self._end = 0
        self._append(b"II" + struct.pack("<HHHQ", 43, 8, 0, 0))

    def add(self, objects: PlacedObjects) -> None:
        """Paint objects, numbered from `count` + 1."""
        if objects.masks is None:
            self.count += len(objects)
            return
        need = self.count + len(objects) + 1
        if need > len(self._scores):
            self._scores = np.resize(self._scores, max(need, 2 * len(self._scores)))
        own = objects.scores if objects.scores is not None else np.zeros(len(objects), np.float32)
        self._scores[self.count + 1 : need] = own
        for starts, ends in objects.masks:
            self.count += 1
            self._paint(starts, ends)

    def close(self) -> None:
        """Complete the file."""
        for number in list(self._open):
            self._write(number)
        nothing = np.uint64(self._end)
        blank = zlib.compress(bytes(SIDE * SIDE * 4), _LEVEL)
        empty = self._offsets == 0
        if empty.any():  # one tile of background for all
            self._append(blank)
            self._offsets[empty], self._lengths[empty] = nothing, len(blank)
        place = self._directory()
        with write_errors_as(DataError, self.path, self._file.part):
            self._file.file.seek(8)
            self._file.file.write(struct.pack("<Q", place))
        self._file.commit()

    def abandon(self) -> None:
        """Remove what was written, unless the file has been completed."""
        self._file.discard()

    def _paint(self, starts: Ints, ends: Ints) -> None:
        x0, y0, x1, y1 = runs.frame(starts, ends, self.size[0])
        score = self._scores[self.count]
        for row in range(y0 // SIDE, -(-y1 // SIDE)):
            for column in range(x0 // SIDE, -(-x1 // SIDE)):
                left, top = max(x0, column * SIDE), max(y0, row * SIDE)
                right, bottom = min(x1, (column + 1) * SIDE), min(y1, (row + 1) * SIDE)
                mask = runs.crop(starts, ends, self.size[0], (left, top, right, bottom))
                if not mask.any():
                    continue
                tile = self._tile(row * self._grid[1] + column)
                part = tile[top - row * SIDE : bottom - row * SIDE, left - column * SIDE : right - column * SIDE]
                mask = mask & ((part == 0) | (self._scores[part] < score))
                part[mask] = self.count

    # ---- tiles -------------------------------------------------------------------------------------------------------

    def _tile(self, number: int) -> Labels:
        tile = self._open.get(number)
        if tile is not None:
            self._open.move_to_end(number)
            return tile
        if self._offsets[number]:
            with write_errors_as(DataError, self.path, self._file.part):
                self._file.file.flush()
                with self._file.part.open("rb") as file:
                    file.seek(int(self._offsets[number]))
                    data = zlib.decompress(file.read(int(self._lengths[number])))
            tile = np.frombuffer(data, np.uint32).reshape(SIDE, SIDE).copy()
        else:
            tile = np.zeros((SIDE, SIDE), np.uint32)
        self._open[number] = tile
        while len(self._open) * SIDE * SIDE * 4 > MEMORY:
            self._write(next(iter(self._open)))
        return tile

    def _write(self, number: int) -> None:
        data = zlib.compress(self._open.pop(number).astype("<u4").tobytes(), _LEVEL)
        if len(data) <= self._lengths[number]:  # over the earlier version
            with write_errors_as(DataError, self.path, self._file.part):
                self._file.file.seek(int(self._offsets[number]))
                self._file.file.write(data)
                self._file.file.seek(self._end)
        else:
            self._offsets[number] = self._end
            self._append(data)
        self._lengths[number] = len(data)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._end += len(data)

    def _directory(self) -> int:
        """Write the directory; returns its place."""
        self._append(bytes(-self._end % 8))
        tables: list[int] = []
        for table in (self._offsets, self._lengths):
            tables.append(self._end)
            self._append(table.astype("<u8").tobytes())
        text = self._end
        self._append(MARK.encode() + bytes(8 - len(MARK) % 8))
        count = len(self._offsets)
        short, long, ascii_text, long8 = 3, 4, 2, 16
        entries = [
            (256, long, 1, self.size[1]),
            (257, long, 1, self.size[0]),
            (258, short, 1, 32),  # bits
            (259, short, 1, 8),  # Deflate
            (262, short, 1, 1),  # 0 is black
            (277, short, 1, 1),  # samples
            (284, short, 1, 1),
            (305, ascii_text, len(MARK) + 1, text),
            (322, short, 1, SIDE),
            (323, short, 1, SIDE),
            (324, long8, count, tables[0] if count > 1 else int(self._offsets[0])),
            (325, long8, count, tables[1] if count > 1 else int(self._lengths[0])),
            (339, short, 1, 1),  # unsigned
        ]
        place = self._end
        table = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
        self._append(struct.pack("<Q", len(entries)) + table + bytes(8))
        return place
