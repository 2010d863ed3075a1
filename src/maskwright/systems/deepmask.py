"""DeepMask: Learning to Segment Object Candidates (Pinheiro, Collobert, Dollár, NIPS 2015, arXiv 1506.06204).

A network takes a patch of an image and predicts the mask of the object in its centre, and a score: whether there is an
object that is centred and of the right size. The mask is linear in a feature of few numbers, which are linear in the
whole patch, so that every pixel of the mask depends on every location. Over an image the network is applied as a
convolution: each location of each level of a pyramid of resized images is the centre of a window, with a mask and a
score. Objects have no class.

Also implemented is the network of the released code, which is more recent: a ResNet-50, mirrored borders, and one
feature for mask and score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.layers import Border, set_border
from maskwright.blocks.sliding import pyramid, resized, shares_norms
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import soft_margin
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.matching import sample
from maskwright.ops.window_tensors import MaskTensor
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.sliding import (
    Assignment,
    AssignmentLike,
    SlidingSystem,
    Windows,
    lay_windows,
    scales_between,
)

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
ASSIGNMENT = Assignment()
PREPROCESS = Preprocess(short=600, resample="pillow", multiple=1, fit="own")
GREY = 0.5  # value around an image, before normalisation


@dataclass(frozen=True)
class Raw:
    """The raw output.

    Attributes:
        scores: Score logits of the windows of each level.
        features: Features of the windows of each level, in which masks are linear.
        size: Height and width of the input.
        inside: Which windows of each level belong to each image; empty if all do.
    """

    scores: tuple[Float[Tensor, "b 1 _h _w"], ...]
    features: tuple[Float[Tensor, "b c _h _w"], ...]
    size: tuple[int, int]
    inside: tuple[Bool[Tensor, "b 1 _h _w"], ...] = ()


# ---- networks --------------------------------------------------------------------------------------------------------


class WindowNetwork(nn.Module):
    """The network of one window, applied as a convolution.

    Args:
        backbone: The backbone.
        cells: Locations along a side of a window.
        neck_width: Channels after the backbone.
        feature_width: Numbers in which a mask is linear.
        score_width: Channels of the hidden layer of the score.
        score_pooled: Whether the score has a feature of its own, of locations pooled 2 x 2.
        dropout: Dropout in the score branch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        cells: int,
        *,
        neck_width: int,
        feature_width: int,
        score_width: int,
        score_pooled: bool,
        dropout: float,
    ):
        super().__init__()
        channels = levels_of(backbone).channels
        self.backbone = backbone
        self.squeeze = nn.Conv2d(channels[-1], neck_width, 1)
        self.feature = nn.Conv2d(neck_width, feature_width, cells)
        # Pooling by 2 at every shift of the window is pooling without a stride, read at every second location.
        self.score_feature = nn.Conv2d(neck_width, feature_width, cells // 2, dilation=2) if score_pooled else None
        self.score_hidden = nn.Conv2d(feature_width, score_width, 1)
        self.score = nn.Conv2d(score_width, 1, 1)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.squeeze, self.score_hidden, *([self.score_feature] if self.score_feature else [])):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in (self.feature, self.score):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)

    def forward(
        self, images: Float[Tensor, "b c h w"], context: int = 0
    ) -> tuple[Float[Tensor, "b f _h _w"], Float[Tensor, "b 1 _h _w"]]:
        """Computes the feature and the score logit of every window.

        Args:
            images: Images or patches.
            context: Locations that are cut off on each side after the backbone.
        """
        x = self.backbone(images)[-1]
        if context:
            x = functional.pad(x, [-context] * 4)
        x = functional.relu(self.squeeze(x))
        feature = self.feature(x)  # linear: masks are of low rank in the window
        own = feature
        if self.score_feature is not None:
            own = functional.relu(self.score_feature(functional.max_pool2d(x, 2, 1)))
        hidden = functional.relu(self.score_hidden(self.dropout(own)))
        return feature, self.score(self.dropout(hidden))


