"""Augmentation: parameters are drawn first, then applied once to image, masks, boxes and keypoints.

All geometric operations (crop, scale, large-scale jitter, flip) are composed into one `Placement`, so that the image
is resampled once and the annotations stay aligned with it. Masks stay outlines or run-length codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pycocotools import mask as coco
from torch import Tensor

from maskwright.data.dataset import Sample
from maskwright.data.own_transform import Transform, apply_transform, named_transform
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement, Preprocess, rle
from maskwright.structures.instances import PERSON_KEYPOINTS_MIRRORED

_COLOURS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Drawn:
    """The augmentation parameters of one image.

    Attributes:
        placement: The geometric transformation of the turned image.
        colours: Colour operations in order: name and factor; for "hue" a shift in -0.5 ... 0.5.
        turns: Counterclockwise quarter turns of the image before everything else. An up-down flip is two of them and a
            left-right flip.
    """

    placement: Placement
    colours: tuple[tuple[str, float], ...] = ()
    turns: int = 0


@dataclass(frozen=True)
class Placed:
    """An image on the network's grid, before normalization.

    Attributes:
        image: (C, h, w) of `placement.size`, 0 ... 255.
        target: The objects, on the same grid.
        placement: How the image, after quarter turns, was placed there.
    """

    image: Tensor
    target: Instances
    placement: Placement


@dataclass(frozen=True)
class Augment:
    """Random augmentation in training; with the defaults, images are only flipped.

    Args:
        flip: Probability of a left-right flip.
        vertical_flip: Probability of an up-down flip, for images without a fixed upper side (aerial, microscopy).
            Either flip exchanges left and right keypoints.
        quarter_turns: Probability of a turn by 90, 180 or 270 degrees.
        short: Lengths of the short side to draw from; empty: that of the system.
        sampling: "choice": one of `short`; "range": any integer between the smallest and the largest of them.
        long: Limit of the long side; None: that of the system.
        crop: Smallest fraction of each side that a random crop keeps, before scaling; None: no crop.
        crop_chance: Probability of a crop.
        jitter: Range of factors for large-scale jitter (Ghiasi et al., arXiv 2012.07177, section 3): the image is
            fitted into `size`, scaled by a factor from this range, and cropped at random to at most `size`. The paper
            uses (0.1, 2.0).
        size: Canvas (height, width) that every image is fitted into and padded to. Without it, jitter is relative to
            the size without augmentation.
        brightness: Factors are drawn from 1 - x ... 1 + x; so for `contrast` and `saturation`.
        contrast: See `brightness`.
        saturation: See `brightness`.
        hue: Hue is shifted by -x ... x of the colour circle; at most 0.5.
        paste: Probability that objects of another image, augmented as well, are pasted onto this one (copy-paste, same
            paper, section 3).
        min_area: Objects that were cut or covered are dropped below this area, in pixels of the input.
        transform: A function that is applied first: from the image (C, H, W), uint8, and its `Instances` to both (a
            third parameter receives a `numpy.random.Generator`), or its name, "module:function" or
            "file.py:function". A recipe stores the name.

    Raises:
        UsageError: If a value is invalid.
    """

    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    short: Sequence[int] = ()
    sampling: str = "choice"
    long: int | None = None
    crop: float | None = None
    crop_chance: float = 1.0
    jitter: Sequence[float] | None = None
    size: Sequence[int] | int | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    paste: float = 0.0
    min_area: int = 1
    transform: Transform | str | None = None

    def __post_init__(self) -> None:
        # Values from JSON are lists, not tuples; one number is a square canvas or a single short side.
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        for name in ("short", "jitter", "size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        for name in ("flip", "vertical_flip", "quarter_turns", "crop_chance", "paste"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._expect("hue", 0 <= self.hue <= 0.5, "in [0, 0.5]")
        self._expect("crop", self.crop is None or 0 < self.crop <= 1, "a fraction in (0, 1]")
        self._expect("short", all(s >= 1 for s in self.short), "lengths of at least 1 pixel")
        self._expect("long", self.long is None or self.long >= 1, "a length of at least 1 pixel")
        self._expect("sampling", self.sampling in ("choice", "range"), "'choice' or 'range'")
        self._expect(
            "jitter",
            self.jitter is None or (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]),
            "a pair of positive factors, smallest first",
        )
        canvas = self.canvas
        self._expect("size", canvas is None or (len(canvas) == 2 and min(canvas) >= 1), "a height and a width")
        self._expect("min_area", self.min_area >= 1, "at least 1 pixel")
        own: Any = self.transform
        self._expect("transform", own is None or isinstance(own, str) or callable(own), "a function or its name")
        if isinstance(own, str):
            named_transform(own)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """The canvas (height, width); None if there is no fixed one."""
        return cast(tuple[int, int] | None, self.size)

    def _expect(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"augmentation `{name}` must be {what}, got {getattr(self, name)!r}")

    # ---- drawing parameters -----------------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator, size: tuple[int, int], preprocess: Preprocess | None = None) -> Drawn:
        """Draw the augmentation of one image.

        Args:
            rng: Source of random numbers.
            size: H, W of the image.
            preprocess: The system's preprocessing, for the sizes that this augmentation does not set.

        Returns:
            The parameters, for `apply`.
        """
        rule = preprocess or Preprocess()
        # No number is drawn for what is off, so that the others stay the same.
        turns = int(rng.integers(1, 4)) if self.quarter_turns and rng.random() < self.quarter_turns else 0
        upside_down = bool(self.vertical_flip) and bool(rng.random() < self.vertical_flip)
        turns = (turns + 2 * upside_down) % 4
        placement = self._window(rng, (size[1], size[0]) if turns % 2 else size)
        if self.jitter is not None or self.size is not None:
            placement = self._jittered(rng, placement, rule)
        else:
            placement = placement.then_resize(self._scaled(rng, rule).size(*placement.size))
        if (rng.random() < self.flip) != upside_down:
            placement = placement.then_mirror()
        return Drawn(placement, self._colours(rng), turns)

    def _window(self, rng: np.random.Generator, size: tuple[int, int]) -> Placement:
        placement = Placement.identity(size)
        if self.crop is None or rng.random() >= self.crop_chance:
            return placement
        height, width = (max(1, round(side * rng.uniform(self.crop, 1))) for side in size)
        y0, x0 = (int(rng.integers(whole - part + 1)) for whole, part in zip(size, (height, width), strict=True))
        return placement.then_crop(x0, y0, (height, width))

    def _scaled(self, rng: np.random.Generator, rule: Preprocess) -> Preprocess:
        short = rule.short
        if self.short and self.sampling == "choice":
            short = self.short[int(rng.integers(len(self.short)))]
        elif self.short:
            short = int(rng.integers(min(self.short), max(self.short) + 1))
        return rule.at(short if self.short else None, self.long)

    def _jittered(self, rng: np.random.Generator, placement: Placement, rule: Preprocess) -> Placement:
        height, width = placement.size
        canvas = self.canvas or self._scaled(rng, rule).size(height, width)
        low, high = self.jitter or (1.0, 1.0)
        # As in detectron2, the factor scales the canvas, into which the image is fitted with its aspect ratio kept.
        ratio = rng.uniform(low, high) * min(canvas[0] / height, canvas[1] / width)
        large = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        part = (min(large[0], canvas[0]), min(large[1], canvas[1]))
        y0, x0 = (int(rng.integers(whole - kept + 1)) for whole, kept in zip(large, part, strict=True))
        return placement.then_resize(large).then_crop(x0, y0, part)

    def _colours(self, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
        drawn: list[tuple[str, float]] = []
        for name in _COLOURS:
            reach: float = getattr(self, name)
            if reach:
                drawn.append((name, float(rng.uniform(-reach, reach)) + (0.0 if name == "hue" else 1.0)))
        return tuple(drawn)

    # ---- applying parameters ----------------------------------------------------------------------------------------

    def apply(
        self,
        sample: Sample,
        drawn: Drawn,
        *,
        resample: Literal["pillow", "tensor", "opencv", "antialias", "bicubic"] = "pillow",
        mirrored_keypoints: Sequence[int] | None = PERSON_KEYPOINTS_MIRRORED,
    ) -> Placed:
        """Apply parameters to an image and its objects.

        Args:
            sample: The image; it is not modified.
            drawn: The parameters.
            resample: Interpolation; see `place_image`.
            mirrored_keypoints: Permutation of the keypoints under a flip; None: unchanged.

        Returns:
            Image and objects on the network's grid. Objects outside the crop are dropped; those that were cut have
            the boxes of their remaining masks.
        """
        image, target = sample.image, sample.target
        if drawn.turns:
            image, target = torch.rot90(image, drawn.turns, (1, 2)), target.turned(drawn.turns)
        image = _adjust_colours(place_image(image, drawn.placement, resample), drawn.colours)
        target = place_target(target, drawn.placement, mirrored_keypoints, self.min_area)
        return Placed(image, target, drawn.placement)

    def transformed(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return an image after the user's own transform; see `apply_transform`."""
        return sample if self.transform is None else apply_transform(self.transform, sample, rng)

    def overlay(self, rng: np.random.Generator, below: Placed, above: Placed) -> Placed:
        """Paste a random half of the objects of one image onto another (copy-paste).

        Args:
            rng: Source of random numbers.
            below: The image that receives the objects.
            above: The image whose objects are pasted.

        Returns:
            The combined image. Masks are the visible parts, and covered keypoints become hidden. With a fixed canvas
            (`size`) the image grows to contain both; otherwise pasted objects are cut at its border.

        Raises:
            UsageError: If the objects to paste have no masks.
        """
        if len(above.target) and above.target.masks is None:
            raise UsageError("copy-paste augmentation (`paste`) needs masks; the data set has boxes only")
        chosen = torch.from_numpy(rng.random(len(above.target)) < 0.5)  # pyright: ignore[reportUnknownMemberType] - untyped in torch
        pasted = above.target[chosen]
        size = below.placement.size
        if self.size is not None:
            size = (max(size[0], above.placement.size[0]), max(size[1], above.placement.size[1]))
        frame = Placement.identity(above.placement.size).then_crop(0, 0, size)
        pasted = drop_cut(pasted.place(frame), pasted.boxes, frame, self.min_area)
        if not len(pasted):
            return below
        placement = below.placement.then_crop(0, 0, size)
        pasted = replace(pasted, masks=cast(Masks, pasted.masks).pack())
        under = below.target.place(Placement.identity(below.placement.size).then_crop(0, 0, size), None)
        cover = cast(Masks, pasted.masks).union()
        plane = cover.dense()[0]
        image = torch.where(plane, _padded(above.image, size), _padded(below.image, size))
        under = _visible(under, cover, plane, self.min_area)
        return Placed(image, Instances.join([under, pasted]), placement)


