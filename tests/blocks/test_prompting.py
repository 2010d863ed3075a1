"""The attention of prompt tokens and image cells."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from maskwright.blocks.prompting import NarrowAttention

pytestmark = pytest.mark.fast


def plain(
    layer: NarrowAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None
) -> torch.Tensor:
    """Attention as it is defined, with all projections, one prompt and one head at a time."""
    count = max(len(query), len(key))
    q, k, v = layer.query(query), layer.key(key), layer.value(value)
    size = q.shape[2] // layer.heads
    prompts = []
    for n in range(count):
        heads = []
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            own = [x[n % len(x), :, part] for x in (q, k, v)]
            scores = own[0] @ own[1].T / size**0.5
            if allowed is not None:
                scores[:, ~allowed[n]] = -torch.inf
            heads.append(scores.softmax(1) @ own[2])
        prompts.append(torch.cat(heads, 1))
    return functional.linear(torch.stack(prompts), layer.output.weight, layer.output.bias)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((5, 4), (5, 50)),  # few tokens read many cells
        ((5, 4), (1, 50)),  # which are the same for all prompts
        ((1, 4), (1, 50)),
        ((5, 50), (5, 4)),  # many cells read few tokens
        ((1, 50), (5, 4)),
        ((5, 20), (5, 50)),  # too many tokens
        ((3, 4), (3, 50)),  # few prompts
        ((5, 5), (5, 5)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_with_all_projections(queries: tuple[int, int], keys: tuple[int, int], masked: bool) -> None:
    torch.manual_seed(0)
    layer = NarrowAttention(24, 16, 2).double()
    query = torch.randn(*queries, 24, dtype=torch.float64)
    key, value = torch.randn(2, *keys, 24, dtype=torch.float64)
    allowed = None
    if masked:
        allowed = torch.rand(max(queries[0], keys[0]), keys[1]) > 0.4
        allowed[:, 0] = True
    expected = plain(layer, query, key, value, allowed)
    assert torch.allclose(layer(query, key, value, allowed), expected, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(4, 50), (50, 4)])
def test_gradients_are_those_with_all_projections(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    layer = NarrowAttention(24, 16, 2).double()
    query, key = (torch.randn(5, n, 24, dtype=torch.float64, requires_grad=True) for n in (queries, keys))
    value = torch.randn(5, keys, 24, dtype=torch.float64)
    given = [query, key, *layer.parameters()]
    weights = torch.randn(5, queries, 24, dtype=torch.float64)
    ours = torch.autograd.grad((layer(query, key, value) * weights).sum(), given)
    theirs = torch.autograd.grad((plain(layer, query, key, value, None) * weights).sum(), given)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, atol=1e-10)
