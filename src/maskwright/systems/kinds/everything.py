"""Segment everything: a grid of points as prompts, of whose answers the good and stable ones are kept.

This is the automatic mask generator of Segment Anything (arXiv 2304.02643, section 5 and appendix B), with the names of
its options: `score_threshold` is its `pred_iou_thresh`, `nms_threshold` its `box_nms_thresh`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.ops.planes import place_stable
from maskwright.ops.regions import without_small_regions
from maskwright.structures import Instances, Masks, Placement

if TYPE_CHECKING:
    from maskwright.systems.kinds.promptable import Features, PromptableSystem

Crop = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
MOST_POINTS = 1024  # along a side of the grid
EDGE = 20.0  # pixels; boxes so close to an edge of a crop are dropped


@dataclass(frozen=True)
class Grid:
    """Options of "segment everything"; see `PromptableSystem.decode`."""

    score_threshold: float = 0.88
    nms_threshold: float = 0.7
    points_per_side: int = 32
    points_per_batch: int = 64
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    use_m2m: bool = False

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("crop_n_layers", "min_mask_region_area", "stability_score_offset", "stability_score_thresh"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("crop_nms_thresh", "crop_overlap_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.points_per_side > MOST_POINTS:
            raise UsageError(f"points_per_side must be at most {MOST_POINTS}, got {self.points_per_side}")
        if self.crop_n_layers > 8:
            raise UsageError(
                f"crop_n_layers must be at most 8 (65536 crops in the last layer), got {self.crop_n_layers}"
            )


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in an image, on its grid and on the host.

    Attributes:
        masks: N masks.
        boxes: (N, 4), x0, y0, x1, y1 of the first and last pixels: x1 is the last column, as in the original code.
        scores: (N,), predicted IoU.
        stability: (N,), see `ops.planes.place_stable`.
        points: (N, 2), the prompt.
        crops: (N, 4), the crop of the image in which the object was found.
    """

    masks: Masks
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    stability: Float[Tensor, " n"]
    points: Float[Tensor, "n 2"]
    crops: Int[Tensor, "n 4"]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Tensor) -> Found:
        return Found(
            self.masks[rows], self.boxes[rows], self.scores[rows], self.stability[rows], self.points[rows],
            self.crops[rows],
        )  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """All objects of several parts of one image."""
        if len(parts) == 1:
            return parts[0]
        boxes, scores, stability, points, crops = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("boxes", "scores", "stability", "points", "crops")
        )
        return cls(Masks.join([part.masks for part in parts]), boxes, scores, stability, points, crops)

    def instances(self, detections: int | None = None) -> Instances:
        """The objects, best first."""
        order = self.scores.argsort(descending=True, stable=True)[:detections]
        masks = self.masks[order]
        return Instances(
            self.masks.size, masks.boxes(), torch.zeros(len(order), dtype=torch.int64), masks, self.scores[order]
        )


