"""TensorMask: A Foundation for Dense Object Segmentation (Chen, Girshick, He, Dollár, ICCV 2019, arXiv 1903.12174).

At every location of a feature pyramid there are windows of several sizes, and the network predicts a class, a box and a
whole mask for each: there is no cropping and no second stage. The masks form a 4-D tensor (V, U, H, W) with two spatial
domains, and the paper asks in which representation a network should predict it. *Natural*: the channels of a location
are the mask of the window there. *Aligned*: they are the values at this location of the masks of all windows that cover
it, so that features and predictions are at the same point. In the *tensor bipyramid* finer masks are on coarser grids:
(2^k V, 2^k U, H / 2^k, W / 2^k), up to 480 x 480 for the largest windows, computed from coarse aligned predictions on
the finest level by `swap_align2nat`.

Masks are computed only for the windows that are trained and for those that remain after suppression; the dense tensor
is never constructed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import ConvNorm
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.losses import focal_star_sum, smooth_l1_sum
from maskwright.ops.mask_targets import mask_targets
from maskwright.ops.paste import paste_masks
from maskwright.ops.window_targets import Assigned, Layout, assign_windows, window_layout
from maskwright.ops.window_tensors import (
    MaskTensor,
    Mode,
    align2nat,
    swap_align2nat,
    swap_windows,
    up_align2nat,
    upsample,
)
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.system import ClassRows, System

BACKBONE = Backbone("resnet50")
RESIZE = Resize()
PREPROCESS = Preprocess(
    resample="pillow", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), divide=1.0, channels="BGR"
)
FINEST = 4  # stride of the first level in pixels, and the size of a cell of its masks
STRIDES = (4, 8, 16, 32, 64, 128)
BOX_WEIGHTS = (1.5, 1.5, 0.75, 0.75)


@dataclass(frozen=True)
class Raw:
    """The raw output: everything about the windows except their masks, and the features that masks are computed from.

    Attributes:
        logits: Class logits of each level, a = sizes * K, in the order window size, class.
        deltas: Encoded boxes of each level, d = sizes * 4; empty without a box head.
        masks: Features of the mask tower on each level.
        size: Height and width of the input, padding included.
    """

    logits: tuple[Float[Tensor, "b a _h _w"], ...]
    deltas: tuple[Float[Tensor, "b d _h _w"], ...]
    masks: tuple[Float[Tensor, "b c _h _w"], ...]
    size: tuple[int, int]


class Selected(NamedTuple):
    """The windows of one image that remain after suppression, in descending order of scores.

    Attributes:
        windows: Rows of the layout.
        boxes: In pixels of the input.
        scores: Probability of the class.
        labels: The class.
    """

    windows: Int[Tensor, " d"]
    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]

    def take(self, rows: Tensor) -> Selected:
        """The windows of some rows."""
        return Selected(self.windows[rows], self.boxes[rows], self.scores[rows], self.labels[rows])


# ---- networks --------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Backbone, feature pyramid, class and box heads, and the convolutions of the mask head.

    Args:
        backbone: The backbone.
        classes: Number of classes.
        sizes: Number of window sizes.
        neck_width: Channels of the pyramid.
        convs: 3 x 3 convolutions of each tower.
        class_width: Channels of the class tower.
        box_width: Channels of the box tower.
        mask_width: Channels of the mask tower.
        boxes: Whether there is a box head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        sizes: int,
        *,
        neck_width: int,
        convs: int,
        class_width: int,
        box_width: int,
        mask_width: int,
        boxes: bool,
    ):
        super().__init__()
        levels = levels_of(backbone)
        self.read = levels.indices((4, 8, 16, 32))
        self.backbone = backbone
        self.neck = FPN(
            [levels.channels[n] for n in self.read], neck_width, extra="input", relu="between", merge="mean"
        )
        self.class_tower = _tower(neck_width, class_width, convs)
        self.logits = _output(class_width, sizes * classes, 3, bias=-4.595)  # an initial probability of 0.01
        self.box_tower = _tower(neck_width, box_width, convs) if boxes else None
        self.deltas = _output(box_width, sizes * 4, 3) if boxes else None
        self.mask_tower = _tower(neck_width, mask_width, convs)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        levels = self.neck([features[n] for n in self.read])  # strides 4 ... 128
        logits = tuple(self.logits(self.class_tower(x)) for x in levels)
        deltas = ()
        if self.box_tower is not None and self.deltas is not None:
            deltas = tuple(self.deltas(self.box_tower(x)) for x in levels)
        masks = tuple(self.mask_tower(x) for x in levels)
        return Raw(logits, deltas, masks, (images.shape[-2], images.shape[-1]))


class MaskOutputs(nn.Module):
    """The last layers of the mask head: with `fuse` a 3 x 3 convolution, then a 1 x 1 for each window size.

    Args:
        width: Channels of the features.
        sides: Cells along a side of the predicted masks, for each window size.
        fuse: Whether there is a 3 x 3 convolution, as in a bipyramid.
    """

    def __init__(self, width: int, sides: Sequence[int], fuse: bool):
        super().__init__()
        self.sides = tuple(sides)
        self.fuse = ConvNorm(width, width, 3, relu=True) if fuse else None
        self.outputs = nn.ModuleList(_output(width, side**2, 1) for side in sides)
        if self.fuse is not None:
            nn.init.normal_(self.fuse.conv.weight, std=0.01)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b _v _v h w"], ...]:
        """Predicts the mask logits of each window size."""
        if self.fuse is not None:
            x = self.fuse(x)
        return tuple(layer(x).unflatten(1, (side, side)) for layer, side in zip(self.outputs, self.sides, strict=True))


def _tower(channels: int, width: int, convs: int) -> nn.Sequential:
    """3 x 3 convolutions with ReLU."""
    layers = [ConvNorm(channels if n == 0 else width, width, 3, relu=True) for n in range(convs)]
    for layer in layers:
        nn.init.normal_(layer.conv.weight, std=0.01)
    return nn.Sequential(*layers)


def _output(channels: int, outputs: int, kernel: int, bias: float = 0.0) -> nn.Conv2d:
    """A last convolution."""
    layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, bias)  # pyright: ignore[reportArgumentType]
    return layer


# ---- system ----------------------------------------------------------------------------------------------------------


class TensorMask(System):
    """TensorMask; see the docstring of the module."""

    name = "tensormask"
    card = Card(
        title="TensorMask",
        paper="Chen, Girshick, He, Dollár: TensorMask: A Foundation for Dense Object Segmentation. ICCV 2019",
        arxiv="1903.12174",
        code="facebookresearch/detectron2, projects/TensorMask",
        code_licence="Apache-2.0",
    )
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **{
            f"{name}.": f"dense.{name}."
            for name in ("backbone", "neck", "class_tower", "logits", "box_tower", "deltas", "mask_tower")
        },
        "mask_fuse.": "masks.fuse.",
        "mask_outputs.": "masks.outputs.",
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
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
        rule: Literal["code", "paper"] = "code",
    ):
        """
        Args:
            classes: Class names.
            backbone: The backbone. Published weights have `norm` "frozen", `frozen` 2 and `stride_in` "1x1".
            in_channels: Channels of the image.
            resize: Size and normalisation of the input.
            neck_width: Channels of the pyramid.
            convs: 3 x 3 convolutions of each of the towers for class, box and mask.
            class_width: Channels of the class tower.
            box_width: Channels of the box tower.
            mask_width: Channels of the mask tower.
            boxes: Whether there is a box head; otherwise the boxes are those of the masks (note of table 3: -0.4 AP).
            windows: Sizes of the windows on the first level, in cells of 4 pixels; they double from level to level.
            bipyramid: Whether masks form a tensor bipyramid (section 4.2); otherwise they are V x U at every level.
            aligned: Whether the last layer predicts the aligned representation (figures 6b and 6d) or the natural one
                (6a and 6c).
            factor: Without a bipyramid: masks are predicted coarser by this factor and upsampled (figures 6c and 6d).
            mode: Interpolation of the upsampling (table 2b), also in a bipyramid.
            rule: Assignment of windows to objects as in the published code or as in the paper, see `assign`.
        """
        super().__init__()
        spec = Backbone.read(backbone, BACKBONE)
        if bipyramid and (not aligned or factor != 1):
            raise UsageError(f"{self.name}: bipyramid=True requires aligned=True and factor=1")
        if not windows or min(windows) < 1:
            raise UsageError(f"{self.name}: windows must be one or more sizes of at least 1, got {list(windows)}")
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"{self.name}: factor must be a finite number above 0, got {factor}")
        if convs < 1:
            raise UsageError(f"{self.name}: convs must be at least 1, got {convs}")
        for side in windows:
            if abs(side / factor - round(side / factor)) > 1e-6 or round(side / factor) < 1:
                raise UsageError(f"{self.name}: windows must be multiples of factor {factor:g}, got {side}")
        self.classes = tuple(classes)
        self.windows = tuple(windows)
        self.bipyramid, self.aligned, self.factor = bipyramid, aligned, factor
        self.mode: Mode = mode
        self.rule: Literal["code", "paper"] = rule
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)
        self.dense = Dense(
            spec.build(in_channels), len(self.classes), len(self.windows), neck_width=neck_width, convs=convs,
            class_width=class_width, box_width=box_width, mask_width=mask_width, boxes=boxes,
        )  # fmt: skip
        self.masks = MaskOutputs(mask_width, [round(side / factor) for side in self.windows], fuse=bipyramid)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    # ---- masks ---------------------------------------------------------------------------------------------------

    def mask_tensors(self, raw: Raw, level: int) -> list[MaskTensor]:
        """Predicts the masks of one level, for each window size.

        Returns:
            Aligned or natural tensors, before any change of representation or resolution. A bipyramid predicts every
            level on the grid of the finest.
        """
        x, cell = raw.masks[level], STRIDES[level]
        if self.bipyramid:
            finest = raw.masks[0]
            if level:
                x = functional.interpolate(x, scale_factor=2.0**level, mode="bilinear", align_corners=False)
                x = x[..., : finest.shape[-2], : finest.shape[-1]]
            x = x + finest  # as in the published code, the finest level is added to itself
            cell = FINEST
        step = FINEST * 2**level * self.factor  # the extent of a window in pixels does not depend on the factor
        return [MaskTensor(values, self.aligned, float(cell), float(step)) for values in self.masks(x)]

    def whole_masks(self, raw: Raw, level: int) -> list[Float[Tensor, "b v u _h _w"]]:
        """Computes the dense natural tensors of one level, for each window size, as the paper describes them.

        Each has V U H W values; `window_masks` computes the masks of some windows only.
        """
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

    def window_masks(self, raw: Raw, windows: Int[Tensor, "p 5"]) -> list[tuple[Tensor, Float[Tensor, "_k _v _v"]]]:
        """Computes the masks of some windows.

        Args:
            raw: The raw output.
            windows: Image, level, y, x and index of the size of each window.

        Returns:
            For each level and size that occurs: rows of `windows`, and their V x V mask logits.
        """
        result = []
        for level in range(len(STRIDES)):
            here = [
                ((windows[:, 1] == level) & (windows[:, 4] == n)).nonzero().flatten() for n in range(len(self.windows))
            ]
            if any(len(rows) for rows in here):
                for rows, tensor in zip(here, self.mask_tensors(raw, level), strict=True):
                    if len(rows):
                        result.append((rows, self._at(tensor, level, windows[rows][:, [0, 2, 3]])))
        return result

    def _at(self, tensor: MaskTensor, level: int, places: Int[Tensor, "k 3"]) -> Float[Tensor, "k v v"]:
        """The masks at places (image, y, x) of one level and size."""
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

    def layout(self, raw: Raw) -> Layout:
        """The windows of the raw output."""
        shapes = [(logits.shape[-2], logits.shape[-1]) for logits in raw.logits]
        return window_layout(shapes, STRIDES, self.windows, raw.logits[0].device)

    def assign(self, layout: Layout, target: Instances) -> Assigned:
        """Assigns windows to objects; see `assign_windows`."""
        smallest = min(self.windows) * FINEST
        return assign_windows(layout, target.boxes, STRIDES, smallest, rule=self.rule, one_grid=self.bipyramid)

    @staticmethod
    def rows(maps: Sequence[Tensor], values: int) -> Float[Tensor, "b n v"]:
        """Rearranges maps (B, sizes * values, H, W) of each level to (B, windows, values), in float32."""
        parts = [m.float().unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        return torch.cat(parts, 1)

    # ---- losses --------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses (section 5), each divided by the number of positive windows.

        Returns:
            `class`: focal loss of all windows. `box`, with a box head: L1 of positive windows. `mask`: twice the binary
            cross entropy of their masks, with weight 1.5 for foreground. Crowd regions are ignored.
        """
        device = raw.logits[0].device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        layout = self.layout(raw)
        assigned = [self.assign(layout, t) for t in targets]
        logits = self.rows(raw.logits, len(self.classes))  # (B, N, K)
        count = global_mean_count(logits.new_tensor(float(sum(len(a.windows) for a in assigned))))
        truth = torch.zeros_like(logits)
        for image, (own, target) in enumerate(zip(assigned, targets, strict=True)):
            truth[image, own.windows, target.labels[own.owners]] = 1
        terms = {"class": focal_star_sum(logits, truth) / count}
        if raw.deltas:
            deltas = self.rows(raw.deltas, 4)
            total = deltas.sum() * 0
            for image, (own, target) in enumerate(zip(assigned, targets, strict=True)):
                goal = box_ops.encode(layout.boxes[own.windows], target.boxes[own.owners].to(layout.boxes), BOX_WEIGHTS)
                total = total + smooth_l1_sum(deltas[image, own.windows], goal, 0.0)
            terms["box"] = total / count
        return terms | {"mask": self._mask_loss(raw, layout, assigned, targets) / count}

    def _mask_loss(
        self, raw: Raw, layout: Layout, assigned: Sequence[Assigned], targets: Sequence[Instances]
    ) -> Tensor:
        """Sum of the mask loss over positive windows."""
        images = torch.cat([torch.full_like(a.windows, n) for n, a in enumerate(assigned)])
        chosen = torch.cat([a.windows for a in assigned])
        owners = torch.cat([a.owners for a in assigned])
        # A gradient for every parameter, whatever levels and sizes are positive: zero, from a single cell.
        idle = [*raw.masks, *self.masks(raw.masks[0][..., :1, :1])]
        total = sum((x.sum() for x in idle), raw.masks[0].new_zeros(())) * 0
        for own, logits in self.window_masks(raw, torch.cat([images[:, None], layout.places[chosen]], 1)):
            side, weight = logits.shape[-1], logits.new_tensor(1.5)
            for image, target in enumerate(targets):
                mine = (images[own] == image).nonzero().flatten()
                if not len(mine):
                    continue
                assert target.masks is not None  # `System.needs`
                truth = mask_targets(target.masks, owners[own[mine]], layout.boxes[chosen[own[mine]]], side)
                cross = functional.binary_cross_entropy_with_logits(
                    logits[mine].float(), truth, pos_weight=weight.float(), reduction="none"
                )
                total = total + 2 * cross.mean((1, 2)).sum()
        return total

    # ---- decoding ------------------------------------------------------------------------------------------------

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
        """Converts the raw output to objects.

        Args:
            raw: The raw output.
            placements: How each image was placed in the network's input.
            score_threshold: Lowest score of an object.
            nms_threshold: Box IoU above which the object of lower score is removed within a class.
            detections: Maximum number of objects of an image.
            mask_threshold: Probability from which a pixel belongs to a mask.
            candidates: Number of (window, class) pairs of an image that are kept before suppression.
        """
        layout = self.layout(raw)
        selected = self.select(raw, layout, score_threshold, nms_threshold, detections, candidates)
        return [
            self._to_instances(raw, image, layout, own, placement, mask_threshold)
            for image, (own, placement) in enumerate(zip(selected, placements, strict=True))
        ]

    @torch.no_grad()
    def select(
        self, raw: Raw, layout: Layout, score_threshold: float, nms_threshold: float, detections: int, candidates: int
    ) -> list[Selected]:
        """Selects the windows of each image.

        Without a box head the boxes are the windows; three times as many windows are kept then, and a second
        suppression uses the boxes of their masks.
        """
        scores = self.rows(raw.logits, len(self.classes)).sigmoid_()
        deltas = self.rows(raw.deltas, 4) if raw.deltas else None
        result = []
        for image, own in enumerate(scores):
            window, label = (own > score_threshold).nonzero().unbind(1)
            best, rows = own[window, label].topk(min(candidates, len(window)))
            window, label = window[rows], label[rows]
            boxes = layout.boxes[window]
            if deltas is not None:
                boxes = box_ops.decode(boxes, deltas[image, window], BOX_WEIGHTS)
            kept = box_ops.nms(boxes, best, label, nms_threshold if deltas is not None else 0.7)
            kept = kept[: detections if deltas is not None else 3 * detections]
            selected = Selected(window, boxes, best, label).take(kept)
            if deltas is None:
                selected = self._with_mask_boxes(raw, image, layout, selected, nms_threshold, detections)
            result.append(selected)
        return result

    def _with_mask_boxes(
        self, raw: Raw, image: int, layout: Layout, selected: Selected, threshold: float, detections: int
    ) -> Selected:
        """Replaces windows by the boxes of their masks, drops empty masks and suppresses duplicates."""
        boxes = selected.boxes.clone()
        for rows, logits in self.window_masks(raw, _of_image(layout, image, selected.windows)):
            tight = Masks.from_dense(logits > 0).boxes().to(boxes)
            own = layout.boxes[selected.windows[rows]]
            scale = ((own[:, 2:] - own[:, :2]) / logits.shape[-1]).repeat(1, 2)
            boxes[rows] = own[:, :2].repeat(1, 2) + tight * scale
        selected = selected._replace(boxes=boxes).take(_solid(boxes))
        return selected.take(box_ops.nms(selected.boxes, selected.scores, selected.labels, threshold, detections))

    def _to_instances(
        self, raw: Raw, image: int, layout: Layout, selected: Selected, placement: Placement, threshold: float
    ) -> Instances:
        """Pastes each mask into its window, which may extend beyond the image, not into its box."""
        size = placement.image_size
        boxes = box_ops.clip(placement.boxes_to_image(selected.boxes), size)
        selected = selected._replace(boxes=boxes).take(_solid(boxes))
        parts, order = [Masks.empty(size)], []
        for rows, logits in self.window_masks(raw, _of_image(layout, image, selected.windows)):
            grids = logits.float().sigmoid()
            grids = grids.flip(-1) if placement.mirrored else grids
            frames = placement.boxes_to_image(layout.boxes[selected.windows[rows]])
            parts.append(paste_masks(grids, frames, size, threshold=threshold))
            order.append(rows)
        masks = Masks.join(parts)
        if order:
            masks = masks[torch.cat(order).argsort().cpu()]
        return Instances(size, selected.boxes, selected.labels, masks, selected.scores)

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        parts = dict(self.dense.named_children())
        return {
            "backbone": [parts.pop("backbone")], "neck": [parts.pop("neck")], "heads": [*parts.values(), self.masks],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.logits.{kind}": ClassRows(repeats=len(self.windows)) for kind in ("weight", "bias")}

    # ---- presets -------------------------------------------------------------------------------------------------

    _PUBLISHED: ClassVar[dict[str, Any]] = {"name": "resnet50", "norm": "frozen", "frozen": 2, "stride_in": "1x1"}
    _README = "detectron2, projects/TensorMask/README.md"
    _HOW = "COCO val2017, short side 800, pycocotools"
    presets: ClassVar[Mapping[str, Preset]] = {
        "tensormask-r50": Preset(
            {"backbone": _PUBLISHED},
            (Score(41.4, "box AP", _HOW, _README), Score(35.8, "mask AP", _HOW, _README)),
            "bipyramid, two windows; figures of the 6x schedule (1x: 37.6 / 32.4)",
        ),
        "tensormask-r101": Preset(
            {"backbone": {**_PUBLISHED, "name": "resnet101"}},
            (Score(37.1, "mask AP", "COCO test-dev, short side 800", "the paper, table 3, first version"),),
            "no weights were published",
        ),
        "tensormask-r50-one-window": Preset(
            {"backbone": _PUBLISHED, "windows": (15,)},
            (Score(33.8, "mask AP", _HOW, "the paper, table 2d"),),
            "table 2d, first row; no weights were published",
        ),
        "tensormask-r50-pyramid": Preset(
            {"backbone": _PUBLISHED, "windows": (15,), "bipyramid": False, "factor": 1.5},
            (Score(29.7, "mask AP", _HOW, "the paper, table 2c"),),
            "the best head without a bipyramid: upscale aligned, factor 1.5 (table 2a); no weights were published",
        ),
        "tensormask-small": Preset(
            {
                "backbone": "resnet18", "neck_width": 128, "class_width": 128, "box_width": 64, "mask_width": 64,
                "convs": 2, "windows": (7, 11), "resize": {"short": 320, "long": 512},
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
    # Small enough for a CPU; large smooth shapes and small ones, for which the resolution of masks matters.
    _ABLATED: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "width": 32}, "neck_width": 64, "class_width": 64, "box_width": 64,
        "mask_width": 64, "convs": 2, "windows": (15,), "bipyramid": False, "resize": {"short": 128, "long": 128},
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


def _of_image(layout: Layout, image: int, windows: Int[Tensor, " d"]) -> Int[Tensor, "d 5"]:
    """Image, level, y, x and index of the size of some windows of the layout."""
    return functional.pad(layout.places[windows], (1, 0), value=image)


def _solid(boxes: Float[Tensor, "d 4"]) -> Tensor:
    """Whether each box has an area."""
    return ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
