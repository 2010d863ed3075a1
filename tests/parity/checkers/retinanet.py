"""Checks of RetinaNet against detectron2."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwright.structures import Instances, Placement
from maskwright.systems.retinanet import RetinaNet
from tests.parity.ledger import Ledger, inputs, matching


def check(system: RetinaNet, layout: Path, ledger: Ledger) -> None:
    system.eval()
    images, sizes = inputs(ledger.about)
    with torch.no_grad():
        raw = system(images)
        for kind, values in (("fpn", raw.features), ("logits", raw.logits), ("deltas", raw.deltas)):
            for name in ledger.names(rf"{kind}_p\d"):
                ledger.compare(name, values[int(name[-1]) - 3])
        found = system.decode(
            raw, [Placement.identity(sizes[0])], detections=ledger.about.get("detections", 100),
            nms_threshold=ledger.about.get("nms", 0.5), candidates=ledger.about.get("topk_candidates", 1000),
        )[0]  # fmt: skip
        height, width = sizes[0]
        theirs = ledger.peek("det_boxes")  # not clipped
        clipped = torch.minimum(theirs.clamp(min=0), torch.tensor([width, height] * 2).float())
        rows = matching(clipped, found.boxes, (ledger.peek("det_classes"), found.labels))
        if rows is None:
            return ledger.fail("det_boxes", f"{len(found)} boxes instead of {len(theirs)}")
        ours = torch.where(theirs == clipped, found.boxes[rows], theirs)
        ledger.compare("det_boxes", ours, note="compared inside of the image")
        assert found.scores is not None
        ledger.compare("det_scores", found.scores[rows])
        ledger.equal("det_classes", found.labels[rows])
        target = Instances(sizes[0], ledger.given("gt_boxes"), ledger.given("gt_classes").long())
        terms = system.losses(raw, [target])
    ledger.compare("train_loss_cls", terms["class"])
    ledger.compare("train_loss_box_reg", terms["box"])


SYSTEMS = {"retinanet": check}
