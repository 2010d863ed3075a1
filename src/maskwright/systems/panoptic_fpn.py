"""Panoptic FPN (Kirillov, Girshick, He, Dollár: Panoptic Feature Pyramid Networks, CVPR 2019, arXiv 1901.02446).

Mask R-CNN, with a light semantic segmentation branch on the same feature pyramid (section 3.1). Mask R-CNN detects the
things; the branch labels every pixel with one of the stuff classes, or as "things", which is a single class there. A
fixed rule (section 3.1, as in "Panoptic Segmentation", arXiv 1801.00868) merges the two into one segmentation.

    image -> backbone -> pyramid -> Mask R-CNN -> masks of things, best first, each on the pixels still free
                                 -> strides 4 ... 32, convolved and upsampled to stride 4, added -> label of each pixel
    free pixels of a stuff class -> one region, if it is large enough

Heads of boxes and masks have rows for the things only, the branch has rows for "things" and for each stuff class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.box_stage import Detections
from maskwright.blocks.layers import Norm
from maskwright.blocks.semantic import SemanticFPN
from maskwright.errors import UsageError
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.cascade_rcnn import CASCADE, CASCADE_BOXES, CascadeLike, CascadeMaskRCNN
from maskwright.systems.families.semantic_branch import SEMANTIC, BranchOptions, SemanticBranch, SemanticOptions
from maskwright.systems.families.two_stage import BoxesLike, ProposalsLike, Raw, Rules, RulesName
from maskwright.systems.mask_rcnn import BACKBONE, BOXES, PROPOSALS, RESIZE, MaskOptions, MaskRCNN
from maskwright.systems.system import ClassRows

MASKS = MaskOptions()


class PanopticTwoStage(MaskRCNN, SemanticBranch):
    """Base class of two-stage systems with heads for things, and a semantic branch.

    A subclass constructs the detector of the things, then calls `add_branch` and adds the network that
    `semantic_logits` calls.
    """

    def add_branch(self, classes: Sequence[str], stuff: Sequence[str], semantic: BranchOptions) -> None:
        """Sets the classes, of which the detector has the things, and the options of the branch."""
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.branch = semantic

    @classmethod
    def things_among(cls, classes: Sequence[str], stuff: Sequence[str]) -> list[str]:
        """The classes that are not stuff; UsageError if there is none."""
        things = [name for name in classes if name not in stuff]
        if not things:
            raise UsageError(f"{cls.name} requires at least one class that is not stuff")
        return things

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses of the detector for the things, and `semantic`: the cross entropy of all labelled pixels.

        Crowd regions of things are ignored by the detector and are things in the semantic branch, as published.
        """
        terms = super().losses(raw, self.things_of(targets))
        return terms | {"semantic": self.semantic_term(raw, targets, self.rules.semantic == "coarse")}

    # ---- detection ---------------------------------------------------------------------------------------------------

    def to_image(
        self, found: Detections, mask: Tensor | None, keypoint: Tensor | None, placement: Placement, threshold: float
    ) -> Instances:
        """As for the detector, with labels among all classes."""
        objects = super().to_image(found, mask, keypoint, placement, threshold)
        return self._relabelled(objects, self.thing_classes().nonzero().flatten())

    @torch.no_grad()
    def decode_panoptic(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float | None = None,
        overlap_threshold: float = 0.5,
        smallest_area: int | None = None,
        nms_threshold: float = 0.5,
        detections: int = 100,
    ) -> list[Panoptic]:
        """Divides each image into segments: things best first, then regions of stuff by label.

        A thing is painted on the pixels that better ones have left free, unless too few are left; a region on the
        pixels of its class that no thing has taken. Pixels that the semantic branch labels as things, and that no thing
        has taken, have no segment.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Things must score more than this; None: as published, 0.5 (MMDetection: 0.6).
            overlap_threshold: Share of a thing's mask that must be left.
            smallest_area: Regions with fewer pixels of the image are left out; None: as the options of the system say.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of things per image.

        Returns:
            The segments of each image. The score of a region is the mean probability of its pixels.
        """
        least = self.rules.panoptic_score if score_threshold is None else score_threshold
        things = self.decode(raw, placements, score_threshold=least, nms_threshold=nms_threshold, detections=detections)
        return self.segmented(raw, things, placements, overlap_threshold, smallest_area)

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return self.rows_of_things(super().class_rows())

    ablations: ClassVar[Mapping[str, Ablation]] = {}  # the tables of the detectors compare masks


