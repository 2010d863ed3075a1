"""The state of a training run: its checkpoint for resuming, and reproducible randomness."""

from __future__ import annotations

import hashlib
import math
import random
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import CheckpointError, MaskwrightError, TrainingError, UsageError
from maskwright.files import AtomicFile
from maskwright.options import check_option
from maskwright.training.recipe import Recipe

LAST = "last.ckpt"
_SEAL = b"maskwright-sha256:"  # followed by the hexadecimal digest of everything before it
_SEAL_LENGTH = len(_SEAL) + 64
_END_LENGTH = 22  # of the last record of a zip archive; its last two bytes are the length of the comment after it


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        epoch: The current epoch.
        seen: Images of this epoch that were trained on, over all devices.
        best: Score of the best validation; higher is better.
        best_step: Its step.
        best_loss: Its validation loss, which decides between equal scores.
        lowest_loss: The lowest validation loss so far.
        measure: What `best` is: "segm/AP", or "-loss" if there is no AP.
        stale: Validations since the score or the loss last improved.
        validated: Step of the last validation.
        sums: Sums of the loss terms since the last line of the log.
        terms: Number of steps in `sums`.
        images: Images in an epoch, the size of the training set; 0 if it is not known.
        shift: What to add to `step` for the position in the schedule: not 0 once the number of steps per epoch has
            changed.
        warm_shift: What to add to `step` for the position in the warm-up.
    """

    step: int = 0
    epoch: int = 0
    seen: int = 0
    best: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    lowest_loss: float | None = None
    measure: str = ""
    stale: int = 0
    validated: int = -1
    sums: dict[str, float] = field(default_factory=dict[str, float])
    terms: int = 0
    images: int = 0
    shift: int = 0
    warm_shift: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """The progress from its fields; UsageError if one is unknown or of the wrong type."""
        hints = get_type_hints(cls)
        for name, value in values.items():
            if name not in hints:
                raise UsageError(f"there is no {name!r} in the progress of a run")
            check_option(name, value, hints[name])
            if hints[name] is int and name not in ("validated", "shift", "warm_shift") and value < 0:
                raise UsageError(f"{name} must not be negative, got {value}")
        for name, value in values.get("sums", {}).items():
            check_option(f"sums of {name!r}", value, float)
        progress = cls(**values)
        if progress.sums and not progress.terms:
            raise UsageError("terms must be positive if there are sums, got 0")
        return progress

    def continue_with(self, before: Recipe, recipe: Recipe, images: int) -> None:
        """Sets the position in a run that is resumed with other steps per epoch.

        The share of the run that is done stays the same: the epochs, the share of the current epoch, and the share of
        the warm-up. Without such a change nothing is altered.

        Args:
            before: The recipe so far.
            recipe: The recipe from now on.
            images: Images in an epoch from now on.
        """
        old_images = self.images or images
        old = (before.batch, before.accumulate, old_images, before.steps is None)
        if old == (recipe.batch, recipe.accumulate, images, recipe.steps is None):
            return
        passes, old_passes = (math.ceil(n / r.batch) for n, r in ((images, recipe), (old_images, before)))
        if self.seen >= old_passes * before.batch:  # at the end of the epoch
            position = passes
        elif images == old_images:  # no image twice in an epoch
            position = min(passes, math.ceil(self.seen / recipe.batch))
        else:
            position = math.ceil(passes * self.seen / (old_passes * before.batch))
        self.seen = position * recipe.batch
        per_epoch = math.ceil(passes / recipe.accumulate)
        total = recipe.steps or recipe.epochs * per_epoch
        old_total = before.steps or before.epochs * math.ceil(old_passes / before.accumulate)
        warm, old_warm = recipe.warmup_steps(total), before.warmup_steps(old_total)
        done = self.step + self.warm_shift
        self.warm_shift = (warm if done >= old_warm else round(warm * done / old_warm)) - self.step
        if recipe.steps is None:
            left = math.ceil((passes - position) / recipe.accumulate)
            self.shift = (self.epoch + 1) * per_epoch - left - self.step
        else:
            self.shift = 0

    def improve(self, measure: str, value: float, loss: float) -> bool:
        """Takes note of a validation.

        Args:
            measure: What decides: "segm/AP".
            value: The score, higher being better.
            loss: The validation loss, which decides between equal scores; NaN if there is none.

        Returns:
            Whether the validation is the best so far. `stale` counts validations in which neither the best score nor
            the lowest loss improved.
        """
        better = self.best is None or math.isnan(self.best) or measure != self.measure or value > self.best
        if value == self.best and measure == self.measure and not math.isnan(loss):
            better = self.best_loss is None or loss < self.best_loss
        lower = math.isfinite(loss) and (self.lowest_loss is None or loss < self.lowest_loss)
        if lower:
            self.lowest_loss = loss
        self.stale = 0 if better or lower else self.stale + 1
        if better:
            self.best, self.best_step, self.measure = value, self.step, measure
            self.best_loss = loss if math.isfinite(loss) else None
        return better


def seed_step(seed: int, *place: int) -> None:
    """Seeds Python's, NumPy's and torch's generators for a place of the run.

    The randomness of a step is a function of (seed, step, pass, rank) alone. There is thus no generator state to save,
    a resumed run draws the same numbers as an uninterrupted one, and a batch that failed can be rerun by itself.

    Args:
        seed: The run's seed.
        *place: Step, pass and rank.
    """
    word = int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
    random.seed(word)
    np.random.seed(word % 2**32)  # noqa: NPY002 - users' augmentations and losses may use the old generator
    torch.manual_seed(word % 2**63)  # pyright: ignore[reportUnknownMemberType] - no types in torch


# ---- files -----------------------------------------------------------------------------------------------------------


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` atomically, as an archive of torch whose comment is its checksum.

    Raises:
        TrainingError: If the file cannot be written; an existing one is unchanged.
    """
    with AtomicFile(path, TrainingError) as file:
        sealing = _Sealing(file)
        torch.save({**state, "sealed": True}, cast("Any", sealing))
        sealing.close()


