"""H-Deformable-DETR, the frozen detector of Mask Frozen-DETR: outputs of its authors' code in inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maskwright.ops.boxes import clip
from maskwright.structures import Placement
from tests.parity.ledger import Ledger, placed


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    images, valid = placed(ledger.about)
    size = (int(valid[0, 0]), int(valid[0, 1]))
    kept: dict[str, Any] = {}
    hook = system.dense.backbone.register_forward_hook(lambda module, inputs, levels: kept.update(levels=levels))
    with torch.no_grad():
        raw = system.eval()(images, valid)
    hook.remove()
    for name in ledger.names(r"backbone_\d"):
        ledger.compare(name, kept["levels"][int(name[-1]) + 1])
    for name, ours in (
        ("encoder_memory", raw.memory),
        ("enc_logits", raw.proposal_logits),
        ("decoder_last", raw.queries),
        ("pred_logits", raw.logits[-1]),
        ("pred_boxes", raw.boxes[-1]),
    ):
        if name in ledger:
            ledger.compare(name, ours)
    if ledger.names(r"det_\w+"):
        height, width = ledger.about["original_size"]
        count = next(ledger.length(name) for name in ledger.names(r"det_\w+"))
        placement = Placement.resize((height, width), size)
        boxes, labels, scores = (part[0] for part in system.best(raw, count))
        boxes = placement.boxes_to_image(boxes * torch.tensor([size[1], size[0], size[1], size[0]]))
        ledger.compare("det_scores", scores)
        ledger.equal("det_labels", labels)
        ledger.compare("det_boxes", boxes)
        objects = system.decode(raw, [placement], score_threshold=0.0, detections=count)[0]
        same = torch.equal(objects.scores, scores) and torch.equal(objects.boxes, clip(boxes, (height, width)))
        ledger._line("det_decode", f"{len(objects)} objects, clipped to the image", same)


SYSTEMS = {"h-detr": check}
FILES = ("mask-frozen-detr-hdetr_r50",)
