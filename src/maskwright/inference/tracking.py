"""Tracking by detection: objects that any image system finds in the frames of a clip get ids through time.

`Tracker` associates detections with tracks by the IoU of their masks (of boxes where there are no masks), in stages:

1. Detections with high scores, with all tracks at their predicted positions.
2. Detections with low scores, with the tracks of the last frame that are left (ByteTrack; Zhang et al., 2021, arXiv
   2110.06864): an object that is partly covered scores less but has not gone.
3. Detections with high scores that are left, with all tracks that are left, by the IoU of enlarged boxes (C-BIoU; Yang
   et al., 2022, arXiv 2211.14317): objects that move fast, and objects that return after they were covered. Boxes of
   lost tracks are enlarged more with every frame, because their positions become uncertain.

What remains of the detections with high scores starts new tracks. In each stage, the assignment with the largest sum of
IoU is chosen. Tracks move with constant velocity (of the center of the box, smoothed exponentially); masks keep their
shape. A track that is not found again within `memory` frames ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask

from maskwright.errors import MissingExtraError, UsageError
from maskwright.inference.predicting import Prediction, predict
from maskwright.ops.assignment import best_pairs
from maskwright.structures import Instances, rle
from maskwright.systems import System

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
TrackerName = Literal["iou", "bytetrack", "sort", "ocsort"]

LOWEST = 0.1  # score of the detections that trackers get
_BUFFER = 0.5  # enlargement of boxes in stage 3, as a share of their sides
_GROWTH = 0.1  # what a lost track adds per frame, up to ...
_LARGEST = 1.0
_SMOOTH = 0.5  # weight of the last displacement in the velocity
_FADE = 0.9  # factor of the velocity for each frame in which a track is lost


class ObjectTracker(Protocol):
    """Gives ids to detections, frame by frame."""

    def update(self, objects: Instances) -> Instances:
        """Return the tracked ones of the detections of the next frame, with ids."""
        ...

    def reset(self) -> None:
        """Forget all tracks, for the next clip."""
        ...


@dataclass(eq=False)
class _Track:
    """What is known of an object.

    Attributes:
        number: Its id.
        label: Its class.
        box: Its last box.
        corner: Upper left corner x, y of its last mask.
        crop: The mask inside its box; None without masks.
        velocity: Pixels per frame, x and y.
        lost: Number of frames since it was last found.
        hits: Number of frames in which it was found.
        weights: Sum of scores by class.
    """

    number: int
    label: int
    box: Floats
    corner: tuple[int, int]
    crop: npt.NDArray[np.bool_] | None
    velocity: Floats = field(default_factory=lambda: np.zeros(2))
    lost: int = 0
    hits: int = 1
    weights: dict[int, float] = field(default_factory=dict[int, float])

    def offset(self) -> Floats:
        """Predicted displacement x, y since it was last found, in the frame that follows."""
        return self.velocity * sum(_FADE**gap for gap in range(self.lost + 1))

    def predicted_box(self) -> Floats:
        return self.box + np.tile(self.offset(), 2)


class Tracker:
    """Associates detections by the IoU of their masks with a motion model; see the module for the method.

    The tracker keeps the last mask of each track. It changes neither its input nor anything else, and gives the same
    ids for the same frames.

    Args:
        high: Lowest score of detections that start tracks and are associated first.
        low: Lowest score of detections that are associated at all.
        match: Lowest IoU in the first stage.
        match_low: Lowest IoU in the second stage.
        match_again: Lowest IoU of enlarged boxes in the third stage; 1 or more leaves it out.
        memory: Number of frames for which a lost track is kept.
        confirm: Number of frames in which an object must be found before it is returned.
        same_class: Only detections of the class of a track are associated with it. False: any class, and a track has
            the class with the largest sum of scores so far.
        motion: Predict positions by constant velocity. False: objects are expected where they were.

    Raises:
        UsageError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        high: float = 0.5,
        low: float = 0.1,
        match: float = 0.3,
        match_low: float = 0.5,
        match_again: float = 0.2,
        memory: int = 30,
        confirm: int = 1,
        same_class: bool = True,
        motion: bool = True,
    ):
        if not 0 <= low <= high:
            raise UsageError(f"`low` must be at least 0 and at most `high`, got low {low} and high {high}")
        if min(match, match_low, match_again) <= 0:
            raise UsageError(f"lowest IoUs must be above 0, got {match}, {match_low} and {match_again}")
        for name, value in (("memory", memory), ("confirm", confirm)):
            if isinstance(value, bool) or not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UsageError(f"`{name}` must be an integer, got {value!r}")
        if memory < 0 or confirm < 1:
            raise UsageError(f"`memory` must be at least 0 and `confirm` at least 1, got {memory} and {confirm}")
        self.high, self.low = high, low
        self.match, self.match_low, self.match_again = match, match_low, match_again
        self.memory, self.confirm, self.same_class, self.motion = memory, confirm, same_class, motion
        self.reset()

    def reset(self) -> None:
        """Forget all tracks; ids begin with 1 again."""
        self._tracks: list[_Track] = []
        self._next = 1
        self._size: tuple[int, int] | None = None

    def update(self, objects: Instances) -> Instances:
        """Give ids to the detections of the next frame.

        Args:
            objects: The detections, with masks or boxes only. Without scores, all count as certain. Detections whose
                box is not finite or whose mask is empty are left out.

        Returns:
            The detections that belong to tracks, in their order, with `ids`; on the host, masks in compact form.

        Raises:
            UsageError: If the frame has another size than those before it, or `objects` are no `Instances`.
        """
        if not isinstance(objects, Instances):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not be checked
            raise UsageError(f"detections must be Instances, got {type(objects).__name__}; track_objects takes images")
        size = (int(objects.image_size[0]), int(objects.image_size[1]))
        if self._size is not None and size != self._size:
            raise UsageError(
                f"the frame is {size[0]} x {size[1]}, but those before it were {self._size[0]} x {self._size[1]}; call "
                "reset() before another clip"
            )
        self._size = size
        found = _Detections.of(objects.to("cpu"))
        owner: list[_Track | None] = [None] * len(found.labels)
        above = np.flatnonzero(found.scores >= self.high)
        below = np.flatnonzero((found.scores >= self.low) & (found.scores < self.high))
        left: list[_Track] = list(self._tracks)

        def associate(some: Ints, tracks: list[_Track], overlaps: _Overlaps, lowest: float) -> None:
            """Give detections to tracks."""
            free = np.array([row for row in some.tolist() if owner[row] is None], np.int64)
            if not len(free) or not tracks:
                return
            scores = overlaps(tracks, found, free)
            if self.same_class:
                scores = scores * (np.array([t.label for t in tracks])[:, None] == found.labels[free][None])
            scores = np.where(scores < lowest, 0.0, scores)
            rows, columns = best_pairs(scores)
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                if scores[row, column] > 0:
                    chosen = tracks[int(row)]
                    owner[int(free[column])] = chosen
                    left.remove(chosen)

        overlaps = self._mask_overlaps if found.crops is not None else self._box_overlaps
        associate(above, list(left), overlaps, self.match)
        associate(below, [track for track in left if not track.lost], overlaps, self.match_low)
        if self.match_again < 1:
            associate(above, list(left), self._enlarged_overlaps, self.match_again)
        for track in left:
            track.lost += 1
        for row, track in enumerate(owner):
            if track is not None:
                self._found(track, found, row)
        for row in above.tolist():
            if owner[row] is None:
                owner[row] = self._started(found, row)
        # A track that has not been found often enough must be found in every frame.
        self._tracks = [
            track for track in self._tracks if track.lost <= (self.memory if track.hits >= self.confirm else 0)
        ]
        kept = [row for row, track in enumerate(owner) if track is not None and track.hits >= self.confirm]
        tracks = [track for track in owner if track is not None and track.hits >= self.confirm]
        result = objects.to("cpu")[kept]
        return replace(
            result,
            masks=None if result.masks is None else result.masks.pack(),
            labels=torch.tensor([track.label for track in tracks], dtype=torch.int64),
            ids=torch.tensor([track.number for track in tracks], dtype=torch.int64),
        )

    def _started(self, found: _Detections, row: int) -> _Track:
        corner, crop = found.mask(row)
        track = _Track(self._next, int(found.labels[row]), found.boxes[row], corner, crop)
        track.weights[track.label] = float(found.scores[row])
        self._next += 1
        self._tracks.append(track)
        return track

    def _found(self, track: _Track, found: _Detections, row: int) -> None:
        """Move a track to a detection."""
        moved = (_center(found.boxes[row]) - _center(track.box)) / (track.lost + 1)
        if self.motion:
            track.velocity = moved if track.hits == 1 else _SMOOTH * moved + (1 - _SMOOTH) * track.velocity
        track.box = found.boxes[row]
        track.corner, track.crop = found.mask(row)
        track.lost = 0
        track.hits += 1
        label = int(found.labels[row])
        track.weights[label] = track.weights.get(label, 0.0) + float(found.scores[row])
        track.label = max(track.weights, key=lambda key: track.weights[key])

    def _mask_overlaps(self, tracks: list[_Track], found: _Detections, rows: Ints) -> Floats:
        """IoU (tracks, rows) of masks; those of tracks are displaced."""
        assert found.codes is not None
        assert self._size is not None
        edges = [_moved(track, self._size) for track in tracks]
        height, width = self._size
        own: Any = [{"size": [height, width], "counts": code} for code in rle.from_edges(edges, height * width)]
        other: Any = [found.codes[row] for row in rows.tolist()]
        return np.asarray(coco_mask.iou(own, other, [0] * len(other)), np.float64)

    def _box_overlaps(self, tracks: list[_Track], found: _Detections, rows: Ints) -> Floats:
        return _box_iou(np.stack([track.predicted_box() for track in tracks]), found.boxes[rows])

    def _enlarged_overlaps(self, tracks: list[_Track], found: _Detections, rows: Ints) -> Floats:
        """IoU of enlarged boxes, those of lost tracks and their partners more."""
        scale = np.minimum(_LARGEST, _BUFFER + _GROWTH * np.array([track.lost for track in tracks], np.float64))
        boxes = np.stack([track.predicted_box() for track in tracks])
        values = [
            _box_iou(_enlarged(box[None], by), _enlarged(found.boxes[rows], by))[0]
            for box, by in zip(boxes, scale.tolist(), strict=True)
        ]
        return np.stack(values)


