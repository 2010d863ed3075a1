"""What holds for every system on a CUDA device: the host's numbers, no waiting in `forward`, training in bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskwright as mw
from maskwright.data import Scenes
from maskwright.structures import Placement
from maskwright.systems import ProposalSystem, create, names, system_class
from tests.systems.tiny import SIZE, build, first_in_order, objects

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)

EVERY = pytest.mark.parametrize("name", names())
GPU = "cuda"


def random_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change) for v in value)
    return {k: mapped(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, lambda v: (found.append(v), v)[1])
    return found


@EVERY
def test_the_network_answers_as_on_the_host(name):
    # In float64 what differs is the code, not how a device rounds; but tables of positions are float32 by design.
    system = build(name).double().eval()
    with torch.no_grad():
        host = system(random_images())
        device = copy.deepcopy(system).to(GPU)(random_images().to(GPU))
    for a, b in zip(tensors(host), tensors(device), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_network_never_waits_for_the_device(name, training):
    system, images = build(name).to(GPU).train(training), random_images().float().to(GPU)
    with torch.set_grad_enabled(training):
        system(images)  # tables of positions and anchors are copied once per size
        try:
            with warnings.catch_warnings(action="ignore"):  # it says that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
            system(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_objects_are_decoded_as_on_the_host(name):
    system = build(name).double().eval()
    places = [Placement.resize((131, 173), SIZE)] * 2
    with torch.no_grad():
        raw = system(random_images())
        host = system.decode(raw, places, score_threshold=0.0, detections=30)
        moved = copy.deepcopy(system).to(GPU)
        device = moved.decode(mapped(raw, lambda v: v.to(GPU)), places, score_threshold=0.0, detections=30)
    for a, b in zip(host, device, strict=True):
        assert len(a) == len(b)
        torch.testing.assert_close(b.scores.cpu(), a.scores, rtol=1e-5, atol=1e-6)
        # Objects of equal score may change places: each has its partner.
        apart = (a.boxes[:, None] - b.boxes.cpu()).abs().amax(2) + 1e3 * (a.labels[:, None] != b.labels.cpu())
        assert len(a) == 0 or float(apart.min(1).values.max()) < 1e-2
        if a.masks is not None:
            assert b.masks is not None
            assert sorted(b.masks.areas().cpu().tolist()) == pytest.approx(sorted(a.masks.areas().tolist()), abs=2)


@EVERY
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)], ids=["objects", "one image empty", "all empty"])
def test_losses_and_gradients_are_the_hosts(name, counts):
    system, targets = build(name).double().eval(), [objects(n) for n in counts]
    with torch.no_grad():
        for parameter in system.parameters():  # offsets begin as whole cells, where interpolation has no gradient
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    moved = copy.deepcopy(system).to(GPU)
    terms = []
    for own, device in ((system, "cpu"), (moved, GPU)):
        with first_in_order():
            terms.append(own.losses(own(random_images().to(device)), [t.to(device) for t in targets]))
        torch.stack(list(terms[-1].values())).sum().backward()
    host, device = terms
    assert device.keys() == host.keys()
    for term, value in host.items():
        torch.testing.assert_close(device[term].detach().cpu(), value.detach(), rtol=1e-5, atol=1e-6)
    for (which, a), b in zip(system.named_parameters(), moved.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None, which
            norm = a.grad.norm() + 1e-3
            assert float((b.grad.cpu() - a.grad).norm() / norm) < 1e-4, which


@EVERY
def test_it_trains_in_bfloat16_and_predicts_there(name, tmp_path):
    proposing = issubclass(system_class(name), ProposalSystem)
    scenes = Scenes(8, size=SIZE, classes=("disc", "box"), seed=0, keypoints=name.startswith("keypoint"))
    torch.manual_seed(0)
    classes = ("object",) if proposing else scenes.classes
    best = mw.train(
        create(name, **{**build(name).options, "classes": classes}), scenes, val=False,
        out=tmp_path / "run", recipe="small", steps=3, batch=4, amp="bf16", channels_last=True, device=GPU, workers=0,
        tensorboard=False,
    )  # fmt: skip
    system = mw.load(best)
    for dtype in ("float32", "bfloat16", "float16"):
        found = system.predict(scenes[0].image, device=GPU, dtype=dtype, score_threshold=0.0).found()
        assert found.boxes.device.type == "cpu"
        assert torch.isfinite(found.boxes).all()
        assert torch.isfinite(found.scores).all()
