"""A system without learned parameters for painted images, whose objects it predicts exactly.

Red is the object's number, green its label, blue 255 on objects; everything else is black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from maskwright.structures import Instances, Masks, Preprocess
from maskwright.systems import Card, System


@dataclass(frozen=True)
class AsItIs(Preprocess):
    """No resizing; values stay in 0 ... 255."""

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    divide: float = 1.0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


@dataclass(frozen=True)
class Raw:
    images: Tensor


class Dense(nn.Module):
    """Passes images through."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Raw:
        return Raw(images * self.scale)


class Painted(System):
    name = "painted"
    card = Card("Painted", "none", "0000.00000", "here", "Apache-2.0")

    def __init__(self, classes: tuple[str, ...] = ("cat", "dog"), *, masks: bool = True):
        super().__init__()
        self.classes, self.masks = tuple(classes), masks
        self.preprocess = AsItIs(multiple=16)
        self.dense = Dense()
        self.batches: list[int] = []

    @property
    def outputs(self):
        return frozenset({"boxes", "masks"} if self.masks else {"boxes"})

    def forward(self, images: Tensor) -> Raw:
        self.batches.append(len(images))
        return self.dense(images)

    def losses(self, raw, targets):
        return {"none": raw.images.sum() * 0}

    def decode(self, raw, placements, *, score_threshold: float = 0.05, detections: int = 100) -> list[Instances]:
        found = []
        for image, placement in zip(raw.images, placements, strict=True):
            height, width = placement.size
            found.append(
                seen(image[:, :height, :width].round().to(torch.uint8), self.masks, score_threshold)[:detections]
            )
        return found


def seen(image: Tensor, masks: bool = True, score_threshold: float = 0.0) -> Instances:
    """The painted objects of an image (3, H, W), best first; object k scores 1 - k / 300."""
    numbers = image[0].unique()
    numbers = [n for n in numbers.tolist() if (image[2][image[0] == n] == 255).any()]
    planes = torch.stack(
        [(image[0] == n) & (image[2] == 255) for n in numbers] or [torch.zeros(image.shape[1:]).bool()]
    )
    planes = planes[: len(numbers)]
    packed = Masks.from_dense(planes).pack()
    labels = torch.tensor([int(image[1][p][0]) for p in planes], dtype=torch.int64)
    scores = torch.tensor([1 - n / 300 for n in numbers], dtype=torch.float32)
    size = (image.shape[1], image.shape[2])
    found = Instances(size, packed.boxes(), labels, packed if masks else None, scores)
    return found[scores >= score_threshold]


def paint(numbers: Tensor, labels: dict[int, int] | None = None) -> Tensor:
    """An image (3, H, W) from a plane of object numbers, -1 for background."""
    inside = numbers >= 0
    green = torch.zeros_like(numbers)
    for number, label in (labels or {}).items():
        green[numbers == number] = label
    return torch.stack([numbers.clamp(min=0), green * inside, inside * 255]).to(torch.uint8)


def blocks(count: int, size: tuple[int, int] = (40, 60)) -> Tensor:
    """An image with `count` blocks; block k is of class k % 2."""
    numbers = torch.full(size, -1)
    across = math.ceil(math.sqrt(max(count, 1)))
    for k in range(count):
        y, x = k // across * (size[0] // across), k % across * (size[1] // across)
        numbers[y + 1 : y + size[0] // across - 1, x + 1 : x + size[1] // across - 2] = k
    return paint(numbers, {k: k % 2 for k in range(count)})


def save(image: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path
