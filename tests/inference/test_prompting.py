"""Prompts for `predict`: from files, from detections, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskwright as mw
from maskwright.cli import main
from maskwright.data.findings import DataWarning
from maskwright.errors import AnnotationError, UsageError
from maskwright.inference.predicting import predict
from maskwright.inference.prompting import read_detections, read_prompts, written_prompts
from maskwright.structures import Prompts
from tests.systems.tiny import build

SIZE = (60, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and weights of a tiny SAM."""
    path = tmp_path_factory.mktemp("prompts")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(generator.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path / f"{name}.png")
    mw.save(build("sam"), path / "sam.safetensors")
    return path


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def coco(image: int, category: int) -> dict[str, object]:
    """A COCO file with one annotation; image 1 and category 1 are listed."""
    return {
        "images": [{"id": 1, "file_name": "b.png"}], "categories": [{"id": 1, "name": "car"}],
        "annotations": [{"image_id": image, "category_id": category, "bbox": [5, 5, 40, 30]}],
    }  # fmt: skip


def test_there_is_one_object_for_each_prompt(folder):
    system = build("sam").eval()
    image = np.array(Image.open(folder / "a.png"))
    prompts = Prompts.join([Prompts.from_points(SIZE, [(10, 20)]), Prompts.from_boxes([[5.0, 5, 40, 30]], SIZE)])
    found = predict(system, image, prompts=prompts, device="cpu").found()
    batch = system.preprocess.collate([torch.from_numpy(image).permute(2, 0, 1)])
    expected = system.segment(system.embed(batch.images, batch.placements)[0], prompts).best()
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert len(predict(system, image, prompts=Prompts.empty(SIZE), device="cpu").found()) == 0


def test_files_name_the_objects_of_each_image(tmp_path):
    one = {"points": [[10, 20], [30, 40]], "labels": [1, 0], "class": "cat"}
    book = read_prompts(write(tmp_path / "p.json", {"x/a.png": [one, {"box": [1, 2, 50, 40], "score": 0.7}]}))
    assert book.classes == ("cat",)
    asked = book.of(Path("y/a.png"), SIZE)
    assert asked is not None
    assert asked.prompts.point_labels.tolist() == [[1, 0], [-1, -1]]
    assert asked.prompts.has_box.tolist() == [False, True]
    assert asked.labels is not None
    assert asked.scores is not None
    assert asked.labels.tolist() == [0, 0]
    assert asked.scores.tolist() == pytest.approx([1.0, 0.7])
    assert book.of(Path("b.png"), SIZE) is None
    every = read_prompts(write(tmp_path / "q.json", [{"box": [1, 2, 50, 40]}]))
    assert every.classes is None
    assert len(every.of(Path("b.png"), SIZE).prompts) == 1  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("text", "expected a list of objects"),
        ({"a.png": 3}, "expected a list of objects"),
        ([{"x": 1}], "must be a mapping with points or box"),
        ([3], "must be a mapping with points or box"),
        ([{"points": [[200, 3]]}], "outside of the image"),
        ([{"points": "no"}], "points must be lists"),
        ([{"box": [1, 2]}], "boxes must have shape"),
        ([{"box": []}], r"p\.json, a\.png: object 0: box must be 4 numbers, x0, y0, x1 and y1, got \[\]"),
        ([{"box": [1, 2, 3, 4], "score": "x"}], "score must be a number"),
        ([{"points": [], "box": None}], "object 0: has neither points nor a box"),
        ([{"points": [[1, 2, 3]]}], "points must be lists of x, y"),
        ([{"points": [[1, 2]], "labels": [0.5]}], "point_labels must be integers"),
        ([{"box": [1, 2, 3, 4], "class": {"a": 1}}], "the class of an object must be a name"),
    ],
)
def test_files_of_another_form_are_one_sentence(tmp_path, value, words):
    path = write(tmp_path / "p.json", value)
    with pytest.raises(AnnotationError, match=words):
        read_prompts(path).of(Path("a.png"), SIZE)


def test_keys_that_are_not_read_are_mentioned(tmp_path):
    path = write(tmp_path / "p.json", {"a.png": [{"points": [[1, 2]], "label": [0]}]})
    with pytest.warns(DataWarning, match=r"p\.json, a\.png: object 0: label is not read; the keys are points, labels"):
        read_prompts(path).of(Path("a.png"), SIZE)


def test_prompts_of_the_command_line_name_the_image_that_they_do_not_fit():
    book = written_prompts(["60,50"], [])
    assert book.of(Path("x/a.png"), SIZE) is not None
    with pytest.raises(UsageError, match=r"^small\.png: a point of object 0 is outside of the image: 60, 50"):
        book.of(Path("x/small.png"), (20, 30))


