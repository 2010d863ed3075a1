"""FCIS and R-FCN: position-sensitive pooling, targets of masks, voting, and the published layout."""

from __future__ import annotations

import pytest
import torch

from maskwright.checkpoints.origins.fcis import ORIGINS
from maskwright.errors import UsageError
from maskwright.ops.pooling import position_sensitive_pool
from maskwright.structures import Masks, Placement
from maskwright.systems import create
from maskwright.systems.fcis import FCIS, RFCN, mask_targets, vote
from tests.systems.tiny import SIZE, build, objects

LIMITS = {
    "score_threshold": 1e-3, "nms_threshold": 0.3, "detections": 100, "mask_threshold": 0.4, "merge_threshold": 0.5,
}  # fmt: skip


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def pooled_one_by_one(features: torch.Tensor, rois: torch.Tensor, group: int, side: int, scale: float) -> torch.Tensor:
    """The definition of the pooling, bin by bin."""
    maps = features.unflatten(1, (-1, group, group))
    result = torch.zeros(len(rois), maps.shape[1], side, side)
    for n, (image, x0, y0, x1, y1) in enumerate(rois.tolist()):
        left, top, right, bottom = (int(v + 0.5) * scale for v in (x0, y0, x1 + 1, y1 + 1))
        width, height = max(right - left, 0.1) / side, max(bottom - top, 0.1) / side
        for p in range(side):
            for q in range(side):
                rows = [y for y in range(features.shape[2]) if top + p * height - 1 < y < top + (p + 1) * height]
                columns = [x for x in range(features.shape[3]) if left + q * width - 1 < x < left + (q + 1) * width]
                if rows and columns:
                    own = maps[int(image), :, p * group // side, q * group // side]
                    result[n, :, p, q] = own[:, rows][:, :, columns].mean((1, 2))
    return result


@pytest.mark.parametrize(("group", "side"), [(2, 2), (2, 6), (3, 7)])
def test_each_bin_is_the_mean_of_the_map_of_its_part(group: int, side: int):
    features = torch.randn(2, 3 * group**2, 6, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rois = torch.tensor(
        [[0, 3.3, 5.7, 60.2, 50.9], [1, 0, 0, 143, 95], [1, 100.4, 40, 101, 41], [0, 130, 80, 300, 200.0]]
    )
    pooled = position_sensitive_pool(features, rois, group, side, 1 / 16)
    expected = pooled_one_by_one(features, rois, group, side, 1 / 16)
    torch.testing.assert_close(pooled, expected)
    weight = torch.randn_like(pooled)
    mine, theirs = (torch.autograd.grad((v * weight).sum(), features)[0] for v in (pooled, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.fast
def test_boxes_outside_of_the_image_and_none_at_all_are_pooled_to_zeros():
    features = torch.ones(1, 8, 4, 4)
    outside = position_sensitive_pool(features, torch.tensor([[0, 500.0, 500, 600, 600]]), 2, 4, 1 / 16)
    assert outside.shape == (1, 2, 4, 4)
    assert not outside.any()
    assert position_sensitive_pool(features, torch.zeros(0, 5), 2, 4).shape == (0, 2, 4, 4)


@pytest.mark.fast
def test_a_target_is_the_part_of_the_object_inside_of_the_box():
    plane = torch.zeros(1, 40, 60, dtype=torch.bool)
    plane[0, 10:30, 20:40] = True
    boxes = torch.tensor([[20.0, 10, 39, 29], [30, 10, 49, 29], [0, 0, 10, 5]])
    around = torch.tensor([[20.0, 10, 39, 29]])
    own, shifted, apart = mask_targets(Masks.from_dense(plane), around, torch.zeros(3).long(), boxes, 10)
    assert own.all()
    assert shifted[:, :5].all()
    assert not shifted[:, 5:].any()
    assert not apart.any()
    assert mask_targets(Masks.from_dense(plane), around, torch.zeros(0).long(), boxes[:0], 10).shape == (0, 10, 10)


@pytest.mark.fast
def test_candidates_vote_with_their_scores_for_the_class():
    boxes = torch.tensor([[10.0, 10, 30, 29], [10, 10, 30, 29], [50, 10, 69, 29]])
    masks = torch.zeros(3, 4, 4)
    masks[0, :, :2] = 1  # the left half
    masks[1] = 1
    masks[2] = 1
    scores = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.0005, 0.4, 0.6]])
    voted = vote(boxes, scores, masks, (40, 80), **LIMITS)
    assert voted.labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(voted.scores, torch.tensor([0.6, 0.4, 0.2]))
    # Class 0: 0.75 for the left half alone; its soft edge is binary at 0.4. Class 1: two thirds for the whole box.
    assert voted.boxes.tolist() == [[10, 10, 20, 29], [50, 10, 69, 29], [10, 10, 30, 29]]


@pytest.mark.fast
def test_objects_without_pixels_are_dropped():
    voted = vote(
        torch.tensor([[10.0, 10, 29, 29]]), torch.tensor([[0.9, 0.1]]), torch.zeros(1, 4, 4), (40, 80), **LIMITS
    )
    assert len(voted.boxes) == len(voted.scores) == len(voted.labels) == len(voted.masks) == 0


@pytest.mark.parametrize("name", ["fcis", "rfcn"])
@pytest.mark.parametrize("mining", [True, False])
def test_all_parameters_are_trained_with_objects_and_without(name: str, mining: bool):
    system = build(name, mining=mining)
    assert isinstance(system, RFCN)
    for targets in ([objects(3), objects(0)], [objects(0), objects(0)]):
        losses = system.losses(system(images()), targets)
        names = {"rpn_objectness", "rpn_box", "class", "box"}
        assert losses.keys() == names | ({"mask"} if "masks" in system.outputs else set())
        assert all(torch.isfinite(v) for v in losses.values())
        system.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", ["fcis", "rfcn"])
def test_losses_in_half_precision_are_close(name: str):
    system, target = build(name), objects(3)
    assert isinstance(system, RFCN)
    raw = system(images(1))
    own = [system.assign(system.propose(raw, [SIZE])[0], target)]
    exact = system.roi_losses(raw, own, [target])
    with torch.autocast("cpu", torch.bfloat16):
        coarse = system.roi_losses(system(images(1)), own, [target])
    for term, value in exact.items():
        torch.testing.assert_close(coarse[term].float(), value, rtol=0.05, atol=0.01)


def test_rfcn_detects_boxes_alone_and_fcis_masks_too():
    place = Placement.resize((48, 64), SIZE)
    for name, masks in (("rfcn", False), ("fcis", True)):
        system = build(name).eval()
        found = system.decode(system(images(1)), [place])[0]
        assert len(found)
        assert (found.masks is not None) == masks == ("masks" in system.outputs)
        assert float(found.boxes.min()) >= 0
        assert (found.boxes <= torch.tensor([64.0, 48, 64, 48])).all()


def test_mining_keeps_the_boxes_of_largest_loss():
    system = build("fcis")
    assert isinstance(system, FCIS)
    raw, target = system(images(1)), objects(3)
    own = system.assign(system.propose(raw, [SIZE])[0], target)
    every = system.roi_losses(raw, [own], [target])
    system.box_rules = type(system.box_rules)(**{**vars(system.box_rules), "sample": 8})
    assert system.roi_losses(raw, [own], [target])["class"] > every["class"]


def test_files_of_the_authors_load_with_either_layer_of_deltas():
    system = build("fcis", classes=("a", "b", "c"))
    origin = next(o for o in ORIGINS if o.system == "fcis")
    maps = 2 * 49
    own = {k: v for k, v in system.state_dict().items() if k in ("dense.scores.weight", "dense.scores.bias")}
    theirs = {
        "arg:fcis_cls_seg_weight": own["dense.scores.weight"].roll(maps, 0),
        "arg:fcis_cls_seg_bias": own["dense.scores.bias"].roll(maps, 0),
    }
    width = own["dense.scores.weight"].shape[1]
    plain = torch.randn(392, width, 1, 1), torch.randn(392)
    stds = torch.tensor([0.2, 0.2, 0.5, 0.5] * 2).repeat_interleave(49)
    for name in ("plain", "copies", "both"):
        state = dict(theirs)
        if name != "copies":
            state |= {"arg:fcis_bbox_weight": plain[0], "arg:fcis_bbox_bias": plain[1]}
        if name != "plain":
            state |= {
                "arg:fcis_bbox_weight_test": plain[0] * stds[:, None, None, None],
                "arg:fcis_bbox_bias_test": plain[1] * stds,
            }
        result = origin.translate(state, {"classes": ("a", "b", "c")})
        assert result.keys() == {f"dense.{part}.{kind}" for part in ("scores", "boxes") for kind in ("weight", "bias")}
        torch.testing.assert_close(result["dense.boxes.weight"], plain[0][196:])
        torch.testing.assert_close(result["dense.boxes.bias"], plain[1][196:])
        torch.testing.assert_close(result["dense.scores.weight"], own["dense.scores.weight"])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"side": 5}, "side must be at least parts = 7, got 5"),
        ({"parts": 0}, "parts must be at least 1, got 0"),
        ({"backbone": "swin-tiny"}, "no dilated stages"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        create("fcis", **options)
