"""The command line's terminal: options from signatures, errors as one sentence, progress bars."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TextIO, TypeVar, get_type_hints

import tyro

from maskwright.errors import AnnotationError, MaskwrightError, RenamedOptionWarning, UsageError, interruption
from maskwright.files import describe_os_error
from maskwright.text import encodable, printable

T = TypeVar("T")


def print_line(text: str) -> None:
    """Print `text` to stdout, and flush. Control characters other than line breaks are escaped."""
    _print(text, sys.stdout)


def print_error(text: str) -> None:
    """Print `text` to stderr, and flush. Control characters other than line breaks are escaped."""
    _print(text, sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    """The one place where text reaches the terminal: names from files cannot control it there."""
    stream.write(encodable(printable(text, keep="\n\t"), stream.encoding) + "\n")
    stream.flush()


# ---- options ---------------------------------------------------------------------------------------------------------


def parse(verb: Callable[..., int], arguments: Sequence[str], program: str) -> Callable[[], int]:
    """Bind command-line arguments to the parameters of a function.

    Args:
        verb: The function of a command; its signature and docstring define the options.
        arguments: The arguments of the command.
        program: Name of the command, for messages.

    Returns:
        `verb` with its parameters, not called yet.

    Raises:
        UsageError: If the arguments do not match the signature.
        SystemExit: With code 0, after `--help` has been printed.
    """

    def fill(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(verb, *values, **named)

    about, _, options = (inspect.getdoc(verb) or "").partition("\nArgs:\n")
    # tyro keeps the line breaks of descriptions of options; they are filled to the width of the terminal instead.
    fill.__doc__ = f"{_ABOUT}\n\nArgs:\n" + re.sub(r"\n {8,}", " ", options)
    fill.__annotations__ = _without_empty_defaults(verb)
    fill.__signature__ = inspect.signature(verb)  # pyright: ignore[reportFunctionMemberAccess]
    encoding = sys.stdout.encoding or "utf-8"
    shown, printed = io.TextIOWrapper(io.BytesIO(), encoding, newline=""), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(printed):
            filled, unknown = tyro.cli(
                fill, prog=program, description=_ABOUT, args=list(arguments), return_unknown_args=True
            )
    except SystemExit as leave:
        if not leave.code:
            shown.seek(0)
            print_line(re.sub(r" +$", "", shown.read(), flags=re.M).rstrip().replace(_ABOUT, _filled(about.strip()), 1))
            raise
        # A misspelt option is often why another one is missing, so it is reported first.
        raise UsageError(_misspelt(fill, arguments, program) or _sentence(printed.getvalue(), program)) from None
    if unknown:
        raise UsageError(
            _misspelt(fill, unknown, program) or f"unexpected argument {unknown[0]!r}; see {program} --help"
        )
    return filled


def help_width() -> int:
    """The width of help texts: that of the terminal, at most 120 characters."""
    return min(shutil.get_terminal_size().columns, 120)


_ABOUT = "ABOUT"  # Stands for the description while tyro formats the help; it would join the lines of lists.


def _filled(text: str) -> str:
    """A docstring whose paragraphs are filled to the width of the help; lists and tables keep their lines."""
    blocks: list[str] = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        prose = all(re.match(r"[^\s*-]", line) and "  " not in line for line in lines)
        blocks.append(textwrap.fill(" ".join(lines), help_width(), break_on_hyphens=False) if prose else block)
    return "\n\n".join(blocks)


def _without_empty_defaults(verb: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a command whose help does not show defaults of None or ()."""
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if parameter.default is None or parameter.default == ():
            hints[name] = Annotated[hints[name], tyro.conf.arg(help_behavior_hint="")]
    return hints


