"""Weights that are installed with the library or with other distributions."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
import sys
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import maskwright as mw
from maskwright import cli
from maskwright.checkpoints import CheckpointWarning, list_checkpoints, read_metadata, shipping
from maskwright.data import Scenes
from maskwright.errors import CheckpointError, UsageError
from maskwright.structures import Instances, Masks
from maskwright.systems.kinds.classless import Classless, merged
from maskwright.web.assistant import default_weights
from tests.shipping import CLASSES, ROOT, Distribution, mask_rcnn, publisher, sam

PACKAGE = ROOT / "src/maskwright/weights"
SECOND = ROOT / "weights/src/maskwright_weights"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    torch.manual_seed(0)
    distribution = Distribution(tmp_path_factory.mktemp("site"))
    figures = [publisher().Figure("mask AP", 12.5, "60 unseen scenes")]
    distribution.add("tiny-scenes", mask_rcnn(), figures=figures, limits="A test.")
    distribution.add("tiny-clicks", sam(), "prompts")
    return distribution


@pytest.fixture
def installed(made: Distribution, monkeypatch: pytest.MonkeyPatch) -> Distribution:
    """The distribution, with nothing else installed."""
    monkeypatch.setattr(shipping, "_own_folder", lambda: made.root / "nowhere")
    monkeypatch.setattr(shipping, "entry_points", _only("test-weights", shipping.entry_points))
    made.install(monkeypatch)
    return made


def _only(name, entry_points):
    return lambda group: [point for point in entry_points(group=group) if point.name == name]


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights are installed; the second distribution has some."""
    manifest = {"format": 1, "weights": [], "elsewhere": {"maskwright-weights": ["eomt-scenes"]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(shipping, "_own_folder", lambda: tmp_path)
    monkeypatch.setattr(shipping, "entry_points", lambda group: [])
    return tmp_path


# ---- the files of this repository ------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("folder", [PACKAGE, SECOND], ids=["library", "second distribution"])
def test_every_file_of_the_repository_has_its_hash_and_its_card(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    entries = [shipping.parsed_entry(value, folder, "here") for value in manifest["weights"]]
    assert {p.name for p in folder.glob("*.safetensors")} == {entry.file for entry in entries}
    for entry in entries:
        data = entry.path.read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes), entry.file
        assert len(data) <= 25_000_000
        assert (folder / f"{entry.name}.md").read_text("utf-8") == entry.card()
        metadata = read_metadata(entry.path)
        assert metadata["system"] == entry.system
        assert metadata["source"]["weights_licence"] == entry.licence == "Apache-2.0"
        assert metadata["classes"] == ["object"] or metadata["source"]["classless"] is True
        assert entry.limits
        assert entry.command


@pytest.mark.fast
def test_the_library_knows_the_names_of_the_second_distribution_and_holds_two_files_at_most():
    own, second = (json.loads((folder / "manifest.json").read_text("utf-8")) for folder in (PACKAGE, SECOND))
    assert len(own["weights"]) <= 2
    assert own["elsewhere"].get("maskwright-weights", []) == [value["name"] for value in second["weights"]]
    project = tomllib.loads((ROOT / "weights/pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == shipping.DISTRIBUTION
    assert project["entry-points"][shipping.GROUP] == {"maskwright-weights": "maskwright_weights"}


# ---- listing and loading ---------------------------------------------------------------------------------------------


def test_installed_weights_are_listed_with_their_cards(installed, capsys):
    found = mw.shipped()
    assert [(e.name, e.system, e.role, e.distribution) for e in found] == [
        ("tiny-scenes", "mask-rcnn", "instances", "test-weights"), ("tiny-clicks", "sam", "prompts", "test-weights"),
    ]  # fmt: skip
    assert found[0].path.stat().st_size == found[0].bytes
    assert cli.main(["checkpoints"]) == 0
    assert "tiny-scenes" in capsys.readouterr().out.splitlines()[0]
    assert cli.main(["checkpoints", "tiny-scenes"]) == 0
    card = capsys.readouterr().out
    for words in (found[0].sha256, "generated images", "| mask AP | 12.5 | 60 unseen scenes |", "A test.", "float16"):
        assert words in card
    assert cli.main(["checkpoints", "shipped"]) == 0  # those that find objects
    assert capsys.readouterr().out == card
    assert cli.main(["checkpoints", "shipped", "--system", "sam"]) == 0
    assert capsys.readouterr().out.startswith("# tiny-clicks")


def test_the_card_belongs_to_what_would_be_loaded(made, nothing, monkeypatch, capsys):
    published = list_checkpoints()[0].name
    own = replace(shipping._entries(made.folder, "x")[0], name=published)
    monkeypatch.setattr(shipping, "shipped", lambda: [own])
    assert cli.main(["checkpoints", published]) == 0
    assert own.sha256 in capsys.readouterr().out


def test_objects_of_generated_classes_are_labelled_object(installed):
    system = mw.load("tiny-scenes")
    assert isinstance(system, Classless)
    assert isinstance(system, type(mask_rcnn()))
    assert (system.classes, system.stored_classes) == (("object",), CLASSES)
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    image = Scenes(1, (96, 96), classes=("disc",), seed=3)[0].image
    found = mw.predict(system, image, score_threshold=0.0, device="cpu")
    assert found.classes == ("object",)
    assert len(found.instances) > 0
    assert set(found.instances.labels.tolist()) == {0}
    iou = found.instances.masks.iou(found.instances.masks).fill_diagonal_(0)
    assert iou.max() < 0.6
    assert bool((found.instances.scores.diff() <= 0).all())
    assert mw.load("shipped").source["name"] == "tiny-scenes"
    assert "tiny-scenes" in mw.load("tiny-scenes", commercial_ok=True).source["name"]
    with pytest.raises(UsageError, match="cannot be trained on"):
        system.losses(None, [])


def test_copies_and_files_of_classless_systems_are_classless(installed, tmp_path):
    system = mw.load("tiny-scenes")
    mw.save(system, tmp_path / "copy.safetensors")
    again = mw.load(tmp_path / "copy.safetensors")
    for other in (copy.deepcopy(system), pickle.loads(pickle.dumps(system)), again):
        assert isinstance(other, Classless)
        assert (other.classes, other.stored_classes) == (("object",), CLASSES)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in system.state_dict().items())
    assert again.decode.__doc__ == mask_rcnn().decode.__doc__
    tuned = mw.load(tmp_path / "copy.safetensors", classes=("cell", "contour-001"))
    assert not isinstance(tuned, Classless)
    assert "classless" not in tuned.source
    assert tuned.classes == ("cell", "contour-001")


def test_classless_systems_are_evaluated_regardless_of_class(installed):
    data = Scenes(2, (96, 96), classes=("disc", "box"), seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mw.evaluate(mw.load("tiny-scenes"), data, device="cpu")
    assert result.classes == ("object",)
    assert 0 <= result["segm/AP"] < 0.5


@pytest.mark.fast
def test_overlapping_detections_of_different_classes_become_one_object():
    planes = torch.zeros(4, 20, 20, dtype=torch.bool)
    planes[0, :10, :10] = planes[1, :10, :9] = planes[2, 12:, 12:] = planes[3, :9, :10] = True
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 9, 10], [12, 12, 20, 20], [0, 0, 10, 9]]).float()
    scores = torch.tensor([0.5, 0.4, 0.6, 0.1])[[2, 0, 1, 3]]
    order = torch.tensor([2, 0, 1, 3])
    objects = Instances((20, 20), boxes, torch.arange(4), Masks.from_dense(planes), torch.tensor([0.5, 0.4, 0.6, 0.1]))
    found = merged(objects[order], 0.3, None)
    assert scores.tolist() == objects[order].scores.tolist()
    assert found.boxes.tolist() == [[0, 0, 10, 10], [12, 12, 20, 20]]
    torch.testing.assert_close(found.scores, torch.tensor([1 - 0.5 * 0.6 * 0.9, 0.6]))
    assert found.labels.tolist() == [0, 0]
    assert len(merged(objects[order], 0.65, None)) == 1
    assert len(merged(objects[order], None, 1)) == 1
    assert len(merged(objects[:0], 0.3, 1)) == 0


def test_the_same_weights_give_the_same_file(tmp_path, made):
    system = mask_rcnn()
    for name in ("a", "b"):
        mw.save(system, tmp_path / f"{name}.safetensors")
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    length = int.from_bytes(first[:8], "little")
    keys = list(json.loads(first[8 : 8 + length])["__metadata__"])
    assert keys == sorted(keys), "in no order of a hash table"


# ---- what "shipped" stands for ---------------------------------------------------------------------------------------


def test_shipped_stands_for_the_weights_that_fit_what_is_asked(installed, made, monkeypatch):
    assert shipping.resolved("shipped") == "tiny-scenes"
    assert shipping.resolved("shipped", "prompts") == "tiny-clicks"
    assert shipping.resolved("best.safetensors", "prompts") == "best.safetensors"
    assert shipping.resolved(None) is None
    assert default_weights() == made.folder / "tiny-clicks.safetensors"
    with pytest.raises(CheckpointError, match="no installed weights follow objects through a video; installed are"):
        shipping.resolved("shipped", "video")
    only = [entry for entry in mw.shipped() if entry.role == "prompts"]
    monkeypatch.setattr(shipping, "shipped", lambda: only)
    with pytest.raises(CheckpointError, match="no installed weights find objects without prompts; installed are tiny"):
        shipping.resolved("shipped")


def test_the_command_line_takes_shipped(installed, tmp_path, capsys, monkeypatch):
    Scenes(1, (96, 96), classes=("disc",), seed=3).write(tmp_path / "data", "val")
    image, out = str(next((tmp_path / "data/val").iterdir())), str(tmp_path / "found")
    line = ["predict", image, "--weights", "shipped", "-o", out, "--device", "cpu", "--format", "coco"]
    assert cli.main([*line, "--score-threshold", "0.01"]) == 0
    assert json.loads((tmp_path / "found/pictures.json").read_text())["categories"][0]["name"] == "object"
    capsys.readouterr()
    assert cli.main([*line, "-o", str(tmp_path / "shown")]) == 0
    assert "with a score of at least 0.25 (--score-threshold)" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("maskwright.systems.kinds.classless.Classless.shown_score", 1.0)
        assert cli.main(line) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("0 objects")
    assert "try --score-threshold 0.1" in shown.err
    line[line.index("shipped")] = "tiny-clicks"
    assert cli.main(line) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("0 objects")
    assert "note: no prompts; give --points or --boxes" in shown.err
    line[line.index("tiny-clicks")] = "shipped"
    assert cli.main([*line, "--boxes", "10,10,50,60"]) == 0
    assert len(json.loads((tmp_path / "found/results.json").read_text())) == 1
    capsys.readouterr()
    assert cli.main(["evaluate", "shipped", "--data", str(tmp_path / "data"), "--device", "cpu"]) == 0
    assert "every object counts as 'object'" in capsys.readouterr().out


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_empty_registry_is_no_failure(nothing, capsys):
    assert mw.shipped() == []
    sentence = "none are installed; eomt-scenes in maskwright-weights: `pip install maskwright-weights`"
    for name in ("shipped", "eomt-scenes"):
        with pytest.raises(CheckpointError, match="maskwright-weights") as caught:
            mw.load(name)
        assert "`pip install ./weights`" in str(caught.value)
    with pytest.raises(CheckpointError, match="no installed weights find objects without prompts") as caught:
        mw.load("shipped")
    assert sentence in str(caught.value)
    with pytest.raises(CheckpointError, match="did you mean eomt-scenes"):
        mw.load("eomt-scene")
    assert cli.main(["predict", "x.jpg", "--weights", "shipped"]) == 2
    assert cli.main(["checkpoints", "--system", "eomt"]) == 0


def test_the_list_and_the_cards_name_weights_that_are_not_installed(nothing, capsys):
    assert cli.main(["checkpoints"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=1) == [
        "eomt-scenes", f"not installed; {shipping.INSTALL}"
    ]  # fmt: skip
    assert cli.main(["checkpoints", "eomt-scenes"]) == 2
    assert "`pip install maskwright-weights`" in capsys.readouterr().err
    assert cli.main(["checkpoints", "eomt-scene"]) == 2
    assert "did you mean 'eomt-scenes'?" in capsys.readouterr().err


def test_the_list_states_whether_commercial_use_is_allowed(made, nothing, monkeypatch, capsys):
    own, other = (replace(entry, licence=licence) for entry, licence in
                  zip(shipping._entries(made.folder, "x"), ("Apache-2.0", "CC-BY-NC-4.0"), strict=True))  # fmt: skip
    monkeypatch.setattr(shipping, "shipped", lambda: [own, other])
    for flags, expected in (([], ["yes; Apache-2.0", "no; CC-BY-NC-4.0"]), (["--commercial-ok"], ["yes; Apache-2.0"])):
        assert cli.main(["checkpoints", *flags]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny-")]
        assert [line.split("commercial use: ")[1] for line in lines] == [f"{words}; installed" for words in expected]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hash", "differs from the file that changed-hash was built with"),
        ("size", "differs from the file that changed-size was built with"),
        ("gone", "is missing; install changed-gone again"),
    ],
)
def test_a_file_that_was_changed_is_refused(change, words, tmp_path, monkeypatch):
    distribution = Distribution(tmp_path, f"changed-{change}")  # packages stay imported: each needs its own name
    path = distribution.add("tiny-clicks", sam(), "prompts").path
    monkeypatch.setattr(shipping, "entry_points", _only(f"changed-{change}", shipping.entry_points))
    monkeypatch.setattr(shipping, "_own_folder", lambda: tmp_path / "nowhere")
    distribution.install(monkeypatch)
    mw.load("tiny-clicks")
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if change == "hash" else data + b"\0")
    with pytest.raises(CheckpointError, match=words):
        mw.load("tiny-clicks")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("[", "cannot be read as JSON"),
        ("{}", "must be an object with a list 'weights'"),
        ('{"format": 2, "weights": []}', "has format 2, this version reads format 1"),
        ('{"format": 1, "weights": [{"name": "x"}]}', "the field 'file' of x must be a text"),
        ('{"format": 1, "weights": [3]}', "the field 'name' of .unnamed. must be a text"),
    ],
)
def test_a_damaged_manifest_of_another_distribution_is_ignored_with_its_reason(manifest, words, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(manifest)
    monkeypatch.setattr(shipping, "_folders", lambda: [("broken-weights", tmp_path)])
    with pytest.warns(CheckpointWarning, match=f"the weights of broken-weights are ignored: .*{words}"):
        assert mw.shipped() == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("file", "../x.safetensors", "must be a .safetensors file in the same folder"),
        ("file", "x.pth", "must be a .safetensors file in the same folder"),
        ("role", "clicks", "the role of x must be one of instances, prompts, video"),
        ("bytes", "many", "the field 'bytes' of x must be an integer"),
        ("figures", [3], "the figures of x must be lists of a text, a number and a text"),
        ("figures", [["AP", 10**400, ""]], "the figures of x must be lists of a text, a number and a text"),
        ("file", "..\\x.safetensors", "must be a .safetensors file in the same folder"),
        ("file", "C:x.safetensors", "must be a .safetensors file in the same folder"),
        ("file", "x\0.safetensors", "must be a .safetensors file in the same folder"),
        ("bytes", 10**400, "the field 'bytes' of x must be the size of a file"),
        ("bytes", -1, "the field 'bytes' of x must be the size of a file"),
        ("bytes", True, "the field 'bytes' of x must be an integer"),
        ("name", "", "the name '' must be of printable characters"),
        ("name", "x\n", "must be of printable characters"),
        ("name", "shipped", "the name 'shipped' is reserved"),
        ("name", "scenes", "the name 'scenes' is reserved"),
    ],
)
def test_fields_of_a_manifest_are_checked(field, value, words):
    good = {
        "name": "x", "file": "x.safetensors", "sha256": "0", "bytes": 1, "system": "sam", "preset": "sam-small",
        "role": "prompts", "data": "", "licence": "", "command": "", "seed": 0, "date": "", "version": "", "code": "",
    }  # fmt: skip
    assert shipping.parsed_entry(good, Path(), "here").name == "x"
    with pytest.raises(CheckpointError, match=words):
        shipping.parsed_entry({**good, field: value}, Path(), "here")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("failing", "import no_such_module", "cannot be imported .*no_such_module"),
        ("raising", "raise RuntimeError('no licence')", "cannot be imported .RuntimeError: no licence"),
        ("ending", "raise SystemExit(3)", "cannot be imported .SystemExit: 3"),
        ("misspelt", "def (", "cannot be imported .SyntaxError"),
        ("bare", "", "has no manifest.json"),
        ("spread", None, "is not in one folder"),
        ("zipped", "", "is not in one folder"),
        ("unnamed", "", "cannot be imported"),
    ],
)
def test_a_distribution_that_cannot_be_used_is_ignored_with_its_reason(kind, code, words, tmp_path, monkeypatch):
    distribution = Distribution(tmp_path / "site", f"{kind}-weights")
    (distribution.folder / "__init__.py").write_text(f"{code}\n")
    if code is None:
        (distribution.folder / "__init__.py").unlink()
    if kind == "unnamed":
        next(distribution.root.glob("*.dist-info/entry_points.txt")).write_text(
            "[maskwright.weights]\nunnamed-weights = a b\n"
        )
    if kind == "zipped":
        distribution.root = Path(shutil.make_archive(str(tmp_path / "site"), "zip", distribution.root))
    monkeypatch.setattr(shipping, "_own_folder", lambda: tmp_path / "nowhere")
    monkeypatch.setattr(shipping, "entry_points", _only(f"{kind}-weights", shipping.entry_points))
    distribution.install(monkeypatch)
    with pytest.warns(CheckpointWarning, match=f"{kind}-weights are ignored: its package .* {words}"):
        assert mw.shipped() == []


