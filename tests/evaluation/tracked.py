"""Imperfect tracks of generated clips, for the tests of metrics and trackers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from maskwright.data import Clip
from maskwright.structures import Instances, Masks

Frames = list[Instances]


def annotated(clip: Clip) -> Frames:
    return [clip.target(frame) for frame in clip.annotated]


def objects(
    size: tuple[int, int],
    squares: Sequence[tuple[int, int, int, int]],
    ids: Sequence[int],
    labels: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    crowd: Sequence[bool] | None = None,
) -> Instances:
    """Rectangles x0, y0, x1, y1."""
    planes = torch.zeros(len(squares), *size, dtype=torch.bool)
    for plane, (x0, y0, x1, y1) in zip(planes, squares, strict=True):
        plane[y0:y1, x0:x1] = True
    masks = Masks.from_dense(planes).pack()
    return Instances(
        size, masks.boxes(), torch.tensor(labels or [0] * len(squares), dtype=torch.int64).reshape(-1), masks,
        None if scores is None else torch.tensor(scores).reshape(-1),
        crowd=None if crowd is None else torch.tensor(crowd, dtype=torch.bool),
        ids=torch.tensor(ids, dtype=torch.int64).reshape(-1),
    )  # fmt: skip


def disturbed(frames: Frames, seed: int, labels: int = 1) -> Frames:
    """Predictions: masks displaced, objects missed, invented, relabelled, with switched and non-contiguous ids."""
    rng = np.random.default_rng(seed)
    size = frames[0].image_size
    names: dict[int, int] = {}
    kinds: dict[int, int] = {}
    found: Frames = []
    quality = rng.uniform(0, 3)
    for frame in frames:
        planes, ids, classes, scores = [], [], [], []
        dense = frame.masks.dense().numpy()
        if rng.random() < 0.06:
            dense = dense[:0]
        for row, plane in enumerate(dense):
            number = int(frame.ids[row])
            if number not in names or rng.random() < 0.06:
                names[number] = int(rng.integers(1, 60)) * 7
            if rng.random() < 0.12 or names[number] in ids:
                continue
            shift = np.round(rng.normal(0, quality, 2)).astype(int)
            planes.append(np.roll(plane, tuple(shift), (0, 1)))
            ids.append(names[number])
            kind = kinds.setdefault(
                names[number], int(rng.integers(labels)) if rng.random() < 0.2 else int(frame.labels[row])
            )
            classes.append(kind)
            scores.append(float(np.round(rng.random(), 1)))
        if rng.random() < 0.3:
            y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
            plane = np.zeros(size, bool)
            plane[y : y + 9, x : x + 12] = True
            number = int(rng.integers(500, 503))
            planes.append(plane)
            ids.append(number)
            classes.append(kinds.setdefault(number, int(rng.integers(labels))))
            scores.append(float(np.round(rng.random(), 1)))
        masks = Masks.from_dense(torch.from_numpy(np.stack(planes) if planes else np.zeros((0, *size), bool))).pack()
        found.append(
            Instances(
                size, masks.boxes(), torch.tensor(classes, dtype=torch.int64), masks, torch.tensor(scores),
                ids=torch.tensor(ids, dtype=torch.int64),
            )
        )  # fmt: skip
    return found
