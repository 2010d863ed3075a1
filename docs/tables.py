"""Writes the tables of systems in README.md and docs/systems/README.md from the registry.

python docs/tables.py           # rewrite the tables
python docs/tables.py --check   # exit with 1 if they are not current
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import torch

from maskwright.systems import create, names, system_class

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- systems: begin (make tables) -->", "<!-- systems: end -->"

# Systems that are described on the page of another one.
PAGES = {
    "decoupled-solo": "solo",
    "keypoint-rcnn": "mask-rcnn",
    "cascade-panoptic-fpn": "panoptic-fpn",
    "rfcn": "fcis",
    "h-detr": "mask-frozen-detr",
    "panoptic-blendmask": "blendmask",
    "panoptic-centermask": "centermask",
    "pointrend-semantic": "pointrend",
    "mobile-sam": "sam",
    "efficient-sam": "sam",
    "edge-sam": "sam",
}


def year(paper: str) -> str:
    """The year of a reference such as "He et al.: Mask R-CNN. ICCV 2017"; the last one that is named."""
    found = re.findall(r"\b((?:19|20)\d\d)\b", paper)
    return found[-1] if found else ""


@functools.cache
def outputs(name: str) -> str:
    """What a system predicts, as words, for its smallest preset."""
    small = f"{name}-small"
    with torch.device("meta"):  # weights are not needed
        system = create(small if small in system_class(name).presets else name)
    words = [word for word in ("masks", "boxes", "keypoints") if word in system.outputs]
    words += [word for word in ("panoptic", "semantic", "proposals", "prompts", "video") if word in system.tasks]
    return ", ".join(words)


def rows() -> list[tuple[str, str, str, str, str, int, str]]:
    """For each system: name, title, year, arXiv number, outputs, number of presets, page."""
    table = []
    for name in names():
        kind = system_class(name)
        page = PAGES.get(name, name)
        table.append(
            (
                name,
                kind.card.title.partition(":")[0],
                year(kind.card.paper),
                kind.card.arxiv,
                outputs(name),
                len(kind.presets),
                page,
            )
        )
    return table


def table(pages: str) -> str:
    """The Markdown table; `pages` is the path from the document to the pages of the systems."""
    lines = ["| system | name | year | paper | outputs | presets |", "|---|---|---|---|---|--:|"]
    for name, title, when, arxiv, gives, presets, page in rows():
        paper = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
        lines.append(f"| [{title}]({pages}{page}.md) | `{name}` | {when} | {paper} | {gives} | {presets} |")
    return "\n".join(lines)


def updated(text: str, pages: str) -> str:
    """`text` with the table between the markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(pages)}\n{END}{tail}"


DOCUMENTS = {ROOT / "README.md": "docs/systems/", ROOT / "docs/systems/README.md": ""}


def main() -> int:
    stale = []
    for path, pages in DOCUMENTS.items():
        before = path.read_text("utf-8")
        after = updated(before, pages)
        if after != before:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(after, "utf-8")
    for path in stale:
        sys.stderr.write(f"{'not current' if '--check' in sys.argv else 'updated'}: {path.relative_to(ROOT)}\n")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
