"""Region proposals (Faster R-CNN, arXiv 1506.01497), on one level or on a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.matching import NEGATIVE, match, sample
from maskwright.structures import Instances


@dataclass(frozen=True)
class ProposalRules:
    """Where the published code bases differ.

    rounded        anchors' half sides are whole numbers, and strides are the input's size over the map's (torchvision);
                   otherwise real-valued anchors at multiples of the nominal stride (detectron2)
    loss           "fixed": both terms are divided by images * sample size (detectron2); "sampled": by the sampled
    beta           of the smooth-L1 box loss; 0 is L1
    smallest_side  proposals with a side at or below it are dropped; exactly at it they stay if `inclusive`
    by             proposals are ranked over all levels by their "logit" or their "probability"
    """

    rounded: bool = False
    loss: Literal["fixed", "sampled"] = "fixed"
    beta: float = 0.0
    smallest_side: float = 0.0
    inclusive: bool = False
    by: Literal["logit", "probability"] = "logit"
    before: tuple[int, int] = (2000, 1000)  # best of each level kept before suppression, in training and at test
    after: tuple[int, int] = (1000, 1000)  # best of all levels kept after it
    overlap: float = 0.7
    sample: int = 256
    positives: float = 0.5


class Anchors(nn.Module):
    """Boxes of A shapes around the corner of every cell; order y, x, shape."""

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        strides: Sequence[int],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rounded: bool = False,
    ):
        """`sizes` per level are square roots of areas in pixels, `ratios` are height / width."""
        super().__init__()
        self.strides, self.rounded = list(strides), rounded
        self.count = len(sizes[0]) * len(ratios)
        for level, own in enumerate(sizes):
            self.register_buffer(f"shapes{level}", _shapes(own, ratios, rounded), persistent=False)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Float[Tensor, "_n 4"]]:
        """Anchors (H W A, 4) of each level for an input of `size` (H, W), padding included."""
        result = []
        for level, feature in enumerate(features):
            height, width = feature.shape[-2:]
            shapes = getattr(self, f"shapes{level}").to(feature.device)
            stride = self.strides[level]
            down, across = (size[0] // height, size[1] // width) if self.rounded else (stride, stride)
            y = torch.arange(height, device=feature.device, dtype=torch.float32) * down
            x = torch.arange(width, device=feature.device, dtype=torch.float32) * across
            corners = torch.stack([x.repeat(height), y.repeat_interleave(width)] * 2, 1)
            result.append((corners[:, None] + shapes).reshape(-1, 4))
        return result


def _shapes(sizes: Sequence[float], ratios: Sequence[float], rounded: bool) -> Tensor:
    if rounded:  # in float32 throughout, as the original
        roots = torch.tensor(ratios).sqrt()
        widths = ((1 / roots)[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
        heights = (roots[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
        return (torch.stack([-widths, -heights, widths, heights], 1) / 2).round()
    rows = []
    for size in sizes:
        for ratio in ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            rows.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(rows)


class RPNHead(nn.Module):
    """3 x 3 convolutions shared by all levels, then objectness (A) and deltas (A blocks of 4) of each anchor."""

    def __init__(self, channels: int, anchors: int, convs: int = 1):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convs))
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Sequence[Float[Tensor, "b c _h _w"]]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = [], []
        for x in features:
            for conv in self.convs:
                x = functional.relu(conv(x), inplace=True)
            objectness.append(self.objectness(x))
            deltas.append(self.deltas(x))
        return objectness, deltas


def _rows(maps: Sequence[Tensor], values: int) -> list[Tensor]:
    """(B, A * values, H, W) -> (B, H W A, values), float32."""
    result = []
    for level in maps:
        batch, _, height, width = level.shape
        level = level.float().view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2)
        result.append(level.reshape(batch, -1, values))
    return result


def propose(
    objectness: Sequence[Float[Tensor, "b a _h _w"]],
    deltas: Sequence[Float[Tensor, "b d _h _w"]],
    anchors: Sequence[Float[Tensor, "_n 4"]],
    sizes: Sequence[tuple[int, int]],
    rules: ProposalRules,
    training: bool = False,
) -> list[tuple[Float[Tensor, "_p 4"], Float[Tensor, " _p"]]]:
    """For each image of valid size (h, w) its proposals and their logits, best first, without gradient."""
    before, after = (rules.before[0], rules.after[0]) if training else (rules.before[1], rules.after[1])
    chosen_boxes, chosen_logits, levels = [], [], []
    with torch.no_grad():
        for level, (logits, shifts, own) in enumerate(
            zip(_rows(objectness, 1), _rows(deltas, 4), anchors, strict=True)
        ):
            best, index = logits[..., 0].topk(min(before, len(own)), dim=1)  # (B, k)
            chosen_boxes.append(box_ops.decode(own[index], shifts.gather(1, index[..., None].expand(-1, -1, 4))))
            chosen_logits.append(best)
            levels.append(best.new_full(best.shape[1:], level, dtype=torch.int64))
        boxes, logits, level = torch.cat(chosen_boxes, 1), torch.cat(chosen_logits, 1), torch.cat(levels)
        result = []
        for image, size in enumerate(sizes):
            own, score = box_ops.clip(boxes[image], size), logits[image]
            sides = own[:, 2:] - own[:, :2]
            large = sides >= rules.smallest_side if rules.inclusive else sides > rules.smallest_side
            good = large.all(1) & torch.isfinite(own).all(1) & torch.isfinite(score)
            own, score, group = own[good], score[good], level[good]
            ranked = score.sigmoid() if rules.by == "probability" else score
            kept = box_ops.nms(own, ranked, group, rules.overlap, after)
            result.append((own[kept], score[kept]))
    return result


def proposal_losses(
    objectness: Sequence[Float[Tensor, "b a _h _w"]],
    deltas: Sequence[Float[Tensor, "b d _h _w"]],
    anchors: Sequence[Float[Tensor, "_n 4"]],
    targets: Sequence[Instances],
    rules: ProposalRules,
) -> dict[str, Tensor]:
    """`rpn_objectness`: cross entropy over a sample of anchors; `rpn_box`: smooth L1 of the positives' deltas."""
    logits = torch.cat(_rows(objectness, 1), 1)[..., 0]  # (B, N)
    shifts = torch.cat(_rows(deltas, 4), 1)  # (B, N, 4)
    every = torch.cat(list(anchors))
    class_loss, box_loss, sampled = logits.sum() * 0, shifts.sum() * 0, 0
    for image, target in enumerate(targets):
        with torch.no_grad():
            nearest, matched = match(box_ops.pairwise_iou(target.boxes, every), 0.3, 0.7, rescue=True)
            positive, negative = sample(matched >= 0, matched == NEGATIVE, rules.sample, rules.positives)
            index = torch.cat([positive, negative])
            truth = torch.zeros(len(index), device=logits.device)
            truth[: len(positive)] = 1
        class_loss = class_loss + functional.binary_cross_entropy_with_logits(
            logits[image, index], truth, reduction="sum"
        )
        if len(target):
            goal = box_ops.encode(every[positive], target.boxes[nearest[positive]])
            box_loss = box_loss + smooth_l1_sum(shifts[image, positive], goal, rules.beta)
        sampled += len(index)
    total = len(targets) * rules.sample if rules.loss == "fixed" else sampled
    count = global_mean_count(logits.new_tensor(float(total)))
    return {"rpn_objectness": class_loss / count, "rpn_box": box_loss / count}
