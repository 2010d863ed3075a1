"""Two-stage systems: boxes are proposed, then each is classified and refined (Faster R-CNN, arXiv 1506.01497).

`TwoStage` holds what such systems share: the dense network with its proposals, pooling of boxes from the pyramid, and
the box stage. Subclasses add networks that describe the boxes. The published implementations agree on the method and
differ in about twenty conventions that change numbers; `RULES` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, Use, freeze, levels_of
from maskwright.blocks.box_stage import (
    Assigned,
    BoxRules,
    Detections,
    box_losses,
    decode_boxes,
    detect,
    sample_boxes,
)
from maskwright.blocks.fpn import FPN, PathAggregation
from maskwright.blocks.layers import FrozenBatchNorm, Norm
from maskwright.blocks.resnet import make_stage
from maskwright.blocks.roi_heads import BoxHead, Pooler, Pooling
from maskwright.blocks.rpn import Anchors, ProposalRules, RPNHead, proposal_losses, propose
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops import keypoints, mask_targets, paste
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize
from maskwright.systems.system import ClassRows, Output, System, at_least

RulesName = Literal["detectron2", "torchvision", "mmdetection", "mmdetection-caffe", "maskrcnn-benchmark", "detectron"]
Neck = Literal["fpn", "pafpn", "c4", "dc5"]


# ---- conventions and options -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The conventions of one published implementation.

    Attributes:
        proposals: Of the proposal network.
        boxes: Of the box stage.
        aligned: Of RoIAlign, see `ops.pooling.roi_align`.
        samples: Of RoIAlign, see `ops.pooling.roi_align`.
        levels: The pyramid level of a box, see `ops.boxes.pyramid_level`.
        upsample: Of the pyramid, see `blocks.fpn.FPN`.
        mask_targets: Targets of masks, see `ops.mask_targets.mask_targets`.
        mask_init: Initialisation of the mask head's last layer, see `blocks.roi_heads.MaskHead`.
        paste: Pasting of masks, see `ops.paste.paste_masks`.
        paste_above: A pixel belongs to a mask if its value is above the threshold, instead of at least the threshold.
        finish: Detected boxes on the image: "clip": clipped to it and dropped if empty; "scale": only scaled.
        keypoints: Score of keypoints, see `ops.keypoints.decode`.
        keypoints_inside: Keypoints are trained only on boxes that contain at least one.
        quality_above: A pixel of a mask whose IoU is the target of a MaskIoU head has a logit above it.
        quality_area: Area of whole objects in this target, see `ops.mask_targets.share_inside`.
        semantic: Loss of semantic branches: "fine", or "coarse" labels, see `blocks.semantic.semantic_loss`.
        panoptic_score: Score above which things are part of a panoptic segmentation.
    """

    proposals: ProposalRules = field(default_factory=ProposalRules)
    boxes: BoxRules = field(default_factory=BoxRules)
    aligned: bool = True
    samples: int = 0
    levels: box_ops.LevelRule = "detectron2"
    upsample: Literal["double", "fit"] = "double"
    mask_targets: mask_targets.Rule = "binary"
    mask_init: Literal["small", "kaiming"] = "small"
    paste: paste.Rule = "continuous"
    paste_above: bool = False
    finish: Literal["clip", "scale"] = "clip"
    keypoints: keypoints.Scoring = "probability"
    keypoints_inside: bool = True
    quality_above: float = 0.0
    quality_area: Literal["raster", "pixels"] = "raster"
    semantic: Literal["fine", "coarse"] = "fine"
    panoptic_score: float = 0.5


