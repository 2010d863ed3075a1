"""Checking a data set before training, and writing a repaired copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwright.data.findings import SEVERITIES, Finding, Severity, finding_lines, first_few
from maskwright.data.formats import Match, Request, load_format
from maskwright.data.images import common_white, is_animated, read_image, white_words
from maskwright.data.opening import find_matches
from maskwright.data.table import Table
from maskwright.errors import DataError, ImageError, UsageError
from maskwright.files import atomic_folder, write_json

_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2", ".avif")
_NARROW = 8  # pixels; images with a shorter side are reported


@dataclass
class CheckReport:
    """The result of `check`; `str()` summarizes it, with a few findings of each kind.

    Attributes:
        source: What was checked.
        findings: All problems. An "error" makes the data set unusable; a "skip" is skipped when the data set is read
            (and is an error in strict mode); a "note" is used as it is.
        contents: One line about each annotation file.
        fixed: The repaired copy; None if none was written.
        wanted: Where a repaired copy was requested.
    """

    source: Path
    findings: list[Finding] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    fixed: Path | None = None
    wanted: Path | None = None

    def findings_with(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the data set unusable."""
        return self.findings_with("error")

    @property
    def skips(self) -> list[Finding]:
        """Findings about images and annotations that are skipped."""
        return self.findings_with("skip")

    @property
    def notes(self) -> list[Finding]:
        """Findings about entries that are used as they are."""
        return self.findings_with("note")

    @property
    def ok(self) -> bool:
        """Whether the data set can be read, perhaps without what the skips name."""
        return not self.errors

    def __str__(self) -> str:
        lines = list(self.contents)
        for severity in SEVERITIES:
            lines += [f"{severity:<6}{line}" for line in finding_lines(self.findings_with(severity), per_kind=10)]
        counts = [_count(len(self.findings_with(s)), s) for s in SEVERITIES]
        lines.append(f"{self.source}: {', '.join(counts)}")
        if self.fixed is not None:
            lines.append(f"repaired copy: {self.fixed}")
        elif self.wanted is not None:
            lines.append(f"nothing could be repaired; {self.wanted} was not written")
        elif self.errors or self.skips:
            lines.append(f"to write a repaired copy: maskwright check {self.source} --fix {self.source}-fixed")
        return "\n".join(lines)


def check(
    source: str | Path,
    fix: str | Path | None = None,
    *,
    images: str | Path | None = None,
    decode: bool = True,
    bands: Sequence[int] | None = None,
    workers: int | None = None,
) -> CheckReport:
    """Find everything that is wrong with a data set.

    Args:
        source: The folder of a data set, of which all splits are checked; an annotation file; a folder of images; or
            one image.
        fix: Folder for a repaired copy; it must not exist. Damaged annotations are repaired if the intention is
            certain and omitted otherwise, damaged images are omitted, and intact ones are linked (hard links, or
            copies where the file system has none). The source is not changed.
        images: The folder of the images of an annotation file; None: searched for.
        bands: Numbers of the bands that will be read from images with other bands than RGB, from 1.
        decode: Decode every image; False: read only the headers and the ends of the files.
        workers: Number of threads that decode; None: chosen by the number of cores.

    Returns:
        The report.

    Raises:
        UsageError: If the source does not exist or contains nothing to check, or `fix` exists.
        DataError: If the repaired copy cannot be written.
    """
    source = Path(source)
    report = CheckReport(source, wanted=None if fix is None else Path(fix))
    if report.wanted is not None and report.wanted.exists():
        raise UsageError(f"{report.wanted}: exists already; specify a new folder for the repaired copy")
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    request = Request(split=None, images=None if images is None else Path(images), verify="all")
    matches = find_matches(str(source), request)
    if matches:
        tables = _read_tables(matches, request)
        damaged = (
            _decode_all([t.folder / file for _, t in tables for file in t.files], workers, bands) if decode else {}
        )
        for _, table in tables:
            _inspect(table, damaged)
            report.findings += table.findings
            report.contents.append(_contents(table))
        if report.wanted is not None and any(t.usable and t.files for _, t in tables):
            _write_copy(source, tables, damaged, report.wanted)
            report.fixed = report.wanted
        return report
    paths = [source] if source.is_file() else _image_files(source)
    if not paths:
        raise UsageError(f"{source}: contains neither annotations (annotations/instances_*.json) nor images")
    results = _decode_all(paths, workers, bands)
    report.findings += [finding for finding in results.values() if finding is not None]
    intact = [path for path, finding in results.items() if finding is None or finding.severity == "note"]
    report.contents.append(f"{source}: {len(intact)} of {len(paths)} images can be read")
    if not intact:
        report.findings = [_as_error(f) for f in report.findings]
    if report.wanted is not None and intact:
        with atomic_folder(report.wanted, DataError) as folder:
            for path in intact:
                _link(path, folder / (path.relative_to(source) if source.is_dir() else path.name))
        report.fixed = report.wanted
    return report