@pytest.mark.fast
def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    size = (tmp_path / "x.safetensors").stat().st_size
    rest = ("sam", "sam-small", "prompts", "", "", "", 0, "", "", "")
    entry = shipping.Shipped("x", "x.safetensors", "0", size, *rest, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read"):
        entry.verified()


def test_only_systems_without_a_persons_classes_are_published(tmp_path):
    distribution = Distribution(tmp_path)
    with pytest.raises(UsageError, match="classes must be generated ones or 'object', got cat"):
        distribution.add("cats", mw.create("yolact-small", classes=("cat",)))
    one = distribution.add("one", mask_rcnn(classes=("object",)))
    loaded = mw.load(one.path)
    assert loaded.classes == ("object",)
    assert "proposals" in loaded.tasks, "is evaluated regardless of class"
    with pytest.raises(UsageError, match="is a preset of solov2, the file holds sam"):
        distribution.add("other", sam(), preset="solov2-small")
    for name in ("sam-small", "sam", "shipped", "scenes", "sam-vit-b", "é", "..", "a/b"):
        with pytest.raises(UsageError, match="must be a new name"):
            publisher().publish(one.path, distribution.folder, name=name, preset="mask-rcnn-small", role="instances",
                                data="", seed=0)  # fmt: skip


def test_what_is_published_stays_when_its_successor_is_refused(tmp_path):
    distribution = Distribution(tmp_path)
    entry = distribution.add("one", mask_rcnn())
    before = {path.name: path.read_bytes() for path in distribution.folder.iterdir()}
    script = publisher()
    script.LARGEST = 1000
    mw.save(mask_rcnn(), tmp_path / "two.safetensors")
    for name in ("one", "two"):
        with pytest.raises(UsageError, match="at most 1000 are allowed"):
            script.publish(tmp_path / "two.safetensors", distribution.folder, name=name, preset="mask-rcnn-small",
                           role="instances", data="", seed=0)  # fmt: skip
    assert {path.name: path.read_bytes() for path in distribution.folder.iterdir()} == before
    assert entry.verified() == entry.path


def test_a_name_belongs_to_one_distribution(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish.py", "--name", "sam-small-scenes", "--limits", "None."])
    with pytest.raises(SystemExit):
        publisher().main()
    assert "has sam-small-scenes already" in capsys.readouterr().err
