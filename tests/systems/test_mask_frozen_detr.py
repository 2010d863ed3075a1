"""Mask Frozen-DETR: the frozen detector, the feature cache, and weights of detectors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import maskwright as mw
from maskwright.blocks.backbones import Backbone
from maskwright.checkpoints.fitting import renamed
from maskwright.data import Scenes
from maskwright.errors import UsageError
from maskwright.structures import Masks, Placement
from maskwright.systems import System, describe
from maskwright.systems.mask_frozen_detr import FeatureCache, MaskFrozenDETR
from maskwright.training.setup import make_system
from tests.systems.tiny import build as build_any
from tests.systems.tiny import objects, tiny_options

SMALL = (64, 96)
DETR = {name: value for name, value in tiny_options("detr").items() if name != "in_channels"}
OPTIONS = {
    "all query parts": {"query_parts": ("objects", "box", "feed_forward")},
    "no score, boxes not aligned": {"scoring": False, "aligned": False},
    "the detector is trained too": {"joint": True, "image_layers": 0},
    "on DETR, both trained": {"joint": True, "detector": "detr", "detector_options": DETR},
}
ON_DETR = {"detector": "detr", "detector_options": {**DETR, "masks": "none"}}
LIGHT = {
    k: v
    for k, v in tiny_options("mask-frozen-detr").items()
    if k not in ("detector", "detector_options", "joint", "in_channels")
}


def build(name: str, **options: Any) -> System:
    """A tiny system; the detector of Mask Frozen-DETR is frozen unless the options say otherwise."""
    if name == "mask-frozen-detr":
        options = {"joint": False, **options}
    return build_any(name, **options)


def random_images(count: int = 2, size: tuple[int, int] = SMALL) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_predicts(options):
    system = build("mask-frozen-detr", **options).train()
    terms = system.losses(system(random_images()), [objects(n, size=SMALL) for n in (3, 0)])
    sum(terms.values(), torch.zeros(())).backward()
    assert ("score" in terms) == options.get("scoring", True)
    assert any(name.startswith("detector_") for name in terms) == options.get("joint", False)
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    assert (system.outputs, system.needs, system.tasks) == ({"boxes", "masks"}, {"masks"}, {"instances"})
    with torch.no_grad():
        found = system.eval().decode(system(random_images()), [Placement.identity(SMALL)] * 2)
    # 12 queries; a query of H-DETR may give an object of each class.
    count = 12 if options.get("detector") == "detr" else 24
    assert all(len(own) == count and own.masks is not None for own in found)


@pytest.mark.parametrize(
    ("options", "detectors"),
    [({}, ["detector.dense"]), (ON_DETR, ["detector.dense"]), ({**ON_DETR, "detector_options": DETR},
     ["detector.dense", "detector.masks"])],
    ids=["H-DETR", "DETR", "DETR with masks"],
)  # fmt: skip
def test_parameters_are_read_inside_calls_of_one_network_each(options, detectors):
    system = build("mask-frozen-detr", **options).eval()
    networks = system.networks()
    assert list(networks) == [*detectors, "image_encoder", "query_encoder", "masks"]
    assert all(system.get_submodule(name) is network for name, network in networks.items())
    owners = {id(p): name for name, network in networks.items() for p in network.parameters()}
    assert len(owners) == len(list(system.parameters()))
    running: list[str] = []
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        network.register_forward_hook(lambda *_: running.pop() and None)

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for value in args:
                if id(value) in owners:
                    assert running == [owners[id(value)]], (function, running)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Reads():
        raw = system(random_images())
        system.losses(raw, [objects(n, size=SMALL) for n in (3, 0)])
        system.losses(raw, [objects(0, size=SMALL)] * 2)
        system.decode(raw, [Placement.identity(SMALL)] * 2)


def test_a_frozen_detector_never_changes():
    system = build("mask-frozen-detr", detector_options={"transformer": {"dropout": 0.5}})
    assert not any(module.training for module in system.train().detector.modules())
    assert system.masks.training
    assert system.detector.training is False
    assert not any(p.requires_grad for p in system.detector.parameters())
    before = {k: v.clone() for k, v in system.detector.state_dict().items()}
    step = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    raw = system(random_images())
    assert not raw.boxes.requires_grad
    sum(system.losses(raw, [objects(2, size=SMALL)] * 2).values(), torch.zeros(())).backward()
    step.step()
    assert all(p.grad is None for p in system.detector.parameters())
    assert all(torch.equal(v, before[k]) for k, v in system.detector.state_dict().items())
    assert build("mask-frozen-detr", joint=True).train().detector.training


@pytest.mark.parametrize("options", [{}, ON_DETR], ids=["H-DETR", "DETR"])
def test_cached_features_are_those_of_the_detector(options):
    plain, caching = (build("mask-frozen-detr", **options, cache=cache).train() for cache in (0, 100))
    images = random_images()
    expected, first, again = plain(images), caching(images), caching(images.flip(0))
    assert (caching.cache.hits, caching.cache.misses) == (2, 2)
    for name in ("boxes", "scores", "queries", "features"):
        whole = getattr(expected, name)
        torch.testing.assert_close(getattr(first, name), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(again, name).flip(0), whole, rtol=1e-4, atol=1e-5)
    caching.eval()(images)
    assert caching.cache.hits == 2  # only in training


def test_an_image_is_found_in_the_cache_with_any_padding():
    system = build("mask-frozen-detr", cache=100).train()
    wide = torch.zeros(2, 3, 96, 128)
    wide[:, :, :50, :70] = random_images(2, (50, 70))
    wide[1, :, 40:] = 0
    valid = torch.tensor([[50, 70], [40, 70]])
    with torch.no_grad():
        first = system(wide, valid)
        again = system(wide[:1, :, :64, :96].contiguous(), valid[:1])
    assert (system.cache.hits, system.cache.misses) == (1, 2)
    assert first.features.shape[2:] == (24, 32)
    assert again.features.shape[2:] == (16, 24)
    assert torch.equal(first.boxes[:1], again.boxes)
    # Boxes are relative to the image, not to the padded input.
    assert bool((first.boxes[1, :, 1::2].mean(1) < 40).all())


def test_a_full_cache_keeps_its_entries_and_a_copy_is_empty():
    system = build("mask-frozen-detr", cache=100).train()
    system(random_images(1))
    system.cache.budget = system.cache.used
    system(random_images(2))
    system(random_images(2))
    assert (system.cache.hits, system.cache.misses, len(system.cache.entries)) == (2, 3, 1)
    assert not copy.deepcopy(system).cache.entries
    system.load_state_dict(system.state_dict())
    assert not system.cache.entries
    system.cache.put(b"", system._detect(random_images(1), torch.tensor([SMALL]))[1])
    assert system.cache.used <= system.cache.budget


@pytest.mark.parametrize("way", ["the detector", "its backbone", "in place", "moved"])
def test_features_of_other_weights_are_removed_from_the_cache(way: str):
    system, other = build("mask-frozen-detr", cache=100).train(), build("mask-frozen-detr").train()
    with torch.no_grad():
        for parameter in other.detector.parameters():
            parameter.mul_(1.1)
    system(random_images(1))
    if way == "the detector":
        system.detector.load_state_dict(other.detector.state_dict())
    elif way == "its backbone":
        system.detector.dense.backbone.load_state_dict(other.detector.dense.backbone.state_dict())
    elif way == "in place":
        with torch.no_grad():
            system.detector.dense.project[0].conv.weight.mul_(2)
    else:
        system.double()
    kind = next(system.parameters()).dtype
    system(random_images(1).to(kind))
    assert (system.cache.hits, system.cache.misses) == (0, 1)
    with torch.no_grad():
        kept = system(random_images(1).to(kind))
        system.cache = None
        torch.testing.assert_close(kept.features, system(random_images(1).to(kind)).features)
    assert kept.features.dtype == kind


def test_a_system_with_a_cache_is_copied_and_pickled():
    system = build("mask-frozen-detr", cache=100).train()
    system(random_images(1))
    for other in (copy.deepcopy(system), pickle.loads(pickle.dumps(system))):
        assert not other.cache.entries
        assert torch.equal(other(random_images(1)).boxes, system(random_images(1)).boxes)
        assert (other.cache.hits, other.cache.misses) == (0, 1)


def test_a_frozen_random_detector_gives_a_warning():
    with pytest.warns(UserWarning, match=r"mask-frozen-detr: the detector is frozen .* random.*joint=True"):
        build("mask-frozen-detr").on_progress(0.0)
    system = build("mask-frozen-detr")
    system.load_state_dict(system.state_dict())
    for own in (
        system,
        copy.deepcopy(system),
        type(system).adopt(build("h-detr")),
        build("mask-frozen-detr", joint=True),
    ):
        own.on_progress(0.0)  # a warning is an error here


@pytest.mark.fast
def test_images_of_other_values_or_shapes_have_other_keys():
    key = FeatureCache.key
    image = torch.arange(24.0).view(1, 4, 6)
    assert key(image) == key(image.clone())
    assert len({key(image), key(image.view(1, 6, 4)), key(image + 1e-6), key(image.flip(2))}) == 4


def test_it_is_trained_on_top_of_a_detectors_file(tmp_path):
    detector = build("h-detr", classes=("disc", "box"), resize={"short": 64, "long": 96})
    mw.save(detector, tmp_path / "detector.safetensors")
    data = Scenes(4, size=SMALL, classes=("disc", "box"), seed=0)
    best = mw.train(
        "mask-frozen-detr", data, val=False, out=tmp_path / "run", weights=tmp_path / "detector.safetensors", steps=3,
        batch=2, workers=0, tensorboard=False, options={**LIGHT, "cache": 50},
    )  # fmt: skip
    system = mw.load(best)
    assert (system.name, system.options["detector"], system.classes) == ("mask-frozen-detr", "h-detr", ("disc", "box"))
    assert system.options["detector_options"]["resize"]["short"] == 64
    assert system.preprocess == detector.preprocess
    own = detector.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in system.detector.state_dict().items())
    # Training continues from a file of its own, whatever the classes of the data.
    again = mw.train(
        "mask-frozen-detr", Scenes(4, size=SMALL, classes=("disc", "star"), seed=1), val=False, out=tmp_path / "more",
        weights=best, steps=1, batch=2, workers=0, tensorboard=False,
    )  # fmt: skip
    assert mw.load(again).classes == ("disc", "box")


@pytest.mark.parametrize(
    ("weights", "system", "options", "words"),
    [
        (
            "mask-rcnn",
            "mask-frozen-detr",
            {},
            r"mask-rcnn; .* needs a detector of queries \(detr or h-detr\)",
        ),
        ("h-detr", "solov2", {}, r"h-detr, not .*solov2"),
        ("h-detr", "mask-frozen-detr", {"detector": "detr"}, r"detector is determined by the weights .* \(h-detr\)"),
    ],
)
def test_unsuitable_weights_are_refused(weights, system, options, words, tmp_path):
    mw.save(build(weights), tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=words):
        mw.train(
            system, Scenes(2, size=SMALL), val=False,
            out=tmp_path / "run", weights=tmp_path / "weights.safetensors", options=options,
        )  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"detector": "mask-rcnn", "detector_options": {}}, "detector must be detr or h-detr, got 'mask-rcnn'"),
        ({"detector_options": {"in_channels": 4}}, "detector_options must not have in_channels"),
        ({"detector_options": {"depth": 50}}, "h-detr has no option 'depth'"),
        ({"query_parts": ("boxes",)}, "query_parts must be a list of"),
        ({"heads": 5}, r"width must be a multiple of 4 and of heads \(5\), got 32"),
        ({"heads": 0}, "mask-frozen-detr: heads must be at least 1, got 0"),
        ({"side": 3}, "side must be at least 4, got 3"),
        ({"loss": {"important": 1.5}}, r"loss.important must be in \[0, 1\], got 1.5"),
        ({"cost": {"class_weight": -1.0}}, "cost.class_weight must be at least 0, got -1.0"),
        ({"norm": "group"}, "mask-frozen-detr has no option 'norm'; its options are"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words), torch.device("meta"):
        build("mask-frozen-detr", **options)


@pytest.mark.fast
def test_options_of_the_detector_are_merged_unless_it_is_another():
    kind = MaskFrozenDETR
    base = {"detector_options": {"backbone": "resnet18", "transformer": {"width": 128, "levels": 3}}}
    merged = kind.with_options(
        base, {"detector_options": {"backbone": {"norm": "frozen"}, "transformer": {"points": 2}}}
    )
    assert merged["detector_options"] == {
        "backbone": {"name": "resnet18", "norm": "frozen"}, "transformer": {"width": 128, "levels": 3, "points": 2},
    }  # fmt: skip
    assert kind.with_options(base, {"width": 64}) == {**base, "width": 64}
    assert kind.with_options(base, {"detector": "detr"}) == {"detector": "detr"}
    assert kind.with_options({}, {"width": 64}) == {"width": 64}
    other = kind.with_options(base, {"detector": "detr", "detector_options": {"masks": "none"}})
    assert other["detector_options"] == {"masks": "none"}


def test_options_and_parameters_of_earlier_versions_are_converted():
    old = {
        "detector_options": {"backbone": "resnet18", "stem_width": 16, "levels": 3, "short": 64}, "points": 64,
        "important": 0.5, "weights": [1.0, 2.0, 3.0], "cost": [1.0, 2.0, 3.0], "width": 32, "query_parts": ["box"],
    }  # fmt: skip
    new = MaskFrozenDETR.upgraded(old)
    assert new == {
        "cost": {"class_weight": 1.0, "box_weight": 2.0, "giou_weight": 3.0}, "width": 32, "query_parts": ["box"],
        "loss": {"mask_weight": 1.0, "dice_weight": 2.0, "score_weight": 3.0, "points": 64, "important": 0.5},
        "detector_options": {
            "backbone": {"name": "resnet18", "width": 16}, "transformer": {"levels": 3}, "resize": {"short": 64},
        },
    }  # fmt: skip
    with torch.device("meta"):
        system = MaskFrozenDETR(**new)
    keys = system.state_dict().keys()
    state = {
        key.replace("detector.dense.", "detector.").replace("query_encoder.mapper.", "query_mapper.")
        .replace("masks.box_attention.", "box_network.look.").replace("masks.", "box_network."): torch.zeros(0)
        for key in keys
    }  # fmt: skip
    assert {"detector.levels", "box_network.look.norm.weight"} <= state.keys()
    assert renamed(state, system).keys() == keys


def test_quality_is_the_overlap_with_the_whole_object():
    system = build("mask-frozen-detr")
    planes = torch.zeros(1, 64, 96, dtype=torch.bool)
    planes[0, 16:48, 16:80] = True  # 32 x 64
    boxes = torch.tensor([[16.0, 16, 48, 48], [16, 16, 80, 48]])  # half of it, and all
    logits = torch.ones(2, 16, 16)
    overlaps = system._overlaps(logits, boxes, Masks.from_dense(planes), torch.tensor([0, 0]))
    torch.testing.assert_close(overlaps, torch.tensor([0.5, 1.0]))


def test_masks_lie_in_their_boxes_on_mirrored_images_too():
    system = build("mask-frozen-detr").eval()
    with torch.no_grad():
        raw = system(random_images(1))
        place = Placement.resize((128, 192), SMALL)
        plain, mirrored = (system.decode(raw, [p])[0] for p in (place, place.then_mirror()))
    a, b = plain.masks.dense(), mirrored.masks.dense().flip(2)
    assert bool((a != b).float().mean() < 1e-3)
    x0, y0, x1, y1 = plain.boxes.unbind(1)
    torch.testing.assert_close(mirrored.boxes, torch.stack([192 - x1, y0, 192 - x0, y1], 1), rtol=1e-4, atol=1e-2)


def test_pretrained_weights_of_the_detector_are_not_downloaded_again(tmp_path, monkeypatch):
    options = {"backbone": {"name": "timm:resnet18", "pretrained": True}}
    built: list[bool] = []
    inner = Backbone.build

    def spy(self: Backbone, *arguments, **keywords):
        built.append(self.pretrained)
        return inner(replace(self, pretrained=False), *arguments, **keywords)

    monkeypatch.setattr(Backbone, "build", spy)
    system = build("mask-frozen-detr", detector_options=options)
    mw.save(system, tmp_path / "own.safetensors")
    again: System = mw.load(tmp_path / "own.safetensors")
    assert built[0] is True
    assert built[1:]
    assert not any(built[1:])  # loading builds it twice, first without memory for weights
    assert again.options["detector_options"]["backbone"]["pretrained"] is True


def test_everything_can_be_trained_from_random_weights():
    system = describe("mask-frozen-detr-small", classes=("a",))
    assert system.options["joint"]
    assert all(p.requires_grad for p in system.parameters())


@pytest.mark.parametrize("preset", ["mask-frozen-detr-r50", "mask-frozen-detr-swin-large", "mask-frozen-detr-small"])
def test_a_detectors_file_takes_the_place_of_the_presets_detector(tmp_path, preset):
    detector = build("h-detr", classes=("disc", "box"))
    mw.save(detector, tmp_path / "detector.safetensors")
    system = make_system(preset, ("disc", "box"), tmp_path / "detector.safetensors", LIGHT)
    assert system.name == "mask-frozen-detr"
    assert system.options["width"] == LIGHT["width"]
    assert system.options["joint"] == (preset == "mask-frozen-detr-small")
    assert system.options["detector_options"]["backbone"] == detector.options["backbone"]
    assert all(value.equal(system.detector.state_dict()[name]) for name, value in detector.state_dict().items())
    with pytest.raises(UsageError, match="detector_options is determined by the weights of the detector"):
        make_system(
            preset, ("disc", "box"), tmp_path / "detector.safetensors", {"detector_options": {"many_queries": 3}}
        )
