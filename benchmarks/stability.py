"""Are one-stage systems more stable through time: YOLACT beside Mask R-CNN, trained on the same generated scenes.

    python benchmarks/stability.py                                    # generated clips only
    python benchmarks/stability.py --clips DAVIS --split full_masks   # and clips of a data set
    python benchmarks/stability.py --weights a.safetensors b.safetensors

The claim of YOLACT's paper (Bolya et al., 2019, arXiv 1904.02689, "Temporal Stability"): its masks are more stable
because they do not inherit the jitter of boxes. Both systems are narrow small presets, as in `scenes.py`, trained for
the same number of steps on single scenes, and never on a clip. Measured are, for objects that are found in two
consecutive frames, the IoU of their masks before and after the motion of the annotated object is compensated, the same
of the annotations, and the share of objects that are found in one of the two frames only (see `evaluation.stability`),
beside AP, because a system that finds only what is easy looks stable. Clips of photographs show objects that neither
system was trained on: their figures are those of whatever is found, without regard to classes.
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
from maskwright.data import Clips, MovingScenes, Scenes, open_dataset
from maskwright.inference.evaluating_clips import evaluate_clips
from maskwright.systems import presets, system_class

CLASSES = ("disc", "ring", "star", "box")
PRESETS = ("yolact-small", "mask-rcnn-small")


def learned(preset: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """Weights of a narrow system after training on scenes."""
    size = arguments.size
    options = system_class(presets()[preset]).with_options(narrow(preset), {})
    return mw.train(
        preset, Scenes(arguments.scenes, size=(size, size), classes=CLASSES, seed=arguments.seed), val=False,
        out=folder / preset, recipe="small", steps=arguments.steps, batch=arguments.batch, lr=arguments.lr,
        short=(size,), long=size, seed=arguments.seed, workers=0, tensorboard=False, options=options,
        warmup=50, ema=0.99,
    )  # fmt: skip


def measured(system: Any, clips: Clips, threshold: float) -> dict[str, float | None]:
    result = evaluate_clips(system, clips, stability_threshold=threshold)
    wanted = ("HOTA", "IDF1", "MOTA", "J&F", "AP")
    values = {name: result[name] for name in wanted if name in result.summary}
    values |= {name: value for name, value in result.summary.items() if name.startswith("stability/")}
    undefined = {name for name, value in values.items() if value == -1}  # nothing was found in two consecutive frames
    return {
        name.removeprefix("stability/"): None if name in undefined else round(100 * value, 1)
        for name, value in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=f"default: {' '.join(PRESETS)}")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="trained systems instead of presets")
    parser.add_argument("--clips", help="a data set of clips, in addition to generated ones")
    parser.add_argument("--split", default="val")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="side of scenes and generated clips")
    parser.add_argument("--scenes", type=int, default=400, help="number of scenes to learn from")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=20, help="number of generated clips")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--difficulty", type=float, default=0.5)
    parser.add_argument("--threshold", type=float, nargs="*", default=[0.3, 0.5], help="lowest scores that count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the trained weights")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    side = (arguments.size, arguments.size)
    sets: dict[str, Clips] = {
        "generated": MovingScenes(
            arguments.count, arguments.frames, side, arguments.seed + 1000, CLASSES, arguments.difficulty
        )
    }
    if arguments.clips:
        opened = open_dataset(arguments.clips, arguments.split)
        assert isinstance(opened, Clips)
        sets[opened.name] = opened
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for source in arguments.weights or arguments.presets or PRESETS:
            begun = time.perf_counter()
            system = mw.load(source if isinstance(source, Path) else learned(source, arguments, folder))
            unseen = Scenes(60, size=side, classes=CLASSES, seed=arguments.seed + 1000)
            ap = round(100 * mw.evaluate(system, unseen, examples=0).summary["segm/AP"], 1)
            for name, clips in sets.items():
                for threshold in arguments.threshold:
                    row = {"system": str(source), "clips": name, "scores from": threshold, "mask AP of scenes": ap}
                    rows.append({**row, **measured(system, clips, threshold)})
                    print(json.dumps(rows[-1]), flush=True)
            print(f"{source}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    if arguments.json:
        options = {k: v for k, v in vars(arguments).items() if k not in ("json", "weights", "keep", "clips")}
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "options": options, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
