"""Demonstration of the whole workflow, offline on the CPU: train on generated scenes, evaluate, predict, report."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from maskwright.errors import UsageError
from maskwright.terminal import print_line, progress

CLASSES = ("disc", "ring", "star", "box")
SIDE = 192  # side of a scene in pixels

# A small Mask R-CNN that two CPU cores can train in minutes: half the channels of ResNet-18, group normalisation
# because it is trained from scratch, anchors for small images, and as many proposals as these scenes need.
OPTIONS: dict[str, Any] = {
    "backbone": {"name": "resnet18", "width": 32, "norm": "group"},
    "resize": {"short": SIDE, "long": SIDE},
    "neck_width": 64,
    "proposals": {"anchor_sizes": (16, 32, 64, 96, 128), "before": (200, 100), "after": (64, 50)},
    "boxes": {"width": 256},
    "masks": {"convs": 2, "width": 64},
}

# Fields of the recipe that differ from the default.
RECIPE: dict[str, Any] = {
    "batch": 8,
    "lr": 1e-3,
    "warmup": 50,
    "ema": 0.99,
    "workers": 0,
    "device": "cpu",
    "log_every": 10,
    "val_every": 1_000_000,  # only at the end; an evaluation takes a tenth of the time of an epoch
    "val_max_images": 40,
    "tensorboard": False,
}


def run(out: Path, *, seed: int = 0, epochs: int = 5, images: int = 560, unseen: int = 60) -> Path:
    """Run the demonstration.

    Written to `out`:

    - ``scenes/``: the data set with splits train, val and test, in COCO format;
    - ``run/``: the training run with best.safetensors, log.csv and result.json;
    - ``found/``: predictions on the test split;
    - ``report.html``: metrics, training curves, best and worst images.

    Args:
        out: The output folder. An earlier demonstration in it is replaced.
        seed: Seed of scenes and training.
        epochs: Number of epochs.
        images: Number of training scenes.
        unseen: Number of scenes in each of the other splits.

    Returns:
        Path of the report.

    Raises:
        UsageError: If `out` contains other files.
    """
    # Waiting threads sleep instead of spinning. On idle cores a step takes a fifth longer; on busy cores, spinning
    # would make a step ten times slower.
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
    print_line(f"1/5  generating {images + 2 * unseen} scenes: {out / 'scenes'}")
    parts = (("train", images, 0), ("val", unseen, 1), ("test", unseen, 2))
    for split, count, part in progress(parts, "scenes"):
        scenes = Scenes(count, (SIDE, SIDE), seed=3 * seed + part, classes=CLASSES, difficulty=0.2, empty=0.02)
        scenes.write(out / "scenes", split)

    print_line(f"2/5  training a small Mask R-CNN on the CPU for {epochs} epochs: {out / 'run'}")
    torch.manual_seed(seed)
    best = train("mask-rcnn", out / "scenes", out=out / "run", options=OPTIONS, epochs=epochs, seed=seed, **RECIPE)

    system = load(best)
    print_line(f"3/5  evaluating on {unseen} scenes that were not used for training")
    result = evaluate(system, open_dataset(out / "scenes", "val"), batch=8, device="cpu")
    result.title = "maskwright demo"
    result.save(out / "run" / "result.json")
    print_line(str(result))

    print_line(f"4/5  predicting on {unseen} more scenes: {out / 'found' / 'drawn'}")
    source = out / "scenes" / "test"
    found = predict(system, source, batch=8, device="cpu", score_threshold=0.5)
    with PredictionWriter(out / "found", ("drawn", "coco"), system.classes, [source]) as writer:
        for prediction in progress(found, "images", unseen):
            writer.add(prediction.path, prediction.instances, prediction.error)

    page = report(out / "run", out / "report.html", title="maskwright demo")
    print_line(
        f"5/5  done in {(time.monotonic() - began) / 60:.1f} minutes: mask AP50 {100 * result['segm/AP50']:.0f} %\n"
    )
    print_line(f"report:   {page.absolute().as_uri()}")
    print_line(f"drawings: {out / 'found' / 'drawn'}")
    print_line("next, predict on your own images:")
    print_line(f"  {_command()} predict IMAGES --weights {best} -o found")
    print_line("or train on your own data (COCO format):")
    print_line(f"  {_command()} train mask-rcnn --data MY-DATA --out runs/first")
    return page


def _make_room(out: Path) -> None:
    """Remove an earlier demonstration; refuse a folder with other files."""
    if not out.exists() or not any(out.iterdir()):
        return
    known = {"scenes", "run", "found", "report.html"}
    others = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
    if others:
        raise UsageError(f"{out}: contains {others[0]!r}, which is not part of a demo; choose another folder with -o")
    for name in known - {"report.html"}:
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "report.html").unlink(missing_ok=True)


def _command() -> str:
    """The command as called: by name, or by path if its environment is not activated."""
    import sys

    called = Path(sys.argv[0])
    if called.name != "maskwright" or shutil.which("maskwright") == str(called.absolute()):
        return "maskwright"
    try:
        return str(called.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(called.absolute())
