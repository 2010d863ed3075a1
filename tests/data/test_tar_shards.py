"""Tar shards (WebDataset) are read at the places of their members, and what is wrong with them is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.data import DataWarning, open_dataset
from maskwright.errors import AnnotationError, ImageError
from maskwright.structures import Masks

pytestmark = pytest.mark.fast


def image(value: int, size: tuple[int, int] = (20, 30), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(data, kind)
    return data.getvalue()


def square(x: int, **other: Any) -> dict[str, Any]:
    return {"segmentation": [[x, 2, x + 4, 2, x + 4, 8, x, 8]], **other}


def shard(path: Path, members: dict[str, bytes | dict[str, Any]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def test_samples_of_several_shards_and_splits(tmp_path):
    rle = Masks.from_dense(torch.ones(1, 20, 30, dtype=torch.bool)).rle()[0]
    whole = {"size": [20, 30], "counts": rle["counts"].decode()}
    shard(
        tmp_path / "train-0.tar",
        {
            "a/001.png": image(10),
            "a/001.json": {"annotations": [square(3, category="cup"), square(12, category_name="fork", iscrowd=1)]},
            "002.json": {"annotations": [{"segmentation": whole, "category": "fork", "id": 70}]},
            "002.seg.png": image(1),
            "002.jpg": image(200, kind="JPEG"),
        },
    )
    shard(tmp_path / "train-1.tar", {"003.png": image(30), "003.json": {"annotations": []}})
    shard(tmp_path / "val-0.tar", {"9.png": image(90), "9.json": {"annotations": [square(1, category="spoon")]}})
    data = open_dataset(tmp_path, "train")
    assert data.origin == "2 tar files of train (tar shards)"
    assert data.classes == ("cup", "fork", "spoon"), "those of all splits"
    assert data.image_ids() == ["a/001", "002", "003"]
    assert data.sizes() == [(20, 30)] * 3
    first, second, third = (data[n] for n in range(3))
    assert first.image[0, 0].unique().tolist() == [10]
    assert first.target.labels.tolist() == [0, 1]
    assert first.target.crowd.tolist() == [False, True]
    assert first.target.boxes.tolist() == [[3, 2, 7, 8], [12, 2, 16, 8]]
    assert first.target.masks.areas().tolist() == [24, 24]
    assert second.target.masks.areas().tolist() == [600]
    assert second.target.ids.tolist() == [70]
    assert int(second.image.float().mean()) == pytest.approx(200, abs=2)
    assert len(third.target) == 0
    assert data.image_labels(0).tolist() == [0, 1]
    assert len(open_dataset(tmp_path, "val")) == 1
    assert len(open_dataset(tmp_path / "train-1.tar", "train")) == 1


def test_ids_with_listed_names_and_samples_without_classes(tmp_path):
    shard(tmp_path / "x" / "0.tar", {"1.png": image(1), "1.json": {"annotations": [square(1, category_id=1)]}})
    (tmp_path / "x" / "classes.txt").write_text("cup\nfork\n")
    data = open_dataset(tmp_path / "x")
    assert data.classes == ("cup", "fork")
    assert data[0].target.labels.tolist() == [1]
    named = {"categories": [{"id": 7, "name": "bowl"}], "annotations": [square(1, category_id=7)]}
    shard(tmp_path / "y" / "0.tar", {"1.png": image(1), "1.json": named})
    assert open_dataset(tmp_path / "y").classes == ("bowl",)
    sa1b = {"image": {"image_id": 1, "width": 30, "height": 20}, "annotations": [square(1), square(9)]}
    shard(tmp_path / "z" / "sa_0.tar", {"sa_1.jpg": image(1, kind="JPEG"), "sa_1.json": sa1b})
    data = open_dataset(tmp_path / "z")
    assert data.classes == ("object",)
    assert len(data[0].target) == 2


BROKEN = {
    "a mask of another size": (
        {"segmentation": {"size": [2, 2], "counts": [0, 4]}},
        "annotation 0: its mask is for an",
    ),
    "an odd number of coordinates": ({"segmentation": [[1, 2, 3, 4, 5]]}, "annotation 0: .*odd number"),
    "no mask": ({}, "annotation 0: its mask is empty"),
    "invalid run lengths": ({"segmentation": {"size": [20, 30], "counts": "~~"}}, "annotation 0: .*invalid characters"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unusable_annotations_are_skipped_and_named(tmp_path, kind):
    record, message = BROKEN[kind]
    shard(tmp_path / "0.tar", {"1.png": image(1), "1.json": {"annotations": [record, square(3)]}})
    with pytest.warns(DataWarning, match=message):
        data = open_dataset(tmp_path)
    assert len(data[0].target) == 1
    assert data.image_labels(0).tolist() == [0]


def test_damaged_samples_and_files(tmp_path):
    good = {"1.png": image(1), "1.json": {"annotations": [square(3)]}}
    shard(tmp_path / "a" / "0.tar", {**good, "2.png": b"broken", "2.json": {"annotations": []}, "3.png": image(1)})
    with pytest.warns(DataWarning, match=r"2\.png: the header is damaged|2\.png"):
        assert len(open_dataset(tmp_path / "a")) == 1
    shard(tmp_path / "b" / "0.tar", {**good, "2.png": image(1), "2.json": b"{"})
    with pytest.warns(DataWarning, match=r"2\.json \(it is not a JSON object"):
        assert len(open_dataset(tmp_path / "b")) == 1
    path = shard(tmp_path / "c" / "0.tar", good)
    data = open_dataset(tmp_path / "c")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ImageError, match=r"0\.tar: 1\.png: the tar file is truncated"):
        data[0]
    shard(tmp_path / "d" / "0.tar", good)
    shard(tmp_path / "d" / "1.tar", good, "w:gz")
    with pytest.raises(AnnotationError, match=r"1\.tar: cannot be read as an uncompressed tar file"):
        open_dataset(tmp_path / "d")
