"""Reading of little-endian numbers from bytes, for the formats of files that predate PyTorch."""

from __future__ import annotations

import struct
from typing import Any

from maskwright.errors import CheckpointError


class BinaryReader:
    """Reader of the values of a file, from the position `at` on.

    Args:
        data: Content of the file.
        path: Its name, for messages.
        writer: The program that writes such files, for messages.
    """

    def __init__(self, data: bytes, path: str, writer: str):
        self.data, self.path, self.writer, self.at = data, path, writer, 0

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        """The next `count` numbers of a type of `struct`."""
        form = f"<{count}{kind}"
        return struct.unpack(form, self.bytes(struct.calcsize(form)))

    def bytes(self, count: int) -> memoryview:
        """The next bytes.

        Raises:
            CheckpointError: If there are fewer.
        """
        if not 0 <= count <= len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path}: claims {count} bytes, but {len(self.data) - self.at} are left; the file is truncated or "
                "damaged, download it again"
            )
        part = memoryview(self.data)[self.at : self.at + count]
        self.at += count
        return part

    def damaged(self, what: str) -> CheckpointError:
        """The error for a file with contents that the program does not write."""
        return CheckpointError(
            f"{self.path}: contains {what}, which {self.writer} does not write; the file is damaged, download it again"
        )
