"""Mask Scoring R-CNN (Huang, Huang, Gong, Huang, Wang, CVPR 2019, arXiv 1903.00241).

The score of an object in Mask R-CNN is that of its class and does not depend on the quality of the mask. A further head
predicts the IoU between the predicted mask and the object, from the pooled features and the mask; the product of both
is the score. Masks are not changed, only their order.

    detections -> RoIAlign 14 x 14 -> mask head -> 28 x 28 mask of the class
    features, mask reduced to 14 x 14 -> 4 convolutions, 3 linear layers -> IoU; score = class probability * IoU

The published code is based on maskrcnn-benchmark, whose conventions are `rules="maskrcnn-benchmark"`: boxes include
their last pixel, anchors and RoIAlign are those of Detectron. `mask_iou=True` adds the head to Mask R-CNN with any
conventions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.layers import Norm
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import BoxesLike, ProposalsLike, RulesName
from maskwright.systems.mask_rcnn import BACKBONE, BOXES, PROPOSALS, RESIZE, MaskIoUOptions, MaskOptions, MaskRCNN


class MaskScoringRCNN(MaskRCNN):
    """Mask R-CNN whose scores are multiplied by the predicted IoU of the masks."""

    name = "mask-scoring-rcnn"
    card = Card(
        title="Mask Scoring R-CNN",
        paper="Huang, Huang, Gong, Huang, Wang: Mask Scoring R-CNN. CVPR 2019",
        arxiv="1903.00241",
        code="zjhuang22/maskscoring_rcnn",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        rules: RulesName = "maskrcnn-benchmark",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        masks: bool | Mapping[str, Any] | MaskOptions = True,
        mask_iou: bool | Mapping[str, Any] | MaskIoUOptions = True,
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
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`.
            masks: The mask head, see `MaskOptions`.
            mask_iou: The head that predicts the IoU of masks, see `MaskIoUOptions`; False: Mask R-CNN.
        """
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=resize, neck_width=neck_width,
            neck_norm=neck_norm, rules=rules, proposals=proposals, boxes=boxes, masks=masks, mask_iou=mask_iou,
        )  # fmt: skip

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "norm_eps": 0.0, "frozen": 2, "stride_in": "1x1"}
    _HOW = "COCO minival 2014, short side 800, pycocotools"
    _README = "README of zjhuang22/maskscoring_rcnn"
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask-scoring-rcnn-r50-fpn-mmdetection": Preset(
            {"backbone": MaskRCNN._CAFFE, "rules": "mmdetection-caffe"},
            (
                Score(38.2, "box AP", MaskRCNN._D2, MaskRCNN._MMZOO),
                Score(36.0, "mask AP", MaskRCNN._D2, MaskRCNN._MMZOO),
            ),
            "MMDetection's ms-rcnn_r50-caffe_fpn, 1x (2x: 38.8 / 36.3)",
        ),
        "mask-scoring-rcnn-r50-fpn": Preset(
            {"backbone": _CAFFE},
            (Score(37.9, "box AP", _HOW, _README), Score(35.6, "mask AP", _HOW, _README)),
            "the authors' R50-FPN, 1x",
        ),
        "mask-scoring-rcnn-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **_CAFFE}},
            (Score(40.1, "box AP", _HOW, _README), Score(37.4, "mask AP", _HOW, _README)),
            "the authors' R101-FPN, 1x",
        ),
        "mask-scoring-rcnn-small": Preset(
            {
                **MaskRCNN._SMALL, "rules": "detectron2", "masks": {"width": 128},
                "mask_iou": {"width": 128, "fc_width": 256},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "scoring": Ablation(
            "score of a mask: of its class, or multiplied by its predicted IoU",
            {"class": {"mask_iou": False}, "class, head trained": {}, "class x IoU": {}},
            {"class": {"AP": 34.2}, "class x IoU": {"AP": 35.6}},
            "COCO minival, R50-FPN, mask AP (README)",
            {
                **MaskRCNN._ABLATED, "rules": "detectron2", "mask_iou": {"convs": 2, "width": 64, "fc_width": 256},
            },
            MaskRCNN._SCENES, MaskRCNN._TRAINED, {"class, head trained": {"score_of": "box"}},
            {"AP": "segm/AP", "AP50": "segm/AP50", "AP75": "segm/AP75", "AP90": "segm/90"},
        ),
    }  # fmt: skip
