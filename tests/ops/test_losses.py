"""The shared losses against naive definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

from maskwright.ops.losses import dice, focal_sum, lovasz_hinge, smooth_l1_sum, soft_margin

pytestmark = pytest.mark.fast


@given(st.integers(0, 500))
def test_focal_loss_equals_torchvisions(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 5, generator=generator) * 4
    target = (torch.rand(7, 5, generator=generator) < 0.3).float()
    torch.testing.assert_close(focal_sum(logits, target), sigmoid_focal_loss(logits, target, reduction="sum"))


def test_dice_is_zero_for_the_same_mask_and_one_for_another():
    target = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    assert dice(target, target).max() < 1e-3
    assert (dice(target.flip(0), target) == 1).all()


def test_the_lovasz_extension_is_the_jaccard_loss_at_corners():
    """With hinge errors of exactly 0 or 1 it is 1 - IoU of the foreground."""
    target = torch.tensor([[1.0, 1, 1, 0, 0, 0]])
    predicted = torch.tensor([[1.0, 1, 0, 1, 0, 0]])  # IoU 2 / 4
    wrong = predicted != target
    logits = torch.where(wrong, torch.zeros(()), 2 * target - 1)  # a wrong pixel at margin 0 has error 1
    torch.testing.assert_close(lovasz_hinge(logits, target), torch.tensor([0.5]))


def test_lovasz_of_many_rows_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(4, 30, generator=generator), (torch.rand(4, 30, generator=generator) < 0.4).float()
    together = lovasz_hinge(logits, target)
    alone = torch.cat([lovasz_hinge(a[None], b[None]) for a, b in zip(logits, target, strict=True)])
    torch.testing.assert_close(together, alone)


def test_smooth_l1_is_l1_far_away_and_with_a_beta_of_zero():
    prediction, target = torch.tensor([0.0, 3.0, -1.0]), torch.tensor([0.25, 0.0, -1.0])
    assert float(smooth_l1_sum(prediction, target, 0.5)) == 0.5 * 0.25**2 / 0.5 + 3 - 0.25
    assert float(smooth_l1_sum(prediction, target, 0.0)) == 3.25


def test_soft_margin_is_cross_entropy():
    logits, target = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(soft_margin(logits, target), entropy)
