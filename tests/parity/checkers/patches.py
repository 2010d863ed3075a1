"""DeepMask in both of its forms, by the released code and its port, and the assembly of InstanceFCN's masks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.ops.losses import soft_margin
from maskwright.structures import Placement
from maskwright.systems.deepmask import DeepMask, Raw
from maskwright.systems.instancefcn import assemble
from tests.parity.ledger import Ledger, NotRecorded, part


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """The dense form was recorded for one image at its own size."""
    return {"scales": (1.0,)} if "deepmask" in str(about.get("source", "")) else {}


def check(system: DeepMask, layout: Path, ledger: Ledger) -> None:
    system.eval()
    seed, window = int(ledger.about.get("seed") or 0), system.dense.window
    patches, canvas = (
        torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(ledger.about[name])).astype("float32"))
        for name in ("patch_input", "dense_input")
    )
    with torch.no_grad():
        features = window.backbone(patches)[-1]
        grids, scores = system.patches(patches)
        raw = _dense(system, canvas)
        masks = system.mask_tensor(raw, 0).values.flatten(1, 2)
    for name in ("patch_res4", "patch_trunk"):
        if name in ledger:
            ledger.compare(name, features if name == "patch_res4" else features[:, :64])
    if "patch_feature512" in ledger:
        with torch.no_grad():
            ledger.compare("patch_feature512", window(patches, system.context)[0][:, :, 0, 0])
    if "patch_mask56_logits" in ledger:
        ledger.compare("patch_mask56_logits", grids.flatten(1))
    large = system.enlarged(grids)
    ledger.compare("patch_mask112_logits", large)
    if "patch_score" in ledger:
        ledger.compare("patch_score", scores.reshape(ledger.shape("patch_score")))
    ledger.compare("dense_feature512", raw.features[0])
    for name in ("dense_score_logits", "dense_score"):
        if name in ledger:
            ledger.compare(name, raw.scores[0])
    if "dense_mask_logits" in ledger:
        ledger.compare("dense_mask_logits", masks)
    if "dense_mask112" in ledger:
        each = masks[0].flatten(1).T.unflatten(1, (system.mask_side, system.mask_side))
        ledger.compare("dense_mask112", system.enlarged(each)[None])
    _mask_loss(large, ledger, seed)
    _score_loss(scores, ledger)
    if ledger.names(r"proposal_masks|top_scores|top_rows_cols"):
        _proposals(system, raw, ledger)


@part
def _mask_loss(large: Tensor, ledger: Ledger, seed: int) -> None:
    if ledger.names(r"loss_mask_softmargin_mean|patch_target_pm1"):
        truth = (signs(ledger, "patch_target_pm1", seed) + 1) / 2
        ledger.compare("loss_mask_softmargin_mean", soft_margin(large.flatten(1), truth).mean())


@part
def _score_loss(scores: Tensor, ledger: Ledger) -> None:
    if "loss_score_softmargin_mean" in ledger:
        truth = (ledger.given("score_target").float() + 1) / 2
        ledger.compare("loss_score_softmargin_mean", soft_margin(scores[:, None], truth).mean())


def _dense(system: DeepMask, canvas: Tensor) -> Raw:
    """The raw output for an image that is padded by half a window already."""
    feature, score = system.dense.window(canvas)
    height, width = canvas.shape[-2:]
    return Raw((score,), (feature,), (height - system.window, width - system.window))


def signs(ledger: Ledger, name: str, seed: int) -> Tensor:
    """A target of 1 and -1. If only a sample of it was kept, it is drawn again: whether uniform numbers exceed 0.5."""
    if f"{name}__sampled" not in ledger.arrays:
        return ledger.given(name).float()
    shape = tuple(int(n) for n in ledger.arrays[f"{name}__shape"])
    for own in (7, seed + 7, *range(100)):
        drawn = torch.from_numpy(np.where(np.random.RandomState(own).rand(*shape) > 0.5, 1.0, -1.0)).float()
        kept = ledger.arrays[f"{name}__sampled"]
        places = np.random.RandomState(0).randint(0, drawn.numel(), len(kept))
        if (drawn.flatten().numpy()[places] == kept).all():
            ledger.compare(name, drawn)
            return drawn
    raise NotRecorded(f"{name} as a whole")


def _proposals(system: DeepMask, raw: Raw, ledger: Ledger) -> None:
    count = next(ledger.length(n) for n in ("top_scores", "top_rows_cols", "proposal_masks") if n in ledger)
    scores = raw.scores[0][0, 0].sigmoid()
    best, place = scores.flatten().topk(count)
    rows = torch.stack([place // scores.shape[1], place % scores.shape[1]], 1)
    ledger.compare("top_scores", best)
    ledger.equal("top_rows_cols", rows)
    found = system.decode(raw, [Placement.identity(raw.size)], detections=count)[0]
    assert found.masks is not None
    ledger.compare_bits("proposal_masks", found.masks.dense())


def check_assembling(ledger: Ledger) -> None:
    for parts in sorted({int(n.split("_")[1][1:]) for n in ledger.names(r"windows_k\d+_m\d+_(floor|centre)")}):
        _check_windows(ledger, parts)


@part
def _check_windows(ledger: Ledger, parts: int) -> None:
    maps = ledger.given(f"maps_k{parts}")[None]
    for windows in ledger.names(rf"windows_k{parts}_m\d+_(floor|centre)"):
        found = re.fullmatch(r"windows_k\d+_m(\d+)_(floor|centre)", windows)
        assert found is not None
        side, bins = int(found[1]), "floor" if found[2] == "floor" else "nearest"
        values = assemble(maps, parts, side, bins, pad=0.0)[0]
        inside = assemble(torch.ones_like(maps), parts, side, bins, pad=0.0)[0] > 0.5
        answer = torch.where(inside, values, torch.nan).permute(2, 3, 0, 1)
        sampled = f"{windows}__sampled"
        theirs = ledger.arrays[sampled if sampled in ledger.arrays else windows]
        ours = answer.numpy().reshape(-1)
        if sampled in ledger.arrays:
            ours = ours[np.random.RandomState(0).randint(0, len(ours), len(theirs))]
        if not np.array_equal(np.isnan(ours), np.isnan(theirs.reshape(-1))):
            ledger.fail(windows, "different entries lie outside of the map")
            continue
        ledger.compare(windows, answer, note="nan is outside of the map, in both")


SYSTEMS = {"deepmask": check}
FILES = ("instancefcn-assemble",)
OPERATORS = [(lambda ledger: bool(ledger.names(r"windows_k\d+_m\d+_(floor|centre)")), check_assembling)]
