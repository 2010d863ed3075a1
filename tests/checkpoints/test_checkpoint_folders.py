"""What the JSON files of a Hugging Face folder say beside the weights: heads, and how images are prepared."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from maskwright.checkpoints import CheckpointWarning, folders
from maskwright.checkpoints.origins import origins
from maskwright.errors import CheckpointError
from tests.systems.tiny import build

pytestmark = pytest.mark.fast

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"
NAMES = {
    "maskformer": "maskformer-swin_tiny-coco-panoptic-hf",
    "mask2former": "mask2former-swin_tiny-coco-instance-hf",
}
# What these layouts are known by, of which there is no whole list here.
TRUNK = "detr.model.backbone.conv_encoder.model."
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "detr": {
        f"{TRUNK}conv1.weight": (64, 3, 7, 7),
        **{f"{TRUNK}layer{n}.{block}.conv1.weight": (64, 64, 3, 3) for n in (1, 2, 3, 4) for block in (0, 1)},
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
# As image processors of several times have written them.
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
    """What the published layout of transformers is read as, in a folder with these files."""
    about = {"path": "folder", "config": {}, "preprocessor": {}, "container": {}, **said}
    if system in NAMES:
        tensors = json.loads((LAYOUTS / f"{NAMES[system]}.json").read_text())["tensors"]
        shapes = {k: tuple(shape) for k, (shape, _) in tensors.items()}
    else:
        shapes = SHAPES[system]
    (origin,) = (o for o in origins() if (o.name, o.system) == ("transformers", system))
    return dict(origin.candidates(shapes, about)[0].options)


@pytest.mark.parametrize("said", USUAL.values(), ids=USUAL)
@pytest.mark.parametrize("system", ["detr", "maskformer", "mask2former"])
def test_what_published_folders_say_is_the_system_as_it_is(system: str, said: dict[str, Any]):
    found = options(system, preprocessor=said)
    own = {k: v for k, v in found.items() if k in ("short", "long", "mean", "std")}
    assert build(system, **own).preprocess == build(system).preprocess
    assert found | {"short": 800, "long": 1333} == options(system) | {"short": 800, "long": 1333}


def test_what_published_folders_of_eomt_say_is_the_system_as_it_is():
    said = {
        "do_pad": True, "do_split_image": False, "do_resize": True, "do_rescale": True, "resample": 2,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": 640, "longest_edge": 640}, **COLOURS,
    }  # fmt: skip
    config = {"image_size": 640, "num_attention_heads": 6, "layer_norm_eps": 1e-6}
    assert options("eomt", preprocessor=said, config=config) == options("eomt")


@pytest.mark.parametrize("system", ["detr", "maskformer", "mask2former"])
def test_images_are_prepared_as_the_folder_says(system: str):
    size = {"shortest_edge": 480, "longest_edge": 640}
    found = options(system, preprocessor={"size": size, "image_mean": [0.5] * 3, "image_std": 0.25})
    built = build(system, **{k: found[k] for k in ("short", "long", "mean", "std")}).preprocess
    assert (built.short, built.long) == (480, 640)
    assert [m * built.divide for m in built.mean] == pytest.approx([127.5] * 3)
    assert [s * built.divide for s in built.std] == pytest.approx([63.75] * 3)
    plain = options(system, preprocessor={"do_normalize": False})
    built = build(system, mean=plain["mean"], std=plain["std"]).preprocess
    assert [s * built.divide for s in built.std] == pytest.approx([255] * 3)
    assert built.mean == (0, 0, 0)
    # Without rescaling the file's numbers are of 0 ... 255.
    raw = {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    assert options(system, preprocessor=raw) == options(system)


def test_heads_are_those_of_the_folder():
    assert options("mask2former", config={"num_attention_heads": 4})["heads"] == 4
    assert options("mask2former", config={"num_attention_heads": 4})["sampled"] == 8
    assert options("maskformer", config={"decoder_config": {"decoder_attention_heads": 16}})["heads"] == 16
    both = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    assert options("detr", config=both)["heads"] == 8
    assert options("eomt", config={"num_attention_heads": 12})["heads"] == 12


@pytest.mark.parametrize(
    ("system", "file", "said", "words"),
    [
        ("mask2former", "config", {"num_attention_heads": 3}, "folder/config.json: num_attention_heads is 3, .* 256 "),
        ("mask2former", "config", {"num_attention_heads": 64}, "64, and the pixel decoder .* samples 32 points"),
        ("mask2former", "config", {"num_attention_heads": "8"}, 'num_attention_heads is "8"; expected a whole number'),
        ("detr", "config", {"encoder_attention_heads": 4}, "says 4 attention heads, and the mask head .* is of 8"),
        (
            "detr", "config", {"encoder_attention_heads": 8, "decoder_attention_heads": 4},
            "encoder_attention_heads 8 and decoder_attention_heads 4; such a network is not read",
        ),
        ("maskformer", "config", {"decoder_config": []}, r"decoder_config is \[\]; expected an object"),
        ("eomt", "config", {"image_size": 320}, "config.json: image_size is 320, and the weights .* positions for 640"),
        ("eomt", "config", {"layer_norm_eps": "small"}, 'layer_norm_eps is "small"; expected a number'),
        (
            "eomt", "preprocessor", {"size": {"shortest_edge": 320, "longest_edge": 320}},
            "preprocessor_config.json: size is 320, .* positions for 640",
        ),
        ("detr", "preprocessor", {"size": "large"}, 'size is "large"; expected a whole number of at least 1'),
        ("detr", "preprocessor", {"size": {"shortest_edge": 0}}, "size.shortest_edge is 0; expected a whole number"),
        ("detr", "preprocessor", {"size": 800, "max_size": True}, "max_size is true; expected a whole number"),
        ("detr", "preprocessor", {"image_mean": [0.5, 0.5]}, "image_mean is .*; expected one for each of the 3"),
        ("detr", "preprocessor", {"image_mean": {"r": 1}}, "image_mean is .*; expected a number"),
        ("detr", "preprocessor", {"image_std": [0.5, 0, 0.5]}, "image_std is 0; expected a number above 0"),
        ("detr", "preprocessor", {"image_mean": [float("nan")] * 3}, "image_mean is NaN; expected a number"),
        ("detr", "preprocessor", {"rescale_factor": 10**400}, "rescale_factor is 1000.*; expected a number"),
        ("detr", "preprocessor", {"do_rescale": "no"}, 'do_rescale is "no"; expected true or false'),
        ("detr", "preprocessor", {"do_resize": 0}, "do_resize is 0; expected true or false"),
        ("detr", "preprocessor", {"resample": [2]}, r"resample is \[2\]; expected a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(system: str, file: str, said: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=words):
        options(system, **{file: said})


@pytest.mark.parametrize(
    ("system", "said", "words"),
    [
        ("mask2former", {"size": {"height": 384, "width": 384}}, 'no option for size {"height": 384, "width": 384}; '),
        ("maskformer", {"do_resize": False, "size": 480}, "maskformer has no option for do_resize false; images are"),
        ("detr", {"resample": 3, "do_center_crop": True}, "detr has no option for resample 3, do_center_crop true"),
        ("eomt", {"image_mean": [0.5] * 3}, r"eomt has no option for mean \[0.5, 0.5, 0.5\]; "),
        ("eomt", {"do_split_image": True, "do_pad": False}, "no option for do_split_image true, do_pad false"),
        ("eomt", {"size": {"shortest_edge": 512, "longest_edge": None}}, 'no option for size {"shortest_edge": 512, '),
    ],
)
def test_what_has_no_option_is_left_out_with_a_warning(system: str, said: dict[str, Any], words: str):
    with pytest.warns(CheckpointWarning, match=words) as told:
        found = options(system, preprocessor=said)
    assert len(told) == 1
    assert found == options(system)


def test_further_channels_may_have_colours_of_their_own():
    four = {"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5] * 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folders.images({"preprocessor": four}, "detr", 4)["mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert folders.images({"preprocessor": COLOURS}, "detr", 4) == {}
        assert folders.images({"preprocessor": {"do_normalize": True}}, "detr", 1) == {}
