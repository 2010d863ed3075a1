"""Names of images for runs over many of them: files, folders, globs, Parquet lists, and object storage.

Local images are named by path, others by URL. Names are text, so that they can be divided among processes and stored.
"""

# pyarrow and fsspec have no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false
from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskwright.errors import MissingExtraError, UsageError
from maskwright.inference.sources import SUFFIXES, items

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
COLUMNS = ("image", "path", "url", "uri", "file_name")  # of a Parquet list, the first that it has


def list_images(sources: Sequence[str | Path], recursive: bool = False) -> list[str]:
    """List the images of sources.

    Args:
        sources: Files, folders and globs; URLs of these (``s3://bucket/folder``, through fsspec); and Parquet files
            with a column of names, see `COLUMNS`. Relative names in a local list are relative to its folder.
        recursive: Search subfolders too.

    Returns:
        The names, sorted, each once.

    Raises:
        UsageError: If there are no images, or a list has no column of names.
        MissingExtraError: If pyarrow or fsspec is not installed.
    """
    found: set[str] = set()
    for source in sources:
        text = str(source)
        if text.lower().endswith(".parquet"):
            found |= set(_listed(text))
        elif is_url(text):
            found |= set(_stored(text, recursive))
        else:
            found |= {str(item.path) for item in items(text, recursive)}
    if not found:
        raise UsageError(f"no images in {', '.join(map(str, sources))}")
    return sorted(found)


def is_url(name: str) -> bool:
    """Whether a name is a URL."""
    return _URL.match(name) is not None


def in_shard(name: str, number: int, count: int) -> bool:
    """Whether an image belongs to shard `number` of `count`, from 1. It depends on the name only."""
    value = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(value, "big") % count == number - 1


class StoredImage:
    """A file of a URL, read when its content is needed.

    Args:
        url: The URL.
    """

    def __init__(self, url: str):
        self.url = url

    def read(self) -> bytes:
        """Return the content.

        Raises:
            OSError: If it cannot be read, whatever the storage reports.
        """
        try:
            with _fsspec().open(self.url, "rb") as file:
                return file.read()
        except MissingExtraError:
            raise
        except Exception as error:  # storages raise exceptions of their own
            raise OSError(f"{self.url}: {error or type(error).__name__}") from None


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``"2/8"``: the second of eight shards.

    Raises:
        UsageError: If it is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"`shard` must be NUMBER/COUNT with 1 <= NUMBER <= COUNT, for example 2/8; got {text!r}")
    return int(match[1]), int(match[2])


def _listed(path: str) -> list[str]:
    """The names in a Parquet file."""
    parquet = parquet_library()
    try:
        if is_url(path):
            with _fsspec().open(path, "rb") as file:
                table: Any = parquet.read_table(file)
        else:
            table = parquet.read_table(path, partitioning=None)
    except MissingExtraError:
        raise
    except Exception as error:  # of pyarrow, and of the storage
        raise UsageError(f"{path}: cannot be read as a Parquet list of images ({error})") from None
    column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None:
        raise UsageError(f"{path}: has no column of image names; name it one of {', '.join(COLUMNS)}")
    names: list[Any] = table.column(column).to_pylist()
    wrong = next((n for n, name in enumerate(names) if not isinstance(name, str) or not name), None)
    if wrong is not None:
        raise UsageError(f"{path}: row {wrong} of column {column!r} is not a name: {names[wrong]!r}")
    if is_url(path):
        return names
    folder = Path(path).expanduser().parent
    return [name if is_url(name) else str(folder / name) for name in names]


def _stored(url: str, recursive: bool) -> list[str]:
    """The images at a URL."""
    try:
        system, path = _fsspec().url_to_fs(url)
        if any(sign in path for sign in "*?["):
            names = [name for name in system.glob(path) if system.isfile(name)]
        elif system.isdir(path):
            names = system.find(path, maxdepth=None if recursive else 1)
            names = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
        else:
            return [url]
        return [str(system.unstrip_protocol(name)) for name in names]
    except MissingExtraError:
        raise
    except Exception as error:  # storages raise exceptions of their own
        raise UsageError(f"{url}: cannot be listed ({error or type(error).__name__})") from None


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise MissingExtraError("fsspec", "shards") from None
    return fsspec


def parquet_library() -> Any:
    """The module pyarrow.parquet.

    Raises:
        MissingExtraError: If pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "shards") from None
    return pyarrow.parquet
