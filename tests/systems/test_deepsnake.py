"""Deep Snake: options, components, and masks from contours."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from maskwright.checkpoints.origins import origins
from maskwright.checkpoints.origins.deepsnake import recognise
from maskwright.errors import UsageError
from maskwright.ops.vertices import clipped_to_map, octagon_lines
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import system_class
from maskwright.systems.deepsnake import CELLS, Raw
from tests.systems.tiny import SIZE, objects, sized

SIZES = {
    "backbone": {"name": "resnet18", "width": 16},
    "neck_width": 16,
    "head_width": 32,
    "contours": {"points": 32, "start_points": 16, "width": 64},
    "resize": {"canvas": SIZE},
}
build = sized({"deepsnake": SIZES})


OPTIONS = {
    "DLA": {"backbone": {"name": "dla34", "width": 4}},
    "DLA without deformable convolutions": {
        "backbone": {"name": "dla34", "width": 4, "frozen": 2},
        "deformable": False,
    },
    "Darknet": {"backbone": {"name": "darknet53", "width": 4}, "neck_norm": "batch"},
    "components": {"components": True, "component_width": 16, "whole_classes": ("b",)},
    "graph convolution, once": {"contours": {"convolution": "graph", "iterations": 1}},
    "batch norm": {"backbone": {"norm": "batch"}, "contours": {"norm": "batch"}},
    "all contours, from the box": {"supervise": "all", "start": "box", "contours": {"norm": "none"}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_decodes(options):
    contours = {"width": 16, **options.get("contours", {})}
    system, size = build("deepsnake", **{**options, "contours": contours}), (64, 64)
    images = torch.randn(2, 3, *size)
    for counts in ((3, 1), (0, 0)):
        targets = [objects(n, size, (30, 20)) for n in counts]
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    system.eval()
    with torch.no_grad():
        found = system.decode(system(images), [Placement.identity(size)] * 2, score_threshold=0.0, detections=5)
    assert all(len(own.masks) == len(own) for own in found)


def painted(system, places: list[tuple[int, int]], sides: list[tuple[float, float]], labels: list[int]) -> Raw:
    """Raw output with confident boxes of these sides around these cells (x, y)."""
    height, width = SIZE[0] // 4, SIZE[1] // 4
    centres = torch.full((1, len(system.classes), height, width), -9.0)
    sizes = torch.ones(1, 2, height, width)
    for number, ((x, y), side, label) in enumerate(zip(places, sides, labels, strict=True)):
        centres[0, label, y, x] = 4.0 - number
        sizes[0, :, y, x] = torch.tensor(side)
    return Raw(centres, sizes, torch.zeros(1, system.dense.channels, height, width))


def test_without_offsets_a_contour_is_the_octagon_of_the_box():
    system = build("deepsnake").eval()
    for snake in (system.contours.start, *system.contours.steps):
        torch.nn.init.zeros_(snake.predict[-1].weight)
    raw = painted(system, [(10, 12), (20, 8)], [(8.0, 12.0), (4.0, 4.0)], [0, 1])
    (own,) = system.decode(raw, [Placement.identity(SIZE)])
    assert own.labels.tolist() == [0, 1]
    assert torch.equal(own.boxes, torch.tensor([[24.0, 24.0, 56.0, 72.0], [72.0, 24.0, 88.0, 40.0]]))
    # An octagon whose sides on the box are a quarter of it: 1 - 4 * (3/8)^2 / 2 of its area.
    areas = torch.tensor([32 * 48, 16 * 16]) * (1 - 2 * (3 / 8) ** 2)
    torch.testing.assert_close(own.masks.areas().float(), areas, rtol=0.08, atol=0)
    (mirrored,) = system.decode(raw, [Placement.identity(SIZE).then_mirror()])
    assert (mirrored.masks.dense() != own.masks.dense().flip(-1)).float().mean() < 2e-3
    (strict,) = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.96)
    assert len(strict) == 1


def test_training_on_one_object_fits_its_contour():
    system = build("deepsnake", neck_width=16, contours={"width": 32})
    turns = [(44 - 24 * (k % 2), k * math.pi / 5) for k in range(10)]
    ring = [v for r, a in turns for v in (64 + r * math.sin(a), 50 - r * math.cos(a))]
    masks = Masks.from_polygons([[ring]], SIZE)
    target = Instances(SIZE, masks.boxes(), torch.tensor([0]), masks)
    plane = functional.avg_pool2d(masks.dense().float()[None], 4)
    seen = [plane, functional.avg_pool2d(plane, 5, 1, 2), functional.avg_pool2d(plane, 9, 1, 4)]
    slopes = [f(v) for v in seen for f in (lambda v: v.roll(1, 2) - v, lambda v: v.roll(1, 3) - v)]
    x0, y0, x1, y1 = (masks.boxes()[0] / 4).tolist()
    raw = painted(system, [(16, round((y0 + y1) / 2))], [(x1 - x0, y1 - y0)], [0])
    raw = Raw(raw.centres, raw.sizes, functional.pad(torch.cat(seen + slopes, 1), (0, 0, 0, 0, 0, 7)))
    optimizer = torch.optim.Adam(system.contours.parameters(), lr=2e-3)
    for _ in range(90):
        terms = system.losses(raw, [target])
        optimizer.zero_grad()
        (terms["extreme"] + terms["outline"]).backward()
        optimizer.step()
    assert terms["outline"] < 0.5  # pixels; 8 at first
    (own,) = system.decode(raw, [Placement.identity(SIZE)])
    assert float(own.masks.iou(masks)) > 0.8  # the octagon: 0.5


def test_images_can_be_padded_instead_of_letterboxed():
    system = build("deepsnake", resize={"fit": "pad", "canvas": None})
    batch = system.preprocess.collate([torch.zeros(3, 64, 50, dtype=torch.uint8)])
    assert batch.images.shape == (1, 3, 96, 64)  # always larger
    assert batch.placements[0] == Placement((64, 50), (96, 64), offset=(7.0, 16.0))
    assert batch.images.std((2, 3)).max() < 1e-6  # black around black


def test_masks_of_a_large_image_need_little_memory():
    system, size = build("deepsnake").eval(), (3000, 4000)
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        (own,) = system.decode(raw, [Placement.resize(size, SIZE)], score_threshold=0.0)
    assert len(own) > 50
    assert own.masks.nbytes < 1 << 20


def two_parts() -> Instances:
    boxes = torch.tensor([[8.0, 16.0, 100.0, 72.0], [40.0, 30.0, 80.0, 60.0]])
    rings = [
        [[8, 16, 40, 16, 40, 72, 8, 72], [60, 16, 100, 16, 100, 72, 60, 72]],
        [[40, 30, 80, 30, 80, 60, 40, 60]],
    ]
    return Instances(SIZE, boxes, torch.tensor([0, 1]), Masks.from_polygons(rings, SIZE))


def test_a_part_is_an_object_or_a_component():
    size = (SIZE[0] // 4, SIZE[1] // 4)
    alone = build("deepsnake").targets([objects(1), two_parts()], size)
    assert alone.labels.tolist() == [0, 0, 0, 1]
    assert alone.images.tolist() == [0, 1, 1, 1]
    together = build("deepsnake", components=True, component_width=16).targets([objects(1), two_parts()], size)
    assert together.labels.tolist() == [0, 0, 1]
    assert together.contour_owners.tolist() == [0, 1, 1, 2]
    assert torch.equal(together.boxes[1:], two_parts().boxes / 4)
    assert torch.equal(together.contour_boxes[1], torch.tensor([2.0, 4.0, 10.0, 18.0]))
    # The same from run lengths, whose outlines are traced.
    target = two_parts()
    target.masks = target.masks.pack()
    traced = build("deepsnake").targets([target], size)
    torch.testing.assert_close(traced.contour_boxes, alone.contour_boxes[1:], atol=0.3, rtol=0)


def test_holes_and_tiny_parts_are_ignored():
    plane = torch.zeros(1, *SIZE, dtype=torch.bool)
    plane[0, 10:60, 10:60] = True
    plane[0, 20:40, 20:40] = False
    plane[0, 80:88, 80:88] = True  # 4 cells of the map
    target = Instances(SIZE, torch.tensor([[10.0, 10, 88, 88]]), torch.tensor([1]), Masks.from_dense(plane))
    goals = build("deepsnake").targets([target], (24, 32))
    assert goals.boxes.tolist() == [[2.5, 2.5, 15.0, 15.0]]


class TwoComponents(torch.nn.Module):
    """Predicts two components, the left and the right quarter, in wide boxes and none in others."""

    def forward(self, feature, boxes, owners):
        centres = torch.full((len(boxes), 1, *CELLS), -9.0)
        sure = boxes[:, 2] - boxes[:, 0] > 5
        centres[sure, 0, 7, 7] = 3.0
        centres[sure, 0, 7, 49] = 2.0
        sides = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor([0.25, 1.0])
        return centres, sides[:, :, None, None].expand(-1, -1, *CELLS)


def test_components_of_an_object_form_one_mask_and_an_object_without_any_is_dropped():
    system = build("deepsnake", classes=("a", "b", "c"), components=True, whole_classes=("c",)).eval()
    for snake in (system.contours.start, *system.contours.steps):
        torch.nn.init.zeros_(snake.predict[-1].weight)
    system.components = TwoComponents()
    raw = painted(system, [(16, 12), (5, 5), (20, 20)], [(24.0, 16.0), (4.0, 4.0), (4.0, 4.0)], [0, 1, 2])
    (own,) = system.decode(raw, [Placement.identity(SIZE)])
    assert own.labels.tolist() == [0, 2]  # "b" has no components, "c" is always whole
    plane = own.masks.dense()[0]
    assert plane[48, [20, 28, 100, 108]].all()
    assert not plane[48, 41:87].any()


def test_boxes_are_suppressed_if_a_threshold_is_given():
    system = build("deepsnake").eval()
    raw = painted(system, [(10, 12), (12, 12)], [(12.0, 12.0), (12.0, 12.0)], [0, 0])
    (every,) = system.decode(raw, [Placement.identity(SIZE)])
    (some,) = system.decode(raw, [Placement.identity(SIZE)], nms_threshold=0.5)
    assert (len(every), len(some)) == (2, 1)


def test_the_number_of_contours_with_a_loss_is_bounded():
    system = build("deepsnake", most_contours=5)
    seen = []
    system.contours.start.register_forward_hook(lambda module, given, answer: seen.append(len(answer)))
    system.losses(system(torch.randn(1, 3, *SIZE)), [objects(30, side=(16, 16))])
    assert seen == [5]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contours": {"points": 8}}, "contours.points must be at least 16, got 8"),
        ({"contours": {"start_points": 18}}, "contours.start_points must be a multiple of 4 and at least 16, got 18"),
        ({"contours": {"iterations": 0}}, "contours.iterations must be at least 1, got 0"),
        ({"resize": {"canvas": (64,)}}, "resize.canvas must be a height and a width"),
        ({"backbone": {"name": "dla60"}}, "no backbone 'dla60'"),
        ({"backbone": {"name": "darknet-tiny", "width": 2}}, "levels of strides 4, 8, 16, 32 is needed"),
    ],
)
def test_invalid_options_are_errors(options, words):
    with pytest.raises(UsageError, match=words):
        build("deepsnake", **options)


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {"backbone": "swin-tiny", "stem_width": None, "norm": "batch", "points": 64, "contour_width": 16,
           "contour_norm": "batch", "fit": "pad", "canvas": [512, 512]}  # fmt: skip
    assert system_class("deepsnake").upgraded(old) == {
        "backbone": {"name": "swin-tiny", "width": None}, "neck_norm": "batch",
        "contours": {"points": 64, "width": 16, "norm": "batch"}, "resize": {"fit": "pad"},
    }  # fmt: skip


def test_the_network_of_contours_starts_from_given_octagons_or_its_own():
    system = build("deepsnake").eval()
    feature = torch.randn(2, system.dense.channels, 24, 32)
    boxes, owners = torch.tensor([[2.0, 3, 12, 20], [-4, 1, 9, 30]]), torch.tensor([1, 0])
    with torch.no_grad():
        extremes, lines = system.contours(feature, boxes, owners)
        octagons = octagon_lines(clipped_to_map(extremes, feature), system.points)
        again, others = system.contours(feature, boxes, owners, octagons)
    assert len(lines) == 3
    assert torch.equal(extremes, again)
    assert all(torch.equal(a, b) for a, b in zip(lines, others, strict=True))


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    layout = Path(__file__).parents[1] / "parity" / "layouts" / f"{name}.json"
    return {k: tuple(shape) for k, (shape, _) in json.loads(layout.read_text())["tensors"].items()}


@pytest.mark.fast
def test_options_are_recognised_from_files():
    shapes = shapes_of("deepsnake-sbd")
    assert [o.name for o in origins() if o.candidates(shapes, {})] == ["snake"]
    options = recognise(shapes, {})
    assert options is not None
    assert (len(options["classes"]), options["classes"][0], options["contours"]["iterations"]) == (20, "aeroplane", 3)
    assert recognise({f"module.{k}": v for k, v in shapes.items()}, {}) == options
    seven = {k: (7, *v[1:]) if k.startswith("dla.ct_hm.2.") else v for k, v in shapes.items()}
    once = {k: v for k, v in seven.items() if not k.startswith(("gcn.evolve_gcn0.", "gcn.evolve_gcn1."))}
    kins = recognise(once, {})
    assert kins is not None
    assert (kins["classes"][:2], kins["contours"]["iterations"]) == (("cyclist", "pedestrian"), 1)
    assert kins["resize"] == {"fit": "pad"}
    city = recognise(shapes_of("deepsnake-cityscapes"), {})
    assert city is not None
    assert city["components"]
    assert city["classes"][1:3] == city["whole_classes"] == ("person", "rider")
    assert recognise({k: v for k, v in shapes.items() if not k.startswith("gcn.")}, {}) is None
