"""What a network is fed: images on one grid, how each was laid there, and what is to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from maskwright.structures.instances import Instances
from maskwright.structures.placement import Placement


@dataclass
class Batch:
    """`images` (B, C, H, W), normalised and padded at the right and bottom; one placement each; targets, where there
    are any, in the frame of the network's input (`target.image_size == placement.size`); a name each for messages."""

    images: Float[Tensor, "b c h w"]
    placements: list[Placement]
    targets: list[Instances] | None = None
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.placements)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        targets = None if self.targets is None else [t.to(device) for t in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Batch:
        return replace(self, images=self.images.pin_memory())

    @classmethod
    def collate(
        cls,
        images: Sequence[Float[Tensor, "c _h _w"]],
        placements: Sequence[Placement],
        targets: Sequence[Instances] | None = None,
        names: Sequence[str] | None = None,
        multiple: int = 32,
        value: float = 0.0,
    ) -> Batch:
        """Images of different sizes at the upper left of planes as large as the largest, rounded up to `multiple`."""
        height = _up(max(i.shape[-2] for i in images), multiple)
        width = _up(max(i.shape[-1] for i in images), multiple)
        grid = images[0].new_full((len(images), images[0].shape[0], height, width), value)
        for plane, image in zip(grid, images, strict=True):
            plane[:, : image.shape[-2], : image.shape[-1]] = image
        return cls(
            grid, list(placements), None if targets is None else list(targets), None if names is None else list(names)
        )


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
