"""SOLOv2: Dynamic and Fast Instance Segmentation (Wang, Zhang, Kong, Li, Shen, NeurIPS 2020, arXiv 2003.10152).

The mask branch of SOLO is a convolution with one output for each cell of a grid, few of which are ever used. SOLOv2
predicts the convolution itself: each cell predicts a *kernel*, a vector of 256 numbers, and one *mask feature* of
stride 4, fused from the pyramid, serves all cells. The mask of an object is the kernel of its cell applied to that
feature. The assignment of objects to cells and the category branch are those of SOLO. Matrix NMS lowers the scores of
all duplicates at once instead of removing them one after the other.

There are two official implementations, a fork of MMDetection's first version and AdelaiDet; `RULES` holds their
differences beyond the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.points import PlaneRefinement, PointHead
from maskwright.blocks.solo_grid import PRIOR, GridBranch, Head, HeadLike, conv_norm, coordinates, prepare_levels
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.points import mask_sample
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families import solo_grid
from maskwright.systems.families.solo_grid import Cells, CellsLike, GridSystem, MaskLoss, Suppression

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
CELLS = Cells()
HEAD = Head(width=512, convs=4)


@dataclass(frozen=True)
class Rules:
    """The conventions of a published implementation.

    Attributes:
        preprocess: From an image to the network's input.
        inclusive: Whether boxes, whose sizes decide the levels, include their last pixel.
    """

    preprocess: Preprocess
    inclusive: bool


RULES = {
    "mmdet": Rules(
        Preprocess(
            resample="opencv", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0, channels="RGB"
        ),
        inclusive=True,
    ),
    "adelaidet": Rules(
        Preprocess(
            resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
        ),
        inclusive=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """The raw output.

    Attributes:
        classes: Class logits of the cells of each of the five levels.
        kernels: Kernel of each cell: d = e values, or 9 e for kernels of 3 x 3.
        feature: The mask feature, of stride 4.
        size: Height and width of the input, padding included.
    """

    classes: tuple[Float[Tensor, "b k _s _s"], ...]
    kernels: tuple[Float[Tensor, "b d _s _s"], ...]
    feature: Float[Tensor, "b e h w"]
    size: tuple[int, int]


# ---- networks --------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Backbone, feature pyramid, category branch, kernel branch and mask feature branch.

    Args:
        backbone: The backbone.
        classes: Number of classes.
        grids: Cells of each level.
        head: Convolutions of the category and the kernel branch.
        neck_width: Channels of the pyramid.
        mask_width: Channels inside the mask feature branch.
        mask_channels: Channels of the mask feature.
        kernel_size: Size of the dynamic convolution.
        coords: Whether the kernel branch and the mask feature branch receive coordinate channels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        grids: Sequence[int],
        head: Head,
        *,
        neck_width: int,
        mask_width: int,
        mask_channels: int,
        kernel_size: int,
        coords: bool,
    ):
        super().__init__()
        self.grids, self.coords = tuple(grids), coords
        levels = levels_of(backbone)
        self.read = levels.indices((4, 8, 16, 32))
        self.backbone = backbone
        self.neck = FPN([levels.channels[n] for n in self.read], neck_width)
        self.category = GridBranch(neck_width, head, classes, bias=PRIOR)
        self.kernel = GridBranch(neck_width + 2 * coords, head, mask_channels * kernel_size**2)
        self.mask_feature = MaskFeature(neck_width, mask_width, mask_channels, head, coords=coords)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        pyramid = self.neck([features[n] for n in self.read])  # P2 ... P6
        classes, kernels = [], []
        for level, grid in zip(prepare_levels(pyramid), self.grids, strict=True):
            # Coordinates are concatenated first and resized to the grid with the features.
            placed = torch.cat([level, coordinates(level)], 1) if self.coords else level
            kernels.append(self.kernel(placed, grid))
            classes.append(self.category(level, grid))
        feature = self.mask_feature(pyramid[:4])
        return Raw(tuple(classes), tuple(kernels), feature, (images.shape[-2], images.shape[-1]))


class MaskFeature(nn.Module):
    """Fuses P2 ... P5 into one feature map of stride 4 (figure 3b).

    Each level is upsampled by two until it has the size of P2, with a convolution before each step; the levels are then
    summed. The coarsest level receives coordinate channels.
    """

    def __init__(self, channels_in: int, width: int, outputs: int, head: Head, *, coords: bool):
        super().__init__()
        self.coords = coords
        deformable, modulated = head.deform == "all", head.modulated
        self.levels = nn.ModuleList()
        for number in range(4):
            convs = []
            for step in range(max(1, number)):
                extra = 2 if number == 3 and coords else 0
                read = width if step else channels_in + extra
                convs.append(conv_norm(read, width, 3, deformable, modulated))
            self.levels.append(nn.ModuleList(convs))
        self.output = conv_norm(width, outputs, 1, deformable, modulated)  # ends in a ReLU too

    def forward(self, levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b e h w"]:
        total: Any = 0
        for number, (x, convs) in enumerate(zip(levels, self.levels, strict=True)):
            if number == 3 and self.coords:
                x = torch.cat([x, coordinates(x)], 1)
            for conv in convs:  # pyright: ignore[reportGeneralTypeIssues]
                x = conv(x)
                if number:
                    x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            total = x + total
        return self.output(total)


# ---- system ----------------------------------------------------------------------------------------------------------


def _mmdet(name: str, **options: Any) -> dict[str, Any]:
    """The backbone of weights that the fork of MMDetection published."""
    return {"name": name, "norm": "still", "frozen": 2, **options}


def _adelaidet(name: str) -> dict[str, Any]:
    """The backbone of weights that AdelaiDet published."""
    return {"name": name, "norm": "frozen", "frozen": 2, "stride_in": "1x1"}


class SOLOv2(GridSystem):
    """SOLOv2; see the docstring of the module."""

    name = "solov2"
    card = Card(
        title="SOLOv2",
        paper="Wang, Zhang, Kong, Li, Shen: SOLOv2: Dynamic and Fast Instance Segmentation. NeurIPS 2020",
        arxiv="2003.10152",
        code="WXinlong/SOLO; aim-uofa/AdelaiDet",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors (both)",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **{f"{name}.": f"dense.{name}." for name in ("backbone", "neck", "category", "kernel", "mask_feature")},
        "points.head.": "points.",
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        rules: Literal["mmdet", "adelaidet"] = "mmdet",
        neck_width: int = 256,
        cells: CellsLike = CELLS,
        head: HeadLike = HEAD,
        mask_width: int = 128,
        mask_channels: int = 256,
        kernel_size: Literal[1, 3] = 1,
        coordinates: bool = True,
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
        points: bool = False,
    ):
        """
        Args:
            classes: Class names.
            backbone: The backbone. Published weights have `norm` "still" (mmdet) or "frozen" (adelaidet), and `frozen`
                2.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input.
            rules: The implementation whose conventions apply, see `RULES`.
            neck_width: Channels of the pyramid.
            cells: The grids, and the objects that their cells are trained on.
            head: Convolutions of the kernel and the category branch. If all are deformable, so are those of the mask
                feature branch.
            mask_width: Channels inside the mask feature branch.
            mask_channels: Channels of the mask feature.
            kernel_size: Size of the dynamic convolution (table 5a).
            coordinates: Whether the kernel branch and the mask feature branch receive coordinate channels (table 5b).
            mask_loss: Loss of a mask; "focal" and "bce" as in SOLO.
            mask_weight: Weight of the mask loss.
            points: Whether masks are refined at single points of the mask feature, from stride 4 to the resolution of
                the input (PointRend, arXiv 1912.08193).
        """
        spec, cells, head = Backbone.read(backbone, BACKBONE), Cells.read(cells, CELLS), Head.read(head, HEAD)
        preprocess = Resize.read(resize, RESIZE).apply(RULES[rules].preprocess, in_channels)
        super().__init__(classes, cells, mask_loss, mask_weight, preprocess)
        self.rules, self.kernel_size = RULES[rules], kernel_size
        self.dense = Dense(
            spec.build(in_channels), len(self.classes), cells.grids, head, neck_width=neck_width,
            mask_width=mask_width, mask_channels=mask_channels, kernel_size=kernel_size, coords=coordinates,
        )  # fmt: skip
        self.points = PointHead(mask_channels, 1, 1, width=mask_width) if points else None
        self.refinement = PlaneRefinement()

    def mask_logits(self, feature: Float[Tensor, "e h w"], kernels: Float[Tensor, "n d"]) -> Float[Tensor, "n h w"]:
        """Applies kernels to the mask feature of one image: the dynamic convolution."""
        if self.kernel_size == 1:
            return (kernels @ feature.flatten(1)).unflatten(1, feature.shape[1:]).float()
        if not len(kernels):
            return feature.new_zeros(0, *feature.shape[1:], dtype=torch.float32)
        return functional.conv2d(feature[None], kernels.unflatten(1, (-1, 3, 3)), padding=1)[0].float()

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses.

        Returns:
            `class`: focal loss of all cells. `mask`: loss of all pairs of an object and a cell that is positive for
            it. `point`, with `points`: binary cross entropy of the refined points. Crowd regions are ignored.
        """
        logits, kernels = solo_grid.flatten_cells(raw.classes), solo_grid.flatten_cells(raw.kernels)
        grids, inclusive = self.cells.grids, self.rules.inclusive
        objects = [solo_grid.read_objects(t, raw.size, (4,), logits.device, inclusive=inclusive) for t in targets]
        assigned = [solo_grid.assign(o, raw.size, self.cells) for o in objects]
        labels = solo_grid.class_labels(objects, assigned, grids)
        terms, refined, (count, count_refined) = [], [], torch.zeros(2, device=logits.device)
        for image, (own, levels) in enumerate(zip(objects, assigned, strict=True)):

            def masks_of(cells: Tensor, image: int = image) -> Tensor:
                return self.mask_logits(raw.feature[image], kernels[image][cells]).sigmoid()

            # Unlike in SOLO, a cell to which two objects are assigned is trained on both masks, but on one class.
            positives = solo_grid.join_levels(levels, grids)
            terms.append(solo_grid.mask_loss_sum(masks_of, positives, own.planes[4], self.mask_loss))
            count = count + len(positives.cells)
            if self.points is not None:
                refined.append(self._point_loss(raw, kernels, image, positives, targets[image]))
                count_refined = count_refined + len(positives.owners.unique())
        # Without objects the mask branch has a gradient all the same, which is zero.
        idle = (raw.feature.float().sum() + kernels.float().sum()) * 0
        losses = {
            "class": solo_grid.class_loss(logits, labels),
            "mask": self.mask_weight * torch.stack(terms).sum() / global_mean_count(count) + idle,
        }
        return losses | ({"point": torch.stack(refined).sum() / global_mean_count(count_refined)} if refined else {})

    def _point_loss(
        self, raw: Raw, kernels: Tensor, image: int, positives: solo_grid.Positives, target: Instances
    ) -> Tensor:
        """Sum of the point loss over one image's objects, each represented by the first of its cells."""
        assert self.points is not None
        target = target if target.crowd is None else target[~target.crowd]
        owners, row = positives.owners.unique(return_inverse=True)
        place = torch.arange(len(row), device=row.device)
        first = torch.full_like(owners, len(row)).scatter_reduce(0, row, place, "amin")
        extent = raw.feature.new_tensor([raw.size[1], raw.size[0]], dtype=torch.float32)

        def truth(points: Tensor) -> Tensor:
            masks = target.masks if target.masks is not None else Masks.empty(target.image_size)
            return mask_sample(masks, points * extent, owners)

        coarse = self.mask_logits(raw.feature[image], kernels[image][positives.cells[first]])
        return self.refinement.loss_sum(self.points, raw.feature[image : image + 1], coarse, truth)

    # ---- decoding ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float | None = None,
        detections: int = 100,
        candidate_threshold: float = 0.1,
        kernel: Literal["gaussian", "linear"] = "gaussian",
        nms_sigma: float = 2.0,
        mask_threshold: float = 0.5,
        refine: bool = True,
    ) -> list[Instances]:
        """Converts the raw output to objects.

        Args:
            raw: The raw output.
            placements: How each image was placed in the network's input.
            score_threshold: Lowest score of an object.
            nms_threshold: Mask IoU above which the object of lower score is removed within a class; None for Matrix
                NMS.
            detections: Maximum number of objects of an image.
            candidate_threshold: Lowest score of a cell whose mask is computed; at most 2 `score_threshold`.
            kernel: Kernel of Matrix NMS (section 3.3).
            nms_sigma: Parameter of the Gaussian kernel.
            mask_threshold: Probability above which a pixel belongs to a mask.
            refine: Whether masks are refined at points, if the system has `points`.
        """
        suppression = Suppression(
            score_threshold, min(candidate_threshold, 2 * score_threshold), nms_threshold, kernel, nms_sigma,
            detections=detections,
        )  # fmt: skip
        kernels, plane = solo_grid.flatten_cells(raw.kernels), (raw.feature.shape[2], raw.feature.shape[3])

        def masks_of(image: int, cells: Tensor) -> Tensor:
            return self.mask_logits(raw.feature[image], kernels[image][cells]).sigmoid()

        def finer(image: int, masks: Tensor) -> Tensor:
            assert self.points is not None
            return self.refinement.refine(self.points, raw.feature[image : image + 1], masks.logit(1e-6)).sigmoid()

        return solo_grid.decode_cells(
            raw.classes, self.cells.grids, masks_of, plane, placements, raw.size, suppression, mask_threshold,
            finer if refine and self.points is not None else None,
        )  # fmt: skip

    # ---- presets -------------------------------------------------------------------------------------------------

    _DCN: ClassVar[dict[str, Any]] = {"deform_stages": (1, 2, 3), "deform_modulated": True}
    _DCN_HEAD: ClassVar[dict[str, Any]] = {"width": 512, "convs": 4, "deform": "all", "modulated": True}
    _LIGHT: ClassVar[dict[str, Any]] = {
        "head": {"width": 256, "convs": 2}, "mask_channels": 128, "resize": {"short": 448, "long": 768},
        "cells": {"ranges": ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896))},
    }  # fmt: skip
    _COCO = "COCO val2017, short side 800, pycocotools"
    _LOW = "COCO val2017, short side 448, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "solov2-r50": Preset(
            {"backbone": _mmdet("resnet50")}, (Score(37.5, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 34.8"
        ),
        "solov2-r101": Preset(
            {"backbone": _mmdet("resnet101")}, (Score(39.1, "mask AP", _COCO, _README),), "36 epochs"
        ),
        "solov2-r101-dcn": Preset(
            {"backbone": _mmdet("resnet101", **_DCN), "head": _DCN_HEAD}, (Score(41.4, "mask AP", _COCO, _README),),
            "36 epochs; deformable convolutions in backbone and heads",
        ),
        "solov2-x101-dcn": Preset(
            {"backbone": _mmdet("resnet101", groups=64, group_width=4, **_DCN), "head": _DCN_HEAD},
            (Score(42.4, "mask AP", _COCO, _README),), "36 epochs; ResNeXt-101 64x4d",
        ),
        "solov2-light-448-r18": Preset(
            {**_LIGHT, "backbone": _mmdet("resnet18")}, (Score(29.6, "mask AP", _LOW, _README),), "36 epochs"
        ),
        "solov2-light-448-r34": Preset(
            {**_LIGHT, "backbone": _mmdet("resnet34")}, (Score(32.0, "mask AP", _LOW, _README),), "36 epochs"
        ),
        "solov2-light-448-r50": Preset(
            {**_LIGHT, "backbone": _mmdet("resnet50")}, (Score(33.7, "mask AP", _LOW, _README),), "36 epochs"
        ),
        "solov2-light-512-dcn-r50": Preset(
            {
                "backbone": _mmdet("resnet50", deform_stages=(1, 2, 3)),
                "head": {"width": 256, "convs": 3, "deform": "last"}, "mask_channels": 128,
                "cells": {"ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))},
                "resize": {"short": 512, "long": 852},
            },
            (Score(36.4, "mask AP", "COCO val2017, short side 512, pycocotools", _README),), "36 epochs",
        ),
        "solov2-r50-adelaidet": Preset(
            {"backbone": _adelaidet("resnet50"), "rules": "adelaidet"},
            (Score(37.6, "mask AP", _COCO, "AdelaiDet README"),), "270k steps of 16 images",
        ),
        "solov2-r101-adelaidet": Preset(
            {"backbone": _adelaidet("resnet101"), "rules": "adelaidet"},
            (Score(39.0, "mask AP", _COCO, "AdelaiDet README"),), "270k steps of 16 images",
        ),
        "solov2-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head": {"width": 128, "convs": 2}, "mask_width": 64,
                "mask_channels": 64, "resize": {"short": 320, "long": 512},
                "cells": {
                    "grids": (24, 20, 16, 12, 8),
                    "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
                },
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _RECIPE: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "decay_norms": True, "decay_biases": True, "clip": 35.0, "warmup": 500, "warmup_from": 0.01,
    }  # fmt: skip
    _LONG: ClassVar[dict[str, Any]] = {"epochs": 36, "milestones": (27 / 36, 33 / 36)}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "solov2-1x": {**_RECIPE, "epochs": 12, "milestones": (9 / 12, 11 / 12), "short": (800,), "long": 1333},
        "solov2-3x": {**_RECIPE, **_LONG, "short": tuple(range(640, 801, 32)), "long": 1333},
        "solov2-light-448-3x": {**_RECIPE, **_LONG, "short": tuple(range(352, 513, 32)), "long": 768},
        "solov2-light-512-3x": {**_RECIPE, **_LONG, "short": tuple(range(352, 513, 32)), "long": 852},
        "solov2-adelaidet-3x": {
            "lr": 0.01, "decay_biases": True, "warmup": 1000, "warmup_from": 0.01, "steps": 270_000,
            "milestones": (210 / 270, 250 / 270), "short": tuple(range(640, 801, 32)), "long": 1333,
        },
    }  # fmt: skip
