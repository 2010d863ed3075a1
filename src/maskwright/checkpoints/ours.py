"""Our own format: one .safetensors file whose header says how to build the system it belongs to.

The header's entries, all text: "format" ("maskwright"), "format_version", "version" (of the library), "system",
"options", "classes", "preprocess", "source" (where the weights come from, with their licence) and "extra" (whatever the
writer added), the last five as JSON. Entries that a later version adds are left alone by this one.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from maskwright._version import __version__
from maskwright.checkpoints.reading import read_state
from maskwright.errors import CheckpointError, UsageError
from maskwright.structures import Preprocess
from maskwright.systems import System

FORMAT_VERSION = 1


def save(system: System, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a system with its weights to `path` (.safetensors); `extra` is JSON that `read_metadata` gives back.

    The file appears whole or not at all: it is written beside `path`, flushed to disk and renamed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: our checkpoints are .safetensors files; give a name that ends so")
    metadata = {
        "format": "maskwright",
        "format_version": str(FORMAT_VERSION),
        "version": __version__,
        "system": system.name,
        "options": _json(system.options, path, "options"),
        "classes": _json(list(system.classes), path, "classes"),
        "preprocess": _json(system.preprocess.to_dict(), path, "preprocess"),
        "source": _json(system.source or {}, path, "source"),
        "extra": _json(extra or {}, path, "extra"),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_unshared(system.state_dict()), part, metadata=metadata)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path}: it could not be written ({reason}); free some space or choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What one of our files says of itself: system, options, classes, preprocess, source, extra; JSON parsed."""
    _, about = read_state(path)
    if not is_ours(about):
        raise CheckpointError(
            f"{path}: it was not written by maskwright; `convert` makes such a file of an official one"
        )
    return parse_metadata(about)


def is_ours(about: dict[str, Any]) -> bool:
    return about.get("metadata", {}).get("format") == "maskwright"


def parse_metadata(about: dict[str, Any]) -> dict[str, Any]:
    """The header's entries with their JSON parsed; entries of later versions stay as they are."""
    path, raw = about["path"], about["metadata"]
    known: dict[str, Any] = dict(raw)
    for entry, kind in (("options", dict), ("classes", list), ("preprocess", dict), ("source", dict), ("extra", dict)):
        try:
            known[entry] = json.loads(raw.get(entry) or json.dumps(kind()))
        except (ValueError, RecursionError):
            known[entry] = None
        if not isinstance(known[entry], kind):
            raise CheckpointError(
                f"{path}: its entry {entry!r} is no JSON {kind.__name__}; the file was changed by hand"
            )
    if not raw.get("system"):
        raise CheckpointError(
            f"{path}: its header does not say which system it belongs to; the file was changed by hand"
        )
    return known


def preprocess_of(metadata: dict[str, Any]) -> Preprocess | None:
    """The preprocessing that the file was saved with; fields of later versions are passed over."""
    known = {field.name for field in fields(Preprocess)}
    values = {k: v for k, v in metadata["preprocess"].items() if k in known}
    return Preprocess.from_dict(values) if values else None


def _json(value: Any, path: Path, entry: str) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: {entry} cannot be written as JSON ({error}); use numbers, text, lists and dicts"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "item") and getattr(value, "size", None) in (1, ()):  # a numpy scalar
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, in plain order, no two names sharing memory, which the format does not allow."""
    seen: set[int] = set()
    plain = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return plain
