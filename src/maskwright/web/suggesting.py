"""Suggestions: objects that a trained system finds in the background, and those that a person has asked for."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from maskwright.errors import DataError, MaskwrightError, UsageError
from maskwright.inference.journal import digest
from maskwright.inference.predicting import predict
from maskwright.inference.preparing import prepare
from maskwright.structures import Instances
from maskwright.systems import System
from maskwright.web.assistant import Assistant
from maskwright.web.journal import Journal, Place
from maskwright.web.objects import Object, masks_of, step
from maskwright.web.project import Project
from maskwright.web.proposing import answers_by_box, free_of, packed
from maskwright.web.states import State

LEAST = 0.1  # score of the objects by which the uncertainty of an image is judged
HELD = 256  # images whose proposals are kept
NICE = 10  # of threads that work ahead


class Suggester:
    """Objects that a trained system finds in the images of a project, computed by a thread of its own.

    Results are kept on the disk, by the digest of the weights.

    Args:
        project: The project.
        system: The system.
        assistant: Gives objects of systems without masks their masks.
        threshold: Objects with lower scores are not suggested.
        device: Where to compute; None: a GPU if there is one.
        notify: Called on the thread with the number of an image whose suggestions are new.

    Attributes:
        name: The name of the system.
        system: The prepared system.

    Raises:
        UsageError: If the system has no masks and there is no assistant.
    """

    def __init__(
        self,
        project: Project,
        system: System,
        assistant: Assistant | None = None,
        threshold: float = 0.5,
        device: str | None = None,
        notify: Callable[[int], None] | None = None,
    ):
        if "masks" not in system.outputs and assistant is None:
            raise UsageError(
                f"{system.name} finds boxes only; give a promptable system too, for their masks (--weights)"
            )
        self.project, self.assistant, self.threshold = project, assistant, threshold
        self.name, self.notify = system.name, notify
        self.mark = digest(system)[:12]
        self.device = device
        self.system = prepare(system, device)
        self._lock = threading.Lock()
        self._found = dict[int, tuple[Place, float]]()  # place of the objects, uncertainty
        self._failed = set[int]()
        self._wanted = deque[int]()
        self._wake = threading.Event()
        self._stopping = False
        self._ranked: list[int] | None = None
        self._journal = self._opened(project.folder / "suggestions" / f"{self.name}-{self.mark}.jsonl")
        self._thread = threading.Thread(target=self._work, name="maskwright-suggest", daemon=True)

    def _opened(self, path: Path) -> Journal:
        """The journal of earlier sessions, or an empty one if it cannot be used."""
        try:
            journal = Journal(path, {"system": self.mark}, sync=False)
        except DataError:
            path.unlink(missing_ok=True)
            journal = Journal(path, {"system": self.mark}, sync=False)
        for record in journal.records():
            index = self.project.position(record.head["image"])
            if index is not None and record.head["stamp"] == self._stamp(index):
                self._found[index] = record.place, record.head["uncertainty"]
        return journal

    def _stamp(self, index: int) -> str:
        return self.project.source.stamp(index).rpartition("|")[0].rpartition("/")[2]

    def start(self) -> None:
        """Begin to predict: images that are asked for first, then all that are not complete."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._journal.close()

    def ask(self, index: int) -> None:
        """Predict an image next."""
        with self._lock:
            if index not in self._found:
                self._wanted.appendleft(index)
                self._wake.set()

    def ranked(self) -> list[int]:
        """Return the images with suggestions, least certain first."""
        with self._lock:
            if self._ranked is None:
                self._ranked = sorted(self._found, key=lambda index: (-self._found[index][1], index))
            return self._ranked

    @property
    def progress(self) -> tuple[int, int]:
        """The number of images that have been predicted, and of all."""
        return len(self._found), len(self.project)

    def objects(self, index: int) -> list[Object]:
        """Return the suggestions for an image; empty if it has not been predicted."""
        with self._lock:
            found = self._found.get(index)
            if found is None or self._stopping:
                return []
            values = self._journal.body(found[0])
        labels = self._labels()
        return [
            replace(Object.of_stored(value), label=None if value["label"] is None else labels[value["label"]])
            for value in values
        ]

    def _labels(self) -> list[int | None]:
        """The class of the project of each class of the system."""
        names = self.project.classes
        if len(names) == 1 == len(self.system.classes):
            return [0]
        return [names.index(name) if name in names else None for name in self.system.classes]

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        be_nice()
        position = 0
        while not self._stopping:
            index, position = self._next(position)
            if index is None:
                self._wake.wait(5.0)
                self._wake.clear()
                continue
            try:
                self._predict(index)
            except (MaskwrightError, RuntimeError, OSError):  # unreadable image, full disk or memory
                self._failed.add(index)
            if self.notify is not None and not self._stopping:
                self.notify(index)

    def _next(self, position: int) -> tuple[int | None, int]:
        """The next image without suggestions, and where to continue."""
        with self._lock:
            while self._wanted:
                index = self._wanted.popleft()
                if index not in self._found:
                    return index, position
        while position < len(self.project):
            if position not in self._found and position not in self._failed and not self.project.is_done(position):
                return position, position + 1
            position += 1
        return None, position

    def find(self, index: int) -> Instances:
        """Return all objects that the system finds in an image, with masks.

        Raises:
            ImageError: If it cannot be read.
        """
        image = self.project.source.read(index)
        found = predict(self.system, image, device=self.device, score_threshold=LEAST).found()
        if found.masks is None:
            assert self.assistant is not None
            boxes = found.boxes
            found = found[(boxes[:, 2:] > boxes[:, :2]).all(1)]
            answers = answers_by_box(self.assistant.system, self.assistant.embedding(index), found.boxes)
            if len(answers) != len(found):  # some answers were empty
                return answers
            return replace(answers, labels=found.labels, scores=found.scores)
        return packed(found)

    def _predict(self, index: int) -> None:
        found = self.find(index)
        assert found.masks is not None
        assert found.scores is not None
        scores = cast("list[float]", cast(Any, found.scores).tolist())
        labels = cast("list[int]", cast(Any, found.labels).tolist())
        made = (step(self.name, "model"),)
        objects = [
            Object(f"s{self.mark[:8]}-{n}", label, code["counts"].decode("ascii"), made, 0, round(score, 4))
            for n, (label, score, code) in enumerate(zip(labels, scores, found.masks.rle(), strict=True))
            if score >= self.threshold
        ]
        doubt = uncertainty(scores, self.threshold)
        head = {"image": self.project.source.key(index), "stamp": self._stamp(index), "uncertainty": doubt}
        with self._lock:
            if not self._stopping:
                self._found[index] = self._journal.append(head, [one.stored() for one in objects]), doubt
                self._ranked = None


