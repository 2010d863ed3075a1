"""PointRend's own: points inside boxes and on whole images, and as an option of other systems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maskwright as mw
from maskwright.blocks.points import BoxPoints, PlanePoints, PointRules
from maskwright.blocks.roi_heads import Sampled
from maskwright.checkpoints.origins.pointrend import ORIGINS
from maskwright.errors import UsageError
from maskwright.ops import points as point_ops
from maskwright.structures import Instances, Masks, Placement
from tests.systems.tiny import SIZE, TINY, build, objects


def make(name: str, **options: Any) -> Any:
    return build(name, **options)


def random_images(count: int = 1) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def terms_of(system: Any, target: Instances) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return system.losses(system(random_images()), [target])


def test_masks_are_asked_for_at_28_cells_a_side_and_doubled_three_times():
    system, boxes = make("pointrend").eval(), torch.tensor([[5.0, 8, 60, 70], [30, 20, 90, 95]])
    with torch.no_grad():
        raw = system(random_images())
        fine, _ = system.read_boxes(raw, [boxes], [torch.tensor([0, 1])])
        coarse, _ = system.read_boxes(raw, [boxes], [torch.tensor([0, 1])], refine=False)
        none, _ = system.read_boxes(raw, [boxes[:0]], [torch.tensor([0, 1])[:0]])
    assert fine[0].shape == (2, 224, 224)
    assert coarse[0].shape == (2, 7, 7)
    assert none[0].shape == (0, 224, 224)


def test_few_objects_at_a_time_are_refined_as_all_at_once():
    torch.manual_seed(0)
    refiner, feature, coarse = BoxPoints(8, 3, start="grid"), torch.randn(2, 8, 24, 32), torch.randn(5, 3, 7, 7)
    boxes = [torch.rand(3, 2, 2).sort(1).values.flatten(1) * 90, torch.rand(2, 2, 2).sort(1).values.flatten(1) * 90]
    labels = torch.tensor([0, 2, 1, 1, 0])
    whole = refiner.refine(feature, coarse, boxes, labels)
    single = refiner.refine(feature, coarse, boxes, labels, budget=1)
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


def test_the_coarse_side_and_the_number_of_points_are_options():
    system = make("pointrend", coarse_side=14, refine_points=400, refine_steps=2).eval()
    with torch.no_grad():
        found, _ = system.read_boxes(system(random_images()), [torch.tensor([[5.0, 8, 60, 70]])], [torch.tensor([0])])
    assert found[0].shape == (1, 56, 56)  # 4 * 14 * 14 cells are more than 400: nothing is skipped


def test_masks_are_learnt_in_the_boxes_that_will_be_found():
    system = make("pointrend")
    same = make("pointrend", predicted_boxes=False)
    with torch.no_grad():
        for own in (system, same):
            own.box_head.deltas.bias.fill_(2.0)  # a fifth of each box's side further right, and larger
    boxes, first = torch.tensor([[10.0, 10, 30, 50], [0, 0, 9, 9]]), torch.tensor([0])
    sampled = [Sampled(boxes, torch.tensor([1, 2]), first, first)]
    deltas = torch.full((2, 8), 2.0)
    assert same.mask_boxes(sampled, deltas)[0].tolist() == [[10, 10, 30, 50]]
    moved = system.mask_boxes(sampled, deltas)[0]
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    torch.testing.assert_close(centre, torch.tensor([[20 + 0.2 * 20, 30 + 0.2 * 40]]))
    assert moved[0, 2] - moved[0, 0] > 20


def test_polygons_are_learnt_from_as_pixels():
    system, target = make("pointrend"), objects(2)
    rings = [[ring] for ring in [[10, 10, 60, 10, 60, 50, 10, 50], [70, 20, 120, 20, 95, 80]]]
    polygons = Masks.from_polygons(rings, SIZE)
    boxes = polygons.boxes()
    found = terms_of(system, Instances(SIZE, boxes, target.labels, polygons))
    packed = terms_of(system, Instances(SIZE, boxes, target.labels, polygons.pack()))
    assert found.keys() == packed.keys() == {"rpn_objectness", "rpn_box", "class", "box", "mask", "mask_point"}
    torch.testing.assert_close(found, packed)


def test_the_implicit_variant_learns_and_finds():
    system = make("pointrend", implicit=True, point_width=8, mask_fc_width=16)
    terms = terms_of(system, objects(2))
    assert "mask" not in terms
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)
    terms_of(system, objects(0))
    with torch.no_grad():
        raw = system.eval()(random_images())
        masks, _ = system.read_boxes(raw, [torch.tensor([[5.0, 8, 60, 70]])], [torch.tensor([1])])
        with pytest.raises(UsageError, match="no coarse masks"):
            system.decode(raw, [Placement.identity(SIZE)], refine=False, score_threshold=0.0)
    assert masks[0].shape == (1, 224, 224)


@pytest.mark.parametrize("name", ["pointrend", "pointrend-semantic"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0.5}, "candidates is 0.5, important 0.75; at least 1 and a share are needed"),
        ({"important": -0.5}, "important -0.5; at least 1 and a share"),
        ({"point_count": 0}, "point_count is 0; expected at least 1"),
        ({"refine_steps": -1}, "refine_steps is -1; expected 0, which refines nothing, or more"),
        ({"refine_points": 0}, "refine_points is 0; expected at least 1; refine_steps=0 refines nothing"),
    ],
)
def test_points_that_cannot_be_chosen_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        make(name, **options)


@pytest.mark.parametrize("given", [(), (10,), (10, 10, 10), (10, -1)])
@pytest.mark.parametrize("option", ["proposals_before", "proposals_after"])
def test_proposals_are_counted_in_training_and_at_test(option: str, given: tuple[int, ...]):
    with pytest.raises(UsageError, match=f"{option} is .*; expected two numbers, in training and at test"):
        make("pointrend", **{option: given})


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="important 1\\.5; at least 1"):
        make("pointrend", important=1.5)
    with pytest.raises(UsageError, match="nothing to choose from"):
        mw.create("pointrend-semantic", **{**TINY["pointrend-semantic"], "classes": ("a",)})
    with pytest.raises(UsageError, match="points=True needs masks"):
        make("mask-rcnn", points=True, neck="dc5")


# ---- files -----------------------------------------------------------------------------------------------------------


def official(system: Any, old: bool = False) -> dict[str, Tensor]:
    """Our tensors of the heads under the project's names; the trunk's and the first stage's come from a real layout."""
    back = {
        "mask_head.reduce.": "coarse_head.reduce_channel_dim_conv.",
        "mask_head.halve.": "coarse_head.reduce_spatial_dim_conv.", "mask_head.fcs.0.": "coarse_head.fc1.",
        "mask_head.fcs.1.": "coarse_head.fc2.", "mask_head.logits.": "coarse_head.prediction.",
        "points.head.fcs.0.": "point_head.fc1.", "points.head.fcs.1.": "point_head.fc2.",
        "points.head.fcs.2.": "point_head.fc3.", "points.head.logits.": "point_head.predictor.",
        "points.waves": "point_head.positional_encoding_gaussian_matrix",
    }  # fmt: skip
    if system.options["implicit"]:
        back = {k: v.replace("coarse_head", "parameter_head") for k, v in back.items()}
    state = {}
    for key, value in system.state_dict().items():
        for ours, theirs in back.items():
            if key.startswith(ours):
                name = "mask_" + theirs if old else "mask_head." + theirs
                name = name.replace("coarse_head.fc", "coarse_head.coarse_mask_fc") if old else name
                state[f"roi_heads.{name}{key.removeprefix(ours)}"] = value
    return state


