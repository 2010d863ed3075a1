"""From a data set to batches, the same ones however many processes read the images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from maskwright.data.augment import Augment, Drawn, Laid, place_target
from maskwright.data.dataset import Sample, mirrored_keypoints
from maskwright.data.findings import DataWarning
from maskwright.errors import DataError, ImageError, UsageError
from maskwright.structures import Batch, Instances, Placement, Preprocess


class Loader:
    """Batches of a data set; made by `make_loader`. Iterating gives the current epoch, `set_epoch` chooses it.

    In training an epoch is every image once in an order drawn from (seed, epoch), images that are taller than wide
    apart from the others so that little is padded, and every batch is full: the last one is filled up with images
    from the epoch's beginning. A batch over all ranks together is the same whatever their number, and what happens to
    the image at position k depends on (seed, epoch, k) alone: not on workers, nor on where a run was resumed.

    Otherwise it is every image once in the set's own order, rank r taking r, r + world, ...; the last batch may be
    smaller and ranks may differ by one batch.
    """

    def __init__(self, plan: _Plan, workers: int, pin: bool):
        self.plan, self.workers, self.pin = plan, workers, pin
        self.epoch, self._start = 0, 0
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.plan.count

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration gives this epoch from batch `start` on."""
        self.epoch, self._start = epoch, start

    def indices(self, epoch: int | None = None) -> list[list[int]]:
        """Which images of the data set are in each batch of an epoch on this rank."""
        at = self.epoch if epoch is None else epoch
        order = self.plan.order(at)
        return [[int(order[k]) for k in self.plan.positions(number)] for number in range(len(self))]

    def __iter__(self) -> Iterator[Batch]:
        keys = [(self.epoch, number) for number in range(self._start, len(self))]
        self._start = 0
        if not self.workers:
            results: Any = map(self.plan.__getitem__, keys)
        else:
            results = self._read(keys)
        for result in results:
            if isinstance(result, DataError):
                raise result
            for note in result.notes:
                warnings.warn(note, DataWarning, stacklevel=2)
            batch = result.unpack()
            if batch is not None:
                yield batch

    def _read(self, keys: list[tuple[int, int]]) -> Any:
        if self._loader is None:
            self._keys = _Keys()
            self._loader = DataLoader(
                self.plan,  # pyright: ignore[reportArgumentType] - any object with __getitem__ will do
                batch_size=None,
                sampler=self._keys,
                num_workers=self.workers,
                persistent_workers=True,
                pin_memory=self.pin,
                # Without a generator of its own it would draw from the global one, which belongs to the losses.
                generator=torch.Generator(),
            )
        self._keys.keys = keys
        with warnings.catch_warnings():
            # From Python 3.12 on forking a process with threads warns, and torch always has threads. The workers
            # neither compute with those nor touch a GPU.
            warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
            return iter(self._loader)


