"""Files of single predictions and streams of COCO records; every file is written atomically."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from maskwright.errors import DataError, UsageError
from maskwright.files import AtomicFile, write_bytes, write_errors_as, write_json
from maskwright.inference.naming import mark_options
from maskwright.inference.seams import PlacedObjects
from maskwright.structures import Instances, Masks, Panoptic, runs

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}

_LARGEST = 65_535  # maximum number of objects that 16 bits can distinguish


class RecordStream:
    """A JSON array that is written record by record and appears under its name when it is closed.

    The records of a run are not held in memory. Until `close`, an existing file stays unchanged.

    Args:
        path: The file. Missing folders are created.

    Attributes:
        path: The file.
        count: Number of records added so far.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._file: AtomicFile | None = None
        self._ended = False

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records.

        Args:
            records: Dicts that JSON can represent.

        Raises:
            DataError: If the file cannot be written. Nothing of it remains then.
        """
        texts = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
        start = ",\n" if self.count and texts else ""
        self._write((start + ",\n".join(texts)).encode())  # at once: an interruption does not divide them
        self.count += len(texts)

    def close(self, path: Path | None = None) -> None:
        """Complete the file; an empty array if nothing was added. No effect after `abandon` or a failure.

        Args:
            path: Where the file appears instead, in the same folder.

        Raises:
            DataError: If the file cannot be written.
        """
        if not self._ended:
            self._write(b"]\n")
            self._ended = True
            assert self._file is not None
            self._file.path = path or self.path
            self._file.commit()

    def position(self) -> tuple[int, int]:
        """The place after the records so far, for `rewind`."""
        return self.count, 0 if self._file is None else self._file.file.tell()

    def rewind(self, position: tuple[int, int]) -> None:
        """Remove the records that were added after a `position`.

        Raises:
            DataError: If the file cannot be written.
        """
        self.count, place = position
        if self._file is not None:
            with write_errors_as(DataError, self.path, self._file.part):
                self._file.file.seek(place or 1)  # after the bracket
                self._file.file.truncate()

    def abandon(self) -> None:
        """Remove what was written, unless the stream has been closed."""
        if not self._ended and self._file is not None:
            self._file.discard()
        self._ended = True

    def _write(self, data: bytes) -> None:
        """Append bytes; the file is created at the first call."""
        try:
            if self._file is None:
                self._file = AtomicFile(self.path, DataError)
                self._file.write(b"[")
            self._file.write(data)
        except BaseException:
            self.abandon()
            raise


def coco_records(
    objects: PlacedObjects, image_id: int | str, category_ids: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Return COCO result records of objects of an image of any size.

    Args:
        objects: The objects.
        image_id: Id of the image.
        category_ids: Category id of each label; None: label + 1.

    Returns:
        The records of `Instances.to_coco`. COCO's tools count pixels with 32 bits; masks of images that have more are
        those of the tightest window, which "window" gives: x, y, width and height.
    """
    height, width = objects.size
    if height * width < 1 << 32 or objects.masks is None:
        return objects.instances().to_coco(image_id, category_ids)
    records = replace(objects, masks=None).instances().to_coco(image_id, category_ids)
    for record, (starts, ends) in zip(records, objects.masks, strict=True):
        x0, y0, x1, y1 = runs.frame(starts, ends, height)
        size = (y1 - y0, x1 - x0)
        moved = [runs.moved(v, height, -x0, -y0, size[0]) for v in (starts, ends)]
        counts = runs.encoded([moved[0]], [moved[1]], size)[0].decode("ascii")
        record["segmentation"] = {"size": list(size), "counts": counts}
        record["window"] = [x0, y0, size[1], size[0]]
    return records


