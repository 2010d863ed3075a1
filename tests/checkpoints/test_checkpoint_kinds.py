"""What other programs save: prefixes, averaged copies, files without class names, and files of other kinds."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskwright.checkpoints import load, loading, read_state
from maskwright.checkpoints.catalogue import entry_of_file
from maskwright.checkpoints.origins import Origin
from maskwright.errors import CheckpointError, UnknownLayoutError
from tests.checkpoints.conftest import RENAME, _background_last

pytestmark = pytest.mark.fast


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def zeros(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value * 0 for key, value in state.items()}


def containers(s: dict[str, torch.Tensor]) -> dict[str, Any]:
    counter = {"n_averaged": torch.tensor(7)}
    extras = {
        "loss_weight": torch.ones(3),
        "criterion.empty_weight": torch.ones(81),
        "val_map.confmat": torch.ones(80, 80),
    }
    return {
        "plain": s,
        "model.": prefixed("model.", s),
        "net.": {"state_dict": prefixed("net.", s), "epoch": 1},
        "detector.module.": prefixed("detector.module.", s),
        "a.b.c.d.": prefixed("a.b.c.d.", s),
        "module in model": {"model": prefixed("module.", s)},
        "compiled": prefixed("_orig_mod.", s),
        "lightning with metrics": {"state_dict": {**prefixed("model.", s), **extras}},
        "averaged model": {**counter, **prefixed("module.", s)},
        "averaged model under a prefix": {**prefixed("swa.", counter), **prefixed("swa.module.", s)},
        "model_ema": {"model": zeros(s), "model_ema": {**counter, **prefixed("module.", s)}},
        "ema_state": {"model": zeros(s), "ema_state": s},
        "ema_state_dict": {"model": zeros(s), "ema_state_dict": s},
        "ema with decay": {"model": s, "ema": {"decay": torch.tensor(0.99)}},
        "timm": {"state_dict": zeros(s), "state_dict_ema": s},
        "two copies": {**prefixed("student.", zeros(s)), **prefixed("teacher.", s)},
        "ema beside": {**prefixed("model.", zeros(s)), **prefixed("ema_model.", s)},
        "mmdet": {"state_dict": {**s, **{f"ema_{k.replace('.', '_')}": v * 0 for k, v in s.items()}}},
        "mmengine": {"state_dict": s, "ema_state_dict": prefixed("module.", zeros(s)), "message_hub": {}},
        "nested": {"checkpoint": {"model": {"state_dict": s}}, "model": {"state_dict": s}},
    }


@pytest.mark.parametrize("name", list(containers({})))
def test_every_usual_container_is_understood(stand_in: Any, theirs: Any, tmp_path: Path, name: str) -> None:
    system = stand_in()
    torch.save(containers(theirs(system))[name], tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth")
    assert torch.equal(loaded.score.weight, system.score.weight)
    assert torch.equal(loaded.stem.weight, system.stem.weight)


def test_parts_of_a_larger_network_are_not_dropped(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    state = {**prefixed("model.", theirs(stand_in())), "refiner.weight": torch.ones(64, 64)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UnknownLayoutError):
        load(tmp_path / "x.pth")
    state["model.head.extra.weight"] = state.pop("refiner.weight")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: head\.extra\.weight"):
        load(tmp_path / "x.pth", variant="theirs")


def test_ignored_keys_are_recorded(stand_in: Any, theirs: Any, tmp_path: Path) -> None:
    torch.save({**prefixed("model.", theirs(stand_in())), "loss_weight": torch.ones(3)}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").source["ignored"] == ["loss_weight"]


# ---- class names -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nameless(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in's layout with the given names assumed."""

    def assume(names: tuple[str, ...]) -> None:
        def recognise(shapes: Any, about: Any) -> Any:
            return {"classes": names, "width": shapes["body.conv.weight"][0]} if "body.conv.weight" in shapes else None

        origin = Origin("theirs", "stand-in", RENAME, recognise, _background_last, ignore=(r"^anchors\.",))
        monkeypatch.setattr(loading, "origins", lambda: (origin,))

    return assume


@pytest.mark.thorough
def test_classes_name_the_rows_of_a_file_without_names(
    stand_in: Any, theirs: Any, nameless: Any, tmp_path: Path
) -> None:
    system = stand_in()
    torch.save(theirs(system), tmp_path / "x.pth")
    for assumed in (("class 0", "class 1", "class 2"), ("class 1", "class 2", "class 3"), ("car", "bus", "truck")):
        nameless(assumed)
        loaded = load(tmp_path / "x.pth", classes=("cell", "dust", "fibre"))
        assert loaded.classes == ("cell", "dust", "fibre")
        assert torch.equal(loaded.score.weight, system.score.weight)
        assert torch.equal(loaded.box.bias, system.box.bias)
        fewer = load(tmp_path / "x.pth", classes=("cell", "dust"))
        assert fewer.source["classes_kept"] == []
    # Assumed names that most of the given ones agree with are those of the file, in another order.
    again = load(tmp_path / "x.pth", classes=("truck", "car", "lorry"))
    assert torch.equal(again.score.weight[[0, 1, 3]], system.score.weight[[2, 0, 3]])


