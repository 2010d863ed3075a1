"""Comparison of an exported system with the one it was made from, on an image."""

# Neither Tensor.tolist nor scipy has types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.images import Reading
from maskwright.errors import UsageError
from maskwright.inference.sources import items, read
from maskwright.structures import Instances, Panoptic, Preprocess

# Upper bounds of float32 against float32. Rounding can move a score across a threshold, or one box before another of
# nearly the same score, whose suppression then differs: a few objects may have no counterpart.
MOST_PIXELS = 0.5
MOST_SCORE = 0.01
MOST_MASK = 0.02
MOST_UNMATCHED = 0.05
MOST_KEYPOINTS = 0.02  # of the keypoints of matched objects may be more than a pixel apart
MOST_RAW = 0.01
FREE_PIXELS = 2  # of each mask, at its border, where a value may be next to the threshold; small masks have few others


@dataclass(frozen=True)
class Difference:
    """How much the answers for one image differ.

    Attributes:
        objects: Number of objects that the checkpoint's system predicts.
        unmatched: Objects of either side without a counterpart on the other.
        box: Largest difference of a coordinate, in pixels.
        score: Largest difference of a score.
        mask: Largest share of the pixels of a mask (or of a panoptic image) that differ, two pixels of each mask left
            out.
        raw: Largest difference in an output of the network of the image, relative to the output's largest value.
        seconds: Time of the exported system for the image, preprocessing and decoding included.
        torch_seconds: Time of the checkpoint's system.
        cpu_seconds: Processor time of the exported system, of all threads.
        torch_cpu_seconds: Processor time of the checkpoint's system.
        keypoints: Share of the keypoints of matched objects that are more than a pixel apart.
    """

    objects: int
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    raw: float = 0.0
    seconds: float = 0.0
    torch_seconds: float = 0.0
    cpu_seconds: float = 0.0
    torch_cpu_seconds: float = 0.0
    keypoints: float = 0.0

    def __str__(self) -> str:
        if not self.objects and not self.raw:
            return (
                "no objects on the image, so that nothing was compared; choose another with --image; "
                f"{self.seconds:.2f} s, PyTorch {self.torch_seconds:.2f} s"
            )
        return (
            f"{self.objects} objects on the image, {self.unmatched} without a counterpart; largest differences: boxes "
            f"{self.box:.2g} pixels, scores {self.score:.2g}, masks {100 * self.mask:.2g} % of their pixels, network "
            f"{self.raw:.1g}; "
            f"{self.seconds:.2f} s ({self.cpu_seconds:.2f} s of the processor), PyTorch {self.torch_seconds:.2f} s "
            f"({self.torch_cpu_seconds:.2f} s)"
        )

    def exceeds(self) -> str | None:
        """The bound that is exceeded, in words; None if none is."""
        if not self.raw <= MOST_RAW:
            return f"an output of the network differs by {self.raw:.2g} of its largest value (at most {MOST_RAW:g})"
        allowed = max(1, round(MOST_UNMATCHED * self.objects))
        if self.unmatched > allowed:
            return f"{self.unmatched} of {self.objects} objects have no counterpart (at most {allowed} may)"
        if not self.box <= MOST_PIXELS:
            return f"boxes differ by {self.box:.3g} pixels (at most {MOST_PIXELS:g})"
        if not self.score <= MOST_SCORE:
            return f"scores differ by {self.score:.3g} (at most {MOST_SCORE:g})"
        if not self.mask <= MOST_MASK:
            return f"masks differ in {100 * self.mask:.3g} % of their pixels (at most {100 * MOST_MASK:g} %)"
        if not self.keypoints <= MOST_KEYPOINTS:
            return f"{100 * self.keypoints:.3g} % of the keypoints are elsewhere (at most {100 * MOST_KEYPOINTS:g} %)"
        return None


