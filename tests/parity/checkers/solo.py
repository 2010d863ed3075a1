"""SOLO, Decoupled SOLO and SOLOv2, by the authors' fork of MMDetection and by AdelaiDet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.ops.suppression import mask_iou, matrix_nms
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems import create
from maskwright.systems.families import solo_grid as grid_ops
from maskwright.systems.families.solo_grid import Cells
from maskwright.systems.solo import MASK_STRIDES
from tests.parity.ledger import Ledger, inputs, part

TIES = "cells equal to a neighbour up to rounding are excluded"
AT_THRESHOLD: dict[str, Any] = {"bound": 3e-4, "largest": 3e-4, "reason": "pixels of masks at the threshold"}


def check(system: Any, layout: Path, ledger: Ledger) -> None:
    own = Check(system.eval(), ledger)
    with torch.no_grad():
        own.losses() if ledger.names(r"loss_\w+|image\d_\w+") else own.outputs()


class Check:
    def __init__(self, system: Any, ledger: Ledger):
        self.system, self.ledger = system, ledger
        self.adelaidet = system.options.get("rules") == "adelaidet"

    def images(self) -> Tensor:
        about = self.ledger.about
        return inputs({**about, "input": about.get("input", about.get("what"))})[0]

    # ---- the network ---------------------------------------------------------------------------------------------

    def outputs(self) -> None:
        ledger, kept = self.ledger, {}
        hooks = [
            part.register_forward_hook(lambda module, given, answer, name=name: kept.update({name: answer}))
            for name, part in (("backbone", self.system.dense.backbone), ("neck", self.system.dense.neck))
        ]
        images = self.images()
        raw = self.system(images)
        for hook in hooks:
            hook.remove()
        for name in ledger.names(r"(c|res)\d"):
            ledger.compare(name, kept["backbone"][int(name[-1]) - 2])
        for name in ledger.names(r"p\d"):
            ledger.compare(name, kept["neck"][int(name[-1]) - 2])
        for name in ledger.names(r"ins\d"):
            level = int(name[-1])
            ledger.compare(name, self.system.masks.outputs[level](raw.features[level]))
        for name in ledger.names(r"ins_[xy]\d"):
            ledger.compare(name, (raw.across if name[4] == "x" else raw.down)[int(name[-1])])
        if "cate_logits" in ledger:
            ledger.compare("cate_logits", grid_ops.flatten_cells(raw.classes)[0])
        if "kernels" in ledger:
            ledger.compare("kernels", grid_ops.flatten_cells(raw.kernels)[0])
        if "mask_feat" in ledger:
            ledger.compare("mask_feat", raw.feature)
        if "cate_scores_pointnms" in ledger:
            self.point_nms([level.sigmoid() for level in raw.classes])
        if ledger.names(r"det_\w+"):
            self.detections(raw)

    def point_nms(self, scores: list[Tensor]) -> None:
        values = []
        for level in scores:
            best = torch.nn.functional.max_pool2d(level, 2, stride=1, padding=1)[..., :-1, :-1]
            second = self.second_best(level)
            tie = (level - torch.where(level == best, second, best)).abs() < 1e-6
            values.append(grid_ops.point_nms(level).masked_fill(tie, torch.nan))
        self.ledger.compare("cate_scores_pointnms", grid_ops.flatten_cells(values)[0], note=TIES)

    @staticmethod
    def second_best(level: Tensor) -> Tensor:
        """The highest of the upper, left and upper left neighbours."""
        padded = torch.nn.functional.pad(level, (1, 0, 1, 0), value=-1)
        return torch.stack([padded[..., :-1, :-1], padded[..., :-1, 1:], padded[..., 1:, :-1]]).amax(0)

    # ---- finished objects ----------------------------------------------------------------------------------------

    def detections(self, raw: Any) -> None:
        ledger, about = self.ledger, self.ledger.about
        limits = about.get("test_cfg", about)
        valid = about["img_shape"] if "img_shape" in about else about["image_size_before_padding"]
        image = about["ori_shape"] if "ori_shape" in about else about["output_size"]
        found = self.system.decode(
            raw, [Placement.resize((image[0], image[1]), (valid[0], valid[1]))],
            score_threshold=limits["update_thr"], candidate_threshold=limits["score_thr"],
            detections=limits["max_per_img"], mask_threshold=limits["mask_thr"],
            kernel=limits.get("kernel", "gaussian"), nms_sigma=limits.get("sigma", 2.0),
        )[0]  # fmt: skip
        objects(ledger, "det", found)

    # ---- learning ------------------------------------------------------------------------------------------------

    @part
    def losses(self) -> None:
        ledger, system = self.ledger, self.system
        images = self.images()
        raw = system(images)
        targets = self.targets(raw.size, len(images))
        terms = system.losses(raw, targets)
        ledger.compare("loss_ins", terms["mask"])
        ledger.compare("loss_cate", terms["class"])
        dynamic = system.name == "solov2"
        for image, target in enumerate(targets):
            inclusive = system.rules.inclusive if dynamic else True
            strides = (4,) * 5 if dynamic else MASK_STRIDES
            own = grid_ops.read_objects(target, raw.size, strides, images.device, inclusive=inclusive)
            grids = system.cells.grids
            assigned = grid_ops.assign(own, raw.size, system.cells)
            labels = grid_ops.class_labels([own], [assigned], grids)[0]
            none = len(system.classes) if self.adelaidet else 0
            theirs = torch.where(labels < 0, none, labels + (not self.adelaidet))
            ledger.equal(f"image{image}_cate_label", theirs)
            for level, (positives, grid, stride) in enumerate(zip(assigned, grids, strides, strict=True)):
                positives = positives if dynamic else positives.unique(grid * grid)
                name = f"image{image}_level{level}"
                for kind in ("positive_cells", "grid_order"):
                    if f"{name}_{kind}" in ledger:
                        ledger.equal(f"{name}_{kind}", positives.cells)
                if f"{name}_positive_yx" in ledger:
                    ledger.equal(
                        f"{name}_positive_yx", torch.stack([positives.cells // grid, positives.cells % grid], 1)
                    )
                if f"{name}_mask_target_area" in ledger:
                    ledger.equal(f"{name}_mask_target_area", own.planes[stride][positives.owners].sum((1, 2)))

    def targets(self, size: tuple[int, int], count: int) -> list[Instances]:
        source = self.ledger
        if "image0_boxes" not in source:  # AdelaiDet's recording has the targets of the fork's
            beside = source.path.with_name(source.path.name.replace("-adet", ""))
            if not beside.exists():
                raise LookupError(f"needs the targets in {beside.name}, which is not beside it")
            source = Ledger(beside)
        targets = []
        for image in range(count):
            # The fork's boxes include their last pixel; the numbers are the same in both recordings.
            boxes = source.given(f"image{image}_boxes") + torch.tensor([0, 0, 1, 1]) * (not self.adelaidet)
            packed = source.given(f"image{image}_masks_packbits").numpy()
            shape = source.given(f"image{image}_masks_shape").tolist()
            planes = np.unpackbits(packed)[: int(np.prod(shape))].reshape(shape).astype(bool)
            labels = source.given(f"image{image}_labels") - 1
            targets.append(Instances(size, boxes, labels, Masks.from_dense(torch.from_numpy(planes)).pack()))
        return targets


@part
def objects(ledger: Ledger, name: str, found: Instances) -> None:
    """Compares labels, scores and masks, in the original's order where scores are equal up to rounding."""
    assert found.scores is not None
    assert found.masks is not None
    scores = f"{name}_scores"
    rows = ledger.pair((scores, found.scores), (f"{name}_labels", found.labels))
    if rows is None:
        return None
    found = found[rows]
    assert found.scores is not None
    assert found.masks is not None
    ledger.equal(f"{name}_labels", found.labels)
    planes = found.masks.dense()
    ledger.equal(f"{name}_masks_shape", torch.tensor(planes.shape))
    packed = np.packbits(planes.numpy().reshape(-1))
    if f"{name}_masks_packbits" not in ledger:
        return ledger.compare(f"{name}_scores", found.scores)
    kept, shape, chosen = ledger._answer(f"{name}_masks_packbits")
    if packed.shape != tuple(shape):
        return ledger.fail(f"{name}_masks_packbits", f"shape {packed.shape}, expected {tuple(shape)}")
    different = int(np.unpackbits((packed if chosen is None else packed[chosen]) ^ kept).sum())
    # A score holds the mean probability of its mask's pixels and the overlaps of the masks. Where the recording has a
    # sample of the pixels, one that differs need not be in it.
    unsure = bool(different) or chosen is not None
    ledger.compare(f"{name}_scores", found.scores, **(AT_THRESHOLD if unsure else {}))
    text = f"{different} of {8 * len(kept)} bits differ (bound 1e-4: at the threshold)"
    ledger._line(f"{name}_masks_packbits", text, different <= 8e-4 * len(kept))


