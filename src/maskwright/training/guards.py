"""What stops a run, and what is saved then: a loss that is not finite, too little memory, a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from maskwright.errors import CheckpointError, TrainingError
from maskwright.structures import Batch, Instances, Masks, Placement
from maskwright.systems import System, system_class
from maskwright.training.state import save_state, seed_step


def keep_batch(
    path: Path, system: System, batch: Batch, terms: Mapping[str, Tensor], place: Sequence[int], amp: bool = False
) -> None:
    """Saves what `replay` needs to compute the same losses again: images, targets, weights, seed."""
    state = {
        "format": "maskwright-batch",
        "system": system.name,
        "options": system.options,
        "model": {k: v.detach().cpu() for k, v in system.state_dict().items()},
        "training": {name: module.training for name, module in system.named_modules()},
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
    if system is None:
        system = system_class(state["system"]).rebuild(state["options"])
    system.load_state_dict(state["model"])
    for name, module in system.named_modules():
        module.training = state["training"].get(name, True)
    targets = [_instances(t) for t in state["targets"]]
    seed_step(*state["place"])
    with torch.autocast("cpu", torch.bfloat16, enabled=state["amp"]):
        raw = system(*system.inputs(state["images"], [target.image_size for target in targets]))
        return system.losses(raw, targets)


def load_batch(path: Path) -> Batch:
    """Reads the images and targets of a batch that stopped a run."""
    state = _kept(path)
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
def memory_advice(batch: int, step: Callable[[], int]) -> Iterator[None]:
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
    """Catches SIGINT (Ctrl-C) and SIGTERM, so that the loop ends after a complete step; a second signal stops at once.

    Signals can be handled in the main thread only; in others this does nothing.

    Attributes:
        asked: Whether a signal has arrived.
    """

    def __init__(self, say: Callable[[str], None]):
        self.asked = False
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._say("stopping after this step; press Ctrl-C again to stop at once")


def _kept(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except Exception:  # not an archive, a foreign pickle: torch raises many types
        state = None
    if not isinstance(state, dict) or state.get("format") != "maskwright-batch":
        raise CheckpointError(f"{path}: not a batch that a training run saved")
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
    return Instances(**{**plain, "image_size": size, "masks": masks})
