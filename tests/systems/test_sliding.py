"""Behaviour specific to DeepMask and InstanceFCN, which are two points in the design space of TensorMask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import maskwright as mw
from maskwright.blocks.layers import pad_mirrored
from maskwright.blocks.vgg import VGG
from maskwright.checkpoints.fitting import renamed
from maskwright.data import Scenes
from maskwright.errors import UsageError
from maskwright.ops.paste import paste_masks
from maskwright.ops.window_tensors import MaskTensor, up_align2nat
from maskwright.structures import Batch, Instances, Placement
from maskwright.systems import describe
from maskwright.systems.deepmask import Raw as Patches
from maskwright.systems.families.sliding import Assignment, assign, lay_windows, own_windows, reachable
from maskwright.systems.instancefcn import Raw as Maps
from maskwright.systems.instancefcn import assemble
from tests.parity.weights import value
from tests.systems.tiny import SIZE, objects, sized

build = sized(
    {
        "deepmask": {
            "backbone": {"name": "resnet18", "width": 16},
            "classes": ("object",),
            "stride": 16,
            "window": 64,
            "neck_width": 16,
            "feature_width": 64,
            "mask_side": 14,
            "label_side": 28,
            "score_width": 32,
            "score_weight": 1.0,
            "dropout": 0.0,
            "scales": (0.5, 1.0),
        },
        "instancefcn": {
            "classes": ("object",),
            "backbone": {"name": "vgg11", "width": 8},
            "head_width": 32,
            "parts": 3,
            "side": 9,
            "scales": (0.5, 1.0),
            "resize": {"short": 96},
        },
    }
)

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
OPTIONS = {
    "the network of 2015": (
        "deepmask",
        {"backbone": {"name": "vgg11", "norm": "none", "width": 8}, "score_pooled": True, "context": 0},
    ),
    "borders mirrored": ("deepmask", {"border": "symmetric", "backbone": {"norm": "frozen"}}),
    "borders reflected": ("deepmask", {"border": "reflect", "backbone": {"norm": "batch"}}),
    "a finer grid": ("deepmask", {"stride": 8, "window": 32}),
    "parts by their upper edge": ("instancefcn", {"parts": 4, "side": 9, "bins": "floor"}),
    "a residual backbone": ("instancefcn", {"backbone": {"name": "resnet18", "width": 16}}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_detects(name, options):
    system, size = build(name, **options), (64, 96)
    raw = system(torch.randn(2, 3, *size))
    terms = system.losses(raw, [objects(n, size) for n in (3, 0)])
    assert set(terms) == {"mask", "score"}
    sum(terms.values(), torch.zeros(())).backward()
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    terms |= {f"{name}, no objects": v for name, v in system.losses(raw, [objects(0, size)] * 2).items()}
    assert all(torch.isfinite(v) for v in terms.values()), terms
    found = system.decode(raw, [Placement.identity(size)] * 2, detections=5)
    assert all(len(own.masks) == len(own) <= 5 for own in found)
    assert all((own.labels == 0).all() for own in found)


# ---- points of the design space --------------------------------------------------------------------------------------


def test_masks_of_deepmask_are_linear_and_in_natural_representation():
    system = build("deepmask").eval()
    with torch.no_grad():
        raw = system(torch.randn(2, 3, *SIZE))
        tensor = system.mask_tensor(raw, 1)
        places = torch.tensor([[1, 0, 0], [1, 3, 2], [0, 1, 1], [1, 6, 8]])
        grids = system.window_masks(raw, 1, places)
    assert not tensor.aligned
    for row in (0, 1, 3):
        _, y, x = places[row].tolist()
        torch.testing.assert_close(grids[row], tensor.values[1, :, :, y, x], rtol=1e-4, atol=1e-4)
    a, b = raw.features[1][0, :, 0, 0], raw.features[1][0, :, 3, 3]
    zero, one, two, both = system.mask_logits(torch.stack([a * 0, a, b, a + b]))
    torch.testing.assert_close(one + two - zero, both, rtol=1e-4, atol=1e-4)


def test_instancefcn_is_the_aligned_head_upsampled_by_the_nearest_cell():
    """The same maps in TensorMask's head of figure 6d with a factor of 5, and in InstanceFCN's."""
    head = build("tensormask", bipyramid=False, windows=(15,), factor=5.0, mode="nearest", boxes=False).eval()
    with torch.no_grad():
        raw = head(torch.randn(1, 3, *SIZE))
        tensor = head.mask_tensors(raw, 0)[0]
        assert tensor.alpha == 5
        theirs = head.whole_masks(raw, 0)[0]
        ours = assemble(tensor.values.flatten(1, 2), 3, 15)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_deepmask_is_the_simple_natural_head():
    """Both are a 1 x 1 convolution whose channels are the mask of the window at that location: figure 6a."""
    head = build("tensormask", bipyramid=False, aligned=False, windows=(14,), boxes=False).eval()
    system = build("deepmask").eval()
    with torch.no_grad():
        system.masks.weight.zero_()
        system.masks.weight[:, :32] = head.masks.outputs[0].weight
        system.masks.bias.copy_(head.masks.outputs[0].bias)
        x = head(torch.randn(1, 3, *SIZE)).masks[0]
        (natural,) = head.whole_masks(type(head(torch.zeros(1, 3, *SIZE)))((), (), (x,), SIZE), 0)
        features = functional.pad(x, (0, 0, 0, 0, 0, 64 - x.shape[1]))
        ours = system.mask_tensor(Patches((), (features, features), SIZE), 1).values
    torch.testing.assert_close(ours, natural, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(("parts", "side"), [(3, 9), (5, 21), (4, 7)])
@pytest.mark.parametrize("bins", ["nearest", "floor"])
def test_masks_are_copied_from_the_map_of_each_part(parts, side, bins):
    maps = torch.randn(1, parts**2, 6, 8)
    ours = assemble(maps, parts, side, bins, pad=0.0)[0]
    shift = 0.5 if bins == "nearest" else 0.0
    part = [int((i + shift) * parts / side) for i in range(side)]
    for y, x in ((0, 0), (3, 4), (5, 7)):
        for i in range(side):
            for j in range(side):
                row, column = y + i - side // 2, x + j - side // 2
                inside = 0 <= row < 6 and 0 <= column < 8
                expected = maps[0, part[i] * parts + part[j], row, column] if inside else torch.zeros(())
                assert ours[i, j, y, x] == expected


@pytest.mark.fast
def test_cells_per_part():
    sizes = {}
    for bins in ("nearest", "floor"):
        each = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 5, 43, 43)
        column = up_align2nat(MaskTensor(each, True, 1.0, 4.2), 4.2, 0.0, bins).values[0, :, 10, 21, 21]
        sizes[bins] = column.round().long().bincount().tolist()
    assert sizes == {"nearest": [4, 4, 5, 4, 4], "floor": [5, 4, 4, 4, 4]}


@pytest.mark.fast
def test_neighbouring_windows_share_the_values_of_a_part():
    windows = assemble(torch.randn(1, 25, 30, 30), 5, 21)[0]
    # (i, j) of the window around (y, x) is (i - 1, j) of the one around (y + 1, x): the middle part has five rows.
    torch.testing.assert_close(windows[9:13, :, 15, 15], windows[8:12, :, 16, 15], rtol=0, atol=0)
    assert not torch.equal(windows[13:17, :, 15, 15], windows[12:16, :, 16, 15])  # row 13 is in another part


def test_masks_of_single_windows_are_those_of_the_assembled_tensor():
    system = build("instancefcn").eval()
    with torch.no_grad():
        raw = system(torch.randn(2, 3, *SIZE))
        places = torch.tensor([[1, 0, 0], [0, 2, 3], [1, 11, 15], [1, 5, 6]])
        grids = system.window_masks(raw, 1, places)
        for row, (level, y, x) in enumerate(places.tolist()):
            whole = assemble(raw.maps[level], 3, 9)[1, :, :, y, x]
            torch.testing.assert_close(grids[row], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepmask", "instancefcn"])
def test_windows_agree_with_the_units_of_the_mask_tensors(name):
    system = build(name).eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
    windows = system.windows(raw)
    for level in range(2):
        own = windows.places[:, 0] == level
        tensor = system.mask_tensor(raw, level)
        width = windows.boxes[own, 2] - windows.boxes[own, 0]
        span = tensor.step * tensor.values.shape[2]
        torch.testing.assert_close(width, torch.full_like(width, span))
        columns = windows.centres[own].view(*raw.scores[level].shape[-2:], 2)[0, :, 0]
        torch.testing.assert_close(columns.diff(), torch.full_like(columns.diff(), tensor.cell))


# ---- two forms of one network ----------------------------------------------------------------------------------------


class Pool(nn.Module):
    """A backbone without a receptive field beyond its location, so that a patch and an image give the same features."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [functional.avg_pool2d(x, 16).repeat(1, 86, 1, 1)[:, :64]]


