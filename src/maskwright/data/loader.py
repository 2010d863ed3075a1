"""Batches of a data set; they do not depend on the number of worker processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from maskwright.data.augment import Augment, Drawn, Placed, place_target
from maskwright.data.dataset import Dataset, Sample, as_dataset, mirrored_keypoints
from maskwright.data.findings import DataWarning
from maskwright.data.images import reading
from maskwright.data.workers import advised_once, end_workers, ignore_signals, iterate
from maskwright.errors import DataError, ImageError, MaskwrightError, UsageError
from maskwright.structures import Batch, Instances, Placement, Preprocess


class Loader:
    """Batches of a data set; made by `make_loader`. Iteration yields the current epoch, which `set_epoch` selects.

    In training, an epoch contains every image once (with `balance`, images of rare classes more often), in an order
    that depends on the seed and the epoch. Images that are taller than wide are batched separately, to reduce padding.
    Every batch is full: the last one is filled with images from the start of the epoch. A batch over all ranks does not
    depend on their number, and the augmentation of the image at position k depends only on (seed, epoch, k): not on the
    workers, nor on where a run was resumed.

    In evaluation, images come in the order of the data set; rank r reads r, r + world, ... The last batch may be
    smaller, and ranks may differ by one batch.
    """

    def __init__(self, plan: _Plan, workers: int, pin: bool):
        self.plan, self.workers, self.pin = plan, workers, pin
        self.epoch, self._start = 0, 0
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Return the number of batches per epoch on this rank."""
        return self.plan.count

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch of the next iteration, and the batch at which it starts."""
        self.epoch, self._start = epoch, start

    def indices(self, epoch: int | None = None) -> list[list[int]]:
        """Return the positions of the images in each batch of an epoch on this rank; None: the current epoch."""
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
            if isinstance(result, MaskwrightError):
                raise result
            for note in result.notes:
                warnings.warn(note, DataWarning, stacklevel=2)
            batch = result.unpack()
            if batch is not None:
                yield batch

    @property
    def iterator(self) -> Any:
        """The iterator of torch's DataLoader that has the worker processes; None if there is none."""
        return getattr(self._loader, "_iterator", None)

    def close(self) -> None:
        """End the worker processes at once. The next iteration starts new ones."""
        end_workers(self.iterator)
        self._loader = None

    def _read(self, keys: list[tuple[int, int]]) -> Any:
        if self._loader is None:
            self._keys = _Keys()
            with advised_once(self.workers):
                self._loader = DataLoader(
                    self.plan,  # pyright: ignore[reportArgumentType] - any object with __getitem__ will do
                    batch_size=None,
                    sampler=self._keys,
                    num_workers=self.workers,
                    persistent_workers=True,
                    pin_memory=self.pin,
                    # Without its own generator it would use the global one, which changes the random numbers of losses.
                    generator=torch.Generator(),
                    worker_init_fn=ignore_signals,
                )
        self._keys.keys = keys
        return iterate(self._loader)


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
    balance: float | None = None,
) -> Loader:
    """Make a loader of preprocessed batches with targets on the network's grid.

    Images without objects are kept, as negative examples.

    Args:
        dataset: A data set, or anything that `as_dataset` accepts.
        preprocess: The system's preprocessing.
        batch_size: Images per batch on each rank.
        training: Shuffle, augment and fill batches; see `Loader`.
        augment: Augmentation in training; None: none.
        seed: Seed of the order and the augmentation.
        workers: Number of worker processes that read images; 0: the current process reads them.
        rank: Rank of this process.
        world: Number of processes that train together.
        drop_crowd: Remove crowd regions from the targets; None: in training only. No system trains on them as
            objects, and the published recipes of Mask R-CNN exclude them.
        pin: Return images in pinned memory, for asynchronous copies to a GPU.
        balance: Threshold of repeat-factor sampling in training, see `repeat_factors`; None: every image once.

    Returns:
        The loader. Iteration raises ImageError for a damaged image of a strict data set. Otherwise it emits a
        `DataWarning`, and the next readable image replaces it in training, while in evaluation it is omitted.

    Raises:
        UsageError: If an argument is invalid.
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world or seed < 0:
        raise UsageError(
            "batch_size must be at least 1, workers and seed must not be negative, rank must be in [0, world); got "
            f"batch_size {batch_size}, workers {workers}, seed {seed}, rank {rank}, world {world}"
        )
    plan = _Plan(
        as_dataset(dataset),
        preprocess,
        batch_size,
        training,
        augment if training else None,
        seed,
        rank,
        world,
        training if drop_crowd is None else drop_crowd,
        balance if training else None,
    )
    return Loader(plan, workers, pin)


class _Keys:
    """The next (epoch, batch) pairs to load. Workers outlive an epoch, so that each key contains its epoch."""

    keys: list[tuple[int, int]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Plan:
    """Selects the images of a batch and builds it: everything that happens in a worker process."""

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        batch_size: int,
        training: bool,
        augment: Augment | None,
        seed: int,
        rank: int,
        world: int,
        drop_crowd: bool,
        balance: float | None = None,
    ):
        self.dataset, self.preprocess, self.augment = dataset, preprocess, augment
        self.batch_size, self.training, self.seed = batch_size, training, seed
        self.rank, self.world, self.drop_crowd = rank, world, drop_crowd
        self.mirrored = mirrored_keypoints(dataset.keypoint_names)
        self.total, self.kinds = len(dataset), len(dataset.classes)
        self.factors = None if balance is None else np.cumsum(repeat_factors(dataset, balance))
        length = self.total if self.factors is None or not self.total else math.ceil(self.factors[-1] - 1e-6)
        self.length = length  # images in an epoch of training
        if training:
            self.count = -(-length // (batch_size * world))
        else:
            self.count = -(-len(range(rank, self.total, world)) // batch_size)
        sizes = np.array(dataset.sizes(), np.int64).reshape(-1, 2) if training else np.zeros((0, 2), np.int64)
        self.tall = sizes[:, 0] > sizes[:, 1]
        if augment is not None and augment.size is not None:
            self.tall[:] = False  # all images have one canvas, so that sorting does not reduce padding
        self._orders: dict[int, np.ndarray] = {}

    # ---- order ------------------------------------------------------------------------------------------------------

    def order(self, epoch: int) -> np.ndarray:
        """The image at each position of an epoch, over all ranks."""
        if not self.training:
            return np.arange(self.total)
        if epoch not in self._orders:
            rng = np.random.default_rng((self.seed, epoch))
            if self.factors is None or not self.total:
                shuffled = rng.permutation(self.total)
            else:  # image i owns an interval of length factor i, and points lie at equal distances of at most 1
                points = (np.arange(self.length) + rng.random()) * (self.factors[-1] / self.length)
                positions = cast(npt.NDArray[np.intp], np.searchsorted(self.factors, points, side="right"))
                shuffled = rng.permutation(np.minimum(positions, self.total - 1))
            self._orders = {epoch: grouped(shuffled, self.tall[shuffled], self.batch_size * self.world)}
        return self._orders[epoch]

    def positions(self, number: int) -> range:
        """The positions of batch `number` of this rank."""
        if self.training:
            first = (number * self.world + self.rank) * self.batch_size
            return range(first, first + self.batch_size)
        mine = range(self.rank, self.total, self.world)
        return mine[number * self.batch_size : (number + 1) * self.batch_size]

    # ---- building ---------------------------------------------------------------------------------------------------

    def __getitem__(self, key: tuple[int, int]) -> _Packed | MaskwrightError:
        """A packed batch; an error is returned, not raised, so that its message reaches the main process unchanged."""
        epoch, number = key
        order = self.order(epoch)
        notes: list[str] = []
        try:
            items = [self._item(int(order[k]), epoch, k, notes) for k in self.positions(number)]
        except (DataError, UsageError) as error:
            return error
        read = [item for item in items if item is not None]
        if not read:
            return _Packed(None, [], [], [], notes)
        batch = Batch.collate(
            [image for image, _, _ in read],
            [placed.placement for _, placed, _ in read],
            names=[name for _, _, name in read],
            multiple=self.preprocess.multiple,
        )
        targets = [_numpy(placed.target) for _, placed, _ in read]
        return _Packed(batch.images, batch.placements, targets, batch.names or [], notes)

    def _item(self, index: int, epoch: int, k: int, notes: list[str]) -> tuple[Tensor, Placed, str] | None:
        rng = np.random.default_rng((self.seed, epoch, k))
        sample = self._sample(index, notes)
        if sample is None:
            return None
        if self.augment is None:
            image, placement = self.preprocess.apply(sample.image)
            target = place_target(sample.target, placement, self.mirrored)
            return image, Placed(sample.image, target, placement), sample.name
        placed = self._augmented(sample, rng)
        if rng.random() < self.augment.paste:
            other = self._sample(int(rng.integers(self.total)), notes)
            if other is not None:
                placed = self.augment.overlay(rng, placed, self._augmented(other, rng))
        image = self.preprocess.normalize(placed.image)
        if self.augment.canvas is not None:
            height, width = (max(side, own) for side, own in zip(self.augment.canvas, image.shape[1:], strict=True))
            image = torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
        return image, placed, sample.name

    def _augmented(self, sample: Sample, rng: np.random.Generator) -> Placed:
        assert self.augment is not None
        sample = self.augment.transformed(sample, rng)
        size = (sample.image.shape[1], sample.image.shape[2])
        drawn: Drawn = self.augment.draw(rng, size, self.preprocess)
        return self.augment.apply(sample, drawn, resample=self.preprocess.resample, mirrored_keypoints=self.mirrored)

    def _sample(self, index: int, notes: list[str]) -> Sample | None:
        """The image at `index`, or the next readable one."""
        for step in range(self.total):
            try:
                with reading(self.preprocess):
                    sample = self.dataset[(index + step) % self.total]
            except ImageError as error:
                if self.dataset.strict:
                    raise
                notes.append(f"{error} (skipped)")
                if not self.training:
                    return None
                continue
            sample = replace(sample, image=self.preprocess.match_channels(sample.image))
            target = sample.target
            if not ((target.labels >= 0) & (target.labels < self.kinds)).all():
                labels = cast(list[int], target.labels.tolist())  # pyright: ignore[reportUnknownMemberType] - untyped in torch
                raise DataError(
                    f"{sample.name}: labels must be in 0 ... {self.kinds - 1} for {self.kinds} classes, got "
                    f"{sorted(set(labels))}"
                )
            if self.drop_crowd and target.crowd is not None and bool(target.crowd.any()):
                sample = replace(sample, target=target[~target.crowd])
            return sample
        raise ImageError(f"none of the {self.total} images can be read; last error: {notes[-1]}")


def repeat_factors(dataset: Dataset, threshold: float) -> npt.NDArray[np.float64]:
    """Return how often each image is repeated in an epoch, on average, so that rare classes are seen more often.

    The factor of a class in a share f of the images is max(1, sqrt(threshold / f)), and that of an image is the largest
    of its classes' (LVIS: Gupta et al., arXiv 1908.03195, section 5.4, where the threshold is 0.001). With a threshold
    of 1, every class is repeated in inverse proportion to the root of its frequency.

    Args:
        dataset: The data set.
        threshold: Share of images below which the images of a class are repeated.

    Returns:
        (M,), at least 1; images without objects are not repeated.
    """
    present = [np.unique(dataset.image_labels(index)) for index in range(len(dataset))]
    shares = np.zeros(len(dataset.classes))
    for labels in present:
        shares[labels[(labels >= 0) & (labels < len(shares))]] += 1 / max(1, len(dataset))
    factors = np.maximum(1.0, np.sqrt(threshold / np.maximum(shares, 1e-12)))
    valid = [labels[(labels >= 0) & (labels < len(shares))] for labels in present]
    return np.array([factors[labels].max(initial=1.0) for labels in valid])


def grouped(order: np.ndarray, tall: np.ndarray, size: int) -> np.ndarray:
    """Rearrange images into batches that are all tall or all not tall.

    Args:
        order: Positions of the images.
        tall: Whether each of them is taller than wide.
        size: Images per batch.

    Returns:
        The positions, batch by batch. The remaining images of both kinds are at the end, and the last batch is filled
        with images from the start, so that the length is a multiple of `size`.
    """
    if not len(order):
        return order
    batches: list[npt.NDArray[np.intp]] = []
    ends: list[npt.NDArray[np.intp]] = []
    rest: list[npt.NDArray[np.intp]] = []
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
    """A batch for the transfer from a worker: few tensors, because each one needs an open file."""

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
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # pyright: ignore[reportUnknownMemberType] - untyped in torch
