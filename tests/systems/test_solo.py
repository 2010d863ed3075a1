"""Behaviour specific to SOLO, Decoupled SOLO and SOLOv2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.solov2 import SOLOv2
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
SMALL = (64, 96)
NARROW = {"backbone": {"width": 8}, "neck_width": 16, "cells": {"grids": (8, 6, 4, 3, 2)}}
OPTIONS = {
    "focal masks": ("solo", {"mask_loss": "focal"}),
    "no coordinates, pooled": ("solo", {"coordinates": False, "align": "pool", "mask_loss": "bce"}),
    "one tower, its last convolution deformable": (
        "decoupled-solo",
        {"shared_tower": True, "head": {"deform": "last"}},
    ),
    "deformable throughout": ("solov2", {"head": {"deform": "all", "modulated": True}}),
    "3 x 3 kernels without coordinates": ("solov2", {"kernel_size": 3, "coordinates": False}),
    "rules of AdelaiDet": ("solov2", {"rules": "adelaidet", "backbone": {"norm": "frozen"}}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_detects(name, options):
    system = build(name, **type(build(name)).with_options(NARROW, options))
    images = torch.randn(2, 3, *SMALL)
    raw = system(images)
    terms = system.losses(raw, [objects(n, size=SMALL) for n in (3, 0)])
    sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    terms |= {f"{name}, no objects": v for name, v in system.losses(raw, [objects(0, size=SMALL)] * 2).items()}
    assert all(torch.isfinite(v) for v in terms.values()), terms
    with torch.no_grad():
        for part, values in system.named_parameters():
            if part.startswith(("masks.", "dense.across_output", "dense.down_output")) and part.endswith("bias"):
                values.fill_(2.0)
        raw, places = system.eval()(images), [Placement.identity(SMALL)] * 2
        for nms in (None, 0.5):
            found = system.decode(raw, places, score_threshold=0.0, nms_threshold=nms, detections=5)
            assert all(0 < len(own) <= 5 and len(own.masks) == len(own) for own in found)


@pytest.mark.parametrize("name", ["decoupled-solo", "solov2"])
def test_a_grid_of_one_cell_gives_the_same_alone_as_in_a_batch(name):
    system = build(name, cells={"grids": (4, 3, 2, 2, 1)}).eval()
    images = torch.randn(2, 3, *SMALL)
    with torch.no_grad():
        together, alone = system(images), system(images[:1])
    for a, b in zip(together.classes, alone.classes, strict=True):
        torch.testing.assert_close(a[:1], b)


def test_masks_of_single_cells_are_channels_of_the_last_convolution():
    system = build("solo").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    none, cells = torch.zeros(0, dtype=torch.int64), torch.tensor([3, 0, 20, 3])
    chosen = [none, cells, none, none, none]
    whole = system.masks.outputs[1](raw.features[1])[0].sigmoid()
    masks = system.cell_masks(raw, 0, chosen)
    torch.testing.assert_close(masks[1], whole[cells])
    assert [len(own) for own in masks] == [0, 4, 0, 0, 0]
    resized = functional.interpolate(whole[None, cells], size=(50, 60), mode="bilinear")[0]
    torch.testing.assert_close(system.cell_masks(raw, 0, chosen, (50, 60))[1], resized)


def test_a_decoupled_mask_is_the_product_of_its_column_and_its_row():
    system = build("decoupled-solo").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    row, column, grid = 2, 5, system.cells.grids[1]
    chosen = [torch.tensor([row * grid + column] if level == 1 else [], dtype=torch.int64) for level in range(5)]
    found = system.cell_masks(raw, 0, chosen)[1][0]
    torch.testing.assert_close(found, raw.across[1][0, column].sigmoid() * raw.down[1][0, row].sigmoid())


def painted(system, **options) -> Instances:
    """Decodes a raw output in which a cell of the finest grid and its left neighbour have nearly the same rectangle."""
    raw = system(torch.zeros(1, 3, *SIZE))
    classes = [torch.full_like(level, -9) for level in raw.classes]
    classes[0][0, 1, 4, 5], classes[0][0, 1, 4, 4], classes[0][0, 0, 2, 3] = 3.0, 2.0, 2.5
    feature = torch.full_like(raw.feature, -1.0)
    feature[0, 0, 6:14, 8:20] = feature[0, 1, 6:14, 8:19] = feature[0, 2, 14:20, 2:6] = 1.0
    kernels = [torch.zeros_like(level) for level in raw.kernels]
    for channel, cell in enumerate([(4, 5), (4, 4), (2, 3)]):
        kernels[0][0, channel, cell[0], cell[1]] = 6.0
    raw = replace(raw, classes=tuple(classes), kernels=tuple(kernels), feature=feature)
    return system.decode(raw, [Placement.identity(SIZE)], **options)[0]


def test_kernels_give_masks_and_scores_include_their_certainty():
    system = build("solov2").eval()
    with torch.no_grad():
        found = painted(system, nms_threshold=0.5)
        decayed = painted(system)
    assert found.labels.tolist() == [1, 0]
    sure = torch.tensor(6.0).sigmoid()
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.5]).sigmoid() * sure)
    torch.testing.assert_close(found.boxes, torch.tensor([[32.0, 24, 80, 56], [8.0, 56, 24, 80]]), atol=1, rtol=0)
    assert found.masks.areas().tolist() == pytest.approx([48 * 32, 16 * 24], rel=0.05)
    assert decayed.labels.tolist() == [1, 0, 1]  # Matrix NMS keeps the duplicate, with a lower score
    iou = torch.tensor(11 / 12)
    torch.testing.assert_close(decayed.scores[2], torch.tensor(2.0).sigmoid() * sure * (-2 * iou**2).exp())


def test_a_cell_with_two_objects_is_trained_on_both_masks_in_solov2_only():
    # Two objects in one place, the second with a hole: SOLO trains on the later one, SOLOv2 on both.
    first = objects(1, side=(50, 50))
    x, y = first.boxes[0, :2].long().tolist()
    planes = first.masks.dense()
    planes[:, y + 10 : y + 40, x + 10 : x + 40] = False
    second = replace(first, masks=Masks.from_dense(planes).pack())
    images = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        for name, both_count in (("solo", False), ("solov2", True)):
            system = build(name).eval()
            raw = system(images)
            alone, other, together = (
                float(system.losses(raw, [t])["mask"]) for t in (first, second, Instances.join([first, second]))
            )
            assert abs(alone - other) > 1e-4
            expected = (alone + other) / 2 if both_count else other
            assert together == pytest.approx(expected, abs=2e-2 * abs(alone - other)), name


def test_boxes_include_their_last_pixel_for_the_fork_only():
    # 32 pixels wide: 31 for the fork, which is outside all ranges, 32 for AdelaiDet.
    ranges = ((32, 40), (1000, 1001), (1000, 1001), (1000, 1001), (1000, 1001))
    image, target = torch.randn(1, 3, *SIZE), objects(1, side=(32, 32))
    terms = {rules: build("solov2", rules=rules, cells={"ranges": ranges}) for rules in ("mmdet", "adelaidet")}
    with torch.no_grad():
        found = {rules: float(s.losses(s(image), [target])["mask"]) for rules, s in terms.items()}
    assert found["mmdet"] == 0
    assert found["adelaidet"] > 0


@pytest.mark.fast
def test_invalid_options_are_refused():
    with pytest.raises(UsageError, match=r"solo: cells.grids must have 5 entries, got 4"):
        create("solo", cells={"grids": (9, 8, 7, 6)})
    for name in ("solo", "decoupled-solo", "solov2"):
        with pytest.raises(UsageError, match=r"head.convs must be at least 1, got 0"):
            create(name, head={"convs": 0})
        with pytest.raises(UsageError, match=r"cells.grids must be at least 1, got \[9, 8, 7, 6, 0\]"):
            create(name, cells={"grids": (9, 8, 7, 6, 0)})
    with pytest.raises(UsageError, match=r"cells.ranges must be pairs of a lowest and a highest size"):
        create("solo", cells={"ranges": ((1, 96), (48, 192), (96, 384), (192, 768), (384,))})
    with pytest.raises(UsageError, match="there is no backbone 'vgg'"):
        create("solov2", backbone="vgg")
    with pytest.raises(UsageError, match="rules must be one of 'mmdet', 'adelaidet', got 'detectron'"):
        create("solov2", rules="detectron")
    with pytest.raises(UsageError, match="kernel_size must be one of 1, 3, got 2"):
        create("solov2", kernel_size=2)


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {"classes": ["a"], "backbone": "resnet50", "head_deform": "last", "head_convs": 2, "deform_modulated": True}
    options = SOLOv2.upgraded({**old, "sigma": 0.3, "short": 320})
    assert options["head"] == {"deform": "last", "convs": 2, "modulated": True}
    assert options["backbone"] == {"name": "resnet50", "deform_modulated": True}
    assert (options["cells"], options["resize"]) == ({"sigma": 0.3}, {"short": 320})
    assert SOLOv2.upgraded(options) == options


def test_variants_of_the_layout_that_were_never_published_are_recognised():
    tensors = json.loads((LAYOUTS / "solov2-light-resnet18.json").read_text())["tensors"]
    shapes = {k: tuple(shape) for k, (shape, _) in tensors.items()}
    for kind in ("weight", "bias"):
        shapes[f"bbox_head.solo_cate.{kind}"] = (8, *shapes[f"bbox_head.solo_cate.{kind}"][1:])
    shapes["bbox_head.solo_kernel.weight"] = (9 * 128, *shapes["bbox_head.solo_kernel.weight"][1:])
    shapes["bbox_head.solo_kernel.bias"] = (9 * 128,)
    shapes |= {k.replace("layer1.1.", "layer1.2."): v for k, v in shapes.items() if k.startswith("backbone.layer1.1.")}
    assert not [o for o in origins() if o.candidates(shapes, {})]  # no such ResNet exists
    shapes = {k: v for k, v in shapes.items() if not k.startswith("backbone.layer1.2.")}
    found = [(o.name, c.options) for o in origins() for c in o.candidates(shapes, {})]
    assert [name for name, _ in found] == ["WXinlong/SOLO"]
    options = found[0][1]
    assert options["classes"][0] == "person"
    assert len(options["classes"]) == 8
    assert options["kernel_size"] == 3
    system = create("solov2", **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    origin = next(o for o in origins() if o.name == found[0][0] and o.system == "solov2")
    state = origin.translate({k: torch.empty(v, device="meta") for k, v in shapes.items()}, options)
    assert {k: tuple(v.shape) for k, v in state.items()} == ours
