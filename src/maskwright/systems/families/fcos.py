"""Systems on FCOS (arXiv 1904.01355; improved, 2006.09214): dense detection without anchors.

`FCOSSystem` holds what such systems share: the dense network (backbone, pyramid, heads), assignment and losses of
locations, and the detection of boxes. FCOS itself decodes these boxes; CenterMask and BlendMask add masks. The
published implementations differ in conventions that change numbers; `RULES` holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import fcos
from maskwright.blocks.backbones import Backbone, Use, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.rpn import Anchors
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.paste import paste_masks
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize
from maskwright.systems.system import ClassRows, Output, System, at_least

RulesName = Literal["adelaidet", "detectron2", "torchvision", "mmdetection", "mmdetection-caffe"]


# ---- conventions and options -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The conventions of one published implementation.

    Attributes:
        corner: Locations lie at multiples of (size of the input / size of the map), instead of at the centres of cells.
        inclusive: The ends of a level's range of distances belong to it.
        smooth: Added to intersection and union of the box loss, in strides.
        weighted: The box loss is weighted by centerness.
        mean: Losses are divided by an exponential mean of the number of positive locations (momentum 0.9, starting at
            300) instead of by the number.
        ranked_by: What must exceed the score threshold: the class probability ("class") or the score ("score").
        best_by: What the best locations of a level are chosen by, likewise.
        root: The score is the square root of class probability times centerness, instead of the product.
        clip: Boxes are clipped to the image before non-maximum suppression.
        solid: Boxes without area are dropped before it.
        score_threshold: The published one.
    """

    corner: bool = False
    inclusive: bool = True
    smooth: float = 1.0
    weighted: bool = True
    mean: bool = False
    ranked_by: Literal["class", "score"] = "class"
    best_by: Literal["class", "score"] = "score"
    root: bool = True
    clip: bool = False
    solid: bool = False
    score_threshold: float = 0.05


