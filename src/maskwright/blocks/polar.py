"""The head of PolarMask (arXiv 1909.13226), which FourierNet and others share: FCOS whose places also say a shape.

Every place of a pyramid gives a class, how central it is, the four distances to its object's box, and a short code for
the lengths of the rays that leave it in R directions. A mask is the polygon through their ends. What the code is, the
systems choose: anything with the face of `Code`.

Coordinates here count pixels from the centre of the first, as the published code does: the last column of an image is
W - 1 and a box from x0 to x1 is x1 - x0 + 1 wide. Targets and results are converted on the way in and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import fcos
from maskwright.blocks.trunk import normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.contours import Border, ray_points, rays_from
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_sum
from maskwright.ops.outlines import fill_contours, outer_contours
from maskwright.structures import Instances, Placement, Preprocess

LONGEST = 14.0  # of a log length: a wild guess of a million pixels stays finite


class Code(Protocol):
    """How the rays of a place are said in a few numbers."""

    @property
    def channels(self) -> int:
        """Numbers for each place."""
        ...

    @property
    def rays(self) -> int:
        """Rays that they stand for; a divisor of 360."""
        ...

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n r"]:
        """The lengths of the rays in pixels, in float32; differentiable."""
        ...

    def encode(self, rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n c"]:
        """The numbers that stand for these rays, as nearly as they can."""
        ...


@dataclass(frozen=True)
class PolarRaw:
    """What the head says of every place, by level, finest first."""

    classes: tuple[Float[Tensor, "b k _h _w"], ...]  # logits
    centerness: tuple[Float[Tensor, "b 1 _h _w"], ...]  # logits
    boxes: tuple[Float[Tensor, "b 4 _h _w"], ...]  # logs of l, t, r, b in pixels; none without a box branch
    codes: tuple[Float[Tensor, "b c _h _w"], ...]  # what the code's `decode` reads


@dataclass(frozen=True)
class PolarRules:
    """What the papers ablate.

    sampling    places around an object's "mass" centre or its "box"'s centre are its samples (PolarMask, section 3.2)
    centerness  how central a place is: "polar", sqrt(shortest / longest ray); "normalised", that over its value at the
                mass centre (FourierNet); "cartesian", FCOS's by the box
    mask_loss   "polar_iou"; "smooth_l1" on the rays in pixels; "code", smooth L1 on the code's numbers
    border      "pixels", as published: rays see the border's pixels alone, of small objects hardly any; "outline": they
                see the closed line through them (`ops.contours.rays_from`)
    offset      what the centerness is raised by before it multiplies the class probability
    """

    sampling: str = "mass"
    centerness: str = "polar"
    mask_loss: str = "polar_iou"
    border: Border = "pixels"
    offset: float = 0.5
    radius: float = 1.5

    def __post_init__(self) -> None:
        known = {
            "sampling": ("mass", "box"),
            "centerness": ("polar", "normalised", "cartesian"),
            "mask_loss": ("polar_iou", "smooth_l1", "code"),
            "border": ("pixels", "outline"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected {', '.join(values)}")


class PolarHead(nn.Module):
    """Three towers over all levels: class and centerness, box, shape; and one learnt factor per level for the last two.

    deformable  all convolutions of the towers
    boxes       without, a box is what its contour reaches
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        code: int,
        *,
        convs: int = 4,
        deformable: bool = False,
        boxes: bool = True,
        levels: int = 5,
    ):
        super().__init__()

        def tower() -> nn.Sequential:
            return fcos.tower(channels, convs, bias=False, deformable=deformable)

        self.class_tower, self.code_tower = tower(), tower()
        self.box_tower = tower() if boxes else None
        self.classes = fcos.output_conv(channels, classes, bias=-math.log(99))  # a probability of 0.01
        self.centerness = fcos.output_conv(channels, 1)
        self.boxes = fcos.output_conv(channels, 4) if boxes else None
        self.codes = fcos.output_conv(channels, code)
        self.box_scales = nn.ModuleList(fcos.Scale() for _ in range(levels if boxes else 0))
        self.code_scales = nn.ModuleList(fcos.Scale() for _ in range(levels))

    def forward(self, features: Sequence[Float[Tensor, "b c _h _w"]]) -> PolarRaw:
        classes, centerness, boxes, codes = [], [], [], []
        for level, feature in enumerate(features):
            about = self.class_tower(feature)
            classes.append(self.classes(about))
            centerness.append(self.centerness(about))
            if self.box_tower is not None and self.boxes is not None:
                boxes.append(self.box_scales[level](self.boxes(self.box_tower(feature))))
            codes.append(self.code_scales[level](self.codes(self.code_tower(feature))))
        return PolarRaw(tuple(classes), tuple(centerness), tuple(boxes), tuple(codes))


