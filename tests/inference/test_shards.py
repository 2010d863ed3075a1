"""Many images: shards, Parquet parts, kills at any moment, and a Ray cluster that loses a node."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maskwright.errors import DataError, UsageError
from maskwright.inference.listing import StoredImage, in_shard, list_images, parse_shard
from maskwright.inference.parts import MANIFEST, PartFolder, packed, rows, unpacked
from maskwright.inference.shards import Work, predict_shard
from maskwright.structures import Instances, Masks
from tests.inference.painted import Painted, blocks, save, seen

pyarrow = pytest.importorskip("pyarrow", reason="the extra shards is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the extra shards is not installed")

ROOT = Path(__file__).parents[2]


def make() -> Painted:
    return Painted().eval()


def images(folder: Path, count: int) -> Path:
    for number in range(count):
        save(blocks(number % 4), folder / f"{number:03}.png")
    return folder


def table_of(out: Path):
    tables = [parquet.read_table(path, partitioning=None) for path in sorted(out.rglob("part-*.parquet"))]
    return pyarrow.concat_tables(tables)


def check_complete(out: Path, folder: Path, count: int, damaged: int = 0) -> None:
    """Every image once, with the right objects."""
    found: dict[str, list[dict]] = {}
    for row in table_of(out).to_pylist():
        found.setdefault(row["image"], []).append(row)
    assert sorted(found) == sorted(str(folder / f"{n:03}.png") for n in range(count))
    for number in range(count):
        own = found[str(folder / f"{number:03}.png")]
        objects = number % 4
        assert len(own) == max(1, objects), "one row for each object, or one for none"
        assert {(row["width"], row["height"]) for row in own} == {(60, 40)}
        if not objects:
            assert [own[0][name] for name in ("label", "class", "score", "box", "rle")] == [None] * 5
            continue
        want = seen(blocks(objects))
        assert [row["rle"].encode() for row in own] == [code["counts"] for code in want.masks.rle()]
        assert [row["class"] for row in own] == [("cat", "dog")[label] for label in want.labels.tolist()]
        assert np.allclose([row["box"] for row in own], want.boxes.numpy())
        assert np.allclose([row["score"] for row in own], want.scores.numpy())
    manifests = [json.loads(path.read_text()) for path in out.rglob(MANIFEST)]
    assert sum(m["images"] for m in manifests) == count + damaged
    assert sum(m["objects"] for m in manifests) == sum(n % 4 for n in range(count))


def test_shards_divide_the_images_and_continue(tmp_path):
    folder = images(tmp_path / "images", 24)
    (folder / "broken.png").write_bytes(b"broken")
    out = tmp_path / "out"
    for number in (1, 2, 3):
        parts = predict_shard(Work(make), [folder], out, shard=(number, 3), per_part=3)
        mine = [name for name in list_images([folder]) if in_shard(name, number, 3)]
        assert sorted(parts.done) == mine
    check_complete(out, folder, 24, damaged=1)
    listed = [entry for path in out.rglob(MANIFEST) for entry in json.loads(path.read_text())["damaged"]]
    assert [entry["image"] for entry in listed] == [str(folder / "broken.png")]
    assert "broken.png" in listed[0]["reason"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}

    def never():
        raise AssertionError("the system is not loaded if there is nothing left")

    predict_shard(Work(never), [folder], out, shard=(2, 3), per_part=3)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    with pytest.raises(UsageError, match="predictions of 3 shards, not of 2"):
        predict_shard(Work(make), [folder], out, shard=(1, 2))
    with pytest.raises(UsageError, match="other options; give another folder"):
        predict_shard(Work(make, {"score_threshold": 0.9}), [folder], out, shard=(1, 3))
    with pytest.raises(UsageError, match="other weights"):
        predict_shard(Work(make), [folder], out, shard=(1, 3), about={"weights": "x"})


@pytest.mark.fast
def test_an_interrupted_run_keeps_what_it_has_predicted(tmp_path):
    folder = images(tmp_path / "images", 10)
    out = tmp_path / "out"

    def stops(stream, what, total):
        for number, entry in enumerate(stream):
            if number == 7:
                raise KeyboardInterrupt
            yield entry

    with pytest.raises(KeyboardInterrupt):
        predict_shard(Work(make), [folder], out, per_part=4, progress=stops)
    assert len(list(out.rglob("part-*.parquet"))) == 2
    assert not list(out.rglob(MANIFEST))
    predict_shard(Work(make), [folder], out, per_part=4)
    check_complete(out, folder, 10)


KILLED = """
import os, signal, sys, random
from maskwright import files
from maskwright.inference.shards import Work, predict_shard
from tests.inference.test_shards import make
after = int(sys.argv[3])
def dies(frame, event, argument):
    global after
    after -= 1
    if not after:
        os.kill(os.getpid(), signal.SIGKILL)
def stream(entries, what, total):
    for entry in entries:
        sys.setprofile(dies)  # at any call of a function, also between the writing and the renaming of a file
        yield entry
    sys.setprofile(dies)
