"""YOLACT++ (Bolya, Zhou, Xiao, Lee, TPAMI 2020, arXiv 1912.06218): YOLACT with three changes.

The backbone's 3 x 3 convolutions are modulated deformable ones, in every block or in every third; there are three times
as many anchors, of three sizes per level and with real aspect ratios; and a small network predicts from each assembled
mask its IoU with the object. That IoU times the class score ranks the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.yolact import xavier
from maskwright.ops.losses import smooth_l1_sum
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems import yolact
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.system import ClassRows
from maskwright.systems.yolact import (
    YOLACT,
    AnchorsLike,
    Detections,
    LossLike,
    MaskTargets,
    Raw,
    Suppression,
    assemble,
    crop_window,
)

SMALLEST = 25  # cells of the prototypes' grid: masks of no more are not re-scored in training

BACKBONE = replace(yolact.BACKBONE, deform_stages=(1, 2, 3))
ANCHORS = replace(yolact.ANCHORS, octaves=3, square=False)


class Rescoring(nn.Module):
    """Predicts from soft masks their IoU with an object of each class (figure 8).

    There is no padding and no normalisation; the last ReLU allows predictions of exactly 0, and they may exceed 1.

    Args:
        classes: Number of classes.
    """

    WIDTHS = (1, 8, 16, 32, 64, 128)
    LEAST = 63  # cells that five convolutions of stride two reduce to one

    def __init__(self, classes: int):
        super().__init__()
        pairs = zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2) for a, b in pairs)
        self.output = nn.Conv2d(self.WIDTHS[-1], classes, 1)
        self.apply(xavier)

    def forward(self, masks: Float[Tensor, "n h w"]) -> Float[Tensor, "n c"]:
        height, width = masks.shape[-2:]
        # A small map is padded with zeros, which also surround a cropped mask.
        masks = functional.pad(masks, (0, max(0, self.LEAST - width), 0, max(0, self.LEAST - height)))
        x = masks[:, None].to(self.output.weight.dtype)
        for conv in self.convs:
            x = functional.relu(conv(x))
        return functional.relu(self.output(x)).amax((2, 3)).float()  # the paper does not name the pooling


class YOLACTPlus(YOLACT):
    """See the module's docstring; what is not here is YOLACT's.

    Args:
        classes: See `YOLACT`, as for all options; three have other defaults.
        backbone: Modulated deformable convolutions in the last three stages. Table 6 of the paper compares
            `deform_every`. Backbones other than ResNets with bottlenecks have none.
        in_channels: Channels of the image.
        resize: Size and normalisation of the input.
        neck_width: Channels of the pyramid and the head.
        prototypes: Number of prototypes.
        anchors: Three octaves and real aspect ratios; table 7 compares them.
        loss: What the losses are computed on.
    """

    name = "yolact-plus"
    card = Card(
        title="YOLACT++",
        paper="Bolya, Zhou, Xiao, Lee: YOLACT++: Better Real-time Instance Segmentation. TPAMI 2020",
        arxiv="1912.06218",
        code="dbolya/yolact",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = yolact.RESIZE,
        neck_width: int = 256,
        prototypes: int = 32,
        anchors: AnchorsLike = ANCHORS,
        loss: LossLike = yolact.LOSS,
    ):
        super().__init__(**self.options)  # complete, with the defaults above
        self.rescoring = Rescoring(len(self.classes))

    # ---- losses ----------------------------------------------------------------------------------------------------

    def mask_losses(self, raw: Raw, masks: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """YOLACT's terms, and `rescore`: smooth L1 between predicted and actual mask IoU, weighted 25. The soft masks
        are not detached, so that prototypes and coefficients are trained by this term too."""
        terms = super().mask_losses(raw, masks)
        large = [own.truth.sum((1, 2)) > SMALLEST for own in masks]
        size = (raw.prototypes.shape[2], raw.prototypes.shape[3])
        soft = torch.cat(  # always cropped, as when decoding
            [(own.soft * crop_window(own.boxes, size))[rows] for own, rows in zip(masks, large, strict=True)]
        )
        truth = torch.cat([own.truth[rows] for own, rows in zip(masks, large, strict=True)]) > 0.5
        labels = torch.cat([own.labels[rows] for own, rows in zip(masks, large, strict=True)])
        actual = ((soft > 0.5) & truth).sum((1, 2)) / ((soft > 0.5) | truth).sum((1, 2))
        every = self.rescoring(soft)
        predicted = every.gather(1, labels[:, None])[:, 0]
        return terms | {"rescore": 25 * smooth_l1_sum(predicted, actual, beta=1.0) + every.sum() * 0}

    # ---- decoding --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float = 0.5,
        detections: int = 100,
        candidate_threshold: float = 0.05,
        nms: Suppression = "fast",
        cross_class: bool = False,
        crop: bool = True,
        mask_threshold: float = 0.5,
        whole_boxes: bool = True,
        rescore: bool = True,
    ) -> list[Instances]:
        """Converts the raw output to objects: see `YOLACT.decode` for what is not described here.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Applied to the scores that are returned.
            nms_threshold: See `YOLACT.decode`, as for the following.
            detections: Chosen by class scores.
            candidate_threshold: Of the class scores.
            nms: Kind of suppression, by class scores.
            cross_class: Whether objects of all classes suppress each other.
            crop: Whether masks are cropped by their boxes.
            mask_threshold: Of the masks' probabilities.
            whole_boxes: Whether corners are truncated to integers.
            rescore: Whether scores are class score times predicted mask IoU, as for the published mask AP. Without,
                they are the class scores, as for the published box AP. The same objects are detected.

        Returns:
            The objects of each image, best first, on the image's own pixel grid.
        """
        detected = self.detect(raw, candidate_threshold, nms_threshold, detections, nms, cross_class)
        if rescore:
            detected = [self.rescored(own, maps) for own, maps in zip(detected, raw.prototypes, strict=True)]
        return [
            self.on_image(own, maps, raw.size, placement, score_threshold, mask_threshold, crop, whole_boxes)
            for own, maps, placement in zip(detected, raw.prototypes, placements, strict=True)
        ]

    @torch.no_grad()
    def rescored(self, detected: Detections, prototypes: Float[Tensor, "k h w"]) -> Detections:
        """The same detections with the scores of their masks, best first."""
        scores = detected.scores * self.quality(detected, prototypes)
        order = scores.argsort(descending=True, stable=True)
        return replace(detected, scores=scores)[order]

    @torch.no_grad()
    def quality(self, detected: Detections, prototypes: Float[Tensor, "k h w"]) -> Float[Tensor, " n"]:
        """The predicted IoU of each mask with its object, at least 0; it may exceed 1."""
        soft = assemble(prototypes.float(), detected.coefficients, detected.boxes)
        return self.rescoring(soft).gather(1, detected.labels[:, None])[:, 0]

    # ---- for loading and training ----------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {**super().groups(), "rescoring": [self.rescoring]}

    def class_rows(self) -> dict[str, ClassRows]:
        return super().class_rows() | {f"rescoring.output.{kind}": ClassRows() for kind in ("weight", "bias")}

    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # YOLACT's

    _COCO = "COCO test-dev, stretched to 550 x 550"
    _README = "README of dbolya/yolact"
    presets: ClassVar[Mapping[str, Preset]] = {
        "yolact-plus-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "batch"}},
            (Score(34.1, "mask AP", _COCO, _README),),
            "33.5 frames per second on a Titan Xp",
        ),
        "yolact-plus-r101": Preset(
            {"backbone": {"name": "resnet101", "norm": "batch", "deform_every": 3}},
            (Score(34.6, "mask AP", _COCO, _README),),
            "27.3 frames per second",
        ),
        "yolact-plus-small": Preset(
            {"backbone": {"name": "resnet18", "norm": "group"}, "neck_width": 128, "resize": {"short": 320}},
            note="for a few hundred images and no GPU; trains from random weights; without deformable convolutions",
        ),
    }
