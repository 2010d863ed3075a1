"""Losses that several systems share; each returns sums, so that the caller names the normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def smooth_l1_sum(prediction: Shaped[Tensor, "*n"], target: Shaped[Tensor, "*n"], beta: float) -> Float[Tensor, ""]:
    """Sum of 0.5 d^2 / beta below beta and |d| - 0.5 beta above (Fast R-CNN, arXiv 1504.08083, eq. 3); L1 at 0."""
    if beta == 0:
        return (prediction - target).abs().sum()
    return torch.nn.functional.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")


def focal_sum(
    logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, ""]:
    """Sum of the sigmoid focal loss (RetinaNet, arXiv 1708.02002, eq. 5): cross entropy, less where it is right anyway.

    `target` is 0 or 1; `alpha` weighs the ones, 1 - alpha the zeros.
    """
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target  # 1 - p where the target is 1, p where it is 0
    weight = 1 - alpha + (2 * alpha - 1) * target
    return (weight * wrong.pow(gamma) * cross).sum()


def soft_margin(logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 + exp(-y x)) of each element, y = 1 where the target is 1 and -1 where it is 0."""
    return torch.nn.functional.softplus(-logits * (2 * target - 1))


def dice(
    probabilities: Float[Tensor, "n p"], target: Float[Tensor, "n p"], epsilon: float = 1e-3
) -> Float[Tensor, " n"]:
    """1 - 2 sum(p t) / (sum(p^2) + sum(t^2)) of each row, `epsilon` added to both sums (V-Net, arXiv 1606.04797)."""
    both = (probabilities * target).sum(1)
    return 1 - 2 * both / (probabilities.square().sum(1) + target.square().sum(1) + 2 * epsilon)


def lovasz_hinge(logits: Float[Tensor, "n p"], target: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """The Lovász extension of the Jaccard loss on hinge errors, of each row (arXiv 1705.08790); targets are 0 or 1."""
    errors, order = (1 - logits * (2 * target - 1)).sort(1, descending=True)
    truth = target.gather(1, order)
    both = truth.sum(1, keepdim=True) - truth.cumsum(1)
    union = truth.sum(1, keepdim=True) + (1 - truth).cumsum(1)
    jaccard = 1 - both / union
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], 1)
    return (errors.relu() * steps).sum(1)
