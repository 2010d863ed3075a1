"""Predictions of many images as Parquet files, written so that a killed run continues and no image occurs twice.

A part is a Parquet file with the predictions of some images, named by its content. It appears complete or not at all,
so that the parts of a folder tell which images are done; an image is never divided among parts.
"""

# pyarrow has no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false
from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskwright.errors import DataError, UsageError
from maskwright.files import remove_stale_parts, write_bytes, write_json
from maskwright.inference.listing import parquet_library
from maskwright.locks import FolderLock
from maskwright.structures import Instances

MANIFEST = "_manifest.json"  # libraries that read folders of Parquet files ignore names that begin so
PER_PART = 500  # images
MOST_BYTES = 64 << 20  # of the tables of a part
_KEY = b"maskwright"


class PartFolder:
    """A folder of parts, which one process at a time writes.

    Columns, one row for each object and one for an image without objects, whose other columns are null then:

        image       name: a path or URL
        width       of the image in pixels
        height      of the image in pixels
        label       number of the class
        class       its name
        score       of the object
        box         x0, y0, x1, y1 in pixels
        rle         COCO's compressed run lengths of the mask, for size [height, width]; null without masks

    Unreadable images have no rows; the part that counts them and the manifest list them with the reason.

    Args:
        folder: The folder; created if missing.
        about: What predictions depend on, as JSON: weights and options. Parts of other ones are refused.
        per_part: Images of a part.

    Attributes:
        done: Names of the images that parts contain.
        objects: Number of objects in all parts.
        skipped: Names of unreadable images, with the reasons.

    Raises:
        UsageError: If another process writes into the folder, or it has parts that do not belong to the run.
        DataError: If a part is damaged, or a file cannot be written.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], per_part: int = PER_PART):
        parquet_library()
        self.folder, self.per_part = Path(folder), per_part
        self._about = json.loads(json.dumps(about))
        self.done: set[str] = set()
        self.objects = 0
        self.skipped: list[tuple[str, str]] = []
        self._parts: list[dict[str, Any]] = []
        self._clear()
        self._lock = FolderLock(self.folder, "predict", "another process writes predictions here", DataError)
        try:
            remove_stale_parts(self.folder)
            for path in sorted(self.folder.glob("part-*.parquet")):
                self._register(path)
        except BaseException:
            self._lock.release()
            raise

    def add(self, name: str, table: Any, error: str | None = None) -> None:
        """Add an image; it is stored with the next part.

        Args:
            name: Its name. An image that is done is ignored: a cluster may predict one again after a failure.
            table: Its rows, see `rows`; None if it could not be read.
            error: Why it could not be read.
        """
        name = stored_name(name)
        if name in self.done:
            return
        self.done.add(name)
        if table is None:
            self._new_skipped.append((name, error or "cannot be read"))
        else:
            self._tables.append(table)
            self._bytes += table.nbytes
        if len(self._tables) + len(self._new_skipped) >= self.per_part or self._bytes > MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the images that were added since the last part."""
        import pyarrow

        if not self._tables and not self._new_skipped:
            return
        table = pyarrow.concat_tables(self._tables) if self._tables else schema().empty_table()
        about = {"about": self._about, "images": len(self._tables), "skipped": self._new_skipped}
        table = table.replace_schema_metadata({_KEY: json.dumps(about)})
        data = io.BytesIO()
        parquet_library().write_table(table, data, compression="zstd")
        content = data.getvalue()
        path = self.folder / f"part-{hashlib.sha256(content).hexdigest()[:24]}.parquet"
        write_bytes(path, content, DataError)
        self._count(path, len(self._tables), table, self._new_skipped)
        self._clear()

    def close(self) -> None:
        """Write the last part and the manifest."""
        try:
            self.flush()
            manifest = {
                "images": len(self.done),
                "objects": self.objects,
                "parts": sorted(self._parts, key=lambda part: part["file"]),
                "damaged": [{"image": name, "reason": reason} for name, reason in sorted(self.skipped)],
                "about": self._about,
            }
            write_json(self.folder / MANIFEST, manifest, DataError, indent=1)
        finally:
            self._lock.release()

    def __enter__(self) -> PartFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.flush()  # what has been predicted is not lost
        finally:
            self._lock.release()

    def _clear(self) -> None:
        self._tables: list[Any] = []
        self._new_skipped: list[tuple[str, str]] = []
        self._bytes = 0

    def _register(self, path: Path) -> None:
        """Take over a part of an earlier run."""
        try:
            table = parquet_library().read_table(path, columns=["image", "label"], partitioning=None)
            about: Any = json.loads((table.schema.metadata or {})[_KEY])
            skipped = [(str(name), str(reason)) for name, reason in about["skipped"]]
        except Exception as error:  # of pyarrow, for damaged files
            raise DataError(f"{path}: is not a complete part of a run ({error}); remove it, and run again") from None
        if about["about"] != self._about:
            differs = [key for key in self._about if about["about"].get(key) != self._about[key]]
            raise UsageError(
                f"{self.folder}: has predictions of other {' and '.join(differs) or 'options'}; give another folder, "
                "or remove it"
            )
        names: list[str] = table.column("image").unique().to_pylist()
        self.done |= set(names) | {name for name, _ in skipped}
        self._count(path, len(names), table, skipped)

    def _count(self, path: Path, images: int, table: Any, skipped: Sequence[tuple[str, str]]) -> None:
        objects = table.num_rows - table.column("label").null_count
        self.objects += objects
        self.skipped += skipped
        self._parts.append({"file": path.name, "images": images, "objects": objects, "damaged": len(skipped)})


def stored_name(name: str) -> str:
    """The name of an image in parts: bytes of file names that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def schema() -> Any:
    """The columns of parts."""
    import pyarrow as pa

    return pa.schema(
        [
            ("image", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("label", pa.int32()),
            ("class", pa.string()),
            ("score", pa.float32()),
            ("box", pa.list_(pa.float32(), 4)),
            ("rle", pa.string()),
        ]
    )


def rows(name: str, objects: Instances, classes: Sequence[str]) -> Any:
    """The rows of an image.

    Args:
        name: Its name.
        objects: Its objects, on the host.
        classes: Class names.

    Returns:
        A pyarrow table with the columns of `schema`.
    """
    import pyarrow as pa

    count, (height, width) = max(1, len(objects)), objects.image_size
    nothing: list[Any] = [None]
    labels: list[Any] = objects.labels.tolist() or nothing
    masks = objects.masks
    columns: dict[str, list[Any]] = {
        "image": [stored_name(name)] * count,
        "width": [width] * count,
        "height": [height] * count,
        "label": labels,
        "class": [None if label is None else classes[label] for label in labels],
        "score": nothing * count if objects.scores is None or not len(objects) else objects.scores.tolist(),
        "box": objects.boxes.tolist() or nothing,
        "rle": nothing * count if masks is None or not len(masks) else [c["counts"].decode() for c in masks.rle()],
    }
    return pa.table(columns, schema=schema())


def packed(table: Any) -> bytes:
    """A table as bytes, to send to another process."""
    import pyarrow as pa

    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def unpacked(data: bytes) -> Any:
    """The table that `packed` has packed."""
    import pyarrow as pa

    return pa.ipc.open_stream(data).read_all()
