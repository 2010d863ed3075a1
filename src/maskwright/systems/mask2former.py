"""Mask2Former: Masked-attention Mask Transformer for Universal Image Segmentation (Cheng, Misra, Schwing, Kirillov,
Girdhar, CVPR 2022, arXiv 2112.01527).

A hundred learned queries each predict a class, or "no object", and a mask: an embedding whose product with the features
of the pixels, at stride 4, gives the mask logits. In nine decoder layers each query attends to the features of the
image, at strides 32, 16 and 8 in turn, but only inside the mask that it has predicted so far (*masked attention*), then
to the other queries. The backbone's features are first mixed over their scales by deformable attention. Queries and
objects are matched one to one, so that queries are trained not to duplicate each other and nothing is suppressed.

The same network does instance, panoptic and semantic segmentation, depending on the data it is trained on (`stuff`) and
on how its output is read (`decode`, `decode_panoptic`, `decode_semantic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.deformable_attention import DeformableEncoderLayer, cell_centres
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.positions import sine_positions
from maskwright.blocks.transformer import MLP, DecoderLayer
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import assign
from maskwright.ops.query_losses import MaskPredictions as Raw
from maskwright.structures import Instances, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.kinds.queries import PointLoss, QueryDecoder, QuerySystem
from maskwright.systems.system import ClassRows, at_least

LEVELS = 3  # strides 32, 16 and 8, in this order throughout
PUBLISHED = Preprocess(short=800, long=1333, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0)

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
DECODER = QueryDecoder(layers=9)
LOSS = PointLoss()


# ---- network ---------------------------------------------------------------------------------------------------------


class PixelDecoder(nn.Module):
    """Mixes strides 32, 16 and 8 by deformable attention, and computes features at stride 4 from the result.

    It always runs in the precision of its weights, as published: autocast is disabled inside.
    """

    def __init__(
        self, channels: Sequence[int], width: int, heads: int, *, layers: int, hidden: int, points: int, dropout: float
    ):
        super().__init__()
        self.project = nn.ModuleList(ConvNorm(c, width, 1, norm="group", bias=True) for c in reversed(channels[1:]))
        self.levels = nn.Parameter(torch.randn(LEVELS, width))
        self.encoder = nn.ModuleList(
            DeformableEncoderLayer(width, hidden, heads, LEVELS, points, dropout) for _ in range(layers)
        )
        self.lateral = ConvNorm(channels[0], width, 1, norm="group")
        self.output = ConvNorm(width, width, 3, norm="group", relu=True)
        self.mask_features = nn.Conv2d(width, width, 1)
        for layer in self.project:
            assert isinstance(layer, ConvNorm)
            nn.init.xavier_uniform_(layer.conv.weight)
        for conv in (self.lateral.conv, self.output.conv, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, levels: Sequence[Float[Tensor, "b _c _h _w"]]) -> tuple[Tensor, list[Tensor]]:
        """Computes features of the pixels (B, C, H/4, W/4), and the three levels (B, C, h, w), coarsest first."""
        with torch.autocast(levels[0].device.type, enabled=False):
            dtype = self.levels.dtype
            fine, *deep = (level.to(dtype) for level in levels)
            maps = [project(level) for project, level in zip(self.project, reversed(deep), strict=True)]
            shapes = [(m.shape[2], m.shape[3]) for m in maps]
            width = maps[0].shape[1]
            positions = [
                sine_positions(shape, width // 2, device=fine.device).flatten(2).mT.to(dtype) + level
                for shape, level in zip(shapes, self.levels, strict=True)
            ]
            tokens, position = torch.cat([m.flatten(2).mT for m in maps], 1), torch.cat(positions, 1)
            references = cell_centres(shapes, fine.device)[None, :, None]  # (1, S, 1, 2), the same for all levels
            for layer in self.encoder:
                tokens = layer(tokens, position, references, shapes)
            parts = tokens.split([h * w for h, w in shapes], 1)
            maps = [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
            # The FPN step of the paper takes the nearest cell; the code is bilinear.
            side = self.lateral(fine)
            coarse = functional.interpolate(maps[-1], side.shape[-2:], mode="bilinear", align_corners=False)
            features = self.mask_features(self.output(side + coarse))
            if not len(self.encoder):
                # Without an encoder some levels may not be used at all; their parameters get a zero gradient.
                features = features + (self.levels.sum() + sum((m * 0).sum() for m in maps)) * 0
            return features, maps


class Queries(nn.Module):
    """Learned queries: content and position of each, and an embedding of the level that they attend to."""

    def __init__(self, count: int, width: int, learned_content: bool):
        super().__init__()
        self.content = nn.Parameter(torch.randn(count, width)) if learned_content else None
        self.positions = nn.Parameter(torch.randn(count, width))
        self.levels = nn.Parameter(torch.randn(LEVELS, width))


class Mask2FormerNetwork(nn.Module):
    """Backbone, pixel decoder and transformer decoder with masked attention (section 3)."""

    def __init__(
        self,
        backbone: nn.Module,
        pixel_decoder: PixelDecoder,
        classes: int,
        decoder: QueryDecoder,
        *,
        masked: bool,
        cross_first: bool,
        learned_content: bool,
        fine_levels: bool,
    ):
        super().__init__()
        width = decoder.width
        self.masked, self.fine_levels = masked, fine_levels
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.queries = Queries(decoder.queries, width, learned_content)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, decoder.hidden, decoder.heads, decoder.dropout, cross_first=cross_first)
            for _ in range(decoder.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, classes + 1)
        self.mask_head = MLP((width, width, width, width))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features, maps = self.pixel_decoder(self.backbone(images))
        positions = self.queries.positions.expand(images.shape[0], -1, -1)  # (B, N, C)
        x = torch.zeros_like(positions) if self.queries.content is None else self.queries.content.expand_as(positions)
        memories, keys, coarse = [], [], []
        for level, own in zip(maps, self.queries.levels, strict=True):
            size = (level.shape[2], level.shape[3])
            memories.append(level.flatten(2).mT + own)
            code = sine_positions(size, level.shape[1] // 2, device=level.device).flatten(2).mT
            keys.append(memories[-1] + code.to(level.dtype))
            # Resizing is linear: masks of resized features are resized masks, at a fraction of the work.
            small = functional.interpolate(features, size, mode="bilinear", align_corners=False)
            coarse.append(small.detach().flatten(2))
        classes, embeddings = [], []
        for number, layer in enumerate(self.decoder):
            level = number % LEVELS if self.fine_levels else 0
            self._predict(x, classes, embeddings)
            allowed = self.allowed(embeddings[-1], coarse[level]) if self.masked else None
            x = layer(x, memories[level], keys[level], positions, allowed)
        self._predict(x, classes, embeddings)
        return Raw(torch.stack(classes), torch.stack(embeddings), features, (images.shape[2], images.shape[3]))

    def _predict(self, x: Tensor, classes: list[Tensor], embeddings: list[Tensor]) -> None:
        """Appends class logits (B, N, K + 1) and mask embeddings (B, N, C) of the queries."""
        x = self.norm(x)
        classes.append(self.class_head(x))
        embeddings.append(self.mask_head(x))

    @staticmethod
    @torch.no_grad()
    def allowed(
        embeddings: Float[Tensor, "b n c"], coarse: Float[Tensor, "b c m"], rescue: bool = True
    ) -> Bool[Tensor, "b 1 n m"]:
        """Masked attention (eq. 2): the cells that each query may attend to.

        Args:
            embeddings: Mask embeddings of the queries.
            coarse: Features of the pixels, resized to the cells of a level.
            rescue: A query with an empty mask attends to all cells.
        """
        inside = torch.bmm(embeddings, coarse.to(embeddings.dtype)) >= 0  # probability >= 0.5
        if rescue:
            inside = inside | ~inside.any(-1, keepdim=True)
        return inside[:, None]


# ---- system ----------------------------------------------------------------------------------------------------------


class Mask2Former(QuerySystem):
    """Masked-attention mask transformer; see the module."""

    name = "mask2former"
    card = Card(
        title="Mask2Former",
        paper="Cheng, Misra, Schwing, Kirillov, Girdhar: Masked-attention Mask Transformer for Universal Image "
        "Segmentation. CVPR 2022",
        arxiv="2112.01527",
        code="facebookresearch/Mask2Former",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        decoder: Mapping[str, Any] | QueryDecoder = DECODER,
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        encoder_points: int = 4,
        masked: bool = True,
        cross_first: bool = True,
        learned_content: bool = True,
        fine_levels: bool = True,
        loss: Mapping[str, Any] | PointLoss = LOSS,
        classes_first: bool = False,
    ):
        """
        Args:
            classes: Class names; label k is `classes[k]`.
            stuff: Those of `classes` that are regions instead of countable objects; none for instance segmentation.
            backbone: ResNet, Swin Transformer or a model of timm. The default norm "group" trains from random weights
                and with small batches; published ResNets have "frozen" norms.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input.
            decoder: Width of everything after the backbone; queries and layers of the transformer decoder.
            encoder_layers: Layers of deformable attention in the pixel decoder.
            encoder_hidden: Width inside their feed-forward layers.
            encoder_points: Sampling points of each head and level.
            masked: Queries attend only to the inside of their masks (table 4a).
            cross_first: Queries attend to the image before they attend to each other (table 4b).
            learned_content: The initial content of the queries is learned; otherwise it is zero (table 4b).
            fine_levels: Queries attend to strides 32, 16 and 8 in turn; otherwise to stride 32 only (table 4a).
            loss: Weights of the terms and of the matching costs, and the points where masks are compared.
            classes_first: How `decode_semantic` resizes, see `ops.queries.semantic_labels`; True in models that are
                published for semantic segmentation only.
        """
        super().__init__()
        at_least("mask2former", 1, encoder_points=encoder_points, encoder_hidden=encoder_hidden)
        at_least("mask2former", 0, encoder_layers=encoder_layers)
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.classes_first = classes_first
        own = QueryDecoder.read(decoder, DECODER)
        self.loss = PointLoss.read(loss, LOSS)
        features = Backbone.read(backbone, BACKBONE).build(in_channels)
        channels = levels_of(features).channels
        pixel_decoder = PixelDecoder(
            channels, own.width, own.heads, layers=encoder_layers, hidden=encoder_hidden, points=encoder_points,
            dropout=own.dropout,
        )  # fmt: skip
        self.dense = Mask2FormerNetwork(
            features, pixel_decoder, len(self.classes), own, masked=masked, cross_first=cross_first,
            learned_content=learned_content, fine_levels=fine_levels,
        )  # fmt: skip
        self.preprocess = Resize.read(resize, RESIZE).apply(PUBLISHED, in_channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `class`, `mask` (binary cross entropy) and `dice` of the last prediction, and `class_0`, ... of the
        earlier ones (section 3.3 and DETR's auxiliary losses).

        Args:
            raw: What `forward` returned.
            targets: Objects in the frame of the input; padding is background. Crowd regions are ignored.

        Returns:
            The weighted terms. Random points are drawn by torch's generator in the order of the published code.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.from_instances(t, device) for t in targets]
            pairs = assign(self.costs(raw, objects))
            mask, dice = learning.point_losses(
                raw.embeddings, raw.features, objects, pairs, raw.size, self.loss.sampling
            )
            count = learning.object_count(objects, device)
            classes = learning.class_losses(raw.classes, objects, pairs, self.loss.no_object)
            idle = (raw.features.float().sum() + raw.embeddings.float().sum()) * 0
            sums = (classes, mask / count, dice / count)
            terms = {n: w * t for n, w, t in zip(("class", "mask", "dice"), self.loss.weights, sums, strict=True)}
            return learning.name_terms(terms, idle)

    def costs(self, raw: Raw, objects: Sequence[learning.Objects]) -> list[Float[Tensor, "l n _m"]]:
        """Computes the matching costs of each image, at points that are drawn here.

        Args:
            raw: What `forward` returned.
            objects: The objects of each image.

        Returns:
            For each image the cost of every query with every object, in each prediction.
        """
        layers, images, queries = raw.classes.shape[:3]
        matched = sum(min(queries, len(own)) for own in objects)
        points = learning.draw_matching_points(layers, images, matched, self.loss.sampling, raw.features.device)
        return learning.point_costs(
            raw.classes.float().softmax(-1), raw.embeddings, raw.features, objects, points, raw.size, self.loss.weights
        )

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        net = self.dense
        return {
            "backbone": [net.backbone], "pixel_decoder": [net.pixel_decoder],
            "decoder": [net.queries, net.decoder, net.norm, net.class_head, net.mask_head],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{name: f"decoder.{name}" for name in ("width", "heads", "queries", "layers", "hidden", "dropout")},
        **{
            name: f"loss.{name}"
            for name in (
                "class_weight", "mask_weight", "dice_weight", "no_object", "points", "candidates", "important",
            )
        },
        "sampled": "encoder_points",
        "learnt_content": "learned_content",
    }  # fmt: skip
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{part}.": f"dense.{part}."
        for part in ("backbone", "pixel_decoder", "queries", "decoder", "norm", "class_head", "mask_head")
    }

    _R50: ClassVar[dict[str, Any]] = {"backbone": {"name": "resnet50", "norm": "frozen"}}
    _R101: ClassVar[dict[str, Any]] = {"backbone": {"name": "resnet101", "norm": "frozen"}}
    _TINY: ClassVar[dict[str, Any]] = {"backbone": {"name": "swin-tiny", "drop_path": 0.3}}
    _SMALL: ClassVar[dict[str, Any]] = {"backbone": {"name": "swin-small", "drop_path": 0.3}}
    _BASE: ClassVar[dict[str, Any]] = {"backbone": {"name": "swin-base", "drop_path": 0.3}}
    _LARGE: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "swin-large", "drop_path": 0.3}, "decoder": {"queries": 200},
    }  # fmt: skip
    _COCO = "COCO val2017, short side 800, pycocotools"
    _PANOPTIC = "COCO panoptic val2017, short side 800; trained separately, with things and stuff"
    _ZOO = "Mask2Former MODEL_ZOO.md"
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask2former-r50": Preset(
            _R50, (Score(43.7, "mask AP", _COCO, _ZOO), Score(51.9, "PQ", _PANOPTIC, _ZOO)), "50 epochs"
        ),
        "mask2former-r101": Preset(
            _R101, (Score(44.2, "mask AP", _COCO, _ZOO), Score(52.6, "PQ", _PANOPTIC, _ZOO)), "50 epochs"
        ),
        "mask2former-swin-tiny": Preset(
            _TINY, (Score(45.0, "mask AP", _COCO, _ZOO), Score(53.2, "PQ", _PANOPTIC, _ZOO)), "50 epochs"
        ),
        "mask2former-swin-small": Preset(
            _SMALL, (Score(46.3, "mask AP", _COCO, _ZOO), Score(54.7, "PQ", _PANOPTIC, _ZOO)), "50 epochs"
        ),
        "mask2former-swin-base": Preset(
            _BASE, (Score(46.7, "mask AP", _COCO, _ZOO), Score(55.1, "PQ", _PANOPTIC, _ZOO)),
            "50 epochs; from ImageNet-22k: mask AP 48.1, PQ 56.4",
        ),
        "mask2former-swin-large": Preset(
            _LARGE, (Score(50.1, "mask AP", _COCO, _ZOO), Score(57.8, "PQ", _PANOPTIC, _ZOO)),
            "100 epochs, from ImageNet-22k, 200 queries",
        ),
        "mask2former-small": Preset(
            {
                "backbone": "resnet18", "resize": {"short": 320, "long": 512},
                "decoder": {"width": 128, "queries": 50, "layers": 6, "hidden": 512},
                "encoder_layers": 2, "encoder_hidden": 512, "loss": {"points": 2048},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    # Weight decay 0.05, except for norms (the default), embeddings of queries and levels, and relative positions.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "decay_biases": True,
        "no_decay": ("dense.queries.*", "*.attention.table"), "rates": {"backbone": 0.1}, "clip": 0.01, "warmup": 0,
        "amp": "bf16", "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (1024, 1024)},
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 16 images per step. Published in fp16 and with padding of grey 128; here the padding is the mean colour.
        "mask2former-50ep": {**_RECIPE, "steps": 368_750, "milestones": (327_778 / 368_750, 355_092 / 368_750)},
        "mask2former-100ep": {**_RECIPE, "steps": 737_500, "milestones": (655_556 / 737_500, 710_184 / 737_500)},
    }
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "width": 32}, "resize": {"short": 160, "long": 160},
        "decoder": {"width": 64, "heads": 4, "queries": 20, "layers": 3, "hidden": 128},
        "encoder_layers": 1, "encoder_hidden": 128, "loss": {"points": 1024},
    }  # fmt: skip
    _SCENES: ClassVar[dict[str, Any]] = {
        "size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4,
    }  # fmt: skip
    _TRAINED: ClassVar[dict[str, Any]] = {"lr": 1e-3, "warmup": 50, "ema": 0.99}
    _MEMORY = "COCO val2017, R50, 50 epochs; not verified"
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "4a": Ablation(
            "where queries attend: inside their masks, and at which strides",
            {"as published": {}, "everywhere": {"masked": False}, "stride 32 only": {"fine_levels": False}},
            {"as published": {"AP": 43.7}, "everywhere": {"AP": 37.8}, "stride 32 only": {"AP": 41.5}},
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
        "4b": Ablation(
            "design of the decoder layers",
            {
                "as published": {}, "zero content": {"learned_content": False},
                "self-attention first": {"cross_first": False}, "dropout": {"decoder": {"dropout": 0.1}},
            },
            {
                "as published": {"AP": 43.7}, "zero content": {"AP": 42.9},
                "self-attention first": {"AP": 43.2}, "dropout": {"AP": 43.0},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
    }  # fmt: skip
