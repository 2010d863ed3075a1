"""Damaged inputs, shared and generated, read in a child process with a memory limit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskwright.data import DataWarning, check, read_coco
from maskwright.errors import AnnotationError
from tests.data.making import OTHER, SHARED, content, shared, write

BROKEN = SHARED / "broken"
CASES = json.loads((BROKEN / "cases.json").read_text("utf-8")) if (BROKEN / "cases.json").exists() else []


def run(names: list[str]) -> list[dict[str, Any]]:
    """The outcome for each file."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("damage.py"))],
        input="\n".join(names),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"died after {len(answers)} of {len(names)} files: {child.stderr[-2000:]}"
    return answers


@cache
def outcomes() -> dict[str, dict[str, Any]]:
    names = [f"{BROKEN / case['file']}|{BROKEN / 'images' if case['file'].endswith('.json') else ''}" for case in CASES]
    return dict(zip((case["file"] for case in CASES), run(names), strict=True))


def test_the_shared_list_is_complete():
    assert len(json.loads((shared("broken") / "cases.json").read_text("utf-8"))) == 69


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["file"])
def test_each_damaged_input_has_the_expected_outcome(case: dict[str, str]):
    outcome = outcomes()[case["file"]]
    name = Path(case["file"]).name
    if case["expect"] == "error":
        assert name in outcome["error"]
        assert "Traceback" not in outcome["error"]
    elif case["expect"] == "skip":
        assert len(outcome["warnings"]) == 1
        assert name in outcome["warnings"][0]
        assert outcome["finite"]
    else:
        assert "error" not in outcome


DETAILS: dict[str, Any] = {
    "images/good.jpg": lambda o: o["shape"] == [3, 163, 160],
    "images/truncated.jpg": lambda o: "truncated" in o["error"],
    "images/html_inside.jpg": lambda o: "not a supported image" in o["error"],
    "images/gray16.png": lambda o: o["values"] > 100 and 40 < o["mean"][0] < 180,
    "images/cmyk.jpg": lambda o: all(abs(a - b) < 12 for a, b in zip(o["mean"], good()["mean"], strict=True)),
    "images/bilevel.png": lambda o: o["values"] == 2 and o["mean"][0] > 20,
    "images/rgba_alpha.png": lambda o: all(abs(a - b) < 3 for a, b in zip(o["mean"], good()["mean"], strict=True)),
    "images/palette_transparent.png": lambda o: all(
        abs(a - b) < 6 for a, b in zip(o["mean"], good()["mean"], strict=True)
    ),
    "images/animated.gif": lambda o: len(o["shape"]) == 3 and "first frame" in o["warnings"][0],
    "images/exif6.jpg": lambda o: o["shape"] == [3, 163, 160] and abs(o["corner"] - good()["corner"]) < 6,
    "images/bomb_60000x60000.png": lambda o: "60000 x 60000" in o["error"],
    "annotations/dangling_image_id.json": lambda o: o["ids"] == [[1]] and "777" in o["warnings"][0],
    "annotations/dangling_category_id.json": lambda o: o["ids"] == [[1]] and "55" in o["warnings"][0],
    "annotations/duplicate_annotation_ids.json": lambda o: o["ids"] == [[1, 1]] and "id 1" in o["warnings"][0],
    "annotations/duplicate_image_ids.json": lambda o: "id 1" in o["error"],
    "annotations/polygon_negative.json": lambda o: o["areas"][0][1] == 3600,
    "annotations/polygon_bow_tie.json": lambda o: len(o["ids"][0]) == 2 and o["areas"][0][1] > 1000,
    "annotations/polygon_flat_list.json": lambda o: len(o["ids"][0]) == 2,
    "annotations/bbox_area_missing.json": lambda o: close(o["boxes"], reference()["boxes"]),
    "annotations/bbox_wrong.json": lambda o: close(o["boxes"], reference()["boxes"]) and "bbox" in o["warnings"][0],
    "annotations/annotations_empty.json": lambda o: o["ids"] == [[]],
    "annotations/annotations_key_missing.json": lambda o: "'annotations'" in o["error"],
    "annotations/categories_key_missing.json": lambda o: "'categories'" in o["error"],
    "annotations/images_key_missing.json": lambda o: "'images'" in o["error"],
    "annotations/wrong_types.json": lambda o: o["ids"] == [[1]],
    "annotations/nulls.json": lambda o: o["ids"] == [[1]] and close(o["boxes"][0][:1], reference()["boxes"][0][:1]),
    "annotations/root_is_list.json": lambda o: "contains COCO results, not a data set" in o["error"],
    "annotations/truncated.json": lambda o: "line 1, column 401" in o["error"],
    "annotations/huge_ids.json": lambda o: o["images"] == [2**63] and o["ids"] == [[10**18 + 7, 10**18 + 8]],
    "annotations/path_traversal.json": lambda o: all(
        n in o["error"] for n in ("etc/passwd", "/etc/hostname", "secret.jpg")
    ),
    "annotations/categories_not_contiguous.json": lambda o: o["categories"] == [3, 90, 1000],
    "annotations/category_zero.json": lambda o: o["categories"] == [0, 1],
    "annotations/category_duplicate_names.json": lambda o: len(set(o["classes"])) == 2,
    "annotations/category_duplicate_ids.json": lambda o: "category id 1" in o["error"],
    "annotations/image_file_missing.json": lambda o: "1 of 2 images" in o["error"] and "not_there.jpg" in o["error"],
    "annotations/image_size_wrong.json": lambda o: "good.jpg is 160 x 163" in o["error"],
    "annotations/crowd_polygon.json": lambda o: o["crowd"] == [[False, True]],
    "annotations/exif_displayed.json": lambda o: o["areas"] == reference()["areas"],
    "annotations/odd_modes.json": lambda o: o["areas"] == reference()["areas"] * 8,
    "annotations/mixed_good_and_bad.json": lambda o: (
        o["images"] == [1, 4] and all(n in o["warnings"][0] for n in ("truncated.jpg", "zero_byte.jpg"))
    ),
}


