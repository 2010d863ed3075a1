"""Prediction on images, folders and large images in tiles, evaluation on data sets, tracking, and export."""

from maskwright.inference.evaluating import evaluate
from maskwright.inference.evaluating_clips import evaluate_clips, evaluate_tracks
from maskwright.inference.exporting import export
from maskwright.inference.predicting import Prediction, Predictions, predict
from maskwright.inference.preparing import prepare
from maskwright.inference.tracking import LibraryTracker, Tracker, make_tracker, track_objects

__all__ = [
    "LibraryTracker",
    "Prediction",
    "Predictions",
    "Tracker",
    "evaluate",
    "evaluate_clips",
    "evaluate_tracks",
    "export",
    "make_tracker",
    "predict",
    "prepare",
    "track_objects",
]
