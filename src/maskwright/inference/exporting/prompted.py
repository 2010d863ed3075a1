"""Two graphs of a promptable system for other programs: one encodes an image, the other answers prompts."""

# Some functions of torch have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskwright.blocks.prompting import ABSENT, FIRST_CORNER, NOTHING
from maskwright.checkpoints.exported import GRAPH_FORMAT
from maskwright.checkpoints.ours import metadata_of
from maskwright.checkpoints.runtimes import CRC, weights_crc
from maskwright.errors import CheckpointError, UsageError
from maskwright.inference.exporting.checking import Difference, check_image, check_pixels, relative_error, timed
from maskwright.inference.exporting.networks import OPSET, Convertible, convert
from maskwright.inference.exporting.placing import Grid, place, placed_in
from maskwright.inference.exporting.running import open_session
from maskwright.inference.exporting.stages import report
from maskwright.inference.exporting.writing import (
    Exported,
    checked_target,
    loaded_for_export,
    part_path,
    publish,
    staged,
    write_model,
)
from maskwright.inference.preparing import prepare
from maskwright.structures import Preprocess, Prompts
from maskwright.systems.kinds.promptable import Features, PromptableSystem, Slots

PARTS = ("encoder", "decoder")


class EncoderGraph(nn.Module):
    """From an image (H, W, C), 8 bits, to its embedding and the finer feature maps that the decoder reads."""

    def __init__(self, system: PromptableSystem):
        super().__init__()
        self.system, self.preprocess = system, system.preprocess

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encodes an image."""
        with Convertible():
            values, _ = place(image, self.preprocess, canvas_of(self.preprocess))
            found: Features = self.system(values)
            return (found.image, *found.finer)


class DecoderGraph(nn.Module):
    """From an embedding and prompts to mask logits, predicted IoUs and masks of the image."""

    def __init__(self, system: PromptableSystem):
        super().__init__()
        self.system, self.preprocess = system, system.preprocess

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Answers prompts; the inputs are those of `export_prompted`, in its order."""
        size, points, labels, *maps = tensors
        logits = given = None
        if self.system.reads_masks:
            logits, given, *maps = maps
        with Convertible():
            canvas = canvas_of(self.preprocess)
            height, width = size[0], size[1]
            placed = placed_in(height.float(), width.float(), self.preprocess, canvas)
            slots = slots_of(self.system, points * placed.scale + placed.offset, labels, logits, given, canvas)
            decoded = self.system.answer(Features(maps[0], tuple(maps[1:]), canvas), slots)
            rows, columns = height.item(), width.item()
            torch._check(rows >= 1)  # pyright: ignore[reportPrivateUsage] - the documented way to bound a size
            torch._check(columns >= 1)  # pyright: ignore[reportPrivateUsage]
            grid = Grid((rows, columns), placed, placed.valid, canvas)
            resized = grid.resize(decoded.logits.flatten(0, 1), self.system.steps, self.system.cubic)
            masks = (resized > 0).to(torch.uint8).unflatten(0, decoded.logits.shape[:2])
            found = (masks, decoded.scores, decoded.logits)
            return found if decoded.present is None else (*found, decoded.present)


def slots_of(
    system: PromptableSystem, points: Tensor, labels: Tensor, logits: Tensor | None, given: Tensor | None,
    canvas: tuple[int, int],
) -> Slots:  # fmt: skip
    """Prompts as the networks read them, from points (N, T, 2) in pixels of the input and labels; see
    `export_prompted`. The tokens that a system adds are a part of the graph."""
    unit = torch.tensor([canvas[1], canvas[0]])
    kinds = torch.where(labels < 0, ABSENT, labels)
    boxed = (kinds == FIRST_CORNER).any(1)
    fill = system.padding(((kinds == 0) | (kinds == 1)).sum(1), boxed)
    more = torch.where(torch.arange(system.most_padding) < fill[:, None], NOTHING, ABSENT)
    beside = torch.zeros_like(more)[..., None] - 0.5 / unit
    places = torch.cat([(points + 0.5) / unit, beside], 1)
    return Slots(places, torch.cat([kinds, more], 1), logits, given, ragged=True)


def canvas_of(preprocess: Preprocess) -> tuple[int, int]:
    """The size of the network's input, which does not depend on the image."""
    return preprocess.padded_size(64, 64)


