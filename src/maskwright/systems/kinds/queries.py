"""Systems of queries: each query predicts a class, or "no object", and a mask or a box."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskwright.ops import queries as query_ops
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.system import System


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


class FrozenLayout(NamedTuple):
    """What `QueryDetector.frozen_features` gives: channels, and strides of the levels of memory, finest first."""

    queries: int
    memory: int
    strides: tuple[int, ...]
    fine: int


class FrozenFeatures(NamedTuple):
    """What a detector of queries knows of a batch, for a network that learns on top of it.

    boxes    x0, y0, x1, y1 in pixels of the input, not clipped
    scores   of each class, zero where its own `decode` would not take it
    queries  of the last decoder layer
    memory   levels of the encoder's output, finest first
    fine     the backbone's level of stride 4
    """

    boxes: Float[Tensor, "b n 4"]
    scores: Float[Tensor, "b n k"]
    queries: Float[Tensor, "b n c"]
    memory: tuple[Float[Tensor, "b _d _h _w"], ...]
    fine: Float[Tensor, "b _e _p _q"]


class QueryDetector(System):
    """A system of queries with a box each, on whose features another may learn while it stays as it is."""

    loaded: bool = False  # whether it was given weights since it was made

    def __init__(self, **options: Any) -> None:  # options are those of the constructors below
        super().__init__()
        self.register_load_state_dict_post_hook(_mark_loaded)

    def warn_if_random(self, name: str, instead: str) -> None:
        """For the start of a training that leaves it as it is: a warning where nobody has given it weights."""
        if not self.loaded:
            warnings.warn(
                f"{name}: the detector is frozen and its weights are random, so that masks learn from noise; start "
                f"from the weights of a trained detector (weights=..., --weights), or let it learn too ({instead})",
                stacklevel=3,
            )

    @abstractmethod
    def frozen_layout(self) -> FrozenLayout:
        """How wide `frozen_features` are."""

    @abstractmethod
    def frozen_features(self, raw: Any, valid: Int[Tensor, "b 2"]) -> FrozenFeatures:
        """The same answers as `decode` reads, and the features behind them; `valid` is height and width of what is not
        padding in each image. Maps cover the input, padding included, a cell for each `stride` pixels begun."""


def _mark_loaded(detector: QueryDetector, keys: Any) -> None:
    detector.loaded = True
