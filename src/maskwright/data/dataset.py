"""What every data set is: images with objects, without a word on where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from jaxtyping import UInt8
from torch import Tensor

from maskwright.structures import Instances, Panoptic

# COCO's person keypoints, in its order.
PERSON_KEYPOINTS = (
    "nose",
    *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist") for side in ("left", "right")),
    *(f"{side}_{part}" for part in ("hip", "knee", "ankle") for side in ("left", "right")),
)


@dataclass
class Sample:
    """One image as it is on disk, with what is annotated on it (in the image's own frame)."""

    image: UInt8[Tensor, "c H W"]
    target: Instances
    id: int | str
    path: Path | None = None

    @property
    def name(self) -> str:
        """For messages: the file, or the id where there is none."""
        return str(self.path) if self.path is not None else str(self.id)


class Dataset(torch.utils.data.Dataset[Sample]):
    """Images with annotated objects; label k is called `classes[k]` and is `category_ids[k]` in the file.

    `keypoint_names` is None where the set has no keypoints. `stuff` are those of `classes` that are regions, not
    countable objects: a target then divides the image (its masks are disjoint, one region per class). `strict` tells
    a loader what to do with an image that turns out to be broken in the middle of a run: stop, or leave it out with a
    warning.
    """

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    keypoint_names: tuple[str, ...] | None = None
    stuff: tuple[str, ...] = ()
    strict: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def sizes(self) -> list[tuple[int, int]]:
        """H, W of each image; nothing is decoded."""
        raise NotImplementedError

    def image_ids(self) -> list[int | str]:
        """The set's own ids, exact."""
        raise NotImplementedError

    def targets(self, index: int) -> Instances:
        """The objects of one image without decoding the image; `crowd` and `ids` are filled."""
        raise NotImplementedError

    def panoptic(self, index: int) -> Panoptic:
        """The same objects as the division of the image that they are, where there is `stuff`."""
        target = self.targets(index)
        things = torch.tensor([name not in self.stuff for name in self.classes], dtype=torch.bool)
        return Panoptic(target, things[target.labels])

    def areas(self, index: int) -> np.ndarray:
        """(N,) float64: the size of each object as the evaluation counts it. A file's own numbers where it has any."""
        masks = self.targets(index).masks
        assert masks is not None
        return masks.areas().double().numpy()

    def annotation_ids(self, index: int) -> list[Any]:
        """The objects' own ids, exact, also where they do not fit into the 64 bits of `Instances.ids`."""
        ids = self.targets(index).ids
        return [] if ids is None else ids.tolist()


def mirrored_keypoints(keypoints: Sequence[str] | None) -> tuple[int, ...] | None:
    """What each keypoint is called in the mirror: names with "left" and "right" change places, others stay."""
    if keypoints is None:
        return None
    order = {name: number for number, name in enumerate(keypoints)}

    def other(name: str) -> str:
        for one, two in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
            if one in name or two in name:
                return name.replace(one, "\0").replace(two, one).replace("\0", two)
        for one, two in (("l_", "r_"), ("L_", "R_")):
            if name.startswith((one, two)):
                return (two if name.startswith(one) else one) + name[2:]
        return name

    return tuple(order.get(other(name), number) for number, name in enumerate(keypoints))
