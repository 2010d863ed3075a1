"""BlendMask: bases, blending, and the auxiliary segmentation."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.blendmask import label_grid
from tests.systems.tiny import SIZE, build, objects, tiny_options


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 3, "head": {"shared": 2, "classes": 0, "boxes": 0, "norm": "batch"}, "blend": {"convs": 2}},
        {"blend": {"semantic_weight": 0.0, "bases": 1, "attention": 1}},
        {"blend": {"bases": 3, "attention": 4, "side": 28, "norm": "batch"}},
        {"backbone": "dla34"},
    ],
    ids=str,
)
def test_each_option_trains_and_detects(options):
    system = build("blendmask", **options)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images()), targets)
        assert all(torch.isfinite(v) for v in terms.values())
        assert ("semantic" in terms) == (system.semantic is not None)
        system.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    torch.nn.init.constant_(system.dense.head.distances.bias, 2.0)  # boxes inside of the image
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0, detections=7)[0]
    assert len(found) == len(found.masks) == 7


def test_blending_is_a_mean_of_the_bases_weighted_by_softmax():
    system = build("blendmask", blend={"bases": 2, "attention": 1, "side": 8})
    pooled = torch.stack([torch.full((8, 8), 3.0), torch.full((8, 8), -1.0)])[None]
    attention = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])
    torch.testing.assert_close(system.blended(pooled, attention), torch.full((1, 8, 8), 0.25 * 3 - 0.75))


@pytest.mark.fast
def test_labels_of_the_auxiliary_segmentation_are_those_of_every_eighth_pixel():
    planes = torch.zeros(2, 30, 40, dtype=torch.bool)
    planes[0, 3:20, 5:30] = True
    planes[1, 8:17, 16:40] = True
    target = Instances((30, 40), torch.zeros(2, 4), torch.tensor([4, 0]), Masks.from_dense(planes))
    whole = torch.zeros(32, 40, dtype=torch.int64)
    whole[:30][planes[0]] = 5
    whole[:30][planes[1]] = 1
    assert torch.equal(label_grid(target, 8, (4, 5)), whole[::8, ::8])


def test_a_mask_is_learnt_from_the_attention_of_every_positive_location():
    system = build("blendmask")
    raw = system(images(1))
    system.losses(raw, [objects(1)])["mask"].backward()
    gradient = system.dense.head.top.bias.grad
    assert gradient.abs().sum() > 0
    # A constant that is added to the attention of all bases changes nothing.
    own = gradient.unflatten(0, (system.blend.bases, -1)).sum(0)
    torch.testing.assert_close(own, torch.zeros_like(own), atol=1e-6, rtol=0)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blend": {"bases": 0}}, "blend.bases must be at least 1"),
        ({"blend": {"semantic_weight": -1.0}}, "blend.semantic_weight must be at least 0"),
        ({"levels": 2}, "levels must be 3, 4 or 5"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("blendmask", **{**tiny_options("blendmask"), **options})
