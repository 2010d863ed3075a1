"""Checks of FCIS against its authors' MXNet code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.box_stage import Assigned
from maskwright.ops import boxes as box_ops
from maskwright.ops.pooling import as_rois, position_sensitive_pool
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.fcis import FCIS, MASK_WEIGHT, STRIDE, Candidates, Raw, resized, to_image, vote
from tests.parity.ledger import Ledger, inputs, part

DROPPED = "without the deltas of background"


class Check:
    def __init__(self, system: FCIS, ledger: Ledger):
        self.system, self.ledger = system.eval(), ledger
        about = ledger.about
        self.images, (self.size, *_) = inputs(about)
        number = int(about.get("rpn_post_nms_top_n", system.proposal_rules.after[0]))
        system.proposal_rules = system.proposal_rules.__class__(
            **{**vars(system.proposal_rules), "after": (number, number)}
        )

    def run(self) -> None:
        with torch.no_grad():
            raw, stages = self.network()
            self.compare({name: value for name, value in stages.items() if name in self.ledger})
            if self.ledger.names(r"gt_boxes|gt_masks|proposal_.*|loss_.*|BoxAnnotator.*|.*_loss(\..*)?"):
                self.training(raw, stages["rpn_cls_score"], stages["rpn_bbox_pred"])
            else:
                self.detection(raw)

    def compare(self, values: dict[str, Tensor | float], note: str = "") -> None:
        for name, value in values.items():
            self.ledger.compare(name, value, note=note)

    def theirs(self, values: Tensor, each: int = 1, axis: int = 1) -> Tensor:
        """Background first, of our values with background last."""
        return values.roll(each, axis)

    def with_background(self, deltas: Tensor) -> Tensor:
        """Deltas preceded by those of background, which the library does not keep."""
        return torch.cat([torch.full_like(deltas, torch.nan), deltas], 1)

    # ---- network -----------------------------------------------------------------------------------------------------

    def network(self) -> tuple[Raw, dict[str, Any]]:
        dense = self.system.dense
        stages: dict[str, Any] = {}
        body: Any = dense.backbone

        def after(name: str) -> Callable[..., None]:
            return lambda module, given, output: stages.__setitem__(name, output.clone())

        def before(name: str) -> Callable[..., None]:
            return lambda module, given: stages.__setitem__(name, given[0].clone())

        reduce: Any = dense.reduce
        named: list[tuple[nn.Module, str]] = [
            (body.stem, "conv1_relu"), (body.stages[0], "res2c_relu"), (body.stages[1], "res3b3_relu"),
            (body.stages[2], "res4b22_relu"), (body.stages[3], "res5c_relu"), (dense.rpn.convs[0], "rpn_conv_3x3"),
            (dense.rpn.objectness, "rpn_cls_score"), (dense.rpn.deltas, "rpn_bbox_pred"),
            (reduce.conv, "conv_new_1"), (reduce, "relu_new_1"),
        ]  # fmt: skip
        hooks = [module.register_forward_hook(after(name)) for module, name in named]
        hooks.append(body.stages[0].register_forward_pre_hook(before("pool1")))
        hooks.append(dense.rpn.objectness.register_forward_pre_hook(before("rpn_relu")))
        raw = self.system(self.images)
        for hook in hooks:
            hook.remove()
        parts = self.system.parts**2
        stages["fcis_cls_seg"] = self.theirs(raw.scores, 2 * parts)
        self.ledger_boxes(raw)
        background, objects = stages["rpn_cls_score"].chunk(2, 1)
        probabilities = torch.stack([background, objects], 1).softmax(1)
        stages["rpn_cls_prob"] = probabilities.flatten(2, 3)
        return raw, stages

    def ledger_boxes(self, raw: Raw) -> None:
        if "fcis_bbox" in self.ledger:
            self.ledger.compare("fcis_bbox", self.with_background(raw.boxes), note=DROPPED)

    # ---- detection ---------------------------------------------------------------------------------------------------

    def pooled(self, raw: Raw, boxes: Tensor, suffix: str = "") -> None:
        """Both poolings of given boxes, and the scores and masks that follow."""
        system, ledger = self.system, self.ledger
        rois = as_rois([boxes])
        read = system.read(raw, rois)
        assert read.pairs is not None
        pairs = self.theirs(read.pairs)
        deltas = position_sensitive_pool(raw.boxes, rois, system.parts, system.side, 1 / STRIDE)
        scores = self.theirs(read.logits)
        values = {
            "psroipool_cls_seg": pairs.flatten(1, 2), "psroipool_cls": pairs.amax(2),
            "cls_score": scores[..., None, None], "seg_softmax": pairs.softmax(2).flatten(1, 2),
        }  # fmt: skip
        self.compare({f"{k}{suffix}": v for k, v in values.items() if f"{k}{suffix}" in ledger})
        for name, value in (("psroipool_bbox", deltas), ("bbox_pred", read.deltas[..., None, None])):
            if f"{name}{suffix}" in ledger:
                ledger.compare(f"{name}{suffix}", self.with_background(value), note=DROPPED)

    @part
    def detection(self, raw: Raw) -> None:
        system, ledger, about = self.system, self.ledger, self.ledger.about
        proposals = system.propose(raw, [self.size])
        ledger.compare("rois.output", as_rois(proposals))
        own = system.candidates(raw, [self.size])[0]
        half = len(proposals[0])
        first, second = own.boxes[:half], own.boxes[half:]
        ledger.compare("rois_iter2.output", as_rois([second]))
        self.pooled(raw, first, "#1")
        self.pooled(raw, second, "#2")
        scores = self.theirs(own.scores)
        masks = torch.stack([1 - own.masks, own.masks], 1)
        deltas = self.with_background(system.read(raw, as_rois([own.boxes])).deltas)
        self.compare(
            {
                "cls_prob#1": scores[:half], "cls_prob#2": scores[:half], "cls_prob#3": scores[half:],
                "cls_prob_concat": scores, "out_cls_prob": scores[None], "voting_in_scores": scores,
                "seg_pred_concat": masks, "out_seg_pred": masks, "voting_in_masks": masks[:, 1:],
                "seg_pred#1": masks[:half], "seg_pred#2": masks[half:], "out_rois": as_rois([own.boxes]),
            }
        )  # fmt: skip
        ledger.compare("box_pred_concat", deltas, note=DROPPED)
        ledger.compare("out_bbox_pred", deltas[None], note=DROPPED)
        if ledger.names(r"voting_in_boxes|vote.*|final_masks"):
            self.voting(own, float(about["im_info"][2]))

    @part
    def voting(self, own: Candidates, scale: float) -> None:
        ledger, about = self.ledger, self.ledger.about
        shape = ledger.shape("final_masks")[1:] or tuple(round(side / scale) for side in self.size)
        placement = Placement((shape[0], shape[1]), self.size, (scale, scale))
        boxes = to_image(own.boxes, placement)
        ledger.compare("voting_in_boxes", boxes)
        voted = vote(
            boxes, own.scores, own.masks, placement.image_size, score_threshold=about.get("score_thresh", 1e-3),
            nms_threshold=about["nms"], detections=about["max_per_image"], mask_threshold=about["binary_thresh"],
            merge_threshold=about["merge_thresh"],
        )  # fmt: skip
        order = voted.labels.argsort(stable=True)  # theirs are class by class
        found = torch.cat([voted.boxes, voted.scores[:, None]], 1)[order]
        for name in ("vote", "vote_gpu"):
            ledger.equal(f"{name}_classes", voted.labels[order] + 1)
            ledger.compare(f"{name}_boxes_scores", found)
            ledger.compare(f"{name}_masks21", voted.masks[order][:, None])
        planes = torch.zeros(len(order), *placement.image_size, dtype=torch.bool)
        for plane, box, mask in zip(planes, voted.boxes[order].int().tolist(), voted.masks[order], strict=True):
            x0, y0, x1, y1 = box
            plane[y0 : y1 + 1, x0 : x1 + 1] = resized(mask, (y1 - y0 + 1, x1 - x0 + 1)) >= about["binary_thresh"]
        ledger.compare_bits("final_masks", planes)

    # ---- training ----------------------------------------------------------------------------------------------------

    @part
    def training(self, raw: Raw, logits: Tensor, deltas: Tensor) -> None:
        system, ledger = self.system, self.ledger
        count = int(ledger.about.get("batch_rois_ohem", system.box_rules.sample))
        system.box_rules = system.box_rules.__class__(**{**vars(system.box_rules), "sample": count})
        self.proposal_losses(logits, deltas)
        proposals = system.propose(raw, [self.size])[0]
        ledger.compare("rois.output", as_rois([proposals]))
        truth = ledger.given("gt_boxes")[0]
        boxes, labels = truth[:, :4], truth[:, 4].long() - 1
        target = Instances(self.size, boxes, labels, Masks.from_dense(ledger.given("gt_masks")))
        own = system.assign(proposals, target)
        classes = len(system.classes)
        ledger.compare("proposal_annotator.rois_output", as_rois([own.boxes]))
        ledger.compare("proposal_annotator.label", (own.labels + 1) % (classes + 1))
        self.pooled(raw, own.boxes)
        self.second_stage(raw, own, target, count)

    def proposal_losses(self, logits: Tensor, deltas: Tensor) -> None:
        """The labels and the targets were random. A thin copy has only some of them, and so only some of the terms."""
        self.ledger.compare("rpn_bbox_loss.grad_scale", 1 / 256)
        self.proposal_classes(logits)
        self.proposal_boxes(deltas)

    @part
    def proposal_classes(self, logits: Tensor) -> None:
        if not self.ledger.names(r"proposal_label|rpn_cls_prob\.label|loss_rpn_cls"):
            return
        labels = self.ledger.given_in_part("proposal_label")
        self.ledger.compare("rpn_cls_prob.label", labels)
        if "loss_rpn_cls" in self.ledger:
            whole = self.ledger.given("proposal_label").long()
            pairs = logits.unflatten(1, (2, -1)).flatten(2)
            self.ledger.compare("loss_rpn_cls", functional.cross_entropy(pairs, whole, ignore_index=-1))

    @part
    def proposal_boxes(self, deltas: Tensor) -> None:
        ledger = self.ledger
        if not ledger.names(r"proposal_bbox_.*|rpn_bbox_loss|loss_rpn_bbox"):
            return
        names = ("proposal_bbox_target", "proposal_bbox_weight")
        goals, weights = (ledger.given_in_part(name) for name in names)
        beta = self.system.proposal_rules.beta
        each = weights * functional.smooth_l1_loss(deltas.double(), goals, beta=beta, reduction="none")
        ledger.compare("rpn_bbox_loss", each)
        if "loss_rpn_bbox" in ledger:
            for name in names:
                ledger.given(name)
            ledger.compare("loss_rpn_bbox", each.sum() / 256)

    def second_stage(self, raw: Raw, own: Assigned, target: Instances, count: int) -> None:
        system, ledger = self.system, self.ledger
        read = system.read(raw, as_rois([own.boxes]))
        assert read.pairs is not None
        classes, rows = len(system.classes), len(own.foreground)
        goals = box_ops.encode(own.boxes[:rows], target.boxes[own.owners], system.box_rules.weights, True)
        padded = own.boxes.new_zeros(len(own.boxes), 8)
        padded[:rows, 4:] = goals
        used = torch.zeros_like(padded)
        used[:rows, 4:] = 1
        ledger.compare("proposal_annotator.bbox_target", padded)
        ledger.compare("proposal_annotator.bbox_weight", used)
        masks = own.boxes.new_full((len(own.boxes), 1, system.side, system.side), -1)
        masks[:rows, 0] = system.mask_targets(own, target)
        ledger.compare("proposal_annotator.mask_reg_targets", masks)
        labels = (own.labels + 1) % (classes + 1)
        probabilities = self.theirs(read.logits).softmax(1)
        ledger.compare("cls_prob", probabilities)
        chosen = self.theirs(read.pairs)[torch.arange(len(labels)), labels]
        ledger.compare("seg_pred", chosen)
        ledger.compare("seg_prob", chosen.softmax(1))
        each = functional.smooth_l1_loss(read.deltas[:rows], goals, beta=1.0, reduction="none")
        losses = functional.cross_entropy(read.logits, own.labels, reduction="none")
        losses[:rows] += MASK_WEIGHT * functional.cross_entropy(
            chosen[:rows], masks[:rows, 0].long(), reduction="none"
        ).mean((1, 2))
        losses[:rows] += each.sum(1)
        kept = torch.zeros(len(labels), dtype=torch.bool)
        kept[losses.topk(count).indices] = True
        mined = torch.where(kept, labels, -1)
        for name in ("BoxAnnotatorOHEM.labels_ohem", "cls_prob.label"):
            ledger.compare(name, mined)
        for name in ("BoxAnnotatorOHEM.mask_targets_ohem", "seg_prob.label"):
            ledger.compare(name, torch.where(kept[:, None, None, None], masks, -1))
        ledger.compare("BoxAnnotatorOHEM.bbox_weights_ohem", used * kept[:, None])
        boxes = torch.zeros_like(padded)
        boxes[:rows, 4:] = each
        ledger.compare("bbox_loss", boxes * kept[:, None])
        ledger.compare("bbox_loss.grad_scale", 1 / count)
        terms = system.roi_losses(raw, [own], [target])
        for name, term in (("loss_cls", "class"), ("loss_mask", "mask"), ("loss_bbox", "box")):
            ledger.compare(name, terms[term])


def check(system: FCIS, layout: Path, ledger: Ledger) -> None:
    Check(system, ledger).run()


SYSTEMS = {"fcis": check}
