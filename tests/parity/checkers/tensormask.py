"""TensorMask and its operators, by detectron2's project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskwright.ops import boxes as box_ops
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.window_tensors import MaskTensor, align2nat, nat2align, swap_align2nat, up_align2nat, upsample
from maskwright.structures import Instances, Masks, Placement
from maskwright.systems.tensormask import BOX_WEIGHTS, Layout, Raw, TensorMask
from tests.parity.ledger import Ledger, bare_shape, input_seed, part


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """The two simple heads share their keys."""
    found = re.search(r"simple-(aligned|natural)", str(about.get("variant", "")))
    return {"variant": found[0]} if found and "TensorMask" in str(about.get("source", "")) else {}


def check(system: TensorMask, layout: Path, ledger: Ledger) -> None:
    system.eval()
    about, network = ledger.about, system.dense

    shape = bare_shape(about)
    if shape is None:
        raise ValueError(f"cannot tell the input from {about.get('input')!r}")

    def drawn(seed: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))

    with torch.no_grad():
        images = drawn(input_seed(ledger, "fpn_p5", lambda seed: network.neck(network.backbone(drawn(seed)))[3]))
    height, width = images.shape[-2:]
    kept: list[list[Tensor]] = []
    hook = network.neck.register_forward_hook(lambda module, given, output: kept.append(list[Any](output)))
    with torch.no_grad():
        raw = system(images)
    hook.remove()
    for level, values in enumerate(kept[0]):
        ledger.compare(f"fpn_p{level + 2}", values)
        ledger.compare(f"logits_l{level}", raw.logits[level])
        if raw.deltas:
            ledger.compare(f"deltas_l{level}", raw.deltas[level])
        ledger.compare(f"mask_subnet_l{level}", raw.masks[level])
        with torch.no_grad():
            for side, whole in zip(system.windows, system.whole_masks(raw, level), strict=True):
                ledger.compare(f"masks_l{level}_w{side}", whole.flatten(1, 2))
    window_layout = system.layout(raw)
    windows, places = window_layout
    ledger.compare("anchors_all", windows)
    strides = torch.tensor([4.0, 8, 16, 32, 64, 128])[places[:, 0]]
    ledger.compare("units_all", strides)
    index = torch.cat([places[:, :1], torch.zeros_like(places[:, :1]), places[:, 1:]], 1)
    ledger.compare("anchor_index_LIHWA", index)

    limits = (about["score_threshold"], about["nms"], about["detections"], about["topk"])
    with torch.no_grad():
        chosen, boxes, scores, labels = system.select(raw, window_layout, *limits)[0]
    ledger.compare("det_boxes_net", boxes)
    ledger.compare("det_scores", scores)
    ledger.equal("det_classes", labels)
    ledger.compare("det_windows_net", windows[chosen])
    with torch.no_grad():
        found = system.window_masks(raw, torch.nn.functional.pad(places[chosen], (1, 0)))
    grids = {int(row): grid.sigmoid() for rows, group in found for row, grid in zip(rows, group, strict=True)}
    ledger.equal("det_mask_side", torch.tensor([len(grids[n]) for n in range(len(chosen))]))
    for name in ledger.names(r"det_mask_prob_\d+"):
        ledger.compare(name, grids[int(name.rsplit("_", 1)[1])])
    # Their image is 8 rows and 4 columns smaller than the input, to which boxes were not clipped.
    out = tuple(about["output_size"])
    placement = Placement.resize(out, (height - 8, width - 4))
    objects = system.decode(
        raw, [placement], score_threshold=limits[0], nms_threshold=limits[1], detections=limits[2],
        candidates=limits[3],
    )[0]  # fmt: skip
    ledger.compare("final_boxes", objects.boxes)
    ledger.compare("final_scores", objects.scores if objects.scores is not None else scores)
    ledger.equal("final_classes", objects.labels)
    assert objects.masks is not None
    ledger.compare_bits("final_masks", objects.masks.dense())
    training(system, raw, window_layout, ledger, (height, width))


@part
def training(system: TensorMask, raw: Any, layout: Layout, ledger: Ledger, size: tuple[int, int]) -> None:
    about = ledger.about
    if "polygons" not in about or not ledger.names(r"(gt|num|fg|loss)_\w+"):
        return
    masks = Masks.from_polygons(about["polygons"], size)
    boxes, labels = ledger.given("gt_boxes"), ledger.given("gt_classes")
    target = Instances(size, boxes, labels, masks)
    windows, places = layout
    own = system.assign(layout, target)
    ledger.equal("num_fg", torch.tensor(len(own.windows)))
    ledger.equal("fg_index", own.windows)
    ledger.equal("fg_class", labels[own.owners])
    if "gt_deltas" in ledger:
        ledger.compare("gt_deltas", box_ops.encode(windows[own.windows], boxes[own.owners], BOX_WEIGHTS))
    where = places[own.windows]
    for name in dict.fromkeys(n.replace("masks", "mask_inds") for n in ledger.names(r"gt_mask(s|_inds)_l\d_a\d")):
        if name not in ledger.arrays:
            ledger.missing.append(name)
            continue
        level, number = int(name[-4]), int(name[-1])
        rows = ((where[:, 0] == level) & (where[:, 3] == number)).nonzero().flatten()
        theirs = ledger.peek(name).long()
        ours = torch.nn.functional.pad(where[rows][:, 1:3], (1, 0))
        order = (theirs[:, None] == ours[None]).all(-1).float().argmax(1)  # by object there, by window here
        ledger.equal(name, ours[order])
        rows = rows[order]
        side = system.windows[number] * (2**level if system.bipyramid else 1)
        truth = mask_targets(masks, own.owners[rows], windows[own.windows[rows]], side)
        ledger.compare_bits(name.replace("mask_inds", "masks"), truth)
    terms = system.losses(raw, [target])
    ledger.compare("loss_cls", terms["class"])
    if "loss_box_reg" in ledger:
        ledger.compare("loss_box_reg", terms["box"])
    ledger.compare("loss_mask", terms["mask"])


# ---- operators -------------------------------------------------------------------------------------------------------


def _tensor(values: Tensor, aligned: bool, step: float = 1.0) -> MaskTensor:
    side = round(values.shape[1] ** 0.5)
    return MaskTensor(values.unflatten(1, (side, side)), aligned, 1.0, step)


@part
def check_operators(ledger: Ledger) -> None:
    if not ledger.names(r"x_v\d+"):
        ledger.missing.append("x_v*")
    for name in ledger.names(r"x_v\d+"):
        values, v = ledger.given(name), name[2:]
        for kind, transform, aligned in (("align2nat", align2nat, True), ("nat2align", nat2align, False)):
            if f"{kind}_{v}" in ledger:
                ledger.compare(f"{kind}_{v}", transform(_tensor(values, aligned)).values.flatten(1, 2))
        for swapped in ledger.names(rf"swap_{v}_lam[\d.]+"):
            end = swapped.removeprefix("swap_")
            factor = float(end.rsplit("lam", 1)[1])
            leaf = values.clone().requires_grad_()
            source = _tensor(leaf, True, factor)
            answer = swap_align2nat(source, factor).values.flatten(1, 2)
            ledger.compare(swapped, answer)
            if f"swap_gradseed_{end}" in ledger:
                answer.backward(ledger.given(f"swap_gradseed_{end}"))
                assert leaf.grad is not None
                ledger.compare(f"swap_grad_{end}", leaf.grad)
            ledger.compare(f"swap_pad0_{end}", swap_align2nat(source, factor, 0.0).values.flatten(1, 2))
            ledger.compare(f"up_align2nat_{end}", up_align2nat(source, factor).values.flatten(1, 2))
            ledger.compare(f"up_natural_{end}", upsample(_tensor(values, False), factor).values.flatten(1, 2))


def check_heads(ledger: Ledger) -> None:
    if not ledger.names(r"x_lam[\d.]+"):
        ledger.missing.append("x_lam*")
    for name in ledger.names(r"x_lam[\d.]+"):
        values, end = ledger.given(name), name[2:]
        factor = float(end.removeprefix("lam"))
        ledger.compare(f"upscale_natural_{end}", upsample(_tensor(values, False), factor).values.flatten(1, 2))
        source = _tensor(values, True, factor)
        for mode in ("bilinear", "nearest"):
            answer = up_align2nat(source, factor, mode=mode).values.flatten(1, 2)
            ledger.compare(f"upscale_aligned_{mode}_{end}", answer)


@part
def check_assignment(ledger: Ledger) -> None:
    """Compares the windows of the published configuration, for an image whose size follows from the feature maps."""
    smallest = int(ledger.about.get("min_anchor_size", 40)) + 4
    backbone = {"name": "resnet18", "width": 8}
    system = TensorMask(backbone=backbone, neck_width=8, windows=(smallest // 4, 15))
    sizes = ledger.given("feature_sizes").tolist()
    levels = [torch.zeros(1, 2, *size) for size in sizes]
    size = (sizes[0][0] * 4, sizes[0][1] * 4)
    layout = system.layout(Raw(tuple(levels), (), (), size))
    windows = layout.boxes
    ledger.equal("num_anchors", torch.tensor(len(windows)))
    boxes = ledger.given("gt_boxes")
    target = Instances(size, boxes, torch.zeros(len(boxes), dtype=torch.int64))
    own = system.assign(layout, target)
    ledger.equal("positive_anchor", own.windows)
    ledger.equal("positive_gt", own.owners)
    ledger.compare("deltas", box_ops.encode(windows[own.windows], boxes[own.owners], BOX_WEIGHTS))


SYSTEMS = {"tensormask": check}
OPERATORS = [
    (lambda ledger: ledger.names(r"(align2nat|nat2align|swap|up_align2nat|up_natural)_.*") != [], check_operators),
    (lambda ledger: ledger.names(r"upscale_(aligned|natural)_.*") != [], check_heads),
    (lambda ledger: ledger.names(r"positive_(anchor|gt)|num_anchors|deltas") != [], check_assignment),
]
