"""One graph from an image to boxes, scores, labels and masks, for programs that have nothing of this library."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from maskwright.checkpoints.exported import GRAPH_FORMAT
from maskwright.checkpoints.ours import metadata_of
from maskwright.checkpoints.runtimes import CRC, weights_crc
from maskwright.errors import CheckpointError, UsageError
from maskwright.inference.exporting.checking import Difference, check_image, check_pixels, compare, timed
from maskwright.inference.exporting.decoders import DECODERS, SEGMENTERS
from maskwright.inference.exporting.fixed import Found, Limits
from maskwright.inference.exporting.networks import OPSET, Convertible, convert
from maskwright.inference.exporting.placing import Grid, Placed, place
from maskwright.inference.exporting.prompted import export_prompted
from maskwright.inference.exporting.running import open_session, require_runtime
from maskwright.inference.exporting.stages import report
from maskwright.inference.exporting.writing import (
    Exported,
    checked_target,
    loaded_for_export,
    publish,
    staged,
    write_model,
)
from maskwright.inference.preparing import prepare
from maskwright.ops.boxes import clip
from maskwright.structures import Instances, Masks, Panoptic, Placement
from maskwright.systems import System
from maskwright.systems.families.sliding import SlidingSystem
from maskwright.systems.fcos import FCOS
from maskwright.systems.kinds.classless import Classless
from maskwright.systems.kinds.promptable import PromptableSystem

MaskSize = Literal["network", "image"]
MOST_LEVELS, MOST_MEAN_LEVELS = 1.1, 0.05  # halves may be rounded to the other side
GraphTask = Literal["instances", "panoptic"]
_USUAL = {"masks": "network", "task": "instances", "detections": 100}  # the defaults of `export_graph`


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

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        if self.task == "panoptic":
            return ("segments", "scores", "labels")
        more = (name for name in ("masks", "keypoints") if name in self.system.outputs)
        return ("boxes", "scores", "labels", *more)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From an image (H, W, C), 8 bits, to the outputs of the task."""
        with Convertible():
            values, placed = place(image, self.system.preprocess, self.canvas)
            arguments = (values,)
            # Sliding windows see what is beyond the image, and are dropped there.
            if self.system.sees_padding and not isinstance(self.system, SlidingSystem):
                arguments = (values, placed.valid.long()[None])
            raw = self.system(*arguments)
            size = self.canvas if self.mask_size == "network" else (image.shape[0], image.shape[1])
            grid = Grid(size, None if self.mask_size == "network" else placed, placed.valid, self.canvas)
            if self.task == "panoptic":
                return SEGMENTERS[self.system.name](self.system, raw, grid)
            return self._on_image(DECODERS[self.system.name](self.system, raw, grid, self.limits), placed)

    def _on_image(self, found: Found, placed: Placed) -> tuple[Tensor, ...]:
        """Objects in pixels of the image, zeros in rows without one."""
        boxes, last = found.boxes, torch.tensor([0.0, 0.0, found.last, found.last])
        if self.mask_size == "network":
            boxes = placed.boxes_to_image(boxes + last)
        elif not found.on_grid:
            boxes = (placed.boxes_to_image(boxes) + last).minimum(placed.image.flip(0).repeat(2))
        real = (found.scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        outputs = [torch.where(real[:, None], boxes, 0.0), torch.where(real, found.scores, 0.0), found.labels]
        if found.masks is not None:
            outputs.append((found.masks & real[:, None, None]).to(torch.uint8))
        if found.keypoints is not None:
            places = (found.keypoints[..., :2] - placed.offset) / placed.scale
            outputs.append(torch.where(real[:, None, None], torch.cat([places, found.keypoints[..., 2:]], 2), 0.0))
        return tuple(outputs)


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
    mask_threshold: float | None = None,
) -> Exported:
    """Exports a system as one graph, from `image` to `boxes`, `scores`, `labels` and, where there are, masks.

    Promptable systems become two graphs, see `prompted.export_prompted`; they do not take the options from `size` on.

    `image` is (H, W, C), 8 bits, RGB, of any size. `boxes` (N, 4) are x0, y0, x1, y1 in its pixels, `scores` (N,) and
    `labels` (N,) best first, with a score of 0 in rows without an object; `masks` (N, h, w) are 0 or 1, and `keypoints`
    (N, J, 3) are x, y in pixels of the image and a score, where the system predicts them. With the task
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
        mask_threshold: Probability from which on a pixel belongs to a mask; None: the system's own.

    Returns:
        The file, and what differs from PyTorch on the image.

    Raises:
        UsageError: If the system cannot be exported in this form, or an argument is invalid.
        CheckpointError: If the graph differs by more than rounding; there is no file then.
    """
    target = checked_target(out)
    if task not in ("instances", "panoptic") or masks not in ("network", "image"):
        raise UsageError(
            f"task must be 'instances' or 'panoptic' and masks 'network' or 'image', got {task!r}, {masks!r}"
        )
    if detections < 1 or (size is not None and min(size) < 1):
        raise UsageError(f"detections and the sides of size must be at least 1, got {detections} and {size}")
    thresholds = {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "mask_threshold": mask_threshold}
    for name, value in thresholds.items():
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} must be between 0 and 1, got {value}")
    require_runtime(target)
    original = loaded_for_export(system)
    if isinstance(original, Classless):
        raise UsageError(
            f"{original.name}: weights without classes cannot be exported with form='graph'; form='networks' exports "
            "them, and fine-tuned ones can be exported in both forms"
        )
    if isinstance(original, PromptableSystem):
        changed = {"size": size, **thresholds}
        names = [name for name, value in changed.items() if value is not None]
        names += [n for n, v in (("masks", masks), ("task", task), ("detections", detections)) if v != _USUAL[n]]
        if names:
            raise UsageError(
                f"{original.name}: {', '.join(names)} cannot be set for the graphs of a system that answers prompts; "
                "the size of the image and the number of prompts vary in them"
            )
        return export_prompted(original, target, image=image)
    known = DECODERS if task == "instances" else SEGMENTERS
    if original.name not in known:
        raise UsageError(
            f"{original.name} cannot be exported with form='graph' and task={task!r}; these can: {', '.join(known)}. "
            "form='networks' exports every system"
        )
    if task == "panoptic" and "panoptic" not in original.tasks:
        raise UsageError(f"{original.name}: this checkpoint has no stuff classes, which task='panoptic' needs")
    pixels = check_pixels(check_image(image, channels=len(original.preprocess.mean)), original.preprocess)
    ready = prepare(original, "cpu")
    limits = limits_of(ready, detections, score_threshold, nms_threshold, mask_threshold)
    canvas = input_of(ready, pixels, size)
    module = Graph(ready, canvas, limits, masks, task).eval()
    example = pixels.permute(1, 2, 0).contiguous()
    with torch.no_grad():
        module(example)  # fills caches of tables, which must not happen while the graph is traced
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    what = f"{original.name} as one graph"
    model, varying = convert(module, [example], dynamic, ["image"], module.outputs, what)
    if not all(varying[0][:2]):
        raise UsageError(f"{what} would take images of {example.shape[0]} x {example.shape[1]} alone; report this")
    metadata = metadata_of(original, target) | {
        "format": GRAPH_FORMAT,
        "torch": torch.__version__,
        "graph": json.dumps({
            "task": task, "input": list(canvas), "masks": masks, "detections": detections,
            "score_threshold": limits.score_threshold, "nms_threshold": limits.nms_threshold,
            "mask_threshold": limits.mask_threshold,
        }),
        CRC: weights_crc(model),
    }  # fmt: skip
    with staged(target) as folder:
        written = write_model(model, metadata, folder / target.name)
        difference = _checked(ready, written, pixels, module, target)
        if not difference.objects and task == "instances" and limits.score_threshold > 0:
            # Nothing to compare, as with a system that is not trained: the same graph with a lower threshold has more.
            lower = Graph(ready, canvas, replace(limits, score_threshold=0.0), masks, task).eval()
            model, _ = convert(lower, [example], dynamic, ["image"], lower.outputs, what)
            difference = _checked(
                ready, write_model(model, {}, folder / f"lower{target.suffix}"), pixels, lower, target
            )
        bytes_written = publish(written, target)
    words = f"an image of any size, resized into {canvas[0]} x {canvas[1]}"
    return Exported(target, original.name, "graph", OPSET, bytes_written, difference, {"image": words})


