"""What is published about a system: its card, presets and ablation tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Card:
    """The publication of a system.

    Attributes:
        title: Name of the method as published.
        paper: Authors, title, venue and year.
        arxiv: Number on arXiv.
        code: Repositories of the original code.
        code_licence: Licence of that code, an SPDX identifier where there is one.
    """

    title: str
    paper: str
    arxiv: str
    code: str
    code_licence: str


@dataclass(frozen=True)
class Score:
    """A published figure and the protocol that it was measured with.

    Attributes:
        value: The figure, for example 37.5.
        what: The measure: "mask AP", "box AP", "keypoint AP", "PQ", "mIoU".
        protocol: Data set, split, input size and evaluator.
        source: Where it is published.
    """

    value: float
    what: str
    protocol: str
    source: str


@dataclass(frozen=True)
class Preset:
    """A published variant of a system.

    Attributes:
        options: Arguments of the constructor.
        published: Figures that its authors reported.
        note: What distinguishes it.
        task: What it was trained for: "panoptic" presets learn from images segmented into things and stuff.
    """

    options: Mapping[str, Any]
    published: tuple[Score, ...] = ()
    note: str = ""
    task: Literal["instances", "panoptic", "semantic", "proposals"] = "instances"


MEASURES: Mapping[str, str] = {
    "AP": "segm/AP",
    "AP50": "segm/AP50",
    "AP75": "segm/AP75",
    "S": "segm/APs",
    "M": "segm/APm",
    "L": "segm/APl",
}


@dataclass(frozen=True)
class Ablation:
    """A table of a paper as a list of variants, to be rerun on small data by `maskwright ablate`.

    Attributes:
        title: What is compared, and which table it is.
        variants: The rows: name to the constructor options that make it, on top of `base`.
        published: The same rows as published: name to {"AP": ..., "AP50": ..., ...}.
        protocol: What the published figures were measured on.
        base: Options that all variants share.
        scenes: Arguments of `data.Scenes`: what the images must hold for the difference to show.
        recipe: Fields of `training.Recipe` on top of the budget.
        decoding: Keywords of `decode` of each row, where they differ from the defaults; rows with the same options
            share one training.
        measures: The columns: name to a key of the result's summary ("segm/AP"), or of its curves ("bbox/60" is the
            box AP at IoU 0.6); None: mask AP, AP50, AP75, and by size.
    """

    title: str
    variants: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Mapping[str, float]]
    protocol: str
    base: Mapping[str, Any]
    scenes: Mapping[str, Any]
    recipe: Mapping[str, Any]
    decoding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    measures: Mapping[str, str] | None = None

    @property
    def columns(self) -> Mapping[str, str]:
        """The measures, or the default ones."""
        return MEASURES if self.measures is None else self.measures
