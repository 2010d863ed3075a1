"""InstanceFCN: Instance-sensitive Fully Convolutional Networks (Dai, He, Li, Ren, Sun, ECCV 2016, arXiv 1603.08678).

The size of no layer depends on the resolution of a mask. The network predicts k x k score maps of the image, one for
each part of an object: whether a pixel belongs to the upper left part of an object, the upper middle part, and so on.
The mask of a window is assembled by copying: each of its k x k parts is cropped from the map of that part. Neighbouring
windows therefore share the predictions of a pixel. A second branch scores the windows. This is done at every location
of every level of a pyramid of resized images. Objects have no class.

There is no official code. Choices that a description of the paper leaves open are documented where they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.sliding import pyramid, resized, shares_norms
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.matching import sample
from maskwright.ops.window_tensors import PAD, MaskTensor, swap_windows, up_align2nat
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.sliding import Assignment, AssignmentLike, SlidingSystem, Windows, lay_windows

BACKBONE = Backbone("vgg16")
RESIZE = Resize()
ASSIGNMENT = Assignment(shift=16.0, margin=32.0, octaves=0.5)
PREPROCESS = Preprocess(short=600, resample="pillow", multiple=8)
STRIDE = 8

Bins = Literal["nearest", "floor"]


@dataclass(frozen=True)
class Raw:
    """The raw output.

    Attributes:
        scores: Logits of each level: whether there is an object in the window around a location.
        maps: Logits of the k x k parts, row by row: whether a location belongs to that part of an object.
        size: Height and width of the input.
        inside: Which locations of each level belong to each image; empty if all do.
    """

    scores: tuple[Float[Tensor, "b 1 _h _w"], ...]
    maps: tuple[Float[Tensor, "b p _h _w"], ...]
    size: tuple[int, int]
    inside: tuple[Bool[Tensor, "b 1 _h _w"], ...] = ()


# ---- network ---------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """The two branches, applied to every level of a pyramid.

    Args:
        backbone: The backbone.
        parts: Parts k of a window, along each axis.
        width: Hidden channels of both branches.
        scales: Pixels of each level per pixel of the input.
    """

    def __init__(self, backbone: nn.Module, parts: int, width: int, scales: Sequence[float]):
        super().__init__()
        self.scales = tuple(scales)
        channels = levels_of(backbone).channels
        self.backbone = backbone
        self.part_hidden = ConvNorm(channels[-1], width, 1, relu=True)
        self.part_maps = nn.Conv2d(width, parts**2, 3, padding=1)
        self.score_hidden = ConvNorm(channels[-1], width, 3, relu=True)
        self.score = nn.Conv2d(width, 1, 1)
        for layer in (self.part_maps, self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, images: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Raw:
        """Computes the raw output.

        Args:
            images: The images.
            sizes: Height and width of each image, on the host; None if every image fills the batch.
        """
        outputs, inside = pyramid(
            images, sizes, self.scales, lambda image, scale: resized(image, scale, corners=False), self._level,
            (0.0, PAD), shares_norms(self),
        )  # fmt: skip
        scores, maps = zip(*outputs, strict=True)
        return Raw(scores, maps, (images.shape[-2], images.shape[-1]), inside)

    def _level(self, level: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b 1 _h _w"], Float[Tensor, "b p _h _w"]]:
        x = self.backbone(level)[-1]
        maps = self.part_maps(self.part_hidden(x))
        return self.score(self.score_hidden(x)), maps


# ---- assembling ------------------------------------------------------------------------------------------------------


def assemble(
    maps: Float[Tensor, "b p h w"], parts: int, side: int, bins: Bins = "nearest", pad: float = PAD
) -> Float[Tensor, "b v v h w"]:
    """Assembles the masks of all windows of `side` x `side` cells from score maps.

    Cell (i, j) of the window around (y, x) is copied from the map of its part, at (y + i - side // 2, x + j - side //
    2). In terms of TensorMask, the maps are an *aligned* tensor of k x k cells and this is `up_align2nat` with the
    factor side / k, with nearest instead of bilinear interpolation (arXiv 1903.12174, figure 6d).

    Args:
        maps: Score maps, p = k * k.
        parts: Parts k of a window, along each axis.
        side: Cells of a window, along each axis.
        bins: The part of a cell if k does not divide the side: "nearest", by the centre of the cell (21 cells in 5
            parts: 4 4 5 4 4), or "floor", by its upper edge (5 4 4 4 4). No description of the paper says which was
            used.
        pad: Value outside of the maps.
    """
    return up_align2nat(part_tensor(maps, parts, side), side / parts, pad, bins).values


def part_tensor(maps: Float[Tensor, "b p h w"], parts: int, side: int, cell: float = 1.0) -> MaskTensor:
    """The score maps as an aligned tensor whose k x k cells span a window of `side` locations of `cell` pixels."""
    return MaskTensor(maps.unflatten(1, (parts, parts)), True, cell, cell * side / parts)


# ---- system ----------------------------------------------------------------------------------------------------------


class InstanceFCN(SlidingSystem):
    """InstanceFCN; see the docstring of the module."""

    dense: Dense

    name = "instancefcn"
    card = Card(
        title="InstanceFCN",
        paper="Dai, He, Li, Ren, Sun: Instance-sensitive Fully Convolutional Networks. ECCV 2016",
        arxiv="1603.08678",
        code="none known",
        code_licence="",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        f"{name}.": f"dense.{name}." for name in ("backbone", "part_hidden", "part_maps", "score_hidden", "score")
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        parts: int = 5,
        side: int = 21,
        bins: Bins = "nearest",
        head_width: int = 512,
        scales: Sequence[float] = tuple(1.5**n for n in range(-4, 2)),
        assignment: AssignmentLike = ASSIGNMENT,
    ):
        """
        Args:
            classes: The name of the only class.
            backbone: The backbone, which ends at stride 8; the last stage of a VGG is dilated.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input.
            parts: Parts k of a window, along each axis.
            side: Side of a window in locations of stride 8, an odd number: 21 is 168 pixels.
            bins: The part of a cell, see `assemble`.
            head_width: Hidden channels of both branches.
            scales: Pixels of each level of the pyramid per pixel of the input.
            assignment: Which windows are positive and negative. At most `sampled` windows of an image are sampled for
                the losses, half of them positive if there are as many. Scales 1.5 apart leave no gap from `octaves` 0.3
                on.
        """
        if side % 2 == 0 or side < 1:
            raise UsageError(f"{self.name}: side must be an odd number, because windows are centred, got {side}")
        if not 0 < parts <= side:
            raise UsageError(f"{self.name}: parts must be between 1 and side = {side}, got {parts}")
        spec, rules = Backbone.read(backbone, BACKBONE), Assignment.read(assignment, ASSIGNMENT)
        preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        super().__init__(classes, rules, scales, STRIDE, side * STRIDE, preprocess)
        self.parts, self.side = parts, side
        self.bins: Bins = bins
        self.dense = Dense(spec.build(in_channels, Use(deepest=STRIDE)), parts, head_width, self.scales)

    def windows(self, raw: Raw) -> Windows:
        """The windows; each is centred on the centre of its location."""
        return lay_windows(raw.scores, self.scales, STRIDE, self.window, first=STRIDE / 2)

    def mask_tensor(self, raw: Raw, level: int) -> MaskTensor:
        """The score maps of a level as an aligned tensor, in pixels of the input."""
        return part_tensor(raw.maps[level], self.parts, self.side, STRIDE / self.scales[level])

    def window_masks(self, raw: Raw, image: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """Assembles the mask logits of windows (level, y, x) of one image, see `assemble`."""
        parts, order = [raw.maps[0].new_zeros(0, self.side, self.side)], []
        for level in range(len(raw.maps)):
            rows = (places[:, 0] == level).nonzero().flatten()
            chosen = functional.pad(places[rows][:, 1:], (1, 0), value=image)
            tensor, factor = self.mask_tensor(raw, level), self.side / self.parts
            parts.append(swap_windows(tensor, factor, chosen, mode=self.bins, subsampled=False))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses.

        The paper sums both over windows and does not say what the sum over masks is divided by, or whether negative
        windows have one; this follows FCIS, its successor.

        Returns:
            `score`: mean cross entropy of the sampled windows. `mask`: mean cross entropy of the pixels of the masks of
            positive ones. Crowd regions are ignored.
        """
        device = raw.scores[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1)  # (B, N)
        assigned = self.assigned(raw, targets, windows)
        chosen = [sample(a.positive, a.negative, self.assignment.sampled, 0.5) for a in assigned]
        counts = scores.new_tensor([sum(len(p) + len(n) for p, n in chosen), sum(len(p) for p, _ in chosen)])
        of_windows, of_masks = global_mean_count(counts)
        score = scores.sum() * 0
        mask = sum((m.sum() for m in raw.maps), score) * 0
        for image, ((positive, negative), own, target) in enumerate(zip(chosen, assigned, targets, strict=True)):
            score = score + functional.softplus(-scores[image, positive]).sum()
            score = score + functional.softplus(scores[image, negative]).sum()
            if not len(positive):
                continue
            assert target.masks is not None  # `System.needs`
            logits = self.window_masks(raw, image, windows.places[positive]).float()
            truth = mask_targets(target.masks, own.owners[positive], windows.boxes[positive], self.side)
            cross = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
            mask = mask + cross.mean((1, 2)).sum()
        return {"score": score / of_windows, "mask": mask / of_masks}

    # ---- decoding ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float | None = 0.8,
        detections: int = 300,
        mask_threshold: float = 0.5,
        candidates: int = 4000,
    ) -> list[Instances]:
        """Converts the windows of highest score of all levels to objects.

        Args:
            raw: The raw output.
            placements: How each image was placed in the network's input.
            score_threshold: Lowest score of an object.
            nms_threshold: IoU of the bounding boxes of masks above which the object of lower score is removed; None for
                no suppression.
            detections: Maximum number of objects of an image.
            mask_threshold: Probability above which a pixel belongs to a mask.
            candidates: Number of windows that are kept before suppression.
        """
        return self.proposals(
            raw, placements, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
            mask_threshold=mask_threshold, candidates=candidates, rule="continuous",
        )  # fmt: skip

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        dense = self.dense
        return {
            "backbone": [dense.backbone], "mask": [dense.part_hidden, dense.part_maps],
            "score": [dense.score_hidden, dense.score],
        }  # fmt: skip

    # ---- presets -------------------------------------------------------------------------------------------------

    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"instancefcn-vgg16-k{k}": Preset(
                {"backbone": {"name": "vgg16", "norm": "none"}, "parts": k},
                tuple(
                    Score(value, f"mask AR@{n}", protocol, "third-party note of the paper")
                    for protocol, scores in published.items()
                    for n, value in zip((10, 100, 1000), scores, strict=True)
                ),
                note="initialised with ImageNet weights of VGG-16; no weights were published",
            )
            for k, published in {
                3: {"VOC 2012 val": (38.3, 49.2, 52.1)},
                5: {
                    "VOC 2012 val": (38.9, 49.7, 52.6), "COCO 2014, first 5000 images of val": (16.6, 31.7, 39.2),
                },
                7: {"VOC 2012 val": (38.8, 49.7, 52.7)},
            }.items()
        },
        "instancefcn-small": Preset(
            {
                "backbone": "resnet18", "parts": 5, "side": 11, "head_width": 64,
                "assignment": {"shift": 8.0, "margin": 16.0}, "scales": (0.6, 0.9, 1.35, 2.0),
                "resize": {"short": 192, "long": 320},
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Published: one of the six scales per image and step; here all of them at every step.
        "instancefcn": {
            "steps": 40_000, "batch": 8, "lr": 1e-3, "milestones": (0.8,), "weight_decay": 5e-4, "warmup": 0,
            "decay_biases": True, "augment": {"flip": 0.5},
        },
    }  # fmt: skip
