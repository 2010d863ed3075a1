"""The report: one HTML file with everything in it, to be opened from disk, mailed, or kept beside the weights."""

from __future__ import annotations

import csv
import io
import json
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from maskwright._version import __version__
from maskwright.errors import DataError
from maskwright.evaluation.charts import Line, chart
from maskwright.evaluation.coco import RECALLS
from maskwright.evaluation.confusion import Confusion
from maskwright.evaluation.result import Example, Result, percent
from maskwright.files import remove_stale_parts, write_bytes
from maskwright.structures import Instances

KIND_NAMES = {"segm": "masks", "bbox": "boxes", "keypoints": "keypoints", "boundary": "mask boundaries"}
SIZE_NAMES = {"s": "small, under 32² pixels", "m": "medium, 32² to 96²", "l": "large, over 96²"}
DIVIDED = (("panoptic",), ("semantic",))  # measured on whole images instead of objects
MOST_CLASSES = 20  # in the confusion matrix, which then fits a screen; those with most errors are shown
MOST_IDS = 60  # image ids shown per cell


def report(source: Result | str | Path, path: str | Path | None = None, *, title: str | None = None) -> Path:
    """Writes the report page.

    Args:
        source: A run folder (its recipe.json, log.csv and result.json are used if present), a saved result, or a
            `Result`.
        path: The page; default: report.html in the run folder, or in the current folder for a result.
        title: Title; default: the result's, or the name of the folder.

    Returns:
        The path of the page.

    Raises:
        DataError: If a file is damaged, or the folder has none of them.
    """
    folder, result = None, source
    if not isinstance(result, Result):
        folder = Path(result)
        if not folder.is_dir():
            folder, result = None, Result.load(folder)
        else:
            result = Result.load(folder / "result.json") if (folder / "result.json").exists() else None
    log = _read_log(folder / "log.csv") if folder and (folder / "log.csv").exists() else {}
    recipe = _read_recipe(folder / "recipe.json") if folder and (folder / "recipe.json").exists() else []
    if result is None and not log:
        raise DataError(
            f"{folder}: has neither result.json nor log.csv; expected a run folder of train or a saved result"
        )
    path = Path(path) if path is not None else (folder or Path()) / "report.html"
    remove_stale_parts(path.parent)
    name = title or (result.title if result else "") or (folder.resolve().name if folder else "Evaluation")
    # Names may have lone surrogates (of bytes that are not UTF-8), which are shown as escapes.
    page = _render(name, result, log, recipe).encode("utf-8", "backslashreplace")
    return write_bytes(path, page)


