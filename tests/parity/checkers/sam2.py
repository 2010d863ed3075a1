"""Checks of SAM 2 against facebookresearch/sam2."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maskwright.blocks.positions import sine_positions
from maskwright.blocks.prompting import Decoded
from maskwright.inference.video import VideoSession
from maskwright.structures import Placement, Prompts
from maskwright.structures.rle import decode_counts
from maskwright.systems.families.memory_tracking import FrameFeatures
from maskwright.systems.kinds.everything import crop_boxes, find_in_crop, merge_crops
from maskwright.systems.kinds.promptable import Slots
from maskwright.systems.kinds.video import Remembered
from maskwright.systems.sam2 import SAM2, PresenceLoss, answer_losses, without_small_regions
from tests.parity.ledger import Ledger

# Memories are kept in bfloat16: a value between two of them may go either way, and later frames attend to it. With
# memories in float32 here and there, all errors of such sessions are below 2e-6. About 1 % of the values of a memory
# go the other way on another kind of processor, by up to 2^-8 of their size: sqrt(0.01) * 2^-8 of the memory's norm.
LATER: dict[str, Any] = {"bound": 4e-4, "largest": 4e-4, "reason": "after memories that are rounded to bfloat16"}


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """Options of the system: the size of the input and what a frame attends to."""
    if not str(about.get("variant", "")).startswith("sam2"):
        return {}
    options: dict[str, Any] = {}
    if "image_size" in about:
        options["resize"] = {"canvas": [about["image_size"]] * 2}
    other = about.get("other_options", {})
    names = {"max_cond_frames_in_attn": "prompted", "memory_temporal_stride_for_eval": "stride",
             "max_obj_ptrs_in_encoder": "pointers"}  # fmt: skip
    memory = {ours: other[theirs] for theirs, ours in names.items() if theirs in other}
    return {**options, "memory": memory} if memory else options


def check(system: SAM2, layout: Path, ledger: Ledger) -> None:
    system.eval()
    if "frames" in ledger:
        bias = system.mask_decoder.present.layers[2].bias
        added = float(ledger.about.get("obj_score_bias_added", 0.0))
        bias.data += added
        made = Made()
        hooks = [
            system.mask_decoder.present.layers[2].register_forward_hook(
                lambda layer, given, _: made.sizes.append(
                    (given[0].abs() @ layer.weight.abs().T + layer.bias.abs()).min()
                )
            ),
            system.memory_encoder.register_forward_hook(lambda _, given, found: made.remember(given, found)),
        ]
        try:
            with torch.no_grad():
                video(system, ledger, made)
        finally:
            bias.data -= added
            for hook in hooks:
                hook.remove()
    else:
        with torch.no_grad():
            image(system, ledger)


# ---- videos ----------------------------------------------------------------------------------------------------------


@dataclass
class Made:
    """What networks gave during a session.

    Attributes:
        sizes: Of the terms of the logits of presence, which all but cancel.
        memories: Memories in float32, by their values in bfloat16.
        inputs: What those of thresholded masks were made of.
        neighbours: Whether a memory so far has values that are rounded the other way in the recording.
    """

    sizes: list[Tensor] = field(default_factory=list)
    memories: dict[bytes, Tensor] = field(default_factory=dict)
    inputs: dict[bytes, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    neighbours: bool = False

    def remember(self, given: tuple[Tensor, Tensor, Tensor], found: Tensor) -> None:
        frames, masks, shown = given
        for row, own in enumerate(found):
            key = _key(own.bfloat16())
            self.memories[key] = own.float()
            if bool(((masks[row] == 0) | (masks[row] == 1)).all()):
                self.inputs[key] = frames[min(row, len(frames) - 1)][None], masks[row][None], shown[row][None]


def _key(memory: Tensor) -> bytes:
    return memory.contiguous().view(torch.int16).numpy().tobytes()


def video(system: SAM2, ledger: Ledger, made: Made) -> None:
    """A session."""
    about = ledger.about
    other = about["other_options"]
    frames = ledger.given("frames").permute(0, 3, 1, 2)
    values, _ = system.frame_preprocess.apply(frames[0])
    ledger.compare("normalised_frame0", values)
    session = VideoSession(
        system, list(frames), device="cpu", fill_holes=int(about["fill_hole_area"]),
        corrections="keep" if other.get("add_all_frames_to_correct_as_cond") else "once",
        overlap=not other.get("non_overlap_masks", False),
    )  # fmt: skip
    levels = system(values[None])
    for number, level in enumerate((*levels.finer, levels.frame)):
        ledger.compare(f"frame0.fpn{number}", level)
    size = (levels.image.shape[2], levels.image.shape[3])
    ledger.compare("maskmem_pos_enc", sine_positions(size, system.bank.width // 2))
    mask = torch.zeros(frames.shape[2:], dtype=torch.bool)
    mask[30:70, 40:90] = True
    steps: dict[str, Callable[[], Any]] = {
        "1_click": lambda: session.prompt(0, 1, points=[(25, 26)]),
        "2_second_click": lambda: session.prompt(0, 1, points=[(60, 70)], labels=[0], add=True),
        "3_box": lambda: session.prompt(0, 7, box=(86, 54, 116, 82)),
        "4_forward": lambda: session.run(),
        "5_mask_new_object": lambda: session.prompt(3, 3, mask=mask),
        "6_correction": lambda: session.prompt(4, 1, points=[(50, 40), (100, 80)], labels=[1, 0]),
        "7_forward_from_3": lambda: session.run(3),
        "8_reverse_from_3": lambda: session.run(3, reverse=True),
        "9_remove_object": lambda: session.remove(7),
        "10_clear_prompts": lambda: session.clear(3, 3),
    }
    shown = {"1_click": 0, "2_second_click": 0, "3_box": 0, "5_mask_new_object": 3, "6_correction": 4,
             "9_remove_object": 0, "10_clear_prompts": 3}  # fmt: skip
    for name, step in steps.items():
        if not ledger.names(rf"{name}\..*"):
            continue
        found = step()
        if name in shown:
            logits(session, name, shown[name], ledger)
        else:
            for objects in found:
                logits(session, name, objects.frame, ledger)
                masks_agree(session, objects, ledger)
        state(session, name, ledger, made)


def wide(session: VideoSession, frame: int) -> Tensor:
    """Mask logits of all objects on the grid of the video, as the original returns them."""
    known, size = session.logits(frame), session.image(frame).shape[1:]
    side = session.system.preprocess.canvas[0] // 4
    planes = torch.stack([known.get(id, torch.full((side, side), -1024.0)) for id in session.ids])
    found = functional.interpolate(planes[:, None], size=tuple(size), mode="bilinear", align_corners=False)
    if not session.overlap and len(found) > 1:
        owner = found.argmax(0, keepdim=True) == torch.arange(len(found))[:, None, None, None]
        first, second = found.topk(2, 0).values
        found = torch.where(owner, found, found.clamp(max=-10))
        tie = (first - second < 1e-4 * first.abs()) & (first > -10)
        found = torch.where(tie, torch.nan, found)
    return found


def logits(session: VideoSession, step: str, frame: int, ledger: Ledger) -> None:
    name = f"{step}.f{frame}.video_res_logits"
    if name in ledger:
        note = "" if session.overlap else "without pixels where two objects have equal logits"
        ledger.compare(name, wide(session, frame), note=note, **LATER)


def masks_agree(session: VideoSession, objects: Any, ledger: Ledger) -> None:
    """The masks that the session yields are where the logits are positive."""
    values = wide(session, objects.frame)[:, 0]
    planes = values > 0
    ids = [id for id, plane in zip(session.ids, planes, strict=True) if plane.any()]
    rows = [session.ids.index(id) for id in ids]
    differs = (objects.masks.dense() != planes[rows]) & ~values[rows].isnan() if len(objects) == len(ids) else planes
    same = objects.ids.tolist() == ids and int(differs.sum()) <= 1e-4 * differs.numel()
    if not same:
        ledger.fail(f"masks of frame {objects.frame}", f"objects {objects.ids.tolist()} instead of {ids}")


def state(session: VideoSession, step: str, ledger: Ledger, made: Made) -> None:
    """What is remembered of each object."""
    scale = torch.stack(made.sizes).min()
    for name in ledger.names(rf"{step}\.(temp\.)?obj\d+\..*"):
        row, frame, kind, field = re.fullmatch(
            rf"{re.escape(step)}\.(?:temp\.)?obj(\d+)\.f(\d+)\.(\w+)\.(\w+)", name
        ).groups()
        track = session._memory.tracks[int(row)]
        entry: Remembered | None
        if ".temp." in name:
            entry, conditions = track.new.get(int(frame), (None, False))
            entry = entry if conditions == (kind == "cond") else None
        else:
            entry = (track.prompted if kind == "cond" else track.tracked).get(int(frame))
        if entry is None:
            ledger.fail(name, "is not remembered")
        elif field == "obj_ptr":
            ledger.compare(name, entry.pointer[None], **LATER)
        elif field == "object_score_logits":
            ledger.compare(name, entry.present[None, None], scale=scale)
        elif field == "pred_masks":
            ledger.compare(name, entry.logits[None, None], **LATER)
        else:
            assert entry.memory is not None
            own, flipped = made.memories[_key(entry.memory)][None], 0
            if _key(entry.memory) in made.inputs:
                inputs = made.inputs[_key(entry.memory)]
                margin = LATER["bound"] if made.neighbours else 1e-5
                own, flipped = settled(session.system, inputs, entry.logits, own, name, ledger, margin)
            memories(name, own, flipped, ledger, made)


def memories(name: str, ours: Tensor, flipped: int, ledger: Ledger, made: Made) -> None:
    """Memories are kept in bfloat16, where numbers that differ only by rounding in float32 may become neighbours.

    So ours in float32 are compared with the nearest numbers that the original may have rounded: with themselves, if
    both round to the same, otherwise with the boundary of the numbers that round to the original's. Few numbers are
    next to a boundary. A memory after others with such neighbours is made of frames that attended to them.

    Args:
        name: The array.
        ours: Our memory in float32.
        flipped: Number of pixels of its mask that were changed, see `settled`.
        ledger: The recording.
        made: Learns whether this memory has such neighbours.
    """
    places, theirs, nearest = nearest_numbers(name, ours, ledger)
    values = ours.flatten().clone()
    other = int((values[places].bfloat16().float() != theirs).sum())
    values[places] = theirs + values[places] - nearest
    note = f"{other} of {len(theirs)} are neighbours" + (f", {flipped} undecided pixels" if flipped else "")
    ledger.compare(name, values.view(ours.shape), note=note, **(LATER if made.neighbours else {}))
    made.neighbours |= other > 0


def nearest_numbers(name: str, ours: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor, Tensor]:
    """Recorded places and values of a memory, and the numbers that round to these values and are nearest to ours."""
    theirs = torch.from_numpy(ledger.arrays[f"{name}__sampled"])
    places = torch.from_numpy(np.random.RandomState(0).randint(0, ours.numel(), len(theirs)))
    lower, upper = halfway(theirs)
    return places, theirs, ours.flatten()[places].clamp(lower, upper)


def settled(
    system: SAM2, inputs: tuple[Tensor, Tensor, Tensor], logits: Tensor, ours: Tensor, name: str, ledger: Ledger,
    margin: float,
) -> tuple[Tensor, int]:  # fmt: skip
    """The memory of a thresholded mask, with undecided pixels as in the recording, and how many were changed.

    A pixel whose logit is 0 up to `margin`, a part of their root mean square, may be on either side of the threshold.
    """
    frames, masks, shown = inputs
    wide = functional.interpolate(
        logits[None, None].float(), size=masks.shape[2:], mode="bilinear", align_corners=False
    )
    undecided = (wide.abs() < margin * wide.square().mean().sqrt()).flatten().nonzero().flatten().tolist()

    def error(memory: Tensor) -> float:
        places, _, nearest = nearest_numbers(name, memory, ledger)
        return float((memory.flatten()[places] - nearest).norm())

    best, changed = error(ours), 0
    for pixel in undecided[:32] if best else []:
        other = masks.flatten().clone()
        other[pixel] = 1 - other[pixel]
        memory = system.memory_encoder(frames, other.view_as(masks), shown).float()
        if error(memory) < best:
            best, masks, ours, changed = error(memory), other.view_as(masks), memory, changed + 1
    return ours, changed


def halfway(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest number that is rounded to each of some values in bfloat16."""
    below, above = (torch.nextafter(values.bfloat16(), torch.tensor(s * torch.inf).bfloat16()).float() for s in (-1, 1))
    return (values + below) / 2, (values + above) / 2


