"""Reading of checkpoint files in all supported formats as flat state dicts. Code in the files is never executed."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.checkpoints.torch7 import MARKS, read_torch7
from maskwright.checkpoints.unpickling import (
    StorageKind,
    StorageRecord,
    byte_order_fits,
    settle,
    unpickle,
)
from maskwright.errors import CheckpointError, UnsafeCheckpointError

# Keys under which code bases store the weights, in order of preference: averaged weights first.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_model",
    "ema",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "shadow",
    "net",
    "network",
    "params",
    "weights",
)
PREFIXES = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile add to every key
BLOAT = 20  # maximum ratio of the unpacked size of a zip file to its own; torch stores weights uncompressed
HEADER = 100 << 20  # maximum size of a safetensors header in bytes, as in the safetensors library

Read = tuple[Any, dict[str, Any]]


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors of a checkpoint file.

    Supported are safetensors, both formats of `torch.save`, Torch 7, pickles of arrays (detectron2, Caffe2) and Hugging
    Face folders. In nested containers the averaged weights are preferred, then the usual names (`WRAPPERS`). A prefix
    such as "module." that all keys have is removed.

    Args:
        path: A file or a folder.

    Returns:
        The tensors by name, on the CPU, and a description of the file with the keys

        - "path"; "format": "safetensors", "torch", "torch-legacy", "torch7", "pickle" or "huggingface";
        - "layout": "caffe2" for the blobs of Detectron, otherwise missing;
        - "wrapper": the keys that lead to the weights;
        - "metadata": of the safetensors header;
        - "config", "preprocessor": config.json and preprocessor_config.json of a folder;
        - "container": plain values stored beside the weights.

    Raises:
        UnsafeCheckpointError: If reading the file would require executing code.
        CheckpointError: If the file is missing, damaged or in an unsupported format.
    """
    path = Path(path)
    name = str(path)
    about: dict[str, Any] = {"path": name, "wrapper": []}
    about |= {part: {} for part in ("metadata", "config", "preprocessor", "container")}
    try:
        if path.is_dir():
            return _folder(path, about)
        if not path.exists():
            raise CheckpointError(f"{name}: no such file; check the path")
        content, found = _file(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error}); check the file") from None
    about.update(found)
    if about["format"] == "safetensors":
        return _named(content, about)
    return _named(_weights(content, about), about)


# ---- recognising the format by content; file names are unreliable ---------------------------------------------------


def _file(path: Path) -> Read:
    """The content of a file of any format, and its format."""
    size = path.stat().st_size
    name = str(path)
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{name}: the file is empty; download it again")
        if head.startswith(b"PK\x03\x04"):
            return _settled(*_torch_zip(file, size, name), name)
        if _is_safetensors(head):
            return _safetensors(path, size, int.from_bytes(head[:8], "little"))
        if head[:1] == b"\x80" and head[1:2] <= b"\x05":
            return _settled(*_pickles(file, size, name), name)
        if head.startswith(MARKS):
            return _settled(read_torch7(file.read(), name), "torch7", name)
        _refuse_known(head, name)
        if path.suffix.lower() in (".pkl", ".pickle", ".pth", ".pt", ".bin"):
            return _settled(*_pickles(file, size, name), name)  # pickle protocols 0 and 1 have no signature
    raise CheckpointError(
        f"{name}: unsupported file format; expected .safetensors, a torch file (.pth, .pt, .bin), a pickle of arrays "
        "(.pkl) or a Hugging Face folder"
    )


def _settled(content: Any, form: str, name: str) -> Read:
    return settle(content, name), {"format": form}


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:].lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") <= HEADER


