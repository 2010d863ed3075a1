"""Ablation tables of papers, rerun on small generated data with several seeds.

`System.ablations` defines the variants. This module trains and evaluates them and writes the results next to the
published ones. Every run is stored, so that an interrupted ablation continues where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskwright.errors import DataError, UsageError
from maskwright.files import write_text
from maskwright.systems import Ablation, create, system_class
from maskwright.terminal import choose, print_error, print_line, progress

if TYPE_CHECKING:
    from maskwright.evaluation.result import Result


@dataclass(frozen=True)
class Row:
    """Results of one variant.

    Attributes:
        variant: Name of the variant.
        measured: For each measure the values of all seeds, in percent; NaN if the scenes of a seed have no object of
            the measure's size.
        published: Published values by measure, in percent.
        seeds: The seeds.
    """

    variant: str
    measured: Mapping[str, Sequence[float]]
    published: Mapping[str, float]
    seeds: Sequence[int] = ()

    def mean(self, measure: str) -> float:
        """Mean over the seeds without NaN; NaN if there are none."""
        values = self._finite(measure)
        return statistics.mean(values) if values else math.nan

    def spread(self, measure: str) -> float:
        """Standard deviation over the seeds without NaN; 0 for fewer than two."""
        values = self._finite(measure)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def _finite(self, measure: str) -> list[float]:
        return [value for value in self.measured[measure] if not math.isnan(value)]


def ablate(
    system: str,
    table: str,
    *,
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 400,
    images: int = 400,
    unseen: int = 100,
    device: str = "auto",
    **changes: Any,
) -> list[Row]:
    """Train and evaluate every variant of a table with every seed, and write OUT/table-NAME.md, .csv and .svg.

    Runs in OUT/runs with the same options and budget are reused, after an interruption and by other tables that share
    a row.

    Args:
        system: Name of the system, such as "tensormask".
        table: Name of a table in `System.ablations`, such as "2a".
        out: The output folder.
        seeds: Seeds of weights, order and scenes. All variants with one seed see the same images in the same order.
        steps: Training steps of each run.
        images: Number of generated scenes for training.
        unseen: Number of generated scenes for evaluation.
        device: Device to train on; "auto" uses a GPU if there is one.
        **changes: Further fields of `training.Recipe`.

    Returns:
        One row per variant.

    Raises:
        UsageError: If the system has no such table, or an argument is out of range.
        DataError: If a file cannot be written.
    """
    kind = system_class(system)
    if not kind.ablations:
        raise UsageError(f"{system} has no tables to rerun")
    plan = kind.ablations[choose(table, kind.ablations, f"table of {system}")]
    out = Path(out)
    budget = {"steps": steps, "images": images, "unseen": unseen, **changes}
    for name in ("steps", "images", "unseen", "batch"):
        if name in budget and budget[name] < 1:
            raise UsageError(f"{name} must be at least 1, got {budget[name]}")
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds:
        raise UsageError("seeds is empty; pass at least one, such as --seeds 0")
    if min(seeds) < 0:
        raise UsageError(f"seeds must be integers of at least 0, got {min(seeds)}")
    wanted = [(seed, variant) for seed in seeds for variant in plan.variants]
    found: dict[tuple[int, str], dict[str, float]] = {}
    rows: list[Row] = []
    for seed, variant in progress(wanted, "runs"):
        if (seed, variant) not in found:
            found |= {
                (seed, row): v for row, v in _run(system, plan, variant, seed, out / "runs", budget, device).items()
            }
        summary = ", ".join(f"{name} {value:.1f}" for name, value in found[seed, variant].items() if value == value)
        print_line(f"{variant}, seed {seed}: {summary}")
        rows = [
            Row(
                name,
                {m: [found[s, name][m] for s in seeds if (s, name) in found] for m in plan.columns},
                plan.published.get(name, {}),
                [s for s in seeds if (s, name) in found],
            )
            for name in plan.variants
            if any((s, name) in found for s in seeds)
        ]
        _write(out, system, table, plan, rows, budget)  # after each run, so that intermediate results are visible
    return rows


def _run(
    system: str, plan: Ablation, variant: str, seed: int, runs: Path, budget: Mapping[str, Any], device: str
) -> dict[str, dict[str, float]]:
    """The measures of one variant with one seed, and of the others that differ from it in decoding alone; from an
    earlier run if there is one."""
    from maskwright.checkpoints import load
    from maskwright.data import Scenes
    from maskwright.inference import evaluate
    from maskwright.training import train

    kind = system_class(system)
    every = {name: create(system, **kind.with_options(plan.base, own)).options for name, own in plan.variants.items()}
    whole = every[variant]  # complete options identify the run however the variant is written
    rows = [name for name, options in every.items() if options == whole]
    promise = {"system": system, "options": whole, "scenes": dict(plan.scenes), "recipe": dict(plan.recipe), **budget}
    text = json.dumps({**promise, "seed": seed}, sort_keys=True)
    folder = runs / hashlib.sha256(text.encode()).hexdigest()[:12]
    files = {name: folder / _measured(plan, name) for name in rows}
    kept = {name: known for name, path in files.items() if path.exists() and (known := _kept(path, plan)) is not None}
    if len(kept) == len(rows):
        return kept
    changes = {k: v for k, v in budget.items() if k not in ("images", "unseen")}
    learn = Scenes(budget["images"], seed=seed, **plan.scenes)
    judge = Scenes(budget["unseen"], seed=seed + 10_000, **plan.scenes)
    recipe: dict[str, Any] = {"tensorboard": False, "workers": 0, **plan.recipe, **changes}
    options = kind.with_options(plan.base, plan.variants[variant])
    best = train(system, learn, val=False, out=folder, options=options, seed=seed, device=device, resume=True, **recipe)
    trained = load(best)
    for name in rows:
        place = None if device == "auto" else device
        result = evaluate(trained, judge, examples=0, device=place, **plan.decoding.get(name, {}))
        # COCO's -1 means that there are no objects of this size.
        found = {column: _value(result, key) for column, key in plan.columns.items()}
        kept[name] = {column: 100 * value if value >= 0 else float("nan") for column, value in found.items()}
        record = {"variant": name, "promise": json.loads(text), "measured": kept[name]}
        write_text(files[name], json.dumps(record) + "\n", DataError)
    for name in ("best.safetensors", "last.safetensors", "last.ckpt"):  # only the measures are needed
        (folder / name).unlink(missing_ok=True)
    return kept


def _measured(plan: Ablation, variant: str) -> str:
    """The file of a row's measures, in the folder of its training."""
    about = {"decoding": plan.decoding.get(variant, {}), "measures": plan.measures}
    if not about["decoding"] and about["measures"] is None:
        return "measured.json"
    return f"measured-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}.json"


