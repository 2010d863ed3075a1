"""The attention of prompt tokens and image cells, and the encoding of positions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from maskwright.blocks.prompting import FourierPositions, NarrowAttention

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


def computed(positions: FourierPositions, size: tuple[int, int]) -> torch.Tensor:
    """The grid, computed by a new module."""
    fresh = FourierPositions(2 * positions.frequencies.shape[1]).to(positions.frequencies.dtype)
    fresh.load_state_dict(positions.state_dict())
    return fresh.grid(size)


def test_grid_of_positions_is_computed_once_for_a_size_and_again_when_the_frequencies_change() -> None:
    positions = FourierPositions(8)
    first = positions.grid((3, 5))
    assert positions.grid((3, 5)) is first
    assert torch.equal(first, computed(positions, (3, 5)))
    assert positions.grid((5, 3)).shape == (1, 8, 5, 3)
    assert list(positions.state_dict()) == ["frequencies"]

    other = FourierPositions(8)
    positions.load_state_dict(other.state_dict())
    assert torch.equal(positions.grid((5, 3)), other.grid((5, 3)))
    positions.frequencies.mul_(2)
    assert torch.equal(positions.grid((5, 3)), computed(positions, (5, 3)))
    positions.frequencies = torch.ones(2, 4)
    assert torch.equal(positions.grid((5, 3)), computed(positions, (5, 3)))
    positions.half()
    assert torch.equal(positions.grid((5, 3)), computed(positions, (5, 3)))
    twin = copy.deepcopy(positions)
    twin.frequencies.add_(1)
    assert torch.equal(twin.grid((5, 3)), computed(twin, (5, 3)))
    assert torch.equal(positions.grid((5, 3)), computed(positions, (5, 3)))


def test_grid_of_positions_that_was_used_for_inference_serves_training_and_export() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.weight = FourierPositions(8), nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight * self.positions.grid((4, 6))

    model = Weighted()
    with torch.inference_mode():
        expected = model(torch.zeros(1))
    model(torch.zeros(1)).sum().backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, model.positions.grid((4, 6)).sum((0, 2, 3)).reshape(8, 1, 1))
    program = torch.export.export(model, (torch.zeros(1),))
    assert set(program.state_dict) == {"weight", "positions.frequencies"}
    assert not program.constants, "the grid is computed in the graph, from the frequencies"
    assert torch.allclose(program.module()(torch.zeros(1)), expected, atol=1e-6)
    assert torch.equal(model(torch.zeros(1)), expected)
