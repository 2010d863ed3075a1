"""DAVIS: a folder of frames and a folder of palette PNGs for each clip (Pont-Tuset et al., 2017, arXiv 1704.00675).

    JPEGImages/480p/CLIP/00000.jpg       frames
    Annotations/480p/CLIP/00000.png      the value of a pixel is the id of its object; 0 is background, 255 is void
    ImageSets/2017/SPLIT.txt             names of the clips of a split, one per line; ImageSets/SPLIT.txt, too

Frames without a PNG are not annotated. Instead of 480p, Full-Resolution and frames without such a folder (the layout of
YouTube-VOS) are read. There are no classes: all objects have the label 0, "object".
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from maskwright.data.clips import Clip, Clips
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.images import MAX_PIXELS, opened, read_size
from maskwright.data.splits import fitting
from maskwright.errors import AnnotationError, DataError, ImageError, UsageError
from maskwright.files import write_bytes
from maskwright.structures import Instances, Masks
from maskwright.structures.drawing import colour

NAME = "DAVIS"
LAYOUT = "JPEGImages/480p/CLIP/*.jpg with Annotations/480p/CLIP/*.png (DAVIS)"

VOID = 255
IdMap = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
IMAGES = (".jpg", ".jpeg", ".png")
_RESOLUTIONS = ("480p", "Full-Resolution", "1080p", "")


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Find the lists of clips in ImageSets; all annotated clips serve as any split if there are none."""
    root = Path(source)
    if request.panoptic or request.keypoints or _frame_folder(root) is None:
        return []
    lists = _lists(root)
    names = list(lists) if request.split is None else fitting(request.split, lists)
    if names:
        return [Match(source, CERTAIN, f"JPEGImages, {_relative(lists[name], root)}", name) for name in names]
    kinds = ("train", "val", "test")
    if lists and any(name.startswith(kinds) for name in lists):
        return []  # divided into splits, and none of them is asked for
    return [Match(source, CERTAIN, "JPEGImages")]


def read(match: Match, request: Request) -> Clips:
    """Read the clips of a split."""
    del request
    return read_davis(match.location, match.split)


def read_davis(folder: str | Path, split: str | None = None) -> Clips:
    """Read clips in the layout of DAVIS.

    Args:
        folder: The folder that contains JPEGImages and Annotations.
        split: Name of a list in ImageSets; None: all clips that have annotations, or all clips if none has.

    Returns:
        The clips. Annotations are decoded when they are needed.

    Raises:
        UsageError: If the folder has another layout, or there is no such list.
        AnnotationError: If a listed clip has no frames, or its frames or annotations do not fit together.
    """
    root = Path(folder)
    frames = _frame_folder(root)
    if frames is None:
        raise UsageError(f"{root}: has no folder JPEGImages with a folder of frames for each clip")
    names = sorted(path.name for path in frames.iterdir() if path.is_dir())
    masks = root / "Annotations" / frames.relative_to(root / "JPEGImages")
    if split is None:
        names = [name for name in names if (masks / name).is_dir()] or names
    else:
        lists = _lists(root)
        if split not in lists:
            raise UsageError(f"{root}: has no list {split!r} in ImageSets; it has {', '.join(lists) or 'none'}")
        names = _listed(lists[split])
    clips = [_clip(name, number, frames / name, masks / name) for number, name in enumerate(names, 1)]
    return Clips(clips, ("object",), name=f"{root.name} {split or ''}".strip(), classless=True)


class DavisClip(Clip):
    """A clip whose annotations are palette PNGs.

    Args:
        name: Name of the clip.
        number: Its position in the data set, from 1.
        size: H, W of every frame.
        paths: Frames.
        masks: Annotation of each annotated frame, by the position of the frame.
    """

    def __init__(self, name: str, number: int, size: tuple[int, int], paths: Sequence[Path], masks: dict[int, Path]):
        super().__init__(name, number, size, len(paths), sorted(masks), paths)
        self._masks = masks
        self._last: tuple[int, IdMap] | None = None

    def target(self, frame: int) -> Instances:
        return instances_from_map(self._plane(frame))

    def void(self, frame: int) -> Masks | None:
        plane = self._plane(frame)
        void = plane == VOID
        return Masks.from_dense(torch.from_numpy(void)[None]).pack() if void.any() else None  # pyright: ignore[reportUnknownMemberType] - untyped in torch

    def _plane(self, frame: int) -> IdMap:
        if frame not in self._masks:
            raise UsageError(f"frame {frame} of the clip {self.name} is not annotated")
        last = self._last
        if last is None or last[0] != frame:
            last = self._last = frame, read_ids(self._masks[frame], self.size)
        return last[1]


