"""A system small enough to train in a test, and a data set to train it on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.data import Sample
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances, Masks, Preprocess
from maskwright.systems import Card, System


@dataclass(frozen=True)
class Raw:
    features: Tensor
    logits: Tensor  # (B, K, h, w)


class Tiny(System):
    """Says of every pixel which classes cover it; a class is one object. Its second stage lives in `losses` alone."""

    name = "tiny"
    card = Card("Tiny", "none", "", "", "Apache-2.0")

    def __init__(self, classes: tuple[str, ...], width: int = 8, dropout: float = 0.1):
        super().__init__()
        self.classes = tuple(classes)
        self.preprocess = Preprocess(short=32, long=64, multiple=8)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
        )
        self.head = nn.Conv2d(width, len(classes), 3, padding=1)
        self.second = nn.Conv2d(width, 1, 1)  # used by losses, not by forward: as RoI heads are

    def forward(self, images: Tensor) -> Raw:
        features = self.backbone(images)
        return Raw(features, self.head(features))

    def losses(self, raw: Raw, targets: Any) -> dict[str, Tensor]:
        truth = torch.zeros_like(raw.logits)
        for plane, target in zip(truth, targets, strict=True):
            if len(target):
                height, width = target.image_size
                masks = target.masks.dense(plane.device).to(plane.dtype)
                kinds = nn.functional.one_hot(target.labels, len(plane)).to(plane.dtype)
                plane[:, :height, :width] = torch.einsum("nk,nhw->khw", kinds, masks).clamp(max=1)
        wrong = nn.functional.binary_cross_entropy_with_logits(raw.logits.float(), truth.float(), reduction="none")
        # Divided by the number of object pixels, so that an image's share depends on what the others hold.
        positive = global_mean_count(truth.sum())
        objects = torch.tensor(float(sum(map(len, targets))), device=truth.device)
        pixels = truth.amax(1, keepdim=True)
        second = (self.second(raw.features).float() - 1).square() * pixels
        per_object = second.sum((1, 2, 3)).sum() / 100 / global_mean_count(objects)
        mask = (wrong * (0.02 + truth)).sum() / positive
        return {"loss_mask": mask, "loss_second": per_object}

    def decode(self, raw: Raw, placements: Any, score_threshold: float = 0.5) -> list[Instances]:
        found = []
        for logits, placement in zip(raw.logits, placements, strict=True):
            height, width = placement.size
            planes = nn.functional.interpolate(logits[None, :, :height, :width], size=placement.image_size)[0] > 0
            labels = planes.flatten(1).any(1).nonzero()[:, 0]
            masks = Masks.from_dense(planes[labels]).pack()
            scores = torch.ones(len(labels)) * 0.9
            found.append(Instances(placement.image_size, masks.boxes(), labels.cpu(), masks, scores))
        return found


class Shapes:
    """Images of one bright rectangle of class "red" or "green" each; every `empty`-th has none."""

    name = "shapes"
    classes = ("red", "green")
    category_ids = (1, 2)
    keypoints = None
    strict = True

    def __init__(self, count: int, empty: int = 4, delay: float = 0.0, size: int = 32, seed: int = 0):
        self.count, self.empty, self.delay, self.size, self.seed = count, empty, delay, size, seed

    def __len__(self) -> int:
        return self.count

    def image_ids(self) -> list[int]:
        return list(range(100, 100 + self.count))

    def sizes(self) -> list[tuple[int, int]]:
        return [(self.size, self.size)] * self.count

    def targets(self, index: int) -> Instances:
        if self.empty and index % self.empty == self.empty - 1:
            target = Instances.empty((self.size, self.size))
            return Instances(target.image_size, target.boxes, target.labels, target.masks, crowd=torch.zeros(0).bool())
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        x, y, w, h = torch.randint(4, self.size // 2, (4,), generator=generator).tolist()
        planes = torch.zeros(1, self.size, self.size, dtype=torch.bool)
        planes[0, y : y + h, x : x + w] = True
        masks = Masks.from_dense(planes).pack()
        label = torch.tensor([index % 2])
        return Instances((self.size, self.size), masks.boxes(), label, masks, crowd=torch.zeros(1).bool())

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.delay)
        target = self.targets(index)
        generator = torch.Generator().manual_seed(7 + index)
        image = torch.randint(0, 80, (3, self.size, self.size), generator=generator, dtype=torch.uint8)
        for plane, label in zip(target.masks.dense() if target.masks else [], target.labels.tolist(), strict=True):
            image[label][plane] = 220
        return Sample(image, target, 100 + index)


def fit(out: Path, **changes: Any) -> Path:
    """A short run that shows everything: dropout, batch normalisation, accumulation, a mean of the weights."""
    import maskwright.training as training

    seed = changes.pop("system_seed", 5)
    torch.manual_seed(seed)
    system = changes.pop("system", None) or Tiny(("red", "green"))
    data = changes.pop("data") if "data" in changes else Shapes(22)
    defaults: dict[str, Any] = {
        "epochs": 2,
        "batch": 2,
        "accumulate": 2,
        "workers": 0,
        "device": "cpu",
        "warmup": 2,
        "log_every": 2,
        "save_minutes": 0,
        "tensorboard": False,
        "augment": {"flip": 0.5},
        "lr": 1e-2,
        "val": Shapes(5, seed=1),
    }
    return training.train(system, data, out=out, **{**defaults, **changes})
