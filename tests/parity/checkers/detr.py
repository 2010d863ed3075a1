"""DETR with its mask head and without, in the layouts of its authors and of transformers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.checkpoints.origins.detr import OFFICIAL
from maskwright.ops.assignment import assign
from maskwright.ops.query_boxes import BoxTargets
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import detr
from maskwright.systems.detr import Raw
from tests.parity import ties
from tests.parity.ledger import LARGEST, Ledger, part, placed


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """The variant: whether the backbone is dilated is not in the file of weights, but in the outputs."""
    source, variant, layout = (str(about.get(word, "")) for word in ("source", "variant", "layout"))
    named = re.match(r"DETR\b", variant) or Path(layout).name.startswith("detr-")
    if "facebookresearch/detr@" not in source and not named:
        return {}
    words = f"{variant} {layout}".lower()
    depth = re.search(r"\br(?:esnet-?)?(\d+)", words)
    kind = f"detr-r{depth[1] if depth else 50}{'-dc5' if 'dc5' in words else ''}"
    return {"variant": f"{kind}-panoptic" if "panoptic" in words else kind}


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    own = Check(system.eval(), ledger)
    with torch.no_grad():
        raw = own.network()
        own.detections(raw)
        own.post()
    own.training()


class Check:
    def __init__(self, system: Any, ledger: Ledger):
        self.system, self.ledger = system, ledger
        self.images, self.valid = placed(ledger.about)
        self.size = (int(self.valid[0, 0]), int(self.valid[0, 1]))

    # ---- the network ---------------------------------------------------------------------------------------------

    def network(self) -> Raw:
        ledger, system, kept = self.ledger, self.system, {}
        hook = system.dense.backbone.register_forward_hook(lambda module, inputs, levels: kept.update(levels=levels))
        raw = system(self.images, self.valid)
        hook.remove()
        for name in ledger.names(r"backbone_layer\d"):
            ledger.compare(name, kept["levels"][int(name[-1]) - 1])
        if "feature_mask" in ledger:
            ledger.equal("feature_mask", raw.padding)
        if "pos" in ledger:
            from maskwright.blocks.positions import sine_positions

            shape = (raw.projected.shape[2], raw.projected.shape[3])
            ledger.compare("pos", sine_positions(shape, raw.projected.shape[1] // 2, padding=raw.padding))
        for name, ours in (  # by the authors' names and by those of transformers' output
            ("encoder_memory", raw.memory),
            ("encoder_last_hidden_state", raw.memory.flatten(2).transpose(1, 2)),
            ("decoder_last", raw.queries),
            ("last_hidden_state", raw.queries),
            ("pred_logits", raw.logits[-1]),
            ("logits", raw.logits[-1]),
            ("pred_boxes", raw.boxes[-1]),
        ):
            if name in ledger:
                ledger.compare(name, ours)
        for name, ours in (("aux_logits", raw.logits[:-1]), ("aux_boxes", raw.boxes[:-1])):
            if name in ledger:
                shape = ledger.arrays.get(f"{name}__shape", np.shape(ledger.arrays.get(name)))
                ledger.compare(name, ours if len(shape) == 4 else ours[:, 0])
        if system.masks is not None:
            every, maps = torch.arange(raw.queries.shape[1]), list[Tensor]()
            hook = system.masks.attention.register_forward_hook(lambda module, inputs, weights: maps.append(weights))
            masks = torch.stack([system.masks_of(raw, image, every) for image in range(len(self.images))])
            hook.remove()
            if "bbox_attention" in ledger:
                ledger.compare("bbox_attention", torch.stack(maps))
            if "pred_masks" in ledger:
                ledger.compare("pred_masks", masks)
        return raw

    # ---- objects -------------------------------------------------------------------------------------------------

    @part
    def detections(self, raw: Raw) -> None:
        ledger = self.ledger
        if not ledger.names(r"det_\w+"):
            return
        height, width = ledger.about["original_size"]
        placement = Placement.resize((height, width), self.size)
        # The original takes the largest image of a batch for the whole canvas. Here the canvas is larger, which never
        # happens in real batches; the original then resizes masks with their padding to the image.
        self.finished("det_", replace(raw, size=self.size), placement)

    def finished(self, prefix: str, raw: Raw, placement: Placement) -> None:
        """The predictions of all queries in their order; and that `decode` returns the same, best first."""
        ledger, system = self.ledger, self.system
        scores, labels = raw.logits[-1, 0].softmax(-1)[:, :-1].max(-1)
        ledger.compare(f"{prefix}scores", scores)
        ledger.equal(f"{prefix}labels", labels)
        boxes = system.image_boxes(raw, 0, placement)
        ledger.compare(f"{prefix}boxes", boxes)
        if system.masks is not None and ledger.names(rf"{prefix}mask(s|_area)"):
            planes = system.image_masks(raw, 0, placement, torch.arange(len(scores))).dense()
            ledger.compare_bits(f"{prefix}masks", planes[:, None])
            if f"{prefix}mask_area" in ledger:
                theirs, mine = ledger.peek(f"{prefix}mask_area"), planes.sum((1, 2))
                apart = int((theirs - mine).abs().max())
                # A pixel at the threshold may fall to either side.
                ledger.seen.add(f"{prefix}mask_area")
                ledger._line(f"{prefix}mask_area", f"at most {apart} pixels apart", apart <= 2)
        objects: Instances = system.decode(raw, [placement])[0]
        order = scores.argsort(descending=True, stable=True)
        order = order[system.thing_classes()[labels[order]]]
        same = len(objects) == len(order) and objects.scores is not None and torch.equal(objects.scores, scores[order])
        ledger._line(f"{prefix}decode", f"{len(objects)} things, best first", bool(same))

    @part
    def post(self) -> None:
        """Hand-made raw outputs through decoding."""
        ledger = self.ledger
        if not ledger.names(r"post/\w+"):
            return
        text = str(ledger.about["notes"])
        stream = np.random.RandomState(int(ledger.about.get("seed", 0)) + 7)
        shape = [int(v) for v in re.search(r"logits=\(standard_normal\(\((\d+),(\d+),(\d+)\)\)", text).groups()]  # pyright: ignore[reportOptionalMemberAccess]
        drawn = re.search(r"masks=\(standard_normal\(\((\d+),(\d+),(\d+),(\d+)\)\)", text)
        grid = [int(v) for v in drawn.groups()] if drawn is not None else [1, shape[1], 1, 1]
        sizes = re.search(r"processed (\d+)x(\d+), original (\d+)x(\d+)(?:, panoptic threshold ([\d.]+))?", text)
        assert sizes is not None
        logits = torch.from_numpy(stream.standard_normal(tuple(shape)).astype("float32") * 4)
        noise = stream.standard_normal(tuple(grid)) if drawn is not None else np.zeros(grid)
        masks = torch.from_numpy(noise.astype("float32") * 4)
        boxes = torch.from_numpy(stream.uniform(0.2, 0.4, (*shape[:2], 4)).astype("float32"))
        processed, original = (int(sizes[1]), int(sizes[2])), (int(sizes[3]), int(sizes[4]))
        nothing = torch.zeros(1, 1, *grid[2:])
        raw = Raw(
            logits[None], boxes[None], torch.zeros(1, shape[1], 1), nothing, nothing, (), nothing[:, 0] > 0, processed
        )
        system = self.system
        masks_of = system.masks_of
        system.masks_of = lambda raw, image, rows: masks[image][rows]
        try:
            placement = Placement.resize(original, processed)
            self.finished("post/", raw, placement)
            if not ledger.names(r"post/pan_\w+"):
                return
            panoptic = system.decode_panoptic(raw, [placement], score_threshold=float(sizes[5]))[0]
        finally:
            system.masks_of = masks_of
        ledger.equal("post/pan_seg", panoptic.map() - 1)
        if "post/pan_info" not in ledger:
            return
        info = ledger.peek("post/pan_info")  # id, category, isthing, area
        areas = panoptic.segments.masks.areas()
        own = [torch.arange(len(panoptic)), panoptic.segments.labels, panoptic.things.long(), areas]
        if own[0].shape[0] != len(info):
            ledger.fail("post/pan_info", f"{len(panoptic)} segments instead of {len(info)}")
        else:
            ledger.equal("post/pan_info", torch.stack(own, 1))

    # ---- training ------------------------------------------------------------------------------------------------

    @part
    def training(self) -> None:
        ledger, system = self.ledger, self.system
        if not ledger.names(r"target_\w+|match|loss/\w+|grad_\w+"):
            return
        for parameter in system.parameters():
            parameter.grad = None
        raw = system(self.images, self.valid)
        target = self.target()
        objects = [BoxTargets.from_instances(target, raw.logits.device)]
        cost = system.costs(raw, objects)
        queries, which = assign(cost)[0]
        forced: list[ties.Choice] = []
        if "match" in ledger:
            last = torch.stack([queries[None, -1], which[None, -1]], 1)
            chosen = ties.compare_choice(ledger, "match", cost[0][-1:], last, ledger.peek("match")[None])
            forced = [(len(queries) - 1, query, which) for _, query, which in chosen]
        with ties.choosing(detr, forced):
            terms = system.losses(raw, [target])
        total = sum(terms.values(), torch.zeros(()))
        theirs = {"class": "ce", "box": "bbox", "giou": "giou", "mask": "mask", "dice": "dice"}
        for name, value in terms.items():
            kind, number, layer = name.partition("_")
            ledger.compare(f"loss/loss_{theirs[kind]}{number}{layer}", value / getattr(system.loss, f"{kind}_weight"))
        ledger.compare("loss/total_weighted", total)
        self.logged(raw, target, queries, which)
        if "grad_norms" in ledger:
            self.gradients(raw, target, forced, ties.alternatives(cost[0], torch.stack([queries, which])))

    def logged(self, raw: Raw, target: Instances, queries: Tensor, which: Tensor) -> None:
        """What the original only logs: the share of matched queries with a wrong class, and the number of objects."""
        ledger = self.ledger
        right = raw.logits[-1, 0, queries[-1]].argmax(-1) == target.labels[which[-1]]
        ledger.compare("loss/class_error", 100 - 100 * right.float().mean())
        counts = (raw.logits[:, 0].argmax(-1) != raw.logits.shape[-1] - 1).sum(1)
        for name in ledger.names(r"loss/cardinality_error(_\d)?"):
            layer = int(name[-1]) if name[-1].isdigit() else -1
            ledger.compare(name, (counts[layer] - len(target)).abs().float())

    def target(self) -> Instances:
        ledger, (height, width) = self.ledger, self.size
        centres = ledger.given("target_boxes")
        scale = centres.new_tensor([width, height, width, height])
        x, y, w, h = (centres * scale).unbind(1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        if self.system.masks is None:
            return Instances((height, width), boxes, ledger.given("target_labels"), None)
        planes = ledger.given("target_masks").bool()
        return Whole((height, width), boxes, ledger.given("target_labels"), planes).instances()

    def gradients(self, raw: Raw, target: Instances, forced: list[ties.Choice], spare: list[ties.Choice]) -> None:
        """Norms of the gradients. Only the matching of the last layer is recorded: for ties in an earlier one, the
        choice whose norms are closest to the recorded ones is used."""
        ledger, trained = self.ledger, {n: p for n, p in self.system.named_parameters() if p.requires_grad}
        choices = [*itertools.product(*([None, c] for c in spare[:4])), *((c,) for c in spare[4:12])]
        best: tuple[float, Tensor, int] | None = None
        for tried in choices:
            own = [c for c in tried if c is not None]
            with ties.choosing(detr, forced + own):
                total = torch.stack(list(self.system.losses(raw, [target]).values())).sum()
            gradients = torch.autograd.grad(total, list(trained.values()), retain_graph=True, allow_unused=True)
            norms = self.norms(dict(zip(trained, gradients, strict=True)))
            if isinstance(norms, str):
                return ledger.fail("grad_norms", norms)
            error = ledger.error("grad_norms", norms)
            if isinstance(error, float) and (best is None or error < best[0]):
                best = error, norms, len(own)
            if isinstance(error, float) and error <= LARGEST:
                break
        if best is None:
            return ledger.fail("grad_norms", "another number of parameters")
        note = f"{best[2]} of {len(spare)} ties decided" if spare else ""
        ledger.compare("grad_norms", best[1], LARGEST, "sums of many float32 terms, in another order", note)

    def norms(self, gradients: Mapping[str, Tensor | None]) -> Tensor | str:
        """By the names of the original, whose projections of queries, keys and values are one matrix."""
        named = {name: g for name, g in gradients.items() if g is not None}
        norms: list[Tensor] = []
        for key in self.ledger.texts("grad_keys"):
            ours = key
            for pattern, replacement in OFFICIAL:
                ours = re.sub(pattern, replacement, ours)
            before, joined, kind = ours.rpartition(".in_proj.")
            parts = [f"{before}.{n}.{kind}" for n in ("query", "key", "value")] if joined else [ours]
            if any(p not in named for p in parts):
                return f"no gradient for {key}"
            norms.append(torch.cat([named[p].flatten() for p in parts]).norm())
        return torch.stack(norms)


class Whole:
    """Objects whose masks extend into the padding, like the recorded targets: drawn on the whole canvas, although the
    image is smaller."""

    def __init__(self, size: tuple[int, int], boxes: Tensor, labels: Tensor, planes: Tensor):
        self.size, self.boxes, self.labels, self.planes = size, boxes, labels, planes

    def instances(self) -> Instances:
        height, width = self.size
        inside = self.planes[:, :height, :width]
        target = Instances(self.size, self.boxes, self.labels, Masks.from_dense(inside))
        if bool((self.planes.sum((1, 2)) != inside.sum((1, 2))).any()):
            target = Instances(self.size, self.boxes, self.labels, None)
            target.__dict__["masks"] = Masks.from_dense(self.planes)
        return target


SYSTEMS = {"detr": check}
