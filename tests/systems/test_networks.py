"""Every system's learned parameters belong to named networks, and nothing reads them outside of a network's call."""

from __future__ import annotations

import pytest
import torch

from maskwright.structures import Masks, Placement, Prompts
from maskwright.systems import describe, find, names, system_class
from maskwright.systems.kinds.video import Memory, VideoSystem
from tests.systems.networks import not_plain, watched
from tests.systems.tiny import SIZE, build, objects

EVERY = pytest.mark.parametrize("name", names())


@EVERY
def test_parameters_are_read_inside_of_networks_alone(name):
    system = build(name).train()
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    places = [Placement.identity(SIZE)] * 2
    with watched(system) as reads:
        raw = system(images)
        losses = system.losses(raw, [objects(3), objects(1)])
        with torch.no_grad():
            system.eval()
            system.decode(system(images), places, score_threshold=0.0)
            if "panoptic" in system.tasks:
                system.decode_panoptic(system(images), places)
                system.decode_semantic(system(images), places)
            if isinstance(system, VideoSystem):
                track(system)
    assert all(torch.isfinite(value) for value in losses.values())
    assert not reads.outside
    assert all(reads.calls.values()), f"never called: {[n for n, c in reads.calls.items() if not c]}"
    assert not not_plain(raw)


def track(system: VideoSystem) -> None:
    """Tracks an object through two frames, from its mask."""
    system.pin_fingerprint("any")  # it is made of the weights
    size = system.preprocess.canvas
    assert size is not None
    frames = [system.embed(torch.randn(1, 3, *size), [Placement.identity(size)])[0] for _ in range(2)]
    masks = Masks.from_dense(torch.ones(1, *size, dtype=torch.bool))
    _, memory = system.track(frames[0], Memory(), Prompts.from_masks(masks))
    system.track(frames[1], memory)


@EVERY
def test_every_parameter_belongs_to_exactly_one_network(name):
    system = build(name)
    owners = [id(p) for network in system.networks().values() for p in network.parameters()]
    assert sorted(owners) == sorted(id(p) for p in system.parameters())
    assert "dense" in system.networks() or len(system.networks()) > 1


@EVERY
def test_capabilities_are_known_without_weights(name):
    described, system = describe(name), build(name)
    assert all(p.device.type == "meta" for p in described.parameters())
    assert system.outputs >= {"boxes"}
    assert system.needs <= system.outputs
    assert system.tasks & {"instances", "proposals", "semantic"}


@EVERY
def test_decoding_gives_the_outputs_it_announces(name):
    system = build(name).eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)))
        for threshold in (0.0, 1.1):
            found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=threshold)[0]
            assert (found.masks is not None) == ("masks" in system.outputs)
            if len(found):
                assert (found.keypoints is not None) == ("keypoints" in system.outputs)


@pytest.mark.parametrize("name", [preset for name in names() for preset in system_class(name).presets])
def test_every_preset_can_be_described_before_its_classes_are_known(name):
    if "timm" in str(find(name)[1]) or "vit_" in str(find(name)[1]):
        pytest.importorskip("timm", reason="timm is an extra")
    assert describe(name).outputs