def uncertainty(scores: Sequence[float], threshold: float) -> float:
    """Return the expected number of wrong suggestions and of objects that are missed, per object.

    Scores are taken as probabilities: a suggestion that scores s is wrong with 1 - s, and an object that scores less
    than the threshold is there with s. Those above 1, which some systems give, count as 1.
    """
    scores = [min(1.0, score) for score in scores]
    shown = [score for score in scores if score >= threshold]
    hidden = [score for score in scores if LEAST <= score < threshold]
    return round((sum(1 - score for score in shown) + sum(hidden)) / (len(shown) + 1), 5)


def be_nice() -> None:
    """Let other threads of this process go first, where the system can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Suggestions:
    """All suggestions for the images of a project; may be used from any thread.

    Attributes:
        suggester: The trained system; None without.
    """

    def __init__(self, suggester: Suggester | None = None):
        self.suggester = suggester
        self._lock = threading.Lock()
        self._proposed = OrderedDict[int, list[Object]]()

    def propose(self, index: int, objects: Sequence[Object]) -> None:
        """Add what a person has asked for to the suggestions of an image."""
        with self._lock:
            before = self._proposed.pop(index, [])
            self._proposed[index] = [*before, *objects]
            while len(self._proposed) > HELD:
                self._proposed.popitem(last=False)

    def of(self, index: int, state: State) -> list[Object]:
        """Return the suggestions for an image that are neither accepted nor dismissed nor on an object.

        Args:
            index: The image.
            state: Its objects; a complete image has no suggestions.
        """
        if state.done:
            return []
        with self._lock:
            proposed = list(self._proposed.get(index, ()))
        found = [*(self.suggester.objects(index) if self.suggester is not None else ()), *proposed]
        found = [one for one in found if one.id not in state.objects and one.id not in state.dismissed]
        if not found:
            return []
        free = free_of(masks_of(found, state.size), masks_of(list(state.objects.values()), state.size))
        found = [one for one, is_free in zip(found, free, strict=True) if is_free]
        return without_twins(found, state)

    def ranked(self) -> list[int]:
        """Return the images with suggestions of the trained system, least certain first."""
        return [] if self.suggester is None else self.suggester.ranked()


def without_twins(found: Sequence[Object], state: State) -> list[Object]:
    """Return suggestions without those that are nearly equal to an earlier one."""
    if len(found) < 2:
        return list(found)
    masks = masks_of(found, state.size)
    same = masks.iou(masks) > 0.8
    kept: list[int] = []
    for n in range(len(found)):
        if not bool(same[n, kept].any()):
            kept.append(n)
    return [found[n] for n in kept]
