"""FCOS (arXiv 1904.01355; improved, 2006.09214): every place of a pyramid is one sample.

It is positive where it lies near the middle of an object whose size suits the level; it then regresses four distances
and how central it is. No anchors, no proposals. What several systems share is here: the places, the towers, who answers
for what. Each system has outputs, losses and a way to choose of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, DeformConvNorm
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_sum

STRIDES = (8, 16, 32, 64, 128)
# The largest of the four distances decides the level; both ends belong to it.
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))


def tower(channels: int, convs: int = 4, *, bias: bool = True, deformable: bool = False) -> nn.Sequential:
    """3 x 3 convolutions with group norm and ReLU; `deformable`: each of them, modulated and with a bias."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        if deformable:
            layers.append(DeformConvNorm(channels, channels, modulated=True, norm="group", bias=True, relu=True))
        else:
            layers.append(ConvNorm(channels, channels, 3, norm="group", relu=True, bias=bias))
    for layer in layers:
        nn.init.normal_(layer.conv.weight if isinstance(layer, ConvNorm) else layer.weight, std=0.01)  # pyright: ignore
    return nn.Sequential(*layers)


def output_conv(channels: int, outputs: int, bias: float = 0.0) -> nn.Conv2d:
    """A last 3 x 3 convolution with the initial values all of them have (normal 0.01)."""
    layer = nn.Conv2d(channels, outputs, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)  # pyright: ignore[reportArgumentType]
    return layer


def locations(features: Sequence[Tensor], strides: Sequence[int] = STRIDES) -> list[Float[Tensor, "_n 2"]]:
    """The places x, y of each level in the input's pixels, row by row: j * stride + stride // 2."""
    result = []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[-2:]
        y = torch.arange(height, device=feature.device, dtype=torch.float32) * stride + stride // 2
        x = torch.arange(width, device=feature.device, dtype=torch.float32) * stride + stride // 2
        result.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], 1))
    return result


