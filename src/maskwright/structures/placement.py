"""How an image is placed in the network's input, and the inverse."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """An axis-aligned map from the pixel grid of an image to that of the network: `input = image * scale + offset`.

    Both frames are continuous: pixel (i, j) covers [j, j + 1) x [i, i + 1).

    Attributes:
        image_size: H, W of the image.
        size: h, w of the part of the input that the image, or a crop of it, fills. Its upper left corner is at (0, 0);
            the padding of a batch is not part of it.
        scale: Factors for x and y.
        offset: Shift in x and y, in input pixels.
        mirrored: Whether the image is flipped left to right first.
    """

    image_size: tuple[int, int]
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False

    @classmethod
    def identity(cls, size: tuple[int, int]) -> Placement:
        """Return the placement that changes nothing, of an image of `size` (H, W)."""
        return cls(image_size=size, size=size)

    @classmethod
    def resize(cls, image: tuple[int, int], size: tuple[int, int]) -> Placement:
        """Return the placement that resizes an image to `size`; both are (height, width)."""
        return cls(image, size, (size[1] / image[1], size[0] / image[0]))

    def then_mirror(self) -> Placement:
        """Return this placement followed by a left-right flip."""
        scale_x, scale_y = self.scale
        # x' = w - (x s + o); in terms of the flipped image, m = W - x: x' = m s + (w - o - W s).
        offset_x = self.size[1] - self.offset[0] - self.image_size[1] * scale_x
        return replace(self, mirrored=not self.mirrored, offset=(offset_x, self.offset[1]), scale=(scale_x, scale_y))

    def then_resize(self, size: tuple[int, int]) -> Placement:
        """Return this placement followed by a resize to `size` (h, w)."""
        fx, fy = size[1] / self.size[1], size[0] / self.size[0]
        return replace(
            self,
            size=size,
            scale=(self.scale[0] * fx, self.scale[1] * fy),
            offset=(self.offset[0] * fx, self.offset[1] * fy),
        )

    def then_crop(self, x0: float, y0: float, size: tuple[int, int]) -> Placement:
        """Return this placement followed by a crop.

        Args:
            x0: Left edge of the crop in the input.
            y0: Upper edge of the crop in the input.
            size: h, w of the crop, which may extend beyond the image.
        """
        return replace(self, size=size, offset=(self.offset[0] - x0, self.offset[1] - y0))

    def points_to_input(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Map points x, y from the image to the input."""
        x, y = points.unbind(-1)
        x = self.image_size[1] - x if self.mirrored else x
        return torch.stack([x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]], -1)

    def points_to_image(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Map points x, y from the input to the image."""
        x, y = points.unbind(-1)
        x, y = (x - self.offset[0]) / self.scale[0], (y - self.offset[1]) / self.scale[1]
        return torch.stack([self.image_size[1] - x if self.mirrored else x, y], -1)

    def boxes_to_input(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Map boxes x0, y0, x1, y1 from the image to the input, without clipping."""
        return self._boxes(self.points_to_input(boxes.reshape(-1, 2, 2)))

    def boxes_to_image(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Map boxes x0, y0, x1, y1 from the input to the image, without clipping."""
        return self._boxes(self.points_to_image(boxes.reshape(-1, 2, 2)))

    def _boxes(self, corners: Tensor) -> Tensor:
        boxes = corners.reshape(-1, 4)
        return boxes[:, [2, 1, 0, 3]] if self.mirrored else boxes
