"""Draws docs/images/results.jpg: detections on images that were not used in training.

Both networks are small and are trained from random weights on a CPU, in about ten minutes each on two cores:

    maskwright demo -o demo
    maskwright train mask-rcnn --data NUCLEI -o nuclei \
        --option backbone=resnet18 backbone.width=32 neck_width=64 'proposals.anchor_sizes=[16,24,40,64,128]' \
        'proposals.before=[400,300]' 'proposals.after=[128,100]' boxes.width=256 masks.convs=2 masks.width=64 \
        --augment 'size=[192,192]' 'jitter=[1.5,4.0]' --short 192 --long 192 \
        --steps 600 --batch 4 --lr 1e-3 --warmup 50 --ema 0.99
    python docs/images/results.py --scenes demo/run/best.safetensors --nuclei nuclei/best.safetensors --images FILE ...

NUCLEI is a folder with images of the 2018 Data Science Bowl (BBBC038, released under CC0) and their annotations in COCO
format. FILE ... are images of its validation part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import maskwright as mw
from maskwright.data import Scenes

SIDE = 192  # pixels of a generated scene, as in the demo
WIDTH, GAP = 1160, 8  # pixels of the picture, and between images
SCALE = 2  # images are enlarged before drawing, so that contours are fine


def drawn(
    image: np.ndarray, system: mw.System, stretch: bool, style: dict[str, object], **options: object
) -> Image.Image:
    """The enlarged image with its detections over it; `stretch` increases the contrast, for drawing only."""
    found = mw.predict(system, image, **options).instances
    height, width = image.shape[:2]
    place = mw.Placement.identity((height, width)).then_resize((SCALE * height, SCALE * width))
    large = Image.fromarray(image).resize((SCALE * width, SCALE * height), Image.Resampling.LANCZOS)
    if stretch:
        large = ImageOps.autocontrast(large, cutoff=0.5)
    return found.place(place).draw(large, system.classes, **style)


def row(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side, scaled to the picture's width."""
    space = WIDTH - GAP * (len(images) - 1)
    height = round(space / sum(image.width / image.height for image in images))
    canvas, x = Image.new("RGB", (WIDTH, height), "white"), 0
    for image in images:
        image = image.resize((round(height * image.width / image.height), height), Image.Resampling.LANCZOS)
        canvas.paste(image, (x, 0))
        x += image.width + GAP
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, metavar="WEIGHTS")
    parser.add_argument("--indices", type=int, nargs="+", default=[6, 8, 9, 10], help="which of the scenes")
    parser.add_argument("--nuclei", type=Path, required=True, metavar="WEIGHTS")
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.jpg"))
    given = parser.parse_args()

    system = mw.load(given.scenes)
    data = Scenes(max(given.indices) + 1, (SIDE, SIDE), seed=1000, classes=system.classes, difficulty=0.2)
    scenes = [data[index].image.permute(1, 2, 0).numpy() for index in given.indices]
    labelled = {"boxes": False, "scores": False, "alpha": 0.6}
    options = {"score_threshold": given.threshold, "nms_threshold": 0.3}
    rows = [row([drawn(image, system, False, labelled, **options) for image in scenes])]

    system = mw.load(given.nuclei)
    nuclei = [np.asarray(Image.open(path).convert("RGB")) for path in given.images]
    plain = {"boxes": False, "labels": False}
    options = {"score_threshold": given.threshold, "tile": SIDE // 2, "overlap": 0.3}
    rows.append(row([drawn(image, system, True, plain, **options) for image in nuclei]))

    picture = Image.new("RGB", (WIDTH, sum(each.height for each in rows) + GAP * (len(rows) - 1)), "white")
    y = 0
    for each in rows:
        picture.paste(each, (0, y))
        y += each.height + GAP
    picture.save(given.out, quality=85, optimize=True)


if __name__ == "__main__":
    main()
