"""What stops a run, and what it leaves to find out why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.errors import CheckpointError, TrainingError
from maskwright.structures import Batch, Instances, Placement
from maskwright.training import load_batch, replay
from maskwright.training.guards import keep_batch, memory_advice
from maskwright.training.state import load_state, seed_step
from tests.systems.tiny import build
from tests.training.tiny_system import Shapes, Tiny, fit


class Breaking(Tiny):
    """Its mask loss becomes infinite as soon as the head has learnt to say no."""

    name = "breaking"

    def __init__(self, classes: tuple[str, ...], threshold: float = -0.3):
        super().__init__(classes)
        self.threshold = threshold

    def losses(self, raw: Any, targets: Any) -> dict[str, torch.Tensor]:
        terms = super().losses(raw, targets)
        if float(raw.logits.detach().mean()) < self.threshold:
            terms["loss_mask"] = terms["loss_mask"] * torch.inf
        return terms


def test_an_infinite_loss_stops_the_run_and_can_be_reproduced(tmp_path: Path):
    torch.manual_seed(5)
    system = Breaking(("red", "green"))
    with pytest.raises(TrainingError) as caught:
        fit(tmp_path / "run", system=system, epochs=30, ema=None)
    kept = tmp_path / "run" / "batch.pt"
    state = torch.load(kept, weights_only=True)
    step = load_state(tmp_path / "run" / "last.ckpt")["progress"]["step"]
    assert f"step {step}: not a finite number: loss_mask = inf, on " in str(caught.value)
    assert "The weights were not changed" in str(caught.value)
    assert str(kept) in str(caught.value)
    assert all(name in str(caught.value) for name in state["names"])
    assert len(state["names"]) == 2
    # The weights in the file are those of the last checkpoint: nothing bad was learnt. (Batch statistics went on.)
    model = load_state(tmp_path / "run" / "last.ckpt")["model"]
    assert all(torch.equal(model[n], state["model"][n]) for n in model if "running" not in n and "batches" not in n)
    # Computed again, with the same dropout, it is the same loss to the last bit.
    terms = replay(kept, Breaking(("red", "green")))
    assert terms["loss_mask"].isinf()
    assert float(terms["loss_second"].detach()) == state["losses"]["loss_second"]


def test_a_system_that_sees_padding_sees_it_again(tmp_path: Path):
    torch.manual_seed(0)
    system = build("detr", masks="none").train()
    sizes = [(64, 96), (96, 64)]
    targets = [Instances(size, torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0])) for size in sizes]
    images, place = torch.randn(2, 3, 96, 96), (0, 0, 0, 0)
    seed_step(*place)
    terms = system.losses(system(*system.inputs(images, sizes)), targets)
    batch = Batch(images, [Placement.identity(size) for size in sizes], targets)
    keep_batch(tmp_path / "batch.pt", system, batch, terms, place)
    again = replay(tmp_path / "batch.pt")
    assert {n: float(v.detach()) for n, v in again.items()} == {n: float(v.detach()) for n, v in terms.items()}


def test_the_kept_batch_can_be_looked_at(tmp_path: Path):
    system = Breaking(("red", "green"), threshold=100.0)
    with pytest.raises(TrainingError, match=r"step 0: not a finite number: loss_mask = inf"):
        fit(tmp_path / "run", system=system)
    batch = load_batch(tmp_path / "run" / "batch.pt")
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.targets is not None
    data = Shapes(22)
    for name, target in zip(batch.names or [], batch.targets, strict=True):
        index = next(i for i in range(22) if str(100 + i) in name.split("/")[-1])
        assert torch.equal(target.masks.dense(), data.targets(index).masks.dense())
        assert torch.equal(target.labels, data.targets(index).labels)
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_a_gradient_that_is_not_finite_stops_it_too(tmp_path: Path):
    class Steep(Tiny):
        def losses(self, raw: Any, targets: Any) -> dict[str, torch.Tensor]:
            zero = (self.second.bias * 0).sum()
            return {**super().losses(raw, targets), "steep": zero.abs().sqrt()}  # 0, with a slope of 0 * infinity

    for clip in (1.0, None):
        with pytest.raises(
            TrainingError, match=r"step 0: not a finite number: the gradient \(every loss term is finite"
        ):
            fit(tmp_path / str(clip), system=Steep(("red", "green")), clip=clip)
        assert (tmp_path / str(clip) / "batch.pt").exists()


@pytest.mark.fast
def test_only_kept_batches_are_replayed(tmp_path: Path):
    torch.save({"format": "other"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt: not a batch that a training run saved"):
        replay(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"y.pt: not a batch that a training run saved"):
        load_batch(tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"z.pt: there is no such file"):
        load_batch(tmp_path / "z.pt")


@pytest.mark.fast
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_to_change(error: BaseException):
    with pytest.raises(TrainingError) as caught, memory_advice(8, lambda: 12):
        raise error
    text = str(caught.value)
    assert text.startswith("step 12: out of memory with 8 images at once on a device; try half the batch with twice")
    assert "amp='bf16'" in text
    assert "resume" in text


@pytest.mark.fast
def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(8, lambda: 12):
        raise RuntimeError("shapes do not match")


def test_too_little_memory_in_a_run(tmp_path: Path):
    class Hungry(Tiny):
        def forward(self, images: torch.Tensor) -> Any:
            torch.empty(2**60)
            return super().forward(images)

    with pytest.raises(TrainingError, match="step 0: out of memory with 2 images"):
        fit(tmp_path / "run", system=Hungry(("red", "green")))
