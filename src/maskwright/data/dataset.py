"""The interface of a data set, and the adapter for user-defined ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data
from jaxtyping import UInt8
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures import Instances, Panoptic

# COCO's person keypoints, in COCO's order.
PERSON_KEYPOINTS = (
    "nose",
    *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist") for side in ("left", "right")),
    *(f"{side}_{part}" for part in ("hip", "knee", "ankle") for side in ("left", "right")),
)


@dataclass
class Sample:
    """One image with its annotations.

    Attributes:
        image: Pixels (C, H, W), uint8 RGB, as stored (EXIF orientation applied).
        target: The annotated objects, in the image's own frame.
        id: The image's id in the data set.
        path: The image file, if there is one.
    """

    image: UInt8[Tensor, "c H W"]
    target: Instances
    id: int | str
    path: Path | None = None

    @property
    def picture(self) -> Tensor:
        """The name of `image` in earlier development versions."""
        warnings.warn("Sample.picture is now Sample.image", DeprecationWarning, stacklevel=2)
        return self.image

    @property
    def name(self) -> str:
        """Name for messages: the file, or the id if there is no file."""
        return str(self.path) if self.path is not None else str(self.id)


class Dataset(torch.utils.data.Dataset[Sample]):
    """Images with annotated objects.

    Subclasses define `classes`, `category_ids`, `name`, `__len__`, `__getitem__`, `sizes`, `image_ids` and `targets`.
    Everything else has a default. `as_dataset` turns simpler objects into a `Dataset`.

    Attributes:
        name: Short name, for protocols and messages.
        origin: What the data set was read from and in which format; empty if it was not read.
        classes: Class names; label k is `classes[k]`.
        category_ids: Category id of each class in the annotation file.
        keypoint_names: Names of the keypoints; None if the data set has no keypoints.
        stuff: Those of `classes` that are regions rather than countable objects; empty if there are none. With stuff,
            the masks of a target are disjoint, and there is one region per stuff class.
        strict: What a loader does with an image that turns out to be damaged during training: raise (True), or skip it
            with a warning (False).
        has_areas: False if `areas` counts mask pixels only because the data set has no areas of its own.
    """

    name: str = "unnamed"
    origin: str = ""
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    keypoint_names: tuple[str, ...] | None = None
    stuff: tuple[str, ...] = ()
    strict: bool = False
    has_areas: bool = True

    def image_labels(self, index: int) -> npt.NDArray[np.int64]:
        """Return the labels of the objects of one image; images are not read."""
        return self.targets(index).labels.numpy()

    def white(self) -> int | None:
        """Return the value that becomes 255 in images with more than 8 bits; None if there are no such images."""
        return None

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Return the image at position `index` with its annotations."""
        raise NotImplementedError

    def sizes(self) -> list[tuple[int, int]]:
        """Return H, W of each image, without decoding any."""
        raise NotImplementedError

    def image_ids(self) -> list[int | str]:
        """Return the id of each image, exactly as in the data set."""
        raise NotImplementedError

    def paths(self) -> list[Path | None]:
        """Return the file of each image; None for an image without a file."""
        return [None] * len(self)

    def targets(self, index: int) -> Instances:
        """Return the objects of one image without decoding it; `crowd` and `ids` are filled."""
        raise NotImplementedError

    def panoptic(self, index: int) -> Panoptic:
        """Return the segments of one image, things and stuff.

        Raises:
            ValueError: If the targets have no masks.
        """
        target = self.targets(index)
        things = torch.tensor([name not in self.stuff for name in self.classes], dtype=torch.bool)
        return Panoptic(target, things[target.labels])

    def areas(self, index: int) -> npt.NDArray[np.float64]:
        """Return the area of each object in pixels (N,), as the evaluation uses it.

        Areas of the annotation file where it has them, otherwise pixel counts of the masks, or box areas if there are
        no masks.
        """
        target = self.targets(index)
        if target.masks is not None:
            areas = target.masks.areas()
        else:
            areas = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(1)
        return areas.double().numpy()

    def annotation_ids(self, index: int) -> list[Any]:
        """Return the ids of the objects of one image, exact also where they exceed the 64 bits of `Instances.ids`."""
        ids = self.targets(index).ids
        return [] if ids is None else ids.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def extras(self, index: int) -> list[dict[str, Any]] | None:
        """Return further fields of the objects of one image, which formats with fields of any name keep (COCO).

        None without such fields.
        """
        del index
        return None

    def scores(self, index: int) -> list[float] | None:
        """Return the scores of the objects of one image; None for annotations."""
        scores = self.targets(index).scores
        return None if scores is None else [float(score) for score in scores]


