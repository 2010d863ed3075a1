"""A run can start with the backbone of another system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import maskwright as mw
from maskwright.data import Scenes
from maskwright.errors import UsageError
from maskwright.systems import System
from maskwright.training.setup import take_backbone
from tests.systems.tiny import build, tiny_options


@pytest.fixture
def giver(tmp_path: Path) -> Path:
    system = build("solov2")
    system.preprocess = replace(system.preprocess, mean=(103.5, 116.3, 123.7), divide=1.0, channels="BGR")
    mw.save(system, tmp_path / "giver.safetensors")
    return tmp_path / "giver.safetensors"


def backbone(system: System) -> nn.Module:
    return system.groups()["backbone"][0]


def test_the_backbone_and_its_normalisation_are_copied_and_nothing_else(giver: Path):
    system, untouched, given = build("detr"), build("detr"), mw.load(giver)
    with torch.no_grad():
        for parameter in backbone(system).parameters():
            parameter.zero_()
    take_backbone(system, giver)
    theirs = backbone(given).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in backbone(system).state_dict().items())
    before = untouched.state_dict()
    others = [k for k in before if ".backbone." not in f".{k}"]
    assert others
    assert all(torch.equal(system.state_dict()[k], before[k]) for k in others)
    assert (system.preprocess.mean, system.preprocess.channels) == (given.preprocess.mean, "BGR")
    assert system.preprocess.short == untouched.preprocess.short


def test_a_different_backbone_is_refused(giver: Path):
    with pytest.raises(
        UsageError, match=r"giver.safetensors: the backbone of this solov2 differs from that of the detr .*stem"
    ):
        take_backbone(build("detr", backbone={"width": 8}), giver)


@pytest.mark.parametrize("system", ["detr", "mask2former"])
def test_a_run_starts_with_it(system: str, giver: Path, tmp_path: Path):
    data = Scenes(4, size=(64, 64), classes=("disc", "box"))
    best = mw.train(
        system, data, val=False, out=tmp_path / "run", backbone_weights=giver, steps=1, batch=2, lr=1e-12, warmup=0,
        workers=0, freeze=("backbone",), tensorboard=False, options=tiny_options(system),
    )  # fmt: skip
    theirs = backbone(mw.load(giver)).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in backbone(mw.load(best)).state_dict().items())
    with pytest.raises(UsageError, match="weights or backbone_weights, not both"):
        mw.train(system, data, val=False, out=tmp_path / "other", backbone_weights=giver, weights=giver, steps=1)
