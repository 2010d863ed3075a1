"""Systems of mask queries: each query predicts a class, or "no object", and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.ops import queries as query_ops
from maskwright.ops import query_losses as learning
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.kinds.panoptic import PanopticSystem

# ---- option groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueryDecoder(OptionGroup):
    """The transformer decoder of mask queries, as options of a system.

    Attributes:
        width: Channels of everything after the backbone.
        heads: Attention heads; `width` must be a multiple of 4 * `heads`.
        queries: Number of queries.
        layers: Number of decoder layers.
        hidden: Width inside the feed-forward layers.
        dropout: Dropout of attention and feed-forward layers.
    """

    label: ClassVar[str] = "decoder"

    width: int = 256
    heads: int = 8
    queries: int = 100
    layers: int = 6
    hidden: int = 2048
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "width", "heads", "queries", "layers", "hidden")
        if self.width % (4 * self.heads):
            raise UsageError(
                f"decoder.width must be a multiple of 4 * decoder.heads, that is of {4 * self.heads}, got {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"decoder.dropout must be at least 0 and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class MaskLoss(OptionGroup):
    """The loss of mask queries, as options of a system. The weights are those of the matching costs too.

    Attributes:
        class_weight: Weight of the class loss.
        mask_weight: Weight of the loss per pixel (focal loss or binary cross entropy).
        dice_weight: Weight of the dice loss.
        no_object: Weight of "no object" in the class loss.
    """

    label: ClassVar[str] = "loss"

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "class_weight", "mask_weight", "dice_weight", "no_object")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of the terms class, mask and dice."""
        return self.class_weight, self.mask_weight, self.dice_weight


@dataclass(frozen=True)
class PointLoss(MaskLoss):
    """The loss of mask queries that compares masks at random points, as options of a system.

    Attributes:
        points: Points per mask.
        candidates: For the losses, `candidates * points` points are drawn, of which the most uncertain are kept.
        important: Share of the points chosen in this way; the others are uniform.
    """

    points: int = 12544
    candidates: float = 3.0
    important: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "points", "candidates")
        if not 0 <= self.important <= 1:
            raise UsageError(f"loss.important must be in [0, 1], got {self.important}")

    @property
    def sampling(self) -> learning.PointSampling:
        """The points as the losses take them."""
        return learning.PointSampling(self.points, self.candidates, self.important)


# ---- queries with masks ----------------------------------------------------------------------------------------------


@runtime_checkable
class MaskQueries(Interface):
    """What `QuerySystem` reads of a raw output.

    Attributes:
        classes: Class logits of each prediction, (predictions, B, N, K + 1), of which the last prediction is decoded
            and the last class is "no object".
        size: Height and width of the network's input, padding included.
    """

    @property
    def classes(self) -> Tensor: ...

    @property
    def size(self) -> tuple[int, int]: ...

    def masks_of(self, image: int, queries: Tensor) -> Tensor:
        """Mask logits (R, h, w) of R queries of one image, on a grid that covers the input."""
        ...


class QuerySystem(PanopticSystem):
    """A system whose queries each predict a class, or "no object", and a mask (MaskFormer and its successors).

    Attributes:
        inside: Whether a panoptic segment is what its query wins inside the query's own mask (Mask2Former), or all that
            its query wins (MaskFormer).
        classes_first: How `decode_semantic` resizes, see `ops.queries.semantic_labels`.
    """

    inside: ClassVar[bool] = True
    classes_first: bool = False

    @torch.no_grad()
    def decode(
        self,
        raw: MaskQueries,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float | None = None,
        detections: int = 100,
        best_class: bool = False,
        max_overlap: float | None = None,
    ) -> list[Instances]:
        """Converts the raw output to objects by Mask2Former's rule. The score is the class probability times the mean
        mask probability inside the mask. As published, no duplicates are removed.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of the score.
            nms_threshold: Overlap (IoU) above which the lower scored of two masks of one class is dropped.
            detections: Number of (query, class) pairs that are considered.
            best_class: Let a query become an object of its best class only.
            max_overlap: Share of a mask that may be lost to better objects, see `ops.queries.Selection`.

        Returns:
            The objects of each image, best first, things only.
        """
        selection = query_ops.Selection(detections, score_threshold, best_class, nms_threshold, max_overlap)
        things = self.thing_classes(raw.classes.device) if self.stuff else None
        return [
            query_ops.select_instances(own[:, :-1], masks_of, placement, raw.size, selection, things)
            for own, masks_of, placement in _each(raw, placements)
        ]

    @torch.no_grad()
    def decode_panoptic(
        self,
        raw: MaskQueries,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
    ) -> list[Panoptic]:
        """Divides each image into segments.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of a query's class probability.
            overlap_threshold: A segment is dropped if it wins less than this share of its mask.

        Returns:
            The segments of each image.
        """
        things = self.thing_classes(raw.classes.device)
        return [
            query_ops.select_segments(
                own, masks_of, placement, raw.size, things, score_threshold=score_threshold,
                overlap_threshold=overlap_threshold, inside=self.inside,
            )
            for own, masks_of, placement in _each(raw, placements)
        ]  # fmt: skip

    @torch.no_grad()
    def decode_semantic(self, raw: MaskQueries, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """Labels each pixel with the class of the largest sum over the queries of class x mask probability.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.

        Returns:
            The labels of each image, on its own grid.
        """
        return [
            query_ops.semantic_labels(own[:, :-1], masks_of, placement, raw.size, classes_first=self.classes_first)
            for own, masks_of, placement in _each(raw, placements)
        ]


def _each(raw: MaskQueries, placements: Sequence[Placement]) -> list[tuple[Tensor, query_ops.MaskLogits, Placement]]:
    """For each image the class probabilities of its queries, the function that computes their masks, and placement."""
    probabilities = raw.classes[-1].float().softmax(-1)
    return [
        (own, partial(raw.masks_of, image), placement)
        for image, (own, placement) in enumerate(zip(probabilities, placements, strict=True))
    ]
