"""Generated scenes whose classes are outlines: for pre-training without photographs.

A class is the outline alone: the harmonics of its radius as a function of the angle, its corners, its elongation and
the number of its rings. Colours, textures and sizes are independent of it. Up to 32 objects hide and contain each
other, or up to 200 small ones form a crowd; a third of the objects is drawn as a contour. Images are degraded at
random: grey, gamma, blur, noise, JPEG compression.

The ideas are published: radial contours as classes (Kataoka et al., CVPR 2022, arXiv 2206.09132), circular harmonics
(VisualAtom, Takashima et al., CVPR 2023, arXiv 2303.01112), instances that occlude and contain each other (InsCore, Mae
et al., 2025, arXiv 2505.13099).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from maskwright.data.drawing_shapes import Stamp
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.generated import LARGEST, GeneratedScenes, Layout, text_options
from maskwright.data.painting import noise_window, paint_clutter, paint_ground, paint_stamp, plain_noise
from maskwright.errors import UsageError

NAME = "generated contours"
LAYOUT = "contours:count=2000 (generated)"
PREFIX = "contour-"  # class names of a person's data never begin with this

_ANGLES = np.linspace(0, 2 * np.pi, 73)[:-1]
_POINTS: npt.NDArray[np.float64] = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)
_CLASS_SEED = 763  # of the classes, which are the same in every data set


@dataclass(frozen=True)
class Outline:
    """A class: what distinguishes its objects from others.

    Attributes:
        points: (72, 2) x, y around the centre; the farthest is at distance 1.
        aspect: Width of the object as a fraction of its height.
        rings: Number of concentric contours inside the outline.
        hole: Radius of the hole as a fraction of the outline's; 0: no hole.
    """

    points: np.ndarray
    aspect: float
    rings: int
    hole: float


@lru_cache(maxsize=4096)
def outline(label: int) -> Outline:
    """The outline of a class.

    Args:
        label: Number of the class, from 0. The first four are an ellipse, a ring, a rounded bar and a blob.

    Returns:
        The outline.
    """
    rng = np.random.default_rng((_CLASS_SEED, label))
    if label < 4:
        # Simple outlines are rare among random harmonics and frequent in images.
        bump = np.cos(2 * _ANGLES) * (0.12 if label == 2 else 0) + np.cos(3 * _ANGLES) * (0.1 if label == 3 else 0)
        points = _POINTS * ((1 + bump) / (1 + bump).max())[:, None]
        return Outline(points, (0.85, 0.95, 0.4, 0.8)[label], 0, 0.5 if label == 1 else 0.0)
    low = int(rng.integers(2, 7))
    high = int(rng.integers(low + 1, 13))
    radius: npt.NDArray[np.float64] = 1 + rng.uniform(0.05, 0.4) * np.cos(low * _ANGLES)
    radius += rng.uniform(0, 0.25) * np.cos(high * _ANGLES + rng.uniform(0, 2 * np.pi))
    points: npt.NDArray[np.float64] = _POINTS * np.clip(radius, 0.15, None)[:, None]
    if rng.random() < 0.35:
        # Straight edges between few corners.
        corners = np.sort(rng.choice(len(_ANGLES), int(rng.integers(4, 11)), replace=False))
        steps = np.arange(len(_ANGLES))
        sides: list[npt.NDArray[np.float64]] = [
            np.interp(steps, corners, side, period=72) for side in points[corners].T
        ]
        points = np.stack(sides, 1)
    hole = float(rng.uniform(0.3, 0.65)) if rng.random() < 0.12 else 0.0
    rings = 0 if hole else int(rng.choice([0, 0, 0, 1, 2, 3]))
    return Outline(points / np.linalg.norm(points, axis=1).max(), float(rng.uniform(0.35, 1.0)), rings, hole)


class ContourScenes(GeneratedScenes):
    """Generated images with objects whose class is the outline; image i depends only on the settings and i.

    Args:
        count: Number of images.
        size: H, W of every image; 32 to 8192.
        seed: Seed of the random numbers.
        classes: Number of classes, named "contour-000", "contour-001", ...
        objects: Largest number of objects in an image that is no crowd; at most 1000, which the ids have room for.
        crowd: Fraction of images with 40 to 200 small objects of one or two classes.
        empty: Fraction of images without objects.

    Raises:
        UsageError: If an argument is invalid.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int] = (160, 160),
        seed: int = 0,
        classes: int = 254,
        objects: int = 32,
        crowd: float = 0.15,
        empty: float = 0.02,
    ):
        sized = 32 <= min(size) <= max(size) <= LARGEST
        if count < 0 or not sized or seed < 0 or not 1 <= classes <= 4096 or not 1 <= objects <= 1000:
            raise UsageError(
                f"contours: count and seed must not be negative, sides in [32, {LARGEST}], classes in [1, 4096], "
                f"objects in [1, 1000]; got count {count}, size {size}, seed {seed}, classes {classes}, objects "
                f"{objects}"
            )
        if not 0 <= crowd <= 1 or not 0 <= empty <= 1:
            raise UsageError(f"contours: crowd and empty must be in [0, 1], got {crowd} and {empty}")
        self.count, self.size, self.seed = count, (int(size[0]), int(size[1])), seed
        self.objects, self.crowd, self.empty = objects, crowd, empty
        digits = max(3, len(str(classes - 1)))
        self.classes = tuple(f"{PREFIX}{label:0{digits}d}" for label in range(classes))
        self.category_ids = tuple(range(1, classes + 1))
        self.name = f"contours (seed {seed})"
        self.strict = True

    def _layout(self, index: int) -> Layout:
        rng = np.random.default_rng((self.seed, index, 10))
        layout = Layout([], np.full(self.size, -1, np.int16))
        kind = rng.random()
        if kind < self.empty:
            return layout
        if kind < self.empty + self.crowd * (1 - self.empty):
            self._place_crowd(rng, layout)
        else:
            self._place_objects(rng, layout)
        return layout

    def _place_objects(self, rng: np.random.Generator, layout: Layout) -> None:
        """One to `objects` objects of all sizes, each partly hidden by, beside or within others."""
        short, (height, width) = min(self.size), self.size
        count = max(1, round(self.objects ** rng.uniform(0.15, 1)))
        few = int(rng.integers(1, 9))  # classes of this image: several objects of one class are common
        labels = rng.integers(len(self.classes), size=few)
        # Simple outlines, the first four classes, are as frequent as in images.
        labels = np.where(rng.random(few) < 0.2, rng.integers(min(4, len(self.classes)), size=few), labels)
        largest = min(0.5, 1.1 / np.sqrt(count) + 0.08)
        radii = short * np.exp(rng.uniform(np.log(4.5 / short), np.log(max(largest, 5 / short)), count))
        if rng.random() < 0.75:
            radii = np.sort(radii)[::-1]  # small objects on top of large ones
        fewest, nested, hollow = rng.uniform(0.12, 0.6), rng.random() * 0.7, rng.random() * 0.66
        for radius in radii.tolist():
            for _ in range(4):
                centre = (rng.uniform(-0.05, 1.05) * width, rng.uniform(-0.05, 1.05) * height)
                if layout.things and rng.random() < nested:
                    outer = layout.things[int(rng.integers(len(layout.things)))].stamp
                    reach = 0.6 * outer.radius * np.sqrt(rng.random())
                    turn = rng.uniform(0, 2 * np.pi)
                    middle = (outer.x0 + outer.alpha.shape[1] / 2, outer.y0 + outer.alpha.shape[0] / 2)
                    centre = (middle[0] + reach * np.cos(turn), middle[1] + reach * np.sin(turn))
                label = int(labels[int(rng.integers(few))])
                stamp, shown = draw_outline(rng, label, centre, radius, rng.random() < hollow)
                if layout.lay(stamp, label, fewest, smallest=16, shown=shown):
                    break

    def _place_crowd(self, rng: np.random.Generator, layout: Layout) -> None:
        """40 to 200 small objects of one or two classes, like cells or grains."""
        height, width = self.size
        count = int(rng.integers(40, 201))
        common = rng.random(2) < 0.6
        labels = np.where(
            common, rng.integers(min(4, len(self.classes)), size=2), rng.integers(len(self.classes), size=2)
        )
        # No larger than what fits with a third of the image left free.
        reach = min(float(rng.uniform(4.5, 11)), np.sqrt(0.66 * height * width / count / np.pi))
        fewest, hollow = rng.uniform(0.5, 0.95), 0.3 * (rng.random() < 0.3)
        second = rng.random() * 0.5
        for _ in range(count):
            radius = max(4.0, reach * rng.uniform(0.65, 1.35))
            centre = (rng.uniform(-0.03, 1.03) * width, rng.uniform(-0.03, 1.03) * height)
            label = int(labels[int(rng.random() < second)])
            stamp, shown = draw_outline(rng, label, centre, radius, rng.random() < hollow)
            layout.lay(stamp, label, fewest, smallest=16, shown=shown)

    def _paint(self, index: int, layout: Layout) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 11))
        crowd = len(layout.things) >= 40
        hard = rng.random() * (0.5 if crowd else 1.0)
        canvas, ground = paint_ground(rng, self.size, hard)
        if rng.random() < 0.4:
            # Plain and extreme backgrounds: black, white, or any tone.
            tone = rng.choice([0.0, 255.0, rng.uniform(0, 255)]) + rng.uniform(-12, 12, 3)
            canvas = tone.astype(np.float32) + (canvas - ground).astype(np.float32) * np.float32(rng.uniform(0, 0.4))
            ground = tone
        if not crowd:
            paint_clutter(rng, canvas, hard)
        alike = crowd or rng.random() < 0.15  # objects of one colour
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        for thing in layout.things:
            stamp = thing.shown or thing.stamp
            if alike:
                tone = np.clip(colour + rng.uniform(-25, 25, 3), 0, 255).astype(np.float32)
                stamp = Stamp(
                    stamp.alpha, stamp.x0, stamp.y0, stamp.radius, np.broadcast_to(tone, (*stamp.alpha.shape, 3))
                )
            paint_stamp(rng, canvas, stamp, ground, hard, shadow=not crowd and rng.random() < 0.5)
        return _degrade(rng, canvas)


