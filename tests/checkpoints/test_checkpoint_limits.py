"""Hostile and damaged files end in a sentence, in bounded time and memory, before anything large is allocated."""

from __future__ import annotations

import collections
import io
import json
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import maskwright as mw
from maskwright.checkpoints import budget, load, read_metadata, read_state, save
from maskwright.checkpoints.budget import Budget, shown, unexpected_as_errors
from maskwright.errors import CheckpointError, UsageError

pytestmark = pytest.mark.fast


@contextmanager
def cheap(seconds: float = 5.0, mebibytes: int = 250) -> Iterator[None]:
    """Fails if the block takes longer, or the process grows by more."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begun < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mebibytes << 10


def refused(path: Path, words: str) -> None:
    with cheap(), pytest.raises(CheckpointError, match=words) as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


def outcome(reader: Callable[[Path], Any], path: Path) -> str:
    """The words of the error that a reader raises; "" if it raises none. Other exceptions fail the test."""
    try:
        reader(path)
    except CheckpointError as error:
        return str(error)
    return ""


# ---- one budget per file ---------------------------------------------------------------------------------------------


def torch_file(tensors: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]], count: int) -> bytes:
    """A file with views (offset, size, stride) of one storage of `count` numbers."""

    class Storage:
        pass

    class View:
        def __init__(self, *claims: Any):
            self.claims = claims

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), *self.claims, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(item, Storage) else None

    pickled, whole = io.BytesIO(), io.BytesIO()
    Pickler(pickled, protocol=2).dump({name: View(*claims) for name, claims in tensors.items()})
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr("archive/data/0", bytes(4 * count))
    return whole.getvalue()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("offset", "size", "stride", "count"),
    [(0, (1 << 14, 1 << 10), (0, 0), 1), (0, (8999,), (1,), 9000), (0, (4500, 4500), (1, 1), 9000)],
    ids=["stride 0", "views", "overlapping"],
)
def test_views_of_one_storage_share_the_files_budget(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(torch_file({str(i): (offset, size, stride) for i in range(4000)}, count))
    refused(path, "its tensors need far more memory than the size of the file allows")
    few = {str(i): (offset, tuple(min(n, 50) for n in size), stride) for i in range(20)}
    path.write_bytes(torch_file(few, count))
    state, _ = read_state(path)
    assert [tuple(v.shape) for v in state.values()] == [few["0"][1]] * 20


def test_arrays_that_repeat_the_same_bytes_share_it_too(tmp_path: Path) -> None:
    raw = np.zeros(10_000, "float32")
    one = pickle.dumps(raw, protocol=2)
    assert len(one) > 40_000
    arrays = {f"{i}": np.frombuffer(raw, "float32") for i in range(3)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    assert len(read_state(tmp_path / "x.pkl")[0]) == 3
    head = b"\x80\x03B" + struct.pack("<I", 40_000) + bytes(40_000) + b"q\x000}("
    item = (
        b"cnumpy.core.numeric\n_frombuffer\n(h\x00cnumpy\ndtype\nX\x02\0\0\0f4\x89\x88\x87RM\x10\x27\x85X\x01\0\0\0CtR"
    )
    (tmp_path / "x.pkl").write_bytes(head + b"".join(b"X\x06\0\0\0%06d" % i + item for i in range(3000)) + b"u.")
    refused(tmp_path / "x.pkl", "far more")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "maker", [b"cbuiltins\nlist\n", b"ccollections\ndeque\n", b"cbuiltins\ntuple\n", b"ctorch\nSize\n"]
)
def test_copies_of_containers_are_counted(tmp_path: Path, maker: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02]q\x00(" + b"K\x01" * 20_000 + b"e0](" + (maker + b"h\x00\x85R") * 4000 + b"e.")
    refused(path, "its containers repeat one another far more often")


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [3, 4, 60])
@pytest.mark.parametrize("kind", ["dict", "list"])
@pytest.mark.parametrize("key", ["model", "meta", "state_dict"])
def test_containers_that_contain_one_another_many_times(tmp_path: Path, depth: int, kind: str, key: str) -> None:
    value: Any = np.zeros(1, "float32")
    for _ in range(depth):
        value = {str(i): value for i in range(2000 if depth < 9 else 2)} if kind == "dict" else [value] * 2000
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({key: value, "params": {"a": np.ones(1)}}))
    with cheap():
        words = outcome(read_state, path)
    assert words == "" or "far more often" in words or "nested more than" in words


@pytest.mark.thorough
def test_keys_whose_hashes_collide_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": np.ones(1), "b": {k * ((1 << 61) - 1): 1 for k in range(1, 9000)}}))
    refused(path, "a int as key of a dict")


@pytest.mark.thorough
def test_arrays_of_types_and_shapes_that_do_not_exist(tmp_path: Path) -> None:
    class Kind:
        def __init__(self, letters: str):
            self.letters = letters

        def __reduce__(self) -> Any:
            return np.dtype, (self.letters, False, True), (3, "<", None, None, None, -1, -1, 0)

    class Array:
        def __init__(self, *claims: Any):
            self.claims = claims

        def __reduce__(self) -> Any:
            function = np.zeros(1).__reduce__()[0]
            return function, (np.ndarray, (0,), b"b"), (1, self.claims[0], self.claims[1], False, self.claims[2])

    path = tmp_path / "x.pkl"
    shapes: tuple[Any, ...] = ((1 << 40, 0), (1 << 47,) * 3 + (0,), (0,) * 40, (-1,), (2.5,), ("a",), None, (1 << 70,),
                               (True,), (1,), (4,), ())  # fmt: skip
    for letters in ("f4", "U0", "S0", "f16", "c32", "f3", "U999999999", "S2147483647", "U1", "M8", "u2", "", "x"):
        for shape in shapes:
            for raw in (b"", bytes(4), b"\xff" * 16, "\u1234", None, 5):
                path.write_bytes(pickle.dumps({"a": Array(shape, Kind(letters), raw)}, protocol=2))
                words = outcome(read_state, path)
                assert words == "" or str(path) in words
                assert len(words) < 500


def test_the_budget_is_a_multiple_of_the_size() -> None:
    assert Budget.for_size("x", 10**9).bytes > 4 * 10**9
    spent = Budget.for_size("x.pth", 10)
    spent.spend_nodes(budget.MORE_NODES)
    with pytest.raises(CheckpointError, match=r"^x\.pth: its containers"):
        spent.spend_nodes(100)
    assert shown("a\x1b[31m\n\udcff", 20) == "a\\x1b[31m\\n\\udcff"
    assert shown("c" * 100, 20) == "c" * 20 + "..."


# ---- options and preprocessing ---------------------------------------------------------------------------------------


def rewritten(path: Path, **entries: Any) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = {k: v if isinstance(v, str) else json.dumps(v) for k, v in entries.items()}
    target = path.with_name("changed.safetensors")
    save_file(load_file(path), target, metadata=metadata | changed)
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    system = mw.create(
        "solov2", classes=("a", "b"), backbone={"name": "resnet18", "width": 8}, neck_width=16,
        head={"width": 16, "convs": 1}, mask_width=16, mask_channels=16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    save(system, path)
    return path


DEEP: Any = json.loads("[" * 900 + "]" * 900)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**64, 10**300, "x", "\ud800", "a" * 5000,
    [], {}, [None], [1], DEEP, [10**9] * 3, {"name": 5}, {"a": {}},
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("field", ["short", "long", "resample", "mean", "std", "divide", "channels", "multiple", "fit",
                                   "canvas", "sizes", "corner"])  # fmt: skip
def test_every_field_of_preprocess_is_validated(small: Path, field: str) -> None:
    good = read_metadata(small)["preprocess"]
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    for value in VALUES:
        text = json.dumps({**good, "short": 64, "long": 64, field: value})
        path = rewritten(small, preprocess=text)
        words = outcome(lambda path: load(path).preprocess.apply(image), path)
        assert words == "" or "preprocess" in words or "nested more than" in words
        assert len(words) < 700


@pytest.mark.thorough
@pytest.mark.parametrize("preprocess", [{"mean": [0.5], "std": [1.0]}, {"mean": [0.5] * 4, "std": [1.0] * 4}])
def test_the_channels_of_preprocess_are_those_of_the_system(small: Path, preprocess: Any) -> None:
    good = read_metadata(small)["preprocess"]
    with pytest.raises(CheckpointError, match=r"has a mean of \d channels, the system has 3"):
        load(rewritten(small, preprocess={**good, **preprocess}))


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(VALUES)))
def test_options_of_any_type_are_refused_or_loaded(small: Path, number: int) -> None:
    good, value = read_metadata(small)["options"], VALUES[number]
    for name in list(good)[number % 5 :: 5]:
        with cheap():
            words = outcome(load, rewritten(small, options={**good, name: value}))
        assert len(words) < 1500  # a mismatch lists tensors


@pytest.mark.parametrize("classes", ["null", "5", "[5]", '["a", null]', '[["a"]]', '["", "b"]', "[1e400]", "{}"])
def test_class_names_are_validated(small: Path, classes: str) -> None:
    with pytest.raises(CheckpointError, match=r"header entry 'classes' must be (an|a JSON) array"):
        load(rewritten(small, classes=classes))


@pytest.mark.thorough
def test_options_that_describe_a_huge_system_cost_nothing(small: Path) -> None:
    good = read_metadata(small)["options"]
    for change in (
        {"neck_width": 1 << 20}, {"head": {**good["head"], "convs": 1 << 20}}, {"mask_width": 10**9},
        {"backbone": {**good["backbone"], "width": 1 << 19}}, {"head": {**good["head"], "width": 60_000}},
    ):  # fmt: skip
        with cheap(10), pytest.raises(CheckpointError, match=r"out of range|layers|MiB|do not match|no system can be"):
            load(rewritten(small, options={**good, **change}))


@pytest.mark.thorough
def test_nothing_is_allocated_before_shapes_are_compared(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    kind = mw.systems.system_class("solov2")
    original = kind.rebuild.__func__

    def watched(cls: Any, options: Any) -> Any:
        system = original(cls, options)
        built.append(next(system.parameters()).device.type)
        return system

    monkeypatch.setattr(kind, "rebuild", classmethod(watched))
    options = {**read_metadata(small)["options"], "neck_width": 24}
    with pytest.raises(CheckpointError, match="of another shape: dense"):
        load(rewritten(small, options=options))
    assert built == ["meta"]
    load(small)
    assert built == ["meta", "meta", "cpu"]


@pytest.mark.thorough
def test_mistakes_of_the_caller_stay_usage_errors(small: Path) -> None:
    with pytest.raises(UsageError, match="neck_width"):
        load(small, neck_width=-1)
    with pytest.raises(UsageError, match="neck_width"):
        load(small, neck_width="wide")


# ---- no network, no other folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["timm:hf-hub:timm/resnet18.a1_in1k", "timm:hf_hub:timm/resnet18", "timm:local-dir:/etc", "timm:/etc/passwd",
     "timm:../x", "hf-hub:timm/resnet18", "timm:", "timm:timm/resnet18", "vit_hf-hub:x/y", "vit_local-dir:/etc"],
)  # fmt: skip
@pytest.mark.parametrize("pretrained", [True, False])
def test_backbones_are_taken_from_timms_registry_only(
    small: Path, name: str, pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def no(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    options = read_metadata(small)["options"]
    for backbone in ({"name": name, "pretrained": pretrained}, name):
        with pytest.raises(CheckpointError, match=r"there is no|timm|stride"):
            load(rewritten(small, options={**options, "backbone": backbone}))
    with pytest.raises(UsageError):
        mw.create("solov2", backbone={"name": name, "pretrained": pretrained})


# ---- checksums, training states, modes -------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_in_every_tensor(stand_in: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(stand_in(), path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    for name, entry in header.items():
        if name != "__metadata__":
            place = start + entry["data_offsets"][1] - 1
            damaged = bytearray(whole)
            damaged[place] ^= 16
            path.write_bytes(damaged)
            for reader in (load, read_metadata, read_state):
                with pytest.raises(
                    CheckpointError, match=f"x.safetensors: tensor '{name}' does not match its checksum"
                ):
                    reader(path)
    path.write_bytes(whole)
    assert load(path).name == "stand-in"


def test_files_without_checksums_load(stand_in: Any, tmp_path: Path) -> None:
    system = stand_in()
    save(system, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert set(json.loads(metadata["crc32"])) == set(system.state_dict())
    del metadata["crc32"]
    state = load_file(tmp_path / "x.safetensors")
    save_file(state, tmp_path / "old.safetensors", metadata=metadata)
    assert torch.equal(load(tmp_path / "old.safetensors").score.weight, system.score.weight)
    for damaged in ("[]", "{", "[" * 100_000, "{}", "5"):
        save_file(state, tmp_path / "old.safetensors", metadata={**metadata, "crc32": damaged})
        with pytest.raises(CheckpointError, match="checksum"):
            load(tmp_path / "old.safetensors")


def test_a_training_state_gives_its_weights(stand_in: Any, tmp_path: Path) -> None:
    system = stand_in(classes=("red", "blue"))
    state = {
        "format": "maskwright-run", "system": "stand-in", "options": system.options, "source": None,
        "preprocess": system.preprocess.to_dict(), "model": system.state_dict(), "average": None,
        "progress": {"step": 7, "epoch": 1, "best": None}, "optimizer": {"kind": "sgd", "state": {}},
    }  # fmt: skip
    path = tmp_path / "last.ckpt"
    torch.save(state, path)
    loaded = load(path)
    assert loaded.classes == ("red", "blue")
    assert torch.equal(loaded.score.weight, system.score.weight)
    assert read_metadata(path)["extra"] == {"step": 7, "epoch": 1}
    averaged = {k: v + 1 for k, v in system.state_dict().items()}
    torch.save({**state, "average": {"updates": 3, "model": averaged}}, path)
    assert torch.equal(load(path).score.weight, system.score.weight + 1)
    for change in ({"model": 5}, {"options": None}, {"options": {"classes": object}}, {"system": "x"}, {"model": {}}):
        value = {**state, **change}
        if change.get("options") == {"classes": object}:
            value["options"] = {"classes": torch.ones(2)}
        torch.save(value, path)
        with pytest.raises(CheckpointError):
            load(path)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="permissions of POSIX")
def test_weights_have_the_permissions_that_the_umask_gives(stand_in: Any, tmp_path: Path) -> None:
    import os

    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            save(stand_in(), tmp_path / "x.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


# ---- unexpected exceptions -------------------------------------------------------------------------------------------


def test_unexpected_exceptions_become_errors_in_use_and_stay_visible_here(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(stand_in(), tmp_path / "x.safetensors")

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a mistake\nof ours")

    monkeypatch.setattr("maskwright.checkpoints.reading._safetensors", broken)
    for reader in (load, read_state, read_metadata):
        with pytest.raises(ZeroDivisionError):  # the tests set MASKWRIGHT_DEBUG
            reader(tmp_path / "x.safetensors")
    monkeypatch.delenv("MASKWRIGHT_DEBUG")
    for reader in (load, read_state, read_metadata):
        with pytest.raises(
            CheckpointError, match=r"x\.safetensors: cannot be loaded \(ZeroDivisionError: a mistake\\nof ours\)"
        ) as caught:
            reader(tmp_path / "x.safetensors")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt), unexpected_as_errors("x"):
        raise KeyboardInterrupt
