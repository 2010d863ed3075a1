"""Checks of Cascade Mask R-CNN against detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from maskwright.ops.paste import paste_masks
from maskwright.systems.cascade_rcnn import CascadeMaskRCNN
from maskwright.systems.families.two_stage import Raw
from tests.parity.checkers.mask_rcnn import LOSSES, Check
from tests.parity.ledger import Ledger, part

STAGES = {f"{kind}_stage{n}": f"{ours}_{n + 1}" for kind, ours in (("cls", "class"), ("box_reg", "box"))
          for n in range(5)}  # fmt: skip


class CascadeCheck(Check):
    system: CascadeMaskRCNN
    names: ClassVar = {**LOSSES, **STAGES}

    @part
    def given(self, raw: Raw, size: tuple[int, int]) -> None:
        """Every stage is given the same boxes."""
        ledger, system = self.ledger, self.system
        boxes = ledger.given("given_boxes")
        if "given_box_pooled_first2" in ledger:
            ledger.compare("given_box_pooled_first2", system.pooler(raw.features, [boxes], system.box_side)[:2])
        for stage in range(system.stages):
            logits, deltas = system.run_stage(stage, raw, [boxes])
            ledger.compare(f"given_cls_logits_stage{stage}", logits)
            ledger.compare(f"given_box_deltas_stage{stage}", deltas)
        if system.masks is None:
            return
        labels = torch.arange(len(boxes)) % self.classes
        masks, _ = system.read_boxes(raw, [boxes], [labels])
        assert masks[0] is not None
        if "given_mask_logits" in ledger:
            ledger.compare("given_mask_logits", system.masks(system.pooled(raw, [boxes], system.mask_side)))
        ledger.compare("given_mask_probs", masks[0][:, None])
        if "given_masks_pasted" in ledger:
            out = tuple(ledger.given("out_size").tolist())
            scaled = boxes * torch.tensor([out[1] / size[1], out[0] / size[0]] * 2)
            planes = paste_masks(masks[0], scaled, out, rule=system.rules.paste).dense()
            ledger.compare_bits("given_masks_pasted", planes)


def check(system: CascadeMaskRCNN, layout: Path, ledger: Ledger) -> None:
    CascadeCheck(system, ledger).run()


SYSTEMS = {"cascade-mask-rcnn": check}
