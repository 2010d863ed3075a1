"""PolarMask and FourierNet: the shared head, the two codes, and the options that the papers compare."""

from __future__ import annotations

import json
from pathlib import Path

import jaxtyping
import pytest
import torch

import maskwright
from maskwright.blocks import fcos
from maskwright.checkpoints.origins.polarmask import _fouriernet, _polarmask
from maskwright.errors import UsageError
from maskwright.options import resolve
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import presets, system_class
from maskwright.systems.families.polar import PolarRules
from maskwright.systems.fouriernet import FourierCode
from maskwright.systems.polarmask import RayCode, box_loss, polar_centerness, polar_iou_loss, polar_targets
from tests.parity.weights import write_checkpoint
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
OPTIONS = {
    "18 rays": ("polarmask", {"rays": 18}),
    "no branch for boxes": ("polarmask", {"head": {"boxes": False}}),
    "sampling around boxes": ("polarmask", {"rules": {"sampling": "box"}}),
    "cartesian centerness": ("polarmask", {"rules": {"centerness": "cartesian"}}),
    "pixels of the border": ("polarmask", {"rules": {"border": "pixels"}}),
    "smooth L1": ("polarmask", {"rules": {"mask_loss": "smooth_l1"}}),
    "deformable": (
        "polarmask",
        {"backbone": {"name": "resnet50", "deform_stages": (2, 3)}, "head": {"deformable": True}},
    ),
    "Darknet": ("polarmask", {"backbone": {"name": "darknet53", "width": 4}}),
    "normalised centerness": ("fouriernet", {"rules": {"centerness": "normalised"}}),
    "coefficients as targets": ("fouriernet", {"rules": {"mask_loss": "code"}}),
    "few coefficients": ("fouriernet", {"coefficients": 4, "rays": 90}),
    "boxes of contours": ("fouriernet", {"head": {"boxes": False}}),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("polarmask", {}), ("fouriernet", {}), ("ese-seg", {"detector": "fcos", "backbone": "resnet18"})],
    ids=lambda value: str(value),
)
def test_contours_start_as_circles_of_about_two_strides(name, options):
    torch.manual_seed(0)
    system = build(name, **options)
    codes = system(torch.randn(1, 3, *SIZE)).codes[0]
    rays = system.code.decode(codes.movedim(1, -1).flatten(0, 2))
    assert rays.median().item() == pytest.approx(16, rel=0.3)
    assert (rays > 4).float().mean() > 0.98


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_decodes(name, options):
    system = build(name, **options)
    images = torch.randn(2, 3, *SIZE)
    for targets in ([objects(3), objects(1)], [objects(0), objects(0)]):
        terms = system.losses(system(images), targets)
        sum(terms.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(v) for v in terms.values()), terms
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    system.eval()
    with torch.no_grad():
        found = system.decode(system(images), [Placement.identity(SIZE)] * 2, score_threshold=0.0, detections=5)
    assert all(len(own.masks) == len(own) == 5 for own in found)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("polarmask", {"rays": 50}, "rays must be a divisor of 360 and at least 3, got 50"),
        ("polarmask", {"rules": {"sampling": "median"}}, "rules.sampling must be one of 'mass', 'box', got 'median'"),
        ("polarmask", {"head": {"width": 0}}, "head.width must be at least 1, got 0"),
        ("polarmask", {"resize": {"multiple": 16}}, "resize.multiple must be a multiple of 32, got 16"),
        ("polarmask", {"normalization": "lab"}, "normalization must be one of 'caffe', 'imagenet', got 'lab'"),
        ("polarmask", {"backbone": {"name": "darknet-tiny", "width": 2}}, "levels of strides 8, 16, 32 is needed"),
        ("fouriernet", {"coefficients": 61, "rays": 60}, "coefficients must be between 1 and the number of rays, 60"),
    ],
)
def test_invalid_options_are_errors(name, options, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which otherwise checks the groups first
    with pytest.raises(UsageError, match=words):
        build(name, **options)


@pytest.mark.fast
def test_options_of_earlier_versions_are_converted():
    old = {"rays": 36, "backbone": "resnet18", "stem_width": 16, "norm": "frozen", "frozen": 2, "neck_width": 32,
           "box_branch": False, "border": "pixels", "colours": "imagenet", "short": 800, "long": 1333, "multiple": 64,
           "canvas": [96, 128]}  # fmt: skip
    new = system_class("polarmask").upgraded(old)
    assert new["backbone"] == {"name": "resnet18", "width": 16, "norm": "frozen", "frozen": 2}
    assert new["head"] == {"width": 32, "boxes": False}
    assert new["resize"] == {"multiple": 64, "canvas": [96, 128]}
    assert (new["rules"], new["normalization"]) == ({"border": "pixels"}, "imagenet")
    assert system_class("fouriernet").upgraded({"offset": 0.3, "coefficients": 8}) == {
        "rules": {"offset": 0.3}, "coefficients": 8,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["polarmask", "fouriernet", "embedmask", "ese-seg"])
def test_the_output_for_a_small_image_does_not_depend_on_the_batch(name):
    narrow = {
        "embedmask": {"neck_width": 32},
        "ese-seg": {"detector": "fcos", "head": {"width": 32, "convs": 1}},
    }.get(name, {"head": {"width": 32}})
    system = build(name, **narrow).eval()
    images = torch.randn(2, 3, 64, 96)  # one cell at stride 128
    with torch.no_grad():
        alone, together = system(images[:1]), system(images)
    torch.testing.assert_close(alone.centerness[-1], together.centerness[-1][:1])
    assert alone.centerness[-1].shape[2:] == (1, 1)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["polarmask", "ese-seg"])