def _refuse_known(head: bytes, name: str) -> None:
    """Raise a specific error for common files that are not checkpoints."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        raise CheckpointError(
            f"{name}: a web page, not weights; an error page or login page was saved instead, download the file again"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name}: a Git LFS pointer, not the weights; run: git lfs pull")
    if text.startswith(b"\x1f\x8b"):
        raise CheckpointError(f"{name}: compressed with gzip; decompress it first")
    if text.startswith(b"\x89hdf"):
        raise CheckpointError(f"{name}: an HDF5 file (Keras), which is not supported; export it to .safetensors")
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{name}: a tar archive (torch's format of 2016, or an archived folder), which is not supported; extract "
            "it, or load it with an old version of torch and save it again"
        )
    if text.startswith((b"{", b"[")) and not head[:1].isspace() and head.isascii() and b'"' in text:
        raise CheckpointError(f"{name}: JSON text, not weights; pass the file with the weights")


# ---- formats --------------------------------------------------------------------------------------------------------


def _safetensors(path: Path, size: int, header: int) -> Read:
    from safetensors import SafetensorError, safe_open

    if header + 8 > size:
        raise CheckpointError(
            f"{path}: the header claims {header} bytes, the file has {size}; it is truncated, download it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {k: file.get_tensor(k) for k in names}, {"format": "safetensors", "metadata": file.metadata() or {}}
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        words = str(error).split("\n")[0][:160]
        raise CheckpointError(
            f"{path}: the safetensors content is truncated or damaged ({words}); download the file again"
        ) from None


def _torch_zip(file: io.BufferedIOBase, size: int, name: str, depth: int = 0) -> tuple[Any, str]:
    """The content of a file in the zip format of `torch.save`."""
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{name}: truncated or damaged ({error}); download the file again") from None
    claimed = sum(info.file_size for info in entries.values())
    if claimed > BLOAT * size + (1 << 20):
        raise CheckpointError(
            f"{name}: claims to unpack to {claimed} bytes from {size}, more than {BLOAT} times; not read, torch does "
            "not write such files"
        )
    odd = [k for k, info in entries.items() if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    if odd:
        raise CheckpointError(
            f"{name}: entry {odd[0]!r} of the zip file has an unsupported compression; save the file with torch"
        )
    roots = [key[: -len("data.pkl")] for key in entries if re.fullmatch(r"[^/]+/data\.pkl", key)]
    if len(roots) != 1:
        inside = ", ".join(sorted(entries)[:3]) or "nothing"
        raise CheckpointError(f"{name}: a zip archive without torch weights (it contains {inside}); extract it first")
    root = roots[0]
    if f"{root}constants.pkl" in entries or any(key.startswith(f"{root}code/") for key in entries):
        raise UnsafeCheckpointError(
            f"{name}: a TorchScript program, which can only be used by executing it; refused, nothing was executed. "
            "Save the state dict only"
        )

    def read(key: str) -> bytes:
        if key not in entries:
            raise CheckpointError(f"{name}: entry {key!r} is missing; the file is damaged, download it again")
        try:
            return archive.read(entries[key])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name}: entry {key!r} is damaged ({error}); download the file again") from None

    if f"{root}byteorder" in entries and not byte_order_fits(read(f"{root}byteorder").strip() == b"little"):
        raise CheckpointError(f"{name}: written on a machine with the other byte order; convert it there")
    storages: dict[str, StorageRecord] = {}

    def storage(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], name, depth)
        kind, key, count = _persistent(pid, name)
        if key not in storages:
            storages[key] = StorageRecord(key, kind.dtype, count, lambda: bytearray(read(f"{root}data/{key}")))
        return storages[key]

    pickled = read(f"{root}data.pkl")
    return unpickle(io.BytesIO(pickled), len(pickled), name, storages=storage), "torch"


_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6


def _pickles(file: io.BufferedIOBase, size: int, name: str, depth: int = 0) -> tuple[Any, str]:
    """The content of a pickle of arrays, or of a file in the older format of `torch.save`."""

    def left() -> int:
        return size - file.tell()

    def only_nested(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], name, depth)
        raise UnsafeCheckpointError(
            f"{name}: the pickle refers to objects outside the file; refused, nothing was executed"
        )

    first = unpickle(file, left(), name, storages=only_nested)
    if not isinstance(first, int) or first != _MAGIC:
        return first, "pickle"

    storages: dict[str, StorageRecord] = {}

    def storage(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], name, depth)
        kind, key, count = _persistent(pid, name)
        whole = storages.setdefault(key, StorageRecord(key, kind.dtype, count, bytearray))
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return whole
        if not isinstance(view, tuple) or len(view) != 3 or not isinstance(view[1], int) or view[1] < 0:
            raise CheckpointError(f"{name}: an invalid view of storage {key!r}; the file is damaged, download it again")
        return StorageRecord(key, kind.dtype, count, lambda: _bytes_of(whole), shift=view[1])

    unpickle(file, left(), name)  # torch's protocol version
    system = unpickle(file, left(), name)
    if isinstance(system, dict) and not byte_order_fits(bool(system.get("little_endian", True))):
        raise CheckpointError(f"{name}: written on a machine with the other byte order; convert it there")
    content = unpickle(file, left(), name, storages=storage)
    keys = unpickle(file, left(), name)
    for key in keys if isinstance(keys, list) else []:
        record = storages.get(key) if isinstance(key, str) else None
        if record is None:
            raise CheckpointError(f"{name}: a storage that no tensor uses; the file is damaged, download it again")
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * (record.dtype or torch.uint8).itemsize
        if count < record.count or length > left():
            raise CheckpointError(
                f"{name}: storage {record.name!r} claims {count} elements, {record.count} are used and {left()} bytes "
                "are left; the file is truncated or damaged, download it again"
            )
        record._bytes = bytearray(file.read(length))
    return content, "torch-legacy"


def _bytes_of(record: StorageRecord) -> bytearray:
    return record._bytes if record._bytes is not None else bytearray()


def _persistent(pid: Any, name: str) -> tuple[StorageKind, str, int]:
    """Type, key and number of elements of the storage that a persistent id refers to."""
    if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], StorageKind):
        _, kind, key, _, count = pid[:5]
        if isinstance(key, str) and isinstance(count, int) and 0 <= count < 1 << 48:
            return kind, key, count
    raise CheckpointError(f"{name}: an invalid reference to a storage; the file is damaged, download it again")


def _nested(pid: Any) -> bool:
    return isinstance(pid, tuple) and len(pid) == 2 and pid[0] == "nested"


def _inner(data: bytes, name: str, depth: int) -> StorageRecord:
    """A storage stored as a nested torch file, as `pickle.dump` of a tensor writes it."""
    if depth:
        raise UnsafeCheckpointError(f"{name}: torch files nested more than once; refused, nothing was executed")
    read = _torch_zip if data.startswith(b"PK\x03\x04") else _pickles
    content, _ = read(io.BytesIO(data), len(data), name, depth + 1)
    if not isinstance(content, StorageRecord):
        raise UnsafeCheckpointError(f"{name}: a nested torch file without a storage; refused, nothing was executed")
    return content


# ---- containers -----------------------------------------------------------------------------------------------------


def _weights(content: Any, about: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside nested containers; plain values beside it are stored in about["container"]."""
    name = about["path"]
    if isinstance(content, Tensor):
        raise CheckpointError(
            f"{name}: contains a single tensor of shape {tuple(content.shape)}; expected a state dict"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: contains a {type(content).__name__}; expected a state dict")
    if about["format"] == "pickle" and ("blobs" in content or _looks_like_blobs(content)):
        about["layout"] = "caffe2"
        blobs = content.get("blobs", content)
        return {k: v for k, v in blobs.items() if isinstance(v, Tensor) and not k.endswith("_momentum")}
    for _ in range(6):
        inside = next((k for k in WRAPPERS if _holds_tensors(content.get(k))), None)
        if inside is None:
            break
        about["container"].update(_plain_values({k: v for k, v in content.items() if k != inside}))
        about["wrapper"].append(inside)
        content = content[inside]
    return dict(_flat(content, "", 0))


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, dict) or depth == 0:
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(
        _holds_tensors(v, depth - 1) for k, v in value.items() if k in WRAPPERS or depth == 3
    )


