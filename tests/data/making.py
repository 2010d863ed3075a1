"""Small data sets on disk, intact and damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(os.environ.get("MASKWRIGHT_SHARED", Path(__file__).parents[2] / "../shared")) / "data"

SIZE = (40, 60)  # H, W
SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]
OTHER = [35.0, 20.0, 55.0, 20.0, 55.0, 35.0, 35.0, 35.0]


def shared(part: str) -> Path:
    """A folder of the larger test data, which is not part of the repository."""
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"{part} of the shared test data is missing; set MASKWRIGHT_SHARED to its folder")
    return path


def pixels(height: int = SIZE[0], width: int = SIZE[1], seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: smooth, so that JPEG preserves it, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x * 255 / max(1, width - 1), y * 255 / max(1, height - 1), 40.0 + 0 * x + 20 * seed], -1)
    return ramp.clip(0, 255).astype(np.uint8)


def content(images: int = 1, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """Two objects of two classes on each image; categories 3 and 90."""
    entries, annotations = [], []
    for number in range(1, images + 1):
        entries.append({"id": number, "file_name": f"{number}.png", "height": size[0], "width": size[1]})
        for ring, category in ((SQUARE, 3), (OTHER, 90)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "segmentation": [list(ring)],
                    "area": (ring[2] - ring[0]) * (ring[5] - ring[1]),
                    "bbox": [ring[0], ring[1], ring[2] - ring[0], ring[5] - ring[1]],
                    "iscrowd": 0,
                }
            )
    return {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cup"}, {"id": 90, "name": "spoon"}],
    }


def write(folder: Path, data: Any, split: str = "train", sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """Write the images that `data` lists and the JSON file, whose path is returned."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    for entry in data.get("images", ()) if isinstance(data, dict) else ():
        name = entry.get("file_name")
        if isinstance(name, str) and "/" not in name and "\\" not in name:
            size = (sizes or {}).get(name, SIZE)
            Image.fromarray(pixels(*size)).save(folder / split / name)
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(data), "utf-8")
    return path
