"""Systems that can segment a whole image into things and stuff."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.system import ClassRows, System, Task


class PanopticSystem(System):
    """A system whose segments can cover a whole image: things (countable objects) and stuff (regions).

    Its constructor takes `stuff` too: those of `classes` that are regions; none by default, which leaves an ordinary
    instance segmentation system. A target is an ordinary `Instances` over all classes, with one region per stuff class.
    """

    stuff: tuple[str, ...]

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances", "panoptic", "semantic"})

    @abstractmethod
    def decode(self, raw: Any, placements: Sequence[Placement]) -> list[Instances]:
        """Converts the raw output to objects as every system does: things only, even if there is stuff."""

    @abstractmethod
    def decode_panoptic(self, raw: Any, placements: Sequence[Placement]) -> list[Panoptic]:
        """Segments each image by the rule that the system was published with.

        Thresholds are further keywords: `score_threshold` (of a segment's own score) and `overlap_threshold` (the share
        of a segment's mask that must remain after overlaps are resolved), where the system has them.
        """

    @abstractmethod
    def decode_semantic(self, raw: Any, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """The label of each pixel of each image, on its own grid; -1 where a pixel has none."""

    def thing_classes(self, device: torch.device | str | None = None) -> Bool[Tensor, " k"]:
        """True for each class that is a countable object."""
        return torch.tensor([name not in self.stuff for name in self.classes], dtype=torch.bool, device=device)

    def stuff_rows(self) -> dict[str, ClassRows]:
        """The parameters with rows for stuff classes only, whether the system has such classes or not."""
        return {}

    def checked_stuff(self, stuff: Sequence[str]) -> tuple[str, ...]:
        """`stuff` as a tuple, for the constructor, once `classes` is set; UsageError if a name is not among them."""
        unknown = [name for name in stuff if name not in self.classes]
        if unknown:
            raise UsageError(
                f"{self.name}: stuff has {', '.join(map(repr, unknown[:3]))}, not among the {len(self.classes)} "
                "classes; stuff must be a subset of classes"
            )
        return tuple(stuff)
