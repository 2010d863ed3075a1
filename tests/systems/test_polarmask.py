"""What is PolarMask's own, and FourierNet's: the shared head, the two codes, and the options their papers ablate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import maskwright
from maskwright.blocks import fcos
from maskwright.blocks.polar import PolarRules, box_loss, polar_centerness, polar_iou_loss, polar_targets
from maskwright.checkpoints.origins.polarmask import _fouriernet, _polarmask
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import presets, system_class
from maskwright.systems.fouriernet import FourierCode
from maskwright.systems.polarmask import RayCode
from tests.parity.weights import write_checkpoint
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
OPTIONS = {
    "18 rays": ("polarmask", {"rays": 18}),
    "no box branch": ("polarmask", {"box_branch": False}),
    "sampling around boxes": ("polarmask", {"sampling": "box"}),
    "cartesian centerness": ("polarmask", {"centerness": "cartesian"}),
    "border's pixels": ("polarmask", {"border": "pixels"}),
    "smooth L1": ("polarmask", {"mask_loss": "smooth_l1"}),
    "deformable": ("polarmask", {"backbone": "resnet50", "deform_stages": (2, 3), "head_deform": True}),
    "normalised centerness": ("fouriernet", {"centerness": "normalised"}),
    "coefficients asked for": ("fouriernet", {"mask_loss": "code"}),
    "few coefficients": ("fouriernet", {"coefficients": 4, "rays": 90}),
    "contour's box": ("fouriernet", {"box_branch": False}),
}


@pytest.mark.parametrize(("name", "options"), OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_finds(name, options):
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
        ("polarmask", {"rays": 40}, None),
        ("polarmask", {"rays": 50}, "rays is 50; it must be a divisor of 360"),
        ("polarmask", {"sampling": "median"}, "sampling is 'median'; expected mass, box"),
        ("polarmask", {"multiple": 16}, "multiple is 16"),
        ("polarmask", {"multiple": 0}, "multiple is 0; the pyramid needs a multiple of 32, at least 32"),
        ("fouriernet", {"multiple": -32}, "multiple is -32"),
        ("polarmask", {"canvas": (0, 64)}, "canvas is .*both at least 1"),
        ("polarmask", {"canvas": (3,)}, "expected a height and a width"),
        ("polarmask", {"colours": "lab"}, "colours is 'lab'; expected caffe or imagenet"),
        ("fouriernet", {"coefficients": 61, "rays": 60}, "coefficients is 61; 60 rays have 1 to 60"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words(name, options, words):
    if words is None:
        assert build(name, **options).code.rays == 40
    else:
        with pytest.raises(UsageError, match=words):
            build(name, **options)


@pytest.mark.parametrize("name", ["polarmask", "fouriernet", "embedmask", "ese-seg"])
def test_towers_of_32_channels_see_a_small_image_alone(name):
    system = build(name, neck_width=32, **({"detector": "fcos", "head_convs": 1} if name == "ese-seg" else {})).eval()
    images = torch.randn(2, 3, 64, 96)  # one cell at stride 128
    with torch.no_grad():
        alone, together = system(images[:1]), system(images)
    torch.testing.assert_close(alone.centerness[-1], together.centerness[-1][:1])
    assert alone.centerness[-1].shape[2:] == (1, 1)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["polarmask", "fouriernet"])
def test_a_target_without_masks_is_refused_in_words(name):
    system, target = build(name), objects(2)
    target.masks = None
    with pytest.raises(UsageError, match="boxes but no masks"):
        system.losses(system(torch.randn(1, 3, *SIZE)), [target])


def test_a_mirrored_placement_gives_mirrored_objects():
    system = build("polarmask").eval()
    straight = Placement.resize((100, 140), SIZE)
    with torch.no_grad():
        raw = system(torch.randn(1, 3, *SIZE))
        plain = system.decode(raw, [straight], score_threshold=0.0, detections=20)[0]
        mirrored = system.decode(raw, [straight.then_mirror()], score_threshold=0.0, detections=20)[0]
    boxes = plain.boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1.0]) + torch.tensor([140, 0, 140, 0.0])
    torch.testing.assert_close(mirrored.boxes, boxes, atol=1e-3, rtol=0)
    # Points are cut to whole pixels towards the left, so that borders may lie a pixel apart.
    areas = plain.masks.areas()
    differing = (mirrored.masks.dense() != plain.masks.dense().flip(-1)).sum((1, 2))
    assert (differing <= 0.5 * areas + 8).all()


# ---- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_codes_give_the_rays_back():
    rays = 20 + 8 * torch.sin(torch.arange(60) / 60 * 2 * torch.pi) + torch.zeros(3, 1)
    assert torch.allclose(RayCode(60).decode(RayCode(60).encode(rays)), rays, atol=1e-4)
    for keep, error in ((36, 1e-3), (6, 0.05)):
        code = FourierCode(keep, 60)
        assert (code.decode(code.encode(rays)) - rays).abs().amax() < error


@pytest.mark.fast
def test_fourier_bins_beyond_the_half_spectrum_are_dead():
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


def test_fewer_coefficients_may_be_read_than_were_learnt():
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
    with pytest.raises(UsageError, match="visible is 19; this network gives 18"):
        system.decode(raw, [Placement.identity(SIZE)], visible=19)


# ---- targets and losses ---------------------------------------------------------------------------------------------


def places(size: tuple[int, int] = (128, 128)) -> list[torch.Tensor]:
    return fcos.locations([torch.zeros(1, 1, -(-size[0] // s), -(-size[1] // s)) for s in fcos.STRIDES])


def annotated(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (128, 128)) -> Instances:
    corners = torch.tensor(boxes)
    crops = [torch.ones(y1 - y0, x1 - x0, dtype=torch.bool) for x0, y0, x1, y1 in boxes]
    masks = Masks.from_crops(crops, corners[:, :2], size)
    return Instances(size, corners.float(), torch.arange(len(boxes)), masks)


@pytest.mark.fast
def test_places_around_the_mass_centre_answer_with_rays_from_where_they_are():
    found = polar_targets(places(), annotated((20, 30, 61, 71)), 36, PolarRules())
    where = torch.cat(places())[found.positive]
    # Strictly within 12 pixels of (40, 50), on the finest level alone.
    expected = {(x, y) for x in (36, 44) for y in (44, 52, 60)}
    assert {tuple(p) for p in where.long().tolist()} == expected
    rows = {tuple(p): k for k, p in enumerate(where.long().tolist())}
    rays = found.rays[rows[(36, 44)]]
    down, right, up, left = rays[[0, 9, 18, 27]].tolist()
    assert (down, right, up, left) == (26, 24, 14, 16)  # to the border's pixels, the last of which are 60 and 70
    assert torch.equal(found.centerness, polar_centerness(found.rays))
    assert (found.labels[found.positive] == 0).all()
    assert found.inner[found.positive[rows[(36, 44)]]].tolist() == [16, 14, 24, 26]


@pytest.mark.fast
def test_the_smaller_of_two_objects_wins_and_empty_masks_are_nobodys():
    both = annotated((20, 20, 61, 61), (30, 30, 51, 51))
    found = polar_targets(places(), both, 36, PolarRules())
    labels = found.labels[found.positive]
    assert (labels == 1).all()
    both.masks = Masks.join([both.masks[0], Masks.from_dense(torch.zeros(1, 128, 128, dtype=torch.bool))])
    found = polar_targets(places(), both, 36, PolarRules())
    assert len(found.positive)
    assert (found.labels[found.positive] == 0).all()


@pytest.mark.fast
def test_losses_vanish_where_all_is_right_and_count_ratios():
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
def test_the_two_are_told_apart_by_channels_or_by_the_configuration_in_the_file():
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
    assert (wide["rays"], wide["canvas"], wide["multiple"]) == (72, [800, 1333], 128)


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
    assert options["head_deform"]
    assert options["head_convs"] == 4
    assert options["deform_stages"] == [1, 2, 3]


def test_presets_are_what_their_files_are_recognised_as(tmp_path):
    for name in ("polarmask-r50", "fouriernet-r50"):
        read = _polarmask if name.startswith("polar") else _fouriernet
        found = read(shapes(name), {})
        for key, value in system_class(presets()[name]).presets[name].options.items():
            assert list(found[key]) == list(value) if isinstance(value, tuple) else found[key] == value, key
    path = write_checkpoint(LAYOUTS / "polarmask-r50.json", tmp_path)
    system = maskwright.load(path, variant="polarmask-r50-2x")
    assert system.preprocess.canvas == (800, 1333)
    assert system.preprocess.multiple == 128
    assert maskwright.load(path).preprocess.size(500, 300) == (768, 1280)
