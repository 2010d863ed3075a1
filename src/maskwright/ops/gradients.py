"""Functions that change gradients alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Float[Tensor, "*n"], factor: float) -> Float[Tensor, "*n"]:
    """Returns `x`, whose gradient is multiplied by `factor`."""
    if factor == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Scale.apply(x, factor)  # pyright: ignore[reportReturnType]
