"""Checks of RoI operators and preprocessing."""

from __future__ import annotations

import re

import torch

from maskwright.blocks.rpn import anchor_shapes
from maskwright.ops import boxes, keypoints, mask_targets, matching, paste, pooling
from maskwright.structures import Masks
from maskwright.systems.families.two_stage import PREPROCESS
from tests.parity.ledger import Ledger, part

FAMILIES = {"detectron2": "detectron2", "torchvision": "torchvision", "maskrcnn_benchmark": "maskrcnn-benchmark"}


def roi_pooling(ledger: Ledger) -> None:
    _pooled(ledger)
    _levels(ledger)
    if ledger.names(r"paste_.*"):
        _pasting(ledger)
    if ledger.names(r"target_.*|polygon_areas"):
        _targets(ledger)
    if ledger.names(r"coder_.*"):
        _coder(ledger)
    for name in ledger.names(r"anchors_.*"):
        _anchors(ledger, name)
    _matches(ledger)
    _keypoints(ledger)
    _read_keypoints(ledger)


@part
def _pooled(ledger: Ledger) -> None:
    if not ledger.names(r"roi_.*"):
        return
    feature, rois = ledger.given("feature"), ledger.given("rois")
    for name in ledger.names(r"roi_pool_\d+"):
        ledger.compare(name, pooling.roi_pool(feature, rois, int(name.split("_")[-1]), 0.25))
    for name in ledger.names(r"roi_align_\d+_aligned[01]_ratio\d+"):
        side, aligned, samples = map(int, re.findall(r"\d+", name))
        ledger.compare(name, pooling.roi_align(feature, rois, side, 0.25, samples, bool(aligned)))
    for name in ledger.names(r"roi_align_.*_grad"):
        side, aligned, samples = map(int, re.findall(r"\d+", name))
        leaf = feature.clone().requires_grad_()
        (
            pooling.roi_align(leaf, rois, side, 0.25, samples, bool(aligned)) * ledger.given("grad_weight")
        ).sum().backward()
        assert leaf.grad is not None
        ledger.compare(name, leaf.grad)


@part
def _levels(ledger: Ledger) -> None:
    for name in ledger.names(r"level_(?!boxes).*"):
        rule = FAMILIES[name.removeprefix("level_")]
        ledger.equal(name, boxes.pyramid_level(ledger.given("level_boxes"), rule=rule))  # pyright: ignore[reportArgumentType]


@part
def _matches(ledger: Ledger) -> None:
    for ending in dict.fromkeys(name.rsplit("_", 1)[1] for name in ledger.names(r"match_(idx|label)_lowq[01]")):
        nearest, matched = matching.match(ledger.given("match_iou"), 0.3, 0.7, ending.endswith("1"))
        ledger.equal(f"match_idx_{ending}", nearest)
        labels = torch.where(matched >= 0, 1, torch.where(matched == matching.NEGATIVE, 0, -1))
        ledger.equal(f"match_label_{ending}", labels)


@part
def _keypoints(ledger: Ledger) -> None:
    if ledger.names(r"kp_(heat_index|valid)"):
        place, counts = keypoints.encode(ledger.given("kp"), ledger.given("target_boxes"), 56)
        ledger.equal("kp_heat_index", place)
        ledger.equal("kp_valid", counts)


@part
def _read_keypoints(ledger: Ledger) -> None:
    if "kp_decoded" in ledger:
        own, maps = ledger.given("target_boxes"), ledger.given("kp_maps")
        by_logit, by_share = (keypoints.decode(maps, own, rule) for rule in ("logit", "probability"))
        ledger.compare("kp_decoded", torch.cat([by_logit, by_share[..., 2:]], -1))


@part
def _pasting(ledger: Ledger) -> None:
    grids, own = ledger.given("paste_masks"), ledger.given("paste_boxes")
    height, width = ledger.given("paste_size").tolist()
    size = (height, width)
    for name in ledger.names(r"paste_(detectron2|torchvision|maskrcnn_benchmark)_float"):
        rule = "continuous" if "detectron2" in name else "padded"
        ledger.compare(name, paste.paste_values(grids, own, size, rule=rule))
    if "paste_detectron2" in ledger:
        ledger.compare_bits("paste_detectron2", paste.paste_masks(grids, own, size).dense())
    if "paste_maskrcnn_benchmark" in ledger:
        ours = paste.paste_masks(grids, own, size, rule="padded", strict=True)
        ledger.compare_bits("paste_maskrcnn_benchmark", ours.dense())


