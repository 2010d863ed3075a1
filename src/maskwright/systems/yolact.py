"""YOLACT (Bolya, Zhou, Xiao, Lee, ICCV 2019, arXiv 1904.02689).

Real-time instance segmentation as two parallel tasks. One branch, fully convolutional, predicts a few dozen
*prototype* masks of the whole image; the other, an anchor-based detector on a feature pyramid, predicts for every
anchor its class, its box and one coefficient per prototype. A mask is the sigmoid of the prototypes' weighted sum,
cropped by its box: one matrix product for all objects, at the resolution of the prototypes, without re-pooling.
Duplicates are suppressed by a matrix operation too (Fast NMS). Every image is stretched to one square.

Where paper and code differ, this follows the code: the anchors of three "aspect ratios" are squares of three sizes, and
ReLU follows the pyramid's levels and the prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.yolact import Anchors, Head, PrototypeNet, xavier
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.mask_targets import plane_targets
from maskwright.ops.matching import IGNORED, NEGATIVE, match_each
from maskwright.ops.planes import place_planes
from maskwright.ops.prototypes import assemble, crop_window, decode_boxes, encode
from maskwright.ops.suppression import fast_nms_by_class, greedy_nms_by_class
from maskwright.options import OptionGroup, check_option
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.system import ClassRows, System, at_least

FAST_NMS_TOP_K = 200  # anchors of each class that are compared
FARTHEST = float(1 << 20)  # bound of decoded boxes, in sides of the image, so that no product of two is infinite
# ImageNet's mean and deviation as the authors write them, without a division by 255.
PREPROCESS = Preprocess(
    resample="tensor", mean=(123.68, 116.78, 103.94), std=(58.40, 57.12, 57.38), divide=1.0, multiple=1, fit="stretch",
    canvas=(550, 550),
)  # fmt: skip

Suppression = Literal["fast", "greedy"]  # see `YOLACT.decode`


# ---- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss(OptionGroup):
    """What the losses are computed on.

    Attributes:
        crowd_overlap: Anchors that are not positive and lie in a crowd region by more than this share are ignored.
        masks_per_image: Number of positive anchors, drawn at random, whose masks are trained; bounds the memory.
        crop: Whether masks are trained inside the annotated box only, as published, since they are cropped when
            decoded. Otherwise they are also trained to be empty outside, and may be decoded without the crop.
    """

    label: ClassVar[str] = "loss"

    crowd_overlap: float = 0.7
    masks_per_image: int = 100
    crop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks_per_image < 1:
            raise UsageError(f"loss.masks_per_image must be at least 1, got {self.masks_per_image}")


AnchorsLike = Mapping[str, Any] | Anchors
LossLike = Mapping[str, Any] | Loss

BACKBONE = Backbone("resnet50", deform_modulated=True)
RESIZE, ANCHORS, LOSS = Resize(), Anchors(), Loss()


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """What the network predicts for every anchor, finest level first, row by row, and for the image as a whole."""

    deltas: Float[Tensor, "b p 4"]
    logits: Float[Tensor, "b p _classes"]  # background last
    coefficients: Float[Tensor, "b p k"]  # -1 ... 1
    prototypes: Float[Tensor, "b k _h _w"]  # at least 0
    semantic: Float[Tensor, "b n _h3 _w3"]  # logits; used in training only
    grids: tuple[tuple[int, int], ...]  # h, w of each level
    size: tuple[int, int]  # H, W of the input


class YOLACTNet(nn.Module):
    """Backbone, pyramid, prototypes and the shared head (figure 2), with the semantic layer of section 5.

    Args:
        backbone: With levels of strides 8, 16 and 32.
        neck_width: Channels of the pyramid and the head.
        prototypes: Number of prototypes.
        anchors: Number of anchors per location.
        classes: Number of classes.
    """

    def __init__(self, backbone: nn.Module, neck_width: int, prototypes: int, anchors: int, classes: int):
        super().__init__()
        levels = levels_of(backbone)
        self.levels = levels.indices((8, 16, 32))
        self.backbone = backbone
        channels = [levels.channels[index] for index in self.levels]
        self.neck = FPN(channels, neck_width, upsample="bilinear", extra="output", relu="outputs")
        self.prototypes = PrototypeNet(neck_width, prototypes)
        self.head = Head(neck_width, anchors, classes + 1, prototypes)
        self.semantic = nn.Conv2d(neck_width, classes, 1)
        for part in (self.neck, self.prototypes, self.head, self.semantic):
            part.apply(xavier)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = self.neck([features[index] for index in self.levels])  # P3 ... P7, strides 8 ... 128
        deltas, logits, coefficients = self.head(levels)
        prototypes = self.prototypes(levels[0])  # (B, K, H/4, W/4)
        grids = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        size = (images.shape[-2], images.shape[-1])
        return Raw(deltas, logits, coefficients, prototypes, self.semantic(levels[0]), grids, size)


# ---- system ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first, before their masks are assembled."""

    boxes: Float[Tensor, "n 4"]  # x0, y0, x1, y1 as shares of the input's sides
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    coefficients: Float[Tensor, "n k"]

    def __getitem__(self, rows: Tensor) -> Detections:
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.coefficients[rows])


