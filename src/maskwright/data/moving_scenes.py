"""Generated clips: the shapes of `Scenes` move, cover each other, leave the image and return.

Every object keeps its shape, texture and id. It moves along a line with a superposed oscillation; at higher difficulty
it also turns its direction more often, and the camera moves. Objects closer to the camera cover others, at all times in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from maskwright.data.clips import Clip, Clips
from maskwright.data.drawing_shapes import SHAPES, Stamp, draw_shape
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.generated import text_options
from maskwright.data.painting import cut_stamp, noise_window, paint_clutter, paint_ground, paint_stamp, plain_noise
from maskwright.data.scenes import CLASSES
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks

NAME = "generated clips"
LAYOUT = "clips:count=20 (generated)"

SMALLEST = 16  # visible pixels from which an object is annotated
_OPTIONS = ("count", "frames", "size", "seed", "difficulty", "classes", "speed", "val")


@dataclass(frozen=True)
class _Mover:
    """An object of a clip: what it looks like and how it moves."""

    label: int
    radius: float
    start: tuple[float, float]  # x, y in frame 0
    velocity: tuple[float, float]  # pixels per frame
    sway: tuple[float, float]  # amplitude in pixels
    rate: float  # radians per frame
    phase: float
    growth: float  # relative change of the radius per frame
    seed: tuple[int, ...]

    def center(self, frame: int) -> tuple[float, float]:
        swing = np.sin(self.rate * frame + self.phase) - np.sin(self.phase)
        return (
            self.start[0] + self.velocity[0] * frame + self.sway[0] * swing,
            self.start[1] + self.velocity[1] * frame + self.sway[1] * swing,
        )

    def stamp(self, name: str, frame: int) -> Stamp:
        radius = self.radius * (1 + self.growth * np.sin(self.rate * frame))
        return draw_shape(name, np.random.default_rng(self.seed), self.center(frame), float(radius))


class MovingScenes(Clips):
    """Generated clips; clip i depends only on `seed` and i, and a frame can be computed without those before it.

    Args:
        count: Number of clips.
        frames: Number of frames of each clip.
        size: H, W; at least 16.
        seed: Seed of the random numbers.
        classes: Some of the shapes of `Scenes`.
        difficulty: 0 (few large objects, plain background, static camera) to 1 (many small faint objects that often
            cover each other, clutter, moving camera).
        speed: Factor of all velocities.

    Raises:
        UsageError: If an argument is invalid.
    """

    def __init__(
        self,
        count: int,
        frames: int = 24,
        size: tuple[int, int] = (192, 192),
        seed: int = 0,
        classes: Sequence[str] = CLASSES,
        difficulty: float = 0.5,
        speed: float = 1.0,
    ):
        unknown = [name for name in classes if name not in SHAPES]
        if unknown or not classes or len(set(classes)) < len(classes):
            raise UsageError(f"clips: classes must be distinct names of {', '.join(SHAPES)}, got {tuple(classes)}")
        if count < 0 or frames < 1 or min(size) < 16 or not 0 <= difficulty <= 1 or seed < 0 or not 0 <= speed <= 100:
            raise UsageError(
                "clips: count and seed must not be negative, frames must be at least 1, sides at least 16, difficulty "
                f"in [0, 1] and speed in [0, 100]; got count {count}, seed {seed}, frames {frames}, size {size}, "
                f"difficulty {difficulty}, speed {speed}"
            )
        size = (int(size[0]), int(size[1]))
        clips = [MovingClip(index, frames, size, seed, tuple(classes), difficulty, speed) for index in range(count)]
        super().__init__(clips, classes, name=f"clips (seed {seed}, difficulty {difficulty:g})")
        self.strict = True


class MovingClip(Clip):
    """One generated clip; made by `MovingScenes`."""

    def __init__(
        self,
        index: int,
        frames: int,
        size: tuple[int, int],
        seed: int,
        classes: tuple[str, ...],
        difficulty: float,
        speed: float,
    ):
        super().__init__(f"clip{index + 1:04d}", index + 1, size, frames, range(frames))
        self._key = (seed, index)
        self._classes, self._difficulty, self._speed = classes, difficulty, speed
        self._owner = lru_cache(4)(self._laid)  # of the last frames: `image` and `target` are usually asked for both

    def __reduce__(self) -> tuple[type[MovingClip], tuple[object, ...]]:
        # A cache cannot be sent to the workers of a loader.
        seed, index = self._key
        return MovingClip, (index, len(self), self.size, seed, self._classes, self._difficulty, self._speed)

    def target(self, frame: int) -> Instances:
        frame = range(len(self))[frame]
        stamps, owner = self._owner(frame)
        crops: list[npt.NDArray[np.bool_]] = []
        corners: list[tuple[int, int]] = []
        kept: list[int] = []
        for number, stamp in enumerate(stamps):
            _, window = cut_stamp(stamp.alpha, stamp, self.size)
            crop = owner[*window] == number
            if np.count_nonzero(crop) >= SMALLEST:
                crops.append(crop)
                corners.append((window[1].start, window[0].start))
                kept.append(number)
        masks = Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), self.size)
        movers = _movers(self._key, self.size, len(self), self._classes, self._difficulty, self._speed)
        return Instances(
            self.size,
            masks.boxes(),
            torch.tensor([movers[number].label for number in kept], dtype=torch.int64),
            masks,
            crowd=torch.zeros(len(kept), dtype=torch.bool),
            ids=torch.tensor(kept, dtype=torch.int64) + 1,
        )

    def image(self, frame: int) -> UInt8[Tensor, "c H W"]:
        frame = range(len(self))[frame]
        hard = self._difficulty
        world, ground = _world(self._key, self.size, hard)
        dy, dx = _camera(self._key, self.size, frame, hard)
        height, width = self.size
        canvas = world[dy : dy + height, dx : dx + width].copy()
        stamps, _ = self._owner(frame)
        for number, stamp in enumerate(stamps):
            paint_stamp(np.random.default_rng((*self._key, 4, number)), canvas, stamp, ground, hard)
        rng = np.random.default_rng((*self._key, 5, frame))
        canvas += noise_window(rng, plain_noise(), self.size)[..., None] * np.float32(2 + 4 * hard)
        pixels = np.clip(canvas, 0, 255).astype(np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType] - untyped in torch

    def _laid(self, frame: int) -> tuple[list[Stamp], npt.NDArray[np.int16]]:
        """The objects, farthest first, and the number of the visible one at each pixel, -1 for the background."""
        movers = _movers(self._key, self.size, len(self), self._classes, self._difficulty, self._speed)
        dy, dx = _camera(self._key, self.size, frame, self._difficulty)
        y0, x0 = _camera(self._key, self.size, 0, self._difficulty)
        owner = np.full(self.size, -1, np.int16)
        stamps: list[Stamp] = []
        for number, mover in enumerate(movers):
            stamp = mover.stamp(self._classes[mover.label], frame)
            stamp.x0 -= dx - x0
            stamp.y0 -= dy - y0
            mask, window = cut_stamp(stamp.alpha, stamp, self.size)
            owner[*window][mask >= 128] = number
            stamps.append(stamp)
        return stamps, owner


def _movers(
    key: tuple[int, int], size: tuple[int, int], frames: int, classes: tuple[str, ...], hard: float, speed: float
) -> list[_Mover]:
    """The objects of a clip, farthest first. Paths lead through the image, at times that are spread over the clip."""
    rng = np.random.default_rng((*key, 3))
    height, width = size
    short = min(size)
    movers: list[_Mover] = []
    for number in range(int(rng.integers(2, 4 + round(5 * hard)))):
        radius = short * rng.uniform(0.13 - 0.05 * hard, 0.24 - 0.06 * hard)
        passes = rng.uniform(0.1, 0.9, 2) * (width, height)  # where it is at the time `when`
        when = rng.uniform(0.1, 0.9) * frames
        turn = rng.uniform(0, 2 * np.pi)
        pace = speed * short * rng.uniform(0.005, 0.015 + 0.03 * hard)
        velocity = (pace * np.cos(turn), pace * np.sin(turn))
        # Slow oscillations move some of the objects out of the image and back.
        rate = rng.uniform(0.1, 0.3) * max(speed, 1e-3) ** 0.5
        reach = short * rng.uniform(0.02, 0.1 + 0.3 * hard) * min(1.0, speed)
        sway = (reach * np.cos(turn + 1.3), reach * np.sin(turn + 1.3))
        start = (passes[0] - velocity[0] * when, passes[1] - velocity[1] * when)
        movers.append(
            _Mover(
                int(rng.integers(len(classes))), float(radius), (float(start[0]), float(start[1])),
                (float(velocity[0]), float(velocity[1])), (float(sway[0]), float(sway[1])), float(rate),
                float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 0.12) * min(1.0, speed)), (*key, 6, number),
            )
        )  # fmt: skip
    return movers


def _margin(size: tuple[int, int], hard: float) -> int:
    """Pixels by which the camera can move."""
    return round(0.2 * hard * min(size))


def _camera(key: tuple[int, int], size: tuple[int, int], frame: int, hard: float) -> tuple[int, int]:
    """Upper left corner y, x of a frame in the world."""
    margin = _margin(size, hard)
    rng = np.random.default_rng((*key, 7))
    rates, phases = rng.uniform(0.02, 0.08, 2), rng.uniform(0, 2 * np.pi, 2)
    y, x = np.round(margin / 2 * (1 + np.sin(rates * frame + phases))).astype(int)
    return int(y), int(x)


@lru_cache(4)
def _world(key: tuple[int, int], size: tuple[int, int], hard: float) -> tuple[npt.NDArray[np.float32], np.ndarray]:
    """The background that the camera moves over, and its mean colour."""
    rng = np.random.default_rng((*key, 2))
    margin = _margin(size, hard)
    canvas, ground = paint_ground(rng, (size[0] + margin, size[1] + margin), hard)
    paint_clutter(rng, canvas, hard)
    return canvas, ground


# ---- the format ----------------------------------------------------------------------------------------------------


def sniff(source: str, request: Request) -> list[Match]:
    """Recognize "clips" and "clips:OPTIONS", which have every split; a folder of the name "clips" is a folder."""
    if not (source == "clips" or source.startswith("clips:")) or request.keypoints or request.panoptic:
        return []
    if Path(source).exists():
        return []
    splits = ("train", "val") if request.split is None else (request.split,)
    return [Match(source, CERTAIN, source, split) for split in splits]


def read(match: Match, request: Request) -> MovingScenes:
    """Return the clips that a text describes."""
    del request
    return parse_clips(match.location, match.split or "train")


def parse_clips(text: str, split: str) -> MovingScenes:
    """Return the generated clips that a text describes.

    Args:
        text: "clips:count=20,frames=24,size=192x256,seed=0,difficulty=0.5,classes=disc+ring,speed=1,val=5", where every
            option may be omitted.
        split: "train", or the name of another split with different clips, of which there are `val` (a quarter of
            `count` by default).

    Returns:
        The clips.

    Raises:
        UsageError: If an option is unknown or its value invalid.
    """
    options = text_options(text, _OPTIONS, "clips:count=20,frames=24")
    try:
        count, seed = int(options.get("count", 20)), int(options.get("seed", 0))
        frames = int(options.get("frames", 24))
        sides = [int(side) for side in options.get("size", "192").split("x")]
        difficulty, speed = float(options.get("difficulty", 0.5)), float(options.get("speed", 1))
        held = int(options.get("val", max(1, count // 4)))
        if len(sides) not in (1, 2):
            raise ValueError
    except ValueError:
        raise UsageError(f"{text!r}: option values must be numbers, as in clips:count=20,size=192x256") from None
    classes = tuple(options["classes"].split("+")) if "classes" in options else CLASSES
    # Far enough apart that the splits of clips with neighbouring seeds share none.
    offset = {"train": 0, "val": 1}.get(split, 2) * 1_000_003
    return MovingScenes(
        count if split == "train" else held, frames, (sides[0], sides[-1]), seed + offset, classes, difficulty, speed
    )
