"""Feature Pyramid Network (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm


class FPN(nn.Module):
    """A level for each input, finest first, and one more: the coarsest sub-sampled by two.

    upsample  "double": by exactly two, which needs inputs of a multiple of 32 (detectron2);
              "fit": to the size of the finer level (torchvision)
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int = 256,
        *,
        norm: Norm = "none",
        eps: float = 1e-5,
        upsample: Literal["double", "fit"] = "double",
    ):
        super().__init__()
        self.upsample = upsample
        self.lateral = nn.ModuleList(ConvNorm(c, channels, 1, norm=norm, eps=eps) for c in channels_in)
        self.output = nn.ModuleList(ConvNorm(channels, channels, 3, norm=norm, eps=eps) for _ in channels_in)
        for layer in [*self.lateral, *self.output]:
            assert isinstance(layer, ConvNorm)
            nn.init.kaiming_uniform_(layer.conv.weight, a=1)

    def forward(self, features: Sequence[Float[Tensor, "b _c _h _w"]]) -> list[Tensor]:
        top = self.lateral[-1](features[-1])
        levels = [self.output[-1](top)]
        for lateral, output, feature in zip(
            reversed(self.lateral[:-1]), reversed(self.output[:-1]), reversed(features[:-1]), strict=True
        ):
            side = lateral(feature)
            if self.upsample == "double":
                top = side + functional.interpolate(top, scale_factor=2.0, mode="nearest")
            else:
                top = side + functional.interpolate(top, size=side.shape[-2:], mode="nearest")
            levels.insert(0, output(top))
        return [*levels, functional.max_pool2d(levels[-1], 1, 2)]
