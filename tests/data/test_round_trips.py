"""Every format that can be written: what is written is read back as the same objects."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskwright.data import Dataset, DataWarning, Sample, open_dataset, read_image
from maskwright.data.convert import LossError, convert_data, writable_formats
from maskwright.structures import Instances, Masks

HEIGHT, WIDTH = 24, 36
SIZE = (HEIGHT, WIDTH)
CLASSES = ("car", "person", 'traffic: "light" & <co>')
KEEP_ALL = ("coco", "labelme", "cvat", "via", "yolo")  # parts, holes and overlaps


class Drawn(Dataset):
    """Images of a folder with given objects."""

    def __init__(self, folder: Path, targets: Sequence[Instances], classes: Sequence[str] = CLASSES):
        self.name, self.classes = "drawn", tuple(classes)
        self.category_ids = tuple(range(1, len(classes) + 1))
        self._targets = list(targets)
        self._paths = []
        folder.mkdir(parents=True, exist_ok=True)
        for number, target in enumerate(targets):
            pixels = np.random.default_rng(number).integers(0, 255, (*target.image_size, 3), np.uint8)
            self._paths.append(folder / f"image {number}.png")
            Image.fromarray(pixels).save(self._paths[-1])

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self._paths[index]), self._targets[index], index + 1, self._paths[index])

    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(target.image_size) for target in self._targets]  # type: ignore[misc]

    def image_ids(self) -> list[int | str]:
        return list(range(1, len(self) + 1))

    def paths(self) -> list[Path | None]:
        return list(self._paths)

    def targets(self, index: int) -> Instances:
        return self._targets[index]


def made(masks: Masks, labels: Sequence[int], crowd: Sequence[bool] | None = None, first: int = 1) -> Instances:
    flags = torch.tensor(crowd if crowd is not None else [False] * len(masks), dtype=torch.bool)
    return Instances(
        masks.size, masks.boxes(), torch.tensor(labels, dtype=torch.int64), masks, crowd=flags,
        ids=torch.arange(first, first + len(masks)),
    )  # fmt: skip


def objects(dataset: Dataset, index: int) -> list[tuple[str, bool, bytes]]:
    """Class, crowd flag and run-length string of each object, sorted."""
    target = dataset.targets(index)
    assert target.masks is not None
    crowd = [False] * len(target) if target.crowd is None else target.crowd.tolist()
    codes = [code["counts"] for code in target.masks.pack().rle()]
    return sorted(zip([dataset.classes[k] for k in target.labels.tolist()], crowd, codes, strict=True))


coordinate = st.floats(0, 1, width=32)
ring = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=8)


@st.composite
def polygons(draw: Any) -> list[np.ndarray]:
    """One to three rings that have pixels, side by side."""
    count = draw(st.integers(1, 3))
    rings = []
    for part in range(count):
        points = np.array(draw(ring), np.float64) * (WIDTH / count - 2, HEIGHT) + (part * WIDTH / count + 1, 0)
        rings.append(np.round(points, 3))
    return rings


@st.composite
def planes(draw: Any) -> np.ndarray:
    """A mask with holes and several parts."""
    seed = draw(st.integers(0, 2**32 - 1))
    coarse = np.random.default_rng(seed).random((4, 6)) < draw(st.sampled_from((0.4, 0.7)))
    plane = np.kron(coarse, np.ones((6, 6), bool))
    plane[7, 7] = not plane[7, 7]
    return plane


# Polygons or planes of an image, and the labels of its objects.
images = st.one_of(
    st.lists(st.tuples(polygons(), st.integers(0, 2)), min_size=1, max_size=4),
    st.lists(st.tuples(planes(), st.integers(0, 2)), min_size=1, max_size=4),
)


def target_of(given: Sequence[tuple[Any, int]]) -> Instances:
    """The objects of an image: all different, each with pixels."""
    shapes = [shape for shape, _ in given]
    if isinstance(shapes[0], list):
        masks = Masks.from_polygons(shapes, SIZE)
    else:
        masks = Masks.from_dense(torch.from_numpy(np.stack(shapes))).pack()
    codes = [code["counts"] for code in masks.pack().rle()]
    areas = masks.areas().tolist()
    kept = [n for n in range(len(masks)) if areas[n] > 0 and codes[n] not in codes[:n]]
    return made(masks[kept], [given[n][1] for n in kept])


def written(dataset: Dataset, folder: Path, to: str) -> Dataset:
    """What is read back from a data set written in a format, found by sniffing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        convert_data(dataset, folder, to, allow_loss=True)
        return open_dataset(folder)


