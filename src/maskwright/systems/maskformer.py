"""MaskFormer: Per-Pixel Classification is Not All You Need for Semantic Segmentation (Cheng, Schwing, Kirillov, NeurIPS
2021, arXiv 2107.06278).

Segmentation need not ask each pixel for its class. A hundred queries each say a class, or "no object", and a binary
mask, the product of an embedding with the features of every pixel; the same answers make semantic labels and panoptic
segments. The features come from a plain pyramid (its top level through a transformer encoder, in one variant), and the
queries from DETR's decoder, which looks at the trunk's coarsest level alone. Queries and segments are matched one to
one by class, focal and dice cost of whole masks.

Mask2Former made of this what is used today. The official code has no rule for instances; `decode` takes Mask2Former's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.positions import sine_positions
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.transformer import MLP, DecoderLayer, EncoderLayer
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import assign
from maskwright.ops.points import mask_sample
from maskwright.ops.query_losses import MaskAnswers as Raw
from maskwright.structures import Instances, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, QuerySystem, Score, at_least


class PixelDecoder(nn.Module):
    """A pyramid down to stride 4. With `layers` the coarsest level passes through a transformer encoder first."""

    def __init__(self, channels: Sequence[int], width: int, hidden: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.project = nn.Conv2d(channels[-1], width, 1) if layers else None
        self.encoder = (
            nn.ModuleList(EncoderLayer(width, hidden, heads, dropout) for _ in range(layers)) if layers else None
        )
        self.lateral = nn.ModuleList(ConvNorm(c, width, 1, norm="group") for c in channels[:-1])
        deepest = width if layers else channels[-1]
        self.output = nn.ModuleList(
            ConvNorm(c, width, 3, norm="group", relu=True) for c in (*[width] * (len(channels) - 1), deepest)
        )
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)
        for conv in [m for m in self.modules() if isinstance(m, nn.Conv2d)]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, levels: Sequence[Float[Tensor, "b _c _h _w"]]) -> tuple[Tensor, Tensor | None]:
        """Features of pixels (B, C, H/4, W/4); and the encoder's answer (B, C, H/32, W/32) where there is one."""
        *fine, top = levels
        encoded = None
        if self.encoder is not None and self.project is not None:
            top = self.project(top)
            size = (top.shape[2], top.shape[3])
            positions = sine_positions(size, top.shape[1] // 2, device=top.device).flatten(2).mT.to(top.dtype)
            tokens = top.flatten(2).mT
            for layer in self.encoder:
                tokens = layer(tokens, positions)
            encoded = top = tokens.mT.unflatten(2, size)
        y = self.output[-1](top)
        for lateral, output, level in zip(
            reversed(self.lateral), reversed(self.output[:-1]), reversed(fine), strict=True
        ):
            side = lateral(level)
            y = output(side + functional.interpolate(y, side.shape[-2:], mode="nearest"))
        return self.mask_features(y), encoded


class MaskFormer(QuerySystem):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections` and more."""

    name = "maskformer"
    card = Card(
        title="MaskFormer",
        paper="Cheng, Schwing, Kirillov: Per-Pixel Classification is Not All You Need for Semantic Segmentation. "
        "NeurIPS 2021",
        arxiv="2107.06278",
        code="facebookresearch/MaskFormer",
        code_licence="CC-BY-NC-4.0",
    )
    inside = False

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        stride_in: StrideIn = "3x3",
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        swin_width: int | None = None,
        swin_depths: Sequence[int] | None = None,
        swin_heads: Sequence[int] | None = None,
        window: int | None = None,
        drop_path: float = 0.0,
        width: int = 256,
        heads: int = 8,
        queries: int = 100,
        encoder_layers: int = 0,
        layers: int = 6,
        hidden: int = 2048,
        dropout: float = 0.1,
        class_weight: float = 1.0,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object: float = 0.1,
        classes_first: bool = False,
        multiple: int = 32,
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        stuff           those of `classes` that are regions, not countable objects; none: an instance model
        backbone        "resnet18" ... "resnet152", "swin-tiny" ... "swin-large", or "timm:NAME"
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width ... drop_path
                        the trunk's variants: see `blocks.trunk`. "group" trains from random weights and with small
                        batches; published ResNets have "frozen" norms
        width, heads, hidden, dropout
                        of everything behind the trunk; `hidden` inside feed-forward layers
        queries, layers how many queries, and rounds of the decoder
        encoder_layers  of the transformer encoder on the coarsest level: 6 in the ResNets published on COCO, else 0
        class_weight, mask_weight, dice_weight
                        of the losses and of the costs of matching; the mask loss is the focal loss
        no_object       weight of "no object" in the class loss
        classes_first   how `decode_semantic` resizes: see `ops.queries.semantic`; so where only that was published
        multiple        what inputs are padded to; published panoptic models do not pad single images
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        at_least("maskformer", 1, heads=heads, width=width, queries=queries, layers=layers, hidden=hidden)
        at_least("maskformer", 1, multiple=multiple, short=short, long=long)
        at_least("maskformer", 0, encoder_layers=encoder_layers, no_object=no_object)
        at_least("maskformer", 0, class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)
        if width % (4 * heads):
            raise UsageError(f"width is {width}; expected a multiple of 4 x heads, which is {4 * heads}")
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.weights, self.no_object = (class_weight, mask_weight, dice_weight), no_object
        self.classes_first = classes_first
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, stride_in=stride_in,
            norm=norm, norm_eps=norm_eps, frozen=frozen, swin_width=swin_width, swin_depths=swin_depths,
            swin_heads=swin_heads, window=window, drop_path=drop_path,
        )  # fmt: skip
        self.pixel_decoder = PixelDecoder(channels, width, hidden, encoder_layers, heads, dropout)
        self.project = None if encoder_layers else nn.Conv2d(channels[-1], width, 1)
        self.queries = nn.Embedding(queries, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, len(self.classes) + 1)
        self.mask_head = MLP((width, width, width, width))
        if self.project is not None:
            nn.init.kaiming_uniform_(self.project.weight, a=1)
            nn.init.zeros_(self.project.bias)  # pyright: ignore[reportArgumentType]
        self.preprocess = normalization_for(
            Preprocess(
                mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0, multiple=multiple
            ).at(short, long),
            in_channels, mean, std,
        )  # fmt: skip

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        levels = self.backbone(images)
        features, memory = self.pixel_decoder(levels)
        if self.project is not None:
            memory = self.project(levels[-1])
        assert memory is not None
        code = sine_positions((memory.shape[2], memory.shape[3]), memory.shape[1] // 2, device=memory.device)
        memory = memory.flatten(2).mT
        keys = memory + code.flatten(2).mT.to(memory.dtype)
        positions = self.queries.weight.expand(len(images), -1, -1)  # (B, N, C)
        x, rounds = torch.zeros_like(positions), []
        for layer in self.decoder:
            x = layer(x, memory, keys, positions)
            rounds.append(self.norm(x))
        hidden = torch.stack(rounds)  # (L, B, N, C)
        return Raw(self.class_head(hidden), self.mask_head(hidden), features, (images.shape[2], images.shape[3]))

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `mask` (focal) and `dice` of the last round, and `class_0` ... of those before it.

        Targets are in the frame of the input, of which padding is a part where no mask is; crowd regions are not learnt
        from. Matching compares masks at stride 4, the losses at the input's own resolution.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.of(t, device) for t in targets]
            pairs = assign(self.costs(raw, objects))
            mask, dice = self._mask_losses(raw, objects, pairs)
            count = learning.object_count(objects, device)
            classes = learning.class_losses(raw.classes, objects, pairs, self.no_object)
            idle = (raw.features.float().sum() + raw.embeddings.float().sum()) * 0
            sums = (classes, mask / count, dice / count)
            terms = {n: w * t for n, w, t in zip(("class", "mask", "dice"), self.weights, sums, strict=True)}
            return learning.named(terms, idle)

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[learning.Objects]) -> list[Float[Tensor, "l n _m"]]:
        """What matching compares: class, focal loss and dice of whole masks at stride 4, targets read at the nearest
        pixel (that of the cell's upper left corner, as nearest resizing does)."""
        probabilities = raw.classes.float().softmax(-1)
        layers, (height, width) = len(raw.classes), raw.features.shape[2:]
        y, x = ((torch.arange(n, device=raw.features.device) * (full / n)).floor() + 0.5
                for n, full in zip((height, width), raw.size, strict=True))  # fmt: skip
        places = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).reshape(1, -1, 2)
        costs = []
        for image, own in enumerate(objects):
            cost = probabilities.new_zeros(layers, probabilities.shape[2], len(own))
            step = max(1, learning.BUDGET // (64 * places.shape[1]))
            for first in range(0, len(own), step):
                rows = slice(first, min(first + step, len(own)))
                truth = mask_sample(own.masks[rows], places.expand(rows.stop - first, -1, -1), mode="nearest")
                for layer in range(layers):
                    logits = raw.embeddings[layer, image].float() @ raw.features[image].float().flatten(1)
                    soft = logits.sigmoid()
                    one = 0.25 * (1 - soft).square() * functional.softplus(-logits)  # where the target is 1
                    zero = 0.75 * soft.square() * functional.softplus(logits)
                    focal = (zero.sum(1)[:, None] + (one - zero) @ truth.T) / truth.shape[1]
                    kind = -probabilities[layer, image][:, own.labels[rows]]
                    parts = (kind, focal, learning.overlap_cost(soft, truth))
                    cost[layer, :, rows] = sum(w * p for w, p in zip(self.weights, parts, strict=True))
            costs.append(cost)
        return costs

    def _mask_losses(
        self, raw: Raw, objects: Sequence[learning.Objects], pairs: Sequence[learning.Pairs]
    ) -> tuple[Float[Tensor, " l"], Float[Tensor, " l"]]:
        """Sums of focal loss and dice over the matched pairs of each round, a few pairs at a time. Where they are many
        nothing is kept for the backward pass, which makes the masks again."""
        layers, pixels = len(raw.classes), raw.size[0] * raw.size[1]
        sums = [raw.embeddings.new_zeros(layers, 2, dtype=torch.float32)]
        many = 24 * layers * pixels * sum(q.shape[1] for q, _ in pairs) > 2 * learning.BUDGET
        step = max(1, learning.BUDGET // (48 * pixels))
        for image, (own, plane, (queries, which)) in enumerate(
            zip(objects, raw.features.unbind(0), pairs, strict=True)
        ):
            if not queries.shape[1]:
                continue
            chosen = raw.embeddings[:, image].gather(1, queries[..., None].expand(-1, -1, raw.embeddings.shape[-1]))
            terms = []
            for rows, owners in zip(chosen.flatten(0, 1).split(step), which.flatten().split(step), strict=True):
                truth = self._truth(own, owners, raw.size)
                arguments = (rows, plane, truth)
                terms.append(checkpoint(_pair_terms, *arguments, use_reentrant=False) if many else
                             _pair_terms(*arguments))  # fmt: skip
            sums.append(torch.cat(terms).unflatten(0, (layers, -1)).sum(1))
        focal, dice = torch.stack(sums).sum(0).unbind(1)
        return focal, dice

    @staticmethod
    def _truth(own: learning.Objects, owners: Int[Tensor, " r"], size: tuple[int, int]) -> Tensor:
        """Whole masks (R, H, W) bool on the input, padding included."""
        rows, back = owners.cpu().unique(return_inverse=True)
        planes = own.masks[rows].dense(owners.device)[back.to(owners.device)]
        return functional.pad(planes, (0, size[1] - planes.shape[2], 0, size[0] - planes.shape[1]))

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        own = [self.project, self.queries, self.decoder, self.norm, self.class_head, self.mask_head]
        return {
            "backbone": [self.backbone], "pixel_decoder": [self.pixel_decoder],
            "decoder": [m for m in own if m is not None],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    _PANOPTIC = "COCO panoptic val2017, short side 800"
    _ZOO = "MaskFormer MODEL_ZOO.md"
    _RESNET: ClassVar[dict[str, Any]] = {"norm": "frozen", "encoder_layers": 6, "multiple": 1}
    _SWIN: ClassVar[dict[str, Any]] = {"drop_path": 0.3, "multiple": 1}
    presets: ClassVar[Mapping[str, Preset]] = {
        "maskformer-r50": Preset(_RESNET, (Score(46.5, "PQ", _PANOPTIC, _ZOO),), "6 encoder layers, 300 epochs"),
        "maskformer-r101": Preset(
            {**_RESNET, "backbone": "resnet101"}, (Score(47.6, "PQ", _PANOPTIC, _ZOO),), "6 encoder layers, 300 epochs"
        ),
        "maskformer-swin-tiny": Preset(
            {**_SWIN, "backbone": "swin-tiny"}, (Score(47.7, "PQ", _PANOPTIC, _ZOO),), "300 epochs"
        ),
        "maskformer-swin-small": Preset(
            {**_SWIN, "backbone": "swin-small"}, (Score(49.7, "PQ", _PANOPTIC, _ZOO),), "300 epochs"
        ),
        "maskformer-swin-base": Preset(
            {**_SWIN, "backbone": "swin-base"}, (Score(51.8, "PQ", _PANOPTIC, _ZOO),), "300 epochs, from ImageNet-22k"
        ),
        "maskformer-swin-large": Preset(
            {**_SWIN, "backbone": "swin-large"}, (Score(52.7, "PQ", _PANOPTIC, _ZOO),), "300 epochs, from ImageNet-22k"
        ),
        "maskformer-small": Preset(
            {
                "backbone": "resnet18", "width": 128, "queries": 50, "layers": 4, "hidden": 512, "dropout": 0.0,
                "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    # Decay acts on neither norms (the default) nor what embeds queries, nor Swin's relative positions.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "batch": 64, "steps": 554_400, "milestones": (369_600 / 554_400,), "decay_biases": True,
        "no_decay": ("queries.*", "*.attention.table"), "clip": 0.01, "short": tuple(range(480, 801, 32)),
        "augment": {"flip": 0.5, "crop": 0.6, "crop_chance": 0.5},
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Published windows have sides of 384 to 600 pixels of an image whose short side is 400 to 600; here shares.
        "maskformer-r50-300ep": {
            **_RECIPE, "lr": 1e-4, "weight_decay": 1e-4, "rates": {"backbone": 0.1}, "warmup": 0,
        },
        "maskformer-swin-300ep": {
            **_RECIPE, "lr": 6e-5, "weight_decay": 0.01, "warmup": 1500, "warmup_from": 1e-6,
        },
    }  # fmt: skip


def _pair_terms(rows: Float[Tensor, "r c"], plane: Float[Tensor, "c h w"], truth: Tensor) -> Float[Tensor, "r 2"]:
    """Focal loss, its mean over pixels, and dice of each mask at the resolution of the truth."""
    masks = torch.einsum("rc,chw->rhw", rows.float(), plane.float())
    logits = functional.interpolate(masks[None], truth.shape[1:], mode="bilinear", align_corners=False)[0].flatten(1)
    wanted = truth.flatten(1).float()
    soft = logits.sigmoid()
    cross = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    wrong = soft + wanted - 2 * soft * wanted  # 1 - p where the target is 1, p where it is 0
    focal = ((0.75 - 0.5 * wanted) * wrong.square() * cross).mean(1)
    return torch.stack([focal, learning.overlap_loss(soft, wanted)], 1)
