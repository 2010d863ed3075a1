"""A paper's ablation rerun on small data: a list of variants, one data set, one budget, several seeds, a table.

What the variants are is said where the system is (`System.ablations`); here they are trained and measured, and the
table is set beside the published one. Every run is kept, so that an interrupted ablation goes on where it stopped.
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
from typing import Any

from maskwright.errors import UsageError
from maskwright.systems import Ablation, create, system_class
from maskwright.terminal import choose, complain, progress, say

MEASURES = {
    "AP": "segm/AP",
    "AP50": "segm/AP50",
    "AP75": "segm/AP75",
    "S": "segm/APs",
    "M": "segm/APm",
    "L": "segm/APl",
}


@dataclass(frozen=True)
class Row:
    """One variant: each measure in percent for every seed, and what was published.

    A measure is no number (nan) where the scenes of a seed hold no object that it is about; mean and spread are of the
    other seeds.
    """

    variant: str
    measured: Mapping[str, Sequence[float]]
    published: Mapping[str, float]
    seeds: Sequence[int] = ()

    def mean(self, measure: str) -> float:
        """No number (nan) if there is none of any seed."""
        values = self._there(measure)
        return statistics.mean(values) if values else math.nan

    def spread(self, measure: str) -> float:
        """Standard deviation over the seeds; 0 for one."""
        values = self._there(measure)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def _there(self, measure: str) -> list[float]:
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
    """Train and measure every variant of a table with every seed; write OUT/table-NAME.md, .csv and .svg.

    system, table  names: "tensormask", "2a"; see `System.ablations`
    seeds          of weights, order and scenes; the variants of one seed see the same images in the same order
    steps          of training, the same for all
    images, unseen  generated scenes to learn from and to measure on
    changes        further fields of `training.Recipe`

    A run that stands in OUT/runs already, of the same options and budget, is not made again: neither after an
    interruption nor where two tables share a row.
    """
    kind = system_class(system)
    if not kind.ablations:
        raise UsageError(f"{system} has no tables to rerun")
    plan = kind.ablations[choose(table, kind.ablations, f"table of {system}")]
    out = Path(out)
    budget = {"steps": steps, "images": images, "unseen": unseen, **changes}
    for name in ("steps", "images", "unseen", "batch"):
        if name in budget and budget[name] < 1:
            raise UsageError(f"{name} is {budget[name]}; expected at least 1")
    seeds = tuple(dict.fromkeys(seeds))
    if not seeds:
        raise UsageError("seeds is empty; give at least one, such as --seeds 0")
    if min(seeds) < 0:
        raise UsageError(f"seeds has {min(seeds)}; expected whole numbers from 0 on")
    wanted = [(seed, variant) for seed in seeds for variant in plan.variants]
    found: dict[tuple[int, str], dict[str, float]] = {}
    rows: list[Row] = []
    for seed, variant in progress(wanted, "runs"):
        found[seed, variant] = _run(system, plan, variant, seed, out / "runs", budget, device)
        summary = ", ".join(f"{name} {value:.1f}" for name, value in found[seed, variant].items() if value == value)
        say(f"{variant}, seed {seed}: {summary}")
        rows = [
            Row(
                name,
                {m: [found[s, name][m] for s in seeds if (s, name) in found] for m in MEASURES},
                plan.published.get(name, {}),
                [s for s in seeds if (s, name) in found],
            )
            for name in plan.variants
            if any((s, name) in found for s in seeds)
        ]
        _write(out, system, table, plan, rows, budget)  # after each run: there is always something to look at
    return rows


def _run(
    system: str, plan: Ablation, variant: str, seed: int, runs: Path, budget: Mapping[str, Any], device: str
) -> dict[str, float]:
    from maskwright.checkpoints import load
    from maskwright.data import Scenes
    from maskwright.inference import evaluate
    from maskwright.training import train

    options = system_class(system).with_options(plan.base, plan.variants[variant])
    whole = create(system, **options).options  # two ways to write one variant are one run
    promise = {"system": system, "options": whole, "scenes": dict(plan.scenes), "recipe": dict(plan.recipe), **budget}
    text = json.dumps({**promise, "seed": seed}, sort_keys=True)
    folder = runs / hashlib.sha256(text.encode()).hexdigest()[:12]
    kept = folder / "measured.json"
    if kept.exists() and (known := _kept(kept)) is not None:
        return known
    changes = {k: v for k, v in budget.items() if k not in ("images", "unseen")}
    learn = Scenes(budget["images"], seed=seed, **plan.scenes)
    judge = Scenes(budget["unseen"], seed=seed + 10_000, **plan.scenes)
    recipe = {"tensorboard": False, "workers": 0, **plan.recipe, **changes}
    best = train(
        system, learn, val=False, out=folder, options=options, seed=seed, device=device, resume=True, **recipe
    )  # fmt: skip
    result = evaluate(load(best), judge, examples=0, device=None if device == "auto" else device)
    # COCO's -1 says that there are no objects of this kind: not a number, and no column of the table.
    found = {name: float(result.summary[key]) for name, key in MEASURES.items()}
    measured = {name: 100 * value if value >= 0 else float("nan") for name, value in found.items()}
    _put(kept, json.dumps({"variant": variant, "promise": json.loads(text), "measured": measured}) + "\n")
    for name in ("best.safetensors", "last.safetensors", "last.ckpt"):  # numbers are what an ablation is for
        (folder / name).unlink(missing_ok=True)
    return measured


def _kept(path: Path) -> dict[str, float] | None:
    """The measures of a run that was made before; None, said aloud, where the file is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))["measured"]
        return {name: float(found[name]) for name in MEASURES}
    except (ValueError, KeyError, TypeError):
        complain(f"{path} is damaged; the run is made again")
        return None


