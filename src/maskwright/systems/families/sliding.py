"""Sliding windows without classes (DeepMask, InstanceFCN): where they are, assignment of objects, and decoding.

Windows of one size are at every location of every level of a pyramid of resized images. Objects have no class.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.paste import Rule, paste_masks
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.kinds.proposals import ProposalSystem

# ---- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """All windows of a pyramid, level by level and row by row.

    Attributes:
        boxes: In pixels of the network's input; they may extend beyond it.
        places: Level, y, x of each window.
        scales: Pixels of the window's level per pixel of the input.
    """

    boxes: Float[Tensor, "n 4"]
    places: Int[Tensor, "n 3"]
    scales: Float[Tensor, " n"]

    @property
    def centres(self) -> Float[Tensor, "n 2"]:
        """The centre x, y of each window."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


def lay_windows(
    maps: Sequence[Tensor], scales: Sequence[float], stride: int, side: float, first: float = 0.0
) -> Windows:
    """Lays a window at each location of each level.

    Args:
        maps: A map of each level, (..., H, W).
        scales: Pixels of each level per pixel of the input.
        stride: Distance of neighbouring windows, in pixels of their level.
        side: Side of a window, in pixels of its level.
        first: The centre of the first window of a level, in pixels of the level.
    """
    boxes, places, factors = [], [], []
    for level, (values, scale) in enumerate(zip(maps, scales, strict=True)):
        height, width = values.shape[-2:]
        rows, columns = (torch.arange(n, device=values.device) for n in (height, width))
        y, x = (v.flatten() for v in torch.meshgrid(rows, columns, indexing="ij"))
        corner = torch.stack([x, y], 1).float() * stride + (first - side / 2)
        boxes.append(torch.cat([corner, corner + side], 1) / scale)
        places.append(torch.stack([torch.full_like(y, level), y, x], 1))
        factors.append(torch.full((len(y),), scale, device=values.device))
    return Windows(torch.cat(boxes), torch.cat(places), torch.cat(factors))


def reachable(windows: Windows, size: tuple[int, int], stride: int) -> Bool[Tensor, " n"]:
    """Whether the centre of each window is on an image of `size` (H, W), or beyond it by less than a stride."""
    limit = windows.boxes.new_tensor([size[1], size[0]])
    return ((windows.centres - limit) * windows.scales[:, None] < stride).all(1)


def own_windows(inside: Sequence[Bool[Tensor, "b 1 _h _w"]], image: int, windows: Windows) -> Bool[Tensor, " n"]:
    """Whether each window exists for an image that is not padded to the size of the batch, see `blocks.sliding`."""
    if not inside:
        return torch.ones(len(windows.boxes), dtype=torch.bool, device=windows.boxes.device)
    return torch.cat([level[image].flatten() for level in inside])


# ---- assignment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assignment(OptionGroup):
    """Which windows are positive and negative, as options of a system. Lengths are in pixels of a window's level.

    A window is positive if an object is centred in it and fits it, negative if no object does so approximately, and
    ignored otherwise.

    Attributes:
        canonical: Longer side of the box of an object that fits a window; None is 128 / 224 of the window's side.
        shift: Positive: the centre of the box is at most this far from the window's, in x and in y. None is 1 / 10 of
            the window's side.
        octaves: Positive: the longer side is within a factor of 2 ** `octaves` of `canonical`.
        margin: Negative: no box has its centre closer than this, and its longer side within a factor of 2 of
            `canonical`. None is 3 / 10 of the window's side.
        sampled: Maximum number of windows of an image that are sampled for the losses.
    """

    label: ClassVar[str] = "assignment"

    canonical: float | None = None
    shift: float | None = None
    octaves: float = 0.25
    margin: float | None = None
    sampled: int = 256

    def for_windows(self, side: float) -> Assignment:
        """Returns a copy in which the lengths that are None have their values for windows of `side` pixels."""
        return replace(
            self,
            canonical=float(self.canonical or math.ceil(side * 128 / 224)),
            shift=side / 10 if self.shift is None else self.shift,
            margin=side * 0.3 if self.margin is None else self.margin,
        )


AssignmentLike = Mapping[str, Any] | Assignment


