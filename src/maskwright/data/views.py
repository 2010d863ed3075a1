"""Views of a data set: some of its images, some of its objects, other labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from maskwright.data.dataset import Dataset, Sample, as_dataset
from maskwright.errors import UsageError
from maskwright.structures import Instances


class View(Dataset):
    """A data set seen through a change; the base class of the views below changes nothing.

    Subclasses set `positions` and `labels` or override `order` and `apply`; everything else follows. All attributes
    of the `Dataset` interface are those of the inner data set, unless a subclass changes them.

    Args:
        inner: A data set, or anything that `as_dataset` accepts.

    Attributes:
        inner: The inner data set.
        positions: Position in the inner data set of each image.
        labels: New label of each label of the inner data set; objects with -1 are omitted.
    """

    def __init__(self, inner: Any):
        self.inner = as_dataset(inner)
        self.name, self.origin = self.inner.name, self.inner.origin
        self.classes, self.category_ids = self.inner.classes, self.inner.category_ids
        self.keypoint_names, self.stuff = self.inner.keypoint_names, self.inner.stuff
        self.strict, self.has_areas = self.inner.strict, self.inner.has_areas
        self.positions: Sequence[int] = range(len(self.inner))
        self.labels = torch.arange(len(self.classes))

    def order(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
        """Return the positions of the objects that are kept, in their new order, from the labels of an image."""
        return (self.labels[labels] >= 0).nonzero().flatten()

    def apply(self, target: Instances) -> Instances:
        """Return the view of a target of the inner data set."""
        kept = target[self.order(target.labels)]
        return replace(kept, labels=self.labels[kept.labels])

    def image_labels(self, index: int) -> np.ndarray:
        labels = torch.from_numpy(self.inner.image_labels(self.positions[index]))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        return self.labels[labels[self.order(labels)]].numpy()

    def white(self) -> int | None:
        return self.inner.white()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[self.positions[index]]
        return replace(sample, target=self.apply(sample.target))

    def sizes(self) -> list[tuple[int, int]]:
        sizes = self.inner.sizes()
        return [sizes[p] for p in self.positions]

    def image_ids(self) -> list[int | str]:
        ids = self.inner.image_ids()
        return [ids[p] for p in self.positions]

    def paths(self) -> list[Path | None]:
        paths = self.inner.paths()
        return [paths[p] for p in self.positions]

    def targets(self, index: int) -> Instances:
        return self.apply(self.inner.targets(self.positions[index]))

    def areas(self, index: int) -> np.ndarray:
        return np.asarray(self.inner.areas(self.positions[index]))[self._rows(index)]

    def annotation_ids(self, index: int) -> list[Any]:
        ids = self.inner.annotation_ids(self.positions[index])
        return [ids[row] for row in self._rows(index)]

    def scores(self, index: int) -> list[float] | None:
        scores = self.inner.scores(self.positions[index])
        return None if scores is None else [scores[row] for row in self._rows(index)]

    def extras(self, index: int) -> list[dict[str, Any]] | None:
        extras = self.inner.extras(self.positions[index])
        return None if extras is None else [extras[row] for row in self._rows(index)]

    def _rows(self, index: int) -> list[int]:
        return cast(list[int], self.order(self.inner.targets(self.positions[index]).labels).tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch


class Subset(View):
    """Some images of a data set.

    Args:
        inner: The data set.
        positions: Positions of the images.
    """

    def __init__(self, inner: Any, positions: Sequence[int]):
        super().__init__(inner)
        self.positions = list(positions)


class Renamed(View):
    """Labels of another list of class names; objects of all other classes are omitted.

    Args:
        inner: The data set.
        classes: The new class names.
    """

    def __init__(self, inner: Any, classes: Sequence[str]):
        super().__init__(inner)
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers.get(name, -1) for name in self.classes], dtype=torch.int64)
        known = dict(zip(self.classes, self.category_ids, strict=False))
        self.classes = tuple(classes)
        # A class that the data set does not have gets an id that the data set does not have either.
        ids = cast(Iterable[object], known.values())  # a user's own data set may have other ids
        unused = 1 + max((i for i in ids if isinstance(i, int)), default=0)
        self.category_ids = tuple(known.get(name, unused + number) for number, name in enumerate(classes))
        self.stuff = tuple(name for name in self.stuff if name in numbers)


class ThingsOnly(Renamed):
    """Without the stuff classes: for systems and metrics of instances.

    Args:
        inner: The data set.
    """

    def __init__(self, inner: Any):
        inner = as_dataset(inner)
        super().__init__(inner, [name for name in inner.classes if name not in inner.stuff])


class WithoutKeypoints(View):
    """Without keypoints.

    Args:
        inner: The data set.
    """

    def __init__(self, inner: Any):
        super().__init__(inner)
        self.keypoint_names = None

    def apply(self, target: Instances) -> Instances:
        return replace(target, keypoints=None)


class OneClass(View):
    """All objects with label 0: for class-agnostic systems and metrics.

    Objects are sorted by their original label; objects of one label keep their order. If several objects match a
    prediction equally well, the order decides, and pycocotools uses this one when it ignores classes (`useCats` 0).

    Args:
        inner: The data set.
        name: Name of the class.
    """

    def __init__(self, inner: Any, name: str = "object"):
        super().__init__(inner)
        self.labels = torch.zeros(len(self.classes), dtype=torch.int64)
        self.classes, self.category_ids, self.stuff = (name,), (1,), ()

    def order(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return labels.argsort(stable=True)


def one_class(objects: Instances) -> Instances:
    """Return objects with label 0, in the order of `OneClass`."""
    ordered = objects[objects.labels.argsort(stable=True)]
    return replace(ordered, labels=ordered.labels * 0)


def things_only(dataset: Any) -> Dataset:
    """Return a data set without its stuff classes; the same one if it has none."""
    dataset = as_dataset(dataset)
    return ThingsOnly(dataset) if dataset.stuff else dataset


def without_keypoints(dataset: Any) -> Dataset:
    """Return a data set without its keypoints; the same one if it has none."""
    dataset = as_dataset(dataset)
    return dataset if dataset.keypoint_names is None else WithoutKeypoints(dataset)


def evenly_spaced(dataset: Any, count: int | None) -> Dataset:
    """Return at most `count` images, evenly spaced over the data set and the same on every call; None: all."""
    dataset = as_dataset(dataset)
    total = len(dataset)
    if count is None or count >= total:
        return dataset
    return Subset(dataset, [i * total // count for i in range(count)])


class Mixture(Dataset):
    """Images drawn from several data sets, all objects as one class: for training without classes.

    Which image is drawn at a position depends on the seed and the position alone.

    Args:
        parts: The data sets and how often each is drawn, relative to the others.
        count: Number of images of the mixture.
        seed: Seed of the draws.
        name: Name of the class.

    Raises:
        UsageError: If there are no images to draw, or a share is not positive.
    """

    strict = True

    def __init__(self, parts: Sequence[tuple[Any, float]], count: int, seed: int = 0, name: str = "object"):
        self.parts = [OneClass(part) for part, _ in parts]
        shares = np.array([share for _, share in parts], float)
        if not len(parts) or not (shares > 0).all() or not all(len(part) for part in self.parts):
            raise UsageError("a mixture needs at least one data set, each with images and a share above 0")
        self.shares, self.count, self.seed = shares / shares.sum(), count, seed
        self.classes, self.category_ids = (name,), (1,)
        self.name = " + ".join(part.name for part in self.parts)

    def _drawn(self, index: int) -> tuple[Dataset, int]:
        rng = np.random.default_rng((self.seed, range(self.count)[index]))
        part = self.parts[int(rng.choice(len(self.parts), p=self.shares))]
        return part, int(rng.integers(len(part)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        part, position = self._drawn(index)
        return replace(part[position], id=range(self.count)[index] + 1)

    def targets(self, index: int) -> Instances:
        part, position = self._drawn(index)
        return part.targets(position)

    def image_labels(self, index: int) -> np.ndarray:
        return np.zeros(1, np.int64)  # every image counts as one with the class, so that none has to be drawn

    def sizes(self) -> list[tuple[int, int]]:
        every = [part.sizes() for part in self.parts]
        drawn = [self._drawn(index) for index in range(self.count)]
        numbers = {id(part): number for number, part in enumerate(self.parts)}
        return [every[numbers[id(part)]][position] for part, position in drawn]

    def image_ids(self) -> list[int | str]:
        return list(range(1, self.count + 1))
