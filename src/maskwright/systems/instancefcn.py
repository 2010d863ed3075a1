"""InstanceFCN: Instance-sensitive Fully Convolutional Networks (Dai, He, Li, Ren, Sun, ECCV 2016, arXiv 1603.08678).

No layer knows how large a mask is. The network paints k x k score maps over the image, one for each part of an
object: is this pixel the upper left part of some object, the upper middle, ...? A window's mask is put together by
copying: each of its k x k parts is cut from the map of that part. Neighbouring windows so share what they say of a
pixel. A second branch scores the windows. All of this at every place of every level of a pyramid of resized images;
objects have no class.

There is no official code. What a description of the paper leaves open is said where it is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.sliding import (
    Windows,
    assign,
    checked_scales,
    inputs_of,
    logit_of,
    own_places,
    proposals,
    pyramid,
    reachable,
    resized,
    shares_norms,
    windows_of,
)
from maskwright.blocks.trunk import make_stem, normalization_for
from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.matching import sample
from maskwright.ops.window_tensors import PAD, MaskTensor, swap_windows, up_align2nat
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.systems.base import Card, Preset, ProposalSystem, Score

STRIDE = 8
Bins = Literal["nearest", "floor"]


@dataclass(frozen=True)
class Raw:
    """What the network says of every place of every level."""

    scores: tuple[Float[Tensor, "b 1 _h _w"], ...]  # logits: is there an object in the window around this place
    maps: tuple[Float[Tensor, "b p _h _w"], ...]  # logits: is this place such a part of an object; k x k, row by row
    size: tuple[int, int]  # H, W of the input
    there: tuple[Bool[Tensor, "b 1 _h _w"], ...] = ()  # which places a smaller image of a batch has; none said: all


def assemble(
    maps: Float[Tensor, "b p h w"], parts: int, side: int, bins: Bins = "nearest", pad: float = PAD
) -> Float[Tensor, "b v v h w"]:
    """The masks of all windows of `side` x `side` cells: cell (i, j) of the window around (y, x) is copied from the map
    of its part, at (y + i - side // 2, x + j - side // 2); `pad` where that lies outside.

    In TensorMask's words the maps are an *aligned* tensor of k x k cells, and this is `up_align2nat` with the factor
    side / k, by the nearest cell instead of bilinearly (arXiv 1903.12174, figure 6d).

    bins  which part a cell belongs to, where k does not divide the side: "nearest", by the cell's middle (21 cells in
          5 parts: 4 4 5 4 4); "floor", by its upper edge (5 4 4 4 4). No description of the paper says which it was
    """
    return up_align2nat(part_tensor(maps, parts, side), side / parts, pad, bins).values


def part_tensor(maps: Float[Tensor, "b p h w"], parts: int, side: int, cell: float = 1.0) -> MaskTensor:
    """The score maps as an aligned tensor whose k x k cells span a window of `side` places, each `cell` pixels."""
    return MaskTensor(maps.unflatten(1, (parts, parts)), True, cell, cell * side / parts)


class InstanceFCN(ProposalSystem):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `mask_threshold`,
    `candidates`."""

    name = "instancefcn"
    sees_padding = True
    card = Card(
        title="InstanceFCN",
        paper="Dai, He, Li, Ren, Sun: Instance-sensitive Fully Convolutional Networks. ECCV 2016",
        arxiv="1603.08678",
        code="none known",
        code_licence="",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "vgg16",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        parts: int = 5,
        side: int = 21,
        bins: Bins = "nearest",
        head_width: int = 512,
        canonical: float | None = None,
        scales: Sequence[float] = tuple(1.5**n for n in range(-4, 2)),
        shift: float = 16.0,
        margin: float = 32.0,
        octaves: float = 0.5,
        sampled: int = 256,
        short: int = 600,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone ... frozen  the trunk at stride 8, see `blocks.trunk.make_stem`; VGG's last stage is dilated
        parts, side   k; and the window's side in places of stride 8, an odd number: 21 is 168 pixels
        bins          which part a cell belongs to, see `assemble`
        canonical     longer side of an object that fits a window, in pixels of its level; None: 128 / 224 of the window
        scales        of the pyramid: pixels of a level per pixel of the input, whose short side is `short`
        shift, margin a window is positive whose object's centre is at most `shift` pixels away, negative where none is
                      within `margin`
        octaves       and whose longer side is within 2 ** octaves of `canonical`; scales 1.5 apart leave no gap at 0.3
        sampled       windows of an image that learn, half of them positive where there are as many
        """
        super().__init__()
        if side % 2 == 0 or not 0 < parts <= side:
            raise UsageError(
                f"a window is centred on a place: side is {side}, parts {parts}; expected an odd side >= parts"
            )
        if bins not in ("nearest", "floor"):
            raise UsageError(f"bins is {bins!r}; expected nearest or floor")
        self.classes = self.checked_classes(classes)
        self.parts, self.side = parts, side
        self.bins: Bins = bins
        self.canonical = float(canonical or math.ceil(side * STRIDE * 128 / 224))
        self.scales = checked_scales(scales)
        self.shift, self.margin, self.octaves, self.sampled = shift, margin, octaves, sampled

        self.backbone, channels = make_stem(
            backbone, STRIDE, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, norm=norm,
            norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        self.part_hidden = ConvNorm(channels, head_width, 1, relu=True)
        self.part_maps = nn.Conv2d(head_width, parts**2, 3, padding=1)
        self.score_hidden = ConvNorm(channels, head_width, 3, relu=True)
        self.score = nn.Conv2d(head_width, 1, 1)
        for layer in (self.part_maps, self.score):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        base = Preprocess(short=short, long=long, resample="pillow", multiple=8)
        self.preprocess = normalization_for(base, in_channels, mean, std)

    # ---- network -------------------------------------------------------------------------------------------------

    def inputs(self, images: Float[Tensor, "b c h w"], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        return inputs_of(images, sizes, self.preprocess.multiple)

    def forward(self, images: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Raw:
        found, there = pyramid(
            images, sizes, self.preprocess.multiple, self.scales,
            lambda canvas, scale: resized(canvas, scale, corners=False), self._level, (0.0, PAD),
            shares_norms(self),
        )  # fmt: skip
        scores, maps = zip(*found, strict=True)
        return Raw(scores, maps, (images.shape[-2], images.shape[-1]), there)

    def _level(self, level: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b 1 _h _w"], Float[Tensor, "b p _h _w"]]:
        x = self.backbone(level)[-1]
        maps = self.part_maps(self.part_hidden(x))
        return self.score(self.score_hidden(x)), maps

    def mask_tensor(self, raw: Raw, level: int) -> MaskTensor:
        """The score maps of a level as the aligned tensor that they are; units are pixels of the input."""
        return part_tensor(raw.maps[level], self.parts, self.side, STRIDE / self.scales[level])

    def grids_of(self, raw: Raw, image: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """Mask logits of some windows (level, y, x) of an image: `assemble` at these places alone."""
        parts, order = [raw.maps[0].new_zeros(0, self.side, self.side)], []
        for level in range(len(raw.maps)):
            rows = (places[:, 0] == level).nonzero().flatten()
            chosen = functional.pad(places[rows][:, 1:], (1, 0), value=image)
            tensor, factor = self.mask_tensor(raw, level), self.side / self.parts
            parts.append(swap_windows(tensor, factor, chosen, mode=self.bins, subsampled=False))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def windows(self, raw: Raw) -> Windows:
        """Where the windows are: each is centred on the middle of its place."""
        return windows_of(raw.scores, self.scales, STRIDE, self.side * STRIDE, first=STRIDE / 2)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`score`: cross entropy, the mean over the sampled windows; `mask`: over the pixels of the positive ones'
        masks, the mean. The text sums both over windows and does not say what the masks' sum is divided by, nor whether
        negative windows have one: here as in FCIS, its successor. Crowd is not learnt from."""
        device = raw.scores[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1)  # (B, N)
        found = [
            assign(
                windows, t, canonical=self.canonical, shift=self.shift, octaves=self.octaves, margin=self.margin, far=1
            )
            for t in targets
        ]
        there = [own_places(raw.there, n, windows) for n in range(len(targets))]
        on = [own & reachable(windows, t.image_size, STRIDE) for own, t in zip(there, targets, strict=True)]
        chosen = [
            sample(a.positive & own, a.negative & near, self.sampled, 0.5)
            for a, own, near in zip(found, there, on, strict=True)
        ]
        counts = scores.new_tensor([sum(len(p) + len(n) for p, n in chosen), sum(len(p) for p, _ in chosen)])
        of_windows, of_masks = global_mean_count(counts)
        score = scores.sum() * 0
        mask = sum((m.sum() for m in raw.maps), score) * 0
        for image, ((positive, negative), own, target) in enumerate(zip(chosen, found, targets, strict=True)):
            score = score + functional.softplus(-scores[image, positive]).sum()
            score = score + functional.softplus(scores[image, negative]).sum()
            if not len(positive):
                continue
            if target.masks is None:
                raise UsageError("a target has boxes but no masks; this system learns masks")
            logits = self.grids_of(raw, image, windows.places[positive]).float()
            truth = mask_targets(target.masks, own.owners[positive], windows.boxes[positive], self.side)
            cross = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
            mask = mask + cross.mean((1, 2)).sum()
        return {"score": score / of_windows, "mask": mask / of_masks}

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.0,
        nms_threshold: float = 0.8,
        detections: int = 300,
        mask_threshold: float = 0.5,
        candidates: int = 4000,
    ) -> list[Instances]:
        """Suppression by the tight boxes of the masks. `candidates`: best windows of an image that are looked at."""
        windows = self.windows(raw)
        scores = torch.cat([s.flatten(1).float() for s in raw.scores], 1).sigmoid()
        level = logit_of(mask_threshold)
        found = []
        for image, placement in enumerate(placements):
            there = own_places(raw.there, image, windows) & reachable(windows, placement.size, STRIDE)
            own = torch.where(there, scores[image], -1.0)
            found.append(
                proposals(
                    own, windows, lambda rows, n=image: self.grids_of(raw, n, windows.places[rows]) - level,
                    placement, score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
                    candidates=candidates, rule="continuous",
                )
            )  # fmt: skip
        return found

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            "backbone": [self.backbone], "mask": [self.part_hidden, self.part_maps],
            "score": [self.score_hidden, self.score],
        }  # fmt: skip

    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"instancefcn-vgg16-k{k}": Preset(
                {"norm": "none", "parts": k},
                tuple(
                    Score(value, f"mask AR@{n}", protocol, "third-party note of the paper")
                    for protocol, scores in published.items()
                    for n, value in zip((10, 100, 1000), scores, strict=True)
                ),
                note="ImageNet weights of VGG-16 to begin with; no weights were published",
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
                "backbone": "resnet18", "parts": 5, "side": 11, "head_width": 64, "shift": 8.0, "margin": 16.0,
                "scales": (0.6, 0.9, 1.35, 2.0), "short": 192, "long": 320,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Published: one of the six scales per image and step; here all of them at each.
        "instancefcn": {
            "steps": 40_000, "batch": 8, "lr": 1e-3, "milestones": (0.8,), "weight_decay": 5e-4, "warmup": 0,
            "decay_biases": True, "augment": {"flip": 0.5},
        },
    }  # fmt: skip