def write_image(path: Path, image: Image, *, sync: bool = True) -> Path:
    """Write an image in the format that its suffix names.

    Args:
        path: The file: .jpg, .png, .webp, .bmp or .tif. Missing folders are created.
        image: The image.
        sync: Flush the data to disk before the file appears.

    Returns:
        The path.

    Raises:
        UsageError: If the suffix is unknown.
        DataError: If the file cannot be written.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(
            f"{path}: the file name must end in one of {', '.join(_FORMATS)} for an image, or in .json or .npz for the "
            "objects"
        )
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}), **mark_options(path.suffix))
    return write_bytes(path, data.getvalue(), DataError, sync=sync)


def save_objects(objects: Instances, path: Path, classes: Sequence[str] = (), image: Path | None = None) -> Path:
    """Write the objects of one image.

    Args:
        objects: The objects.
        path: The file. A name that ends in .json gives a COCO document with "images", "categories" and "annotations"
            (category_id = label + 1). Any other gives an .npz file with the arrays boxes, labels, scores, keypoints,
            ids, size, classes and counts (one compressed run-length string per mask), for `load_objects`.
        classes: The class names.
        image: The image's file; the COCO document has its name.

    Returns:
        The path.

    Raises:
        DataError: If the file cannot be written.
    """
    if path.suffix.lower() == ".json":
        return write_json(path, coco_document(objects, classes, _name_of(image)), DataError)
    arrays = {name: getattr(objects, name) for name in ("boxes", "labels", "scores", "keypoints", "ids")}
    values = {name: value.detach().cpu().numpy() for name, value in arrays.items() if value is not None}
    if objects.masks is not None:
        texts = [code["counts"] for code in objects.masks.rle()]
        values["counts"] = np.array(texts, dtype=bytes) if texts else np.zeros(0, "S1")
    data = io.BytesIO()
    np.savez_compressed(
        data, size=np.array(objects.image_size), classes=np.array(list(classes), dtype=np.str_), **values
    )
    return write_bytes(path, data.getvalue(), DataError)


def coco_document(objects: Instances, classes: Sequence[str], name: str) -> dict[str, Any]:
    """Return the objects of one image as a COCO document.

    Args:
        objects: The objects.
        classes: The class names; category_id = label + 1.
        name: The image's file name.

    Returns:
        "images", "categories" and "annotations"; the latter have scores.
    """
    height, width = objects.image_size
    return {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        "annotations": [{"id": n + 1, **r} for n, r in enumerate(objects.to_coco(1))],
    }


def save_panoptic(
    panoptic: Panoptic, path: Path, classes: Sequence[str], stuff: Sequence[str], image: Path | None = None
) -> Path:
    """Write the segments of one image as a COCO panoptic document, and their map as a PNG of the same name.

    Args:
        panoptic: The segments.
        path: The JSON file. Missing folders are created.
        classes: The class names.
        stuff: Those of them that are stuff.
        image: The image's file.

    Returns:
        The path.

    Raises:
        UsageError: If the map would replace the image.
        DataError: If a file cannot be written.
    """
    height, width = panoptic.image_size
    map_path = path.with_suffix(".png")
    if image is not None and map_path.absolute() == image.absolute():
        raise UsageError(f"{path}: its map, {map_path}, would replace the image; choose another name or folder")
    document = {
        "images": [{"id": 1, "file_name": _name_of(image), "height": height, "width": width}],
        "categories": [{"id": k + 1, "name": n, "isthing": int(n not in stuff)} for k, n in enumerate(classes)],
        "annotations": [panoptic.to_coco(1, file_name=f"{path.stem}.png")],
    }
    write_image(map_path, panoptic.to_png())
    return write_json(path, document, DataError)


def _name_of(image: Path | None) -> str:
    """The file name without its folder, as in COCO."""
    return "" if image is None else image.name


def load_objects(path: str | Path) -> tuple[Instances, tuple[str, ...]]:
    """Read an .npz file that `save_objects` wrote.

    Args:
        path: The file.

    Returns:
        The objects and the class names.

    Raises:
        DataError: If the file is missing or of another kind.
    """
    import torch

    try:
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, npt.NDArray[Any]] = {name: file[name] for name in file.files}
        size = (int(values["size"][0]), int(values["size"][1]))
        tensors: dict[str, torch.Tensor] = {}
        for name in ("boxes", "labels", "scores", "keypoints", "ids"):
            if name in values:
                tensors[name] = torch.from_numpy(values[name])  # pyright: ignore[reportUnknownMemberType] - not typed by torch
        masks = Masks.from_rle(values["counts"].tolist(), size) if "counts" in values else None
        return Instances(size, masks=masks, **tensors), tuple(values["classes"].tolist())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except Exception as error:  # readers of zip files and arrays raise many kinds for invalid data
        raise DataError(
            f"{path}: not a file of objects ({error}); expected an .npz file written by `Prediction.save`"
        ) from None


def label_plane(instances: Instances) -> np.ndarray:
    """Return the objects as a label image.

    Args:
        instances: The objects, best first; only the first 65,535 fit.

    Returns:
        (H, W) uint16: number of the best object at each pixel, from 1; 0 for background.
    """
    plane = np.zeros(instances.image_size, dtype=np.uint16)
    if instances.masks is not None:
        # Worst objects first, so that better ones overwrite them; a few at a time to bound memory.
        for end in range(min(len(instances), _LARGEST), 0, -256):
            start = max(0, end - 256)
            frames, crops = instances.masks[slice(start, end)].crops()
            windows = cast(list[list[int]], cast(Any, frames).tolist())
            for number, (x0, y0, x1, y1) in reversed(list(enumerate(windows))):
                plane[y0:y1, x0:x1][crops[number].numpy()] = start + number + 1
    return plane
