"""FourierNet (Riaz, Benbarka, Zell, ICPR 2020, arXiv 2002.02709).

PolarMask predicts the length of each ray separately. Here the shape branch predicts Fourier coefficients of the
logarithm of the rays; an inverse transform and an exponential convert them to rays, of which Polar IoU is computed. The
decoder is differentiable, so that there are no targets for the coefficients. A smooth contour needs few of them: low
frequencies give the coarse shape, further ones refine it, and some may be dropped after training.

Of K complex coefficients for N rays the bins 0 ... N / 2 are used, of the first and last one only the real part. With
the published 36 for 60 rays these are 60 numbers, which is no compression; for 90 rays they are 71.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from maskwright.blocks.backbones import BackboneLike
from maskwright.errors import UsageError
from maskwright.ops.contours import fourier_coefficients, fourier_rays
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.polar import (
    BACKBONE,
    HEAD,
    LONGEST,
    RESIZE,
    RULES,
    Normalization,
    PolarHeadLike,
    PolarRaw,
    PolarRulesLike,
)
from maskwright.systems.polarmask import PolarMask, Thresholds, polar_decode


@dataclass(frozen=True)
class FourierCode:
    """The first Fourier coefficients of the logarithm of the rays, as interleaved real and imaginary parts.

    Attributes:
        coefficients: Number of complex coefficients.
        rays: Number of rays.
        visible: Number of coefficients that are used, lowest frequencies first; None for all.
    """

    coefficients: int = 36
    rays: int = 60
    visible: int | None = None

    @property
    def channels(self) -> int:
        return 2 * self.coefficients

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n r"]:
        return fourier_rays(values.unflatten(-1, (self.coefficients, 2))[..., : self.visible, :], self.rays, LONGEST)

    def encode(self, rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n c"]:
        return fourier_coefficients(rays, self.coefficients).flatten(-2)


class FourierNet(PolarMask):
    """PolarMask with Fourier coefficients as code; see the module."""

    name = "fouriernet"
    card = Card(
        title="FourierNet",
        paper="Riaz, Benbarka, Zell: FourierNet: Compact Mask Representation for Instance Segmentation Using "
        "Differentiable Shape Decoders. ICPR 2020",
        arxiv="2002.02709",
        code="cogsys-tuebingen/FourierNet",
        code_licence="Apache-2.0 (LICENSE); 2-clause BSD for academic use, others contact the authors (README)",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        coefficients: int = 36,
        rays: int = 90,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        head: PolarHeadLike = HEAD,
        rules: PolarRulesLike = RULES,
        normalization: Normalization = "caffe",
        resize: ResizeLike = RESIZE,
    ):
        """
        Args:
            classes: Class names.
            coefficients: Number of complex coefficients, of two channels each.
            rays: Number of rays, a divisor of 360 and at least `coefficients`.
            backbone: With levels of strides 8, 16 and 32.
            in_channels: Channels of the image.
            head: Pyramid and head, see `PolarHead`.
            rules: Targets, loss and score, see `PolarRules`. mask_loss="code" has the coefficients as targets, which
                the paper compares with. (The published code takes the coefficients of the rays as targets and decodes
                them as those of their logarithm; here both are those of the logarithm.)
            normalization: "caffe", means in BGR, or "imagenet", means and standard deviations in RGB.
            resize: Published: short side 800, long side at most 1333.
        """
        if not 1 <= coefficients <= rays:
            raise UsageError(f"coefficients must be between 1 and the number of rays, {rays}, got {coefficients}")
        super().__init__(
            classes, rays=rays, backbone=backbone, in_channels=in_channels, head=head, rules=rules,
            normalization=normalization, resize=resize,
        )  # fmt: skip

    def make_code(self, rays: int) -> FourierCode:
        return FourierCode(self.options["coefficients"], rays)

    def decode(
        self,
        raw: PolarRaw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        before: int = 1000,
        visible: int | None = None,
    ) -> list[Instances]:
        """Selects objects as PolarMask does.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of the class probability; of the score too if above 0.05. Scores are class
                probability times (centerness + 0.5) and can exceed 1.
            nms_threshold: IoU from which a box is suppressed by a better one of its class.
            detections: Maximum number of objects per image.
            before: Number of locations per level that are considered.
            visible: Number of coefficients that are used, lowest frequencies first; None for all.

        Raises:
            UsageError: If `visible` is not between 1 and the number of coefficients.
        """
        count = self.options["coefficients"]
        if visible is not None and not 1 <= visible <= count:
            raise UsageError(f"visible must be between 1 and {count}, the number of coefficients, got {visible}")
        limits = Thresholds.requested(score_threshold, nms_threshold, detections, before)
        return polar_decode(raw, placements, FourierCode(count, self.code.rays, visible), self.rules, limits)

    _SGD: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "clip": 35.0, "rates": {"*.bias": 2.0}, "decay_norms": True, "warmup": 500, "warmup_from": 1 / 3,
        "epochs": 12, "milestones": (8 / 12, 11 / 12),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fouriernet-1x": {**_SGD, "short": (640, 800), "long": 1333},
        "fouriernet-1x-half": {**_SGD, "short": (320, 400), "long": 666},  # how its ResNeXt-101 was trained
    }

    _PLOT = "figure in the README of cogsys-tuebingen/FourierNet, read by eye"
    _VAL = "COCO val2017, short side 800, long side at most 1333, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fouriernet-r50": Preset(
            {
                "backbone": {"name": "resnet50", "norm": "frozen", "frozen": 2, "stride_in": "1x1"},
                "rules": {"border": "pixels"}, "rays": 60,
            },
            (Score(28.0, "mask AP", _VAL, _PLOT),), "36 coefficients for 60 rays, 1x",
        ),
        "fouriernet-x101": Preset(
            {
                "backbone": {"name": "resnet101", "norm": "frozen", "frozen": 2, "groups": 64, "group_width": 4},
                "rules": {"border": "pixels"}, "rays": 90,
            },
            (Score(30.6, "mask AP", "COCO, the paper's best model", "arXiv 2002.02709 v2, abstract"),),
            "36 coefficients for 90 rays, ResNeXt-101 64x4d; its configuration states Caffe's normalization",
        ),
        "fouriernet-small": Preset(
            {
                "backbone": "resnet18", "head": {"width": 128, "convs": 2}, "coefficients": 18, "rays": 60,
                "resize": {"short": 320, "long": 512},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
