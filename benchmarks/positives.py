"""How many samples train an output in a short training: where they are few, little may be learnt in one.

    python benchmarks/positives.py DATA --size 160 --images 600
    python benchmarks/positives.py DATA --presets yolact-small --option anchors.square=false --option anchors.octaves=3

Of SOLO, the channel of a cell is trained on the objects whose centres it contains, and of Decoupled SOLO that of a row
or column. (SOLOv2 computes masks from kernels that one convolution predicts for all cells.) A sample is a cell that an
object of one image is assigned to, and images are counted as often as a training of so many sees them, without
augmentation. Of YOLACT, YOLACT++ and TensorMask: the mean number of anchors (or windows) that are assigned to an
object, and the share of objects that have one alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maskwright as mw
from maskwright.data import Dataset, open_dataset
from maskwright.options import nested
from maskwright.systems.families import solo_grid
from maskwright.systems.solo import MASK_STRIDES, DecoupledSOLO
from maskwright.systems.tensormask import TensorMask

PRESETS = ("solo-small", "decoupled-solo-small", "yolact-small", "yolact-plus-small", "tensormask-small")


def of_channels(system: Any, dataset: Dataset, images: int) -> dict[str, Any]:
    """How often the mask channels of SOLO are trained."""
    grids = system.cells.grids
    hits = [torch.zeros(grid * grid) for grid in grids]
    for sample in dataset:
        _, placement = system.preprocess.apply(sample.image)
        target = sample.target.place(placement)
        objects = solo_grid.read_objects(target, placement.size, MASK_STRIDES, torch.device("cpu"), inclusive=True)
        levels = solo_grid.assign(objects, placement.size, system.cells)
        for hit, positives, grid in zip(hits, levels, grids, strict=True):
            hit[positives.unique(grid * grid).cells] += 1
    planes = [hit.view(grid, grid) for hit, grid in zip(hits, grids, strict=True)]
    if isinstance(system, DecoupledSOLO):
        values = torch.cat([sums for plane in planes for sums in (plane.sum(0), plane.sum(1))])
    else:
        values = torch.cat([plane.flatten() for plane in planes])
    used = images / len(dataset) * values[values > 0]
    return {
        "channels": len(values), "never trained": round(1 - len(used) / len(values), 2),
        "samples of the others, median": float(used.median()),
    }  # fmt: skip


@torch.no_grad()
def of_objects(system: Any, dataset: Dataset) -> dict[str, Any]:
    """How many anchors or windows are assigned to an object."""
    counts: list[Tensor] = []
    for sample in dataset:
        batch = system.preprocess.collate([sample.image])
        target = sample.target.place(batch.placements[0])
        if target.crowd is not None:
            target = target[~target.crowd]
        raw = system(batch.images)
        if isinstance(system, TensorMask):
            owners = system.assign(system.layout(raw), target).owners
        else:
            relative = target.boxes / target.boxes.new_tensor(raw.size).flip(0).repeat(2)
            matched = system.assign(system.anchors(raw), replace(target, boxes=relative), relative[:0])[1]
            owners = matched[matched >= 0]
        counts.append(torch.bincount(owners, minlength=len(target)))
    joined = torch.cat(counts)
    return {
        "per object": round(float(joined.float().mean()), 1),
        "objects with one": round(float((joined <= 1).float().mean()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--size", type=int, default=160, help="short side of the input")
    parser.add_argument("--images", type=int, default=600, help="images of the training: steps x batch")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the systems, in JSON")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.data, "train")
    options = nested((name, json.loads(value)) for name, value in (pair.split("=", 1) for pair in arguments.option))
    for preset in arguments.presets:
        size = {"short": arguments.size}
        if not preset.startswith("yolact"):  # which stretches images to a square
            size["long"] = 2 * arguments.size
        system: Any = mw.create(preset, classes=dataset.classes, resize=size, **options).eval()
        grids = hasattr(system, "cells")
        counted = of_channels(system, dataset, arguments.images) if grids else of_objects(system, dataset)
        print(json.dumps({"system": preset, **counted}), flush=True)


if __name__ == "__main__":
    main()
