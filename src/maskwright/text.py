"""Text from files and file names, made safe for display."""

from __future__ import annotations

import re

# Control characters of ASCII and Latin-1, marks that change the direction of text, line separators, the byte-order
# mark, and lone surrogates, with which Python represents the bytes of file names that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str, *, keep: str = "") -> str:
    """Return text in which control characters are escaped, so that a terminal only displays it.

    Args:
        text: Text that may contain names, keys or values from files.
        keep: Control characters that are not escaped.

    Returns:
        The text with escapes as in Python: ``\\n`` for a line break, ``\\x1b`` for the escape character, ``\\xff`` for
        a byte of a file name that is not UTF-8, ``\\u202e`` for others. Backslashes in the text are unchanged.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def encodable(text: str, encoding: str | None) -> str:
    """Return text in which characters that `encoding` does not have are escaped; None stands for UTF-8."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, see PEP 383
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
