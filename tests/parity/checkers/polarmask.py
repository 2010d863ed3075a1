"""PolarMask and FourierNet, by their authors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.blocks import fcos
from maskwright.ops.contours import fourier_coefficients, fourier_rays, ray_points, rays_from
from maskwright.ops.outlines import Contours, fill_contours, outer_contours
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.fouriernet import FourierCode, FourierNet
from maskwright.systems.polarmask import (
    PolarMask,
    Thresholds,
    polar_centerness,
    polar_detections,
    polar_losses,
    polar_targets,
)
from tests.parity.ledger import Ledger, inputs, part

# The arc tangent of the originals is a rounding error short of 45 degrees in full vectors of float32, and exact in the
# remainder: whether such a pixel lies in degree 44 or 45 depends on its number along the border. Rays more than three
# degrees away are not affected.
DIAGONAL = "rays near a pixel at exactly 45 degrees are left out"
LOSSES = {"loss_cls": "class", "loss_bbox": "box", "loss_mask": "mask", "loss_centerness": "centerness"}


def check(system: PolarMask | FourierNet, layout: Path, ledger: Ledger) -> None:
    images, _ = inputs(ledger.about)
    size = (images.shape[-2], images.shape[-1])
    features: list[Tensor] = []

    def keep(module: Any, given: Any, answer: list[Tensor]) -> None:
        features.extend(answer[-1:] if module is system.dense.backbone else answer)

    hooks = [part.register_forward_hook(keep) for part in (system.dense.backbone, system.dense.neck)]
    with torch.no_grad():
        raw = system.eval()(images)
        for hook in hooks:
            hook.remove()
        answers = {"c5": features[0]}
        shape = ("coef", raw.codes) if isinstance(system, FourierNet) else ("rays", [c.exp() for c in raw.codes])
        boxes = ("box", [b.exp() for b in raw.boxes])
        for level, values in enumerate(features[1:]):
            answers[f"p{level + 3}"] = values
            for kind, levels in (("cls", raw.classes), boxes, ("centerness", raw.centerness), shape):
                answers |= {f"{kind}_{level}": levels[level]} if levels else {}
        for name, values in answers.items():
            if name in ledger:
                ledger.compare(name, values)
        if ledger.names(r"decode_p5_\w+"):
            _decoder(system, raw, ledger)
        if ledger.names(r"det_\w+"):
            _detections(system, raw, ledger)
        if ledger.names(r"(gt|t|loss)_\w+"):
            _targets(system, raw, ledger, size)
        _codes(ledger, size, system.code.rays)


# ---- decoding -----------------------------------------------------------------------------------------------------


def _decoder(system: PolarMask | FourierNet, raw: Any, ledger: Ledger) -> None:
    """All locations of P5, with all coefficients and with the first few."""
    values = raw.codes[2][0].flatten(1).T
    rays = system.code.decode(values)
    ledger.compare("decode_p5_rays", rays)
    ledger.compare("decode_p5_xy", ray_points(fcos.locations(raw.classes)[2], rays).transpose(1, 2))
    for name in ledger.names(r"decode_p5_rays_first\d+"):
        assert isinstance(system.code, FourierCode)
        visible = replace(system.code, visible=int(name.rsplit("first", 1)[1]))
        ledger.compare(name, visible.decode(values))


@part
def _detections(system: PolarMask | FourierNet, raw: Any, ledger: Ledger) -> None:
    about = ledger.about
    limits = {"nms_pre": 1000, "score_thr": 0.05, "nms_iou": 0.5, "max_per_img": 100, **about.get("thresholds", {})}
    scale = about.get("scale_factor", 1.0)
    scale = [scale] * 4 if isinstance(scale, int | float) else scale
    height, width = about["ori_shape"][:2]
    placement = Placement((height, width), tuple(about["img_shape"][:2]), (scale[0], scale[1]))
    thresholds = Thresholds(limits["score_thr"], limits["nms_iou"], limits["max_per_img"], limits["nms_pre"])
    found = polar_detections(raw, 0, placement, system.code, system.rules, thresholds)
    rows = ledger.pair(("det_boxes", found.boxes), ("det_labels", found.labels), ("det_scores", found.scores))
    if rows is None:
        return
    ledger.compare("det_boxes", found.boxes[rows])
    ledger.compare("det_scores", found.scores[rows])
    ledger.equal("det_labels", found.labels[rows])
    ledger.compare("det_contours", found.contours[rows].transpose(1, 2))
    final = system.decode(
        raw, [placement], score_threshold=limits["score_thr"], nms_threshold=limits["nms_iou"],
        detections=limits["max_per_img"], before=limits["nms_pre"],
    )[0][rows]  # fmt: skip
    assert final.masks is not None
    ledger.equal("det_mask_area", final.masks.areas())
    ledger.compare_packed_rows("det_mask_bits", final.masks.dense(), share=0)


# ---- targets and losses -----------------------------------------------------------------------------------------


@part
def _targets(system: PolarMask | FourierNet, raw: Any, ledger: Ledger, size: tuple[int, int]) -> None:
    boxes = ledger.given("gt_boxes") + torch.tensor([0.0, 0, 1, 1])
    planes = _planes(ledger.given("gt_mask_bits"), size)
    target = Instances(size, boxes, ledger.given("gt_labels") - 1, Masks.from_dense(planes))
    centres = torch.stack([_their_centre(plane) for plane in planes]).float()
    contours = outer_contours(Masks.from_dense(planes))
    count = system.code.rays
    if "gt_centers_yx" in ledger:
        ledger.compare("gt_centers_yx", centres.flip(1))
        rays = rays_from(contours, torch.arange(len(planes)), centres, count)
        ledger.compare("gt_max_centerness", polar_centerness(rays))
    found = polar_targets(fcos.locations(raw.classes), target, count, system.rules, centres)
    if "t_labels" in ledger:
        ledger.equal("t_labels", found.labels + 1)
        ledger.compare("t_boxes", found.inner)
        ledger.equal("t_pos", found.positive)
    points = torch.cat(fcos.locations(raw.classes))[found.positive]
    owners = _owners(found.inner[found.positive], points, boxes)
    if "t_rays" in ledger:
        ledger.compare("t_rays", _certain(found.rays, contours, owners, points), note=DIAGONAL)
        ledger.compare("t_centerness", found.centerness)
    terms = polar_losses(raw, [found], system.code, system.rules)
    for name in ledger.names(r"loss_\w+"):
        ledger.compare(name, terms[LOSSES[name]])


def _owners(inner: Tensor, points: Tensor, boxes: Tensor) -> Tensor:
    """The objects whose boxes these distances describe."""
    own = torch.cat([points - inner[:, :2], points + inner[:, 2:] + 1], 1)
    return torch.cdist(own, boxes).argmin(1)


def _certain(rays: Tensor, contours: Contours, owners: Tensor, origins: Tensor) -> Tensor:
    """Rays, with NaN for those that read degree 44 or 45 where a pixel lies exactly on the diagonal."""
    degrees = torch.arange(rays.shape[1]) * (360 / rays.shape[1])
    doubtful = (degrees >= 41) & (degrees <= 48)
    result = rays.clone()
    for row, (owner, origin) in enumerate(zip(owners.tolist(), origins, strict=True)):
        start, count = int(contours.starts[owner]), int(contours.counts[owner])
        away = contours.points[start : start + count] - origin
        if bool(((away[:, 0] == away[:, 1]) & (away[:, 0] > 0)).any()):
            result[row, doubtful] = torch.nan
    return result


# ---- codes -------------------------------------------------------------------------------------------------------


def _codes(ledger: Ledger, size: tuple[int, int], count: int) -> None:
    """Masks to rays, rays to masks, and the Fourier transform of rays."""
    found = (re.fullmatch(r"(enc_[a-z0-9]+)_\w+", n) for n in ledger.names(r"enc_[a-z0-9]+_\w+"))
    for stem in dict.fromkeys(m[1] for m in found if m):
        _code(ledger, stem, size, count)
    _given_contours(ledger)
    _transform(ledger)


@part
def _code(ledger: Ledger, stem: str, size: tuple[int, int], count: int) -> None:
    """Rays from a mask."""
    name = f"{stem}_bits"
    plane = _planes(ledger.given(name)[None], size)[0]
    contours = outer_contours(Masks.from_dense(plane[None]))
    border = _followed(plane.numpy())
    if {tuple(p) for p in border.tolist()} != {tuple(p) for p in contours.points.long().tolist()}:
        ledger.fail(f"{stem}_center", "the pixels of the border differ from those that border following visits")
    if f"{stem}_npts" in ledger:
        ledger.equal(f"{stem}_npts", torch.tensor([len(border)]))
    ledger.equal(f"{stem}_center", _their_centre(plane))
    several = len(ledger.shape(f"{stem}_rays")) == 2 or f"{stem}_origins" in ledger
    origins = ledger.given(f"{stem}_origins") if several else ledger.peek(f"{stem}_center").float()[None]
    rays = rays_from(contours, torch.zeros(len(origins), dtype=torch.int64), origins, count)
    certain = _certain(rays, contours, torch.zeros(len(origins), dtype=torch.int64), origins)
    ledger.compare(f"{stem}_rays", certain if several else certain[0], note=DIAGONAL)
    if f"{stem}_centerness" in ledger:
        ledger.compare(f"{stem}_centerness", polar_centerness(rays)[0])


@part
def _given_contours(ledger: Ledger) -> None:
    if ledger.names(r"given_(contours|mask_\w+)"):
        contours = ledger.given("given_contours").transpose(1, 2)
        stated = re.search(r"clamped to (\d+)x(\d+)", json.dumps(ledger.about))
        image = (int(stated[1]), int(stated[2])) if stated else (150, 200)
        ends = ray_points(ledger.given("given_points"), ledger.given("given_rays"))
        ends = ends.clamp(min=0).minimum(torch.tensor([image[1] - 1.0, image[0] - 1.0]))
        ledger.compare("given_contours", ends.transpose(1, 2))
        masks = fill_contours(contours, image)
        ledger.compare_packed_rows("given_mask_bits", masks.dense(), share=0)
        ledger.equal("given_mask_area", masks.areas())


@part
def _transform(ledger: Ledger) -> None:
    if ledger.names(r"ortho_fft_of_log_rays|roundtrip_\d+"):
        rays = ledger.peek("enc_ellipse_rays")
        values = fourier_coefficients(rays, len(rays))
        ledger.compare("ortho_fft_of_log_rays", values)
        for name in ledger.names(r"roundtrip_\d+"):
            ledger.compare(name, fourier_rays(values[: int(name.rsplit("_", 1)[1])], len(rays)))


def _planes(bits: Tensor, size: tuple[int, int]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), axis=1)[:, : size[0] * size[1]]
    return torch.from_numpy(flat.reshape(-1, *size).astype(bool))


def _their_centre(plane: Tensor) -> Tensor:
    """The centre of mass as the originals sum it: pixel by pixel along the border, in floats, and truncated.

    If the exact centre is an integer, as in symmetrical shapes, their sum may be a rounding error below it and is then
    truncated to one less. Ours is exact. Both must agree before truncation; otherwise ours is returned."""
    exact = outer_contours(Masks.from_dense(plane[None])).centres[0]
    border = _followed(plane.numpy()).astype(np.float64)
    before = np.roll(border, 1, 0)
    area, sums = 0.0, np.zeros(2)
    for (x, y), (u, v) in zip(border, before, strict=True):
        part = (x * v - y * u) / 2.0
        area += part
        sums += part * np.array([x + u, y + v]) / 3.0
    summed = torch.from_numpy(sums / area if area else border.mean(0))
    return (summed if torch.allclose(summed, exact, rtol=0, atol=1e-6) else exact).trunc().long()


def _followed(plane: np.ndarray) -> np.ndarray:
    """The pixels x, y that following a mask's outer border (of its largest part) visits, in order (Suzuki and Abe)."""
    own = outer_contours(Masks.from_dense(torch.from_numpy(plane)[None])).points.long().tolist()
    solid = {(x, y) for y, x in np.argwhere(plane).tolist()}
    around = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]  # counter-clockwise on the screen
    x, y = min(own, key=lambda p: (p[1], p[0]))
    start = (x, y)
    first = next((d for k in range(8) if (x + (d := around[(4 - k) % 8])[0], y + d[1]) in solid), None)
    if first is None:
        return np.array([start])
    last = (x + first[0], y + first[1])
    here, came, path = start, last, []
    while True:
        path.append(here)
        begin = around.index((came[0] - here[0], came[1] - here[1]))
        steps = (around[(begin + k) % 8] for k in range(1, 9))
        following = next(p for d in steps if (p := (here[0] + d[0], here[1] + d[1])) in solid)
        if following == start and here == last:
            return np.array(path)
        here, came = following, here


SYSTEMS = {"polarmask": check, "fouriernet": check}
