"""Checks of RetinaNet against detectron2."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwright.structures import Instances, Placement
from maskwright.systems.retinanet import Raw, RetinaNet
from tests.parity.ledger import Ledger, inputs, matching, part


def check(system: RetinaNet, layout: Path, ledger: Ledger) -> None:
    system.eval()
    images, sizes = inputs(ledger.about)
    with torch.no_grad():
        raw = system(images)
        for kind, values in (("fpn", raw.features), ("logits", raw.logits), ("deltas", raw.deltas)):
            for name in ledger.names(rf"{kind}_p\d"):
                ledger.compare(name, values[int(name[-1]) - 3])
        detections(system, raw, sizes[0], ledger)
        training(system, raw, sizes[0], ledger)


@part
def detections(system: RetinaNet, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"det_\w+"):
        return None
    found = system.decode(
        raw, [Placement.identity(size)], detections=ledger.about.get("detections", 100),
        nms_threshold=ledger.about.get("nms", 0.5), candidates=ledger.about.get("topk_candidates", 1000),
        score_threshold=ledger.about.get("score_threshold", 0.05),
    )[0]  # fmt: skip
    assert found.scores is not None
    boxes = found.boxes
    inside = (boxes > 0) & (boxes < torch.tensor([size[1], size[0]] * 2))
    if "det_boxes" in ledger.arrays:  # theirs are not clipped
        theirs = ledger.peek("det_boxes")
        limits = torch.tensor([size[1], size[0]] * 2).float()
        clipped = torch.minimum(theirs.clamp(min=0), limits)
        labels = (ledger.peek("det_classes"), found.labels) if "det_classes" in ledger.arrays else None
        rows = matching(clipped, boxes, labels)
        if rows is None:
            return ledger.fail("det_boxes", f"{len(found)} boxes instead of {len(theirs)}")
        ours = torch.where(theirs == clipped, boxes[rows], theirs)
    else:
        rows = ledger.pair(("det_boxes", boxes), ("det_classes", found.labels), ("det_scores", found.scores))
        if rows is None:
            return None
        ours = boxes.masked_fill(~inside, torch.nan)[rows]
    ledger.compare("det_boxes", ours, note="compared inside of the image")
    ledger.compare("det_scores", found.scores[rows])
    ledger.equal("det_classes", found.labels[rows])


@part
def training(system: RetinaNet, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"(gt|train)_\w+"):
        return
    target = Instances(size, ledger.given("gt_boxes"), ledger.given("gt_classes").long())
    terms = system.losses(raw, [target])
    ledger.compare("train_loss_cls", terms["class"])
    ledger.compare("train_loss_box_reg", terms["box"])


SYSTEMS = {"retinanet": check}
