"""Commands that train: `train`, `show-batch`, `demo` and `ablate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tyro.conf import arg

from maskwright.cli.arguments import (
    Device,
    Directory,
    Integer,
    KeyValues,
    Number,
    Output,
    Weights,
    given,
    key_values,
    value_of,
)
from maskwright.options import nested
from maskwright.terminal import print_line

LATEST = Path("runs/latest")


def train(
    system: Annotated[str, arg(metavar="SYSTEM")],
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    split: str = "train",
    val: Directory = None,
    val_split: str = "val",
    out: Output = LATEST,
    weights: Weights = None,
    backbone_weights: Annotated[str | None, arg(metavar="FILE|NAME")] = None,
    pretrained: Annotated[str | None, arg(metavar="scenes|NAME")] = None,
    recipe: Annotated[str | None, arg(metavar="NAME|FILE")] = None,
    resume: bool = False,
    option: KeyValues = (),
    augment: KeyValues = (),
    choices: Any = None,
) -> int:
    """Train a system on your own images.

    DIR has annotations/instances_train.json with its images in train/ (COCO format), and the same for val to validate
    on; other layouts (train2017, Roboflow's folders) and formats (YOLO, LabelMe, CVAT, VIA, VOC ...) are recognized.

    OUT then has best.safetensors, last.safetensors, recipe.json, log.csv and tensorboard/.

    Examples:
      maskwright train mask-rcnn --data my-images --out runs/first
      maskwright train mask-rcnn --data my-images --weights torchvision.pth --epochs 20 --freeze backbone
      maskwright train mask-rcnn --data scenes --option backbone=resnet18 backbone.norm=group --epochs 5
      maskwright train mask-rcnn --data my-images --out runs/first --resume
      maskwright train mask-rcnn --data my-yolo/data.yaml --val 0.2
      maskwright train solov2-small --data my-images --pretrained scenes

    Args:
        system: A system or preset (see `maskwright systems`), or weights to continue from.
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones.
        split: The split to train on; train also stands for train2017 and the like.
        val: Data set to validate on, or a share of the images to train on (0.2), divided by class; default: DIR.
        val_split: The split to validate on; val also stands for valid, val2017 and the like.
        out: The run folder.
        weights: Start from these weights; rows of the head whose class names match are kept. shipped: the installed
            weights of the system (see `maskwright checkpoints`).
        backbone_weights: Start with the backbone of these weights, of any system, and random weights for the rest.
        pretrained: Start with what fits of the installed weights that were trained on generated images: scenes for the
            best fitting, or the name of some.
        recipe: A published recipe (its values become the defaults below: add --help to see them) or a recipe.json.
        resume: Continue from OUT/last.ckpt as if there had been no interruption.
        option: Options of the network, as JSON values: backbone=resnet18 backbone.norm=frozen resize.short=640 (see
            `maskwright systems NAME`).
        augment: Options of the augmentation: flip=0.5 jitter=[0.1,2.0] paste=0.5.
        choices: The recipe.
    """
    from maskwright.training import Recipe
    from maskwright.training import train as run

    before = (saved_recipe(out) if resume else None) or Recipe()
    named = recipe_named(recipe) or before
    wanted = replace(choices or named, augment={**named.augment, **key_values(augment)})
    changes = {name: value for name, value in vars(wanted).items() if value != getattr(before, name)}
    best = run(
        system,
        data,
        split=split,
        val=val,
        val_split=val_split,
        out=out,
        resume=resume,
        weights=weights,
        backbone_weights=backbone_weights,
        pretrained=pretrained,
        options=nested(key_values(option).items()),
        **changes,
    )
    print_line(
        f"{best}\nnext: maskwright report {out} -o report.html; maskwright predict IMAGES --weights {best} -o found"
    )
    return 0


def train_with_recipe(arguments: Sequence[str]) -> Callable[..., int]:
    """`train` with every field of the recipe as an option; the defaults are those of the recipe that the arguments
    name.

    Done late because `training.recipe` imports torch, which no other command needs before its options are parsed.
    """
    from maskwright.training.recipe import Recipe

    out = Path(value_of(arguments, "--out", "-o") or LATEST)
    saved = saved_recipe(out) if "--resume" in arguments else None
    base = replace(recipe_named(value_of(arguments, "--recipe")) or saved or Recipe(), augment={})

    def command(*values: Any, **named: Any) -> int:
        return train(*values, **named)

    signature = inspect.signature(train)
    parameters = [p.replace(default=base) if p.name == "choices" else p for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {**get_type_hints(train, include_extras=True), "choices": Annotated[Recipe, arg(name="")]}
    command.__doc__ = train.__doc__
    return command


def recipe_named(name: str | None) -> Any:
    """The published recipe or the recipe.json with this name; None for None."""
    from maskwright.training.recipe import Recipe, named_recipe

    if name is None or not name.endswith(".json"):
        return name and named_recipe(name)
    return Recipe.load(name)


def saved_recipe(out: Path) -> Any:
    """The recipe of an interrupted run; None if it has none yet."""
    path = out / "recipe.json"
    return recipe_named(str(path)) if path.exists() else None


def show_batch(
    system: Annotated[str, arg(metavar="SYSTEM")],
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    out: Output = Path("batch.png"),
    weights: Weights = None,
    recipe: Annotated[str | None, arg(metavar="NAME|FILE")] = None,
    option: KeyValues = (),
    augment: KeyValues = (),
    batch: Integer = None,
    number: int = 0,
    epoch: int = 0,
    balance: Number = None,
    seed: int = 0,
) -> int:
    """Draw what the network is fed in training: a batch of augmented images with masks, boxes and labels.

    Examples:
      maskwright show-batch mask-rcnn --data my-images -o batch.png
      maskwright show-batch mask-rcnn --data my-images --augment vertical_flip=0.5 quarter_turns=0.75 --batch 8

    Args:
        system: A system or preset (see `maskwright systems`), or weights to continue from.
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones.
        out: The image file.
        weights: The weights that training would start from.
        recipe: A published recipe or a recipe.json.
        option: Options of the network, as for train.
        augment: Options of the augmentation, as for train.
        batch: Images in the batch; default: those of the recipe.
        number: Number of the batch in its epoch, from 0.
        epoch: Number of the epoch, from 0.
        balance: Repeat images of classes in less than this share of images, as for train.
        seed: Seed of order and augmentation, as for train.
    """
    from maskwright.training import Recipe
    from maskwright.training.preview import show_batch as run

    plan = recipe_named(recipe) or Recipe()
    plan = replace(plan, augment={**plan.augment, **key_values(augment)})
    changes = {"seed": seed, **given(batch=batch, balance=balance)}
    options = nested(key_values(option).items())
    path = run(system, data, out, plan, number=number, epoch=epoch, weights=weights, options=options, **changes)
    print_line(str(path))
    return 0


def demo(*, out: Output = Path("demo"), seed: int = 0, epochs: Integer = None) -> int:
    """Demonstrate everything offline in a few minutes: train on generated scenes, evaluate, predict, report.

    Examples:
      maskwright demo
      maskwright demo -o somewhere --epochs 20

    Args:
        out: The output folder; an earlier demo in it is replaced.
        seed: Seed of the scenes.
        epochs: Number of epochs; more give better results and take longer. Default: 2 from installed weights (see
            `maskwright checkpoints`), whose own results are shown first; otherwise 5.
    """
    from maskwright.demo import run

    run(out, seed=seed, epochs=epochs)
    return 0


def ablate(
    system: Annotated[str, arg(metavar="SYSTEM")],
    table: Annotated[str, arg(metavar="TABLE")],
    /,
    *,
    out: Output = Path("ablation"),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 400,
    images: int = 400,
    unseen: int = 100,
    batch: int = 8,
    device: Device = "auto",
) -> int:
    """Rerun a table of a system's paper on small generated data.

    Every variant is trained and evaluated with every seed, on the same scenes in the same order. OUT then has
    table-TABLE.md, .csv and .svg, published figures beside measured ones. Run again, it continues where it stopped, and
    tables in one OUT share the rows that they have in common. `maskwright systems SYSTEM` lists the tables.

    Examples:
      maskwright ablate tensormask 2a --out ablation
      maskwright ablate mask-rcnn 2c --seeds 0 --steps 200

    Args:
        system: A system's name.
        table: A table of its paper.
        out: The output folder.
        seeds: Each variant is trained once per seed.
        steps: Training steps of each run.
        images: Number of generated scenes to train on.
        unseen: Number of further scenes to evaluate on.
        batch: Images per step.
        device: Where to compute.
    """
    from maskwright.ablation import ablate as run

    run(
        system, table, out=out, seeds=seeds, steps=steps, images=images, unseen=unseen, batch=batch, device=device
    )  # fmt: skip
    print_line((out / f"table-{table}.md").read_text("utf-8"))
    return 0
