"""What a format cannot hold of a data set: found before anything is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from maskwright.data.exchange import writing
from maskwright.data.exchange.writing import Item, Part, crowd_of, items, labels_of, object_name, outlines_of, painted
from maskwright.text import printable


@dataclass
class Loss:
    """One kind of loss.

    Attributes:
        what: Which objects lose something: "with holes, which YOLO does not have".
        result: What happens to it.
        severe: Whether annotations are changed by it; otherwise it is only worth knowing.
        objects: The objects, as messages name them.
        total: Number of all objects.
    """

    what: str
    result: str
    severe: bool = True
    objects: list[str] = field(default_factory=list[str])
    total: int = 0

    @property
    def sentence(self) -> str:
        """The loss in one sentence, without the names of the objects."""
        return f"{len(self.objects)} of {self.total} objects ({self.what}): {self.result}"

    def lines(self, most: int = 10) -> list[str]:
        """Return the sentence and the first objects, one each line."""
        named = [name for name in self.objects if name]
        lines = [self.sentence, *(f"  {name}" for name in named[:most])]
        if len(named) > most:
            lines.append(f"  ... and {len(named) - most} more")
        return [printable(line) for line in lines]


def find_losses(parts: Sequence[Part], name: str, writer: Any) -> list[Loss]:
    """Find the objects of a data set that a format cannot hold completely.

    Args:
        parts: The splits.
        name: Name of the format, for messages.
        writer: Its module, see `writing.Writer`. It may define `CLASSES`, the only class names it can hold, and
            `MOST`, the largest number of objects of an image (`MOST_PER_CLASS`: of each class).

    Returns:
        The losses, severe ones first. No file is written or changed.
    """
    finder = _Finder(name, writer)
    for part in parts:
        for item in items(part):
            finder.add(part, item)
    found = [loss for loss in finder.losses.values() if loss.objects]
    for loss in found:
        loss.total = finder.total
    stuff = {region for part in parts for region in part.dataset.stuff}
    if stuff and writing.STUFF not in finder.holds:
        what = f"of a data set with {len(stuff)} stuff classes, which {name} does not tell apart"
        found.append(Loss(what, "regions become objects", False, [""] * finder.total, finder.total))
    return sorted(found, key=lambda loss: not loss.severe)


class _Finder:
    """Collects losses image by image."""

    def __init__(self, name: str, writer: Any):
        self.holds: frozenset[str] = writer.HOLDS
        self.classes: Iterable[str] | None = getattr(writer, "CLASSES_ONLY", None)
        self.most: int | None = getattr(writer, "MOST", None)
        self.most_per_class: int | None = getattr(writer, "MOST_PER_CLASS", None)
        self.total = 0
        out = "they are left out"
        boxes, crowd = getattr(writer, "BOXES_BECOME", out), getattr(writer, "CROWD_BECOMES", out)
        one = f"{name} has one object for each pixel"
        outline = f"{name} has one outline for each object"
        limit = self.most or self.most_per_class
        self.losses = {
            "empty": Loss("without pixels", out),
            "class": Loss(f"of classes that {name} does not have", out),
            "crowd": Loss(f"crowd regions, which {name} does not have", crowd),
            "boxes": Loss("boxes without masks", boxes, boxes == out),
            "keypoints": Loss(f"with keypoints, which {name} does not have", "these are left out"),
            "most": Loss(f"beyond the {limit} that {name} can number in an image", out),
            "hidden": Loss(f"covered by others completely, and {one}", out),
            "overlaps": Loss(f"covered by others in part, and {one}", "the smaller object keeps the pixels"),
            "holes": Loss(f"with holes, which {name} does not have", "these are filled"),
            "parts": Loss(f"with several parts, and {outline}", "the largest part is kept"),
            "cut": Loss(f"with holes or several parts, and {outline}", "lines of no width join these", False),
            "scores": Loss(f"with scores, which {name} does not have", "these are left out", False),
        }

    def add(self, part: Part, item: Item) -> None:
        """Look at the objects of one image."""
        objects = item.objects
        self.total += len(objects)
        labels, crowd, present = labels_of(objects), crowd_of(objects), writing.present(objects)
        kept = list(range(len(objects)))

        def lose(kind: str, positions: Iterable[int]) -> None:
            named = [object_name(part, item.index, n, labels[n]) for n in positions]
            self.losses[kind].objects += named

        def drop(kind: str, positions: Sequence[int]) -> None:
            lose(kind, positions)
            gone = set(positions)
            kept[:] = [n for n in kept if n not in gone]

        drop("empty", [n for n in kept if not present[n]])
        if self.classes is not None:
            allowed = set(self.classes)
            drop("class", [n for n in kept if part.dataset.classes[labels[n]] not in allowed])
        if writing.CROWD not in self.holds:
            drop("crowd", [n for n in kept if crowd[n]])
        if item.scores is not None and writing.SCORES not in self.holds:
            lose("scores", kept)
        if objects.keypoints is not None and writing.KEYPOINTS not in self.holds:
            labelled = (objects.keypoints[..., 2] > 0).any(1)
            lose("keypoints", [n for n in kept if bool(labelled[n])])
        if objects.masks is None:
            if writing.BOXES not in self.holds:
                drop("boxes", kept.copy())
            return
        self._limits(kept, labels, drop)
        if writing.OVERLAPS not in self.holds and kept:
            result = painted(objects[kept], [crowd[n] for n in kept])
            drop(
                "hidden", [n for n, lost, area in zip(kept, result.lost, result.areas, strict=True) if 0 < lost == area]
            )
            lose("overlaps", [n for n, lost in zip(kept.copy(), result.lost, strict=False) if lost and n in kept])
        if not {writing.PARTS, writing.HOLES} <= self.holds:
            self._outlines(item, kept, lose)

    def _limits(self, kept: list[int], labels: Sequence[int], drop: Any) -> None:
        if self.most is not None and len(kept) > self.most:
            drop("most", kept[self.most :])
        if self.most_per_class is not None:
            counts: dict[int, int] = defaultdict(int)
            over: list[int] = []
            for n in kept:
                counts[labels[n]] += 1
                if counts[labels[n]] > self.most_per_class:
                    over.append(n)
            drop("most", over)

    def _outlines(self, item: Item, kept: Sequence[int], lose: Any) -> None:
        shapes = outlines_of(item.objects)
        if writing.CUT in self.holds:
            missing = [n for n in kept if (shapes[n].holes and writing.HOLES not in self.holds)
                       or (shapes[n].parts > 1 and writing.PARTS not in self.holds)]  # fmt: skip
            lose("cut", missing)
            return
        if writing.HOLES not in self.holds:
            lose("holes", [n for n in kept if shapes[n].holes])
        if writing.PARTS not in self.holds:
            lose("parts", [n for n in kept if shapes[n].parts > 1])
