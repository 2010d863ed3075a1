"""The effect of point refinement: the same weights evaluated with it and with the coarse masks only.

    python benchmarks/points.py                                    # PointRend on generated scenes
    python benchmarks/points.py mask-rcnn-small solov2-small       # systems that have it as an option
    python benchmarks/points.py --data FOLDER --steps 1500         # own images: its train and val split

Each system is trained once, then evaluated twice. Mask AP hardly changes if an outline is off by a pixel or two;
boundary AP (arXiv 2103.16562) does, so both are shown.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import maskwright as mw
from benchmarks.narrow import narrow
from maskwright.data import Scenes, open_dataset
from maskwright.systems import presets, system_class

CLASSES = ("disc", "ring", "star", "box")
KEYS = ("segm/AP", "segm/AP50", "segm/AP75", "boundary/AP")


def compare(preset: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    size = arguments.size
    if arguments.data:
        train, unseen = (open_dataset(arguments.data, split) for split in ("train", "val"))
    else:
        train, unseen = (
            Scenes(count, size=(size, size), classes=CLASSES, seed=seed) for count, seed in ((400, 0), (60, 1000))
        )
    known = inspect.signature(system_class(presets()[preset]).__init__).parameters
    options = narrow(preset)
    if "points" in known and isinstance(known["points"].default, bool):
        options["points"] = True
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        best = mw.train(
            preset, train, val=False, out=Path(folder) / "run", recipe="small", steps=arguments.steps,
            batch=arguments.batch, lr=arguments.lr, short=(size,), long=arguments.long or size, warmup=50, ema=0.99,
            seed=arguments.seed, workers=0, tensorboard=False, options=options,
        )  # fmt: skip
        system = mw.load(best)
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            mw.save(system, arguments.keep / f"{preset}.safetensors")
    seconds, rows = time.process_time() - start, []
    for refine in (True, False):
        result = mw.evaluate(system, unseen, examples=0, boundary=True, refine=refine)
        row: dict[str, Any] = {"system": preset, "masks": "refined" if refine else "coarse"}
        row |= {k: round(100 * float(result.summary[k]), 1) for k in KEYS if k in result.summary}
        rows.append(row | {"CPU seconds of training": round(seconds)})
        if arguments.draw:
            arguments.draw.mkdir(parents=True, exist_ok=True)
            for index in range(2):
                found = system.predict(unseen[index].image, score_threshold=0.3, refine=refine)
                found.save(arguments.draw / f"{preset}-{index}-{row['masks']}.png")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["pointrend-small"])
    parser.add_argument("--data", help="a data set with a train and a val split; default: generated scenes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="short side of the input, and of the square scenes")
    parser.add_argument("--long", type=int, help="bound of the input's long side; default: as the short one")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", type=Path, help="write drawn images there")
    parser.add_argument("--keep", type=Path, help="write the trained weights there")
    arguments = parser.parse_args()
    for preset in arguments.presets:
        for row in compare(preset, arguments):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
