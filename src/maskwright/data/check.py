"""Looking a data set over before anything long starts, and writing a copy without what is broken."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwright.data.annotations import Table, read_table
from maskwright.data.coco import annotation_files, is_panoptic, write_coco
from maskwright.data.findings import SEVERITIES, Finding, Severity, digest, few
from maskwright.data.images import is_animated, read_image
from maskwright.data.panoptic import read_panoptic_table, repaired
from maskwright.errors import DataError, ImageError, UsageError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2", ".avif")
_NARROW = 8  # pixels: sides shorter than this are told about


@dataclass
class CheckReport:
    """What was found. `str()` is the table for people: of each kind of finding a few, and how many more there are.

    An "error" keeps the set from being read at all; what a "skip" names is left out when the set is read (and is an
    error when it is read strictly); a "note" is understood as it is. `fixed` is the repaired copy, if one was written.
    """

    source: Path
    findings: list[Finding] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)  # one line per annotation file
    fixed: Path | None = None
    wanted: Path | None = None  # where a copy was asked for

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        return self.of("error")

    @property
    def skips(self) -> list[Finding]:
        return self.of("skip")

    @property
    def notes(self) -> list[Finding]:
        return self.of("note")

    @property
    def ok(self) -> bool:
        """Whether the set can be read (perhaps without what the skips name)."""
        return not self.errors

    def __str__(self) -> str:
        lines = list(self.contents)
        for severity in SEVERITIES:
            lines += [f"{severity:<6}{line}" for line in digest(self.of(severity), each=10)]
        counts = [_count(len(self.of(s)), s) for s in SEVERITIES]
        lines.append(f"{self.source}: {', '.join(counts)}")
        if self.fixed is not None:
            lines.append(f"repaired copy: {self.fixed}")
        elif self.wanted is not None:
            lines.append(f"nothing could be repaired; {self.wanted} was not written")
        elif self.errors or self.skips:
            lines.append(f"a copy without these: maskwright check {self.source} --fix {self.source}-fixed")
        return "\n".join(lines)


def check(
    source: str | Path,
    fix: str | Path | None = None,
    *,
    images: str | Path | None = None,
    decode: bool = True,
    workers: int | None = None,
) -> CheckReport:
    """Everything that is wrong with a data set: a folder in COCO layout (all its splits), a COCO JSON file, a folder of
    images or one image.

    fix         a folder that does not exist yet, for a repaired copy: broken annotations repaired where it is certain
                what was meant and left out where not, broken images left out, the others linked (hard links; copied
                where that is impossible). Nothing of the source is changed.
    images    the folder of the images of a JSON file, where it is not beside it
    decode      also decode every image; False: only the headers, and the ends of the files
    workers     threads that decode
    """
    source = Path(source)
    report = CheckReport(source, wanted=None if fix is None else Path(fix))
    if report.wanted is not None and report.wanted.exists():
        raise UsageError(f"{report.wanted}: exists already; name a new folder for the repaired copy")
    if not source.exists():
        raise UsageError(f"{source}: there is no such file or folder")
    files = _annotation_files(source)
    if files:
        folder = None if images is None else Path(images)
        tables = [(read_panoptic_table if is_panoptic(p) else read_table)(p, folder, verify="all") for p in files]
        broken = _decoded(tables, workers) if decode else {}
        for table in tables:
            _look_over(table, broken)
            report.findings += table.findings
            report.contents.append(_contents(table))
        if report.wanted is not None and any(t.usable and t.files for t in tables):
            report.fixed = _write_copy(source, tables, broken, report.wanted)
        return report
    paths = [source] if source.is_file() else _image_files(source)
    if not paths:
        raise UsageError(f"{source}: holds neither annotations (annotations/instances_*.json) nor images")
    damage = _decode_all(paths, workers)
    report.findings += [finding for finding in damage.values() if finding is not None]
    good = [path for path, finding in damage.items() if finding is None or finding.severity == "note"]
    report.contents.append(f"{source}: {len(good)} of {len(paths)} images can be read")
    if not good:
        report.findings = [_as_error(f) for f in report.findings]
    if report.wanted is not None and good:
        with _beside(report.wanted) as folder:
            for path in good:
                _link(path, folder / (path.relative_to(source) if source.is_dir() else path.name))
        report.fixed = report.wanted
    return report


# ---- looking -----------------------------------------------------------------------------------------------------


def _annotation_files(source: Path) -> list[Path]:
    if source.is_dir():
        return annotation_files(source)
    looks = source.suffix.lower() == ".json"
    return [source] if looks else []


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _decoded(tables: Sequence[Table], workers: int | None) -> dict[Path, Finding | None]:
    paths = dict.fromkeys(t.folder / file for t in tables for file in t.files)
    return _decode_all(list(paths), workers)


def _decode_all(paths: Sequence[Path], workers: int | None) -> dict[Path, Finding | None]:
    """What is wrong with each image; decoding leaves Python's lock alone, so threads help."""

    def one(path: Path) -> Finding | None:
        try:
            read_image(path, warn=False)
            if is_animated(path):
                return Finding("note", "animation", str(path), "is animated; its first frame is taken")
        except ImageError as error:
            about = str(error).removeprefix(f"{path}: ")
            return Finding("skip", "image", str(path), about)
        return None

    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as threads:
        return dict(zip(paths, threads.map(one, paths), strict=True))