def draw_outline(
    rng: np.random.Generator, label: int, centre: tuple[float, float], radius: float, hollow: bool
) -> tuple[Stamp, Stamp | None]:
    """Draw an object of a class with a random rotation and small deviations from its outline.

    Args:
        rng: Source of random numbers.
        label: The class.
        centre: x, y in pixels.
        radius: Extent in pixels.
        hollow: Draw the contour; what is inside is at most a third opaque.

    Returns:
        The object with everything inside its outline, and what is painted of it if that is less.
    """
    kind = outline(label)
    waves = np.arange(2, 6)
    bends = rng.uniform(0, 0.035) * rng.standard_normal(4)
    bend = 1 + np.cos(np.outer(_ANGLES, waves) + rng.uniform(0, 2 * np.pi, 4)) @ bends
    ring = kind.points * bend[:, None] * (kind.aspect * rng.uniform(0.9, 1.1), 1)
    turn = rng.uniform(0, 2 * np.pi)
    ring = ring @ (np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * radius)
    low, high = np.floor(ring.min(0) + centre).astype(int) - 1, np.ceil(ring.max(0) + centre).astype(int) + 1
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    fine = 3 if radius < 24 else 2
    middle = np.asarray(centre) - low

    def draw(steps: list[tuple[float, int]]) -> np.ndarray:
        plane = Image.new("L", (size[0] * fine, size[1] * fine))
        pen = ImageDraw.Draw(plane)
        for scale, value in steps:
            pen.polygon(((ring * scale + middle) * fine - 0.5).ravel().tolist(), fill=value)  # integers are centres
        return np.asarray(plane.reduce(fine))

    hole = [(kind.hole, 0)] if kind.hole else []
    stamp = Stamp(draw([(1.0, 255), *hole]), int(low[0]), int(low[1]), radius)
    wide = max(1.2 / radius, rng.uniform(0.05, 0.14))
    inside = int(rng.uniform(0, 85)) if hollow else 255
    steps: list[tuple[float, int]] = [(1.0, 255)]
    if hollow:
        steps.append((1 - wide, inside))
    # Rings show as contours in hollow objects and as gaps in solid ones.
    for n in range(kind.rings if radius > 10 else 0):
        scale = 1 - (n + 1) / (kind.rings + 1)
        steps += [(scale, 255 if hollow else 110), (scale - min(wide, 0.5 * scale), inside)]
    if kind.hole:
        steps += [(min(1.0, kind.hole + wide), 255), (kind.hole, 0)] if hollow else hole
    if len(steps) == 1 + len(hole):
        return stamp, None
    return stamp, Stamp(draw(steps), stamp.x0, stamp.y0, radius)


