"""PolarMask (Xie, Sun, Song, Wang, Liu, Liang, Shen, Luo, CVPR 2020, arXiv 1909.13226).

An instance is represented by its contour in polar coordinates: a centre, and the distance of the contour in 36
directions. Instance segmentation then is FCOS with a third branch: every location of the pyramid predicts its class and
regresses 36 lengths in the same way as the four distances to the sides of a box. There is no mask decoder and no
cropping of features.

Three parts of the method matter: an object's samples are the locations around its centre of mass instead of its box's
centre; Polar Centerness, sqrt(shortest ray / longest ray), lowers the weight and the score of locations from which an
object extends much further in one direction than in another; and Polar IoU Loss, log(sum max / sum min), treats all
rays together as one overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import fcos
from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.contours import ray_points, rays_from
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_sum
from maskwright.ops.outlines import outer_contours
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.polar import (
    BACKBONE,
    HEAD,
    LONGEST,
    RENAMED_OPTIONS,
    RENAMED_PARAMETERS,
    RESIZE,
    RULES,
    Code,
    Normalization,
    PolarDense,
    PolarDetections,
    PolarHead,
    PolarHeadLike,
    PolarRaw,
    PolarRules,
    PolarRulesLike,
    pixels_on_image,
    polar_instances,
    polar_preprocess,
    rows_of,
    with_last_pixel,
)
from maskwright.systems.system import ClassRows, System


@dataclass(frozen=True)
class RayCode:
    """One number per ray: the logarithm of its length in pixels (section 3.2).

    Attributes:
        rays: Number of rays.
    """

    rays: int = 36

    @property
    def channels(self) -> int:
        return self.rays

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return values.float().clamp(max=LONGEST).exp()

    def encode(self, rays: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return rays.log()


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolarTargets:
    """Targets of the N locations of one image.

    Attributes:
        labels: Class indices; -1 for background.
        inner: Distances l, t, r, b to the box of the location's object.
        positive: Indices of the P locations with an object.
        rays: Lengths of their rays in pixels.
        centerness: Their centerness, which is also the weight of their box and rays.
    """

    labels: Int[Tensor, " n"]
    inner: Float[Tensor, "n 4"]
    positive: Int[Tensor, " p"]
    rays: Float[Tensor, "p r"]
    centerness: Float[Tensor, " p"]


@torch.no_grad()
def polar_targets(
    points: Sequence[Float[Tensor, "_n 2"]],
    target: Instances,
    count: int,
    rules: PolarRules,
    centres: Float[Tensor, "g 2"] | None = None,
) -> PolarTargets:
    """Assigns locations to objects and measures the rays from there to the objects' borders (section 3.2).

    The samples of an object are the locations within 1.5 strides of its centre of mass and inside its box, on the level
    for its size. Of several objects the one with the smallest box is chosen.

    Args:
        points: Locations x, y by level.
        target: The objects of the image.
        count: Number of rays.
        rules: Sampling, centerness and border.
        centres: Centres of mass x, y; default those of the contours, truncated to integers.
    """
    everywhere = torch.cat(list(points))
    if target.masks is None or not len(target):
        labels = torch.full((len(everywhere),), -1, dtype=torch.int64, device=everywhere.device)
        inner, rays = everywhere.new_zeros(len(labels), 4), everywhere.new_zeros(0, count)
        return PolarTargets(labels, inner, labels[:0], rays, rays[:, 0])
    contours = outer_contours(target.masks).to(everywhere.device)
    boxes = target.boxes.to(everywhere) - everywhere.new_tensor([0, 0, 1, 1])
    mass = contours.centres.to(everywhere).trunc() if centres is None else centres.to(everywhere)
    middle = mass if rules.sampling == "mass" else (boxes[:, :2] + boxes[:, 2:]) / 2
    middle = torch.where((contours.counts > 0)[:, None], middle, torch.nan)  # an empty mask has no samples
    owner, inner = fcos.assign(
        everywhere,
        fcos.per_location(points, fcos.STRIDES),
        fcos.per_location(points, fcos.RANGES),
        boxes,
        centres=middle,
        radius=rules.radius,
        plus_one=True,
    )
    positive = (owner >= 0).nonzero().flatten()
    own = owner[positive]
    rays = rays_from(contours, own, everywhere[positive], count, border=rules.border)
    if rules.centerness == "cartesian":
        central = fcos.centerness(inner[positive])
    else:
        central = polar_centerness(rays)
        if rules.centerness == "normalised":
            rows = torch.arange(len(mass), device=mass.device)
            highest = rays_from(contours, rows, mass.nan_to_num(0), count, border=rules.border)
            best = polar_centerness(highest)[own]
            central = torch.where(best > 0, central / best, central).clamp(max=1)
    labels = torch.where(owner >= 0, target.labels.to(owner)[owner.clamp(min=0)], -1)
    return PolarTargets(labels, inner, positive, rays, central)


def polar_centerness(rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n"]:
    """Computes sqrt(shortest / longest ray) (section 3.3)."""
    return (rays.amin(-1) / rays.amax(-1).clamp(min=1e-6)).sqrt()


# ---- losses ----------------------------------------------------------------------------------------------------------


def polar_losses(raw: PolarRaw, targets: Sequence[PolarTargets], code: Code, rules: PolarRules) -> dict[str, Tensor]:
    """Computes the losses of a batch (section 3.4), with counts taken over all devices.

    Args:
        raw: Raw output of the network.
        targets: Targets of each image.
        code: Between the network's output and rays.
        rules: The loss of the masks.

    Returns:
        `class`: focal loss over the number of positive locations and images. `box`: -log IoU; `mask`: Polar IoU loss;
        both are means weighted by centerness. `centerness`: binary cross-entropy over the number of positive locations.
    """
    logits, central, values = (rows_of(levels) for levels in (raw.classes, raw.centerness, raw.codes))
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
        goal = code.encode(rays.clamp(min=1))  # else logarithms of rays that meet nothing would dominate
        shape = functional.smooth_l1_loss(chosen, goal, reduction="none").mean(1)
    extent = rows_of(raw.boxes)[positive].clamp(max=LONGEST).exp() if raw.boxes else extent_of(predicted)
    return {
        "class": focal_sum(logits, truth) / with_images,
        "box": (box_loss(extent, inner) * weights).sum() / total,
        "mask": (shape * weights).sum() / total,
        "centerness": functional.binary_cross_entropy_with_logits(central[positive, 0], weights, reduction="sum")
        / alone,
    }


def polar_iou_loss(predicted: Float[Tensor, "n r"], rays: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
    """Computes log(sum of the longer / sum of the shorter) over the rays (eq. 8)."""
    return (torch.maximum(predicted, rays).sum(1) / torch.minimum(predicted, rays).sum(1).clamp(min=1e-6)).log()


def box_loss(predicted: Float[Tensor, "n 4"], inner: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """Computes -log IoU of two boxes given by l, t, r, b from the same location, with the last pixels included."""
    both = _area(torch.minimum(predicted, inner))
    return -(both / (_area(predicted) + _area(inner) - both)).clamp(min=1e-6).log()


def _area(inner: Tensor) -> Tensor:
    return ((inner[:, :2] + inner[:, 2:] + 1).clamp(min=0)).prod(1)


def extent_of(rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n 4"]:
    """Computes l, t, r, b of the box around the ends of the rays."""
    ends = ray_points(rays.new_zeros(*rays.shape[:-1], 2), rays)
    return torch.cat([-ends.amin(-2), ends.amax(-2)], -1)


# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """What is kept of an image's locations.

    Attributes:
        score: Lower bound of the class probability.
        nms: IoU from which a box is suppressed by a better one of its class.
        detections: Maximum number of objects.
        before: Number of locations per level that are considered.
        final: Lower bound of the score.
    """

    score: float = 0.05
    nms: float = 0.5
    detections: int = 100
    before: int = 1000
    final: float = 0.0

    @classmethod
    def requested(cls, score: float, nms: float, detections: int, before: int) -> Thresholds:
        """The thresholds for a score that a user requests. In the published code only the class probability has to
        exceed 0.05; a higher value applies to the score too."""
        return cls(score, nms, detections, before, score if score > cls.score else 0.0)


@torch.no_grad()
def polar_detections(
    raw: PolarRaw, index: int, placement: Placement, code: Code, rules: PolarRules, limits: Thresholds
) -> PolarDetections:
    """Selects the objects of one image and assembles their contours (section 3.2).

    A location can be an object of each class whose probability exceeds the threshold. Its score is that probability
    times (centerness + 0.5); locations of a level are ranked without the 0.5.

    Args:
        raw: Raw output of the network.
        index: Number of the image in the batch.
        placement: How the image was placed in the network's input.
        code: From the network's output to rays.
        rules: The offset of the centerness.
        limits: Thresholds and numbers.
    """
    height, width = placement.size
    rows = []
    for level, points in enumerate(fcos.locations(raw.classes)):
        outputs = (raw.classes, raw.centerness, raw.codes, raw.boxes or raw.codes)
        classes, central, values, logs = (levels[level][index].flatten(1).T.float() for levels in outputs)
        classes, central = classes.sigmoid(), central.sigmoid()
        best = (classes * central).amax(1).topk(min(limits.before, len(classes))).indices
        values, logs = values[best], logs[best]
        extent = logs.clamp(max=LONGEST).exp() if raw.boxes else extent_of(code.decode(values))
        rows.append((points[best], classes[best], central[best, 0], values, extent))
    points, classes, central, values, extent = (torch.cat(parts) for parts in zip(*rows, strict=True))
    limit = points.new_tensor([width - 1, height - 1])
    corners = fcos.boxes_from_distances(points, extent).view(-1, 2, 2).clamp(min=0).minimum(limit)
    corners = pixels_on_image(corners, placement)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)  # mirroring exchanges left and right
    scores = classes * (central[:, None] + rules.offset)
    row, label = ((classes > limits.score) & (scores >= limits.final)).nonzero().unbind(1)
    score = scores[row, label]
    kept = box_ops.nms(with_last_pixel(boxes[row]), score, label, limits.nms, limits.detections)
    row = row[kept]
    ends = ray_points(points[row], code.decode(values[row])).clamp(min=0).minimum(limit)
    return PolarDetections(boxes[row], score[kept], label[kept], pixels_on_image(ends, placement))


def polar_decode(
    raw: PolarRaw, placements: Sequence[Placement], code: Code, rules: PolarRules, limits: Thresholds
) -> list[Instances]:
    """Selects the objects of each image and fills their contours on the CPU; see `polar_detections`."""
    return [
        polar_instances(polar_detections(raw, index, placement, code, rules, limits), placement)
        for index, placement in enumerate(placements)
    ]


# ---- the system ------------------------------------------------------------------------------------------------------


def _deformable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the published variant with deformable convolutions in the backbone's last stages and in the towers."""
    return {
        **options, "backbone": {**options["backbone"], "deform_stages": (1, 2, 3)}, "head": {"deformable": True},
    }  # fmt: skip