@dataclass(frozen=True)
class _Part:
    """One of the two graphs: module, example, names, and the dimensions that vary."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[Any, ...]


def export_prompted(system: PromptableSystem, out: str | Path, *, image: str | Path | None = None) -> Exported:
    """Exports a promptable system as two graphs, NAME.encoder.onnx and NAME.decoder.onnx (or .xml).

    The encoder takes `image`, (H, W, C), 8 bits, RGB, of any size, and gives `embedding`, and `finer0`, `finer1` where
    the decoder reads finer maps. The decoder takes these, and

    - `image_size` (2,): height and width of the image, int64;
    - `points` (N, T, 2): x, y in pixels of the image, where pixel j covers j ... j + 1;
    - `labels` (N, T), int64: 1 for a point on the object, 0 beside it, 2 and 3 for the upper left and lower right
      corner of a box, -1 for a slot that is not used;
    - `logits` (N, 1, h, w) and `has_logits` (N,): mask logits of an earlier answer, and which prompts have them (absent
      for systems that do not read masks).

    It gives `masks` (N, K, H, W), 0 or 1, `scores` (N, K), their predicted IoU, and `mask_logits` (N, K, h, w). Answer
    0 is the one for prompts without ambiguity, the others are whole, part and sub-part. SAM 2 also gives `present`
    (N,), the logit of the prediction that there is an object.

    Args:
        system: The system.
        out: The new files' name, `NAME.onnx` or `NAME.xml`.
        image: Image of the check; None: a generated scene.

    Raises:
        UsageError: If the system cannot be exported.
        CheckpointError: If the graphs differ by more than rounding; there are no files then.
    """
    target = checked_target(out, PARTS)
    ready = prepare(loaded_for_export(system), "cpu")
    assert isinstance(ready, PromptableSystem)
    ready.uniform = True
    pixels = check_pixels(check_image(image, channels=len(ready.preprocess.mean)), ready.preprocess)
    parts: dict[str, _Part] = dict(zip(PARTS, _parts(ready, pixels), strict=True))
    canvas = canvas_of(ready.preprocess)
    size = 0
    with staged(target) as folder:
        written = dict[str, Path]()
        for name, part in parts.items():
            model, varying = convert(
                part.module, part.example, part.dynamic, part.inputs, part.outputs, f"{ready.name}: the {name}"
            )
            if name == "decoder" and not (varying[1][0] and varying[1][1]):
                raise UsageError(
                    f"{ready.name}: the number of prompts is fixed in its decoder, which cannot be exported"
                )
            about = {"part": name, "input": list(canvas), "inputs": part.inputs, "outputs": part.outputs}
            metadata = metadata_of(system, target) | {
                "format": GRAPH_FORMAT, "torch": torch.__version__, "graph": json.dumps(about), CRC: weights_crc(model),
            }  # fmt: skip
            final = part_path(target, name)
            written[name] = write_model(model, metadata, folder / final.name)
        difference = _checked(ready, written, parts, pixels, target)
        for name, path in written.items():
            size += publish(path, part_path(target, name))
    words = f"an image of any size, resized into {canvas[0]} x {canvas[1]}"
    return Exported(part_path(target, "encoder"), ready.name, "graph", OPSET, size, difference, {"image": words})


@torch.no_grad()
def _parts(ready: PromptableSystem, pixels: Tensor) -> tuple[_Part, _Part]:
    auto = torch.export.Dim.AUTO
    encoder = EncoderGraph(ready).eval()
    image = pixels.permute(1, 2, 0).contiguous()
    maps = encoder(image)
    names = ("embedding", *(f"finer{level}" for level in range(len(maps) - 1)))
    first = _Part(encoder, (image,), ("image",), names, ({0: auto, 1: auto},))
    decoder = DecoderGraph(ready).eval()
    arrays = _example(ready, pixels, maps)
    answers = decoder(*arrays)
    outputs = ("masks", "scores", "mask_logits", "present")[: len(answers)]
    inputs = ["image_size", "points", "labels", *(("logits", "has_logits") if ready.reads_masks else ()), *names]
    count, slots = auto, auto
    dynamic: list[Any] = [None, {0: count, 1: slots}, {0: count, 1: slots}]
    dynamic += [{0: count}, {0: count}] if ready.reads_masks else []
    return first, _Part(decoder, arrays, tuple(inputs), outputs, ((*dynamic, *(None for _ in maps)),))


def _example(ready: PromptableSystem, pixels: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs of the decoder: a point, two points, a box, a box with a point beside it, a point and a mask."""
    height, width = pixels.shape[1:]
    points, labels, _ = _prompts(height, width)
    arrays = [torch.tensor([height, width]), points, labels]
    if ready.reads_masks:
        grid = (4 * maps[0].shape[-2], 4 * maps[0].shape[-1])
        arrays.append(torch.linspace(-8, 8, grid[0])[:, None].expand(len(points), 1, *grid).contiguous())
        arrays.append(torch.arange(len(points)) == len(points) - 1)
    return (*arrays, *maps)


