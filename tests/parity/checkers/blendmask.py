"""Checks of BlendMask against AdelaiDet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskwright.blocks import fcos
from maskwright.structures import Instances, Placement
from maskwright.systems.blendmask import BlendMask, label_grid
from maskwright.systems.families.fcos import Raw
from maskwright.systems.panoptic_fcos import PanopticBlendMask
from tests.parity.checkers.centermask import gradients_of, target_of
from tests.parity.checkers.fcos import TERMS, network
from tests.parity.checkers.mask_rcnn import with_gradients
from tests.parity.checkers.panoptic_fpn import segmented
from tests.parity.ledger import Ledger, inputs, part

NAMES = {**TERMS, "mask": "mask", "basis_sem": "semantic"}


def check(system: BlendMask, layout: Path, ledger: Ledger) -> None:
    system.eval()
    if with_gradients(ledger):
        return gradients(system, ledger)
    images, sizes = inputs(ledger.about)
    with torch.no_grad():
        raw = system(images)
        network(system, raw, ledger)
        for name in ledger.names(r"top_feat_p\d.*"):
            own = raw.top[int(name.split("_")[2][1]) - 3]
            count = re.search(r"__sampled(\d+)$", name)
            if count:
                places = np.random.RandomState(0).randint(0, own.numel(), int(count[1]))
                own = own.flatten()[torch.from_numpy(places)]
            ledger.compare(name, own)
        bases = system.bases(raw.features)
        ledger.compare("bases", bases)
        if "sem_head_logits" in ledger:
            assert system.semantic is not None
            ledger.compare("sem_head_logits", system.semantic(raw.features[0]))
        if ledger.names(r"given_\w+"):
            given(system, bases, ledger)
        detections(system, raw, sizes[0], ledger)
        if isinstance(system, PanopticBlendMask):
            segmented(system, raw, sizes[0], ledger, ledger.about.get("post_nms_topk", 100))
        training(system, raw, sizes[0], ledger)


@part
def given(system: BlendMask, bases: torch.Tensor, ledger: Ledger) -> None:
    pooled = system.pooled(bases, [ledger.given("given_boxes")])
    ledger.compare("given_rois", pooled)
    ledger.compare("given_mask_logits", system.blended(pooled, ledger.given("given_attn")).flatten(1))


@part
def detections(system: BlendMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    limits: dict[str, Any] = {
        "nms_threshold": ledger.about.get("nms", 0.6), "detections": ledger.about.get("post_nms_topk", 100),
    }  # fmt: skip
    found = system.find(raw, [size], None, ranked_by="product", **limits)
    rows = ledger.pair(
        ("fcos_boxes", found[0].boxes), ("fcos_classes", found[0].labels), ("fcos_scores", found[0].scores)
    )
    if rows is None:
        return
    ledger.compare("fcos_boxes", found[0].boxes[rows])
    ledger.compare("fcos_scores", found[0].scores[rows])
    ledger.equal("fcos_classes", found[0].labels[rows])
    attention = torch.cat([top.flatten(2).transpose(1, 2) for top in raw.top], 1)[0, found[0].places]
    ledger.compare("fcos_top_feat", attention[rows])
    if "det_mask_probs" in ledger:
        ledger.compare("det_mask_probs", system.read_boxes(raw, found)[0][rows][:, None])
    if not ledger.names(r"out_(boxes|scores|classes|masks)"):
        return
    out = tuple(int(side) for side in ledger.given("out_size").tolist())
    final = system.decode(raw, [Placement.resize(out, size)], **limits)[0]
    assert final.scores is not None
    own = ledger.pair(("out_boxes", final.boxes), ("out_classes", final.labels), ("out_scores", final.scores))
    if own is None:
        return
    final = final[own]
    ledger.compare("out_boxes", final.boxes)
    assert final.scores is not None
    ledger.compare("out_scores", final.scores)
    ledger.equal("out_classes", final.labels)
    assert final.masks is not None
    ledger.compare_bits("out_masks", final.masks[: ledger.length("out_masks")].dense())


@part
def training(system: BlendMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"(gt|train)_\w+"):
        return
    target = target_of(ledger, size)
    assigned = system.assign(raw, [target])
    positive = assigned.positive[0].nonzero().flatten()
    ledger.equal("train_pos_inds", positive)
    ledger.equal("train_gt_inds", assigned.owner[0, positive])
    weights = fcos.centerness(assigned.distances[0, positive])
    ledger.compare("train_gt_ctrs", weights)
    ledger.compare("train_loss_denorm", weights.sum())
    terms = system.losses(raw, [target])
    if "gt_basis_sem" in ledger or "train_loss_basis_sem" in ledger:
        terms.pop("semantic", None)
        semantic_term(system, raw, target, terms, ledger)
    for name in ledger.names(r"train_loss_(fcos_\w+|mask|basis_sem)"):
        if NAMES[name.removeprefix("train_loss_")] in terms:
            ledger.compare(name, terms[NAMES[name.removeprefix("train_loss_")]])


@part
def semantic_term(
    system: BlendMask, raw: Raw, target: Instances, terms: dict[str, torch.Tensor], ledger: Ledger
) -> None:
    plane = ledger.given("gt_basis_sem")  # of boxes, as the original's preparation painted it
    assert system.semantic is not None
    labels = plane[::8, ::8].long()[None]
    terms["semantic"] = system.blend.semantic_weight * torch.nn.functional.cross_entropy(
        system.semantic(raw.features[0]), labels
    )
    assert label_grid(target, 8, labels.shape[1:]).shape == labels.shape[1:]


@part
def gradients(system: BlendMask, ledger: Ledger) -> None:
    source = Ledger(ledger.path.with_name(ledger.path.name.replace("-grad", "")))
    images, sizes = inputs({**source.about, **ledger.about, "input": source.about["input"]})
    system.zero_grad()
    raw = system(images)
    terms = system.losses(raw, [target_of(source, sizes[0])])
    assert system.semantic is not None
    labels = source.given("gt_basis_sem")[::8, ::8].long()[None]
    terms["semantic"] = system.blend.semantic_weight * torch.nn.functional.cross_entropy(
        system.semantic(raw.features[0]), labels
    )
    for name in ledger.names(r"loss_\w+"):
        ledger.compare(name, terms[NAMES[name.removeprefix("loss_loss_")]])
    total = sum(terms.values(), torch.zeros(()))
    ledger.compare("total", total)
    total.backward()
    gradients_of(system, ledger, "adelaidet")


SYSTEMS = {"blendmask": check, "panoptic-blendmask": check}
