"""Behaviour specific to TensorMask: its heads, its windows, and masks of single windows."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.structures import Instances, Placement
from tests.systems.tiny import SIZE, objects, sized

build = sized(
    {
        "tensormask": {
            "backbone": {"name": "resnet18", "width": 16},
            "neck_width": 32,
            "convs": 1,
            "class_width": 32,
            "box_width": 32,
            "mask_width": 32,
        }
    }
)

SMALL = (64, 64)
HEADS = {
    "bipyramid": {},
    "one window": {"windows": (15,)},
    "simple natural": {"bipyramid": False, "aligned": False},
    "simple aligned": {"bipyramid": False},
    "upscale natural": {"bipyramid": False, "aligned": False, "windows": (15,), "factor": 3.0},
    "upscale aligned": {"bipyramid": False, "windows": (15,), "factor": 1.5},
    "upscale nearest": {"bipyramid": False, "windows": (15,), "factor": 5.0, "mode": "nearest"},
    "without a box head": {"boxes": False},
    "the paper's rule": {"rule": "paper"},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_each_head_trains_and_detects(options):
    system = build("tensormask", backbone={"width": 8}, neck_width=16, **options)
    raw = system(torch.randn(1, 3, *SMALL))
    terms = system.losses(raw, [objects(2, size=SMALL)])
    assert set(terms) == ({"class", "mask"} if options.get("boxes") is False else {"class", "box", "mask"})
    sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    terms |= {f"{name}, no objects": v for name, v in system.losses(raw, [objects(0, size=SMALL)]).items()}
    assert all(torch.isfinite(v) for v in terms.values()), terms
    found = system.decode(raw, [Placement.identity(SMALL)], score_threshold=0.0, detections=5)[0]
    assert len(found.masks) == len(found) <= 5


@pytest.mark.parametrize(
    "name", ["bipyramid", "simple natural", "simple aligned", "upscale natural", "upscale nearest"]
)
def test_masks_of_single_windows_are_those_of_the_dense_tensor(name):
    system = build("tensormask", backbone={"width": 8}, neck_width=16, **HEADS[name]).eval()
    with torch.no_grad():
        raw = system(torch.randn(2, 3, *SMALL))
        places = system.layout(raw).places
        chosen = torch.cat([(places[:, 0] == level).nonzero().flatten()[:7] for level in range(3)])
        rows = torch.cat([torch.arange(len(chosen))[:, None] % 2, places[chosen]], 1)
        for own, logits in system.window_masks(raw, rows):
            level, number = int(rows[own[0], 1]), int(rows[own[0], 4])
            dense = system.whole_masks(raw, level)[number]
            image, y, x = rows[own][:, [0, 2, 3]].unbind(1)
            torch.testing.assert_close(logits, dense[image, :, :, y, x], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "floor"])
def test_a_bipyramid_upsamples_by_the_given_mode(mode):
    system = build("tensormask", windows=(7,), mode=mode).eval()
    smooth = build("tensormask", windows=(7,)).eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        rows = torch.tensor([[0, 0, 3, 4, 0], [0, 1, 2, 3, 0], [0, 2, 1, 1, 0]])
        for own, logits in system.window_masks(raw, rows):
            level, y, x = rows[own[0], 1:4].tolist()
            dense, other = (s.whole_masks(raw, level)[0] for s in (system, smooth))
            torch.testing.assert_close(logits[0], dense[0, :, :, y, x], rtol=1e-4, atol=1e-4)
            assert torch.allclose(dense, other) == (level == 0), "only the finest level is not upsampled"


def test_a_bipyramid_has_finer_masks_on_coarser_levels():
    system = build("tensormask", windows=(7,)).eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        shapes = [tuple(system.whole_masks(raw, level)[0].shape[1:]) for level in range(3)]
    assert shapes == [(7, 7, 24, 32), (14, 14, 12, 16), (28, 28, 6, 8)]


def test_positive_windows_contain_their_object_and_have_only_one():
    system = build("tensormask", windows=(11,))
    raw = system(torch.randn(1, 3, *SIZE))
    layout = system.layout(raw)
    windows = layout.boxes
    inside = torch.tensor([[30.0, 30, 70, 60]])  # 40 x 30 around (50, 45)
    target = Instances(SIZE, inside, torch.tensor([0]))
    own = system.assign(layout, target)
    assert len(own.windows)
    for box in windows[own.windows]:
        assert (box[:2] <= inside[0, :2]).all()
        assert (box[2:] >= inside[0, 2:]).all()
    twice = Instances(SIZE, inside.repeat(2, 1), torch.tensor([0, 1]))
    assert not len(system.assign(layout, twice).windows), "windows of two objects are assigned to none"
    system.rule = "paper"
    fewer = system.assign(layout, target)
    assert set(fewer.windows.tolist()) <= set(own.windows.tolist())


@pytest.mark.fast
def test_invalid_options_are_refused():
    with pytest.raises(UsageError, match="bipyramid=True requires aligned=True and factor=1"):
        build("tensormask", aligned=False)
    with pytest.raises(UsageError, match="windows must be multiples of factor 3, got 11"):
        build("tensormask", bipyramid=False, factor=3.0)
    with pytest.raises(UsageError, match="rule must be one of 'code', 'paper'"):
        build("tensormask", rule="neither")
    for windows in ((), (0, 15), (-3,)):
        with pytest.raises(UsageError, match=r"windows must be (one or more sizes of )?at least 1, got"):
            build("tensormask", windows=windows)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="factor must be a finite number above 0"):
            build("tensormask", bipyramid=False, factor=factor)
    with pytest.raises(UsageError, match=r"windows must be multiples of factor 1e\+09, got 11"):
        build("tensormask", bipyramid=False, factor=1e9)
    with pytest.raises(UsageError, match="convs must be at least 1, got 0"):
        build("tensormask", convs=0)
