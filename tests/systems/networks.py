"""Where learned parameters are read: a function mode that reports reads outside of a system's networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from maskwright.systems import System

# What tells of a parameter without reading its values.
ATTRIBUTES = ("__get__", "size", "dim", "stride", "numel", "is_floating_point")


class ParameterReads(TorchFunctionMode):
    """Collects the names of parameters that are passed to a function of torch while no network is being called."""

    def __init__(self, system: System):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in system.named_parameters()}
        self.depth = 0
        self.calls: dict[str, int] = dict.fromkeys(system.networks(), 0)
        self.outside: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.depth and getattr(function, "__name__", "") not in ATTRIBUTES:
            for value in tree_leaves((args, kwargs)):
                if id(value) in self.names:
                    self.outside.add(self.names[id(value)])
        return function(*args, **kwargs)


@contextmanager
def watched(system: System) -> Iterator[ParameterReads]:
    """Hooks every network of `system` and watches what reads its parameters meanwhile."""
    reads, handles = ParameterReads(system), []
    for name, network in system.networks().items():

        def begin(module: Any, inputs: Any, name: str = name) -> None:
            reads.depth += 1
            reads.calls[name] += 1

        def end(module: Any, inputs: Any, output: Any) -> None:
            reads.depth -= 1

        handles += [network.register_forward_pre_hook(begin), network.register_forward_hook(end, always_call=True)]
    try:
        with reads:
            yield reads
    finally:
        for handle in handles:
            handle.remove()


def not_plain(value: Any) -> list[str]:
    """What a raw output holds besides tensors, integers, and tuples and dataclasses of these."""
    if isinstance(value, (torch.Tensor, int)) or value is None:
        return []
    if isinstance(value, tuple):
        return [found for each in value for found in not_plain(each)]
    if hasattr(value, "__dataclass_fields__"):
        return [f"{name}: {found}" for name in value.__dataclass_fields__ for found in not_plain(getattr(value, name))]
    return [type(value).__name__]