def test_a_score_threshold_above_the_published_one_applies_to_the_score(name):
    system = build(
        name, **({"detector": "fcos", "head": {"width": 16, "convs": 0}} if name == "ese-seg" else {})
    ).eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        raw.classes[0].fill_(1.0)  # a probability of 0.73
        raw.centerness[0].uniform_(-6, 6)
        scores = [
            system.decode(raw, [Placement.identity(SIZE)], score_threshold=t, nms_threshold=1.0, detections=1000)[
                0
            ].scores
            for t in (0.05, 0.6)
        ]
    assert scores[0].min() < 0.5
    assert scores[1].min() >= 0.6


def test_a_mirrored_placement_gives_mirrored_objects():
    system = build("polarmask").eval()
    straight = Placement.resize((100, 140), SIZE)
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        plain = system.decode(raw, [straight], score_threshold=0.0, detections=20)[0]
        mirrored = system.decode(raw, [straight.then_mirror()], score_threshold=0.0, detections=20)[0]
    boxes = plain.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1.0]) + torch.tensor([140, 0, 140, 0.0])
    torch.testing.assert_close(mirrored.boxes, boxes, atol=1e-3, rtol=0)
    # Points are truncated towards the left, so that borders may differ by a pixel.
    areas = plain.masks.areas()
    differing = (mirrored.masks.dense() != plain.masks.dense().flip(-1)).sum((1, 2))
    assert (differing <= 0.5 * areas + 8).all()


# ---- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_decoding_inverts_encoding():
    rays = 20 + 8 * torch.sin(torch.arange(60) / 60 * 2 * torch.pi) + torch.zeros(3, 1)
    assert torch.allclose(RayCode(60).decode(RayCode(60).encode(rays)), rays, atol=1e-4)
    for keep, error in ((36, 1e-3), (6, 0.05)):
        code = FourierCode(keep, 60)
        assert (code.decode(code.encode(rays)) - rays).abs().amax() < error


