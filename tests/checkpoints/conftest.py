"""A small system and two published layouts of it, so that these tests need no real network."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import maskwright.systems as systems
from maskwright.checkpoints import loading
from maskwright.checkpoints.origins import Candidate, Origin
from maskwright.structures import Preprocess
from maskwright.systems import Card, ClassRows, Preset, System

COLOURS = ("red", "green", "blue")


class StandIn(System):
    """Two convolutions and three heads: with a background, with four rows per class, and class-agnostic."""

    name = "stand-in"
    card = Card("Stand-in", "no paper", "", "", "Apache-2.0")
    presets = {"stand-in-wide": Preset({"width": 8})}  # noqa: RUF012

    def __init__(self, classes: list[str] | tuple[str, ...] = COLOURS, width: int = 4, in_channels: int = 3):
        super().__init__()
        self.classes = tuple(classes)
        self.preprocess = Preprocess()
        self.stem = nn.Conv2d(in_channels, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.score = nn.Linear(width, len(classes) + 1)
        self.box = nn.Linear(width, 4 * len(classes))
        self.anchor = nn.Conv2d(width, 2 * len(classes), 1)

    def forward(self, images: torch.Tensor) -> Any:
        return self.score(self.norm(self.stem(images)).mean((2, 3)))

    def losses(self, raw: Any, targets: Any) -> Any:
        return {}

    def decode(self, raw: Any, placements: Any) -> Any:
        return []

    def class_rows(self) -> dict[str, ClassRows]:
        rows = {"score": (0, 1, True), "box": (0, 4, False), "anchor": (0, 1, False, 2)}
        return {f"{k}.{part}": ClassRows(*v) for k, v in rows.items() for part in ("weight", "bias")}

    def input_weight(self) -> str | None:
        return "stem.weight"


class Other(StandIn):
    """Another system that lacks the class rows and holds less."""

    name = "other"
    presets = {}  # noqa: RUF012

    def __init__(self, classes: list[str] | tuple[str, ...] = COLOURS, width: int = 4):
        super().__init__(classes, width)
        del self.anchor

    def class_rows(self) -> dict[str, ClassRows]:
        return {}


def _recognise(shapes: Any, about: Any) -> Any:
    if "body.conv.weight" not in shapes or "head.cls.weight" not in shapes:
        return None
    return {"classes": list(COLOURS[: shapes["head.cls.weight"][0] - 1]), "width": shapes["body.conv.weight"][0]}


def _background_last(state: dict[str, torch.Tensor], options: Any) -> dict[str, torch.Tensor]:
    return {k: v.roll(-1, 0) if k.startswith("score.") else v for k, v in state.items()}


def _ambiguous(shapes: Any, about: Any) -> Any:
    if "twin.conv.weight" not in shapes:
        return None
    options = {"classes": list(COLOURS)}
    return [Candidate("stand-in-calm", options), Candidate("stand-in-bold", {**options, "width": 4})]


RENAME = (
    (r"^body\.conv\.", "stem."),
    (r"^body\.bn(\d)\.", lambda m: "norm." if m[1] == "1" else "spare."),
    (r"^head\.cls\.", "score."),
    (r"^head\.(box|anchor)\.", r"\1."),
)

ORIGINS = (
    Origin("theirs", "stand-in", RENAME, _recognise, _background_last, ignore=(r"^anchors\.",)),
    Origin("twins", "stand-in", ((r"^twin\.conv\.", "stem."), *RENAME), _ambiguous),
    Origin("small", "other", RENAME, _recognise, _background_last, ignore=(r"^anchors\.",)),
)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """The class of the registered stand-in."""
    module = types.ModuleType("maskwright.systems.stand_in_for_tests")
    module.StandIn, module.Other = StandIn, Other  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry = {"stand-in": "stand_in_for_tests:StandIn", "other": "stand_in_for_tests:Other"}
    monkeypatch.setattr(systems, "REGISTRY", registry)
    monkeypatch.setattr(loading, "origins", lambda: ORIGINS)
    return StandIn


@pytest.fixture
def theirs() -> Any:
    """A stand-in's state -> the same in the published layout: other names, background first, something to ignore."""

    def turn(system: System) -> dict[str, torch.Tensor]:
        names = {
            "stem": "body.conv",
            "norm": "body.bn1",
            "score": "head.cls",
            "box": "head.box",
            "anchor": "head.anchor",
        }
        state = {}
        for key, value in system.state_dict().items():
            first, rest = key.split(".", 1)
            state[f"{names[first]}.{rest}"] = value.roll(1, 0) if first == "score" else value.clone()
        return {**state, "anchors.0": torch.zeros(3, 4)}

    return turn
