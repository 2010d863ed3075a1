"""The common part of generated data sets: how objects are placed, annotated and written."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from maskwright.data.coco_json import coco_categories, image_entry, write_coco_json
from maskwright.data.dataset import Dataset, Sample
from maskwright.data.drawing_shapes import Stamp
from maskwright.data.painting import cut_stamp
from maskwright.data.panoptic import write_panoptic
from maskwright.errors import DataError, UsageError
from maskwright.files import write_bytes
from maskwright.structures import Instances, Masks

LARGEST = 8192  # longest side of a generated image


def text_options(text: str, names: Collection[str], example: str) -> dict[str, str]:
    """The options of generated data that a text "KIND:NAME=VALUE,..." describes.

    Args:
        text: The text.
        names: The options that there are.
        example: A valid text, for the message.

    Raises:
        UsageError: If an option is unknown, has no value or is given twice, or seed or count are negative.
    """
    options: dict[str, str] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in names:
            raise UsageError(
                f"{text!r}: unknown option {part!r}; expected NAME=VALUE with a name of {', '.join(names)}, as in "
                f"{example}"
            )
        if name in options:
            raise UsageError(f"{text!r}: the option {name!r} is given twice; give it once")
        options[name] = value
    for name in ("seed", "count"):  # checked here, because splits other than "train" have numbers derived from them
        if options.get(name, "").strip().startswith("-"):
            raise UsageError(f"{text!r}: {name} must not be negative")
    return options


@dataclass
class Thing:
    """One object of a scene: its position and outline; its appearance is drawn later.

    Attributes:
        stamp: Outline and position.
        label: The class; -1: an unlabelled occluder.
        area: Number of pixels inside the image, including hidden ones.
        shown: What is painted, if that is not all of `stamp`.
    """

    stamp: Stamp
    label: int
    area: int
    shown: Stamp | None = None


@dataclass
class Layout:
    """Where the objects of a scene are.

    Attributes:
        things: The objects, from the bottom to the top.
        owner: (H, W) int16: position in `things` of the visible object at a pixel, -1 for the background.
        ground: (H, W) int64: position in GROUNDS at a pixel, visible or not; None without stuff.
        visible: Number of visible pixels of each object.
    """

    things: list[Thing]
    owner: np.ndarray
    ground: np.ndarray | None = None
    visible: list[int] = field(default_factory=list[int])

    def lay(
        self,
        stamp: Stamp,
        label: int,
        fewest: float,
        smallest: int = 20,
        apart: bool = False,
        shown: Stamp | None = None,
    ) -> bool:
        """Place a stamp on top, unless too little of it or of what it covers would stay visible.

        Args:
            stamp: The object.
            label: Its class.
            fewest: Fraction of every object that must stay visible.
            smallest: Number of pixels that the new object must have inside the image.
            apart: Refuse any overlap.
            shown: What is painted, if that is not all of `stamp`.

        Returns:
            Whether the object was placed.
        """
        left = self.visible
        mask, window = cut_stamp(stamp.alpha, stamp, self.owner.shape)
        solid = mask >= 128
        area = int(np.count_nonzero(solid))
        if area < smallest or area < 0.5 * np.count_nonzero(stamp.alpha >= 128):
            return False
        below = self.owner[*window]
        covered = np.bincount(below[solid] + 1, minlength=len(left) + 1)[1:]
        if apart and covered.any():
            return False
        after = [seen - lost for seen, lost in zip(left, covered.tolist(), strict=True)]
        if any(seen < max(12, fewest * t.area) for seen, t in zip(after, self.things, strict=True)):
            return False
        below[solid] = len(left)
        left[:] = [*after, area]
        self.things.append(Thing(stamp, label, area, shown))
        return True

    def visible_parts(self, chosen: list[int]) -> tuple[list[npt.NDArray[np.bool_]], list[tuple[int, int]]]:
        """The visible pixels of some objects as crops, and the upper left corners x, y of these."""
        crops: list[npt.NDArray[np.bool_]] = []
        corners: list[tuple[int, int]] = []
        for n in chosen:
            stamp = self.things[n].stamp
            _, window = cut_stamp(stamp.alpha, stamp, self.owner.shape)
            crops.append(self.owner[*window] == n)
            corners.append((window[1].start, window[0].start))
        return crops, corners


class GeneratedScenes(Dataset):
    """Generated images of one size; image i depends only on the settings and i, and image ids are 1, 2, ...

    Subclasses place the objects (`_layout`), paint the image (`_paint`) and describe the objects (`_target`).

    Attributes:
        count: Number of images.
        size: H, W of every image.
        seed: Seed of the random numbers.
        stuff: Names of the stuff classes, the last of `classes`.
    """

    count: int
    size: tuple[int, int]
    seed: int
    stuff: tuple[str, ...] = ()

    def _layout(self, index: int) -> Layout:
        raise NotImplementedError

    def _paint(self, index: int, layout: Layout) -> np.ndarray:
        raise NotImplementedError

    def _target(self, index: int, layout: Layout) -> Instances:
        """The visible parts of the labelled objects."""
        chosen = [n for n, thing in enumerate(layout.things) if thing.label >= 0]
        crops, corners = layout.visible_parts(chosen)
        return self._instances(index, crops, corners, [layout.things[n].label for n in chosen])

    def _instances(
        self,
        index: int,
        crops: list[npt.NDArray[np.bool_]],
        corners: list[tuple[int, int]],
        labels: list[int],
        keypoints: torch.Tensor | None = None,
    ) -> Instances:
        """Objects with masks that are given as crops and their upper left corners x, y."""
        masks = Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), self.size)
        return Instances(
            self.size,
            masks.boxes(),
            torch.tensor(labels, dtype=torch.int64),
            masks,
            keypoints=keypoints,
            crowd=torch.zeros(len(labels), dtype=torch.bool),
            ids=torch.arange(len(labels)) + index * 1000 + 1,
        )

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"{self.name}: {self.count} images of {self.size[0]} x {self.size[1]}, {len(self.classes)} classes"

    def __getitem__(self, index: int) -> Sample:
        index = range(self.count)[index]
        layout = self._layout(index)
        pixels = torch.from_numpy(self._paint(index, layout)).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        return Sample(pixels, self._target(index, layout), index + 1)

    def sizes(self) -> list[tuple[int, int]]:
        return [self.size] * self.count

    def image_ids(self) -> list[int | str]:
        return list(range(1, self.count + 1))

    def targets(self, index: int) -> Instances:
        index = range(self.count)[index]
        return self._target(index, self._layout(index))

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path, split: str = "train") -> Path:
        """Write a COCO data set: `FOLDER/SPLIT/*.png` and `FOLDER/annotations/instances_SPLIT.json`.

        With stuff, panoptic_SPLIT.json and its maps are written instead; with figures, person_keypoints_SPLIT.json is
        written as well. Reading the data set returns the same images and masks.

        Args:
            folder: The folder; created if needed.
            split: Name of the split.

        Returns:
            The annotation file.

        Raises:
            DataError: If a file cannot be written.
        """
        folder = Path(folder)
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(self.count):
            sample = self[index]
            name = f"{index + 1:06d}.png"
            data = io.BytesIO()
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(data, "PNG")
            write_bytes(folder / split / name, data.getvalue(), DataError, sync=False)
            entries.append(image_entry(index + 1, name, self.size))
            annotations += self._records(index, sample.target)
        if self.stuff:
            segments = ((entry, self.panoptic(index)) for index, entry in enumerate(entries))
            path = folder / "annotations" / f"panoptic_{split}.json"
            return write_panoptic(path, segments, self.classes, self.category_ids, self.stuff)
        categories = coco_categories(self.classes, self.category_ids, keypoints=self.keypoint_names)
        info = {"description": repr(self)}
        if self.keypoint_names:
            path = folder / "annotations" / f"person_keypoints_{split}.json"
            write_coco_json(path, entries, annotations, categories, info=info)
        path = folder / "annotations" / f"instances_{split}.json"
        return write_coco_json(path, entries, annotations, categories, info=info)

    def _records(self, index: int, target: Instances) -> list[dict[str, Any]]:
        assert target.masks is not None
        assert target.ids is not None
        areas = cast(list[int], target.masks.areas().tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        ids = cast(list[int], target.ids.tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        records = target.to_coco(index + 1, self.category_ids)
        for row, (record, number) in enumerate(zip(records, ids, strict=True)):
            record.update(id=number, area=areas[row], iscrowd=0)
            if target.keypoints is not None:
                record["keypoints"] = [round(v, 3) for v in record["keypoints"]]
                record["num_keypoints"] = int((target.keypoints[row, :, 2] > 0).sum())
        return records