def load_state(path: Path) -> dict[str, Any]:
    """Reads the checkpoint of a run that `save_state` wrote. Nothing in the file is executed.

    Raises:
        CheckpointError: If the file is damaged or not the checkpoint of a run.
    """
    advice = "remove it to start a new run, or give another run folder"
    state = read_sealed(path, f"not the checkpoint of an interrupted run ({{}}); {advice}", advice)
    if state.get("format") != "maskwright-run":
        raise CheckpointError(f"{path}: not the checkpoint of an interrupted run; pass weights with `weights=`")
    with entries_of(path):
        _check(state)
    return state


def read_sealed(path: Path, other: str, advice: str) -> dict[str, Any]:
    """Reads what `save_state` wrote, after comparing its checksum.

    Args:
        path: The file.
        other: The message if it is not a file of that kind, "{}" standing for the reason.
        advice: What to do if it is damaged.

    Returns:
        The state.

    Raises:
        CheckpointError: If the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            sealed = _is_intact(file)
            if sealed is False:
                raise CheckpointError(f"{path}: damaged: its content does not match its checksum; {advice}")
            file.seek(0)
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except Exception as error:  # a truncated archive, a foreign pickle: torch raises many types
        raise CheckpointError(f"{path}: {other.format(_first_line(error))}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: {other.format(f'it holds a {type(state).__name__}')}")
    state = cast("dict[str, Any]", state)
    if state.pop("sealed", False) and sealed is None:
        raise CheckpointError(f"{path}: damaged: its checksum is missing; {advice}")
    return state


# What code raises that is given another value than it expects.
_UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MaskwrightError)


@contextmanager
def entries_of(path: Path) -> Generator[None, None, None]:
    """The block that uses entries of a checkpoint: what they cannot be used for becomes a sentence about the file."""
    try:
        yield
    except CheckpointError:
        raise
    except _UNUSABLE as error:
        raise CheckpointError(
            f"{path}: holds an invalid entry ({_words(error)}); resume with the version that wrote "
            "it, or start a new run from the weights in last.safetensors"
        ) from error


class _Sealing:
    """A file that torch writes an archive to; `close` appends the checksum as its comment."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash, self._end = file, hashlib.sha256(), b""

    def write(self, data: bytes | memoryview) -> int:
        if len(data) < _END_LENGTH:
            joined = self._end + bytes(data)
            self._put(joined[:-_END_LENGTH])
            self._end = joined[-_END_LENGTH:]
        else:
            self._put(self._end)
            self._put(data[:-_END_LENGTH])
            self._end = bytes(data[-_END_LENGTH:])
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if self._end[:4] != b"PK\5\6":
            raise RuntimeError("torch has written an archive with another end than expected")
        end = self._end[:-2] + _SEAL_LENGTH.to_bytes(2, "little")
        self._hash.update(end)
        self._file.write(end + _SEAL + self._hash.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)