@pytest.mark.parametrize(("implicit", "old"), [(False, False), (False, True), (True, False)])
def test_names_of_both_ages_and_the_implicit_variant_are_known(implicit: bool, old: bool):
    # neck width 256 as in the files; everything else is small
    system = build(
        "pointrend", implicit=implicit, neck_width=48, classes=("a", "b", "c"), coarse_side=5, point_width=24
    )
    heads = official(system, old)
    rest = {
        "backbone.bottom_up.stem.conv1.weight": (16, 3, 7, 7), "backbone.fpn_lateral2.weight": (48, 16, 1, 1),
        "backbone.fpn_output2.weight": (48, 48, 3, 3), "roi_heads.box_head.fc1.weight": (64, 48 * 49),
        "roi_heads.box_predictor.cls_score.weight": (4, 64),
    }  # fmt: skip
    blocks = {
        f"backbone.bottom_up.res{n + 2}.{b}.conv2.weight": (16 << n, 16 << n, 3, 3) for n in range(4) for b in (0, 1)
    }
    shapes = {**rest, **blocks, **{k: tuple(v.shape) for k, v in heads.items()}}
    options = ORIGINS[0].recognise(shapes, {})
    assert options is not None
    expected = {"backbone": "resnet18", "neck_width": 48, "mask_width": 32, "mask_fc_width": 64, "coarse_side": 5,
                "point_width": 24}  # fmt: skip
    assert {k: options[k] for k in expected} == expected  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert bool(options.get("implicit")) == implicit  # pyright: ignore[reportAttributeAccessIssue]
    renamed = ORIGINS[0].translate(dict(heads), {})
    ours = system.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in renamed.items())
    assert {k for k in ours if k.startswith(("mask_head", "points"))} == set(renamed)