def point_grid(count: int) -> Float[Tensor, "n 2"]:
    """The centres x, y of count x count cells of the unit square, row by row, in float64."""
    side = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.stack([side.expand(count, -1), side[:, None].expand(-1, count)], -1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[tuple[int, Crop]]:
    """The crops of an image: the whole of it, then in layer i 2^i x 2^i overlapping ones.

    Args:
        size: H, W of the image.
        layers: Layers after the first.
        overlap_ratio: Overlap of the crops of layer 1, as a share of the short side; half of it in each further layer.

    Returns:
        The layer and the box of each crop. Of images with fewer pixels than crops, those without pixels are left out.
    """
    height, width = size
    found: list[tuple[int, Crop]] = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        long, high = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for column, row in product(range(count), repeat=2):
            x0, y0 = (long - overlap) * column, (high - overlap) * row
            found.append((layer, (x0, y0, min(x0 + long, width), min(y0 + high, height))))
    return [(layer, crop) for layer, crop in found if crop[0] < crop[2] and crop[1] < crop[3]]


def find_in_crop(
    system: PromptableSystem, features: Features, placement: Placement, options: Grid, layer: int = 0,
    crop: Crop | None = None, image_size: tuple[int, int] | None = None,
) -> Found:  # fmt: skip
    """Segments everything in an image, or in a crop of one.

    Args:
        system: The system.
        features: The features of the image or crop, with batch size 1.
        placement: How the image or crop was placed in the input.
        options: The options.
        layer: The layer of the crop, which determines the number of points.
        crop: The crop; None: the whole image.
        image_size: H, W of the image; None: that of the placement.
    """
    height, width = placement.image_size
    crop, image_size = crop or (0, 0, width, height), image_size or (height, width)
    count = int(options.points_per_side / options.crop_n_points_downscale_factor**layer)
    points = point_grid(count) * torch.tensor([width, height], dtype=torch.float64)
    parts = [
        _find(system, features, placement, options, own, crop, image_size)
        for own in _split(points, options.points_per_batch)
    ]
    if not parts:
        return _nothing(image_size)
    found = Found.join(parts)
    return found[_nms(found.boxes, found.scores, options.nms_threshold)]


def _find(
    system: PromptableSystem, features: Features, placement: Placement, options: Grid, points: Tensor, crop: Crop,
    image_size: tuple[int, int],
) -> Found:  # fmt: skip
    """The good and stable answers to some points."""
    logits, scores, owner = system.answers_to_points(features, placement, points, options)
    if options.score_threshold > 0:
        good = scores > options.score_threshold
        logits, scores, owner = logits[good], scores[good], owner[good]
    masks, stability, kept = place_stable(
        logits, placement, features.size, margin=options.stability_score_offset, least=options.stability_score_thresh,
        steps=system.steps, cubic=system.cubic, frame=(crop[0], crop[1], image_size),
    )  # fmt: skip
    scores, owner = scores.cpu()[kept], owner.cpu()[kept]
    boxes = masks.boxes()
    boxes[:, 2:] -= (boxes[:, 2:] > 0).float()  # the last pixel; an empty mask keeps 0, 0, 0, 0
    corner = torch.tensor(crop[:2])
    empty = (masks.areas() == 0)[:, None]
    boxes = torch.where(empty, corner.repeat(2).float(), boxes)
    found = Found(masks, boxes, scores, stability, points[owner] + corner, torch.tensor([crop]).expand(len(boxes), -1))
    near = _near_edge(boxes, crop, image_size)
    return found if not bool(near.any()) else found[(~near).nonzero()[:, 0]]


def _split(points: Tensor, length: int) -> tuple[Tensor, ...]:
    return points.split(length)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - not typed


def _near_edge(boxes: Float[Tensor, "n 4"], crop: Crop, image_size: tuple[int, int]) -> Bool[Tensor, " n"]:
    """Boxes within `EDGE` pixels of an edge of the crop that is not an edge of the image too."""
    own = boxes.new_tensor(crop)
    whole = boxes.new_tensor([0, 0, image_size[1], image_size[0]])
    near, outer = (boxes - own).abs() <= EDGE, (boxes - whole).abs() <= EDGE
    return (near & ~outer).any(1)


def _nothing(size: tuple[int, int]) -> Found:
    none = torch.zeros(0)
    return Found(Masks.empty(size), none.reshape(0, 4), none, none, none.reshape(0, 2), none.reshape(0, 4).long())


def find_everywhere(
    system: PromptableSystem,
    image_size: tuple[int, int],
    options: Grid,
    encode: Callable[[Crop], tuple[Features, Placement]],
) -> Found:
    """Segments everything in an image and its crops.

    Args:
        system: The system.
        image_size: H, W of the image.
        options: The options.
        encode: Encodes a crop: its features, with batch size 1, and its placement in the input.

    Returns:
        What was found, in the order of the original code.
    """
    parts = list[Found]()
    for layer, crop in crop_boxes(image_size, options.crop_n_layers, options.crop_overlap_ratio):
        features, placement = encode(crop)
        parts.append(find_in_crop(system, features, placement, options, layer, crop, image_size))
    return cleaned(merge_crops(parts, options), options)


def merge_crops(parts: Sequence[Found], options: Grid) -> Found:
    """Joins what was found in the crops of an image; of duplicates, that of the smaller crop is kept."""
    found = Found.join(parts)
    if len(parts) == 1:
        return found
    width, height = (found.crops[:, 2:] - found.crops[:, :2]).unbind(1)
    return found[_nms(found.boxes, 1 / (width * height).float(), options.crop_nms_thresh)]


def cleaned(found: Found, options: Grid) -> Found:
    """Fills small holes and drops small parts of each mask, then drops duplicates again; unchanged masks go first."""
    least = options.min_mask_region_area
    if least <= 0 or not len(found):
        return found
    frames, crops = found.masks.crops()
    fresh, corners, changed = list[Tensor](), list[tuple[int, int]](), list[bool]()
    for frame, crop in zip(frames, crops, strict=True):
        mask, corner, differs = without_small_regions(crop, frame, found.masks.size, least)
        fresh.append(mask)
        corners.append(corner)
        changed.append(differs)
    masks = Masks.from_crops(fresh, torch.tensor(corners), found.masks.size)
    boxes = masks.boxes()
    boxes[:, 2:] -= (boxes[:, 2:] > 0).float()
    differs = torch.tensor(changed)
    kept = _nms(boxes, (~differs).float(), max(options.nms_threshold, options.crop_nms_thresh))
    found = replace(found, masks=masks, boxes=torch.where(differs[:, None], boxes, found.boxes))
    return found[kept]


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Positions of the boxes that remain, by descending score."""
    from torchvision.ops import nms  # pyright: ignore[reportMissingTypeStubs] - late: importing it takes long

    return nms(boxes, scores, threshold)
