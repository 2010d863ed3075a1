"""What every system is: three verbs, and what is known about it."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, runtime_checkable
from typing import Protocol as Interface

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from maskwright.errors import UsageError
from maskwright.ops import queries as query_ops
from maskwright.structures import Instances, Panoptic, Placement, Preprocess
from maskwright.systems.options import check_options


@dataclass(frozen=True)
class Score:
    """A published number and the protocol it was measured by."""

    value: float
    what: str  # "mask AP", "box AP", "keypoint AP"
    protocol: str  # "COCO val2017, short side 800, pycocotools"
    source: str


@dataclass(frozen=True)
class Preset:
    """A published variant: the constructor's arguments, and what its authors reached with it."""

    options: Mapping[str, Any]
    published: tuple[Score, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Ablation:
    """A table of a paper as a list of variants, to be rerun on small data by `maskwright ablate`.

    title      what is compared, and which table it is
    variants   the rows: name -> options of the constructor that make it, on top of `base`
    published  the same rows as published: name -> {"AP": ..., "AP50": ..., ...}
    protocol   what the published numbers were measured on
    base       options that all variants share
    scenes     arguments of `data.Scenes`: what the images must hold for the difference to show
    recipe     fields of `training.Recipe` on top of the budget
    """

    title: str
    variants: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Mapping[str, float]]
    protocol: str
    base: Mapping[str, Any]
    scenes: Mapping[str, Any]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """What is known about a system."""

    title: str
    paper: str
    arxiv: str
    code: str  # where the original lives
    code_licence: str  # SPDX where there is one


class ClassRows(NamedTuple):
    """Where a parameter keeps its rows for each class, so that a head can be fitted to other classes by name.

    The axis is laid out as `before` entries that are no class's, then `repeats` x (classes [+ background]) x
    `per_class`.
    """

    axis: int = 0
    per_class: int = 1  # neighbouring rows of one class: 4 for boxes of their own per class
    background_last: bool = False  # one more entry after the classes
    repeats: int = 1  # how often the list of classes comes: anchors per place
    before: int = 0
    # So many of the classes' rows, at the front, stay where they are whatever the classes are called: they mean
    # something besides (an object of any class).
    first: int = 0


class System(nn.Module):
    """A published method. Subclasses give `name`, `card`, `presets` and the three verbs; their constructor's typed
    keywords are the whole configuration and are kept, defaults included, in `options` (plain JSON values).

    Every constructor takes `classes` (names, label k is `classes[k]`); `preprocess` is set by the constructor.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    presets: ClassVar[Mapping[str, Preset]] = {}
    # Published ways of training it: name -> fields of `training.Recipe` that differ from its published defaults (16
    # images, SGD 0.02, momentum 0.9, weight decay 1e-4, steps at 2/3 and 8/9, 1000 steps of warm-up).
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ablations: ClassVar[Mapping[str, Ablation]] = {}  # tables of the paper, by a short name

    # Whether `forward` takes a second tensor, (B, 2): height and width of what is not padding in each image; left
    # out, nothing is padding. Few need it: those whose positions or attention depend on where an image ends.
    sees_padding: ClassVar[bool] = False
    # Beginnings of parameters' names: parts that loading may leave random where the options passed to it ask for them
    # and the file has nothing of them, as a mask head on top of a box model.
    grows: ClassVar[tuple[str, ...]] = ()

    options: dict[str, Any]
    classes: tuple[str, ...]
    preprocess: Preprocess
    source: dict[str, Any] | None = None  # where its weights come from: origin, file, licences; set by loading

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **keywords)
        except TypeError as error:
            known = ", ".join(list(inspect.signature(cls.__init__).parameters)[1:])
            raise UsageError(f"{cls.name}: {error}; its options are {known}") from None
        bound.apply_defaults()
        options = {k: plain(v) for k, v in list(bound.arguments.items())[1:]}
        check_options(cls, options)
        self.__dict__["options"] = options
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), dict(self.options)  # copying and unpickling come through __new__ too, which wants the options

    @classmethod
    def rebuild(cls, options: Mapping[str, Any]) -> Self:
        """As `cls(**options)`, for weights that follow at once: nothing `pretrained` is fetched for it."""
        if not options.get("pretrained"):
            return cls(**options)
        system = cls(**{**options, "pretrained": False})
        system.options["pretrained"] = options["pretrained"]
        return system

    @classmethod
    def adopt(cls, loaded: System, **options: Any) -> Self:
        """A system of this kind that stands on `loaded`, one of another kind, for training with weights that are not
        its own. Few can: those that learn on top of a finished system. `options` are of this constructor."""
        raise UsageError(f"the weights hold a {loaded.name}, not a {cls.name}")

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        """Raw outputs, a frozen dataclass of tensors. No targets, no thresholds, no host sync: this is compiled."""

    def inputs(self, images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """What `forward` is called with for images that fill `sizes` (H, W) of their planes."""
        if not self.sees_padding:
            return (images,)
        return images, torch.tensor([list(size) for size in sizes], dtype=torch.int64).reshape(-1, 2).to(images.device)

    @abstractmethod
    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Named scalar terms whose sum is the objective. Every trainable parameter has a gradient (a zero one, if
        need be) whatever the targets, so that an empty image on one of several devices does not stall the others."""

    @abstractmethod
    def decode(self, raw: Any, placements: Sequence[Placement]) -> list[Instances]:
        """Finished objects, best first, on each image's own pixel grid. Thresholds are further keywords."""

    def on_progress(self, done: float) -> None:
        """Told before every step of training which share of the run is done, 0 ... 1: for whatever is annealed."""

    def groups(self) -> dict[str, list[nn.Module]]:
        """Parts by name, from the input on, for freezing and for learning rates: at least "backbone"."""
        return {name: [child] for name, child in self.named_children()}

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        """Parameters (by their name in the state dict) that hold rows per class, for `load(..., classes=...)`; several
        where more than one of a parameter's axes does."""
        return {}

    def input_weight(self) -> str | None:
        """The weight that reads the image, its axis 1 the image's channels; None if there is no single one."""
        from maskwright.blocks.trunk import first_weight  # brings torchvision, which is heavy to import

        trunk = getattr(self, "backbone", None)
        name = first_weight(trunk) if isinstance(trunk, nn.Module) else None
        return None if name is None else f"backbone.{name}"

    def predict(self, source: Any, **options: Any) -> Any:
        """Objects in an image, several, a folder or a glob: see `maskwright.predict`."""
        from maskwright.inference import predict  # the one upward import: so that load(...).predict(...) reads well

        return predict(self, source, **options)


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


