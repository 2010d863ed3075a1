"""Mask R-CNN in MMDetection's layout: names, order of classes, styles of the backbone, averaged copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import maskwright as mw
from maskwright.errors import CheckpointError

SMALL = {
    "backbone": {"name": "resnet50", "width": 16, "norm": "still", "frozen": 2},
    "neck_width": 32, "boxes": {"width": 48}, "masks": {"width": 32},
}  # fmt: skip
NAMES = (  # ours to MMDetection's, the reverse of the table in origins/mmdetection.py, written independently of it
    (r"^dense\.backbone\.stem\.conv", "backbone.conv1"),
    (r"^dense\.backbone\.stem\.norm", "backbone.bn1"),
    (r"^dense\.backbone\.stages\.(\d)", lambda m: f"backbone.layer{int(m[1]) + 1}"),
    (r"\.conv(\d)\.norm", r".bn\1"),
    (r"(layer.*)\.conv(\d)\.conv", r"\1.conv\2"),
    (r"\.shortcut\.conv", ".downsample.0"),
    (r"\.shortcut\.norm", ".downsample.1"),
    (r"^dense\.neck\.lateral", "neck.lateral_convs"),
    (r"^dense\.neck\.output", "neck.fpn_convs"),
    (r"^dense\.rpn\.convs\.0", "rpn_head.rpn_conv"),
    (r"^dense\.rpn\.objectness", "rpn_head.rpn_cls"),
    (r"^dense\.rpn\.deltas", "rpn_head.rpn_reg"),
    (r"^boxes\.fcs", "roi_head.bbox_head.shared_fcs"),
    (r"^boxes\.classes", "roi_head.bbox_head.fc_cls"),
    (r"^boxes\.deltas", "roi_head.bbox_head.fc_reg"),
    (r"^masks\.convs", "roi_head.mask_head.convs"),
    (r"^masks\.upsample", "roi_head.mask_head.upsample"),
    (r"^masks\.logits", "roi_head.mask_head.conv_logits"),
)


def theirs(system: Any) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in system.state_dict().items():
        for pattern, new in NAMES:
            key = re.sub(pattern, new, key)
        state[key] = value.clone()
    return state


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(3)
    system = mw.create("mask-rcnn", classes=("a", "b", "c"), rules="mmdetection", **SMALL).eval()
    for name, buffer in system.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return system


def test_the_names_are_those_of_the_published_files(original: Any) -> None:
    keys = set(theirs(original))
    for key in (
        "backbone.conv1.weight", "backbone.bn1.running_var", "backbone.layer3.5.conv3.weight",
        "backbone.layer1.0.downsample.1.bias", "neck.lateral_convs.3.conv.bias", "neck.fpn_convs.0.conv.weight",
        "rpn_head.rpn_conv.bias", "rpn_head.rpn_cls.weight", "rpn_head.rpn_reg.weight",
        "roi_head.bbox_head.shared_fcs.1.weight", "roi_head.bbox_head.fc_cls.bias", "roi_head.bbox_head.fc_reg.weight",
        "roi_head.mask_head.convs.3.conv.weight", "roi_head.mask_head.upsample.bias",
        "roi_head.mask_head.conv_logits.weight",
    ):  # fmt: skip
        assert key in keys


def test_weights_classes_and_conventions(original: Any, tmp_path: Path) -> None:
    state = theirs(original)
    copies = {f"ema_{k.replace('.', '_')}": v * 0 for k, v in state.items()}  # mmcv's hook keeps the others' copies
    meta = {"CLASSES": ("cell", "dust", "fibre"), "mmdet_version": "2.28.0"}
    torch.save({"meta": meta, "state_dict": {**state, **copies}, "optimizer": {}}, tmp_path / "x.pth")
    loaded = mw.load(tmp_path / "x.pth")
    assert loaded.name == "mask-rcnn"
    assert loaded.source["origin"] == "mmdetection"
    assert loaded.classes == ("cell", "dust", "fibre")
    assert loaded.options["rules"] == "mmdetection"
    assert loaded.options["backbone"]["stride_in"] == "3x3"
    assert loaded.preprocess.channels == "RGB"
    assert loaded.preprocess.std == (58.395, 57.12, 57.375)
    for key, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    # The classifier has background in its last row, as in the file.
    assert torch.equal(loaded.boxes.classes.bias, state["roi_head.bbox_head.fc_cls.bias"])
    image = torch.randint(0, 255, (3, 70, 90), dtype=torch.uint8)
    one, two = (s.predict(image, score_threshold=0.0, device="cpu").instances for s in (original, loaded))
    assert torch.equal(one.scores, two.scores)


def test_caffe_style_is_recognised(original: Any, tmp_path: Path) -> None:
    state = theirs(original)
    merged = {k: torch.zeros_like(v) if k.endswith("running_mean") else v for k, v in state.items()}
    config = "model = dict(backbone=dict(type='ResNet', depth=50, style='{}'))"
    cases = (
        ({"state_dict": state, "meta": {"config": config.format("caffe")}}, "x.pth", True),
        ({"state_dict": merged, "meta": {"cfg": config.format("pytorch")}}, "x.pth", False),
        ({"state_dict": state}, "mask_rcnn_r50_caffe_fpn_1x_coco_bbox_mAP-0.38.pth", True),
        ({"state_dict": merged}, "mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth", False),
        ({"state_dict": merged}, "best.pth", True),
        ({"state_dict": state}, "best.pth", False),
    )
    for content, name, caffe in cases:
        torch.save(content, tmp_path / name)
        loaded = mw.load(tmp_path / name)
        assert loaded.options["rules"] == ("mmdetection-caffe" if caffe else "mmdetection"), name
        assert loaded.options["backbone"]["stride_in"] == ("1x1" if caffe else "3x3")
        assert loaded.options["backbone"]["norm"] == ("frozen" if caffe else "still")
        assert loaded.preprocess.channels == ("BGR" if caffe else "RGB")
        assert loaded.preprocess.resample == "opencv"


def test_averaged_weights_of_mmengine_are_those_under_state_dict(original: Any, tmp_path: Path) -> None:
    state = theirs(original)
    swapped = {"steps": torch.tensor(9), **{f"module.{k}": v * 0 for k, v in state.items()}}
    content = {"state_dict": state, "ema_state_dict": swapped, "message_hub": {}, "meta": {"mmengine_version": "0.10"}}
    torch.save(content, tmp_path / "x.pth")
    assert torch.equal(mw.load(tmp_path / "x.pth").boxes.classes.bias, original.boxes.classes.bias)


def test_other_detectors_of_the_code_base_are_refused(original: Any, tmp_path: Path) -> None:
    state = theirs(original)
    torch.save(
        {"state_dict": {**state, "roi_head.mask_head.2.conv_res.conv.weight": torch.ones(64, 64)}}, tmp_path / "x.pth"
    )
    with pytest.raises(CheckpointError, match="MMDetection that matches no supported system"):
        mw.load(tmp_path / "x.pth")
