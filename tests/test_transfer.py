"""The benchmark of what weights that ship are worth: its table, and the compute of the control."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def transfer():
    spec = importlib.util.spec_from_file_location("transfer", ROOT / "benchmarks/transfer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["transfer"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_has_means_standard_errors_and_differences_of_pairs(transfer, tmp_path):
    rows = [("scenes", 0, 30.0), ("scenes", 1, 32.0), ("random", 0, 20.0), ("random", 1, 24.0), ("total", 1, 31.0)]
    for arm, seed, ap in rows:
        row = {"data": "nuclei", "arm": arm, "steps": 300, "seed": seed, "segm/AP": ap}
        (tmp_path / f"nuclei-{arm}-300-{seed}.json").write_text(json.dumps(row))
    row = {"data": "balloons", "arm": "scenes", "steps": 1200, "seed": 0, "segm/AP": 5.0}
    (tmp_path / "balloons-scenes-1200-0.json").write_text(json.dumps(row))
    head, rule, *body = transfer.table(tmp_path).splitlines()
    assert head == "| data | steps | scenes | random | total | scenes - random | scenes - total |"
    assert body == [
        "| balloons | 1200 | 5.0 |  |  |  |  |",
        "| nuclei | 300 | 31.0 ± 1.0 | 22.0 ± 2.0 | 31.0 | +9.0 ± 1.0 | +1.0 |",
    ]
    assert rule.count("--:") == 6


def test_the_control_has_the_input_pixels_of_the_pretraining(transfer):
    about = {
        "source": {"command": "benchmarks/pretraining.py mask-rcnn --steps 100 --seed 0"},
        "preprocess": {"fit": "short", "short": 320, "long": 512, "multiple": 32},
    }
    recipe = transfer.RECIPES["mask-rcnn"]
    assert transfer._pixels(about) == 100 * recipe.changes["batch"] * 320 * 320
    assert transfer._pixels({**about, "source": {"command": "by hand"}}) is None
    assert transfer._pixels({**about, "source": {}}) is None
