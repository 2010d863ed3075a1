"""Generated scenes: annotated images without files or licences, identical on every machine.

Textured shapes overlap on a textured background. The class depends on the shape only, never on the colour. Masks are
the visible parts: hidden parts and holes are excluded. `difficulty` ranges from few large, distinct, separate shapes
(0) to many small, faint, partly hidden ones among clutter (1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from maskwright.data.dataset import PERSON_KEYPOINTS
from maskwright.data.drawing_shapes import SHAPES, draw_figure, draw_shape
from maskwright.data.formats import CERTAIN, Match, Request
from maskwright.data.generated import LARGEST, GeneratedScenes, Layout, text_options
from maskwright.data.painting import (
    GROUNDS,
    noise_fields,
    noise_window,
    paint_clutter,
    paint_ground,
    paint_grounds,
    paint_stamp,
)
from maskwright.errors import UsageError
from maskwright.structures import Instances

NAME = "generated scenes"
LAYOUT = "scenes:count=200 (generated)"

CLASSES = ("disc", "ring", "star", "box", "crescent", "cross")


class Scenes(GeneratedScenes):
    """Generated images with objects; image i depends only on `seed` and i.

    One core generates 120 to 220 images of 192 x 192 per second, fewer at high difficulty; figures about 70. Image ids
    are 1, 2, ...

    Args:
        count: Number of images.
        size: H, W of every image; 16 to 8192.
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
        sized = 16 <= min(size) <= max(size) <= LARGEST
        if count < 0 or not sized or not 0 <= difficulty <= 1 or not 0 <= empty <= 1 or seed < 0:
            raise UsageError(
                f"scenes: count and seed must not be negative, sides in [16, {LARGEST}], difficulty and empty must be "
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

    # ---- layout -----------------------------------------------------------------------------------------------------

    def _layout(self, index: int) -> Layout:
        rng = np.random.default_rng((self.seed, index))
        height, width = self.size
        hard, short = self.difficulty, min(self.size)
        layout = Layout([], np.full(self.size, -1, np.int16), self._regions(index) if self.stuff else None)
        if rng.random() < self.empty:
            return layout
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
                if layout.lay(stamp, label if figure or not self.keypoints else -1, fewest, apart=hard < 0.15):
                    break
        return layout

    def _target(self, index: int, layout: Layout) -> Instances:
        chosen = [n for n, thing in enumerate(layout.things) if thing.label >= 0]
        crops, corners = layout.visible_parts(chosen)
        labels = [layout.things[n].label for n in chosen]
        if layout.ground is not None:
            for region in np.unique(layout.ground[layout.owner < 0]).tolist():
                crops.append((layout.ground == region) & (layout.owner < 0))
                corners.append((0, 0))
                labels.append(len(self.shapes) + region)
        keypoints = self._keypoints(layout, chosen) if self.keypoints else None
        return self._instances(index, crops, corners, labels, keypoints)

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

    def _keypoints(self, layout: Layout, chosen: list[int]) -> torch.Tensor:
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

    def _paint(self, index: int, layout: Layout) -> np.ndarray:
        rng = np.random.default_rng((self.seed, index, 1))
        hard = self.difficulty
        if layout.ground is None:
            canvas, ground = paint_ground(rng, self.size, hard)
        else:
            canvas = paint_grounds(rng, layout.ground, hard)
            ground = canvas[::8, ::8].mean((0, 1))
        paint_clutter(rng, canvas, hard)
        for thing in layout.things:
            paint_stamp(rng, canvas, thing.stamp, ground, hard)
        grain = noise_fields()[0]
        canvas += noise_window(rng, grain, self.size)[..., None] * np.float32(2 + 10 * hard * rng.random())
        return np.clip(canvas, 0, 255).astype(np.uint8)


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
    options = text_options(text, _OPTIONS, "scenes:count=200,size=192")
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
