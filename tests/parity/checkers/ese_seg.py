"""ESE-Seg: the network, and its shape code without one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.ops import contours
from maskwright.ops.outlines import fill_contours
from maskwright.structures import Masks
from maskwright.systems.ese_seg import ESESeg, Raw, Shapes
from tests.parity.ledger import Ledger, NotRecorded, inputs, matching, part

BLOWN = "random weights give boxes of e^8 anchors: the exponential multiplies a rounding error of its argument by that"
LOSSES = {
    "loss_obj": "objectness", "loss_center": "place", "loss_scale": "size", "loss_coef_center": "centre",
    "loss_coef": "coefficients", "loss_cls": "class",
}  # fmt: skip


def check(system: ESESeg, layout: Path, ledger: Ledger) -> None:
    images, _ = inputs(ledger.about)
    routes: list[Tensor] = []

    def keep(module: Any, given: Any, answer: Any) -> None:
        routes.extend(answer)

    hook = system.eval().dense.backbone.register_forward_hook(keep)
    with torch.no_grad():
        raw = system(images)
    hook.remove()
    strides = dict(zip(reversed(system.strides), routes[-len(system.strides) :], strict=True))
    for name in ledger.names(r"route_stride\d+"):
        ledger.compare(name, strides[int(name.removeprefix("route_stride"))])
    for name in ledger.names(r"raw_\d"):
        level = int(name[-1])
        parts = [m.unflatten(1, (system.anchors_per_cell, -1)) for m in (raw.shapes[level], raw.classes[level])]
        ledger.compare(name, torch.cat(parts, 2).flatten(1, 2))
    for name in ledger.names(r"dets_\d"):
        level = int(name[-1])
        ours = every(system, one_level(raw, level), level)
        ledger.compare(name, ours[: ledger.length(name)], 1e-4, BLOWN)
    detections(system, raw, ledger)
    if ledger.names(r"(gt|t|loss)_\w+"):
        training(system, raw, ledger)


def one_level(raw: Raw, level: int) -> Raw:
    return Raw(raw.shapes[level : level + 1], raw.classes[level : level + 1], raw.size)


@torch.no_grad()
def every(system: ESESeg, raw: Raw, level: int) -> Tensor:
    """Class, score, box, centre and coefficients of each row, class by class, before non-maximum suppression."""
    whole, system.strides = system.strides, system.strides[level : level + 1]
    table, system.anchors = system.anchors, system.anchors[level : level + 1]
    rows = system.rows(raw.shapes)
    boxes, centres = system.boxes(raw, rows)
    scores = system.rows(raw.classes).sigmoid() * rows[..., -1:].sigmoid()
    system.strides, system.anchors = whole, table
    rest = torch.cat([boxes[0], centres[0], system.coefficients(rows[0])], 1)
    kinds = torch.arange(scores.shape[-1]).repeat_interleave(len(rest))
    return torch.cat([kinds[:, None], scores[0].T.reshape(-1, 1), rest.repeat(scores.shape[-1], 1)], 1)


@part
def detections(system: ESESeg, raw: Raw, ledger: Ledger) -> None:
    if not ledger.names(r"det_\w+"):
        return None
    limits: dict[str, Any] = ledger.about["thresholds"]
    found = system.find(raw, limits["valid"], limits["nms"], limits["post"], limits["topk"])[0]
    theirs = ledger.peek("det_ids")
    count = int((theirs >= 0).sum())  # unused rows are -1
    if len(found.scores) != count:
        return ledger.fail("det_ids", f"{len(found.scores)} objects instead of {count}")
    labels = (theirs[:count, 0].long(), found.labels)
    rows = matching(torch.cat([ledger.peek("det_boxes"), 1e6 * ledger.peek("det_scores")], 1)[:count],
                    torch.cat([found.boxes, 1e6 * found.scores[:, None]], 1), labels)  # fmt: skip
    assert rows is not None

    def padded(values: Tensor) -> Tensor:
        return torch.cat([values[rows], values.new_full((len(theirs) - count, *values.shape[1:]), -1)])

    ledger.equal("det_ids", padded(found.labels[:, None]))
    ledger.compare("det_scores", padded(found.scores[:, None]))
    ledger.compare("det_boxes", padded(found.boxes), 1e-4, BLOWN)
    ledger.compare("det_centers", padded(found.centres), 1e-4, BLOWN)
    ledger.compare("det_coefs", padded(found.coefficients))


@part
def training(system: ESESeg, raw: Raw, ledger: Ledger) -> None:
    boxes = ledger.given("gt_boxes")
    shapes = Shapes(
        boxes, ledger.given("gt_ids")[:, 0].long(), ledger.given("gt_centers"), ledger.given("gt_coefs"),
        torch.ones(len(boxes), dtype=torch.bool),
    )  # fmt: skip
    rows = system.rows(raw.shapes)
    goals = system.goals(raw, shapes, system.boxes(raw, rows)[0][0])
    order = goals.rows.argsort()
    ledger.equal("t_pos", goals.rows[order])
    ledger.compare("t_objectness", torch.ones(len(order), 1))
    ledger.compare("t_center", goals.place[order])
    ledger.compare("t_scale", goals.size[order])
    ledger.compare("t_coef_center", goals.centre[order])
    ledger.compare("t_coef", goals.coefficients[order])
    ledger.compare("t_weight", goals.weights[order, None].expand(-1, 2))
    ledger.compare("t_class", torch.nn.functional.one_hot(goals.labels[order], len(system.classes)).float())
    ignored = goals.ignored.clone()
    ignored[goals.rows] = False
    ledger.equal("t_ignore", ignored.nonzero().flatten())
    with torch.no_grad():
        terms = system.shape_losses(raw, [shapes])
    for name, ours in LOSSES.items():
        ledger.compare(name, terms[ours][None])


# ---- the code alone --------------------------------------------------------------------------------------------------


def codec(ledger: Ledger) -> None:
    kinds = r"(enc|dec|f64)_([a-z]+?)_((mask|filled|second)_bits|box_cxcywh|center|rays|coef|r|polygon|iou_with_mask)"
    found = (re.fullmatch(kinds, n) for n in ledger.names(kinds))
    for name in dict.fromkeys(m[2] for m in found if m and m[2] != "given"):
        code_of(name, ledger)
    given_code(ledger)


@part
def code_of(name: str, ledger: Ledger) -> None:
    """The code of one mask, and the outline of a code."""
    height, width = ledger.about["image"]

    def plane(name: str) -> np.ndarray:
        if name not in ledger.arrays:
            raise NotRecorded(name)
        bits = np.unpackbits(ledger.arrays[name])[: height * width]
        return bits.reshape(height, width).astype(bool)

    ledger.seen.add(f"enc_{name}_mask_bits")
    mask = plane(f"enc_{name}_mask_bits")
    whole = contours.solid(Masks.from_dense(torch.from_numpy(mask)[None]))
    dense = whole.dense()[0]
    for kind in ("filled", "second"):  # theirs comes in two steps: bridged, then the largest part without holes
        if f"enc_{name}_{kind}_bits" not in ledger.arrays:
            continue
        ledger.arrays[f"enc_{name}_{kind}"] = plane(f"enc_{name}_{kind}_bits")
        ledger.seen.add(f"enc_{name}_{kind}_bits")
        ledger.compare_bits(f"enc_{name}_{kind}", dense, 0.0)
    frames, crops = whole.crops()
    corner = frames[:, :2]
    x0, y0, x1, y1 = frames[0].tolist()
    box = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    ledger.compare(f"enc_{name}_box_cxcywh", box)
    given = ledger.peek(f"enc_{name}_center")
    centre = contours.inner_centres(crops, corner)[0][0]
    if (centre - given).norm() > 0.1:
        centre = _shifted_pick(crops[0].numpy(), frames[0])
    ledger.compare(f"enc_{name}_center", centre)
    radii = contours.degree_radii(crops, corner, given[None], reach="corner")
    gaps = int(radii.isnan().sum())
    note = f"{gaps} degrees that no pixel covers: theirs stores the number of a degree as radius" if gaps else ""
    ledger.compare(f"enc_{name}_rays", radii[0], note=note)
    rays = ledger.peek(f"enc_{name}_rays").double()[None]
    diagonal = box[2:].double().norm()
    ledger.compare(f"f64_{name}_coef", contours.chebyshev_fit(rays / diagonal)[0])
    code = ledger.peek(f"f64_{name}_coef")
    corners = torch.cat([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
    ledger.compare(f"dec_{name}_r", contours.chebyshev_radii(code))
    outline = contours.decode_chebyshev(code.float(), given, corners, turn=1.0)
    ledger.compare(f"dec_{name}_polygon", outline)
    if f"dec_{name}_iou_with_mask" in ledger:
        ledger.compare(f"dec_{name}_iou_with_mask", _overlap(outline, mask))


@part
def given_code(ledger: Ledger) -> None:
    if ledger.names(r"given_(r|polygon)"):
        code, boxes, centres = (ledger.given(n) for n in ("f64_given_coef", "given_box", "given_center"))
        ledger.compare("given_r", contours.chebyshev_radii(code))
        ledger.compare("given_polygon", contours.decode_chebyshev(code.float(), centres, boxes, turn=1.0))


def _overlap(outline: Tensor, mask: np.ndarray) -> Tensor:
    """IoU of the mask with the outline, filled as OpenCV fills points truncated to integers."""
    painted = fill_contours(outline[None], mask.shape).dense()[0].numpy()
    return torch.tensor((painted & mask).sum() / (painted | mask).sum())


def _shifted_pick(crop: np.ndarray, frame: Tensor) -> Tensor:
    """Their inner centre where the best pixel is too close to the border: a rejected pixel is removed from the list of
    sums but not from that of pixels, so that the next choice is off by one."""
    plane = np.pad(crop, 1)
    well = contours._well_inside(plane)
    y, x = np.nonzero(plane)
    sums = contours.distance_sums(plane)[y, x]
    pick = int(sums.argmin())
    while not well[y[pick], x[pick]]:
        sums = np.delete(sums, pick)
        pick = int(sums.argmin())
    return torch.tensor([x[pick] - 1.0, y[pick] - 1.0]) + frame[:2]


SYSTEMS = {"ese-seg": check}
OPERATORS = [(lambda ledger: ledger.names(r"f64_\w+_coef") != [], codec)]
