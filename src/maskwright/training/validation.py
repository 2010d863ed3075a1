"""Validation during training: losses and AP of the current weights, over all devices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from maskwright.data import Dataset, DataWarning, Sample
from maskwright.data.images import reading
from maskwright.data.workers import advised_once, ignore_signals, iterate
from maskwright.errors import ImageError
from maskwright.evaluation import match_classes
from maskwright.evaluation.measuring import Measurement, measure
from maskwright.evaluation.tasks import TASKS
from maskwright.ops.distributed import local_counts
from maskwright.structures import Batch, Instances, Placement
from maskwright.structures.batching import equal_batches
from maskwright.systems import System
from maskwright.training.state import seed_step

# The first of these that was measured decides which weights are best.
MEASURES = ("panoptic/PQ", "keypoints/AP", "segm/AP", "bbox/AP", "segm/AR100", "bbox/AR100")


def validate(
    fabric: Any,
    system: System,
    dataset: Dataset,
    *,
    batch: int,
    workers: int,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measures losses and AP (PQ too, or recall of proposals) in float32.

    Rank r takes the images r, r + world, ...: shares may differ by an image, so nothing is exchanged on the way. The
    random choices inside the losses are the same in every validation.

    Args:
        fabric: Lightning Fabric.
        system: The system, in the precision of its weights.
        dataset: The validation set, with all its classes.
        batch: Images per batch and process.
        workers: Processes that read images.
        seed: Seed of the random choices in the losses.
        between: Called after each batch; may raise to end the validation.

    Returns:
        `val/loss`, `val/loss_NAME` for every term, and the evaluator's summary as `val/segm/AP` and so on; the same on
        all ranks.
    """
    if fabric.world_size > 1:
        # Every process counts its own batch statistics; those of the first are saved.
        for buffer in system.buffers():
            torch.distributed.broadcast(buffer, 0)
    measurements = _measurements(system, dataset)
    positions = range(fabric.global_rank, len(dataset), fabric.world_size)
    losses = _Losses(system, partial(seed_step, seed), fabric.global_rank)

    def after(raw: Any, batched: Batch) -> None:
        losses.add(raw, batched)
        between()

    was_training = system.training
    system.eval()
    try:
        with local_counts():
            batches = _batches(system, dataset, list(positions), batch, workers, fabric.device)
            measure(batches, measurements, device=fabric.device, after=after)
    finally:
        system.train(was_training)
    gather = partial(_gathered, fabric)
    values = {f"val/{name}": value for name, value in losses.means(gather).items()}
    if fabric.world_size > 1:
        for measurement in measurements:
            measurement.gather(gather)
    if fabric.global_rank == 0:
        for measurement in measurements:
            values |= {f"val/{k}": float(v) for k, v in measurement.result(examples=0).summary.items()}
    return fabric.broadcast(values, src=0)


def score(values: dict[str, float]) -> tuple[str, float]:
    """The measure that decides which weights are best, and its value, higher being better.

    It is AP (or PQ, or recall), or the negative loss if there is none of them.
    """
    for name in MEASURES:
        value = values.get(f"val/{name}", math.nan)
        if math.isfinite(value) and value >= 0:  # -1 and NaN: there was nothing to measure
            return name, value
    return "-loss", -values.get("val/loss", math.inf)


def _measurements(system: System, dataset: Dataset) -> list[Measurement]:
    """What is measured: objects (or proposals), and segments too if the data set has regions and the system predicts
    them.
    """
    names = ["proposals" if "proposals" in system.tasks else "instances"]
    if dataset.stuff and "panoptic" in system.tasks:
        names.append("panoptic")
    return [Measurement(TASKS[name], system, TASKS[name].view(dataset, system)) for name in names]


class _Losses:
    """Sums of the loss terms over images."""

    def __init__(self, system: System, seed: partial[None], rank: int):
        self.system, self.seed, self.rank = system, seed, rank
        self.sums: dict[str, float] = {}
        self.images = self.batches = 0

    def add(self, raw: Any, batch: Batch) -> None:
        self.seed(self.batches, self.rank)
        terms = {name: float(value) for name, value in self.system.losses(raw, batch.targets or []).items()}
        for name, value in {**{term_name(n): v for n, v in terms.items()}, "loss": sum(terms.values())}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * len(batch)
        self.images += len(batch)
        self.batches += 1

    def means(self, gather: partial[list[Any]]) -> dict[str, float]:
        """Means over the images of all ranks; a rank without images does not know the names of the terms."""
        parts = gather((self.sums, self.images))
        names = max((sums for sums, _ in parts), key=len)
        count = max(1, sum(images for _, images in parts))
        return {name: sum(sums.get(name, 0.0) for sums, _ in parts) / count for name in names}


def _batches(
    system: System, dataset: Dataset, positions: list[int], batch: int, workers: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    if not positions:
        return
    images = _Validated(dataset, system, positions)
    sizes = dataset.sizes()
    shapes = [system.preprocess.padded_size(*sizes[position]) for position in positions]
    groups = equal_batches(shapes, batch)  # padding would change the result
    with advised_once(workers):
        loader = DataLoader(
            images,
            batch_sampler=groups,
            num_workers=workers,
            collate_fn=images.collate,
            worker_init_fn=ignore_signals,
            # Without its own generator it would use the global one.
            generator=torch.Generator(),
        )
    for found, batched in iterate(loader):
        if found:
            yield found, batched.to(device)


class _Validated(TorchDataset[tuple[int, Sample | None]]):
    """Images as the network sees them in evaluation, with their targets in the same frame."""

    def __init__(self, dataset: Dataset, system: System, positions: list[int]):
        self.dataset, self.positions, self.preprocess = dataset, positions, system.preprocess
        if "proposals" in system.tasks:
            self.labels = torch.zeros(len(dataset.classes), dtype=torch.int64)
        else:
            self.labels = match_classes(dataset.classes, system.classes)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Sample | None]:
        position = self.positions[index]
        try:
            with reading(self.preprocess):
                return position, self.dataset[position]
        except ImageError as error:
            if self.dataset.strict:
                raise
            warnings.warn(f"{error} (validated as an image without predictions)", DataWarning, stacklevel=2)
            return position, None

    def collate(self, items: list[tuple[int, Sample | None]]) -> tuple[list[int], Batch]:
        """A batch of the images that could be read, and their positions."""
        samples = [(position, sample) for position, sample in items if sample is not None]
        if not samples:
            return [], Batch(torch.zeros(0, 3, 1, 1), [])
        batch = self.preprocess.collate([s.image for _, s in samples], [s.name for _, s in samples])
        targets = [self._target(s.target, p) for (_, s), p in zip(samples, batch.placements, strict=True)]
        return [position for position, _ in samples], replace(batch, targets=targets)

    def _target(self, target: Instances, placement: Placement) -> Instances:
        labels = self.labels[target.labels]
        keep = labels >= 0
        if target.crowd is not None:  # crowd regions count neither as right nor as wrong, in training either
            keep &= ~target.crowd
        return replace(target, labels=labels)[keep].place(placement)


def _gathered(fabric: Any, own: Any) -> list[Any]:
    """The objects of all ranks, in order; between our own processes only."""
    if fabric.world_size == 1:
        return [own]
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, own)
    return parts


def term_name(name: str) -> str:
    """The name that a loss term is logged under: `loss_mask`, whether the system calls it `mask` or `loss_mask`."""
    return name if name.startswith("loss") else f"loss_{name}"
