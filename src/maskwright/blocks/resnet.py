"""ResNet and ResNeXt backbones (arXiv 1512.03385, 1611.05431), in the variants that detection checkpoints have."""

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
        """Returns the sum of the convolutions' output and the shortcut, after ReLU."""
        y = self.conv2(self.conv1(x))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: on a CPU a new map costs more than the sum
        return functional.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut (depths 50 and above).

    The first block of a stage strides in the first 1 x 1 (the original Caffe models) or in the 3 x 3 convolution
    (torchvision, ResNeXt), see `stride_in`.
    """

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
        """Returns the sum of the convolutions' output and the shortcut, after ReLU."""
        y = self.conv3(self.conv2(self.conv1(x)))
        y += x if self.shortcut is None else self.shortcut(x)  # in place: on a CPU a new map costs more than the sum
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
    """Constructs one stage of a ResNet.

    Args:
        depth: Depth of the whole network: 18, 34, 50, 101 or 152.
        number: 0 ... 3; strides 4, 8, 16 and 32.
        channels_in: Channels of the stage before.
        base: Channels after the stem of the whole network.
        groups: Groups of the 3 x 3 convolutions.
        group_width: Channels of each group in the first stage.
        dilation: A dilated stage does not stride. Blocks of depths 18 and 34 are never dilated.
        dilate_first: Whether the first block of a dilated stage is dilated too (detectron2) or not (torchvision).
        stride_in: See `Bottleneck`.
        deform: Whether the 3 x 3 convolutions are deformable, and modulated.
        deform_every: They are in every `deform_every`-th block, from the first on.
        deform_bias: Whether these have a bias.
        deform_groups: Their offset groups.
        norm: Normalisation.
        eps: Epsilon of the normalisation.

    Returns:
        The stage and its channels.

    Raises:
        ValueError: If the options contradict each other.
    """
    if depth not in BLOCKS:
        raise ValueError(f"there is no ResNet of depth {depth}; known are {', '.join(map(str, BLOCKS))}")
    if depth < 50 and deform != "no":
        raise ValueError(f"resnet{depth} has no bottlenecks to deform; use deform_stages=() or a deeper backbone")
    if depth < 50 and groups != 1:
        raise ValueError(f"resnet{depth} has no bottlenecks to group; use groups=1 or a deeper backbone")
    if deform_every < 1:
        raise ValueError(f"deform_every must be at least 1 (every block), got {deform_every}")
    scale = 2**number
    blocks: list[nn.Module] = []
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
    """A stem (7 x 7 stride 2, max pooling) and the first stages; returns the outputs of all stages.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stages: Number of stages, 1 ... 4.
        in_channels: Channels of the image.
        base: Channels after the stem; the published networks have 64.
        groups: See `make_stage`, as for the following.
        group_width: Channels of each group in the first stage.
        stride_in: The convolution of a bottleneck that strides.
        dilation: Dilation of the last stage.
        dilate_first: Whether its first block is dilated too.
        deform_stages: Stages (0 ... 3) with deformable convolutions.
        deform_modulated: Whether these are modulated.
        deform_every: They are in every `deform_every`-th block.
        deform_bias: Whether these have a bias.
        deform_groups: Their offset groups.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
        frozen: Number of parts (stem, four stages) that are not trained; nor do their batch norms' statistics change.
        caffe_pool: Whether the max pooling rounds sizes up and has no padding.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels.
    """

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
        caffe_pool: bool = False,
    ):
        super().__init__()
        self.caffe_pool = caffe_pool
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
                dilate_first=dilate_first, stride_in=stride_in, deform=deform, deform_every=deform_every,
                deform_bias=deform_bias, deform_groups=deform_groups,
                norm=still if number + 1 < frozen else norm, eps=eps,
            )  # fmt: skip
            stride *= 2 if number > 0 and widened == 1 else 1
            self.stages.append(stage)
            self.channels.append(channels)
            self.strides.append(stride)
        later = [nn.Identity()] * (4 - stages)  # left out, or part of a head (C4)
        freeze([self.stem, *self.stages, *later], frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the outputs of the stages, finest first."""
        padding = 0 if self.caffe_pool else 1
        x = functional.max_pool2d(self.stem(x), 3, 2, padding, ceil_mode=self.caffe_pool)  # (B, 64, H/4, W/4)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def _stages(use: Use) -> int:
    """Number of stages up to the deepest level."""
    return use.deepest.bit_length() - 2


def _build(spec: Backbone, in_channels: int, use: Use) -> ResNet:
    stages = _stages(use)
    missing = [stage for stage in spec.deform_stages if stage >= stages]
    if missing:
        raise ValueError(f"backbone.deform_stages has {missing[0]}; only stages 0 ... {stages - 1} are used here")
    return ResNet(
        int(spec.name[6:]), stages=stages, in_channels=in_channels, base=spec.width or 64, groups=spec.groups,
        group_width=spec.group_width, stride_in=spec.stride_in, dilation=2 if use.dilated else 1,
        dilate_first=use.dilate_first, deform_stages=spec.deform_stages, deform_modulated=spec.deform_modulated,
        deform_every=spec.deform_every, deform_groups=spec.deform_groups, deform_bias=use.deform_bias, norm=spec.norm,
        eps=spec.eps, frozen=spec.frozen, caffe_pool=use.caffe_pool,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    stages = _stages(use)
    widths = [(spec.width or 64) * (4 if int(spec.name[6:]) >= 50 else 1) * 2**n for n in range(stages)]
    strides = [4 * 2**n for n in range(stages)]
    if use.dilated and stages == 4:
        strides[3] = strides[2]
    return Levels(tuple(widths), tuple(strides))


_OPTIONS = frozenset(
    ("width", "groups", "group_width", "stride_in", "deform_stages", "deform_modulated", "deform_every",
     "deform_groups", "norm", "norm_eps", "frozen")
)  # fmt: skip

FAMILY = Family(
    names=tuple(f"resnet{depth}" for depth in BLOCKS),
    options=_OPTIONS,
    levels=_levels,
    build=_build,
    # What describes bottlenecks.
    without={f"resnet{depth}": _OPTIONS - {"width", "norm", "norm_eps", "frozen"} for depth in BLOCKS if depth < 50},
    deepest=(4, 8, 16, 32),
    dilates=True,
)