def _render(title: str, result: Result | None, log: dict[str, Line], recipe: list[tuple[str, str]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    house = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast(dict[str, Any], house.filters)  # pyright: ignore[reportUnknownMemberType] - not typed by Jinja
    filters["percent"] = percent
    return house.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        result=result,
        recipe=recipe,
        training=_training_charts(log),
        headline=_headline(result) if result else [],
        divided=_divided(result) if result else None,
        averages=_averages(result) if result else None,
        recall_charts=_recall_charts(result) if result else [],
        sizes=_size_rows(result) if result else [],
        classes=_class_rows(result) if result and result.kinds[:1] not in DIVIDED else [],
        absent=[row["class"] for row in result.per_class if not row["objects"]] if result else [],
        class_kinds=[k for k in (result.kinds if result else ()) if k != "boundary"],
        kind_names=KIND_NAMES,
        confusion=_confusion_table(result.confusion) if result and result.confusion else None,
        examples=_galleries(result) if result else [],
        shown_ids={str(e.score.id) for e in result.examples} if result else set(),
    )


# ---- the run folder --------------------------------------------------------------------------------------------------


def _read_log(path: Path) -> dict[str, Line]:
    """Every series of log.csv (step, epoch, name, value) as steps and values.

    An incomplete last line, which a killed run leaves, is ignored.
    """
    series: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected the log.csv of a training run") from None
    rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
    header = next(_lines(rows, path), list[str]())
    wanted = ("step", "name", "value")
    if any(column not in header for column in wanted):
        raise DataError(f"{path}: its first line is {_cut(','.join(header))!r}; expected step,epoch,name,value")
    step, name, value = (header.index(column) for column in wanted)
    for row in _lines(rows, path):
        try:
            x, y = float(row[step]), float(row[value])
            line = series[row[name]]
        except (ValueError, IndexError):
            raise DataError(
                f"{path}: line {rows.line_num} is {_cut(','.join(row))!r}; expected step,epoch,name,value"
            ) from None
        line[0].append(x)
        line[1].append(y)
    return dict(series)


def _lines(rows: Any, path: Path) -> Iterator[list[str]]:
    """The rows of a CSV reader; DataError for a line that is none."""
    try:
        yield from rows
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: {error}; expected step,epoch,name,value") from None


def _read_recipe(path: Path) -> list[tuple[str, str]]:
    try:
        return _flat(json.loads(path.read_bytes().decode("utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not the JSON of a recipe ({error})") from None


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(values, dict):
        named = cast(dict[str, Any], values)
        return [pair for key, value in named.items() for pair in _flat(value, f"{prefix}{key}.")]
    text = "–" if values is None else values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return [(prefix.rstrip(".") or "recipe", text if len(text) <= 300 else text[:300] + " ...")]


def _training_charts(log: dict[str, Line]) -> list[tuple[str, Any]]:
    """Loss; its terms; AP; the learning rate; and one chart for each group of other names."""
    groups: dict[str, dict[str, Line]] = defaultdict(dict)
    for name, line in log.items():
        last = name.split("/")[-1]
        if last == "loss":
            groups["Loss"][name] = line
        elif last.startswith("loss"):
            which = "Loss by term, validation" if name.startswith("val") else "Loss by term, training"
            groups[which][last.removeprefix("loss_")] = line
        elif last in ("AP", "AP50", "AP75"):
            groups["Average precision on validation images"][name.removeprefix("val/")] = line
        elif last.startswith(("AP", "AR")):
            continue  # by size and by limit: in the tables below
        elif last.startswith("lr"):
            groups["Learning rate"][name] = line
        else:
            groups[name.replace("_", " ")][name] = line
    order = ["Loss", "Average precision on validation images", "Loss by term, training", "Loss by term, validation"]
    titles = sorted(groups, key=lambda t: order.index(t) if t in order else len(order))
    drawn = [(t, chart(_bounded(groups[t], 12), percent=t.startswith("Average"))) for t in titles]
    return [(t, svg) for t, svg in drawn if svg]


def _bounded(lines: dict[str, Line], most: int) -> dict[str, Line]:
    return dict(list(lines.items())[:most])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _headline(result: Result) -> list[tuple[str, str]]:
    if result.kinds[:1] in DIVIDED:
        tiles = [(name.split("/")[1], percent(value)) for name, value in result.summary.items()][:4]
        if result.speed.milliseconds is not None:
            tiles.append(("ms per image", f"{result.speed.milliseconds:.0f}"))
        return tiles
    names = {"segm": "Mask AP", "bbox": "Box AP", "keypoints": "Keypoint AP", "boundary": "Boundary AP"}
    if _of_proposals(result):
        first = result.kinds[0]
        return [
            (f"{KIND_NAMES[first].rstrip('es').capitalize()} {name.split('/')[1]}", percent(value))
            for name, value in result.summary.items()
            if name.startswith(f"{first}/") and name[-1].isdigit()
        ]
    tiles = [(names[kind], percent(result.summary.get(f"{kind}/AP"))) for kind in result.kinds]
    if result.kinds:
        first = result.kinds[0]
        tiles.insert(1, (f"{names[first]}50", percent(result.summary.get(f"{first}/AP50"))))
    if result.speed.milliseconds is not None:
        tiles.append(("ms per image", f"{result.speed.milliseconds:.0f}"))
    return tiles


def _of_proposals(result: Result) -> bool:
    """Whether only recall was measured."""
    return bool(result.kinds) and f"{result.kinds[0]}/AP" not in result.summary


def _divided(result: Result) -> dict[str, Any] | None:
    """The tables for segments (PQ of things and stuff) or pixel labels (IoU); classes by ascending quality."""
    if result.kinds[:1] not in DIVIDED:
        return None
    if result.kinds[0] == "semantic":
        columns, measures = ["IoU"], ["semantic/IoU"]
        rows = [(name.split("/")[1], [percent(value)]) for name, value in result.summary.items()]
    else:
        columns = ["PQ", "SQ", "RQ"]
        measures = [f"panoptic/{c}" for c in columns]
        parts = (("", "all"), ("th", "things"), ("st", "stuff"))
        rows = [(name, [percent(result.summary.get(f"panoptic/{c}{part}")) for c in columns]) for part, name in parts]
    there = sorted((r for r in result.per_class if r["objects"] or r["found"]), key=lambda r: r[measures[0]])
    classes = [
        (r["class"], "stuff" if r["stuff"] else "thing", r["objects"], [percent(r[m]) for m in measures]) for r in there
    ]
    counted = "pixels" if result.kinds[0] == "semantic" else "segments"
    return {"columns": columns, "rows": rows, "classes": classes, "counted": counted}


def _averages(result: Result) -> dict[str, Any]:
    columns: dict[str, None] = {}
    if result.kinds[:1] in DIVIDED:
        return {"columns": [], "rows": []}
    for name in result.summary:
        columns[name.split("/")[1]] = None
    rows = [(KIND_NAMES[k], [percent(result.summary.get(f"{k}/{c}")) for c in columns]) for k in result.kinds]
    return {"columns": [_subscript(c) for c in columns], "rows": rows}


def _subscript(name: str) -> tuple[str, str]:
    if name[-1].isalpha() and name[-2].isdigit():
        return name[:2], name[2:-1] + name[-1].upper()
    return name[:2], name[2:].upper() if name[2:].isalpha() else name[2:]


def _recall_charts(result: Result) -> list[tuple[str, Any]]:
    drawn: list[tuple[str, Any]] = []
    for kind in result.kinds:
        lines = {
            f"overlap {int(name) / 100:g}": (RECALLS.tolist(), result.curves[f"{kind}/{name}"])
            for name in ("50", "75")
            if f"{kind}/{name}" in result.curves
        }
        if lines:
            svg = chart(lines, x_name="recall", percent=True, bounds=(0.0, 1.0))
            drawn.append((f"Precision at each recall, {KIND_NAMES[kind]}", svg))
    return drawn


def _size_rows(result: Result) -> list[dict[str, Any]]:
    if _of_proposals(result):  # in the table of averages
        return []
    total = max(1, result.objects.get("all", 0))
    kinds = [k for k in result.kinds if k != "keypoints"] or list(result.kinds)
    return [
        {
            "name": SIZE_NAMES[size],
            "objects": result.objects[size],
            "share": result.objects[size] / total,
            "values": [(KIND_NAMES[k], *(result.summary.get(f"{k}/{n}{size}") for n in ("AP", "AR"))) for k in kinds],
        }
        for size in SIZE_NAMES
        if size in result.objects
    ]


def _class_rows(result: Result) -> list[dict[str, Any]]:
    """Classes that have objects, by ascending AP."""
    rows = [row for row in result.per_class if row["objects"]]
    return sorted(rows, key=lambda row: (row[f"{result.kinds[0]}/AP"], -row["objects"]))


# ---- confusion -------------------------------------------------------------------------------------------------------


@dataclass
class _Cell:
    count: int
    share: float  # of the row
    kind: str  # "right", "wrong", "none"
    anchor: str


def _confusion_table(confusion: Confusion) -> dict[str, Any]:
    counts, names = confusion.counts, [*confusion.classes, "background"]
    last = len(names) - 1
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    involved = [int(i) for i in np.argsort(-errors[:last], kind="stable") if counts[i].sum() + counts[:, i].sum()]
    shown = [*sorted(involved[:MOST_CLASSES]), last]
    across = [last, *shown[:-1]]  # missed objects first, visible without scrolling
    totals = counts.sum(1)

    def cell(row: int, column: int) -> _Cell:
        count = int(counts[row, column])
        kind = "none" if not count else "right" if row == column else "wrong"
        return _Cell(count, count / max(1, int(totals[row])), kind, f"cell-{row}-{column}")

    wrong = sorted(
        ((r, c) for r, c in confusion.images if r != c and r in shown and c in shown), key=lambda p: (-counts[p], p)
    )
    return {
        "names": ["missed", *(names[i] for i in across[1:])],
        "rows": [(names[r] if r != last else "background", [cell(r, c) for c in across]) for r in shown],
        "hidden": len(involved) - len(shown) + 1,
        "by": "masks" if confusion.by == "segm" else "boxes",
        "overlap": confusion.overlap,
        "threshold": confusion.score_threshold,
        "behind": [
            {
                "anchor": f"cell-{r}-{c}",
                "text": _sentence(names[r], names[c], r == last, c == last),
                "count": int(counts[r, c]),
                "ids": [str(i) for i in confusion.images[r, c][:MOST_IDS]],
                "more": max(0, len(confusion.images[r, c]) - MOST_IDS),
            }
            for r, c in wrong
        ],
    }


def _sentence(truth: str, guess: str, nothing: bool, missed: bool) -> str:
    if nothing:
        return f"{guess} predicted on background"
    return f"{truth} missed" if missed else f"{truth} predicted as {guess}"


# ---- images --------------------------------------------------------------------------------------------------------


def _galleries(result: Result) -> list[tuple[str, list[dict[str, Any]]]]:
    titles = (("worst", "Worst images"), ("best", "Best images"))
    groups = [(title, [_figure(e, result) for e in result.examples if e.rank == rank]) for rank, title in titles]
    return [(title, figures) for title, figures in groups if figures]


def _figure(example: Example, result: Result) -> dict[str, Any]:
    from PIL import Image

    score = example.score
    image = Image.open(io.BytesIO(example.image)).convert("RGB")
    parts = (("wrong class", score.confused), ("missed", score.missed), ("spurious", score.spurious))
    return {
        "id": str(score.id),
        "name": example.name or f"image {score.id}",
        "quality": percent(score.quality, 0),
        "facts": f"{score.objects} objects, {score.right} found"
        + "".join(f", {count} {name}" for name, count in parts if count),
        "size": example.size,
        "truth": _drawn(image, example.truth, result),
        "found": _drawn(image, example.found, result),
    }


def _drawn(image: Any, instances: Instances, result: Result) -> str:
    """A data URL of the image with the objects drawn over it."""
    file = io.BytesIO()
    instances.draw(image.copy(), result.classes).convert("RGB").save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode("ascii")
