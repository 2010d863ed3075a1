"""Demonstration of the whole workflow, offline on the CPU: train on generated scenes, evaluate, predict, report.

With installed weights the first results are theirs, and the training starts from those that find objects.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskwright.errors import UsageError
from maskwright.files import write_text
from maskwright.terminal import print_line, progress

if TYPE_CHECKING:
    from maskwright.checkpoints import Shipped

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

EPOCHS, FEWER = 5, 2  # from random and from installed weights
LOOKED_AT = 12  # images that installed weights are shown first
MARK = ".maskwright-demo"  # marks its folder: other runs and predictions have the same names


def run(out: Path, *, seed: int = 0, epochs: int | None = None, images: int = 560, unseen: int = 60) -> Path:
    """Run the demonstration.

    Written to `out`:

    - ``scenes/``: the data set with splits train, val and test, in COCO format;
    - ``first/``: what installed weights find in some test images, if there are any;
    - ``run/``: the training run with best.safetensors, log.csv and result.json;
    - ``found/``: predictions on the test split;
    - ``report.html``: metrics, training curves, best and worst images.

    Args:
        out: The output folder. An earlier demonstration in it is replaced.
        seed: Seed of scenes and training.
        epochs: Number of epochs; default: 2 from installed weights, otherwise 5.
        images: Number of training scenes.
        unseen: Number of scenes in each of the other splits.

    Returns:
        Path of the report.

    Raises:
        UsageError: If `out` contains other files, or results that are not known to be a demonstration's.
    """
    # Waiting threads sleep instead of spinning. On idle cores a step takes a fifth longer; on busy cores, spinning
    # would make a step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from maskwright.checkpoints import load
    from maskwright.checkpoints.shipping import first_with
    from maskwright.data import Scenes, open_dataset
    from maskwright.evaluation import report
    from maskwright.inference import evaluate, predict
    from maskwright.inference.writer import PredictionWriter
    from maskwright.training import train

    _make_room(out)
    write_text(out / MARK, "A demonstration of maskwright, which another one replaces.\n", UsageError)
    began = time.monotonic()
    start = first_with("instances")
    epochs = (EPOCHS if start is None else FEWER) if epochs is None else epochs
    step, steps = 1, 5 if start is None else 6
    print_line(f"{step}/{steps}  generating {images + 2 * unseen} scenes: {out / 'scenes'}")
    parts = (("train", images, 0), ("val", unseen, 1), ("test", unseen, 2))
    for split, count, part in progress(parts, "scenes"):
        scenes = Scenes(count, (SIDE, SIDE), seed=3 * seed + part, classes=CLASSES, difficulty=0.2, empty=0.02)
        scenes.write(out / "scenes", split)

    if start is not None:
        step += 1
        print_line(f"{step}/{steps}  first results, by {start.name} as installed: {out / 'first' / 'drawn'}")
        count = _first_look(start, out)
        print_line(f"     {count} objects, labelled 'object', {time.monotonic() - began:.0f} seconds after the start")

    step += 1
    what = "a small Mask R-CNN" if start is None else f"from {start.name}"
    print_line(f"{step}/{steps}  training {what} on the CPU for {epochs} epochs: {out / 'run'}")
    torch.manual_seed(seed)
    system: Any = {"system": "mask-rcnn", "options": OPTIONS}
    if start is not None:
        system = {"system": start.name, "options": {"resize": {"short": SIDE, "long": SIDE}}}
    best = train(data=out / "scenes", out=out / "run", epochs=epochs, seed=seed, **system, **RECIPE)

    system = load(best)
    step += 1
    print_line(f"{step}/{steps}  evaluating on {unseen} scenes that were not used for training")
    result = evaluate(system, open_dataset(out / "scenes", "val"), batch=8, device="cpu")
    result.title = "maskwright demo"
    result.save(out / "run" / "result.json")
    print_line(str(result))

    step += 1
    print_line(f"{step}/{steps}  predicting on {unseen} more scenes: {out / 'found' / 'drawn'}")
    source = out / "scenes" / "test"
    found = predict(system, source, batch=8, device="cpu", score_threshold=0.5)
    with PredictionWriter(out / "found", ("drawn", "coco"), system.classes, [source]) as writer:
        for prediction in progress(found, "images", unseen):
            writer.add(prediction.path, prediction.instances, prediction.error)

    page = report(out / "run", out / "report.html", title="maskwright demo")
    minutes = (time.monotonic() - began) / 60
    print_line(f"{steps}/{steps}  done in {minutes:.1f} minutes: mask AP50 {100 * result['segm/AP50']:.0f} %\n")
    print_line(f"report:   {page.absolute().as_uri()}")
    print_line(f"drawings: {out / 'found' / 'drawn'}")
    print_line("next, predict on your own images:")
    print_line(f"  {_command()} predict IMAGES --weights {best} -o found")
    print_line("or train on your own data (COCO format):")
    print_line(f"  {_command()} train mask-rcnn --data MY-DATA --out runs/first")
    return page


def _first_look(look: Shipped, out: Path) -> int:
    """Draw what installed weights find in some test images; the number of objects."""
    from maskwright.checkpoints import load
    from maskwright.inference import predict
    from maskwright.inference.writer import PredictionWriter

    system = load(look.name)
    files = sorted((out / "scenes" / "test").iterdir())[:LOOKED_AT]
    found = predict(system, files, device="cpu", score_threshold=0.3)
    with PredictionWriter(out / "first", ("drawn",), system.classes, [str(file) for file in files]) as writer:
        for prediction in progress(found, "images", len(files)):
            writer.add(prediction.path or "image", prediction.instances, prediction.error)
    return writer.objects


def _make_room(out: Path) -> None:
    """Remove an earlier demonstration; refuse a folder with other files."""
    if not out.exists() or not any(out.iterdir()):
        return
    known = {"scenes", "first", "run", "found", "report.html"}
    others = sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))
    if others:
        raise UsageError(f"{out}: contains {others[0]!r}, which is not part of a demo; choose another folder with -o")
    folders = sorted(known - {"report.html"})
    if linked := [name for name in folders if (out / name).is_symlink()]:
        raise UsageError(f"{out / linked[0]}: is a link; remove it, or choose another folder with -o")
    if not (out / MARK).exists():
        filled = [name for name in folders if (out / name).is_dir() and any((out / name).iterdir())]
        if filled:
            raise UsageError(
                f"{out}: contains {filled[0]!r}, which may not be a demo's; remove it, or choose another folder with -o"
            )
    for name in folders:
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
