"""Deep layer aggregation (arXiv 1707.06484): a backbone of trees, and necks that merge its levels at stride 4.

A stage is a binary tree of residual blocks. At the end of a tree a 1 x 1 convolution, the root, merges the outputs of
its two halves with features passed on from outer trees. CenterNet's neck (arXiv 1904.07850) repeatedly merges pairs of
neighbouring levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.blocks.layers import ConvNorm, DeformConvNorm, Norm
from maskwright.errors import UsageError

DEPTHS = {34: (1, 1, 1, 2, 2, 1)}  # of the levels of strides 1 ... 32: two of convolutions, then trees


class Block(nn.Module):
    """Two 3 x 3 convolutions, whose output is added to a given shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm, eps: float):
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels, 3, stride=stride, norm=norm, eps=eps, relu=True)
        self.conv2 = ConvNorm(channels, channels, 3, norm=norm, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b d _h _w"]) -> Float[Tensor, "b d _h _w"]:
        """Returns the sum of the convolutions' output and the shortcut, after ReLU."""
        return functional.relu(self.conv2(self.conv1(x)) + shortcut, inplace=True)


class Tree(nn.Module):
    """2 ** depth blocks. `passed`: channels of the features that outer trees pass on to the last root."""

    def __init__(self, depth: int, channels_in: int, channels: int, stride: int, passed: int, norm: Norm, eps: float):
        super().__init__()
        self.depth, self.stride = depth, stride
        self.root = self.shortcut = None
        if depth == 1:
            self.first = Block(channels_in, channels, stride, norm, eps)
            self.second = Block(channels, channels, 1, norm, eps)
            self.root = ConvNorm(2 * channels + passed, channels, 1, norm=norm, eps=eps, relu=True)
            if channels_in != channels:
                self.shortcut = ConvNorm(channels_in, channels, 1, norm=norm, eps=eps)
        else:
            self.first = Tree(depth - 1, channels_in, channels, stride, 0, norm, eps)
            self.second = Tree(depth - 1, channels, channels, 1, passed + channels, norm, eps)

    def forward(self, x: Float[Tensor, "b c h w"], passed: Sequence[Tensor] = ()) -> Float[Tensor, "b d _h _w"]:
        """Returns the output of the last root."""
        if self.root is None:
            first = self.first(x)
            return self.second(first, (*passed, first))
        side = x if self.stride == 1 else functional.max_pool2d(x, self.stride)
        first = self.first(x, side if self.shortcut is None else self.shortcut(side))
        return self.root(torch.cat([self.second(first, first), first, *passed], 1))


class DLA(nn.Module):
    """The backbone; its levels have strides 4, 8, 16 and 32."""

    def __init__(
        self, depth: int = 34, *, in_channels: int = 3, base: int = 16, norm: Norm = "batch", eps: float = 1e-5,
        frozen: int = 0,
    ):  # fmt: skip
        """
        Args:
            depth: A key of `DEPTHS`.
            in_channels: Channels of the image.
            base: Channels of the stem; levels have 1, 2, 4, ... 32 times as many.
            norm: Normalisation.
            eps: Its epsilon.
            frozen: Number of parts (stem, six levels) that are not trained; the statistics of their batch norms are
                fixed too.
        """
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"there is no DLA of depth {depth}; known are {', '.join(map(str, DEPTHS))}")
        depths, widths = DEPTHS[depth], [base * 2**n for n in range(6)]
        still: Norm = "frozen" if norm in ("batch", "still") else norm
        norms: list[Norm] = [still if number < frozen else norm for number in range(7)]  # of stem and levels
        self.stem = ConvNorm(in_channels, base, 7, norm=norms[0], eps=eps, relu=True)
        self.levels = nn.ModuleList()
        for number in range(2):
            convs = [
                ConvNorm(widths[max(0, number - 1)] if n == 0 else widths[number], widths[number], 3,
                         stride=1 + number if n == 0 else 1, norm=norms[number + 1], eps=eps, relu=True)
                for n in range(depths[number])
            ]  # fmt: skip
            self.levels.append(nn.Sequential(*convs))
        for number in range(2, 6):
            passed = widths[number - 1] if number > 2 else 0  # every tree but the first also receives its input
            self.levels.append(
                Tree(depths[number], widths[number - 1], widths[number], 2, passed, norms[number + 1], eps)
            )
        self.channels, self.strides = widths[2:], [4, 8, 16, 32]
        freeze([self.stem, *self.levels], frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the levels of strides 4, 8, 16 and 32."""
        x = self.levels[1](self.levels[0](self.stem(x)))  # (B, 2 base, H/2, W/2)
        x = self.levels[2](x)
        outputs = [x]
        for level in self.levels[3:]:
            x = level(x, (functional.max_pool2d(x, 2),))
            outputs.append(x)
        return outputs


def _layer(channels_in: int, channels: int, norm: Norm, eps: float, deformable: bool) -> nn.Module:
    if deformable:
        return DeformConvNorm(channels_in, channels, modulated=True, norm=norm, eps=eps, relu=True, bias=True)
    return ConvNorm(channels_in, channels, 3, norm=norm, eps=eps, relu=True, bias=True)


class Ladder(nn.Module):
    """Iterative aggregation of levels at the first one's size and channels: each level is projected, enlarged by its
    factor, added to the result so far, and smoothed."""

    def __init__(
        self, channels: int, channels_in: Sequence[int], factors: Sequence[int], *, norm: Norm, eps: float,
        deformable: bool,
    ):  # fmt: skip
        super().__init__()
        self.project = nn.ModuleList(_layer(c, channels, norm, eps, deformable) for c in channels_in)
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(channels, channels, 2 * f, f, f // 2, groups=channels, bias=False) for f in factors
        )
        self.merge = nn.ModuleList(_layer(channels, channels, norm, eps, deformable) for _ in channels_in)
        for layer, factor in zip(self.enlarge, factors, strict=True):
            assert isinstance(layer, nn.ConvTranspose2d)
            with torch.no_grad():
                layer.weight.copy_(_bilinear(factor))

    def forward(self, levels: Sequence[Float[Tensor, "b _c _h _w"]]) -> list[Tensor]:
        """The result after each level, all at the first one's size."""
        merged = [levels[0]]
        for level, project, enlarge, merge in zip(levels[1:], self.project, self.enlarge, self.merge, strict=True):
            merged.append(merge(enlarge(project(level)) + merged[-1]))
        return merged


def _bilinear(factor: int) -> Float[Tensor, "k k"]:
    """The kernel of side 2 f with which a transposed convolution of stride f is bilinear interpolation."""
    steps = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
    return steps[:, None] * steps


class DLAUp(nn.Module):
    """Merges the four levels of a DLA at stride 4, with the first level's channels (CenterNet's neck).

    Ladders of two, three and four levels give strides 16, 8 and 4, each from the results of the one before; a last one
    merges these three.
    """

    def __init__(self, channels: Sequence[int], *, norm: Norm = "batch", eps: float = 1e-5, deformable: bool = True):
        super().__init__()
        self.ladders = nn.ModuleList()
        for step in range(len(channels) - 1):
            target = channels[-step - 2]
            sources = [channels[-step - 1]] * (1 if step == 0 else step + 1)
            self.ladders.append(Ladder(target, sources, [2] * len(sources), norm=norm, eps=eps, deformable=deformable))
        factors = [2**n for n in range(1, len(channels) - 1)]
        self.last = Ladder(channels[0], channels[1:-1], factors, norm=norm, eps=eps, deformable=deformable)
        self.channels, self.stride = channels[0], 4

    def forward(self, levels: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b c h w"]:
        """Returns the merged map of stride 4."""
        levels, gathered = list(levels), []
        for step, ladder in enumerate(self.ladders):
            merged = ladder(levels[-step - 2 :])
            levels[-step - 1 :] = merged[1:]
            gathered.insert(0, merged[-1])
        return self.last(gathered)[-1]


class LightUp(nn.Module):
    """A light neck for any backbone: levels are enlarged and added, coarsest first; a 3 x 3 convolution follows."""

    def __init__(self, channels_in: Sequence[int], channels: int = 64, *, norm: Norm = "group", eps: float = 1e-5):
        super().__init__()
        self.lateral = nn.ModuleList(ConvNorm(c, channels, 1, norm=norm, eps=eps) for c in channels_in)
        self.output = ConvNorm(channels, channels, 3, norm=norm, eps=eps, relu=True)
        self.channels, self.stride = channels, 4

    def forward(self, levels: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b c h w"]:
        """Returns the merged map of stride 4."""
        x = self.lateral[-1](levels[-1])
        for lateral, level in zip(reversed(self.lateral[:-1]), reversed(levels[:-1]), strict=True):
            side = lateral(level)
            side += functional.interpolate(x, size=side.shape[-2:], mode="bilinear", align_corners=False)
            x = side
        return self.output(functional.relu(x, inplace=True))


def _build(spec: Backbone, in_channels: int, use: Use) -> DLA:
    if use.dilated or use.deepest != 32:
        raise UsageError(f"backbone {spec.name!r} has levels of strides 4 to 32 and no dilated stages")
    return DLA(
        int(spec.name[3:]), in_channels=in_channels, base=spec.width or 16, norm=spec.norm, eps=spec.eps,
        frozen=spec.frozen,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    return Levels(tuple((spec.width or 16) * 2**n for n in range(2, 6)), (4, 8, 16, 32))


FAMILY = Family(
    names=tuple(f"dla{depth}" for depth in DEPTHS),
    options=frozenset(("width", "norm", "norm_eps", "frozen")),
    levels=_levels,
    build=_build,
)
