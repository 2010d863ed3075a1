"""Assignment at the least total cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from maskwright.ops.assignment import assign

pytestmark = pytest.mark.fast


def test_pairs_are_the_cheapest_of_all():
    costs = [torch.randn(3, 5, 4), torch.randn(3, 5, 0), torch.randn(3, 5, 7)]
    pairs = assign(costs)
    assert [q.shape for q, _ in pairs] == [(3, 4), (3, 0), (3, 5)]
    for cost, (queries, objects) in zip(costs, pairs, strict=True):
        assert len(queries) == len(cost)
        for q, o in zip(queries, objects, strict=True):
            assert len(set(q.tolist())) == len(q)
            assert len(set(o.tolist())) == len(o)
            assert (q.diff() > 0).all()
    own, (queries, objects) = costs[0][1], pairs[0]
    best = min(sum(own[q, o] for o, q in enumerate(order)) for order in itertools.permutations(range(5), 4))
    torch.testing.assert_close(own[queries[1], objects[1]].sum(), best)


@pytest.mark.parametrize("other", [torch.nan, torch.inf, -torch.inf])
def test_costs_that_are_not_finite_are_avoided(other):
    cost = torch.zeros(1, 2, 2)
    cost[0, 0, 0] = torch.nan
    cost[0, 1, 1] = other
    queries, objects = assign([cost])[0]
    assert list(zip(queries[0].tolist(), objects[0].tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert assign([]) == []
