"""Evaluation on clips: tracks of any image system, and tracks of results files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maskwright.data import Clip, Clips, DataWarning, open_dataset
from maskwright.errors import DataError, UsageError
from maskwright.evaluation.clip_evaluator import ClipEvaluator
from maskwright.evaluation.clip_result import ClipResult
from maskwright.evaluation.evaluator import match_classes
from maskwright.evaluation.track_results import VIDEOS, read_tracks, track_records, video_listing
from maskwright.files import write_json
from maskwright.inference.outputs import RecordStream
from maskwright.inference.predicting import predict
from maskwright.inference.preparing import chosen_device, prepare
from maskwright.inference.tracking import LOWEST, ObjectTracker, Tracker, make_tracker
from maskwright.structures import Instances, Masks
from maskwright.systems import System

TRACKED = "tracked.json"


def open_clips(data: str | Path | Any, split: str = "val") -> Clips:
    """Return a data set of clips.

    Args:
        data: A source of `open_dataset`, or a data set.
        split: The split.

    Raises:
        UsageError: If it has no clips.
    """
    opened = open_dataset(data, split) if isinstance(data, (str, Path)) else data
    if not isinstance(opened, Clips):
        raise UsageError(
            f"{data if isinstance(data, (str, Path)) else type(data).__name__}: has images, not clips; expected the "
            "layout of DAVIS, a YouTube-VIS file or clips[:OPTIONS]"
        )
    return opened


def detect(system: System, clip: Clip, **options: Any) -> Iterator[Instances]:
    """Find the objects in each frame of a clip.

    Args:
        system: The system, prepared or not.
        clip: The clip.
        **options: Options of `predict`.

    Yields:
        The objects of each frame, with labels of the system. An unreadable frame has none, with a warning.
    """
    source: Iterable[Any] = (
        list(clip.paths) if clip.paths is not None else (clip.image(frame) for frame in range(len(clip)))
    )
    for prediction in predict(system, source, **options):
        objects = prediction.instances
        if objects is None:
            warnings.warn(f"{prediction.error} (counted as a frame without objects)", DataWarning, stacklevel=2)
            objects = Instances.empty(clip.size)
        yield objects


def evaluate_clips(
    system: System,
    data: str | Path | Any,
    split: str = "val",
    *,
    tracker: str | ObjectTracker = "iou",
    tracker_options: Mapping[str, Any] | None = None,
    score_threshold: float = LOWEST,
    stability_threshold: float = 0.5,
    limit: int | None = None,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    compile: bool = False,
    batch: int = 1,
    out: str | Path | None = None,
    **options: Any,
) -> ClipResult:
    """Evaluate an image system on clips: its detections are tracked and compared with the annotated tracks.

    Args:
        system: The system; it must predict masks. Its classes are matched with the data set's by name; for data sets
            without classes, such as DAVIS, all objects count.
        data: A source of `open_dataset` with clips, or such a data set.
        split: The part of `data` to use.
        tracker: "iou", "bytetrack", "sort", "ocsort", or a tracker.
        tracker_options: Options of the tracker, if it is given by name.
        score_threshold: Lowest score of detections that the tracker gets.
        stability_threshold: Lowest score of detections that count for stability.
        limit: At most this many clips, the first ones.
        device: Where to compute; None: a GPU if there is one, otherwise the CPU.
        dtype: Type of weights and activations.
        compile: Compile the networks.
        batch: Frames per forward pass.
        out: Folder that the tracks are written to: tracked.json (YouTube-VIS results) and videos.json.
        **options: Further options of `predict`, such as `detections`, `tile` and `nms_threshold`.

    Returns:
        The metrics, see `ClipEvaluator`.

    Raises:
        UsageError: If an option is invalid, the system predicts no masks, the data set has no clips, or the two share
            no class.
    """
    if "masks" not in system.outputs:
        raise UsageError(f"{system.name} predicts no masks, which the metrics of clips compare")
    if not 0 <= stability_threshold <= 1:
        raise UsageError(f"stability_threshold must be in [0, 1], got {stability_threshold}")
    clips = _limited(open_clips(data, split), limit)
    labels = None if clips.classless else match_classes(system.classes, clips.classes)
    follower = make_tracker(tracker, **(tracker_options or {})) if isinstance(tracker, str) else tracker
    place = chosen_device(device, system)
    ready = prepare(system, place, dtype, compile)
    evaluator = ClipEvaluator(clips)
    stream = None if out is None else RecordStream(Path(out) / TRACKED)
    try:
        for clip in clips.clips:
            follower.reset()
            tracked: list[Instances] = []
            found: list[Instances] = []
            frames = detect(
                ready, clip, device=place, dtype=dtype, batch=batch, score_threshold=score_threshold, **options
            )
            for objects in frames:
                own = _relabelled(objects, labels)
                found.append(own if own.scores is None else own[own.scores >= stability_threshold])
                tracked.append(follower.update(own))
            evaluator.add(clip.name, tracked, found)
            if stream is not None:
                stream.add(track_records(clip, _in_one_class(tracked, clips), clips.category_ids))
    except BaseException:
        if stream is not None:
            stream.abandon()
        raise
    result = evaluator.result()
    words = (_tracker_words(follower), f"stability: scores from {stability_threshold:g}")
    result.protocol = replace(
        result.protocol,
        threshold=score_threshold,
        input_size=ready.preprocess.description,
        precision=dtype,
        device=str(place),
        batch=batch,
        note="; ".join(filter(None, (result.protocol.note, *words))),
    )
    if stream is not None and out is not None:
        write_json(Path(out) / VIDEOS, video_listing(clips), DataError)
        stream.close()
    return result


def evaluate_tracks(
    results: str | Path,
    data: str | Path | Any,
    split: str = "val",
    *,
    semi_supervised: bool = False,
    limit: int | None = None,
) -> ClipResult:
    """Evaluate tracks in a file or a folder.

    Args:
        results: A YouTube-VIS results file, or a folder of maps of ids; see `evaluation.track_results.read_tracks`.
        data: A source of `open_dataset` with clips, or such a data set.
        split: The part of `data` to use.
        semi_supervised: The tracks were given the objects of the first frame: J&F compares equal ids without the first
            and the last frame, as in DAVIS.
        limit: At most this many clips, the first ones.

    Returns:
        The metrics, see `ClipEvaluator`.

    Raises:
        AnnotationError: If the results cannot be read.
        UsageError: If the data set has no clips.
    """
    clips = open_clips(data, split)
    found = read_tracks(results, clips)
    chosen = _limited(clips, limit)
    evaluator = ClipEvaluator(chosen, semi_supervised=semi_supervised)
    for clip in chosen.clips:
        if clip.name in found:
            evaluator.add(clip.name, found[clip.name])
    result = evaluator.result()
    result.protocol = replace(
        result.protocol, note="; ".join(filter(None, (result.protocol.note, f"tracks of {Path(results).name}")))
    )
    return result


def _limited(clips: Clips, limit: int | None) -> Clips:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    chosen = clips if limit is None else clips.subset([clip.name for clip in clips.clips[:limit]])
    if not chosen.clips:
        raise UsageError("the data set has no clips")
    return chosen


def _relabelled(objects: Instances, labels: torch.Tensor | None) -> Instances:
    """Objects with labels of the data set, without those of classes that it does not have; with masks."""
    if objects.masks is None:
        objects = replace(objects, masks=Masks.empty(objects.image_size))
    if labels is None:
        return objects
    own = replace(objects, labels=labels[objects.labels])
    return own[own.labels >= 0]


def _in_one_class(frames: list[Instances], clips: Clips) -> list[Instances]:
    """Objects with labels of the data set: 0 for data sets without classes."""
    if not clips.classless:
        return frames
    return [replace(objects, labels=torch.zeros_like(objects.labels)) for objects in frames]


def _tracker_words(tracker: ObjectTracker) -> str:
    name = "mask IoU" if isinstance(tracker, Tracker) else type(tracker).__name__
    return f"tracker: {getattr(tracker, 'name', name)}"
