"""The image in a graph: resizing into the network's input by matrices, and the way back for boxes and masks.

Everything is computed from the size of the image inside of the graph, so that images of any size can be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.ops.interpolation import cubic_weights
from maskwright.structures import Preprocess


@dataclass(frozen=True)
class Placed:
    """An image in the input: `input = image * scale + offset`, with numbers that the graph computes.

    Attributes:
        image: Height and width of the image.
        valid: Height and width of the part of the input that the image fills.
        scale: Factors of x and y.
        offset: Shift in x and y.
        canvas: Height and width of the input.
    """

    image: Tensor
    valid: Tensor
    scale: Tensor
    offset: Tensor
    canvas: tuple[int, int]

    def boxes_to_image(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes of the input as boxes of the image, clipped to it."""
        boxes = (boxes - self.offset.repeat(2)) / self.scale.repeat(2)
        return boxes.clamp(min=0).minimum(self.image.flip(0).repeat(2))


def canvas_of(preprocess: Preprocess, size: tuple[int, int]) -> tuple[int, int]:
    """The size of the input for images of `size`, padding included."""
    return preprocess.padded_size(*size)


def placed_in(height: Tensor, width: Tensor, preprocess: Preprocess, canvas: tuple[int, int]) -> Placed:
    """Where an image of a size lies in the network's input; see `place`.

    Args:
        height: A number of the graph.
        width: A number of the graph.
        preprocess: The rule.
        canvas: Height and width of the input.
    """
    size = torch.stack([height, width])
    full = torch.tensor(canvas, dtype=torch.float32)
    if preprocess.fit == "stretch":
        valid = full
    else:
        factor = torch.minimum(canvas[0] / height, canvas[1] / width)
        if preprocess.fit == "short":
            rule = torch.minimum(
                preprocess.short / torch.minimum(height, width), preprocess.long / torch.maximum(height, width)
            )
            factor = torch.minimum(factor, rule)
        elif preprocess.fit in ("own", "pad"):
            factor = factor.clamp(max=1.0)
        floored = preprocess.fit == "short" and preprocess.sizes in ("floored", "benchmark")
        floored = floored or (
            preprocess.fit == "short" and preprocess.sizes is None and preprocess.resample == "tensor"
        )
        # A thousandth of a pixel, because a factor that was divided and multiplied may end just below an integer.
        rounded = (size * factor + (1e-3 if floored else 0.5)).floor()
        valid = rounded.clamp(min=1).minimum(full)
    centred = preprocess.fit in ("letterbox", "pad") and not preprocess.corner
    start = ((full - valid) / 2).floor() if centred else torch.zeros(2)
    return Placed(size, valid, (valid / size).flip(0), start.flip(0), canvas)


def place(
    image: UInt8[Tensor, "h w c"], preprocess: Preprocess, canvas: tuple[int, int]
) -> tuple[Float[Tensor, "1 c _h _w"], Placed]:
    """Resizes, pads and normalises an image by the rule of a system.

    An image that would be larger than the canvas is made smaller, keeping its aspect ratio.

    Args:
        image: RGB, or grey.
        preprocess: The rule.
        canvas: Height and width of the result.
    """
    height, width = (torch.scalar_tensor(image.shape[axis], dtype=torch.float32) for axis in (0, 1))
    placed = placed_in(height, width, preprocess, canvas)
    valid, start = placed.valid, placed.offset.flip(0)
    down = _resizing(canvas[0], image.shape[0], height, valid[0], start[0], preprocess.resample)
    across = _resizing(canvas[1], image.shape[1], width, valid[1], start[1], preprocess.resample)
    values = image.permute(2, 0, 1).float() @ across.T
    stored = preprocess.resample in ("pillow", "bicubic")
    if stored:
        values = (values + 0.5).floor().clamp(0, 255)  # Pillow stores 8 bits after each axis, halves rounded up
    values = down @ values
    if stored:
        values = (values + 0.5).floor().clamp(0, 255)
    elif preprocess.resample == "opencv":
        values = values.round().clamp(0, 255)
    filled = (down.sum(1) > 0).float()[:, None] * (across.sum(1) > 0).float()
    values = _normalised(values, preprocess)
    if preprocess.fit not in ("letterbox", "pad"):  # these are padded with black, the others with the mean
        values = values * filled
    return values[None], placed


