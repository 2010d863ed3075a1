"""Small holes and parts of masks, and masks that depend on their threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from maskwright.ops.partition import from_windows, to_windows
from maskwright.ops.planes import place_stable
from maskwright.ops.regions import without_small_regions
from maskwright.structures import Masks, Placement

pytestmark = pytest.mark.fast


def cleaned(plane: torch.Tensor, least: int) -> tuple[torch.Tensor, bool]:
    size = (plane.shape[0], plane.shape[1])
    frames, crops = Masks.from_dense(plane[None]).crops()
    mask, corner, changed = without_small_regions(crops[0], frames[0], size, least)
    return Masks.from_crops([mask], torch.tensor([corner]), size).dense()[0], changed


def test_small_holes_are_filled_and_small_parts_dropped():
    plane = torch.zeros(30, 40, dtype=torch.bool)
    plane[5:20, 5:20] = True
    plane[8:10, 8:10] = False  # a hole of 4
    plane[12:16, 12:16] = False  # a hole of 16
    plane[25, 30:35] = True  # a part of 5
    found, changed = cleaned(plane, 6)
    expected = plane.clone()
    expected[8:10, 8:10] = True
    expected[25] = False
    assert torch.equal(found, expected)
    assert changed
    assert not cleaned(expected, 6)[1]


def test_background_at_the_edge_of_the_image_is_a_hole_and_the_largest_part_stays():
    plane = torch.ones(10, 10, dtype=torch.bool)
    plane[0, :4] = False
    assert bool(cleaned(plane, 5)[0].all())
    small = torch.zeros(20, 20, dtype=torch.bool)
    small[3, 3:5] = True
    small[10, 3:6] = True
    assert cleaned(small, 50)[0].nonzero().tolist() == [[10, 3], [10, 4], [10, 5]]


@pytest.mark.thorough
@given(st.integers(0, 10_000), st.sampled_from([(13, 17), (40, 31)]))
def test_stable_masks_are_those_of_whole_planes(seed, image):
    generator = torch.Generator().manual_seed(seed)
    rough = torch.randn(6, 1, 4, 4, generator=generator) * 4
    logits = functional.interpolate(rough, (16, 16), mode="bilinear")[:, 0]
    masks, stability, kept = place_stable(logits, Placement.resize(image, (48, 64)), (64, 64), margin=1.0, least=0.6)
    inner = functional.interpolate(logits[:, None], (64, 64), mode="bilinear", align_corners=False)[..., :48, :]
    values = functional.interpolate(inner, image, mode="bilinear", align_corners=False)[:, 0]
    assume(float(torch.stack([(values.abs() - 1).abs(), values.abs()]).amin()) > 1e-4)  # rounding decides there
    ratio = (values > 1).sum((1, 2)) / (values > -1).sum((1, 2))
    assert kept.tolist() == (ratio >= 0.6).nonzero()[:, 0].tolist()
    torch.testing.assert_close(stability, ratio[kept])
    assert torch.equal(masks.dense(), values[kept] > 0)


def test_windows_are_joined_to_what_they_were_cut_from():
    x = torch.randn(2, 7, 10, 3)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 2 * 3, 4, 4, 3)
    assert float(windows[1 * 3, 3].abs().sum()) == 0  # below the map
    assert torch.equal(from_windows(windows, (7, 10)), x)
