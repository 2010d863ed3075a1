"""Objects by place (SOLO, arXiv 1912.04488): each level of a pyramid is looked at as a grid of S x S cells.

The cell that holds an object's centre says what it is and names the object's mask. What SOLO, Decoupled SOLO and SOLOv2
share is here: how levels are prepared, which cells learn which object, point and Matrix NMS. How a cell names its mask
is what the three differ in; they hand over a function from cells to masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss

from maskwright.blocks.fcos import output_conv
from maskwright.blocks.layers import ConvNorm, DeformConvNorm
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import dice, focal_sum
from maskwright.ops.planes import place_planes
from maskwright.ops.suppression import mask_iou, mask_nms, matrix_nms
from maskwright.structures import Instances, Masks, Placement

GRIDS = (40, 36, 24, 16, 12)
STRIDES = (8, 8, 16, 32, 32)  # of the prepared levels
# Square roots of the areas of the boxes that each level learns, both ends included: an object may have two levels.
RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
PRIOR = -math.log(99)  # bias of an output whose probability is to begin at 0.01

Deform = Literal["no", "last", "all"]
MaskLoss = Literal["dice", "focal", "bce"]


# ---- network ---------------------------------------------------------------------------------------------------------


def check_cells(grids: Sequence[int], ranges: Sequence[Sequence[float]], head_convs: int) -> None:
    """UsageError for options of a system's constructor that no network can be built from."""
    if not len(grids) == len(ranges) == len(STRIDES):
        raise UsageError(f"grids has {len(grids)} entries, ranges {len(ranges)}; there are {len(STRIDES)} levels")
    if min(grids) < 1:
        raise UsageError(f"grids is {list(grids)}; a grid of S x S cells has an S of at least 1")
    if any(len(pair) != 2 for pair in ranges):
        raise UsageError(f"ranges is {[list(pair) for pair in ranges]}; expected (lowest, highest) for each level")
    if head_convs < 1:
        raise UsageError(f"head_convs is {head_convs}; both branches need at least 1 convolution before their outputs")


