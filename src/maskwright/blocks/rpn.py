"""Region proposal network (Faster R-CNN, arXiv 1506.01497), on one level or on a pyramid."""

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
from maskwright.ops.matching import IGNORED, NEGATIVE, Rescue, match, sample
from maskwright.structures import Instances

AnchorRule = Literal["detectron2", "torchvision", "maskrcnn-benchmark"]


@dataclass(frozen=True)
class ProposalRules:
    """Conventions of the proposal network, in which the published code bases differ.

    Attributes:
        anchors: The rule for anchors, see `Anchors`.
        anchor_offset: Position of the anchors in a cell, see `Anchors`.
        loss: Divisor of both terms. "fixed": images times `sample` (detectron2); "sampled": the number of sampled
            anchors.
        beta: Beta of the smooth L1 loss; 0 is L1.
        smallest_side: Proposals with a side at or below it are dropped.
        inclusive: Proposals with a side of exactly `smallest_side` are kept.
        rank_by: Proposals of all levels are ranked by "logit" or by "probability", which differ where float32
            probabilities are equal.
        before: Best proposals per level that are kept before non-maximum suppression, in training and at test time.
        after: Best proposals of all levels that are kept after it, in training and at test time.
        nms_threshold: IoU threshold of the non-maximum suppression within a level.
        sample: Anchors per image in the loss.
        positives: Largest share of positive anchors among them.
        plus_one: Sides of boxes are x1 - x0 + 1 (maskrcnn-benchmark).
        straddle: Anchors that reach further than this out of the image are ignored in the loss; None: none is.
        whole_batch: In training `after` is the number of proposals of the whole batch.
        rescue: How the best anchors of an object become positive, see `ops.matching.match`. With "own" anchors that
            `straddle` ignores are no candidates.
        rescue_from: An object whose best anchor overlaps it less has none.
        symmetric: See `ops.boxes.decode`.
    """

    anchors: AnchorRule = "detectron2"
    anchor_offset: float = 0.0
    loss: Literal["fixed", "sampled"] = "fixed"
    beta: float = 0.0
    smallest_side: float = 0.0
    inclusive: bool = False
    rank_by: Literal["logit", "probability"] = "logit"
    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (1000, 1000)
    nms_threshold: float = 0.7
    sample: int = 256
    positives: float = 0.5
    plus_one: bool = False
    straddle: float | None = None
    whole_batch: bool = False
    rescue: Rescue = True
    rescue_from: float = 0.0
    symmetric: bool = False


