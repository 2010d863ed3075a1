"""Counts over all devices, so that many small batches give the gradients of one large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed
from torch import Tensor

_LOCAL: ContextVar[bool] = ContextVar("_LOCAL", default=False)


def global_mean_count(count: Tensor, minimum: float = 1.0, more: float = 0.0) -> Tensor:
    """What a loss divides by: the mean over all devices of `count`, its total being at least `minimum`, plus `more`;
    float32.

    Several devices hold one large batch in pieces, and their gradients are averaged, not added. A loss that is a sum
    over objects divided by their number n would, with each device dividing by its own n, weigh an object on an emptier
    device more. Divided by the mean count instead, the average over R devices is

        1/R * sum_r (sum_r / (N/R)) = sum over all objects / N,

    the gradient of the whole batch in a single process. That is what "the same gradients" means here, and it holds
    for every term of the form sum / count. So, instead of `loss.mean()` or `loss.sum() / n.clamp(min=1)`:

        loss.sum() / global_mean_count(positive.sum())

    `count` is a tensor of any shape (several counts are one message) and is not differentiated. `minimum` holds for
    the total over all devices, where a single process would write `clamp(min=1)`, and `more` is added to that total,
    where it would write `+ 1`. With one process this is that clamp and that sum.

    Every process must call this equally often in the same order, also with an image without objects: call it before
    any branch on emptiness. With accumulation the counts are those of one backward pass, not of the whole step.
    """
    total = count.detach().float()
    world = _world()
    if world > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return (total.clamp(min=minimum) + more) / world


@contextmanager
def local_counts() -> Iterator[None]:
    """Inside, `global_mean_count` counts this process alone: for validation, whose shards are of unequal length."""
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)


def _world() -> int:
    if _LOCAL.get() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