def _prompts(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points and labels as the decoder reads them, and the boxes among them, NaN where there is none."""
    middle, corner, absent = [width / 2, height / 2], [1.0, 1.0], [0.0, 0.0]
    first, last = [width / 4, height / 4], [width / 2, height / 2]
    points = [
        [middle, absent, absent], [middle, corner, absent], [first, last, absent], [first, last, corner],
        [middle, absent, absent],
    ]  # fmt: skip
    labels = [[1, -1, -1], [1, 0, -1], [2, 3, -1], [2, 3, 0], [1, -1, -1]]
    boxes = torch.full((5, 4), math.nan)
    boxes[2:4] = torch.tensor([*first, *last])
    return torch.tensor(points), torch.tensor(labels), boxes


def _checked(
    ready: PromptableSystem, written: Mapping[str, Path], parts: Mapping[str, _Part], pixels: Tensor, target: Path
) -> Difference:
    """Compares both graphs in their runtime with `embed` and `segment`.

    Raises:
        CheckpointError: If the runtime cannot compute them, or they differ by more than rounding.
    """
    report(f"{target.name}: checking")
    arrays = parts["decoder"].example
    count = len(arrays) - len(parts["encoder"].outputs)
    prompts = dict(zip(parts["decoder"].inputs[:count], arrays[:count], strict=True))
    try:
        encoder, decoder = (open_session(written[name]) for name in PARTS)
        run = _runner(encoder, decoder, pixels, prompts)
        run()  # the first call also plans memory
        found, wall, processor = timed(run)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{target}: the runtime cannot compute the graphs ({reason}); not written") from None
    (own, masks), torch_wall, torch_processor = timed(lambda: _reference(ready, pixels, prompts))
    other = [torch.from_numpy(found[name]) for name in ("scores", "mask_logits")]
    raw = relative_error(own, other)
    different = (torch.from_numpy(found["masks"]).flatten(0, 1).bool() ^ masks).flatten(1).sum(1)
    share = (different - 2).clamp(min=0) / masks.flatten(1).sum(1).clamp(min=100)
    difference = Difference(
        len(masks), 0, 0.0, float((own[0] - other[0]).abs().max()), float(share.max()), raw, wall, torch_wall,
        processor, torch_processor,
    )  # fmt: skip
    problem = difference.exceeds()
    if problem is not None:
        raise CheckpointError(f"{target}: the graphs differ from PyTorch: {problem}; not written")
    return difference


def _runner(
    encoder: Callable[..., dict[str, np.ndarray]], decoder: Callable[..., dict[str, np.ndarray]], pixels: Tensor,
    prompts: Mapping[str, Tensor],
) -> Callable[[], dict[str, np.ndarray]]:  # fmt: skip
    image = pixels.permute(1, 2, 0).contiguous().numpy()
    given = {name: value.numpy() for name, value in prompts.items()}
    return lambda: decoder({**given, **encoder({"image": image})})


@torch.no_grad()
def _reference(ready: PromptableSystem, pixels: Tensor, prompts: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Scores and mask logits, and the masks (N K, H, W), that PyTorch computes with `embed` and `segment`."""
    values, placement = ready.preprocess.apply(pixels)
    canvas = canvas_of(ready.preprocess)
    plane = values.new_zeros(1, len(values), *canvas)
    plane[0, :, : values.shape[1], : values.shape[2]] = values
    embedding = ready.embed(plane, [placement])[0]
    height, width = pixels.shape[1:]
    points, labels, boxes = _prompts(height, width)
    used = (labels == 0) | (labels == 1)
    logits = None
    if "logits" in prompts:
        logits = torch.where(prompts["has_logits"][:, None, None], prompts["logits"][:, 0], math.nan)
    found = ready.segment(
        embedding,
        Prompts(
            (height, width), torch.where(used[..., None], points, math.nan), torch.where(used, labels, -1), boxes,
            logits=logits,
        ),
        answers=4,
    )  # fmt: skip
    return [found.scores, found.logits], found.masks.dense()
