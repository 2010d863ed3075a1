"""How well a promptable system segments objects from clicks and boxes, beside what the pixels alone give.

    python benchmarks/clicks.py WEIGHTS DATA [DATA ...]            # folders with annotations; their part val
    python benchmarks/clicks.py WEIGHTS nuclei --objects 200 --json clicks.json

Every object of a data set (crowd regions are left out) is prompted by itself: by its box; by one click, at the pixel
farthest from the object's border; and by three, each further one in the middle of the largest region that is wrong so
far. The figure is the mean of the IoU with the annotation over objects.

The baselines use the image alone. For a box: Otsu's threshold of the grey values in it, whose object is the side that
the box's border has less of; the ellipse in the box; and the box itself. For a click: the connected region of
similar colour around it, with the tolerance that is best on the whole data set, which favours the baseline.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

import maskwright as mw
from maskwright.data import open_dataset
from maskwright.structures import Prompts

TOLERANCES = (8, 16, 24, 32, 48, 64, 96)
CLICKS = 3


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def middle(region: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel of a region that is farthest from its border, which the image's edge is too."""
    away = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(away.argmax()), away.shape)
    return int(row), int(column)


def largest_error(found: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, int], int] | None:
    """The middle of the largest wrong region, and whether it belongs to the object; None if all is right."""
    best: tuple[int, np.ndarray, int] | None = None
    for wrong, label in ((truth & ~found, 1), (found & ~truth, 0)):
        parts, count = ndimage.label(wrong)
        if count:
            sizes = np.bincount(parts.ravel())[1:]
            if best is None or sizes.max() > best[0]:
                best = int(sizes.max()), parts == 1 + int(sizes.argmax()), label
    return None if best is None else (middle(best[1]), best[2])


def otsu(grey: np.ndarray) -> float:
    """Otsu's threshold of 8-bit values."""
    counts = np.bincount(grey.ravel(), minlength=256).astype(float)
    total, below = counts.sum(), counts.cumsum()
    sums = (counts * np.arange(256)).cumsum()
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(np.nan_to_num(between).argmax())


def from_box(grey: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What a box gives without a network."""
    x0, y0, x1, y1 = (int(v) for v in (*np.floor(box[:2]), *np.ceil(box[2:])))
    whole, threshold, ellipse = (np.zeros(size, bool) for _ in range(3))
    whole[y0:y1, x0:x1] = True
    inside = grey[y0:y1, x0:x1]
    bright = inside > otsu(inside)
    border = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    threshold[y0:y1, x0:x1] = ~bright if border.mean() > 0.5 else bright
    rows, columns = np.mgrid[y0:y1, x0:x1]
    across = (columns + 0.5 - (x0 + x1) / 2) / max(0.5, (x1 - x0) / 2)
    down = (rows + 0.5 - (y0 + y1) / 2) / max(0.5, (y1 - y0) / 2)
    ellipse[y0:y1, x0:x1] = across**2 + down**2 <= 1
    return {"box: Otsu": threshold, "box: ellipse": ellipse, "box: itself": whole}


def from_click(image: np.ndarray, place: tuple[int, int]) -> dict[int, np.ndarray]:
    """The connected region around a pixel whose colour differs by at most each tolerance."""
    apart = np.abs(image.astype(int) - image[place].astype(int)).max(-1)
    found = dict[int, np.ndarray]()
    for tolerance in TOLERANCES:
        parts, _ = ndimage.label(apart <= tolerance)
        found[tolerance] = parts == parts[place]
    return found


def objects(data: Any, most: int | None) -> Iterator[tuple[Any, list[int]]]:
    """The images, each with the rows of its objects that are measured: all, or evenly spaced ones of the data set."""
    rows = [
        (index, row)
        for index in range(len(data))
        for row in usable(data[index].target)
    ]  # fmt: skip
    if most is not None and len(rows) > most:
        rows = [rows[int(n)] for n in np.linspace(0, len(rows) - 1, most)]
    for index in dict.fromkeys(index for index, _ in rows):
        yield data[index], [row for own, row in rows if own == index]


def usable(target: Any) -> list[int]:
    """Rows of objects that are no crowd and have at least 16 pixels."""
    areas = target.masks.areas()
    crowd = target.crowd if target.crowd is not None else torch.zeros(len(target), dtype=torch.bool)
    return [row for row in range(len(target)) if not crowd[row] and areas[row] >= 16]


def measure(system: Any, data: Any, most: int | None) -> dict[str, float]:
    """Mean IoU of each kind of prompt and of each baseline."""
    sums: dict[str, list[float]] = {}
    floods: dict[int, list[float]] = {tolerance: [] for tolerance in TOLERANCES}
    for example, rows in objects(data, most):
        image = example.image.permute(1, 2, 0).numpy()[..., :3]
        size = (image.shape[0], image.shape[1])
        grey = (image @ np.array([0.299, 0.587, 0.114]) if image.shape[2] == 3 else image[..., 0]).astype(np.uint8)
        batch = system.preprocess.collate([example.image])
        embedding = system.embed(batch.images, batch.placements)[0]
        chosen = torch.tensor(rows)
        truths = example.target.masks[chosen].dense().numpy()
        boxes = example.target.masks[chosen].boxes()
        no_points = torch.zeros(len(rows), 0, 2), torch.zeros(len(rows), 0, dtype=torch.int64)
        found = system.segment(embedding, Prompts(size, *no_points, boxes=boxes), answers=1).masks.dense().numpy()
        for answer, truth, box in zip(found, truths, boxes.numpy(), strict=True):
            sums.setdefault("box", []).append(iou(answer, truth))
            for name, own in from_box(grey, box, size).items():
                sums.setdefault(name, []).append(iou(own, truth))
        for truth in truths:
            place = middle(truth)
            for tolerance, own in from_click(image, place).items():
                floods[tolerance].append(iou(own, truth))
            points, labels, logits = [place], [1], None
            for count in range(1, CLICKS + 1):
                where = torch.tensor([[[column + 0.5, row + 0.5] for row, column in points]])
                prompt = Prompts(size, where, torch.tensor([labels]), logits=logits)
                answer = system.segment(embedding, prompt)
                mask = answer.masks.dense()[0].numpy()
                if count in (1, CLICKS):
                    sums.setdefault("1 click" if count == 1 else f"{count} clicks", []).append(iou(mask, truth))
                logits, error = answer.logits[:, 0], largest_error(mask, truth)
                if error is not None:
                    points, labels = [*points, error[0]], [*labels, error[1]]
    result = {name: round(float(np.mean(values)), 3) for name, values in sums.items()}
    tolerance, best = max(((t, float(np.mean(v))) for t, v in floods.items()), key=lambda pair: pair[1])
    return result | {f"click: region within {tolerance}": round(best, 3), "objects": len(sums["box"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--split", default="val")
    parser.add_argument("--objects", type=int, help="so many of each data set, evenly spaced; default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    system = mw.load(arguments.weights).eval()
    rows = dict[str, dict[str, float]]()
    for folder in arguments.data:
        start = time.process_time()
        row = measure(system, open_dataset(folder, arguments.split), arguments.objects)
        row["CPU seconds"] = round(time.process_time() - start)
        rows[Path(folder).name] = row
        print(json.dumps({"data": Path(folder).name} | row), flush=True)
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