def as_dataset(source: Any) -> Dataset:
    """Return `source` as a `Dataset`; functions that take a data set from the user call this once.

    Args:
        source: A `Dataset`, which is returned unchanged, or any object with `__len__`, `__getitem__` and `classes`.
            Its items are (image, target) pairs, or objects with these attributes, such as `Sample`. Whatever else of
            the interface of `Dataset` it defines is used; the rest is derived from the items, where `sizes` and
            `targets` decode images.

    Returns:
        The data set.

    Raises:
        UsageError: If `source` lacks one of the three.
    """
    if isinstance(source, Dataset):
        return source
    missing = [name for name in ("__len__", "__getitem__", "classes") if not hasattr(source, name)]
    if missing:
        raise UsageError(
            f"a data set needs {' and '.join(missing)}, which {type(source).__name__!r} does not have; give a "
            "maskwright.data.Dataset, or an object with __len__, __getitem__ and classes"
        )
    return AdaptedDataset(source)


class AdaptedDataset(Dataset):
    """A `Dataset` made of a simpler object; made by `as_dataset`."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.classes = tuple(str(name) for name in inner.classes)
        self.category_ids = tuple(getattr(inner, "category_ids", ())) or tuple(range(1, len(self.classes) + 1))
        self.name = str(getattr(inner, "name", "") or "unnamed")
        self.origin = str(getattr(inner, "origin", ""))
        names: Sequence[str] | None = getattr(inner, "keypoint_names", None)
        self.keypoint_names = None if names is None else tuple(names)
        self.stuff = tuple(getattr(inner, "stuff", ()))
        self.strict = bool(getattr(inner, "strict", False))
        self.has_areas = bool(getattr(inner, "has_areas", getattr(inner, "areas", None) is not None))
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def white(self) -> int | None:
        own: Any = getattr(self.inner, "white", None)
        white: Any = own() if callable(own) else None
        return white

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        item: Any = self.inner[index]
        if isinstance(item, Sample):
            return item
        if isinstance(item, tuple | list):
            image, target = cast(Sequence[Any], item)
            return Sample(image, target, index + 1)
        return Sample(item.image, item.target, getattr(item, "id", index + 1), getattr(item, "path", None))

    def sizes(self) -> list[tuple[int, int]]:
        if hasattr(self.inner, "sizes"):
            return list(self.inner.sizes())
        if self._sizes is None:
            images = (self[index].image for index in range(len(self)))
            self._sizes = [(image.shape[1], image.shape[2]) for image in images]
        return list(self._sizes)

    def image_ids(self) -> list[int | str]:
        if hasattr(self.inner, "image_ids"):
            return list(self.inner.image_ids())
        return list(range(1, len(self) + 1))

    def paths(self) -> list[Path | None]:
        return list(self.inner.paths()) if hasattr(self.inner, "paths") else super().paths()

    def targets(self, index: int) -> Instances:
        return self.inner.targets(index) if hasattr(self.inner, "targets") else self[index].target

    def areas(self, index: int) -> npt.NDArray[np.float64]:
        if getattr(self.inner, "areas", None) is None:
            return super().areas(index)
        return np.asarray(self.inner.areas(index), np.float64).reshape(-1)

    def annotation_ids(self, index: int) -> list[Any]:
        if hasattr(self.inner, "annotation_ids"):
            return list(self.inner.annotation_ids(index))
        return super().annotation_ids(index)


def mirrored_keypoints(keypoints: Sequence[str] | None) -> tuple[int, ...] | None:
    """Return the permutation of keypoints under a left-right flip, derived from their names.

    Args:
        keypoints: Names; "left" and "right" (or the prefixes `l_` and `r_`) mark keypoints that swap.

    Returns:
        For each keypoint the position of its counterpart; its own position if there is none. None for None.
    """
    if keypoints is None:
        return None
    order = {name: number for number, name in enumerate(keypoints)}

    def counterpart(name: str) -> str:
        for one, two in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
            if one in name or two in name:
                return name.replace(one, "\0").replace(two, one).replace("\0", two)
        for one, two in (("l_", "r_"), ("L_", "R_")):
            if name.startswith((one, two)):
                return (two if name.startswith(one) else one) + name[2:]
        return name

    return tuple(order.get(counterpart(name), number) for number, name in enumerate(keypoints))
