"""A script that reads files under a memory limit and prints the outcome of each as JSON.

It runs in its own process because some of these inputs crash tools that do not check them. Tests start it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(files: list[str]) -> None:
    torch.set_num_threads(1)
    limit(4 << 30)
    for name in files:
        path, _, images = name.partition("|")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = attempt(Path(path), Path(images) if images else None)
        outcome["warnings"] = [str(w.message) for w in caught]
        print(json.dumps(outcome), flush=True)  # noqa: T201 - read by the tests


def limit(size: int) -> None:
    """Limit the address space, where the system supports it."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def attempt(path: Path, images: Path | None) -> dict[str, Any]:
    from maskwright.data import read_coco, read_image
    from maskwright.errors import MaskwrightError

    try:
        if path.suffix == ".json":
            dataset = read_coco(path, images)
            samples = [dataset[i] for i in range(len(dataset))]
            return {
                "ids": [dataset.annotation_ids(i) for i in range(len(dataset))],
                "images": dataset.image_ids(),
                "classes": dataset.classes,
                "categories": dataset.category_ids,
                "labels": [s.target.labels.tolist() for s in samples],
                "crowd": [s.target.crowd.tolist() for s in samples],
                "areas": [s.target.masks.areas().tolist() for s in samples],
                "boxes": [s.target.boxes.tolist() for s in samples],
                "finite": all(bool(torch.isfinite(s.target.boxes).all()) for s in samples),
            }
        image = read_image(path)
        values = image.float()
        return {
            "shape": list(image.shape),
            "mean": values.mean((1, 2)).tolist(),
            "values": len(np.unique(image.numpy())),
            "corner": values[:, :8, :8].mean().item(),
        }
    except MaskwrightError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main(sys.stdin.read().splitlines())
