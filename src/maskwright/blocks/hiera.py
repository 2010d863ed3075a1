"""Hiera (arXiv 2306.00989) with windowed position embeddings (arXiv 2311.05613), and the neck that SAM 2 puts on it.

A plain hierarchical vision transformer: attention inside windows, except in three blocks of the third stage. Between
stages the channels double, and the queries of the first block of a stage are max-pooled, which halves the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.errors import UsageError


class Shape(NamedTuple):
    """A published variant.

    Attributes:
        width: Channels of the first stage.
        heads: Attention heads of the first stage.
        depths: Blocks of each stage.
        everywhere: Numbers of the blocks, over all stages, that attend to the whole map.
        windows: Side of the windows of each stage, in cells.
        grid: Side of the table of positions.
    """

    width: int
    heads: int
    depths: tuple[int, ...]
    everywhere: tuple[int, ...]
    windows: tuple[int, ...]
    grid: int


HIERAS = {
    "tiny": Shape(96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), 7),
    "small": Shape(96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), 7),
    "base-plus": Shape(112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
    "large": Shape(144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), 7),
}


class HieraBlock(nn.Module):
    """Attention and an MLP, each with a norm before it and a shortcut around it.

    Args:
        width: Channels of the input.
        channels: Channels of the output. If there are more, the queries and the shortcut are max-pooled by 2.
        heads: Attention heads.
        window: Side of a window in cells of the input; 0: the whole map.
        drop_path: Probability that the block is skipped in training.
    """

    def __init__(self, width: int, channels: int, heads: int, window: int, drop_path: float = 0.0):
        super().__init__()
        self.heads, self.window, self.drop_path, self.pools = heads, window, drop_path, channels != width
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(channels, 1e-6)
        self.qkv, self.output = nn.Linear(width, 3 * channels), nn.Linear(channels, channels)
        self.expand, self.reduce = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.shortcut = nn.Linear(width, channels) if self.pools else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b _h _w d"]:
        """Returns the map; with half the resolution if the block pools."""
        y = self.norm1(x)
        if self.shortcut is not None:
            x = _pooled(self.shortcut(y))
        height, width = x.shape[1:3]
        x = x + stochastic_depth(self._attend(y)[:, :height, :width], self.drop_path, "row", self.training)
        y = self.reduce(functional.gelu(self.expand(self.norm2(x))))
        return x + stochastic_depth(y, self.drop_path, "row", self.training)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention inside windows. The padding at the bottom and the right takes part in it, as in SAM."""
        batch, height, width, _ = x.shape
        window, pool = (self.window, self.window), 2 if self.pools else 1
        if self.window:
            x = functional.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        else:
            window = (height, width)
        down, across = x.shape[1] // window[0], x.shape[2] // window[1]
        x = x.view(batch, down, window[0], across, window[1], -1).transpose(2, 3)
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, down, across, window, window, D)
        if self.pools:
            q = _pooled(q.flatten(0, 2))
        windows = batch * down * across
        q, k, v = (t.reshape(windows, -1, self.heads, t.shape[-1] // self.heads).transpose(1, 2) for t in (q, k, v))
        found = functional.scaled_dot_product_attention(q, k, v)
        found = self.output(found.transpose(1, 2).flatten(2))  # (B windows, cells, D)
        found = found.view(batch, down, across, window[0] // pool, window[1] // pool, -1)
        return found.transpose(2, 3).reshape(batch, down * window[0] // pool, across * window[1] // pool, -1)


class Hiera(nn.Module):
    """A backbone with levels of strides 4, 8, 16 and 32.

    Args:
        shape: Widths, depths and windows.
        in_channels: Channels of the images.
        drop_path: Probability that the last block is skipped in training; it rises to that from 0 in the first block.
        frozen: Number of parts that are not trained: the patch embedding, then the stages.
    """

    def __init__(self, shape: Shape, *, in_channels: int = 3, drop_path: float = 0.0, frozen: int = 0):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, shape.width, 7, 4, 3)
        self.position = nn.Parameter(torch.empty(shape.width, shape.grid, shape.grid))
        self.window_position = nn.Parameter(torch.empty(shape.width, shape.windows[0], shape.windows[0]))
        self.channels = [shape.width * 2**number for number in range(len(shape.depths))]
        self.strides = [4 * 2**number for number in range(len(shape.depths))]
        self.stages = nn.ModuleList()
        total = sum(shape.depths)
        number, before, window = 0, shape.width, shape.windows[0]
        for stage, (depth, channels) in enumerate(zip(shape.depths, self.channels, strict=True)):
            blocks: list[nn.Module] = []
            for _ in range(depth):  # the first block of a stage still has the windows of the stage before
                side = 0 if number in shape.everywhere else window
                rate = drop_path * number / max(1, total - 1)
                blocks.append(HieraBlock(before, channels, shape.heads * 2**stage, side, rate))
                number, before, window = number + 1, channels, shape.windows[stage]
            self.stages.append(nn.ModuleList(blocks))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.window_position, std=0.02)
        freeze([self.stem, *self.stages], frozen)
        if frozen:
            self.position.requires_grad_(False)
            self.window_position.requires_grad_(False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the levels, finest first. The image is padded with zeros to a multiple of 32."""
        x = functional.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32))
        x = self.stem(x)
        x = (x + self.positions(x.shape[2], x.shape[3])).permute(0, 2, 3, 1)  # (B, H/4, W/4, C)
        levels: list[Tensor] = []
        for stage in self.stages:
            for block in cast("nn.ModuleList", stage):
                x = block(x)
            levels.append(x.permute(0, 3, 1, 2))
        return levels

    def positions(self, height: int, width: int) -> Float[Tensor, "1 c {height} {width}"]:
        """The position embedding of a map: a resized table, and one of the windows of the first stage, repeated."""
        side = self.window_position.shape[2]
        whole = functional.interpolate(self.position[None], size=(height, width), mode="bicubic")
        return whole + self.window_position.repeat(1, -(-height // side), -(-width // side))[:, :height, :width]


class HieraNeck(nn.Module):
    """The pyramid of SAM 2: every level is projected; only the one of stride 16 receives the coarser one.

    Args:
        channels: Channels of the levels, finest first.
        width: Channels of the result.
    """

    def __init__(self, channels: Sequence[int], width: int = 256):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(own, width, 1) for own in channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Returns the levels, finest first."""
        found = [layer(level) for layer, level in zip(self.lateral, levels, strict=True)]
        found[-2] = found[-2] + functional.interpolate(found[-1], size=found[-2].shape[-2:], mode="nearest")
        return found


def _pooled(x: Tensor) -> Tensor:
    """A map (B, H, W, C) at half the resolution."""
    return functional.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


# ---- the family ------------------------------------------------------------------------------------------------------


def shape_of(spec: Backbone) -> Shape:
    """The variant that options stand for.

    With other depths, up to three blocks of the third stage attend to the whole map: its last one, and others evenly
    before it.
    """
    shape = HIERAS[spec.name.removeprefix("hiera-")]
    if spec.heads is not None and not isinstance(spec.heads, int):
        raise UsageError("backbone.heads of Hiera must be an integer, the number in the first stage")
    if spec.depths is not None and tuple(spec.depths) != shape.depths:
        if len(spec.depths) != 4:
            raise UsageError(f"backbone.depths of Hiera must be 4 integers, got {list(spec.depths)}")
        last, step = sum(spec.depths[:3]) - 1, max(1, spec.depths[2] // 3)
        shape = shape._replace(
            depths=tuple(spec.depths), everywhere=tuple(last - step * n for n in range(min(3, spec.depths[2])))
        )
    shape = shape._replace(width=spec.width or shape.width, heads=spec.heads or shape.heads)
    if shape.width % shape.heads:
        raise UsageError(f"backbone.width must be a multiple of backbone.heads ({shape.heads}), got {shape.width}")
    return shape


def _build(spec: Backbone, in_channels: int, use: Use) -> Hiera:
    return Hiera(shape_of(spec), in_channels=in_channels, drop_path=spec.drop_path, frozen=spec.frozen)


def _levels(spec: Backbone, use: Use) -> Levels:
    width = shape_of(spec).width
    return Levels(tuple(width * 2**n for n in range(4)), (4, 8, 16, 32))


FAMILY = Family(
    names=tuple(f"hiera-{size}" for size in HIERAS),
    options=frozenset(("width", "depths", "heads", "drop_path", "frozen")),
    levels=_levels,
    build=_build,
)
