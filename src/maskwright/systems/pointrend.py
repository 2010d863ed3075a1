"""PointRend: Image Segmentation as Rendering (Kirillov, Wu, He, Girshick, CVPR 2020, arXiv 1912.08193).

A mask need not be computed on a grid. As in computer graphics, where an image is sampled more densely where it
changes, a small network is asked for single points: it reads a fine feature and a coarse prediction at the point, and
says what is there. At test a coarse mask is doubled again and again, and only the cells that are unsure, which lie
along the outline, are asked for; in training points are drawn with a bias towards unsure places.

`PointRend` does this inside the boxes of Mask R-CNN, `PointRendSemantic` on the whole image for a semantic
segmentation. The block itself, `blocks.points`, refines coarse masks of other systems too (`points=True` there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.points import BoxPoints, PointHead, PointRules, read_in_boxes
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.roi_heads import Sampled
from maskwright.blocks.semantic import VOID, SemanticFPN, label_maps, semantic_loss
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import label_target
from maskwright.ops.planes import label_plane
from maskwright.ops.points import (
    class_uncertainty,
    grid_points,
    point_sample,
    subdivide,
    uncertain_points,
    uniform_points,
)
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.base import Ablation, Card, ClassRows, PanopticSystem, Preset, Score
from maskwright.systems.mask_rcnn import PREPROCESS, MaskRCNN
from maskwright.systems.mask_rcnn import Raw as BoxRaw


class CoarseHead(nn.Module):
    """Numbers about a box as a whole (section 4.1): a 2 x 2 convolution of stride 2, fully connected layers, and a
    mask of side x side for every class; or, with `side` 0, `kinds` numbers."""

    def __init__(self, channels: int, inputs: int, kinds: int, side: int, *, width: int = 256, fc_width: int = 1024):
        super().__init__()
        self.side = side
        self.reduce = nn.Conv2d(channels, width, 1) if channels > width else None
        self.halve = nn.Conv2d(min(channels, width), min(channels, width), 2, 2)
        read = min(channels, width) * (inputs // 2) ** 2
        self.fcs = nn.ModuleList([nn.Linear(read, fc_width), nn.Linear(fc_width, fc_width)])
        self.logits = nn.Linear(fc_width, kinds * (side * side or 1))
        for layer in (self.reduce, self.halve):
            if layer is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.logits.weight, std=0.001)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r k *t"]:
        if self.reduce is not None:
            x = functional.relu(self.reduce(x), inplace=True)
        x = functional.relu(self.halve(x), inplace=True).flatten(1)
        for layer in self.fcs:
            x = functional.relu(layer(x), inplace=True)
        x = self.logits(x)
        return x.unflatten(1, (-1, self.side, self.side)) if self.side else x

    def of(self, x: Float[Tensor, "r c s s"], labels: Int[Tensor, " r"]) -> Float[Tensor, "r t t"]:
        """Each box's mask of its own label alone."""
        return self(x)[torch.arange(len(labels), device=labels.device), labels]


class ImplicitPoints(BoxPoints):
    """Implicit PointRend (arXiv 2104.06404, section 5): there is no coarse mask. What the head says of a box are the
    weights of the box's own point network, which reads the fine feature and where in the box the point is, as random
    Fourier features. Points are drawn uniformly."""

    waves: Tensor

    def __init__(self, channels: int, kinds: int, *, width: int = 256, stride: int = 4, rules: PointRules):
        super().__init__(channels, kinds, width=width, stride=stride, rules=rules, start="grid")
        self.head = None  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("waves", torch.randn(2, 128))
        inputs = [channels + 256, width, width, width]
        self.shapes = list(zip([*inputs[1:], kinds], inputs, strict=True))  # of the layers' weights: out, in

    @property
    def count(self) -> int:
        """How many numbers a box's network has."""
        return sum(out * read + out for out, read in self.shapes)

    def answer(
        self, feature: Tensor, coarse: Tensor, boxes: Sequence[Tensor], labels: Tensor, points: Float[Tensor, "r p 2"]
    ) -> Float[Tensor, "r 1 p"]:
        fine = read_in_boxes(feature, boxes, points, self.stride)
        angles = 2 * math.pi * ((2 * points - 1) @ self.waves.to(points))
        x = torch.cat([angles.sin().mT.to(fine), angles.cos().mT.to(fine), fine], 1)
        parts = coarse.split([o * i for o, i in self.shapes] + [o for o, _ in self.shapes], 1)  # weights, then biases
        rows = torch.arange(len(labels), device=labels.device)
        for number, ((out, read), weight, bias) in enumerate(zip(self.shapes, parts[:4], parts[4:], strict=True)):
            weight = weight.unflatten(1, (out, read))
            if number == len(self.shapes) - 1:  # only the label's own row is asked for
                return weight[rows, labels][:, None] @ x + bias[rows, labels][:, None, None]
            x = functional.relu(torch.baddbmm(bias[..., None], weight, x), inplace=True)
        raise AssertionError

    def choose(self, coarse: Tensor, labels: Tensor) -> Float[Tensor, "r p 2"]:
        return uniform_points(len(labels), self.rules.count, device=coarse.device)


