"""VoVNetV2 (CenterMask, arXiv 1911.06667; VoVNet: 1904.09730).

A one-shot aggregation (OSA) module runs 3 x 3 convolutions in a row, concatenates its input and all of their outputs
once, and reduces them by a 1 x 1 convolution. Version 2 adds an attention over channels with a single layer (eSE) and,
except in the first module of a stage, the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.blocks.layers import ConvNorm, DeformConvNorm, Norm
from maskwright.errors import UsageError


class Body(NamedTuple):
    """One of the published networks.

    Attributes:
        stem: Channels of the three convolutions of the stem.
        widths: Channels of the 3 x 3 convolutions of each stage.
        channels: Output channels of each stage.
        convs: 3 x 3 convolutions of a module.
        modules: Modules of each stage.
        depthwise: Whether 3 x 3 convolutions are depthwise and followed by 1 x 1 convolutions.
    """

    stem: tuple[int, int, int]
    widths: tuple[int, ...]
    channels: tuple[int, ...]
    convs: int
    modules: tuple[int, ...]
    depthwise: bool = False


_SLIM, _WIDE = ((64, 80, 96, 112), (112, 256, 384, 512)), ((128, 160, 192, 224), (256, 512, 768, 1024))
BODIES = {
    "vovnet19-slim-dw": Body((64, 64, 64), *_SLIM, 3, (1, 1, 1, 1), True),
    "vovnet19-dw": Body((64, 64, 64), *_WIDE, 3, (1, 1, 1, 1), True),
    "vovnet19-slim": Body((64, 64, 128), *_SLIM, 3, (1, 1, 1, 1)),
    "vovnet19": Body((64, 64, 128), *_WIDE, 3, (1, 1, 1, 1)),
    "vovnet39": Body((64, 64, 128), *_WIDE, 5, (1, 1, 2, 2)),
    "vovnet57": Body((64, 64, 128), *_WIDE, 5, (1, 1, 4, 3)),
    "vovnet99": Body((64, 64, 128), *_WIDE, 5, (1, 3, 9, 3)),
}


class DepthwiseConvNorm(nn.Module):
    """A depthwise 3 x 3 convolution, a 1 x 1 convolution, normalisation, ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm, eps: float):
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, 1, groups=channels_in, bias=False)
        self.pointwise = ConvNorm(channels_in, channels, 1, norm=norm, eps=eps, relu=True)
        nn.init.kaiming_normal_(self.depthwise.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Applies the layers."""
        return self.pointwise(self.depthwise(x))


class Aggregation(nn.Module):
    """An OSA module with eSE.

    Args:
        channels_in: Input channels.
        width: Channels of the 3 x 3 convolutions.
        channels: Output channels.
        convs: Number of 3 x 3 convolutions.
        identity: Whether the input is added.
        depthwise: Whether the convolutions are depthwise.
        deformable: None: not; otherwise whether deformable convolutions are modulated.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
    """

    def __init__(
        self, channels_in: int, width: int, channels: int, convs: int, *, identity: bool, depthwise: bool,
        deformable: bool | None, norm: Norm, eps: float,
    ):  # fmt: skip
        super().__init__()
        self.identity = identity
        self.reduction = None
        total, own = channels_in + convs * width, channels_in
        if depthwise and channels_in != width:
            self.reduction, own = ConvNorm(channels_in, width, 1, norm=norm, eps=eps, relu=True), width
        self.convs = nn.ModuleList()
        for _ in range(convs):
            if depthwise:
                self.convs.append(DepthwiseConvNorm(own, width, 1, norm, eps))
            elif deformable is not None:
                self.convs.append(DeformConvNorm(own, width, modulated=deformable, norm=norm, eps=eps, relu=True))
            else:
                self.convs.append(ConvNorm(own, width, 3, norm=norm, eps=eps, relu=True))
            own = width
        self.concat = ConvNorm(total, channels, 1, norm=norm, eps=eps, relu=True)
        self.attention = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Applies the module."""
        outputs, y = [x], x if self.reduction is None else self.reduction(x)
        for conv in self.convs:
            y = conv(y)
            outputs.append(y)
        y = self.concat(torch.cat(outputs, 1))
        y = y * functional.hardsigmoid(self.attention(y.mean((2, 3), keepdim=True)))
        return y + x if self.identity else y


class VoVNet(nn.Module):
    """A stem of stride 4 and four stages of OSA modules; returns the outputs of the stages.

    Args:
        body: The network.
        in_channels: Channels of the image.
        base: Channels of the first convolution; published: 64. All other widths are proportional to it.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
        frozen: Number of parts (stem, stages) that are not trained; nor do their batch norms' statistics change.
        deform_stages: Stages (0 ... 3) whose 3 x 3 convolutions are deformable.
        deform_modulated: Whether these are modulated.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels, 4 ... 32.
    """

    def __init__(
        self, body: Body, *, in_channels: int = 3, base: int = 64, norm: Norm = "batch", eps: float = 1e-5,
        frozen: int = 0, deform_stages: Sequence[int] = (), deform_modulated: bool = False,
    ):  # fmt: skip
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm

        def scaled(width: int) -> int:
            return width * base // 64

        own = still if frozen else norm
        first, second, third = (scaled(width) for width in body.stem)
        self.stem = nn.Sequential(ConvNorm(in_channels, first, 3, stride=2, norm=own, eps=eps, relu=True))
        for width, before, stride in ((second, first, 1), (third, second, 2)):
            self.stem.append(
                DepthwiseConvNorm(before, width, stride, own, eps) if body.depthwise
                else ConvNorm(before, width, 3, stride=stride, norm=own, eps=eps, relu=True)
            )  # fmt: skip
        self.stages = nn.ModuleList()
        channels = third
        for number, (width, outputs, count) in enumerate(zip(body.widths, body.channels, body.modules, strict=True)):
            own = still if number + 1 < frozen else norm
            modules: list[nn.Module] = [nn.MaxPool2d(3, 2, ceil_mode=True)] if number else []
            for position in range(count):
                modules.append(
                    Aggregation(
                        channels, scaled(width), scaled(outputs), body.convs, identity=position > 0,
                        depthwise=body.depthwise, norm=own, eps=eps,
                        deformable=deform_modulated if number in deform_stages else None,
                    )
                )  # fmt: skip
                channels = scaled(outputs)
            self.stages.append(nn.Sequential(*modules))
        self.channels, self.strides = [scaled(width) for width in body.channels], [4, 8, 16, 32]
        freeze([self.stem, *self.stages], frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the outputs of all stages, finest first."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def _build(spec: Backbone, in_channels: int, use: Use) -> VoVNet:
    body, base = BODIES[spec.name], spec.width or 64
    if base % 4:
        raise UsageError(f"backbone.width of {spec.name!r} must be a multiple of 4, got {base}")
    return VoVNet(
        body, in_channels=in_channels, base=base, norm=spec.norm, eps=spec.eps, frozen=spec.frozen,
        deform_stages=spec.deform_stages, deform_modulated=spec.deform_modulated,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    base = spec.width or 64
    return Levels(tuple(width * base // 64 for width in BODIES[spec.name].channels), (4, 8, 16, 32))


FAMILY = Family(
    names=tuple(BODIES),
    options=frozenset(("width", "norm", "norm_eps", "frozen", "deform_stages", "deform_modulated")),
    levels=_levels,
    build=_build,
    without={name: frozenset(("deform_stages", "deform_modulated")) for name, body in BODIES.items() if body.depthwise},
)
