"""A small TIFF writer for tests: strips or tiles, chunky or planar, with Deflate and predictors."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def write_tiff(
    path: Path, values: np.ndarray, *, planar: bool = False, deflate: bool = False, predictor: int = 1,
    order: str = "<", tile: int = 0, rows: int = 7, photometric: int | None = None, bits: int | None = None,
    extra: dict[int, list[int]] | None = None,
) -> None:  # fmt: skip
    """Write (H, W, C) values as a classic TIFF file.

    Args:
        path: The file.
        values: uint8, uint16, uint32, int16, float16, float32 or float64.
        planar: Store every band on its own.
        deflate: Compress with Deflate.
        predictor: 1 none, 2 horizontal differences, 3 floating point.
        order: "<" or ">".
        tile: Side of tiles in pixels; 0: strips.
        rows: Rows per strip.
        photometric: PhotometricInterpretation; default: RGB for three or four bands of unsigned integers.
        bits: Bits per sample, for packed values of 9 to 15 bits.
        extra: Further tags of type LONG.
    """
    height, width, count = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    depth = bits or values.dtype.itemsize * 8
    parts = [values[:, :, n : n + 1] for n in range(count)] if planar else [values]
    blocks: list[bytes] = []
    for part in parts:
        for y in range(0, height, tile or rows):
            for x in range(0, width, tile or width):
                block = part[y : y + (tile or rows), x : x + (tile or width)]
                if tile:
                    block = np.pad(block, ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)))
                data = _bytes(block, order, predictor, bits)
                blocks.append(zlib.compress(data) if deflate else data)
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [depth] * count, 259: [8 if deflate else 1],
        262: [photometric if photometric is not None else 2 if count in (3, 4) else 1],
        277: [count], 284: [2 if planar else 1], 317: [predictor], 339: [kind] * count, **(extra or {}),
    }  # fmt: skip
    if count == 4 and tags[262] == [2]:
        tags[338] = [2]
    at, places = 8, []
    for block in blocks:
        places.append(at)
        at += len(block) + len(block) % 2
    sizes = [len(block) for block in blocks]
    tags |= {322: [tile], 323: [tile], 324: places, 325: sizes} if tile else {273: places, 278: [rows], 279: sizes}
    if predictor == 1:
        del tags[317]
    body = b"".join(block + b"\0" * (len(block) % 2) for block in blocks)
    path.write_bytes(
        (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at) + body + _table(tags, at, order)
    )


def _bytes(block: np.ndarray, order: str, predictor: int, bits: int | None) -> bytes:
    if bits is not None:
        planes = (block[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        return np.packbits(planes.reshape(block.shape[0], -1).astype(np.uint8), axis=1).tobytes()
    size = block.dtype.itemsize
    if predictor == 3:
        rows = np.ascontiguousarray(block.astype(f">f{size}")).view(np.uint8).reshape(block.shape[0], -1, size)
        rows = rows.transpose(0, 2, 1).reshape(block.shape[0], -1, block.shape[2])
        rows = np.concatenate([rows[:, :1], np.diff(rows.astype(np.int16), axis=1).astype(np.uint8)], 1)
        return rows.tobytes()
    if predictor == 2:
        block = np.concatenate([block[:, :1], block[:, 1:] - block[:, :-1]], 1)
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _table(tags: dict[int, Any], at: int, order: str) -> bytes:
    table, arrays = struct.pack(order + "H", len(tags)), b""
    after = at + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        table += struct.pack(order + "HHI", tag, 4, len(values))
        if len(values) == 1:
            table += struct.pack(order + "I", values[0])
        else:
            table += struct.pack(order + "I", after + len(arrays))
            arrays += struct.pack(f"{order}{len(values)}I", *values)
    return table + struct.pack(order + "I", 0) + arrays