_Overlaps = Callable[[list[_Track], "_Detections", Ints], Floats]


@dataclass(frozen=True)
class _Detections:
    """The detections of a frame as arrays."""

    boxes: Floats
    labels: Ints
    scores: Floats
    codes: list[dict[str, Any]] | None
    corners: list[tuple[int, int]]
    crops: list[npt.NDArray[np.bool_]] | None

    @classmethod
    def of(cls, objects: Instances) -> _Detections:
        scores = np.ones(len(objects)) if objects.scores is None else objects.scores.double().numpy()
        labels = objects.labels.numpy().astype(np.int64)
        if objects.masks is None:
            boxes = objects.boxes.double().numpy()
            scores = np.where(np.isfinite(boxes).all(1), scores, -1.0)
            return cls(boxes, labels, scores, None, [(0, 0)] * len(objects), None)
        masks = objects.masks.pack()
        frames, crops = masks.crops()
        boxes = frames.double().numpy()
        corners = [(int(frame[0]), int(frame[1])) for frame in frames]
        scores = np.where(np.array([crop.numel() for crop in crops]) > 0, scores, -1.0) if len(crops) else scores
        return cls(boxes, labels, scores, masks.rle(), corners, [crop.numpy() for crop in crops])

    def mask(self, row: int) -> tuple[tuple[int, int], npt.NDArray[np.bool_] | None]:
        return self.corners[row], None if self.crops is None else self.crops[row]


