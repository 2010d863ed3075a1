"""TensorMask: A Foundation for Dense Object Segmentation (Chen, Girshick, He, Dollár, ICCV 2019, arXiv 1903.12174).

A window of several sizes stands at every place of a feature pyramid, and for each the network says a class, a box and
a whole mask: no crop, no second stage. The masks form a 4-D tensor (V, U, H, W) of two spatial domains, and the paper
asks in which representation a network should predict it. *Natural*: the channels of a place are the mask of the window
there. *Aligned*: they are what every window that covers this place says of it, so that features and what they predict
lie at one point. In the *tensor bipyramid* the finer the mask, the coarser the grid: (2^k V, 2^k U, H / 2^k, W / 2^k),
up to 480 x 480 for the largest windows, made from coarse aligned predictions on the finest level by `swap_align2nat`.

Masks are made only where they are needed, for the windows that learn and for those that survive scoring: the dense
tensor never exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.resnet import StrideIn
from maskwright.blocks.rpn import Anchors
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import smooth_l1_sum
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.paste import paste_masks
from maskwright.ops.window_tensors import (
    MaskTensor,
    Mode,
    align2nat,
    swap_align2nat,
    swap_windows,
    up_align2nat,
    upsample,
)  # fmt: skip
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.base import Ablation, Card, ClassRows, Preset, Score, System

FINEST = 4  # pixels: stride of the first level, and the unit of its masks
STRIDES = (4, 8, 16, 32, 64, 128)
BOX_WEIGHTS = (1.5, 1.5, 0.75, 0.75)


@dataclass(frozen=True)
class Raw:
    """What the network says of every window but its mask, and the features that masks are made of."""

    logits: tuple[Float[Tensor, "b a _h _w"], ...]  # K per window size, window by window
    deltas: tuple[Float[Tensor, "b d _h _w"], ...]  # 4 per window size; () without a box head
    masks: tuple[Float[Tensor, "b c _h _w"], ...]  # the mask tower on each level
    size: tuple[int, int]  # H, W of the input


@dataclass(frozen=True)
class Assigned:
    """The windows that learn from an object: where they are in the list of all windows, and which object it is."""

    windows: Int[Tensor, " p"]
    owners: Int[Tensor, " p"]


class TensorMask(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `mask_threshold`,
    `candidates`."""

    name = "tensormask"
    card = Card(
        title="TensorMask",
        paper="Chen, Girshick, He, Dollár: TensorMask: A Foundation for Dense Object Segmentation. ICCV 2019",
        arxiv="1903.12174",
        code="facebookresearch/detectron2, projects/TensorMask",
        code_licence="Apache-2.0",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int = 64,
        stride_in: StrideIn = "3x3",
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        neck_width: int = 256,
        convs: int = 4,
        class_width: int = 256,
        box_width: int = 128,
        mask_width: int = 128,
        boxes: bool = True,
        windows: Sequence[int] = (11, 15),
        bipyramid: bool = True,
        aligned: bool = True,
        factor: float = 1.0,
        mode: Mode = "bilinear",
        rule: str = "code",
        short: int = 800,
        long: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone ... frozen   the trunk, see `blocks.trunk.make_trunk`
        convs        3 x 3 convolutions in each of the towers for class, box and mask
        boxes        a head for boxes; without one they are those of the masks (section 5, table 3's note: -0.4 AP)
        windows      sizes of the windows in cells of 4 pixels on the first level; they double from level to level
        bipyramid    masks on a tensor bipyramid (section 4.2); otherwise V x U at every level
        aligned      what the last layer predicts is in aligned representation (figure 6b, 6d), else natural (6a, 6c)
        factor       without a bipyramid: masks are predicted so many times coarser, then upsampled (figure 6c, 6d)
        mode         how they are upsampled (table 2b), those of a bipyramid too
        rule         which windows learn from an object: as the published code has it or as the paper says, see
                     `assign`
        short, long, mean, std   preprocessing
        """
        super().__init__()
        if bipyramid and (not aligned or factor != 1):
            raise UsageError("a bipyramid is predicted in aligned representation and has a factor of its own per level")
        if rule not in ("code", "paper"):
            raise UsageError(f"rule is {rule!r}; expected code or paper")
        if not windows or min(windows) < 1:
            raise UsageError(f"windows is {tuple(windows)}; expected at least one size, each of 1 cell or more")
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"factor is {factor}; expected a number above 0: 1 predicts masks as fine as they are")
        if convs < 1:
            raise UsageError(f"convs is {convs}; each tower has at least 1")
        self.classes = tuple(classes)
        self.windows = tuple(windows)
        self.bipyramid, self.aligned, self.factor, self.rule = bipyramid, aligned, factor, rule
        self.mode: Mode = mode
        for side in self.windows:
            if abs(side / factor - round(side / factor)) > 1e-6 or round(side / factor) < 1:
                raise UsageError(f"a window of {side} cells cannot be predicted {factor:g} times coarser")

        self.backbone, channels = make_trunk(
            backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width, stride_in=stride_in,
            norm=norm, norm_eps=norm_eps, frozen=frozen,
        )  # fmt: skip
        self.neck = FPN(channels, neck_width, extra="input", relu="between", merge="mean")
        sizes = len(self.windows)
        self.class_tower = _tower(neck_width, class_width, convs)
        self.logits = nn.Conv2d(class_width, sizes * len(self.classes), 3, padding=1)
        self.box_tower = _tower(neck_width, box_width, convs) if boxes else None
        self.deltas = nn.Conv2d(box_width, sizes * 4, 3, padding=1) if boxes else None
        self.mask_tower = _tower(neck_width, mask_width, convs)
        self.mask_fuse = ConvNorm(mask_width, mask_width, 3, relu=True) if bipyramid else None
        self.mask_outputs = nn.ModuleList(nn.Conv2d(mask_width, round(side / factor) ** 2, 1) for side in self.windows)
        for layer in (self.logits, self.deltas, self.mask_fuse and self.mask_fuse.conv, *self.mask_outputs):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.constant_(self.logits.bias, -4.595)  # pyright: ignore[reportArgumentType] - a score of 0.01
        self.anchors = Anchors(
            [[side * FINEST * 2**level for side in self.windows] for level in range(len(STRIDES))], STRIDES, (1.0,)
        )
        self.preprocess = normalization_for(
            Preprocess(
                short=short, long=long, resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0),
                divide=1.0, channels="BGR",
            ), in_channels, mean, std,
        )  # fmt: skip

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        levels = self.neck(self.backbone(images))  # strides 4 ... 128
        logits = tuple(self.logits(self.class_tower(x)) for x in levels)
        deltas = ()
        if self.box_tower is not None and self.deltas is not None:
            deltas = tuple(self.deltas(self.box_tower(x)) for x in levels)
        masks = tuple(self.mask_tower(x) for x in levels)
        return Raw(logits, deltas, masks, (images.shape[-2], images.shape[-1]))

    def mask_tensors(self, raw: Raw, level: int, sizes: Iterable[int] | None = None) -> list[MaskTensor]:
        """What is predicted of the masks of one level, per window size (of some, if given): aligned or natural, before
        any change of coordinates or size. A bipyramid predicts every level on the grid of the finest."""
        x, cell = raw.masks[level], STRIDES[level]
        if self.mask_fuse is not None:
            finest = raw.masks[0]
            if level:
                x = functional.interpolate(x, scale_factor=2.0**level, mode="bilinear", align_corners=False)
                x = x[..., : finest.shape[-2], : finest.shape[-1]]
            x = self.mask_fuse(x + finest)  # as coded, the finest level is added to itself
            cell = FINEST
        result = []
        for size in range(len(self.windows)) if sizes is None else sizes:
            few = round(self.windows[size] / self.factor)
            values = self.mask_outputs[size](x)
            values = values.unflatten(1, (few, few))
            step = FINEST * 2**level * self.factor  # a window spans as many pixels whatever it is predicted on
            result.append(MaskTensor(values, self.aligned, float(cell), float(step)))
        return result

    def whole_masks(self, raw: Raw, level: int) -> list[Float[Tensor, "b v u _h _w"]]:
        """The dense natural tensors of one level, per window size: what the paper describes. Large: each level of a
        bipyramid holds V U H W values."""
        result = []
        for tensor in self.mask_tensors(raw, level):
            if self.bipyramid:
                result.append(swap_align2nat(tensor, 2**level, mode=self.mode).values)
            elif self.factor != 1:
                grown = up_align2nat(tensor, self.factor, mode=self.mode) if self.aligned else None
                result.append((grown or upsample(tensor, self.factor, self.mode)).values)
            else:
                result.append(align2nat(tensor).values if self.aligned else tensor.values)
        return result

    def masks_of(self, raw: Raw, windows: Int[Tensor, "p 5"]) -> list[tuple[Tensor, Float[Tensor, "_k _v _v"]]]:
        """Mask logits of some windows, rows of (image, level, y, x, size): for each level and size that occurs, which
        rows they are and their V x V logits."""
        result = []
        for level in range(len(STRIDES)):
            here = [
                ((windows[:, 1] == level) & (windows[:, 4] == n)).nonzero().flatten() for n in range(len(self.windows))
            ]
            asked = [number for number, rows in enumerate(here) if len(rows)]
            for number, tensor in zip(asked, self.mask_tensors(raw, level, asked) if asked else [], strict=True):
                result.append((here[number], self._at(tensor, level, windows[here[number]][:, [0, 2, 3]])))
        return result

    def _at(self, tensor: MaskTensor, level: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        if self.aligned:
            if self.bipyramid:
                return swap_windows(tensor, 2**level, places, mode=self.mode)
            return swap_windows(tensor, self.factor, places, mode=self.mode, subsampled=False)
        image, y, x = places.unbind(1)
        values = tensor.values[image, :, :, y, x]  # (k, V / factor, U / factor)
        if self.factor == 1:
            return values
        return upsample(replace(tensor, values=values[..., None, None]), self.factor, self.mode).values[..., 0, 0]

    # ---- windows -------------------------------------------------------------------------------------------------

    def layout(self, raw: Raw) -> tuple[Float[Tensor, "n 4"], Int[Tensor, "n 4"]]:
        """All windows in the order level, row, column, size: their boxes, and (level, y, x, size) of each."""
        boxes = self.anchors(raw.logits, raw.size)
        index = []
        for level, logits in enumerate(raw.logits):
            height, width = logits.shape[-2:]
            axes = [torch.arange(n, device=logits.device) for n in (height, width, len(self.windows))]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
            index.append(functional.pad(places, (1, 0), value=level))
        return torch.cat(boxes), torch.cat(index)

    def assign(self, windows: Float[Tensor, "n 4"], levels: Int[Tensor, " n"], target: Instances) -> Assigned:
        """The windows that an object is for. All three hold: the window contains the object's box; its side suits the
        object's longer side; the centres of both are near. A window that would be for several is for none.

        "code" (detectron2): window side - stride <= max(2 * longer side, smallest window's side - smallest stride), and
        centres at most one stride of the level apart. "paper" (section 5): longer side at least half the window's, or
        the window is of the smallest; centres at most one cell of the mask apart (4 pixels with a bipyramid).
        """
        boxes = target.boxes.to(windows)
        if not len(boxes):
            none = levels.new_zeros(0)
            return Assigned(none, none)
        strides = torch.tensor(STRIDES, device=windows.device, dtype=windows.dtype)[levels]
        side = windows[:, 2] - windows[:, 0]
        low = ((boxes[None, :, :2] >= windows[:, None, :2]) & (boxes[None, :, 2:] <= windows[:, None, 2:])).all(-1)
        longest = (boxes[:, 2:] - boxes[:, :2]).amax(1)
        centres, middles = (windows[:, :2] + windows[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = (centres[:, None] - middles[None]).square().sum(-1).sqrt()
        smallest = min(self.windows) * FINEST
        if self.rule == "code":
            suits = (side - strides)[:, None] <= (2 * longest).clamp(min=smallest - FINEST)[None]
            near = distance <= strides[:, None]
        else:
            suits = (side[:, None] <= 2 * longest[None]) | (side <= smallest)[:, None]
            unit = torch.full_like(strides, FINEST) if self.bipyramid else strides
            near = distance <= unit[:, None]
        fits = low & suits & near  # (N, G)
        alone = fits.sum(1) == 1
        chosen = alone.nonzero().flatten()
        return Assigned(chosen, fits[chosen].long().argmax(1))

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class` (focal, of all windows), `box` (L1) and `mask` (cross entropy, foreground weighs 1.5, twice) of the
        windows that are for an object; each divided by their number. Crowd regions are not learnt from."""
        device = raw.logits[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        windows, places = self.layout(raw)
        assigned = [self.assign(windows, places[:, 0], t) for t in targets]
        found = sum(len(a.windows) for a in assigned)
        logits = self.rows(raw.logits, len(self.classes))  # (B, N, K)
        count = global_mean_count(logits.new_tensor(float(found)))
        truth = torch.zeros_like(logits)
        for image, (own, target) in enumerate(zip(assigned, targets, strict=True)):
            truth[image, own.windows, target.labels[own.owners]] = 1
        terms = {"class": _focal_star(logits, truth) / count}
        if raw.deltas:
            deltas = self.rows(raw.deltas, 4)
            total = deltas.sum() * 0
            for image, (own, target) in enumerate(zip(assigned, targets, strict=True)):
                goal = box_ops.encode(windows[own.windows], target.boxes[own.owners].to(windows), BOX_WEIGHTS)
                total = total + smooth_l1_sum(deltas[image, own.windows], goal, 0.0)
            terms["box"] = total / count
        return terms | {"mask": self._mask_loss(raw, windows, places, assigned, targets) / count}

    def _mask_loss(
        self, raw: Raw, windows: Tensor, places: Tensor, assigned: Sequence[Assigned], targets: Sequence[Instances]
    ) -> Tensor:
        images = torch.cat([torch.full_like(a.windows, n) for n, a in enumerate(assigned)])
        chosen = torch.cat([a.windows for a in assigned])
        rows = torch.cat([images[:, None], places[chosen]], 1)
        owners = torch.cat([a.owners for a in assigned])
        total = sum((x.sum() for x in raw.masks), raw.masks[0].new_zeros(())) * 0  # every parameter has a gradient
        unused = [p for m in (self.mask_fuse, self.mask_outputs) if m is not None for p in m.parameters()]
        total = total + sum((p.sum() for p in unused), total) * 0
        for own, logits in self.masks_of(raw, rows):
            side, weight = logits.shape[-1], logits.new_tensor(1.5)
            for image, target in enumerate(targets):
                mine = (images[own] == image).nonzero().flatten()
                if not len(mine):
                    continue
                if target.masks is None:
                    raise UsageError("a target has boxes but no masks; this system learns masks")
                truth = mask_targets(target.masks, owners[own[mine]], windows[chosen[own[mine]]], side)
                cross = functional.binary_cross_entropy_with_logits(
                    logits[mine].float(), truth, pos_weight=weight.float(), reduction="none"
                )
                total = total + 2 * cross.mean((1, 2)).sum()
        return total

    @staticmethod
    def rows(maps: Sequence[Tensor], values: int) -> Float[Tensor, "b n v"]:
        """(B, sizes * values, H, W) of each level -> (B, all windows, values), float32."""
        parts = [m.float().unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        return torch.cat(parts, 1)

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        mask_threshold: float = 0.5,
        candidates: int = 6000,
    ) -> list[Instances]:
        """`candidates`: best (window, class) pairs of an image that are looked at."""
        windows, _ = self.layout(raw)
        found = self.find(raw, score_threshold, nms_threshold, detections, candidates)
        return [
            self._on_image(raw, image, windows, *own, placement, mask_threshold)
            for image, (own, placement) in enumerate(zip(found, placements, strict=True))
        ]

    @torch.no_grad()
    def find(
        self, raw: Raw, score_threshold: float, nms_threshold: float, detections: int, candidates: int
    ) -> list[tuple[Int[Tensor, " d"], Float[Tensor, "d 4"], Float[Tensor, " d"], Int[Tensor, " d"]]]:
        """For each image the windows of what was found, boxes in the input's pixels, scores and labels, best first.
        Without a box head the boxes are the windows: three times as many are kept, for the masks to decide."""
        windows, _ = self.layout(raw)
        scores = self.rows(raw.logits, len(self.classes)).sigmoid_()
        deltas = self.rows(raw.deltas, 4) if raw.deltas else None
        result = []
        for image, own in enumerate(scores):
            window, label = (own > score_threshold).nonzero().unbind(1)
            best, rows = own[window, label].topk(min(candidates, len(window)))
            window, label = window[rows], label[rows]
            boxes = windows[window]
            if deltas is not None:
                boxes = box_ops.decode(boxes, deltas[image, window], BOX_WEIGHTS)
            kept = box_ops.nms(boxes, best, label, nms_threshold if deltas is not None else 0.7)
            kept = kept[: detections if deltas is not None else 3 * detections]
            result.append((window[kept], boxes[kept], best[kept], label[kept]))
        if deltas is None:
            result = [self._by_masks(raw, n, windows, own, nms_threshold, detections) for n, own in enumerate(result)]
        return result

    def _by_masks(
        self, raw: Raw, image: int, windows: Tensor, found: tuple[Tensor, ...], threshold: float, detections: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The boxes of the masks instead of the windows; what has none is gone, and duplicates are suppressed."""
        chosen, boxes, scores, labels = found
        boxes = boxes.clone()
        for rows, logits in self.masks_of(raw, self._places(raw, image, chosen)):
            hits = logits > 0
            tight = Masks.from_dense(hits).boxes().to(boxes)
            own = windows[chosen[rows]]
            scale = ((own[:, 2:] - own[:, :2]) / logits.shape[-1]).repeat(1, 2)
            boxes[rows] = own[:, :2].repeat(1, 2) + tight * scale
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        chosen, boxes, scores, labels = chosen[solid], boxes[solid], scores[solid], labels[solid]
        kept = box_ops.nms(boxes, scores, labels, threshold, detections)
        return chosen[kept], boxes[kept], scores[kept], labels[kept]

    def _places(self, raw: Raw, image: int, chosen: Tensor) -> Int[Tensor, "k 5"]:
        _, places = self.layout(raw)
        return functional.pad(places[chosen], (1, 0), value=image)

    def _on_image(
        self, raw: Raw, image: int, windows: Tensor, chosen: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor,
        placement: Placement, threshold: float,
    ) -> Instances:  # fmt: skip
        """A mask is pasted into its window, which may reach beyond the image, not into its box."""
        size = placement.image_size
        boxes = box_ops.clip(placement.boxes_to_image(boxes), size)
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        chosen, boxes, scores, labels = chosen[solid], boxes[solid], scores[solid], labels[solid]
        parts, order = [Masks.empty(size)], []
        for rows, logits in self.masks_of(raw, self._places(raw, image, chosen)):
            grids = logits.float().sigmoid()
            grids = grids.flip(-1) if placement.mirrored else grids
            frames = placement.boxes_to_image(windows[chosen[rows]])
            parts.append(paste_masks(grids, frames, size, threshold=threshold))
            order.append(rows)
        masks = Masks.join(parts)
        if order:
            masks = masks[torch.cat(order).argsort().cpu()]
        return Instances(size, boxes, labels, masks, scores)

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        heads = [
            self.class_tower, self.logits, self.box_tower, self.deltas, self.mask_tower, self.mask_fuse,
            self.mask_outputs,
        ]  # fmt: skip
        return {"backbone": [self.backbone], "neck": [self.neck], "heads": [m for m in heads if m is not None]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"logits.{kind}": ClassRows(repeats=len(self.windows)) for kind in ("weight", "bias")}

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _README = "detectron2, projects/TensorMask/README.md"
    _HOW = "COCO val2017, short side 800, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "tensormask-r50": Preset(
            _PUBLISHED,
            (Score(41.4, "box AP", _HOW, _README), Score(35.8, "mask AP", _HOW, _README)),
            "bipyramid, two windows; figures of the 6x schedule (1x: 37.6 / 32.4)",
        ),
        "tensormask-r101": Preset(
            {**_PUBLISHED, "backbone": "resnet101"},
            (Score(37.1, "mask AP", "COCO test-dev, short side 800", "the paper, table 3, first version"),),
            "no weights were published",
        ),
        "tensormask-r50-one-window": Preset(
            {**_PUBLISHED, "windows": (15,)},
            (Score(33.8, "mask AP", _HOW, "the paper, table 2d"),),
            "table 2d, first row; no weights were published",
        ),
        "tensormask-r50-pyramid": Preset(
            {**_PUBLISHED, "windows": (15,), "bipyramid": False, "factor": 1.5},
            (Score(29.7, "mask AP", _HOW, "the paper, table 2c"),),
            "the best head without a bipyramid: upscale aligned, factor 1.5 (table 2a); no weights were published",
        ),
        "tensormask-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "class_width": 128, "box_width": 64, "mask_width": 64,
                "convs": 2, "windows": (7, 11), "short": 320, "long": 512,
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tensormask-1x": {
            "steps": 90_000, "short": (800,), "long": 1333, "decay_biases": True, "augment": {"flip": 0.5},
        },
        "tensormask-6x": {
            "steps": 540_000, "milestones": (480 / 540, 520 / 540), "short": tuple(range(640, 801, 32)), "long": 1333,
            "decay_biases": True, "augment": {"flip": 0.5, "sampling": "range"},
        },
    }  # fmt: skip
    # Small enough for a CPU, and large smooth shapes beside small ones, so that upsampled masks matter.
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": "resnet18", "stem_width": 32, "neck_width": 64, "class_width": 64, "box_width": 64,
        "mask_width": 64, "convs": 2, "windows": (15,), "bipyramid": False, "short": 128, "long": 128,
    }  # fmt: skip
    _SCENES: ClassVar[dict[str, Any]] = {"size": (128, 128), "classes": ("disc", "star", "heart"), "difficulty": 0.3}
    _TRAINED: ClassVar[dict[str, Any]] = {"lr": 1e-3, "warmup": 50, "ema": 0.99, "weight_decay": 1e-4}
    _VAL = "COCO val2017, R50-FPN, 72 epochs, mask AP"
    ablations: ClassVar[Mapping[str, Ablation]] = {
        "2a": Ablation(
            "natural or aligned heads that predict masks 1.5, 3 and 5 times coarser",
            {
                f"{kind} {factor:g}": {"factor": factor, "aligned": kind == "aligned"}
                for factor in (1.5, 3.0, 5.0) for kind in ("natural", "aligned")
            },
            {
                "natural 1.5": {"AP": 28.8, "AP50": 52.0, "AP75": 28.9},
                "aligned 1.5": {"AP": 29.7, "AP50": 52.5, "AP75": 30.6},
                "natural 3": {"AP": 25.4, "AP50": 48.8, "AP75": 23.7},
                "aligned 3": {"AP": 29.5, "AP50": 52.2, "AP75": 30.3},
                "natural 5": {"AP": 13.5, "AP50": 33.9, "AP75": 9.0},
                "aligned 5": {"AP": 29.1, "AP50": 52.1, "AP75": 29.8},
            },
            _VAL, _ABLATED, _SCENES, _TRAINED,
        ),
        "2b": Ablation(
            "how aligned heads upsample: nearest or bilinear",
            {
                f"{mode} {factor:g}": {"factor": factor, "mode": mode}
                for factor in (1.5, 3.0, 5.0) for mode in ("nearest", "bilinear")
            },
            {
                "nearest 1.5": {"AP": 29.4, "AP50": 52.4, "AP75": 30.1},
                "bilinear 1.5": {"AP": 29.7, "AP50": 52.5, "AP75": 30.6},
                "nearest 3": {"AP": 28.5, "AP50": 51.3, "AP75": 28.8},
                "bilinear 3": {"AP": 29.5, "AP50": 52.2, "AP75": 30.3},
                "nearest 5": {"AP": 25.9, "AP50": 47.8, "AP75": 25.6},
                "bilinear 5": {"AP": 29.1, "AP50": 52.1, "AP75": 29.8},
            },
            _VAL, _ABLATED, _SCENES, _TRAINED,
        ),
        "2c": Ablation(
            "a feature pyramid with the best head of 2a, or a tensor bipyramid",
            {"feature pyramid": {"factor": 1.5}, "tensor bipyramid": {"bipyramid": True}},
            {
                "feature pyramid": {"AP": 29.7, "AP50": 52.5, "AP75": 30.6, "S": 15.1, "M": 32.2, "L": 40.7},
                "tensor bipyramid": {"AP": 33.8, "AP50": 54.8, "AP75": 35.8, "S": 16.1, "M": 36.3, "L": 47.7},
            },
            _VAL, _ABLATED, _SCENES, _TRAINED,
        ),
        "2d": Ablation(
            "one window size or two, on a tensor bipyramid",
            {"15": {"bipyramid": True}, "15 and 11": {"bipyramid": True, "windows": (11, 15)}},
            {
                "15": {"AP": 33.8, "AP50": 54.8, "AP75": 35.8, "S": 16.1, "M": 36.3, "L": 47.7},
                "15 and 11": {"AP": 35.4, "AP50": 56.5, "AP75": 37.5, "S": 16.4, "M": 37.9, "L": 50.0},
            },
            _VAL, _ABLATED, _SCENES, _TRAINED,
        ),
    }  # fmt: skip


def _tower(channels: int, width: int, convs: int) -> nn.Sequential:
    layers = [ConvNorm(channels if n == 0 else width, width, 3, relu=True) for n in range(convs)]
    for layer in layers:
        nn.init.normal_(layer.conv.weight, std=0.01)
    return nn.Sequential(*layers)


def _focal_star(
    logits: Float[Tensor, "*n"], truth: Float[Tensor, "*n"], alpha: float = 0.3, gamma: float = 3.0
) -> Float[Tensor, ""]:
    """Sum of FL* (RetinaNet, arXiv 1708.02002, appendix A): -log sigmoid(gamma x_t) / gamma, x_t the logit of the
    truth; ones weigh alpha, zeros 1 - alpha."""
    toward = functional.logsigmoid(gamma * (2 * truth - 1) * logits)
    return -((alpha * truth + (1 - alpha) * (1 - truth)) * toward).sum() / gamma
