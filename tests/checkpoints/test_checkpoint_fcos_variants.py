"""AdelaiDet's files of FCOS with other backbones than a plain ResNet."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from maskwright.checkpoints.origins import origins
from maskwright.systems import create


def fcos_origin():
    return next(o for o in origins() if o.system == "fcos" and o.name == "adelaidet")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("level0.0.weight", "levels.0.0.conv.weight"),
        ("level1.1.bias", "levels.1.0.norm.bias"),
        ("level2.tree1.conv1.weight", "levels.2.first.conv1.conv.weight"),
        ("level2.tree2.bn2.bias", "levels.2.second.conv2.norm.bias"),
        ("level3.tree1.tree2.conv2.weight", "levels.3.first.second.conv2.conv.weight"),
        ("level4.tree2.root.bn.running_mean", "levels.4.second.root.norm.running_mean"),
        ("level5.project.0.weight", "levels.5.shortcut.conv.weight"),
        ("stem.stem_2/norm.weight", "stem.1.norm.weight"),
        ("stage3.OSA3_1.layers.2.OSA3_1_2/conv.weight", "stages.1.1.convs.2.conv.weight"),
        ("stage2.OSA2_1.ese.fc.weight", "stages.0.0.attention.weight"),
    ],
)
def test_names_of_dla_and_vovnet(theirs: str, ours: str):
    found = fcos_origin().translate({f"backbone.bottom_up.{theirs}": torch.zeros(1)}, {"head": {"norm": "group"}})
    assert list(found) == [f"dense.backbone.{ours}"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ((), {}),
        ((("res4", range(6)), ("res5", range(3))), {"deform_stages": [2, 3], "deform_modulated": True}),
        (
            (("res3", (0, 3)), ("res4", (0, 3)), ("res5", (0,))),
            {"deform_stages": [1, 2, 3], "deform_modulated": True, "deform_every": 3},
        ),
    ],
)
def test_deformable_stages_follow_from_the_keys(offsets: tuple, expected: Mapping[str, object]):
    shapes = {
        "backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7), "backbone.fpn_output3.weight": (256, 256, 3, 3),
        "proposal_generator.fcos_head.cls_logits.weight": (20, 256, 3, 3),
    }  # fmt: skip
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            prefix = f"backbone.bottom_up.res{stage}.{block}."
            shapes |= {f"{prefix}conv2.weight": (64, 64, 3, 3), f"{prefix}conv3.weight": (256, 64, 1, 1)}
            shapes[f"{prefix}conv1.norm.running_mean"] = shapes[f"{prefix}conv1.norm.weight"] = (64,)
    for stage, blocks in offsets:
        shapes |= {f"backbone.bottom_up.{stage}.{block}.conv2_offset.weight": (27, 64, 3, 3) for block in blocks}
    recognise = fcos_origin().recognise
    assert recognise is not None
    options = recognise(shapes, {})
    assert options is not None
    assert {k: v for k, v in options["backbone"].items() if k.startswith("deform")} == expected
    assert options["backbone"]["name"] == "resnet50"
    assert len(options["classes"]) == 20
    create("fcos", backbone={**options["backbone"], "width": 16}, neck_width=32)
