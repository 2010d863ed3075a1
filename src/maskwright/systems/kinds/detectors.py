"""Detectors of queries, on whose features another system may be trained."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from maskwright.systems.system import System


class FrozenLayout(NamedTuple):
    """Channels and strides of `FrozenFeatures`.

    Attributes:
        queries: Channels of the queries.
        memory: Channels of the memory.
        strides: Strides of the memory's levels, finest first, in pixels of the input.
        fine: Channels of the backbone's feature map of stride 4.
    """

    queries: int
    memory: int
    strides: tuple[int, ...]
    fine: int


class FrozenFeatures(NamedTuple):
    """The predictions and features of a detector for a batch, for networks that are trained on top of it.

    Attributes:
        boxes: x0, y0, x1, y1 in pixels of the input, not clipped.
        scores: Score of each class, 0 where the detector's `decode` would discard it.
        queries: Queries after the last decoder layer.
        memory: Levels of the encoder's output, finest first.
        fine: The backbone's feature map of stride 4.
    """

    boxes: Float[Tensor, "b n 4"]
    scores: Float[Tensor, "b n k"]
    queries: Float[Tensor, "b n c"]
    memory: tuple[Float[Tensor, "b _d _h _w"], ...]
    fine: Float[Tensor, "b _e _p _q"]


class QueryDetector(System):
    """A detector whose queries predict one box each, on whose features another system may be trained.

    Attributes:
        loaded: Whether weights have been loaded since construction.
    """

    loaded: bool = False

    def __init__(self, **options: Any) -> None:  # the options are those of the subclasses
        super().__init__()
        self.register_load_state_dict_post_hook(_mark_loaded)

    def warn_if_random(self, name: str, instead: str) -> None:
        """Warns that the weights are random, at the start of a training that does not change them.

        Args:
            name: The system that is trained.
            instead: The option that trains the detector too.
        """
        if not self.loaded:
            warnings.warn(
                f"{name}: the detector is frozen and its weights are random, so its features carry no information; "
                f"start from the weights of a trained detector (weights=..., --weights), or train it too ({instead})",
                stacklevel=3,
            )

    @abstractmethod
    def frozen_layout(self) -> FrozenLayout:
        """Channels and strides of what `frozen_features` returns."""

    @abstractmethod
    def frozen_features(self, raw: Any, valid: Int[Tensor, "b 2"]) -> FrozenFeatures:
        """Selects the predictions that `decode` reads and the features they were made from, without parameters.

        Args:
            raw: What `forward` returned.
            valid: Height and width of the part of each image that is not padding.

        Returns:
            Predictions and features; the maps cover the input including padding, one cell per `stride` pixels begun.
        """


def _mark_loaded(detector: QueryDetector, keys: Any) -> None:
    detector.loaded = True
