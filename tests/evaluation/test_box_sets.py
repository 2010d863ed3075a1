"""Evaluation on data sets whose objects have boxes but no masks."""

from __future__ import annotations

from pathlib import Path

import pytest

import maskwright as mw
from maskwright.data import DataWarning
from tests.data.making import content, write
from tests.systems import tiny


def test_systems_with_masks_are_evaluated_by_their_boxes(tmp_path: Path):
    data = content(2)
    for annotation in data["annotations"]:
        annotation["segmentation"] = []
    path = write(tmp_path, data)
    with pytest.warns(DataWarning, match="boxes, but no masks"):
        result = mw.evaluate(tiny.build("solo", classes=("cup", "spoon")), path, "train", examples=0)
    assert {name.split("/")[0] for name in result.summary} == {"bbox"}
