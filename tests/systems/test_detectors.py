"""What holds for every two-stage system and box detector; a new one is tested here without an edit."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from maskwright.structures import Placement
from maskwright.systems import System, names, system_class
from maskwright.systems.families.fcos import FCOSSystem
from maskwright.systems.families.two_stage import TwoStage
from maskwright.systems.fcis import RFCN
from maskwright.systems.retinanet import RetinaNet
from tests.systems.tiny import SIZE, build, objects

DETECTORS = [name for name in names() if issubclass(system_class(name), (TwoStage, FCOSSystem, RetinaNet, RFCN))]
EVERY = pytest.mark.parametrize("name", DETECTORS)


@cache
def built(name: str) -> System:
    return build(name).eval()


def images(count: int = 1) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def losses(system: System, count: int = 1, objects_in: tuple[int, ...] = (3,)) -> dict[str, Tensor]:
    torch.manual_seed(0)  # the same sample of boxes
    return system.losses(system(images(count)), [objects(n, side=(12, 12) if n > 99 else (40, 30)) for n in objects_in])


def test_the_detectors_are_those_of_the_registry():
    assert {"faster-rcnn", "mask-rcnn", "cascade-mask-rcnn", "htc", "rfcn", "fcis", "retinanet", "fcos"} <= {*DETECTORS}
    assert {"centermask", "blendmask", "panet", "panoptic-fpn", "mask-scoring-rcnn"} <= {*DETECTORS}


@EVERY
def test_an_image_of_three_hundred_objects_and_one_of_none_give_finite_gradients(name: str):
    system = built(name)
    terms = losses(system, 2, (300, 0))
    assert all(torch.isfinite(value) for value in terms.values()), terms
    torch.stack([*terms.values()]).sum().backward()
    grads = {key: p.grad for key, p in system.named_parameters() if p.requires_grad}
    system.zero_grad()
    assert not [key for key, grad in grads.items() if grad is None or not torch.isfinite(grad).all()]
    heads = [grad.abs().sum() for key, grad in grads.items() if grad is not None and key.endswith("bias")]
    assert torch.stack(heads).gt(0).float().mean() > 0.8


@EVERY
def test_autocast_to_bfloat16_changes_little(name: str):
    system, places = built(name), [Placement.identity(SIZE)]
    with torch.no_grad():
        raw, exact = system(images()), losses(system)
        found = system.decode(raw, places, score_threshold=0.0)[0]
        with torch.autocast("cpu", torch.bfloat16):
            coarse, terms = system(images()), losses(system)
            again = system.decode(raw, places, score_threshold=0.0)[0]  # the same dense output, heads in bfloat16
    own, other = (
        torch.cat(
            [v.float().flatten() for v in tree_leaves(vars(one)) if isinstance(v, Tensor) and v.is_floating_point()]
        )
        for one in (raw, coarse)
    )
    assert (other - own).norm() < 0.05 * own.norm()  # some thirty layers, each rounding to 8 bits
    for term, value in exact.items():
        torch.testing.assert_close(
            terms[term].float(), value, rtol=0.1, atol=0.02, msg=f"{term}: {terms[term]}, {value}"
        )
    assert again.boxes.dtype == again.scores.dtype == torch.float32
    assert torch.isfinite(again.boxes).all()
    assert abs(len(again) - len(found)) <= 0.2 * len(found)
    best = min(len(again), len(found), 10)
    torch.testing.assert_close(again.scores[:best], found.scores[:best], rtol=0.03, atol=0.01)


COMPILED = """
import sys, torch
from tests.systems.test_detectors import COMPARED, answers, built
for name in COMPARED:
    torch._dynamo.reset()
    system = built(name)
    plain = answers(system)
    for network in system.networks().values():
        network.forward = torch.compile(network.forward, backend="aot_eager")
    for key, value in answers(system).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}, {key}: {m}")
"""
COMPARED = ("mask-rcnn", "centermask")


def answers(system: System) -> dict[str, Tensor]:
    with torch.no_grad():
        found = system.decode(system(images()), [Placement.identity(SIZE)], score_threshold=0.0)[0]
        assert found.masks is not None
        terms = losses(system)
    return {**terms, "boxes": found.boxes, "scores": found.scores, "areas": found.masks.areas().float()}


@pytest.mark.slow
def test_compiled_networks_give_the_same_numbers():
    # In a process of its own: the shape checker of this one cannot look into what is being traced.
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
