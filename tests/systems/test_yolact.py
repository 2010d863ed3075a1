"""Options, conventions and operators of YOLACT and YOLACT++."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import maskwright as mw
from maskwright.checkpoints.catalogue import entry_of_file
from maskwright.checkpoints.origins.yolact import ORIGINS
from maskwright.errors import CheckpointError, UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.mask_targets import plane_targets
from maskwright.ops.matching import match_each
from maskwright.ops.planes import place_planes
from maskwright.ops.suppression import fast_nms, fast_nms_by_class
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create, describe
from maskwright.systems.yolact import Anchors, Detections, assemble, crop_window
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
DEFORMABLE = {"backbone": {"name": "resnet50", "width": 16, "deform_stages": (3,)}}
OPTIONS = {
    "Darknet": {"backbone": {"name": "darknet53", "width": 4}},
    "several sizes of real ratios": {"anchors": {"octaves": 2, "square": False}},
    "other sides": {"anchors": {"sides": (32, 64, 128, 256, 512)}, "resize": {"short": 400}},
    "few masks": {"loss": {"masks_per_image": 2}},
    "masks trained everywhere": {"loss": {"crop": False}},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("yolact", options) for options in OPTIONS.values()), ("yolact-plus", DEFORMABLE)],
    ids=[*OPTIONS, "deformable convolutions"],
)
def test_each_option_trains_and_detects(name, options):
    system = build(name, **options)
    raw = system(torch.randn(1, 3, *SIZE))
    terms = system.losses(raw, [objects(3)])
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    found = system.eval().decode(raw, [Placement.identity(SIZE)], detections=5)[0]
    assert len(found.masks) == len(found)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("yolact", {"anchors": {"sides": (8, 16)}}, r"anchors.sides must be five numbers above 0, .*got \[8, 16\]"),
        ("yolact", {"anchors": {"sides": (0, 16, 32, 64, 128)}}, "anchors.sides must be five numbers above 0"),
        ("yolact", {"anchors": {"ratios": ()}}, r"anchors.ratios must be at least one number, all above 0, got \[\]"),
        ("yolact", {"anchors": {"ratios": (1, -1)}}, r"anchors.ratios must be .*, all above 0, got \[1, -1\]"),
        ("yolact", {"anchors": {"octaves": 0}}, "anchors.octaves must be at least 1, got 0"),
        ("yolact", {"loss": {"masks_per_image": 0}}, "loss.masks_per_image must be at least 1, got 0"),
        ("yolact-plus", {"prototypes": 0}, "yolact-plus: prototypes must be at least 1, got 0"),
        ("yolact-plus", {"backbone": {"deform_every": 0}}, "deform_every must be at least 1, got 0"),
        ("yolact", {"backbone": {"norm": "batch", "norm_eps": 0.0}}, "norm_eps must be above 0 with norm='batch'"),
        (
            "yolact",
            {"backbone": {"name": "darknet53", "deform_stages": (3,)}},
            "'darknet53' has no option 'deform_stage",
        ),
        ("yolact", {"backbone": "darknet-tiny"}, "levels of strides 8, 16, 32 is needed; this one has 16, 32"),
    ],
)
def test_invalid_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        create(name, **options)


def test_networks_are_the_dense_part_and_the_re_scoring():
    assert list(build("yolact").networks()) == ["dense"]
    plus = build("yolact-plus", backbone="resnet18")
    assert plus.networks() == {"dense": plus.dense, "rescoring": plus.rescoring}
    assert "deform_stages" not in plus.options["backbone"]  # it has no bottlenecks


def test_an_image_is_stretched_to_the_canvas():
    for options, canvas, side in (
        ({}, (550, 550), 24),
        ({"short": 400}, (400, 400), 17),
        ({"canvas": (300, 600)}, (300, 600), 13),
    ):
        system = describe("yolact", resize=options)
        assert system.preprocess.canvas == canvas
        assert system.preprocess.size(40, 60) == canvas
        width, height = system.anchor_shapes[0][0]
        assert (width * canvas[1], height * canvas[0]) == pytest.approx((side, side))
    other = describe("yolact", resize={"fit": "short", "short": 400, "long": 700}).preprocess
    assert other.size(100, 200) == (350, 700)  # another rule than the canvas


def test_the_greedy_rule_is_reached_from_predict():
    system = build("yolact").eval()
    with torch.no_grad():
        system.dense.head.classes.weight.mul_(4)  # so that most anchors are of one class
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    limits = {"candidate_threshold": 0.5, "detections": 1000, "nms_threshold": 0.3}
    default, fast, greedy = (
        mw.predict(system, image, **kind, **limits).instances for kind in ({}, {"nms": "fast"}, {"nms": "greedy"})
    )
    assert torch.equal(default.boxes, fast.boxes)
    assert 0 < len(fast) < len(greedy)  # what was suppressed suppresses others in the one, and not in the other
    with pytest.raises(UsageError, match="nms must be one of 'fast', 'greedy', got 'soft'"):
        mw.predict(system, image, nms="soft")


# ---- anchors and matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "count"), [("yolact", 550, 19248), ("yolact", 700, 30963), ("yolact-plus", 550, 57744)]
)
def test_the_number_of_anchors_is_as_published(name, size, count):
    with torch.device("meta"):
        system = build(name, resize={"short": size})
    raw = system(torch.empty(1, 3, size, size, device="meta"))
    assert system.anchors(raw).shape == (count, 4)
    assert raw.deltas.shape[1] == count


@pytest.mark.fast
def test_sides_of_anchors():
    def sides(size=550, **options):
        return [[(w * size, h * size) for w, h in level] for level in Anchors(**options).shapes((size, size))]

    square = sides()
    assert [level[0][0] for level in square] == pytest.approx([24, 48, 96, 192, 384])
    assert [h for _, h in square[0]] == pytest.approx([24, 24 / 2**0.5, 24 * 2**0.5])
    assert all(w == h for level in square for w, h in level)
    assert [level[0][0] for level in sides(400)] == pytest.approx([17, 34, 69, 139, 279])
    assert [level[0][0] for level in sides(700)] == pytest.approx([30, 61, 122, 244, 488])
    real = sides(octaves=3, square=False)
    assert [w / h for w, h in real[0]] == pytest.approx([1, 0.5, 2] * 3)
    assert [(w * h) ** 0.5 for w, h in real[0]] == pytest.approx(
        [24 * 2 ** (j / 3) for j in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    )


def test_every_object_gets_an_anchor_of_its_own():
    """Compared with the rule written out, object by object."""
    torch.manual_seed(0)
    for _ in range(60):
        count, several = (int(torch.randint(low, high, (1,))) for low, high in ((1, 9), (1, 30)))
        truth, boxes = (torch.randint(0, 6, (n, 4)).float() for n in (count, several))  # with many ties
        truth[:, 2:] += truth[:, :2] + 1
        boxes[:, 2:] += boxes[:, :2] + 1
        iou = box_ops.pairwise_iou(truth, boxes)
        best, nearest = iou.max(0)
        for _ in range(min(count, several)):
            flat = int(iou.argmax())
            row, column = flat // several, flat % several
            best[column], nearest[column] = 2, row
            iou[row], iou[:, column] = -1, -1
        wanted = torch.where(best >= 0.5, nearest, -2)
        wanted = torch.where(best < 0.4, -1, wanted)
        ours = match_each(truth, boxes, 0.4, 0.5, at_once=3)
        assert torch.equal(ours[0], nearest)
        assert torch.equal(ours[1], wanted)


def test_anchors_in_a_crowd_region_are_ignored():
    system = build("yolact", loss={"crowd_overlap": 0.7})
    anchors = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.5, 0.2, 0.2, 0.1], [0.8, 0.8, 0.1, 0.1]])
    truth = replace(objects(1), boxes=torch.tensor([[0.15, 0.15, 0.25, 0.25]]))
    crowd = torch.tensor([[0.0, 0.0, 0.58, 0.4]])  # holds the first anchor and 0.9 of the second
    assert system.assign(anchors, truth, crowd)[1].tolist() == [0, -2, -1]
    crowd = torch.tensor([[0.0, 0.0, 0.53, 0.4]])
    assert system.assign(anchors, truth, crowd)[1].tolist() == [0, -1, -1]


# ---- suppression -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_what_fast_nms_suppresses_still_suppresses_others():
    boxes = torch.tensor([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10.0]])  # each overlaps the next by 6 / 14
    iou = box_ops.pairwise_iou(boxes, boxes)
    scores, groups = torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64)
    assert fast_nms(iou, 0.4).tolist() == [True, False, False]
    assert box_ops.nms(boxes, scores, groups, 0.4).tolist() == [0, 2]
    assert fast_nms(iou[None].expand(2, 3, 3), 6 / 14 + 1e-6).all()  # an overlap has to be larger; several at once
    assert fast_nms(torch.zeros(0, 0)).shape == (0,)


def test_fast_nms_keeps_a_part_of_what_the_classical_rule_keeps():
    corners = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 40
    boxes, groups = torch.cat([corners, corners + 10], 1), torch.zeros(200, dtype=torch.int64)
    fast = set(fast_nms(box_ops.pairwise_iou(boxes, boxes), 0.3).nonzero().flatten().tolist())
    greedy = set(box_ops.nms(boxes, torch.linspace(1, 0, 200), groups, 0.3).tolist())
    assert fast < greedy


@pytest.mark.fast
@pytest.mark.parametrize("equals", [False, True], ids=["distinct", "with equals"])
def test_the_best_are_selected_without_comparing_all(equals):
    torch.manual_seed(3)
    corner = torch.rand(300, 2) * 0.6
    boxes = torch.cat([corner, corner + 0.1 + torch.rand(300, 2) * 0.3], 1)
    scores = torch.rand(12, 300) ** 4
    if equals:
        scores = (scores * 50).round() / 50
    candidates = (torch.rand(300) < 0.9).nonzero().flatten()

    def best(wanted):
        score, row, anchor = fast_nms_by_class(boxes, scores, candidates, 0.5, wanted)
        return sorted(zip((-score).tolist(), row.tolist(), anchor.tolist(), strict=True))

    every = best(100_000)  # too many for anything but the whole comparison
    assert len(every) == 12 * 200  # suppressed ones have a score of -1
    for wanted in (1, 20, 100):
        few = best(wanted)
        assert wanted <= len(few) < 12 * 200
        bound = few[wanted - 1][0]
        assert [x for x in few if x[0] < bound] == [x for x in every if x[0] < bound]
        assert set(few) <= set(every)


def test_three_ways_of_suppression():
    system = build("yolact").eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        raw = replace(raw, logits=raw.logits * 4)  # so that most anchors are of one class
        best = raw.logits.softmax(-1)[0, :, :-1].amax(1).sort(descending=True).values
        bound = float(best[100])  # of 100 candidates
        limits = {"candidate_threshold": bound, "nms_threshold": 0.3, "detections": 10_000}
        fast, greedy = (system.detect(raw, **limits, nms=kind)[0] for kind in ("fast", "greedy"))
        across = system.detect(raw, **limits, cross_class=True)[0]
    # The greedy rule discards scores below the threshold; the fast one fills up with almost none.
    assert greedy.scores.min() > bound > fast.scores.min()
    sides = torch.tensor([128, 96, 128, 96])
    for found, plus_one, same in ((fast, False, True), (greedy, True, True), (across, False, False)):
        boxes = found.boxes * sides
        overlap = box_ops.pairwise_iou(boxes, boxes, plus_one).fill_diagonal_(0)
        overlap = overlap * (found.labels[:, None] == found.labels) if same else overlap
        assert overlap.max() <= 0.3 + 1e-5


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [True, False])
def test_masks_outside_of_boxes_are_trained_without_the_crop(crop):
    system = build("yolact", loss={"crop": crop})
    raw = system(torch.randn(1, 3, *SIZE))
    raw = replace(raw, prototypes=raw.prototypes.detach().requires_grad_())
    target = objects(1, side=(16, 16))
    system.losses(raw, [target])["mask"].backward()
    assert raw.prototypes.grad is not None
    height, width = raw.prototypes.shape[-2:]
    outside = ~crop_window(target.boxes / torch.tensor([SIZE[1], SIZE[0]] * 2), (height, width))[0]
    assert raw.prototypes.grad[0].abs().sum(0)[outside].any() == (not crop)


def detections(*boxes: tuple[float, ...], maps: int = 8) -> Detections:
    count = len(boxes)
    return Detections(
        torch.tensor(boxes), torch.linspace(0.9, 0.5, count), torch.arange(count) % 2, torch.ones(count, maps)
    )


def test_without_the_crop_masks_reach_beyond_their_boxes():
    system = build("yolact")
    found, maps = detections((0.25, 0.25, 0.5, 0.5)), torch.ones(8, 24, 32)
    placement = Placement.resize((200, 300), SIZE)
    inside, whole = (system.on_image(found, maps, SIZE, placement, crop=crop).masks for crop in (True, False))
    assert whole.areas().tolist() == [200 * 300]
    # A cell beyond the box and, where it is interpolated, half a cell more.
    x0, y0, x1, y1 = inside.boxes()[0].tolist()
    assert 75 - 1.5 * 300 / 32 - 1 <= x0 < 75
    assert 150 < x1 <= 150 + 1.5 * 300 / 32 + 1
    assert 50 - 1.5 * 200 / 24 - 1 <= y0 < 50
    assert 100 < y1 <= 100 + 1.5 * 200 / 24 + 1


@pytest.mark.parametrize("mirrored", [False, True])
def test_masks_on_the_image_are_the_interpolated_planes(mirrored):
    planes, size = torch.rand(5, 24, 32), (61, 47)
    placement = Placement.resize(size, (96, 128))
    placement = placement.then_mirror() if mirrored else placement
    whole = functional.interpolate(planes[None], size=size, mode="bilinear", align_corners=False)[0] > 0.5
    for budget in (1, 64 << 20):  # packed one by one, and all at once
        ours = place_planes(planes, placement, (96, 128), steps=1, budget=budget).dense()
        assert torch.equal(ours, whole.flip(-1) if mirrored else whole)


def test_a_hundred_objects_on_a_large_image_are_small():
    system = build("yolact")
    found = detections(
        *[(0.1 * (k % 10), 0.1 * (k // 10), 0.1 * (k % 10) + 0.08, 0.1 * (k // 10) + 0.08) for k in range(100)]
    )
    own = system.on_image(found, torch.rand(8, 138, 138), (550, 550), Placement.resize((3000, 4000), (550, 550)))
    assert len(own) == 100
    assert own.masks.nbytes < 2 << 20


@pytest.mark.fast
def test_corners_are_integers_and_boxes_without_area_are_dropped():
    system = build("yolact")
    found, maps = detections((0.101, 0.1, 0.509, 0.5), (0.5001, 0.5, 0.5002, 0.9)), torch.ones(8, 24, 32)
    placement = Placement.resize((100, 100), SIZE)
    assert system.on_image(found, maps, SIZE, placement).boxes.tolist() == [[10, 10, 50, 50]]
    fine = system.on_image(found, maps, SIZE, placement, whole_boxes=False)
    torch.testing.assert_close(fine.boxes[0], torch.tensor([10.1, 10, 50.9, 50]))
    assert len(fine) == 2


@pytest.mark.fast
def test_target_masks_are_the_interpolated_ones():
    planes = torch.rand(3, 96, 128) > 0.4
    masks = Masks.from_dense(planes)
    for grid in ((24, 32), (7, 9), (120, 130)):
        wanted = functional.interpolate(planes[None].float(), size=grid, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(plane_targets(masks, grid, (96, 128)), wanted)
        torch.testing.assert_close(plane_targets(masks.pack(), grid, (96, 128)), wanted)
    # Where the input was padded, what lies beyond the image is background.
    padded = functional.pad(planes, (0, 32, 0, 32))
    wanted = functional.interpolate(padded[None].float(), size=(32, 40), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(plane_targets(masks, (32, 40), (128, 160)), wanted)


def test_there_are_three_hard_negatives_for_each_positive():
    """A loss of 1 for each chosen anchor counts them."""
    system = build("yolact")
    raw = system(torch.randn(1, 3, *SIZE))
    flat = torch.zeros_like(raw.logits)
    matched = torch.full(flat.shape[:2], -1)
    matched[0, :2], matched[0, 5:9] = 0, -2
    total = system.class_loss(flat, matched, [objects(1)])
    assert float(total) == pytest.approx(8 * torch.tensor(3.0).log().item(), rel=1e-5)


# ---- YOLACT++ --------------------------------------------------------------------------------------------------------


def test_scores_are_the_masks_or_the_classes():
    system = build("yolact-plus").eval()
    with torch.no_grad():
        system.rescoring.output.bias.copy_(torch.tensor([0.2, 0.9]))
        raw = system(torch.randn(1, 3, *SIZE))
        places = [Placement.identity(SIZE)]
        by_class = system.decode(raw, places, rescore=False)[0]
        by_mask = system.decode(raw, places)[0]
        few = system.decode(raw, places, score_threshold=float(by_mask.scores[3]))[0]
    assert sorted(by_class.boxes.sum(1).tolist()) == pytest.approx(sorted(by_mask.boxes.sum(1).tolist()))
    assert (by_mask.scores.diff() <= 0).all()
    assert not torch.equal(by_class.labels, by_mask.labels)
    assert len(few) == 3  # the threshold is on what is returned


def test_small_maps_are_padded_with_zeros():
    system = build("yolact-plus")
    masks = torch.rand(2, 20, 70)
    wider = functional.pad(masks, (0, 0, 0, 43))
    torch.testing.assert_close(system.rescoring(masks), system.rescoring(wider))
    assert system.rescoring(torch.rand(3, 138, 138)).shape == (3, 2)


def test_soft_masks_have_gradients_from_re_scoring():
    system = build("yolact-plus")
    raw = system(torch.randn(1, 3, *SIZE))
    terms = system.losses(raw, [objects(2, side=(60, 60))])
    assert terms["rescore"] > 0
    grad = torch.autograd.grad(terms["rescore"], raw.prototypes)[0]
    assert grad.abs().sum() > 0


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sorted(LAYOUTS.glob("yolact-*.json")), ids=lambda p: p.stem)
def test_published_layouts_are_recognised_and_fit(layout):
    tensors = json.loads(layout.read_text())["tensors"]
    state = {k: torch.empty(shape, device="meta") for k, (shape, _) in tensors.items()}
    state["backbone.layer1.0.conv1.weight"] = torch.empty(1, device="meta")  # what old files hold besides
    state["fpn.downsample_layers.2.weight"] = torch.empty(1, device="meta")
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    origin, *more = [o for o in ORIGINS if o.candidates(shapes, {})]
    assert not more
    assert origin.system == ("yolact-plus" if "plus" in layout.stem else "yolact")
    candidates = origin.candidates(shapes, {})
    variants = ["yolact-r101", "yolact-r101-im400", "yolact-r101-im700"]
    assert [c.variant for c in candidates] == (variants if layout.stem == "yolact-resnet101" else [""])
    options = candidates[0].options
    system = describe(origin.system, **options)
    ours = {k: tuple(v.shape) for k, v in system.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in origin.translate(state, options).items()}
    assert {k: v for k, v in theirs.items() if v} == {k: v for k, v in ours.items() if v}  # counters have no shape
    if "plus" in layout.stem:
        assert options["backbone"]["deform_every"] == (3 if "101" in layout.stem else 1)
        assert options["backbone"]["deform_stages"] == [1, 2, 3]


def test_a_file_that_may_be_of_several_sizes_asks(tmp_path):
    shapes = json.loads((LAYOUTS / "yolact-resnet101.json").read_text())["tensors"]
    state = {k: torch.zeros(shape, dtype=torch.int8) for k, (shape, _) in shapes.items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"match 3 published variants: .*variant='yolact-r101'"):
        mw.load(tmp_path / "x.pth")
    # The published name says it.
    assert entry_of_file(tmp_path / "yolact_im700_54_800000.pth").variant == "yolact-r101-im700"
    assert entry_of_file(tmp_path / "yolact_resnet50_54_800000.pth") is None


def test_an_empty_target_and_empty_detections_are_whole():
    system = build("yolact-plus").eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        terms = system.losses(raw, [Instances.empty(SIZE)])
        found = system.decode(raw, [Placement.identity(SIZE)], candidate_threshold=1.0)[0]
    assert terms["mask"] == terms["box"] == terms["class"] == terms["rescore"] == 0
    assert len(found) == len(found.masks) == 0
    assert assemble(torch.ones(8, 3, 3), torch.ones(0, 8), None).shape == (0, 3, 3)