def test_detections_become_prompts_with_their_classes_and_scores(tmp_path):
    records = [
        {"image_id": 1, "category_id": 7, "bbox": [5, 5, 40, 30], "score": 0.9},
        {"image_id": 1, "category_id": 3, "bbox": [50, 5, 100, 30], "score": 0.4},
        {"image_id": 1, "category_id": 3, "bbox": [90, 5, 10, 30], "score": 0.4},
    ]
    path = write(tmp_path / "results.json", records)
    about = {
        "images": [{"id": 1, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 7, "name": "bus"}],
    }
    write(tmp_path / "pictures.json", about)
    book = read_detections(path)
    assert book.classes == ("car", "bus")
    asked = book.of(Path("somewhere/b.png"), SIZE)
    assert asked is not None
    assert asked.prompts.boxes is not None
    assert asked.prompts.boxes.tolist() == [[5, 5, 45, 35], [50, 5, 80, 35]]  # the third is outside
    assert asked.labels is not None
    assert asked.labels.tolist() == [1, 0]
    assert book.of(Path("a.png"), SIZE) is None
    annotations = write(tmp_path / "coco.json", {**about, "annotations": records})
    assert read_detections(annotations).classes == ("car", "bus")
    (tmp_path / "pictures.json").unlink()
    assert read_detections(path).classes == ("category 3", "category 7")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"images": []}, "expected COCO results"),
        ([{"image_id": 1}], "expected COCO results"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2]}], "bbox must be 4 numbers"),
        ([{"image_id": [], "category_id": 1, "bbox": [1, 2, 3, 4]}], "expected the id of an image"),
        ([{"image_id": 1, "category_id": None, "bbox": [1, 2, 3, 4]}], "expected the id of a category"),
        (coco(7, 1), "record 0 has the image_id 7, which is not listed"),
        (coco(1, 7), "record 0 has the category_id 7, which is not listed"),
    ],
)
def test_detections_of_another_form_are_one_sentence(tmp_path, value, words):
    with pytest.raises(AnnotationError, match=words):
        read_detections(write(tmp_path / "r.json", value))


def test_prompts_for_other_images_are_mentioned(folder, tmp_path):
    system, one = build("sam").eval(), [{"box": [5, 5, 40, 30]}]
    other = write(tmp_path / "p.json", {"c.png": one, "x/d.png": one})
    with pytest.warns(DataWarning, match=r"prompts for 2 images \(c\.png, x/d\.png\), but for none of those .* a\.png"):
        assert len(predict(system, folder / "a.png", prompts=other, device="cpu").found()) == 0
    images = [folder / "a.png", folder / "b.png"]
    with pytest.warns(DataWarning, match=r"such as b\.png"):
        assert [len(p.found()) for p in predict(system, images, prompts=other, device="cpu")] == [0, 0]
    exact = write(tmp_path / "q.json", {"a.png": one, "x/a.png": one * 2})  # the name itself goes before its end
    assert [len(p.found()) for p in predict(system, images, prompts=exact, device="cpu")] == [1, 0]


def test_points_and_boxes_are_written_on_the_command_line():
    asked = written_prompts(["10,20", "1,2;3,4,0"], ["5,6,50,40"]).of(None, SIZE)
    assert asked is not None
    assert asked.prompts.point_labels.tolist() == [[1, -1], [1, 0], [-1, -1]]
    assert asked.prompts.has_box.tolist() == [False, False, True]
    for points, boxes in ((["10"], []), (["1,2,3"], []), (["a,b"], []), ([], ["1,2,3"])):
        with pytest.raises(UsageError):
            written_prompts(points, boxes)


def test_the_command_writes_the_classes_of_the_detections(folder, tmp_path, capsys):
    records = [{"image_id": 1, "category_id": 3, "bbox": [5, 5, 40, 30], "score": 0.25}]
    detections = write(tmp_path / "results.json", records)
    write(
        tmp_path / "pictures.json",
        {"images": [{"id": 1, "file_name": "b.png"}], "categories": [{"id": 3, "name": "car"}]},
    )
    images = [str(folder / "a.png"), str(folder / "b.png")]
    command = ["predict", *images, "-w", str(folder / "sam.safetensors"), "--device", "cpu", "--format", "coco"]
    assert main([*command, "-o", str(tmp_path / "out"), "--from", str(detections)]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["image_id"], r["category_id"], r["score"]) for r in found] == [(2, 1, 0.25)]
    about = json.loads((tmp_path / "out/pictures.json").read_text())
    assert about["categories"] == [{"id": 1, "name": "car"}]
    assert main([*command, "-o", str(tmp_path / "o"), "--points", "10,20", "--from", str(detections)]) == 2
    assert main([*command, "-o", str(tmp_path / "o"), "--points", "1000,20"]) == 2
    assert main([*command, "-o", str(tmp_path / "o"), "--decoding", "points_per_sides=3"]) == 2
    capsys.readouterr()
    assert main([*command, "-o", str(tmp_path / "o"), "--decoding", "score_threshold=0"]) == 2
    assert "score_threshold=0: score_threshold is an option of the command itself, --score" in capsys.readouterr().err


def test_what_does_not_go_with_prompts_is_refused():
    image, prompts = np.zeros((*SIZE, 3), np.uint8), Prompts.empty(SIZE)
    with pytest.raises(UsageError, match="does not read prompts"):
        predict(build("solo"), image, prompts=prompts)
    with pytest.raises(UsageError, match="omit `tile`"):
        predict(build("sam"), image, prompts=prompts, tile=64)
    with pytest.raises(
        UsageError, match=r"the image is 80 x 50, but the prompts are for images of 80 x 60; call predict"
    ):
        predict(build("sam"), image[:50], prompts=prompts)
    with pytest.raises(UsageError, match="does not apply to prompts"):
        predict(build("sam"), image, prompts=prompts, score_threshold=0.5)
