"""Another look at a data set: some of its images, some of their objects, labels counted otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.data.dataset import Dataset, Sample
from maskwright.structures import Instances


class View(Dataset):
    """The data set itself; what a view changes is `positions`, `labels` or `order`, and everything else follows.

    The inner set may be anything that answers as a `Dataset` does; without `areas`, the view has none either.
    """

    def __init__(self, inner: Any):
        self.inner = inner
        self.classes, self.category_ids = tuple(inner.classes), tuple(getattr(inner, "category_ids", ()))
        self.name, self.keypoint_names = getattr(inner, "name", ""), getattr(inner, "keypoint_names", None)
        self.stuff, self.strict = tuple(getattr(inner, "stuff", ())), getattr(inner, "strict", False)
        self.positions: Sequence[int] = range(len(inner))  # of the images
        self.labels = torch.arange(len(self.classes))  # old label -> new one; -1: such objects are left out
        if not hasattr(inner, "areas"):
            self.areas = None  # pyright: ignore[reportAttributeAccessIssue]  # an evaluation then takes those of the masks, and says so

    def order(self, labels: Tensor) -> Tensor:
        """Which objects of an image are seen, by their old labels, and in which order."""
        return (self.labels[labels] >= 0).nonzero().flatten()

    def seen(self, target: Instances) -> Instances:
        """What the view shows of a target of the inner set."""
        kept = target[self.order(target.labels)]
        return replace(kept, labels=self.labels[kept.labels])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[self.positions[index]]
        return replace(sample, target=self.seen(sample.target))

    def sizes(self) -> list[tuple[int, int]]:
        sizes = self.inner.sizes()
        return [sizes[p] for p in self.positions]

    def image_ids(self) -> list[int | str]:
        ids = self.inner.image_ids()
        return [ids[p] for p in self.positions]

    def targets(self, index: int) -> Instances:
        return self.seen(self.inner.targets(self.positions[index]))

    def areas(self, index: int) -> np.ndarray:
        return np.asarray(self.inner.areas(self.positions[index]))[self._rows(index)]

    def annotation_ids(self, index: int) -> list[Any]:
        ids = self.inner.annotation_ids(self.positions[index])
        return [ids[row] for row in self._rows(index)]

    def _rows(self, index: int) -> list[int]:
        return self.order(self.inner.targets(self.positions[index]).labels).tolist()


class Chosen(View):
    """Some images, by their positions."""

    def __init__(self, inner: Any, positions: Sequence[int]):
        super().__init__(inner)
        self.positions = list(positions)


class Renamed(View):
    """Labels counted in another list of class names; objects of other classes are left out."""

    def __init__(self, inner: Any, classes: Sequence[str]):
        super().__init__(inner)
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers.get(name, -1) for name in self.classes], dtype=torch.int64)
        known = dict(zip(self.classes, self.category_ids, strict=False))
        self.classes = tuple(classes)
        # A class that the file does not have gets a number that the file does not have either.
        spare = 1 + max((i for i in known.values() if isinstance(i, int)), default=0)
        self.category_ids = tuple(known.get(name, spare + number) for number, name in enumerate(classes))


class ThingsOnly(Renamed):
    """Without the stuff: for systems, and for measures, of objects alone."""

    def __init__(self, inner: Any):
        super().__init__(inner, [name for name in inner.classes if name not in inner.stuff])
        self.stuff = ()


class OneClass(View):
    """All objects have the label 0, whatever they were: for systems and measures that know no classes.

    They come in the order of the labels they had, those of a label in their own order: where several objects answer
    equally well for a prediction, that order decides, and pycocotools has it so where it is told to ignore classes.
    """

    def __init__(self, inner: Any, name: str = "object"):
        super().__init__(inner)
        self.labels = torch.zeros(len(self.classes), dtype=torch.int64)
        self.classes, self.category_ids, self.stuff = (name,), (1,), ()

    def order(self, labels: Tensor) -> Tensor:
        return labels.argsort(stable=True)


def nameless(objects: Instances) -> Instances:
    """Objects as `OneClass` shows them."""
    ordered = objects[objects.labels.argsort(stable=True)]
    return replace(ordered, labels=ordered.labels * 0)


def things_only(dataset: Any) -> Any:
    """The same set without its stuff; itself where it has none."""
    return ThingsOnly(dataset) if getattr(dataset, "stuff", ()) else dataset


def spread(dataset: Any, count: int | None) -> Any:
    """At most `count` images, evenly spread over the set, always the same ones."""
    total = len(dataset)
    if count is None or count >= total:
        return dataset
    return Chosen(dataset, [i * total // count for i in range(count)])
