"""The image in a graph: resizing into the network's input by matrices, and the way back for boxes and masks.

Everything is computed from the size of the image inside of the graph, so that images of any size can be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from maskwright.ops.interpolation import cubic_weights
from maskwright.structures import Preprocess


@dataclass(frozen=True)
class Placed:
    """An image in the input: `input = image * scale + offset`, with numbers that the graph computes.

    Attributes:
        image: Height and width of the image.
        valid: Height and width of the part of the input that decoding regards as the image: all of a canvas that the
            image is pasted on, as in `Placement`.
        scale: Factors of x and y.
        offset: Shift in x and y.
        canvas: Height and width of the input.
        filled: Height and width of the part of the input that the image fills.
    """

    image: Tensor
    valid: Tensor
    scale: Tensor
    offset: Tensor
    canvas: tuple[int, int]
    filled: Tensor

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
    size, full = torch.stack([height, width]), torch.tensor(canvas, dtype=torch.float32)
    if preprocess.fit == "stretch":
        valid = full
    else:
        # In float64, in which `Preprocess.size` computes, because a product may end just below an integer.
        own, most = size.double(), full.double()
        inside = (own * (most / own).min() + 0.5).floor()
        by_rule = inside if preprocess.fit in ("inside", "letterbox") else _ruled(own, preprocess)
        valid = torch.where((by_rule <= most).all(), by_rule, inside).clamp(min=1).minimum(most).float()
    centred = preprocess.fit in ("letterbox", "pad") and not preprocess.corner
    start = ((full - valid) / 2).floor() if centred else torch.zeros(2)
    seen = full if preprocess.fit in ("letterbox", "pad") else valid
    return Placed(size, seen, (valid / size).flip(0), start.flip(0), canvas, valid)


def _ruled(size: Float[Tensor, " 2"], preprocess: Preprocess) -> Float[Tensor, " 2"]:
    """The size that an image is resized to, as `Preprocess.size` computes it, if the canvas does not limit it."""
    if preprocess.fit != "short":
        return size
    low, high = size.min(), size.max()
    # As tensors, because a number divided by a tensor is multiplied with its reciprocal.
    short, long = (torch.tensor(side, dtype=torch.float64) for side in (preprocess.short, preprocess.long))
    rule = preprocess.sizes or ("floored" if preprocess.resample == "tensor" else "rounded")
    if rule == "floored":
        return (size * torch.minimum(short / low, long / high)).floor()
    if rule == "benchmark":
        least = torch.where(high / low * short <= long, short, (long * low / high).round())
        least = least.clamp(min=1)
        return torch.where(size == low, least, (least * high / low).floor())
    new = torch.where(size == low, short, size * (short / low))
    return (new * (long / new.max()).clamp(max=1) + 0.5).floor()


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
    valid, start = placed.filled, placed.offset.flip(0)
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
        valid: As of `Placed`.
        canvas: Height and width of the input.
    """

    size: tuple[Any, Any]
    placed: Placed | None
    valid: Tensor
    canvas: tuple[int, int]

    @property
    def limit(self) -> Float[Tensor, " 2"]:
        """Height and width of what boxes are clipped to: the image, or the valid part of the input."""
        return self.valid if self.placed is None else self.placed.image

    def points(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Points of the input in these pixels, not clipped."""
        return points if self.placed is None else (points - self.placed.offset) / self.placed.scale

    def frames(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes of the input in these pixels, not clipped."""
        return self.points(boxes.reshape(-1, 2, 2)).flatten(1)

    def boxes(self, boxes: Float[Tensor, "n 4"], last: int = 0) -> Float[Tensor, "n 4"]:
        """Boxes of the input in these pixels, clipped; with `last` = 1 they include their last pixel."""
        return self.frames(boxes).clamp(min=0).minimum((self.limit - last).flip(0).repeat(2))

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

    def labelled(self, cells: int, axis: int) -> tuple[Float[Tensor, "_h p"], Bool[Tensor, " _h"]]:
        """The weights of cells along one axis as `ops.planes.label_plane` has them, and which pixels see the image."""
        pixels = torch.arange(self.size[axis], dtype=torch.float32) + 0.5
        if self.placed is not None:
            pixels = pixels * self.placed.scale[1 - axis] + self.placed.offset[1 - axis]
        ratio, limit = cells / self.canvas[axis], self.valid[axis]
        place = (pixels * ratio - 0.5).clamp(min=0).minimum((limit * ratio - 1).clamp(min=0))
        return _weights(place, cells), (pixels > 0) & (pixels < limit)

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
