"""Limits for reading one file, and the conversion of unexpected exceptions into sentences."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from maskwright.errors import CheckpointError, MaskwrightError

NODES_PER_BYTE, MORE_NODES = 4, 200_000
BYTES_PER_BYTE, MORE_BYTES = 4, 64 << 20


@dataclass
class Budget:
    """What reading one file may cost: a multiple of its size and a constant.

    A small file can describe a large amount of work: tensors that repeat one storage, containers that contain one
    another many times. All parts of a file, nested files included, draw on the same budget.

    Attributes:
        path: The file, for messages.
        nodes: Entries of containers that may still be copied or visited.
        bytes: Bytes of tensors that may still be allocated.
    """

    path: str
    nodes: int
    bytes: int

    @classmethod
    def for_size(cls, path: str, size: int) -> Budget:
        """The budget of a file of `size` bytes, unpacked."""
        return cls(path, NODES_PER_BYTE * size + MORE_NODES, BYTES_PER_BYTE * size + MORE_BYTES)

    def spend_nodes(self, count: int) -> None:
        """Count entries that are copied or visited; CheckpointError if these are too many."""
        self.nodes -= count
        if self.nodes < 0:
            raise CheckpointError(
                f"{self.path}: its containers repeat one another far more often than its size allows; this is not a "
                "checkpoint, not read"
            )

    def spend_bytes(self, count: int) -> None:
        """Count bytes of a tensor before they are allocated; CheckpointError if these are too many."""
        self.bytes -= count
        if self.bytes < 0:
            raise CheckpointError(
                f"{self.path}: its tensors need far more memory than the size of the file allows; this is not a "
                "checkpoint, not read"
            )


def shown(text: object, most: int = 80) -> str:
    """`text` for a message: one line, printable, not longer than `most` characters."""
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: most + 1])
    return words if len(words) <= most else f"{words[:most]}..."


@contextlib.contextmanager
def unexpected_as_errors(path: str | Path) -> Generator[None, None, None]:
    """Turn exceptions that no reader expects into a CheckpointError with the exception as its cause.

    A damaged file can cause an exception in any library that takes part in reading it. The environment variable
    MASKWRIGHT_DEBUG disables the conversion; the tests of this library set it, so that its mistakes stay visible.

    Args:
        path: The file, for the message.

    Raises:
        CheckpointError: For any exception that is not a MaskwrightError or a warning.
    """
    try:
        yield
    except (MaskwrightError, Warning):
        raise
    except MemoryError as error:
        raise CheckpointError(
            f"{path}: reading it needs more memory than is available; the file may be damaged, download it again"
        ) from error
    except Exception as error:
        if os.environ.get("MASKWRIGHT_DEBUG"):
            raise
        reason = f"{type(error).__name__}: {shown(error, 120)}"
        raise CheckpointError(
            f"{path}: cannot be loaded ({reason}); the file is probably damaged, download it or save it again"
        ) from error
