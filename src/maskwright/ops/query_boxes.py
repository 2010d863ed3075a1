"""Boxes predicted by queries (DETR, arXiv 2005.12872): targets, matching costs and losses.

Boxes are centre x, y, width, height as fractions of the image without its padding. Tensors are (L, B, N, ...): L
predictions, after each decoder layer, of N queries for each of B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import Pairs
from maskwright.ops.query_losses import Labelled
from maskwright.structures import Instances, Masks

BUDGET = 256 << 20  # bytes of scratch


@dataclass(frozen=True)
class BoxTargets:
    """The target of one image, without crowd regions.

    Attributes:
        labels: Classes of the objects.
        boxes: Centre x, y, width, height as fractions of the image.
        size: Height and width of the image without padding, in pixels.
        masks: Their masks, or None where the data have boxes only.
    """

    labels: Int[Tensor, " m"]
    boxes: Float[Tensor, "m 4"]
    size: tuple[int, int]
    masks: Masks | None = None

    @classmethod
    def from_instances(cls, target: Instances, device: torch.device) -> BoxTargets:
        """Converts the annotated objects of one image; masks remain where they are, the rest goes to `device`."""
        if target.crowd is not None and target.crowd.any():
            target = target[~target.crowd]
        boxes = relative_boxes(target.boxes.to(device), target.image_size)
        return cls(target.labels.to(device), boxes, target.image_size, target.masks)

    def __len__(self) -> int:
        return len(self.labels)

    def repeated(self, times: int) -> BoxTargets:
        """Every object `times` times, one round after the other, without masks."""
        return BoxTargets(self.labels.repeat(times), self.boxes.repeat(times, 1), self.size)

    def required_masks(self) -> Masks:
        """The masks, for a loss that compares them.

        Raises:
            UsageError: If there are objects without masks.
        """
        if self.masks is not None:
            return self.masks
        if len(self):
            raise UsageError("targets have boxes but no masks; this loss compares masks")
        return Masks.empty(self.size)


def relative_boxes(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Float[Tensor, "n 4"]:
    """Converts boxes to fractions of the image.

    Args:
        boxes: x0, y0, x1, y1 in pixels.
        size: Height and width of the image, in pixels.

    Returns:
        Centre x, y, width, height as fractions, in float32.
    """
    relative = boxes.float() / boxes.new_tensor([size[1], size[0], size[1], size[0]]).float()
    return torch.cat([(relative[:, :2] + relative[:, 2:]) / 2, relative[:, 2:] - relative[:, :2]], 1)


@torch.no_grad()
def box_costs(
    predicted: Float[Tensor, "l n 4"], true: Float[Tensor, "m 4"], box_weight: float, giou_weight: float
) -> Float[Tensor, "l n m"]:
    """Matching cost of every predicted box with every true one (DETR, section 3.1, "bounding box loss").

    Objects are processed in parts, so that scratch memory does not grow with their number.

    Args:
        predicted: Boxes of one image.
        true: Boxes of its objects.
        box_weight: Weight of the L1 distance.
        giou_weight: Weight of the generalised IoU, which is subtracted.

    Returns:
        The costs, in float32.
    """
    corners = box_ops.corners(predicted.float())[:, :, None]
    costs: list[Tensor] = []
    for part in true.split(max(1, BUDGET // (100 * max(1, predicted.shape[0] * predicted.shape[1])))):
        distance = torch.cdist(predicted.float(), part.expand(len(predicted), -1, -1), p=1)
        overlap = box_ops.generalised_iou(corners, box_ops.corners(part)[None, None])
        costs.append(box_weight * distance - giou_weight * overlap)
    return torch.cat(costs, 2) if costs else predicted.new_zeros(*predicted.shape[:2], 0, dtype=torch.float32)


def box_losses(
    predicted: Float[Tensor, "l b n 4"], targets: Sequence[BoxTargets], pairs: Sequence[Pairs]
) -> dict[str, Float[Tensor, " l"]]:
    """Losses of the boxes of matched queries.

    Args:
        predicted: Boxes of all queries.
        targets: Objects of each image.
        pairs: Matched queries and objects of each image.

    Returns:
        Sums over the pairs: "box", the L1 distance, and "giou", 1 - generalised IoU.
    """
    chosen: list[Tensor] = []
    true: list[Tensor] = []
    for image, (target, (queries, objects)) in enumerate(zip(targets, pairs, strict=True)):
        chosen.append(predicted[:, image].float().gather(1, queries[..., None].expand(-1, -1, 4)))
        true.append(target.boxes[objects])  # (L, P, 4)
    a, b = torch.cat(chosen, 1), torch.cat(true, 1)
    overlap = box_ops.generalised_iou(box_ops.corners(a), box_ops.corners(b))
    return {"box": (a - b).abs().sum((1, 2)), "giou": (1 - overlap).sum(1)}


# ---- one sigmoid per class (Deformable DETR, arXiv 2010.04159) -------------------------------------------------------


@torch.no_grad()
def focal_costs(
    logits: Float[Tensor, "l n c"], labels: Int[Tensor, " m"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "l n m"]:
    """Matching cost of the class: the change of a query's focal loss if the object's class becomes its target.

    Args:
        logits: Class logits of one image.
        labels: Classes of its objects.
        alpha: Weight of positives, see `ops.losses.focal_sum`.
        gamma: Exponent of the focal loss.
    """
    chosen = logits.float()[..., labels]
    probability = chosen.sigmoid()
    # The published code adds 1e-8 inside the logarithms.
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return positive - negative


def focal_classes(
    logits: Float[Tensor, "l b n c"],
    targets: Sequence[Labelled],
    pairs: Sequence[Pairs],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, " l"]:
    """Sigmoid focal loss of all queries and classes.

    Args:
        logits: Class logits.
        targets: Objects of each image.
        pairs: Matched queries and objects of each image; the target of an unmatched query is 0 for every class.
        alpha: Weight of positives.
        gamma: Exponent of the focal loss.

    Returns:
        Sums over images, queries and classes.
    """
    goal = torch.zeros(logits.shape, device=logits.device)
    for image, (target, (queries, objects)) in enumerate(zip(targets, pairs, strict=True)):
        rows = torch.arange(len(goal), device=goal.device)[:, None].expand_as(queries)
        goal[rows, image, queries, target.labels[objects]] = 1.0
    values = logits.float()
    cross = functional.binary_cross_entropy_with_logits(values, goal, reduction="none")
    probability = values.sigmoid()
    error = probability + goal - 2 * probability * goal
    weight = 1 - alpha + (2 * alpha - 1) * goal
    return (weight * error.pow(gamma) * cross).sum((1, 2, 3))


def inverse_sigmoid(values: Float[Tensor, "*n"], epsilon: float = 1e-5) -> Float[Tensor, "*n"]:
    """Logits of fractions, which are clamped to [`epsilon`, 1 - `epsilon`]."""
    if torch.compiler.is_exporting():  # onnxscript's optimiser loses the bounds of a tensor that is clamped twice
        odds = torch.where(values > epsilon, values, epsilon) / torch.where(values < 1 - epsilon, 1 - values, epsilon)
        return odds.log()
    values = values.clamp(0, 1)
    return (values.clamp(min=epsilon) / (1 - values).clamp(min=epsilon)).log()
