"""YOLACT (Bolya, Zhou, Xiao, Lee, ICCV 2019, arXiv 1904.02689).

Instance segmentation in real time, as two tasks that run side by side. One branch, fully convolutional, paints a few
dozen *prototype* masks of the whole image; the other, an anchor detector on a pyramid, says for every anchor its
class, its box and one coefficient per prototype. A mask is the sigmoid of the prototypes' weighted sum, cropped by its
box: one matrix product for all objects, at the resolution of the prototypes, without re-pooling. Duplicates are
suppressed by a matrix operation too (Fast NMS). Every image is stretched to one square.

Where paper and code differ, this follows the code: the anchors of three "aspect ratios" are squares of three sizes, and
ReLU stands after the pyramid's levels and after the prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.darknet import Darknet
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.blocks.yolact import Head, PrototypeNet, xavier
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.mask_targets import plane_targets
from maskwright.ops.matching import IGNORED, match_each
from maskwright.ops.planes import place_planes
from maskwright.ops.suppression import fast_nms
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System

SIDES = (24, 48, 96, 192, 384)  # of the anchors on P3 ... P7, for inputs of 550 pixels
RATIOS = (1.0, 0.5, 2.0)
VARIANCES = (0.1, 0.1, 0.2, 0.2)  # SSD's: what a box offset of one is worth
TOP = 200  # Fast NMS looks at so many of each class
FARTHEST = float(1 << 20)  # boxes end here, in images' sides, so that no product of two becomes infinite
# The colours of ImageNet as the authors write them, without a division by 255.
COLOURS = Preprocess(
    resample="tensor", mean=(123.68, 116.78, 103.94), std=(58.40, 57.12, 57.38), divide=1.0, multiple=1, fit="stretch",
    canvas=(550, 550),
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """What the network says of every anchor, finest level first, row by row, and of the image as a whole."""

    deltas: Float[Tensor, "b p 4"]
    logits: Float[Tensor, "b p _classes"]  # background last
    coefficients: Float[Tensor, "b p k"]  # -1 ... 1
    prototypes: Float[Tensor, "b k _h _w"]  # 0 and above
    semantic: Float[Tensor, "b n _h3 _w3"]  # logits; read in training only
    grids: tuple[tuple[int, int], ...]  # h, w of each level
    size: tuple[int, int]  # H, W of the input


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first, before they have masks."""

    boxes: Float[Tensor, "n 4"]  # x0, y0, x1, y1 as shares of the input's sides
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    coefficients: Float[Tensor, "n k"]

    def __getitem__(self, rows: Tensor) -> Detections:
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], self.coefficients[rows])


@dataclass(frozen=True)
class MaskTargets:
    """Masks of one image's positive anchors, on the prototypes' grid."""

    soft: Float[Tensor, "n h w"]  # as predicted; cropped by the objects' boxes if so learnt
    truth: Float[Tensor, "n h w"]  # 0 or 1
    boxes: Float[Tensor, "n 4"]  # of the objects, as shares of the input's sides
    labels: Int[Tensor, " n"]
    share: float  # anchors that each of them stands for


