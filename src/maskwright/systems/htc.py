"""Hybrid Task Cascade (Chen et al., CVPR 2019, arXiv 1901.07518).

Cascade Mask R-CNN refines boxes from stage to stage, but its mask heads know nothing of each other. HTC interleaves the
two tasks (section 3.1): the masks of a stage are trained in the boxes that the same stage has just predicted, and each
mask head also reads the features of the previous stage's head. A semantic branch on the pyramid labels every pixel
(section 3.2); its features are pooled for each box and added to those of the box and mask heads.

    pyramid -> semantic branch, stride 8 -> label of each pixel
                                         -> features, added to the pooled ones of every head
    proposals -> boxes 1 -> boxes 2 -> boxes 3
                  |          |          |
                 masks 1 -> masks 2 -> masks 3      (-> features of the mask heads)

At test time masks are predicted in the boxes of the last stage by all heads, and averaged. Without stuff annotations
the branch learns the objects' classes, and one output for the pixels of no object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.box_stage import Assigned, Foreground
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.roi_heads import MaskHead
from maskwright.blocks.semantic import VOID, label_maps, semantic_loss
from maskwright.errors import UsageError
from maskwright.ops.mask_targets import label_target
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.cascade_rcnn import CASCADE_BOXES, MMDETECTION, CascadeLike, CascadeMaskRCNN, CascadeOptions
from maskwright.systems.families import two_stage
from maskwright.systems.families.semantic_branch import BranchOptions
from maskwright.systems.families.two_stage import BoxesLike, Neck, ProposalsLike, Rules, RulesName, read_switch
from maskwright.systems.mask_rcnn import BACKBONE, PROPOSALS, RESIZE, MaskOptions, MaskRCNN
from maskwright.systems.panoptic_fpn import MASKS, PanopticTwoStage
from maskwright.systems.system import ClassRows

CASCADE = CascadeOptions.read(MMDETECTION)
BASE = 1  # the pyramid level, of stride 8, that the semantic branch brings all levels to
CONTEXT_SIDE = 14  # of the semantic features that are pooled for a box


@dataclass(frozen=True)
class FusedOptions(BranchOptions):
    """The semantic branch, as options of a system.

    Attributes:
        convs: Number of 3 x 3 convolutions.
    """

    weight: float = 0.2
    convs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "convs")


SEMANTIC = FusedOptions()


# ---- networks --------------------------------------------------------------------------------------------------------


class FusedSemantic(nn.Module):
    """Brings all levels of a pyramid to one size, adds them, and predicts a label of each pixel (figure 3).

    Args:
        channels: Channels of every level.
        outputs: Number of labels.
        convs: Number of 3 x 3 convolutions.
        levels: Number of levels.
    """

    def __init__(self, channels: int, outputs: int, *, convs: int = 4, levels: int = 5):
        super().__init__()
        self.laterals = nn.ModuleList(ConvNorm(channels, channels, 1, relu=True) for _ in range(levels))
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3, relu=True) for _ in range(convs))
        self.embedding = ConvNorm(channels, channels, 1, relu=True)
        self.logits = nn.Conv2d(channels, outputs, 1)
        nn.init.kaiming_normal_(self.logits.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, features: Sequence[Float[Tensor, "b c _h _w"]]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b c h w"]]:
        """Computes logits of each label, and features for the boxes, at the size of level `BASE`."""
        size = features[BASE].shape[-2:]
        x = self.laterals[BASE](features[BASE])
        for number, level in enumerate(features):
            if number != BASE:
                # Resized before the convolution, with aligned corners: as published.
                level = functional.interpolate(level, size=size, mode="bilinear", align_corners=True)
                x = x + self.laterals[number](level)
        for conv in self.convs:
            x = conv(x)
        return self.logits(x), self.embedding(x)


class FlowMaskHead(MaskHead):
    """A mask head that adds the features of the previous stage's head to its input (section 3.1).

    Args:
        *args: As for `MaskHead`.
        fused: Whether it reads the previous head.
        **keywords: As for `MaskHead`.
    """

    def __init__(self, *args: Any, fused: bool, **keywords: Any):
        super().__init__(*args, **keywords)
        width = self.upsample.out_channels
        self.fuse = ConvNorm(width, width, 1, norm=keywords.get("norm", "none"), relu=True) if fused else None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # gives its features too
        self,
        x: Float[Tensor, "r c s s"],
        labels: Int[Tensor, " r"] | None = None,
        previous: Float[Tensor, "r d s s"] | None = None,
        predict: bool = True,
    ) -> tuple[Float[Tensor, "r k t t"] | None, Float[Tensor, "r d s s"]]:
        """Computes mask logits.

        Args:
            x: Pooled features.
            labels: Compute one mask per RoI only.
            previous: Features of the previous head.
            predict: Whether logits are computed, or only features for the next head.

        Returns:
            Logits, see `MaskHead`, and the features for the next head.
        """
        if self.fuse is not None and previous is not None:
            x = x + self.fuse(previous)
        for conv in self.convs:
            x = conv(x)
        if not predict:
            return None, x
        return self.predict(functional.relu(self.upsample(x), inplace=True), labels), x


@dataclass(frozen=True)
class Raw(two_stage.Raw):
    """The output of the dense networks.

    Attributes:
        labels: Logits of the semantic branch, at stride 8; empty without the branch.
        context: Its features for the boxes, likewise.
    """

    labels: tuple[Float[Tensor, "b k _h _w"], ...] = ()
    context: tuple[Float[Tensor, "b c _h _w"], ...] = ()


# ---- the system ------------------------------------------------------------------------------------------------------


class HTC(PanopticTwoStage, CascadeMaskRCNN):
    """Hybrid Task Cascade.

    Its networks are those of `CascadeMaskRCNN` with a mask head for each stage, and `semantic`. With stuff, boxes and
    masks are predicted for the other classes only; the first output of `semantic` is none of the classes, the others
    are all classes in their order.
    """

    name = "htc"
    card = Card(
        title="Hybrid Task Cascade",
        paper="Chen, Pang, Wang, Xiong, Li, Sun, Feng, Liu, Shi, Ouyang, Loy, Lin: Hybrid Task Cascade for Instance "
        "Segmentation. CVPR 2019",
        arxiv="1901.07518",
        code="open-mmlab/mmdetection",
        code_licence="Apache-2.0",
    )
    semantic: FusedSemantic | None

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck: Neck = "fpn",
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "mmdetection",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = CASCADE_BOXES,
        masks: Mapping[str, Any] | MaskOptions = MASKS,
        cascade: CascadeLike = CASCADE,
        interleaved: bool = True,
        flow: bool = True,
        semantic: bool | Mapping[str, Any] | FusedOptions = True,
    ):
        """
        Args:
            classes: Names of the classes, things and stuff.
            stuff: Those of `classes` that are regions; the semantic branch learns them.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck: "fpn" or "pafpn".
            neck_width: Channels of the pyramid and of the semantic branch.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head of each stage, see `BoxOptions`; one box for all classes.
            masks: The mask heads, see `MaskOptions`.
            cascade: The stages, see `CascadeOptions`, with a mask head for every one.
            interleaved: Train masks in the boxes that the stage has predicted, instead of those that it has received.
            flow: Each mask head reads the features of the previous one.
            semantic: The semantic branch, see `FusedOptions`; False: none.
        """
        mask, stages = MaskOptions.read(masks, MASKS), CascadeOptions.read(cascade, CASCADE)
        own = read_switch(FusedOptions, semantic)
        if neck not in ("fpn", "pafpn"):
            raise UsageError(f"neck must be 'fpn' or 'pafpn', got {neck!r}")
        if mask.loss == "softmax" or stages.mask_stage != "every":
            raise UsageError("htc requires masks.loss='sigmoid' and cascade.mask_stage='every'")
        if flow and mask.width != neck_width:
            raise UsageError(
                f"flow=True requires masks.width = neck_width, whose channels are added, got {mask.width} and "
                f"{neck_width}"
            )
        if own is None and stuff:
            raise UsageError("semantic=False requires stuff to be empty: the semantic branch predicts it")
        CascadeMaskRCNN.__init__(
            self, self.things_among(classes, stuff), backbone=backbone, in_channels=in_channels, resize=resize,
            neck=neck, neck_width=neck_width, neck_norm=neck_norm, rules=rules, proposals=proposals, boxes=boxes,
            masks=mask, cascade=stages,
        )  # fmt: skip
        made = self.make_mask_head
        self.make_mask_head = partial(FlowMaskHead, *made.args, **made.keywords)
        for stage in range(self.stages):
            name = "masks" if stage == 0 else f"masks_{stage + 1}"
            self.add_module(name, self.make_mask_head(fused=flow and stage > 0))
        self.interleaved, self.flow = interleaved, flow
        self.semantic = None
        self.add_branch(classes, stuff, own or SEMANTIC)
        if own is not None:
            self.semantic = FusedSemantic(self.channels, 1 + len(self.classes), convs=own.convs)
        self.context_pooler = replace(self.pooler, strides=(self.pooler.strides[BASE],))

    @classmethod
    def conventions(cls, rules: RulesName) -> Rules:
        own = super().conventions(rules)
        return replace(own, boxes=replace(own.boxes, rescue=True)) if rules.startswith("mmdetection") else own

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        dense: two_stage.Raw = self.dense(images)
        raw = Raw(dense.features, dense.objectness, dense.deltas, dense.size)
        if self.semantic is None:
            return raw
        labels, context = self.semantic(raw.features)
        return replace(raw, labels=(labels,), context=(context,))

    def pooled(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], side: int
    ) -> Float[Tensor, "r c s s"]:
        """Pools features of boxes from the pyramid, and adds those of the semantic branch."""
        features = super().pooled(raw, boxes, side)
        if not raw.context:
            return features
        context = self.context_pooler(raw.context, boxes, CONTEXT_SIDE)
        return features + functional.adaptive_avg_pool2d(context, side)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, raw: Raw, targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Computes the losses of `CascadeMaskRCNN` for the things, and `semantic`.

        Crowd regions are ignored by the detector; the semantic branch learns their class.
        """
        if self.semantic is None:
            return CascadeMaskRCNN.losses(self, raw, targets)
        return super().losses(raw, targets)

    def mask_rois(
        self, stage: int, assigned: Sequence[Assigned], refined: Sequence[Float[Tensor, "_n 4"]],
        targets: Sequence[Instances],
    ) -> Foreground:  # fmt: skip
        """The boxes that a stage has predicted, assigned and sampled anew."""
        if self.interleaved:
            assigned = self.assigned(stage, refined, targets)
        return super().mask_rois(stage, assigned, refined, targets)

    def mask_head(self, stage: int) -> Callable[..., Tensor]:
        """The mask head of a stage, with what the previous ones pass on to it."""
        return partial(self._logits, stage)

    def _logits(self, stage: int, features: Tensor, labels: Tensor | None) -> Tensor:
        heads, previous = self._mask_heads(), None
        for head in heads[:stage] if self.flow else ():
            _, previous = head(features, None, previous, predict=False)
        return heads[stage](features, labels, previous)[0]

    def _mask_heads(self) -> list[nn.Module]:
        assert self.masks is not None
        return [self.masks, *(self.get_submodule(f"masks_{n}") for n in range(2, self.stages + 1))]

    def semantic_term(self, raw: Raw, targets: Sequence[Instances], coarse: bool = False) -> Tensor:
        truth = label_maps([self.semantic_target(target) for target in targets], raw.size, raw.labels[0].device)
        return self.branch.weight * semantic_loss(raw.labels[0], truth, coarse)

    def semantic_target(self, target: Instances) -> Int[Tensor, "_h _w"]:
        """The output of the semantic branch that each pixel belongs to: 1 + its label. Pixels that nothing covers are
        VOID with stuff, and 0, none of the classes, without.

        Where segments overlap, the smaller one is on top.
        """
        rest = VOID if self.stuff else 0
        if target.masks is None:
            return torch.full(target.image_size, VOID if len(target) else rest)
        return label_target(target.masks, target.labels.cpu() + 1, background=rest)

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]  # all stages are run
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.001,
        nms_threshold: float = 0.5,
        detections: int = 100,
        mask_threshold: float = 0.5,
    ) -> list[Instances]:
        """Detects objects.

        Args:
            raw: Output of the dense networks.
            placements: How each image was placed in the input.
            score_threshold: Detections must score more than this; the default is the published value.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            mask_threshold: Probability from which on a pixel belongs to the mask.
        """
        return super().decode(
            raw, placements, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
            mask_threshold=mask_threshold,
        )  # fmt: skip

    def mask_probabilities(
        self, raw: Any, features: Tensor, boxes: Sequence[Tensor], labels: Tensor, refine: bool = True,
        network: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        """The mask of each box's class, averaged over the mask heads.

        MMDetection 2, by which the published scores were measured, averages them; version 3 keeps the last one.
        """
        labels, previous = self.mask_labels(labels), None
        masks: list[Tensor] = []
        for head in self._mask_heads():
            logits, own = head(features, labels, previous)
            previous = own if self.flow else None
            masks.append(logits[:, 0].float().sigmoid())
        return torch.stack(masks).mean(0)

    def semantic_logits(self, raw: Raw) -> Float[Tensor, "b k _h _w"]:
        """Logits of "things", which stands for all outputs but stuff, and of the stuff classes."""
        logits = raw.labels[0].float()
        stuff = [1 + row for row, name in enumerate(self.classes) if name in self.stuff]
        others = [row for row in range(1 + len(self.classes)) if row not in stuff]
        return torch.cat([logits[:, others].logsumexp(1, keepdim=True), logits[:, stuff]], 1)

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return {**super().class_rows(), **self.stuff_rows()}

    def stuff_rows(self) -> dict[str, ClassRows]:
        kinds = ("weight", "bias") if self.semantic is not None else ()
        return {f"semantic.logits.{kind}": ClassRows(before=1) for kind in kinds}

    _D2 = "COCO val2017, short side 800, pycocotools"
    _ZOO = MaskRCNN._MMZOO
    presets: ClassVar[Mapping[str, Preset]] = {
        "htc-r50-fpn": Preset(
            {"backbone": MaskRCNN._STILL},
            (Score(43.3, "box AP", _D2, _ZOO), Score(38.3, "mask AP", _D2, _ZOO)),
            "MMDetection's htc_r50_fpn, 20 epochs (1x: 42.3 / 37.4)",
        ),
        "htc-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **MaskRCNN._STILL}},
            (Score(44.8, "box AP", _D2, _ZOO), Score(39.6, "mask AP", _D2, _ZOO)),
            "MMDetection's htc_r101_fpn, 20 epochs",
        ),
        "htc-x101-64x4d-fpn": Preset(
            {"backbone": MaskRCNN._X64},
            (Score(47.0, "box AP", _D2, _ZOO), Score(41.4, "mask AP", _D2, _ZOO)),
            "MMDetection's htc_x101-64x4d_fpn, 20 epochs (32x4d: 46.1 / 40.5)",
        ),
        "htc-x101-64x4d-fpn-dconv": Preset(
            {"backbone": {**MaskRCNN._X64, "deform_stages": (1, 2, 3)}},
            (Score(50.4, "box AP", _D2, _ZOO), Score(43.8, "mask AP", _D2, _ZOO)),
            "MMDetection's htc_x101-64x4d with deformable convolutions, 20 epochs at short sides of 400 to 1400",
        ),
        "htc-small": Preset(
            {
                **MaskRCNN._SMALL, "boxes": {"width": 512, "agnostic": True}, "masks": {"width": 128},
                "semantic": {"convs": 2, "smallest_area": 256},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "parts": Ablation(
            "interleaved tasks, information flow between the mask heads, and the semantic branch",
            {
                "cascade": {"interleaved": False, "flow": False, "semantic": False},
                "interleaved": {"flow": False, "semantic": False},
                "information flow": {"semantic": False},
                "semantic": {"semantic": {"convs": 2}},
            },
            {}, "figures of arXiv 1901.07518 are not included",
            {**CascadeMaskRCNN._ABLATED, "masks": {"convs": 2, "width": 64}}, MaskRCNN._SCENES, MaskRCNN._TRAINED,
        ),
    }  # fmt: skip