def test_other_classes_keep_the_rows_of_the_same_name_on_both_axes(tmp_path: Any):
    system = make("pointrend", classes=("cat", "dog", "cow"))
    mw.save(system, tmp_path / "x.safetensors")
    other = mw.load(tmp_path / "x.safetensors", classes=["cow", "horse"])
    old, new = system.state_dict(), other.state_dict()
    first, last = "points.head.fcs.0.weight", "points.head.logits.weight"
    assert torch.equal(new[first][:, :32], old[first][:, :32])  # the fine feature's
    assert torch.equal(new[first][:, 32], old[first][:, 34])
    assert torch.equal(new[last][0, :32], old[last][2, :32])
    assert new[last][0, 32] == old[last][2, 34]
    assert torch.equal(new["mask_head.logits.weight"][:49], old["mask_head.logits.weight"][98:])


# ---- the semantic version --------------------------------------------------------------------------------------------


def test_every_pixel_has_a_label_and_segments_are_where_it_says():
    system = make("pointrend-semantic", classes=("a", "b", "c"), stuff=("b",)).eval()
    size = (61, 83)
    places = [Placement.resize(size, SIZE)]
    with torch.no_grad():
        raw = system(random_images())
        labels = system.decode_semantic(raw, places)[0]
        panoptic = system.decode_panoptic(raw, places)[0]
        coarse = system.decode_semantic(raw, places, refine=False)[0]
        found = system.decode(raw, places, score_threshold=0.0)[0]
    assert labels.shape == coarse.shape == size
    assert labels.min() >= 0
    assert torch.equal(panoptic.semantic().long(), labels)
    assert set(panoptic.segments.labels.tolist()) == set(labels.unique().tolist())
    assert (found.labels != 1).all()


def test_what_nothing_covers_is_learnt_as_such_or_not_at_all():
    nothing, ignored = (make("pointrend-semantic", background=b) for b in (True, False))
    empty = terms_of(ignored, objects(0))
    assert float(empty["coarse"].detach()) == float(empty["point"].detach()) == 0
    assert float(terms_of(nothing, objects(0))["coarse"].detach()) > 0
    with torch.no_grad():
        nothing.coarse_head.output.bias.copy_(torch.tensor([0.0, 0, 50]))
        nothing.point_head.logits.bias.copy_(torch.tensor([0.0, 0, 50]))
        raw = nothing.eval()(random_images())
        assert (nothing.decode_semantic(raw, [Placement.identity(SIZE)])[0] == -1).all()
        assert len(nothing.decode(raw, [Placement.identity(SIZE)])[0]) == 0


