"""Validation in the middle of a run: losses and AP of the weights as they are, on all devices together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from maskwright.data import DataWarning, OneClass, things_only
from maskwright.errors import ImageError
from maskwright.evaluation import Evaluator, PanopticEvaluator, match_classes
from maskwright.ops.distributed import local_counts
from maskwright.structures import Batch, Instances, Panoptic
from maskwright.systems import PanopticSystem, ProposalSystem, System
from maskwright.training.state import seed_step

# The first of these that was measured decides which weights are best.
MEASURES = ("panoptic/PQ", "keypoints/AP", "segm/AP", "bbox/AP", "segm/AR100", "bbox/AR100")


def validate(
    fabric: Any, system: System, dataset: Any, *, batch: int, workers: int, seed: int, channels_last: bool
) -> dict[str, float]:
    """`val/loss`, every `val/loss_term`, and the evaluator's summary as `val/segm/AP` and so on; the same on all ranks.

    Rank r takes the images r, r + world, ...: shards may differ by an image, so no collective is called on the way.
    Computed in float32. The random choices inside the losses are the same at every validation.
    """
    if fabric.world_size > 1:
        # Every process counts its own batch statistics; the first one's are those that are saved.
        for buffer in system.buffers():
            torch.distributed.broadcast(buffer, 0)
    proposals = isinstance(system, ProposalSystem)
    if proposals:
        dataset = OneClass(dataset, system.classes[0])
    was_training = system.training
    system.eval()
    try:
        with torch.no_grad(), local_counts():
            pairs, sums, count = _run(fabric, system, dataset, batch, workers, seed, channels_last)
    finally:
        system.train(was_training)
    sums, count = _total(fabric, sums, count)
    values = {f"val/{name}": value / max(count, 1) for name, value in sums.items()}
    gathered = _gather(fabric, pairs)
    if fabric.global_rank == 0:
        values |= {f"val/{name}": float(v) for name, v in _measure(dataset, gathered, proposals).items()}
    return fabric.broadcast(values, src=0)


def score(values: dict[str, float]) -> tuple[str, float]:
    """What decides the best weights, higher being better: AP, or the loss's negative where there is no AP."""
    for name in MEASURES:
        value = values.get(f"val/{name}", math.nan)
        if math.isfinite(value) and value >= 0:  # -1 and NaN say: nothing to measure
            return name, value
    return "-loss", -values.get("val/loss", math.inf)


def _run(
    fabric: Any, system: System, dataset: Any, batch: int, workers: int, seed: int, channels_last: bool
) -> tuple[list[tuple[int, Any]], dict[str, float], int]:
    divided = bool(getattr(dataset, "stuff", ()))
    rename = match_classes(system.classes, dataset.classes)
    mine = list(range(fabric.global_rank, len(dataset), fabric.world_size))
    pairs: list[tuple[int, Any]] = []
    sums: dict[str, float] = {}
    count = 0
    for number, (positions, batched) in enumerate(_batches(system, dataset, mine, batch, workers)):
        if not positions:
            continue
        batched = batched.to(fabric.device)
        images = batched.images
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        raw = system(*system.inputs(images, [place.size for place in batched.placements]))
        for position, objects in zip(positions, system.decode(raw, batched.placements), strict=True):
            labels = rename.to(objects.labels.device)[objects.labels]
            objects = replace(objects, labels=labels)[labels >= 0].to("cpu")
            pairs.append((position, replace(objects, masks=None if objects.masks is None else objects.masks.pack())))
        if divided and isinstance(system, PanopticSystem) and system.can_divide:
            for position, found in zip(positions, system.decode_panoptic(raw, batched.placements), strict=True):
                labels = rename.to(found.things.device)[found.segments.labels]
                segments = replace(found.segments, labels=labels)
                pairs.append((position, Panoptic(segments, found.things)[labels >= 0].to("cpu")))
        seed_step(seed, number, fabric.global_rank)
        terms = {name: float(value) for name, value in system.losses(raw, batched.targets or []).items()}
        for name, value in {**{term_name(n): v for n, v in terms.items()}, "loss": sum(terms.values())}.items():
            sums[name] = sums.get(name, 0.0) + value * len(positions)
        count += len(positions)
    return pairs, sums, count


