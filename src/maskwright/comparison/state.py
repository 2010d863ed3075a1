"""The state of a comparison: what has been trained and measured so far, in one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskwright.errors import DataError
from maskwright.files import write_json

FORMAT = "maskwright-comparison"
NAME = "comparison.json"


@dataclass
class Candidate:
    """One system of a comparison.

    Attributes:
        name: A preset, or the file of weights that is compared as it is.
        label: What tables and folders call it.
        why: Why it was chosen; empty if it was named by the caller.
        trained: Whether it is trained here.
        start: The installed weights that its training starts from; empty: random ones.
        rounds: What was done in each round: "steps", "seconds", "weights", and "AP" once it was evaluated.
        out: The round after which it was left out; None if it was not.
        measured: Figures of the last evaluation: "AP", "AP50", ..., "ms", "MB", "parameters", ...
        failed: Why it could not be trained or measured; None if it could.
    """

    name: str
    label: str
    why: str = ""
    trained: bool = True
    start: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    out: int | None = None
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    failed: str | None = None

    @property
    def weights(self) -> str | None:
        """The newest weights."""
        if not self.trained:
            return self.name
        done = [entry["weights"] for entry in self.rounds if entry.get("weights")]
        return done[-1] if done else None

    @property
    def score(self) -> float:
        """The newest AP, 0 ... 1; -1 if there is none."""
        known = [entry["AP"] for entry in self.rounds if entry.get("AP") is not None]
        return float(known[-1]) if known else -1.0


@dataclass
class Comparison:
    """A comparison of systems.

    Attributes:
        data: What is compared on.
        request: The options that identify it; a comparison is only continued with the same ones.
        profile: See `DataProfile`.
        candidates: The systems.
        rounds: Number of rounds planned.
        notes: Sentences about the conditions.
        intervals: 95 % intervals by label, and of differences to the best.
        finished: Whether everything planned has been done.
        spent: Seconds used until the state was saved, in all runs of the comparison.
    """

    data: str
    request: dict[str, Any]
    profile: dict[str, Any] = field(default_factory=dict[str, Any])
    candidates: list[Candidate] = field(default_factory=list[Candidate])
    rounds: int = 1
    notes: list[str] = field(default_factory=list[str])
    intervals: dict[str, Any] = field(default_factory=dict[str, Any])
    finished: bool = False
    spent: float = 0.0

    def active(self, number: int) -> list[Candidate]:
        """The candidates that take part in a round, the first of which is 0."""
        return [c for c in self.candidates if c.failed is None and (c.out is None or c.out >= number)]

    def ranking(self) -> list[Candidate]:
        """All measured candidates: those of later rounds first, then by AP."""
        known = [c for c in self.candidates if c.score >= 0]
        return sorted(known, key=lambda c: (c.out is not None, -(c.out or 0), -c.score))

    def winner(self) -> Candidate | None:
        """The best candidate if its AP is certainly higher than that of every other one of the last round.

        Certainly: their intervals do not overlap. That a difference on the same images excludes zero is not enough, as
        each system was trained once and another seed changes it too.
        """
        finalists = [c for c in self.ranking() if c.out is None]
        return finalists[0] if finalists and not self.close_to_best() else None

    def close_to_best(self) -> list[Candidate]:
        """The other candidates of the last round whose interval of AP overlaps with that of the best, or is unknown."""
        finalists = [c for c in self.ranking() if c.out is None]
        known = self.intervals.get("AP", {})
        lower, _ = known.get(finalists[0].label, (-math.inf, math.inf)) if finalists else (0.0, 0.0)
        return [c for c in finalists[1:] if not known.get(c.label, (0.0, math.inf))[1] < lower]

    def save(self, folder: Path) -> Path:
        """Write the file; weights in the folder are written relative to it, so that it can be moved."""
        values: dict[str, Any] = {"format": FORMAT, "version": 1, **asdict(self)}
        rounds: list[dict[str, Any]] = [
            entry for candidate in values["candidates"] if candidate["trained"] for entry in candidate["rounds"]
        ]
        for entry in rounds:
            path = Path(entry.get("weights") or "")
            if path.absolute().is_relative_to(folder.absolute()) and path.name:
                entry["weights"] = path.absolute().relative_to(folder.absolute()).as_posix()
        return write_json(folder / NAME, values, DataError)

    @classmethod
    def load(cls, folder: Path) -> Comparison | None:
        """Read the file of a folder; None if there is none.

        Raises:
            DataError: If it is damaged.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            values: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
            if values["format"] != FORMAT or values["version"] != 1:
                raise ValueError
            kept = {name: value for name, value in values.items() if name not in ("format", "version", "candidates")}
            candidates = [Candidate(**each) for each in values["candidates"]]
            for entry in (entry for candidate in candidates if candidate.trained for entry in candidate.rounds):
                if entry.get("weights") and (folder / entry["weights"]).exists():
                    entry["weights"] = str(folder / entry["weights"])
            return cls(**kept, candidates=candidates)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{path}: is not the state of a comparison; remove it or choose another folder") from None
