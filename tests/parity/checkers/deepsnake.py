"""Deep Snake, for SBD and for Cityscapes with components."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from maskwright.blocks.snake import component_features
from maskwright.ops.centres import gaussian_radius, paint_gaussians
from maskwright.ops.contours import resample_from
from maskwright.ops.vertices import clipped_to_map, diamond_lines, octagon_lines, octagons, read_at
from maskwright.structures import Instances, Masks
from maskwright.systems.deepsnake import DeepSnake, Detections, Raw
from tests.parity.ledger import Ledger, NotRecorded, inputs, part
from tests.parity.weights import value

LOSSES = {"ct": "centre", "wh": "size", "ex": "extreme", "py": "outline"}


def check(system: DeepSnake, layout: Path, ledger: Ledger) -> None:
    Check(system, layout, ledger).run()


class Check:
    def __init__(self, system: DeepSnake, layout: Path, ledger: Ledger):
        self.system, self.layout, self.ledger = system.eval(), layout, ledger
        self.thresholds = ledger.about["thresholds"]

    def run(self) -> None:
        images, _ = inputs(self.ledger.about)
        self.size = (images.shape[2], images.shape[3])
        with torch.no_grad():
            raw = self.system(images)
            self.network(raw)
            self.detections(raw)
            self.given(raw)
            self.training(raw)

    def network(self, raw: Raw) -> None:
        ledger = self.ledger
        ledger.compare("feature", raw.feature)
        for name in ("head_act_hm", "head_ct_hm"):
            ledger.compare(name, raw.centres)
        for name in ("head_awh", "head_wh"):
            ledger.compare(name, raw.sizes)
        if "head_reg" in ledger:  # which nothing uses and the library does not have
            tensors = json.loads(self.layout.read_text())["tensors"]
            seed = int(ledger.about.get("seed") or 0)
            own = {
                key: torch.from_numpy(value(key, tuple(shape), kind, seed))
                for key, (shape, kind) in tensors.items()
                if key.startswith("dla.reg.")
            }
            x = functional.conv2d(raw.feature, own["dla.reg.0.weight"], own["dla.reg.0.bias"], padding=1).relu()
            ledger.compare("head_reg", functional.conv2d(x, own["dla.reg.2.weight"], own["dla.reg.2.bias"]))

    # ---- decoding ------------------------------------------------------------------------------------------------

    @part
    def detections(self, raw: Raw) -> None:
        ledger, system = self.ledger, self.system
        count = int(self.thresholds.get("topk", 100))
        # All peaks, whatever their score, without suppression.
        self.rows("all_detections", system.find(raw, -1.0, 2.0, count))
        # Their threshold equals the score of the best object that is left out: a rounding error must not include it.
        threshold = float(self.thresholds["ct_score"]) * (1 + 1e-6)
        if not ledger.names(r"(roi_)?detection|roi_feature|cp_.*|it_(ex|py)|ex|py_\d"):
            return
        found = system.find(raw, threshold, self.thresholds.get("ct_nms"), count)
        boxes, owners = self.rows("detection", found), torch.zeros(0)
        if boxes is None:
            return
        ours = Detections(*(v[boxes] for v in found))
        boxes, owners = ours.boxes, ours.owners
        if system.components is not None:
            self.rows("roi_detection", found)
            boxes, owners = self.components(raw, ours)
        self.contours(raw, boxes, owners)

    def rows(self, name: str, found: Detections) -> Tensor | None:
        """Compares boxes, scores and classes, and gives our rows in their order."""
        ours = torch.cat([found.boxes, found.scores[:, None], found.labels[:, None].float()], 1)
        rows = self.ledger.pair((name, ours))
        if rows is None:
            return None
        self.ledger.compare(name, ours[rows])
        return rows

    def components(self, raw: Raw, found: Detections) -> tuple[Tensor, Tensor]:
        ledger, system = self.ledger, self.system
        head = system.components
        assert head is not None
        # The original reads every detection, also those whose class always has one component.
        ledger.compare("roi_feature", component_features(raw.feature, found.boxes, found.owners))
        centres, sizes = head(raw.feature, found.boxes, found.owners)
        ledger.compare("cp_hm", centres)
        ledger.compare("cp_wh", sizes)
        score, overlap = float(self.thresholds["cp_score"]), float(self.thresholds["cp_nms"])
        boxes, owners = system.split(head, raw, found, score, overlap, int(self.thresholds["cp_top"]))
        rows = ledger.pair(("cp_box", boxes), ("cp_ind", owners))
        if rows is None:
            return boxes, found.owners[owners]
        ledger.compare("cp_box", boxes[rows])
        ledger.equal("cp_ind", owners[rows])
        return boxes[rows], found.owners[owners[rows]]

    def contours(self, raw: Raw, boxes: Tensor, owners: Tensor) -> None:
        ledger, contours = self.ledger, self.system.contours
        ledger.compare("it_ex", diamond_lines(boxes, contours.options.start_points))
        extremes = clipped_to_map(contours(raw.feature, boxes, owners)[0], raw.feature)
        ledger.compare("ex", extremes)
        # From their extreme points: the number of points on an edge is rounded, which may differ.
        octagon = octagon_lines(ledger.peek("ex") if "ex" in ledger.arrays else extremes, self.system.points)
        ledger.compare("it_py", octagon)
        for number, line in enumerate(contours(raw.feature, boxes, owners, octagon)[1]):
            ledger.compare(f"py_{number}", line)

    # ---- on given boxes ------------------------------------------------------------------------------------------

    @part
    def given(self, raw: Raw) -> None:
        ledger, contours = self.ledger, self.system.contours
        if not ledger.names(r"given_\w+"):
            return
        boxes = ledger.given("given_boxes")
        owners = torch.zeros(len(boxes), dtype=torch.int64)
        line = diamond_lines(boxes, contours.options.start_points)
        ledger.compare("given_init40", line)
        sampled = read_at(raw.feature, line, owners, align_corners=contours.options.align_corners)
        ledger.compare("given_sampled_features", sampled.transpose(1, 2))
        ledger.compare("given_ex_pred", contours(raw.feature, boxes, owners)[0])  # not clipped to the map
        self.given_outline(raw, boxes, owners)

    @part
    def given_outline(self, raw: Raw, boxes: Tensor, owners: Tensor) -> None:
        ledger, contours = self.ledger, self.system.contours
        if not ledger.names(r"given_(octagon\d+|evolve_\d|mask_bits)"):
            return
        extremes = ledger.given("given_extremes")
        ledger.compare("given_octagon12", octagons(extremes))
        start = octagon_lines(extremes, self.system.points)
        ledger.compare("given_octagon128", start)
        rows = slice(0, len(start))
        for number, moved in enumerate(contours(raw.feature, boxes[rows], owners[rows], start)[1]):
            ledger.compare(f"given_evolve_{number}", moved)
        if "given_mask_bits" not in ledger:
            return
        recorded = ledger.peek("given_octagon128") * 4
        masks = Masks.from_polygons([[own] for own in recorded.double().numpy()], self.size).dense()
        ledger.arrays["given_mask_bits__packbits"] = ledger.arrays.pop("given_mask_bits").reshape(-1)
        ledger.arrays["given_mask_bits__shape"] = torch.tensor(masks.shape).numpy()
        ledger.compare_bits("given_mask_bits", masks)

    # ---- targets and losses --------------------------------------------------------------------------------------

    @part
    def training(self, raw: Raw) -> None:
        ledger, system = self.ledger, self.system
        if not ledger.names(r"(gt|t|loss)_\w+"):
            return
        if not ledger.names(r"gt_poly_\w+"):
            raise NotRecorded("gt_poly_*")
        names = [n.removeprefix("gt_poly_") for n in ledger.names(r"gt_poly_\w+")]
        rings = [unrounded(ledger.given(f"gt_poly_{n}").double(), ledger.peek(f"gt_extreme_{n}")) for n in names]
        labels = ledger.given("t_ct_cls").long()
        target = Instances(
            self.size, torch.zeros(len(rings), 4), labels,
            Masks.from_polygons([[(ring * 4).numpy()] for ring in rings], self.size),
        )  # fmt: skip
        size = (raw.feature.shape[2], raw.feature.shape[3])
        goals = system.targets([target], size)
        cells, sides = system.cells(goals.boxes, size), goals.boxes[:, 2:] - goals.boxes[:, :2]
        for number, name in enumerate(names):
            ledger.compare(f"gt_extreme_{name}", goals.extremes[number])
            ledger.compare(
                f"gt_decode_box_{name}",
                torch.cat([cells[number] - sides[number] / 2, cells[number] + sides[number] / 2]),
            )
        radii = gaussian_radius(sides.ceil())
        ledger.compare("t_hm", paint_gaussians(cells, radii, labels, (len(system.classes), *size)))
        ledger.compare("t_wh", sides)
        ledger.equal("t_ct_ind", cells[:, 1] * size[1] + cells[:, 0])
        # SBD's recording was made with the boxes of the COCO configuration: its diamonds are those of
        # `gt_decode_box_*`, around the rounded centre, and not those of the polygons' boxes.
        around = {"box": goals.contour_boxes, "centre": torch.cat([cells - sides / 2, cells + sides / 2], 1)}
        starts = {kind: diamond_lines(boxes, system.contours.options.start_points) for kind, boxes in around.items()}
        theirs = ledger.peek("t_i_it_4py")
        system.start = min(starts, key=lambda kind: float((starts[kind] - theirs).norm()))
        ledger.compare("t_i_it_4py", starts[system.start], note=f"around the {system.start}")
        ledger.compare("t_i_gt_4py", goals.extremes)
        ledger.compare("t_i_it_py", goals.octagons)
        outlines = torch.stack(
            [self.untied(*v) for v in zip(rings, goals.octagons, goals.outlines, range(len(rings)), strict=True)]
        )
        ledger.compare("t_i_gt_py", outlines, note="of edges of equal length up to rounding, theirs is the longest")
        terms = system.contour_losses(raw, goals._replace(outlines=outlines))
        terms = {**system.losses(raw, [target]), **terms}
        for name in ledger.names(r"loss_(ct|wh|ex|py)"):
            kind = LOSSES[name.removeprefix("loss_")]
            ledger.compare(name, terms[kind] / (0.1 if kind == "size" else 1))
        ledger.compare("loss_loss", torch.stack(list(terms.values())).sum())

    def untied(self, ring: Tensor, octagon: Tensor, ours: Tensor, row: int) -> Tensor:
        """Points that cannot be shared evenly are added to or removed from the longest edge. For a star in float64,
        whose edges differ in the sixteenth digit, the recorded float32 does not determine that edge: each is tried."""
        theirs = self.ledger.peek("t_i_gt_py")[row]
        following = ring.roll(-1, 0)
        edges = (following - ring).norm(dim=1)
        best = ours
        for edge in (edges >= edges.max() * (1 - 1e-6)).nonzero().flatten().tolist():
            longer = ring.clone()
            longer[edge] += (ring[edge] - following[edge]) * 2e-6
            found = resample_from(longer[None], len(ours), torch.tensor([len(ring)]), octagon[None, 0].double())[0]
            if (found - theirs).abs().sum() < (best - theirs).abs().sum():
                best = found.float()
        return best


def unrounded(ring: Tensor, extremes: Tensor) -> Tensor:
    """The polygons were float64 and were recorded as float32. Of vertices that became equally extreme, the one that the
    original chose is moved outwards by 1e-9."""
    ring = ring.clone()
    for axis, sign, chosen in zip((1, 0, 1, 0), (1, 1, -1, -1), extremes.double(), strict=True):
        value = ring[:, axis] * sign
        tied = (value <= value.min() + 1e-6).nonzero().flatten()
        ring[tied[(ring[tied] - chosen).norm(dim=1).argmin()], axis] -= 1e-9 * sign
    return ring


SYSTEMS = {"deepsnake": check}
