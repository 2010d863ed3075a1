"""Cascade R-CNN and Cascade Mask R-CNN: stages, mask branches, and what later stages are trained on."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops.boxes import pairwise_iou
from maskwright.structures import Placement
from maskwright.systems import create
from tests.systems.tiny import SIZE, build, objects, tiny_options

ONE = {"overlaps": (0.5,), "delta_weights": ((10.0, 10.0, 5.0, 5.0),), "loss_weights": (1.0,)}


def cascade(**options):
    return build("cascade-mask-rcnn", **options)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_one_stage_is_mask_rcnn():
    own = cascade(cascade=ONE)
    options = {k: v for k, v in own.options.items() if k != "cascade"}
    plain = create("mask-rcnn", **options)
    plain.load_state_dict(own.state_dict())
    targets = [objects(3), objects(1)]
    values = []
    for system in (own, plain):
        torch.manual_seed(0)
        values.append(system.losses(system(images()), targets))
    assert values[0].keys() == {"rpn_objectness", "rpn_box", "class_1", "box_1", "mask"}
    for name, value in values[1].items():
        torch.testing.assert_close(values[0].get(name, values[0].get(f"{name}_1")), value)


def test_a_later_stage_is_trained_on_all_boxes_of_the_previous_one_at_its_own_threshold():
    system = cascade()
    target = objects(2)
    shifts = torch.linspace(0, 20, 21)[:, None] * torch.tensor([1.0, 0, 1, 0])
    boxes = torch.cat([target.boxes[k] + shifts for k in range(2)])
    overlap = pairwise_iou(target.boxes, boxes).max(0).values
    for stage, threshold in ((1, 0.6), (2, 0.7)):
        own = system.assigned(stage, [boxes], [target])[0]
        assert torch.equal(own.boxes, boxes)
        assert own.foreground.tolist() == (overlap >= threshold).nonzero().flatten().tolist()
        assert (own.labels[overlap < threshold] == len(system.classes)).all()
    first = system.assigned(0, [boxes], [target])[0]
    assert len(first.boxes) == len(boxes) + 2  # the objects' own boxes are added
    again = cascade(cascade={"resample": True}).assigned(2, [boxes], [target])[0]
    assert len(again.boxes) == len(boxes) + 2


@pytest.mark.parametrize(
    ("where", "heads", "terms"),
    [("first", {"masks"}, {"mask"}), ("last", {"masks"}, {"mask"}),
     ("every", {"masks", "masks_2", "masks_3"}, {"mask_1", "mask_2", "mask_3"})],
)  # fmt: skip
def test_masks_are_trained_beside_the_stages_that_are_named(where, heads, terms):
    system = cascade(cascade={"mask_stage": where})
    assert {n for n in system.networks() if n.startswith("masks")} == heads
    losses = system.losses(system(images()), [objects(3), objects(0)])
    assert {n for n in losses if n.startswith("mask")} == terms
    sum(losses.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.grad is None]
    system.eval()
    with torch.no_grad():
        raw = system(images())
        boxes, labels = [objects(3).boxes, objects(2).boxes], [torch.tensor([0, 1, 0]), torch.tensor([1, 1])]
        masks, _ = system.read_boxes(raw, boxes, labels)
        features = system.mask_features(raw, boxes)
        each = [system.networks()[n](features, torch.cat(labels))[:, 0].sigmoid() for n in sorted(heads)]
    torch.testing.assert_close(torch.cat(masks), torch.stack(each).mean(0))


@pytest.mark.parametrize("where", ["last", "every"])
def test_masks_are_scored(where):
    system = cascade(cascade={"mask_stage": where}, mask_iou={"convs": 1, "width": 16, "fc_width": 16})
    losses = system.losses(system(images()), [objects(3), objects(0)])
    assert {n for n in losses if n.startswith("mask_iou")} == (
        {"mask_iou"} if where == "last" else {"mask_iou_1", "mask_iou_2", "mask_iou_3"}
    )
    sum(losses.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.grad is None]
    torch.nn.init.constant_(system.mask_iou.iou.bias, 0.5)
    raw = system.eval()(images(1))
    scored, plain = (
        system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0, score_of=kind)[0]
        for kind in ("mask", "box")
    )
    assert len(scored) == len(plain)
    assert (scored.scores.diff() <= 0).all()
    assert float(scored.scores.max()) < float(plain.scores.max())


def test_boxes_alone():
    system = cascade(masks=False)
    assert (system.outputs, system.needs) == ({"boxes"}, set())
    target = objects(3)
    losses = system.losses(system(images(1)), [target])
    assert losses.keys() == {"rpn_objectness", "rpn_box"} | {f"{k}_{n}" for k in ("class", "box") for n in (1, 2, 3)}
    found = system.eval().decode(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert len(found)
    assert found.masks is None


def test_scores_are_the_mean_of_the_stages_and_boxes_those_of_the_last_one():
    system = cascade().eval()
    with torch.no_grad():
        raw = system(images(1))
        proposals = [torch.tensor([[5.0, 8, 60, 70], [40, 20, 120, 90], [3, 3, 20, 90]])]
        boxes, found = proposals, []
        for stage in range(3):
            logits, deltas = system.run_stage(stage, raw, boxes)
            found.append(logits.softmax(-1)[:, :-1])
            boxes = system.refined(stage, deltas, boxes, [SIZE])
        scores, last = system.run_stages(raw, proposals, [SIZE], 3)
        torch.testing.assert_close(scores, sum(found) / 3)
        torch.testing.assert_close(last[:, 0], boxes[0])
        torch.testing.assert_close(system.run_stages(raw, proposals, [SIZE], 2, average=False)[0], found[1])
        full = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0)[0]
        until = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0, until=3)[0]
        assert torch.equal(full.boxes, until.boxes)
        first = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0, until=1)[0]
        assert not torch.equal(first.scores, full.scores)


def test_in_the_authors_code_all_stages_score_the_boxes_of_the_last_one():
    system = cascade(rules="detectron", cascade={"mask_stage": "last"}).eval()
    with torch.no_grad():
        for number in ("", "_2", "_3"):
            torch.nn.init.constant_(system.get_submodule(f"boxes{number}").deltas.bias, 2.0)  # far to the lower right
        raw = system(images(1))
        boxes = [torch.tensor([[5.0, 8, 60, 70], [40, 20, 120, 90]])]
        received = boxes
        for stage in range(3):
            received, boxes = boxes, system.refined(stage, system.run_stage(stage, raw, boxes)[1], boxes, [SIZE])
        assert float(boxes[0].max()) > SIZE[1]  # not clipped between the stages
        each = [system.run_stage(stage, raw, received)[0].softmax(-1)[:, :-1] for stage in range(3)]
        first = [torch.tensor([[5.0, 8, 60, 70], [40, 20, 120, 90]])]
        scores, last = system.run_stages(raw, first, [SIZE], 3)
        torch.testing.assert_close(scores, sum(each) / 3)
        torch.testing.assert_close(last[:, 0], boxes[0])
        one = system.run_stages(raw, first, [SIZE], 1)[0]
        torch.testing.assert_close(one, system.run_stage(0, raw, first)[0].softmax(-1)[:, :-1])
    losses = system.losses(system(images()), [objects(3), objects(0)])
    assert all(torch.isfinite(value) for value in losses.values())


def test_the_gradient_to_the_features_is_scaled_and_that_of_the_head_is_not():
    norms = {}
    for factor in (1.0, 0.25):
        system = cascade(cascade={**ONE, "gradients": (factor,)})
        torch.manual_seed(0)
        losses = system.losses(system(images()), [objects(3), objects(1)])
        (losses["class_1"] + losses["box_1"]).backward()
        grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
        norms[factor] = {
            part: torch.stack([g.norm() for n, g in grads.items() if n.startswith(part)]).norm().item()
            for part in ("boxes.", "dense.neck.")
        }
    assert norms[0.25]["boxes."] == pytest.approx(norms[1.0]["boxes."], rel=1e-5)
    assert norms[0.25]["dense.neck."] == pytest.approx(norms[1.0]["dense.neck."] / 4, rel=1e-4)


def test_every_head_has_rows_per_class():
    rows = cascade(cascade={"mask_stage": "every"}).class_rows()
    assert rows.keys() == {
        f"{part}{n}.{layer}.{kind}"
        for n in ("", "_2", "_3")
        for part, layer in (("boxes", "classes"), ("masks", "logits"))
        for kind in ("weight", "bias")
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cascade": {"overlaps": ()}}, "cascade.overlaps must be numbers between 0 and 1"),
        ({"cascade": {"overlaps": (0.5, 0.6)}}, "cascade.delta_weights must have 2 entries, one per stage, got 3"),
        ({"cascade": {**ONE, "gradients": (1.0, 1.0)}}, "cascade.gradients must have 1 entries"),
        ({"cascade": {**ONE, "delta_weights": ((1.0, 1.0),)}}, "lists of 4 numbers above 0"),
        ({"cascade": {**ONE, "loss_weights": (-1.0,)}}, "must be at least 0"),
        ({"cascade": {"mask_stage": "second"}}, "mask_stage must be one of 'first', 'last', 'every'"),
        ({"boxes": {"agnostic": False}}, "boxes.agnostic must be true"),
        ({"neck": "c4", "backbone": "resnet50"}, "neck must be 'fpn' or 'dc5'"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("cascade-mask-rcnn", **{**tiny_options("cascade-mask-rcnn"), **options})


def test_a_stage_that_does_not_exist_is_refused():
    system = cascade().eval()
    with pytest.raises(UsageError, match="until must be between 1 and 3, got 4"):
        system.decode(system(images(1)), [Placement.identity(SIZE)], until=4)
