"""The command line: one function per command, whose typed signature defines its options.

Nothing heavy is imported before the options are parsed, so that `--help` and a misspelt option answer at once.
Exit codes: 0 success; 1 finished, but with problems (images skipped, a data set with errors); 2 failed, with one
sentence on stderr; 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from tyro.conf import Positional, arg

from maskwright._version import __version__
from maskwright.errors import UsageError
from maskwright.options import nested
from maskwright.terminal import choose, guarded, parse, print_error, print_line, progress

Device = Literal["auto", "cpu", "cuda", "mps"]
KeyValues = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")]
Output = Annotated[Path, arg(aliases=("-o",), metavar="PATH")]
_LATEST = Path("runs/latest")
Weights = Annotated[str | None, arg(aliases=("-w",), metavar="FILE|NAME")]


# ---- the commands
# -------------------------------------------------------------------------------------------------------


def train(
    system: Annotated[str, arg(metavar="SYSTEM")],
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    split: str = "train",
    val: Annotated[str | None, arg(metavar="DIR")] = None,
    val_split: str = "val",
    out: Output = _LATEST,
    weights: Weights = None,
    backbone_weights: Annotated[str | None, arg(metavar="FILE|NAME")] = None,
    recipe: Annotated[str | None, arg(metavar="NAME|FILE")] = None,
    resume: bool = False,
    option: KeyValues = (),
    augment: KeyValues = (),
    choices: Any = None,
) -> int:
    """Train a system on your own images.

    DIR has annotations/instances_train.json with its images in train/ (COCO format), and the same for val to validate
    on; other layouts, such as train2017 or Roboflow's folders, are recognized.

    OUT then has best.safetensors, last.safetensors, recipe.json, log.csv and tensorboard/.

    Examples:
      maskwright train mask-rcnn --data my-images --out runs/first
      maskwright train mask-rcnn --data my-images --weights torchvision.pth --epochs 20 --freeze backbone
      maskwright train mask-rcnn --data scenes --option backbone=resnet18 backbone.norm=group --epochs 5
      maskwright train mask-rcnn --data my-images --out runs/first --resume

    Args:
        system: A system or preset (see `maskwright systems`), or weights to continue from.
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones.
        split: The split to train on; train also stands for train2017 and the like.
        val: Data set to validate on; default: DIR.
        val_split: The split to validate on; val also stands for valid, val2017 and the like.
        out: The run folder.
        weights: Start from these weights; rows of the head whose class names match are kept.
        backbone_weights: Start with the backbone of these weights, of any system, and random weights for the rest.
        recipe: A published recipe (its values become the defaults below: add --help to see them) or a recipe.json.
        resume: Continue from OUT/last.ckpt as if there had been no interruption.
        option: Options of the network, as JSON values: backbone=resnet18 backbone.norm=frozen resize.short=640 (see
            `maskwright systems NAME`).
        augment: Options of the augmentation: flip=0.5 jitter=[0.1,2.0] paste=0.5.
        choices: The recipe.
    """
    from maskwright.training import Recipe
    from maskwright.training import train as run

    before = (_saved_recipe(out) if resume else None) or Recipe()
    named = _recipe(recipe) or before
    wanted = replace(choices or named, augment={**named.augment, **_values(augment)})
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
        options=nested(_values(option).items()),
        **changes,
    )
    print_line(
        f"{best}\nnext: maskwright report {out} -o report.html; maskwright predict IMAGES --weights {best} -o found"
    )
    return 0


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
    batch: int | None = None,
    number: int = 0,
    epoch: int = 0,
    balance: float | None = None,
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

    plan = _recipe(recipe) or Recipe()
    plan = replace(plan, augment={**plan.augment, **_values(augment)})
    changes = {"seed": seed, **_given(batch=batch, balance=balance)}
    options = nested(_values(option).items())
    path = run(system, data, out, plan, number=number, epoch=epoch, weights=weights, options=options, **changes)
    print_line(str(path))
    return 0


def evaluate(
    weights: Annotated[str, arg(metavar="WEIGHTS")],
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    split: str = "val",
    out: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    task: Literal["instances", "panoptic", "semantic", "proposals"] = "instances",
    classes: Annotated[str | None, arg(metavar="NAME,...")] = None,
    detections: int | None = None,
    suppression: Literal["matrix"] | None = None,
    boundary: bool = False,
    limit: int | None = None,
    batch: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    device: Device = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    commercial_ok: bool = False,
) -> int:
    """Evaluate weights on a data set with annotations: AP of masks and boxes as defined by COCO, or panoptic quality.

    Classes are matched by name. With --out, OUT/result.json and the page OUT/report.html are written too (in a run
    folder the page also shows the training curves), and the predictions as OUT/results.json, with the image and
    category ids of the annotations (OUT/panoptic.json for --task panoptic and semantic).

    Examples:
      maskwright evaluate runs/first/best.safetensors --data my-images --out runs/first
      maskwright evaluate mask_rcnn_R_50_FPN_3x.pkl --data coco --split val2017 --out runs/published
      maskwright evaluate runs/first/best.safetensors --data my-images --task proposals
      maskwright evaluate detr-r50-panoptic --data coco --split val2017 --task panoptic

    Args:
        weights: A checkpoint of ours, an official file, or a name of the catalogue (`maskwright checkpoints`).
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones.
        split: The part of it: annotations/instances_SPLIT.json (panoptic_SPLIT.json).
        out: Folder for result.json, report.html and the predictions, results.json.
        task: instances: AP; panoptic: PQ of images segmented into things and stuff; semantic: IoU of labels over all
            pixels; proposals: average recall of objects regardless of class, at 10, 100 and 1000 per image.
        classes: Names of the classes to evaluate, separated by commas; default: all that both sides have.
        detections: Maximum objects per image; as many per class are counted. 100, for proposals 1000.
        suppression: Apply Matrix NMS to the finished masks too: scores decay with the overlap with better objects.
        boundary: Measure boundary AP too.
        limit: Maximum number of images, evenly spread over the data set.
        batch: Images per forward pass.
        tile: Evaluate with tiles as predict --tile does: side of the tiles that large images are cut into.
        overlap: Share of a tile that it has in common with its neighbour.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network.
        compile: Compile the network first: slower to start, faster per image.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.evaluation import report as write_report
    from maskwright.inference import evaluate as run
    from maskwright.inference.selecting import split_names

    system = load(weights, commercial_ok=commercial_ok)
    result = run(
        system,
        data,
        split,
        task=task,
        classes=None if classes is None else split_names([classes], system.classes),
        detections=detections,
        suppression=suppression,
        boundary=boundary,
        limit=limit,
        batch=batch,
        tile=tile,
        overlap=overlap,
        device=_device(device),
        dtype=dtype,
        compile=compile,
        out=out,
    )
    print_line(str(result))
    if out is not None:
        result.save(out / "result.json")
        print_line(f"report: {write_report(out, out / 'report.html')}")
    return 0