@dataclass(frozen=True)
class MaskTargets:
    """Masks of one image's positive anchors, on the prototypes' grid."""

    soft: Float[Tensor, "n h w"]  # as predicted; cropped by the objects' boxes if trained so
    truth: Float[Tensor, "n h w"]  # 0 or 1
    boxes: Float[Tensor, "n 4"]  # of the objects, as shares of the input's sides
    labels: Int[Tensor, " n"]
    share: float  # number of anchors that each of them represents


class YOLACT(System):
    """See the module's docstring, and `decode` for its thresholds.

    Args:
        classes: Class names.
        backbone: Any backbone with levels of strides 8, 16 and 32. Deformable convolutions are modulated and have a
            bias. The published networks have `norm="batch"`, which the original freezes for fewer than six images per
            device ("frozen").
        in_channels: Channels of the image.
        resize: Every image is stretched to `canvas`, 550 x 550; `short` scales it.
        neck_width: Channels of the pyramid and the head.
        prototypes: Number of prototypes; table 2b compares 8 ... 256.
        anchors: See `Anchors`.
        loss: See `Loss`.
    """

    name = "yolact"
    card = Card(
        title="YOLACT",
        paper="Bolya, Zhou, Xiao, Lee: YOLACT: Real-time Instance Segmentation. ICCV 2019",
        arxiv="1904.02689",
        code="dbolya/yolact",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        prototypes: int = 32,
        anchors: AnchorsLike = ANCHORS,
        loss: LossLike = LOSS,
    ):
        super().__init__()
        at_least(self.name, 1, neck_width=neck_width, prototypes=prototypes)
        spec, shapes = Backbone.read(backbone, BACKBONE), Anchors.read(anchors, ANCHORS)
        self.classes, self.loss = tuple(classes), Loss.read(loss, LOSS)
        published = PREPROCESS
        if spec.name.startswith("darknet"):
            published = replace(published, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), divide=255.0)
        self.preprocess = Resize.read(resize, RESIZE).apply(published, in_channels)
        self.anchor_shapes = shapes.shapes(self.preprocess.canvas or (550, 550))
        network = spec.build(in_channels, Use(deform_bias=True))
        self.dense = YOLACTNet(network, neck_width, prototypes, len(shapes), len(self.classes))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def anchors(self, raw: Raw) -> Float[Tensor, "p 4"]:
        """Centre x, centre y, width and height of every anchor, as shares of the input's sides."""
        parts = []
        for (height, width), shapes in zip(raw.grids, self.anchor_shapes, strict=True):
            sides = torch.tensor(shapes, device=raw.deltas.device)  # (A, 2)
            # Centres are relative to the level's own grid, not its stride: 69 cells divide 550 pixels evenly.
            y = (torch.arange(height, device=sides.device) + 0.5) / height
            x = (torch.arange(width, device=sides.device) + 0.5) / width
            centres = torch.stack([x.repeat(height), y.repeat_interleave(width)], 1)  # (H W, 2)
            grid = centres[:, None].expand(-1, len(sides), -1), sides.expand(height * width, -1, -1)
            parts.append(torch.cat(grid, 2).flatten(0, 1))
        return torch.cat(parts)

    # ---- losses ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input.

        Returns:
            `class`, `box`, `mask` and `semantic`, weighted 1, 1.5, 6.125 and 1. The first three are sums over the batch
            divided by its number of positive anchors. (The original has no finite loss if there are none, and its
            trainer skips such a batch.)
        """
        own = [_relative_target(t.to(raw.deltas.device), raw.size) for t in targets]
        anchors = self.anchors(raw)
        matches = [self.assign(anchors, truth, crowd) for truth, crowd in own]
        truths = [truth for truth, _ in own]
        matched = torch.stack([m for _, m in matches])  # (B, P)
        positives = global_mean_count((matched >= 0).sum())
        # Sums of products below must not be computed in half precision, nor may the original's cross entropy.
        with torch.autocast(raw.deltas.device.type, enabled=False):
            terms = {
                "class": self.class_loss(raw.logits.float(), matched, truths) / positives,
                "box": 1.5 * self.box_loss(raw.deltas.float(), anchors, matched, truths) / positives,
            }
            masks = self.mask_targets(raw, matched, truths)
            terms |= {name: value / positives for name, value in self.mask_losses(raw, masks).items()}
            terms["semantic"] = self.semantic_loss(raw, truths)
        return terms

    @torch.no_grad()
    def assign(
        self, anchors: Float[Tensor, "p 4"], target: Instances, crowd: Float[Tensor, "c 4"]
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """Matches anchors to objects: `match_each` with 0.4 and 0.5, and anchors in crowd regions are ignored.

        Args:
            anchors: What `anchors` returned.
            target: Objects with boxes as shares of the input's sides.
            crowd: Boxes of the crowd regions, likewise.

        Returns:
            See `ops.matching.match`.
        """
        boxes = box_ops.corners(anchors)
        nearest, matched = match_each(target.boxes, boxes, 0.4, 0.5)
        for regions in crowd.split(16):
            inside = (box_ops.pairwise_ioa(boxes, regions) > self.loss.crowd_overlap).any(1)
            matched = torch.where(inside & (matched < 0), IGNORED, matched)
        return nearest, matched

    def class_loss(
        self, logits: Float[Tensor, "b p c"], matched: Int[Tensor, "b p"], truths: Sequence[Instances]
    ) -> Float[Tensor, ""]:
        """Sum of the cross entropy of positive anchors and of hard negatives: for each positive anchor of an image the
        three negatives with the smallest background probability (OHEM of SSD)."""
        background = logits.shape[-1] - 1
        positive, negative = matched >= 0, matched == NEGATIVE
        with torch.no_grad():
            hardness = torch.logsumexp(logits, -1) - logits[..., background]
            order = torch.where(negative, hardness, -1.0).argsort(1, descending=True)
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
            )
            hard = negative & (rank < 3 * positive.sum(1, keepdim=True))
            labels = torch.stack([_matched_labels(t, m, background) for t, m in zip(truths, matched, strict=True)])
        chosen = positive | hard
        return functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum") + logits.sum() * 0

    def box_loss(
        self,
        deltas: Float[Tensor, "b p 4"],
        anchors: Float[Tensor, "p 4"],
        matched: Int[Tensor, "b p"],
        truths: Sequence[Instances],
    ) -> Float[Tensor, ""]:
        """Sum of the smooth L1 loss of positive anchors' offsets."""
        wanted = [encode(anchors[m >= 0], t.boxes[m[m >= 0]]) for t, m in zip(truths, matched, strict=True)]
        return smooth_l1_sum(deltas[matched >= 0], torch.cat(wanted), beta=1.0) + deltas.sum() * 0

    def mask_targets(self, raw: Raw, matched: Int[Tensor, "b p"], truths: Sequence[Instances]) -> list[MaskTargets]:
        """For each image the predicted masks of (a sample of) its positive anchors, and their objects' masks."""
        result = []
        height, width = raw.prototypes.shape[-2:]
        for index, target in enumerate(truths):
            rows = (matched[index] >= 0).nonzero().flatten()
            share = max(1.0, len(rows) / self.loss.masks_per_image)
            if len(rows) > self.loss.masks_per_image:
                rows = rows[torch.randperm(len(rows), device=rows.device)[: self.loss.masks_per_image]]
            owners = matched[index, rows]
            boxes = target.boxes[owners]
            soft = assemble(
                raw.prototypes[index].float(),
                raw.coefficients[index, rows].float(),
                boxes if self.loss.crop else None,
            )
            chosen, place = owners.unique(return_inverse=True)
            planes = torch.zeros(0, height, width)
            if target.masks is not None:
                planes = plane_targets(target.masks[chosen.cpu()], (height, width), raw.size)
            truth = (planes > 0.5).float().to(soft.device)[place]
            result.append(MaskTargets(soft, truth, boxes, target.labels[owners], share))
        return result

    def mask_losses(self, raw: Raw, masks: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """Terms of the assembled masks, as sums over the batch."""
        total = raw.coefficients.float().sum() * 0 + raw.prototypes.float().sum() * 0
        height, width = raw.prototypes.shape[-2:]
        for own in masks:
            entropy = functional.binary_cross_entropy(own.soft, own.truth, reduction="none")
            if not self.loss.crop:  # neither the inside nor the outside of a box outweighs the other
                inside = crop_window(own.boxes, (height, width))
                outside = (entropy * ~inside).sum((1, 2)) / (~inside).sum((1, 2)).clamp(min=1)
                total = total + own.share * outside.sum() * height * width
                entropy = entropy * inside
            # Divided by the area of the box, so that small objects weigh as much as large ones.
            total = total + own.share * (entropy.sum((1, 2)) / box_ops.area(own.boxes)).sum()
        return {"mask": 6.125 * total / (height * width)}

    def semantic_loss(self, raw: Raw, truths: Sequence[Instances]) -> Float[Tensor, ""]:
        """Binary cross entropy of every cell and class with the union of the class's masks: mean over cells and images,
        sum over classes. It only serves the features (section 5)."""
        logits = raw.semantic.float()
        wanted = torch.zeros_like(logits)
        height, width = logits.shape[-2:]
        for plane, target in zip(wanted, truths, strict=True):
            if target.masks is not None and len(target):
                planes = plane_targets(target.masks, (height, width), raw.size).to(plane.device)
                plane.index_put_((target.labels,), (planes > 0.5).float(), accumulate=True)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted.clamp(max=1), reduction="sum")
        return entropy / (height * width * len(logits))

    # ---- decoding --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float = 0.5,
        detections: int = 100,
        candidate_threshold: float = 0.05,
        nms: Suppression = "fast",
        cross_class: bool = False,
        crop: bool = True,
        mask_threshold: float = 0.5,
        whole_boxes: bool = True,
    ) -> list[Instances]:
        """Converts the raw output to objects.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Objects whose score is not above it are dropped; 0 keeps all. As published there is no
                second threshold: an anchor that is a candidate by one class may be detected as another class with
                almost no score, which does not affect AP.
            nms_threshold: Objects whose IoU with a better one of their class is larger are suppressed.
            detections: Largest number of objects.
            candidate_threshold: Anchors whose best class scores no more are discarded.
            nms: "fast": suppressed objects suppress others too (section 3.3); "greedy": the classical rule.
            cross_class: Whether an anchor counts for its best class only, and objects of all classes suppress each
                other. (The original then keeps 200 objects, not `detections`.)
            crop: Whether masks are cropped by their boxes (section 5).
            mask_threshold: Probability above which a pixel belongs to the object.
            whole_boxes: Whether corners are truncated to integers, as for the published figures.

        Returns:
            The objects of each image, best first, on the image's own pixel grid.
        """
        detected = self.detect(raw, candidate_threshold, nms_threshold, detections, nms, cross_class)
        return [
            self.on_image(own, prototypes, raw.size, placement, score_threshold, mask_threshold, crop, whole_boxes)
            for own, prototypes, placement in zip(detected, raw.prototypes, placements, strict=True)
        ]

    @torch.no_grad()
    def detect(
        self,
        raw: Raw,
        candidate_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        nms: Suppression = "fast",
        cross_class: bool = False,
    ) -> list[Detections]:
        """Detections of each image, best first. See `decode` for the arguments."""
        anchors = self.anchors(raw)
        probabilities = raw.logits.float().softmax(-1)[..., :-1]  # (B, P, N)
        check_option("nms", nms, Suppression)
        height, width = raw.size
        result = []
        for own, deltas, coefficients in zip(probabilities, raw.deltas.float(), raw.coefficients.float(), strict=True):
            boxes = box_ops.corners(decode_boxes(anchors, deltas)).clamp(-FARTHEST, FARTHEST)
            scores, labels = own.T, torch.arange(own.shape[1], device=own.device)[:, None].expand(-1, len(own))
            if cross_class:
                scores, labels = (v[None] for v in own.max(1))
            if nms == "fast":
                kept = (own.amax(1) > candidate_threshold).nonzero().flatten()
                score, row, anchor = fast_nms_by_class(boxes, scores, kept, nms_threshold, detections, FAST_NMS_TOP_K)
            else:
                pixels = boxes * boxes.new_tensor([width, height, width, height])
                score, row, anchor = greedy_nms_by_class(pixels, scores, candidate_threshold, nms_threshold)
            score, order = score.topk(min(detections, len(score)))
            row, anchor = row[order], anchor[order]
            every = Detections(boxes[anchor], score, labels[row, anchor], coefficients[anchor])
            result.append(every[score >= 0])
        return result

    def on_image(
        self,
        detected: Detections,
        prototypes: Float[Tensor, "k h w"],
        size: tuple[int, int],
        placement: Placement,
        score_threshold: float = 0.0,
        mask_threshold: float = 0.5,
        crop: bool = True,
        whole_boxes: bool = True,
        drop_empty: bool = True,
    ) -> Instances:
        """Assembles masks and converts detections to objects on the image's own grid.

        Args:
            detected: Detections of one image.
            prototypes: Prototypes of the image.
            size: Height and width of the network's input.
            placement: How the image was placed in it.
            score_threshold: See `decode`, as for the following.
            mask_threshold: Masks are resized from the prototypes' grid to the image's in one step, after the crop.
            crop: Whether masks are cropped by their boxes.
            whole_boxes: Whether corners are truncated to integers.
            drop_empty: Whether objects whose boxes have no area are dropped, as the original does when it writes its
                results.
        """
        detected = detected[detected.scores > score_threshold] if score_threshold > 0 else detected
        height, width = size
        boxes = placement.boxes_to_image(detected.boxes * detected.boxes.new_tensor([width, height, width, height]))
        boxes = box_ops.clip(boxes, placement.image_size)
        if whole_boxes:
            boxes = boxes.trunc()
        if drop_empty:
            solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
            detected, boxes = detected[solid], boxes[solid]
        soft = assemble(prototypes.float(), detected.coefficients, detected.boxes if crop else None)
        masks = place_planes(soft, placement, size, threshold=mask_threshold, steps=1)
        return Instances(placement.image_size, boxes, detected.labels, masks, detected.scores)

    # ---- for loading and training ----------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        net = self.dense
        return {
            "backbone": [net.backbone], "neck": [net.neck], "prototypes": [net.prototypes],
            "head": [net.head, net.semantic],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        rows = {}
        for kind in ("weight", "bias"):
            rows[f"dense.head.classes.{kind}"] = ClassRows(background_last=True, repeats=len(self.anchor_shapes[0]))
            rows[f"dense.semantic.{kind}"] = ClassRows()
        return rows

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        result = super().upgraded(options)
        if options.get("backbone") == "darknet53" and isinstance(options.get("stem_width"), int):
            # Earlier versions counted the channels of all stems as if 64 were the published number; here it is 32.
            result["backbone"]["width"] = max(1, options["stem_width"] // 2)
        return result

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        "size": "resize.short",
        "anchor_sides": "anchors.sides",
        "anchor_ratios": "anchors.ratios",
        "anchor_octaves": "anchors.octaves",
        "square_anchors": "anchors.square",
        "crowd_overlap": "loss.crowd_overlap",
        "masks_per_image": "loss.masks_per_image",
        "masks_per_picture": "loss.masks_per_image",
        "crop_learnt": "loss.crop",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{part}.": f"dense.{part}." for part in ("backbone", "neck", "prototypes", "head", "semantic")
    }

    # The authors' schedule. Of their augmentation, "expand" and the crop that keeps an overlap are left out; a random
    # window of at least 0.3 of each side replaces them.
    _SGD: ClassVar[dict[str, Any]] = {
        "batch": 8, "lr": 1e-3, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True, "warmup": 500,
        "warmup_from": 0.1, "augment": {
            "flip": 0.5, "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05, "crop": 0.3,
            "crop_chance": 0.5,
        },
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "yolact": {**_SGD, "steps": 800_000, "milestones": (280 / 800, 600 / 800, 700 / 800, 750 / 800)},
        "yolact-pascal": {**_SGD, "steps": 120_000, "milestones": (60 / 120, 100 / 120)},
    }

    _COCO = "COCO test-dev, stretched to {0} x {0}"
    _README = "README of dbolya/yolact"
    presets: ClassVar[Mapping[str, Preset]] = {
        "yolact-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "batch"}},
            (Score(28.2, "mask AP", _COCO.format(550), _README),),
            "42.5 frames per second on a Titan Xp",
        ),
        "yolact-r101": Preset(
            {"backbone": {"name": "resnet101", "norm": "batch"}},
            (Score(29.8, "mask AP", _COCO.format(550), _README),),
            "the paper's base model; 33.5 frames per second",
        ),
        "yolact-r101-im400": Preset(
            {"backbone": {"name": "resnet101", "norm": "batch"}, "resize": {"short": 400}},
            (Score(24.9, "mask AP", _COCO.format(400), "arXiv 1904.02689"),),
            "45.3 frames per second; weights were not published",
        ),
        "yolact-r101-im700": Preset(
            {"backbone": {"name": "resnet101", "norm": "batch"}, "resize": {"short": 700}},
            (Score(31.2, "mask AP", _COCO.format(700), _README),),
            "23.6 frames per second",
        ),
        "yolact-darknet53": Preset(
            {"backbone": {"name": "darknet53", "norm": "batch"}},
            (Score(28.7, "mask AP", _COCO.format(550), _README),),
            "40.0 frames per second",
        ),
        "yolact-r50-pascal": Preset(
            {
                "backbone": {"name": "resnet50", "norm": "batch"},
                "anchors": {"sides": (32, 64, 128, 256, 512), "square": False},
            },
            (Score(72.3, "mask AP50", "Pascal SBD val, stretched to 550 x 550", _README),),
            "mask AP70 56.2",
        ),
        "yolact-small": Preset(
            {"backbone": {"name": "resnet18", "norm": "group"}, "neck_width": 128, "resize": {"short": 320}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


def _relative_target(target: Instances, size: tuple[int, int]) -> tuple[Instances, Float[Tensor, "c 4"]]:
    """The objects with boxes as shares of the input's sides, without those of no area, and the crowd regions' boxes.

    The objects' `image_size` and masks stay those of the input."""
    height, width = size
    boxes = target.boxes / target.boxes.new_tensor([width, height, width, height])
    crowd = torch.zeros_like(target.labels, dtype=torch.bool) if target.crowd is None else target.crowd
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(target, boxes=boxes)[solid & ~crowd], boxes[crowd]


def _matched_labels(target: Instances, matched: Int[Tensor, " p"], otherwise: int) -> Int[Tensor, " p"]:
    """The label of each positive anchor's object; `otherwise` for the other anchors."""
    if not len(target):
        return torch.full_like(matched, otherwise)
    return torch.where(matched >= 0, target.labels[matched.clamp(min=0)], otherwise)
