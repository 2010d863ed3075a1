"""CenterMask: backbones, levels, heads, and the order of objects."""

from __future__ import annotations

import pytest
import torch

from maskwright.blocks.vovnet import BODIES
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create
from maskwright.systems.centermask import box_level
from tests.systems.tiny import SIZE, build, objects, tiny_options


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"masks": {"scoring": False}},
        {"masks": {"attention": False, "levels": "size"}},
        {"backbone": {"name": "vovnet19-slim", "width": 16, "norm": "group"}},
        {"backbone": {"name": "vovnet19-slim-dw", "width": 16, "norm": "batch"}},
        {"backbone": {"name": "vovnet39", "width": 8, "norm": "frozen", "deform_stages": (2,), "frozen": 2}},
        {"backbone": {"name": "mobilenet-v2", "width": 8, "norm": "batch", "frozen": 3}},
    ],
    ids=str,
)
def test_each_option_trains_and_detects(options):
    system = build("centermask", **options)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images()), targets)
        assert all(torch.isfinite(v) for v in terms.values())
        assert ("mask_iou" in terms) == (system.mask_iou is not None)
        system.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    torch.nn.init.constant_(system.dense.head.distances.bias, 2.0)  # boxes inside of the image
    if system.mask_iou is not None:
        torch.nn.init.constant_(system.mask_iou.iou.bias, 0.5)
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0, detections=7)[0]
    assert len(found) == len(found.masks) == 7
    assert (found.scores.diff() <= 0).all()


@pytest.mark.fast
def test_the_level_of_a_box_depends_on_its_share_of_the_image():
    side = torch.tensor([100.0, 50.1, 49.9, 71.0, 70.0, 20.0, 0.0])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), side, side], 1)
    # More than half of the image: stride 32; more than a quarter: 16; less: 8.
    assert box_level(boxes, (100, 100)).tolist() == [2, 1, 0, 2, 1, 0, 0]


@pytest.mark.fast
@pytest.mark.parametrize("name", [*BODIES, "mobilenet-v2"])
def test_levels_are_known_without_building(name):
    from maskwright.blocks.backbones import Backbone, levels_of

    spec = Backbone(name, norm="frozen", width=32 if name == "mobilenet-v2" else 64)
    with torch.device("meta"):
        assert levels_of(spec.build()) == spec.levels()


def test_pooling_between_stages_includes_the_last_row():
    system = build("centermask", backbone={"name": "vovnet19-slim", "width": 8})
    levels = system.dense.backbone(torch.randn(1, 3, 100, 132))
    assert [tuple(level.shape[-2:]) for level in levels] == [(25, 33), (12, 16), (6, 8), (3, 4)]


def test_mirrored_placements_give_mirrored_masks():
    system = build("centermask", masks={"scoring": False}).eval()
    torch.nn.init.constant_(system.dense.head.distances.bias, 2.0)
    raw, place = system(images(1)), Placement.identity(SIZE)
    plain = system.decode(raw, [place], score_threshold=0.0, detections=5)[0]
    mirrored = system.decode(raw, [place.then_mirror()], score_threshold=0.0, detections=5)[0]
    assert (plain.masks.dense().flip(-1) != mirrored.masks.dense()).float().mean() < 2e-3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": {"convs": 0}}, "masks.convs must be at least 1"),
        ({"masks": {"levels": "area"}}, "masks.levels must be one of 'image', 'size'"),
        ({"backbone": {"name": "vovnet19-dw", "deform_stages": (1,)}}, "has no option 'deform_stages'"),
        ({"backbone": {"name": "vovnet39", "width": 10}}, "must be a multiple of 4"),
        ({"backbone": "vovnet38"}, "did you mean 'vovnet39'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("centermask", **{**tiny_options("centermask"), **options})
