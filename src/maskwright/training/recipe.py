"""Training recipes: all choices of a run as one frozen dataclass, and published recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, cast, get_type_hints

from maskwright.errors import UsageError
from maskwright.files import describe_os_error
from maskwright.options import check_option


@dataclass(frozen=True)
class Recipe:
    """All choices of a training run. The defaults are the recipe "small": a few hundred images, one device.

    A *step* is one update of the weights, from `batch * accumulate` images. Fractions are of the whole run, so that a
    recipe keeps its shape when the run is made shorter.
    """

    # how long, and how much at once
    epochs: int = 40  # passes over the data; not used if `steps` is given
    steps: int | None = None  # total steps, instead of epochs
    batch: int = 4  # images per forward and backward pass, over all devices
    accumulate: int = 1  # passes whose gradients are averaged into one step

    # optimizer
    optimizer: Literal["sgd", "adamw"] = "adamw"  # SGD with momentum, or AdamW
    lr: float = 2e-4  # learning rate at the end of the warm-up
    lr_per_image: float | None = None  # linear scaling rule: lr = this * batch * accumulate, instead of `lr`
    momentum: float = 0.9  # of SGD
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 0.05  # decoupled with AdamW, added to the gradient with SGD
    decay_norms: bool = False  # whether weight decay also applies to normalisation layers
    decay_biases: bool = False  # whether weight decay also applies to biases
    no_decay: tuple[str, ...] = ()  # parts or globs of parameter names to which it never applies
    # part (see System.groups) or glob of names -> factor on lr
    rates: dict[str, float] = field(default_factory=dict[str, float])
    clip: float | None = 1.0  # maximum norm of all gradients together

    # learning rate over the run
    schedule: Literal["constant", "steps", "cosine", "poly"] = "cosine"  # of the learning rate after warm-up
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # "steps": when the rate drops, as fractions of the run
    gamma: float = 0.1  # "steps": factor on the rate at each drop
    power: float = 0.9  # "poly": rate * (1 - t) ** power
    final: float = 0.01  # "cosine": factor on lr at the end
    warmup: int = 100  # steps of linear warm-up, at most a quarter of the run
    warmup_from: float = 0.01  # factor on lr at step 0

    # averaging and precision
    ema: float | None = 0.998  # decay of the running mean of the weights, which is evaluated and saved
    amp: Literal["no", "bf16"] = "no"  # bf16: automatic mixed precision, half the memory of activations
    channels_last: bool = False  # channels-last memory format: faster in bf16 on GPUs
    compile: bool = False  # torch.compile each network
    sync_norm: bool = False  # batch normalisation over all devices (needs GPUs)

    # what is trained
    freeze: tuple[str, ...] = ()  # parts (see System.groups) or globs of parameter names

    # images
    augment: dict[str, Any] = field(default_factory=lambda: {"flip": 0.5})  # options of data.Augment
    short: tuple[int, ...] = ()  # short sides to draw from; the largest for validation; (): the system's own
    long: int | None = None  # upper bound of the long side; None: the system's own
    balance: float | None = None  # repeat images of classes in less than this share of them (LVIS: 0.001); None: off
    workers: int = 2  # processes that read images, per device

    # validation
    val_every: int = 1  # epochs between validations; there is always one at the end
    val_max_images: int | None = None  # images to validate on, evenly spread over the set
    patience: int | None = None  # stop after this many validations without improvement

    # the machine
    seed: int = 0  # of initialisation, order, augmentation and sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # "auto", "cpu", "cuda", "mps"
    devices: int = 1  # processes per node, one per device; under torchrun its numbers apply
    nodes: int = 1  # machines

    # the run folder
    log_every: int = 20  # steps between lines of the log
    save_minutes: float = 10.0  # between saves of last.ckpt inside an epoch; 0 saves after every step
    tensorboard: bool = True  # also write TensorBoard's files
    jsonl: bool = False  # also write log.jsonl, one object per line of the log

    def __post_init__(self) -> None:
        for name in _hints():
            _check_value(name, getattr(self, name))
        for name in ("epochs", "batch", "accumulate", "val_every", "devices", "nodes", "log_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "val_max_images", "patience", "long"):
            value = getattr(self, name)
            self._expect(name, value is None or value >= 1, "at least 1 or None")
        for name in ("lr", "lr_per_image", "clip"):
            value = getattr(self, name)
            self._expect(name, value is None or (math.isfinite(value) and value > 0), "above 0")
        for name in ("workers", "warmup", "save_minutes", "weight_decay", "seed"):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        self._expect("balance", self.balance is None or 0 < self.balance <= 1, "above 0 and at most 1")
        for name in ("momentum", "gamma", "power", "final", "warmup_from"):
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        self._expect("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1")
        self._expect("milestones", all(0 < m < 1 for m in self.milestones), "fractions of the run between 0 and 1")
        self._expect("short", all(side >= 1 for side in self.short), "image sizes of at least 1")

    def _expect(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {what}, got {getattr(self, name)!r}")

    @property
    def learning_rate(self) -> float:
        """The learning rate at the end of the warm-up, by the linear scaling rule if `lr_per_image` is given."""
        return self.lr if self.lr_per_image is None else self.lr_per_image * self.batch * self.accumulate

    def factor(self, step: int, total: int, warm: int | None = None) -> float:
        """The factor on `learning_rate` at a step.

        Args:
            step: Position in the schedule, 0 ... total - 1.
            total: Length of the schedule.
            warm: Steps of warm-up done; default: `step`.
        """
        done = step / total
        if self.schedule == "steps":
            # Rounded to integers: 60000 / 90000 of 90000 steps is step 60000, not 60001.
            value = self.gamma ** sum(step >= round(m * total) for m in self.milestones)
        elif self.schedule == "cosine":
            value = self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
        elif self.schedule == "poly":
            value = (1 - done) ** self.power
        else:
            value = 1.0
        warmup, warm = self.warmup_steps(total), step if warm is None else warm
        if warm < warmup:
            value *= self.warmup_from + (1 - self.warmup_from) * warm / warmup
        return value

    def warmup_steps(self, total: int) -> int:
        """Length of the warm-up of a run of `total` steps."""
        return min(self.warmup, total // 4)

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """Returns a copy with some fields replaced.

        Raises:
            UsageError: If a field does not exist or a value is invalid.
        """
        changes = {_RENAMED.get(name, name): value for name, value in changes.items()}
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise UsageError(
                    f"there is no training option {name!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
                )
        values = {name: _frozen(name, value) for name, value in changes.items()}
        for name, value in values.items():
            _check_value(name, value)
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self), default=_as_name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The recipe from `to_dict`; missing fields take their defaults."""
        return cls().with_changes(values)

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The recipe from `to_json`; UsageError if the text is not a JSON object."""
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:  # deeply nested, or an integer of thousands of digits
            raise UsageError(f"a recipe must be a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise UsageError(f"a recipe must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(cast("dict[str, Any]", values))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in a file, such as the recipe.json of a run.

        Raises:
            UsageError: If the file cannot be read or does not hold a recipe.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {describe_os_error(error)}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: is not a recipe: not UTF-8 ({error.reason} at byte {error.start})") from None
        except UsageError as error:
            raise UsageError(f"{path}: is not a recipe: {error}") from None

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which `other` differs, as "name: before -> after"."""
        before, after = self.to_dict(), other.to_dict()
        return [f"{name}: {before[name]} -> {after[name]}" for name in after if before[name] != after[name]]


