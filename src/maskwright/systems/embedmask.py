"""EmbedMask (Ying, Huang, Liu, Shao, Zhou, arXiv 1912.01954; IJCAI 2021).

A one-stage detector, FCOS, says at every place of a pyramid what is there and how far its box reaches. Two embeddings
turn boxes into masks: every place also has a proposal embedding and a margin, every pixel of the finest level a pixel
embedding. A pixel belongs to a detection if it lies near it in that space,

    p(pixel | detection) = exp(-sum_d margin_d (pixel_d - proposal_d)^2),

inside the detection's box. The margin is learnt, so that large objects may be wide in the embedding and small ones
narrow. It is 1 / (2 sigma^2), a factor on the squared distance and not a distance: p is a half at sqrt(ln 2 / margin).

The code was published three times, with different tensors: `RULES` says what each generation does.
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
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import Norm
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.losses import lovasz_hinge
from maskwright.ops.mask_targets import seen_at
from maskwright.ops.windows import paste_windows
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System

CELL = 4  # input pixels of a mask's cell: the finest level (stride 8), doubled
OUTSIDE = -10.0  # the log-probability of what lies outside a detection's region, where masks are resized as such
CANDIDATE = 0.05  # probability of a class at which a place is looked at
SMALLEST = 1e-9  # probabilities are kept this far from 0 and 1 where their logits are taken
# A region of cells in which a mask is computed: the box's whole cells and two more ("padded"), or one more ("near").
Region = Literal["padded", "near"]


@dataclass(frozen=True)
class Rules:
    """What one generation of the code does."""

    dimensions: int  # of the embeddings
    coordinates: bool  # the first two dimensions also carry the place, in hundreds of pixels
    margin: Literal["box", "one", "each"]  # read from the predicted box; one for all dimensions; one for each
    learnt_from: Literal["good", "best"]  # an object's mask: the mean of its good places, or its best place alone
    mean_over: Literal["all", "learnt"]  # objects that the mask loss counts: all, or those with a place
    smooth: float  # weight of the smooth loss
    crop: float | None  # masks are learnt inside the object's box, grown by this share of it on each side
    logarithm: bool  # masks are resized as log-probabilities (-10 outside) instead of probabilities (0 outside)
    region: Region
    threshold: float  # of the probability


RULES = {
    # December 2019, the arXiv paper
    1: Rules(32, False, "box", "good", "all", 0.1, 0.1, False, "near", 0.5),
    # May 2020
    2: Rules(8, True, "one", "best", "learnt", 0.0, 0.1, False, "near", 0.53),
    # May 2021, IJCAI
    3: Rules(16, True, "each", "best", "learnt", 0.0, None, True, "padded", 0.53),
}

PREPROCESS = Preprocess(
    resample="pillow", sizes="benchmark", mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), divide=1.0,
    channels="BGR",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """What the network says of every place of each level (finest first), and of every pixel of the finest."""

    logits: tuple[Float[Tensor, "b k _h _w"], ...]
    distances: tuple[Float[Tensor, "b 4 _h _w"], ...]  # to the box's left, top, right, bottom, in strides
    centerness: tuple[Float[Tensor, "b 1 _h _w"], ...]  # logits
    embeddings: tuple[Float[Tensor, "b d _h _w"], ...]  # float32, as the two below
    margins: tuple[Float[Tensor, "b m _h _w"], ...]  # factors on squared distances; m = d or 1
    pixels: Float[Tensor, "b d h w"]


class EmbedMask(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `mask_threshold` (a
    probability; None: the generation's; 0: all of a detection's region that is likelier than what lies outside it) and
    `candidates`, the places that each level may suggest."""

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
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        stride_in: StrideIn = "3x3",
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
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
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        generation      of the published code: see RULES. The paper on arXiv is 1, the one of IJCAI 3
        backbone, pretrained, in_channels, stem_width, stride_in
                        the trunk: see `blocks.trunk.make_trunk`
        norm, norm_eps, frozen
                        "group" trains from random weights; published weights have "frozen" with an epsilon of 0, stem
                        and first stage (2) untrained
        neck_width      channels of the pyramid and of the towers
        convs, mask_convs  layers of the towers of classes and boxes, and of pixels (None: as many)
        dimensions      of the embeddings; None: the generation's (table 5 of the arXiv paper tries several)
        fixed_margin    all margins are ln 2 / prior_margin^2 instead of learnt (table 2)
        prior_margin    the distance in the embedding at which a new network's probability is a half
        splits          the largest distance to a side, in pixels, that each level but the last answers for
        radius          of the square around the box's centre, in strides, that an object is learnt in; None: its box
        in_mask         an object is learnt only at places on its mask
        mask_weight, smooth_weight
                        of the mask and smooth losses; None: the generation's. The smooth loss draws what an object's
                        good places say together
        crop            masks are learnt inside the box grown by this share (and a cell); negative: on all pixels; None:
                        the generation's
        inclusive       boxes end at their last pixel, x1 - x0 + 1 wide, as the published weights say them
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        if generation not in RULES:
            raise UsageError(f"generation is {generation!r}; expected 1, 2 or 3")
        if len(splits) != 4:
            raise UsageError(f"splits has {len(splits)} entries; five levels need 4")
        if not prior_margin > 0:
            raise UsageError(f"prior_margin is {prior_margin}; expected a distance above 0 (published: 2)")
        self.classes = tuple(classes)
        self.rules = rules = RULES[generation]
        self.radius, self.in_mask, self.last = radius, in_mask, 1.0 if inclusive else 0.0
        bounds = (-1.0, *map(float, splits), 1e8)
        self.ranges = tuple(pairwise(bounds))
        self.mask_weight = mask_weight
        self.smooth_weight = rules.smooth if smooth_weight is None else smooth_weight
        self.crop = rules.crop if crop is None else crop if crop >= 0 else None
        # The paper and the code begin with margins that give one half at the distance `prior_margin`.
        self.first_margin = math.log(2) / prior_margin**2

        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, stride_in=stride_in,
            norm=norm, norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        self.neck = FPN(channels[1:], neck_width, extra="output", relu="between")
        self.class_tower, self.box_tower = (fcos.tower(neck_width, convs) for _ in range(2))
        self.class_logits = fcos.output_conv(neck_width, len(self.classes), -math.log(99))
        self.distances = fcos.output_conv(neck_width, 4)
        self.centerness = fcos.output_conv(neck_width, 1)
        self.distance_scales = nn.ModuleList(fcos.Scale() for _ in fcos.STRIDES)

        size = rules.dimensions if dimensions is None else dimensions
        if size < (3 if rules.coordinates else 1):
            raise UsageError(f"dimensions is {size}; generation {generation} needs {3 if rules.coordinates else 1}")
        self.proposal_embedding = fcos.output_conv(neck_width, size)
        self.mask_tower = fcos.tower(neck_width, convs if mask_convs is None else mask_convs)
        self.pixel_embedding = fcos.output_conv(neck_width, size)
        self.place_scale = fcos.Scale() if rules.coordinates else None  # shared by pixels and proposals
        self.margin = self.margin_scales = None
        if not fixed_margin and rules.margin == "box":
            self.margin = nn.Conv2d(4, 1, 1)
            nn.init.normal_(self.margin.weight, std=0.01)
            nn.init.constant_(self.margin.bias, math.log(self.first_margin))  # pyright: ignore[reportArgumentType]
        elif not fixed_margin:
            outputs = size if rules.margin == "each" else 1
            self.margin = fcos.output_conv(neck_width, outputs, math.log(self.first_margin))
        if not fixed_margin and rules.margin == "each":
            self.margin_scales = nn.ModuleList(fcos.Scale() for _ in fcos.STRIDES)

        preprocess = Preprocess.from_dict({**PREPROCESS.to_dict(), "short": short, "long": long})
        self.preprocess = normalization_for(preprocess, in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        levels = self.neck(self.backbone(images)[1:])  # strides 8 ... 128
        places = fcos.locations(levels)
        logits, distances, centerness, embeddings, margins = [], [], [], [], []
        for number, (level, place) in enumerate(zip(levels, places, strict=True)):
            read = self.box_tower(level)
            logits.append(self.class_logits(self.class_tower(level)))
            centerness.append(self.centerness(read))
            distances.append(functional.relu(self.distance_scales[number](self.distances(read))))
            embeddings.append(self._placed(self.proposal_embedding(read), place))
            margins.append(self._margin(read, distances[-1], number))
        pixels = self._placed(self.pixel_embedding(self.mask_tower(levels[0])), places[0])
        return Raw(tuple(logits), tuple(distances), tuple(centerness), tuple(embeddings), tuple(margins), pixels)

    def _placed(self, embedding: Float[Tensor, "b d h w"], place: Float[Tensor, "n 2"]) -> Float[Tensor, "b d h w"]:
        """In float32, the place added to the first two dimensions."""
        embedding = embedding.float()
        if self.place_scale is None:
            return embedding
        at = self.place_scale.scale.float() * place.T.unflatten(1, embedding.shape[-2:]) / 100  # (2, h, w)
        return torch.cat([embedding[:, :2] + at, embedding[:, 2:]], 1)

    def _margin(
        self, read: Float[Tensor, "b c h w"], distances: Float[Tensor, "b 4 h w"], number: int
    ) -> Float[Tensor, "b m h w"]:
        if self.margin is None:
            return read.new_full((len(read), 1, *read.shape[-2:]), self.first_margin, dtype=torch.float32)
        if self.rules.margin == "box":  # in units of 800 pixels; boxes are not learnt through it
            return self.margin((distances * (fcos.STRIDES[number] / 800)).detach()).float().exp()
        logarithm = self.margin(read / 32).float()
        if self.margin_scales is not None:
            near = self.margin_scales[number](logarithm[:, :2])
            logarithm = torch.cat([near, logarithm[:, 2:]], 1)
        return logarithm.exp()

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `box`, `centerness`, `mask`, and `smooth` where it has a weight.

        Targets are in the frame of the input; crowd regions are not learnt from.
        """
        targets = [(t if t.crowd is None else t[~t.crowd]).to(raw.pixels.device) for t in targets]
        if any(t.masks is None and len(t) for t in targets):
            raise UsageError("a target has boxes but no masks; EmbedMask learns masks, give a data set that has them")
        owners, goals, truths = zip(*(self.assign(raw, t) for t in targets), strict=True)
        owner, goal = torch.stack(owners), torch.stack(goals)  # (B, N), (B, N, 4)
        logits, said, central = (_rows(v).float() for v in (raw.logits, raw.distances, raw.centerness))
        labels = torch.cat([t.labels[o[o >= 0]] for t, o in zip(targets, owners, strict=True)])
        terms = fcos.location_losses(logits, said, central[..., 0], owner >= 0, labels, goal)

        # What an object's places say of its mask; the objects of all images are numbered through.
        counts = [len(t) for t in targets]
        image, place = (owner >= 0).nonzero().unbind(1)  # (P,) each
        group = owner[image, place] + torch.tensor([0, *counts], device=owner.device).cumsum(0)[image]
        stride = fcos.per_location(fcos.locations(raw.logits), [float(s) for s in fcos.STRIDES])[place, None]
        last = _corner(goal, self.last)
        found, wanted = said.detach()[image, place] * stride + last, goal[image, place] * stride + last
        good, best = good_places(fcos.overlap(found, wanted), group, sum(counts))
        chosen = good if self.rules.learnt_from == "good" else best
        spoken = [_rows(v)[image, place] for v in (raw.embeddings, raw.margins)]  # (P, D), (P, D or 1)
        embeddings, margins = (_means(v[chosen], group[chosen], sum(counts)).split(counts) for v in spoken)
        learnt = torch.zeros(sum(counts), dtype=torch.bool, device=owner.device).index_fill(0, group, True)
        terms["mask"] = self._mask_loss(raw, targets, truths, embeddings, margins, learnt.split(counts))
        if self.smooth_weight:
            share = torch.cat([goal.new_full((c,), 1 / (max(1, c) * len(counts))) for c in counts])
            away = sum((v - _means(v[good], group[good], sum(counts))[group]).square().sum(1) for v in spoken)
            terms["smooth"] = self.smooth_weight * (away * share[group])[good].sum()
        return terms

    @torch.no_grad()
    def assign(
        self, raw: Raw, target: Instances
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 4"], Bool[Tensor, "g h w"]]:
        """For each place the object it answers for (-1: none) and its distances to the box in strides; for each object
        its mask in the cells of the pixels' map."""
        levels = fcos.locations(raw.logits)
        places = torch.cat(levels)
        strides = fcos.per_location(levels, [float(s) for s in fcos.STRIDES])
        height, width = raw.pixels.shape[-2:]
        on_mask, truth = seen_at(target.masks, places, (2 * height, 2 * width), CELL)
        owner, inner = fcos.assign(
            places, strides, fcos.per_location(levels, self.ranges), target.boxes - _corner(target.boxes, self.last),
            radius=self.radius, allowed=on_mask if self.in_mask else None, plus_one=self.last > 0,
        )  # fmt: skip
        return owner, inner / strides[:, None], truth

    def _mask_loss(
        self, raw: Raw, targets: Sequence[Instances], truths: Sequence[Tensor], embeddings: Sequence[Tensor],
        margins: Sequence[Tensor], learnt: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """The Lovász hinge of each object's map, mean over the objects of an image, mean over the images."""
        pixels = functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear", align_corners=False)
        # Whatever the objects, all embeddings have a gradient.
        total = sum((v[..., :0].sum() for v in (*raw.embeddings, *raw.margins)), pixels[..., :0].sum())
        for number, (target, rows) in enumerate(zip(targets, learnt, strict=True)):
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
        """Each object's loss on the whole map, or inside its box where the rules say so.

        `budget`: bytes kept for the way back. If all objects need more, they are computed some at a time and once more
        on the way back.
        """

        def some(embeddings: Tensor, margins: Tensor, truth: Tensor, boxes: Tensor) -> Tensor:
            apart = pixels - embeddings[:, :, None, None]  # (g, D, h, w)
            near = -(apart.square() * margins[:, :, None, None]).sum(1).flatten(1)  # log-probabilities
            # log p - log(1 - p), p kept from 0 and 1. The code takes p itself, whose upper bound is 1 in float32: an
            # embedding that coincides with a pixel's is infinitely sure there, and its loss infinite where it is wrong.
            near = near.clamp(math.log(SMALLEST), -SMALLEST)
            logits, truth = near - (-torch.expm1(near)).log(), truth.flatten(1)
            if self.crop is not None:
                inside = _inside(boxes / CELL, pixels.shape[1:], self.crop).flatten(1)
                # A cell outside has no error and comes last: it changes neither the others' order nor their weights.
                logits, truth = logits.masked_fill(~inside, -1e9), truth & inside
            return lovasz_hinge(logits, truth.float())

        # Kept for the way back are three float32 values a pixel, dimension and object; some at a time, four are held.
        if 12 * pixels.numel() * len(embeddings) <= budget:
            return some(embeddings, margins, truth, boxes)
        step = max(1, budget // (16 * pixels.numel()))
        parts = zip(*(v.split(step) for v in (embeddings, margins, truth, boxes)), strict=True)
        return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])  # pyright: ignore

    # ---- objects -------------------------------------------------------------------------------------------------

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
        sizes = [p.size for p in placements]
        found = self.find(raw, sizes, score_threshold, nms_threshold, detections, candidates)
        pixels = functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear", align_corners=False)
        threshold = self.rules.threshold if mask_threshold is None else mask_threshold
        if not 0 <= threshold <= 1:
            raise UsageError(f"mask_threshold is {threshold}; expected a probability, 0 ... 1")
        return [self._on_image(*each, threshold) for each in zip(found, pixels, placements, strict=True)]

    @torch.no_grad()
    def find(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], score_threshold: float, nms_threshold: float,
        detections: int, candidates: int = 1000,
    ) -> list[Detections]:  # fmt: skip
        """Detections of each image of valid size (h, w) in the input's pixels, best first.

        A place is a candidate by its class alone, above 0.05 as published or `score_threshold` if that is less; ranked,
        it is by class times centerness (no square root here), which has to be above a larger `score_threshold` too.
        Where several share the last score, the code keeps all of them, this no more than `detections`.
        """
        candidate = min(score_threshold, CANDIDATE)
        levels = fcos.locations(raw.logits)
        scores, labels, indices, first = [], [], [], 0
        for logits, central in zip(raw.logits, raw.centerness, strict=True):
            sure = logits.float().sigmoid().flatten(2)  # (B, K, n)
            ranked = torch.where(sure > candidate, sure * central.float().sigmoid().flatten(2), -1.0)
            ranked = ranked.transpose(1, 2).flatten(1)  # (B, n K), places first
            best = ranked.topk(min(candidates, ranked.shape[1]))
            scores.append(best.values)
            labels.append(best.indices % len(self.classes))
            indices.append(best.indices // len(self.classes) + first)
            first += sure.shape[2]
        score, label, index = (torch.cat(v, 1) for v in (scores, labels, indices))  # (B, M)
        strides = fcos.per_location(levels, [float(s) for s in fcos.STRIDES])
        places, distances = torch.cat(levels), _rows(raw.distances).float() * strides[:, None]
        embeddings, margins = _rows(raw.embeddings), _rows(raw.margins)
        result = []
        for number, (height, width) in enumerate(sizes):
            rows = (score[number] > (score_threshold if score_threshold > CANDIDATE else -1)).nonzero().flatten()
            place = index[number, rows]
            own = fcos.boxes_of(places[place], distances[number, place])
            own = box_ops.clip(own, (height - self.last, width - self.last))
            # A box that ends at its last pixel overlaps as one that ends a pixel later.
            grown = own + _corner(own, self.last)
            kept = box_ops.nms(grown, score[number, rows], label[number, rows], nms_threshold, detections)
            rows, place, own = rows[kept], place[kept], own[kept]
            result.append(
                Detections(
                    own, score[number, rows], label[number, rows], embeddings[number, place], margins[number, place]
                )
            )
        return result

    def _on_image(
        self, found: Detections, pixels: Float[Tensor, "d h w"], placement: Placement, threshold: float
    ) -> Instances:
        # The last pixel that counts is one of the image's, as in the results that the code writes.
        scale = found.boxes.new_tensor([0.0, 0.0, *placement.scale])
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes + self.last * scale), placement.image_size)
        solid = ((boxes[:, 2:] > boxes[:, :2]).all(1)).nonzero().flatten()
        masks = self.masks(
            pixels, found.boxes[solid], found.embeddings[solid], found.margins[solid], placement, threshold
        )
        return Instances(placement.image_size, boxes[solid], found.labels[solid], masks, found.scores[solid])

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
        """Masks of detections (in the input's pixels) on the image; `budget` bytes of scratch, objects of like size
        together."""
        if not len(boxes):
            return Masks.empty(placement.image_size)
        grid = (pixels.shape[1], pixels.shape[2])
        across, down = placement.scale
        # Rounded up, so that the image is covered; a rounding step above a whole number is none.
        stretched = tuple(math.ceil(round(CELL * n / s, 6)) for n, s in zip(grid, (down, across), strict=True))
        if self.rules.logarithm:
            # What lies outside must stay so: no lower than that, rounding of the resizing included.
            threshold = max(math.log(threshold), OUTSIDE + 1e-3) if threshold > 0 else OUTSIDE + 1e-3
        order = box_ops.area(boxes).argsort(descending=True)
        sides = ((boxes[:, 2:] - boxes[:, :2]) / CELL + 8)[order].cpu()
        parts, first = [], 0
        while first < len(boxes):
            cells = float(sides[first:].amax(0).prod())  # at most so many in each window that follows
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

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        parts = {"backbone": [self.backbone], "neck": [self.neck]}
        held = {id(m) for modules in parts.values() for m in modules}
        return {**parts, "heads": [m for m in self.children() if id(m) not in held]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_logits.{kind}": ClassRows() for kind in ("weight", "bias")}

    # The code warms up by 500 steps at a third of the rate; here the rate rises from there.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "lr": 0.01, "warmup": 500, "warmup_from": 1 / 3, "rates": {"*.bias": 2.0}, "decay_norms": True, "long": 1333,
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "embedmask-1x": {**_RECIPE, "steps": 90_000, "milestones": (60 / 90, 80 / 90), "short": (800,)},
        "embedmask-3x": {**_RECIPE, "steps": 270_000, "milestones": (210 / 270, 250 / 270), "short": (640, 800)},
    }

    _PUBLISHED: ClassVar[dict[str, Any]] = {
        "stride_in": "1x1", "norm": "frozen", "norm_eps": 0.0, "frozen": 2, "inclusive": True,
    }  # fmt: skip
    _TEST = "COCO test 2014 as the README has it, short side 800"
    presets: ClassVar[Mapping[str, Preset]] = {
        "embedmask-r50": Preset(_PUBLISHED, note="the code of 2021, 1x; it states no scores"),
        "embedmask-r101": Preset(
            {**_PUBLISHED, "backbone": "resnet101"}, note="the code of 2021, 3x, two scales; it states no scores"
        ),
        "embedmask-r50-gen2": Preset(
            {**_PUBLISHED, "generation": 2},
            (Score(34.7, "mask AP", _TEST, "README of May 2020"),),
            "the code of May 2020, 1x",
        ),
        "embedmask-r101-gen2": Preset(
            {**_PUBLISHED, "generation": 2, "backbone": "resnet101"},
            (Score(38.1, "mask AP", _TEST, "README of May 2020"),),
            "the code of May 2020, 3x, two scales (1x: 36.4)",
        ),
        "embedmask-r50-gen1": Preset({**_PUBLISHED, "generation": 1}, note="the code of December 2019, 1x"),
        "embedmask-r101-gen1": Preset(
            {**_PUBLISHED, "generation": 1, "backbone": "resnet101"},
            (Score(37.7, "mask AP", "COCO test-dev, short side 800", "arXiv paper, by Papers with Code"),),
            "the arXiv paper's, 3x, two scales",
        ),
        "embedmask-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "convs": 2, "splits": (32, 64, 128, 256), "short": 320,
                "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Detections:
    """Detections of one image: boxes in the input's pixels, and what makes their masks."""

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    embeddings: Float[Tensor, "n d"]
    margins: Float[Tensor, "n m"]


def mask_windows(
    pixels: Float[Tensor, "d h w"],
    boxes: Float[Tensor, "n 4"],
    embeddings: Float[Tensor, "n d"],
    margins: Float[Tensor, "n m"],
    *,
    region: Region,
    logarithm: bool,
) -> tuple[Float[Tensor, "n r c"], Int[Tensor, "n 2"]]:
    """Each detection's (log-)probabilities in the cells around its box alone, with a border (OUTSIDE, or 0) of at least
    a cell, and the cell x, y of the map that each window begins at."""
    height, width = pixels.shape[1:]
    limit, cells = boxes.new_tensor([width, height]), boxes / CELL
    if region == "padded":
        low, high = cells[:, :2].trunc() - 2, cells[:, 2:].trunc() + 2
    else:
        low, high = (cells[:, :2] - 1).ceil(), (cells[:, 2:] + 1).ceil()
    low, high = low.clamp(min=0).long(), high.minimum(limit).long()
    corners = low - 1
    columns, rows = ((high - low).amax(0) + 2).clamp(min=2).tolist()
    x = corners[:, :1] + torch.arange(columns, device=boxes.device)  # (n, c)
    y = corners[:, 1:] + torch.arange(rows, device=boxes.device)  # (n, r)
    across = (x >= low[:, :1]) & (x < high[:, :1])
    inside = across[:, None] & ((y >= low[:, 1:]) & (y < high[:, 1:]))[..., None]  # (n, r, c)
    cell = (y.clamp(0, height - 1) * width)[..., None] + x.clamp(0, width - 1)[:, None]
    apart = pixels.flatten(1).T[cell].sub_(embeddings[:, None, None])  # (n, r, c, D), in one place: memory is slow
    near = -apart.square_().mul_(margins[:, None, None]).sum(-1)
    return torch.where(inside, near if logarithm else near.exp(), OUTSIDE if logarithm else 0.0), corners


def _rows(levels: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b n c"]:
    """All places of all levels, one after the other."""
    return torch.cat([v.flatten(2) for v in levels], 2).transpose(1, 2)


def _corner(like: Tensor, last: float) -> Float[Tensor, " 4"]:
    return like.new_tensor([0.0, 0.0, last, last])


def good_places(iou: Float[Tensor, " p"], group: Int[Tensor, " p"], count: int) -> tuple[Tensor, Tensor]:
    """Of each object's places: those whose boxes overlap it by more than a half, or the best of them if none does; and
    the best, the first of equal ones."""
    peak = iou.new_full((count,), -1.0).scatter_reduce(0, group, iou, "amax")[group]
    good = torch.where(peak > 0.5, iou > 0.5, iou == peak)
    number = torch.arange(len(iou), device=iou.device)
    ranked = torch.where(iou == peak, number, len(iou))
    first = number.new_full((count,), len(iou)).scatter_reduce(0, group, ranked, "amin")
    return good, number == first[group]


def _means(values: Float[Tensor, "p d"], group: Int[Tensor, " p"], count: int) -> Float[Tensor, "g d"]:
    """The mean of each object's rows; zeros where it has none."""
    total = values.new_zeros(count, values.shape[1]).index_add(0, group, values)
    return total / group.bincount(minlength=count).clamp(min=1)[:, None]


def _inside(cells: Float[Tensor, "g 4"], size: Sequence[int], share: float) -> Bool[Tensor, "g h w"]:
    """The cells of boxes grown by a share of their sides and by one cell; the map's last row and column never count."""
    grown = (cells[:, 2:] - cells[:, :2]) * share + 1
    low = (cells[:, :2] - grown).clamp(min=0)
    high = (cells[:, 2:] + grown).minimum(cells.new_tensor([size[1] - 1, size[0] - 1]))
    y, x = (torch.arange(n, device=cells.device) for n in size)
    across = (x >= low[:, :1]) & (x < high[:, :1])
    return across[:, None] & ((y >= low[:, 1:]) & (y < high[:, 1:]))[..., None]
