"""A run can start from installed weights: from the whole network of the same system, or from a backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import maskwright as mw
from maskwright.checkpoints import shipping
from maskwright.checkpoints.folders import CheckpointWarning
from maskwright.data import Scenes
from maskwright.errors import CheckpointError, UsageError
from maskwright.systems import names
from maskwright.systems.kinds.classless import Classless
from maskwright.training import pretrained
from maskwright.training.pretrained import take_pretrained
from maskwright.training.setup import make_system
from tests.shipping import Distribution, mask_rcnn, sam
from tests.systems.tiny import build, tiny_options


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    distribution = Distribution(tmp_path_factory.mktemp("site"), "pretrained-weights")
    system = mask_rcnn()
    system.preprocess = replace(system.preprocess, mean=(103.5, 116.3, 123.7), divide=1.0, channels="BGR")
    distribution.add("clicks", sam(), "prompts")
    distribution.add("rcnn-scenes", system)
    return distribution


@pytest.fixture(autouse=True)
def installed(made, monkeypatch):
    find = shipping.entry_points
    monkeypatch.setattr(shipping, "_own_folder", lambda: made.root / "nowhere")
    monkeypatch.setattr(
        shipping, "entry_points", lambda group: [p for p in find(group=group) if p.name == "pretrained-weights"]
    )
    made.install(monkeypatch)


def equal(system, other, keys):
    own, theirs = system.state_dict(), other.state_dict()
    return [key for key in keys if torch.equal(own[key], theirs[key])]


def test_the_same_system_takes_everything_but_the_rows_of_classes():
    system, untouched, giver = (build("mask-rcnn", classes=("cell", "debris")) for _ in range(3))
    giver = mw.load("rcnn-scenes")
    (said,) = take_pretrained(system, "scenes")
    rows = set(system.class_rows())
    keys = set(system.state_dict())
    assert set(equal(system, giver, keys - rows)) == keys - rows
    assert set(equal(system, untouched, rows)) == rows
    assert (system.preprocess.mean, system.preprocess.channels) == (giver.preprocess.mean, "BGR")
    assert system.source["pretrained"] == "rcnn-scenes"
    assert system.source["weights_licence"] == "Apache-2.0"
    assert said.startswith("pretrained, from rcnn-scenes: backbone, neck, rpn, boxes, masks (")
    assert f"({len(keys - rows)} of {len(keys)} tensors); from random values: the rows of classes in boxes" in said


def test_parts_of_another_width_stay_random():
    system, untouched = (build("mask-rcnn", masks={"width": 24}) for _ in range(2))
    (said,) = take_pretrained(system, "rcnn-scenes")
    assert said.startswith("pretrained, from rcnn-scenes: backbone, neck, rpn, boxes (")
    assert "; from random values: masks, the rows of classes in" in said
    assert "`train rcnn-scenes` takes all of it" in said
    changed = [k for k in untouched.state_dict() if not equal(system, untouched, [k])]
    heads = [k for k in system.state_dict() if k.startswith("masks.")]
    assert any("backbone" in key for key in changed)
    assert heads
    assert not set(heads) & set(changed)


def test_another_system_takes_the_backbone():
    system, untouched, giver = build("solov2"), build("solov2"), mw.load("rcnn-scenes")
    (said,) = take_pretrained(system, "scenes")
    own, theirs, before = (s.groups()["backbone"][0].state_dict() for s in (system, giver, untouched))
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert any(not torch.equal(own[k], before[k]) for k in own)
    rest = [k for k in system.state_dict() if "backbone" not in k]
    assert equal(system, untouched, rest) == rest
    assert said.startswith("pretrained, from rcnn-scenes: backbone (")
    assert said.endswith(f"tensors); from random values: {', '.join(k for k in system.groups() if k != 'backbone')}")
    assert system.source["taken"] == ["backbone"]


def test_a_promptable_system_takes_its_own():
    torch.manual_seed(5)
    system = sam()
    (said,) = take_pretrained(system, "scenes")
    assert equal(system, mw.load("clicks"), system.state_dict()) == list(system.state_dict())
    assert "random" not in said


@pytest.mark.parametrize("name", names())
def test_every_system_is_divided_into_parts(name):
    """Also those whose groups hold parameters that lie in no module of their own, as H-DETR's and EoMT's."""
    with torch.device("meta"):
        system = build(name)
    parts = pretrained._parts(system)
    found = [key for part in parts.values() for key, _ in part.values()]
    assert len(found) == len(set(found))
    assert set(found) >= {key for key, _ in system.named_parameters()}
    assert [label for labels in pretrained._labels(system).values() for label in labels] == list(parts)


@pytest.mark.parametrize("name", ["h-detr", "eomt"])
def test_parameters_of_no_module_are_taken_too(name, tmp_path, monkeypatch):
    distribution = Distribution(tmp_path, f"{name}-weights")
    giver, system = (build(name, classes=("object",)) for _ in range(2))
    distribution.add("same-scenes", giver)
    monkeypatch.setattr(shipping, "entry_points", lambda group: [])
    monkeypatch.setattr(shipping, "_own_folder", lambda: distribution.folder)
    take_pretrained(system, "same-scenes")
    keys = set(system.state_dict()) - set(system.class_rows())
    assert set(equal(system, mw.load("same-scenes"), keys)) == keys


def test_images_of_other_channels_are_fitted():
    system = build("solov2", in_channels=5)
    take_pretrained(system, "scenes")
    weight, given = (s.state_dict()[s.input_weight()] for s in (system, mw.load("rcnn-scenes")))
    torch.testing.assert_close(weight[:, :3], given)
    torch.testing.assert_close(weight[:, 4], given.mean(1))
    assert len(system.preprocess.mean) == 5


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("solov2", {"backbone": {"norm": "batch"}}, 'has another backbone (norm is "group" there and "batch" here)'),
        ("solov2", {"backbone": {"width": 8}}, "has another backbone (width is 16 there and 8 here)"),
        ("eomt", {}, "rcnn-scenes has the backbone resnet18, not "),
    ],
)
def test_what_does_not_fit_is_said(system, options, words):
    with pytest.raises(UsageError, match=f"no installed weights fit this {system}: ") as caught:
        take_pretrained(build(system, **options), "scenes")
    assert words in str(caught.value)
    assert "clicks has another kind of image encoder" in str(caught.value)


def test_a_damaged_file_is_refused_by_name_and_ignored_otherwise(tmp_path, monkeypatch):
    distribution = Distribution(tmp_path, "two-weights")
    torch.manual_seed(0)
    for name in ("first", "second"):
        distribution.add(name, mask_rcnn())
    path = distribution.folder / "first.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(shipping, "entry_points", lambda group: [])
    monkeypatch.setattr(shipping, "_own_folder", lambda: distribution.folder)
    with pytest.raises(CheckpointError, match=r"first\.safetensors: differs from the file"):
        take_pretrained(build("solov2"), "first")
    with pytest.warns(CheckpointWarning, match="the weights first are ignored: .*differs from the file"):
        lines = take_pretrained(build("solov2"), "scenes")
    assert lines[0].startswith("pretrained, from second: backbone")


def test_unknown_and_contradicting_choices_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="got 'rcnn-scene'; did you mean 'rcnn-scenes'"):
        take_pretrained(build("solov2"), "rcnn-scene")
    with pytest.raises(UsageError, match="weights and pretrained both give"):
        make_system("solov2", ("a",), "x.safetensors", None, pretrained="scenes")
    with pytest.raises(UsageError, match="rcnn-scenes names weights itself"):
        make_system("rcnn-scenes", ("a",), None, None, pretrained="scenes")
    with pytest.raises(CheckpointError, match="no installed weights are those of solov2; installed are clicks, rcnn"):
        make_system("solov2-small", ("a",), "shipped", None)
    monkeypatch.setattr(shipping, "entry_points", lambda group: [])
    with pytest.raises(UsageError, match="no installed weights fit this solov2: none are installed"):
        take_pretrained(build("solov2"), "scenes")


def test_a_run_starts_from_them_and_says_so(tmp_path, capsys):
    data = Scenes(4, size=(64, 64), classes=("disc", "box"))
    changes = {"steps": 1, "batch": 2, "workers": 0, "tensorboard": False, "val": False}
    best = mw.train(
        "solov2-small", data, out=tmp_path / "run", pretrained="scenes", options=tiny_options("solov2"), device="cpu",
        freeze=("backbone",),
        **changes,
    )  # fmt: skip
    assert "pretrained, from rcnn-scenes: backbone (" in capsys.readouterr().err.replace("\n", " ")
    system, giver = mw.load(best), mw.load("rcnn-scenes")
    own, theirs = (s.groups()["backbone"][0].state_dict() for s in (system, giver))
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert system.source["pretrained"] == "rcnn-scenes"
    with pytest.raises(UsageError, match="pretrained or backbone_weights, not both"):
        mw.train("solov2", data, out=tmp_path / "b", backbone_weights="x", pretrained="scenes", **changes)


def test_shipped_weights_are_continued_with_classes_of_ones_own(tmp_path):
    torch.manual_seed(1)
    tuned = make_system("mask-rcnn-small", ("cell",), "shipped", None)
    assert not isinstance(tuned, Classless)
    assert tuned.classes == ("cell",)
    assert tuned.source["classes_kept"] == []
    named = make_system("rcnn-scenes", ("cell",), None, None)
    rows = set(named.class_rows())
    keys = [k for k in named.state_dict() if k not in rows]
    assert equal(named, tuned, keys) == keys
