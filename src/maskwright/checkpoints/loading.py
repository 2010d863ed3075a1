"""Loading of systems from checkpoints of this library, official files, folders and names in the catalogue."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright._version import __version__
from maskwright.checkpoints.catalogue import Entry, allows_commercial, catalogue, entry_of_file, find
from maskwright.checkpoints.download import fetch
from maskwright.checkpoints.fitting import adapt_classes, fit, renamed, widen_input
from maskwright.checkpoints.origins import Candidate, Origin, origins
from maskwright.checkpoints.ours import is_ours, parse_metadata, preprocess_of, save
from maskwright.checkpoints.reading import read_state
from maskwright.errors import CheckpointError, UnknownLayoutError, UnknownSystemError, UsageError
from maskwright.structures import Preprocess
from maskwright.structures.resize import Resize
from maskwright.systems import ProposalSystem, System, system_class

Options = dict[str, Any]


def load(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    commercial_ok: bool = False,
    variant: str | None = None,
    **overrides: Any,
) -> System:
    """Load a system with its weights, in eval mode.

    No code in the file is executed. All names and shapes are compared before any weight is loaded.

    Args:
        source: A file, a Hugging Face folder, or a name in the catalogue (see `list_checkpoints`).
        classes: Class names that replace those of the file. Rows of the heads are kept for names that match, ignoring
            case; other rows are initialised. Ignored by systems that predict class-agnostic proposals.
        device: Device of the system.
        commercial_ok: Refuse weights whose licence does not allow commercial use, before anything is downloaded.
        variant: The published variant, for files whose keys and shapes match several.
        **overrides: Options of the system's constructor. `in_channels` adapts the first convolution.

    Returns:
        The system. Its attribute `source` describes the origin and the licence of the weights.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe or of an unknown layout, does not match the options,
            or its licence is refused.
        UsageError: If an option or the device is invalid.
    """
    path, entry = _locate(source, commercial_ok)
    state, about = read_state(path)
    if is_ours(about):
        metadata = parse_metadata(about)
        note = metadata["source"]
        _check_licence(str(path), note, commercial_ok)
        system = _build_ours(state, metadata, str(path), classes, overrides)
        system.source = {**note, "file": path.name}
    else:
        entry = entry or entry_of_file(path)
        variant = variant or (entry.variant if entry else None)
        found = _recognise(state, about, variant, str(path))
        if entry is not None and entry.options:
            options = system_class(found.origin.system).with_options(found.candidate.options, entry.options)
            found = replace(found, candidate=replace(found.candidate, options=options))
        note = _note(path, found.origin, entry, about)
        _check_licence(str(path), note, commercial_ok)
        system = _build(found, str(path), classes, overrides)
        system.source = {**note, **(system.source or {})}
    try:
        return system.eval().to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).split("\n")[0][:160]
        raise UsageError(f"device {str(device)!r} is not available ({words}); use 'cpu'") from None


def convert(
    source: str | Path,
    target: str | Path,
    *,
    classes: Sequence[str] | None = None,
    commercial_ok: bool = False,
    variant: str | None = None,
    **overrides: Any,
) -> None:
    """Convert any checkpoint that `load` reads to the format of this library.

    Args:
        source: As for `load`.
        target: The new file, which must end in .safetensors. It records the origin and the licence of the weights.
        classes: As for `load`.
        commercial_ok: As for `load`.
        variant: As for `load`.
        **overrides: As for `load`.

    Raises:
        CheckpointError: As for `load`, or if the file cannot be written.
        UsageError: As for `load`.
    """
    system = load(source, classes=classes, commercial_ok=commercial_ok, variant=variant, **overrides)
    save(system, target)


# ---- where the file is ----------------------------------------------------------------------------------------------


def _locate(source: str | Path, commercial_ok: bool) -> tuple[Path, Entry | None]:
    """The path of a source, downloaded if necessary, and its entry in the catalogue."""
    path = Path(source).expanduser()
    if path.exists():
        return path, None
    entry = find(str(source))
    if entry is not None and entry.by_hand:
        page, _, file = entry.url.partition("#")
        raise CheckpointError(
            f"{entry.name}: this checkpoint can only be downloaded in a browser; download {file.strip('/')} from "
            f"{page} and pass the path of the file"
        )
    if entry is not None:
        return fetch(entry, commercial_ok=commercial_ok), entry
    if str(source).startswith(("http://", "https://")):
        raise CheckpointError(
            f"{source}: this address is not in the catalogue, so its licence and hash are unknown; download the file "
            "yourself and pass its path"
        )
    similar = difflib.get_close_matches(str(source), [e.name for e in catalogue()], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(similar)}?" if similar else "`maskwright checkpoints` lists the catalogue"
    raise CheckpointError(f"{source}: no such file or folder, and no such name in the catalogue; {hint}")


def _note(path: Path, origin: Origin, entry: Entry | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """Origin and licence of the weights, for `System.source`."""
    note: dict[str, Any] = {"origin": origin.name, "file": path.name}
    if entry is not None:
        note |= {"name": entry.name, "url": entry.url, "commercial": entry.commercial}
        note |= {"code_licence": entry.code_licence, "weights_licence": entry.weights_licence}
    else:
        # The layout identifies the code base, not the authors of the weights.
        published = f"; files published in this layout are {origin.weights_licence}" if origin.weights_licence else ""
        note |= {"code_licence": origin.code_licence, "weights_licence": f"not known{published}"}
        note |= {"commercial": "unknown" if allows_commercial(origin.weights_licence) else "no"}
    author = about["container"].get("__author__")
    return note | ({"author": author} if isinstance(author, str) else {})


def _check_licence(path: str, note: Mapping[str, Any], commercial_ok: bool) -> None:
    if commercial_ok and note.get("commercial") == "no":
        raise CheckpointError(
            f"{path}: the weights are licensed {note.get('weights_licence')}, which does not allow commercial use; "
            "omit commercial_ok or choose other weights"
        )


# ---- recognising the layout -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    origin: Origin
    candidate: Candidate
    state: Mapping[str, Tensor]  # with the keys of the file

    @property
    def label(self) -> str:
        return self.candidate.variant or f"{self.origin.system}:{self.origin.name}"


def recognise(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> list[tuple[Origin, Candidate]]:
    """All published layouts and variants that the keys and shapes match.

    Args:
        state: The state dict of an official file.
        about: What `read_state` returned about it.
    """
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    return [(origin, candidate) for origin in origins() for candidate in origin.candidates(shapes, about)]


def _recognise(state: Mapping[str, Tensor], about: Mapping[str, Any], variant: str | None, path: str) -> _Match:
    """The layout and variant of a file."""
    found = [_Match(origin, candidate, state) for origin, candidate in recognise(state, about)]
    if not found:
        known: dict[str, list[str]] = {}
        for origin in origins():
            known.setdefault(origin.system, []).append(origin.name)
        layouts = "; ".join(f"{system} ({', '.join(names)})" for system, names in known.items()) or "none"
        raise UnknownLayoutError(
            f"{path}: the {len(state)} keys ({', '.join(list(state)[:3])}, ...) match no supported system; supported "
            f"layouts: {layouts}. Check that the file holds a whole system, not only a backbone"
        )
    if variant is not None:
        chosen = [f for f in found if variant in (f.candidate.variant, f.label, f.origin.name)]
        if not chosen and len(found) == 1 and variant in (presets := system_class(found[0].origin.system).presets):
            kind = system_class(found[0].origin.system)
            options = kind.with_options(found[0].candidate.options, presets[variant].options)
            options["classes"] = found[0].candidate.options.get("classes", options.get("classes"))
            chosen = [_Match(found[0].origin, Candidate(variant, options), state)]
        if not chosen:
            raise UsageError(
                f"{path}: the keys and shapes do not match variant {variant!r}; they match "
                f"{', '.join(dict.fromkeys(f.label for f in found))}"
            )
        found = chosen
    if len({f.origin.system for f in found}) > 1:
        found = [f for f in found if _fits(f, path)] or found  # the keys of a system may include those of a smaller one
    if len(found) > 1:
        labels = list(dict.fromkeys(f.label for f in found))
        raise CheckpointError(
            f"{path}: the keys and shapes match {len(labels)} published variants: {', '.join(labels)}; choose one, for "
            f"example variant={labels[0]!r}"
        )
    return found[0]


def _fits(found: _Match, path: str) -> bool:
    """Whether the system can be built from the file."""
    try:
        with torch.random.fork_rng(devices=[]):  # keeps the random state for the system that is built afterwards
            _build(found, path, None, {})
    except (CheckpointError, UsageError):
        return False
    return True


# ---- constructing the system ----------------------------------------------------------------------------------------


def _build(found: _Match, path: str, classes: Sequence[str] | None, overrides: Mapping[str, Any]) -> System:
    """The system of an official file."""
    origin, options = found.origin, dict(found.candidate.options)
    kind = system_class(origin.system)
    unknown = sorted(set(options) - set(_options_of(kind)))
    if unknown:
        raise CheckpointError(
            f"{path}: in the {origin.name} layout it needs options that {origin.system} does not have: "
            f"{', '.join(unknown)}"
        )
    state = origin.translate(dict(found.state), options, path)
    layout = f"the {origin.name} layout of {origin.system}"
    return _fill(kind, options, state, path, layout, classes, overrides, origin.absent)


def _build_ours(
    state: dict[str, Tensor],
    metadata: Mapping[str, Any],
    path: str,
    classes: Sequence[str] | None,
    overrides: Mapping[str, Any],
) -> System:
    """The system of a checkpoint in the format of this library."""
    name, written = metadata["system"], metadata.get("version", "(unknown version)")
    try:
        kind = system_class(name)
    except UnknownSystemError:
        raise CheckpointError(
            f"{path}: holds system {name!r}, written by maskwright {written}; this version ({__version__}) does not "
            "have it. Install a version that does"
        ) from None
    options = kind.upgraded(metadata["options"])
    options["classes"] = metadata["classes"] or options.get("classes", [])
    gone = sorted(set(options) - set(_options_of(kind)))
    if gone:
        raise CheckpointError(
            f"{path}: written by maskwright {written} with options that {name} does not have in this version "
            f"({__version__}): {', '.join(gone)}. Load it with that version and save it without them"
        )
    system = _fill(kind, options, state, path, f"{name} with the options in its header", classes, overrides, ())
    preprocess = preprocess_of(dict(metadata))
    if preprocess is not None:
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
    stated = {name for name, value in given.items() if value is not None} if isinstance(given, Mapping) else set()
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
) -> System:
    """Construct a system and load a state dict into it."""
    old = tuple(options.get("classes", ()))
    if issubclass(kind, ProposalSystem):
        classes = None
    final = kind.with_options(options, overrides) | ({} if classes is None else {"classes": list(classes)})
    _check_classes(classes)
    system = kind.rebuild(final)
    state = renamed(state, system)
    kept: tuple[str, ...] | None = None
    if tuple(system.classes) != old:
        if not system.class_rows():
            raise UsageError(f"{path}: {kind.name} does not support replacing its classes; load it without `classes`")
        state, kept = adapt_classes(state, system, old)
    weight = system.input_weight()
    if weight is not None and weight in state:
        channels = system.state_dict()[weight].shape[1]
        if channels != state[weight].shape[1] and "in_channels" in overrides:
            state[weight] = widen_input(state[weight], channels)
    new = [
        part for part in kind.optional_networks
        if overrides and not any(key.startswith(part) for key in state)
    ]  # fmt: skip
    absent = (*absent, *(f"^{re.escape(part)}" for part in new))
    system.load_state_dict(fit(state, system, path, layout, absent), strict=True)
    if kept is not None:
        system.source = {"classes_kept": list(kept)}
    return system


def _check_classes(classes: Sequence[str] | None) -> None:
    if classes is None:
        return
    if isinstance(classes, str) or not classes or not all(isinstance(c, str) and c.strip() for c in classes):
        raise UsageError(f"`classes` must be a list of at least one name, got {classes!r}")
    folded = [c.strip().casefold() for c in classes]
    twice = sorted({c for c in folded if folded.count(c) > 1})
    if twice:
        raise UsageError(f"`classes` contains {', '.join(map(repr, twice))} more than once; class names must be unique")
