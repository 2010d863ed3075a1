"""Training on what is labelled, from the page: a process of its own, whose progress is read from its run folder."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maskwright.data.convert import convert_data
from maskwright.errors import UsageError
from maskwright.files import write_json
from maskwright.web.exporting import free_folder, parts_of, surveyed
from maskwright.web.project import Project

SYSTEM = "mask-rcnn-small"
STEPS = 500
MOST_STEPS = 1_000_000
FEW = 10  # images below which all are trained on, and none is held out to validate on
GRACE = 30.0  # seconds that a stopped training has to end


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        state: What it does.
        step: Steps that are done.
        steps: Steps in all.
        ap: Mask AP on images that were held out; None if there is none yet.
        message: Why it failed, or what else is worth knowing.
    """

    state: Literal["idle", "running", "done", "failed"] = "idle"
    step: int = 0
    steps: int = 0
    ap: float | None = None
    message: str | None = None

    def public(self) -> dict[str, Any]:
        """Return what the page gets."""
        value: dict[str, Any] = {"state": self.state, "step": self.step, "steps": self.steps}
        value |= {} if self.ap is None else {"ap": round(self.ap, 4)}
        return value | ({} if self.message is None else {"message": self.message})


class Trainer:
    """Trains on the images of a project that are complete.

    Args:
        project: The project.
        system: A system, a preset, or weights to continue from.
        device: Where to train; None: a GPU if there is one.
        tell: Called on the event loop when the progress has changed.
        trained: Called on the event loop with the new weights.

    Attributes:
        progress: How far the training is.
    """

    def __init__(
        self,
        project: Project,
        system: str = SYSTEM,
        device: str | None = None,
        tell: Callable[[Progress], None] | None = None,
        trained: Callable[[Path], None] | None = None,
    ):
        self.project, self.system, self.device = project, system, device
        self.tell, self.trained = tell, trained
        self.progress = Progress()
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @staticmethod
    def is_possible() -> bool:
        """Return whether what training needs is installed."""
        return importlib.util.find_spec("lightning_fabric") is not None or (
            importlib.util.find_spec("lightning") is not None
        )

    def start(self, steps: int | None = None) -> None:
        """Begin to train; returns at once.

        Args:
            steps: Number of steps; None: `STEPS`.

        Raises:
            UsageError: If a training runs already, or there is nothing to train on.
        """
        if self._task is not None and not self._task.done():
            raise UsageError("a training runs already; stop it first")
        if not self.is_possible():
            raise UsageError("training needs the extra train; run: pip install 'maskwright[train]'")
        if not self.images():
            raise UsageError("there is nothing to train on yet: no image is marked as done or has objects")
        self._stopped = False
        self._set(Progress("running", 0, steps or STEPS))
        self._task = asyncio.create_task(self._run(steps or STEPS))

    def images(self) -> list[int]:
        """Return the images to train on: those that are complete; if there are fewer than two, all with objects."""
        done = list(self.project.listed("done"))
        chosen = done if len(done) >= 2 else self.project.labelled()
        return [position for position in chosen if self.project.source.is_there(position)]

    async def stop(self) -> None:
        """End the training; what it has saved is kept."""
        self._stopped = True
        process, task = self._process, self._task
        if process is not None:
            await asyncio.get_running_loop().run_in_executor(None, end, process)
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def _set(self, progress: Progress) -> None:
        if progress != self.progress:
            self.progress = progress
            if self.tell is not None:
                self.tell(progress)

    async def _run(self, steps: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            folder, plan = await loop.run_in_executor(None, self._prepare, steps)
            if self._stopped:
                self._set(Progress("idle", 0, steps))
                return
            await self._follow(folder, plan, steps)
        except Exception as error:  # whatever it is, the page must not show a training that has ended
            self._set(Progress("failed", self.progress.step, steps, None, str(error) or type(error).__name__))
        finally:
            self._process = None

    def _prepare(self, steps: int) -> tuple[Path, Path]:
        """Write the data set and the plan."""
        folder = free_folder(self.project.folder / "training", "run")
        images = self.images()
        snapshot = self.project.snapshot()
        try:
            parts = parts_of(snapshot, images, "train", surveyed(snapshot, images).mixed)
            source = {part.split: part.dataset for part in parts}
            convert_data(source, folder / "data", "coco", allow_loss=True, link=True)
        finally:
            snapshot.close()
        recipe: dict[str, Any] = {
            "steps": steps, "log_every": 5, "val_every": 1_000_000, "workers": 1, "tensorboard": False,
            "device": self.device or "auto",
        }  # fmt: skip
        val = 0.2 if len(images) >= FEW else False
        plan = {
            "system": self.system, "data": str(folder / "data"), "out": str(folder / "out"), "val": val,
            "recipe": recipe,
        }  # fmt: skip
        return folder / "out", write_json(folder / "plan.json", plan)

    def command(self, plan: Path) -> list[str]:
        """Return the command that trains as a plan says."""
        return [sys.executable, "-m", "maskwright.web.trainee", str(plan), str(os.getpid())]

    async def _follow(self, out: Path, plan: Path, steps: int) -> None:
        """Run the process, and report what it writes."""
        loop = asyncio.get_running_loop()
        with (plan.parent / "output.txt").open("wb") as log:
            self._process = subprocess.Popen(
                self.command(plan),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while self._process.poll() is None:
            await asyncio.sleep(0.5)
            step, ap = await loop.run_in_executor(None, read_log, out / "log.csv")
            if self._process.poll() is None:
                self._set(Progress("running", step, steps, ap))
        step, ap = read_log(out / "log.csv")
        weights = out / "best.safetensors"
        if self._process.returncode == 0 and weights.exists():
            self._set(Progress("done", steps, steps, ap))
            if self.trained is not None:
                self.trained(weights)
        elif self._stopped:
            self._set(Progress("idle", step, steps, None, "the training was stopped"))
        else:
            self._set(Progress("failed", step, steps, None, problem(plan.parent)))


def read_log(path: Path) -> tuple[int, float | None]:
    """Return the last step of a training's log, and its mask AP if there is one."""
    step, ap = 0, None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = max(step, int(row["step"]))
                if row["name"] == "val/segm/AP":
                    ap = float(row["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return step, ap
    return step, ap


def problem(folder: Path) -> str:
    """Return why a training has failed."""
    for path in (folder / "out" / "problem.txt", folder / "output.txt"):
        try:
            lines = path.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            continue
        if lines:
            return lines[-1][:500]
    return f"the training has failed; see {folder}"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process: it is asked to, and killed if it has not ended after some time."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM if sys.platform != "win32" else signal.CTRL_C_EVENT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
