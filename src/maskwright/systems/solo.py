"""SOLO: Segmenting Objects by Locations (Wang, Kong, Shen, Jiang, Li, ECCV 2020, arXiv 1912.04488), and its decoupled
head (section 4.3).

There are no boxes, anchors or grouping of pixels: two objects of an image differ in the location of their centres and
in size. Each level of a feature pyramid is divided into a grid of S x S cells. The category branch predicts for each
cell the class of the object whose centre it contains; channel i * S + j of the mask branch is the mask, over the whole
image, of the object at row i, column j. Coordinates are concatenated to the input of the mask branch, because
convolutions are otherwise translation invariant (CoordConv).

Nearly all of the S^2 masks are unused. Decoupled SOLO predicts S maps for columns and S for rows instead: the mask of
row i and column j is the product of two of them.

The released code suppresses duplicates by Matrix NMS, which SOLOv2 introduced; the first paper used mask NMS
(`decode(..., nms_threshold=0.5)`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.solo_grid import PRIOR, GridBranch, Head, HeadLike, coordinates, prepare_levels, tower
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families import solo_grid
from maskwright.systems.families.solo_grid import Cells, CellsLike, GridSystem, MaskLoss, Suppression

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
CELLS = Cells()
HEAD = Head()
PREPROCESS = Preprocess(
    resample="opencv", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0, channels="RGB"
)
MASK_STRIDES = (4, 4, 8, 16, 16)  # of the masks of each level: half the strides of the prepared levels

Align = Literal["interpolate", "pool"]


@dataclass(frozen=True)
class Raw:
    """The raw output of SOLO.

    Few of the S^2 masks of a level are ever used. The input of the last convolution is therefore kept, and the network
    "masks" computes the masks of single cells from it.

    Attributes:
        classes: Class logits of the cells of each of the five levels.
        features: Features of the mask branch, of strides 4, 4, 8, 16, 16.
        size: Height and width of the input, padding included.
    """

    classes: tuple[Float[Tensor, "b k _s _s"], ...]
    features: tuple[Float[Tensor, "b c _h _w"], ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class DecoupledRaw:
    """The raw output of Decoupled SOLO.

    Attributes:
        classes: Class logits of the cells of each of the five levels.
        across: Mask logits for each column of the grid, of strides 4, 4, 8, 16, 16.
        down: Mask logits for each row.
        size: Height and width of the input, padding included.
    """

    classes: tuple[Float[Tensor, "b k _s _s"], ...]
    across: tuple[Float[Tensor, "b _s _h _w"], ...]
    down: tuple[Float[Tensor, "b _s _h _w"], ...]
    size: tuple[int, int]


# ---- networks --------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Backbone, feature pyramid, category branch and the convolutions of the mask branch (figure 6).

    Args:
        backbone: The backbone.
        classes: Number of classes.
        grids: Cells of each level.
        head: Convolutions of both branches.
        neck_width: Channels of the pyramid.
        coords: Whether the mask branch receives coordinate channels.
        align: How a level is brought to the size of its grid in the category branch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        grids: Sequence[int],
        head: Head,
        *,
        neck_width: int,
        coords: bool,
        align: Align,
    ):
        super().__init__()
        self.grids, self.coords = tuple(grids), coords
        levels = levels_of(backbone)
        self.read = levels.indices((4, 8, 16, 32))
        self.backbone = backbone
        self.neck = FPN([levels.channels[n] for n in self.read], neck_width)
        self.category = GridBranch(neck_width, head, classes, bias=PRIOR, align=align)
        self.mask_tower = tower(neck_width + 2 * coords, head)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = prepare_levels(self.neck([features[n] for n in self.read]))  # strides 8, 8, 16, 32, 32
        classes = tuple(self.category(level, grid) for level, grid in zip(levels, self.grids, strict=True))
        masks = tuple(_doubled(self.mask_tower(_placed(level, self.coords))) for level in levels)
        return Raw(classes, masks, (images.shape[-2], images.shape[-1]))


class CellMasks(nn.Module):
    """The last convolution of the mask branch, 1 x 1 with one channel for each cell, computed for some cells only.

    Args:
        channels: Channels of the features.
        grids: Cells of each level, each of which has a convolution of its own.
    """

    def __init__(self, channels: int, grids: Sequence[int]):
        super().__init__()
        self.outputs = nn.ModuleList(_mask_output(channels, grid * grid, 1) for grid in grids)

    def forward(
        self, features: Sequence[Float[Tensor, "c _h _w"]], cells: Sequence[Int[Tensor, " _n"]]
    ) -> tuple[Float[Tensor, "_n _h _w"], ...]:
        """Computes mask logits.

        Args:
            features: Features of one image, of each level.
            cells: Cells of each level, numbered row * S + column.

        Returns:
            For each level the masks of its cells.
        """
        result = []
        for layer, feature, chosen in zip(self.outputs, features, cells, strict=True):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            logits = layer.weight[chosen].flatten(1) @ feature.flatten(1) + layer.bias[chosen, None]  # (n, h w)
            result.append(logits.unflatten(1, feature.shape[1:]))
        return tuple(result)


class DecoupledDense(nn.Module):
    """The network of Decoupled SOLO: a mask branch with outputs for columns and outputs for rows (section 4.3).

    Args:
        backbone ... align: See `Dense`.
        shared_tower: Whether one tower with both coordinates serves columns and rows (the light head), instead of one
            tower with x and one with y.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        grids: Sequence[int],
        head: Head,
        *,
        neck_width: int,
        coords: bool,
        align: Align,
        shared_tower: bool,
    ):
        super().__init__()
        self.grids, self.coords, self.shared_tower = tuple(grids), coords, shared_tower
        levels = levels_of(backbone)
        self.read = levels.indices((4, 8, 16, 32))
        self.backbone = backbone
        self.neck = FPN([levels.channels[n] for n in self.read], neck_width)
        self.category = GridBranch(neck_width, head, classes, bias=PRIOR, align=align)
        if shared_tower:
            self.both = tower(neck_width + 2 * coords, head)
        else:
            self.across = tower(neck_width + coords, head)
            self.down = tower(neck_width + coords, head)
        self.across_output = nn.ModuleList(_mask_output(head.width, grid, 3) for grid in grids)
        self.down_output = nn.ModuleList(_mask_output(head.width, grid, 3) for grid in grids)

    def forward(self, images: Float[Tensor, "b c h w"]) -> DecoupledRaw:
        features = self.backbone(images)
        levels = prepare_levels(self.neck([features[n] for n in self.read]))  # strides 8, 8, 16, 32, 32
        classes = tuple(self.category(level, grid) for level, grid in zip(levels, self.grids, strict=True))
        across, down = [], []
        for level, column_output, row_output in zip(levels, self.across_output, self.down_output, strict=True):
            if self.shared_tower:
                columns = rows = _doubled(self.both(_placed(level, self.coords)))
            else:
                columns = _doubled(self.across(_placed(level, self.coords, slice(0, 1))))
                rows = _doubled(self.down(_placed(level, self.coords, slice(1, 2))))
            across.append(column_output(columns))
            down.append(row_output(rows))
        return DecoupledRaw(classes, tuple(across), tuple(down), (images.shape[-2], images.shape[-1]))


