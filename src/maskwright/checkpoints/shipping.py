"""Weights that are installed with the library, or with a second distribution: listed, checked, never downloaded.

A folder of weights has a `manifest.json`:

    {"format": 1, "weights": [{"name": ..., "file": ..., "sha256": ..., ...}], "elsewhere": {DISTRIBUTION: [NAME, ...]}}

with a model card for each file (`Shipped`). The library has one such folder (`maskwright/weights`). Other distributions
register theirs by an entry point of the group "maskwright.weights" whose value is the package that holds it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, cast, get_args

from maskwright.checkpoints.folders import CheckpointWarning
from maskwright.errors import CheckpointError
from maskwright.text import printable

GROUP = "maskwright.weights"
MANIFEST = "manifest.json"
FORMAT = 1
SHIPPED = "shipped"  # stands for the fitting weights
SCENES = "scenes"  # stands for those from which a training takes most
DISTRIBUTION = "maskwright-weights"
INSTALL = f"`pip install {DISTRIBUTION}` (in a clone of the repository: `pip install ./weights`)"

Role = Literal["instances", "prompts", "video"]
ROLES: Mapping[str, str] = {
    "instances": "find objects without prompts",
    "prompts": "answer points and boxes",
    "video": "follow objects through a video",
}


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        what: The measure.
        value: Its value.
        protocol: Data and conditions.
    """

    what: str
    value: float
    protocol: str


@dataclass(frozen=True)
class Shipped:
    """Weights that are installed, and their model card.

    Attributes:
        name: The name that `load` accepts.
        file: Name of the file, in the folder of the manifest.
        sha256: Hash of the file.
        bytes: Size of the file.
        system: Name of the system in the registry.
        preset: The preset that was trained, with the options in the file's header.
        role: What the weights are for as they are: "instances", "prompts" or "video".
        data: What they were trained on.
        licence: Licence of the weights.
        command: The command that makes the file again.
        seed: Its seed.
        date: Day of the training, YYYY-MM-DD.
        version: Version of maskwright.
        code: Commit of the code.
        figures: Measured figures.
        limits: What the weights are not good for.
        folder: Folder of the file; not in the manifest.
        distribution: The distribution that holds it; not in the manifest.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    system: str
    preset: str
    role: Role
    data: str
    licence: str
    command: str
    seed: int
    date: str
    version: str
    code: str
    figures: tuple[Figure, ...] = ()
    limits: str = ""
    folder: Path = field(default=Path(), compare=False)
    distribution: str = field(default="maskwright", compare=False)

    @property
    def path(self) -> Path:
        """The file, without a check."""
        return self.folder / self.file

    def verified(self) -> Path:
        """The file, after its size and hash were checked.

        Raises:
            CheckpointError: If the file is missing or differs from the manifest.
        """
        try:
            about = self.path.stat()
        except OSError:
            raise CheckpointError(f"{self.path}: is missing; install {self.distribution} again") from None
        try:
            same = about.st_size == self.bytes and _hash(self.path, about.st_mtime_ns, about.st_size) == self.sha256
        except OSError as error:  # a folder, or a file of another user
            reason = printable(str(error.strerror))
            raise CheckpointError(
                f"{self.path}: cannot be read ({reason}); install {self.distribution} again"
            ) from None
        if not same:
            raise CheckpointError(
                f"{self.path}: differs from the file that {self.distribution} was built with (its sha256 is another); "
                f"install {self.distribution} again"
            )
        return self.path

    def to_dict(self) -> dict[str, Any]:
        """The entry of the manifest."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("folder", "distribution")}
        values["figures"] = [[f.what, f.value, f.protocol] for f in self.figures]
        return values

    def card(self) -> str:
        """The model card, as Markdown."""
        lines = [
            f"# {self.name}",
            "",
            f"Weights of maskwright's `{self.system}`, for networks that {ROLES[self.role]}. "
            'Objects are labelled "object".',
            "",
            "| | |",
            "|---|---|",
            f"| file | `{self.file}`, {self.bytes / 1e6:.1f} MB, float16 |",
            f"| sha256 | `{self.sha256}` |",
            f"| preset | `{self.preset}`, with the options in the file |",
            f"| trained on | {self.data} |",
            f"| licence | {self.licence} |",
            f"| command | `{self.command}` |",
            f"| seed | {self.seed} |",
            f"| date | {self.date} |",
            f"| code | maskwright {self.version}, commit {self.code} |",
            "",
        ]
        if self.figures:
            lines += ["| measured | value | conditions |", "|---|--:|---|"]
            lines += [f"| {f.what} | {f.value:g} | {f.protocol} |" for f in self.figures]
            lines.append("")
        return "\n".join([*lines, "## Limits", "", self.limits or "Not measured.", ""])


