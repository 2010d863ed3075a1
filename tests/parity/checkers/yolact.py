"""YOLACT and YOLACT++, by their authors."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maskwright.checkpoints.names import COCO
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.yolact import YOLACT, Detections, Raw, assemble, encode
from maskwright.systems.yolact_plus import YOLACTPlus
from tests.parity.ledger import Ledger, inputs, part

LOSSES = {"B": "box", "C": "class", "M": "mask", "S": "semantic", "I": "rescore"}
VARIANTS = {
    "yolact_base": "yolact-r101", "yolact_im400": "yolact-r101-im400", "yolact_im700": "yolact-r101-im700",
    "yolact_resnet50_pascal": "yolact-r50-pascal",
}  # fmt: skip


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """What the outputs state and the keys of a file do not: the configuration."""
    variant = VARIANTS.get(str(about.get("config", "")).removesuffix("_config"))
    return {} if variant is None else {"variant": variant}


def check(system: YOLACT, layout: Path, ledger: Ledger) -> None:
    Check(system.eval(), ledger).run()


class Check:
    def __init__(self, system: YOLACT, ledger: Ledger):
        self.system, self.ledger = system, ledger
        # Masks are kept as X_packbits and X_shape here, the first of them perhaps in samples.
        ledger.arrays = {re.sub(r"masks(\d?)_(packbits|shape)", r"masks\1__\2", k): v for k, v in ledger.arrays.items()}

    @torch.no_grad()
    def run(self) -> None:
        ledger = self.ledger
        if post_only(ledger):
            return self.post()
        images, _ = inputs(ledger.about)
        seen: dict[str, Any] = {}
        hooks = [
            part.register_forward_hook(lambda module, given, output, name=name: seen.update({name: output}))
            for name, part in (("backbone", self.system.dense.backbone), ("neck", self.system.dense.neck))
        ]
        # Losses of drawn outputs need only the shapes of real ones.
        learning = bool(ledger.names(r"(net|synthetic)_loss_\w|match\d_\w+|targets\d"))
        drawn = learning and not ledger.names(r"net_loss_\w|[cdp]\d|loc")
        raw = self.blank(images) if drawn else self.system(images)
        for hook in hooks:
            hook.remove()
        for name in ledger.names(r"[cd][345]"):
            ledger.compare(name, seen["backbone"][int(name[1]) - 6])
        for name in ledger.names(r"p[34567]"):
            ledger.compare(name, seen["neck"][int(name[1]) - 3])
        if learning:
            return self.losses(raw)
        self.raw(raw)
        self.detections(raw)

    def blank(self, images: Tensor) -> Raw:
        raw = copy.deepcopy(self.system).to("meta")(images.to("meta"))
        return replace(raw, **{k: torch.zeros(v.shape) for k, v in vars(raw).items() if isinstance(v, Tensor)})

    def raw(self, raw: Raw) -> None:
        answers = {
            "loc": raw.deltas, "conf_logits": raw.logits.roll(1, -1), "coef": raw.coefficients,
            "proto": raw.prototypes.permute(0, 2, 3, 1), "priors": self.system.anchors(raw),
            "segm_logits_trainonly": raw.semantic,
        }  # fmt: skip
        for name, values in answers.items():
            if name in self.ledger:
                self.ledger.compare(name, values)

    # ---- detections ----------------------------------------------------------------------------------------------

    @part
    def post(self) -> None:
        """Detections from hand-made outputs of the head."""
        ledger = self.ledger
        anchors, probabilities = ledger.given("priors"), ledger.given("conf")
        coarse = ledger.given("proto_low")
        shape = ledger.shape("softmask_cropped") or ledger.shape("perclass_softmask_cropped")
        side = int(shape[-1]) if shape else 138
        maps = functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False).relu()
        size = int(ledger.about.get("cfg_max_size", 550))
        semantic = torch.zeros(1, probabilities.shape[2] - 1, 1, 1)
        raw = Raw(
            ledger.given("loc"),
            probabilities.log().roll(-1, -1),
            ledger.given("coef"),
            maps,
            semantic,
            (),
            (size, size),
        )
        self.system.anchors = lambda raw: anchors
        try:
            self.detections(raw)
        finally:
            del self.system.anchors

    def detections(self, raw: Raw) -> None:
        ledger, about = self.ledger, self.ledger.about
        limits = (float(about.get("conf_thresh", 0.05)), float(about.get("nms_thresh", 0.5)))
        count = int(about.get("max_num_detections", 100))
        if ledger.names(r"perclass_\w+|final_\w+|softmask_cropped|maskiou_all_classes"):
            found = self.found("perclass", self.system.detect(raw, *limits, count)[0])
            if found is not None:
                self.finished(raw, found)
        if ledger.names(r"crossclass_\w+"):
            self.found("crossclass", self.system.detect(raw, *limits, 200, cross_class=True)[0])

    def found(self, prefix: str, found: Detections) -> Detections | None:
        """Compares the detections; returns them in the original's order."""
        ledger = self.ledger
        if ledger.names(rf"{prefix}_(boxes_norm|classes|coef)"):
            rows = ledger.pair(
                (f"{prefix}_boxes_norm", found.boxes), (f"{prefix}_classes", found.labels),
                (f"{prefix}_scores", found.scores),
            )  # fmt: skip
            if rows is None:
                return None
            found = found[rows]
            ledger.compare(f"{prefix}_boxes_norm", found.boxes)
            ledger.equal(f"{prefix}_classes", found.labels)
            ledger.compare(f"{prefix}_coef", found.coefficients)
        ledger.compare(f"{prefix}_scores", found.scores)
        return found

    def finished(self, raw: Raw, found: Detections) -> None:
        ledger, system = self.ledger, self.system
        soft = assemble(raw.prototypes[0], found.coefficients, found.boxes)
        for name in ledger.names(r"(perclass_)?softmask_cropped"):
            ledger.compare(name, soft)
        for name in ("final_scores", "final_box_scores"):
            if name in ledger:
                ledger.compare(name, found.scores)
        if isinstance(system, YOLACTPlus):
            for name in ledger.names(r"maskiou_all_classes|perclass_maskiou_all"):
                ledger.compare(name, system.rescoring(soft))
            if "final_mask_scores" in ledger:
                ledger.compare("final_mask_scores", found.scores * system.quality(found, raw.prototypes[0]))
        if not ledger.names(r"final_(boxes|classes|masks)"):
            return
        width, height = ledger.about["final_size_wh"]
        placement = Placement.resize((height, width), raw.size)
        final = system.on_image(found, raw.prototypes[0], raw.size, placement, drop_empty=False)
        ledger.compare("final_boxes", final.boxes)
        ledger.equal("final_classes", final.labels)
        assert final.masks is not None
        ledger.compare_bits("final_masks", final.masks.dense())

    # ---- losses --------------------------------------------------------------------------------------------------

    @part
    def losses(self, raw: Raw) -> None:
        ledger, system = self.ledger, self.system
        targets = [self.target(index, raw.size) for index in range(len(raw.deltas))]
        anchors = system.anchors(raw)
        for index, target in enumerate(targets):
            self.matches(index, anchors, target, raw.size)
        rules, system.loss = system.loss, replace(system.loss, masks_per_image=1 << 30)
        for prefix, answers in (("net_loss", raw), ("synthetic_loss", self.drawn(raw))):
            terms = system.losses(answers, targets)
            for name in ledger.names(rf"{prefix}_\w"):
                ledger.compare(name, terms[LOSSES[name[-1]]])
        system.loss = rules

    def target(self, index: int, size: tuple[int, int]) -> Instances:
        rows, masks = self.ledger.given(f"targets{index}"), self.ledger.given(f"masks{index}")
        boxes = rows[:, :4] * torch.tensor([size[1], size[0], size[1], size[0]])
        labels = rows[:, 4].long()
        return Instances(size, boxes, labels.clamp(min=0), Masks.from_dense(masks), crowd=labels < 0)

    def matches(self, index: int, anchors: Tensor, target: Instances, size: tuple[int, int]) -> None:
        ledger = self.ledger
        assert target.crowd is not None
        boxes = target.boxes / torch.tensor([size[1], size[0], size[1], size[0]])
        solid, crowd = replace(target, boxes=boxes)[~target.crowd], boxes[target.crowd]
        nearest, matched = self.system.assign(anchors, solid, crowd)
        theirs = torch.where(matched >= 0, solid.labels[nearest] + 1, torch.where(matched == -1, 0, -1))
        ledger.equal(f"match{index}_conf_t", theirs)
        ledger.equal(f"match{index}_idx_t", nearest)
        rows = matched >= 0
        ledger.compare(f"match{index}_loc_t_positives", encode(anchors[rows], solid.boxes[matched[rows]]))

    def drawn(self, raw: Raw) -> Raw:
        """Outputs that were drawn at random instead of computed, in this order."""
        seed = re.search(r"RandomState\((\d+)\)", self.ledger.about["synthetic_loss"])
        stream = np.random.RandomState(int(seed[1]) if seed else 10)

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            return stream.standard_normal(shape)

        batch, maps, height, width = raw.prototypes.shape
        deltas = 0.3 * draw(tuple(raw.deltas.shape))
        logits = draw(tuple(raw.logits.shape))
        coefficients = np.tanh(draw(tuple(raw.coefficients.shape)))
        prototypes = np.maximum(draw((batch, height, width, maps)), 0)
        semantic = draw(tuple(raw.semantic.shape))
        values = (torch.from_numpy(v.astype("float32")) for v in (deltas, logits, coefficients, prototypes, semantic))
        own = dict(zip(("deltas", "logits", "coefficients", "prototypes", "semantic"), values, strict=True))
        own["logits"] = own["logits"].roll(-1, -1)
        own["prototypes"] = own["prototypes"].permute(0, 3, 1, 2)
        return replace(raw, **own)


def post_only(ledger: Ledger) -> bool:
    return "proto_low" in ledger or ("softmask_cropped" in ledger and "input" not in ledger.about)


def _is_post(ledger: Ledger) -> bool:
    return post_only(ledger) and not ledger.names(r"maskiou_all_classes|final_mask_scores")


def _post(ledger: Ledger) -> None:
    """Decoding needs no weights."""
    count = ledger.given("conf").shape[2] - 1
    classes = COCO if count == len(COCO) else [str(k) for k in range(count)]
    Check(create("yolact", classes=classes, backbone={"name": "resnet18", "width": 8}, neck_width=8), ledger).run()  # pyright: ignore[reportArgumentType]


SYSTEMS = {"yolact": check, "yolact-plus": check}
OPERATORS = [(_is_post, _post)]
