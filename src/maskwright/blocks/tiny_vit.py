"""TinyViT (arXiv 2207.10666) as the image encoder of MobileSAM (arXiv 2306.14289).

Convolutions at 1/4 of the resolution, then three stages of attention inside windows. The last stage keeps the
resolution of the one before, 1/16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.vitdet import Neck
from maskwright.ops.partition import from_windows, to_windows


class InvertedBlock(nn.Module):
    """Inverted bottleneck with GELU, which also follows the sum with the input."""

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        inner = channels * expansion
        self.expand = ConvNorm(channels, inner, 1, norm="batch")
        self.depthwise = ConvNorm(inner, inner, 3, groups=inner, norm="batch")
        self.reduce = ConvNorm(inner, channels, 1, norm="batch")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the refined map."""
        inner = functional.gelu(self.depthwise(functional.gelu(self.expand(x))))
        return functional.gelu(x + self.reduce(inner))


class Merging(nn.Module):
    """Changes the number of channels, and the resolution by `stride`."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.project = ConvNorm(before, after, 1, norm="batch")
        self.depthwise = ConvNorm(after, after, 3, stride=stride, groups=after, norm="batch")
        self.output = ConvNorm(after, after, 1, norm="batch")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Returns the map of the next stage."""
        return self.output(functional.gelu(self.depthwise(functional.gelu(self.project(x)))))


class BiasedAttention(nn.Module):
    """Self-attention of the cells of a window, after a norm, with a bias for each absolute distance in y and x.

    Args:
        width: Channels.
        heads: Attention heads.
        window: Side of a window.
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)  # for each head its q, k and v
        self.output = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, window**2))

    def forward(self, x: Float[Tensor, "n s s c"]) -> Float[Tensor, "n s s c"]:
        """Returns the result of the attention. The bias is computed from the parameter in each call."""
        qkv = self.qkv(self.norm(x)).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)  # (N, heads, S S, C / heads)
        cell = torch.arange(self.window, device=x.device)
        apart = (cell[:, None] - cell).abs()  # (S, S)
        index = apart[:, None, :, None] * self.window + apart[None, :, None, :]  # (S, S, S, S)
        bias = self.bias[:, index.flatten(0, 1).flatten(1)]
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.output(found.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


class TinyViTBlock(nn.Module):
    """Attention inside windows, a depthwise convolution, and an MLP.

    Windows are padded with zeros before the norm, which makes them its bias; they take part in the attention.
    """

    def __init__(self, width: int, heads: int, window: int, expansion: int = 4):
        super().__init__()
        self.window = window
        self.attention = BiasedAttention(width, heads, window)
        self.depthwise = ConvNorm(width, width, 3, groups=width, norm="batch")
        self.norm = nn.LayerNorm(width)
        self.expand, self.reduce = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the refined map."""
        cells = x.permute(0, 2, 3, 1)
        size = (x.shape[2], x.shape[3])
        cells = cells + from_windows(self.attention(to_windows(cells, self.window)), size)
        x = self.depthwise(cells.permute(0, 3, 1, 2))
        cells = self.reduce(functional.gelu(self.expand(self.norm(x.permute(0, 2, 3, 1)))))
        return x + cells.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of one resolution, then the change to the next one, if there is one."""

    def __init__(self, blocks: Sequence[nn.Module], merging: nn.Module | None):
        super().__init__()
        self.blocks, self.merging = nn.ModuleList(blocks), merging

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _d _h _w"]:
        """Returns the map for the next stage."""
        for block in self.blocks:
            x = block(x)
        return x if self.merging is None else self.merging(x)


class TinyViT(nn.Module):
    """The image encoder.

    Args:
        widths: Channels of the four stages.
        depths: Blocks of the stages.
        heads: Attention heads of the last three stages.
        windows: Sides of their windows.
        neck_width: Channels of the embedding.
        in_channels: Channels of images.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (4, 5, 10),
        windows: Sequence[int] = (7, 14, 7),
        *,
        neck_width: int = 256,
        in_channels: int = 3,
    ):
        super().__init__()
        first = widths[0]
        self.stem = nn.ModuleList([
            ConvNorm(in_channels, first // 2, 3, stride=2, norm="batch"),
            ConvNorm(first // 2, first, 3, stride=2, norm="batch"),
        ])  # fmt: skip
        strides = (2, 2, 1)
        mergings = [Merging(a, b, s) for (a, b), s in zip(pairwise(widths), strides, strict=True)]
        self.stages = nn.ModuleList([Stage([InvertedBlock(first) for _ in range(depths[0])], mergings[0])])
        for number in (1, 2, 3):
            shape = widths[number], heads[number - 1], windows[number - 1]
            blocks = [TinyViTBlock(*shape) for _ in range(depths[number])]
            self.stages.append(Stage(blocks, mergings[number] if number < 3 else None))
        self.neck = Neck(widths[-1], neck_width)
        for module in self.stages.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Computes the image embedding."""
        x = self.stem[1](functional.gelu(self.stem[0](images)))
        for stage in self.stages:
            x = stage(x)
        return self.neck(x)
