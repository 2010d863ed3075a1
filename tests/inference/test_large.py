"""Large images: objects as they become complete, equal to whole-image prediction, and continued after a kill."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import slides
from maskwright.errors import ImageError, UsageError
from maskwright.inference import predict
from maskwright.inference.journal import TileJournal
from maskwright.inference.large import ObjectStream
from maskwright.inference.outputs import coco_records
from maskwright.inference.seams import Joiner, PlacedObjects
from maskwright.inference.tiles import cover
from maskwright.inference.writer import PredictionWriter
from maskwright.structures import Instances, Masks, runs
from tests.inference.coded import Coded, coded, found_in, packed

pytestmark = pytest.mark.fast


class InMemory:
    """A window source over an array, that counts what is read."""

    path = Path("memory.tif")

    def __init__(self, image: np.ndarray):
        self.image, self.size, self.reads = torch.from_numpy(image).permute(2, 0, 1), image.shape[:2], 0

    def order(self, x, y, width, height):
        return y, x

    def window(self, x, y, width, height):
        self.reads += 1
        return self.image[:, y : y + height, x : x + width]

    def overview(self, pixels):
        return self.image


def find(crops):
    return [found_in(crop) for crop in crops]


def codes(objects: Instances) -> list[bytes]:
    assert objects.masks is not None
    return sorted(code["counts"] for code in objects.masks.rle())


def on_seams(size: tuple[int, int], tile: int, overlap: float, radius: int) -> np.ndarray:
    """Numbered discs centred on every crossing of two seams and of a seam with the image's border, and in between."""
    tiles = cover(size, tile, overlap)
    columns = sorted({t.x for t in tiles} | {t.right for t in tiles})
    rows = sorted({t.y for t in tiles} | {t.bottom for t in tiles})
    y, x = np.mgrid[: size[0], : size[1]]
    plane = np.zeros(size, np.int64)
    number = 0
    for cy in sorted({*rows, *((a + b) // 2 for a, b in itertools.pairwise(rows))}):
        for cx in sorted({*columns, *((a + b) // 2 for a, b in itertools.pairwise(columns))}):
            distance = (x - cx) ** 2 + (y - cy) ** 2
            if not plane[distance <= (radius + 2) ** 2].any():
                number += 1
                plane[distance <= radius**2] = number
    return plane


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("tile", "overlap", "radius"), [(64, 0.0, 6), (64, 0.25, 4), (80, 0.1, 9), (100, 0.5, 7), (300, 0.2, 4)]
)
def test_objects_on_every_seam_and_corner_are_those_of_the_whole_image(tile, overlap, radius):
    plane = on_seams((200, 260), tile, overlap, radius)
    image = coded(plane)
    whole = find([torch.from_numpy(image).permute(2, 0, 1)])[0]
    stream = ObjectStream(InMemory(image), find, tile, overlap, batch=3)
    pieces = list(stream)
    assert len(pieces) == len(stream)
    numbers = [number for piece in pieces for number in piece.order.tolist()]
    assert len(set(numbers)) == len(numbers) == len(whole)
    joined = Instances.join([piece.instances() for piece in pieces if len(piece)])
    assert codes(joined) == codes(whole)
    assert sorted(joined.scores.tolist()) == sorted(whole.scores.tolist())


def test_complete_objects_leave_memory():
    plane = packed((600, 90), 20, 8)
    tiles = cover(plane.shape, 60, 0.2)
    joiner = Joiner(tiles, plane.shape)
    image = torch.from_numpy(coded(plane)).permute(2, 0, 1)
    given, most = 0, 0
    for tile in tiles:
        given += len(joiner.add(found_in(image[:, tile.y : tile.bottom, tile.x : tile.right])))
        most = max(most, len(joiner._views), len(joiner._component))
    assert given == len(np.unique(plane)) - 1
    across = len({t.x for t in tiles})
    assert most <= max(2 * across + 1, 60), "tiles of two rows, and the objects of one row that are not complete"
    assert not joiner._views
    assert not joiner._component
    assert not joiner._left


def test_an_object_through_the_whole_image_keeps_only_its_own_parts():
    plane = packed((600, 90), 20, 8)
    plane[:, 40:44] = 60_001
    tiles = cover(plane.shape, 60, 0.2)
    joiner = Joiner(tiles, plane.shape)
    image = torch.from_numpy(coded(plane)).permute(2, 0, 1)
    pieces = [joiner.add(found_in(image[:, t.y : t.bottom, t.x : t.right])) for t in tiles]
    held = [max((len(view.objects) for view in joiner._views.values()), default=0)]
    assert held == [0]
    objects = Instances.join([piece.instances() for piece in pieces if len(piece)])
    assert max(objects.masks.areas().tolist()) == 4 * 600


def big_image(tmp_path: Path, monkeypatch, size=(190, 240), name="big.tif") -> Path:
    monkeypatch.setattr(slides, "WHOLE", 1000)
    path = tmp_path / name
    Image.fromarray(coded(packed(size, 20, 8))).save(path)
    return path


def written(path: Path, folder: Path, kinds=("geojson", "labels", "coco", "drawn"), **options) -> PredictionWriter:
    system = Coded().eval()
    with PredictionWriter(folder, kinds, system.classes) as writer:
        for prediction in predict(system, [path], tile=64, stream=True, journals=folder / ".tiles", **options):
            assert prediction.stream is not None
            writer.add_stream(path, prediction.stream)
    return writer


@pytest.mark.thorough
def test_all_files_agree(tmp_path, monkeypatch):
    path = big_image(tmp_path, monkeypatch)
    out = tmp_path / "out"
    writer = written(path, out)
    whole = predict(Coded().eval(), path).found()
    assert writer.objects == len(whole) == 120
    records = json.loads((out / "results.json").read_text())
    assert sorted(r["segmentation"]["counts"].encode() for r in records) == codes(whole)
    features = json.loads((out / "geojson" / "big.geojson").read_text())["features"]
    assert len(features) == 120
    assert features[0]["properties"]["measurements"].keys() == {"score", "area"}
    outlines = [[np.array(ring[:-1]) for ring in f["geometry"]["coordinates"]] for f in features]
    assert codes_of_polygons(outlines, (190, 240)) == codes(whole)
    assert sorted(p.name for p in out.iterdir()) == ["drawn", "geojson", "labels", "pictures.json", "results.json"]
    labels = label_plane(out / "labels" / "big.tif")
    for feature in features:
        number = feature["properties"]["number"]
        assert (labels == number).sum() == feature["properties"]["measurements"]["area"]


def codes_of_polygons(objects, size) -> list[bytes]:
    masks = Masks.from_polygons(objects, size, fill="even-odd")
    return sorted(code["counts"] for code in masks.pack().rle())


def label_plane(path: Path) -> np.ndarray:
    tifffile = pytest.importorskip("tifffile", reason="the extra slides is not installed")
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert file.pages[0].tile == (256, 256)
        assert file.pages[0].dtype == np.uint32
        return file.pages[0].asarray()


@pytest.mark.thorough
def test_a_run_that_stops_in_the_middle_continues_with_equal_files(tmp_path, monkeypatch):
    path = big_image(tmp_path, monkeypatch)
    written(path, tmp_path / "straight", batch=2)
    system = Coded().eval()
    journals = tmp_path / "out" / ".tiles"
    prediction = next(iter(predict(system, [path], tile=64, stream=True, journals=journals, batch=2)))
    for count, _ in enumerate(prediction.stream):
        if count == 4:
            break
    (journal,) = journals.iterdir()
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[-50:])  # a record that was not completed
    system = Coded().eval()
    with PredictionWriter(tmp_path / "out", ("geojson", "labels", "coco", "drawn"), system.classes) as writer:
        for prediction in predict(system, [path], tile=64, stream=True, journals=journals, batch=2):
            total = len(prediction.stream)
            writer.add_stream(path, prediction.stream)
    for name in ("results.json", "geojson/big.geojson", "labels/big.tif", "drawn/big.jpg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert not journals.exists()
    again = next(iter(predict(system, [path], tile=64, stream=True, journals=journals, batch=2)))
    assert len(list(again.stream)) == total


KILLED = """
import os, signal, sys
from maskwright.data import slides
slides.WHOLE = 1000
from maskwright.inference import predict
from maskwright.inference.writer import PredictionWriter
from tests.inference.coded import Coded
path, out, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
class Mortal(Coded):
    left = calls
    def decode(self, *a, **k):
        Mortal.left -= 1
        if not Mortal.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(*a, **k)
system = Mortal().eval()
with PredictionWriter(out, ("geojson", "labels", "coco"), system.classes) as writer:
    for prediction in predict(system, [path], tile=64, stream=True, journals=out + "/.tiles"):
        writer.add_stream(path, prediction.stream)
print(calls - Mortal.left)
"""


def test_a_killed_process_continues(tmp_path, monkeypatch):
    path = big_image(tmp_path, monkeypatch)
    written(path, tmp_path / "straight", ("geojson", "labels", "coco"))
    out = tmp_path / "out"

    def run(calls: int) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-c", KILLED, str(path), str(out), str(calls)]
        return subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    assert run(9).returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    last = run(1000)
    assert last.returncode == 0, last.stderr
    total = len(cover((190, 240), 64, 0.2))
    assert int(last.stdout) == total - 8, "the tiles of the killed process are not predicted again"
    for name in ("results.json", "geojson/big.geojson", "labels/big.tif"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    left = [p.name for folder in (out, out / "geojson", out / "labels") for p in folder.iterdir()]
    assert not [name for name in left if name.endswith(".part")]


test_a_killed_process_continues = pytest.mark.thorough(test_a_killed_process_continues)


def test_other_options_start_anew(tmp_path):
    objects = found_in(torch.from_numpy(coded(packed((40, 40), 20, 8))).permute(2, 0, 1))
    journal = TileJournal(tmp_path / "x.tiles", {"tile": 64})
    journal.add([objects, objects[:0]])
    journal.close()
    journal = TileJournal(tmp_path / "x.tiles", {"tile": 64})
    ((first, second),) = journal.records()
    assert torch.equal(first.boxes, objects.boxes)
    assert first.masks.rle() == objects.masks.rle()
    assert second.masks is not None
    assert len(second) == 0
    journal.close()
    journal = TileJournal(tmp_path / "x.tiles", {"tile": 32})
    assert journal.count == 0
    journal.close()


@pytest.mark.thorough
def test_an_image_that_breaks_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    good = big_image(tmp_path, monkeypatch, name="good.tif")
    bad = big_image(tmp_path, monkeypatch, name="bad.tif")
    system = Coded().eval()
    with PredictionWriter(tmp_path / "out", ("geojson", "labels", "coco"), system.classes) as writer:
        for prediction in predict(system, [good, bad, good], tile=64, stream=True):
            stream = prediction.stream
            if prediction.path == bad:
                plain = stream.source.window
                stream.source = Failing(stream.source, plain)
            writer.add_stream(prediction.path, stream)
    assert [path for path, _ in writer.skipped] == [str(bad)]
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [sum(r["image_id"] == k for r in records) for k in (1, 2)] == [120, 120]
    assert sorted(p.name for p in (tmp_path / "out" / "labels").iterdir()) == ["good.tif", "good.tif.tif"]


class Failing:
    def __init__(self, source, window):
        self.path, self.size, self.order, self.left, self._window = source.path, source.size, source.order, 6, window

    def window(self, *place):
        self.left -= 1
        if self.left == 0:
            raise ImageError("bad.tif: the image is truncated")
        return self._window(*place)


def test_streams_need_tiles_and_all_objects():
    with pytest.raises(UsageError, match="`stream` requires `tile`"):
        predict(Coded().eval(), np.zeros((8, 8, 3), np.uint8), stream=True)


@pytest.mark.thorough
def test_matrix_nms_is_refused_for_streams(tmp_path, monkeypatch):
    path = big_image(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match="omit it"):
        next(iter(predict(Coded().eval(), [path], tile=64, stream=True, suppression="matrix")))


def test_masks_of_enormous_images_are_those_of_a_window():
    size = (70_000, 80_000)
    stride = size[0] + 1
    starts = np.array([60_000 * stride + 65_000, 60_001 * stride + 65_000])
    objects = PlacedObjects(
        size,
        np.array([[60_000, 65_000, 60_002, 65_003]], np.float32),
        np.array([0]),
        np.array([0.5], np.float32),
        None,
        [(starts, starts + 3)],
        np.array([0]),
    )
    (record,) = coco_records(objects, 7)
    assert record["window"] == [60_000, 65_000, 2, 3]
    assert Masks.from_rle([record["segmentation"]]).areas().tolist() == [6]
    assert record["segmentation"]["size"] == [3, 2]
    (small,) = coco_records(PlacedObjects.of(found_in(torch.full((3, 4, 5), 1, dtype=torch.uint8))), 7)
    assert "window" not in small
    assert small["segmentation"]["size"] == [4, 5]


def test_positions_move_between_images():
    masks = Masks.from_dense(torch.ones(1, 5, 4, dtype=torch.bool)).pack()
    starts, ends, _ = runs.decoded([masks.rle()[0]["counts"]], 5)
    assert (starts.tolist(), ends.tolist()) == ([0, 6, 12, 18], [5, 11, 17, 23])
    moved = [runs.moved(v, 5, 3, 2, 9) for v in (starts, ends)]
    assert runs.frame(*moved, 9) == (3, 2, 7, 7)
    assert runs.crop(*moved, 9, (2, 1, 8, 8)).sum() == 20