def predict(
    images: Annotated[tuple[str, ...], Positional, arg(metavar="IMAGES")] = (),
    /,
    *,
    out: Output = Path("found"),
    weights: Weights = None,
    data: Annotated[str | None, arg(metavar="DIR")] = None,
    split: str | None = None,
    variant: str | None = None,
    task: Literal["instances", "panoptic", "semantic"] = "instances",
    format: tuple[Literal["drawn", "coco", "masks"], ...] = ("drawn", "coco"),
    classes: Annotated[str | None, arg(metavar="NAME,...")] = None,
    score_threshold: float | None = None,
    threshold: Annotated[str | None, arg(metavar="NAME=X,...")] = None,
    nms_threshold: float | None = None,
    suppression: Literal["matrix"] | None = None,
    detections: int | None = None,
    batch: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    recursive: bool = False,
    device: Device = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    commercial_ok: bool = False,
) -> int:
    """Predict the objects in images, or segment whole images into things and stuff. IMAGES are files, folders, globs.

    OUT/drawn/NAME.jpg       the image with its objects drawn over it
    OUT/results.json         COCO results; OUT/pictures.json lists the images and classes that their ids refer to
                             (with --data the ids of the annotations, otherwise 1, 2, ... and label + 1)
    OUT/masks/NAME.png       16 bits: 0 background, k the k-th best object (the better one where two overlap)

    With --task panoptic or semantic, OUT/panoptic.json and OUT/panoptic/NAME.png (COCO panoptic) replace results.json.

    Objects that score below 0.5 are left out (the Python function `predict` and `evaluate` use the system's own
    threshold, 0.05 for most systems); --score-threshold changes it. An image that cannot be read is skipped; skipped
    images are listed at the end, and the exit code is then 1.

    Examples:
      maskwright predict photo.jpg --weights runs/first/best.safetensors
      maskwright predict holiday/ 'more/*.png' -w mask_rcnn_R_50_FPN_3x.pkl -o found --format drawn coco masks
      maskwright predict --data my-images --split val -w runs/first/best.safetensors --score-threshold 0.05
      maskwright predict aerial.tif -w best.safetensors --tile 1024 --score-threshold 0.7
      maskwright predict street/ -w best.safetensors --classes person,car --threshold person=0.7,car=0.3

    Args:
        images: Image files, folders, globs; default: all images of --data.
        out: Folder for the results.
        weights: A checkpoint of ours, an official file, or a name of the catalogue (`maskwright checkpoints`).
        data: Annotated data set that the images belong to: results have its image and category ids. It is found without
            this option if IMAGES are in DIR/SPLIT and the annotations in DIR/annotations.
        split: The part of --data; default: the one that has the images, or val.
        variant: The published variant, if an official file's keys fit more than one.
        task: Objects; images segmented into things and stuff; a label for every pixel (systems that support it).
        format: What to write, one or more.
        classes: Names of the classes to keep, separated by commas; default: all.
        score_threshold: Objects that score less are left out; default: 0.5 for objects, otherwise the system's.
        threshold: Score thresholds by class: person=0.7,car=0.3; the other classes keep --score-threshold.
        nms_threshold: Overlap above which the lower-scoring of two boxes of a class is dropped; default: the system's.
        suppression: Apply Matrix NMS to the finished masks too: scores decay with the overlap with better objects.
        detections: Maximum objects per image; default: the system's.
        batch: Images per forward pass.
        tile: For large images: side of the tiles they are cut into; objects are joined across seams.
        overlap: Share of a tile that it has in common with its neighbour.
        recursive: Search sub-folders too.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network.
        compile: Compile the network first: slower to start, faster per image.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.evaluation.tasks import task_called
    from maskwright.inference import predict as run
    from maskwright.inference.own_ids import DatasetIds, find_ids, opened_data
    from maskwright.inference.selecting import parse_thresholds, split_names
    from maskwright.inference.writer import PredictionWriter
    from maskwright.systems import stuff_of

    if weights is None:
        raise UsageError(
            "predict requires --weights: a file, or a name in the catalogue (`maskwright checkpoints` lists them)"
        )
    if not images and data is None:
        raise UsageError("predict requires IMAGES (files, folders, globs), or --data for all images of a data set")
    network = load(weights, commercial_ok=commercial_ok, variant=variant)
    everything, own = parse_thresholds([threshold] if threshold else [])
    if everything is not None and score_threshold is not None:
        raise UsageError("--threshold with a number and --score-threshold are the same option; give one of them")
    score_threshold = everything if score_threshold is None else score_threshold
    if data is not None:
        opened = opened_data(data, split, images)
        images = images or tuple(str(path) for path in opened.paths() if path is not None)
        ids = DatasetIds(opened, network.classes)
    else:
        ids = find_ids(images, network.classes) if "coco" in format else None
    found = run(
        network,
        list(images),
        batch=batch,
        tile=tile,
        overlap=overlap,
        recursive=recursive,
        device=_device(device),
        dtype=dtype,
        compile=compile,
        suppression=suppression,
        task=task,
        classes=None if classes is None else split_names([classes], network.classes),
        threshold=own or None,
        **_given(
            score_threshold=0.5 if score_threshold is None and task == "instances" else score_threshold,
            nms_threshold=nms_threshold,
            detections=detections,
        ),
    )
    stuff = network.classes if task == "semantic" else stuff_of(network)
    names, total = network.classes, len(found)
    with PredictionWriter(out, format, names, images, stuff, task_called(task), ids, total) as writer:
        for prediction in progress(found, "images"):
            found_there = prediction.panoptic if prediction.panoptic is not None else prediction.instances
            writer.add(prediction.path or "image", found_there, prediction.error, prediction.reading)
    what = "objects" if task == "instances" else "segments"
    default = score_threshold is None and not own and task == "instances"
    limit = " with a score of at least 0.5 (--score-threshold)" if default else ""
    print_line(f"{writer.objects} {what}{limit} in {len(writer.images)} images: {out}")
    if ids is not None and "coco" in format:
        print_line(ids.summary)
    for path, reason in writer.skipped:
        print_error(f"skipped {path}: {reason}" if path not in reason else f"skipped {reason}")
    return 1 if writer.skipped else 0


def report(run: Annotated[Path, arg(metavar="RUN")], /, *, out: Output = Path("report.html")) -> int:
    """Write the report page of a run folder or of a result.json: one HTML file that needs no network.

    It has training curves, AP tables, a confusion matrix, and the best and worst images, annotations beside
    predictions.

    Examples:
      maskwright report runs/first -o first.html

    Args:
        run: A run folder, or a result.json that `maskwright evaluate --out` wrote.
        out: The page.
    """
    from maskwright.evaluation import report as write

    print_line(f"report: {write(run, out)}")
    return 0


def check(
    source: Annotated[str, arg(metavar="DIR")],
    /,
    *,
    fix: Annotated[Path | None, arg(metavar="OUT")] = None,
    split: str | None = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    link: bool = False,
    follow_links: bool = False,
    bands: tuple[int, ...] = (),
) -> int:
    """Check a data set before training; every finding names its file and annotation.

    The exit code is 0 if the data set can be trained on, perhaps without what is skipped; 1 if `train` would refuse it;
    2 if it could not be checked. With --fix, the copy is checked too and decides. The data set is never changed.

    Examples:
      maskwright check my-images
      maskwright check my-images --fix my-images-repaired

    Args:
        source: A folder with annotations/ and images, or one COCO file.
        fix: Write a repaired copy into this folder.
        split: Check this split only; default: every split, and whether there is one to train on.
        images: The folder of the images; default: searched for.
        link: Make hard links to the images instead of copies; editing an image then changes both.
        follow_links: Copy images that symbolic links outside of the image folder point to, which are omitted otherwise.
        bands: Bands that will be read from images with other bands than RGB, from 1 (train --option resize.bands).
    """
    from maskwright.data import check as run

    findings = run(
        source, fix=fix, split=split, images=images, bands=bands or None, link=link, follow_links=follow_links
    )
    print_line(str(findings))
    return 0 if findings.usable else 1


def convert(
    source: Annotated[str, arg(metavar="OFFICIAL")],
    /,
    *,
    out: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    variant: str | None = None,
) -> int:
    """Convert an official checkpoint (.pth, .pkl, a catalogue name) to a .safetensors file of maskwright.

    Only tensors are read; a file that would execute code is refused.

    Examples:
      maskwright convert mask_rcnn_R_50_FPN_3x.pkl -o mask-rcnn.safetensors

    Args:
        source: The official file.
        out: The new file.
        variant: The published variant, if the file's keys fit more than one.
    """
    from maskwright.checkpoints import convert as run

    run(source, out, variant=variant)
    print_line(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return 0


def systems(name: Annotated[str | None, Positional, arg(metavar="NAME")] = None) -> int:
    """List the systems and their presets; with a NAME, its publication, capabilities and options.

    Examples:
      maskwright systems
      maskwright systems mask-rcnn

    Args:
        name: A system or preset.
    """
    from maskwright.options import groups_of, parameters_of, plain
    from maskwright.systems import describe, find, names, system_class

    if name is None:
        for each in names():
            kind = system_class(each)
            print_line(f"{each:16} {kind.card.title} (arXiv {kind.card.arxiv})")
            for preset, known in kind.presets.items():
                scores = ", ".join(f"{s.what} {s.value:g}" for s in known.published)
                print_line(f"  {preset:34} {scores or known.note}")
        print_line("more: maskwright systems NAME; weights to start from: maskwright checkpoints")
        return 0
    kind, _ = find(name)
    card = kind.card
    print_line(f"{kind.name}: {card.title}\n  paper: {card.paper}, arXiv {card.arxiv}")
    print_line(f"  code:  {card.code} ({card.code_licence})")
    system = describe(name)
    predicts, needs = ", ".join(sorted(system.outputs)), ", ".join(sorted({"boxes", *system.needs}))
    print_line(f"  predicts {predicts}; needs {needs} in training; tasks: {', '.join(sorted(system.tasks))}")
    print_line("options (train --option KEY=VALUE):")
    groups = groups_of(kind.__init__)
    for option, parameter in parameters_of(kind.__init__).items():
        value = system.options[option]
        if option in groups and isinstance(value, dict):
            for field, own in value.items():
                print_line(f"  {option}.{field}={json.dumps(own, default=str)}")
        elif option != "classes":
            print_line(f"  {option}={json.dumps(value, default=str)}    {parameter.annotation}")
    for recipe, changes in kind.recipes.items():
        print_line(f"recipe {recipe} (train --recipe {recipe}): {json.dumps(dict(changes))}")
    for table, ablation in kind.ablations.items():
        print_line(f"table {table} (maskwright ablate {kind.name} {table}): {ablation.title}")
    for preset, known in kind.presets.items():
        if name in (preset, kind.name):
            print_line(f"preset {preset}: {json.dumps(plain(known.options), default=str)} {known.note}".rstrip())
            for score in known.published:
                print_line(f"  {score.what} {score.value:g}: {score.protocol} ({score.source})")
    return 0


def checkpoints(
    name: Annotated[str | None, Positional, arg(metavar="NAME")] = None,
    *,
    system: str | None = None,
    commercial_ok: bool = False,
) -> int:
    """List the published weights that can be named instead of a file, and their licences.

    With a NAME: its address, terms and published scores. Nothing is downloaded here. When a command downloads a file,
    the terms are shown first, an interrupted download resumes, and the file is verified.

    Examples:
      maskwright checkpoints --commercial-ok
      maskwright checkpoints mask-rcnn-r50-fpn-3x
      maskwright predict photo.jpg --weights mask-rcnn-r50-fpn-3x

    Args:
        name: One entry of the catalogue.
        system: Only entries of this system.
        commercial_ok: Only entries whose licence allows commercial use.
    """
    from maskwright.checkpoints.catalogue import list_checkpoints
    from maskwright.systems import names

    if system is not None:
        choose(system, names(), "system")
    entries = {entry.name: entry for entry in list_checkpoints(commercial_ok, system)}
    if name is not None:
        print_line(entries[choose(name, entries, "entry of the catalogue")].terms())
        return 0
    width = max(map(len, entries), default=0)
    for entry in entries.values():
        scores = ", ".join(f"{score.what} {score.value:g}" for score in entry.published)
        use = "" if entry.commercial == "yes" else " (on conditions)" if entry.commercial == "attribution" else " (NO)"
        print_line(f"{entry.name:{width}}  {scores:30}  {entry.weights_licence}; commercial use{use or ' allowed'}")
    return 0


def demo(*, out: Output = Path("demo"), seed: int = 0, epochs: int = 5) -> int:
    """Demonstrate everything offline in a few minutes: train on generated scenes, evaluate, predict, report.

    Examples:
      maskwright demo
      maskwright demo -o somewhere --epochs 20

    Args:
        out: The output folder; an earlier demo in it is replaced.
        seed: Seed of the scenes.
        epochs: Number of epochs; more give better results and take longer.
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


