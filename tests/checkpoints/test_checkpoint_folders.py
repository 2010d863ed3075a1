"""Options from the JSON files of a Hugging Face folder: attention heads, and how images are prepared."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from maskwright.checkpoints import CheckpointWarning, folders
from maskwright.checkpoints.origins import origins
from maskwright.errors import CheckpointError
from maskwright.structures import Preprocess
from maskwright.systems import describe
from tests.systems.tiny import build

pytestmark = pytest.mark.fast

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
NAMES = {
    "maskformer": "maskformer-swin_tiny-coco-panoptic-hf",
    "mask2former": "mask2former-swin_tiny-coco-instance-hf",
}
# The keys by which these layouts are recognised; there is no complete list of them here.
ENCODER = "detr.model.backbone.conv_encoder.model."
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "detr": {
        f"{ENCODER}conv1.weight": (64, 3, 7, 7),
        **{f"{ENCODER}layer{n}.{block}.conv1.weight": (64, 64, 3, 3) for n in (1, 2, 3, 4) for block in (0, 1)},
        "detr.model.encoder.layers.0.fc1.weight": (2048, 256),
        "detr.model.input_projection.weight": (256, 512, 1, 1),
        "detr.model.query_position_embeddings.weight": (100, 256),
        "detr.class_labels_classifier.weight": (251, 256),
        "mask_head.lay1.weight": (264, 264, 3, 3),
    },
    "eomt": {
        **{f"layers.{number}.norm1.weight": (384,) for number in range(12)},
        "query.weight": (200, 384),
        "class_predictor.weight": (134, 384),
        "embeddings.patch_embeddings.projection.weight": (384, 3, 16, 16),
        "embeddings.position_embeddings.weight": (1600, 384),
        "attn_mask_probs": (3,),
    },
}
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As written by image processors of several versions.
USUAL = {
    "with edges": {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 800, "longest_edge": 1333}, "size_divisor": 32, "ignore_index": 255, **COLOURS,
    },
    "of old": {"do_resize": True, "do_normalize": True, "size": 800, "max_size": 1333, **COLOURS},
    "in float32": {
        "size": {"longest_edge": 1333, "shortest_edge": 800}, "rescale_factor": 0.00392156862745098,
        "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
        "image_std": [0.2290000021457672, 0.2240000069141388, 0.22499999403953552],
    },
    "of nothing but nulls": dict.fromkeys(("size", "image_mean", "image_std", "do_resize", "resample", "do_rescale")),
    "empty": {},
}  # fmt: skip


def options(system: str, **said: Any) -> dict[str, Any]:
    """Options of the published layout of transformers in a folder with these files."""
    about = {"path": "folder", "config": {}, "preprocessor": {}, "container": {}, **said}
    if system in NAMES:
        tensors = json.loads((LAYOUTS / f"{NAMES[system]}.json").read_text())["tensors"]
        shapes = {k: tuple(shape) for k, (shape, _) in tensors.items()}
    else:
        shapes = SHAPES[system]
    (origin,) = (o for o in origins() if (o.name, o.system) == ("transformers", system))
    return dict(origin.candidates(shapes, about)[0].options)


def resize_of(found: dict[str, Any]) -> dict[str, Any]:
    return found.get("resize", {})


def prepared(system: str, found: dict[str, Any]) -> Preprocess:
    return describe(system, resize=resize_of(found)).preprocess


@pytest.mark.thorough
@pytest.mark.parametrize("said", USUAL.values(), ids=USUAL)
@pytest.mark.parametrize("system", ["detr", "maskformer", "mask2former"])
def test_files_of_published_folders_change_nothing(system: str, said: dict[str, Any]):
    found, plain = options(system, preprocessor=said), options(system)
    usual = {"short": 800, "long": 1333}
    assert prepared(system, found) == prepared(system, plain)
    assert resize_of(found) | usual == resize_of(plain) | usual


def test_files_of_published_folders_of_eomt_change_nothing():
    said = {
        "do_pad": True, "do_split_image": False, "do_resize": True, "do_rescale": True, "resample": 2,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": 640, "longest_edge": 640}, **COLOURS,
    }  # fmt: skip
    config = {"image_size": 640, "num_attention_heads": 6, "layer_norm_eps": 1e-6}
    assert options("eomt", preprocessor=said, config=config) == options("eomt")


@pytest.mark.thorough
@pytest.mark.parametrize("system", ["detr", "maskformer", "mask2former"])
def test_images_are_prepared_as_the_folder_says(system: str):
    size = {"shortest_edge": 480, "longest_edge": 640}
    found = options(system, preprocessor={"size": size, "image_mean": [0.5] * 3, "image_std": 0.25})
    built = prepared(system, found)
    assert (built.short, built.long) == (480, 640)
    assert [m * built.divide for m in built.mean] == pytest.approx([127.5] * 3)
    assert [s * built.divide for s in built.std] == pytest.approx([63.75] * 3)
    plain = options(system, preprocessor={"do_normalize": False})
    built = prepared(system, plain)
    assert [s * built.divide for s in built.std] == pytest.approx([255] * 3)
    assert built.mean == (0, 0, 0)
    # Without rescaling the numbers are of values in 0 ... 255.
    raw = {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    assert options(system, preprocessor=raw) == options(system)


@pytest.mark.thorough
def test_eomt_is_normalised_as_the_folder_says():
    found = options("eomt", preprocessor={"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert found["resize"] == {"canvas": [640, 640], "mean": [0.5] * 3, "std": [0.25] * 3}
    assert build("eomt", resize={**found["resize"], "canvas": (32, 32)}).preprocess.mean == (0.5, 0.5, 0.5)


def test_heads_are_those_of_the_folder():
    found = options("mask2former", config={"num_attention_heads": 4})
    assert (found["decoder"]["heads"], found["encoder_points"]) == (4, 8)
    found = options("maskformer", config={"decoder_config": {"decoder_attention_heads": 16}})
    assert found["decoder"]["heads"] == 16
    both = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    assert options("detr", config=both)["transformer"]["heads"] == 8
    assert options("eomt", config={"num_attention_heads": 12})["backbone"]["heads"] == 12


@pytest.mark.parametrize(
    ("system", "file", "said", "words"),
    [
        ("mask2former", "config", {"num_attention_heads": 3}, "config.json: num_attention_heads is 3, .* 256"),
        ("mask2former", "config", {"num_attention_heads": 64}, "64, .* divide the 32 points per level"),
        ("mask2former", "config", {"num_attention_heads": "8"}, '_heads must be an integer of at least 1, got "8"'),
        ("detr", "config", {"encoder_attention_heads": 4}, "it has 4 attention heads, but the mask head .* has 8"),
        (
            "detr", "config", {"encoder_attention_heads": 8, "decoder_attention_heads": 4},
            "networks with encoder_attention_heads 8 and decoder_attention_heads 4 are not supported",
        ),
        ("maskformer", "config", {"decoder_config": []}, r"decoder_config must be an object, got \[\]"),
        ("eomt", "config", {"image_size": 320}, "config.json: image_size is 320, but .* positions for 640"),
        ("eomt", "config", {"layer_norm_eps": "small"}, 'layer_norm_eps must be a number, got "small"'),
        (
            "eomt", "preprocessor", {"size": {"shortest_edge": 320, "longest_edge": 320}},
            "preprocessor_config.json: size is 320, but the weights have positions for 640",
        ),
        ("detr", "preprocessor", {"size": "large"}, 'size must be an integer of at least 1, got "large"'),
        ("detr", "preprocessor", {"size": {"shortest_edge": 0}}, "edge must be an integer of at least 1, got 0"),
        ("detr", "preprocessor", {"size": 800, "max_size": True}, "max_size must be an integer .*, got true"),
        ("detr", "preprocessor", {"image_mean": [0.5, 0.5]}, r"must be one number for each .* 3 .*, got \[0.5"),
        ("detr", "preprocessor", {"image_mean": {"r": 1}}, 'image_mean must be a number, got {"r": 1}'),
        ("detr", "preprocessor", {"image_std": [0.5, 0, 0.5]}, "image_std must be a number above 0, got 0"),
        ("detr", "preprocessor", {"image_mean": [float("nan")] * 3}, "image_mean must be a number, got NaN"),
        ("detr", "preprocessor", {"rescale_factor": 10**400}, "rescale_factor must be a number, got 1000"),
        ("detr", "preprocessor", {"do_rescale": "no"}, 'do_rescale must be true or false, got "no"'),
        ("detr", "preprocessor", {"do_resize": 0}, "do_resize must be true or false, got 0"),
        ("detr", "preprocessor", {"resample": [2]}, r"resample must be a number, got \[2\]"),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(system: str, file: str, said: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=words):
        options(system, **{file: said})


@pytest.mark.parametrize(
    ("system", "said", "words"),
    [
        ("mask2former", {"size": {"height": 384, "width": 384}}, 'no option for size {"height": 384, "width": 384}; '),
        ("maskformer", {"do_resize": False, "size": 480}, "maskformer has no option for do_resize false; images are"),
        ("detr", {"resample": 3, "do_center_crop": True}, "detr has no option for resample 3, do_center_crop true"),
        ("eomt", {"do_split_image": True, "do_pad": False}, "no option for do_split_image true, do_pad false"),
        ("eomt", {"size": {"shortest_edge": 512, "longest_edge": None}}, 'no option for size {"shortest_edge": 512, '),
    ],
)
def test_entries_without_an_option_are_ignored_with_a_warning(system: str, said: dict[str, Any], words: str):
    with pytest.warns(CheckpointWarning, match=words) as caught:
        found = options(system, preprocessor=said)
    assert len(caught) == 1
    assert found == options(system)


def test_further_channels_have_their_own_normalization():
    four = {"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folders.images({"preprocessor": four}, "detr", 4)["mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert folders.images({"preprocessor": COLOURS}, "detr", 4) == {}
        assert folders.images({"preprocessor": {"do_normalize": True}}, "detr", 1) == {}
