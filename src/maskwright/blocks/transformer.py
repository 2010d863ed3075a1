"""Attention, and encoder and decoder layers as in DETR (arXiv 2005.12872).

The output of each part is added to its input, then normalised ("post-norm"). Positions are added to queries and keys,
not to values. Tokens are (B, N, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention; `dropout` is applied to the attention weights."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width must be a multiple of the number of heads, got {width} and {heads}")
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
        """Attends from `query` to `key`.

        Args:
            query: Tokens that attend.
            key: Tokens that are attended to.
            value: What is read from them.
            allowed: True where a query may attend to a key; broadcast over heads and queries. Every query needs at
                least one key.
        """
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )  # (B, heads, N, C / heads)
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.output(found.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Tokens attend to each other."""

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
        """Returns the tokens with the result of the attention added, normalised."""
        placed = x if positions is None else x + positions
        return self.norm(x + self.drop(self.attention(placed, placed, x, allowed)))


class CrossAttention(nn.Module):
    """Tokens attend to a memory; `keys` is the memory with its positions added."""

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
        """Returns the tokens with the result of the attention added, normalised."""
        placed = x if positions is None else x + positions
        return self.norm(x + self.drop(self.attention(placed, keys, memory, allowed)))


class FeedForward(nn.Module):
    """A network of two layers, applied to each token, with `hidden` channels inside."""

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
        """Returns the tokens with the output of the network added, normalised."""
        return self.norm(x + self.drop(self.reduce(self.drop(self.activation(self.expand(x))))))


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network."""

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
        """Returns the refined tokens."""
        return self.feed_forward(self.self_attention(x, positions, allowed))


class DecoderLayer(nn.Module):
    """Self-attention of the queries and attention to the memory, then the feed-forward network.

    Attributes:
        cross_first: The queries attend to the memory first, as in Mask2Former; otherwise to each other, as in DETR.
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
        """Runs the layer.

        Args:
            x: Queries.
            memory: What they attend to.
            keys: The memory with its positions added.
            positions: Positions of the queries.
            allowed: True where a query may attend to the memory; None: everywhere.
        """
        if not self.cross_first:
            x = self.self_attention(x, positions)
        x = self.cross_attention(x, memory, keys, positions, allowed)
        if self.cross_first:
            x = self.self_attention(x, positions)
        return self.feed_forward(x)


class MLP(nn.Module):
    """Linear layers of the given widths with an activation between them."""

    def __init__(self, widths: Sequence[int], activation: Literal["relu", "gelu"] = "relu"):
        super().__init__()
        self.activation = functional.relu if activation == "relu" else functional.gelu
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
        """Returns the output of the last layer."""
        for number, layer in enumerate(self.layers):
            x = layer(self.activation(x) if number else x)
        return x
