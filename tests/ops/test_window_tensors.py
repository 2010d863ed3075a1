"""Mask tensors agree with their definitions, computed one value at a time."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwright.errors import UsageError
from maskwright.ops.window_tensors import (
    MaskTensor,
    align2nat,
    nat2align,
    subsample,
    swap_align2nat,
    swap_windows,
    up_align2nat,
    upsample,
)


def tensor(v: int, u: int, h: int, w: int, aligned: bool = True, step: float = 1.0, seed: int = 0) -> MaskTensor:
    values = torch.randn(2, v, u, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MaskTensor(values, aligned, 1.0, step)


def read(values: torch.Tensor, place: tuple[float, float, float, float], pad: float) -> float:
    """Interpolates over all four axes; values outside are `pad`."""
    total = 0.0
    for corner in range(16):
        share, index = 1.0, []
        for axis, at in enumerate(place):
            low = math.floor(round(at, 9))
            part = round(at, 9) - low
            high = corner >> axis & 1
            share *= part if high else 1 - part
            index.append(low + high)
        inside = all(0 <= i < n for i, n in zip(index, values.shape, strict=True))
        total += share * (float(values[tuple(index)]) if inside else pad)
    return total


def naive_swap(source: MaskTensor, factor: float, stride: float, pad: float, nearest: bool = False) -> torch.Tensor:
    n, v, u, h, w = source.values.shape
    fine = (round(v * factor), round(u * factor))
    grid = (math.ceil(h / stride), math.ceil(w / stride))
    alpha = source.alpha / factor
    result = torch.zeros(n, *fine, *grid, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(k) for k in result.shape)).tolist():
        image, i, j, y, x = place
        inner = [(k + 0.5) / factor - 0.5 for k in (i, j)]
        if nearest:
            inner = [math.floor((k + 0.5) / factor) for k in (i, j)]
        outer = [
            y * stride + alpha * (i - fine[0] / 2 + 0.5), x * stride + alpha * (j - fine[1] / 2 + 0.5)
        ]  # fmt: skip
        result[tuple(place)] = read(source.values[image], (*inner, *outer), pad)
    return result


@settings(max_examples=10)
@given(
    st.sampled_from([(2, 2.0), (3, 1.0), (2, 1.5), (3, 3.0), (1, 4.0)]), st.sampled_from([0.0, -6.0]),
    st.sampled_from(["bilinear", "nearest"]), st.sampled_from([1.0, 2.0, 0.5]), st.integers(0, 99),
)  # fmt: skip
def test_swapping_agrees_with_the_definition(cells, pad, mode, step, seed):
    side, factor = cells
    source = tensor(side, side + (2 if factor in (1.5, 3.0) else 1) * (factor != 1.5), 4, 3, step=step, seed=seed)
    swapped = swap_align2nat(source, factor, pad, mode)
    expected = naive_swap(source, factor, factor, pad, mode == "nearest")
    torch.testing.assert_close(swapped.values, expected)
    assert (swapped.cell, swapped.step, swapped.aligned) == (factor, step / factor, False)
    upped = up_align2nat(source, factor, pad, mode)
    torch.testing.assert_close(upped.values, naive_swap(source, factor, 1.0, pad, mode == "nearest"))
    windows = torch.cartesian_prod(*(torch.arange(k) for k in (2, *swapped.values.shape[-2:])))
    some = swap_windows(source, factor, windows, pad, mode, budget=4000)
    torch.testing.assert_close(some, swapped.values.permute(0, 3, 4, 1, 2).flatten(0, 2))


def test_swapping_is_upsampling_and_subsampling():
    source = tensor(3, 3, 7, 5, step=2.0)
    for factor in (1, 2, 3, 4):
        large = subsample(up_align2nat(source, factor), factor)
        small = swap_align2nat(source, factor)
        assert torch.equal(large.values, small.values)
        assert (large.cell, large.step, large.alpha) == (small.cell, small.step, small.alpha)


def test_natural_and_aligned_are_inverse_inside_of_the_tensor():
    source = tensor(3, 3, 9, 9, aligned=False)
    there = nat2align(source, 0.0)
    assert there.aligned
    back = align2nat(there, 0.0)
    assert torch.equal(back.values[..., 2:-2, 2:-2], source.values[..., 2:-2, 2:-2])
    outside = align2nat(tensor(3, 3, 2, 2), pad=-6.0)
    assert (outside.values[:, 0, :, 0] == -6).all(), "above the first row of windows there is nothing"


def test_upsampling_a_natural_tensor_resizes_each_mask():
    source = tensor(2, 2, 3, 4, aligned=False)
    large = upsample(source, 2)
    assert large.values.shape == (2, 4, 4, 3, 4)
    alone = torch.nn.functional.interpolate(source.values[:, None, :, :, 1, 2], scale_factor=2.0, mode="bilinear")
    torch.testing.assert_close(large.values[:, :, :, 1, 2], alone[:, 0])
    torch.testing.assert_close(upsample(source, 2, "nearest").values[:, ::2, ::2], source.values)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_gradients_are_exact(factor):
    side = 2
    values = tensor(side, side, 3, 3, step=factor).values[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swap_align2nat(MaskTensor(x, True, 1.0, factor), factor).values, values)


def test_wrong_representations_and_factors_are_refused():
    with pytest.raises(UsageError, match="the mask tensor must be aligned, it is natural"):
        swap_align2nat(tensor(2, 2, 2, 2, aligned=False), 2)
    with pytest.raises(UsageError, match=r"factor must make V an integer, got 4\.5 cells"):
        up_align2nat(tensor(3, 3, 2, 2), 1.5)


def test_factors_and_units_must_be_above_zero():
    aligned, natural = tensor(3, 3, 4, 4), tensor(3, 3, 4, 4, aligned=False)
    places = torch.zeros(1, 3, dtype=torch.int64)
    for factor in (0, -1, math.nan, math.inf):
        for call in (
            lambda f: up_align2nat(aligned, f), lambda f: swap_align2nat(aligned, f),
            lambda f: swap_windows(aligned, f, places), lambda f: upsample(natural, f),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=f"factor must be a finite number above 0, got {factor}"):
                call(factor)
    with pytest.raises(UsageError, match="factor must make V an integer, got 3e-08 cells"):
        up_align2nat(aligned, 1e-8)
    for every in (0, -1):
        with pytest.raises(UsageError, match=f"every must be an integer of at least 1, got {every}"):
            subsample(aligned, every)
    for unit in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match=f"cell must be a finite number of pixels above 0, got {unit}"):
            MaskTensor(aligned.values, True, cell=unit)
        with pytest.raises(UsageError, match=f"step must be a finite number of pixels above 0, got {unit}"):
            MaskTensor(aligned.values, True, step=unit)


WRONG = """
import torch
from maskwright.errors import UsageError
from maskwright.ops.window_tensors import MaskTensor, subsample, swap_align2nat, swap_windows, up_align2nat, upsample

