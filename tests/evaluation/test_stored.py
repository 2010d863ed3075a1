"""A result.json that was damaged or edited is refused with a sentence, never with a traceback."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.errors import DataError, MaskwrightError
from maskwright.evaluation import Result, report
from maskwright.evaluation.confusion import Confusion, ImageScore
from maskwright.evaluation.result import Example, Speed
from maskwright.structures import Instances, Masks


def example() -> Example:
    data = io.BytesIO()
    Image.new("RGB", (30, 20), (90, 120, 150)).save(data, "JPEG")
    planes = torch.zeros(1, 20, 30, dtype=torch.bool)
    planes[0, 2:9, 3:12] = True
    masks = Masks.from_dense(planes).pack()
    objects = Instances((20, 30), masks.boxes(), torch.tensor([1]), masks)
    found = Instances((20, 30), masks.boxes(), torch.tensor([0]), masks, torch.tensor([0.75]))
    score = ImageScore(7, 1, 1, 0, 1, 0, 0, 0.0)
    return Example("worst", score, data.getvalue(), (20, 30), objects, found, "a.jpg")


def make() -> Result:
    measures = {f"{kind}/{name}": 0.5 for kind in ("segm", "bbox") for name in ("AP", "AP50", "AP75", "APs", "AR100")}
    row = {"category_id": 1, "objects": 2, "images": 1, "found": 3, "threshold": 0.5, "F1": None, **measures}
    return Result(
        measures,
        ("cat", "dog"),
        per_class=[{"class": "cat", **row}, {"class": "dog", **row}],
        objects={"all": 4, "s": 1, "m": 1, "l": 2, "crowd": 0},
        curves={"segm/50": [0.5] * 101, "segm/75": [0.25] * 101},
        confusion=Confusion(("cat", "dog"), np.array([[1, 0, 1], [1, 2, 0], [0, 3, 0]]), {(1, 0): [7], (2, 1): ["x"]}),
        images=[ImageScore(7, 1, 1, 0, 1, 0, 0, 0.0), ImageScore("x", 0, 0, 0, 0, 0, 0, None)],
        examples=[example()],
        speed=Speed(milliseconds=5.0, stages={"dense": 3.0}),
        title="A title",
    )


def whole() -> dict[str, Any]:
    return json.loads(json.dumps(make().to_dict()))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*place, key))
    elif isinstance(value, list):
        for number in range(min(2, len(value))):
            yield from places(value[number], (*place, number))


def changed(values: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    inner: Any = values
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return values


VALUES: list[Any] = [None, True, 0, -1, 3, 2.5, float("nan"), float("inf"), 1e300, 10**30, "", "x", "\ud800", [], [1],
                     ["a"], [None], [[1]], {}, {"a": 1}, KeyError]  # fmt: skip


def test_no_change_of_a_value_ends_in_a_traceback(tmp_path: Path):
    values = whole()
    cases = [(place, value) for place in places(values) for value in VALUES]
    said = 0
    for place, value in random.Random(2).sample(cases, 300):
        (tmp_path / "result.json").write_text(json.dumps(changed(values, place, value)))
        try:
            result = Result.load(tmp_path / "result.json")
            str(result)
            report(tmp_path / "result.json", tmp_path / "page.html")
        except MaskwrightError:
            said += 1
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}: {error!r}") from error
    assert said > 150


@pytest.mark.fast
@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("summary",), [], "summary must be an object, got []"),
        (("summary", "segm/AP"), "high", "summary.segm/AP must be a finite number, got 'high'"),
        (("summary", "segm"), 0.5, "summary.segm is not the name of a measure"),
        (("per_class", 1, "objects"), None, "per_class[1].objects must be an integer of 0 or more, got None"),
        (("per_class", 0, "bbox/AP50"), KeyError, "per_class[0].bbox/AP50 is missing"),
        (("objects", "all"), KeyError, "objects.all is missing"),
        (("curves", "segm/50"), [1.0], "curves.segm/50 must have 101 values, got 1"),
        (("confusion", "counts", 0), [1], "confusion.counts must be a matrix of 3 x 3"),
        (("confusion", "images", 0), [5, 0, []], "confusion.images[0] is the cell 5, 0"),
        (("images", 0, "id"), [], "images[0].id must be an integer or a string, got []"),
        (("examples", 0, "image"), "AAAA", "examples[0].image is not an image in base64"),
        (("examples", 0, "size"), [20, 31], "examples[0].image has 20 x 30 pixels, its size is [20, 31]"),
        (("examples", 0, "truth", 0, "category_id"), 9, "category_id must be 1 ... 2, got 9"),
        (("examples", 0, "truth", 0, "segmentation"), "x", "evaluate again"),
        (("protocol", "batch"), "many", "protocol.batch must be an integer or None, got 'many'"),
        (("speed", "stages"), {"dense": []}, "speed.stages.dense must be a finite number, got []"),
        (("missing",), float("nan"), "missing must be an integer of 0 or more, got nan"),
        (("title",), 3, "title must be a string, got 3"),
    ],
)
def test_the_value_is_named(tmp_path: Path, place: tuple[Any, ...], value: Any, words: str):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(changed(whole(), place, value)))
    with pytest.raises(DataError) as caught:
        Result.load(path)
    assert str(caught.value).startswith(f"{path}: written by maskwright ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.fast
def test_what_is_whole_is_read_back_equal(tmp_path: Path):
    make().save(tmp_path / "result.json")
    again = Result.load(tmp_path / "result.json")
    assert json.loads(json.dumps(again.to_dict())) == whole()
    # As versions of before wrote it, which called images pictures.
    old = whole()
    old["pictures"] = old.pop("images")
    old["examples"][0]["picture"] = old["examples"][0].pop("image")
    old["confusion"]["pictures"] = old["confusion"].pop("images")
    old["protocol"]["pictures"] = old["protocol"].pop("images")
    for row in old["per_class"]:
        row["pictures"] = row.pop("images")
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert json.loads(json.dumps(Result.load(tmp_path / "result.json").to_dict())) == whole()


@pytest.mark.fast
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, b'{"format": "maskwright-result"}',
                                     b'{"missing": 1' + b"0" * 5000 + b"}"],
                         ids=["empty", "bytes", "list", "object", "deep", "nothing else", "digits"])  # fmt: skip
def test_files_that_are_no_result(tmp_path: Path, content: bytes):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DataError, match=r"result.json: "):
        report(tmp_path / "result.json", tmp_path / "page.html")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("step,epoch,name,value\n1,0,a,x\n", "line 2 is '1,0,a,x'"),
        ("step,epoch,name,value\n1,0\n", "line 2 is '1,0'"),
        ("step,epoch,name,value\n1,0,a," + "9" * 200_000 + "\n", "line 2: field larger than field limit"),
        ("other\n", "its first line is 'other'"),
        ("", "its first line is ''"),
    ],
    ids=["text", "short", "long", "header", "empty"],
)
def test_a_damaged_log_is_a_sentence(tmp_path: Path, log: str, words: str):
    (tmp_path / "log.csv").write_text(log)
    with pytest.raises(DataError) as caught:
        report(tmp_path)
    assert words in str(caught.value)


@pytest.mark.fast
def test_extreme_numbers_and_names_in_a_run_folder_are_shown(tmp_path: Path):
    lines = ["1,0,train/loss,1e308", "2,0,train/loss,-1e308", "3,0,train/loss,nan", "inf,0,lr,1", "4,0,train/loss,2"]
    (tmp_path / "log.csv").write_text("step,epoch,name,value\n" + "\n".join(lines) + "\n")
    (tmp_path / "recipe.json").write_text('{"augment": {"\\ud800": "\\udc80"}, "epochs": 1' + "0" * 300 + "}")
    page = report(tmp_path).read_text("utf-8")
    assert "\\ud800" in page
    (tmp_path / "recipe.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DataError, match=r"recipe.json: not the JSON of a recipe"):
        report(tmp_path)
