"""Detectors of MMDetection 3.3: layouts, and recorded answers of its code on narrow networks.

mmdetection.json has, for each system, the names and shapes of its state dict, losses, the norm of all gradients and the
best detections. Weights are random numbers that depend on the names alone (`random_weights`). Compiled operators were
those of torchvision. Samples were the first candidates instead of random ones. Masks of HTC were averaged over its
stages, as in version 2, by which its published scores were measured.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskwright as mw
from maskwright.blocks.fpn import PathAggregation
from maskwright.checkpoints.mmcv_config import input_size, look, normalisation, read_config
from maskwright.checkpoints.names import COCO, COCO_STUFF_ONLY
from maskwright.errors import CheckpointError
from maskwright.ops import boxes as box_ops
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.matching import match
from maskwright.structures import Instances, Masks, Panoptic, Placement

RECORDED = json.loads((Path(__file__).parent / "mmdetection.json").read_text())
SYSTEMS = {
    "faster-rcnn-pafpn": "faster-rcnn", "mask-rcnn": "mask-rcnn", "cascade-mask-rcnn": "cascade-mask-rcnn",
    "htc": "htc", "mask-scoring-rcnn": "mask-scoring-rcnn", "panoptic-fpn": "panoptic-fpn", "retinanet": "retinanet",
    "fcos": "fcos", "fcos-improved-dcn": "fcos",
}  # fmt: skip
SIZES, IMAGES, PADDED = ((150, 180), (160, 190)), ((100, 120), (80, 95)), (160, 192)
GAINS = (
    (r"^neck\.(lat|down|fpn)", 0.25), (r"rpn_reg|fc_reg|retina_reg", 0.3), (r"rpn_cls", 0.2), (r"fc_mask_iou", 0.02),
    (r"retina_cls", 1.0), (r"fc_cls", 1.2),
)  # fmt: skip


def random_weights(layout: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    state = {}
    for name, shape in layout.items():
        if not shape:
            state[name] = torch.tensor(1.25)
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        value = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        if name.endswith("running_mean"):
            value = value * 0.1
        elif name.endswith("running_var"):
            value = value.abs() * 0.5 + 0.75
        elif len(shape) == 1:
            value = (1 if name.endswith("weight") else 0) + value * 0.1
        else:
            gain = next((g for pattern, g in GAINS if re.search(pattern, name)), 1.4)
            value = value * gain / value[0].numel() ** 0.5
        state[name] = value * 0 + 0.5 if name.endswith("fc_mask_iou.bias") else value
    return state


def content(name: str, **meta: Any) -> dict[str, Any]:
    state = random_weights(RECORDED[name]["layout"])
    return {"meta": {"mmengine_version": "0.10", "cfg": RECORDED[name]["config"], **meta}, "state_dict": state}


def names(name: str) -> tuple[str, ...]:
    return tuple(f"class {letter}" for letter in ("abcdefgh" if name in ("panoptic-fpn", "htc") else "abcde"))


def loaded(name: str, folder: Path, **options: Any) -> Any:
    meta = {"dataset_meta": {"classes": names(name)}, "mmdet_version": "3.3.0"}
    torch.save({**content(name, **meta), "optimizer": {}, "message_hub": {}}, folder / "x.pth")
    return mw.load(folder / "x.pth", **options)


def objects(masks: bool) -> list[Instances]:
    result = []
    for size, row in zip(SIZES, RECORDED["targets"], strict=True):
        planes = torch.zeros(len(row["labels"]), *size, dtype=torch.bool)
        for plane, (x0, y0, x1, y1) in zip(planes, row["boxes"], strict=True):
            plane[y0:y1, x0:x1] = True
            plane[y0 : y0 + (y1 - y0) // 3, x0 : x0 + (x1 - x0) // 3] = False
        boxes, labels = torch.tensor(row["boxes"], dtype=torch.float32), torch.tensor(row["labels"])
        result.append(Instances(size, boxes, labels, Masks.from_dense(planes) if masks else None))
    return result


def regions(target: Instances) -> Instances:
    """The objects with two regions of stuff around them."""
    assert target.masks is not None
    free = ~target.masks.dense().any(0)
    planes = torch.zeros(2, *target.image_size, dtype=torch.bool)
    planes[0, 20:120, : target.image_size[1] // 2] = True
    planes[1, :60, target.image_size[1] // 2 :] = True
    every = torch.cat([planes & free, target.masks.dense()])
    boxes = torch.cat([torch.tensor([[0.0, 20, 96, 120], [96, 0, target.image_size[1], 60]]), target.boxes])
    return Instances(
        target.image_size, boxes, torch.cat([torch.tensor([5, 6]), target.labels]), Masks.from_dense(every)
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_detections_losses_and_gradients_are_those_of_the_original(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {} if name.startswith(("retinanet", "fcos")) else {"proposals": {"before": (200, 200), "after": (100, 100)}}
    system, recorded = loaded(name, tmp_path, **few), RECORDED[name]
    assert system.name == SYSTEMS[name]
    assert system.source["origin"] == "mmdetection"
    assert system.classes == names(name)
    images = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, *PADDED), dtype=np.float32))
    placements = [Placement.resize(image, size) for image, size in zip(IMAGES, SIZES, strict=True)]
    thresholds: dict[str, Any] = {}
    with torch.no_grad():
        raw = system(images)
        if name == "panoptic-fpn":
            thresholds["score_threshold"] = 0.6
            for found, row in zip(system.decode_panoptic(raw, placements), recorded["found"], strict=True):
                assert isinstance(found, Panoptic)
                labels = found.semantic()
                assert len(found) == row["segments"]
                assert [int((labels == 5 + k).sum()) for k in range(3)] == row["stuff"]
        detected = system.decode(raw, placements, **thresholds)
    for found, row in zip(detected, recorded["found"], strict=True):
        best = found[:8]
        assert len(found) == row["count"]
        assert best.labels.tolist() == row["labels"]
        assert best.scores.tolist() == pytest.approx(row["scores"], rel=2e-5, abs=1e-6)
        torch.testing.assert_close(best.boxes, torch.tensor(row["boxes"]), rtol=2e-5, atol=1e-3)
        if "areas" in row:
            # A pixel may be at the threshold up to rounding, which differs between processors.
            assert best.masks.areas().tolist() == pytest.approx(row["areas"], abs=1)

    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    system.train()
    targets = objects("masks" in system.needs)
    terms = system.losses(system(images), [regions(t) for t in targets] if name in ("panoptic-fpn", "htc") else targets)
    theirs = sorted(recorded["losses"].values())
    assert sorted(float(value.detach()) for value in terms.values()) == pytest.approx(theirs, rel=2e-5)
    torch.stack(list(terms.values())).sum().backward()
    norms = [p.grad.norm() for p in system.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(recorded["gradient"], rel=5e-5)


@pytest.mark.parametrize("name", ["cascade-mask-rcnn", "fcos", "fcos-improved-dcn", "retinanet"])
def test_files_of_version_2_without_a_configuration(name: str, tmp_path: Path) -> None:
    state = random_weights(RECORDED[name]["layout"])
    copies = {f"ema_{key.replace('.', '_')}": value * 0 for key, value in state.items()}
    path = tmp_path / f"{name.replace('-', '_')}_r18_caffe_fpn_1x_coco_20200203-008bb65.pth"
    torch.save({"meta": {"CLASSES": names(name)}, "state_dict": {**state, **copies}, "optimizer": {}}, path)
    system: Any = mw.load(path)
    assert system.options["rules"] == "mmdetection-caffe"
    assert system.classes == names(name)
    assert (system.preprocess.channels, system.preprocess.std) == ("BGR", (1.0, 1.0, 1.0))
    if name == "cascade-mask-rcnn":
        cascade = system.options["cascade"]
        assert cascade["overlaps"] == pytest.approx([0.5, 0.6, 0.7])
        assert cascade["delta_weights"][2] == pytest.approx([1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067])
        assert cascade["loss_weights"] == [1.0, 0.5, 0.25]
        assert torch.equal(system.boxes_3.classes.bias, state["roi_head.bbox_head.2.fc_cls.bias"])
        assert torch.equal(system.masks_2.logits.weight, state["roi_head.mask_head.1.conv_logits.weight"])
    elif name == "fcos":
        assert system.preprocess.mean == (102.9801, 115.9465, 122.7717)
        head = system.options["head"]
        assert (head["bias"], head["distances"], head["centerness_of"]) == (False, "exp", "classes")
        assert (system.options["radius"], system.options["box_loss"]) == (None, "iou")
    elif name == "fcos-improved-dcn":
        assert system.preprocess.mean == (103.53, 116.28, 123.675)
        head = system.options["head"]
        assert (head["bias"], head["distances"], head["centerness_of"]) == (True, "relu", "boxes")
        assert (head["deformable"], system.options["radius"]) == ("last", 1.5)
    else:  # anchors are sorted by size first, in the file by ratio first
        bias = state["bbox_head.retina_reg.bias"].view(3, 3, 4)
        assert torch.equal(system.dense.deltas.bias.view(3, 3, 4), bias.transpose(0, 1))


def test_published_files_of_htc_predict_the_classes_of_coco_stuff(tmp_path: Path) -> None:
    layout = dict(RECORDED["htc"]["layout"])
    for stage in range(3):
        for key, rows in ((f"bbox_head.{stage}.fc_cls", 81), (f"mask_head.{stage}.conv_logits", 80)):
            for kind in ("weight", "bias"):
                layout[f"roi_head.{key}.{kind}"] = [rows, *layout[f"roi_head.{key}.{kind}"][1:]]
    for kind in ("weight", "bias"):
        key = f"roi_head.semantic_head.conv_logits.{kind}"
        layout[key] = [183, *layout[key][1:]]
    state = random_weights(layout)
    torch.save({"meta": {"CLASSES": COCO}, "state_dict": state}, tmp_path / "htc_r50_fpn_1x_coco_20200317-7332cf16.pth")
    system: Any = mw.load(tmp_path / "htc_r50_fpn_1x_coco_20200317-7332cf16.pth")
    assert system.name == "htc"
    assert system.classes == (*COCO, *COCO_STUFF_ONLY)
    assert system.stuff == COCO_STUFF_ONLY
    assert system.options["cascade"]["loss_weights"] == [1.0, 0.5, 0.25]
    rows = system.semantic.logits.weight[:, 0, 0, 0].detach()
    theirs = state["roi_head.semantic_head.conv_logits.weight"][:, 0, 0, 0]
    for name, number in (("person", 1), ("stop sign", 13), ("toothbrush", 90), ("banner", 92), ("wood", 182)):
        assert rows[1 + system.classes.index(name)] == theirs[number - 1]  # their labels are category ids less 1
    assert rows[0] == theirs[182]
    plain = {k: v for k, v in state.items() if "semantic_head" not in k}
    torch.save({"state_dict": plain}, tmp_path / "htc_without_semantic_r50_fpn_1x_coco.pth")
    system = mw.load(tmp_path / "htc_without_semantic_r50_fpn_1x_coco.pth")
    assert (system.name, system.classes, system.options["semantic"]) == ("htc", COCO, False)


def test_the_configuration_in_the_file_takes_precedence(tmp_path: Path) -> None:
    config = (
        "model = dict(type='MaskRCNN', data_preprocessor=dict(mean=[1, 2, 3.5], std=[4, 5, 6], bgr_to_rgb=True), "
        "backbone=dict(type='ResNet', style='pytorch', frozen_stages=-1, norm_eval=False, "
        "norm_cfg=dict(type='SyncBN', requires_grad=True)), "
        "rpn_head=dict(anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32, 64])))\n"
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(1024, 600), keep_ratio=True)]\n"
        "import os\nos.abort()\n"
    )
    torch.save(content("mask-rcnn", cfg=config), tmp_path / "mask_rcnn_r50_caffe_fpn.pth")
    system: Any = mw.load(tmp_path / "mask_rcnn_r50_caffe_fpn.pth")
    assert system.options["rules"] == "mmdetection"
    assert (system.preprocess.mean, system.preprocess.std) == ((1.0, 2.0, 3.5), (4.0, 5.0, 6.0))
    assert (system.preprocess.short, system.preprocess.long) == (600, 1024)
    assert system.options["backbone"]["norm"] == "batch"
    assert system.options["backbone"]["frozen"] == 0
    assert list(system.options["proposals"]["anchor_sizes"]) == [16, 32, 64, 128, 256]


@pytest.mark.fast
def test_a_configuration_is_read_as_data() -> None:
    def about(text: str) -> dict[str, Any]:
        return {"container": {"meta": {"config": text}}}

    text = "a = {'b': [1, -2.5, (True, None)]}\nc = dict(d=open('x'), e='f')\nimg_norm_cfg = dict(\n" + (
        "    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
        "data = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', img_scale=(1333, 640))]))\n"
    )
    config = read_config(about(text))
    assert config["a"] == {"b": [1, -2.5, [True, None]]}
    assert config["c"] == {"d": None, "e": "f"}
    assert look(config, "a", "b", 1) == -2.5
    assert look(config, "a", "b", 7, "x") is None
    assert normalisation(config) == ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False)
    assert input_size(config) == (640, 1333)
    for damaged in ("model = dict(", "x = \0", "a = " + "(" * 5000, "a = " + "-" * 100_000 + "1", ""):
        assert read_config(about(damaged)).get("model") is None
    assert read_config({"container": {"meta": [1]}}) == {}


def test_weight_standardisation_is_applied_once(tmp_path: Path) -> None:
    state = random_weights(RECORDED["mask-rcnn"]["layout"])
    torch.save({"state_dict": state}, tmp_path / "mask_rcnn_r18_fpn_gn_ws-all_2x_coco.pth")
    system: Any = mw.load(tmp_path / "mask_rcnn_r18_fpn_gn_ws-all_2x_coco.pth")
    weight = state["roi_head.mask_head.convs.1.conv.weight"]
    rows = weight.flatten(1)
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(system.masks.convs[1].conv.weight.flatten(1), expected)
    assert torch.equal(system.dense.rpn.convs[0].weight, state["rpn_head.rpn_conv.weight"])


def test_unsupported_files_are_explained(tmp_path: Path) -> None:
    state = random_weights(RECORDED["mask-rcnn"]["layout"])
    one = {key.removeprefix("roi_head."): value for key, value in state.items()}
    htc = {**state, "semantic_head.lateral_convs.0.conv.weight": torch.ones(8, 8, 1, 1)}
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    meta = {"mmdet_version": "2.28.0", "config": "model = dict(type='HybridTaskCascade')"}
    for weights, message in (
        (one, "MMDetection 1.*upgrade_model_version"),
        (htc, r"\(HybridTaskCascade\).*semantic_head.lateral_convs.*supported are Faster"),
        (backbone, "the backbone of a detector of MMDetection alone"),
    ):
        torch.save({"state_dict": weights, "meta": meta}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=message):
            mw.load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mask-rcnn", "rpn_head=dict(anchor_generator=dict(ratios=[0.3, 1.0, 3.0]))"),
        ("mask-rcnn", "roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.2, 0.2, 0.2, 0.2])))"),
        ("mask-rcnn", "roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='NormedLinear')))"),
        ("cascade-mask-rcnn", "roi_head=dict(bbox_head=[dict(loss_cls=dict(type='SeesawLoss'))])"),
        ("retinanet", "bbox_head=dict(anchor_generator=dict(ratios=[0.5, 1.0, 3.0]))"),
    ],
)
def test_configurations_that_options_do_not_express_are_refused(name: str, model: str, tmp_path: Path) -> None:
    torch.save(content(name, cfg=f"model = dict(type='Detector', {model})"), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"MMDetection \(Detector\).*configuration do not fit"):
        mw.load(tmp_path / "x.pth")


# ---- conventions -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_rescued_boxes_belong_to_the_object_that_they_are_rescued_for() -> None:
    iou = torch.tensor([[0.9, 0.2, 0.0], [0.8, 0.1, 0.05], [0.0, 0.25, 0.0]])
    assert match(iou, 0.3, 0.7, True)[1].tolist() == [0, 2, -1]
    assert match(iou, 0.3, 0.7, "own")[1].tolist() == [1, 2, -1]
    assert match(iou, 0.3, 0.7, "own", 0.3)[1].tolist() == [1, -1, -1]
    assert match(iou, 0.3, 0.7, "own", 0.85)[1].tolist() == [0, -1, -1]


@pytest.mark.fast
def test_box_conventions() -> None:
    box, deltas = torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.0, -9.0, 9.0]])
    sides = box_ops.decode(box, deltas, symmetric=True)
    assert (sides[0, 2:] - sides[0, :2]).tolist() == pytest.approx([1.6, 6250.0], rel=1e-5)
    sides = box_ops.decode(box, deltas)
    assert float(sides[0, 2] - sides[0, 0]) == pytest.approx(100 * np.exp(-9), rel=1e-3)
    near = torch.tensor([[0.0, 0.0, 111.99999, 111.99999]])
    assert int(box_ops.pyramid_level(near, rule="mmdetection")) == 3
    assert int(box_ops.pyramid_level(near * 0.999, rule="mmdetection")) == 2


@pytest.mark.fast
def test_polygons_are_rasterised_before_they_are_cropped() -> None:
    polygon = Masks.from_polygons([[np.array([2.0, 2.0, 9.5, 2.0, 9.5, 9.0, 2.0, 9.0])]], (12, 12))
    plane = Masks.from_dense(polygon.dense())
    boxes, owner = torch.tensor([[1.3, 1.1, 10.2, 9.7]]), torch.tensor([0])
    bitmap = mask_targets(polygon, owner, boxes, 7, rule="bitmap")
    assert torch.equal(bitmap, mask_targets(plane, owner, boxes, 7, rule="binary"))


@pytest.mark.fast
def test_path_aggregation_reduces_sums_not_outputs() -> None:
    class Levels(torch.nn.Module):
        def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
            return levels

    torch.manual_seed(0)
    module = PathAggregation(Levels(), 4, levels=3)
    levels = [torch.randn(1, 4, 16 >> n, 16 >> n) for n in range(4)]
    found = module(levels)
    second = levels[1] + module.reduce[0](levels[0])
    third = levels[2] + module.reduce[1](second)
    torch.testing.assert_close(found[1], module.output[0](second))
    torch.testing.assert_close(found[2], module.output[1](third))
    assert torch.equal(found[3], found[2][..., ::2, ::2])


@pytest.mark.fast
def test_a_cascade_averages_logits() -> None:
    options: dict[str, Any] = {
        "backbone": {"name": "resnet18", "width": 8}, "neck_width": 16, "boxes": {"width": 16, "agnostic": True},
        "masks": False,
    }  # fmt: skip
    torch.manual_seed(0)
    system: Any = mw.create("cascade-mask-rcnn", classes=("a", "b"), rules="mmdetection", **options).eval()
    raw = system(torch.randn(1, 3, 64, 64))
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 50.0]])]
    logits, own = [], boxes
    for stage in range(3):
        logits.append(system.run_stage(stage, raw, own)[0])
        own = [system.run_stages(raw, boxes, [(64, 64)], stage + 1)[1][:, 0]]
    scores, _ = system.run_stages(raw, boxes, [(64, 64)], 3)
    torch.testing.assert_close(scores, torch.stack(logits).mean(0).softmax(-1)[:, :-1])
    system.box_rules = replace(system.box_rules, mean_of="probabilities")
    scores, _ = system.run_stages(raw, boxes, [(64, 64)], 3)
    torch.testing.assert_close(scores, torch.stack(logits).softmax(-1).mean(0)[:, :-1])
