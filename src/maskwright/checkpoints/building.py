"""Constructing the system that a file describes: its options are checked, and shapes compared before any allocation."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from maskwright._version import __version__
from maskwright.checkpoints.budget import shown
from maskwright.checkpoints.fitting import State, adapt_classes, fit, renamed, widen_input
from maskwright.checkpoints.names import is_placeholder
from maskwright.checkpoints.origins import Candidate, Origin
from maskwright.checkpoints.ours import preprocess_of
from maskwright.errors import CheckpointError, MaskwrightError, MissingExtraError, UnknownSystemError, UsageError
from maskwright.options import LARGEST_OPTION, UNBOUNDED, plain
from maskwright.structures import Preprocess
from maskwright.structures.resize import Resize
from maskwright.systems import PanopticSystem, ProposalSystem, System, system_class

Options = dict[str, Any]

MORE_MODULES = 5_000  # modules that a system may have, besides ten for each tensor of the file
MORE_MEMORY = 1 << 28  # bytes of parameters and buffers, besides a multiple of the file's


def build_official(
    origin: Origin,
    candidate: Candidate,
    state: Mapping[str, Tensor],
    path: str,
    classes: Sequence[str] | None,
    overrides: Mapping[str, Any],
    assumed: bool = False,
) -> System:
    """The system of an official file.

    Args:
        origin: Its layout.
        candidate: Its variant.
        state: Its tensors.
        path: The file, for messages.
        classes: As for `load`.
        overrides: As for `load`.
        assumed: Whether the class names of `candidate` are not those of the file.
    """
    options = dict(candidate.options)
    kind = system_class(origin.system)
    unknown = sorted(set(options) - set(_options_of(kind)))
    if unknown:
        raise CheckpointError(
            f"{path}: in the {origin.name} layout it needs options that {origin.system} does not have: "
            f"{', '.join(unknown)}"
        )
    layout = f"the {origin.name} layout of {origin.system}"
    try:
        translated = origin.translate(dict(state), options, path)
    except MaskwrightError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: tensors of {layout} are missing or have unexpected shapes ({shown(error)}); download it again"
        ) from error
    return _fill(kind, options, translated, path, layout, classes, overrides, origin.absent, assumed)


def build_ours(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    path: str,
    classes: Sequence[str] | None,
    overrides: Mapping[str, Any],
) -> System:
    """The system of a checkpoint in the format of this library.

    Args:
        state: Its tensors.
        metadata: What `parse_metadata` returned.
        path: The file, for messages.
        classes: As for `load`.
        overrides: As for `load`.
    """
    name, written = metadata["system"], shown(metadata.get("version", "(unknown version)"), 40)
    try:
        kind = system_class(name)
    except UnknownSystemError:
        raise CheckpointError(
            f"{path}: holds system {shown(name)!r}, written by maskwright {written}; this version ({__version__}) does "
            "not have it. Install a version that does"
        ) from None
    check_values(metadata["options"], path)
    with _faults_of(path):
        options = kind.upgraded(metadata["options"])
    options["classes"] = metadata["classes"] or options.get("classes", [])
    gone = sorted(set(options) - set(_options_of(kind)))
    if gone:
        raise CheckpointError(
            f"{path}: written by maskwright {written} with options that {name} does not have in this version "
            f"({__version__}): {shown(', '.join(gone))}. Load it with that version and save it without them"
        )
    preprocess = preprocess_of({**metadata, "path": path})
    system = _fill(kind, options, state, path, f"{name} with the options in its header", classes, overrides, ())
    if preprocess is not None:
        channels = len(system.preprocess.mean)
        if len(preprocess.mean) != channels and "in_channels" not in overrides:
            raise CheckpointError(
                f"{path}: header entry 'preprocess' has a mean of {len(preprocess.mean)} channels, the system has "
                f"{channels}; save the file again"
            )
        system.preprocess = _preprocess_for(system, preprocess, options, overrides)
    return system


def _preprocess_for(system: System, saved: Preprocess, options: Options, overrides: Mapping[str, Any]) -> Preprocess:
    """The preprocessing stored in a file, with the fields that `overrides` change."""
    if not overrides:
        return saved
    with torch.device("meta"):
        before = type(system).rebuild(options).preprocess
    after = system.preprocess
    names = [field.name for field in fields(Preprocess)]
    changed = {name: getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}
    # A size equal to that in the file's options counts too, because training may have changed the stored one.
    given = overrides.get("resize")
    if isinstance(given, Resize):
        given = given.to_options()
    stated: set[str] = set()
    if isinstance(given, Mapping):
        stated = {name for name, value in cast(Mapping[str, Any], given).items() if value is not None}
    changed |= {name: getattr(after, name) for name in names if name in stated}
    return replace(saved, **changed)


def _options_of(kind: type[System]) -> list[str]:
    """Names of the constructor's parameters."""
    return list(inspect.signature(kind.__init__).parameters)[1:]


