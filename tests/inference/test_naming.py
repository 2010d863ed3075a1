"""Output files have names of their own, and are not read as images by the next prediction."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from maskwright.errors import UsageError
from maskwright.inference import predict
from maskwright.inference.naming import OutputNames, has_mark
from maskwright.inference.writer import PredictionWriter
from tests.inference.painted import Painted, blocks, save

pytestmark = pytest.mark.fast


def test_names_that_a_file_system_may_not_distinguish_differ(tmp_path):
    names = OutputNames([tmp_path])
    paths = ["a.png", "a.jpg", "A.png", "b/a.png", "B/a.png", "caf\u00e9.png", "cafe\u0301.png", "a.png.jpg", "a.JPG"]
    given = [names.add(tmp_path / path) for path in paths]
    assert given[:2] == ["a", "a.jpg"]
    assert len({name.casefold() for name in given}) == len(paths)
    assert names.add(tmp_path / "a.png") not in given, "the same image again"


def test_a_folder_is_not_named_like_a_file(tmp_path):
    names = OutputNames([tmp_path])
    given = [names.add(tmp_path / path) for path in ("x.png", "x.jpg/y.png", "z.png/y.png", "z.png.jpg", "z.jpg")]
    files = {f"{name}{suffix}" for name in given for suffix in (".jpg", ".png")}
    folders = {str(parent) for name in files for parent in (tmp_path / name).relative_to(tmp_path).parents}
    assert not files & folders
    assert len(set(given)) == 5


def run(source, out, kinds=("drawn", "coco", "masks"), recursive=True):
    """Predict and write as the command does; returns the names of the images."""
    seen = []
    writer = PredictionWriter(out, kinds, ("cat", "dog"), [source])
    for prediction in predict(Painted(), source, recursive=recursive):
        seen.append(prediction.path.name)
        writer.add(prediction.path, prediction.instances, prediction.error)
    writer.close()
    return seen


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "sub/b.png", "masks/mine.png"):
        save(blocks(3), tmp_path / "in" / name)
    return tmp_path / "in"


@pytest.mark.thorough
@pytest.mark.parametrize("kinds", [("drawn",), ("masks",), ("drawn", "coco", "masks")])
@pytest.mark.parametrize("inside", ["found", "."])
def test_outputs_inside_the_source_are_left_out(images, kinds, inside):
    first = run(images, images / inside, kinds)
    assert first == ["a.png", "mine.png", "b.png"]
    if inside == "found":  # later runs into the same and into another folder
        assert run(images, images / inside, kinds) == first
        assert run(images, images / "again", kinds) == first
        assert run(images, images / "again", kinds) == first
    else:
        again = run(images, images / inside, kinds)
        assert {"a.png", "b.png"} <= set(again) <= set(first)
    assert [p.path.name for p in predict(Painted(), f"{images}/**/b*")] == ["b.png"]


@pytest.mark.thorough
def test_outputs_are_recognised_by_records_or_by_their_mark(images, tmp_path):
    run(images, images / "found")
    for file in images.rglob("*.json"):
        file.unlink()
    assert has_mark(images / "found/drawn/a.jpg")
    assert has_mark(images / "found/masks/a.png")
    assert run(images, tmp_path / "out") == ["a.png", "mine.png", "b.png"], "by the mark"

    run(images, images / "found")
    Image.new("RGB", (60, 40)).save(images / "found/drawn/a.jpg")  # of an earlier version, without a mark
    assert run(images, tmp_path / "out") == ["a.png", "mine.png", "b.png"], "by pictures.json"


@pytest.mark.thorough
def test_an_output_folder_that_is_named_is_read(images):
    run(images, images / "found")
    assert run(images / "found/drawn", images / "more") == ["a.jpg", "mine.jpg", "b.jpg"]
    shutil.rmtree(images / "sub")
    shutil.rmtree(images / "masks")
    (images / "a.png").unlink()
    with pytest.raises(UsageError, match="written by earlier predictions"):
        predict(Painted(), images, recursive=True)
