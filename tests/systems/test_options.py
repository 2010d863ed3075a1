"""Options of another kind, and misspelt words, are told in one sentence by every system."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from maskwright.errors import UsageError
from maskwright.options import resolve
from maskwright.systems import create, names, system_class

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


def test_whole_numbers_are_numbers():
    options = {"backbone": {"norm_eps": 0}, "proposals": {"anchor_sizes": [1, 2.5]}, "boxes": {"beta": None}}
    resolve(system_class("mask-rcnn").__init__, options, "mask-rcnn")
