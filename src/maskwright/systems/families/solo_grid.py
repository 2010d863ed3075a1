"""The SOLO family (arXiv 1912.04488): assignment of objects to grid cells, losses and decoding.

Each level of a feature pyramid is divided into S x S cells. The cell that contains an object's centre predicts the
class of the object and identifies its mask. SOLO, Decoupled SOLO and SOLOv2 differ in how a cell identifies its mask;
they pass a function from cells to masks to what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss

from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import dice, focal_sum
from maskwright.ops.planes import place_planes
from maskwright.ops.suppression import mask_iou, mask_nms, matrix_nms
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.system import ClassRows, System

STRIDES = (8, 8, 16, 32, 32)  # of the levels that the grids are laid on

MaskLoss = Literal["dice", "focal", "bce"]


# ---- options and base class ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells(OptionGroup):
    """The grid of each level, and the objects that its cells are trained on, as options of a system.

    Attributes:
        grids: Number S of rows and columns of cells, for each of the five levels (SOLO, table 1).
        ranges: For each level the lowest and the highest square root of the area of an object's box, in pixels of the
            network's input, both inclusive (SOLO, table 2). An object can belong to two levels.
        sigma: Size of the central region of an object, whose cells are positive, as a share of its box (SOLO, section
            3.3).
    """

    label: ClassVar[str] = "cells"

    grids: Sequence[int] = (40, 36, 24, 16, 12)
    ranges: Sequence[Sequence[float]] = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    sigma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("grids", "ranges"):
            if len(getattr(self, name)) != len(STRIDES):
                raise UsageError(f"cells.{name} must have {len(STRIDES)} entries, got {len(getattr(self, name))}")
        if min(self.grids) < 1:
            raise UsageError(f"cells.grids must be at least 1, got {list(self.grids)}")
        if any(len(pair) != 2 for pair in self.ranges):
            raise UsageError(
                f"cells.ranges must be pairs of a lowest and a highest size, got {[list(pair) for pair in self.ranges]}"
            )


CellsLike = Mapping[str, Any] | Cells


class GridSystem(System):
    """Base class of the systems of the family.

    A subclass constructs `dense`, whose direct submodules are `backbone`, `neck`, `category` and the other heads.

    Args:
        classes: Class names.
        cells: The grids.
        mask_loss: Loss of a mask.
        mask_weight: Weight of that loss.
        preprocess: From an image to the network's input.
    """

    dense: nn.Module

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        "grids": "cells.grids", "ranges": "cells.ranges", "sigma": "cells.sigma",
        "head_width": "head.width", "head_convs": "head.convs", "head_deform": "head.deform",
    }  # fmt: skip

    def __init__(
        self, classes: Sequence[str], cells: Cells, mask_loss: MaskLoss, mask_weight: float, preprocess: Preprocess
    ):
        super().__init__()
        self.classes = tuple(classes)
        self.cells = cells
        self.mask_loss: MaskLoss = mask_loss
        self.mask_weight = mask_weight
        self.preprocess = preprocess

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        result = super().upgraded(options)
        if "deform_modulated" in options:  # earlier versions had one option for the backbone and the heads
            result.setdefault("head", {})["modulated"] = options["deform_modulated"]
        return result

    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        return self.dense(images)

    def groups(self) -> dict[str, list[nn.Module]]:
        parts = dict(self.dense.named_children())
        backbone, neck = parts.pop("backbone"), parts.pop("neck")
        others = [child for name, child in self.named_children() if name != "dense"]
        return {"backbone": [backbone], "neck": [neck], "heads": [*parts.values(), *others]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.category.output.{kind}": ClassRows() for kind in ("weight", "bias")}


# ---- cells of several levels -----------------------------------------------------------------------------------------


def flatten_cells(levels: Sequence[Float[Tensor, "b k _s _s"]]) -> Float[Tensor, "b c k"]:
    """Concatenates the values of all cells, level by level and row by row."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


def per_cell(grids: Sequence[int], values: Sequence[float], device: torch.device) -> Float[Tensor, " c"]:
    """Repeats a value of each level for each of its cells."""
    return torch.cat([torch.full((g * g,), float(v), device=device) for g, v in zip(grids, values, strict=True)])


