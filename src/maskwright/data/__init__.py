"""Data sets: reading, checking, generated scenes, augmentation and batches."""

import warnings
from typing import Any

from maskwright.data.augment import Augment
from maskwright.data.check import CheckReport, check
from maskwright.data.clips import Clip, Clips
from maskwright.data.coco import read_coco
from maskwright.data.contour_scenes import ContourScenes
from maskwright.data.convert import convert_data
from maskwright.data.dataset import PERSON_KEYPOINTS, Dataset, Sample, as_dataset, mirrored_keypoints
from maskwright.data.davis import read_davis, write_davis
from maskwright.data.findings import DataWarning, Finding
from maskwright.data.formats import register_format
from maskwright.data.images import read_image, read_size
from maskwright.data.loader import Loader, make_loader
from maskwright.data.moving_scenes import MovingScenes
from maskwright.data.opening import has_split, open_dataset
from maskwright.data.panoptic import read_panoptic, write_panoptic
from maskwright.data.scenes import Scenes
from maskwright.data.show import show_batch
from maskwright.data.table_datasets import InstanceDataset, PanopticDataset
from maskwright.data.views import Mixture, OneClass, Renamed, Subset, evenly_spaced, things_only, without_keypoints
from maskwright.data.youtube_vis import read_youtube_vis, write_youtube_vis

__all__ = [
    "PERSON_KEYPOINTS",
    "Augment",
    "CheckReport",
    "Clip",
    "Clips",
    "ContourScenes",
    "DataWarning",
    "Dataset",
    "Finding",
    "InstanceDataset",
    "Loader",
    "Mixture",
    "MovingScenes",
    "OneClass",
    "PanopticDataset",
    "Renamed",
    "Sample",
    "Scenes",
    "Subset",
    "as_dataset",
    "check",
    "convert_data",
    "evenly_spaced",
    "has_split",
    "make_loader",
    "mirrored_keypoints",
    "open_dataset",
    "read_coco",
    "read_davis",
    "read_image",
    "read_panoptic",
    "read_size",
    "read_youtube_vis",
    "register_format",
    "show_batch",
    "things_only",
    "without_keypoints",
    "write_davis",
    "write_panoptic",
    "write_youtube_vis",
]


def __getattr__(name: str) -> Any:
    if name == "read_picture":  # the name in earlier development versions
        warnings.warn("read_picture is now read_image", DeprecationWarning, stacklevel=2)
        return read_image
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
