"""The checkpoint format of this library: a .safetensors file whose header describes the system.

Entries of the header, all strings: "format" ("maskwright"), "format_version", "version" (of the library), "system",
"options", "classes", "preprocess", "source" (origin and licence of the weights), "extra" (added by the caller of
`save`) and "crc32" (checksums of the tensors); the last six are JSON. Unknown entries are ignored, so that later
versions can add some.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] - os.PathLike without its type

from maskwright._version import __version__
from maskwright.checkpoints.budget import Budget, shown
from maskwright.checkpoints.checksums import ENTRY, checksums
from maskwright.checkpoints.containers import check_depth
from maskwright.checkpoints.reading import read_state
from maskwright.errors import CheckpointError, UsageError
from maskwright.files import atomic_path
from maskwright.structures import Preprocess
from maskwright.systems import System
from maskwright.systems.kinds.classless import Classless

FORMAT_VERSION = 1


def save(system: System, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Save a system with its weights, options, classes and preprocessing.

    The file is replaced atomically: an existing one stays unchanged if writing fails. The same system gives the same
    bytes.

    Args:
        system: The system.
        path: A file name that ends in .safetensors. Missing folders are created.
        extra: Further values, such as metrics; returned by `read_metadata`. Must be JSON.

    Raises:
        UsageError: If `path` has another suffix, or a value cannot be written as JSON.
        CheckpointError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: the file name of a checkpoint must end in .safetensors")
    if any(parameter.is_meta for parameter in system.parameters()):
        raise UsageError(f"{path}: an exported system has no weights to save; copy its file instead")
    metadata = metadata_of(system, path) | {"extra": _json(extra or {}, path, "extra")}
    state = _unshared(system.state_dict())
    metadata[ENTRY] = checksums(state)
    with atomic_path(path, CheckpointError) as part:
        save_file(state, part, metadata=metadata)
        _sort_header(part)


def metadata_of(system: System, path: Path) -> dict[str, str]:
    """The entries of a header that describe a system.

    Args:
        system: The system.
        path: The file that will have them, for messages.

    Raises:
        UsageError: If an option cannot be written as JSON.
    """
    classes = system.stored_classes if isinstance(system, Classless) else system.classes
    return {
        "format": "maskwright",
        "format_version": str(FORMAT_VERSION),
        "version": __version__,
        "system": system.name,
        "options": _json(system.options, path, "options"),
        "classes": _json(list(classes), path, "classes"),
        "preprocess": _json(system.preprocess.to_dict(), path, "preprocess"),
        "source": _json(system.source or {}, path, "source"),
    }


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the header of a checkpoint that `save` wrote.

    Args:
        path: The file.

    Returns:
        The entries of the header by name, JSON parsed: "system", "options", "classes", "preprocess", "source",
        "extra" and others.

    Raises:
        CheckpointError: If the file cannot be read or was not written by this library.
    """
    _, about = read_state(path)
    if not is_ours(about):
        raise CheckpointError(f"{path}: not a checkpoint of maskwright; `convert` makes one from an official file")
    return parse_metadata(about)


def is_ours(about: dict[str, Any]) -> bool:
    """Whether `about`, as returned by `read_state`, describes a checkpoint that `save` wrote."""
    return about.get("metadata", {}).get("format") == "maskwright"


def parse_metadata(about: dict[str, Any]) -> dict[str, Any]:
    """Parse the header of a checkpoint that `save` wrote.

    Args:
        about: The description returned by `read_state`.

    Returns:
        The entries of the header by name, JSON parsed. Unknown entries are returned as strings.

    Raises:
        CheckpointError: If an entry is missing or not valid JSON of the expected type.
    """
    path, raw = about["path"], about["metadata"]
    known: dict[str, Any] = {k: v for k, v in raw.items() if k != ENTRY}
    budget = Budget.for_size(path, sum(map(len, raw.values())))
    for entry, kind in (("options", dict), ("classes", list), ("preprocess", dict), ("source", dict), ("extra", dict)):
        try:
            known[entry] = json.loads(raw.get(entry) or json.dumps(kind()))
        except (ValueError, RecursionError):
            known[entry] = None
        if not isinstance(known[entry], kind):
            expected = "object" if kind is dict else "array"
            raise CheckpointError(f"{path}: header entry {entry!r} must be a JSON {expected}; save the file again")
        check_depth(known[entry], path, budget)
    if not all(isinstance(name, str) and name.strip() for name in known["classes"]):
        raise CheckpointError(f"{path}: header entry 'classes' must be an array of names; save the file again")
    if not raw.get("system"):
        raise CheckpointError(f"{path}: the header has no entry 'system'; save the file again")
    return known


def preprocess_of(metadata: dict[str, Any]) -> Preprocess | None:
    """The preprocessing stored in a parsed header; None if there is none. Unknown fields are ignored.

    Raises:
        CheckpointError: If a value has the wrong type or is out of range.
    """
    known = {field.name for field in fields(Preprocess)}
    values = {k: v for k, v in metadata["preprocess"].items() if k in known}
    try:
        return Preprocess.from_dict(values) if values else None
    except UsageError as error:
        raise CheckpointError(
            f"{metadata.get('path', 'the file')}: header entry 'preprocess' is invalid ({shown(error, 200)}); save the "
            "file again"
        ) from None


def _json(value: Any, path: Path, entry: str) -> str:
    """`value` as JSON text."""
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: {entry} cannot be written as JSON ({error}); use numbers, strings, lists and dicts"
        ) from None


def _plain(value: Any) -> Any:
    """`value` as a type that JSON has."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(cast(set[Any] | frozenset[Any], value))
    if hasattr(value, "item") and getattr(value, "size", None) in (1, ()):  # a numpy scalar
        return value.item()
    if isinstance(value, torch.Tensor):
        return cast(Any, value).tolist()
    raise TypeError(f"a {type(value).__name__}")


def _sort_header(path: Path) -> None:
    """Sorts the entries of a file's metadata, whose order safetensors takes from a hash table that differs per run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, without shared memory, which the format does not allow."""
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return plain
