"""A network over the points of a closed line (Deep Snake, arXiv 2001.01629, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Convolution = Literal["circular", "graph"]
LineNorm = Literal["batch", "group", "none"]


class LineConv(nn.Module):
    """Convolution along a closed line of points, ReLU, norm (in this order). The line is a picture of one row.

    "circular" has a kernel of nine that goes round; "graph" knows two weights, a point's own and that of both its
    neighbours (what the paper compares it with).
    """

    def __init__(self, channels_in: int, channels: int, dilation: int, kind: Convolution, norm: LineNorm):
        super().__init__()
        self.dilation, self.kind = dilation, kind
        if kind == "circular":
            self.conv = nn.Conv1d(channels_in, channels, 9)
        else:
            self.conv = nn.Conv1d(2 * channels_in, channels, 1)
        self.norm = (
            nn.BatchNorm2d(channels) if norm == "batch"
            else nn.GroupNorm(8 if channels % 8 == 0 else 1, channels) if norm == "group" else nn.Identity()
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "n c 1 p"]) -> Float[Tensor, "n d 1 p"]:
        if self.kind == "graph":
            beside = x.roll(self.dilation, -1) + x.roll(-self.dilation, -1)
            x = along(self.conv, torch.cat([x, beside], 1))
        else:
            reach = 4 * self.dilation
            x = along(self.conv, torch.cat([x[..., -reach:], x, x[..., :reach]], 3), self.dilation)
        return self.norm(functional.relu(x, inplace=True))


class Snake(nn.Module):
    """From features along a closed line to an offset of each point (section 3.1): eight convolutions, the later seven
    around shortcuts; all eight states and the largest values of them over the whole line say the offset."""

    def __init__(self, channels_in: int, width: int, dilations: Sequence[int], kind: Convolution, norm: LineNorm):
        super().__init__()
        self.first = LineConv(channels_in, width, 1, kind, norm)
        self.blocks = nn.ModuleList(LineConv(width, width, d, kind, norm) for d in dilations)
        states = width * (len(dilations) + 1)
        self.fuse = nn.Conv1d(states, 2 * width, 1)
        self.predict = nn.Sequential(
            nn.Conv1d(2 * width + states, 2 * width, 1), nn.ReLU(inplace=True),
            nn.Conv1d(2 * width, max(1, width // 2), 1), nn.ReLU(inplace=True),
            nn.Conv1d(max(1, width // 2), 2, 1),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "n c p"]) -> Float[Tensor, "n p 2"]:
        x = self.first(x[:, :, None].contiguous(memory_format=torch.channels_last))
        states = [x]
        for block in self.blocks:
            x = block(x) + x
            states.append(x)
        line = torch.cat(states, 1)  # (N, 8 width, 1, P)
        whole = along(self.fuse, line).amax(3, keepdim=True)
        # The first layer reads the same of the whole line at each point: that is computed once.
        first, second, last = (layer for layer in self.predict if isinstance(layer, nn.Conv1d))
        of_whole, of_point = first.weight[:, :, None].split([whole.shape[1], line.shape[1]], 1)
        x = functional.conv2d(line, of_point, first.bias) + functional.conv2d(whole, of_whole)
        x = along(last, functional.relu(along(second, functional.relu(x, inplace=True)), inplace=True))
        return x[:, :, 0].transpose(1, 2)


def along(conv: nn.Conv1d, x: Float[Tensor, "n c 1 p"], dilation: int = 1) -> Float[Tensor, "n d 1 _q"]:
    """A convolution of lines as one of pictures of one row, channels last: what processors are quickest at."""
    weight = conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return functional.conv2d(x, weight, conv.bias, dilation=(1, dilation))
