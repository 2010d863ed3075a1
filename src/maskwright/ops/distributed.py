"""Counts over all devices, so that many small batches have the gradients of one large one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed
from torch import Tensor

_LOCAL: ContextVar[bool] = ContextVar("_LOCAL", default=False)


def global_mean_count(count: Tensor, minimum: float = 1.0, more: float = 0.0) -> Tensor:
    """The normaliser of a loss: the mean over all devices of a count.

    Several devices hold one large batch in parts, and their gradients are averaged, not added. If each device divided
    its sum over objects by its own number of objects n_r, an object on a device with few objects would weigh more.
    Divided by the mean count instead, with N objects on R devices in all, the average is

        1/R * sum_r (sum_r / (N/R)) = sum over all objects / N,

    the gradient of the whole batch in a single process. This holds for every term of the form sum / count. Therefore,
    instead of `loss.mean()` or `loss.sum() / n.clamp(min=1)`:

        loss.sum() / global_mean_count(positive.sum())

    Every process must call this equally often and in the same order, also for images without objects: call it before
    any branch on emptiness. With gradient accumulation the counts are those of one backward pass, not of a whole step.

    Args:
        count: The count on this device, of any shape (several counts are one message). It is not differentiated.
        minimum: Lower bound of the total over all devices, where a single process would write `clamp(min=1)`.
        more: Added to that total, where a single process would write `+ 1`.

    Returns:
        (max(total, minimum) + more) / number of devices, in float32.
    """
    total = count.detach().float()
    world = _world()
    if world > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return (total.clamp(min=minimum) + more) / world


@contextmanager
def local_counts() -> Iterator[None]:
    """Inside, `global_mean_count` counts this process only: for validation, whose shards differ in length."""
    token = _LOCAL.set(True)
    try:
        yield
    finally:
        _LOCAL.reset(token)


def _world() -> int:
    """Number of devices whose counts are summed."""
    if _LOCAL.get() or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
