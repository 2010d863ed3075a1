"""H-Deformable-DETR, the frozen detector of Mask Frozen-DETR, as its authors' code answers at inference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from maskwright.ops.boxes import clip
from maskwright.structures import Placement
from tests.parity.ledger import Ledger


def pictures(ledger: Ledger) -> tuple[torch.Tensor, tuple[int, int]]:
    """The input on its canvas, and how much of that it fills."""
    text = str(ledger.about["input"])
    found = re.search(r"RandomState\((\d+)\)[^(]*\((\d+),\s*(\d+),\s*(\d+),\s*(\d+)\)", text)
    if found is None:
        raise ValueError(f"cannot tell the input from {text!r}")
    seed, *shape = (int(v) for v in found.groups())
    images = torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype("float32"))
    size = (shape[2], shape[3])
    canvas = re.search(r"zeros \((\d+),\s*(\d+)\)", text)
    if canvas is not None:
        images = functional.pad(images, (0, int(canvas[2]) - size[1], 0, int(canvas[1]) - size[0]))
    return images, size


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    images, size = pictures(ledger)
    valid = torch.tensor([list(size)] * len(images))
    kept: dict[str, Any] = {}
    hook = system.backbone.register_forward_hook(lambda module, given, answer: kept.update(levels=answer))
    with torch.no_grad():
        raw = system.eval()(images, valid)
    hook.remove()
    for name in ledger.names(r"backbone_\d"):
        ledger.compare(name, kept["levels"][int(name[-1]) + 1])
    ledger.compare("encoder_memory", raw.memory)
    ledger.compare("enc_logits", raw.proposal_logits)
    ledger.compare("decoder_last", raw.queries)
    ledger.compare("pred_logits", raw.logits[-1])
    ledger.compare("pred_boxes", raw.boxes[-1])
    if "det_scores" in ledger:
        height, width = ledger.about["original_size"]
        placement, count = Placement.resize((height, width), size), len(ledger.peek("det_scores"))
        boxes, labels, scores = (part[0] for part in system.best(raw, count))
        boxes = placement.boxes_to_picture(boxes * torch.tensor([size[1], size[0], size[1], size[0]]))
        ledger.compare("det_scores", scores)
        ledger.equal("det_labels", labels)
        ledger.compare("det_boxes", boxes)
        found = system.decode(raw, [placement], score_threshold=0.0, detections=count)[0]
        same = torch.equal(found.scores, scores) and torch.equal(found.boxes, clip(boxes, (height, width)))
        ledger._line("det_decode", f"{len(found)} objects, clipped to the picture", same)


SYSTEMS = {"h-detr": check}
FILES = ("mask-frozen-detr-hdetr_r50",)
