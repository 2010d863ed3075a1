"""EoMT, against the code of its authors: predictions without and with masked attention, losses, and decoding."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maskwright.checkpoints.origins import origins
from maskwright.ops import queries as query_ops
from maskwright.ops import query_losses as learning
from maskwright.structures import Placement
from tests.parity.checkers import mask2former
from tests.parity.ledger import LARGEST, Ledger, matching_areas, part

DEEP = "gradients of four matched predictions at random points through all blocks"
NEAR_ZERO = 2e-5  # of mask logits up to 25: rounding decides whether a query attends to such a patch


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    own = Check(system.eval(), ledger)
    own.answers()
    raw = own.masked() if ledger.names(r"masked/.*") else None
    if ledger.names(r"loss/\w+|grad_norms|match_pairs|rng_first8"):
        own.check_losses(raw)
    if ledger.names(r"post/\w+"):
        own.post()


class Check(mask2former.Check):
    # ---- the network ---------------------------------------------------------------------------------------------

    def answers(self) -> None:
        ledger = self.ledger
        with torch.no_grad():
            raw = self.system(self.images)
            tokens, _, _ = self.system.dense.backbone.begin(self.images)
        if "tokens_after_pos" in ledger:
            ledger.compare("tokens_after_pos", tokens[:, : int(_shape(ledger, "tokens_after_pos")[1])])
        for name, ours in (  # under the names of the authors and of transformers
            ("mask_logits", raw.masks()),
            ("masks_queries_logits", raw.masks()),
            ("class_logits", raw.classes[-1]),
            ("class_queries_logits", raw.classes[-1]),
        ):
            if name in ledger:
                ledger.compare(name, ours)

    def masked(self) -> Any:
        """Compares the predictions with masked attention. Where the logit of a patch is zero up to rounding, both
        decisions are tried, and the one closer to the recording is kept for the following blocks."""
        system, ledger = self.system.train(), self.ledger
        system.dense.mask_probability.fill_(1)
        flips: list[Tensor] = []
        raw, uncertain = self.forward(flips)
        for number in range(len(system.dense.mask_probability)):
            cells, plain = uncertain[number].nonzero(), torch.zeros_like(uncertain[number])
            if not len(cells):
                flips.append(plain)
                continue
            trials = []
            choices = (c for n in range(min(3, len(cells)) + 1) for c in itertools.combinations(range(len(cells)), n))
            for chosen in itertools.islice(choices, 16):
                flip = plain.clone()
                flip[tuple(cells[list(chosen)].T)] = True
                trials.append((*self.forward([*flips, flip]), flip))
            raw, uncertain, flip = min(trials, key=lambda t: self.apart(t[0], number + 1))
            flips.append(flip)
        counts = ", ".join(str(int(f.sum())) for f in flips)
        note = f"patches flipped because of rounding before each block: {counts}" if any(f.any() for f in flips) else ""
        masks = torch.stack([raw.masks(layer)[0] for layer in range(len(raw.classes))])
        ledger.compare("masked/mask_logits_per_layer", masks, note=note)
        ledger.compare("masked/class_logits_per_layer", raw.classes[:, 0], note=note)
        return raw

    def forward(self, flips: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """The raw output with some decisions flipped, and which decisions are uncertain, for each block."""
        net, uncertain, plain = self.system.dense, [], self.system.dense.allowed

        def watched(embeddings: Tensor, features: Tensor, grid: Any, probability: Tensor) -> Tensor:
            allowed = plain(embeddings, features, grid, probability)
            small = functional.interpolate(features, grid, mode="bilinear", align_corners=False).flatten(2)
            uncertain.append((embeddings @ small).abs() < NEAR_ZERO)
            if len(uncertain) <= len(flips):
                count, before = embeddings.shape[1], allowed.shape[-1] - small.shape[2]
                allowed[:, 0, :count, before:] ^= flips[len(uncertain) - 1]
            return allowed

        net.allowed = watched
        try:
            with torch.no_grad():
                return self.system(self.images), uncertain
        finally:
            del net.allowed

    def apart(self, raw: Any, layer: int) -> float:
        """The distance of prediction `layer` from the recording."""
        total = 0.0
        for name, ours in (("class_logits", raw.classes[layer]), ("mask_logits", raw.masks(layer))):
            if f"masked/{name}_per_layer" not in self.ledger:
                continue
            theirs, shape, chosen = self.ledger._answer(f"masked/{name}_per_layer")
            places = np.arange(int(np.prod(shape))) if chosen is None else chosen
            rows = places // ours.numel() == layer
            values = ours.numpy().reshape(-1)[places[rows] - layer * ours.numel()]
            total += float(np.linalg.norm(values - theirs.reshape(-1)[rows]))
        return total

    # ---- learning ------------------------------------------------------------------------------------------------

    @part
    def check_losses(self, raw: Any) -> None:
        ledger, system = self.ledger, self.system.train()
        if "rng_first8" in ledger:
            torch.manual_seed(0)
            ledger.compare("rng_first8", torch.rand(8))
        target = self.target()
        if "grad_norms" in ledger or raw is None:
            system.dense.mask_probability.fill_(1)
            raw = system(self.images)
        torch.manual_seed(0)
        objects = [learning.Objects.from_instances(target, raw.classes.device)]
        count = learning.object_count(objects, raw.classes.device)
        found = [system.prediction_losses(raw, layer, objects, count) for layer in range(len(raw.classes))]
        ledger.equal("match_pairs", torch.stack([torch.stack([q[0], o[0]]) for _, ((q, o),) in found]))
        for layer, (terms, _) in enumerate(found):
            for name, value, weight in zip(("cross_entropy", "mask", "dice"), terms, system.loss.weights, strict=True):
                ledger.compare(f"loss/loss_{name}_{layer}", value / weight)
        torch.manual_seed(0)
        total = torch.stack(list(system.losses(raw, [target]).values())).sum()
        ledger.compare("loss/total_weighted", total)
        if "grad_norms" in ledger:
            system.zero_grad()
            total.backward()
            self.gradients()

    @part
    def gradients(self) -> None:
        ledger = self.ledger
        keys = ledger.texts("grad_keys")
        origin = next(o for o in origins() if o.system == "eomt" and o.name == self.system.source["origin"])
        before = "network." if origin.name.startswith("eomt") else ""
        ours = dict(self.system.named_parameters())
        numbered = origin.translate(
            {f"{before}{k}": torch.full((3,), float(i)) for i, k in enumerate(keys)},
            {"backbone": self.system.options["backbone"]},
        )
        norms = torch.zeros(len(keys), dtype=torch.float64)
        for name, value in numbered.items():
            gradient = ours.pop(name).grad
            assert gradient is not None, name
            parts = (
                value.reshape(-1, 3)[:, 0].int().tolist()
            )  # query, key and value may be three parameters of the original
            for place, rows in zip(parts, gradient.double().chunk(len(parts)), strict=True):
                norms[place] = rows.norm()
        assert not ours, f"the original trains no {', '.join(list(ours)[:3])}"
        ledger.compare("grad_norms", norms, LARGEST, DEEP)

    # ---- finished answers ----------------------------------------------------------------------------------------

    def post(self) -> None:
        """Compares the decoding of artificial outputs, which the notes of the recording describe."""
        ledger, seed = self.ledger, int(self.ledger.about["seed"]) + 7
        stream = np.random.RandomState(seed)
        text = str(ledger.about["notes"])
        text = text[text.index("post/*") :]
        shape, grid = (
            [int(n) for n in re.search(rf"{w}=\(standard_normal\(\(([\d, ]+)\)", text)[1].split(",")]  # pyright: ignore[reportOptionalSubscript]
            for w in ("logits", "masks")
        )
        size, image = (
            tuple(map(int, re.search(rf"{w} (\d+)x(\d+)", text).groups()))  # pyright: ignore[reportOptionalMemberAccess]
            for w in ("network size", "original image")
        )
        logits = torch.from_numpy(stream.standard_normal(tuple(shape)).astype("float32") * np.float32(4))[0]
        masks = torch.from_numpy(stream.standard_normal(tuple(grid)).astype("float32") * np.float32(4))[0]
        part = re.search(r"first (\d+) logits", text)
        count = (int(part[1]) if part else shape[2]) - 1
        ratio = min(s / p for s, p in zip(size, image, strict=True))
        inner = (round(image[0] * ratio), round(image[1] * ratio))
        placement = Placement.resize(image, inner).then_crop(0, 0, size)
        if "post/pan_class_segment" in ledger:
            self.divided(logits, masks, placement, size, text)
        if ledger.names(r"post/inst_\w+"):
            self.chosen(logits[:, : count + 1], masks, placement, size)

    def chosen(self, logits: Tensor, masks: Tensor, placement: Placement, size: tuple[int, int]) -> None:
        ledger, count = self.ledger, logits.shape[1] - 1
        scores = logits.softmax(-1)[:, :-1]
        place = scores.flatten().topk(min(100, scores.numel())).indices
        ledger.equal("post/inst_query", place // count)
        ledger.equal("post/inst_classes", place % count)
        found = query_ops.select_instances(scores, lambda rows: masks[rows], placement, size, query_ops.Selection())
        assert found.scores is not None
        assert found.masks is not None
        if "post/inst_scores" in ledger.arrays and "post/inst_area" in ledger.arrays:
            theirs, areas = ledger.peek("post/inst_scores"), ledger.peek("post/inst_area")
            rows = matching_areas((theirs, areas, place % count), (found.scores, found.masks.areas(), found.labels))
            if rows is None:
                return ledger.fail("post/inst_scores", f"{len(found)} objects instead of {len(theirs)}")
        else:
            rows = ledger.pair(("post/inst_scores", found.scores))
            if rows is None:
                return None
        ledger.compare("post/inst_scores", found.scores[rows])
        self.nearly("post/inst_area", found.masks.areas()[rows], 1)

    def divided(self, logits: Tensor, masks: Tensor, placement: Placement, size: tuple[int, int], text: str) -> None:
        void, last = logits.shape[-1] - 1, re.search(r"things 0\.\.(\d+)", text)
        things = torch.arange(void) <= (int(last[1]) if last else 79)
        limits = re.search(r"thresholds ([\d.]+)/([\d.]+)", text)
        divided = query_ops.select_segments(
            logits.softmax(-1), lambda rows: masks[rows], placement, size, things,
            score_threshold=float(limits[1]) if limits else 0.8,
            overlap_threshold=float(limits[2].rstrip(".")) if limits else 0.8,
        )  # fmt: skip
        number = divided.map().long() - 1
        labels = divided.segments.labels
        kinds = torch.cat([labels, torch.tensor([void])])[number]
        self.agree("post/pan_class_segment", torch.stack([kinds, number], -1))


def _shape(ledger: Ledger, name: str) -> tuple[int, ...]:
    key = f"{name}__shape"
    return tuple(int(n) for n in ledger.arrays[key]) if key in ledger.arrays else ledger.arrays[name].shape


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """Files with DINOv3 are read as sums: the artificial weights of a layout are not differences."""
    words = " ".join(str(about.get(word, "")) for word in ("variant", "layout")).lower()
    ours = "already summed" in words or ("eomt" in words and "dinov3" in words and "-hf" not in words)
    return {"variant": "sum"} if ours else {}


SYSTEMS = {"eomt": check}