# ---- learning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolarTargets:
    """What the N places of one image have to say; rays and centerness only for the P that have an object."""

    labels: Int[Tensor, " n"]  # -1: no object
    inner: Float[Tensor, "n 4"]  # l, t, r, b to the object's box
    positive: Int[Tensor, " p"]
    rays: Float[Tensor, "p r"]
    centerness: Float[Tensor, " p"]


@torch.no_grad()
def polar_targets(
    places: Sequence[Float[Tensor, "_n 2"]],
    target: Instances,
    count: int,
    rules: PolarRules,
    centres: Float[Tensor, "g 2"] | None = None,
) -> PolarTargets:
    """Which place answers for which object, and the `count` rays from there to the object's border.

    An object is seen from within 1.5 strides around its mass centre, inside its box, at the level that its size asks
    for; the smallest box wins. `centres`: other ones than the outlines' own.
    """
    if target.masks is None and len(target):
        raise UsageError("a target has boxes but no masks; this system learns outlines, give a data set with masks")
    everywhere = torch.cat(list(places))
    if target.masks is None or not len(target):
        labels = torch.full((len(everywhere),), -1, dtype=torch.int64, device=everywhere.device)
        inner, rays = everywhere.new_zeros(len(labels), 4), everywhere.new_zeros(0, count)
        return PolarTargets(labels, inner, labels[:0], rays, rays[:, 0])
    contours = outer_contours(target.masks).to(everywhere.device)
    boxes = target.boxes.to(everywhere) - everywhere.new_tensor([0, 0, 1, 1])
    mass = contours.centres.to(everywhere).trunc() if centres is None else centres.to(everywhere)
    middle = mass if rules.sampling == "mass" else (boxes[:, :2] + boxes[:, 2:]) / 2
    middle = torch.where((contours.counts > 0)[:, None], middle, torch.nan)  # what has no pixels is sampled nowhere
    owner, inner = fcos.assign(
        everywhere,
        fcos.per_location(places, fcos.STRIDES),
        fcos.per_location(places, fcos.RANGES),
        boxes,
        centres=middle,
        radius=rules.radius,
        plus_one=True,
    )
    positive = (owner >= 0).nonzero().flatten()
    mine = owner[positive]
    rays = rays_from(contours, mine, everywhere[positive], count, border=rules.border)
    if rules.centerness == "cartesian":
        central = fcos.centerness(inner[positive])
    else:
        central = polar_centerness(rays)
        if rules.centerness == "normalised":
            rows = torch.arange(len(mass), device=mass.device)
            highest = rays_from(contours, rows, mass.nan_to_num(0), count, border=rules.border)
            best = polar_centerness(highest)[mine]
            central = torch.where(best > 0, central / best, central).clamp(max=1)
    labels = torch.where(owner >= 0, target.labels.to(owner)[owner.clamp(min=0)], -1)
    return PolarTargets(labels, inner, positive, rays, central)


