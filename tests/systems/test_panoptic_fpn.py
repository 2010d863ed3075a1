"""Panoptic FPN: heads for things and for stuff, the merging rule, and rows per class."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import maskwright as mw
from maskwright.checkpoints.names import CITYSCAPES_PANOPTIC, COCO_PANOPTIC, VOC
from maskwright.checkpoints.origins import origins
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.panoptic_fpn import PanopticFPN
from tests.systems.tiny import SIZE, build, objects, tiny_options

CLASSES, STUFF = ("sky", "cat", "grass", "dog"), ("sky", "grass")


def panoptic(**options) -> PanopticFPN:
    system = build("panoptic-fpn", **{"classes": CLASSES, "stuff": STUFF, **options})
    assert isinstance(system, PanopticFPN)
    return system


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def segments(*rows: tuple[int, tuple[int, int, int, int]], size: tuple[int, int] = SIZE) -> Instances:
    """Segments of (label, (x0, y0, x1, y1))."""
    planes = torch.zeros(len(rows), *size, dtype=torch.bool)
    for plane, (_, (x0, y0, x1, y1)) in zip(planes, rows, strict=True):
        plane[y0:y1, x0:x1] = True
    boxes = torch.tensor([box for _, box in rows]).float()
    return Instances(size, boxes, torch.tensor([label for label, _ in rows]), Masks.from_dense(planes))


def test_heads_of_boxes_and_masks_have_rows_for_things_only():
    system = panoptic()
    assert system.tasks == {"instances", "panoptic", "semantic"}
    state = system.state_dict()
    assert len(state["boxes.classes.weight"]) == 3  # two things and background
    assert len(state["boxes.deltas.weight"]) == 8
    assert len(state["masks.logits.weight"]) == 2
    assert len(state["semantic.output.weight"]) == 3  # "things" and two regions


def test_things_are_trained_as_in_mask_rcnn():
    system = panoptic()
    own = {k: v for k, v in system.options.items() if k not in ("stuff", "semantic")}
    plain = create("mask-rcnn", **{**own, "classes": ("cat", "dog")})
    plain.load_state_dict({k: v for k, v in system.state_dict().items() if not k.startswith("semantic.")})
    things = segments((0, (10, 10, 60, 50)), (1, (70, 20, 110, 80)))
    mixed = segments((0, (0, 0, 128, 10)), (1, (10, 10, 60, 50)), (2, (0, 90, 128, 96)), (3, (70, 20, 110, 80)))
    values = []
    for one, target in ((plain, things), (system, mixed)):
        torch.manual_seed(0)
        values.append(one.losses(one(images(1)), [target]))
    assert values[1].keys() == {*values[0], "semantic"}
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value)


def test_the_semantic_branch_is_trained_on_things_as_one_class_and_on_each_region():
    system = panoptic()
    target = segments((0, (0, 0, 128, 10)), (2, (0, 80, 128, 96)), (3, (70, 20, 110, 90)), (1, (10, 10, 60, 50)))
    plane = system.semantic_target(target)
    expected = torch.full(SIZE, -1)
    expected[:10] = 1
    expected[20:90, 70:110] = 0
    expected[10:50, 10:60] = 0
    expected[80:] = 2  # the smaller segment is on top
    assert torch.equal(plane, expected)
    raw = system(images(1))
    loss = system.losses(raw, [target])["semantic"]
    logits = torch.nn.functional.interpolate(system.semantic(raw.features), SIZE, mode="bilinear")
    wanted = 0.5 * torch.nn.functional.cross_entropy(logits, expected[None], ignore_index=-1)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if n.startswith("semantic.")}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_the_merging_rule():
    size = (60, 100)
    system = panoptic()
    things = segments(
        (1, (0, 0, 40, 40)), (3, (20, 0, 60, 40)), (3, (10, 0, 42, 40)), (1, (61, 0, 61, 0)), (3, (50, 0, 74, 20)),
        size=size,
    )  # fmt: skip
    things.scores = torch.tensor([0.9, 0.8, 0.7, 0.65, 0.6])
    labels = torch.zeros(size, dtype=torch.int64)  # 0: things
    labels[30:], labels[:10, 90:] = 2, 1
    found = system.merged(things, labels, torch.full(size, 0.25), 0.5, 101)
    # The second thing keeps half of its pixels, the third fewer, the fourth has none, the fifth keeps 14 of 24 columns.
    assert found.segments.labels.tolist() == [1, 3, 3, 2]
    assert found.things.tolist() == [True, True, True, False]
    assert found.segments.scores is not None
    assert found.segments.scores.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.25])
    assert found.segments.masks is not None
    assert found.segments.masks.areas().tolist() == [1600, 800, 280, 30 * 100 - 10 * 60]
    plane = found.map()
    assert (plane[5, 95], plane[25, 95]) == (0, 0)  # a region that is too small, and things that are not detected
    smaller = system.merged(things, labels, torch.full(size, 0.25), 0.5, 100)
    assert smaller.segments.labels.tolist() == [1, 3, 3, 0, 2]
    strict = system.merged(things, labels, torch.full(size, 0.25), 0.6, 101)
    assert strict.segments.labels.tolist() == [1, 3, 2]


def test_decoded_labels_are_those_of_all_classes():
    system = panoptic().eval()
    with torch.no_grad():
        raw = system(images(1))
        place = [Placement.resize((120, 160), SIZE)]
        found = system.decode(raw, place, score_threshold=0.0)[0]
        assert set(found.labels.tolist()) <= {1, 3}
        assert len(found)
        whole = system.decode_panoptic(raw, place, score_threshold=0.3, smallest_area=0)[0]
        labels = system.decode_semantic(raw, place)[0]
        large = system.decode_panoptic(raw, place, score_threshold=1.0, smallest_area=120 * 160 + 1)[0]
    assert whole.image_size == labels.shape == (120, 160)
    assert set(labels.unique().tolist()) <= {-1, 0, 1, 2, 3}
    assert len(large) == 0
    regions = whole.segments.labels[~whole.things].tolist()
    assert regions == sorted(set(regions))  # one for each class


def test_rows_of_things_and_of_stuff_are_kept_by_name(tmp_path):
    system = panoptic()
    path = tmp_path / "own.safetensors"
    mw.save(system, path)
    again = mw.load(path, classes=("dog", "sea", "grass", "cow"), stuff=("sea", "grass"))
    old, new = system.state_dict(), again.state_dict()
    for name, rows in (("boxes.classes.weight", (1, 2)), ("masks.logits.weight", (1,)), ("boxes.deltas.bias", (4,))):
        first = new[name][: 4 if "deltas" in name else 1]
        width = 4 if "deltas" in name else 1
        assert torch.equal(first, old[name][rows[0] : rows[0] + width])
    assert torch.equal(new["boxes.classes.weight"][2], old["boxes.classes.weight"][2])  # background
    assert torch.equal(new["semantic.output.weight"][[0, 2]], old["semantic.output.weight"][[0, 2]])
    assert not torch.equal(new["semantic.output.weight"][1], old["semantic.output.weight"][1])
    assert again.source is not None
    assert again.source["classes_kept"] == ["dog", "grass"]
    plain = mw.load(path, classes=("cat", "dog"), stuff=())
    assert torch.equal(plain.state_dict()["masks.logits.weight"], old["masks.logits.weight"])
    assert torch.equal(plain.state_dict()["semantic.output.weight"], old["semantic.output.weight"][:1])
    every = mw.load(path, stuff=())
    assert torch.equal(every.state_dict()["masks.logits.weight"][[1, 3]], old["masks.logits.weight"])


def test_without_stuff_it_is_mask_rcnn():
    system = panoptic(classes=("a", "b"), stuff=()).eval()
    losses = system.losses(system(images(1)), [objects(2)])
    assert losses["semantic"].item() == 0
    with torch.no_grad():
        found = system.decode_panoptic(system(images(1)), [Placement.identity(SIZE)], score_threshold=0.1)[0]
    assert found.things.all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stuff": ("lava",)}, "stuff has 'lava', not among the 4 classes"),
        ({"stuff": CLASSES}, "requires at least one class that is not stuff"),
        ({"semantic": {"width": 0}}, "semantic.width must be at least 1, got 0"),
        ({"semantic": {"weight": -1.0}}, "semantic.weight must be at least 0"),
        ({"semantic": {"smallest_area": -1}}, "semantic.smallest_area must be at least 0"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        create("panoptic-fpn", **{**tiny_options("panoptic-fpn"), "classes": CLASSES, "stuff": STUFF, **options})


@pytest.mark.parametrize(
    ("things", "regions", "names"),
    [(80, 53, COCO_PANOPTIC), (8, 11, CITYSCAPES_PANOPTIC), (2, 1, ("class 0", "class 1", "class 2")),
     (20, 3, (*VOC, "class 20", "class 21", "class 22"))],
)  # fmt: skip
def test_files_of_other_classes_and_backbones_are_recognised(things, regions, names):
    layout = Path(__file__).parents[1] / "parity" / "layouts" / "panoptic-fpn-detectron2-r50.json"
    shapes = {key: tuple(shape) for key, (shape, _) in json.loads(layout.read_text())["tensors"].items()}
    for number in range(6, 23):  # ResNet-101
        block = {k: v for k, v in shapes.items() if k.startswith("backbone.bottom_up.res4.5.")}
        shapes |= {k.replace("res4.5.", f"res4.{number}."): v for k, v in block.items()}
    for key, rows in (
        ("roi_heads.box_predictor.cls_score", things + 1), ("roi_heads.box_predictor.bbox_pred", 4 * things),
        ("roi_heads.mask_head.predictor", things), ("sem_seg_head.predictor", regions + 1),
    ):  # fmt: skip
        for kind in ("weight", "bias"):
            shapes[f"{key}.{kind}"] = (rows, *shapes[f"{key}.{kind}"][1:])
    found = [(own.system, own.recognise(shapes, {})) for own in origins()]
    ((system, options),) = [(name, own) for name, own in found if own is not None]
    assert system == "panoptic-fpn"
    assert isinstance(options, dict)
    assert options["classes"] == names
    assert len(options["stuff"]) == regions
    assert options["backbone"]["name"] == "resnet101"
    with torch.device("meta"):
        built = create(system, **options)
    assert sum(v.numel() for v in built.state_dict().values()) == sum(math.prod(v) for v in shapes.values())
