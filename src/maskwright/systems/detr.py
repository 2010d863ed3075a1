"""DETR: End-to-End Object Detection with Transformers (Carion et al., ECCV 2020, arXiv 2005.12872).

A transformer reads the last feature map of a ResNet as tokens. A hundred learned queries attend to the tokens, and each
predicts one class, or "no object", and one box. In training, queries and objects are matched one to one at the least
cost, so that no predictions have to be suppressed afterwards. For panoptic segmentation (section 4.4) regions are
detected like objects and a mask head is added: the attention of each query to the encoder's output, one map per head,
is a coarse mask, which a small convolutional network refines with the finer feature maps of the backbone. The mask head
is trained on top of a frozen box model or jointly with it.

Paper and code differ: in panoptic merging only, the published code resizes the masks of a padded batch to each image
without removing the padding. Here the padding is removed; without padding the results are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.layers import GroupNorm
from maskwright.blocks.positions import padding_of, sine_positions
from maskwright.blocks.transformer import MLP, DecoderLayer, EncoderLayer
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import Pairs, assign
from maskwright.ops.losses import focal_sum
from maskwright.ops.planes import place_bits
from maskwright.ops.query_boxes import BoxTargets, box_costs, box_losses
from maskwright.ops.query_losses import class_losses, name_terms, object_count, overlap_loss
from maskwright.structures import Instances, Masks, Panoptic, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.detectors import (
    BoxCost,
    BoxLoss,
    FrozenFeatures,
    FrozenLayout,
    QueryDetector,
    Transformer,
    named_weights,
)
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.system import ClassRows, Output, Task

BUDGET = 256 << 20  # bytes of scratch


@dataclass(frozen=True)
class DETRLoss(BoxLoss):
    """The loss of DETR, as options.

    Attributes:
        class_weight: Weight of the cross entropy.
        box_weight: Weight of the L1 distance of the boxes.
        giou_weight: Weight of 1 - their generalised IoU.
        mask_weight: Weight of the focal loss of the masks.
        dice_weight: Weight of the dice loss of the masks.
        no_object: Weight of "no object" in the cross entropy.
    """

    class_weight: float = 1.0
    mask_weight: float = 1.0
    dice_weight: float = 1.0
    no_object: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "mask_weight", "dice_weight", "no_object")


BACKBONE, RESIZE = Backbone("resnet50"), Resize(short=800, long=1333)
TRANSFORMER, COST, LOSS = Transformer(dropout=0.1), BoxCost(), DETRLoss()
PREPROCESS = Preprocess(sizes="benchmark", multiple=1)


@dataclass(frozen=True)
class Raw:
    """The raw output: predictions after each of L decoder layers, the last one last, and what masks are computed from.

    Attributes:
        logits: Class logits; the last class is "no object".
        boxes: Centre x, y, width, height as fractions of the image without padding.
        queries: Queries after the last decoder layer.
        memory: Output of the encoder.
        projected: Input of the encoder.
        levels: Feature maps of the backbone, of strides 16, 8 and 4.
        padding: Cells of `memory` that hold padding.
        size: Height and width of the network's input, padding included.
    """

    logits: Float[Tensor, "l b n k1"]
    boxes: Float[Tensor, "l b n 4"]
    queries: Float[Tensor, "b n c"]
    memory: Float[Tensor, "b c h w"]
    projected: Float[Tensor, "b c h w"]
    levels: tuple[Float[Tensor, "b _d _h _w"], ...]
    padding: Bool[Tensor, "b h w"]
    size: tuple[int, int]


# ---- networks --------------------------------------------------------------------------------------------------------


class BoxModel(nn.Module):
    """Backbone, transformer and prediction heads (figures 2 and 10): classes and boxes of all queries.

    Args:
        backbone: Network with feature maps of strides 4, 8, 16 and 32 (DC5: 16), and possibly others.
        sizes: Sizes of the transformer.
        classes: Number of classes.
        auxiliary: Whether to predict after every decoder layer, or after the last one only.
    """

    def __init__(self, backbone: nn.Module, sizes: Transformer, classes: int, auxiliary: bool):
        super().__init__()
        width, layer = sizes.width, (sizes.width, sizes.hidden, sizes.heads, sizes.dropout)
        levels = levels_of(backbone)
        self.chosen = [*levels.indices((4, 8, 16)), len(levels.strides) - 1]
        self.channels = tuple(levels.channels[index] for index in self.chosen)
        self.auxiliary = auxiliary
        self.backbone = backbone
        self.project = nn.Conv2d(self.channels[-1], width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(*layer) for _ in range(sizes.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*layer) for _ in range(sizes.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.queries = nn.Embedding(sizes.queries, width)
        self.class_head = nn.Linear(width, classes + 1)
        self.box_head = MLP((width, width, width, 4))

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        maps = self.backbone(images)
        levels = [maps[index] for index in self.chosen]
        projected = self.project(levels[-1])  # (B, C, H/32, W/32)
        size, shape = (images.shape[-2], images.shape[-1]), (projected.shape[-2], projected.shape[-1])
        padding = None if valid is None else padding_of(valid, size, shape)
        allowed = None if padding is None else ~padding.flatten(1)[:, None, None]  # (B, 1, 1, tokens)
        codes = sine_positions(shape, projected.shape[1] // 2, padding=padding, device=images.device)
        positions = codes.flatten(2).transpose(1, 2).to(projected.dtype)  # (B or 1, tokens, C)
        tokens = projected.flatten(2).transpose(1, 2)  # (B, tokens, C)
        for layer in self.encoder:
            tokens = layer(tokens, positions, allowed)
        query_positions = self.queries.weight[None].expand(images.shape[0], -1, -1)  # (B, N, C)
        outputs, x = [], torch.zeros_like(query_positions)
        for layer in self.decoder:
            x = layer(x, tokens, tokens + positions, query_positions, allowed)
            outputs.append(self.decoder_norm(x))
        queries = torch.stack(outputs if self.auxiliary else outputs[-1:])  # (L, B, N, C)
        return Raw(
            self.class_head(queries),
            self.box_head(queries).sigmoid(),
            queries[-1],
            tokens.transpose(1, 2).unflatten(2, shape),
            projected,
            tuple(levels[2::-1]),
            torch.zeros_like(projected[:, 0], dtype=torch.bool) if padding is None else padding,
            size,
        )


class QueryAttention(nn.Module):
    """Attention weights of each query over the memory, one map per head.

    As in the published code, the softmax runs over all heads and cells together.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.query, self.key):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: Float[Tensor, "n c"], memory: Float[Tensor, "c h w"], padding: Bool[Tensor, "h w"]
    ) -> Float[Tensor, "n a h w"]:
        q = self.query(queries).unflatten(1, (self.heads, -1)) * (self.width / self.heads) ** -0.5
        k = self.key(memory.flatten(1).T).unflatten(1, (self.heads, -1))
        weights = torch.einsum("nac,pac->nap", q, k).masked_fill(padding.flatten(), -torch.inf)
        return weights.flatten(1).softmax(1).unflatten(1, (self.heads, *padding.shape))


