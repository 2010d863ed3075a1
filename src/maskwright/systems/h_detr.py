"""H-DETR: DETRs with Hybrid Matching (Jia, Yuan, He, Wu, Yu, Lin, Sun, Zhang, Hu, CVPR 2023, arXiv 2207.13080), on top
of two-stage Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159).

A deformable encoder reads four levels of a backbone. Each of its tokens predicts a box around its own cell; the best of
these proposals are the initial boxes of the queries, whose content is learned ("mixed selection"). Six decoder layers
attend to a few points of the memory around each query's box and refine it, each layer starting from the box of the
previous one; gradients of a layer also reach the refinement before it ("look forward twice"). One-to-one matching gives
few queries a positive target. Training therefore has a second group of queries, to which each object is matched six
times and which the first group cannot attend to. It is absent in inference and costs nothing there.

The system predicts boxes only; it is the detector that Mask Frozen-DETR adds masks to. As in the published code, the
score of a proposal is that of class 0: proposals are trained without classes, with all objects as class 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.deformable_attention import DeformableDecoderLayer, DeformableEncoderLayer, Shapes, cell_centres
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.positions import padding_of, sine_code, sine_positions
from maskwright.blocks.transformer import MLP
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import assign
from maskwright.ops.query_boxes import BoxTargets, box_costs, box_losses, focal_classes, focal_costs, inverse_sigmoid
from maskwright.ops.query_losses import name_terms, object_count
from maskwright.structures import Instances, Placement, Preprocess
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
from maskwright.systems.system import ClassRows, Output, at_least

STRIDES = (8, 16, 32, 64, 128, 256)
PRIOR = -math.log((1 - 0.01) / 0.01)  # initial bias of the classes: a probability of 0.01


@dataclass(frozen=True)
class DeformableTransformer(Transformer):
    """The deformable encoder and decoder, as options.

    Attributes:
        width: Channels of everything after the backbone, a multiple of 4 and of `heads`.
        heads: Attention heads.
        hidden: Width inside the feed-forward layers.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        queries: Number of queries that are matched one to one; all there are in inference.
        dropout: Dropout of attention and feed-forward layers.
        levels: Number of feature maps: strides 8, 16 and 32 of the backbone, and convolutions of the last one.
        points: Sampling locations of each head on each level.
    """

    queries: int = 300
    levels: int = 4
    points: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "points")
        if not 3 <= self.levels <= len(STRIDES):
            raise UsageError(
                f"transformer.levels must be from 3 (strides 8, 16, 32) to {len(STRIDES)}, got {self.levels}"
            )


BACKBONE, RESIZE = Backbone("resnet50"), Resize(short=800, long=1333)
TRANSFORMER, COST, LOSS = DeformableTransformer(), BoxCost(2.0, 5.0, 2.0), BoxLoss(2.0, 5.0, 2.0)
PREPROCESS = Preprocess(sizes="benchmark", multiple=1)


@dataclass(frozen=True)
class Raw:
    """The raw output: predictions of the queries after each of L decoder layers, and of the encoder's tokens.

    Boxes are centre x, y, width, height as fractions of the image without padding. In training, N counts both groups of
    queries, the one matched one to one first.

    Attributes:
        logits: Class logits of the queries, the last layer last.
        boxes: Boxes of the queries.
        queries: Queries after the last layer.
        proposal_logits: Class logits of all tokens.
        proposal_boxes: Boxes of all tokens.
        memory: Output of the encoder, one level after the other.
        shapes: Height and width of each level, finest first.
        fine: The backbone's feature map of stride 4.
    """

    logits: Float[Tensor, "l b n k"]
    boxes: Float[Tensor, "l b n 4"]
    queries: Float[Tensor, "b n c"]
    proposal_logits: Float[Tensor, "b s k"]
    proposal_boxes: Float[Tensor, "b s 4"]
    memory: Float[Tensor, "b s c"]
    shapes: tuple[tuple[int, int], ...]
    fine: Float[Tensor, "b d _h _w"]


# ---- networks --------------------------------------------------------------------------------------------------------


class DeformableDETR(nn.Module):
    """Backbone, encoder, proposals and decoder (Deformable DETR, figure 1 and section 4.2; H-DETR, figure 3).

    Args:
        backbone: Network with feature maps of strides 4, 8, 16 and 32, and possibly others.
        sizes: Sizes of the transformer.
        classes: Number of classes.
        many_queries: Number of queries of the second group, which exists in training only.
        mixed_selection: Whether the content of queries is learned; otherwise it is computed from the proposals too.
        look_twice: Whether gradients of a layer reach the boxes of the previous one.
    """

    def __init__(
        self, backbone: nn.Module, sizes: DeformableTransformer, classes: int, many_queries: int,
        mixed_selection: bool, look_twice: bool,
    ):  # fmt: skip
        super().__init__()
        width, levels = sizes.width, sizes.levels
        layer = (width, sizes.hidden, sizes.heads, levels, sizes.points, sizes.dropout)
        self.count, self.many_count, self.look_twice = sizes.queries, many_queries, look_twice
        of_backbone = levels_of(backbone)
        self.chosen = of_backbone.indices((4, 8, 16, 32))
        self.fine_channels, *deep = (of_backbone.channels[index] for index in self.chosen)
        self.backbone = backbone
        inputs = [*deep, deep[-1], *[width] * levels][:levels]
        self.project = nn.ModuleList(
            ConvNorm(c, width, 1, norm="group", bias=True)
            if number < 3
            else ConvNorm(c, width, 3, stride=2, norm="group", bias=True)
            for number, c in enumerate(inputs)
        )
        # A code of each level; only encoder layers read it.
        self.levels = nn.Parameter(torch.randn(levels, width), requires_grad=sizes.encoder_layers > 0)
        self.encoder = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(sizes.encoder_layers))
        self.proposal, self.proposal_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.position, self.position_norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
        self.queries = nn.Embedding(self.count + many_queries, width) if mixed_selection else None
        self.decoder = nn.ModuleList(DeformableDecoderLayer(*layer) for _ in range(sizes.decoder_layers))
        # One pair of heads for each decoder layer; the last pair is that of the encoder's tokens.
        self.class_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(sizes.decoder_layers + 1))
        self.box_heads = nn.ModuleList(MLP((width, width, width, 4)) for _ in range(sizes.decoder_layers + 1))
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

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        features = self.backbone(images)
        fine, *deep = (features[index] for index in self.chosen)
        maps: list[Tensor] = []
        for number, project in enumerate(self.project):
            maps.append(project(deep[number] if number < 3 else deep[-1] if number == 3 else maps[-1]))
        shapes = tuple((m.shape[2], m.shape[3]) for m in maps)
        size = (images.shape[2], images.shape[3])
        if valid is None:
            valid = torch.tensor([size], device=images.device).expand(images.shape[0], -1)
        paddings = [padding_of(valid, size, shape) for shape in shapes]
        padding = torch.cat([p.flatten(1) for p in paddings], 1)  # (B, S)
        counts = torch.stack([torch.stack([(~p[:, 0]).sum(1), (~p[:, :, 0]).sum(1)], -1) for p in paddings], 1)
        ratios = counts / counts.new_tensor([(w, h) for h, w in shapes])  # (B, L, 2), x and y: the part without padding
        memory = torch.cat([m.flatten(2).mT for m in maps], 1)  # (B, S, C)
        memory = self._encode(memory, shapes, ratios, paddings, padding)

        # Proposals of the tokens, and the queries that start from the best of them.
        initial = token_boxes(shapes, counts, padding)
        inside = memory.masked_fill(initial.isinf().any(-1, keepdim=True), 0.0)
        tokens = self.proposal_norm(self.proposal(inside))
        proposal_logits, proposals = self.class_heads[-1](tokens), self.box_heads[-1](tokens).float() + initial
        count = self.count + (self.many_count if self.training else 0)
        best = proposal_logits[..., 0].topk(min(count, memory.shape[1]), dim=1).indices
        start = proposals.detach().gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
        code = sine_code(start * (2 * math.pi), memory.shape[2] // 2).flatten(2)  # (B, N, 2 C)
        positions, content = self.position_norm(self.position(code.to(memory.dtype))).chunk(2, -1)
        if self.queries is not None:
            content = self.queries.weight[: content.shape[1]].expand(images.shape[0], -1, -1)
        logits, boxes, x = self._decode(content, positions, start, memory, shapes, ratios, padding)
        return Raw(logits, boxes, x, proposal_logits, proposals.sigmoid(), memory, shapes, fine)

    def _encode(
        self, x: Tensor, shapes: Shapes, ratios: Tensor, paddings: Sequence[Tensor], padding: Tensor
    ) -> Float[Tensor, "b s c"]:
        """The tokens of all levels after the encoder."""
        width = x.shape[2]
        codes, centres = [], []
        for number, (shape, own) in enumerate(zip(shapes, paddings, strict=True)):
            code = sine_positions(shape, width // 2, padding=own, shift=-0.5, device=x.device)
            codes.append(code.flatten(2).mT.to(x.dtype) + self.levels[number])
            # First as fractions of the image without padding, then, on each level, as fractions of the map.
            centres.append(cell_centres([shape], x.device) / ratios[:, number, None])
        positions = torch.cat(codes, 1)
        references = torch.cat(centres, 1)[:, :, None] * ratios[:, None]  # (B, S, L, 2)
        for layer in self.encoder:
            x = layer(x, positions, references, shapes, padding)
        return x

    def _decode(
        self, x: Tensor, positions: Tensor, start: Tensor, memory: Tensor, shapes: Shapes, ratios: Tensor,
        padding: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Logits and boxes of each layer, and the last queries. Boxes are float32 throughout."""
        group = torch.arange(x.shape[1], device=x.device) < self.count
        allowed = (group[:, None] == group).expand(x.shape[0], 1, -1, -1) if x.shape[1] > self.count else None
        sides = torch.cat([ratios, ratios], -1)[:, None]  # (B, 1, L, 4)
        logits, boxes = [], []
        before = detached = start  # the previous layer's boxes, with and without their gradient
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads, strict=False):
            references = (detached[:, :, None] * sides).to(x.dtype)
            x = layer(x, positions, references, memory, shapes, padding, allowed)
            change = box_head(x).float()
            boxes.append((change + inverse_sigmoid(before)).sigmoid())
            before = (change + inverse_sigmoid(detached)).sigmoid()
            detached = before.detach()
            before = before if self.look_twice else detached
            logits.append(class_head(x))
        return torch.stack(logits), torch.stack(boxes), x


