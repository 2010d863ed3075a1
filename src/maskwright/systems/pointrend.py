"""PointRend: Image Segmentation as Rendering (Kirillov, Wu, He, Girshick, CVPR 2020, arXiv 1912.08193).

A mask need not be computed on a grid. As in computer graphics, where an image is sampled more densely where it changes,
a small network predicts the mask at single points from a fine feature and a coarse prediction at the point. At test
time a coarse mask is upsampled repeatedly, and only its uncertain cells, which are along the outline, are predicted
anew. In training the points are drawn with a bias towards uncertain locations.

    boxes of Mask R-CNN -> 14 x 14 points of P2 -> coarse 7 x 7 masks
    points in a box -> fine feature of P2, coarse logits -> logit at each point
    test: 28 x 28 points -> upsampled, 784 least certain predicted -> 56 -> 112 -> 224 x 224

This is the system inside the boxes of Mask R-CNN; `pointrend_semantic` does the same on the whole image for semantic
segmentation, and `blocks.points` refines coarse masks of other systems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.box_stage import Assigned, Foreground, foreground_rows, own_deltas
from maskwright.blocks.layers import Norm
from maskwright.blocks.points import BoxRefinement, PointHead, PointOptions, PointsLike, sample_in_boxes
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.points import grid_points, uniform_points
from maskwright.options import OptionGroup
from maskwright.structures import Instances
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import BoxesLike, ProposalsLike, Raw, TwoStage
from maskwright.systems.mask_rcnn import BACKBONE, BOXES, PROPOSALS, RESIZE, MaskRCNN
from maskwright.systems.system import ClassRows

STRIDE = 4  # of the fine feature

POINT_NAMES: Mapping[str, str | None] = {  # of options in earlier versions
    "point_width": "points.width", "point_count": "points.count", "candidates": "points.candidates",
    "important": "points.important", "refine_steps": "points.steps", "refine_points": "points.per_step",
}  # fmt: skip


@dataclass(frozen=True)
class CoarseOptions(OptionGroup):
    """The coarse mask head, as options of a system.

    Attributes:
        width: Channels of the convolutions.
        fc_width: Width of the fully connected layers.
        side: Side of the coarse masks; features are sampled at twice as many points per side.
    """

    label: ClassVar[str] = "masks"

    width: int = 256
    fc_width: int = 1024
    side: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "fc_width", "side"):
            if getattr(self, name) < 1:
                raise UsageError(f"masks.{name} must be at least 1, got {getattr(self, name)}")


COARSE = CoarseOptions()
POINTS = PointOptions()


class CoarseHead(nn.Module):
    """Predicts numbers about a whole box: a coarse mask of every class, or the parameters of a network (section 4.1).

    A 2 x 2 convolution of stride 2, and fully connected layers.

    Args:
        channels: Channels of the features.
        inputs: Side of the features.
        outputs: Number of masks, or of parameters.
        side: Side of the masks; 0 for parameters.
        width: Channels of the convolutions.
        fc_width: Width of the fully connected layers.
    """

    def __init__(self, channels: int, inputs: int, outputs: int, side: int, *, width: int = 256, fc_width: int = 1024):
        super().__init__()
        self.side = side
        self.reduce = nn.Conv2d(channels, width, 1) if channels > width else None
        self.halve = nn.Conv2d(min(channels, width), min(channels, width), 2, 2)
        read = min(channels, width) * (inputs // 2) ** 2
        self.fcs = nn.ModuleList([nn.Linear(read, fc_width), nn.Linear(fc_width, fc_width)])
        self.logits = nn.Linear(fc_width, outputs * (side * side or 1))
        for layer in (self.reduce, self.halve):
            if layer is not None:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.logits.weight, std=0.001)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Float[Tensor, "r c s s"], labels: Int[Tensor, " r"] | None = None) -> Float[Tensor, "r k *t"]:
        """Computes masks (R, K, side, side), with `labels` (R, 1, side, side), or parameters (R, outputs)."""
        if self.reduce is not None:
            x = functional.relu(self.reduce(x), inplace=True)
        x = functional.relu(self.halve(x), inplace=True).flatten(1)
        for layer in self.fcs:
            x = functional.relu(layer(x), inplace=True)
        x = self.logits(x)
        if not self.side:
            return x
        x = x.unflatten(1, (-1, self.side, self.side))
        return x if labels is None else x[torch.arange(len(labels), device=labels.device), labels][:, None]


class ImplicitPoints(nn.Module):
    """Evaluates the point network of each box (Implicit PointRend, arXiv 2104.06404, section 5).

    There is no coarse mask: `CoarseHead` predicts the parameters of a network for each box. That network reads the fine
    feature and the position in the box, as random Fourier features. This module has no learned parameters of its own.

    Args:
        channels: Channels of the fine feature.
        classes: Number of classes.
        width: Channels of the hidden layers.
    """

    waves: Tensor

    def __init__(self, channels: int, classes: int, *, width: int = 256):
        super().__init__()
        self.register_buffer("waves", torch.randn(2, 128))
        inputs = [channels + 256, width, width, width]
        self.shapes = list(zip([*inputs[1:], classes], inputs, strict=True))  # of the layers' weights: out, in

    @property
    def count(self) -> int:
        """Number of parameters of a box's network."""
        return sum(out * read + out for out, read in self.shapes)

    def forward(
        self,
        fine: Float[Tensor, "r c p"],
        parameters: Float[Tensor, "r n"],
        labels: Int[Tensor, " r"],
        points: Float[Tensor, "r p 2"],
    ) -> Float[Tensor, "r 1 p"]:
        """Computes the logit of each box's label at its points, given as fractions of the box."""
        angles = 2 * math.pi * ((2 * points - 1) @ self.waves.to(points))
        x = torch.cat([angles.sin().mT.to(fine), angles.cos().mT.to(fine), fine], 1)
        # The weights of all layers come first, then the biases of all layers.
        parts = parameters.split([o * i for o, i in self.shapes] + [o for o, _ in self.shapes], 1)
        layers = [
            (weight.unflatten(1, shape), bias[..., None])
            for shape, weight, bias in zip(self.shapes, parts[:4], parts[4:], strict=True)
        ]
        for weight, bias in layers[:-1]:
            x = functional.relu(torch.baddbmm(bias, weight, x), inplace=True)
        weight, bias = layers[-1]
        rows = torch.arange(len(labels), device=labels.device)
        return weight[rows, labels][:, None] @ x + bias[rows, labels][:, None]  # of the label's own row only


