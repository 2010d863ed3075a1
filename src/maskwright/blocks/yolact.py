"""The prototype branch and the prediction head of YOLACT (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm
from maskwright.errors import UsageError
from maskwright.options import OptionGroup


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
        """Returns the prototypes."""
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


SIDES = (24, 48, 96, 192, 384)  # of the anchors on P3 ... P7, for inputs of 550 pixels


@dataclass(frozen=True)
class Anchors(OptionGroup):
    """The anchors of every location of the pyramid: one for each octave and ratio.

    Attributes:
        sides: Side s of the anchors on P3 ... P7, in pixels of the canvas; None scales 24, 48, 96, 192 and 384, which
            are those for 550 pixels, with the canvas.
        ratios: Aspect ratios r.
        octaves: Anchors of sides s, 2^(1/octaves) s, 2^(2/octaves) s, ... below 2 s.
        square: Whether width and height are both s sqrt(r), as in the published code, or s sqrt(r) and s / sqrt(r).
    """

    label: ClassVar[str] = "anchors"

    sides: Sequence[float] | None = None
    ratios: Sequence[float] = (1.0, 0.5, 2.0)
    octaves: int = 1
    square: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sides is not None and (len(self.sides) != 5 or not min(self.sides) > 0):
            raise UsageError(f"anchors.sides must be five numbers above 0, for P3 ... P7, got {list(self.sides)}")
        if not self.ratios or not min(self.ratios) > 0:
            raise UsageError(f"anchors.ratios must be at least one number, all above 0, got {list(self.ratios)}")
        if self.octaves < 1:
            raise UsageError(f"anchors.octaves must be at least 1, got {self.octaves}")

    def __len__(self) -> int:
        return len(self.ratios) * self.octaves

    def shapes(self, canvas: tuple[int, int]) -> list[list[tuple[float, float]]]:
        """Width and height of each level's anchors as shares of the canvas (height, width), octave by octave."""
        height, width = canvas
        sides = [max(1, side * min(canvas) // 550) for side in SIDES] if self.sides is None else self.sides
        result: list[list[tuple[float, float]]] = []
        for side in sides:
            scales = [side * 2 ** (octave / self.octaves) for octave in range(self.octaves)]
            result.append(
                [
                    (scale / width * ratio**0.5, scale / height * (ratio**0.5 if self.square else ratio**-0.5))
                    for scale in scales
                    for ratio in self.ratios
                ]
            )
        return result
