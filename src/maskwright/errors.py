"""What can go wrong, as a tree.

    MaskwrightError                 one sentence: what, where, why, what next
    ├── UsageError                  an option or argument that cannot be
    │   ├── MissingExtraError       an optional part is not installed
    │   └── UnknownSystemError      no system or preset of this name
    ├── DataError                   an image, an annotation file, a data set
    │   ├── ImageError            an image that cannot be read
    │   └── AnnotationError         an annotation file or one of its entries
    ├── CheckpointError             a file of weights
    │   ├── UnsafeCheckpointError   it wants to run code, or is no such file at all
    │   ├── UnknownLayoutError      its keys match no system we know
    │   └── DownloadError           it could not be fetched whole (worth trying again)
    └── TrainingError               a run that must not go on (a NaN, no objects to learn from)

Every message names the file, annotation or key at fault and what to do. The command line prints the message alone
and exits with 2; anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class MaskwrightError(Exception):
    """Root of everything this library raises on purpose."""


class UsageError(MaskwrightError):
    """An option or argument that cannot be."""


class MissingExtraError(UsageError):
    """An optional part is not installed; the message holds the command that adds it."""

    def __init__(self, need: str, extra: str):
        super().__init__(f"{need} is not installed; run: pip install 'maskwright[{extra}]'")


class UnknownSystemError(UsageError):
    """No system or preset of this name."""


class DataError(MaskwrightError):
    """A data set that cannot be used."""


class ImageError(DataError):
    """An image that cannot be read."""


class AnnotationError(DataError):
    """An annotation file, or one annotation in it, that cannot be read."""


class CheckpointError(MaskwrightError):
    """A file of weights that cannot be used."""


class UnsafeCheckpointError(CheckpointError):
    """The file would run code when unpickled; it was refused, nothing was executed."""


class UnknownLayoutError(CheckpointError):
    """The keys in the file match no system we know."""


class DownloadError(CheckpointError):
    """A download that did not arrive whole; what arrived is kept for resuming unless it is wrong."""


class TrainingError(MaskwrightError):
    """A training run that must not go on."""
