"""A batch: images on one grid, their placements, and the training targets."""

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
    """B preprocessed images.

    Attributes:
        images: (B, C, H, W), normalized, padded at the right and at the bottom.
        placements: How each image is placed in the input.
        targets: Objects of each image in the frame of the input (`target.image_size == placement.size`); None without
            annotations.
        names: Name of each image, for messages.
    """

    images: Float[Tensor, "b c h w"]
    placements: list[Placement]
    targets: list[Instances] | None = None
    names: list[str] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.placements)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the tensors to `device`; `non_blocking` copies images in pinned memory asynchronously."""
        targets = None if self.targets is None else [t.to(device) for t in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Batch:
        """Copy the images to pinned memory."""
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
        """Make a batch of images of different sizes.

        Args:
            images: (C, h, w) each; placed at the upper left.
            placements: How each image is placed.
            targets: Objects of each image; None without annotations.
            names: Name of each image.
            multiple: The common height and width are rounded up to a multiple of this.
            value: Value of the padding.

        Returns:
            The batch.
        """
        height = _round_up(max(i.shape[-2] for i in images), multiple)
        width = _round_up(max(i.shape[-1] for i in images), multiple)
        grid = images[0].new_full((len(images), images[0].shape[0], height, width), value)
        for plane, image in zip(grid, images, strict=True):
            plane[:, : image.shape[-2], : image.shape[-1]] = image
        return cls(
            grid, list(placements), None if targets is None else list(targets), None if names is None else list(names)
        )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
