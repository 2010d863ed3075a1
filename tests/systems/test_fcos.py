"""FCOS: conventions of three code bases, heads, and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOS as Theirs
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import maskwright as mw
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create
from tests.systems.tiny import SIZE, build, objects, tiny_options


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"rules": "detectron2"},
        {"rules": "torchvision", "head": {"scales": False}},
        {"quality": "iou", "box_loss": "iou"},
        {"box_loss": "linear_iou", "radius": None},
        {"levels": 3, "head": {"shared": 2, "classes": 0, "boxes": 0, "norm": "batch"}},
        {"levels": 4, "head": {"norm": "none"}},
        {"head": {"deformable": "last"}},
        {"head": {"deformable": "all", "shared": 1}},
        {"backbone": "dla34"},
    ],
    ids=str,
)
def test_each_option_trains_and_detects(options):
    system = build("fcos", **options)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images()), targets)
        assert terms.keys() == {"class", "box", "centerness"}
        assert all(torch.isfinite(v) for v in terms.values())
        system.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    torch.nn.init.constant_(system.dense.head.distances.bias, 2.0)  # boxes inside of the image
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0, detections=7)[0]
    assert len(found) == 7
    assert found.masks is None
    assert len(system(images(1)).logits) == system.options["levels"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"head": {"distances": "exp"}}], ids=str)
def test_distances_start_at_about_two_strides_in_all_directions(options, seed):
    torch.manual_seed(seed)
    finest = build("fcos", **options)(images(1)).distances[0]
    means = finest.mean((0, 2, 3))
    torch.testing.assert_close(means, torch.full((4,), 2.0), atol=1.0, rtol=0)
    assert (finest > 0.5).float().mean() > 0.95  # where the ReLU is zero, nothing is learned


def test_the_normalizer_of_detectron2_is_an_exponential_mean_that_is_saved():
    system = build("fcos", rules="detectron2").train()
    raw, target = system(images(1)), objects(2)
    positive = int(system.assign(raw, [target]).positive.sum())
    assert positive > 1
    before = system.losses(raw, [target])["centerness"]
    assert system.normalizer.item() == pytest.approx(0.9 * 300 + 0.1 * positive)
    after = system.losses(raw, [target])["centerness"]
    assert after > before
    assert "normalizer" in system.state_dict()


def test_a_score_threshold_is_one_of_scores():
    system = build("fcos").eval()
    with torch.no_grad():
        system.dense.head.logits.bias.fill_(-0.5)
        raw = system(images(1))
        for threshold in (0.3, 0.45, 0.6):
            found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=threshold)[0]
            assert (found.scores > threshold).all()


def test_torchvisions_file_gives_torchvisions_boxes(tmp_path: Path):
    torch.manual_seed(0)
    body = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    theirs = Theirs(body, 4, min_size=128, max_size=256, score_thresh=0.0, detections_per_img=20).eval()
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.weight.mul_(30)
        theirs.head.regression_head.bbox_reg.bias.fill_(2.0)
        theirs.head.regression_head.bbox_reg.weight.mul_(10)
    path = tmp_path / "fcos.pth"
    torch.save(theirs.state_dict(), path)
    system = mw.load(path, resize={"short": 128, "long": 256})
    assert (system.name, system.options["rules"], len(system.classes)) == ("fcos", "torchvision", 4)
    image = torch.rand(3, 100, 140, generator=torch.Generator().manual_seed(1)).mul(255).round()
    with torch.no_grad():
        answer = theirs([image / 255])[0]
    ours = system.predict(image.to(torch.uint8), score_threshold=0.0, detections=20).instances
    assert len(ours) == len(answer["boxes"])
    torch.testing.assert_close(ours.scores, answer["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.boxes, answer["boxes"], atol=2e-2, rtol=0)
    assert torch.equal(ours.labels, answer["labels"])


def test_losses_are_torchvisions(tmp_path: Path):
    torch.manual_seed(0)
    body = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    theirs = Theirs(body, 4, min_size=128, max_size=256).train()
    torch.save(theirs.state_dict(), tmp_path / "fcos.pth")
    system = mw.load(tmp_path / "fcos.pth", resize={"short": 128, "long": 256}).train()
    image = torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(1))
    boxes, labels = torch.tensor([[10.0, 12, 70, 90], [60, 30, 150, 110], [20, 20, 36, 40]]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        answer = theirs([image], [{"boxes": boxes, "labels": labels}])
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        ours = system.losses(system(((image - mean) / std)[None]), [mw.Instances((128, 160), boxes, labels)])
    for name, own in (("classification", "class"), ("bbox_regression", "box"), ("bbox_ctrness", "centerness")):
        torch.testing.assert_close(ours[own], answer[name], rtol=2e-5, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": 6}, "levels must be 3, 4 or 5"),
        ({"radius": 0.0}, "radius must be above 0"),
        ({"head": {"boxes": -1}}, "head.boxes must be at least 0"),
        ({"head": {"norm": "batch", "deformable": "last"}}, "head.norm='batch' requires head.deformable='none'"),
        ({"box_loss": "diou"}, "box_loss must be one of 'giou', 'iou', 'linear_iou'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("fcos", **{**tiny_options("fcos"), **options})
