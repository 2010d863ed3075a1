"""The second stage: reading boxes from the pyramid, and the heads for class, box, mask and keypoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops import keypoints as keypoint_ops
from maskwright.ops import pooling
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.matching import match, sample
from maskwright.structures import Instances

Pooling = Literal["align", "warp", "pool"]


@dataclass(frozen=True)
class Pooler:
    """Reads boxes from the pyramid: chooses a level for each and cuts it out.

    aligned, samples   RoIAlign's conventions, see `ops.pooling.roi_align`
    levels             the rule for the level, see `ops.boxes.pyramid_level`
    """

    strides: tuple[int, ...]
    kind: Pooling = "align"
    aligned: bool = True
    samples: int = 0
    levels: box_ops.LevelRule = "detectron2"

    def __call__(
        self, features: Sequence[Float[Tensor, "b c _h _w"]], boxes: Sequence[Float[Tensor, "_n 4"]], side: int
    ) -> Float[Tensor, "r c side side"]:
        rois = pooling.as_rois(list(boxes))
        if len(self.strides) == 1:
            return self._cut(features[0], rois, side, self.strides[0])
        lowest = self.strides[0].bit_length() - 1
        level = box_ops.pyramid_level(rois[:, 1:], lowest, lowest + len(self.strides) - 1, self.levels) - lowest
        chosen = pooling.levels_of(level, len(self.strides))
        parts = [
            self._cut(feature, rois[rows], side, stride)
            for feature, stride, rows in zip(features, self.strides, chosen, strict=False)
        ]
        return torch.cat(parts)[torch.cat(chosen).argsort()].to(features[0].dtype)

    def _cut(self, feature: Tensor, rois: Tensor, side: int, stride: int) -> Tensor:
        if self.kind == "pool":
            return pooling.roi_pool(feature, rois, side, 1 / stride)
        if self.kind == "warp":
            return pooling.roi_warp(feature, rois, side, 1 / stride)
        return pooling.roi_align(feature, rois, side, 1 / stride, self.samples, self.aligned)


@dataclass(frozen=True)
class RoIRules:
    """Where the published code bases differ.

    beta           of the smooth-L1 box loss; 0 is L1
    sampled_order  "kinds": foreground first (detectron2); "index": by position among the proposals (torchvision)
    smallest_side  detections with a side below it are dropped before suppression
    """

    beta: float = 0.0
    sampled_order: Literal["kinds", "index"] = "kinds"
    smallest_side: float = 0.0
    sample: int = 512
    positives: float = 0.25
    overlap: float = 0.5
    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class Sampled:
    """RoIs of one image that the heads learn from: the first `owners` are those of `boxes[foreground]`."""

    boxes: Float[Tensor, "r 4"]
    labels: Int[Tensor, " r"]  # K is background
    foreground: Int[Tensor, " p"]
    owners: Int[Tensor, " p"]  # the object that each foreground box is for


@torch.no_grad()
def sample_proposals(proposals: Float[Tensor, "n 4"], target: Instances, classes: int, rules: RoIRules) -> Sampled:
    """Objects' own boxes are added to the proposals; then `sample` are drawn, a quarter of them foreground."""
    boxes = torch.cat([proposals, target.boxes.to(proposals)])
    nearest, matched = match(box_ops.pairwise_iou(target.boxes.to(proposals), boxes), rules.overlap, rules.overlap)
    positive, negative = sample(matched >= 0, matched < 0, rules.sample, rules.positives)
    index = torch.cat([positive, negative])
    if rules.sampled_order == "index":
        index = index.sort().values
    foreground = (matched[index] >= 0).nonzero().flatten()
    labels = torch.full_like(index, classes)
    owners = nearest[index[foreground]]
    labels[foreground] = target.labels.to(labels)[owners]
    return Sampled(boxes[index], labels, foreground, owners)


