"""Evaluation: average precision, panoptic quality, tracks in clips, confusion, speed, and the report page."""

from maskwright.evaluation.clip_evaluator import ClipEvaluator
from maskwright.evaluation.clip_result import ClipResult
from maskwright.evaluation.coco import Curves, coco_ap
from maskwright.evaluation.confusion import Confusion, ImageScore
from maskwright.evaluation.evaluator import Evaluator, Task, match_classes
from maskwright.evaluation.panoptic import PanopticEvaluator, SemanticEvaluator, panoptic_counts
from maskwright.evaluation.report import report
from maskwright.evaluation.result import Protocol, Result, Speed

__all__ = [
    "ClipEvaluator",
    "ClipResult",
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