def shipped() -> list[Shipped]:
    """Lists the weights that are installed: names for `load`, `--weights` and `pretrained=`.

    Returns:
        The entries of the library itself, then those of other installed distributions. Empty if there are none.
    """
    found: dict[str, Shipped] = {}
    for distribution, folder in _folders():
        for entry in _entries(folder, distribution):
            found.setdefault(entry.name, entry)
    return list(found.values())


def find_shipped(name: str) -> Shipped | None:
    """The installed weights with this name; None if there are none.

    Raises:
        CheckpointError: If the name is one of a distribution that is not installed.
    """
    entry = next((entry for entry in shipped() if entry.name == name), None)
    if entry is None and (owner := elsewhere().get(name)) is not None:
        raise CheckpointError(
            f"{name}: belongs to the distribution {owner}, which is not installed; {how_to_install(owner)}"
        )
    return entry


def elsewhere() -> dict[str, str]:
    """Names of weights in distributions that the library knows of, installed or not, with that distribution."""
    raw = _read(_own_folder())
    given = raw.get("elsewhere", {})
    listed: Mapping[str, Sequence[str]] = cast("Any", given) if isinstance(given, Mapping) else {}
    return {name: owner for owner, names in listed.items() for name in names}


def fitting(role: Role = "instances") -> Shipped:
    """The weights that "shipped" stands for.

    Args:
        role: What they are needed for.

    Raises:
        CheckpointError: If no installed weights fit.
    """
    entry = first_with(role)
    if entry is None:
        raise CheckpointError(f"no installed weights {ROLES[role]}; {_none_fit(shipped())}")
    return entry


def first_with(role: Role) -> Shipped | None:
    """The first installed weights with a role; None if there are none."""
    return next((entry for entry in shipped() if entry.role == role), None)


def resolved(weights: str | Path | None, role: Role = "instances") -> str | Path | None:
    """`weights`, with "shipped" replaced by the name of the fitting weights.

    Args:
        weights: What a person asked for.
        role: See `fitting`.
    """
    if weights is None or str(weights) != SHIPPED or Path(SHIPPED).exists():
        return weights
    return fitting(role).name


def of_system(name: str) -> Shipped:
    """The installed weights of a system.

    Args:
        name: The system, or a preset, whose own weights are preferred.

    Raises:
        CheckpointError: If there are none.
    """
    from maskwright.systems import find

    system, entries = find(name)[0].name, shipped()
    chosen = [entry for entry in entries if entry.preset == name] or [e for e in entries if e.system == system]
    if not chosen:
        raise CheckpointError(
            f"no installed weights are those of {system}; {_none_fit(entries)}. pretrained='scenes' (--pretrained "
            "scenes) takes the backbone of other systems' weights where it is the same"
        )
    return chosen[0]


def missing(name: str) -> str:
    """The end of the message about an unknown name: similar ones."""
    names = {*(entry.name for entry in shipped()), *elsewhere()}
    similar = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {similar[0]!r}?" if similar else _none_fit(shipped())


def _none_fit(entries: Sequence[Shipped]) -> str:
    """What is installed, and what could be."""
    have = f"installed are {', '.join(entry.name for entry in entries)}" if entries else "none are installed"
    others: dict[str, list[str]] = {}
    for name, owner in elsewhere().items():
        if all(entry.name != name for entry in entries):
            others.setdefault(owner, []).append(name)
    more = "; ".join(f"{', '.join(names)} in {owner}: {how_to_install(owner)}" for owner, names in others.items())
    return f"{have}; {more}" if more else have


def how_to_install(owner: str) -> str:
    """How to install a distribution."""
    return INSTALL if owner == DISTRIBUTION else f"`pip install {owner}`"


# ---- folders ---------------------------------------------------------------------------------------------------------


def _own_folder() -> Path:
    return Path(str(resources.files("maskwright"))) / "weights"


