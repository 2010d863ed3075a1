"""Normalisation layers at the limits of what torch accepts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import ConvNorm, make_norm
from maskwright.errors import UsageError

pytestmark = pytest.mark.fast


def group_norm(channels: int = 32) -> nn.GroupNorm:
    norm = make_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm)
    torch.manual_seed(0)
    for value in norm.parameters():
        nn.init.normal_(value)
    return norm


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_group_of_a_single_value_gives_the_bias(count, training):
    norm = group_norm().train(training)
    x = (torch.randn(count, 32, 1, 1) * 1000).requires_grad_()
    y = norm(x)
    assert torch.equal(y[..., 0, 0], norm.bias.expand(count, -1))
    y.square().sum().backward()
    assert (x.grad == 0).all()
    assert (norm.weight.grad == 0).all()
    torch.testing.assert_close(norm.bias.grad, 2 * count * norm.bias.detach())


def test_a_group_of_a_single_value_may_be_in_half_precision():
    layer = ConvNorm(8, 32, norm="group", relu=True)
    with torch.autocast("cpu", torch.bfloat16):
        alone, larger = layer(torch.randn(1, 8, 1, 1)), layer(torch.randn(1, 8, 4, 4))
    assert alone.dtype == larger.dtype
    alone.float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(("channels", "side"), [(32, 3), (64, 1), (24, 1), (5, 1)])
def test_group_norm_equals_torchs_elsewhere(channels, side):
    ours = group_norm(channels)
    theirs = nn.GroupNorm(ours.num_groups, channels)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, channels, side, side)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("kind", "eps", "words"),
    [
        ("batch", 0.0, "norm_eps must be above 0 with norm='batch'"),
        ("group", -1.0, "norm_eps must be at least 0, got -1.0"),
    ],
)
def test_invalid_norms_are_refused(kind, eps, words):
    with pytest.raises(UsageError, match=words):
        make_norm(kind, 8, eps)


@pytest.mark.parametrize("kind", ["frozen", "still"])
def test_norms_with_fixed_statistics_need_no_epsilon(kind):
    x = torch.randn(1, 8, 2, 2)
    torch.testing.assert_close(make_norm(kind, 8, 0.0)(x), x)


def test_levels_of_one_cell_have_finite_gradients_in_bfloat16():
    pyramid = FPN([8], 64, extra="output")
    for _ in range(8):
        memory = [torch.full((1 << 16,), float("nan")) for _ in range(20)]
        del memory  # what a kernel may return instead of a gradient
        pyramid.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            levels = pyramid([torch.randn(2, 8, 2, 2)])
        assert [tuple(level.shape[-2:]) for level in levels] == [(2, 2), (1, 1), (1, 1)]
        sum(level.float().sum() for level in levels).backward()
        assert all(torch.isfinite(p.grad).all() for p in pyramid.parameters() if p.grad is not None)
