"""Prediction on images, folders and large images in tiles, and evaluation on data sets."""

from maskwright.inference.evaluating import evaluate
from maskwright.inference.predicting import Prediction, Predictions, predict
from maskwright.inference.preparing import prepare

__all__ = ["Prediction", "Predictions", "evaluate", "predict", "prepare"]