@pytest.mark.parametrize("pooled", [False, True], ids=["shared feature", "2015"])
def test_patches_and_images_give_the_same(pooled):
    system = build("deepmask", score_pooled=pooled, stride=16, window=128).eval()
    network = system.dense.window
    network.squeeze = nn.Conv2d(64, 16, 1)
    network.backbone = Pool()
    canvas = torch.randn(1, 3, 224, 256)
    with torch.no_grad():
        feature, score = network(canvas)
        for y, x in ((1, 1), (3, 5)):  # windows of 128 with one location of context
            patch = canvas[:, :, 16 * y - 16 : 16 * y + 144, 16 * x - 16 : 16 * x + 144]
            mask, own = system.patches(patch)
            torch.testing.assert_close(own[0], score[0, 0, y, x], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mask[0], system.mask_logits(feature[:, :, y, x])[0], rtol=1e-4, atol=1e-5)


def test_images_are_padded_with_grey():
    system = build("deepmask", scales=(1.0,)).eval()
    seen = []
    system.dense.window.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    system(torch.zeros(1, 3, 64, 96))
    assert tuple(seen[0].shape) == (1, 3, 128, 160)
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)
    assert seen[0][0, :, 32:96, 32:128].abs().max() < 1e-5


@pytest.mark.fast
@pytest.mark.parametrize(("border", "name"), [("symmetric", "symmetric"), ("reflect", "reflect")])
@pytest.mark.parametrize("around", [1, 3])
def test_mirrored_borders_equal_numpys(border, name, around):
    x = torch.randn(2, 3, 5, 7)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (around, around), (around, around)), mode=name)
    assert np.array_equal(pad_mirrored(x, around, border).numpy(), expected)


