"""Checking a data set before training, and writing a repaired copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from maskwright.data import splits
from maskwright.data.classes import counted, similar_words, without_match
from maskwright.data.exchange.unread import unread
from maskwright.data.findings import SEVERITIES, Finding, Severity, finding_lines, first_few
from maskwright.data.formats import Match, Request, load_format
from maskwright.data.image_names import SUFFIXES
from maskwright.data.images import common_white, is_animated, read_image, white_words
from maskwright.data.opening import best_match, find_matches, without_prefix
from maskwright.data.repair import Copying, copy_images, write_copy, write_repaired
from maskwright.data.table import Table
from maskwright.errors import ImageError, UsageError
from maskwright.text import printable

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
        copy: The report about the repaired copy, which is checked too.
    """

    source: Path
    findings: list[Finding] = field(default_factory=list[Finding])
    contents: list[str] = field(default_factory=list[str])
    fixed: Path | None = None
    wanted: Path | None = None
    copy: CheckReport | None = None

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
        """Whether the data set can be used for training, perhaps without what the skips name."""
        return not self.errors

    @property
    def usable(self) -> bool:
        """Whether the repaired copy can be used for training; the data set itself if no copy was requested."""
        return self.ok if self.wanted is None else self.copy is not None and self.copy.ok

    def __str__(self) -> str:
        lines = [printable(line) for line in self.contents]
        for severity in SEVERITIES:
            lines += [f"{severity:<6}{line}" for line in finding_lines(self.findings_with(severity), per_kind=10)]
        counts = [_count(len(self.findings_with(s)), s) for s in SEVERITIES]
        lines.append(printable(f"{self.source}: {', '.join(counts)}"))
        if self.fixed is not None:
            lines.append(printable(f"repaired copy: {self.fixed}"))
            if self.copy is not None and self.copy.findings:
                left = [f for f in self.copy.findings if f.severity != "note"] or self.copy.findings
                lines.append("the copy still has:")
                lines += [f"{left[0].severity:<6}{line}" for line in finding_lines(left, per_kind=3)]
        elif self.wanted is not None:
            lines.append(printable(f"nothing could be repaired; {self.wanted} was not written"))
        elif self.errors or self.skips:
            lines.append(
                printable(f"to write a repaired copy: maskwright check {self.source} --fix {self.source}-fixed")
            )
        return "\n".join(lines)


def check(
    source: str | Path,
    fix: str | Path | None = None,
    *,
    split: str | None = None,
    images: str | Path | None = None,
    decode: bool = True,
    bands: Sequence[int] | None = None,
    workers: int | None = None,
    link: bool = False,
    follow_links: bool = False,
) -> CheckReport:
    """Find everything that is wrong with a data set.

    Whatever `train` refuses for every system is an error: also a data set without a split to train on, and one without
    objects.

    Args:
        source: The folder of a data set, of which all splits are checked; an annotation file; a folder of images; or
            one image.
        fix: Folder for a repaired copy; it must not exist. Damaged annotations are repaired if the intention is
            certain and omitted otherwise, damaged images are omitted, and intact ones are copied. The source is not
            changed. The copy is checked, see `CheckReport.copy`.
        split: Check this split only, and whether it can be trained on; None: every split, and the one that `train` uses
            by default.
        images: The folder of the images of an annotation file; None: searched for.
        bands: Numbers of the bands that will be read from images with other bands than RGB, from 1.
        decode: Decode every image; False: read only the headers and the ends of the files.
        workers: Number of threads that decode; None: chosen by the number of cores.
        link: Make hard links to the images instead of copies; editing an image then changes both.
        follow_links: Copy images that symbolic links outside of the image folder point to; they are omitted otherwise.

    Returns:
        The report.

    Raises:
        UsageError: If the source does not exist, contains nothing to check or not this split, or `fix` exists.
        DataError: If the repaired copy cannot be written.
    """
    text, format = without_prefix(str(source))
    source = Path(text)
    report = CheckReport(source, wanted=None if fix is None else Path(fix))
    if report.wanted is not None and report.wanted.exists():
        raise UsageError(f"{report.wanted}: exists already; specify a new folder for the repaired copy")
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    if images is not None and not Path(images).is_dir():
        raise UsageError(f"{images}: no such folder of images")
    request = Request(split=split, images=None if images is None else Path(images), verify="all")
    how = Copying(link, follow_links)
    matches = find_matches(text, request, format)
    if split is not None:
        best_match(text, request, format)  # raises if there is none, or several
    if not matches:
        return _check_images(report, decode, bands, workers, how)
    tables = _read_tables(matches, request)
    paths = [t.folder / file for _, t, _ in tables for file in t.files]
    damaged = _decode_all(paths, workers, bands) if decode else {}
    training = _training_match(source, request, report, format)
    for _, table, match in tables:
        _inspect(table, damaged, match == training)
    _compare_classes([(table, match) for _, table, match in tables], training)
    _compare_images([(table, match) for _, table, match in tables], training)
    for _, table, _ in tables:
        report.findings += table.findings
        report.contents.append(_contents(table))
    if report.wanted is not None:
        _write_fixed(report, source, tables, damaged, how)
        if report.fixed is not None:
            copied = report.fixed / "annotations" / source.name if source.is_file() else report.fixed
            copied = copied if copied.exists() else report.fixed
            report.copy = check(copied, split=split, decode=False, workers=workers)
    return report


