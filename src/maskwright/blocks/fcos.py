"""FCOS (arXiv 1904.01355; improved, 2006.09214): dense detection without anchors, as parts for several systems.

Every location of a feature pyramid is one sample. It is positive if it lies near the centre of an object whose size
suits the level; it then regresses the distances to the four sides of the object's box and its centerness. Shared here
are the locations, the towers of the heads, the assignment and the losses. Each system has outputs and decoding of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, DeformConvNorm, Norm, make_norm
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_sum

STRIDES = (8, 16, 32, 64, 128)
# Distances to the sides of a box when training starts, in strides. Published code starts at 0, where the ReLU has no
# gradient at about half of the locations, or at one pixel; a few hundred steps may not suffice to get away from there.
START = 2.0
# Range of the largest of the four distances on each level, in pixels; both ends are included.
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))


# ---- networks --------------------------------------------------------------------------------------------------------


def tower(
    channels: int, convs: int = 4, *, bias: bool = True, deformable: bool | Literal["none", "last", "all"] = False,
    norm: Norm = "group",
) -> nn.Sequential:  # fmt: skip
    """3 x 3 convolutions with normalisation and ReLU, initialised as FCOS does (normal, 0.01).

    Args:
        channels: Input and output channels.
        convs: Number of convolutions.
        bias: Whether they have a bias.
        deformable: Which are modulated deformable convolutions: none (False), the last one, all (True).
        norm: The normalisation.
    """
    layers: list[nn.Module] = []
    for number in range(convs):
        if deformable in (True, "all") or (deformable == "last" and number == convs - 1):
            layer = DeformConvNorm(channels, channels, modulated=True, norm=norm, bias=bias, relu=True)
            nn.init.normal_(layer.weight, std=0.01)
        else:
            layer = ConvNorm(channels, channels, 3, norm=norm, relu=True, bias=bias)
            nn.init.normal_(layer.conv.weight, std=0.01)
        layers.append(layer)
    return nn.Sequential(*layers)


class LevelTower(nn.Module):
    """A tower whose convolutions are shared by the levels, with a batch normalisation for each level.

    Args:
        channels: Input and output channels.
        convs: Number of convolutions.
        levels: Number of levels.
    """

    def __init__(self, channels: int, convs: int, levels: int):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(convs):
            layer = nn.Conv2d(channels, channels, 3, padding=1)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            self.convs.append(layer)
            self.norms.append(nn.ModuleList(make_norm("batch", channels) for _ in range(levels)))

    def forward(self, x: Float[Tensor, "b c h w"], level: int) -> Float[Tensor, "b c h w"]:
        """Applies the tower to the map of a level."""
        for conv, norms in zip(self.convs, self.norms, strict=True):
            assert isinstance(norms, nn.ModuleList)
            x = functional.relu(norms[level](conv(x)), inplace=True)
        return x


def output_conv(channels: int, outputs: int, bias: float | Float[Tensor, " c"] = 0.0) -> nn.Conv2d:
    """The last 3 x 3 convolution of a head, initialised as FCOS does (normal, 0.01).

    Args:
        channels: Input channels.
        outputs: Output channels.
        bias: Initial bias, of all channels or of each.
    """
    layer = nn.Conv2d(channels, outputs, 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.copy_(torch.as_tensor(bias))
    return layer


class Scale(nn.Module):
    """A learned factor: one for each level makes a head's outputs comparable between levels."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input times the factor."""
        return x * self.scale


# ---- locations -------------------------------------------------------------------------------------------------------


def locations(features: Sequence[Tensor], strides: Sequence[int] = STRIDES) -> list[Float[Tensor, "_n 2"]]:
    """The locations x, y of each level in pixels of the input, row by row: j * stride + stride // 2.

    Args:
        features: Maps of the levels (..., H, W), of which only the sizes are read.
        strides: Strides of the levels.
    """
    result: list[Tensor] = []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[-2:]
        y = torch.arange(height, device=feature.device, dtype=torch.float32) * stride + stride // 2
        x = torch.arange(width, device=feature.device, dtype=torch.float32) * stride + stride // 2
        result.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], 1))
    return result