def _write(out: Path, system: str, table: str, plan: Ablation, rows: Sequence[Row], budget: Mapping[str, Any]) -> None:
    told = [m for m in MEASURES if not all(math.isnan(row.mean(m)) for row in rows)]
    also = [m for m in MEASURES if any(m in row.published for row in rows)]
    seeds = max(len(row.measured["AP"]) for row in rows)
    words = ", ".join(f"{name} {value}" for name, value in budget.items())
    lines = [
        f"# {system}, table {table}: {plan.title}",
        "",
        f"Measured on generated scenes ({json.dumps(dict(plan.scenes))}; {words}), mean and standard deviation of "
        f"{seeds} seed{'s' if seeds > 1 else ''}; published: {plan.protocol}. What can be compared is the order of the "
        "rows and how far they are apart, not the numbers.",
        "",
        "| variant | " + " | ".join([*told, *(f"published {m}" for m in also)]) + " |",
        "|---|" + "--:|" * (len(told) + len(also)),
    ]
    for row in rows:
        cells = ["–" if math.isnan(row.mean(m)) else f"{row.mean(m):.1f} ± {row.spread(m):.1f}" for m in told]
        cells += [f"{row.published[m]:.1f}" if m in row.published else "" for m in also]
        lines.append(f"| {row.variant} | " + " | ".join(cells) + " |")
    _put(out / f"table-{table}.md", "\n".join(lines) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", *MEASURES])
    for row in rows:
        for number, seed in enumerate(row.seeds):
            writer.writerow([row.variant, seed, *(f"{row.measured[m][number]:.4f}" for m in MEASURES)])
    _put(out / f"table-{table}.csv", text.getvalue())
    _put(out / f"table-{table}.svg", chart(rows))


def chart(rows: Sequence[Row]) -> str:
    """Bars of AP, measured and published side by side, as one SVG that stands alone."""
    left = 24 + 7 * max([len(row.variant) for row in rows] + [14])  # 7: a letter of 12 pixels, wide ones too
    long, line, top = 400, 34, 26
    width, height = left + long + 70, top + line * len(rows) + 10
    ends = [row.mean("AP") + row.spread("AP") for row in rows] + [row.published.get("AP", 0.0) for row in rows]
    scale = long / max([end for end in ends if not math.isnan(end)] + [1.0])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16" fill="#2563eb">mask AP, measured here</text>',
        f'<text x="{left + 160}" y="16" fill="#9ca3af">published</text>',
    ]
    for number, row in enumerate(rows):
        y = top + line * number
        parts.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end" fill="#111827">{_escaped(row.variant)}</text>'
        )
        value, spread = row.mean("AP"), row.spread("AP")
        if math.isnan(value):
            parts.append(f'<text x="{left + 5}" y="{y + 13}" fill="#111827">–</text>')
        else:
            parts.append(f'<rect x="{left}" y="{y + 3}" width="{value * scale:.1f}" height="12" fill="#2563eb"/>')
            low, high = left + max(0.0, value - spread) * scale, left + (value + spread) * scale
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}" stroke="#111827"/>')
            parts.append(f'<text x="{high + 5:.1f}" y="{y + 13}" fill="#111827">{value:.1f}</text>')
        if "AP" in row.published:
            far = row.published["AP"] * scale
            parts.append(f'<rect x="{left}" y="{y + 17}" width="{far:.1f}" height="9" fill="#d1d5db"/>')
            parts.append(f'<text x="{left + far + 5:.1f}" y="{y + 26}" fill="#6b7280">{row.published["AP"]:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _put(path: Path, text: str) -> None:
    """Written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
