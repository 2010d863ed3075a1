"""PolarMask (Xie, Sun, Song, Wang, Liu, Liang, Shen, Luo, CVPR 2020, arXiv 1909.13226).

An instance is its contour in polar coordinates: a centre, and how far the contour is from there in 36 directions. So
instance segmentation is FCOS with a third branch: each place of the pyramid says its class and regresses 36 lengths, as
it regresses the four distances to the sides of a box. There is no mask decoder, and nothing is cut out of features.

Three things make it work: the places around an object's mass centre are its samples, not those around its box's centre;
Polar Centerness, sqrt(shortest ray / longest ray), plays down places that see the object lopsidedly; and Polar IoU
Loss, log(sum max / sum min), learns all rays together as one overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks import fcos
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.polar import (
    LONGEST,
    PolarHead,
    PolarRaw,
    PolarRules,
    Thresholds,
    polar_decode,
    polar_losses,
    polar_preprocess,
    polar_targets,
)
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.trunk import make_trunk
from maskwright.errors import UsageError
from maskwright.ops.contours import Border
from maskwright.structures import Instances, Placement
from maskwright.systems.base import Card, ClassRows, Preset, Score, System


@dataclass(frozen=True)
class RayCode:
    """A number for each ray: the logarithm of its length in pixels."""

    rays: int = 36

    @property
    def channels(self) -> int:
        return self.rays

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return values.float().clamp(max=LONGEST).exp()

    def encode(self, rays: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        return rays.log()


class PolarMask(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `before`."""

    name = "polarmask"
    card = Card(
        title="PolarMask",
        paper="Xie, Sun, Song, Wang, Liu, Liang, Shen, Luo: PolarMask: Single Shot Instance Segmentation with Polar "
        "Representation. CVPR 2020",
        arxiv="1909.13226",
        code="xieenze/PolarMask",
        code_licence="Apache-2.0 (LICENSE); 2-clause BSD for academic use, others contact the authors (README)",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        rays: int = 36,
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
        colours: str = "caffe",
        short: int = 800,
        long: int = 1333,
        canvas: Sequence[int] | None = None,
        multiple: int = 32,
    ):
        """
        rays            a divisor of 360 (table 2a: 18, 24, 36, 72)
        backbone        "resnet18" ... "resnet152", or "timm:NAME" for any of timm's with strides 4 to 32
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width, groups, group_width, stride_in, deform_stages, norm, norm_eps, frozen
                        the trunk's variants: see `blocks.resnet`. "group" trains from random weights and with small
                        batches; "frozen" is what the published weights have
        head_deform     all convolutions of the towers are deformable
        box_branch      without, a box is what its contour reaches (table 2e)
        sampling, centerness, mask_loss, border
                        see `blocks.polar.PolarRules` (tables 2b, 2c and 2d). border="pixels" is published; it hardly
                        learns small objects, nor anything in small images
        colours         what images are normalised by: "caffe", BGR means, or "imagenet", RGB means and deviations
        short, long     with `canvas` None: sides of the input, the image's shape kept
        canvas          (height, width) that every image is stretched to, as published: (768, 1280); upright images
                        too
        multiple        the padded input's sides are multiples of this, itself a multiple of 32
        """
        super().__init__()
        if rays < 3 or 360 % rays:
            raise UsageError(f"rays is {rays}; it must be a divisor of 360, at least 3")
        self.classes = tuple(classes)
        self.code = self.make_code(rays)
        self.rules = PolarRules(sampling=sampling, centerness=centerness, mask_loss=mask_loss, border=border)
        self.backbone, widths = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, groups=groups,
            group_width=group_width, stride_in=stride_in, deform_stages=deform_stages, norm=norm, norm_eps=norm_eps,
            frozen=frozen,
        )  # fmt: skip
        self.neck = FPN(widths[1:], neck_width, extra="output", relu="between")
        self.head = PolarHead(
            neck_width, len(self.classes), self.code.channels, convs=head_convs, deformable=head_deform,
            boxes=box_branch,
        )  # fmt: skip
        self.preprocess = polar_preprocess(colours, in_channels, short, long, canvas, multiple)

    def make_code(self, rays: int) -> Any:
        """What a place says of its rays: a `blocks.polar.Code`."""
        return RayCode(rays)

    def forward(self, images: Float[Tensor, "b c h w"]) -> PolarRaw:
        features = self.backbone(images)[1:]  # strides 8, 16, 32
        return self.head(self.neck(features))  # strides 8 ... 128

    def losses(self, raw: PolarRaw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class` (focal), `box` (-log IoU), `mask` (Polar IoU), `centerness`. Crowd regions are not learnt from.

        The published loader leaves objects out that are tiny in the original image (area at most 15, or both sides
        below 10); here that is the data set's business. One published quirk is not kept: nothing is learnt of an image
        all of whose mass centres lie in the first column.
        """
        places = fcos.locations(raw.classes)
        targets = [t if t.crowd is None else t[~t.crowd] for t in targets]
        found = [polar_targets(places, t, self.code.rays, self.rules) for t in targets]
        return polar_losses(raw, found, self.code, self.rules)

    def decode(
        self,
        raw: PolarRaw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        before: int = 1000,
    ) -> list[Instances]:
        """`before`: so many places of each level are looked at. Scores are class probability times (centerness + 0.5),
        so they can exceed 1; the threshold is on the probability alone."""
        limits = Thresholds.asked(score_threshold, nms_threshold, detections, before)
        return polar_decode(raw, placements, self.code, self.rules, limits)

    def groups(self) -> dict[str, list[nn.Module]]:
        return {"backbone": [self.backbone], "neck": [self.neck], "head": [self.head]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"head.classes.{kind}": ClassRows() for kind in ("weight", "bias")}

    # 16 images, a rate of 0.01 and twice that for biases. The 4-GPU configuration; the 32-GPU one has a rate of 0.04,
    # batches of 64, a warm-up of 2000 steps and two epochs more.
    _SGD: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "clip": 35.0, "rates": {"*.bias": 2.0}, "decay_norms": True, "warmup": 500, "warmup_from": 1 / 3,
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "polarmask-1x": {**_SGD, "epochs": 12, "milestones": (8 / 12, 11 / 12)},
        "polarmask-2x": {
            **_SGD, "batch": 32, "lr": 0.02, "epochs": 26, "milestones": (18 / 26, 24 / 26), "warmup": 2000,
            "warmup_from": 1 / 6, "short": tuple(range(640, 801, 32)), "long": 1333,
        },
    }  # fmt: skip

    _CAFFE: ClassVar[dict[str, Any]] = {
        "norm": "frozen", "frozen": 2, "border": "pixels", "stride_in": "1x1", "canvas": (768, 1280),
    }  # fmt: skip
    _R101: ClassVar[dict[str, Any]] = {**_CAFFE, "backbone": "resnet101"}
    _X101: ClassVar[dict[str, Any]] = {
        **_R101, "stride_in": "3x3", "groups": 64, "group_width": 4, "colours": "imagenet",
    }  # fmt: skip
    _DCN: ClassVar[dict[str, Any]] = {"deform_stages": (1, 2, 3), "head_deform": True}
    _2X: ClassVar[dict[str, Any]] = {"canvas": (800, 1333), "multiple": 128}
    _VAL = "COCO val2017, stretched to 768 x 1280, pycocotools"
    _VAL_2X = "COCO val2017, stretched to 800 x 1333, pycocotools"
    _TEST = "COCO test-dev, stretched to 768 x 1280"
    _README = "xieenze/PolarMask README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "polarmask-r50": Preset(
            _CAFFE, (Score(29.2, "mask AP", _VAL, _README),), "1x, 4 GPUs (28.9 in the configurations' own README)"
        ),
        "polarmask-r101": Preset(
            _R101, (Score(30.7, "mask AP", _VAL, _README), Score(30.4, "mask AP", _TEST, _README)), "1x"
        ),
        "polarmask-x101": Preset(
            _X101, (Score(32.5, "mask AP", _VAL, _README), Score(32.9, "mask AP", _TEST, _README)),
            "1x, ResNeXt-101 64x4d",
        ),
        "polarmask-r50-dcn": Preset({**_CAFFE, **_DCN}, (Score(32.0, "mask AP", _VAL, _README),), "1x"),
        "polarmask-r101-dcn": Preset({**_R101, **_DCN}, (Score(33.5, "mask AP", _VAL, _README),), "1x"),
        "polarmask-x101-dcn": Preset({**_X101, **_DCN}, (Score(34.9, "mask AP", _VAL, _README),), "1x"),
        "polarmask-r50-2x": Preset({**_CAFFE, **_2X}, (Score(30.5, "mask AP", _VAL_2X, _README),), "2x, several sizes"),
        "polarmask-r101-2x": Preset({**_R101, **_2X}, (Score(31.9, "mask AP", _VAL_2X, _README),), "2x, several sizes"),
        "polarmask-x101-2x": Preset({**_X101, **_2X}, (Score(33.5, "mask AP", _VAL_2X, _README),), "2x, several sizes"),
        "polarmask-r50-dcn-2x": Preset(
            {**_CAFFE, **_DCN, **_2X}, (Score(33.3, "mask AP", _VAL_2X, _README),), "2x, several sizes"
        ),
        "polarmask-r101-dcn-2x": Preset(
            {**_R101, **_DCN, **_2X}, (Score(34.3, "mask AP", _VAL_2X, _README),), "2x, several sizes"
        ),
        "polarmask-x101-dcn-2x": Preset(
            {**_X101, **_DCN, **_2X}, (Score(35.9, "mask AP", _VAL_2X, _README),), "2x, several sizes"
        ),
        "polarmask-small": Preset(
            {"backbone": "resnet18", "neck_width": 128, "head_convs": 2, "short": 320, "long": 512},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
