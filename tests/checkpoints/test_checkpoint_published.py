"""Published layouts, as written by the original code, read by `load`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from maskwright.checkpoints import convert, load, read_metadata
from maskwright.checkpoints.catalogue import catalogue
from maskwright.systems import system_class


@pytest.fixture(scope="module")
def original() -> Any:
    """torchvision's Mask R-CNN, with a small backbone, a narrow box head and random weights."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    torch.manual_seed(0)
    model = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=91)
    model.roi_heads.box_head = TwoMLPHead(256 * 49, 32)
    model.roi_heads.box_predictor = FastRCNNPredictor(32, 91)
    return model.eval()


def test_torchvisions_file_is_recognised_and_its_background_moved_last(original: Any, tmp_path: Path) -> None:
    name = "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    torch.save(original.state_dict(), tmp_path / name)
    system = load(tmp_path / name)
    assert system.name == "mask-rcnn"
    assert system.classes[0] == "person"
    assert system.source is not None
    assert system.source["weights_licence"] == "BSD-3-Clause"
    state, theirs = system.state_dict(), original.state_dict()
    rows = theirs["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(state["boxes.classes.weight"], torch.cat([rows[1:], rows[:1]]))
    # Converted, it says the same and still knows where it comes from.
    convert(tmp_path / name, tmp_path / "x.safetensors")
    assert read_metadata(tmp_path / "x.safetensors")["source"]["url"].endswith(name)
    again = load(tmp_path / "x.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values(), strict=True))


def test_fine_tuning_keeps_the_rows_of_classes_with_the_same_name(original: Any, tmp_path: Path) -> None:
    torch.save(original.state_dict(), tmp_path / "x.pth")
    whole = load(tmp_path / "x.pth")
    system = load(tmp_path / "x.pth", classes=["balloon", "Person"])
    assert system.source is not None
    assert system.source["classes_kept"] == ["Person"]
    new, old = system.state_dict(), whole.state_dict()
    assert torch.equal(new["boxes.classes.weight"][[1, 2]], old["boxes.classes.weight"][[0, -1]])
    assert torch.equal(new["boxes.deltas.weight"][4:8], old["boxes.deltas.weight"][:4])
    assert torch.equal(new["masks.logits.weight"][1], old["masks.logits.weight"][0])
    assert torch.equal(new["dense.backbone.stem.conv.weight"], old["dense.backbone.stem.conv.weight"])


def test_a_detectron2_pickle_of_arrays_is_the_same_network(original: Any, tmp_path: Path) -> None:
    system = load_as_detectron2(original, tmp_path)
    assert system.name == "mask-rcnn"
    assert len(system.classes) == 80
    assert system.classes[0] == "person"
    assert system.source is not None
    assert system.source["author"] == "Detectron2 Model Zoo"
    assert system.source["weights_licence"].startswith("not known")


def load_as_detectron2(original: Any, folder: Path) -> Any:
    """torchvision's numbers under detectron2's names, in the form of its pickles, with 80 classes."""
    import re

    rules = (
        (r"backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
        (r"backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
        (r"backbone\.body\.layer(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 1}"),
        (r"(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
        (r"downsample\.0\.", "shortcut."),
        (r"downsample\.1\.", "shortcut.norm."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}"),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"backbone.fpn_output{int(m[1]) + 2}"),
        (r"rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
        (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
        (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
        (r"box_head\.fc6", "box_head.fc1"),
        (r"box_head\.fc7", "box_head.fc2"),
        (r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}"),
        (r"mask_predictor\.conv5_mask", "mask_head.deconv"),
        (r"mask_predictor\.mask_fcn_logits", "mask_head.predictor"),
    )
    rows = {"cls_score": 81, "bbox_pred": 320, "predictor": 80}
    model = {}
    for key, value in original.state_dict().items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        head = key.split(".")[-2]
        cut = rows.get(head) if key.startswith("roi_heads") else None
        model[key] = (value[:cut] if cut else value).numpy()
    model["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4).numpy()
    path = folder / "theirs.pkl"
    path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}, protocol=4))
    return load(path)


@pytest.mark.fast
def test_the_catalogue_names_systems_and_options_that_there_are() -> None:
    import inspect

    for entry in catalogue():
        parameters = inspect.signature(system_class(entry.system).__init__).parameters
        assert set(entry.options) <= set(parameters), entry.name
