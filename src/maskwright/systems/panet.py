"""PANet, Path Aggregation Network (Liu, Qi, Qin, Shi, Jia, CVPR 2018, arXiv 1803.01534).

Mask R-CNN with three additions that shorten the way of information from the finest features to the predictions. A
bottom-up path after the pyramid carries precise positions to its coarse levels in few steps (section 3.1). Each box is
pooled from all levels, not from the one that fits its size; the first layer of a head is separate for each level, and
the maximum over the levels follows it (section 3.2). A fully connected branch, which reads the whole box at once, is
added to the logits of the convolutional mask branch (section 3.3).

    P2 ... P5 of the pyramid -> N2 = P2, N(k+1) = conv(conv, stride 2 (Nk) + P(k+1))
    proposals -> RoIAlign 7 x 7 from N2 ... N5 -> a layer for each -> maximum -> class, box
    detections -> RoIAlign 14 x 14 from N2 ... N5 -> a layer for each -> maximum -> 2 convolutions
        -> convolution, 28 x 28 mask of each class      } sum
        -> 2 convolutions, linear: one 28 x 28 mask     }

The authors' PyTorch code is based on Detectron.pytorch, whose conventions are `rules="detectron"`. It uses group
normalization in the pyramid and in the heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import BackboneLike
from maskwright.blocks.layers import ConvNorm, Norm, make_norm
from maskwright.blocks.roi_heads import BoxHead, MaskHead, MaskIoUHead
from maskwright.errors import UsageError
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.two_stage import BoxesLike, BoxOptions, ProposalsLike, RulesName, read_switch
from maskwright.systems.mask_rcnn import BACKBONE, PROPOSALS, MaskIoUOptions, MaskOptions, MaskRCNN

RESIZE = Resize(short=1000, long=1400)
BOXES = BoxOptions(convs=4, fcs=1, norm="group")
MASKS = MaskOptions(norm="group")


# ---- networks --------------------------------------------------------------------------------------------------------


class BottomUpPath(nn.Module):
    """A second path after a feature pyramid, from its finest to its coarsest level (section 3.1).

    Each level is reduced by a 3 x 3 convolution of stride two, added to the next level of the pyramid, and passes
    another 3 x 3 convolution; ReLU follows both. The convolutions have a bias, also with a normalisation.

    Args:
        pyramid: Gives the levels of the pyramid, finest first, and one more, which is replaced.
        channels: Channels of every level.
        levels: Number of levels without that one.
        norm: Normalisation after each convolution.
    """

    def __init__(self, pyramid: nn.Module, channels: int, levels: int = 4, norm: Norm = "group"):
        super().__init__()
        self.pyramid = pyramid
        layer = partial(ConvNorm, channels, channels, 3, norm=norm, relu=True, bias=True)
        self.reduce = nn.ModuleList(layer(stride=2) for _ in range(levels - 1))
        self.output = nn.ModuleList(layer() for _ in range(levels - 1))

    def forward(self, features: Sequence[Float[Tensor, "b _c _h _w"]]) -> list[Tensor]:
        """Computes the levels, finest first, and the coarsest one subsampled by two."""
        first, *others = self.pyramid(features)[: len(self.reduce) + 1]
        levels = [first]
        for reduce, output, level in zip(self.reduce, self.output, others, strict=True):
            levels.append(output(reduce(levels[-1]) + level))
        return [*levels, functional.max_pool2d(levels[-1], 1, 2)]


class LinearNorm(nn.Module):
    """A fully connected layer on all values of a box, then normalisation."""

    def __init__(self, inputs: int, outputs: int, norm: Norm):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = make_norm(norm, outputs)
        nn.init.kaiming_uniform_(self.linear.weight, a=1)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "r ..."]) -> Float[Tensor, "r m"]:
        """Computes the outputs, without activation."""
        return self.norm(self.linear(x.flatten(1)))


def fuse_levels(layers: nn.ModuleList, x: Float[Tensor, "r lc s s"]) -> Tensor:
    """Adaptive feature pooling (section 3.2): each level's features pass their own layer and ReLU, then the maximum.

    Args:
        layers: The layer of each level, finest first.
        x: Features pooled from all levels, concatenated along the channels.
    """
    fused: Tensor | None = None
    for layer, own in zip(layers, x.chunk(len(layers), 1), strict=True):
        own = functional.relu(layer(own))
        fused = own if fused is None else torch.maximum(fused, own)
    assert fused is not None
    return fused


class AdaptiveBoxHead(BoxHead):
    """A box head whose first layer, a convolution or a fully connected one, is separate for each level.

    Fully connected layers are normalised if there are no convolutions, as published.

    Args:
        channels: Channels of the features of one level.
        side: Side of the pooled features.
        classes: Number of classes, without background.
        levels: Number of levels.
        convs: Number of 3 x 3 convolutions, with the first one.
        conv_width: Their channels.
        fcs: Number of fully connected layers, with the first one if there are no convolutions.
        width: Their width.
        norm: Normalisation.
        agnostic: Predict one box for all classes.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        levels: int,
        convs: int,
        conv_width: int,
        fcs: int,
        width: int,
        norm: Norm,
        agnostic: bool,
    ):
        if not convs and (not fcs or norm not in ("none", "group")):
            raise UsageError("boxes.convs=0 requires boxes.fcs of at least 1 and boxes.norm 'none' or 'group'")
        inputs, cells = (conv_width, side) if convs else (width, 1)
        super().__init__(
            inputs, cells, classes, convs=max(0, convs - 1), conv_width=conv_width, fcs=fcs if convs else fcs - 1,
            width=width, norm=norm, agnostic=agnostic,
        )  # fmt: skip
        if convs:
            self.first = nn.ModuleList(ConvNorm(channels, conv_width, 3, norm=norm) for _ in range(levels))
        else:
            self.first = nn.ModuleList(LinearNorm(channels * side * side, width, norm) for _ in range(levels))
            self.fcs = nn.ModuleList(LinearNorm(width, width, norm) for _ in range(fcs - 1))

    def forward(self, x: Float[Tensor, "r lc s s"]) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r d"]]:
        """Computes class logits and deltas from features of all levels, concatenated along the channels."""
        x = fuse_levels(self.first, x)
        return super().forward(x if x.ndim == 4 else x[..., None, None])


