"""The table of docs/export.md: every system exported to ONNX, and what differs from PyTorch.

    python benchmarks/export_table.py                     # all systems, their -small presets; about half an hour
    python benchmarks/export_table.py yolact solo --suffix .xml
    python benchmarks/export_table.py --write             # into docs/export.md, between the markers of the table

Weights are random, scores near one another and masks near their threshold, so that rounding shows more than with
trained weights. Times are those of one image, preprocessing and decoding included, on one thread.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import torch

import maskwright as mw
from maskwright.systems import describe, names

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
HEADER = """| system | opset | MB | objects | boxes (px) | scores | mask pixels | network | CPU s | of PyTorch |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def row(name: str, folder: Path, suffix: str) -> str:
    """One line of the table; the reason if the system cannot be exported."""
    torch.manual_seed(0)
    classes = {} if "proposals" in describe(f"{name}-small").tasks else {"classes": ("a", "b")}
    try:
        done = mw.export(mw.create(f"{name}-small", **classes).eval(), folder / f"{name}{suffix}")
    except mw.MaskwrightError as error:
        return f"| {name} | {error} |"
    own = done.difference
    share = own.cpu_seconds / max(own.torch_cpu_seconds, 1e-9)
    return (
        f"| {name} | {done.opset} | {done.size / 1e6:.1f} | {own.objects} | {own.box:.1g} | {own.score:.1g} | "
        f"{100 * own.mask:.2g} % | {own.raw:.1g} | {own.cpu_seconds:.2f} | {share:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM")
    parser.add_argument("--suffix", default=".onnx", choices=(".onnx", ".xml"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [HEADER]
    print(HEADER)
    for name in options.systems or names():
        if name.startswith("sam"):
            continue  # encoder and decoder have a form of their own
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, Path(folder), options.suffix))
        print(lines[-1], flush=True)
    if options.write:
        text = PAGE.read_text("utf-8")
        begin, end = (re.escape(mark) for mark in MARKS)
        table = "\n".join([MARKS[0], *lines, MARKS[1]])
        PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: table, text, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
