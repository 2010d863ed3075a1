"""Moved: see `systems.system`, `systems.card` and `systems.kinds`."""

from maskwright.options import plain
from maskwright.systems.card import Ablation, Card, Preset, Score
from maskwright.systems.kinds.detectors import FrozenFeatures, FrozenLayout, QueryDetector
from maskwright.systems.kinds.panoptic import PanopticSystem
from maskwright.systems.kinds.proposals import ProposalSystem
from maskwright.systems.kinds.queries import MaskQueries, QuerySystem
from maskwright.systems.system import ClassRows, System, at_least
from maskwright.systems.system import loss_weights as weighed

__all__ = [
    "Ablation", "Card", "ClassRows", "FrozenFeatures", "FrozenLayout", "MaskQueries", "PanopticSystem", "Preset",
    "ProposalSystem", "QueryDetector", "QuerySystem", "Score", "System", "at_least", "plain", "weighed",
]  # fmt: skip