class YOLACT(System):
    """See the module's text, and `decode` for its thresholds."""

    name = "yolact"
    card = Card(
        title="YOLACT",
        paper="Bolya, Zhou, Xiao, Lee: YOLACT: Real-time Instance Segmentation. ICCV 2019",
        arxiv="1904.02689",
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
        deform_stages: Sequence[int] = (),
        deform_every: int = 1,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        prototypes: int = 32,
        size: int = 550,
        anchor_sides: Sequence[float] | None = None,
        anchor_ratios: Sequence[float] = RATIOS,
        anchor_octaves: int = 1,
        square_anchors: bool = True,
        crowd_overlap: float = 0.7,
        masks_per_image: int = 100,
        crop_learnt: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone        "resnet18" ... "resnet152", "darknet53", or "timm:NAME" for any of timm's with strides 4 to 32
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width      channels after the stem; all stages scale with it (as published 64; 32 in darknet53)
        deform_stages   stages (0 ... 3) whose every `deform_every`-th block has a modulated deformable convolution
        norm            of the trunk: "group" trains from random weights and with small batches; as published "batch",
                        which the original freezes ("frozen") for fewer than six images per device
        frozen          so many parts of the trunk do not train, from the stem on
        prototypes      how many there are (table 2b compares 8 ... 256)
        size            every image is stretched to this square; anchors are shares of it
        anchor_sides    one for each of five levels, in pixels of an input of `size`; None: 24 ... 384 per 550
        anchor_octaves  2: also anchors sqrt(2) times as large; 3: cbrt(2) and cbrt(4) times; ...
        square_anchors  sides s sqrt(r) for each ratio r, as the published code has it; without, s sqrt(r) x s / sqrt(r)
        crowd_overlap   anchors that lie in a crowd region by more than this share are not learnt from
        masks_per_image   a random choice of so many anchors learns masks, which bounds the memory
        crop_learnt     masks are learnt inside the annotated box alone, as published: elsewhere they are cropped.
                        Without, they also learn to be empty there, and may be decoded without the crop
        mean, std       of the channels, RGB, 0 ... 255 (darknet53: 0 ... 1); None: as published
        """
        super().__init__()
        least = {
            "size": size, "prototypes": prototypes, "anchor_octaves": anchor_octaves,
            "masks_per_image": masks_per_image,
        }  # fmt: skip
        for name, value in least.items():
            if value < 1:
                raise UsageError(f"{name} is {value}; at least 1 is needed")
        if anchor_sides is None:
            anchor_sides = [max(1, s * size // 550) for s in SIDES]
        if len(anchor_sides) != 5:
            raise UsageError(f"anchor_sides has {len(anchor_sides)} entries; there are five levels, P3 ... P7")
        if not min(anchor_sides) > 0:
            raise UsageError(f"anchor_sides is {list(anchor_sides)}; expected pixels, all above 0")
        if not anchor_ratios or not min(anchor_ratios) > 0:
            raise UsageError(f"anchor_ratios is {list(anchor_ratios)}; expected at least one number, all above 0")
        self.classes = tuple(classes)
        self.crowd_overlap, self.masks_per_image, self.crop_learnt = crowd_overlap, masks_per_image, crop_learnt
        self.shapes = _anchor_shapes(anchor_sides, anchor_ratios, anchor_octaves, square_anchors, size)
        count, anchors = len(self.classes), len(self.shapes[0])

        colours = replace(COLOURS, canvas=(size, size))
        self.backbone: nn.Module
        if backbone == "darknet53":
            if deform_stages:
                raise UsageError("darknet53 has no deformable variant; give deform_stages=()")
            # `stem_width` keeps its meaning for the other trunks: 64 stands for the published width.
            self.backbone = Darknet(
                in_channels=in_channels, base=max(1, stem_width // 2), norm=norm, eps=norm_eps, frozen=frozen
            )
            channels = self.backbone.channels[1:]
            colours = replace(colours, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), divide=255.0)
        else:
            self.backbone, channels = make_trunk(
                backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width,
                deform_stages=deform_stages, deform_every=deform_every, deform_modulated=True, deform_bias=True,
                norm=norm, norm_eps=norm_eps, frozen=frozen,
            )  # fmt: skip
        self.neck = FPN(channels[-3:], neck_width, upsample="bilinear", extra="output", relu="outputs")
        self.prototypes = PrototypeNet(neck_width, prototypes)
        self.head = Head(neck_width, anchors, count + 1, prototypes)
        self.semantic = nn.Conv2d(neck_width, count, 1)
        for part in (self.neck, self.prototypes, self.head, self.semantic):
            part.apply(xavier)
        self.preprocess = normalization_for(colours, in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        levels = self.neck(self.backbone(images)[-3:])  # P3 ... P7, strides 8 ... 128
        deltas, logits, coefficients = self.head(levels)
        grids = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        size = (images.shape[-2], images.shape[-1])
        prototypes = self.prototypes(levels[0])  # (B, K, H/4, W/4)
        return Raw(deltas, logits, coefficients, prototypes, self.semantic(levels[0]), grids, size)

    def anchors(self, raw: Raw) -> Float[Tensor, "p 4"]:
        """Centre and sides of every anchor, x, y, w, h, as shares of the input's sides."""
        parts = []
        for (height, width), shapes in zip(raw.grids, self.shapes, strict=True):
            sides = torch.tensor(shapes, device=raw.deltas.device)  # (A, 2)
            # Centres go by the level's own grid, not by its stride: 69 cells share 550 pixels evenly.
            y = (torch.arange(height, device=sides.device) + 0.5) / height
            x = (torch.arange(width, device=sides.device) + 0.5) / width
            centres = torch.stack([x.repeat(height), y.repeat_interleave(width)], 1)  # (H W, 2)
            grid = centres[:, None].expand(-1, len(sides), -1), sides.expand(height * width, -1, -1)
            parts.append(torch.cat(grid, 2).flatten(0, 1))
        return torch.cat(parts)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `box`, `mask` and `semantic`, weighted 1, 1.5, 6.125 and 1. Targets are in the frame of the input.

        The first three are sums over the batch divided by its number of positive anchors. (The original gives no
        finite loss where there is none, and its trainer skips such a batch.)
        """
        own = [_relative(t.to(raw.deltas.device), raw.size) for t in targets]
        anchors = self.anchors(raw)
        matches = [self.assign(anchors, truth, crowd) for truth, crowd in own]
        truths = [truth for truth, _ in own]
        matched = torch.stack([m for _, m in matches])  # (B, P)
        positives = global_mean_count((matched >= 0).sum())
        # Sums of products below must not be made in half precision, nor may the original's cross entropy.
        with torch.autocast(raw.deltas.device.type, enabled=False):
            terms = {
                "class": self.class_loss(raw.logits.float(), matched, truths) / positives,
                "box": 1.5 * self.box_loss(raw.deltas.float(), anchors, matched, truths) / positives,
            }
            learnt = self.training_masks(raw, matched, truths)
            terms |= {name: value / positives for name, value in self.mask_losses(raw, learnt).items()}
            terms["semantic"] = self.semantic_loss(raw, truths)
        return terms

    @torch.no_grad()
    def assign(
        self, anchors: Float[Tensor, "p 4"], target: Instances, crowd: Float[Tensor, "c 4"]
    ) -> tuple[Int[Tensor, " p"], Int[Tensor, " p"]]:
        """For each anchor the object nearest to it, and the same where it answers for it; else -1, or -2 if it lies
        between or in a crowd region and is not learnt from."""
        boxes = box_ops.corners(anchors)
        nearest, matched = match_each(target.boxes, boxes, 0.4, 0.5)
        for region in crowd.split(16):
            low, high = (
                torch.maximum(boxes[:, None, :2], region[:, :2]),
                torch.minimum(boxes[:, None, 2:], region[:, 2:]),
            )
            inside = (high - low).clamp(min=0).prod(-1) / box_ops.area(boxes)[:, None]
            lost = (inside > self.crowd_overlap).any(1) & (matched < 0)
            matched = torch.where(lost, IGNORED, matched)
        return nearest, matched

    def class_loss(
        self, logits: Float[Tensor, "b p c"], matched: Int[Tensor, "b p"], truths: Sequence[Instances]
    ) -> Float[Tensor, ""]:
        """Cross entropy of the positive anchors and of the three times as many negatives of each image that look
        least like background."""
        background = logits.shape[-1] - 1
        positive, negative = matched >= 0, matched == -1
        with torch.no_grad():
            surprise = torch.logsumexp(logits, -1) - logits[..., background]
            order = torch.where(negative, surprise, -1.0).argsort(1, descending=True)
            rank = torch.empty_like(order).scatter_(
                1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
            )
            hard = negative & (rank < 3 * positive.sum(1, keepdim=True))
            labels = torch.stack([_of(t.labels, m, background) for t, m in zip(truths, matched, strict=True)])
        chosen = positive | hard
        return functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum") + logits.sum() * 0

    def box_loss(
        self,
        deltas: Float[Tensor, "b p 4"],
        anchors: Float[Tensor, "p 4"],
        matched: Int[Tensor, "b p"],
        truths: Sequence[Instances],
    ) -> Float[Tensor, ""]:
        wanted = [encode(anchors[m >= 0], t.boxes[m[m >= 0]]) for t, m in zip(truths, matched, strict=True)]
        return smooth_l1_sum(deltas[matched >= 0], torch.cat(wanted), beta=1.0) + deltas.sum() * 0

    def mask_losses(self, raw: Raw, learnt: Sequence[MaskTargets]) -> dict[str, Tensor]:
        """Terms of the assembled masks, as sums over the batch."""
        total = raw.coefficients.float().sum() * 0 + raw.prototypes.float().sum() * 0
        height, width = raw.prototypes.shape[-2:]
        for own in learnt:
            entropy = functional.binary_cross_entropy(own.soft, own.truth, reduction="none")
            if not self.crop_learnt:  # neither the inside nor the outside of a box outweighs the other
                inside = near(own.boxes, (height, width))
                outside = (entropy * ~inside).sum((1, 2)) / (~inside).sum((1, 2)).clamp(min=1)
                total = total + own.share * outside.sum() * height * width
                entropy = entropy * inside
            # Small objects count as much as large ones: the sum is divided by the box's area.
            total = total + own.share * (entropy.sum((1, 2)) / box_ops.area(own.boxes)).sum()
        return {"mask": 6.125 * total / (height * width)}

    def training_masks(self, raw: Raw, matched: Int[Tensor, "b p"], truths: Sequence[Instances]) -> list[MaskTargets]:
        """For each image what its positive anchors' masks are and should be."""
        result = []
        height, width = raw.prototypes.shape[-2:]
        for index, target in enumerate(truths):
            if target.masks is None and len(target):
                raise UsageError("a target has boxes but no masks; give a data set that has them")
            rows = (matched[index] >= 0).nonzero().flatten()
            share = max(1.0, len(rows) / self.masks_per_image)
            if len(rows) > self.masks_per_image:
                rows = rows[torch.randperm(len(rows), device=rows.device)[: self.masks_per_image]]
            owners = matched[index, rows]
            boxes = target.boxes[owners]
            soft = assemble(
                raw.prototypes[index].float(),
                raw.coefficients[index, rows].float(),
                boxes if self.crop_learnt else None,
            )
            chosen, place = owners.unique(return_inverse=True)
            planes = torch.zeros(0, height, width)
            if target.masks is not None:
                planes = plane_targets(target.masks[chosen.cpu()], (height, width), raw.size)
            truth = (planes > 0.5).float().to(soft.device)[place]
            result.append(MaskTargets(soft, truth, boxes, target.labels[owners], share))
        return result

    def semantic_loss(self, raw: Raw, truths: Sequence[Instances]) -> Float[Tensor, ""]:
        """Binary cross entropy of every cell and class against the union of the class's masks; the mean over cells and
        images, a sum over classes. It only helps the features (section 5)."""
        logits = raw.semantic.float()
        wanted = torch.zeros_like(logits)
        height, width = logits.shape[-2:]
        for plane, target in zip(wanted, truths, strict=True):
            if target.masks is not None and len(target):
                planes = plane_targets(target.masks, (height, width), raw.size).to(plane.device)
                plane.index_put_((target.labels,), (planes > 0.5).float(), accumulate=True)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted.clamp(max=1), reduction="sum")
        return entropy / (height * width * len(logits))

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
    ) -> list[Instances]:
        """
        score_threshold      objects of a score at or below it are left out; 0: none. As published there is no second
                             threshold: an anchor that is a candidate for one class may be found as another with next
                             to no score, which AP does not mind
        nms_threshold        objects that overlap a better one of their class by more are left out
        detections           the best so many are kept
        candidate_threshold  anchors whose best class scores no more are not looked at
        suppression          "fast": also a suppressed object suppresses (section 3.3); "greedy": the classical rule
        cross_class          an anchor counts for its best class alone, and objects suppress those of other classes (the
                             original then cuts to 200 objects, not to `detections`)
        crop                 without, masks are left as the prototypes' sum gives them (section 5)
        whole_boxes          corners are cut to whole pixels, as the published figures were measured
        """
        found = self.find(raw, candidate_threshold, nms_threshold, detections, suppression, cross_class)
        return [
            self.on_image(own, prototypes, raw.size, placement, score_threshold, mask_threshold, crop, whole_boxes)
            for own, prototypes, placement in zip(found, raw.prototypes, placements, strict=True)
        ]

    @torch.no_grad()
    def find(
        self,
        raw: Raw,
        candidate_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        suppression: str = "fast",
        cross_class: bool = False,
    ) -> list[Detections]:
        """Detections of each image, best first."""
        anchors = self.anchors(raw)
        probabilities = raw.logits.float().softmax(-1)[..., :-1]  # (B, P, N)
        choose = {"fast": _choose_fast, "greedy": _choose_greedy}.get(suppression)
        if choose is None:
            raise UsageError(f"suppression is {suppression!r}; expected fast or greedy")
        result = []
        for own, deltas, coefficients in zip(probabilities, raw.deltas.float(), raw.coefficients.float(), strict=True):
            boxes = box_ops.corners(decode_boxes(anchors, deltas)).clamp(-FARTHEST, FARTHEST)
            scores, labels = own.T, torch.arange(own.shape[1], device=own.device)[:, None].expand(-1, len(own))
            if cross_class:
                scores, labels = (v[None] for v in own.max(1))
            kept = own.amax(1) > candidate_threshold
            score, row, anchor = choose(boxes, scores, kept, candidate_threshold, nms_threshold, raw.size, detections)
            score, order = score.topk(min(detections, len(score)))
            row, anchor = row[order], anchor[order]
            every = Detections(boxes[anchor], score, labels[row, anchor], coefficients[anchor])
            result.append(every[score >= 0])
        return result

    def on_image(
        self,
        found: Detections,
        prototypes: Float[Tensor, "k h w"],
        size: tuple[int, int],
        placement: Placement,
        score_threshold: float = 0.0,
        mask_threshold: float = 0.5,
        crop: bool = True,
        whole_boxes: bool = True,
        drop_empty: bool = True,
    ) -> Instances:
        """Finished objects. Masks go from the prototypes' grid straight to the image's, after the crop. Objects whose
        box has no area left are dropped, as they are where the original writes its results."""
        found = found[found.scores > score_threshold] if score_threshold > 0 else found
        height, width = size
        boxes = placement.boxes_to_image(found.boxes * found.boxes.new_tensor([width, height, width, height]))
        boxes = box_ops.clip(boxes, placement.image_size)
        if whole_boxes:
            boxes = boxes.trunc()
        if drop_empty:
            solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
            found, boxes = found[solid], boxes[solid]
        soft = assemble(prototypes.float(), found.coefficients, found.boxes if crop else None)
        masks = place_planes(soft, placement, size, threshold=mask_threshold, steps=1)
        return Instances(placement.image_size, boxes, found.labels, masks, found.scores)

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            "backbone": [self.backbone], "neck": [self.neck], "prototypes": [self.prototypes],
            "head": [self.head, self.semantic],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        rows = {}
        for kind in ("weight", "bias"):
            rows[f"head.classes.{kind}"] = ClassRows(background_last=True, repeats=len(self.shapes[0]))
            rows[f"semantic.{kind}"] = ClassRows()
        return rows

    # The authors' schedule. Of their augmentation, "expand" and the crop that keeps an overlap are left out; a random
    # window of at least 0.3 of each side stands for them.
    _SGD: ClassVar[dict[str, Any]] = {
        "batch": 8, "lr": 1e-3, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True, "warmup": 500,
        "warmup_from": 0.1, "augment": {
            "flip": 0.5, "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05, "crop": 0.3,
            "crop_chance": 0.5,
        },
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "yolact": {**_SGD, "steps": 800_000, "milestones": (280 / 800, 600 / 800, 700 / 800, 750 / 800)},
        "yolact-pascal": {**_SGD, "steps": 120_000, "milestones": (60 / 120, 100 / 120)},
    }

    _COCO = "COCO test-dev, stretched to {0} x {0}"
    _README = "README of dbolya/yolact"
    presets: ClassVar[Mapping[str, Preset]] = {
        "yolact-r50": Preset(
            {"backbone": "resnet50", "norm": "batch"},
            (Score(28.2, "mask AP", _COCO.format(550), _README),),
            "42.5 frames per second on a Titan Xp",
        ),
        "yolact-r101": Preset(
            {"backbone": "resnet101", "norm": "batch"},
            (Score(29.8, "mask AP", _COCO.format(550), _README),),
            "the paper's base model; 33.5 frames per second",
        ),
        "yolact-r101-im400": Preset(
            {"backbone": "resnet101", "norm": "batch", "size": 400},
            (Score(24.9, "mask AP", _COCO.format(400), "arXiv 1904.02689, from memory"),),
            "45.3 frames per second; weights were not published",
        ),
        "yolact-r101-im700": Preset(
            {"backbone": "resnet101", "norm": "batch", "size": 700},
            (Score(31.2, "mask AP", _COCO.format(700), _README),),
            "23.6 frames per second",
        ),
        "yolact-darknet53": Preset(
            {"backbone": "darknet53", "norm": "batch"},
            (Score(28.7, "mask AP", _COCO.format(550), _README),),
            "40.0 frames per second",
        ),
        "yolact-r50-pascal": Preset(
            {
                "backbone": "resnet50", "norm": "batch", "square_anchors": False,
                "anchor_sides": (32, 64, 128, 256, 512),
            },
            (Score(72.3, "mask AP50", "Pascal SBD val, stretched to 550 x 550", _README),),
            "mask AP70 56.2",
        ),
        "yolact-small": Preset(
            {"backbone": "resnet18", "norm": "group", "neck_width": 128, "size": 320},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


def _anchor_shapes(
    sides: Sequence[float], ratios: Sequence[float], octaves: int, square: bool, size: int
) -> list[list[tuple[float, float]]]:
    """Width and height of each level's anchors as shares of the input, octave by octave, in them ratio by ratio."""
    result = []
    for side in sides:
        scales = [side * 2 ** (j / octaves) / size for j in range(octaves)]
        pairs = [
            (scale * ratio**0.5, scale * (ratio**0.5 if square else ratio**-0.5))
            for scale in scales
            for ratio in ratios
        ]
        result.append(pairs)
    return result


def decode_boxes(anchors: Float[Tensor, "*n 4"], deltas: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """x, y, w, h that offsets make of anchors. Unlike other systems' there is no bound on the sides."""
    steps = deltas * deltas.new_tensor(VARIANCES)
    return torch.cat(
        [anchors[..., :2] + steps[..., :2] * anchors[..., 2:], anchors[..., 2:] * steps[..., 2:].exp()], -1
    )


def encode(anchors: Float[Tensor, "n 4"], boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Offsets that take anchors (x, y, w, h) to boxes (x0, y0, x1, y1)."""
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    steps = torch.cat([(centres - anchors[:, :2]) / anchors[:, 2:], torch.log(sides / anchors[:, 2:])], 1)
    return steps / steps.new_tensor(VARIANCES)


def assemble(
    prototypes: Float[Tensor, "k h w"], coefficients: Float[Tensor, "n k"], boxes: Float[Tensor, "n 4"] | None
) -> Float[Tensor, "n h w"]:
    """Masks between 0 and 1 on the prototypes' grid (equation 1), zero further than a cell outside of their boxes."""
    soft = torch.einsum("nk,khw->nhw", coefficients, prototypes).sigmoid()
    return soft if boxes is None else soft * near(boxes, (soft.shape[1], soft.shape[2]))


def near(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """The cells from a cell before each box to a cell after it: x0 - 1 <= column < x1 + 1, in fractions of cells."""
    height, width = size
    x0, y0, x1, y1 = (boxes * boxes.new_tensor([width, height, width, height])).unbind(1)
    columns = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    rows = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    across = (columns >= (x0 - 1)[:, None]) & (columns < (x1 + 1)[:, None])
    down = (rows >= (y0 - 1)[:, None]) & (rows < (y1 + 1)[:, None])
    return down[:, :, None] & across[:, None, :]


def _choose_fast(
    boxes: Tensor, scores: Float[Tensor, "c p"], kept: Tensor, candidate: float, threshold: float,
    size: tuple[int, int], wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Score, row of `scores` and anchor of what Fast NMS leaves, the best `wanted` at least; places that are not used
    have a score of -1.

    Each row (class) looks at the best `TOP` of all kept anchors, whatever they score in it. Only better ones decide
    about an anchor, so that the best of all rows are compared among themselves, as many as it takes to find `wanted`,
    before all are."""
    chosen = kept.nonzero().flatten()
    score, place = scores[:, chosen].topk(min(TOP, len(chosen)), dim=1)  # (C, n)
    anchor = chosen[place]
    row = torch.arange(len(score), device=score.device)[:, None].expand_as(score)
    ranked, looked_at = score.flatten().sort(descending=True, stable=True), 2 * wanted
    while looked_at**2 < score.numel() * score.shape[1] // 4:
        best, order = (v[:looked_at] for v in ranked)
        near, owner = boxes[anchor.flatten()[order]], row.flatten()[order]
        good = fast_nms(box_ops.pairwise_iou(near, near) * (owner[:, None] == owner), threshold)
        if int(good.sum()) >= wanted:
            return best[good], owner[good], anchor.flatten()[order][good]
        looked_at *= 2
    near = boxes[anchor]
    good = fast_nms(box_ops.pairwise_iou(near, near), threshold)
    return torch.where(good, score, -1.0).flatten(), row.flatten(), anchor.flatten()


def _choose_greedy(
    boxes: Tensor, scores: Float[Tensor, "c p"], kept: Tensor, candidate: float, threshold: float,
    size: tuple[int, int], wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by the classical rule, as the original's: each class looks at the anchors that score above `candidate`
    in it; sides count pixels, x1 - x0 + 1; an overlap of exactly `threshold` suppresses."""
    row, anchor = (scores > candidate).nonzero().unbind(1)
    height, width = size
    pixels = boxes[anchor] * boxes.new_tensor([width, height, width, height]) + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    below = float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))
    left = box_ops.nms(pixels, scores[row, anchor], row, below)
    return scores[row[left], anchor[left]], row[left], anchor[left]


def _relative(target: Instances, size: tuple[int, int]) -> tuple[Instances, Float[Tensor, "c 4"]]:
    """The objects with boxes as shares of the input's sides, without those of no area, and the crowd's boxes.

    The objects' `image_size` and masks stay those of the input."""
    height, width = size
    boxes = target.boxes / target.boxes.new_tensor([width, height, width, height])
    crowd = torch.zeros_like(target.labels, dtype=torch.bool) if target.crowd is None else target.crowd
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(target, boxes=boxes)[solid & ~crowd], boxes[crowd]


def _of(values: Tensor, matched: Tensor, otherwise: int) -> Tensor:
    """The value of each matched anchor's object; `otherwise` for the others."""
    if not len(values):
        return torch.full_like(matched, otherwise)
    return torch.where(matched >= 0, values[matched.clamp(min=0)], otherwise)
