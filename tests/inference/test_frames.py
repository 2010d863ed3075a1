"""Sources of frames: what they give, and what they say about damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data.findings import DataWarning
from maskwright.errors import DataError, ImageError, UsageError
from maskwright.inference.frames import VideoFile, frame_number, open_frames

SIZE = (48, 64)


def painted(count: int = 12) -> list[np.ndarray]:
    first = np.random.RandomState(0).randint(0, 255, (6, 8, 3)).astype("uint8").repeat(8, 0).repeat(8, 1)
    return [np.roll(first, (t, 2 * t), (0, 1)) for t in range(count)]


def folder(path: Path, numbers: list[int], form: str = "{:05d}.png") -> Path:
    path.mkdir()
    for number, image in zip(numbers, painted(len(numbers)), strict=True):
        Image.fromarray(image).save(path / form.format(number))
    return path


def film(path: Path, count: int = 12, **options: str) -> Path:
    av = pytest.importorskip("av", reason="PyAV is the extra `video`")
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = SIZE[1], SIZE[0], "yuv420p", 5
        for image in painted(count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


# ---- lists, folders, iterables ---------------------------------------------------------------------------------------


@pytest.mark.fast
def test_arrays_tensors_lists_and_iterables_give_the_same_frames():
    images = painted(3)
    expected = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    sources = [np.stack(images), torch.stack(expected), images, (image for image in images), expected]
    for source in sources:
        frames = open_frames(source)
        assert frames.searchable == (frames.length == 3)
        assert [torch.equal(a, b) for a, b in zip(frames, expected, strict=True)] == [True] * 3
        assert frames.length == 3
        assert frames.get(3) is None


@pytest.mark.fast
def test_frames_of_16_bits_are_scaled_alike():
    clip = np.stack([np.full((4, 4, 3), value, np.uint16) for value in (200, 1000, 4095)])
    for source in (clip, list(clip), torch.from_numpy(clip).permute(0, 3, 1, 2)):
        with pytest.warns(DataWarning, match="hold 12-bit values: 4095 becomes 255"):
            frames = open_frames(source)
        assert [int(frame.max()) for frame in frames] == [12, 62, 255]


@pytest.mark.fast
def test_numbers_of_frames_are_integers_of_any_library():
    for number in (np.int64(1), np.uint8(1), torch.tensor(1)):
        assert frame_number(number, "clip") == 1
    for wrong in (True, -1, np.int64(-1)):
        with pytest.raises(UsageError, match="clip: frames are counted by integers from 0"):
            frame_number(wrong, "clip")


def test_frames_of_a_folder_are_sorted_by_number(tmp_path):
    frames = open_frames(folder(tmp_path / "f", [0, 50, 100, 150, 250, 200], "frame {}.png"))
    assert [frames.frame_name(n) for n in range(6)] == [f"frame {n}" for n in (0, 50, 100, 150, 200, 250)]
    assert torch.equal(frames.get(5), torch.from_numpy(painted(6)[4]).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([0, 1, 2, 4, 5], "there is no frame with number 3; the 5 frames are taken one after the other"),
        ([0, 5, 10, 25, 30, 45], "there is no frame with number 15 and 3 other numbers; the 6 frames"),
    ],
)
def test_missing_numbers_are_mentioned_once(numbers, words, tmp_path):
    with pytest.warns(DataWarning, match=words) as seen:
        open_frames(folder(tmp_path / "f", numbers))
    assert len(seen) == 1


def test_steps_are_no_gaps(tmp_path, recwarn):
    open_frames(folder(tmp_path / "f", [3, 8, 13, 18]))
    assert not recwarn.list


def test_a_frame_of_another_size_is_an_error_where_it_comes(tmp_path):
    path = folder(tmp_path / "f", [0, 1, 2])
    Image.new("RGB", (50, 40)).save(path / "00001.png")
    frames = open_frames(path)
    assert frames.get(0) is not None
    with pytest.raises(ImageError, match="frame 1 has 50 x 40 pixels, but those before have 64 x 48"):
        frames.get(1)
    assert frames.get(2) is not None


@pytest.mark.fast
def test_an_iterable_is_read_once():
    frames = open_frames(iter(painted(4)))
    first = frames.get(0)
    assert torch.equal(frames.get(0), first)
    frames.get(2)
    with pytest.raises(UsageError, match="frame 1 of the stream is over: only the last one, 2, is kept"):
        frames.get(1)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "there are no frames"),
        (np.zeros((3, 4, 3), np.uint8), r"frames must be .* got shape \(3, 4, 3\)"),
        (7, "frames must be .* got int"),
        ("no such.mp4", "there is no such file or folder"),
        ([painted(2)], "each frame must be a single image"),
    ],
)
def test_what_cannot_be_frames_is_refused(source, words):
    with pytest.raises(UsageError, match=words):
        open_frames(source)


def test_a_folder_without_images_and_a_single_image_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no images in this folder"):
        open_frames(tmp_path)
    Image.fromarray(painted(1)[0]).save(tmp_path / "one.png")
    with pytest.raises(UsageError, match="is a single image"):
        open_frames(tmp_path / "one.png")


# ---- video files -----------------------------------------------------------------------------------------------------


def test_a_video_is_read_in_any_order(tmp_path):
    with open_frames(film(tmp_path / "v.mp4")) as frames:
        assert (frames.length, frames.rate, frames.size) == (12, 10.0, None)
        forward = [image.clone() for image in frames]
        assert (len(forward), frames.problem, frames.size) == (12, None, SIZE)
        assert float((forward[7].float() - torch.from_numpy(painted()[7]).permute(2, 0, 1)).abs().mean()) < 30
        for number in (*range(11, -1, -1), 3, 9, 4, 4):
            assert torch.equal(frames.get(number), forward[number]), number
        assert frames.get(12) is None


def test_few_frames_of_a_video_are_held(tmp_path, monkeypatch):
    import maskwright.inference.frames as module

    monkeypatch.setattr(module, "HELD", 3 * 3 * SIZE[0] * SIZE[1])
    with open_frames(film(tmp_path / "v.mp4", 30)) as frames:
        assert isinstance(frames, VideoFile)
        forward = [image.clone() for image in frames]
        assert len(frames._held) <= 1
        for number in range(29, -1, -1):
            assert torch.equal(frames.get(number), forward[number])
            assert len(frames._held) <= 3


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_video_that_ends_early_says_so(kind, tmp_path):
    options = {"movflags": "faststart"} if kind == "mp4" else {}
    whole = film(tmp_path / f"v.{kind}", **options).read_bytes()
    path = tmp_path / f"early.{kind}"
    said = 0
    for share in (0.5, 0.6, 0.7, 0.8):
        path.write_bytes(whole[: int(len(whole) * share)])
        with open_frames(path) as frames:
            try:
                count = len(list(frames))
            except ImageError:  # cut inside of a frame
                continue
        assert 0 < count < 12
        assert frames.problem is not None
        assert frames.problem.startswith(f"{path}: ends after {count} ")
        assert frames.problem.endswith("; the file may be incomplete")
        said += 1
    assert said or kind == "mp4"


def test_files_that_are_no_videos_are_refused(tmp_path):
    pytest.importorskip("av", reason="PyAV is the extra `video`")
    (tmp_path / "text.mp4").write_bytes(b"not a video" * 99)
    with pytest.raises(DataError, match=r"text.mp4: cannot be opened as a video \(Invalid data"):
        open_frames(tmp_path / "text.mp4")
