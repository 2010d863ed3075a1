"""YouTube-VIS: clips in one JSON file (Yang et al., 2019, arXiv 1905.04804); OVIS and UVO have the same format.

    videos       id, width, height, file_names (one per frame)
    annotations  id, video_id, category_id, iscrowd, segmentations, bboxes, areas (one per frame; null where absent)
    categories   id, name

One annotation is one object throughout its clip. A segmentation is a run-length code, compressed or not, or a list of
polygons. Files without annotations, as of the test sets, are clips without annotated frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from maskwright.data.clips import Clip, Clips, frame_id
from maskwright.data.coco_json import has_videos
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.splits import fitting
from maskwright.data.values import clean_name, parse_flag, parse_id, parse_int, parse_length, relative_path, shortened
from maskwright.errors import AnnotationError, DataError
from maskwright.files import write_json
from maskwright.structures import Instances, Masks

NAME = "YouTube-VIS"
LAYOUT = "{split}.json or {split}/instances.json with videos (YouTube-VIS)"

Record = dict[str, Any]
_EXPECTED = "expected a YouTube-VIS file with the keys videos, annotations and categories"


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find JSON files with videos: SPLIT.json, instances_SPLIT.json, annotations_SPLIT.json or SPLIT/instances.json."""
    path = Path(source)
    if request.panoptic or request.keypoints:
        return []
    if path.is_file():
        return [Match(source, CERTAIN, path.name)] if path.suffix.lower() == ".json" and has_videos(path) else []
    if not path.is_dir():
        return []
    files = _files(path)
    names = list(files) if request.split is None else fitting(request.split, files)
    return [Match(str(files[name]), CERTAIN, files[name].relative_to(path).as_posix(), name) for name in names]


def read(match: Match, request: Request) -> Clips:
    """Read one of the files that `sniff` has found."""
    return read_youtube_vis(match.location, request.images)


def _files(folder: Path) -> dict[str, Path]:
    """Files with videos, by the name of their split."""
    files: dict[str, Path] = {}
    for path in sorted((*folder.glob("*/instances.json"), *folder.glob("annotations/*.json"), *folder.glob("*.json"))):
        name = path.parent.name if path.stem == "instances" else path.stem
        for start in ("instances_", "annotations_"):
            name = name.removeprefix(start)
        if name not in files and has_videos(path):
            files[name] = path
    return files


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """The objects of one frame while a file is read."""

    masks: list[Masks] = field(default_factory=list[Masks])
    labels: list[int] = field(default_factory=list[int])
    ids: list[int] = field(default_factory=list[int])
    crowd: list[bool] = field(default_factory=list[bool])


class ListedClip(Clip):
    """A clip whose objects are in memory.

    Args:
        name: Name of the clip.
        number: Its id.
        size: H, W of every frame.
        targets: Objects of each frame; None: no frame is annotated.
        frames: Number of frames.
        paths: Image file of each frame; None if there are none.
    """

    def __init__(
        self,
        name: str,
        number: int | str,
        size: tuple[int, int],
        targets: Sequence[Instances] | None,
        frames: int,
        paths: Sequence[Path] | None = None,
    ):
        super().__init__(name, number, size, frames, range(frames) if targets is not None else (), paths)
        self._targets = targets or ()

    def target(self, frame: int) -> Instances:
        return self._targets[frame]


def read_youtube_vis(annotations: str | Path, images: str | Path | None = None) -> Clips:
    """Read a YouTube-VIS JSON file.

    All entries are checked. Images are not opened.

    Args:
        annotations: The file.
        images: The folder that file names are relative to; None: JPEGImages in the folder of the file or in a folder of
            its name, or one of these folders.

    Returns:
        The clips, named by the folder of their frames.

    Raises:
        AnnotationError: If the file or an entry cannot be used; the message names the entry.
    """
    path = Path(annotations)
    raw = load_document(path)
    videos, categories = (_entries(path, raw, key) for key in ("videos", "categories"))
    classes, category_ids = _categories(path, categories)
    labels = {number: label for label, number in enumerate(category_ids)}
    listed = [_video(path, number, video) for number, video in enumerate(videos)]
    position = {video.number: place for place, video in enumerate(listed)}
    if len(position) < len(listed):
        raise AnnotationError(f"{path}: two videos have the same id; ids of videos must be unique")
    names = _names(listed)
    folder = Path(images) if images is not None else _folder(path, listed)
    targets: list[list[Instances]] | None = None
    if "annotations" in raw and raw["annotations"] is not None:
        frames = [[_Frame() for _ in video.files] for video in listed]
        for number, entry in enumerate(_entries(path, raw, "annotations")):
            _add(path, number, entry, listed, position, labels, frames)
        targets = [[_instances(frame, video.size) for frame in own] for video, own in zip(listed, frames, strict=True)]
    clips = [
        ListedClip(
            name, video.number, video.size, None if targets is None else targets[place], len(video.files),
            [folder / file for file in video.files],
        )
        for place, (name, video) in enumerate(zip(names, listed, strict=True))
    ]  # fmt: skip
    return Clips(clips, classes, category_ids, path.stem if path.stem != "instances" else path.parent.name)


