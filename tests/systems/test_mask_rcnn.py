"""What is Mask R-CNN's own: the options its paper ablates, and its conventions."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.structures import Instances, Placement
from tests.systems.tiny import SIZE, build, objects

OPTIONS = {
    "torchvision's rules": {"rules": "torchvision"},
    "softmax masks": {"mask_loss": "softmax"},
    "class-agnostic masks": {"agnostic_masks": True},
    "class-agnostic boxes": {"agnostic_boxes": True},
    "RoIPool": {"pooling": "pool"},
    "RoIWarp": {"pooling": "warp"},
    "C4": {"neck": "c4", "backbone": "resnet50"},
    "DC5": {"neck": "dc5", "backbone": "resnet50"},
    "deformable": {"backbone": "resnet50", "deform_stages": (2, 3)},
    "modulated deformable": {"backbone": "resnet50", "deform_stages": (3,), "deform_modulated": True},
    "ResNeXt": {"backbone": "resnet50", "groups": 4, "group_width": 16},
    "4conv1fc with norm": {"box_convs": 2, "box_fcs": 1, "box_norm": "group", "mask_norm": "group", "rpn_convs": 2},
    "masks and keypoints": {"keypoints": 17, "keypoint_convs": 1, "keypoint_width": 16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_finds(options):
    system = build("mask-rcnn", **options)
    images = torch.randn(2, 3, *SIZE)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    system.eval()
    with torch.no_grad():
        found = system.decode(system(images), [Placement.identity(SIZE)] * 2, score_threshold=0.0, detections=5)
    assert all(len(own.masks) == len(own) for own in found)
    if options.get("keypoints"):
        assert all(own.keypoints.shape == (len(own), 17, 3) for own in found)


def test_a_timm_backbone_serves_under_the_pyramid():
    pytest.importorskip("timm", reason="timm is an extra")
    raw = build("mask-rcnn", backbone="timm:resnet18")(torch.randn(1, 3, *SIZE))
    assert [f.shape[-1] for f in raw.features] == [32, 16, 8, 4, 2]
    with pytest.raises(UsageError, match="timm cannot build 'resnet7'"):
        build("mask-rcnn", backbone="timm:resnet7")


def test_a_mirrored_placement_gives_mirrored_objects():
    system = build("mask-rcnn").eval()
    image = torch.randn(1, 3, *SIZE)
    straight = Placement.identity(SIZE)
    with torch.no_grad():
        raw = system(image)
        plain = system.decode(raw, [straight], score_threshold=0.0)[0]
        mirrored = system.decode(raw, [straight.then_mirror()], score_threshold=0.0)[0]
    boxes = plain.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1.0]) + torch.tensor([SIZE[1], 0, SIZE[1], 0.0])
    torch.testing.assert_close(mirrored.boxes, boxes, atol=1e-3, rtol=0)
    differing = (mirrored.masks.dense() != plain.masks.dense().flip(-1)).float().mean()
    assert differing < 1e-3


def test_the_second_epsilon_of_frozen_norms_changes_the_answer():
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        a, b = (build("mask-rcnn", norm="frozen", norm_eps=eps)(image).features[0] for eps in (1e-5, 1e-2))
    assert not torch.allclose(a, b)


def test_frozen_parts_do_not_train():
    system = build("mask-rcnn", frozen=2)
    still = {n for n, p in system.named_parameters() if not p.requires_grad}
    assert still
    assert all(n.startswith(("backbone.stem.", "backbone.stages.0.")) for n in still)


def test_a_target_without_masks_is_refused_in_words():
    system, target = build("mask-rcnn"), objects(2)
    target.masks = None
    with pytest.raises(UsageError, match="boxes but no masks"):
        system.losses(system(torch.randn(1, 3, *SIZE)), [target])
    system, target = build("keypoint-rcnn"), objects(2)
    target.keypoints = None
    with pytest.raises(UsageError, match="no keypoints"):
        system.losses(system(torch.randn(1, 3, *SIZE)), [target])


def test_keypoints_of_another_number_are_refused_in_words():
    system = build("keypoint-rcnn", keypoints=5)
    points = torch.rand(1, 17, 3) * 30 + 5
    target = Instances((64, 64), torch.tensor([[5.0, 5, 40, 40]]), torch.tensor([0]), keypoints=points)
    with pytest.raises(UsageError, match="a target has 17 keypoints, this system learns 5; build it with keypoints=17"):
        system.losses(system(torch.randn(1, 3, 64, 64)), [target])