RULES: Mapping[str, Rules] = {
    "adelaidet": Rules(),
    "detectron2": Rules(
        inclusive=False, smooth=0.0, weighted=False, mean=True, ranked_by="score", score_threshold=0.2
    ),
    "torchvision": Rules(
        corner=True, inclusive=False, smooth=0.0, weighted=False, ranked_by="score", clip=True, score_threshold=0.2
    ),
    "mmdetection": (_MMDETECTION := Rules(smooth=0.0, best_by="class", root=False, clip=True, solid=True)),
    "mmdetection-caffe": _MMDETECTION,  # differs in the normalisation of images
}  # fmt: skip
PREPROCESS: Mapping[str, Preprocess] = {
    "adelaidet": Preprocess(
        resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "torchvision": Preprocess(resample="tensor"),
    "mmdetection": Preprocess(
        resample="opencv", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0
    ),
    "mmdetection-caffe": Preprocess(
        resample="opencv", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
}


@dataclass(frozen=True)
class HeadOptions(OptionGroup):
    """The heads of FCOS, as options of a system.

    Attributes:
        shared: 3 x 3 convolutions that classes and boxes share.
        classes: Further ones of classes.
        boxes: Further ones of boxes.
        norm: Normalisation after each of them: "group", "none", or "batch", one for each level.
        bias: Whether they have a bias.
        deformable: Which convolutions of a tower are deformable: "none", the "last", or "all" of shared and box towers.
        scales: A learned factor of the distances for each level.
        distances: How distances are made positive: "relu" of distances in strides, or "exp" of distances in pixels
            (arXiv 1904.01355).
        centerness_of: The tower that the centerness is predicted from.
    """

    label: ClassVar[str] = "head"

    shared: int = 0
    classes: int = 4
    boxes: int = 4
    norm: Literal["group", "none", "batch"] = "group"
    bias: bool = True
    deformable: Literal["none", "last", "all"] = "none"
    scales: bool = True
    distances: Literal["relu", "exp"] = "relu"
    centerness_of: Literal["boxes", "classes"] = "boxes"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shared", "classes", "boxes"):
            if getattr(self, name) < 0:
                raise UsageError(f"head.{name} must be at least 0, got {getattr(self, name)}")
        if self.norm == "batch" and (self.deformable != "none" or not self.bias):
            raise UsageError("head.norm='batch' requires head.deformable='none' and head.bias=True")


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """The output of the dense network.

    Attributes:
        features: Pyramid levels, finest first.
        logits: Class logits of each location of each level.
        distances: Distances to the four sides of the box, in strides; not negative.
        centerness: Logits of the centerness.
        top: Further values of each location, of systems that need them; otherwise empty.
        size: Height and width of the input, padding included.
        finest: The level of stride 4, of systems that need it; otherwise empty.
    """

    features: tuple[Float[Tensor, "b c _h _w"], ...]
    logits: tuple[Float[Tensor, "b k _h _w"], ...]
    distances: tuple[Float[Tensor, "b 4 _h _w"], ...]
    centerness: tuple[Float[Tensor, "b 1 _h _w"], ...]
    top: tuple[Float[Tensor, "b d _h _w"], ...]
    size: tuple[int, int]
    finest: tuple[Float[Tensor, "b c _h _w"], ...] = ()


class FCOSHead(nn.Module):
    """Towers and outputs, shared by all levels.

    Args:
        channels: Channels of the levels.
        classes: Number of classes.
        levels: Number of levels.
        options: The towers.
        top: Further outputs of each location, from the tower of boxes.
    """

    def __init__(self, channels: int, classes: int, levels: int, options: HeadOptions, top: int = 0):
        super().__init__()

        def tower(convs: int, deformable: Literal["none", "last", "all"]) -> nn.Module:
            if options.norm == "batch":
                return fcos.LevelTower(channels, convs, levels)
            return fcos.tower(channels, convs, bias=options.bias, norm=options.norm, deformable=deformable)

        self.shared = tower(options.shared, "all" if options.deformable == "all" else "none")
        self.class_tower = tower(options.classes, "last" if options.deformable == "last" else "none")
        self.box_tower = tower(options.boxes, options.deformable)
        self.logits = fcos.output_conv(channels, classes, -math.log(99))
        first = math.log(fcos.START * fcos.STRIDES[0]) if options.distances == "exp" else fcos.START
        self.distances = fcos.output_conv(channels, 4, first)
        self.centerness = fcos.output_conv(channels, 1)
        self.scales = nn.ModuleList(fcos.Scale() for _ in range(levels)) if options.scales else None
        self.top = fcos.output_conv(channels, top) if top else None
        self.exponential, self.central_class = options.distances == "exp", options.centerness_of == "classes"

    def forward(self, levels: Sequence[Float[Tensor, "b c _h _w"]]) -> tuple[list[Tensor], ...]:
        """Class logits, distances, centerness and further outputs of each level."""
        logits, distances, centerness, top = [], [], [], []
        for number, level in enumerate(levels):
            shared = _run(self.shared, level, number)
            box = _run(self.box_tower, shared, number)
            classes = _run(self.class_tower, shared, number)
            logits.append(self.logits(classes))
            centerness.append(self.centerness(classes if self.central_class else box))
            distance = self.distances(box)
            if self.scales is not None:
                distance = self.scales[number](distance)
            distances.append(
                (distance.float().exp() / fcos.STRIDES[number]) if self.exponential else functional.relu(distance)
            )
            if self.top is not None:
                top.append(self.top(box))
        return logits, distances, centerness, top


def _run(tower: nn.Module, x: Tensor, level: int) -> Tensor:
    return tower(x, level) if isinstance(tower, fcos.LevelTower) else tower(x)


class FCOSNet(nn.Module):
    """Backbone, pyramid and heads.

    Args:
        backbone: With levels of strides 8, 16 and 32.
        width: Channels of the pyramid.
        head: Heads of the levels.
        extra: Coarser levels than stride 32, at most two.
        finest: The pyramid has a level of stride 4 too, which the heads do not read.
    """

    def __init__(self, backbone: nn.Module, width: int, head: nn.Module, extra: int = 2, finest: bool = False):
        super().__init__()
        found = levels_of(backbone)
        self.finest = int(finest)
        self.levels = found.indices((4, 8, 16, 32)[1 - self.finest :])
        self.backbone = backbone
        channels = [found.channels[i] for i in self.levels]
        self.neck = FPN(channels, width, extra="output", coarser=extra, relu="between")
        self.head = head

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = self.neck([features[index] for index in self.levels])
        finest, levels = levels[: self.finest], levels[self.finest :]
        logits, distances, centerness, top = self.head(levels)
        size = (images.shape[-2], images.shape[-1])
        return Raw(
            tuple(levels), tuple(logits), tuple(distances), tuple(centerness), tuple(top), size, tuple(finest)
        )  # fmt: skip


# ---- the system ------------------------------------------------------------------------------------------------------


class Located(NamedTuple):
    """Detected boxes of one image in pixels of the input, best first, with the location that each comes from."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    places: Int[Tensor, " d"]


class Targets(NamedTuple):
    """What each location of a batch is trained on.

    Attributes:
        owner: The object of each location, or -1.
        distances: Distances to its box, in strides.
        labels: Labels of the positive locations, image by image.
    """

    owner: Int[Tensor, "b n"]
    distances: Float[Tensor, "b n 4"]
    labels: Int[Tensor, " p"]

    @property
    def positive(self) -> Bool[Tensor, "b n"]:
        return self.owner >= 0


class FCOSSystem(System):
    """Base class of systems that detect boxes as FCOS does.

    Its network is `dense`. A subclass adds networks, computes their losses beside `location_losses`, and implements
    `decode` with `find`.

    Attributes:
        rules: Conventions of the code base.
        strides: Strides of the levels.
        ranges: Range of distances of each level, in pixels.
        finest: Whether the pyramid has a level of stride 4.
    """

    normalizer: Tensor
    finest: ClassVar[bool] = False

    def __init__(
        self, classes: Sequence[str], *, backbone: Backbone, in_channels: int, resize: Resize, neck_width: int,
        levels: int, head: HeadOptions, rules: RulesName, radius: float | None, box_loss: fcos.BoxLoss = "giou",
        quality: Literal["centerness", "iou"] = "centerness", top: int = 0,
    ):  # fmt: skip
        super().__init__()
        at_least(self.name, 1, neck_width=neck_width)
        if not 3 <= levels <= 5:
            raise UsageError(f"levels must be 3, 4 or 5 (strides 8 to 32, 64 or 128), got {levels}")
        if radius is not None and not radius > 0:
            raise UsageError(f"radius must be above 0, or None for the whole box, got {radius}")
        self.classes, self.rules = tuple(classes), RULES[rules]
        self.radius = radius
        self.box_loss: fcos.BoxLoss = box_loss
        self.quality: Literal["centerness", "iou"] = quality
        self.strides: tuple[int, ...] = fcos.STRIDES[:levels]
        ends = [*(high for _, high in fcos.RANGES[: levels - 1]), 1e8]
        first = -1.0 if self.rules.inclusive else 0.0
        self.ranges = tuple(zip([first, *ends[:-1]], ends, strict=True))
        network = FCOSHead(neck_width, len(self.classes), levels, head, top)
        body = backbone.build(in_channels, Use())
        self.dense = FCOSNet(body, neck_width, network, levels - 3, self.finest)
        self.anchors = Anchors([[s] for s in self.strides], self.strides, (1.0,), "torchvision")
        if self.rules.mean:
            self.register_buffer("normalizer", torch.tensor(300.0))
        self.preprocess = resize.apply(PREPROCESS["adelaidet" if rules == "detectron2" else rules], in_channels)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"})

    @property
    def head_classes(self) -> int:
        """Number of classes that boxes are detected of."""
        return self.dense.head.logits.out_channels  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def locations(self, raw: Raw) -> list[Float[Tensor, "_n 2"]]:
        """The locations x, y of each level, in pixels of the input."""
        if not self.rules.corner:
            return fcos.locations(raw.logits, self.strides)
        return [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in self.anchors(raw.logits, raw.size)]

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def assign(self, raw: Raw, targets: Sequence[Instances]) -> Targets:
        """Assigns locations to the objects of each image."""
        levels = self.locations(raw)
        points, strides = torch.cat(levels), fcos.per_location(levels, [float(s) for s in self.strides])
        ranges = fcos.per_location(levels, self.ranges)
        owners, goals = [], []
        for target in targets:
            owner, inner = fcos.assign(
                points, strides, ranges, target.boxes.to(points), radius=self.radius, inclusive=self.rules.inclusive
            )
            owners.append(owner)
            goals.append(inner / strides[:, None])
        labels = torch.cat([t.labels[o[o >= 0]] for t, o in zip(targets, owners, strict=True)])
        return Targets(torch.stack(owners), torch.stack(goals), labels)

    def location_losses(self, raw: Raw, assigned: Targets) -> dict[str, Tensor]:
        """Computes `class`, `box` and `centerness`."""
        count = None
        if self.rules.mean:
            found = global_mean_count(assigned.positive.sum()).to(self.normalizer)
            count = 0.9 * self.normalizer + 0.1 * found
            if self.training:
                self.normalizer.copy_(count)
        logits, distances, central = (per_image(v).float() for v in (raw.logits, raw.distances, raw.centerness))
        return fcos.location_losses(
            logits, distances, central[..., 0], assigned.positive, assigned.labels, assigned.distances,
            smooth=self.rules.smooth, box_loss=self.box_loss, quality=self.quality, weighted=self.rules.weighted,
            count=count,
        )  # fmt: skip

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def find(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], score_threshold: float | None, nms_threshold: float,
        detections: int, candidates: int = 1000, ranked_by: Literal["class", "product", "score"] | None = None,
    ) -> list[Located]:  # fmt: skip
        """Detects boxes. The score is the square root of class probability times centerness, or the product itself.

        The published code compares the class probability, or its product with the centerness, with a low threshold
        before it computes scores. A higher threshold is compared with the score.

        Args:
            raw: Output of the dense network.
            sizes: Height and width of the valid part of each image in the input.
            score_threshold: Scores must be above it; None: the published threshold of `ranked_by`.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            candidates: (location, class) pairs of a level that are kept before suppression.
            ranked_by: What is compared with the published threshold: the class probability, its product with the
                centerness, or the score; None: as the code base does.
        """
        score, label, place, first_threshold = self.ranked(raw, score_threshold, candidates, ranked_by)
        levels = self.locations(raw)
        strides = fcos.per_location(levels, [float(s) for s in self.strides])
        points, distances = torch.cat(levels), per_image(raw.distances).float() * strides[:, None]
        result = []
        for number, size in enumerate(sizes):
            least = score_threshold if score_threshold is not None and score_threshold > first_threshold else -0.5
            rows = (score[number] > least).nonzero().flatten()
            own = place[number, rows]
            boxes = fcos.boxes_from_distances(points[own], distances[number, own])
            if self.rules.clip:
                boxes = box_ops.clip(boxes, size)
            if self.rules.solid:
                solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
                boxes, rows, own = boxes[solid], rows[solid], own[solid]
            kept = box_ops.nms(boxes, score[number, rows], label[number, rows], nms_threshold, detections)
            rows = rows[kept]
            result.append(Located(boxes[kept], score[number, rows], label[number, rows], own[kept]))
        return result

    def ranked(
        self, raw: Raw, score_threshold: float | None, candidates: int = 1000,
        ranked_by: Literal["class", "product", "score"] | None = None,
    ) -> tuple[Float[Tensor, "b m"], Int[Tensor, "b m"], Int[Tensor, "b m"], float]:  # fmt: skip
        """The best (location, class) pairs of each level; arguments as for `find`.

        Returns:
            Score (-1 for pairs below the threshold), class and location of each pair, and the threshold that was used.
        """
        ranked_by, kinds = ranked_by or self.rules.ranked_by, self.head_classes
        first_threshold = self.rules.score_threshold
        if score_threshold is not None:
            first_threshold = min(first_threshold, score_threshold)
        scores, labels, places, first = [], [], [], 0
        for logits, central in zip(raw.logits, raw.centerness, strict=True):
            probability = logits.float().sigmoid().flatten(2)  # (B, K, n)
            product = probability * central.float().sigmoid().flatten(2)
            score = product.sqrt() if self.rules.root else product
            compared = {"class": probability, "product": product, "score": score}[ranked_by]
            wanted = probability if self.rules.best_by == "class" else score
            ranked = torch.where(compared > first_threshold, wanted, -1.0).transpose(1, 2).flatten(1)
            best = ranked.topk(min(candidates, ranked.shape[1]))
            if self.rules.best_by == "class":
                own = score.transpose(1, 2).flatten(1).gather(1, best.indices)
                scores.append(torch.where(best.values >= 0, own, -1.0))
            else:
                scores.append(best.values)
            labels.append(best.indices % kinds)
            places.append(best.indices // kinds + first)
            first += probability.shape[2]
        score, label, place = (torch.cat(v, 1) for v in (scores, labels, places))  # (B, M)
        return score, label, place, first_threshold

    def on_image(
        self, found: Located, placement: Placement, masks: Float[Tensor, "d s s"] | None = None, threshold: float = 0.5
    ) -> Instances:
        """Detections of one image on the image, without those that are empty there.

        Args:
            found: The detections.
            placement: How the image was placed in the input.
            masks: Masks inside the boxes, as probabilities; None: boxes alone.
            threshold: Probability from which on a pixel belongs to the mask.
        """
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes), placement.image_size)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().flatten()
        pasted = None
        if masks is not None:
            own = masks[kept].flip(-1) if placement.mirrored else masks[kept]
            pasted = paste_masks(own, boxes[kept], placement.image_size, threshold=threshold)
        return Instances(placement.image_size, boxes[kept], found.labels[kept], pasted, found.scores[kept])

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        heads = [self.dense.head, *(network for name, network in self.networks().items() if name != "dense")]
        return {"backbone": [self.dense.backbone], "neck": [self.dense.neck], "heads": heads}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return {f"dense.head.logits.{kind}": ClassRows() for kind in ("weight", "bias")}


def per_image(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b n c"]:
    """The values of all locations of each image, level by level."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