def _flat(content: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and depth < 4:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _looks_like_blobs(content: Mapping[Any, Any]) -> bool:
    names = [k for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)]
    return len(names) > 4 and not any("." in k for k in names) and sum(k.endswith(("_w", "_b")) for k in names) > 2


def _plain_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Short values other than tensors: dates, class names, arguments; without optimizer states."""

    def small(value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return value[:100_000]
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth < 4 and isinstance(value, dict) and len(value) <= 2000:
            return {str(k): s for k, v in value.items() if (s := small(v, depth + 1)) is not _DROPPED}
        if depth < 4 and isinstance(value, list | tuple) and len(value) <= 3000:
            return [s for v in value if (s := small(v, depth + 1)) is not _DROPPED]
        return _DROPPED

    return small({k: v for k, v in values.items() if k not in ("optimizer", "optimizer_states", "scheduler")}, 0)


_DROPPED = object()


def _named(state: Mapping[Any, Tensor], about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors without the prefix that all keys have in common, and `about`."""
    named = {str(k): v for k, v in state.items()}
    if not named:
        raise CheckpointError(f"{about['path']}: contains no tensors; pass the file with the weights")
    for prefix in PREFIXES * 2:
        if all(k.startswith(prefix) for k in named):
            named = {k.removeprefix(prefix): v for k, v in named.items()}
    return named, about


# ---- folders --------------------------------------------------------------------------------------------------------

_WHOLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")


def _folder(folder: Path, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON files of a Hugging Face folder."""
    for key, file in (("config", "config.json"), ("preprocessor", "preprocessor_config.json")):
        if (folder / file).is_file():
            about[key] = _json(folder / file)
    about["format"], about["folder"] = "huggingface", str(folder)
    whole = next((folder / name for name in _WHOLE if (folder / name).is_file()), None)
    index = next((folder / f"{name}.index.json" for name in _WHOLE if (folder / f"{name}.index.json").is_file()), None)
    if whole is None and index is not None:
        return _shards(folder, index, about)
    if whole is None:
        weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".pth", ".pt", ".pkl", ".bin")]
        if len(weights) != 1:
            listed = ", ".join(p.name for p in weights[:5])
            reason = f"several files of weights ({listed}); pass one of them" if weights else "no weights"
            expected = "" if weights else "; expected model.safetensors, a sharded index or pytorch_model.bin"
            raise CheckpointError(f"{folder}: the folder contains {reason}{expected}")
        whole = weights[0]
    state, inner = read_state(whole)
    return state, {**inner, **about, "metadata": inner["metadata"], "wrapper": inner["wrapper"]}


def _shards(folder: Path, index: Path, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a folder whose weights are split into several files."""
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index}: no valid 'weight_map' from keys to files; download the folder again")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard or shard in ("..", "."):
            raise UnsafeCheckpointError(f"{index}: refers to {shard!r}, which is outside the folder; refused")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: the file {shard} listed in {index.name} is missing; download it")
        state.update(read_state(folder / shard)[0])
    missing = [k for k in table if k not in state]
    if missing:
        raise CheckpointError(
            f"{folder}: {index.name} lists {len(missing)} keys that no file contains, such as {missing[0]!r}; download "
            "the folder again"
        )
    return _named(state, about)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: invalid JSON ({str(error)[:100]}); download the folder again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
