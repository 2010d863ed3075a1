"""PANet: the bottom-up path, adaptive feature pooling, fully connected fusion, and its published files."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from maskwright.blocks.fpn import FPN
from maskwright.checkpoints.origins.panet import ORIGINS
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create, describe
from maskwright.systems.panet import BottomUpPath, PANet, fuse_levels
from tests.systems.tiny import SIZE, build, objects, tiny_options

PLAIN = {"bottom_up": False, "adaptive_pooling": False, "fc_fusion": False}


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_without_its_additions_it_is_mask_rcnn():
    own = build("panet", **PLAIN)
    plain = create("mask-rcnn", **{k: v for k, v in own.options.items() if k not in PLAIN})
    plain.load_state_dict(own.state_dict())
    values = []
    for system in (own, plain):
        torch.manual_seed(0)
        values.append(system.losses(system(images()), [objects(3), objects(1)]))
    assert values[0].keys() == values[1].keys()
    for name, value in values[1].items():
        torch.testing.assert_close(values[0][name], value)


@pytest.mark.parametrize("part", sorted(PLAIN))
@pytest.mark.parametrize("rules", ["detectron2", "detectron"])
def test_every_addition_works_alone(part: str, rules: str):
    system = build("panet", **{**PLAIN, part: True}, rules=rules)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        losses = system.losses(system(images()), targets)
        assert losses.keys() == {"rpn_objectness", "rpn_box", "class", "box", "mask"}
        system.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert len(found)


@pytest.mark.fast
def test_the_bottom_up_path_begins_with_the_finest_level_and_ends_with_a_subsampled_one():
    path = BottomUpPath(FPN([8, 16, 24, 32], 16, norm="group"), 16)
    features = [torch.randn(1, c, 32 >> n, 48 >> n) for n, c in enumerate((8, 16, 24, 32))]
    with torch.no_grad():
        levels, pyramid = path(features), path.pyramid(features)
        assert torch.equal(levels[0], pyramid[0])
        torch.testing.assert_close(levels[2], path.output[1](path.reduce[1](levels[1]) + pyramid[2]))
    assert [tuple(level.shape[-2:]) for level in levels] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert torch.equal(levels[4], levels[3][..., ::2, ::2])
    assert all(layer.conv.bias is not None for layer in [*path.reduce, *path.output])


@pytest.mark.fast
def test_the_maximum_over_levels_follows_the_layer_of_each():
    layers = torch.nn.ModuleList(torch.nn.Conv2d(2, 3, 1) for _ in range(4))
    levels = [torch.randn(5, 2, 4, 4) for _ in layers]
    with torch.no_grad():
        expected = torch.stack([layer(x).relu() for layer, x in zip(layers, levels, strict=True)]).amax(0)
        torch.testing.assert_close(fuse_levels(layers, torch.cat(levels, 1)), expected)


def test_each_box_is_pooled_from_all_levels():
    system = build("panet").eval()
    raw = system(images(1))
    boxes = torch.tensor([[5.0, 8, 60, 70], [40, 20, 52, 30]])
    pooled = system.pooled(raw, [boxes], 7).chunk(4, 1)
    for level in range(4):
        one = dataclasses.replace(system.pooler, every=False)
        expected = one(raw.features, [boxes], 7, torch.full((2,), level))
        torch.testing.assert_close(pooled[level], expected)


def test_one_mask_for_all_classes_is_added_and_is_not_negative():
    system = build("panet").eval()
    features = torch.randn(3, system.channels, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0, 1])
    with torch.no_grad():
        every, one = system.masks(features), system.masks(features, labels)
        torch.testing.assert_close(one[:, 0], every[torch.arange(3), labels])
        added = system.masks.connected(system.masks.shared(features))
        assert (added >= 0).all()
        assert (added > 0).any()
        system.masks.fc.weight.zero_()
        system.masks.fc.bias.zero_()
        torch.testing.assert_close(
            every - system.masks(features), added[:, None].expand_as(every), atol=1e-5, rtol=1e-4
        )


def test_the_box_head_of_fully_connected_layers():
    system = build("panet", boxes={"convs": 0, "fcs": 2, "width": 64, "norm": "group"}, masks=False)
    assert (system.outputs, system.needs) == ({"boxes"}, set())
    assert [tuple(layer.linear.weight.shape) for layer in system.boxes.first] == [(64, 49 * system.channels // 4)] * 4
    assert len(system.boxes.fcs) == 1
    losses = system.losses(system(images()), [objects(3), objects(0)])
    sum(losses.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("adaptive", [True, False])
def test_masks_can_be_scored(adaptive: bool):
    system = build("panet", adaptive_pooling=adaptive, mask_iou={"convs": 2, "width": 16, "fc_width": 16})
    losses = system.losses(system(images()), [objects(3), objects(0)])
    assert "mask_iou" in losses
    sum(losses.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    torch.nn.init.constant_(system.mask_iou.iou.bias, 0.5)
    raw, place = system.eval()(images(1)), [Placement.identity(SIZE)]
    found = [system.decode(raw, place, score_threshold=0.0, score_of=kind)[0] for kind in ("mask", "box")]
    assert len(found[0]) == len(found[1])
    assert not torch.equal(found[0].scores, found[1].scores)


@pytest.mark.fast
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("classes", [20, 80])
@pytest.mark.parametrize(("blocks", "depth"), [((3, 4, 6, 3), 50), ((3, 4, 23, 3), 101)])
def test_published_files_of_other_sizes_are_recognised(masks: bool, classes: int, blocks, depth: int):
    shapes = {
        "Conv_Body.conv_body.res1.conv1.weight": (64, 3, 7, 7), "Conv_Body.conv_top.0.weight": (256, 2048, 1, 1),
        "Conv_Body.panet_buttomup_conv1_modules.0.0.weight": (256, 256, 3, 3),
        "Box_Head.conv1_head.0.0.weight": (256, 256, 3, 3), "Box_Head.fc.weight": (1024, 12544),
        "Box_Outs.cls_score.weight": (classes + 1, 1024),
        **{f"Box_Head.convs.{n}.weight": (256,) for n in (0, 1, 3, 4, 6, 7)},
    }  # fmt: skip
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            for conv in (2, 3):
                shapes[f"Conv_Body.conv_body.res{stage}.{block}.conv{conv}.weight"] = (64, 64, 3, 3)
    if masks:
        shapes |= {f"Mask_Head.conv_fcn.{n}.weight": (256,) for n in (0, 1, 3, 4)}
        shapes |= {"Mask_Head.upconv.weight": (256, 256, 2, 2), "Mask_Outs.classify.weight": (classes + 1, 256, 1, 1)}
    options = ORIGINS[0].recognise({f"module.{k}": v for k, v in shapes.items()}, {})
    assert options is not None
    assert options["backbone"]["name"] == f"resnet{depth}"
    assert len(options["classes"]) == classes
    assert options["boxes"] == {"convs": 4, "fcs": 1, "width": 1024}
    assert options["masks"] == ({"convs": 4, "width": 256} if masks else False)


def test_the_rows_of_an_ablation_are_different_networks():
    for ablation in PANet.ablations.values():
        sizes = []
        for row in ablation.variants.values():
            system = describe("panet", **PANet.with_options(ablation.base, row))
            sizes.append(sum(p.numel() for p in system.parameters()))
        assert sizes == sorted(set(sizes))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": {"loss": "softmax"}}, "fc_fusion=True requires masks.loss='sigmoid'"),
        ({"masks": {"convs": 1}}, "masks.convs must be at least 2, got 1"),
        ({"boxes": {"convs": 0, "fcs": 0}}, "boxes.convs=0 requires boxes.fcs of at least 1"),
        ({"boxes": {"convs": 0, "norm": "batch"}}, "boxes.norm 'none' or 'group'"),
    ],
)
def test_invalid_options_are_refused(options, words: str):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("panet", **{**tiny_options("panet"), **options})
