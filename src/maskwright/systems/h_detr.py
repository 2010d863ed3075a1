"""H-DETR: DETRs with Hybrid Matching (Jia, Yuan, He, Wu, Yu, Lin, Sun, Zhang, Hu, CVPR 2023, arXiv 2207.13080), on top
of Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159) with two stages.

A deformable encoder mixes four levels of a trunk. Each of its tokens proposes a box about its own place; the best
proposals are where the queries begin, their content being learnt ("mixed selection"). Six decoder layers look at a few
points of the memory about each query's box and correct it, each layer the box of the one before; a layer also learns
through the correction that came before it ("look forward twice"). Matching one to one leaves few queries that learn of
an object. So in training there is a second group of queries, which the first cannot see: there each object is matched
to six. At inference it is not there, and costs nothing.

Boxes alone: it is the detector that Mask Frozen-DETR makes masks for. The proposals' scores are those of class 0, as
the code has it: proposals are learnt without classes, all objects being of class 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from maskwright.blocks.deformable_attention import DeformableDecoderLayer, DeformableEncoderLayer, cell_centres
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.positions import padding_of, sine_code, sine_positions
from maskwright.blocks.transformer import MLP
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import assign
from maskwright.ops.query_boxes import Boxed, box_costs, box_losses, focal_classes, focal_costs, inverse_sigmoid
from maskwright.ops.query_losses import named, object_count
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import (
    Card,
    ClassRows,
    FrozenFeatures,
    FrozenLayout,
    Preset,
    QueryDetector,
    Score,
    at_least,
    weighed,
)

PREPROCESS = Preprocess(sizes="benchmark", multiple=1)
STRIDES = (8, 16, 32, 64, 128, 256)
PRIOR = -math.log((1 - 0.01) / 0.01)  # classes begin at one in a hundred


@dataclass(frozen=True)
class Raw:
    """What the queries say after each of L decoder layers, what the encoder proposes, and what both look at.

    Boxes are centre x, y, width, height; shares of the image without padding. In training N counts both groups of
    queries, those that are matched one to one first.
    """

    logits: Float[Tensor, "l b n k"]
    boxes: Float[Tensor, "l b n 4"]
    queries: Float[Tensor, "b n c"]  # of the last layer
    proposal_logits: Float[Tensor, "b s k"]  # of every token
    proposal_boxes: Float[Tensor, "b s 4"]
    memory: Float[Tensor, "b s c"]  # the encoder's output, all levels one after the other
    shapes: tuple[tuple[int, int], ...]  # of the levels, finest first
    fine: Float[Tensor, "b d _h _w"]  # the trunk's level of stride 4


class HDETR(QueryDetector):
    """See the module's text. `decode` takes `score_threshold` and `detections`; objects are boxes."""

    name = "h-detr"
    card = Card(
        title="H-Deformable-DETR",
        paper="Jia, Yuan, He, Wu, Yu, Lin, Sun, Zhang, Hu: DETRs with Hybrid Matching. CVPR 2023",
        arxiv="2207.13080",
        code="HDETR/H-Deformable-DETR",
        code_licence="MIT",
    )
    sees_padding = True

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        drop_path: float = 0.0,
        width: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        levels: int = 4,
        points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        queries: int = 300,
        many_queries: int = 1500,
        repeats: int = 6,
        many_weight: float = 1.0,
        mixed_selection: bool = True,
        look_twice: bool = True,
        dropout: float = 0.0,
        cost: Sequence[float] = (2.0, 5.0, 2.0),
        weights: Sequence[float] = (2.0, 5.0, 2.0),
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone ... drop_path
                        as in every system; published weights have norm "frozen" and two frozen parts
        width, heads, hidden, encoder_layers, decoder_layers, dropout
                        of the transformer
        levels, points  the trunk's strides 8, 16 and 32, and what convolutions make of the last; points that a head
                        looks at on each
        queries         matched one to one, and all there are at inference
        many_queries, repeats, many_weight
                        the group that is there in training alone: how many, how many of them an object gets, and what
                        its losses count. No queries: Deformable DETR
        mixed_selection queries' content is learnt, their position comes from a proposal; without, both come from it
        look_twice      a layer learns through the box of the layer before it too
        cost, weights   of class (focal), box (L1) and GIoU, in matching and in the losses
        short, long, mean, std  preprocessing
        """
        super().__init__()
        at_least("h-detr", 1, heads=heads, width=width, hidden=hidden, points=points, decoder_layers=decoder_layers)
        at_least("h-detr", 1, short=short, long=long)
        at_least("h-detr", 0, encoder_layers=encoder_layers, many_weight=many_weight)
        if width % 4 or width % heads:
            raise UsageError(f"width is {width}; expected a multiple of 4 and of the {heads} heads")
        if not 3 <= levels <= len(STRIDES):
            raise UsageError(f"levels is {levels}; expected 3 (strides 8, 16, 32) to {len(STRIDES)}")
        if queries < 1 or many_queries < 0 or repeats < 1:
            raise UsageError(
                f"queries is {queries}, many_queries {many_queries} and repeats {repeats}; expected at least 1, 0 and 1"
            )
        self.classes = tuple(classes)
        self.count, self.many_count, self.look_twice = queries, many_queries, look_twice
        self.repeats, self.many_weight = repeats, many_weight
        terms = ("class", "box", "giou")
        self.cost, self.weights = weighed("h-detr", "cost", cost, terms), weighed("h-detr", "weights", weights, terms)
        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, norm=norm,
            norm_eps=norm_eps, frozen=frozen, drop_path=drop_path,
        )  # fmt: skip
        self.fine = channels[0]
        reads = [*channels[1:], channels[-1], *[width] * levels][:levels]
        self.project = nn.ModuleList(
            ConvNorm(c, width, 1, norm="group", bias=True)
            if number < 3
            else ConvNorm(c, width, 3, stride=2, norm="group", bias=True)
            for number, c in enumerate(reads)
        )
        self.levels = nn.Parameter(torch.randn(levels, width))
        self.encoder = nn.ModuleList(
            DeformableEncoderLayer(width, hidden, heads, levels, points, dropout) for _ in range(encoder_layers)
        )
        self.proposal, self.proposal_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.position, self.position_norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
        self.queries = nn.Embedding(queries + many_queries, width) if mixed_selection else None
        self.decoder = nn.ModuleList(
            DeformableDecoderLayer(width, hidden, heads, levels, points, dropout) for _ in range(decoder_layers)
        )
        # One pair of heads for each decoder layer; the last pair is the encoder's.
        self.class_heads = nn.ModuleList(nn.Linear(width, len(self.classes)) for _ in range(decoder_layers + 1))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(decoder_layers + 1))
        for conv in self.project:
            assert isinstance(conv, ConvNorm)
            nn.init.xavier_uniform_(conv.conv.weight)
        for linear in (self.proposal, self.position):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for head in self.class_heads:
            nn.init.constant_(head.bias, PRIOR)  # pyright: ignore[reportArgumentType]
        for head in self.box_heads:
            nn.init.zeros_(head.layers[-1].weight)  # pyright: ignore
            nn.init.zeros_(head.layers[-1].bias)  # pyright: ignore
        self.preprocess = normalization_for(PREPROCESS.at(short, long), in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        fine, *deep = self.backbone(images)
        maps: list[Tensor] = []
        for number, project in enumerate(self.project):
            maps.append(project(deep[number] if number < 3 else deep[-1] if number == 3 else maps[-1]))
        shapes = tuple((m.shape[2], m.shape[3]) for m in maps)
        size = (images.shape[2], images.shape[3])
        if valid is None:
            valid = torch.tensor([size], device=images.device).expand(len(images), -1)
        paddings = [padding_of(valid, size, shape) for shape in shapes]
        padding = torch.cat([p.flatten(1) for p in paddings], 1)  # (B, S)
        counts = torch.stack([torch.stack([(~p[:, 0]).sum(1), (~p[:, :, 0]).sum(1)], -1) for p in paddings], 1)
        ratios = counts / counts.new_tensor([(w, h) for h, w in shapes])  # (B, L, 2), x and y: how much is filled
        memory = torch.cat([m.flatten(2).mT for m in maps], 1)  # (B, S, C)
        memory = self._encode(memory, shapes, ratios, paddings, padding)

        # What the encoder proposes, and where queries begin.
        places = self.places(shapes, counts, padding)
        whole = memory.masked_fill(places.isinf().any(-1, keepdim=True), 0.0)
        own = self.proposal_norm(self.proposal(whole))
        proposal_logits, coordinates = self.class_heads[-1](own), self.box_heads[-1](own).float() + places
        wanted = self.count + (self.many_count if self.training else 0)
        best = proposal_logits[..., 0].topk(min(wanted, memory.shape[1]), dim=1).indices
        start = coordinates.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        code = sine_code(start * (2 * math.pi), memory.shape[2] // 2).flatten(2)  # (B, N, 2 C)
        positions, content = self.position_norm(self.position(code.to(memory.dtype))).chunk(2, -1)
        if self.queries is not None:
            content = self.queries.weight[: content.shape[1]].expand(len(images), -1, -1)
        logits, boxes, x = self._decode(content, positions, start, memory, shapes, ratios, padding)
        return Raw(logits, boxes, x, proposal_logits, coordinates.sigmoid(), memory, shapes, fine)

    def _encode(
        self, x: Tensor, shapes: Sequence[tuple[int, int]], ratios: Tensor, paddings: Sequence[Tensor], padding: Tensor
    ) -> Float[Tensor, "b s c"]:
        width = x.shape[2]
        codes, centres = [], []
        for number, (shape, own) in enumerate(zip(shapes, paddings, strict=True)):
            code = sine_positions(shape, width // 2, padding=own, shift=-0.5, device=x.device)
            codes.append(code.flatten(2).mT.to(x.dtype) + self.levels[number])
            # Of what is filled, not of the map; then on each level as a share of the map.
            centres.append(cell_centres([shape], x.device) / ratios[:, number, None])
        positions = torch.cat(codes, 1)
        references = torch.cat(centres, 1)[:, :, None] * ratios[:, None]  # (B, S, L, 2)
        for layer in self.encoder:
            x = layer(x, positions, references, shapes, padding)
        return x

    @staticmethod
    def places(
        shapes: Sequence[tuple[int, int]], counts: Int[Tensor, "b l 2"], padding: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b s 4"]:
        """The box that each token begins with, about its own cell, as logits; infinite where that is not inside the
        image. `counts` (x, y) are the cells of each level that are not padding."""
        boxes = []
        for number, (h, w) in enumerate(shapes):
            cells = cell_centres([(h, w)], padding.device) * counts.new_tensor([w, h])
            centre = cells / counts[:, number, None]  # (B, h w, 2)
            boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2**number)], -1))
        every = torch.cat(boxes, 1)
        inside = ((every > 0.01) & (every < 0.99)).all(-1) & ~padding
        return torch.where(inside[..., None], (every / (1 - every)).log(), torch.inf)

    def _decode(
        self,
        x: Tensor,
        positions: Tensor,
        start: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        ratios: Tensor,
        padding: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and boxes of each layer, and the last queries. Boxes are float32 throughout."""
        group = torch.arange(x.shape[1], device=x.device) < self.count
        allowed = (group[:, None] == group).expand(len(x), 1, -1, -1) if x.shape[1] > self.count else None
        sides = torch.cat([ratios, ratios], -1)[:, None]  # (B, 1, L, 4)
        logits, boxes = [], []
        learnt = known = start
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads, strict=False):
            references = (known[:, :, None] * sides).to(x.dtype)
            x = layer(x, positions, references, memory, shapes, padding, allowed)
            change = box_head(x).float()
            boxes.append((change + inverse_sigmoid(learnt)).sigmoid())
            learnt = (change + inverse_sigmoid(known)).sigmoid()
            known = learnt.detach()
            learnt = learnt if self.look_twice else known
            logits.append(class_head(x))
        return torch.stack(logits), torch.stack(boxes), x

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `box`, `giou` of the last layer, `class_0` ... of those before it; `many_...` of the second group;
        `proposal_...` of the encoder's tokens. Targets are in the frame of the input; crowd regions are not learnt
        from."""
        device = raw.logits.device
        with torch.autocast(device.type, enabled=False):
            objects = [Boxed.of(target, device) for target in targets]
            count = object_count(objects, device)
            first, second = (
                raw.logits.split([self.count, raw.logits.shape[2] - self.count], 2)
                if (raw.logits.shape[2] > self.count)
                else (raw.logits, None)
            )
            terms = self._terms(first, raw.boxes[:, :, : self.count], objects, count)
            # The trunk's finest level may have a norm of its own, and without encoder nothing reads the levels' codes.
            read = (raw.boxes, raw.logits, raw.fine, self.levels)
            idle = sum(values.float().sum() for values in read) * 0
            result = named(terms, idle)
            if second is not None:
                often = [own.repeated(self.repeats) for own in objects]
                # With the same count as published: objects are counted as often as they are repeated.
                many = self._terms(second, raw.boxes[:, :, self.count :], often, object_count(often, device))
                result |= named({f"many_{name}": self.many_weight * value for name, value in many.items()})
            any_class = [Boxed(torch.zeros_like(own.labels), own.masks, own.boxes) for own in objects]
            proposals = self._terms(raw.proposal_logits[None], raw.proposal_boxes[None], any_class, count)
            return result | named({f"proposal_{name}": value for name, value in proposals.items()})

    def _terms(
        self, logits: Tensor, boxes: Tensor, objects: Sequence[Boxed], count: Tensor
    ) -> dict[str, Float[Tensor, " l"]]:
        pairs = assign(self.costs(logits, boxes, objects))
        sums = {"class": focal_classes(logits, objects, pairs), **box_losses(boxes, objects, pairs)}
        return {name: weight * sums[name] / count for name, weight in zip(sums, self.weights, strict=True)}

    def costs(
        self, logits: Float[Tensor, "l b n k"], boxes: Float[Tensor, "l b n 4"], objects: Sequence[Boxed]
    ) -> list[Float[Tensor, "l n _m"]]:
        """What it costs each query to answer for each object, by what each layer says."""
        table = []
        for image, own in enumerate(objects):
            classes = focal_costs(logits[:, image], own.labels)
            table.append(
                box_costs(boxes[:, image], own.boxes, self.cost[1], self.cost[2]).add_(classes, alpha=self.cost[0])
            )
        return table

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """The best pairs of query and class; none is suppressed, and one query may be several objects."""
        found = []
        for boxes, labels, scores, placement in zip(*self.best(raw, detections), placements, strict=True):
            (height, width), keep = placement.size, scores >= score_threshold
            boxes = placement.boxes_to_image(boxes[keep] * boxes.new_tensor([width, height, width, height]))
            boxes = box_ops.clip(boxes, placement.image_size)
            found.append(Instances(placement.image_size, boxes, labels[keep], None, scores[keep]))
        return found

    def best(
        self, raw: Raw, detections: int
    ) -> tuple[Float[Tensor, "b d 4"], Int[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Boxes (corners, as shares of the image), labels and scores of each image, best first."""
        scores = raw.logits[-1, :, : self.count].float().sigmoid()
        best, which = scores.flatten(1).topk(min(detections, scores[0].numel()), dim=1)
        queries = which.div(scores.shape[2], rounding_mode="floor")
        boxes = box_ops.corners(raw.boxes[-1]).gather(1, queries[..., None].expand(-1, -1, 4))
        return boxes, which % scores.shape[2], best

    # ---- for those that learn on top of it ---------------------------------------------------------------------------

    def frozen_layout(self) -> FrozenLayout:
        width = self.levels.shape[1]
        return FrozenLayout(width, width, STRIDES[: len(self.project)], self.fine)

    def frozen_features(self, raw: Raw, valid: Int[Tensor, "b 2"]) -> FrozenFeatures:
        sides = valid.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4)
        maps = raw.memory.split([h * w for h, w in raw.shapes], 1)
        return FrozenFeatures(
            box_ops.corners(raw.boxes[-1, :, : self.count]) * sides,
            raw.logits[-1, :, : self.count].float().sigmoid(),
            raw.queries[:, : self.count],
            tuple(m.mT.unflatten(2, shape) for m, shape in zip(maps, raw.shapes, strict=True)),
            raw.fine,
        )

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        tokens = nn.ParameterList([self.levels])
        learnt = [] if self.queries is None else [self.queries]
        return {
            "backbone": [self.backbone],
            "transformer": [
                self.project, tokens, self.encoder, self.proposal, self.proposal_norm, self.position,
                self.position_norm, *learnt, self.decoder,
            ],
            "heads": [self.class_heads, self.box_heads],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        last = len(self.class_heads) - 1  # its first row says whether there is an object at all
        return {
            f"class_heads.{number}.{kind}": ClassRows(first=int(number == last))
            for number in range(last + 1)
            for kind in ("weight", "bias")
        }

    _R50: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2}
    _COCO = "COCO val2017, short side 800, pycocotools"
    _README = "HDETR/H-Deformable-DETR README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "h-detr-r50": Preset(
            _R50, (Score(50.0, "box AP", _COCO, _README),), "36 epochs; 12 epochs: 48.7"
        ),
        "h-detr-swin-tiny": Preset(
            {"backbone": "swin-tiny", "drop_path": 0.2}, (Score(53.2, "box AP", _COCO, _README),), "36 epochs"
        ),
        "h-detr-swin-large": Preset(
            {"backbone": "swin-large", "drop_path": 0.5, "queries": 900},
            (Score(57.4, "box AP", _COCO, _README),), "36 epochs; 57.9 with weight decay 0.05 and 300 detections",
        ),
        "h-detr-small": Preset(
            {
                "backbone": "resnet18", "width": 128, "hidden": 512, "levels": 3, "encoder_layers": 2,
                "decoder_layers": 3, "queries": 50, "many_queries": 150, "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 2e-4, "weight_decay": 1e-4, "decay_norms": True, "decay_biases": True,
        "rates": {"backbone": 0.1, "*attention.offsets.*": 0.1}, "clip": 0.1, "schedule": "steps", "warmup": 0,
        "augment": {"flip": 0.5}, "short": tuple(range(480, 801, 32)), "long": 1333,
    }  # fmt: skip
    # 16 images a step. Published with random crops for half of the images besides.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "h-detr-12ep": {**_RECIPE, "epochs": 12, "milestones": (11 / 12,)},
        "h-detr-36ep": {**_RECIPE, "epochs": 36, "milestones": (30 / 36,)},
    }
