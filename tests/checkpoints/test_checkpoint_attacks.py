"""Files that try to execute code are refused with the name of the function, and nothing is executed."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskwright.checkpoints import load, read_state
from maskwright.errors import CheckpointError, UnsafeCheckpointError


class Attack:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def sentinel(tmp_path: Path) -> Any:
    """A path that every attack below tries to create; afterwards it must not be there."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def attacks(sentinel: Path) -> dict[str, Attack]:
    shell = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    return {
        "posix.system": Attack(os.system, shell),
        "subprocess.Popen": Attack(subprocess.Popen, ["touch", str(sentinel)]),
        "builtins.eval": Attack(builtins.eval, code),
        "builtins.exec": Attack(builtins.exec, code),
        "io.open": Attack(open, str(sentinel), "w"),
        "builtins.getattr": Attack(getattr, "x", "upper"),
        "pathlib": Attack(Path.touch, sentinel),
        "torch.hub": Attack(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
        "torch.serialization.load": Attack(torch.load, str(sentinel)),
        "numpy": Attack(np.fromfile, str(sentinel)),
    }


NAMES = list(attacks(Path("x")))


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["pickle-0", "pickle-2", "pickle-5", "zip", "legacy", "in-model", "nested"])
def test_a_call_is_refused_by_name_and_nothing_runs(tmp_path: Path, sentinel: Path, name: str, form: str) -> None:
    attack = attacks(sentinel)[name]
    path = tmp_path / "model_final_f10217.pkl"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(attack, protocol=int(form[-1])))
    elif form in ("zip", "legacy"):
        torch.save({"model": {"a": torch.ones(1)}, "x": attack}, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "in-model":
        path.write_bytes(pickle.dumps({"model": {"a": np.ones(2), "b": attack}, "__author__": "me"}, protocol=2))
    else:
        inner = io.BytesIO()
        torch.save(attack, inner)
        outer = Attack(torch.storage._load_from_bytes, inner.getvalue())
        path.write_bytes(pickle.dumps({"model": {"a": outer}}))
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert ": needs " in str(caught.value)
    assert "nothing was executed" in str(caught.value)
    # `load` goes the same way.
    with pytest.raises(UnsafeCheckpointError):
        load(path)


@pytest.mark.fast
def test_the_message_names_the_file_and_the_function(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(Attack(os.system, f"touch {sentinel}")))
    with pytest.raises(
        UnsafeCheckpointError, match=rf"^{path}: needs {os.system.__module__}\.system, which is neither"
    ):
        read_state(path)


def op(*parts: bytes | str) -> bytes:
    return b"".join(p.encode() if isinstance(p, str) else p for p in parts)


def handmade(sentinel: Path) -> dict[str, bytes]:
    """Programs for the stack machine that no pickler writes."""
    shell = op("V", f"touch {sentinel}", "\n")
    return {
        # old opcodes for instances and objects
        "inst": op("(", shell, "ios\nsystem\n."),
        "obj": op("(cos\nsystem\n", shell, "o."),
        "newobj": op(b"\x80\x02", "csubprocess\nPopen\n(", shell, "t", b"\x81."),
        "newobj_ex": op(b"\x80\x04", "csubprocess\nPopen\n(", shell, "t}", b"\x92."),
        "stack_global": op(b"\x80\x04\x8c\x02os\x8c\x06system\x93(", shell, "tR."),
        # through names that are allowed
        "dotted": op(b"\x80\x04\x8c\x05torch\x8c\x13storage.os.system()\x93."),
        "module_attribute": op(b"\x80\x04\x8c\x0ctorch._utils\x8c\x0bsys.modules\x93."),
        "extension": op(b"\x80\x02\x82\x01."),
        "persistent": op("Psomething\n."),
        "reconstructor": op("ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR."),
        # attributes of what is on the stack: a function of ours, a string, a number
        "build_on_maker": op("ccollections\nOrderedDict\n}Vfunction\ncos\nsystem\nsb."),
        "build_on_text": op("Vtext\n}Va\nI1\nsb."),
        "call_a_text": op("Vtext\n(tR."),
        "call_a_dict": op("}(tR."),
        "append_to_a_maker": op("ccollections\nOrderedDict\nI1\na."),
        "fill_a_maker": op("ccollections\nOrderedDict\nVa\nI1\ns."),
        "rebuild_by_another": op(
            "ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nctorch\nTensor\n(tNtR."
        ),
        # keys that take exponential time to hash: nested tuples
        "deep_key": op("}(", "I1\nI2\n\x86", "2\x86" * 200, "I1\nu."),
        "class_in_key": op("}(ccollections\nOrderedDict\nI1\nu."),
    }


@pytest.mark.fast
@pytest.mark.parametrize("name", list(handmade(Path("x"))))
def test_handmade_programs_are_refused(tmp_path: Path, sentinel: Path, name: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(handmade(sentinel)[name])
    with pytest.raises(CheckpointError) as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.fast
def test_shared_parts_that_double_take_no_time_and_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    lists: list[Any] = []
    for _ in range(60):  # two to the sixtieth leaves, if copied
        lists = [lists, lists]
    path.write_bytes(pickle.dumps({"model": {"a": np.ones(1)}, "bomb": lists}))
    assert list(read_state(path)[0]) == ["a"]
    path.write_bytes(b"(dVbomb\n" + b"]" * 500 + b"a" * 499 + b"s.")
    with pytest.raises(CheckpointError, match="nested more than 64 deep"):
        read_state(path)
    own: dict[str, Any] = {"model": {"a": np.ones(1)}}
    own["self"] = own
    path.write_bytes(pickle.dumps(own))
    assert list(read_state(path)[0]) == ["a"]


@pytest.mark.fast
def test_arrays_of_objects_are_refused(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "x.pkl"
    for array in (np.array([1, "two", None], dtype=object), np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])):
        path.write_bytes(pickle.dumps({"model": {"a": array}}))
        with pytest.raises(UnsafeCheckpointError, match="only numbers and strings are supported, nothing was executed"):
            read_state(path)
    path.write_bytes(pickle.dumps({"a": np.array([Attack(os.system, f"touch {sentinel}")], dtype=object)}))
    with pytest.raises(UnsafeCheckpointError, match="system"):
        read_state(path)


@pytest.mark.fast
def test_a_whole_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(
        UnsafeCheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*Ask the author for a state dict"
    ):
        read_state(path)


@pytest.mark.fast
def test_torchscript_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({}))
        file.writestr("x/code/__torch__.py", "raise SystemExit")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript program"):
        read_state(path)


@pytest.mark.fast
def test_tar_files_of_2016_are_refused(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "x.pth"
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(Attack(os.system, f"touch {sentinel}"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="tar archive"):
        read_state(path)


@pytest.mark.fast
def test_harmless_objects_become_their_attributes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    container = {
        "model": {"a": torch.ones(1)},
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"k": [1]}),
        "where": Path("runs/x"),
        "device": torch.device("cuda:0"),
        "size": torch.Size([2, 3]),
        "type": torch.float32,
        "kind": np.dtype("float32"),
        "set": {1, 2},
    }
    torch.save(container, path)
    found, about = read_state(path)
    assert list(found) == ["a"]
    assert about["container"]["size"] == [2, 3]
    assert about["container"]["default"] == {"k": [1]}
