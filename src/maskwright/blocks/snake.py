"""Networks of contour systems: convolutions along closed sequences of points (Deep Snake, arXiv 2001.01629, section
3.1), and a small detector of an object's components (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.errors import UsageError
from maskwright.ops.centres import PRIOR
from maskwright.ops.pooling import roi_align
from maskwright.ops.vertices import clipped_to_map, diamond_lines, octagon_lines, read_at
from maskwright.options import OptionGroup

Convolution = Literal["circular", "graph"]
LineNorm = Literal["batch", "group", "none"]
STRIDE = 4  # of the feature map, in pixels of the input
DILATIONS = (1, 1, 1, 2, 2, 4, 4)
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
        """Returns features of the same points."""
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
        """Returns an offset of each point."""
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


@dataclass(frozen=True)
class ContourOptions(OptionGroup):
    """The contours and their network, as options; the paper compares iterations and convolutions.

    Attributes:
        points: Points of a contour.
        start_points: Points of the diamond from which the extreme points are predicted; a multiple of 4.
        iterations: How often a contour is moved.
        convolution: "circular" with nine weights, or "graph" with two: of a point, and of both its neighbours.
        width: Channels of the network.
        norm: Its normalisation; "batch" as published.
        align_corners: How features are sampled at points, see `ops.vertices.read_at`.
    """

    label: ClassVar[str] = "contours"

    points: int = 128
    start_points: int = 40
    iterations: int = 3
    convolution: Convolution = "circular"
    width: int = 128
    norm: LineNorm = "group"
    align_corners: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("iterations", "width"):
            if getattr(self, name) < 1:
                raise UsageError(f"contours.{name} must be at least 1, got {getattr(self, name)}")
        reach = 4 * max(DILATIONS) if self.convolution == "circular" else max(DILATIONS)
        least = max(12, reach)  # an octagon has 12 points; the widest convolution must not go round more than once
        if self.points < least:
            raise UsageError(f"contours.points must be at least {least}, got {self.points}")
        if self.start_points % 4 or self.start_points < max(4, reach):
            raise UsageError(
                f"contours.start_points must be a multiple of 4 and at least {max(4, reach)}, got {self.start_points}"
            )


class Contours(nn.Module):
    """From boxes to extreme points, octagons and contours (figure 3)."""

    def __init__(self, channels: int, options: ContourOptions):
        super().__init__()
        self.options = options
        self.fuse = nn.Conv1d(2 * channels, channels, 1)

        def snake() -> Snake:
            return Snake(channels + 2, options.width, DILATIONS, options.convolution, options.norm)

        self.start = snake()
        self.steps = nn.ModuleList(snake() for _ in range(options.iterations))
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        feature: Float[Tensor, "b c h w"],
        boxes: Float[Tensor, "n 4"],
        owners: Int[Tensor, " n"],
        octagons: Float[Tensor, "n p 2"] | None = None,
    ) -> tuple[Float[Tensor, "n 4 2"], tuple[Float[Tensor, "n p 2"], ...]]:
        """Predicts extreme points from boxes, and moves octagons to contours.

        Args:
            feature: Feature map of stride 4.
            boxes: Boxes in cells of the map.
            owners: Index of each box's image.
            octagons: Contours to start from, in cells; default the octagons of the predicted extreme points, which are
                clipped to the map.

        Returns:
            The extreme points (top, left, bottom, right), not clipped, and the contour after each iteration, in cells.
        """
        diamond = diamond_lines(boxes, self.options.start_points)
        centres = (diamond.amin(1, keepdim=True) + diamond.amax(1, keepdim=True)) / 2
        at_points = self._sample(feature, diamond, owners)
        at_centre = self._sample(feature, centres, owners).expand_as(at_points)
        offsets = self._move(self.start, self.fuse(torch.cat([at_points, at_centre], 1)), diamond)
        extremes = (diamond + offsets)[:, :: self.options.start_points // 4]
        if octagons is None:
            octagons = octagon_lines(clipped_to_map(extremes, feature), self.options.points)
        contour = octagons
        contours: list[Tensor] = []
        for step in self.steps:  # which reads and predicts pixels of the input, four per cell
            offsets = self._move(step, self._sample(feature, contour, owners), contour * STRIDE)
            contour = (contour * STRIDE + offsets) / STRIDE
            contours.append(contour)
        return extremes, tuple(contours)

    def _sample(self, feature: Tensor, points: Tensor, owners: Tensor) -> Float[Tensor, "n c p"]:
        return read_at(feature, points, owners, align_corners=self.options.align_corners).transpose(1, 2)

    @staticmethod
    def _move(snake: nn.Module, features: Tensor, points: Float[Tensor, "n p 2"]) -> Float[Tensor, "n p 2"]:
        """Offsets of the points from their features and their coordinates relative to the contour's box."""
        relative = (points - points.amin(1, keepdim=True)).transpose(1, 2).to(features)
        return snake(torch.cat([features, relative], 1)).float()
