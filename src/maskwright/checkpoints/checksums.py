"""Checksums of the tensors in our own files: an entry of the metadata, written on saving and checked on loading."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from maskwright.checkpoints.budget import shown
from maskwright.errors import CheckpointError

ENTRY = "crc32"  # the entry of the metadata: a JSON object from names of tensors to eight hexadecimal digits


def checksums(state: Mapping[str, Tensor]) -> str:
    """The checksums of all tensors as JSON.

    Args:
        state: Contiguous tensors on the CPU, by name.
    """
    return json.dumps({name: _checksum(value) for name, value in state.items()}, separators=(",", ":"))


def verify(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: str) -> None:
    """Compare tensors with the checksums in the metadata of their file; files without checksums are accepted.

    Args:
        state: The tensors.
        metadata: The metadata.
        path: The file, for messages.

    Raises:
        CheckpointError: If a tensor, or the entry, is damaged.
    """
    text = metadata.get(ENTRY)
    if text is None or metadata.get("format") != "maskwright":
        return
    expected: Any
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        raise CheckpointError(f"{path}: the checksums in its metadata are damaged; use another copy of the file")
    digits = cast(dict[str, Any], expected)
    for name, value in state.items():
        if digits.get(name) != _checksum(value):
            raise CheckpointError(
                f"{path}: tensor {shown(name)!r} does not match its checksum; the file was damaged after it was saved, "
                "use another copy"
            )


def _checksum(value: Tensor) -> str:
    """CRC-32 of type, shape and values."""
    start = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode())
    flat = value.detach().reshape(-1).contiguous()
    content: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return f"{zlib.crc32(content, start):08x}"
