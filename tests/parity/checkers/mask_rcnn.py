"""Checks of Mask R-CNN and Keypoint R-CNN against detectron2 and torchvision."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from maskwright.blocks.box_stage import Detections, sample_boxes
from maskwright.blocks.rpn import propose
from maskwright.ops.paste import paste_masks, paste_values
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.families.two_stage import Raw
from maskwright.systems.mask_rcnn import MaskRCNN
from tests.parity.ledger import LARGEST, RAW, Ledger, NotRecorded, inputs, part

LOSSES = {
    "rpn_cls": "rpn_objectness", "rpn_loc": "rpn_box", "cls": "class", "box_reg": "box", "mask": "mask",
    "keypoint": "keypoint", "objectness": "rpn_objectness", "rpn_box_reg": "rpn_box", "classifier": "class",
}  # fmt: skip
DEEP = "ReLUs whose input is within rounding of zero are open in one implementation only"
EDGES = "cells of a mask target at its threshold flip with a rounding step of the proposal"


def check(system: MaskRCNN, layout: Path, ledger: Ledger) -> None:
    Check(system, ledger).run()


def with_gradients(ledger: Ledger) -> bool:
    """Whether a recording has gradients, of the losses of the recording beside it."""
    return bool(ledger.names(r"grad_(norm|sum)|(no_grad_)?names|total|loss_loss_\w+"))


class Check:
    names: ClassVar[Mapping[str, str]] = LOSSES
    gt_in_proposals: ClassVar[bool] = False

    def __init__(self, system: MaskRCNN, ledger: Ledger):
        self.system, self.ledger = system.eval(), ledger
        self.code = str(system.options.get("rules"))
        self.background_first = self.code in (
            "torchvision",
            "maskrcnn-benchmark",
            "detectron",
        )  # background is the first class
        self.classes = len(system.classes)

    def run(self) -> None:
        ledger, about = self.ledger, self.ledger.about
        if with_gradients(ledger):
            return self.gradients()
        images, sizes = inputs(about)
        if "image_size" in about:  # the rest is padding
            sizes = [tuple(about["image_size"])] * len(images)
        with torch.no_grad():
            stages: list[Tensor] = []

            def keep(module: Any, given: Any, answer: Any) -> None:
                stages.extend(answer)

            hook = self.system.dense.backbone.register_forward_hook(keep)
            raw = self.system(images)
            hook.remove()
            if "sizes" in about:
                return self.batch(raw, sizes)
            self.network(raw, stages)
            self.proposals(raw, sizes, "proposals", "proposal_logits")
            if ledger.names(r"given_\w+"):
                self.given(raw, sizes[0])
            self.detections(raw, sizes[0])
        if any(name.startswith(("gt_", "train_")) for name in ledger.arrays):
            self.training(raw, sizes[0])

    # ---- the network ---------------------------------------------------------------------------------------------

    def network(self, raw: Raw, stages: list[Tensor]) -> None:
        ledger = self.ledger
        for name in ledger.names(r"backbone_res\d"):
            ledger.compare(name, stages[int(name[-1]) - 2])
        for name in ledger.names(r"body_\d"):
            ledger.compare(name, stages[int(name[-1])])
        for kind, values in (("fpn", raw.features), ("rpn_logits", raw.objectness), ("rpn_deltas", raw.deltas)):
            for position, name in enumerate(ledger.names(rf"{kind}_\w+")):
                ledger.compare(name, values[_level(name, position)])
        anchors = self.system.anchors(raw.features, raw.size)
        if "anchors" in ledger:
            ledger.compare("anchors", torch.cat(anchors))
        for position, name in enumerate(ledger.names(r"anchors_\w+")):
            ledger.compare(name, anchors[_level(name, position)][: ledger.length(name)])

    @part
    def proposals(
        self, raw: Raw, sizes: Any, name: str, logits: str | None = None, training: bool = False
    ) -> list[Tensor]:
        anchors = self.system.anchors(raw.features, raw.size)
        found = propose(raw.objectness, raw.deltas, anchors, sizes, self.system.proposal_rules, training)
        if name in self.ledger:
            boxes, scores = found[0]
            if training and self.gt_in_proposals:  # the recording includes the objects' own boxes
                boxes = torch.cat([boxes, self.ledger.given("gt_boxes")])
                scores = torch.cat([scores, scores.new_zeros(len(boxes) - len(scores))])
            if logits is not None and logits not in self.ledger and "proposal_scores" in self.ledger:
                logits, scores = "proposal_scores", scores.sigmoid()
            self.boxes(name, boxes, {logits: scores} if logits and logits in self.ledger else {}, scores=scores)
        return [b for b, _ in found]

    def boxes(
        self, name: str, boxes: Tensor, beside: dict[str, Tensor], labels: tuple[str, Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Compares boxes as a set, and values in the same order (`beside`); returns our rows in their order. `scores`
        determine the order if they are not in `beside`."""
        first = next(iter(beside), "")
        if name not in self.ledger and first in self.ledger.arrays:
            rows = self.ledger.pair((name, boxes), labels, (first, beside[first]))
            if rows is None:
                return None
            for other, values in beside.items():
                self.ledger.compare(other, values[rows])
            if labels is not None:
                self.ledger.equal(labels[0], labels[1][rows])
            return rows
        if name not in self.ledger.arrays:  # only a part was recorded, so the order must be the same too
            scores = next(iter(beside.values()), scores)
            self.ledger.compare(name, boxes if scores is None else self.ledger.untied(name, boxes, scores))
            for other, values in beside.items():
                self.ledger.compare(other, values)
            if labels is not None:
                self.ledger.equal(labels[0], labels[1])
            return torch.arange(len(boxes))
        rows = self.ledger.pair((name, boxes), labels)
        if rows is None:
            return None
        self.ledger.compare(name, boxes[rows])
        for other, values in beside.items():
            self.ledger.compare(other, values[rows])
        if labels is not None:
            self.ledger.equal(labels[0], labels[1][rows])
        return rows

    # ---- conventions of the recordings ---------------------------------------------------------------------------

    def their_classes(self, logits: Tensor) -> Tensor:
        return logits.roll(1, 1) if self.background_first else logits

    def their_rows(self, values: Tensor, per_class: int) -> Tensor:
        """The first rows may be background's; they are unused, and loading drops them."""
        if not self.background_first:
            return values
        return torch.cat([values.new_full((len(values), per_class, *values.shape[2:]), torch.nan), values], 1)

    def their_label(self, labels: Tensor) -> Tensor:
        return labels + 1 if self.background_first else labels

    @property
    def dropped(self) -> str:
        return "the unused rows of background are not loaded" if self.background_first else ""

    # ---- heads on fixed boxes ------------------------------------------------------------------------------------

    @part
    def given(self, raw: Raw, size: tuple[int, int]) -> None:
        ledger, system = self.ledger, self.system
        # Recordings of old key names have no boxes of their own.
        if "given_boxes" in ledger:
            boxes = ledger.given("given_boxes")
        else:
            boxes = _default_boxes(size)
        if "given_box_pooled_first2" in ledger:
            pooled = system.pooler(raw.features, [boxes], system.box_side)
            ledger.compare("given_box_pooled_first2", pooled[:2])
        logits, deltas = system.boxes(system.pooled(raw, [boxes], system.box_side))
        ledger.compare("given_cls_logits", self.their_classes(logits))
        ledger.compare("given_box_deltas", self.their_rows(deltas, 4), note=self.dropped)
        labels = torch.arange(len(boxes)) % self.classes
        masks, keypoints = system.read_boxes(raw, [boxes], [labels])
        pasted = ledger.shape("given_masks_pasted") or ledger.shape("given_masks_pasted_prob")
        out = (pasted[-2], pasted[-1]) if pasted else size
        scaled = boxes * torch.tensor([out[1] / size[1], out[0] / size[0]] * 2)
        if system.masks is not None:
            values = system.masks(system.pooled(raw, [boxes], system.mask_side))
            ledger.compare("given_mask_logits", self.their_rows(values, 1), note=self.dropped)
            assert masks[0] is not None
            if "given_mask_probs" in ledger:
                ledger.compare("given_mask_probs", masks[0][:, None])
            rule = system.rules.paste
            if "given_masks_pasted_prob" in ledger:
                ledger.compare("given_masks_pasted_prob", paste_values(masks[0], scaled, out, rule=rule)[:, None])
            if "given_masks_pasted" in ledger:
                planes = paste_masks(masks[0], scaled, out, rule=rule).dense()
                ledger.compare_bits("given_masks_pasted", planes[:, None] if self.background_first else planes)
        if system.keypoints is not None:
            from maskwright.ops.keypoints import decode

            assert keypoints[0] is not None
            if "given_keypoint_logits" in ledger:
                ledger.compare("given_keypoint_logits", keypoints[0])
            self.keypoints(
                "given_keypoints", "given_keypoint_scores", decode(keypoints[0], boxes, system.rules.keypoints)
            )

    def keypoints(self, name: str, scores: str, ours: Tensor) -> None:
        if name not in self.ledger:
            return
        if self.background_first:  # the third number is the constant 1 there, scores are separate
            self.ledger.compare(name, torch.cat([ours[..., :2], torch.ones_like(ours[..., 2:])], -1))
            if scores in self.ledger:
                self.ledger.compare(scores, ours[..., 2])
        else:
            self.ledger.compare(name, ours)

    # ---- objects on the image ------------------------------------------------------------------------------------

    def thresholds(self) -> dict[str, Any]:
        about = self.ledger.about
        count = about.get("detections_per_image", about.get("detections", self._count()))
        return {
            "score_threshold": about.get("score_threshold", 0.05),
            "nms_threshold": about.get("nms", 0.5),
            "detections": count,
        }

    def _count(self) -> int:
        found = self.ledger.names(r"det_(boxes|scores|classes|labels)(_\d+)?")
        return max(self.ledger.length(n) for n in found) if found else 100

    @part
    def detections(self, raw: Raw, size: tuple[int, int], index: int = 0, suffix: str = "", out: Any = None) -> None:
        ledger, system = self.ledger, self.system
        if not ledger.names(rf"(det|out)_[a-z_]+{suffix}"):
            return
        features, objectness, deltas = (
            tuple(level[index : index + 1] for level in levels) for levels in (raw.features, raw.objectness, raw.deltas)
        )
        one = Raw(features, objectness, deltas, raw.size)
        limits = self.thresholds()
        boxes, scores, labels = system.find(
            one, [size], limits["score_threshold"], limits["nms_threshold"], limits["detections"]
        )[0]
        label_name = f"det_classes{suffix}" if f"det_classes{suffix}" in ledger else f"det_labels{suffix}"
        rows = self.boxes(
            f"det_boxes{suffix}", boxes, {f"det_scores{suffix}": scores}, (label_name, self.their_label(labels))
        )  # fmt: skip
        if rows is None:
            return
        masks, keypoints = system.read_boxes(one, [boxes], [labels])
        if f"det_mask_probs{suffix}" in ledger:
            assert masks[0] is not None
            ledger.compare(f"det_mask_probs{suffix}", masks[0][rows][:, None])
            if "det_mask_scores" in ledger:
                found = Detections(boxes, scores, labels)
                ledger.compare("det_mask_scores", system.mask_scores(one, [found], [masks[0]])[0][rows])
        if keypoints[0] is not None:
            on_input = system.decode(one, [Placement.identity(size)], **limits)[0]
            assert on_input.keypoints is not None
            self.keypoints(f"det_keypoints{suffix}", f"det_keypoint_scores{suffix}", on_input.keypoints[rows])
        if not ledger.names(rf"out_(boxes|scores|masks|keypoints){suffix}"):
            return
        out = out or tuple(ledger.given("out_size").tolist())
        if system.mask_iou is not None:
            limits["score_of"] = "box"  # the order of boxes
        final = system.decode(one, [Placement.resize(out, size)], **limits)[0]
        self.finished(final, rows, suffix)

    def finished(self, final: Instances, rows: Tensor, suffix: str) -> None:
        ledger = self.ledger
        if len(final) != len(rows):  # some are empty at this size
            assert final.scores is not None
            own = ledger.pair((f"out_boxes{suffix}", final.boxes), None, (f"out_scores{suffix}", final.scores))
            if own is None:
                return
            rows = own
        final = final[rows]
        ledger.compare(f"out_boxes{suffix}", final.boxes - (self.system.extents(final.boxes) - final.boxes))
        if f"out_scores{suffix}" in ledger:
            assert final.scores is not None
            ledger.compare(f"out_scores{suffix}", final.scores)
        if f"out_masks{suffix}" in ledger:
            assert final.masks is not None
            shape = ledger.shape(f"out_masks{suffix}")
            planes = final.masks[: shape[0]].dense()
            ledger.compare_bits(f"out_masks{suffix}", planes[:, None] if len(shape) == 4 else planes)
        if f"out_keypoints{suffix}" in ledger:
            assert final.keypoints is not None
            self.keypoints(f"out_keypoints{suffix}", "", final.keypoints)

    def batch(self, raw: Raw, sizes: list[tuple[int, int]]) -> None:
        """Images of different sizes padded to one; detections at one output size."""
        found = self.proposals(raw, sizes, "")
        about = self.ledger.about
        out = tuple(about["out_size"]) if "out_size" in about else None
        for index, size in enumerate(sizes):
            name = f"proposals_{index}"
            if found is not None and name in self.ledger:
                self.boxes(name, found[index][: self.ledger.length(name)], {})
            self.detections(raw, size, index, f"_{index}", out)

    # ---- training ------------------------------------------------------------------------------------------------

    def target(self, source: Ledger, size: tuple[int, int], bits: bool = False) -> Instances:
        boxes = source.given("gt_boxes")
        labels = source.given("gt_labels") - 1 if self.background_first else source.given("gt_classes")
        masks = None
        if bits or ("gt_polygons" not in source and not source.names(".*_bitmask_loss_.*")):
            bits = any(n in source for n in ("gt_bitmasks", "gt_masks"))
        if bits:
            masks = Masks.from_dense(source.given("gt_bitmasks" if "gt_bitmasks" in source else "gt_masks"))
        elif "gt_polygons" in source and not bits:
            masks = Masks.from_polygons([[ring] for ring in source.given("gt_polygons").numpy()], size)
        elif "masks" in self.system.needs:
            raise NotRecorded("gt_polygons")
        keypoints = source.given("gt_keypoints") if self.system.keypoints is not None else None
        return Instances(size, self.system.extents(boxes), labels, masks, keypoints=keypoints)

    def inner(self, target: Instances) -> Instances:
        """The target with the boxes of the code base, as `losses` passes it on."""
        return dataclasses.replace(target, boxes=target.boxes - (self.system.extents(target.boxes) - target.boxes))

    @part
    def training(self, raw: Raw, size: tuple[int, int]) -> None:
        ledger, system, found = self.ledger, self.system, None
        for name in ("train_proposals_rpn", "train_proposals"):
            found = self.proposals(raw, [size], name, training=True)
        with torch.no_grad(), second_stage_once(system):
            self.on_target(raw, size, "", found)
            if ledger.names("train_(given_)?bitmask_.*"):
                self.on_target(raw, size, "bitmask_", None)

    @part
    def on_target(self, raw: Raw, size: tuple[int, int], kind: str, found: list[Tensor] | None) -> None:
        """The losses of one kind of target."""
        ledger, system = self.ledger, self.system
        if ledger.names(r"gt_\w+|train_\w+"):
            target = self.target(ledger, size, bits=bool(kind))
            if found is not None and ledger.names(r"train_sampled_\w+"):
                sampled = sample_boxes(found[0], self.inner(target), self.classes, system.box_rules)
                self.boxes("train_sampled_boxes", sampled.boxes, {}, ("train_sampled_classes", sampled.labels))
            if ledger.names(rf"train_{kind}loss_.*"):
                self.terms(f"train_{kind}loss_", self.losses(raw, target), EDGES)
            self.given_terms(raw, target, f"train_given_{kind}loss_")

    @part
    def given_terms(self, raw: Raw, target: Instances, prefix: str) -> None:
        if self.ledger.names(rf"{prefix}\w+"):
            given = [self.ledger.given("given_boxes")]
            self.terms(prefix, self.system.roi_losses(raw, given, [self.inner(target)]))

    def losses(self, raw: Raw, target: Instances) -> dict[str, Tensor]:
        """All losses; that of masks on the original's proposals if they were recorded in full (they are compared
        separately), because a rounding step of a proposal may flip a cell of a mask target."""
        terms = self.system.losses(raw, [target])
        names = ("train_proposals_rpn", "train_proposals")
        theirs = next((self.ledger.peek(n) for n in names if n in self.ledger.arrays), None)
        if theirs is not None and self.gt_in_proposals:
            theirs = theirs[: -len(target)]
        if theirs is not None and "mask" in terms:
            terms["mask"] = self.system.roi_losses(raw, [theirs], [self.inner(target)])["mask"]
        return terms

    def terms(self, prefix: str, ours: dict[str, Tensor], edges: str = "") -> None:
        whole = "train_proposals_rpn" in self.ledger.arrays or "train_proposals" in self.ledger.arrays
        for name in self.ledger.names(rf"{prefix}\w+"):
            kind = self.names[name.removeprefix(prefix)]
            loose = edges if kind == "mask" and not whole else ""
            self.ledger.compare(name, ours[kind], LARGEST if loose else RAW, loose)

    @part
    def gradients(self) -> None:
        """Norm and sum of the gradient of every parameter, of the sum of all losses."""
        ledger, system = self.ledger, self.system
        beside = ledger.path.with_name(ledger.path.name.replace("-grad", ""))
        if not beside.exists():
            raise LookupError(f"needs the target in {beside.name}, which is not beside it")
        source = Ledger(beside)
        about = {**source.about, **ledger.about}
        images, sizes = inputs({**about, "input": source.about.get("input", about.get("input", ""))})
        system.zero_grad()
        terms = system.losses(system(images), [self.target(source, sizes[0])])
        total = sum(terms.values(), torch.zeros(()))
        for name in ledger.names(r"loss_\w+"):
            ledger.compare(name, terms[self.names[name.removeprefix("loss_").removeprefix("loss_")]])
        ledger.compare("total", total)
        total.backward()
        names = ledger.texts("names")
        unused = ledger.texts("no_grad_names") if "no_grad_names" in ledger else []
        ours = dict(system.named_parameters())
        renamed = dict(zip(names + unused, self.our_names(names + unused), strict=True))
        wrong = [n for n in names if renamed[n] not in ours or ours[renamed[n]].grad is None]
        still = [n for n in unused if renamed[n] in ours and ours[renamed[n]].requires_grad]
        if wrong or still or ("no_grad_names" in ledger and len(set(renamed.values())) != len(ours)):
            ledger.fail(
                "names",
                f"without a gradient: {wrong}; with one, wrongly: {still}; {len(ours)} parameters for {len(renamed)}",
            )
            return
        grads = [ours[renamed[n]].grad.double() for n in names]  # pyright: ignore[reportOptionalMemberAccess]
        norms = torch.stack([g.norm() for g in grads])
        ledger.compare("grad_norm", norms, 1e-4, DEEP)
        sizes = torch.stack([g.abs().sum() for g in grads])
        ledger.compare("grad_sum", torch.stack([g.sum() for g in grads]), 1e-4, DEEP, scale=sizes)

    def our_names(self, theirs: list[str]) -> list[str]:
        from maskwright.checkpoints.origins import origins

        origin = next(o for o in origins() if o.name == self.code and o.system == self.system.name)
        ours, result = dict(self.system.named_parameters()), []
        for key in theirs:
            for pattern, replacement in origin.rename:
                key = re.sub(pattern, replacement, key)
            if key not in ours:  # the weight of a deformable convolution is beside its offsets
                key = key.replace(".conv2.conv.weight", ".conv2.weight")
            result.append(key)
        return result


