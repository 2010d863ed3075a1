"""A data set of ellipses in memory, and predictions made by disturbing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from maskwright.structures import Instances, Masks


@dataclass
class Image:
    image: torch.Tensor
    target: Instances
    id: Any
    path: None = None


@dataclass
class Ellipses:
    """Stands for any data set: exactly what the evaluator asks of one."""

    images: list[Instances]
    ids: list[Any]
    classes: tuple[str, ...] = ("disc", "egg", "pebble")
    category_ids: tuple[int, ...] = (3, 90, 1000)
    name: str = "ellipses"
    given_areas: list[np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.given_areas is not None:
            self.areas = lambda i: self.given_areas[i]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        height, width = self.images[i].image_size
        noise = np.random.default_rng(i).integers(0, 255, (3, height, width), dtype=np.uint8)
        return Image(torch.from_numpy(noise), self.images[i], self.ids[i])

    def image_ids(self):
        return list(self.ids)

    def targets(self, i):
        return self.images[i]

    def sizes(self):
        return [p.image_size for p in self.images]


def ellipses(rng, count, size, scale=0.12):
    """`count` masks of ellipses; small ones are common, as in real images."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    planes = np.zeros((count, height, width), bool)
    for plane in planes:
        a, b = rng.gamma(2.0, scale * min(size) / 2, 2) + 2
        cx, cy, turn = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        plane[:] = (u / a) ** 2 + (v / b) ** 2 <= 1
    return planes[planes.any((1, 2))]


def planes_of(masks):
    """All masks as bool planes (N, H, W)."""
    planes = np.zeros((len(masks), *masks.size), bool)
    for plane, (x0, y0, x1, y1), crop in zip(planes, *masks.crops(), strict=True):
        plane[y0:y1, x0:x1] = crop
    return planes


def truth(rng, count, size=(96, 128), classes=3, keypoints=None, crowd=0.08):
    masks = Masks.from_dense(torch.from_numpy(ellipses(rng, count, size))).pack()
    number = len(masks)
    points = None
    if keypoints:
        boxes = masks.boxes().numpy()
        spread = rng.uniform(0, 1, (number, keypoints, 2))
        xy = boxes[:, None, :2] + spread * (boxes[:, None, 2:] - boxes[:, None, :2])
        seen = rng.integers(0, 3, (number, keypoints, 1)) * (rng.random((number, 1, 1)) > 0.1)
        points = torch.from_numpy(np.concatenate([xy.round(), seen], -1)).float()
    return Instances(
        size,
        masks.boxes(),
        torch.from_numpy(rng.integers(0, classes, number)),
        masks,
        keypoints=points,
        crowd=torch.from_numpy(rng.random(number) < crowd),
        ids=torch.arange(number),
    )


def disturbed(target, rng, classes=3, extra=3, ties=False):
    """Predictions: most objects shifted, some missed, some doubled, some of a wrong class, some out of nothing."""
    size = target.image_size
    number = len(target)
    kept = np.flatnonzero(rng.random(number) > 0.15)
    kept = np.concatenate([kept, kept[rng.random(len(kept)) < 0.2]]).astype(int)
    planes = planes_of(target.masks)[kept]
    shifts = rng.normal(0, 1.5, (len(kept), 2)).round().astype(int)
    moved = [np.roll(plane, shift, (0, 1)) for plane, shift in zip(planes, shifts, strict=True)]
    false = ellipses(rng, extra, size)
    planes = np.concatenate([np.stack(moved) if moved else np.zeros((0, *size), bool), false])
    labels = target.labels.numpy()[kept]
    labels = np.where(rng.random(len(kept)) < 0.15, rng.integers(0, classes, len(kept)), labels)
    labels = np.concatenate([labels, rng.integers(0, classes, len(false))])
    scores = np.clip(rng.beta(3, 1.5, len(planes)), 0, 1).astype(np.float32)
    if ties:
        scores = (scores * 4).round() / 4
    masks = Masks.from_dense(torch.from_numpy(planes)).pack()
    points = None
    if target.keypoints is not None:
        keypoints = target.keypoints.shape[1]
        near = target.keypoints.numpy()[kept]
        near = near + np.concatenate([rng.normal(0, 2, (*near.shape[:2], 2)), np.zeros((*near.shape[:2], 1))], -1)
        far = rng.uniform(0, min(size), (len(false), keypoints, 3))
        points = torch.from_numpy(np.concatenate([near, far])).float()
    boxes = masks.boxes() + torch.from_numpy(rng.normal(0, 0.7, (len(masks), 4))).float()
    boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)], 1)
    return Instances(size, boxes, torch.from_numpy(labels), masks, torch.from_numpy(scores), points)


def data_set(images=12, seed=0, *, keypoints=None, ids=None, most=14, **options):
    rng = np.random.default_rng(seed)
    counts = [0 if i % 5 == 4 else int(rng.integers(1, most)) for i in range(images)]
    sizes = [(96, 128) if i % 2 else (120, 90) for i in range(images)]
    targets = [truth(rng, c, s, keypoints=keypoints, **options) for c, s in zip(counts, sizes, strict=True)]
    return Ellipses(targets, ids or list(range(100, 100 + images)))


def predictions(data, seed=1, ties=False):
    """One per image; every seventh image has none."""
    rng = np.random.default_rng(seed)
    made = [disturbed(t, rng, ties=ties) for t in data.images]
    return [m[:0] if i % 7 == 3 else m for i, m in enumerate(made)]
