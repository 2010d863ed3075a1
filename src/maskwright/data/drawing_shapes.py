"""The shapes of generated scenes: outlines in a unit frame, drawn with anti-aliasing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from maskwright.data.dataset import PERSON_KEYPOINTS

SHAPE_OVERSAMPLING = 3  # shapes are drawn this many times larger and reduced, for soft edges
FIGURE_OVERSAMPLING = 2  # figures are larger and have their own colours

# One ring (P, 2) in a frame in which the shape extends to about 1, and whether it is filled or cut out.
Part = tuple[np.ndarray, bool]

_TURN = np.linspace(0, 2 * np.pi, 49)[:-1]
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


def _disc(rng: np.random.Generator) -> list[Part]:
    return [(_CIRCLE * (1, rng.uniform(0.8, 1)), True)]


def _ring(rng: np.random.Generator) -> list[Part]:
    return [(_CIRCLE, True), (_CIRCLE * rng.uniform(0.42, 0.62), False)]


def _star(rng: np.random.Generator) -> list[Part]:
    turn = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)[:, None]
    return [(np.stack([np.cos(turn), np.sin(turn)], 1) * radius, True)]


def _box(rng: np.random.Generator) -> list[Part]:
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], float)
    bend = _CIRCLE.reshape(4, 12, 2) * 0.15  # rounded corners
    outline = (corners[:, None] * (1.0, rng.uniform(0.55, 1.0)) * 0.7 + bend).reshape(-1, 2)
    return [(outline, True)]


def _crescent(rng: np.random.Generator) -> list[Part]:
    return [(_CIRCLE, True), (_CIRCLE * 0.86 + (rng.uniform(0.42, 0.62), 0), False)]


def _cross(rng: np.random.Generator) -> list[Part]:
    arm = rng.uniform(0.25, 0.36)
    corner = np.array([[1, arm], [arm, arm], [arm, 1]])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [(np.concatenate([corner @ t.T for t in turns]), True)]


def _triangle(rng: np.random.Generator) -> list[Part]:
    turn = np.arange(3) * 2 * np.pi / 3
    return [(np.stack([np.cos(turn), np.sin(turn) * rng.uniform(0.7, 1)], 1), True)]


def _heart(rng: np.random.Generator) -> list[Part]:
    x = np.sin(_TURN) ** 3
    y = -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN) - np.cos(4 * _TURN)) / 16
    return [(np.stack([x, y], 1), True)]


SHAPES: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "disc": _disc,
    "ring": _ring,
    "star": _star,
    "box": _box,
    "crescent": _crescent,
    "cross": _cross,
    "triangle": _triangle,
    "heart": _heart,
}


@dataclass
class Stamp:
    """A drawn object.

    Attributes:
        alpha: Coverage (h, w), uint8.
        x0: Left edge in the image; the stamp may extend beyond the image.
        y0: Upper edge in the image.
        radius: Extent in pixels.
        colours: (h, w, 3) uint8; None if the colours are chosen later.
        keypoints: (17, 2) x, y in the image; None if there are none.
    """

    alpha: np.ndarray
    x0: int
    y0: int
    radius: float
    colours: np.ndarray | None = None
    keypoints: np.ndarray | None = None


def draw_shape(name: str, rng: np.random.Generator, centre: tuple[float, float], radius: float) -> Stamp:
    """Draw a shape with a random rotation.

    Args:
        name: A key of `SHAPES`.
        rng: Source of random numbers.
        centre: x, y in pixels.
        radius: Extent in pixels.

    Returns:
        The shape.
    """
    turn = rng.uniform(0, 2 * np.pi)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * radius
    parts = [(ring @ turned.T + centre, add) for ring, add in SHAPES[name](rng)]
    x0, y0, width, height = _frame(np.concatenate([ring for ring, _ in parts]))
    plane = Image.new("L", (width * SHAPE_OVERSAMPLING, height * SHAPE_OVERSAMPLING))
    pen = ImageDraw.Draw(plane)
    for ring, add in parts:
        # Pillow's integer coordinates are pixel centres.
        pen.polygon(((ring - (x0, y0)) * SHAPE_OVERSAMPLING - 0.5).ravel().tolist(), fill=255 if add else 0)
    return Stamp(np.asarray(plane.reduce(SHAPE_OVERSAMPLING)), x0, y0, radius)


# Keypoints of a standing figure of extent 1 that faces the viewer: its left side has positive x.
_STANDING = {
    "nose": (0.0, -0.74),
    "eye": (0.075, -0.80),
    "ear": (0.16, -0.77),
    "shoulder": (0.24, -0.47),
    "hip": (0.15, 0.12),
}
_ARM, _LEG = (0.30, 0.27), (0.43, 0.42)


def draw_figure(rng: np.random.Generator, centre: tuple[float, float], radius: float, lively: float) -> Stamp:
    """Draw a person who faces the viewer.

    Args:
        rng: Source of random numbers.
        centre: x, y in pixels.
        radius: Distance from the centre to the feet in pixels.
        lively: Variation of the pose, 0 ... 1.

    Returns:
        The figure, with colours and keypoints.
    """
    keypoints = _pose(rng, lively) * (rng.uniform(0.85, 1.1), 1)
    lean = rng.uniform(-0.35, 0.35) * lively
    turned = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]]) * radius
    points = keypoints @ turned.T + centre
    skin = np.array([235, 190, 150]) * rng.uniform(0.4, 1.05)
    shirt, trousers = rng.uniform(30, 235, (2, 3))
    thick = radius * rng.uniform(0.13, 0.18)
    head = radius * 0.21
    low, high = points.min(0) - head - thick, points.max(0) + head + thick
    x0, y0, width, height = _frame(np.stack([low, high]))
    fine = (points - (x0, y0)) * FIGURE_OVERSAMPLING
    at = dict(zip(PERSON_KEYPOINTS, fine, strict=True))
    alpha = Image.new("L", (width * FIGURE_OVERSAMPLING, height * FIGURE_OVERSAMPLING))
    colours = Image.new("RGB", alpha.size)
    pens = ImageDraw.Draw(alpha), ImageDraw.Draw(colours)

    def fill(colour: np.ndarray) -> tuple[int, tuple[int, ...]]:
        return 255, tuple(int(v) for v in np.clip(colour, 0, 255))

    def limb(names: list[str], width: float, colour: np.ndarray) -> None:
        line = np.stack([at[n] for n in names])
        half = width * FIGURE_OVERSAMPLING / 2
        for pen, ink in zip(pens, fill(colour), strict=True):
            pen.line(line.ravel().tolist(), fill=ink, width=max(1, round(2 * half)))
            for x, y in line.tolist():
                pen.ellipse((x - half, y - half, x + half, y + half), fill=ink)

    def spot(middle: np.ndarray, reach: float, colour: np.ndarray) -> None:
        x, y = middle.tolist()
        for pen, ink in zip(pens, fill(colour), strict=True):
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)

    for side in ("left", "right"):
        limb([f"{side}_hip", f"{side}_knee", f"{side}_ankle"], thick, trousers)
    torso = np.stack([at["left_shoulder"], at["right_shoulder"], at["right_hip"], at["left_hip"]]).ravel().tolist()
    for pen, ink in zip(pens, fill(shirt), strict=True):
        pen.polygon(torso, fill=ink)
    limb(["left_shoulder", "right_shoulder", "right_hip", "left_hip", "left_shoulder"], thick, shirt)
    for side in ("left", "right"):
        limb([f"{side}_elbow", f"{side}_wrist"], thick * 0.7, skin)
        limb([f"{side}_shoulder", f"{side}_elbow"], thick * 0.85, shirt * 0.85)
    middle = (at["left_ear"] + at["right_ear"]) / 2
    neck = (at["left_shoulder"] + at["right_shoulder"]) / 2
    spot((middle + neck) / 2, thick * FIGURE_OVERSAMPLING * 0.5, skin * 0.9)
    for side in ("left", "right"):
        spot(at[f"{side}_ear"], head * FIGURE_OVERSAMPLING * 0.3, skin * 0.85)
    spot(middle, head * FIGURE_OVERSAMPLING * 0.85, skin)
    for side in ("left", "right"):
        spot(at[f"{side}_eye"], max(1.0, head * FIGURE_OVERSAMPLING * 0.13), np.full(3, 25.0))
    spot(at["nose"], max(1.0, head * FIGURE_OVERSAMPLING * 0.12), skin * 0.6)
    cover = np.asarray(alpha.reduce(FIGURE_OVERSAMPLING))
    # Colours of partly covered pixels are mixed with black; this is undone, so that blending does not darken the edge.
    seen = np.asarray(colours.reduce(FIGURE_OVERSAMPLING)).astype(np.float32) * (255 / np.maximum(cover, 1))[..., None]
    return Stamp(cover, x0, y0, radius, np.clip(seen, 0, 255).astype(np.uint8), points)


def _pose(rng: np.random.Generator, lively: float) -> np.ndarray:
    """The keypoints (17, 2) of a figure of extent 1."""
    reach = 0.35 + 0.65 * lively
    sway = rng.uniform(-0.06, 0.06, 2)
    place: dict[str, np.ndarray] = {}
    for side, sign in (("left", 1.0), ("right", -1.0)):
        for name in ("eye", "ear"):
            place[f"{side}_{name}"] = np.array(_STANDING[name]) * (sign, 1) + sway
        for name in ("shoulder", "hip"):
            place[f"{side}_{name}"] = np.array(_STANDING[name]) * (sign, 1)
        arm = rng.uniform(0.1, 0.4 + 2.1 * reach)  # from hanging to raised
        leg = rng.uniform(0.02, 0.25 + 0.4 * reach)
        bends = rng.uniform(-0.2, 1.4 * reach), rng.uniform(-0.5 * reach, 0.05)
        limbs = (("shoulder", "elbow", "wrist", _ARM, arm, bends[0]), ("hip", "knee", "ankle", _LEG, leg, bends[1]))
        for start, middle, end, lengths, angle, bend in limbs:
            for name, before, length, way in (
                (middle, start, lengths[0], angle),
                (end, middle, lengths[1], angle + bend),
            ):
                step = np.array([sign * np.sin(way), np.cos(way)]) * length
                place[f"{side}_{name}"] = place[f"{side}_{before}"] + step
    place["nose"] = np.array(_STANDING["nose"]) + sway
    return np.stack([place[name] for name in PERSON_KEYPOINTS])


def _frame(points: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, width, height of the smallest pixel window around the points."""
    low, high = np.floor(points.min(0)).astype(int) - 1, np.ceil(points.max(0)).astype(int) + 1
    return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])