def test_a_mirrored_image_has_mirrored_labels():
    system = make("pointrend-semantic", classes=("a", "b", "c")).eval()
    place = Placement.resize((50, 70), SIZE)
    with torch.no_grad():
        raw = system(random_images())
        plain, mirrored = (system.decode_semantic(raw, [p])[0] for p in (place, place.then_mirror()))
    assert (plain.flip(1) == mirrored).float().mean() > 0.99


# ---- an option of other systems --------------------------------------------------------------------------------------


def test_mask_rcnn_refines_its_masks_where_it_is_asked_to():
    system = make("mask-rcnn", points=True)
    terms = terms_of(system, objects(2))
    assert {"mask", "mask_point"} <= set(terms)
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in system.parameters())
    terms_of(system, objects(0))
    with torch.no_grad():
        raw, box = system.eval()(random_images()), [torch.tensor([[5.0, 8, 60, 70]])]
        fine, _ = system.read_boxes(raw, box, [torch.tensor([1])])
        coarse, _ = system.read_boxes(raw, box, [torch.tensor([1])], refine=False)
    assert fine[0].shape == (1, 224, 224)
    assert coarse[0].shape == (1, 28, 28)


def test_planes_are_refined_by_what_the_feature_shows():
    """A feature that holds the truth at stride 4, and coarse masks that do not: the point network learns to read it."""
    torch.manual_seed(0)
    y, x = torch.arange(64)[:, None] + 0.5, torch.arange(64) + 0.5
    truth = ((y - 30).abs() < 3) | ((x - 34).abs() < 3)
    feature = torch.nn.functional.avg_pool2d(truth[None, None].float(), 2) * 2 - 1  # (1, 1, 32, 32)
    coarse = torch.nn.functional.avg_pool2d(truth[None].float(), 8) * 4 - 2  # (1, 8, 8)
    refiner = PlanePoints(1, width=16, rules=PointRules(count=256, steps=2, points=512))
    optimizer = torch.optim.Adam(refiner.parameters(), 1e-2)
    masks, extent = Masks.from_dense(truth[None]), torch.tensor([64.0, 64.0])
    for _ in range(40):
        loss = refiner.loss_sum(feature, coarse, lambda points: point_ops.mask_sample(masks, points * extent))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fine = refiner.refine(feature, coarse)
    whole = refiner.refine(feature, coarse.expand(3, -1, -1), budget=1)
    assert fine.shape == (1, 32, 32)
    torch.testing.assert_close(whole[2:], fine)
    small = torch.nn.functional.interpolate(truth[None, None].float(), (32, 32), mode="area")[0] > 0.5
    rough = torch.nn.functional.interpolate(coarse[None], (32, 32), mode="bilinear")[0] > 0
    assert ((fine > 0) != small).sum() < 0.5 * (rough != small).sum()


def test_solov2_refines_its_masks_where_it_is_asked_to():
    system = make("solov2", points=True)
    terms = terms_of(system, objects(2))
    assert set(terms) == {"class", "mask", "point"}
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in system.parameters())
    assert float(terms_of(system, objects(0))["point"].detach()) == 0
    many = terms_of(system, objects(300, side=(12, 12)))["point"]
    torch.manual_seed(0)
    system.points.rules = PointRules(count=1024, steps=2, points=512)
    assert torch.isfinite(many)
    with torch.no_grad():
        raw, place = system.eval()(random_images()), [Placement.identity(SIZE)]
        for refine in (True, False):
            found = system.decode(raw, place, score_threshold=0.0, detections=7, refine=refine)[0]
            assert len(found) <= 7
            assert found.masks is None or found.masks.size == SIZE


def test_the_implicit_variant_wants_masks():
    system = make("pointrend", implicit=True)
    target = Instances((64, 64), torch.tensor([[5.0, 5, 40, 40]]), torch.tensor([0]))
    with pytest.raises(UsageError, match="a target has boxes but no masks"):
        system.losses(system(torch.randn(1, 3, 64, 64)), [target])