@pytest.mark.fast
def test_fourier_bins_beyond_the_half_spectrum_have_no_effect():
    code = FourierCode(36, 60)
    values = torch.randn(2, 72, dtype=torch.float32).mul(0.1).requires_grad_()
    code.decode(values).sum().backward()
    gradient = values.grad.unflatten(1, (36, 2))
    assert (gradient[:, 31:] == 0).all()
    assert (gradient[:, [0, 30], 1] == 0).all()
    assert (gradient[:, 1:30].abs() > 0).all()
    # log r[n] = (Re X0 + 2 sum Re(X_k e^(2 pi i k n / N)) + (-1)^n Re X_(N/2)) / sqrt(N)
    x = torch.view_as_complex(values.detach().unflatten(1, (36, 2)).contiguous())[:, :31]
    n, k = torch.arange(60), torch.arange(31)
    weight = torch.where((k == 0) | (k == 30), 1.0, 2.0)
    wave = torch.polar(torch.ones(31, 60), 2 * torch.pi * k[:, None] * n / 60)
    logs = ((x * weight)[:, :, None] * wave).real.sum(1) / 60**0.5
    torch.testing.assert_close(code.decode(values).detach(), logs.exp(), rtol=1e-5, atol=1e-6)


def test_fewer_coefficients_can_be_used_than_are_predicted():
    system = build("fouriernet").eval()
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        raw.codes[0].mul_(50)
        shapes = [
            system.decode(raw, [Placement.identity(SIZE)], score_threshold=0.0, detections=10, visible=k)[0]
            for k in (1, 18, None)
        ]
    assert torch.equal(shapes[1].masks.dense(), shapes[2].masks.dense())
    assert torch.equal(shapes[0].boxes, shapes[2].boxes)
    assert not torch.equal(shapes[0].masks.dense(), shapes[2].masks.dense())
    with pytest.raises(UsageError, match="visible must be between 1 and 18, the number of coefficients, got 19"):
        system.decode(raw, [Placement.identity(SIZE)], visible=19)


# ---- targets and losses ---------------------------------------------------------------------------------------------


