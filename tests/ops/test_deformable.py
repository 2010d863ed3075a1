"""Deformable convolution on the CPU equals torchvision's operator, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.ops import deform_conv2d

from maskwright.blocks.layers import DeformConvNorm
from maskwright.errors import UsageError
from maskwright.ops.deformable import deform_conv

pytestmark = pytest.mark.fast
CASES = {
    "3 x 3": {},
    "modulated": {"modulated": True},
    "stride": {"stride": (2, 2)},
    "dilated": {"dilation": (2, 2), "padding": (2, 2), "modulated": True},
    "unequal": {"kernel": (1, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (1, 2)},
    "groups": {"groups": 4, "modulated": True},
    "no bias": {"biased": False},
    "offset groups": {"offset_groups": 4},
    "modulated offset groups": {"offset_groups": 2, "modulated": True, "stride": (2, 1)},
    "groups of both kinds": {"offset_groups": 8, "groups": 2, "modulated": True},
    "an offset group for each channel": {"offset_groups": 16, "groups": 4, "biased": False},
}


def arguments(
    kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, offset_groups=1, modulated=False,
    biased=True,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    torch.manual_seed(1)
    x = torch.randn(2, 16, 9, 12, dtype=torch.float64)
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((9, 12), kernel, stride, padding, dilation, strict=True)
    )
    taps = kernel[0] * kernel[1] * offset_groups
    values = [
        x,
        3 * torch.randn(2, 2 * taps, rows, columns, dtype=torch.float64),  # some of them far outside
        torch.randn(8, 16 // groups, *kernel, dtype=torch.float64),
        torch.randn(8, dtype=torch.float64) if biased else None,
        torch.rand(2, taps, rows, columns, dtype=torch.float64) if modulated else None,
    ]
    return values, {"stride": stride, "padding": padding, "dilation": dilation}


def gradients(run, values):
    leaves = [None if v is None else v.clone().requires_grad_() for v in values]
    result = run(*leaves)
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    return result, [v.grad for v in leaves if v is not None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_torchvisions_operator(case):
    values, how = arguments(**case)
    theirs, their_gradients = gradients(
        lambda x, offset, weight, bias, mask: deform_conv2d(x, offset, weight, bias, mask=mask, **how), values
    )
    ours, our_gradients = gradients(lambda *v: deform_conv(*v, **how), values)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert len(our_gradients) == len(their_gradients) == 3 + (values[3] is not None) + (values[4] is not None)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_positions_on_whole_cells_and_borders():
    values, how = arguments()
    values[1] = values[1].round()
    assert torch.allclose(deform_conv(*values, **how), deform_conv2d(*values[:4], **how), rtol=0, atol=1e-12)


def test_an_offset_that_is_not_a_number_gives_nan():
    (x, offset, weight, bias, _), how = arguments()
    offset[0, 3, 2, 5], offset[1, 0, 0, 0], offset[1, 4, 8, 8] = float("nan"), 1e30, -1e30
    result = deform_conv(x, offset, weight, bias, **how)
    assert result[0, :, 2, 5].isnan().all()
    assert result.isnan().sum() == len(weight)


def test_without_offsets_it_is_a_convolution():
    (x, offset, weight, bias, _), how = arguments()
    plain = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    assert torch.allclose(deform_conv(x, offset * 0, weight, bias, **how), plain, rtol=0, atol=1e-12)


def test_half_precision_is_sampled_in_float32():
    (x, offset, weight, bias, _), how = arguments()
    x, offset, weight, bias = (v.bfloat16() for v in (x, offset, weight, bias))
    result = deform_conv(x, offset, weight, bias, **how)
    exact = deform_conv(x.double(), offset.double(), weight.double(), bias.double(), **how)
    assert result.dtype == torch.bfloat16
    assert (result.double() - exact).norm() / exact.norm() < 5e-3


def test_few_channels_use_torchvisions_kernel():
    (x, offset, weight, bias, _), how = arguments()
    x, weight = x[:, :4], weight[:, :4]
    assert torch.equal(deform_conv(x, offset, weight, bias, **how), deform_conv2d(x, offset, weight, bias, **how))


@pytest.mark.parametrize("modulated", [False, True])
def test_the_block_lays_out_its_offsets_as_torchvision_does(modulated):
    torch.manual_seed(0)
    block = DeformConvNorm(16, 8, stride=2, groups=2, modulated=modulated, norm="none", bias=True, offset_groups=4)
    assert block.offset.out_channels == 4 * 9 * (3 if modulated else 2)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, 16, 9, 12)
    values = block.offset(x)
    mask = values[:, 72:].sigmoid() if modulated else None
    theirs = deform_conv2d(x, values[:, :72], block.weight, block.bias, stride=2, padding=1, mask=mask)
    torch.testing.assert_close(block(x), theirs)
    with pytest.raises(UsageError, match="offset_groups must divide the 16 input channels, got 3"):
        DeformConvNorm(16, 8, offset_groups=3)


def test_channels_that_do_not_fit_are_an_error():
    (x, offset, weight, bias, _), how = arguments()
    mask = torch.rand(2, 9, 9, 12, dtype=torch.float64)
    for given, words in (
        ((x, offset[:, :17], weight, bias), "offset must have 18 channels for each offset group, .*; got 17"),
        ((x, offset.repeat(1, 3, 1, 1), weight, bias), "the 16 channels of x must divide into the offset groups"),
        ((x, offset, weight, bias, mask[:, :8]), "mask must have 9 channels, got 8"),
        ((x, offset, weight[:, :6], bias), "do not divide into groups"),
    ):
        with pytest.raises(UsageError, match=words):
            deform_conv(*given, **how)