def _write_fixed(
    report: CheckReport, source: Path, tables: Sequence[tuple[str, Table, Match]],
    damaged: dict[Path, Finding | None], how: Copying,
) -> None:  # fmt: skip
    """Write the repaired copy of what can be used, in the format of the source."""
    assert report.wanted is not None
    usable = [(n, t, m) for n, t, m in tables if t.usable and (t.files or t.raw.get("embedded"))]
    own = [(name, table) for name, table, _ in usable if hasattr(load_format(name), "repaired")]
    others = [(name, table, match.split) for name, table, match in usable if hasattr(load_format(name), "write")]
    if own:
        report.findings += write_copy(source, own, damaged, report.wanted, how)
    elif len({name for name, _, _ in others}) == 1:
        report.findings += write_repaired(others, damaged, report.wanted, how)
    elif others:
        listed = ", ".join(sorted({name for name, _, _ in others}))
        advice = f"give one of them, such as {others[0][0]}:{source}"
        what = f"has data in several formats ({listed}), of which no copy is written"
        report.findings.append(Finding("note", "copy", str(source), what, advice))
        return
    else:
        return
    report.fixed = report.wanted


def _check_images(
    report: CheckReport, decode: bool, bands: Sequence[int] | None, workers: int | None, how: Copying
) -> CheckReport:
    """Check images that have no annotations."""
    source = report.source
    paths = [source] if source.is_file() else _image_files(source)
    if not paths:
        raise UsageError(f"{source}: contains neither annotations (annotations/instances_*.json) nor images")
    results = _decode_all(paths, workers, bands)
    report.findings += [finding for finding in results.values() if finding is not None]
    intact = [path for path, finding in results.items() if finding is None or finding.severity == "note"]
    report.contents.append(f"{source}: {len(intact)} of {len(paths)} images can be read")
    if not intact:
        report.findings = [_as_error(f) for f in report.findings]
    what = "there are no annotations; only the images were checked"
    known = unread(source) if source.is_dir() else None
    advice = (
        "training needs annotations/instances_train.json, or another layout that the documentation lists"
        if known is None
        else f"{known[0]}; {known[1]}"
    )
    report.findings.append(Finding("error", "annotations", str(source), what, advice))
    if report.wanted is not None and intact:
        report.findings += copy_images(source, intact, report.wanted, how)
        report.fixed = report.wanted
        report.copy = check(report.fixed, decode=decode, bands=bands, workers=workers)
    return report


# ---- inspection ----------------------------------------------------------------------------------------------------


def _read_tables(matches: Sequence[tuple[str, Match]], request: Request) -> list[tuple[str, Table, Match]]:
    """The tables of all matches, with the names of their formats."""
    tables = [(name, load_format(name).read(match, request), match) for name, match in matches]
    return [(name, table, match) for name, table, match in tables if isinstance(table, Table)]


def _training_match(source: Path, request: Request, report: CheckReport, format: str | None = None) -> Match | None:
    """What `train` reads by default; None, with an error, if it would refuse the source."""
    wanted = replace(request, split=request.split or "train")
    try:
        _, match = best_match(str(source), wanted, format)
        if request.split is None and find_matches(str(source), replace(request, split="val"), format):
            best_match(str(source), replace(request, split="val"), format)
    except UsageError as error:
        sentence, _, advice = str(error).removeprefix(f"{source}: ").partition("; ")
        report.findings.append(Finding("error", "split", str(source), f"cannot be trained on: {sentence}", advice))
        return None
    return match


def _compare_classes(tables: Sequence[tuple[Table, Match]], training: Match | None) -> None:
    """Add findings about classes that differ between the training split and the other splits of its format."""
    trained = next((table for table, match in tables if match == training), None)
    if trained is None or training is None or not trained.usable:
        return
    for table, match in tables:
        same_kind = match.confidence == training.confidence and (table.maps is None) == (trained.maps is None)
        if table is trained or not table.usable or not same_kind or not table.classes:
            continue
        new, gone = without_match(table.classes, trained.classes), without_match(trained.classes, table.classes)
        if not new and not gone:
            continue
        parts: list[str] = []
        if new:
            listed = counted(new, _counts(table))
            parts.append(f"{len(new)} of {len(table.classes)} classes are not in {trained.path.name}: {listed}")
        if gone:
            listed = counted(gone, _counts(trained))
            parts.append(f"{len(gone)} of {len(trained.classes)} classes of {trained.path.name} are not here: {listed}")
        advice = "a system is measured on classes of the same name only" + similar_words(new, gone)
        none = len(new) == len(table.classes) and splits.kind_of(match.split or "") == "val"
        what = ("no class has the name of a class to train on; " if none else "") + "; ".join(parts)
        table.add_finding("error" if none else "note", "classes", what, advice)


def _compare_images(tables: Sequence[tuple[Table, Match]], training: Match | None) -> None:
    """Add notes about image files of the training split that other splits have too."""
    trained = next((table for table, match in tables if match == training), None)
    if trained is None or training is None:
        return
    folder = trained.folder.resolve()
    known = {folder / file for file in trained.files}
    for table, match in tables:
        if table is trained or splits.kind_of(match.split or "") not in ("val", "test"):
            continue
        folder = table.folder.resolve()
        both = [file for file in table.files if folder / file in known]
        if both:
            what = f"{len(both)} of the {len(table.files)} images of {match.split!r} are also images to train on"
            advice = "measure on images that are not trained on"
            table.add_finding("note", "splits", f"{what}: {first_few(both)}", advice)


def _counts(table: Table) -> dict[str, int]:
    """The number of objects of each class."""
    numbers = np.bincount(table.labels[~table.crowd], minlength=len(table.classes)).tolist()
    return dict(zip(table.classes, numbers, strict=False))


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


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


def _inspect(table: Table, damaged: dict[Path, Finding | None], training: bool) -> None:
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
        table.add_finding("error" if training else "note", "nothing", what, "add annotations before training")
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
