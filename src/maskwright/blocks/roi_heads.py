"""The networks of the second stage, and the pooling of their input from a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.ops import boxes as box_ops
from maskwright.ops import pooling

Pooling = Literal["align", "warp", "pool"]


@dataclass(frozen=True)
class Pooler:
    """Crops boxes from a pyramid: chooses a level for each box, and pools its features.

    Attributes:
        strides: Stride of each level that is used, finest first.
        kind: RoIAlign, RoIWarp or RoIPool, see `ops.pooling`.
        aligned: Convention of RoIAlign, see `ops.pooling.roi_align`.
        samples: Samples of RoIAlign, see `ops.pooling.roi_align`.
        levels: The rule for the level, see `ops.boxes.pyramid_level`.
        every: Pool each box from all levels instead; their features are concatenated along the channels, finest first.
    """

    strides: tuple[int, ...]
    kind: Pooling = "align"
    aligned: bool = True
    samples: int = 0
    levels: box_ops.LevelRule = "detectron2"
    every: bool = False

    def __call__(
        self,
        features: Sequence[Float[Tensor, "b c _h _w"]],
        boxes: Sequence[Float[Tensor, "_n 4"]],
        side: pooling.Side,
        levels: Int[Tensor, " r"] | None = None,
    ) -> Float[Tensor, "r _c _p _q"]:
        """Pools features of boxes.

        Args:
            features: Pyramid levels, finest first; levels beyond `strides` are ignored.
            boxes: Boxes of each image, in pixels of the input.
            side: Side of the output grid, or its height and width.
            levels: The level of each box, 0 for the finest; None: by the rule.

        Returns:
            One grid per box, image after image, in the dtype of the features.
        """
        rois = pooling.as_rois(list(boxes)).to(features[0].device)
        if len(self.strides) == 1:
            return self.crop(features[0], rois, side, self.strides[0])
        if self.every:
            parts = [
                self.crop(feature, rois, side, stride) for feature, stride in zip(features, self.strides, strict=False)
            ]
            return torch.cat(parts, 1)
        if levels is None:
            lowest = self.strides[0].bit_length() - 1
            highest = lowest + len(self.strides) - 1
            levels = box_ops.pyramid_level(rois[:, 1:], lowest, highest, self.levels) - lowest
        if torch.compiler.is_exporting():  # no shapes that depend on values: every box from every level, one is kept
            own: Tensor = self.crop(features[0], rois, side, self.strides[0])
            for level, (feature, stride) in enumerate(zip(features[1:], self.strides[1:], strict=False), 1):
                own = torch.where((levels == level)[:, None, None, None], self.crop(feature, rois, side, stride), own)
            return own
        chosen = pooling.levels_of(levels, len(self.strides))
        parts = [
            self.crop(feature, rois[rows], side, stride)
            for feature, stride, rows in zip(features, self.strides, chosen, strict=False)
        ]
        return torch.cat(parts)[torch.cat(chosen).argsort()]

    def crop(self, feature: Tensor, rois: Float[Tensor, "r 5"], side: pooling.Side, stride: int) -> Tensor:
        """Pools RoIs from one level."""
        if self.kind == "pool":
            return pooling.roi_pool(feature, rois, side, 1 / stride)
        if self.kind == "warp":
            return pooling.roi_warp(feature, rois, side, 1 / stride)
        return pooling.roi_align(feature, rois, side, 1 / stride, self.samples, self.aligned)


class BoxHead(nn.Module):
    """Convolutions, fully connected layers, then logits of K classes and background, and box deltas.

    Without fully connected layers the features are averaged over space (the last stage of a C4 network precedes it).

    Args:
        channels: Channels of the pooled features.
        side: Side of the pooled features.
        classes: Number of classes K, without background.
        convs: Number of 3 x 3 convolutions.
        conv_width: Their channels.
        fcs: Number of fully connected layers.
        width: Their width.
        norm: Normalisation after each convolution.
        agnostic: Predict one box for all classes instead of one per class.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        convs: int = 0,
        conv_width: int = 256,
        fcs: int = 2,
        width: int = 1024,
        norm: Norm = "none",
        agnostic: bool = False,
    ):
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(convs):
            self.convs.append(ConvNorm(channels, conv_width, 3, norm=norm, relu=True))
            channels = conv_width
        self.fcs = nn.ModuleList()
        inputs = channels * side * side if fcs else channels
        for _ in range(fcs):
            self.fcs.append(nn.Linear(inputs, width))
            inputs = width
        self.classes = nn.Linear(inputs, classes + 1)
        self.deltas = nn.Linear(inputs, 4 if agnostic else 4 * classes)
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Float[Tensor, "r c s s"]) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r d"]]:
        """Computes class logits (R, K + 1), background last, and deltas (R, 4 K), or (R, 4) if class-agnostic."""
        for conv in self.convs:
            x = conv(x)
        if self.fcs:
            x = x.flatten(1)
            for layer in self.fcs:
                x = functional.relu(layer(x), inplace=True)
        else:
            x = x.mean((2, 3))
        return self.classes(x), self.deltas(x)


