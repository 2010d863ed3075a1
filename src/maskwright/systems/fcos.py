"""FCOS (Tian, Shen, Chen, He, ICCV 2019, arXiv 1904.01355; improved: TPAMI 2021, arXiv 2006.09214).

Every location of a feature pyramid is one sample: no anchors and no proposals. A location near the centre of an object
whose size suits the level is positive. It predicts a class, the distances to the four sides of the object's box, and
its centerness, by which the score of locations far from the centre is reduced.

    image -> backbone -> pyramid, strides 8 ... 128 -> towers -> class; distances, centerness
    score = sqrt(class probability * centerness)

The published implementations, AdelaiDet, detectron2 and torchvision, differ in conventions that change numbers: see
`families.fcos.RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.blocks.fcos import BoxLoss
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.fcos import FCOSSystem, HeadOptions, Raw, RulesName
from maskwright.systems.system import Output

BACKBONE, RESIZE, HEAD = Backbone("resnet50"), Resize(), HeadOptions()


class FCOS(FCOSSystem):
    """FCOS: boxes alone. Its network is `dense`."""

    name = "fcos"
    card = Card(
        title="FCOS",
        paper="Tian, Shen, Chen, He: FCOS: Fully Convolutional One-Stage Object Detection. ICCV 2019",
        arxiv="1904.01355",
        code="aim-uofa/AdelaiDet; facebookresearch/detectron2; pytorch/vision; open-mmlab/mmdetection",
        code_licence="non-commercial; Apache-2.0; BSD-3-Clause; Apache-2.0",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        levels: int = 5,
        head: Mapping[str, Any] | HeadOptions = HEAD,
        rules: RulesName = "adelaidet",
        radius: float | None = 1.5,
        box_loss: BoxLoss = "giou",
        quality: Literal["centerness", "iou"] = "centerness",
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            levels: Number of pyramid levels, from stride 8 on: 5, 4 or 3.
            head: The towers, see `HeadOptions`.
            rules: The code base whose conventions are followed.
            radius: Half the side of the square around an object's centre in which locations are positive, in strides;
                None: the whole box (arXiv 1904.01355).
            box_loss: "giou", "iou" (-ln IoU) or "linear_iou" (1 - IoU).
            quality: What is predicted beside the class: the centerness, or the IoU of the predicted box (arXiv
                2006.09214).
        """
        super().__init__(
            classes, backbone=Backbone.read(backbone, BACKBONE), in_channels=in_channels,
            resize=Resize.read(resize, RESIZE), neck_width=neck_width, levels=levels,
            head=HeadOptions.read(head, HEAD), rules=rules, radius=radius, box_loss=box_loss, quality=quality,
        )  # fmt: skip

    @property
    def needs(self) -> frozenset[Output]:
        return frozenset()

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class` (focal loss), `box` and `centerness`. Crowd regions are ignored."""
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.logits[0].device) for t in targets]
        return self.location_losses(raw, self.assign(raw, targets))

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        detections: int = 100,
        candidates: int = 1000,
    ) -> list[Instances]:
        """Detects boxes.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Scores must be above it; None: as published, a class probability above 0.05 with
                rules="adelaidet" and "mmdetection", otherwise a score above 0.2.
            nms_threshold: IoU threshold of the non-maximum suppression within a class; None: as published, 0.6, or 0.5
                for MMDetection's models of the first paper (distances="exp").
            detections: Largest number of detections per image.
            candidates: (location, class) pairs of a level that are kept before suppression.
        """
        if nms_threshold is None:
            nms_threshold = 0.5 if self.dense.head.exponential else 0.6
        found = self.find(raw, [p.size for p in placements], score_threshold, nms_threshold, detections, candidates)
        return [self.on_image(own, placement) for own, placement in zip(found, placements, strict=True)]

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _HOW = "COCO val2017, short side 800, pycocotools"
    _README = "README of AdelaiDet's FCOS"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fcos-r50": Preset(
            {"backbone": _CAFFE}, (Score(38.7, "box AP", _HOW, _README),),
            "AdelaiDet's R_50_1x (MS_R_50_2x: 41.0)",
        ),
        "fcos-r101": Preset(
            {"backbone": {"name": "resnet101", **_CAFFE}}, (Score(43.1, "box AP", _HOW, _README),),
            "AdelaiDet's MS_R_101_2x",
        ),
        "fcos-r50-iou": Preset(
            {"backbone": _CAFFE, "quality": "iou"}, (Score(39.4, "box AP", _HOW, _README),),
            "AdelaiDet's R_50_1x with the IoU in place of the centerness",
        ),
        "fcos-rt-dla34": Preset(
            {"backbone": {"name": "dla34", "norm": "batch"}, "resize": {"short": 512, "long": 736}, "levels": 3},
            (Score(40.3, "box AP", "COCO val2017, short side 512, pycocotools", _README),),
            "AdelaiDet's real-time DLA-34, 4x",
        ),
        "fcos-rt-r50": Preset(
            {
                "backbone": {"norm": "batch", "stride_in": "1x1"}, "resize": {"short": 512, "long": 736}, "levels": 3,
            },
            (Score(40.2, "box AP", "COCO val2017, short side 512, pycocotools", _README),),
            "AdelaiDet's real-time R50, 4x",
        ),
        "fcos-r50-torchvision": Preset(
            {
                "backbone": {"norm": "frozen", "frozen": 2}, "rules": "torchvision", "head": {"scales": False},
            },
            (Score(39.2, "box AP", _HOW, "torchvision 0.26"),), "torchvision's fcos_resnet50_fpn",
        ),
        "fcos-r50-mmdetection": Preset(
            {
                "backbone": _CAFFE, "rules": "mmdetection-caffe", "radius": None, "box_loss": "iou",
                "resize": {"mean": (102.9801, 115.9465, 122.7717)},
                "head": {"bias": False, "distances": "exp", "centerness_of": "classes"},
            },
            (Score(36.6, "box AP", _HOW, "MMDetection 3.3, metafile.yml"),),
            "MMDetection's fcos_r50-caffe_fpn_gn-head, 1x, as in the first paper",
        ),
        "fcos-r50-improved-mmdetection": Preset(
            {"backbone": _CAFFE, "rules": "mmdetection-caffe"},
            (Score(38.7, "box AP", _HOW, "MMDetection 3.3, metafile.yml"),),
            "MMDetection's fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou, 1x",
        ),
        "fcos-small": Preset(
            {
                "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
                "neck_width": 128, "head": {"classes": 2, "boxes": 2},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