def _normalised(values: Tensor, preprocess: Preprocess) -> Tensor:
    if preprocess.channels == "BGR" and len(preprocess.mean) >= 3:
        values = torch.cat([values[:3].flip(0), values[3:]])
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (values / preprocess.divide - mean) / std


def _resizing(
    outputs: int, inputs: Any, length: Tensor, valid: Tensor, start: Tensor, resample: str
) -> Float[Tensor, "o _i"]:
    """The weight of each pixel of the image for each pixel of the input along one axis; zeros for padding."""
    pixel = torch.arange(outputs, dtype=torch.float32) - start
    cells = torch.arange(inputs, dtype=torch.float32)
    scale = length / valid
    if resample in ("pillow", "antialias", "bicubic"):
        centre, reach = (pixel + 0.5) * scale, scale.clamp(min=1)
        apart = ((cells + 0.5) - centre[:, None]).abs() / reach
        weights = (1 - apart).clamp(min=0)
        if resample == "bicubic":
            near = (1.5 * apart - 2.5) * apart * apart + 1
            far = ((-0.5 * apart + 2.5) * apart - 4) * apart + 2
            weights = torch.where(apart < 1, near, torch.where(apart < 2, far, 0.0))
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    else:
        place = ((pixel + 0.5) * scale - 0.5).clamp(min=0).minimum(length - 1)
        weights = (1 - (place[:, None] - cells).abs()).clamp(min=0)
    inside = (pixel >= 0) & (pixel < valid)
    return weights * inside[:, None]


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The pixels that masks are computed for: those of the input, or those of the image.

    Attributes:
        size: Height and width; symbols where the image decides.
        placed: How these pixels lie in the input; None for those of the input itself.
        valid: Height and width of the part of the input that the image fills.
        canvas: Height and width of the input.
    """

    size: tuple[Any, Any]
    placed: Placed | None
    valid: Tensor
    canvas: tuple[int, int]

    def boxes(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes of the input in these pixels."""
        if self.placed is not None:
            return self.placed.boxes_to_image(boxes)
        return boxes.clamp(min=0).minimum(self.valid.flip(0).repeat(2))

    def resize(self, planes: Float[Tensor, "n p q"], steps: int = 2, cubic: bool = False) -> Float[Tensor, "n h w"]:
        """Resizes planes that cover the input, as `ops.planes.place_planes` does."""
        down, across = (self.axis(planes.shape[axis + 1], axis, steps, cubic) for axis in (0, 1))
        return down @ planes @ across.T

    def axis(self, cells: int, axis: int, steps: int = 2, cubic: bool = False) -> Float[Tensor, "_h p"]:
        """The weights of the cells of planes along one axis."""
        pixels = torch.arange(self.size[axis], dtype=torch.float32) + 0.5
        padded = self.canvas[axis]
        if self.placed is not None:
            pixels = pixels * self.placed.scale[1 - axis] + self.placed.offset[1 - axis]
        place, limit = pixels - 0.5, self.valid[axis]
        seen = (place > -0.5) & (place < limit - 0.5)
        if cubic:
            return cubic_weights((place + 0.5) * (cells / padded) - 0.5, cells) * seen[:, None]
        if steps == 1:
            return _weights((place + 0.5) * (cells / padded) - 0.5, cells) * seen[:, None]
        onto_input = _weights((torch.arange(padded, dtype=torch.float32) + 0.5) * (cells / padded) - 0.5, cells)
        place = place.clamp(min=0).minimum(limit - 1)
        first = place.floor()
        second = torch.minimum(first + 1, limit - 1)
        low, high = onto_input[first.long()], onto_input[second.long()]
        return torch.lerp(low, high, (place - first)[:, None]) * seen[:, None]

    def nearest(self, planes: Tensor) -> Tensor:
        """Planes of the input, of which each of these pixels reads one, as `ops.planes.place_bits`."""
        if self.placed is None:
            return planes
        rows, columns = (
            (torch.arange(self.size[axis], dtype=torch.float32) * self.placed.scale[1 - axis] + 1e-4)
            .add(self.placed.offset[1 - axis]).floor().long().clamp(0, self.canvas[axis] - 1)
            for axis in (0, 1)
        )  # fmt: skip
        return planes[:, rows][:, :, columns]


def _weights(positions: Tensor, cells: int) -> Tensor:
    positions = positions.clamp(0, cells - 1)
    return (1 - (positions[:, None] - torch.arange(cells, dtype=torch.float32)).abs()).clamp(min=0)
