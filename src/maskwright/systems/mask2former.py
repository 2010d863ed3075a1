"""Mask2Former: Masked-attention Mask Transformer for Universal Image Segmentation (Cheng, Misra, Schwing, Kirillov,
Girdhar, CVPR 2022, arXiv 2112.01527).

A hundred learnt queries each say a class, or "no object", and a mask: an embedding whose product with the features of
every pixel, at stride 4, is the mask's logit there. They come to it in nine rounds, in each of which a query looks at
the trunk's features, at strides 32, 16 and 8 in turn, but only inside the mask that it has predicted so far (*masked
attention*), then at the other queries. What the trunk sees is first mixed over its scales by deformable attention.
Matched one to one with the objects, queries learn not to say the same thing twice, so that nothing is suppressed.

One network does instance, panoptic and semantic segmentation; which, is a matter of the data it learns (`stuff`) and of
how its answers are read (`decode`, `decode_panoptic`, `decode_semantic`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.deformable_attention import DeformableEncoderLayer, cell_centres
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.positions import sine_positions
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.transformer import MLP, DecoderLayer
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import assign
from maskwright.ops.query_losses import MaskAnswers as Raw
from maskwright.structures import Instances, Preprocess
from maskwright.systems.base import Ablation, Card, ClassRows, Preset, QuerySystem, Score, at_least

LEVELS = 3  # strides 32, 16 and 8, in this order throughout


class PixelDecoder(nn.Module):
    """Mixes strides 32, 16 and 8 by deformable attention, and makes features at stride 4 of what comes out.

    Always in the weights' own precision, as published: mixed precision is switched off inside.
    """

    def __init__(self, channels: Sequence[int], width: int, hidden: int, layers: int, heads: int, points: int,
                 dropout: float):  # fmt: skip
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
        """Features of pixels (B, C, H/4, W/4), and the three levels (B, C, h, w), coarsest first."""
        with torch.autocast(levels[0].device.type, enabled=False):
            kind = self.levels.dtype
            fine, *deep = (level.to(kind) for level in levels)
            maps = [project(level) for project, level in zip(self.project, reversed(deep), strict=True)]
            shapes = [(m.shape[2], m.shape[3]) for m in maps]
            width = maps[0].shape[1]
            positions = [
                sine_positions(shape, width // 2, device=fine.device).flatten(2).mT.to(kind) + level
                for shape, level in zip(shapes, self.levels, strict=True)
            ]
            tokens, placed = torch.cat([m.flatten(2).mT for m in maps], 1), torch.cat(positions, 1)
            references = cell_centres(shapes, fine.device)[None, :, None]  # (1, S, 1, 2): of any level
            for layer in self.encoder:
                tokens = layer(tokens, placed, references, shapes)
            parts = tokens.split([h * w for h, w in shapes], 1)
            maps = [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
            # The paper's FPN takes the nearest; the code is bilinear.
            side = self.lateral(fine)
            coarse = functional.interpolate(maps[-1], side.shape[-2:], mode="bilinear", align_corners=False)
            return self.mask_features(self.output(side + coarse)), maps


class Queries(nn.Module):
    """What queries begin with: a content and a position each; and a code of the level that they look at."""

    def __init__(self, count: int, width: int, learnt_content: bool):
        super().__init__()
        self.content = nn.Parameter(torch.randn(count, width)) if learnt_content else None
        self.positions = nn.Parameter(torch.randn(count, width))
        self.levels = nn.Parameter(torch.randn(LEVELS, width))


class Mask2Former(QuerySystem):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections` and more."""

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
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        sampled: int = 4,
        layers: int = 9,
        hidden: int = 2048,
        dropout: float = 0.0,
        masked: bool = True,
        cross_first: bool = True,
        learnt_content: bool = True,
        fine_levels: bool = True,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object: float = 0.1,
        points: int = 12544,
        candidates: float = 3.0,
        important: float = 0.75,
        classes_first: bool = False,
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
        width, heads    of everything behind the trunk
        encoder_layers, encoder_hidden, sampled
                        of the pixel decoder: deformable layers, their feed-forward width, points per head and level
        layers, hidden  rounds of the queries, and their feed-forward width
        masked          queries look inside their masks alone (table 4a)
        cross_first     queries look at the image before they look at each other (table 4b)
        learnt_content  queries begin with a learnt content, not with zeros (table 4b)
        fine_levels     queries look at strides 32, 16 and 8 in turn; else at stride 32 alone (table 4a)
        class_weight, mask_weight, dice_weight
                        of the losses and of the costs of matching
        no_object       weight of "no object" in the class loss
        points          where masks are compared; for the losses `candidates` times as many are drawn, and the least
                        sure of them are a share `important`
        classes_first   how `decode_semantic` resizes: see `ops.queries.semantic`; so where only that was published
        short, long, mean, std  preprocessing; mean and std in the network's channel order, None: as published
        """
        super().__init__()
        at_least("mask2former", 1, heads=heads, width=width, queries=queries, points=points, layers=layers)
        at_least(
            "mask2former", 1, sampled=sampled, hidden=hidden, encoder_hidden=encoder_hidden, short=short, long=long
        )
        at_least("mask2former", 0, encoder_layers=encoder_layers, no_object=no_object)
        at_least("mask2former", 0, class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)
        if width % (4 * heads):
            raise UsageError(f"width is {width}; expected a multiple of 4 x heads, which is {4 * heads}")
        if not 0 <= important <= 1 or candidates < 1:
            raise UsageError(
                f"important is {important} and candidates {candidates}; expected a share from 0 to 1, and at least 1"
            )
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.masked, self.fine_levels, self.classes_first = masked, fine_levels, classes_first
        self.weights, self.no_object = (class_weight, mask_weight, dice_weight), no_object
        self.rules = learning.Points(points, candidates, important)
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, stride_in=stride_in,
            norm=norm, norm_eps=norm_eps, frozen=frozen, swin_width=swin_width, swin_depths=swin_depths,
            swin_heads=swin_heads, window=window, drop_path=drop_path,
        )  # fmt: skip
        self.pixel_decoder = PixelDecoder(channels, width, encoder_hidden, encoder_layers, heads, sampled, dropout)
        self.queries = Queries(queries, width, learnt_content)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, hidden, heads, dropout, cross_first=cross_first) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, len(self.classes) + 1)
        self.mask_head = MLP((width, width, width, width))
        self.preprocess = normalization_for(
            Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divide=1.0).at(short, long),
            in_channels, mean, std,
        )  # fmt: skip

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features, maps = self.pixel_decoder(self.backbone(images))
        positions = self.queries.positions.expand(len(images), -1, -1)  # (B, N, C)
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
        x = self.norm(x)
        classes.append(self.class_head(x))
        embeddings.append(self.mask_head(x))

    @staticmethod
    @torch.no_grad()
    def allowed(
        embeddings: Float[Tensor, "b n c"], coarse: Float[Tensor, "b c m"], rescue: bool = True
    ) -> Bool[Tensor, "b 1 n m"]:
        """Where each query may look: inside its mask; with `rescue` everywhere if that is empty."""
        inside = torch.bmm(embeddings, coarse.to(embeddings.dtype)) >= 0  # probability at least a half
        if rescue:
            inside = inside | ~inside.any(-1, keepdim=True)
        return inside[:, None]

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `mask` and `dice` of the last prediction, and `class_0` ... of those before it.

        Targets are in the frame of the input, of which padding is a part where no mask is; crowd regions are not learnt
        from. Random points come from torch's generator in the order of the published code.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.of(t, device) for t in targets]
            pairs = assign(self.costs(raw, objects))
            mask, dice = learning.point_losses(raw.embeddings, raw.features, objects, pairs, raw.size, self.rules)
            count = learning.object_count(objects, device)
            classes = learning.class_losses(raw.classes, objects, pairs, self.no_object)
            # Without layers that mix the levels there may be some that no round of the queries looks at.
            unread = () if len(self.pixel_decoder.encoder) else tuple(self.parameters())
            idle = sum(v.float().sum() for v in (raw.features, raw.embeddings, *unread) if v.requires_grad) * 0
            sums = (classes, mask / count, dice / count)
            terms = {n: w * t for n, w, t in zip(("class", "mask", "dice"), self.weights, sums, strict=True)}
            return learning.named(terms, idle)

    def costs(self, raw: Raw, objects: Sequence[learning.Objects]) -> list[Float[Tensor, "l n _m"]]:
        """What matching compares; draws the points that it is done at."""
        layers, images, queries = raw.classes.shape[:3]
        matched = sum(min(queries, len(own)) for own in objects)
        places = learning.draw_places(layers, images, matched, self.rules, raw.features.device)
        return learning.point_costs(
            raw.classes.float().softmax(-1), raw.embeddings, raw.features, objects, places, raw.size, self.weights
        )

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            "backbone": [self.backbone], "pixel_decoder": [self.pixel_decoder],
            "decoder": [self.queries, self.decoder, self.norm, self.class_head, self.mask_head],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    _R50: ClassVar[dict[str, Any]] = {"norm": "frozen"}
    _R101: ClassVar[dict[str, Any]] = {"norm": "frozen", "backbone": "resnet101"}
    _TINY: ClassVar[dict[str, Any]] = {"backbone": "swin-tiny", "drop_path": 0.3}
    _SMALL: ClassVar[dict[str, Any]] = {"backbone": "swin-small", "drop_path": 0.3}
    _BASE: ClassVar[dict[str, Any]] = {"backbone": "swin-base", "drop_path": 0.3}
    _LARGE: ClassVar[dict[str, Any]] = {"backbone": "swin-large", "drop_path": 0.3, "queries": 200}
    _COCO = "COCO val2017, short side 800, pycocotools"
    _PANOPTIC = "COCO panoptic val2017, short side 800; another training of the network, with things and stuff"
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
                "backbone": "resnet18", "width": 128, "queries": 50, "encoder_layers": 2, "encoder_hidden": 512,
                "layers": 6, "hidden": 512, "points": 2048, "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    # Decay 0.05, but none of norms (the default), of what embeds queries and levels, nor of Swin's relative positions.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "decay_biases": True,
        "no_decay": ("queries.*", "*.attention.table"), "rates": {"backbone": 0.1}, "clip": 0.01, "warmup": 0,
        "amp": "bf16", "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (1024, 1024)},
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 16 images a step; published in fp16, and with padding of grey 128, here of the mean colour
        "mask2former-50ep": {**_RECIPE, "steps": 368_750, "milestones": (327_778 / 368_750, 355_092 / 368_750)},
        "mask2former-100ep": {**_RECIPE, "steps": 737_500, "milestones": (655_556 / 737_500, 710_184 / 737_500)},
    }
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": "resnet18", "stem_width": 32, "width": 64, "heads": 4, "queries": 20, "encoder_layers": 1,
        "encoder_hidden": 128, "layers": 3, "hidden": 128, "points": 1024, "short": 160, "long": 160,
    }  # fmt: skip
    _SCENES: ClassVar[dict[str, Any]] = {
        "size": (160, 160), "classes": ("disc", "ring", "star", "box"), "difficulty": 0.4,
    }  # fmt: skip
    _TRAINED: ClassVar[dict[str, Any]] = {"lr": 1e-3, "warmup": 50, "ema": 0.99}
    _MEMORY = "COCO val2017, R50, 50 epochs; from memory"
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "4a": Ablation(
            "where queries look: inside their masks, and at which strides",
            {"as published": {}, "everywhere": {"masked": False}, "at stride 32 alone": {"fine_levels": False}},
            {"as published": {"AP": 43.7}, "everywhere": {"AP": 37.8}, "at stride 32 alone": {"AP": 41.5}},
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
        "4b": Ablation(
            "what makes a decoder layer",
            {
                "as published": {}, "queries begin with zeros": {"learnt_content": False},
                "each other before the image": {"cross_first": False}, "dropout": {"dropout": 0.1},
            },
            {
                "as published": {"AP": 43.7}, "queries begin with zeros": {"AP": 42.9},
                "each other before the image": {"AP": 43.2}, "dropout": {"AP": 43.0},
            },
            _MEMORY, _ABLATED, _SCENES, _TRAINED,
        ),
    }  # fmt: skip