class Anchors(nn.Module):
    """Anchor boxes of A shapes at every cell of each level, in the order y, x, shape.

    Args:
        sizes: For each level the square roots of the areas, in pixels.
        strides: Stride of each level.
        ratios: Height divided by width.
        rule: "detectron2": real-valued shapes around multiples of the stride. "torchvision": half sides rounded to
            integers, around multiples of the input's size divided by the map's. "maskrcnn-benchmark": Detectron's
            rule, in which a box from pixel 0 to pixel stride - 1 is scaled, with the sides of each ratio rounded; sides
            include their last pixel.
        offset: Position of the anchors in a cell as a fraction of the stride: 0 is the corner, 0.5 the centre.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        strides: Sequence[int],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rule: AnchorRule = "detectron2",
        offset: float = 0.0,
    ):
        super().__init__()
        self.strides, self.rule, self.offset = list(strides), rule, offset
        self.count = len(sizes[0]) * len(ratios)
        for level, (own, stride) in enumerate(zip(sizes, strides, strict=True)):
            self.register_buffer(f"shapes{level}", anchor_shapes(own, ratios, rule, stride), persistent=False)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Float[Tensor, "_n 4"]]:
        """Anchors (H W A, 4) of each level, for an input of `size` (height, width), padding included."""
        result = []
        for level, feature in enumerate(features):
            height, width = feature.shape[-2:]
            shapes = getattr(self, f"shapes{level}").to(feature.device)
            stride = self.strides[level]
            torchvision = self.rule == "torchvision"
            down, across = (size[0] // height, size[1] // width) if torchvision else (stride, stride)
            y = (torch.arange(height, device=feature.device, dtype=torch.float32) + self.offset) * down
            x = (torch.arange(width, device=feature.device, dtype=torch.float32) + self.offset) * across
            corners = torch.stack([x.repeat(height), y.repeat_interleave(width)] * 2, 1)
            result.append((corners[:, None] + shapes).reshape(-1, 4))
        return result


def anchor_shapes(
    sizes: Sequence[float], ratios: Sequence[float], rule: AnchorRule = "detectron2", stride: int = 16
) -> Float[Tensor, "a 4"]:
    """Anchor boxes at the origin; the arguments are those of `Anchors` for one level."""
    if rule == "torchvision":  # in float32 throughout, as the original
        roots = torch.tensor(ratios).sqrt()
        widths = ((1 / roots)[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
        heights = (roots[:, None] * torch.tensor(sizes, dtype=torch.float32)).flatten()
        return (torch.stack([-widths, -heights, widths, heights], 1) / 2).round()
    rows = []
    if rule == "maskrcnn-benchmark":
        centre = 0.5 * (stride - 1)
        for ratio in ratios:
            width = round(math.sqrt(stride * stride / ratio))
            height = round(width * ratio)
            for size in sizes:
                x, y = 0.5 * (width * size / stride - 1), 0.5 * (height * size / stride - 1)
                rows.append([centre - x, centre - y, centre + x, centre + y])
        return torch.tensor(rows)
    for size in sizes:
        for ratio in ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            rows.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(rows)


class RPNHead(nn.Module):
    """3 x 3 convolutions shared by all levels, then objectness (A) and deltas (A blocks of 4) of each anchor.

    Args:
        channels: Channels of every level.
        anchors: Anchors per location.
        convs: Number of 3 x 3 convolutions.
        width: Channels of the convolutions; default `channels`.
    """

    def __init__(self, channels: int, anchors: int, convs: int = 1, width: int | None = None):
        super().__init__()
        width = width or channels
        self.convs = nn.ModuleList(nn.Conv2d(width if n else channels, width, 3, padding=1) for n in range(convs))
        self.objectness = nn.Conv2d(width if convs else channels, anchors, 1)
        self.deltas = nn.Conv2d(width if convs else channels, 4 * anchors, 1)
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Sequence[Float[Tensor, "b c _h _w"]]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the objectness logits and the deltas of each level."""
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
    """Converts the output of the proposal network to boxes.

    Args:
        objectness: Logits of each level.
        deltas: Box deltas of each level.
        anchors: Anchors of each level.
        sizes: Height and width of the valid part of each image in the input, to which boxes are clipped.
        rules: Conventions and numbers.
        training: Whether the numbers of proposals are those of training.

    Returns:
        Boxes and their logits for each image, best first, without gradient. In training with `rules.whole_batch` they
        are in the order of the levels, and best first within each.
    """
    before, after = (rules.before[0], rules.after[0]) if training else (rules.before[1], rules.after[1])
    chosen_boxes, chosen_logits, levels = [], [], []
    with torch.no_grad():
        for level, (logits, shifts, own) in enumerate(
            zip(_rows(objectness, 1), _rows(deltas, 4), anchors, strict=True)
        ):
            best, index = logits[..., 0].topk(min(before, len(own)), dim=1)  # (B, k)
            shift = shifts.gather(1, index[..., None].expand(-1, -1, 4))
            chosen_boxes.append(box_ops.decode(own[index], shift, plus_one=rules.plus_one, symmetric=rules.symmetric))
            chosen_logits.append(best)
            levels.append(best.new_full(best.shape[1:], level, dtype=torch.int64))
        boxes, logits, level = torch.cat(chosen_boxes, 1), torch.cat(chosen_logits, 1), torch.cat(levels)
        result = []
        for image, size in enumerate(sizes):
            own, score = box_ops.clip(boxes[image], size, rules.plus_one), logits[image]
            sides = own[:, 2:] - own[:, :2] + (1 if rules.plus_one else 0)
            large = sides >= rules.smallest_side if rules.inclusive else sides > rules.smallest_side
            good = large.all(1) & torch.isfinite(own).all(1) & torch.isfinite(score)
            own, score, group = own[good], score[good], level[good]
            ranked = score.sigmoid() if rules.rank_by == "probability" else score
            kept = box_ops.nms(own, ranked, group, rules.nms_threshold, after, rules.plus_one)
            if training and rules.whole_batch:
                kept = kept[group[kept].argsort(stable=True)]
            result.append((own[kept], score[kept]))
        if training and rules.whole_batch and sum(len(score) for _, score in result) > after:
            worst = torch.cat([score for _, score in result]).topk(after).values[-1]
            result = [(own[score >= worst], score[score >= worst]) for own, score in result]
    return result


