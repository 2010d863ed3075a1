"""DeepMask: Learning to Segment Object Candidates (Pinheiro, Collobert, Dollár, NIPS 2015, arXiv 1506.06204).

A network looks at a patch of an image and says two things: the mask of the object in its middle, and whether there is
one at all, centred and of the right size. The mask is linear in a feature of few numbers, which are linear in the whole
patch, so that every pixel of it sees every place. Over an image the same network is applied as a convolution: each
place of each level of a pyramid of resized images is the middle of a window, and gives a mask and a score. Objects
have no class.

What is here is also the network of the released code, which is younger: a ResNet-50, borders mirrored, and one feature
for mask and score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import Border, Norm, set_border
from maskwright.blocks.sliding import (
    Windows,
    assign,
    checked_scales,
    inputs_of,
    logit_of,
    own_places,
    proposals,
    pyramid,
    reachable,
    resized,
    scales_between,
    shares_norms,
    windows_of,
)
from maskwright.blocks.trunk import make_stem, normalization_for
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import soft_margin
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.matching import sample
from maskwright.ops.window_tensors import MaskTensor
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import Card, Preset, ProposalSystem, Score

GREY = 0.5  # what lies around an image, before normalising
STRIDE = 16


@dataclass(frozen=True)
class Raw:
    """What the network says of every window of every level, and what their masks are linear in."""

    scores: tuple[Float[Tensor, "b 1 _h _w"], ...]  # logits
    features: tuple[Float[Tensor, "b c _h _w"], ...]
    size: tuple[int, int]  # H, W of the input
    there: tuple[Bool[Tensor, "b 1 _h _w"], ...] = ()  # which windows a smaller image of a batch has; none said: all


class DeepMask(ProposalSystem):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold` (None: as published, no suppression),
    `detections`, `mask_threshold`, `candidates`."""

    grey: Tensor
    name = "deepmask"
    sees_padding = True
    card = Card(
        title="DeepMask",
        paper="Pinheiro, Collobert, Dollár: Learning to Segment Object Candidates. NIPS 2015",
        arxiv="1506.06204",
        code="facebookresearch/deepmask",
        code_licence="BSD-3-Clause with a patent grant",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        stride: int = STRIDE,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        border: Border = "zeros",
        window: int = 160,
        canonical: float | None = None,
        context: int = 1,
        neck_width: int = 128,
        feature_width: int = 512,
        mask_side: int = 56,
        label_side: int = 112,
        score_width: int = 1024,
        score_pooled: bool = False,
        dropout: float = 0.5,
        scales: Sequence[float] = scales_between(-2.5, 0.5, 0.5),
        shift: float | None = None,
        margin: float | None = None,
        octaves: float = 0.25,
        sampled: int = 256,
        score_weight: float = 1 / 32,
        short: int | None = None,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone ... frozen  the trunk up to `stride`, see `blocks.trunk.make_stem`
        border        how convolutions go on beyond a border: "zeros"; "symmetric", as the released Torch 7 code;
                      "reflect", as its PyTorch port, whose first layer is symmetric all the same
        window        side of a window in pixels of its level, a multiple of the stride
        canonical     longer side of an object that fits a window; None: 128 / 224 of the window, as published
        context       places around a window that a patch shows besides, for `patches`
        feature_width numbers that a mask is linear in
        mask_side     masks are predicted on mask_side ** 2 cells, and learnt on label_side ** 2 (corners aligned)
        score_width   of the hidden layer of the score
        score_pooled  the score has a feature of its own, of places pooled 2 x 2 (2015); otherwise it shares the mask's
        scales        of the pyramid: pixels of a level per pixel of the input
        shift, margin a window is positive whose object's centre is at most `shift` pixels of the level away, in x and
                      y, negative where none is within `margin`; None: 16 and 48 of 160
        octaves       and whose longer side is within 2 ** octaves of `canonical`
        sampled       at most so many positive windows of an image learn their masks, chosen at random
        score_weight  of the score's loss beside the mask's
        short, long   size of the input; None: the image's own
        """
        super().__init__()
        if window < 1 or window % (2 * stride):
            raise UsageError(f"window is {window} pixels; it must be a multiple of two places, {2 * stride} pixels")
        if not 0 <= dropout <= 1:
            raise UsageError(f"dropout is {dropout}; expected a share between 0 and 1")
        self.classes = self.checked_classes(classes)
        self.window, self.stride, self.context = window, stride, context
        self.canonical = float(canonical or math.ceil(window * 128 / 224))
        self.mask_side, self.label_side = mask_side, label_side
        self.scales = checked_scales(scales)
        self.shift = window / 10 if shift is None else shift
        self.margin = window * 0.3 if margin is None else margin
        self.octaves, self.sampled, self.score_weight = octaves, sampled, score_weight

        self.backbone, channels = make_stem(
            backbone, stride, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, norm=norm,
            norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        set_border(self.backbone, border)
        cells = window // stride
        self.squeeze = nn.Conv2d(channels, neck_width, 1)
        self.feature = nn.Conv2d(neck_width, feature_width, cells)
        self.masks = nn.Conv2d(feature_width, mask_side**2, 1)
        # Pooling by 2 with every shift of the window in view is pooling without a stride, read at every second place.
        self.score_feature = nn.Conv2d(neck_width, feature_width, cells // 2, dilation=2) if score_pooled else None
        self.score_hidden = nn.Conv2d(feature_width, score_width, 1)
        self.score = nn.Conv2d(score_width, 1, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.squeeze, self.score_hidden, *([self.score_feature] if self.score_feature else [])):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.feature, self.masks, self.score):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        base = Preprocess(short=short or 600, long=long, resample="pillow", multiple=1, fit="short" if short else "own")
        self.preprocess = normalization_for(base, in_channels, mean, std)
        grey = [(GREY - m) / s for m, s in zip(self.preprocess.mean, self.preprocess.std, strict=True)]
        self.register_buffer("grey", torch.tensor(grey).view(-1, 1, 1), persistent=False)

    # ---- network -------------------------------------------------------------------------------------------------

    def inputs(self, images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        return inputs_of(images, sizes, self.preprocess.multiple)

    def forward(self, images: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Raw:
        grey, around = self.grey.to(images.dtype), [self.window // 2] * 4
        found, there = pyramid(
            images, sizes, self.preprocess.multiple, self.scales,
            lambda canvas, scale: resized(canvas, scale, corners=True) - grey,
            lambda level: self.dense(functional.pad(level, around) + grey), (0.0, 0.0), shares_norms(self),
        )  # fmt: skip
        features, scores = zip(*found, strict=True)
        return Raw(scores, features, (images.shape[-2], images.shape[-1]), there)

    def dense(self, canvas: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b f _h _w"], Float[Tensor, "b 1 _h _w"]]:
        """Feature and score of every window of an image with half a window around it."""
        return self._heads(functional.relu(self.squeeze(self.backbone(canvas)[-1])))

    def patches(self, patches: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b v v"], Float[Tensor, " b"]]:
        """The other form of the same network, in which it was trained: mask and score of single windows, each shown
        with `context` places around it."""
        x = self.backbone(patches)[-1]
        x = functional.pad(x, [-self.context] * 4)
        feature, score = self._heads(functional.relu(self.squeeze(x)))
        return self._grids(feature[:, :, 0, 0]), score[:, 0, 0, 0]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.feature(x)  # linear: the mask is of low rank in the window
        own = feature
        if self.score_feature is not None:
            own = functional.relu(self.score_feature(functional.max_pool2d(x, 2, 1)))
        hidden = functional.relu(self.score_hidden(self.dropout(own)))
        return feature, self.score(self.dropout(hidden))

    def _grids(self, features: Float[Tensor, "k f"]) -> Float[Tensor, "k v v"]:
        """Logits of the masks that these features are of."""
        values = functional.linear(features, self.masks.weight[:, :, 0, 0], self.masks.bias)
        return values.unflatten(1, (self.mask_side, self.mask_side))

    def mask_tensor(self, raw: Raw, level: int) -> MaskTensor:
        """The masks of all windows of a level: *natural* in TensorMask's words (arXiv 1903.12174, figure 6a), what is
        predicted at a place is the mask of the window there, by a linear layer. Units are pixels of the input."""
        values = self.masks(raw.features[level]).unflatten(1, (self.mask_side, self.mask_side))
        scale = self.scales[level]
        return MaskTensor(values, False, self.stride / scale, self.window / self.mask_side / scale)

    def grids_of(self, raw: Raw, image: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """Mask logits of some windows (level, y, x) of an image."""
        parts, order = [raw.features[0].new_zeros(0, self.mask_side, self.mask_side)], []
        for level, features in enumerate(raw.features):
            rows = (places[:, 0] == level).nonzero().flatten()
            parts.append(self._grids(features[image][:, places[rows, 1], places[rows, 2]].T))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def windows(self, raw: Raw) -> Windows:
        """Where the windows are: the first one of each level is centred at the image's corner."""
        return windows_of(raw.scores, self.scales, self.stride, self.window)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`mask`: log(1 + exp(-y x)) of each pixel of the positive windows' masks, the mean; `score`: the same of the
        windows' scores, half of it the positive ones' mean, half the negative ones'. Crowd is not learnt from.

        The published code draws patches instead, half of them positive; this is what that comes to on average, with
        the whole image in view. What "positive" is, is the same.
        """
        device = raw.scores[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1)  # (B, N)
        found = [
            assign(
                windows, t, canonical=self.canonical, shift=self.shift, octaves=self.octaves, margin=self.margin, far=1
            )
            for t in targets
        ]
        there = [own_places(raw.there, n, windows) for n in range(len(targets))]
        on = [own & reachable(windows, t.image_size, self.stride) for own, t in zip(there, targets, strict=True)]
        positive = torch.stack([a.positive & own for a, own in zip(found, there, strict=True)])
        negative = torch.stack([a.negative & own for a, own in zip(found, on, strict=True)])
        chosen = [sample(ones, a.negative, self.sampled, 1.0)[0] for ones, a in zip(positive, found, strict=True)]
        positive, negative = positive.float(), negative.float()
        counts = positive.new_tensor([positive.sum(), negative.sum(), sum(len(c) for c in chosen)])
        of_positive, of_negative, of_masks = global_mean_count(counts, minimum=0.0).clamp(min=1e-6)
        right = (soft_margin(scores, positive) * positive).sum() / of_positive
        wrong = (soft_margin(scores, positive) * negative).sum() / of_negative
        total = (
            sum((f.sum() for f in raw.features), scores.sum()) * 0 + sum(p.sum() for p in self.masks.parameters()) * 0
        )
        for image, (rows, own, target) in enumerate(zip(chosen, found, targets, strict=True)):
            if not len(rows):
                continue
            if target.masks is None:
                raise UsageError("a target has boxes but no masks; this system learns masks")
            logits = self.enlarged(self.grids_of(raw, image, windows.places[rows]))
            truth = mask_targets(target.masks, own.owners[rows], windows.boxes[rows], self.label_side)
            total = total + soft_margin(logits, truth).mean((1, 2)).sum()
        return {"mask": total / of_masks, "score": self.score_weight * (right + wrong) / 2}

    def enlarged(self, grids: Float[Tensor, "k v v"]) -> Float[Tensor, "k u u"]:
        """Masks as they are compared with labels: on label_side ** 2 cells."""
        size = (self.label_side, self.label_side)
        return functional.interpolate(grids[:, None].float(), size=size, mode="bilinear", align_corners=True)[:, 0]

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float | None = None,
        detections: int = 500,
        mask_threshold: float = 0.2,
        candidates: int = 2000,
    ) -> list[Instances]:
        """The best windows of all scales together. `candidates`: best windows of an image that suppression looks at.

        The released code reads a mask one row above and one column right of the window that was scored (an index that
        begins at one); here it is the window's own.
        """
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1).sigmoid()
        level = logit_of(mask_threshold)
        found = []
        for image, placement in enumerate(placements):
            there = own_places(raw.there, image, windows) & reachable(windows, placement.size, self.stride)
            own = torch.where(there, scores[image], -1.0)
            found.append(
                proposals(
                    own, windows, lambda rows, n=image: self.grids_of(raw, n, windows.places[rows]) - level,
                    placement, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
                    candidates=candidates, rule="corners",
                )
            )  # fmt: skip
        return found

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        score: list[nn.Module] = [m for m in (self.score_feature, self.score_hidden, self.score) if m is not None]
        return {"backbone": [self.backbone], "neck": [self.squeeze, self.feature], "mask": [self.masks], "score": score}

    _NOTE = "third-party note of the paper"
    _VAL = "COCO 2014, first 5000 images of val"
    presets: ClassVar[Mapping[str, Preset]] = {
        "deepmask-vgg": Preset(
            {
                "backbone": "vgg11", "norm": "none", "window": 224, "canonical": 128.0, "context": 0, "neck_width": 512,
                "score_pooled": True, "label_side": 224, "scales": scales_between(-2, 1, 0.5), "shift": 16.0,
                "margin": 32.0,
            },
            (
                Score(12.6, "mask AR@10", _VAL, _NOTE), Score(24.5, "mask AR@100", _VAL, _NOTE),
                Score(33.1, "mask AR@1000", _VAL, _NOTE), Score(15.3, "box AR@10", _VAL, _NOTE),
                Score(31.3, "box AR@100", _VAL, _NOTE), Score(44.6, "box AR@1000", _VAL, _NOTE),
            ),
            note="the paper's network of 2015; no weights were published",
        ),
        "deepmask-r50": Preset(
            {"norm": "frozen", "norm_eps": 0.0, "border": "symmetric"},
            note="the network of the released code, which is the SharpMask paper's",
        ),
        "deepmask-r50-zoom": Preset(
            {"norm": "frozen", "norm_eps": 0.0, "border": "symmetric", "scales": scales_between(-2.5, 1, 0.5)},
            note="a larger scale besides, for smaller objects; twice the time",
        ),
        "deepmask-r50-port": Preset(
            {"norm": "batch", "border": "reflect"},
            (
                Score(13.6, "mask AR@10", _VAL, "README of foolwood/deepmask-pytorch"),
                Score(26.0, "mask AR@100", _VAL, "README of foolwood/deepmask-pytorch"),
                Score(33.5, "mask AR@1000", _VAL, "README of foolwood/deepmask-pytorch"),
            ),
            note="a PyTorch port of the released code, by others, with weights",
        ),
        "deepmask-small": Preset(
            {
                "backbone": "resnet18", "stride": 8, "window": 48, "neck_width": 64, "feature_width": 256,
                "mask_side": 28, "label_side": 56, "score_width": 256, "score_weight": 1.0, "dropout": 0.1,
                "scales": scales_between(-1, 0.5, 0.5), "short": 192, "long": 320,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 300 times 4000 batches of 32 patches, the rate halved after 50 and a fifth of that after 120: here twice the
        # same factor. An image stands for its patches.
        "deepmask": {
            "steps": 1_200_000, "batch": 32, "lr": 1e-3, "milestones": (50 / 300, 120 / 300), "gamma": 0.1**0.5,
            "weight_decay": 5e-4, "warmup": 0, "decay_norms": True, "decay_biases": True, "augment": {"flip": 0.5},
        },
    }  # fmt: skip
