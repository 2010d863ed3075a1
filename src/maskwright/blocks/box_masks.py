"""The networks of Mask Frozen-DETR (arXiv 2308.03747): from the features of a frozen detector to masks inside boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.deformable_attention import DeformableEncoderLayer, cell_centres
from maskwright.blocks.layers import GroupNorm
from maskwright.blocks.positions import sine_positions
from maskwright.blocks.transformer import CrossAttention, FeedForward, SelfAttention

QueryPart = Literal["objects", "box", "feed_forward"]


class ImageEncoder(nn.Module):
    """Image feature encoder: refines the detector's memory, upsamples it to stride 4 and adds the backbone's map.

    Args:
        memory: Channels of the detector's memory.
        fine: Channels of the backbone's map of stride 4.
        levels: Number of levels of the memory.
        width: Channels of the result.
        layers: Number of deformable encoder layers.
        hidden: Width inside their feed-forward part.
        heads: Attention heads.
        sampled: Sampling locations of each head on each level.
    """

    def __init__(
        self, memory: int, fine: int, levels: int, width: int, layers: int, hidden: int, heads: int, sampled: int
    ):
        super().__init__()
        self.levels = nn.Parameter(torch.randn(levels, memory), requires_grad=layers > 0)  # a code of each level
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(memory, hidden, heads, levels, sampled, activation="gelu") for _ in range(layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(fine, memory, 1, bias=False),
            GroupNorm(math.gcd(8, memory), memory),
        )
        self.mapper = nn.Conv2d(memory, width, 1)

    def forward(
        self,
        memory: Sequence[Float[Tensor, "b d _h _w"]],
        fine: Float[Tensor, "b e p q"],
        paddings: Sequence[Bool[Tensor, "b _h _w"]],
    ) -> Float[Tensor, "b c p q"]:
        """Computes the feature map that boxes are cropped from.

        Args:
            memory: Levels of the detector's memory, finest first.
            fine: The backbone's feature map of stride 4.
            paddings: The cells of each level, and of `fine`, that are padding.
        """
        shapes = [(m.shape[2], m.shape[3]) for m in memory]
        tokens = torch.cat([m.flatten(2).mT for m in memory], 1)  # (B, S, D)
        codes, centres, ratios = [], [], []
        for shape, padding, level in zip(shapes, paddings[:-1], self.levels, strict=True):
            code = sine_positions(shape, tokens.shape[2] // 2, padding=padding, shift=-0.5, device=tokens.device)
            codes.append(code.flatten(2).mT.to(tokens.dtype) + level)
            # The part of the level without padding: (B, 2), x and y.
            ratio = torch.stack([(~padding[:, 0]).sum(1) / shape[1], (~padding[:, :, 0]).sum(1) / shape[0]], -1)
            ratios.append(ratio)
            centres.append(cell_centres([shape], tokens.device) / ratio[:, None])
        references = torch.cat(centres, 1)[:, :, None] * torch.stack(ratios, 1)[:, None]  # (B, S, L, 2)
        padded, positions = torch.cat([p.flatten(1) for p in paddings[:-1]], 1), torch.cat(codes, 1)
        for layer in self.layers:
            tokens = layer(tokens, positions, references, shapes, padded)
        finest = tokens[:, : shapes[0][0] * shapes[0][1]].mT.unflatten(2, shapes[0])
        grid = (fine.shape[2], fine.shape[3])
        # Padding is set to zero, so that its content does not change the statistics of the group norm.
        lateral = self.neck(fine.masked_fill(paddings[-1][:, None], 0.0))
        return self.mapper(lateral + functional.interpolate(finest, size=grid, mode="bilinear", align_corners=False))


class QueryEncoder(nn.Module):
    """Query feature encoder: a linear layer, and optionally attention among the queries of an image.

    Args:
        channels: Channels of the detector's queries.
        width: Channels of the result.
        heads: Attention heads.
        attention: Whether there is attention.
    """

    def __init__(self, channels: int, width: int, heads: int, attention: bool):
        super().__init__()
        self.mapper = nn.Linear(channels, width)
        self.attention = SelfAttention(width, heads) if attention else None

    def forward(self, queries: Float[Tensor, "b n d"]) -> Float[Tensor, "b n c"]:
        """Returns the refined queries."""
        queries = self.mapper(queries)
        return queries if self.attention is None else self.attention(queries)


class MaskNetwork(nn.Module):
    """Box feature encoder and mask heads: from a crop and the query of its box to a mask and its quality.

    Args:
        width: Channels.
        layers: Number of deformable encoder layers.
        hidden: Width inside their feed-forward part.
        heads: Attention heads.
        sampled: Sampling locations of each head.
        side: Height and width of a crop, in cells.
        parts: What refines a query: "box" (attention to its crop), "feed_forward".
        score_width: Width of the head that predicts the quality; None without it.
    """

    def __init__(
        self, width: int, layers: int, hidden: int, heads: int, sampled: int, side: int, parts: Sequence[QueryPart],
        score_width: int | None,
    ):  # fmt: skip
        super().__init__()
        self.side = side
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(width, hidden, heads, 1, sampled, activation="gelu") for _ in range(layers)
        )
        self.box_attention = CrossAttention(width, heads) if "box" in parts else None
        self.feed_forward = FeedForward(width, hidden, activation="gelu") if "feed_forward" in parts else None
        self.convs = self.score = None
        if score_width is not None:
            inputs, strides = (width + 1, width, width, width), (1, 1, 2, 2)
            self.convs = nn.ModuleList(
                nn.Conv2d(c, width, 3, stride, 1) for c, stride in zip(inputs, strides, strict=True)
            )
            cells = math.ceil(math.ceil(side / 2) / 2) ** 2
            self.score = nn.Sequential(
                nn.Linear(width * cells, score_width), nn.ReLU(), nn.Linear(score_width, score_width), nn.ReLU(),
                nn.Linear(score_width, 1),
            )  # fmt: skip

    def forward(
        self, crops: Float[Tensor, "r c s s"], queries: Float[Tensor, "r c"]
    ) -> tuple[Float[Tensor, "r s s"], Float[Tensor, " r"]]:
        """Predicts mask logits, and the quality of each mask: its IoU with the object (1 without the quality head)."""
        width, grid = crops.shape[1], (self.side, self.side)
        x = crops.flatten(2).mT  # (R, s s, C)
        code = sine_positions(grid, width // 2, shift=-0.5, device=x.device).flatten(2).mT.to(x.dtype)  # (1, s s, C)
        references = cell_centres([grid], x.device, x.dtype)[None, :, None]
        for layer in self.layers:
            x = layer(x, code, references, [grid])
        if self.box_attention is not None:
            queries = self.box_attention(queries[:, None], x, x + code)[:, 0]
        if self.feed_forward is not None:
            queries = self.feed_forward(queries[:, None])[:, 0]
        logits = (x @ queries[:, :, None])[..., 0].unflatten(1, grid).float()
        if self.convs is None or self.score is None:
            return logits, torch.ones_like(logits[:, 0, 0])
        # The gradient of the quality does not reach the mask.
        y = torch.cat([logits.detach().sigmoid()[:, None].to(x.dtype), x.mT.unflatten(2, grid)], 1)
        for conv in self.convs:
            y = functional.relu(conv(y))
        return logits, self.score(y.flatten(1))[:, 0].float()
