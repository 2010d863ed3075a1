"""What a run needs to go on as if nothing had happened: files that are whole or absent, and reproducible randomness."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.errors import CheckpointError, TrainingError

LAST = "last.ckpt"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps done
    epoch: int = 0  # the epoch we are in
    seen: int = 0  # images of this epoch that were learnt from, over all devices
    best: float | None = None  # the best validation's score, higher is better
    best_step: int = 0
    measure: str = ""  # what `best` is: "segm/AP", or "-loss" where there is no AP
    stale: int = 0  # validations since the best
    validated: int = -1  # the step of the last validation
    sums: dict[str, float] = field(default_factory=dict)  # of the loss terms since the last line of the log
    terms: int = 0  # how many were added


def seed_step(seed: int, *place: int) -> None:
    """Set python's, numpy's and torch's generators to what belongs to this place of the run.

    The randomness of a step is a function of (seed, step, pass, rank) alone. There is thus no generator state to save,
    a resumed run draws what the uninterrupted one draws, and a batch that went wrong can be run again on its own.
    """
    word = int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0])
    random.seed(word)
    np.random.seed(word % 2**32)  # noqa: NPY002 - users' augmentations and losses may use the old generator
    torch.manual_seed(word % 2**63)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path` and rename: at any moment there is one whole file, the old one or the new one."""
    beside = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote. Nothing in the file is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn zip, a foreign pickle: torch raises many kinds
        raise CheckpointError(
            f"{path}: not the checkpoint of an interrupted run ({_first_line(error)}); "
            "remove it to start anew, or give another run folder"
        ) from None
    if not isinstance(state, dict) or state.get("format") != "maskwright-run":
        raise CheckpointError(f"{path}: not the checkpoint of an interrupted run; weights go in with `weights=`")
    return state


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one sentence; what was there before is untouched, since files are renamed into place."""
    try:
        yield
    # torch and safetensors report a full disk as a RuntimeError or as an exception of their own.
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"{path}: could not be written ({_first_line(error)}); what was there before is intact. "
            "Make room and run again with resume."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise TrainingError(
            f"{path}: could not be written ({_first_line(error)}); what was there before is intact. "
            "Make room and run again with resume."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write beside and rename."""
    beside = path.with_name(path.name + ".part")
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
