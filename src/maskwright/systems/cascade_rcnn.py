"""Cascade R-CNN and Cascade Mask R-CNN (Cai, Vasconcelos, CVPR 2018 and TPAMI 2019, arXiv 1712.00726, 1906.09756).

A box head trained with a given IoU threshold is best for proposals of about that IoU. Several box stages in a row are
therefore trained with rising thresholds (0.5, 0.6, 0.7), each on the boxes that the previous one predicts: their
quality rises from stage to stage, so that every stage has enough positives. A mask branch stands beside the first
stage, the last one, or every one (arXiv 1906.09756, its figure of architectures, (b), (c) and (d)); at test time masks
are predicted in the boxes of the last stage, and those of several branches are averaged.

    proposals -> stage 1 -> boxes -> stage 2 -> boxes -> stage 3 -> boxes
    scores of a box: mean of the stages' probabilities, each computed at the boxes that the stage has received (in
        MMDetection: probabilities of the mean of their logits; in the authors' code: all at the boxes that the last
        stage has received)

The published implementations differ in how much each stage contributes to the gradient (`CascadeOptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.box_stage import (
    Assigned,
    Foreground,
    assign_boxes,
    box_losses,
    decode_boxes,
    detect,
    sample_boxes,
)
from maskwright.blocks.layers import Norm
from maskwright.blocks.roi_heads import Pooling
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.gradients import scale_gradient
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import (
    BoxesLike,
    BoxOptions,
    Neck,
    Proposals,
    ProposalsLike,
    Raw,
    Rules,
    RulesName,
)
from maskwright.systems.mask_rcnn import BACKBONE, PROPOSALS, RESIZE, MaskIoUOptions, MaskOptions, MaskRCNN
from maskwright.systems.system import ClassRows

CASCADE_BOXES = BoxOptions(agnostic=True)
DELTA_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
# `CascadeOptions` of MMDetection's configurations.
MMDETECTION: Mapping[str, Any] = {
    "delta_weights": (*DELTA_WEIGHTS[:2], (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067)),
    "loss_weights": (1.0, 0.5, 0.25), "gradients": (1.0, 1.0, 1.0), "resample": True, "mask_stage": "every",
}  # fmt: skip


@dataclass(frozen=True)
class CascadeOptions(OptionGroup):
    """The stages of a cascade, as options of a system.

    Attributes:
        overlaps: IoU from which a box is foreground, one per stage.
        delta_weights: Weights of the box deltas of each stage.
        loss_weights: Weights of the stages' losses: 1 in detectron2; 1, 0.5, 0.25 in MMDetection.
        gradients: Factors of the gradient from each stage's head to the pooled features, while the head itself is
            trained with the whole gradient; None: 1 / number of stages, as in detectron2. 1, 0.5, 0.25 in the authors'
            code, 1 in MMDetection.
        resample: Sample boxes anew in every stage and add the annotated boxes (the authors' code, MMDetection), instead
            of assigning all boxes of the previous stage (detectron2).
        mask_stage: The stage beside which masks are trained: "first" (detectron2), "last" (the authors' code), or
            "every", with a mask head for each stage (MMDetection).
    """

    label: ClassVar[str] = "cascade"

    overlaps: Sequence[float] = (0.5, 0.6, 0.7)
    delta_weights: Sequence[Sequence[float]] = DELTA_WEIGHTS
    loss_weights: Sequence[float] = (1.0, 1.0, 1.0)
    gradients: Sequence[float] | None = None
    resample: bool = False
    mask_stage: Literal["first", "last", "every"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.overlaps)
        if not stages or not all(0 < overlap < 1 for overlap in self.overlaps):
            raise UsageError(f"cascade.overlaps must be numbers between 0 and 1, got {list(self.overlaps)}")
        for name in ("delta_weights", "loss_weights", "gradients"):
            values = getattr(self, name)
            if values is not None and len(values) != stages:
                raise UsageError(f"cascade.{name} must have {stages} entries, one per stage, got {len(values)}")
        if not all(len(own) == 4 and min(own) > 0 for own in self.delta_weights):
            raise UsageError(
                f"cascade.delta_weights must be lists of 4 numbers above 0, got {[list(w) for w in self.delta_weights]}"
            )
        if min([*self.loss_weights, *(self.gradients or ())]) < 0:
            raise UsageError("cascade.loss_weights and cascade.gradients must be at least 0")


def _four(values: Sequence[float]) -> tuple[float, float, float, float]:
    dx, dy, dw, dh = (float(value) for value in values)
    return dx, dy, dw, dh


def _first(stages: int) -> dict[str, Any]:
    """The options of the first stages of the default."""
    return {
        "overlaps": CASCADE.overlaps[:stages], "delta_weights": DELTA_WEIGHTS[:stages], "loss_weights": (1.0,) * stages,
    }  # fmt: skip


CASCADE = CascadeOptions()
CascadeLike = Mapping[str, Any] | CascadeOptions


class CascadeMaskRCNN(MaskRCNN):
    """Cascade Mask R-CNN; with masks=False, Cascade R-CNN.

    Its networks are those of Mask R-CNN, with `boxes` as the first stage, `boxes_2`, `boxes_3` ... for the others, and
    with mask_stage="every" also `masks_2`, `masks_3` ...

    Attributes:
        stage_rules: Conventions and numbers of each box stage.
        gradients: Factor of the gradient to the pooled features, per stage.
    """

    name = "cascade-mask-rcnn"
    card = Card(
        title="Cascade Mask R-CNN",
        paper="Cai, Vasconcelos: Cascade R-CNN: High Quality Object Detection and Instance Segmentation. TPAMI 2019",
        arxiv="1906.09756",
        code="facebookresearch/detectron2; zhaoweicai/Detectron-Cascade-RCNN; open-mmlab/mmdetection",
        code_licence="Apache-2.0; Apache-2.0; Apache-2.0",
    )

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
        boxes: BoxesLike = CASCADE_BOXES,
        pooling: Pooling = "align",
        masks: bool | Mapping[str, Any] | MaskOptions = True,
        mask_iou: bool | Mapping[str, Any] | MaskIoUOptions = False,
        cascade: CascadeLike = CASCADE,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck: "fpn": a feature pyramid. "pafpn": with a bottom-up path after it (MMDetection's PAFPN). "dc5": one
                level of stride 16 from a dilated last stage.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`. detectron2 and MMDetection keep 2000 proposals in
                training.
            boxes: The box head of each stage, see `BoxOptions`; one box for all classes.
            pooling: How boxes are pooled: RoIAlign, RoIWarp or RoIPool.
            masks: The mask head, see `MaskOptions`; False: none (Cascade R-CNN).
            mask_iou: Predict the IoU of each mask and multiply the score by it, see `MaskIoUOptions`; False: no.
            cascade: The stages, see `CascadeOptions`.
        """
        box, own = BoxOptions.read(boxes, CASCADE_BOXES), CascadeOptions.read(cascade, CASCADE)
        if not box.agnostic:
            raise UsageError("boxes.agnostic must be true: a stage passes one box per proposal to the next")
        if neck == "c4":
            raise UsageError("neck must be 'fpn' or 'dc5': with 'c4' the stages would share the last backbone stage")
        proposal = Proposals.read(proposals, PROPOSALS)
        if rules in ("detectron2", "mmdetection", "mmdetection-caffe"):
            proposal = replace(proposal, after=(2000, 1000) if proposal.after is None else proposal.after)
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=resize, neck=neck, neck_width=neck_width,
            neck_norm=neck_norm, rules=rules, proposals=proposal, boxes=box, pooling=pooling, masks=masks,
            mask_iou=mask_iou,
        )  # fmt: skip
        self.cascade, count = own, len(own.overlaps)
        self.gradients = tuple(own.gradients or [1 / count] * count)
        self.stage_rules = tuple(
            replace(self.box_rules, overlap=float(overlap), weights=_four(weights))
            for overlap, weights in zip(own.overlaps, own.delta_weights, strict=True)
        )
        for number in range(2, count + 1):
            self.add_module(f"boxes_{number}", self.make_box_head())
            if self.masks is not None and own.mask_stage == "every":
                self.add_module(f"masks_{number}", self.make_mask_head())

    @classmethod
    def conventions(cls, rules: RulesName) -> Rules:
        own = super().conventions(rules)
        if rules == "detectron":  # as the authors' code, on Detectron, configures it
            boxes = replace(own.boxes, beta=1.0, left_out="objects", mean_at="last", clipped=False)
            return replace(own, boxes=boxes)
        if not rules.startswith("mmdetection"):
            return own
        return replace(
            own, proposals=replace(own.proposals, beta=1 / 9, straddle=0.0),
            boxes=replace(own.boxes, beta=1.0, rescue=False),
        )  # fmt: skip

    @property
    def stages(self) -> int:
        """The number of box stages."""
        return len(self.stage_rules)

    def box_head(self, stage: int) -> nn.Module:
        """The box head of a stage, counted from 0."""
        return self.boxes if stage == 0 else self.get_submodule(f"boxes_{stage + 1}")

    def mask_head(self, stage: int) -> Callable[..., Tensor] | None:
        """The mask head that is trained beside a stage, counted from 0; None if there is none."""
        where = self.cascade.mask_stage
        if self.masks is None or where == "every":
            return self.masks if self.masks is None or stage == 0 else self.get_submodule(f"masks_{stage + 1}")
        return self.masks if stage == (0 if where == "first" else self.stages - 1) else None

    def run_stage(
        self, stage: int, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]]
    ) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r 4"]]:
        """Class logits and deltas of a stage for boxes of each image."""
        features = scale_gradient(self.pooled(raw, boxes, self.box_side), self.gradients[stage])
        return self.box_head(stage)(features)

    def refined(
        self, stage: int, deltas: Float[Tensor, "r 4"], boxes: Sequence[Float[Tensor, "_n 4"]],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Float[Tensor, "_n 4"]]:  # fmt: skip
        """The boxes that a stage predicts, clipped to each image unless the rules say otherwise; without gradient."""
        decoded = decode_boxes(deltas.detach(), torch.cat(list(boxes)), self.stage_rules[stage])[:, 0]
        parts = decoded.split([len(own) for own in boxes])
        if not self.box_rules.clipped:
            return list(parts)
        return [box_ops.clip(own, size, self.box_rules.plus_one) for own, size in zip(parts, sizes, strict=True)]

    # ---- training ----------------------------------------------------------------------------------------------------

    def roi_losses(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Computes `class_1`, `box_1`, `class_2` ..., and `mask` (`mask_1` ... with a mask head for every stage)."""
        terms: dict[str, Tensor] = {}
        boxes, sizes = list(proposals), [t.image_size for t in targets]
        for stage, rules in enumerate(self.stage_rules):
            if stage and rules.left_out == "collapsed":
                boxes = [own[(own[:, 2:] > own[:, :2]).all(1)] for own in boxes]
            assigned = self.assigned(stage, boxes, targets)
            boxes = [own.boxes for own in assigned]
            logits, deltas = self.run_stage(stage, raw, boxes)
            weight = self.cascade.loss_weights[stage]
            for kind, value in box_losses(logits, deltas, assigned, targets, rules).items():
                terms[f"{kind}_{stage + 1}"] = value * weight
            refined = self.refined(stage, deltas, boxes, sizes)
            if rules.left_out == "objects":
                refined = [own if a.added is None else own[~a.added] for own, a in zip(refined, assigned, strict=True)]
            network = self.mask_head(stage)
            if network is not None:
                rois = self.mask_rois(stage, assigned, refined, targets)
                found = self.mask_losses(raw, self.mask_features(raw, rois.boxes), rois, targets, network)
                ending = f"_{stage + 1}" if self.cascade.mask_stage == "every" else ""
                terms |= {f"{kind}{ending}": value * weight for kind, value in found.items()}
            boxes = refined
        return terms

    def mask_rois(
        self, stage: int, assigned: Sequence[Assigned], refined: Sequence[Float[Tensor, "_n 4"]],
        targets: Sequence[Instances],
    ) -> Foreground:  # fmt: skip
        """The boxes in which the masks beside a stage are trained: the foreground of its boxes.

        Args:
            stage: The stage, counted from 0.
            assigned: The boxes that it is trained on.
            refined: The boxes that it has predicted.
            targets: Objects of each image.
        """
        return Foreground.from_assigned(assigned)

    def assigned(
        self, stage: int, boxes: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> list[Assigned]:
        """The boxes that a stage is trained on, with their objects."""
        assign = sample_boxes if stage == 0 or self.cascade.resample else assign_boxes
        rules = self.stage_rules[stage]
        return [assign(own, target, self.head_classes, rules) for own, target in zip(boxes, targets, strict=True)]

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]  # no points to refine, no mask scores
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        mask_threshold: float = 0.5,
        until: int | None = None,
        average: bool = True,
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
            until: The last stage that is run, counted from 1; None: all.
            average: Average the scores of the stages that are run, instead of using those of the last one (arXiv
                1712.00726, table 2 and its comparison of stages).
            score_of: With `mask_iou`, the score of the mask or that of the box, see `MaskRCNN.decode`.
        """
        if until is not None and not 1 <= until <= self.stages:
            raise UsageError(f"until must be between 1 and {self.stages}, got {until}")
        sizes = [p.size for p in placements]
        proposals = self.propose(raw, sizes)
        scores, boxes = self.run_stages(raw, proposals, sizes, until or self.stages, average)
        found = detect(
            scores, boxes, [len(own) for own in proposals], sizes, self.box_rules,
            score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
        )  # fmt: skip
        masks, none = self.read_boxes(raw, [own.boxes for own in found], [own.labels for own in found])
        if self.mask_iou is not None and score_of == "mask":
            found, masks, none = self.rescored(raw, found, masks, none, score_threshold)
        rows = zip(found, masks, placements, strict=True)
        return [self.to_image(own, mask, None, placement, mask_threshold) for own, mask, placement in rows]

    def classify(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], sizes: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r 1 4"]]:
        """Probability of each class, averaged over the stages, and the boxes of the last stage."""
        return self.run_stages(raw, proposals, sizes, self.stages)

    def run_stages(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], sizes: Sequence[tuple[int, int]], until: int,
        average: bool = True,
    ) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r 1 4"]]:  # fmt: skip
        """Probability of each class and boxes after the first `until` stages. No box is dropped between them."""
        boxes = received = list(proposals)
        found: list[Tensor] = []
        for stage in range(until):
            logits, deltas = self.run_stage(stage, raw, boxes)
            found.append(logits.float())
            received, boxes = boxes, self.refined(stage, deltas, boxes, sizes)
        if average and self.box_rules.mean_at == "last" and until > 1:
            features = self.pooled(raw, received, self.box_side)
            found[:-1] = [self.box_head(stage)(features)[0].float() for stage in range(until - 1)]
        if not average:
            scores = found[-1].softmax(-1)
        elif self.box_rules.mean_of == "logits":
            scores = (torch.stack(found).sum(0) * (1 / until)).softmax(-1)
        else:
            scores = torch.stack([logits.softmax(-1) for logits in found]).sum(0) * (1 / until)
        return scores[:, :-1], torch.cat(boxes)[:, None]

    def mask_probabilities(
        self, raw: Raw, features: Tensor, boxes: Sequence[Tensor], labels: Tensor, refine: bool = True,
        network: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        """The mask of each box's class, averaged over the mask heads."""
        heads = range(self.stages) if self.cascade.mask_stage == "every" and network is None else [0]
        networks = [network or (self.masks if stage == 0 else self.mask_head(stage)) for stage in heads]
        masks = [super(CascadeMaskRCNN, self).mask_probabilities(raw, features, boxes, labels, refine, own)
                 for own in networks]  # fmt: skip
        return torch.stack(masks).mean(0) if len(masks) > 1 else masks[0]

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows = dict(super().class_rows())
        for name, own in list(rows.items()):
            part, rest = name.split(".", 1)
            rows |= {f"{part}_{n}.{rest}": own for n in range(2, self.stages + 1) if hasattr(self, f"{part}_{n}")}
        return rows

    _ZOO = "detectron2 MODEL_ZOO.md"
    _MMDETECTION: ClassVar[dict[str, Any]] = {
        "rules": "mmdetection",
        "cascade": MMDETECTION,
    }
    _D2 = "COCO val2017, short side 800, pycocotools"
    _OWN = "COCO minival 2014, short side 800"
    _README = "README of zhaoweicai/Detectron-Cascade-RCNN"
    presets: ClassVar[Mapping[str, Preset]] = {
        "cascade-mask-rcnn-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE},
            (Score(44.3, "box AP", _D2, _ZOO), Score(38.5, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN, 3x (1x: 42.1 / 36.4)",
        ),
        "cascade-mask-rcnn-r101-fpn-authors": Preset(
            {
                "backbone": {"name": "resnet101", **MaskRCNN._CAFFE}, "rules": "detectron",
                "cascade": {"gradients": (1.0, 0.5, 0.25), "resample": True, "mask_stage": "last"},
            },
            (Score(43.3, "box AP", _OWN, _README), Score(37.1, "mask AP", _OWN, _README)),
            "the authors' R101-FPN, 1x, masks beside the last stage",
        ),
        "cascade-mask-rcnn-r50-fpn-authors": Preset(
            {
                "backbone": MaskRCNN._CAFFE, "rules": "detectron",
                "cascade": {"gradients": (1.0, 0.5, 0.25), "resample": True, "mask_stage": "last"},
            },
            (Score(41.3, "box AP", _OWN, _README), Score(35.4, "mask AP", _OWN, _README)),
            "the authors' R50-FPN, 1x, masks beside the last stage",
        ),
        "cascade-rcnn-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE, "masks": False},
            note="boxes alone (Cascade R-CNN, CVPR 2018)",
        ),
        "cascade-mask-rcnn-r50-fpn-mmdetection": Preset(
            {"backbone": MaskRCNN._STILL, **_MMDETECTION},
            (Score(44.3, "box AP", _D2, MaskRCNN._MMZOO), Score(38.5, "mask AP", _D2, MaskRCNN._MMZOO)),
            "MMDetection's cascade-mask-rcnn_r50_fpn, 3x at several sizes (1x: 41.2 box AP)",
        ),
        "cascade-mask-rcnn-x101-64x4d-fpn-mmdetection": Preset(
            {"backbone": MaskRCNN._X64, **_MMDETECTION},
            (Score(46.6, "box AP", _D2, MaskRCNN._MMZOO), Score(40.3, "mask AP", _D2, MaskRCNN._MMZOO)),
            "MMDetection's cascade-mask-rcnn_x101-64x4d_fpn, 3x at several sizes",
        ),
        "cascade-rcnn-r50-fpn-mmdetection": Preset(
            {"backbone": MaskRCNN._STILL, "masks": False, **_MMDETECTION},
            (Score(40.3, "box AP", _D2, MaskRCNN._MMZOO),), "MMDetection's cascade-rcnn_r50_fpn, 1x, boxes alone",
        ),
        "cascade-mask-rcnn-small": Preset(
            {**MaskRCNN._SMALL, "boxes": {"width": 512, "agnostic": True}, "masks": {"width": 128}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _ABLATED: ClassVar[dict[str, Any]] = {**MaskRCNN._ABLATED, "boxes": {"width": 256, "agnostic": True}}
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "stages": Ablation(
            "boxes and scores after each stage, and the mean of the scores so far, by the IoU that is required",
            {name: {} for name in ("1", "2", "1 to 2", "3", "1 to 3")}, {},
            "figures of arXiv 1712.00726 are not included", _ABLATED, MaskRCNN._SCENES, MaskRCNN._TRAINED,
            {
                "1": {"until": 1}, "2": {"until": 2, "average": False}, "1 to 2": {"until": 2},
                "3": {"average": False},
            },
            {"box AP": "bbox/AP", **{f"AP{n}": f"bbox/{n}" for n in (50, 60, 70, 80, 90)}},
        ),
        "thresholds": Ablation(
            "one stage trained at a single IoU, by the IoU that is required (figure 1 of arXiv 1712.00726)",
            {
                f"one stage, u = {u}": {"cascade": {**_first(1), "overlaps": (u,)}} for u in (0.5, 0.6, 0.7)
            } | {"cascade": {}},
            {}, "figures of arXiv 1712.00726 are not included", _ABLATED, MaskRCNN._SCENES, MaskRCNN._TRAINED,
            measures={"box AP": "bbox/AP", **{f"AP{n}": f"bbox/{n}" for n in (50, 60, 70, 80, 90)}},
        ),
        "masks": Ablation(
            "the stage beside which masks are trained",
            {name: {"cascade": {"mask_stage": name}} for name in ("first", "last", "every")},
            {}, "figures of arXiv 1906.09756 are not included", _ABLATED, MaskRCNN._SCENES, MaskRCNN._TRAINED,
        ),
    }  # fmt: skip