class Dense(nn.Module):
    """The network of a window, applied to every location of every level of a pyramid.

    Args:
        window: The network of a window.
        side: Side of a window, in pixels of its level. Images are padded by half of it.
        scales: Pixels of each level per pixel of the input.
        grey: Value of the padding in each channel, normalised.
    """

    grey: Tensor

    def __init__(self, window: WindowNetwork, side: int, scales: Sequence[float], grey: Sequence[float]):
        super().__init__()
        self.window, self.side, self.scales = window, side, tuple(scales)
        self.register_buffer("grey", torch.tensor(grey).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Raw:
        """Computes the raw output.

        Args:
            images: The images.
            sizes: Height and width of each image, on the host; None if every image fills the batch.
        """
        grey, around = self.grey.to(images.dtype), [self.side // 2] * 4
        outputs, inside = pyramid(
            images, sizes, self.scales,
            lambda image, scale: resized(image, scale, corners=True) - grey,
            lambda level: self.window(functional.pad(level, around) + grey), (0.0, 0.0), shares_norms(self),
        )  # fmt: skip
        features, scores = zip(*outputs, strict=True)
        return Raw(scores, features, (images.shape[-2], images.shape[-1]), inside)


# ---- system ----------------------------------------------------------------------------------------------------------


class DeepMask(SlidingSystem):
    """DeepMask; see the docstring of the module."""

    dense: Dense

    name = "deepmask"
    card = Card(
        title="DeepMask",
        paper="Pinheiro, Collobert, Dollár: Learning to Segment Object Candidates. NIPS 2015",
        arxiv="1506.06204",
        code="facebookresearch/deepmask",
        code_licence="BSD-3-Clause with a patent grant",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{name}.": f"dense.window.{name}."
        for name in ("backbone", "squeeze", "feature", "score_feature", "score_hidden", "score")
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        stride: int = 16,
        border: Border = "zeros",
        window: int = 160,
        scales: Sequence[float] = scales_between(-2.5, 0.5, 0.5),
        context: int = 1,
        neck_width: int = 128,
        feature_width: int = 512,
        mask_side: int = 56,
        label_side: int = 112,
        score_width: int = 1024,
        score_pooled: bool = False,
        dropout: float = 0.5,
        assignment: AssignmentLike = ASSIGNMENT,
        score_weight: float = 1 / 32,
    ):
        """
        Args:
            classes: The name of the only class.
            backbone: The backbone, which ends at `stride`.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input; images keep their own size unless `short` is set.
            stride: Distance of neighbouring windows, in pixels of their level.
            border: How convolutions are padded: "zeros"; "symmetric" as in the released Torch 7 code; "reflect" as in
                its PyTorch port, whose first layer is symmetric nevertheless.
            window: Side of a window in pixels of its level, a multiple of twice the stride.
            scales: Pixels of each level of the pyramid per pixel of the input.
            context: Locations around a window that a patch contains, for `patches`.
            neck_width: Channels after the backbone.
            feature_width: Numbers in which a mask is linear.
            mask_side: Masks are predicted on mask_side ** 2 cells.
            label_side: Masks are compared with labels on label_side ** 2 cells (corners aligned).
            score_width: Channels of the hidden layer of the score.
            score_pooled: Whether the score has a feature of its own, of locations pooled 2 x 2 (2015); otherwise it
                shares the mask's.
            dropout: Dropout in the score branch.
            assignment: Which windows are positive and negative. At most `sampled` positive windows of an image are
                sampled for the mask loss.
            score_weight: Weight of the score loss.
        """
        if window < 1 or window % (2 * stride):
            raise UsageError(f"{self.name}: window must be a multiple of 2 * stride = {2 * stride}, got {window}")
        if not 0 <= dropout <= 1:
            raise UsageError(f"{self.name}: dropout must be between 0 and 1, got {dropout}")
        spec, rules = Backbone.read(backbone, BACKBONE), Assignment.read(assignment, ASSIGNMENT)
        preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        super().__init__(classes, rules, scales, stride, window, preprocess)
        self.context, self.mask_side, self.label_side = context, mask_side, label_side
        self.score_weight = score_weight
        network = spec.build(in_channels, Use(deepest=stride))
        set_border(network, border)
        grey = [(GREY - m) / s for m, s in zip(preprocess.mean, preprocess.std, strict=True)]
        self.dense = Dense(
            WindowNetwork(
                network, window // stride, neck_width=neck_width, feature_width=feature_width, score_width=score_width,
                score_pooled=score_pooled, dropout=dropout,
            ), window, self.scales, grey,
        )  # fmt: skip
        self.masks = nn.Conv2d(feature_width, mask_side**2, 1)
        nn.init.normal_(self.masks.weight, std=feature_width**-0.5)

    def windows(self, raw: Raw) -> Windows:
        """The windows; the first one of each level is centred on the image's corner."""
        return lay_windows(raw.scores, self.scales, self.stride, self.window)

    def mask_logits(self, features: Float[Tensor, "k f"]) -> Float[Tensor, "k v v"]:
        """Computes the masks of features."""
        if not len(features):
            return features.new_zeros(0, self.mask_side, self.mask_side)
        values = self.masks(features.T[None, :, :, None])[0, :, :, 0]  # as a column of k locations: (v * v, k)
        return values.T.unflatten(1, (self.mask_side, self.mask_side))

    def window_masks(self, raw: Raw, image: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """Computes the mask logits of windows (level, y, x) of one image."""
        features = raw.features[0].new_zeros(len(places), raw.features[0].shape[1])
        for level, own in enumerate(raw.features):
            rows = (places[:, 0] == level).nonzero().flatten()
            features = features.index_copy(0, rows, own[image][:, places[rows, 1], places[rows, 2]].T)
        return self.mask_logits(features)

    def mask_tensor(self, raw: Raw, level: int) -> MaskTensor:
        """The masks of all windows of a level, in pixels of the input.

        They are in the natural representation of TensorMask (arXiv 1903.12174, figure 6a): the channels of a location
        are the mask of the window there, predicted by a linear layer.
        """
        values = self.masks(raw.features[level]).unflatten(1, (self.mask_side, self.mask_side))
        scale = self.scales[level]
        return MaskTensor(values, False, self.stride / scale, self.window / self.mask_side / scale)

    def patches(self, patches: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b v v"], Float[Tensor, " b"]]:
        """Computes mask and score logits of single windows, the form in which the original was trained.

        Args:
            patches: Windows with `context` locations around them.
        """
        feature, score = self.dense.window(patches, self.context)
        return self.mask_logits(feature[:, :, 0, 0]), score[:, 0, 0, 0]

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses (eq. 1).

        The published code samples patches, half of them positive; this is its expectation for a whole image. Which
        windows are positive is the same.

        Returns:
            `mask`: mean of log(1 + exp(-y x)) over the pixels of the masks of positive windows. `score`: the same for
            scores, where positive and negative windows each have half of the weight. Crowd regions are ignored.
        """
        device = raw.scores[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1)  # (B, N)
        assigned = self.assigned(raw, targets, windows)
        chosen = [sample(a.positive, a.negative, self.assignment.sampled, 1.0)[0] for a in assigned]
        positive = torch.stack([a.positive for a in assigned]).float()
        negative = torch.stack([a.negative for a in assigned]).float()
        counts = positive.new_tensor([positive.sum(), negative.sum(), sum(len(c) for c in chosen)])
        of_positive, of_negative, of_masks = global_mean_count(counts, minimum=0.0).clamp(min=1e-6)
        right = (soft_margin(scores, positive) * positive).sum() / of_positive
        wrong = (soft_margin(scores, positive) * negative).sum() / of_negative
        # A gradient for every parameter, also without objects: zero, from a single window.
        total = sum((f.sum() for f in raw.features), scores.sum()) * 0
        total = total + self.masks(raw.features[0][..., :1, :1]).sum() * 0
        for image, (rows, own, target) in enumerate(zip(chosen, assigned, targets, strict=True)):
            if not len(rows):
                continue
            assert target.masks is not None  # `System.needs`
            logits = self.enlarged(self.window_masks(raw, image, windows.places[rows]))
            truth = mask_targets(target.masks, own.owners[rows], windows.boxes[rows], self.label_side)
            total = total + soft_margin(logits, truth).mean((1, 2)).sum()
        return {"mask": total / of_masks, "score": self.score_weight * (right + wrong) / 2}

    def enlarged(self, masks: Float[Tensor, "k v v"]) -> Float[Tensor, "k u u"]:
        """Resizes masks to label_side ** 2 cells, where they are compared with labels."""
        size = (self.label_side, self.label_side)
        return functional.interpolate(masks[:, None].float(), size=size, mode="bilinear", align_corners=True)[:, 0]

    # ---- decoding ------------------------------------------------------------------------------------------------

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
        """Converts the windows of highest score of all levels to objects.

        The released code reads a mask one row above and one column to the right of the window that was scored (an index
        that starts at one); here the mask is the window's own.

        Args:
            raw: The raw output.
            placements: How each image was placed in the network's input.
            score_threshold: Lowest score of an object.
            nms_threshold: IoU of the bounding boxes of masks above which the object of lower score is removed; None for
                no suppression, as published.
            detections: Maximum number of objects of an image.
            mask_threshold: Probability above which a pixel belongs to a mask.
            candidates: Number of windows that are kept before suppression.
        """
        return self.proposals(
            raw, placements, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
            mask_threshold=mask_threshold, candidates=candidates, rule="corners",
        )  # fmt: skip

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        window = self.dense.window
        score: list[nn.Module] = [window.score_hidden, window.score]
        if window.score_feature is not None:
            score.insert(0, window.score_feature)
        neck: list[nn.Module] = [window.squeeze, window.feature]
        return {"backbone": [window.backbone], "neck": neck, "mask": [self.masks], "score": score}

    # ---- presets -------------------------------------------------------------------------------------------------

    _NOTE = "third-party note of the paper"
    _VAL = "COCO 2014, first 5000 images of val"
    _TORCH7: ClassVar[dict[str, Any]] = {"name": "resnet50", "norm": "frozen", "norm_eps": 0.0}
    presets: ClassVar[Mapping[str, Preset]] = {
        "deepmask-vgg": Preset(
            {
                "backbone": {"name": "vgg11", "norm": "none"}, "window": 224, "context": 0, "neck_width": 512,
                "score_pooled": True, "label_side": 224, "scales": scales_between(-2, 1, 0.5),
                "assignment": {"canonical": 128.0, "shift": 16.0, "margin": 32.0},
            },
            (
                Score(12.6, "mask AR@10", _VAL, _NOTE), Score(24.5, "mask AR@100", _VAL, _NOTE),
                Score(33.1, "mask AR@1000", _VAL, _NOTE), Score(15.3, "box AR@10", _VAL, _NOTE),
                Score(31.3, "box AR@100", _VAL, _NOTE), Score(44.6, "box AR@1000", _VAL, _NOTE),
            ),
            note="the paper's network of 2015; no weights were published",
        ),
        "deepmask-r50": Preset(
            {"backbone": _TORCH7, "border": "symmetric"},
            note="the network of the released code, which is the SharpMask paper's",
        ),
        "deepmask-r50-zoom": Preset(
            {"backbone": _TORCH7, "border": "symmetric", "scales": scales_between(-2.5, 1, 0.5)},
            note="with one more, larger scale for smaller objects; takes twice the time",
        ),
        "deepmask-r50-port": Preset(
            {"backbone": {"name": "resnet50", "norm": "batch"}, "border": "reflect"},
            (
                Score(13.6, "mask AR@10", _VAL, "README of foolwood/deepmask-pytorch"),
                Score(26.0, "mask AR@100", _VAL, "README of foolwood/deepmask-pytorch"),
                Score(33.5, "mask AR@1000", _VAL, "README of foolwood/deepmask-pytorch"),
            ),
            note="a third-party PyTorch port of the released code, with weights",
        ),
        "deepmask-small": Preset(
            {
                "backbone": "resnet18", "stride": 8, "window": 48, "neck_width": 64, "feature_width": 256,
                "mask_side": 28, "label_side": 56, "score_width": 256, "score_weight": 1.0, "dropout": 0.1,
                "scales": scales_between(-1, 0.5, 0.5), "resize": {"short": 192, "long": 320},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 300 times 4000 batches of 32 patches; the learning rate is halved after 50 and divided by 5 after 120, here by
        # the same factor twice. An image takes the place of a patch.
        "deepmask": {
            "steps": 1_200_000, "batch": 32, "lr": 1e-3, "milestones": (50 / 300, 120 / 300), "gamma": 0.1**0.5,
            "weight_decay": 5e-4, "warmup": 0, "decay_norms": True, "decay_biases": True, "augment": {"flip": 0.5},
        },
    }  # fmt: skip
