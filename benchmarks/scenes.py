"""Does every system learn: all of them on the same generated scenes with the same budget, beside Mask R-CNN.

    python benchmarks/scenes.py                                # the small preset of every system
    python benchmarks/scenes.py mask-rcnn-small solov2-small --steps 1000 --draw drawn/
    python benchmarks/scenes.py mask2former-small --data FOLDER --size 160   # images: its train and val part
    python benchmarks/scenes.py panoptic-fpn-small --stuff     # the background is divided; PQ is measured too
    python benchmarks/scenes.py eomt-small --data FOLDER --size 64 --jitter 3 6 --tile 64   # windows of them
    python benchmarks/scenes.py --data FOLDER --pretrained scenes --json rows.json   # from installed weights; continues

Every network is a system's small preset with half of ResNet-18's channels and a narrow neck, from random weights, at
the same input size, with the same images in the same order (Keypoint R-CNN: figures
with keypoints), the same number of steps, AdamW with the same schedule.
What differs is the system, and its learning rate where `--rates` says so. With `--pretrained` the networks are the
small presets as they are, and start with what fits of installed weights: for most the same backbone. AP is measured on
images that none has seen, and average recall of what finds objects without classes.
A system that needs longer than the budget shows less than it can: this is a test of losses, targets and decoding, not a
ranking.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import maskwright as mw
from benchmarks.narrow import narrow
from maskwright.data import Scenes, open_dataset
from maskwright.files import write_json
from maskwright.options import nested
from maskwright.systems import ProposalSystem, presets, system_class
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.training.pretrained import fitting_weights

RECALLS = ("segm/AR10", "segm/AR100")
MEASURES = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50", "keypoints/AP", "keypoints/AP50")
QUALITIES = ("panoptic/PQ", "panoptic/PQth", "panoptic/PQst")
CLASSES = ("disc", "ring", "star", "box")


def small_presets() -> list[str]:
    """The small preset of every system that finds objects without prompts."""
    return [
        name for name, system in presets().items()
        if name == f"{system}-small" and not issubclass(system_class(system), PromptableSystem)
    ]  # fmt: skip


def learn(
    preset: str, data: Path | None, steps: int, batch: int, size: int, rate: float, seed: int, draw: Path | None,
    recall: bool, scenes: dict[str, Any], counts: tuple[int, int], workers: int, changes: dict[str, Any],
    given: dict[str, Any], tiles: dict[str, Any], pretrained: str | None,
) -> dict[str, Any]:  # fmt: skip
    keypoints = preset.startswith("keypoint")  # it learns figures and their keypoints; shapes are what they hide behind
    if data is None:
        drawn = {"size": (size, size), "keypoints": keypoints, **scenes}
        train, unseen = Scenes(counts[0], seed=seed, **drawn), Scenes(counts[1], seed=seed + 1000, **drawn)
    else:
        train, unseen = (open_dataset(data, part) for part in ("train", "val"))
    kind = system_class(presets()[preset])
    options = given if pretrained else kind.with_options(narrow(preset), given)
    fitting = None
    if pretrained:
        fitting = fitting_weights(mw.create(preset, classes=train.classes, **options), pretrained)
    start, begun = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = mw.train(
            preset, train, val=False, out=Path(folder) / "run", recipe="small", steps=steps, batch=batch, lr=rate,
            short=(size,), long=size if data is None else 2 * size, seed=seed,
            workers=workers, tensorboard=False, options=options, pretrained=fitting, **changes,
        )  # fmt: skip
        system = mw.load(best)
    seconds, clock = time.process_time() - start, time.perf_counter() - begun
    proposing = isinstance(system, ProposalSystem)  # it knows no classes: recall is its measure
    summary: dict[str, float] = {}
    if not proposing:
        summary |= mw.evaluate(system, unseen, examples=0, **tiles).summary
    if scenes["stuff"]:
        summary |= mw.evaluate(system, unseen, task="panoptic", examples=0).summary
    if recall or proposing:
        # For AR@10 what is the same object has to be suppressed, also where a system publishes its windows as they are.
        once: dict[str, Any] = {"nms_threshold": 0.7} if proposing else {}
        summary |= mw.evaluate(system, unseen, task="proposals", detections=100, examples=0, **once).summary
    row: dict[str, Any] = {"system": preset, "lr": rate, "CPU seconds": round(seconds), "seconds": round(clock)}
    if pretrained:
        row["from"] = fitting or "random values"
    row |= {
        k: round(100 * float(summary[k]), 1)
        for k in (*MEASURES, *QUALITIES, *RECALLS * (recall or proposing))
        if k in summary
    }
    row["parameters / 1e6"] = round(sum(p.numel() for p in system.parameters()) / 1e6, 1)
    if draw is not None:
        draw.mkdir(parents=True, exist_ok=True)
        for index in range(3):
            few = {"nms_threshold": 0.5, "detections": 8} if proposing else {}
            found = system.predict(unseen[index].image, score_threshold=0.3, **few, **tiles)
            found.save(draw / f"{preset}-{index}.png")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help="default: every system's small preset")
    parser.add_argument("--data", type=Path, help="a data set to learn instead of scenes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--size", type=int, default=128, help="side of the square scenes and of the input; of images, the short one"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rates", nargs="*", default=[], metavar="PRESET=LR", help="other rates for some")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recall", action="store_true", help="average recall too, whatever the class; proposals alone have it"
    )
    parser.add_argument("--scenes", type=int, default=400, help="how many there are to learn from")
    parser.add_argument("--unseen", type=int, default=60, help="how many to measure on")
    parser.add_argument("--shapes", nargs="*", default=CLASSES, help="the classes of the scenes")
    parser.add_argument("--difficulty", type=float, default=0.5, help="of the scenes, 0 ... 1")
    parser.add_argument("--stuff", action="store_true", help="scenes with stuff, for panoptic systems: PQ too")
    parser.add_argument(
        "--decode", action="append", default=[], metavar="NAME=VALUE", help="of the decoding when measured"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw them")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument(
        "--jitter", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="learn from windows of --size in images that were fitted into it and scaled by a factor between these",
    )  # fmt: skip
    parser.add_argument("--tile", type=int, help="measure and draw in tiles of so many pixels, 40 %% in common")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the system; VALUE in JSON"
    )
    parser.add_argument("--pretrained", help="start from installed weights: scenes, or a name; whole presets")
    parser.add_argument("--amp", help="numbers to learn in: bf16")
    parser.add_argument("--draw", type=Path, help="write drawn images there")
    parser.add_argument(
        "--json", type=Path, help="write the figures there too; presets that it has with the same options are omitted"
    )
    arguments = parser.parse_args()
    rates = {name: float(value) for name, value in (pair.split("=") for pair in arguments.rates)}
    given = nested((name, json.loads(value)) for name, value in (pair.split("=", 1) for pair in arguments.option))
    changes: dict[str, Any] = {"warmup": arguments.warmup, "ema": arguments.ema}
    if arguments.amp:
        changes["amp"] = arguments.amp
    if arguments.jitter:
        changes["augment"] = {"flip": 0.5, "jitter": arguments.jitter, "size": arguments.size}
    tiles = {"tile": arguments.tile, "overlap": 0.4} if arguments.tile else {}
    tiles |= {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.decode)}
    scenes = {"classes": tuple(arguments.shapes), "difficulty": arguments.difficulty, "stuff": arguments.stuff}
    counts = (arguments.scenes, arguments.unseen)
    options = {k: v for k, v in vars(arguments).items() if k not in ("json", "draw", "data", "presets")}
    options["data"] = None if arguments.data is None else arguments.data.name
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text("utf-8"))
        if before["options"] != json.loads(json.dumps(options)):
            parser.error(f"{arguments.json}: made with other options; name another file")
        rows = before["rows"]
    for preset in arguments.presets or small_presets():
        if any(row["system"] == preset for row in rows):
            continue
        rate = rates.get(preset, arguments.lr)
        row = learn(
            preset, arguments.data, arguments.steps, arguments.batch, arguments.size, rate, arguments.seed,
            arguments.draw, arguments.recall, scenes, counts, arguments.workers, changes, given, tiles,
            arguments.pretrained,
        )  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.json:
            write_json(arguments.json, {"torch": torch.__version__, "options": options, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
