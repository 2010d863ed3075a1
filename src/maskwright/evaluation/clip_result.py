"""The result of an evaluation of clips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from maskwright._version import __version__
from maskwright.errors import DataError
from maskwright.evaluation.result import Protocol, percent
from maskwright.files import write_json
from maskwright.text import printable

FORMAT = "maskwright-clip-result"

# The rows of the table, with the measures that are counts.
_ROWS: tuple[tuple[str, ...], ...] = (
    ("J&F", "J", "J recall", "J decay", "F", "F recall", "F decay"),
    ("HOTA", "DetA", "AssA", "LocA", "IDF1", "IDP", "IDR"),
    ("MOTA", "MOTP", "sMOTSA", "IDSW", "FP", "FN", "Frag", "MT", "PT", "ML"),
    ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10"),
)
COUNTS = frozenset(("IDSW", "FP", "FN", "Frag", "MT", "PT", "ML"))
SIGNED = frozenset(("J decay", "F decay", "MOTA", "sMOTSA"))  # may be negative
STABILITY = "stability/"


@dataclass
class ClipResult:
    """The metrics of tracks in clips.

    Attributes:
        summary: Each measure as 0 ... 1 (-1 if it is not defined), or as a count: "J&F", "HOTA", "IDF1", "MOTA", "AP",
            ...; measures of stability begin with "stability/".
        classes: Class names.
        protocol: The conditions of the measurement.
        per_class: One row per class with "class", "tracks", "found" and the measures of tracking.
        per_clip: One row per clip with "clip", "frames", "tracks", "found" and the measures.
        missing: Names of clips without predictions; they count as clips in which nothing was found.
    """

    summary: dict[str, float]
    classes: tuple[str, ...]
    protocol: Protocol = field(default_factory=Protocol)
    per_class: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    per_clip: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    missing: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        return self.summary[name]

    def __str__(self) -> str:
        """The tables of measures in percent, of stability and of clips, and the protocol."""
        lines: list[str] = []
        for row in _ROWS:
            names = [name for name in row if name in self.summary]
            if names:
                lines += _aligned([names, [shown(name, self.summary[name]) for name in names]])
        stable = {name: value for name, value in self.summary.items() if name.startswith(STABILITY)}
        for name, value in stable.items():
            lines.append(f"{name:36}{percent(value):>8}")
        if len(self.per_clip) > 1:
            names = [name for name in ("J&F", "HOTA", "IDF1", "MOTA", "IDSW") if name in self.per_clip[0]]
            rows = [["clip", *names]]
            rows += [
                [printable(str(row["clip"])), *(shown(name, row[name]) for name in names)] for row in self.per_clip
            ]
            lines += ["", *_aligned(rows)]
        if self.missing:
            named = ", ".join(printable(name) for name in self.missing[:8])
            lines.append(f"{len(self.missing)} clips had no predictions: {named}")
        return "\n".join([*lines, str(self.protocol)])

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, atomically; returns the path."""
        return write_json(path, {"format": FORMAT, "maskwright": __version__, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> ClipResult:
        """Read a result that `save` wrote.

        Raises:
            DataError: If the file is not one.
        """
        path = Path(path)
        try:
            loaded: Any = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected a result of clips") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); expected a result of clips") from None
        values = cast(dict[str, Any], loaded) if isinstance(loaded, dict) else {}
        if values.get("format") != FORMAT:
            raise DataError(f'{path}: has no "format": "{FORMAT}"; expected a result of clips saved by evaluate')
        try:
            summary = {str(name): float(value) for name, value in values["summary"].items()}
            protocol = Protocol(**values["protocol"])
            rows = [[dict(row) for row in values[name]] for name in ("per_class", "per_clip")]
            return cls(summary, tuple(values["classes"]), protocol, *rows, missing=tuple(values["missing"]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: is damaged, or of another version ({error}); evaluate again") from None


def shown(name: str, value: float) -> str:
    """A measure as text: counts as integers, others in percent."""
    if name in COUNTS:
        return str(int(value))
    return f"{100 * value:.1f}" if name in SIGNED else percent(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines; the first column is left-aligned if it is a name."""
    widths = [max(8, *(len(row[column]) + 2 for row in rows)) for column in range(len(rows[0]))]
    left = rows[0][0] == "clip"
    return [
        "".join(
            cell.ljust(width) if left and column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
