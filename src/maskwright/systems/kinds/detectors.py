"""Detectors of queries: each query predicts a class and a box. Other systems may be trained on their features."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.systems.system import System

# ---- option groups ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer(OptionGroup):
    """The encoder and decoder of a detector of queries, as options of a system.

    Attributes:
        width: Channels of everything after the backbone, a multiple of 4 and of `heads`.
        heads: Attention heads.
        hidden: Width inside the feed-forward layers.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        queries: Number of queries.
        dropout: Dropout of attention and feed-forward layers.
    """

    label: ClassVar[str] = "transformer"

    width: int = 256
    heads: int = 8
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 100
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "width", "heads", "hidden", "decoder_layers", "queries")
        self.check_at_least(0, "encoder_layers")
        if self.width % 4 or self.width % self.heads:
            raise UsageError(
                f"{self.label}.width must be a multiple of 4 and of {self.label}.heads ({self.heads}), got {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.label}.dropout must be at least 0 and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class BoxCost(OptionGroup):
    """The cost of matching a query with an object, as options of a system (DETR, arXiv 2005.12872, section 3.1).

    Attributes:
        class_weight: Weight of the class.
        box_weight: Weight of the L1 distance of the boxes.
        giou_weight: Weight of their generalised IoU.
    """

    label: ClassVar[str] = "cost"

    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "class_weight", "box_weight", "giou_weight")


@dataclass(frozen=True)
class BoxLoss(BoxCost):
    """The loss of queries with boxes, as options of a system.

    Attributes:
        class_weight: Weight of the class loss.
        box_weight: Weight of the L1 distance of the boxes.
        giou_weight: Weight of 1 - their generalised IoU.
    """

    label: ClassVar[str] = "loss"


def named_weights(options: Mapping[str, Any], lists: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """Converts lists of weights, in options of an earlier version, to groups of named weights.

    Args:
        options: Options as a file holds them.
        lists: For the name of each list, the group and the fields that its entries became.

    Returns:
        The options, groups first.
    """
    rest, groups = dict(options), dict[str, Any]()
    for name, (group, fields) in lists.items():
        if isinstance(rest.get(name), Sequence):
            groups[group] = dict(zip(fields, rest.pop(name), strict=True))
    return {**groups, **rest}


# ---- the kind --------------------------------------------------------------------------------------------------------


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
        module: Any = self  # the method is not typed
        module.register_load_state_dict_post_hook(_mark_loaded)

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