def _moved(track: _Track, size: tuple[int, int]) -> Ints:
    """Starts and ends of the runs of a track's mask at its predicted position, clipped to the image."""
    if track.crop is None:
        return np.zeros(0, np.int64)
    x, y = np.round(track.offset()).astype(int).tolist()
    return rle.edges(track.crop, track.corner[0] + x, track.corner[1] + y, size)


def _center(box: Floats) -> Floats:
    return (box[:2] + box[2:]) / 2


def _enlarged(boxes: Floats, by: float) -> Floats:
    sides = (boxes[:, 2:] - boxes[:, :2]) * by
    return np.concatenate([boxes[:, :2] - sides, boxes[:, 2:] + sides], 1)


def _box_iou(boxes: Floats, others: Floats) -> Floats:
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    areas, other_areas = (np.clip(part[:, 2:] - part[:, :2], 0, None).prod(1) for part in (boxes, others))
    union = areas[:, None] + other_areas[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


# ---- trackers of the library of that name ----------------------------------------------------------------------------


class LibraryTracker:
    """A tracker of the library `trackers` (Apache-2.0) with the interface of `Tracker`.

    It associates boxes. The library does not know classes, so each class has a tracker of its own.

    Args:
        name: "bytetrack", "sort" or "ocsort".
        **options: Options of the class of the library, such as `lost_track_buffer` or `frame_rate`.

    Raises:
        MissingExtraError: If the library is not installed.
        UsageError: If the name or an option is unknown.
    """

    def __init__(self, name: str = "bytetrack", **options: Any):
        try:
            import trackers  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            raise MissingExtraError("trackers", "track") from None
        kinds: dict[str, Any] = {
            "bytetrack": trackers.ByteTrackTracker,
            "sort": trackers.SORTTracker,
            "ocsort": trackers.OCSORTTracker,
        }
        if name not in kinds:
            raise UsageError(f"the tracker must be one of {', '.join(kinds)}, got {name!r}")
        self.name = name
        self._make: Callable[[], Any] = lambda: kinds[name](**options)
        try:
            self._make()
        except (TypeError, ValueError) as error:
            raise UsageError(f"invalid option of the tracker {name}: {error}") from None
        self.reset()

    def reset(self) -> None:
        """Forget all tracks; ids begin with 1 again."""
        self._trackers: dict[int, Any] = {}
        self._numbers: dict[tuple[int, int], int] = {}

    def update(self, objects: Instances) -> Instances:
        """Give ids to the detections of the next frame, those whose box is finite; see `Tracker.update`."""
        import supervision  # pyright: ignore[reportMissingTypeStubs]

        objects = objects.to("cpu")
        labels, finite = objects.labels.numpy(), objects.boxes.isfinite().all(1).numpy()
        ids: dict[int, int] = {}
        for label in sorted({*labels.tolist(), *self._trackers}):
            if label not in self._trackers:
                self._trackers[label] = self._make()
            rows = np.flatnonzero((labels == label) & finite)
            boxes = objects.boxes[rows].double().numpy().reshape(-1, 4)
            scores = np.ones(len(rows)) if objects.scores is None else objects.scores[rows].double().numpy()
            given = supervision.Detections(
                xyxy=boxes, confidence=scores, class_id=labels[rows], data={"row": rows}
            )  # fmt: skip
            found: Any = self._trackers[label].update(given)
            numbers: Any = found.tracker_id
            if numbers is None or not len(found):
                continue
            for row, number in zip(found.data["row"].tolist(), numbers.tolist(), strict=True):
                if number >= 0:
                    ids[row] = self._numbers.setdefault((label, number), len(self._numbers) + 1)
        kept = sorted(ids)
        result = objects[kept]
        masks = None if result.masks is None else result.masks.pack()
        return replace(result, masks=masks, ids=torch.tensor([ids[row] for row in kept], dtype=torch.int64))


def make_tracker(name: TrackerName | str = "iou", **options: Any) -> ObjectTracker:
    """Return a tracker by name.

    Args:
        name: "iou": `Tracker`. "bytetrack", "sort", "ocsort": `LibraryTracker`, which needs the extra `track`.
        **options: Options of the tracker.

    Raises:
        UsageError: If the name or an option is unknown.
        MissingExtraError: If the library is not installed.
    """
    if name != "iou":
        if name not in get_args(TrackerName):
            raise UsageError(f"the tracker must be one of {', '.join(get_args(TrackerName))}, got {name!r}")
        return LibraryTracker(name, **options)
    try:
        return Tracker(**options)
    except TypeError as error:
        raise UsageError(f"invalid option of the tracker iou: {error}") from None


def detection_tracker(name: TrackerName | str, score_threshold: float, rate: float | None = None) -> ObjectTracker:
    """Return a tracker by name, of which tracks start with detections of at least a score.

    Args:
        name: See `make_tracker`.
        score_threshold: Lowest score of a detection that starts a track.
        rate: Frames per second, by which the trackers of the library scale the time for which lost tracks are kept.

    Raises:
        UsageError: If the name is unknown or the score is not in [0, 1].
        MissingExtraError: If the library is not installed.
    """
    if not 0 <= score_threshold <= 1:
        raise UsageError(f"score_threshold must be in [0, 1], got {score_threshold}")
    if name == "iou":
        return Tracker(high=score_threshold, low=min(LOWEST, score_threshold))
    options: dict[str, Any] = {} if rate is None else {"frame_rate": rate}
    if name != "ocsort":
        options["track_activation_threshold"] = score_threshold
    if name != "sort":
        options["high_conf_det_threshold"] = score_threshold
    return make_tracker(name, **options)


def track(frames: Iterable[Instances], tracker: ObjectTracker | None = None) -> Iterator[Instances]:
    """Track the detections of a clip, one frame at a time.

    Args:
        frames: The detections of each frame, in order.
        tracker: The tracker; it is not reset. None: a new `Tracker`.

    Yields:
        For each frame the tracked detections, with ids.
    """
    tracker = tracker or Tracker()
    for objects in frames:
        yield tracker.update(objects)


def track_objects(
    system: System, source: Any, *, tracker: TrackerName | ObjectTracker = "iou", score_threshold: float = LOWEST,
    **options: Any,
) -> Iterator[Prediction]:  # fmt: skip
    """Track the objects that an image system finds in a sequence of frames, one frame at a time.

    Args:
        system: The system; `prepare` it first if several clips follow.
        source: The frames in order, as many images for `predict`: a folder, a list, or a generator for a live stream.
        tracker: A name, see `make_tracker`, or a tracker, which is not reset.
        score_threshold: Lowest score of the detections that the tracker gets.
        **options: Further options of `predict`. Frames are processed as they come with `batch=1`.

    Yields:
        For each frame its prediction, whose instances have ids. An unreadable frame has an `error`, and its
        tracks are lost for that frame.

    Raises:
        UsageError: If an option is invalid, or there are no frames.
        ImageError: If `source` is a single unreadable image.
    """
    follower = make_tracker(tracker) if isinstance(tracker, str) else tracker
    if not callable(getattr(follower, "update", None)):
        raise UsageError(f"the tracker must be a name or have the method update, got {type(tracker).__name__}")
    many = cast("Iterable[Any]", source)
    found = cast("Iterable[Prediction] | Prediction", predict(system, many, score_threshold=score_threshold, **options))
    predictions = [found] if isinstance(found, Prediction) else found
    size: tuple[int, int] | None = None
    for prediction in predictions:
        if prediction.instances is None:
            if size is not None:
                follower.update(Instances.empty(size, masks="masks" in system.outputs))
            yield prediction
            continue
        size = prediction.instances.image_size
        yield replace(prediction, instances=follower.update(prediction.instances))