def polar_losses(raw: PolarRaw, targets: Sequence[PolarTargets], code: Code, rules: PolarRules) -> dict[str, Tensor]:
    """`class`, `box`, `mask`, `centerness`; box and mask weigh a place by how central it is."""
    logits, central, values = (_rows(levels) for levels in (raw.classes, raw.centerness, raw.codes))
    labels = torch.cat([t.labels for t in targets])
    offsets = torch.arange(len(targets), device=labels.device) * len(targets[0].labels)
    positive = torch.cat([t.positive + o for t, o in zip(targets, offsets, strict=True)])
    rays, weights = torch.cat([t.rays for t in targets]), torch.cat([t.centerness for t in targets])
    inner = torch.cat([t.inner for t in targets])[positive]

    count = positive.new_tensor([len(positive) + len(targets), len(positive)])
    with_images, alone = global_mean_count(count).unbind()
    total = global_mean_count(weights.sum(), minimum=1e-6)

    truth = torch.zeros_like(logits)
    truth[positive, labels[positive]] = 1
    chosen = values[positive]
    predicted = code.decode(chosen)
    if rules.mask_loss == "polar_iou":
        shape = polar_iou_loss(predicted, rays)
    elif rules.mask_loss == "smooth_l1":
        shape = functional.smooth_l1_loss(predicted, rays, reduction="none").mean(1)
    else:
        goal = code.encode(rays.clamp(min=1))  # logs of rays that met nothing would be all there is to learn
        shape = functional.smooth_l1_loss(chosen, goal, reduction="none").mean(1)
    reach = _rows(raw.boxes)[positive].clamp(max=LONGEST).exp() if raw.boxes else _reach(predicted)
    return {
        "class": focal_sum(logits, truth) / with_images,
        "box": (box_loss(reach, inner) * weights).sum() / total,
        "mask": (shape * weights).sum() / total,
        "centerness": functional.binary_cross_entropy_with_logits(central[positive, 0], weights, reduction="sum")
        / alone,
    }