def _degrade(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Random exposure, colour, blur, noise and compression; the result (H, W, 3) uint8."""
    height, width = canvas.shape[:2]
    canvas = np.clip(canvas, 0, 255)
    if rng.random() < 0.4:
        canvas = 255 * (canvas * np.float32(1 / 255)) ** np.float32(np.exp(rng.uniform(-0.7, 0.7)))
    if rng.random() < 0.25:
        grey = canvas @ np.array([0.299, 0.587, 0.114], np.float32)
        canvas = np.repeat((255 - grey if rng.random() < 0.3 else grey)[..., None], 3, 2)
    canvas = canvas.astype(np.float32)
    if rng.random() < 0.35:
        image = Image.fromarray(canvas.astype(np.uint8))
        canvas = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6))), np.float32)
    if rng.random() < 0.6:
        canvas = canvas + noise_window(rng, plain_noise(), (height, width))[..., None] * np.float32(rng.uniform(1, 14))
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=int(rng.integers(25, 90)))
        pixels = np.asarray(Image.open(data)).copy()
    return pixels


# ---- the format ----------------------------------------------------------------------------------------------------

_OPTIONS: dict[str, type] = {
    "count": int, "size": str, "seed": int, "classes": int, "objects": int, "crowd": float, "empty": float, "val": int,
}  # fmt: skip


def sniff(source: str, request: Request) -> list[Match]:
    """Recognize "contours" and "contours:OPTIONS", which have every split."""
    if source != "contours" and not source.startswith("contours:"):
        return []
    splits = ("train", "val") if request.split is None else (request.split,)
    return [Match(source, CERTAIN, source, split) for split in splits]


def read(match: Match, request: Request) -> ContourScenes:
    """Return the scenes that a text describes."""
    text, split = match.location, match.split or "train"
    options: dict[str, Any] = {}
    for name, value in text_options(text, _OPTIONS, "contours:count=2000,size=160").items():
        try:
            options[name] = _OPTIONS[name](value)
            if name == "size":
                sides = [int(v) for v in value.split("x")]
                if len(sides) > 2:
                    raise ValueError
                options[name] = (sides[0], sides[-1])
        except ValueError:
            raise UsageError(
                f"{text!r}: option values must be numbers, as in contours:count=2000,size=160x192,classes=254"
            ) from None
    count = options.pop("count", 2000)
    held = options.pop("val", max(1, count // 10))
    if (seed := options.pop("seed", 0)) < 0:
        raise UsageError(f"{text!r}: seed must not be negative")
    # Far enough apart that the splits of data sets with neighbouring seeds share no images.
    seed += {"train": 0, "val": 1}.get(split, 2) * 1_000_003
    return ContourScenes(count if split == "train" else held, seed=seed, **options)
