"""The arithmetic of a box stage (Fast R-CNN, arXiv 1504.08083): sampling of boxes, losses, detections.

A stage classifies boxes and refines them. Its network is a `BoxHead`; its conventions and numbers are `BoxRules`. A
cascade is several stages, each with its own network and rules: `sample_boxes` for the first one, `assign_boxes` for
later ones, and `decode_boxes` between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.matching import match, sample
from maskwright.structures import Instances


@dataclass(frozen=True)
class BoxRules:
    """Conventions and numbers of a box stage.

    Attributes:
        beta: Beta of the smooth L1 loss; 0 is L1.
        sampled_order: Order of the sampled boxes, which matters where rounding is compared: "kinds": foreground first
            (detectron2); "index": by their position among the proposals (torchvision).
        smallest_side: Detections with a side below it are dropped before non-maximum suppression.
        sample: Boxes per image in the loss.
        positives: Largest share of foreground boxes among them.
        overlap: A box is foreground if its IoU with an object is at least this.
        weights: Weights of the deltas dx, dy, dw, dh.
        plus_one: Sides of boxes are x1 - x0 + 1 (maskrcnn-benchmark).
        rescue: The best boxes of an object are assigned to it even if they overlap another one more, provided that they
            are foreground (MMDetection, in some systems).
        added_own: Boxes of objects that are added to the sample belong to these objects, instead of being matched as
            proposals are (MMDetection).
        symmetric: See `ops.boxes.decode`.
        left_out: Boxes of a stage of a cascade that the next one is not trained on: "collapsed" ones, without area
            (detectron2), or those that the "objects" added to the sample have become (MMDetection).
        mean_of: What is averaged over the stages of a cascade: "probabilities", or "logits" (MMDetection).
        mean_at: The boxes that it is computed at: those that each stage has received, or for all stages those of the
            "last" one (Detectron).
        clipped: The boxes that a stage of a cascade passes on are clipped to the image (all but Detectron).
        across_classes: Non-maximum suppression ignores classes.
    """

    beta: float = 0.0
    sampled_order: Literal["kinds", "index"] = "kinds"
    smallest_side: float = 0.0
    sample: int = 512
    positives: float = 0.25
    overlap: float = 0.5
    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    plus_one: bool = False
    rescue: bool = False
    added_own: bool = False
    symmetric: bool = False
    left_out: Literal["collapsed", "objects"] = "collapsed"
    mean_of: Literal["probabilities", "logits"] = "probabilities"
    mean_at: Literal["own", "last"] = "own"
    clipped: bool = True
    across_classes: bool = False


@dataclass(frozen=True)
class Assigned:
    """Boxes of one image with the objects that they are assigned to.

    Attributes:
        boxes: The boxes.
        labels: Class of each box; K is background.
        foreground: Indices of the boxes that are assigned to an object.
        owners: The object of each foreground box.
        added: Which boxes are those of objects that were added to the sample.
    """

    boxes: Float[Tensor, "r 4"]
    labels: Int[Tensor, " r"]
    foreground: Int[Tensor, " p"]
    owners: Int[Tensor, " p"]
    added: Bool[Tensor, " r"] | None = None


@dataclass(frozen=True)
class Foreground:
    """The foreground boxes of a batch: what mask and keypoint heads are trained on.

    Attributes:
        boxes: Boxes of each image.
        labels: Class of each box, image after image.
        owners: For each image the object of each box.
    """

    boxes: list[Float[Tensor, "_n 4"]]
    labels: Int[Tensor, " r"]
    owners: list[Int[Tensor, " _n"]]

    @classmethod
    def from_assigned(cls, assigned: Sequence[Assigned]) -> Foreground:
        """The foreground of the boxes of each image."""
        return cls(
            [own.boxes[own.foreground] for own in assigned],
            torch.cat([own.labels[own.foreground] for own in assigned]),
            [own.owners for own in assigned],
        )

    def select(self, rows: Sequence[Bool[Tensor, " _n"]]) -> Foreground:
        """The boxes of each image that `rows` marks."""
        return Foreground(
            [own[kept] for own, kept in zip(self.boxes, rows, strict=True)],
            self.labels[torch.cat(list(rows))],
            [own[kept] for own, kept in zip(self.owners, rows, strict=True)],
        )


class Detections(NamedTuple):
    """Detected boxes of one image in pixels of the input, best first."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]


# ---- training --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assign_boxes(boxes: Float[Tensor, "n 4"], target: Instances, classes: int, rules: BoxRules) -> Assigned:
    """Assigns every box to the object that it overlaps most, or to background."""
    nearest, matched = _match(boxes, target, rules)
    every = torch.arange(len(boxes), device=boxes.device)
    return _assigned(boxes, every, nearest, matched, target, classes, len(boxes))


@torch.no_grad()
def sample_boxes(proposals: Float[Tensor, "n 4"], target: Instances, classes: int, rules: BoxRules) -> Assigned:
    """Samples boxes among the proposals and the objects' own boxes, which both code bases add, and assigns them."""
    boxes = torch.cat([proposals, target.boxes.to(proposals)])
    if rules.added_own:
        objects = torch.arange(len(target), device=boxes.device)
        nearest, matched = (torch.cat([own, objects]) for own in _match(proposals, target, rules))
    else:
        nearest, matched = _match(boxes, target, rules)
    positive, negative = sample(matched >= 0, matched < 0, rules.sample, rules.positives)
    index = torch.cat([positive, negative])
    if rules.sampled_order == "index":
        index = index.sort().values
    return _assigned(boxes, index, nearest, matched, target, classes, len(proposals))


