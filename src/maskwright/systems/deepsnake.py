"""Deep Snake (Peng, Jiang, Pi, Li, Bao, Zhou, CVPR 2020, arXiv 2001.01629).

A detector of centres (CenterNet) predicts boxes. The midpoints of a box's sides are moved to the four extreme points of
the object, these define an octagon, and its 128 points are moved three times towards the contour. The offsets come from
a network on closed sequences of points: convolutions with circular neighbourhoods (circular convolution), whose input
is the features at the points and the points' coordinates.

Objects of several parts (section 3.3, for Cityscapes) are split first: a second detector finds the centres of
components inside each box, each component has a contour, and their union is the mask.

Contours are in cells of the feature map of stride 4: pixel coordinates divided by 4, without an offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike
from maskwright.blocks.centernet import CentreDense
from maskwright.blocks.centernet import CentreRaw as Raw
from maskwright.blocks.layers import Norm
from maskwright.blocks.snake import CELLS, STRIDE, ComponentHead, ContourOptions, Contours
from maskwright.ops import boxes as box_ops
from maskwright.ops.centres import centre_focal_sum, find_peaks, gaussian_radius, paint_gaussians
from maskwright.ops.contours import resample_from
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.vertices import (
    bounds,
    diamonds,
    extreme_points,
    octagon_lines,
    outlines_of,
    tidy_outlines,
)
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.system import ClassRows, System

SIZE_WEIGHT = 0.1
PUBLISHED = Preprocess(
    resample="opencv", mean=(0.40789654, 0.44719302, 0.47026115), std=(0.28863828, 0.27408164, 0.27809835),
    channels="BGR", fit="letterbox", canvas=(512, 512),
)  # fmt: skip


ContourOptionsLike = Mapping[str, Any] | ContourOptions
BACKBONE, CONTOURS, RESIZE = Backbone("dla34"), ContourOptions(), Resize()


# ---- targets and detections ------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Targets of a batch in cells of the map: D objects and N contours, which correspond one to one without components.

    Attributes:
        boxes: Boxes of the objects.
        labels: Their class indices.
        images: Their images.
        contour_boxes: Boxes of the contours.
        contour_owners: The contours' objects.
        extremes: Extreme points of the contours.
        outlines: The contours, starting at the point that is closest to the octagon's first one.
        octagons: The octagons of the extreme points.
    """

    boxes: Float[Tensor, "d 4"]
    labels: Int[Tensor, " d"]
    images: Int[Tensor, " d"]
    contour_boxes: Float[Tensor, "n 4"]
    contour_owners: Int[Tensor, " n"]
    extremes: Float[Tensor, "n 4 2"]
    outlines: Float[Tensor, "n p 2"]
    octagons: Float[Tensor, "n p 2"]