class PanopticFPN(PanopticTwoStage):
    """Mask R-CNN for things, and a semantic branch for stuff.

    Its networks are those of `MaskRCNN` and `semantic`. Boxes and masks are predicted for the things among `classes`,
    in their order; the first output of `semantic` is "things", the others are the stuff classes in their order among
    `classes`. Without stuff the system is Mask R-CNN, and the branch is not trained.
    """

    name = "panoptic-fpn"
    card = Card(
        title="Panoptic FPN",
        paper="Kirillov, Girshick, He, Dollár: Panoptic Feature Pyramid Networks. CVPR 2019",
        arxiv="1901.02446",
        code="facebookresearch/detectron2; open-mmlab/mmdetection",
        code_licence="Apache-2.0; Apache-2.0",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "detectron2",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        masks: Mapping[str, Any] | MaskOptions = MASKS,
        semantic: Mapping[str, Any] | SemanticOptions = SEMANTIC,
    ):
        """
        Args:
            classes: Names of the classes, things and stuff.
            stuff: Those of `classes` that are regions.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions the instance part follows.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`.
            masks: The mask head, see `MaskOptions`.
            semantic: The semantic branch, see `SemanticOptions`.
        """
        super().__init__(
            self.things_among(classes, stuff), backbone=backbone, in_channels=in_channels, resize=resize,
            neck_width=neck_width, neck_norm=neck_norm, rules=rules, proposals=proposals, boxes=boxes,
            masks=MaskOptions.read(masks, MASKS),
        )  # fmt: skip
        self._add_semantic(classes, stuff, SemanticOptions.read(semantic, SEMANTIC))

    def _add_semantic(self, classes: Sequence[str], stuff: Sequence[str], semantic: SemanticOptions) -> None:
        self.add_branch(classes, stuff, semantic)
        outputs = 1 + len(self.classes) - self.head_classes
        self.semantic = SemanticFPN(self.channels, outputs, width=semantic.width, norm=semantic.norm)

    @classmethod
    def conventions(cls, rules: RulesName) -> Rules:
        own = super().conventions(rules)
        return replace(own, boxes=replace(own.boxes, across_classes=rules.startswith("mmdetection")))

    def semantic_logits(self, raw: Raw) -> Float[Tensor, "b k _h _w"]:
        return self.semantic(raw.features)

    def stuff_rows(self) -> dict[str, ClassRows]:
        return {f"semantic.output.{kind}": ClassRows(before=1, kind="stuff") for kind in ("weight", "bias")}

    _D2 = "COCO val2017, short side 800"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "panoptic-fpn-r50": Preset(
            {"backbone": MaskRCNN._CAFFE},
            (Score(41.5, "PQ", _D2, _ZOO), Score(40.0, "box AP", _D2, _ZOO), Score(36.5, "mask AP", _D2, _ZOO)),
            "detectron2's R50-FPN, 3x (1x: 39.4 / 37.6 / 34.7)",
        ),
        "panoptic-fpn-r101": Preset(
            {"backbone": {"name": "resnet101", **MaskRCNN._CAFFE}},
            (Score(43.0, "PQ", _D2, _ZOO), Score(42.4, "box AP", _D2, _ZOO), Score(38.5, "mask AP", _D2, _ZOO)),
            "detectron2's R101-FPN, 3x",
        ),
        "panoptic-fpn-r50-mmdetection": Preset(
            {"backbone": MaskRCNN._STILL, "rules": "mmdetection"}, (Score(40.2, "PQ", _D2, MaskRCNN._MMZOO),),
            "MMDetection's panoptic-fpn_r50_fpn, 1x (3x at several sizes: 42.5)",
        ),
        "panoptic-fpn-small": Preset(
            {**MaskRCNN._SMALL, "masks": {"width": 128}, "semantic": {"width": 64, "smallest_area": 256}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


class CascadePanopticFPN(PanopticFPN, CascadeMaskRCNN):
    """Cascade Mask R-CNN for things, and a semantic branch for stuff, as one of detectron2's published files has it.

    Its networks are those of `CascadeMaskRCNN` and `semantic`.
    """

    name = "cascade-panoptic-fpn"
    card = replace(PanopticFPN.card, title="Panoptic FPN with a cascade")

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "detectron2",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = CASCADE_BOXES,
        masks: Mapping[str, Any] | MaskOptions = MASKS,
        cascade: CascadeLike = CASCADE,
        semantic: Mapping[str, Any] | SemanticOptions = SEMANTIC,
    ):
        """
        Args:
            classes: Names of the classes, things and stuff.
            stuff: Those of `classes` that are regions.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions the instance part follows.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head of each stage, see `BoxOptions`; one box for all classes.
            masks: The mask head, see `MaskOptions`.
            cascade: The stages, see `CascadeOptions`.
            semantic: The semantic branch, see `SemanticOptions`.
        """
        CascadeMaskRCNN.__init__(
            self, self.things_among(classes, stuff), backbone=backbone, in_channels=in_channels, resize=resize,
            neck_width=neck_width, neck_norm=neck_norm, rules=rules, proposals=proposals, boxes=boxes,
            masks=MaskOptions.read(masks, MASKS), cascade=cascade,
        )  # fmt: skip
        self._add_semantic(classes, stuff, SemanticOptions.read(semantic, SEMANTIC))

    _D2 = "COCO val2017, short side 800"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "cascade-panoptic-fpn-r101-gn-dconv": Preset(
            {
                "backbone": {"name": "resnet101", "norm": "group", "frozen": 2, "deform_stages": (1, 2, 3)},
                "neck_norm": "group", "masks": {"norm": "group"},
            },
            (Score(46.1, "PQ", _D2, _ZOO), Score(47.4, "box AP", _D2, _ZOO), Score(41.3, "mask AP", _D2, _ZOO)),
            "detectron2's panoptic_fpn_R_101_dconv_cascade_gn_3x",
        ),
        "cascade-panoptic-fpn-small": Preset(
            {
                **PanopticFPN.presets["panoptic-fpn-small"].options, "boxes": {"width": 512, "agnostic": True},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
