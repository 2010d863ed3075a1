"""Systems that find objects without classes."""

from __future__ import annotations

from collections.abc import Sequence

from maskwright.errors import UsageError
from maskwright.systems.system import System, Task


class ProposalSystem(System):
    """A system that predicts object proposals, all of one class.

    Its constructor takes `classes` like every other, but that is a single name. It trains on data sets with any classes
    and is evaluated as if they had one, by average recall (`evaluate(..., task="proposals")`).
    """

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances", "proposals"})

    def checked_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """`classes` as a tuple; UsageError unless there is exactly one."""
        if len(classes) != 1:
            raise UsageError(f"{self.name} predicts objects of one class; classes must be one name, got {len(classes)}")
        return tuple(classes)