@pytest.mark.parametrize("name", DETAILS if CASES else [])
def test_details_of_the_outcome(name: str):
    assert DETAILS[name](outcomes()[name]), outcomes()[name]


REPAIRED = ("duplicate_annotation_ids", "polygon_flat_list")  # nothing is skipped in these


@pytest.mark.parametrize("case", [c for c in CASES if c["expect"] == "skip"], ids=lambda c: c["file"])
def test_strict_mode_raises_for_what_is_otherwise_skipped(case: dict[str, str]):
    path = BROKEN / case["file"]
    if path.stem in REPAIRED:
        with pytest.warns(DataWarning):
            assert len(read_coco(path, BROKEN / "images", strict=True))
        return
    with pytest.raises(AnnotationError, match=path.name):
        read_coco(path, BROKEN / "images", strict=True)


@pytest.mark.parametrize("case", [c for c in CASES if c["file"].endswith(".json")], ids=lambda c: c["file"])
def test_a_repaired_copy_has_no_errors_and_contains_what_could_be_read(case: dict[str, str], tmp_path: Path):
    report = check(BROKEN / case["file"], tmp_path / "copy", images=BROKEN / "images")
    if report.fixed is None:
        assert report.errors
        assert not (tmp_path / "copy").exists()
        assert "nothing could be repaired" in str(report)
        return
    again = check(report.fixed)
    assert not [f for f in again.errors if f.kind != "nothing"], str(again)  # what is left may have no object
    assert again.ok == report.usable
    assert not again.skips, str(again)
    if report.ok:
        outcome = outcomes()[case["file"]]
        copy = read_coco(next((report.fixed / "annotations").iterdir()), strict=True)
        assert copy.image_ids() == outcome["images"]
        masks = [copy.targets(i).masks for i in range(len(copy))]
        assert [m.areas().tolist() for m in masks if m is not None] == outcome["areas"]
        assert close([copy.targets(i).boxes.tolist() for i in range(len(copy))], outcome["boxes"])


def test_inputs_that_crash_the_rasterizer_never_reach_it(tmp_path: Path):
    text = coco_mask.encode(np.ones((40, 60), "uint8", order="F"))["counts"].decode()
    deadly = [
        [[*OTHER[:4], math.nan, *OTHER[5:]]],
        [[*OTHER[:4], math.inf, *OTHER[5:]]],
        [[*OTHER[:4], 1e18, *OTHER[5:]]],
        [[1e9, 1e9, -1e9, 1e9, 1e9, -1e9]],
        {"size": [40, 60], "counts": [100, 50]},
        {"size": [40, 60], "counts": [2**62] * 4 + [2400]},
        {"size": [40, 60], "counts": text + "o" * 50},
        {"size": [40, 60], "counts": "P" * 200},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": [-40, -60], "counts": [2400]},
        [],
        [[]],
        [[[]]],
        {},
    ]
    names = []
    for number, segmentation in enumerate(deadly):
        data = content()
        data["annotations"][1]["segmentation"] = segmentation
        names.append(str(write(tmp_path / str(number), data)))
    for segmentation, outcome in zip(deadly, run(names), strict=True):
        assert outcome["ids"] == [[1]], segmentation
        assert len(outcome["warnings"]) == 1
        assert "annotation 2" in outcome["warnings"][0]


def close(a: Any, b: Any) -> bool:
    """Whether nested lists of numbers differ by at most one pixel."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return abs(a - b) <= 1


def good() -> dict[str, Any]:
    return outcomes()["images/good.jpg"]


def reference() -> dict[str, Any]:
    return outcomes()["annotations/good.json"]
