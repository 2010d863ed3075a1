"""Darknet-53, the trunk of YOLOv3 (arXiv 1804.02767)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.resnet import freeze


class Residual(nn.Module):
    """1 x 1 to half the channels, 3 x 3 back, added to the input; nothing after the sum."""

    def __init__(self, channels: int, norm: Norm, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels // 2, 1, norm=norm, eps=eps, leaky=0.1)
        self.conv2 = ConvNorm(channels // 2, channels, 3, norm=norm, eps=eps, leaky=0.1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(self.conv1(x))


class Darknet(nn.Module):
    """A 3 x 3 stem and five stages, each a convolution of stride two and residual blocks; gives the outputs of all
    stages (strides 2 ... 32, channels 2 ... 32 times `base`)."""

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (1, 2, 8, 8, 4),
        in_channels: int = 3,
        base: int = 32,
        norm: Norm = "batch",
        eps: float = 1e-5,
        frozen: int = 0,
    ):
        """`frozen`: so many parts do not train, from the stem on, nor do their batch norms' statistics change."""
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        self.stem = ConvNorm(in_channels, base, 3, norm=still if frozen else norm, eps=eps, leaky=0.1)
        self.stages = nn.ModuleList()
        self.channels: list[int] = []
        self.strides: list[int] = []
        channels, stride = base, 1
        for number, count in enumerate(blocks):
            own = still if number + 1 < frozen else norm
            down = ConvNorm(channels, 2 * channels, 3, stride=2, norm=own, eps=eps, leaky=0.1)
            channels, stride = 2 * channels, 2 * stride
            self.stages.append(nn.Sequential(down, *(Residual(channels, own, eps) for _ in range(count))))
            self.channels.append(channels)
            self.strides.append(stride)
        freeze([self.stem, *self.stages][:frozen])

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs
