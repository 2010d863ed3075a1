"""The data structures of the library: objects, masks, prompts, batches, and the placement of images in an input."""

from maskwright.structures.batch import Batch
from maskwright.structures.choices import Choices
from maskwright.structures.embedding import Embedding
from maskwright.structures.instances import Instances
from maskwright.structures.masks import Masks
from maskwright.structures.panoptic import Panoptic
from maskwright.structures.placement import Placement
from maskwright.structures.preprocess import Preprocess
from maskwright.structures.prompts import Prompts

__all__ = ["Batch", "Choices", "Embedding", "Instances", "Masks", "Panoptic", "Placement", "Preprocess", "Prompts"]
