"""What weights that ship are worth: fine-tuned from them beside random weights, on real images, with several seeds.

    python benchmarks/transfer.py DATA --out runs/transfer                       # again: continues
    python benchmarks/transfer.py DATA --out runs/transfer --weights mask-rcnn-scenes --data pedestrians --seeds 0
    python benchmarks/transfer.py DATA --out runs/transfer --arms scenes random --steps 300
    python benchmarks/transfer.py --out runs/transfer --table                    # the table of what is finished

DATA is a folder of data sets in COCO layout, each with a train and a val part. Three arms are trained with the same
network, recipe, images and order of images:

    scenes   from the weights
    random   from random weights, as many steps
    total    from random weights, with the compute of the pretraining too: so many more steps as have as many input
             pixels as the pretraining had; once, for the largest number of steps

OUT/DATA-ARM-STEPS-SEED.json is the result of a run; finished runs are not repeated, interrupted ones continue;
their checkpoints are removed. Use another OUT for other weights or options. The table has mask AP in percent: means,
and standard errors over the seeds; differences are those of pairs with the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import maskwright as mw
from benchmarks.pretraining import RECIPES, keep_to
from maskwright.checkpoints import read_metadata
from maskwright.checkpoints.shipping import find_shipped, fitting
from maskwright.data import Dataset, Renamed, open_dataset
from maskwright.errors import UsageError
from maskwright.files import write_json
from maskwright.structures import Preprocess

ARMS = ("scenes", "random", "total")
SETS: Mapping[str, tuple[str, ...] | None] = {  # and the classes that are learnt; None: all
    "pedestrians": None, "balloons": None, "nuclei": None, "fruits-nuts": None, "coco-mini": ("person",),
}  # fmt: skip
SHORT = {"nuclei": 224}  # short side of the input, unless --short is given; of the other sets 160
MEASURES = ("segm/AP", "segm/AP50", "segm/APs", "segm/APm", "segm/APl", "bbox/AP")


@dataclass(frozen=True)
class Start:
    """The weights to start from.

    Attributes:
        path: The file.
        system: Name of the system.
        options: Options of the network.
        pixels: Input pixels of the pretraining; None if the command in the file is not one of `pretraining.py`.
    """

    path: Path
    system: str
    options: Mapping[str, Any]
    pixels: int | None

    @classmethod
    def read(cls, weights: str | None) -> Start:
        """Reads the header of a file or of installed weights; None: those that find objects."""
        entry = fitting() if weights is None else None if Path(weights).exists() else find_shipped(weights)
        if entry is None and (weights is None or not Path(weights).exists()):
            raise UsageError(f"{weights}: no such file or installed weights")
        path = Path(str(weights)) if entry is None else entry.verified()
        about = read_metadata(path)
        options = {name: value for name, value in about["options"].items() if name not in ("classes", "resize")}
        return cls(path, about["system"], options, _pixels(about))


def _pixels(about: Mapping[str, Any]) -> int | None:
    """Input pixels that the weights of a file were trained on: of all stages, and of the weights they started from."""
    words = str(about["source"].get("command", "")).split()
    words = words[next((place for place, word in enumerate(words) if word.endswith("pretraining.py")), len(words)) :]
    if len(words) < 2 or words[1] not in RECIPES:
        return None
    recipe = RECIPES[words[1]]
    steps = int(words[words.index("--steps") + 1]) if "--steps" in words else recipe.steps
    options = {**recipe.options, **recipe.learning}
    stages = [(options, steps, recipe.changes["batch"])]
    for earlier, (_, changes) in zip(recipe.earlier(steps), recipe.before, strict=True):
        stages.append((options, earlier, changes["batch"]))
    if recipe.then is not None:
        stages.append(({**options, **recipe.then[0]}, recipe.more(steps), recipe.then[2]["batch"]))
    total = 0 if recipe.start is None else Start.read(recipe.start).pixels or 0
    for changed, count, batch in stages:
        size = mw.create(recipe.preset, **changed).preprocess.size(recipe.size, recipe.size)
        total += count * batch * math.prod(size)
    return total


def sets(folder: Path, name: str) -> tuple[Dataset, Dataset]:
    """The images to learn and to measure on."""
    parts = (open_dataset(folder / name, part) for part in ("train", "val"))
    classes = SETS.get(name)
    learn, judge = (part if classes is None else Renamed(part, classes) for part in parts)
    return learn, judge


def default_sets(folder: Path) -> list[str]:
    """Names of the data sets of the benchmarks that a folder has, or else of all that it has."""
    return [name for name in SETS if (folder / name).is_dir()] or sorted(
        path.name for path in folder.glob("*") if (path / "annotations").is_dir()
    )


def mean_pixels(dataset: Dataset, preprocess: Preprocess) -> float:
    """Mean number of input pixels of an image."""
    return statistics.mean(math.prod(preprocess.size(height, width)) for height, width in dataset.sizes())


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str
    arm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.data}-{self.arm}-{self.steps}-{self.seed}"


def train(run: Run, start: Start, folder: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures; continues if it was interrupted."""
    learn, judge = sets(folder, run.data)
    short = SHORT.get(run.data, 160) if arguments.short is None else arguments.short
    size = {"short": (short,), "long": 2 * short}
    steps, batch, place = run.steps, arguments.batch, out / run.name
    if run.arm == "total" and arguments.total_steps is not None:
        steps = arguments.total_steps
    elif run.arm == "total":
        preprocess = mw.create(start.system, **start.options, classes=learn.classes).preprocess.at(short, 2 * short)
        steps += round((start.pixels or 0) / batch / mean_pixels(learn, preprocess))
    begun = time.process_time()
    best = mw.train(
        start.system, learn, val=False, out=place, steps=steps, batch=batch, lr=arguments.lr, weight_decay=0.01,
        clip=10.0, schedule="steps", milestones=(0.8,), warmup=100, ema=None, seed=run.seed, workers=0,
        tensorboard=False, resume=(place / "last.ckpt").exists(), save_minutes=3.0, device=arguments.device,
        amp=arguments.amp, weights=start.path if run.arm == "scenes" else None,
        options={} if run.arm == "scenes" else start.options, **size,
    )  # fmt: skip
    seconds = time.process_time() - begun
    result = mw.evaluate(mw.load(best), judge, device=arguments.device, examples=0, limit=arguments.limit)
    row: dict[str, Any] = {
        "data": run.data, "arm": run.arm, "steps": run.steps, "trained": steps, "seed": run.seed,
        "system": start.system, "weights": start.path.name, "short": short, "batch": batch, "lr": arguments.lr,
        "amp": arguments.amp,
        "CPU seconds since the last start": round(seconds), "torch": torch.__version__, "code": mw.__version__,
    }  # fmt: skip
    row |= {name: round(100 * float(result[name]), 2) for name in MEASURES if name in result.summary}
    write_json(out / f"{run.name}.json", row, indent=1)
    shutil.rmtree(place)
    return row


