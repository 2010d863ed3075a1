"""The state of a training run: its checkpoint for resuming, and reproducible randomness."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.errors import CheckpointError, TrainingError
from maskwright.files import atomic_path

LAST = "last.ckpt"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        epoch: The current epoch.
        seen: Images of this epoch that were trained on, over all devices.
        best: Score of the best validation; higher is better.
        best_step: Its step.
        measure: What `best` is: "segm/AP", or "-loss" if there is no AP.
        stale: Validations since the best.
        validated: Step of the last validation.
        sums: Sums of the loss terms since the last line of the log.
        terms: Number of steps in `sums`.
    """

    step: int = 0
    epoch: int = 0
    seen: int = 0
    best: float | None = None
    best_step: int = 0
    measure: str = ""
    stale: int = 0
    validated: int = -1
    sums: dict[str, float] = field(default_factory=dict)
    terms: int = 0


def seed_step(seed: int, *place: int) -> None:
    """Seeds Python's, NumPy's and torch's generators for a place of the run.

    The randomness of a step is a function of (seed, step, pass, rank) alone. There is thus no generator state to save,
    a resumed run draws the same numbers as an uninterrupted one, and a batch that failed can be rerun by itself.

    Args:
        seed: The run's seed.
        *place: Step, pass and rank.
    """
    word = int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
    random.seed(word)
    np.random.seed(word % 2**32)  # noqa: NPY002 - users' augmentations and losses may use the old generator
    torch.manual_seed(word % 2**63)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` atomically; TrainingError if that fails."""
    with atomic_path(path, TrainingError) as part:
        torch.save(state, part)


def load_state(path: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote. Nothing in the file is executed.

    Raises:
        CheckpointError: If the file is not the checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated archive, a foreign pickle: torch raises many types
        raise CheckpointError(
            f"{path}: not the checkpoint of an interrupted run ({_first_line(error)}); "
            "remove it to start a new run, or give another run folder"
        ) from None
    if not isinstance(state, dict) or state.get("format") != "maskwright-run":
        raise CheckpointError(f"{path}: not the checkpoint of an interrupted run; pass weights with `weights=`")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