def split_by_level(cells: Int[Tensor, " n"], grids: Sequence[int]) -> tuple[Int[Tensor, " _n"], ...]:
    """Splits sorted cells, numbered across all levels, into those of each level, numbered within the level."""
    parts, first = [], 0
    for grid in grids:
        parts.append(cells[(cells >= first) & (cells < first + grid * grid)] - first)
        first += grid * grid
    return tuple(parts)


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image, as the losses need them.

    Attributes:
        boxes: In the convention of the original, in pixels of the network's input.
        labels: Class of each object.
        centres: Centre of mass x, y of each mask, in indices of pixels.
        solid: Whether the mask has pixels.
        planes: For each stride, the masks on a grid of that stride.
    """

    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    centres: Float[Tensor, "n 2"]
    solid: Bool[Tensor, " n"]
    planes: dict[int, Bool[Tensor, "n _h _w"]]


@torch.no_grad()
def read_objects(
    target: Instances,
    size: tuple[int, int],
    strides: Sequence[int],
    device: torch.device,
    *,
    inclusive: bool,
    budget: int = 64 << 20,
) -> Objects:
    """Converts a target, without its crowd regions.

    Args:
        target: Objects with masks, in the frame of the network's input.
        size: Height and width of the input, padding included.
        strides: Strides for which masks are made. A cell of such a mask is True if at least two of the four pixels in
            its middle are: the mask resized bilinearly without anti-aliasing and rounded half up.
        device: Where the result is.
        inclusive: Boxes include their last pixel, as in the first versions of MMDetection, and are therefore smaller
            by 1.
        budget: Bytes of scratch memory; it limits how many masks are decoded at a time.
    """
    target = target if target.crowd is None else target[~target.crowd]
    count, (height, width) = len(target), size
    centres = torch.zeros(count, 2, device=device)
    areas = torch.zeros(count, device=device)
    planes = {s: torch.zeros(count, height // s, width // s, dtype=torch.bool, device=device) for s in set(strides)}
    exact = torch.float32 if device.type == "mps" else torch.float64  # float64 does not exist there
    x, y = (torch.arange(n, device=device, dtype=exact) for n in (width, height))
    step = max(1, budget // (4 * height * width))
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        assert target.masks is not None  # `System.needs`
        masks = target.masks[rows].dense(device)
        masks = functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
        columns, lines = masks.sum(1), masks.sum(2)
        area = lines.sum(1)
        total = area.clamp(min=1)
        centre_x, centre_y = columns.to(exact) @ x / total, lines.to(exact) @ y / total
        areas[rows], centres[rows] = area.float(), torch.stack([centre_x, centre_y], 1).float()
        for stride, plane in planes.items():
            plane[rows] = _block_centres(masks, stride)
    boxes = target.boxes.to(device).float()
    if inclusive:
        boxes = boxes - boxes.new_tensor([0, 0, 1, 1])
    return Objects(boxes, target.labels.to(device), centres, areas > 0, planes)


def _block_centres(masks: Bool[Tensor, "n h w"], stride: int) -> Bool[Tensor, "n _p _q"]:
    """For each block of stride x stride pixels, whether at least two of its four central pixels are set."""
    height, width = (length // stride * stride for length in masks.shape[1:])
    half, counts = stride // 2, 0
    for down in (half - 1, half):
        for across in (half - 1, half):
            counts = counts + masks[:, down:height:stride, across:width:stride].to(torch.uint8)
    return counts >= 2  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Positives:
    """The positive cells of one level, ordered by object, then by row and column.

    Attributes:
        cells: row * S + column. A cell to which several objects are assigned occurs several times.
        owners: Row of the object in `Objects`.
    """

    cells: Int[Tensor, " p"]
    owners: Int[Tensor, " p"]

    def owner_of_cells(self, count: int) -> Int[Tensor, " c"]:
        """For each of `count` cells the last object that is assigned to it; -1 if there is none."""
        owner = torch.full((count,), -1, dtype=torch.int64, device=self.cells.device)
        return owner.scatter_reduce(0, self.cells, self.owners, "amax")

    def unique(self, count: int) -> Positives:
        """Each positive cell once, in order, with the last object that is assigned to it."""
        owner = self.owner_of_cells(count)
        cells = (owner >= 0).nonzero().flatten()
        return Positives(cells, owner[cells])


def join_levels(levels: Sequence[Positives], grids: Sequence[int]) -> Positives:
    """Concatenates the positives of all levels; cells are numbered across all levels."""
    cells, first = [], 0
    for level, grid in zip(levels, grids, strict=True):
        cells.append(level.cells + first)
        first += grid * grid
    return Positives(torch.cat(cells), torch.cat([level.owners for level in levels]))


@torch.no_grad()
def assign(objects: Objects, size: tuple[int, int], cells: Cells) -> list[Positives]:
    """Assigns objects to cells (SOLO, section 3.3).

    Positive are the cells that intersect a box of `sigma` times the size of the object's box around the centre of mass
    of its mask, and that are at most one row and one column away from the centre's own cell: 1 to 9 cells.

    Args:
        objects: The objects of an image.
        size: Height and width of the network's input, padding included.
        cells: The grids, ranges and sigma.

    Returns:
        The positive cells of each level.
    """
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    scale = sides.prod(1).clamp(min=0).sqrt()
    extent = scale.new_tensor([size[1], size[0]])
    half = 0.5 * sides * cells.sigma
    shift = torch.arange(-1, 2, device=scale.device)
    result = []
    for grid, (low, high) in zip(cells.grids, cells.ranges, strict=True):
        rows = ((scale >= low) & (scale <= high) & objects.solid).nonzero().flatten()
        # Divided by 1 / S as in the original: in floating point this differs from a multiplication by S.
        centre, first, last = (
            (place[rows] / extent).div(1.0 / grid, rounding_mode="floor").long()
            for place in (objects.centres, objects.centres - half, objects.centres + half)
        )
        around = centre[:, None] + shift[:, None]  # (k, 3, 2): x, y
        inside = (around >= first.clamp(min=0)[:, None]) & (around <= last.clamp(max=grid - 1)[:, None])
        inside = inside[:, :, None, 1] & inside[:, None, :, 0]  # (k, 3 rows, 3 columns)
        numbers = around[:, :, None, 1] * grid + around[:, None, :, 0]
        result.append(Positives(numbers[inside], rows[:, None, None].expand_as(inside)[inside]))
    return result


# ---- losses ----------------------------------------------------------------------------------------------------------


def class_labels(
    objects: Sequence[Objects], positives: Sequence[Sequence[Positives]], grids: Sequence[int]
) -> Int[Tensor, "b c"]:
    """The class of each cell of each image, -1 for background. The last object that is assigned to a cell decides."""
    rows = []
    for own, levels in zip(objects, positives, strict=True):
        owner = torch.cat([level.owner_of_cells(grid * grid) for level, grid in zip(levels, grids, strict=True)])
        labels = torch.cat([own.labels, own.labels.new_full((1,), -1)])  # the owner -1 reads the last entry
        rows.append(labels[owner])
    return torch.stack(rows)


def class_loss(
    logits: Float[Tensor, "b c k"], labels: Int[Tensor, "b c"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, ""]:
    """Focal loss of all cells and classes, divided by the number of positive cells + 1."""
    truth = functional.one_hot(labels + 1, logits.shape[2] + 1)[..., 1:]
    count = global_mean_count((labels >= 0).sum(), minimum=0, more=1)
    return focal_sum(logits.float(), truth.float(), alpha, gamma) / count


def mask_loss_sum(
    masks_of: Callable[[Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    positives: Positives,
    planes: Bool[Tensor, "m h w"],
    kind: MaskLoss = "dice",
    budget: int = 64 << 20,
) -> Float[Tensor, ""]:
    """Sum of the mask loss over positive cells (SOLO, section 3.3, table 4).

    Args:
        masks_of: Computes the masks of cells, as probabilities.
        positives: The cells and their objects.
        planes: The objects' masks, on the same grid.
        kind: "dice", or the focal loss or binary cross entropy of the pixels.
        budget: Bytes of the largest intermediate result. If more positives than fit, they are processed in parts that
            are computed again in the backward pass instead of being kept.
    """

    def part(rows: Tensor) -> Tensor:
        predicted = masks_of(positives.cells[rows]).float().flatten(1)
        truth = planes[positives.owners[rows]].flatten(1).float()
        if kind == "dice":
            return dice(predicted, truth).sum()
        logits = torch.logit(predicted, 1e-6)
        if kind == "bce":
            return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / truth.shape[1]
        return (sigmoid_focal_loss(logits, truth).sum(1) / truth.sum(1).clamp(min=1)).sum()  # per positive pixel

    rows = torch.arange(len(positives.cells), device=planes.device)
    step = max(1, budget // (4 * max(1, planes.shape[1] * planes.shape[2])))
    if len(rows) <= step:
        return part(rows)
    parts = [checkpoint(part, some, use_reentrant=False) for some in rows.split(step)]
    return torch.stack([p for p in parts if isinstance(p, Tensor)]).sum()


# ---- decoding --------------------------------------------------------------------------------------------------------


def point_nms(scores: Float[Tensor, "b k s s"]) -> Float[Tensor, "b k s s"]:
    """Sets scores to 0 that are lower than the score of the left, the upper or the upper left neighbour."""
    best = functional.max_pool2d(scores, 2, stride=1, padding=1)[..., :-1, :-1]
    return scores * (best == scores)


@dataclass(frozen=True)
class Suppression:
    """How cells become objects. The defaults are those of the released code.

    Attributes:
        score_threshold: Lowest score of an object.
        candidate_threshold: Lowest score of a cell whose mask is computed.
        nms_threshold: Mask IoU above which the object of lower score is removed within a class; None for Matrix NMS.
        kernel: The kernel of Matrix NMS.
        sigma: Its parameter.
        pre_nms_top_k: Maximum number of candidates before suppression.
        detections: Maximum number of objects.
    """

    score_threshold: float = 0.05
    candidate_threshold: float = 0.1
    nms_threshold: float | None = None
    kernel: Literal["gaussian", "linear"] = "gaussian"
    sigma: float = 2.0
    pre_nms_top_k: int = 500
    detections: int = 100


@torch.no_grad()
def select_objects(
    scores: Float[Tensor, "c k"],
    minimum_areas: Float[Tensor, " c"],
    masks_of: Callable[[Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    suppression: Suppression,
    pixels: int,
    budget: int | None = None,
) -> tuple[Float[Tensor, "d h w"], Float[Tensor, " d"], Int[Tensor, " d"]]:
    """Selects the objects of one image.

    Args:
        scores: Score of each cell and class, after point NMS.
        minimum_areas: A mask must have more pixels above 0.5 than this: the stride of its level.
        masks_of: Computes the masks of cells, as probabilities on one grid; called with sorted cells, for candidates
            only.
        suppression: Thresholds and limits.
        pixels: Number of pixels of that grid.
        budget: Bytes of scratch memory for the masks of candidates, which limits how many are computed at a time;
            default 256 MB on an accelerator and 32 MB on the host, where larger parts exceed the caches. One byte for
            each pixel of each candidate is kept beside it.

    Returns:
        Masks as probabilities, scores and labels, in descending order of scores.
    """
    cells, labels = (scores > suppression.candidate_threshold).nonzero(as_tuple=True)
    named, row = cells.unique(return_inverse=True)  # a cell may be a candidate for several classes
    if budget is None:
        budget = (32 if scores.device.type == "cpu" else 256) << 20
    solid = torch.zeros(len(named), pixels, dtype=torch.bool, device=scores.device)
    areas, certainty = scores.new_zeros(len(named)), scores.new_zeros(len(named))
    at_once = max(1, budget // (12 * pixels))
    for first in range(0, len(named), at_once):
        part = slice(first, first + at_once)
        masks = masks_of(named[part]).flatten(1)
        inside = (masks > 0.5).to(masks.dtype)
        solid[part], areas[part] = inside, inside.sum(1)  # pyright: ignore[reportArgumentType]
        certainty[part] = masks.mul_(inside).sum(1) / areas[part].clamp(min=1)
    large = areas[row] > minimum_areas[cells]
    cells, labels, row = cells[large], labels[large], row[large]
    values, order = (scores[cells, labels] * certainty[row]).sort(descending=True, stable=True)
    order, values = order[: suppression.pre_nms_top_k], values[: suppression.pre_nms_top_k]
    cells, labels, row = cells[order], labels[order], row[order]
    iou = mask_iou(solid[row], labels)
    if suppression.nms_threshold is None:
        values = matrix_nms(iou, values, labels, suppression.kernel, suppression.sigma)
    else:
        values = values * mask_nms(iou, labels, suppression.nms_threshold)
    values, order = values.sort(descending=True, stable=True)
    keep = order[(values >= suppression.score_threshold) & (values > 0)][: suppression.detections]
    named, row = cells[keep].unique(return_inverse=True)
    return masks_of(named)[row], values[: len(keep)], labels[keep]


@torch.no_grad()
def decode_cells(
    classes: Sequence[Float[Tensor, "b k _s _s"]],
    grids: Sequence[int],
    masks_of: Callable[[int, Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    plane: tuple[int, int],
    placements: Sequence[Placement],
    size: tuple[int, int],
    suppression: Suppression,
    mask_threshold: float = 0.5,
    refine: Callable[[int, Float[Tensor, "n h w"]], Float[Tensor, "n _p _q"]] | None = None,
) -> list[Instances]:
    """Converts the raw output of a batch to objects.

    Args:
        classes: Logits of each level.
        grids: Cells of each level.
        masks_of: Computes the masks of cells of an image, as probabilities on one grid. Arguments: the image's index
            and sorted cells, numbered across all levels.
        plane: Height and width of that grid.
        placements: How each image was placed in the network's input.
        size: Height and width of the input, padding included.
        suppression: Thresholds and limits.
        mask_threshold: Probability above which a pixel belongs to a mask.
        refine: Computes finer probabilities from some masks of an image, see `to_instances`.
    """
    scores = flatten_cells([point_nms(level.float().sigmoid()) for level in classes])
    minimum_areas = per_cell(grids, STRIDES, scores.device)
    result = []
    for image, (own, placement) in enumerate(zip(scores, placements, strict=True)):
        objects = select_objects(own, minimum_areas, partial(masks_of, image), suppression, plane[0] * plane[1])
        own_refine = None if refine is None else partial(refine, image)
        result.append(to_instances(*objects, placement, size, mask_threshold, own_refine))
    return result


@torch.no_grad()
def to_instances(
    masks: Float[Tensor, "d h w"],
    scores: Float[Tensor, " d"],
    labels: Int[Tensor, " d"],
    placement: Placement,
    size: tuple[int, int],
    threshold: float = 0.5,
    refine: Callable[[Float[Tensor, "n h w"]], Float[Tensor, "n _p _q"]] | None = None,
    budget: int = 64 << 20,
) -> Instances:
    """Resizes masks to the image. Boxes are the bounding boxes of the masks, as none are predicted.

    Objects that lie in the padding only are dropped.

    Args:
        masks: Probabilities on a grid that covers the network's input.
        scores: Score of each object.
        labels: Class of each object.
        placement: How the image was placed in the input.
        size: Height and width of the input, padding included.
        threshold: Probability above which a pixel belongs to a mask.
        refine: Computes finer probabilities from some of the masks.
        budget: Bytes of scratch memory at the size of the input; it limits how many masks are refined at a time.
    """
    parts = masks.split(max(1, budget // (4 * size[0] * size[1]))) if refine is not None else [masks]
    planes = Masks.join(
        [place_planes(p if refine is None else refine(p), placement, size, threshold=threshold) for p in parts]
    )
    boxes = planes.boxes().to(scores.device)
    visible = boxes[:, 2] > boxes[:, 0]
    return Instances(placement.image_size, boxes, labels, planes, scores)[visible]
