"""Lenient parsing of values in annotation files: each function returns None (or NaN) for what it cannot interpret."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

LONGEST_NAME = 200  # letters of a class name


def parse_id(value: Any) -> int | str | None:
    """Return an id exactly: integers and strings unchanged, 3.0 as 3; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return value if isinstance(value, (int, str)) else None


def parse_int(value: Any) -> int | None:
    """Return an integer, also from "3", "003", "3.0" or 3.0; None for anything else."""
    number = parse_id(value)
    if isinstance(number, str):
        whole, dot, rest = number.strip().partition(".")
        text = whole if dot and not rest.strip("0") else number.strip()
        return int(text) if text.removeprefix("-").isdecimal() and len(text) < 40 else None
    return number


def parse_float(value: Any) -> float:
    """Return a float, also from an integer or "3.5"; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def parse_flag(value: Any) -> bool | None:
    """Return 0 and 1 as False and True, and None (no value) as False; None for anything else."""
    if value is None:
        return False
    number = parse_float(int(value) if isinstance(value, bool) else value)
    return None if number not in (0.0, 1.0) else number == 1.0


def parse_length(value: Any) -> int | None:
    """Return a side of an image in pixels; None for anything but a positive integer below 2^31."""
    number = parse_int(value)
    return number if number is not None and 0 < number < 1 << 31 else None


class IdIndex:
    """Finds the listed id that a value refers to.

    Args:
        ids: The listed ids.
    """

    def __init__(self, ids: Iterable[int | str]):
        self._ids = set(ids)
        numbers: dict[int, list[int | str]] = {}
        for own in self._ids:
            number = parse_int(own)
            if number is not None:
                numbers.setdefault(number, []).append(own)
        self._numbers = {number: same[0] for number, same in numbers.items() if len(same) == 1}

    def find(self, value: Any) -> int | str | None:
        """Return the listed id equal to `value`, or, if only one is, the id that is the same number.

        "7", "007" and 7.0 are the number 7. None if there is none.
        """
        own = parse_id(value)
        if own is None or own in self._ids:
            return own
        number = parse_int(own)
        return None if number is None else self._numbers.get(number)


def clean_name(name: str) -> str:
    """Return the name of a class as one line: runs of blanks and control characters as one blank, and not too long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3].rstrip() + "..."


def relative_path(name: str) -> str | None:
    """Return a file name as a normalized relative path with "/"; None if it is absolute or leaves its folder.

    Backslashes count as separators on every system. "a/../b" becomes "b" whether or not "a" exists.
    """
    windows = PureWindowsPath(name)
    if "\0" in name or windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return None
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None


def shortened(value: Any, length: int = 60) -> str:
    """Return `repr(value)`, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
