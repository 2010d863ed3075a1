"""Returning free memory to the operating system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_memory() -> None:
    """Return memory that has been freed to the operating system; without effect except with glibc.

    Arrays of some megabytes come from the heap, which small objects between them keep from shrinking: a long run would
    hold several times the memory that it uses.
    """
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda _: 0