class PolarMask(System):
    """PolarMask with the published options as presets; see the module."""

    name = "polarmask"
    card = Card(
        title="PolarMask",
        paper="Xie, Sun, Song, Wang, Liu, Liang, Shen, Luo: PolarMask: Single Shot Instance Segmentation with Polar "
        "Representation. CVPR 2020",
        arxiv="1909.13226",
        code="xieenze/PolarMask",
        code_licence="Apache-2.0 (LICENSE); 2-clause BSD for academic use, others contact the authors (README)",
    )
    renamed_options: ClassVar[Mapping[str, str | None]] = RENAMED_OPTIONS
    renamed_parameters: ClassVar[Mapping[str, str]] = RENAMED_PARAMETERS

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        rays: int = 36,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        head: PolarHeadLike = HEAD,
        rules: PolarRulesLike = RULES,
        normalization: Normalization = "caffe",
        resize: ResizeLike = RESIZE,
    ):
        """
        Args:
            classes: Class names.
            rays: Number of rays, a divisor of 360 (table 2a: 18, 24, 36, 72).
            backbone: With levels of strides 8, 16 and 32.
            in_channels: Channels of the image.
            head: Pyramid and head, see `PolarHead`.
            rules: Targets, loss and score, see `PolarRules`. The published weights were trained with border="pixels",
                with which small objects, and objects in small images, are hardly learned.
            normalization: "caffe", means in BGR, or "imagenet", means and standard deviations in RGB.
            resize: Published: short side 800, long side at most 1333, or stretched to a `canvas` of (768, 1280), which
                is used for upright images too. `multiple` must be a multiple of 32.
        """
        super().__init__()
        if rays < 3 or 360 % rays:
            raise UsageError(f"rays must be a divisor of 360 and at least 3, got {rays}")
        self.classes = tuple(classes)
        self.code: Code = self.make_code(rays)
        self.rules = PolarRules.read(rules, RULES)
        network = Backbone.read(backbone, BACKBONE).build(in_channels)
        self.dense = PolarDense(network, PolarHead.read(head, HEAD), len(self.classes), self.code)
        self.preprocess = polar_preprocess(normalization, Resize.read(resize, RESIZE), in_channels)

    def make_code(self, rays: int) -> Code:
        """The code that the network predicts for the rays of a location."""
        return RayCode(rays)

    def forward(self, images: Float[Tensor, "b c h w"]) -> PolarRaw:
        return self.dense(images)

    def losses(self, raw: PolarRaw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class`, `box`, `mask` and `centerness`, see `polar_losses`. Crowd regions are ignored.

        The published loader drops objects that are tiny in the original image (an area of at most 15, or both sides
        below 10); here that is left to the data set. Unlike the published code, images in which all centres of mass lie
        in the first column are not ignored.
        """
        points = fcos.locations(raw.classes)
        objects = [t if t.crowd is None else t[~t.crowd] for t in targets]
        goals = [polar_targets(points, own, self.code.rays, self.rules) for own in objects]
        return polar_losses(raw, goals, self.code, self.rules)

    def decode(
        self,
        raw: PolarRaw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        before: int = 1000,
    ) -> list[Instances]:
        """Selects the best locations, suppresses overlapping boxes, and fills the contours of the rest.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of the class probability; of the score too if above 0.05. Scores are class
                probability times (centerness + 0.5) and can exceed 1.
            nms_threshold: IoU from which a box is suppressed by a better one of its class.
            detections: Maximum number of objects per image.
            before: Number of locations per level that are considered.
        """
        limits = Thresholds.requested(score_threshold, nms_threshold, detections, before)
        return polar_decode(raw, placements, self.code, self.rules, limits)

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        result = super().upgraded(options)
        resize = result.get("resize", {})
        if resize.get("canvas") is not None:  # earlier versions ignored the sides then
            result["resize"] = {k: v for k, v in resize.items() if k not in ("short", "long")}
        return result

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"backbone": [self.dense.backbone], "neck": [self.dense.neck], "head": [self.dense.head]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.head.classes.{kind}": ClassRows() for kind in ("weight", "bias")}

    # 16 images, a learning rate of 0.01 and twice that for biases: the configuration for 4 GPUs. That for 32 GPUs has a
    # learning rate of 0.04, batches of 64, a warm-up of 2000 steps and two epochs more.
    _SGD: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "clip": 35.0, "rates": {"*.bias": 2.0}, "decay_norms": True, "warmup": 500, "warmup_from": 1 / 3,
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "polarmask-1x": {**_SGD, "epochs": 12, "milestones": (8 / 12, 11 / 12)},
        "polarmask-2x": {
            **_SGD, "batch": 32, "lr": 0.02, "epochs": 26, "milestones": (18 / 26, 24 / 26), "warmup": 2000,
            "warmup_from": 1 / 6, "short": tuple(range(640, 801, 32)), "long": 1333,
        },
    }  # fmt: skip

    _R50: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet50", "norm": "frozen", "frozen": 2, "stride_in": "1x1"},
        "rules": {"border": "pixels"}, "resize": {"canvas": (768, 1280)},
    }  # fmt: skip
    _R101: ClassVar[dict[str, Any]] = {**_R50, "backbone": {**_R50["backbone"], "name": "resnet101"}}
    _X101: ClassVar[dict[str, Any]] = {
        **_R50, "backbone": {"name": "resnet101", "norm": "frozen", "frozen": 2, "groups": 64, "group_width": 4},
        "normalization": "imagenet",
    }  # fmt: skip
    _2X: ClassVar[dict[str, Any]] = {"resize": {"canvas": (800, 1333), "multiple": 128}}
    _VAL = "COCO val2017, stretched to 768 x 1280, pycocotools"
    _VAL_2X = "COCO val2017, stretched to 800 x 1333, pycocotools"
    _TEST = "COCO test-dev, stretched to 768 x 1280"
    _README = "xieenze/PolarMask README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "polarmask-r50": Preset(
            _R50, (Score(29.2, "mask AP", _VAL, _README),), "1x, 4 GPUs (28.9 in the README of the configurations)"
        ),
        "polarmask-r101": Preset(
            _R101, (Score(30.7, "mask AP", _VAL, _README), Score(30.4, "mask AP", _TEST, _README)), "1x"
        ),
        "polarmask-x101": Preset(
            _X101, (Score(32.5, "mask AP", _VAL, _README), Score(32.9, "mask AP", _TEST, _README)),
            "1x, ResNeXt-101 64x4d",
        ),
        "polarmask-r50-dcn": Preset(_deformable(_R50), (Score(32.0, "mask AP", _VAL, _README),), "1x"),
        "polarmask-r101-dcn": Preset(_deformable(_R101), (Score(33.5, "mask AP", _VAL, _README),), "1x"),
        "polarmask-x101-dcn": Preset(_deformable(_X101), (Score(34.9, "mask AP", _VAL, _README),), "1x"),
        "polarmask-r50-2x": Preset(
            {**_R50, **_2X}, (Score(30.5, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-r101-2x": Preset(
            {**_R101, **_2X}, (Score(31.9, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-x101-2x": Preset(
            {**_X101, **_2X}, (Score(33.5, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-r50-dcn-2x": Preset(
            {**_deformable(_R50), **_2X}, (Score(33.3, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-r101-dcn-2x": Preset(
            {**_deformable(_R101), **_2X}, (Score(34.3, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-x101-dcn-2x": Preset(
            {**_deformable(_X101), **_2X}, (Score(35.9, "mask AP", _VAL_2X, _README),), "2x, trained at several sizes"
        ),
        "polarmask-small": Preset(
            {"backbone": "resnet18", "head": {"width": 128, "convs": 2}, "resize": {"short": 320, "long": 512}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
