"""Several processes that together do what one does."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.data import as_dataset
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count, local_counts
from maskwright.training import Objective, Recipe
from maskwright.training.state import load_state
from tests.training.test_run import rows
from tests.training.tiny_system import Shapes, Tiny

# Every fourth image is empty: process 0 gets two with an object each, process 1 two without any.
SHARES = ([0, 1], [3, 7])


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(Tiny(("red", "green"), dropout=0.0).eval()).double()  # statistics of a batch are not averaged


def random_images(indices: list[int]) -> tuple[torch.Tensor, list[Any]]:
    samples = [Shapes(8)[i] for i in indices]
    return torch.stack([s.image.double() / 255 for s in samples]), [s.target for s in samples]


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n.removeprefix("module."): p.grad for n, p in module.named_parameters()}
    return {n: g for n, g in found.items() if g is not None}


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    module = torch.nn.parallel.DistributedDataParallel(objective())
    images, targets = random_images(SHARES[rank])
    sum(module(images, targets).values()).backward()
    with local_counts():
        alone = global_mean_count(torch.tensor(3.0 + rank))
    together = global_mean_count(torch.tensor([1.0 + rank, 0.0]))
    torch.save({"gradients": gradients(module), "alone": alone, "together": together}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_an_empty_image_on_one_process_gives_the_gradients_of_the_whole_batch(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    whole = objective()
    images, targets = random_images(SHARES[0] + SHARES[1])
    sum(whole(images, targets).values()).backward()
    expected = gradients(whole)
    assert len(expected) == len(list(whole.parameters()))
    for part in both:
        assert part["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            # The losses are float32 at the door, whatever the network computes in.
            torch.testing.assert_close(part["gradients"][name], gradient, rtol=1e-5, atol=1e-7)
    # Dividing by each process's own count gives something else, which is what the helper is for.
    assert [float(p["alone"]) for p in both] == [3, 4]
    assert both[0]["together"].tolist() == both[1]["together"].tolist() == [1.5, 0.5]


@pytest.mark.fast
def test_a_single_process_divides_by_its_own_count():
    assert float(global_mean_count(torch.tensor(7))) == 7
    assert float(global_mean_count(torch.tensor(0))) == 1
    assert global_mean_count(torch.tensor([0, 3]), minimum=0.5).tolist() == [0.5, 3]
    assert global_mean_count(torch.tensor(2, dtype=torch.bfloat16)).dtype == torch.float32


SCRIPT = """
import sys, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from pathlib import Path
from tests.training.tiny_system import fit, Shapes
if __name__ == "__main__":
    fit(Path(sys.argv[1]), batch=4, data=Shapes(24), val=Shapes(5, seed=1), resume="resume" in sys.argv, **{options})
"""


def run(script: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *command], cwd=script.parent, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_two_processes_train_validate_and_resume_together(tmp_path: Path):
    script, out = tmp_path / "script.py", tmp_path / "run"
    here = str(Path(__file__).parents[2])
    # Two processes that Fabric starts itself ...
    script.write_text(SCRIPT.format(here=here, options={"epochs": 2, "devices": 2}))
    done = run(script, str(script), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("finished after 6 steps") == 1  # the first process speaks for all
    # 24 images in batches of 4, two batches to a step
    assert load_state(out / "last.ckpt")["progress"]["step"] == 6
    # Five validation images are three and two; merged they measure what one process does with the weights kept.
    measured = {n: v for s, _, n, v in rows(out) if s == 6 and n.startswith("val/")}
    alone = validated_alone(out)
    assert measured.keys() == alone.keys()
    for name in ("val/segm/AP", "val/segm/AP50", "val/bbox/AP"):
        assert measured[name] == alone[name]
    assert math.isfinite(measured["val/loss"])

    # ... and two that torchrun starts, whose number the recipe need not know.
    script.write_text(SCRIPT.format(here=here, options={"epochs": 3, "devices": 1}))
    done = run(
        script, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(out), "resume"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("changed since the run began: epochs: 2 -> 3") == 1
    assert done.stderr.count("finished after 9 steps") == 1
    assert load_state(out / "last.ckpt")["progress"]["step"] == 9


def validated_alone(folder: Path) -> dict[str, float]:
    from lightning_fabric import Fabric
    from safetensors.torch import load_file

    from maskwright.training.validation import validate

    system = Tiny(("red", "green"))
    system.load_state_dict(load_file(folder / "last.safetensors"))
    fabric = Fabric(accelerator="cpu", devices=1)
    return validate(fabric, system, as_dataset(Shapes(5, seed=1)), batch=2, workers=0, seed=0)


def test_a_batch_is_shared_evenly_or_not_at_all():
    from maskwright.training.setup import launch

    with pytest.raises(UsageError, match="batch must be a multiple of the number of devices, 2, got 3"):
        launch(Recipe(batch=3, devices=2, device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device 'cuda' is not available; this machine has cpu"):
            launch(Recipe(device="cuda"))