def _is_intact(file: BinaryIO) -> bool | None:
    """Whether the checksum matches; None if the file has none, as earlier versions wrote it, and seems whole."""
    size = file.seek(0, 2)
    if size >= _SEAL_LENGTH:
        file.seek(size - _SEAL_LENGTH)
        seal = file.read(_SEAL_LENGTH)
        if seal.startswith(_SEAL):
            digest, left = hashlib.sha256(), size - _SEAL_LENGTH
            file.seek(0)
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
            return digest.hexdigest().encode() == seal[len(_SEAL) :]
    file.seek(0)
    if not zipfile.is_zipfile(file):
        return None  # torch says what it is not
    with zipfile.ZipFile(file) as archive:
        return None if archive.testzip() is None else False


_ENTRIES: dict[str, Any] = {
    "system": str,
    "options": dict,
    "preprocess": dict,
    "recipe": dict,
    "progress": dict,
    "model": dict,
    "optimizer": dict,
    "logs": dict,
}


def _check(state: dict[str, Any]) -> None:
    """Checks the entries of a run's checkpoint; UsageError for one that is missing or of another type."""
    for name, kind in _ENTRIES.items():
        _expect(state, name, kind)
    average, source = state.get("average"), state.get("source")
    for name in ("average", "source"):
        if state.get(name) is not None:
            _expect(state, name, dict)
    for name in ("options", "preprocess", "source"):
        _plain(state.get(name), name)
    _tensors(state["model"], "model")
    if average is not None:
        _expect(average, "updates", int, "average.")
        _expect(average, "model", dict, "average.")
        _tensors(average["model"], "average.model")
    _expect(state["optimizer"], "kind", str, "optimizer.")
    _expect(state["optimizer"], "state", dict, "optimizer.")
    for name, values in state["optimizer"]["state"].items():
        if not isinstance(name, str) or not isinstance(values, dict):
            raise UsageError(f"optimizer.state of {name!r} must be a mapping")
    for name, length in state["logs"].items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise UsageError(f"logs.{name} must be a length in bytes, got {length!r}")
    if source is not None and not all(isinstance(key, str) for key in source):
        raise UsageError("source must have strings as keys")
    Progress.from_dict(state["progress"])
    Recipe.from_dict(state["recipe"])


def _expect(values: dict[str, Any], name: str, kind: type, prefix: str = "") -> None:
    if name not in values:
        raise UsageError(f"{prefix}{name} is missing")
    value = values[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{prefix}{name} must be of type {kind.__name__}, got {type(value).__name__}")
    if kind is dict and not all(isinstance(key, str) for key in value):
        raise UsageError(f"{prefix}{name} must have strings as keys")


def _plain(value: Any, where: str) -> None:
    """Checks that a value has the types of JSON."""
    if isinstance(value, dict):
        for key, own in cast("dict[Any, Any]", value).items():
            if not isinstance(key, str):
                raise UsageError(f"{where} must have strings as keys, got {key!r}")
            _plain(own, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, own in enumerate(cast("list[Any]", value)):
            _plain(own, f"{where}[{number}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        raise UsageError(f"{where} must be a JSON value, got a {type(value).__name__}")


def _tensors(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{where}: {name} must be a tensor, got {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _words(error: BaseException) -> str:
    """A message in one line; long ones are cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
