"""Checks of CenterMask against CenterMask2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.centermask import CenterMask, box_level
from maskwright.systems.families.fcos import Raw
from tests.parity.checkers.fcos import network
from tests.parity.checkers.mask_rcnn import DEEP
from tests.parity.ledger import Ledger, inputs, matching

TERMS = {"fcos_cls": "class", "fcos_loc": "box", "fcos_ctr": "centerness", "mask": "mask", "maskiou": "mask_iou"}


def target_of(ledger: Ledger, size: tuple[int, int]) -> Instances:
    masks = Masks.from_polygons([[ring] for ring in ledger.given("gt_polygons").numpy()], size)
    return Instances(size, ledger.given("gt_boxes"), ledger.given("gt_classes").long(), masks)


def check(system: CenterMask, layout: Path, ledger: Ledger) -> None:
    system.eval()
    if "grad_norm" in ledger:
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
        training(system, raw, sizes[0], ledger)


def given(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    boxes = ledger.given("given_boxes")
    labels = torch.arange(len(boxes))
    ledger.equal("given_levels", box_level(boxes, size))
    features = system.pooled(raw, [boxes], [size])
    ledger.compare("given_mask_pooled_first2", features[:2])
    ledger.compare("given_mask_logits", system.masks(features))
    masks, quality = system.read_boxes(raw, [boxes], [labels], [size])
    ledger.compare("given_mask_probs", masks[0][:, None])
    assert system.mask_iou is not None
    ledger.compare("given_maskiou", system.mask_iou(features, masks[0]))
    ledger.compare("given_mask_scores", quality[0] * torch.linspace(0.9, 0.4, len(boxes)))


def detections(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    limits: dict[str, Any] = {
        "nms_threshold": ledger.about.get("fcos_nms", 0.6), "detections": ledger.about.get("post_nms_topk", 50),
    }  # fmt: skip
    found = system.find(raw, [size], None, **limits)[0]
    for prefix in ("fcos", "det"):
        boxes = ledger.peek(f"{prefix}_boxes")
        rows = matching(boxes, found.boxes, (ledger.peek(f"{prefix}_classes"), found.labels))
        if rows is None:
            return ledger.fail(f"{prefix}_boxes", f"{len(found.boxes)} boxes instead of {len(boxes)}")
        ledger.compare(f"{prefix}_boxes", found.boxes[rows])
        ledger.compare(f"{prefix}_scores", found.scores[rows])
        ledger.equal(f"{prefix}_classes", found.labels[rows])
        if prefix == "fcos":
            ledger.compare("fcos_locations", torch.cat(system.locations(raw))[found.places[rows]])
    masks, quality = system.read_boxes(raw, [found.boxes], [found.labels], [size])
    ledger.compare("det_mask_probs", masks[0][rows][:, None])
    ledger.compare("det_mask_scores", (found.scores * quality[0])[rows])
    out = tuple(int(side) for side in ledger.given("out_size").tolist())
    final = system.decode(raw, [Placement.resize(out, size)], score_of="box", **limits)[0]
    theirs = ledger.peek("out_boxes")
    rows = matching(theirs, final.boxes, (ledger.peek("out_classes"), final.labels))
    if rows is None:
        return ledger.fail("out_boxes", f"{len(final)} boxes instead of {len(theirs)}")
    final = final[rows]
    ledger.compare("out_boxes", final.boxes)
    assert final.scores is not None
    ledger.compare("out_scores", final.scores)
    ledger.equal("out_classes", final.labels)
    every = found.scores * quality[0]
    scaled = found.boxes * torch.tensor([out[1] / size[1], out[0] / size[0]] * 2)
    clipped = torch.minimum(scaled.clamp(min=0), torch.tensor([out[1], out[0]] * 2).float())
    own = matching(theirs, clipped[(clipped[:, 2:] > clipped[:, :2]).all(1)])
    assert own is not None
    ledger.compare("out_mask_scores", every[(clipped[:, 2:] > clipped[:, :2]).all(1)][own])
    assert final.masks is not None
    ledger.compare_bits("out_masks", final.masks[: int(ledger.arrays["out_masks__shape"][0])].dense())


def training(system: CenterMask, raw: Raw, size: tuple[int, int], ledger: Ledger) -> None:
    target = target_of(ledger, size)
    assigned = system.assign(raw, [target])
    owner = assigned.owner[0]
    labels = torch.full_like(owner, len(system.classes))
    labels[owner >= 0] = assigned.labels
    ledger.equal("fcos_target_labels", labels)
    # Locations that are not positive have the distances to the first object, in the original too.
    ledger.compare("fcos_target_reg", assigned.distances[0])
    terms = system.losses(raw, [target])
    boxes = system.roi_losses(raw, [ledger.given("given_boxes")], [target])
    for prefix, own in (("train_loss_", terms), ("train_given_loss_", boxes)):
        for name in ledger.names(rf"{prefix}\w+"):
            ledger.compare(name, own[TERMS[name.removeprefix(prefix)]])


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

    names = [str(n) for n in ledger.arrays["names"]]
    unused = [str(n) for n in ledger.arrays["no_grad_names"] if n]
    ledger.seen |= {"names", "no_grad_names"}
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


SYSTEMS = {"centermask": check}
FILES = ("centermask2",)
