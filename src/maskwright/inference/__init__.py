"""Prediction on images, folders and large images in tiles, evaluation on data sets, and export."""

from maskwright.inference.evaluating import evaluate
from maskwright.inference.exporting import export
from maskwright.inference.predicting import Prediction, Predictions, predict
from maskwright.inference.preparing import prepare

__all__ = ["Prediction", "Predictions", "evaluate", "export", "predict", "prepare"]