def _fill(
    kind: type[System],
    options: Options,
    state: Mapping[str, Tensor],
    path: str,
    layout: str,
    classes: Sequence[str] | None,
    overrides: Mapping[str, Any],
    absent: Sequence[str],
    assumed: bool = False,
) -> System:
    """Construct a system and load a state dict into it."""
    old = options.get("classes") or ()
    if not isinstance(old, list | tuple) or not all(isinstance(name, str) for name in cast(Sequence[Any], old)):
        raise CheckpointError(f"{path}: the class names in its header are not a list of strings; save the file again")
    old = tuple(cast(Sequence[str], old))
    given: Any = options.get("stuff")
    is_stuff = [isinstance(given, list | tuple) and name in given for name in old]
    if issubclass(kind, ProposalSystem):
        classes = None
    _check_classes(classes)
    if classes is not None and _names_rows(old, classes, assumed):
        old = tuple(classes)
    stuff = [name for name, region in zip(old, is_stuff, strict=True) if region]
    # Keeps the random state for the system that is built afterwards.
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType] - not typed by torch
        outline, final = _outline(kind, options, overrides, classes, state, path)
        with torch.device("meta"):
            shapes = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in state.items()}
            _adapted(shapes, outline, old, stuff, path, layout, overrides, absent)
    system = kind.rebuild(final)
    fitted, kept = _adapted(state, system, old, stuff, path, layout, overrides, absent)
    system.load_state_dict(fitted, strict=True)
    if kept is not None:
        system.source = {"classes_kept": list(kept)}
    return system


def _adapted(
    state: Mapping[str, Tensor],
    system: System,
    old: tuple[str, ...],
    stuff: Sequence[str],
    path: str,
    layout: str,
    overrides: Mapping[str, Any],
    absent: Sequence[str],
) -> tuple[State, tuple[str, ...] | None]:
    """A state dict that fits the system, and the class names whose rows were kept; None if all classes stay."""
    state = renamed(state, system)
    kept: tuple[str, ...] | None = None
    regions = isinstance(system, PanopticSystem) and system.stuff_rows() and set(system.stuff) != set(stuff)
    if tuple(system.classes) != old or regions:
        if not system.class_rows():
            raise UsageError(f"{path}: {system.name} does not support replacing its classes; load it without `classes`")
        try:
            state, kept = adapt_classes(state, system, old, old_stuff=stuff)
        except (LookupError, RuntimeError) as error:  # a parameter with too few axes
            raise CheckpointError(f"{path}: a class layer has an unexpected shape ({shown(error)})") from error
    weight = system.input_weight()
    if weight is not None and weight in state and state[weight].ndim == 4:
        channels = system.state_dict()[weight].shape[1]
        if channels != state[weight].shape[1] > 0 and "in_channels" in overrides:
            given = state[weight]
            state[weight] = widen_input(given.to(torch.promote_types(given.dtype, torch.float32)), channels)
    new = [
        part
        for part in system.optional_networks
        if overrides and not any(key.startswith(part) for key in state)
    ]  # fmt: skip
    absent = (*absent, *(f"^{re.escape(part)}" for part in new))
    return fit(state, system, path, layout, absent), kept


def _final(
    kind: type[System], options: Options, overrides: Mapping[str, Any], classes: Sequence[str] | None
) -> dict[str, Any]:
    merged = kind.with_options(options, overrides) | ({} if classes is None else {"classes": list(classes)})
    stuff: Any = merged.get("stuff")
    if classes is not None and "stuff" not in overrides and isinstance(stuff, list | tuple):
        # Classes that are no longer there are not stuff either.
        old = {name.strip().casefold() for name in cast(Sequence[Any], stuff) if isinstance(name, str)}
        merged["stuff"] = [name for name in classes if name.strip().casefold() in old]
    return {name: plain(value) for name, value in merged.items()}  # of groups too, so that `rebuild` downloads nothing


# ---- classes ---------------------------------------------------------------------------------------------------------


def _check_classes(classes: Sequence[Any] | None) -> None:
    if classes is None:
        return
    if isinstance(classes, str) or not classes or not all(isinstance(c, str) and c.strip() for c in classes):
        raise UsageError(f"`classes` must be a list of at least one name, got {classes!r}")
    folded = [c.strip().casefold() for c in classes]
    twice = sorted({c for c in folded if folded.count(c) > 1})
    if twice:
        raise UsageError(f"`classes` contains {', '.join(map(repr, twice))} more than once; class names must be unique")


def _names_rows(old: Sequence[str], new: Sequence[str], assumed: bool) -> bool:
    """Whether `new` are the names of a file's rows in their order, because the file has none.

    If the names are only assumed from the number of classes (COCO's for 80), those given are others unless most agree.
    """
    if len(old) != len(new):
        return False
    if all(map(is_placeholder, old)):
        return True
    folded = {name.strip().casefold() for name in old}
    return assumed and 2 * sum(name.strip().casefold() in folded for name in new) <= len(new)


