"""Losses that several systems share; each returns a sum, so that the caller names the normaliser."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def smooth_l1_sum(prediction: Shaped[Tensor, "*n"], target: Shaped[Tensor, "*n"], beta: float) -> Float[Tensor, ""]:
    """Sum of 0.5 d^2 / beta below beta and |d| - 0.5 beta above (Fast R-CNN, arXiv 1504.08083, eq. 3); L1 at 0."""
    if beta == 0:
        return (prediction - target).abs().sum()
    return torch.nn.functional.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")