class MaskHead(nn.Module):
    """The attention of queries over the memory, refined from stride 32 to 4 (figure 8).

    Args:
        width: Channels of queries and memory.
        heads: Attention heads.
        channels: Channels of the backbone's feature maps of strides 16, 8 and 4.
    """

    def __init__(self, width: int, heads: int, channels: Sequence[int]):
        super().__init__()
        self.width, self.heads = width, heads
        self.attention = QueryAttention(width, heads)
        widths = [width + heads, width // 2, width // 4, width // 8, width // 16]
        inputs = [width + heads, *widths[:-1]]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths, strict=True))
        self.norms = nn.ModuleList(GroupNorm(math.gcd(8, c), c) for c in widths)
        self.adapters = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(channels, widths[1:4], strict=True))
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for layer in (*self.convs, *self.adapters, self.output):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        queries: Float[Tensor, "n c"],
        memory: Float[Tensor, "c h w"],
        projected: Float[Tensor, "c h w"],
        levels: Sequence[Float[Tensor, "_d _h _w"]],
        padding: Bool[Tensor, "h w"],
    ) -> Float[Tensor, "n p q"]:
        """Computes mask logits of stride 4 for queries of one image; see `Raw` for the arguments."""
        weights = self.attention(queries, memory, padding)
        # The first convolution reads the projected map and the attention side by side. The map is the same for all
        # queries, so that its part is computed once.
        first: Any = self.convs[0]
        for_map, for_weights = first.weight.split([self.width, self.heads], 1)
        x = functional.conv2d(weights, for_weights, padding=1)
        x = x + functional.conv2d(projected[None], for_map, first.bias, padding=1)
        x = functional.relu(self.norms[0](x))
        for number in range(1, 5):
            x = functional.relu(self.norms[number](self.convs[number](x)))
            if number < 4:
                finer = self.adapters[number - 1](levels[number - 1][None])
                x = finer + functional.interpolate(x, size=finer.shape[-2:], mode="nearest")
        return self.output(x)[:, 0]


