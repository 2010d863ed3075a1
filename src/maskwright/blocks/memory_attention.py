"""The memory of SAM 2 (arXiv 2408.00714): attention from a frame to memories of earlier ones, and their encoder.

A memory is a map of few channels made from the features of a frame and the mask of an object in it. An object pointer
is a vector that the mask decoder gave for the object in a frame; it is read as several tokens of as many channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import LayerNorm2d
from maskwright.blocks.positions import sine_positions

# ---- rotary positions ------------------------------------------------------------------------------------------------


def rotary_table(
    size: tuple[int, int], width: int, *, theta: float = 10000.0, device: torch.device | str | None = None
) -> Float[Tensor, "2 n c"]:
    """Cosines and sines that rotate the pairs of channels of a map's cells (arXiv 2403.13298, axial frequencies).

    Args:
        size: Height and width of the map; its cells are numbered row by row.
        width: Channels, a multiple of 4. The first half of the pairs encodes the column, the second half the row.
        theta: Base of the frequencies.
        device: Device of the result.

    Returns:
        Cosine and sine for each of the H * W cells and each of the `width` / 2 pairs.
    """
    frequency = theta ** (-torch.arange(0, width, 4, device=device, dtype=torch.float32) / width)
    row = torch.arange(size[0], device=device, dtype=torch.float32)[:, None].expand(*size).flatten()
    column = torch.arange(size[1], device=device, dtype=torch.float32).expand(*size).flatten()
    angle = torch.cat([column[:, None] * frequency, row[:, None] * frequency], 1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Float[Tensor, "*b n c"], table: Float[Tensor, "2 n d"]) -> Float[Tensor, "*b n c"]:
    """Rotates each pair of neighbouring channels (2 i, 2 i + 1) of each token by its angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = table
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention with one head whose queries and keys are rotated.

    Args:
        width: Channels of the queries, and inside.
        source: Channels of keys and values.
        dropout: Dropout of the attention weights.
    """

    def __init__(self, width: int, source: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(source or width, width), nn.Linear(source or width, width)

    def forward(
        self,
        query: Float[Tensor, "_b n c"],
        key: Float[Tensor, "b m d"],
        value: Float[Tensor, "b m d"],
        table: Float[Tensor, "2 n e"],
        plain: int = 0,
    ) -> Float[Tensor, "b n c"]:
        """Attends from `query` to `key`.

        Args:
            query: Tokens of a map; one map for all keys, or one for each.
            key: Tokens of maps of the same size, one map after the other, and then `plain` others.
            value: What is read from them.
            table: Rotation of the tokens of a map.
            plain: Number of keys at the end that are not rotated.
        """
        q, k, v = rotate(self.query(query), table), self.key(key), self.value(value)
        maps = k[:, : k.shape[1] - plain].unflatten(1, (-1, q.shape[1]))
        k = torch.cat([rotate(maps, table).flatten(1, 2), k[:, k.shape[1] - plain :]], 1)
        dropout = self.dropout if self.training else 0.0
        q = q.expand(len(k), -1, -1)
        found = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], dropout_p=dropout)
        return self.output(found[:, 0])


# ---- attention to memories -------------------------------------------------------------------------------------------


class MemoryLayer(nn.Module):
    """Self-attention of a frame, attention to memories, and an MLP; each normalises its input ("pre-norm")."""

    def __init__(self, width: int, memory: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.self_attention = RotaryAttention(width, dropout=dropout)
        self.cross_attention = RotaryAttention(width, memory, dropout)
        self.expand, self.reduce = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "_b n c"],
        memory: Float[Tensor, "b m d"],
        keys: Float[Tensor, "b m d"],
        table: Float[Tensor, "2 n e"],
        plain: int,
    ) -> Float[Tensor, "b n c"]:
        """Returns the tokens of the frame for each memory; `keys` is the memory with its positions added."""
        y = self.norm1(x)
        x = x + self.drop(self.self_attention(y, y, y, table))
        x = x + self.drop(self.cross_attention(self.norm2(x), keys, memory, table, plain))
        return x + self.drop(self.reduce(self.drop(functional.relu(self.expand(self.norm3(x))))))


class MemoryAttention(nn.Module):
    """Conditions the features of a frame on memories and object pointers.

    Args:
        width: Channels of the features and of the pointers.
        memory: Channels of the memories; `width` is a multiple of it.
        hidden: Width inside the MLPs.
        layers: Number of layers.
        steps: Number of temporal embeddings.
        placed: Whether pointers have temporal positions (SAM 2.1).
        dropout: Dropout in training.
    """

    def __init__(
        self,
        width: int = 256,
        memory: int = 64,
        hidden: int = 2048,
        layers: int = 4,
        *,
        steps: int = 7,
        placed: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.memory = memory
        self.layers = nn.ModuleList(MemoryLayer(width, memory, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.step = nn.Parameter(torch.empty(steps, memory))
        nn.init.trunc_normal_(self.step, std=0.02)
        self.pointer_position = nn.Linear(width, memory) if placed else None

    def forward(
        self,
        features: Float[Tensor, "_b c h w"],
        memories: Float[Tensor, "b t d h w"],
        steps: Int[Tensor, " t"],
        pointers: Float[Tensor, "b p c"],
        distances: Float[Tensor, " p"],
    ) -> Float[Tensor, "b c h w"]:
        """Returns the conditioned features.

        Args:
            features: Features of the frame, one for all memories or one for each.
            memories: Memories of other frames, at least one.
            steps: The temporal embedding of each of them.
            pointers: Object pointers of other frames.
            distances: How many frames ago each pointer was made, divided by the greatest number that is used.
        """
        size = (features.shape[2], features.shape[3])
        table = rotary_table(size, features.shape[1], device=features.device)
        place = sine_positions(size, features.shape[1] // 2, device=features.device).to(features.dtype)
        x = (features + 0.1 * place).flatten(2).transpose(1, 2)  # (B, N, C)
        place = sine_positions(size, self.memory // 2, device=features.device).to(features.dtype)
        place = place[0].flatten(1).T + self.step[steps][:, None]  # (T, N, D)
        tokens = memories.flatten(3).transpose(2, 3).flatten(1, 2)  # (B, T N, D)
        parts = x.shape[2] // self.memory
        pieces = pointers.unflatten(2, (parts, self.memory)).flatten(1, 2)  # (B, 4 P, D)
        keys = tokens + place.flatten(0, 1)
        tokens, keys = torch.cat([tokens, pieces], 1), torch.cat([keys, pieces + self._when(distances, parts)], 1)
        for layer in self.layers:
            x = layer(x, tokens, keys, table, pieces.shape[1])
        return self.norm(x).transpose(1, 2).unflatten(2, size)

    def _when(self, distances: Tensor, parts: int) -> Tensor:
        """Positions of the tokens of pointers (4 P, D); zeros in SAM 2.0."""
        layer = self.pointer_position
        if layer is None:
            return distances.new_zeros(len(distances) * parts, self.memory, dtype=self.step.dtype)
        features = layer.in_features // 2  # all sines, then all cosines
        number = torch.arange(features, device=distances.device, dtype=torch.float32)
        angle = distances.float()[:, None] / 10000.0 ** (2 * number.div(2, rounding_mode="floor") / features)
        code = torch.cat([angle.sin(), angle.cos()], 1).to(layer.weight.dtype)
        return layer(code).repeat_interleave(parts, 0)


# ---- the encoder of memories -----------------------------------------------------------------------------------------


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 x 7 convolution and an MLP on each cell, with a shortcut (arXiv 2201.03545)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = LayerNorm2d(width)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns a map of the same shape."""
        y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        y = self.scale * self.reduce(functional.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class MemoryEncoder(nn.Module):
    """Makes a memory of the features of a frame and of a mask.

    Args:
        width: Channels of the features.
        memory: Channels of the memory.
        blocks: Number of ConvNeXt blocks.
        absent: Whether memories without the object are marked by an embedding (SAM 2.1).
    """

    def __init__(self, width: int = 256, memory: int = 64, blocks: int = 2, *, absent: bool = True):
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in pairwise((1, 4, 16, 64, 256)):
            stages += [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after), nn.GELU()]
        self.mask = nn.Sequential(*stages, nn.Conv2d(256, width, 1))
        self.features = nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width) for _ in range(blocks))
        self.output = nn.Conv2d(width, memory, 1)
        self.absent = nn.Parameter(torch.empty(memory)) if absent else None
        if self.absent is not None:
            nn.init.trunc_normal_(self.absent, std=0.02)

    def forward(
        self, features: Float[Tensor, "_b c h w"], masks: Float[Tensor, "b 1 hh ww"], present: Float[Tensor, "b 1"]
    ) -> Float[Tensor, "b d h w"]:
        """Returns the memories.

        Args:
            features: Features of the frame at stride 16, one for all masks or one for each.
            masks: Probability that each pixel of the input belongs to the object.
            present: 1 where the object is in the frame, 0 where it is not.
        """
        # The mask is scaled to -10 ... 10 as in the published networks.
        x = self.features(features) + self.mask(masks * 20.0 - 10.0)
        for block in cast("list[ConvNeXtBlock]", self.blocks):
            x = block(x)
        x = self.output(x)
        return x if self.absent is None else x + ((1 - present) * self.absent)[:, :, None, None]
