"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv 2005.12872).

A transformer reads the last level of a ResNet as tokens; a hundred learnt *queries* look at them, and each says at once
what one object is and where, or that it found none. In training queries and objects are matched one to one at the least
cost, so that nothing has to be suppressed afterwards. For panoptic segmentation (section 4.4) regions are detected like
objects, and a mask head is added: each query's attention over the encoder's output, per head, is the coarse mask that a
small convolutional net refines with the backbone's finer levels. It is trained on top of a frozen box model or jointly.

Paper and code differ: the published code resizes masks of a padded batch to each image without cutting the padding
off, in panoptic merging alone; here the padding is cut off, which is the same wherever there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.layers import GroupNorm, Norm
from maskwright.blocks.positions import padding_of, sine_positions
from maskwright.blocks.transformer import MLP, DecoderLayer, EncoderLayer
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import Pairs, assign
from maskwright.ops.losses import focal_sum
from maskwright.ops.planes import place_bits
from maskwright.ops.query_boxes import Boxed, box_costs, box_losses
from maskwright.ops.query_losses import class_losses, named, object_count, overlap_loss
from maskwright.structures import Instances, Masks, Panoptic, Placement, Preprocess
from maskwright.systems.base import (
    Card,
    ClassRows,
    FrozenFeatures,
    FrozenLayout,
    PanopticSystem,
    Preset,
    QueryDetector,
    Score,
    at_least,
    weighed,
)

BUDGET = 256 << 20  # bytes of scratch
PREPROCESS = Preprocess(sizes="benchmark", multiple=1)


@dataclass(frozen=True)
class Raw:
    """What the decoder says after each of its L layers, the last one last; and what masks are made of."""

    logits: Float[Tensor, "l b n k1"]  # the last class is "no object"
    boxes: Float[Tensor, "l b n 4"]  # centre x, y, width, height; shares of the image without padding
    queries: Float[Tensor, "b n c"]  # of the last layer
    memory: Float[Tensor, "b c h w"]  # the encoder's output
    projected: Float[Tensor, "b c h w"]  # its input
    levels: tuple[Float[Tensor, "b _d _h _w"], ...]  # of the backbone, from stride 16 to 4
    padding: Bool[Tensor, "b h w"]  # cells of `memory` that hold padding
    size: tuple[int, int]  # H, W of the input, padding included


class MaskHead(nn.Module):
    """Attention of a query over the memory, one map per head, refined from stride 32 to 4 (figure 8)."""

    def __init__(self, width: int, heads: int, channels: Sequence[int]):
        """`channels` of the backbone's levels of strides 16, 8, 4."""
        super().__init__()
        self.width, self.heads = width, heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        widths = [width + heads, width // 2, width // 4, width // 8, width // 16]
        reads = [width + heads, *widths[:-1]]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(reads, widths, strict=True))
        self.norms = nn.ModuleList(GroupNorm(math.gcd(8, c), c) for c in widths)
        self.adapters = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(channels, widths[1:4], strict=True))
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for layer in (*self.convs, *self.adapters, self.output):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        for layer in (self.query, self.key):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def attention(
        self, queries: Float[Tensor, "n c"], memory: Float[Tensor, "c h w"], padding: Bool[Tensor, "h w"]
    ) -> Float[Tensor, "n a h w"]:
        """Weights of each head at each place; those of all heads together sum to one."""
        q = self.query(queries).unflatten(1, (self.heads, -1)) * (self.width / self.heads) ** -0.5
        k = self.key(memory.flatten(1).T).unflatten(1, (self.heads, -1))
        weights = torch.einsum("nac,pac->nap", q, k).masked_fill(padding.flatten(), -torch.inf)
        return weights.flatten(1).softmax(1).unflatten(1, (self.heads, *padding.shape))

    def forward(
        self,
        queries: Float[Tensor, "n c"],
        memory: Float[Tensor, "c h w"],
        projected: Float[Tensor, "c h w"],
        levels: Sequence[Float[Tensor, "_d _h _w"]],
        padding: Bool[Tensor, "h w"],
    ) -> Float[Tensor, "n p q"]:
        """Logits at stride 4 of the masks of one image's queries."""
        weights = self.attention(queries, memory, padding)
        # The first convolution reads the image and the attention side by side; of the image, which all queries
        # share, its part is computed once.
        first: Any = self.convs[0]
        of_image, of_weights = first.weight.split([self.width, self.heads], 1)
        x = functional.conv2d(weights, of_weights, padding=1)
        x = x + functional.conv2d(projected[None], of_image, first.bias, padding=1)
        x = functional.relu(self.norms[0](x))
        for number in range(1, 5):
            x = functional.relu(self.norms[number](self.convs[number](x)))
            if number < 4:
                finer = self.adapters[number - 1](levels[number - 1][None])
                x = finer + functional.interpolate(x, size=finer.shape[-2:], mode="nearest")
        return self.output(x)[:, 0]