class DETR(PanopticSystem, QueryDetector):
    """Detection with queries, and their masks; see the module's docstring.

    Networks: "dense" (`BoxModel`) and, unless `masks` is "none", "masks" (`MaskHead`), which is called per image for
    chosen queries.
    """

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
    optional_networks = ("masks.",)
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{
            name: f"transformer.{name}"
            for name in ("width", "heads", "hidden", "encoder_layers", "decoder_layers", "queries", "dropout")
        },
        "no_object": "loss.no_object",
        "weights": "loss",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **{
            f"{part}.": f"dense.{part}."
            for part in (
                "backbone", "project", "encoder", "decoder", "decoder_norm", "queries", "class_head", "box_head",
            )
        },
        "mask_head.query.": "masks.attention.query.",
        "mask_head.key.": "masks.attention.key.",
        "mask_head.": "masks.",
    }  # fmt: skip

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        masks: Literal["none", "frozen", "joint"] = "joint",
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        dilated: bool = False,
        transformer: Mapping[str, Any] | Transformer = TRANSFORMER,
        auxiliary: bool = True,
        cost: Mapping[str, Any] | BoxCost = COST,
        loss: Mapping[str, Any] | DETRLoss = LOSS,
        resize: ResizeLike = RESIZE,
    ):
        """Constructs the system with random weights.

        Args:
            classes: Names of the classes.
            stuff: Those of `classes` that are regions; they are detected, and matched, like objects.
            masks: "none": boxes only. "frozen": the mask head is trained on top of a frozen box model, as published;
                load the weights of the box model first. "joint": everything is trained together.
            backbone: Network with feature maps of strides 4 to 32; published weights have norm "frozen" and 2 frozen
                parts.
            in_channels: Channels of the image.
            dilated: DC5: the last stage is dilated instead of strided, so that tokens have stride 16.
            transformer: Sizes of the transformer; its width must be a multiple of 16.
            auxiliary: Whether every decoder layer has a loss, or the last one only.
            cost: Weights of class, box and GIoU in matching; masks have no part in it.
            loss: Weights of the loss terms.
            resize: Size and normalisation of the input.
        """
        super().__init__()
        spec, sizes = Backbone.read(backbone, BACKBONE), Transformer.read(transformer, TRANSFORMER)
        if sizes.width % 16:
            raise UsageError(f"detr: transformer.width must be a multiple of 16, got {sizes.width}")
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.cost, self.loss = BoxCost.read(cost, COST), DETRLoss.read(loss, LOSS)
        network = spec.build(in_channels, Use(dilated=dilated, dilate_first=False))
        self.dense = BoxModel(network, sizes, len(self.classes), auxiliary)
        channels = self.dense.channels
        self.layout = FrozenLayout(sizes.width, sizes.width, (16 if dilated else 32,), channels[0])
        self.masks = None if masks == "none" else MaskHead(sizes.width, sizes.heads, channels[2::-1])
        if masks == "frozen":
            self.dense.requires_grad_(False)
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"}) if self.masks is None else frozenset({"boxes", "masks"})

    @property
    def tasks(self) -> frozenset[Task]:
        return frozenset({"instances"}) if self.masks is None else super().tasks

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        return self.dense(images, valid)

    def masks_of(self, raw: Raw, image: int, rows: Int[Tensor, " r"]) -> Float[Tensor, "r p q"]:
        """Mask logits of stride 4, in float32, of the queries `rows` of one image."""
        if self.masks is None:
            raise UsageError("detr: masks='none' predicts boxes only")
        levels = tuple(level[image] for level in raw.levels)
        return self.masks(
            raw.queries[image][rows], raw.memory[image], raw.projected[image], levels, raw.padding[image]
        ).float()

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss (section 3.1; masks: section 4.4).

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input. Crowd regions are ignored.

        Returns:
            "class", "box" and "giou" of the last decoder layer, and as "class_0", ... of the earlier ones; "mask" and
            "dice" of the last layer only.
        """
        device = raw.logits.device
        objects = [BoxTargets.from_instances(target, device) for target in targets]
        pairs = assign(self.costs(raw, objects))
        count = object_count(objects, device)
        terms = {"class": class_losses(raw.logits, objects, pairs, self.loss.no_object)}
        terms |= {name: values / count for name, values in box_losses(raw.boxes, objects, pairs).items()}
        if self.masks is not None:
            sums = self._mask_losses(raw, objects, pairs)
            terms |= {"mask": sums[None, 0] / count, "dice": sums[None, 1] / count}
        # A backbone with a norm for each feature map has parameters that only maps read by no term depend on.
        idle = (raw.boxes.float().sum() + sum(level.float().sum() for level in raw.levels)) * 0
        return name_terms({name: getattr(self.loss, f"{name}_weight") * values for name, values in terms.items()}, idle)

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[BoxTargets]) -> list[Float[Tensor, "l n _m"]]:
        """Costs of matching each query with each object of its image, for the predictions of each layer."""
        table = []
        for image, own in enumerate(objects):
            probabilities = raw.logits[:, image].float().softmax(-1)[..., own.labels]  # (L, N, M)
            of_boxes = box_costs(raw.boxes[:, image], own.boxes, self.cost.box_weight, self.cost.giou_weight)
            table.append(of_boxes - self.cost.class_weight * probabilities)
        return table

    def _mask_losses(self, raw: Raw, objects: Sequence[BoxTargets], pairs: Sequence[Pairs]) -> Float[Tensor, " 2"]:
        """Sums over the last layer's pairs of focal loss (mean over the input's pixels, padding included) and dice."""
        height, width = raw.size
        # Several planes of the input's size for each pair, and the mask head's own at stride 4.
        step = max(1, BUDGET // (40 * height * width))
        total = raw.boxes.new_zeros(2, dtype=torch.float32)
        if not any(queries.shape[1] for queries, _ in pairs):  # a gradient of zero for the mask head
            return total + self.masks_of(raw, 0, raw.logits.new_zeros(0, dtype=torch.int64)).sum()
        for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
            if not queries.shape[1]:
                continue
            masks = own.required_masks()
            for rows, matched in zip(queries[-1].split(step), which[-1].split(step), strict=True):
                planes = masks[matched.cpu()].dense(raw.boxes.device)
                room = (0, width - planes.shape[2], 0, height - planes.shape[1])
                truth = functional.pad(planes, room).flatten(1).float()
                arguments = (raw, image, rows, truth)
                recompute = queries.shape[1] > step  # keep nothing for the backward pass, compute masks again instead
                parts = (
                    checkpoint(self._pair_losses, *arguments, use_reentrant=False)
                    if recompute
                    else self._pair_losses(*arguments)
                )
                total = total + parts
        return total

    def _pair_losses(self, raw: Raw, image: int, rows: Tensor, truth: Tensor) -> Float[Tensor, " 2"]:
        logits = _upsample(self.masks_of(raw, image, rows), raw.size).flatten(1)
        return torch.stack([focal_sum(logits, truth) / truth.shape[1], overlap_loss(logits.sigmoid(), truth).sum()])

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """Converts each query to an object of its best class; nothing is suppressed.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Minimum score.
            detections: Maximum number of objects per image.

        Returns:
            The things of each image, best first. Masks are thresholded on the input's grid, then resized.
        """
        things = self.thing_classes(raw.logits.device)
        results = []
        for image, placement in enumerate(placements):
            scores, labels = raw.logits[-1, image].float().softmax(-1)[:, :-1].max(-1)
            order = scores.argsort(descending=True, stable=True)
            order = order[things[labels[order]] & (scores[order] >= score_threshold)][:detections]
            boxes = box_ops.clip(self.image_boxes(raw, image, placement)[order], placement.image_size)
            masks = None if self.masks is None else self.image_masks(raw, image, placement, order)
            results.append(Instances(placement.image_size, boxes, labels[order], masks, scores[order]))
        return results

    def image_boxes(self, raw: Raw, image: int, placement: Placement) -> Float[Tensor, "n 4"]:
        """Boxes of all queries on the image's pixel grid: x0, y0, x1, y1, not clipped."""
        height, width = placement.size
        boxes = box_ops.corners(raw.boxes[-1, image].float())
        return placement.boxes_to_image(boxes * boxes.new_tensor([width, height, width, height]))

    def image_masks(self, raw: Raw, image: int, placement: Placement, rows: Int[Tensor, " r"]) -> Masks:
        """Masks of the queries `rows` on the image's pixel grid."""
        parts = [Masks.empty(placement.image_size)]
        for _, logits in self._planes(raw, image, placement, rows):
            parts.append(place_bits(logits.sigmoid() > 0.5, placement))
        return Masks.join(parts)

    @torch.no_grad()
    def decode_panoptic(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.85, smallest: int = 4
    ) -> list[Panoptic]:
        """Segments each image: every pixel belongs to the confident query with the largest mask logit.

        Regions of one class are merged. Segments of at most `smallest` pixels are removed, and their pixels assigned
        again.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Score that a query must exceed.
            smallest: Area of the largest segment that is removed, in pixels.

        Returns:
            The segments of each image: none without confident queries, where the published code returns one empty
            segment.

        Raises:
            UsageError: If the system was constructed with `masks="none"`.
        """
        things = self.thing_classes(raw.logits.device)
        results = []
        for image, placement in enumerate(placements):
            scores, labels = raw.logits[-1, image].float().softmax(-1).max(-1)
            rows = ((labels < len(things)) & (scores > score_threshold)).nonzero().flatten()
            if not len(rows):
                results.append(Panoptic.empty(placement.image_size, scores.device))
                continue
            logits = torch.cat([part for _, part in self._planes(raw, image, placement, rows)])
            results.append(_assign_pixels(logits, labels[rows], scores[rows], things, placement, smallest))
        return results

    def decode_semantic(self, raw: Raw, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """The label of each pixel in the panoptic result; no rule of its own is published."""
        return [panoptic.semantic() for panoptic in self.decode_panoptic(raw, placements)]

    def _planes(
        self, raw: Raw, image: int, placement: Placement, rows: Int[Tensor, " r"]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of `rows`, and the logits of their masks on the input's grid without padding."""
        height, width = raw.size
        for part in rows.split(max(1, BUDGET // (50 * height * width))):
            if len(part):
                logits = _upsample(self.masks_of(raw, image, part), raw.size)
                yield part, logits[:, : placement.size[0], : placement.size[1]]

    # ---- for systems that are trained on top of it -------------------------------------------------------------------

    def frozen_layout(self) -> FrozenLayout:
        return self.layout

    def frozen_features(self, raw: Raw, valid: Int[Tensor, "b 2"]) -> FrozenFeatures:
        sides = valid.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        scores = raw.logits[-1].float().softmax(-1)[..., :-1]
        best = functional.one_hot(scores.argmax(-1), scores.shape[-1])  # `decode` reads the best class only
        return FrozenFeatures(
            box_ops.corners(raw.boxes[-1].float()) * sides,
            scores * best * self.thing_classes(scores.device),
            raw.queries,
            (raw.memory,),
            raw.levels[2],
        )

    # ---- loading and training ----------------------------------------------------------------------------------------

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        terms = ("class_weight", "box_weight", "giou_weight", "mask_weight", "dice_weight")
        options = named_weights(options, {"cost": ("cost", terms[:3]), "weights": ("loss", terms)})
        backbone = options.get("backbone")
        if isinstance(backbone, str) and not backbone.startswith("resnet"):
            options["dilated"] = False  # earlier versions ignored it
        return super().upgraded(options)

    def on_progress(self, done: float) -> None:
        if done == 0 and self.options["masks"] == "frozen":
            self.warn_if_random("detr", "masks='joint'")

    def groups(self) -> dict[str, list[nn.Module]]:
        dense = self.dense
        parts: dict[str, list[nn.Module]] = {
            "backbone": [dense.backbone],
            "transformer": [dense.project, dense.encoder, dense.decoder, dense.decoder_norm, dense.queries],
            "heads": [dense.class_head, dense.box_head],
        }
        return parts if self.masks is None else {**parts, "masks": [self.masks]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    # ---- presets -----------------------------------------------------------------------------------------------------

    _R50: ClassVar[dict[str, Any]] = {"name": "resnet50", "norm": "frozen", "frozen": 2}
    _R101: ClassVar[dict[str, Any]] = {"name": "resnet101", "norm": "frozen", "frozen": 2}
    _COCO = "COCO val2017, short side 800, pycocotools; PQ by panopticapi"
    _README = "facebookresearch/detr README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "detr-r50": Preset(
            {"backbone": _R50, "masks": "none"}, (Score(42.0, "box AP", _COCO, _README),), "500 epochs"
        ),
        "detr-r50-dc5": Preset(
            {"backbone": _R50, "masks": "none", "dilated": True}, (Score(43.3, "box AP", _COCO, _README),), "500 epochs"
        ),
        "detr-r101": Preset(
            {"backbone": _R101, "masks": "none"}, (Score(43.5, "box AP", _COCO, _README),), "500 epochs"
        ),
        "detr-r101-dc5": Preset(
            {"backbone": _R101, "masks": "none", "dilated": True}, (Score(44.9, "box AP", _COCO, _README),),
            "500 epochs",
        ),
        "detr-r50-panoptic": Preset(
            {"backbone": _R50, "masks": "frozen"},
            (
                Score(43.4, "PQ", _COCO, _README),
                Score(31.1, "mask AP", _COCO, _README),
                Score(38.8, "box AP", _COCO, _README),
            ),
            task="panoptic",
        ),
        "detr-r50-dc5-panoptic": Preset(
            {"backbone": _R50, "masks": "frozen", "dilated": True},
            (
                Score(44.6, "PQ", _COCO, _README),
                Score(31.9, "mask AP", _COCO, _README),
                Score(40.2, "box AP", _COCO, _README),
            ),
            task="panoptic",
        ),
        "detr-r101-panoptic": Preset(
            {"backbone": _R101, "masks": "frozen"},
            (
                Score(45.1, "PQ", _COCO, _README),
                Score(33.0, "mask AP", _COCO, _README),
                Score(40.1, "box AP", _COCO, _README),
            ),
            task="panoptic",
        ),
        "detr-small": Preset(
            {
                "backbone": "resnet18", "dilated": True, "resize": {"short": 192, "long": 320},
                "transformer": {
                    "width": 128, "hidden": 512, "encoder_layers": 3, "decoder_layers": 3, "queries": 30,
                    "dropout": 0.0,
                },
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


def _upsample(logits: Float[Tensor, "n p q"], size: tuple[int, int]) -> Float[Tensor, "n h w"]:
    """Mask logits on the input's grid."""
    return functional.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _assign_pixels(
    logits: Float[Tensor, "n h w"],
    labels: Int[Tensor, " n"],
    scores: Float[Tensor, " n"],
    things: Bool[Tensor, " k"],
    placement: Placement,
    smallest: int,
) -> Panoptic:
    """Segments of one image, see `DETR.decode_panoptic`."""
    device = logits.device
    rows = torch.arange(len(labels), device=device)
    same = (labels[:, None] == labels) & ~things[labels][:, None]
    first = torch.where(things[labels], rows, same.int().argmax(1))  # regions are merged into the first of their class
    merged: Tensor | None = first
    down, across = _source_cells(placement, device)
    while True:
        winner = rows[logits[rows].argmax(0)] if merged is None else merged[rows][logits[rows].argmax(0)]
        plane = torch.where((down >= 0)[:, None] & (across >= 0), winner[down.clamp(min=0)][:, across.clamp(min=0)], -1)
        areas = plane[plane >= 0].bincount(minlength=len(labels))[rows]
        keep = areas > smallest
        if bool(keep.all()) or not bool(keep.any()):
            break
        rows, merged = rows[keep], None  # this removes all merged regions but the first of each class
    rows = rows[keep]
    return Panoptic.from_map(plane, labels[rows], things[labels[rows]], numbers=rows, scores=scores[rows])


def _source_cells(placement: Placement, device: torch.device) -> tuple[Int[Tensor, " _h"], Int[Tensor, " _w"]]:
    """The row and the column of the input at the centre of each of the image's pixels; -1 outside of it."""
    axes = []
    for axis in (0, 1):
        count, limit = placement.image_size[axis], placement.size[axis]
        # Summed step by step, as Pillow does, so that centres halfway between two pixels are rounded the same way.
        steps = torch.full((count,), placement.scale[1 - axis], dtype=torch.float64)
        steps[:1] /= 2
        centres = torch.from_numpy(np.cumsum(steps.numpy()))
        centres = centres.flip(0) if axis and placement.mirrored else centres
        source = (centres + placement.offset[1 - axis]).floor().long()
        axes.append(torch.where((source >= 0) & (source < limit), source, -1).to(device))
    return axes[0], axes[1]
