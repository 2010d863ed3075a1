"""Files of detectron2 and of its predecessor Detectron (Caffe2).

detectron2.json has, for narrow networks of two configurations, the names and shapes of the state dict, the best
detections and the panoptic segments of detectron2. Weights are random numbers that depend on the names alone. Compiled
operators were those of torchvision.
"""

from __future__ import annotations

import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import maskwright as mw
from maskwright.checkpoints.origins import origins
from maskwright.errors import CheckpointError
from maskwright.structures import Placement

RECORDED = json.loads((Path(__file__).parent / "detectron2.json").read_text())
SIZE, IMAGE = (96, 128), (120, 160)
GAINS = (
    (r"fpn_lateral", 0.25), (r"anchor_deltas|bbox_pred", 0.3), (r"objectness", 0.2), (r"cls_score", 1.2),
    (r"conv2_offset", 0.02),
)  # fmt: skip


def random_weights(layout: dict[str, list[int]]) -> dict[str, Tensor]:
    state = {}
    for name, shape in layout.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        value = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if name.endswith("running_mean"):
            value = value * 0.1
        elif name.endswith("running_var"):
            value = value.abs() * 0.5 + 0.75
        elif name.endswith("conv3.norm.weight"):  # so that float32 suffices: the next offsets depend on the features
            value = 0.2 + value * 0.02
        elif len(shape) == 1:
            value = (1 if name.endswith("weight") else 0) + value * 0.1
        else:
            gain = next((g for pattern, g in GAINS if re.search(pattern, name)), 1.4)
            value = value * gain / value[0].numel() ** 0.5
        state[name] = value
    return state


def numpys(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in state.items()}


@pytest.mark.parametrize("name", ["cascade-panoptic-fpn", "cascade-mask-rcnn"])
def test_detections_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    recorded = RECORDED[name]
    content = {"model": numpys(random_weights(recorded["layout"])), "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
    system: Any = mw.load(tmp_path / "model_final.pkl", proposals={"before": (200, 200), "after": (100, 100)})
    assert system.name == name
    assert system.options["backbone"]["deform_stages"] == [1, 2, 3]
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, *SIZE), dtype=np.float32))
    places = [Placement.resize(IMAGE, SIZE)]
    with torch.no_grad():
        raw = system(images)
        found = system.decode(raw, places)[0]
        if "panoptic" in recorded:
            whole = system.decode_panoptic(raw, places, smallest_area=300)[0]
            areas = whole.segments.masks.areas().tolist()
            segments = zip(whole.segments.labels.tolist(), areas, strict=True)
            for (label, area), (theirs, size) in zip(segments, recorded["panoptic"], strict=True):
                assert label == theirs
                assert abs(area - size) <= 2  # pixels of two equal logits
    best = found[:8]
    assert len(found) == recorded["count"]
    assert best.labels.tolist() == recorded["labels"]
    assert best.scores.tolist() == pytest.approx(recorded["scores"], rel=2e-5, abs=1e-6)
    torch.testing.assert_close(best.boxes, torch.tensor(recorded["boxes"]), rtol=2e-5, atol=1e-3)
    assert best.masks.areas().tolist() == pytest.approx(recorded["areas"], abs=1)


@pytest.mark.fast
def test_of_the_resnext_files_only_those_of_depth_101_divide_by_standard_deviations() -> None:
    for later, depth in (((8, 36), "resnet152"), ((4, 23), "resnet101")):
        shapes = {key: tuple(shape) for key, shape in RECORDED["cascade-mask-rcnn"]["layout"].items()}
        for stage, own, blocks in ((3, 3, later[0]), (4, 5, later[1])):
            one = f"backbone.bottom_up.res{stage}.{own}."
            block = {k: v for k, v in shapes.items() if k.startswith(one)}
            for number in range(own + 1, blocks):
                shapes |= {k.replace(one, f"backbone.bottom_up.res{stage}.{number}."): v for k, v in block.items()}
        (options,) = [found for o in origins() if (found := o.recognise(shapes, {})) is not None]
        assert isinstance(options, dict)
        assert options["backbone"]["name"] == depth
        assert options.get("resize") == (None if depth == "resnet152" else {"std": (57.375, 57.12, 58.395)})
        assert options["boxes"]["norm"] == options["masks"]["norm"] == "group"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("dropped", "renamed", "words"),
    [
        (r"^roi_heads\.", "", "holds a proposal network of detectron2 alone"),
        (r"^proposal_generator\.", "", "holds Fast R-CNN of detectron2, whose proposals come from another network"),
        (r"^(roi_heads|proposal_generator)\.", "", "for semantic segmentation alone"),
        (r"^$", "s1.b1.", "a detector of detectron2 with a RegNet, which is not among the supported backbones"),
    ],
)
def test_unsupported_files_of_detectron2_are_explained(dropped: str, renamed: str, words: str, tmp_path: Path) -> None:
    layout = RECORDED["cascade-panoptic-fpn"]["layout"]
    state = {key: torch.zeros(shape) for key, shape in layout.items() if not re.match(dropped, key)}
    if renamed:
        state = {key.replace("res2.0.", renamed): value for key, value in state.items()}
    torch.save({"model": state}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=words):
        mw.load(tmp_path / "model_final.pth")


