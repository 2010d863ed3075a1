"""CenterMask and CenterMask-Lite (Lee, Park, CVPR 2020, arXiv 1911.06667), as in CenterMask2.

FCOS detects boxes without anchors. Features of each box are pooled from the pyramid level that suits its share of the
image (eq. 2), and a mask head whose features are weighted by a spatial attention (SAG-Mask) predicts the mask. Another
head predicts the IoU of the mask, by which the score is multiplied (Mask Scoring R-CNN, arXiv 1903.00241). The backbone
is VoVNetV2.

    image -> backbone -> pyramid, strides 8 ... 128 -> FCOS -> boxes
    boxes -> RoIAlign 14 x 14, strides 8 ... 32 -> convolutions, spatial attention -> 28 x 28 mask -> IoU
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.blocks.box_stage import BoxRules, Foreground, sample_boxes
from maskwright.blocks.roi_heads import MaskHead, MaskIoUHead, Pooler
from maskwright.blocks.roi_losses import mask_iou_loss, mask_loss, mask_truth
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.mask_targets import share_inside
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.fcos import FCOSSystem, HeadOptions, Located, Raw
from maskwright.systems.system import ClassRows, Output

BACKBONE, RESIZE, HEAD = Backbone("vovnet39", norm="frozen"), Resize(), HeadOptions()
SIDE = 14  # of the pooled features
STRIDES = (8, 16, 32)  # of the levels that masks are pooled from


@dataclass(frozen=True)
class MaskOptions(OptionGroup):
    """The mask and the mask IoU head, as options of a system.

    Attributes:
        convs: Number of 3 x 3 convolutions of each.
        width: Their channels.
        attention: Weight the features of the mask head by a spatial attention.
        scoring: Predict the IoU of masks and multiply the score by it.
        fc_width: Width of the fully connected layers of the mask IoU head.
        levels: The pyramid level of a box: by its share of the "image" (eq. 2), or by its "size" (FPN, eq. 1).
        proposals: Number of detections per image that masks are trained in.
    """

    label: ClassVar[str] = "masks"

    convs: int = 4
    width: int = 256
    attention: bool = True
    scoring: bool = True
    fc_width: int = 1024
    levels: Literal["image", "size"] = "image"
    proposals: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("convs", "width", "fc_width", "proposals"):
            if getattr(self, name) < 1:
                raise UsageError(f"masks.{name} must be at least 1, got {getattr(self, name)}")


MASKS = MaskOptions()


class SpatialAttention(nn.Module):
    """Weights each cell by a 3 x 3 convolution of the mean and the maximum over channels (CBAM, arXiv 1807.06521)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "r c h w"]) -> Float[Tensor, "r c h w"]:
        """Returns the weighted features."""
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(pooled).sigmoid()


