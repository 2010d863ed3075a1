"""VGG backbones (Simonyan, Zisserman, arXiv 1409.1556): stages of 3 x 3 convolutions with pooling between them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.errors import UsageError

CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages with 2 x 2 max pooling between them, and none after the last; returns the outputs of all.

    Args:
        depth: 11, 13, 16 or 19.
        in_channels: Channels of the image.
        base: Channels of the first stage; the published networks have 64.
        dilated: Whether the last pooling does not stride and the last stage is dilated by 2 instead: stride 8, not 16.
        norm: Normalisation; "none" as published.
        eps: Epsilon of the normalisation.
        frozen: Number of stages that are not trained, counted from the first; nor do their batch norms' statistics
            change.

    Attributes:
        channels: Channels of the levels.
        strides: Strides of the levels.
    """

    def __init__(
        self,
        depth: int = 16,
        *,
        in_channels: int = 3,
        base: int = 64,
        dilated: bool = False,
        norm: Norm = "none",
        eps: float = 1e-5,
        frozen: int = 0,
    ):
        super().__init__()
        if depth not in CONVS:
            raise UsageError(f"there is no VGG of depth {depth}; known are {', '.join(map(str, CONVS))}")
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        self.dilated = dilated
        self.stages = nn.ModuleList()
        self.channels, self.strides = [], [1, 2, 4, 8, 8 if dilated else 16]
        before = in_channels
        for number, count in enumerate(CONVS[depth]):
            layers, width, own = [], base * min(2**number, 8), still if number < frozen else norm
            for _ in range(count):
                dilation = 2 if dilated and number == 4 else 1
                layers.append(ConvNorm(before, width, 3, dilation=dilation, norm=own, eps=eps, relu=True))
                before = width
            self.stages.append(nn.Sequential(*layers))
            self.channels.append(width)
        freeze(list(self.stages), frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the outputs of all stages, finest first."""
        outputs: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            if number == 4 and self.dilated:  # 2 x 2 without a stride keeps the size if one row and column are added
                x = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
            elif number:
                x = functional.max_pool2d(x, 2)
            x = stage(x)
            outputs.append(x)
        return outputs


def _build(spec: Backbone, in_channels: int, use: Use) -> VGG:
    return VGG(
        int(spec.name[3:]), in_channels=in_channels, base=spec.width or 64, dilated=use.deepest == 8, norm=spec.norm,
        eps=spec.eps, frozen=spec.frozen,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    widths = tuple((spec.width or 64) * min(2**n, 8) for n in range(5))
    return Levels(widths, (1, 2, 4, 8, use.deepest))


FAMILY = Family(
    names=tuple(f"vgg{depth}" for depth in CONVS),
    options=frozenset(("width", "norm", "norm_eps", "frozen")),
    levels=_levels,
    build=_build,
    deepest=(8, 16),  # 8: all five stages, the last one dilated
)