def relative_error(own: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of corresponding tensors, relative to the largest finite value of each."""
    errors = [0.0]
    for a, b in zip(own, other, strict=True):
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return math.inf
        if finite.any():
            errors.append(float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-6)))
    return max(errors)


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function returns, its seconds and its processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - wall, time.process_time() - processor


def compare(own: Instances | Panoptic, other: Instances | Panoptic) -> Difference:
    """The difference of two answers for one image; the first is that of the checkpoint's system."""
    if isinstance(own, Panoptic) and isinstance(other, Panoptic):
        return _compare_segments(own, other)
    assert isinstance(own, Instances)
    assert isinstance(other, Instances)
    return _compare_objects(own, other)


def _compare_objects(own: Instances, other: Instances) -> Difference:
    count = len(own)
    if not count or not len(other):
        return Difference(count, max(count, len(other)))
    assert own.scores is not None
    assert other.scores is not None
    apart = (own.boxes[:, None] - other.boxes[None]).abs().amax(-1)  # (N, M)
    scores = (own.scores[:, None] - other.scores[None]).abs()
    cost = apart + 100 * scores + 1e6 * (own.labels[:, None] != other.labels[None])
    # Queries that are not trained may have nearly the same box and score: of these the order decides.
    cost = cost + 1e-4 * (torch.arange(count)[:, None] - torch.arange(len(other))).abs()
    pairs = _assigned(cost)
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64)
    columns = torch.tensor([column for _, column in pairs], dtype=torch.int64)
    side = (own.boxes[:, 2:] - own.boxes[:, :2]).amax(1).clamp(min=4)[rows]
    same = (own.labels[rows] == other.labels[columns]) & (apart[rows, columns] < 0.5 * side)
    rows, columns = rows[same], columns[same]
    unmatched = max(count, len(other)) - len(rows)
    mask = 0.0
    if own.masks is not None and other.masks is not None and len(rows):
        shares: list[float] = []
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            a, b = own.masks[row].dense()[0], other.masks[column].dense()[0]
            different = max(0, int((a ^ b).sum()) - FREE_PIXELS)
            shares.append(different / max(1, int((a | b).sum())))
        mask = max(shares)
    if not len(rows):
        return Difference(count, unmatched)
    points = 0.0
    if own.keypoints is not None and other.keypoints is not None:
        moved = (own.keypoints[rows, :, :2] - other.keypoints[columns, :, :2]).abs().amax(2)
        points = float((moved > 1).float().mean())
    box, score = float(apart[rows, columns].max()), float(scores[rows, columns].max())
    return Difference(count, unmatched, box, score, mask, keypoints=points)


def _assigned(cost: Tensor) -> list[tuple[int, int]]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.double().nan_to_num(1e9, 1e9, 1e9).numpy())
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _compare_segments(own: Panoptic, other: Panoptic) -> Difference:
    a, b = own.semantic(), other.semantic()
    share = float((a != b).sum()) / max(1, a.numel())
    count = len(own.segments)
    return Difference(count, abs(count - len(other.segments)), mask=share)


def check_image(image: str | Path | None, size: tuple[int, int] = (240, 320), channels: int = 3) -> Any:
    """The image that exports are checked on: a file, or a generated one.

    Args:
        image: The file; None for a generated scene.
        size: Height and width of the scene.
        channels: Channels that the system expects; those of the scene are repeated.
    """
    if image is not None:
        path = Path(image)
        if not path.is_file():
            raise UsageError(f"{path}: no such image")
        return path
    from maskwright.data.scenes import Scenes

    scene = Scenes(1, size, seed=7)[0].image
    return scene if channels in (1, 3) else scene[torch.arange(channels) % 3]


def check_pixels(image: Any, preprocess: Preprocess) -> UInt8[Tensor, "c h w"]:
    """The image of the check as `predict` reads it: with the bands and the range of values of the system."""
    item = next(iter(items(image, False)))
    return read(replace(item, reading=Reading(preprocess.white, preprocess.bands)), preprocess)
