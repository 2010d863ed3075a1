"""Mask R-CNN (He, Gkioxari, Dollár, Girshick, ICCV 2017, arXiv 1703.06870).

A region proposal network looks at every place of a feature pyramid and says where an object might be. For each such
box, features are read with RoIAlign, without rounding; one head says class and finer box, another, fully convolutional,
paints a small binary mask for every class. Class and mask are decoupled: each class has its own sigmoid, and only the
mask of the predicted class is used. A third head can do the same for keypoints (section 5).

The two published implementations, detectron2 and torchvision, agree on this and differ in some twenty conventions that
change numbers; `RULES` names them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import StrideIn, freeze
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import FrozenBatchNorm, Norm
from maskwright.blocks.points import BoxPoints, PointRules
from maskwright.blocks.resnet import ResNet, make_stage
from maskwright.blocks.roi_heads import (
    BoxHead,
    KeypointHead,
    MaskHead,
    Pooler,
    Pooling,
    RoIRules,
    Sampled,
    box_losses,
    detect,
    keypoint_loss,
    sample_proposals,
)
from maskwright.blocks.rpn import Anchors, ProposalRules, RPNHead, proposal_losses, propose
from maskwright.blocks.timm_backbone import TimmBackbone
from maskwright.blocks.trunk import normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.paste import paste_masks
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import Ablation, Card, ClassRows, Preset, Score, System


@dataclass(frozen=True)
class Rules:
    """The conventions of one published implementation."""

    proposals: ProposalRules
    rois: RoIRules
    aligned: bool
    samples: int
    levels: box_ops.LevelRule
    upsample: Literal["double", "fit"]
    mask_rule: Literal["binary", "soft"]
    mask_init: Literal["small", "kaiming"]
    paste: Literal["continuous", "padded"]
    finish: Literal["clip", "scale"]  # final boxes: clipped to the image and dropped if empty, or only scaled
    keypoints: keypoint_ops.Scoring
    keypoints_inside: bool  # keypoints are learnt only from boxes that hold at least one


RULES = {
    "detectron2": Rules(
        ProposalRules(), RoIRules(), aligned=True, samples=0, levels="detectron2", upsample="double",
        mask_rule="binary", mask_init="small", paste="continuous", finish="clip", keypoints="probability",
        keypoints_inside=True,
    ),
    "torchvision": Rules(
        ProposalRules(
            rounded=True, loss="sampled", beta=1 / 9, smallest_side=1e-3, inclusive=True, by="probability",
            after=(2000, 1000),
        ),
        RoIRules(beta=1 / 9, sampled_order="index", smallest_side=1e-2),
        aligned=False, samples=2, levels="torchvision", upsample="fit", mask_rule="soft", mask_init="kaiming",
        paste="padded", finish="scale", keypoints="logit", keypoints_inside=False,
    ),
}  # fmt: skip

# The colours of ImageNet as the two code bases write them.
PREPROCESS = {
    "detectron2": Preprocess(
        resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "torchvision": Preprocess(resample="tensor"),
}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """What the network says of every place, before any box is chosen."""

    features: tuple[Float[Tensor, "b c _h _w"], ...]  # finest first; the RPN reads all of them
    objectness: tuple[Float[Tensor, "b a _h _w"], ...]  # logits
    deltas: tuple[Float[Tensor, "b d _h _w"], ...]  # d = 4 A, anchor by anchor
    size: tuple[int, int]  # H, W of the input, padding included


class MaskRCNN(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `mask_threshold`."""

    name = "mask-rcnn"
    card = Card(
        title="Mask R-CNN",
        paper="He, Gkioxari, Dollár, Girshick: Mask R-CNN. ICCV 2017",
        arxiv="1703.06870",
        code="facebookresearch/detectron2; pytorch/vision",
        code_licence="Apache-2.0; BSD-3-Clause",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        groups: int = 1,
        group_width: int = 64,
        stride_in: StrideIn = "3x3",
        deform_stages: Sequence[int] = (),
        deform_modulated: bool = False,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck: Literal["fpn", "c4", "dc5"] = "fpn",
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: str = "detectron2",
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        rpn_convs: int = 1,
        proposals_before: Sequence[int] | None = None,
        proposals_after: Sequence[int] | None = None,
        box_convs: int = 0,
        box_fcs: int = 2,
        box_width: int = 1024,
        box_norm: Norm = "none",
        box_beta: float | None = None,
        agnostic_boxes: bool = False,
        pooling: Pooling = "align",
        masks: bool = True,
        mask_convs: int = 4,
        mask_width: int = 256,
        mask_norm: Norm = "none",
        mask_loss: Literal["sigmoid", "softmax"] = "sigmoid",
        agnostic_masks: bool = False,
        points: bool = False,
        keypoints: int = 0,
        keypoint_convs: int = 8,
        keypoint_width: int = 512,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone        "resnet18" ... "resnet152", or "timm:NAME" for any of timm's with strides 4 to 32
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width      channels after the stem; all stages scale with it (64 as published)
        groups, group_width, stride_in, deform_stages, deform_modulated
                        the trunk's variants: see `blocks.resnet`
        norm            of the trunk: "group" trains from random weights and with small batches; "frozen" is what most
                        published weights have
        frozen          so many parts of the trunk do not train, from the stem on (as published 2: stem, first stage)
        neck            "fpn"; "c4": one level of stride 16, the last stage is the heads' (sections 3, table 2);
                        "dc5": one level of stride 16 from a dilated last stage
        rules           "detectron2" or "torchvision": see RULES
        anchor_sizes    one per level with "fpn"; all on the one level otherwise
        proposals_*     (training, test) numbers kept before and after suppression; None: as published
        box_beta        of the box head's smooth L1; None: as published
        pooling         "align", "warp", "pool" (table 2c and d)
        mask_loss       "sigmoid": a binary mask per class; "softmax": classes and background compete at each pixel
                        (table 2b)
        agnostic_masks  one mask for all classes (section 4.2)
        points          masks are refined at single points (PointRend, arXiv 1912.08193), to 224 x 224; "fpn" only
        masks, keypoints  which heads there are, `keypoints` being the number of keypoints
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        if rules not in RULES:
            raise UsageError(f"rules is {rules!r}; expected {' or '.join(RULES)}")
        if neck not in ("fpn", "c4", "dc5"):
            raise UsageError(f"neck is {neck!r}; expected fpn, c4 or dc5")
        self.classes = tuple(classes)
        self.rules = own = RULES[rules]
        self.mask_loss, self.agnostic_masks, self.agnostic_boxes = mask_loss, agnostic_masks, agnostic_boxes
        count = len(self.classes)

        trunk: dict[str, Any] = {
            "in_channels": in_channels, "base": stem_width, "groups": groups, "group_width": group_width,
            "stride_in": stride_in, "deform_stages": deform_stages, "deform_modulated": deform_modulated,
            "norm": norm, "eps": norm_eps, "frozen": frozen,
        }  # fmt: skip
        depth = int(backbone[6:]) if backbone.startswith("resnet") and backbone[6:].isdigit() else 0
        if backbone.startswith("timm:"):
            if neck != "fpn":
                raise UsageError("a timm backbone needs neck='fpn'")
            self.backbone = TimmBackbone(backbone[5:], in_channels=in_channels, pretrained=pretrained, frozen=frozen)
        elif depth:
            try:
                stages, dilation = (3 if neck == "c4" else 4), (2 if neck == "dc5" else 1)
                self.backbone = ResNet(depth, stages=stages, dilation=dilation, **trunk)
            except ValueError as error:
                raise UsageError(str(error)) from None
        else:
            raise UsageError(f"backbone is {backbone!r}; expected resnet18 ... resnet152 or timm:NAME")

        self.neck = self.roi_stage = None
        if neck == "fpn":
            self.neck = FPN(self.backbone.channels, neck_width, norm=neck_norm, upsample=own.upsample)
            channels, strides, sizes = neck_width, [4, 8, 16, 32, 64], [[s] for s in anchor_sizes]
            if len(anchor_sizes) != 5:
                raise UsageError(f"anchor_sizes has {len(anchor_sizes)} entries; a pyramid has 5 levels")
        else:
            channels, strides, sizes = self.backbone.channels[-1], self.backbone.strides[-1:], [list(anchor_sizes)]
        read = channels
        if neck == "c4":
            self.roi_stage, read = make_stage(
                depth, 3, channels, base=stem_width, groups=groups, group_width=group_width, stride_in=stride_in,
                norm=norm, eps=norm_eps,
            )  # fmt: skip
            freeze([self.roi_stage] if frozen > 4 else [])
            box_fcs, mask_convs = 0, 0

        for name, given in (("proposals_before", proposals_before), ("proposals_after", proposals_after)):
            if given is not None and (len(given) != 2 or min(given) < 0):
                raise UsageError(f"{name} is {tuple(given)}; expected two numbers, in training and at test, from 0 on")
        before = proposals_before or (own.proposals.before if neck == "fpn" else (12000, 6000))
        after = proposals_after or (own.proposals.after if neck == "fpn" else (2000, 1000))
        self.proposal_rules = replace(own.proposals, before=tuple(before), after=tuple(after))
        self.roi_rules = own.rois if box_beta is None else replace(own.rois, beta=box_beta)
        self.anchors = Anchors(sizes, strides, rounded=own.proposals.rounded)
        self.rpn = RPNHead(channels, self.anchors.count, rpn_convs)

        read_strides = tuple(strides[:4]) if neck == "fpn" else tuple(strides)
        self.pooler = Pooler(read_strides, pooling, own.aligned, own.samples, own.levels)
        self.box_side, self.mask_side = (14, 14) if neck == "c4" else (7, 14)
        self.box_head = BoxHead(
            read, self.box_side, count, convs=box_convs, conv_channels=neck_width, fcs=box_fcs, width=box_width,
            norm=box_norm, agnostic=agnostic_boxes,
        )  # fmt: skip
        outputs = 1 if agnostic_masks else count + (mask_loss == "softmax")
        self.mask_head = (
            MaskHead(read, outputs, convs=mask_convs, width=mask_width, norm=mask_norm, init=own.mask_init)
            if masks else None
        )  # fmt: skip
        self.points: BoxPoints | None = None
        if points:
            if neck != "fpn" or mask_loss != "sigmoid" or not masks:
                raise UsageError("points=True needs masks, neck='fpn' and mask_loss='sigmoid'")
            self.points = BoxPoints(neck_width, outputs, width=mask_width, rules=PointRules(steps=3))
        self.keypoint_head = (
            KeypointHead(read, keypoints, convs=keypoint_convs, width=keypoint_width) if keypoints else None
        )
        if rules == "torchvision":
            for module in self.modules():
                if isinstance(module, FrozenBatchNorm):
                    module.fused = False  # it multiplies and adds, which rounds otherwise

        self.preprocess = normalization_for(PREPROCESS[rules].at(short, long), in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        features = self.neck(features) if self.neck is not None else features[-1:]
        objectness, deltas = self.rpn(features)
        return Raw(tuple(features), tuple(objectness), tuple(deltas), (images.shape[-2], images.shape[-1]))

    def pooled(self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], side: int) -> Float[Tensor, "r c s s"]:
        """Features of boxes of each image (in the input's pixels), ready for the heads."""
        features = self.pooler(raw.features, boxes, side)
        return features if self.roi_stage is None else self.roi_stage(features)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`rpn_objectness`, `rpn_box`, `class`, `box`, and `mask`, `keypoint` where there are such heads.

        Targets are in the frame of the input; crowd regions are not learnt from.
        """
        device = raw.objectness[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        anchors = self.anchors(raw.features, raw.size)
        terms = proposal_losses(raw.objectness, raw.deltas, anchors, targets, self.proposal_rules)
        sizes = [t.image_size for t in targets]
        proposals = propose(raw.objectness, raw.deltas, anchors, sizes, self.proposal_rules, training=True)
        return terms | self.roi_losses(raw, [boxes for boxes, _ in proposals], targets)

    def roi_losses(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """The heads' losses for these proposals."""
        sampled = [
            sample_proposals(p, t, len(self.classes), self.roi_rules) for p, t in zip(proposals, targets, strict=True)
        ]
        features = self.pooled(raw, [s.boxes for s in sampled], self.box_side)
        logits, deltas = self.box_head(features)
        terms = box_losses(logits, deltas, sampled, targets, self.roi_rules)
        foreground = self.mask_boxes(sampled, deltas)
        if self.mask_head is not None:
            if self.roi_stage is not None:  # the same features serve both heads
                counts = [len(s.boxes) for s in sampled]
                read = torch.cat([f[s.foreground] for f, s in zip(features.split(counts), sampled, strict=True)])
            else:
                read = self.mask_features(raw, foreground)
            terms |= self.mask_losses(raw, read, sampled, foreground, targets)
        if self.keypoint_head is not None:
            head, inside = self.keypoint_head, self.rules.keypoints_inside
            terms["keypoint"] = keypoint_loss(
                lambda boxes: head(self.pooled(raw, boxes, self.mask_side)), sampled, foreground, targets, inside
            )
        return terms

    def mask_boxes(self, sampled: Sequence[Sampled], deltas: Tensor) -> list[Float[Tensor, "_n 4"]]:
        """The boxes in which masks and keypoints are learnt: the foreground's proposals."""
        return [s.boxes[s.foreground] for s in sampled]

    def mask_features(self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r c s s"]:
        """What the mask head reads of each box."""
        return self.pooled(raw, boxes, self.mask_side)

    def mask_losses(
        self, raw: Raw, features: Tensor, sampled: Sequence[Sampled], boxes: Sequence[Tensor],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:  # fmt: skip
        """`mask`, mean over the pixels of all foreground boxes; a box's target is the object's mask inside the
        *proposal*. With `points`, `mask_point` too."""
        assert self.mask_head is not None
        labels = torch.cat([s.labels[s.foreground] for s in sampled])
        owners = [s.owners for s in sampled]
        if any(t.masks is None and len(o) for t, o in zip(targets, owners, strict=True)):
            raise UsageError("a target has boxes but no masks; train with keypoints only, or give masks")
        own = torch.zeros_like(labels) if self.agnostic_masks else labels
        coarse = self.mask_head(features) if self.mask_loss == "softmax" or self.points is not None else None
        if coarse is None:
            logits = self.mask_head.of(features, own).float()
        elif self.mask_loss == "softmax":
            logits = coarse.float()
        else:
            logits = coarse[torch.arange(len(own), device=own.device), own].float()
        side = logits.shape[-1]
        truth = torch.cat(
            [
                b.new_zeros(0, side, side) if t.masks is None
                else mask_targets(t.masks, o, b, side, rule=self.rules.mask_rule)
                for t, o, b in zip(targets, owners, boxes, strict=True)
            ]
        )  # fmt: skip
        count = global_mean_count(truth.new_tensor(float(truth.numel())))
        if self.mask_loss == "softmax":
            goal = torch.where(truth >= 0.5, labels[:, None, None], logits.shape[1] - 1)
            return {"mask": functional.cross_entropy(logits, goal, reduction="sum") / count + logits.sum() * 0}
        terms = {"mask": functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / count}
        if self.points is not None and coarse is not None:
            terms["mask_point"] = self.points.loss(raw.features[0], coarse, boxes, own, targets, owners)
        return terms

    # ---- objects -------------------------------------------------------------------------------------------------

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
    ) -> list[Instances]:
        """refine  False: coarse masks alone, where points could refine them"""
        found = self.find(raw, [p.size for p in placements], score_threshold, nms_threshold, detections)
        masks, keypoints = self.read_boxes(raw, [b for b, _, _ in found], [k for _, _, k in found], refine)
        return [
            self._on_image(boxes, scores, kinds, mask, keypoint, placement, mask_threshold)
            for (boxes, scores, kinds), mask, keypoint, placement in zip(
                found, masks, keypoints, placements, strict=True
            )
        ]

    @torch.no_grad()
    def find(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], score_threshold: float, nms_threshold: float, detections: int
    ) -> list[tuple[Float[Tensor, "_d 4"], Float[Tensor, " _d"], Int[Tensor, " _d"]]]:
        """Boxes (in the input's pixels), scores and labels for each image of valid size (h, w), best first."""
        anchors = self.anchors(raw.features, raw.size)
        proposals = propose(raw.objectness, raw.deltas, anchors, sizes, self.proposal_rules)
        boxes = [b for b, _ in proposals]
        logits, deltas = self.box_head(self.pooled(raw, boxes, self.box_side))
        return detect(
            logits, deltas, boxes, sizes, self.roi_rules,
            score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
        )  # fmt: skip

    @torch.no_grad()
    def read_boxes(
        self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], labels: Sequence[Tensor], refine: bool = True
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """For boxes of each image (in the input's pixels): masks (N, 28, 28) as probabilities of the box's class
        (with points, unless not to `refine`, (N, 224, 224)), and keypoints' maps (N, J, 56, 56) as logits; None where
        there is no such head."""
        counts = [len(b) for b in boxes]
        masks: list[Tensor | None] = [None] * len(boxes)
        keypoints: list[Tensor | None] = [None] * len(boxes)
        if self.mask_head is None and self.keypoint_head is None:
            return masks, keypoints
        features = self.mask_features(raw, boxes)
        if self.mask_head is not None:
            masks = list(self.box_masks(raw, features, boxes, torch.cat(list(labels)), refine).split(counts))
        if self.keypoint_head is not None:
            keypoints = list(self.keypoint_head(features).float().split(counts))
        return masks, keypoints

    def box_masks(
        self, raw: Raw, features: Float[Tensor, "r c _s _s"], boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"], refine: bool = True,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        """Masks of boxes as probabilities."""
        assert self.mask_head is not None
        own = torch.zeros_like(labels) if self.agnostic_masks else labels
        if self.mask_loss == "softmax":
            rows = torch.arange(len(own), device=own.device)
            return self.mask_head(features).float().softmax(1)[rows, own]
        if self.points is None or not refine:
            return self.mask_head.of(features, own).float().sigmoid()
        return self.points.refine(raw.features[0], self.mask_head(features), boxes, own).sigmoid()

    def _on_image(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, mask: Tensor | None, keypoint: Tensor | None,
        placement: Placement, threshold: float,
    ) -> Instances:  # fmt: skip
        size = placement.image_size
        points = None
        if keypoint is not None:
            points = keypoint_ops.decode(keypoint, boxes, self.rules.keypoints)
            points = torch.cat([placement.points_to_image(points[..., :2]), points[..., 2:]], -1)
        boxes = placement.boxes_to_image(boxes)
        if self.rules.finish == "clip":
            boxes = box_ops.clip(boxes, size)
            solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
            mask, points = (None if v is None else v[solid] for v in (mask, points))
        if mask is not None and placement.mirrored:
            mask = mask.flip(-1)
        masks = None if mask is None else paste_masks(mask, boxes, size, rule=self.rules.paste, threshold=threshold)
        return Instances(size, boxes, labels, masks, scores, points)

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        parts = {
            "backbone": [self.backbone], "neck": [self.neck], "rpn": [self.rpn],
            "heads": [self.roi_stage, self.box_head, self.mask_head, self.points, self.keypoint_head],
        }  # fmt: skip
        return {name: [m for m in modules if m is not None] for name, modules in parts.items()}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows: dict[str, ClassRows | tuple[ClassRows, ...]] = {}
        for kind in ("weight", "bias"):
            rows[f"box_head.classes.{kind}"] = ClassRows(background_last=True)
            if not self.agnostic_boxes:
                rows[f"box_head.deltas.{kind}"] = ClassRows(per_class=4)
            if self.mask_head is not None and not self.agnostic_masks:
                rows[f"mask_head.logits.{kind}"] = ClassRows(background_last=self.mask_loss == "softmax")
        if self.points is not None and not self.agnostic_masks:
            for name, axes in self.points.head.class_rows().items():
                rows[f"points.head.{name}"] = tuple(ClassRows(axis, before=before) for axis, before in axes)
        return rows

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2}
    _D2 = "COCO val2017, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask-rcnn-r50-fpn": Preset(
            {**_PUBLISHED, "stride_in": "1x1"},
            (Score(38.6, "box AP", _D2, _ZOO), Score(35.2, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN; figures of the 1x schedule (3x: 41.0 / 37.2)",
        ),
        "mask-rcnn-r101-fpn": Preset(
            {**_PUBLISHED, "backbone": "resnet101", "stride_in": "1x1"},
            (Score(42.9, "box AP", _D2, _ZOO), Score(38.6, "mask AP", _D2, _ZOO)),
            "detectron2's R101-FPN, 3x",
        ),
        "mask-rcnn-x101-fpn": Preset(
            {**_PUBLISHED, "backbone": "resnet101", "groups": 32, "group_width": 8, "std": (57.375, 57.12, 58.395)},
            (Score(44.3, "box AP", _D2, _ZOO), Score(39.5, "mask AP", _D2, _ZOO)),
            "detectron2's X101-32x8d-FPN, 3x",
        ),
        "mask-rcnn-r50-c4": Preset(
            {**_PUBLISHED, "stride_in": "1x1", "neck": "c4"},
            (Score(39.8, "box AP", _D2, _ZOO), Score(34.4, "mask AP", _D2, _ZOO)),
            "detectron2's R50-C4, 3x",
        ),
        "mask-rcnn-r50-dc5": Preset(
            {**_PUBLISHED, "stride_in": "1x1", "neck": "dc5"},
            (Score(40.0, "box AP", _D2, _ZOO), Score(35.9, "mask AP", _D2, _ZOO)),
            "detectron2's R50-DC5, 3x",
        ),
        "mask-rcnn-r50-fpn-gn": Preset(
            {
                "norm": "group", "neck_norm": "group", "box_convs": 4, "box_fcs": 1, "box_norm": "group",
                "mask_norm": "group",
            },
            (Score(42.6, "box AP", _D2, _ZOO), Score(38.6, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN with group norm, 3x; trains from random weights and with small batches",
        ),
        "mask-rcnn-r50-fpn-dconv": Preset(
            {**_PUBLISHED, "stride_in": "1x1", "deform_stages": (1, 2, 3)},
            (Score(42.7, "box AP", _D2, _ZOO), Score(38.5, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN with deformable convolutions in res3 ... res5, 3x",
        ),
        "mask-rcnn-r50-fpn-lsj": Preset(
            {
                "stride_in": "1x1", "norm": "batch", "frozen": 0, "neck_norm": "batch", "rpn_convs": 2, "box_convs": 4,
                "box_fcs": 1, "box_norm": "batch", "mask_norm": "batch",
            },
            (Score(47.4, "box AP", _D2, _ZOO), Score(42.5, "mask AP", _D2, _ZOO)),
            "detectron2's new baseline, large-scale jitter, 400 epochs",
        ),
        "mask-rcnn-r50-fpn-torchvision": Preset(
            {**_PUBLISHED, "rules": "torchvision", "norm_eps": 0.0},
            (Score(37.9, "box AP", _D2, "torchvision 0.26"), Score(34.6, "mask AP", _D2, "torchvision 0.26")),
            "torchvision's maskrcnn_resnet50_fpn",
        ),
        "mask-rcnn-r50-fpn-torchvision-v2": Preset(
            {
                "rules": "torchvision", "norm": "batch", "neck_norm": "batch", "rpn_convs": 2, "box_convs": 4,
                "box_fcs": 1, "box_norm": "batch", "mask_norm": "batch",
            },
            (Score(47.4, "box AP", _D2, "torchvision 0.26"), Score(41.8, "mask AP", _D2, "torchvision 0.26")),
            "torchvision's maskrcnn_resnet50_fpn_v2",
        ),
        "mask-rcnn-small": Preset(
            {
                "backbone": "resnet18", "norm": "group", "frozen": 0, "neck_width": 128, "neck_norm": "group",
                "box_convs": 0, "box_width": 512, "mask_width": 128, "anchor_sizes": (16, 32, 64, 128, 256),
                "proposals_before": (500, 300), "proposals_after": (300, 200), "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": "resnet18", "stem_width": 32, "neck_width": 64, "anchor_sizes": (16, 32, 64, 96, 128),
        "proposals_before": (300, 200), "proposals_after": (100, 50), "box_width": 256, "mask_convs": 2,
        "mask_width": 64, "short": 160, "long": 160,
    }  # fmt: skip
    _SCENES: ClassVar[dict[str, Any]] = {
        "size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4,
    }  # fmt: skip
    _TRAINED: ClassVar[dict[str, Any]] = {"lr": 1e-3, "warmup": 50, "ema": 0.99}
    _MEMORY = "COCO minival, R50-C4, mask AP; the paper's third version, from memory"
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "2b": Ablation(
            "masks of classes that compete (softmax) or do not (sigmoid)",
            {"softmax": {"mask_loss": "softmax"}, "sigmoid": {}},
            {
                "softmax": {"AP": 24.8, "AP50": 44.1, "AP75": 25.1},
                "sigmoid": {"AP": 30.3, "AP50": 51.2, "AP75": 31.5},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
        "2c": Ablation(
            "how boxes are cut from the features",
            {"RoIPool": {"pooling": "pool"}, "RoIWarp": {"pooling": "warp"}, "RoIAlign": {}},
            {
                "RoIPool": {"AP": 26.9, "AP50": 48.8, "AP75": 26.4},
                "RoIWarp": {"AP": 27.2, "AP50": 49.2, "AP75": 27.1},
                "RoIAlign": {"AP": 30.3, "AP50": 51.2, "AP75": 31.5},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
    }  # fmt: skip