def _as_name(value: Any) -> Any:
    """A function (a transform of the user) as the name it is imported by, and numbers of NumPy as Python's."""
    from maskwright.data.own_transform import name_of

    given: Any = value  # narrowing by `callable` would lose the type
    return name_of(given) if callable(value) else value.item() if hasattr(value, "item") else str(value)


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _check_value(name: str, value: Any) -> None:
    """UsageError if a field has another type than its annotation, or a number is not finite or too large."""
    check_option(name, value, _hints()[name])
    for number in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool) and not _is_number(number):
            raise UsageError(f"{name} must be finite and below 2 ** 53, got {value!r}")
    if name == "betas":
        betas = cast("tuple[float, ...]", value)
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise UsageError(f"betas must be two numbers in [0, 1), got {value!r}")
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        if not all(isinstance(key, str) for key, _ in pairs):
            raise UsageError(f"{name} must have strings as keys, got {value!r}")
        if name == "rates" and not all(_is_number(factor) and factor >= 0 for _, factor in pairs):
            raise UsageError(f"rates must be numbers of 0 or more by part, got {value!r}")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that floats represent well."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53


_RENAMED = {"lr_per_picture": "lr_per_image"}  # fields of earlier versions, in files

_TUPLES = ("betas", "milestones", "freeze", "short", "no_decay")


