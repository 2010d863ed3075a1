"""RetinaNet: conventions of two code bases, and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet as Theirs
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import maskwright as mw
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create
from tests.systems.tiny import SIZE, build, objects, tiny_options


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"rules": "detectron2"}, {"norm": "group", "box_loss": "giou"}, {"convs": 0}], ids=str
)
def test_each_option_trains_and_detects(options):
    system = build("retinanet", **options)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images()), targets)
        assert terms.keys() == {"class", "box"}
        assert all(torch.isfinite(v) for v in terms.values())
        system.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0, detections=7)[0]
    assert len(found) == 7
    assert found.masks is None


def test_the_normalizer_of_detectron2_is_an_exponential_mean():
    system = build("retinanet", rules="detectron2").train()
    raw, target = system(images(1)), objects(2)
    anchors = torch.cat(system.anchors(raw.features, raw.size))
    positive = int((system.assign(anchors, target)[1] >= 0).sum())
    system.losses(raw, [target])
    assert system.normalizer.item() == pytest.approx(90 + 0.1 * positive)


def their_system(version: int) -> Theirs:
    torch.manual_seed(0)
    extra = LastLevelP6P7(512, 256)
    body = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=extra,
        **({"norm_layer": torch.nn.BatchNorm2d, "trainable_layers": 5} if version == 2 else {}),
    )  # fmt: skip
    sizes = tuple((x, int(x * 2 ** (1.0 / 3)), int(x * 2 ** (2.0 / 3))) for x in (32, 64, 128, 256, 512))
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    norm = (lambda channels: torch.nn.GroupNorm(32, channels)) if version == 2 else None
    head = RetinaNetHead(256, 9, 4, norm_layer=norm)
    if version == 2:
        head.regression_head._loss_type = "giou"
    theirs = Theirs(
        body, 4, min_size=128, max_size=256, anchor_generator=anchors, head=head, score_thresh=0.0,
        detections_per_img=20,
    )  # fmt: skip
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.weight.mul_(30 if version == 1 else 3)
        theirs.head.regression_head.bbox_reg.weight.mul_(10 if version == 1 else 2)
    return theirs


@pytest.mark.parametrize("version", [1, 2])
def test_torchvisions_file_gives_torchvisions_boxes_and_losses(version: int, tmp_path: Path):
    theirs = their_system(version).eval()
    torch.save(theirs.state_dict(), tmp_path / "retinanet.pth")
    system = mw.load(tmp_path / "retinanet.pth", resize={"short": 128, "long": 256})
    assert (system.name, len(system.classes)) == ("retinanet", 4)
    assert system.options["box_loss"] == ("giou" if version == 2 else "l1")
    image = torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(1)).mul(255).round()
    with torch.no_grad():
        answer = theirs([image / 255])[0]
    ours = system.predict(image.to(torch.uint8), score_threshold=0.0, detections=20).instances
    solid = (answer["boxes"][:, 2:] > answer["boxes"][:, :2]).all(1)
    assert len(ours) == int(solid.sum())
    torch.testing.assert_close(ours.scores, answer["scores"][solid], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.boxes, answer["boxes"][solid], atol=2e-2, rtol=0)
    assert torch.equal(ours.labels, answer["labels"][solid])

    boxes, labels = torch.tensor([[10.0, 12, 70, 90], [60, 30, 150, 110], [20, 20, 36, 40]]), torch.tensor([1, 2, 3])
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        terms = theirs(
            [image / 255] * 2, [{"boxes": boxes, "labels": labels}, {"boxes": boxes[:1], "labels": labels[:1]}]
        )
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        normal = ((image / 255 - mean) / std)[None].expand(2, -1, -1, -1)
        targets = [mw.Instances((128, 160), boxes[:n], labels[:n]) for n in (3, 1)]
        own = system.losses(system(normal), targets)
    torch.testing.assert_close(own["class"], terms["classification"], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(own["box"], terms["bbox_regression"], rtol=2e-5, atol=1e-6)


def test_a_file_of_91_rows_loses_the_row_of_no_category(tmp_path: Path):
    theirs = their_system(1)
    head = torch.nn.Conv2d(256, 9 * 91, 3, padding=1)
    own = {f"head.classification_head.cls_logits.{kind}": value for kind, value in head.state_dict().items()}
    state = theirs.state_dict() | own
    torch.save(state, tmp_path / "retinanet.pth")
    system = mw.load(tmp_path / "retinanet.pth")
    assert system.classes[0] == "person"
    ours = system.state_dict()["dense.logits.bias"].view(9, 90)
    assert torch.equal(ours, head.bias.data.view(9, 91)[:, 1:])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anchor_sizes": (32, 64)}, "anchor_sizes must be 5 numbers above 0"),
        ({"convs": -1}, "convs must be at least 0"),
        ({"norm": "batch"}, "norm must be one of 'none', 'group'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("retinanet", **{**tiny_options("retinanet"), **options})
