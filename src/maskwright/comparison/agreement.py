"""Where systems disagree, and what each of them is bad at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from maskwright.evaluation.coco import Detections, Truth
from maskwright.evaluation.confusion import grouped, match, overlaps_of
from maskwright.evaluation.result import Result
from maskwright.text import printable

_SIZES = {"s": "small", "m": "medium", "l": "large"}


def agreement(truth: Truth, found: Mapping[str, Detections], threshold: float = 0.5) -> npt.NDArray[np.float64]:
    """How far systems agree about each image.

    Args:
        truth: The annotations, for the sizes of the images.
        found: The predictions of each system.
        threshold: Predictions that score less are ignored.

    Returns:
        (images,): mean over pairs of systems of the F1 of one's predictions against the other's, at IoU 0.5 and equal
        class; 1 where all predict nothing.
    """
    images = len(truth.sizes)
    rows = {
        name: [part[value.scores[part] >= threshold] for part in grouped(value.owner, images)]
        for name, value in found.items()
    }
    by = "segm" if all(value.masks is not None or not len(value.owner) for value in found.values()) else "bbox"
    values = np.ones(images)
    for image in range(images):
        figures: list[float] = []
        for one, other in combinations(found, 2):
            a, b = rows[one][image], rows[other][image]
            if not len(a) and not len(b):
                figures.append(1.0)
                continue
            overlaps = overlaps_of(found[one], found[other], a, b, truth.sizes[image].tolist(), by)
            same = found[other].labels[b][:, None] == found[one].labels[a][None]
            pairs, _ = match(np.where(same, overlaps, 0), same, 0.5)
            figures.append(2 * len(pairs) / (len(a) + len(b)))
        values[image] = float(np.mean(figures)) if figures else 1.0
    return values


def weaknesses(result: Result, others: Sequence[Result]) -> list[str]:
    """What a system is bad at, beside other systems on the same images.

    Args:
        result: The system's result.
        others: The results of the others.

    Returns:
        Sentences, the most important first; empty if there is nothing to say.
    """
    kind = result.kinds[0]
    found: list[tuple[float, str]] = []

    def lead(name: str) -> tuple[float, float] | None:
        own = result.summary.get(f"{kind}/{name}", -1.0)
        best = max((other.summary.get(f"{kind}/{name}", -1.0) for other in others), default=-1.0)
        return (own, best) if own >= 0 and best >= 0 else None

    overall = lead("AP")
    for key, word in _SIZES.items():
        pair = lead(f"AP{key}")
        count = result.objects.get(key, 0)
        if pair is not None and count >= 5 and pair[1] - pair[0] >= 0.05:
            found.append(
                (pair[1] - pair[0], f"{word} objects: AP {_percent(pair[0])}, the best has {_percent(pair[1])}")
            )
    loose, tight = lead("AP50"), lead("AP75")
    if (
        loose
        and tight
        and overall
        and (loose[1] - loose[0]) < 0.5 * (tight[1] - tight[0])
        and tight[1] - tight[0] > 0.05
    ):
        found.append(
            (tight[1] - tight[0], f"exact outlines: AP75 {_percent(tight[0])}, the best has {_percent(tight[1])}")
        )
    edges = [r.summary.get("boundary/AP", -1.0) for r in (result, *others)]
    if edges[0] >= 0 and len(edges) > 1 and max(edges[1:]) - edges[0] >= 0.05:
        found.append(
            (max(edges[1:]) - edges[0], f"boundaries: AP {_percent(edges[0])}, the best has {_percent(max(edges[1:]))}")
        )
    for row in result.per_class if len(result.classes) > 1 else []:
        own = row.get(f"{kind}/AP", -1.0)
        peers = [p.get(f"{kind}/AP", -1.0) for other in others for p in other.per_class if p["class"] == row["class"]]
        if own is not None and own >= 0 and row["objects"] >= 5 and peers and max(peers) - own >= 0.1:
            name = printable(row["class"])
            found.append((max(peers) - own, f"class {name}: AP {_percent(own)}, the best has {_percent(max(peers))}"))
    if result.confusion is not None and result.images:
        objects = sum(image.objects for image in result.images)
        missed, spurious = (sum(getattr(image, name) for image in result.images) for name in ("missed", "spurious"))
        confused = sum(image.confused for image in result.images)
        if objects and missed / objects >= 0.3:
            found.append(
                (
                    missed / objects / 2,
                    f"misses {missed} of {objects} objects at score {result.confusion.score_threshold:g}",
                )
            )
        if objects and spurious / objects >= 0.3:
            found.append((spurious / objects / 2, f"{spurious} predictions without an object, for {objects} objects"))
        if objects and confused / objects >= 0.1:
            found.append((confused / objects, f"{confused} of {objects} objects are given another class"))
    return [sentence for _, sentence in sorted(found, key=lambda pair: -pair[0])[:4]]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
