"""Panoptic segmentation on FCOS: Panoptic BlendMask and Panoptic CenterMask, as their authors' code has them.

The semantic branch of Panoptic FPN (arXiv 1901.02446) is on the same pyramid, which begins at stride 4 for it. The
detector finds the things, the branch labels the pixels of stuff, and the rule of Panoptic FPN merges the two.

    image -> backbone -> pyramid, strides 8 ... 128 -> BlendMask or CenterMask -> masks of things, best first
                                  strides 4 ... 32 -> semantic branch -> label of each pixel
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.semantic import SemanticFPN
from maskwright.errors import UsageError
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems import blendmask, centermask
from maskwright.systems.blendmask import BLEND, BlendMask, BlendOptions
from maskwright.systems.card import Ablation, Preset, Score
from maskwright.systems.centermask import MASKS, CenterMask, MaskOptions
from maskwright.systems.families.fcos import FCOSSystem, HeadOptions, Located, Raw
from maskwright.systems.families.semantic_branch import SEMANTIC, SemanticBranch, SemanticOptions
from maskwright.systems.system import ClassRows


class _PanopticFCOS(FCOSSystem, SemanticBranch):
    """What both systems share: the branch, on strides 4 to 32, as the network `regions`."""

    finest: ClassVar[bool] = True
    regions: SemanticFPN

    def _build(self, classes: Sequence[str], stuff: Sequence[str], width: int, regions: Any) -> None:
        """Adds the branch to the detector of the things."""
        things = self.head_classes
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.branch = SemanticOptions.read(regions, SEMANTIC)
        outputs = 1 + len(self.classes) - things
        self.regions = SemanticFPN(width, outputs, width=self.branch.width, norm=self.branch.norm)

    def _things(self, classes: Sequence[str], stuff: Sequence[str]) -> list[str]:
        things = [name for name in classes if name not in stuff]
        if not things:
            raise UsageError(f"{self.name} requires at least one class that is not stuff")
        return things

    def semantic_logits(self, raw: Raw) -> Float[Tensor, "b k _h _w"]:
        return self.regions([*raw.finest, *raw.features[:3]])

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses of the detector for the things, and `regions`: the cross entropy of labelled pixels."""
        terms = super().losses(raw, self.things_of(targets))
        return terms | {"regions": self.semantic_term(raw, targets)}

    def on_image(
        self, found: Located, placement: Placement, masks: Float[Tensor, "d s s"] | None = None, threshold: float = 0.5
    ) -> Instances:
        """As for the detector, with labels among all classes."""
        objects = super().on_image(found, placement, masks, threshold)
        return self._relabelled(objects, self.thing_classes().nonzero().flatten())

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return self.rows_of_things(super().class_rows())

    def stuff_rows(self) -> dict[str, ClassRows]:
        return {f"regions.output.{kind}": ClassRows(before=1, kind="stuff") for kind in ("weight", "bias")}