class MaskHead(nn.Module):
    """3 x 3 convolutions, a transposed convolution that doubles the side, and a 1 x 1 convolution to mask logits.

    Args:
        channels: Channels of the pooled features.
        outputs: Number of masks.
        convs: Number of 3 x 3 convolutions.
        width: Their channels.
        norm: Normalisation after each of them.
        init: Initialisation of the last layer: normal with standard deviation 0.001 (detectron2) or Kaiming's
            (torchvision).
    """

    def __init__(
        self, channels: int, outputs: int, *, convs: int = 4, width: int = 256, norm: Norm = "none",
        init: Literal["small", "kaiming"] = "small",
    ):  # fmt: skip
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(convs):
            self.convs.append(ConvNorm(channels, width, 3, norm=norm, relu=True))
            channels = width
        self.upsample = nn.ConvTranspose2d(channels, width, 2, 2)
        self.logits = nn.Conv2d(width, outputs, 1)
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.upsample.bias)  # pyright: ignore[reportArgumentType]
        if init == "small":
            nn.init.normal_(self.logits.weight, std=0.001)
        else:
            nn.init.kaiming_normal_(self.logits.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)  # pyright: ignore[reportArgumentType]

    def features(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r d t t"]:
        """What the last layer reads."""
        for conv in self.convs:
            x = conv(x)
        return functional.relu(self.upsample(x), inplace=True)

    def forward(self, x: Float[Tensor, "r c s s"], labels: Int[Tensor, " r"] | None = None) -> Float[Tensor, "r k t t"]:
        """Computes mask logits.

        Args:
            x: Pooled features.
            labels: Compute one mask per RoI only, which avoids computing the masks of the other classes.

        Returns:
            Logits (R, outputs, 2 s, 2 s); (R, 1, 2 s, 2 s) with `labels`.
        """
        return self.predict(self.features(x), labels)

    def predict(self, x: Float[Tensor, "r d t t"], labels: Int[Tensor, " r"] | None) -> Float[Tensor, "r k t t"]:
        """The last layer: logits of all masks, or of one mask per RoI with `labels`."""
        if labels is None:
            return self.logits(x)
        weight, bias = self.logits.weight[labels, :, 0, 0], self.logits.bias
        assert bias is not None
        return (torch.einsum("rcyx,rc->ryx", x, weight) + bias[labels][:, None, None])[:, None]


class KeypointHead(nn.Module):
    """3 x 3 convolutions, a transposed convolution to one map per keypoint, and bilinear upsampling by two.

    Args:
        channels: Channels of the pooled features.
        keypoints: Number of keypoints.
        convs: Number of 3 x 3 convolutions.
        width: Their channels.
    """

    def __init__(self, channels: int, keypoints: int, *, convs: int = 8, width: int = 512):
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(convs):
            self.convs.append(ConvNorm(channels, width, 3, relu=True))
            channels = width
        self.logits = nn.ConvTranspose2d(channels, keypoints, 4, 2, 1)
        nn.init.kaiming_normal_(self.logits.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r j t t"]:
        """Computes logits of the position of each keypoint, on a grid of 4 s x 4 s."""
        for conv in self.convs:
            x = conv(x)
        return functional.interpolate(self.logits(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class MaskIoUHead(nn.Module):
    """Predicts the IoU of a predicted mask with its object, for every class (Mask Scoring R-CNN, arXiv 1903.00241).

    The pooled features and the mask, reduced to their size by the maximum, pass 3 x 3 convolutions, of which the last
    has stride two, and fully connected layers.

    Args:
        channels: Channels of the pooled features.
        side: Their side.
        outputs: Number of classes.
        convs: Number of convolutions.
        width: Their channels.
        fc_width: Width of the two fully connected layers.
    """

    def __init__(
        self, channels: int, side: int, outputs: int, *, convs: int = 4, width: int = 256, fc_width: int = 1024
    ):
        super().__init__()
        self.convs = nn.ModuleList()
        inputs = channels + 1
        for number in range(convs):
            self.convs.append(nn.Conv2d(inputs, width, 3, 2 if number == convs - 1 else 1, padding=1))
            inputs = width
        cells = (side + 1) // 2
        self.fcs = nn.ModuleList([nn.Linear(inputs * cells * cells, fc_width), nn.Linear(fc_width, fc_width)])
        self.iou = nn.Linear(fc_width, outputs)
        for layer in self.convs:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore[reportArgumentType]
        for layer in self.fcs:
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.iou.weight, std=0.01)
        for layer in [*self.convs, *self.fcs, self.iou]:
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "r c s s"], masks: Float[Tensor, "r t t"]) -> Float[Tensor, "r k"]:
        """Computes the IoU of each class.

        Args:
            x: Pooled features.
            masks: Probabilities of the predicted masks, t a multiple of s.
        """
        step = masks.shape[-1] // x.shape[-1]
        x = torch.cat([x, functional.max_pool2d(masks[:, None], step, step).to(x.dtype)], 1)
        for conv in self.convs:
            x = functional.relu(conv(x), inplace=True)
        x = x.flatten(1)
        for layer in self.fcs:
            x = functional.relu(layer(x), inplace=True)
        return self.iou(x)
