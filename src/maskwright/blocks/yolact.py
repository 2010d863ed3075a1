"""The prototype branch and the prediction head of YOLACT (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm


class PrototypeNet(nn.Module):
    """Computes prototypes from P3, at twice its resolution and at least 0 (figure 3).

    Args:
        channels: Channels of P3.
        prototypes: Number of prototypes.
    """

    def __init__(self, channels: int, prototypes: int):
        super().__init__()
        self.before = nn.Sequential(*(ConvNorm(channels, channels, relu=True) for _ in range(3)))
        self.after = ConvNorm(channels, channels, relu=True)
        self.output = nn.Conv2d(channels, prototypes, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k _h _w"]:
        x = functional.interpolate(self.before(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return functional.relu(self.output(self.after(x)))


class Head(nn.Module):
    """One convolution, then box, class and coefficients of each anchor; the same weights on all levels (figure 4).

    Args:
        channels: Channels of the pyramid.
        anchors: Number of anchors per location.
        classes: Number of classes, background included.
        prototypes: Number of coefficients.
    """

    def __init__(self, channels: int, anchors: int, classes: int, prototypes: int):
        super().__init__()
        self.tower = ConvNorm(channels, channels, relu=True)
        self.boxes = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        self.classes = nn.Conv2d(channels, anchors * classes, 3, padding=1)
        self.coefficients = nn.Conv2d(channels, anchors * prototypes, 3, padding=1)
        self.anchors = anchors

    def forward(self, levels: Sequence[Float[Tensor, "b c _h _w"]]) -> tuple[Tensor, Tensor, Tensor]:
        """Box offsets (B, P, 4), class logits (B, P, classes) and coefficients (B, P, prototypes) in [-1, 1]."""
        towers = [self.tower(level) for level in levels]
        deltas, logits, coefficients = (
            torch.cat([self._per_anchor(layer(x)) for x in towers], 1)
            for layer in (self.boxes, self.classes, self.coefficients)
        )
        return deltas, logits, coefficients.tanh()

    def _per_anchor(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b p _v"]:
        """A row for each anchor, location by location."""
        values = x.shape[1] // self.anchors
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)


def xavier(module: nn.Module) -> None:
    """Initialises a convolution as all layers outside of the backbone are; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