# ---- without weights -------------------------------------------------------------------------------------------------


def post(ledger: Ledger) -> None:
    """Compares Matrix NMS and decoding of synthetic objects, for each of the three systems."""
    about = ledger.about
    logits, labels, scores, cells = (ledger.given(n) for n in ("mask_logits", "labels", "scores", "cells"))
    soft = logits.sigmoid()
    order = scores.argsort(descending=True)
    ledger.equal("matrix_nms_order", order)
    iou = mask_iou((soft[order] > 0.5).flatten(1))
    for kind in ("gaussian", "linear"):
        ledger.compare(f"matrix_nms_{kind}", matrix_nms(iou, scores[order], labels[order], kind))

    height, width = logits.shape[1:]
    size = (4 * height, 4 * width)
    valid, image, limits = about["img_shape"], about["ori_shape"], about["test_cfg"]
    placement = Placement.resize((image[0], image[1]), (valid[0], valid[1]))
    rules = grid_ops.Suppression(
        limits["update_thr"], limits["score_thr"], kernel=limits["kernel"], sigma=limits["sigma"],
        pre_nms_top_k=limits["nms_pre"], detections=limits["max_per_img"],
    )  # fmt: skip
    smallest = grid_ops.per_cell(Cells().grids, grid_ops.STRIDES, scores.device)
    table = torch.zeros(len(smallest), 80)
    table[cells, labels] = scores
    row = torch.zeros(len(smallest), dtype=torch.int64)
    row[cells] = torch.arange(len(cells))
    tiny: Any = {"backbone": {"name": "resnet18", "width": 8}, "neck_width": 8, "head": {"width": 8, "convs": 1}}
    dynamic: Any = create("solov2", **tiny, mask_width=8, mask_channels=len(cells))
    kernels = torch.eye(len(cells))
    profiles = (kernels, kernels)
    if ledger.names(r"decoupled_\w+"):
        profiles = ledger.given("decoupled_x_profiles"), ledger.given("decoupled_y_profiles")

    def profile_masks(chosen: Tensor) -> Tensor:
        parts, first = [], 0
        for own, grid in zip(grid_ops.split_by_level(chosen, Cells().grids), Cells().grids, strict=True):
            columns, rows = (p[first : first + grid] for p in profiles)
            parts.append(columns[own % grid][:, None, :] * rows[own // grid][:, :, None])
            first += grid
        return torch.cat(parts)

    ways = {
        "solo": lambda chosen: soft[row[chosen]],
        "solov2": lambda chosen: dynamic.mask_logits(logits, kernels[row[chosen]]).sigmoid(),
        "decoupled": profile_masks,
    }
    for name, way in ways.items():
        if not ledger.names(rf"{name}_(scores|labels|masks_\w+)"):
            continue
        masks, values, kinds = grid_ops.select_objects(table, smallest, way, rules, height * width)
        objects(ledger, name, grid_ops.to_instances(masks, values, kinds, placement, size, limits["mask_thr"]))


SYSTEMS = {"solo": check, "decoupled-solo": check, "solov2": check}
OPERATORS = [
    (lambda ledger: ledger.names(r"matrix_nms_\w+|(solo|solov2|decoupled)_(scores|labels|masks_\w+)") != [], post),
]
