"""Systems of queries: each query predicts a class, or "no object", and a mask or a box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol as Interface
from typing import runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from maskwright.ops import queries as query_ops
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.kinds.panoptic import PanopticSystem


@runtime_checkable
class MaskQueries(Interface):
    """What a system's queries say, and where their masks come from: see `QuerySystem`."""

    @property
    def classes(self) -> Tensor: ...

    @property
    def size(self) -> tuple[int, int]: ...

    def masks_of(self, image: int) -> Callable[[Tensor], Tensor]: ...


class QuerySystem(PanopticSystem):
    """A system whose queries each say a class, or "no object", and a mask (MaskFormer and what came after it).

    Its raw answer has `classes` (predictions, B, N, K + 1), of which the last prediction counts and the last column is
    "no object", `masks_of(image)`, which gives the mask logits of some queries, and `size` of the input.

    inside         segments are what a query wins of its own mask (Mask2Former), not all that it wins (MaskFormer)
    classes_first  how `decode_semantic` resizes: see `ops.queries.semantic`
    """

    inside: bool = True
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
        """By Mask2Former's rule, whose scores are class score x mean probability inside the mask.

        nms_threshold, best_class, max_overlap
            as published nothing is suppressed, and one query may be several objects of different classes. See
            `ops.queries.Choice` for three ways to leave duplicates out
        """
        choice = query_ops.Choice(detections, score_threshold, best_class, nms_threshold, max_overlap)
        things = self.thing_classes(raw.classes.device) if self.stuff else None
        return [
            query_ops.objects(own[:, :-1], masks_of, placement, raw.size, choice, things)
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
        """See `ops.queries.segments`."""
        things = self.thing_classes(raw.classes.device)
        return [
            query_ops.segments(
                own, masks_of, placement, raw.size, things, score_threshold=score_threshold,
                overlap_threshold=overlap_threshold, inside=self.inside,
            )
            for own, masks_of, placement in _each(raw, placements)
        ]  # fmt: skip

    @torch.no_grad()
    def decode_semantic(self, raw: MaskQueries, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """See `ops.queries.semantic`."""
        return [
            query_ops.semantic(own[:, :-1], masks_of, placement, raw.size, classes_first=self.classes_first)
            for own, masks_of, placement in _each(raw, placements)
        ]


def _each(
    raw: MaskQueries, placements: Sequence[Placement]
) -> list[tuple[Tensor, Callable[[Tensor], Tensor], Placement]]:
    """For each image: class probabilities of its queries, and what gives their masks."""
    probabilities = raw.classes[-1].float().softmax(-1)
    return [(own, raw.masks_of(b), p) for b, (own, p) in enumerate(zip(probabilities, placements, strict=True))]
