"""Options of another kind, and misspelt words, are told in one sentence by every system."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from maskwright.cli import main
from maskwright.data import Scenes
from maskwright.errors import RenamedOptionWarning, UsageError
from maskwright.options import resolve
from maskwright.systems import create, describe, names, system_class
from maskwright.systems.system import COMMON_RENAMES

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        (
            "mask-rcnn",
            {"pooling": "aline"},
            "mask-rcnn: pooling must be one of 'align', .*got 'aline'; did you mean 'align'",
        ),
        ("solo", {"neck_width": "abc"}, "solo: neck_width must be an integer, got 'abc'"),
        ("solo", {"align": "pol"}, "did you mean 'pool'"),
        ("mask-rcnn", {"proposals": {"anchor_sizes": 32}}, "proposals.anchor_sizes must be a list of numbers, got 32"),
        ("solo", {"cells": {"ranges": [1, 2]}}, "cells.ranges must be a list of lists of numbers"),
        ("detr", {"transformer": {"queries": True}}, "transformer.queries must be an integer, got True"),
        ("detr", {"cost": {"box_weight": "x"}}, "cost.box_weight must be a number, got 'x'"),
        ("mask-rcnn", {"backbone": {"frozen": 1.5}}, "backbone.frozen must be an integer, got 1.5"),
        ("embedmask", {"mask_convs": 1.5}, "mask_convs must be an integer or None, got 1.5"),
        ("embedmask", {"generation": 4}, "generation must be one of 1, 2, 3, got 4"),
        ("yolact", {"classes": "cat"}, "classes must be a list of strings, got 'cat'"),
    ],
)
def test_an_option_of_another_kind_is_told_in_a_sentence(system: str, options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        create(system, **options)


@pytest.mark.parametrize("name", names())
def test_presets_and_defaults_are_of_the_kinds_that_are_announced(name: str):
    kind = system_class(name)
    hints = get_type_hints(kind.__init__)
    for preset in kind.presets.values():
        assert set(preset.options) <= set(hints)
        resolve(kind.__init__, preset.options, name)


@pytest.mark.parametrize("name", names())
def test_names_of_earlier_versions_are_accepted_with_a_warning(name: str):
    kind = system_class(name)
    today = inspect.signature(kind.__init__).parameters
    earlier = {old: new for old, new in {**COMMON_RENAMES, **kind.renamed_options}.items() if new and old not in today}
    for old, new in earlier.items():
        group, _, field = new.partition(".")
        if group not in today:
            continue
        with pytest.warns(RenamedOptionWarning, match=f"{name}: option '{old}' is now {new}"):
            options = kind.with_options({group: {field: 1, "other": 2}} if field else {}, {old: 3})
        assert options == {group: {field: 3, "other": 2} if field else 3}
        with pytest.raises(UsageError, match=f"{name} has no option '{old}': it is now {new}"):
            kind(**{old: 3})


@pytest.mark.thorough
def test_a_flat_option_beside_its_group_replaces_one_field_alone():
    with pytest.warns(RenamedOptionWarning):
        system = create("solov2", resize={"short": 64, "long": 96}, short=128, stem_width=8, backbone="resnet18")
    assert (system.options["resize"]["short"], system.options["resize"]["long"]) == (128, 96)
    assert (system.options["backbone"]["name"], system.options["backbone"]["width"]) == ("resnet18", 8)


def test_the_command_line_accepts_names_of_earlier_versions_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given: dict[str, Any] = {}

    def stops(name: str, **options: Any) -> None:
        given.update(system_class(name).with_options({}, options))
        raise UsageError("far enough")

    monkeypatch.setattr("maskwright.training.setup.describe", stops)
    data = tmp_path / "scenes"
    Scenes(2, (32, 32), classes=("disc",)).write(data, "train")
    assert main(["train", "solov2", "--data", str(data), "--out", str(tmp_path / "run"), "--option", "short=64"]) == 2
    assert given == {"resize": {"short": 64}}
    said = capsys.readouterr().err
    assert "note: solov2: option 'short' is now resize.short" in said
    assert "maskwright: far enough" in said


def test_whole_numbers_are_numbers():
    options = {"backbone": {"norm_eps": 0}, "proposals": {"anchor_sizes": [1, 2.5]}, "boxes": {"beta": None}}
    resolve(system_class("mask-rcnn").__init__, options, "mask-rcnn")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("solov2", {"neck_width": -1}, "solov2: neck_width must be at least 1, got -1"),
        ("solov2", {"neck_width": 0}, "solov2: neck_width must be at least 1, got 0"),
        ("mask-rcnn", {"neck_width": 10**9}, "mask-rcnn: neck_width must be at most 1048576, got 1000000000"),
        ("mask-rcnn", {"in_channels": 10**9}, "mask-rcnn: in_channels must be at most 1048576"),
        ("mask-rcnn", {"backbone": {"groups": 0}}, "groups must be at least 1, got 0"),
        ("mask-rcnn", {"backbone": {"frozen": -1}}, "frozen must be at least 0, got -1"),
        ("yolact", {"prototypes": -3}, "yolact: prototypes must be at least 1, got -3"),
        ("solov2", {"cells": {"grids": [40, 36, 24, 0, 12]}}, "solov2: cells.grids must be at least 1, got [40"),
    ],
)
def test_integers_that_no_network_can_have_are_sentences(name: str, options: dict[str, Any], says: str):
    with pytest.raises(UsageError) as caught:
        describe(name, **options)
    assert says in str(caught.value)
    with pytest.raises(UsageError):
        create(name, classes=("a",), **options)


def test_options_that_exclude_one_another_are_named(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("num_channels must be divisible by num_groups")

    monkeypatch.setattr(system_class("solov2"), "rebuild", fails)
    with pytest.raises(UsageError, match=r"solov2 cannot be built with neck_width=7 \(ValueError: num_channels must"):
        describe("solov2", neck_width=7)
    with pytest.raises(ValueError, match="num_channels"):  # without options of the caller, it is an error of ours
        describe("solov2")