def _frozen(name: str, value: Any) -> Any:
    if name in _TUPLES:
        return tuple(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else (value,)
    return dict(cast("Mapping[Any, Any]", value)) if isinstance(value, Mapping) else value


# What most published recipes have in common; those of the systems (`System.recipes`) are changes of it.
_PUBLISHED = Recipe(
    batch=16,
    optimizer="sgd",
    lr=0.02,
    weight_decay=1e-4,
    clip=None,
    schedule="steps",
    warmup=1000,
    warmup_from=1e-3,
    ema=None,
    workers=4,
)

RECIPES: Mapping[str, Recipe] = {
    # A few hundred images, from scratch or fine-tuned: AdamW is tolerant of the learning rate, the running mean helps
    # short runs.
    "small": Recipe(),
    # detectron2's 1x: 90k steps of 16 images, about 12 epochs of COCO. Mask R-CNN R50-FPN: mask AP 35.2.
    "detectron2-1x": replace(_PUBLISHED, steps=90_000, decay_biases=True, short=tuple(range(640, 801, 32)), long=1333),
    # detectron2's 3x: 270k steps, about 37 epochs. Mask R-CNN R50-FPN: mask AP 37.2.
    "detectron2-3x": replace(
        _PUBLISHED,
        steps=270_000,
        milestones=(210 / 270, 250 / 270),
        decay_biases=True,
        short=tuple(range(640, 801, 32)),
        long=1333,
    ),
    # detectron2's "new baselines", from scratch with large-scale jitter, 100 epochs. Mask R-CNN R50-FPN: mask AP 40.3
    # with synchronised batch normalisation everywhere. Warm-up and milestones are not verified.
    "detectron2-lsj": replace(
        _PUBLISHED,
        epochs=100,
        batch=64,
        lr=0.1,
        weight_decay=4e-5,
        decay_biases=True,
        milestones=(163_889 / 184_375, 177_546 / 184_375),
        warmup=500,
        warmup_from=0.067,
        amp="bf16",  # published in fp16
        sync_norm=True,
        augment={"flip": 0.5, "jitter": (0.1, 2.0), "size": (1024, 1024)},
    ),
    # torchvision's reference script: 26 epochs. Mask R-CNN R50-FPN (v1): mask AP 34.6.
    "torchvision": replace(
        _PUBLISHED,
        epochs=26,
        milestones=(16 / 26, 22 / 26),
        decay_norms=True,
        decay_biases=True,
        short=(800,),
        long=1333,
    ),
}


def named_recipe(name: str) -> Recipe:
    """The published recipe called `name`; UsageError if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    own = _of_systems()
    if name not in own:
        near = get_close_matches(name, own, 3)
        raise UsageError(
            f"there is no recipe {name!r}; known are {', '.join(RECIPES)}"
            + (f"; similar: {', '.join(near)}" if near else "")
            + "; `maskwright systems NAME` lists the recipes of a system"
        )
    return _PUBLISHED.with_changes(own[name])


def _of_systems() -> dict[str, Mapping[str, Any]]:
    """The systems' recipes as changes of `_PUBLISHED`."""
    from maskwright.systems import names, system_class

    return {name: changes for system in names() for name, changes in system_class(system).recipes.items()}
