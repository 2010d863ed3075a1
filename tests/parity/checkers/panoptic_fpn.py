"""Checks of Panoptic FPN against detectron2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch

from maskwright.blocks.semantic import VOID
from maskwright.structures import Instances, Placement
from maskwright.systems.families.two_stage import Raw
from maskwright.systems.panoptic_fpn import PanopticFPN
from tests.parity.checkers.mask_rcnn import LOSSES, Check
from tests.parity.ledger import Ledger, part


@part
def segmented(system: Any, raw: Any, size: tuple[int, int], ledger: Ledger, detections: int) -> None:
    """The branch, and the segments that follow from it and from the objects."""
    if "sem_logits_s4" in ledger:
        ledger.compare("sem_logits_s4", system.semantic_logits(raw)[:, ::3])
    if not ledger.names(r"sem_argmax_out|panoptic_(seg|info)_.*"):
        return
    place = Placement.resize(tuple(ledger.given("out_size").tolist()), size)
    if "sem_argmax_out" in ledger:
        ledger.equal("sem_argmax_out", system._stuff(raw, 0, place)[0])
    for name in dict.fromkeys(n.replace("_info_", "_seg_") for n in ledger.names(r"panoptic_(seg|info)_.*")):
        segments(system, raw, place, name, ledger, detections)


def segments(system: Any, raw: Any, place: Placement, name: str, ledger: Ledger, detections: int) -> None:
    """The map, and the list of segments: number, kind, class, and score of a thing or area of a region."""
    found = re.fullmatch(r"panoptic_seg_score([\d.]+)_stuff(\d+)", name)
    assert found is not None
    ours = system.decode_panoptic(
        raw, [place], score_threshold=float(found[1]), smallest_area=int(found[2]), detections=detections
    )[0]
    ledger.equal(name, ours.map())
    info = name.replace("_seg_", "_info_")
    if info not in ledger.arrays:
        return
    theirs = json.loads(str(ledger.arrays[info]))
    ledger.seen.add(info)
    stuff = (~system.thing_classes()).nonzero().flatten().tolist()
    labels = [s["category_id"] if s["isthing"] else stuff[s["category_id"] - 1] for s in theirs]
    assert ours.segments.masks is not None
    assert ours.segments.scores is not None
    areas, scores = ours.segments.masks.areas().tolist(), ours.segments.scores.tolist()
    same = (
        [s["id"] for s in theirs] == list(range(1, len(ours) + 1))
        and ours.segments.labels.tolist() == labels
        and ours.things.tolist() == [s["isthing"] for s in theirs]
        and all(
            abs(s["score"] - score) < 1e-4 * s["score"] if s["isthing"] else s["area"] == area
            for s, score, area in zip(theirs, scores, areas, strict=True)
        )
    )
    ledger._line(info, "equal" if same else f"differs from {theirs}", same)


class PanopticCheck(Check):
    system: PanopticFPN
    names: ClassVar = {**LOSSES, "sem_seg": "semantic"}

    def __init__(self, system: PanopticFPN, ledger: Ledger):
        super().__init__(system, ledger)
        self.classes = system.head_classes

    @part
    def detections(self, raw: Raw, size: tuple[int, int], index: int = 0, suffix: str = "", out: Any = None) -> None:
        super().detections(raw, size, index, suffix, out)
        ledger, system = self.ledger, self.system
        segmented(system, raw, size, ledger, self.thresholds()["detections"])

    def target(self, source: Ledger, size: tuple[int, int], bits: bool = False) -> Instances:
        """The objects; the recorded label map, which is not that of their masks, is what the branch is trained on."""
        plane = source.given("gt_sem_seg").long()
        self.system.__dict__["semantic_target"] = lambda target: torch.where(plane == 255, VOID, plane)
        return super().target(source, size, bits)


def check(system: PanopticFPN, layout: Path, ledger: Ledger) -> None:
    try:
        PanopticCheck(system, ledger).run()
    finally:
        system.__dict__.pop("semantic_target", None)


SYSTEMS = {"panoptic-fpn": check}
