"""Between a shell and a function: options from a signature, mistakes as one sentence, progress bars."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

from maskwright.errors import MaskwrightError, UsageError

T = TypeVar("T")


def say(text: str) -> None:
    """One line (or more) for the person, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """One line for the person, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---- options ---------------------------------------------------------------------------------------------------------


def parse(verb: Callable[..., int], arguments: Sequence[str], program: str) -> Callable[[], int]:
    """`verb` with its parameters filled from the arguments, not yet called. UsageError names what does not fit.

    `--help` prints and leaves by SystemExit(0).
    """

    @functools.wraps(verb)
    def fill(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(verb, *values, **named)

    about = re.split(r"\n\s*Args:\n", inspect.getdoc(verb) or "")[0]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            filled, unknown = tyro.cli(
                fill, prog=program, description=about, args=list(arguments), return_unknown_args=True
            )
    except SystemExit as leave:
        if not leave.code:
            raise
        # What is misspelt is the reason for what is missing: say that first.
        raise UsageError(_misspelt(fill, arguments, program) or _sentence(said.getvalue(), program)) from None
    if unknown:
        raise UsageError(
            _misspelt(fill, unknown, program) or f"{unknown[0]!r} is one argument too many; see {program} --help"
        )
    return filled


def choose(name: str, known: Iterable[str], what: str) -> str:
    """`name` if it is one of `known`; otherwise UsageError with the nearest."""
    known = list(known)
    if name in known:
        return name
    near = get_close_matches(name, known, 1)
    raise UsageError(
        f"there is no {what} {name!r}; {f'did you mean {near[0]!r}?' if near else 'known are ' + ', '.join(known)}"
    )


def _misspelt(verb: Callable[..., Any], arguments: Sequence[str], program: str) -> str | None:
    """The sentence about the first argument that looks like an option and is none."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(verb, prog=program, args=["--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", shown.getvalue()))
    for argument in arguments:
        if argument == "--":
            break
        option = argument.split("=")[0].replace("_", "-")
        if re.match(r"--?[A-Za-z]", option) and option not in known:
            near = get_close_matches(option, [k for k in known if k.startswith("--")], 1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"see {program} --help"
            return f"{program} has no option {argument.split('=')[0]}; {hint}"
    return None


def _sentence(box: str, program: str) -> str:
    """What tyro says in a frame, as one sentence."""
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line.startswith("│")]
    first = []
    for line in lines:
        if set(line.strip()) <= {"─"}:
            break
        first.append(line)
    if first and first[0].strip().startswith("Missing from"):
        # Names stand four deep, what they mean eight deep.
        missing = [line.strip() for line in first[1:] if re.match(r" {5}\S", line)]
        return f"{program} also needs {' and '.join(missing)}; see {program} --help"
    text = " ".join(line.strip() for line in first).rstrip(".") or "the arguments do not fit"
    text = re.sub(r"Missing value for argument '(.+?)'.*", r"\1 needs a value", text)
    return f"{program}: {text}; see {program} --help"


# ---- mistakes --------------------------------------------------------------------------------------------------------


def guarded(action: Callable[[], int]) -> int:
    """The exit code of `action`. What a person can do something about becomes a sentence on stderr and 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _mention
            return action()
    except KeyboardInterrupt as stop:
        complain(str(stop) or "interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        complain(f"maskwright: {sentence}")
        return 2


def _mention(message: Warning | str, *about: Any) -> None:
    """A warning as one line, without the place in the code it comes from."""
    complain(f"note: {' '.join(str(message).split())}")


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the surroundings cause; None for a defect of ours, which keeps its traceback."""
    if isinstance(error, MaskwrightError):
        return str(error)
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno, "")
        return f"{where}{(error.strerror or text).lower()}{'; ' + advice if advice else ''}"
    # Libraries that write by themselves lose the number, not the words.
    if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
        return f"no space left on device; {_ADVICE[errno.ENOSPC]}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; use smaller images (--short, --tile), a smaller --batch, or another --device"
    return None


_ADVICE = {
    errno.ENOSPC: "free some, or give a folder on another disk; no file is half-written under its final name",
    errno.EDQUOT: "your share of the disk is used up; free some, or give another output folder",
    errno.EACCES: "give a place you may read or write, or change its permissions",
    errno.EPERM: "give a place you may read or write, or change its permissions",
    errno.EROFS: "give an output folder that can be written",
    errno.ENOENT: "check the spelling of the path",
    errno.ENOTDIR: "a file stands where a folder is needed; give another path",
    errno.EISDIR: "a folder stands where a file is needed; give a file",
    errno.EEXIST: "give another path, or move what is there",
    errno.EMFILE: "too many files are open at once; use fewer --workers",
}


# ---- progress --------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items` one by one with a progress bar on stderr; no bar where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=what)
