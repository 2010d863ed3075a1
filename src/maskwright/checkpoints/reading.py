"""Reading of checkpoint files in all supported formats as flat state dicts. Code in the files is never executed."""

from __future__ import annotations

import io
import json
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.checkpoints.budget import Budget, shown, unexpected_as_errors
from maskwright.checkpoints.checksums import verify
from maskwright.checkpoints.containers import named, weights_in
from maskwright.checkpoints.foreign import foreign_zip, refuse_foreign
from maskwright.checkpoints.mxnet import MARK as MXNET_MARK
from maskwright.checkpoints.mxnet import read_mxnet
from maskwright.checkpoints.records import StorageRecord
from maskwright.checkpoints.torch7 import MARKS, read_torch7
from maskwright.checkpoints.unpickling import StorageKind, byte_order_fits, settle, unpickle
from maskwright.errors import CheckpointError, UnsafeCheckpointError

BLOAT = 20  # maximum ratio of the unpacked size of a zip file to its own; torch stores weights uncompressed
HEADER = 100 << 20  # maximum size of a safetensors header in bytes, as in the safetensors library


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors of a checkpoint file.

    Supported are safetensors, both formats of `torch.save`, zip archives of one such file, Torch 7, MXNet, pickles of
    arrays (detectron2, Caffe2) and Hugging Face folders. In nested containers the averaged weights are preferred, then
    the usual names (`containers.WRAPPERS`). A prefix such as "module." that all keys have is removed.

    Args:
        path: A file or a folder.

    Returns:
        The tensors by name, on the CPU, and a description of the file with the keys

        - "path"; "format": "safetensors", "torch", "torch-legacy", "torch7", "mxnet", "pickle" or "huggingface";
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
    with unexpected_as_errors(path):
        return _read(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    name = str(path)
    about: dict[str, Any] = {"path": name, "wrapper": []}
    about |= {part: {} for part in ("metadata", "config", "preprocessor", "container")}
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _folder(path, about)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name}: not a regular file but a device, socket or pipe; pass the path of a file")
        return _file(path, about)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{name}: no such file; check the path") from None
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error}); check the file") from None
    except ValueError as error:
        if "null" in str(error):  # an embedded null byte
            raise CheckpointError(f"{shown(name)!r}: not a valid path; check the path") from None
        raise


# ---- recognising the format by content; file names are unreliable ---------------------------------------------------


def check_readable(path: Path, suffix: str) -> None:
    """Raise a CheckpointError unless a file can be read whole.

    Args:
        path: The file.
        suffix: The suffix that its name will have.
    """
    with unexpected_as_errors(path):
        _file(path, {"path": str(path), "wrapper": [], "metadata": {}, "container": {}}, suffix)


