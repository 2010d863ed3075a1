"""Files of what was found, each there whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from maskwright.errors import DataError, UsageError
from maskwright.structures import Instances, Masks, Panoptic

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


class RecordStream:
    """A JSON list that is written record by record beside its final place and put there by `close`.

    A run over a hundred thousand images thus holds none of them in memory; one that breaks leaves an earlier file as
    it was.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._beside = _beside(self.path)
        self._file: TextIO | None = None

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        file = self._open()
        for record in records:
            file.write((",\n" if self.count else "") + json.dumps(record, ensure_ascii=False, separators=(",", ":")))
            self.count += 1

    def close(self) -> None:
        """Everything is on disk under the final name; an empty list where nothing was added."""
        try:
            with self._open() as file:
                file.write("]\n")
            self._beside.replace(self.path)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Nothing remains of what was added, unless it was closed before."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the disk is as full as before; that was said already
                self._file.close()
            self._file = None
        self._beside.unlink(missing_ok=True)

    def _open(self) -> TextIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._beside.open("w", encoding="utf-8")
            self._file.write("[")
        return self._file


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes `data` beside `path` and renames. OSError names the path and leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        beside.unlink(missing_ok=True)
    return path


def write_image(path: Path, image: Image) -> Path:
    """An image in the format that its name says: .jpg, .png, .webp, .bmp, .tif."""
    kind = _PICTURES.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"{path}: the name must end in one of {', '.join(_PICTURES)}, or in .json or .npz for the objects"
        )
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))
    return write_bytes(path, data.getvalue())


def save_objects(objects: Instances, path: Path, classes: Sequence[str] = (), image: Path | None = None) -> Path:
    """The objects of one image by themselves.

    .json  COCO records (category_id = label + 1) with the image's size and the categories
    .npz   arrays boxes, labels, scores, keypoints, size, classes, and `counts`, one run-length string per mask;
           nothing in it is pickled. `load_objects` reads it back
    """
    if path.suffix.lower() == ".json":
        height, width = objects.image_size
        document = {
            "images": [{"id": 1, "file_name": _name_of(image), "height": height, "width": width}],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
            "annotations": [{"id": n + 1, **r} for n, r in enumerate(objects.to_coco(1))],
        }
        return write_bytes(path, json.dumps(document, ensure_ascii=False).encode())
    arrays = {name: getattr(objects, name) for name in ("boxes", "labels", "scores", "keypoints")}
    values = {name: value.detach().cpu().numpy() for name, value in arrays.items() if value is not None}
    if objects.masks is not None:
        texts = [code["counts"] for code in objects.masks.rle()]
        values["counts"] = np.array(texts, dtype=bytes) if texts else np.zeros(0, "S1")
    data = io.BytesIO()
    np.savez_compressed(
        data, size=np.array(objects.image_size), classes=np.array(list(classes), dtype=np.str_), **values
    )
    return write_bytes(path, data.getvalue())


def save_panoptic(
    panoptic: Panoptic, path: Path, classes: Sequence[str], stuff: Sequence[str], image: Path | None = None
) -> Path:
    """One divided image as COCO panoptic JSON, and its map as a PNG of the same name beside it. UsageError where that
    is the image itself."""
    height, width = panoptic.image_size
    map_path = path.with_suffix(".png")
    if image is not None and map_path.absolute() == image.absolute():
        raise UsageError(f"{path}: its map would be {map_path}, which is the image; save under another name or folder")
    document = {
        "images": [{"id": 1, "file_name": _name_of(image), "height": height, "width": width}],
        "categories": [{"id": k + 1, "name": n, "isthing": int(n not in stuff)} for k, n in enumerate(classes)],
        "annotations": [panoptic.to_coco(1, file_name=f"{path.stem}.png")],
    }
    write_image(map_path, panoptic.to_png())
    return write_bytes(path, json.dumps(document, ensure_ascii=False).encode())


def _name_of(image: Path | None) -> str:
    """As COCO has it: within the images' folder."""
    return "" if image is None else image.name


def load_objects(path: str | Path) -> tuple[Instances, tuple[str, ...]]:
    """What `save_objects` wrote as .npz: the objects and the class names. DataError names a file that is no such."""
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        size = (int(values["size"][0]), int(values["size"][1]))
        tensors = {n: torch.from_numpy(values[n]) for n in ("boxes", "labels", "scores", "keypoints") if n in values}
        masks = Masks.from_rle(values["counts"].tolist(), size) if "counts" in values else None
        return Instances(size, masks=masks, **tensors), tuple(values["classes"].tolist())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # whatever a zip reader makes of foreign bytes
        raise DataError(
            f"{path}: is no file of objects ({error}); expected an .npz that was saved from a prediction"
        ) from None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")
