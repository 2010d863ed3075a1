"""Commands that use weights: `predict`, `evaluate` and `report`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from maskwright.cli.arguments import (
    ClassNames,
    Device,
    Directory,
    Dtype,
    Integer,
    KeyValues,
    Name,
    Number,
    Output,
    Tracker,
    Weights,
    device_named,
    given,
    key_values,
)
from maskwright.cli.data import Format
from maskwright.errors import UsageError
from maskwright.terminal import print_error, print_line, progress

if TYPE_CHECKING:
    from maskwright.evaluation.clip_result import ClipResult
    from maskwright.inference.prompting import PromptBook
    from maskwright.inference.shards import Work

Task = Literal["instances", "panoptic", "semantic", "proposals", "tracks"]


def predict(
    images: Annotated[tuple[str, ...], Positional, arg(metavar="[IMAGES ...]")] = (),
    /,
    *,
    out: Output = Path("found"),
    weights: Weights = None,
    data: Directory = None,
    split: Name = None,
    variant: Name = None,
    task: Literal["instances", "panoptic", "semantic"] = "instances",
    format: tuple[Literal["drawn", "coco", "masks", "geojson", "labels"], ...] = ("drawn", "coco"),
    to: Annotated[Format | None, arg(metavar="FORMAT")] = None,
    classes: ClassNames = None,
    score_threshold: Number = None,
    threshold: Annotated[str | None, arg(metavar="NAME=X,...")] = None,
    nms_threshold: Number = None,
    suppression: Annotated[Literal["matrix"] | None, arg(metavar="matrix")] = None,
    detections: Integer = None,
    points: Annotated[tuple[str, ...], arg(metavar="X,Y")] = (),
    boxes: Annotated[tuple[str, ...], arg(metavar="X0,Y0,X1,Y1")] = (),
    prompts: Annotated[str | None, arg(metavar="FILE")] = None,
    from_: Annotated[str | None, arg(name="from", metavar="FILE")] = None,
    decoding: KeyValues = (),
    batch: int = 1,
    tile: Integer = None,
    overlap: float = 0.2,
    recursive: bool = False,
    shard: Annotated[str | None, arg(metavar="I/N")] = None,
    ray: Annotated[str | None, arg(metavar="local|ADDRESS")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compile: bool = False,
    commercial_ok: bool = False,
) -> int:
    """Predict the objects in images, or segment whole images into things and stuff. IMAGES are files, folders, globs.

    OUT/drawn/NAME.jpg       the image with its objects drawn over it
    OUT/results.json         COCO results; OUT/pictures.json lists the images and classes that their ids refer to
                             (with --data the ids of the annotations, otherwise 1, 2, ... and label + 1)
    OUT/masks/NAME.png       16 bits: 0 background, k the k-th best object (the better one where two overlap)
    OUT/labels/NAME.tif      the same as a tiled BigTIFF with 32 bits
    OUT/geojson/NAME.geojson  outlines, for QuPath and geographic information systems; in the coordinates of the
                              reference system, if the image is geo-referenced, otherwise in pixels

    With --task panoptic or semantic, OUT/panoptic.json and OUT/panoptic/NAME.png (COCO panoptic) replace results.json.

    With --tile, TIFF files of more than 2^25 pixels, other images of more than 2^28 and whole-slide images are read in
    windows, and their objects are written as they become complete: memory does not depend on the size of the image.
    A run that was killed continues where it was when the same command is given again.

    With --shard or --ray, predictions of many images are written as Parquet files, OUT/shard-I-of-N/part-*.parquet, and
    a run that was killed continues with the images that they do not contain. IMAGES may be URLs (s3://...) and Parquet
    files with a column of names too.

    Files of an earlier run in OUT are replaced by those of the same name; a line states how many others there are.

    Objects that score below 0.5 are left out (the Python function `predict` and `evaluate` use the system's own
    threshold, 0.05 for most systems); --score-threshold changes it. Unreadable images are skipped and listed at
    the end, and the exit code is then 1.

    Examples:
      maskwright predict photo.jpg --weights runs/first/best.safetensors
      maskwright predict holiday/ 'more/*.png' -w mask_rcnn_R_50_FPN_3x.pkl -o found --format drawn coco masks
      maskwright predict --data my-images --split val -w runs/first/best.safetensors --score-threshold 0.05
      maskwright predict aerial.tif -w best.safetensors --tile 1024 --score-threshold 0.7
      maskwright predict slide.svs -w cells.safetensors --tile 1024 --format geojson labels
      maskwright predict street/ -w best.safetensors --classes person,car --threshold person=0.7,car=0.3
      maskwright predict photo.jpg -w sam_vit_b_01ec64.pth --points 210,340 '90,80;120,60,0' --boxes 90,80,400,390
      maskwright predict photo.jpg --weights shipped --points 210,340
      maskwright predict street/ -w sam_vit_b_01ec64.pth --from found/results.json -o refined
      maskwright predict photo.jpg -w sam_vit_b_01ec64.pth --decoding points_per_side=16 crop_n_layers=1
      maskwright predict s3://bucket/images -w best.safetensors --shard 2/8 -o predictions

    Args:
        images: Image files, folders, globs; default: all images of --data.
        out: Folder for the results.
        weights: A checkpoint of maskwright, an official file, or a name that `maskwright checkpoints` lists. shipped:
            weights that are installed with the library: objects without classes, or answers to prompts.
        data: Annotated data set that the images belong to: results have its image and category ids. It is found without
            this option if IMAGES are in DIR/SPLIT and the annotations in DIR/annotations.
        split: The part of --data; default: the one that has the images, or val.
        variant: The published variant, if an official file's keys fit more than one.
        task: Objects; images segmented into things and stuff; a label for every pixel (systems that support it).
        format: What to write, one or more.
        to: Write the objects as a data set too, OUT/FORMAT, to go back to a labelling tool as suggestions: coco, yolo,
            labelme, via, cvat, voc ... (see convert-data).
        classes: Names of the classes to keep, separated by commas; default: all.
        score_threshold: Objects that score less are left out; default: 0.5 for objects (0.25 if
            classes have no meaning), otherwise the system's.
        threshold: Score thresholds by class: person=0.7,car=0.3; the other classes keep --score-threshold.
        nms_threshold: Overlap above which the lower-scoring of two boxes of a class is dropped; default: the system's.
        suppression: Apply Matrix NMS to the finished masks too: scores decay with the overlap with better objects.
        detections: Maximum objects per image; default: the system's.
        points: Prompts for systems such as SAM, an object each: X,Y, or several points X,Y;X,Y,0 of which those with 0
            are outside of the object.
        boxes: Prompts, an object each.
        prompts: JSON file of prompts, for each image or for all: see the documentation.
        from_: Detections of any system (results.json of predict, or a COCO file): their boxes become prompts, and
            classes and scores are kept.
        decoding: Further options of the system's decoding, as JSON values: points_per_side=16 crop_n_layers=1.
        batch: Images per forward pass.
        tile: For large images: side of the tiles they are cut into; objects are joined across seams.
        overlap: Share of a tile that it has in common with its neighbour.
        recursive: Search sub-folders too.
        shard: Predict the I-th of N shares of the images; every process is given another I.
        ray: Predict on a Ray cluster: local starts one on this machine.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network; auto takes bfloat16 where the processor has instructions for it.
        compile: Compile the network first: slower to start, faster per image.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.checkpoints.shipping import resolved
    from maskwright.evaluation.tasks import task_called
    from maskwright.inference import predict as run
    from maskwright.inference.journal import digest
    from maskwright.inference.own_ids import DatasetIds, find_ids, opened_data
    from maskwright.inference.selecting import parse_thresholds, split_names
    from maskwright.inference.shards import Work
    from maskwright.inference.writer import PredictionWriter
    from maskwright.options import parameters_of
    from maskwright.systems import stuff_of

    if weights is None:
        raise UsageError(
            "predict requires --weights: a file, or a name in the catalogue (`maskwright checkpoints` lists them)"
        )
    if not images and data is None:
        raise UsageError("predict requires IMAGES (files, folders, globs), or --data for all images of a data set")
    if to is not None:
        format = (*format, "coco") if "coco" not in format else format
        if task != "instances":
            raise UsageError(f"--to {to} needs --task instances, got {task!r}")
        if (out / to).exists():
            raise UsageError(f"{out / to}: exists already; remove it, or give another --out")
    prompted = bool(points or boxes or prompts or from_)
    weights = str(resolved(weights, "prompts" if prompted else "instances"))
    network = load(weights, commercial_ok=commercial_ok, variant=variant)
    book = _prompts(points, boxes, prompts, from_)
    if book is not None and (shard is not None or ray is not None):
        raise UsageError("prompts cannot be combined with --shard and --ray")
    names = network.classes if book is None or book.classes is None else book.classes
    everything, own = parse_thresholds([threshold] if threshold else [])
    if everything is not None and score_threshold is not None:
        raise UsageError("--threshold with a number and --score-threshold are the same option; give one of them")
    score_threshold = everything if score_threshold is None else score_threshold
    if data is not None:
        opened = opened_data(data, split, images)
        images = images or tuple(str(path) for path in opened.paths() if path is not None)
        ids = DatasetIds(opened, names)
    else:
        ids = find_ids(images, names) if "coco" in format and shard is None and ray is None else None
    drawing = score_threshold is None and task == "instances" and "prompts" not in network.tasks
    options = given(
        score_threshold=network.shown_score if drawing else score_threshold,
        nms_threshold=nms_threshold,
        detections=detections,
        batch=batch,
        tile=tile,
        overlap=overlap,
        device=device_named(device),
        dtype=dtype,
        compile=compile,
        suppression=suppression,
        task=task,
        classes=None if classes is None else split_names([classes], network.classes),
        threshold=own or None,
        prompts=book,
        **key_values(decoding, ("score_threshold", "nms_threshold", "detections", *parameters_of(run))),
    )
    if shard is not None or ray is not None:
        if format != ("drawn", "coco"):
            raise UsageError("--shard and --ray write Parquet files; omit --format")
        make = functools.partial(load, _absolute(weights), commercial_ok=commercial_ok, variant=variant)
        work = Work((lambda: network) if ray is None else make, options)
        return _predict_parts(work, images, out, shard, ray, recursive, digest(network))
    found = run(
        network,
        list(images),
        recursive=recursive,
        stream=tile is not None and suppression is None,
        journals=out / ".tiles",
        **options,
    )
    stuff = network.classes if task == "semantic" else stuff_of(network)
    total = len(found)
    with PredictionWriter(out, format, names, images, stuff, task_called(task), ids, total) as writer:
        for prediction in progress(found, "images"):
            if prediction.stream is not None:
                writer.add_stream(prediction.path or "image", prediction.stream, progress)
                continue
            found_there = prediction.panoptic if prediction.panoptic is not None else prediction.instances
            writer.add(prediction.path or "image", found_there, prediction.error, prediction.reading)
    what = "object" if task == "instances" else "segment"
    default = drawing and not own
    limit = f" with a score of at least {network.shown_score:g} (--score-threshold)" if default else ""
    print_line(f"{_count(writer.objects, what)}{limit} in {_count(len(writer.images), 'image')}: {out}")
    if writer.images and not writer.objects:
        if default:
            print_error("note: objects with lower scores are not shown; try --score-threshold 0.1")
        elif "prompts" in network.tasks and not prompted and score_threshold is None:
            print_error("note: no prompts; give --points or --boxes, or a lower --score-threshold for objects anywhere")
    if ids is not None and "coco" in format:
        print_line(ids.summary)
    if others := writer.others():
        print_error(
            f"note: {out} also has {_count(len(others), 'file')} that this run did not write, such as {others[0]}; "
            "remove what is of an earlier run, or give another --out"
        )
    if to is not None:
        print_line(str(_suggestions(out, to)))
    for path, reason in writer.skipped:
        print_error(f"skipped {path}: {reason}" if path not in reason else f"skipped {reason}")
    return 1 if writer.skipped else 0


def _prompts(
    points: tuple[str, ...], boxes: tuple[str, ...], prompts: str | None, detections: str | None
) -> PromptBook | None:
    """The prompts of the command line; None if there are none."""
    from maskwright.inference.prompting import read_detections, read_prompts, written_prompts

    written = bool(points or boxes)
    if written + (prompts is not None) + (detections is not None) > 1:
        raise UsageError("give --points and --boxes, or --prompts, or --from; the file of --prompts can hold them all")
    if prompts is not None:
        return read_prompts(prompts)
    if detections is not None:
        return read_detections(detections)
    return written_prompts(points, boxes) if written else None


def _suggestions(out: Path, to: str) -> object:
    """The predictions of a run as a data set in another format."""
    from maskwright.data.convert import convert_data
    from maskwright.data.exchange.results import image_folder

    folder = image_folder(out / "pictures.json")
    return convert_data(out / "results.json", out / to, to, allow_loss=True, format="results", images=folder)


def _absolute(weights: str) -> str:
    """Weights for processes with another working folder: an absolute path, or a name of the catalogue."""
    path = Path(weights).expanduser()
    return str(path.absolute()) if path.exists() else weights


def _predict_parts(
    work: Work, images: tuple[str, ...], out: Path, shard: str | None, ray: str | None, recursive: bool, weights: str
) -> int:
    """Predict a share of many images."""
    from maskwright.inference.listing import parse_shard
    from maskwright.inference.shards import predict_shard

    number, count = (1, 1) if shard is None else parse_shard(shard)
    parts = predict_shard(
        work,
        images,
        out,
        shard=(number, count),
        recursive=recursive,
        ray=ray,
        about={"weights": weights},
        progress=progress,
    )
    print_line(f"{_count(parts.objects, 'object')} in {_count(len(parts.done), 'image')}: {parts.folder}")
    for name, reason in parts.skipped:
        print_error(f"skipped {name}: {reason}" if name not in reason else f"skipped {reason}")
    return 1 if parts.skipped else 0


def _count(number: int, noun: str) -> str:
    """A number with its noun, in the plural if it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def evaluate(
    weights: Annotated[str | None, arg(metavar="WEIGHTS")] = None,
    /,
    *,
    data: Annotated[str, arg(metavar="DIR")],
    split: str = "val",
    out: Annotated[Path | None, arg(aliases=("-o",), metavar="DIR")] = None,
    task: Annotated[Task | None, arg(metavar="{instances,panoptic,semantic,proposals,tracks}")] = None,
    results: Annotated[Path | None, arg(metavar="PATH")] = None,
    tracker: Tracker = "iou",
    semi_supervised: bool = False,
    classes: ClassNames = None,
    detections: Integer = None,
    suppression: Annotated[Literal["matrix"] | None, arg(metavar="matrix")] = None,
    boundary: bool = False,
    limit: Integer = None,
    batch: int = 1,
    tile: Integer = None,
    overlap: float = 0.2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compile: bool = False,
    commercial_ok: bool = False,
) -> int:
    """Evaluate weights on a data set with annotations: AP of masks and boxes as defined by COCO, or panoptic quality.

    Classes are matched by name. With --out, OUT/result.json and the page OUT/report.html are written too (in a run
    folder the page also shows the training curves), and the predictions as OUT/results.json, with the image and
    category ids of the annotations (OUT/panoptic.json for --task panoptic and semantic).

    On a data set of clips, the objects are tracked and J&F, HOTA, MOTA, IDF1, the AP of tracks and the stability
    through time are measured. --out gets OUT/result.json, and the tracks as OUT/tracked.json and OUT/videos.json.

    Examples:
      maskwright evaluate runs/first/best.safetensors --data my-images --out runs/first
      maskwright evaluate mask_rcnn_R_50_FPN_3x.pkl --data coco --split val2017 --out runs/published
      maskwright evaluate runs/first/best.safetensors --data my-images --task proposals
      maskwright evaluate detr-r50-panoptic --data coco --split val2017 --task panoptic
      maskwright evaluate runs/first/best.safetensors --data DAVIS --tracker iou
      maskwright evaluate --results tracked.json --data DAVIS

    Args:
        weights: A checkpoint of maskwright, an official file, or a name that `maskwright checkpoints` lists; shipped:
            those that are installed with the library. Omitted with --results.
        data: Data set: a folder, a COCO file, or scenes[:count=200,size=192] for generated ones. Clips: the layout of
            DAVIS, a YouTube-VIS file, or clips[:count=20,frames=24].
        split: The part of it: annotations/instances_SPLIT.json (panoptic_SPLIT.json).
        out: Folder for result.json, report.html and the predictions, results.json.
        task: instances (default for images): AP; tracks (default for clips); panoptic: PQ of images segmented into
            things and stuff; semantic: IoU of labels over all pixels; proposals: average recall of objects regardless
            of class, at 10, 100 and 1000 per image.
        results: Evaluate tracks of clips instead of weights: YouTube-VIS results (tracked.json), or a folder of maps of
            ids as in DAVIS.
        tracker: For clips: iou associates by the IoU of masks; the others are those of the library trackers.
        semi_supervised: With --results: the tracks were given the objects of the first frame, as DAVIS defines it.
        classes: Names of the classes to evaluate, separated by commas; default: all that both sides have.
        detections: Maximum objects per image; as many per class are counted. 100, for proposals 1000.
        suppression: Apply Matrix NMS to the finished masks too: scores decay with the overlap with better objects.
        boundary: Measure boundary AP too, of systems that predict masks.
        limit: Maximum number of images, evenly spread over the data set; of clips, the first ones.
        batch: Images per forward pass.
        tile: Evaluate with tiles as predict --tile does: side of the tiles that large images are cut into.
        overlap: Share of a tile that it has in common with its neighbour.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network; auto takes bfloat16 where the processor has instructions for it.
        compile: Compile the network first: slower to start, faster per image.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.data import Clips, open_dataset
    from maskwright.evaluation import report as write_report
    from maskwright.inference import evaluate as run
    from maskwright.inference.evaluating_clips import evaluate_clips, evaluate_tracks
    from maskwright.inference.selecting import split_names

    if (weights is None) == (results is None):
        raise UsageError("evaluate requires either WEIGHTS (a file, or a name of the catalogue) or --results PATH")
    if results is not None:
        tracks = evaluate_tracks(results, data, split, semi_supervised=semi_supervised, limit=limit)
        return _shown(tracks, out)
    assert weights is not None
    system = load(weights, commercial_ok=commercial_ok)
    opened: Any = data
    if task in (None, "instances", "tracks"):
        opened = open_dataset(data, split)
    if task == "tracks" or (task is None and isinstance(opened, Clips)):
        if classes is not None or boundary:
            raise UsageError("--classes and --boundary apply to --task instances only, which evaluates single frames")
        options = given(detections=detections, suppression=suppression, tile=tile)
        tracks = evaluate_clips(
            system,
            opened,
            tracker=tracker,
            limit=limit,
            batch=batch,
            overlap=overlap,
            device=device_named(device),
            dtype=dtype,
            compile=compile,
            out=out,
            **options,
        )
        return _shown(tracks, out)
    result = run(
        system,
        opened,
        split,
        task=task or "instances",
        classes=None if classes is None else split_names([classes], system.classes),
        detections=detections,
        suppression=suppression,
        boundary=boundary,
        limit=limit,
        batch=batch,
        tile=tile,
        overlap=overlap,
        device=device_named(device),
        dtype=dtype,
        compile=compile,
        out=out,
    )
    print_line(str(result))
    if out is not None:
        result.save(out / "result.json")
        print_line(f"report: {write_report(out, out / 'report.html')}")
    return 0


def _shown(result: ClipResult, out: Path | None) -> int:
    """Print the metrics of clips and write them."""
    print_line(str(result))
    if out is not None:
        result.save(out / "result.json")
    return 0


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
