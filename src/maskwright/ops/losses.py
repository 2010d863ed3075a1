"""Losses shared by several systems. Sums are returned, not means: the caller chooses the normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional


def smooth_l1_sum(prediction: Shaped[Tensor, "*n"], target: Shaped[Tensor, "*n"], beta: float) -> Float[Tensor, ""]:
    """Sum of the smooth L1 loss (Fast R-CNN, arXiv 1504.08083, eq. 3).

    Args:
        prediction: Predicted values.
        target: Target values.
        beta: The loss is `0.5 d^2 / beta` below and `|d| - 0.5 beta` above; L1 at 0.
    """
    if beta == 0:
        return (prediction - target).abs().sum()
    return functional.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")


def focal_sum(
    logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, ""]:
    """Sum of the sigmoid focal loss: cross entropy, reduced where the prediction is right (RetinaNet, arXiv 1708.02002,
    eq. 5).

    Args:
        logits: Predicted logits.
        target: 0 or 1.
        alpha: Weight of the ones; the zeros have 1 - alpha.
        gamma: Exponent of the modulating factor.
    """
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    wrong = probability + target - 2 * probability * target  # 1 - p where the target is 1, p where it is 0
    weight = 1 - alpha + (2 * alpha - 1) * target
    return (weight * wrong.pow(gamma) * cross).sum()


def soft_margin(logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 + exp(-y x)) of each element, with y = 1 where the target is 1 and -1 where it is 0."""
    return functional.softplus(-logits * (2 * target - 1))


def dice(
    probabilities: Float[Tensor, "n p"], target: Float[Tensor, "n p"], epsilon: float = 1e-3
) -> Float[Tensor, " n"]:
    """Dice loss of each row: 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)) (V-Net, arXiv 1606.04797).

    Args:
        probabilities: Predicted probabilities.
        target: 0 or 1.
        epsilon: Added to each of the two sums in the denominator.
    """
    both = (probabilities * target).sum(1)
    return 1 - 2 * both / (probabilities.square().sum(1) + target.square().sum(1) + 2 * epsilon)


def lovasz_hinge(logits: Float[Tensor, "n p"], target: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """Lovász extension of the Jaccard loss on the hinge errors of each row (arXiv 1705.08790).

    Args:
        logits: Predicted logits.
        target: 0 or 1.
    """
    errors, order = (1 - logits * (2 * target - 1)).sort(1, descending=True)
    truth = target.gather(1, order)
    both = truth.sum(1, keepdim=True) - truth.cumsum(1)
    union = truth.sum(1, keepdim=True) + (1 - truth).cumsum(1)
    jaccard = 1 - both / union
    steps = torch.cat([jaccard[:, :1], jaccard[:, 1:] - jaccard[:, :-1]], 1)
    return (errors.relu() * steps).sum(1)


def focal_star_sum(
    logits: Float[Tensor, "*n"], truth: Float[Tensor, "*n"], alpha: float = 0.3, gamma: float = 3.0
) -> Float[Tensor, ""]:
    """Sum of FL* (RetinaNet, arXiv 1708.02002, appendix A): -log sigmoid(gamma x_t) / gamma, where x_t is the logit of
    the true value, with weight alpha for ones and 1 - alpha for zeros."""
    toward = functional.logsigmoid(gamma * (2 * truth - 1) * logits)
    return -((alpha * truth + (1 - alpha) * (1 - truth)) * toward).sum() / gamma
