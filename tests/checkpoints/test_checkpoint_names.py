"""Class names stored beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import maskwright as mw
from maskwright.checkpoints.names import COCO, COCO_STUFF, named_by

LAYOUT = Path(__file__).parents[1] / "parity" / "layouts" / "solov2-light-resnet18.json"
TWO = {"classes": ("class 0", "class 1"), "stuff": ("class 1",), "queries": 5}


def folder(*names):
    return {"config": {"id2label": {str(k): name for k, name in enumerate(names)}}, "container": {}}


def file(**meta):
    return {"config": {}, "container": {"meta": meta}}


@pytest.mark.fast
@pytest.mark.parametrize(
    "about",
    [
        folder("cell", "dust"),
        file(CLASSES=["cell", "dust"]),
        file(dataset_meta={"classes": ["cell ", "dust"]}),
        file(dataset_meta={"CLASSES": ["cell", "dust"]}),
    ],
)
def test_names_beside_the_weights_are_taken(about):
    assert named_by(about, TWO) == {"classes": ("cell", "dust"), "stuff": (), "queries": 5}
    assert "stuff" not in named_by(about, {"classes": ("class 0", "class 1")})


@pytest.mark.fast
def test_a_single_name_may_stand_alone():
    assert named_by(file(CLASSES="cell"), {"classes": ("person",)}) == {"classes": ("cell",)}


@pytest.mark.fast
@pytest.mark.parametrize(
    "about",
    [
        {},
        folder(),
        folder("cell"),  # not as many as the head has classes
        folder("cell", "cell"),
        folder("LABEL_0", "LABEL_1"),
        folder("cell", 7),
        {"config": {"id2label": {"1": "cell", "2": "dust"}}},
        {"config": {"id2label": ["cell", "dust"]}},
        file(CLASSES=["cell", ""]),
        file(CLASSES=None, dataset_meta="none"),
        {"container": {"meta": "by hand"}},
    ],
)
def test_invalid_class_names_are_ignored(about):
    assert named_by(about, TWO) is TWO


@pytest.mark.fast
def test_known_names_stay_as_they_are_known():
    both = {"classes": (*COCO, *COCO_STUFF), "stuff": COCO_STUFF}
    assert named_by(folder(*(n.title() for n in both["classes"])), both) is both


def test_a_file_of_mmdet_brings_its_own_classes(tmp_path):
    tensors = {k: torch.zeros(shape) for k, (shape, _) in json.loads(LAYOUT.read_text())["tensors"].items()}
    path = tmp_path / "epoch_12.pth"
    theirs = [f"part {k}" for k in range(80)]
    torch.save({"meta": {"CLASSES": tuple(theirs), "epoch": 12}, "state_dict": tensors}, path)
    assert mw.load(path).classes == tuple(theirs)
    torch.save({"meta": {"epoch": 12}, "state_dict": tensors}, path)
    assert mw.load(path).classes == COCO