def per_location(levels: Sequence[Tensor], values: Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """Repeats a value (or row) of each level for each of its locations.

    Args:
        levels: What `locations` returned.
        values: One entry for each level.
    """
    counts = torch.tensor([len(level) for level in levels], device=levels[0].device)
    table = torch.tensor(values, device=levels[0].device, dtype=torch.float32)
    return table.repeat_interleave(counts, 0)


def distances(points: Float[Tensor, "*n 2"], boxes: Float[Tensor, "*m 4"]) -> Float[Tensor, "*k 4"]:
    """Distances l, t, r, b from each location to the sides of its box; negative outside of the box."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def boxes_from_distances(points: Float[Tensor, "*n 2"], inner: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The boxes x0, y0, x1, y1 whose sides lie at distances l, t, r, b from each location."""
    return torch.cat([points - inner[..., :2], points + inner[..., 2:]], -1)


def centerness(inner: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (eq. 3): 1 at the centre of a box, 0 at its border."""
    across, down = inner[..., 0::2], inner[..., 1::2]
    return (across.amin(-1) / across.amax(-1) * (down.amin(-1) / down.amax(-1))).clamp(min=0).sqrt()


# ---- assignment and losses -------------------------------------------------------------------------------------------


@torch.no_grad()
def assign(
    points: Float[Tensor, "n 2"],
    strides: Float[Tensor, " n"],
    ranges: Float[Tensor, "n 2"],
    boxes: Float[Tensor, "g 4"],
    *,
    centres: Float[Tensor, "g 2"] | None = None,
    radius: float | None = 1.5,
    allowed: Bool[Tensor, "n g"] | None = None,
    plus_one: bool = False,
    inclusive: bool = True,
    at_once: int = 128,
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 4"]]:
    """Assigns locations to objects (section 3.1; centre sampling: arXiv 2006.09214).

    A location is a candidate for an object if it lies strictly inside its box and, with `radius`, inside a square
    around its centre, and if the largest distance is in the location's range. Of several objects the one of the
    smallest area is chosen, the first of equal ones.

    Args:
        points: Locations x, y of all levels, in pixels.
        strides: Stride of each location.
        ranges: Smallest and largest distance that each location regresses.
        boxes: Boxes of the objects.
        centres: Centres of the squares; default those of the boxes.
        radius: Half the side of the square, in strides; None for the whole box.
        allowed: Which locations are allowed for each object; default all.
        plus_one: Whether areas have sides x1 - x0 + 1.
        inclusive: Whether the ends of a range belong to it.
        at_once: Number of objects processed together; bounds the memory to 24 N `at_once` bytes.

    Returns:
        For each location the index of its object, or -1, and its distances l, t, r, b to that object's box.
    """
    count = len(points)
    owner = torch.full((count,), -1, dtype=torch.int64, device=points.device)
    smallest = torch.full((count,), torch.inf, device=points.device)
    if not len(boxes):
        return owner, points.new_zeros(count, 4)
    last = 1.0 if plus_one else 0.0
    sides = boxes[:, 2:] - boxes[:, :2] + last
    areas = sides[:, 0] * sides[:, 1]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 if centres is None else centres
    for first in range(0, len(boxes), at_once):
        rows = slice(first, first + at_once)
        inner = distances(points[:, None], boxes[None, rows])  # (N, g, 4)
        if radius is None:
            good = inner.amin(-1) > 0
        else:
            reach = (strides * radius)[:, None, None]
            low = torch.maximum(middle[None, rows] - reach, boxes[None, rows, :2])
            high = torch.minimum(middle[None, rows] + reach, boxes[None, rows, 2:])
            good = ((points[:, None] > low) & (points[:, None] < high)).all(-1)
        largest = inner.amax(-1)
        if inclusive:
            good &= (largest >= ranges[:, :1]) & (largest <= ranges[:, 1:])
        else:
            good &= (largest > ranges[:, :1]) & (largest < ranges[:, 1:])
        if allowed is not None:
            good &= allowed[:, rows]
        area, nearest = torch.where(good, areas[None, rows], torch.inf).min(1)
        better = area < smallest
        owner = torch.where(better, nearest + first, owner)
        smallest = torch.where(better, area, smallest)
    return owner, distances(points, boxes[owner.clamp(min=0)])


def overlap(
    inner: Float[Tensor, "*n 4"], other: Float[Tensor, "*n 4"], *, generalised: bool = False, smooth: float = 0.0
) -> Float[Tensor, "*n"]:
    """IoU of two boxes given by their distances l, t, r, b from the same location.

    Args:
        inner: Distances of one box.
        other: Distances of the other box.
        generalised: Whether to subtract the share of the enclosing box that is in neither (GIoU, arXiv 1902.09630).
        smooth: Added to intersection and union; 1 in FCOS and its descendants, whatever the unit of the distances.
    """
    both, hull = torch.minimum(inner, other), torch.maximum(inner, other)
    shared = (both[..., 0] + both[..., 2]) * (both[..., 1] + both[..., 3])
    areas = [(d[..., 0] + d[..., 2]) * (d[..., 1] + d[..., 3]) for d in (inner, other, hull)]
    union = areas[0] + areas[1] - shared
    iou = (shared + smooth) / (union + smooth)
    return iou - (areas[2] - union) / (areas[2] + 1e-7) if generalised else iou


BoxLoss = Literal["giou", "iou", "linear_iou"]


def location_losses(
    logits: Float[Tensor, "b n k"],
    predicted: Float[Tensor, "b n 4"],
    central: Float[Tensor, "b n"],
    positive: Bool[Tensor, "b n"],
    labels: Int[Tensor, " p"],
    target: Float[Tensor, "b n 4"],
    *,
    smooth: float = 1.0,
    box_loss: BoxLoss = "giou",
    quality: Literal["centerness", "iou"] = "centerness",
    weighted: bool = True,
    count: Float[Tensor, ""] | None = None,
) -> dict[str, Tensor]:
    """Losses of the improved FCOS.

    Args:
        logits: Class logits of each location.
        predicted: Predicted distances, in strides.
        central: Logits of the predicted centerness.
        positive: Which locations are positive.
        labels: Labels of the P positive locations, image by image.
        target: Target distances, in strides.
        smooth: See `overlap`.
        box_loss: "giou": 1 - GIoU. "iou": -ln IoU. "linear_iou": 1 - IoU.
        quality: Target of `central`: the centerness of the location, or the IoU of its predicted box.
        weighted: Whether the box loss is weighted by centerness and divided by the sum of the weights, instead of by
            the number of positive locations; always the latter with quality="iou".
        count: Divisor of the other terms; default the number of positive locations.

    Returns:
        `class` (focal loss), `box` and `centerness` (cross entropy); counts are those of all devices.
    """
    image, place = positive.nonzero().unbind(1)
    truth = torch.zeros_like(logits)
    truth[image, place, labels] = 1
    predicted, target = predicted[image, place], target[image, place]
    if count is None:
        count = global_mean_count(positive.sum())
    iou = overlap(predicted, target, smooth=smooth)
    if box_loss == "giou":
        box = 1 - overlap(predicted, target, generalised=True, smooth=smooth)
    else:
        box = -iou.log() if box_loss == "iou" else 1 - iou
    wanted = centerness(target) if quality == "centerness" else iou.detach()
    if quality == "centerness" and weighted:
        box = (box * wanted).sum() / global_mean_count(wanted.sum(), 1e-6)
    else:
        box = box.sum() / count
    entropy = functional.binary_cross_entropy_with_logits(central[image, place], wanted, reduction="sum")
    return {"class": focal_sum(logits, truth) / count, "box": box, "centerness": entropy / count}
