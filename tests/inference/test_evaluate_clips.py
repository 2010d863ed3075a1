"""Evaluation of clips: tracks of an image system, and of results files and folders of maps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.cli import main
from maskwright.data import Clip, Clips, DataWarning, MovingScenes, Scenes, write_davis, write_youtube_vis
from maskwright.data.davis import write_map
from maskwright.data.youtube_vis import ListedClip
from maskwright.errors import AnnotationError, DataError, UsageError
from maskwright.evaluation import ClipEvaluator, ClipResult
from maskwright.evaluation.track_results import read_tracks, track_records, video_listing
from maskwright.inference.evaluating_clips import evaluate_clips, evaluate_tracks, open_clips
from maskwright.inference.tracking import track_objects
from maskwright.structures import Instances, Masks
from tests.evaluation.tracked import objects
from tests.inference.painted import Painted, save

pytestmark = pytest.mark.fast
CLASSES = ("cat", "dog")
SIZE = (32, 64)


def painted(target: Instances) -> torch.Tensor:
    image = torch.zeros(3, *target.image_size, dtype=torch.uint8)
    for row, plane in enumerate(target.masks.dense()):
        image[0][plane], image[1][plane], image[2][plane] = row + 1, int(target.labels[row]), 255
    return image


class PaintedClip(Clip):
    """Two squares: a cat that walks to the right, and a dog that is hidden in frame 2."""

    def __init__(self, name: str, annotated: tuple[int, ...] = (0, 1, 2, 3)):
        super().__init__(name, int(name[-1]), SIZE, 4, annotated)

    def target(self, frame: int) -> Instances:
        squares = [(4 + 3 * frame, 4, 16 + 3 * frame, 14), (40, 16, 52, 28)]
        kept = 1 if frame == 2 else 2
        return objects(SIZE, squares[:kept], [11, 5][:kept], [0, 1][:kept], crowd=[False] * kept)

    def image(self, frame: int) -> torch.Tensor:
        return painted(self.target(frame))


@pytest.fixture
def clips() -> Clips:
    return Clips([PaintedClip("a1"), PaintedClip("b2")], CLASSES, (4, 9), "walks")


PERFECT = {"J&F": 1, "HOTA": 1, "MOTA": 1, "IDF1": 1, "IDSW": 0, "FP": 0, "FN": 0, "AP": 1}


def summary(result: ClipResult) -> dict[str, float]:
    return {name: result[name] for name in PERFECT}


# ---- systems -----------------------------------------------------------------------------------------------------


def test_a_perfect_system_has_perfect_tracks_and_stability(clips: Clips, tmp_path: Path):
    result = evaluate_clips(Painted(("dog", "cat", "cow")[:2][::-1]), clips, out=tmp_path)
    assert summary(result) == pytest.approx(PERFECT)
    assert result["stability/aligned IoU"] == 1
    assert result["stability/annotated aligned IoU"] == 1
    assert result["stability/IoU"] == pytest.approx((3 * 9 / 15 + 1) / 4)
    assert result["stability/flicker"] == 0
    assert result["stability/score change"] == pytest.approx(0, abs=0.2)
    assert [row["class"] for row in result.per_class] == ["cat", "dog"]
    assert [(row["clip"], row["frames"], row["tracks"]) for row in result.per_clip] == [("a1", 4, 2), ("b2", 4, 2)]
    assert "tracker: mask IoU" in str(result.protocol)
    # The tracks that were written give the same figures.
    again = evaluate_tracks(tmp_path / "tracked.json", clips)
    assert summary(again) == pytest.approx(PERFECT)
    records = json.loads((tmp_path / "tracked.json").read_text())
    assert {record["video_id"] for record in records} == {1, 2}
    assert {record["category_id"] for record in records} == {4, 9}
    assert all(len(record["segmentations"]) == 4 for record in records)


def test_classes_do_not_count_where_there_are_none(clips: Clips):
    renamed = Clips(clips.clips, ("object", "other"), name="walks", classless=True)
    result = evaluate_clips(Painted(("horse", "cow")), renamed)
    assert result["HOTA"] == 1
    assert [row["tracks"] for row in result.per_class] == [4, 0]


def test_clips_without_annotations_are_measured_for_stability():
    bare = Clips([PaintedClip("a1", ())], CLASSES)
    result = evaluate_clips(Painted(CLASSES), bare)
    assert set(result.summary) == {
        f"stability/not annotated, {n}" for n in ("IoU", "aligned IoU", "flicker", "score change")
    }
    # The dog disappears and appears again.
    assert result["stability/not annotated, flicker"] == pytest.approx(2 / 6)
    assert "not annotated, flicker" in str(result)


def test_annotated_frames_only_are_compared():
    some = Clips([PaintedClip("a1", (0, 3))], CLASSES)
    result = evaluate_clips(Painted(CLASSES), some)
    assert summary(result) == pytest.approx(PERFECT)
    assert "2 annotated frames" in str(result.protocol)


def test_an_unreadable_frame_is_one_without_objects(tmp_path: Path):
    write_davis(Clips([PaintedClip("a1")], CLASSES), tmp_path)
    (tmp_path / "JPEGImages" / "480p" / "a1" / "00001.png").write_bytes(b"\x89PNG broken")
    with pytest.warns(DataWarning, match="counted as a frame without objects"):
        result = evaluate_clips(Painted(CLASSES), tmp_path)
    assert result["FN"] == 2


def test_mistakes_are_named(clips: Clips, tmp_path: Path):
    with pytest.raises(UsageError, match="has images, not clips"):
        evaluate_clips(Painted(CLASSES), Scenes(2))
    with pytest.raises(UsageError, match="predicts no masks"):
        evaluate_clips(Painted(CLASSES, masks=False), clips)
    with pytest.raises(UsageError, match="one of iou"):
        evaluate_clips(Painted(CLASSES), clips, tracker="best")
    with pytest.raises(UsageError, match="no class of the system"):
        evaluate_clips(Painted(("horse", "cow")), clips)
    with pytest.raises(UsageError, match="stability_threshold must be in"):
        evaluate_clips(Painted(CLASSES), clips, stability_threshold=2)
    with pytest.raises(UsageError, match="limit must be at least 1"):
        evaluate_clips(Painted(CLASSES), clips, limit=0)
    with pytest.raises(UsageError, match="the data set has no clips"):
        evaluate_clips(Painted(CLASSES), Clips([], CLASSES))
    with pytest.raises(UsageError, match="no option 'speed'"):
        evaluate_clips(Painted(CLASSES), clips, out=tmp_path, speed=3)
    assert not list(tmp_path.iterdir())


def test_frames_are_tracked_one_at_a_time():
    clip = PaintedClip("a1")
    asked: list[int] = []

    def live():
        for frame in range(4):
            asked.append(frame)
            yield clip.image(frame)

    stream = track_objects(Painted(CLASSES), live(), workers=1)
    first = next(stream)
    assert first.instances.ids.tolist() == [1, 2]
    assert len(asked) <= 4
    assert [prediction.instances.ids.tolist() for prediction in stream] == [[1, 2], [1], [1, 2]]


def test_a_frame_that_cannot_be_read_is_reported_and_ids_go_on(tmp_path: Path):
    for frame in range(3):
        save(PaintedClip("a1").image(frame), tmp_path / f"{frame}.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG broken")
    found = list(track_objects(Painted(CLASSES), tmp_path))
    assert found[1].error is not None
    assert [found[0].instances.ids.tolist(), found[2].instances.ids.tolist()] == [[1, 2], [1]]


# ---- the evaluator -----------------------------------------------------------------------------------------------


def test_objects_that_do_not_fit_a_clip_are_refused(clips: Clips):
    evaluator = ClipEvaluator(clips)
    frames = [clips.clips[0].target(t) for t in range(4)]
    with pytest.raises(UsageError, match="has no clip 'c3'"):
        evaluator.add("c3", frames)
    with pytest.raises(UsageError, match="has 4 frames, got objects of 3"):
        evaluator.add("a1", frames[:3])
    with pytest.raises(UsageError, match=r"frame 3: the objects are on a grid of \(8, 8\)"):
        evaluator.add("a1", [*frames[:3], objects((8, 8), [], [])])
    bare = Instances(SIZE, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), ids=torch.tensor([1]))
    with pytest.raises(UsageError, match="frame 0: an object has the label 2, but the data set has 2 classes"):
        evaluator.add("b2", [replace(one, labels=one.labels + 1) for one in frames])
    with pytest.raises(UsageError, match="frame 3: the objects have no masks"):
        evaluator.add("a1", [*frames[:3], bare])
    evaluator.add("a1", frames)
    with pytest.raises(UsageError, match="'a1' was added twice"):
        evaluator.add("a1", frames)
    result = evaluator.result()
    assert result.missing == ("b2",)
    assert result["FN"] == 7
    assert result["HOTA"] < 1
    assert "1 clips had no predictions: b2" in str(result)


def test_void_pixels_count_neither_for_nor_against_an_object():
    class WithVoid(PaintedClip):
        def void(self, frame: int) -> Masks | None:
            return objects(SIZE, [(0, 0, 64, 3)], [1]).masks

    clips = Clips([WithVoid("a1")], CLASSES)
    frames = [clips.clips[0].target(t) for t in range(4)]
    for frame in frames:
        planes = frame.masks.dense()
        planes[0, :3] = True
        frame.masks = Masks.from_dense(planes)
    extra = [Instances.join([frame, objects(SIZE, [(0, 0, 9, 3)], [77], crowd=[False])]) for frame in frames]
    evaluator = ClipEvaluator(clips)
    evaluator.add("a1", extra)
    assert summary(evaluator.result()) == pytest.approx(PERFECT)


def test_a_result_is_saved_and_read(clips: Clips, tmp_path: Path):
    result = evaluate_clips(Painted(CLASSES), clips)
    read = ClipResult.load(result.save(tmp_path / "result.json"))
    assert read == result
    assert str(read) == str(result)
    for content, message in (
        ("[]", "has no"), ("{", "not JSON"), ('{"format": "maskwright-clip-result"}', "is damaged"),
        ('{"format": "maskwright-clip-result", "summary": {"AP": "x"}}', "is damaged"),
    ):  # fmt: skip
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(DataError, match=message):
            ClipResult.load(tmp_path / "result.json")


# ---- results -----------------------------------------------------------------------------------------------------


@pytest.fixture
def records(clips: Clips) -> list[dict[str, Any]]:
    return [
        record for clip in clips.clips
        for record in track_records(clip, [clip.target(t) for t in range(4)], clips.category_ids)
    ]  # fmt: skip


def test_a_results_file_without_names_is_matched_by_ids(clips: Clips, records: list[dict[str, Any]], tmp_path: Path):
    path = tmp_path / "results.json"
    for record in records:
        del record["track_id"], record["score"]
    path.write_text(json.dumps(records))
    assert summary(evaluate_tracks(path, clips)) == pytest.approx(PERFECT)
    assert evaluate_tracks(path, clips, limit=1).per_clip[0]["clip"] == "a1"


def test_clips_and_classes_are_matched_by_name_where_they_are_listed(
    clips: Clips, records: list[dict[str, Any]], tmp_path: Path
):
    numbers = {1: 70, 2: 60}
    listing = video_listing(clips)
    for video in listing["videos"]:
        video["id"] = numbers[video["id"]]
    listing["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}]
    for record in records:
        record["video_id"], record["category_id"] = numbers[record["video_id"]], {4: 2, 9: 1}[record["category_id"]]
    (tmp_path / "results.json").write_text(json.dumps(records))
    with pytest.raises(AnnotationError, match="record 0 is of the video 70, which the data set does not have"):
        evaluate_tracks(tmp_path / "results.json", clips)
    (tmp_path / "videos.json").write_text(json.dumps(listing))
    assert summary(evaluate_tracks(tmp_path / "results.json", clips)) == pytest.approx(PERFECT)
    records[0]["category_id"] = 3
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert evaluate_tracks(tmp_path / "results.json", clips)["FN"] == 4


def test_an_annotation_file_is_a_results_file(clips: Clips, tmp_path: Path):
    path = write_youtube_vis(clips, tmp_path / "set.json")
    assert summary(evaluate_tracks(path, clips)) == pytest.approx(PERFECT)
    assert summary(evaluate_tracks(path, path)) == pytest.approx(PERFECT)


def test_a_folder_of_maps_is_read(clips: Clips, tmp_path: Path):
    write_davis(clips, tmp_path / "data")
    davis = tmp_path / "data"
    for name in ("a1", "b2"):
        for frame in range(4):
            write_map(tmp_path / "found" / name / f"{frame:05d}.png", clips.clip(name).target(frame))
    for semi_supervised in (False, True):
        result = evaluate_tracks(tmp_path / "found", davis, semi_supervised=semi_supervised)
        assert result["J&F"] == result["HOTA"] == 1
    (tmp_path / "found" / "a1" / "00001.png").unlink()
    result = evaluate_tracks(tmp_path / "found", davis, semi_supervised=True)
    assert result["J"] == pytest.approx(6 / 8)
    with pytest.raises(AnnotationError, match="has no folder for a clip of data val; expected folders such as a1"):
        evaluate_tracks(tmp_path / "data", davis)
    for name in ("a1", "b2"):  # 16 bits, in the folders that `track -o CLIP` makes, and nothing found in b2
        for frame in range(4):
            path = tmp_path / "tracked" / name / "masks" / f"{frame:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = np.asarray(Image.open(tmp_path / "found" / "b2" / f"{frame:05d}.png"))
            plane = np.where(ids > 0, ids.astype(np.uint16) + 254, 0).astype(np.uint16) * (name == "a1")
            Image.fromarray(plane).save(path)
    found = read_tracks(tmp_path / "tracked", open_clips(davis))
    assert sorted({int(i) for objects in found["a1"] for i in objects.ids})[0] >= 255
    assert [len(objects) for objects in found["b2"]] == [0] * 4
    assert evaluate_tracks(tmp_path / "tracked", davis)["HOTA"] < 1
    (tmp_path / "other" / "a1").mkdir(parents=True)
    Image.new("P", (64, 32)).save(tmp_path / "other" / "a1" / "frame-1.png")
    with pytest.raises(AnnotationError, match=r"none of its files, such as frame-1\.png, is the map of a frame"):
        evaluate_tracks(tmp_path / "other", davis)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 3}, "record 0 is of the video 3, which the data set does not have; its videos are 1, 2"),
        ({"category_id": "x"}, "record 0 has the category 'x'; expected an integer"),
        ({"score": "high"}, "record 0: score must be a finite number"),
        ({"segmentations": [None]}, "record 0 has 1 segmentations for 4 frames"),
        ({"segmentations": [None, None, None, {"size": [2, 2], "counts": "4"}]}, "record 0, frame 3"),
        ({"track_id": 5}, "two tracks of the clip a1 have the track_id 5"),
    ],
)
def test_mistakes_in_results_are_named(
    change: dict[str, Any], message: str, clips: Clips, records: list[dict[str, Any]], tmp_path: Path
):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**records[0], **change}, *records[1:]]))
    with pytest.raises(AnnotationError, match=message) as caught:
        read_tracks(path, clips)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[3]", "record 0 is 3"),
        ("3", "contains a int"),
        ("{", "is not JSON"),
        ("{}", "no lists videos and annotations"),
    ],
)
def test_other_files_are_no_results(content: str, message: str, clips: Clips, tmp_path: Path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(AnnotationError, match=message):
        read_tracks(tmp_path / "results.json", clips)
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_tracks(tmp_path / "absent.json", clips)


# ---- the command line --------------------------------------------------------------------------------------------


def test_results_are_evaluated_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    clips = MovingScenes(2, frames=3, size=(32, 48), seed=1_000_003)
    records = [
        r for clip in clips.clips
        for r in track_records(clip, [clip.target(t) for t in range(3)], clips.category_ids)
    ]  # fmt: skip
    (tmp_path / "tracked.json").write_text(json.dumps(records))
    data = "clips:frames=3,size=32x48,val=2"
    out = tmp_path / "out"
    assert main(["evaluate", "--results", str(tmp_path / "tracked.json"), "--data", data, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "HOTA" in shown
    assert "tracks of tracked.json" in shown
    assert ClipResult.load(out / "result.json")["HOTA"] == 1
    assert main(["evaluate", "--data", data]) == 2
    assert "requires either WEIGHTS" in capsys.readouterr().err
    assert main(["evaluate", "--results", str(tmp_path / "tracked.json"), "--data", "scenes"]) == 2
    assert "has images, not clips" in capsys.readouterr().err


def test_listed_clips_have_targets_and_no_images():
    clip = ListedClip("a", 1, SIZE, [objects(SIZE, [], [])], 1)
    assert clip.annotated == (0,)
    assert len(clip.target(0)) == 0
    with pytest.raises(NotImplementedError):
        clip.image(0)
    assert np.array_equal(clip.annotated, [0])
