"""Checkpoints: official files, read without executing them, and the format of this library."""

from __future__ import annotations

from maskwright.checkpoints.catalogue import Entry, list_checkpoints
from maskwright.checkpoints.fitting import adapt_classes, widen_input
from maskwright.checkpoints.folders import CheckpointWarning
from maskwright.checkpoints.loading import convert, load
from maskwright.checkpoints.origins import Candidate, Origin, origins
from maskwright.checkpoints.ours import read_metadata, save
from maskwright.checkpoints.reading import read_state
from maskwright.checkpoints.shipping import Shipped, shipped

__all__ = [
    "Candidate",
    "CheckpointWarning",
    "Entry",
    "Origin",
    "Shipped",
    "adapt_classes",
    "convert",
    "list_checkpoints",
    "load",
    "origins",
    "read_metadata",
    "read_state",
    "save",
    "shipped",
    "widen_input",
]