@pytest.mark.parametrize("to", KEEP_ALL)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(given_images=st.lists(images, min_size=1, max_size=2))
def test_objects_with_parts_holes_and_overlaps_are_the_same(to: str, given_images: list[Any]) -> None:
    data = [target_of(shapes) for shapes in given_images]
    with tempfile.TemporaryDirectory() as place:
        dataset = Drawn(Path(place) / "images", data)
        if not any(len(target) for target in data):
            return
        back = written(dataset, Path(place) / "out", to)
        assert back.classes == dataset.classes
        assert len(back) == len(dataset)
        names = [path.name for path in back.paths()]  # type: ignore[union-attr]
        for index, path in enumerate(dataset.paths()):
            own = names.index(path.name)  # type: ignore[union-attr]
            assert objects(back, own) == objects(dataset, index)


@pytest.mark.parametrize("to", ["voc", "label-maps", "coco-panoptic"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.lists(planes(), min_size=1, max_size=4), seed=st.integers(0, 2))
def test_objects_that_do_not_overlap_are_the_same_in_maps(to: str, data: list[np.ndarray], seed: int) -> None:
    free = np.ones(SIZE, bool)
    disjoint = []
    for plane in data:
        if (plane & free).any():
            disjoint.append(plane & free)
        free &= ~plane
    masks = Masks.from_dense(torch.from_numpy(np.stack(disjoint))).pack()
    with tempfile.TemporaryDirectory() as place:
        dataset = Drawn(Path(place) / "images", [made(masks, [(seed + n) % 3 for n in range(len(masks))])])
        back = written(dataset, Path(place) / "out", to)
        assert objects(back, 0) == objects(dataset, 0)
        assert back.classes == dataset.classes


def one(folder: Path, *rows: tuple[list[Any], int, bool]) -> Drawn:
    """One image with polygons, labels and crowd flags."""
    masks = Masks.from_polygons([rings for rings, _, _ in rows], SIZE)
    return Drawn(folder, [made(masks, [label for _, label, _ in rows], [crowd for _, _, crowd in rows])])


LEFT = [2.0, 2.0, 14.0, 2.0, 14.0, 20.0, 2.0, 20.0]
OVER = [10.0, 4.0, 20.0, 4.0, 20.0, 16.0, 10.0, 16.0]
RIGHT = [24.0, 5.0, 33.0, 5.0, 33.0, 12.0, 24.0, 12.0]


@pytest.mark.parametrize("to", ["coco", "labelme", "cvat", "via", "coco-panoptic"])
def test_crowd_regions_are_kept(tmp_path: Path, to: str) -> None:
    dataset = one(tmp_path / "images", ([LEFT], 0, False), ([RIGHT], 0, True))
    back = written(dataset, tmp_path / "out", to)
    assert [row[1] for row in objects(back, 0)] == [False, True]


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("yolo", r"1 of 3 objects \(crowd regions, which YOLO does not have\): they are left out"),
        ("voc", r"1 of 3 objects \(crowd regions, which Pascal VOC does not have\): their pixels become void"),
        ("label-maps", r"1 of 3 objects \(covered by others in part.*\): the smaller object keeps the pixels"),
    ],
)
def test_what_is_lost_is_said_and_nothing_is_written(tmp_path: Path, to: str, words: str) -> None:
    dataset = one(tmp_path / "images", ([LEFT], 0, False), ([OVER], 1, False), ([RIGHT], 1, True))
    with pytest.raises(LossError, match=words) as raised:
        convert_data(dataset, tmp_path / "out", to)
    assert "nothing was written" in str(raised.value)
    assert "image 0.png: annotation" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]
    result = convert_data(dataset, tmp_path / "out", to, allow_loss=True)
    assert result.counts == [(None, 1, 3)]


def test_every_format_of_the_list_can_be_written() -> None:
    assert set(writable_formats()) >= {
        "coco", "coco-panoptic", "yolo", "labelme", "via", "cvat", "voc", "cityscapes", "label-maps",
    }  # fmt: skip