def _folders() -> list[tuple[str, Path]]:
    """The folders of weights with their distribution, that of the library first."""
    folders = [("maskwright", _own_folder())]
    registered = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for point in dict.fromkeys(registered):  # an editable installation may be listed twice
        what = ""
        try:
            folder = resources.files(point.module)
            if not isinstance(folder, Path):  # imported from an archive, or of several folders
                what = "is not in one folder"
            elif not (folder / MANIFEST).exists():
                what = f"has no {MANIFEST}"
            else:
                folders.append((_distribution(point), folder))
        except (Exception, SystemExit) as error:  # the package is code of others
            what = f"cannot be imported ({printable(f'{type(error).__name__}: {error}')})"
        if what:
            warnings.warn(
                f"the weights of {_distribution(point)} are ignored: its package {point.value!r} {what}; install it "
                "again",
                CheckpointWarning,
                stacklevel=3,
            )
    return folders


def _distribution(point: EntryPoint) -> str:
    """The distribution of an entry point."""
    return point.dist.name if point.dist is not None else point.name


def _read(folder: Path) -> Mapping[str, Any]:
    """The manifest of a folder; empty if there is none.

    Raises:
        CheckpointError: If it is not valid.
    """
    path = folder / MANIFEST
    try:
        about = path.stat()
    except OSError:
        return {}
    return _parsed(path, about.st_mtime_ns, about.st_size)


@cache
def _parsed(path: Path, changed: int, size: int) -> Mapping[str, Any]:
    """A manifest, read again when the file changes."""
    try:
        raw: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({printable(str(error))[:120]})") from None
    if not isinstance(raw, dict) or not isinstance(cast("dict[str, Any]", raw).get("weights"), list):
        raise CheckpointError(f"{path}: must be an object with a list 'weights'")
    manifest = cast("dict[str, Any]", raw)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: has format {manifest.get('format')!r}, this version reads format {FORMAT}; install distributions "
            "of the same version"
        )
    return manifest


def _entries(folder: Path, distribution: str) -> list[Shipped]:
    """The weights of a folder."""
    own = distribution == "maskwright"
    try:
        return [parsed_entry(value, folder, distribution) for value in _read(folder).get("weights", [])]
    except CheckpointError as error:
        if own:
            raise
        warnings.warn(f"the weights of {distribution} are ignored: {error}", CheckpointWarning, stacklevel=4)
        return []


def parsed_entry(value: Any, folder: Path, distribution: str) -> Shipped:
    """One entry of a manifest.

    Raises:
        CheckpointError: If a field is missing or has the wrong type.
    """
    where = folder / MANIFEST
    values = dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {}
    name = printable(str(values.get("name", "(unnamed)")))
    for each in fields(Shipped):
        if each.name in ("folder", "distribution", "figures"):
            continue
        kind = int if each.type == "int" else str
        if type(values.get(each.name, "" if each.name == "limits" else None)) is not kind:
            raise CheckpointError(f"{where}: the field {each.name!r} of {name} must be {_ARTICLE[kind]}")
    if not name.strip() or name != values["name"]:
        raise CheckpointError(f"{where}: the name {name!r} must be of printable characters")
    if name in (SHIPPED, SCENES):
        raise CheckpointError(f"{where}: the name {name!r} is reserved: it stands for the fitting weights")
    if not 0 < values["bytes"] < 1 << 63:
        raise CheckpointError(f"{where}: the field 'bytes' of {name} must be the size of a file")
    named = PureWindowsPath(values["file"])  # which has all separators
    if named.name != str(named) or named.suffix != ".safetensors" or printable(str(named)) != values["file"]:
        raise CheckpointError(f"{where}: the file of {name} must be a .safetensors file in the same folder")
    if values["role"] not in get_args(Role):
        raise CheckpointError(f"{where}: the role of {name} must be one of {', '.join(get_args(Role))}")
    try:
        figures = tuple(Figure(str(what), float(number), str(how)) for what, number, how in values.get("figures", ()))
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{where}: the figures of {name} must be lists of a text, a number and a text") from None
    known = {each.name for each in fields(Shipped)}
    plain: dict[str, Any] = {key: entry for key, entry in values.items() if key in known}
    plain |= {"figures": figures, "folder": folder, "distribution": distribution}
    return Shipped(**plain)


_ARTICLE = {int: "an integer", str: "a text"}


@cache
def _hash(path: Path, changed: int, size: int) -> str:
    """The sha256 of a file, computed again when it changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
