"""Parts of transformers against those of torch, or against a plain implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from maskwright.blocks import deformable_attention as deformable
from maskwright.blocks.positions import sine_code, sine_positions
from maskwright.blocks.transformer import Attention, DecoderLayer, EncoderLayer

SHAPES = [(3, 5), (6, 9), (12, 17)]


def test_attention_agrees_with_torch():
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.normal_()
        for part, bias in zip((ours.query, ours.key, ours.value), theirs.in_proj_bias.chunk(3), strict=True):
            part.bias.copy_(bias)
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    allowed = torch.rand(2, 1, 5, 7) > 0.3
    allowed[..., 0] = True
    blocked = ~allowed.expand(2, 4, 5, 7).flatten(0, 1)
    torch.testing.assert_close(ours(q, k, v, allowed), theirs(q, k, v, attn_mask=blocked, need_weights=False)[0])


def test_layers_agree_with_torch():
    """Without positions they are the post-norm layers of torch."""
    encoder, plain = EncoderLayer(32, 64, 4), nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    attention, forward = encoder.self_attention.attention, encoder.feed_forward
    with torch.no_grad():
        plain.self_attn.in_proj_weight.copy_(
            torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        )
        plain.self_attn.in_proj_bias.zero_()
        plain.self_attn.out_proj.load_state_dict(attention.output.state_dict())
        plain.linear1.load_state_dict(forward.expand.state_dict())
        plain.linear2.load_state_dict(forward.reduce.state_dict())
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(encoder(x), plain(x))
    memory = torch.randn(2, 9, 32)
    shapes = [DecoderLayer(32, 64, 4, cross_first=c)(x, memory, memory + 1, x).shape for c in (True, False)]
    assert shapes == [x.shape, x.shape]


def test_positions_do_not_count_padding():
    whole = sine_positions((4, 6), 8)
    assert whole.shape == (1, 16, 4, 6)
    torch.testing.assert_close(whole[0, 0, :, 0], (torch.arange(1, 5) / 4 * 2 * math.pi).sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole[0, 8, 0], (torch.arange(1, 7) / 6 * 2 * math.pi).sin(), atol=1e-5, rtol=0)
    padding = torch.ones(2, 4, 6, dtype=torch.bool)
    padding[0, :3, :4] = False
    padding[1] = False
    coded = sine_positions((4, 6), 8, padding=padding)
    torch.testing.assert_close(coded[0, :, :3, :4], sine_positions((3, 4), 8)[0])
    torch.testing.assert_close(coded[1], whole[0])
    centred = sine_positions((4, 6), 8, shift=-0.5)
    torch.testing.assert_close(
        centred[0, 0, :, 0], ((torch.arange(4) + 0.5) / 4 * 2 * math.pi).sin(), atol=1e-5, rtol=0
    )
    assert sine_code(torch.rand(2, 3), 10).shape == (2, 3, 10)


def reference(values, shapes, places, weights):
    """The formula of the paper, with grid_sample on each level."""
    batch, _, heads, width = values.shape
    total = 0
    for level, (part, (h, w)) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
        grid = (2 * places[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        read = nn.functional.grid_sample(maps, grid, align_corners=False)
        total = total + (read * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return total.view(batch, heads * width, -1).transpose(1, 2)


@pytest.mark.parametrize("way", [deformable._by_rows, deformable._by_maps], ids=["rows", "maps"])
def test_deformable_sampling_and_its_gradients_agree_with_grid_sample(way):
    torch.manual_seed(0)
    tokens = sum(h * w for h, w in SHAPES)
    values = torch.randn(2, tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(2, 11, 4, 3, 2, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(2, 11, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    gradients = []
    for each in (way, reference):
        found = each(values, SHAPES, places, weights)
        gradients.append((found, *torch.autograd.grad(found.square().sum(), (values, places, weights))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_locations_outside_and_padding_contribute_nothing():
    layer = deformable.DeformableAttention(32, 4, 3, 2)
    tokens = sum(h * w for h, w in SHAPES)
    x, far = torch.randn(1, tokens, 32), torch.full((1, tokens, 1, 2), 9.0)
    nothing = layer.output.bias.expand(1, tokens, -1)
    torch.testing.assert_close(layer(x, far, x, SHAPES), nothing)
    torch.testing.assert_close(layer(x, -far, x, SHAPES), nothing)
    centres = deformable.cell_centres(SHAPES)[None, :, None]
    every = torch.ones(1, tokens, dtype=torch.bool)
    torch.testing.assert_close(layer(x, centres, x, SHAPES, every), nothing)
    assert not torch.allclose(layer(x, centres, x, SHAPES, ~every), nothing.expand_as(x))


def test_initial_offsets_reach_half_a_box():
    layer = deformable.DeformableAttention(8, 1, 1, 4)  # one head: to the right, 1 ... 4 steps
    values = torch.zeros(1, 16, 8)
    values[0, 8 + 4] = 1.0  # of a level of 1 x 16: centre at 12.5 / 16
    with torch.no_grad():
        layer.value.weight.copy_(torch.eye(8))
        layer.output.weight.copy_(torch.eye(8))
    # from 8.5 / 16, a box 8 cells wide: the last point is half of it away
    box = torch.tensor([8.5 / 16, 0.5, 8 / 16, 1.0]).view(1, 1, 1, 4)
    torch.testing.assert_close(layer(torch.zeros(1, 1, 8), box, values, [(1, 16)]), torch.full((1, 1, 8), 0.25))
    point = box[..., :2]  # in cells: the fourth
    torch.testing.assert_close(layer(torch.zeros(1, 1, 8), point, values, [(1, 16)]), torch.full((1, 1, 8), 0.25))
