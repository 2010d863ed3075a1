"""What was found in images, on disk: drawn images, COCO results, planes of object numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from maskwright.inference.outputs import RecordStream, write_bytes
from maskwright.structures import Instances, Panoptic

Kind = Literal["drawn", "coco", "masks"]
_LARGEST = 65_535  # objects that 16 bits can tell apart


class PredictionWriter:
    """Writes predictions as they come; `close` writes what is about all of them.

    folder/drawn/NAME.jpg     the image with its objects drawn over it
    folder/results.json       COCO results, image_id 1, 2, ... in the order they came, category_id = label + 1
    folder/pictures.json      the "images" and "categories" that those ids mean
    folder/masks/NAME.png     16 bits: 0 background, k the k-th best object, the better one where two overlap

    of images divided among things and `stuff`:
    folder/panoptic.json      instead of results.json: COCO panoptic, whole ("images", "annotations", "categories")
    folder/panoptic/NAME.png  its maps; red + 256 green + 65536 blue is a segment's number
    folder/masks/NAME.png     16 bits: 0 nothing, k the k-th segment; with `semantic`, the pixel's label + 1

    NAME is the image's path from the folder or glob it was named by. Every file is written beside and renamed;
    results.json grows beside its place, so that nothing of a long run is held in memory but the images' names.
    `sources` are what the images were named by; `skipped` collects (path, reason) of those with an error.
    """

    def __init__(
        self,
        folder: str | Path,
        kinds: Collection[Kind],
        classes: Sequence[str],
        sources: Iterable[str | Path] = (),
        stuff: Sequence[str] = (),
        semantic: bool = False,
    ):
        self.folder, self.kinds, self.classes = Path(folder), frozenset(kinds), tuple(classes)
        self.roots = [_root(source) for source in sources]
        self.stuff, self.semantic = tuple(stuff), semantic
        self.divided: list[dict[str, Any]] = []
        self.names: set[str] = set()
        self.images: list[dict[str, Any]] = []
        self.results = RecordStream(self.folder / "results.json")
        self.skipped: list[tuple[str, str]] = []
        self.objects = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: str | Path, found: Instances | Panoptic | None, error: Any = None) -> None:
        """One image's objects or segments; or, where `error` is given, why there are none."""
        if error is not None or found is None:
            self.skipped.append((str(path), str(error)))
            return
        name = self._name(Path(path))
        number = len(self.images) + 1
        height, width = found.image_size
        self.images.append({"id": number, "file_name": str(path), "height": height, "width": width})
        self.objects += len(found)
        if "drawn" in self.kinds:
            self._draw(Path(path), found, self.folder / "drawn" / f"{name}.jpg")
        if isinstance(found, Panoptic):
            self._add_divided(found, name, number)
            return
        if "coco" in self.kinds:
            self.results.add(found.to_coco(number))
        if "masks" in self.kinds:
            _write_plane(_numbers(found), self.folder / "masks" / f"{name}.png")

    def _add_divided(self, found: Panoptic, name: str, number: int) -> None:
        if "coco" in self.kinds:
            self.divided.append(found.to_coco(number, file_name=f"{name}.png"))
            _write_png(found.to_png(), self.folder / "panoptic" / f"{name}.png")
        if "masks" in self.kinds:
            plane = found.semantic() + 1 if self.semantic else found.map()
            _write_plane(plane.numpy().astype(np.uint16), self.folder / "masks" / f"{name}.png")

    def close(self) -> None:
        """Write results.json and pictures.json, or panoptic.json."""
        if self.divided:
            kinds = [{"id": k + 1, "name": n, "isthing": int(n not in self.stuff)} for k, n in enumerate(self.classes)]
            images = [
                {**entry, "file_name": self._inside(Path(entry["file_name"])).as_posix()} for entry in self.images
            ]
            whole = {"images": images, "annotations": self.divided, "categories": kinds}
            write_bytes(self.folder / "panoptic.json", json.dumps(whole, ensure_ascii=False).encode())
            self.results.abandon()
        elif "coco" in self.kinds:
            categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
            about = {"images": self.images, "categories": categories}
            self.results.close()
            write_bytes(self.folder / "pictures.json", json.dumps(about, ensure_ascii=False, indent=1).encode())

    def _draw(self, path: Path, found: Instances | Panoptic, target: Path) -> None:
        from maskwright.data import read_image

        drawn = found.draw(read_image(path), self.classes)
        data = io.BytesIO()
        drawn.convert("RGB").save(data, "JPEG", quality=92)
        write_bytes(target, data.getvalue())

    def _inside(self, path: Path) -> Path:
        """The image's path below the folder, or glob, that it was named by."""
        whole = path.absolute()
        root = max((r for r in self.roots if whole.is_relative_to(r)), key=lambda r: len(r.parts), default=whole.parent)
        return whole.relative_to(root)

    def _name(self, path: Path) -> str:
        """The image's name among the outputs: no two the same, none outside of the folder."""
        inside = self._inside(path)
        # x.jpg and x.png become x and x.png; the same name from two folders gets a number.
        candidates = [str(inside.with_suffix("")), str(inside)]
        name = next((c for c in candidates if c not in self.names), None)
        count = 2
        while name is None:
            numbered = f"{candidates[0]}-{count}"
            name, count = (numbered if numbered not in self.names else None), count + 1
        self.names.add(name)
        return name


def _root(source: str | Path) -> Path:
    """The folder that a file, folder or glob starts from."""
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return path
    parts = path.parts
    fixed = next((k for k, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts) - 1)
    return Path(*parts[: min(fixed, len(parts) - 1)])


def _numbers(instances: Instances) -> np.ndarray:
    """(H, W) uint16: 0, or the number of the best object at a pixel."""
    height, width = instances.image_size
    plane = np.zeros((height, width), dtype=np.uint16)
    masks = instances.masks
    if masks is not None:
        # A few planes at a time, the worst first, so that better ones come to lie on top and memory stays bounded.
        at_once = max(1, (64 << 20) // (height * width))
        last = min(len(instances), _LARGEST)
        for end in range(last, 0, -at_once):
            start = max(0, end - at_once)
            dense = masks[slice(start, end)].dense("cpu")
            any_object, first = dense.any(0), torch.argmax(dense.to(torch.uint8), 0)
            covered = any_object.numpy()
            plane[covered] = (first.numpy()[covered] + start + 1).astype(np.uint16)
    return plane


def _write_plane(plane: np.ndarray, target: Path) -> None:
    from PIL import Image

    _write_png(Image.fromarray(plane), target)


def _write_png(image: Any, target: Path) -> None:
    data = io.BytesIO()
    image.save(data, "PNG")
    write_bytes(target, data.getvalue())