def read_ids(path: Path, size: tuple[int, int], *, wide: bool = False) -> IdMap:
    """Read a map of object ids.

    Args:
        path: A palette or 8-bit gray image.
        size: Expected H, W.
        wide: Read images of 16 bits too, as `track` writes them for ids above 254.

    Returns:
        (H, W), the value of each pixel; of type uint16 for images of 16 bits.

    Raises:
        AnnotationError: If the file is damaged, or of another mode or size.
    """
    try:
        with path.open("rb") as file, opened(file, path, MAX_PIXELS) as image:
            deep = wide and image.mode in ("I;16", "I;16B", "I;16L")
            if not deep and image.mode not in ("P", "L", "1"):
                raise AnnotationError(
                    f"{path}: has image mode {image.mode}; expected a palette PNG whose pixels are ids of objects"
                )
            if (image.height, image.width) != size:
                raise AnnotationError(
                    f"{path}: is {image.width} x {image.height}, but the frames of its clip are {size[1]} x {size[0]}; "
                    "restore the annotation that belongs to this clip"
                )
            return np.asarray(image).astype(np.uint16) if deep else np.asarray(image).astype(np.uint8)
    except ImageError as error:
        raise AnnotationError(str(error)) from None
    except AnnotationError:
        raise
    except Exception as error:  # decoders raise exceptions of any class on damaged data
        raise AnnotationError(f"{path}: the annotation is damaged ({error}); restore it") from None


def instances_from_map(plane: IdMap) -> Instances:
    """Return the objects of a map of ids (H, W), ascending by id, with label 0; 0 and the 255 of 8 bits are none."""
    size = (plane.shape[0], plane.shape[1])
    counts = np.bincount(plane.ravel(), minlength=256)
    others = (0, VOID) if plane.dtype == np.uint8 else (0,)
    ids = [int(number) for number in np.flatnonzero(counts) if number not in others]
    planes = np.stack([plane == number for number in ids]) if ids else np.zeros((0, *size), bool)
    masks = Masks.from_dense(torch.from_numpy(planes)).pack()  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    return Instances(
        size,
        masks.boxes(),
        torch.zeros(len(ids), dtype=torch.int64),
        masks,
        crowd=torch.zeros(len(ids), dtype=torch.bool),
        ids=torch.tensor(ids, dtype=torch.int64),
    )


# ---- writing -------------------------------------------------------------------------------------------------------


def write_map(path: str | Path, objects: Instances) -> Path:
    """Write objects as a map of ids, a palette PNG as in DAVIS.

    Args:
        path: The file.
        objects: Objects with masks and ids 1 ... 254. Where masks overlap, the object with the higher score has the
            pixel, or the earlier one if there are no scores.

    Returns:
        The path.

    Raises:
        UsageError: If there are no masks or ids, or an id is out of range.
        DataError: If the file cannot be written.
    """
    ids = _checked_ids(objects)
    assert objects.masks is not None
    plane = np.zeros(objects.image_size, np.uint8)
    scores = [0.0] * len(ids) if objects.scores is None else [float(score) for score in objects.scores]
    frames, crops = objects.masks.crops()
    windows = frames.numpy()
    for row in sorted(range(len(ids)), key=lambda row: (scores[row], -row)):  # the best one last
        x0, y0, x1, y1 = (int(value) for value in windows[row])
        plane[y0:y1, x0:x1][crops[row].numpy()] = ids[row]
    image = Image.fromarray(plane, "P")
    image.putpalette([value for number in range(256) for value in (colour(number - 1) if number else (0, 0, 0))])
    data = io.BytesIO()
    image.save(data, "PNG")
    return write_bytes(path, data.getvalue(), DataError, sync=False)


