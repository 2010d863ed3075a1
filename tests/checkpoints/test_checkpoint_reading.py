"""Reading of every checkpoint format; every damaged file gives a one-line error that names it."""

from __future__ import annotations

import argparse
import collections
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskwright.checkpoints import read_state
from maskwright.checkpoints.origins import Origin
from maskwright.errors import CheckpointError, UnknownLayoutError, UnsafeCheckpointError


def example() -> dict[str, torch.Tensor]:
    state = collections.OrderedDict(
        matrix=torch.randn(3, 4),
        parameter=torch.nn.Parameter(torch.randn(2)),
        number=torch.tensor(3),
        turned=torch.randn(4, 5).t(),
        half=torch.randn(5).half(),
        brain=torch.randn(5).bfloat16(),
        flags=torch.tensor([True, False]),
        empty=torch.empty(0, 3),
    )
    state["row"] = state["matrix"][1]
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert found[key].is_contiguous()
        assert torch.equal(found[key], value.detach()), key


def numpys(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in state.items() if v.dtype != torch.bfloat16}


@pytest.mark.fast
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_give_their_tensors_and_what_lay_beside(tmp_path: Path, zipped: bool) -> None:
    state = example()
    path = tmp_path / "x.pth"
    content = {
        "model": state,
        "iteration": 5,
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "optimizer": {"state": {0: torch.zeros(3)}},
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found, about = read_state(path)
    assert_same(found, state)
    assert about["format"] == ("torch" if zipped else "torch-legacy")
    assert about["wrapper"] == ["model"]
    assert about["container"] == {"iteration": 5, "args": {"lr": 0.1, "names": ["a"]}}


@pytest.mark.fast
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_zip_archive_of_one_torch_file_is_read(tmp_path: Path, zipped: bool) -> None:
    """As EfficientSAM-S is published."""
    state, inner, path = example(), tmp_path / "x.pt", tmp_path / "x.pt.zip"
    torch.save({"model": state}, inner, _use_new_zipfile_serialization=zipped)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(inner, "x.pt")
        file.writestr("__MACOSX/._x.pt", b"?")
    found, about = read_state(path)
    assert_same(found, state)
    assert about["wrapper"] == ["model"]
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file:
        file.write(path, "x.pt")
    with pytest.raises(CheckpointError, match=r"it contains __MACOSX/\._x\.pt, x\.pt"):
        read_state(tmp_path / "twice.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.write(inner, "y.pt")
    with pytest.raises(CheckpointError, match="extract it first"):
        read_state(path)


@pytest.mark.fast
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_modules_state_dict_and_module_prefixes_are_read(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    path = tmp_path / "x.pth"
    torch.save(torch.nn.DataParallel(module).state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert_same(read_state(path)[0], module.state_dict())


@pytest.mark.fast
@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_are_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    arrays = numpys(example())
    arrays["big_endian"] = np.arange(5, dtype=">f4")
    arrays["columns"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path = tmp_path / "x.pkl"
    with path.open("wb") as file:
        content = {"model": arrays, "__author__": "someone", "score": np.float32(3.5), "matching_heuristics": True}
        pickle.dump(content, file, protocol=protocol)
    found, about = read_state(path)
    wanted = {k: torch.from_numpy(np.ascontiguousarray(v).reshape(v.shape)) for k, v in numpys(example()).items()}
    assert list(found) == list(arrays)
    assert found["matrix"].shape == wanted["matrix"].shape
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key].numpy(), array)
    assert about["container"] == {"__author__": "someone", "score": 3.5, "matching_heuristics": True}
    assert about["format"] == "pickle"


@pytest.mark.fast
@pytest.mark.parametrize("protocol", range(6))
def test_tensors_pickled_without_torch_save_are_read(tmp_path: Path, protocol: int) -> None:
    state = example()
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": dict(state)}, protocol=protocol))
    assert_same(read_state(path)[0], dict(state))


def python2(value: np.ndarray) -> bytes:
    """An array as Python 2 pickles it: raw bytes as a string, protocol 2."""
    raw = value.tobytes()
    shape = b"".join(b"K" + bytes([n]) for n in value.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
        + shape
        + b"tcnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(raw))
        + raw
        + b"tb"
    )


@pytest.mark.fast
def test_detectrons_blobs_from_python_2_are_read_without_momentum(tmp_path: Path) -> None:
    weight = np.random.RandomState(0).randn(2, 3).astype("float32")
    names = [b"conv1_w", b"conv1_w_momentum", b"res2_0_branch2a_bn_s"]
    items = b"".join(b"U" + bytes([len(n)]) + n + python2(weight) for n in names)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(b"\x80\x02}U\x05blobs}(" + items + b"us.")
    found, about = read_state(path)
    assert list(found) == ["conv1_w", "res2_0_branch2a_bn_s"]
    np.testing.assert_array_equal(found["conv1_w"].numpy(), weight)
    assert about["layout"] == "caffe2"


@pytest.mark.fast
def test_averaged_weights_are_preferred_and_containers_unwrapped(tmp_path: Path) -> None:
    plain, averaged = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}
    path = tmp_path / "x.pth"
    torch.save({"state_dict": plain, "teacher": averaged, "epoch": 3, "meta": {"CLASSES": ("cat", "dog")}}, path)
    found, about = read_state(path)
    assert torch.equal(found["a.weight"], torch.ones(2))
    assert about["container"]["meta"] == {"CLASSES": ["cat", "dog"]}
    torch.save({"model": {"model_state": plain}, "step": torch.tensor(5)}, path)
    found, about = read_state(path)
    assert about["wrapper"] == ["model", "model_state"]
    assert list(found) == ["a.weight"]
    torch.save({"encoder": {"a": torch.ones(1)}, "decoder": {"b": torch.ones(1)}}, path)
    assert list(read_state(path)[0]) == ["encoder.a", "decoder.b"]


@pytest.mark.fast
def test_hugging_face_folders_whole_and_in_parts(tmp_path: Path) -> None:
    a, b = {"x.weight": torch.ones(2)}, {"y.weight": torch.zeros(3)}
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    save_file(a, tmp_path / "one.safetensors")
    save_file(b, tmp_path / "two.safetensors")
    index = {"weight_map": {"x.weight": "one.safetensors", "y.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found, about = read_state(tmp_path)
    assert set(found) == {"x.weight", "y.weight"}
    assert about["format"] == "huggingface"
    assert about["config"] == {"model_type": "sam"}
    save_file(b, tmp_path / "model.safetensors")
    assert list(read_state(tmp_path)[0]) == ["y.weight"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"the file two\.safetensors listed in model\.safetensors\.index\.json is missing"
    ):
        read_state(tmp_path)
    index["weight_map"]["y.weight"] = "../two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpointError, match="which is outside the folder"):
        read_state(tmp_path)


@pytest.mark.fast
def test_a_folder_of_torch_weights_and_folders_without(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder contains no weights"):
        read_state(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_state(tmp_path)[0]) == ["a"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "one.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match=r"several files of weights \(one\.pth, two\.pth\); pass one"):
        read_state(tmp_path)


BROKEN = {
    "empty.pth": (b"", "the file is empty"),
    "page.pth": (b"<!DOCTYPE html><html>", "a web page, not weights"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "run: git lfs pull"),
    "packed.pkl": (b"\x1f\x8b\x08\x00 more", "compressed with gzip"),
    "config.json": (b'{"a": 1}', "JSON text, not weights"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "noise.bin2": (bytes(range(200, 256)), "unsupported file format"),
    "noise.pkl": (b"\x80\x04" + bytes(range(200, 256)), "truncated or damaged"),
    "cut.safetensors": (struct.pack("<Q", 5000) + b'{"a":', "the header claims 5000 bytes, the file has 13"),
    "claim.pkl": (b"\x80\x04B\xff\xff\xff\x7f", "claims 2147483647 bytes, but 0 are left"),
    "huge.pkl": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f", "claims"),
    "frame.pkl": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f", "claims"),
    "memo.pkl": (b"\x80\x02Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7f.", "contains a NoneType; expected a state dict"),
    "list.pkl": (pickle.dumps([1, 2]), "contains a list; expected a state dict"),
    "none.pkl": (pickle.dumps({"a": 1}), "contains no tensors"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fast
def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; check the path"):
        read_state(tmp_path / "nothing.pth")


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    state = {"a": torch.randn(20, 20), "b": torch.randn(7)}
    path = tmp_path / "whole.pkl"
    if kind == "pkl":
        path.write_bytes(pickle.dumps({"model": numpys(state)}, protocol=4))
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for cut in (1, 5, 9, 30, len(whole) // 3, len(whole) // 2, len(whole) - 700, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_state(path)


def archive(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def tensor_pickle(count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"a": tensor} with any claims about it."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(item, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": Tensor()})
    return buffer.getvalue()


@pytest.mark.fast
def test_claims_about_tensors_are_held_against_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    data = np.arange(6, dtype="float32").tobytes()

    def attempt(*claims: object) -> dict[str, torch.Tensor]:
        path.write_bytes(archive({"data.pkl": tensor_pickle(*claims), "data/0": data, "byteorder": b"little"}))
        return read_state(path)[0]

    assert attempt(6, (2, 3), (3, 1))["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert attempt(6, (4, 6), (0, 1))["a"].shape == (4, 6)
    with pytest.raises(CheckpointError, match="claims 4000000000000 bytes, but the file has 24"):
        attempt(10**12, (10**12,), (1,))
    with pytest.raises(CheckpointError, match="does not fit into its storage '0' of 6 elements"):
        attempt(6, (3, 3), (3, 1))
    with pytest.raises(CheckpointError, match="does not fit into its storage"):
        attempt(6, (2, 3), (3, 1), 1)
    with pytest.raises(CheckpointError, match="need far more memory than the size of the file allows"):
        attempt(6, (10**5, 10**5), (0, 0))  # one element repeated 10^10 times
    with pytest.raises(CheckpointError, match="with an invalid size or stride"):
        attempt(6, (-1, 3), (3, 1))
    with pytest.raises(CheckpointError, match="with an invalid size or stride"):
        attempt(6, (2, 3), (3, -1))


def test_archives_that_unpack_to_too_much_or_lack_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    good = tensor_pickle(6, (6,), (1,))
    path.write_bytes(archive({"data.pkl": good, "data/0": bytes(200 << 20)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match=r"claims to unpack to 2097\d+ bytes from \d+, more than 20 times"):
        read_state(path)
    path.write_bytes(archive({"data.pkl": good}))
    with pytest.raises(CheckpointError, match="entry 'archive/data/0' is missing"):
        read_state(path)
    path.write_bytes(archive({"weights.npy": b"x"}))
    with pytest.raises(CheckpointError, match=r"without torch weights \(it contains archive/weights\.npy\)"):
        read_state(path)
    path.write_bytes(archive({"data.pkl": good, "data/0": bytes(24), "byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="the other byte order"):
        read_state(path)
    whole = bytearray(archive({"data.pkl": good, "data/0": bytes(24)}))
    whole[whole.index(bytes(24))] = 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"entry 'archive/data/0' is damaged \(Bad CRC-32"):
        read_state(path)


@pytest.mark.fast
def test_arrays_whose_claims_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    good = pickle.dumps({"a": np.zeros((3, 4), dtype="float32")}, protocol=2)
    path.write_bytes(good.replace(b"K\x03K\x04", b"K\x03K\x05"))
    with pytest.raises(
        CheckpointError, match=r"an array of shape \(3, 5\) and type float32 needs 60 bytes, the file has 48"
    ):
        read_state(path)


@pytest.mark.fast
def test_rename_rules_are_applied_one_after_the_other_and_never_merge_keys() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    rename = ((r"^a\.", "b."), (r"^b\.(\d)", lambda m: f"c.{int(m[1]) + 1}"))
    origin = Origin("theirs", "stand-in", rename, lambda shapes, about: None, ignore=(r"junk",))
    assert list(origin.translate({"a.0.w": one, "junk": two}, {})) == ["c.1.w"]
    with pytest.raises(UnknownLayoutError, match=r"keys 'a\.0\.w' and 'b\.0\.w' both become 'c\.1\.w'"):
        origin.translate({"a.0.w": one, "b.0.w": two}, {}, "x.pth")
