"""Generated scenes: annotated images without files or licences, identical on every machine.

Textured shapes overlap on a textured background. The class depends on the shape only, never on the colour. Masks are
the visible parts: hidden parts and holes are excluded. `difficulty` ranges from few large, distinct, separate shapes
(0) to many small, faint, partly hidden ones among clutter (1).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter

from maskwright.data.coco_json import coco_categories, image_entry, write_coco_json
from maskwright.data.dataset import PERSON_KEYPOINTS, Dataset, Sample
from maskwright.data.drawing_shapes import SHAPES, Stamp, draw_figure, draw_shape
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.panoptic import write_panoptic
from maskwright.errors import DataError, UsageError
from maskwright.files import write_bytes
from maskwright.structures import Instances, Masks

NAME = "generated scenes"
LAYOUT = "scenes:count=200 (generated)"

CLASSES = ("disc", "ring", "star", "box", "crescent", "cross")
GROUNDS = ("sky", "grass", "water", "gravel")  # the regions of `stuff`
_POOL = 512  # side of the precomputed noise


@dataclass
class _Thing:
    """One object of a scene: its position and outline; its appearance is drawn later."""

    stamp: Stamp
    label: int
    area: int  # pixels inside the image, including hidden ones


@dataclass
class _Layout:
    things: list[_Thing]
    owner: np.ndarray  # (H, W) int16: position of the visible thing at a pixel, -1 for the background
    ground: np.ndarray | None = None  # (H, W) int64: position in GROUNDS at a pixel, visible or not


class Scenes(Dataset):
    """Generated images with objects; image i depends only on `seed` and i.

    One core generates 120 to 220 images of 192 x 192 per second, fewer at high difficulty; figures about 70. Image ids
    are 1, 2, ...

    Args:
        count: Number of images.
        size: H, W of every image; at least 16.
        seed: Seed of the random numbers.
        classes: Some of "disc", "ring", "star", "box", "crescent", "cross", "triangle", "heart".
        difficulty: 0 (easy) to 1 (hard).
        keypoints: Draw people (class "figure") with COCO's 17 keypoints; shapes are then unlabelled occluders.
        empty: Fraction of images without objects.
        stuff: Divide the background into one to three of "sky", "grass", "water" and "gravel", which differ by colour
            and texture. They are additional classes, and every pixel belongs to a segment.

    Raises:
        UsageError: If an argument is invalid.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int] = (192, 192),
        seed: int = 0,
        classes: Sequence[str] = CLASSES,
        difficulty: float = 0.5,
        keypoints: bool = False,
        empty: float = 0.04,
        stuff: bool = False,
    ):
        if stuff and keypoints:
            raise UsageError("scenes have either figures with keypoints or a background of stuff, not both")
        unknown = [name for name in classes if name not in SHAPES]
        if unknown or not classes or len(set(classes)) < len(classes):
            raise UsageError(f"scenes: classes must be distinct names of {', '.join(SHAPES)}, got {tuple(classes)}")
        if count < 0 or min(size) < 16 or not 0 <= difficulty <= 1 or not 0 <= empty <= 1 or seed < 0:
            raise UsageError(
                "scenes: count and seed must not be negative, sides must be at least 16, difficulty and empty must be "
                f"in [0, 1]; got count {count}, size {size}, seed {seed}, difficulty {difficulty}, empty {empty}"
            )
        self.count, self.size, self.seed = count, (int(size[0]), int(size[1])), seed
        self.shapes, self.difficulty, self.keypoints, self.empty = tuple(classes), difficulty, keypoints, empty
        self.stuff = GROUNDS if stuff else ()
        self.classes = ("figure",) if keypoints else (*classes, *self.stuff)
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        self.keypoint_names = PERSON_KEYPOINTS if keypoints else None
        kind = ", figures" if keypoints else ", stuff" if stuff else ""
        self.name = f"scenes (seed {seed}, difficulty {difficulty:g}{kind})"
        self.strict = True

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"{self.name}: {self.count} images of {self.size[0]} x {self.size[1]}, {len(self.classes)} classes"

    def __getitem__(self, index: int) -> Sample:
        index = range(self.count)[index]
        layout = self._layout(index)
        pixels = torch.from_numpy(self._paint(index, layout)).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        return Sample(pixels, self._target(index, layout), index + 1)

    def sizes(self) -> list[tuple[int, int]]:
        return [self.size] * self.count

    def image_ids(self) -> list[int | str]:
        return list(range(1, self.count + 1))

    def targets(self, index: int) -> Instances:
        index = range(self.count)[index]
        return self._target(index, self._layout(index))

    # ---- layout -----------------------------------------------------------------------------------------------------

    def _layout(self, index: int) -> _Layout:
        rng = np.random.default_rng((self.seed, index))
        height, width = self.size
        hard, short = self.difficulty, min(self.size)
        layout = _Layout([], np.full(self.size, -1, np.int16), self._regions(index) if self.stuff else None)
        if rng.random() < self.empty:
            return layout
        left: list[int] = []  # visible pixels of each thing so far
        fewest = 0.25 + 0.5 * (1 - hard)  # fraction of an object that must stay visible
        for _ in range(int(rng.integers(2, 5 + round(11 * hard)))):
            figure = self.keypoints and rng.random() < 0.7
            label = 0 if self.keypoints else int(rng.integers(len(self.shapes)))
            reach = (0.16 + 0.1 * (1 - hard), 0.42) if figure else (0.16 - 0.1 * hard, 0.26)
            for _ in range(6):
                # Small objects are more frequent than large ones.
                radius = short * reach[0] * (reach[1] / reach[0]) ** (rng.random() ** (0.8 + 0.5 * hard))
                centre = (rng.uniform(-0.1, 1.1) * width, rng.uniform(-0.1, 1.1) * height)
                if figure:
                    stamp = draw_figure(rng, centre, radius, 0.25 + 0.75 * hard)
                else:
                    stamp = draw_shape(
                        self.shapes[int(rng.integers(len(self.shapes)))] if self.keypoints else self.shapes[label],
                        rng,
                        centre,
                        radius,
                    )
                if self._lay(layout, left, stamp, label if figure or not self.keypoints else -1, fewest):
                    break
        return layout

    def _lay(self, layout: _Layout, left: list[int], stamp: Stamp, label: int, fewest: float) -> bool:
        """Place a stamp on top, unless too little of it or of what it covers would stay visible."""
        mask, window = _cut(stamp.alpha, stamp, self.size)
        solid = mask >= 128
        area = int(np.count_nonzero(solid))
        if area < 20 or area < 0.5 * np.count_nonzero(stamp.alpha >= 128):
            return False
        below = layout.owner[*window]
        covered = np.bincount(below[solid] + 1, minlength=len(left) + 1)[1:]
        if self.difficulty < 0.15 and covered.any():
            return False
        after = [seen - lost for seen, lost in zip(left, covered.tolist(), strict=True)]
        if any(seen < max(12, fewest * t.area) for seen, t in zip(after, layout.things, strict=True)):
            return False
        below[solid] = len(left)
        left[:] = [*after, area]
        layout.things.append(_Thing(stamp, label, area))
        return True

    def _target(self, index: int, layout: _Layout) -> Instances:
        chosen = [n for n, thing in enumerate(layout.things) if thing.label >= 0]
        crops: list[npt.NDArray[np.bool_]] = []
        corners: list[tuple[int, int]] = []
        for n in chosen:
            stamp = layout.things[n].stamp
            _, window = _cut(stamp.alpha, stamp, self.size)
            crops.append(layout.owner[*window] == n)
            corners.append((window[1].start, window[0].start))
        labels = [layout.things[n].label for n in chosen]
        if layout.ground is not None:
            for region in np.unique(layout.ground[layout.owner < 0]).tolist():
                crops.append((layout.ground == region) & (layout.owner < 0))
                corners.append((0, 0))
                labels.append(len(self.shapes) + region)
        masks = Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), self.size)
        return Instances(
            self.size,
            masks.boxes(),
            torch.tensor(labels, dtype=torch.int64),
            masks,
            keypoints=self._keypoints(layout, chosen) if self.keypoints else None,
            crowd=torch.zeros(len(labels), dtype=torch.bool),
            ids=torch.arange(len(labels)) + index * 1000 + 1,
        )

    def _regions(self, index: int) -> np.ndarray:
        """One to three different grounds above each other, with wavy borders."""
        rng = np.random.default_rng((self.seed, index, 2))
        height, width = self.size
        kinds = rng.permutation(len(GROUNDS))[: int(rng.integers(1, 4))]
        plane = np.full(self.size, kinds[0], np.int64)
        levels = np.linspace(0, 1, len(kinds) + 1)[1:-1] + rng.uniform(-0.1, 0.1, len(kinds) - 1)
        along = np.arange(width) / width * 2 * np.pi
        for level, kind in zip(levels, kinds[1:], strict=True):
            waves = sum(rng.uniform(0, 0.04) * np.sin(along * n + rng.uniform(0, 2 * np.pi)) for n in (1, 2, 5))
            plane[np.arange(height)[:, None] >= (level + waves) * height] = kind
        return plane

    def _keypoints(self, layout: _Layout, chosen: list[int]) -> torch.Tensor:
        """(N, 17, 3): visibility 2 if the figure is visible at the keypoint, 1 if it is hidden, 0 outside the image."""
        height, width = self.size
        points = torch.zeros(len(chosen), len(PERSON_KEYPOINTS), 3)
        for row, n in enumerate(chosen):
            keypoints = layout.things[n].stamp.keypoints
            assert keypoints is not None
            inside = np.all((keypoints >= 0) & (keypoints < (width, height)), axis=1)
            x, y = np.clip(keypoints.astype(int), 0, (width - 1, height - 1)).T
            mark = np.where(layout.owner[y, x] == n, 2, 1) * inside
            points[row] = torch.from_numpy(np.concatenate([keypoints * inside[:, None], mark[:, None]], 1))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        return points

    # ---- appearance -------------------------------------------------------------------------------------------------

    def _paint(self, index: int, layout: _Layout) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 1))
        hard = self.difficulty
        if layout.ground is None:
            canvas, ground = _ground(rng, self.size, hard)
        else:
            canvas = _grounds(rng, layout.ground, hard)
            ground = canvas[::8, ::8].mean((0, 1))
        _clutter(rng, canvas, hard)
        for thing in layout.things:
            _paint_thing(rng, canvas, thing.stamp, ground, hard)
        grain = _noise()[0]
        canvas += _piece(rng, grain, self.size)[..., None] * np.float32(2 + 10 * hard * rng.random())
        return np.clip(canvas, 0, 255).astype(np.uint8)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, folder: str | Path, split: str = "train") -> Path:
        """Write a COCO data set: `FOLDER/SPLIT/*.png` and `FOLDER/annotations/instances_SPLIT.json`.

        With stuff, panoptic_SPLIT.json and its maps are written instead; with figures, person_keypoints_SPLIT.json is
        written as well. Reading the data set returns the same images and masks.

        Args:
            folder: The folder; created if needed.
            split: Name of the split.

        Returns:
            The annotation file.

        Raises:
            DataError: If a file cannot be written.
        """
        folder = Path(folder)
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(self.count):
            sample = self[index]
            name = f"{index + 1:06d}.png"
            data = io.BytesIO()
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(data, "PNG")
            write_bytes(folder / split / name, data.getvalue(), DataError, sync=False)
            entries.append(image_entry(index + 1, name, self.size))
            annotations += self._records(index, sample.target)
        if self.stuff:
            segments = ((entry, self.panoptic(index)) for index, entry in enumerate(entries))
            path = folder / "annotations" / f"panoptic_{split}.json"
            return write_panoptic(path, segments, self.classes, self.category_ids, self.stuff)
        categories = coco_categories(self.classes, self.category_ids, keypoints=self.keypoint_names)
        info = {"description": repr(self)}
        if self.keypoint_names:
            path = folder / "annotations" / f"person_keypoints_{split}.json"
            write_coco_json(path, entries, annotations, categories, info=info)
        path = folder / "annotations" / f"instances_{split}.json"
        return write_coco_json(path, entries, annotations, categories, info=info)

    def _records(self, index: int, target: Instances) -> list[dict[str, Any]]:
        assert target.masks is not None
        assert target.ids is not None
        areas = cast(list[int], target.masks.areas().tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        ids = cast(list[int], target.ids.tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        records = target.to_coco(index + 1, self.category_ids)
        for row, (record, number) in enumerate(zip(records, ids, strict=True)):
            record.update(id=number, area=areas[row], iscrowd=0)
            if target.keypoints is not None:
                record["keypoints"] = [round(v, 3) for v in record["keypoints"]]
                record["num_keypoints"] = int((target.keypoints[row, :, 2] > 0).sum())
        return records


# ---- painting ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _noise() -> tuple[np.ndarray, ...]:
    """Periodic noise fields (512, 512) float32 with mean 0 and standard deviation 1, from fine to coarse."""
    rng = np.random.default_rng(20)
    fields: list[np.ndarray] = []
    for cell in (1, 4, 16, 64):
        rough = rng.standard_normal((_POOL // cell, _POOL // cell)).astype(np.float32)
        wide = np.pad(rough, 4, mode="wrap")
        large = Image.fromarray(wide).resize((wide.shape[1] * cell, wide.shape[0] * cell), Image.Resampling.BICUBIC)
        field = np.asarray(large)[4 * cell : 4 * cell + _POOL, 4 * cell : 4 * cell + _POOL]
        fields.append(field / field.std())
    return tuple(fields)


def _piece(rng: np.random.Generator, field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A random window of a field."""
    y, x = rng.integers(_POOL, size=2)
    if y + size[0] <= _POOL and x + size[1] <= _POOL:
        return field[y : y + size[0], x : x + size[1]]
    return field[(y + np.arange(size[0])) % _POOL][:, (x + np.arange(size[1])) % _POOL]


def _ground(rng: np.random.Generator, size: tuple[int, int], hard: float) -> tuple[np.ndarray, np.ndarray]:
    """The background (H, W, 3) float32 and its mean colour."""
    height, width = size
    tone = rng.uniform(50, 205)
    first = tone + rng.uniform(-45, 45, 3)
    second = first + rng.uniform(-1, 1, 3) * (25 + 30 * hard)
    turn = rng.uniform(0, 2 * np.pi)
    along = (
        np.linspace(0, np.cos(turn), width, dtype=np.float32)
        + np.linspace(0, np.sin(turn), height, dtype=np.float32)[:, None]
    )
    blend = along + np.float32(0.25) * _piece(rng, _noise()[3], size)
    canvas = first.astype(np.float32) + blend[..., None].astype(np.float32) * (second - first).astype(np.float32)
    rough = _noise()[int(rng.integers(1, 3))]
    canvas += _piece(rng, rough, size)[..., None] * np.float32(rng.uniform(2, 4 + 14 * hard))
    if rng.random() < 0.2 + 0.5 * hard:
        across = np.float32(rng.uniform(0.15, 0.6))
        turn = rng.uniform(0, np.pi)
        waves = np.sin(
            np.arange(width, dtype=np.float32) * across * np.float32(np.cos(turn))
            + np.arange(height, dtype=np.float32)[:, None] * across * np.float32(np.sin(turn))
        )
        canvas += (waves * np.float32(3 + 10 * hard * rng.random()))[..., None]
    return canvas, canvas[::8, ::8].mean((0, 1))


def _grounds(rng: np.random.Generator, plane: np.ndarray, hard: float) -> np.ndarray:
    """The background (H, W, 3) float32 of a map of GROUNDS, each with its own varying hue and texture."""
    size = (plane.shape[0], plane.shape[1])
    hues = np.array([(150, 190, 230), (80, 140, 60), (40, 80, 140), (150, 130, 115)], np.float32)
    canvas = (hues + rng.uniform(-1, 1, (len(GROUNDS), 3)) * (8 + 22 * hard)).astype(np.float32)[plane]
    rows = np.arange(size[0], dtype=np.float32)[:, None]
    fields = [
        _piece(rng, _noise()[3], size) * np.float32(6),
        _piece(rng, _noise()[1], size) * np.float32(16),
        np.sin(rows * np.float32(rng.uniform(0.5, 0.9)) + _piece(rng, _noise()[2], size)) * np.float32(14),
        _piece(rng, _noise()[0], size) * np.float32(22),
    ]
    return canvas + np.stack(fields)[plane, rows.astype(np.int64), np.arange(size[1])][..., None]


def _clutter(rng: np.random.Generator, canvas: np.ndarray, hard: float) -> None:
    """Draw unlabelled lines and faint spots."""
    height, width = canvas.shape[:2]
    count = int(rng.integers(0, 2 + round(8 * hard)))
    if not count:
        return
    half = (max(1, width // 2), max(1, height // 2))
    plane = Image.new("L", half)
    pen = ImageDraw.Draw(plane)
    for _ in range(count):
        start = rng.uniform(0, 1, 2) * half
        if rng.random() < 0.6:
            steps = rng.normal(0, 0.06 * max(half), (5, 2)) + rng.normal(0, 0.05 * max(half), 2)
            line = np.concatenate([start[None], start + np.cumsum(steps, 0)])
            pen.line(line.ravel().tolist(), fill=int(rng.integers(90, 200)), width=int(rng.integers(1, 3)))
        else:
            reach = rng.uniform(0.03, 0.1, 2) * min(half)
            pen.ellipse([*(start - reach), *(start + reach)], fill=int(rng.integers(30, 90)))
    soft = plane.resize((width, height), Image.Resampling.BICUBIC)
    strength = np.asarray(soft, dtype=np.float32)[..., None] / 255
    canvas += strength * rng.uniform(-70, 70, 3).astype(np.float32)


def _paint_thing(rng: np.random.Generator, canvas: np.ndarray, stamp: Stamp, ground: np.ndarray, hard: float) -> None:
    size = canvas.shape[:2]
    height, width = stamp.alpha.shape
    fall = max(1, round(stamp.radius * 0.07))
    shadow = np.asarray(Image.fromarray(stamp.alpha).filter(ImageFilter.BoxBlur(fall)))
    part, window = _cut(shadow, Stamp(shadow, stamp.x0 + fall, stamp.y0 + fall, stamp.radius), size)
    canvas[window] *= 1 - part[..., None] * np.float32((0.42 - 0.2 * hard) / 255)

    across = np.linspace(-1, 1, width, dtype=np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = 1 - np.float32(0.16) * (across + down)  # from the upper left
    if stamp.colours is not None:
        body = stamp.colours * light[..., None]
    else:
        body = (light + _texture(rng, across, down, stamp.radius, hard))[..., None] * _colour(rng, ground, hard)
    body = body + _piece(rng, _noise()[1], (height, width))[..., None] * np.float32(2 + 6 * hard)
    cover, window = _cut(stamp.alpha, stamp, size)
    y, x = window[0].start - stamp.y0, window[1].start - stamp.x0
    body = body[y : y + cover.shape[0], x : x + cover.shape[1]]
    canvas[window] += (body - canvas[window]) * (cover[..., None] * np.float32(1 / 255))


def _colour(rng: np.random.Generator, ground: np.ndarray, hard: float) -> np.ndarray:
    """A colour that differs from the background, less so at high difficulty."""
    wanted = 125 - 85 * hard
    bright = rng.uniform(20, 245, (12, 3))
    away = np.linalg.norm(bright - ground, axis=1)
    good = np.flatnonzero(away >= wanted)
    if not len(good):
        return bright[away.argmax()].astype(np.float32)
    faint = rng.random() < hard - 0.4
    return bright[good[away[good].argmin()] if faint else good[0]].astype(np.float32)


def _texture(
    rng: np.random.Generator, across: np.ndarray, down: np.ndarray, radius: float, hard: float
) -> np.ndarray | np.float32:
    """A pattern around 0, as a fraction of the object's brightness."""
    kind = int(rng.integers(6))
    turn = rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    # Periods of at least four pixels, so that patterns do not average out to grey.
    often = np.float32(min(rng.uniform(4, 14), 2 * np.pi * radius / 4))
    deep = np.float32(rng.uniform(0.06, 0.14 + 0.2 * hard))
    if kind == 0:
        return np.float32(0)
    if kind == 1:
        return np.sin((across * c + down * s) * often) * deep
    if kind == 2:
        return np.sign(np.sin((across * c + down * s) * often)) * deep
    if kind == 3:
        return np.sign(np.sin((across * c + down * s) * often) * np.sin((down * c - across * s) * often)) * deep
    if kind == 4:
        spots = np.cos((across * c + down * s) * often) + np.cos((down * c - across * s) * often)
        return np.where(spots > 0.8, deep, -deep / 2).astype(np.float32)
    return _piece(rng, _noise()[2], (len(down), len(across))) * deep * np.float32(0.7)


def _cut(plane: np.ndarray, stamp: Stamp, size: tuple[int, int]) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of a stamp's plane that lies in the image, and its position there."""
    y0, x0 = max(0, stamp.y0), max(0, stamp.x0)
    y1 = max(y0, min(size[0], stamp.y0 + plane.shape[0]))
    x1 = max(x0, min(size[1], stamp.x0 + plane.shape[1]))
    part = plane[y0 - stamp.y0 : y1 - stamp.y0, x0 - stamp.x0 : x1 - stamp.x0]
    return part, (slice(y0, y1), slice(x0, x1))


# ---- the format ----------------------------------------------------------------------------------------------------

_OPTIONS = ("count", "size", "seed", "difficulty", "classes", "empty", "keypoints", "stuff", "val")


def sniff(source: str, request: Request) -> list[Match]:
    """Recognize "scenes" and "scenes:OPTIONS", which have every split."""
    if source != "scenes" and not source.startswith("scenes:"):
        return []
    splits = ("train", "val") if request.split is None else (request.split,)
    return [Match(source, CERTAIN, source, split) for split in splits]


def read(match: Match, request: Request) -> Scenes:
    """Return the scenes that a text describes."""
    return parse_scenes(match.location, match.split or "train", bool(request.keypoints), bool(request.panoptic))


def parse_scenes(text: str, split: str, keypoints: bool = False, stuff: bool = False) -> Scenes:
    """Return the scenes that a text describes.

    Args:
        text: "scenes:count=200,size=192x256,seed=0,difficulty=0.5,classes=disc+ring,empty=0.1,stuff=1,val=50", where
            every option may be omitted; `keypoints=1` draws figures.
        split: "train", or the name of another split with different images, of which there are `val` (a quarter of
            `count` by default).
        keypoints: Draw figures with keypoints, whatever the text says.
        stuff: Divide the background among stuff classes, whatever the text says.

    Returns:
        The scenes.

    Raises:
        UsageError: If an option is unknown or its value invalid.
    """
    options: dict[str, str] = {}
    for part in filter(None, text.partition(":")[2].split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in _OPTIONS:
            raise UsageError(
                f"{text!r}: unknown option {part!r}; expected NAME=VALUE with a name of {', '.join(_OPTIONS)}, as in "
                "scenes:count=200,size=192"
            )
        options[name] = value
    try:
        count = int(options.get("count", 200))
        seed = int(options.get("seed", 0))
        sides = [int(v) for v in options.get("size", "192").split("x")]
        difficulty = float(options.get("difficulty", 0.5))
        empty = float(options.get("empty", 0.04))
        keypoints = keypoints or bool(int(options.get("keypoints", 0)))
        stuff = stuff or bool(int(options.get("stuff", 0)))
        held = int(options.get("val", max(1, count // 4)))
        if len(sides) not in (1, 2):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{text!r}: option values must be numbers, as in scenes:count=200,size=192x256,difficulty=0.5"
        ) from None
    classes = tuple(options["classes"].split("+")) if "classes" in options else CLASSES
    # Far enough apart that the splits of scenes with neighbouring seeds share no images.
    offset = {"train": 0, "val": 1}.get(split, 2) * 1_000_003
    return Scenes(
        count if split == "train" else held,
        (sides[0], sides[-1]),
        seed + offset,
        classes,
        difficulty,
        keypoints,
        empty,
        stuff,
    )