def table(out: Path) -> str:
    """Mean mask AP of each data set, number of steps and arm, in Markdown."""
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*-*-*-*.json"))]
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for row in rows:
        arms = found.setdefault((row["data"], row["steps"]), {})
        arms.setdefault(row["arm"], {})[row["seed"]] = row["segm/AP"]
    lines = [
        "| data | steps | scenes | random | total | scenes - random | scenes - total |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    order = list(SETS)
    for data, steps in sorted(found, key=lambda key: (order.index(key[0]) if key[0] in order else 99, key)):
        arms = dict(found[data, steps])
        most = max(other for name, other in found if name == data)
        arms.setdefault("total", found[data, most].get("total", {}))
        cells = [spread(list(arms.get(arm, {}).values())) for arm in ARMS]
        first = arms.get("scenes", {})
        for other in ("random", "total"):
            pairs = [value - arms[other][seed] for seed, value in first.items() if seed in arms.get(other, {})]
            cells.append(spread(pairs, "+"))
        lines.append(f"| {data} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error, or nothing."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{sign}.1f}"
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DATA", help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", help="a file, or the name of installed weights; default: those that find objects")
    parser.add_argument(
        "--data", nargs="*", help="names of data sets; default: those of the benchmarks, or else all in DATA"
    )
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, nargs="*", default=(300, 1200))
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--short", type=int, help="short side of the input; default: 160, for nuclei 224")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--amp", default="no", help="numbers to learn in: no (float32) or bf16")
    parser.add_argument("--total-steps", type=int, help="steps of the arm total; default: by input pixels")
    parser.add_argument("--limit", type=int, help="measure on at most so many images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs only")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.folder is None:
            parser.error("DATA is required, unless --table is given")
        start = Start.read(arguments.weights)
        if "total" in arguments.arms and start.pixels is None and arguments.total_steps is None:
            parser.error(
                f"{start.path}: does not state how it was pretrained; add --arms scenes random, or --total-steps"
            )
        names = arguments.data or default_sets(arguments.folder)
        if not names:
            parser.error(f"{arguments.folder}: no folder in it is a data set in COCO layout")
        for data in names:
            sets(arguments.folder, data)  # one that lacks a part fails now, not after hours
        options = {name: getattr(arguments, name) for name in ("batch", "short", "lr", "amp", "limit")}
        keep_to({"weights": start.path.name, **options}, arguments.out / "options.json")
        for seed in arguments.seeds:
            for steps in arguments.steps:
                for data in names:
                    for arm in arguments.arms:
                        if arm == "total" and steps < max(arguments.steps):
                            continue
                        run = Run(data, arm, steps, seed)
                        if not (arguments.out / f"{run.name}.json").exists():
                            row = train(run, start, arguments.folder, arguments.out, arguments)
                            print(json.dumps(row), flush=True)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