def make_loader(
    dataset: Any,
    preprocess: Preprocess,
    *,
    batch_size: int,
    training: bool,
    augment: Augment | None = None,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_crowd: bool | None = None,
    pin: bool = False,
) -> Loader:
    """Batches of `batch_size` images per rank, as `preprocess` lays them, with targets on the network's grid.

    dataset     a `Dataset`, or anything with its methods
    augment     what may happen to images in training; None: nothing
    workers     processes that read images; 0: this one
    drop_crowd  leave crowd regions out of the targets; by default in training only. No system learns from them as
                objects, and Mask R-CNN's published recipes do not know them at all.
    pin         give images in pinned memory, for copies to a GPU that do not wait

    Images without objects are kept: they teach what is not an object. An image that turns out to be broken is an
    ImageError where the data set is strict; otherwise a `DataWarning`, and the next one that can be read takes its
    place (in training; else it is left out of its batch).
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world or seed < 0:
        raise UsageError(
            f"batch_size {batch_size}, workers {workers}, rank {rank} of {world}, seed {seed}: batch_size must be at "
            "least 1, workers and seed 0 or more, rank below world"
        )
    plan = _Plan(
        dataset,
        preprocess,
        batch_size,
        training,
        augment if training else None,
        seed,
        rank,
        world,
        training if drop_crowd is None else drop_crowd,
    )
    return Loader(plan, workers, pin)


class _Keys:
    """What the worker processes are to fetch next: (epoch, batch). They outlive an epoch, so it is told with each."""

    keys: list[tuple[int, int]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Plan:
    """Knows which images make up a batch and builds it: everything that happens in a worker process."""

    def __init__(
        self,
        dataset: Any,
        preprocess: Preprocess,
        batch_size: int,
        training: bool,
        augment: Augment | None,
        seed: int,
        rank: int,
        world: int,
        drop_crowd: bool,
    ):
        self.dataset, self.preprocess, self.augment = dataset, preprocess, augment
        self.batch_size, self.training, self.seed = batch_size, training, seed
        self.rank, self.world, self.drop_crowd = rank, world, drop_crowd
        self.strict = bool(getattr(dataset, "strict", False))
        self.mirrored = mirrored_keypoints(getattr(dataset, "keypoint_names", None))
        self.total, self.kinds = len(dataset), len(dataset.classes)
        if training:
            self.count = -(-self.total // (batch_size * world))
        else:
            self.count = -(-len(range(rank, self.total, world)) // batch_size)
        sizes = np.array(dataset.sizes(), np.int64).reshape(-1, 2) if training else np.zeros((0, 2), np.int64)
        self.tall = sizes[:, 0] > sizes[:, 1]
        if augment is not None and augment.size is not None:
            self.tall[:] = False  # one canvas for all: nothing is padded less by sorting
        self._orders: dict[int, np.ndarray] = {}

    # ---- which images ------------------------------------------------------------------------------------------

    def order(self, epoch: int) -> np.ndarray:
        """The image at each position of an epoch, over all ranks."""
        if not self.training:
            return np.arange(self.total)
        if epoch not in self._orders:
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.total)
            self._orders = {epoch: grouped(shuffled, self.tall[shuffled], self.batch_size * self.world)}
        return self._orders[epoch]

    def positions(self, number: int) -> range:
        """The positions of batch `number` of this rank."""
        if self.training:
            first = (number * self.world + self.rank) * self.batch_size
            return range(first, first + self.batch_size)
        mine = range(self.rank, self.total, self.world)
        return mine[number * self.batch_size : (number + 1) * self.batch_size]

    # ---- building ------------------------------------------------------------------------------------------------

    def __getitem__(self, key: tuple[int, int]) -> _Packed | DataError:
        """A batch, packed for the way; an error is handed over as it is, so that its message arrives unchanged."""
        epoch, number = key
        order = self.order(epoch)
        notes: list[str] = []
        try:
            items = [self._item(int(order[k]), epoch, k, notes) for k in self.positions(number)]
        except DataError as error:
            return error
        there = [item for item in items if item is not None]
        if not there:
            return _Packed(None, [], [], [], notes)
        batch = Batch.collate(
            [image for image, _, _ in there],
            [laid.placement for _, laid, _ in there],
            names=[name for _, _, name in there],
            multiple=self.preprocess.multiple,
        )
        targets = [_numpy(laid.target) for _, laid, _ in there]
        return _Packed(batch.images, batch.placements, targets, batch.names or [], notes)

    def _item(self, index: int, epoch: int, k: int, notes: list[str]) -> tuple[Tensor, Laid, str] | None:
        rng = np.random.default_rng((self.seed, epoch, k))
        sample = self._sample(index, notes)
        if sample is None:
            return None
        if self.augment is None:
            image, placement = self.preprocess.lay(sample.image)
            target = place_target(sample.target, placement, self.mirrored)
            return image, Laid(sample.image, target, placement), sample.name
        laid = self._augmented(sample, rng)
        if rng.random() < self.augment.paste:
            other = self._sample(int(rng.integers(self.total)), notes)
            if other is not None:
                laid = self.augment.overlay(rng, laid, self._augmented(other, rng))
        image = self.preprocess.normalise(laid.image)
        if self.augment.canvas is not None:
            height, width = (max(side, own) for side, own in zip(self.augment.canvas, image.shape[1:], strict=True))
            image = torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
        return image, laid, sample.name

    def _augmented(self, sample: Sample, rng: np.random.Generator) -> Laid:
        assert self.augment is not None
        size = (sample.image.shape[1], sample.image.shape[2])
        drawn: Drawn = self.augment.draw(rng, size, self.preprocess)
        return self.augment.apply(sample, drawn, resample=self.preprocess.resample, mirrored_keypoints=self.mirrored)

    def _sample(self, index: int, notes: list[str]) -> Sample | None:
        """The image at `index`, or the next one that can be read."""
        for step in range(self.total):
            try:
                sample = self.dataset[(index + step) % self.total]
            except ImageError as error:
                if self.strict:
                    raise
                notes.append(f"{error} (left out for now)")
                if not self.training:
                    return None
                continue
            sample = replace(sample, image=self.preprocess.fitted(sample.image))
            target = sample.target
            if not ((target.labels >= 0) & (target.labels < self.kinds)).all():
                raise DataError(
                    f"{sample.name}: has objects of labels {sorted(set(target.labels.tolist()))}; the set has "
                    f"{self.kinds} classes, 0 ... {self.kinds - 1}"
                )
            if self.drop_crowd and target.crowd is not None and bool(target.crowd.any()):
                sample = replace(sample, target=target[~target.crowd])
            return sample
        raise ImageError(f"not one of the {self.total} images can be read; the last said: {notes[-1]}")


def grouped(order: np.ndarray, tall: np.ndarray, size: int) -> np.ndarray:
    """`order` rearranged into batches of `size` that are all tall or all not; what is left over is mixed at the end.

    The last batch is filled up from the beginning, so that the length is a multiple of `size`.
    """
    if not len(order):
        return order
    batches, ends, rest = [], [], []
    for places in (np.flatnonzero(tall), np.flatnonzero(~tall)):
        full = len(places) // size * size
        batches.append(places[:full].reshape(-1, size))
        ends.append(batches[-1][:, -1])
        rest.append(places[full:])
    whole = np.concatenate(batches)[np.argsort(np.concatenate(ends), kind="stable")].ravel()
    left = np.sort(np.concatenate(rest))
    missing = -len(left) % size
    return order[np.concatenate([whole, left, np.resize(np.concatenate([whole, left]), missing)])]


@dataclass
class _Packed:
    """A batch on its way from a worker: few tensors, because each one costs an open file on the way."""

    images: Tensor | None
    placements: list[Placement]
    targets: list[dict[str, Any]]
    names: list[str]
    notes: list[str]

    def pin_memory(self) -> _Packed:
        return self if self.images is None else replace(self, images=self.images.pin_memory())

    def unpack(self) -> Batch | None:
        if self.images is None:
            return None
        targets = [Instances(**{n: _tensor(v) for n, v in target.items()}) for target in self.targets]
        return Batch(self.images, self.placements, targets, self.names)


def _numpy(target: Instances) -> dict[str, Any]:
    values = {f.name: getattr(target, f.name) for f in fields(target)}
    return {n: v.numpy() if isinstance(v, Tensor) else v for n, v in values.items()}


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
