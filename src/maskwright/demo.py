"""The main job from end to end, offline on the CPU: generated scenes, a small Mask R-CNN, numbers, drawings, a page."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from maskwright.errors import UsageError
from maskwright.terminal import progress, say

CLASSES = ("disc", "ring", "star", "box")
SIDE = 192  # pixels of a scene

# A Mask R-CNN cut down to what two CPU cores learn in minutes: half the channels of ResNet-18, trained from scratch and
# therefore with group normalisation, anchors for small images, and as many proposals as such scenes need.
OPTIONS: dict[str, Any] = {
    "backbone": {"name": "resnet18", "width": 32, "norm": "group"},
    "resize": {"short": SIDE, "long": SIDE},
    "neck_width": 64,
    "proposals": {"anchor_sizes": (16, 32, 64, 96, 128), "before": (200, 100), "after": (64, 50)},
    "boxes": {"width": 256},
    "masks": {"convs": 2, "width": 64},
}

# What training does with them; whatever is not said is the `small` recipe.
RECIPE: dict[str, Any] = {
    "batch": 8,
    "lr": 1e-3,
    "warmup": 50,
    "ema": 0.99,
    "workers": 0,
    "device": "cpu",
    "log_every": 10,
    "val_every": 1_000_000,  # once, at the end: measuring takes a tenth of an epoch's time
    "val_max_images": 40,
    "tensorboard": False,
}


def run(out: Path, *, seed: int = 0, epochs: int = 5, images: int = 560, unseen: int = 60) -> Path:
    """Everything under `out`, and the path of the report page.

    out/scenes/          train, val and test: the data set, in the format that one's own takes
    out/run/             the training run: best.safetensors, log.csv, result.json
    out/found/           unseen scenes with what was found in them
    out/report.html      numbers, curves, best and worst images
    """
    # Threads that wait sleep instead of spinning. On idle cores that costs a fifth of a step's time; on cores that are
    # busy with something else as well, spinning makes a step ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from maskwright.checkpoints import load
    from maskwright.data import Scenes, open_dataset
    from maskwright.evaluation import report
    from maskwright.inference import evaluate, predict
    from maskwright.inference.writer import PredictionWriter
    from maskwright.training import train

    _make_room(out)
    began = time.monotonic()
    say(f"1/5  drawing {images + 2 * unseen} scenes: {out / 'scenes'}")
    parts = (("train", images, 0), ("val", unseen, 1), ("test", unseen, 2))
    for split, count, part in progress(parts, "scenes"):
        scenes = Scenes(count, (SIDE, SIDE), seed=3 * seed + part, classes=CLASSES, difficulty=0.2, empty=0.02)
        scenes.write(out / "scenes", split)

    say(f"2/5  training a small Mask R-CNN on the CPU for {epochs} epochs: {out / 'run'}")
    torch.manual_seed(seed)
    best = train("mask-rcnn", out / "scenes", out=out / "run", options=OPTIONS, epochs=epochs, seed=seed, **RECIPE)

    system = load(best)
    say(f"3/5  measuring on {unseen} scenes it was not trained on")
    result = evaluate(system, open_dataset(out / "scenes", "val"), batch=8, device="cpu")
    result.title = "maskwright demo"
    result.save(out / "run" / "result.json")
    say(str(result))

    say(f"4/5  segmenting {unseen} more scenes: {out / 'found' / 'drawn'}")
    source = out / "scenes" / "test"
    writer = PredictionWriter(out / "found", ("drawn", "coco"), system.classes, [source])
    for prediction in progress(predict(system, source, batch=8, device="cpu", score_threshold=0.5), "images", unseen):
        writer.add(prediction.path, prediction.instances, prediction.error)
    writer.close()

    page = report(out / "run", out / "report.html", title="maskwright demo")
    say(f"5/5  done in {(time.monotonic() - began) / 60:.1f} minutes: mask AP50 {100 * result['segm/AP50']:.0f} %\n")
    say(f"report:   {page.absolute().as_uri()}")
    say(f"drawings: {out / 'found' / 'drawn'}")
    say("now try it on images of your own:")
    say(f"  {_command()} predict IMAGES --weights {best} -o found")
    say("or train on them (their classes, COCO format):")
    say(f"  {_command()} train mask-rcnn --data MY-DATA --out runs/first")
    return page


def _make_room(out: Path) -> None:
    """Remove an earlier demo; anything else that stands there is left alone."""
    if not out.exists() or not any(out.iterdir()):
        return
    known = {"scenes", "run", "found", "report.html"}
    others = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
    if others:
        raise UsageError(f"{out}: holds {others[0]!r}, which is not of a demo; give another folder with -o")
    for name in known - {"report.html"}:
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "report.html").unlink(missing_ok=True)


def _command() -> str:
    """How this person calls us: by name, or by the path of an environment that is not activated."""
    import sys

    called = Path(sys.argv[0])
    if called.name != "maskwright" or shutil.which("maskwright") == str(called.absolute()):
        return "maskwright"
    try:
        return str(called.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(called.absolute())
