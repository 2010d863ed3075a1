"""Keypoint R-CNN (section 5 of Mask R-CNN, arXiv 1703.06870): a keypoint head takes the place of the mask head.

Each keypoint is one cell of a 56 x 56 map inside a person's box, trained as a classification over 3136 cells. The
method is otherwise Mask R-CNN; `mask-rcnn` with `keypoints=17` has both heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.layers import Norm
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import BoxesLike, BoxOptions, Proposals, ProposalsLike, RulesName
from maskwright.systems.mask_rcnn import BACKBONE, BOXES, PROPOSALS, RESIZE, KeypointOptions, MaskRCNN

KEYPOINTS = KeypointOptions()


class KeypointRCNN(MaskRCNN):
    """Mask R-CNN with keypoints instead of masks."""

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
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "detectron2",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        keypoints: int | Mapping[str, Any] | KeypointOptions = KEYPOINTS,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`. detectron2 keeps 1500 proposals in training.
            boxes: The box head, see `BoxOptions`. detectron2's `beta` is 0.5, because L1 makes keypoints worse.
            keypoints: The keypoint head, see `KeypointOptions`; an integer is the number of keypoints.
        """
        proposal, box = Proposals.read(proposals, PROPOSALS), BoxOptions.read(boxes, BOXES)
        if rules == "detectron2":
            proposal = replace(proposal, after=(1500, 1000) if proposal.after is None else proposal.after)
            box = replace(box, beta=0.5 if box.beta is None else box.beta)
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=resize, neck_width=neck_width,
            neck_norm=neck_norm, rules=rules, proposals=proposal, boxes=box, masks=False, keypoints=keypoints,
        )  # fmt: skip

    ablations: ClassVar[Mapping[str, Ablation]] = {}  # Mask R-CNN's tables compare masks
    _HOW = "COCO val2017 persons, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "keypoint-rcnn-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE},
            (Score(55.4, "box AP", _HOW, _ZOO), Score(65.5, "keypoint AP", _HOW, _ZOO)),
            "detectron2's R50-FPN, 3x",
        ),
        "keypoint-rcnn-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **MaskRCNN._CAFFE}},
            (Score(56.4, "box AP", _HOW, _ZOO), Score(66.1, "keypoint AP", _HOW, _ZOO)),
            "detectron2's R101-FPN, 3x",
        ),
        "keypoint-rcnn-x101-fpn": Preset(
            {"backbone": MaskRCNN._X101, "resize": {"std": MaskRCNN._X101_STD}},
            (Score(57.3, "box AP", _HOW, _ZOO), Score(66.0, "keypoint AP", _HOW, _ZOO)),
            "detectron2's X101-32x8d-FPN, 3x",
        ),
        "keypoint-rcnn-r50-fpn-torchvision": Preset(
            {"backbone": {**MaskRCNN._TORCH, "norm_eps": 0.0}, "rules": "torchvision"},
            (Score(54.6, "box AP", _HOW, "torchvision 0.26"), Score(65.0, "keypoint AP", _HOW, "torchvision 0.26")),
            "torchvision's keypointrcnn_resnet50_fpn, COCO_V1",
        ),
        "keypoint-rcnn-small": Preset(
            {**MaskRCNN._SMALL, "keypoints": {"convs": 4, "width": 128}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
