"""Checks of PointRend, inside boxes and on whole images, against detectron2's project."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maskwright.blocks.points import sample_in_boxes
from maskwright.blocks.rpn import propose
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.points import box_points, class_uncertainty, mask_sample
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.families.two_stage import Raw
from maskwright.systems.pointrend import PointRend
from maskwright.systems.pointrend_semantic import PointRendSemantic
from tests.parity.checkers.mask_rcnn import Check as BoxCheck
from tests.parity.ledger import LARGEST, RAW, Ledger, bare_shape, input_seed, inputs, part

SMALL = "cells are selected for logits near zero, where rounding is relatively large"
TIES = "the order of equally uncertain cells is undefined"


def check(system: PointRend, layout: Path, ledger: Ledger) -> None:
    Check(system, ledger).run()


def images_of(system: PointRend | PointRendSemantic, ledger: Ledger) -> Tensor:
    shape = bare_shape(ledger.about)
    if shape is None:
        return inputs(ledger.about)[0]

    def drawn(seed: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))

    def coarsest(seed: int) -> Tensor:
        assert system.dense.neck is not None
        return system.dense.neck(system.dense.backbone(drawn(seed)))[3]

    return drawn(input_seed(ledger, "fpn_p5", coarsest))


def compare_cells(ledger: Ledger, name: str, ours: Tensor, tied: Tensor) -> None:
    """Compares indices of cells, except those of tied cells."""
    theirs, shape, chosen = ledger._answer(name)
    if tuple(ours.shape) != tuple(shape):
        return ledger.fail(name, f"shape {tuple(ours.shape)}, expected {tuple(shape)}")
    mine, loose = ours.flatten().numpy(), tied.flatten().numpy()
    if chosen is not None:
        mine, loose = mine[chosen], loose[chosen]
    wrong = int(((mine != theirs.reshape(-1)) & ~loose).sum())
    ledger._line(name, f"{wrong} of {len(mine)} differ, {int(loose.sum())} are tied [{TIES}]", wrong == 0)


POINTS = r"coarse_\w+|parameters|step\d_\w+|given_(classes|mask_logits_of_class)|final_\w+|det_boxes_net|box_\w+"
POINTS += r"|train_(point|gt)\w+|loss_\w+"


class Check(BoxCheck):
    system: PointRend  # pyright: ignore[reportIncompatibleVariableOverride]

    def run(self) -> None:
        ledger, about = self.ledger, self.ledger.about
        if not ledger.names(POINTS):
            return super().run()
        with torch.no_grad():
            images = images_of(self.system, ledger)
            size = tuple(about.get("image_size", images.shape[-2:]))
            raw = self.system(images)
            self.network(raw, [])
            self.first_stage(raw, size)
            self.given_boxes(raw, size)
            self.objects(raw, size)

    @part
    def given_boxes(self, raw: Raw, size: tuple[int, int]) -> None:
        ledger = self.ledger
        if not ledger.names(r"coarse_\w+|parameters|step\d_\w+|given_mask_\w+|train_\w+|loss_\w+"):
            return
        boxes, labels = ledger.given("given_boxes"), ledger.given("given_classes")
        self.refinement(raw, boxes, labels)
        if ledger.names(r"train_\w+|loss_\w+"):
            self.mask_terms(raw, boxes, labels, size)

    def first_stage(self, raw: Raw, size: tuple[int, int]) -> None:
        ledger, system = self.ledger, self.system
        kept = ledger.about.get("rpn_post_nms", 1000)
        system.proposal_rules = replace(system.proposal_rules, after=(kept, kept))
        found, logits = propose(
            raw.objectness, raw.deltas, system.anchors(raw.features, raw.size), [size], system.proposal_rules
        )[0]
        rows = self.boxes("proposals", found, {"proposal_logits": logits})
        if rows is None:
            return
        inside = found[rows]
        pooled = system.pooler(raw.features, [inside], system.box_side)
        ledger.compare("box_pooled", pooled)
        read = []
        hook = system.boxes.fcs[-1].register_forward_hook(lambda module, given, answer: read.append(answer))
        logits, deltas = system.boxes(pooled)
        hook.remove()
        ledger.compare("box_head", read[0].relu())
        ledger.compare("box_scores", logits)
        ledger.compare("box_deltas", deltas)

    def refinement(self, raw: Raw, boxes: Tensor, labels: Tensor) -> None:
        ledger, system = self.ledger, self.system
        pooled = system.mask_features(raw, [boxes])
        ledger.compare("coarse_pooled", pooled)
        assert system.masks is not None
        coarse = system.masks(pooled)  # of the implicit variant: the parameters of each box's network
        for name in ledger.names("coarse_logits|parameters"):
            ledger.compare(name, coarse)
        predicted: list[tuple[Tensor, Tensor]] = []

        class Recorded(type(system.refinement)):  # pyright: ignore[reportGeneralTypeIssues]
            def predict(self, network: Any, feature: Any, coarse: Any, boxes: Any, labels: Any, points: Tensor) -> Any:
                found = super().predict(network, feature, coarse, boxes, labels, points)
                predicted.append((points, found))
                return found

        refiner = Recorded(**vars(system.refinement))
        final = refiner.refine(system.points, raw.features[0], coarse, [boxes], labels, budget=1 << 40)  # pyright: ignore[reportArgumentType]
        for step, (places, found) in enumerate(predicted):
            tied = torch.zeros(places.shape[:2], dtype=torch.bool)
            name = f"step{step}_indices"
            if step:  # the first step predicts all cells
                side = 28 << step
                column, row = (places * side).floor().long().unbind(-1)
                cells = row * side + column
                order, tied = self.their_order(name, cells, self.before(predicted, step))
                cells, places = cells.gather(1, order), places.gather(1, order[..., None].expand_as(places))
                found = found.gather(2, order[:, None])
                if name in ledger:
                    compare_cells(ledger, name, cells, tied)
            lost, note = tied[..., None].expand_as(places), TIES if tied.any() else ""
            ledger.compare(f"step{step}_point_coords", places.masked_fill(lost, torch.nan), note=note)
            fine = sample_in_boxes(raw.features[0], [boxes], places, 4)
            lost = tied[:, None].expand_as(fine)
            ledger.compare(f"step{step}_fine_features", fine.masked_fill(lost, torch.nan), note=note)
            near = found[:, 0].masked_fill(tied, torch.nan)
            ledger.compare(f"step{step}_logits_of_class", near, LARGEST if step else RAW, SMALL * bool(step), note)
        ledger.compare("given_mask_logits_of_class", final)

    def their_order(self, name: str, cells: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of our cells in the original's order, and which of them cannot be compared: those as uncertain
        as the last selected one, for which another may have been selected; if only a part of the order was recorded,
        all that are as uncertain as another one."""
        values = logits.gather(1, cells).abs()
        close = 5e-6 * logits.abs().amax(1, keepdim=True)  # rounding is relative to the summands
        last = values[:, -1:] - values < close
        own = torch.arange(cells.shape[1]).expand_as(cells)
        if name not in self.ledger.arrays:
            near = values.diff(dim=1) < close
            none = torch.zeros(len(values), 1, dtype=torch.bool)
            return own, last | torch.cat([near, none], 1) | torch.cat([none, near], 1)
        theirs = self.ledger.peek(name).long()
        ours, order = cells.sort(1)
        place = torch.searchsorted(ours, theirs).clamp(max=cells.shape[1] - 1)
        order = order.gather(1, place)
        return order, last.gather(1, order) & (cells.gather(1, order) != theirs)

    @staticmethod
    def before(predicted: list[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """The logits of each box's class after the upsampling of `step`, before its points are predicted: these
        determine the uncertainty."""
        plane = predicted[0][1].unflatten(2, (28, 28))
        for places, found in predicted[1:step]:
            plane = functional.interpolate(plane, scale_factor=2.0, mode="bilinear", align_corners=False)
            width = plane.shape[-1]
            column, row = (places * width).floor().long().unbind(-1)
            flat = plane.flatten(2).scatter(2, (row * width + column)[:, None], found)
            plane = flat.unflatten(2, (width, width))
        plane = functional.interpolate(plane, scale_factor=2.0, mode="bilinear", align_corners=False)
        return plane.flatten(1)

    def objects(self, raw: Raw, size: tuple[int, int]) -> None:
        ledger, system = self.ledger, self.system
        limits = self.thresholds()
        boxes, scores, labels = system.find(raw, [size], *limits.values())[0]
        rows = self.boxes("det_boxes_net", boxes, {"det_scores": scores}, ("det_classes", labels))
        if rows is None:
            return
        masks, _ = system.read_boxes(raw, [boxes], [labels])
        assert masks[0] is not None
        found = masks[0][rows][:, None]
        if not len(rows):  # the original does not upsample without objects
            found = found[:, :, :28, :28]
        ledger.compare("det_mask_prob", found)
        out = tuple(ledger.about["output_size"])
        final = system.decode(raw, [Placement.resize(out, size)], **limits)[0]
        rows = self.boxes("final_boxes", final.boxes, {"final_scores": final.scores}, ("final_classes", final.labels))  # pyright: ignore[reportArgumentType]
        if rows is not None:
            assert final.masks is not None
            ledger.compare_bits("final_masks", final.masks[rows].dense())

    def mask_terms(self, raw: Raw, boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> None:
        """The losses of the mask head, for the first boxes, at the points of the original."""
        ledger, system = self.ledger, self.system
        points = ledger.given("train_points")
        boxes, labels = boxes[: len(points)], labels[: len(points)]
        refiner, network = system.refinement, system.points
        assert system.masks is not None
        assert refiner is not None
        assert network is not None
        coarse = system.masks(system.mask_features(raw, [boxes]))
        implicit = system.options["implicit"]
        own = coarse if implicit else coarse[torch.arange(len(labels)), labels]
        if implicit:
            ledger.compare("loss_l2", system.implicit_weight * coarse.square().mean())
        if "train_gt_masks__packbits__sampled" in ledger.arrays:  # an input that was recorded in part
            ledger.seen |= {n for n in ledger.arrays if n.startswith("train_gt_masks")}
            truth = ledger.given("train_point_labels")
            found = refiner.predict(network, raw.features[0], coarse, [boxes], labels, points)[:, 0]
            ledger.compare("loss_mask_point", functional.binary_cross_entropy_with_logits(found, truth))
            if not implicit:
                small = ledger.given("train_gt_coarse7").float()
                ledger.compare("loss_mask", functional.binary_cross_entropy_with_logits(own, small))
            return
        masks = Masks.from_dense(ledger.given("train_gt_masks")).pack()
        owners = torch.arange(len(labels))
        ledger.compare("train_point_labels", mask_sample(masks, box_points(boxes, points), owners))
        target = Instances(size, masks.boxes(), labels, masks)
        term = refiner.loss(network, raw.features[0], coarse, [boxes], labels, [target], [owners], points=points)
        ledger.compare("loss_mask_point", term)
        if not implicit:
            small = mask_targets(masks, owners, boxes, own.shape[-1])
            ledger.compare_bits("train_gt_coarse7", small)
            ledger.compare("loss_mask", functional.binary_cross_entropy_with_logits(own, small))


@torch.no_grad()
def semantic(system: PointRendSemantic, layout: Path, ledger: Ledger) -> None:
    system.eval()
    images = images_of(system, ledger)
    levels: list[Tensor] = []
    hook = system.dense.neck.register_forward_hook(lambda module, given, answer: levels.extend(list[Any](answer)))
    raw = system(images)
    hook.remove()
    for name in ledger.names(r"fpn_p\d"):
        ledger.compare(name, levels[int(name[-1]) - 2])
    ledger.compare("coarse_logits", raw.coarse)
    predicted: list[Tensor] = []
    predict = system.predict_points

    def recorded(raw: Any, points: Tensor) -> Tensor:
        predicted.append(points)
        return predict(raw, points)

    system.predict_points = recorded
    try:
        final = system.refined(raw)
    finally:
        del system.predict_points
    height, width = raw.coarse.shape[-2:]
    for step, points in enumerate(predicted, 1):
        name = f"step{step}_indices_sorted"
        if name not in ledger:
            continue
        column, row = (points * torch.tensor([width << step, height << step])).floor().long().unbind(-1)
        compare_cells(ledger, name, (row * (width << step) + column).sort(1).values, torch.zeros_like(row).bool())
    ledger.compare("final_logits", final)
    best = (
        final.argmax(1)
        .double()
        .masked_fill(class_uncertainty(final.flatten(2)).unflatten(1, final.shape[2:]) > -1e-4, np.nan)
    )
    ledger.compare("final_argmax", best)


SYSTEMS = {"pointrend": check, "pointrend-semantic": semantic}
