"""Learning boxes with queries (DETR, arXiv 2005.12872): what is to be learnt, what matching costs, what the losses are.

Boxes are centre x, y, width, height as shares of the image without its padding. Tensors are (L, B, N, ...): L
predictions, by each decoder layer, of N queries for each of B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import Pairs
from maskwright.ops.query_losses import Objects
from maskwright.structures import Instances, Masks

BUDGET = 256 << 20  # bytes of scratch


@dataclass(frozen=True)
class Boxed(Objects):
    """What is to be learnt in one image, with boxes as the network gives them."""

    boxes: Float[Tensor, "m 4"]

    @classmethod
    def of(cls, target: Instances, device: torch.device) -> Boxed:
        """No crowd; masks may be missing, and are none then."""
        if target.crowd is not None and target.crowd.any():
            target = target[~target.crowd]
        masks = Masks.empty(target.image_size) if target.masks is None else target.masks
        return cls(target.labels.to(device), masks, shares(target.boxes.to(device), target.image_size))

    def repeated(self, times: int) -> Boxed:
        """Each object so often, one round after the other. Masks are left out."""
        labels, boxes = self.labels.repeat(times), self.boxes.repeat(times, 1)
        return Boxed(labels, Masks.empty(self.masks.size), boxes)


def shares(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Float[Tensor, "n 4"]:
    """x0, y0, x1, y1 in pixels of an image of `size` (H, W) -> centre and sides as shares of it."""
    relative = boxes.float() / boxes.new_tensor([size[1], size[0], size[1], size[0]]).float()
    return torch.cat([(relative[:, :2] + relative[:, 2:]) / 2, relative[:, 2:] - relative[:, :2]], 1)


@torch.no_grad()
def box_costs(
    said: Float[Tensor, "l n 4"], true: Float[Tensor, "m 4"], distance: float, overlap: float
) -> Float[Tensor, "l n m"]:
    """`distance` x L1 - `overlap` x GIoU of every predicted box with every true one; some objects at a time, so that
    scratch is bounded however many boxes there are."""
    corners = box_ops.corners(said.float())[:, :, None]
    costs = []
    for part in true.split(max(1, BUDGET // (100 * max(1, said.shape[0] * said.shape[1])))):
        apart = torch.cdist(said.float(), part.expand(len(said), -1, -1), p=1)
        shared = box_ops.generalised_iou(corners, box_ops.corners(part)[None, None])
        costs.append(distance * apart - overlap * shared)
    return torch.cat(costs, 2) if costs else said.new_zeros(*said.shape[:2], 0, dtype=torch.float32)


def box_losses(said: Float[Tensor, "l b n 4"], objects: Sequence[Boxed], pairs: Sequence[Pairs]) -> dict[str, Tensor]:
    """Sums over matched pairs, (L,) each, of "box", the L1 distance, and "giou", 1 - GIoU."""
    found, true = [], []
    for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
        found.append(said[:, image].float().gather(1, queries[..., None].expand(-1, -1, 4)))
        true.append(own.boxes[which])  # (L, P, 4)
    a, b = torch.cat(found, 1), torch.cat(true, 1)
    overlap = box_ops.generalised_iou(box_ops.corners(a), box_ops.corners(b))
    return {"box": (a - b).abs().sum((1, 2)), "giou": (1 - overlap).sum(1)}


# ---- classes by a sigmoid each (Deformable DETR, arXiv 2010.04159) ------------------------------------------------


@torch.no_grad()
def focal_costs(
    logits: Float[Tensor, "l n c"], labels: Int[Tensor, " m"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "l n m"]:
    """How much the focal loss grows or falls where a query's answer has to be the object's class instead of not."""
    chosen = logits.float()[..., labels]
    probability = chosen.sigmoid()
    # The code adds 1e-8 inside the logarithms.
    yes = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    no = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return yes - no


def focal_classes(
    logits: Float[Tensor, "l b n c"],
    objects: Sequence[Objects],
    pairs: Sequence[Pairs],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, " l"]:
    """Sums of the sigmoid focal loss over all queries and classes; who has no object learns zero for each class."""
    goal = torch.zeros(logits.shape, device=logits.device)
    for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
        rows = torch.arange(len(goal), device=goal.device)[:, None].expand_as(queries)
        goal[rows, image, queries, own.labels[which]] = 1.0
    values = logits.float()
    cross = functional.binary_cross_entropy_with_logits(values, goal, reduction="none")
    probability = values.sigmoid()
    wrong = probability + goal - 2 * probability * goal
    weight = 1 - alpha + (2 * alpha - 1) * goal
    return (weight * wrong.pow(gamma) * cross).sum((1, 2, 3))


def inverse_sigmoid(values: Float[Tensor, "*n"], epsilon: float = 1e-5) -> Float[Tensor, "*n"]:
    """Logits of shares, which are kept `epsilon` away from 0 and 1."""
    values = values.clamp(0, 1)
    return (values.clamp(min=epsilon) / (1 - values).clamp(min=epsilon)).log()
