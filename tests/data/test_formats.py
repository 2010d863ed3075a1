"""The formats of labelling tools: the same images in each, read by sniffing alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.data import DataWarning, open_dataset
from maskwright.data.dataset import Dataset
from tests.data.making import shared

# Least IoU of an object with its own outline in COCO, of all objects and on average: formats store whole pixels (VIA),
# shares with six decimals (YOLO), or one object per pixel (VOC, Cityscapes).
EXPECTED = {
    "yolo_seg": (0.95, 0.96),
    "labelme": (0.95, 0.96),
    "via": (0.87, 0.95),
    "cvat": (0.999, 0.999),
    "voc": (0.08, 0.93),
    "cityscapes": (0.06, 0.9),
}
ELSEWHERE = {"cocotown_000000_000000": "000000184324", "penn_000000_000000": "PennPed00014"}


@pytest.fixture(scope="module")
def truth() -> Dataset:
    return open_dataset(shared("formats") / "coco" / "instances_rle_compressed.json")


def name_of(path: Path | None) -> str:
    stem = str(path and path.stem).removesuffix("_leftImg8bit")
    return ELSEWHERE.get(stem, stem)


@pytest.mark.parametrize("folder", list(EXPECTED))
def test_the_same_images_have_the_same_objects_in_every_format(folder: str, truth: Dataset) -> None:
    dataset = open_dataset(shared("formats") / folder, "val")
    own = {name_of(path): index for index, path in enumerate(truth.paths())}
    least, average = EXPECTED[folder]
    assert len(dataset) == (2 if folder == "cityscapes" else 4)
    for index, path in enumerate(dataset.paths()):
        there, here = truth.targets(own[name_of(path)]), dataset.targets(index)
        assert there.masks is not None
        assert here.masks is not None
        classes = [truth.classes[label] for label in there.labels.tolist()]
        kept = torch.tensor([not crowd for crowd in there.crowd.tolist()])  # type: ignore[union-attr]
        if folder == "cityscapes":  # classes that it does not have are left out
            kept &= torch.tensor([name in dataset.classes for name in classes])
        iou = there.masks.pack().iou(here.masks.pack())
        same = torch.tensor([[name == dataset.classes[k] for k in here.labels.tolist()] for name in classes])
        best = (iou * same).amax(1)[kept]
        assert best.min() >= least
        assert best.mean() >= average
        assert int((~here.crowd).sum()) == int(kept.sum())  # type: ignore[operator]


def test_crowd_regions_survive_where_the_format_has_them(truth: Dataset) -> None:
    for folder in ("labelme", "via", "cvat", "cityscapes"):
        dataset = open_dataset(shared("formats") / folder, "val")
        crowd = sum(int(dataset.targets(i).crowd.sum()) for i in range(len(dataset)))  # type: ignore[union-attr]
        assert crowd == 1, folder


def test_areas_and_classes_are_those_of_the_list(truth: Dataset) -> None:
    expected: dict[str, Any] = json.loads((shared("formats") / "expected.json").read_text("utf-8"))
    cvat = open_dataset(shared("formats") / "cvat")
    wanted = sorted((e["image"], e["category"], e["mask_area"]) for e in expected["instances"].values())
    found = []
    for index, path in enumerate(cvat.paths()):
        target = cvat.targets(index)
        assert target.masks is not None
        for label, area in zip(target.labels.tolist(), target.masks.areas().tolist(), strict=True):
            found.append((path.name, cvat.classes[label], area))  # type: ignore[union-attr]
    assert [f[:2] for f in sorted(found)] == [w[:2] for w in wanted]
    assert all(abs(f[2] - w[2]) <= 2 for f, w in zip(sorted(found), wanted, strict=True))
    assert cvat.classes == tuple(expected["classes"])


def test_exports_of_labelme_itself_are_read_with_their_groups() -> None:
    with pytest.warns(DataWarning, match="2 shapes have the label __ignore__"):
        dataset = open_dataset(shared("formats") / "labelme-real")
    counts = {path.stem: len(dataset.targets(i)) for i, path in enumerate(dataset.paths())}  # type: ignore[union-attr]
    # The PNGs that LabelMe made of these files have as many objects: the four shapes of the sofa are one.
    assert counts == {"2011_000003": 3, "2011_000006": 6, "2011_000025": 3}
    assert dataset.classes == ("bottle", "bus", "car", "chair", "person", "sofa")


def test_exports_of_labelme_itself_agree_with_its_voc_masks() -> None:
    from maskwright.data.exchange import voc
    from maskwright.data.formats import Match, Request
    from maskwright.data.table_datasets import dataset_from_table

    folder = shared("formats") / "labelme-real"
    table = voc.read(Match(str(folder / "voc"), 1.0, ""), Request(images=folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        masks, shapes = dataset_from_table(table), open_dataset(folder)
    own = {path.stem: i for i, path in enumerate(masks.paths())}  # type: ignore[union-attr]
    for index, path in enumerate(shapes.paths()):
        one, two = shapes.targets(index), masks.targets(own[path.stem])  # type: ignore[union-attr]
        assert sorted(shapes.classes[k] for k in one.labels.tolist()) == sorted(
            masks.classes[k] for k in two.labels.tolist()
        )
        assert one.masks.pack().iou(two.masks.pack()).amax(1).min() > 0.6  # type: ignore[union-attr]


def test_exports_of_via_1_without_a_class_are_one_class() -> None:
    with pytest.warns(DataWarning, match="no attribute with a class"):
        dataset = open_dataset(shared("formats") / "via-real")
    assert len(dataset) == 3
    assert dataset.classes == ("object",)
    assert sum(len(dataset.targets(i)) for i in range(3)) == 5
