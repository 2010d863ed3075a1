"""What stops a run, and what is saved then: a loss that is not finite, too little memory, a signal."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskwright.errors import CheckpointError, TrainingError, interruption
from maskwright.structures import Batch, Instances, Masks, Placement
from maskwright.systems import System, system_class
from maskwright.training.state import entries_of, read_sealed, save_state, seed_step


def keep_batch(
    path: Path, system: System, batch: Batch, terms: Mapping[str, Tensor], place: Sequence[int], amp: bool = False
) -> None:
    """Saves what `replay` needs to compute the same losses again: images, targets, weights, seed."""
    modules = cast("Iterator[tuple[str, nn.Module]]", system.named_modules())  # not annotated in torch
    state: dict[str, Any] = {
        "format": "maskwright-batch",
        "system": system.name,
        "options": system.options,
        "model": {k: v.detach().cpu() for k, v in system.state_dict().items()},
        "training": {name: module.training for name, module in modules},
        "images": batch.images.detach().cpu(),
        "targets": [_plain(t) for t in batch.targets or []],
        "placements": [vars(p) for p in batch.placements],
        "names": list(batch.names or []),
        "place": list(place),
        "amp": amp,
        "losses": {name: float(value.detach()) for name, value in terms.items()},
    }
    save_state(path, state)


def replay(path: Path, system: System | None = None) -> dict[str, Tensor]:
    """Computes the losses of a batch that stopped a run again, on the CPU, with the weights of that moment.

    Args:
        path: The saved batch. Nothing in it is executed.
        system: Needed only for a system that is not in the registry; its weights are replaced.

    Returns:
        The loss terms by name.
    """
    state = _kept(path)
    with entries_of(path):
        if system is None:
            system = system_class(state["system"]).rebuild(state["options"])
        system.load_state_dict(state["model"])
        modules = cast("Iterator[tuple[str, nn.Module]]", system.named_modules())
        for name, module in modules:
            module.training = state["training"].get(name, True)
        targets = [_instances(t) for t in state["targets"]]
        seed_step(*state["place"])
    with torch.autocast("cpu", torch.bfloat16, enabled=state["amp"]):
        raw = system(*system.inputs(state["images"], [target.image_size for target in targets]))
        return system.losses(raw, targets)


def load_batch(path: Path) -> Batch:
    """Reads the images and targets of a batch that stopped a run."""
    state = _kept(path)
    with entries_of(path):
        placements = [Placement(**p) for p in state["placements"]]
        return Batch(state["images"], placements, [_instances(t) for t in state["targets"]], state["names"])


def not_finite(path: Path, step: int, terms: Mapping[str, Tensor], names: Sequence[str] | None) -> TrainingError:
    """The error for a loss or gradient that is not finite."""
    bad = [f"{name} = {float(v.detach())}" for name, v in terms.items() if not torch.isfinite(v).all()]
    what = ", ".join(bad) if bad else "the gradient (every loss term is finite)"
    images = ", ".join(names or []) or "unnamed images"
    return TrainingError(
        f"step {step}: not a finite number: {what}, on {images}. The weights were not changed. The batch was saved to "
        f"{path}; maskwright.training.replay computes its losses again. Try a lower learning rate, a longer warm-up or "
        "gradient clipping."
    )


@contextmanager
def memory_advice(batch: int, step: Callable[[], int]) -> Generator[None, None, None]:
    """Turns a failed allocation into a TrainingError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        # torch.OutOfMemoryError is a RuntimeError; the host's allocator raises a plain one.
        signs = ("out of memory", "not enough memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise
        smaller = "half the batch with twice the accumulate, " if batch > 1 else ""
        raise TrainingError(
            f"step {step()}: out of memory with {batch} image{'s' if batch > 1 else ''} at once on a device; try "
            f"{smaller}smaller images (short, long) or amp='bf16', and run again with resume: the last checkpoint is "
            f"intact. ({(text.strip() or type(error).__name__).splitlines()[0]})"
        ) from error


class Stop:
    """Catches SIGINT (Ctrl-C), SIGTERM and SIGHUP, so that the loop ends after a complete step.

    A second signal stops at once. It counts from `TWICE` seconds after the first on: `timeout`, container runtimes and
    other wrappers deliver one signal both to the process and to its group.

    Signals can be handled in the main thread only. In another thread the run stops if Ctrl-C has ended the main thread,
    or the interpreter ends, which waits for it; see `waited_for`.

    Args:
        say: Prints a line for the user.

    Attributes:
        number: The signal that has arrived; None for none.
    """

    TWICE = 0.3

    def __init__(self, say: Callable[[str], None]):
        self.number: int | None = None
        self._say = say
        self._before: dict[int, Any] = {}
        self._first = 0.0

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        if self.number is None and _main_was_interrupted():
            self.number = signal.SIGINT
        return self.number is not None

    def interruption(self, message: str) -> KeyboardInterrupt:
        """The exception to raise when everything is saved."""
        return interruption(message, self.number or signal.SIGINT)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._notice)
            hangup = getattr(signal, "SIGHUP", None)
            if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # `nohup` ignores it
                self._before[hangup] = signal.signal(hangup, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is not None:
            if now - self._first < self.TWICE:
                return
            raise interruption("stopped at once, before the step was complete; the last checkpoint is intact", number)
        self.number, self._first = number, now
        with suppress(RuntimeError):  # the signal has arrived while the same stream was being written
            again = "press Ctrl-C" if number == signal.SIGINT else f"send {signal.Signals(number).name}"
            self._say(f"stopping after this step; {again} again to stop at once")


_elsewhere: dict[threading.Event, threading.Thread] = {}  # one for each run in a thread that is not the main one
_ending = threading.Event()  # the interpreter ends


@contextmanager
def waited_for() -> Generator[None, None, None]:
    """The block that the interpreter waits for when it ends, if another thread than the main one executes it.

    A `join` that Ctrl-C interrupts makes Python 3.11 regard the joined thread as ended. Daemon threads are not waited
    for at all.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    done = threading.Event()
    _elsewhere[done] = threading.current_thread()
    try:
        yield
    finally:
        done.set()
        if not _ending.is_set():
            _elsewhere.pop(done)


@atexit.register
def _finish_elsewhere() -> None:
    _ending.set()
    runs = list(_elsewhere.items())
    for done, _ in runs:
        done.wait()
    # What ended a run is printed by its thread after this. The limit is for threads that do other work afterwards.
    deadline = time.monotonic() + 5
    for _, thread in runs:
        while thread in threading.enumerate() and time.monotonic() < deadline:
            time.sleep(0.01)


def _main_was_interrupted() -> bool:
    """Whether this is not the main thread, and Ctrl-C or the end of the script has ended that."""
    if threading.current_thread() is threading.main_thread():
        return False
    if _ending.is_set():
        return True
    if threading.main_thread().is_alive():
        return False
    return issubclass(getattr(sys, "last_type", None) or object, KeyboardInterrupt)


def _kept(path: Path) -> dict[str, Any]:
    path = Path(path)
    other = "not a batch that a training run saved"
    state = read_sealed(path, other, "run again until it is saved anew")
    if state.get("format") != "maskwright-batch":
        raise CheckpointError(f"{path}: {other}")
    return state


def _plain(target: Instances) -> dict[str, Any]:
    """An annotation as tensors, numbers and strings."""
    tensors = ("boxes", "labels", "scores", "keypoints", "crowd", "ids")
    plain: dict[str, Any] = {
        name: None if (value := getattr(target, name)) is None else value.detach().cpu() for name in tensors
    }
    plain["image_size"] = list(target.image_size)
    plain["masks"] = None if target.masks is None else [c["counts"].decode("ascii") for c in target.masks.rle()]
    return plain


def _instances(plain: dict[str, Any]) -> Instances:
    size = (plain["image_size"][0], plain["image_size"][1])
    masks = None if plain["masks"] is None else Masks.from_rle(plain["masks"], size)
    whole: dict[str, Any] = {**plain, "image_size": size, "masks": masks}
    return Instances(**whole)
