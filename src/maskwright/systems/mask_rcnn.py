"""Mask R-CNN (He, Gkioxari, Dollár, Girshick, ICCV 2017, arXiv 1703.06870).

A region proposal network predicts at every location of a feature pyramid where objects may be. Features of each
proposed box are pooled with RoIAlign, which does not round coordinates. One head classifies and refines the box;
another, fully convolutional, predicts a small binary mask for every class. Mask and class are decoupled: each class has
its own sigmoid, and only the mask of the predicted class is used. A third head can predict keypoints (section 5).

    image -> backbone -> pyramid, strides 4 ... 64 -> objectness, deltas -> proposals
    proposals -> RoIAlign 7 x 7 -> class, box -> detections
    detections -> RoIAlign 14 x 14 -> 4 convolutions -> 28 x 28 mask of the class

The published implementations, detectron2 and torchvision, differ in conventions that change numbers: see
`families.two_stage.RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.blocks.box_stage import Assigned, Detections, Foreground, foreground_rows
from maskwright.blocks.layers import Norm
from maskwright.blocks.points import BoxRefinement, PointHead, PointOptions
from maskwright.blocks.roi_heads import KeypointHead, MaskHead, MaskIoUHead, Pooling
from maskwright.blocks.roi_losses import (
    competing_mask_loss,
    keypoint_loss,
    keypoint_rois,
    mask_iou_loss,
    mask_loss,
    mask_truth,
)
from maskwright.errors import UsageError
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops.mask_targets import share_inside
from maskwright.ops.paste import paste_masks
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import (
    BoxesLike,
    BoxOptions,
    Neck,
    Proposals,
    ProposalsLike,
    Raw,
    RulesName,
    TwoStage,
    read_switch,
)
from maskwright.systems.system import ClassRows, Output

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
PROPOSALS = Proposals()
BOXES = BoxOptions()


@dataclass(frozen=True)
class MaskOptions(OptionGroup):
    """The mask head, as options of a system.

    Attributes:
        convs: Number of 3 x 3 convolutions; 0 with neck="c4".
        width: Their channels.
        norm: Normalisation after each of them.
        loss: "sigmoid": a binary mask for each class; "softmax": classes and background compete at each pixel (table
            2b).
        agnostic: Predict one mask for all classes (section 4.2).
    """

    label: ClassVar[str] = "masks"

    convs: int = 4
    width: int = 256
    norm: Norm = "none"
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    agnostic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convs < 0 or self.width < 1:
            raise UsageError(
                f"masks.convs must be at least 0 and masks.width at least 1, got {self.convs} and {self.width}"
            )
        if self.agnostic and self.loss == "softmax":
            raise UsageError("masks.agnostic requires masks.loss='sigmoid'")


@dataclass(frozen=True)
class KeypointOptions(OptionGroup):
    """The keypoint head, as options of a system; an integer stands for the field `count`.

    Attributes:
        count: Number of keypoints.
        convs: Number of 3 x 3 convolutions.
        width: Their channels.
    """

    label: ClassVar[str] = "keypoints"

    count: int = 17
    convs: int = 8
    width: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("count", 1), ("convs", 0), ("width", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"keypoints.{name} must be at least {least}, got {getattr(self, name)}")

    @classmethod
    def read(cls, value: Any, default: Self | None = None) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        number = isinstance(value, int) and not isinstance(value, bool)
        return super().read({"count": value} if number else value, default)


@dataclass(frozen=True)
class MaskIoUOptions(OptionGroup):
    """The head that predicts the IoU of masks (Mask Scoring R-CNN), as options of a system.

    Attributes:
        convs: Number of 3 x 3 convolutions.
        width: Their channels.
        fc_width: Width of the two fully connected layers.
    """

    label: ClassVar[str] = "mask_iou"

    convs: int = 4
    width: int = 256
    fc_width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("convs", "width", "fc_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"mask_iou.{name} must be at least 1, got {getattr(self, name)}")


class MaskRCNN(TwoStage):
    """Mask R-CNN, with optional keypoints and predicted mask IoU.

    Its networks are those of `TwoStage`, and `masks`, `points` (with points=True), `mask_iou` and `keypoints`.
    """

    name = "mask-rcnn"
    card = Card(
        title="Mask R-CNN",
        paper="He, Gkioxari, Dollár, Girshick: Mask R-CNN. ICCV 2017",
        arxiv="1703.06870",
        code="facebookresearch/detectron2; pytorch/vision; open-mmlab/mmdetection",
        code_licence="Apache-2.0; BSD-3-Clause; Apache-2.0",
    )
    mask_side = 14  # of the features that are pooled for masks and keypoints
    masks: nn.Module | None
    points: nn.Module | None
    keypoints: nn.Module | None
    mask_iou: nn.Module | None

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck: Neck = "fpn",
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "detectron2",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        pooling: Pooling = "align",
        masks: bool | Mapping[str, Any] | MaskOptions = True,
        points: bool = False,
        keypoints: bool | int | Mapping[str, Any] | KeypointOptions = False,
        mask_iou: bool | Mapping[str, Any] | MaskIoUOptions = False,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck: "fpn": a feature pyramid. "pafpn": with a bottom-up path after it (MMDetection's PAFPN). "c4": one
                level of stride 16, and the last stage of the ResNet is applied to every pooled box (section 3, table
                2). "dc5": one level of stride 16 from a dilated last stage.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`.
            pooling: How boxes are pooled: RoIAlign, RoIWarp or RoIPool (tables 2c and 2d).
            masks: The mask head, see `MaskOptions`; False: none.
            points: Refine masks at single points (PointRend, arXiv 1912.08193), to 224 x 224.
            keypoints: The keypoint head, see `KeypointOptions`; an integer is the number of keypoints; False: none.
            mask_iou: Predict the IoU of each mask with its object and multiply the score by it (Mask Scoring R-CNN,
                arXiv 1903.00241), see `MaskIoUOptions`; False: the score is that of the box.
        """
        super().__init__(
            classes, backbone=Backbone.read(backbone, BACKBONE), in_channels=in_channels,
            resize=Resize.read(resize, RESIZE), neck=neck, neck_width=neck_width, neck_norm=neck_norm, rules=rules,
            proposals=Proposals.read(proposals, PROPOSALS), boxes=BoxOptions.read(boxes, BOXES), pooling=pooling,
        )  # fmt: skip
        mask, keypoint = read_switch(MaskOptions, masks), read_switch(KeypointOptions, keypoints)
        self.competing_masks = mask is not None and mask.loss == "softmax"
        self.agnostic_masks = mask is not None and mask.agnostic
        self.keypoint_count = keypoint.count if keypoint is not None else 0
        outputs = 1 if self.agnostic_masks else len(self.classes) + self.competing_masks
        self.masks = self.points = self.keypoints = self.mask_iou = None
        self.refinement: BoxRefinement | None = None
        if mask is not None:
            self.make_mask_head = partial(
                MaskHead, self.channels, outputs, convs=0 if neck == "c4" else mask.convs, width=mask.width,
                norm=mask.norm, init=self.rules.mask_init,
            )  # fmt: skip
            self.masks = self.make_mask_head()
        if points:
            if mask is None or self.competing_masks or neck != "fpn":
                raise UsageError("points=True requires neck='fpn' and masks with loss='sigmoid'")
            self.refinement = BoxRefinement(PointOptions(steps=3))
            self.points = PointHead(self.channels, outputs, outputs, width=mask.width)
        quality = read_switch(MaskIoUOptions, mask_iou)
        if quality is not None:
            if mask is None or self.competing_masks or points:
                raise UsageError("mask_iou requires masks with loss='sigmoid', and points=False")
            self.mask_iou = MaskIoUHead(
                self.channels, self.mask_side if neck != "c4" else 7, len(self.classes), convs=quality.convs,
                width=quality.width, fc_width=quality.fc_width,
            )  # fmt: skip
        if keypoint is not None:
            self.keypoints = KeypointHead(self.channels, keypoint.count, convs=keypoint.convs, width=keypoint.width)

    @property
    def outputs(self) -> frozenset[Output]:
        masks: set[Output] = set() if self.masks is None else {"masks"}
        keypoints: set[Output] = set() if self.keypoints is None else {"keypoints"}
        return super().outputs | masks | keypoints

    # ---- training ----------------------------------------------------------------------------------------------------

    def head_losses(
        self, raw: Raw, features: Float[Tensor, "r c s s"], assigned: Sequence[Assigned],
        deltas: Float[Tensor, "r d"], targets: Sequence[Instances],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Computes `mask`, `mask_point`, `mask_iou` and `keypoint`, where the system has these heads."""
        terms: dict[str, Tensor] = {}
        rois = self.foreground(assigned, deltas)
        if self.masks is not None:
            shared = self.roi_stage is not None  # the same features are the input of both heads
            own = features[foreground_rows(assigned)] if shared else self.mask_features(raw, rois.boxes)
            terms |= self.mask_losses(raw, own, rois, targets)
        if self.keypoints is not None:
            inside = self.rules.keypoints_inside
            rois, keypoints = keypoint_rois(rois, targets, self.keypoint_count, inside)
            maps = self.keypoints(self.pooled(raw, rois.boxes, self.mask_side))
            terms["keypoint"] = keypoint_loss(maps, keypoints, torch.cat(rois.boxes))
        return terms

    def foreground(self, assigned: Sequence[Assigned], deltas: Float[Tensor, "r d"]) -> Foreground:
        """The boxes in which masks and keypoints are trained: the foreground of the proposals."""
        return Foreground.from_assigned(assigned)

    def mask_features(self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r c s s"]:
        """Pools the input of the mask head for boxes of each image."""
        return self.pooled(raw, boxes, self.mask_side)

    def mask_losses(
        self, raw: Raw, features: Float[Tensor, "r c s s"], rois: Foreground, targets: Sequence[Instances],
        network: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Computes `mask`, whose target is the object's mask inside the box, `mask_point` and `mask_iou`.

        Args:
            raw: Output of the dense network.
            features: Input of the mask head.
            rois: The boxes that the features belong to.
            targets: Objects of each image.
            network: The mask head; default `masks`.
        """
        network = network or self.masks
        assert network is not None
        labels = self.mask_labels(rois.labels)
        one = not self.competing_masks and self.refinement is None  # only the mask of each box's class is needed
        logits = network(features, labels if one else None)
        truth = mask_truth(rois, targets, logits.shape[-1], self.rules.mask_targets)
        if self.competing_masks:
            return {"mask": competing_mask_loss(logits, truth, labels)}
        own = logits[:, 0] if one else logits[torch.arange(len(labels), device=labels.device), labels]
        terms = {"mask": mask_loss(own, truth)}
        if self.mask_iou is not None:
            # The gradient flows through the mask, as in the published code.
            iou = self.mask_iou(features, own.float().sigmoid())
            predicted = iou[torch.arange(len(iou), device=iou.device), rois.labels]
            shares = [
                share_inside(target.masks, owners, boxes, last=self.last, whole_area=self.rules.quality_area)  # pyright: ignore[reportArgumentType]
                for target, owners, boxes in zip(targets, rois.owners, rois.boxes, strict=True)
                if len(boxes)
            ]
            shares = torch.cat(shares) if shares else predicted.new_zeros(0)
            terms["mask_iou"] = (
                mask_iou_loss(predicted, own, truth, shares.to(predicted), self.rules.quality_above) + iou.sum() * 0
            )
        if self.refinement is not None and self.points is not None:
            terms["mask_point"] = self.refinement.loss(
                self.points, raw.features[0], logits, rois.boxes, labels, targets, rois.owners
            )
        return terms

    def mask_labels(self, labels: Int[Tensor, " r"]) -> Int[Tensor, " r"]:
        """The output of the mask head that each class uses."""
        return torch.zeros_like(labels) if self.agnostic_masks else labels

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        mask_threshold: float = 0.5,
        refine: bool = True,
        score_of: Literal["mask", "box"] = "mask",
    ) -> list[Instances]:
        """Detects objects.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Detections must score more than this.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            mask_threshold: Probability from which on a pixel belongs to the mask.
            refine: Refine masks at points, where the system has them.
            score_of: With `mask_iou`, the score of the mask (that of the box times the predicted IoU), which orders
                the objects, or that of the box, by which the published code evaluates boxes.
        """
        found = self.find(raw, [p.size for p in placements], score_threshold, nms_threshold, detections)
        masks, keypoints = self.read_boxes(raw, [own.boxes for own in found], [own.labels for own in found], refine)
        if self.mask_iou is not None and score_of == "mask":
            found, masks, keypoints = self.rescored(raw, found, masks, keypoints, score_threshold)
        rows = zip(found, masks, keypoints, placements, strict=True)
        return [self.to_image(*row, threshold=mask_threshold) for row in rows]

    @torch.no_grad()
    def read_boxes(
        self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], labels: Sequence[Int[Tensor, " _n"]],
        refine: bool = True,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Predicts masks and keypoints in boxes of each image, in pixels of the input.

        Returns:
            For each image, masks (N, 28, 28) as probabilities of the box's class ((N, 224, 224) if refined), and maps
            of keypoints (N, J, 56, 56) as logits; None where there is no such head.
        """
        counts = [len(own) for own in boxes]
        masks: list[Tensor | None] = [None] * len(boxes)
        keypoints: list[Tensor | None] = [None] * len(boxes)
        if self.masks is None and self.keypoints is None:
            return masks, keypoints
        features = self.mask_features(raw, boxes)
        if self.masks is not None:
            masks = list(self.mask_probabilities(raw, features, boxes, torch.cat(list(labels)), refine).split(counts))
        if self.keypoints is not None:
            keypoints = list(self.keypoints(features).float().split(counts))
        return masks, keypoints

    def mask_scores(
        self, raw: Raw, found: Sequence[Detections], masks: Sequence[Float[Tensor, "_n s s"]]
    ) -> list[Float[Tensor, " _n"]]:
        """The score of each detected box times the predicted IoU of its mask."""
        assert self.mask_iou is not None
        features = self.mask_features(raw, [own.boxes for own in found])
        iou = self.mask_iou(features, torch.cat(list(masks))).float()
        labels = torch.cat([own.labels for own in found])
        quality = iou[torch.arange(len(iou), device=iou.device), labels].split([len(own.boxes) for own in found])
        return [own.scores * value for own, value in zip(found, quality, strict=True)]

    def rescored(
        self, raw: Raw, found: Sequence[Detections], masks: Sequence[Any], keypoints: Sequence[Any], threshold: float
    ) -> tuple[list[Detections], list[Tensor | None], list[Tensor | None]]:
        """Detections, masks and keypoints in the order of the masks' scores, between 0 and 1.

        With a threshold above the published one, 0.05, objects whose mask scores less are left out too.
        """
        result: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for own, scores, mask, points in zip(found, self.mask_scores(raw, found, masks), masks, keypoints, strict=True):
            order = scores.argsort(descending=True, stable=True)
            if threshold > 0.05:
                order = order[scores[order] > threshold]
            result[0].append(Detections(own.boxes[order], scores[order].clamp(0, 1), own.labels[order]))
            result[1].append(mask[order])
            result[2].append(None if points is None else points[order])
        return result

    def mask_probabilities(
        self, raw: Raw, features: Float[Tensor, "r c _s _s"], boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"], refine: bool = True, network: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        """The mask of each box's class, refined at points if the system has them and unless `refine` is False.

        Args:
            raw: Output of the dense network.
            features: Input of the mask head.
            boxes: The boxes of each image that the features belong to.
            labels: Their classes.
            refine: Whether masks are refined.
            network: The mask head; default `masks`.
        """
        network = network or self.masks
        assert network is not None
        labels = self.mask_labels(labels)
        if self.refinement is not None and self.points is not None and refine:
            coarse = network(features)
            return self.refinement.refine(self.points, raw.features[0], coarse, boxes, labels).sigmoid()
        if self.competing_masks:
            rows = torch.arange(len(labels), device=labels.device)
            return network(features).float().softmax(1)[rows, labels]
        return network(features, labels)[:, 0].float().sigmoid()

    def to_image(
        self, found: Detections, mask: Tensor | None, keypoint: Tensor | None, placement: Placement, threshold: float
    ) -> Instances:
        """Detections of one image, with masks and maps of keypoints, as objects on the image."""
        boxes, kept = self.boxes_to_image(found.boxes, placement)
        masks = points = None
        if mask is not None:
            mask = mask[kept].flip(-1) if placement.mirrored else mask[kept]
            masks = paste_masks(
                mask, boxes, placement.image_size, rule=self.rules.paste, threshold=threshold,
                strict=self.rules.paste_above,
            )  # fmt: skip
        if keypoint is not None:
            points = keypoint_ops.decode(keypoint[kept], found.boxes[kept], self.rules.keypoints)
            points = torch.cat([placement.points_to_image(points[..., :2]), points[..., 2:]], -1)
        boxes = self.extents(boxes)
        return Instances(placement.image_size, boxes, found.labels[kept], masks, found.scores[kept], points)

    # ---- for loading and training ------------------------------------------------------------------------------------

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **TwoStage.renamed_options,
        "mask_convs": "masks.convs", "mask_width": "masks.width", "mask_norm": "masks.norm", "mask_loss": "masks.loss",
        "agnostic_masks": "masks.agnostic", "keypoint_convs": "keypoints.convs", "keypoint_width": "keypoints.width",
    }  # fmt: skip
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **TwoStage.renamed_parameters,
        "mask_head.": "masks.", "points.head.": "points.", "keypoint_head.": "keypoints.",
    }  # fmt: skip

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Converts options of earlier versions: `masks` and `keypoints` were switches beside the options of heads."""
        heads = {name for name, new in cls.renamed_options.items() if new and new.startswith(("masks.", "keypoints."))}
        if not heads & options.keys():
            return super().upgraded(options)
        result = super().upgraded({k: v for k, v in options.items() if k not in ("masks", "keypoints")})
        if not options.get("masks", True):
            result["masks"] = False
        if "keypoints" in options:
            count = options["keypoints"]
            result["keypoints"] = {**result.get("keypoints", {}), "count": count} if count else False
        return result

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows = dict(super().class_rows())
        if self.masks is None or self.agnostic_masks:
            return rows
        for kind in ("weight", "bias"):
            rows[f"masks.logits.{kind}"] = ClassRows(background_last=self.competing_masks)
            if self.mask_iou is not None:
                rows[f"mask_iou.iou.{kind}"] = ClassRows()
        return rows | self.point_rows()

    def point_rows(self) -> dict[str, tuple[ClassRows, ...]]:
        """The rows per class of the point network."""
        if not isinstance(self.points, PointHead):
            return {}
        return {
            f"points.{name}": tuple(ClassRows(axis, before=before) for axis, before in axes)
            for name, axes in self.points.class_rows().items()
        }

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _TORCH: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2}
    _X101: ClassVar[dict[str, Any]] = {"name": "resnet101", **_TORCH, "groups": 32, "group_width": 8}
    _X101_STD: ClassVar[tuple[float, ...]] = (57.375, 57.12, 58.395)
    _SMALL: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
        "neck_width": 128, "neck_norm": "group", "boxes": {"width": 512},
        "proposals": {"anchor_sizes": (16, 32, 64, 128, 256), "before": (500, 300), "after": (300, 200)},
    }  # fmt: skip
    _D2 = "COCO val2017, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    _STILL: ClassVar[dict[str, Any]] = {"norm": "still", "frozen": 2}
    _X64: ClassVar[dict[str, Any]] = {"name": "resnet101", **_STILL, "groups": 64, "group_width": 4}
    _MMZOO = "MMDetection 3.3, metafile.yml"
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask-rcnn-r50-fpn": Preset(
            {"backbone": _CAFFE},
            (Score(38.6, "box AP", _D2, _ZOO), Score(35.2, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN; figures of the 1x schedule (3x: 41.0 / 37.2)",
        ),
        "mask-rcnn-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **_CAFFE}},
            (Score(42.9, "box AP", _D2, _ZOO), Score(38.6, "mask AP", _D2, _ZOO)),
            "detectron2's R101-FPN, 3x",
        ),
        "mask-rcnn-x101-fpn": Preset(
            {"backbone": _X101, "resize": {"std": _X101_STD}},
            (Score(44.3, "box AP", _D2, _ZOO), Score(39.5, "mask AP", _D2, _ZOO)),
            "detectron2's X101-32x8d-FPN, 3x",
        ),
        "mask-rcnn-r50-c4": Preset(
            {"backbone": _CAFFE, "neck": "c4"},
            (Score(39.8, "box AP", _D2, _ZOO), Score(34.4, "mask AP", _D2, _ZOO)),
            "detectron2's R50-C4, 3x",
        ),
        "mask-rcnn-r50-dc5": Preset(
            {"backbone": _CAFFE, "neck": "dc5"},
            (Score(40.0, "box AP", _D2, _ZOO), Score(35.9, "mask AP", _D2, _ZOO)),
            "detectron2's R50-DC5, 3x",
        ),
        "mask-rcnn-r50-fpn-gn": Preset(
            {
                "neck_norm": "group", "boxes": {"convs": 4, "fcs": 1, "norm": "group"}, "masks": {"norm": "group"},
            },
            (Score(42.6, "box AP", _D2, _ZOO), Score(38.6, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN with group norm, 3x; trains from random weights and with small batches",
        ),
        "mask-rcnn-r50-fpn-dconv": Preset(
            {"backbone": {**_CAFFE, "deform_stages": (1, 2, 3)}},
            (Score(42.7, "box AP", _D2, _ZOO), Score(38.5, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN with deformable convolutions in res3 ... res5, 3x",
        ),
        "mask-rcnn-r50-fpn-lsj": Preset(
            {
                "backbone": {"norm": "batch", "stride_in": "1x1"}, "neck_norm": "batch", "proposals": {"convs": 2},
                "boxes": {"convs": 4, "fcs": 1, "norm": "batch"}, "masks": {"norm": "batch"},
            },
            (Score(47.4, "box AP", _D2, _ZOO), Score(42.5, "mask AP", _D2, _ZOO)),
            "detectron2's new baseline, large-scale jitter, 400 epochs",
        ),
        "mask-rcnn-r50-fpn-torchvision": Preset(
            {"backbone": {**_TORCH, "norm_eps": 0.0}, "rules": "torchvision"},
            (Score(37.9, "box AP", _D2, "torchvision 0.26"), Score(34.6, "mask AP", _D2, "torchvision 0.26")),
            "torchvision's maskrcnn_resnet50_fpn",
        ),
        "mask-rcnn-r50-fpn-torchvision-v2": Preset(
            {
                "backbone": {"norm": "batch"}, "rules": "torchvision", "neck_norm": "batch", "proposals": {"convs": 2},
                "boxes": {"convs": 4, "fcs": 1, "norm": "batch"}, "masks": {"norm": "batch"},
            },
            (Score(47.4, "box AP", _D2, "torchvision 0.26"), Score(41.8, "mask AP", _D2, "torchvision 0.26")),
            "torchvision's maskrcnn_resnet50_fpn_v2",
        ),
        "mask-rcnn-r50-fpn-mmdetection": Preset(
            {"backbone": _STILL, "rules": "mmdetection"},
            (Score(38.2, "box AP", _D2, _MMZOO), Score(34.7, "mask AP", _D2, _MMZOO)),
            "MMDetection's mask-rcnn_r50_fpn, 1x (2x: 39.2 / 35.4)",
        ),
        "mask-rcnn-x101-64x4d-fpn-mmdetection": Preset(
            {"backbone": _X64, "rules": "mmdetection"},
            (Score(42.8, "box AP", _D2, _MMZOO), Score(38.4, "mask AP", _D2, _MMZOO)),
            "MMDetection's mask-rcnn_x101-64x4d_fpn, 1x",
        ),
        "mask-rcnn-small": Preset(
            {**_SMALL, "masks": {"width": 128}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "width": 32}, "resize": {"short": 160, "long": 160}, "neck_width": 64,
        "proposals": {"anchor_sizes": (16, 32, 64, 96, 128), "before": (300, 200), "after": (100, 50)},
        "boxes": {"width": 256}, "masks": {"convs": 2, "width": 64},
    }  # fmt: skip
    _SCENES: ClassVar[dict[str, Any]] = {
        "size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4,
    }  # fmt: skip
    _TRAINED: ClassVar[dict[str, Any]] = {"lr": 1e-3, "warmup": 50, "ema": 0.99}
    _MEMORY = "COCO minival, R50-C4, mask AP; the paper's third version; not verified"
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "2b": Ablation(
            "masks of classes that compete (softmax) or not (sigmoid)",
            {"softmax": {"masks": {"loss": "softmax"}}, "sigmoid": {}},
            {
                "softmax": {"AP": 24.8, "AP50": 44.1, "AP75": 25.1},
                "sigmoid": {"AP": 30.3, "AP50": 51.2, "AP75": 31.5},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
        "2c": Ablation(
            "how boxes are pooled from the features",
            {"RoIPool": {"pooling": "pool"}, "RoIWarp": {"pooling": "warp"}, "RoIAlign": {}},
            {
                "RoIPool": {"AP": 26.9, "AP50": 48.8, "AP75": 26.4},
                "RoIWarp": {"AP": 27.2, "AP50": 49.2, "AP75": 27.1},
                "RoIAlign": {"AP": 30.3, "AP50": 51.2, "AP75": 31.5},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
    }  # fmt: skip
