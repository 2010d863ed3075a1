"""Loading of systems from checkpoints of this library, official files, folders and names in the catalogue."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.checkpoints.budget import shown, unexpected_as_errors
from maskwright.checkpoints.building import build_official, build_ours
from maskwright.checkpoints.catalogue import Entry, allows_commercial, catalogue, entry_of_file, find
from maskwright.checkpoints.containers import views
from maskwright.checkpoints.download import fetch
from maskwright.checkpoints.exported import load_exported
from maskwright.checkpoints.names import has_names
from maskwright.checkpoints.origins import Candidate, Origin, Shapes, origins
from maskwright.checkpoints.ours import is_ours, parse_metadata, save
from maskwright.checkpoints.reading import read_state
from maskwright.checkpoints.runtimes import SUFFIXES
from maskwright.checkpoints.shipping import SHIPPED, elsewhere, find_shipped, fitting, shipped
from maskwright.errors import CheckpointError, UnknownLayoutError, UsageError
from maskwright.systems import System, system_class
from maskwright.systems.kinds.classless import classless


def load(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = "cpu",
    commercial_ok: bool = False,
    variant: str | None = None,
    **overrides: Any,
) -> System:
    """Load a system with its weights, in eval mode.

    No code in the file is executed. All names and shapes are compared before any weight is loaded.

    Args:
        source: A file, a Hugging Face folder, a name in the catalogue (see `list_checkpoints`), the name of installed
            weights (see `shipped`), or "shipped" for those of them that find objects. Files of `export` (.onnx, .xml)
            give a system whose networks ONNX Runtime or OpenVINO computes; it cannot be trained.
        classes: Class names that replace those of the file. Rows of the heads are kept for names that match, ignoring
            case; other rows are initialised, which is logged as a warning. If the file has no class names, as many
            names as it has classes are those of its rows. Ignored by systems that predict class-agnostic proposals.
        device: Device of the system; "auto": a GPU if there is one, otherwise the CPU.
        commercial_ok: Refuse weights whose licence does not allow commercial use, before anything is downloaded.
        variant: The published variant, for files whose keys and shapes match several.
        **overrides: Options of the system's constructor. `in_channels` adapts the first convolution.

    Returns:
        The system. Its attribute `source` describes the origin and the licence of the weights. Weights whose classes
        have no meaning (trained on generated images) predict objects of the class "object", unless `classes` is given.

    Raises:
        CheckpointError: If the file is missing, damaged, unsafe or of an unknown layout, does not match the options,
            or its licence is refused.
        UsageError: If an option or the device is invalid.
    """
    system = load_silently(
        source, classes=classes, device=device, commercial_ok=commercial_ok, variant=variant, **overrides
    )
    if words := new_rows(system):
        # Not a Python warning: whoever makes those errors still wants to load weights for other classes.
        logging.getLogger(__name__).warning("%s: %s; they need training", source, words)
    return system


def load_silently(
    source: str | Path,
    *,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = "cpu",
    commercial_ok: bool = False,
    variant: str | None = None,
    **overrides: Any,
) -> System:
    """As `load`, for training: without the warning that rows of the heads are initialised."""
    path, entry = _locate(source, commercial_ok)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        if device not in (None, "auto") and str(device).partition(":")[0] != "cpu":
            raise UsageError(f"{path}: an exported system computes on the CPU, not on {str(device)!r}; use 'cpu'")
        system = load_exported(path, classes, variant, overrides)
        _check_licence(str(path), system.source or {}, commercial_ok)
        return system
    with unexpected_as_errors(path):
        system = _loaded(path, entry, classes, commercial_ok, variant, overrides)
    try:
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return system.eval().to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = str(error).split("\n")[0][:160]
        raise UsageError(f"device {str(device)!r} is not available ({words}); use 'cpu'") from None


def _loaded(
    path: Path,
    entry: Entry | None,
    classes: Sequence[str] | None,
    commercial_ok: bool,
    variant: str | None,
    overrides: Mapping[str, Any],
) -> System:
    """The system of a file, on the CPU."""
    state, about = read_state(path)
    if is_ours(about):
        metadata = parse_metadata(about)
        note = metadata["source"]
        _check_licence(str(path), note, commercial_ok)
        system = build_ours(state, metadata, str(path), classes, overrides)
        note.pop("classes_kept", None)  # of an earlier fine-tuning
        if note.get("classless") is True and classes is None:
            system = classless(system)
        else:
            note.pop("classless", None)
        system.source = {**note, **(system.source or {}), "file": path.name}
    else:
        entry = entry or entry_of_file(path)
        variant = variant or (entry.variant if entry else None)
        found = _recognise(state, about, variant, str(path))
        if entry is not None and entry.options:
            options = system_class(found.origin.system).with_options(found.candidate.options, entry.options)
            found = replace(found, candidate=replace(found.candidate, options=options))
        note = _note(path, found.origin, entry, about)
        _check_licence(str(path), note, commercial_ok)
        # The classes of files in the catalogue are known, those of others only if the file has names.
        names = found.candidate.options.get("classes", ())
        assumed = entry is None and not has_names(about, len(names))
        system = build_official(
            found.origin, found.candidate, found.state, str(path), classes, overrides, assumed=assumed
        )
        ignored = {"ignored": list(found.ignored)} if found.ignored else {}
        system.source = {**note, **ignored, **(system.source or {})}
    return system


def new_rows(system: System) -> str | None:
    """A clause about the class-specific rows of the heads that were not in the weights; None if all were."""
    kept: Sequence[str] | None = (system.source or {}).get("classes_kept")
    new = [] if kept is None else [name for name in system.classes if name not in kept]
    if not new:
        return None
    rows = f"the rows of {_few(kept)} are kept; those" if kept else "no class has the same name; the rows"
    return f"{rows} of {_few(new)} start from random values, in {', '.join(system.class_rows())}"


def _few(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")


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
    path = Path(source)
    try:
        path = path.expanduser()
        if path.exists():
            return path, None
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null character
        raise CheckpointError(f"{shown(source)}: not a valid path ({shown(error)}); check the path") from None
    own = fitting() if str(source) == SHIPPED else find_shipped(str(source))
    if own is not None:
        return own.verified(), None
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
    known = {SHIPPED, *(e.name for e in shipped()), *elsewhere(), *(e.name for e in catalogue())}
    similar = difflib.get_close_matches(str(source), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(similar)}?" if similar else "`maskwright checkpoints` lists the names"
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
    state: Mapping[str, Tensor]  # with the keys of the file, without a common prefix
    ignored: tuple[str, ...] = ()  # keys of other things beside the network

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
    about = {**about, "tensors": state}
    return [(origin, candidate) for origin in origins() for candidate in _candidates(origin, shapes, about, [])]


def _candidates(origin: Origin, shapes: Shapes, about: Mapping[str, Any], failures: list[Exception]) -> list[Candidate]:
    """The variants of a layout that a file matches; none if it lacks tensors that the layout has, or their axes."""
    try:
        return origin.candidates(shapes, about)
    except (LookupError, ArithmeticError, TypeError, ValueError, StopIteration) as error:
        failures.append(error)
        return []


def _matches(state: Mapping[str, Tensor], about: Mapping[str, Any], failures: list[Exception]) -> list[_Match]:
    """The layouts that the keys match, as they are or without prefixes that wrappers of modules add."""
    for view, ignored in views(state):
        shapes = {k: tuple(v.shape) for k, v in view.items()}
        seen = {**about, "tensors": view}
        found = [
            _Match(origin, candidate, view, ignored)
            for origin in origins()
            for candidate in _candidates(origin, shapes, seen, failures)
        ]
        if found:
            return found
    return []


def _recognise(state: Mapping[str, Tensor], about: Mapping[str, Any], variant: str | None, path: str) -> _Match:
    """The layout and variant of a file."""
    failures: list[Exception] = []
    found = _matches(state, about, failures)
    if not found:
        if "image" in state and all(key == "image" or key.startswith("finer.") for key in state):
            raise UnknownLayoutError(f"{path}: is the embedding of an image, not weights; read it with Embedding.load")
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        for explain in dict.fromkeys(origin.explain for origin in origins()):
            if reason := explain(shapes, about):
                raise UnknownLayoutError(f"{path}: {reason}") from (failures[0] if failures else None)
        known: dict[str, list[str]] = {}
        for origin in origins():
            known.setdefault(origin.system, []).append(origin.name)
        layouts = "; ".join(f"{system} ({', '.join(names)})" for system, names in known.items()) or "none"
        first = ", ".join(shown(key) for key in list(state)[:3])
        raise UnknownLayoutError(
            f"{path}: the {len(state)} keys ({first}, ...) match no supported system; supported layouts: {layouts}. "
            "Check that the file holds a whole system, not only a backbone"
        ) from (failures[0] if failures else None)
    if variant is not None:
        chosen = [f for f in found if variant in (f.candidate.variant, f.label, f.origin.name)]
        if not chosen and len(found) == 1 and variant in (presets := system_class(found[0].origin.system).presets):
            kind = system_class(found[0].origin.system)
            options = kind.with_options(found[0].candidate.options, presets[variant].options)
            options["classes"] = found[0].candidate.options.get("classes", options.get("classes"))
            chosen = [replace(found[0], candidate=Candidate(variant, options))]
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
        # Keeps the random state for the system that is built afterwards.
        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType] - not typed by torch
            build_official(found.origin, found.candidate, found.state, path, None, {})
    except (CheckpointError, UsageError):
        return False
    return True
