"""How fast images become batches: read, augmented, resized, normalised and padded, with their targets.

    python benchmarks/loading.py DATA --short 400 800      # a folder in COCO layout
    python benchmarks/loading.py                           # generated scenes
    python benchmarks/loading.py DATA --workers 2
    python benchmarks/loading.py DATA --short 800 --compare --stages

Images per second of wall time, and per second of this process where it has no workers; batches of 4, mirrored at
random. A first pass over a few batches is not counted.

`--compare` reads the same images in two other ways in the same run, with masks as planes of the network's input:
torchvision (decode_image, transforms.v2 on image, boxes and masks of pycocotools) and OpenCV, as Ultralytics does it
(imread, resize, fillPoly of the polygons), if it is installed. `--stages` measures where our time is spent.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from maskwright.data import Augment, Scenes, make_loader, open_dataset
from maskwright.structures import Preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--short", type=int, nargs="+", default=[400])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--stages", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(chosen.data, chosen.split) if chosen.data else Scenes(400, seed=1)
    for short in chosen.short:
        loader = make_loader(
            dataset, Preprocess(short=short, long=short * 5 // 3), batch_size=chosen.batch, training=True,
            augment=Augment(flip=0.5), workers=chosen.workers,
        )  # fmt: skip
        batches, count, epoch = iter(loader), 0, 0
        list(islice(batches, 2))
        wall, own = time.perf_counter(), time.process_time()
        while count < chosen.batches * chosen.batch:
            batch = next(batches, None)
            if batch is None:
                epoch += 1
                loader.set_epoch(epoch)
                batches = iter(loader)
                continue
            count += len(batch.images)
        row = {"data": dataset.name, "short": short, "workers": chosen.workers, "images": count}
        row["per second"] = round(count / (time.perf_counter() - wall), 1)
        if not chosen.workers:
            row["per CPU second"] = round(count / (time.process_time() - own), 1)
        print(json.dumps({"reading": "maskwright", **row}), flush=True)
        if chosen.compare:
            compare(dataset, short, chosen.batches * chosen.batch)
        if chosen.stages:
            stages(dataset, short, chosen.batches * chosen.batch)


def compare(dataset: Any, short: int, count: int) -> None:
    """Images per CPU second of other ways to read the same images; one process, no collation."""
    size = Preprocess(short=short, long=short * 5 // 3).size
    for name, read in (("torchvision", with_torchvision), ("opencv", with_opencv)):
        try:
            read(dataset, 0, size)
        except ImportError:
            print(json.dumps({"reading": name, "skipped": "not installed"}), flush=True)
            continue
        wall, own = time.perf_counter(), time.process_time()
        for number in range(count):
            read(dataset, number % len(dataset), size)
        row = {"reading": name, "data": dataset.name, "short": short, "images": count}
        row["per second"] = round(count / (time.perf_counter() - wall), 1)
        row["per CPU second"] = round(count / (time.process_time() - own), 1)
        print(json.dumps(row), flush=True)


Size = Callable[[int, int], tuple[int, int]]


def with_torchvision(dataset: Any, number: int, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """One image and its masks by torchvision."""
    from torchvision import tv_tensors
    from torchvision.io import decode_image
    from torchvision.transforms.v2 import functional as F

    image = decode_image(str(dataset.paths()[number]), "RGB")
    target = dataset.targets(number)
    height, width = image.shape[1:]
    masks = tv_tensors.Mask(target.masks.dense())
    boxes = tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=(height, width))
    if random.random() < 0.5:
        image, masks, boxes = F.horizontal_flip(image), F.horizontal_flip(masks), F.horizontal_flip(boxes)
    out = list(size(height, width))
    image, masks, boxes = F.resize(image, out, antialias=True), F.resize(masks, out), F.resize(boxes, out)
    return F.normalize(image.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), masks


def with_opencv(dataset: Any, number: int, size: Size) -> tuple[Any, Any]:
    """One image and its masks by OpenCV."""
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    image = cv2.imread(str(dataset.paths()[number]))
    height, width = image.shape[:2]
    rows, columns = size(height, width)
    image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    flip = random.random() < 0.5
    if flip:
        image = image[:, ::-1]
    scale = np.array([columns / width, rows / height])
    polygons = dataset.targets(number).masks.polygons()
    masks = np.zeros((len(polygons), rows, columns), np.uint8)
    for plane, rings in zip(masks, polygons, strict=True):
        for ring in rings:
            points = ring * scale
            if flip:
                points[:, 0] = columns - points[:, 0]
            cv2.fillPoly(plane, [points.astype(np.int32)], 1)
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)), masks


def stages(dataset: Any, short: int, count: int) -> None:
    """CPU milliseconds of an image by stage: decoding, targets, resizing the image, placing masks."""
    from maskwright.data.images import read_image

    preprocess = Preprocess(short=short, long=short * 5 // 3)
    spent = {"decode": 0.0, "targets": 0.0, "resize and normalise": 0.0, "masks": 0.0}
    for number in range(count):
        number %= len(dataset)
        start = time.process_time()
        path = dataset.paths()[number]
        image = read_image(path) if path is not None else dataset[number].image
        decoded = time.process_time()
        target = dataset.targets(number)
        listed = time.process_time()
        _, placement = preprocess.apply(image)
        resized = time.process_time()
        placed = target.place(placement)
        if placed.masks is not None:
            placed.masks.pack()
        end = time.process_time()
        for name, part in zip(
            spent, (decoded - start, listed - decoded, resized - listed, end - resized), strict=True
        ):  # fmt: skip
            spent[name] += part
    row = {f"{name} ms": round(1000 * value / count, 2) for name, value in spent.items()}
    print(json.dumps({"stages": dataset.name, "short": short, **row}), flush=True)


if __name__ == "__main__":
    main()