def prepare_levels(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> list[Float[Tensor, "b c _h _w"]]:
    """P2 ... P6 of strides 4 ... 64 -> strides 8, 8, 16, 32, 32: the finest is halved, the coarsest as large as the
    one before."""
    finest = functional.interpolate(levels[0], scale_factor=0.5, mode="bilinear", align_corners=False)
    coarsest = functional.interpolate(levels[4], size=levels[3].shape[-2:], mode="bilinear", align_corners=False)
    return [finest, *levels[1:4], coarsest]


def coordinates(feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
    """x, then y, from -1 in the first column or row to 1 in the last (CoordConv, arXiv 1807.03247)."""
    count, _, height, width = feature.shape
    x = torch.linspace(-1, 1, width, device=feature.device).expand(height, width)
    y = torch.linspace(-1, 1, height, device=feature.device)[:, None].expand(height, width)
    return torch.stack([x, y]).to(feature.dtype).expand(count, 2, height, width)


def tower(channels_in: int, channels: int, convs: int, deform: Deform = "no", modulated: bool = False) -> nn.Sequential:
    """3 x 3 convolutions with group norm and ReLU; the last or all of them deformable."""
    layers: list[nn.Module] = []
    for number in range(convs):
        deformable = deform == "all" or (deform == "last" and number == convs - 1)
        layers.append(conv_norm(channels_in if number == 0 else channels, channels, 3, deformable, modulated))
    return nn.Sequential(*layers)


def conv_norm(channels_in: int, channels: int, kernel: int, deformable: bool, modulated: bool) -> nn.Module:
    """Convolution without bias, group norm, ReLU; weights begin as normal 0.01."""
    if deformable:
        layer = DeformConvNorm(channels_in, channels, kernel, modulated=modulated, norm="group", relu=True)
        nn.init.normal_(layer.weight, std=0.01)
        return layer
    layer = ConvNorm(channels_in, channels, kernel, norm="group", relu=True)
    nn.init.normal_(layer.conv.weight, std=0.01)
    return layer


class GridBranch(nn.Module):
    """A level resized to its grid, a tower, and `outputs` values for each cell."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        convs: int,
        outputs: int,
        *,
        bias: float = 0.0,
        deform: Deform = "no",
        modulated: bool = False,
        align: Literal["interpolate", "pool"] = "interpolate",
    ):
        super().__init__()
        self.align = align
        self.convs = tower(channels_in, channels, convs, deform, modulated)
        self.output = output_conv(channels, outputs, bias)

    def forward(self, x: Float[Tensor, "b c h w"], grid: int) -> Float[Tensor, "b k s s"]:
        if self.align == "pool":
            x = functional.adaptive_avg_pool2d(x, grid)
        else:  # two taps a side, also where the level is much finer than the grid
            x = functional.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False)
        return self.output(self.convs(x))


def flat(levels: Sequence[Float[Tensor, "b k _s _s"]]) -> Float[Tensor, "b c k"]:
    """Values of all cells, level by level, row by row."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


def per_cell(grids: Sequence[int], values: Sequence[float], device: torch.device) -> Float[Tensor, " c"]:
    """A value of each level for each of its cells."""
    return torch.cat([torch.full((g * g,), float(v), device=device) for g, v in zip(grids, values, strict=True)])


def by_level(cells: Int[Tensor, " n"], grids: Sequence[int]) -> list[Int[Tensor, " _n"]]:
    """Cells in order, counted over all levels -> those of each level, counted in it."""
    parts, first = [], 0
    for grid in grids:
        parts.append(cells[(cells >= first) & (cells < first + grid * grid)] - first)
        first += grid * grid
    return parts


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objects:
    """What is to be learnt of one image."""

    boxes: Float[Tensor, "n 4"]  # in the original's convention, input pixels
    labels: Int[Tensor, " n"]
    centres: Float[Tensor, "n 2"]  # x, y: mean indices of the mask's pixels
    solid: Bool[Tensor, " n"]  # has a mask with pixels
    planes: dict[int, Bool[Tensor, "n _h _w"]]  # stride -> the masks on a grid of that stride


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
    """The objects of a target, crowd left out, on an input of `size` (H, W), padding included.

    strides    for which masks are made: a cell is 1 where at least two of the four pixels in its middle are (a mask
               shrunk bilinearly without anti-aliasing, rounded half up)
    inclusive  boxes end at their last pixel, as in the first versions of MMDetection: ours end one further
    budget     bytes of scratch: so many masks are whole planes at a time
    """
    target = target if target.crowd is None else target[~target.crowd]
    if target.masks is None and len(target):
        raise UsageError(
            "a target has boxes but no masks; these systems learn from masks, give a data set that has them"
        )
    count, (height, width) = len(target), size
    centres = torch.zeros(count, 2, device=device)
    areas = torch.zeros(count, device=device)
    planes = {s: torch.zeros(count, height // s, width // s, dtype=torch.bool, device=device) for s in set(strides)}
    exact = torch.float32 if device.type == "mps" else torch.float64  # which that device does not have
    x, y = (torch.arange(n, device=device, dtype=exact) for n in (width, height))
    step = max(1, budget // (4 * height * width))
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        assert target.masks is not None
        masks = target.masks[rows].dense(device)
        masks = functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))
        columns, lines = masks.sum(1), masks.sum(2)
        area = lines.sum(1)
        total = area.clamp(min=1)
        centre_x, centre_y = columns.to(exact) @ x / total, lines.to(exact) @ y / total
        areas[rows], centres[rows] = area.float(), torch.stack([centre_x, centre_y], 1).float()
        for stride, plane in planes.items():
            plane[rows] = _middles(masks, stride)
    boxes = target.boxes.to(device).float()
    if inclusive:
        boxes = boxes - boxes.new_tensor([0, 0, 1, 1])
    return Objects(boxes, target.labels.to(device), centres, areas > 0, planes)


def _middles(masks: Bool[Tensor, "n h w"], stride: int) -> Bool[Tensor, "n _p _q"]:
    height, width = (length // stride * stride for length in masks.shape[1:])
    half, counts = stride // 2, 0
    for down in (half - 1, half):
        for across in (half - 1, half):
            counts = counts + masks[:, down:height:stride, across:width:stride].to(torch.uint8)
    return counts >= 2  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Positives:
    """The cells of one level that learn a mask: in the order of the objects, then of rows and columns."""

    cells: Int[Tensor, " p"]  # row * S + column; a cell that several objects claim comes several times
    owners: Int[Tensor, " p"]  # the object's row

    def latest(self, count: int) -> Int[Tensor, " c"]:
        """For each of `count` cells the last object that claims it, -1 for none."""
        owner = torch.full((count,), -1, dtype=torch.int64, device=self.cells.device)
        return owner.scatter_reduce(0, self.cells, self.owners, "amax")

    def once(self, count: int) -> Positives:
        """Each claimed cell once, cells in order, with the last object that claims it."""
        owner = self.latest(count)
        cells = (owner >= 0).nonzero().flatten()
        return Positives(cells, owner[cells])


def joined(levels: Sequence[Positives], grids: Sequence[int]) -> Positives:
    """Positives of all levels as one list, cells counted over all levels."""
    cells, first = [], 0
    for level, grid in zip(levels, grids, strict=True):
        cells.append(level.cells + first)
        first += grid * grid
    return Positives(torch.cat(cells), torch.cat([level.owners for level in levels]))


@torch.no_grad()
def assign(
    objects: Objects,
    size: tuple[int, int],
    grids: Sequence[int] = GRIDS,
    ranges: Sequence[tuple[float, float]] = RANGES,
    sigma: float = 0.2,
) -> list[Positives]:
    """For each level the cells that learn: those that a box of `sigma` times the object's, around the centre of mass of
    its mask, touches, at most one away from the centre's own (so 1 to 9)."""
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    scale = sides.prod(1).clamp(min=0).sqrt()
    extent = scale.new_tensor([size[1], size[0]])
    half = 0.5 * sides * sigma
    shift = torch.arange(-1, 2, device=scale.device)
    result = []
    for grid, (low, high) in zip(grids, ranges, strict=True):
        rows = ((scale >= low) & (scale <= high) & objects.solid).nonzero().flatten()
        # Divided by 1 / S as the original does: in floating point this is not the same as times S, rounded down.
        centre, first, last = (
            (place[rows] / extent).div(1.0 / grid, rounding_mode="floor").long()
            for place in (objects.centres, objects.centres - half, objects.centres + half)
        )
        around = centre[:, None] + shift[:, None]  # (k, 3, 2): x, y
        good = (around >= first.clamp(min=0)[:, None]) & (around <= last.clamp(max=grid - 1)[:, None])
        good = good[:, :, None, 1] & good[:, None, :, 0]  # (k, 3 rows, 3 columns)
        cells = around[:, :, None, 1] * grid + around[:, None, :, 0]
        result.append(Positives(cells[good], rows[:, None, None].expand_as(good)[good]))
    return result


# ---- losses ----------------------------------------------------------------------------------------------------------


def class_labels(
    objects: Sequence[Objects], positives: Sequence[Sequence[Positives]], grids: Sequence[int]
) -> Int[Tensor, "b c"]:
    """The class of each cell of each image, -1 where there is none; later objects win."""
    rows = []
    for own, levels in zip(objects, positives, strict=True):
        owner = torch.cat([level.latest(grid * grid) for level, grid in zip(levels, grids, strict=True)])
        labels = torch.cat([own.labels, own.labels.new_full((1,), -1)])  # the owner -1 reads the last
        rows.append(labels[owner])
    return torch.stack(rows)


def class_loss(
    logits: Float[Tensor, "b c k"], labels: Int[Tensor, "b c"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, ""]:
    """Focal loss of all cells and classes, over one more than the number of positive cells."""
    truth = functional.one_hot(labels + 1, logits.shape[2] + 1)[..., 1:]
    count = global_mean_count((labels >= 0).sum(), minimum=0, more=1)
    return focal_sum(logits.float(), truth.float(), alpha, gamma) / count


def mask_loss_sum(
    soft: Callable[[Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    positives: Positives,
    planes: Bool[Tensor, "m h w"],
    kind: MaskLoss = "dice",
    budget: int = 64 << 20,
) -> Float[Tensor, ""]:
    """Sum over the positives of the loss between `soft(cells)`, probabilities, and the owners' masks.

    budget  bytes of the largest intermediate: with more positives than fit, each part is computed once more on the way
            back instead of being kept
    """

    def part(rows: Tensor) -> Tensor:
        found = soft(positives.cells[rows]).float().flatten(1)
        truth = planes[positives.owners[rows]].flatten(1).float()
        if kind == "dice":
            return dice(found, truth).sum()
        logits = torch.logit(found, 1e-6)
        if kind == "bce":
            return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / truth.shape[1]
        return (sigmoid_focal_loss(logits, truth).sum(1) / truth.sum(1).clamp(min=1)).sum()  # over its positive pixels

    rows = torch.arange(len(positives.cells), device=planes.device)
    step = max(1, budget // (4 * max(1, planes.shape[1] * planes.shape[2])))
    if len(rows) <= step:
        return part(rows)
    parts = [checkpoint(part, own, use_reentrant=False) for own in rows.split(step)]
    return torch.stack([p for p in parts if isinstance(p, Tensor)]).sum()


# ---- objects ---------------------------------------------------------------------------------------------------------


def point_nms(scores: Float[Tensor, "b k s s"]) -> Float[Tensor, "b k s s"]:
    """Scores that none of their left, upper and upper left neighbours exceeds; the others become 0."""
    best = functional.max_pool2d(scores, 2, stride=1, padding=1)[..., :-1, :-1]
    return scores * (best == scores)


@dataclass(frozen=True)
class Suppression:
    """How cells become objects. Defaults are the published ones."""

    score_threshold: float = 0.05  # of finished objects
    candidate_threshold: float = 0.1  # of cells, before their masks are made
    nms_threshold: float | None = None  # None: Matrix NMS; a number: overlap above which the worse of a class goes
    kernel: Literal["gaussian", "linear"] = "gaussian"
    sigma: float = 2.0
    before: int = 500  # candidates that suppression sees
    detections: int = 100


@torch.no_grad()
def find(
    scores: Float[Tensor, "c k"],
    smallest: Float[Tensor, " c"],
    soft: Callable[[Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    rules: Suppression,
    pixels: int,
    budget: int | None = None,
) -> tuple[Float[Tensor, "d h w"], Float[Tensor, " d"], Int[Tensor, " d"]]:
    """Masks as probabilities, scores and labels of one image, best first.

    scores    of each cell and class, after point NMS
    smallest  a mask must have more cells above 0.5 than this: the stride of its level
    soft      the masks that some cells (in order) name, all on one grid of `pixels` cells; asked for candidates only
    budget    bytes of scratch for the masks of candidates, so many at a time; None: 256 MB on an accelerator, and 32 MB
              on the host, whose caches are quicker than its memory. A byte for each pixel of a candidate is kept
    """
    cells, labels = (scores > rules.candidate_threshold).nonzero(as_tuple=True)
    named, row = cells.unique(return_inverse=True)  # a cell may be a candidate of several classes
    if budget is None:
        budget = (32 if scores.device.type == "cpu" else 256) << 20
    solid = torch.zeros(len(named), pixels, dtype=torch.bool, device=scores.device)
    areas, certainty = scores.new_zeros(len(named)), scores.new_zeros(len(named))
    at_once = max(1, budget // (12 * pixels))
    for first in range(0, len(named), at_once):
        part = slice(first, first + at_once)
        masks = soft(named[part]).flatten(1)
        inside = (masks > 0.5).to(masks.dtype)
        solid[part], areas[part] = inside, inside.sum(1)  # pyright: ignore[reportArgumentType]
        certainty[part] = masks.mul_(inside).sum(1) / areas[part].clamp(min=1)
    good = areas[row] > smallest[cells]
    cells, labels, row = cells[good], labels[good], row[good]
    values, order = (scores[cells, labels] * certainty[row]).sort(descending=True, stable=True)
    order, values = order[: rules.before], values[: rules.before]
    cells, labels, row = cells[order], labels[order], row[order]
    iou = mask_iou(solid[row], labels)
    if rules.nms_threshold is None:
        values = matrix_nms(iou, values, labels, rules.kernel, rules.sigma)
    else:
        values = values * mask_nms(iou, labels, rules.nms_threshold)
    values, order = values.sort(descending=True, stable=True)
    keep = order[(values >= rules.score_threshold) & (values > 0)][: rules.detections]
    named, row = cells[keep].unique(return_inverse=True)
    return soft(named)[row], values[: len(keep)], labels[keep]


@torch.no_grad()
def decode_cells(
    classes: Sequence[Float[Tensor, "b k _s _s"]],
    grids: Sequence[int],
    soft: Callable[[int, Int[Tensor, " n"]], Float[Tensor, "n h w"]],
    plane: tuple[int, int],
    placements: Sequence[Placement],
    size: tuple[int, int],
    rules: Suppression,
    mask_threshold: float = 0.5,
    finer: Callable[[int, Float[Tensor, "n h w"]], Float[Tensor, "n _p _q"]] | None = None,
) -> list[Instances]:
    """Finished objects of every image.

    classes  logits of each level
    soft     the masks that some cells (counted over all levels, in order) of image i name, on one grid of `plane`
    size     H, W of the input, padding included
    finer    makes finer probabilities of some masks of image i: see `on_image`
    """
    scores = flat([point_nms(level.float().sigmoid()) for level in classes])
    smallest = per_cell(grids, STRIDES, scores.device)
    result = []
    for image, (own, placement) in enumerate(zip(scores, placements, strict=True)):
        found = find(own, smallest, partial(soft, image), rules, plane[0] * plane[1])
        own_finer = None if finer is None else partial(finer, image)
        result.append(on_image(*found, placement, size, mask_threshold, own_finer))
    return result


@torch.no_grad()
def on_image(
    masks: Float[Tensor, "d h w"],
    scores: Float[Tensor, " d"],
    labels: Int[Tensor, " d"],
    placement: Placement,
    size: tuple[int, int],
    threshold: float = 0.5,
    finer: Callable[[Float[Tensor, "n h w"]], Float[Tensor, "n _p _q"]] | None = None,
    budget: int = 64 << 20,
) -> Instances:
    """Finished objects from masks that cover the input of `size` (H, W). Boxes are those around the masks: none are
    predicted. What lies in the padding alone is dropped.

    finer   makes finer probabilities of some of the masks, as many at a time as `budget` bytes hold at the input's size
    """
    parts = masks.split(max(1, budget // (4 * size[0] * size[1]))) if finer is not None else [masks]
    planes = Masks.join(
        [place_planes(p if finer is None else finer(p), placement, size, threshold=threshold) for p in parts]
    )
    boxes = planes.boxes().to(scores.device)
    there = boxes[:, 2] > boxes[:, 0]
    return Instances(placement.image_size, boxes, labels, planes, scores)[there]
