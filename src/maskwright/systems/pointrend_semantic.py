"""PointRend for semantic segmentation (Kirillov, Wu, He, Girshick, CVPR 2020, arXiv 1912.08193, section 4.2).

The head of Panoptic FPN predicts coarse logits of every class at stride 4. At test time these are upsampled twice, and
after each step the least certain points are predicted anew by a small network that reads the fine feature and the
coarse logits at the point. See `pointrend` for the method and for instance segmentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.points import PointHead, PointOptions, PointsLike
from maskwright.blocks.semantic import VOID, SemanticFPN, label_maps, semantic_loss
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import label_target
from maskwright.ops.planes import label_plane
from maskwright.ops.points import class_uncertainty, point_sample, subdivide, uncertain_points
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Preset, Score
from maskwright.systems.families.two_stage import PREPROCESS
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.mask_rcnn import BACKBONE, RESIZE
from maskwright.systems.pointrend import POINT_NAMES, PointRend
from maskwright.systems.system import ClassRows, at_least

POINTS = PointOptions(count=2048, steps=2, per_step=8192)


@dataclass(frozen=True)
class Raw:
    """The output of the dense network.

    Attributes:
        feature: The fine feature, at stride 4.
        coarse: Coarse logits of each class, at stride 4.
        size: Height and width of the input, padding included.
    """

    feature: Float[Tensor, "b c h w"]
    coarse: Float[Tensor, "b k h w"]
    size: tuple[int, int]


class SemanticNetwork(nn.Module):
    """Backbone, pyramid and coarse head (Panoptic FPN's)."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, coarse: nn.Module):
        super().__init__()
        self.backbone, self.neck, self.coarse = backbone, neck, coarse

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        pyramid = self.neck(self.backbone(images))
        return Raw(pyramid[0], self.coarse(pyramid), (images.shape[-2], images.shape[-1]))


class PointRendSemantic(PanopticSystem):
    """Semantic segmentation: one region per class.

    `decode_semantic` gives the label of each pixel, `decode` and `decode_panoptic` the regions. Its networks are
    `dense` and `points`.
    """

    name = "pointrend-semantic"
    card = PointRend.card

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        background: bool = True,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "none",
        coarse_width: int = 128,
        points: PointsLike = POINTS,
    ):
        """
        Args:
            classes: Names of the classes.
            stuff: Those of `classes` that are regions. Objects of the other classes are one region per class too.
            background: Pixels that no annotation covers have a class of their own. Otherwise (as published) the losses
                ignore them, and every pixel is assigned to a class.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            coarse_width: Channels of the coarse head.
            points: The point network and the choice of points of each image, see `PointOptions`.
        """
        super().__init__()
        at_least(self.name, 1, neck_width=neck_width, coarse_width=coarse_width)
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.background = background
        outputs = len(self.classes) + background
        if outputs < 2:
            raise UsageError(f"{self.name} with one class requires background=True")
        spec = Backbone.read(backbone, BACKBONE)
        body = spec.build(in_channels)
        neck = FPN(levels_of(body).channels, neck_width, norm=neck_norm)
        self.dense = SemanticNetwork(body, neck, SemanticFPN(neck_width, outputs, width=coarse_width))
        self.point_options = PointOptions.read(points, POINTS)
        self.points = PointHead(neck_width, outputs, outputs, width=self.point_options.width, each=False)
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS["detectron2"], in_channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def predict_points(self, raw: Raw, points: Float[Tensor, "b p 2"]) -> Float[Tensor, "b k p"]:
        """Logits at points of the input, padding included."""
        return self.points(point_sample(raw.feature, points), point_sample(raw.coarse, points))

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `coarse`, over all pixels, and `point`, over the sampled points.

        Where objects overlap, the smaller one is on top. Crowd regions are ignored.
        """
        none = len(self.classes) if self.background else VOID
        planes = [
            torch.full(target.image_size, none)
            if target.masks is None
            else label_target(target.masks, target.labels, background=none, crowd=target.crowd, void=VOID)
            for target in targets
        ]
        truth, options = label_maps(planes, raw.size, raw.coarse.device), self.point_options
        points = uncertain_points(
            raw.coarse.detach().float(), options.count, class_uncertainty,
            candidates=options.candidates, important=options.important,
        )  # fmt: skip
        return {"coarse": semantic_loss(raw.coarse, truth), "point": self.point_loss(raw, points, truth)}

    def point_loss(self, raw: Raw, points: Float[Tensor, "b p 2"], truth: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
        """Cross entropy at points, averaged over those whose nearest pixel is not VOID."""
        logits = self.predict_points(raw, points).float()
        x, y = (points * points.new_tensor([truth.shape[2], truth.shape[1]])).floor().long().unbind(-1)
        x, y = x.clamp(0, truth.shape[2] - 1), y.clamp(0, truth.shape[1] - 1)
        labels = truth.flatten(1).gather(1, y * truth.shape[2] + x)
        count = global_mean_count((labels != VOID).sum())
        return functional.cross_entropy(logits, labels, ignore_index=VOID, reduction="sum") / count

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refined(self, raw: Raw, refine: bool = True) -> Float[Tensor, "b k _h _w"]:
        """Logits after refinement; as published the grid is four times as fine as the coarse one."""
        options = self.point_options
        return subdivide(
            raw.coarse.float(), lambda points: self.predict_points(raw, points).float(), class_uncertainty,
            steps=options.steps if refine else 0, points=options.per_step,
        )  # fmt: skip

    @torch.no_grad()
    def decode_semantic(
        self, raw: Raw, placements: Sequence[Placement], *, refine: bool = True
    ) -> list[Int[Tensor, "_h _w"]]:
        return [labels for labels, _ in self._labels(raw, placements, refine)]

    def _labels(self, raw: Raw, placements: Sequence[Placement], refine: bool) -> list[tuple[Tensor, Tensor]]:
        """Label (-1: background) and probability of each pixel, one image after the other."""
        result = []
        for row, placement in enumerate(placements):
            one = Raw(raw.feature[row : row + 1], raw.coarse[row : row + 1], raw.size)
            labels, probability = label_plane(self.refined(one, refine)[0], placement, raw.size)
            result.append((labels.masked_fill(labels == len(self.classes), -1), probability))
        return result

    @torch.no_grad()
    def decode_panoptic(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, refine: bool = True
    ) -> list[Panoptic]:
        """One segment per class that occurs, best first; its score is the mean probability of its pixels."""
        return [self._segments(*own, score_threshold) for own in self._labels(raw, placements, refine)]

    def _segments(self, labels: Tensor, probability: Tensor, threshold: float) -> Panoptic:
        """The regions of a label map."""
        count = len(self.classes)
        areas = torch.bincount(labels.flatten() + 1, minlength=count + 1)[1:]
        sums = torch.bincount(labels.flatten() + 1, probability.flatten().double(), count + 1)[1:]
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
        """The segments of `decode_panoptic` that are not stuff."""
        segments = self.decode_panoptic(raw, placements, score_threshold=score_threshold, refine=refine)
        return [own.instances()[:detections] for own in segments]

    # ---- for loading and training ------------------------------------------------------------------------------------

    renamed_options: ClassVar[Mapping[str, str | None]] = POINT_NAMES
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        "backbone.": "dense.backbone.", "neck.": "dense.neck.", "coarse_head.": "dense.coarse.",
        "point_head.": "points.",
    }  # fmt: skip

    def groups(self) -> dict[str, list[nn.Module]]:
        dense = self.dense
        return {"backbone": [dense.backbone], "neck": [dense.neck], "heads": [dense.coarse, self.points]}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows: dict[str, ClassRows | tuple[ClassRows, ...]] = {
            f"dense.coarse.output.{kind}": ClassRows(background_last=self.background) for kind in ("weight", "bias")
        }
        for name, axes in self.points.class_rows().items():
            rows[f"points.{name}"] = tuple(
                ClassRows(axis, before=before, background_last=self.background) for axis, before in axes
            )
        return rows

    presets: ClassVar[Mapping[str, Preset]] = {
        "pointrend-semantic-r101-cityscapes": Preset(
            {
                "backbone": {"name": "resnet101", "norm": "frozen", "stride_in": "1x1"}, "background": False,
                "resize": {"short": 1024, "long": 2048},
            },
            (Score(78.9, "mIoU", "Cityscapes val, 1024 x 2048", PointRend._STATED),),
            "19 classes",
        ),
        "pointrend-semantic-small": Preset(
            {
                "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
                "neck_width": 128, "neck_norm": "group", "coarse_width": 64,
                "points": {"width": 128, "count": 1024, "per_step": 2048},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Published with crops in which no class covers more than 75 % of the pixels, and SSD's colour augmentation.
        "pointrend-semantic-cityscapes": {
            "batch": 32, "lr": 0.01, "steps": 65_000, "milestones": (40 / 65, 55 / 65), "decay_biases": True,
            "short": tuple(range(512, 2049, 256)), "long": 4096,
        },
    }  # fmt: skip