def _file(path: Path, about: dict[str, Any], suffix: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of any format, and its description."""
    name = str(path)
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(512)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{name}: the file is empty; download it again")
        if _is_safetensors(head):
            state, metadata = _safetensors(path, size, int.from_bytes(head[:8], "little"))
            return named(state, about | {"format": "safetensors", "metadata": metadata})
        budget = Budget.for_size(name, size)
        content, about["format"] = _content(file, head, path, budget, suffix)
        content = settle(content, budget)
    return named(weights_in(content, about, budget), about)


def _content(file: io.BufferedIOBase, head: bytes, path: Path, budget: Budget, suffix: str | None) -> tuple[Any, str]:
    """The content of a file as records, and its format."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _torch_zip(file, budget)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return _pickles(file, budget)
    if head.startswith(MARKS):
        return read_torch7(file.read(), budget), "torch7"
    if head.startswith(MXNET_MARK):
        return read_mxnet(file.read(), budget), "mxnet"
    refuse_foreign(head, path)
    if (path.suffix if suffix is None else suffix).lower() in (".pkl", ".pickle", ".pth", ".pt", ".bin", ".ckpt"):
        return _pickles(file, budget)  # pickle protocols 0 and 1 have no signature
    raise CheckpointError(
        f"{path}: unsupported file format; expected .safetensors, a torch file (.pth, .pt, .bin), a pickle of arrays "
        "(.pkl) or a Hugging Face folder"
    )


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 9 and head[8:].lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") <= HEADER


# ---- formats --------------------------------------------------------------------------------------------------------


def _safetensors(path: Path, size: int, header: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file in the format safetensors."""
    from safetensors import SafetensorError, safe_open

    if header + 8 > size:
        raise CheckpointError(
            f"{path}: the header claims {header} bytes, the file has {size}; it is truncated, download it again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Tensor] = {k: file.get_tensor(k) for k in list(file.keys())}
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: the safetensors content is truncated or damaged ({shown(error, 160)}); download the file again"
        ) from None
    verify(state, metadata, str(path))
    return state, metadata


def _torch_zip(file: io.BufferedIOBase, budget: Budget, depth: int = 0) -> tuple[Any, str]:
    """The content of a file in the zip format of `torch.save`."""
    name, size = budget.path, _left(file)
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{name}: truncated or damaged ({shown(error)}); download the file again") from None
    claimed = sum(info.file_size for info in entries.values())
    if claimed > BLOAT * size + (1 << 20):
        raise CheckpointError(
            f"{name}: claims to unpack to {claimed} bytes from {size}, more than {BLOAT} times; not read, torch does "
            "not write such files"
        )
    if not depth and claimed > size:  # compressed
        larger = Budget.for_size(name, claimed)
        budget.nodes, budget.bytes = larger.nodes, larger.bytes
    odd = [k for k, info in entries.items() if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    if odd:
        raise CheckpointError(
            f"{name}: entry {shown(odd[0])!r} of the zip file has an unsupported compression; save the file with torch"
        )

    def read(key: str) -> bytes:
        if key not in entries:
            raise CheckpointError(f"{name}: entry {shown(key)!r} is missing; the file is damaged, download it again")
        try:
            return archive.read(entries[key])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{name}: entry {shown(key)!r} is damaged ({shown(error)}); download the file again"
            ) from None

    roots = [key[: -len("data.pkl")] for key in entries if re.fullmatch(r"[^/]+/data\.pkl", key)]
    if len(roots) != 1:
        packed = _packed(list(entries))
        data = b"" if roots or depth or packed is None else read(packed)
        if data.startswith((b"PK\x03\x04", b"\x80")):
            inner = _torch_zip if data.startswith(b"PK") else _pickles
            return inner(io.BytesIO(data), budget, depth + 1)
        raise CheckpointError(f"{name}: {foreign_zip(list(entries))}")
    root = roots[0]
    if f"{root}constants.pkl" in entries or any(key.startswith(f"{root}code/") for key in entries):
        raise UnsafeCheckpointError(
            f"{name}: a TorchScript program, which can only be used by executing it; refused, nothing was executed. "
            "Save the state dict only"
        )

    if f"{root}byteorder" in entries and not byte_order_fits(read(f"{root}byteorder").strip() == b"little"):
        raise CheckpointError(f"{name}: written on a machine with the other byte order; convert it there")
    storages: dict[str, StorageRecord] = {}

    def storage(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], budget, depth)
        kind, key, count = _persistent(pid, name)
        if key not in storages:
            storages[key] = StorageRecord(key, kind.dtype, count, lambda: bytearray(read(f"{root}data/{key}")))
        return storages[key]

    pickled = read(f"{root}data.pkl")
    return unpickle(io.BytesIO(pickled), len(pickled), name, storage, budget), "torch"


def _packed(names: list[str]) -> str | None:
    """The only file in a zip archive, if its name is that of a checkpoint; besides what archivers of macOS add."""
    files = [n for n in names if not n.endswith(("/", ".DS_Store")) and not n.startswith("__MACOSX/")]
    return files[0] if len(files) == 1 and files[0].lower().endswith((".pt", ".pth", ".pkl", ".bin")) else None


_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's format before 1.6


def _left(file: io.BufferedIOBase) -> int:
    """The number of bytes after the position of `file`."""
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(here)
    return end - here


def _pickles(file: io.BufferedIOBase, budget: Budget, depth: int = 0) -> tuple[Any, str]:
    """The content of a pickle of arrays, or of a file in the older format of `torch.save`."""
    name, size = budget.path, file.tell() + _left(file)

    def left() -> int:
        return size - file.tell()

    def read(storages: Callable[[Any], StorageRecord] | None = None) -> Any:
        return unpickle(file, left(), name, storages, budget)

    def only_nested(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], budget, depth)
        raise UnsafeCheckpointError(
            f"{name}: the pickle refers to objects outside the file; refused, nothing was executed"
        )

    first = read(only_nested)
    if not isinstance(first, int) or first != _MAGIC:
        return first, "pickle"

    storages: dict[str, StorageRecord] = {}

    def storage(pid: Any) -> StorageRecord:
        if _nested(pid):
            return _inner(pid[1], budget, depth)
        kind, key, count = _persistent(pid, name)
        whole = storages.setdefault(key, StorageRecord(key, kind.dtype, count, bytearray))
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return whole
        if not isinstance(view, tuple) or len(view) != 3 or not isinstance(view[1], int) or view[1] < 0:
            raise CheckpointError(f"{name}: an invalid view of storage {key!r}; the file is damaged, download it again")
        return StorageRecord(key, kind.dtype, count, lambda: _bytes_of(whole), shift=view[1])

    read()  # torch's protocol version
    system = read()
    if isinstance(system, dict) and not byte_order_fits(bool(system.get("little_endian", True))):
        raise CheckpointError(f"{name}: written on a machine with the other byte order; convert it there")
    content = read(storage)
    keys = read()
    for key in keys if isinstance(keys, list) else []:
        record = storages.get(key) if isinstance(key, str) else None
        if record is None:
            raise CheckpointError(f"{name}: a storage that no tensor uses; the file is damaged, download it again")
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * (record.dtype or torch.uint8).itemsize
        if not record.count <= count or length > left():
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


def _inner(data: bytes, budget: Budget, depth: int) -> StorageRecord:
    """A storage stored as a nested torch file, as `pickle.dump` of a tensor writes it."""
    name = budget.path
    if depth:
        raise UnsafeCheckpointError(f"{name}: torch files nested more than once; refused, nothing was executed")
    read = _torch_zip if data.startswith(b"PK\x03\x04") else _pickles
    content, _ = read(io.BytesIO(data), budget, depth + 1)
    if not isinstance(content, StorageRecord):
        raise UnsafeCheckpointError(f"{name}: a nested torch file without a storage; refused, nothing was executed")
    return content


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
    state, inner = _file(whole, {**about, "path": str(whole), "wrapper": []})
    return state, {**inner, **about, "metadata": inner["metadata"], "wrapper": inner["wrapper"]}


def _shards(folder: Path, index: Path, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a folder whose weights are split into several files."""
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index}: no valid 'weight_map' from keys to files; download the folder again")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(table.values())):
        if Path(shard).name != shard or shard in ("..", ".") or "\\" in shard or "\0" in shard:
            raise UnsafeCheckpointError(f"{index}: refers to {shown(shard)!r}, which is outside the folder; refused")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: the file {shown(shard)} listed in {index.name} is missing; download it")
        state.update(_file(folder / shard, {"path": str(folder / shard), "wrapper": [], "container": {}})[0])
    missing = [k for k in table if k not in state]
    if missing:
        raise CheckpointError(
            f"{folder}: {index.name} lists {len(missing)} keys that no file contains, such as {shown(missing[0])!r}; "
            "download "
            "the folder again"
        )
    return named(state, about)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: invalid JSON ({str(error)[:100]}); download the folder again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
