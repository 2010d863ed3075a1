"""SOLOv2: Dynamic and Fast Instance Segmentation (Wang, Zhang, Kong, Li, Shen, NeurIPS 2020, arXiv 2003.10152).

SOLO's mask branch is a convolution with one output for each cell of a grid, and hardly any of them is asked for. So the
network predicts the convolution itself: each cell gives a *kernel*, a vector of 256 numbers, and one *mask feature* at
stride 4, summed up from the pyramid, serves all cells. An object's mask is its cell's kernel applied to that feature.
Which cell learns which object, and the category branch, are SOLO's; duplicates are suppressed by Matrix NMS, which
lowers the scores of all candidates at once instead of dropping one after the other.

There are two official implementations, a fork of MMDetection's first version and AdelaiDet; `RULES` says in what they
differ beyond their trunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import solo_grid as grid_ops
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.points import PlanePoints
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.solo_grid import GRIDS, PRIOR, RANGES, Deform, GridBranch, MaskLoss
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.points import mask_sample
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System


@dataclass(frozen=True)
class Rules:
    """The conventions of one published implementation."""

    preprocess: Preprocess
    inclusive: bool  # boxes, whose size chooses the levels, end at their last pixel


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
    """What the network says of every cell, and what all masks are made from."""

    classes: tuple[Float[Tensor, "b k _s _s"], ...]  # logits, of five levels
    kernels: tuple[Float[Tensor, "b d _s _s"], ...]  # d = e, or 9 e for 3 x 3 kernels
    feature: Float[Tensor, "b e h w"]  # stride 4
    size: tuple[int, int]  # H, W of the input, padding included


class MaskFeature(nn.Module):
    """One map at stride 4 out of P2 ... P5 (figure 3b): each level is doubled until it is as fine as P2, with a
    convolution before every doubling, and all are added. Where the deepest level begins it is told coordinates."""

    def __init__(
        self, channels_in: int, width: int, outputs: int, *, coordinates: bool, deformable: bool, modulated: bool
    ):
        super().__init__()
        self.coordinates = coordinates
        self.levels = nn.ModuleList()
        for number in range(4):
            convs = []
            for step in range(max(1, number)):
                extra = 2 if number == 3 and coordinates else 0
                read = width if step else channels_in + extra
                convs.append(grid_ops.conv_norm(read, width, 3, deformable, modulated))
            self.levels.append(nn.ModuleList(convs))
        self.output = grid_ops.conv_norm(width, outputs, 1, deformable, modulated)  # ends in a ReLU too

    def forward(self, levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b e h w"]:
        total: Any = 0
        for number, (x, convs) in enumerate(zip(levels, self.levels, strict=True)):
            if number == 3 and self.coordinates:
                x = torch.cat([x, grid_ops.coordinates(x)], 1)
            for conv in convs:  # pyright: ignore[reportGeneralTypeIssues]
                x = conv(x)
                if number:
                    x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            total = x + total
        return self.output(total)


class SOLOv2(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections` and more."""

    name = "solov2"
    card = Card(
        title="SOLOv2",
        paper="Wang, Zhang, Kong, Li, Shen: SOLOv2: Dynamic and Fast Instance Segmentation. NeurIPS 2020",
        arxiv="2003.10152",
        code="WXinlong/SOLO; aim-uofa/AdelaiDet",
        code_licence="BSD-2-Clause text, titled non-commercial; commercial use by contact with the authors (both)",
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
        rules: str = "mmdet",
        grids: Sequence[int] = GRIDS,
        ranges: Sequence[Sequence[float]] = RANGES,
        sigma: float = 0.2,
        head_width: int = 512,
        head_convs: int = 4,
        head_deform: Deform = "no",
        mask_width: int = 128,
        mask_channels: int = 256,
        kernel_size: Literal[1, 3] = 1,
        coordinates: bool = True,
        mask_loss: MaskLoss = "dice",
        mask_weight: float = 3.0,
        points: bool = False,
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
        norm            of the trunk: "group" trains from random weights and with small batches; published weights have
                        "still" (mmdet) and "frozen" (adelaidet)
        frozen          so many parts of the trunk do not train, from the stem on (as published 2: stem, first stage)
        rules           "mmdet" or "adelaidet": see RULES
        grids           S of each of the five levels
        ranges          square roots of the areas of the boxes that each level learns, both ends included
        sigma           share of an object's box, around its centre of mass, whose cells learn it
        head_width, head_convs, head_deform
                        of kernel and category branch; deformable are none, the last or all of their convolutions, with
                        "all" those of the mask feature too
        mask_width, mask_channels
                        inside the mask feature's branch, and of what comes out of it
        kernel_size     of the dynamic convolution (table 5a)
        coordinates     whether kernel branch and mask feature know where they are (table 5b)
        mask_loss       "dice"; "focal", "bce" as in SOLO
        points          masks are refined at single points of the mask feature, from stride 4 to the input's own grid
                        (PointRend, arXiv 1912.08193)
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        if rules not in RULES:
            raise UsageError(f"rules is {rules!r}; expected {' or '.join(RULES)}")
        grid_ops.check_cells(grids, ranges, head_convs)
        if kernel_size not in (1, 3):
            raise UsageError(f"kernel_size is {kernel_size!r}; expected 1 or 3")
        self.classes = tuple(classes)
        self.rules = RULES[rules]
        self.grids = tuple(grids)
        self.ranges = [(float(low), float(high)) for low, high in ranges]
        self.sigma, self.coordinates, self.kernel_size = sigma, coordinates, kernel_size
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
            modulated=deform_modulated,
        )  # fmt: skip
        self.kernel = GridBranch(
            neck_width + 2 * coordinates, head_width, head_convs, mask_channels * kernel_size**2, deform=head_deform,
            modulated=deform_modulated,
        )  # fmt: skip
        self.mask_feature = MaskFeature(
            neck_width, mask_width, mask_channels, coordinates=coordinates, deformable=head_deform == "all",
            modulated=deform_modulated,
        )  # fmt: skip
        self.points = PlanePoints(mask_channels, width=mask_width) if points else None
        self.preprocess = normalization_for(self.rules.preprocess.at(short, long), in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        pyramid = self.neck(self.backbone(images))  # P2 ... P6
        classes, kernels = [], []
        for level, grid in zip(grid_ops.prepare_levels(pyramid), self.grids, strict=True):
            # Coordinates first: they are brought to the grid with the features.
            placed = torch.cat([level, grid_ops.coordinates(level)], 1) if self.coordinates else level
            kernels.append(self.kernel(placed, grid))
            classes.append(self.category(level, grid))
        feature = self.mask_feature(pyramid[:4])
        return Raw(tuple(classes), tuple(kernels), feature, (images.shape[-2], images.shape[-1]))

    def masks_of(self, feature: Float[Tensor, "e h w"], kernels: Float[Tensor, "n d"]) -> Float[Tensor, "n h w"]:
        """Logits of the masks that these kernels make of one image's feature."""
        if self.kernel_size == 1:
            return (kernels @ feature.flatten(1)).unflatten(1, feature.shape[1:]).float()
        if not len(kernels):
            return feature.new_zeros(0, *feature.shape[1:], dtype=torch.float32)
        return functional.conv2d(feature[None], kernels.unflatten(1, (-1, 3, 3)), padding=1)[0].float()

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, over all cells, and `mask`, over all pairs of an object and a cell that learns it.

        Targets are in the frame of the input; crowd regions are not learnt from.
        """
        logits, kernels = grid_ops.flat(raw.classes), grid_ops.flat(raw.kernels)
        objects = [
            grid_ops.read_objects(t, raw.size, (4,), logits.device, inclusive=self.rules.inclusive) for t in targets
        ]
        claims = [grid_ops.assign(o, raw.size, self.grids, self.ranges, self.sigma) for o in objects]
        labels = grid_ops.class_labels(objects, claims, self.grids)
        terms, refined, (count, learnt) = [], [], torch.zeros(2, device=logits.device)
        for image, (own, levels) in enumerate(zip(objects, claims, strict=True)):

            def soft(cells: Tensor, image: int = image) -> Tensor:
                return self.masks_of(raw.feature[image], kernels[image][cells]).sigmoid()

            # Unlike in SOLO, a cell that two objects claim learns both masks, if only one class.
            claim = grid_ops.joined(levels, self.grids)
            terms.append(grid_ops.mask_loss_sum(soft, claim, own.planes[4], self.mask_loss))
            count = count + len(claim.cells)
            if self.points is not None:
                refined.append(self._point_loss(raw, kernels, image, claim, targets[image]))
                learnt = learnt + len(claim.owners.unique())
        # Without an object the masks have a gradient all the same, a zero one.
        idle = (raw.feature.float().sum() + kernels.float().sum()) * 0
        losses = {
            "class": grid_ops.class_loss(logits, labels),
            "mask": self.mask_weight * torch.stack(terms).sum() / global_mean_count(count) + idle,
        }
        return losses | ({"point": torch.stack(refined).sum() / global_mean_count(learnt)} if refined else {})

    def _point_loss(
        self, raw: Raw, kernels: Tensor, image: int, claim: grid_ops.Positives, target: Instances
    ) -> Tensor:
        """Sum over one image's objects, each by the first of its cells."""
        assert self.points is not None
        target = target if target.crowd is None else target[~target.crowd]
        owners, row = claim.owners.unique(return_inverse=True)
        place = torch.arange(len(row), device=row.device)
        first = torch.full_like(owners, len(row)).scatter_reduce(0, row, place, "amin")
        extent = raw.feature.new_tensor([raw.size[1], raw.size[0]], dtype=torch.float32)

        def truth(points: Tensor) -> Tensor:
            masks = target.masks if target.masks is not None else Masks.empty(target.image_size)
            return mask_sample(masks, points * extent, owners)

        coarse = self.masks_of(raw.feature[image], kernels[image][claim.cells[first]])
        return self.points.loss_sum(raw.feature[image : image + 1], coarse, truth)

    # ---- objects -------------------------------------------------------------------------------------------------

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
        """
        nms_threshold        None: Matrix NMS, with `kernel` and `nms_sigma`; a number: plain mask NMS by class
        candidate_threshold  for a cell's score before its mask is made; twice `score_threshold` if that is less
        refine               False: masks as they are, where points could refine them
        """
        rules = grid_ops.Suppression(
            score_threshold, min(candidate_threshold, 2 * score_threshold), nms_threshold, kernel, nms_sigma,
            detections=detections,
        )  # fmt: skip
        kernels, plane = grid_ops.flat(raw.kernels), (raw.feature.shape[2], raw.feature.shape[3])

        def soft(image: int, cells: Tensor) -> Tensor:
            return self.masks_of(raw.feature[image], kernels[image][cells]).sigmoid()

        def finer(image: int, masks: Tensor) -> Tensor:
            assert self.points is not None
            return self.points.refine(raw.feature[image : image + 1], masks.logit(1e-6)).sigmoid()

        return grid_ops.decode_cells(
            raw.classes, self.grids, soft, plane, placements, raw.size, rules, mask_threshold,
            finer if refine and self.points is not None else None,
        )  # fmt: skip

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            "backbone": [self.backbone], "neck": [self.neck],
            "heads": [m for m in (self.category, self.kernel, self.mask_feature, self.points) if m is not None],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"category.output.{kind}": ClassRows() for kind in ("weight", "bias")}

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "still", "frozen": 2}
    _DCN: ClassVar[dict[str, Any]] = {
        **_PUBLISHED, "deform_stages": (1, 2, 3), "deform_modulated": True, "head_deform": "all",
    }  # fmt: skip
    _LIGHT: ClassVar[dict[str, Any]] = {
        **_PUBLISHED, "head_width": 256, "head_convs": 2, "mask_channels": 128, "short": 448, "long": 768,
        "ranges": ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896)),
    }  # fmt: skip
    _ADELAIDET: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1", "rules": "adelaidet"}
    _COCO = "COCO val2017, short side 800, pycocotools"
    _README = "WXinlong/SOLO README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "solov2-r50": Preset(
            _PUBLISHED, (Score(37.5, "mask AP", _COCO, _README),), "36 epochs; 12 epochs: 34.8"
        ),
        "solov2-r101": Preset(
            {**_PUBLISHED, "backbone": "resnet101"}, (Score(39.1, "mask AP", _COCO, _README),), "36 epochs"
        ),
        "solov2-r101-dcn": Preset(
            {**_DCN, "backbone": "resnet101"}, (Score(41.4, "mask AP", _COCO, _README),),
            "36 epochs; deformable convolutions in trunk and heads",
        ),
        "solov2-x101-dcn": Preset(
            {**_DCN, "backbone": "resnet101", "groups": 64, "group_width": 4},
            (Score(42.4, "mask AP", _COCO, _README),), "36 epochs; ResNeXt-101 64x4d",
        ),
        "solov2-light-448-r18": Preset(
            {**_LIGHT, "backbone": "resnet18"},
            (Score(29.6, "mask AP", "COCO val2017, short side 448, pycocotools", _README),), "36 epochs",
        ),
        "solov2-light-448-r34": Preset(
            {**_LIGHT, "backbone": "resnet34"},
            (Score(32.0, "mask AP", "COCO val2017, short side 448, pycocotools", _README),), "36 epochs",
        ),
        "solov2-light-448-r50": Preset(
            _LIGHT, (Score(33.7, "mask AP", "COCO val2017, short side 448, pycocotools", _README),), "36 epochs",
        ),
        "solov2-light-512-dcn-r50": Preset(
            {
                **_LIGHT, "head_convs": 3, "head_deform": "last", "deform_stages": (1, 2, 3), "short": 512, "long": 852,
                "ranges": ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)),
            },
            (Score(36.4, "mask AP", "COCO val2017, short side 512, pycocotools", _README),), "36 epochs",
        ),
        "solov2-r50-adelaidet": Preset(
            _ADELAIDET, (Score(37.6, "mask AP", _COCO, "AdelaiDet README"),), "270k steps of 16 images"
        ),
        "solov2-r101-adelaidet": Preset(
            {**_ADELAIDET, "backbone": "resnet101"}, (Score(39.0, "mask AP", _COCO, "AdelaiDet README"),),
            "270k steps of 16 images",
        ),
        "solov2-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head_width": 128, "head_convs": 2, "mask_width": 64,
                "mask_channels": 64, "grids": (24, 20, 16, 12, 8), "short": 320, "long": 512,
                "ranges": ((1, 40), (20, 80), (40, 160), (80, 320), (160, 1024)),
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
