"""What is ESE-Seg's own: its trunks, detectors and codes, and its conventions."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops.contours import decode_chebyshev
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.ese_seg import ANCHORS, Shapes
from tests.systems.tiny import SIZE, build, objects

OPTIONS = {
    "Darknet-53": {"backbone": "darknet53", "stem_width": 4},
    "tiny": {"backbone": "darknet-tiny", "stem_width": 4},
    "few coefficients": {"coefficients": 8, "shift": 0.0},
    "other anchors": {"anchors": ((8, 8), (16, 16), (32, 32), (64, 64), (96, 96), (128, 128))},
    "widths that are no multiple of four": {"head_width": 3},
    "PolarMask's head": {"detector": "fcos", "neck_width": 64, "head_convs": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_finds(options):
    system = build("ese-seg", **{"head_width": 16, **options})
    size = (64, 96)
    raw = system(torch.randn(2, 3, *size))
    terms = system.losses(raw, [objects(3, size), objects(0, size)])
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    found = system.eval().decode(raw, [Placement.identity(size)] * 2, score_threshold=0.0, detections=5)
    assert all(len(own.masks) == len(own) == 5 for own in found)
    with torch.device("meta"):
        other = build("ese-seg", **{"head_width": 16, **options, "classes": ("a", "b", "c")}).state_dict()
    differing = {k for k, v in system.state_dict().items() if v.shape != other[k].shape}
    assert differing == set(system.class_rows())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "darknet19"}, "expected darknet53, darknet-tiny"),
        ({"backbone": "vgg"}, "expected resnet18"),
        ({"coefficients": 0}, "coefficients is 0; expected 1 ... 360"),
        ({"coefficients": 361}, "coefficients is 361; expected 1 ... 360"),
        ({"head_width": 0}, "head_width is 0; at least 1"),
        ({"anchors": ()}, "anchors has 0 entries"),
        ({"anchors": ((10, 10), (10, 0), (10, 10))}, "anchors is .*widths and heights must be above 0"),
        ({"detector": "fcos", "rays": 50}, "divisor of 360"),
        ({"detector": "fcos", "backbone": "darknet-tiny"}, "needs levels of strides 8, 16 and 32"),
        ({"anchors": ANCHORS[:4]}, "anchors has 4 entries; expected .* equally many for each of 3 levels"),
    ],
)
def test_wrong_options_are_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        build("ese-seg", **options)


@pytest.mark.fast
def test_shapes_are_those_of_the_masks_as_they_are_now():
    """Encoded after augmentation: a mirrored image has mirrored shapes, a stretched one stretched ones."""
    system = build("ese-seg")
    plane = torch.zeros(SIZE, dtype=torch.bool)
    plane[20:60, 30:40] = plane[50:60, 30:80] = True
    masks = Masks.from_dense(plane[None])
    target = Instances(SIZE, masks.boxes(), torch.zeros(1, dtype=torch.int64), masks)
    for placement in (
        Placement.identity(SIZE), Placement.identity(SIZE).then_mirror(), Placement.resize(SIZE, (192, 96)),
    ):  # fmt: skip
        laid = target.place(placement)
        own = system.shapes(laid, torch.device("cpu"))
        outlines = decode_chebyshev(own.coefficients, own.centres, own.boxes).numpy()
        again = Masks.from_polygons([[ring] for ring in outlines], laid.image_size)
        assert float(again.iou(laid.masks)) > 0.65


@pytest.mark.fast
def test_the_anchor_of_the_best_shape_answers_and_the_later_of_two_objects_at_a_place():
    system = build("ese-seg").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    rows = system.rows(raw.shapes)
    boxes = torch.tensor([[8, 8, 24, 38], [40, 40, 100, 85], [41, 41, 101, 86.0]])
    codes = torch.zeros(3, 18)
    codes[:, 0] = system.shift
    shapes = Shapes(boxes, torch.tensor([0, 1, 0]), boxes[:, :2] + 5, codes, torch.ones(3, dtype=torch.bool))
    goals = system.goals(raw, shapes, system.boxes(raw, rows)[0][0])
    # (16, 30) is the second anchor of stride 8, (62, 45) the second of stride 16.
    coarse, middle = (3 * (SIZE[0] // stride) * (SIZE[1] // stride) for stride in (32, 16))
    first = coarse + middle + ((23 // 8) * (SIZE[1] // 8) + 16 // 8) * 3 + 1
    second = coarse + ((63 // 16) * (SIZE[1] // 16) + 71 // 16) * 3 + 1
    assert goals.rows.tolist() == [first, second]
    assert goals.labels.tolist() == [0, 0]
    assert goals.coefficients.abs().max() < 1e-6


@pytest.mark.fast
def test_places_that_overlap_an_object_are_not_blamed():
    system = build("ese-seg").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    boxes = system.boxes(raw, system.rows(raw.shapes))[0][0]
    target = boxes[700:701].clamp(min=0)
    assert system._ignored(boxes, target)[700]
    assert not system._ignored(boxes, target[:0]).any()


@pytest.mark.fast
def test_the_shift_is_added_to_the_first_coefficient_alone():
    plain, shifted = build("ese-seg", shift=0.0), build("ese-seg", shift=0.25)
    rows = plain.rows(plain(torch.randn(1, 3, *SIZE)).shapes)
    difference = shifted.coefficients(rows) - plain.coefficients(rows)
    torch.testing.assert_close(difference[..., 0], torch.full_like(difference[..., 0], 0.25))
    assert (difference[..., 1:] == 0).all()


@pytest.mark.fast
def test_a_mirrored_placement_gives_mirrored_objects():
    system = build("ese-seg").eval()
    straight = Placement.identity(SIZE)
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        plain, mirrored = (
            system.decode(raw, [p], score_threshold=0.0, detections=20)[0] for p in (straight, straight.then_mirror())
        )
    boxes = plain.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1.0]) + torch.tensor([SIZE[1], 0, SIZE[1], 0.0])
    torch.testing.assert_close(mirrored.boxes, boxes, atol=1e-3, rtol=0)
    assert (mirrored.masks.dense() != plain.masks.dense().flip(-1)).float().mean() < 5e-3


@pytest.mark.fast
@pytest.mark.parametrize("detector", ["yolo", "fcos"])
def test_a_target_without_masks_is_refused_in_words(detector):
    system, target = build("ese-seg", detector=detector, neck_width=64, head_convs=1), objects(2)
    target.masks = None
    with pytest.raises(UsageError, match="boxes but no masks"):
        system.losses(system(torch.randn(1, 3, *SIZE)), [target])


@pytest.mark.fast
def test_an_object_whose_mask_is_empty_teaches_its_box_alone():
    system, target = build("ese-seg"), objects(1)
    target.masks = Masks.from_dense(torch.zeros(1, *SIZE, dtype=torch.bool))
    terms = system.losses(system(torch.randn(1, 3, *SIZE)), [target])
    assert float(terms["coefficients"].detach()) == float(terms["centre"].detach()) == 0
    assert float(terms["size"].detach()) > 0
