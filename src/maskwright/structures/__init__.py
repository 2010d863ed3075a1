"""The data structures of the library: objects, masks, batches, and the placement of images in a network's input."""

from maskwright.structures.batch import Batch
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks
from maskwright.structures.panoptic import Panoptic
from maskwright.structures.placement import Placement
from maskwright.structures.preprocess import Preprocess

__all__ = ["Batch", "Instances", "Masks", "Panoptic", "Placement", "Preprocess"]
