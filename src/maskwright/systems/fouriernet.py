"""FourierNet (Riaz, Benbarka, Zell, ICPR 2020, arXiv 2002.02709).

PolarMask predicts the lengths of rays, each for itself. Here the shape branch predicts Fourier coefficients of the
logarithm of the rays; an inverse transform and an exponential make rays of them, and Polar IoU is asked of these. So
the network is never told what coefficients to give: the decoder is differentiable. A smooth contour needs few of them:
low frequencies draw the shape, further ones refine it, and some may be left away after training.

What is read of K complex coefficients for N rays: bins 0 ... N / 2, the imaginary parts of the first and last excepted.
With the published 36 for 60 rays that is 60 numbers, so nothing is saved; for 90 rays it is 71.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from maskwright.blocks.layers import Norm
from maskwright.blocks.polar import LONGEST, PolarRaw, Thresholds, polar_decode
from maskwright.blocks.resnet import StrideIn
from maskwright.errors import UsageError
from maskwright.ops.contours import Border, fourier_coefficients, fourier_rays
from maskwright.structures import Instances, Placement
from maskwright.systems.base import Card, Preset, Score
from maskwright.systems.polarmask import PolarMask


@dataclass(frozen=True)
class FourierCode:
    """The first `coefficients` of the Fourier transform of the rays' logarithm: real and imaginary part in turn.

    visible  only so many are read; None: all
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
    """See the module's text; all that is not here is PolarMask's. `decode` takes `score_threshold`, `nms_threshold`,
    `detections`, `before`, `visible`."""

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
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        groups: int = 1,
        group_width: int = 64,
        stride_in: StrideIn = "3x3",
        deform_stages: Sequence[int] = (),
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        head_convs: int = 4,
        head_deform: bool = False,
        box_branch: bool = True,
        sampling: str = "mass",
        centerness: str = "polar",
        mask_loss: str = "polar_iou",
        border: Border = "outline",
        offset: float = 0.5,
        colours: str = "caffe",
        short: int = 800,
        long: int = 1333,
        canvas: Sequence[int] | None = None,
        multiple: int = 32,
    ):
        """
        coefficients    complex ones, two channels each
        rays            a divisor of 360, at least as many as there are coefficients
        backbone        "resnet18" ... "resnet152", or "timm:NAME" for any of timm's with strides 4 to 32
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width, groups, group_width, stride_in, deform_stages, norm, norm_eps, frozen
                        the trunk's variants: see `blocks.resnet`. "group" trains from random weights and with small
                        batches; "frozen" is what the published weights have
        head_deform     all convolutions of the towers are deformable
        box_branch      without, a box is what its contour reaches
        sampling, centerness, mask_loss, border, offset
                        see `blocks.polar.PolarRules`. mask_loss="code" asks for the coefficients themselves, the way of
                        learning that the paper compares with. (The published code asks for those of the rays and
                        decodes them as those of the rays' logarithm; here both are the logarithm's.)
        colours, short, long, canvas, multiple
                        preprocessing, as in PolarMask; published with the images' shape kept
        """
        if not 1 <= coefficients <= rays:
            raise UsageError(f"coefficients is {coefficients}; {rays} rays have 1 to {rays}")
        own = ("coefficients", "offset")
        super().__init__(**{name: value for name, value in self.options.items() if name not in own})
        self.rules = replace(self.rules, offset=offset)

    def make_code(self, rays: int) -> FourierCode:
        return FourierCode(int(self.options["coefficients"]), rays)

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
        """`before`: so many places of each level are looked at; `visible`: only so many coefficients are read, from the
        lowest frequency on. Scores are class probability times (centerness + 0.5), so they can exceed 1; the threshold
        is on the probability alone."""
        if visible is not None and not 1 <= visible <= self.code.coefficients:
            raise UsageError(f"visible is {visible}; this network gives {self.code.coefficients} coefficients")
        limits = Thresholds.asked(score_threshold, nms_threshold, detections, before)
        code = FourierCode(self.code.coefficients, self.code.rays, visible)
        return polar_decode(raw, placements, code, self.rules, limits)

    _SGD: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "clip": 35.0, "rates": {"*.bias": 2.0}, "decay_norms": True, "warmup": 500, "warmup_from": 1 / 3,
        "epochs": 12, "milestones": (8 / 12, 11 / 12),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fouriernet-1x": {**_SGD, "short": (640, 800), "long": 1333},
        "fouriernet-1x-half": {**_SGD, "short": (320, 400), "long": 666},  # as its ResNeXt-101 was trained
    }

    _R50: ClassVar[dict[str, Any]] = {
        "norm": "frozen", "frozen": 2, "border": "pixels", "stride_in": "1x1", "rays": 60,
    }  # fmt: skip
    _PLOT = "figure in the README of cogsys-tuebingen/FourierNet, read off by eye"
    _VAL = "COCO val2017, short side 800, long side at most 1333, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fouriernet-r50": Preset(_R50, (Score(28.0, "mask AP", _VAL, _PLOT),), "36 coefficients for 60 rays, 1x"),
        "fouriernet-x101": Preset(
            {
                "backbone": "resnet101", "groups": 64, "group_width": 4, "norm": "frozen", "frozen": 2,
                "border": "pixels", "rays": 90,
            },
            (Score(30.6, "mask AP", "COCO, the paper's best model", "arXiv 2002.02709 v2, abstract"),),
            "36 coefficients for 90 rays, ResNeXt-101 64x4d; its configuration names Caffe's colours",
        ),
        "fouriernet-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "head_convs": 2, "coefficients": 18, "rays": 60,
                "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
