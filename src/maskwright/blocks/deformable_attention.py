"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1) in plain PyTorch.

A query is not compared with every cell of a feature map: it predicts a few sampling locations around its reference
point, on every level, and their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.transformer import FeedForward, SelfAttention

Shapes = Sequence[tuple[int, int]]
MARGIN = 2  # empty cells around each level, so that zeros are read beyond the border


def deformable_sample(
    values: Float[Tensor, "b s g d"],
    shapes: Shapes,
    locations: Float[Tensor, "b q g l p 2"],
    weights: Float[Tensor, "b q g l p"],
) -> Float[Tensor, "b q c"]:
    """Computes weighted sums of bilinear samples, for each of G heads.

    On the CPU the sums are taken over rows of a table of cells: 5 times as fast in the forward pass as sampling maps
    channel by channel, and 1.5 times as fast with the backward pass (22,000 queries, 3 levels, one core). On other
    devices, and in exported networks, whose runtimes sample maps as fast, maps are sampled.

    Args:
        values: The cells of L feature maps, one map after the other, each row by row.
        shapes: Height and width of each map, in cells.
        locations: x, y in [0, 1] of each level; zeros are read outside.
        weights: Weight of each location.

    Returns:
        The sums, with the heads concatenated: C = G * D.
    """
    by_rows = values.device.type == "cpu" and not torch.compiler.is_exporting()
    return (_by_rows if by_rows else _by_maps)(values, shapes, locations, weights)


