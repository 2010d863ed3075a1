"""Files of tracks: results in the format of YouTube-VIS, and folders of maps of ids as in DAVIS.

A results file is a list of records with video_id, category_id, score and segmentations (one per frame of the clip; null
where the object is absent). The file `videos.json`, which `evaluate` writes beside it, names the clips and classes that
its ids stand for; it is used if it lists every id. An annotation file with the keys videos, annotations and categories
is accepted in place of a results file, too.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from maskwright.data.clips import Clip, Clips
from maskwright.data.davis import instances_from_map, read_ids
from maskwright.data.values import parse_float, parse_id, parse_int, shortened
from maskwright.data.youtube_vis import masks_of, tracks_of
from maskwright.errors import AnnotationError
from maskwright.structures import Instances, Masks

Record = dict[str, Any]
VIDEOS = "videos.json"  # written beside tracked.json
_EXPECTED = "expected a list of records with video_id, category_id, score and segmentations (YouTube-VIS results)"


def track_records(clip: Clip, frames: Sequence[Instances], category_ids: Sequence[int]) -> list[Record]:
    """Return the tracks of a clip as YouTube-VIS results, with the id of the object as "track_id".

    Args:
        clip: The clip.
        frames: The tracked objects of each frame with masks, ids and scores.
        category_ids: Category id of each label; objects with label -1 are left out.
    """
    kept = [objects[objects.labels >= 0] for objects in frames]
    return [
        {
            "video_id": clip.number,
            "category_id": int(category_ids[track.label]),
            "score": track.score,
            "track_id": number,
            "segmentations": track.segmentations,
        }
        for number, track in tracks_of(list(enumerate(kept)), len(clip)).items()
    ]


def video_listing(clips: Clips) -> Record:
    """Return the content of `videos.json`: the names of the clips and classes by id."""
    return {
        "videos": [{"id": clip.number, "name": clip.name, "length": len(clip)} for clip in clips.clips],
        "categories": [{"id": i, "name": name} for i, name in zip(clips.category_ids, clips.classes, strict=True)],
    }


def read_tracks(source: str | Path, clips: Clips) -> dict[str, list[Instances]]:
    """Read the tracks of clips from a file of results or from a folder of maps of ids.

    Args:
        source: A JSON file as described above, or a folder with CLIP/FRAME.png or CLIP/masks/FRAME.png (as `track`
            writes them), whose pixels are ids of objects. Frames have the names of the clip's frames, or 00000, 00001,
            ... Without a file, a frame has no objects.
        clips: The data set.

    Returns:
        The tracked objects of each frame by the name of the clip, with labels of the data set; -1 for classes that it
        does not have. Clips of which the source has no record are absent.

    Raises:
        AnnotationError: If the source cannot be read or belongs to other clips; the message names the record.
    """
    path = Path(source)
    return _read_maps(path, clips) if path.is_dir() else _read_records(path, clips)


# ---- maps of ids -----------------------------------------------------------------------------------------------------


def _read_maps(folder: Path, clips: Clips) -> dict[str, list[Instances]]:
    found: dict[str, list[Instances]] = {}
    for clip in clips.clips:
        place = folder / clip.name
        if not place.is_dir():
            continue
        frames: list[Instances] = []
        names = [f"{f'{n:05d}' if clip.paths is None else clip.paths[n].stem}.png" for n in range(len(clip))]
        if (place / "masks").is_dir() and not any((place / name).is_file() for name in names):
            place = place / "masks"
        for name in names:
            path = place / name
            known = path.is_file()
            frames.append(instances_from_map(read_ids(path, clip.size, wide=True)) if known else _empty(clip.size))
        others = sorted(entry.name for entry in place.iterdir())
        if others and not any((place / name).is_file() for name in names):
            raise AnnotationError(
                f"{place}: none of its files, such as {others[0]}, is the map of a frame of this clip; expected names "
                f"such as {names[0]}"
            )
        found[clip.name] = frames
    if not found:
        named = ", ".join(clip.name for clip in clips.clips[:4])
        raise AnnotationError(f"{folder}: has no folder for a clip of {clips.name}; expected folders such as {named}")
    return found


def _empty(size: tuple[int, int]) -> Instances:
    objects = Instances.empty(size, scores=False)
    objects.ids = torch.zeros(0, dtype=torch.int64)
    return objects


# ---- records ---------------------------------------------------------------------------------------------------------


def _read_records(path: Path, clips: Clips) -> dict[str, list[Instances]]:
    loaded = _load(path)
    listing: Record | None = None
    if isinstance(loaded, dict):
        document = cast(Record, loaded)
        records, listing = document.get("annotations"), document
        if not isinstance(records, list) or not isinstance(document.get("videos"), list):
            raise AnnotationError(f"{path}: has no lists videos and annotations; {_EXPECTED}")
    else:
        records = loaded
        beside = path.parent / VIDEOS
        if beside.is_file():
            listing = cast("Record | None", value) if isinstance(value := _load(beside), dict) else None
    entries = cast(list[Any], records)
    by_id = {clip.number: clip for clip in clips.clips}
    labels = {number: label for label, number in enumerate(clips.category_ids)}
    if listing is not None:
        by_id, labels = _by_name(listing, clips, entries) or (by_id, labels)
    parts: dict[str, list[tuple[int, int, float, list[Masks | None]]]] = defaultdict(list)
    for number, entry in enumerate(entries):
        where = f"{path}: record {number}"
        if not isinstance(entry, dict):
            raise AnnotationError(f"{where} is {shortened(entry)}; {_EXPECTED}")
        record = cast(Record, entry)
        video = parse_id(record.get("video_id"))
        clip = None if video is None else by_id.get(video)
        if clip is None:
            ids = ", ".join(map(repr, list(by_id)[:8]))
            raise AnnotationError(
                f"{where} is of the video {shortened(record.get('video_id'))}, which the data set does not have; its "
                f"videos are {ids}"
            )
        category = parse_int(record.get("category_id"))
        if category is None:
            what = shortened(record.get("category_id"))
            raise AnnotationError(f"{where} has the category {what}; expected an integer")
        score = parse_float(record.get("score", 1.0))
        if not math.isfinite(score):
            raise AnnotationError(f"{where}: score must be a finite number, got {shortened(record.get('score'))}")
        masks = masks_of(record.get("segmentations"), clip.size, len(clip), where)
        track = parse_int(record.get("track_id", number + 1))
        parts[clip.name].append((number + 1 if track is None else track, labels.get(category, -1), score, masks))
    return {name: _frames(clips.clip(name), tracks, path) for name, tracks in parts.items()}


def _load(path: Path) -> Any:
    try:
        value: Any = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); {_EXPECTED}") from None
    if not isinstance(value, (list, dict)):
        raise AnnotationError(f"{path}: contains a {type(value).__name__}; {_EXPECTED}")
    return cast(Any, value)


def _by_name(
    listing: Mapping[str, Any], clips: Clips, records: Sequence[Any]
) -> tuple[dict[int | str, Clip], dict[int, int]] | None:
    """Clips and labels by the ids of a listing; None if it does not name all clips of the records."""
    names = {clip.name: clip for clip in clips.clips}
    places = {name: label for label, name in enumerate(clips.classes)}
    by_id: dict[int | str, Clip] = {}
    for video in _objects(listing.get("videos")):
        number, name, files = parse_id(video.get("id")), video.get("name"), video.get("file_names")
        if not isinstance(name, str) and isinstance(files, list) and files and isinstance(files[0], str):
            name = files[0].rpartition("/")[0]
        if number is not None and isinstance(name, str) and name in names:
            by_id[number] = names[name]
    labels: dict[int, int] = {}
    for category in _objects(listing.get("categories")):
        number = parse_int(category.get("id"))
        if number is not None:
            labels[number] = places.get(str(category.get("name")), -1)
    used = {parse_id(record.get("video_id")) for record in _objects(records)}
    return (by_id, labels) if used <= set(by_id) else None


def _objects(values: Any) -> list[Record]:
    """The objects of a list."""
    if not isinstance(values, list):
        return []
    return [cast(Record, value) for value in cast(list[Any], values) if isinstance(value, dict)]


def _frames(clip: Clip, tracks: Sequence[tuple[int, int, float, list[Masks | None]]], path: Path) -> list[Instances]:
    """The objects of each frame of a clip."""
    ids = [number for number, _, _, _ in tracks]
    if len(set(ids)) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise AnnotationError(f"{path}: two tracks of the clip {clip.name} have the track_id {twice}")
    frames: list[Instances] = []
    for frame in range(len(clip)):
        here = [(track, label, score, mask) for track, label, score, own in tracks if (mask := own[frame]) is not None]
        masks = Masks.join([Masks.empty(clip.size), *(mask for _, _, _, mask in here)])
        frames.append(
            Instances(
                clip.size,
                masks.boxes(),
                torch.tensor([label for _, label, _, _ in here], dtype=torch.int64),
                masks,
                torch.tensor([score for _, _, score, _ in here], dtype=torch.float32),
                ids=torch.tensor([number for number, _, _, _ in here], dtype=torch.int64),
            )
        )
    return frames