@pytest.mark.fast
def test_a_dilated_vgg_keeps_its_size():
    for dilated, strides in ((False, [1, 2, 4, 8, 16]), (True, [1, 2, 4, 8, 8])):
        backbone = VGG(11, base=4, dilated=dilated)
        shapes = [y.shape[-1] for y in backbone(torch.zeros(1, 3, 64, 64))]
        assert shapes == [64 // s for s in strides]
        assert backbone.strides == strides


# ---- assignment ------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_windows_are_positive_for_objects_that_are_centred_and_fit():
    maps = [torch.zeros(1, 1, 20, 20)]
    windows = lay_windows(maps, (0.5,), 16, 160)  # 320 pixels of the input, 32 apart
    rules = Assignment(canonical=92, shift=16, octaves=0.25, margin=48)

    def assigned(*boxes):
        target = Instances(
            (640, 640),
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.zeros(len(boxes), dtype=torch.int64),
        )
        return assign(windows, target, rules)

    side = 92 / 0.5
    centre = [320 - side / 2, 320 - side / 4, 320 + side / 2, 320 + side / 4]
    own = assigned(centre)
    middle = 10 * 20 + 10
    assert windows.centres[middle].tolist() == [320, 320]
    assert sorted(own.positive.nonzero().flatten().tolist()) == [
        middle + 20 * dy + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    ]
    assert not own.negative.view(20, 20)[8:13, 8:13].any()
    assert own.negative.sum() == 400 - 25
    larger = assigned([320 - 0.8 * side, 300, 320 + 0.8 * side, 340])
    assert not larger.positive.any()
    assert larger.negative.sum() == 400 - 25
    assert assigned([320 - 1.1 * side, 300, 320 + 1.1 * side, 340]).negative.all()
    shifted = [v + 40 * (n % 2 == 0) for n, v in enumerate(centre)]
    two = assigned(shifted, centre)
    assert two.owners[middle] == 1
    assert two.owners[middle + 1] == 0
    assert assigned().negative.all()


@pytest.mark.fast
def test_windows_on_padding_are_not_reachable():
    windows = lay_windows([torch.zeros(1, 1, 5, 9)], (1.0,), 16, 64)
    inside = reachable(windows, (40, 60), 16).view(5, 9)
    assert inside.sum(0).tolist() == [4, 4, 4, 4, 4, 0, 0, 0, 0]  # at 0 ... 48 and 0 ... 64, less than a stride beyond


@pytest.mark.parametrize("name", ["deepmask", "instancefcn"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_mask_threshold_outside_of_0_and_1_is_refused(name, threshold):
    system = build(name).eval()
    with torch.no_grad():
        raw = system(torch.zeros(1, 3, *SIZE))
    with pytest.raises(UsageError, match=f"mask_threshold must be between 0 and 1, got {threshold}"):
        system.decode(raw, [Placement.identity(SIZE)], mask_threshold=threshold)


@pytest.mark.parametrize("name", ["deepmask", "instancefcn"])
def test_windows_on_padding_are_not_trained(name):
    system = build(name, assignment={"sampled": 10_000})
    target = Instances.empty((48, 64))
    with torch.no_grad():
        raw = system(torch.zeros(1, 3, *SIZE))
    windows = system.windows(raw)
    parts = (~reachable(windows, target.image_size, system.stride)).split([s[0].numel() for s in raw.scores])
    assert any(p.any() for p in parts)
    sure = tuple(s + 9.0 * p.view_as(s) for s, p in zip(raw.scores, parts, strict=True))  # objects in the padding
    assert float(system.losses(replace(raw, scores=sure), [target])["score"]) == pytest.approx(
        float(system.losses(raw, [target])["score"])
    )


ALONE = {
    "a frozen norm": ("deepmask", {"backbone": {"norm": "frozen"}}),
    "a norm of the whole plane, borders mirrored": ("deepmask", {"border": "symmetric", "scales": (0.6, 1.4)}),
    "scales that round": ("instancefcn", {"side": 11, "scales": (0.6, 1.0, 1.4), "backbone": {"norm": "frozen"}}),
}


def in_planes(system, images):
    """The raw output of a batch whose images are padded to the size of the largest."""
    sizes = [(p.shape[-2], p.shape[-1]) for p in images]
    batch = Batch.collate(images, [Placement.identity(s) for s in sizes], multiple=system.preprocess.multiple)
    return system(*system.inputs(batch.images, sizes)), batch.placements


@pytest.mark.parametrize(("name", "options"), ALONE.values(), ids=ALONE)
def test_an_image_in_a_batch_gives_the_same_as_alone(name, options):
    system = build(name, **options, assignment={"sampled": 10_000}).double().eval()  # all windows, without sampling
    sizes = [(45, 70), (90, 61)]
    images = [torch.randn(3, *size).double() for size in sizes]
    decoded, sums, counts = [], [], []
    for chosen in ([0], [1], [0, 1]):
        targets = [Instances.empty(sizes[n]) for n in chosen]
        with torch.no_grad():
            raw, places = in_planes(system, [images[n] for n in chosen])
            loss = system.losses(raw, targets)["score"]
            decoded.append(system.decode(raw, places, detections=50, nms_threshold=0.9))
        assert (raw.inside == ()) == (len(chosen) == 1)
        windows = system.windows(raw)
        trained = [
            own_windows(raw.inside, row, windows) & reachable(windows, target.image_size, system.stride)
            for row, target in enumerate(targets)
        ]
        counts.append(sum(int(own.sum()) for own in trained))
        sums.append(counts[-1] * loss)  # which is a mean
    assert counts[0] + counts[1] == counts[2]
    torch.testing.assert_close(sums[0] + sums[1], sums[2])
    for alone, together in zip((decoded[0][0], decoded[1][0]), decoded[2], strict=True):
        assert len(alone) == len(together) > 10
        torch.testing.assert_close(alone.scores, together.scores)
        torch.testing.assert_close(alone.boxes, together.boxes)


def test_a_batch_is_processed_at_once_if_batch_norms_are_trained():
    system = build("deepmask", backbone={"norm": "batch"}).train()
    seen = []
    system.dense.window.backbone.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    images = [torch.randn(3, 48, 64), torch.randn(3, 90, 60)]
    in_planes(system, images)
    assert seen == [(2, 3, 45 + 64, 32 + 64), (2, 3, 90 + 64, 64 + 64)]
    seen.clear()
    with torch.no_grad():
        in_planes(system.eval(), images)
    assert len(seen) == 4


# ---- decoding --------------------------------------------------------------------------------------------------------


def planted(system, place, level=1):
    """The raw output of one window with a high score; every mask is the left half of its window."""
    with torch.no_grad():
        system.masks.weight.zero_()
        side = system.mask_side
        system.masks.bias.copy_(torch.where(torch.arange(side) < side // 2, 9.0, -9.0).repeat(side))
        scores = [torch.full((1, 1, 4, 5), -9.0), torch.full((1, 1, 7, 9), -9.0)]
        scores[level][0, 0, place[0], place[1]] = 9.0
        features = [torch.zeros(1, 64, *s.shape[-2:]) for s in scores]
    return Patches(tuple(scores), tuple(features), SIZE)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_masks_are_pasted_into_their_windows(mirrored, double):
    system = build("deepmask").eval()
    raw = planted(system, (3, 4))  # the window around (64, 48), 64 pixels wide: x 32 ... 96, y 16 ... 80
    size = (192, 256) if double else SIZE
    placement = Placement.resize(size, SIZE)
    placement = placement.then_mirror() if mirrored else placement
    found = system.decode(raw, [placement], score_threshold=0.5)[0]
    assert len(found) == 1
    left, right = (64, 96) if mirrored else (32, 64)
    expected = torch.tensor([[left, 16, right, 80]]) * (2.0 if double else 1.0)
    # Half a cell of the mask: it is interpolated between the two halves, and the threshold is 0.2.
    assert (found.boxes - expected).abs().max() <= (5 if double else 3)
    assert found.boxes[0, 1] == expected[0, 1]
    assert found.boxes[0, 3] == expected[0, 3]
    assert torch.equal(found.boxes, found.masks.boxes())


def test_duplicates_are_kept_by_default_and_suppressed_on_request():
    system = build("deepmask").eval()
    raw = planted(system, (3, 4))
    raw.scores[1][0, 0, 3, 5] = 8.0  # overlaps by half
    for nms, count in ((None, 2), (0.2, 1), (0.9, 2)):
        found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.5, nms_threshold=nms)[0]
        assert len(found) == count


def test_instancefcn_suppresses_by_the_boxes_of_masks():
    system = build("instancefcn").eval()
    maps = torch.full((1, 9, 12, 16), -9.0)
    maps[:, :, 3:6, 4:8] = 9.0  # all parts are equal, so that all windows there have the same mask
    scores = torch.full((1, 1, 12, 16), -9.0)
    scores[0, 0, 4, 5:8] = torch.tensor([1.0, 3.0, 2.0])
    small = torch.full((1, 1, 6, 8), -9.0)
    raw = Maps((small, scores), (torch.full((1, 9, 6, 8), -9.0), maps), SIZE)
    found = system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.5)[0]
    assert len(found) == 1
    assert float(found.scores[0]) == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())
    assert (found.boxes[0] - torch.tensor([32.0, 24, 64, 48])).abs().max() <= 1


@pytest.mark.fast
def test_corners_of_a_grid_are_aligned_with_the_outer_pixels():
    grid = torch.randn(1, 5, 5)
    plane = functional.interpolate(grid[None], size=(17, 23), mode="bilinear", align_corners=True)[0, 0]
    masks = paste_masks(grid, torch.tensor([[4.0, 6, 27, 23]]), (40, 50), rule="corners", threshold=0.0, strict=True)
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[6:23, 4:27] = plane > 0
    assert torch.equal(masks.dense()[0], expected)


# ---- without classes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_with_any_classes_is_used_for_training_and_evaluation(tmp_path):
    data = Scenes(6, size=(64, 64), classes=("disc", "star", "box"), difficulty=0.2)
    options = {
        "backbone": {"width": 8}, "feature_width": 32, "score_width": 16, "neck_width": 8, "mask_side": 8,
        "label_side": 16, "scales": (0.7,),
    }  # fmt: skip
    best = mw.train(
        "deepmask-small", data, val=data, out=tmp_path / "run", steps=2, batch=2, epochs=1, workers=0,
        tensorboard=False, short=(64,), options=options,
    )  # fmt: skip
    system = mw.load(best)
    assert system.classes == ("object",)
    assert system.preprocess.short == 64
    assert "val/segm/AR100" in (tmp_path / "run" / "log.csv").read_text()
    for task, name in (("instances", "segm/AP"), ("proposals", "segm/AR1000")):
        result = mw.evaluate(system, data, task=task, examples=0)
        assert result.classes == ("object",)
        assert 0 <= result[name] <= 1
    again = mw.load(best, classes=("cat", "dog"))
    assert again.classes == ("object",)


@pytest.mark.fast
def test_invalid_options_are_refused():
    with pytest.raises(UsageError, match=r"deepmask: window must be a multiple of 2 \* stride = 32, got 72"):
        build("deepmask", window=72)
    with pytest.raises(UsageError, match="window must be at least 1, got 0"):
        build("deepmask", window=0)
    with pytest.raises(UsageError, match=r"dropout must be between 0 and 1, got 1.5"):
        build("deepmask", dropout=1.5)
    for name in ("deepmask", "instancefcn"):
        for scales in ((), (1.0, 0.0), (-0.5,), (float("nan"),)):
            with pytest.raises(UsageError, match="scales must be one or more finite numbers above 0, got"):
                build(name, scales=scales)
    with pytest.raises(UsageError, match=r"side must be an odd number.*, got 8"):
        build("instancefcn", side=8)
    with pytest.raises(UsageError, match="parts must be between 1 and side = 9, got 10"):
        build("instancefcn", parts=10)
    with pytest.raises(UsageError, match="there is no backbone 'alexnet'"):
        build("deepmask", backbone="alexnet")
    with pytest.raises(UsageError, match="there is no backbone 'vgg12'"):
        build("instancefcn", backbone="vgg12")


# ---- files -----------------------------------------------------------------------------------------------------------


def filled(layout, narrow, **changes):
    """The tensors of a layout with all widths divided by `narrow` and some shapes changed."""
    tensors = json.loads((LAYOUTS / f"{layout}.json").read_text())["tensors"]
    state = {}
    for key, (shape, kind) in tensors.items():
        small = [n // narrow if n in (64, 128, 256, 512, 1024) else n for n in changes.get(key, shape)]
        state[key] = torch.from_numpy(value(key, tuple(small), kind, 1))
    return state


def test_narrow_networks_load_from_both_layouts(tmp_path):
    shared = {"masks": [784, 512], "bias": [784], "cells": 128 * 36 // 8}
    torch7 = filled(
        "deepmask-r50", 8, **{"maskBranch.1.1.weight": shared["masks"], "maskBranch.1.1.bias": shared["bias"],
        "trunk.12.weight": [512, shared["cells"]]},
    )  # fmt: skip
    port = filled(
        "deepmask-foolwood-r50", 8, **{"maskBranch.0.0.weight": [*shared["masks"], 1, 1],
        "maskBranch.0.0.bias": shared["bias"], "trunk.1.2.weight": [512, 128, 6, 6]},
    )  # fmt: skip
    for name, state, border in (("a", torch7, "symmetric"), ("b", port, "reflect")):
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / f"{name}.pth")
        system = mw.load(tmp_path / f"{name}.pth")
        assert system.name == "deepmask"
        wanted = {"window": 96, "mask_side": 28, "label_side": 56, "neck_width": 16, "border": border,
                  "feature_width": 64, "score_width": 128}  # fmt: skip
        assert {k: system.options[k] for k in wanted} == wanted
        assert system.options["backbone"]["width"] == 8


def test_norms_of_torch_7_have_several_shapes_and_optional_biases(tmp_path):
    state = filled("deepmask-r50", 8, **{"trunk.12.weight": [512, 1600]})
    images = torch.randn(1, 3, 192, 192)
    torch.save(state, tmp_path / "plain.pth")
    other = {k: v.view(1, -1, 1, 1) if k.endswith((".a", ".b")) else v for k, v in state.items()}
    norm, conv = "trunk.5.1.1.1.2", "trunk.5.1.1.1.1"
    bias = torch.randn(len(state[f"{norm}.a"]))
    other[f"{conv}.bias"] = bias
    other[f"{norm}.b"] = (state[f"{norm}.b"] - state[f"{norm}.a"] * bias).view(1, -1, 1, 1)
    torch.save(other, tmp_path / "other.pth")
    with torch.no_grad():
        a, b = (mw.load(tmp_path / f"{n}.pth").patches(images)[1] for n in ("plain", "other"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_presets_are_the_published_networks():
    system = describe("deepmask-r50")
    norms = sum(b.numel() for n, b in system.named_buffers() if n.endswith(("norm.weight", "norm.bias")))
    assert round((sum(p.numel() for p in system.parameters()) + norms) / 1e6, 1) == 17.4
    system = describe("deepmask-vgg")
    assert round(sum(p.numel() for p in system.parameters()) / 1e6) in (75, 76)
    assert system.window == 224
    assert system.assignment.canonical == 128
    assert describe("deepmask").assignment.canonical == 92
    assert describe("instancefcn-vgg16-k5").side * 8 == 168


def test_files_of_earlier_versions_have_layers_after_the_last_level():
    pytest.importorskip("timm", reason="timm is an extra")
    system = build("deepmask", backbone="timm:mobilenetv3_small_050")
    state = system.state_dict()
    body = "window.backbone.body.blocks"
    assert f"dense.{body}.3.0.conv_pw.weight" in state
    assert not [key for key in state if key.startswith(f"dense.{body}.4.")]
    earlier = {key.removeprefix("dense.window."): value for key, value in state.items()}
    earlier["backbone.body.blocks.4.0.bn1.weight"] = torch.ones(1)
    adapted = renamed(earlier, system)
    assert set(adapted) == set(state)
    assert "dense.window.backbone.nothing.weight" in renamed({"backbone.nothing.weight": torch.ones(1)}, system)