def points(size: tuple[int, int] = (128, 128)) -> list[torch.Tensor]:
    return fcos.locations([torch.zeros(1, 1, -(-size[0] // s), -(-size[1] // s)) for s in fcos.STRIDES])


def annotated(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (128, 128)) -> Instances:
    corners = torch.tensor(boxes)
    crops = [torch.ones(y1 - y0, x1 - x0, dtype=torch.bool) for x0, y0, x1, y1 in boxes]
    masks = Masks.from_crops(crops, corners[:, :2], size)
    return Instances(size, corners.float(), torch.arange(len(boxes)), masks)


@pytest.mark.fast
def test_locations_around_the_centre_of_mass_are_positive_and_rays_start_at_them():
    found = polar_targets(points(), annotated((20, 30, 61, 71)), 36, PolarRules())
    where = torch.cat(points())[found.positive]
    # Strictly within 12 pixels of (40, 50), on the finest level only.
    expected = {(x, y) for x in (36, 44) for y in (44, 52, 60)}
    assert {tuple(p) for p in where.long().tolist()} == expected
    rows = {tuple(p): k for k, p in enumerate(where.long().tolist())}
    rays = found.rays[rows[(36, 44)]]
    down, right, up, left = rays[[0, 9, 18, 27]].tolist()
    assert (down, right, up, left) == (26, 24, 14, 16)  # to the pixels of the border, the last of which are 60 and 70
    assert torch.equal(found.centerness, polar_centerness(found.rays))
    assert (found.labels[found.positive] == 0).all()
    assert found.inner[found.positive[rows[(36, 44)]]].tolist() == [16, 14, 24, 26]


@pytest.mark.fast
def test_the_smaller_of_two_objects_is_assigned_and_empty_masks_never():
    both = annotated((20, 20, 61, 61), (30, 30, 51, 51))
    found = polar_targets(points(), both, 36, PolarRules())
    labels = found.labels[found.positive]
    assert (labels == 1).all()
    both.masks = Masks.join([both.masks[0], Masks.from_dense(torch.zeros(1, 128, 128, dtype=torch.bool))])
    found = polar_targets(points(), both, 36, PolarRules())
    assert len(found.positive)
    assert (found.labels[found.positive] == 0).all()


@pytest.mark.fast
def test_losses_of_exact_predictions_are_zero_and_others_logarithms_of_ratios():
    rays = torch.full((2, 36), 10.0)
    assert polar_iou_loss(rays, rays).tolist() == [0, 0]
    torch.testing.assert_close(polar_iou_loss(2 * rays, rays), torch.full((2,), 2.0).log())
    inner = torch.tensor([[4.0, 4, 5, 5]])
    assert box_loss(inner, inner).item() == 0
    torch.testing.assert_close(box_loss(torch.tensor([[4.0, 4, 5, 15]]), inner), torch.tensor([2.0]).log())


# ---- official files -------------------------------------------------------------------------------------------------


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((LAYOUTS / f"{name}.json").read_text())["tensors"]
    return {k: tuple(shape) for k, (shape, _) in tensors.items()}


@pytest.mark.fast
def test_the_two_layouts_are_distinguished_by_channels_or_by_the_configuration_in_the_file():
    polar, fourier = shapes("polarmask-r50"), shapes("fouriernet-r50")
    assert _polarmask(polar, {})["rays"] == 36
    assert _fouriernet(polar, {}) is None
    assert _fouriernet(fourier, {})["coefficients"] == 36
    assert _fouriernet(fourier, {})["rays"] == 60
    assert _polarmask(fourier, {}) is None
    about = {"container": {"meta": {"config": "contour_points = 90\nmodel = dict(type='FourierNet',\n"}}}
    few = _fouriernet(polar, about)
    assert (few["coefficients"], few["rays"]) == (18, 90)
    assert _polarmask(polar, about) is None
    about = {"container": {"meta": {"config": "type='PolarMask', size_divisor=128, test=dict(img_scale=(1333, 800))"}}}
    wide = _polarmask(fourier, about)
    assert (wide["rays"], wide["resize"]) == (72, {"canvas": [800, 1333], "multiple": 128})


@pytest.mark.fast
def test_deformable_files_are_recognised_with_their_towers():
    plain = shapes("polarmask-r50")
    deformed = {k: v for k, v in plain.items() if "_convs.0.conv" not in k or k.startswith("neck")}
    deformed = {k: v for k, v in deformed.items() if not k.startswith("bbox_head.") or "_convs" not in k}
    for tower in ("cls", "reg", "mask"):
        for k in range(4):
            base = f"bbox_head.{tower}_convs."
            deformed |= {f"{base}{3 * k}.weight": (256, 256, 3, 3), f"{base}{3 * k}.bias": (256,)}
            deformed |= {f"{base}{3 * k}.conv_offset_mask.weight": (27, 256, 3, 3)}
            deformed |= {f"{base}{3 * k}.conv_offset_mask.bias": (27,)}
            deformed |= {f"{base}{3 * k + 1}.weight": (256,), f"{base}{3 * k + 1}.bias": (256,)}
    for layer, count in ((2, 4), (3, 6), (4, 3)):
        for k in range(count):
            deformed |= {f"backbone.layer{layer}.{k}.conv2_offset.weight": (18, 64 * 2 ** (layer - 1), 3, 3)}
            deformed |= {f"backbone.layer{layer}.{k}.conv2_offset.bias": (18,)}
    options = _polarmask(deformed, {})
    assert options["head"] == {"width": 256, "convs": 4, "deformable": True, "boxes": True}
    assert options["backbone"]["deform_stages"] == [1, 2, 3]


def test_options_recognised_from_official_files_are_those_of_the_presets(tmp_path):
    for name in ("polarmask-r50", "fouriernet-r50"):
        kind = system_class(presets()[name])
        read = _polarmask if name.startswith("polar") else _fouriernet
        recognised, preset = (
            resolve(kind.__init__, options, name)
            for options in (read(shapes(name), {}), {"in_channels": 3, **kind.presets[name].options})
        )
        assert {**recognised, "classes": []} == {**preset, "classes": []}
    path = write_checkpoint(LAYOUTS / "polarmask-r50.json", tmp_path)
    system = maskwright.load(path, variant="polarmask-r50-2x")
    assert system.preprocess.canvas == (800, 1333)
    assert system.preprocess.multiple == 128
    assert maskwright.load(path).preprocess.size(500, 300) == (768, 1280)
