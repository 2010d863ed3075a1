"""Darknet-53, the backbone of YOLOv3 (arXiv 1804.02767), and the tiny backbone of ESE-Seg (arXiv 1908.04067)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.blocks.layers import ConvNorm, Norm

SLOPE = 0.1  # of LeakyReLU below zero


class Residual(nn.Module):
    """1 x 1 to half the channels, 3 x 3 back, added to the input; no activation follows the sum."""

    def __init__(self, channels: int, norm: Norm, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels // 2, 1, norm=norm, eps=eps, leaky=SLOPE)
        self.conv2 = ConvNorm(channels // 2, channels, 3, norm=norm, eps=eps, leaky=SLOPE)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns a map of the same shape."""
        return x + self.conv2(self.conv1(x))


class Darknet(nn.Module):
    """A 3 x 3 stem and stages of a convolution of stride two and residual blocks; returns the outputs of all stages.

    Args:
        blocks: Residual blocks of each stage.
        in_channels: Channels of the image.
        base: Channels after the stem; the published network has 32. They double with each stage.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
        frozen: Number of parts (stem, stages) that are not trained; nor do their batch norms' statistics change.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels, 2 ... 32.
    """

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
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        self.stem = ConvNorm(in_channels, base, 3, norm=still if frozen else norm, eps=eps, leaky=SLOPE)
        self.stages = nn.ModuleList()
        self.channels: list[int] = []
        self.strides: list[int] = []
        channels, stride = base, 1
        for number, count in enumerate(blocks):
            own = still if number + 1 < frozen else norm
            down = ConvNorm(channels, 2 * channels, 3, stride=2, norm=own, eps=eps, leaky=SLOPE)
            channels, stride = 2 * channels, 2 * stride
            self.stages.append(nn.Sequential(down, *(Residual(channels, own, eps) for _ in range(count))))
            self.channels.append(channels)
            self.strides.append(stride)
        freeze([self.stem, *self.stages], frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the outputs of all stages, finest first."""
        x = self.stem(x)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class DarknetTiny(nn.Module):
    """Convolutions with max pooling between them (ESE-Seg's tiny backbone); returns levels of strides 16 and 32.

    Args:
        in_channels: Channels of the image.
        base: Channels of the first convolution; the published network has 16, and both levels 16 times as many.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
        frozen: Number of parts (one for each level) that are not trained; nor do their batch norms' statistics change.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels.
    """

    def __init__(
        self, *, in_channels: int = 3, base: int = 16, norm: Norm = "batch", eps: float = 1e-5, frozen: int = 0
    ):
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        # Channels in units of `base`; 0 is a pooling, -1 one that keeps the size. The last convolution is 1 x 1.
        plans = ((1, 0, 2, 0, 1, 8, 4, 0, 8, 0, 16), (0, 32, -1, 64, 16))
        channels, self.stages = in_channels, nn.ModuleList()
        for number, plan in enumerate(plans):
            own, layers = still if number < frozen else norm, []
            for width in plan:
                if width == 0:
                    layers.append(nn.MaxPool2d(2, 2))
                elif width < 0:
                    layers.append(nn.MaxPool2d(3, 1, 1))
                else:
                    kernel = 1 if number == 1 and width == 16 else 3
                    layers.append(ConvNorm(channels, width * base, kernel, norm=own, eps=eps, leaky=SLOPE))
                    channels = width * base
            self.stages.append(nn.Sequential(*layers))
        self.channels, self.strides = [16 * base, 16 * base], [16, 32]
        freeze(list(self.stages), frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the levels of strides 16 and 32."""
        fine = self.stages[0](x)
        return [fine, self.stages[1](fine)]


def _build(spec: Backbone, in_channels: int, use: Use) -> nn.Module:
    kind, base = (Darknet, 32) if spec.name == "darknet53" else (DarknetTiny, 16)
    return kind(base=spec.width or base, in_channels=in_channels, norm=spec.norm, eps=spec.eps, frozen=spec.frozen)


def _levels(spec: Backbone, use: Use) -> Levels:
    if spec.name == "darknet-tiny":
        return Levels((16 * (spec.width or 16),) * 2, (16, 32))
    return Levels(tuple((spec.width or 32) * 2**n for n in range(1, 6)), (2, 4, 8, 16, 32))


FAMILY = Family(
    names=("darknet53", "darknet-tiny"),
    options=frozenset(("width", "norm", "norm_eps", "frozen")),
    levels=_levels,
    build=_build,
)