_BENCHMARK = Rules(
    ProposalRules(
        anchors="maskrcnn-benchmark", loss="sampled", beta=1 / 9, inclusive=True, rank_by="probability",
        after=(2000, 1000), plus_one=True, straddle=0.0, whole_batch=True,
    ),
    BoxRules(beta=1.0, sampled_order="index", plus_one=True),
    aligned=False, samples=2, levels="maskrcnn-benchmark", mask_targets="maskrcnn-benchmark", mask_init="kaiming",
    paste="padded", paste_above=True, finish="scale", keypoints="logit", keypoints_inside=False,
)  # fmt: skip
RULES: Mapping[str, Rules] = {
    "detectron2": Rules(),
    "torchvision": Rules(
        ProposalRules(
            anchors="torchvision", loss="sampled", beta=1 / 9, smallest_side=1e-3, inclusive=True,
            rank_by="probability", after=(2000, 1000),
        ),
        BoxRules(beta=1 / 9, sampled_order="index", smallest_side=1e-2),
        aligned=False, samples=2, levels="torchvision", upsample="fit", mask_targets="soft", mask_init="kaiming",
        paste="padded", finish="scale", keypoints="logit", keypoints_inside=False,
    ),
    "maskrcnn-benchmark": _BENCHMARK,
    "detectron": replace(  # as PANet's code, on Detectron.pytorch, configures it
        _BENCHMARK,
        proposals=replace(_BENCHMARK.proposals, loss="fixed"),
        boxes=replace(_BENCHMARK.boxes, beta=1 / 3, sampled_order="kinds"),
    ),
    "mmdetection": (_MMDETECTION := Rules(
        ProposalRules(loss="sampled", rank_by="probability", rescue="own", rescue_from=0.3, symmetric=True),
        BoxRules(rescue=True, added_own=True, symmetric=True, left_out="objects", mean_of="logits"),
        levels="mmdetection", upsample="fit", mask_targets="bitmap", mask_init="kaiming", finish="scale",
        quality_above=0.5, quality_area="pixels", semantic="coarse", panoptic_score=0.6,
    )),
    "mmdetection-caffe": _MMDETECTION,  # differs in the normalisation of images
}  # fmt: skip

