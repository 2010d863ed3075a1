"""PointRend: points inside boxes and on whole images, and as an option of other systems."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maskwright as mw
from maskwright.blocks.box_stage import Assigned
from maskwright.blocks.points import BoxRefinement, PlaneRefinement, PointHead, PointOptions
from maskwright.checkpoints.origins.pointrend import ORIGINS
from maskwright.errors import UsageError
from maskwright.ops import points as point_ops
from maskwright.structures import Instances, Masks, Placement
from tests.systems.tiny import SIZE, objects, sized

build = sized(
    {
        "pointrend": {
            "backbone": {"name": "resnet18", "width": 16},
            "neck_width": 32,
            "boxes": {"width": 64},
            "proposals": {"before": (200, 100), "after": (100, 50)},
            "masks": {"width": 32, "fc_width": 64},
            "points": {"width": 32},
        },
        "pointrend-semantic": {
            "backbone": {"name": "resnet18", "width": 16},
            "neck_width": 32,
            "coarse_width": 32,
            "points": {"width": 32},
            "background": False,
        },
    }
)


def make(name: str, **options: Any) -> Any:
    return build(name, **options)


def random_images(count: int = 1) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def terms_of(system: Any, target: Instances) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return system.losses(system(random_images()), [target])


def test_masks_are_predicted_at_28_cells_a_side_and_upsampled_three_times():
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
    network, refinement = PointHead(8, 3, 3), BoxRefinement(start="grid")
    feature, coarse = torch.randn(2, 8, 24, 32), torch.randn(5, 3, 7, 7)
    boxes = [torch.rand(3, 2, 2).sort(1).values.flatten(1) * 90, torch.rand(2, 2, 2).sort(1).values.flatten(1) * 90]
    labels = torch.tensor([0, 2, 1, 1, 0])
    whole = refinement.refine(network, feature, coarse, boxes, labels)
    single = refinement.refine(network, feature, coarse, boxes, labels, budget=1)
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


def test_the_coarse_side_and_the_number_of_points_are_options():
    system = make("pointrend", masks={"side": 14}, points={"per_step": 400, "steps": 2}).eval()
    with torch.no_grad():
        found, _ = system.read_boxes(system(random_images()), [torch.tensor([[5.0, 8, 60, 70]])], [torch.tensor([0])])
    assert found[0].shape == (1, 56, 56)  # 4 * 14 * 14 cells are more than 400: no step is skipped


def test_masks_are_trained_in_the_predicted_boxes():
    system = make("pointrend")
    same = make("pointrend", predicted_boxes=False)
    with torch.no_grad():
        for own in (system, same):
            own.boxes.deltas.bias.fill_(2.0)  # a fifth of each box's side further right, and larger
    boxes, first = torch.tensor([[10.0, 10, 30, 50], [0, 0, 9, 9]]), torch.tensor([0])
    assigned = [Assigned(boxes, torch.tensor([1, 2]), first, first)]
    deltas = torch.full((2, 8), 2.0)
    assert same.foreground(assigned, deltas).boxes[0].tolist() == [[10, 10, 30, 50]]
    moved = system.foreground(assigned, deltas).boxes[0]
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    torch.testing.assert_close(centre, torch.tensor([[20 + 0.2 * 20, 30 + 0.2 * 40]]))
    assert moved[0, 2] - moved[0, 0] > 20


def test_polygons_are_rasterised_for_training():
    system, target = make("pointrend"), objects(2)
    rings = [[ring] for ring in [[10, 10, 60, 10, 60, 50, 10, 50], [70, 20, 120, 20, 95, 80]]]
    polygons = Masks.from_polygons(rings, SIZE)
    boxes = polygons.boxes()
    found = terms_of(system, Instances(SIZE, boxes, target.labels, polygons))
    packed = terms_of(system, Instances(SIZE, boxes, target.labels, polygons.pack()))
    assert found.keys() == packed.keys() == {"rpn_objectness", "rpn_box", "class", "box", "mask", "mask_point"}
    torch.testing.assert_close(found, packed)


def test_the_implicit_variant_trains_and_detects():
    system = make("pointrend", implicit=True, points={"width": 8}, masks={"fc_width": 16})
    terms = terms_of(system, objects(2))
    assert "mask" not in terms
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)
    terms_of(system, objects(0))
    with torch.no_grad():
        raw = system.eval()(random_images())
        masks, _ = system.read_boxes(raw, [torch.tensor([[5.0, 8, 60, 70]])], [torch.tensor([1])])
        with pytest.raises(UsageError, match="requires coarse masks"):
            system.decode(raw, [Placement.identity(SIZE)], refine=False, score_threshold=0.0)
    assert masks[0].shape == (1, 224, 224)


@pytest.mark.parametrize("name", ["pointrend", "pointrend-semantic"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0.5}, "points.candidates must be at least 1, got 0.5"),
        ({"important": -0.5}, "points.important must be between 0 and 1, got -0.5"),
        ({"important": 1.5}, "points.important must be between 0 and 1, got 1.5"),
        ({"count": 0}, "points.count must be at least 1, got 0"),
        ({"steps": -1}, "points.steps must be at least 0, got -1"),
        ({"per_step": 0}, "points.per_step must be at least 1, got 0; points.steps=0 disables refinement"),
    ],
)
@pytest.mark.fast
def test_wrong_point_options_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        make(name, points=options)


def test_one_class_without_background_is_refused():
    with pytest.raises(UsageError, match="with one class requires background=True"):
        make("pointrend-semantic", classes=("a",))


# ---- files -----------------------------------------------------------------------------------------------------------


def official(system: Any, old: bool = False) -> dict[str, Tensor]:
    """Our tensors of the heads under the project's names."""
    back = {
        "masks.reduce.": "coarse_head.reduce_channel_dim_conv.",
        "masks.halve.": "coarse_head.reduce_spatial_dim_conv.", "masks.fcs.0.": "coarse_head.fc1.",
        "masks.fcs.1.": "coarse_head.fc2.", "masks.logits.": "coarse_head.prediction.",
        "points.fcs.0.": "point_head.fc1.", "points.fcs.1.": "point_head.fc2.",
        "points.fcs.2.": "point_head.fc3.", "points.logits.": "point_head.predictor.",
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
def test_old_and_new_names_and_the_implicit_variant_are_recognised(implicit: bool, old: bool):
    # neck width 256 as in the files; everything else is small
    system = build(
        "pointrend", implicit=implicit, neck_width=48, classes=("a", "b", "c"), masks={"side": 5}, points={"width": 24}
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
    expected = {"neck_width": 48, "masks": {"width": 32, "fc_width": 64, "side": 5}, "points": {"width": 24}}
    assert {k: options[k] for k in expected} == expected  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert options["backbone"]["name"] == "resnet18"  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert bool(options.get("implicit")) == implicit  # pyright: ignore[reportAttributeAccessIssue]
    renamed = ORIGINS[0].translate(dict(heads), {})
    ours = system.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in renamed.items())
    assert {k for k in ours if k.startswith(("masks.", "points."))} == set(renamed)


def test_other_classes_keep_the_rows_of_the_same_name_on_both_axes(tmp_path: Any):
    system = make("pointrend", classes=("cat", "dog", "cow"))
    mw.save(system, tmp_path / "x.safetensors")
    other = mw.load(tmp_path / "x.safetensors", classes=["cow", "horse"])
    old, new = system.state_dict(), other.state_dict()
    first, last = "points.fcs.0.weight", "points.logits.weight"
    assert torch.equal(new[first][:, :32], old[first][:, :32])  # the fine feature's
    assert torch.equal(new[first][:, 32], old[first][:, 34])
    assert torch.equal(new[last][0, :32], old[last][2, :32])
    assert new[last][0, 32] == old[last][2, 34]
    assert torch.equal(new["masks.logits.weight"][:49], old["masks.logits.weight"][98:])


# ---- the semantic version --------------------------------------------------------------------------------------------


def test_every_pixel_has_a_label_and_segments_agree_with_it():
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


def test_uncovered_pixels_are_a_class_or_ignored():
    counted, ignored = (make("pointrend-semantic", background=b) for b in (True, False))
    empty = terms_of(ignored, objects(0))
    assert float(empty["coarse"].detach()) == float(empty["point"].detach()) == 0
    assert float(terms_of(counted, objects(0))["coarse"].detach()) > 0
    with torch.no_grad():
        counted.dense.coarse.output.bias.copy_(torch.tensor([0.0, 0, 50]))
        counted.points.logits.bias.copy_(torch.tensor([0.0, 0, 50]))
        raw = counted.eval()(random_images())
        assert (counted.decode_semantic(raw, [Placement.identity(SIZE)])[0] == -1).all()
        assert len(counted.decode(raw, [Placement.identity(SIZE)])[0]) == 0


def test_a_mirrored_image_has_mirrored_labels():
    system = make("pointrend-semantic", classes=("a", "b", "c")).eval()
    place = Placement.resize((50, 70), SIZE)
    with torch.no_grad():
        raw = system(random_images())
        plain, mirrored = (system.decode_semantic(raw, [p])[0] for p in (place, place.then_mirror()))
    assert (plain.flip(1) == mirrored).float().mean() > 0.99


# ---- an option of other systems --------------------------------------------------------------------------------------


def test_mask_rcnn_with_points_refines_its_masks():
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


def test_planes_are_refined_from_the_fine_feature():
    """The fine feature holds the truth, the coarse masks do not: the point network learns to read the feature."""
    torch.manual_seed(0)
    y, x = torch.arange(64)[:, None] + 0.5, torch.arange(64) + 0.5
    truth = ((y - 30).abs() < 3) | ((x - 34).abs() < 3)
    feature = torch.nn.functional.avg_pool2d(truth[None, None].float(), 2) * 2 - 1  # (1, 1, 32, 32)
    coarse = torch.nn.functional.avg_pool2d(truth[None].float(), 8) * 4 - 2  # (1, 8, 8)
    network, refinement = PointHead(1, 1, 1, width=16), PlaneRefinement(PointOptions(count=256, per_step=512, steps=2))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    masks, extent = Masks.from_dense(truth[None]), torch.tensor([64.0, 64.0])
    for _ in range(40):
        loss = refinement.loss_sum(
            network, feature, coarse, lambda points: point_ops.mask_sample(masks, points * extent)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fine = refinement.refine(network, feature, coarse)
    whole = refinement.refine(network, feature, coarse.expand(3, -1, -1), budget=1)
    assert fine.shape == (1, 32, 32)
    torch.testing.assert_close(whole[2:], fine)
    small = torch.nn.functional.interpolate(truth[None, None].float(), (32, 32), mode="area")[0] > 0.5
    rough = torch.nn.functional.interpolate(coarse[None], (32, 32), mode="bilinear")[0] > 0
    assert ((fine > 0) != small).sum() < 0.5 * (rough != small).sum()


def test_solov2_with_points_refines_its_masks():
    system = make("solov2", points=True)
    terms = terms_of(system, objects(2))
    assert set(terms) == {"class", "mask", "point"}
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in system.parameters())
    assert float(terms_of(system, objects(0))["point"].detach()) == 0
    many = terms_of(system, objects(300, side=(12, 12)))["point"]
    assert torch.isfinite(many)
    with torch.no_grad():
        raw, place = system.eval()(random_images()), [Placement.identity(SIZE)]
        for refine in (True, False):
            found = system.decode(raw, place, score_threshold=0.0, detections=7, refine=refine)[0]
            assert len(found) <= 7
            assert found.masks is None or found.masks.size == SIZE
