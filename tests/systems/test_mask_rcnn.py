"""Mask R-CNN and Keypoint R-CNN: the options that the paper ablates, and the conventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.structures import Instances, Placement
from maskwright.systems.mask_rcnn import MaskRCNN
from tests.systems.tiny import SIZE, build, objects

RESNET50 = {"name": "resnet50", "width": 16, "norm": "group"}
OPTIONS: dict[str, dict[str, Any]] = {
    "torchvision's rules": {"rules": "torchvision"},
    "competing masks": {"masks": {"loss": "softmax"}},
    "class-agnostic masks": {"masks": {"agnostic": True}},
    "class-agnostic boxes": {"boxes": {"agnostic": True}},
    "RoIPool": {"pooling": "pool"},
    "RoIWarp": {"pooling": "warp"},
    "C4": {"neck": "c4", "backbone": RESNET50},
    "DC5": {"neck": "dc5", "backbone": RESNET50},
    "deformable": {"backbone": {**RESNET50, "deform_stages": (2, 3)}},
    "modulated deformable": {"backbone": {**RESNET50, "deform_stages": (3,), "deform_modulated": True}},
    "ResNeXt": {"backbone": {**RESNET50, "groups": 4, "group_width": 16}},
    "4conv1fc with norm": {
        "boxes": {"convs": 2, "fcs": 1, "norm": "group"}, "masks": {"norm": "group"}, "proposals": {"convs": 2},
    },
    "masks and keypoints": {"keypoints": {"count": 17, "convs": 1, "width": 16}},
    "boxes only": {"masks": False},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_detects(options):
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
    assert system.outputs == {"boxes"} | {n for n in ("masks", "keypoints") if getattr(system, n) is not None}
    for own in found:
        assert len(own)
        assert len(own.masks) == len(own) if "masks" in system.outputs else own.masks is None
        assert own.keypoints.shape == (len(own), 17, 3) if "keypoints" in system.outputs else own.keypoints is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS["C4"], OPTIONS["DC5"], OPTIONS["RoIPool"]], ids=["C4", "DC5", "RoIPool"])
def test_half_precision_reaches_every_head(options, dtype):
    system = build("mask-rcnn", **options).eval().to(dtype)
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE, dtype=dtype))
        assert system.pooled(raw, [torch.tensor([[5.0, 8, 60, 70]])], 7).dtype == dtype
        found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0, detections=5)[0]
    assert torch.isfinite(found.boxes).all()


def test_a_timm_backbone_under_the_pyramid():
    pytest.importorskip("timm", reason="timm is an extra")
    raw = build("mask-rcnn", backbone="timm:resnet18")(torch.randn(1, 3, *SIZE))
    assert [f.shape[-1] for f in raw.features] == [32, 16, 8, 4, 2]
    with pytest.raises(UsageError, match="there is no model 'resnet7' in timm's registry"):
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


def test_the_epsilon_of_frozen_norms_changes_the_features():
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        a, b = (
            build("mask-rcnn", backbone={"norm": "frozen", "norm_eps": eps})(image).features[0] for eps in (1e-5, 1e-2)
        )
    assert not torch.allclose(a, b)


def test_frozen_parts_do_not_train():
    system = build("mask-rcnn", backbone={"frozen": 2})
    still = {n for n, p in system.named_parameters() if not p.requires_grad}
    assert still
    assert all(n.startswith(("dense.backbone.stem.", "dense.backbone.stages.0.")) for n in still)


def test_keypoints_of_another_number_are_refused():
    system = build("keypoint-rcnn", keypoints=5)
    points = torch.rand(1, 17, 3) * 30 + 5
    target = Instances((64, 64), torch.tensor([[5.0, 5, 40, 40]]), torch.tensor([0]), keypoints=points)
    with pytest.raises(UsageError, match=r"targets have 17 keypoints, the system predicts 5; set keypoints\.count=17"):
        system.losses(system(torch.randn(1, 3, 64, 64)), [target])


def test_a_system_needs_what_it_is_trained_on():
    assert build("mask-rcnn").needs == {"masks"}
    assert build("mask-rcnn", masks=False).needs == set()
    assert build("mask-rcnn", keypoints=5).needs == {"masks", "keypoints"}
    assert build("keypoint-rcnn").needs == {"keypoints"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proposals": {"before": (10,)}}, "proposals.before must be two integers of at least 0"),
        ({"proposals": {"after": (10, -1)}}, "proposals.after must be two integers of at least 0"),
        ({"proposals": {"anchor_sizes": (32, 64)}}, "proposals.anchor_sizes must have 5 entries"),
        ({"neck": "c4", "backbone": "swin-tiny"}, "neck='c4' requires a ResNet backbone, got 'swin-tiny'"),
        ({"neck": "c4", "backbone": {"name": "resnet50", "deform_stages": (3,)}}, "deform_stages has 3; only stages 0"),
        ({"neck": "dc5", "backbone": "swin-tiny"}, "has no dilated stages"),
        ({"points": True, "neck": "dc5"}, "points=True requires neck='fpn'"),
        ({"points": True, "masks": {"loss": "softmax"}}, "points=True requires"),
        ({"masks": {"width": 0}}, "masks.width at least 1"),
        ({"keypoints": {"count": 0}}, "keypoints.count must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        build("mask-rcnn", **options)


def test_options_of_earlier_versions_are_converted():
    old = {
        "classes": ["a"], "backbone": "resnet18", "stem_width": 16, "norm": "frozen", "masks": True, "mask_convs": 2,
        "anchor_sizes": [8, 16, 32, 64, 128], "proposals_before": None, "box_width": 64, "box_beta": None,
        "mask_loss": "softmax", "keypoints": 0, "keypoint_convs": 8, "short": 320, "mean": None, "points": False,
    }  # fmt: skip
    new = MaskRCNN.upgraded(old)
    system = MaskRCNN(**new)
    assert system.options["masks"] == {"convs": 2, "width": 256, "norm": "none", "loss": "softmax", "agnostic": False}
    assert system.options["keypoints"] is False
    assert system.options["proposals"]["anchor_sizes"] == [8, 16, 32, 64, 128]
    assert system.preprocess.short == 320
    assert MaskRCNN.upgraded(system.options) == system.options
    without = MaskRCNN.upgraded({**old, "masks": False, "keypoints": 5})
    assert without["masks"] is False
    assert without["keypoints"] == {"convs": 8, "count": 5}
