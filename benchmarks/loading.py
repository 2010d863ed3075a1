"""How fast images become batches: read, augmented, resized, normalised and padded, with their targets.

    python benchmarks/loading.py DATA --short 400 800      # a folder in COCO layout
    python benchmarks/loading.py                           # generated scenes
    python benchmarks/loading.py DATA --workers 2

Images per second of wall time, and per second of this process where it has no workers; batches of 4, mirrored at
random. A first pass over a few batches is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

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
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