def test_names_in_the_file_are_not_replaced_row_by_row(
    stand_in: Any, theirs: Any, nameless: Any, tmp_path: Path
) -> None:
    system = stand_in()
    nameless(("class 0", "class 1", "class 2"))
    torch.save({"state_dict": theirs(system), "meta": {"CLASSES": ["car", "bus", "truck"]}}, tmp_path / "x.pth")
    assert load(tmp_path / "x.pth").classes == ("car", "bus", "truck")
    loaded = load(tmp_path / "x.pth", classes=("cell", "dust", "car"))
    assert loaded.source["classes_kept"] == ["car"]
    assert torch.equal(loaded.score.weight[2], system.score.weight[0])
    assert entry_of_file(tmp_path / "x.pth") is None


# ---- other kinds of files --------------------------------------------------------------------------------------------


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


KINDS = {
    "ONNX of torch": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80\x01\n" + bytes(200), "an ONNX model"),
    "ONNX without producer": (b"\x08\x0a:\x80\x01\n" + bytes(200), "an ONNX model"),
    "x.onnx": (b"anything \x00\x01", "an ONNX model"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file"),
    "Keras": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "Keras 3": (archive("config.json", "model.weights.h5"), "a Keras model"),
    "SavedModel": (b"\x08\x01\x12\xff\x01\n" + bytes(50), "a TensorFlow model"),
    "x.pb": (b"\n\x12\n\x05input\x12\x0bPlaceholder" + bytes(9), "a file of TensorFlow"),
    "model.ckpt-9.data-00000-of-00001": (b"\x01\xc2\x02\xc3", "a file of TensorFlow"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(50), "a TensorFlow Lite model"),
    "npy": (npy(), "a single NumPy array"),
    "npz": (archive("a.npy", "b.npy"), "NumPy arrays"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(20), "an image"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(20), "an image"),
    "WebP": (b"RIFF\x10\0\0\0WEBPVP8 ", "an image"),
    "JSON": (b'{"error": "Access restricted"}', "JSON text"),
    "JSON list": (b'[{"a": 1}]', "JSON text"),
    "page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "XML": (b'<?xml version="1.0"?><Error>', "a web page"),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="m">', "an OpenVINO model"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(4096), "zero bytes only"),
    "404": (b"404: Not Found", r"text, not weights \(404: Not Found\)"),
    "Entry not found": (b"Entry not found", r"text, not weights \(Entry not found\)"),
    "Invalid": (b"Invalid username or password.", "text, not weights"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "compressed with zstd"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
    "zip of a file": (archive("model_final.pth"), r"it contains model_final\.pth"),
    "empty zip": (archive(), "it contains nothing"),
    "export": (archive("serialized_exported_program.json"), r"torch\.export"),
    "PDF": (b"%PDF-1.7", "a PDF"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".bin", ".safetensors"])
def test_files_of_other_kinds_are_called_by_their_name(tmp_path: Path, kind: str, suffix: str) -> None:
    content, words = KINDS[kind]
    path = tmp_path / (kind if "." in kind else f"x{suffix}")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_state(path)
    assert str(path) in str(caught.value)


def test_pickles_that_are_text_are_still_read(tmp_path: Path) -> None:
    for protocol in (0, 1):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": np.ones(2)}, protocol=protocol))
        assert list(read_state(tmp_path / "x.pkl")[0]) == ["a"]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({'"b"': np.ones(2)}, protocol=0))
    assert list(read_state(tmp_path / "x.pkl")[0]) == ['"b"']


@pytest.mark.skipif(not hasattr(__import__("os"), "mkfifo"), reason="pipes of POSIX")
def test_devices_and_odd_paths_are_sentences(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", Path("/dev/zero"), tmp_path / ("a" * 300), "~no-such-user-here/x.pth", "a\0b"):
        with pytest.raises(CheckpointError):
            load(path)


def test_a_safetensors_header_of_any_content_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for header in (b"{}", b'{"a": 5}', b'{"__metadata__": {"format": 5}}', b'{"a":' * 50_000, b"{" + b" " * 500,
                   b'{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}',
                   b'{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}',
                   b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'):  # fmt: skip
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(CheckpointError):
            load(path)