def per_location(places: Sequence[Tensor], values: Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """A value (or row) of each level, repeated for each of its places."""
    counts = torch.tensor([len(p) for p in places], device=places[0].device)
    table = torch.tensor(values, device=places[0].device, dtype=torch.float32)
    return table.repeat_interleave(counts, 0)


@torch.no_grad()
def assign(
    places: Float[Tensor, "n 2"],
    strides: Float[Tensor, " n"],
    ranges: Float[Tensor, "n 2"],
    boxes: Float[Tensor, "g 4"],
    *,
    centres: Float[Tensor, "g 2"] | None = None,
    radius: float | None = 1.5,
    allowed: Bool[Tensor, "n g"] | None = None,
    plus_one: bool = False,
    at_once: int = 128,
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 4"]]:
    """For each place the object it answers for (-1: none) and its distances l, t, r, b to that object's box.

    An object's places lie strictly inside its box and, with `radius`, inside a square of half side radius * stride
    around its centre (of the box, or `centres`); the largest distance lies in the place's range. Of several objects
    the one of the smallest area is taken, the first of equal ones.

    allowed    further places to leave out, for each object
    plus_one   areas count sides as x1 - x0 + 1
    at_once    objects looked at together: bounds the memory at 24 N `at_once` bytes
    """
    count = len(places)
    owner = torch.full((count,), -1, dtype=torch.int64, device=places.device)
    smallest = torch.full((count,), torch.inf, device=places.device)
    if not len(boxes):
        return owner, places.new_zeros(count, 4)
    last = 1.0 if plus_one else 0.0
    sides = boxes[:, 2:] - boxes[:, :2] + last
    areas = sides[:, 0] * sides[:, 1]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 if centres is None else centres
    for first in range(0, len(boxes), at_once):
        rows = slice(first, first + at_once)
        inner = distances(places[:, None], boxes[None, rows])  # (N, g, 4)
        if radius is None:
            good = inner.amin(-1) > 0
        else:
            reach = (strides * radius)[:, None, None]
            low = torch.maximum(middle[None, rows] - reach, boxes[None, rows, :2])
            high = torch.minimum(middle[None, rows] + reach, boxes[None, rows, 2:])
            good = ((places[:, None] > low) & (places[:, None] < high)).all(-1)
        largest = inner.amax(-1)
        good &= (largest >= ranges[:, :1]) & (largest <= ranges[:, 1:])
        if allowed is not None:
            good &= allowed[:, rows]
        area, nearest = torch.where(good, areas[None, rows], torch.inf).min(1)
        better = area < smallest
        owner = torch.where(better, nearest + first, owner)
        smallest = torch.where(better, area, smallest)
    return owner, distances(places, boxes[owner.clamp(min=0)])


def distances(places: Float[Tensor, "*n 2"], boxes: Float[Tensor, "*m 4"]) -> Float[Tensor, "*k 4"]:
    """l, t, r, b from each place to the sides of its box; negative outside."""
    return torch.cat([places - boxes[..., :2], boxes[..., 2:] - places], -1)


def boxes_of(places: Float[Tensor, "*n 2"], inner: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The boxes that lie l, t, r, b around each place."""
    return torch.cat([places - inner[..., :2], places + inner[..., 2:]], -1)


def centerness(inner: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (eq. 3): 1 in the middle, 0 at the border."""
    across, down = inner[..., 0::2], inner[..., 1::2]
    return (across.amin(-1) / across.amax(-1) * (down.amin(-1) / down.amax(-1))).clamp(min=0).sqrt()


def overlap(
    inner: Float[Tensor, "*n 4"], other: Float[Tensor, "*n 4"], *, generalised: bool = False, smooth: float = 0.0
) -> Float[Tensor, "*n"]:
    """IoU of two boxes that lie l, t, r, b around the same place; `generalised`: GIoU (arXiv 1902.09630), less the
    share of the hull that neither covers.

    smooth  added to intersection and union: 1 in FCOS and what descends from it, whatever the distances' unit
    """
    both, hull = torch.minimum(inner, other), torch.maximum(inner, other)
    shared = (both[..., 0] + both[..., 2]) * (both[..., 1] + both[..., 3])
    areas = [(d[..., 0] + d[..., 2]) * (d[..., 1] + d[..., 3]) for d in (inner, other, hull)]
    union = areas[0] + areas[1] - shared
    iou = (shared + smooth) / (union + smooth)
    return iou - (areas[2] - union) / (areas[2] + 1e-7) if generalised else iou


def place_losses(
    logits: Float[Tensor, "b n k"],
    said: Float[Tensor, "b n 4"],
    central: Float[Tensor, "b n"],
    positive: Bool[Tensor, "b n"],
    labels: Int[Tensor, " p"],
    goal: Float[Tensor, "b n 4"],
    *,
    smooth: float = 1.0,
) -> dict[str, Tensor]:
    """`class` (focal), `box` (GIoU, weighted by how central a place is) and `centerness` (cross entropy), as the
    improved FCOS learns them: per positive place, the boxes per sum of the weights, counted over all devices.

    said, goal  distances as predicted and as they should be, in units of the stride
    labels      of the P positive places, image by image
    smooth      added to intersection and union: see `overlap`
    """
    image, place = positive.nonzero().unbind(1)
    kinds = torch.zeros_like(logits)
    kinds[image, place, labels] = 1
    said, goal = said[image, place], goal[image, place]
    middle = centerness(goal)
    count, weight = global_mean_count(positive.sum()), global_mean_count(middle.sum(), 1e-6)
    apart = 1 - overlap(said, goal, generalised=True, smooth=smooth)
    unsure = functional.binary_cross_entropy_with_logits(central[image, place], middle, reduction="sum")
    return {
        "class": focal_sum(logits, kinds) / count,
        "box": (apart * middle).sum() / weight,
        "centerness": unsure / count,
    }


class Scale(nn.Module):
    """One learnt factor."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
