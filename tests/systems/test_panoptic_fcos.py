"""BlendMask and CenterMask with a semantic branch: rows for things, losses, merging, and the authors' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import maskwright as mw
from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from tests.systems.tiny import SIZE, build, tiny_options

CLASSES, STUFF = ("sky", "cat", "grass", "dog"), ("sky", "grass")
DETECTORS = {"panoptic-blendmask": "blendmask", "panoptic-centermask": "centermask"}
both = pytest.mark.parametrize("name", DETECTORS)


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def segments(*rows: tuple[int, tuple[int, int, int, int]]) -> Instances:
    """Segments of (label, (x0, y0, x1, y1))."""
    planes = torch.zeros(len(rows), *SIZE, dtype=torch.bool)
    for plane, (_, (x0, y0, x1, y1)) in zip(planes, rows, strict=True):
        plane[y0:y1, x0:x1] = True
    boxes = torch.tensor([box for _, box in rows]).float()
    return Instances(SIZE, boxes, torch.tensor([label for label, _ in rows]), Masks.from_dense(planes))


THINGS = segments((0, (10, 10, 60, 50)), (1, (70, 20, 110, 80)))
MIXED = segments((0, (0, 0, 128, 10)), (1, (10, 10, 60, 50)), (2, (0, 90, 128, 96)), (3, (70, 20, 110, 80)))


def panoptic(name: str):
    return build(name, classes=CLASSES, stuff=STUFF)


@both
def test_detector_has_rows_for_things_and_branch_for_stuff(name: str):
    system = panoptic(name)
    assert system.tasks == {"instances", "panoptic", "semantic"}
    state = system.state_dict()
    assert len(state["dense.head.logits.weight"]) == 2
    assert len(state["regions.output.weight"]) == 3  # "things" and two regions
    plain = build(DETECTORS[name])
    assert plain.tasks == {"instances"}
    assert not plain(images()).finest
    assert system(images()).finest[0].shape[2:] == (SIZE[0] // 4, SIZE[1] // 4)


@both
def test_things_are_trained_as_by_the_detector_alone(name: str):
    system = panoptic(name)
    own = {k: v for k, v in system.options.items() if k not in ("stuff", "regions")}
    plain = create(DETECTORS[name], **{**own, "classes": ("cat", "dog")})
    state = {k: v for k, v in system.state_dict().items() if not k.startswith(("regions.", "dense.neck."))}
    for kind in ("lateral", "output"):  # levels are counted from stride 4 in one and from stride 8 in the other
        state |= {
            k.replace(f"{kind}.{n + 1}.", f"{kind}.{n}."): v for n in range(3)
            for k, v in system.state_dict().items() if k.startswith(f"dense.neck.{kind}.{n + 1}.")
        }  # fmt: skip
    state |= {k: v for k, v in system.state_dict().items() if k.startswith("dense.neck.coarser.")}
    plain.load_state_dict(state)
    values = [one.losses(one(images()), [target]) for one, target in ((plain, THINGS), (system, MIXED))]
    assert values[1].keys() == {*values[0], "regions"}
    for term, value in values[0].items():
        torch.testing.assert_close(values[1][term], value)
    values[1]["regions"].backward()
    grads = [p.grad for p in system.regions.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


@both
def test_branch_reads_strides_4_to_32(name: str):
    system = panoptic(name).eval()
    raw = system(images())
    levels = [*raw.finest, *raw.features[:3]]
    assert [SIZE[0] // level.shape[2] for level in levels] == [4, 8, 16, 32]
    assert torch.equal(system.semantic_logits(raw), system.regions(levels))


@both
def test_segments_are_things_by_score_and_then_regions(name: str):
    system = panoptic(name).eval()
    with torch.no_grad():
        raw = system(images(2))
    place = [Placement.resize((120, 160), SIZE)] * 2
    found = system.decode(raw, place, score_threshold=0.0)
    assert {int(label) for own in found for label in own.labels} <= {1, 3}
    for own in system.decode_panoptic(raw, place, score_threshold=0.0, smallest_area=0):
        order = own.things.int().tolist()
        assert order == sorted(order, reverse=True)
        assert own.things.tolist() == [CLASSES[label] not in STUFF for label in own.segments.labels]
        assert own.segments.scores is not None
        scores = own.segments.scores[own.things].tolist()
        assert scores == sorted(scores, reverse=True)
    alone = system.decode_panoptic(raw, place, score_threshold=1.0, smallest_area=0)[0]
    expected = system._stuff(raw, 0, place[0])[0]
    stuff = torch.tensor([-1, 0, 2])
    assert torch.equal(alone.semantic(), stuff[expected])


@both
def test_without_stuff_the_branch_is_not_trained(name: str):
    system = build(name, classes=("cat", "dog"))
    assert float(system.losses(system(images()), [THINGS])["regions"].detach()) == 0


@both
def test_classes_must_have_things(name: str):
    with pytest.raises(UsageError, match="at least one class that is not stuff"):
        create(name, **{**tiny_options(name), "classes": STUFF, "stuff": STUFF})


@pytest.mark.parametrize(
    ("name", "origin", "branch"),
    [("panoptic-blendmask", "adelaidet", "panoptic_module"), ("panoptic-centermask", "centermask2", "sem_seg_head")],
)
def test_keys_of_the_branch_and_of_the_pyramid(name: str, origin: str, branch: str):
    rules = next(o for o in origins() if o.system == name and o.name == origin)
    keys = {
        f"{branch}.p2.0.weight": "regions.levels.0.0.conv.weight",
        f"{branch}.p5.4.norm.bias": "regions.levels.3.2.norm.bias",
        f"{branch}.predictor.weight": "regions.output.weight",
        "backbone.fpn_lateral2.weight": "dense.neck.lateral.0.conv.weight",
        "backbone.fpn_output5.bias": "dense.neck.output.3.conv.bias",
        "backbone.top_block.p6.weight": "dense.neck.coarser.0.conv.weight",
        "proposal_generator.fcos_head.cls_logits.weight": "dense.head.logits.weight",
    }
    options = {"head": {"norm": "group"}, "blend": {"convs": 3}}
    found = rules.translate({k: torch.full((1, 1, 1, 1), float(i)) for i, k in enumerate(keys)}, options)
    assert {k: int(v) for k, v in found.items()} == {k: i for i, k in enumerate(keys.values())}


def test_saved_and_loaded_with_other_regions(tmp_path: Path):
    system = panoptic("panoptic-centermask")
    mw.save(system, tmp_path / "own.safetensors")
    loaded = mw.load(tmp_path / "own.safetensors", classes=("cat", "dog", "grass"), stuff=("grass",))
    assert loaded.classes == ("cat", "dog", "grass")
    assert len(loaded.state_dict()["regions.output.weight"]) == 2
    before, after = system.state_dict(), loaded.state_dict()
    assert torch.equal(after["regions.output.weight"], before["regions.output.weight"][[0, 2]])
    assert torch.equal(after["dense.head.logits.weight"], before["dense.head.logits.weight"])