VERBS: dict[str, Callable[..., int]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (demo, check, train, show_batch, evaluate, predict, report, convert, systems, checkpoints, ablate)
}


# Options of earlier versions and what they are called now.
RENAMED = {"--trunk": "--backbone-weights", "--pictures": "--images"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of this process) and returns its exit code."""
    return guarded(functools.partial(_run, list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help") and len(arguments) < 2:
        print_line(_overview())
        return 0
    if first == "help":
        arguments, first = [arguments[1], "--help"], arguments[1]
    if first == "--version":
        print_line(f"maskwright {__version__}")
        return 0
    if first.startswith("-"):
        raise UsageError(
            f"the first argument must be a command: maskwright {{{','.join(VERBS)}}}; see maskwright --help"
        )
    verb = VERBS[choose(first, VERBS, "command")]
    for argument in arguments[1:]:
        option = argument.split("=")[0].replace("_", "-")
        if option in RENAMED:
            raise UsageError(f"maskwright {first}: {option} is now {RENAMED[option]}")
    if verb is train:
        verb = _spelled_out(arguments[1:])
    return parse(verb, arguments[1:], f"maskwright {first}")()


def _overview() -> str:
    lines = [f"  {name:12} {(inspect.getdoc(verb) or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"maskwright {__version__}: instance segmentation from images and annotations to a measured system.",
            "",
            "usage: maskwright COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "Help on a command: maskwright COMMAND --help. To begin: maskwright demo",
        ]
    )


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _spelled_out(arguments: Sequence[str]) -> Callable[..., int]:
    """`train` with every field of the recipe as an option; the defaults are those of the recipe that the arguments
    name.

    Done late because `training.recipe` imports torch, which no other command needs before its options are parsed.
    """
    from maskwright.training.recipe import Recipe

    out = Path(_value(arguments, "--out", "-o") or _LATEST)
    saved = _saved_recipe(out) if "--resume" in arguments else None
    base = replace(_recipe(_value(arguments, "--recipe")) or saved or Recipe(), augment={})

    def command(*values: Any, **named: Any) -> int:
        return train(*values, **named)

    signature = inspect.signature(train)
    parameters = [p.replace(default=base) if p.name == "choices" else p for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {**get_type_hints(train, include_extras=True), "choices": Annotated[Recipe, arg(name="")]}
    command.__doc__ = train.__doc__
    return command


def _recipe(name: str | None) -> Any:
    """The published recipe or the recipe.json with this name; None for None."""
    from maskwright.training.recipe import Recipe, named_recipe

    if name is None or not name.endswith(".json"):
        return name and named_recipe(name)
    return Recipe.load(name)


def _saved_recipe(out: Path) -> Any:
    """The recipe of an interrupted run; None if it has none yet."""
    path = out / "recipe.json"
    return _recipe(str(path)) if path.exists() else None


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option on the command line, before the line is parsed."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def _values(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; values are JSON if they parse as JSON, otherwise text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{pair!r} is not KEY=VALUE; write, for example, flip=0.5")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value; for the others the system's default applies."""
    return {name: value for name, value in options.items() if value is not None}


def _device(name: str) -> str | None:
    return None if name == "auto" else name
