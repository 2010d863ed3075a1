"""Two processes, one of them with an empty image, give the gradients of one: for every system of the registry."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskwright.systems import names
from maskwright.training import Objective
from tests.systems.tiny import SIZE, build, first_in_order, objects

SHARES = ((3, 1), (0, 0))  # objects on the images of each process


def objective(name: str) -> Objective:
    """In evaluation mode: statistics of a batch are not averaged over processes."""
    return Objective(build(name).eval())


def random_images(share: int | None) -> tuple[Tensor, list]:
    every = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    rows = range(4) if share is None else range(2 * share, 2 * share + 2)
    counts = [n for own in SHARES for n in own]
    return every[list(rows)], [objects(counts[i]) for i in rows]


def gradients(module: torch.nn.Module, share: int | None) -> dict[str, Tensor]:
    images, targets = random_images(share)
    with first_in_order():
        terms = module(images, targets)
    torch.stack(list(terms.values())).sum().backward()
    return {n.removeprefix("module."): p.grad for n, p in module.named_parameters() if p.grad is not None}


def one_of_two(rank: int, folder: Path, every: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    for name in every:
        module = torch.nn.parallel.DistributedDataParallel(objective(name))
        torch.save(gradients(module, rank), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All systems in the same two processes: starting them is what takes long."""
    path = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, path, names())) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_an_empty_image_on_one_process_gives_the_gradients_of_the_whole_batch(name: str, folder: Path):
    expected = gradients(objective(name), None)
    # Some have no gradient but rounding, as what is added to all keys of an attention.
    least = max(1e-6, 1e-5 * float(torch.stack([g.norm() for g in expected.values()]).norm()))
    for rank in range(2):
        found = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            # Sums over four images in another order: float32 rounding against the size of the whole gradient.
            error = (found[key] - gradient).norm() / gradient.norm().clamp(min=least)
            assert error < 1e-3, (key, float(error))
