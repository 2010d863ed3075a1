"""Embeddings of images on the disk, so that an image is encoded once and not in every session."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch

from maskwright._version import __version__
from maskwright.errors import DataError
from maskwright.files import remove_stale_parts
from maskwright.structures import Embedding

LIMIT = 4 << 30  # bytes


class EmbeddingStore:
    """Embeddings in files named by the system and the content of the image; those that were used last are kept.

    Values are stored with 16 bits where their range allows. May be used from any thread.

    Args:
        folder: Where the files are.
        system: The fingerprint of the system.
        limit: Most bytes of all files, those of other systems included; 0: nothing is stored.
    """

    def __init__(self, folder: Path, system: str, limit: int = LIMIT):
        self.folder, self.limit = folder, limit
        self._own = folder / f"{system}-{__version__}"
        self._lock = threading.Lock()
        self._sizes = OrderedDict[Path, int]()  # least recently used first
        self._total = 0
        found: list[tuple[float, Path, int]] = []
        for path in folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime, path, about.st_size))
        for _, path, size in sorted(found):
            self._note(path, size)
        remove_stale_parts(self._own)

    def get(self, content: str) -> Embedding | None:
        """Return the embedding of an image; None if there is none. A damaged file is removed."""
        path = self._path(content)
        with self._lock:
            if path not in self._sizes:
                return None
            self._sizes.move_to_end(path)
        try:
            embedding = Embedding.load(path)
        except DataError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            with self._lock:
                self._total -= self._sizes.pop(path, 0)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return replace(embedding, tensors={name: value.float() for name, value in embedding.tensors.items()})

    def has(self, content: str) -> bool:
        """Return whether there is an embedding of an image."""
        with self._lock:
            return self._path(content) in self._sizes

    def put(self, content: str, embedding: Embedding) -> bool:
        """Store the embedding of an image; returns whether there was room for it."""
        path = self._path(content)
        try:
            half(embedding).save(path)
            size = path.stat().st_size
        except (DataError, OSError):  # the disk is full: it is computed again when it is needed
            return False
        with self._lock:
            self._note(path, size)
            while self._total > self.limit and self._sizes:
                old, size = self._sizes.popitem(last=False)
                self._total -= size
                with contextlib.suppress(OSError):
                    old.unlink(missing_ok=True)
        return path in self._sizes

    def _note(self, path: Path, size: int) -> None:
        self._total += size - self._sizes.pop(path, 0)
        self._sizes[path] = size

    def _path(self, content: str) -> Path:
        return self._own / f"{content}.safetensors"


def half(embedding: Embedding) -> Embedding:
    """Return an embedding with 16-bit values, unless some exceed their range."""
    largest = max(float(value.abs().max()) for value in embedding.tensors.values())
    return embedding.to(dtype=torch.float16) if largest < 6e4 else embedding
