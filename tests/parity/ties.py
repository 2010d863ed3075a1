"""Matchings that rounding decides: weights made up at random give queries whose costs float32 hardly tells apart, and
which of them answers for an object is then nobody's decision. The losses are the same, their gradients are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from maskwright.ops.assignment import Pairs, assign
from tests.parity.ledger import Ledger

CLOSE = 1e-5  # of the cost: what an order of sums moves it by, with some room
Choice = tuple[int, int, int]  # prediction, query, object


@contextmanager
def choosing(module: ModuleType, choices: Iterable[Choice]) -> Iterator[None]:
    """Within, the system of `module` matches these queries to these objects. One image."""
    choices = list(choices)

    def chosen(costs: Sequence[Tensor]) -> list[Pairs]:
        (table,) = (c.clone() for c in costs)
        for prediction, query, which in choices:
            table[prediction, query, which] = -1e4
        return assign([table])

    with mock.patch.object(module, "assign", chosen):
        yield


def alternatives(cost: Tensor, pairs: Tensor) -> list[Choice]:
    """Queries that would do as well as those in `pairs` (2, K, P), by the costs (K, N, M)."""
    found: list[Choice] = []
    for prediction, (queries, objects) in enumerate(pairs.unbind(1)):
        for query, which in zip(queries.tolist(), objects.tolist(), strict=True):
            column = cost[prediction, :, which]
            near = (column - column[query]).abs() <= CLOSE * column[query].abs()
            near[queries] = False
            found += [(prediction, int(other), which) for other in near.nonzero().flatten()]
    return found


def compare_choice(ledger: Ledger, name: str, cost: Tensor, ours: Tensor, theirs: Tensor) -> list[Choice]:
    """Pairs (K, 2, P) of queries and objects: the same, or others that cost the same; those are returned to go on
    with."""
    ledger.seen.add(name)
    if ours.shape != theirs.shape:
        return ledger.fail(name, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}") or []
    if torch.equal(ours.long(), theirs.long()):
        ledger._line(name, "equal", True)
        return []
    rows = torch.arange(len(cost))[:, None]
    own, other = (cost[rows, p[:, 0].long(), p[:, 1].long()].double() for p in (ours, theirs))
    apart = ((own.sum(1) - other.sum(1)).abs() / own.abs().sum(1)).max()
    complete = torch.equal(ours[:, 1].long().sort().values, theirs[:, 1].long().sort().values)
    count = int((ours.long() != theirs.long()).any(1).sum())
    text = f"{count} of {own.numel()} pairs differ; the cost differs by {apart:.1e} (bound {CLOSE:g}: ties)"
    ledger._line(name, text, complete and bool(apart <= CLOSE))
    return [(k, *pair) for k, kind in enumerate(theirs.tolist()) for pair in zip(*kind, strict=True)]
