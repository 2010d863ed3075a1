"""Checks of Mask Scoring R-CNN against its published code, on maskrcnn-benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from maskwright.systems.families.two_stage import Raw
from maskwright.systems.mask_scoring_rcnn import MaskScoringRCNN
from tests.parity.checkers.mask_rcnn import LOSSES, Check
from tests.parity.ledger import Ledger, part


class ScoringCheck(Check):
    system: MaskScoringRCNN
    names: ClassVar = {**LOSSES, "maskiou": "mask_iou"}
    gt_in_proposals: ClassVar[bool] = True

    @part
    def given(self, raw: Raw, size: tuple[int, int]) -> None:
        super().given(raw, size)
        if "given_maskiou" not in self.ledger:
            return
        boxes = self.ledger.given("given_boxes")
        labels = torch.arange(len(boxes))
        masks, _ = self.system.read_boxes(raw, [boxes], [labels])
        assert masks[0] is not None
        assert self.system.mask_iou is not None
        iou = self.system.mask_iou(self.system.mask_features(raw, [boxes]), masks[0])
        self.ledger.compare("given_maskiou", self.their_rows(iou, 1), note=self.dropped)


def check(system: MaskScoringRCNN, layout: Path, ledger: Ledger) -> None:
    ScoringCheck(system, ledger).run()


SYSTEMS = {"mask-scoring-rcnn": check}
