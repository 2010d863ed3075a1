"""Checks of CenterMask against CenterMask2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.centermask import CenterMask, box_level
from maskwright.systems.families.fcos import Raw
from maskwright.systems.panoptic_fcos import PanopticCenterMask
from tests.parity.checkers.fcos import network
from tests.parity.checkers.mask_rcnn import DEEP, with_gradients
from tests.parity.checkers.panoptic_fpn import segmented
from tests.parity.ledger import Ledger, inputs, part

TERMS = {"fcos_cls": "class", "fcos_loc": "box", "fcos_ctr": "centerness", "mask": "mask", "maskiou": "mask_iou"}


def target_of(ledger: Ledger, size: tuple[int, int]) -> Instances:
    masks = Masks.from_polygons([[ring] for ring in ledger.given("gt_polygons").numpy()], size)
    return Instances(size, ledger.given("gt_boxes"), ledger.given("gt_classes").long(), masks)


def check(system: CenterMask, layout: Path, ledger: Ledger) -> None:
    system.eval()
    if with_gradients(ledger):
        return gradients(system, ledger)
    images, sizes = inputs(ledger.about)
    stages: list[Tensor] = []
    hook = system.dense.backbone.register_forward_hook(lambda module, given, answer: stages.extend(answer))
    with torch.no_grad():
        raw = system(images)
        hook.remove()
        for name in ledger.names(r"backbone_stage\d"):
            ledger.compare(name, stages[int(name[-1]) - 2])
        network(system, raw, ledger)
        given(system, raw, sizes[0], ledger)
        detections(system, raw, sizes[0], ledger)
        if isinstance(system, PanopticCenterMask):
            segmented(system, raw, sizes[0], ledger, ledger.about.get("post_nms_topk", 50))
        training(system, raw, sizes[0], ledger)


@part
def given(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"given_\w+"):
        return
    boxes = ledger.given("given_boxes")
    labels = torch.arange(len(boxes))
    ledger.equal("given_levels", box_level(boxes, size))
    features = system.pooled(raw, [boxes], [size])
    ledger.compare("given_mask_pooled_first2", features[:2])
    ledger.compare("given_mask_logits", system.masks(features))
    masks, quality = system.read_boxes(raw, [boxes], [labels], [size])
    ledger.compare("given_mask_probs", masks[0][:, None])
    if system.mask_iou is None:
        return
    ledger.compare("given_maskiou", system.mask_iou(features, masks[0]))
    ledger.compare("given_mask_scores", quality[0] * torch.linspace(0.9, 0.4, len(boxes)))


@part
def detections(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    limits: dict[str, Any] = {
        "nms_threshold": ledger.about.get("fcos_nms", 0.6), "detections": ledger.about.get("post_nms_topk", 50),
    }  # fmt: skip
    found = system.find(raw, [size], None, **limits)[0]
    rows = torch.arange(len(found.boxes))
    for prefix in ("fcos", "det"):
        own = ledger.pair(
            (f"{prefix}_boxes", found.boxes), (f"{prefix}_classes", found.labels), (f"{prefix}_scores", found.scores)
        )
        if own is None:
            return
        if prefix == "fcos" or ledger.names(r"det_(boxes|scores)"):
            rows = own
        ledger.compare(f"{prefix}_boxes", found.boxes[rows])
        ledger.compare(f"{prefix}_scores", found.scores[rows])
        ledger.equal(f"{prefix}_classes", found.labels[rows])
        if prefix == "fcos":
            ledger.compare("fcos_locations", torch.cat(system.locations(raw))[found.places[rows]])
    if not ledger.names(r"(det_mask|out)_\w+"):
        return
    masks, quality = system.read_boxes(raw, [found.boxes], [found.labels], [size])
    ledger.compare("det_mask_probs", masks[0][rows][:, None])
    ledger.compare("det_mask_scores", (found.scores * quality[0])[rows])
    if not ledger.names(r"out_(boxes|scores|classes|masks|mask_scores)"):
        return
    out = tuple(int(side) for side in ledger.given("out_size").tolist())
    final = system.decode(raw, [Placement.resize(out, size)], score_of="box", **limits)[0]
    assert final.scores is not None
    rows = ledger.pair(("out_boxes", final.boxes), ("out_classes", final.labels), ("out_scores", final.scores))
    if rows is None:
        return
    final = final[rows]
    ledger.compare("out_boxes", final.boxes)
    assert final.scores is not None
    ledger.compare("out_scores", final.scores)
    ledger.equal("out_classes", final.labels)
    every = found.scores * quality[0]
    scaled = found.boxes * torch.tensor([out[1] / size[1], out[0] / size[0]] * 2)
    clipped = torch.minimum(scaled.clamp(min=0), torch.tensor([out[1], out[0]] * 2).float())
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
    own = ledger.pair(("out_boxes", clipped[kept]), ("out_classes", found.labels[kept]))
    if own is not None:
        ledger.compare("out_mask_scores", every[kept][own])
    assert final.masks is not None
    ledger.compare_bits("out_masks", final.masks[: ledger.length("out_masks")].dense())


@part
def training(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    if not ledger.names(r"(fcos_target|train)_\w+"):
        for name in ledger.names(r"gt_\w+"):
            ledger.given(name)
        return
    target = target_of(ledger, size)
    assigned = system.assign(raw, [target])
    owner = assigned.owner[0]
    labels = torch.full_like(owner, len(system.classes))
    labels[owner >= 0] = assigned.labels
    ledger.equal("fcos_target_labels", labels)
    # Locations that are not positive have the distances to the first object, in the original too.
    ledger.compare("fcos_target_reg", assigned.distances[0])
    terms = system.losses(raw, [target])
    for name in ledger.names(r"train_loss_\w+"):
        ledger.compare(name, terms[TERMS[name.removeprefix("train_loss_")]])
    names = ledger.names(r"train_given_loss_\w+")
    boxes = system.roi_losses(raw, [ledger.given("given_boxes")], [target]) if names else {}
    for name in names:
        ledger.compare(name, boxes[TERMS[name.removeprefix("train_given_loss_")]])


@part
def gradients(system: CenterMask, ledger: Ledger) -> None:
    source = Ledger(ledger.path.with_name(ledger.path.name.replace("-grad", "")))
    images, sizes = inputs({**source.about, **ledger.about, "input": source.about["input"]})
    system.zero_grad()
    terms = system.losses(system(images), [target_of(source, sizes[0])])
    for name in ledger.names(r"loss_\w+"):
        ledger.compare(name, terms[TERMS[name.removeprefix("loss_loss_")]])
    total = sum(terms.values(), torch.zeros(()))
    ledger.compare("total", total)
    total.backward()
    gradients_of(system, ledger, "centermask2")


def gradients_of(system: Any, ledger: Ledger, origin_name: str) -> None:
    """Norm and sum of the gradient of every parameter."""
    import re

    from maskwright.checkpoints.origins import origins

    origin = next(o for o in origins() if o.name == origin_name and o.system == system.name)
    ours = dict(system.named_parameters())

    def renamed(key: str) -> str:
        for pattern, replacement in origin.rename:
            key = re.sub(pattern, replacement, key)
        shapeless = {key: torch.zeros(1)}
        return next(iter(origin.finish(shapeless, system.options))) if key not in ours else key

    names = ledger.texts("names")
    unused = ledger.texts("no_grad_names") if "no_grad_names" in ledger else []
    wrong = [n for n in names if renamed(n) not in ours or ours[renamed(n)].grad is None]
    if wrong:
        return ledger.fail("names", f"without a gradient: {wrong[:5]} of {len(wrong)}")
    still = [n for n in unused if renamed(n) in ours and ours[renamed(n)].grad is not None
             and float(ours[renamed(n)].grad.abs().sum()) > 0]  # pyright: ignore[reportOptionalMemberAccess]  # fmt: skip
    if still:
        return ledger.fail("no_grad_names", f"with a gradient: {still}")
    grads = [ours[renamed(n)].grad.double() for n in names]  # pyright: ignore[reportOptionalMemberAccess]
    ledger.compare("grad_norm", torch.stack([g.norm() for g in grads]), 1e-4, DEEP)
    sizes = torch.stack([g.abs().sum() for g in grads])
    ledger.compare("grad_sum", torch.stack([g.sum() for g in grads]), 1e-4, DEEP, scale=sizes)


SYSTEMS = {"centermask": check, "panoptic-centermask": check}
FILES = ("centermask2",)
