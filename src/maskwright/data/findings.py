"""Problems found in a data set: one record per problem, and short summaries of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from maskwright.text import printable

Severity = Literal["error", "skip", "note"]
LONGEST_NAME = 160  # characters of a name in a message; longer ones are cut in the middle
SEVERITIES: tuple[Severity, ...] = ("error", "skip", "note")


class DataWarning(UserWarning):
    """Part of a data set was skipped or repaired while reading; the message names it."""


@dataclass(frozen=True)
class Finding:
    """One problem of a data set.

    Attributes:
        severity: "error": the data set cannot be used. "skip": one annotation or image is skipped (an error in strict
            mode). "note": the entry is used, but may not be what was intended.
        kind: One word that groups similar findings.
        file: The file with the problem.
        sentence: What is wrong and what was expected, without a full stop.
        advice: What to do, or what was done; may be empty.
        image: Id of the image, if there is one.
        annotation: Id of the annotation, if there is one.
        repaired: For an error: whether the copy that `check` writes with `fix` is free of it.

    `str()` is one line in which control characters, such as those of file names, are escaped.
    """

    severity: Severity
    kind: str
    file: str
    sentence: str
    advice: str = ""
    image: int | str | None = None
    annotation: int | str | None = None
    repaired: bool = False

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.sentence}" + (f"; {self.advice}" if self.advice else ""))


@dataclass(frozen=True)
class Cause:
    """What is wrong with a set throughout; becomes a `Finding` of its file.

    Attributes:
        severity: As of a `Finding`. An error that is not repaired makes the set unusable.
        kind: One word that groups similar findings.
        sentence: The cause and the number of entries it affects.
        advice: What to do, or what was done.
        repaired: Whether the entries have been corrected.
    """

    severity: Severity
    kind: str
    sentence: str
    advice: str
    repaired: bool = False


def finding_lines(findings: Iterable[Finding], per_kind: int = 3) -> list[str]:
    """Summarize findings, one line each, most severe first.

    Args:
        findings: The findings, in any order.
        per_kind: Number of findings of each severity and kind that are listed; one more line counts the rest.

    Returns:
        The lines.
    """
    ranked = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    totals = Counter((f.severity, f.kind) for f in ranked)
    seen: Counter[tuple[str, str]] = Counter()
    lines: list[str] = []
    for finding in ranked:
        key = (finding.severity, finding.kind)
        seen[key] += 1
        if seen[key] <= per_kind:
            lines.append(str(finding))
        if seen[key] == per_kind and totals[key] > per_kind:
            lines.append(f"... and {totals[key] - per_kind} more of the same kind ({finding.kind})")
    return lines


def format_findings(findings: Iterable[Finding], per_kind: int = 3) -> str:
    """Summarize findings in one message; see `finding_lines`."""
    return "\n".join(finding_lines(findings, per_kind))


def first_few(names: Sequence[object], count: int = 3) -> str:
    """List the first `count` names and the number of others: "'a', 'b', 'c' and 4 more". Long names are cut."""
    text = ", ".join(_short(repr(n)) for n in names[:count])
    return text + (f" and {len(names) - count} more" if len(names) > count else "")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 40]}...{name[-30:]}"