class AttentionMaskHead(MaskHead):
    """A mask head with spatial attention after its convolutions (SAG-Mask); see `MaskHead`."""

    def __init__(self, channels: int, outputs: int, *, convs: int, width: int):
        super().__init__(channels, outputs, convs=convs, width=width)
        self.attention = SpatialAttention()

    def features(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r d t t"]:
        """What the last layer reads."""
        for conv in self.convs:
            x = conv(x)
        return functional.relu(self.upsample(self.attention(x)), inplace=True)


class CenterMask(FCOSSystem):
    """CenterMask. Its networks are `dense`, `masks` and, unless masks.scoring is False, `mask_iou`."""

    name = "centermask"
    card = Card(
        title="CenterMask",
        paper="Lee, Park: CenterMask: Real-Time Anchor-Free Instance Segmentation. CVPR 2020",
        arxiv="1911.06667",
        code="youngwanLEE/centermask2",
        code_licence="CC-BY-NC-4.0",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        head: Mapping[str, Any] | HeadOptions = HEAD,
        masks: Mapping[str, Any] | MaskOptions = MASKS,
        radius: float | None = 1.5,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            head: The towers of FCOS, see `HeadOptions`.
            masks: The mask heads, see `MaskOptions`.
            radius: Half the side of the square around an object's centre in which locations are positive, in strides;
                None: the whole box.
        """
        super().__init__(
            classes, backbone=Backbone.read(backbone, BACKBONE), in_channels=in_channels,
            resize=Resize.read(resize, RESIZE), neck_width=neck_width, levels=5, head=HeadOptions.read(head, HEAD),
            rules="adelaidet", radius=radius,
        )  # fmt: skip
        own = self.mask_options = MaskOptions.read(masks, MASKS)
        kind = AttentionMaskHead if own.attention else MaskHead
        self.masks = kind(neck_width, len(self.classes), convs=own.convs, width=own.width)
        self.mask_iou = None
        if own.scoring:
            self.mask_iou = MaskIoUHead(
                neck_width, SIDE, len(self.classes), convs=own.convs, width=own.width, fc_width=own.fc_width
            )
        self.pooler = Pooler(STRIDES)
        self.box_rules = BoxRules()

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes", "masks"})

    def pooled(
        self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], sizes: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "r c s s"]:
        """Pools features of boxes of each image (in pixels of the input), whose height and width are `sizes`."""
        if self.mask_options.levels == "size":
            return self.pooler(raw.features, boxes, SIDE)
        levels = torch.cat([box_level(own, size) for own, size in zip(boxes, sizes, strict=True)])
        return self.pooler(raw.features, boxes, SIDE, levels)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class`, `box`, `centerness`, `mask` and `mask_iou`. Crowd regions are ignored.

        Masks are trained in the foreground of the current detections and of the objects' own boxes.
        """
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.logits[0].device) for t in targets]
        terms = self.location_losses(raw, self.assign(raw, targets))
        found = self.find(raw, [t.image_size for t in targets], None, 0.6, self.mask_options.proposals)
        return terms | self.roi_losses(raw, [own.boxes for own in found], targets)

    def roi_losses(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Computes the losses of the mask heads for given boxes."""
        rois = Foreground.from_assigned(
            [sample_boxes(own, t, self.head_classes, self.box_rules) for own, t in zip(proposals, targets, strict=True)]
        )
        features = self.pooled(raw, rois.boxes, [t.image_size for t in targets])
        logits = self.masks(features, rois.labels)[:, 0]
        truth = mask_truth(rois, targets, logits.shape[-1], "binary")
        terms = {"mask": mask_loss(logits, truth)}
        if self.mask_iou is not None:
            # The gradient flows through the mask, as in the published code.
            iou = self.mask_iou(features, logits.float().sigmoid())
            predicted = iou[torch.arange(len(iou), device=iou.device), rois.labels]
            shares = [
                share_inside(target.masks, owners, boxes, whole_area="outline")  # pyright: ignore[reportArgumentType]
                for target, owners, boxes in zip(targets, rois.owners, rois.boxes, strict=True)
                if len(boxes)
            ]
            share = torch.cat(shares).to(predicted) if shares else predicted.new_zeros(0)
            terms["mask_iou"] = mask_iou_loss(predicted, logits, truth, share) + iou.sum() * 0
        return terms

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        detections: int = 50,
        mask_threshold: float = 0.5,
        candidates: int = 1000,
        score_of: Literal["mask", "box"] = "mask",
    ) -> list[Instances]:
        """Detects objects.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Scores must be above it; up to 0.05, class probabilities must be above it.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            mask_threshold: Probability from which on a pixel belongs to the mask.
            candidates: (location, class) pairs of a level that are kept before suppression.
            score_of: The score of the mask (that of the box times the predicted IoU), which orders the objects, or that
                of the box, by which the published code evaluates boxes.
        """
        sizes = [p.size for p in placements]
        found = self.find(raw, sizes, score_threshold, nms_threshold, detections, candidates)
        masks, scores = self.read_boxes(raw, [own.boxes for own in found], [own.labels for own in found], sizes)
        result = []
        for own, mask, quality, placement in zip(found, masks, scores, placements, strict=True):
            score = (own.scores * quality).clamp(0, 1) if score_of == "mask" else own.scores
            order = score.argsort(descending=True, stable=True)
            if score_threshold > self.rules.score_threshold:
                order = order[score[order] > score_threshold]
            best = Located(own.boxes[order], score[order], own.labels[order], own.places[order])
            result.append(self.on_image(best, placement, mask[order], mask_threshold))
        return result

    @torch.no_grad()
    def read_boxes(
        self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]], labels: Sequence[Int[Tensor, " _n"]],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Float[Tensor, "_n s s"]], list[Float[Tensor, " _n"]]]:  # fmt: skip
        """Predicts masks in boxes of each image, as probabilities, and the IoU of each; 1 without scoring."""
        counts, every = [len(own) for own in boxes], torch.cat(list(labels))
        features = self.pooled(raw, boxes, sizes)
        masks = self.masks(features, every)[:, 0].float().sigmoid()
        quality = masks.new_ones(len(masks))
        if self.mask_iou is not None:
            iou = self.mask_iou(features, masks).float()
            quality = iou[torch.arange(len(iou), device=iou.device), every]
        return list(masks.split(counts)), list(quality.split(counts))

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows = dict(super().class_rows())
        for kind in ("weight", "bias"):
            rows[f"masks.logits.{kind}"] = ClassRows()
            if self.mask_iou is not None:
                rows[f"mask_iou.iou.{kind}"] = ClassRows()
        return rows

    _V: ClassVar[dict[str, Any]] = {"norm": "frozen"}
    _DCN: ClassVar[dict[str, Any]] = {"norm": "frozen", "deform_stages": (1, 2, 3), "deform_modulated": True}
    _LITE: ClassVar[dict[str, Any]] = {
        "resize": {"short": 600, "long": 1000}, "neck_width": 128, "head": {"classes": 2, "boxes": 2},
        "masks": {"convs": 2, "width": 128},
    }  # fmt: skip
    _HOW = "COCO val2017, short side 800, pycocotools"
    _HOW_LITE = "COCO val2017, short side 600, pycocotools"
    _README = "README of youngwanLEE/centermask2"
    presets: ClassVar[Mapping[str, Preset]] = {
        "centermask-v39": Preset(
            {"backbone": {"name": "vovnet39", **_V}},
            (Score(39.7, "mask AP", _HOW, _README), Score(44.2, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-39, 3x",
        ),
        "centermask-v57": Preset(
            {"backbone": {"name": "vovnet57", **_V}},
            (Score(40.5, "mask AP", _HOW, _README), Score(45.1, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-57, 3x",
        ),
        "centermask-v99": Preset(
            {"backbone": {"name": "vovnet99", **_V}},
            (Score(41.4, "mask AP", _HOW, _README), Score(46.0, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-99, 3x",
        ),
        "centermask-v39-dcn": Preset(
            {"backbone": {"name": "vovnet39", **_DCN}},
            (Score(40.3, "mask AP", _HOW, _README), Score(45.1, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-39 and deformable convolutions, 3x",
        ),
        "centermask-v57-dcn": Preset(
            {"backbone": {"name": "vovnet57", **_DCN}},
            (Score(40.9, "mask AP", _HOW, _README), Score(45.5, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-57 and deformable convolutions, 3x",
        ),
        "centermask-v99-dcn": Preset(
            {"backbone": {"name": "vovnet99", **_DCN}},
            (Score(42.0, "mask AP", _HOW, _README), Score(46.9, "box AP", _HOW, _README)),
            "CenterMask2 with VoVNetV2-99 and deformable convolutions, 3x",
        ),
        "centermask-lite-v39": Preset(
            {**_LITE, "backbone": {"name": "vovnet39", **_V}},
            (Score(36.7, "mask AP", _HOW_LITE, _README), Score(40.9, "box AP", _HOW_LITE, _README)),
            "CenterMask2-Lite with VoVNetV2-39, 4x",
        ),
        "centermask-lite-v19": Preset(
            {**_LITE, "backbone": {"name": "vovnet19", **_V}},
            (Score(32.8, "mask AP", _HOW_LITE, _README), Score(35.9, "box AP", _HOW_LITE, _README)),
            "CenterMask2-Lite with VoVNetV2-19, 4x",
        ),
        "centermask-lite-v19-slim": Preset(
            {**_LITE, "backbone": {"name": "vovnet19-slim", **_V}},
            (Score(29.8, "mask AP", _HOW_LITE, _README), Score(32.5, "box AP", _HOW_LITE, _README)),
            "CenterMask2-Lite with VoVNetV2-19-slim, 4x",
        ),
        "centermask-lite-v19-slim-dw": Preset(
            {**_LITE, "backbone": {"name": "vovnet19-slim-dw", **_V}},
            (Score(27.1, "mask AP", _HOW_LITE, _README), Score(29.5, "box AP", _HOW_LITE, _README)),
            "CenterMask2-Lite with VoVNetV2-19-slim-dw, 4x",
        ),
        "centermask-lite-mobilenet-v2": Preset(
            {**_LITE, "backbone": {"name": "mobilenet-v2", **_V}},
            (Score(27.2, "mask AP", _HOW_LITE, _README), Score(29.8, "box AP", _HOW_LITE, _README)),
            "CenterMask2-Lite with MobileNetV2, 4x",
        ),
        "centermask-small": Preset(
            {
                "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
                "neck_width": 128, "head": {"classes": 2, "boxes": 2},
                "masks": {"convs": 2, "width": 128, "fc_width": 256},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "width": 32, "norm": "group"}, "resize": {"short": 160, "long": 160},
        "neck_width": 64, "head": {"classes": 2, "boxes": 2}, "masks": {"convs": 2, "width": 64, "fc_width": 256},
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "parts": Ablation(
            "spatial attention, scoring of masks, and the rule for pyramid levels",
            {
                "none": {"masks": {"attention": False, "scoring": False, "levels": "size"}},
                "levels by the image": {"masks": {"attention": False, "scoring": False}},
                "and attention": {"masks": {"scoring": False}},
                "and scoring": {},
            },
            {}, "figures of arXiv 1911.06667 are not included", _ABLATED,
            {"size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4},
            {"lr": 1e-3, "warmup": 50, "ema": 0.99},
        ),
    }  # fmt: skip


def box_level(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Int[Tensor, " n"]:
    """The level, 0 ... 2, that each box is pooled from: ceil(5 - log2(area of the image / area of the box)) (eq. 2).

    Args:
        boxes: Boxes in pixels of the input; their parts outside of the image count.
        size: Height and width of the part of the input that is not padding.
    """
    ratio = size[0] * size[1] / box_ops.area(boxes)
    return torch.ceil(5 - torch.log2(ratio)).nan_to_num(nan=3, neginf=3).clamp(3, 5).to(torch.int64) - 3
