"""SOLO: Segmenting Objects by Locations (Wang, Kong, Shen, Jiang, Li, ECCV 2020, arXiv 1912.04488), and its decoupled
head (section 4.3).

No boxes, no anchors, no pixels to be grouped: two objects differ in where their centres are and how large they are.
Each level of a feature pyramid is looked at as a grid of S x S cells. The category branch says for each cell what
object has its centre there; channel i * S + j of the mask branch is the mask, over the whole image, of the object at
row i, column j. So that a convolution knows where it is, coordinates are appended to its input (CoordConv).

S^2 masks are many and nearly all are of nothing. Decoupled SOLO has S maps for columns and S for rows instead: the mask
of row i and column j is the product of two of them.

The released code suppresses duplicates by Matrix NMS, which SOLOv2 introduced; the first paper used plain mask NMS
(`decode(..., nms_threshold=0.5)`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import solo_grid as grid_ops
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.solo_grid import GRIDS, PRIOR, RANGES, Deform, GridBranch, MaskLoss, tower
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System

PREPROCESS = Preprocess(
    resample="opencv", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0, channels="RGB"
)
MASK_STRIDES = (4, 4, 8, 16, 16)  # of the mask branch's levels, twice as fine as what they are made from


@dataclass(frozen=True)
class Raw:
    """What the network says of every cell. Masks are not there yet: of S^2 maps hardly any is ever asked for, so what
    the last convolution reads is kept, and the maps of single cells are made from it (`SOLO.masks_of`)."""

    classes: tuple[Float[Tensor, "b k _s _s"], ...]  # logits, of five levels
    features: tuple[Float[Tensor, "b c _h _w"], ...]  # strides 4, 4, 8, 16, 16
    size: tuple[int, int]  # H, W of the input, padding included


@dataclass(frozen=True)
class DecoupledRaw:
    """The same of Decoupled SOLO."""

    classes: tuple[Float[Tensor, "b k _s _s"], ...]
    across: tuple[Float[Tensor, "b _s _h _w"], ...]  # logits: a map for each column of the grid
    down: tuple[Float[Tensor, "b _s _h _w"], ...]  # ... and for each row
    size: tuple[int, int]


class SOLO(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections` and more."""

    name = "solo"
    card = Card(
        title="SOLO",
        paper="Wang, Kong, Shen, Jiang, Li: SOLO: Segmenting Objects by Locations. ECCV 2020",
        arxiv="1912.04488",
        code="WXinlong/SOLO",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors",
    )

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
        deform_stages: Sequence[int] = (),
        deform_modulated: bool = False,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        grids: Sequence[int] = GRIDS,
        ranges: Sequence[Sequence[float]] = RANGES,
        sigma: float = 0.2,
        head_width: int = 256,
        head_convs: int = 7,
        head_deform: Deform = "no",
        coordinates: bool = True,
        align: Literal["interpolate", "pool"] = "interpolate",
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone        "resnet18" ... "resnet152", or "timm:NAME" for any of timm's with strides 4 to 32
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width ... deform_modulated
                        the trunk's variants: see `blocks.resnet`; `deform_modulated` also of the head's
        norm            of the trunk: "group" trains from random weights and with small batches; "still" is what the
                        published weights have
        frozen          so many parts of the trunk do not train, from the stem on (as published 2: stem, first stage)
        grids           S of each of the five levels (table 1)
        ranges          square roots of the areas of the boxes that each level learns, both ends included (table 2)
        sigma           share of an object's box, around its centre of mass, whose cells learn it (section 3.3)
        head_width, head_convs, head_deform
                        of both branches (figure 6); the last or all of their convolutions deformable
        coordinates     whether the mask branch knows where it is (table 3)
        align           how a level comes to its grid in the category branch (section 3.2)
        mask_loss       "dice"; "focal", "bce" (table 4)
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        grid_ops.check_cells(grids, ranges, head_convs)
        self.classes = tuple(classes)
        self.grids = tuple(grids)
        self.ranges = [(float(low), float(high)) for low, high in ranges]
        self.sigma, self.coordinates = sigma, coordinates
        self.mask_loss: MaskLoss = mask_loss
        self.mask_weight = mask_weight
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, groups=groups,
            group_width=group_width, stride_in=stride_in, deform_stages=deform_stages,
            deform_modulated=deform_modulated, norm=norm, norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        self.neck = FPN(channels, neck_width)
        self.category = GridBranch(
            neck_width, head_width, head_convs, len(self.classes), bias=PRIOR, deform=head_deform,
            modulated=deform_modulated, align=align,
        )  # fmt: skip
        self.make_mask_branch(neck_width, head_width, head_convs, head_deform, deform_modulated)
        self.preprocess = normalization_for(PREPROCESS.at(short, long), in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def make_mask_branch(self, channels_in: int, width: int, convs: int, deform: Deform, modulated: bool) -> None:
        """One tower for all levels; the last convolutions have a grid's size of outputs, so each level has its own."""
        self.masks = tower(channels_in + 2 * self.coordinates, width, convs, deform, modulated)
        self.mask_output = nn.ModuleList(_mask_output(width, grid * grid, 1) for grid in self.grids)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw | DecoupledRaw:
        levels = grid_ops.prepare_levels(self.neck(self.backbone(images)))  # strides 8, 8, 16, 32, 32
        classes = tuple(self.category(level, grid) for level, grid in zip(levels, self.grids, strict=True))
        return self.raw(levels, classes, (images.shape[-2], images.shape[-1]))

    def raw(self, levels: Sequence[Tensor], classes: tuple[Tensor, ...], size: tuple[int, int]) -> Raw | DecoupledRaw:
        """The mask branch for levels that are prepared."""
        features = (self.masks(self.placed(level, slice(None))) for level in levels)
        return Raw(classes, tuple(_doubled(f) for f in features), size)

    def placed(self, level: Float[Tensor, "b c h w"], axes: slice) -> Float[Tensor, "b _d h w"]:
        """A level with coordinates appended: x, y or both."""
        return torch.cat([level, grid_ops.coordinates(level)[:, axes]], 1) if self.coordinates else level

    def masks_of(
        self, raw: Any, image: int, level: int, cells: Int[Tensor, " n"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "n _h _w"]:
        """Probabilities of the masks that cells of one level of one image name; bilinearly on a grid of `size`."""
        output, feature = self.mask_output[level], raw.features[level][image]
        assert isinstance(output, nn.Conv2d)
        assert output.bias is not None
        logits = output.weight[cells].flatten(1) @ feature.flatten(1) + output.bias[cells, None]  # (n, h w)
        return _resized(logits.float().sigmoid().unflatten(1, feature.shape[1:]), size)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, over all cells, and `mask`, over those that learn a mask.

        Targets are in the frame of the input; crowd regions are not learnt from.
        """
        logits = grid_ops.flat(raw.classes)
        objects = [grid_ops.read_objects(t, raw.size, MASK_STRIDES, logits.device, inclusive=True) for t in targets]
        claims = [grid_ops.assign(o, raw.size, self.grids, self.ranges, self.sigma) for o in objects]
        labels = grid_ops.class_labels(objects, claims, self.grids)
        terms = []
        for image, (own, levels) in enumerate(zip(objects, claims, strict=True)):
            for level, (claim, grid, stride) in enumerate(zip(levels, self.grids, MASK_STRIDES, strict=True)):
                # A channel is one cell's, so a cell that two objects claim learns the later one's mask alone.
                def soft(cells: Tensor, image: int = image, level: int = level) -> Tensor:
                    return self.masks_of(raw, image, level, cells)

                terms.append(grid_ops.mask_loss_sum(soft, claim.once(grid * grid), own.planes[stride], self.mask_loss))
        count = global_mean_count((labels >= 0).sum())
        # Nothing learns from outputs of levels without an object; they have a gradient, a zero one, all the same.
        idle = sum((v.float().sum() for v in self.idle(raw)), logits.new_zeros((), dtype=torch.float32)) * 0
        return {
            "class": grid_ops.class_loss(logits, labels),
            "mask": self.mask_weight * torch.stack(terms).sum() / count + idle,
        }

    def idle(self, raw: Any) -> list[Tensor]:
        return [*raw.features, *self.mask_output.parameters()]

    # ---- objects -------------------------------------------------------------------------------------------------

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
        """
        nms_threshold        None: Matrix NMS, with `kernel` and `nms_sigma`; a number: plain mask NMS by class
        candidate_threshold  for a cell's score before its mask is made; twice `score_threshold` if that is less
        """
        rules = grid_ops.Suppression(
            score_threshold, min(candidate_threshold, 2 * score_threshold), nms_threshold, kernel, nms_sigma,
            detections=detections,
        )  # fmt: skip
        plane = (raw.size[0] // 4, raw.size[1] // 4)

        def soft(image: int, cells: Tensor) -> Tensor:
            parts = grid_ops.by_level(cells, self.grids)
            return torch.cat([self.masks_of(raw, image, n, part, plane) for n, part in enumerate(parts)])

        return grid_ops.decode_cells(raw.classes, self.grids, soft, plane, placements, raw.size, rules, mask_threshold)

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        heads = [m for name, m in self.named_children() if name not in ("backbone", "neck")]
        return {"backbone": [self.backbone], "neck": [self.neck], "heads": heads}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"category.output.{kind}": ClassRows() for kind in ("weight", "bias")}

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "still", "frozen": 2}
    _COCO = "COCO val2017, short side 800, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "solo-r50": Preset(
            _PUBLISHED, (Score(35.8, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 32.9"
        ),
        "solo-r101": Preset(
            {**_PUBLISHED, "backbone": "resnet101"}, (Score(37.1, "mask AP", _COCO, _README),), "36 epochs"
        ),
        "solo-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head_width": 128, "head_convs": 4,
                "grids": (12, 10, 8, 6, 4), "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
                "short": 320, "long": 512,
            },
            # Each cell's channel learns from the objects with their centres there alone: few images, few cells.
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


class DecoupledSOLO(SOLO):
    """SOLO with a map for each column and each row of the grid in place of one for each cell (section 4.3).

    `shared_tower`: the light head, where one tower that knows both coordinates serves columns and rows.
    """

    name = "decoupled-solo"
    card = Card(
        title="Decoupled SOLO",
        paper="Wang, Kong, Shen, Jiang, Li: SOLO: Segmenting Objects by Locations. ECCV 2020, section 4.3",
        arxiv="1912.04488",
        code="WXinlong/SOLO",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors",
    )

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
        deform_stages: Sequence[int] = (),
        deform_modulated: bool = False,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        grids: Sequence[int] = GRIDS,
        ranges: Sequence[Sequence[float]] = RANGES,
        sigma: float = 0.2,
        head_width: int = 256,
        head_convs: int = 7,
        head_deform: Deform = "no",
        shared_tower: bool = False,
        coordinates: bool = True,
        align: Literal["interpolate", "pool"] = "interpolate",
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """As `SOLO`, and `shared_tower`."""
        self.shared_tower = shared_tower  # `make_mask_branch`, which SOLO's constructor calls, asks for it
        super().__init__(**{name: value for name, value in self.options.items() if name != "shared_tower"})

    def make_mask_branch(self, channels_in: int, width: int, convs: int, deform: Deform, modulated: bool) -> None:
        if self.shared_tower:
            self.both = tower(channels_in + 2 * self.coordinates, width, convs, deform, modulated)
        else:
            self.across = tower(channels_in + self.coordinates, width, convs, deform, modulated)
            self.down = tower(channels_in + self.coordinates, width, convs, deform, modulated)
        self.across_output = nn.ModuleList(_mask_output(width, grid, 3) for grid in self.grids)
        self.down_output = nn.ModuleList(_mask_output(width, grid, 3) for grid in self.grids)

    def raw(self, levels: Sequence[Tensor], classes: tuple[Tensor, ...], size: tuple[int, int]) -> DecoupledRaw:
        across, down = [], []
        for level, column_output, row_output in zip(levels, self.across_output, self.down_output, strict=True):
            if self.shared_tower:
                columns = rows = _doubled(self.both(self.placed(level, slice(None))))
            else:
                columns = _doubled(self.across(self.placed(level, slice(0, 1))))
                rows = _doubled(self.down(self.placed(level, slice(1, 2))))
            across.append(column_output(columns))
            down.append(row_output(rows))
        return DecoupledRaw(classes, tuple(across), tuple(down), size)

    def masks_of(
        self, raw: Any, image: int, level: int, cells: Int[Tensor, " n"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "n _h _w"]:
        grid = self.grids[level]
        columns, rows = raw.across[level][image][cells % grid], raw.down[level][image][cells // grid]
        # Each is resized by itself, as in the official code, which is not the same as the product resized.
        return _resized(columns.float().sigmoid(), size) * _resized(rows.float().sigmoid(), size)

    def idle(self, raw: Any) -> list[Tensor]:
        return [*raw.across, *raw.down]

    _LIGHT: ClassVar[dict[str, Any]] = {
        "norm": "still", "frozen": 2, "head_convs": 4, "shared_tower": True,
        "ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)), "short": 512, "long": 852,
    }  # fmt: skip
    _COCO = "COCO val2017, short side 800, pycocotools"
    _LOW = "COCO val2017, short side 512, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "decoupled-solo-r50": Preset(
            {"norm": "still", "frozen": 2}, (Score(36.4, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 33.9"
        ),
        "decoupled-solo-r101": Preset(
            {"norm": "still", "frozen": 2, "backbone": "resnet101"}, (Score(37.9, "mask AP", _COCO, _README),),
            "36 epochs",
        ),
        "decoupled-solo-light-r50": Preset(_LIGHT, (Score(33.0, "mask AP", _LOW, _README),), "36 epochs"),
        "decoupled-solo-light-dcn-r50": Preset(
            {**_LIGHT, "deform_stages": (1, 2, 3), "head_deform": "last"}, (Score(35.0, "mask AP", _LOW, _README),),
            "36 epochs",
        ),
        "decoupled-solo-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head_width": 128, "head_convs": 4, "shared_tower": True,
                "grids": (24, 20, 16, 12, 8), "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
                "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # SOLO's: solo-1x, solo-3x, solo-light-3x


def _mask_output(channels: int, outputs: int, kernel: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, PRIOR)  # pyright: ignore[reportArgumentType]
    return layer


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _resized(x: Float[Tensor, "n h w"], size: tuple[int, int] | None) -> Float[Tensor, "n _h _w"]:
    if size is None or x.shape[1:] == size or not len(x):
        return x if size is None else x.reshape(len(x), *size)
    return functional.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
