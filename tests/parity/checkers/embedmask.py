"""EmbedMask, by its own code in three generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.blocks import fcos
from maskwright.ops.losses import lovasz_hinge
from maskwright.ops.windows import paste_windows
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import embedmask
from maskwright.systems.embedmask import CELL, EmbedMask, Raw, Region, mask_windows
from tests.parity.ledger import LARGEST, Ledger, inputs, part

EDGE = "pixels within rounding of the threshold"
POWER = "exp of a sum of squares multiplies the relative error of its argument by its size"


def check(system: EmbedMask, layout: Path, ledger: Ledger) -> None:
    Check(system.eval(), ledger).run()


class Check:
    def __init__(self, system: EmbedMask, ledger: Ledger):
        self.system, self.ledger = system, ledger
        self.images, (size, *_) = inputs(ledger.about)
        self.height, self.width = ledger.about.get("image_size", size)

    @torch.no_grad()
    def run(self) -> None:
        kept: dict[str, Any] = {}
        hooks = [
            part.register_forward_hook(lambda module, given, output, name=name: kept.update({name: output}))
            for name, part in (("backbone", self.system.dense.backbone), ("neck", self.system.dense.neck))
        ]
        raw = self.system(self.images)
        for hook in hooks:
            hook.remove()
        self.network(raw, kept["backbone"], kept["neck"])
        self.pixels = torch.nn.functional.interpolate(raw.pixels, scale_factor=2.0, mode="bilinear")[0]
        self.detections(raw)
        self.given()
        self.targets(raw)
        self.lovasz()

    @part
    def lovasz(self) -> None:
        ledger = self.ledger
        if "lovasz_loss" in ledger:
            p, truth = ledger.given("lovasz_prob").flatten(1), ledger.given("lovasz_target").flatten(1)
            ledger.compare("lovasz_loss", lovasz_hinge(p.log() - (1 - p).log(), truth.float()))

    def network(self, raw: Raw, features: list[Tensor], levels: list[Tensor]) -> None:
        ledger = self.ledger
        ledger.compare("c5", features[-1])
        for number, stride in enumerate(fcos.STRIDES):
            ledger.compare(f"p{number + 3}", levels[number])
            ledger.compare(f"cls_{number}", raw.logits[number])
            ledger.compare(f"reg_{number}", raw.distances[number] * stride)
            ledger.compare(f"reg_train_{number}", raw.distances[number])
            ledger.compare(f"centerness_{number}", raw.centerness[number])
            ledger.compare(f"proposal_embed_{number}", raw.embeddings[number])
            ledger.compare(f"margin_{number}", raw.margins[number])
        ledger.compare("pixel_embed", raw.pixels)

    # ---- objects -------------------------------------------------------------------------------------------------

    @part
    def detections(self, raw: Raw) -> None:
        ledger, limits = self.ledger, self.ledger.about["thresholds"]
        size = (self.height, self.width)
        found = self.system.detect(
            raw, [size], limits["score"], limits["nms"], limits["keep"], candidates=limits["pre_nms_top_n"]
        )[0]
        rows = ledger.pair(
            ("det_boxes", found.boxes), ("det_labels", found.labels + 1), ("det_scores", found.scores)
        )  # fmt: skip
        if rows is None:
            return
        boxes, embeddings, margins = (v[rows] for v in (found.boxes, found.embeddings, found.margins))
        ledger.compare("det_boxes", boxes)
        ledger.compare("det_scores", found.scores[rows])
        ledger.equal("det_labels", found.labels[rows] + 1)
        ledger.equal("det_stride", torch.tensor(CELL))
        rules = self.system.rules
        threshold = float(np.log(rules.threshold)) if rules.logarithm else rules.threshold
        ledger.compare("det_mask_th", threshold)
        self.compare_maps("det_mask_logprob", self.maps(boxes, embeddings, margins, rules.region))
        if not ledger.names(r"final_mask_\w+"):
            return
        masks = self.system.masks(self.pixels, boxes, embeddings, margins, self.placement(), rules.threshold)
        self.masks("final_mask", masks)

    @part
    def given(self) -> None:
        """Four stated boxes; in generation 2 in the whole region that its kernel computes."""
        ledger = self.ledger
        if not ledger.names(r"given_\w+"):
            return
        boxes, embeddings, margins = (ledger.given(f"given_{n}") for n in ("boxes", "embed", "margin"))
        self.compare_maps("given_logprob", self.maps(boxes, embeddings, margins, "padded"))
        if not ledger.names(r"given_final_\w+"):
            return
        values, corners = mask_windows(
            self.pixels, boxes, embeddings, margins, region="padded", logarithm=self.system.rules.logarithm
        )
        height, width = self.pixels.shape[1:]
        size = self.placement().image_size
        stretched = tuple(
            int(np.ceil(round(CELL * cells * image / own, 6)))
            for cells, image, own in zip((height, width), size, (self.height, self.width), strict=True)
        )
        masks = paste_windows(
            values, corners, (height, width), (stretched[0], stretched[1]), size,
            threshold=float(ledger.given("given_threshold")), budget=1 << 18,
        )  # fmt: skip
        self.masks("given_final", masks)

    def placement(self) -> Placement:
        size = self.ledger.given("final_size").tolist()
        return Placement.resize((size[0], size[1]), (self.height, self.width))

    def maps(self, boxes: Tensor, embeddings: Tensor, margins: Tensor, region: Region) -> Tensor:
        """Windows put back onto whole maps."""
        logarithm = self.system.rules.logarithm
        values, corners = mask_windows(
            self.pixels, boxes, embeddings, margins, region=region, logarithm=logarithm
        )  # fmt: skip
        height, width = self.pixels.shape[1:]
        rows, columns = values.shape[1:]
        room = max(rows, columns) + 1
        whole = values.new_full((len(values), height + 2 * room, width + 2 * room), -10.0 if logarithm else 0.0)
        for plane, own, (x, y) in zip(whole, values, corners.tolist(), strict=True):
            plane[y + room : y + room + rows, x + room : x + room + columns] = own
        return whole[:, room : room + height, room : room + width]

    def compare_maps(self, name: str, maps: Tensor) -> None:
        if self.system.rules.logarithm:
            self.ledger.compare(name, maps)
        else:  # they are probabilities in spite of their name
            self.ledger.compare(name, maps, LARGEST, POWER)

    def masks(self, name: str, masks: Masks) -> None:
        self.ledger.compare_packed_rows(f"{name}_bits", masks.dense())
        self.ledger.compare(f"{name}_area", masks.areas(), LARGEST, EDGE)

    # ---- losses --------------------------------------------------------------------------------------------------

    @part
    def targets(self, raw: Raw) -> None:
        ledger, system = self.ledger, self.system
        if not ledger.names(r"(gt|t|loss|mask)_\w+|smooth_loss"):
            return
        size = (self.height, self.width)
        boxes = ledger.given("gt_boxes") + torch.tensor([0.0, 0.0, system.last, system.last])
        planes = _unpacked(ledger.given("gt_mask_bits"), size)
        target = Instances(size, boxes, ledger.given("gt_labels") - 1, Masks.from_dense(planes))
        owner, goal, truth = system.assign(raw, target)
        ledger.equal("t_matched", owner)
        ledger.equal("t_labels", torch.where(owner >= 0, target.labels[owner.clamp(min=0)] + 1, 0))
        ledger.compare("t_reg", goal)
        ledger.compare_packed_rows("mask_target_bits", truth)

        learnt, terms = self.losses(raw, target)
        theirs = {"loss_cls": "class", "loss_reg": "box", "loss_centerness": "centerness", "mask_loss": "mask"}
        for name, ours in {**theirs, "smooth_loss": "smooth"}.items():
            if name in ledger:
                ledger.compare(name, terms[ours])
        embeddings, margins = (learnt[n][..., None, None] for n in ("embeddings", "margins"))
        apart = (learnt["pixels"][None] - embeddings).square() * margins
        ledger.compare("mask_prob", (-apart.sum(1)).exp(), LARGEST, POWER)
        ledger.compare("mask_loss_per_object", learnt["losses"])
        place = (owner >= 0).nonzero().flatten()
        if "t_good" in ledger:  # generation 1: all places whose boxes fit
            ledger.equal("t_good", torch.zeros(len(owner), dtype=torch.bool).index_fill(0, place[learnt["good"]], True))
        if "t_proposal_index" in ledger:
            best = place[learnt["best"]]
            ledger.equal("t_proposal_index", torch.full((len(target),), -1).index_put((owner[best],), best))

    def losses(self, raw: Raw, target: Instances) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the losses are computed from, and the losses."""
        learnt: dict[str, Any] = {}
        plain, choose = self.system.object_losses, embedmask.good_locations

        def listen(*given: Any) -> Tensor:
            learnt.update(zip(("pixels", "embeddings", "margins"), given, strict=False))
            learnt["losses"] = plain(*given)
            return learnt["losses"]

        def chosen(*given: Any) -> tuple[Tensor, Tensor]:
            learnt["good"], learnt["best"] = choose(*given)
            return learnt["good"], learnt["best"]

        setattr(self.system, "object_losses", listen)  # noqa: B010 - replaces a method
        embedmask.good_locations = chosen
        try:
            return learnt, self.system.losses(raw, [target])
        finally:
            embedmask.good_locations = choose
            delattr(self.system, "object_losses")


def _unpacked(bits: Tensor, size: tuple[int, int]) -> Tensor:
    planes = np.unpackbits(bits.numpy(), axis=1)[:, : size[0] * size[1]]
    return torch.from_numpy(planes.reshape(-1, *size).astype(bool))


SYSTEMS = {"embedmask": check}
