"""A run may begin with the trunk of another system."""

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
from maskwright.training.setup import take_trunk
from tests.systems.tiny import TINY, build


@pytest.fixture
def giver(tmp_path: Path) -> Path:
    system = build("solov2")
    system.preprocess = replace(system.preprocess, mean=(103.5, 116.3, 123.7), divide=1.0, channels="BGR")
    mw.save(system, tmp_path / "giver.safetensors")
    return tmp_path / "giver.safetensors"


def backbone_of(system: System) -> nn.Module:
    return system.groups()["backbone"][0]


def test_the_trunk_comes_with_what_it_knows_of_images_and_nothing_else_does(giver: Path):
    system, untouched, given = build("detr"), build("detr"), mw.load(giver)
    with torch.no_grad():
        for parameter in backbone_of(system).parameters():
            parameter.zero_()
    take_trunk(system, giver)
    theirs = backbone_of(given).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in backbone_of(system).state_dict().items())
    before = untouched.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items() if "backbone." not in k)
    assert (system.preprocess.mean, system.preprocess.channels) == (given.preprocess.mean, "BGR")
    assert system.preprocess.short == untouched.preprocess.short


def test_another_network_is_refused_by_name(giver: Path):
    with pytest.raises(
        UsageError, match=r"giver.safetensors: the trunk of this solov2 is another .* of the detr .*stem"
    ):
        take_trunk(build("detr", backbone={"width": 8}), giver)


@pytest.mark.parametrize("system", ["detr", "mask2former"])
def test_a_run_begins_with_it(system: str, giver: Path, tmp_path: Path):
    data = Scenes(4, size=(64, 64), classes=("disc", "box"))
    best = mw.train(
        system, data, val=False, out=tmp_path / "run", trunk=giver, steps=1, batch=2, lr=1e-12, warmup=0, workers=0,
        freeze=("backbone",), tensorboard=False, options=TINY[system],
    )  # fmt: skip
    theirs = backbone_of(mw.load(giver)).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in backbone_of(mw.load(best)).state_dict().items())
    with pytest.raises(UsageError, match="weights or trunk, not both"):
        mw.train(system, data, val=False, out=tmp_path / "other", trunk=giver, weights=giver, steps=1)
