"""Any data set with all its objects called the same: for systems and measures that know no classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from maskwright.structures import Instances


class OneClass:
    """A data set whose objects all have the label 0, whatever they were.

    They come in the order of the labels they had, those of a label in their own order: where several objects answer
    equally well for a prediction, that order decides, and pycocotools has it so where it is told to ignore classes.
    """

    def __init__(self, dataset: Any, name: str = "object"):
        self.inner = dataset
        self.classes, self.category_ids = (name,), (1,)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while being unpickled in a worker
            raise AttributeError(name)
        if name == "areas":
            given = self.inner.areas  # an AttributeError where the set has none
            return lambda index: given(index)[self._order(self.inner.targets(index)).numpy()]
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        sample = self.inner[index]
        return replace(sample, target=nameless(sample.target))

    def image_ids(self) -> list[Any]:
        return self.inner.image_ids()

    def sizes(self) -> list[tuple[int, int]]:
        return self.inner.sizes()

    def targets(self, index: int) -> Instances:
        return nameless(self.inner.targets(index))

    @staticmethod
    def _order(target: Instances) -> Tensor:
        return target.labels.argsort(stable=True)


def nameless(objects: Instances) -> Instances:
    """The same objects, all of label 0, in the order of the labels they had."""
    ordered = objects[objects.labels.argsort(stable=True)]
    return replace(ordered, labels=ordered.labels * 0)