def _placed(level: Float[Tensor, "b c h w"], coords: bool, axes: slice = slice(None)) -> Float[Tensor, "b _d h w"]:
    """A level with coordinate channels appended: x, y or both."""
    return torch.cat([level, coordinates(level)[:, axes]], 1) if coords else level


def _mask_output(channels: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A convolution whose outputs have an initial probability of 0.01."""
    layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, PRIOR)  # pyright: ignore[reportArgumentType]
    return layer


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _resized(x: Float[Tensor, "n h w"], size: tuple[int, int] | None) -> Float[Tensor, "n _h _w"]:
    if size is None or x.shape[1:] == size or not len(x):
        return x if size is None else x.reshape(x.shape[0], *size)
    return functional.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


# ---- systems ---------------------------------------------------------------------------------------------------------


class MaskPerCell(GridSystem):
    """Losses and decoding of SOLO and Decoupled SOLO, whose cells have masks on the grid of their own level."""

    @abstractmethod
    def cell_masks(
        self, raw: Any, image: int, cells: Sequence[Int[Tensor, " _n"]], size: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "_n _h _w"], ...]:
        """Computes the masks of cells of one image.

        Args:
            raw: The raw output.
            image: Index of the image.
            cells: Cells of each level, numbered row * S + column.
            size: Height and width to which masks are resized bilinearly; None keeps those of each level.

        Returns:
            For each level the masks of its cells, as probabilities.
        """

    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses (section 3.3).

        Returns:
            `class`: focal loss of all cells. `mask`: loss of the masks of positive cells. Crowd regions are ignored.
        """
        grids = self.cells.grids
        logits = solo_grid.flatten_cells(raw.classes)
        objects = [solo_grid.read_objects(t, raw.size, MASK_STRIDES, logits.device, inclusive=True) for t in targets]
        assigned = [solo_grid.assign(o, raw.size, self.cells) for o in objects]
        labels = solo_grid.class_labels(objects, assigned, grids)
        terms = []
        for image, (own, levels) in enumerate(zip(objects, assigned, strict=True)):
            for level, (positives, grid, stride) in enumerate(zip(levels, grids, MASK_STRIDES, strict=True)):

                def masks_of(cells: Tensor, image: int = image, level: int = level) -> Tensor:
                    chosen = [cells if n == level else cells[:0] for n in range(len(grids))]
                    return self.cell_masks(raw, image, chosen)[level]

                # A channel belongs to one cell: if two objects are assigned to it, it is trained on the later one only.
                positives = positives.unique(grid * grid)
                terms.append(solo_grid.mask_loss_sum(masks_of, positives, own.planes[stride], self.mask_loss))
        count = global_mean_count((labels >= 0).sum())
        return {
            "class": solo_grid.class_loss(logits, labels),
            "mask": self.mask_weight * torch.stack(terms).sum() / count,
        }

    @torch.no_grad()
    def decode(
        self,
        raw: Any,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float | None = None,
        detections: int = 100,
        candidate_threshold: float = 0.1,
        kernel: Literal["gaussian", "linear"] = "gaussian",
        nms_sigma: float = 2.0,
        mask_threshold: float = 0.5,
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
            kernel: Kernel of Matrix NMS.
            nms_sigma: Parameter of the Gaussian kernel.
            mask_threshold: Probability above which a pixel belongs to a mask.
        """
        suppression = Suppression(
            score_threshold, min(candidate_threshold, 2 * score_threshold), nms_threshold, kernel, nms_sigma,
            detections=detections,
        )  # fmt: skip
        plane, grids = (raw.size[0] // 4, raw.size[1] // 4), self.cells.grids

        def masks_of(image: int, cells: Tensor) -> Tensor:
            return torch.cat(self.cell_masks(raw, image, solo_grid.split_by_level(cells, grids), plane))

        return solo_grid.decode_cells(
            raw.classes, grids, masks_of, plane, placements, raw.size, suppression, mask_threshold
        )


class SOLO(MaskPerCell):
    """SOLO; see the docstring of the module."""

    name = "solo"
    card = Card(
        title="SOLO",
        paper="Wang, Kong, Shen, Jiang, Li: SOLO: Segmenting Objects by Locations. ECCV 2020",
        arxiv="1912.04488",
        code="WXinlong/SOLO",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **{f"{name}.": f"dense.{name}." for name in ("backbone", "neck", "category")},
        "masks.": "dense.mask_tower.", "mask_output.": "masks.outputs.",
    }  # fmt: skip

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        cells: CellsLike = CELLS,
        head: HeadLike = HEAD,
        coordinates: bool = True,
        align: Align = "interpolate",
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
    ):
        """
        Args:
            classes: Class names.
            backbone: The backbone. Published weights have `norm` "still" and `frozen` 2.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input.
            neck_width: Channels of the pyramid.
            cells: The grids, and the objects that their cells are trained on.
            head: Convolutions of both branches (figure 6).
            coordinates: Whether the mask branch receives coordinate channels (table 3).
            align: How a level is brought to the size of its grid in the category branch (section 3.2).
            mask_loss: Loss of a mask (table 4).
            mask_weight: Weight of the mask loss.
        """
        spec, cells, head = Backbone.read(backbone, BACKBONE), Cells.read(cells, CELLS), Head.read(head, HEAD)
        preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        super().__init__(classes, cells, mask_loss, mask_weight, preprocess)
        self.dense = Dense(
            spec.build(in_channels), len(self.classes), cells.grids, head, neck_width=neck_width, coords=coordinates,
            align=align,
        )  # fmt: skip
        self.masks = CellMasks(head.width, cells.grids)

    def cell_masks(
        self, raw: Raw, image: int, cells: Sequence[Int[Tensor, " _n"]], size: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "_n _h _w"], ...]:
        logits = self.masks([feature[image] for feature in raw.features], cells)
        return tuple(_resized(own.float().sigmoid(), size) for own in logits)

    # ---- presets -------------------------------------------------------------------------------------------------

    _COCO = "COCO val2017, short side 800, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "solo-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "still", "frozen": 2}},
            (Score(35.8, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 32.9",
        ),
        "solo-r101": Preset(
            {"backbone": {"name": "resnet101", "norm": "still", "frozen": 2}},
            (Score(37.1, "mask AP", _COCO, _README),), "36 epochs",
        ),
        "solo-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head": {"width": 128, "convs": 4},
                "cells": {
                    "grids": (12, 10, 8, 6, 4), "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
                },
                "resize": {"short": 320, "long": 512},
            },
            # The channel of a cell is trained only on objects whose centres it contains: few images need few cells.
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _RECIPE: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "decay_norms": True, "decay_biases": True, "clip": 35.0, "warmup": 500, "warmup_from": 1 / 3,
    }  # fmt: skip
    _LONG: ClassVar[dict[str, Any]] = {"epochs": 36, "milestones": (27 / 36, 33 / 36)}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "solo-1x": {**_RECIPE, "epochs": 12, "milestones": (9 / 12, 11 / 12), "short": (800,), "long": 1333},
        "solo-3x": {**_RECIPE, **_LONG, "short": tuple(range(640, 801, 32)), "long": 1333},
        "solo-light-3x": {**_RECIPE, **_LONG, "short": tuple(range(352, 513, 32)), "long": 852},
    }


class DecoupledSOLO(MaskPerCell):
    """SOLO with a map for each column and each row of the grid in place of one for each cell (section 4.3).

    The recipes of SOLO apply.
    """

    name = "decoupled-solo"
    card = Card(
        title="Decoupled SOLO",
        paper="Wang, Kong, Shen, Jiang, Li: SOLO: Segmenting Objects by Locations. ECCV 2020, section 4.3",
        arxiv="1912.04488",
        code="WXinlong/SOLO",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{name}.": f"dense.{name}."
        for name in ("backbone", "neck", "category", "both", "across", "down", "across_output", "down_output")
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        cells: CellsLike = CELLS,
        head: HeadLike = HEAD,
        coordinates: bool = True,
        align: Align = "interpolate",
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
        shared_tower: bool = False,
    ):
        """
        Args:
            classes ... mask_weight: As in `SOLO`.
            shared_tower: The light head: one tower with both coordinates serves columns and rows.
        """
        spec, cells, head = Backbone.read(backbone, BACKBONE), Cells.read(cells, CELLS), Head.read(head, HEAD)
        preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        super().__init__(classes, cells, mask_loss, mask_weight, preprocess)
        self.dense = DecoupledDense(
            spec.build(in_channels), len(self.classes), cells.grids, head, neck_width=neck_width, coords=coordinates,
            align=align, shared_tower=shared_tower,
        )  # fmt: skip

    def cell_masks(
        self, raw: DecoupledRaw, image: int, cells: Sequence[Int[Tensor, " _n"]], size: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "_n _h _w"], ...]:
        result = []
        for across, down, own, grid in zip(raw.across, raw.down, cells, self.cells.grids, strict=True):
            columns, rows = across[image][own % grid], down[image][own // grid]
            # Each factor is resized separately, as in the original; this differs from resizing the product.
            result.append(_resized(columns.float().sigmoid(), size) * _resized(rows.float().sigmoid(), size))
        return tuple(result)

    # ---- presets -------------------------------------------------------------------------------------------------

    _LIGHT: ClassVar[dict[str, Any]] = {
        "shared_tower": True, "resize": {"short": 512, "long": 852},
        "cells": {"ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))},
    }  # fmt: skip
    _COCO = "COCO val2017, short side 800, pycocotools"
    _LOW = "COCO val2017, short side 512, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "decoupled-solo-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "still", "frozen": 2}},
            (Score(36.4, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 33.9",
        ),
        "decoupled-solo-r101": Preset(
            {"backbone": {"name": "resnet101", "norm": "still", "frozen": 2}},
            (Score(37.9, "mask AP", _COCO, _README),), "36 epochs",
        ),
        "decoupled-solo-light-r50": Preset(
            {**_LIGHT, "backbone": {"name": "resnet50", "norm": "still", "frozen": 2}, "head": {"convs": 4}},
            (Score(33.0, "mask AP", _LOW, _README),), "36 epochs",
        ),
        "decoupled-solo-light-dcn-r50": Preset(
            {
                **_LIGHT, "head": {"convs": 4, "deform": "last"},
                "backbone": {"name": "resnet50", "norm": "still", "frozen": 2, "deform_stages": (1, 2, 3)},
            },
            (Score(35.0, "mask AP", _LOW, _README),), "36 epochs",
        ),
        "decoupled-solo-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head": {"width": 128, "convs": 4}, "shared_tower": True,
                "cells": {
                    "grids": (24, 20, 16, 12, 8), "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
                },
                "resize": {"short": 320, "long": 512},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