def _look_over(table: Table, broken: dict[Path, Finding | None]) -> None:
    """Adds to the table's findings what only shows with all of it in view."""
    if not table.usable:
        return
    lost = 0
    for number, file in zip(table.image_ids, table.files, strict=True):
        finding = broken.get(table.folder / file)
        if finding is not None:
            lost += finding.severity == "skip"
            about = f"image {number!r}, {table.folder / file}: {finding.sentence}"
            table.say(finding.severity, finding.kind, about, finding.advice, image=number)
    if table.files and lost == len(table.files):
        table.say("error", "image", f"not one of its {lost} images can be read", "put back the images")
    narrow = [f for f, size in zip(table.files, table.sizes, strict=True) if min(size) < _NARROW]
    if narrow:
        about = f"{len(narrow)} images have a side of less than {_NARROW} pixels: {few(narrow)}"
        table.say("note", "narrow", about, "they are used, but little can be seen on them")
    real = table.labels[~table.crowd]
    if not len(real):
        about = f"there is not one object on its {len(table.files)} images: there is nothing to learn"
        table.say("note", "nothing", about, "add annotations before training")
        return
    there = set(real.tolist())
    absent = [name for label, name in enumerate(table.classes) if label not in there]
    if absent:
        table.say("note", "class", f"{len(absent)} of {len(table.classes)} classes have no object: {few(absent, 8)}")


def _contents(table: Table) -> str:
    if not table.usable:
        return f"{table.path}: cannot be read"
    what = "object" if table.maps is None else "segment"
    parts = [_count(len(table.files), "image"), _count(len(table.ids), what), _count(len(table.classes), "class")]
    if table.maps is not None:
        parts[-1] += f" ({len(table.stuff)} of them stuff)"
    crowd = int(table.crowd.sum())
    if crowd:
        parts.append(f"{crowd} crowd regions")
    if table.keypoint_names:
        parts.append(_count(len(table.keypoint_names), "keypoint"))
    return f"{table.path}: {', '.join(parts)}"


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"


def _as_error(finding: Finding) -> Finding:
    return Finding("error", finding.kind, finding.file, finding.sentence, finding.advice)


# ---- the repaired copy -------------------------------------------------------------------------------------------


class _beside:
    """A folder that gets its name only when everything is in it, and is gone if anything goes wrong."""

    def __init__(self, target: Path):
        self.target = target
        self.folder = target.with_name(f".{target.name}.part-{os.getpid()}")

    def __enter__(self) -> Path:
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise self._failed(error) from None
        return self.folder

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self.folder.rename(self.target)
            except OSError as renaming:
                error = renaming
        if error is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._failed(error) from None

    def _failed(self, error: OSError) -> DataError:
        return DataError(
            f"{self.target}: the repaired copy cannot be written ({error.strerror}); nothing was left behind"
        )