class PanopticSystem(System):
    """A system whose segments can divide a whole image among objects (things) and regions (stuff).

    Its constructor takes `stuff` too: those of `classes` that are regions, none by default, which leaves a system of
    objects like any other. A target is an ordinary `Instances` over all classes, with one region per class of stuff.
    """

    stuff: tuple[str, ...]

    @abstractmethod
    def decode(self, raw: Any, placements: Sequence[Placement]) -> list[Instances]:
        """Finished objects as every system gives them: things alone, also where there is stuff."""

    @abstractmethod
    def decode_panoptic(self, raw: Any, placements: Sequence[Placement]) -> list[Panoptic]:
        """Each image divided among segments, by the rule the system was published with. Thresholds are further
        keywords: `score_threshold` (a segment's own score), `overlap_threshold` (the share of a segment's mask that
        must be left to it), where the system has them."""

    @abstractmethod
    def decode_semantic(self, raw: Any, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """The label of each pixel of each image, on its own grid; -1 where a system leaves pixels without one."""

    # Whether this one can: False where options leave out the part that does
    can_divide: bool = True

    def thing_classes(self, device: torch.device | str | None = None) -> Bool[Tensor, " k"]:
        """True for each class that is a countable object."""
        return torch.tensor([name not in self.stuff for name in self.classes], dtype=torch.bool, device=device)

    def checked_stuff(self, stuff: Sequence[str]) -> tuple[str, ...]:
        """`stuff` for the constructor, once `classes` is set; UsageError where one is no class."""
        unknown = [name for name in stuff if name not in self.classes]
        if unknown:
            raise UsageError(
                f"{self.name}: stuff names {', '.join(map(repr, unknown[:3]))}, which is not among the "
                f"{len(self.classes)} classes; stuff are those of `classes` that are regions, not countable objects"
            )
        return tuple(stuff)


class ProposalSystem(System):
    """A system that finds objects without saying what they are: proposals, all of one label.

    Its constructor takes `classes` as every other's, but that is a single name. It trains on data sets of any classes
    and is measured on them as if they had one; what it is for is average recall (`evaluate(..., task="proposals")`).
    """

    def checked_classes(self, classes: Sequence[str]) -> tuple[str, ...]:
        """`classes` for the constructor; UsageError where there is not exactly one."""
        if len(classes) != 1:
            raise UsageError(
                f"{self.name} finds objects of no class; classes is one name for all of them, here are {len(classes)}"
            )
        return tuple(classes)


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


def _mark_loaded(detector: QueryDetector, keys: Any) -> None:
    detector.loaded = True


def at_least(system: str, least: int, **options: float) -> None:
    """UsageError for the first option that is less than this."""
    for name, value in options.items():
        if not value >= least:
            raise UsageError(f"{system}: {name} is {value}; expected at least {least}")


def weighed(system: str, option: str, values: Sequence[float], terms: Sequence[str]) -> tuple[float, ...]:
    """`values`, of which there is one, finite and not below zero, for each of `terms`; else UsageError."""
    if len(values) != len(terms) or not all(math.isfinite(v) and v >= 0 for v in values):
        raise UsageError(
            f"{system}: {option} is {list(values)}; expected {len(terms)} numbers, none below 0: of {', '.join(terms)}"
        )
    return tuple(values)


def plain(value: Any) -> Any:
    """Tuples as lists, also inside others: what JSON gives back."""
    if isinstance(value, Mapping):
        return {key: plain(own) for key, own in value.items()}
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value
