"""MobileNetV2 (arXiv 1801.04381): inverted residual blocks with depthwise convolutions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.blocks.layers import ConvNorm, Norm

# Expansion, channels, blocks and stride of each stage (table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
OUTPUTS = (3, 6, 13, 17)  # the blocks whose outputs are the levels, with the stem as block 0


class InvertedResidual(nn.Module):
    """1 x 1 to more channels, depthwise 3 x 3, 1 x 1 without activation; the input is added where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int, norm: Norm, eps: float):
        super().__init__()
        self.identity = stride == 1 and channels_in == channels
        hidden = channels_in * expansion
        self.expand = ConvNorm(channels_in, hidden, 1, norm=norm, eps=eps) if expansion > 1 else None
        self.depthwise = ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden, norm=norm, eps=eps)
        self.reduce = ConvNorm(hidden, channels, 1, norm=norm, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Applies the block."""
        y = x if self.expand is None else functional.relu6(self.expand(x))
        y = self.reduce(functional.relu6(self.depthwise(y)))
        return x + y if self.identity else y


class MobileNetV2(nn.Module):
    """The stem and 17 blocks; returns levels of strides 4, 8, 16 and 32.

    Args:
        in_channels: Channels of the image.
        base: Channels of the stem; published: 32. All other widths are proportional to it.
        norm: Normalisation.
        eps: Epsilon of the normalisation.
        frozen: Number of blocks, with the stem as the first, that are not trained; nor do their batch norms' statistics
            change.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels.
    """

    def __init__(
        self, *, in_channels: int = 3, base: int = 32, norm: Norm = "batch", eps: float = 1e-5, frozen: int = 0
    ):
        super().__init__()
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        self.stem = ConvNorm(in_channels, base, 3, stride=2, norm=still if frozen else norm, eps=eps)
        self.blocks = nn.ModuleList()
        channels = base
        for expansion, width, count, stride in STAGES:
            for position in range(count):
                own = still if len(self.blocks) + 1 < frozen else norm
                outputs = width * base // 32
                self.blocks.append(
                    InvertedResidual(channels, outputs, stride if position == 0 else 1, expansion, own, eps)
                )
                channels = outputs
        self.channels, self.strides = [width * base // 32 for width in (24, 32, 96, 320)], [4, 8, 16, 32]
        freeze([self.stem, *self.blocks], frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the levels, finest first."""
        x = functional.relu6(self.stem(x))
        outputs = []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in OUTPUTS:
                outputs.append(x)
        return outputs


def _build(spec: Backbone, in_channels: int, use: Use) -> MobileNetV2:
    base = spec.width or 32
    return MobileNetV2(in_channels=in_channels, base=base, norm=spec.norm, eps=spec.eps, frozen=spec.frozen)


def _levels(spec: Backbone, use: Use) -> Levels:
    return Levels(tuple(width * (spec.width or 32) // 32 for width in (24, 32, 96, 320)), (4, 8, 16, 32))


FAMILY = Family(
    names=("mobilenet-v2",),
    options=frozenset(("width", "norm", "norm_eps", "frozen")),
    levels=_levels,
    build=_build,
)
