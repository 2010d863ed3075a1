"""Things by the heads of a detector, stuff by a semantic branch on its pyramid (Panoptic FPN, arXiv 1901.02446)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from maskwright.blocks.layers import Norm
from maskwright.blocks.semantic import VOID, label_maps, semantic_loss
from maskwright.ops.mask_targets import label_target
from maskwright.ops.planes import label_plane
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Panoptic, Placement
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.system import ClassRows

R = TypeVar("R")


@dataclass(frozen=True)
class BranchOptions(OptionGroup):
    """What options of semantic branches have in common.

    Attributes:
        weight: Weight of the loss; that of the other losses is 1.
        smallest_area: Regions of stuff with fewer pixels of the image are left out.
    """

    label: ClassVar[str] = "semantic"

    weight: float = 0.5
    smallest_area: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "weight", "smallest_area")


@dataclass(frozen=True)
class SemanticOptions(BranchOptions):
    """The semantic branch, as options of a system.

    Attributes:
        width: Channels of its convolutions.
        norm: Normalisation after each of them.
    """

    width: int = 128
    norm: Norm = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "width")


SEMANTIC = SemanticOptions()


class SemanticBranch(PanopticSystem):
    """Base class of systems whose detector predicts the things and whose semantic branch labels each pixel.

    Heads of the detector have rows for things only. The first output of the branch is "things", the others are the
    stuff classes in their order among `classes`. A fixed rule (section 3.1) merges the two.

    Attributes:
        branch: Options of the branch.
    """

    branch: BranchOptions

    @abstractmethod
    def semantic_logits(self, raw: Any) -> Float[Tensor, "b k _h _w"]:
        """The output of the branch, at stride 4."""

    @abstractmethod
    def decode_panoptic(
        self, raw: Any, placements: Sequence[Placement], *, smallest_area: int | None = None
    ) -> list[Panoptic]:
        """Divides each image into segments: things best first, then regions of stuff by label."""

    # ---- training ----------------------------------------------------------------------------------------------------

    def things_of(self, targets: Sequence[Instances]) -> list[Instances]:
        """The objects among the segments of each image, with labels among the things."""
        things = self.thing_classes()
        rows = things.cumsum(0) - 1
        return [self._relabelled(target[things[target.labels.cpu()]], rows) for target in targets]

    def semantic_term(self, raw: Any, targets: Sequence[Instances], coarse: bool = False) -> Tensor:
        """Computes the weighted cross entropy of all labelled pixels, see `semantic_loss`; 0 without stuff."""
        logits = self.semantic_logits(raw)
        if not self.stuff:
            return logits.sum() * 0
        truth = label_maps([self.semantic_target(target) for target in targets], raw.size, logits.device)
        return self.branch.weight * semantic_loss(logits, truth, coarse)

    def semantic_target(self, target: Instances) -> Int[Tensor, "_h _w"]:
        """The output of the semantic branch that each pixel belongs to: 0 for things; VOID where there is no segment.

        Where segments overlap, the smaller one is on top.
        """
        if target.masks is None:
            return torch.full(target.image_size, VOID)
        stuff = ~self.thing_classes()
        outputs = stuff.cumsum(0) * stuff
        return label_target(target.masks, outputs[target.labels.cpu()], background=VOID)

    @staticmethod
    def _relabelled(objects: Instances, table: Int[Tensor, " k"]) -> Instances:
        """Objects with the labels that a table has for theirs."""
        return replace(objects, labels=table.to(objects.labels.device)[objects.labels])

    # ---- detection ---------------------------------------------------------------------------------------------------

    def segmented(
        self, raw: Any, things: Sequence[Instances], placements: Sequence[Placement], overlap_threshold: float,
        smallest_area: int | None,
    ) -> list[Panoptic]:  # fmt: skip
        """Merges the things of each image, best first, with the regions that the branch sees."""
        area = self.branch.smallest_area if smallest_area is None else smallest_area
        result: list[Panoptic] = []
        for row, (own, placement) in enumerate(zip(things, placements, strict=True)):
            labels, probability = self._stuff(raw, row, placement)
            result.append(self.merged(own, labels, probability, overlap_threshold, area))
        return result

    @torch.no_grad()
    def decode_semantic(self, raw: Any, placements: Sequence[Placement]) -> list[Int[Tensor, "_h _w"]]:
        """The label of each pixel: that of the thing that has taken it, otherwise of its stuff class; -1 where the
        semantic branch sees things that are not detected."""
        return [own.semantic() for own in self.decode_panoptic(raw, placements, smallest_area=0)]

    def _stuff(self, raw: Any, row: int, placement: Placement) -> tuple[Int[Tensor, "_h _w"], Tensor]:
        """Output of the semantic branch (0: things; -1: none) and its probability for each pixel of one image.

        The logits are resized to the input and from there to the image, as published; then the best one is chosen.
        """
        if not self.stuff:
            empty = torch.zeros(placement.image_size)
            return empty.long(), empty
        logits = self.semantic_logits(one_image(raw, row)).float()
        large = functional.interpolate(logits, size=raw.size, mode="bilinear", align_corners=False)[0]
        labels, probability = label_plane(large, placement, raw.size)
        return labels.cpu(), probability.cpu()

    def merged(
        self, things: Instances, labels: Int[Tensor, "h w"], probability: Tensor, overlap_threshold: float, area: int
    ) -> Panoptic:
        """Merges the objects of one image, best first, with the outputs of the semantic branch (section 3.1)."""
        assert things.masks is not None
        assert things.scores is not None
        plane = torch.full(things.image_size, -1, dtype=torch.int32)
        kept: list[int] = []
        frames, crops = things.masks.crops()
        for index, ((x0, y0, x1, y1), crop) in enumerate(zip(frames.tolist(), crops, strict=True)):
            window = plane[y0:y1, x0:x1]
            mask = crop.cpu()
            free = mask & (window < 0)
            total, left = int(mask.sum()), int(free.sum())
            if left and (total - left) / total <= 1 - overlap_threshold:
                window[free] = len(kept)
                kept.append(index)
        # Outputs 1, 2, ... of the semantic branch are the stuff classes.
        classes = (~self.thing_classes()).nonzero().flatten()
        outputs = torch.where(plane < 0, labels, 0).clamp(min=0).flatten()
        areas = torch.bincount(outputs, minlength=1 + len(classes))[1:]
        sums = torch.bincount(outputs, probability.flatten().double(), 1 + len(classes))[1:]
        regions = ((areas > 0) & (areas >= area)).nonzero().flatten()
        numbers = torch.full((1 + len(classes),), -1, dtype=torch.int32)
        numbers[regions + 1] = torch.arange(len(regions), dtype=torch.int32) + len(kept)
        plane = torch.where(plane < 0, numbers[outputs].view(plane.shape), plane)
        device = things.labels.device
        scores = (sums[regions] / areas[regions]).to(things.scores)
        found = torch.cat([things.labels[kept], classes[regions].to(device)])
        return Panoptic.from_map(
            plane, found, self.thing_classes(device)[found], numbers=torch.arange(len(found)),
            scores=torch.cat([things.scores[kept], scores]),
        )  # fmt: skip

    # ---- for loading and training ------------------------------------------------------------------------------------

    def rows_of_things(
        self, rows: Mapping[str, ClassRows | tuple[ClassRows, ...]]
    ) -> dict[str, ClassRows | tuple[ClassRows, ...]]:
        """Rows of the detector's parameters, which are those of things, and rows of the branch."""
        found: dict[str, ClassRows | tuple[ClassRows, ...]] = {}
        for name, own in rows.items():
            assert isinstance(own, ClassRows)
            found[name] = own._replace(kind="things")
        return found | (self.stuff_rows() if self.stuff else {})


def one_image(raw: R, row: int) -> R:
    """The raw output of one image of a batch: of every tuple of tensors its row."""
    values = {f.name: getattr(raw, f.name) for f in fields(raw)}  # pyright: ignore[reportArgumentType]
    own = {k: tuple(x[row : row + 1] for x in v) for k, v in values.items() if k != "size" and isinstance(v, tuple)}
    return replace(raw, **own)  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportCallIssue]