def place_image(image: UInt8[Tensor, "c H W"], placement: Placement, resample: str = "pillow") -> Tensor:
    """Resample an image onto the network's grid.

    Args:
        image: The image.
        placement: How it is placed; the window `placement.size` must lie within the image.
        resample: Interpolation, as in `Preprocess`. "pillow": 8-bit bilinear with anti-aliasing (uint8); "tensor":
            bilinear without anti-aliasing (float32, 0 ... 255); "opencv": as "tensor", rounded; "antialias": bilinear
            with anti-aliasing (float32). Anything else is resampled as "pillow".

    Returns:
        Pixels (C, h, w).
    """
    height, width = image.shape[1:]
    (h, w), (sx, sy), (ox, oy) = placement.size, placement.scale, placement.offset
    x0, x1 = np.clip([-ox / sx, (w - ox) / sx], 0, width)
    y0, y1 = np.clip([-oy / sy, (h - oy) / sy], 0, height)
    if placement.mirrored:
        x0, x1 = width - x1, width - x0
    whole = abs(x0) + abs(y0) + abs(x1 - width) + abs(y1 - height) < 1e-6
    if resample == "bicubic" or (resample == "antialias" and not whole):
        resample = "pillow"
    if whole and (h, w) == (height, width):
        result = image if resample == "pillow" else image.float()
    elif resample == "pillow":
        result = _pillow(image, (h, w), None if whole else (float(x0), float(y0), float(x1), float(y1)))
    elif whole:
        result = torch.nn.functional.interpolate(
            image.float()[None], (h, w), mode="bilinear", align_corners=False, antialias=resample == "antialias"
        )[0]
    else:
        xs = (torch.arange(w) + 0.5) * (float(x1 - x0) / w) + float(x0)
        ys = (torch.arange(h) + 0.5) * (float(y1 - y0) / h) + float(y0)
        grid = torch.stack(torch.meshgrid(xs / width * 2 - 1, ys / height * 2 - 1, indexing="xy"), -1)
        result = torch.nn.functional.grid_sample(
            image.float()[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )[0]
    result = result.round() if resample == "opencv" else result
    return result.flip(-1) if placement.mirrored else result


def place_target(
    target: Instances, placement: Placement, mirrored_keypoints: Sequence[int] | None, min_area: int = 1
) -> Instances:
    """Place objects on the network's grid and drop those outside of it.

    Args:
        target: The objects on the image.
        placement: How the image is placed.
        mirrored_keypoints: Permutation of the keypoints under a flip; None: unchanged.
        min_area: Objects that were cut are dropped below this area in pixels.

    Returns:
        The remaining objects; see `drop_cut`.
    """
    return drop_cut(target.place(placement, mirrored_keypoints), target.boxes, placement, min_area)


def drop_cut(placed: Instances, before: Float[Tensor, "n 4"], placement: Placement, min_area: int = 1) -> Instances:
    """Drop objects that a placement has cut away or shrunk to nothing, and fit the boxes of those it has cut.

    Objects without masks are cut with their boxes.

    Args:
        placed: The objects on the network's grid.
        before: Their boxes on the image.
        placement: How the image was placed.
        min_area: Objects that were cut are dropped below this area in pixels.

    Returns:
        The remaining objects. Those that were cut have the boxes of their remaining masks; the others keep their
        annotated boxes.
    """
    if not len(placed):
        return placed
    height, width = placement.size
    moved = placement.boxes_to_input(before)
    limits = moved.new_tensor([width, height])
    cut = (moved[:, :2] < -0.5).any(1) | (moved[:, 2:] > limits + 0.5).any(1)
    sides = moved[:, 2:] - moved[:, :2]
    if placed.masks is None:
        areas = (placed.boxes[:, 2:] - placed.boxes[:, :2]).prod(1)
        return placed[~(cut & (areas < min_area))]
    looked = cut | (sides.amin(1) < 2) | (sides.prod(1) < 16)  # others cannot have shrunk to nothing
    if not looked.any():
        return placed
    masks = placed.masks[looked].pack()
    boxes, areas = placed.boxes.clone(), torch.full((len(placed),), float(min_area))
    areas[looked] = masks.areas().float()
    tight = boxes[looked]
    tight[cut[looked]] = masks.boxes()[cut[looked]]
    boxes[looked] = tight
    # Small objects are kept, unless they were cut or have no pixel left.
    gone = (areas < 1) | (cut & (areas < min_area))
    return replace(placed, boxes=boxes)[~gone]


def _visible(target: Instances, cover: Masks, plane: Tensor, min_area: int) -> Instances:
    """The visible parts of objects under `cover`, one mask that is also given as a plane."""
    if not len(target) or target.masks is None:
        return target
    size = target.image_size
    frame = cover.boxes()[0]
    overlapping = ((target.boxes[:, :2] < frame[2:]) & (target.boxes[:, 2:] > frame[:2])).all(1)
    open_part = {"size": list(size), "counts": _complement(cover.rle()[0]["counts"])}
    before = target.masks.pack()
    codes: list[Any] = before.rle()
    positions = cast(list[int], overlapping.nonzero().flatten().tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    for index in positions:
        codes[index] = coco.merge(cast(Any, [codes[index], open_part]), intersect=True)
    masks = Masks("rle", [code["counts"] for code in codes], size)
    areas = masks.areas()
    touched = overlapping & (areas < before.areas())
    boxes = torch.where(touched[:, None], masks.boxes(), target.boxes)
    points = target.keypoints
    if points is not None:
        xy = points[..., :2].long()
        hit = plane[xy[..., 1].clamp(0, size[0] - 1), xy[..., 0].clamp(0, size[1] - 1)] & overlapping[:, None]
        points = points.clone()
        points[..., 2] = torch.where(hit & (points[..., 2] > 1), 1.0, points[..., 2])
    return replace(target, boxes=boxes, masks=masks, keypoints=points)[~(touched & (areas < min_area))]


def _complement(text: bytes) -> bytes:
    """The run-length string of the background of a mask."""
    lengths = rle.decode_counts(text)
    return rle.encode_counts(lengths[1:] if lengths[0] == 0 and len(lengths) > 1 else np.concatenate([[0], lengths]))


def _padded(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The image at the upper left of a plane of `size`, cropped or padded with grey."""
    image = image[:, : size[0], : size[1]]
    if tuple(image.shape[1:]) == size:
        return image
    plane = image.new_full((len(image), *size), 114)
    plane[:, : image.shape[1], : image.shape[2]] = image
    return plane


def _pillow(image: Tensor, size: tuple[int, int], box: tuple[float, float, float, float] | None) -> Tensor:
    from PIL import Image

    if len(image) != 3:
        planes = [Image.fromarray(plane.contiguous().numpy()) for plane in image]
        parts = [np.array(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR, box)) for plane in planes]
        return torch.from_numpy(np.stack(parts))  # pyright: ignore[reportUnknownMemberType] - untyped in torch
    drawn = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = np.array(drawn.resize((size[1], size[0]), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(resized).permute(2, 0, 1)  # pyright: ignore[reportUnknownMemberType] - untyped in torch


def _adjust_colours(image: Tensor, colours: tuple[tuple[str, float], ...]) -> Tensor:
    if not colours:
        return image
    if len(image) not in (1, 3):
        raise UsageError(
            "colour augmentation (brightness, contrast, saturation, hue) needs 1 or 3 channels, the image has "
            f"{len(image)}"
        )
    from torchvision.transforms.v2 import functional as pixels  # pyright: ignore[reportMissingTypeStubs] - has none

    whole = image.dtype == torch.uint8
    values = image.contiguous() if whole else image / 255
    for name, factor in colours:
        values = getattr(pixels, f"adjust_{name}")(values, factor)
    return values if whole else values * 255
