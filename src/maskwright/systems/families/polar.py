"""What systems with polar contours share: option groups, the network, the form of a code, and masks from contours.

PolarMask (arXiv 1909.13226) predicts, at every location of a feature pyramid, a class, its centerness, the distances to
the sides of the object's box, and a short code for the lengths of the rays from there to the object's contour in R
directions. The mask is the polygon through their ends. Systems differ in the code: anything that satisfies `Code`.

Coordinates count pixels from the centre of the first one, as in the published code: the last column of an image is
W - 1, and a box from x0 to x1 is x1 - x0 + 1 wide. Targets and results are converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskwright.blocks import fcos
from maskwright.blocks.backbones import Backbone, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.contours import Border
from maskwright.ops.outlines import fill_contours
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize

LONGEST = 14.0  # upper bound of the logarithm of a length in pixels, so that its exponential stays finite
Normalization = Literal["caffe", "imagenet"]


# ---- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolarHead(OptionGroup):
    """Pyramid and head, as options of a system.

    Attributes:
        width: Channels of the pyramid and the towers.
        convs: Convolutions of each tower.
        deformable: Whether these are deformable (arXiv 1811.11168).
        boxes: Whether there is a branch for boxes. Without it a box is the extent of its contour (PolarMask, table 2e).
    """

    label: ClassVar[str] = "head"

    width: int = 256
    convs: int = 4
    deformable: bool = False
    boxes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("width", 1), ("convs", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"head.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class PolarRules(OptionGroup):
    """Targets, loss and score of a polar system, as options; the papers compare them.

    Attributes:
        sampling: Whether the locations around an object's centre of mass or around its box's centre are its samples
            (PolarMask, section 3.2).
        centerness: "polar", sqrt(shortest / longest ray) (PolarMask, section 3.3); "normalised", that over its value at
            the centre of mass (FourierNet); "cartesian", FCOS's, computed from the box (PolarMask, table 2c).
        mask_loss: "polar_iou" (PolarMask, section 3.4); "smooth_l1" of the rays in pixels (table 2b); "code", smooth L1
            of the code.
        border: What rays intersect: the "pixels" of the border, as published, of which a small object has fewer than
            rays; or the closed "outline" through them (`ops.contours.rays_from`).
        offset: Added to the centerness before the class probability is multiplied by it.
        radius: Half the side of the square around a centre that holds an object's samples, in strides.
    """

    label: ClassVar[str] = "rules"

    sampling: Literal["mass", "box"] = "mass"
    centerness: Literal["polar", "normalised", "cartesian"] = "polar"
    mask_loss: Literal["polar_iou", "smooth_l1", "code"] = "polar_iou"
    border: Border = "outline"
    offset: float = 0.5
    radius: float = 1.5


PolarHeadLike = Mapping[str, Any] | PolarHead
PolarRulesLike = Mapping[str, Any] | PolarRules
BACKBONE, HEAD, RULES, RESIZE = Backbone(), PolarHead(), PolarRules(), Resize()  # defaults of the constructors

# Options of earlier versions, for `System.renamed_options`, and parameters, for `System.renamed_parameters`.
RENAMED_OPTIONS: Mapping[str, str | None] = {
    "neck_width": "head.width",
    "head_convs": "head.convs",
    "head_deform": "head.deformable",
    "box_branch": "head.boxes",
    "sampling": "rules.sampling",
    "centerness": "rules.centerness",
    "mask_loss": "rules.mask_loss",
    "border": "rules.border",
    "offset": "rules.offset",
    "colours": "normalization",
    "multiple": "resize.multiple",
}
RENAMED_PARAMETERS: Mapping[str, str] = {
    "backbone.": "dense.backbone.",
    "neck.": "dense.neck.",
    "head.": "dense.head.",
}

_PUBLISHED = {
    "caffe": Preprocess(
        resample="opencv", mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
    ),
    "imagenet": Preprocess(resample="opencv"),
}


def polar_preprocess(normalization: Normalization, resize: Resize, in_channels: int) -> Preprocess:
    """The published preprocessing with the changes of `resize`; images are stretched to a canvas.

    Raises:
        UsageError: If the multiple of the input's sides is not one of 32, which the pyramid needs.
    """
    published = _PUBLISHED[normalization]
    if resize.canvas is not None and resize.fit is None:
        resize = replace(resize, fit="stretch")
    preprocess = resize.apply(published, in_channels)
    if preprocess.multiple % 32:
        raise UsageError(f"resize.multiple must be a multiple of 32, got {preprocess.multiple}")
    return preprocess


# ---- network ---------------------------------------------------------------------------------------------------------


class Code(Protocol):
    """A representation of the rays of a location by a few numbers."""

    @property
    def channels(self) -> int:
        """Numbers per location."""
        ...

    @property
    def rays(self) -> int:
        """Rays per location; a divisor of 360."""
        ...

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n r"]:
        """The lengths of the rays in pixels, in float32; differentiable."""
        ...

    def encode(self, rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n c"]:
        """The code that is closest to these lengths."""
        ...


@dataclass(frozen=True)
class PolarRaw:
    """Raw output of every location, by level, finest first.

    Attributes:
        classes: Logits.
        centerness: Logits.
        boxes: Logarithms of l, t, r, b in pixels; empty without a branch for boxes.
        codes: The code of the rays.
    """

    classes: tuple[Float[Tensor, "b k _h _w"], ...]
    centerness: tuple[Float[Tensor, "b 1 _h _w"], ...]
    boxes: tuple[Float[Tensor, "b 4 _h _w"], ...]
    codes: tuple[Float[Tensor, "b c _h _w"], ...]


class PolarDense(nn.Module):
    """Backbone, FPN with levels of strides 8 to 128, and the head on every level (PolarMask, figure 2)."""

    def __init__(self, backbone: nn.Module, head: PolarHead, classes: int, code: Code):
        """
        Args:
            backbone: With levels of strides 8, 16 and 32.
            head: Options of pyramid and head.
            classes: Number of classes.
            code: Between the network's output and rays.
        """
        super().__init__()
        levels = levels_of(backbone)
        self.backbone = backbone
        self.read = levels.indices(fcos.STRIDES[:3])
        self.neck = FPN([levels.channels[i] for i in self.read], head.width, extra="output", relu="between")
        self.head = PolarBranches(head, classes, code)

    def forward(self, images: Float[Tensor, "b c h w"]) -> PolarRaw:
        features = self.backbone(images)
        return self.head(self.neck([features[i] for i in self.read]))


class PolarBranches(nn.Module):
    """Three towers over all levels: class and centerness, box, code; the last two have a learned factor per level."""

    def __init__(self, options: PolarHead, classes: int, code: Code, levels: int = len(fcos.STRIDES)):
        super().__init__()
        width, boxes = options.width, options.boxes
        first = fcos.START * fcos.STRIDES[0]  # pixels; on all levels, which have their factors

        def tower() -> nn.Sequential:
            return fcos.tower(width, options.convs, bias=False, deformable=options.deformable)

        self.class_tower, self.code_tower = tower(), tower()
        self.box_tower = tower() if boxes else None
        self.classes = fcos.output_conv(width, classes, bias=-math.log(99))  # a probability of 0.01
        self.centerness = fcos.output_conv(width, 1)
        self.boxes = fcos.output_conv(width, 4, math.log(first)) if boxes else None
        self.codes = fcos.output_conv(width, code.channels, code.encode(torch.full((code.rays,), first)))
        self.box_scales = nn.ModuleList(fcos.Scale() for _ in range(levels if boxes else 0))
        self.code_scales = nn.ModuleList(fcos.Scale() for _ in range(levels))

    def forward(self, features: Sequence[Float[Tensor, "b c _h _w"]]) -> PolarRaw:
        classes, centerness, boxes, codes = [], [], [], []
        for level, feature in enumerate(features):
            tower = self.class_tower(feature)
            classes.append(self.classes(tower))
            centerness.append(self.centerness(tower))
            if self.box_tower is not None and self.boxes is not None:
                boxes.append(self.box_scales[level](self.boxes(self.box_tower(feature))))
            codes.append(self.code_scales[level](self.codes(self.code_tower(feature))))
        return PolarRaw(tuple(classes), tuple(centerness), tuple(boxes), tuple(codes))


# ---- masks from contours ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolarDetections:
    """Objects of one image, best first, in pixels of the image, counted from the centre of the first one.

    Attributes:
        boxes: x0, y0, x1, y1; the last pixels are included.
        scores: Class probability times (centerness + offset).
        labels: Class indices.
        contours: The ends x, y of the rays.
    """

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    contours: Float[Tensor, "d r 2"]


def polar_instances(detections: PolarDetections, placement: Placement) -> Instances:
    """Fills the contours, each on the pixels of its own box, and converts boxes to continuous coordinates."""
    size = placement.image_size
    masks = fill_contours(detections.contours, size)
    boxes = box_ops.clip(with_last_pixel(detections.boxes), size)
    return Instances(size, boxes, detections.labels, masks, detections.scores)


def with_last_pixel(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Converts boxes that include their last pixels to continuous coordinates."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def pixels_on_image(points: Float[Tensor, "*n 2"], placement: Placement) -> Float[Tensor, "*n 2"]:
    """Converts pixel coordinates of the input to those of the image; like the published code, without the half pixel by
    which resizing shifts them."""
    points = placement.points_to_image(points)
    return points - points.new_tensor([1, 0]) if placement.mirrored else points


def rows_of(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "n c"]:
    """One row per location in float32: all of the first image, level by level, then those of the second image."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).flatten(0, 1).float()
