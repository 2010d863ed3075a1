"""Saving and loading: the format of this library, official layouts, other classes and channels, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import maskwright
from maskwright.checkpoints import adapt_classes, convert, load, loading, read_metadata, save, widen_input
from maskwright.errors import CheckpointError, UnknownLayoutError, UsageError
from maskwright.structures import Preprocess

pytestmark = pytest.mark.fast


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


def rewrite(path: Path, **changes: str | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, metadata={k: v for k, v in metadata.items() if v is not None})


def test_saving_and_loading_round_trip(stand_in: Any, tmp_path: Path) -> None:
    system = stand_in(classes=("dog", "cat"), width=5)
    system.preprocess = Preprocess(short=320, long=640)
    system.source = {"origin": "theirs", "weights_licence": "MIT"}
    save(system, tmp_path / "runs" / "x.safetensors", extra={"epoch": 3, "AP": torch.tensor(0.5)})
    loaded = load(tmp_path / "runs" / "x.safetensors")
    assert same(loaded, system)
    assert loaded.classes == ("dog", "cat")
    assert loaded.options["width"] == 5
    assert loaded.preprocess == system.preprocess
    assert not loaded.training
    assert loaded.source["weights_licence"] == "MIT"
    metadata = read_metadata(tmp_path / "runs" / "x.safetensors")
    assert metadata["extra"] == {"epoch": 3, "AP": 0.5}
    assert (metadata["system"], metadata["version"]) == ("stand-in", maskwright.__version__)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["x.safetensors"]


def test_shared_weights_are_saved(stand_in: Any, tmp_path: Path) -> None:
    system = stand_in()
    system.norm.bias = system.norm.weight
    save(system, tmp_path / "x.safetensors")
    assert same(load(tmp_path / "x.safetensors"), system)


def test_fields_of_later_versions_are_ignored(stand_in: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(stand_in(), path)
    preprocess = {**Preprocess(short=99).to_dict(), "dither": "blue"}
    rewrite(path, preprocess=json.dumps(preprocess), tomorrow="a field of next year", format_version="7")
    assert load(path).preprocess.short == 99


def test_options_that_are_gone_and_systems_that_are_unknown(stand_in: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(stand_in(), path)
    options = {"classes": ["a"], "width": 4, "depth": 50, "age": 1}
    rewrite(path, options=json.dumps(options), version="9.9")
    with pytest.raises(
        CheckpointError, match=r"maskwright 9\.9 with options that stand-in does not have .*: age, depth"
    ):
        load(path)
    rewrite(path, system="yolo-99")
    with pytest.raises(CheckpointError, match=r"holds system 'yolo-99', written by maskwright 9\.9; this version"):
        load(path)
    rewrite(path, options="{broken")
    with pytest.raises(CheckpointError, match="header entry 'options' must be a JSON object"):
        load(path)


def test_writing_is_all_or_nothing(stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save(stand_in(), path)
    before = path.read_bytes()

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskwright.checkpoints.ours.save_file", full)
    with pytest.raises(
        CheckpointError, match=rf"^{path}: cannot be written: the disk is full \(no space left on device\)"
    ):
        save(stand_in(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(UsageError, match=r"the file name of a checkpoint must end in \.safetensors"):
        save(stand_in(), tmp_path / "x.pth")


def test_an_official_file_is_recognised_renamed_and_converted(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    system = stand_in()
    torch.save({"model": theirs(system), "__author__": "them"}, tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth")
    assert same(loaded, system)
    assert loaded.source["origin"] == "theirs"
    assert loaded.source["author"] == "them"
    convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors")
    assert same(again, system)
    assert again.source["origin"] == "theirs"


def test_a_smaller_system_inside_a_larger_one_is_distinguished(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    state = theirs(stand_in())
    torch.save(state, tmp_path / "large.pth")
    torch.save({k: v for k, v in state.items() if "head.anchor" not in k}, tmp_path / "small.pth")
    assert load(tmp_path / "large.pth").name == "stand-in"
    assert load(tmp_path / "small.pth").name == "other"


def test_ambiguous_files_require_a_variant(stand_in: Any, tmp_path: Path) -> None:
    state = {
        f"twin.conv.{k.removeprefix('stem.')}" if k.startswith("stem.") else k: v
        for k, v in stand_in().state_dict().items()
    }
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError,
        match="2 published variants: stand-in-calm, stand-in-bold; choose one, for example variant='stand",
    ):
        load(tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", variant="stand-in-bold").name == "stand-in"
    with pytest.raises(UsageError, match="the keys and shapes do not match variant 'loud'"):
        load(tmp_path / "x.pth", variant="loud")


def test_unknown_keys_are_named(stand_in: Any, tmp_path: Path) -> None:
    torch.save({"layer1.weight": torch.ones(1), "fc.bias": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UnknownLayoutError) as caught:
        load(tmp_path / "x.pth")
    assert "the 2 keys (layer1.weight, fc.bias, ...) match no supported system" in str(caught.value)
    assert "stand-in (theirs, twins); other (small)" in str(caught.value)


def test_every_mismatch_is_reported_before_anything_is_loaded(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    state = theirs(stand_in())
    del state["head.box.weight"], state["head.box.bias"]
    state["head.cls.weight"] = torch.zeros(4, 9)
    state |= {f"extra.{k}": torch.zeros(1) for k in range(12)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "x.pth", variant="theirs")
    words = str(caught.value)
    assert "2 missing: box.weight, box.bias;" in words
    assert "12 unexpected: extra.0, " in words
    assert "extra.9 and 2 more;" in words
    assert "1 of another shape: score.weight 4x9 in the file, 4x4 expected" in words
    assert "the theirs layout of stand-in" in words


def test_counters_of_batches_may_lack_or_be_left_over(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    system = stand_in()
    state = theirs(system)
    del state["body.bn1.num_batches_tracked"]
    state["body.bn2.num_batches_tracked"] = torch.tensor(3)
    torch.save(state, tmp_path / "x.pth")
    assert same(load(tmp_path / "x.pth"), system)


def test_rows_of_matching_classes_are_kept(
    stand_in: Any, theirs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    system = stand_in()
    torch.save(theirs(system), tmp_path / "x.pth")
    torch.manual_seed(1)
    fresh = stand_in(classes=("pink", "BLUE ", "red", "grey"))
    torch.manual_seed(1)
    loaded = load(tmp_path / "x.pth", classes=("pink", "BLUE ", "red", "grey"))
    words = "the rows of BLUE , red are kept; those of pink, grey start from random values, in score.weight, "
    assert len(caplog.messages) == 1
    assert f"{tmp_path / 'x.pth'}: {words}" in caplog.messages[0]
    assert loaded.classes == ("pink", "BLUE ", "red", "grey")
    assert loaded.source["classes_kept"] == ["BLUE ", "red"]
    new, old = loaded.state_dict(), system.state_dict()
    for part in ("weight", "bias"):
        assert torch.equal(new[f"score.{part}"][[1, 2, 4]], old[f"score.{part}"][[2, 0, 3]])  # the background too
        boxes, old_boxes = (s[f"box.{part}"].unflatten(0, (-1, 4)) for s in (new, old))
        assert torch.equal(boxes[[1, 2]], old_boxes[[2, 0]])
        anchors, old_anchors = (s[f"anchor.{part}"].unflatten(0, (2, -1)) for s in (new, old))
        assert torch.equal(anchors[:, [1, 2]], old_anchors[:, [2, 0]])
        for name in ("score", "box"):
            assert not torch.equal(new[f"{name}.{part}"][0], old[f"{name}.{part}"][0])
        # What has no name in the file is as the constructor made it.
        assert torch.equal(new[f"score.{part}"][[0, 3]], fresh.state_dict()[f"score.{part}"][[0, 3]])
    assert torch.equal(new["stem.weight"], old["stem.weight"])


def test_our_own_files_take_other_classes_too(stand_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = stand_in()
    save(system, tmp_path / "x.safetensors")
    load(tmp_path / "x.safetensors", classes=["pink"])
    assert "no class has the same name; the rows of pink start from random values" in caplog.text
    caplog.clear()
    # Nothing is logged where all rows are kept, in any order.
    assert load(tmp_path / "x.safetensors", classes=system.classes).classes == system.classes
    assert load(tmp_path / "x.safetensors", classes=system.classes[::-1]).classes == system.classes[::-1]
    assert not caplog.messages
    loaded = load(tmp_path / "x.safetensors", classes=["blue"])
    assert torch.equal(loaded.score.weight, system.score.weight[[2, 3]])
    assert loaded.options["classes"] == ["blue"]
    save(loaded, tmp_path / "y.safetensors")
    assert load(tmp_path / "y.safetensors").classes == ("blue",)


def test_invalid_classes_are_refused(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    save(stand_in(), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="`classes` must be a list of at least one name, got 'person'"):
        load(tmp_path / "x.safetensors", classes="person")
    with pytest.raises(UsageError, match="`classes` contains 'cat' more than once"):
        load(tmp_path / "x.safetensors", classes=["cat", "Cat"])
    state = {k: v for k, v in theirs(stand_in()).items() if "head.anchor" not in k}
    torch.save(state, tmp_path / "small.pth")
    with pytest.raises(UsageError, match="other does not support replacing its classes"):
        load(tmp_path / "small.pth", classes=["cat"], variant="small")


def test_adapting_classes_checks_the_number_of_rows(stand_in: Any) -> None:
    with pytest.raises(CheckpointError, match=r"score\.weight: has 4 rows, but 2 classes need 3"):
        adapt_classes(stand_in().state_dict(), stand_in(classes=("a", "b")), ("red", "green"))
    _, kept = adapt_classes(stand_in().state_dict(), stand_in(classes=("green", "b")), ("red", "green", "blue"))
    assert kept == ("green",)


def test_more_and_fewer_channels(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    system = stand_in()
    torch.save(theirs(system), tmp_path / "x.pth")
    five = load(tmp_path / "x.pth", in_channels=5).stem.weight
    assert torch.equal(five[:, :3], system.stem.weight)
    torch.testing.assert_close(five[:, 4], system.stem.weight.mean(1))
    grey = load(tmp_path / "x.pth", in_channels=1).stem.weight
    image = torch.randn(2, 1, 8, 8)
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(conv(image, grey), conv(image.expand(-1, 3, -1, -1), system.stem.weight))
    assert widen_input(torch.ones(2, 3, 1, 1), 2).shape == (2, 2, 1, 1)


def test_unknown_options_are_usage_errors(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    torch.save(theirs(stand_in()), tmp_path / "x.pth")
    with pytest.raises(UsageError, match="its options are classes, width, in_channels"):
        load(tmp_path / "x.pth", colour="blue")
    with pytest.raises(CheckpointError, match=r"of another shape: stem\.weight 4x3x3x3 in the file, 6x3x3x3 expected"):
        load(tmp_path / "x.pth", width=6)


def test_unavailable_devices_are_refused(stand_in: Any, tmp_path: Path) -> None:
    save(stand_in(), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"device 'abacus' is not available \(.*\); use 'cpu'"):
        load(tmp_path / "x.safetensors", device="abacus")
    assert load(tmp_path / "x.safetensors", device=torch.device("cpu")).stem.weight.device.type == "cpu"


def test_names_that_are_neither_file_nor_catalogue(stand_in: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no such name in the catalogue; did you mean mask-rcnn-r50-fpn-3x"):
        load("mask-rcnn-r50-fpn-3")
    with pytest.raises(CheckpointError, match="this address is not in the catalogue"):
        load("https://example.org/x.pth")


def test_weights_without_commercial_use_can_be_refused(stand_in: Any, tmp_path: Path) -> None:
    system = stand_in()
    system.source = {"weights_licence": "CC-BY-NC-4.0", "commercial": "no"}
    save(system, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors").source["commercial"] == "no"
    with pytest.raises(CheckpointError, match=r"licensed CC-BY-NC-4\.0, which does not allow commercial use"):
        load(tmp_path / "x.safetensors", commercial_ok=True)


def test_a_local_file_with_a_published_name_keeps_its_licence(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    torch.save(theirs(stand_in()), tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    source = load(tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth").source
    assert source["weights_licence"] == "BSD-3-Clause"
    assert source["name"] == "mask-rcnn-r50-fpn-torchvision"


def test_a_catalogue_name_is_fetched_then_read(
    stand_in: Any, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = stand_in()
    torch.save(theirs(system), tmp_path / "x.pth")
    asked: list[tuple[str, bool]] = []

    def fetch(entry: Any, *, commercial_ok: bool) -> Path:
        asked.append((entry.name, commercial_ok))
        return tmp_path / "x.pth"

    monkeypatch.setattr(loading, "fetch", fetch)
    loaded = load("mask-rcnn-r50-fpn-3x", commercial_ok=True)
    assert asked == [("mask-rcnn-r50-fpn-3x", True)]
    assert same(loaded, system)
    assert loaded.source["weights_licence"] == "CC-BY-SA-3.0"
    assert loaded.source["url"].endswith("model_final_f10217.pkl")


def test_reading_the_header_of_another_file_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of maskwright; `convert` makes"):
        read_metadata(tmp_path / "x.safetensors")


@pytest.mark.thorough
def test_a_saved_system_fetches_no_pretrained_weights_again(tmp_path, monkeypatch):
    import timm

    asked, make = [], timm.create_model

    def watched(name, pretrained=False, **options):
        asked.append(pretrained)
        return make(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", watched)
    small = {"neck_width": 32, "head": {"width": 32, "convs": 1}, "mask_width": 32}
    backbone = {"name": "timm:test_resnet", "pretrained": True}
    system = maskwright.systems.create("solov2", classes=("a",), backbone=backbone, **small)
    assert asked.count(True) == 1
    save(system, tmp_path / "own.safetensors")
    asked.clear()
    again = load(tmp_path / "own.safetensors")
    assert asked
    assert True not in asked
    assert again.options == system.options