values = torch.zeros(1, 3, 3, 4, 4)
aligned, natural = MaskTensor(values, True), MaskTensor(values, False)
for call in (
    lambda: up_align2nat(aligned, 3, mode="cubic"), lambda: swap_align2nat(aligned, 3, mode="cubic"),
    lambda: swap_windows(aligned, 3, torch.zeros(1, 3, dtype=torch.int64), mode="cubic"),
    lambda: upsample(natural, 3, "cubic"), lambda: subsample(aligned, 1.5),
    lambda: MaskTensor(values[0], True), lambda: MaskTensor(values.long(), True),
):
    try:
        call()
    except UsageError as error:
        print(error)
"""


def test_arguments_of_wrong_types_are_refused():
    """In a separate process, because the type checker of the tests would raise its own errors."""
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=False)
    words = ["mode must be one of 'bilinear', 'nearest', 'floor', got 'cubic'"] * 4
    words.append("every must be an integer of at least 1, got 1.5")
    for kind, shape in (("float32", "(3, 3, 4, 4)"), ("int64", "(1, 3, 3, 4, 4)")):
        expected = "values must be a floating-point tensor of shape (N, V, U, H, W)"
        words.append(f"{expected}, got torch.{kind} of shape {shape}")
    assert done.stdout.splitlines() == words, done.stderr


@pytest.mark.parametrize("window", [(2, 0, 0), (0, 2, 0), (0, 0, 2), (0, -1, 0)])
def test_windows_outside_of_the_grid_are_refused(window):
    source = tensor(3, 3, 4, 4)  # two images, 2 x 2 windows after swapping
    with pytest.raises(
        UsageError, match=r"windows must be \(index, y, x\) of at least 0 and below \(2, 2, 2\), got \("
    ):
        swap_windows(source, 2, torch.tensor([(0, 0, 0), window]))
    if min(window) >= 0 and window[0] < 2:
        assert swap_windows(source, 2, torch.tensor([window]), subsampled=False).shape == (1, 6, 6)


def test_no_windows_give_no_masks():
    assert swap_windows(tensor(2, 2, 3, 3), 2, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 4, 4)


def test_tables_from_inference_mode_can_be_used_in_training():
    shape = (3, 3, 9, 7)  # not used in another test, because tables are cached
    with torch.inference_mode():
        swap_align2nat(tensor(*shape), 3)
    values = tensor(*shape).values.requires_grad_()
    swap_align2nat(MaskTensor(values, True), 3).values.sum().backward()
    assert values.grad is not None
