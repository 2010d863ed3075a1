"""Checks of PANet against its authors' code, on Detectron.pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from maskwright.ops.paste import paste_masks
from maskwright.systems.families.two_stage import Raw
from maskwright.systems.panet import FusedMaskHead, PANet
from tests.parity.checkers.mask_rcnn import Check
from tests.parity.ledger import Ledger, part


class PANetCheck(Check):
    system: PANet

    def network(self, raw: Raw, stages: list[Tensor]) -> None:
        super().network(raw, stages)
        for name in self.ledger.names(r"neck_N\d"):
            self.ledger.compare(name, raw.features[int(name[-1]) - 2])

    @part
    def given(self, raw: Raw, size: tuple[int, int]) -> None:
        """Heads on the given boxes; a recording may have only some of their outputs."""
        system = self.system
        boxes = self.ledger.given("given_boxes")
        read: list[Tensor] = []
        hook = system.boxes.classes.register_forward_pre_hook(lambda module, given: read.append(given[0]))  # pyright: ignore
        logits, deltas = system.boxes(system.pooled(raw, [boxes], system.box_side))
        hook.remove()
        values: dict[str, tuple[Tensor, str]] = {
            "given_box_feat": (read[0], ""),
            "given_cls_logits": (self.their_classes(logits), ""),
            "given_cls_prob": (self.their_classes(logits).softmax(1), ""),
            "given_box_deltas": (self.their_rows(deltas, 4), self.dropped),
        }
        if system.masks is not None:
            assert isinstance(system.masks, FusedMaskHead)
            features = system.pooled(raw, [boxes], system.mask_side)
            masks = self.their_rows(system.masks(features), 1)
            values["given_mask_ff"] = (system.masks.connected(system.masks.shared(features)).flatten(1), "")
            values["given_mask_logits"] = (masks, self.dropped)
            values["given_mask_prob"] = (masks.sigmoid(), self.dropped)
        for name, (ours, note) in values.items():
            if name in self.ledger:
                self.ledger.compare(name, ours, note=note)

    @part
    def detections(self, raw: Raw, size: tuple[int, int], index: int = 0, suffix: str = "", out: Any = None) -> None:
        ledger, system = self.ledger, self.system
        if not ledger.names(r"det_\w+"):
            return
        limits = self.thresholds()
        boxes, scores, labels = system.find(
            raw, [size], limits["score_threshold"], limits["nms_threshold"], limits["detections"]
        )[0]
        rows = self.boxes("det_boxes", boxes, {"det_scores": scores}, ("det_labels", self.their_label(labels)))
        if rows is None or system.masks is None:
            return
        masks, _ = system.read_boxes(raw, [boxes[rows]], [labels[rows]])
        assert masks[0] is not None
        if "det_mask_prob" in ledger:
            ledger.compare("det_mask_prob", masks[0])
        if "det_masks" in ledger:
            planes = paste_masks(
                masks[0], boxes[rows], size, rule=system.rules.paste, strict=system.rules.paste_above
            ).dense()
            ledger.compare_bits("det_masks", planes)


def check(system: PANet, layout: Path, ledger: Ledger) -> None:
    PANetCheck(system, ledger).run()


SYSTEMS = {"panet": check}
