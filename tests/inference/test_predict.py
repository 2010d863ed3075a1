"""Sources of images: one prediction per image, in order; unreadable images are skipped."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import maskwright
from maskwright.errors import ImageError, UsageError
from maskwright.inference import Prediction, predict, prepare
from maskwright.inference.outputs import RecordStream, load_objects
from maskwright.structures import Instances
from tests.inference.painted import Painted, blocks, save

pytestmark = pytest.mark.fast


@pytest.fixture
def system() -> Painted:
    return Painted().eval()


@pytest.fixture
def folder(tmp_path):
    """Five images of different sizes with 1 ... 5 objects, one in a subfolder, and a file that is not an image."""
    for k in range(1, 5):
        save(blocks(k, (30 + 7 * k, 50 + k)), tmp_path / f"p{k}.png")
    save(blocks(5), tmp_path / "deeper" / "p5.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    return tmp_path


def counts(predictions) -> list[int]:
    return [len(p.found()) for p in predictions]


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_one_image_of_every_kind_gives_one_prediction(system, folder):
    path, image = folder / "p3.png", blocks(3, (51, 53))
    array = image.permute(1, 2, 0).numpy()
    for source in (path, str(path), image, array, Image.fromarray(array), np.asfortranarray(array)):
        prediction = predict(system, source)
        assert isinstance(prediction, Prediction)
        assert prediction.size == (51, 53)
        assert prediction.found().image_size == (51, 53)
        assert prediction.found().labels.tolist() == [0, 1, 0]
        assert prediction.path == (path if isinstance(source, (str, type(path))) else None)
        assert prediction.error is None
        assert prediction.seconds > 0
    assert len(maskwright.predict(system, path).instances) == len(system.predict(path).instances) == 3


@pytest.mark.thorough
def test_folders_globs_lists_and_streams(system, folder):
    names = [str(folder / f"p{k}.png") for k in (4, 1, 3)]
    assert counts(predict(system, folder)) == [1, 2, 3, 4]
    assert counts(predict(system, str(folder), recursive=True)) == [5, 1, 2, 3, 4], "by path"
    assert counts(predict(system, str(folder / "p[23].png"))) == [2, 3]
    assert counts(predict(system, str(folder / "**/p*.PNG"))) == [5]
    assert counts(predict(system, names)) == [4, 1, 3], "as given"
    assert counts(predict(system, (n for n in names))) == [4, 1, 3]
    assert counts(predict(system, [folder / "deeper", blocks(2), folder / "p1.png"])) == [5, 2, 1]
    assert counts(predict(system, torch.stack([blocks(2), blocks(3)]))) == [2, 3]
    assert counts(predict(system, [names[0]])) == [4], "a list of one is still a list"


def test_the_number_is_known_where_it_can_be(system, folder):
    assert len(predict(system, folder)) == 4
    assert not hasattr(predict(system, iter([folder / "p1.png"])), "__len__")
    with pytest.raises(TypeError, match=r"list\(predictions\)"):
        predict(system, folder)[0]
    assert predict(system, folder / "p1.png", device="auto").size


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 2, 3, 10])
def test_the_batch_changes_nothing(system, tmp_path, batch):
    sizes = [(37, 51), (64, 64), (44, 52), (33, 64), (60, 60), (48, 49)]  # padded to 48 x 64 and 64 x 64
    for number, size in enumerate(sizes):
        save(blocks(number + 1, size), tmp_path / f"p{number}.png")
    ready = prepare(system)
    found = list(predict(ready, tmp_path, batch=batch))
    assert [p.path.name for p in found] == [f"p{number}.png" for number in range(6)]
    for prediction in found:
        alone = predict(system, prediction.path).found()
        assert alone.masks.rle() == prediction.found().masks.rle()
        assert torch.equal(alone.boxes, prediction.found().boxes)
    assert sorted(ready.batches) == {1: [1] * 6, 2: [2, 2, 2], 3: [1, 2, 3], 10: [2, 4]}[batch]


def test_thresholds_reach_the_system(system, folder):
    assert counts(predict(system, folder, detections=2)) == [1, 2, 2, 2]
    assert counts(predict(system, folder, score_threshold=0.995, detections=None)) == [1, 2, 2, 2]


# ---- one after the other ---------------------------------------------------------------------------------------------


def test_results_stream(system, folder):
    asked = []

    def endless():
        for k in range(10_000):
            asked.append(k)
            yield blocks(k % 4 + 1)

    stream = predict(system, endless(), batch=2)
    assert counts([next(stream) for _ in range(4)]) == [1, 2, 3, 4]
    assert len(asked) < 20, "a few images ahead, not all"


def test_an_abandoned_stream_leaves_no_threads(system):
    stream = predict(system, (blocks(1) for _ in range(100)))
    next(stream)
    del stream
    until = time.monotonic() + 5
    while any(t.name.startswith("maskwright-read") for t in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_error_in_the_users_own_generator_is_his(system):
    def broken():
        yield blocks(1)
        raise KeyError("mine")

    stream = predict(system, broken())
    with pytest.raises(KeyError, match="mine"):
        list(stream)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_bad_images_among_many_are_skipped_and_listed(system, folder, batch):
    (folder / "p2.png").write_bytes(b"<html>404</html>")
    save(blocks(1), folder / "p6.png")
    whole = (folder / "p6.png").read_bytes()
    (folder / "p6.png").write_bytes(whole[: len(whole) // 2])
    stream = predict(system, [folder, folder / "gone.png"], batch=batch)
    found = list(stream)
    assert [p.path.name for p in found] == ["p1.png", "p2.png", "p3.png", "p4.png", "p6.png", "gone.png"]
    assert [len(p.instances) if p.instances is not None else None for p in found] == [1, None, 3, 4, None, None]
    assert [p.path.name for p in stream.skipped] == ["p2.png", "p6.png", "gone.png"]
    for prediction in stream.skipped:
        assert str(prediction.path) in prediction.error
        with pytest.raises(ImageError, match=prediction.path.name):
            prediction.draw()


def test_a_single_bad_image_is_an_error(system, folder):
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        predict(system, folder / "gone.png")
    with pytest.raises(ImageError, match=r"notes\.txt: not a supported image"):
        predict(system, folder / "notes.txt")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "a tensor must be dense with real numbers"),
        (np.zeros((8, 8, 3), np.complex64), "an array must have real numbers as values"),
        (np.full((8, 8, 3), 300.5), "float values of unknown range"),
        (np.full((8, 8, 3), np.nan), "values that are not finite"),
        (np.full((8, 8, 3), -0.5), "float values from -0.5"),
        (np.full((8, 8), 70000, np.int32), "int32 values from 70000 to 70000"),
        (np.zeros((3, 40, 50), np.uint8), "channels last"),
        (b"<html>404</html>", "not a supported image"),
        (torch.zeros(50, 40, 3, dtype=torch.uint8), "channels first"),
        (torch.zeros(5, 8, 8, dtype=torch.uint8), "has 5 channels, but the system expects 3"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.zeros(8, np.uint8), r"\(H, W, C\)"),
    ],
)
def test_invalid_images_in_memory_are_refused(system, source, says):
    with pytest.raises(ImageError, match=says):
        predict(system, source)


def test_grey_and_alpha_become_three_channels(system):
    grey = predict(system, np.zeros((20, 30), np.uint8))
    assert grey.size == (20, 30)
    with_alpha = np.dstack([blocks(2).permute(1, 2, 0).numpy(), np.zeros((40, 60), np.uint8)])
    assert len(predict(system, with_alpha).instances) == 2
    assert len(predict(system, Image.fromarray(with_alpha)).instances) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score_treshold": 0.5}, "has no option 'score_treshold' for predicting; its options are score_threshold"),
        ({"batch": 0}, "batch and workers must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of 'float32', 'bfloat16', 'float16'"),
        ({"device": "tpu9"}, "there is no device 'tpu9'"),
        ({"device": "cuda:77"}, "use cpu"),
        ({"tile": 3}, "got tile=3"),
        ({"tile": 64, "overlap": 1.5}, r"`overlap` in \[0, 0.9\], got tile=64, overlap=1.5"),
        ({"detections": -1}, "detections must be an integer of at least 0, got -1"),
        ({"detections": 2.5}, "detections must be an integer, got 2.5"),
        ({"score_threshold": "high"}, "score_threshold must be a number, got 'high'"),
        ({"score_threshold": float("nan")}, "score_threshold must be a finite number, got nan"),
        ({"score_threshold": 1.5}, "score_threshold must be between 0 and 1, got 1.5"),
        ({"score_threshold": -0.1}, "score_threshold must be between 0 and 1, got -0.1"),
        ({"score_threshold": np.float32(50)}, "score_threshold must be between 0 and 1, got"),
        ({"score_threshold": True}, "score_threshold must be a number, got True"),
    ],
)
def test_invalid_options_are_refused(system, options, says):
    with pytest.raises(UsageError, match=says):
        predict(system, blocks(1), **options)


def test_sources_without_images_are_refused_immediately(system, tmp_path):
    (tmp_path / "sub").mkdir()
    for source, says in [
        (tmp_path, "no images in this folder; subfolders were not searched"),
        (tmp_path / "sub", "no images in this folder$"),
        (str(tmp_path / "*.jpg"), "no file matches this pattern"),
        ([], "the list is empty"),
        (17, "or an iterable of these, got int"),
    ]:
        with pytest.raises(UsageError, match=says):
            predict(system, source)


def test_results_are_on_the_host_and_belong_to_the_caller(system):
    found = predict(system, blocks(3)).found()
    found.boxes += 1
    assert found.masks.kind == "rle"
    assert not found.boxes.requires_grad


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_drawing_and_saving(system, folder, tmp_path):
    prediction = predict(system, folder / "p3.png")
    assert prediction.draw(labels=False).size == (53, 51)
    from_memory = predict(system, blocks(3, (51, 53)))
    assert np.array_equal(np.asarray(from_memory.draw()), np.asarray(prediction.draw()))

    out = tmp_path / "new" / "folder"
    for name in ("a.jpg", "a.png"):
        with Image.open(prediction.save(out / name, alpha=1.0)) as saved:
            assert (saved.size, saved.mode) == ((53, 51), "RGB")
    document = json.loads(prediction.save(out / "a.json").read_text())
    assert [a["category_id"] for a in document["annotations"]] == [1, 2, 1]
    assert document["images"][0]["file_name"].endswith("p3.png")
    with pytest.raises(UsageError, match=r"a\.xyz: the file name must end in one of \.jpg"):
        prediction.save(out / "a.xyz")
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg", "a.json", "a.png"], "and nothing half-written"


def test_objects_by_themselves_come_back(system, tmp_path):
    for image in (blocks(3), blocks(0)):
        prediction = predict(system, image)
        objects, classes = load_objects(prediction.save(tmp_path / "a.npz"))
        assert classes == ("cat", "dog")
        assert objects.masks is not None
        assert objects.masks.rle() == prediction.found().masks.rle()
        assert torch.equal(objects.scores, prediction.found().scores)
    (tmp_path / "b.npz").write_bytes(b"PK rubbish")
    with pytest.raises(maskwright.MaskwrightError, match=r"b\.npz: not a file of objects"):
        load_objects(tmp_path / "b.npz")


def test_a_stream_of_records_appears_when_it_is_closed(tmp_path):
    path = tmp_path / "deep" / "results.json"
    stream = RecordStream(path)
    stream.close()
    assert json.loads(path.read_text()) == []
    stream = RecordStream(path)
    stream.add([{"a": 1}, {"b": "ö"}])
    assert json.loads(path.read_text()) == [], "what was there stays until the new one is whole"
    stream.add([])
    stream.add([{"c": 3}])
    stream.close()
    assert json.loads(path.read_text()) == [{"a": 1}, {"b": "ö"}, {"c": 3}]
    stream = RecordStream(path)
    stream.add([{"d": 4}])
    stream.abandon()
    stream.close()
    assert len(json.loads(path.read_text())) == 3
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_without_masks(tmp_path):
    system = Painted(masks=False).eval()
    prediction = predict(system, blocks(2))
    assert prediction.found().masks is None
    prediction.draw()
    objects, _ = load_objects(prediction.save(tmp_path / "a.npz"))
    assert objects.masks is None
    assert isinstance(objects, Instances)
