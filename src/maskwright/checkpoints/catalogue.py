"""The catalogue: what can be fetched by name, how to know it is whole, and under which terms it may be used."""

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

Commercial = Literal["yes", "attribution", "no"]
HUB_NAMES = ("pytorch_model.bin", "model.safetensors")  # what every model of a hub is called: it says nothing


@dataclass(frozen=True)
class Entry:
    """One published file of weights."""

    name: str  # what `load` takes
    system: str  # the registry's name
    origin: str  # the code base whose layout it has
    url: str
    code: str
    code_licence: str
    weights_licence: str
    commercial: Commercial
    note: str = ""  # conditions, in words
    bytes: int | None = None  # about; only shown
    sha256: str = ""  # hexadecimal digits: all, or as many of the first as were published
    md5: str = ""  # likewise
    published: tuple[Score, ...] = ()
    variant: str | None = None  # for files whose keys and shapes do not say what they are
    options: Mapping[str, Any] = field(default_factory=dict)  # likewise, laid over what was recognised

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def by_hand(self) -> bool:
        """Whether only a person with a browser can fetch it: the address is that of a folder's page."""
        return "#" in self.url

    @property
    def verified(self) -> str:
        """What a download is checked by."""
        for kind, digits, whole in (("sha256", self.sha256, 64), ("md5", self.md5, 32)):
            if digits:
                return kind if len(digits) == whole else f"first {len(digits)} digits of the {kind}"
        return "unverified: no hash is published"

    def terms(self) -> str:
        """Origin and licence in a few lines, as shown before a download."""
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
        return "\n".join(line for line in lines if line)


def list_checkpoints(commercial_ok: bool = False, system: str | None = None) -> list[Entry]:
    """What can be loaded by name; only what commercial use is allowed of, or only one system's, if asked."""
    return [e for e in catalogue() if (e.commercial != "no" or not commercial_ok) and system in (None, e.system)]


def find(name: str) -> Entry | None:
    """The entry of this name, address or file name; None if there is none."""
    return next((e for e in catalogue() if name in (e.name, e.url) or (name == e.file and name not in HUB_NAMES)), None)


def entry_of_file(path: Path) -> Entry | None:
    """The entry whose published file name this file still bears: its hash digits make it all but unique. Without such,
    it is believed only where the file itself cannot say which variant it is."""
    if path.name in HUB_NAMES:
        return None
    return next((e for e in catalogue() if e.file == path.name and (e.sha256 or e.md5 or e.variant)), None)


def allows_commercial(licence: str) -> bool:
    """Whether a licence's name does not forbid commercial use; of an unknown or missing one nothing is assumed."""
    return re.search(r"\bNC\b|non-?\s?commercial|academic|research[ -]only|AGPL", licence, re.IGNORECASE) is None


SCORES = {"box": "box AP", "mask": "mask AP", "keypoint": "keypoint AP", "miou": "mIoU", "pq": "PQ"}


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every entry, as the package's `catalogue.toml` lists them."""
    text = files("maskwright.checkpoints").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse_catalogue(text)


def parse_catalogue(text: str) -> tuple[Entry, ...]:
    """Entries of a catalogue in TOML: see the head of `catalogue.toml`."""
    entries = []
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
