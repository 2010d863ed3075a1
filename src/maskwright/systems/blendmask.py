"""BlendMask (Chen, Sun, Tian, Shen, Huang, Yan, CVPR 2020, arXiv 2001.00309).

FCOS detects boxes and predicts, at every location, a small attention map for each of K bases. A bottom module predicts
the K bases, maps of the whole image at stride 4. For each detection the bases are pooled inside the box, and blended:
the attention maps are enlarged to their size and normalised over the bases at every pixel, and the weighted sum is the
mask. YOLACT is the case of attention without extent, FCIS that of fixed attention.

    image -> backbone -> pyramid, strides 8 ... 128 -> FCOS -> boxes, attention K x M x M of each
                                 strides 8 ... 32 -> convolutions -> K bases, stride 4
    mask = sigmoid(sum over K of softmax(attention, enlarged to R x R) * RoIAlign R x R of the bases)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks import fcos
from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.pooling import as_rois, roi_align
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.families.fcos import FCOSSystem, HeadOptions, Located, Raw, per_image
from maskwright.systems.system import ClassRows, Output

HEAD = HeadOptions(scales=False)
BACKBONE, RESIZE = Backbone("resnet50"), Resize()
LEVELS = 3  # levels that the bottom module reads: strides 8, 16 and 32
STRIDE = 4  # of the bases
SEMANTIC_STRIDE = 8  # of the auxiliary segmentation


@dataclass(frozen=True)
class BlendOptions(OptionGroup):
    """Bases and blending, as options of a system.

    Attributes:
        bases: Number of bases, K.
        attention: Side of the attention maps, M.
        side: Side of the masks, R.
        convs: Convolutions of the bottom module before its upsampling.
        width: Their channels.
        norm: Normalisation of the bottom module.
        semantic_weight: Weight of the auxiliary segmentation of objects; 0: it is not built.
    """

    label: ClassVar[str] = "blend"

    bases: int = 4
    attention: int = 14
    side: int = 56
    convs: int = 3
    width: int = 128
    norm: Norm = "batch"
    semantic_weight: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("bases", 1), ("attention", 1), ("side", 1), ("convs", 1), ("width", 1),
                            ("semantic_weight", 0)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise UsageError(f"blend.{name} must be at least {least}, got {getattr(self, name)}")


BLEND = BlendOptions()


class BottomModule(nn.Module):
    """The bases: levels of strides 8, 16 and 32, brought to stride 8 and added, then convolutions and upsampling.

    Args:
        channels: Channels of the levels.
        options: Number of bases, convolutions, channels and normalisation.
    """

    def __init__(self, channels: int, options: BlendOptions):
        super().__init__()

        def conv(channels_in: int) -> ConvNorm:
            layer = ConvNorm(channels_in, options.width, 3, norm=options.norm, relu=True)
            nn.init.kaiming_normal_(layer.conv.weight, mode="fan_out", nonlinearity="relu")
            return layer

        self.refine = nn.ModuleList(conv(channels) for _ in range(LEVELS))
        self.before = nn.Sequential(*(conv(options.width) for _ in range(options.convs)))
        self.after = conv(options.width)
        self.bases = nn.Conv2d(options.width, options.bases, 1)

    def forward(self, levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b k h w"]:
        """Computes the bases at half the stride of the first level."""
        x = self.refine[0](levels[0])
        for refine, level in zip(self.refine[1:], levels[1:LEVELS], strict=True):
            x = x + functional.interpolate(refine(level), x.shape[2:], mode="bilinear", align_corners=False)
        x = functional.interpolate(self.before(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.bases(self.after(x))


def semantic_head(channels: int, outputs: int, width: int, norm: Norm) -> nn.Sequential:
    """Two convolutions and an output layer: the auxiliary segmentation, which is used in training alone."""
    first, second = (ConvNorm(c, width, 3, norm=norm, relu=True) for c in (channels, width))
    return nn.Sequential(first, second, nn.Conv2d(width, outputs, 1))


class BlendMask(FCOSSystem):
    """BlendMask. Its networks are `dense`, `bases` and, for training, `semantic`."""

    name = "blendmask"
    card = Card(
        title="BlendMask",
        paper="Chen, Sun, Tian, Shen, Huang, Yan: BlendMask: Top-Down Meets Bottom-Up for Instance Segmentation. "
        "CVPR 2020",
        arxiv="2001.00309",
        code="aim-uofa/AdelaiDet",
        code_licence="non-commercial",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        levels: int = 5,
        head: Mapping[str, Any] | HeadOptions = HEAD,
        blend: Mapping[str, Any] | BlendOptions = BLEND,
        radius: float | None = 1.5,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, see `Backbone`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            neck_width: Channels of the pyramid and of the towers.
            levels: Number of pyramid levels, from stride 8 on: 5, 4 or 3.
            head: The towers of FCOS, see `HeadOptions`.
            blend: Bases and blending, see `BlendOptions`.
            radius: Half the side of the square around an object's centre in which locations are positive, in strides;
                None: the whole box.
        """
        own = BlendOptions.read(blend, BLEND)
        super().__init__(
            classes, backbone=Backbone.read(backbone, BACKBONE), in_channels=in_channels,
            resize=Resize.read(resize, RESIZE), neck_width=neck_width, levels=levels,
            head=HeadOptions.read(head, HEAD), rules="adelaidet", radius=radius,
            top=own.bases * own.attention**2,
        )  # fmt: skip
        self.blend = own
        self.bases = BottomModule(neck_width, own)
        self.semantic = None
        if own.semantic_weight:
            self.semantic = semantic_head(neck_width, len(self.classes) + 1, own.width, own.norm)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes", "masks"})

    def pooled(
        self, bases: Float[Tensor, "b k h w"], boxes: Sequence[Float[Tensor, "_n 4"]]
    ) -> Float[Tensor, "r k s s"]:
        """The bases inside boxes of each image, in pixels of the input."""
        return roi_align(bases, as_rois(list(boxes)).to(bases), self.blend.side, 1 / STRIDE, 1, True)

    def blended(self, pooled: Float[Tensor, "r k s s"], attention: Float[Tensor, "r d"]) -> Float[Tensor, "r s s"]:
        """Logits of masks: the bases weighted by the attention (section 3.2)."""
        maps = attention.float().unflatten(1, (self.blend.bases, self.blend.attention, self.blend.attention))
        size = pooled.shape[-2:]
        weights = functional.interpolate(maps, size, mode="bilinear", align_corners=False).softmax(1)
        return (weights * pooled.float()).sum(1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class`, `box`, `centerness`, `mask` and `semantic`. Crowd regions are ignored.

        The mask of every positive location is blended inside the box of its object and weighted by its centerness.
        """
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.logits[0].device) for t in targets]
        assigned = self.assign(raw, targets)
        terms = self.location_losses(raw, assigned)
        image, place = assigned.positive.nonzero().unbind(1)
        counts = [len(t) for t in targets]
        first = torch.tensor([0, *counts], device=image.device).cumsum(0)
        owner = assigned.owner[image, place] + first[image]  # objects are numbered across images
        weights = fcos.centerness(assigned.distances[image, place])
        bases = self.bases(raw.features)
        pooled = self.pooled(bases, [t.boxes for t in targets])
        attention = per_image(raw.top)[image, place]
        truth = torch.cat([_targets(t, self.blend.side) for t in targets])
        logits = self.blended(pooled[owner], attention)
        entropy = functional.binary_cross_entropy_with_logits(logits, truth[owner], reduction="none").mean((1, 2))
        empty = bases.sum() * 0 + sum((top.sum() for top in raw.top), bases.new_zeros(())) * 0
        terms["mask"] = (entropy * weights).sum() / global_mean_count(weights.sum(), 1e-6) + empty
        if self.semantic is not None:
            scores = self.semantic(raw.features[0]).float()
            labels = torch.stack([label_grid(t, SEMANTIC_STRIDE, scores.shape[2:]) for t in targets])
            terms["semantic"] = self.blend.semantic_weight * functional.cross_entropy(scores, labels.to(scores.device))
        return terms

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        detections: int = 100,
        mask_threshold: float = 0.5,
        candidates: int = 1000,
    ) -> list[Instances]:
        """Detects objects.

        Args:
            raw: Output of the dense network.
            placements: How each image was placed in the input.
            score_threshold: Scores must be above it; up to 0.05, their squares must be above it.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            mask_threshold: Probability from which on a pixel belongs to the mask.
            candidates: (location, class) pairs of a level that are kept before suppression.
        """
        sizes = [p.size for p in placements]
        found = self.find(raw, sizes, score_threshold, nms_threshold, detections, candidates, "product")
        masks = self.read_boxes(raw, found)
        rows = zip(found, placements, masks, strict=True)
        return [self.on_image(*row, mask_threshold) for row in rows]

    @torch.no_grad()
    def read_boxes(self, raw: Raw, found: Sequence[Located]) -> list[Float[Tensor, "_n s s"]]:
        """The masks of the detections of each image inside their boxes, as probabilities."""
        attention = per_image(raw.top)
        chosen = torch.cat([attention[image, own.places] for image, own in enumerate(found)])
        pooled = self.pooled(self.bases(raw.features), [own.boxes for own in found])
        return list(self.blended(pooled, chosen).sigmoid().split([len(own.boxes) for own in found]))

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows = dict(super().class_rows())
        if self.semantic is not None:
            rows |= {f"semantic.2.{kind}": ClassRows(before=1) for kind in ("weight", "bias")}
        return rows

    _CAFFE: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _HOW = "COCO val2017, short side 800, pycocotools"
    _README = "README of AdelaiDet's BlendMask"
    presets: ClassVar[Mapping[str, Preset]] = {
        "blendmask-r50": Preset(
            {"backbone": _CAFFE},
            (Score(42.7, "box AP", _HOW, _README), Score(37.8, "mask AP", _HOW, _README)),
            "AdelaiDet's R_50_3x (1x: 39.9 / 35.8)",
        ),
        "blendmask-r101": Preset(
            {"backbone": {"name": "resnet101", **_CAFFE}},
            (Score(44.8, "box AP", _HOW, _README), Score(39.5, "mask AP", _HOW, _README)),
            "AdelaiDet's R_101_3x",
        ),
        "blendmask-r101-dcn": Preset(
            {
                "backbone": {
                    "name": "resnet101", **_CAFFE, "deform_stages": (1, 2, 3), "deform_modulated": True,
                    "deform_every": 3,
                },
            },
            (Score(46.8, "box AP", _HOW, _README), Score(41.1, "mask AP", _HOW, _README)),
            "AdelaiDet's R_101_dcni3_5x",
        ),
        "blendmask-550-r50": Preset(
            {
                "backbone": _CAFFE, "resize": {"short": 550, "long": 916}, "levels": 4,
                "head": {"shared": 3, "classes": 0, "boxes": 0}, "blend": {"convs": 2},
            },
            (
                Score(38.7, "box AP", "COCO val2017, short side 550, pycocotools", _README),
                Score(34.5, "mask AP", "COCO val2017, short side 550, pycocotools", _README),
            ),
            "AdelaiDet's 550_R_50_3x",
        ),
        "blendmask-rt-r50": Preset(
            {
                "backbone": {"norm": "batch", "stride_in": "1x1"}, "resize": {"short": 512, "long": 736}, "levels": 3,
                "head": {"shared": 3, "classes": 0, "boxes": 0}, "blend": {"convs": 2},
            },
            (
                Score(39.3, "box AP", "COCO val2017, short side 512, pycocotools", _README),
                Score(35.1, "mask AP", "COCO val2017, short side 512, pycocotools", _README),
            ),
            "AdelaiDet's RT_R_50_4x",
        ),
        "blendmask-rt-dla34": Preset(
            {
                "backbone": {"name": "dla34", "norm": "batch"}, "resize": {"short": 512, "long": 736}, "levels": 3,
                "blend": {"convs": 2},
            },
            (
                Score(40.8, "box AP", "COCO val2017, short side 512, pycocotools", _README),
                Score(36.3, "mask AP", "COCO val2017, short side 512, pycocotools", _README),
            ),
            "AdelaiDet's DLA_34_4x",
        ),
        "blendmask-small": Preset(
            {
                "backbone": {"name": "resnet18", "norm": "group"}, "resize": {"short": 320, "long": 512},
                "neck_width": 128, "head": {"classes": 2, "boxes": 2},
                "blend": {"width": 64, "norm": "group", "attention": 7},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "attention": Ablation(
            "side of the attention maps, M (table of arXiv 2001.00309); M = 1 is YOLACT's combination with softmax",
            {f"M = {side}": {"blend": {"attention": side}} for side in (1, 4, 7, 14)},
            {}, "figures of arXiv 2001.00309 are not included",
            {
                "backbone": {"name": "resnet18", "width": 32, "norm": "group"}, "resize": {"short": 160, "long": 160},
                "neck_width": 64, "head": {"classes": 2, "boxes": 2}, "blend": {"width": 64, "norm": "group"},
            },
            {"size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4},
            {"lr": 1e-3, "warmup": 50, "ema": 0.99},
        ),
    }  # fmt: skip


def _targets(target: Instances, side: int) -> Float[Tensor, "n s s"]:
    """The mask of each object inside its own box."""
    owners = torch.arange(len(target), device=target.boxes.device)
    assert target.masks is not None  # `System.needs`
    return mask_targets(target.masks, owners, target.boxes, side)


def label_grid(target: Instances, stride: int, size: Sequence[int]) -> Int[Tensor, "h w"]:
    """Labels of the pixels (i * stride, j * stride), on the host: 0 for background, label + 1 inside of an object, of
    several the last one."""
    plane = torch.zeros(size[0], size[1], dtype=torch.int64)
    assert target.masks is not None  # `System.needs`
    frames, crops = target.masks.crops()
    for (x0, y0, x1, y1), crop, label in zip(frames.tolist(), crops, target.labels.tolist(), strict=True):
        left, top, right, bottom = (-(-side // stride) for side in (x0, y0, x1, y1))  # the first cells not before them
        part = crop[top * stride - y0 :: stride, left * stride - x0 :: stride].to(plane.device)
        window = plane[top:bottom, left:right]
        window[part[: window.shape[0], : window.shape[1]].bool()] = label + 1
    return plane
