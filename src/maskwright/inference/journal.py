"""Journal of the tiles of a large image, with which a killed run continues.

A journal is a file of records, each of which holds the objects of one batch of tiles and a checksum. Records are
appended when a batch has been predicted; a record that a killed process has not completed is cut off. The first record
identifies the image, the weights and the options; a journal with others is replaced.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from maskwright.checkpoints.exported import runtime_of
from maskwright.errors import DataError
from maskwright.files import write_errors_as
from maskwright.structures import Instances, Masks
from maskwright.systems import System

_MAGIC = b"maskwright tiles 1\n"
_HEAD = struct.Struct("<QI")  # length and CRC-32 of a record
_FIELDS = ("boxes", "labels", "scores", "keypoints")


class TileJournal:
    """The objects of the tiles that have been predicted.

    Args:
        path: The file; missing folders are created.
        about: What the records depend on, as JSON.

    Attributes:
        path: The file.
        count: Number of records that earlier runs have left.

    Raises:
        DataError: By all methods, if the file cannot be read or written.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]):
        self.path = Path(path)
        header = json.dumps(about, sort_keys=True).encode()
        with write_errors_as(DataError, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            start = self._file.read(len(_MAGIC))
            if start != _MAGIC or self._record() != header:
                self._file.seek(0)
                self._file.truncate()
                self._file.write(_MAGIC)
                self._append(header)
            self._first = self._file.tell()
            self.count = 0
            end = self._first
            while self._record() is not None:
                self.count += 1
                end = self._file.tell()
            self._file.seek(end)
            self._file.truncate()

    def records(self) -> Iterator[list[Instances]]:
        """The records of earlier runs, in order."""
        at = self._first
        for _ in range(self.count):
            self._file.seek(at)
            data = self._record()
            if data is None:  # changed by another program since the file was opened
                raise DataError(f"{self.path}: the journal is damaged; remove it, and run the command again")
            at = self._file.tell()
            yield _decoded(data)

    def add(self, found: Sequence[Instances]) -> None:
        """Append a record.

        Args:
            found: The objects of each tile of a batch, on the host.
        """
        with write_errors_as(DataError, self.path):
            self._file.seek(0, os.SEEK_END)
            self._append(_encoded(found))

    def close(self) -> None:
        """Close the file; it remains until `remove`."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file, when the results are complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        self._file.write(_HEAD.pack(len(data), zlib.crc32(data)) + data)
        self._file.flush()

    def _record(self) -> bytes | None:
        """The next record; None if it is incomplete."""
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        length, check = _HEAD.unpack(head)
        if length > os.fstat(self._file.fileno()).st_size - self._file.tell():
            return None
        data = self._file.read(length)
        return data if zlib.crc32(data) == check else None


def identity(path: Path) -> dict[str, Any]:
    """What identifies the content of an image file: its path, size and time of change."""
    about = path.stat()
    return {"image": str(path.absolute()), "bytes": about.st_size, "changed": about.st_mtime_ns}


def digest(system: System) -> str:
    """A digest of the weights of a system; of an exported one, of what its file says, which has their checksum."""
    value, runtime = hashlib.sha256(), runtime_of(system)
    if runtime is not None:
        value.update(f"{runtime.name} {runtime.size} {sorted(runtime.metadata.items())}".encode())
        return value.hexdigest()
    for name, tensor in sorted(system.state_dict().items()):
        value.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        value.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return value.hexdigest()


def _encoded(found: Sequence[Instances]) -> bytes:
    """Objects of tiles as an uncompressed .npz file."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, objects in enumerate(found):
        arrays[f"{number} size"] = np.array(objects.image_size)
        for name in _FIELDS:
            value: torch.Tensor | None = getattr(objects, name)
            if value is not None:
                arrays[f"{number} {name}"] = value.detach().cpu().numpy()
        if objects.masks is not None:
            strings = [bytes(code["counts"]) for code in objects.masks.rle()]
            arrays[f"{number} lengths"] = np.array([len(text) for text in strings], np.int64)
            arrays[f"{number} counts"] = np.frombuffer(b"".join(strings), np.uint8)
    data = io.BytesIO()
    np.savez(data, count=np.array(len(found)), **arrays)  # pyright: ignore[reportArgumentType] - not typed well
    return data.getvalue()


def _decoded(data: bytes) -> list[Instances]:
    """The inverse of `_encoded`."""
    found: list[Instances] = []
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        for number in range(int(file["count"])):
            size = (int(file[f"{number} size"][0]), int(file[f"{number} size"][1]))
            values: dict[str, Any] = {
                name: torch.from_numpy(file[f"{number} {name}"])  # pyright: ignore[reportUnknownMemberType]
                for name in _FIELDS
                if f"{number} {name}" in file
            }
            if f"{number} counts" in file:
                counts = file[f"{number} counts"].tobytes()
                ends: list[int] = np.cumsum(file[f"{number} lengths"]).tolist()
                strings = [counts[a:b] for a, b in zip([0, *ends], ends, strict=False)]
                values["masks"] = Masks("rle", strings, size)
            found.append(Instances(size, **values))
    return found
