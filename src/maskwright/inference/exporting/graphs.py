"""One graph from an image to boxes, scores, labels and masks, for programs that have nothing of this library."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from maskwright.checkpoints.exported import GRAPH_FORMAT
from maskwright.checkpoints.ours import metadata_of
from maskwright.checkpoints.runtimes import CRC, SUFFIXES, weights_crc
from maskwright.errors import CheckpointError, UsageError
from maskwright.inference.exporting.checking import Difference, check_image, compare, timed
from maskwright.inference.exporting.fixed import DECODERS, Limits
from maskwright.inference.exporting.networks import OPSET, Convertible, convert
from maskwright.inference.exporting.panoptic import SEGMENTERS
from maskwright.inference.exporting.placing import Grid, place
from maskwright.inference.exporting.prompted import export_prompted
from maskwright.inference.exporting.running import open_session
from maskwright.inference.exporting.writing import Exported, loaded_for_export, publish, staged, write_model
from maskwright.inference.preparing import prepare
from maskwright.inference.sources import items, read
from maskwright.structures import Instances, Masks, Panoptic, Placement
from maskwright.systems import System
from maskwright.systems.kinds.classless import Classless
from maskwright.systems.kinds.promptable import PromptableSystem

MaskSize = Literal["network", "image"]
GraphTask = Literal["instances", "panoptic"]
_OUTPUTS = {"instances": ("boxes", "scores", "labels", "masks"), "panoptic": ("segments", "scores", "labels")}


class Graph(nn.Module):
    """A system with its preprocessing and decoding, for one image.

    Args:
        system: A prepared system on the CPU.
        canvas: Height and width of the network's input.
        limits: Options of decoding.
        masks: Whether masks have the pixels of the network's input or of the image.
        task: Objects, or the image segmented into things and stuff.
    """

    def __init__(self, system: System, canvas: tuple[int, int], limits: Limits, masks: MaskSize, task: GraphTask):
        super().__init__()
        self.system, self.canvas, self.limits, self.mask_size, self.task = system, canvas, limits, masks, task

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From an image (H, W, C), 8 bits, to the outputs of the task."""
        with Convertible():
            values, placed = place(image, self.system.preprocess, self.canvas)
            arguments = (values,)
            if self.system.sees_padding:
                arguments = (values, placed.valid.long()[None])
            raw = self.system(*arguments)
            size = self.canvas if self.mask_size == "network" else (image.shape[0], image.shape[1])
            grid = Grid(size, None if self.mask_size == "network" else placed, placed.valid, self.canvas)
            if self.task == "panoptic":
                return SEGMENTERS[self.system.name](self.system, raw, grid)
            found = DECODERS[self.system.name](self.system, raw, placed.valid, self.limits)
            boxes = placed.boxes_to_image(found.boxes)
            real = (found.scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
            outputs = (torch.where(real[:, None], boxes, 0.0), torch.where(real, found.scores, 0.0), found.labels)
            if found.masks is None:
                return outputs
            return (*outputs, (found.masks(grid) & real[:, None, None]).to(torch.uint8))


def export_graph(
    system: System | str | Path,
    out: str | Path,
    *,
    image: str | Path | None = None,
    size: tuple[int, int] | None = None,
    masks: MaskSize = "network",
    task: GraphTask = "instances",
    detections: int = 100,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    mask_threshold: float = 0.5,
) -> Exported:
    """Exports a system as one graph, from `image` to `boxes`, `scores`, `labels` and `masks`.

    Promptable systems become two graphs, see `prompted.export_prompted`; the options from `size` on are not theirs.

    `image` is (H, W, C), 8 bits, RGB, of any size. `boxes` (N, 4) are x0, y0, x1, y1 in its pixels, `scores` (N,) and
    `labels` (N,) best first, with a score of 0 in rows without an object; `masks` (N, h, w) are 0 or 1. With the task
    "panoptic", `segments` (h, w) has 0 or the number n of a segment, whose score and label are in row n - 1. Thresholds
    and the size of the network's input are fixed in the file.

    Args:
        system: The system, or a checkpoint as for `load`.
        out: The new file, .onnx or .xml.
        image: Image of the check; None: a generated scene.
        size: Height and width of the network's input; images are resized into it. None: that of the image of the check.
        masks: "network": masks have the pixels of the network's input, at whose upper left the resized image lies.
            "image": masks have the pixels of the image.
        task: "instances" or "panoptic".
        detections: Number of rows.
        score_threshold: Lowest score of an object; None: the system's own.
        nms_threshold: Overlap above which the worse of two objects is dropped; None: the system's own.
        mask_threshold: Probability from which on a pixel belongs to a mask.

    Returns:
        The file, and what differs from PyTorch on the image.

    Raises:
        UsageError: If the system cannot be exported in this form, or an argument is invalid.
        CheckpointError: If the graph differs by more than rounding; there is no file then.
    """
    target = Path(out)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{target}: the file name of an exported system must end in {' or '.join(SUFFIXES)}")
    original = loaded_for_export(system)
    if isinstance(original, Classless):
        raise UsageError(
            f"{original.name}: weights without classes cannot be exported with form='graph'; form='networks' exports "
            "them, and fine-tuned ones can be exported in both forms"
        )
    if isinstance(original, PromptableSystem):
        return export_prompted(original, target, image=image)
    known = DECODERS if task == "instances" else SEGMENTERS
    if original.name not in known:
        raise UsageError(
            f"{original.name} cannot be exported with form='graph' and task={task!r}; these can: {', '.join(known)}. "
            "form='networks' exports every system"
        )
    if task == "panoptic" and "panoptic" not in original.tasks:
        raise UsageError(f"{original.name}: this checkpoint has no stuff classes, which task='panoptic' needs")
    pixels = read(next(iter(items(check_image(image), False))), original.preprocess)
    ready = prepare(original, "cpu")
    defaults = {name: p.default for name, p in inspect.signature(ready.decode).parameters.items()}
    limits = Limits(
        _first(score_threshold, defaults.get("score_threshold"), 0.05),
        _first(nms_threshold, defaults.get("nms_threshold"), 0.5),
        detections,
        mask_threshold,
    )
    canvas = ready.preprocess.padded_size(*(size or (pixels.shape[1], pixels.shape[2])))
    if size is not None and ready.preprocess.fit in ("short", "own", "pad"):
        step = ready.preprocess.multiple
        canvas = (-(-size[0] // step) * step, -(-size[1] // step) * step)
    module = Graph(ready, canvas, limits, masks, task).eval()
    example = pixels.permute(1, 2, 0).contiguous()
    with torch.no_grad():
        outputs = _OUTPUTS[task][: len(module(example))]
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    model, _ = convert(module, [example], dynamic, ["image"], outputs, f"{original.name} as one graph")
    metadata = metadata_of(original, target) | {
        "format": GRAPH_FORMAT,
        "torch": torch.__version__,
        "graph": json.dumps({
            "task": task, "input": list(canvas), "masks": masks, "detections": detections,
            "score_threshold": limits.score_threshold, "nms_threshold": limits.nms_threshold,
            "mask_threshold": mask_threshold,
        }),
        CRC: weights_crc(model),
    }  # fmt: skip
    with staged(target) as folder:
        written = write_model(model, metadata, folder / target.name)
        difference = _checked(ready, written, pixels, module, target)
        bytes_written = publish(written, target)
    words = f"an image of any size, resized into {canvas[0]} x {canvas[1]}"
    return Exported(target, original.name, "graph", OPSET, bytes_written, difference, {"image": words})


def _first(*values: Any) -> float:
    """The first number; defaults may be missing or None."""
    return next(float(value) for value in values if isinstance(value, int | float))


# ---- running and checking --------------------------------------------------------------------------------------------


def open_graph(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Loads a graph in its runtime: a function from an image (H, W, C) to the outputs by name."""
    run = open_session(path)
    return lambda image: run({"image": image})


def _checked(ready: System, path: Path, pixels: Tensor, module: Graph, target: Path) -> Difference:
    """Compares the graph in its runtime with the system in PyTorch.

    Raises:
        CheckpointError: If the runtime cannot compute it, or they differ by more than rounding.
    """
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    try:
        graph = open_graph(path)
        graph(array)  # the first call also plans memory
        found, wall, processor = timed(lambda: graph(array))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{target}: the runtime cannot compute the graph ({reason}); not written") from None
    own, torch_wall, torch_processor = timed(lambda: _reference(ready, pixels, module))
    difference = compare(own[0], _answer(found, own[1], own[0], module))
    difference = Difference(
        difference.objects, difference.unmatched, difference.box, difference.score, difference.mask, 0.0, wall,
        torch_wall, processor, torch_processor,
    )  # fmt: skip
    problem = difference.exceeds()
    if problem is not None:
        raise CheckpointError(f"{target}: the graph differs from PyTorch: {problem}; not written")
    return difference


@torch.no_grad()
def _reference(ready: System, pixels: Tensor, module: Graph) -> tuple[Instances | Panoptic, Placement]:
    """What PyTorch predicts on the grid of the graph's masks, and how the image was placed."""
    values, placement = ready.preprocess.apply(pixels)
    canvas = module.canvas
    plane = values.new_zeros(1, len(values), *canvas)
    plane[0, :, : values.shape[1], : values.shape[2]] = values[:, : canvas[0], : canvas[1]]
    size = (min(values.shape[1], canvas[0]), min(values.shape[2], canvas[1]))
    raw = ready(*ready.inputs(plane, [size]))
    grid = placement if module.mask_size == "image" else Placement.identity(size)
    limits = module.limits
    if module.task == "panoptic":
        return cast(Any, ready).decode_panoptic(raw, [grid])[0], placement
    options: dict[str, Any] = {"score_threshold": limits.score_threshold, "detections": limits.detections}
    known = inspect.signature(ready.decode).parameters
    if "nms_threshold" in known and isinstance(known["nms_threshold"].default, float):
        options["nms_threshold"] = limits.nms_threshold
    if "whole_boxes" in known:
        options["whole_boxes"] = False  # corners are not truncated in the graph
    return ready.decode(raw, [grid], **cast(Any, options))[0], placement


def _answer(
    found: Mapping[str, np.ndarray], placement: Placement, own: Instances | Panoptic, module: Graph
) -> Instances | Panoptic:
    """The outputs of a graph as objects on the grid of its masks."""
    if isinstance(own, Panoptic):
        height, width = own.segments.image_size
        table = torch.from_numpy(found["segments"]).long()[:height, :width]
        labels, scores = torch.from_numpy(found["labels"]), torch.from_numpy(found["scores"])
        numbers, again = table.unique(return_inverse=True)
        rows = numbers[numbers > 0] - 1
        things = cast(Any, module.system).thing_classes()[labels[rows]]
        compact = again if len(numbers) and numbers[0] == 0 else again + 1
        return Panoptic.from_map(compact, labels[rows], things, scores=scores[rows])
    scores = torch.from_numpy(found["scores"])
    real = scores > 0
    boxes = torch.from_numpy(found["boxes"])[real]
    size = own.image_size
    if module.mask_size == "network":
        boxes = placement.boxes_to_input(boxes)
    masks = None
    if "masks" in found:
        masks = Masks.from_dense(torch.from_numpy(found["masks"])[real][:, : size[0], : size[1]].bool()).pack()
    return Instances(size, boxes, torch.from_numpy(found["labels"])[real], masks, scores[real])
