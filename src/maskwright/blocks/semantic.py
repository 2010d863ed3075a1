"""Semantic segmentation on a feature pyramid (Panoptic Feature Pyramid Networks, arXiv 1901.02446, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.ops.distributed import global_mean_count

VOID = -1  # label of pixels that the loss ignores


class SemanticFPN(nn.Module):
    """Predicts logits of every class at stride 4 from pyramid levels of strides 4, 8, 16, ...

    Each level passes through as many 3 x 3 convolutions as there are doublings between its stride and 4 (the first
    level through one), each followed by bilinear upsampling by two. The results are added.

    Args:
        channels: Channels of every level.
        outputs: Number of output maps.
        width: Channels of the convolutions.
        norm: Normalisation after each convolution.
        levels: Number of levels that are used.
    """

    def __init__(self, channels: int, outputs: int, *, width: int = 128, norm: Norm = "group", levels: int = 4):
        super().__init__()
        self.levels = nn.ModuleList()
        for number in range(levels):
            convs = [
                ConvNorm(width if step else channels, width, 3, norm=norm, relu=True) for step in range(max(1, number))
            ]
            self.levels.append(nn.ModuleList(convs))
        self.output = nn.Conv2d(width, outputs, 1)
        nn.init.kaiming_normal_(self.output.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.output.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b k h w"]:
        """Computes logits from the first `levels` of the features, finest first."""
        parts: list[Tensor] = []
        for number, convs in enumerate(self.levels):
            x = features[number]
            for conv in convs:  # pyright: ignore[reportGeneralTypeIssues]
                x = conv(x)
                if number:
                    x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            parts.append(x)
        return self.output(sum(parts[1:], parts[0]))


def semantic_loss(
    logits: Float[Tensor, "b k h w"], truth: Int[Tensor, "b _h _w"], coarse: bool = False
) -> Float[Tensor, ""]:
    """Computes the cross entropy of bilinearly upsampled logits, averaged over the pixels that are not VOID.

    Args:
        logits: Logits of each class.
        truth: Label maps; the logits are upsampled to their size.
        coarse: The labels at every fourth row and column are compared with logits of stride 4 instead (every eighth
            with logits of stride 8), and the average is over all of these, VOID included (MMDetection).
    """
    if coarse:
        step = round(truth.shape[1] / logits.shape[2])
        truth = truth[:, ::step, ::step]
        total = global_mean_count(truth.new_tensor(float(truth.numel()), dtype=torch.float32))
        return functional.cross_entropy(logits.float(), truth, ignore_index=VOID, reduction="sum") / total
    large = functional.interpolate(logits.float(), size=truth.shape[1:], mode="bilinear", align_corners=False)
    count = global_mean_count((truth != VOID).sum())
    return functional.cross_entropy(large, truth, ignore_index=VOID, reduction="sum") / count


def label_maps(
    planes: Sequence[Int[Tensor, "_h _w"]], size: tuple[int, int], device: torch.device
) -> Int[Tensor, "b h w"]:
    """Pads label maps of images to the `size` (height, width) of the network's input, with VOID."""
    result = torch.full((len(planes), *size), VOID, dtype=torch.int64, device=device)
    for own, plane in zip(result, planes, strict=True):
        own[: plane.shape[0], : plane.shape[1]] = plane.to(device)
    return result
