"""EmbedMask (Ying, Huang, Liu, Shao, Zhou, arXiv 1912.01954; IJCAI 2021).

A one-stage detector, FCOS, predicts at every location of a pyramid what is there and how far its box reaches. Two
embeddings turn boxes into masks: every location also has a proposal embedding and a margin, and every cell of the
finest level a pixel embedding. A pixel belongs to a detection if its embedding is near the proposal's,

    p(pixel | detection) = exp(-sum_d margin_d (pixel_d - proposal_d)^2),

inside the detection's box. The margin is learned, so that large objects may be wide in the embedding space and small
ones narrow. It is 1 / (2 sigma^2), a factor of the squared distance and not a distance: p is 0.5 at
sqrt(ln 2 / margin).

The code was published three times, with different tensors: `RULES` lists what each generation does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks import fcos
from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.embeddings import CELL, OUTSIDE, Region, cells_inside, good_locations, group_means, mask_windows
from maskwright.ops.losses import lovasz_hinge
from maskwright.ops.mask_targets import seen_at
from maskwright.ops.windows import paste_windows
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.system import ClassRows, System, at_least

CANDIDATE = 0.05  # class probability above which a location is a candidate
SMALLEST = 1e-9  # distance of probabilities from 0 and 1 where their logits are computed


@dataclass(frozen=True)
class Rules:
    """What one generation of the code does."""

    dimensions: int  # of the embeddings
    coordinates: bool  # whether the location, in hundreds of pixels, is added to the first two dimensions
    margin: Literal["box", "one", "each"]  # computed from the predicted box; one for all dimensions; one for each
    trained_from: Literal["good", "best"]  # an object's embedding: the mean of its good locations, or of the best one
    mean_over: Literal["all", "assigned"]  # the mask loss is the mean over all objects, or over those with a location
    smooth: float  # weight of the smooth loss
    crop: float | None  # masks are trained inside the box, enlarged by this share on each side
    logarithm: bool  # masks are resized as log-probabilities (-10 outside) instead of probabilities (0 outside)
    region: Region
    threshold: float  # of the probability


RULES = {
    # December 2019, the arXiv paper
    1: Rules(32, False, "box", "good", "all", 0.1, 0.1, False, "near", 0.5),
    # May 2020
    2: Rules(8, True, "one", "best", "assigned", 0.0, 0.1, False, "near", 0.53),
    # May 2021, IJCAI
    3: Rules(16, True, "each", "best", "assigned", 0.0, None, True, "padded", 0.53),
}

PREPROCESS = Preprocess(
    resample="pillow", sizes="benchmark", mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), divide=1.0,
    channels="BGR",
)  # fmt: skip
BACKBONE, RESIZE = Backbone("resnet50"), Resize()


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """What the network predicts at every location of each level (finest first), and at every cell of the finest."""

    logits: tuple[Float[Tensor, "b k _h _w"], ...]
    distances: tuple[Float[Tensor, "b 4 _h _w"], ...]  # to the box's left, top, right, bottom, in strides
    centerness: tuple[Float[Tensor, "b 1 _h _w"], ...]  # logits
    embeddings: tuple[Float[Tensor, "b d _h _w"], ...]  # float32, as the two below
    margins: tuple[Float[Tensor, "b m _h _w"], ...]  # factors of squared distances; m = d or 1
    pixels: Float[Tensor, "b d h w"]


class EmbedMaskNet(nn.Module):
    """FCOS with proposal embedding, margin and pixel embedding (figure 2).

    Args:
        backbone: With levels of strides 8, 16 and 32.
        rules: What the generation does.
        classes: Number of classes.
        neck_width: Channels of the pyramid and the towers.
        convs: Layers of the towers of classes and boxes.
        mask_convs: Layers of the tower of pixel embeddings.
        dimensions: Dimensions of the embeddings.
        margin: Initial value of the margins.
        fixed_margin: Whether margins keep this value.
    """

    def __init__(
        self, backbone: nn.Module, rules: Rules, classes: int, *, neck_width: int, convs: int, mask_convs: int,
        dimensions: int, margin: float, fixed_margin: bool,
    ):  # fmt: skip
        super().__init__()
        self.first_margin, self.margin_rule = margin, rules.margin
        levels = levels_of(backbone)
        self.levels = levels.indices((8, 16, 32))
        self.backbone = backbone
        self.neck = FPN([levels.channels[i] for i in self.levels], neck_width, extra="output", relu="between")
        self.class_tower, self.box_tower = (fcos.tower(neck_width, convs) for _ in range(2))
        self.class_logits = fcos.output_conv(neck_width, classes, -math.log(99))
        self.distances = fcos.output_conv(neck_width, 4, fcos.START)
        self.centerness = fcos.output_conv(neck_width, 1)
        self.distance_scales = nn.ModuleList(fcos.Scale() for _ in fcos.STRIDES)

        self.proposal_embedding = fcos.output_conv(neck_width, dimensions)
        self.mask_tower = fcos.tower(neck_width, mask_convs)
        self.pixel_embedding = fcos.output_conv(neck_width, dimensions)
        self.place_scale = fcos.Scale() if rules.coordinates else None  # shared by pixels and proposals
        self.margin = self.margin_scales = None
        if not fixed_margin and rules.margin == "box":
            self.margin = nn.Conv2d(4, 1, 1)
            nn.init.normal_(self.margin.weight, std=0.01)
            nn.init.constant_(self.margin.bias, math.log(margin))  # pyright: ignore[reportArgumentType]
        elif not fixed_margin:
            outputs = dimensions if rules.margin == "each" else 1
            self.margin = fcos.output_conv(neck_width, outputs, math.log(margin))
        if not fixed_margin and rules.margin == "each":
            self.margin_scales = nn.ModuleList(fcos.Scale() for _ in fcos.STRIDES)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = self.neck([features[index] for index in self.levels])  # strides 8 ... 128
        points = fcos.locations(levels)
        logits, distances, centerness, embeddings, margins = [], [], [], [], []
        for number, (level, own) in enumerate(zip(levels, points, strict=True)):
            box_features = self.box_tower(level)
            logits.append(self.class_logits(self.class_tower(level)))
            centerness.append(self.centerness(box_features))
            distances.append(functional.relu(self.distance_scales[number](self.distances(box_features))))
            embeddings.append(self._placed(self.proposal_embedding(box_features), own))
            margins.append(self._margins(box_features, distances[-1], number))
        pixels = self._placed(self.pixel_embedding(self.mask_tower(levels[0])), points[0])
        return Raw(tuple(logits), tuple(distances), tuple(centerness), tuple(embeddings), tuple(margins), pixels)

    def _placed(self, embedding: Float[Tensor, "b d h w"], points: Float[Tensor, "n 2"]) -> Float[Tensor, "b d h w"]:
        """The embedding in float32, with the location added to its first two dimensions."""
        embedding = embedding.float()
        if self.place_scale is None:
            return embedding
        at = self.place_scale.scale.float() * points.T.unflatten(1, embedding.shape[-2:]) / 100  # (2, h, w)
        return torch.cat([embedding[:, :2] + at, embedding[:, 2:]], 1)

    def _margins(
        self, box_features: Float[Tensor, "b c h w"], distances: Float[Tensor, "b 4 h w"], number: int
    ) -> Float[Tensor, "b m h w"]:
        """The margins of level `number`."""
        if self.margin is None:
            shape = (box_features.shape[0], 1, *box_features.shape[-2:])
            return box_features.new_full(shape, self.first_margin, dtype=torch.float32)
        if self.margin_rule == "box":  # in units of 800 pixels; boxes have no gradients from it
            return self.margin((distances * (fcos.STRIDES[number] / 800)).detach()).float().exp()
        logarithm = self.margin(box_features / 32).float()
        if self.margin_scales is not None:
            logarithm = torch.cat([self.margin_scales[number](logarithm[:, :2]), logarithm[:, 2:]], 1)
        return logarithm.exp()


# ---- system ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first, before their masks are computed."""

    boxes: Float[Tensor, "n 4"]  # in the input's pixels
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    embeddings: Float[Tensor, "n d"]
    margins: Float[Tensor, "n m"]


