"""From files to batches: reading, checking, generated scenes, augmentation, loading."""

from maskwright.data.augment import Augment
from maskwright.data.check import CheckReport, check
from maskwright.data.coco import CocoDataset, open_dataset, read_coco
from maskwright.data.dataset import PERSON_KEYPOINTS, Dataset, Sample, mirrored_keypoints
from maskwright.data.findings import DataWarning, Finding
from maskwright.data.images import read_image, read_size
from maskwright.data.loader import Loader, make_loader
from maskwright.data.panoptic import PanopticDataset, read_panoptic, write_panoptic
from maskwright.data.scenes import Scenes
from maskwright.data.show import show_batch
from maskwright.data.views import Chosen, OneClass, Renamed, spread, things_only

__all__ = [
    "PERSON_KEYPOINTS",
    "Augment",
    "CheckReport",
    "Chosen",
    "CocoDataset",
    "DataWarning",
    "Dataset",
    "Finding",
    "Loader",
    "OneClass",
    "PanopticDataset",
    "Renamed",
    "Sample",
    "Scenes",
    "check",
    "make_loader",
    "mirrored_keypoints",
    "open_dataset",
    "read_coco",
    "read_image",
    "read_panoptic",
    "read_size",
    "show_batch",
    "spread",
    "things_only",
    "write_panoptic",
]