# ---- Detectron -------------------------------------------------------------------------------------------------------


def blobs(classes: int = 3, norm: str = "bn", width: int = 8, neck: int = 16) -> dict[str, np.ndarray]:
    """The blobs of Mask R-CNN with a narrow ResNet-50 and a pyramid."""
    layers: dict[str, tuple[int, ...]] = {"conv1": (width, 3, 7, 7)}
    norms = {"conv1" if norm == "gn" else "res_conv1": width}
    inputs = width
    for stage, count in ((2, 3), (3, 4), (4, 6), (5, 3)):
        inner, outer = width << stage - 2, 4 * width << stage - 2
        for block in range(count):
            name = f"res{stage}_{block}_branch"
            own = {"2a": (inner, inputs, 1, 1), "2b": (inner, inner, 3, 3), "2c": (outer, inner, 1, 1)}
            own |= {"1": (outer, inputs, 1, 1)} if block == 0 else {}
            layers |= {name + part: shape for part, shape in own.items()}
            norms |= {name + part: shape[0] for part, shape in own.items()}
            inputs = outer
        last = f"res{stage}_{count - 1}_sum"
        layers |= {f"fpn_inner_{last}{'' if stage == 5 else '_lateral'}": (neck, outer, 1, 1)}
        layers |= {f"fpn_{last}": (neck, neck, 3, 3)}
    layers |= {
        "conv_rpn_fpn2": (neck, neck, 3, 3), "rpn_cls_logits_fpn2": (3, neck, 1, 1),
        "rpn_bbox_pred_fpn2": (12, neck, 1, 1), "fc6": (24, neck * 49), "fc7": (24, 24), "cls_score": (classes + 1, 24),
        "bbox_pred": (4 * classes + 4, 24), "_[mask]_fcn1": (16, neck, 3, 3), "_[mask]_fcn2": (16, 16, 3, 3),
        "conv5_mask": (16, 16, 2, 2), "mask_fcn_logits": (classes + 1, 16, 1, 1),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    found = {f"{name}_w": rng.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in layers.items()}
    plain = (name for name in layers if not name.startswith(("res", "conv1")))
    found |= {f"{name}_b": rng.standard_normal(layers[name][0], dtype=np.float32) for name in plain}
    for name, size in norms.items():
        found |= {f"{name}_{norm}_{part}": rng.standard_normal(size, dtype=np.float32) for part in "sb"}
    return found


def written(content: dict[str, np.ndarray], folder: Path) -> Path:
    path = folder / "model_final.pkl"
    momentum = {f"{name}_momentum": value for name, value in content.items()}
    path.write_bytes(pickle.dumps({"blobs": {**content, **momentum, "lr": np.float32(0.1)}, "cfg": "A: 1\n"}, 2))
    return path


def test_mask_rcnn_of_detectron_is_read(tmp_path: Path) -> None:
    content = blobs()
    system: Any = mw.load(written({**content, "conv1_b": np.zeros(8, np.float32)}, tmp_path))
    assert (system.name, system.source["origin"], system.options["rules"]) == ("mask-rcnn", "detectron", "detectron")
    assert system.classes == ("class 0", "class 1", "class 2")
    assert (system.preprocess.channels, system.preprocess.std) == ("BGR", (1.0, 1.0, 1.0))
    assert system.options["masks"]["convs"] == 2

    def same(value: Tensor, blob: np.ndarray) -> bool:
        return torch.equal(value.detach(), torch.from_numpy(blob))

    boxes, masks, neck = system.boxes, system.masks, system.dense.neck
    assert same(boxes.classes.weight, np.roll(content["cls_score_w"], -1, 0))  # background is first there, last here
    assert same(boxes.deltas.bias, content["bbox_pred_b"][4:])
    assert same(masks.logits.weight, content["mask_fcn_logits_w"][1:])
    assert same(masks.convs[1].conv.weight, content["_[mask]_fcn2_w"])
    assert same(neck.lateral[3].conv.weight, content["fpn_inner_res5_2_sum_w"])
    assert same(neck.lateral[1].conv.bias, content["fpn_inner_res3_3_sum_lateral_b"])
    assert same(neck.output[2].conv.weight, content["fpn_res4_5_sum_w"])
    assert same(system.dense.rpn.deltas.weight, content["rpn_bbox_pred_fpn2_w"])
    block, x = system.dense.backbone.stages[1][0], torch.randn(2, 32, 6, 8)
    weight, scale, shift = (torch.from_numpy(content[f"res3_0_branch1_{end}"]) for end in ("w", "bn_s", "bn_b"))
    plain = torch.nn.functional.conv2d(x, weight, stride=2) * scale[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(block.shortcut(x), plain)
    assert block.conv1.conv.stride == (2, 2)  # in the first convolution, as in Caffe2's models


def test_group_norm_and_boxes_alone_in_files_of_detectron(tmp_path: Path) -> None:
    content = {key: value for key, value in blobs(20, "gn", width=32).items() if "mask" not in key}
    system: Any = mw.load(written(content, tmp_path))
    assert (system.name, system.classes[0], len(system.classes)) == ("faster-rcnn", "aeroplane", 20)
    assert system.options["backbone"]["norm"] == "group"
    assert torch.equal(system.dense.backbone.stem.norm.weight.detach(), torch.from_numpy(content["conv1_gn_s"]))


def test_cascades_of_the_authors_are_read(tmp_path: Path) -> None:
    content = blobs()
    for kind in "wb":  # one box for all classes, after that of background
        content[f"bbox_pred_{kind}"] = content[f"bbox_pred_{kind}"][:8]
    later = ("fc6", "fc7", "cls_score", "bbox_pred")
    rng = np.random.default_rng(1)
    for name in [f"{layer}_{stage}_{kind}" for layer in later for stage in (2, 3) for kind in "wb"]:
        own = content[re.sub(r"_[23]_", "_", name)]
        content[name] = rng.standard_normal(own.shape, dtype=np.float32)
    system: Any = mw.load(written(content, tmp_path))
    assert (system.name, system.options["rules"]) == ("cascade-mask-rcnn", "detectron")
    cascade = system.options["cascade"]
    assert (cascade["gradients"], cascade["resample"], cascade["mask_stage"]) == ([1.0, 0.5, 0.25], True, "last")
    for stage, number in ((system.boxes, ""), (system.boxes_2, "_2"), (system.boxes_3, "_3")):
        classes, deltas = (torch.from_numpy(content[f"{layer}{number}_b"]) for layer in ("cls_score", "bbox_pred"))
        assert torch.equal(stage.classes.bias.detach(), classes.roll(-1))
        assert torch.equal(stage.deltas.bias.detach(), deltas[4:])
        assert torch.equal(stage.fcs[1].weight.detach(), torch.from_numpy(content[f"fc7{number}_w"]))
    boxes = {key: value for key, value in content.items() if "mask" not in key}
    assert mw.load(written(boxes, tmp_path)).outputs == {"boxes"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("retnet_cls_pred_fpn3_w", "res|conv1|fpn", "holds RetinaNet of Detectron"),
        ("conv_rpn_w", "res|conv1|cls_score", "holds a detector without a feature pyramid of Detectron"),
        ("conv_rpn_w", "res|conv1", "holds a proposal network of Detectron"),
        ("pred_w", "res|conv1", "holds a backbone of Detectron"),
    ],
)
def test_other_files_of_detectron_are_explained(name: str, kept: str, words: str, tmp_path: Path) -> None:
    content = {key: value for key, value in blobs().items() if re.match(kept, key)}
    with pytest.raises(CheckpointError, match=rf"{words}.*supported are its Faster, Mask and Keypoint R-CNN"):
        mw.load(written({**content, name: np.zeros((4, 4), np.float32)}, tmp_path))
