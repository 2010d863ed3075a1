"""The evaluator of clips: collects tracks clip by clip and computes a `ClipResult`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from maskwright.data.clips import Clip, Clips
from maskwright.errors import UsageError
from maskwright.evaluation.clip_result import STABILITY, ClipResult
from maskwright.evaluation.davis import Assignment, ObjectScores, davis_summary, object_scores
from maskwright.evaluation.result import Protocol
from maskwright.evaluation.stability import Stability, stability
from maskwright.evaluation.track_ap import ClipTracks, clip_tracks, track_ap
from maskwright.evaluation.track_metrics import Clear, Hota, Identity, Pairs, clear, hota, identity, pairs_of
from maskwright.structures import Instances, Masks


@dataclass(frozen=True)
class Counted:
    """What adds up over clips and classes.

    Attributes:
        hota: Sums of HOTA.
        clear: Counts of CLEAR.
        identity: Counts of the identity metrics.
        tracks: Number of annotated tracks.
        found: Number of predicted tracks.
    """

    hota: Hota
    clear: Clear
    identity: Identity
    tracks: int = 0
    found: int = 0

    @classmethod
    def zero(cls) -> Counted:
        """The sums of nothing."""
        return cls(Hota.zero(), Clear(), Identity())

    @classmethod
    def of(cls, pairs: Pairs) -> Counted:
        """The sums of a clip."""
        return cls(hota(pairs), clear(pairs), identity(pairs), pairs.truth_tracks, pairs.found_tracks)

    def __add__(self, other: Counted) -> Counted:
        return Counted(
            self.hota + other.hota, self.clear + other.clear, self.identity + other.identity,
            self.tracks + other.tracks, self.found + other.found,
        )  # fmt: skip

    def summary(self) -> dict[str, float]:
        """All measures by name."""
        return {**self.hota.summary(), **self.clear.summary(), **self.identity.summary()}


@dataclass(frozen=True)
class _Clip:
    """What was computed for one clip."""

    counted: list[Counted]  # for each class
    scores: ObjectScores | None
    tracks: list[ClipTracks]
    stability: Stability
    estimated: bool


class ClipEvaluator:
    """Compares tracks with the annotated objects of clips.

    Only annotated frames count. Overlaps are those of masks. All figures are computed in `add`, so that the tracks of
    one clip at a time are in memory.

    - HOTA, CLEAR and identity metrics: as TrackEval computes them, with the preprocessing of MOTSChallenge for crowd
      regions. Objects are compared within their class, and counts of all classes are added.
    - J&F: as DAVIS 2017 defines it, regardless of classes.
    - AP: that of YouTube-VIS.
    - Stability: see `evaluation.stability`.

    Args:
        clips: The data set. Clips without annotations are measured for stability only.
        semi_supervised: Compute J&F for predictions that were given the objects of the first frame, see
            `evaluation.davis`; of clips with at least three annotated frames.
        assignment: How J&F assigns tracks to objects otherwise.
    """

    def __init__(self, clips: Clips, *, semi_supervised: bool = False, assignment: Assignment = "J&F"):
        self.clips = clips
        self.semi_supervised = semi_supervised
        self.assignment: Assignment = assignment
        self._done: dict[str, _Clip] = {}

    def __len__(self) -> int:
        """Number of clips that were added."""
        return len(self._done)

    def add(self, name: str, frames: Sequence[Instances], detections: Sequence[Instances] | None = None) -> None:
        """Add the tracks of a clip.

        Args:
            name: Name of the clip.
            frames: The tracked objects of each frame with masks, ids and labels of the data set; objects with label -1
                are left out. Labels do not count for data sets without classes.
            detections: The detections of each frame, for the measures of stability; None: the tracked objects.

        Raises:
            UsageError: If the clip is unknown or was added before, or the objects do not fit it.
        """
        clip = self.clips.clip(name)
        if name in self._done:
            raise UsageError(f"the clip {name!r} was added twice")
        frames = [self._checked(clip, frame, objects, len(frames)) for frame, objects in enumerate(frames)]
        if detections is None:
            detections = frames
        else:
            detections = [self._checked(clip, n, objects, len(detections)) for n, objects in enumerate(detections)]
        self._done[name] = self._measured(clip, frames, detections)

    def _checked(self, clip: Clip, frame: int, objects: Instances, count: int) -> Instances:
        """Objects with the labels that count."""
        if count != len(clip):
            raise UsageError(f"the clip {clip.name!r} has {len(clip)} frames, got objects of {count}")
        if tuple(objects.image_size) != clip.size:
            raise UsageError(
                f"clip {clip.name!r}, frame {frame}: the objects are on a grid of {tuple(objects.image_size)}, the "
                f"frame is {clip.size} (H, W)"
            )
        if objects.masks is None:
            if len(objects):
                raise UsageError(f"clip {clip.name!r}, frame {frame}: the objects have no masks")
            objects = replace(objects, masks=Masks.empty(clip.size))
        if self.clips.classless:
            return replace(objects, labels=torch.zeros_like(objects.labels))
        largest, classes = int(objects.labels.max()) if len(objects) else 0, len(self.clips.classes)
        if largest >= classes:
            raise UsageError(
                f"clip {clip.name!r}, frame {frame}: an object has the label {largest}, but the data set has {classes} "
                f"class{'es' * (classes != 1)}; labels are counted from 0, and -1 leaves an object out"
            )
        return objects[objects.labels >= 0]

    def _measured(self, clip: Clip, frames: Sequence[Instances], detections: Sequence[Instances]) -> _Clip:
        truth: list[Instances | None] = [None] * len(clip)
        for frame in clip.annotated:
            target = clip.target(frame)
            zero = torch.zeros_like(target.labels)
            truth[frame] = replace(target, labels=zero) if self.clips.classless else target
        consecutive = any(a is not None and b is not None for a, b in pairwise(truth))
        compared = not self.clips.classless
        stable = stability(detections, truth if consecutive else None, classes=compared)
        classes = len(self.clips.classes)
        if not clip.annotated:
            return _Clip([Counted.zero()] * classes, None, [], stable, not consecutive)
        annotated = [target for target in truth if target is not None]
        found = [without(frames[frame], clip.void(frame)) for frame in clip.annotated]
        counted = [
            Counted.of(pairs_of(_of_class(annotated, label), _of_class(found, label), f"clip {clip.name!r}"))
            for label in range(classes)
        ]
        scores = None
        if not self.semi_supervised or len(annotated) > 2:
            scores = object_scores(
                annotated,
                found,
                semi_supervised=self.semi_supervised,
                assignment=self.assignment,
                clip=f"clip {clip.name!r}",
            )
        tracks = clip_tracks(annotated, found, classes, f"clip {clip.name!r}")
        return _Clip(counted, scores, tracks, stable, not consecutive)

    def result(self) -> ClipResult:
        """Compute the result. Clips that were not added count as clips in which nothing was found."""
        missing = [clip.name for clip in self.clips.clips if clip.name not in self._done and clip.annotated]
        for name in missing:
            clip = self.clips.clip(name)
            empty = replace(Instances.empty(clip.size), ids=torch.zeros(0, dtype=torch.int64))
            self._done[name] = self._measured(clip, [empty] * len(clip), [empty] * len(clip))
        done = [(clip, self._done[clip.name]) for clip in self.clips.clips if clip.name in self._done]
        classes = len(self.clips.classes)
        per_label = [_added([own.counted[label] for _, own in done]) for label in range(classes)]
        total = _added(per_label)
        summary: dict[str, float] = {}
        if any(clip.annotated for clip, _ in done):
            summary |= davis_summary([own.scores for _, own in done if own.scores is not None])
            summary |= total.summary()
            summary |= track_ap([own.tracks for _, own in done if own.tracks])
        for estimated, words in ((False, ""), (True, "not annotated, ")):
            parts = [own.stability for clip, own in done if own.estimated == estimated and len(clip) > 1]
            if parts:
                whole = sum(parts, Stability())
                summary |= {f"{STABILITY}{words}{name}": value for name, value in whole.summary().items()}
        return ClipResult(
            summary,
            self.clips.classes,
            self._protocol(len(done)),
            self._class_rows(per_label),
            [self._clip_row(clip, own) for clip, own in done],
            tuple(missing),
        )

    def _protocol(self, clips: int) -> Protocol:
        task = "semi-supervised" if self.semi_supervised else f"tracks assigned by {self.assignment}"
        annotated = sum(len(clip.annotated) for clip in self.clips.clips)
        note = "classes are not compared" if self.clips.classless else ""
        return Protocol(
            images=f"{self.clips.name}, {clips} clips, {annotated} annotated frames",
            evaluator=f"maskwright, mask IoU; J&F: {task}",
            note=note,
        )

    def _class_rows(self, per_label: Sequence[Counted]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for name, counted in zip(self.clips.classes, per_label, strict=True):
            rows.append({"class": name, "tracks": counted.tracks, "found": counted.found, **counted.summary()})
        return rows

    def _clip_row(self, clip: Clip, own: _Clip) -> dict[str, Any]:
        total = _added(own.counted)
        scores = [] if own.scores is None else [own.scores]
        stable = {f"{STABILITY}{name}": value for name, value in own.stability.summary().items()}
        measures = {"J&F": -1.0, **davis_summary(scores), **total.summary()}
        return {
            "clip": clip.name,
            "frames": len(clip),
            "tracks": total.tracks,
            "found": total.found,
            **measures,
            **stable,
        }


def _added(parts: Sequence[Counted]) -> Counted:
    return sum(parts, Counted.zero())


def _of_class(frames: Sequence[Instances], label: int) -> list[Instances]:
    return [objects[objects.labels == label] for objects in frames]


def without(objects: Instances, void: Masks | None) -> Instances:
    """Return objects without the pixels of a mask; objects that have no others are left out."""
    if void is None or objects.masks is None or not len(objects):
        return objects
    frames, crops = objects.masks.crops()
    plane = void.dense("cpu")[0].numpy()
    parts = [
        crop.numpy() & ~plane[int(y0) : int(y1), int(x0) : int(x1)]
        for (x0, y0, x1, y1), crop in zip(frames, crops, strict=True)
    ]
    size = (int(objects.image_size[0]), int(objects.image_size[1]))
    masks = Masks.from_crops(parts, frames[:, :2], size)
    kept = torch.from_numpy(np.array([part.any() for part in parts]))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    return replace(objects, masks=masks)[kept]