# ---- inspection ----------------------------------------------------------------------------------------------------


def _read_tables(matches: Sequence[tuple[str, Match]], request: Request) -> list[tuple[str, Table]]:
    """The tables of all matches, with the names of their formats."""
    tables = [(name, load_format(name).read(match, request)) for name, match in matches]
    return [(name, table) for name, table in tables if isinstance(table, Table)]


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())


def _decode_all(
    paths: Sequence[Path], workers: int | None, bands: Sequence[int] | None = None
) -> dict[Path, Finding | None]:
    """The problem of each image, None if it is intact. Decoding releases Python's global lock, so threads help."""

    def one(path: Path) -> Finding | None:
        try:
            read_image(path, warn=False, bands=bands)
            if is_animated(path):
                return Finding("note", "animation", str(path), "is animated; the first frame is used")
        except ImageError as error:
            return Finding("skip", "image", str(path), str(error).removeprefix(f"{path}: "))
        return None

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as threads:
        return dict(zip(unique, threads.map(one, unique), strict=True))


def _inspect(table: Table, damaged: dict[Path, Finding | None]) -> None:
    """Add the findings that concern a table as a whole."""
    if not table.usable:
        return
    lost = 0
    for number, file in zip(table.image_ids, table.files, strict=True):
        finding = damaged.get(table.folder / file)
        if finding is not None:
            lost += finding.severity == "skip"
            what = f"image {number!r}, {table.folder / file}: {finding.sentence}"
            table.add_finding(finding.severity, finding.kind, what, finding.advice, image=number)
    if table.files and lost == len(table.files):
        table.add_finding("error", "image", f"none of its {lost} images can be read", "restore the images")
    narrow = [f for f, size in zip(table.files, table.sizes, strict=True) if min(size) < _NARROW]
    if narrow:
        what = f"{len(narrow)} images have a side of less than {_NARROW} pixels: {first_few(narrow)}"
        table.add_finding("note", "narrow", what, "they are used, but may be too small to show objects")
    white = common_white([table.folder / file for file in table.files])
    if white is not None and white < 0xFFFF:
        table.add_finding("note", "range", white_words(white))
    real = table.labels[~table.crowd]
    if not len(real) and table.findings_with("error"):
        return
    if not len(real):
        what = f"its {len(table.files)} images have no annotated object"
        table.add_finding("note", "nothing", what, "add annotations before training")
        return
    used = set(real.tolist())
    absent = [name for label, name in enumerate(table.classes) if label not in used]
    if absent:
        what = f"{len(absent)} of {len(table.classes)} classes have no object: {first_few(absent, 8)}"
        table.add_finding("note", "class", what)


def _contents(table: Table) -> str:
    """One line about what a table contains."""
    if not table.usable:
        return f"{table.path}: cannot be used"
    what = "object" if table.maps is None else "segment"
    parts = [_count(len(table.files), "image"), _count(len(table.ids), what), _count(len(table.classes), "class")]
    if table.maps is not None:
        parts[-1] += f" ({len(table.stuff)} of them stuff)"
    crowd = int(table.crowd.sum())
    if table.shapes is None:
        parts.append("boxes without masks")
    if crowd:
        parts.append(_count(crowd, "crowd region"))
    if table.keypoint_names:
        parts.append(_count(len(table.keypoint_names), "keypoint"))
    return f"{table.path}: {', '.join(parts)}"


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"


def _as_error(finding: Finding) -> Finding:
    return Finding("error", finding.kind, finding.file, finding.sentence, finding.advice)


# ---- the repaired copy ---------------------------------------------------------------------------------------------


def _write_copy(
    source: Path, tables: Sequence[tuple[str, Table]], damaged: dict[Path, Finding | None], target: Path
) -> None:
    with atomic_folder(target, DataError) as folder:
        (folder / "annotations").mkdir()
        for name, table in tables:
            repaired: Callable[[Table, set[int], Path], dict[str, Any]] | None
            repaired = getattr(load_format(name), "repaired", None)  # optional in a format
            if not table.usable or not table.files or repaired is None:
                continue
            place = _image_place(source, table)
            skipped = {
                index
                for index, file in enumerate(table.files)
                if (finding := damaged.get(table.folder / file)) is not None and finding.severity == "skip"
            }
            for index, file in enumerate(table.files):
                if index not in skipped:
                    _link(table.folder / file, folder / place / file)
            path = folder / "annotations" / table.path.name
            write_json(path, repaired(table, skipped, path.with_suffix("")), DataError)


def _image_place(source: Path, table: Table) -> Path:
    """The folder of the images inside the copy: as in the source, or "images" if they are outside of it."""
    if source.is_dir():
        try:
            place = table.folder.relative_to(source)
        except ValueError:
            place = Path()
        if place != Path():
            return place
    return Path("images")


def _link(path: Path, to: Path) -> None:
    """Make a hard link, or a copy where the file system has no links."""
    if to.exists():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copy2(path, to)