def load_document(path: Path) -> Record:
    """Return the object in a JSON file.

    Raises:
        AnnotationError: If it cannot be read, or is no object.
    """
    try:
        raw: Any = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); {_EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not JSON ({error}); {_EXPECTED}") from None
    if not isinstance(raw, dict):
        raise AnnotationError(f"{path}: contains a {type(raw).__name__}; {_EXPECTED}")
    return cast(Record, raw)


def _entries(path: Path, raw: Record, key: str) -> list[Record]:
    values: Any = raw.get(key)
    if not isinstance(values, list):
        raise AnnotationError(f"{path}: {key} is {'missing' if values is None else 'no list'}; {_EXPECTED}")
    for number, value in enumerate(cast(list[Any], values)):
        if not isinstance(value, dict):
            raise AnnotationError(f"{path}: entry {number} of {key} must be an object, got {shortened(value)}")
    return cast(list[Record], values)


def _categories(path: Path, entries: Sequence[Record]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and category ids, ascending by id."""
    found: dict[int, str] = {}
    for number, entry in enumerate(entries):
        own, name = parse_int(entry.get("id")), entry.get("name")
        if own is None or not isinstance(name, str):
            raise AnnotationError(f"{path}: category {number} needs an integer id and a name, got {shortened(entry)}")
        if own in found:
            raise AnnotationError(f"{path}: two categories have the id {own}")
        found[own] = clean_name(name)
    if len(set(found.values())) < len(found):
        raise AnnotationError(f"{path}: two categories have the same name")
    order = sorted(found)
    return tuple(found[number] for number in order), tuple(order)


@dataclass(frozen=True)
class _Video:
    number: int | str
    size: tuple[int, int]
    files: tuple[str, ...]


def _video(path: Path, number: int, entry: Record) -> _Video:
    own, height, width = parse_id(entry.get("id")), parse_length(entry.get("height")), parse_length(entry.get("width"))
    files: Any = entry.get("file_names")
    if own is None or height is None or width is None or not isinstance(files, list) or not files:
        raise AnnotationError(
            f"{path}: video {number} needs an id, a height, a width and a list file_names, got {shortened(entry, 120)}"
        )
    names: list[str] = []
    for file in cast(list[Any], files):
        name = relative_path(file) if isinstance(file, str) else None
        if name is None:
            raise AnnotationError(f"{path}: video {own!r} lists {shortened(file)}, which is no relative file name")
        names.append(name)
    return _Video(own, (height, width), tuple(names))


def _names(videos: Sequence[_Video]) -> list[str]:
    """Names of clips: the folders of their frames, or their ids if these are not unique."""
    names = [video.files[0].rpartition("/")[0] for video in videos]
    return names if all(names) and len(set(names)) == len(names) else [str(video.number) for video in videos]


def _folder(path: Path, videos: Sequence[_Video]) -> Path:
    """The folder that file names are relative to."""
    split = path.stem.removeprefix("instances_").removeprefix("annotations_")
    parents = (path.parent, path.parent.parent)
    places = [
        place
        for parent in parents
        for place in (parent / "JPEGImages", parent / split / "JPEGImages", parent / split, parent)
    ]
    first = videos[0].files[0] if videos else ""
    return next((place for place in places if first and (place / first).is_file()), path.parent)


def _add(
    path: Path,
    number: int,
    entry: Record,
    videos: Sequence[_Video],
    position: Mapping[int | str, int],
    labels: Mapping[int, int],
    frames: Sequence[Sequence[_Frame]],
) -> None:
    """Add an annotation to the frames of its clip."""
    own = parse_int(entry.get("id"))
    where = f"{path}: annotation {number if own is None else own}"
    video_id = parse_id(entry.get("video_id"))
    place = None if video_id is None else position.get(video_id)
    if place is None:
        raise AnnotationError(f"{where} is of the video {shortened(entry.get('video_id'))}, which is not listed")
    label = labels.get(cast(int, parse_int(entry.get("category_id"))))
    if label is None:
        raise AnnotationError(f"{where} has the category {shortened(entry.get('category_id'))}, which is not listed")
    crowd = parse_flag(entry.get("iscrowd"))
    if crowd is None:
        raise AnnotationError(f"{where}: iscrowd must be 0 or 1, got {shortened(entry.get('iscrowd'))}")
    video = videos[place]
    for frame, mask in enumerate(masks_of(entry.get("segmentations"), video.size, len(video.files), where)):
        if mask is not None:
            target = frames[place][frame]
            target.masks.append(mask)
            target.labels.append(label)
            target.ids.append(number + 1 if own is None else own)
            target.crowd.append(crowd)


def masks_of(segmentations: Any, size: tuple[int, int], frames: int, where: str) -> list[Masks | None]:
    """Return the mask of an object in each frame.

    Args:
        segmentations: One entry per frame: null or an empty list where the object is absent, a run-length code, or
            polygons.
        size: H, W.
        frames: Number of frames.
        where: Start of messages, such as "FILE: annotation 3".

    Returns:
        For each frame `Masks` of length 1, run-length encoded; None where the object is absent or its mask is empty.

    Raises:
        AnnotationError: If there is another number of entries, or an entry is invalid.
    """
    if not isinstance(segmentations, list) or len(cast(list[Any], segmentations)) != frames:
        count = len(cast(list[Any], segmentations)) if isinstance(segmentations, list) else "no"
        raise AnnotationError(f"{where} has {count} segmentations for {frames} frames; expected one per frame or null")
    masks: list[Masks | None] = []
    for frame, code in enumerate(cast(list[Any], segmentations)):
        if code is None or code == []:
            masks.append(None)
            continue
        try:
            if isinstance(code, dict):
                mask = Masks.from_rle([cast(Record, code)], size)
            elif isinstance(code, list):
                mask = Masks.from_polygons([cast(list[Any], code)], size).pack()
            else:
                raise TypeError(f"{shortened(code)} is neither a run-length code nor a list of polygons")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise AnnotationError(f"{where}, frame {frame}: {error}") from None
        masks.append(mask if int(mask.areas()[0]) else None)
    return masks


def _instances(frame: _Frame, size: tuple[int, int]) -> Instances:
    masks = Masks.join([Masks.empty(size), *frame.masks])
    return Instances(
        size,
        masks.boxes(),
        torch.tensor(frame.labels, dtype=torch.int64),
        masks,
        crowd=torch.tensor(frame.crowd, dtype=torch.bool),
        ids=torch.tensor(frame.ids, dtype=torch.int64),
    )


# ---- writing -------------------------------------------------------------------------------------------------------


def write_youtube_vis(clips: Clips, path: str | Path) -> Path:
    """Write the annotations of clips as a YouTube-VIS file.

    Frames have the names CLIP/00000.jpg, or those of their files. Ids of objects are numbered anew, because they must
    be unique in a file. Clips of which only some frames are annotated have no objects in the others.

    Args:
        clips: The clips.
        path: The file.

    Returns:
        The path.

    Raises:
        DataError: If the file cannot be written.
    """
    videos: list[Record] = []
    annotations: list[Record] = []
    for number, clip in enumerate(clips.clips, 1):
        names = [f"{frame_id(clip, frame)}.jpg" for frame in range(len(clip))]
        if clip.paths is not None:
            names = [f"{clip.name}/{file.name}" for file in clip.paths]
        height, width = clip.size
        videos.append({"id": number, "height": height, "width": width, "length": len(clip), "file_names": names})
        tracks = tracks_of([(frame, clip.target(frame)) for frame in clip.annotated], len(clip))
        for _, track in sorted(tracks.items()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "video_id": number,
                    "category_id": clips.category_ids[track.label],
                    "iscrowd": int(track.crowd),
                    "height": height,
                    "width": width,
                    "segmentations": track.segmentations,
                    "bboxes": track.boxes,
                    "areas": track.areas,
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(clips.category_ids, clips.classes, strict=True)]
    return write_json(path, {"videos": videos, "categories": categories, "annotations": annotations}, DataError)


@dataclass
class Track:
    """One object through the frames of a clip.

    Attributes:
        label: Its label; if it changes, the label with the largest sum of scores.
        crowd: Whether it is a crowd region.
        segmentations: Run-length code of each frame as in JSON; None where it is absent.
        boxes: x, y, width, height in each frame.
        areas: Pixels in each frame.
        scores: Its scores, in the frames in which it is present.
    """

    label: int
    crowd: bool
    segmentations: list[Record | None]
    boxes: list[list[float] | None]
    areas: list[int | None]
    scores: list[float] = field(default_factory=list[float])

    @property
    def score(self) -> float:
        """The mean of its scores; 1 if it has none."""
        return sum(self.scores) / len(self.scores) if self.scores else 1.0


def tracks_of(frames: Sequence[tuple[int, Instances]], length: int) -> dict[int, Track]:
    """Return the objects of a clip by their ids, in the order in which they appear.

    Args:
        frames: Positions of frames, and their objects with masks and ids.
        length: Number of frames of the clip.
    """
    tracks: dict[int, Track] = {}
    weights: dict[int, dict[int, float]] = {}
    for frame, objects in frames:
        assert objects.masks is not None
        assert objects.ids is not None
        codes, areas, boxes = objects.masks.rle(), objects.masks.areas(), objects.masks.boxes()
        for row, number in enumerate(int(value) for value in objects.ids):
            label, score = int(objects.labels[row]), 1.0 if objects.scores is None else float(objects.scores[row])
            if number not in tracks:
                crowd = objects.crowd is not None and bool(objects.crowd[row])
                tracks[number] = Track(label, crowd, [None] * length, [None] * length, [None] * length)
            track, own = tracks[number], weights.setdefault(number, {})
            own[label] = own.get(label, 0.0) + score
            track.label = max(own, key=lambda key: own[key])
            x0, y0, x1, y1 = (float(value) for value in boxes[row])
            track.segmentations[frame] = {**codes[row], "counts": codes[row]["counts"].decode("ascii")}
            track.boxes[frame] = [x0, y0, x1 - x0, y1 - y0]
            track.areas[frame] = int(areas[row])
            if objects.scores is not None:
                track.scores.append(score)
    return tracks