def _write_copy(source: Path, tables: Sequence[Table], broken: dict[Path, Finding | None], target: Path) -> Path:
    with _beside(target) as folder:
        (folder / "annotations").mkdir()
        for table in tables:
            if not table.usable or not table.files:
                continue
            place = _image_place(source, table)
            lost = {
                index
                for index, file in enumerate(table.files)
                if (finding := broken.get(table.folder / file)) is not None and finding.severity == "skip"
            }
            for index, file in enumerate(table.files):
                if index not in lost:
                    _link(table.folder / file, folder / place / file)
            file = folder / "annotations" / table.path.name
            content = _content(table, lost) if table.maps is None else repaired(table, lost, file.with_suffix(""))
            write_coco(file, content)
    return target


def _image_place(source: Path, table: Table) -> Path:
    """The folder of the images inside the copy: as in the source, "images" where they were elsewhere."""
    if source.is_dir():
        try:
            place = table.folder.relative_to(source)
        except ValueError:
            place = Path()
        if place != Path():
            return place
    return Path("images")


def _link(path: Path, to: Path) -> None:
    if to.exists():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copy2(path, to)


def _content(table: Table, lost: set[int]) -> dict[str, Any]:
    """The table as COCO JSON, with whatever else the file said about its images and objects."""
    raw = table.raw
    images = []
    for index, (number, file, (height, width)) in enumerate(
        zip(table.image_ids, table.files, table.sizes, strict=True)
    ):
        if index not in lost:
            entry = _plain(raw["images"][table.image_rows[index]])
            images.append({**entry, "id": number, "file_name": file, "height": height, "width": width})
    named = {e.get("id"): _plain(e) for e in reversed(raw["categories"]) if isinstance(e, dict)}
    categories = [
        {**named.get(number, {}), "id": number, "name": name}
        for number, name in zip(table.category_ids, table.classes, strict=True)
    ]
    rest = {k: v for k, v in _plain(raw).items() if k not in ("images", "annotations", "categories")}
    return {**rest, "images": images, "annotations": list(_records(table, lost)), "categories": categories}


def _records(table: Table, lost: set[int]) -> Iterator[dict[str, Any]]:
    taken = Counter(table.ids)
    largest = max((i for i in table.ids if isinstance(i, int)), default=0)
    seen: set[int | str] = set()
    for index, owner in enumerate(table.owner.tolist()):
        if owner in lost:
            continue
        number = table.ids[index]
        if taken[number] > 1 and number in seen:
            largest += 1
            number = largest
        seen.add(number)
        size = table.sizes[owner]
        if table.shapes.coded[index]:
            shape: Any = {"size": list(size), "counts": table.shapes.code(index).decode("ascii")}
        else:
            shape = [ring.ravel().tolist() for ring in table.shapes.polygon(index)]
        area = float(table.areas[index])
        if math.isnan(area):
            area = float(table.shapes.masks(index, index + 1, size).areas()[0])
        x0, y0, x1, y1 = table.boxes[index].tolist()
        record = {
            **_plain(table.raw["annotations"][int(table.rows[index])]),
            "id": number,
            "image_id": table.image_ids[owner],
            "category_id": table.category_ids[int(table.labels[index])],
            "segmentation": shape,
            "area": area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": int(table.crowd[index]),
        }
        if table.keypoints is not None:
            points = table.keypoints[index].astype(float)
            points[points[:, 2] > 0, :2] -= 0.5
            record["keypoints"] = points.ravel().tolist()
            record["num_keypoints"] = int((points[:, 2] > 0).sum())
        yield record


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """The parts of an entry that are JSON in the strict sense: NaN and Infinity, which Python lets pass, are not."""

    def fine(value: Any) -> bool:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return False
        return True

    large = ("images", "annotations", "categories", "segmentation")
    return {k: v for k, v in entry.items() if k not in large and fine(v)}
