"""`maskwright track --tracker`: detections of an image system get ids, without prompts and without SAM 2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.cli import main
from maskwright.systems import System
from tests.inference.painted import Painted, paint, save

pytestmark = pytest.mark.fast
SIZE = (32, 64)


def clip(folder: Path, count: int = 6) -> Path:
    """Frames in which object 0 (cat) moves to the right; object 60 (dog) scores less and appears in the third."""
    for frame in range(count):
        numbers = torch.full(SIZE, -1)
        numbers[4:14, 3 * frame : 3 * frame + 12] = 0
        if frame >= 2:
            numbers[18:30, 40:52] = 60
        save(paint(numbers, {60: 1}), folder / f"{frame:05d}.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object, system: System | None = None) -> tuple[int, str]:
        monkeypatch.setattr("maskwright.checkpoints.load", lambda *_, **__: system or Painted())
        code = main(["track", *map(str, arguments), "-w", "painted"])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def records(out: Path) -> list[tuple[int, int, int]]:
    return [(r["image_id"], r["track_id"], r["category_id"]) for r in json.loads((out / "results.json").read_text())]


def test_detections_keep_their_ids_and_classes(tmp_path, run):
    frames, out = clip(tmp_path / "f"), tmp_path / "out"
    code, printed = run(frames, "--tracker", "iou", "-o", out, "--format", "masks", "coco", "drawn")
    assert (code, printed) == (0, f"2 objects in 6 frames: {out}\n")
    assert records(out) == [(f + 1, *object) for f in range(6) for object in ((1, 1), (2, 2))[: 1 + (f >= 2)]]
    listing = json.loads((out / "frames.json").read_text())
    assert [c["name"] for c in listing["categories"]] == ["cat", "dog"]
    assert [image["file_name"] for image in listing["images"]] == [f"{f:05d}" for f in range(6)]
    with Image.open(out / "masks" / "00004.png") as image:
        plane = np.asarray(image)
    assert np.unique(plane[4:14, 12:24]).tolist() == [1]
    assert np.unique(plane[18:30, 40:52]).tolist() == [2]
    assert int((plane > 0).sum()) == 10 * 12 + 12 * 12
    assert len(list((out / "drawn").iterdir())) == 6


def test_frames_classes_and_scores_are_selected(tmp_path, run):
    frames, out = clip(tmp_path / "f"), tmp_path / "out"
    assert run(frames, "--tracker", "iou", "-o", out, "--frame", 1, "--count", 3)[0] == 0
    assert records(out) == [(2, 1, 1), (3, 1, 1), (3, 2, 2), (4, 1, 1), (4, 2, 2)]
    assert run(frames, "--tracker", "iou", "-o", out, "--classes", "dog", "--count", 4)[0] == 0
    assert records(out) == [(3, 1, 2), (4, 1, 2)]
    # Object 60 scores 0.8: it begins no track.
    code, printed = run(frames, "--tracker", "iou", "-o", out, "--score-threshold", 0.9)
    assert (code, printed) == (0, f"1 object in 6 frames: {out}\n")


@pytest.mark.skipif(importlib.util.find_spec("trackers") is None, reason="trackers is not installed (extra `track`)")
@pytest.mark.parametrize("tracker", ["bytetrack", "sort", "ocsort"])
def test_trackers_of_the_library_write_the_same_files(tmp_path, run, tracker):
    frames, out = clip(tmp_path / "f", 8), tmp_path / "out"
    assert run(frames, "--tracker", tracker, "-o", out, "--score-threshold", 0.7)[0] == 0
    late = [(track, category) for image, track, category in records(out) if image >= 7]
    assert sorted(set(late)) == [(1, 1), (2, 2)]
    assert len(list((out / "masks").iterdir())) == 8


def test_what_was_done_before_a_damaged_frame_is_kept(tmp_path, run):
    frames, out = clip(tmp_path / "f"), tmp_path / "out"
    (frames / "00003.png").write_bytes(b"\x89PNG broken")
    code, printed = run(frames, "--tracker", "iou", "-o", out)
    assert code == 1
    assert "the results of 3 frames are kept" in printed
    assert len(json.loads((out / "frames.json").read_text())["images"]) == len(list((out / "masks").iterdir())) == 3


def test_earlier_results_stay_if_nothing_could_be_tracked(tmp_path, run):
    frames, out = clip(tmp_path / "f"), tmp_path / "out"
    assert run(frames, "--tracker", "iou", "-o", out)[0] == 0
    before = records(out)
    assert run(frames, "--tracker", "iou", "-o", out, "--frame", 6)[0] == 2
    (frames / "00000.png").write_bytes(b"\x89PNG broken")
    assert run(frames, "--tracker", "iou", "-o", out)[0] == 2
    assert records(out) == before
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tracker", "iou", "--points", "1,1"), "track requires prompts: "),
        (("--tracker", "iou", "--every", "2"), "--every needs the weights of an image system in --from"),
        (("--tracker", "iou", "--frame", "9"), "has no frame 9; it has 6 frames"),
        (("--tracker", "iou", "--frame", "-1"), "--frame must be at least 0 and --count at least 1, got -1 and None"),
        (("--tracker", "iou", "--score-threshold", "nan"), "score_threshold must be in [0, 1], got nan"),
        (("--tracker", "iou", "--classes", "horse"), "horse"),
        (("--points", "1,1", "--classes", "cat"), "--classes needs an image system"),
        (("--points", "1,1"), "does not track objects in videos; use a system such as sam2, or give ids"),
    ],
)
def test_mistakes_are_sentences(arguments, words, tmp_path, run):
    code, printed = run(clip(tmp_path / "f"), *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert words in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_system_of_boxes_writes_no_maps(tmp_path, run):
    frames, out = clip(tmp_path / "f"), tmp_path / "out"
    code, printed = run(frames, "--tracker", "iou", "-o", out, system=Painted(masks=False))
    assert (code, "painted predicts no masks; choose from --format coco drawn video" in printed) == (2, True)
    arguments = (frames, "--tracker", "iou", "-o", out, "--format", "coco", "drawn")
    assert run(*arguments, system=Painted(masks=False))[0] == 0
    assert [r[1] for r in records(out) if r[0] == 6] == [1, 2]
