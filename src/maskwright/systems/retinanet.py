"""RetinaNet (Lin, Goyal, Girshick, He, Dollár, ICCV 2017, arXiv 1708.02002): focal loss for dense detection.

Every cell of a feature pyramid has nine anchors, for which two towers of convolutions, shared by the levels, predict
classes and boxes. Of the hundred thousand anchors of an image few are objects: the focal loss reduces the weight of
those that are classified well, so that a single stage suffices.

    image -> backbone -> pyramid, strides 8 ... 128 -> 4 convolutions -> classes of each anchor
                                                    -> 4 convolutions -> deltas of each anchor

The published implementations, detectron2, torchvision and MMDetection, differ in conventions that change numbers: see
`RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.fcos import output_conv, tower
from maskwright.blocks.fpn import FPN
from maskwright.blocks.rpn import AnchorRule, Anchors
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_sum, smooth_l1_sum
from maskwright.ops.matching import IGNORED, Rescue, match
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families import two_stage
from maskwright.systems.system import ClassRows, Output, System, at_least

BACKBONE, RESIZE = Backbone("resnet50"), Resize()
WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of box deltas


@dataclass(frozen=True)
class Rules:
    """The conventions of one published implementation.

    Attributes:
        anchors: The rule for anchors, see `blocks.rpn.Anchors`.
        whole: Sizes of anchors are rounded down to integers.
        beta: Beta of the smooth L1 loss; 0 is L1.
        divisor: Of the losses. "mean": an exponential mean of the number of positive anchors of a batch (momentum 0.9,
            starting at 100). "image": the number of each image, and the mean over images. "batch": the number of all
            images, at least one for each.
        clip: Boxes are clipped to the image before non-maximum suppression.
        solid: Boxes without area are dropped before it.
        relu: ReLU before the second of the pyramid's extra levels.
        rescue: How the best anchors of an object become positive, see `ops.matching.match`.
        symmetric: See `ops.boxes.decode`.
    """

    anchors: AnchorRule = "detectron2"
    whole: bool = False
    beta: float = 0.0
    divisor: Literal["mean", "image", "batch"] = "mean"
    clip: bool = False
    solid: bool = False
    relu: bool = True
    rescue: Rescue = True
    symmetric: bool = False


RULES: Mapping[str, Rules] = {
    "detectron2": Rules(),
    "torchvision": Rules("torchvision", True, 0.0, "image", True),
    "mmdetection": (
        _MMDETECTION := Rules(divisor="batch", clip=True, solid=True, relu=False, rescue="own", symmetric=True)
    ),
    "mmdetection-caffe": _MMDETECTION,  # differs in the normalisation of images
}
PREPROCESS: Mapping[str, Preprocess] = {
    "detectron2": Preprocess(
        resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "torchvision": Preprocess(resample="tensor"),
    "mmdetection": two_stage.PREPROCESS["mmdetection"],
    "mmdetection-caffe": two_stage.PREPROCESS["mmdetection-caffe"],
}


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """What the network predicts for the anchors of each level, finest first.

    Attributes:
        features: The pyramid levels.
        logits: Class logits, anchor by anchor.
        deltas: Box deltas, anchor by anchor.
        size: Height and width of the input, padding included.
    """

    features: tuple[Float[Tensor, "b c _h _w"], ...]
    logits: tuple[Float[Tensor, "b ak _h _w"], ...]
    deltas: tuple[Float[Tensor, "b a4 _h _w"], ...]
    size: tuple[int, int]


class RetinaNetwork(nn.Module):
    """Backbone, pyramid, and the two towers with their outputs.

    Args:
        backbone: With levels of strides 8, 16 and 32.
        width: Channels of the pyramid and the towers.
        outputs: Number of anchors of a cell, and of classes.
        convs: Convolutions of each tower.
        norm: Normalisation after each of them.
        relu: ReLU before the second of the pyramid's extra levels.
    """

    def __init__(
        self, backbone: nn.Module, width: int, outputs: tuple[int, int], convs: int, norm: Literal["none", "group"],
        relu: bool = True,
    ):  # fmt: skip
        super().__init__()
        found = levels_of(backbone)
        self.levels = found.indices((8, 16, 32))
        self.backbone = backbone
        self.neck = FPN(
            [found.channels[i] for i in self.levels], width, extra="input", relu="between" if relu else "none"
        )
        anchors, classes = outputs
        self.class_tower, self.box_tower = (tower(width, convs, bias=norm == "none", norm=norm) for _ in range(2))
        self.logits = output_conv(width, anchors * classes, -math.log(99))
        self.deltas = output_conv(width, anchors * 4)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = self.neck([features[index] for index in self.levels])
        logits = tuple(self.logits(self.class_tower(level)) for level in levels)
        deltas = tuple(self.deltas(self.box_tower(level)) for level in levels)
        return Raw(tuple(levels), logits, deltas, (images.shape[-2], images.shape[-1]))


# ---- the system ------------------------------------------------------------------------------------------------------


class RetinaNet(System):
    """RetinaNet: boxes alone. Its network is `dense`."""

    name = "retinanet"
    card = Card(
        title="RetinaNet",
        paper="Lin, Goyal, Girshick, He, Dollár: Focal Loss for Dense Object Detection. ICCV 2017",
        arxiv="1708.02002",
        code="facebookresearch/detectron2; pytorch/vision; open-mmlab/mmdetection",
        code_licence="Apache-2.0; BSD-3-Clause; Apache-2.0",
    )
    normalizer: Tensor

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        convs: int = 4,
        norm: Literal["none", "group"] = "none",
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        rules: Literal["detectron2", "torchvision", "mmdetection", "mmdetection-caffe"] = "detectron2",
        box_loss: Literal["l1", "giou"] = "l1",
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            convs: Convolutions of each tower.
            norm: Normalisation after each of them ("group": torchvision's second version).
            anchor_sizes: Square roots of the anchors' areas on each level, in pixels; anchors 2^(1/3) and 2^(2/3) times
                as large are added.
            rules: The code base whose conventions are followed.
            box_loss: "l1": (smooth) L1 loss of the deltas. "giou": 1 - GIoU of the boxes (torchvision's second
                version).
        """
        super().__init__()
        at_least(self.name, 1, neck_width=neck_width)
        at_least(self.name, 0, convs=convs)
        if len(anchor_sizes) != 5 or min(anchor_sizes) <= 0:
            raise UsageError(f"anchor_sizes must be 5 numbers above 0, one per level, got {list(anchor_sizes)}")
        self.classes, self.rules, self.box_loss = tuple(classes), RULES[rules], box_loss
        spec = Backbone.read(backbone, BACKBONE)
        sizes = [[size * 2 ** (octave / 3) for octave in range(3)] for size in anchor_sizes]
        if self.rules.whole:
            sizes = [[float(int(size)) for size in own] for own in sizes]
        self.anchors = Anchors(sizes, (8, 16, 32, 64, 128), rule=self.rules.anchors)
        outputs = (self.anchors.count, len(self.classes))
        body = spec.build(in_channels, Use())
        self.dense = RetinaNetwork(body, neck_width, outputs, convs, norm, self.rules.relu)
        if self.rules.divisor == "mean":
            self.register_buffer("normalizer", torch.tensor(100.0))
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS[rules], in_channels)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"})

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def per_anchor(self, maps: Sequence[Tensor], values: int) -> list[Float[Tensor, "b _n v"]]:
        """The values of each anchor of each level, in the order y, x, shape; float32."""
        return [m.float().unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class` (focal loss) and `box`. Crowd regions are ignored.

        Anchors are positive from an IoU of 0.5 with an object on, and negative below 0.4; the best anchors of an object
        are positive in any case.
        """
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.logits[0].device) for t in targets]
        anchors = torch.cat(self.anchors(raw.features, raw.size))
        logits = torch.cat(self.per_anchor(raw.logits, len(self.classes)), 1)
        deltas = torch.cat(self.per_anchor(raw.deltas, 4), 1)
        classes, boxes, counts = [], [], []
        for own_logits, own_deltas, target in zip(logits, deltas, targets, strict=True):
            owner, kind = self.assign(anchors, target)
            positive, valid = (kind >= 0).nonzero().flatten(), kind != IGNORED
            truth = torch.zeros_like(own_logits)
            truth[positive, target.labels[owner[positive]]] = 1
            classes.append(focal_sum(own_logits[valid], truth[valid]))
            boxes.append(self._box_loss(own_deltas[positive], anchors[positive], target.boxes[owner[positive]]))
            counts.append(logits.new_tensor(float(len(positive))))
        divisors = self._divisors(counts)
        empty = logits.sum() * 0 + deltas.sum() * 0
        return {
            "class": sum((c / d for c, d in zip(classes, divisors, strict=True)), empty),
            "box": sum((b / d for b, d in zip(boxes, divisors, strict=True)), empty),
        }

    @torch.no_grad()
    def assign(self, anchors: Float[Tensor, "n 4"], target: Instances) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The nearest object of each anchor, and a number that is at least 0 if the anchor is positive, -1 if it is
        negative, and less if it is ignored."""
        return match(box_ops.pairwise_iou(target.boxes.to(anchors), anchors), 0.4, 0.5, self.rules.rescue)

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        if self.box_loss == "l1":
            return smooth_l1_sum(deltas, box_ops.encode(anchors, boxes.to(anchors), WEIGHTS), self.rules.beta)
        predicted = box_ops.decode(anchors, deltas, WEIGHTS)
        return (1 - box_ops.generalised_iou(predicted, boxes.to(anchors))).sum()

    def _divisors(self, counts: Sequence[Tensor]) -> list[Tensor]:
        """What the losses of each image are divided by."""
        if self.rules.divisor == "image":
            return [count.clamp(min=1) * len(counts) for count in counts]
        if self.rules.divisor == "batch":
            return [global_mean_count(torch.stack(list(counts)).clamp(min=1).sum())] * len(counts)
        found = global_mean_count(torch.stack(list(counts)).sum()).to(self.normalizer)
        mean = 0.9 * self.normalizer + 0.1 * found
        if self.training:
            self.normalizer.copy_(mean)
        return [mean] * len(counts)

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        candidates: int = 1000,
    ) -> list[Instances]:
        """Detects boxes.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the input.
            score_threshold: Scores must be above it.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            candidates: (anchor, class) pairs of a level that are kept before suppression.
        """
        kinds = len(self.classes)
        scores, labels, boxes = [], [], []
        anchors = self.anchors(raw.features, raw.size)
        logits, deltas = self.per_anchor(raw.logits, kinds), self.per_anchor(raw.deltas, 4)
        for own_logits, own_deltas, own_anchors in zip(logits, deltas, anchors, strict=True):
            probability = own_logits.sigmoid().flatten(1)
            ranked = torch.where(probability > score_threshold, probability, -1.0)
            best = ranked.topk(min(candidates, ranked.shape[1]))
            place = best.indices // kinds  # (B, M)
            chosen = own_deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes.append(box_ops.decode(own_anchors[place], chosen, WEIGHTS, symmetric=self.rules.symmetric))
            scores.append(best.values)
            labels.append(best.indices % kinds)
        score, label, box = (torch.cat(v, 1) for v in (scores, labels, boxes))
        return [
            self._on_image(score[n], label[n], box[n], placement, nms_threshold, detections)
            for n, placement in enumerate(placements)
        ]

    def _on_image(
        self, scores: Tensor, labels: Tensor, boxes: Tensor, placement: Placement, nms_threshold: float, detections: int
    ) -> Instances:
        """Suppression in pixels of the input, then the boxes on the image."""
        rows = ((scores >= 0) & torch.isfinite(boxes).all(1)).nonzero().flatten()
        scores, labels, boxes = scores[rows], labels[rows], boxes[rows]
        if self.rules.clip:
            boxes = box_ops.clip(boxes, placement.size)
        if self.rules.solid:
            solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
            scores, labels, boxes = scores[solid], labels[solid], boxes[solid]
        kept = box_ops.nms(boxes, scores, labels, nms_threshold, detections)
        boxes = box_ops.clip(placement.boxes_to_image(boxes[kept]), placement.image_size)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return Instances(placement.image_size, boxes[solid], labels[kept][solid], scores=scores[kept][solid])

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        dense = self.dense
        heads = [dense.class_tower, dense.box_tower, dense.logits, dense.deltas]
        return {"backbone": [dense.backbone], "neck": [dense.neck], "heads": heads}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return {f"dense.logits.{kind}": ClassRows(repeats=self.anchors.count) for kind in ("weight", "bias")}

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _D2 = "COCO val2017, short side 800, pycocotools"
    _ZOO = "detectron2 MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "retinanet-r50-fpn": Preset(
            {"backbone": _CAFFE}, (Score(38.7, "box AP", _D2, _ZOO),), "detectron2's R50-FPN, 3x (1x: 37.4)"
        ),
        "retinanet-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **_CAFFE}}, (Score(40.4, "box AP", _D2, _ZOO),),
            "detectron2's R101-FPN, 3x",
        ),
        "retinanet-r50-fpn-torchvision": Preset(
            {"backbone": {"norm": "frozen", "norm_eps": 0.0, "frozen": 2}, "rules": "torchvision"},
            (Score(36.4, "box AP", _D2, "torchvision 0.26"),), "torchvision's retinanet_resnet50_fpn",
        ),
        "retinanet-r50-fpn-torchvision-v2": Preset(
            {"backbone": {"norm": "batch"}, "rules": "torchvision", "norm": "group", "box_loss": "giou"},
            (Score(41.5, "box AP", _D2, "torchvision 0.26"),), "torchvision's retinanet_resnet50_fpn_v2",
        ),
        "retinanet-r50-fpn-mmdetection": Preset(
            {"backbone": {"norm": "still", "frozen": 2}, "rules": "mmdetection"},
            (Score(36.5, "box AP", _D2, "MMDetection 3.3, metafile.yml"),),
            "MMDetection's retinanet_r50_fpn, 1x (2x: 37.4)",
        ),
        "retinanet-small": Preset(
            {
                "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
                "neck_width": 128, "convs": 2, "norm": "group", "anchor_sizes": (16, 32, 64, 128, 256),
                "rules": "torchvision",
            },
            note="for a few hundred images and no GPU; trains from random weights; the mean of detectron2's rules, "
            "which starts at 100 positive anchors, would reduce the losses of few objects",
        ),
    }  # fmt: skip
