"""Attention and the layers of encoders and decoders in DETR's manner: each part's answer is added to its input, then
normalised ("post-norm"); positions are added to queries and keys, never to values. Tokens are (B, N, C)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention; `dropout` acts on its weights."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b m c"],
        value: Float[Tensor, "b m c"],
        allowed: Bool[Tensor, "b _h _n m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """allowed  True where a query may look, broadcast over heads and queries; every query needs a key somewhere"""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )  # (B, heads, N, C / heads)
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.output(found.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Tokens look at each other."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        positions: Float[Tensor, "_b n c"] | None = None,
        allowed: Bool[Tensor, "b _h _n n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        placed = x if positions is None else x + positions
        return self.norm(x + self.drop(self.attention(placed, placed, x, allowed)))


class CrossAttention(nn.Module):
    """Tokens look at a memory. `keys` is the memory with its positions added."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"],
        keys: Float[Tensor, "b m c"],
        positions: Float[Tensor, "_b n c"] | None = None,
        allowed: Bool[Tensor, "b _h _n m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        placed = x if positions is None else x + positions
        return self.norm(x + self.drop(self.attention(placed, keys, memory, allowed)))


class FeedForward(nn.Module):
    """Each token by itself: `hidden` channels wide, and back."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, activation: Literal["relu", "gelu"] = "relu"):
        super().__init__()
        self.expand, self.reduce = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.activation = functional.relu if activation == "relu" else functional.gelu
        for layer in (self.expand, self.reduce):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.norm(x + self.drop(self.reduce(self.drop(self.activation(self.expand(x))))))


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        positions: Float[Tensor, "_b n c"] | None = None,
        allowed: Bool[Tensor, "b _h _n n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        return self.feed_forward(self.self_attention(x, positions, allowed))


class DecoderLayer(nn.Module):
    """Queries look at each other and at the memory, then feed-forward.

    cross_first  they look at the memory first, as in Mask2Former; otherwise at each other, as in DETR
    """

    def __init__(self, width: int, hidden: int, heads: int = 8, dropout: float = 0.0, *, cross_first: bool = False):
        super().__init__()
        self.cross_first = cross_first
        self.self_attention = SelfAttention(width, heads, dropout)
        self.cross_attention = CrossAttention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"],
        keys: Float[Tensor, "b m c"],
        positions: Float[Tensor, "_b n c"] | None = None,
        allowed: Bool[Tensor, "b _h _n m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """`allowed` says where in the memory each query may look."""
        if not self.cross_first:
            x = self.self_attention(x, positions)
        x = self.cross_attention(x, memory, keys, positions, allowed)
        if self.cross_first:
            x = self.self_attention(x, positions)
        return self.feed_forward(x)


class MLP(nn.Module):
    """Linear layers of these widths with ReLU between them."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
        for number, layer in enumerate(self.layers):
            x = layer(functional.relu(x) if number else x)
        return x
