"""Faster R-CNN (Ren, He, Girshick, Sun, NeurIPS 2015, arXiv 1506.01497), with a feature pyramid (arXiv 1612.03144).

A region proposal network shares its features with the detector: it predicts at every location whether there is an
object, and where. Features of each proposed box are pooled; a head classifies the box and refines it.

    image -> backbone -> pyramid, strides 4 ... 64 -> objectness, deltas -> proposals
    proposals -> RoIAlign 7 x 7 -> class, box

Mask R-CNN without its mask head: this system detects boxes alone. The published implementations, detectron2 and
torchvision, differ in conventions that change numbers: see `families.two_stage.RULES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.layers import Norm
from maskwright.blocks.roi_heads import Pooling
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.two_stage import (
    BoxesLike,
    BoxOptions,
    Neck,
    Proposals,
    ProposalsLike,
    Raw,
    Rules,
    RulesName,
    TwoStage,
)
from maskwright.systems.mask_rcnn import BACKBONE, BOXES, PROPOSALS, RESIZE, Backbone, MaskRCNN


class FasterRCNN(TwoStage):
    """Faster R-CNN: boxes alone. Its networks are those of `TwoStage`."""

    name = "faster-rcnn"
    card = Card(
        title="Faster R-CNN",
        paper="Ren, He, Girshick, Sun: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks. "
        "NeurIPS 2015",
        arxiv="1506.01497",
        code="facebookresearch/detectron2; pytorch/vision; open-mmlab/mmdetection",
        code_licence="Apache-2.0; BSD-3-Clause; Apache-2.0",
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
        boxes: BoxesLike = BOXES,
        pooling: Pooling = "align",
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck: "fpn": a feature pyramid. "pafpn": with a bottom-up path after it (MMDetection's PAFPN). "c4": one
                level of stride 16, and the last stage of the ResNet is applied to every pooled box. "dc5": one level of
                stride 16 from a dilated last stage.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`.
            pooling: How boxes are pooled: RoIAlign, RoIWarp or RoIPool.
        """
        super().__init__(
            classes, backbone=Backbone.read(backbone, BACKBONE), in_channels=in_channels,
            resize=Resize.read(resize, RESIZE), neck=neck, neck_width=neck_width, neck_norm=neck_norm, rules=rules,
            proposals=Proposals.read(proposals, PROPOSALS), boxes=BoxOptions.read(boxes, BOXES), pooling=pooling,
        )  # fmt: skip

    @classmethod
    def conventions(cls, rules: RulesName) -> Rules:
        own = super().conventions(rules)
        return replace(own, boxes=replace(own.boxes, rescue=False))  # MMDetection rescues in Mask R-CNN only

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
    ) -> list[Instances]:
        """Detects boxes.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Detections must score more than this.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
        """
        result = []
        found = self.find(raw, [p.size for p in placements], score_threshold, nms_threshold, detections)
        for own, placement in zip(found, placements, strict=True):
            boxes, kept = self.boxes_to_image(own.boxes, placement)
            boxes = self.extents(boxes)
            result.append(Instances(placement.image_size, boxes, own.labels[kept], scores=own.scores[kept]))
        return result

    _D2 = "COCO val2017, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "faster-rcnn-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE}, (Score(40.2, "box AP", _D2, _ZOO),), "detectron2's R50-FPN, 3x (1x: 37.9)"
        ),
        "faster-rcnn-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **MaskRCNN._CAFFE}}, (Score(42.0, "box AP", _D2, _ZOO),),
            "detectron2's R101-FPN, 3x",
        ),
        "faster-rcnn-x101-fpn": Preset(
            {"backbone": MaskRCNN._X101, "resize": {"std": MaskRCNN._X101_STD}}, (Score(43.0, "box AP", _D2, _ZOO),),
            "detectron2's X101-32x8d-FPN, 3x",
        ),
        "faster-rcnn-r50-c4": Preset(
            {"backbone": MaskRCNN._CAFFE, "neck": "c4"}, (Score(38.4, "box AP", _D2, _ZOO),), "detectron2's R50-C4, 3x"
        ),
        "faster-rcnn-r50-dc5": Preset(
            {"backbone": MaskRCNN._CAFFE, "neck": "dc5"}, (Score(39.0, "box AP", _D2, _ZOO),),
            "detectron2's R50-DC5, 3x",
        ),
        "faster-rcnn-r50-fpn-torchvision": Preset(
            {"backbone": {**MaskRCNN._TORCH, "norm_eps": 0.0}, "rules": "torchvision"},
            (Score(37.0, "box AP", _D2, "torchvision 0.26"),), "torchvision's fasterrcnn_resnet50_fpn",
        ),
        "faster-rcnn-r50-fpn-torchvision-v2": Preset(
            {
                "backbone": {"norm": "batch"}, "rules": "torchvision", "neck_norm": "batch", "proposals": {"convs": 2},
                "boxes": {"convs": 4, "fcs": 1, "norm": "batch"},
            },
            (Score(46.7, "box AP", _D2, "torchvision 0.26"),), "torchvision's fasterrcnn_resnet50_fpn_v2",
        ),
        "faster-rcnn-r50-fpn-mmdetection": Preset(
            {"backbone": MaskRCNN._STILL, "rules": "mmdetection"}, (Score(37.4, "box AP", _D2, MaskRCNN._MMZOO),),
            "MMDetection's faster-rcnn_r50_fpn, 1x (2x: 38.4)",
        ),
        "faster-rcnn-r50-pafpn-mmdetection": Preset(
            {"backbone": MaskRCNN._STILL, "rules": "mmdetection", "neck": "pafpn"},
            (Score(37.5, "box AP", _D2, MaskRCNN._MMZOO),), "MMDetection's faster-rcnn_r50_pafpn, 1x",
        ),
        "faster-rcnn-small": Preset(
            MaskRCNN._SMALL, note="for a few hundred images and no GPU; trains from random weights"
        ),
    }  # fmt: skip