predict_shard(Work(make), [sys.argv[1]], sys.argv[2], per_part=3, progress=stream)
sys.setprofile(None)
"""


@pytest.mark.slow
def test_every_image_occurs_once_after_kills_at_any_moment(tmp_path):
    folder = images(tmp_path / "images", 12)
    out = tmp_path / "out"
    for after in (300, 900, 1700):
        command = [sys.executable, "-c", KILLED, str(folder), str(out), str(after)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode in (-signal.SIGKILL, 0), run.stderr
    predict_shard(Work(make), [folder], out, per_part=3)
    check_complete(out, folder, 12)
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


@pytest.mark.fast
def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-0.parquet: is not a complete part"):
        PartFolder(tmp_path, {})


@pytest.mark.fast
def test_an_image_that_comes_twice_is_stored_once(tmp_path):
    table = rows("a", seen(blocks(2)), ("cat", "dog"))
    with PartFolder(tmp_path, {}) as parts:
        parts.add("a", unpacked(packed(table)))
        parts.add("a", table)
    assert table_of(tmp_path).num_rows == 2


@pytest.mark.fast
def test_boxes_without_masks_and_names_that_are_not_text(tmp_path):
    bare = Instances((4, 5), torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([0]), scores=torch.tensor([0.5]))
    assert rows("a", bare, ("cat",)).to_pylist()[0]["rle"] is None
    empty = Instances((4, 5), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), Masks.empty((4, 5)))
    with PartFolder(tmp_path, {}) as parts:
        parts.add("a\udcff", rows("a\udcff", empty, ()))
    with PartFolder(tmp_path, {}) as parts:
        assert parts.done == {"a\\udcff"}
        parts.add("a\udcff", None)
        assert parts.skipped == []


def test_lists_globs_and_storage(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="the extra shards is not installed")
    folder = images(tmp_path / "images", 3)
    names = [str(folder / f"{n:03}.png") for n in range(3)]
    parquet.write_table(pyarrow.table({"path": ["images/000.png", "memory://many/x.png"]}), tmp_path / "list.parquet")
    assert list_images([folder, str(folder / "*.png")]) == names
    assert list_images([tmp_path / "list.parquet"]) == sorted([names[0], "memory://many/x.png"])
    storage = fsspec.filesystem("memory")
    storage.pipe("/many/x.png", (folder / "002.png").read_bytes())
    storage.pipe("/many/deep/y.png", b"broken")
    storage.pipe("/many/notes.txt", b"")
    assert list_images(["memory://many"]) == ["memory://many/x.png"] or list_images(["memory://many"]) == [
        "memory:///many/x.png"
    ]
    both = list_images(["memory://many"], recursive=True)
    assert len(both) == 2
    parts = predict_shard(Work(make), ["memory://many"], tmp_path / "out", recursive=True)
    assert parts.objects == 2
    assert len(parts.skipped) == 1
    with pytest.raises(OSError, match="nothing"):
        StoredImage("memory://many/nothing.png").read()
    parquet.write_table(pyarrow.table({"number": [1]}), tmp_path / "wrong.parquet")
    with pytest.raises(UsageError, match="no column of image names"):
        list_images([tmp_path / "wrong.parquet"])


@pytest.mark.fast
@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_invalid_shards(text):
    with pytest.raises(UsageError, match="NUMBER/COUNT"):
        parse_shard(text)


@pytest.mark.fast
def test_valid_shards():
    assert parse_shard("2/8") == (2, 8)
    names = [f"{n}.png" for n in range(1000)]
    counts = [sum(in_shard(name, k, 4) for name in names) for k in (1, 2, 3, 4)]
    assert sum(counts) == 1000
    assert min(counts) > 200


# ---- Ray: pytest -m cluster ------------------------------------------------------------------------------------------


def slow_system(seconds: float) -> Painted:
    import time

    class Slow(Painted):
        def forward(self, images):
            time.sleep(seconds)
            return super().forward(images)

    return Slow().eval()


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_a_local_cluster_predicts_and_continues(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    folder = images(tmp_path / "images", 70)
    out = tmp_path / "out"
    work = Work(functools.partial(slow_system, 0.0))

    def stops(stream, what, total):
        for number, entry in enumerate(stream):
            if number == 20:
                raise KeyboardInterrupt
            yield entry

    with pytest.raises(KeyboardInterrupt):
        predict_shard(work, [folder], out, ray="local", per_part=8, progress=stops)
    assert 0 < table_of(out).num_rows < 120
    predict_shard(work, [folder], out, ray="local", per_part=8)
    check_complete(out, folder, 70)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_loses_a_node_counts_every_image_once(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # beside other work, niced processes hardly start
    folder = images(tmp_path / "images", 200)
    out = tmp_path / "out"
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8}
    )
    try:
        second = nodes.add_node(num_cpus=1, object_store_memory=10**8)
        nodes.wait_for_nodes()
        state = {"killed": False}

        def kills(stream, what, total):
            for number, entry in enumerate(stream):
                if number == 40 and not state["killed"]:
                    state["killed"] = True
                    nodes.remove_node(second, allow_graceful=False)
                yield entry

        work = Work(functools.partial(slow_system, 0.02))
        predict_shard(work, [folder], out, ray=nodes.address, actors=2, per_part=16, progress=kills)
        assert state["killed"]
    finally:
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(tmp_path / "ray", ignore_errors=True)
    check_complete(out, folder, 200)