def _checked_ids(objects: Instances) -> list[int]:
    if objects.masks is None or objects.ids is None:
        raise UsageError("a map of ids needs objects with masks and ids")
    ids = [int(number) for number in objects.ids]
    wrong = [number for number in ids if not 0 < number < VOID]
    if wrong:
        raise UsageError(f"a map of ids has room for the ids 1 ... {VOID - 1}, got {wrong[0]}")
    return ids


def write_davis(clips: Clips, folder: str | Path, split: str = "val") -> Path:
    """Write clips in the layout of DAVIS: frames as PNG, maps of ids of the annotated frames, and a list of clips.

    Args:
        clips: The clips. Labels are not kept.
        folder: The folder; created if needed.
        split: Name of the list.

    Returns:
        The folder.

    Raises:
        UsageError: If an id is not 1 ... 254.
        DataError: If a file cannot be written.
    """
    root = Path(folder)
    for clip in clips.clips:
        for frame in range(len(clip)):
            data = io.BytesIO()
            Image.fromarray(clip.image(frame).permute(1, 2, 0).numpy()).save(data, "PNG")
            name = f"{clip.name}/{frame:05d}.png"
            write_bytes(root / "JPEGImages" / "480p" / name, data.getvalue(), DataError, sync=False)
            if frame in clip.annotated:
                write_map(root / "Annotations" / "480p" / name, clip.target(frame))
    names = "".join(f"{clip.name}\n" for clip in clips.clips)
    write_bytes(root / "ImageSets" / "2017" / f"{split}.txt", names.encode(), DataError)
    return root


# ---- folders -------------------------------------------------------------------------------------------------------


def _frame_folder(root: Path) -> Path | None:
    """The folder that contains a folder of frames for each clip; None if there is none."""
    for resolution in _RESOLUTIONS:
        folder = root / "JPEGImages" / resolution
        if folder.is_dir() and any(_frames(path) for path in folder.iterdir() if path.is_dir()):
            return folder
    return None


def _frames(folder: Path) -> list[Path]:
    """The images of a folder, by the number in their names if they are numbered."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES and not path.name.startswith(".")]
    numbered = all(path.stem.isdecimal() for path in paths)
    return sorted(paths, key=lambda path: (int(path.stem), path.name) if numbered else (0, path.name))


def _lists(root: Path) -> dict[str, Path]:
    """Lists of clips by the name of the split; of the same name, that of the newest folder."""
    folder = root / "ImageSets"
    places = [folder, *sorted((path for path in folder.glob("*") if path.is_dir()), reverse=True)]
    lists: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.txt")):
            lists.setdefault(path.stem, path)
    return lists


def _listed(path: Path) -> list[str]:
    """Names of clips in a list; lines of DAVIS 2016 name files, of which the folder is the clip."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); expected names of clips, one per line") from None
    names: list[str] = []
    for line in filter(None, map(str.strip, lines)):
        parts = line.split()[0].strip("/").split("/")
        name = parts[-2] if len(parts) > 1 else parts[0]
        if name in (".", "..") or "\\" in name or "\0" in name:
            raise AnnotationError(f"{path}: {name!r} is not the name of a clip")
        names.append(name)
    return list(dict.fromkeys(names))


def _clip(name: str, number: int, folder: Path, masks: Path) -> DavisClip:
    paths = _frames(folder) if folder.is_dir() else []
    if not paths:
        raise AnnotationError(f"{folder}: has no frames; add them, or remove {name} from the list of clips")
    position = {path.stem: place for place, path in enumerate(paths)}
    annotated = _frames(masks) if masks.is_dir() else []
    alone = [path for path in annotated if path.stem not in position]
    if alone:
        raise AnnotationError(f"{alone[0]}: there is no frame {alone[0].stem} in {folder}; remove it or add the frame")
    try:
        size = read_size(paths[0])
    except ImageError as error:
        raise AnnotationError(f"clip {name}: {error}") from None
    return DavisClip(name, number, size, paths, {position[path.stem]: path for path in annotated})


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