def _value(result: Result, key: str) -> float:
    """A value of the summary, or the mean of a curve; -1 if there is none."""
    if key in result.summary:
        return float(result.summary[key])
    curve = result.curves.get(key)
    return statistics.mean(curve) if curve else -1.0


def _kept(path: Path, plan: Ablation) -> dict[str, float] | None:
    """The measures of an earlier run; None, with a message, if the file is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))["measured"]
        return {name: float(found[name]) for name in plan.columns}
    except (ValueError, KeyError, TypeError):
        print_error(f"{path} is damaged; the run is repeated")
        return None


def _write(out: Path, system: str, table: str, plan: Ablation, rows: Sequence[Row], budget: Mapping[str, Any]) -> None:
    """Write the table as Markdown, CSV and SVG."""
    shown = [m for m in plan.columns if not all(math.isnan(row.mean(m)) for row in rows)]
    also = [m for m in plan.columns if any(m in row.published for row in rows)]
    seeds = max(len(row.seeds) for row in rows)
    words = ", ".join(f"{name} {value}" for name, value in budget.items())
    lines = [
        f"# {system}, table {table}: {plan.title}",
        "",
        f"Measured on generated scenes ({json.dumps(dict(plan.scenes))}; {words}), mean and standard deviation of "
        f"{seeds} seed{'s' if seeds > 1 else ''}; published: {plan.protocol}. Compare the order of the rows and their "
        "differences, not the absolute values.",
        "",
        "| variant | " + " | ".join([*shown, *(f"published {m}" for m in also)]) + " |",
        "|---|" + "--:|" * (len(shown) + len(also)),
    ]
    for row in rows:
        cells = ["–" if math.isnan(row.mean(m)) else f"{row.mean(m):.1f} ± {row.spread(m):.1f}" for m in shown]
        cells += [f"{row.published[m]:.1f}" if m in row.published else "" for m in also]
        lines.append(f"| {row.variant} | " + " | ".join(cells) + " |")
    write_text(out / f"table-{table}.md", "\n".join(lines) + "\n", DataError)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", *plan.columns])
    for row in rows:
        for number, seed in enumerate(row.seeds):
            writer.writerow([row.variant, seed, *(f"{row.measured[m][number]:.4f}" for m in plan.columns)])
    write_text(out / f"table-{table}.csv", text.getvalue(), DataError)
    write_text(out / f"table-{table}.svg", chart(rows, next(iter(plan.columns))), DataError)


def chart(rows: Sequence[Row], measure: str = "AP") -> str:
    """A bar chart of a measure, as measured and as published.

    Args:
        rows: The rows of a table.
        measure: Name of the measure.

    Returns:
        A self-contained SVG document.
    """
    left = 24 + 7 * max([len(row.variant) for row in rows] + [14])  # 7 pixels: width of a letter at 12 pixels
    long, line, top = 400, 34, 26
    width, height = left + long + 70, top + line * len(rows) + 10
    ends = [row.mean(measure) + row.spread(measure) for row in rows] + [row.published.get(measure, 0.0) for row in rows]
    scale = long / max([end for end in ends if not math.isnan(end)] + [1.0])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" fill="#2563eb">{_escaped(measure)}, measured here</text>',
        f'<text x="{left + 160}" y="16" fill="#9ca3af">published</text>',
    ]
    for number, row in enumerate(rows):
        y = top + line * number
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end" fill="#111827">{_escaped(row.variant)}</text>'
        )
        value, spread = row.mean(measure), row.spread(measure)
        if math.isnan(value):
            parts.append(f'<text x="{left + 5}" y="{y + 13}" fill="#111827">–</text>')
        else:
            parts.append(f'<rect x="{left}" y="{y + 3}" width="{value * scale:.1f}" height="12" fill="#2563eb"/>')
            low, high = left + max(0.0, value - spread) * scale, left + (value + spread) * scale
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="#111827"/>')
            parts.append(f'<text x="{high + 5:.1f}" y="{y + 13}" fill="#111827">{value:.1f}</text>')
        if measure in row.published:
            far, value = row.published[measure] * scale, row.published[measure]
            parts.append(f'<rect x="{left}" y="{y + 17}" width="{far:.1f}" height="9" fill="#d1d5db"/>')
            parts.append(f'<text x="{left + far + 5:.1f}" y="{y + 26}" fill="#6b7280">{value:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
