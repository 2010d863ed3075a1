"""Images with as many channels as a system was made for, however many there are in the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import maskwright as mw
from maskwright.data import Scenes
from maskwright.errors import ImageError, UsageError
from maskwright.structures import Preprocess
from maskwright.structures.resize import normalization_for
from maskwright.systems import names
from tests.systems.tiny import build


def image(channels: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, 40, 60), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("channels", [1, 2])
def test_every_system_takes_images_of_fewer_channels(name, channels):
    system = build(name, in_channels=channels)
    assert len(system.preprocess.mean) == len(system.preprocess.std) == channels
    found = system.predict(image(channels))
    assert found.instances.image_size == (40, 60)


@pytest.mark.fast
def test_colour_becomes_grey_as_pillow_has_it():
    rules, rgb = normalization_for(Preprocess(), 1), image(3)
    expected = np.asarray(Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(rules.match_channels(rgb)[0].numpy(), expected)
    grey = image(1)
    assert torch.equal(rules.match_channels(grey.expand(3, -1, -1)), grey), "a grey image in RGB stays what it is"
    assert torch.equal(Preprocess().match_channels(grey), grey.expand(3, -1, -1))
    assert torch.equal(Preprocess().match_channels(image(4)), image(4)[:3]), "alpha is dropped"


@pytest.mark.fast
@pytest.mark.parametrize(("have", "want"), [(2, 3), (3, 2), (3, 4), (1, 5)])
def test_what_nobody_can_know_is_refused(have, want):
    with pytest.raises(UsageError, match=rf"has {have} channels, but the system expects {want} \(in_channels\)"):
        normalization_for(Preprocess(), want).match_channels(image(have))


@pytest.mark.fast
def test_colours_of_few_and_of_many_channels():
    rules = Preprocess(mean=(1.0, 2.0, 6.0), std=(2.0, 3.0, 4.0), channels="BGR")
    grey = normalization_for(rules, 1)
    assert (grey.mean, grey.std, grey.channels) == ((3.0,), (3.0,), "RGB")
    five = normalization_for(rules, 5)
    assert (five.mean, five.std, five.channels) == ((1.0, 2.0, 6.0, 3.0, 3.0), (2.0, 3.0, 4.0, 2.0, 2.0), "BGR")
    assert normalization_for(rules, 1, (7,), (8,)).mean == (7.0,)
    assert normalization_for(rules, 4, (1, 2, 3)).mean == (1.0, 2.0, 3.0, 2.0)
    for options, words in [
        ({"mean": (1, 2)}, "mean has 2 entries; expected one for each of 3 channels"),
        ({"std": (1, 2, 3, 4)}, "std has 4 entries"),
        ({"std": (1, 0, 1)}, r"std must hold finite numbers above 0"),
        ({"mean": (1, float("nan"), 1)}, r"mean must hold finite numbers"),
    ]:
        with pytest.raises(UsageError, match=words):
            normalization_for(rules, 3, **options)
    with pytest.raises(UsageError, match="in_channels must be at least 1, got 0"):
        normalization_for(rules, 0)


def test_a_system_for_grey_learns_from_and_measures_coloured_images(tmp_path):
    scenes = Scenes(4, size=(64, 64), seed=0)
    best = mw.train(
        "solo-small", scenes, val=scenes, out=tmp_path / "run", steps=2, batch=2, short=(64,), workers=0,
        tensorboard=False, options={"in_channels": 1, "backbone": {"name": "resnet18", "width": 16}, "neck_width": 64},
    )  # fmt: skip
    system = mw.load(best)
    assert len(system.preprocess.mean) == 1
    mw.evaluate(system, scenes, examples=0)
    path = tmp_path / "grey.png"
    Image.fromarray(image(1)[0].numpy()).save(path)
    assert mw.predict(system, path).instances.image_size == (40, 60)
    with pytest.raises(ImageError, match=r"the image.* has 2 channels, but the system expects 1"):
        mw.predict(system, image(2))