class PointRend(MaskRCNN):
    """Mask R-CNN's options where they apply, and PointRend's own. `decode` takes `refine` too."""

    name = "pointrend"
    card = Card(
        title="PointRend",
        paper="Kirillov, Wu, He, Girshick: PointRend: Image Segmentation as Rendering. CVPR 2020",
        arxiv="1912.08193",
        code="facebookresearch/detectron2, projects/PointRend",
        code_licence="Apache-2.0",
    )
    mask_head: CoarseHead

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
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
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        proposals_before: Sequence[int] | None = None,
        proposals_after: Sequence[int] | None = None,
        box_width: int = 1024,
        mask_width: int = 256,
        mask_fc_width: int = 1024,
        coarse_side: int = 7,
        point_width: int = 256,
        point_count: int = 196,
        candidates: float = 3.0,
        important: float = 0.75,
        refine_steps: int = 5,
        refine_points: int = 784,
        predicted_boxes: bool | None = None,
        implicit: bool = False,
        implicit_weight: float = 1e-5,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """As in `MaskRCNN`, by detectron2's rules. Further:

        mask_width, mask_fc_width  channels and layers of the coarse head
        coarse_side      of the coarse masks; features are read at twice as many points a side
        point_width      of the layers of the point network
        point_count      points per box to learn from; of `candidates` times as many the least sure are taken, a share
                         `important`, the rest is uniform (section 3.2: 3, 0.75 is mildly biased; 1, 0 uniform)
        refine_steps, refine_points
                         at test the coarse side is doubled so often, and so many points are asked for after each;
                         0 steps refine nothing
        predicted_boxes  masks are learnt in the boxes that the box head predicts, not in proposals; None: as published,
                         not with `implicit`
        implicit         no coarse mask, but a point network of its own for each box (arXiv 2104.06404); needs memory
        implicit_weight  of the mean square of those networks' numbers, a loss
        """
        super().__init__(
            classes, backbone=backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width,
            groups=groups, group_width=group_width, stride_in=stride_in, norm=norm, norm_eps=norm_eps, frozen=frozen,
            neck_width=neck_width, neck_norm=neck_norm, anchor_sizes=anchor_sizes, proposals_before=proposals_before,
            proposals_after=proposals_after, box_width=box_width, masks=False, short=short, long=long, mean=mean,
            std=std,
        )  # fmt: skip
        kinds, rules = len(self.classes), PointRules(point_count, candidates, important, refine_steps, refine_points)
        self.predicted_boxes = not implicit if predicted_boxes is None else predicted_boxes
        self.mask_side, self.implicit_weight = 2 * coarse_side, implicit_weight
        if implicit:
            self.points = own = ImplicitPoints(neck_width, kinds, width=point_width, rules=rules)
            self.mask_head = CoarseHead(
                neck_width, self.mask_side, own.count, 0, width=mask_width, fc_width=mask_fc_width
            )
        else:
            self.points = BoxPoints(neck_width, kinds, width=point_width, rules=rules, start="grid")
            self.mask_head = CoarseHead(
                neck_width, self.mask_side, kinds, coarse_side, width=mask_width, fc_width=mask_fc_width
            )

    # ---- what differs from Mask R-CNN ------------------------------------------------------------------------------

    def mask_features(self, raw: BoxRaw, boxes: Sequence[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r c s s"]:
        """The finest level at a regular grid of points of each box, whatever its size: no RoIAlign, no choice of a
        level."""
        points = grid_points(sum(map(len, boxes)), self.mask_side, self.mask_side, raw.features[0].device)
        return read_in_boxes(raw.features[0], boxes, points, 4).unflatten(2, (self.mask_side, self.mask_side))

    def mask_boxes(self, sampled: Sequence[Sampled], deltas: Tensor) -> list[Float[Tensor, "_n 4"]]:
        """The boxes decoded for the objects' own classes: what masks will be asked for at test. Not clipped."""
        if not self.predicted_boxes:
            return super().mask_boxes(sampled, deltas)
        result = []
        for own, shifts in zip(sampled, deltas.detach().float().split([len(s.boxes) for s in sampled]), strict=True):
            labels = own.labels[own.foreground]
            chosen = shifts.unflatten(1, (-1, 4))[own.foreground, labels]
            result.append(box_ops.decode(own.boxes[own.foreground], chosen, self.roi_rules.weights))
        return result

    def roi_losses(
        self, raw: BoxRaw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        # Masks are compared at points, so polygons are filled first, on the whole image.
        filled = [t if t.masks is None else replace(t, masks=t.masks.pack()) for t in targets]
        return super().roi_losses(raw, proposals, filled)

    def mask_losses(
        self, raw: BoxRaw, features: Tensor, sampled: Sequence[Sampled], boxes: Sequence[Tensor],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:  # fmt: skip
        """`mask` of the coarse head, or `size` of the implicit networks, and `mask_point`."""
        if not isinstance(self.points, ImplicitPoints):
            return super().mask_losses(raw, features, sampled, boxes, targets)
        labels, networks = torch.cat([s.labels[s.foreground] for s in sampled]), self.mask_head(features)
        count = global_mean_count(networks.new_tensor(float(networks.numel()), dtype=torch.float32))
        size = self.implicit_weight * networks.float().square().sum() / count
        owners = [s.owners for s in sampled]
        return {
            "size": size,
            "mask_point": self.points.loss(raw.features[0], networks, boxes, labels, targets, owners),
        }

    def box_masks(
        self, raw: BoxRaw, features: Float[Tensor, "r c _s _s"], boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"], refine: bool = True,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        if not refine and isinstance(self.points, ImplicitPoints):
            raise UsageError("implicit PointRend has no coarse masks; refine=False needs them")
        return super().box_masks(raw, features, boxes, labels, refine)

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows: dict[str, ClassRows | tuple[ClassRows, ...]] = {}
        for kind in ("weight", "bias"):
            rows[f"box_head.classes.{kind}"] = ClassRows(background_last=True)
            rows[f"box_head.deltas.{kind}"] = ClassRows(per_class=4)
            if isinstance(self.points, ImplicitPoints):
                # Weights of all layers come first, then all biases: the last layer's are in the middle and at the end.
                continue
            rows[f"mask_head.logits.{kind}"] = ClassRows(per_class=self.mask_head.side**2)
        if self.points is not None and not isinstance(self.points, ImplicitPoints):
            for name, axes in self.points.head.class_rows().items():
                rows[f"points.head.{name}"] = tuple(ClassRows(axis, before=before) for axis, before in axes)
        return rows

    _OFFICIAL: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2}
    _STATED: ClassVar[str] = "detectron2 projects/PointRend README"
    _COCO: ClassVar[str] = "COCO val2017, short side 800, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "pointrend-r50-fpn": Preset(
            {**_OFFICIAL, "stride_in": "1x1"}, (Score(38.3, "mask AP", _COCO, _STATED),),
            "3x schedule; 1x: 36.2. Against LVIS's finer annotations 41.6 and 39.7",
        ),
        "pointrend-r101-fpn": Preset(
            {**_OFFICIAL, "backbone": "resnet101", "stride_in": "1x1"}, (Score(40.1, "mask AP", _COCO, _STATED),),
            "3x schedule; against LVIS's annotations 43.8",
        ),
        "pointrend-x101-fpn": Preset(
            {**_OFFICIAL, "backbone": "resnet101", "groups": 32, "group_width": 8, "std": (57.375, 57.12, 58.395)},
            (Score(41.1, "mask AP", _COCO, _STATED),), "ResNeXt-101 32x8d, 3x schedule; against LVIS's 44.7",
        ),
        "pointrend-r50-fpn-cityscapes": Preset(
            {**_OFFICIAL, "stride_in": "1x1", "short": 1024, "long": 2048},
            (Score(35.9, "mask AP", "Cityscapes val, 1024 x 2048, the Cityscapes evaluator", _STATED),),
        ),
        "implicit-pointrend-r50-fpn": Preset(
            {**_OFFICIAL, "stride_in": "1x1", "implicit": True, "refine_steps": 5},
            note="detectron2's configuration; no weights were published",
        ),
        "pointrend-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "neck_norm": "group", "box_width": 512, "mask_width": 128,
                "mask_fc_width": 512, "point_width": 128, "anchor_sizes": (16, 32, 64, 128, 256),
                "proposals_before": (500, 300), "proposals_after": (300, 200), "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pointrend-1x": {"steps": 90_000, "decay_biases": True, "short": tuple(range(640, 801, 32)), "long": 1333},
        "pointrend-3x": {
            "steps": 270_000, "milestones": (210 / 270, 250 / 270), "decay_biases": True,
            "short": tuple(range(640, 801, 32)), "long": 1333,
        },
        "pointrend-cityscapes": {
            "batch": 8, "lr": 0.01, "steps": 24_000, "milestones": (18 / 24,), "decay_biases": True,
            "short": tuple(range(800, 1025, 32)), "long": 2048,
        },
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "sampling": Ablation(
            "which points masks are learnt from (section 3.2)",
            {
                "uniform": {"candidates": 1.0, "important": 0.0}, "mildly biased": {},
                "heavily biased": {"candidates": 10.0, "important": 1.0},
            },
            {}, "the paper's figures are not repeated here: they could not be looked up",
            {
                **{k: v for k, v in MaskRCNN._ABLATED.items() if k != "mask_convs"}, "mask_fc_width": 256,
                "point_width": 64,
            },
            MaskRCNN._SCENES, MaskRCNN._TRAINED,
        ),
    }  # fmt: skip


# ---- semantic segmentation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """A coarse answer, and what points are asked with."""

    feature: Float[Tensor, "b c h w"]  # stride 4
    coarse: Float[Tensor, "b k h w"]  # logits, stride 4
    size: tuple[int, int]  # H, W of the input, padding included


class PointRendSemantic(PanopticSystem):
    """One region per class. `decode` takes `score_threshold`, `detections` and `refine`; `decode_semantic` gives the
    label of each pixel."""

    name = "pointrend-semantic"
    card = PointRend.card

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        background: bool = True,
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
        coarse_width: int = 128,
        point_width: int = 256,
        point_count: int = 2048,
        candidates: float = 3.0,
        important: float = 0.75,
        refine_steps: int = 2,
        refine_points: int = 8192,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        stuff         those of `classes` that are regions; objects of the others are one region per class all the same
        background    pixels that nothing covers are learnt as such, with a class of their own, and found again;
                      without it (as published) they are not learnt from, and every pixel is of some class
        backbone ... neck_norm  as in `MaskRCNN`
        coarse_width  inside the coarse head
        point_width ... refine_points  as in `PointRend`: points per image
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.background = background
        self.point_rules = PointRules(point_count, candidates, important, refine_steps, refine_points)
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, groups=groups,
            group_width=group_width, stride_in=stride_in, norm=norm, norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        self.neck = FPN(channels, neck_width, norm=neck_norm)
        outputs = len(self.classes) + background
        if outputs < 2:
            raise UsageError("one class and no background: there is nothing to choose from; set background=True")
        self.coarse_head = SemanticFPN(neck_width, outputs, width=coarse_width)
        self.point_head = PointHead(neck_width, outputs, outputs, width=point_width, each=False)
        self.preprocess = normalization_for(PREPROCESS["detectron2"].at(short, long), in_channels, mean, std)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        pyramid = self.neck(self.backbone(images))
        return Raw(pyramid[0], self.coarse_head(pyramid), (images.shape[-2], images.shape[-1]))

    def answer(self, raw: Raw, points: Float[Tensor, "b p 2"]) -> Float[Tensor, "b k p"]:
        """Logits at points of the input, padding included."""
        return self.point_head(point_sample(raw.feature, points), point_sample(raw.coarse, points))

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`coarse`, over all pixels, and `point`, over the points drawn. Where objects overlap the smaller one is
        seen; crowd regions are not learnt from."""
        planes = []
        for target in targets:
            if target.masks is None and len(target):
                raise UsageError("a target has boxes but no masks; this system learns from masks")
            nothing = len(self.classes) if self.background else VOID
            planes.append(
                torch.full(target.image_size, nothing)
                if target.masks is None
                else label_target(target.masks, target.labels, nothing=nothing, crowd=target.crowd, void=VOID)
            )
        truth = label_maps(planes, raw.size, raw.coarse.device)
        rules = self.point_rules
        points = uncertain_points(
            raw.coarse.detach().float(), rules.count, class_uncertainty,
            candidates=rules.candidates, important=rules.important,
        )  # fmt: skip
        return {"coarse": semantic_loss(raw.coarse, truth), "point": self.point_loss(raw, points, truth)}

    def point_loss(self, raw: Raw, points: Float[Tensor, "b p 2"], truth: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
        """Cross entropy at points, mean over those whose nearest pixel is not VOID."""
        logits = self.answer(raw, points).float()
        x, y = (points * points.new_tensor([truth.shape[2], truth.shape[1]])).floor().long().unbind(-1)
        x, y = x.clamp(0, truth.shape[2] - 1), y.clamp(0, truth.shape[1] - 1)
        labels = truth.flatten(1).gather(1, y * truth.shape[2] + x)
        count = global_mean_count((labels != VOID).sum())
        return functional.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum") / count

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refined(self, raw: Raw, refine: bool = True) -> Float[Tensor, "b k _h _w"]:
        """Logits after subdivision, four times as fine as the coarse ones as published."""
        steps = self.point_rules.steps if refine else 0
        return subdivide(
            raw.coarse.float(), lambda points: self.answer(raw, points).float(), class_uncertainty, steps=steps,
            points=self.point_rules.points,
        )  # fmt: skip

    @torch.no_grad()
    def decode_semantic(
        self, raw: Raw, placements: Sequence[Placement], *, refine: bool = True
    ) -> list[Int[Tensor, "_h _w"]]:
        return [labels for labels, _ in self._labels(raw, placements, refine)]

    def _labels(self, raw: Raw, placements: Sequence[Placement], refine: bool) -> list[tuple[Tensor, Tensor]]:
        """Each image's labels, -1 for nothing, and how probable they are; one image after the other."""
        result = []
        for row, placement in enumerate(placements):
            one = Raw(raw.feature[row : row + 1], raw.coarse[row : row + 1], raw.size)
            labels, surety = label_plane(self.refined(one, refine)[0], placement, raw.size)
            result.append((labels.masked_fill(labels == len(self.classes), -1), surety))
        return result

    @torch.no_grad()
    def decode_panoptic(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, refine: bool = True
    ) -> list[Panoptic]:
        """One segment per class that is there, best first; its score is the mean probability of its pixels."""
        return [self._segments(*found, score_threshold) for found in self._labels(raw, placements, refine)]

    def _segments(self, labels: Tensor, surety: Tensor, threshold: float) -> Panoptic:
        count = len(self.classes)
        areas = torch.bincount(labels.flatten() + 1, minlength=count + 1)[1:]
        sums = torch.bincount(labels.flatten() + 1, surety.flatten().double(), count + 1)[1:]
        scores = (sums / areas.clamp(min=1)).float()
        scores, order = scores.sort(descending=True, stable=True)
        kept = (areas[order] > 0) & (scores >= threshold)
        order, scores = order[kept], scores[kept]
        things = self.thing_classes(order.device)[order]
        return Panoptic.from_map(labels, order, things, numbers=order, scores=scores)

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        detections: int = 100,
        refine: bool = True,
    ) -> list[Instances]:
        """The segments of `decode_panoptic` that are no stuff."""
        segments = self.decode_panoptic(raw, placements, score_threshold=score_threshold, refine=refine)
        return [own.instances()[:detections] for own in segments]

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"backbone": [self.backbone], "neck": [self.neck], "heads": [self.coarse_head, self.point_head]}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows: dict[str, ClassRows | tuple[ClassRows, ...]] = {
            f"coarse_head.output.{kind}": ClassRows(background_last=self.background) for kind in ("weight", "bias")
        }
        for name, axes in self.point_head.class_rows().items():
            rows[f"point_head.{name}"] = tuple(
                ClassRows(axis, before=before, background_last=self.background) for axis, before in axes
            )
        return rows

    presets: ClassVar[Mapping[str, Preset]] = {
        "pointrend-semantic-r101-cityscapes": Preset(
            {
                "backbone": "resnet101", "norm": "frozen", "stride_in": "1x1", "background": False, "short": 1024,
                "long": 2048,
            },
            (Score(78.9, "mIoU", "Cityscapes val, 1024 x 2048", PointRend._STATED),),
            "19 classes",
        ),
        "pointrend-semantic-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "neck_norm": "group", "coarse_width": 64, "point_width": 128,
                "point_count": 1024, "refine_points": 2048, "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Published with crops in which no class holds more than 75 % of the pixels, and colours changed as in SSD.
        "pointrend-semantic-cityscapes": {
            "batch": 32, "lr": 0.01, "steps": 65_000, "milestones": (40 / 65, 55 / 65), "decay_biases": True,
            "short": tuple(range(512, 2049, 256)), "long": 4096,
        },
    }  # fmt: skip
