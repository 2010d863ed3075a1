"""Mask2Former and MaskFormer, against the code of their authors and of transformers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.checkpoints.origins import origins
from maskwright.ops import queries as query_ops
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import assign
from maskwright.structures import Instances, Masks, Placement
from tests.parity import ties
from tests.parity.ledger import Ledger, bare_shape, inputs, matching_areas, part

BLOCKED = "a key whose mask logit is zero up to rounding may be on either side of the threshold"
LONG = "gradients of 30 losses at random points pass through about 40 layers; the recording allows 1e-2"


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    own = Check(system.eval(), ledger)
    own.answers()
    if ledger.names(r"post/\w+"):
        own.post()
    if ledger.names(r"loss(_no_objects)?/\w+|grad_norms|match_\w+|rng_first8"):
        own.learning()


class Check:
    def __init__(self, system: Any, ledger: Ledger):
        self.system, self.ledger = system, ledger
        self.official = system.name == "mask2former"
        text = str(ledger.about["input"])
        text = (
            text.replace(") (", ").standard_normal((").replace(") as", ")) as")
            if "standard_normal" not in text
            else text
        )
        images, sizes = inputs(ledger.about if bare_shape(ledger.about) else {**ledger.about, "input": text})
        said = re.search(r"multiple of (\d+)", text)
        multiple = int(said[1]) if said else 1 if "no padding" in text or "output_size" not in ledger.about else 32
        height, width = (-(-s // multiple) * multiple for s in images.shape[2:])
        self.images = torch.nn.functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        output = ledger.about.get("output_size", sizes[0])
        self.placement = Placement.resize((int(output[0]), int(output[1])), sizes[0])

    # ---- the network ---------------------------------------------------------------------------------------------

    def answers(self) -> None:
        ledger, system, net, kept = self.ledger, self.system, self.system.dense, {}
        hooks = [
            part.register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
            for name, part in (
                ("backbone", net.backbone), ("pixels", net.pixel_decoder), ("last", net.decoder[-1]),
                ("norm", net.norm), ("encoder", getattr(net.pixel_decoder, "encoder", None)),
            )
            if part is not None
        ]  # fmt: skip
        with torch.no_grad():
            raw = self.settled() if self.official else system(self.images)
        for hook in hooks:
            hook.remove()
        for number, level in enumerate(kept["backbone"]):
            for name in (f"backbone_res{number + 2}", f"encoder_{number}"):
                if name in ledger:
                    ledger.compare(name, level)
        features, maps = kept["pixels"]
        for name in ("pixel_mask_features", "pixel_decoder_last_hidden_state"):
            if name in ledger:
                ledger.compare(name, features)
        for name in ledger.names(r"pixel_level\d"):
            ledger.compare(name, maps[int(name[-1])])
        if "transformer_encoder_features" in ledger:
            ledger.compare("transformer_encoder_features", maps)
        if "transformer_decoder_last_hidden_state" in ledger:
            ledger.compare("transformer_decoder_last_hidden_state", kept["last" if self.official else "norm"])
        masks = [raw.masks(layer) for layer in range(len(raw.classes))]
        for names, value in (
            (("pred_logits", "class_queries_logits"), raw.classes[-1]),
            (("pred_masks", "masks_queries_logits"), masks[-1]),
            (("aux_logits",), raw.classes[:-1] if self.planes("aux_logits") == 4 else raw.classes[:-1, 0]),
            (("aux_masks",), torch.stack(masks[:-1]) if self.planes("aux_masks") == 5 else torch.cat(masks[:-1])),
        ):
            for name in names:
                if name in ledger:
                    ledger.compare(name, value)
        if "attn_blocked_fraction" in ledger:
            self.blocked(raw, maps)
        if ledger.names(r"inst_\w+"):
            self.objects("inst_", system.decode(raw, [self.placement])[0])
        if ledger.names(r"pan_(seg|info)"):
            about = ledger.about
            limits = self.limits(str(about.get("thresholds", "")) or str(about["notes"]).partition("post/*")[0])
            found = system.decode_panoptic(raw, [self.placement], **limits)[0]
            self.segments("", found, self.ties(raw, limits.get("score_threshold", 0.8)))

    def planes(self, name: str) -> int:
        """The number of axes of a recorded array."""
        arrays = self.ledger.arrays
        return len(arrays[f"{name}__shape"]) if f"{name}__shape" in arrays else np.ndim(arrays.get(name, 0))

    def settled(self) -> Any:
        """The raw output, in which keys whose mask logit is zero up to rounding are on the original's side of the
        threshold. One key of one query changes everything after it by a thousandth; the sides are found by trial."""
        net, close, flipped = self.system.dense, [], set()
        original, layers = type(net).allowed, len(net.decoder)

        def allowed(embeddings: Tensor, coarse: Tensor, rescue: bool = True) -> Tensor:
            logits = torch.bmm(embeddings, coarse)
            call = len(close) % layers
            near = (logits[0].abs() < 1e-5 * logits.std()).nonzero().tolist()
            close.append([(float(logits[0, q, k].abs()), call, q, k) for q, k in near])
            inside = original(embeddings, coarse, rescue=False)
            for _, at, query, key in flipped:
                if at == call:
                    inside[0, 0, query, key] = ~inside[0, 0, query, key]
            return inside | ~inside.any(-1, keepdim=True) if rescue else inside

        def run() -> tuple[float, Any]:
            close.clear()
            raw = self.system(self.images)
            aux = raw.classes[:-1] if self.planes("aux_logits") == 4 else raw.classes[:-1, 0]
            given = ((("pred_logits", "class_queries_logits"), raw.classes[-1]), (("aux_logits",), aux))
            errors = [self.error(n, value) for names, value in given for n in names if n in self.ledger]
            return max(errors, default=0.0), raw

        net.allowed = allowed
        error, _ = run()
        while error > 2e-5 and len(flipped) < 6:
            tried = []
            for key in sorted(c for call in close for c in call)[:8]:
                flipped.symmetric_difference_update({key})
                tried.append((*run(), frozenset(flipped)))
                flipped.symmetric_difference_update({key})
            if not tried or min(t[0] for t in tried) > error / 2:
                break
            error, _, best = min(tried, key=lambda t: t[0])
            flipped.clear()
            flipped.update(best)
            run()
        if flipped:
            self.ledger._line("masked attention", f"{len(flipped)} keys flipped: {BLOCKED}", True)
        return run()[1]

    def error(self, name: str, ours: Tensor) -> float:
        """The relative error as the ledger computes it, without recording a comparison."""
        seen = set(self.ledger.seen)
        theirs, _, chosen = self.ledger._answer(name)
        self.ledger.seen = seen
        flat = ours.numpy().reshape(-1)
        flat = flat if chosen is None else flat[chosen]
        return float(np.linalg.norm(flat - theirs.reshape(-1)) / np.linalg.norm(theirs))

    def blocked(self, raw: Any, maps: list[Tensor]) -> None:
        rows = []
        for number in range(len(raw.classes) - 1):
            small = torch.nn.functional.interpolate(
                raw.features, maps[number % len(maps)].shape[2:], mode="bilinear", align_corners=False
            )
            allowed = self.system.dense.allowed(raw.embeddings[number], small.flatten(2), rescue=False)[0, 0]
            rows.append(1 - allowed.float().mean(1))
        theirs, ours = self.ledger.peek("attn_blocked_fraction"), torch.stack(rows)
        keys = [maps[number % len(maps)][0, 0].numel() for number in range(len(rows))]
        apart = ((ours - theirs).abs() * torch.tensor(keys)[:, None]).round().sum()
        same = torch.where((ours - theirs).abs() * torch.tensor(keys)[:, None] < 1.5, theirs, ours)
        assert apart <= 1e-4 * 100 * sum(keys), BLOCKED
        self.ledger.compare("attn_blocked_fraction", same, note=f"{int(apart)} keys differ: {BLOCKED}")

    # ---- finished answers ----------------------------------------------------------------------------------------

    @staticmethod
    def limits(text: str) -> dict[str, float]:
        """Thresholds from a text that describes them."""
        number = r"(\d*\.?\d+)"
        found = re.search(rf"object(?:_mask)? {number}, overlap {number}", text) or re.search(
            rf"\({number}/{number}\)", text
        )
        if found is None:
            return {}
        return {"score_threshold": float(found[1]), "overlap_threshold": float(found[2])}

    @part
    def objects(self, name: str, found: Instances) -> None:
        """Compares objects, in the original's order where scores are equal up to rounding."""
        ledger = self.ledger
        assert found.scores is not None
        assert found.masks is not None
        names = (f"{name}scores", f"{name}mask_area", f"{name}classes")
        ours = (found.scores, found.masks.areas(), found.labels)
        if all(n in ledger.arrays for n in names):
            scores, areas, labels = (ledger.peek(n) for n in names)
            rows = matching_areas((scores, areas, labels), ours)
            if rows is None:
                return ledger.fail(names[0], f"{len(found)} objects instead of {len(scores)}")
        else:
            rows = ledger.pair((names[0], found.scores), (names[2], found.labels))
            if rows is None:
                return None
        found = found[rows]
        assert found.scores is not None
        assert found.masks is not None
        ledger.compare(f"{name}scores", found.scores)
        ledger.equal(f"{name}classes", found.labels)
        self.nearly(f"{name}mask_area", found.masks.areas(), 1e-4 * found.masks.size[0] * found.masks.size[1])
        if f"{name}masks" in ledger:
            self.agree(f"{name}masks", found.masks.dense())

    def nearly(self, name: str, ours: Tensor, slack: float) -> None:
        if name not in self.ledger:
            return
        theirs = self.ledger.peek(name)
        far = int((ours - theirs).abs().amax()) if len(ours) else 0
        self.ledger.seen.add(name)
        self.ledger._line(name, f"{far} pixels apart at most (bound {slack:.0f}: at the threshold)", far <= slack)

    def agree(self, name: str, ours: Tensor, share: float = 1e-3, open: Tensor | None = None) -> None:
        """Compares values for equality, except for a share at a threshold and for those that are `open`."""
        if name not in self.ledger:
            return None
        theirs, shape, chosen = self.ledger._answer(name)
        if tuple(ours.shape) != tuple(shape):
            return self.ledger._line(name, f"shape {tuple(ours.shape)}, expected {tuple(shape)}", False)
        flat = ours.cpu().numpy().reshape(-1)
        free = np.zeros(flat.shape, bool) if open is None else open.numpy().reshape(-1)
        if chosen is not None:
            flat, free = flat[chosen], free[chosen]
        different = int(((flat != theirs.reshape(-1)) & ~free).sum())
        text = f"{different} of {flat.size} values differ (bound {share:g}: at the threshold)"
        text += f", {int(free.sum())} are between two queries that are equal up to rounding" if free.any() else ""
        self.ledger._line(name, text, different <= share * flat.size)

    def ties(self, raw: Any, threshold: float) -> Tensor:
        """Pixels where the best two of the confident queries are equal up to rounding."""
        scores, labels = raw.classes[-1, 0].softmax(-1).max(-1)
        sure = ((scores > threshold) & (labels < len(self.system.classes))).nonzero().flatten()
        rows = []
        for values, _ in query_ops.resized_bands(raw.masks_of(0, sure), self.placement, raw.size):
            best = (scores[sure][:, None, None] * values.sigmoid()).topk(min(2, len(sure)), 0).values
            rows.append(best[0] - best[-1] < 2e-5 * best[0])
        return torch.cat(rows)

    def segments(self, name: str, found: Any, open: Tensor | None = None) -> None:
        self.agree(f"{name}pan_seg", found.map(), open=open)
        numbers = torch.arange(1, len(found) + 1)
        self.ledger.equal(f"{name}pan_info", torch.stack([numbers, found.segments.labels, found.things.long()], 1))

    def post(self) -> None:
        """Compares the decoding of artificial outputs."""
        ledger, system = self.ledger, self.system
        text = " ".join(str(ledger.about.get(n, "")) for n in ("post", "notes"))
        text = text[text.index("post/*") :]
        seed = sum(int(n) for n in re.search(r"RandomState\(([\d+ ]+)\)", text)[1].split("+"))  # pyright: ignore[reportOptionalSubscript]
        grid = [int(n) for n in re.search(r"standard_normal\(\(1,(\d+),(\d+),(\d+)\)\)", text).groups()]  # pyright: ignore[reportOptionalMemberAccess]
        image, output = (tuple(map(int, re.search(rf"{w} (\d+)x(\d+)", text).groups())) for w in ("image", "output"))  # pyright: ignore[reportOptionalMemberAccess]
        padded = re.search(r"padded to (\d+)x(\d+)", text)
        size = (int(padded[1]), int(padded[2])) if padded else image
        stream = np.random.RandomState(seed)
        shape = (1, grid[0], len(system.classes) + 1)
        logits = torch.from_numpy(stream.standard_normal(shape).astype("float32") * np.float32(3))
        masks = torch.from_numpy(stream.standard_normal((1, *grid)).astype("float32") * np.float32(4))[0]
        probabilities, placement = logits[0].softmax(-1), Placement.resize(output, image)  # pyright: ignore[reportArgumentType]
        things = system.thing_classes()
        if ledger.names(r"post/inst_\w+"):
            found = query_ops.select_instances(
                probabilities[:, :-1], lambda rows: masks[rows], placement, size, query_ops.Selection(),
                things if system.stuff else None,
            )  # fmt: skip
            self.objects("post/inst_", found)
        if ledger.names(r"post/pan_\w+"):
            divided = query_ops.select_segments(
                probabilities, lambda rows: masks[rows], placement, size, things, inside=self.official,
                **self.limits(text),
            )  # fmt: skip
            self.segments("post/", divided)
        if "post/sem_seg" in ledger:
            maps = query_ops.semantic_maps(probabilities[:, :-1], lambda rows: masks[rows], placement, size)
            ledger.compare("post/sem_seg", torch.cat([values for values, _ in maps], 1))

    # ---- learning ------------------------------------------------------------------------------------------------

    def target(self) -> Instances:
        """The recorded target, or the one that these recordings construct: ellipses and boxes in a row."""
        ledger = self.ledger
        labels = ledger.given("target_labels")
        size = (self.images.shape[2], self.images.shape[3])
        if "target_masks" in ledger.arrays:
            planes = ledger.given("target_masks")
        else:
            y, x = (torch.arange(n, dtype=torch.float64) for n in size)
            rows = []
            for k in range(len(labels)):
                down = (y - (0.25 + 0.2 * k) * size[0]).abs() / ((0.12 + 0.05 * k) * size[0])
                across = (x - (0.7 - 0.2 * k) * size[1]).abs() / ((0.1 + 0.06 * k) * size[1])
                box = torch.maximum(down[:, None], across[None])
                rows.append((box if k % 2 else down[:, None].square() + across[None].square()) <= 1)
            planes = torch.stack(rows)
            if "target_masks" in ledger:
                self.agree("target_masks", planes, 0.0)
        masks = Masks.from_dense(planes).pack()
        return Instances(size, masks.boxes(), labels, masks)

    @part
    def learning(self) -> None:
        ledger, system = self.ledger, self.system
        for parameter in system.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        if "rng_first8" in ledger:
            torch.manual_seed(0)
            ledger.compare("rng_first8", torch.rand(8))
        if ledger.names(r"loss_no_objects/\w+"):
            with torch.no_grad():
                raw, empty = system(self.images), Instances.empty((self.images.shape[2], self.images.shape[3]))
                self.terms("loss_no_objects/", system.losses(raw, [empty]))
        target = self.target()
        raw = system(self.images)
        torch.manual_seed(0)
        choices = self.pairs(raw, target)
        torch.manual_seed(0)
        with ties.choosing(sys.modules[type(system).__module__], choices):
            terms = system.losses(raw, [target])
        self.terms("loss/", terms)
        total = torch.stack(list(terms.values())).sum()
        ledger.compare("loss/total_weighted", total)
        if "grad_norms" in ledger:
            total.backward()
            self.gradients()

    def terms(self, prefix: str, terms: dict[str, Tensor]) -> None:
        theirs = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}
        weights = dict(zip(theirs, self.system.loss.weights, strict=True))
        for name, value in terms.items():
            kind, _, number = name.partition("_")
            key = f"{prefix}{theirs[kind]}" + (f"_{number}" if number else "")
            self.ledger.compare(key, value / weights[kind])

    def pairs(self, raw: Any, target: Instances) -> list[ties.Choice]:
        objects = [learning.Objects.from_instances(target, raw.classes.device)]
        costs = self.system.costs(raw, objects)
        queries, which = assign(costs)[0]
        if "match_pairs_final_then_aux" not in self.ledger:
            return []
        theirs = self.ledger.peek("match_pairs_final_then_aux").roll(-1, 0)
        pairs = torch.stack([queries, which], 1)
        return ties.compare_choice(self.ledger, "match_pairs_final_then_aux", costs[0], pairs, theirs)

    @part
    def gradients(self) -> None:
        """Compares gradient norms per parameter of the original, which may be split into several here."""
        ledger = self.ledger
        keys = ledger.texts("grad_keys")
        origin = next(o for o in origins() if o.system == self.system.name and o.name.startswith("facebookresearch"))
        numbered = origin.translate({k: torch.full((3,), float(i)) for i, k in enumerate(keys)}, {})
        squares = torch.zeros(len(keys), dtype=torch.float64)
        gradients = {n: p.grad for n, p in self.system.named_parameters() if p.grad is not None}
        for name, value in numbered.items():
            squares[int(value[0])] += gradients.pop(name).double().square().sum()
        assert not gradients, f"the original trains no {', '.join(list(gradients)[:3])}"
        ledger.compare("grad_norms", squares.sqrt(), 1e-4, LONG)


SYSTEMS = {"mask2former": check, "maskformer": check}
