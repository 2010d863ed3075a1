"""The exceptions of this library.

    MaskwrightError                 base class; one sentence: what, where, why, what to do
    ├── UsageError                  invalid option or argument
    │   ├── MissingExtraError       an optional dependency is not installed
    │   └── UnknownSystemError      no system or preset with this name
    ├── DataError                   an image, an annotation file, a data set
    │   ├── ImageError              an unreadable image
    │   └── AnnotationError         an invalid annotation file or entry
    │       └── MaskCodeError       an invalid run-length code; a ValueError too
    ├── CheckpointError             a file of weights
    │   ├── UnsafeCheckpointError   loading it would execute code, or it is not a checkpoint
    │   ├── UnknownLayoutError      its keys match no supported system
    │   └── DownloadError           it could not be downloaded completely; a retry may help
    └── TrainingError               a failed training run (NaN, no annotated objects)

Every message names the file, annotation or key and says what to do. The command line prints the message and exits with
code 2. Any other exception is a bug of this library and keeps its traceback.
"""

from __future__ import annotations


class MaskwrightError(Exception):
    """Base class of all exceptions that this library raises intentionally."""


class UsageError(MaskwrightError):
    """An invalid option or argument."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed; the message contains the command that installs it.

    Args:
        need: What is missing.
        extra: The extra of this package that installs it.
    """

    def __init__(self, need: str, extra: str):
        super().__init__(f"{need} is not installed; run: pip install 'maskwright[{extra}]'")


class UnknownSystemError(UsageError):
    """There is no system or preset with this name."""


class DataError(MaskwrightError):
    """An invalid data set, or a file that could not be written."""


class ImageError(DataError):
    """An unreadable image."""


class AnnotationError(DataError):
    """An invalid annotation file, or an invalid entry of one."""


class MaskCodeError(AnnotationError, ValueError):
    """A run-length code of a mask that is invalid, or does not fit the size of its image."""


class CheckpointError(MaskwrightError):
    """An invalid or unsupported file of weights."""


class UnsafeCheckpointError(CheckpointError):
    """Loading the file would execute code; it was not loaded, and nothing was executed."""


class UnknownLayoutError(CheckpointError):
    """The keys of the file match no supported system."""


class DownloadError(CheckpointError):
    """An incomplete or failed download; what was received is kept for resuming, unless it is wrong."""


class TrainingError(MaskwrightError):
    """A training run that cannot start or continue."""


class RenamedOptionWarning(FutureWarning):
    """An option was given by its name in an earlier version; it has been accepted."""


def interruption(message: str, number: int = 2) -> KeyboardInterrupt:
    """The exception that ends the work after a signal, when what can be saved has been.

    It is a KeyboardInterrupt itself, of no subclass: only for that does Python end a script as Ctrl-C does.

    Args:
        message: One sentence for the user: what has been saved, how to continue.
        number: The signal: SIGINT (Ctrl-C), SIGTERM, SIGHUP.

    Returns:
        The exception. Its attribute ``exit_code`` is 128 + `number`, the exit code of the command line.
    """
    error = KeyboardInterrupt(message)
    error.__dict__["exit_code"] = 128 + number
    return error
