"""Annotations of a project: edits, conflicts, what is found again, and what is imported."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("websockets", reason="needs the extra web")
pytest.importorskip("uvicorn", reason="needs the extra web")

from maskwright.data.coco_json import coco_categories, image_entry, write_coco_json
from maskwright.errors import DataError, UsageError
from maskwright.structures.rle import encode_counts
from maskwright.web import journal
from maskwright.web import project as module
from maskwright.web.assistant import read_prompt
from maskwright.web.datasets import open_source
from maskwright.web.objects import Object, colour, read_edits
from maskwright.web.project import NotFoundError, Project, default_folder
from maskwright.web.sources import FolderImages, of_unread
from maskwright.web.states import Conflict, Saved
from tests.web.photos import SIZE, add, drawn, photos, rle


def opened(folder: Path, **options: Any) -> Project:
    return Project(open_source(folder), default_folder(folder), **({"classes": ("cat", "dog")} | options))


def saved(project: Project, image: int, *edits: dict[str, Any]) -> Saved:
    outcome = project.edit(image, list(edits), "ann", "test")
    assert isinstance(outcome, Saved)
    return outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos")


@pytest.mark.fast
def test_edits_are_found_again(folder):
    with opened(folder) as project:
        assert len(project) == 3
        first = saved(project, 1, add("a"), add("b", 30, label=None))
        assert [one.id for one in first.changed] == ["a", "b"]
        second = saved(project, 1, {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 50, label=1, track=3)})
        assert [one.revision for one in second.state.objects.values()] == [2, 1]
        assert saved(project, 1, {"do": "remove", "id": "b", "was": 1}).removed == ["b"]
        saved(project, 1, {"do": "done", "value": True}, {"do": "dismiss", "ids": ["s-1", "s-2"], "value": True})
        saved(project, 1, {"do": "dismiss", "ids": ["s-1"], "value": False})
        project.add_class("  fox ")
        before = project.state(1)
    with opened(folder) as project:
        state = project.state(1)
        assert state == before
        assert (state.version, state.done, state.dismissed) == (5, True, {"s-2"})
        assert list(state.objects) == ["a"]
        assert state.objects["a"].label == 1
        assert state.objects["a"].track == 3
        assert state.objects["a"].made == ({"by": "ann", "how": "brush", "clicks": 1},)
        assert project.classes == ("cat", "dog", "fox")
        assert project.about(1) | {"width": 80, "height": 60} == {
            "id": 1, "name": "photo-2.png", "width": 80, "height": 60, "objects": 1, "done": True, "version": 5,
        }  # fmt: skip
        assert list(project.listed("done")) == [1]
        assert list(project.listed("todo")) == [0, 2]
        assert list(project.listed("uncertain", [2, 1])) == [2, 0]
        assert project.labelled() == [1]
        assert project.new_track(1) == 4


@pytest.mark.fast
def test_an_object_that_another_has_changed_is_not_overwritten(folder):
    with opened(folder) as project:
        saved(project, 0, add("a"), add("b", 30))
        saved(project, 0, {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 8)})
        edits = [add("c", 60), {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 40)}]
        outcome = project.edit(0, edits)
        assert isinstance(outcome, Conflict)
        assert [one.revision for one in outcome.objects] == [2]
        assert "c" not in project.state(0).objects  # all or nothing
        saved(
            project, 0, {"do": "replace", "id": "b", "was": 1, "object": drawn("b", 33)}
        )  # another object: no conflict
        outcome = project.edit(0, [{"do": "remove", "id": "a", "was": 1}])
        assert isinstance(outcome, Conflict)
        saved(project, 0, {"do": "remove", "id": "a", "was": 2})
        outcome = project.edit(0, [{"do": "replace", "id": "a", "was": 2, "object": drawn("a", 40)}])
        assert isinstance(outcome, Conflict)
        assert (outcome.objects, outcome.removed) == ([], ["a"])
        saved(project, 0, add("a", 5))  # undo of the removal: a new revision, which no old edit fits
        outcome = project.edit(0, [{"do": "replace", "id": "a", "was": 1, "object": drawn("a", 40)}])
        assert isinstance(outcome, Conflict)


@pytest.mark.fast
def test_an_edit_that_is_sent_again_is_saved_once(folder):
    with opened(folder) as project:
        saved(project, 0, add("a"))
        size = (project.folder / "journal.jsonl").stat().st_size
        again = saved(project, 0, add("a"))
        assert (again.again, again.state.version, [one.id for one in again.changed]) == (True, 1, ["a"])
        edit = {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 20)}
        assert saved(project, 0, edit).state.version == 2
        assert saved(project, 0, edit).again
        assert saved(project, 0, {"do": "remove", "id": "a", "was": 2}).state.version == 3
        assert saved(project, 0, {"do": "remove", "id": "a", "was": 2}).again
        assert isinstance(project.edit(0, [add("a"), add("a", 30)]), Conflict)
        both = saved(project, 0, add("b"), {"do": "replace", "id": "b", "was": 99, "object": drawn("b", 9)})
        assert both.state.objects["b"].counts == rle(9, 5, 19, 15)["counts"]
        assert (project.folder / "journal.jsonl").stat().st_size > size


def masked(rle: Any) -> list[Any]:
    """The edit that adds an object with any value as its mask."""
    return [{"do": "add", "object": {**drawn(), "rle": rle}}]


EMPTY = encode_counts(np.array([SIZE[0] * SIZE[1]])).decode()
BAD = {
    "nothing": ([], "a list of 1 to"),
    "no list": ({"do": "add"}, "a list of 1 to"),
    "no object": ([3], "an edit must be an object, got 3"),
    "unknown": ([{"do": "explode"}], "do must be add, replace, remove, dismiss or done, got 'explode'"),
    "no id": ([{"do": "remove", "was": 1}], "id must be a text, got None"),
    "no revision": ([{"do": "remove", "id": "a", "was": True}], "was must be the revision"),
    "other id": ([{"do": "replace", "id": "a", "was": 1, "object": drawn("b")}], "the object has the id 'b'"),
    "hostile id": ([add("<script>alert(1)</script>")], "letters, digits"),
    "long id": ([add("a" * 65)], "letters, digits"),
    "label": ([add(label=2)], "an integer below 2"),
    "label type": ([add(label="cat")], "an integer below 2"),
    "no mask": (masked(None), "rle must be an object with size and counts"),
    "list of runs": (masked({"size": [60, 80], "counts": [0, 4800]}), "rle must"),
    "other size": (masked(rle(5, 5, 9, 9, (80, 60))), "is 80 x 60, expected 60 x"),
    "short runs": (masked({"size": [60, 80], "counts": "0T1"}), "cover"),
    "broken runs": (masked({"size": [60, 80], "counts": "\u00e9~"}), "not a valid"),
    "huge run": (masked({"size": [60, 80], "counts": "ooooooooooo1"}), "mask 0"),
    "endless runs": (masked({"size": [60, 80], "counts": "01" * 20_000}), "more runs than the image has pixels"),
    "empty mask": (masked({"size": [60, 80], "counts": EMPTY}), "no pixels"),
    "huge size": (masked({"size": [1 << 40, 80], "counts": "0"}), "size"),
    "nobody": ([{"do": "add", "object": {**drawn(), "made": []}}], "made must be a list of at least one entry"),
    "how": ([add(how="magic")], "an entry of made must have by"),
    "clicks": ([{"do": "add", "object": {**drawn(), "made": [{"by": "a", "how": "box", "clicks": -1}]}}], "a count"),
    "track": ([add(track=0)], "track must be a positive integer"),
    "score": ([add(score="high")], "score must be a number"),
    "done": ([{"do": "done", "value": 1}], "value must be true or false"),
    "dismiss": ([{"do": "dismiss", "ids": [1], "value": True}], "ids must be a list of ids of suggestions"),
}  # fmt: skip


@pytest.mark.fast
def test_invalid_edits_are_refused_and_change_nothing(folder):
    with opened(folder) as project:
        size = (project.folder / "journal.jsonl").stat().st_size
        for edits, message in BAD.values():
            with pytest.raises(UsageError, match=message):
                project.edit(0, edits)
        for image in (-1, 3, True, "0", 1.0, None):
            with pytest.raises(NotFoundError, match="there is no image"):
                project.check(image)
        for name in ("", " ", "cat", "a\nb", "x" * 300, 5, "\u202eevil"):
            with pytest.raises(UsageError, match="class"):
                project.add_class(name)
        assert (project.folder / "journal.jsonl").stat().st_size == size


PARTS = st.sampled_from(
    ["do", "add", "replace", "remove", "done", "dismiss", "id", "ids", "object", "was", "value", "label", "rle", "size",
     "counts", "made", "by", "how", "click", "clicks", "score", "track", "points", "box", "a", "0", ""]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | PARTS | st.text(max_size=4) | st.just(drawn()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PARTS, inner, max_size=6),
    max_leaves=12,
)


@pytest.mark.fast
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES, do=PARTS)
def test_whatever_is_sent_is_read_or_refused(value, do):
    shapes = [value, [value], [{"do": do, "id": "a", "was": 1, "object": value, "value": value, "ids": value}]]
    if isinstance(value, dict):
        shapes += [[{"do": do, **value}], [{"do": "add", "object": {**drawn(), **value}}]]
    for shape in shapes:
        with suppress(UsageError):
            read_edits(shape, SIZE, 2)
    for message in (value, {"points": value}, {"box": value}, {"rle": value}):
        if isinstance(message, dict):
            with suppress(UsageError):
                read_prompt(message, SIZE)


@pytest.mark.fast
def test_one_process_annotates_a_folder(folder):
    with opened(folder) as project:
        with pytest.raises(UsageError, match="another process annotates here"):
            opened(folder)
        project.close()
        with opened(folder):
            pass


@pytest.mark.fast
def test_annotations_belong_to_files_and_not_to_positions(folder, tmp_path):
    with opened(folder) as project:
        saved(project, 1, add("a"))
    photos(folder / "a-new", 1)
    with opened(folder) as project:
        assert [project.about(n)["name"] for n in range(4)] == [
            "a-new/photo-1.png", "photo-1.png", "photo-2.png", "photo-3.png",
        ]  # fmt: skip
        assert project.about(2)["objects"] == 1
        saved(project, 0, add("b"))
    (folder / "photo-2.png").rename(tmp_path / "photo-2.png")
    with opened(folder) as project:
        assert (len(project), project.absent) == (3, 1)
        project.compact()
    (tmp_path / "photo-2.png").rename(folder / "photo-2.png")
    with opened(folder) as project:
        assert (project.absent, list(project.state(2).objects)) == (0, ["a"])
    with pytest.raises(UsageError, match=r"has annotations of other images, such as .*--out"):
        Project(FolderImages(photos(tmp_path / "other" / "x").parent), default_folder(folder))


@pytest.mark.fast
def test_an_image_of_another_size_is_not_shown_with_masks_that_do_not_fit(folder):
    with opened(folder) as project:
        saved(project, 0, add("a"))
    Image.new("RGB", (81, 60)).save(folder / "photo-1.png")
    with (
        opened(folder) as project,
        pytest.raises(DataError, match="was annotated with 80 x 60 pixels, but has 81 x 60"),
    ):
        project.state(0)


NAMES = [
    "a b",
    "\u00fcml\u00e4ut \u732b",
    "line\nbreak",
    "<img src=x onerror=alert(1)>",
    "quote'\"",
    "a..b",
    "-flag",
    "%2e%2e",
]


@pytest.mark.fast
def test_any_file_name_can_be_annotated(tmp_path):
    names = [f"{name}.png" for name in NAMES]
    folder = photos(tmp_path / "photos", 1)
    for name in names:
        (folder / name).write_bytes((folder / "photo-1.png").read_bytes())
    raw = bytes(folder) + b"/\xff\xfe.png"
    with open(raw, "wb") as file:  # noqa: PTH123 - a name that is not UTF-8
        file.write((folder / "photo-1.png").read_bytes())
    with opened(folder) as project:
        for index in range(len(project)):
            saved(project, index, add("a", 5 + index))
        shown = [project.about(index)["name"] for index in range(len(project))]
        assert "line\\nbreak.png" in shown
        assert "\\xff\\xfe.png" in shown
        json.dumps(shown).encode()
    with opened(folder) as project:
        assert len(project) == len(names) + 2
        for index in range(len(project)):
            assert project.state(index).objects["a"].counts == rle(5 + index, 5, 15 + index, 15)["counts"]


@pytest.mark.fast
def test_photos_of_kinds_that_are_not_read_are_named(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    for name in ("a.HEIC", "b.heic", "line\nbreak.dng", "z.cr2", "notes.txt", ".hidden.heic"):
        (folder / name).write_bytes(b"")
    source = open_source(folder)
    assert len(source) == 1
    assert isinstance(source, FolderImages)
    assert of_unread(source.left_out) == (
        "4 images of other kinds left out (a.HEIC, b.heic, line\\nbreak.dng, ...); convert them to JPEG or PNG"
    )
    (folder / "photo-1.png").unlink()
    with pytest.raises(UsageError, match=r"no images in this folder; 4 images of other kinds left out"):
        open_source(folder)


@pytest.mark.fast
def test_the_journal_is_compacted(folder, monkeypatch):
    monkeypatch.setattr(module, "COMPACT_ABOVE", 5_000)
    monkeypatch.setattr(journal, "sync_file", lambda file: None)  # for speed
    random_ = random.Random(0)
    expected: dict[str, int] = {}
    with opened(folder) as project:
        path = project.folder / "journal.jsonl"
        for step in range(150):
            id = random_.choice("abcdefgh")
            state = project.state(0)
            if id not in state.objects:
                saved(project, 0, add(id, step % 60))
            else:
                was = state.objects[id].revision
                saved(project, 0, {"do": "replace", "id": id, "was": was, "object": drawn(id, step % 60)})
            expected[id] = step % 60
        length = path.stat().st_size
        assert length < 60_000
        project.compact()
        assert path.stat().st_size < 5_000
    with opened(folder) as project:
        state = project.state(0)
        assert state.version == 150
        assert {id: one.counts for id, one in state.objects.items()} == {
            id: rle(x0, 5, x0 + 10, 15)["counts"] for id, x0 in expected.items()
        }


@pytest.mark.fast
def test_a_view_of_a_moment_is_not_changed_by_later_edits(folder):
    with opened(folder) as project:
        saved(project, 0, add("a"))
        view = project.snapshot()
        saved(project, 0, {"do": "remove", "id": "a", "was": 1})
        saved(project, 1, add("b"))
        project.compact()
        saved(project, 0, add("c"))
        assert list(view.state(0).objects) == ["a"]
        assert not view.state(1).objects
        view.close()
        assert list(project.state(0).objects) == ["c"]


@pytest.mark.fast
def test_any_history_that_is_cut_off_anywhere_is_the_state_of_some_moment(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "sync_file", lambda file: None)  # for speed
    moments: list[dict[int, dict[str, str]]] = [{0: {}, 1: {}}]
    with opened(folder) as project:
        random_ = random.Random(1)
        for step in range(30):
            image, id = random_.randrange(2), random_.choice("abc")
            there = project.state(image).objects.get(id)
            if there is None:
                saved(project, image, add(id, step))
            elif random_.random() < 0.5:
                saved(project, image, {"do": "remove", "id": id, "was": there.revision})
            else:
                saved(project, image, {"do": "replace", "id": id, "was": there.revision, "object": drawn(id, step + 1)})
            moments.append({n: {k: v.counts for k, v in project.state(n).objects.items()} for n in (0, 1)})
        data = (project.folder / "journal.jsonl").read_bytes()
    source, seen = open_source(folder), 0
    for length in range(300, len(data), 97):
        cut = tmp_path / f"cut-{length}"
        cut.mkdir()
        (cut / "journal.jsonl").write_bytes(data[:length])
        with Project(source, cut, ("cat", "dog")) as project:
            found = {n: {k: v.counts for k, v in project.state(n).objects.items()} for n in (0, 1)}
        assert found in moments
        assert moments.index(found) >= seen
        seen = moments.index(found)
    assert seen >= 28


# ---- existing annotations --------------------------------------------------------------------------------------------


def coco(folder: Path) -> Path:
    """A data set with a polygon, a mask with a hole, a crowd region and keypoints; ids are not consecutive."""
    photos(folder / "train", 2)
    hole = np.zeros(SIZE, bool)
    hole[10:30, 10:40] = True
    hole[15:20, 20:30] = False
    from maskwright.structures import Masks

    code = Masks.from_dense(__import__("torch").from_numpy(hole)[None]).rle()[0]
    counts = {"size": list(SIZE), "counts": code["counts"].decode()}
    triangle = [40.25, 10.5, 70.75, 12.0, 50.0, 50.125]
    entries = [image_entry(7, "photo-1.png", SIZE), image_entry(9, "photo-2.png", SIZE)]
    annotations = [
        {"id": 30, "image_id": 7, "category_id": 5, "segmentation": [triangle], "bbox": [40.25, 10.5, 30.5, 39.625],
         "area": 600, "iscrowd": 0, "keypoints": [50, 20, 2, 0, 0, 0], "num_keypoints": 1},
        {"id": 12, "image_id": 7, "category_id": 3, "segmentation": counts, "bbox": [10, 10, 30, 20], "area": 550,
         "iscrowd": 1, "keypoints": [0] * 6, "num_keypoints": 0},
        {"id": 99, "image_id": 9, "category_id": 3, "segmentation": [[1, 1, 20, 1, 20, 20]], "bbox": [1, 1, 19, 19],
         "area": 180, "iscrowd": 0, "keypoints": [0] * 6, "num_keypoints": 0},
    ]  # fmt: skip
    categories = coco_categories(("cat", "dog"), (3, 5), None, ("nose", "tail"))
    write_coco_json(folder / "annotations" / "person_keypoints_train.json", entries, annotations, categories)
    return folder


def test_annotations_of_a_data_set_are_imported(tmp_path):
    folder = coco(tmp_path / "set")
    with opened(folder, classes=("fox",)) as project:
        assert project.classes == ("cat", "dog", "fox")
        assert [project.about(n)["objects"] for n in (0, 1)] == [2, 1]
        state = project.state(0)
        assert list(state.objects) == ["30", "12"]
        assert [one.label for one in state.objects.values()] == [1, 0]
        assert state.objects["12"].public(SIZE)["crowd"] is True
        assert state.objects["30"].made[0]["how"] == "import"
        changed = {"do": "replace", "id": "12", "was": 0, "object": drawn("12", 30)}
        after = saved(project, 0, changed, add("new", 60)).state.objects
        assert {k: after["12"].kept[k] for k in ("number", "crowd")} == {"number": 12, "crowd": True}
        assert "source" not in after["12"].kept
        assert after["30"] == state.objects["30"]
    with opened(folder, classes=("fox",)) as project:  # a removal that is undone, at once, later, and after compacting
        original = project.state(1).objects["99"]
        sent = {**original.public(SIZE), "track": None}
        for again in range(3):
            revision = project.state(1).objects["99"].revision
            saved(project, 1, {"do": "remove", "id": "99", "was": revision})
            if again == 1:
                project.compact()
            if again:
                project.close()
                project = opened(folder, classes=("fox",))
            back = saved(project, 1, {"do": "add", "object": sent}).state.objects["99"]
            assert back.kept == original.kept
        saved(project, 1, {"do": "remove", "id": "99", "was": back.revision})
        other = saved(project, 1, {"do": "add", "object": drawn("99", 9)}).state.objects["99"]
        assert other.kept == {"number": 99, "keypoints": original.kept["keypoints"]}
        project.close()
    (folder / "annotations" / "person_keypoints_train.json").write_text("{}")  # whatever becomes of the data set ...
    source = FolderImages(folder)
    with Project(source, default_folder(folder)) as project:  # ... what was opened and edited is in the journal
        assert list(project.state(0).objects) == ["30", "12", "new"]


@pytest.mark.fast
def test_colours_of_classes_differ():
    colours = [colour(number) for number in range(24)]
    assert len(set(colours)) == 24
    assert all(len(value) == 7 and value[0] == "#" for value in colours)


@pytest.mark.fast
def test_objects_are_the_same_after_storing():
    one = Object("a", None, "abc", ({"by": "x", "how": "box", "clicks": 2},), 4, 0.5, 7, {"number": 3, "crowd": True})
    assert Object.of_stored(json.loads(json.dumps(one.stored()))) == one
