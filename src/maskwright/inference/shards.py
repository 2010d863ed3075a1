"""Prediction on many images: by several processes without a common scheduler (shards), or on a Ray cluster.

Both write parts (`parts`) and continue after a kill at any moment. Images are divided among shards by their names, so
that every process knows its own ones. On a cluster, actors hold the system, and the calling process writes all parts.
"""

# ray has no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingImports=false, reportUnknownParameterType=false
from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maskwright.data.images import common_white
from maskwright.errors import MissingExtraError, UsageError
from maskwright.inference.listing import StoredImage, in_shard, is_url, list_images, parquet_library
from maskwright.inference.parts import PER_PART, PartFolder, packed, rows, stored_name, unpacked
from maskwright.inference.predicting import predict
from maskwright.systems import System

Rows = tuple[str, Any, str | None]  # name of an image, its rows, why it has none
Progress = Callable[[Iterable[Rows], str, int], Iterable[Rows]]
IN_FLIGHT = 32  # images of a task on a cluster


def _without_progress(stream: Iterable[Rows], _: str, __: int) -> Iterable[Rows]:
    return stream


@dataclass(frozen=True)
class Work:
    """What to compute for each image; it is sent to the processes of a cluster.

    Attributes:
        make: Function that makes the system, for example `functools.partial(maskwright.load, "best.safetensors")`.
        options: Options of `predict`.
        white: The value of white of images with more than 8 bits, if the system does not specify it.
    """

    make: Callable[[], System]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    white: int | None = None

    def system(self) -> System:
        """Make the system."""
        system = self.make()
        if self.white is not None and system.preprocess.white is None:
            system.preprocess = replace(system.preprocess, white=self.white)
        return system

    def __call__(self, system: System, names: Sequence[str]) -> Iterator[Rows]:
        """Predict images, in order.

        Args:
            system: The system, see `system`.
            names: Names of the images, paths or URLs.

        Yields:
            For each image its name, its rows, and the reason if there are none because it cannot be read.
        """
        if not names:
            return
        sources = [StoredImage(name) if is_url(name) else Path(name) for name in names]
        for name, prediction in zip(names, predict(system, sources, **self.options), strict=True):
            if prediction.error is not None:
                yield name, None, prediction.error
            else:
                yield name, rows(name, prediction.found(), prediction.classes), None


def predict_shard(
    work: Work,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    recursive: bool = False,
    ray: str | None = None,
    actors: int | None = None,
    about: Mapping[str, Any] | None = None,
    per_part: int = PER_PART,
    progress: Progress = _without_progress,
) -> PartFolder:
    """Predict a share of many images and write the predictions as Parquet files.

    The files are ``OUT/shard-I-of-N/part-*.parquet``, see `PartFolder` for their columns. A repeated call continues: it
    predicts the images that the parts do not contain. Every image is contained once, at whatever moment earlier calls
    were killed.

    Args:
        work: What to compute for each image.
        sources: See `list_images`; the same ones for all shards.
        out: The folder for the parts of all shards.
        shard: Number of this share, from 1, and the number of all shares.
        recursive: Search subfolders of sources too.
        ray: "local": on a Ray cluster that is started on this machine and ended afterwards; an address: on a running
            one; None: in this process.
        actors: Processes of the cluster that hold the system; None: one for each GPU, or for each two CPUs.
        about: What predictions depend on apart from the options, as JSON, for example a digest of the weights.
        per_part: Images of a part.
        progress: Wraps the stream of images, with their name and number, to display progress.

    Returns:
        The folder, closed: number of objects, unreadable images.

    Raises:
        UsageError: If there are no images, or the folder has parts of other options or another number of shards.
        MissingExtraError: If pyarrow, fsspec or Ray is needed and not installed.
        DataError: If a part cannot be written.
    """
    parquet_library()
    number, count = shard
    folder = Path(out) / f"shard-{number}-of-{count}"
    _check_count(Path(out), count)
    listed = list_images(sources, recursive)
    if work.white is None:
        work = replace(work, white=common_white([Path(name) for name in listed if not is_url(name)]))
    options = {key: value for key, value in sorted(work.options.items()) if key not in ("batch", "workers", "device")}
    identity = {"weights": None, **(about or {}), "options": repr(options), "white": work.white}
    names = [name for name in listed if in_shard(name, number, count)]
    with PartFolder(folder, identity, per_part) as parts:
        left = [name for name in names if stored_name(name) not in parts.done]
        with contextlib.ExitStack() as stack:
            if not left:
                stream: Iterable[Rows] = ()
            elif ray is None:
                stream = work(work.system(), left)
            else:
                stream = stack.enter_context(_cluster(work, left, ray, actors))
            for name, table, error in progress(stream, "images", len(left)):
                parts.add(name, table, error)
    return parts


def _check_count(out: Path, count: int) -> None:
    """Refuse a folder whose parts were divided among another number of shards."""
    for path in sorted(out.glob("shard-*-of-*")):
        match = re.fullmatch(r"shard-\d+-of-(\d+)", path.name)
        if match and int(match[1]) != count and any(path.glob("part-*.parquet")):
            raise UsageError(f"{out}: has predictions of {match[1]} shards, not of {count}; give another folder")


# ---- Ray -------------------------------------------------------------------------------------------------------------


class _Actor:
    """Holds the system in a process of the cluster."""

    def __init__(self, work: Work):
        import torch

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.work, self.system = work, work.system()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The rows of images, one entry for each image, so that no image is divided."""
        import numpy as np

        found = list(self.work(self.system, [str(name) for name in batch["image"]]))
        return {
            "image": np.array([name for name, _, _ in found], object),
            "rows": np.array([b"" if table is None else packed(table) for _, table, _ in found], object),
            "error": np.array([error or "" for _, _, error in found], object),
        }


@contextlib.contextmanager
def _cluster(work: Work, names: Sequence[str], address: str, actors: int | None) -> Generator[Iterator[Rows]]:
    """The rows of images, computed on a cluster, in any order; an image may occur again after a failure."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError:
        raise MissingExtraError("ray[data]", "ray") from None
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
        except ConnectionError as error:
            raise UsageError(f"there is no Ray cluster at {address!r} ({error}); start one, or use local") from None
    try:
        yield _on_cluster(ray, work, names, actors)
    finally:
        if started:
            ray.shutdown()


def _on_cluster(ray: Any, work: Work, names: Sequence[str], actors: int | None) -> Iterator[Rows]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    # At most as many as there are tasks: every actor loads the system.
    most = actors or (gpus if gpus else max(1, int(resources.get("CPU", 1)) // 2))
    tasks = -(-len(names) // IN_FLIGHT)
    dataset = ray.data.from_items([{"image": name} for name in names], override_num_blocks=tasks)
    found = dataset.map_batches(
        _Actor,
        fn_constructor_args=(work,),
        batch_size=IN_FLIGHT,
        compute=ray.data.ActorPoolStrategy(size=min(most, tasks)),
        num_gpus=1 if gpus else None,
    )
    for row in found.iter_rows():
        error = row["error"] or None
        yield row["image"], None if error else unpacked(row["rows"]), error
