"""How an image was laid into the network's input, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """An axis-aligned map from an image's pixel grid to the network's: `input = image * scale + offset`.

    Both frames are continuous: pixel (i, j) covers [j, j + 1) x [i, i + 1). With `mirrored` the image is first
    flipped left to right. `size` is the part of the network's input that the image (or what a crop left of it)
    fills, its upper left corner at (0, 0); padding to a batch's common size lies beyond it and is no part of it.
    """

    image_size: tuple[int, int]  # H, W of the image
    size: tuple[int, int]  # h, w of the valid part of the network's input
    scale: tuple[float, float] = (1.0, 1.0)  # x, y
    offset: tuple[float, float] = (0.0, 0.0)  # x, y, in input pixels
    mirrored: bool = False

    @classmethod
    def identity(cls, size: tuple[int, int]) -> Placement:
        return cls(image_size=size, size=size)

    @classmethod
    def resize(cls, image: tuple[int, int], size: tuple[int, int]) -> Placement:
        """The whole image stretched to `size`; both as (height, width)."""
        return cls(image, size, (size[1] / image[1], size[0] / image[0]))

    def then_mirror(self) -> Placement:
        """The same placement with its result flipped left to right."""
        scale_x, scale_y = self.scale
        # Flipped: x' = w - (x s + o). Written with the image flipped first, x = W - m, that is m s + (w - o - W s).
        offset_x = self.size[1] - self.offset[0] - self.image_size[1] * scale_x
        return replace(self, mirrored=not self.mirrored, offset=(offset_x, self.offset[1]), scale=(scale_x, scale_y))

    def then_resize(self, size: tuple[int, int]) -> Placement:
        """The same placement with its result stretched to `size` (h, w)."""
        fx, fy = size[1] / self.size[1], size[0] / self.size[0]
        return replace(
            self,
            size=size,
            scale=(self.scale[0] * fx, self.scale[1] * fy),
            offset=(self.offset[0] * fx, self.offset[1] * fy),
        )

    def then_crop(self, x0: float, y0: float, size: tuple[int, int]) -> Placement:
        """The window of `size` (h, w) of the result whose corner is at (x0, y0); it may reach beyond the image."""
        return replace(self, size=size, offset=(self.offset[0] - x0, self.offset[1] - y0))

    def points_to_input(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Points x, y on the image -> on the input."""
        x, y = points.unbind(-1)
        x = self.image_size[1] - x if self.mirrored else x
        return torch.stack([x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]], -1)

    def points_to_image(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Points x, y on the input -> on the image."""
        x, y = points.unbind(-1)
        x, y = (x - self.offset[0]) / self.scale[0], (y - self.offset[1]) / self.scale[1]
        return torch.stack([self.image_size[1] - x if self.mirrored else x, y], -1)

    def boxes_to_input(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes x0, y0, x1, y1 on the image -> on the input, not clipped."""
        return self._boxes(self.points_to_input(boxes.reshape(-1, 2, 2)))

    def boxes_to_image(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes x0, y0, x1, y1 on the input -> on the image, not clipped."""
        return self._boxes(self.points_to_image(boxes.reshape(-1, 2, 2)))

    def _boxes(self, corners: Tensor) -> Tensor:
        boxes = corners.reshape(-1, 4)
        return boxes[:, [2, 1, 0, 3]] if self.mirrored else boxes
