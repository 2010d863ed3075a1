"""ResNet and ResNeXt backbones (arXiv 1512.03385, 1611.05431) as detection checkpoints have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, Family, Levels, StrideIn, Use, freeze
from maskwright.blocks.layers import ConvNorm, DeformConvNorm, Norm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (depths 18 and 34)."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels, 3, stride=stride, norm=norm, eps=eps, relu=True)
        self.conv2 = ConvNorm(channels, channels, 3, norm=norm, eps=eps)
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            self.shortcut = ConvNorm(channels_in, channels, 1, stride=stride, norm=norm, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        y = self.conv2(self.conv1(x))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: a new map costs the host more than the sum
        return functional.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 around a shortcut. Where a stage begins, the stride sits in the first 1 x 1 (as the original
    Caffe models have it) or in the 3 x 3 (torchvision, ResNeXt)."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        width: int,
        stride: int,
        *,
        groups: int,
        dilation: int,
        stride_in: StrideIn,
        deform: Literal["no", "plain", "modulated"],
        deform_bias: bool,
        deform_groups: int,
        norm: Norm,
        eps: float,
    ):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1 = ConvNorm(channels_in, width, 1, stride=first, norm=norm, eps=eps, relu=True)
        self.conv2: nn.Module
        if deform == "no":
            self.conv2 = ConvNorm(
                width, width, 3, stride=second, dilation=dilation, groups=groups, norm=norm, eps=eps, relu=True
            )
        else:
            self.conv2 = DeformConvNorm(
                width, width, stride=second, dilation=dilation, groups=groups, modulated=deform == "modulated",
                norm=norm, eps=eps, relu=True, bias=deform_bias, offset_groups=deform_groups,
            )  # fmt: skip
        self.conv3 = ConvNorm(width, channels, 1, norm=norm, eps=eps)
        self.shortcut = None
        if channels_in != channels:
            self.shortcut = ConvNorm(channels_in, channels, 1, stride=stride, norm=norm, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        y = self.conv3(self.conv2(self.conv1(x)))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: a new map costs the host more than the sum
        return functional.relu(y, inplace=True)


def make_stage(
    depth: int,
    number: int,
    channels_in: int,
    *,
    base: int = 64,
    groups: int = 1,
    group_width: int = 64,
    dilation: int = 1,
    dilate_first: bool = True,
    stride_in: StrideIn = "3x3",
    deform: Literal["no", "plain", "modulated"] = "no",
    deform_every: int = 1,
    deform_bias: bool = False,
    deform_groups: int = 1,
    norm: Norm = "frozen",
    eps: float = 1e-5,
) -> tuple[nn.Sequential, int]:
    """Stage `number` (0 ... 3, strides 4, 8, 16, 32) of a ResNet, and its channels. A dilated stage does not stride;
    without `dilate_first` its first block is not dilated (torchvision), with it all are (detectron2).
    Blocks of depths 18 and 34 never dilate: such a stage only does not stride.
    `deform`: the 3 x 3 of every `deform_every`-th block, from the first on, is a deformable convolution.
    ValueError for what cannot be, as what blocks without a bottleneck (depths 18 and 34) do not have."""
    if depth not in BLOCKS:
        raise ValueError(f"there is no ResNet of depth {depth}; known are {', '.join(map(str, BLOCKS))}")
    if depth < 50 and deform != "no":
        raise ValueError(f"resnet{depth} has no bottlenecks to deform; give deform_stages=() or a deeper trunk")
    if depth < 50 and groups != 1:
        raise ValueError(f"resnet{depth} has no bottlenecks to group; give groups=1 or a deeper trunk")
    if deform_every < 1:
        raise ValueError(f"deform_every is {deform_every}; expected 1 (every block), 2 (every other) or more")
    scale, blocks = 2**number, []
    for index in range(BLOCKS[depth][number]):
        stride = 2 if index == 0 and number > 0 and dilation == 1 else 1
        if depth < 50:
            channels = base * scale
            blocks.append(BasicBlock(channels_in, channels, stride, norm, eps))
        else:
            channels, width = 4 * base * scale, groups * group_width * base // 64 * scale
            blocks.append(
                Bottleneck(
                    channels_in,
                    channels,
                    width,
                    stride,
                    groups=groups,
                    dilation=dilation if index or dilate_first else 1,
                    stride_in=stride_in,
                    deform=deform if index % deform_every == 0 else "no",
                    deform_bias=deform_bias,
                    deform_groups=deform_groups,
                    norm=norm,
                    eps=eps,
                )
            )
        channels_in = channels
    return nn.Sequential(*blocks), channels_in


class ResNet(nn.Module):
    """Stem (7 x 7 stride 2, max pool) and the first `stages` stages; gives the outputs of all of them."""

    def __init__(
        self,
        depth: int = 50,
        *,
        stages: int = 4,
        in_channels: int = 3,
        base: int = 64,
        groups: int = 1,
        group_width: int = 64,
        stride_in: StrideIn = "3x3",
        dilation: int = 1,
        dilate_first: bool = True,
        deform_stages: Sequence[int] = (),
        deform_modulated: bool = False,
        deform_every: int = 1,
        deform_bias: bool = False,
        deform_groups: int = 1,
        norm: Norm = "frozen",
        eps: float = 1e-5,
        frozen: int = 0,
    ):
        """`dilation` is the last stage's; `deform_stages` are numbers 0 ... 3; `frozen`: so many parts do not train,
        counted from the stem, nor do their batch norms' statistics change."""
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        self.stem = ConvNorm(in_channels, base, 7, stride=2, norm=still if frozen else norm, eps=eps, relu=True)
        self.stages = nn.ModuleList()
        self.channels: list[int] = []
        self.strides: list[int] = []
        channels, stride = base, 4
        for number in range(stages):
            widened = dilation if number == 3 else 1
            deform = ("modulated" if deform_modulated else "plain") if number in deform_stages else "no"
            stage, channels = make_stage(
                depth, number, channels, base=base, groups=groups, group_width=group_width, dilation=widened,
                dilate_first=dilate_first,
                stride_in=stride_in, deform=deform, deform_every=deform_every, deform_bias=deform_bias,
                deform_groups=deform_groups,
                norm=still if number + 1 < frozen else norm, eps=eps,
            )  # fmt: skip
            stride *= 2 if number > 0 and widened == 1 else 1
            self.stages.append(stage)
            self.channels.append(channels)
            self.strides.append(stride)
        freeze([self.stem, *self.stages][:frozen])

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        x = functional.max_pool2d(self.stem(x), 3, 2, 1)  # (B, 64, H/4, W/4)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def _build(spec: Backbone, in_channels: int, use: Use) -> nn.Module:
    return ResNet(
        int(spec.name[6:]), stages=use.deepest.bit_length() - 2, in_channels=in_channels, base=spec.width or 64,
        groups=spec.groups, group_width=spec.group_width, stride_in=spec.stride_in, dilation=2 if use.dilated else 1,
        dilate_first=use.dilate_first, deform_stages=spec.deform_stages, deform_modulated=spec.deform_modulated,
        deform_every=spec.deform_every, deform_groups=spec.deform_groups, deform_bias=use.deform_bias, norm=spec.norm,
        eps=spec.eps, frozen=spec.frozen,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    stages = use.deepest.bit_length() - 2
    widths = [(spec.width or 64) * (4 if int(spec.name[6:]) >= 50 else 1) * 2**n for n in range(stages)]
    strides = [4 * 2**n for n in range(stages)]
    if use.dilated and stages == 4:
        strides[3] = strides[2]
    return Levels(tuple(widths), tuple(strides))


FAMILY = Family(
    names=tuple(f"resnet{depth}" for depth in BLOCKS),
    options=frozenset(
        ("width", "groups", "group_width", "stride_in", "deform_stages", "deform_modulated", "deform_every",
         "deform_groups", "norm", "norm_eps", "frozen")
    ),
    levels=_levels,
    build=_build,
)  # fmt: skip
