"""The command that exports systems for other runtimes: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from maskwright.cli.arguments import Integer, Name, Number, changed, options_as_words
from maskwright.errors import UsageError
from maskwright.terminal import print_error, print_line


def export(
    weights: Annotated[str, arg(metavar="WEIGHTS")],
    /,
    *,
    out: Annotated[Path, arg(aliases=("-o",), metavar="FILE")],
    form: Literal["networks", "graph"] = "networks",
    image: Annotated[Path | None, arg(metavar="IMAGE")] = None,
    masks: Literal["network", "image"] = "network",
    task: Literal["instances", "panoptic"] = "instances",
    size: Annotated[tuple[int, int] | None, arg(metavar="H W")] = None,
    detections: int = 100,
    score_threshold: Number = None,
    int8: bool = False,
    data: Annotated[str | None, arg(metavar="DIR")] = None,
    split: str = "val",
    calibration: int = 32,
    max_drop: float = 0.5,
    limit: Integer = None,
    variant: Name = None,
    commercial_ok: bool = False,
) -> int:
    """Export a system to ONNX (.onnx) or OpenVINO (.xml and .bin), checked against PyTorch on an image.

    With --form networks the file is a checkpoint for `predict` and `evaluate`, whose networks ONNX Runtime or OpenVINO
    computes: all options of decoding, tiles and data sets work as with the original. With --form graph it is one graph
    from an image to boxes, scores, labels and masks, for other programs. If its objects differ from PyTorch's by more
    than rounding, no file is written, and the exit code is 2.

    With --int8 the file is calibrated on the images of --data, measured on it before and after, and refused if
    it loses more than --max-drop points of AP.

    Examples:
      maskwright export runs/first/best.safetensors -o model.onnx
      maskwright export runs/first/best.safetensors -o model.xml --image street.jpg
      maskwright export runs/first/best.safetensors -o graph.onnx --form graph --size 512 512 --masks image
      maskwright export runs/first/best.safetensors -o int8.xml --int8 --data my-images
      maskwright predict photo.jpg -w model.onnx

    Args:
        weights: A checkpoint of maskwright, an official file, or a name of the catalogue (`maskwright checkpoints`).
        out: The new file; its suffix decides the runtime.
        form: networks: for this library; graph: for other programs.
        image: Image that the file is checked on; default: a generated scene.
        masks: Of a graph: masks in the pixels of the network's input, or of the image.
        task: Of a graph: objects, or the image segmented into things and stuff.
        size: Of a graph: height and width of the network's input, into which images are resized; default: that of the
            image of the check.
        detections: Of a graph: number of rows.
        score_threshold: Of a graph: lowest score of an object; default: the system's own.
        int8: Quantise to 8 bits.
        data: Data set for --int8, with annotations.
        split: The part of it to measure on; `train`, if there is one, calibrates.
        calibration: Number of images to calibrate on.
        max_drop: Largest accepted loss in points of AP.
        limit: Number of images to measure on; default: all.
        variant: The published variant, if an official file's keys fit more than one.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    from maskwright.checkpoints import load
    from maskwright.inference import exporting

    graph = changed(
        size=(size, None), masks=(masks, "network"), task=(task, "instances"), detections=(detections, 100),
        score_threshold=(score_threshold, None),
    )  # fmt: skip
    of_int8 = changed(
        data=(data, None), split=(split, "val"), calibration=(calibration, 32), max_drop=(max_drop, 0.5),
        limit=(limit, None),
    )  # fmt: skip
    if int8 and (data is None or form != "networks"):
        raise UsageError("--int8 requires --data, a data set to calibrate and measure on, and --form networks")
    if of_int8 and not int8:
        raise UsageError(f"{options_as_words(of_int8)} requires --int8; the image of the check is --image")
    if graph and form != "graph":
        raise UsageError(
            f"{options_as_words(graph)} requires --form graph; a file of networks takes it when predicting"
        )
    system = load(weights, commercial_ok=commercial_ok, variant=variant)
    with exporting.reported(print_error):
        if int8:
            done: object = exporting.export_int8(system, out, image=image, **of_int8)
        else:
            done = exporting.export(system, out, form=form, image=image, **graph)
    print_line(str(done))
    return 0
