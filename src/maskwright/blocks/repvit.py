"""RepViT (arXiv 2307.09283) as the image encoder of EdgeSAM (arXiv 2312.06660): convolutions alone.

Each block mixes the cells of a map by depthwise convolutions, and then the channels of each cell. The maps at 1/16 and
1/32 of the resolution are added, the latter upsampled.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.vitdet import Neck


class Excitation(nn.Module):
    """Multiplies channels by factors that depend on the mean of the map (squeeze and excitation)."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(8, int(channels / 4 + 4) // 8 * 8)
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the scaled map."""
        return x * self.expand(functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class RepViTBlock(nn.Module):
    """Mixes cells, then channels.

    Args:
        before: Channels of the input.
        channels: Channels of the output.
        stride: 1 or 2.
        excites: Whether channels are scaled in between.
    """

    def __init__(self, before: int, channels: int, stride: int, excites: bool):
        super().__init__()
        self.stride = stride
        self.depthwise = ConvNorm(before, before, 3, stride=stride, groups=before, norm="batch")
        self.pointwise = ConvNorm(before, before, 1, groups=before, norm="batch") if stride == 1 else None
        self.excitation = Excitation(before) if excites else nn.Identity()
        self.project = ConvNorm(before, channels, 1, norm="batch") if stride > 1 else None
        self.expand = ConvNorm(channels, 2 * channels, 1, norm="batch")
        self.reduce = ConvNorm(2 * channels, channels, 1, norm="batch")

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Returns the refined map."""
        mixed = self.depthwise(x)
        if self.pointwise is not None:
            mixed = mixed + self.pointwise(x) + x
        x = self.excitation(mixed)
        if self.project is not None:
            x = self.project(x)
        return x + self.reduce(functional.gelu(self.expand(x)))


class RepViT(nn.Module):
    """The image encoder.

    Args:
        widths: Channels of the four stages.
        depths: Blocks of the stages.
        neck_width: Channels of the embedding.
        in_channels: Channels of images.
    """

    def __init__(
        self,
        widths: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (3, 4, 16, 3),
        *,
        neck_width: int = 256,
        in_channels: int = 3,
    ):
        super().__init__()
        first = widths[0]
        self.stem = nn.ModuleList([
            ConvNorm(in_channels, first // 2, 3, stride=2, norm="batch"),
            ConvNorm(first // 2, first, 3, stride=2, norm="batch"),
        ])  # fmt: skip
        self.stages = nn.ModuleList()
        before = first
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [RepViTBlock(before, width, 2, False)] if number else []
            count = depth - len(blocks)
            # Every second block scales channels, but the last of a stage does not.
            blocks += [RepViTBlock(width, width, 1, i % 2 == 0 and i < count - 1) for i in range(count)]
            self.stages.append(nn.Sequential(*blocks))
            before = width
        self.fine = nn.Conv2d(widths[2], neck_width, 1, bias=False)
        self.coarse = nn.Conv2d(widths[3], neck_width, 1, bias=False)
        self.neck = Neck(neck_width, neck_width)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Computes the image embedding."""
        x = self.stem[1](functional.gelu(self.stem[0](images)))
        for stage in self.stages[:3]:
            x = stage(x)
        coarse = self.coarse(self.stages[3](x))
        fine = self.fine(x)
        coarse = functional.interpolate(coarse, fine.shape[2:], mode="bicubic", align_corners=False)
        return self.neck(fine + coarse)
