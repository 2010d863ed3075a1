"""Options of heat maps that published weights do not use."""

from __future__ import annotations

import pytest
import torch

from maskwright.ops.centres import centre_focal_sum, find_peaks, gaussian_radius

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("overlap", [0.5, 0.7])
def test_exact_radii_keep_the_iou(overlap):
    sizes = torch.tensor([[40.0, 30.0], [100.0, 100.0], [300.0, 20.0]])
    radius = gaussian_radius(sizes, overlap, exact=True)
    assert (radius >= 1).all()
    for step, above in ((0, True), (1, False)):
        r, area = radius + step, sizes.prod(1)
        moved = (sizes - r[:, None]).prod(1)
        cases = [
            (sizes - 2 * r[:, None]).prod(1) / area, area / (sizes + 2 * r[:, None]).prod(1), moved / (2 * area - moved)
        ]  # fmt: skip
        assert ((torch.stack(cases).amin(0) >= overlap) == above).all()


def test_a_larger_neighbourhood_has_fewer_peaks():
    logits = torch.full((1, 1, 1, 9), -9.0)
    logits[0, 0, 0, 2], logits[0, 0, 0, 4] = 2.0, 3.0
    assert (find_peaks(logits, 2)[0][0] > 0.5).sum() == 2
    assert (find_peaks(logits, 2, window=5)[0][0] > 0.5).sum() == 1


def test_exponents_of_the_focal_loss():
    logits, heat = torch.tensor([0.3, -0.2]), torch.tensor([1.0, 0.5])
    probability = logits.sigmoid()
    expected = -probability[0].log() - 0.5 * (1 - probability[1]).log()
    torch.testing.assert_close(centre_focal_sum(logits, heat, alpha=0.0, beta=1.0), expected)
