"""What is Mask Frozen-DETR's own: what stays still, what is remembered, and what it stands on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import maskwright as mw
from maskwright.data import Scenes
from maskwright.errors import UsageError
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import System, create
from tests.systems.tiny import TINY, build, objects

SMALL = (64, 96)
OPTIONS = {
    "a query looks at everything": {"query_parts": ("objects", "box", "feed_forward")},
    "no score, boxes as in old code": {"scoring": False, "aligned": False},
    "the detector learns too": {"joint": True},
    "on DETR": {"detector": "detr", "detector_options": TINY["detr"]},
}
LIGHT = {k: v for k, v in TINY["mask-frozen-detr"].items() if k != "detector_options"}


def random_images(count: int = 2, size: tuple[int, int] = SMALL) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_trains_and_finds(options):
    system = build("mask-frozen-detr", **options).train()
    terms = system.losses(system(random_images()), [objects(n, size=SMALL) for n in (3, 0)])
    sum(terms.values(), torch.zeros(())).backward()
    assert ("score" in terms) == options.get("scoring", True)
    assert any(name.startswith("detector_") for name in terms) == options.get("joint", False)
    assert not [n for n, p in system.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        found = system.eval().decode(system(random_images()), [Placement.identity(SMALL)] * 2)
    # 12 queries; of H-DETR each may be of both classes.
    count = 12 if options.get("detector") == "detr" else 24
    assert all(len(own) == count and own.masks is not None for own in found)


def test_what_is_frozen_stays_still_whatever_train_says():
    system = build(
        "mask-frozen-detr", detector_options={**TINY["mask-frozen-detr"]["detector_options"], "dropout": 0.5}
    )
    assert not any(module.training for module in system.train().detector.modules())
    assert system.box_network.training
    assert system.detector.training is False
    assert not any(p.requires_grad for p in system.detector.parameters())
    before = {k: v.clone() for k, v in system.detector.state_dict().items()}
    learning = [p for p in system.parameters() if p.requires_grad]
    step = torch.optim.SGD(learning, lr=0.1)
    raw = system(random_images())
    assert not raw.boxes.requires_grad
    sum(system.losses(raw, [objects(2, size=SMALL)] * 2).values(), torch.zeros(())).backward()
    step.step()
    assert all(p.grad is None for p in system.detector.parameters())
    assert all(torch.equal(v, before[k]) for k, v in system.detector.state_dict().items())
    assert build("mask-frozen-detr", joint=True).train().detector.training


@pytest.mark.parametrize("options", [{}, OPTIONS["on DETR"]], ids=["H-DETR", "DETR"])
def test_what_the_cache_holds_is_what_the_detector_says(options):
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


def test_the_cache_knows_a_image_whatever_it_is_padded_to():
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
    # Shares are of the image, not of the canvas.
    assert bool((first.boxes[1, :, 1::2].mean(1) < 40).all())


def test_a_full_cache_keeps_what_it_has_and_a_copy_begins_empty():
    system = build("mask-frozen-detr", cache=100).train()
    system(random_images(1))
    system.cache.budget = system.cache.used
    system(random_images(2))
    system(random_images(2))
    assert (system.cache.hits, system.cache.misses, len(system.cache.entries)) == (2, 3, 1)
    assert not copy.deepcopy(system).cache.entries
    system.load_state_dict(system.state_dict())
    assert not system.cache.entries
    system.cache.put(b"", system._ask(random_images(1), torch.tensor([SMALL]))[1])
    assert system.cache.used <= system.cache.budget


@pytest.mark.parametrize("way", ["the detector", "its trunk", "in place", "moved"])
def test_what_another_detector_said_is_forgotten(way: str):
    system, other = build("mask-frozen-detr", cache=100).train(), build("mask-frozen-detr").train()
    with torch.no_grad():
        for parameter in other.detector.parameters():
            parameter.mul_(1.1)
    system(random_images(1))
    if way == "the detector":
        system.detector.load_state_dict(other.detector.state_dict())
    elif way == "its trunk":
        system.detector.backbone.load_state_dict(other.detector.backbone.state_dict())
    elif way == "in place":
        with torch.no_grad():
            system.detector.project[0].conv.weight.mul_(2)
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


def test_a_random_detector_is_told_when_it_stays_as_it_is():
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
def test_images_of_other_bytes_or_shapes_are_others():
    key = build("mask-frozen-detr", cache=1).cache.key
    image = torch.arange(24.0).view(1, 4, 6)
    assert key(image) == key(image.clone())
    assert len({key(image), key(image.view(1, 6, 4)), key(image + 1e-6), key(image.flip(2))}) == 4


def test_it_learns_on_top_of_a_detectors_file(tmp_path):
    detector = build("h-detr", classes=("disc", "box"), short=64, long=96)
    mw.save(detector, tmp_path / "detector.safetensors")
    data = Scenes(4, size=SMALL, classes=("disc", "box"), seed=0)
    best = mw.train(
        "mask-frozen-detr", data, val=False, out=tmp_path / "run", weights=tmp_path / "detector.safetensors", steps=3,
        batch=2, workers=0, tensorboard=False, options={**LIGHT, "cache": 50},
    )  # fmt: skip
    system = mw.load(best)
    assert (system.name, system.options["detector"], system.classes) == ("mask-frozen-detr", "h-detr", ("disc", "box"))
    assert system.options["detector_options"]["short"] == 64
    assert system.preprocess == detector.preprocess
    own = detector.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in system.detector.state_dict().items())
    # Its own file goes on where it was, with other classes in the data or not.
    again = mw.train(
        "mask-frozen-detr", Scenes(4, size=SMALL, classes=("disc", "star"), seed=1), val=False, out=tmp_path / "more",
        weights=best, steps=1, batch=2, workers=0, tensorboard=False,
    )  # fmt: skip
    assert mw.load(again).classes == ("disc", "box")


@pytest.mark.parametrize(
    ("weights", "system", "options", "words"),
    [
        ("mask-rcnn", "mask-frozen-detr", {}, r"holds? a mask-rcnn; mask-frozen-detr stands on a detector of queries"),
        ("h-detr", "solov2", {}, r"holds a h-detr, not a solov2"),
        ("h-detr", "mask-frozen-detr", {"detector": "detr"}, r"detector is what the detector's file says it is \(h-de"),
    ],
)
def test_weights_that_it_cannot_stand_on_are_refused_in_words(weights, system, options, words, tmp_path):
    mw.save(build(weights), tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=words):
        mw.train(
            system, Scenes(2, size=SMALL), val=False,
            out=tmp_path / "run", weights=tmp_path / "weights.safetensors", options=options,
        )  # fmt: skip


@pytest.mark.fast
def test_other_systems_adopt_nothing():
    with pytest.raises(UsageError, match="the weights hold a h-detr, not a solov2"):
        type(build("solov2")).adopt(build("h-detr"))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"detector": "mask-rcnn", "detector_options": {}}, "gives no boxes with queries; expected .*h-detr"),
        ({"detector_options": {"in_channels": 4}}, "detector_options holds in_channels; give it to the system itself"),
        ({"detector_options": {"depth": 50}}, "h-detr: .*'depth'"),
        ({"query_parts": ("boxes",)}, "query_parts holds 'boxes'; expected some of objects, box, feed_forward"),
        ({"heads": 5}, "width is 32; expected a multiple of 4 and of the 5 heads"),
        ({"heads": 0}, "mask-frozen-detr: heads is 0; expected at least 1"),
        ({"weights": (1.0, 1.0)}, "weights is .*; expected 3 numbers, none below 0: of mask, dice, score"),
        ({"cost": ()}, r"mask-frozen-detr: cost is \[\]; expected 3 numbers"),
    ],
)
def test_wrong_options_are_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        build("mask-frozen-detr", **options)


@pytest.mark.fast
def test_targets_without_masks_are_refused():
    system = build("mask-frozen-detr")
    target = Instances(SMALL, torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]))
    with pytest.raises(UsageError, match="targets have boxes but no masks"):
        system.losses(system(random_images(1)), [target])


@pytest.mark.fast
def test_quality_is_the_overlap_with_the_whole_object():
    system = build("mask-frozen-detr")
    planes = torch.zeros(1, 64, 96, dtype=torch.bool)
    planes[0, 16:48, 16:80] = True  # 32 x 64
    boxes = torch.tensor([[16.0, 16, 48, 48], [16, 16, 80, 48]])  # half of it, and all
    logits = torch.ones(2, 16, 16)
    overlaps = system._overlaps(logits, boxes, Masks.from_dense(planes), torch.tensor([0, 0]))
    torch.testing.assert_close(overlaps, torch.tensor([0.5, 1.0]))


def test_masks_lie_in_their_boxes_on_a_mirrored_image_too():
    system = build("mask-frozen-detr").eval()
    with torch.no_grad():
        raw = system(random_images(1))
        place = Placement.resize((128, 192), SMALL)
        plain, mirrored = (system.decode(raw, [p])[0] for p in (place, place.then_mirror()))
    a, b = plain.masks.dense(), mirrored.masks.dense().flip(2)
    assert bool((a != b).float().mean() < 1e-3)
    x0, y0, x1, y1 = plain.boxes.unbind(1)
    torch.testing.assert_close(mirrored.boxes, torch.stack([192 - x1, y0, 192 - x0, y1], 1), rtol=1e-4, atol=1e-2)


def test_a_detector_with_pretrained_weights_fetches_them_once_alone(monkeypatch, tmp_path):
    options = {**TINY["mask-frozen-detr"]["detector_options"]}
    system = build("mask-frozen-detr", detector_options=options)
    system.options["detector_options"]["pretrained"] = True
    mw.save(system, tmp_path / "own.safetensors")
    asked: list[bool] = []
    from maskwright.systems import h_detr

    inner = h_detr.make_trunk
    monkeypatch.setattr(h_detr, "make_trunk", lambda *a, **k: (asked.append(k["pretrained"]), inner(*a, **k))[1])
    again: System = mw.load(tmp_path / "own.safetensors")
    assert asked == [False]
    assert again.options["detector_options"]["pretrained"] is True


def test_all_may_begin_with_random_weights():
    system = create("mask-frozen-detr-small", classes=("a",))
    assert system.options["joint"]
    assert all(p.requires_grad for p in system.parameters())
