"""Draws docs/images/results.jpg: detections on images that were not used in training.

The networks are small and trained from random weights on a CPU, which takes about ten to thirty minutes each:

    maskwright demo -o demo --epochs 6
    python docs/images/results.py --train-figures figures
    maskwright train mask-rcnn-small --data NUCLEI -o nuclei \
        --augment 'size=[192,192]' 'jitter=[1.5,4.0]' --short 192 --long 192 --steps 1500 --batch 4 --lr 1e-3
    python docs/images/results.py --scenes demo/run/best.safetensors --figures figures/best.safetensors \
        --nuclei nuclei/best.safetensors --nuclei-images NUCLEI/val/FIRST.jpg NUCLEI/val/SECOND.jpg

NUCLEI is a folder with images of the 2018 Data Science Bowl (BBBC038, public domain, CC0) and their annotations in COCO
format.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import maskwright as mw
from maskwright.data import Scenes

SIDE = 192  # pixels of a generated scene
WIDTH = 1160  # pixels of the picture
GAP = 8
FIGURES = {"size": (SIDE, SIDE), "classes": ("disc", "star"), "keypoints": True, "difficulty": 0.2}


def train_figures(out: Path) -> None:
    """Trains a small Keypoint R-CNN on generated figures with keypoints."""
    mw.train(
        "keypoint-rcnn-small", Scenes(600, seed=0, **FIGURES), val=False, out=out, steps=900, batch=4, lr=1e-3,
        short=(SIDE,), long=SIDE, workers=0,
    )  # fmt: skip


def drawn(system: mw.System, image: np.ndarray, height: int, threshold: float, **options: object) -> Image.Image:
    """The image with its detections, enlarged to `height` before drawing so that contours are fine."""
    prediction = mw.predict(system, image, score_threshold=threshold, **options)
    size = (round(image.shape[0] * height / image.shape[0]), round(image.shape[1] * height / image.shape[0]))
    placement = mw.Placement.identity(image.shape[:2]).then_resize(size)
    large = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return prediction.instances.place(placement).draw(large, system.classes, boxes=False, scores=False, alpha=0.6)


def row(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side, scaled to the picture's width."""
    space = WIDTH - GAP * (len(images) - 1)
    height = round(space / sum(image.width / image.height for image in images))
    resized = [
        image.resize((round(height * image.width / image.height), height), Image.Resampling.LANCZOS) for image in images
    ]
    canvas, x = Image.new("RGB", (WIDTH, height), "white"), 0
    for image in resized:
        canvas.paste(image, (x, 0))
        x += image.width + GAP
    return canvas


def scenes(weights: Path, data: Scenes, indices: Sequence[int], threshold: float) -> Image.Image:
    """A row of generated scenes with their detections."""
    system = mw.load(weights)
    images = [data[index].image.permute(1, 2, 0).numpy() for index in indices]
    return row([drawn(system, image, 2 * SIDE, threshold, nms_threshold=0.3) for image in images])


def nuclei(weights: Path, paths: Sequence[Path], threshold: float) -> Image.Image:
    """A row of microscopy images with their detections; contrast is stretched for drawing only."""
    system, result = mw.load(weights), []
    for path in paths:
        image = Image.open(path).convert("RGB")
        found = mw.predict(system, path, score_threshold=threshold, tile=96, overlap=0.3).instances
        size = (2 * image.height, 2 * image.width)
        large = ImageOps.autocontrast(image.resize((size[1], size[0]), Image.Resampling.LANCZOS), cutoff=0.5)
        place = mw.Placement.identity((image.height, image.width)).then_resize(size)
        result.append(found.place(place).draw(large, system.classes, labels=False, boxes=False, alpha=0.5))
    return row(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-figures", type=Path, metavar="OUT")
    parser.add_argument("--scenes", type=Path, metavar="WEIGHTS")
    parser.add_argument("--figures", type=Path, metavar="WEIGHTS")
    parser.add_argument("--nuclei", type=Path, metavar="WEIGHTS")
    parser.add_argument("--nuclei-images", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--indices", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jpg"))
    given = parser.parse_args()
    if given.train_figures:
        train_figures(given.train_figures)
        return
    rows = []
    if given.scenes:
        data = Scenes(20, (SIDE, SIDE), seed=1000, classes=("disc", "ring", "star", "box"), difficulty=0.2)
        rows.append(scenes(given.scenes, data, given.indices, given.threshold))
    if given.figures:
        rows.append(scenes(given.figures, Scenes(20, seed=1000, **FIGURES), given.indices, given.threshold))
    if given.nuclei:
        rows.append(nuclei(given.nuclei, given.nuclei_images, given.threshold))
    picture = Image.new("RGB", (WIDTH, sum(r.height for r in rows) + GAP * (len(rows) - 1)), "white")
    y = 0
    for each in rows:
        picture.paste(each, (0, y))
        y += each.height + GAP
    picture.save(given.out, quality=85, optimize=True)


if __name__ == "__main__":
    main()