def polar_centerness(rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
    """sqrt(shortest / longest) (section 3.3): small where a place sees its object lopsidedly."""
    return (rays.amin(-1) / rays.amax(-1).clamp(min=1e-6)).sqrt()


def polar_iou_loss(predicted: Float[Tensor, "n r"], rays: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
    """log(sum of the longer / sum of the shorter) over the rays (eq. 8): an IoU whose squares are left out."""
    return (torch.maximum(predicted, rays).sum(1) / torch.minimum(predicted, rays).sum(1).clamp(min=1e-6)).log()


def box_loss(predicted: Float[Tensor, "n 4"], inner: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """-log IoU of two boxes that lie l, t, r, b around the same place and count their last pixels."""
    both = _area(torch.minimum(predicted, inner))
    return -(both / (_area(predicted) + _area(inner) - both)).clamp(min=1e-6).log()


def _area(inner: Tensor) -> Tensor:
    return ((inner[:, :2] + inner[:, 2:] + 1).clamp(min=0)).prod(1)


def _reach(rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n 4"]:
    """l, t, r, b of the box around the rays' ends."""
    ends = ray_points(rays.new_zeros(*rays.shape[:-1], 2), rays)
    return torch.cat([-ends.amin(-2), ends.amax(-2)], -1)


def _rows(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "n c"]:
    """One row per place: all of the first image, level by level, then the second image's."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).flatten(0, 1).float()


# ---- objects -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """Objects of one image, best first, in its pixels, which are counted from the centre of the first."""

    boxes: Float[Tensor, "d 4"]  # the last pixels included
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    contours: Float[Tensor, "d r 2"]


@dataclass(frozen=True)
class Thresholds:
    """`score` is on the class probability alone, `final` on the finished score; `before` places of each level are
    looked at."""

    score: float = 0.05
    nms: float = 0.5
    detections: int = 100
    before: int = 1000
    final: float = 0.0

    @classmethod
    def asked(cls, score: float, nms: float, detections: int, before: int) -> Thresholds:
        """For a score that a person asks for. As published the class alone has to exceed 0.05; asked for more than
        that, no object shall score less."""
        return cls(score, nms, detections, before, score if score > cls.score else 0.0)


@torch.no_grad()
def polar_find(
    raw: PolarRaw, index: int, placement: Placement, code: Code, rules: PolarRules, limits: Thresholds
) -> Detections:
    """The objects of image `index`.

    A place may be an object of every class whose own probability exceeds the threshold. Its score is that probability
    times (centerness + 0.5), which can exceed 1; but places are ranked without the half.
    """
    height, width = placement.size
    rows = []
    for level, where in enumerate(fcos.locations(raw.classes)):
        kinds = (raw.classes, raw.centerness, raw.codes, raw.boxes or raw.codes)
        classes, central, numbers, logs = (levels[level][index].flatten(1).T.float() for levels in kinds)
        classes, central = classes.sigmoid(), central.sigmoid()
        best = (classes * central).amax(1).topk(min(limits.before, len(classes))).indices
        numbers, logs = numbers[best], logs[best]
        reach = logs.clamp(max=LONGEST).exp() if raw.boxes else _reach(code.decode(numbers))
        rows.append((where[best], classes[best], central[best, 0], numbers, reach))
    everywhere, each, central, numbers, reach = (torch.cat(parts) for parts in zip(*rows, strict=True))
    limit = everywhere.new_tensor([width - 1, height - 1])
    corners = fcos.boxes_of(everywhere, reach).view(-1, 2, 2).clamp(min=0).minimum(limit)
    corners = _on_image(corners, placement)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)  # a mirror swaps left and right
    row, label = (each > limits.score).nonzero().unbind(1)
    score = each[row, label] * (central[row] + rules.offset)
    kept = box_ops.nms(_with_last(boxes[row]), score, label, limits.nms, limits.detections)
    row = row[kept]
    ends = ray_points(everywhere[row], code.decode(numbers[row])).clamp(min=0).minimum(limit)
    return Detections(boxes[row], score[kept], label[kept], _on_image(ends, placement))


def polar_decode(
    raw: PolarRaw, placements: Sequence[Placement], code: Code, rules: PolarRules, limits: Thresholds
) -> list[Instances]:
    """Finished objects; see `polar_find`. Masks are filled on the host, each on the pixels of its own box."""
    result = []
    for index, placement in enumerate(placements):
        found = polar_find(raw, index, placement, code, rules, limits)
        masks = fill_contours(found.contours, placement.image_size)
        boxes = box_ops.clip(_with_last(found.boxes), placement.image_size)
        result.append(Instances(placement.image_size, boxes, found.labels, masks, found.scores))
    return result


def _with_last(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Boxes that count their last pixels -> continuous ones."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def _on_image(points: Float[Tensor, "*n 2"], placement: Placement) -> Float[Tensor, "*n 2"]:
    """Pixel numbers on the input -> on the image; as published, without the half pixel that a resize shifts them."""
    points = placement.points_to_image(points)
    return points - points.new_tensor([1, 0]) if placement.mirrored else points


# ---- for the constructors ----------------------------------------------------------------------------------------

_PREPROCESS = {
    "caffe": Preprocess(
        resample="opencv", mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "imagenet": Preprocess(resample="opencv"),
}  # fmt: skip


def polar_preprocess(
    colours: str, in_channels: int, short: int, long: int, canvas: Sequence[int] | None, multiple: int
) -> Preprocess:
    """What the published systems do to an image; with a canvas every image is stretched to it."""
    if colours not in _PREPROCESS:
        raise UsageError(f"colours is {colours!r}; expected {' or '.join(_PREPROCESS)}")
    if multiple < 32 or multiple % 32:
        raise UsageError(f"multiple is {multiple}; the pyramid needs a multiple of 32, at least 32")
    if canvas is not None and (len(canvas) != 2 or min(canvas) < 1):
        raise UsageError(f"canvas is {canvas!r}; expected a height and a width in pixels, both at least 1")
    base = replace(_PREPROCESS[colours], short=short, long=long, multiple=multiple)
    if canvas is not None:
        base = replace(base, fit="stretch", canvas=(int(canvas[0]), int(canvas[1])))
    return normalization_for(base, in_channels)
