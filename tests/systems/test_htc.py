"""Hybrid Task Cascade: interleaved tasks, information between mask heads, and the semantic branch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import maskwright as mw
from maskwright.blocks.box_stage import Foreground
from maskwright.errors import UsageError
from maskwright.structures import Placement
from maskwright.systems import create
from maskwright.systems.cascade_rcnn import CascadeMaskRCNN
from maskwright.systems.htc import HTC
from tests.systems.test_panoptic_fpn import CLASSES, STUFF, segments
from tests.systems.tiny import SIZE, build, objects, tiny_options

MIXED = ((0, (0, 0, 128, 10)), (1, (10, 10, 60, 50)), (2, (0, 80, 128, 96)), (3, (70, 20, 110, 90)))


def htc(**options) -> HTC:
    system = build("htc", **options)
    assert isinstance(system, HTC)
    return system


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_masks_are_trained_in_the_boxes_that_the_stage_has_predicted():
    target = objects(2)
    received, predicted = target.boxes + 1, target.boxes + torch.tensor([2.0, 0, 2, 0])
    for interleaved, own in ((True, predicted), (False, received)):
        system = htc(interleaved=interleaved)
        assigned = system.assigned(1, [received], [target])
        rois = system.mask_rois(1, assigned, [predicted], [target])
        assert isinstance(rois, Foreground)
        kept = {tuple(box) for box in rois.boxes[0].tolist()}
        assert kept == {tuple(box) for box in torch.cat([own, target.boxes]).tolist()}  # objects' boxes are added


def test_a_mask_head_reads_the_features_of_the_previous_ones():
    system, x, labels = htc().eval(), torch.randn(3, 32, 14, 14), torch.tensor([0, 1, 1])
    alone = htc(flow=False).eval()
    alone.load_state_dict({k: v for k, v in system.state_dict().items() if ".fuse." not in k})
    first, second, third = system.masks, system.masks_2, system.masks_3
    with torch.no_grad():
        own = first(x)[1]
        torch.testing.assert_close(system.mask_head(0)(x, labels), alone.mask_head(0)(x, labels))
        torch.testing.assert_close(second(x, labels, own)[0], system.mask_head(1)(x, labels))
        own = second(x, None, own)[1]
        torch.testing.assert_close(third(x + third.fuse(own), labels)[0], system.mask_head(2)(x, labels))
        torch.testing.assert_close(alone.mask_head(2)(x, labels), third(x, labels)[0])
        masks = [system.mask_head(stage)(x, labels)[:, 0].sigmoid() for stage in range(3)]
        boxes = [objects(3).boxes]
        torch.testing.assert_close(system.mask_probabilities(None, x, boxes, labels), torch.stack(masks).mean(0))


def test_features_of_the_semantic_branch_are_added_to_the_pooled_ones():
    system, boxes = htc().eval(), [objects(3).boxes]
    with torch.no_grad():
        raw = system(images())
        assert raw.labels[0].shape == (1, 3, 12, 16)  # none, and two classes, at stride 8
        context = system.context_pooler(raw.context, boxes, 14)
        for side in (7, 14):
            plain = CascadeMaskRCNN.pooled(system, raw, boxes, side)
            expected = plain + (context if side == 14 else functional.avg_pool2d(context, 2))
            torch.testing.assert_close(system.pooled(raw, boxes, side), expected)


def test_all_levels_are_brought_to_stride_8():
    system = htc()
    branch, levels = system.semantic, [torch.randn(1, 32, 64 >> n, 96 >> n) for n in range(5)]
    assert branch is not None
    x = branch.laterals[1](levels[1])
    for n in (0, 2, 3, 4):
        resized = functional.interpolate(levels[n], size=(32, 48), mode="bilinear", align_corners=True)
        x = x + branch.laterals[n](resized)
    for conv in branch.convs:
        x = conv(x)
    logits, features = branch(levels)
    torch.testing.assert_close(logits, branch.logits(x))
    torch.testing.assert_close(features, branch.embedding(x))


def test_the_semantic_branch_learns_every_class_and_what_is_none_of_them():
    plain, mixed = htc(classes=CLASSES), htc(classes=CLASSES, stuff=STUFF)
    target = segments(*MIXED)
    for system, rest in ((plain, 0), (mixed, -1)):
        plane = system.semantic_target(target)
        expected = torch.full(SIZE, rest)
        for label in (3, 1, 2, 0):  # the smaller segment is on top
            x0, y0, x1, y1 = MIXED[label][1]
            expected[y0:y1, x0:x1] = label + 1
        assert torch.equal(plane, expected)
    raw = mixed(images())
    terms = mixed.losses(raw, [target])
    wanted = functional.cross_entropy(
        raw.labels[0], mixed.semantic_target(target)[None, ::8, ::8], ignore_index=-1, reduction="sum"
    )
    torch.testing.assert_close(terms["semantic"], 0.2 * wanted / (12 * 16))
    assert "semantic" not in htc(semantic=False).losses(htc(semantic=False)(images()), [objects(1)])


def test_stuff_is_decoded_from_the_semantic_branch():
    system = htc(classes=CLASSES, stuff=STUFF).eval()
    with torch.no_grad():
        raw = system(images())
        logits = system.semantic_logits(raw)
        every = raw.labels[0].softmax(1)
        torch.testing.assert_close(logits.softmax(1)[:, 1:], every[:, [1, 3]])
        torch.testing.assert_close(logits.softmax(1)[:, 0], every[:, [0, 2, 4]].sum(1))
        torch.nn.init.constant_(system.semantic.logits.bias[3:4], 50.0)  # "grass"
        raw = system(images())
        place = [Placement.resize((120, 160), SIZE)]
        found = system.decode(raw, place)[0]
        whole = system.decode_panoptic(raw, place, smallest_area=0)[0]
        labels = system.decode_semantic(raw, place)[0]
    assert set(found.labels.tolist()) <= {1, 3}
    assert whole.segments.labels[~whole.things].tolist() == [2]
    assert set(labels.unique().tolist()) <= {1, 2, 3}


def test_rows_are_kept_by_name(tmp_path):
    system = htc(classes=CLASSES, stuff=STUFF)
    mw.save(system, tmp_path / "own.safetensors")
    again = mw.load(tmp_path / "own.safetensors", classes=("dog", "sea", "grass"), stuff=("sea", "grass"))
    every = mw.load(tmp_path / "own.safetensors", stuff=())
    fewer = mw.load(tmp_path / "own.safetensors", classes=("dog", "cow", "Grass"))
    assert fewer.stuff == ("Grass",)  # of the file's stuff, what is among the classes
    assert mw.load(tmp_path / "own.safetensors", classes=("dog", "cow")).stuff == ()
    old, new = system.state_dict(), again.state_dict()
    assert torch.equal(new["masks_3.logits.weight"], old["masks_3.logits.weight"][1:])
    assert torch.equal(new["boxes_2.classes.bias"], old["boxes_2.classes.bias"][1:])
    assert torch.equal(new["semantic.logits.weight"][[0, 1, 3]], old["semantic.logits.weight"][[0, 4, 3]])
    assert torch.equal(every.state_dict()["semantic.logits.weight"], old["semantic.logits.weight"])
    assert torch.equal(every.state_dict()["masks_2.logits.bias"][[1, 3]], old["masks_2.logits.bias"])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"neck": "dc5"}, "neck must be 'fpn' or 'pafpn', got 'dc5'"),
        ({"masks": {"loss": "softmax"}}, "requires masks.loss='sigmoid' and cascade.mask_stage='every'"),
        ({"cascade": {"mask_stage": "last"}}, "requires masks.loss='sigmoid' and cascade.mask_stage='every'"),
        ({"masks": {"width": 48}}, "flow=True requires masks.width = neck_width, .* got 48 and 32"),
        ({"semantic": False, "stuff": ("b",), "classes": ("a", "b")}, "semantic=False requires stuff to be empty"),
        ({"stuff": ("a",), "classes": ("a",)}, "htc requires at least one class that is not stuff"),
        ({"semantic": {"convs": -1}}, "semantic.convs must be at least 0"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("htc", **{**tiny_options("htc"), **options})
