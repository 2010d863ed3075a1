"""The page and the tables of a comparison."""

from __future__ import annotations

import csv
import io
import math
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maskwright._version import __version__
from maskwright.comparison.profile import as_profile
from maskwright.comparison.state import CERTAIN, TASKS, Candidate, Comparison
from maskwright.errors import DataError
from maskwright.evaluation.charts import chart
from maskwright.evaluation.result import Result
from maskwright.files import write_bytes, write_text
from maskwright.structures import Instances
from maskwright.text import printable

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "boundary AP")
_SIDE = 300  # pixels of the longer side of a drawing


@dataclass(frozen=True)
class Shown:
    """An image about which systems disagree.

    Attributes:
        name: What the page calls it.
        agreement: See `agreement`.
        image: The pixels (C, H, W).
        truth: The annotations.
        found: The confident predictions by system; None where a system has none.
    """

    name: str
    agreement: float
    image: Tensor
    truth: Instances
    found: Mapping[str, Instances | None]


def pareto_front(candidates: Sequence[Candidate]) -> set[str]:
    """Labels of the candidates than which no other is both better (AP, of the same kind as the first) and faster."""
    alike = [c for c in candidates if c.measured.get("ms") and c.task == candidates[0].task]
    known = [(c.label, c.score, c.measured["ms"]) for c in alike]
    return {
        label
        for label, score, ms in known
        if not any(s >= score and m <= ms and (s > score or m < ms) for _, s, m in known)
    }


def verdict(state: Comparison) -> str:
    """The answer of a comparison in a sentence or two."""
    ranked, finalists = state.ranking(), state.finalists()
    if not ranked:
        if state.candidates and all(c.failed for c in state.candidates):
            return "Nothing has been measured, as all systems have failed; the same command tries them again."
        return "Nothing has been measured yet."
    best = ranked[0]
    if best.score < 0.01:
        return (
            f"No system has learned enough to be compared: the highest AP is {_percent(best.score)}. Give more steps."
        )
    ap = f"{best.label} has the highest AP{_kind_of(best)}, {_percent(best.score)}"
    bounds = state.intervals.get("AP", {}).get(best.label)
    if bounds is not None and not math.isnan(bounds[0]):
        ap += f" (95 % interval {_percent(bounds[0])} to {_percent(bounds[1])})"
    if not finalists:
        return f"All finalists have failed. In the rounds before, {ap}."
    others = [c for c in ranked if c.out is None and c.failed is None and c.task != best.task]
    aside = (
        f" Not compared, because their AP is of another kind: {', '.join(map(_with_kind, others))}." if others else ""
    )
    if not state.even:
        return f"So far {ap}. Not all systems have been trained and measured alike yet.{aside}"
    if len(finalists) < 2:
        return f"{ap}.{aside}"
    if state.winner() is not None:
        return f"{ap}, which no interval of another finalist reaches.{aside}"
    images = state.intervals.get("images", CERTAIN)
    if images < CERTAIN:
        return (
            f"There is no winner: {ap}, but a lead is never certain on {images} "
            f"{'image' if images == 1 else 'images'} with objects, only on {CERTAIN} or more.{aside}"
        )
    close = state.close_to_best()
    text = f"There is no winner: {ap}, and the intervals of {', '.join(c.label for c in close)} overlap with it."
    leads = [(c.label, bounds) for c in close if (bounds := state.intervals.get("leads", {}).get(c.label))]
    ahead = [f"{label} by {_percent(low)} to {_percent(high)}" for label, (low, high) in leads if low > 0]
    if ahead:
        text += f" On the same images it is ahead of {', '.join(ahead)}, but each was trained once."
    fast = min((c for c in [best, *close] if c.measured.get("ms")), key=lambda c: c.measured["ms"], default=None)
    further = f" Of these, {fast.label} is the fastest ({fast.measured['ms']:.0f} ms)." if fast is not None else ""
    return text + further + aside


def _kind_of(candidate: Candidate) -> str:
    return "" if candidate.task == TASKS[0] else f" of {candidate.task}"


def _with_kind(candidate: Candidate) -> str:
    return f"{candidate.label} ({candidate.task})"


def next_command(state: Comparison, source: str, options: Sequence[str] = ()) -> str:
    """The command that continues with the best candidate, for a POSIX shell.

    Args:
        state: The comparison.
        source: The data set's argument on the command line.
        options: Further arguments of `maskwright train`.
    """
    ranked = [c for c in state.ranking() if c.weights]
    if not ranked:
        return ""
    best = ranked[0]
    steps = max(1000, 4 * best.steps)
    command = ["maskwright", "train", best.name if best.trained else str(best.weights), "--data", source, *options]
    if best.trained:
        command += ["--weights", str(best.weights)]
    return shlex.join([*command, "--steps", str(steps), "--out", f"runs/{best.label}"])


def write_tables(state: Comparison, folder: Path) -> None:
    """Write table.csv and table.md.

    Raises:
        DataError: If a file cannot be written.
    """
    heads, rows = _table(state)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    write_text(folder / "table.csv", text.getvalue(), DataError)
    heads, rows = _without_empty_columns(heads, rows)
    if not rows:
        write_text(folder / "table.md", f"{verdict(state)}\n", DataError)
        return
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]
    body = "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)
    write_text(folder / "table.md", f"{verdict(state)}\n\n{body}\n", DataError)


