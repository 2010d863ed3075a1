"""What is wrong with a data set: one record per complaint, and how many of them are told in few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "skip", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "skip", "note")


class DataWarning(UserWarning):
    """Something in a data set was left out or repaired while it was read; the text names it."""


@dataclass(frozen=True)
class Finding:
    """One complaint.

    severity    "error": the set cannot be used; "skip": one annotation or image is left out (an error when reading
                strictly); "note": it was understood, but somebody should know
    kind        a short word that groups findings of one sort
    file        the file at fault
    sentence    what is wrong and what was expected, without a full stop
    advice      what to do
    image       the image's id where there is one
    annotation  the annotation's id where there is one
    """

    severity: Severity
    kind: str
    file: str
    sentence: str
    advice: str = ""
    image: int | str | None = None
    annotation: int | str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.sentence}" + (f"; {self.advice}" if self.advice else "")


def digest(findings: Iterable[Finding], each: int = 3) -> list[str]:
    """One line per finding, worst first; of each kind only the first `each`, then how many more there are."""
    ranked = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    totals = Counter((f.severity, f.kind) for f in ranked)
    seen: Counter[tuple[str, str]] = Counter()
    lines: list[str] = []
    for finding in ranked:
        key = (finding.severity, finding.kind)
        seen[key] += 1
        if seen[key] <= each:
            lines.append(str(finding))
        if seen[key] == each and totals[key] > each:
            lines.append(f"... and {totals[key] - each} more of the same kind ({finding.kind})")
    return lines


def few(names: Sequence[object], count: int = 3) -> str:
    """The first names and how many more: 'a', 'b', 'c' and 4 more."""
    text = ", ".join(repr(n) for n in names[:count])
    return text + (f" and {len(names) - count} more" if len(names) > count else "")
