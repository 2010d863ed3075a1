"""Painting of generated scenes: backgrounds, textures, clutter and objects."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from maskwright.data.drawing_shapes import Stamp

GROUNDS = ("sky", "grass", "water", "gravel")  # the regions of scenes with stuff
_POOL = 512  # side of the precomputed noise


@lru_cache(maxsize=1)
def noise_fields() -> tuple[np.ndarray, ...]:
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


def plain_noise() -> np.ndarray:
    """White noise (512, 512) float32 with mean 0 and standard deviation 1."""
    return noise_fields()[0]


def noise_window(rng: np.random.Generator, field: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A random window of a field."""
    y, x = rng.integers(_POOL, size=2)
    if y + size[0] <= _POOL and x + size[1] <= _POOL:
        return field[y : y + size[0], x : x + size[1]]
    return field[(y + np.arange(size[0])) % _POOL][:, (x + np.arange(size[1])) % _POOL]


def paint_ground(rng: np.random.Generator, size: tuple[int, int], hard: float) -> tuple[np.ndarray, np.ndarray]:
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
    blend = along + np.float32(0.25) * noise_window(rng, noise_fields()[3], size)
    canvas = first.astype(np.float32) + blend[..., None].astype(np.float32) * (second - first).astype(np.float32)
    rough = noise_fields()[int(rng.integers(1, 3))]
    canvas += noise_window(rng, rough, size)[..., None] * np.float32(rng.uniform(2, 4 + 14 * hard))
    if rng.random() < 0.2 + 0.5 * hard:
        across = np.float32(rng.uniform(0.15, 0.6))
        turn = rng.uniform(0, np.pi)
        waves = np.sin(
            np.arange(width, dtype=np.float32) * across * np.float32(np.cos(turn))
            + np.arange(height, dtype=np.float32)[:, None] * across * np.float32(np.sin(turn))
        )
        canvas += (waves * np.float32(3 + 10 * hard * rng.random()))[..., None]
    return canvas, canvas[::8, ::8].mean((0, 1))


def paint_grounds(rng: np.random.Generator, plane: np.ndarray, hard: float) -> np.ndarray:
    """The background (H, W, 3) float32 of a map of GROUNDS, each with its own varying hue and texture."""
    size = (plane.shape[0], plane.shape[1])
    hues = np.array([(150, 190, 230), (80, 140, 60), (40, 80, 140), (150, 130, 115)], np.float32)
    canvas = (hues + rng.uniform(-1, 1, (len(GROUNDS), 3)) * (8 + 22 * hard)).astype(np.float32)[plane]
    rows = np.arange(size[0], dtype=np.float32)[:, None]
    fields = [
        noise_window(rng, noise_fields()[3], size) * np.float32(6),
        noise_window(rng, noise_fields()[1], size) * np.float32(16),
        np.sin(rows * np.float32(rng.uniform(0.5, 0.9)) + noise_window(rng, noise_fields()[2], size)) * np.float32(14),
        noise_window(rng, noise_fields()[0], size) * np.float32(22),
    ]
    return canvas + np.stack(fields)[plane, rows.astype(np.int64), np.arange(size[1])][..., None]


def paint_clutter(rng: np.random.Generator, canvas: np.ndarray, hard: float) -> None:
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


def paint_stamp(
    rng: np.random.Generator, canvas: np.ndarray, stamp: Stamp, ground: np.ndarray, hard: float, shadow: bool = True
) -> None:
    """Paint an object, lit from the upper left, with or without its shadow."""
    size = canvas.shape[:2]
    height, width = stamp.alpha.shape
    fall = max(1, round(stamp.radius * 0.07))
    if shadow:
        soft = np.asarray(Image.fromarray(stamp.alpha).filter(ImageFilter.BoxBlur(fall)))
        part, window = cut_stamp(soft, Stamp(soft, stamp.x0 + fall, stamp.y0 + fall, stamp.radius), size)
        canvas[window] *= 1 - part[..., None] * np.float32((0.42 - 0.2 * hard) / 255)

    across = np.linspace(-1, 1, width, dtype=np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    light = 1 - np.float32(0.16) * (across + down)  # from the upper left
    if stamp.colours is not None:
        body = stamp.colours * light[..., None]
    else:
        body = (light + texture(rng, across, down, stamp.radius, hard))[..., None] * contrasting_colour(
            rng, ground, hard
        )
    body = body + noise_window(rng, noise_fields()[1], (height, width))[..., None] * np.float32(2 + 6 * hard)
    cover, window = cut_stamp(stamp.alpha, stamp, size)
    y, x = window[0].start - stamp.y0, window[1].start - stamp.x0
    body = body[y : y + cover.shape[0], x : x + cover.shape[1]]
    canvas[window] += (body - canvas[window]) * (cover[..., None] * np.float32(1 / 255))


def contrasting_colour(rng: np.random.Generator, ground: np.ndarray, hard: float) -> np.ndarray:
    """A colour that differs from the background, less so at high difficulty."""
    wanted = 125 - 85 * hard
    bright = rng.uniform(20, 245, (12, 3))
    away = np.linalg.norm(bright - ground, axis=1)
    good = np.flatnonzero(away >= wanted)
    if not len(good):
        return bright[away.argmax()].astype(np.float32)
    faint = rng.random() < hard - 0.4
    return bright[good[away[good].argmin()] if faint else good[0]].astype(np.float32)


def texture(
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
    return noise_window(rng, noise_fields()[2], (len(down), len(across))) * deep * np.float32(0.7)


def cut_stamp(plane: np.ndarray, stamp: Stamp, size: tuple[int, int]) -> tuple[np.ndarray, tuple[slice, slice]]:
    """The part of a stamp's plane that lies in the image, and its position there."""
    y0, x0 = max(0, stamp.y0), max(0, stamp.x0)
    y1 = max(y0, min(size[0], stamp.y0 + plane.shape[0]))
    x1 = max(x0, min(size[1], stamp.x0 + plane.shape[1]))
    part = plane[y0 - stamp.y0 : y1 - stamp.y0, x0 - stamp.x0 : x1 - stamp.x0]
    return part, (slice(y0, y1), slice(x0, x1))