class BoxHead(nn.Module):
    """Convolutions (with norm), fully connected layers, then K + 1 class logits (background last) and box deltas.

    Without any layers of its own (`pooled`) it averages over space: the second half of a C4 network comes before it.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        convs: int = 0,
        conv_channels: int = 256,
        fcs: int = 2,
        width: int = 1024,
        norm: Norm = "none",
        agnostic: bool = False,
    ):
        super().__init__()
        self.convs = nn.ModuleList()
        for _ in range(convs):
            self.convs.append(ConvNorm(channels, conv_channels, 3, norm=norm, relu=True))
            channels = conv_channels
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
        for conv in self.convs:
            x = conv(x)
        if self.fcs:
            x = x.flatten(1)
            for layer in self.fcs:
                x = functional.relu(layer(x), inplace=True)
        else:
            x = x.mean((2, 3))
        return self.classes(x), self.deltas(x)


def box_losses(
    logits: Float[Tensor, "r k"], deltas: Float[Tensor, "r d"], sampled: Sequence[Sampled],
    targets: Sequence[Instances], rules: RoIRules,
) -> dict[str, Tensor]:  # fmt: skip
    """`class`: cross entropy over all sampled RoIs; `box`: smooth L1 of the foreground's deltas over the same count."""
    logits, deltas = logits.float(), deltas.float()
    labels = torch.cat([s.labels for s in sampled])
    count = global_mean_count(logits.new_tensor(float(len(labels))))
    class_loss = functional.cross_entropy(logits, labels, reduction="sum") + logits.sum() * 0
    offset, rows, goals = 0, [], []
    for own, target in zip(sampled, targets, strict=True):
        rows.append(own.foreground + offset)
        if len(own.foreground):
            goals.append(
                box_ops.encode(own.boxes[own.foreground], target.boxes[own.owners].to(own.boxes), rules.weights)
            )
        offset += len(own.labels)
    foreground = torch.cat(rows)
    chosen = deltas[foreground].unflatten(1, (deltas.shape[1] // 4, 4))
    if chosen.shape[1] > 1:
        chosen = chosen[torch.arange(len(foreground), device=deltas.device), labels[foreground]]
    else:
        chosen = chosen[:, 0]
    box_loss = deltas.sum() * 0
    if goals:
        box_loss = box_loss + smooth_l1_sum(chosen, torch.cat(goals), rules.beta)
    return {"class": class_loss / count, "box": box_loss / count}


def detect(
    logits: Float[Tensor, "r k"], deltas: Float[Tensor, "r d"], proposals: Sequence[Float[Tensor, "_n 4"]],
    sizes: Sequence[tuple[int, int]], rules: RoIRules, *, score_threshold: float, nms_threshold: float, detections: int,
) -> list[tuple[Float[Tensor, "_d 4"], Float[Tensor, " _d"], Int[Tensor, " _d"]]]:  # fmt: skip
    """Boxes (in the input's pixels, clipped to it), scores and labels of each image, best first."""
    every = torch.cat(list(proposals))
    shifts = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
    boxes = box_ops.decode(every[:, None].expand_as(shifts), shifts, rules.weights)
    scores = logits.float().softmax(-1)[:, :-1]
    result, counts = [], [len(p) for p in proposals]
    for own, score, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True):
        good = torch.isfinite(own).all(-1).all(-1) & torch.isfinite(score).all(-1)
        row, label = ((score > score_threshold) & good[:, None]).nonzero().unbind(1)
        chosen = box_ops.clip(own[row, label if own.shape[1] > 1 else 0], size)
        confidence = score[row, label]
        if rules.smallest_side > 0:
            large = (chosen[:, 2:] - chosen[:, :2] >= rules.smallest_side).all(1)
            chosen, confidence, label = chosen[large], confidence[large], label[large]
        kept = box_ops.nms(chosen, confidence, label, nms_threshold, detections)
        result.append((chosen[kept], confidence[kept], label[kept]))
    return result


class MaskHead(nn.Module):
    """3 x 3 convolutions (with norm), a transposed convolution that doubles the side, 1 x 1 to `outputs` maps."""

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

    def forward(self, x: Float[Tensor, "r c s s"]) -> Float[Tensor, "r k t t"]:
        return self.logits(self._read(x))

    def of(self, x: Float[Tensor, "r c s s"], labels: Int[Tensor, " r"]) -> Float[Tensor, "r t t"]:
        """Each RoI's map for its own label alone: the other K - 1 are nobody's business and cost K times as much."""
        weight, bias = self.logits.weight[labels, :, 0, 0], self.logits.bias
        assert bias is not None
        return torch.einsum("rcyx,rc->ryx", self._read(x), weight) + bias[labels][:, None, None]

    def _read(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return functional.relu(self.upsample(x), inplace=True)


class KeypointHead(nn.Module):
    """3 x 3 convolutions, a transposed convolution to one map per keypoint, bilinear times two: logits of the
    keypoint's place."""

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
        for conv in self.convs:
            x = conv(x)
        return functional.interpolate(self.logits(x), scale_factor=2.0, mode="bilinear", align_corners=False)


def keypoint_loss(
    maps_of: Callable[[Sequence[Tensor]], Float[Tensor, "r j t t"]], sampled: Sequence[Sampled],
    boxes: Sequence[Float[Tensor, "_n 4"]], targets: Sequence[Instances], inside: bool,
) -> Float[Tensor, ""]:  # fmt: skip
    """Cross entropy of each labelled keypoint over the cells of its map, mean over the keypoints of the batch.

    maps_of  keypoints' maps of boxes of each image
    boxes    of each image's foreground; with `inside`, those without a keypoint in them are not learnt from
    """
    keypoints = []
    for own, target in zip(sampled, targets, strict=True):
        if target.keypoints is None and len(target):
            raise UsageError("a target has no keypoints; this system learns them, give a data set that has them")
        keypoints.append(
            own.boxes.new_zeros(0) if target.keypoints is None else target.keypoints.to(own.boxes)[own.owners]
        )
    own_keypoints = [len(j[0]) for j in keypoints if len(j)]
    if inside:
        keep = [
            _holds_a_keypoint(j, b) if len(b) else b.new_zeros(0, dtype=torch.bool)
            for j, b in zip(keypoints, boxes, strict=True)
        ]
        boxes = [b[k] for b, k in zip(boxes, keep, strict=True)]
        keypoints = [j[k] if len(k) else j for j, k in zip(keypoints, keep, strict=True)]
    maps = maps_of(boxes).float()
    chosen, places = maps.flatten(2).flatten(0, 1)[:0], torch.zeros(0, dtype=torch.int64)
    if own_keypoints and own_keypoints[0] != maps.shape[1]:
        raise UsageError(
            f"a target has {own_keypoints[0]} keypoints, this system learns {maps.shape[1]}; build it with "
            f"keypoints={own_keypoints[0]}"
        )
    if len(maps):
        place, counts = keypoint_ops.encode(
            torch.cat([j for j in keypoints if len(j)]), torch.cat(list(boxes)), maps.shape[-1]
        )
        chosen, places = maps.flatten(2)[counts], place[counts]
    count = global_mean_count(maps.new_tensor(float(len(chosen))))
    total = functional.cross_entropy(chosen, places, reduction="sum") if len(chosen) else maps.sum() * 0
    return total / count + maps.sum() * 0


def _holds_a_keypoint(keypoints: Float[Tensor, "n j 3"], boxes: Float[Tensor, "n 4"]) -> Tensor:
    x, y, seen = keypoints.unbind(-1)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    return ((seen >= 1) & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).any(1)
