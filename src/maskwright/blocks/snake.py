"""Networks of contour systems: convolutions along closed sequences of points (Deep Snake, arXiv 2001.01629, section
3.1), and a small detector of an object's components (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.ops.centres import PRIOR
from maskwright.ops.pooling import roi_align

Convolution = Literal["circular", "graph"]
LineNorm = Literal["batch", "group", "none"]
CELLS = (14, 56)  # rows and columns of the maps of a component head


class LineConv(nn.Module):
    """Convolution along a closed contour, ReLU, normalisation (in this order). A contour is an image of one row.

    Attributes:
        dilation: Distance between neighbours.
        kind: "circular" has a kernel of nine that wraps around; "graph" has two weights, one for a point and one for
            both its neighbours (what the paper compares with).
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
            neighbours = x.roll(self.dilation, -1) + x.roll(-self.dilation, -1)
            x = along(self.conv, torch.cat([x, neighbours], 1))
        else:
            reach = 4 * self.dilation
            x = along(self.conv, torch.cat([x[..., -reach:], x, x[..., :reach]], 3), self.dilation)
        return self.norm(functional.relu(x, inplace=True))


class Snake(nn.Module):
    """From features along a closed contour to an offset of each point (section 3.1): eight convolutions, the last seven
    with shortcuts; the offsets are computed from all eight states and from their maxima over the contour."""

    def __init__(self, channels_in: int, width: int, dilations: Sequence[int], kind: Convolution, norm: LineNorm):
        """
        Args:
            channels_in: Channels of the features.
            width: Channels of the convolutions.
            dilations: Of those after the first.
            kind: Kind of the convolutions.
            norm: Their normalisation.
        """
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
        # The first layer's input from the whole contour is the same at every point: its part is computed once.
        first, second, last = (layer for layer in self.predict if isinstance(layer, nn.Conv1d))
        of_whole, of_point = first.weight[:, :, None].split([whole.shape[1], line.shape[1]], 1)
        x = functional.conv2d(line, of_point, first.bias) + functional.conv2d(whole, of_whole)
        x = along(last, functional.relu(along(second, functional.relu(x, inplace=True)), inplace=True))
        return x[:, :, 0].transpose(1, 2)


def along(conv: nn.Conv1d, x: Float[Tensor, "n c 1 p"], dilation: int = 1) -> Float[Tensor, "n d 1 _q"]:
    """Applies a one-dimensional convolution to images of one row, channels last, which is faster."""
    weight = conv.weight[:, :, None].contiguous(memory_format=torch.channels_last)
    return functional.conv2d(x, weight, conv.bias, dilation=(1, dilation))


class ComponentHead(nn.Module):
    """A small detector of centres inside each box: from 7 x 28 features to maps of 14 x 56."""

    def __init__(self, channels: int, width: int = 256):
        super().__init__()
        convs: list[nn.Module] = []
        for number in range(4):
            convs += [nn.Conv2d(channels if number == 0 else width, width, 3, padding=1), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*convs)
        self.centres = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 1, 1))
        self.sizes = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 2, 1))
        nn.init.constant_(self.centres[-1].bias, PRIOR)  # pyright: ignore[reportArgumentType]

    def forward(
        self, feature: Float[Tensor, "b c h w"], boxes: Float[Tensor, "n 4"], owners: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 1 r s"], Float[Tensor, "n 2 r s"]]:
        """Predicts components.

        Args:
            feature: Feature map.
            boxes: Boxes in cells of the map.
            owners: Index of each box's image.

        Returns:
            Logits of the centres, and widths and heights in cells of the feature map.
        """
        x = self.convs(component_features(feature, boxes, owners))
        return self.centres(x), self.sizes(x)


def component_features(
    feature: Float[Tensor, "b c h w"], boxes: Float[Tensor, "n 4"], owners: Int[Tensor, " n"]
) -> Float[Tensor, "n c _r _s"]:
    """RoI Align without the half pixel, on a grid of 7 x 28."""
    rois = torch.cat([owners[:, None].to(boxes), boxes], 1)
    return roi_align(feature, rois, (CELLS[0] // 2, CELLS[1] // 2), aligned=False)
