"""YOLACT++ (Bolya, Zhou, Xiao, Lee, TPAMI 2020, arXiv 1912.06218): YOLACT with three changes.

The trunk's 3 x 3 convolutions are modulated deformable ones, in every block or in every third; there are three times
as many anchors, of three sizes per level and with real aspect ratios; and a tiny network looks at each assembled mask
and says how well it will overlap the object. What it says, times the class's score, ranks the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import Norm
from maskwright.blocks.yolact import xavier
from maskwright.ops.losses import smooth_l1_sum
from maskwright.structures import Instances, Placement
from maskwright.systems.base import Card, ClassRows, Preset, Score
from maskwright.systems.yolact import RATIOS, YOLACT, Detections, MaskTargets, Raw, assemble, near

SMALLEST = 25  # pixels on the prototypes' grid: masks of no more are not re-scored in training


class YOLACTPlus(YOLACT):
    """See the module's text; all that is not here is YOLACT's."""

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
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        deform_stages: Sequence[int] = (1, 2, 3),
        deform_every: int = 1,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        prototypes: int = 32,
        size: int = 550,
        anchor_sides: Sequence[float] | None = None,
        anchor_ratios: Sequence[float] = RATIOS,
        anchor_octaves: int = 3,
        square_anchors: bool = False,
        crowd_overlap: float = 0.7,
        masks_per_image: int = 100,
        crop_learnt: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """YOLACT's options with other defaults. Table 6 of the paper compares `deform_every`, table 7 the anchors."""
        super().__init__(**self.options)
        self.rescoring = Rescoring(len(self.classes))
        self.rescoring.apply(xavier)

    # ---- learning ------------------------------------------------------------------------------------------------

    def mask_losses(self, raw: Raw, learnt: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """YOLACT's, and `rescore`: smooth L1 between what is said of a mask and its overlap with the object, weighted
        25. The soft masks are not detached: prototypes and coefficients learn from this too."""
        terms = super().mask_losses(raw, learnt)
        large = [own.truth.sum((1, 2)) > SMALLEST for own in learnt]
        size = (raw.prototypes.shape[2], raw.prototypes.shape[3])  # what is said of a mask is said of it cropped
        soft = torch.cat([(own.soft * near(own.boxes, size))[rows] for own, rows in zip(learnt, large, strict=True)])
        truth = torch.cat([own.truth[rows] for own, rows in zip(learnt, large, strict=True)]) > 0.5
        labels = torch.cat([own.labels[rows] for own, rows in zip(learnt, large, strict=True)])
        overlap = ((soft > 0.5) & truth).sum((1, 2)) / ((soft > 0.5) | truth).sum((1, 2))
        said = self.rescoring(soft)
        chosen = said.gather(1, labels[:, None])[:, 0]
        return terms | {"rescore": 25 * smooth_l1_sum(chosen, overlap, beta=1.0) + said.sum() * 0}

    # ---- objects -------------------------------------------------------------------------------------------------

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
        suppression: str = "fast",
        cross_class: bool = False,
        crop: bool = True,
        mask_threshold: float = 0.5,
        whole_boxes: bool = True,
        rescore: bool = True,
    ) -> list[Instances]:
        """YOLACT's thresholds, and

        rescore  scores are those of the masks: the class's score times what is said of the mask, best first; mask AP
                 was published with these. Without, they are the class's, which box AP was published with. Which
                 `detections` are kept is the same: suppression comes first
        """
        found = self.find(raw, candidate_threshold, nms_threshold, detections, suppression, cross_class)
        if rescore:
            found = [self.rescored(own, maps) for own, maps in zip(found, raw.prototypes, strict=True)]
        return [
            self.on_image(own, maps, raw.size, placement, score_threshold, mask_threshold, crop, whole_boxes)
            for own, maps, placement in zip(found, raw.prototypes, placements, strict=True)
        ]

    @torch.no_grad()
    def rescored(self, found: Detections, prototypes: Float[Tensor, "k h w"]) -> Detections:
        """The same detections with the scores of their masks, best first."""
        scores = found.scores * self.quality(found, prototypes)
        order = scores.argsort(descending=True, stable=True)
        return replace(found, scores=scores)[order]

    @torch.no_grad()
    def quality(self, found: Detections, prototypes: Float[Tensor, "k h w"]) -> Float[Tensor, " n"]:
        """How well each mask is said to overlap its object; it may exceed 1, or be exactly 0."""
        soft = assemble(prototypes.float(), found.coefficients, found.boxes)
        return self.rescoring(soft).gather(1, found.labels[:, None])[:, 0]

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {**super().groups(), "rescoring": [self.rescoring]}

    def class_rows(self) -> dict[str, ClassRows]:
        return super().class_rows() | {f"rescoring.output.{kind}": ClassRows() for kind in ("weight", "bias")}

    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # YOLACT's

    _COCO = "COCO test-dev, stretched to 550 x 550"
    _README = "README of dbolya/yolact"
    presets: ClassVar[Mapping[str, Preset]] = {
        "yolact-plus-r50": Preset(
            {"backbone": "resnet50", "norm": "batch"},
            (Score(34.1, "mask AP", _COCO, _README),),
            "33.5 frames per second on a Titan Xp",
        ),
        "yolact-plus-r101": Preset(
            {"backbone": "resnet101", "norm": "batch", "deform_every": 3},
            (Score(34.6, "mask AP", _COCO, _README),),
            "27.3 frames per second",
        ),
        "yolact-plus-small": Preset(
            {"backbone": "resnet18", "norm": "group", "deform_stages": (), "neck_width": 128, "size": 320},
            note="for a few hundred images and no GPU; trains from random weights; without deformable convolutions",
        ),
    }


class Rescoring(nn.Module):
    """Soft masks -> how well each is said to overlap an object of each class (figure 8). No padding and no norm; the
    last ReLU lets an answer be exactly zero."""

    WIDTHS = (1, 8, 16, 32, 64, 128)
    LEAST = 63  # five convolutions of stride two leave one cell of so many

    def __init__(self, classes: int):
        super().__init__()
        pairs = zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2) for a, b in pairs)
        self.output = nn.Conv2d(self.WIDTHS[-1], classes, 1)

    def forward(self, masks: Float[Tensor, "n h w"]) -> Float[Tensor, "n c"]:
        height, width = masks.shape[-2:]
        # As around a cropped mask there is nothing beyond a small map.
        masks = functional.pad(masks, (0, max(0, self.LEAST - width), 0, max(0, self.LEAST - height)))
        x = masks[:, None].to(self.output.weight.dtype)
        for conv in self.convs:
            x = functional.relu(conv(x))
        return functional.relu(self.output(x)).amax((2, 3)).float()  # the paper does not say which pooling; the maximum