def _by_maps(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Level by level, with `grid_sample`; half precision in float32, because 8 bits are too few for a location."""
    batch, _, heads, width = values.shape
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B G, Q, L, P, 2)
    share = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B G, 1, Q, L, P)
    total: Tensor | float = 0.0
    for level, (part, (h, w)) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w).to(dtype)
        samples = functional.grid_sample(maps, grid[:, :, level].to(dtype), align_corners=False)  # (B G, D, Q, P)
        total = total + (samples * share[:, :, :, level]).sum(-1)
    assert isinstance(total, Tensor)
    return total.view(batch, heads * width, -1).transpose(1, 2).to(values.dtype)


def _by_rows(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """With `embedding_bag`: a sample is a sum of four cells, and a bag holds those of one query and head."""
    batch, _, heads, width = values.shape
    dtype = values.dtype if values.dtype in (torch.float32, torch.float64) else torch.float32
    starts = [0]
    for h, w in shapes:
        starts.append(starts[-1] + (h + 2 * MARGIN) * (w + 2 * MARGIN))
    cells = starts.pop()
    maps = [
        functional.pad(part.to(dtype).reshape(batch, h, w, -1), (0, 0, MARGIN, MARGIN, MARGIN, MARGIN)).flatten(1, 2)
        for part, (h, w) in zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)
    ]
    table = torch.cat(maps, 1).reshape(-1, width)  # a row is a head of a cell
    size = torch.tensor([[w, h] for h, w in shapes], dtype=dtype)[:, None]  # (L, 1, 2)
    position = ((2 * locations.to(dtype) - 1 + 1) * size - 1) / 2  # rounded as grid_sample rounds it
    low = position.detach().floor()
    across, down = (position - low).unbind(-1)
    low = (low.clamp(min=-MARGIN).minimum(size) + MARGIN).to(torch.int32)
    row = torch.tensor([w + 2 * MARGIN for _, w in shapes], dtype=torch.int32)[:, None]  # (L, 1)
    first = (low[..., 1] * row + low[..., 0] + torch.tensor(starts, dtype=torch.int32)[:, None]) * heads
    first = first + torch.arange(heads, dtype=torch.int32)[:, None, None]
    first = first + (torch.arange(batch, dtype=torch.int32) * (cells * heads))[:, None, None, None, None]
    ones = torch.ones_like(row)
    steps = torch.stack([0 * ones, ones, row, row + 1], -1) * heads  # (L, 1, 4)
    lower = weights.to(dtype) * down
    upper = weights.to(dtype) - lower
    upper_right, lower_right = upper * across, lower * across
    share = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], -1)
    bags = locations.shape[1] * batch * heads
    sums = functional.embedding_bag(
        (first[..., None] + steps).view(bags, -1), table, per_sample_weights=share.view(bags, -1), mode="sum"
    )
    return sums.view(batch, -1, heads * width).to(values.dtype)


class DeformableAttention(nn.Module):
    """Attention to `points` sampling locations per head and level (equation 3).

    Args:
        width: Channels, a multiple of `heads`.
        heads: Attention heads.
        levels: Number of feature maps.
        points: Sampling locations of each head on each level.
    """

    def __init__(self, width: int = 256, heads: int = 8, levels: int = 3, points: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Each head starts with a direction of its own, in which point k is k + 1 cells away.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_((direction[:, None, None] * distance).expand(heads, levels, points, 2).flatten())

    def forward(
        self,
        query: Float[Tensor, "b q c"],
        references: Float[Tensor, "_b q _l _d"],
        values: Float[Tensor, "b s c"],
        shapes: Shapes,
        padding: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """Computes the attention.

        Args:
            query: Queries, with their positions added.
            references: Reference of each query on each level (or one for all levels), in [0, 1] of the level: points x,
                y, from which offsets count cells, or boxes cx, cy, w, h, of which `points` offsets reach half the size.
            values: The cells of the levels, one level after the other.
            shapes: Height and width of each level, in cells.
            padding: True for cells that are padding, which are read as zeros.
        """
        batch, count, _ = query.shape
        value = self.value(values)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(2, (self.heads, -1))  # (B, S, G, D)
        offsets = self.offsets(query).view(batch, count, self.heads, self.levels, self.points, 2)
        weights = self.weights(query).view(batch, count, self.heads, -1).softmax(-1)
        weights = weights.view(batch, count, self.heads, self.levels, self.points)
        centres = references[:, :, None, :, None, :2]
        if references.shape[-1] == 2:
            locations = centres + offsets / offsets.new_tensor([[w, h] for h, w in shapes])[:, None]
        else:
            locations = centres + offsets / self.points * references[:, :, None, :, None, 2:] * 0.5
        return self.output(deformable_sample(value, shapes, locations, weights))


def cell_centres(
    shapes: Shapes, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "s 2"]:
    """Centres of the cells of all levels, one level after the other: the reference points of an encoder's tokens.

    Args:
        shapes: Height and width of each level, in cells.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        x, y in [0, 1] of the level.
    """
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        levels.append(torch.stack([x[None].expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    return torch.cat(levels)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention of the tokens of all levels, then feed-forward; post-norm."""

    def __init__(
        self, width: int = 256, hidden: int = 1024, heads: int = 8, levels: int = 3, points: int = 4,
        dropout: float = 0.0, activation: Literal["relu", "gelu"] = "relu",
    ):  # fmt: skip
        super().__init__()
        self.attention = DeformableAttention(width, heads, levels, points)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)

    def forward(
        self,
        x: Float[Tensor, "b s c"],
        positions: Float[Tensor, "_b s c"],
        references: Float[Tensor, "_b s _l 2"],
        shapes: Shapes,
        padding: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s c"]:
        """Updates the tokens `x`, whose position codes are `positions`; see `DeformableAttention.forward`."""
        update = self.attention(x + positions, references, x, shapes, padding)
        return self.feed_forward(self.norm(x + self.drop(update)))


class DeformableDecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to a memory of several levels, feed-forward; post-norm."""

    def __init__(
        self, width: int = 256, hidden: int = 1024, heads: int = 8, levels: int = 4, points: int = 4,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        positions: Float[Tensor, "_b n c"],
        references: Float[Tensor, "_b n _l _d"],
        memory: Float[Tensor, "b s c"],
        shapes: Shapes,
        padding: Bool[Tensor, "b s"] | None = None,
        allowed: Bool[Tensor, "_b _h _n n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Updates the queries `x`, whose position codes are `positions`; see `DeformableAttention.forward`.

        `allowed` is True where a query (row) may attend to another one (column).
        """
        x = self.self_attention(x, positions, allowed)
        update = self.cross_attention(x + positions, references, memory, shapes, padding)
        return self.feed_forward(self.norm(x + self.drop(update)))
