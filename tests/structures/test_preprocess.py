"""Preprocessing rules; the comparison with the originals is in tests/parity."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskwright.errors import UsageError
from maskwright.structures import Preprocess

pytestmark = pytest.mark.fast

KINDS = st.sampled_from(["pillow", "tensor"])


@given(st.integers(1, 4000), st.integers(1, 4000), KINDS)
def test_short_and_long_side(height, width, kind):
    rule = Preprocess(short=800, long=1333, resample=kind)
    tall, wide = rule.size(height, width)
    assert tall >= 1
    assert wide >= 1
    assert max(tall, wide) <= 1333
    scale = min(800 / min(height, width), 1333 / max(height, width))
    assert abs(tall - height * scale) <= 1
    assert abs(wide - width * scale) <= 1


def test_known_sizes():
    rule = Preprocess(short=800, long=1333)
    assert rule.size(480, 640) == (800, 1067)
    assert rule.size(427, 640) == (800, 1199)
    assert rule.size(200, 640) == (417, 1333)
    assert Preprocess(resample="tensor").size(480, 640) == (800, 1066), "torchvision rounds down"


def test_an_image_of_the_right_size_is_unchanged():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    for kind in ("pillow", "tensor"):
        rule = Preprocess(64, 64, kind, (0.0, 0, 0), (1.0, 1, 1), divide=1.0)
        values, placement = rule.apply(image)
        assert torch.equal(values, image.float())
        assert placement.scale == (1.0, 1.0)
        assert placement.size == (64, 64)


def test_channel_order():
    image = torch.tensor([255, 128, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    rule = Preprocess(8, 8, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0), divide=1.0, channels="BGR")
    assert rule.normalize(image)[:, 0, 0].tolist() == [-1, 63, 63]
    plain = Preprocess(8, 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert plain.normalize(image)[:, 0, 0].tolist() == pytest.approx([1, 128 / 255, 0])
    more = torch.cat([image, image[:1]])
    four = Preprocess(8, 8, mean=(0.0,) * 4, std=(1.0,) * 4, divide=1.0, channels="BGR")
    assert four.normalize(more)[:, 0, 0].tolist() == [0, 128, 255, 255], "the fourth channel keeps its position"


def test_pillow_resampling_equals_pillow():
    image = torch.randint(0, 256, (3, 50, 71), dtype=torch.uint8)
    rule = Preprocess(31, 99, "pillow", (0.0,) * 3, (1.0,) * 3, divide=1.0)
    values, placement = rule.apply(image)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((44, 31), Image.Resampling.BILINEAR)
    assert placement.size == (31, 44) == tuple(values.shape[1:])
    assert np.array_equal(values.permute(1, 2, 0).numpy(), np.asarray(expected, np.float32))


def test_tensor_resampling_equals_torch():
    image = torch.randint(0, 256, (3, 50, 71), dtype=torch.uint8)
    values, _ = Preprocess(31, 99, "tensor").apply(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normal = (image.float() / 255 - mean) / std
    expected = torch.nn.functional.interpolate(normal[None], size=(31, 44), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(values, expected, atol=1e-6)


def test_padding_has_the_mean_colour():
    rule = Preprocess(32, 64, multiple=32)
    images = [torch.full((3, 32, 40), 10, dtype=torch.uint8), torch.full((3, 40, 32), 10, dtype=torch.uint8)]
    batch = rule.collate(images, ["a", "b"])
    assert batch.images.shape == (2, 3, 64, 64)
    assert not batch.images[0, :, 32:].any()
    assert not batch.images[1, :, :, 32:].any()
    assert [p.size for p in batch.placements] == [(32, 40), (40, 32)]
    assert batch.names == ["a", "b"]


def test_conversion_to_json_and_back():
    rule = Preprocess(mean=(1.0, 2.0, 3.0), channels="BGR", resample="tensor", multiple=1)
    assert Preprocess.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_extreme_shapes_keep_at_least_one_pixel(size):
    for kind in ("pillow", "tensor"):
        rule = Preprocess(100, 167, kind)
        values, placement = rule.apply(torch.zeros(3, *size, dtype=torch.uint8))
        assert min(values.shape[1:]) >= 1
        assert tuple(values.shape[1:]) == placement.size


def test_stretch_and_letterbox():
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    stretched = Preprocess(fit="stretch", canvas=(64, 32), resample="opencv")
    values, placement = stretched.apply(image)
    assert values.shape == (3, 64, 32)
    assert placement.scale == (32 / 90, 64 / 60)
    boxed = Preprocess(fit="letterbox", canvas=(128, 120), mean=(0.5,) * 3, std=(1.0,) * 3)
    values, placement = boxed.apply(image)
    assert values.shape == (3, 128, 120)
    assert placement.size == (128, 120)
    assert torch.equal(values[:, :24], torch.full((3, 24, 120), -0.5)), "black padding around the image"
    corner = torch.tensor([[0.0, 24.0], [120.0, 104.0]])
    torch.testing.assert_close(placement.points_to_image(corner), torch.tensor([[0.0, 0.0], [90.0, 60.0]]))
    cornered, placement = replace(boxed, corner=True).apply(image)
    assert torch.equal(cornered[:, :80], values[:, 24:104])
    assert torch.equal(cornered[:, 80:], torch.full((3, 48, 120), -0.5)), "black padding below the image"
    torch.testing.assert_close(placement.points_to_input(torch.tensor([[90.0, 60.0]])), torch.tensor([[120.0, 80.0]]))


def test_a_canvas_is_required_and_keeps_its_aspect_ratio():
    with pytest.raises(UsageError, match="needs `canvas`"):
        Preprocess(fit="stretch")
    rule = Preprocess(fit="stretch", canvas=(768, 1280))
    assert rule.at(384).canvas == (384, 640)
    assert rule.description == "stretch to 768 x 1280"
    assert Preprocess().at(short=400).description == "short side 400, long side at most 1333"
    assert Preprocess.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_sizes_of_maskrcnn_benchmark():
    rule = Preprocess(short=800, long=1333, sizes="benchmark")
    assert rule.size(480, 641) == (800, 1068)
    assert rule.size(641, 480) == (1068, 800)
    assert rule.size(200, 640) == (417, 1334), "the rounded short side decides, as in maskrcnn-benchmark"
    assert rule.size(1, 2700) == (1, 2700), "no side is less than one pixel"
