"""Faster R-CNN: boxes alone, and torchvision's and detectron2's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN as Theirs
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import maskwright as mw
from maskwright.cli import main
from maskwright.data import Scenes
from maskwright.structures import Placement
from tests.parity.weights import write_checkpoint
from tests.systems.tiny import SIZE, build, objects

LAYOUTS = Path(__file__).parents[1] / "parity" / "layouts"


def test_it_detects_boxes_and_nothing_else():
    system = build("faster-rcnn")
    assert (system.outputs, system.needs, system.tasks) == ({"boxes"}, set(), {"instances"})
    targets = [objects(3), objects(0)]
    for target in targets:
        object.__setattr__(target, "masks", None)
    losses = system.losses(system(torch.randn(2, 3, *SIZE)), targets)
    assert losses.keys() == {"rpn_objectness", "rpn_box", "class", "box"}
    found = system.eval().decode(system(torch.randn(1, 3, *SIZE)), [Placement.identity(SIZE)], score_threshold=0.0)[0]
    assert len(found)
    assert found.masks is None
    assert found.keypoints is None


def test_it_is_mask_rcnn_without_its_masks():
    masks = build("mask-rcnn").eval()
    options = {k: v for k, v in masks.options.items() if k not in ("masks", "points", "keypoints", "mask_iou")}
    system = mw.create("faster-rcnn", **options).eval()
    system.load_state_dict({k: v for k, v in masks.state_dict().items() if not k.startswith("masks.")})
    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (s.decode(s(image), [Placement.identity(SIZE)], score_threshold=0.0)[0] for s in (system, masks))
    assert torch.equal(ours.boxes, theirs.boxes)
    assert torch.equal(ours.labels, theirs.labels)


def test_torchvisions_file_gives_torchvisions_boxes(tmp_path: Path):
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = Theirs(body, 5, min_size=128, max_size=256, box_score_thresh=0.0, box_detections_per_img=20).eval()
    with torch.no_grad():  # random weights answer alike everywhere
        for name, parameter in theirs.named_parameters():
            if name.endswith(("cls_score.weight", "bbox_pred.weight", "cls_logits.weight")):
                parameter.mul_(20)
    path = tmp_path / "fasterrcnn.pth"
    torch.save(theirs.state_dict(), path)
    system = mw.load(path, resize={"short": 128, "long": 256})
    assert (system.name, len(system.classes)) == ("faster-rcnn", 4)
    image = torch.rand(3, 100, 140, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = theirs([image])[0]
    found = system.predict((image * 255).round().to(torch.uint8), score_threshold=0.0, detections=20)
    again = theirs([(image * 255).round() / 255])[0]
    assert len(answer["boxes"]) == len(again["boxes"])
    ours = found.instances
    assert len(ours) == len(again["boxes"])
    torch.testing.assert_close(ours.boxes, again["boxes"].detach(), atol=2e-2, rtol=0)
    torch.testing.assert_close(ours.scores, again["scores"].detach(), atol=1e-4, rtol=0)
    assert torch.equal(ours.labels + 1, again["labels"])


def test_detectron2s_file_is_recognised(tmp_path: Path):
    layout = json.loads((LAYOUTS / "mask-rcnn-detectron2-r50-fpn.json").read_text())
    layout["tensors"] = {k: v for k, v in layout["tensors"].items() if "mask_head" not in k}
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    system = mw.load(write_checkpoint(tmp_path / "layout.json", tmp_path, 0))
    assert (system.name, system.source["origin"], system.outputs) == ("faster-rcnn", "detectron2", {"boxes"})


def test_it_trains_is_evaluated_and_drawn_without_masks(tmp_path: Path):
    data = tmp_path / "scenes"
    for split, count in (("train", 4), ("val", 2)):
        Scenes(count, SIZE, classes=("disc", "box"), seed=len(split)).write(data, split)
    options = {"backbone": {"name": "resnet18", "width": 16}, "neck_width": 32, "boxes": {"width": 64}}
    best = mw.train(
        "faster-rcnn-small", data, out=tmp_path / "run", options=options, epochs=1, batch=2, workers=0,
        tensorboard=False, device="cpu",
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["evaluate", str(best), "--data", str(data), "--split", "val", "--out", str(run)]) == 0
    summary = json.loads((run / "result.json").read_text())["summary"]
    assert "bbox/AP" in summary
    assert not [name for name in summary if name.startswith("segm")]
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    found = tmp_path / "found"
    arguments = ["--weights", str(best), "-o", str(found), "--score-threshold", "0.0"]
    assert main(["predict", str(data / "val"), *arguments]) == 0
    records = json.loads((found / "results.json").read_text())
    assert records
    assert not [record for record in records if "segmentation" in record]


def test_an_evaluation_compares_boxes_even_if_nothing_is_found():
    system, scenes = build("faster-rcnn", classes=("disc", "box")).eval(), Scenes(1, SIZE, classes=("disc", "box"))
    result = mw.evaluate(system, scenes, score_threshold=0.999, device="cpu", examples=0)
    assert result.confusion is not None
    assert result.confusion.by == "bbox"
    assert mw.evaluate(system, scenes, boundary=True, device="cpu", examples=0).kinds == ("bbox",)
