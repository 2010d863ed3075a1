"""SAM 2: what a frame attends to, the rules of answers and memories, loading, and training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import maskwright
from maskwright.blocks.memory_attention import MemoryAttention, rotary_table, rotate
from maskwright.errors import UsageError
from maskwright.ops.components import component_areas, small_components
from maskwright.structures import Masks, Placement, Prompts
from maskwright.systems import create
from maskwright.systems.families.memory_tracking import ABSENT_LOGIT
from maskwright.systems.kinds.video import Memory, MemoryBank, Passes, Track
from maskwright.systems.sam2 import SAM2
from tests.systems.tiny import build, objects

SIZE = (128, 128)


def tiny(**options) -> SAM2:
    system = build("sam2", resize={"canvas": list(SIZE)}, **options).eval()
    assert isinstance(system, SAM2)
    system.mask_decoder.present.layers[2].bias.data += 1.0  # the objects of random networks are in the frame
    return system


@pytest.fixture(scope="module")
def system() -> SAM2:
    return tiny()


@pytest.fixture(scope="module")
def frames(system):
    stream = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *SIZE, generator=stream)
    return system.embed(images, [Placement.resize((96, 160), SIZE)] * 3)


def square(value: int = 1) -> Prompts:
    plane = torch.zeros(1, 96, 160, dtype=torch.bool)
    plane[:, 20:60, 40:90] = bool(value)
    return Prompts.from_masks(Masks.from_dense(plane))


# ---- which frames are read -------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bank", "call", "memories", "pointers"),
    [
        # Frame 9 of a long video with a prompt on frame 0: the last six, oldest first.
        ({}, (9, [0], range(1, 9), 100, False), [(0, 6), (3, 5), (4, 4), (5, 3), (6, 2), (7, 1), (8, 0)],
         [(0, 9)] + [(9 - k, k) for k in range(1, 9)]),
        # Backwards, prompted frames of the other side have no pointers.
        ({}, (2, [0, 5], [3, 4], 100, True), [(0, 6), (5, 6), (4, 1), (3, 0)], [(5, 3), (3, 1), (4, 2)]),
        # Every second frame, and the last one.
        ({"stride": 2}, (9, [0], range(1, 9), 100, False), [(0, 6), (2, 3), (4, 2), (6, 1), (8, 0)],
         [(0, 9)] + [(9 - k, k) for k in range(1, 9)]),
        # The two nearest prompted frames; another one among the last frames stands in for an ordinary one.
        ({"prompted": 2, "pointers": 4}, (5, [0, 3, 4, 8], [1, 2], 100, False),
         [(4, 6), (8, 6), (0, 4), (1, 3), (2, 2), (3, 1)], [(4, 1), (3, 2), (2, 3)]),
    ],
)  # fmt: skip
def test_a_frame_attends_to_the_frames_of_the_official_predictor(bank, call, memories, pointers):
    index, prompted, tracked, length, reverse = call
    rules = MemoryBank(**bank)
    found = rules.select(index, prompted, tracked, length=length, reverse=reverse)
    assert list(found.memories) == memories
    most = rules.pointers - 1
    assert [(f, round(d * most)) for f, d in found.pointers] == pointers


@pytest.mark.fast
def test_distances_are_divided_by_the_length_of_a_short_video():
    bank = MemoryBank()
    for length, most in ((5, 4), (16, 15), (1000, 15), (None, 15)):
        found = bank.select(4, [0], [1, 2, 3], length=length, reverse=False)
        assert dict(found.pointers)[0] == pytest.approx(4 / most)


@pytest.mark.fast
def test_passes_remember_the_last_direction_in_little_space():
    passes = Passes()
    for frame in range(2000):
        passes = passes.add(frame, False)
    assert len(passes.ranges) == 1
    for frame in range(1500, 1000, -1):
        passes = passes.add(frame, True)
    assert [passes.direction(f) for f in (0, 1000, 1001, 1500, 1501, 2000)] == [False, False, True, True, False, None]
    passes = passes.add(1200, None)
    assert [passes.direction(f) for f in (1199, 1200, 1201)] == [True, None, True]
    assert len(passes.ranges) == 3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": {"prompted": 1}}, "memory.prompted must be at least 2 or null, got 1"),
        ({"memory": {"frames": 1}}, "memory.frames must be at least 2, got 1"),
        ({"memory": {"width": 24}}, r"decoder.width must be a multiple of 4 and of memory.width \(24\), got 256"),
        ({"backbone": "swin-tiny"}, "backbone must be a Hiera, hiera-tiny for instance, got 'swin-tiny'"),
        ({"resize": {"canvas": [100, 100]}}, r"resize.canvas must be a multiple of 32, got \[100, 100\]"),
        ({"version": "3"}, "version must be one of '2', '2.1'"),
        ({"loss": {"alpha": 2.0}}, "loss.alpha must be between 0 and 1 or null, got 2.0"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("sam2", **options)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_rotation_depends_on_differences_of_positions_alone():
    table = rotary_table((4, 6), 16)
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 24, 16)
    scores = (rotate(q, table) @ rotate(k, table).T).view(4, 6, 4, 6)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[1, 2, 3, 5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[2, 2, 2, 2], q[0] @ k[0], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(scores[0, 0, 2, 3], scores[0, 0, 3, 2])


def test_one_frame_for_several_memories_is_that_frame_repeated():
    torch.manual_seed(0)
    layer = MemoryAttention(32, 16, 64, 2).eval()
    frame, memories, pointers = torch.randn(1, 32, 4, 5), torch.randn(3, 2, 16, 4, 5), torch.randn(3, 4, 32)
    rest = (torch.tensor([6, 0]), pointers, torch.tensor([0.1, 0.2, 0.5, 1.0]))
    with torch.no_grad():
        one, each = layer(frame, memories, *rest), layer(frame.expand(3, -1, -1, -1), memories, *rest)
        none = layer(frame, memories, rest[0], pointers[:, :0], rest[2][:0])
    torch.testing.assert_close(one, each)
    assert one.shape == (3, 32, 4, 5)
    assert not torch.allclose(one, none)


@pytest.mark.fast
def test_components_touch_at_corners_and_not_between_planes():
    planes = torch.zeros(2, 4, 5, dtype=torch.bool)
    planes[0, 0, 0] = planes[0, 1, 1] = planes[0, 3, 4] = planes[1, 1, 1] = True
    assert component_areas(planes)[planes].tolist() == [2, 2, 1, 1]
    assert small_components(planes, 1).nonzero().tolist() == [[0, 3, 4], [1, 1, 1]]


# ---- tracking --------------------------------------------------------------------------------------------------------


def test_tracking_changes_neither_memory_nor_embedding(system, frames):
    _, first = system.track(frames[0], Memory(), square())
    before = [v.clone() for v in frames[1].tensors.values()]
    found, second = system.track(frames[1], first)
    again, _ = system.track(frames[1], first)
    assert len(first.tracks[0].new) == 1
    assert second.frame == 1
    assert list(second.tracks[0].prompted) == [0]
    assert list(second.tracks[0].tracked) == [1]
    torch.testing.assert_close(found.logits, again.logits, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, frames[1].tensors.values(), strict=True))


def test_objects_together_are_tracked_as_each_alone(system, frames):
    size = (96, 160)
    prompts = Prompts.join([
        square(), Prompts.from_points(size, [(30.0, 40.0)]), Prompts.from_boxes([[10, 10, 70, 60]], size),
        Prompts.from_points(size, [[(30.0, 40.0), (100.0, 20.0), (5.0, 6.0)]], [[1, 0, 1]]),
    ])  # fmt: skip
    memory, alone = Memory(), [Memory()] * 4
    for step, frame in enumerate(frames):
        given = prompts if step == 0 else None
        together, memory = system.track(frame, memory, given)
        for row in range(4):
            found, alone[row] = system.track(frame, alone[row], None if given is None else given[row])
            torch.testing.assert_close(found.logits[0], together.logits[row], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)
    few, _ = system.track(frames[1], memory, index=1, budget=1)
    many, _ = system.track(frames[1], memory, index=1)
    torch.testing.assert_close(few.logits, many.logits, rtol=1e-3, atol=1e-3)


def test_a_mask_is_its_own_answer_and_an_empty_one_means_absence(system, frames):
    found, _ = system.track(frames[0], Memory(), square())
    inner = found.masks.dense()[0]
    assert inner[24:56, 44:86].all()
    assert not inner[:16].any()
    assert not inner[64:].any()
    assert float(found.present[0]) == 10.0
    hidden, memory = system.track(frames[0], Memory(), square(), hidden=[0])
    assert int(hidden.masks.areas()[0]) == 0
    assert float(hidden.present[0]) == -10.0
    entry = memory.tracks[0].new[0][0]
    torch.testing.assert_close(entry.pointer, system.pointer.absent)


def test_an_absent_object_has_an_empty_mask_and_its_pointer(system, frames):
    system = tiny()
    system.mask_decoder.present.layers[2].bias.data -= 1000
    _, memory = system.track(frames_of(system)[0], Memory(), square())
    found, memory = system.track(frames_of(system)[1], memory)
    assert bool((found.logits == ABSENT_LOGIT).all())
    assert int(found.masks.areas()[0]) == 0
    torch.testing.assert_close(memory.tracks[0].tracked[1].pointer, system.pointer.absent)


def frames_of(system):
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    return system.embed(images, [Placement.resize((96, 160), SIZE)] * 2)


def test_objects_without_prompts_are_absent(system, frames):
    found, memory = system.track(frames[0], Memory(tracks=(Track(),)))
    assert float(found.logits.max()) == ABSENT_LOGIT
    assert memory.first is None
    nothing, _ = system.track(frames[0], Memory())
    assert len(nothing) == 0


def test_an_embedding_of_another_kind_is_refused(system, frames):
    part = replace(frames[0], tensors={k: v for k, v in frames[0].tensors.items() if k != "frame"})
    with pytest.raises(UsageError, match="the embedding has no features for videos"):
        system.track(part, Memory(), square())
    with pytest.raises(UsageError, match="the prompts are for an image of"):
        system.track(frames[0], Memory(), Prompts.from_points((10, 10), [(1.0, 1.0)]))


def test_frames_and_images_are_resized_in_different_ways(system):
    assert (system.preprocess.resample, system.frame_preprocess.resample) == ("antialias", "bicubic")
    image = torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, two = (p.apply(image)[0] for p in (system.preprocess, system.frame_preprocess))
    assert (one - two).abs().max() > 0


# ---- loading ---------------------------------------------------------------------------------------------------------

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"


@pytest.mark.parametrize("version", ["2", "2.1"])
def test_official_files_are_recognised(version, tmp_path):
    tensors = json.loads((LAYOUTS / f"sam2{version.removeprefix('2')}-hiera_tiny.json").read_text())["tensors"]
    torch.save({"model": {k: torch.zeros(shape) for k, (shape, _) in tensors.items()}}, tmp_path / "weights.pt")
    system = maskwright.load(tmp_path / "weights.pt")
    assert (system.name, system.version, system.options["backbone"]["name"]) == ("sam2", version, "hiera-tiny")
    assert "Apache-2.0" in system.source["weights_licence"]


# ---- training --------------------------------------------------------------------------------------------------------


def test_images_train_what_images_use(system):
    learner = build("sam2").train()
    size = learner.preprocess.canvas
    raw = learner(torch.randn(2, 3, *size))
    losses = learner.losses(raw, [objects(3, size), objects(1, size)])
    assert set(losses) == {"mask", "dice", "iou", "present"}
    sum(losses.values()).backward()
    with_gradient = {name.split(".")[0] for name, p in learner.named_parameters() if p.grad is not None}
    assert with_gradient == {"image_encoder", "prompt_encoder", "mask_decoder"}
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)


def test_a_few_steps_on_one_image_lower_the_loss():
    torch.manual_seed(0)
    learner = build("sam2", resize={"canvas": [64, 64]}, simulation={"points": 1}).train()
    size = learner.preprocess.canvas
    target = [objects(2, size, (20, 24))]
    image = torch.randn(1, 3, *size) * 0.1 + target[0].masks.dense().any(0) * 2.0  # the objects are bright
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 3e-3)
    seen = []
    for _ in range(20):
        losses = learner.losses(learner(image), target)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        seen.append(float(losses["dice"].detach()))
    assert sum(seen[-3:]) < 0.8 * sum(seen[:3])
