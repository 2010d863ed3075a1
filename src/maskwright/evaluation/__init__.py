"""Evaluation: average precision, panoptic quality, confusion, speed, and the report page."""

from maskwright.evaluation.coco import Curves, coco_ap
from maskwright.evaluation.confusion import Confusion, ImageScore
from maskwright.evaluation.evaluator import Evaluator, Task, match_classes
from maskwright.evaluation.panoptic import PanopticEvaluator, SemanticEvaluator, panoptic_counts
from maskwright.evaluation.report import report
from maskwright.evaluation.result import Protocol, Result, Speed

__all__ = [
    "Confusion",
    "Curves",
    "Evaluator",
    "ImageScore",
    "PanopticEvaluator",
    "Protocol",
    "Result",
    "SemanticEvaluator",
    "Speed",
    "Task",
    "coco_ap",
    "match_classes",
    "panoptic_counts",
    "report",
]