def compare_with_meta(kind: type[System], options: Options, state: Mapping[str, Tensor], path: str) -> None:
    """Compares the options that a file states with its tensors, before memory is allocated for the system.

    Args:
        kind: The class of the system.
        options: The options in the file, with today's names.
        state: The tensors in the file.
        path: The file, for messages.

    Raises:
        CheckpointError: If the options are invalid, or describe another system than the tensors do.
    """
    check_values(options, path)
    outline, _ = _outline(kind, options, {}, None, state, path)
    wanted = outline.state_dict()
    for name in wanted:
        if name not in state or wanted[name].shape != state[name].shape:
            has = tuple(state[name].shape) if name in state else "missing"
            raise CheckpointError(
                f"{path}: {shown(name)} is {has}, but has the shape {tuple(wanted[name].shape)} with the options in "
                "the file; the file is damaged"
            )


def checked_outline(kind: type[System], options: Options, state: Mapping[str, Tensor], path: str) -> Options:
    """The options of a file, checked by building the system on the device "meta".

    Args:
        kind: The class of the system.
        options: The options in the file; names of earlier versions are converted.
        state: The tensors in the file; their size bounds that of the system.
        path: The file, for messages.

    Raises:
        CheckpointError: If the options are invalid, or describe a system far larger than the file.
    """
    with _faults_of(path):
        upgraded = {**kind.upgraded(options), "classes": options["classes"]}
    gone = sorted(set(upgraded) - set(_options_of(kind)))
    if gone:
        raise CheckpointError(f"{path}: {kind.name} does not have its options {shown(', '.join(gone))} in this version")
    return _outline(kind, upgraded, {}, None, state, path)[1]


# ---- checks before construction --------------------------------------------------------------------------------------


def check_values(options: Any, path: str, name: str = "options") -> None:
    """Raise a CheckpointError for numbers in the options of a file that no system has.

    Args:
        options: The options, not nested deeply.
        path: The file, for messages.
        name: Name of the option, for messages.
    """
    if isinstance(options, Mapping):
        for key, value in cast(Mapping[str, Any], options).items():
            check_values(value, path, key)
    elif isinstance(options, list | tuple):
        for value in cast(Sequence[Any], options):
            check_values(value, path, name)
    elif isinstance(options, int | float) and not isinstance(options, bool):
        bound = 1 << 31 if name in UNBOUNDED else LARGEST_OPTION
        if not math.isfinite(options) if isinstance(options, float) else abs(options) > bound:
            raise CheckpointError(
                f"{path}: option {shown(name)!r} in its header is {shown(options, 30)}, which is out of range; the "
                "file is damaged"
            )


def _outline(
    kind: type[System],
    options: Options,
    overrides: Mapping[str, Any],
    classes: Sequence[str] | None,
    state: Mapping[str, Tensor],
    path: str,
) -> tuple[System, Options]:
    """The system on the device "meta", which needs no memory for its parameters, and its options.

    Raises:
        CheckpointError: If the options of the file are invalid, or describe a system far larger than the file.
        UsageError: If only the caller's options are invalid.
    """
    most = 10 * len(state) + MORE_MODULES
    try:
        final = _final(kind, options, overrides, classes)
        with torch.device("meta"), _limited(most, path):
            outline = kind.rebuild(final)
    except (CheckpointError, MissingExtraError):
        raise
    except Exception as error:
        with _faults_of(path), torch.device("meta"), _limited(most, path):
            kind.rebuild(options)
        # The options of the file are valid, so those of the caller are not.
        if isinstance(error, MaskwrightError):
            raise
        given = ", ".join(f"{name}={shown(repr(value), 40)}" for name, value in overrides.items())
        raise UsageError(f"{kind.name}: invalid options {given} ({type(error).__name__}: {shown(error)})") from error
    held = sum(value.numel() * value.element_size() for value in state.values())
    needed = sum(value.numel() * value.element_size() for value in (*outline.parameters(), *outline.buffers()))
    if needed > 8 * held + MORE_MEMORY:
        raise CheckpointError(
            f"{path}: a system with its options needs {needed >> 20} MiB of weights, the file has {held >> 20} MiB; "
            "the weights do not match the options"
        )
    return outline, final


@contextlib.contextmanager
def _faults_of(path: str) -> Generator[None, None, None]:
    """Turn any exception of a constructor into a CheckpointError, because its options come from the file."""
    try:
        yield
    except (CheckpointError, MissingExtraError):
        raise
    except UsageError as error:
        raise CheckpointError(f"{path}: its options are invalid ({shown(error, 300)}); save the file again") from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: no system can be constructed with its options ({type(error).__name__}: {shown(error, 120)}); the "
            "file is damaged"
        ) from error


@contextlib.contextmanager
def _limited(most: int, path: str) -> Generator[None, None, None]:
    """Limit the number of modules and parameters that this thread constructs."""
    thread, count = threading.get_ident(), 0

    def hook(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise CheckpointError(
                f"{path}: its options describe a system of more than {most} layers, far more than the file has "
                "tensors; the weights do not match the options"
            )

    handles = (register_module_module_registration_hook(hook), register_module_parameter_registration_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
