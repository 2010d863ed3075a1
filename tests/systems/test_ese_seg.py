"""ESE-Seg: backbones, detectors, codes and conventions."""

from __future__ import annotations

import pytest
import torch

from maskwright.errors import UsageError
from maskwright.ops.contours import decode_chebyshev
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import system_class
from maskwright.systems.ese_seg import ANCHORS, Shapes
from tests.systems.tiny import SIZE, build, objects

OPTIONS = {
    "Darknet-53": {"backbone": {"name": "darknet53", "width": 4}},
    "tiny": {"backbone": {"name": "darknet-tiny", "width": 4}},
    "DLA": {"backbone": {"name": "dla34", "width": 4}, "head_norm": "batch"},
    "few coefficients": {"coefficients": 8, "shift": 0.0},
    "other anchors": {"anchors": ((8, 8), (16, 16), (32, 32), (64, 64), (96, 96), (128, 128))},
    "widths that are no multiple of four": {"head_width": 3},
    "PolarMask's head": {"detector": "fcos", "head": {"width": 64, "convs": 1}},
    "PolarMask's head on Darknet-53": {
        "detector": "fcos",
        "head": {"width": 64, "convs": 1},
        "backbone": {"name": "darknet53", "width": 4},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_decodes(options):
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
        ({"backbone": {"name": "darknet19"}}, "no backbone 'darknet19'"),
        ({"coefficients": 0}, "coefficients must be at least 1, got 0"),
        ({"coefficients": 361}, "coefficients must be between 1 and 360, got 361"),
        ({"head_width": 0}, "head_width must be at least 1, got 0"),
        ({"anchors": ()}, "anchors must be pairs .* got 0 entries"),
        ({"anchors": ((10, 10), (10, 0), (10, 10))}, "anchors must have widths and heights above 0"),
        ({"anchors": ANCHORS[:4]}, "equally many for each of 3 levels, got 4 entries"),
        ({"detector": "fcos", "rays": 50}, "rays must be a divisor of 360"),
        (
            {"detector": "fcos", "backbone": {"name": "darknet-tiny", "width": 2}},
            "levels of strides 8, 16, 32 is needed",
        ),
        ({"detector": "ssd"}, "detector must be one of 'yolo', 'fcos', got 'ssd'"),
    ],
)
def test_invalid_options_are_errors(options, words):
    with pytest.raises(UsageError, match=words):
        build("ese-seg", **options)


@pytest.mark.fast
def test_shapes_are_encoded_after_augmentation():
    """A mirrored image has mirrored shapes, a stretched one stretched shapes."""
    system = build("ese-seg")
    plane = torch.zeros(SIZE, dtype=torch.bool)
    plane[20:60, 30:40] = plane[50:60, 30:80] = True
    masks = Masks.from_dense(plane[None])
    target = Instances(SIZE, masks.boxes(), torch.zeros(1, dtype=torch.int64), masks)
    for placement in (
        Placement.identity(SIZE), Placement.identity(SIZE).then_mirror(), Placement.resize(SIZE, (192, 96)),
    ):  # fmt: skip
        placed = target.place(placement)
        own = system.encode(placed)
        outlines = decode_chebyshev(own.coefficients, own.centres, own.boxes).numpy()
        again = Masks.from_polygons([[ring] for ring in outlines], placed.image_size)
        assert float(again.iou(placed.masks)) > 0.65


@pytest.mark.fast
def test_the_anchor_with_the_best_overlap_is_assigned_and_the_later_of_two_objects_at_one_row():
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
def test_locations_whose_box_overlaps_an_object_have_no_objectness_loss():
    system = build("ese-seg").eval()
    raw = system(torch.randn(1, 3, *SIZE))
    boxes = system.boxes(raw, system.rows(raw.shapes))[0][0]
    target = boxes[700:701].clamp(min=0)
    assert system.ignored(boxes, target)[700]
    assert not system.ignored(boxes, target[:0]).any()


@pytest.mark.fast
def test_the_shift_is_added_to_the_first_coefficient_only():
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
def test_images_are_stretched_to_a_square_or_keep_their_shape():
    square, kept = (build("ese-seg", resize={"short": 128, "fit": fit}) for fit in (None, "short"))
    assert square.preprocess.size(300, 500) == (128, 128)
    assert kept.preprocess.size(300, 500) == (128, 213)
    assert kept.preprocess.size(100, 900) == (57, 512)  # a long side of four short ones


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    kind = system_class("ese-seg")
    old = {"backbone": "resnet18", "stem_width": 16, "norm": "batch", "neck_width": 64, "short": 320, "fit": "short"}
    assert kind.upgraded(old) == {
        "backbone": {"name": "resnet18", "width": 16, "norm": "batch"}, "head": {"width": 64},
        "resize": {"short": 320, "fit": "short"},
    }  # fmt: skip
    assert kind.upgraded({"backbone": "timm:resnet18", "stem_width": None, "norm": "batch"}) == {
        "backbone": {"name": "timm:resnet18"}, "head_norm": "batch",
    }  # fmt: skip


@pytest.mark.fast
def test_an_object_with_an_empty_mask_has_losses_for_its_box_only():
    system, target = build("ese-seg"), objects(1)
    target.masks = Masks.from_dense(torch.zeros(1, *SIZE, dtype=torch.bool))
    terms = system.losses(system(torch.randn(1, 3, *SIZE)), [target])
    assert float(terms["coefficients"].detach()) == float(terms["centre"].detach()) == 0
    assert float(terms["size"].detach()) > 0
