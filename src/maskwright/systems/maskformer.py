"""MaskFormer: Per-Pixel Classification is Not All You Need for Semantic Segmentation (Cheng, Schwing, Kirillov, NeurIPS
2021, arXiv 2107.06278).

Instead of classifying each pixel, a hundred queries each predict a class, or "no object", and a binary mask: the
product of an embedding with the features of the pixels. The same predictions give semantic labels and panoptic
segments. The features come from a plain feature pyramid (in one variant its coarsest level passes through a transformer
encoder), and the queries from DETR's decoder, which attends to the coarsest level only. Queries and segments are
matched one to one by the class, focal and dice costs of whole masks.

The official code has no rule for instances; `decode` uses that of Mask2Former, its successor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.positions import sine_positions
from maskwright.blocks.transformer import MLP, DecoderLayer, EncoderLayer
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import Pairs, assign
from maskwright.ops.points import mask_sample
from maskwright.ops.query_losses import MaskPredictions as Raw
from maskwright.structures import Instances, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.queries import MaskLoss, QueryDecoder, QuerySystem
from maskwright.systems.system import ClassRows, at_least

PUBLISHED = Preprocess(short=800, long=1333, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0)

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
DECODER = QueryDecoder(layers=6, dropout=0.1)
LOSS = MaskLoss(class_weight=1.0, mask_weight=20.0, dice_weight=1.0)


# ---- network ---------------------------------------------------------------------------------------------------------


class PixelDecoder(nn.Module):
    """A feature pyramid up to stride 4. With `layers` its coarsest level passes through a transformer encoder first."""

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
        """Computes features of the pixels (B, C, H/4, W/4), and the encoder's output (B, C, H/32, W/32) if there is an
        encoder."""
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


class MaskFormerNetwork(nn.Module):
    """Backbone, pixel decoder and transformer decoder (section 3.3)."""

    def __init__(
        self, backbone: nn.Module, channels: Sequence[int], classes: int, decoder: QueryDecoder, encoder_layers: int
    ):
        super().__init__()
        width, hidden, heads, dropout = decoder.width, decoder.hidden, decoder.heads, decoder.dropout
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(channels, width, hidden, encoder_layers, heads, dropout)
        self.project = None if encoder_layers else nn.Conv2d(channels[-1], width, 1)
        self.queries = nn.Embedding(decoder.queries, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, hidden, heads, dropout) for _ in range(decoder.layers))
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, classes + 1)
        self.mask_head = MLP((width, width, width, width))
        if self.project is not None:
            nn.init.kaiming_uniform_(self.project.weight, a=1)
            nn.init.zeros_(self.project.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        levels = self.backbone(images)
        features, memory = self.pixel_decoder(levels)
        if self.project is not None:
            memory = self.project(levels[-1])
        assert memory is not None
        code = sine_positions((memory.shape[2], memory.shape[3]), memory.shape[1] // 2, device=memory.device)
        memory = memory.flatten(2).mT
        keys = memory + code.flatten(2).mT.to(memory.dtype)
        positions = self.queries.weight.expand(images.shape[0], -1, -1)  # (B, N, C)
        x, outputs = torch.zeros_like(positions), []
        for layer in self.decoder:
            x = layer(x, memory, keys, positions)
            outputs.append(self.norm(x))
        hidden = torch.stack(outputs)  # (L, B, N, C)
        return Raw(self.class_head(hidden), self.mask_head(hidden), features, (images.shape[2], images.shape[3]))


# ---- system ----------------------------------------------------------------------------------------------------------


class MaskFormer(QuerySystem):
    """Mask classification by queries; see the module."""

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
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        decoder: Mapping[str, Any] | QueryDecoder = DECODER,
        encoder_layers: int = 0,
        loss: Mapping[str, Any] | MaskLoss = LOSS,
        classes_first: bool = False,
    ):
        """
        Args:
            classes: Class names; label k is `classes[k]`.
            stuff: Those of `classes` that are regions instead of countable objects; none for instance segmentation.
            backbone: ResNet, Swin Transformer or a model of timm. The default norm "group" trains from random weights
                and with small batches; published ResNets have "frozen" norms.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input. `multiple` is 32 by default; published panoptic models do not
                pad single images (1).
            decoder: Width of everything after the backbone; queries and layers of the transformer decoder.
            encoder_layers: Layers of the transformer encoder on the coarsest level: 6 in the ResNets published on
                COCO, otherwise 0.
            loss: Weights of the terms and of the matching costs; the mask loss is the focal loss.
            classes_first: How `decode_semantic` resizes, see `ops.queries.semantic_labels`; True in models that are
                published for semantic segmentation only.
        """
        super().__init__()
        at_least("maskformer", 0, encoder_layers=encoder_layers)
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.classes_first = classes_first
        self.loss = MaskLoss.read(loss, LOSS)
        features = Backbone.read(backbone, BACKBONE).build(in_channels)
        channels = levels_of(features).channels
        self.dense = MaskFormerNetwork(
            features, channels, len(self.classes), QueryDecoder.read(decoder, DECODER), encoder_layers
        )
        self.preprocess = Resize.read(resize, RESIZE).apply(PUBLISHED, in_channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class`, `mask` (focal loss) and `dice` of the last decoder layer, and `class_0`, ... of the earlier
        ones (section 3.3 and DETR's auxiliary losses).

        Args:
            raw: What `forward` returned.
            targets: Objects in the frame of the input; padding is background. Crowd regions are ignored.

        Returns:
            The weighted terms. Matching compares masks at stride 4, the losses at the resolution of the input.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.from_instances(t, device) for t in targets]
            pairs = assign(self.costs(raw, objects))
            mask, dice = self._mask_losses(raw, objects, pairs)
            count = learning.object_count(objects, device)
            classes = learning.class_losses(raw.classes, objects, pairs, self.loss.no_object)
            idle = (raw.features.float().sum() + raw.embeddings.float().sum()) * 0
            sums = (classes, mask / count, dice / count)
            terms = {n: w * t for n, w, t in zip(("class", "mask", "dice"), self.loss.weights, sums, strict=True)}
            return learning.name_terms(terms, idle)

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[learning.Objects]) -> list[Float[Tensor, "l n _m"]]:
        """Computes the matching costs of each image: class, focal loss and dice loss of whole masks at stride 4.

        Targets are sampled at the nearest pixel, that of the cell's upper left corner, as nearest resizing does.

        Args:
            raw: What `forward` returned.
            objects: The objects of each image.

        Returns:
            For each image the cost of every query with every object, in each decoder layer.
        """
        probabilities = raw.classes.float().softmax(-1)
        layers, (height, width) = len(raw.classes), raw.features.shape[2:]
        y, x = ((torch.arange(n, device=raw.features.device) * (full / n)).floor() + 0.5
                for n, full in zip((height, width), raw.size, strict=True))  # fmt: skip
        points = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).reshape(1, -1, 2)
        costs = []
        for image, own in enumerate(objects):
            cost = probabilities.new_zeros(layers, probabilities.shape[2], len(own))
            step = max(1, learning.BUDGET // (64 * points.shape[1]))
            for first in range(0, len(own), step):
                rows = slice(first, min(first + step, len(own)))
                truth = mask_sample(own.masks[rows], points.expand(rows.stop - first, -1, -1), mode="nearest")
                for layer in range(layers):
                    logits = raw.embeddings[layer, image].float() @ raw.features[image].float().flatten(1)
                    soft = logits.sigmoid()
                    one = 0.25 * (1 - soft).square() * functional.softplus(-logits)  # where the target is 1
                    zero = 0.75 * soft.square() * functional.softplus(logits)
                    focal = (zero.sum(1)[:, None] + (one - zero) @ truth.T) / truth.shape[1]
                    kind = -probabilities[layer, image][:, own.labels[rows]]
                    parts = (kind, focal, learning.overlap_cost(soft, truth))
                    cost[layer, :, rows] = sum(w * p for w, p in zip(self.loss.weights, parts, strict=True))
            costs.append(cost)
        return costs

    def _mask_losses(
        self, raw: Raw, objects: Sequence[learning.Objects], pairs: Sequence[Pairs]
    ) -> tuple[Float[Tensor, " l"], Float[Tensor, " l"]]:
        """Sums of focal loss and dice loss over the matched pairs of each layer, a few pairs at a time. Above the
        memory bound nothing is kept for the backward pass, which computes the masks again."""
        layers, pixels = len(raw.classes), raw.size[0] * raw.size[1]
        sums = [raw.embeddings.new_zeros(layers, 2, dtype=torch.float32)]
        recompute = 24 * layers * pixels * sum(q.shape[1] for q, _ in pairs) > 2 * learning.BUDGET
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
                terms.append(checkpoint(_pair_terms, *arguments, use_reentrant=False) if recompute else
                             _pair_terms(*arguments))  # fmt: skip
            sums.append(torch.cat(terms).unflatten(0, (layers, -1)).sum(1))
        focal, dice = torch.stack(sums).sum(0).unbind(1)
        return focal, dice

    @staticmethod
    def _truth(own: learning.Objects, owners: Int[Tensor, " r"], size: tuple[int, int]) -> Tensor:
        """Whole masks (R, H, W) of the targets on the input, padding included; bool."""
        rows, back = owners.cpu().unique(return_inverse=True)
        planes = own.masks[rows].dense(owners.device)[back.to(owners.device)]
        return functional.pad(planes, (0, size[1] - planes.shape[2], 0, size[0] - planes.shape[1]))

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        net = self.dense
        own = [net.project, net.queries, net.decoder, net.norm, net.class_head, net.mask_head]
        return {
            "backbone": [net.backbone], "pixel_decoder": [net.pixel_decoder],
            "decoder": [m for m in own if m is not None],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{name: f"decoder.{name}" for name in ("width", "heads", "queries", "layers", "hidden", "dropout")},
        **{name: f"loss.{name}" for name in ("class_weight", "mask_weight", "dice_weight", "no_object")},
        "multiple": "resize.multiple",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{part}.": f"dense.{part}."
        for part in ("backbone", "pixel_decoder", "project", "queries", "decoder", "norm", "class_head", "mask_head")
    }

    _PANOPTIC = "COCO panoptic val2017, short side 800"
    _ZOO = "MaskFormer MODEL_ZOO.md"
    _RESNET: ClassVar[dict[str, Any]] = {"encoder_layers": 6, "resize": {"multiple": 1}}
    _SWIN: ClassVar[dict[str, Any]] = {"resize": {"multiple": 1}}
    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"maskformer-r{depth}": Preset(
                {"backbone": {"name": f"resnet{depth}", "norm": "frozen"}, **resnet},
                (Score(pq, "PQ", protocol, source),),
                "6 encoder layers, 300 epochs",
            )
            for resnet, protocol, source in ((_RESNET, _PANOPTIC, _ZOO),)
            for depth, pq in ((50, 46.5), (101, 47.6))
        },
        **{
            f"maskformer-swin-{size}": Preset(
                {"backbone": {"name": f"swin-{size}", "drop_path": 0.3}, **swin},
                (Score(pq, "PQ", protocol, source),),
                note,
            )
            for swin, protocol, source in ((_SWIN, _PANOPTIC, _ZOO),)
            for size, pq, note in (
                ("tiny", 47.7, "300 epochs"), ("small", 49.7, "300 epochs"),
                ("base", 51.8, "300 epochs, from ImageNet-22k"), ("large", 52.7, "300 epochs, from ImageNet-22k"),
            )
        },
        "maskformer-small": Preset(
            {
                "backbone": "resnet18", "resize": {"short": 320, "long": 512},
                "decoder": {"width": 128, "queries": 50, "layers": 4, "hidden": 512, "dropout": 0.0},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    # Weight decay acts neither on norms (the default) nor on query embeddings and relative positions of Swin.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "batch": 64, "steps": 554_400, "milestones": (369_600 / 554_400,), "decay_biases": True,
        "no_decay": ("dense.queries.*", "*.attention.table"), "clip": 0.01, "short": tuple(range(480, 801, 32)),
        "augment": {"flip": 0.5, "crop": 0.6, "crop_chance": 0.5},
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The published crops have sides of 384 to 600 pixels of an image whose short side is 400 to 600; here they are
        # shares of the image.
        "maskformer-r50-300ep": {
            **_RECIPE, "lr": 1e-4, "weight_decay": 1e-4, "rates": {"backbone": 0.1}, "warmup": 0,
        },
        "maskformer-swin-300ep": {
            **_RECIPE, "lr": 6e-5, "weight_decay": 0.01, "warmup": 1500, "warmup_from": 1e-6,
        },
    }  # fmt: skip


def _pair_terms(rows: Float[Tensor, "r c"], plane: Float[Tensor, "c h w"], truth: Tensor) -> Float[Tensor, "r 2"]:
    """Focal loss, averaged over the pixels, and dice loss of each mask at the resolution of the target."""
    masks = learning.mask_logits(rows, plane)
    logits = functional.interpolate(masks[None], truth.shape[1:], mode="bilinear", align_corners=False)[0].flatten(1)
    target = truth.flatten(1).float()
    soft = logits.sigmoid()
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = soft + target - 2 * soft * target  # 1 - p where the target is 1, p where it is 0
    focal = ((0.75 - 0.5 * target) * wrong.square() * cross).mean(1)
    return torch.stack([focal, learning.overlap_loss(soft, target)], 1)
