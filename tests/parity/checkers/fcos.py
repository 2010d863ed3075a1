"""Checks of FCOS against AdelaiDet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.structures import Instances, Placement
from maskwright.systems.families.fcos import FCOSSystem, Raw, Targets
from maskwright.systems.fcos import FCOS
from tests.parity.ledger import Ledger, inputs, part

TERMS = {"fcos_cls": "class", "fcos_loc": "box", "fcos_ctr": "centerness", "fcos_iou": "centerness"}


def network(system: FCOSSystem, raw: Raw, ledger: Ledger) -> None:
    """The pyramid and the raw outputs."""
    kinds = {"fpn": raw.features, "fcos_logits": raw.logits, "fcos_reg": raw.distances, "fcos_ctrness": raw.centerness}
    for kind, values in kinds.items():
        for name in ledger.names(rf"{kind}_p\d"):
            ledger.compare(name, values[int(name[-1]) - 3])


def targets(system: FCOSSystem, assigned: Targets, ledger: Ledger) -> None:
    """The assignment of locations."""
    owner = assigned.owner[0]
    labels = torch.full_like(owner, len(system.classes))
    labels[owner >= 0] = assigned.labels
    ledger.equal("target_labels", labels)
    positive = owner >= 0
    ledger.compare("target_reg", assigned.distances[0].masked_fill(~positive[:, None], torch.nan))
    if "target_gt_index" in ledger:
        ledger.equal("target_gt_index", torch.where(positive, owner, ledger.peek("target_gt_index")))


def check(system: FCOS, layout: Path, ledger: Ledger) -> None:
    system.eval()
    images, sizes = inputs(ledger.about)
    with torch.no_grad():
        raw = system(images)
    network(system, raw, ledger)
    levels = system.locations(raw)
    for name in ledger.names(r"locations_p\d.*"):
        own = levels[int(name.split("_")[1][1]) - 3]
        ledger.compare(name, own[: ledger.length(name)])
    limits: dict[str, Any] = {
        "nms_threshold": ledger.about.get("nms", 0.6), "detections": ledger.about.get("post_nms_topk", 100),
    }  # fmt: skip
    found = system.find(raw, sizes, None, **limits)[0]
    rows = ledger.pair(("det_boxes", found.boxes), ("det_classes", found.labels), ("det_scores", found.scores))
    if rows is None:
        return
    ledger.compare("det_boxes", found.boxes[rows])
    ledger.compare("det_scores", found.scores[rows])
    ledger.equal("det_classes", found.labels[rows])
    if ledger.names(r"det_(locations|levels)"):
        ledger.compare("det_locations", torch.cat(levels)[found.places[rows]])
        counts = torch.tensor([len(level) for level in levels]).cumsum(0)
        ledger.equal("det_levels", torch.bucketize(found.places[rows], counts, right=True))
    if ledger.names(r"out_(boxes|scores)"):
        shape = ledger.given("out_size").tolist() if "out_size" in ledger else [side * 3 // 2 for side in sizes[0]]
        out = (int(shape[0]), int(shape[1]))
        final = system.decode(raw, [Placement.resize(out, sizes[0])], **limits)[0]
        assert final.scores is not None
        own = ledger.pair(("out_boxes", final.boxes), None, ("out_scores", final.scores))
        if own is not None:
            ledger.compare("out_boxes", final.boxes[own])
            ledger.compare("out_scores", final.scores[own])
    training(system, raw, sizes[0], ledger)


@part
def training(system: FCOS, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"(gt|train|target)_\w+"):
        return
    boxes, labels = ledger.given("gt_boxes"), ledger.given("gt_classes").long()
    target = Instances(size, boxes, labels)
    targets(system, system.assign(raw, [target]), ledger)
    variants: dict[str, dict[str, Any]] = {
        "": {}, "iou_quality_": {"quality": "iou"}, "loc_iou_": {"box_loss": "iou"},
        "no_center_sampling_": {"radius": None},
    }  # fmt: skip
    with torch.no_grad():
        for prefix, changes in variants.items():
            before = {name: getattr(system, name) for name in changes}
            for name, value in changes.items():
                setattr(system, name, value)
            terms: dict[str, Tensor] = system.losses(raw, [target])
            for name in ledger.names(rf"train_{prefix}loss_fcos_\w+"):
                ledger.compare(name, terms[TERMS[name.split("loss_", 1)[1]]])
            for name, value in before.items():
                setattr(system, name, value)


SYSTEMS = {"fcos": check}