def _batches(
    system: System, dataset: Any, positions: list[int], batch: int, workers: int
) -> Iterator[tuple[list[int], Batch]]:
    if not positions:
        return iter(())
    images = _Laid(dataset, system, positions)
    return iter(DataLoader(images, batch_size=batch, num_workers=workers, collate_fn=images.collate))


class _Laid(Dataset):
    """Images as the network sees them at test time, with their targets on the same grid."""

    def __init__(self, dataset: Any, system: System, positions: list[int]):
        self.dataset, self.positions = dataset, positions
        self.preprocess, self.classes = system.preprocess, system.classes

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        position = self.positions[index]
        try:
            return position, self.dataset[position]
        except ImageError as error:
            if getattr(self.dataset, "strict", False):
                raise
            warnings.warn(f"{error} (validated as if nothing was found on it)", DataWarning, stacklevel=2)
            return position, None

    def collate(self, items: list[tuple[int, Any]]) -> tuple[list[int], Batch]:
        items = [(position, sample) for position, sample in items if sample is not None]
        if not items:
            return [], Batch(torch.zeros(0, 3, 1, 1), [])
        batch = self.preprocess.collate([s.image for _, s in items], [s.name for _, s in items])
        targets = [self._target(s.target, p) for (_, s), p in zip(items, batch.placements, strict=True)]
        return [i for i, _ in items], replace(batch, targets=targets)

    def _target(self, target: Instances, placement: Any) -> Instances:
        known = match_classes(self.dataset.classes, self.classes)[target.labels]
        keep = known >= 0
        if target.crowd is not None:  # neither right nor wrong: not learnt from in training either
            keep &= ~target.crowd
        return replace(target, labels=known)[keep].place(placement)


def _measure(dataset: Any, pairs: list[tuple[int, Any]], proposals: bool) -> dict[str, float]:
    divided = [(position, found) for position, found in pairs if isinstance(found, Panoptic)]
    summary = _measure_objects(dataset, [(p, found) for p, found in pairs if isinstance(found, Instances)], proposals)
    if divided:
        quality = PanopticEvaluator(dataset)
        for position, found in divided:
            quality.add_at(position, found)
        summary |= quality.result().summary
    return summary


def _measure_objects(dataset: Any, pairs: list[tuple[int, Instances]], proposals: bool) -> dict[str, float]:
    if getattr(dataset, "stuff", ()):
        things = things_only(dataset)
        rename = match_classes(dataset.classes, things.classes)
        pairs = [(p, replace(o, labels=rename[o.labels])) for p, o in pairs]
        pairs = [(p, o[o.labels >= 0]) for p, o in pairs]
        dataset = things
    found = [objects for _, objects in pairs if len(objects)]
    kinds = ["bbox"]
    if not found or any(o.masks is not None for o in found):
        kinds.insert(0, "segm")
    if getattr(dataset, "keypoint_names", None) and any(o.keypoints is not None for o in found):
        kinds.insert(0, "keypoints")
    task, most = ("proposals", 1000) if proposals else ("instances", 100)
    evaluator = Evaluator(dataset, kinds=tuple(kinds), task=task, max_detections=most)
    ids = dataset.image_ids()
    for position, objects in pairs:
        evaluator.add(ids[position], objects)
    return dict(evaluator.result(examples=0).summary)


def _total(fabric: Any, sums: dict[str, float], count: int) -> tuple[dict[str, float], int]:
    """Sums over all ranks; a rank without images does not know the terms' names."""
    if fabric.world_size == 1:
        return sums, count
    parts = _exchange(fabric, (sums, count))
    names = max((s for s, _ in parts), key=len)
    return {n: sum(s.get(n, 0.0) for s, _ in parts) for n in names}, sum(c for _, c in parts)


def _gather(fabric: Any, pairs: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    if fabric.world_size == 1:
        return pairs
    return [pair for part in _exchange(fabric, pairs) for pair in part]


def _exchange(fabric: Any, thing: Any) -> list[Any]:
    """What every rank has, in order of rank; between our own processes only."""
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, thing)
    return parts


def term_name(name: str) -> str:
    """Loss terms are logged as `loss_mask`, whether the system calls them `mask` or `loss_mask`."""
    return name if name.startswith("loss") else f"loss_{name}"