def _published(backbone: str, **options: Any) -> dict[str, Any]:
    """Options of the published networks."""
    own = {"name": backbone, "stride_in": "1x1", "norm": "frozen", "norm_eps": 0.0, "frozen": 2}
    return {"backbone": own, "inclusive": True, **options}


class EmbedMask(System):
    """See the module's docstring, and `decode` for its thresholds.

    Args:
        classes: Class names.
        generation: Of the published code, see `RULES`. The paper on arXiv is 1, that of IJCAI is 3.
        backbone: Any backbone with levels of strides 8, 16 and 32. The published networks have `stride_in="1x1"`,
            `norm="frozen"` with `norm_eps=0.0`, and two frozen parts.
        in_channels: Channels of the image.
        resize: The short side is 800 pixels, the long side at most 1333.
        neck_width: Channels of the pyramid and the towers.
        convs: Layers of the towers of classes and boxes.
        mask_convs: Layers of the tower of pixel embeddings; None is `convs`.
        dimensions: Dimensions of the embeddings; None is the generation's. Table 5 of the arXiv paper compares them.
        fixed_margin: Whether all margins are ln 2 / prior_margin^2 instead of learned (table 2).
        prior_margin: Distance in the embedding at which a new network's probability is 0.5.
        splits: The largest distance to a side, in pixels, that each level but the last regresses.
        radius: Half the side of the square around a box's centre, in strides, in which locations are positive; None is
            the whole box.
        in_mask: Whether only locations on an object's mask are positive.
        mask_weight: Weight of the mask loss.
        smooth_weight: Weight of the smooth loss, which draws the predictions of an object's good locations together;
            None is the generation's.
        crop: Masks are trained inside the box enlarged by this share (and a cell); negative for all pixels; None is the
            generation's.
        inclusive: Whether boxes end at their last pixel, x1 - x0 + 1 wide, as predicted by the published weights.
    """

    name = "embedmask"
    card = Card(
        title="EmbedMask",
        paper="Ying, Huang, Liu, Shao, Zhou: EmbedMask: Embedding Coupling for Instance Segmentation. IJCAI 2021",
        arxiv="1912.01954",
        code="yinghdb/EmbedMask",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        generation: Literal[1, 2, 3] = 3,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        neck_width: int = 256,
        convs: int = 4,
        mask_convs: int | None = None,
        dimensions: int | None = None,
        fixed_margin: bool = False,
        prior_margin: float = 2.0,
        splits: Sequence[float] = (64, 128, 256, 512),
        radius: float | None = 1.5,
        in_mask: bool = True,
        mask_weight: float = 0.5,
        smooth_weight: float | None = None,
        crop: float | None = None,
        inclusive: bool = False,
    ):
        super().__init__()
        self.rules = rules = RULES[generation]
        size = rules.dimensions if dimensions is None else dimensions
        at_least(f"{self.name} of generation {generation}", 3 if rules.coordinates else 1, dimensions=size)
        if len(splits) != 4:
            raise UsageError(f"{self.name}: splits must be 4 numbers, for five levels, got {list(splits)}")
        if not prior_margin > 0:
            raise UsageError(f"{self.name}: prior_margin must be above 0, got {prior_margin}")
        self.classes = tuple(classes)
        self.radius, self.in_mask, self.inclusive = radius, in_mask, inclusive
        self.ranges = tuple(pairwise((-1.0, *map(float, splits), 1e8)))
        self.mask_weight = mask_weight
        self.smooth_weight = rules.smooth if smooth_weight is None else smooth_weight
        self.crop = rules.crop if crop is None else crop if crop >= 0 else None
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        self.dense = EmbedMaskNet(
            Backbone.read(backbone, BACKBONE).build(in_channels), rules, len(self.classes), neck_width=neck_width,
            convs=convs, mask_convs=convs if mask_convs is None else mask_convs, dimensions=size,
            # In the paper and the code new networks have a probability of 0.5 at the distance `prior_margin`.
            margin=math.log(2) / prior_margin**2, fixed_margin=fixed_margin,
        )  # fmt: skip

    @property
    def last(self) -> float:
        """What has to be added to x1 and y1 of a box for it to end behind its last pixel."""
        return 1.0 if self.inclusive else 0.0

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    # ---- losses ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input; crowd regions are ignored.

        Returns:
            `class`, `box`, `centerness`, `mask`, and `smooth` if it has a weight.
        """
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.pixels.device) for t in targets]
        owners, goals, truths = zip(*(self.assign(raw, t) for t in targets), strict=True)
        owner, goal = torch.stack(owners), torch.stack(goals)  # (B, N), (B, N, 4)
        logits, distances, central = (_rows(v).float() for v in (raw.logits, raw.distances, raw.centerness))
        labels = torch.cat([t.labels[o[o >= 0]] for t, o in zip(targets, owners, strict=True)])
        terms = fcos.location_losses(logits, distances, central[..., 0], owner >= 0, labels, goal)

        # The embedding and margin of each object, from its locations; objects are numbered across images.
        counts = [len(t) for t in targets]
        image, place = (owner >= 0).nonzero().unbind(1)  # (P,) each
        group = owner[image, place] + torch.tensor([0, *counts], device=owner.device).cumsum(0)[image]
        stride = fcos.per_location(fcos.locations(raw.logits), [float(s) for s in fcos.STRIDES])[place, None]
        last = _corner(goal, self.last)
        predicted, wanted = distances.detach()[image, place] * stride + last, goal[image, place] * stride + last
        good, best = good_locations(fcos.overlap(predicted, wanted), group, sum(counts))
        chosen = good if self.rules.trained_from == "good" else best
        coded = [_rows(v)[image, place] for v in (raw.embeddings, raw.margins)]  # (P, D), (P, D or 1)
        embeddings, margins = (group_means(v[chosen], group[chosen], sum(counts)).split(counts) for v in coded)
        assigned = torch.zeros(sum(counts), dtype=torch.bool, device=owner.device).index_fill(0, group, True)
        terms["mask"] = self._mask_loss(raw, targets, truths, embeddings, margins, assigned.split(counts))
        if self.smooth_weight:
            share = torch.cat([goal.new_full((c,), 1 / (max(1, c) * len(counts))) for c in counts])
            spread = sum((v - group_means(v[good], group[good], sum(counts))[group]).square().sum(1) for v in coded)
            terms["smooth"] = self.smooth_weight * (spread * share[group])[good].sum()
        return terms

    @torch.no_grad()
    def assign(
        self, raw: Raw, target: Instances
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 4"], Bool[Tensor, "g h w"]]:
        """Assigns locations to the objects of one image.

        Returns:
            For each location the index of its object, or -1, and its distances to the object's box in strides; for each
            object its mask on the cells of `raw.pixels`, upsampled by two.
        """
        levels = fcos.locations(raw.logits)
        points = torch.cat(levels)
        strides = fcos.per_location(levels, [float(s) for s in fcos.STRIDES])
        height, width = raw.pixels.shape[-2:]
        on_mask, truth = seen_at(target.masks, points, (2 * height, 2 * width), CELL)
        owner, inner = fcos.assign(
            points, strides, fcos.per_location(levels, self.ranges), target.boxes - _corner(target.boxes, self.last),
            radius=self.radius, allowed=on_mask if self.in_mask else None, plus_one=self.inclusive,
        )  # fmt: skip
        return owner, inner / strides[:, None], truth

    def _mask_loss(
        self, raw: Raw, targets: Sequence[Instances], truths: Sequence[Tensor], embeddings: Sequence[Tensor],
        margins: Sequence[Tensor], assigned: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """The Lovász hinge of each object's map, mean over the objects of an image, mean over the images."""
        pixels = functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear", align_corners=False)
        # All embeddings have a gradient, whatever the objects.
        total = sum((v[..., :0].sum() for v in (*raw.embeddings, *raw.margins)), pixels[..., :0].sum())
        for number, (target, rows) in enumerate(zip(targets, assigned, strict=True)):
            own = self.object_losses(
                pixels[number], embeddings[number][rows], margins[number][rows], truths[number][rows],
                target.boxes[rows] - _corner(target.boxes[rows], self.last),
            )  # fmt: skip
            total = total + own.sum() / max(1, len(target) if self.rules.mean_over == "all" else len(own))
        return self.mask_weight * total / len(targets)

    def object_losses(
        self,
        pixels: Float[Tensor, "d h w"],
        embeddings: Float[Tensor, "g d"],
        margins: Float[Tensor, "g m"],
        truth: Bool[Tensor, "g h w"],
        boxes: Float[Tensor, "g 4"],
        budget: int = 256 << 20,
    ) -> Float[Tensor, " g"]:
        """The mask loss of each object, on the whole map or inside its enlarged box.

        Args:
            pixels: Pixel embeddings of one image.
            embeddings: Embedding of each object.
            margins: Margins of each object.
            truth: Mask of each object.
            boxes: Box of each object, in the input's pixels.
            budget: Bytes kept for the backward pass. If all objects need more, they are processed in parts, which are
                computed again in the backward pass.
        """

        def some(embeddings: Tensor, margins: Tensor, truth: Tensor, boxes: Tensor) -> Tensor:
            apart = pixels - embeddings[:, :, None, None]  # (g, D, h, w)
            log_p = -(apart.square() * margins[:, :, None, None]).sum(1).flatten(1)
            # log p - log(1 - p) with p bounded away from 0 and 1. The code computes p itself, whose upper bound in
            # float32 is 1, so that the loss of an embedding that equals a wrong pixel's is infinite.
            log_p = log_p.clamp(math.log(SMALLEST), -SMALLEST)
            logits, truth = log_p - (-torch.expm1(log_p)).log(), truth.flatten(1)
            if self.crop is not None:
                inside = cells_inside(boxes / CELL, pixels.shape[1:], self.crop).flatten(1)
                # A cell outside has no error and is sorted last: it changes neither order nor weights of the others.
                logits, truth = logits.masked_fill(~inside, -1e9), truth & inside
            return lovasz_hinge(logits, truth.float())

        # Three float32 values per pixel, dimension and object are kept; in parts, four are held at once.
        if 12 * pixels.numel() * len(embeddings) <= budget:
            return some(embeddings, margins, truth, boxes)
        step = max(1, budget // (16 * pixels.numel()))
        parts = zip(*(v.split(step) for v in (embeddings, margins, truth, boxes)), strict=True)
        return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])  # pyright: ignore

    # ---- decoding --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        detections: int = 100,
        mask_threshold: float | None = None,
        candidates: int = 1000,
    ) -> list[Instances]:
        """Converts the raw output to objects.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Up to 0.05 a threshold of the class probability, as published; above, also of the score
                (class probability times centerness).
            nms_threshold: Objects whose IoU with a better one of their class is larger are suppressed.
            detections: Largest number of objects.
            mask_threshold: Probability above which a pixel belongs to the object; None is the generation's. At 0 the
                mask is all of the detection's region that is more probable than the outside.
            candidates: Number of locations kept per level before suppression.

        Returns:
            The objects of each image, best first, on the image's own pixel grid.
        """
        sizes = [p.size for p in placements]
        detected = self.detect(raw, sizes, score_threshold, nms_threshold, detections, candidates)
        pixels = functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear", align_corners=False)
        threshold = self.rules.threshold if mask_threshold is None else mask_threshold
        if not 0 <= threshold <= 1:
            raise UsageError(f"mask_threshold must be a probability between 0 and 1, got {threshold}")
        return [self._on_image(*each, threshold) for each in zip(detected, pixels, placements, strict=True)]

    @torch.no_grad()
    def detect(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], score_threshold: float, nms_threshold: float,
        detections: int, candidates: int = 1000,
    ) -> list[Detections]:  # fmt: skip
        """Detections of each image, best first.

        Locations are ranked by class probability times centerness (here without a square root). If several have the
        last score, the original keeps all of them, this no more than `detections`.

        Args:
            raw: What `forward` returned.
            sizes: Height and width of the part of each input that is not padding.
            score_threshold: See `decode`, as for the following.
            nms_threshold: Of the IoU.
            detections: Largest number of objects.
            candidates: Number of locations kept per level before suppression.
        """
        candidate = min(score_threshold, CANDIDATE)
        levels = fcos.locations(raw.logits)
        scores, labels, indices, first = [], [], [], 0
        for logits, central in zip(raw.logits, raw.centerness, strict=True):
            probability = logits.float().sigmoid().flatten(2)  # (B, K, n)
            ranked = torch.where(probability > candidate, probability * central.float().sigmoid().flatten(2), -1.0)
            ranked = ranked.transpose(1, 2).flatten(1)  # (B, n K), location by location
            best = ranked.topk(min(candidates, ranked.shape[1]))
            scores.append(best.values)
            labels.append(best.indices % len(self.classes))
            indices.append(best.indices // len(self.classes) + first)
            first += probability.shape[2]
        score, label, index = (torch.cat(v, 1) for v in (scores, labels, indices))  # (B, M)
        strides = fcos.per_location(levels, [float(s) for s in fcos.STRIDES])
        points, distances = torch.cat(levels), _rows(raw.distances).float() * strides[:, None]
        embeddings, margins = _rows(raw.embeddings), _rows(raw.margins)
        result = []
        for number, (height, width) in enumerate(sizes):
            rows = (score[number] > (score_threshold if score_threshold > CANDIDATE else -1)).nonzero().flatten()
            place = index[number, rows]
            boxes = fcos.boxes_from_distances(points[place], distances[number, place])
            boxes = box_ops.clip(boxes, (height, width), plus_one=self.inclusive)
            kept = box_ops.nms(
                boxes, score[number, rows], label[number, rows], nms_threshold, detections, plus_one=self.inclusive
            )
            rows, place, boxes = rows[kept], place[kept], boxes[kept]
            own = score[number, rows], label[number, rows], embeddings[number, place], margins[number, place]
            result.append(Detections(boxes, *own))
        return result

    def _on_image(
        self, detected: Detections, pixels: Float[Tensor, "d h w"], placement: Placement, threshold: float
    ) -> Instances:
        """Detections of one image on the image's own grid."""
        # The last pixel that counts is one of the image's, as in the results that the original writes.
        scale = detected.boxes.new_tensor([0.0, 0.0, *placement.scale])
        boxes = box_ops.clip(placement.boxes_to_image(detected.boxes + self.last * scale), placement.image_size)
        solid = ((boxes[:, 2:] > boxes[:, :2]).all(1)).nonzero().flatten()
        masks = self.masks(
            pixels, detected.boxes[solid], detected.embeddings[solid], detected.margins[solid], placement, threshold
        )
        return Instances(placement.image_size, boxes[solid], detected.labels[solid], masks, detected.scores[solid])

    def masks(
        self,
        pixels: Float[Tensor, "d h w"],
        boxes: Float[Tensor, "n 4"],
        embeddings: Float[Tensor, "n d"],
        margins: Float[Tensor, "n m"],
        placement: Placement,
        threshold: float,
        budget: int = 64 << 20,
    ) -> Masks:
        """Masks of detections on the image's own grid.

        Args:
            pixels: Pixel embeddings of the image, upsampled by two.
            boxes: Boxes of the detections, in the input's pixels.
            embeddings: Their embeddings.
            margins: Their margins.
            placement: How the image was placed in the network's input.
            threshold: Probability above which a pixel belongs to the object.
            budget: Bytes of scratch memory; objects of similar size are processed together.
        """
        if not len(boxes):
            return Masks.empty(placement.image_size)
        grid = (pixels.shape[1], pixels.shape[2])
        across, down = placement.scale
        # Rounded up, so that the image is covered, except for a rounding error above an integer.
        stretched = tuple(math.ceil(round(CELL * n / s, 6)) for n, s in zip(grid, (down, across), strict=True))
        if self.rules.logarithm:
            # Not below the outside, which must remain outside, rounding in the resizing included.
            threshold = max(math.log(threshold), OUTSIDE + 1e-3) if threshold > 0 else OUTSIDE + 1e-3
        order = box_ops.area(boxes).argsort(descending=True)
        sides = ((boxes[:, 2:] - boxes[:, :2]) / CELL + 8)[order].cpu()
        parts, first = [], 0
        while first < len(boxes):
            cells = float(sides[first:].amax(0).prod())  # upper bound of each of the following windows
            chosen = order[first : first + max(1, int(budget // (12 * len(pixels) * cells)))]
            values, corners = mask_windows(
                pixels, boxes[chosen], embeddings[chosen], margins[chosen], region=self.rules.region,
                logarithm=self.rules.logarithm,
            )  # fmt: skip
            parts.append(
                paste_windows(
                    values, corners, grid, stretched, placement.image_size,  # pyright: ignore[reportArgumentType]
                    threshold=threshold, shift=(placement.offset[0] / across, placement.offset[1] / down),
                    mirrored=placement.mirrored, budget=budget,
                )
            )  # fmt: skip
            first += len(chosen)
        return Masks.join(parts)[order.argsort()]

    # ---- for loading and training ----------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        net = self.dense
        held = (net.backbone, net.neck)
        return {"backbone": [net.backbone], "neck": [net.neck], "heads": [m for m in net.children() if m not in held]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.class_logits.{kind}": ClassRows() for kind in ("weight", "bias")}

    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{part}.": f"dense.{part}."
        for part in (
            "backbone", "neck", "class_tower", "box_tower", "class_logits", "distances", "centerness",
            "distance_scales", "proposal_embedding", "mask_tower", "pixel_embedding", "place_scale", "margin",
            "margin_scales",
        )
    }  # fmt: skip

    # The original's rate is a third for 500 steps of warm-up; here it rises from a third.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "warmup": 500, "warmup_from": 1 / 3, "rates": {"*.bias": 2.0}, "decay_norms": True, "long": 1333,
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "embedmask-1x": {**_RECIPE, "steps": 90_000, "milestones": (60 / 90, 80 / 90), "short": (800,)},
        "embedmask-3x": {**_RECIPE, "steps": 270_000, "milestones": (210 / 270, 250 / 270), "short": (640, 800)},
    }

    _TEST = "COCO test 2014 as the README has it, short side 800"
    presets: ClassVar[Mapping[str, Preset]] = {
        "embedmask-r50": Preset(_published("resnet50"), note="the code of 2021, 1x; it states no scores"),
        "embedmask-r101": Preset(
            _published("resnet101"), note="the code of 2021, 3x, two scales; it states no scores"
        ),
        "embedmask-r50-gen2": Preset(
            _published("resnet50", generation=2),
            (Score(34.7, "mask AP", _TEST, "README of May 2020"),),
            "the code of May 2020, 1x",
        ),
        "embedmask-r101-gen2": Preset(
            _published("resnet101", generation=2),
            (Score(38.1, "mask AP", _TEST, "README of May 2020"),),
            "the code of May 2020, 3x, two scales (1x: 36.4)",
        ),
        "embedmask-r50-gen1": Preset(_published("resnet50", generation=1), note="the code of December 2019, 1x"),
        "embedmask-r101-gen1": Preset(
            _published("resnet101", generation=1),
            (Score(37.7, "mask AP", "COCO test-dev, short side 800", "arXiv paper, by Papers with Code"),),
            "the arXiv paper's, 3x, two scales",
        ),
        "embedmask-small": Preset(
            {
                "backbone": {"name": "resnet18"}, "neck_width": 128, "convs": 2, "splits": (32, 64, 128, 256),
                "resize": {"short": 320, "long": 512},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


def _rows(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b n c"]:
    """All locations of all levels as rows."""
    return torch.cat([v.flatten(2) for v in levels], 2).transpose(1, 2)


def _corner(like: Tensor, last: float) -> Float[Tensor, " 4"]:
    """0, 0, last, last."""
    return like.new_tensor([0.0, 0.0, last, last])
