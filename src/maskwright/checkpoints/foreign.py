"""Files that are not checkpoints, recognised by their first bytes, so that the error says what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from maskwright.checkpoints.budget import shown
from maskwright.errors import CheckpointError

_ONNX = (
    "an ONNX model, which contains a computation, not weights by name; pass the checkpoint that it was exported from"
)
_TENSORFLOW = "which is not supported; pass weights of PyTorch (.pth, .safetensors)"
_IMAGE = "an image, not weights; pass the file with the weights (images are the argument of predict)"
_PACKED = "{}; decompress it first"

# First bytes, and what the file is.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (llama.cpp), which is not supported; pass weights of PyTorch (.pth, .safetensors)"),
    (b"\x89HDF", "an HDF5 file (Keras), which is not supported; export it to .safetensors"),
    (b"\x93NUMPY", "a single NumPy array (.npy), not weights by name; pass the file with the weights"),
    (b"\x89PNG", _IMAGE),
    (b"\xff\xd8\xff", _IMAGE),
    (b"GIF8", _IMAGE),
    (b"II*\0", _IMAGE),
    (b"MM\0*", _IMAGE),
    (b"BM", _IMAGE),
    (b"%PDF", "a PDF document, not weights; pass the file with the weights"),
    (b"\x1f\x8b", _PACKED.format("compressed with gzip")),
    (b"BZh", _PACKED.format("compressed with bzip2")),
    (b"\xfd7zXZ", _PACKED.format("compressed with xz")),
    (b"\x28\xb5\x2f\xfd", _PACKED.format("compressed with zstd")),
    (b"\x04\x22\x4d\x18", _PACKED.format("compressed with lz4")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; extract it first"),
    (b"Rar!", "a RAR archive; extract it first"),
    (b"ptrt", "a TensorRT engine, which is not supported; pass the checkpoint that it was built from"),
    (b"ftrt", "a TensorRT engine, which is not supported; pass the checkpoint that it was built from"),
    (b"MATLAB", "a MATLAB file, which is not supported; convert it to .safetensors"),
    (b"\x7fELF", "a program or library, not weights; pass the file with the weights"),
    (b"MZ", "a program or library, not weights; pass the file with the weights"),
    (b"SQLite format", "an SQLite database, not weights; pass the file with the weights"),
    (b"PAR1", "a Parquet table, not weights; pass the file with the weights"),
)
# The first pickles of protocols 0 and 1: a dict, a list, a tuple or a named class.
_PICKLE_0 = re.compile(rb"[(\]}]|c[\w.]+\n")


def refuse_foreign(head: bytes, path: Path) -> None:
    """Raise a CheckpointError that says what a file is, if it is of a common other kind.

    Args:
        head: Its first 512 bytes.
        path: The file.
    """
    kind = _kind(head, path)
    if kind:
        raise CheckpointError(f"{path}: {kind}")


def _kind(head: bytes, path: Path) -> str:
    suffix = path.suffix.lower()
    if not head.strip(b"\0"):
        return "starts with zero bytes only, as an incomplete download does; download it again"
    for start, kind in _SIGNATURES:
        if head.startswith(start):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _IMAGE
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model, {_TENSORFLOW}"
    if head[257:262] == b"ustar":
        return (
            "a tar archive (torch's format of 2016, or an archived folder), which is not supported; extract it, or "
            "load it with an old version of torch and save it again"
        )
    # Both are protocol buffers that begin with a version number: ONNX with its own, then the producer or the graph.
    if head[:1] == b"\x08" and len(head) > 2 and 1 <= head[1] <= 64:
        if suffix == ".pb" or (head[1:3] == b"\x01\x12" and suffix != ".onnx"):
            return f"a TensorFlow model, {_TENSORFLOW}"
        if head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72):
            return _ONNX
    if suffix == ".onnx":
        return _ONNX
    if suffix in (".pb", ".tflite", ".meta", ".index") or ".ckpt.data-" in path.name or ".data-0" in path.name:
        return f"a file of TensorFlow, {_TENSORFLOW}"
    if suffix in (".h5", ".keras"):
        return f"a file of Keras, {_TENSORFLOW}"
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = text.lower()
    if lower.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run: git lfs pull"
    if lower.startswith(b"<?xml") and b"<net" in lower:
        return "an OpenVINO model, which is not supported; pass the checkpoint that it was exported from"
    if lower.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error", b"<body", b"<!--")):
        return "a web page, not weights; an error page or login page was saved instead, download the file again"
    try:
        readable = head.decode().isprintable() or all(c.isprintable() or c in "\t\r\n" for c in head.decode())
    except UnicodeDecodeError as error:
        readable = error.start > len(head) - 4 and error.start > 0  # a character that the end of `head` cuts
    if not readable:
        return ""
    # Pickles of protocol 0 are text too, but have no quotation marks at these places.
    if re.match(rb'[\[{]\s*(["\[{\]}\d-]|$)', text) and b'"' in text and not re.match(rb"\(dp?\d*\n", text):
        return "JSON text, not weights; pass the file with the weights"
    if _PICKLE_0.match(head) or not text:
        return ""
    first = shown(text.split(b"\n")[0].strip().decode("utf-8", "replace"), 60)
    return f"text, not weights ({first}); if it was downloaded, this is an error message of the server"


def foreign_zip(names: Sequence[str]) -> str:
    """What a zip archive without the weights of torch is, as the end of an error message.

    Args:
        names: Its entries.
    """
    if any(name.endswith(("model.weights.h5", "keras_metadata.pb")) for name in names):
        return f"a Keras model, {_TENSORFLOW}"
    if names and all(name.endswith(".npy") for name in names):
        inside = ", ".join(shown(name, 60) for name in sorted(names)[:3])
        return (
            f"a zip archive without torch weights (it contains {inside}), but of NumPy arrays (.npz); save them as "
            ".safetensors"
        )
    if any(name.endswith(("serialized_exported_program.json", "models/model.json")) for name in names):
        return "a program exported by torch.export, which can only be used by executing it; pass the state dict"
    if any(name.endswith((".xml", ".rels")) and ("[Content_Types]" in name or "_rels" in name) for name in names):
        return "an office document, not weights; pass the file with the weights"
    inside = ", ".join(shown(name, 60) for name in sorted(names)[:3]) or "nothing"
    return f"a zip archive without torch weights (it contains {inside}); extract it first"
