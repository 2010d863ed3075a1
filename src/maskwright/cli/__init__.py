"""The command line: one function per command, whose typed signature defines its options.

Nothing heavy is imported before the options are parsed, so that `--help` and a misspelt option answer at once.
Exit codes: 0 success; 1 finished, but with problems (images skipped, a data set with errors); 2 failed, with one
sentence on stderr; 130 interrupted.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from maskwright._version import __version__
from maskwright.cli.annotating import annotate
from maskwright.cli.catalogue import checkpoints, convert, systems
from maskwright.cli.comparing import compare
from maskwright.cli.data import check, convert_data
from maskwright.cli.exporting import export
from maskwright.cli.results import evaluate, predict, report
from maskwright.cli.serving import serve
from maskwright.cli.tracking import track
from maskwright.cli.training import ablate, demo, show_batch, train, train_with_recipe
from maskwright.errors import UsageError
from maskwright.terminal import choose, guarded, help_width, parse, print_line

VERBS: dict[str, Callable[..., int]] = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        demo,
        check,
        convert_data,
        annotate,
        train,
        show_batch,
        evaluate,
        compare,
        predict,
        track,
        serve,
        report,
        convert,
        export,
        systems,
        checkpoints,
        ablate,
    )
}


# Options of earlier versions and what they are called now.
RENAMED = {"--trunk": "--backbone-weights", "--pictures": "--images"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of this process) and returns its exit code."""
    return guarded(functools.partial(_run, list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help") and len(arguments) < 2:
        print_line(_overview())
        return 0
    if first == "help":
        arguments, first = [arguments[1], "--help"], arguments[1]
    if first == "--version":
        print_line(f"maskwright {__version__}")
        return 0
    if first.startswith("-"):
        if get_close_matches(first, ["--version", "--help"], 1, cutoff=0.75):
            choose(first, ["--version", "--help"], "option")
        raise UsageError(
            f"the first argument must be a command: maskwright {{{','.join(VERBS)}}}; see maskwright --help"
        )
    verb = VERBS[choose(first, VERBS, "command")]
    for argument in arguments[1:]:
        option = argument.split("=")[0].replace("_", "-")
        if option in RENAMED:
            raise UsageError(f"{first}: {option} is now {RENAMED[option]}")
    if verb is train:
        verb = train_with_recipe(arguments[1:])
    return parse(verb, arguments[1:], f"maskwright {first}")()


def _overview() -> str:
    lines = [
        textwrap.fill(
            (inspect.getdoc(verb) or "").splitlines()[0],
            help_width(),
            initial_indent=f"  {name:12} ",
            subsequent_indent=" " * 15,
        )
        for name, verb in VERBS.items()
    ]
    return "\n".join(
        [
            f"maskwright {__version__}: instance segmentation in plain PyTorch.",
            "",
            "usage: maskwright COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "Help on a command: maskwright COMMAND --help. To begin: maskwright demo",
        ]
    )
