"""Sessions: prompts on any frame, corrections, live use, results that are written as they come, and bounded memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.checkpoints.ours import save
from maskwright.cli import main
from maskwright.errors import DataError, ImageError, UsageError
from maskwright.inference.track_output import TrackWriter, id_map, palette
from maskwright.inference.video import VideoSession
from maskwright.structures import Masks, Placement, Prompts
from maskwright.systems import create
from maskwright.systems.kinds.promptable import Slots
from maskwright.systems.kinds.video import Memory
from tests.inference.test_frames import SIZE, folder, painted
from tests.systems.tiny import build


@pytest.fixture(scope="module")
def system():
    made = build("sam2", resize={"canvas": [64, 64]}, memory={"pointers": 4, "frames": 3}).eval()
    made.mask_decoder.present.layers[2].bias.data += 5.0
    return made


@pytest.fixture
def session(system):
    made = VideoSession(system, painted(8), device="cpu")
    made.prompt(0, 1, points=[(20, 20)])
    made.prompt(0, 4, box=(10, 5, 40, 30))
    return made


def square() -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[10:30, 20:44] = True
    return mask


# ---- prompts and frames ----------------------------------------------------------------------------------------------


def test_objects_keep_their_ids_in_every_frame(session):
    found = list(session.run())
    assert [o.frame for o in found] == list(range(8))
    assert session.ids == [1, 4]
    for objects in found:
        assert set(objects.ids.tolist()) <= {1, 4}
        assert len(objects.ids) == len(objects.masks) == len(objects)
        assert objects.image_size == SIZE
        assert set(objects.presence) == {1, 4}
        assert all(
            objects.presence[i] == pytest.approx(float(s))
            for i, s in zip(objects.ids.tolist(), objects.scores, strict=True)
        )


def test_iterating_and_tracking_frame_by_frame_are_the_same(system, session):
    whole = list(session)
    live = VideoSession(system, device="cpu", length=8)
    images = painted(8)
    assert len(live.push(images[0])) == 0
    live.prompt(0, 1, points=[(20, 20)])
    live.prompt(0, 4, box=(10, 5, 40, 30))
    for expected, image in zip(whole[1:], images[1:], strict=True):
        objects = live.push(image)
        assert objects.ids.tolist() == expected.ids.tolist()
        assert float(objects.masks.iou(expected.masks).diagonal().min()) > 0.99
    prompts = Prompts.from_masks(Masks.from_dense(torch.from_numpy(square())[None]))
    assert 5 in live.push(images[0], prompts).ids


def test_an_object_can_be_added_half_way_and_removed(session):
    list(session.run(count=4))
    shown = session.prompt(3, 9, mask=square())
    assert 9 in shown.ids
    plane = shown.masks[int((shown.ids == 9).nonzero()[0])].dense()[0]
    assert float((plane == torch.from_numpy(square())).float().mean()) > 0.9
    assert all(9 in objects.presence for objects in session.run(3))
    session.remove(4)
    assert session.ids == [1, 9]
    assert all(set(o.presence) == {1, 9} for o in session.run(3))
    session.reset()
    with pytest.raises(UsageError, match="there are no prompts yet"):
        next(session.run())


def test_corrections_stay_unless_once_is_asked_for(system):
    for corrections, stays in (("keep", True), ("once", False)):
        session = VideoSession(system, painted(6), device="cpu", corrections=corrections)
        session.prompt(0, 1, points=[(20, 20)])
        list(session.run())
        session.prompt(3, 1, mask=square())
        given = session.logits(3)[1]
        again = {o.frame: session.logits(o.frame)[1] for o in session.run(2)}
        assert torch.equal(again[3], given) is stays


def test_backwards_reaches_the_frames_before_a_prompt(system):
    session = VideoSession(system, painted(6), device="cpu")
    session.prompt(4, 1, mask=square())
    assert [o.frame for o in session.run(4, reverse=True)] == [4, 3, 2, 1, 0]
    stream = VideoSession(system, iter(painted(6)), device="cpu")
    stream.prompt(0, 1, mask=square())
    with pytest.raises(UsageError, match="the stream cannot be read backwards"):
        next(stream.run(reverse=True))


def test_points_are_added_or_replace_earlier_ones(system):
    def answer(*calls):
        session = VideoSession(system, painted(2), device="cpu")
        for call in calls:
            session.prompt(0, 1, **call)
        return session._prompts[0, 1]

    first, second = {"points": [(20, 20)]}, {"points": [(40, 30)], "labels": [0]}
    assert answer(first, second).points.tolist() == [[[40.0, 30.0]]]
    both = answer(first, {**second, "add": True})
    assert both.points.tolist() == [[[20.0, 20.0], [40.0, 30.0]]]
    assert both.point_labels.tolist() == [[1, 0]]
    kept = answer({"box": (5, 5, 30, 30)}, {**second, "add": True})
    assert kept.boxes.tolist() == [[5.0, 5.0, 30.0, 30.0]]


def test_a_hidden_object_is_absent(session):
    shown = session.prompt(0, 4, hidden=True)
    assert shown.ids.tolist() == [1]
    assert shown.presence[4] < 0.001
    assert session.prompt(0, 1, mask=np.zeros(SIZE, bool)).ids.tolist() == []


def test_clearing_leaves_an_ordinary_frame(session):
    list(session.run(count=2))
    session.prompt(3, 1, mask=square())
    assert 1 in session.clear(3, 1).presence or session.logits(3).get(1) is None
    session.clear(0, 1)
    assert 1 not in [i for o in session.run(0, count=2) for i in o.presence]


def test_masks_do_not_overlap_if_asked(system):
    session = VideoSession(system, painted(3), device="cpu", overlap=False)
    for id in (1, 2, 3):
        session.prompt(0, id, box=(8 * id, 5, 8 * id + 30, 40))
    for objects in session.run():
        assert int(objects.masks.dense().sum(0).max()) <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "a prompt must be points, a box or both, or a mask"),
        ({"points": [(1, 1)], "hidden": True}, "a prompt must be points, a box or both, or a mask"),
        ({"points": [(900, 1)]}, "a point of object 0 is outside of the image"),
        ({"points": [(1, 1)], "labels": [1, 0]}, "labels must have one entry for each point"),
        ({"mask": np.zeros((3, 3))}, "a mask must be one of 48 x 64, got 1 of 3 x 3"),
        ({"points": []}, "the prompt of object 1 has neither points nor a box nor a mask"),
        ({"points": [(1, 2, 3)]}, r"have shape \(1, 3\) instead of \(P, 2\)"),
        ({"points": "ab"}, "points must be lists of x, y"),
        ({"points": [(1, 1)], "labels": [0.5]}, "point_labels must be integers, got 0.5"),
        ({"box": 5}, "a box must be x0, y0, x1, y1, got 5"),
        ({"box": ()}, r"a box must be x0, y0, x1, y1, got \(\)"),
        ({"box": (9, 9, 1, 1)}, "ends before it begins"),
        ({"mask": "x"}, "a mask must be a plane"),
        ({"mask": np.full(SIZE, np.nan)}, "a mask must not contain NaN"),
    ],
)
def test_invalid_prompts_are_refused(system, call, words):
    with pytest.raises(UsageError, match=words):
        VideoSession(system, painted(2), device="cpu").prompt(0, 1, **call)


def test_numbers_and_ids_may_be_integers_of_any_library(session):
    shown = session.prompt(np.int64(1), torch.tensor(9), mask=square().astype(np.uint16))
    assert (shown.frame, session.ids) == (1, [1, 4, 9])
    assert 9 in shown.ids
    session.prompt(np.int64(1), np.uint8(9), points=[(20, 20)])
    session.prompt(1, shown.ids[-1], points=[(21, 20)], add=True)
    assert session._prompts[1, 9].points.shape[1] == 2
    assert [objects.frame for objects in session.run(6, count=1)] == [6]
    session.clear(np.int64(1), torch.tensor(9))
    assert (1, 9) not in session._prompts
    session.remove(torch.tensor(4))
    assert session.ids == [1, 9]


def test_all_objects_may_be_removed_while_frames_are_tracked(session):
    found = list[tuple[int, list[int]]]()
    for objects in session.run(count=4):
        found.append((objects.frame, sorted(objects.presence)))
        if objects.frame == 1:
            session.remove(1)
            session.remove(4)
        if objects.frame == 2:
            session.prompt(3, 2, mask=square())
    assert found == [(0, [1, 4]), (1, [1, 4]), (2, []), (3, [2])]


def test_what_does_not_exist_is_refused(session, system):
    with pytest.raises(UsageError, match="has no frame 8; it has 8 frames"):
        session.prompt(8, 1, points=[(1, 1)])
    with pytest.raises(UsageError, match="there is no object 7; known ids are 1, 4"):
        session.remove(7)
    for id in (0, -3):
        with pytest.raises(UsageError, match=f"ids of objects must be positive integers, got {id}"):
            session.prompt_many(0, Prompts.from_points(SIZE, [(1, 1)]), [id])
    with pytest.raises(UsageError, match=rf"ids of objects must be less than 2\^63, got {1 << 63}"):
        session.prompt(0, 1 << 63, points=[(1, 1)])
    with pytest.raises(UsageError, match="frames are counted by integers from 0, got -1"):
        session.prompt(-1, 1, points=[(1, 1)])
    with pytest.raises(UsageError, match="hidden must have an entry for each of 1 prompts, got 2"):
        session.prompt_many(0, Prompts.from_points(SIZE, [(1, 1)]), hidden=[False, True])
    with pytest.raises(UsageError, match="budget must be an integer of at least 1, got 0"):
        VideoSession(system, painted(2), budget=0)
    for start in (-1, 9):
        with pytest.raises(UsageError, match=f"which has 8 frames, got {start}"):
            next(session.run(start))
    assert list(session.run(8)) == []
    with pytest.raises(UsageError, match="count must be at least 0, got -1"):
        next(session.run(count=-1))
    with pytest.raises(UsageError, match="length must be an integer of at least 1, got 0"):
        VideoSession(system, painted(2), length=0)
    with pytest.raises(UsageError, match=r"frames must be a folder of images, .* got dict"):
        VideoSession(system, {"a": 1})
    with pytest.raises(UsageError, match="the session reads its frames from the list of frames"):
        session.push(painted(1)[0])
    with pytest.raises(UsageError, match="solo does not track objects in videos"):
        VideoSession(build("solo"), painted(1))


# ---- memory ----------------------------------------------------------------------------------------------------------


def small_system():
    torch.manual_seed(0)
    return create(
        "sam2-small", backbone={"width": 8, "depths": [1, 1, 1, 1]}, memory={"width": 8, "layers": 1, "hidden": 16},
        decoder={"width": 16, "hidden": 16, "heads": 2, "depth": 1, "answers": 2}, resize={"canvas": [32, 32]},
    ).eval()  # fmt: skip


def grown(system, frames: int, every: int = 100) -> dict[int, int]:
    """Bytes of a session after so many frames of a stream."""
    image = painted(1)[0]
    session = VideoSession(system, (image for _ in range(frames)), device="cpu", fill_holes=0)
    session.prompt(0, 1, mask=square())
    sizes = {objects.frame: session.nbytes for objects in session.run() if objects.frame % every == every - 1}
    track = session._memory.tracks[0]
    assert len(track.tracked) == session.system.bank.window + 1
    assert len(track.passes.ranges) == 1
    assert (list(track.prompted), len(session._prompts)) == ([0], 1)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("frames", [500, pytest.param(2000, marks=pytest.mark.full)])
def test_memory_does_not_grow_with_the_frames(frames):
    sizes = grown(small_system(), frames)
    assert max(sizes) == frames - 1
    assert sizes[frames - 1] == sizes[99]


def test_memory_does_not_grow_over_two_thousand_frames_of_a_constant_network(monkeypatch):
    """As above, with networks that answer at once: what is kept does not depend on their values."""
    system = small_system()
    frame = system.embed(torch.zeros(1, 3, 32, 32), [Placement.resize(SIZE, (32, 32))])[0]
    features = system.features(frame)
    with torch.no_grad():
        decoded = system.answer(features, Slots(torch.zeros(1, 2, 2), torch.full((1, 2), -1)))
    monkeypatch.setattr(system, "features", lambda _: features)
    monkeypatch.setattr(system, "answer", lambda *_: decoded)
    monkeypatch.setattr(system.memory_attention, "forward", lambda frame, memories, *_: frame * memories.mean())
    memory = torch.zeros(1, 8, 2, 2)
    monkeypatch.setattr(system.memory_encoder, "forward", lambda *_: memory)
    prompts = Prompts.from_masks(Masks.from_dense(torch.from_numpy(square())[None]))
    _, kept = system.track(frame, Memory(fill_holes=0), prompts)
    sizes = {}
    for number in range(1, 2001):
        _, kept = system.track(frame, kept)
        if number % 100 == 0:
            sizes[number] = kept.nbytes
    assert sizes[2000] == sizes[100]
    assert (kept.frame, len(kept.tracks[0].tracked), len(kept.tracks[0].passes.ranges)) == (2000, 16, 1)


def test_memory_of_a_session_does_not_grow():
    sizes = grown(small_system(), 60, 20)
    assert sizes == {19: sizes[59], 39: sizes[59], 59: sizes[59]}


def test_without_a_limit_everything_is_kept(system):
    session = VideoSession(system, painted(12), device="cpu", history=None)
    session.prompt(0, 1, mask=square())
    list(session.run())
    assert len(session._memory.tracks[0].tracked) == 11
    few = VideoSession(system, painted(12), device="cpu")
    few.prompt(0, 1, mask=square())
    list(few.run())
    assert len(few._memory.tracks[0].tracked) == system.bank.window + 1
    torch.testing.assert_close(few.logits(11)[1], session.logits(11)[1])  # nothing that is read was dropped


# ---- output and the command ------------------------------------------------------------------------------------------


def test_results_are_written_frame_by_frame(session, tmp_path):
    with TrackWriter(tmp_path / "out", ("masks", "coco", "drawn"), classes=("cat", "dog"), labels={4: 1}) as writer:
        for objects in session.run(count=3):
            writer.add(objects.frame, f"{objects.frame:05d}", objects, session.image(objects.frame))
            assert (tmp_path / "out" / "masks" / f"{objects.frame:05d}.png").is_file()
            last = objects
    with Image.open(tmp_path / "out" / "masks" / "00002.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[:9] == palette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert set(np.unique(np.asarray(image))) <= {0, *last.ids.tolist()}
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    listing = json.loads((tmp_path / "out" / "frames.json").read_text())
    assert [image["file_name"] for image in listing["images"]] == ["00000", "00001", "00002"]
    assert {r["track_id"]: r["category_id"] for r in records} == {1: 1, 4: 2}
    with Image.open(tmp_path / "out" / "drawn" / "00001.jpg") as drawn:
        assert drawn.size == (SIZE[1], SIZE[0])


def test_a_frame_of_another_size_is_not_counted(system):
    live, images = VideoSession(system, device="cpu"), painted(2)
    live.push(images[0])
    live.prompt(0, 1, points=[(20, 20)])
    with pytest.raises(ImageError, match="frame 1 has 64 x 20 pixels, but those before have 64 x 48"):
        live.push(images[1][:20])
    assert live.push(images[1]).frame == 1


def written(session: VideoSession, writer: TrackWriter) -> None:
    with writer:
        for objects in session.run():
            writer.add(objects.frame, f"{objects.frame:05d}", objects, session.image(objects.frame))


def test_an_interruption_keeps_the_frames_before_it(session, tmp_path, monkeypatch):
    out = tmp_path / "out"
    drawings = iter(range(3))

    def drawn(objects, image):
        if next(drawings) == 2:
            raise KeyboardInterrupt
        return objects.draw(image)

    monkeypatch.setattr("maskwright.inference.track_output.drawing", drawn)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 2 frames, whose results are in"):
        written(session, TrackWriter(out, ("coco", "drawn")))
    frames = [image["id"] for image in json.loads((out / "frames.json").read_text())["images"]]
    records = json.loads((out / "results.json").read_text())
    assert frames == [1, 2]
    assert {record["image_id"] for record in records} <= set(frames)
    assert sorted(path.name for path in out.rglob("*.*")) == ["00000.jpg", "00001.jpg", "frames.json", "results.json"]


def test_large_ids_need_16_bits(session, tmp_path):
    shown = session.prompt(0, 254, mask=square())
    ids = list(range(1, len(shown)))
    assert id_map(shown, [*ids, 254]).mode == "P"
    assert id_map(shown, [*ids, 255]).mode == "I;16"  # 255 is void in maps of 8 bits
    session.remove(254)
    session.prompt(0, 300, mask=square())
    with TrackWriter(tmp_path / "out", ("masks",)) as writer:
        objects = next(session.run())
        writer.add(0, "x", objects)
    with Image.open(tmp_path / "out" / "masks" / "x.png") as image:
        assert image.mode in ("I;16", "I")
        assert 300 in np.asarray(image)
    session.prompt(0, 70000, mask=square())
    with TrackWriter(tmp_path / "out", ("masks",)) as writer, pytest.raises(DataError, match="maps hold ids of up to"):
        writer.add(0, "y", next(session.run()))


@pytest.fixture
def weights(system, tmp_path) -> Path:
    save(system, tmp_path / "sam2.safetensors")
    return tmp_path / "sam2.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["track", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_command_tracks_a_folder(weights, tmp_path, capsys):
    frames, out = folder(tmp_path / "f", list(range(5))), tmp_path / "out"
    code, printed = run(capsys, frames, "-w", weights, "--points", "20,20;50,40,0", "--boxes", "10,5,40,30", "-o", out)
    assert (code, printed) == (0, f"2 objects in 5 frames: {out}\n")
    assert len(list((out / "masks").iterdir())) == 5
    prompts = {"0": [{"points": [[20, 20]], "id": 7, "class": "cat"}], "00003.png": [{"box": [5, 5, 40, 30], "id": 7}]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    code, printed = run(capsys, frames, "-w", weights, "--prompts", tmp_path / "p.json", "-o", out)
    assert (code, printed) == (0, f"1 object in 5 frames: {out}\n")
    assert json.loads((out / "frames.json").read_text())["categories"] == [{"id": 1, "name": "cat"}]


def test_the_command_starts_from_detections(weights, tmp_path, capsys):
    frames, out = folder(tmp_path / "f", list(range(4))), tmp_path / "out"
    detector = build("mask-rcnn")
    save(detector, tmp_path / "detector.safetensors")
    code, printed = run(
        capsys, frames, "-w", weights, "--from", tmp_path / "detector.safetensors", "--score-threshold", 0.0,
        "--every", 2, "-o", out,
    )  # fmt: skip
    assert code == 0
    assert "objects in 4 frames" in printed
    names = [c["name"] for c in json.loads((out / "frames.json").read_text())["categories"]]
    assert names == list(detector.classes)
    code, printed = run(
        capsys, frames, "-w", weights, "--from", tmp_path / "detector.safetensors", "--score-threshold", 1.0
    )
    assert code == 2
    assert "finds nothing in frame 0" in printed


def test_detections_of_a_file_that_score_less_are_left_out(weights, tmp_path, capsys):
    frames, out = folder(tmp_path / "f", list(range(2))), tmp_path / "out"
    records = [
        {"image_id": 1, "category_id": 1, "bbox": [5 + 9 * n, 5, 20, 20], "score": 0.1 + 0.3 * n} for n in range(3)
    ]
    about = {"images": [{"id": 1, "file_name": "00000.png"}], "categories": [{"id": 1, "name": "car"}]}
    (tmp_path / "results.json").write_text(json.dumps(records))
    (tmp_path / "pictures.json").write_text(json.dumps(about))
    for threshold, words in (
        (0.3, f"2 objects in 2 frames: {out}"),
        (0.8, "no detection in frame 0 (00000) scores at least 0.8; the best scores 0.7"),
    ):
        code, printed = run(
            capsys,
            frames,
            "-w",
            weights,
            "--from",
            tmp_path / "results.json",
            "--score-threshold",
            threshold,
            "-o",
            out,
        )
        assert (code, words in printed) == (2 * (threshold > 0.7), True)
    (tmp_path / "pictures.json").write_text(json.dumps({**about, "images": [{"id": 1, "file_name": "x.png"}]}))
    code, printed = run(capsys, frames, "-w", weights, "--from", tmp_path / "results.json")
    assert code == 2
    assert "there are prompts for 1 image (x.png), but for none of those given, such as 00000" in printed


def test_what_was_done_before_a_damaged_frame_is_kept(weights, tmp_path, capsys):
    frames, out = folder(tmp_path / "f", list(range(5))), tmp_path / "out"
    (frames / "00003.png").write_bytes((frames / "00003.png").read_bytes()[:100])
    code, printed = run(capsys, frames, "-w", weights, "--points", "20,20", "-o", out)
    assert code == 1
    assert "the results of 3 frames are kept" in printed
    assert len(json.loads((out / "frames.json").read_text())["images"]) == len(list((out / "masks").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "track requires prompts: --points and --boxes, or --prompts, or --from"),
        (("--points", "1,1", "--from", "x.json"), "track requires prompts"),
        (("--points", "1,1", "--every", "3"), "--every needs the weights of an image system in --from"),
        (("--points", "1,1", "--frame", "9"), "has no frame 9; it has 2 frames"),
        (("--points", "1,x"), "is not x,y"),
    ],
)
def test_mistakes_on_the_command_line_are_sentences(arguments, words, weights, tmp_path, capsys):
    frames = folder(tmp_path / "f", [0, 1])
    code, printed = run(capsys, frames, "-w", weights, *arguments)
    assert code == 2
    assert words in printed
    assert printed.count("\n") == 1
