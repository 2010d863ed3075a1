"""The contract of every system: networks, losses, decoding, and what it gives and needs."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskwright.errors import RenamedOptionWarning, UsageError
from maskwright.options import groups_of, merged, resolve
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.card import Ablation, Card, Preset

Output = Literal["boxes", "masks", "keypoints"]
Task = Literal["instances", "panoptic", "semantic", "proposals", "prompts", "video"]


class ClassRows(NamedTuple):
    """Where a parameter keeps its rows for each class, so that a head can be fitted to other classes by name.

    The axis is laid out as `before` entries of no class, then `repeats` x (classes [+ background]) x `per_class`.

    Attributes:
        axis: Axis of the parameter.
        per_class: Neighbouring rows of one class: 4 for boxes predicted per class.
        background_last: Whether an entry for background follows the classes.
        repeats: How often the list of classes is repeated: anchors per location.
        before: Leading entries of no class.
        first: Number of class rows at the front that keep their place whatever the classes are called, because they
            mean something else too (an object of any class).
        kind: The classes that have rows: all, or only those that are things or stuff, in their order among all.
    """

    axis: int = 0
    per_class: int = 1
    background_last: bool = False
    repeats: int = 1
    before: int = 0
    first: int = 0
    kind: Literal["all", "things", "stuff"] = "all"


class System(nn.Module):
    """A published method: networks with learned parameters, and arithmetic between and after them.

    A subclass sets `name`, `card` and `presets`, constructs its networks as direct submodules, and implements `losses`
    and `decode`. The typed keyword arguments of its constructor are the whole configuration; they are kept, with
    defaults, in `options` as JSON values. Every constructor takes `classes` and sets `self.classes` and
    `self.preprocess`.

    Every learned parameter belongs to exactly one network, that is, to one direct submodule, whose call takes tensors
    and returns tensors (or tuples or dataclasses of tensors). `losses` and `decode` call these networks and otherwise
    compute without parameters. Compiling, exporting, quantising and timing therefore work per network, for every
    system.

    Attributes:
        name: Name in the registry.
        card: The publication.
        presets: Published variants by name.
        recipes: Published training schedules: name to the fields of `training.Recipe` that differ from the defaults (16
            images, SGD 0.02, momentum 0.9, weight decay 1e-4, steps at 2/3 and 8/9, 1000 steps of warm-up).
        ablations: Tables of the paper by a short name.
        sees_padding: Whether `forward` takes a second tensor, (B, 2): height and width of the part of each image that
            is not padding. Needed where positions or attention depend on where an image ends.
        shown_score: Objects that score less are not drawn or answered, unless a threshold is given; `predict` of
            Python returns all that the system decodes.
        optional_networks: Prefixes of parameter names that loading may leave random if the options passed to it ask for
            them and the file has none, such as a mask head on top of a box detector.
        renamed_options: Options of earlier versions: old name to new name, dotted for a field of a group; None for one
            that no longer exists. Files that hold them are converted; `create`, `load`, `train` and the command line
            accept them with a warning; the constructor refuses them, with the new name.
        renamed_parameters: Prefixes of parameter names in files of earlier versions, to today's.
        options: The constructor's arguments as JSON values.
        classes: Class names; label k is `classes[k]`.
        preprocess: From an image to the network's input.
        source: Origin, file and licences of the weights; set by loading.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    presets: ClassVar[Mapping[str, Preset]] = {}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ablations: ClassVar[Mapping[str, Ablation]] = {}
    sees_padding: ClassVar[bool] = False
    shown_score: ClassVar[float] = 0.5
    optional_networks: ClassVar[tuple[str, ...]] = ()
    renamed_options: ClassVar[Mapping[str, str | None]] = {}
    renamed_parameters: ClassVar[Mapping[str, str]] = {}

    options: dict[str, Any]
    classes: tuple[str, ...]
    preprocess: Preprocess
    source: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        self = super().__new__(cls)
        known = inspect.signature(cls.__init__).parameters
        for name in keywords:
            new = cls.renamed_options.get(name, COMMON_RENAMES.get(name, name))
            if name not in known and new != name and (new is None or new.partition(".")[0] in known):
                hint = "it no longer exists" if new is None else f"it is now {new}"
                raise UsageError(f"{cls.name} has no option {name!r}: {hint}")
        try:
            given = inspect.signature(cls.__init__).bind_partial(self, *args, **keywords).arguments
        except TypeError:
            given = {"self": self, **keywords}
        self.__dict__["options"] = resolve(cls.__init__, {k: v for k, v in given.items() if k != "self"}, cls.name)
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), dict(self.options)  # copying and unpickling call __new__ too

    @classmethod
    def rebuild(cls, options: Mapping[str, Any]) -> Self:
        """Constructs the system for weights that follow at once: no `pretrained` weights are downloaded for it."""
        given: Any = options.get("backbone")
        before: Mapping[str, Any] = cast(Mapping[str, Any], given) if isinstance(given, Mapping) else {}
        if not before.get("pretrained"):
            return cls(**options)
        system = cls(**{**options, "backbone": {**before, "pretrained": False}})
        system.options["backbone"] = {**system.options["backbone"], "pretrained": before["pretrained"]}
        return system

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Converts options that an earlier version wrote into a file to today's names and groups."""
        from maskwright.blocks.backbones import options_of

        parameters, result = inspect.signature(cls.__init__).parameters, dict[str, Any]()
        groups = groups_of(cls.__init__)
        for name, value in options.items():
            new = name if name in parameters else cls.renamed_options.get(name, COMMON_RENAMES.get(name, name))
            if new is None:
                continue
            group, _, field = new.partition(".")
            if group in groups and not field and isinstance(value, str):
                field = groups[group].shorthand or ""
            if field:
                own = result.setdefault(group, {})
                if value is not None or field not in own:
                    own[field] = value
            else:
                result[group] = value
        found: Any = result.get("backbone")
        own = cast(dict[str, Any], found) if isinstance(found, dict) else {}
        name = own.get("name")
        if "backbone" in groups and isinstance(name, str):
            used = options_of(name)  # earlier versions kept fields that a family ignores
            if name.startswith("swin-") and "stem_width" in options:
                own["width"] = options.get("swin_width")
            result["backbone"] = {k: v for k, v in own.items() if k == "name" or k in used}
        return result

    @classmethod
    def with_options(cls, base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merges options, groups field by field; `changes` take precedence.

        Names of earlier versions in `changes` are accepted with a `RenamedOptionWarning`.
        """
        groups, known = groups_of(cls.__init__), inspect.signature(cls.__init__).parameters
        earlier = {name: new for name in changes if name not in known and (new := cls._renamed(name)) is not None}
        result = merged(base, {name: value for name, value in changes.items() if name not in earlier}, groups)
        for name, new in earlier.items():
            warnings.warn(f"{cls.name}: option {name!r} is now {new}", RenamedOptionWarning, stacklevel=3)
            group, _, field = new.partition(".")
            result = merged(result, {group: {field: changes[name]} if field else changes[name]}, groups)
        return result

    @classmethod
    def _renamed(cls, name: str) -> str | None:
        """Today's name of an option of an earlier version; None if there is none."""
        new = cls.renamed_options.get(name, COMMON_RENAMES.get(name))
        known = inspect.signature(cls.__init__).parameters
        return new if new is not None and new.partition(".")[0] in known else None

    @classmethod
    def adopt(cls, loaded: System, preset: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """A system built on a loaded one of another kind, for training on top of it.

        Args:
            loaded: The finished system.
            preset: Options of a preset; those that `loaded` determines are ignored.
            **options: Options of this constructor.

        Raises:
            UsageError: Most systems are not built on others.
        """
        raise UsageError(f"the weights are those of {loaded.name}, not of {cls.name}")

    # ---- capabilities ------------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> frozenset[Output]:
        """What `decode` predicts for each object."""
        return frozenset({"boxes", "masks"})

    @property
    def needs(self) -> frozenset[Output]:
        """What targets must have besides boxes; checked once, before training."""
        return self.outputs - {"boxes"}

    @property
    def tasks(self) -> frozenset[Task]:
        """What the system can be used for."""
        return frozenset({"instances"})

    # ---- the verbs ---------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, in the order of the data. Every learned parameter belongs to exactly one of them."""
        return {name: child for name, child in self.named_children() if any(True for _ in child.parameters())}

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        """Computes the raw output: what the network predicts at every location.

        Args:
            images: Normalised and padded images.

        Returns:
            A frozen dataclass of tensors, tuples of tensors, and integers.
        """

    def inputs(self, images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """The arguments of `forward` for images that fill `sizes` (height, width) of their planes."""
        if not self.sees_padding:
            return (images,)
        return images, torch.tensor([list(size) for size in sizes], dtype=torch.int64).reshape(-1, 2).to(images.device)

    @abstractmethod
    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the terms of the loss.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input.

        Returns:
            Scalars by name; their sum is minimised. Every trainable parameter has a gradient (possibly zero) whatever
            the targets, so that an image without objects on one of several devices does not block the others.
        """

    @abstractmethod
    def decode(self, raw: Any, placements: Sequence[Placement]) -> list[Instances]:
        """Converts the raw output to objects.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.

        Returns:
            The objects of each image, best first, on the image's own pixel grid. Thresholds are further keywords.
        """

    def on_progress(self, done: float) -> None:
        """Called before every training step with the completed share of the run, 0 ... 1; for annealing."""

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        """Parts by name, from the input on, for freezing and for learning rates: at least "backbone".

        By default these are the networks, and the children of a network that has a backbone.
        """
        parts: dict[str, list[nn.Module]] = {}
        for name, network in self.networks().items():
            children = dict(network.named_children())
            if "backbone" not in children or next(network.parameters(recurse=False), None) is not None:
                children = {name: network}
            for part, module in children.items():
                parts.setdefault(part, []).append(module)
        return parts

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        """The parameters that hold rows per class, by their name in the state dict, for `load(..., classes=...)`."""
        return {}

    def input_weight(self) -> str | None:
        """The name of the weight that reads the image, whose axis 1 is the image's channels; None if there is none."""
        from maskwright.blocks.backbones import first_weight  # imports torchvision, which is slow

        modules = cast("Iterator[tuple[str, nn.Module]]", self.named_modules())  # not annotated in torch
        for prefix, module in modules:
            if prefix.rpartition(".")[2] == "backbone":
                name = first_weight(module)
                return None if name is None else f"{prefix}.{name}"
        return None

    def predict(self, source: Any, **options: Any) -> Any:
        """Predicts objects in an image, several, a folder or a glob: see `maskwright.predict`."""
        from maskwright.inference import predict  # the one upward import: so that load(...).predict(...) reads well

        return cast("Any", predict(self, source, **options))  # only the call decides which overload applies


# Options that every system had under other names before they became groups.
COMMON_RENAMES: Mapping[str, str | None] = {
    "pretrained": "backbone.pretrained",
    "stem_width": "backbone.width",
    "norm": "backbone.norm",
    "norm_eps": "backbone.norm_eps",
    "frozen": "backbone.frozen",
    "groups": "backbone.groups",
    "group_width": "backbone.group_width",
    "stride_in": "backbone.stride_in",
    "deform_stages": "backbone.deform_stages",
    "deform_modulated": "backbone.deform_modulated",
    "deform_every": "backbone.deform_every",
    "swin_width": "backbone.width",
    "swin_depths": "backbone.depths",
    "swin_heads": "backbone.heads",
    "window": "backbone.window",
    "drop_path": "backbone.drop_path",
    "short": "resize.short",
    "long": "resize.long",
    "canvas": "resize.canvas",
    "mean": "resize.mean",
    "std": "resize.std",
}


def at_least(system: str, least: int, **options: float) -> None:
    """Raises a UsageError for the first option that is less than `least`."""
    for name, value in options.items():
        if not value >= least:
            raise UsageError(f"{system}: {name} must be at least {least}, got {value}")


def loss_weights(system: str, option: str, values: Sequence[float], terms: Sequence[str]) -> tuple[float, ...]:
    """`values` as a tuple; UsageError unless there is one finite number that is not negative for each of `terms`."""
    if len(values) != len(terms) or not all(math.isfinite(v) and v >= 0 for v in values):
        raise UsageError(
            f"{system}: {option} must be {len(terms)} numbers of at least 0 ({', '.join(terms)}), got {list(values)}"
        )
    return tuple(values)


OUTPUTS: tuple[str, ...] = get_args(Output)
TASKS: tuple[str, ...] = get_args(Task)
