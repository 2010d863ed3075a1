"""What characterizes a data set, and which systems suit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskwright.data import Dataset, evenly_spaced
from maskwright.errors import UsageError
from maskwright.structures import Instances

_SHAPES = 400  # objects whose masks are examined


@dataclass(frozen=True)
class DataProfile:
    """Measures of a data set's images and objects; crowd regions are not counted.

    Attributes:
        images: Number of images.
        side: Median short side of the images in pixels.
        classes: Number of classes.
        objects: Number of objects in the examined images.
        density: Median number of objects in an image that has any.
        densest: Largest number of objects in an image.
        size: Median object size, as the square root of its area divided by the short side of the image.
        small: Fraction of objects below 32 pixels when the short side is 800.
        crowded: Fraction of objects whose box overlaps another one of the class with IoU of at least 0.5.
        nested: Fraction of objects whose box lies within that of another object, by nine tenths of its area.
        elongated: Fraction of objects that are at least three times as long as wide, by second moments.
        rough: Fraction of objects that are no simple blob: with holes, several parts or deep concavities.
        masks: Whether the objects have masks; otherwise `elongated` and `rough` are 0.
    """

    images: int
    side: float
    classes: int
    objects: int
    density: float
    densest: int
    size: float
    small: float
    crowded: float
    nested: float
    elongated: float
    rough: float
    masks: bool = True

    @classmethod
    def create(cls, dataset: Dataset, limit: int = 300) -> DataProfile:
        """Measure a data set.

        Args:
            dataset: The data set.
            limit: Number of images to examine, evenly spaced.

        Raises:
            UsageError: If there are no objects.
        """
        part = evenly_spaced(dataset, limit)
        targets = [_real(part.targets(index)) for index in range(len(part))]
        counts = np.array([len(target) for target in targets])
        if not counts.sum():
            raise UsageError(f"{dataset.name} has no objects to compare systems on")
        sides = np.array([min(size) for size in part.sizes()], float)
        sizes: list[npt.NDArray[np.float64]] = []
        crowded = nested = 0
        for target, side in zip(targets, sides.tolist(), strict=True):
            areas = _areas(target)
            sizes.append(np.sqrt(areas) / side)
            overlapping, within = _overlaps(target)
            crowded, nested = crowded + overlapping, nested + within
        every, total = np.concatenate(sizes), int(counts.sum())
        elongated, rough = _shapes(targets)
        return cls(
            len(dataset), float(np.median(sides)), len(dataset.classes), total, float(np.median(counts[counts > 0])),
            int(counts.max()), float(np.median(every)), float(np.mean(every * 800 < 32)), crowded / total,
            nested / total, elongated, rough, any(t.masks is not None for t in targets if len(t)),
        )  # fmt: skip

    def words(self) -> str:
        """The profile in a sentence."""
        shapes = (
            f", {100 * self.elongated:.0f} % elongated, {100 * self.rough:.0f} % with holes, parts or deep concavities"
            if self.masks
            else "; without masks"
        )
        return (
            f"{self.images} {'image' if self.images == 1 else 'images'} (short side {self.side:.0f}), {self.classes} "
            f"{'class' if self.classes == 1 else 'classes'}, {self.density:.0f} objects per image (at most "
            f"{self.densest}), median size {100 * self.size:.0f} % of the short side; {100 * self.small:.0f} % small, "
            f"{100 * self.crowded:.0f} % crowded, {100 * self.nested:.0f} % nested{shapes}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON values."""
        return asdict(self)