def _markdown(cell: str) -> str:
    """Text in a cell of a Markdown table."""
    return printable(cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def write_page(
    state: Comparison, folder: Path, results: Mapping[str, Result], shown: Sequence[Shown], source: str,
    options: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write index.html, one file with everything in it.

    Args:
        state: The comparison.
        folder: The folder.
        results: The result of each measured candidate.
        shown: Images about which systems disagree.
        source: The data set's argument on the command line.
        options: Further arguments of the command that continues with the best candidate.

    Returns:
        The path.

    Raises:
        DataError: If it cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    house = Environment(
        loader=FileSystemLoader([here / "templates", here.parent / "evaluation" / "templates"]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    heads, rows = _without_empty_columns(*_table(state))
    ranked = state.ranking()
    points = {
        c.label: ([float(c.measured["ms"])], [c.score])
        for c in ranked
        if c.measured.get("ms") and c.task == ranked[0].task
    }
    classes = _class_rows(ranked, results)
    page = house.get_template("comparison.html.j2").render(
        title=f"Systems compared on {printable(state.data)}",
        version=__version__, state=state, profile=as_profile(state.profile).words(), verdict=verdict(state),
        heads=heads, rows=rows, timed="ms" in heads, front=pareto_front(ranked), ranked=ranked, classes=classes,
        failed=[(c.label, printable(c.failed)) for c in state.candidates if c.failed],
        untimed=[
            (c.label, printable(str(why))) for c in ranked if (why := c.measured.get("footprint", {}).get("error"))
        ],
        waiting=[c for c in state.candidates if c.score < 0 and not c.failed],
        pareto=chart(points, x_name="milliseconds per image", percent=True) if len(points) > 1 else "",
        command=next_command(state, source, options),
        pictures=[_drawn(each, ranked) for each in shown],
        protocol=results[ranked[0].label].protocol.facts() if ranked else [],
    )  # fmt: skip
    return write_bytes(folder / "index.html", page.encode("utf-8", "backslashreplace"), DataError)


def _table(state: Comparison) -> tuple[list[str], list[list[str]]]:
    ranked = state.ranking()
    columns = [name for name in COLUMNS if any(c.measured.get(name, -1) >= 0 for c in ranked)]
    mixed = len({c.task for c in ranked}) > 1
    heads = ["system", *(["AP of"] if mixed else []), *columns, "95 % interval", "calibration error", "ms", "MB",
             "form", "parameters / 1e6", "steps", "licence of the weights", "Pareto"]  # fmt: skip
    front = pareto_front(ranked)
    rows: list[list[str]] = []
    for c in ranked:
        bounds = state.intervals.get("AP", {}).get(c.label)
        parameters = c.measured.get("parameters")
        rows.append([
            c.label,
            *([c.task] if mixed else []),
            *(_percent(c.measured.get(name, -1)) for name in columns),
            _interval(c, bounds),
            _digits(c.measured.get("calibration"), 2),
            _digits(c.measured.get("ms"), 0),
            _digits(c.measured.get("MB"), 0),
            str(c.measured.get("form", "")),
            "" if parameters is None else f"{parameters / 1e6:.1f}",
            str(c.steps) if c.trained else "",
            str(c.measured.get("licence", "")),
            "yes" if c.label in front else "",
        ])  # fmt: skip
    return heads, rows


def _without_empty_columns(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table for readers: without columns of figures that no system has."""
    kept = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return [heads[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _interval(candidate: Candidate, bounds: Sequence[float] | None) -> str:
    if candidate.failed is not None:
        return "failed"
    if candidate.out is not None:
        return f"left out after round {candidate.out + 1}"
    return f"{_percent(bounds[0])} to {_percent(bounds[1])}" if bounds is not None else ""


def _class_rows(ranked: Sequence[Candidate], results: Mapping[str, Result]) -> list[tuple[str, int, list[str]]]:
    """AP of each class by system; empty for a single class."""
    if not ranked or len(results[ranked[0].label].classes) < 2:
        return []
    first = results[ranked[0].label]
    rows: list[tuple[str, int, list[str]]] = []
    for row in sorted(first.per_class, key=lambda r: -r["objects"])[:40]:
        cells: list[str] = []
        for c in ranked:
            result = results[c.label]
            values = [r.get(f"{result.kinds[0]}/AP", -1) for r in result.per_class if r["class"] == row["class"]]
            cells.append(_percent(values[0] if values else -1))
        rows.append((printable(row["class"]), int(row["objects"]), cells))
    return rows


def _drawn(shown: Shown, ranked: Sequence[Candidate]) -> dict[str, Any]:
    """The drawings of an image: the annotations, then each system."""
    empty = Instances.empty(shown.truth.image_size)
    finalists = [c.label for c in ranked if c.label in shown.found]
    pictures = [("annotated", _picture(shown.image, shown.truth))]
    pictures += [(label, _picture(shown.image, shown.found[label] or empty)) for label in finalists]
    return {"name": printable(shown.name), "agreement": f"{100 * shown.agreement:.0f} %", "pictures": pictures}


def _picture(image: Tensor, objects: Instances) -> str:
    pixels: Any = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)).contiguous()
    drawn = objects.draw(pixels, labels=False)
    share = min(1.0, _SIDE / max(drawn.size))
    small = drawn.convert("RGB").resize([max(1, round(side * share)) for side in drawn.size])  # pyright: ignore[reportArgumentType] - a list is accepted
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return b64encode(data.getvalue()).decode("ascii")


def _percent(value: Any) -> str:
    return "" if value is None or not np.isfinite(value) or value < 0 else f"{100 * value:.1f}"


def _digits(value: Any, digits: int) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"
