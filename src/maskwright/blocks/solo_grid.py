"""Network modules of the SOLO family: branches that predict a value for each cell of an S x S grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.fcos import output_conv
from maskwright.blocks.layers import ConvNorm, DeformConvNorm
from maskwright.errors import UsageError
from maskwright.options import OptionGroup

PRIOR = -math.log(99)  # bias of an output whose initial probability is 0.01


@dataclass(frozen=True)
class Head(OptionGroup):
    """The convolutions of the category branch and of the mask or kernel branch, as options of a system.

    Attributes:
        width: Channels of each convolution.
        convs: Number of 3 x 3 convolutions before the output.
        deform: Which of them are deformable.
        modulated: Whether the deformable ones are modulated (arXiv 1811.11168).
    """

    label: ClassVar[str] = "head"

    width: int = 256
    convs: int = 7
    deform: Literal["no", "last", "all"] = "no"
    modulated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "convs"):
            if getattr(self, name) < 1:
                raise UsageError(f"head.{name} must be at least 1, got {getattr(self, name)}")


HeadLike = Mapping[str, Any] | Head


class GridBranch(nn.Module):
    """Resizes a level to its grid, applies the convolutions of a head, and predicts `outputs` values for each cell.

    Args:
        channels_in: Channels of the level.
        head: The convolutions.
        outputs: Values for each cell.
        bias: Initial bias of the output.
        align: How a level is brought to the size of its grid (SOLO, section 3.2).
    """

    def __init__(
        self,
        channels_in: int,
        head: Head,
        outputs: int,
        *,
        bias: float = 0.0,
        align: Literal["interpolate", "pool"] = "interpolate",
    ):
        super().__init__()
        self.align = align
        self.convs = tower(channels_in, head)
        self.output = output_conv(head.width, outputs, bias)

    def forward(self, x: Float[Tensor, "b c h w"], grid: int) -> Float[Tensor, "b k s s"]:
        """Predicts the values of `grid` x `grid` cells."""
        if self.align == "pool":
            x = functional.adaptive_avg_pool2d(x, grid)
        else:  # two taps per axis, even if the level is much finer than the grid
            x = functional.interpolate(x, size=(grid, grid), mode="bilinear", align_corners=False)
        return self.output(self.convs(x))


def prepare_levels(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> list[Float[Tensor, "b c _h _w"]]:
    """Resizes P2 ... P6 of strides 4 ... 64 to strides 8, 8, 16, 32, 32 (SOLO's released code).

    The finest level is halved; the coarsest is resized to the size of the one before it.
    """
    finest = functional.interpolate(levels[0], scale_factor=0.5, mode="bilinear", align_corners=False)
    coarsest = functional.interpolate(levels[4], size=levels[3].shape[-2:], mode="bilinear", align_corners=False)
    return [finest, *levels[1:4], coarsest]


def coordinates(feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
    """x and y as channels (CoordConv, arXiv 1807.03247), from -1 in the first column or row to 1 in the last."""
    count, _, height, width = feature.shape
    x = _steps(width, feature.device).expand(height, width)
    y = _steps(height, feature.device)[:, None].expand(height, width)
    return torch.stack([x, y]).to(feature.dtype).expand(count, 2, height, width)


def tower(channels_in: int, head: Head) -> nn.Sequential:
    """The convolutions of a head: 3 x 3 with group norm and ReLU."""
    layers: list[nn.Module] = []
    for number in range(head.convs):
        deformable = head.deform == "all" or (head.deform == "last" and number == head.convs - 1)
        read = channels_in if number == 0 else head.width
        layers.append(conv_norm(read, head.width, 3, deformable, head.modulated))
    return nn.Sequential(*layers)


def conv_norm(channels_in: int, channels: int, kernel: int, deformable: bool, modulated: bool) -> nn.Module:
    """Convolution without bias, group norm and ReLU; weights are initialised from a normal distribution of std 0.01."""
    if deformable:
        layer = DeformConvNorm(channels_in, channels, kernel, modulated=modulated, norm="group", relu=True)
        nn.init.normal_(layer.weight, std=0.01)
        return layer
    layer = ConvNorm(channels_in, channels, kernel, norm="group", relu=True)
    nn.init.normal_(layer.conv.weight, std=0.01)
    return layer


def _steps(count: int, device: torch.device) -> Float[Tensor, " _n"]:
    """Equal steps from -1 to 1."""
    if torch.compiler.is_exporting():  # the number of steps of linspace would be fixed in the exported network
        steps = torch.arange(count, device=device, dtype=torch.float32)
        return 2 * steps / steps[-1:].clamp(min=1) - 1
    return torch.linspace(-1, 1, count, device=device)