# ---- images ----------------------------------------------------------------------------------------------------------


def image(system: SAM2, ledger: Ledger) -> None:
    shape = (1, 3, 1024, 1024)
    pixels = torch.from_numpy(np.random.RandomState(0).standard_normal(shape).astype("float32"))
    encoder = system.image_encoder
    levels = encoder.backbone(pixels)
    for number, level in enumerate(levels):
        ledger.compare(f"trunk{number}", level)
    pyramid = encoder.neck(levels)
    for number, level in enumerate(pyramid):
        ledger.compare(f"neck{number}", level)
    for number in (0, 2):
        ledger.compare(f"pos{number}", sine_positions(tuple(pyramid[number].shape[2:]), system.width // 2))
    ledger.compare("hiera_pos_embed", encoder.backbone.positions(256, 256).permute(0, 2, 3, 1))
    features = system(pixels)
    ledger.compare("high_res0", features.finer[0])
    ledger.compare("high_res1", features.finer[1])
    ledger.compare("image_embed", features.image)
    ledger.compare("dense_pe", system.prompt_encoder.positions.grid((64, 64)))
    decoding(system, features, ledger)
    predictor(system, ledger)


def decoding(system: SAM2, features: Any, ledger: Ledger) -> None:
    """The decoder's answers to points, points with a mask, and nothing."""
    stream = np.random.RandomState(5)
    points, labels = ledger.given("in.points"), ledger.given("in.labels")
    assert np.allclose(stream.rand(2, 3, 2) * 1024, points.numpy(), atol=1e-3)
    mask = torch.from_numpy((stream.standard_normal((2, 1, 256, 256)) * 4).astype("float32"))
    # Labels are those of the networks: corners of boxes and padding among them. One slot without a point follows.
    points = torch.cat([(points + 0.5) / 1024, torch.zeros(2, 1, 2)], 1)
    labels = torch.cat([labels, torch.full((2, 1), -1)], 1)
    cases = {
        "points": Slots(points, labels), "points_mask": Slots(points, labels, mask),
        "none": Slots(points[:1, :0], labels[:1, :0]),
    }  # fmt: skip
    for name, slots in cases.items():
        tokens = system.prompt_encoder(slots.points, slots.labels, (64, 64), slots.logits, slots.has_mask)
        ledger.compare(f"{name}.sparse", tokens.sparse)
        decoded = system.answer(features, slots)
        ledger.compare(f"{name}.low_res_logits_all4", decoded.logits)
        ledger.compare(f"{name}.iou_all4", decoded.scores)
        ledger.compare(f"{name}.mask_tokens", decoded.tokens)
        ledger.compare(f"{name}.object_score_logits", decoded.present[:, None])
        first = decoded.logits[:, :1].flatten(2)
        ledger.compare(f"{name}.stability_of_single", (first > 0.05).sum(2) / (first > -0.05).sum(2))
        single = system.choose(decoded, torch.zeros(len(slots), dtype=torch.bool), 1)
        ledger.compare(f"{name}.dynamic_single.low_res", single.logits)
        ledger.compare(f"{name}.dynamic_single.iou", single.scores)


def predictor(system: SAM2, ledger: Ledger) -> None:
    """The image predictor from pixels to masks."""
    pixels = np.random.RandomState(3).randint(0, 256, (15, 20, 3)).astype("uint8").repeat(6, 0).repeat(6, 1)
    values, placement = system.preprocess.apply(torch.from_numpy(pixels).permute(2, 0, 1))
    ledger.compare("predictor.normalised", values)
    embedding = system.embed(values[None], [placement])[0]
    ledger.compare("predictor.image_embed", embedding.tensors["image"][None])
    points, labels, boxes = (ledger.given(f"predictor.in.{name}") for name in ("points", "labels", "boxes"))
    size = (90, 120)

    def ask(case: str, prompts: Prompts, answers: Any, low: Tensor | None = None) -> Tensor:
        found = system.segment(embedding, prompts, answers=answers)
        full = functional.interpolate(found.logits, size=size, mode="bilinear", align_corners=False)
        rows = slice(None) if case == "boxes2" else 0
        ledger.compare(f"predictor.{case}.logits", full[rows])
        ledger.compare(f"predictor.{case}.iou", found.scores[rows])
        ledger.compare(f"predictor.{case}.low_res", found.logits[rows].clamp(-32, 32))
        wrong = int((found.masks.dense().unflatten(0, found.scores.shape) != (full > 0)).sum())
        if wrong > 1e-4 * full.numel():
            ledger.fail(f"masks of {case}", f"{wrong} pixels differ")
        return found.logits.clamp(-32, 32)

    one = Prompts.from_points(size, points[:1], labels[:1])
    low = ask("point1", one, 3)
    ask("points3_single", Prompts.from_points(size, points, labels), 1)
    ask("box", Prompts.from_boxes(boxes[:1], size), 1)
    ask("boxes2", Prompts.from_boxes(boxes, size), 1)
    ask("box_points", Prompts(size, points[None], labels[None], boxes[:1]), 3)
    best = int(system.segment(embedding, one, answers=3).scores[0].argmax())
    ask("refine", Prompts(size, points[None], labels[None], logits=low[:, best]), 1)
    cleaned = functional.interpolate(without_small_regions(low[:, best], 6)[None], size=size, mode="bilinear")
    ledger.compare("postprocess.holes6", cleaned)


# ---- without weights -------------------------------------------------------------------------------------------------


def small(**options: Any) -> SAM2:
    """A system whose networks do not matter."""
    return SAM2(
        backbone={"name": "hiera-tiny", "width": 8, "depths": [1, 1, 1, 1]},
        decoder={"width": 16, "hidden": 16, "heads": 2}, memory={"width": 8, "hidden": 8, "layers": 1}, **options,
    ).eval()  # fmt: skip


def stand_in(slots: Slots, size: int = 256) -> Decoded:
    """The decoder that the recording was made with."""
    points = slots.points[:, 0].double() * 1024 - 0.5  # x, y in the frame of the input
    centre = (points / 150).round() * 150
    at = torch.arange(size, dtype=torch.float64) * 4 + 2
    u, v = at[None, :], at[:, None]
    distance = ((u - centre[:, 0, None, None]) ** 2 + (v - centre[:, 1, None, None]) ** 2).sqrt()
    logits, scores = [], []
    for k, (radius, slope) in enumerate(((70, 2), (160, 8), (330, 60))):
        values = (radius - distance) / slope
        odd = ((u / 23).sin() * (v / 19).sin() > 0.93) & (distance < 1.25 * radius)
        logits.append(torch.where(odd, -values.clamp(-6, 6), values).clamp(-30, 30))
        x, y = points.unbind(1)
        scores.append(0.70 + 0.1 * k + 0.12 * (x / 97 + k).cos() * (y / 83).sin())
    planes, quality = torch.stack(logits, 1).float(), torch.stack(scores, 1).float()
    planes, quality = torch.cat([planes[:, :1], planes], 1), torch.cat([quality[:, :1], quality], 1)
    if slots.logits is not None:
        planes = 0.5 * planes + 0.5 * slots.logits.float()
        quality = 0.5 * quality + 0.45
    return Decoded(planes, quality, planes.new_zeros(*quality.shape, 1), torch.ones(len(planes)))


def everything(ledger: Ledger) -> None:
    """The generator of masks, with a decoder that needs no weights."""
    system = small()
    system.answer = lambda features, slots: stand_in(slots)
    system.single = lambda decoded: torch.zeros(len(decoded.scores), dtype=torch.int64)
    size = tuple(ledger.about["image_size_hw"])
    names = {"pred_iou_thresh": "score_threshold", "box_nms_thresh": "nms_threshold"}
    for case, given in ledger.about["cases"].items():
        options = system.everything_options(**{names.get(k, k): v for k, v in given.items()})
        parts = []
        for layer, crop in crop_boxes(size, options.crop_n_layers, options.crop_overlap_ratio):
            own = (crop[3] - crop[1], crop[2] - crop[0])
            features = FrameFeatures(torch.zeros(1, 16, 64, 64), (), (1024, 1024))
            parts.append(
                find_in_crop(system, features, Placement.resize(own, (1024, 1024)), options, layer, crop, size)
            )
        found = merge_crops(parts, options)
        boxes = found.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        ledger.compare(f"{case}.bbox", boxes)
        ledger.equal(f"{case}.area", found.masks.areas())
        ledger.compare(f"{case}.predicted_iou", found.scores)
        ledger.compare(f"{case}.stability_score", found.stability)
        ledger.compare(f"{case}.point_coords", found.points)
        corners = found.crops.clone()
        corners[:, 2:] -= corners[:, :2]
        ledger.compare(f"{case}.crop_box", corners)
        runs = [decode_counts(code["counts"]) for code in found.masks.rle()]
        ledger.equal(f"{case}.rle_len", torch.tensor([len(r) for r in runs]))
        ledger.equal(f"{case}.rle_counts", torch.from_numpy(np.concatenate(runs)))


def training(ledger: Ledger) -> None:
    """The losses and their gradients."""
    targets = ledger.given("targets").float()
    released = PresenceLoss()
    rules = {
        "released": released, "sam1_like": replace(released, present=0.0, iou_error="l2", every_iou=False),
        "focal_obj": replace(released, gamma=2.0, alpha=0.25),
    }  # fmt: skip
    steps = sorted({name.rsplit(".", 1)[0] for name in ledger.names(r"f\d\.s\d\..*")})
    inputs = {
        (step, field): ledger.given(f"{step}.{field}").requires_grad_()
        for step in steps for field in ("mask_logits", "ious", "object_score_logits")
    }  # fmt: skip
    for name, own in rules.items():
        total = torch.zeros(4)
        for value in inputs.values():
            value.grad = None
        for step in steps:
            logits, scores, present = (inputs[step, f] for f in ("mask_logits", "ious", "object_score_logits"))
            several = logits.shape[1] > 1
            if several:  # the answer for prompts without ambiguity comes first
                logits, scores = (torch.cat([v[:, :1].detach(), v], 1) for v in (logits, scores))
            ambiguous = torch.full((len(logits),), several)
            shown = None if name == "sam1_like" else present[:, 0]
            terms = answer_losses(logits, scores, shown, targets[int(step[1])], ambiguous, own)
            total = total + terms.sum(1) / targets.shape[1]
        for key, value in zip(("mask", "dice", "iou", "class"), total, strict=True):
            ledger.compare(f"{name}.loss_{key}", value)
        weights = torch.tensor([own.mask, own.dice, own.iou, own.present])
        loss = (total * weights).sum()
        ledger.compare(f"{name}.core_loss", loss)
        loss.backward()
        for key in ledger.names(rf"{name}\.grad\..*"):
            step, field = key.removeprefix(f"{name}.grad.").rsplit(".", 1)
            ledger.compare(key, inputs[step, field].grad)


SYSTEMS = {"sam2": check}
OPERATORS = [
    (lambda ledger: ledger.name == "sam2-amg", everything),
    (lambda ledger: ledger.name == "sam2-loss", training),
]
FILES = ("sam2.1",)