def choose(name: str, known: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `known`.

    Args:
        name: The name.
        known: All valid names.
        what: What they name, for the message.

    Raises:
        UsageError: If it is not; the message suggests the most similar name, or lists all if they are at most 40.
    """
    known = list(known)
    if name in known:
        return name
    similar = get_close_matches(name, known, 1)
    some = ", ".join(known) if len(known) <= 40 else f"{len(known)} names such as {', '.join(known[:3])}"
    hint = f"did you mean {similar[0]!r}?" if similar else f"expected one of {some}"
    raise UsageError(f"unknown {what} {name!r}; {hint}")


def _misspelt(verb: Callable[..., Any], arguments: Sequence[str], program: str) -> str | None:
    """The message about the first argument that looks like an option but is none; None if there is no such."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(verb, prog=program, args=["--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", shown.getvalue()))
    for argument in arguments:
        if argument == "--":
            break
        option = argument.split("=")[0].replace("_", "-")
        if re.match(r"--?[A-Za-z]", option) and option not in known:
            words = sorted(k for k in known if k.startswith("--"))
            similar = [k for k in words if k.startswith(option)] or get_close_matches(option, words, 1, cutoff=0.5)
            hint = f"did you mean {similar[0]}?" if similar else f"see {program} --help"
            if (place := option.strip("-").replace("-", "_")) in inspect.signature(verb).parameters:
                hint = f"give the value without it: {program} {place.upper()}"  # known to the command, by its position
            return f"{program.split()[-1]} has no option {argument.split('=')[0]}; {hint}"
    return None


def _sentence(box: str, program: str) -> str:
    """The message that tyro prints in a box, as one sentence."""
    lines = [line.strip("│").rstrip() for line in box.splitlines() if line.startswith("│")]
    if not lines:  # a terminal without Unicode: a title, a rule, and lines indented by a space
        lines = [line[1:].rstrip() for line in box.splitlines()[2:]]
    first: list[str] = []
    for line in lines:
        if set(line.strip()) <= {"─", "-"}:
            break
        first.append(line)
    if first and first[0].strip().startswith("Missing from"):
        # Names are indented by four, their descriptions by eight.
        missing = [line.strip() for line in first[1:] if re.match(r" {5}\S", line)]
        command = program.split()[-1]
        return f"{command} also needs {' and '.join(missing)}; see {program} --help"
    text = " ".join(line.strip() for line in first).rstrip(".") or "invalid arguments"
    text = re.sub(r"Missing value for argument '(.+?)'.*", r"\1 needs a value", text)
    text = re.sub(r"Error parsing (\S+): invalid literal for int\(\).*?: (.*)", r"\1 must be an integer, got \2", text)
    text = re.sub(r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 must be a number, got \2", text)
    text = re.sub(r"\. Expected one of \((.*)\)", _choices, text)
    return f"{text}; see {program} --help"


def _choices(found: re.Match[str]) -> str:
    """The choices in alphabetical order; None stands for an option that is not given."""
    words = sorted(word for word in found[1].split(", ") if word != "'None'")
    return f"; expected one of {', '.join(words)}"


# ---- errors ----------------------------------------------------------------------------------------------------------


def guarded(action: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    Errors that the user can resolve are printed as one sentence, with code 2; an interruption is code 130 (Ctrl-C) or
    128 + the signal's number. Warnings are printed as one line each. Other exceptions propagate.
    """
    try:
        with warnings.catch_warnings(), _ended_by_signals():
            warnings.showwarning = _mention
            warnings.simplefilter("default", RenamedOptionWarning)  # whatever PYTHONWARNINGS says
            return action()
    except KeyboardInterrupt as stop:
        print_error(str(stop) or "interrupted")
        return getattr(stop, "exit_code", 130)
    except BrokenPipeError:
        # The reader of stdout (`| head`) has exited; Python would report that again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print_error(f"maskwright: {sentence}")
        return 2


@contextlib.contextmanager
def _ended_by_signals() -> Generator[None]:
    """The block that SIGTERM and SIGHUP end as Ctrl-C does, so that temporary files are removed."""

    def end(number: int, _: object) -> None:
        raise interruption(f"ended by {signal.Signals(number).name}", number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mention(message: Warning | str, *about: Any) -> None:
    """Print a warning as one line, without its location in the code."""
    print_error(f"note: {' '.join(str(message).split())}")


def explain(error: BaseException) -> str | None:
    """Return the message for an error that the user can resolve; None for a bug, which keeps its traceback.

    The message is one line, apart from the findings in an annotation file, which have a line each.
    """
    if isinstance(error, MaskwrightError):
        return printable(str(error), keep="\n" if isinstance(error, AnnotationError) else "")
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return printable(where + describe_os_error(error))
    # Libraries that write files themselves do not keep the error number.
    if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
        return describe_os_error(OSError(errno.ENOSPC, ""))
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory; use smaller images (--short, --tile), a smaller --batch, or another --device"
    return None


# ---- progress --------------------------------------------------------------------------------------------------------


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a progress bar on stderr, if stderr is a terminal.

    Args:
        items: What to iterate over.
        what: Description of the bar.
        total: Number of items; None: `len(items)`, if it has a length.

    Yields:
        The items.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    description = escape(printable(what))
    if _bars:  # inside another bar: one more line of it
        line = _bars[-1].add_task(description, total=total)
        try:
            yield from _bars[-1].track(items, total=total, task_id=line)
        finally:
            _bars[-1].remove_task(line)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        _bars.append(bar)
        try:
            yield from bar.track(items, total=total, description=description)
        finally:
            _bars.remove(bar)


_bars: list[Any] = []  # the progress bars that are displayed
