"""Batches of equal keys: bounded waiting, and the original order of the results."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskwright.structures.batching import equal_batches, in_order, streamed_batches

pytestmark = pytest.mark.fast


@pytest.mark.thorough
@given(st.lists(st.sampled_from("abc")), st.integers(1, 4))
def test_positions_in_batches_of_equal_keys(keys, size):
    batches = equal_batches(keys, size)
    assert sorted(position for batch in batches for position in batch) == list(range(len(keys)))
    assert all(len(batch) <= size and len({keys[p] for p in batch}) == 1 for batch in batches)
    assert len(batches) == sum(-(-keys.count(key) // size) for key in set(keys))


@pytest.mark.thorough
@given(st.lists(st.sampled_from(["a", "b", "c", None])), st.integers(1, 4), st.integers(1, 9))
def test_a_stream_in_batches(items, size, window):
    taken = 0

    def counted():
        nonlocal taken
        for item in items:
            taken += 1
            yield item

    given_back = 0
    batches = []
    for batch in streamed_batches(counted(), lambda item: item, size, window):
        assert taken - given_back <= window, "no more wait than allowed"
        given_back += len(batch)
        batches.append(batch)
        assert len({item for _, item in batch}) == 1
        assert len(batch) <= (1 if batch[0][1] is None else size)
    assert sorted(pair for batch in batches for pair in [n for n, _ in batch]) == list(range(len(items)))
    assert list(in_order(batches)) == items
