"""Overlap of masks, and suppression without classes."""

from __future__ import annotations

import pytest
import torch

from maskwright.ops.suppression import mask_ioa, mask_iou, mask_nms, matrix_nms
from maskwright.structures import Masks

pytestmark = pytest.mark.fast


def planes() -> torch.Tensor:
    """A square, a half of it, one that overlaps it by a quarter, and an empty mask."""
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[0, 0:4, 0:4] = masks[1, 0:4, 0:2] = masks[2, 2:6, 2:6] = True
    return masks


def test_overlap_of_masks():
    rows = planes().flatten(1)
    iou, ioa = mask_iou(rows), mask_ioa(rows)
    torch.testing.assert_close(iou, Masks.from_dense(planes()).iou(Masks.from_dense(planes())).to(iou))
    expected = torch.tensor([[1, 0.5, 0.25, 0], [1, 1, 0, 0], [0.25, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(ioa, expected)
    same = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
    labels = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(mask_iou(rows, labels), iou * same)
    torch.testing.assert_close(mask_ioa(rows, labels), ioa * same)
    assert mask_ioa(rows[:0]).shape == (0, 0)


def test_suppression_without_labels_has_one_class():
    iou, scores, labels = mask_iou(planes().flatten(1)), torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4).long()
    torch.testing.assert_close(matrix_nms(iou, scores), matrix_nms(iou, scores, labels))
    assert torch.equal(mask_nms(iou, threshold=0.4), mask_nms(iou, labels, 0.4))
    assert mask_nms(iou, threshold=0.4).tolist() == [True, False, True, True]
