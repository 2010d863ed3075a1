"""Options of another kind, and misspelt words, are told in one sentence by every system."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from maskwright.errors import UsageError
from maskwright.systems import create, names, system_class
from maskwright.systems.options import check_options

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("mask-rcnn", {"pooling": "aline"}, "mask-rcnn: pooling is 'align' or .*, not 'aline'; did you mean 'align'"),
        ("solo", {"neck_width": "abc"}, "solo: neck_width is a whole number, not 'abc'"),
        ("solo", {"align": "pol"}, "did you mean 'pool'"),
        ("mask-rcnn", {"anchor_sizes": 32}, "anchor_sizes is a list of numbers, not 32"),
        ("solo", {"ranges": [1, 2]}, "ranges is a list of lists of numbers"),
        ("detr", {"queries": True}, "queries is a whole number, not True"),
        ("detr", {"cost": [1, "x", 2]}, "cost is a list of numbers"),
        ("mask-rcnn", {"pretrained": 1}, "pretrained is true or false, not 1"),
        ("embedmask", {"mask_convs": 1.5}, "mask_convs is a whole number or none, not 1.5"),
        ("embedmask", {"generation": 4}, "generation is 1 or 2 or 3, not 4"),
        ("yolact", {"classes": "cat"}, "classes is a list of words, not 'cat'"),
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
        check_options(kind, preset.options)


def test_whole_numbers_are_numbers():
    check_options(system_class("mask-rcnn"), {"norm_eps": 0, "anchor_sizes": [1, 2.5], "box_beta": None})
