"""Batches do not depend on the number of workers and ranks, nor on where a run is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as _  # noqa: F401 - imported here once, not in every worker process

from maskwright.data import (
    Augment,
    DataWarning,
    Loader,
    Sample,
    Scenes,
    make_loader,
    open_dataset,
    read_coco,
    show_batch,
    workers,
)
from maskwright.data.loader import grouped
from maskwright.errors import DataError, ImageError, UsageError
from maskwright.structures import Batch, Preprocess
from tests.data.making import content, pixels, write

RULE = Preprocess(short=64, long=100)
WILD = Augment(jitter=(0.5, 2.0), size=(64, 64), paste=0.5, brightness=0.2)


def same(a: Batch, b: Batch) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    targets = all(
        torch.equal(s.boxes, t.boxes)
        and torch.equal(s.labels, t.labels)
        and s.masks is not None
        and t.masks is not None
        and s.masks.rle() == t.masks.rle()
        for s, t in zip(a.targets, b.targets, strict=True)
    )
    return torch.equal(a.images, b.images) and a.placements == b.placements and a.names == b.names and targets


class Stored(Scenes):
    """Scenes that are drawn once."""

    def __init__(self, count: int):
        super().__init__(count, (48, 48))
        self.samples = [super(Stored, self).__getitem__(index) for index in range(count)]

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


stored = cache(Stored)


def loader(count: int = 10, batch_size: int = 2, training: bool = True, **options) -> Loader:
    options.setdefault("augment", WILD)
    return make_loader(stored(count), RULE, batch_size=batch_size, training=training, **options)


def mixed(folder: Path, count: int = 11) -> Path:
    """A data set of tall and wide images."""
    data = content(count)
    sizes = {}
    for entry in data["images"]:
        size = (60, 40) if entry["id"] % 3 == 0 else (40, 60)
        entry.update(height=size[0], width=size[1])
        sizes[entry["file_name"]] = size
    for annotation in data["annotations"]:
        ring = [5.0, 5.0, 25.0, 5.0, 25.0, 25.0]
        annotation.update(segmentation=[ring], bbox=[5, 5, 20, 20], area=200.0)
    return write(folder, data, sizes=sizes)


@pytest.mark.fast
def test_shapes_and_types_of_a_batch():
    batch = next(iter(loader(augment=Augment(flip=0.5))))
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.images.dtype == torch.float32
    assert batch.targets is not None
    for target, placement in zip(batch.targets, batch.placements, strict=True):
        assert target.image_size == placement.size
    assert batch.names is not None
    assert len(batch.names) == 2


@pytest.mark.fast
def test_an_epoch_contains_every_image_in_full_batches():
    found = loader(11, 4, augment=None)
    assert len(found) == 3
    for epoch in range(3):
        numbers = [i for batch in found.indices(epoch) for i in batch]
        assert len(numbers) == 12
        assert set(numbers) == set(range(11))
    assert found.indices(0) != found.indices(1)
    assert found.indices(0) == loader(11, 4, augment=None).indices(0)
    assert found.indices(0) != loader(11, 4, augment=None, seed=1).indices(0)


def test_fewer_images_than_a_batch_are_repeated():
    found = loader(3, 8)
    batches = list(found)
    assert [len(b) for b in batches] == [8]
    assert set(found.indices()[0]) == {0, 1, 2}
    assert len(loader(0, 8)) == 0
    assert list(loader(0, 8)) == []


def test_augmentation_depends_only_on_seed_epoch_and_position():
    found = loader()
    found.set_epoch(1)
    whole = list(found)
    found.set_epoch(1, start=3)
    rest = list(found)
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    found.set_epoch(2)
    assert not same(whole[0], next(iter(found)))


def test_workers_do_not_change_batches():
    alone, helped = loader(), loader(workers=2)
    for epoch, start in ((0, 2), (1, 3), (0, 4)):
        alone.set_epoch(epoch, start)
        helped.set_epoch(epoch, start)
        state = torch.random.get_rng_state()
        pairs = list(zip(alone, helped, strict=True))
        assert len(pairs) == 5 - start
        assert all(same(a, b) for a, b in pairs)
        assert torch.equal(state, torch.random.get_rng_state()), "the global random numbers are not used"


def test_an_interrupted_epoch_does_not_affect_the_next():
    found = loader(workers=1)
    next(iter(found))
    found.set_epoch(1)
    other = loader()
    other.set_epoch(1)
    assert all(same(a, b) for a, b in zip(found, other, strict=True))


def test_ranks_share_the_batches_of_one_process():
    alone = list(loader(10, 6))
    for world in (2, 3):
        shards = [loader(10, 6 // world, rank=r, world=world) for r in range(world)]
        assert {len(s) for s in shards} == {len(alone)} == {2}
        for whole, parts in zip(alone, zip(*shards, strict=True), strict=True):
            assert torch.equal(whole.images, torch.cat([p.images for p in parts]))


@pytest.mark.fast
def test_tall_and_wide_images_are_batched_separately(tmp_path: Path):
    dataset = read_coco(mixed(tmp_path))
    found = make_loader(dataset, RULE, batch_size=2, training=True, augment=Augment())
    tall = [h > w for h, w in dataset.sizes()]
    kinds = [len({tall[i] for i in batch}) for batch in found.indices()]
    assert sum(k > 1 for k in kinds) <= 1
    assert len(found) == 6


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 9))
def test_grouping_keeps_every_image(tall: list[bool], size: int):
    order = np.random.default_rng(0).permutation(len(tall))
    flags = np.array(tall, bool)
    result = grouped(order, flags[order] if len(tall) else flags, size)
    assert len(result) % size == 0
    assert len(result) - len(tall) < size
    assert set(result.tolist()) == set(range(len(tall)))
    batches = flags[result].reshape(-1, size) if len(tall) else np.zeros((0, size), bool)
    assert (batches.any(1) & ~batches.all(1)).sum() <= 2


def test_evaluation_uses_the_order_of_the_data_set():
    found = loader(7, 3, training=False)
    assert [len(b) for b in found] == [3, 3, 1]
    assert [i for b in found.indices() for i in b] == list(range(7))
    shards = [loader(7, 3, training=False, rank=r, world=2) for r in range(2)]
    assert sorted(i for s in shards for b in s.indices() for i in b) == list(range(7))
    batch = next(iter(found))
    image, placement = RULE.apply(Scenes(7, (48, 48))[0].image)
    assert torch.equal(batch.images[0, :, :64, :64], image), "not augmented"
    assert batch.placements[0] == placement


@pytest.mark.fast
def test_crowd_regions_are_not_targets_in_training(tmp_path: Path):
    data = content(2)
    data["annotations"][1]["iscrowd"] = 1
    dataset = read_coco(write(tmp_path, data))

    def objects(**options) -> int:
        batches = list(make_loader(dataset, RULE, batch_size=2, **options))
        return sum(len(t) for b in batches for t in b.targets or ())

    assert objects(training=True) == 3
    assert objects(training=True, drop_crowd=False) == 4
    assert objects(training=False) == 4


@pytest.mark.fast
def test_images_without_objects_are_batched():
    found = make_loader(Scenes(4, (48, 48), empty=1.0), RULE, batch_size=2, training=True, augment=WILD)
    for batch in found:
        assert [len(t) for t in batch.targets or ()] == [0, 0]
        assert all(t.masks is not None and len(t.masks) == 0 for t in batch.targets or ())


@pytest.mark.fast
def test_batches_are_padded_to_a_fixed_canvas():
    batch = next(iter(loader(augment=Augment(jitter=(0.2, 0.4), size=(96, 128)))))
    assert batch.images.shape[-2:] == (96, 128)
    height, width = batch.placements[0].size
    assert max(height / 96, width / 128) < 0.5
    assert (batch.images[0, :, height:] == 0).all()
    assert (batch.images[0, :, :, width:] == 0).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_during_a_run(tmp_path: Path, workers: int):
    path = write(tmp_path, content(6))
    lenient, strict = read_coco(path), read_coco(path, strict=True)
    (tmp_path / "train" / "3.png").write_bytes(b"<html>")
    options = {"batch_size": 2, "training": True, "workers": workers}
    with pytest.raises(ImageError, match=r"^[^\n]*3\.png: not a supported image[^\n]*$"):
        list(make_loader(strict, RULE, **options))
    with pytest.warns(DataWarning, match=r"3\.png: not a supported image .*skipped"):
        batches = list(make_loader(lenient, RULE, **options))
    assert [len(b) for b in batches] == [2, 2, 2]
    names = [n for b in batches for n in b.names or ()]
    assert len(names) == 6
    assert not any(n.endswith("3.png") for n in names)
    with pytest.warns(DataWarning):
        batches = list(make_loader(lenient, RULE, batch_size=2, training=False, workers=workers))
    assert sum(len(b) for b in batches) == 5


@pytest.mark.fast
def test_a_data_set_without_readable_images_is_an_error(tmp_path: Path):
    dataset = read_coco(write(tmp_path, content(3)))
    for path in (tmp_path / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"none of the 3 images can be read; last error: .*empty"):
        list(make_loader(dataset, RULE, batch_size=2, training=True))


def test_keypoints_are_flipped_by_their_names():
    scenes = Scenes(3, (96, 96), keypoints=True, empty=0)
    rule = Preprocess(short=96, long=96)
    found = make_loader(scenes, rule, batch_size=3, training=True, augment=Augment(flip=1.0))
    batch = next(iter(found))
    order = found.indices()[0]
    for target, index in zip(batch.targets or (), order, strict=True):
        before = scenes.targets(index).keypoints
        assert before is not None
        assert target.keypoints is not None
        # The figures face the viewer: their left side is on the right.
        both = (target.keypoints[:, 5, 2] > 0) & (target.keypoints[:, 6, 2] > 0)
        assert (target.keypoints[both, 5, 0] > target.keypoints[both, 6, 0]).all()


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "world": 2}, {"workers": -1}, {"seed": -1}])
def test_invalid_arguments(options: dict):
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        loader(**options)


@pytest.mark.fast
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_batch_can_be_drawn(tmp_path: Path, channels):
    rule = Preprocess(short=48, long=64, channels=channels, mean=(0.2, 0.3, 0.4))
    scenes = Scenes(4, (48, 48), empty=1.0)
    batch = next(iter(make_loader(scenes, rule, batch_size=4, training=False)))
    path = show_batch(batch, rule, tmp_path / "deep" / "batch.png", scenes.classes)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (384 + 16), 2 * 384 + 4, 3), "enlarged by 6, with captions"
    shown = sheet[3 : 48 * 6 : 6, 3 : 48 * 6 : 6].astype(int) - scenes[0].image.permute(1, 2, 0).numpy()
    assert np.abs(shown).max() <= 1, "the drawing shows the image"
    assert [p.name for p in path.parent.iterdir()] == ["batch.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        show_batch(batch, rule, tmp_path / "file" / "batch.png")


@pytest.mark.fast
def test_pixels_without_normalization_are_unchanged(tmp_path: Path):
    data = content(1)
    dataset = open_dataset(write(tmp_path, data).parent.parent)
    rule = Preprocess(short=40, long=60, mean=(0, 0, 0), std=(1, 1, 1), divide=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = next(iter(make_loader(dataset, rule, batch_size=1, training=True, augment=Augment(flip=0))))
    assert (batch.images[0, :, :40, :60].permute(1, 2, 0).numpy() == pixels()).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the fork server exists on POSIX only")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path, method: str):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os\n"
        "from torch.utils.data import DataLoader\n"
        "from maskwright.data.workers import ignore_signals, iterate\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    batches = iterate(DataLoader(range(1000), num_workers=1, worker_init_fn=ignore_signals))\n"
        "    next(batches)\n"
        "    print(*[each.pid for each in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    with (tmp_path / "out").open("w") as out:  # not a pipe: the workers would keep it open
        subprocess.run([sys.executable, script], stdout=out, stderr=subprocess.DEVNULL, timeout=240)
    workers = [int(word) for word in (tmp_path / "out").read_text().split()]
    assert len(workers) == 1
    end = time.monotonic() + 60
    while (left := [pid for pid in workers if _runs(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, 9)
    assert not left


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_advice_on_the_number_of_workers_is_given_once(monkeypatch):
    monkeypatch.setattr(workers, "_advised", False)
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            batches = make_loader(Scenes(2, (32, 32)), RULE, batch_size=1, training=True, workers=2)
            for epoch in range(2):
                batches.set_epoch(epoch)
                assert len(list(batches)) == 2
            batches.close()
    assert [str(w.message)[:46] for w in caught] == ["This DataLoader will create 2 worker processes"]