class FusedMaskHead(MaskHead):
    """A mask head with adaptive feature pooling, fully connected fusion (section 3.3), or both.

    The fully connected branch begins before the last convolution: 3 x 3 convolutions to all and to half of the
    channels, then a linear layer and ReLU to one mask, which is added to the logits of every class.

    Args:
        channels: Channels of the features of one level.
        outputs: Number of masks.
        levels: Number of levels that are fused after the first convolution; 1: `channels` are those of one level.
        fusion: Whether there is a fully connected branch.
        side: Side of the pooled features.
        convs: Number of 3 x 3 convolutions, with the first one.
        width: Their channels.
        norm: Normalisation after each of them.
        **others: Further arguments of `MaskHead`.
    """

    def __init__(
        self, channels: int, outputs: int, *, levels: int, fusion: bool, side: int = 14, convs: int = 4,
        width: int = 256, norm: Norm = "none", **others: Any,
    ):  # fmt: skip
        if convs < (levels > 1) + fusion:
            raise UsageError(f"masks.convs must be at least {(levels > 1) + fusion}, got {convs}")
        inputs, later = (width, convs - 1) if levels > 1 else (channels, convs)
        super().__init__(inputs, outputs, convs=later, width=width, norm=norm, **others)
        self.first = self.fc_convs = self.fc = None
        if levels > 1:
            self.first = nn.ModuleList(ConvNorm(channels, width, 3, norm=norm) for _ in range(levels))
        if fusion:
            half = max(1, width // 2)
            before = width if levels > 1 or later > 1 else channels
            self.fc_convs = nn.Sequential(
                ConvNorm(before, width, 3, norm=norm, relu=True), ConvNorm(width, half, 3, norm=norm, relu=True)
            )
            self.fc = nn.Linear(half * side * side, 4 * side * side)
            nn.init.kaiming_uniform_(self.fc.weight, a=1)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: Float[Tensor, "r c s s"], labels: Int[Tensor, " r"] | None = None) -> Float[Tensor, "r k t t"]:
        """Computes mask logits, see `MaskHead.forward`.

        Args:
            x: Pooled features, with several levels concatenated along the channels.
            labels: Compute one mask per RoI only.
        """
        shared = self.shared(x)
        for conv in self.convs[-1:]:
            x = conv(shared)
        logits = self.predict(functional.relu(self.upsample(x), inplace=True), labels)
        return logits if self.fc is None else logits + self.connected(shared)[:, None]

    def shared(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r d s s"]:
        """The features that the last convolution and the fully connected branch read."""
        if self.first is not None:
            x = fuse_levels(self.first, x)
        for conv in self.convs[:-1]:
            x = conv(x)
        return x

    def connected(self, shared: Float[Tensor, "r d s s"]) -> Float[Tensor, "r t t"]:
        """The mask of the fully connected branch, at least 0."""
        assert self.fc_convs is not None
        assert self.fc is not None
        values = functional.relu(self.fc(self.fc_convs(shared).flatten(1)))
        return values.unflatten(1, (2 * shared.shape[-2], 2 * shared.shape[-1]))


# ---- the system ------------------------------------------------------------------------------------------------------


class PANet(MaskRCNN):
    """PANet. Its networks are `dense`, `boxes`, `masks` and, with this option, `mask_iou`."""

    name = "panet"
    card = Card(
        title="PANet",
        paper="Liu, Qi, Qin, Shi, Jia: Path Aggregation Network for Instance Segmentation. CVPR 2018",
        arxiv="1803.01534",
        code="ShuLiu1993/PANet",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        neck_norm: Norm = "group",
        rules: RulesName = "detectron",
        proposals: ProposalsLike = PROPOSALS,
        boxes: BoxesLike = BOXES,
        masks: bool | Mapping[str, Any] | MaskOptions = MASKS,
        mask_iou: bool | Mapping[str, Any] | MaskIoUOptions = False,
        bottom_up: bool = True,
        adaptive_pooling: bool = True,
        fc_fusion: bool = True,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the bottom-up path.
            neck_norm: Normalisation in both.
            rules: The code base whose conventions are followed.
            proposals: The proposal network, see `Proposals`.
            boxes: The box head, see `BoxOptions`; with convs=0 the first fully connected layer is that of each level.
            masks: The mask head, see `MaskOptions`; False: none.
            mask_iou: Predict the IoU of each mask with its object and multiply the score by it (Mask Scoring R-CNN,
                arXiv 1903.00241), see `MaskIoUOptions`; False: the score is that of the box.
            bottom_up: Add the bottom-up path to the pyramid.
            adaptive_pooling: Pool each box from all levels, instead of one.
            fc_fusion: Add the fully connected branch to the mask head.
        """
        if masks is not False:
            masks = MaskOptions.read({} if masks is True else masks, MASKS)
            if fc_fusion and masks.loss == "softmax":
                raise UsageError("fc_fusion=True requires masks.loss='sigmoid'")
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=Resize.read(resize, RESIZE),
            neck_width=neck_width, neck_norm=neck_norm, rules=rules, proposals=proposals,
            boxes=BoxOptions.read(boxes, BOXES), masks=masks, mask_iou=mask_iou,
        )  # fmt: skip
        levels = len(self.pooler.strides)
        if bottom_up:
            assert self.dense.neck is not None
            self.dense.neck = BottomUpPath(self.dense.neck, neck_width, levels, neck_norm)
        if adaptive_pooling:
            self.pooler = replace(self.pooler, every=True)
            self.channels = levels * neck_width
            own = self.make_box_head
            self.make_box_head = partial(AdaptiveBoxHead, *own.args, **own.keywords, levels=levels)
            self.boxes = self.make_box_head()
            quality = read_switch(MaskIoUOptions, mask_iou)
            if quality is not None:  # it reads the features of all levels
                self.mask_iou = MaskIoUHead(
                    self.channels, self.mask_side, len(self.classes), convs=quality.convs, width=quality.width,
                    fc_width=quality.fc_width,
                )  # fmt: skip
        if self.masks is not None and (adaptive_pooling or fc_fusion):
            own = self.make_mask_head
            self.make_mask_head = partial(
                FusedMaskHead, *own.args, **own.keywords, levels=levels if adaptive_pooling else 1, fusion=fc_fusion,
                side=self.mask_side,
            )  # fmt: skip
            self.masks = self.make_mask_head()

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "norm_eps": 0.0, "frozen": 2, "stride_in": "1x1"}
    _HOW = "COCO val2017, short side 1000, pycocotools"
    _HOW_BOXES = "COCO val2017, pycocotools"
    _README = "README of ShuLiu1993/PANet"
    presets: ClassVar[Mapping[str, Preset]] = {
        "panet-r50": Preset(
            {"backbone": _CAFFE},
            (Score(43.1, "box AP", _HOW, _README), Score(38.3, "mask AP", _HOW, _README)),
            "the authors' R-50-PANet, 2x, trained at several sizes (their paper: 42.1 / 37.8)",
        ),
        "panet-r50-boxes": Preset(
            {"backbone": _CAFFE, "masks": False},
            (Score(39.8, "box AP", _HOW_BOXES, _README),),
            "boxes alone, 1x (their paper: 39.2)",
        ),
        "panet-r50-2fc-boxes": Preset(
            {"backbone": _CAFFE, "masks": False, "boxes": {"convs": 0, "fcs": 2}},
            (Score(39.6, "box AP", _HOW_BOXES, _README),),
            "boxes alone, with a box head of two fully connected layers, 1x (their paper: 39.0)",
        ),
        "panet-small": Preset(
            {
                **MaskRCNN._SMALL, "rules": "detectron2", "masks": {"width": 128},
                "boxes": {"convs": 2, "width": 512},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _PLAIN: ClassVar[dict[str, Any]] = {"bottom_up": False, "adaptive_pooling": False, "fc_fusion": False}
    _ABLATED: ClassVar[dict[str, Any]] = {
        **MaskRCNN._ABLATED, "rules": "detectron2", "neck_norm": "group",
        "boxes": {"convs": 0, "fcs": 2, "width": 256, "norm": "none"},
        "masks": {"convs": 3, "width": 64, "norm": "group"},
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "parts": Ablation(
            "Mask R-CNN, and the three additions one after the other",
            {
                "FPN": _PLAIN,
                "bottom-up path": {**_PLAIN, "bottom_up": True},
                "+ adaptive pooling": {"fc_fusion": False},
                "+ fully connected fusion": {},
            },
            {}, "figures of arXiv 1803.01534 are not included", _ABLATED, MaskRCNN._SCENES, MaskRCNN._TRAINED,
        ),
        "neck": Ablation(
            "Mask R-CNN with PANet's neck or a feature pyramid alone",
            {"FPN": {}, "FPN and bottom-up path": {"bottom_up": True}},
            {}, "figures of arXiv 1803.01534 are not included", {**_ABLATED, **_PLAIN}, MaskRCNN._SCENES,
            MaskRCNN._TRAINED, measures={"mask AP": "segm/AP", "mask AP75": "segm/AP75", "box AP": "bbox/AP"},
        ),
    }  # fmt: skip