class Assigned(NamedTuple):
    """The windows of an image that are trained.

    Attributes:
        positive: Whether each window is positive.
        owners: The object of each window; defined for positive ones.
        negative: Whether each window is negative.
    """

    positive: Bool[Tensor, " n"]
    owners: Int[Tensor, " n"]
    negative: Bool[Tensor, " n"]


def assign(windows: Windows, target: Instances, rules: Assignment) -> Assigned:
    """Assigns windows to objects, see `Assignment`. Of several objects, the closest one is the owner.

    Args:
        windows: The windows.
        target: The objects, in the frame of the input.
        rules: The rules, with all lengths set.
    """
    boxes = target.boxes.to(windows.boxes)
    if not len(boxes):
        none = torch.zeros(len(windows.boxes), dtype=torch.bool, device=boxes.device)
        return Assigned(none, none.long(), ~none)
    assert rules.canonical is not None
    assert rules.shift is not None
    assert rules.margin is not None
    middles, longer = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1)
    away = (windows.centres[:, None] - middles[None]).abs().amax(-1) * windows.scales[:, None]  # (N, G)
    octave = (longer[None] * windows.scales[:, None] / rules.canonical).clamp(min=1e-6).log2().abs()
    fits = (away <= rules.shift) & (octave <= rules.octaves + 1e-6)
    owners = torch.where(fits, away, torch.inf).argmin(1)
    return Assigned(fits.any(1), owners, ~((away < rules.margin) & (octave < 1)).any(1))


# ---- base class ------------------------------------------------------------------------------------------------------


