"""Logging of a run: rows in log.csv, TensorBoard, a user's logger, and a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maskwright.errors import MissingExtraError, TrainingError
from maskwright.files import write_errors_as
from maskwright.text import encodable, printable

HEADER = "step,epoch,name,value\n"


class Logger(Protocol):
    """A further destination of figures: Weights & Biases, MLflow, a list. Called on the first process only."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Receives the figures of a step by name."""
        ...


class Logs:
    """The logs in the run folder, written by the first process; on others (`active=False`) every method does nothing.

    log.csv has the columns step, epoch, name, value. Its length is part of a checkpoint: a resumed run truncates what
    was written later, so that no row is lost or repeated.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool = True,
        tensorboard: bool = True,
        jsonl: bool = False,
        logger: Logger | None = None,
        kept: Mapping[str, int] | None = None,
        step: int = 0,
    ):
        self.active, self.logger = active, logger
        self.csv, self.jsonl, self.board = folder / "log.csv", folder / "log.jsonl", None
        self._files: dict[str, Any] = {}
        if not active:
            return
        kept = kept or {}
        self._open("csv", self.csv, kept.get("csv", 0))
        if not self._files["csv"].tell():
            self._files["csv"].write(HEADER)
        if jsonl:
            self._open("jsonl", self.jsonl, kept.get("jsonl", 0))
        if tensorboard:
            with write_errors_as(TrainingError, folder / "tensorboard", folder / "tensorboard"):
                self.board = _board(folder / "tensorboard", step)
        self.flush()

    def _open(self, name: str, path: Path, kept: int) -> None:
        with write_errors_as(TrainingError, path):
            path.touch()
            if path.stat().st_size > kept:
                os.truncate(path, kept)
            self._files[name] = path.open("a", encoding="utf-8", newline="")

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Writes one row per value to every log."""
        if not self.active:
            return
        with write_errors_as(TrainingError, self.csv):
            rows = csv.writer(self._files["csv"], lineterminator="\n")
            rows.writerows((step, epoch, name, repr(float(value))) for name, value in values.items())
            if "jsonl" in self._files:
                finite = {n: float(v) if math.isfinite(v) else None for n, v in values.items()}
                self._files["jsonl"].write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
            self.flush()
        if self.board is not None:
            with write_errors_as(TrainingError, self.csv.with_name("tensorboard")):
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
        if self.logger is not None:
            self.logger.log(step, dict(values))

    def flush(self) -> None:
        """Passes everything written to the operating system."""
        for file in self._files.values():
            file.flush()

    def lengths(self) -> dict[str, int]:
        """The length of each file in bytes, after flushing to disk; stored in checkpoints."""
        with write_errors_as(TrainingError, self.csv):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes all logs."""
        # Closing writes what is left, which fails once more where writing has failed. Rows that a checkpoint counts are
        # on the disk already, see `lengths`.
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.close()


class Display:
    """A progress bar with loss, learning rate and remaining time on a terminal; otherwise a line every few seconds."""

    def __init__(
        self, total: int, *, start: int = 0, active: bool = True, every: float = 15.0, console: Console | None = None
    ):
        self.console = console or Console(stderr=True)
        self.active, self.total, self.every, self.start = active, total, every, start
        self.begun = self.shown = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        if self.active and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=self.total, completed=self.start, numbers="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            text = encodable(printable(text, keep="\n"), self.console.encoding)
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, epoch: int, loss: float, rate: float) -> None:
        """Shows the state after step number `step`."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.update(
                self.task, completed=step, description=f"epoch {epoch + 1}", numbers=f"loss {loss:.4f}  lr {rate:.2e}"
            )
            return
        now = time.monotonic()
        if now - self.shown >= self.every or step == self.total:
            self.shown = now
            left = (now - self.begun) / max(1, step - self.start) * (self.total - step)
            self.say(
                f"step {step}/{self.total}  epoch {epoch + 1}  loss {loss:.4f}  lr {rate:.2e}  {_clock(left)} left"
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError("tensorboard", "train") from None
    # Hides what the interrupted run wrote after its last checkpoint.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
