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
TASKS = ("masks", "boxes", "masks of any class", "boxes of any class")  # what AP is measured of; not comparable
CERTAIN = 6  # images; with fewer, chance alone gives one of two equal systems the lead in all of them too often


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
        measured: Figures of the last evaluation: "AP", "AP50", ..., "task" (of `TASKS`), "ms", "MB", "parameters", ...
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
        known = [entry["AP"] for entry in self._measured()]
        return float(known[-1]) if known else -1.0

    @property
    def done(self) -> int:
        """Number of rounds after which it was measured."""
        return len(self._measured())

    @property
    def steps(self) -> int:
        """Training steps of the weights that were measured."""
        return sum(int(entry["steps"]) for entry in self._measured())

    @property
    def task(self) -> str:
        """What its AP is that of; see `TASKS`."""
        return str(self.measured.get("task", TASKS[0]))

    def _measured(self) -> list[dict[str, Any]]:
        return [entry for entry in self.rounds if entry.get("AP") is not None]


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
        """All measured candidates: those of later rounds first, then by what is measured, then by AP."""
        known = [c for c in self.candidates if c.score >= 0]
        return sorted(
            known,
            key=lambda c: (
                c.failed is not None,
                c.out is not None,
                -(c.out or 0),
                TASKS.index(c.task) if c.task in TASKS else len(TASKS),
                -c.score,
            ),
        )

    def finalists(self) -> list[Candidate]:
        """The measured candidates that were not left out, did not fail, and have an AP of the same kind as the best."""
        there = [c for c in self.ranking() if c.out is None and c.failed is None]
        return [c for c in there if c.task == there[0].task]

    @property
    def even(self) -> bool:
        """Whether all candidates that were not left out have been measured, after equally many rounds."""
        there = [c for c in self.candidates if c.out is None and c.failed is None]
        return all(c.done for c in there) and len({c.done for c in there if c.trained}) <= 1

    def winner(self) -> Candidate | None:
        """The best candidate if its AP is certainly higher than that of every other one of the last round.

        Certainly: their intervals do not overlap. That a difference on the same images excludes zero is not enough, as
        each system was trained once and another seed changes it too. It is never certain on fewer than `CERTAIN` images
        with objects, nor before all have been trained equally long.
        """
        finalists = self.finalists()
        if not finalists or not self.even:
            return None
        if len(finalists) > 1 and self.intervals.get("images", CERTAIN) < CERTAIN:
            return None
        return None if self.close_to_best() else finalists[0]

    def close_to_best(self) -> list[Candidate]:
        """The other candidates of the last round whose interval of AP overlaps with that of the best, or is unknown."""
        finalists = self.finalists()
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
            inside = _inside(entry.get("weights") or "", folder)
            if inside is not None:
                entry["weights"] = inside.as_posix()
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


def _inside(text: str, folder: Path) -> Path | None:
    """A path relative to a folder, also where only one of the two goes through symbolic links; None outside of it."""
    if not text:
        return None
    for path, place in ((Path(text).absolute(), folder.absolute()), (Path(text).resolve(), folder.resolve())):
        if path != place and path.is_relative_to(place):
            return path.relative_to(place)
    return None
