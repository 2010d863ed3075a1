"""A system without learned parameters whose objects are the pixels of one colour, for images with many objects."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskwright.structures import Instances, Masks
from tests.inference.painted import Painted


class Coded(Painted):
    """Object k has the colour k as a number of 24 bits, red first; 0 is background. Its label is k % 2."""

    def decode(self, raw, placements, *, score_threshold: float = 0.05, detections: int = 100_000) -> list[Instances]:
        found = []
        for image, placement in zip(raw.images, placements, strict=True):
            height, width = placement.size
            found.append(found_in(image[:, :height, :width].round().to(torch.uint8)))
        return found


def found_in(image: Tensor) -> Instances:
    """The objects of a coded image (3, H, W)."""
    red, green, blue = (band.astype(np.int64) for band in image.numpy())
    plane = red << 16 | green << 8 | blue
    height, width = plane.shape
    y, x = np.nonzero(plane)
    codes, places = np.unique(plane[y, x], return_inverse=True)
    order = np.argsort(places, kind="stable")
    cuts = np.cumsum(np.bincount(places, minlength=len(codes)))[:-1]
    crops, corners = [], []
    for own in np.split(order, cuts) if len(codes) else []:
        top, left = y[own].min(), x[own].min()
        crop = np.zeros((y[own].max() - top + 1, x[own].max() - left + 1), bool)
        crop[y[own] - top, x[own] - left] = True
        crops.append(crop)
        corners.append([left, top])
    masks = Masks.from_crops(crops, torch.tensor(corners, dtype=torch.int64).reshape(-1, 2), (height, width))
    labels = torch.from_numpy(codes % 2)
    scores = torch.from_numpy((1 - codes % 101 / 200).astype(np.float32))
    return Instances((height, width), masks.boxes(), labels, masks, scores)


def coded(plane: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) of a plane of object numbers."""
    return np.stack([plane >> 16 & 255, plane >> 8 & 255, plane & 255], -1).astype(np.uint8)


def packed(size: tuple[int, int], step: int, radius: int) -> np.ndarray:
    """A plane of numbered discs on a regular grid; they touch if step is twice the radius."""
    y, x = np.mgrid[: size[0], : size[1]]
    inside = (y % step - step // 2) ** 2 + (x % step - step // 2) ** 2 < radius**2
    return np.where(inside, y // step * (size[1] // step + 1) + x // step + 1, 0)