class Detections(NamedTuple):
    """Detected boxes of a batch, ordered by image, best first.

    Attributes:
        boxes: In cells of the map.
        scores: Probabilities.
        labels: Class indices.
        owners: Index of each box's image.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    owners: Int[Tensor, " n"]


# ---- the system ------------------------------------------------------------------------------------------------------


class DeepSnake(System):
    """Deep Snake with the published options as presets; see the module."""

    name = "deepsnake"
    card = Card(
        title="Deep Snake",
        paper="Peng, Jiang, Pi, Li, Bao, Zhou: Deep Snake for Real-Time Instance Segmentation. CVPR 2020",
        arxiv="2001.01629",
        code="zju3dv/snake",
        code_licence="non-commercial research and education only",
    )
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{name: f"contours.{name}" for name in ("points", "start_points", "iterations", "convolution")},
        "contour_width": "contours.width",
        "contour_norm": "contours.norm",
        "align_corners": "contours.align_corners",
        "fit": "resize.fit",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        "backbone.": "dense.backbone.",
        "neck.": "dense.neck.",
        "centre_head.": "dense.centres.",
        "size_head.": "dense.sizes.",
        "component_head.": "components.",
    }

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        neck_width: int = 64,
        neck_norm: Norm | None = None,
        deformable: bool = True,
        head_width: int = 256,
        components: bool = False,
        component_width: int = 256,
        whole_classes: Sequence[str] = (),
        contours: ContourOptionsLike = CONTOURS,
        start: Literal["box", "centre"] = "centre",
        supervise: Literal["last", "all"] = "last",
        smallest_area: float = 5.0,
        most_contours: int = 400,
        resize: ResizeLike = RESIZE,
    ):
        """
        Args:
            classes: Class names.
            backbone: "dla34" with CenterNet's neck as published, with norm "batch"; or any other with levels of strides
                4 to 32 and a light neck.
            in_channels: Channels of the image.
            neck_width: Channels of the light neck. CenterNet's has 4 * backbone.width.
            neck_norm: Normalisation of the neck; default that of the backbone, "group" for one without this option.
            deformable: Whether CenterNet's neck has deformable convolutions.
            head_width: Channels of the heads.
            components: Whether objects may have several contours, which a second detector finds (section 3.3).
            component_width: Channels of that detector.
            whole_classes: Those of `classes` that always have one component, their box (Cityscapes: person and rider).
            contours: Contours and their network, see `ContourOptions`.
            start: Where a contour starts in training: at the annotated "box" (SBD, KINS), or at a box of its size
                around the "centre" rounded to a cell, like a detection (COCO).
            supervise: Which contours have a loss: "all" iterations, as in the paper; or the "last", as in the published
                code, through which the others are trained too.
            smallest_area: Parts that cover no more cells than this are ignored in training.
            most_contours: Maximum number of contours with a loss per batch, a random choice of them: bounds the memory
                (about 8 MB each as published).
            resize: Published: letterboxed into a `canvas` of 512 x 512; or fit="pad": the image's own size on a black
                canvas that is a multiple of 32 and larger.
        """
        super().__init__()
        self.classes = tuple(classes)
        self.whole = [k for k, name in enumerate(self.classes) if name in set(whole_classes)]
        self.start, self.supervise = start, supervise
        self.smallest_area, self.most_contours = smallest_area, most_contours
        spec, options = Backbone.read(backbone, BACKBONE), ContourOptions.read(contours, CONTOURS)
        self.points = options.points
        self.dense = CentreDense(
            spec.build(in_channels), len(self.classes), neck_width=neck_width, deformable=deformable,
            norm=neck_norm or spec.norm, eps=spec.eps, head_width=head_width,
        )  # fmt: skip
        self.components = ComponentHead(self.dense.channels, component_width) if components else None
        self.contours = Contours(self.dense.channels, options)
        size, published = Resize.read(resize, RESIZE), PUBLISHED
        if size.fit not in (None, "letterbox", "stretch"):
            published = replace(published, fit=size.fit, canvas=None)
        self.preprocess = size.apply(published, in_channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `centre` (focal) and `size` of the detector, `component_centre` and `component_size` with
        components, `extreme` and `outline` of the contours. Crowd regions are ignored."""
        goals = self.targets(targets, (raw.feature.shape[2], raw.feature.shape[3]), raw.feature.device)
        sides = goals.boxes[:, 2:] - goals.boxes[:, :2]
        centre, size = self._centre_losses(raw.centres, raw.sizes, goals.boxes, sides, goals.images, goals.labels)
        terms = {"centre": centre, "size": size + raw.sizes.sum() * 0}
        if self.components is not None:
            terms["component_centre"], terms["component_size"] = self._component_losses(self.components, raw, goals)
        return terms | self.contour_losses(raw, goals)

    @torch.no_grad()
    def targets(
        self, targets: Sequence[Instances], size: tuple[int, int], device: torch.device | str = "cpu"
    ) -> Targets:
        """Computes the targets of a batch on the CPU.

        Every part of every object is an object of its own, or, with components, a component of it. Unlike in the
        published code, triangles are not dropped.

        Args:
            targets: The objects of each image.
            size: Height and width of the map.
            device: Where the result is put.
        """
        rings, objects, labels, images, count = [], [], [], [], 0
        for image, target in enumerate(targets):
            own = target if target.crowd is None else target[~target.crowd]
            if own.masks is None or not len(own):
                continue
            outlines, owners = outlines_of(own.masks)
            rings += [ring / STRIDE for ring in outlines]
            objects.append(torch.from_numpy(owners) + count)
            labels.append(own.labels.cpu())
            images.append(torch.full((len(own),), image))
            count += len(own)
        limit = (float(size[0] - 1), float(size[1] - 1))
        lines, lengths, kept = tidy_outlines(rings, limit, self.smallest_area)
        objects, labels, images = (
            torch.cat([torch.zeros(0, dtype=torch.int64), *v]) for v in (objects, labels, images)
        )
        boxes, objects = bounds(lines, lengths), objects[kept]
        extremes = extreme_points(lines, lengths)
        starts = octagon_lines(extremes, self.points)
        outlines = resample_from(lines, self.points, lengths, starts[:, 0])
        if self.components is None:
            whole, owner, labels, images = boxes, torch.arange(len(boxes)), labels[objects], images[objects]
        else:
            present, owner = objects.unique(return_inverse=True)
            whole = box_ops.around(boxes, owner, len(present))
            labels, images = labels[present], images[present]
        floats = (v.float().to(device) for v in (whole, boxes, extremes, outlines, starts))
        whole, boxes, extremes, outlines, starts = floats
        labels, images, owner = labels.to(device), images.to(device), owner.to(device)
        return Targets(whole, labels, images, boxes, owner, extremes, outlines, starts)

    def _centre_losses(
        self, logits: Float[Tensor, "b k h w"], sizes: Float[Tensor, "b 2 h w"], boxes: Float[Tensor, "d 4"],
        sides: Float[Tensor, "d 2"], rows: Int[Tensor, " d"], labels: Int[Tensor, " d"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Focal loss of the maps of centres over the number of centres, and smooth L1 of the sizes, weighted by 0.1.

        Boxes are in cells of the maps, `sides` are the targets of the sizes; `rows` and `labels` select the map.
        """
        kinds, (height, width) = logits.shape[1], logits.shape[2:]
        cells = self.cells(boxes, (height, width))
        radii = gaussian_radius((boxes[:, 2:] - boxes[:, :2]).ceil())
        heat = paint_gaussians(cells, radii, rows * kinds + labels, (len(logits) * kinds, height, width))
        heat = heat.view(logits.shape)
        predicted = sizes[rows, :, cells[:, 1], cells[:, 0]].float()  # (D, 2)
        count = global_mean_count(torch.stack([(heat == 1).sum(), labels.new_tensor(len(labels))]))
        size = SIZE_WEIGHT * functional.smooth_l1_loss(predicted, sides, reduction="sum") / (2 * count[1] + 1e-4)
        return centre_focal_sum(logits, heat) / count[0], size

    @staticmethod
    def cells(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Int[Tensor, "n 2"]:
        """The cell x, y closest to the centre of each box, halves rounded to even."""
        middle = ((boxes[:, :2] + boxes[:, 2:]) / 2).round().long()
        return middle.clamp(min=0).minimum(middle.new_tensor([size[1] - 1, size[0] - 1]))

    def _component_losses(self, head: ComponentHead, raw: Raw, goals: Targets) -> tuple[Tensor, Tensor]:
        """The same two inside the annotated boxes, on maps of 14 x 56; sizes are in cells of the image's map.

        Decoding and the two weights are as published. There is no recording of this loss: which boxes are read, the
        rounding to cells and the radii (of the box in cells of the small map) follow from the decoding.
        """
        split = ~torch.isin(goals.labels, goals.labels.new_tensor(self.whole))
        chosen = _some(split.nonzero().flatten(), self.most_contours)
        boxes, images, weight = goals.boxes[chosen], goals.images[chosen], 1.0
        row = torch.full_like(goals.labels, -1)
        row[chosen] = torch.arange(len(chosen), device=row.device)
        row = row[goals.contour_owners]
        parts, row = goals.contour_boxes[row >= 0], row[row >= 0]
        if not len(chosen):  # a box of weight 0, so that every parameter has a gradient
            boxes, images, weight = boxes.new_tensor([[0.0, 0.0, 8.0, 8.0]]), images.new_zeros(1), 0.0
        logits, sizes = head(raw.feature, boxes, images)
        scale = boxes.new_tensor([CELLS[1], CELLS[0]]) / (boxes[:, 2:] - boxes[:, :2])
        inner = ((parts.view(-1, 2, 2) - boxes[row, None, :2]) * scale[row, None]).flatten(1)
        centre, size = self._centre_losses(
            logits, sizes, inner, parts[:, 2:] - parts[:, :2], row, torch.zeros_like(row)
        )
        return weight * centre + logits.sum() * 0, weight * size + sizes.sum() * 0

    def contour_losses(self, raw: Raw, goals: Targets) -> dict[str, Tensor]:
        """Computes `extreme`, smooth L1 of the extreme points in cells, and `outline`, of the contours in pixels."""
        chosen = _some(torch.arange(len(goals.contour_boxes), device=raw.feature.device), self.most_contours)
        count = global_mean_count(goals.boxes.new_tensor(float(len(chosen))))
        boxes, owners = goals.contour_boxes[chosen], goals.images[goals.contour_owners[chosen]]
        extremes, outlines, octagon = (v[chosen] for v in (goals.extremes, goals.outlines, goals.octagons))
        if self.start == "centre":
            half = (boxes[:, 2:] - boxes[:, :2]) / 2
            middle = self.cells(boxes, (raw.feature.shape[2], raw.feature.shape[3]))
            boxes = torch.cat([middle - half, middle + half], 1)
        weight = 1.0
        if not len(chosen):  # a contour of weight 0, so that every parameter has a gradient
            weight, owners = 0.0, owners.new_zeros(1)
            boxes = boxes.new_tensor([[0.0, 0.0, 4.0, 4.0]])
            extremes = diamonds(boxes)
            outlines = octagon = octagon_lines(extremes, self.points)
        predicted, lines = self.contours(raw.feature, boxes, owners, octagon)
        supervised = lines if self.supervise == "all" else lines[-1:]
        extreme_loss = functional.smooth_l1_loss(predicted, extremes, reduction="sum") / (8 * count)
        outline_loss = torch.stack(
            [functional.smooth_l1_loss(v * STRIDE, outlines * STRIDE, reduction="sum") for v in supervised]
        ).sum() / (2 * self.points * count)
        return {"extreme": weight * extreme_loss, "outline": weight * outline_loss}

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float | None = None,
        detections: int = 100,
        component_score: float = 0.25,
        component_nms: float = 0.1,
    ) -> list[Instances]:
        """Selects boxes, splits them into components, and moves and fills their contours.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of the score. (The published evaluation rounds scores to two decimals.)
            nms_threshold: IoU from which a box is suppressed by a better one of its class. None is as published: 0.7
                with components, no suppression without.
            detections: Maximum number of objects per image.
            component_score: Lower bound of a component's score.
            component_nms: IoU from which a component is suppressed by a better one of its object.
        """
        found = self.find(raw, score_threshold, nms_threshold, detections)
        boxes, owners = found.boxes, torch.arange(len(found.boxes), device=found.boxes.device)
        if self.components is not None:
            boxes, owners = self.split(self.components, raw, found, component_score, component_nms)
        lines = self.outlines(raw, boxes, found.owners[owners])
        lines = lines.nan_to_num(0.0, 0.0, 0.0) * STRIDE
        counts = found.owners.bincount(minlength=len(placements)).tolist()
        parts = owners.bincount(minlength=len(found.boxes)).tolist()
        result, first, first_line = [], 0, 0
        for placement, count in zip(placements, counts, strict=True):
            rows = slice(first, first + count)
            own = parts[rows]
            points = lines[first_line : first_line + sum(own)]
            result.append(self._on_image(Detections(*(v[rows] for v in found)), points, own, placement))
            first, first_line = first + count, first_line + sum(own)
        return result

    @torch.no_grad()
    def find(self, raw: Raw, score_threshold: float, nms_threshold: float | None, detections: int) -> Detections:
        """Selects the boxes above the threshold that are not suppressed. Arguments as for `decode`."""
        height, width = raw.centres.shape[2:]
        scores, labels, cells = find_peaks(raw.centres, detections)  # (B, D) each
        sides = raw.sizes.float().flatten(2).gather(2, cells[:, None].expand(-1, 2, -1)).transpose(1, 2)
        centres = torch.stack([cells % width, cells.div(width, rounding_mode="floor")], -1).to(sides)
        low = (centres - sides / 2).clamp(min=0)
        high = (centres + sides / 2).minimum(sides.new_tensor([width - 1, height - 1]))
        boxes = torch.cat([low, high], 2).flatten(0, 1)
        scores, labels = scores.flatten(), labels.flatten()
        owners = torch.arange(len(cells), device=cells.device).repeat_interleave(cells.shape[1])
        if nms_threshold is None and self.components is not None:
            nms_threshold = 0.7
        good = scores > score_threshold
        if nms_threshold is not None:
            groups = owners * len(self.classes) + labels
            good &= _kept(boxes, scores, groups, nms_threshold)
        return Detections(boxes[good], scores[good], labels[good], owners[good])

    @torch.no_grad()
    def split(
        self,
        head: nn.Module,
        raw: Raw,
        found: Detections,
        score: float = 0.25,
        overlap: float = 0.1,
        most: int = 50,
    ) -> tuple[Float[Tensor, "m 4"], Int[Tensor, " m"]]:
        """Splits detections into components.

        Args:
            head: The detector of components.
            raw: Raw output.
            found: The detections.
            score: Lower bound of a component's score.
            overlap: IoU from which a component is suppressed by a better one of its detection.
            most: Maximum number of components per detection before suppression.

        Returns:
            Boxes of the components in cells, ordered by detection, and the index of each one's detection.
        """
        whole = torch.isin(found.labels, found.labels.new_tensor(self.whole))
        every = torch.arange(len(found.boxes), device=found.boxes.device)
        rows = every[~whole]
        if not len(rows):
            return found.boxes, every
        logits, sizes = head(raw.feature, found.boxes[rows], found.owners[rows])
        scores, cells = logits.float().sigmoid().flatten(1).topk(min(most, CELLS[0] * CELLS[1]))
        sides = sizes.float().flatten(2).gather(2, cells[:, None].expand(-1, 2, -1)).transpose(1, 2)
        place = torch.stack([cells % CELLS[1], cells.div(CELLS[1], rounding_mode="floor")], -1).to(sides)
        own = found.boxes[rows, None]
        centres = place / place.new_tensor([CELLS[1], CELLS[0]]) * (own[..., 2:] - own[..., :2]) + own[..., :2]
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], 2).flatten(0, 1)
        owners, scores = rows.repeat_interleave(cells.shape[1]), scores.flatten()
        good = (scores > score) & _kept(boxes, scores, owners, overlap)
        boxes = torch.cat([found.boxes[whole], boxes[good]])
        owners = torch.cat([every[whole], owners[good]])
        order = owners.argsort(stable=True)
        return boxes[order], owners[order]

    @torch.no_grad()
    def outlines(
        self, raw: Raw, boxes: Float[Tensor, "n 4"], images: Int[Tensor, " n"], at_once: int | None = None
    ) -> Float[Tensor, "n p 2"]:
        """Computes the last contour of each box, in cells.

        Args:
            raw: Raw output.
            boxes: Boxes in cells.
            images: Index of each box's image.
            at_once: Number of boxes processed together, which bounds the memory to about 2 MB each; default 256, and 16
                on the CPU, whose caches they fit.
        """
        at_once = at_once or (16 if boxes.device.type == "cpu" else 256)
        lines = [boxes.new_zeros(0, self.points, 2)]
        for some, owners in zip(boxes.split(at_once), images.split(at_once), strict=True):
            if len(some):
                lines.append(self.contours(raw.feature, some, owners)[1][-1])
        return torch.cat(lines)

    def _on_image(
        self, found: Detections, lines: Float[Tensor, "n p 2"], parts: Sequence[int], placement: Placement
    ) -> Instances:
        """Contours of one image, `parts` of them for each box, as masks. Objects without any are dropped."""
        points = placement.points_to_image(lines).cpu().double().numpy()
        rings, first = [], 0
        for count in parts:
            rings.append(list(points[first : first + count]))
            first += count
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes * STRIDE), placement.image_size)
        present = torch.tensor([count > 0 for count in parts], dtype=torch.bool, device=boxes.device)
        present &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = Masks.from_polygons(rings, placement.image_size)
        return Instances(
            placement.image_size, boxes[present], found.labels[present], masks[present.cpu()], found.scores[present]
        )

    # ---- loading and training ----------------------------------------------------------------------------------------

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        result = super().upgraded(options)
        backbone, resize = result.get("backbone"), result.get("resize", {})
        if "norm" in options and isinstance(backbone, Mapping) and "norm" not in backbone:
            result["neck_norm"] = options["norm"]  # which was one option for backbone and neck
        if resize.get("fit") == "pad":  # earlier versions ignored the canvas then
            resize.pop("canvas", None)
        return result

    def groups(self) -> dict[str, list[nn.Module]]:
        heads: list[nn.Module] = [self.dense.centres, self.dense.sizes]
        if self.components is not None:
            heads.append(self.components)
        return {
            "backbone": [self.dense.backbone], "neck": [self.dense.neck], "heads": heads, "contours": [self.contours],
        }  # fmt: skip

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.centres.2.{kind}": ClassRows() for kind in ("weight", "bias")}

    # Published with Adam, whose weight decay is part of the gradient, and PCA lighting; here AdamW and colour jitter.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True, "gamma": 0.5,
        "warmup": 0,
    }  # fmt: skip
    _AUGMENT: ClassVar[dict[str, Any]] = {
        "flip": 0.5, "jitter": (0.6, 1.4), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
    }  # fmt: skip
    _LONG: ClassVar[tuple[float, ...]] = (80 / 200, 120 / 200, 150 / 200, 170 / 200)
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deepsnake-sbd": {
            **_RECIPE, "epochs": 150, "batch": 80, "milestones": (80 / 150, 120 / 150),
            "augment": {**_AUGMENT, "size": (512, 512)},
        },
        "deepsnake-kins": {  # its second step is x 0.1, which one gamma cannot express
            **_RECIPE, "epochs": 150, "batch": 72, "milestones": (80 / 150, 120 / 150),
            "augment": {**_AUGMENT, "size": (384, 896)},
        },
        # After 140 epochs of the detector only.
        "deepsnake-cityscapes": {
            **_RECIPE, "epochs": 200, "batch": 32, "milestones": _LONG, "augment": {**_AUGMENT, "size": (800, 800)},
        },
        "deepsnake-coco": {
            **_RECIPE, "epochs": 200, "batch": 72, "milestones": _LONG, "augment": {**_AUGMENT, "size": (512, 512)},
        },
    }  # fmt: skip

    _PUBLISHED: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "dla34", "norm": "batch"}, "contours": {"norm": "batch"}, "start": "box",
    }  # fmt: skip
    _SBD, _LISTED = "SBD val, 512 x 512", "as listed for arXiv 2001.01629"
    presets: ClassVar[Mapping[str, Preset]] = {
        "deepsnake-sbd": Preset(
            _PUBLISHED,
            (
                Score(54.4, "mask AP_vol", _SBD, _LISTED), Score(62.1, "mask AP50", _SBD, _LISTED),
                Score(48.3, "mask AP70", _SBD, _LISTED),
            ),
        ),
        "deepsnake-kins": Preset(
            {**_PUBLISHED, "resize": {"fit": "pad"}},
            (Score(31.3, "amodal mask AP", "KINS test", _LISTED), Score(32.8, "box AP", "KINS test", _LISTED)),
            "the size of images at test is not documented; here they keep their size",
        ),
        "deepsnake-cityscapes": Preset(
            {
                **_PUBLISHED, "components": True, "whole_classes": ("person", "rider"),
                "resize": {"canvas": (1216, 2432)},
            },
            (Score(37.4, "mask AP", "Cityscapes val", _LISTED), Score(31.7, "mask AP", "Cityscapes test", _LISTED)),
        ),
        "deepsnake-coco": Preset(
            {**_PUBLISHED, "resize": {"fit": "pad"}, "start": "centre"},
            (Score(30.3, "mask AP", "COCO test-dev", "the author, in his repository"),),
            "no weights were published",
        ),
        "deepsnake-small": Preset(
            {
                "backbone": "resnet18", "resize": {"canvas": (320, 320)}, "head_width": 128, "contours": {"width": 64},
                "supervise": "all",
            },
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


def _kept(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], groups: Int[Tensor, " n"], threshold: float
) -> Tensor:
    """Which boxes are not suppressed; their sides are x1 - x0 + 1, as in the published code."""
    grown = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    flags = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    flags[box_ops.nms(grown, scores, groups, threshold)] = True
    return flags


def _some(rows: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """All rows, or a random choice of `most`."""
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), device=rows.device)[:most]]
