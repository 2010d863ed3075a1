"""The tables of docs/export.md: every system exported to ONNX in both forms, and what differs from PyTorch.

    python benchmarks/export_table.py                     # all systems, their -small presets; about twenty minutes
    python benchmarks/export_table.py yolact solo --suffix .xml
    python benchmarks/export_table.py --form graph --write   # into docs/export.md: the rows of these systems change

Weights are random, scores near one another and masks near their threshold, so that rounding shows more than with
trained weights; graphs have a score threshold of zero, so that all rows are compared. Times are those of one image of
240 x 320 pixels, preprocessing and decoding included, on one thread.
"""

from __future__ import annotations

import argparse
import inspect
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import maskwright as mw
from maskwright.inference.exporting.decoders import SEGMENTERS
from maskwright.systems import describe, names, presets, system_class
from maskwright.systems.kinds.promptable import PromptableSystem

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
HEADER = """| system | opset | MB | objects | boxes (px) | scores | mask pixels | CPU s | of PyTorch |
|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def marks(form: str) -> tuple[str, str]:
    """What encloses the table of a form on the page."""
    return f"<!-- table: {form} begin -->", f"<!-- table: {form} end -->"


def row(name: str, folder: Path, suffix: str, form: str, task: str = "instances") -> str:
    """One line of the table; the reason if the system cannot be exported."""
    torch.manual_seed(0)
    title = name if task == "instances" else f"{name}, {task}"
    options: dict[str, Any] = {} if "proposals" in describe(f"{name}-small").tasks else {"classes": ("a", "b", "c")}
    more: dict[str, Any] = {}
    if form == "graph":
        if "stuff" in inspect.signature(system_class(name)).parameters:
            options["stuff"] = ("b",)
        promptable = issubclass(system_class(name), PromptableSystem)
        more = {} if promptable else {"score_threshold": 0.0, "task": task}
    try:
        system = mw.create(f"{name}-small", **options).eval()
        done = mw.export(system, folder / f"{name}{suffix}", form=form, **more)
    except mw.MaskwrightError as error:
        return f"| {title} | {error} |"
    own = done.difference
    share = own.cpu_seconds / max(own.torch_cpu_seconds, 1e-9)
    masks = f"{100 * own.mask:.2g} %" if "masks" in system.outputs else "–"
    title += " (fixed size)" if form == "networks" and done.fixed else ""
    return (
        f"| {title} | {done.opset} | {done.size / 1e6:.1f} | "
        f"{own.objects} | {own.box:.1g} | {own.score:.1g} | {masks} | {own.cpu_seconds:.2f} | {share:.2f} |"
    )


def write(form: str, lines: list[str]) -> None:
    """Puts rows into the table of a form on the page, in place of those of the same systems."""
    text, (begin, end) = PAGE.read_text("utf-8"), marks(form)
    found = re.search(f"{re.escape(begin)}(.*){re.escape(end)}", text, flags=re.DOTALL)
    assert found is not None, f"{PAGE} has no table {form}"
    known = {key(line): line for line in found[1].strip().splitlines()[2:]}
    known |= {key(line): line for line in lines}
    order = [*names(), *(f"{name}, panoptic" for name in names())]
    rows = sorted((line for name, line in known.items() if name in order), key=lambda line: order.index(key(line)))
    PAGE.write_text(text.replace(found[0], "\n".join([begin, HEADER, *rows, end])), "utf-8")


def key(line: str) -> str:
    """The system, and the task, of a row."""
    return line.split("|")[1].replace("(fixed size)", "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM")
    parser.add_argument("--form", default="networks", choices=("networks", "graph"))
    parser.add_argument("--suffix", default=".onnx", choices=(".onnx", ".xml"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(HEADER)
    for name in options.systems or names():
        if f"{name}-small" not in presets():
            continue
        for task in ("instances", "panoptic") if options.form == "graph" and name in SEGMENTERS else ("instances",):
            with tempfile.TemporaryDirectory() as folder:
                line = row(name, Path(folder), options.suffix, options.form, task)
            print(line, flush=True)
            if options.write:
                write(options.form, [line])


if __name__ == "__main__":
    main()