def proposal_losses(
    objectness: Sequence[Float[Tensor, "b a _h _w"]],
    deltas: Sequence[Float[Tensor, "b d _h _w"]],
    anchors: Sequence[Float[Tensor, "_n 4"]],
    targets: Sequence[Instances],
    rules: ProposalRules,
) -> dict[str, Tensor]:
    """Computes the losses of the proposal network (Faster R-CNN, section 3.1.2).

    Args:
        objectness: Logits of each level.
        deltas: Box deltas of each level.
        anchors: Anchors of each level.
        targets: Objects of each image, in the frame of the input.
        rules: Conventions and numbers.

    Returns:
        "rpn_objectness": binary cross entropy over sampled anchors. "rpn_box": smooth L1 loss of the deltas of the
        positive ones.
    """
    logits = torch.cat(_rows(objectness, 1), 1)[..., 0]  # (B, N)
    shifts = torch.cat(_rows(deltas, 4), 1)  # (B, N, 4)
    every = torch.cat(list(anchors))
    class_loss, box_loss, sampled = logits.sum() * 0, shifts.sum() * 0, 0
    for image, target in enumerate(targets):
        with torch.no_grad():
            overlap = box_ops.pairwise_iou(target.boxes, every, plus_one=rules.plus_one)
            inside = None if rules.straddle is None else _inside(every, target.image_size, rules.straddle)
            if inside is not None and rules.rescue == "own":
                overlap = torch.where(inside, overlap, -1.0)
            nearest, matched = match(overlap, 0.3, 0.7, rules.rescue, rules.rescue_from)
            if inside is not None:
                matched = torch.where(inside, matched, IGNORED)
            positive, negative = sample(matched >= 0, matched == NEGATIVE, rules.sample, rules.positives)
            index = torch.cat([positive, negative])
            truth = torch.zeros(len(index), device=logits.device)
            truth[: len(positive)] = 1
        class_loss = class_loss + functional.binary_cross_entropy_with_logits(
            logits[image, index], truth, reduction="sum"
        )
        if len(target):
            goal = box_ops.encode(every[positive], target.boxes[nearest[positive]], plus_one=rules.plus_one)
            box_loss = box_loss + smooth_l1_sum(shifts[image, positive], goal, rules.beta)
        sampled += len(index)
    total = len(targets) * rules.sample if rules.loss == "fixed" else sampled
    count = global_mean_count(logits.new_tensor(float(total)))
    return {"rpn_objectness": class_loss / count, "rpn_box": box_loss / count}


def _inside(anchors: Tensor, size: tuple[int, int], margin: float) -> Tensor:
    """Which anchors reach at most `margin` pixels out of an image of `size` (height, width)."""
    low, high = anchors[:, :2], anchors[:, 2:]
    limit = anchors.new_tensor([size[1] + margin, size[0] + margin])
    return (low >= -margin).all(1) & (high < limit).all(1)
