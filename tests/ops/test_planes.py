"""Planes are resized to the image in two steps, without intermediate results of the size of the input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from maskwright.ops.planes import place_planes
from maskwright.structures import Placement

pytestmark = pytest.mark.fast


def smooth(count: int, height: int, width: int) -> torch.Tensor:
    noise = torch.randn(count, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(noise, (height, width), mode="bicubic")[:, 0].sigmoid()


def two_steps(planes: torch.Tensor, size: tuple[int, int], valid: tuple[int, int], image: tuple[int, int]):
    whole = functional.interpolate(planes[None], size, mode="bilinear", align_corners=False)
    return functional.interpolate(whole[..., : valid[0], : valid[1]], image, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("image", [(90, 113), (120, 150), (301, 207)])
def test_planes_are_resized_to_the_input_cropped_and_resized_to_the_image(image):
    planes = smooth(6, 32, 40)
    found = place_planes(planes, Placement.resize(image, (120, 150)), (128, 160)).dense()
    values = two_steps(planes, (128, 160), (120, 150), image)
    differing = found != (values > 0.5)
    assert found.any()
    assert (values[differing] - 0.5).abs().max().item() < 1e-5 if differing.any() else True


def test_mirrored_and_shifted_placements_are_undone():
    planes = smooth(4, 32, 40)
    straight = Placement.resize((64, 75), (128, 150))
    plain = place_planes(planes, straight, (128, 160)).dense()
    mirrored = place_planes(planes, straight.then_mirror(), (128, 160)).dense()
    assert torch.equal(mirrored, plain.flip(-1))
    # A crop of an image: pixels outside of the input belong to no mask.
    inside = Placement.identity((100, 120)).then_crop(10, 20, (60, 70))
    found = place_planes(torch.ones(1, 15, 18), inside, (60, 72)).dense()[0]
    assert found[20:80, 10:80].all()
    assert int(found.sum()) == 60 * 70


def test_many_objects_on_a_large_image_need_little_memory():
    planes = torch.zeros(100, 200, 336)
    for k in range(100):
        planes[k, 2 * k % 180 : 2 * k % 180 + 15, 3 * k % 310 : 3 * k % 310 + 20] = 0.9
    masks = place_planes(planes, Placement.resize((3000, 4000), (800, 1067)), (800, 1344))
    assert masks.size == (3000, 4000)
    assert masks.nbytes < 1 << 20
    assert len(place_planes(planes[:0], Placement.identity((9, 9)), (32, 32))) == 0
    assert place_planes(planes[:1] * 0, Placement.identity((9, 9)), (32, 32)).areas().tolist() == [0]
