"""Mask Frozen-DETR: High Quality Instance Segmentation with One GPU (Liang, Yuan, 2023, arXiv 2308.03747).

A trained detector of queries is kept frozen: backbone, encoder, decoder and heads. Only a light mask network is
trained, which predicts one mask inside each box of the detector. It refines the detector's features for masks (image
feature encoder), crops them along each box, refines the crops (box feature encoder), and takes the product of the
query that predicted the box with each cell of the crop. A second head predicts the quality of the mask, which the
detector's score is multiplied by.

No code was published and the tables of the paper could not be checked. This is a RECONSTRUCTION from what is known of
the paper, from a student project that rebuilt it, and from choices of our own; docs/systems/mask-frozen-detr.md lists
which is which. Parity cannot be claimed: only the idea, its cost, and one figure of the largest model are published.

The networks are in `blocks/box_masks.py`. Since the detector never changes, its output for an image has to be computed
only once: see the option `cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.blocks.box_masks import ImageEncoder, MaskNetwork, QueryEncoder, QueryPart
from maskwright.blocks.positions import padding_of
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.assignment import assign
from maskwright.ops.paste import paste_masks
from maskwright.ops.points import box_points, grid_points, mask_sample, mask_uncertainty, point_sample, uncertain_points
from maskwright.ops.pooling import as_rois, roi_align
from maskwright.ops.query_boxes import BoxTargets, box_costs, relative_boxes
from maskwright.ops.query_losses import object_count, overlap_loss
from maskwright.options import OptionGroup, plain
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import names, system_class
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.detr import DETR
from maskwright.systems.h_detr import HDETR
from maskwright.systems.kinds.detectors import (
    BoxCost,
    FrozenFeatures,
    QueryDetector,
    named_weights,
)
from maskwright.systems.kinds.feature_cache import FeatureCache
from maskwright.systems.system import ClassRows, System, at_least

BUDGET = 1 << 30  # bytes of the boxes that are processed at once in training; in inference they take a fraction of it
STRIDE = 4  # of the feature map that boxes are cropped from


@dataclass(frozen=True)
class MaskFrozenLoss(OptionGroup):
    """The loss of Mask Frozen-DETR, as options.

    Attributes:
        mask_weight: Weight of the binary cross entropy.
        dice_weight: Weight of the dice loss.
        score_weight: Weight of the squared error of the masks' quality.
        points: Points at which each mask is compared with its object, as in PointRend.
        candidates: `candidates * points` points are drawn, of which the most uncertain are kept.
        important: Share of the points chosen in this way; the others are uniform.
    """

    label: ClassVar[str] = "loss"

    mask_weight: float = 1.0
    dice_weight: float = 1.0
    score_weight: float = 1.0
    points: int = 1024
    candidates: float = 3.0
    important: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "mask_weight", "dice_weight", "score_weight")
        self.check_at_least(1, "points", "candidates")
        if not 0 <= self.important <= 1:
            raise UsageError(f"loss.important must be in [0, 1], got {self.important}")


COST, LOSS = BoxCost(2.0, 5.0, 2.0), MaskFrozenLoss()


@dataclass(frozen=True)
class Raw:
    """The raw output: the detector's predictions, and what masks are computed from.

    Attributes:
        boxes: x0, y0, x1, y1 in pixels of the input.
        scores: Score of each class.
        queries: Refined queries.
        features: Refined feature map of stride 4.
        detector: The detector's own raw output, if it is trained too.
    """

    boxes: Float[Tensor, "b n 4"]
    scores: Float[Tensor, "b n k"]
    queries: Float[Tensor, "b n c"]
    features: Float[Tensor, "b c h w"]
    detector: Any = None


class MaskFrozenDETR(System):
    """Masks for the boxes of a frozen detector; see the module's docstring.

    Networks: those of the detector, as "detector.NAME"; "image_encoder"; "query_encoder"; "masks" (`MaskNetwork`),
    which is called per image for chosen boxes.
    """

    name = "mask-frozen-detr"
    card = Card(
        title="Mask Frozen-DETR",
        paper="Liang, Yuan: Mask Frozen-DETR: High Quality Instance Segmentation with One GPU. 2023",
        arxiv="2308.03747",
        code="none published",
        code_licence="none published; a reconstruction",
    )
    sees_padding = True
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        "points": "loss.points", "candidates": "loss.candidates", "important": "loss.important", "weights": "loss",
    }  # fmt: skip
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **{
            f"detector.{old}": f"detector.{new}"
            for kind in (DETR, HDETR) for old, new in kind.renamed_parameters.items()
        },
        "query_mapper.": "query_encoder.mapper.",
        "query_attention.": "query_encoder.attention.",
        "box_network.look.": "masks.box_attention.",
        "box_network.": "masks.",
    }  # fmt: skip

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
        query_parts: Sequence[QueryPart] = (),
        scoring: bool = True,
        score_width: int = 1024,
        cost: Mapping[str, Any] | BoxCost = COST,
        loss: Mapping[str, Any] | MaskFrozenLoss = LOSS,
        cache: float = 0,
    ):
        """Constructs the system with random weights.

        Args:
            classes: Names of the classes.
            detector: The system that predicts boxes: "h-detr" or "detr". Its weights come from a file of its own when
                training starts.
            detector_options: Options of its constructor, without `classes` and `in_channels`.
            joint: Train the detector too. This is not the idea of the paper, but can start from random weights.
            in_channels: Channels of the image.
            width: Channels of the mask network, a multiple of 4 and of `heads`.
            image_layers: Deformable layers of the image feature encoder.
            box_layers: Deformable layers of the box feature encoder.
            hidden: Width inside their feed-forward parts.
            heads: Attention heads.
            sampled: Sampling locations of each head on each level.
            side: Boxes are cropped to side x side cells.
            aligned: Whether crops are aligned with the pixels, see `ops.pooling.roi_align`.
            query_parts: What refines a query before the product: "objects" (attention to the other queries of the
                image), "box" (attention to its crop), "feed_forward".
            scoring: Whether the quality of masks is predicted.
            score_width: Width of the two layers that predict it.
            cost: Weights of class, box and GIoU in matching the detector's boxes with objects.
            loss: Weights of the loss terms, and the points at which masks are compared.
            cache: Host memory for the detector's features in training, in MB. An image is found in the cache if the
                network reads exactly the same values again: with a fixed size, mirrored or not, each image is computed
                twice in a whole training; with random sizes or crops hardly any is found.
        """
        super().__init__()
        options = dict(detector_options or {})
        kind = _detector(detector)
        for name in ("classes", "in_channels"):
            if name in options:
                raise UsageError(f"mask-frozen-detr: detector_options must not have {name}; pass it to the system")
        at_least("mask-frozen-detr", 1, width=width, heads=heads, hidden=hidden, sampled=sampled)
        at_least("mask-frozen-detr", 1, score_width=score_width)
        at_least("mask-frozen-detr", 4, side=side)
        at_least("mask-frozen-detr", 0, image_layers=image_layers, box_layers=box_layers, cache=cache)
        self.classes = tuple(classes)
        self.detector = kind(classes=self.classes, **options, in_channels=in_channels)
        self.options["detector_options"] = _without_shared(self.detector.options)
        layout = self.detector.frozen_layout()
        for name, value in (("width", width), ("the width of the detector", layout.memory)):
            if value % 4 or value % heads:
                raise UsageError(
                    f"mask-frozen-detr: {name} must be a multiple of 4 and of heads ({heads}), got {value}"
                )
        self.joint, self.side, self.aligned, self.scoring = joint, side, aligned, scoring
        self.cost, self.loss = BoxCost.read(cost, COST), MaskFrozenLoss.read(loss, LOSS)
        self.image_encoder = ImageEncoder(
            layout.memory, layout.fine, len(layout.strides), width, image_layers, hidden, heads, sampled
        )
        self.query_encoder = QueryEncoder(layout.queries, width, heads, "objects" in query_parts)
        self.masks = MaskNetwork(
            width, box_layers, hidden, heads, sampled, side, query_parts, score_width if scoring else None
        )
        # Memory of one box in the mask network, including what the backward pass needs.
        self._bytes_per_box = 4 * side * side * (max(1, box_layers) * (3 * hidden + 24 * width) + 16 * width)
        self.preprocess = self.detector.preprocess
        self.cache = FeatureCache(int(cache * 1e6)) if cache > 0 and not joint else None
        if not joint:
            self.detector.requires_grad_(False)
            self.detector.eval()

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode; a frozen detector stays in evaluation mode."""
        super().train(mode)
        if not self.joint:
            self.detector.eval()
        return self

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name: those of the detector as "detector.NAME", then those of this system.

        The base class would return the detector as one network. It is a system of its own, of which `losses` may call a
        network alone (the mask head of DETR, if the detector is trained too), so that each of them is listed.
        """
        own = super().networks()
        del own["detector"]
        return {f"detector.{name}": network for name, network in self.detector.networks().items()} | own

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"], valid: Int[Tensor, "b 2"] | None = None) -> Raw:
        size = (images.shape[2], images.shape[3])
        if valid is None:
            valid = torch.tensor([size], device=images.device).expand(images.shape[0], -1)
        detector_raw = None
        if self.joint:
            detector_raw, frozen = self._detect(images, valid)
        elif self.training and self.cache is not None:
            frozen = self._cached(self.cache, images, valid)
        else:
            with torch.no_grad():
                frozen = self._detect(images, valid)[1]
        # The size of the input does not follow from those of the levels, where it is no multiple of their strides.
        paddings = [
            padding_of(valid, size, (level.shape[2], level.shape[3])) for level in (*frozen.memory, frozen.fine)
        ]
        features = self.image_encoder(frozen.memory, frozen.fine, paddings)
        queries = self.query_encoder(frozen.queries)
        return Raw(frozen.boxes.detach().float(), frozen.scores.detach().float(), queries, features, detector_raw)

    def _detect(self, images: Tensor, valid: Tensor) -> tuple[Any, FrozenFeatures]:
        """The detector's raw output, and what is used of it."""
        raw = self.detector(images, valid) if self.detector.sees_padding else self.detector(images)
        return raw, self.detector.frozen_features(raw, valid)

    @torch.no_grad()
    def _cached(self, cache: FeatureCache, images: Tensor, valid: Tensor) -> FrozenFeatures:
        """The features of a batch; what the cache does not hold is computed image by image, without padding."""
        cache.validate(self._detector_state(images.device))
        parts: list[FrozenFeatures] = []
        for padded, (height, width) in zip(images, valid.tolist(), strict=True):
            image = padded[:, :height, :width]
            key = cache.key(image)
            features = cache.get(key, images.device)
            if features is None:
                features = self._detect(image[None].contiguous(), valid.new_tensor([[height, width]]))[1]
                cache.put(key, features)
            parts.append(features)
        size, strides = (images.shape[2], images.shape[3]), self.detector.frozen_layout().strides
        levels = [
            torch.cat([_padded(p.memory[level], size, stride) for p in parts]) for level, stride in enumerate(strides)
        ]
        rows = max(p.boxes.shape[1] for p in parts)  # a small image may have fewer tokens than there are queries
        boxes, scores, queries = (
            torch.cat([functional.pad(table, (0, 0, 0, rows - table.shape[1])) for table in column])
            for column in zip(*((p.boxes, p.scores, p.queries) for p in parts), strict=True)
        )
        fine = torch.cat([_padded(p.fine, size, STRIDE) for p in parts])
        return FrozenFeatures(boxes, scores, queries, tuple(levels), fine)

    def _detector_state(self, device: torch.device) -> tuple[Any, ...]:
        """A value that changes whenever the detector's output for the same image may: if its weights are loaded, moved
        or written to in any way, or the precision changes."""
        # Several processes may copy buffers to each other before every step, which counts as writing but changes
        # nothing; versions of buffers are therefore left out.
        weights = tuple(
            (p.data_ptr(), p.dtype, None if p.is_inference() else p._version) for p in self.detector.parameters()
        )
        buffers = tuple((b.data_ptr(), b.dtype) for b in self.detector.buffers())
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return weights, buffers, autocast

    def masks_of(
        self, raw: Raw, image: int, boxes: Float[Tensor, "r 4"], rows: Int[Tensor, " r"]
    ) -> tuple[Float[Tensor, "r s s"], Float[Tensor, " r"]]:
        """Mask logits inside `boxes` (pixels of the input), and quality, of the queries `rows` of one image."""
        features = raw.features[image, None]
        # In float32, since bfloat16 would move boxes by pixels.
        crops = roi_align(features.float(), as_rois([boxes]), self.side, 1 / STRIDE, aligned=self.aligned)
        return self.masks(crops.to(features.dtype), raw.queries[image][rows])

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input. Crowd regions are ignored.

        Returns:
            `mask`, `dice` and `score` of the boxes that are matched with an object; with `joint` also the detector's
            terms as `detector_...`.
        """
        device = raw.boxes.device
        with torch.autocast(device.type, enabled=False):
            objects = [BoxTargets.from_instances(target, device) for target in targets]
            pairs = assign(self.costs(raw, objects))
            count = object_count(objects, device)
        total = torch.zeros(3, device=device)
        for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
            if not queries.shape[1]:
                continue
            step, masks = max(1, BUDGET // self._bytes_per_box), own.required_masks()
            parts = queries[0].split(step)
            for rows, matched in zip(parts, which[0].split(step), strict=True):
                arguments = (raw, image, rows, masks, matched)
                # With several parts, nothing is kept for the backward pass: masks are computed again.
                total = total + (
                    checkpoint(self._pair_terms, *arguments, use_reentrant=False)
                    if len(parts) > 1
                    else self._pair_terms(*arguments)
                )
        if not any(queries.shape[1] for queries, _ in pairs):  # a gradient of zero for the mask network
            logits, quality = self.masks_of(raw, 0, raw.boxes[0, :1], torch.zeros(1, dtype=torch.int64, device=device))
            total = total + 0 * (logits.sum() + quality.sum())
        sums = total / count
        weights = (self.loss.mask_weight, self.loss.dice_weight, self.loss.score_weight)
        result = {n: w * s for n, w, s in zip(("mask", "dice", "score"), weights, sums.unbind(), strict=True)}
        if not self.scoring:
            del result["score"]
        if self.joint:
            result |= {f"detector_{n}": value for n, value in self.detector.losses(raw.detector, targets).items()}
        return result

    @torch.no_grad()
    def costs(self, raw: Raw, objects: Sequence[BoxTargets]) -> list[Float[Tensor, "1 n _m"]]:
        """Costs of matching each query of the detector with each object of its image."""
        table = []
        for scores, boxes, own in zip(raw.scores, raw.boxes, objects, strict=True):
            predicted = relative_boxes(boxes, own.size)[None]
            of_boxes = box_costs(predicted, own.boxes, self.cost.box_weight, self.cost.giou_weight)
            table.append(of_boxes - self.cost.class_weight * scores[:, own.labels])
        return table

    def _pair_terms(self, raw: Raw, image: int, rows: Tensor, masks: Masks, matched: Tensor) -> Float[Tensor, " 3"]:
        """Sums over the queries `rows` and the objects matched with them, inside the queries' boxes."""
        boxes = box_ops.clip(raw.boxes[image][rows], masks.size)
        logits, quality = self.masks_of(raw, image, boxes, rows)
        with torch.autocast(logits.device.type, enabled=False):
            points = uncertain_points(
                logits.detach()[:, None], self.loss.points, mask_uncertainty, candidates=self.loss.candidates,
                important=self.loss.important,
            )  # fmt: skip
            predicted = point_sample(logits[:, None], points)[:, 0]
            truth = mask_sample(masks, box_points(boxes, points), matched)
            cross = functional.binary_cross_entropy_with_logits(predicted, truth, reduction="none").mean(1)
            overlap = overlap_loss(predicted.sigmoid(), truth)
            error = (quality - self._overlaps(logits.detach(), boxes, masks, matched)).square()
            return torch.stack([cross.sum(), overlap.sum(), error.sum()])

    @torch.no_grad()
    def _overlaps(
        self, logits: Float[Tensor, "r s s"], boxes: Float[Tensor, "r 4"], masks: Masks, matched: Int[Tensor, " r"]
    ) -> Float[Tensor, " r"]:
        """IoU of each mask with its whole object, including the part outside of the box."""
        places = box_points(boxes, grid_points(boxes.shape[0], self.side, self.side, boxes.device))
        truth, predicted = mask_sample(masks, places, matched), (logits > 0).flatten(1).float()
        cell = box_ops.area(boxes) / self.side**2
        intersection, area = (predicted * truth).sum(1) * cell, predicted.sum(1) * cell
        whole = masks.areas().to(boxes)[matched]
        return (intersection / (area + whole - intersection).clamp(min=1.0)).clamp(0, 1)

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self, raw: Raw, placements: Sequence[Placement], *, score_threshold: float = 0.0, detections: int = 100
    ) -> list[Instances]:
        """Converts the detector's best pairs of query and class to objects, each with the mask of its query.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Minimum score, the product of the detector's score and the quality of the mask.
            detections: Maximum number of objects per image.

        Returns:
            The objects of each image, best first.
        """
        best, which = raw.scores.flatten(1).topk(min(detections, raw.scores[0].numel()), dim=1)
        classes = raw.scores.shape[2]
        results = []
        for image, placement in enumerate(placements):
            wanted = (best[image] >= score_threshold) & (best[image] > 0)  # the quality can only lower a score
            scores, chosen = best[image][wanted], which[image][wanted]
            rows, row_of = chosen.div(classes, rounding_mode="floor").unique(return_inverse=True)
            boxes = box_ops.clip(raw.boxes[image][rows], placement.size)
            masks, quality = self._image_masks(raw, image, boxes, rows, placement)
            scores = scores * quality.clamp(0, 1)[row_of]
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] >= score_threshold]
            own = row_of[order]
            outer = box_ops.clip(placement.boxes_to_image(boxes), placement.image_size)[own]
            results.append(
                Instances(placement.image_size, outer, chosen[order] % classes, masks[own.to("cpu")], scores[order])
            )
        return results

    def _image_masks(
        self, raw: Raw, image: int, boxes: Tensor, rows: Tensor, placement: Placement
    ) -> tuple[Masks, Float[Tensor, " r"]]:
        """Masks on the image's pixel grid and their quality, some boxes at a time."""
        masks, quality = [Masks.empty(placement.image_size)], [boxes.new_zeros(0)]
        step = max(1, 2 * BUDGET // self._bytes_per_box)  # without a backward pass a box takes a sixth
        for part, own in zip(boxes.split(step), rows.split(step), strict=True):
            if len(own):
                logits, good = self.masks_of(raw, image, part, own)
                grids = logits.sigmoid().flip(2) if placement.mirrored else logits.sigmoid()
                masks.append(paste_masks(grids, placement.boxes_to_image(part), placement.image_size))
                quality.append(good)
        return Masks.join(masks), torch.cat(quality)

    # ---- loading and training ----------------------------------------------------------------------------------------

    @classmethod
    def adopt(cls, loaded: System, preset: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """Constructs the system with random weights on top of a trained detector.

        Args:
            loaded: The detector.
            preset: Options of a preset; those that the detector determines are ignored.
            **options: Options of this constructor, besides those that the detector determines.

        Raises:
            UsageError: If `loaded` is not a detector of queries, or an option contradicts it.
        """
        if not isinstance(loaded, QueryDetector):
            raise UsageError(
                f"the weights are those of {loaded.name}; mask-frozen-detr needs a detector of queries "
                f"({' or '.join(_detectors())}), or weights of its own"
            )
        determined = ("classes", "detector", "detector_options", "in_channels")
        for name in determined:
            if name in options:
                raise UsageError(f"{name} is determined by the weights of the detector ({loaded.name}); omit it")
        base = {name: value for name, value in (preset or {}).items() if name not in determined}
        given = {"classes": loaded.classes, "in_channels": loaded.options["in_channels"], "detector": loaded.name}
        own = {**given, "detector_options": _without_shared(loaded.options)}
        system = cls.rebuild({**cls.with_options(base, options), **own})
        system.detector.load_state_dict(loaded.state_dict())
        system.preprocess, system.source = loaded.preprocess, loaded.source
        return system

    @classmethod
    def rebuild(cls, options: Mapping[str, Any]) -> Self:
        own = plain(options.get("detector_options") or {})
        backbone = own.get("backbone")
        if not isinstance(backbone, dict) or not backbone.get("pretrained"):
            return cls(**options)
        system = cls(**{**options, "detector_options": {**own, "backbone": {**backbone, "pretrained": False}}})
        system.options["detector_options"]["backbone"]["pretrained"] = backbone["pretrained"]
        return system

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        lists = {
            "cost": ("cost", ("class_weight", "box_weight", "giou_weight")),
            "weights": ("loss", ("mask_weight", "dice_weight", "score_weight")),
        }
        result = super().upgraded(named_weights(options, lists))
        own = result.get("detector_options")
        if own:
            result["detector_options"] = _detector(result.get("detector", "h-detr")).upgraded(own)
        return result

    @classmethod
    def with_options(cls, base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merges options; those of the detector too, unless `changes` name another detector."""
        result = super().with_options(base, changes)
        name, before = result.get("detector", "h-detr"), base.get("detector_options") or {}
        if name != base.get("detector", "h-detr"):
            before = {}
        options = _detector(name).with_options(before, changes.get("detector_options") or {})
        result.pop("detector_options", None)
        return {**result, "detector_options": options} if options else result

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
        return {
            "backbone": parts["backbone"], "detector": rest,
            "masks": [self.image_encoder, self.query_encoder, self.masks],
        }  # fmt: skip

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        return {f"detector.{name}": rows for name, rows in self.detector.class_rows().items()}

    # ---- presets -----------------------------------------------------------------------------------------------------

    _LIGHT: ClassVar[dict[str, Any]] = {
        "width": 64, "image_layers": 1, "box_layers": 1, "hidden": 256, "side": 16, "score_width": 256,
        "loss": {"points": 256},
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Preset]] = {
        "mask-frozen-detr-r50": Preset(
            {"detector_options": {"backbone": {"name": "resnet50", "norm": "frozen", "frozen": 2}}},
            note="on H-DETR R50; the paper's 55.3 on COCO test-dev is that of a larger detector",
        ),
        "mask-frozen-detr-swin-large": Preset(
            {"detector_options": {"backbone": "swin-large", "transformer": {"queries": 900}}},
            (Score(55.3, "mask AP", "COCO test-dev", "abstract; of the best of its detectors, which is not named"),),
        ),
        "mask-frozen-detr-light": Preset(
            _LIGHT, note="a light mask network, for a detector of yours: pass its file as weights"
        ),
        "mask-frozen-detr-small": Preset(
            {
                **_LIGHT, "joint": True,
                "detector_options": {
                    "backbone": "resnet18", "many_queries": 150, "resize": {"short": 320, "long": 512},
                    "transformer": {
                        "width": 128, "hidden": 512, "levels": 3, "encoder_layers": 2, "decoder_layers": 3,
                        "queries": 50,
                    },
                },
            },
            note="for a few hundred images and no GPU, from random weights: detector and masks are trained together",
        ),
    }  # fmt: skip
    # Except for the epochs, not verified against the paper.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mask-frozen-detr-6ep": {
            "optimizer": "adamw", "lr": 1e-4, "weight_decay": 5e-5, "clip": 0.1, "epochs": 6, "warmup": 0,
            "milestones": (5 / 6, 17 / 18), "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (1024, 1024)},
        },
    }  # fmt: skip


def _detector(name: str) -> type[QueryDetector]:
    """The class of the detector called `name`."""
    kind = system_class(name)
    if not issubclass(kind, QueryDetector):
        raise UsageError(f"mask-frozen-detr: detector must be {' or '.join(_detectors())}, got {name!r}")
    return kind


def _detectors() -> list[str]:
    """The names of all detectors of queries."""
    return [name for name in names() if name != MaskFrozenDETR.name and issubclass(system_class(name), QueryDetector)]


def _without_shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a detector without those that this system has itself."""
    return {name: value for name, value in plain(options).items() if name not in ("classes", "in_channels")}


def _padded(level: Float[Tensor, "1 d h w"], size: tuple[int, int], stride: int) -> Float[Tensor, "1 d _h _w"]:
    """The map with zeros to the right and below, up to the shape that an input of `size` has."""
    height, width = (-(-length // stride) for length in size)
    return functional.pad(level, (0, width - level.shape[3], 0, height - level.shape[2]))
