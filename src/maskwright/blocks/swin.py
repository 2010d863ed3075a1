"""Swin Transformer (arXiv 2103.14030): attention inside windows, shifted by half a window in every other block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.errors import UsageError

# width, blocks of each stage, heads of each stage, window; "base" and "large" as pre-trained at 384 x 384
SWINS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}
APART = -100.0  # added to the attention score of two cells that are neighbours only because of the shift


class WindowAttention(nn.Module):
    """Attention among the cells of each window, with a learned bias for every relative position."""

    places: Tensor

    def __init__(self, width: int, window: int, heads: int):
        super().__init__()
        self.window, self.heads = window, heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        rows, columns = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("places", rows * (2 * window - 1) + columns, persistent=False)

    def forward(
        self, x: Float[Tensor, "b h w c"], apart: Float[Tensor, "v n n"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """Attends inside each window.

        Args:
            x: Cells; height and width are multiples of the window.
            apart: Values that are added to the scores inside each of V windows.
        """
        batch, height, width, channels = x.shape
        window, (down, across) = self.window, (height // self.window, width // self.window)
        parts = x.view(batch, down, window, across, window, channels).transpose(2, 3)
        qkv = self.qkv(parts.reshape(batch, down * across, window * window, channels))
        # Windows and heads share an axis: both are independent problems of attention.
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        bias = self.table[self.places.flatten()].view(*self.places.shape, -1).permute(2, 0, 1)  # (heads, n, n)
        every = bias.expand(down * across, -1, -1, -1) if apart is None else bias + apart[:, None].to(bias.dtype)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=every.reshape(1, -1, *bias.shape[1:]))
        found = found.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3)  # (B, windows, n, C)
        found = self.output(found).view(batch, down, across, window, window, channels)
        return found.transpose(2, 3).reshape(x.shape)


class SwinBlock(nn.Module):
    """Window attention and an MLP, each with a norm before it and a shortcut around it."""

    def __init__(self, width: int, heads: int, window: int, shift: int, drop_path: float):
        super().__init__()
        self.window, self.shift, self.drop_path = window, shift, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, window, heads)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "b h w c"], apart: Float[Tensor, "v n n"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """Returns a map of the same shape."""
        height, width = x.shape[1:3]
        y = functional.pad(self.norm1(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attention(y, apart if self.shift else None)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + stochastic_depth(y[:, :height, :width], self.drop_path, "row", self.training)
        y = self.reduce(functional.gelu(self.expand(self.norm2(x))))
        return x + stochastic_depth(y, self.drop_path, "row", self.training)


class Merge(nn.Module):
    """Merges 2 x 2 cells into one of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b _h _w d"]:
        """Returns the map of half the resolution; odd sides are padded with zeros."""
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduce(self.norm(x))


class Swin(nn.Module):
    """A backbone with levels of strides 4, 8, 16 and 32, each normalised by its own layer."""

    def __init__(
        self,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        *,
        in_channels: int = 3,
        drop_path: float = 0.0,
        frozen: int = 0,
    ):
        """
        Args:
            width: Channels of the first stage; each further stage has twice as many.
            depths: Blocks of each stage.
            heads: Attention heads of each stage.
            window: Side of a window in cells.
            in_channels: Channels of the images.
            drop_path: Probability that the last block is skipped in training; it rises to that from 0 in the first
                block (stochastic depth).
            frozen: Number of parts that are not trained, counted from the patch embedding.
        """
        super().__init__()
        self.window, self.patch = window, 4
        self.stem = nn.Conv2d(in_channels, width, self.patch, self.patch)
        self.stem_norm = nn.LayerNorm(width)
        self.stages, self.merges, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        rates = [drop_path * number / max(1, sum(depths) - 1) for number in range(sum(depths))]
        self.channels = [width * 2**number for number in range(len(depths))]
        self.strides = [4 * 2**number for number in range(len(depths))]
        for number, (channels, depth, count) in enumerate(zip(self.channels, depths, heads, strict=True)):
            blocks = [
                SwinBlock(channels, count, window, window // 2 if index % 2 else 0, rates.pop(0))
                for index in range(depth)
            ]
            self.stages.append(nn.ModuleList(blocks))
            self.norms.append(nn.LayerNorm(channels))
            if number + 1 < len(depths):
                self.merges.append(Merge(channels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        parts: list[nn.Module] = [nn.ModuleList([self.stem, self.stem_norm])]
        for number, stage in enumerate(self.stages):
            parts.append(nn.ModuleList([stage, *([self.merges[number - 1]] if number else [])]))
        freeze(parts, frozen)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the normalised levels, finest first."""
        x = functional.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))  # (B, H/4, W/4, C)
        outputs: list[Tensor] = []
        for number, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            x = self.merges[number - 1](x) if number else x
            apart = self.apart(x.shape[1], x.shape[2], x.device)
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues]
                x = block(x, apart)
            outputs.append(norm(x).permute(0, 3, 1, 2))
        return outputs

    def apart(self, height: int, width: int, device: torch.device) -> Float[Tensor, "_v _n _n"]:
        """Values to add to the scores of shifted windows, so that cells from opposite borders of the map do not attend
        to each other."""
        window, bands = self.window, []
        for length in (height, width):
            padded = length + -length % window
            at = torch.arange(padded, device=device)
            band = (at >= padded - window).int() + (at >= padded - window // 2).int()
            bands.append(band.view(-1, window))
        region = bands[0][:, None, :, None] * 3 + bands[1][None, :, None, :]
        region = region.flatten(0, 1).flatten(1)  # (windows, n)
        return torch.where(region[:, :, None] == region[:, None], 0.0, APART)


def _shape(spec: Backbone) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    width, depths, heads, window = SWINS[spec.name.removeprefix("swin-")]
    if isinstance(spec.heads, int):
        raise UsageError("backbone.heads of a Swin Transformer must be a list of integers, one for each stage")
    return spec.width or width, tuple(spec.depths or depths), tuple(spec.heads or heads), spec.window or window


def _build(spec: Backbone, in_channels: int, use: Use) -> Swin:
    if use.dilated or use.deepest != 32:
        raise UsageError(f"backbone {spec.name!r} has levels of strides 4 to 32 and no dilated stages")
    return Swin(*_shape(spec), in_channels=in_channels, drop_path=spec.drop_path, frozen=spec.frozen)


def _levels(spec: Backbone, use: Use) -> Levels:
    width, depths, _, _ = _shape(spec)
    return Levels(tuple(width * 2**n for n in range(len(depths))), tuple(4 * 2**n for n in range(len(depths))))


FAMILY = Family(
    names=tuple(f"swin-{size}" for size in SWINS),
    options=frozenset(("width", "depths", "heads", "window", "drop_path", "frozen")),
    levels=_levels,
    build=_build,
)
