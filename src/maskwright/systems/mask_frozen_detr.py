"""Mask Frozen-DETR: High Quality Instance Segmentation with One GPU (Liang, Yuan, 2023, arXiv 2308.03747).

A detector of queries that is already trained stays as it is: trunk, encoder, decoder and heads are frozen. Only a light
network learns, which makes one mask inside each box that the detector gives. It refines the detector's features once
more for masks (image feature encoder), cuts them along each box, refines what is cut (box feature encoder), and takes
the product of the query that gave the box with each place of it. A second answer says how good the mask is, by which
the detector's score is multiplied.

No code was published and the paper's tables could not be checked: this is a RECONSTRUCTION, by what is known of the
paper, else by a student project that rebuilt it, else by choices of our own. docs/systems/mask-frozen-detr.md tells
which is which; there is no parity to claim. Published alone is the idea, its cost, and one number of the largest model.

Since the detector never changes, what it says of an image need be computed only once: see `cache`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.deformable_attention import DeformableEncoderLayer, cell_centres
from maskwright.blocks.layers import GroupNorm
from maskwright.blocks.positions import padding_of, sine_positions
from maskwright.blocks.transformer import CrossAttention, FeedForward, SelfAttention
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import assign
from maskwright.ops.paste import paste_masks
from maskwright.ops.points import box_points, grid_points, mask_sample, mask_uncertainty, point_sample, uncertain_points
from maskwright.ops.pooling import as_rois, roi_align
from maskwright.ops.query_boxes import Boxed, box_costs, shares
from maskwright.ops.query_losses import object_count, overlap_loss
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import names, system_class
from maskwright.systems.base import (
    Card,
    ClassRows,
    FrozenFeatures,
    FrozenLayout,
    Preset,
    QueryDetector,
    Score,
    System,
    at_least,
    weighed,
)

BUDGET = 1 << 30  # bytes that boxes take at once when masks are learnt; when they are found, a fraction of it
FINE = 4  # stride of the map that boxes are cut from
QUERY_PARTS = ("objects", "box", "feed_forward")


@dataclass(frozen=True)
class Raw:
    """What the frozen detector says, and what masks are made of."""

    boxes: Float[Tensor, "b n 4"]  # x0, y0, x1, y1 in pixels of the input
    scores: Float[Tensor, "b n k"]  # of each class
    queries: Float[Tensor, "b n c"]
    features: Float[Tensor, "b c h w"]  # stride 4
    detector: Any = None  # its own answer, where it learns too


class ImageEncoder(nn.Module):
    """The detector's memory, refined for masks and brought to stride 4, where the trunk's own level is added."""

    def __init__(self, layout: FrozenLayout, width: int, layers: int, hidden: int, heads: int, sampled: int):
        super().__init__()
        count = len(layout.strides)
        self.levels = nn.Parameter(torch.randn(count, layout.memory))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(layout.memory, hidden, heads, count, sampled, activation="gelu")
            for _ in range(layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(layout.fine, layout.memory, 1, bias=False),
            GroupNorm(math.gcd(8, layout.memory), layout.memory),
        )
        self.mapper = nn.Conv2d(layout.memory, width, 1)

    def forward(
        self,
        memory: Sequence[Float[Tensor, "b d _h _w"]],
        fine: Float[Tensor, "b e p q"],
        valid: Int[Tensor, "b 2"],
        size: tuple[int, int],
    ) -> Float[Tensor, "b c p q"]:
        shapes = [(m.shape[2], m.shape[3]) for m in memory]
        paddings = [padding_of(valid, size, shape) for shape in shapes]
        tokens = torch.cat([m.flatten(2).mT for m in memory], 1)  # (B, S, D)
        codes, centres, ratios = [], [], []
        for shape, padding, level in zip(shapes, paddings, self.levels, strict=True):
            code = sine_positions(shape, tokens.shape[2] // 2, padding=padding, shift=-0.5, device=tokens.device)
            codes.append(code.flatten(2).mT.to(tokens.dtype) + level)
            filled = torch.stack([(~padding[:, 0]).sum(1) / shape[1], (~padding[:, :, 0]).sum(1) / shape[0]], -1)
            ratios.append(filled)  # (B, 2), x and y
            centres.append(cell_centres([shape], tokens.device) / filled[:, None])
        references = torch.cat(centres, 1)[:, :, None] * torch.stack(ratios, 1)[:, None]  # (B, S, L, 2)
        everywhere, positions = torch.cat([p.flatten(1) for p in paddings], 1), torch.cat(codes, 1)
        for layer in self.layers:
            tokens = layer(tokens, positions, references, shapes, everywhere)
        finest = tokens[:, : shapes[0][0] * shapes[0][1]].mT.unflatten(2, shapes[0])
        grid = (fine.shape[2], fine.shape[3])
        # Padding is made zero, so that what it holds has no part in the neck's norm.
        own = self.neck(fine.masked_fill(padding_of(valid, size, grid)[:, None], 0.0))
        return self.mapper(own + functional.interpolate(finest, size=grid, mode="bilinear", align_corners=False))


class BoxNetwork(nn.Module):
    """From what is cut along a box, and the box's query, to a mask and how good it is."""

    def __init__(
        self, width: int, layers: int, hidden: int, heads: int, sampled: int, side: int, parts: Sequence[str],
        score_width: int | None,
    ):  # fmt: skip
        super().__init__()
        self.side = side
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(width, hidden, heads, 1, sampled, activation="gelu") for _ in range(layers)
        )
        self.look = CrossAttention(width, heads) if "box" in parts else None
        self.feed_forward = FeedForward(width, hidden, activation="gelu") if "feed_forward" in parts else None
        self.convs = self.score = None
        if score_width is not None:
            reads, strides = (width + 1, width, width, width), (1, 1, 2, 2)
            self.convs = nn.ModuleList(
                nn.Conv2d(c, width, 3, stride, 1) for c, stride in zip(reads, strides, strict=True)
            )
            cells = math.ceil(math.ceil(side / 2) / 2) ** 2
            self.score = nn.Sequential(
                nn.Linear(width * cells, score_width), nn.ReLU(), nn.Linear(score_width, score_width), nn.ReLU(),
                nn.Linear(score_width, 1),
            )  # fmt: skip

    def forward(
        self, crops: Float[Tensor, "r c s s"], queries: Float[Tensor, "r c"]
    ) -> tuple[Float[Tensor, "r s s"], Float[Tensor, " r"]]:
        """Logits of the masks; their quality, the overlap that they will have (ones, where nothing learns it)."""
        width, grid = crops.shape[1], (self.side, self.side)
        x = crops.flatten(2).mT  # (R, s s, C)
        code = sine_positions(grid, width // 2, shift=-0.5, device=x.device).flatten(2).mT.to(x.dtype)  # (1, s s, C)
        references = cell_centres([grid], x.device, x.dtype)[None, :, None]
        for layer in self.layers:
            x = layer(x, code, references, [grid])
        if self.look is not None:
            queries = self.look(queries[:, None], x, x + code)[:, 0]
        if self.feed_forward is not None:
            queries = self.feed_forward(queries[:, None])[:, 0]
        logits = (x @ queries[:, :, None])[..., 0].unflatten(1, grid).float()
        if self.convs is None or self.score is None:
            return logits, torch.ones_like(logits[:, 0, 0])
        # The mask is what is judged: it does not learn from being judged.
        y = torch.cat([logits.detach().sigmoid()[:, None].to(x.dtype), x.mT.unflatten(2, grid)], 1)
        for conv in self.convs:
            y = functional.relu(conv(y))
        return logits, self.score(y.flatten(1))[:, 0].float()


class FeatureCache:
    """Frozen features of images, by a hash of their bytes. Once it holds `budget` bytes, what is in it stays and
    nothing more is taken in: an epoch comes by all images before it comes back to the first."""

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.entries: dict[bytes, FrozenFeatures] = {}
        self.hits = self.misses = 0
        self.state: object = None  # of the network that they come from

    def __deepcopy__(self, memo: Any) -> FeatureCache:
        return FeatureCache(self.budget)

    def __getstate__(self) -> dict[str, Any]:
        return vars(FeatureCache(self.budget))

    def clear(self) -> None:
        self.__init__(self.budget)

    def serve(self, state: object) -> None:
        """Forget all features that come from another state of the network than this."""
        if state != self.state:
            self.clear()
            self.state = state

    @staticmethod
    def key(image: Float[Tensor, "c h w"]) -> bytes:
        """Of the numbers that the network would read, and their arrangement."""
        raw = image.detach().cpu().contiguous()
        return hashlib.blake2b(raw.view(torch.uint8).numpy().data, key=str(tuple(raw.shape)).encode()).digest()

    def get(self, key: bytes, device: torch.device) -> FrozenFeatures | None:
        found = self.entries.get(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return None if found is None else _moved(found, device)

    def put(self, key: bytes, features: FrozenFeatures) -> None:
        size = sum(t.numel() * t.element_size() for t in _tensors(features))
        if self.used + size <= self.budget:
            self.entries[key] = _moved(features, torch.device("cpu"))
            self.used += size


class MaskFrozenDETR(System):
    """See the module's text. `decode` takes `score_threshold` and `detections`."""

    name = "mask-frozen-detr"
    card = Card(
        title="Mask Frozen-DETR",
        paper="Liang, Yuan: Mask Frozen-DETR: High Quality Instance Segmentation with One GPU. 2023",
        arxiv="2308.03747",
        code="none published",
        code_licence="none published; a reconstruction",
    )
    sees_padding = True

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        detector: str = "h-detr",
        detector_options: Mapping[str, Any] | None = None,
        joint: bool = False,
        in_channels: int = 3,
        width: int = 128,
        image_layers: int = 2,
        box_layers: int = 2,
        hidden: int = 1024,
        heads: int = 8,
        sampled: int = 4,
        side: int = 32,
        aligned: bool = True,
        query_parts: Sequence[str] = (),
        scoring: bool = True,
        score_width: int = 1024,
        points: int = 1024,
        candidates: float = 3.0,
        important: float = 0.75,
        cost: Sequence[float] = (2.0, 5.0, 2.0),
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        cache: float = 0,
    ):
        """
        detector, detector_options
                        the system that finds boxes ("h-detr", "detr"), and its constructor's options besides `classes`
                        and `in_channels`. Its weights come from a file of its own when training begins
        joint           the detector learns too: against the idea, but then it all can begin with random weights
        width           of the mask network, behind the channel mapper
        image_layers, box_layers, hidden, heads, sampled
                        deformable layers of the image and box feature encoders, their feed-forward width, heads, and
                        points per head and level
        side            boxes are cut to side x side cells
        aligned         how: see `ops.pooling.roi_align`
        query_parts     what refines a query before the product: "objects" (it looks at the image's other queries),
                        "box" (at what is cut along its box), "feed_forward"
        scoring, score_width
                        whether the quality of masks is learnt, and the width of the two layers that say it
        points, candidates, important
                        masks learn at so many points, as in PointRend: `candidates` times as many are drawn and the
                        least sure of them are a share `important`
        cost            of class, box (L1) and GIoU in matching the detector's boxes with objects
        weights         of the losses mask (cross entropy), dice and score
        cache           MB of the host's memory for what the detector says of images, in training. Images of which
                        the network reads the same numbers again hit it: with a fixed size, mirrored or not, each is
                        computed twice in a whole training; with random sizes or crops hardly any does
        """
        super().__init__()
        options = dict(detector_options or {})
        kind = _detector(detector)
        for name in ("classes", "in_channels"):
            if name in options:
                raise UsageError(f"mask-frozen-detr: detector_options holds {name}; give it to the system itself")
        unknown = [part for part in query_parts if part not in QUERY_PARTS]
        if unknown:
            raise UsageError(f"query_parts holds {unknown[0]!r}; expected some of {', '.join(QUERY_PARTS)}")
        at_least("mask-frozen-detr", 1, width=width, heads=heads, hidden=hidden, sampled=sampled)
        at_least("mask-frozen-detr", 1, score_width=score_width)
        at_least("mask-frozen-detr", 0, image_layers=image_layers, box_layers=box_layers, cache=cache)
        if side < 4 or points < 1:
            raise UsageError(f"side is {side} and points {points}; expected at least 4 and 1")
        if not 0 <= important <= 1 or candidates < 1:
            raise UsageError(
                f"important is {important} and candidates {candidates}; expected a share from 0 to 1, and at least 1"
            )
        self.classes = tuple(classes)
        self.detector = kind(classes=self.classes, **options, in_channels=in_channels)
        layout = self.detector.frozen_layout()
        for name, value in (("width", width), ("the detector's width", layout.memory)):
            if value % 4 or value % heads:
                raise UsageError(f"{name} is {value}; expected a multiple of 4 and of the {heads} heads")
        self.joint, self.side, self.aligned = joint, side, aligned
        self.points, self.candidates, self.important = points, candidates, important
        self.cost = weighed("mask-frozen-detr", "cost", cost, ("class", "box", "giou"))
        self.weights = weighed("mask-frozen-detr", "weights", weights, ("mask", "dice", "score"))
        self.image_encoder = ImageEncoder(layout, width, image_layers, hidden, heads, sampled)
        self.query_mapper = nn.Linear(layout.queries, width)
        self.query_attention = SelfAttention(width, heads) if "objects" in query_parts else None
        self.box_network = BoxNetwork(
            width, box_layers, hidden, heads, sampled, side, query_parts, score_width if scoring else None
        )
        # Bytes that a box takes in the box network, with what the backward pass needs.
        self._row = 4 * side * side * (max(1, box_layers) * (3 * hidden + 24 * width) + 16 * width)
        self.preprocess = self.detector.preprocess
        self.cache = FeatureCache(int(cache * 1e6)) if cache > 0 and not joint else None
        if not joint:
            self.detector.requires_grad_(False)
            self.detector.eval()

    def train(self, mode: bool = True) -> Self:
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        if not self.joint:
            self.detector.eval()
        return self

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        size = (images.shape[2], images.shape[3])
        if valid is None:
            valid = torch.tensor([size], device=images.device).expand(len(images), -1)
        answer = None
        if self.joint:
            answer, frozen = self._ask(images, valid)
        elif self.training and self.cache is not None:
            frozen = self._remembered(images, valid)
        else:
            with torch.no_grad():
                frozen = self._ask(images, valid)[1]
        features = self.image_encoder(frozen.memory, frozen.fine, valid, size)
        queries = self.query_mapper(frozen.queries)
        if self.query_attention is not None:
            queries = self.query_attention(queries)
        return Raw(frozen.boxes.detach().float(), frozen.scores.detach().float(), queries, features, answer)

    def _ask(self, images: Tensor, valid: Tensor) -> tuple[Any, FrozenFeatures]:
        raw = self.detector(images, valid) if self.detector.sees_padding else self.detector(images)
        return raw, self.detector.frozen_features(raw, valid)

    @torch.no_grad()
    def _remembered(self, images: Tensor, valid: Tensor) -> FrozenFeatures:
        """The same of each image without its padding, computed by itself where the cache does not hold it."""
        assert self.cache is not None
        self.cache.serve(self._detector_state(images.device))
        parts: list[FrozenFeatures] = []
        for padded, (height, width) in zip(images, valid.tolist(), strict=True):
            image = padded[:, :height, :width]
            key = self.cache.key(image)
            found = self.cache.get(key, images.device)
            if found is None:
                found = self._ask(image[None].contiguous(), valid.new_tensor([[height, width]]))[1]
                self.cache.put(key, found)
            parts.append(found)
        size, strides = (images.shape[2], images.shape[3]), self.detector.frozen_layout().strides
        levels = [
            torch.cat([_widened(p.memory[level], size, stride) for p in parts]) for level, stride in enumerate(strides)
        ]
        rows = max(p.boxes.shape[1] for p in parts)  # a small image may have fewer tokens than there are queries
        boxes, scores, queries = (
            torch.cat([functional.pad(table, (0, 0, 0, rows - table.shape[1])) for table in column])
            for column in zip(*((p.boxes, p.scores, p.queries) for p in parts), strict=True)
        )
        fine = torch.cat([_widened(p.fine, size, FINE) for p in parts])
        return FrozenFeatures(boxes, scores, queries, tuple(levels), fine)

    def _detector_state(self, device: torch.device) -> tuple[Any, ...]:
        """What is another one as soon as the detector may say something else of the same image: its weights being
        loaded, moved or written to, wherever that is done from, or another precision."""
        # Several processes may copy buffers to each other before every step, which counts as writing but is none.
        weights = tuple(
            (p.data_ptr(), p.dtype, None if p.is_inference() else p._version) for p in self.detector.parameters()
        )
        buffers = tuple((b.data_ptr(), b.dtype) for b in self.detector.buffers())
        kind = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return weights, buffers, kind

    def masks_of(
        self, raw: Raw, image: int, boxes: Float[Tensor, "r 4"], rows: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r s s"], Float[Tensor, " r"]]:
        """Logits inside `boxes` (in pixels of the input) of these queries of one image, and how good they will be."""
        features = raw.features[image, None]
        # In float32, since bfloat16 would move boxes by pixels.
        crops = roi_align(features.float(), as_rois([boxes]), self.side, 1 / FINE, aligned=self.aligned)
        return self.box_network(crops.to(features.dtype), raw.queries[image][rows])

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`mask`, `dice` and `score`, of the boxes that are matched with an object; with `joint` the detector's own
        besides, as `detector_...`. Targets are in the frame of the input; crowd regions are not learnt from."""
        device = raw.boxes.device
        with torch.autocast(device.type, enabled=False):
            objects = [self._objects(target, device) for target in targets]
            pairs = assign(self.costs(raw, objects))
            count = object_count(objects, device)
        total = torch.zeros(3, device=device)
        for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
            step = max(1, BUDGET // self._row)
            parts = queries[0].split(step)
            for rows, owners in zip(parts, which[0].split(step), strict=True):
                if len(rows):
                    arguments = (raw, image, rows, own, owners)
                    # Where it is much, nothing is kept for the backward pass: it makes the masks again.
                    total = total + (
                        checkpoint(self._pair_terms, *arguments, use_reentrant=False)
                        if len(parts) > 1
                        else self._pair_terms(*arguments)
                    )
        idle = sum((p.float().sum() for p in self.parameters() if p.requires_grad), torch.zeros((), device=device)) * 0
        sums = total / count + idle
        result = {n: w * s for n, w, s in zip(("mask", "dice", "score"), self.weights, sums.unbind(), strict=True)}
        if not self.box_network.score:
            del result["score"]
        if self.joint:
            result |= {f"detector_{n}": value for n, value in self.detector.losses(raw.detector, targets).items()}
        return result

    def _objects(self, target: Instances, device: torch.device) -> Boxed:
        if target.masks is None and len(target):
            raise UsageError("mask-frozen-detr: targets have boxes but no masks, and masks are all that it learns")
        return Boxed.of(target, device)

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[Boxed]) -> list[Float[Tensor, "1 n _m"]]:
        """What it costs each query of the detector to answer for each object."""
        table = []
        for scores, boxes, own in zip(raw.scores, raw.boxes, objects, strict=True):
            apart = box_costs(shares(boxes, own.masks.size)[None], own.boxes, self.cost[1], self.cost[2])
            table.append(apart - self.cost[0] * scores[:, own.labels])
        return table

    def _pair_terms(self, raw: Raw, image: int, rows: Tensor, own: Boxed, owners: Tensor) -> Float[Tensor, " 3"]:
        """Sums over these queries and the objects that they answer for, inside the queries' boxes."""
        boxes = box_ops.clip(raw.boxes[image][rows], own.masks.size)
        logits, quality = self.masks_of(raw, image, boxes, rows)
        with torch.autocast(logits.device.type, enabled=False):
            points = uncertain_points(
                logits.detach()[:, None], self.points, mask_uncertainty, candidates=self.candidates,
                important=self.important,
            )  # fmt: skip
            read = point_sample(logits[:, None], points)[:, 0]
            truth = mask_sample(own.masks, box_points(boxes, points), owners)
            cross = functional.binary_cross_entropy_with_logits(read, truth, reduction="none").mean(1)
            overlap = overlap_loss(read.sigmoid(), truth)
            error = (quality - self._overlaps(logits.detach(), boxes, own.masks, owners)).square()
            return torch.stack([cross.sum(), overlap.sum(), error.sum()])

    @torch.no_grad()
    def _overlaps(
        self, logits: Float[Tensor, "r s s"], boxes: Float[Tensor, "r 4"], masks: Masks, owners: Int[Tensor, " r"]
    ) -> Float[Tensor, " r"]:
        """IoU of each mask with its object, also with what of that lies outside the box."""
        places = box_points(boxes, grid_points(len(boxes), self.side, self.side, boxes.device))
        truth, said = mask_sample(masks, places, owners), (logits > 0).flatten(1).float()
        cell = box_ops.area(boxes) / self.side**2
        both, mine = (said * truth).sum(1) * cell, said.sum(1) * cell
        whole = masks.areas().to(boxes)[owners]
        return (both / (mine + whole - both).clamp(min=1.0)).clamp(0, 1)

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """The detector's best pairs of query and class, each with its query's mask; scored by both."""
        best, which = raw.scores.flatten(1).topk(min(detections, raw.scores[0].numel()), dim=1)
        kinds = raw.scores.shape[2]
        found = []
        for image, placement in enumerate(placements):
            wanted = (best[image] >= score_threshold) & (best[image] > 0)  # what comes can only lower a score
            scores, place = best[image][wanted], which[image][wanted]
            rows, which_row = place.div(kinds, rounding_mode="floor").unique(return_inverse=True)
            boxes = box_ops.clip(raw.boxes[image][rows], placement.size)
            masks, quality = self._masks(raw, image, boxes, rows, placement)
            scores = scores * quality.clamp(0, 1)[which_row]
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] >= score_threshold]
            chosen = which_row[order]
            outer = box_ops.clip(placement.boxes_to_image(boxes), placement.image_size)[chosen]
            found.append(
                Instances(placement.image_size, outer, place[order] % kinds, masks[chosen.to("cpu")], scores[order])
            )
        return found

    def _masks(
        self, raw: Raw, image: int, boxes: Tensor, rows: Tensor, placement: Placement
    ) -> tuple[Masks, Float[Tensor, " r"]]:
        """On the image, some boxes at a time."""
        masks, quality = [Masks.empty(placement.image_size)], [boxes.new_zeros(0)]
        step = max(1, 2 * BUDGET // self._row)  # without a backward pass a box takes a sixth
        for part, own in zip(boxes.split(step), rows.split(step), strict=True):
            if len(own):
                logits, good = self.masks_of(raw, image, part, own)
                grids = logits.sigmoid().flip(2) if placement.mirrored else logits.sigmoid()
                masks.append(paste_masks(grids, placement.boxes_to_image(part), placement.image_size))
                quality.append(good)
        return Masks.join(masks), torch.cat(quality)

    # ---- for loading and training --------------------------------------------------------------------------------

    @classmethod
    def adopt(cls, loaded: System, **options: Any) -> Self:
        """The mask network of these options, untrained, on a finished detector."""
        if not isinstance(loaded, QueryDetector):
            raise UsageError(
                f"the weights hold a {loaded.name}; mask-frozen-detr stands on a detector of queries, that is "
                f"{' or '.join(_detectors())}, or goes on from a file of its own"
            )
        for name in ("classes", "detector", "detector_options", "in_channels"):
            if name in options:
                raise UsageError(f"{name} is what the detector's file says it is ({loaded.name}); leave it out")
        own = {k: v for k, v in loaded.options.items() if k not in ("classes", "in_channels")}
        given = {"classes": loaded.classes, "in_channels": loaded.options["in_channels"], "detector": loaded.name}
        system = cls.rebuild({**given, "detector_options": own, **options})
        system.detector.load_state_dict(loaded.state_dict())
        system.preprocess, system.source = loaded.preprocess, loaded.source
        return system

    @classmethod
    def rebuild(cls, options: Mapping[str, Any]) -> Self:
        own = options.get("detector_options") or {}
        if not own.get("pretrained"):
            return cls(**options)
        system = cls(**{**options, "detector_options": {**own, "pretrained": False}})
        system.options["detector_options"] = {**system.options["detector_options"], "pretrained": own["pretrained"]}
        return system

    def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        if self.cache is not None:
            self.cache.clear()
        return super().load_state_dict(*arguments, **keywords)

    def on_progress(self, done: float) -> None:
        if done == 0 and not self.joint:
            self.detector.warn_if_random("mask-frozen-detr", "joint=True")

    def groups(self) -> dict[str, list[nn.Module]]:
        parts = self.detector.groups()
        rest = [module for name, modules in parts.items() if name != "backbone" for module in modules]
        queries = [self.query_mapper, *([] if self.query_attention is None else [self.query_attention])]
        return {
            "backbone": parts["backbone"], "detector": rest, "masks": [self.image_encoder, *queries, self.box_network],
        }  # fmt: skip

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return {f"detector.{name}": rows for name, rows in self.detector.class_rows().items()}

    def input_weight(self) -> str | None:
        name = self.detector.input_weight()
        return None if name is None else f"detector.{name}"

    _LIGHT: ClassVar[dict[str, Any]] = {
        "width": 64, "image_layers": 1, "box_layers": 1, "hidden": 256, "side": 16, "score_width": 256, "points": 256,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask-frozen-detr-r50": Preset(
            {"detector_options": {"norm": "frozen", "frozen": 2}},
            note="on H-DETR R50; the paper's 55.3 on COCO test-dev is of a larger detector",
        ),
        "mask-frozen-detr-swin-large": Preset(
            {"detector_options": {"backbone": "swin-large", "queries": 900}},
            (Score(55.3, "mask AP", "COCO test-dev", "abstract; of the best of its detectors, not said which"),),
        ),
        "mask-frozen-detr-light": Preset(
            _LIGHT, note="a light mask network, for a detector of yours: give its file as weights"
        ),
        "mask-frozen-detr-small": Preset(
            {
                **_LIGHT, "joint": True,
                "detector_options": {
                    "backbone": "resnet18", "width": 128, "hidden": 512, "levels": 3, "encoder_layers": 2,
                    "decoder_layers": 3, "queries": 50, "many_queries": 150, "short": 320, "long": 512,
                },
            },
            note="for a few hundred images and no GPU, from random weights: detector and masks learn at once",
        ),
    }  # fmt: skip
    # From memory, but for the epochs.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mask-frozen-detr-6ep": {
            "optimizer": "adamw", "lr": 1e-4, "weight_decay": 5e-5, "clip": 0.1, "epochs": 6, "warmup": 0,
            "milestones": (5 / 6, 17 / 18), "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (1024, 1024)},
        },
    }  # fmt: skip


def _detector(name: str) -> type[QueryDetector]:
    kind = system_class(name)
    if not issubclass(kind, QueryDetector):
        raise UsageError(
            f"detector is {name!r}, which gives no boxes with queries; expected {' or '.join(_detectors())}"
        )
    return kind


def _detectors() -> list[str]:
    return [name for name in names() if name != MaskFrozenDETR.name and issubclass(system_class(name), QueryDetector)]


def _tensors(features: FrozenFeatures) -> list[Tensor]:
    return [features.boxes, features.scores, features.queries, *features.memory, features.fine]


def _moved(features: FrozenFeatures, device: torch.device) -> FrozenFeatures:
    boxes, scores, queries, *memory, fine = (t.detach().to(device) for t in _tensors(features))
    return FrozenFeatures(boxes, scores, queries, tuple(memory), fine)


def _widened(level: Float[Tensor, "1 d h w"], size: tuple[int, int], stride: int) -> Float[Tensor, "1 d _h _w"]:
    """With zeros to the right and below, up to what an image of `size` would have."""
    height, width = (-(-length // stride) for length in size)
    return functional.pad(level, (0, width - level.shape[3], 0, height - level.shape[2]))
