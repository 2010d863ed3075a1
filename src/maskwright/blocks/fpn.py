"""Feature Pyramid Network (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm


class FPN(nn.Module):
    """Feature pyramid: one level for each input, finest first, and coarser levels after them.

    Args:
        channels_in: Channels of the inputs, finest first.
        channels: Channels of every level.
        norm: Normalisation after each convolution of the inputs.
        eps: Its epsilon.
        upsample: How a coarser level is added to a finer one. "double": nearest neighbour by exactly two, for which the
            sides of the image must be multiples of 32 (detectron2, MMDetection). "fit": nearest neighbour to the size
            of the finer level (torchvision). "bilinear": bilinear to that size (YOLACT).
        extra: Coarser levels. "pool": one, the coarsest level subsampled by two (Mask R-CNN, SOLO). "output": two 3 x 3
            convolutions of stride two from the coarsest level on (FCOS). "input": likewise, from the backbone's last
            features on (RetinaNet). "none".
        coarser: Number of levels of extra="output" or "input", at most two.
        relu: "outputs": after the levels that have an input (YOLACT). "between": before the second extra convolution
            (FCOS, RetinaNet). "none".
        merge: "sum" of a level and the coarser one, or their "mean" (TensorMask).
    """

    def __init__(
        self,
        channels_in: Sequence[int],
        channels: int = 256,
        *,
        norm: Norm = "none",
        eps: float = 1e-5,
        upsample: Literal["double", "fit", "bilinear"] = "double",
        extra: Literal["pool", "output", "input", "none"] = "pool",
        coarser: int = 2,
        relu: Literal["outputs", "between", "none"] = "none",
        merge: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        self.upsample, self.extra, self.relu, self.merge = upsample, extra, relu, merge
        self.lateral = nn.ModuleList(ConvNorm(c, channels, 1, norm=norm, eps=eps) for c in channels_in)
        self.output = nn.ModuleList(ConvNorm(channels, channels, 3, norm=norm, eps=eps) for _ in channels_in)
        self.coarser = nn.ModuleList()
        if extra in ("output", "input"):
            first = channels_in[-1] if extra == "input" else channels
            self.coarser.extend(ConvNorm(c, channels, 3, stride=2) for c in (first, channels)[:coarser])
        for layer in [*self.lateral, *self.output, *self.coarser]:
            assert isinstance(layer, ConvNorm)
            nn.init.kaiming_uniform_(layer.conv.weight, a=1)

    def forward(self, features: Sequence[Float[Tensor, "b _c _h _w"]]) -> list[Tensor]:
        """Computes the levels, finest first."""
        top = self.lateral[-1](features[-1])
        levels = [self.output[-1](top)]
        for lateral, output, feature in zip(
            reversed(self.lateral[:-1]), reversed(self.output[:-1]), reversed(features[:-1]), strict=True
        ):
            side = lateral(feature)
            if self.upsample == "double":
                side += functional.interpolate(top, scale_factor=2.0, mode="nearest")
            elif self.upsample == "fit":
                side += functional.interpolate(top, size=side.shape[-2:], mode="nearest")
            else:
                side += functional.interpolate(top, size=side.shape[-2:], mode="bilinear", align_corners=False)
            top = side / 2 if self.merge == "mean" else side
            levels.insert(0, output(top))
        if self.relu == "outputs":
            levels = [functional.relu(level, inplace=True) for level in levels]
        if self.extra == "pool":
            return [*levels, functional.max_pool2d(levels[-1], 1, 2)]
        source = features[-1] if self.extra == "input" else levels[-1]
        for number, layer in enumerate(self.coarser):
            source = functional.relu(source) if number and self.relu == "between" else source
            source = _reduced(layer, source)
            levels.append(source)
        return levels


def _reduced(layer: nn.Module, source: Float[Tensor, "b c _h _w"]) -> Float[Tensor, "b d _h2 _w2"]:
    """A convolution of stride two, in float32 on a single cell.

    There the weight gradient of PyTorch's bfloat16 kernel for processors with AVX-512 is partly uninitialised memory.
    """
    small = not torch.compiler.is_compiling() and source.shape[-2:] == (1, 1)
    if small and source.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return layer(source.float())
    return layer(source)


class PathAggregation(nn.Module):
    """A bottom-up path after a feature pyramid, as in MMDetection's PAFPN (after PANet, arXiv 1803.01534, section 3.1).

    From the finest level on, each sum is reduced by a 3 x 3 convolution of stride two and added to the next level;
    another 3 x 3 convolution follows every sum but the first. PANet itself reduces the outputs instead of the sums, and
    has a ReLU after each convolution.

    Args:
        pyramid: Gives the levels of the pyramid, finest first, and one more, which is replaced.
        channels: Channels of every level.
        levels: Number of levels without that one.
        norm: Normalisation after each convolution.
    """

    def __init__(self, pyramid: nn.Module, channels: int, levels: int = 4, norm: Norm = "none"):
        super().__init__()
        self.pyramid = pyramid
        self.reduce = nn.ModuleList(ConvNorm(channels, channels, 3, stride=2, norm=norm) for _ in range(levels - 1))
        self.output = nn.ModuleList(ConvNorm(channels, channels, 3, norm=norm) for _ in range(levels - 1))
        for layer in [*self.reduce, *self.output]:
            assert isinstance(layer, ConvNorm)
            nn.init.kaiming_uniform_(layer.conv.weight, a=1)

    def forward(self, features: Sequence[Float[Tensor, "b _c _h _w"]]) -> list[Tensor]:
        """Computes the levels, finest first, and the coarsest one subsampled by two."""
        first, *others = self.pyramid(features)[: len(self.reduce) + 1]
        total, levels = first, [first]
        for reduce, output, level in zip(self.reduce, self.output, others, strict=True):
            total = level + reduce(total)
            levels.append(output(total))
        return [*levels, functional.max_pool2d(levels[-1], 1, 2)]