def choose_systems(profile: DataProfile, count: int = 6) -> list[tuple[str, str]]:
    """Choose presets that suit a data set.

    Args:
        profile: The data set's profile.
        count: Number of presets.

    Returns:
        Presets and the reason for each, best expected first.

    Raises:
        UsageError: If the objects have no masks.
    """
    p = profile
    if not p.masks:
        raise UsageError(
            "auto chooses systems that predict masks, and the objects of the data have none; name systems that need "
            "boxes alone, such as fcos-small and retinanet-small"
        )
    points: dict[str, tuple[float, str]] = {
        "mask-rcnn-small": (10.0, "the reference: two stages, robust on small data"),
        "solov2-small": (5.0, "one stage without boxes, fast"),
        "cascade-mask-rcnn-small": (4.0, "three box stages: precise boxes and masks"),
        "pointrend-small": (3.5, "refines mask boundaries point by point"),
        "blendmask-small": (3.0, "one stage on FCOS with masks from the whole image"),
        "centermask-small": (2.5, "one stage on FCOS with a small mask branch"),
        "yolact-small": (2.0, "the fastest masks from prototypes"),
        "mask-scoring-rcnn-small": (1.5, "scores that follow the quality of the masks"),
        "mask2former-small": (1.0, "queries instead of boxes and suppression"),
        "deepsnake-small": (0.5, "contours that are deformed to fit"),
        "polarmask-small": (0.5, "rays from a centre, fast"),
    }

    def prefer(name: str, more: float, why: str) -> None:
        value, _ = points[name]
        points[name] = (value + more, why)

    if p.size >= 0.18:
        prefer("pointrend-small", 4, f"objects are large ({100 * p.size:.0f} % of the short side): boundaries count")
    if p.small >= 0.4 or p.density >= 25:
        prefer("centermask-small", 3, f"{100 * p.small:.0f} % of the objects are small: dense detection on fine levels")
        prefer("blendmask-small", 1, "small objects: dense detection on fine levels")
        prefer("solov2-small", -2, points["solov2-small"][1])
    if p.crowded >= 0.08:
        why = f"{100 * p.crowded:.0f} % of the objects overlap others of their class: no suppression by boxes"
        prefer("solov2-small", 3, why)
        prefer("mask2former-small", 5, why)
    if p.nested >= 0.1:
        prefer("solov2-small", 2, f"{100 * p.nested:.0f} % of the objects lie within others: masks tell them apart")
        prefer("mask2former-small", 3, f"{100 * p.nested:.0f} % of the objects lie within others")
    if p.elongated >= 0.25:
        prefer("blendmask-small", 3, f"{100 * p.elongated:.0f} % of the objects are elongated: boxes fit them badly")
        prefer("solov2-small", 2, f"{100 * p.elongated:.0f} % of the objects are elongated: boxes fit them badly")
    if p.rough <= 0.12 and p.elongated <= 0.15:
        why = f"{100 * (1 - p.rough):.0f} % of the objects are simple blobs, which a contour describes"
        prefer("polarmask-small", 4, why)
        prefer("deepsnake-small", 3, why)
    if p.images >= 1000:
        prefer("mask2former-small", 4, f"{p.images} images are enough for queries")
    ranked = sorted(points.items(), key=lambda pair: -pair[1][0])
    return [(name, why) for name, (_, why) in ranked[:count]]


def _real(target: Instances) -> Instances:
    return target if target.crowd is None else target[~target.crowd]


def _areas(target: Instances) -> npt.NDArray[np.float64]:
    if target.masks is not None:
        return target.masks.areas().double().numpy()
    sides = (target.boxes[:, 2:] - target.boxes[:, :2]).double()
    return sides.prod(1).numpy()


def _overlaps(target: Instances) -> tuple[int, int]:
    """Numbers of objects that overlap one of their class by half, and that lie within another object."""
    if len(target) < 2:
        return 0, 0
    boxes = target.boxes.double().numpy()
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(-1), 1e-9)
    np.fill_diagonal(common, 0)
    same = (target.labels[:, None] == target.labels[None]).numpy()
    iou = common / (areas[:, None] + areas[None] - common)
    within = (common >= 0.9 * areas[:, None]) & (areas[None] > 1.5 * areas[:, None])
    return int(((iou >= 0.5) & same).any(1).sum()), int(within.any(1).sum())


def _shapes(targets: Sequence[Instances]) -> tuple[float, float]:
    """Fractions of elongated objects and of objects that are no simple blob, among some of them."""
    masked = [target for target in targets if target.masks is not None and len(target)]
    if not masked:
        return 0.0, 0.0
    each = max(1, _SHAPES // len(masked))
    long: list[bool] = []
    rough: list[bool] = []
    for target in masked:
        assert target.masks is not None
        step = max(1, len(target) // each)
        for crop in target.masks[slice(0, None, step)].crops()[1][:each]:
            plane = crop.numpy()
            y, x = np.nonzero(plane)
            if len(y) < 30:
                continue
            spread = np.linalg.eigvalsh(np.cov(np.stack([x, y])) + np.eye(2) / 12)
            long.append(bool(spread[1] >= 9 * spread[0]))
            # An ellipse with the same second moments covers a simple blob.
            rough.append(bool(len(y) < 0.8 * 4 * np.pi * np.sqrt(max(spread[0] * spread[1], 1e-9))))
    if not long:
        return 0.0, 0.0
    return float(np.mean(long)), float(np.mean(rough))


def as_profile(values: Mapping[str, Any]) -> DataProfile:
    """The profile from `DataProfile.to_dict`."""
    return DataProfile(**values)