class PanopticBlendMask(_PanopticFCOS, BlendMask):
    """BlendMask for things, and a semantic branch for stuff.

    Its networks are those of `BlendMask` and `regions`. Without stuff the system is BlendMask, and the branch is not
    trained.
    """

    name = "panoptic-blendmask"
    card = replace(BlendMask.card, title="Panoptic BlendMask")

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = blendmask.BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = blendmask.RESIZE,
        neck_width: int = 256,
        levels: int = 5,
        head: Mapping[str, Any] | HeadOptions = blendmask.HEAD,
        blend: Mapping[str, Any] | BlendOptions = BLEND,
        regions: Mapping[str, Any] | SemanticOptions = SEMANTIC,
        radius: float | None = 1.5,
    ):
        """
        Args:
            classes: Names of the classes, things and stuff.
            stuff: Those of `classes` that are regions.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            levels: Number of pyramid levels, from stride 8 on: 5, 4 or 3.
            head: The towers of FCOS, see `HeadOptions`.
            blend: Bases and blending, see `BlendOptions`.
            regions: The semantic branch, see `SemanticOptions`.
            radius: Half the side of the square around an object's centre in which locations are positive, in strides;
                None: the whole box.
        """
        super().__init__(
            self._things(classes, stuff), backbone=backbone, in_channels=in_channels, resize=resize,
            neck_width=neck_width, levels=levels, head=head, blend=blend, radius=radius,
        )  # fmt: skip
        self._build(classes, stuff, neck_width, regions)

    @torch.no_grad()
    def decode_panoptic(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.45,
        overlap_threshold: float = 0.6,
        smallest_area: int | None = None,
        nms_threshold: float = 0.6,
        detections: int = 100,
    ) -> list[Panoptic]:
        """Divides each image into segments, see `PanopticFPN.decode_panoptic`.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Things must score more than this.
            overlap_threshold: Share of a thing's mask that must be left.
            smallest_area: Regions with fewer pixels of the image are left out; None: as the options of the system say.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of things per image.
        """
        things = self.decode(
            raw, placements, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections
        )
        return self.segmented(raw, things, placements, overlap_threshold, smallest_area)

    _D2 = "COCO val2017, short side 800"
    presets: ClassVar[Mapping[str, Preset]] = {
        "panoptic-blendmask-r50": Preset(
            {"backbone": BlendMask._CAFFE}, (Score(42.5, "PQ", _D2, BlendMask._README),), "AdelaiDet's Panoptic/R_50_3x"
        ),
        "panoptic-blendmask-r101": Preset(
            {"backbone": {"name": "resnet101", **BlendMask._CAFFE}},
            (Score(44.3, "PQ", _D2, BlendMask._README),),
            "AdelaiDet's Panoptic/R_101_3x",
        ),
        "panoptic-blendmask-r101-dcn": Preset(
            BlendMask.presets["blendmask-r101-dcn"].options,
            (Score(46.0, "PQ", _D2, BlendMask._README),),
            "AdelaiDet's Panoptic/R_101_dcni3_5x",
        ),
        "panoptic-blendmask-small": Preset(
            {**BlendMask.presets["blendmask-small"].options, "regions": {"width": 64, "smallest_area": 256}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {}  # BlendMask's tables compare masks


class PanopticCenterMask(_PanopticFCOS, CenterMask):
    """CenterMask for things, and a semantic branch for stuff.

    Its networks are those of `CenterMask` and `regions`. Without stuff the system is CenterMask, and the branch is not
    trained.
    """

    name = "panoptic-centermask"
    card = replace(CenterMask.card, title="Panoptic CenterMask")

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = centermask.BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = centermask.RESIZE,
        neck_width: int = 256,
        head: Mapping[str, Any] | HeadOptions = centermask.HEAD,
        masks: Mapping[str, Any] | MaskOptions = MASKS,
        regions: Mapping[str, Any] | SemanticOptions = SEMANTIC,
        radius: float | None = 1.5,
    ):
        """
        Args:
            classes: Names of the classes, things and stuff.
            stuff: Those of `classes` that are regions.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            head: The towers of FCOS, see `HeadOptions`.
            masks: The mask heads, see `MaskOptions`.
            regions: The semantic branch, see `SemanticOptions`.
            radius: Half the side of the square around an object's centre in which locations are positive, in strides;
                None: the whole box.
        """
        super().__init__(
            self._things(classes, stuff), backbone=backbone, in_channels=in_channels, resize=resize,
            neck_width=neck_width, head=head, masks=masks, radius=radius,
        )  # fmt: skip
        self._build(classes, stuff, neck_width, regions)

    @torch.no_grad()
    def decode_panoptic(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.5,
        overlap_threshold: float = 0.5,
        smallest_area: int | None = None,
        nms_threshold: float = 0.6,
        detections: int = 50,
    ) -> list[Panoptic]:
        """Divides each image into segments, see `PanopticFPN.decode_panoptic`. Things are ordered by the scores of
        their boxes, as in the published code.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Things must score more than this.
            overlap_threshold: Share of a thing's mask that must be left.
            smallest_area: Regions with fewer pixels of the image are left out; None: as the options of the system say.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of things per image.
        """
        things = self.decode(
            raw, placements, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
            score_of="box",
        )  # fmt: skip
        return self.segmented(raw, things, placements, overlap_threshold, smallest_area)

    _D2 = "COCO val2017, short side 800"
    presets: ClassVar[Mapping[str, Preset]] = {
        "panoptic-centermask-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "frozen", "frozen": 2, "stride_in": "1x1"}},
            (Score(42.0, "PQ", _D2, CenterMask._README),),
            "CenterMask2 with ResNet-50, 3x",
        ),
        "panoptic-centermask-r101": Preset(
            {"backbone": {"name": "resnet101", "norm": "frozen", "frozen": 2, "stride_in": "1x1"}},
            (Score(43.6, "PQ", _D2, CenterMask._README),),
            "CenterMask2 with ResNet-101, 3x",
        ),
        **{
            f"panoptic-centermask-v{depth}": Preset(
                {"backbone": {"name": f"vovnet{depth}", "norm": "frozen"}},
                (Score(score, "PQ", "COCO val2017, short side 800", "README of youngwanLEE/centermask2"),),
                f"CenterMask2 with VoVNetV2-{depth}, 3x",
            )
            for depth, score in ((39, 43.7), (57, 44.5), (99, 45.4))
        },
        "panoptic-centermask-small": Preset(
            {**CenterMask.presets["centermask-small"].options, "regions": {"width": 64, "smallest_area": 256}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {}  # CenterMask's tables compare masks