@dataclass(frozen=True)
class ImplicitRefinement(BoxRefinement):
    """Refinement by the networks that `ImplicitPoints` evaluates. Points are drawn uniformly."""

    def predict(
        self, network: nn.Module, feature: Tensor, coarse: Tensor, boxes: Sequence[Tensor], labels: Tensor,
        points: Float[Tensor, "r p 2"],
    ) -> Float[Tensor, "r 1 p"]:  # fmt: skip
        return network(sample_in_boxes(feature, boxes, points, self.stride), coarse, labels, points)

    def training_points(self, coarse: Tensor, labels: Tensor) -> Float[Tensor, "r p 2"]:
        return uniform_points(len(labels), self.options.count, device=coarse.device)


class PointRend(MaskRCNN):
    """Mask R-CNN whose masks are coarse and refined at points.

    Its networks are those of `TwoStage`, `masks` (the coarse head) and `points`.
    """

    name = "pointrend"
    card = Card(
        title="PointRend",
        paper="Kirillov, Wu, He, Girshick: PointRend: Image Segmentation as Rendering. CVPR 2020",
        arxiv="1912.08193",
        code="facebookresearch/detectron2, projects/PointRend",
        code_licence="Apache-2.0",
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
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        masks: Mapping[str, Any] | CoarseOptions = COARSE,
        points: PointsLike = POINTS,
        predicted_boxes: bool | None = None,
        implicit: bool = False,
        implicit_weight: float = 1e-5,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid.
            neck_norm: Normalisation in the pyramid.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`.
            masks: The coarse head, see `CoarseOptions`.
            points: The point network and the choice of points, see `PointOptions`.
            predicted_boxes: Masks are trained in the boxes that the box head predicts, not in the proposals; None: as
                published, which is not with `implicit`.
            implicit: Predict a point network for each box instead of a coarse mask (arXiv 2104.06404), which needs much
                memory.
            implicit_weight: Weight of the loss `size`, the mean square of the predicted parameters.
        """
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=resize, neck_width=neck_width,
            neck_norm=neck_norm, proposals=proposals, boxes=boxes, masks=False,
        )  # fmt: skip
        coarse, own, count = CoarseOptions.read(masks, COARSE), PointOptions.read(points, POINTS), len(self.classes)
        self.predicted_boxes = not implicit if predicted_boxes is None else predicted_boxes
        self.implicit, self.implicit_weight, self.mask_side = implicit, implicit_weight, 2 * coarse.side
        network = ImplicitPoints(self.channels, count, width=own.width) if implicit else None
        self.masks = CoarseHead(
            self.channels, self.mask_side, network.count if network else count, 0 if network else coarse.side,
            width=coarse.width, fc_width=coarse.fc_width,
        )  # fmt: skip
        self.points = network or PointHead(self.channels, count, count, width=own.width)
        self.refinement = (ImplicitRefinement if implicit else BoxRefinement)(own, STRIDE, "grid")

    # ---- what differs from Mask R-CNN --------------------------------------------------------------------------------

    def mask_features(self, raw: Raw, boxes: Sequence[Float[Tensor, "_n 4"]]) -> Float[Tensor, "r c s s"]:
        """Samples the finest level at a regular grid of points of each box, whatever its size, without RoIAlign."""
        points = grid_points(sum(map(len, boxes)), self.mask_side, self.mask_side, raw.features[0].device)
        sampled = sample_in_boxes(raw.features[0], boxes, points, STRIDE)
        return sampled.unflatten(2, (self.mask_side, self.mask_side))

    def foreground(self, assigned: Sequence[Assigned], deltas: Float[Tensor, "r d"]) -> Foreground:
        """The foreground with the boxes predicted for the objects' own classes, as at test time. Not clipped."""
        rois = super().foreground(assigned, deltas)
        if not self.predicted_boxes:
            return rois
        shifts = own_deltas(deltas.detach().float()[foreground_rows(assigned)], rois.labels)
        boxes = box_ops.decode(torch.cat(rois.boxes), shifts, self.box_rules.weights)
        return replace(rois, boxes=list(boxes.split([len(own) for own in rois.boxes])))

    def roi_losses(
        self, raw: Raw, proposals: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        # Masks are compared at points, so polygons are rasterised first, on the whole image.
        filled = [t if t.masks is None else replace(t, masks=t.masks.pack()) for t in targets]
        return super().roi_losses(raw, proposals, filled)

    def mask_losses(
        self, raw: Raw, features: Float[Tensor, "r c s s"], rois: Foreground, targets: Sequence[Instances],
        network: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Computes `mask` of the coarse head, or `size` of the implicit networks, and `mask_point`."""
        if not self.implicit:
            return super().mask_losses(raw, features, rois, targets, network)
        assert self.masks is not None
        assert self.points is not None
        assert self.refinement is not None
        parameters = self.masks(features)
        count = global_mean_count(parameters.new_tensor(float(parameters.numel()), dtype=torch.float32))
        size = self.implicit_weight * parameters.float().square().sum() / count
        point = self.refinement.loss(
            self.points, raw.features[0], parameters, rois.boxes, rois.labels, targets, rois.owners
        )
        return {"size": size, "mask_point": point}

    def mask_probabilities(
        self, raw: Raw, features: Float[Tensor, "r c _s _s"], boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"], refine: bool = True, network: Callable[..., Tensor] | None = None,
    ) -> Float[Tensor, "r s s"]:  # fmt: skip
        if self.implicit and not refine:
            raise UsageError("refine=False requires coarse masks, which implicit PointRend does not have")
        return super().mask_probabilities(raw, features, boxes, labels, refine, network)

    # ---- for loading and training ------------------------------------------------------------------------------------

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **TwoStage.renamed_options, **POINT_NAMES,
        "mask_width": "masks.width", "mask_fc_width": "masks.fc_width", "coarse_side": "masks.side",
    }  # fmt: skip

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        if self.implicit:  # the last layer's parameters are neither adjacent nor per class only
            return TwoStage.class_rows(self)
        side = self.mask_side // 2
        masks = {f"masks.logits.{kind}": ClassRows(per_class=side**2) for kind in ("weight", "bias")}
        return {**super().class_rows(), **masks}

    _STATED: ClassVar[str] = "detectron2 projects/PointRend README"
    _COCO: ClassVar[str] = "COCO val2017, short side 800, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "pointrend-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE}, (Score(38.3, "mask AP", _COCO, _STATED),),
            "3x schedule; 1x: 36.2. Against LVIS's finer annotations 41.6 and 39.7",
        ),
        "pointrend-r101-fpn": Preset(
            {"backbone": {"name": "resnet101", **MaskRCNN._CAFFE}}, (Score(40.1, "mask AP", _COCO, _STATED),),
            "3x schedule; against LVIS's annotations 43.8",
        ),
        "pointrend-x101-fpn": Preset(
            {"backbone": MaskRCNN._X101, "resize": {"std": MaskRCNN._X101_STD}},
            (Score(41.1, "mask AP", _COCO, _STATED),), "ResNeXt-101 32x8d, 3x schedule; against LVIS's 44.7",
        ),
        "pointrend-r50-fpn-cityscapes": Preset(
            {"backbone": MaskRCNN._CAFFE, "resize": {"short": 1024, "long": 2048}},
            (Score(35.9, "mask AP", "Cityscapes val, 1024 x 2048, the Cityscapes evaluator", _STATED),),
        ),
        "implicit-pointrend-r50-fpn": Preset(
            {"backbone": MaskRCNN._CAFFE, "implicit": True, "points": {"steps": 5}},
            note="detectron2's configuration; no weights were published",
        ),
        "pointrend-small": Preset(
            {**MaskRCNN._SMALL, "masks": {"width": 128, "fc_width": 512}, "points": {"width": 128}},
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
            "which points masks are trained on (section 3.2)",
            {
                "uniform": {"points": {"candidates": 1.0, "important": 0.0}}, "mildly biased": {},
                "heavily biased": {"points": {"candidates": 10.0, "important": 1.0}},
            },
            {}, "the paper's figures could not be looked up",
            {**MaskRCNN._ABLATED, "masks": {"width": 64, "fc_width": 256}, "points": {"width": 64}},
            MaskRCNN._SCENES, MaskRCNN._TRAINED,
        ),
    }  # fmt: skip
