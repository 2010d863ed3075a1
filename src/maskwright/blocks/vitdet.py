"""The image encoder of Segment Anything: a plain vision transformer as in ViTDet (arXiv 2203.16527), and its neck.

Most blocks attend inside windows, a few everywhere. Every block adds decomposed relative positions (arXiv 2112.01526)
to its attention. Feature maps are (B, H, W, C) between the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.layers import ConvNorm, LayerNorm2d, Norm
from maskwright.ops.partition import from_windows, to_windows

BIAS_BYTES = 96 << 20  # of relative positions that are held at a time, without gradients


class RelativeAttention(nn.Module):
    """Self-attention of the cells of a map, with a bias for each distance of rows and of columns.

    The bias of a query q and a key at dy, dx is q . rows[dy] + q . columns[dx], where q is not scaled.

    Args:
        width: Channels.
        heads: Attention heads.
        side: Side of the map that the tables are made for; they are resampled for others. 0: without tables.
    """

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.rows = nn.Parameter(torch.zeros(2 * side - 1, width // heads)) if side else None
        self.columns = nn.Parameter(torch.zeros(2 * side - 1, width // heads)) if side else None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Returns the result of the attention."""
        _, height, width, _ = x.shape
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # (B, heads, H W, C / heads)
        if self.rows is None or self.columns is None:
            found = functional.scaled_dot_product_attention(q, k, v)
            return self.output(found.transpose(1, 2).flatten(2).unflatten(1, (height, width)))
        down, across = distances(self.rows, height), distances(self.columns, width)  # (H, H, c), (W, W, c)
        grid = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, down)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, across)
        count = height
        if not torch.is_grad_enabled() or not q.requires_grad:  # rows of queries at a time, so that the bias is small
            row = q.shape[0] * q.shape[1] * width * height * width * q.element_size()
            count = max(1, min(height, BIAS_BYTES // row))
        parts: list[Tensor] = []
        for first in range(0, height, count):
            part = slice(first, first + count)
            bias = by_row[:, :, part, :, :, None] + by_column[:, :, part, :, None]  # (B, heads, h, W, H, W)
            queries = q if count == height else grid[:, :, part].flatten(2, 3)
            parts.append(
                functional.scaled_dot_product_attention(queries, k, v, attn_mask=bias.flatten(2, 3).flatten(3))
            )
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return self.output(joined.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


def distances(table: Float[Tensor, "n c"], length: int) -> Float[Tensor, "{length} {length} c"]:
    """The rows of a table of relative positions for each pair of cells of an axis; resampled if it has another size."""
    if len(table) != 2 * length - 1:
        table = functional.interpolate(table.T[None].float(), 2 * length - 1, mode="linear")[0].T.to(table.dtype)
    place = torch.arange(length, device=table.device)
    return table[place[:, None] - place + length - 1]


class ViTDetBlock(nn.Module):
    """Attention and MLP, each after a norm and added to its input.

    Args:
        width: Channels.
        heads: Attention heads.
        window: Side of the windows; 0 to attend everywhere.
        side: Side of the map, for the tables of blocks without windows; 0: without tables of relative positions.
        hidden: Channels inside of the MLP.
    """

    def __init__(self, width: int, heads: int, window: int, side: int, hidden: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = RelativeAttention(width, heads, (window or side) if side else 0)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.expand, self.reduce = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Runs the block. What is appended to fill windows is zero after the norm and takes part in the attention."""
        size, y = (x.shape[1], x.shape[2]), self.norm1(x)
        if self.window:
            y = from_windows(self.attention(to_windows(y, self.window)), size)
        else:
            y = self.attention(y)
        x = x + y
        return x + self.reduce(functional.gelu(self.expand(self.norm2(x))))


class Neck(nn.Sequential):
    """Reduces features (B, C, H, W) to the channels of the image embedding."""

    def __init__(self, channels: int, width: int):
        super().__init__(
            nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width),
        )  # fmt: skip


class ViTDet(nn.Module):
    """The image encoder.

    Args:
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        window: Side of the windows in patches.
        everywhere: The blocks that attend everywhere.
        patch: Side of a patch in pixels.
        side: Patches along a side of the tables of positions.
        neck_width: Channels of the embedding.
        hidden: Channels inside of an MLP.
        in_channels: Channels of images.
        relative: Whether attention has relative positions.
        checkpointing: Whether blocks are computed again for the gradients.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        *,
        window: int = 14,
        everywhere: Sequence[int] = (2, 5, 8, 11),
        patch: int = 16,
        side: int = 64,
        neck_width: int = 256,
        hidden: int | None = None,
        in_channels: int = 3,
        relative: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.patches: nn.Module = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(1, side, side, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(
            ViTDetBlock(
                width, heads, 0 if number in everywhere else window, side if relative else 0, hidden or 4 * width
            )
            for number in range(depth)
        )
        self.neck = Neck(width, neck_width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Computes the image embedding."""
        return self.neck(self.tokens(self.patches(images)).permute(0, 3, 1, 2))

    def tokens(self, patches: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w c"]:
        """Adds positions to embedded patches and runs the blocks."""
        x = patches.permute(0, 2, 3, 1)
        x = x + positions_at(self.positions, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def positions_at(table: Float[Tensor, "1 s t c"], size: tuple[int, int]) -> Float[Tensor, "1 {size[0]} {size[1]} c"]:
    """A table of positions, resampled bicubically if it is of another size, with anti-aliasing if it is larger."""
    own = (table.shape[1], table.shape[2])
    if own == size:
        return table
    smaller = size[0] < own[0] or size[1] < own[1]
    moved = functional.interpolate(
        table.permute(0, 3, 1, 2).float(), size, mode="bicubic", align_corners=False, antialias=smaller
    )
    return moved.permute(0, 2, 3, 1).to(table.dtype)


# ---- with convolutions first -----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3 x 3 convolutions, added to the input."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.first = ConvNorm(channels, channels, norm=norm, relu=True)
        self.second = ConvNorm(channels, channels, norm=norm)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the refined map."""
        return functional.relu(x + self.second(self.first(x)))


class ConvViTDet(ViTDet):
    """The image encoder with convolutions in place of the patch embedding, which learns from few images.

    Convolutions of stride 2 lead to `width` channels at 1/16 of the resolution, with residual blocks at 1/4 and 1/8.
    The maps at these resolutions are given to the mask decoder too (as in SAM 2).

    Args:
        width: Channels of the blocks.
        depth: Number of blocks.
        heads: Attention heads.
        stem: Channels at 1/2, 1/4 and 1/8 of the resolution.
        finer: Channels of the maps for the decoder at 1/4 and 1/8 of the resolution.
        norm: Normalisation of the convolutions.
        **options: See `ViTDet`.
    """

    def __init__(
        self, width: int, depth: int, heads: int, *, stem: Sequence[int], finer: Sequence[int], in_channels: int = 3,
        norm: Norm = "batch", **options: Any,
    ):  # fmt: skip
        super().__init__(width, depth, heads, in_channels=in_channels, **options)
        half, quarter, eighth = stem
        self.quarter = nn.Sequential(
            ConvNorm(in_channels, half, stride=2, norm=norm, relu=True),
            ConvNorm(half, quarter, stride=2, norm=norm, relu=True),
            Residual(quarter, norm),
        )
        self.eighth = nn.Sequential(
            ConvNorm(quarter, eighth, stride=2, norm=norm, relu=True), Residual(eighth, norm), Residual(eighth, norm)
        )
        self.patches = ConvNorm(eighth, width, stride=2, norm=norm)
        self.finer = nn.ModuleList(
            nn.Conv2d(before, after, 1) for before, after in zip((quarter, eighth), finer, strict=True)
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - finer maps too
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b d _h _w"], Float[Tensor, "b e _i _j"], Float[Tensor, "b f _k _l"]]:
        """Computes the image embedding, and finer maps at 1/4 and 1/8 of the resolution."""
        quarter = self.quarter(images)
        eighth = self.eighth(quarter)
        image = self.neck(self.tokens(self.patches(eighth)).permute(0, 3, 1, 2))
        return image, self.finer[0](quarter), self.finer[1](eighth)
