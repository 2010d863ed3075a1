"""Keypoint R-CNN (section 5 of Mask R-CNN, arXiv 1703.06870): the mask head's place is taken by keypoints.

Each keypoint is one cell of a 56 x 56 map inside a person's box, trained as a choice among 3136 cells. Everything else
is Mask R-CNN; `mask-rcnn` with `keypoints=17` has both heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from maskwright.blocks.layers import Norm
from maskwright.blocks.resnet import StrideIn
from maskwright.systems.base import Ablation, Card, Preset, Score
from maskwright.systems.mask_rcnn import MaskRCNN


class KeypointRCNN(MaskRCNN):
    """Mask R-CNN's options, with `masks` off and 17 keypoints unless asked otherwise."""

    name = "keypoint-rcnn"
    card = Card(
        title="Keypoint R-CNN",
        paper="He, Gkioxari, Dollár, Girshick: Mask R-CNN. ICCV 2017, section 5",
        arxiv="1703.06870",
        code="facebookresearch/detectron2; pytorch/vision",
        code_licence="Apache-2.0; BSD-3-Clause",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("person",),
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        groups: int = 1,
        group_width: int = 64,
        stride_in: StrideIn = "3x3",
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: str = "detectron2",
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        proposals_before: Sequence[int] | None = None,
        proposals_after: Sequence[int] | None = None,
        box_width: int = 1024,
        box_beta: float | None = None,
        keypoints: int = 17,
        keypoint_convs: int = 8,
        keypoint_width: int = 512,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """As in `MaskRCNN`. By detectron2's rules `box_beta` is 0.5 (plain L1 hurts the keypoints) and 1500 proposals
        are kept in training, unless said otherwise."""
        if rules == "detectron2":
            box_beta = 0.5 if box_beta is None else box_beta
            proposals_after = proposals_after or (1500, 1000)
        super().__init__(
            classes, backbone=backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width,
            groups=groups, group_width=group_width, stride_in=stride_in, norm=norm, norm_eps=norm_eps, frozen=frozen,
            neck_width=neck_width, neck_norm=neck_norm, rules=rules, anchor_sizes=anchor_sizes,
            proposals_before=proposals_before, proposals_after=proposals_after, box_width=box_width, box_beta=box_beta,
            masks=False, keypoints=keypoints, keypoint_convs=keypoint_convs, keypoint_width=keypoint_width,
            short=short, long=long, mean=mean, std=std,
        )  # fmt: skip

    ablations: ClassVar[Mapping[str, Ablation]] = {}  # Mask R-CNN's tables are of its masks
    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2}
    _HOW = "COCO val2017 persons, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "keypoint-rcnn-r50-fpn": Preset(
            {**_PUBLISHED, "stride_in": "1x1"},
            (Score(55.4, "box AP", _HOW, _ZOO), Score(65.5, "keypoint AP", _HOW, _ZOO)),
            "detectron2's R50-FPN, 3x",
        ),
        "keypoint-rcnn-r101-fpn": Preset(
            {**_PUBLISHED, "backbone": "resnet101", "stride_in": "1x1"},
            (Score(56.4, "box AP", _HOW, _ZOO), Score(66.1, "keypoint AP", _HOW, _ZOO)),
            "detectron2's R101-FPN, 3x",
        ),
        "keypoint-rcnn-x101-fpn": Preset(
            {**_PUBLISHED, "backbone": "resnet101", "groups": 32, "group_width": 8, "std": (57.375, 57.12, 58.395)},
            (Score(57.3, "box AP", _HOW, _ZOO), Score(66.0, "keypoint AP", _HOW, _ZOO)),
            "detectron2's X101-32x8d-FPN, 3x",
        ),
        "keypoint-rcnn-r50-fpn-torchvision": Preset(
            {**_PUBLISHED, "rules": "torchvision", "norm_eps": 0.0},
            (Score(54.6, "box AP", _HOW, "torchvision 0.26"), Score(65.0, "keypoint AP", _HOW, "torchvision 0.26")),
            "torchvision's keypointrcnn_resnet50_fpn, COCO_V1",
        ),
        "keypoint-rcnn-small": Preset(
            {
                "backbone": "resnet18", "norm": "group", "frozen": 0, "neck_width": 128, "neck_norm": "group",
                "box_width": 512, "keypoint_convs": 4, "keypoint_width": 128, "anchor_sizes": (16, 32, 64, 128, 256),
                "proposals_before": (500, 300), "proposals_after": (300, 200), "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
