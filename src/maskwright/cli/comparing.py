"""The command that compares systems on a data set: `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from maskwright.cli.arguments import Device, Directory, Integer, Number, Output
from maskwright.terminal import print_line


def compare(
    systems: Annotated[tuple[str, ...], Positional, arg(metavar="[SYSTEMS ...]")] = ("auto",),
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    out: Output = Path("comparison"),
    hours: Number = None,
    steps: Integer = None,
    split: str = "train",
    val: Directory = None,
    val_split: str = "val",
    count: int = 6,
    batch: int = 4,
    short: Integer = None,
    lr: float = 5e-4,
    seed: int = 0,
    device: Device = "auto",
    pretrained: Literal["scenes", "none"] = "scenes",
    ray: Annotated[str | None, arg(metavar="local|ADDRESS")] = None,
) -> int:
    """Train systems with equal budgets on your images and write one page that compares them.

    SYSTEMS are presets, systems and files of weights; "auto" chooses presets that suit the images and objects, and says
    why. With more than three, the better half goes on after each round with twice the budget. Whenever the comparison
    is stopped, OUT has an answer, and the same command continues it.

    OUT/index.html   the page: AP by size and class, intervals, calibration, latency, memory, images where the systems
                     disagree, what each is bad at, and the command that continues with the best one
    OUT/table.csv    the table; OUT/table.md the same for reading
    OUT/SYSTEM/      weights, result and predictions of each

    Examples:
      maskwright compare --data my-images --hours 0.75
      maskwright compare mask-rcnn-small solov2-small runs/first/best.safetensors --data my-images --steps 1000
      maskwright compare auto mask2former-small --data my-images --hours 8 --ray local

    Args:
        systems: Presets, systems, files of weights, or auto.
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones.
        out: The output folder.
        hours: Time for everything.
        steps: Training steps of a system that stays to the end, instead of --hours.
        split: The split to train on.
        val: Data set to measure on; default: DIR, or a fifth of its images if it has no such split.
        val_split: The split to measure on.
        count: How many systems auto chooses.
        batch: Images per step.
        short: Short side of the images; default: on a CPU as small as the objects permit, otherwise the presets' own.
        lr: The learning rate.
        seed: Seed of initial weights, order and augmentation.
        device: Where to train; auto takes a GPU if there is one.
        pretrained: Start from installed weights trained on generated images where they fit, or from random weights.
        ray: Train the systems of a round at the same time on a Ray cluster.
    """
    from maskwright.comparison import compare as run
    from maskwright.comparison.page import verdict

    state = run(
        list(systems), data, out=out, hours=hours, steps=steps, split=split, val=val, val_split=val_split, count=count,
        seed=seed, batch=batch, short=short, device=device,
        pretrained=None if pretrained == "none" else pretrained, ray=ray, lr=lr,
    )  # fmt: skip
    print_line(f"{verdict(state)}\n{out / 'index.html'}")
    return 0 if any(c.failed is None for c in state.candidates) else 1