# The normalisation of ImageNet models as the code bases write it.
PREPROCESS: Mapping[str, Preprocess] = {
    "detectron2": Preprocess(
        resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "torchvision": Preprocess(resample="tensor"),
    "maskrcnn-benchmark": Preprocess(
        resample="pillow",
        sizes="benchmark",
        mean=(102.9801, 115.9465, 122.7717),
        std=(1.0, 1.0, 1.0),
        divide=1.0,
        channels="BGR",
    ),
    "detectron": Preprocess(
        resample="tensor",
        sizes="rounded",
        mean=(102.9801, 115.9465, 122.7717),
        std=(1.0, 1.0, 1.0),
        divide=1.0,
        channels="BGR",
    ),
    "mmdetection": Preprocess(
        resample="opencv", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0
    ),
    "mmdetection-caffe": Preprocess(
        resample="opencv", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
}


@dataclass(frozen=True)
class Proposals(OptionGroup):
    """The proposal network, as options of a system.

    Attributes:
        anchor_sizes: Square roots of the anchors' areas in pixels: one per level with a pyramid, otherwise all on the
            one level.
        convs: Number of 3 x 3 convolutions of the head.
        before: Proposals per level kept before non-maximum suppression, in training and at test time; None: as
            published.
        after: Proposals of all levels kept after it, likewise.
    """

    label: ClassVar[str] = "proposals"

    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512)
    convs: int = 1
    before: Sequence[int] | None = None
    after: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.anchor_sizes or min(self.anchor_sizes) <= 0:
            raise UsageError(f"proposals.anchor_sizes must be numbers above 0, got {list(self.anchor_sizes)}")
        if self.convs < 0:
            raise UsageError(f"proposals.convs must be at least 0, got {self.convs}")
        for name in ("before", "after"):
            numbers = getattr(self, name)
            if numbers is not None and (len(numbers) != 2 or min(numbers) < 0):
                raise UsageError(
                    f"proposals.{name} must be two integers of at least 0 (training, test), got {list(numbers)}"
                )


@dataclass(frozen=True)
class BoxOptions(OptionGroup):
    """The head of a box stage, as options of a system.

    Attributes:
        convs: Number of 3 x 3 convolutions.
        fcs: Number of fully connected layers; 0 with neck="c4".
        width: Width of the fully connected layers.
        norm: Normalisation after each convolution.
        beta: Beta of the smooth L1 loss; None: as published.
        agnostic: Predict one box for all classes.
    """

    label: ClassVar[str] = "boxes"

    convs: int = 0
    fcs: int = 2
    width: int = 1024
    norm: Norm = "none"
    beta: float | None = None
    agnostic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("convs", 0), ("fcs", 0), ("width", 1), ("beta", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"boxes.{name} must be at least {least}, got {value}")


ProposalsLike = Mapping[str, Any] | Proposals
BoxesLike = Mapping[str, Any] | BoxOptions

_Group = TypeVar("_Group", bound=OptionGroup)


def read_switch(kind: type[_Group], value: Any) -> _Group | None:
    """Reads an option that is a group, True for its defaults, or False for None."""
    return None if value is False else kind.read({} if value is True else value)


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """The output of the dense network.

    Attributes:
        features: Pyramid levels, finest first.
        objectness: Logits of the anchors of each level.
        deltas: Box deltas of the anchors of each level, anchor by anchor.
        size: Height and width of the input, padding included.
    """

    features: tuple[Float[Tensor, "b c _h _w"], ...]
    objectness: tuple[Float[Tensor, "b a _h _w"], ...]
    deltas: tuple[Float[Tensor, "b d _h _w"], ...]
    size: tuple[int, int]


class DenseNetwork(nn.Module):
    """Backbone, neck and head of the proposal network.

    Args:
        backbone: Gives a list of feature maps.
        neck: From these to pyramid levels; None: the last feature map is the only level.
        rpn: From levels to objectness and deltas of each.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None, rpn: nn.Module):
        super().__init__()
        self.backbone, self.neck, self.rpn = backbone, neck, rpn

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        features = features[-1:] if self.neck is None else self.neck(features)
        objectness, deltas = self.rpn(features)
        return Raw(tuple(features), tuple(objectness), tuple(deltas), (images.shape[-2], images.shape[-1]))


# ---- the system ------------------------------------------------------------------------------------------------------


class TwoStage(System):
    """Base class of systems that propose boxes and classify and refine each of them.

    Its networks are `dense`, `roi_stage` (only with neck="c4": the last stage of the backbone, applied to each pooled
    box) and `boxes`. A subclass adds further networks, computes their losses in `head_losses`, and implements `decode`
    with `find`. A cascade replaces `roi_losses` and `classify`.

    Attributes:
        rules: Conventions of the code base.
        proposal_rules: Those of the proposal network, with its options.
        box_rules: Those of the box stage, with its options.
        neck_type: The neck.
        head_classes: Number of classes of the heads: all, or the things among them.
        channels: Channels of pooled features.
        box_side: Side of the features that are pooled for `boxes`.
        anchors: Anchors of the proposal network.
        pooler: Pools features of boxes.
        make_box_head: Constructs another box head; for further stages.
    """

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        "anchor_sizes": "proposals.anchor_sizes", "rpn_convs": "proposals.convs",
        "proposals_before": "proposals.before", "proposals_after": "proposals.after", "box_convs": "boxes.convs",
        "box_fcs": "boxes.fcs", "box_width": "boxes.width", "box_norm": "boxes.norm", "box_beta": "boxes.beta",
        "agnostic_boxes": "boxes.agnostic",
    }  # fmt: skip
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        "backbone.": "dense.backbone.", "neck.": "dense.neck.", "rpn.": "dense.rpn.", "box_head.": "boxes.",
    }  # fmt: skip

    def __init__(
        self,
        classes: Sequence[str],
        *,
        backbone: Backbone,
        in_channels: int,
        resize: Resize,
        neck: Neck = "fpn",
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "detectron2",
        proposals: Proposals,
        boxes: BoxOptions,
        pooling: Pooling = "align",
    ):
        super().__init__()
        at_least(self.name, 1, neck_width=neck_width)
        self.classes, self.neck_type = tuple(classes), neck
        self.head_classes = len(self.classes)
        self.rules = own = self.conventions(rules)
        pyramid = neck in ("fpn", "pafpn")
        self.proposal_rules = replace(
            own.proposals,
            before=_pair(proposals.before, own.proposals.before if pyramid else (12000, 6000)),
            after=_pair(proposals.after, own.proposals.after if pyramid else (2000, 1000)),
        )
        self.box_rules = own.boxes if boxes.beta is None else replace(own.boxes, beta=boxes.beta)

        body = self._build_backbone(backbone, in_channels)
        widths, strides = levels_of(body)
        if pyramid:
            if strides != (4, 8, 16, 32):
                raise UsageError(f"neck={neck!r} requires a backbone with strides 4, 8, 16, 32, got {list(strides)}")
            if len(proposals.anchor_sizes) != 5:
                count = len(proposals.anchor_sizes)
                raise UsageError(f"proposals.anchor_sizes must have 5 entries, one per pyramid level, got {count}")
            network, self.channels = FPN(widths, neck_width, norm=neck_norm, upsample=own.upsample), neck_width
            if neck == "pafpn":
                network = PathAggregation(network, neck_width, len(strides), neck_norm)
            levels, sizes = (*strides, 64), [[size] for size in proposals.anchor_sizes]
        else:
            network, self.channels = None, widths[-1]
            strides = levels = strides[-1:]
            sizes = [proposals.anchor_sizes]
        rule, offset = self.proposal_rules.anchors, self.proposal_rules.anchor_offset
        self.anchors = Anchors(sizes, levels, rule=rule, offset=offset)
        self.dense = DenseNetwork(body, network, RPNHead(self.channels, self.anchors.count, proposals.convs))
        self.pooler = Pooler(strides, pooling, own.aligned, own.samples, own.levels)

        self.roi_stage: nn.Module | None = None
        self.box_side = 7
        if neck == "c4":
            boxes, self.box_side = replace(boxes, fcs=0), 14
            self.roi_stage, self.channels = make_stage(
                int(backbone.name.removeprefix("resnet")), 3, self.channels, base=backbone.width or 64,
                groups=backbone.groups, group_width=backbone.group_width, stride_in=backbone.stride_in,
                norm=backbone.norm, eps=backbone.eps,
            )  # fmt: skip
            freeze([self.roi_stage] if backbone.frozen > 4 else [])
        self.make_box_head = partial(
            BoxHead, self.channels, self.box_side, len(self.classes), convs=boxes.convs, conv_width=neck_width,
            fcs=boxes.fcs, width=boxes.width, norm=boxes.norm, agnostic=boxes.agnostic,
        )  # fmt: skip
        self.boxes = self.make_box_head()
        if rules == "torchvision":
            for module in self.modules():
                if isinstance(module, FrozenBatchNorm):
                    module.fused = False  # torchvision multiplies and adds, which rounds differently

        self.preprocess = resize.apply(PREPROCESS[rules], in_channels)

    @classmethod
    def conventions(cls, rules: RulesName) -> Rules:
        """The conventions of a code base, as it configures this system."""
        return RULES[rules]

    def _build_backbone(self, spec: Backbone, in_channels: int) -> nn.Module:
        """The backbone for the neck."""
        if self.neck_type == "c4" and not spec.name.startswith("resnet"):
            raise UsageError(f"neck='c4' requires a ResNet backbone, got {spec.name!r}; use neck='fpn'")
        uses = {"fpn": Use(), "pafpn": Use(), "c4": Use(deepest=16), "dc5": Use(dilated=True)}
        return spec.build(in_channels, uses[self.neck_type])

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"})

    @property
    def last(self) -> float:
        """What x1 and y1 of the code base's boxes are less than ours: 1 where they are the last pixel of a box."""
        return 1.0 if self.box_rules.plus_one else 0.0

    def extents(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes of the code base on the image, as boxes x0, y0, x1, y1 in continuous coordinates."""
        return boxes + boxes.new_tensor([0, 0, self.last, self.last]) if self.last else boxes

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def pooled(self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], side: int) -> Float[Tensor, "r c s s"]:
        """Pools features of boxes of each image (in pixels of the input), ready for the heads."""
        features = self.pooler(raw.features, boxes, side)
        return features if self.roi_stage is None else self.roi_stage(features)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `rpn_objectness`, `rpn_box`, `class`, `box` and the losses of the other heads.

        Crowd regions are ignored.
        """
        device = raw.objectness[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        if self.last:  # from here on x1 and y1 are the last pixel of a box
            targets = [replace(t, boxes=t.boxes - t.boxes.new_tensor([0, 0, self.last, self.last])) for t in targets]
        anchors = self.anchors(raw.features, raw.size)
        terms = proposal_losses(raw.objectness, raw.deltas, anchors, targets, self.proposal_rules)
        return terms | self.roi_losses(raw, self.propose(raw, [t.image_size for t in targets], training=True), targets)

    def propose(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], training: bool = False
    ) -> list[Float[Tensor, "_n 4"]]:
        """Proposals of each image of valid size (height, width), in pixels of the input, best first."""
        anchors = self.anchors(raw.features, raw.size)
        found = propose(raw.objectness, raw.deltas, anchors, sizes, self.proposal_rules, training)
        return [boxes for boxes, _ in found]

    def roi_losses(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Computes the losses of the second stage for given proposals."""
        assigned = [
            sample_boxes(own, target, self.head_classes, self.box_rules)
            for own, target in zip(proposals, targets, strict=True)
        ]
        features = self.pooled(raw, [own.boxes for own in assigned], self.box_side)
        logits, deltas = self.boxes(features)
        terms = box_losses(logits, deltas, assigned, targets, self.box_rules)
        return terms | self.head_losses(raw, features, assigned, deltas, targets)

    def head_losses(
        self, raw: Raw, features: Float[Tensor, "r c s s"], assigned: Sequence[Assigned],
        deltas: Float[Tensor, "r d"], targets: Sequence[Instances],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Computes the losses of the heads besides the box head; none here.

        Args:
            raw: Output of the dense network.
            features: Pooled features that the box head has read.
            assigned: The boxes of each image that they belong to.
            deltas: Output of the box head.
            targets: Objects of each image.
        """
        return {}

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def find(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], score_threshold: float, nms_threshold: float, detections: int
    ) -> list[Detections]:
        """Detects boxes.

        Args:
            raw: Output of the dense network.
            sizes: Height and width of the valid part of each image in the input.
            score_threshold: Detections must score more than this.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
        """
        proposals = self.propose(raw, sizes)
        scores, boxes = self.classify(raw, proposals, sizes)
        return detect(
            scores, boxes, [len(own) for own in proposals], sizes, self.box_rules,
            score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
        )  # fmt: skip

    def classify(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r _k 4"]]:
        """Probability of each class (without background) and refined boxes of all proposals."""
        logits, deltas = self.boxes(self.pooled(raw, proposals, self.box_side))
        boxes = decode_boxes(deltas, torch.cat(list(proposals)), self.box_rules)
        return logits.float().softmax(-1)[:, :-1], boxes

    def boxes_to_image(
        self, boxes: Float[Tensor, "n 4"], placement: Placement
    ) -> tuple[Float[Tensor, "m 4"], Int[Tensor, " m"]]:
        """Detected boxes on the image, and which of them are kept: by some rules those that are empty there are not."""
        boxes = placement.boxes_to_image(boxes)
        if self.rules.finish == "scale":
            return boxes, torch.arange(len(boxes), device=boxes.device)
        boxes = box_ops.clip(boxes, placement.image_size)
        kept = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero().flatten()
        return boxes[kept], kept

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        neck = [] if self.dense.neck is None else [self.dense.neck]
        heads = [network for name, network in self.networks().items() if name != "dense"]
        return {"backbone": [self.dense.backbone], "neck": neck, "rpn": [self.dense.rpn], "heads": heads}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows: dict[str, ClassRows | tuple[ClassRows, ...]] = {}
        for kind in ("weight", "bias"):
            rows[f"boxes.classes.{kind}"] = ClassRows(background_last=True)
            if not self.options["boxes"]["agnostic"]:
                rows[f"boxes.deltas.{kind}"] = ClassRows(per_class=4)
        return rows


def _pair(chosen: Sequence[int] | None, published: tuple[int, int]) -> tuple[int, int]:
    return published if chosen is None else (chosen[0], chosen[1])
