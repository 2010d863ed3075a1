"""Checks of SAM, MobileSAM, EfficientSAM and EdgeSAM, and of "segment everything" without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskwright.ops.planes import axes
from maskwright.structures import Masks, Placement, Prompts
from maskwright.systems.edge_sam import EdgeSAM
from maskwright.systems.efficient_sam import EfficientSAM
from maskwright.systems.kinds import everything
from maskwright.systems.kinds.promptable import Features, PromptableSystem
from maskwright.systems.mobile_sam import MobileSAM
from maskwright.systems.sam import PREPROCESS, SAM
from tests.parity.ledger import Ledger

SIDE = 1024


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What the modules return inside the block, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out.detach()))
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def noise() -> Tensor:
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, SIDE, SIDE)).astype("float32"))


def picture() -> Tensor:
    pixels = np.random.RandomState(3).randint(0, 256, (15, 20, 3)).astype("uint8").repeat(6, 0).repeat(6, 1)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def prompts_in(ledger: Ledger) -> dict[str, Prompts]:
    """The prompts of the recording, in the frame of the input."""
    size = (SIDE, SIDE)
    points, labels = ledger.given("in.points"), ledger.given("in.labels")
    cases = {"points": Prompts(size, points, labels)}
    if "in.boxes" in ledger:
        stream = np.random.RandomState(5)
        stream.rand(2, 3, 2)
        logits = torch.from_numpy((stream.standard_normal((2, 1, 256, 256)) * 4).astype("float32"))[:, 0]
        boxes = ledger.given("in.boxes")
        nothing = torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.int64)
        cases |= {
            "boxes": Prompts(size, *nothing, boxes),
            "points_boxes": Prompts(size, points, labels, boxes),
            "mask": Prompts(size, *nothing, None, None, logits),
            "points_mask": Prompts(size, points, labels, None, None, logits),
            "none": Prompts(size, *nothing)[:1],
        }
    return cases


def prompted(system: PromptableSystem, features: Features, ledger: Ledger) -> None:
    """Prompt encoder and mask decoder, for all kinds of prompts."""
    whole = Placement.identity((SIDE, SIDE))
    for name, prompts in prompts_in(ledger).items():
        prefix = f"{name}." if f"{name}.iou_all4" in ledger else ""
        slots = system.slots(prompts, whole, features)
        tokens = system.prompt_encoder(slots.points.float(), slots.labels, (64, 64), slots.logits, slots.has_mask)
        if f"{name}.sparse" in ledger:
            ledger.compare(f"{name}.sparse", tokens.sparse)
        if f"{name}.dense" in ledger:
            ledger.compare(f"{name}.dense", tokens.dense)
        if "dense_pe" in ledger and name == "points":
            ledger.compare("dense_pe", tokens.positions)
        decoded = system.answer(features, slots)
        ledger.compare(f"{prefix}low_res_logits_all4", decoded.logits)
        ledger.compare(f"{prefix}iou_all4", decoded.scores)
        if name == "points" and "postprocess.768x1024_to_93x124" in ledger:
            down, across = axes(decoded.logits[0], Placement.resize((93, 124), (768, SIDE)), (SIDE, SIDE))
            ledger.compare("postprocess.768x1024_to_93x124", down @ decoded.logits[:, 1:] @ across.T)


def predictor(system: PromptableSystem, ledger: Ledger) -> None:
    """The whole way, from an image to logits of its size."""
    image = picture()
    size = (image.shape[1], image.shape[2])
    batch = system.preprocess.collate([image])
    if "predictor.resized_uint8" in ledger:
        resized = batch.images[0, :, :768] * torch.tensor(PREPROCESS.std)[:, None, None]
        resized = resized + torch.tensor(PREPROCESS.mean)[:, None, None]
        ledger.equal("predictor.resized_uint8", resized.round().permute(1, 2, 0))
    embedding = system.embed(batch.images, batch.placements)[0]
    if "predictor.features" in ledger:
        ledger.compare("predictor.features", embedding.tensors["image"][None])
    points, labels = ledger.given("predictor.in.points"), ledger.given("predictor.in.labels")
    box = ledger.given("predictor.in.box")
    three = Prompts.from_points(size, points, labels)
    boxed = Prompts.from_boxes(box[None], size)
    both = Prompts(size, three.points, three.point_labels, boxed.boxes)
    many = 3 if "predictor.box_points.iou" in ledger and ledger.length("predictor.box_points.iou") == 3 else 1
    cases: dict[str, tuple[Prompts, Any]] = {
        "point1": (Prompts.from_points(size, points[:1], labels[:1]), 3),
        "points3_single": (three, 1),
        "box": (boxed, 1),
        "box_points": (both, many),
    }
    if "predictor.refine.iou" in ledger:
        first = system.segment(embedding, cases["point1"][0], answers=3)
        cases["refine"] = (Prompts(size, three.points, three.point_labels, logits=first.choose(
            first.scores.argmax(1)).logits[:, 0]), 1)  # fmt: skip
    for name, (prompts, answers) in cases.items():
        if f"predictor.{name}.iou" not in ledger:
            continue
        found = system.segment(embedding, prompts, answers=answers)
        ledger.compare(f"predictor.{name}.iou", found.scores[0])
        ledger.compare(f"predictor.{name}.low_res", found.logits[0])
        down, across = axes(found.logits[0], embedding.placement, embedding.input_size)
        values = down @ found.logits[0] @ across.T
        ledger.compare(f"predictor.{name}.logits", values)
        differ = (found.masks.dense() != (values > 0)).sum()
        if differ > 0:
            ledger.fail(f"predictor.{name}.masks", f"{int(differ)} pixels of the masks differ from the logits")


@torch.no_grad()
def sam(system: SAM, layout: Path, ledger: Ledger) -> None:
    system.eval()
    encoder: Any = system.image_encoder
    inside = {"encoder.block0": encoder.blocks[0], "encoder.block2": encoder.blocks[2],
              "encoder.block11": encoder.blocks[11], "encoder.patch_embed": encoder.patches}  # fmt: skip
    with outputs_of(inside) as found:
        features = system(noise())
    found["encoder.patch_embed"] = found["encoder.patch_embed"].permute(0, 2, 3, 1)
    for name, value in found.items():
        ledger.compare(name, value)
    ledger.compare("image_embedding", features.image)
    prompted(system, features, ledger)
    predictor(system, ledger)


@torch.no_grad()
def mobile_sam(system: MobileSAM, layout: Path, ledger: Ledger) -> None:
    system.eval()
    stages: Any = system.image_encoder.stages
    inside: dict[str, nn.Module] = {f"encoder.layer{i}": stages[i] for i in range(4)}
    inside |= {"encoder.layer0.block1": stages[0].blocks[1], "encoder.layer1.block0": stages[1].blocks[0]}
    inside["encoder.patch_embed"] = system.image_encoder.stem[1]
    with outputs_of(inside) as found:
        features = system(noise())
    for name, value in found.items():
        maps = name in ("encoder.patch_embed", "encoder.layer0.block1")
        ledger.compare(name, value if maps else value.flatten(2).transpose(1, 2))
    ledger.compare("image_embedding", features.image)
    prompted(system, features, ledger)
    predictor(system, ledger)


@torch.no_grad()
def edge_sam(system: EdgeSAM, layout: Path, ledger: Ledger) -> None:
    system.eval()
    features = system(noise())
    # With these weights a gate (the excitation of block 7 of the third stage) has logits of tens. The relative error of
    # a small sigmoid is the absolute error of its logit: there 1e-6 becomes 3.6e-5, measured against float64.
    ledger.compare("image_embedding", features.image, bound=5e-5, reason="rounding of a gate's large logits")
    prompted(system, features, ledger)


@torch.no_grad()
def efficient_sam(system: EfficientSAM, layout: Path, ledger: Ledger) -> None:
    system.eval()
    image = torch.from_numpy(np.random.RandomState(0).rand(1, 3, 96, 128).astype("float32"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (system.preprocess.mean, system.preprocess.std))
    large = nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False)
    placement = Placement.resize((96, 128), (SIDE, SIDE))
    embedding = system.embed((large - mean) / std, [placement])[0]
    ledger.compare("image_embedding", embedding.tensors["image"][None])
    points, labels = ledger.given("in.points")[0], ledger.given("in.labels")[0]
    assert labels.tolist() == [[1, 1], [2, 3]]
    prompts = Prompts.join([
        Prompts.from_points((96, 128), points[:1], labels[:1]), Prompts.from_boxes(points[1].reshape(1, 4), (96, 128))
    ])  # fmt: skip
    three, one = (system.segment(embedding, prompts, answers=count) for count in (3, 1))
    ledger.compare("iou", three.scores[None])
    down, across = axes(three.logits[0], placement, (SIDE, SIDE), 1, cubic=True)
    values = down @ three.logits @ across.T
    ledger.compare("masks", values[None])
    ledger.compare("single.low_res", one.logits[None])
    ledger.compare("single.iou", one.scores[None])
    different = int((three.masks.dense() != (values.flatten(0, 1) > 0)).sum())
    if different > 0:
        ledger.fail("masks", f"{different} pixels of the masks differ from the logits")


# ---- everything ------------------------------------------------------------------------------------------------------


class StandIn(SAM):
    """SAM with a formula in place of its networks."""

    def answers_to_points(
        self, features: Features, placement: Placement, points: Tensor, options: everything.Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        place = placement.points_to_input(points.double())
        centre = (place / 150).round() * 150
        grid = 4 * torch.arange(256, dtype=torch.float64) + 2
        wave = (grid / 23).sin() * (grid / 19).sin()[:, None]  # u along x
        away = ((grid - centre[:, 0, None, None]) ** 2 + (grid[:, None] - centre[:, 1, None, None]) ** 2).sqrt()
        logits, scores = [], []
        for number, (radius, slope) in enumerate(((70, 2), (160, 8), (330, 60))):
            value = (radius - away) / slope
            value = torch.where((wave > 0.93) & (away < 1.25 * radius), -value.clamp(-6, 6), value)
            logits.append(value.clamp(-30, 30))
            x, y = place.unbind(1)
            scores.append(0.70 + 0.1 * number + 0.12 * (x / 97 + number).cos() * (y / 83).sin())
        owner = torch.arange(len(points)).repeat_interleave(3)
        return torch.stack(logits, 1).flatten(0, 1).float(), torch.stack(scores, 1).flatten().float(), owner


NAMES = {"pred_iou_thresh": "score_threshold", "box_nms_thresh": "nms_threshold"}


def everywhere(ledger: Ledger) -> None:
    """Grids, crops, filters, suppression, and small regions."""
    for name in ledger.names(r"crop_boxes\..*"):
        height, width = (int(v) for v in name.partition(".")[2].split("x"))
        crops = everything.crop_boxes((height, width), 3, 512 / 1500)
        ledger.equal(name, torch.tensor([box for _, box in crops]))
        ledger.equal(name.replace("boxes", "layers"), torch.tensor([layer for layer, _ in crops]))
    size = tuple(ledger.about["image_size_hw"])
    system = StandIn(encoder={"width": 16, "depth": 1, "heads": 1}, decoder={"width": 16, "heads": 1, "hidden": 8})
    for case, options in ledger.about["cases"].items():
        grid = everything.Grid(**{NAMES.get(name, name): value for name, value in options.items()})
        found = everything.find_everywhere(system, size, grid, lambda box: embedded(system, box))
        ledger_found(ledger, case, found, size)


def embedded(system: SAM, box: everything.Crop) -> tuple[Features, Placement]:
    size = (box[3] - box[1], box[2] - box[0])
    placement = Placement.resize(size, system.preprocess.size(*size))
    return Features(torch.zeros(1, 1, 64, 64), size=(SIDE, SIDE)), placement


def ledger_found(ledger: Ledger, case: str, found: everything.Found, size: tuple[int, int]) -> None:
    """One case: everything in the order of the original."""
    corners = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1)
    ledger.equal(f"{case}.bbox", corners)
    ledger.equal(f"{case}.area", found.masks.areas())
    ledger.compare(f"{case}.predicted_iou", found.scores)
    ledger.compare(f"{case}.stability_score", found.stability)
    ledger.compare(f"{case}.point_coords", found.points)
    crops = torch.cat([found.crops[:, :2], found.crops[:, 2:] - found.crops[:, :2]], 1)
    ledger.equal(f"{case}.crop_box", crops)
    lengths = ledger.given(f"{case}.rle_len").long().tolist()
    counts = ledger.given(f"{case}.rle_counts").long().split(lengths)
    codes = [{"size": list(size), "counts": [int(v) for v in own]} for own in counts]
    theirs = Masks.from_rle(codes, size)
    different = (theirs.dense() != found.masks.dense()).sum() if len(theirs) == len(found) else -1
    if different != 0:
        ledger.fail(f"{case}.rle_counts", f"{int(different)} pixels differ")
    if f"{case}.n" in ledger:
        ledger.equal(f"{case}.n", torch.tensor(len(found)))


def is_everything(ledger: Ledger) -> bool:
    return ledger.name == "sam-amg"


SYSTEMS = {"sam": sam, "mobile-sam": mobile_sam, "efficient-sam": efficient_sam, "edge-sam": edge_sam}
OPERATORS = [(is_everything, everywhere)]
