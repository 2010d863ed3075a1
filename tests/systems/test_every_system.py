"""What holds for every system of the registry; a new system is tested here without an edit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maskwright as mw
from maskwright.errors import UnknownSystemError, UsageError
from maskwright.structures import Instances, Placement
from maskwright.systems import ProposalSystem, create, names, presets, system_class
from tests.systems.tiny import SIZE, build, objects

EVERY = pytest.mark.parametrize("name", names())


def random_images(count: int = 2, size: tuple[int, int] = SIZE, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def objective(system, images, targets):
    terms = system.losses(system(images), targets)
    return sum(terms.values(), torch.zeros(())), terms


@EVERY
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)], ids=["objects", "one image empty", "all empty"])
def test_every_parameter_has_a_finite_gradient_whatever_the_objects(name, counts):
    system = build(name).train()
    total, terms = objective(system, random_images(), [objects(n) for n in counts])
    assert all(torch.isfinite(v) and v >= -1e-6 for v in terms.values()), terms
    total.backward()
    without = [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in system.parameters() if p.grad is not None)


@EVERY
def test_objects_of_one_pixel_and_many_at_once_are_learnt_from(name):
    system = build(name)
    for target in (objects(2, side=(1, 1)), objects(300, side=(12, 12))):
        total, terms = objective(system, random_images(1), [target])
        assert torch.isfinite(total), terms


@EVERY
def test_crowd_regions_are_not_learnt_from(name):
    system, target = build(name), objects(3)
    if "crowd_overlap" in (system.options.get("loss") or {}):  # anchors in a crowd region are not negatives either
        system = build(name, loss={"crowd_overlap": 1.0})
    if system.options.get("background"):  # what no object covers has a class, which a crowd region takes part in
        system = build(name, background=False)
    if system.options.get("semantic"):  # the pixels of a crowd region have a class too
        system = build(name, semantic={"weight": 0.0})
    target.crowd = torch.tensor([False, False, True])
    torch.manual_seed(3)
    with_crowd, _ = objective(system, random_images(1), [target])
    torch.manual_seed(3)
    without, _ = objective(system, random_images(1), [target[:2]])
    torch.testing.assert_close(with_crowd, without)


@EVERY
def test_a_few_steps_on_one_batch_bring_the_losses_down(name):
    system = build(name).train()
    images, targets = random_images(1), [objects(2)]
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3)
    values = []
    for _ in range(16):
        torch.manual_seed(0)  # the same sample of proposals each time
        total, _ = objective(system, images, targets)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        optimizer.step()
        values.append(float(total.detach()))
    # Not the last: once proposals hit the objects, the second stage has new boxes to learn, and its loss rises again.
    assert min(values) < 0.5 * values[0], values


@EVERY
def test_objects_lie_on_the_images_own_grid_best_first(name):
    system = build(name).eval()
    size = (131, 173)
    with torch.no_grad():
        found = system.decode(
            system(random_images()), [Placement.resize(size, SIZE)] * 2, score_threshold=0.0, detections=30
        )
    for own in found:
        assert own.image_size == size
        assert len(own) <= 30
        assert (own.scores.diff() <= 0).all()
        assert (own.boxes >= 0).all()
        assert (own.boxes[:, 2] <= size[1]).all()
        assert (own.boxes[:, 3] <= size[0]).all()
        assert own.masks is None or own.masks.size == size


@EVERY
def test_a_batch_gives_what_its_images_give_alone(name):
    # In float64: a cell of a mask that float32 rounds over the threshold would move the score made of that mask.
    system = build(name).double().eval()
    images, places = random_images().double(), [Placement.identity(SIZE)] * 2
    with torch.no_grad():
        together = system.decode(system(images), places, score_threshold=0.0)
        alone = [system.decode(system(image[None]), places[:1], score_threshold=0.0)[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == len(b)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


@EVERY
def test_a_high_threshold_leaves_empty_but_whole_instances(name):
    system = build(name).eval()
    with torch.no_grad():
        found = system.decode(system(random_images(1)), [Placement.identity(SIZE)], score_threshold=1.1)[0]
    assert isinstance(found, Instances)
    assert len(found) == 0
    assert found.to_coco(1) == []


@EVERY
@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_no_object_scores_less_than_was_asked_for(name, threshold):
    system = build(name).eval()
    with torch.no_grad():
        found = system.decode(system(random_images(1)), [Placement.identity(SIZE)], score_threshold=threshold)[0]
    assert (found.scores >= threshold).all()


@EVERY
def test_saved_and_loaded_it_answers_the_same(name, tmp_path):
    system = build(name).eval()
    mw.save(system, tmp_path / "own.safetensors")
    again = mw.load(tmp_path / "own.safetensors")
    assert again.options == system.options
    assert again.classes == system.classes
    assert again.preprocess == system.preprocess
    with torch.no_grad():
        a, b = (
            s.decode(s(random_images(1)), [Placement.identity(SIZE)], score_threshold=0.0)[0] for s in (system, again)
        )
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.scores, b.scores)


@EVERY
def test_copies_are_their_own(name):
    system = build(name)
    other = copy.deepcopy(system)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(other.parameters()), next(system.parameters()))


@EVERY
def test_options_are_plain_values_that_rebuild_it(name):
    system = build(name)
    again = create(name, **json.loads(json.dumps(system.options)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in system.state_dict().items()}


@EVERY
def test_images_may_have_more_channels(name):
    system = build(name, in_channels=5)
    batch = system.preprocess.collate([torch.randint(0, 255, (5, 40, 60), dtype=torch.uint8)])
    assert batch.images.shape[1] == 5
    with torch.no_grad():
        system(random_images(1, channels=5))


@EVERY
def test_rows_per_class_are_where_it_says(name):
    if issubclass(system_class(name), ProposalSystem):
        with pytest.raises(UsageError, match="predicts objects of one class; classes must be one name"):
            build(name, classes=("a", "b"))
        assert build(name).input_weight() in build(name).state_dict()
        return
    three, two = build(name, classes=("a", "b", "c")), build(name)
    ours, theirs = three.state_dict(), two.state_dict()
    differing = {k for k in ours if ours[k].shape != theirs[k].shape}
    assert differing == set(three.class_rows())
    assert three.input_weight() in ours


@pytest.mark.parametrize("name", ["deepsnake", "yolact", "ese-seg", "solo"])
def test_the_weight_that_reads_the_image_is_known_of_every_trunk(name):
    system = build(name, backbone="swin-tiny", in_channels=5)
    weight = system.input_weight()
    assert weight is not None
    assert system.state_dict()[weight].shape[:2] == (96, 5)


@EVERY
def test_parts_cover_every_parameter(name):
    system = build(name)
    assert "backbone" in system.groups()
    counted = sum(p.numel() for parts in system.groups().values() for m in parts for p in m.parameters())
    assert counted == sum(p.numel() for p in system.parameters())


@EVERY
def test_forward_runs_in_bfloat16_and_channels_last(name):
    system = build(name).eval().to(torch.bfloat16).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = random_images(1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = system.decode(system(images), [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert found.boxes.dtype == torch.float32
    assert torch.isfinite(found.boxes).all()


COMPILED = """
import sys, torch
from torch.utils._pytree import tree_leaves
from tests.systems.tiny import SIZE, build
failed, images = 0, torch.randn(1, 3, *SIZE)
for name in sys.argv[2:]:
    torch._dynamo.reset()
    system = build(name).eval()
    try:
        with torch.no_grad():
            plain, compiled = system(images), torch.compile(system, fullgraph=True, backend=sys.argv[1])(images)
        for a, b in zip(tree_leaves(vars(plain)), tree_leaves(vars(compiled)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    except Exception as error:
        failed += 1
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
sys.exit(failed)
"""
SHARES = 4  # processes that trace: starting one takes longer than tracing a system
TRACED = ("cascade-mask-rcnn", "fcos", "yolact", "solov2", "polarmask", "maskformer", "sam2")  # always; all: -m full


def compiled(backend, *systems):
    # In a process of its own: the shape checker of this one cannot look into what is being traced.
    command = [sys.executable, "-c", COMPILED, backend, *systems]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("share", [None, *(pytest.param(k, marks=pytest.mark.full) for k in range(SHARES))])
@pytest.mark.slow
def test_forward_is_traced_whole_to_the_same_numbers(share):
    compiled("eager", *(TRACED if share is None else names()[share::SHARES]))  # whole systems are compiled below


@pytest.mark.parametrize("name", ["mask-rcnn", "mask2former"])
@pytest.mark.slow
def test_forward_compiles_to_the_same_numbers(name):
    if not any(shutil.which(own) for own in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        pytest.skip("torch.compile on the host needs a C++ compiler (g++, clang++ or cl), and none is installed here")
    compiled("inductor", name)


@pytest.mark.fast
def test_an_unknown_system_or_option_is_named():
    with pytest.raises(UnknownSystemError, match=r"no system or preset 'mask-rcn'.*mask-rcnn"):
        create("mask-rcn")
    with pytest.raises(UsageError, match=r"mask-rcnn.*'depth'.*its options are classes, backbone"):
        create("mask-rcnn", depth=50)
    with pytest.raises(UsageError, match=r"rules must be one of 'detectron2', 'torchvision', .*got 'mmdet'"):
        create("mask-rcnn", rules="mmdet")
    with pytest.raises(UsageError, match="there is no backbone 'resnet51'; did you mean 'resnet50'"):
        create("mask-rcnn", backbone="resnet51")


@pytest.mark.fast
def test_every_preset_is_a_set_of_known_options():
    import inspect

    for preset, owner in presets().items():
        kind = system_class(owner)
        known = set(inspect.signature(kind.__init__).parameters)
        assert set(kind.presets[preset].options) <= known, preset