@part
def _targets(ledger: Ledger) -> None:
    own = ledger.given("target_boxes")
    owners = torch.arange(len(own))
    raster = Masks.from_dense(ledger.given("target_bitmask_full"))
    rings = [ledger.names(rf"target_polygon_{n}[a-z]?") for n in range(len(own))]
    outlines = Masks.from_polygons([[ledger.given(n).numpy() for n in names] for names in rings], raster.size)
    ledger.compare("target_polygon_crop28", mask_targets.mask_targets(outlines, owners, own, 28))
    ledger.compare("target_bitmask_crop28", mask_targets.mask_targets(raster, owners, own, 28))
    ledger.compare("target_torchvision_crop28", mask_targets.mask_targets(raster, owners, own, 28, rule="soft"))
    corners = [[p for ring in rings for p in [torch.from_numpy(ring)]] for rings in outlines.polygons()]
    areas = [sum(_shoelace(ring) for ring in own_rings) for own_rings in corners]
    ledger.compare("polygon_areas", torch.tensor(areas, dtype=torch.float64))


def _shoelace(ring: torch.Tensor) -> float:
    x, y = ring.double().unbind(1)
    return float(0.5 * abs((x * y.roll(1)).sum() - (y * x.roll(1)).sum()))


@part
def _coder(ledger: Ledger) -> None:
    source, goal, deltas = (ledger.given(f"coder_{n}") for n in ("src", "dst", "deltas"))
    for name in ledger.names(r"coder_(plus1_)?(encode|decode)_.*"):
        digits = name.split("code_")[1]
        weights = [1.0] * 4 if digits == "1111" else [float(n) for n in digits.split("_")]
        if "encode" in name:
            ours = boxes.encode(source, goal, weights, "plus1" in name)
        else:
            shifts = deltas.view(len(source), -1, 4)
            ours = boxes.decode(source[:, None].expand_as(shifts), shifts, weights, "plus1" in name).flatten(1)
        ledger.compare(name, ours)


def _anchors(ledger: Ledger, name: str) -> None:
    size, stride = float(name.split("_")[-1]), re.search(r"stride(\d+)", name)
    family = next((own for key, own in FAMILIES.items() if key in name), "detectron2")
    ledger.compare(name, anchor_shapes([size], (0.5, 1.0, 2.0), family, int(stride[1]) if stride else 16))  # pyright: ignore[reportArgumentType]


def preprocessing(ledger: Ledger) -> None:
    numbers = re.search(r"short (\d+), long <= (\d+)", str(ledger.about.get("note", "")))
    if numbers is None:
        raise ValueError("meta does not say the sizes")
    short, long = int(numbers[1]), int(numbers[2])
    for number in dict.fromkeys(name.rsplit("_", 1)[1] for name in ledger.names(r"(d2|tv)_\w+_\d+")):
        _preprocessed(ledger, number, short, long)


@part
def _preprocessed(ledger: Ledger, number: str, short: int, long: int) -> None:
    from dataclasses import replace

    image = ledger.given(f"image_{number}").permute(2, 0, 1).contiguous()
    own = replace(PREPROCESS["detectron2"], short=short, long=long)
    values, placement = own.apply(image)
    resized = values + torch.tensor(own.mean)[:, None, None]
    ledger.compare(f"d2_resized_bgr_{number}", resized.round().permute(1, 2, 0))
    ledger.compare(f"d2_input_{number}", own.collate([image]).images)
    own = replace(PREPROCESS["torchvision"], short=short, long=long)
    values, placement = own.apply(image)
    ledger.equal(f"tv_size_{number}", torch.tensor(placement.size))
    ledger.compare(f"tv_input_{number}", own.collate([image]).images)


POOLING = (
    r"roi_(pool|align)_.*|level_(?!boxes).*|paste_\w+|polygon_areas|target_\w+_crop\d+|coder_(plus1_)?(en|de)code_.*"
    r"|anchors_(detectron2|torchvision|maskrcnn_benchmark)_.*|match_(idx|label)_lowq[01]|kp_(heat_index|valid|decoded)"
)
FILES = ("roi-pooling", "preprocess-detectron2-torchvision")
OPERATORS = [
    (lambda ledger: ledger.names(POOLING) != [] and "layout" not in ledger.about, roi_pooling),
    (lambda ledger: ledger.names(r"(d2|tv)_(input|size|resized_bgr)_\d+") != [], preprocessing),
]
