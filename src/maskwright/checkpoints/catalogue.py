"""The catalogue of checkpoints that can be downloaded by name, with their hashes, licences and published scores."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from maskwright.systems import Score
from maskwright.text import printable

Commercial = Literal["yes", "attribution", "no"]
HUB_NAMES = ("pytorch_model.bin", "model.safetensors")  # file names that identify no model


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: The name that `load` accepts.
        system: Name of the system in the registry.
        origin: The code base whose layout the file has.
        url: Address of the file; "PAGE#FILE" if it can only be downloaded in a browser.
        code: Address of the code.
        code_licence: Licence of the code.
        weights_licence: Licence of the weights.
        commercial: Whether commercial use is allowed: "yes", "attribution" (on conditions) or "no".
        note: Conditions of use.
        bytes: Approximate size, for display only.
        sha256: Hexadecimal digits of the hash: all, or the first ones if only these are published.
        md5: Likewise.
        published: Published scores.
        variant: The variant, for files whose keys and shapes match several.
        options: Options that keys and shapes do not determine; they override the recognised ones.
    """

    name: str
    system: str
    origin: str
    url: str
    code: str
    code_licence: str
    weights_licence: str
    commercial: Commercial
    note: str = ""
    bytes: int | None = None
    sha256: str = ""
    md5: str = ""
    published: tuple[Score, ...] = ()
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def by_hand(self) -> bool:
        """Whether the file can only be downloaded in a browser."""
        return "#" in self.url

    @property
    def verified(self) -> str:
        """How a download is verified, in words."""
        for kind, digits, whole in (("sha256", self.sha256, 64), ("md5", self.md5, 32)):
            if digits:
                return kind if len(digits) == whole else f"first {len(digits)} digits of the {kind}"
        return "unverified: no hash is published"

    def terms(self) -> str:
        """Origin, licence and scores as a few lines of text, without control characters; shown before a download."""
        use = {"yes": "allowed", "attribution": "allowed on conditions", "no": "NOT allowed"}[self.commercial]
        size = f", about {self.bytes / 1e6:.0f} MB" if self.bytes else ""
        scores = ", ".join(f"{s.what} {s.value:g}" for s in self.published)
        lines = [
            f"{self.name}: {self.url}{size}",
            f"  weights {self.weights_licence}, code {self.code_licence} ({self.code}); commercial use {use}",
            f"  {self.note}" if self.note else "",
            f"  published: {scores} ({self.published[0].protocol})" if scores else "",
            f"  checked by: {self.verified}",
        ]
        return "\n".join(printable(line) for line in lines if line)


def list_checkpoints(commercial_ok: bool = False, system: str | None = None) -> list[Entry]:
    """List the checkpoints that can be loaded by name.

    Args:
        commercial_ok: Only those whose licence allows commercial use.
        system: Only those of this system.
    """
    return [e for e in catalogue() if (e.commercial != "no" or not commercial_ok) and system in (None, e.system)]


def find(name: str) -> Entry | None:
    """The entry with this name, address or file name; None if there is none."""
    return next((e for e in catalogue() if name in (e.name, e.url) or (name == e.file and name not in HUB_NAMES)), None)


def entry_of_file(path: Path) -> Entry | None:
    """The entry with the file name of `path`; None if there is none.

    File names with digits of a hash are practically unique. Others are used only if the entry has a variant that the
    content of the file does not determine.
    """
    if path.name in HUB_NAMES:
        return None
    return next((e for e in catalogue() if e.file == path.name and (e.sha256 or e.md5 or e.variant)), None)


def allows_commercial(licence: str) -> bool:
    """Whether the name of a licence does not exclude commercial use; True for unknown licences and for ""."""
    return re.search(r"\bNC\b|non-?\s?commercial|academic|research[ -]only|AGPL", licence, re.IGNORECASE) is None


SCORES = {"box": "box AP", "mask": "mask AP", "keypoint": "keypoint AP", "miou": "mIoU", "pq": "PQ"}


@cache
def catalogue() -> tuple[Entry, ...]:
    """All entries of the package's `catalogue.toml`."""
    text = files("maskwright.checkpoints").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse_catalogue(text)


def parse_catalogue(text: str) -> tuple[Entry, ...]:
    """Parse a catalogue in TOML; the format is described at the head of `catalogue.toml`."""
    entries: list[Entry] = []
    for origin, publisher in tomllib.loads(text).items():
        for name, file in publisher["files"].items():
            digits = re.search(r"[-_]([0-9a-f]{6,64})\.\w+$", file["path"])
            hashes = {publisher["hash"]: digits[1]} if digits and publisher.get("hash") else {}
            protocol = file.get("protocol", publisher.get("protocol", ""))
            entries.append(
                Entry(
                    name=name,
                    system=file.get("system") or re.split(r"(?<=rcnn)-", name)[0],
                    origin=origin,
                    url=publisher["base"] + file["path"],
                    code=publisher["code"],
                    code_licence=publisher["code_licence"],
                    weights_licence=file.get("weights_licence", publisher["weights_licence"]),
                    commercial=file.get("commercial", publisher["commercial"]),
                    note=file.get("note", publisher.get("note", "")),
                    bytes=file.get("bytes"),
                    sha256=file.get("sha256", hashes.get("sha256", "")),
                    md5=file.get("md5", hashes.get("md5", "")),
                    published=tuple(
                        Score(file[kind], what, protocol, file.get("scores_from", publisher.get("scores_from", "")))
                        for kind, what in SCORES.items()
                        if kind in file
                    ),
                    variant=file.get("variant"),
                    options=file.get("options", {}),
                )
            )
    return tuple(entries)