def _match(boxes: Tensor, target: Instances, rules: BoxRules) -> tuple[Tensor, Tensor]:
    overlap = box_ops.pairwise_iou(target.boxes.to(boxes), boxes, plus_one=rules.plus_one)
    return match(overlap, rules.overlap, rules.overlap, "own" if rules.rescue else False, rules.overlap)


def _assigned(
    boxes: Tensor, index: Tensor, nearest: Tensor, matched: Tensor, target: Instances, classes: int, proposals: int
) -> Assigned:
    foreground = (matched[index] >= 0).nonzero().flatten()
    labels = torch.full_like(index, classes)
    owners = nearest[index[foreground]]
    labels[foreground] = target.labels.to(labels)[owners]
    return Assigned(boxes[index], labels, foreground, owners, index >= proposals)


def foreground_rows(assigned: Sequence[Assigned]) -> Int[Tensor, " p"]:
    """Indices of the foreground among the boxes of all images, one image after the other."""
    offset, rows = 0, []
    for own in assigned:
        rows.append(own.foreground + offset)
        offset += len(own.labels)
    return torch.cat(rows)


def box_losses(
    logits: Float[Tensor, "r k"], deltas: Float[Tensor, "r d"], assigned: Sequence[Assigned],
    targets: Sequence[Instances], rules: BoxRules,
) -> dict[str, Tensor]:  # fmt: skip
    """Computes the losses of a stage; both are divided by the number of boxes.

    Args:
        logits: Class logits of all boxes.
        deltas: Box deltas.
        assigned: The boxes of each image.
        targets: Objects of each image.
        rules: Conventions and numbers.

    Returns:
        "class": cross entropy of all boxes. "box": smooth L1 loss of the deltas of the foreground.
    """
    logits, deltas = logits.float(), deltas.float()
    labels = torch.cat([own.labels for own in assigned])
    count = global_mean_count(logits.new_tensor(float(len(labels))))
    class_loss = functional.cross_entropy(logits, labels, reduction="sum") + logits.sum() * 0
    goals = [
        box_ops.encode(own.boxes[own.foreground], target.boxes[own.owners].to(own.boxes), rules.weights, rules.plus_one)
        for own, target in zip(assigned, targets, strict=True)
        if len(own.foreground)
    ]
    rows = foreground_rows(assigned)
    box_loss = deltas.sum() * 0
    if goals:
        box_loss = box_loss + smooth_l1_sum(own_deltas(deltas[rows], labels[rows]), torch.cat(goals), rules.beta)
    return {"class": class_loss / count, "box": box_loss / count}


def own_deltas(deltas: Float[Tensor, "r d"], labels: Int[Tensor, " r"]) -> Float[Tensor, "r 4"]:
    """The deltas of each box's own class; of all classes if they are class-agnostic."""
    each = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
    return each[torch.arange(len(labels), device=labels.device), labels] if each.shape[1] > 1 else each[:, 0]


# ---- detection -------------------------------------------------------------------------------------------------------


def decode_boxes(deltas: Float[Tensor, "r d"], boxes: Float[Tensor, "r 4"], rules: BoxRules) -> Float[Tensor, "r k 4"]:
    """Applies deltas to boxes: one box per class, or one for all classes if they are class-agnostic."""
    each = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
    return box_ops.decode(boxes[:, None].expand_as(each), each, rules.weights, rules.plus_one, rules.symmetric)


def detect(
    scores: Float[Tensor, "r k"], boxes: Float[Tensor, "r _k 4"], counts: Sequence[int],
    sizes: Sequence[tuple[int, int]], rules: BoxRules, *, score_threshold: float, nms_threshold: float, detections: int,
) -> list[Detections]:  # fmt: skip
    """Selects detections by score and non-maximum suppression, within each class unless the rules say otherwise.

    Args:
        scores: Probability of each class, without background.
        boxes: Box of each class, or one box for all classes.
        counts: Number of boxes of each image.
        sizes: Height and width of the valid part of each image in the input, to which boxes are clipped.
        rules: Conventions and numbers.
        score_threshold: Detections must score more than this.
        nms_threshold: IoU threshold of the suppression.
        detections: Largest number of detections per image.
    """
    result, counts = [], list(counts)
    for own, score, size in zip(boxes.split(counts), scores.split(counts), sizes, strict=True):
        good = torch.isfinite(own).all(-1).all(-1) & torch.isfinite(score).all(-1)
        row, label = ((score > score_threshold) & good[:, None]).nonzero().unbind(1)
        chosen = box_ops.clip(own[row, label if own.shape[1] > 1 else 0], size, rules.plus_one)
        confidence = score[row, label]
        if rules.smallest_side > 0:
            large = (chosen[:, 2:] - chosen[:, :2] >= rules.smallest_side).all(1)
            chosen, confidence, label = chosen[large], confidence[large], label[large]
        group = torch.zeros_like(label) if rules.across_classes else label
        kept = box_ops.nms(chosen, confidence, group, nms_threshold, detections, rules.plus_one)
        result.append(Detections(chosen[kept], confidence[kept], label[kept]))
    return result