class SlidingSystem(ProposalSystem):
    """Base class of the systems of the family.

    A subclass constructs the network `dense`, which takes images and, if some are smaller than the batch, the height
    and width of each. Its output has `scores`, the logits of each level, and `inside`, see `blocks.sliding.pyramid`.

    Args:
        classes: The name of the only class.
        assignment: Which windows are trained.
        scales: Pixels of each level of the pyramid per pixel of the input.
        stride: Distance of neighbouring windows, in pixels of their level.
        window: Side of a window, in pixels of its level.
        preprocess: From an image to the network's input.
    """

    dense: Any

    sees_padding = True
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        name: f"assignment.{name}" for name in ("canonical", "shift", "octaves", "margin", "sampled")
    }

    def __init__(
        self,
        classes: Sequence[str],
        assignment: Assignment,
        scales: Sequence[float],
        stride: int,
        window: int,
        preprocess: Preprocess,
    ):
        super().__init__()
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise UsageError(f"{self.name}: scales must be one or more finite numbers above 0, got {list(scales)}")
        self.classes = self.checked_classes(classes)
        self.assignment = assignment.for_windows(window)
        self.scales = tuple(float(scale) for scale in scales)
        self.stride, self.window = stride, window
        self.preprocess = preprocess

    def inputs(self, images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The arguments of `forward` for images that fill `sizes` (height, width) of their planes.

        The second one, the size of each image when it is padded on its own, is present only if some image is smaller
        than the batch. It is on the host, where it decides which images are processed together.
        """
        (height, width), multiple = images.shape[-2:], self.preprocess.multiple
        own = [(min(-(-h // multiple) * multiple, height), min(-(-w // multiple) * multiple, width)) for h, w in sizes]
        if all(size == (height, width) for size in own):
            return (images,)
        return images, torch.tensor(own, dtype=torch.int64).reshape(-1, 2)

    def forward(self, images: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Any:
        """Computes the raw output, see `inputs`."""
        return self.dense(images) if sizes is None else self.dense(images, sizes)

    @abstractmethod
    def windows(self, raw: Any) -> Windows:
        """The windows of the raw output."""

    @abstractmethod
    def window_masks(self, raw: Any, image: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """Computes the mask logits of windows (level, y, x) of one image."""

    def assigned(self, raw: Any, targets: Sequence[Instances], windows: Windows) -> list[Assigned]:
        """Assigns the windows of each image to its objects; negative ones are not on padding."""
        result = []
        for image, target in enumerate(targets):
            own = own_windows(raw.inside, image, windows)
            positive, owners, negative = assign(windows, target, self.assignment)
            on_image = own & reachable(windows, target.image_size, self.stride)
            result.append(Assigned(positive & own, owners, negative & on_image))
        return result

    def proposals(
        self,
        raw: Any,
        placements: Sequence[Placement],
        *,
        score_threshold: float,
        nms_threshold: float | None,
        detections: int,
        mask_threshold: float,
        candidates: int,
        rule: Rule,
    ) -> list[Instances]:
        """Converts the raw output to objects; arguments as in `decode`, and `rule` as in `proposals_of`."""
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1).sigmoid()
        threshold = _logit(mask_threshold)
        result = []
        for image, placement in enumerate(placements):
            on_image = own_windows(raw.inside, image, windows) & reachable(windows, placement.size, self.stride)

            def masks_of(rows: Tensor, image: int = image) -> Tensor:
                return self.window_masks(raw, image, windows.places[rows]) - threshold

            result.append(
                proposals_of(
                    torch.where(on_image, scores[image], -1.0), windows, masks_of, placement,
                    score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
                    candidates=candidates, rule=rule,
                )
            )  # fmt: skip
        return result


# ---- decoding --------------------------------------------------------------------------------------------------------


def proposals_of(
    scores: Float[Tensor, " n"],
    windows: Windows,
    masks_of: Callable[[Int[Tensor, " k"]], Float[Tensor, "k v u"]],
    placement: Placement,
    *,
    score_threshold: float,
    nms_threshold: float | None,
    detections: int,
    candidates: int,
    rule: Rule,
) -> Instances:
    """Converts the windows of highest score of one image to objects.

    Args:
        scores: Score of each window.
        windows: The windows.
        masks_of: Computes values of the masks of some windows; a pixel belongs to a mask where its value is above 0.
        placement: How the image was placed in the network's input.
        score_threshold: Lowest score of an object.
        nms_threshold: IoU of the bounding boxes of masks above which the object of lower score is removed; None for no
            suppression.
        detections: Maximum number of objects.
        candidates: Number of windows that are kept before suppression.
        rule: How a mask is pasted into its window, see `paste_masks`.

    Returns:
        The objects in descending order of scores, with the bounding boxes of their masks.
    """
    best, rows = scores.topk(min(candidates if nms_threshold is not None else detections, len(scores)))
    rows, best = rows[best >= score_threshold], best[best >= score_threshold]
    values = masks_of(rows).float()
    tight = Masks.from_dense(values > 0).boxes().to(windows.boxes)
    own = windows.boxes[rows]
    step = (own[:, 2:] - own[:, :2]) / own.new_tensor([values.shape[2], values.shape[1]])
    boxes = own[:, :2].repeat(1, 2) + tight * step.repeat(1, 2)
    solid = (tight[:, 2:] > tight[:, :2]).all(1)
    values, own, boxes, best = values[solid], own[solid], boxes[solid], best[solid]
    if nms_threshold is not None:
        kept = box_ops.nms(boxes, best, torch.zeros_like(best, dtype=torch.int64), nms_threshold)
        values, own, best = values[kept], own[kept], best[kept]
    values, own, best = values[:detections], own[:detections], best[:detections]
    values = values.flip(-1) if placement.mirrored else values
    size = placement.image_size
    masks = paste_masks(values, placement.boxes_to_image(own), size, rule=rule, threshold=0.0, strict=True)
    frames = masks.boxes()
    visible = (frames[:, 2:] > frames[:, :2]).all(1)
    masks, frames, best = masks[visible], frames[visible].to(best), best[visible.to(best.device)]
    return Instances(size, frames, torch.zeros_like(best, dtype=torch.int64), masks, best)


def _logit(threshold: float) -> float:
    """The logit of a mask's probability."""
    if not 0 < threshold < 1:
        raise UsageError(f"mask_threshold must be between 0 and 1, got {threshold}")
    return math.log(threshold / (1 - threshold))


def scales_between(low: float, high: float, step: float) -> tuple[float, ...]:
    """2 to the powers low, low + step, ... high."""
    return tuple(2.0 ** (low + n * step) for n in range(math.floor((high - low) / step + 1.5)))