def input_of(ready: System, pixels: UInt8[Tensor, "_c h w"], size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the input of a graph: `size` or that of an image, padded; a canvas of the system follows."""
    rule = ready.preprocess
    if size is None:
        return rule.padded_size(pixels.shape[1], pixels.shape[2])
    step = rule.multiple if rule.fit != "inside" else 1
    canvas = (-(-size[0] // step) * step, -(-size[1] // step) * step)
    if rule.canvas is not None:
        ready.preprocess = replace(rule, canvas=canvas)
    return canvas


def limits_of(
    system: System, detections: int, score: float | None = None, nms: float | None = None, mask: float | None = None
) -> Limits:
    """Options of decoding; those that are None are the system's own."""
    own = {name: p.default for name, p in inspect.signature(system.decode).parameters.items()}
    if isinstance(system, FCOS):  # whose own thresholds depend on its options
        published = 0.5 if system.dense.head.exponential else 0.6
        own |= {"score_threshold": system.rules.score_threshold, "nms_threshold": published}
    of_rules = getattr(getattr(system, "rules", None), "threshold", 0.5)  # EmbedMask's, where its option is None

    def first(*values: Any) -> float:
        return next(float(value) for value in values if isinstance(value, int | float))

    overlap = (
        None if nms is None and own.get("nms_threshold", 0.5) is None else first(nms, own.get("nms_threshold"), 0.5)
    )
    return Limits(
        first(score, own.get("score_threshold"), 0.05), overlap, detections,
        first(mask, own.get("mask_threshold"), of_rules, 0.5),
    )  # fmt: skip


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
    report(f"{target.name}: checking")
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    try:
        graph = open_graph(path)
        graph(array)  # the first call also plans memory
        found, wall, processor = timed(lambda: graph(array))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{target}: the runtime cannot compute the graph ({reason}); not written") from None
    largest, mean = input_difference(pixels, module)
    if not (largest <= MOST_LEVELS and mean <= MOST_MEAN_LEVELS):
        raise CheckpointError(
            f"{target}: the graph's preprocessing differs from PyTorch's by {largest:.3g} levels of a pixel, "
            f"{mean:.2g} on average; not written"
        )
    own, torch_wall, torch_processor = timed(lambda: _reference(ready, pixels, module))
    difference = compare(own[0], _answer(found, own[1], own[0], module))
    difference = Difference(
        difference.objects, difference.unmatched, difference.box, difference.score, difference.mask, 0.0, wall,
        torch_wall, processor, torch_processor, difference.keypoints,
    )  # fmt: skip
    problem = difference.exceeds()
    if problem is not None:
        raise CheckpointError(f"{target}: the graph differs from PyTorch: {problem}; not written")
    return difference


@torch.no_grad()
def _reference(ready: System, pixels: Tensor, module: Graph) -> tuple[Instances | Panoptic, Placement]:
    """What PyTorch predicts on the grid of the graph's masks, and how the image was placed.

    The input is that of the graph, which may differ by a level where rounding decides, see `input_difference`.
    """
    _, placement = _fitted(pixels, module)
    canvas = module.canvas
    plane = place(pixels.permute(1, 2, 0), ready.preprocess, canvas)[0]
    size = (min(placement.size[0], canvas[0]), min(placement.size[1], canvas[1]))
    raw = ready(*ready.inputs(plane, [size]))
    grid = placement if module.mask_size == "image" else Placement.identity(size)
    limits = module.limits
    if module.task == "panoptic":
        return cast(Any, ready).decode_panoptic(raw, [grid])[0], placement
    known = inspect.signature(ready.decode).parameters
    wanted = {
        "score_threshold": limits.score_threshold, "detections": limits.detections,
        "nms_threshold": limits.nms_threshold, "mask_threshold": limits.mask_threshold,
        "whole_boxes": False,  # corners are not truncated in the graph
    }  # fmt: skip
    options = {name: value for name, value in wanted.items() if name in known}
    own = ready.decode(raw, [grid], **cast(Any, options))[0]
    assert own.scores is not None
    boxes = own.boxes if module.mask_size == "image" else placement.boxes_to_image(own.boxes)
    boxes = clip(boxes, placement.image_size)
    # Rows of a graph with a score of 0 have no object, and what lies beside the image is none.
    own = own[(own.scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)]
    if module.mask_size == "network":
        own = replace(
            own, boxes=placement.boxes_to_input(clip(placement.boxes_to_image(own.boxes), placement.image_size))
        )
    return own, placement


def _fitted(pixels: Tensor, module: Graph) -> tuple[Tensor, Placement]:
    """The image preprocessed by the rule of the system; one that would exceed the input is made smaller instead."""
    rule, canvas = module.system.preprocess, module.canvas
    image = (pixels.shape[1], pixels.shape[2])
    height, width = rule.size(*image)
    fits = height <= canvas[0] and width <= canvas[1]
    if rule.fit == "pad":
        if not fits:
            return replace(rule, fit="letterbox", canvas=canvas).apply(pixels)
        values, placement = replace(rule, fit="own").apply(pixels)
        top, left = (0, 0) if rule.corner else ((canvas[0] - height) // 2, (canvas[1] - width) // 2)
        plane = rule.normalize(torch.zeros(len(pixels), 1, 1)).expand(len(pixels), *canvas).clone()
        plane[:, top : top + height, left : left + width] = values
        return plane, placement.then_crop(-left, -top, canvas)
    if fits or rule.fit not in ("short", "own"):
        return rule.apply(pixels)
    smaller = replace(rule, fit="letterbox", canvas=canvas, corner=True)
    values, _ = smaller.apply(pixels)
    height, width = smaller.size(*image)
    return values[:, :height, :width], Placement.resize(image, (height, width))


def input_difference(pixels: Tensor, module: Graph) -> tuple[float, float]:
    """How much the network's input differs between the graph's preprocessing and `Preprocess.apply`: the largest and
    the mean difference, in levels of an image of 8 bits."""
    rule = module.system.preprocess
    own, placement = _fitted(pixels, module)
    other = place(pixels.permute(1, 2, 0), rule, module.canvas)[0][0]
    height, width = (min(a, b) for a, b in zip(placement.size, module.canvas, strict=True))
    apart = (own[:, :height, :width] - other[:, :height, :width]).abs().flatten(1)
    levels = apart * torch.tensor(rule.std)[:, None] * rule.divide
    return float(levels.max()), float(levels.mean())


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
    masks = points = None
    if "keypoints" in found:
        points = torch.from_numpy(found["keypoints"])[real]
        if module.mask_size == "network":
            points = torch.cat([placement.points_to_input(points[..., :2]), points[..., 2:]], 2)
    if "masks" in found:
        masks = Masks.from_dense(torch.from_numpy(found["masks"])[real][:, : size[0], : size[1]].bool()).pack()
    return Instances(size, boxes, torch.from_numpy(found["labels"])[real], masks, scores[real], points)