class DETR(PanopticSystem, QueryDetector):
    """See the module's text. `decode` takes `score_threshold` and `detections`; without masks its objects are boxes."""

    name = "detr"
    card = Card(
        title="DETR",
        paper="Carion, Massa, Synnaeve, Usunier, Kirillov, Zagoruyko: End-to-End Object Detection with Transformers. "
        "ECCV 2020",
        arxiv="2005.12872",
        code="facebookresearch/detr",
        code_licence="Apache-2.0",
    )
    sees_padding = True
    grows = ("mask_head.",)

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        masks: str = "keypoint",
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        dilated: bool = False,
        width: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        queries: int = 100,
        dropout: float = 0.1,
        auxiliary: bool = True,
        no_object: float = 0.1,
        cost: Sequence[float] = (1.0, 5.0, 2.0),
        weights: Sequence[float] = (1.0, 5.0, 2.0, 1.0, 1.0),
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        stuff           those of `classes` that are regions; they are detected, and matched, like objects
        masks           "none": boxes alone; "frozen": the mask head learns on top of a box model that does not (as
                        published: load the box model's weights first); "keypoint": everything learns at once
        backbone ... frozen
                        as in every system; published weights have norm "frozen" and two frozen parts
        dilated         DC5: the last stage dilates instead of striding, tokens are of stride 16
        width, heads, hidden, encoder_layers, decoder_layers, queries, dropout
                        of the transformer
        auxiliary       every decoder layer learns, not the last alone (table 4 of the paper's appendix has none)
        no_object       weight of "no object" in the cross entropy
        cost            of class, box (L1) and GIoU in matching; masks have no part in it
        weights         of the losses class, box, GIoU, mask (focal) and dice
        short, long, mean, std  preprocessing
        """
        super().__init__()
        if masks not in ("none", "frozen", "keypoint"):
            raise UsageError(f"masks is {masks!r}; expected none, frozen or keypoint")
        at_least("detr", 1, heads=heads, width=width, hidden=hidden, decoder_layers=decoder_layers, queries=queries)
        at_least("detr", 1, short=short, long=long)
        at_least("detr", 0, encoder_layers=encoder_layers, no_object=no_object)
        if width % 16 or width % heads:
            raise UsageError(f"width is {width}; expected a multiple of 16 and of the {heads} heads")
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.can_divide = masks != "none"
        self.auxiliary, self.no_object = auxiliary, no_object
        self.cost = weighed("detr", "cost", cost, ("class", "box", "giou"))
        self.weights = weighed("detr", "weights", weights, ("class", "box", "giou", "mask", "dice"))
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, norm=norm,
            norm_eps=norm_eps, frozen=frozen, dilation=2 if dilated else 1, dilate_first=False,
        )  # fmt: skip
        self.layout = FrozenLayout(width, width, (16 if dilated else 32,), channels[0])
        self.project = nn.Conv2d(channels[-1], width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(width, hidden, heads, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, hidden, heads, dropout) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.queries = nn.Embedding(queries, width)
        self.class_head = nn.Linear(width, len(self.classes) + 1)
        self.box_head = MLP((width, width, width, 4))
        self.mask_head = None if masks == "none" else MaskHead(width, heads, channels[2::-1])
        if masks == "frozen":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("mask_head."))
        self.preprocess = normalization_for(PREPROCESS.at(short, long), in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        levels = self.backbone(images)
        projected = self.project(levels[-1])  # (B, C, H/32, W/32)
        size, shape = (images.shape[-2], images.shape[-1]), (projected.shape[-2], projected.shape[-1])
        padding = None if valid is None else padding_of(valid, size, shape)
        allowed = None if padding is None else ~padding.flatten(1)[:, None, None]  # (B, 1, 1, tokens)
        positions = sine_positions(shape, projected.shape[1] // 2, padding=padding, device=images.device)
        places = positions.flatten(2).transpose(1, 2).to(projected.dtype)  # (B or 1, tokens, C)
        tokens = projected.flatten(2).transpose(1, 2)  # (B, tokens, C)
        for layer in self.encoder:
            tokens = layer(tokens, places, allowed)
        own = self.queries.weight[None].expand(len(images), -1, -1)  # (B, N, C)
        answers, x = [], torch.zeros_like(own)
        for layer in self.decoder:
            x = layer(x, tokens, tokens + places, own, allowed)
            answers.append(self.decoder_norm(x))
        said = torch.stack(answers if self.auxiliary else answers[-1:])  # (L, B, N, C)
        return Raw(
            self.class_head(said),
            self.box_head(said).sigmoid(),
            said[-1],
            tokens.transpose(1, 2).unflatten(2, shape),
            projected,
            tuple(levels[2::-1]),
            torch.zeros_like(projected[:, 0], dtype=torch.bool) if padding is None else padding,
            size,
        )

    def masks_of(self, raw: Raw, image: int, rows: Int[Tensor, " r"]) -> Float[Tensor, "r p q"]:
        """Logits at stride 4 of the masks of one image's queries `rows`."""
        assert self.mask_head is not None
        levels = [level[image] for level in raw.levels]
        return self.mask_head(
            raw.queries[image][rows], raw.memory[image], raw.projected[image], levels, raw.padding[image]
        ).float()

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `box`, `giou` of the last layer, of each earlier one as `class_0`, ...; `mask` and `dice` of the
        last alone. Targets are in the frame of the input; crowd regions are not learnt from."""
        objects = [self._objects(target, raw.logits.device) for target in targets]
        pairs = assign(self.costs(raw, objects))
        count = object_count(objects, raw.logits.device)
        terms = {"class": class_losses(raw.logits, objects, pairs, self.no_object)}
        terms |= {name: values / count for name, values in box_losses(raw.boxes, objects, pairs).items()}
        # A trunk whose levels each have a norm of their own leaves some that nothing reads.
        idle = (raw.boxes.float().sum() + sum(level.float().sum() for level in raw.levels)) * 0
        if self.mask_head is not None:
            sums = self._mask_losses(raw, objects, pairs)
            terms |= {"mask": sums[None, 0] / count, "dice": sums[None, 1] / count}
            idle = idle + sum(p.float().sum() for p in self.mask_head.parameters()) * 0
        scales: dict[str, float] = dict(zip(("class", "box", "giou", "mask", "dice"), self.weights, strict=True))
        return named({name: scales[name] * values for name, values in terms.items()}, idle)

    def _objects(self, target: Instances, device: torch.device) -> Boxed:
        if target.crowd is not None and target.crowd.any():
            target = target[~target.crowd]
        if self.mask_head is not None and target.masks is None and len(target):
            raise UsageError("detr: targets have boxes but no masks; give masks, or build it with masks='none'")
        return Boxed.of(target, device)

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[Boxed]) -> list[Float[Tensor, "l n _m"]]:
        """What it costs each query to answer for each object, by what each layer says."""
        table = []
        for image, own in enumerate(objects):
            probabilities = raw.logits[:, image].float().softmax(-1)[..., own.labels]  # (L, N, M)
            apart = box_costs(raw.boxes[:, image], own.boxes, self.cost[1], self.cost[2])
            table.append(apart - self.cost[0] * probabilities)
        return table

    def _mask_losses(self, raw: Raw, objects: Sequence[Boxed], pairs: Sequence[Pairs]) -> Float[Tensor, " 2"]:
        """Sums over the last layer's pairs of focal loss (mean over the input's pixels, padding included) and dice."""
        height, width = raw.size
        # A pair's planes at the input's size, several of them, and the mask head's own at stride 4.
        step = max(1, BUDGET // (40 * height * width))
        total = raw.boxes.new_zeros(2, dtype=torch.float32)
        for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
            for rows, objects_of in zip(queries[-1].split(step), which[-1].split(step), strict=True):
                planes = own.masks[objects_of.cpu()].dense(raw.boxes.device)
                room = (0, width - planes.shape[2], 0, height - planes.shape[1])
                truth = functional.pad(planes, room).flatten(1).float()
                arguments = (raw, image, rows, truth)
                frugal = queries.shape[1] > step  # then nothing is kept for the backward pass; it is made again
                parts = (
                    checkpoint(self._pair_losses, *arguments, use_reentrant=False)
                    if frugal
                    else self._pair_losses(*arguments)
                )
                total = total + parts
        return total

    def _pair_losses(self, raw: Raw, image: int, rows: Tensor, truth: Tensor) -> Tensor:
        if not len(rows):
            return truth.new_zeros(2)
        logits = _enlarged(self.masks_of(raw, image, rows), raw.size).flatten(1)
        return torch.stack([focal_sum(logits, truth) / truth.shape[1], overlap_loss(logits.sigmoid(), truth).sum()])

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """Every query's best class, none suppressed. A mask is decided on the input's grid and then enlarged."""
        things = self.thing_classes(raw.logits.device)
        found = []
        for image, placement in enumerate(placements):
            scores, labels = raw.logits[-1, image].float().softmax(-1)[:, :-1].max(-1)
            order = scores.argsort(descending=True, stable=True)
            order = order[things[labels[order]] & (scores[order] >= score_threshold)][:detections]
            boxes = box_ops.clip(self.boxes_on(raw, image, placement)[order], placement.image_size)
            masks = None if self.mask_head is None else self.masks_on(raw, image, placement, order)
            found.append(Instances(placement.image_size, boxes, labels[order], masks, scores[order]))
        return found

    def boxes_on(self, raw: Raw, image: int, placement: Placement) -> Float[Tensor, "n 4"]:
        """All queries' boxes on the image, not clipped."""
        height, width = placement.size
        boxes = box_ops.corners(raw.boxes[-1, image].float())
        return placement.boxes_to_image(boxes * boxes.new_tensor([width, height, width, height]))

    def masks_on(self, raw: Raw, image: int, placement: Placement, rows: Int[Tensor, " r"]) -> Masks:
        """Masks of these queries on the image."""
        parts = [Masks.empty(placement.image_size)]
        for _, logits in self._planes(raw, image, placement, rows):
            parts.append(place_bits(logits.sigmoid() > 0.5, placement))
        return Masks.join(parts)

    @torch.no_grad()
    def decode_panoptic(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.85, smallest: int = 4
    ) -> list[Panoptic]:
        """Queries that are surer of a class than `score_threshold` share out all pixels: each goes to the largest
        logit. Regions of one class are joined; segments of `smallest` pixels or less are left out, and their pixels
        shared out again. Where no query is sure, nothing is found (the published code then gives one empty segment).
        """
        self._needs_masks()
        things = self.thing_classes(raw.logits.device)
        found = []
        for image, placement in enumerate(placements):
            scores, labels = raw.logits[-1, image].float().softmax(-1).max(-1)
            rows = ((labels < len(things)) & (scores > score_threshold)).nonzero().flatten()
            if not len(rows):
                found.append(Panoptic.empty(placement.image_size, scores.device))
                continue
            logits = torch.cat([part for _, part in self._planes(raw, image, placement, rows)])
            found.append(_shared_out(logits, labels[rows], scores[rows], things, placement, smallest))
        return found

    def decode_semantic(self, raw: Raw, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """Labels of the panoptic division; there is no published rule of its own."""
        return [panoptic.semantic() for panoptic in self.decode_panoptic(raw, placements)]

    def _planes(
        self, raw: Raw, image: int, placement: Placement, rows: Int[Tensor, " r"]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Some of `rows` at a time, and the logits of their masks on the valid part of the input's grid."""
        height, width = raw.size
        for part in rows.split(max(1, BUDGET // (50 * height * width))):
            if len(part):
                logits = _enlarged(self.masks_of(raw, image, part), raw.size)
                yield part, logits[:, : placement.size[0], : placement.size[1]]

    def _needs_masks(self) -> None:
        if self.mask_head is None:
            raise UsageError("detr: built with masks='none', it finds boxes alone and divides no image")

    # ---- for those that learn on top of it --------------------------------------------------------------------------

    def frozen_layout(self) -> FrozenLayout:
        return self.layout

    def frozen_features(self, raw: Raw, valid: Int[Tensor, "b 2"]) -> FrozenFeatures:
        sides = valid.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        chances = raw.logits[-1].float().softmax(-1)[..., :-1]
        best = functional.one_hot(chances.argmax(-1), chances.shape[-1])  # a query is of one class alone
        return FrozenFeatures(
            box_ops.corners(raw.boxes[-1].float()) * sides,
            chances * best * self.thing_classes(chances.device),
            raw.queries,
            (raw.memory,),
            raw.levels[2],
        )

    # ---- for loading and training --------------------------------------------------------------------------------

    def on_progress(self, done: float) -> None:
        if done == 0 and self.options["masks"] == "frozen":
            self.warn_if_random("detr", "masks='keypoint'")

    def groups(self) -> dict[str, list[nn.Module]]:
        parts: dict[str, list[nn.Module]] = {
            "backbone": [self.backbone],
            "transformer": [self.project, self.encoder, self.decoder, self.decoder_norm, self.queries],
            "heads": [self.class_head, self.box_head],
        }
        return parts if self.mask_head is None else {**parts, "masks": [self.mask_head]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "pretrained": False}
    _BOXES: ClassVar[dict[str, Any]] = {**_PUBLISHED, "masks": "none"}
    _FROZEN: ClassVar[dict[str, Any]] = {**_PUBLISHED, "masks": "frozen"}
    _COCO = "COCO val2017, short side 800, pycocotools; PQ by panopticapi"
    _README = "facebookresearch/detr README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "detr-r50": Preset(_BOXES, (Score(42.0, "box AP", _COCO, _README),), "500 epochs"),
        "detr-r50-dc5": Preset({**_BOXES, "dilated": True}, (Score(43.3, "box AP", _COCO, _README),), "500 epochs"),
        "detr-r101": Preset(
            {**_BOXES, "backbone": "resnet101"}, (Score(43.5, "box AP", _COCO, _README),), "500 epochs"
        ),
        "detr-r101-dc5": Preset(
            {**_BOXES, "backbone": "resnet101", "dilated": True}, (Score(44.9, "box AP", _COCO, _README),), "500 epochs"
        ),
        "detr-r50-panoptic": Preset(
            _FROZEN,
            (
                Score(43.4, "PQ", _COCO, _README),
                Score(31.1, "mask AP", _COCO, _README),
                Score(38.8, "box AP", _COCO, _README),
            ),
        ),
        "detr-r50-dc5-panoptic": Preset(
            {**_FROZEN, "dilated": True},
            (
                Score(44.6, "PQ", _COCO, _README),
                Score(31.9, "mask AP", _COCO, _README),
                Score(40.2, "box AP", _COCO, _README),
            ),
        ),
        "detr-r101-panoptic": Preset(
            {**_FROZEN, "backbone": "resnet101"},
            (
                Score(45.1, "PQ", _COCO, _README),
                Score(33.0, "mask AP", _COCO, _README),
                Score(40.1, "box AP", _COCO, _README),
            ),
        ),
        "detr-small": Preset(
            {
                "backbone": "resnet18", "width": 128, "hidden": 512, "encoder_layers": 3, "decoder_layers": 3,
                "queries": 30, "dropout": 0.0, "dilated": True, "short": 192, "long": 320,
            },
            note="for a few hundred small images, without a GPU",
        ),
    }  # fmt: skip
    _ADAMW: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 1e-4, "rates": {"backbone": 0.1}, "clip": 0.1, "batch": 16,
        "decay_norms": True, "decay_biases": True, "schedule": "steps", "warmup": 0, "ema": None,
        "augment": {"flip": 0.5}, "short": tuple(range(480, 801, 32)), "long": 1333,
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "detr-300": {**_ADAMW, "epochs": 300, "milestones": (2 / 3,)},
        "detr-500": {**_ADAMW, "epochs": 500, "milestones": (0.8,)},
        "detr-masks-25": {**_ADAMW, "epochs": 25, "milestones": (0.6,)},
    }


def _enlarged(logits: Float[Tensor, "n p q"], size: tuple[int, int]) -> Float[Tensor, "n h w"]:
    return functional.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _shared_out(
    logits: Float[Tensor, "n h w"],
    labels: Int[Tensor, " n"],
    scores: Float[Tensor, " n"],
    things: Bool[Tensor, " k"],
    placement: Placement,
    smallest: int,
) -> Panoptic:
    device = logits.device
    rows = torch.arange(len(labels), device=device)
    same = (labels[:, None] == labels) & ~things[labels][:, None]
    leader = torch.where(things[labels], rows, same.int().argmax(1))  # the first region of a class speaks for all
    down, across = _centres(placement, device)
    while True:
        best = leader[rows][logits[rows].argmax(0)] if leader is not None else rows[logits[rows].argmax(0)]
        plane = torch.where((down >= 0)[:, None] & (across >= 0), best[down.clamp(min=0)][:, across.clamp(min=0)], -1)
        areas = plane[plane >= 0].bincount(minlength=len(labels))[rows]
        keep = areas > smallest
        if bool(keep.all()) or not bool(keep.any()):
            break
        # Regions that others spoke for are gone with this, so that none has to be joined again.
        rows, leader = rows[keep], None
    rows = rows[keep]
    return Panoptic.from_map(plane, labels[rows], things[labels[rows]], numbers=rows, scores=scores[rows])


def _centres(placement: Placement, device: torch.device) -> tuple[Int[Tensor, " _h"], Int[Tensor, " _w"]]:
    """The input's row and column under the middle of each of the image's pixels; -1 where there is none."""
    answers = []
    for axis in (0, 1):
        count, limit = placement.image_size[axis], placement.size[axis]
        # Added up step by step, as Pillow does: a middle that falls between two pixels goes the same way.
        steps = torch.full((count,), placement.scale[1 - axis], dtype=torch.float64)
        steps[:1] /= 2
        places = torch.from_numpy(np.cumsum(steps.numpy()))
        places = places.flip(0) if axis and placement.mirrored else places
        source = (places + placement.offset[1 - axis]).floor().long()
        answers.append(torch.where((source >= 0) & (source < limit), source, -1).to(device))
    return answers[0], answers[1]