@contextmanager
def second_stage_once(system: MaskRCNN) -> Iterator[None]:
    """Caches pooled features and the box head's output by boxes of the image: one recording has the losses of several
    targets for the same boxes, and these take most of its time."""
    pooled, head, read, answers = system.pooled, system.boxes, {}, {}
    plain = head.forward

    def pooled_once(raw: Raw, boxes: Sequence[Tensor], side: int) -> Tensor:
        key = (side, *(b.numpy().tobytes() for b in boxes))
        if key not in read:
            read[key] = pooled(raw, boxes, side)
        return read[key]

    def head_once(features: Tensor) -> Any:
        if id(features) not in answers:
            answers[id(features)] = plain(features)
        return answers[id(features)]

    system.__dict__["pooled"], head.__dict__["forward"] = pooled_once, head_once
    try:
        yield
    finally:
        del system.__dict__["pooled"], head.__dict__["forward"]


def _level(name: str, position: int) -> int:
    """The level of a name (p2 ... p6, N2 ... N6, 0 ... 4, pool); the position for networks with one level."""
    last = name.rsplit("_", 1)[-1]
    if last == "pool":
        return -1
    if re.fullmatch(r"[pN]\d", last):
        return int(last[1]) - 2
    return int(last) if last.isdigit() else position


def _default_boxes(size: tuple[int, int]) -> Tensor:
    """The six boxes of the recordings, defined as fractions of the input."""
    shares = np.array(
        [
            [0.05, 0.05, 0.45, 0.6], [0.3, 0.2, 0.95, 0.9], [0.5, 0.5, 0.62, 0.68], [0.0, 0.0, 1.0, 1.0],
            [0.1, 0.7, 0.33, 0.97], [0.61, 0.03, 0.8, 0.4],
        ]
    )  # fmt: skip
    return torch.from_numpy((shares * np.array([size[1], size[0]] * 2)).astype("float32"))


SYSTEMS = {"mask-rcnn": check, "keypoint-rcnn": check}