def token_boxes(shapes: Shapes, counts: Int[Tensor, "b l 2"], padding: Bool[Tensor, "b s"]) -> Float[Tensor, "b s 4"]:
    """Boxes that the encoder's tokens refine, around their own cells (Deformable DETR, appendix A.4).

    Args:
        shapes: Height and width of each level, in cells.
        counts: Number of columns and rows of each level that are not padding.
        padding: True for tokens that are padding.

    Returns:
        Logits of centre x, y, width, height; infinite for padding and for boxes too close to the image's border.
    """
    boxes = []
    for number, (h, w) in enumerate(shapes):
        cells = cell_centres([(h, w)], padding.device) * counts.new_tensor([w, h])
        centre = cells / counts[:, number, None]  # (B, h w, 2)
        boxes.append(torch.cat([centre, torch.full_like(centre, 0.05 * 2**number)], -1))
    joined = torch.cat(boxes, 1)
    inside = ((joined > 0.01) & (joined < 0.99)).all(-1) & ~padding
    return torch.where(inside[..., None], (joined / (1 - joined)).log(), torch.inf)


class HDETR(QueryDetector):
    """Detection with queries and hybrid matching; see the module's docstring. Its network is "dense"."""

    name = "h-detr"
    card = Card(
        title="H-Deformable-DETR",
        paper="Jia, Yuan, He, Wu, Yu, Lin, Sun, Zhang, Hu: DETRs with Hybrid Matching. CVPR 2023",
        arxiv="2207.13080",
        code="HDETR/H-Deformable-DETR",
        code_licence="MIT",
    )
    sees_padding = True
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{
            name: f"transformer.{name}"
            for name in (
                "width", "heads", "hidden", "encoder_layers", "decoder_layers", "queries", "dropout", "levels",
                "points",
            )
        },
        "weights": "loss",
    }  # fmt: skip
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        "levels": "dense.levels",
        **{
            f"{part}.": f"dense.{part}."
            for part in (
                "backbone", "project", "encoder", "proposal", "proposal_norm", "position", "position_norm", "queries",
                "decoder", "class_heads", "box_heads",
            )
        },
    }  # fmt: skip

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        transformer: Mapping[str, Any] | DeformableTransformer = TRANSFORMER,
        many_queries: int = 1500,
        repeats: int = 6,
        many_weight: float = 1.0,
        mixed_selection: bool = True,
        look_twice: bool = True,
        cost: Mapping[str, Any] | BoxCost = COST,
        loss: Mapping[str, Any] | BoxLoss = LOSS,
        resize: ResizeLike = RESIZE,
    ):
        """Constructs the system with random weights.

        Args:
            classes: Names of the classes.
            backbone: Network with feature maps of strides 4 to 32; published weights have norm "frozen" and 2 frozen
                parts.
            in_channels: Channels of the image.
            transformer: Sizes of the transformer.
            many_queries: Number of queries of the second group, which exists in training only; with 0 the system is
                Deformable DETR.
            repeats: Number of queries of the second group that are matched with each object.
            many_weight: Weight of the losses of the second group.
            mixed_selection: Whether the content of queries is learned and their position comes from a proposal;
                otherwise both come from the proposal.
            look_twice: Whether gradients of a decoder layer reach the boxes of the previous layer.
            cost: Weights of class (focal), box and GIoU in matching.
            loss: Weights of the loss terms.
            resize: Size and normalisation of the input.
        """
        super().__init__()
        at_least("h-detr", 0, many_queries=many_queries, many_weight=many_weight)
        at_least("h-detr", 1, repeats=repeats)
        spec, sizes = Backbone.read(backbone, BACKBONE), DeformableTransformer.read(transformer, TRANSFORMER)
        self.classes = tuple(classes)
        self.count, self.repeats, self.many_weight = sizes.queries, repeats, many_weight
        self.cost, self.loss = BoxCost.read(cost, COST), BoxLoss.read(loss, LOSS)
        self.dense = DeformableDETR(
            spec.build(in_channels), sizes, len(self.classes), many_queries, mixed_selection, look_twice
        )
        self.layout = FrozenLayout(sizes.width, sizes.width, STRIDES[: sizes.levels], self.dense.fine_channels)
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"})

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        return self.dense(images, valid)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss (H-DETR, section 3.2).

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input. Crowd regions are ignored.

        Returns:
            `class`, `box` and `giou` of the last decoder layer, and as `class_0`, ... of the earlier ones; `many_...`
            of the second group of queries; `proposal_...` of the encoder's tokens.
        """
        device = raw.logits.device
        with torch.autocast(device.type, enabled=False):
            objects = [BoxTargets.from_instances(target, device) for target in targets]
            count = object_count(objects, device)
            first, second = raw.logits[:, :, : self.count], raw.logits[:, :, self.count :]
            terms = self._terms(first, raw.boxes[:, :, : self.count], objects, count)
            # The finest feature map may have a norm of its own, which no term depends on.
            idle = sum(values.float().sum() for values in (raw.boxes, raw.logits, raw.fine)) * 0
            result = name_terms(terms, idle)
            if second.shape[2]:
                repeated = [own.repeated(self.repeats) for own in objects]
                # As published, divided by the number of objects counted as often as they are repeated.
                many = self._terms(second, raw.boxes[:, :, self.count :], repeated, object_count(repeated, device))
                result |= name_terms({f"many_{name}": self.many_weight * value for name, value in many.items()})
            any_class = [replace(own, labels=torch.zeros_like(own.labels)) for own in objects]
            proposals = self._terms(raw.proposal_logits[None], raw.proposal_boxes[None], any_class, count)
            return result | name_terms({f"proposal_{name}": value for name, value in proposals.items()})

    def _terms(
        self, logits: Tensor, boxes: Tensor, objects: Sequence[BoxTargets], count: Tensor
    ) -> dict[str, Float[Tensor, " l"]]:
        """Weighted terms of one group of predictions, matched one to one with `objects`."""
        pairs = assign(self.costs(logits, boxes, objects))
        sums = {"class": focal_classes(logits, objects, pairs), **box_losses(boxes, objects, pairs)}
        return {name: getattr(self.loss, f"{name}_weight") * value / count for name, value in sums.items()}

    def costs(
        self, logits: Float[Tensor, "l b n k"], boxes: Float[Tensor, "l b n 4"], objects: Sequence[BoxTargets]
    ) -> list[Float[Tensor, "l n _m"]]:
        """Costs of matching each query with each object of its image, for the predictions of each layer."""
        table = []
        for image, own in enumerate(objects):
            of_boxes = box_costs(boxes[:, image], own.boxes, self.cost.box_weight, self.cost.giou_weight)
            table.append(of_boxes.add_(focal_costs(logits[:, image], own.labels), alpha=self.cost.class_weight))
        return table

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """Converts the best pairs of query and class to objects; nothing is suppressed.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Minimum score.
            detections: Maximum number of objects per image; one query may give several, of different classes.

        Returns:
            The boxes of each image, best first.
        """
        results = []
        for boxes, labels, scores, placement in zip(*self.best(raw, detections), placements, strict=True):
            (height, width), keep = placement.size, scores >= score_threshold
            boxes = placement.boxes_to_image(boxes[keep] * boxes.new_tensor([width, height, width, height]))
            boxes = box_ops.clip(boxes, placement.image_size)
            results.append(Instances(placement.image_size, boxes, labels[keep], None, scores[keep]))
        return results

    def best(
        self, raw: Raw, detections: int
    ) -> tuple[Float[Tensor, "b d 4"], Int[Tensor, "b d"], Float[Tensor, "b d"]]:
        """The best pairs of query and class of each image.

        Returns:
            Boxes (x0, y0, x1, y1 as fractions of the image), labels and scores, best first.
        """
        scores = raw.logits[-1, :, : self.count].float().sigmoid()
        best, which = scores.flatten(1).topk(min(detections, scores[0].numel()), dim=1)
        queries = which.div(scores.shape[2], rounding_mode="floor")
        boxes = box_ops.corners(raw.boxes[-1]).gather(1, queries[..., None].expand(-1, -1, 4))
        return boxes, which % scores.shape[2], best

    # ---- for systems that are trained on top of it -------------------------------------------------------------------

    def frozen_layout(self) -> FrozenLayout:
        return self.layout

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

    # ---- loading and training ----------------------------------------------------------------------------------------

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        terms = ("class_weight", "box_weight", "giou_weight")
        return super().upgraded(named_weights(options, {"cost": ("cost", terms), "weights": ("loss", terms)}))

    def groups(self) -> dict[str, list[nn.Module]]:
        dense = self.dense
        queries = [] if dense.queries is None else [dense.queries]
        return {
            "backbone": [dense.backbone],
            "transformer": [
                dense.project, nn.ParameterList([dense.levels]), dense.encoder, dense.proposal, dense.proposal_norm,
                dense.position, dense.position_norm, *queries, dense.decoder,
            ],
            "heads": [dense.class_heads, dense.box_heads],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        last = len(self.dense.class_heads) - 1  # its first row is the score of an object of any class
        return {
            f"dense.class_heads.{number}.{kind}": ClassRows(first=int(number == last))
            for number in range(last + 1)
            for kind in ("weight", "bias")
        }

    # ---- presets -----------------------------------------------------------------------------------------------------

    _COCO = "COCO val2017, short side 800, pycocotools"
    _README = "HDETR/H-Deformable-DETR README"
    presets: ClassVar[Mapping[str, Preset]] = {
        "h-detr-r50": Preset(
            {"backbone": {"name": "resnet50", "norm": "frozen", "frozen": 2}},
            (Score(50.0, "box AP", _COCO, _README),), "36 epochs; 12 epochs: 48.7",
        ),
        "h-detr-swin-tiny": Preset(
            {"backbone": {"name": "swin-tiny", "drop_path": 0.2}},
            (Score(53.2, "box AP", _COCO, _README),), "36 epochs",
        ),
        "h-detr-swin-large": Preset(
            {"backbone": {"name": "swin-large", "drop_path": 0.5}, "transformer": {"queries": 900}},
            (Score(57.4, "box AP", _COCO, _README),), "36 epochs; 57.9 with weight decay 0.05 and 300 detections",
        ),
        "h-detr-small": Preset(
            {
                "backbone": "resnet18", "many_queries": 150, "resize": {"short": 320, "long": 512},
                "transformer": {
                    "width": 128, "hidden": 512, "levels": 3, "encoder_layers": 2, "decoder_layers": 3, "queries": 50,
                },
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 2e-4, "weight_decay": 1e-4, "decay_norms": True, "decay_biases": True,
        "rates": {"backbone": 0.1, "*attention.offsets.*": 0.1}, "clip": 0.1, "schedule": "steps", "warmup": 0,
        "augment": {"flip": 0.5}, "short": tuple(range(480, 801, 32)), "long": 1333,
    }  # fmt: skip
    # 16 images per step. The published schedule also crops half of the images at random.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "h-detr-12ep": {**_RECIPE, "epochs": 12, "milestones": (11 / 12,)},
        "h-detr-36ep": {**_RECIPE, "epochs": 36, "milestones": (30 / 36,)},
    }
