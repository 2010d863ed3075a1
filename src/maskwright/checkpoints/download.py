"""Fetching a file whole: resumed where it broke off, verified, renamed into place only when it is right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskwright._version import __version__
from maskwright.checkpoints.catalogue import Entry
from maskwright.errors import CheckpointError, DownloadError

CHUNK = 1 << 18  # bytes at a time
LARGEST = 1 << 36  # a server that sends more than 64 GiB is not sending weights


def cache_folder() -> Path:
    """Where fetched files are kept: $MASKWRIGHT_CACHE, or the platform's folder for caches."""
    chosen = os.environ.get("MASKWRIGHT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "maskwright"


def offline() -> bool:
    """Whether $MASKWRIGHT_OFFLINE forbids fetching."""
    return os.environ.get("MASKWRIGHT_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def fetch(entry: Entry, *, commercial_ok: bool = False, folder: Path | None = None, progress: bool = True) -> Path:
    """The entry's file in the cache, fetched if it is not there; its licence is shown before anything is fetched."""
    if commercial_ok and entry.commercial == "no":
        raise CheckpointError(
            f"{entry.name}: its weights are licensed {entry.weights_licence}, which does not allow commercial "
            "use; nothing "
            "was fetched. Drop commercial_ok or choose other weights"
        )
    target = (folder or cache_folder()) / "checkpoints" / entry.name / entry.file
    if target.is_file():
        return target
    _console().print(entry.terms(), highlight=False, markup=False, soft_wrap=True)
    return download(entry.url, target, sha256=entry.sha256, md5=entry.md5, progress=progress)


def download(
    url: str,
    target: str | Path,
    *,
    sha256: str = "",
    md5: str = "",
    size: int | None = None,
    tries: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: bool = True,
) -> Path:
    """Fetch `url` into the file `target`, which appears only when it is whole and right.

    sha256, md5   hexadecimal digits, or as many of the first as are known
    size          exact bytes, if known
    tries         how often to begin or go on before giving up, with a `pause` of seconds that doubles each time

    What arrived before a fault stays beside the target (.part) and the next call goes on from there, unless the
    server's content has changed. What has a wrong hash is removed. Two processes that want the same file take turns.
    """
    target = Path(target)
    if target.is_file():
        return target
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: only http and https addresses are fetched")
    if offline():
        raise DownloadError(
            f"{url}: not fetched, because MASKWRIGHT_OFFLINE is set; unset it, or put the file at {target} yourself"
        )
    want = _Want(url, target, sha256.lower(), md5.lower(), size, timeout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.is_file():
                _insist(want, tries, pause, progress)
    except OSError as error:
        raise _full_or(error, target) from None
    return target


@dataclass(frozen=True)
class _Want:
    url: str
    target: Path
    sha256: str
    md5: str
    size: int | None
    timeout: float

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    @property
    def hashed(self) -> bool:
        return bool(self.sha256 or self.md5)


@dataclass
class _Note:
    """What a part belongs to, so that it is only continued with more of the same."""

    url: str = ""
    validator: str = ""  # a strong ETag, or Last-Modified
    total: int | None = None


class _Again(Exception):
    """A fault that another try may mend."""


def _insist(want: _Want, tries: int, pause: float, progress: bool) -> None:
    reason = ""
    with _bar(want.target.name, progress) as show:
        for attempt in range(tries):
            if attempt:
                time.sleep(min(pause * 2 ** (attempt - 1), 60.0))
            try:
                resumed = _continue(want, show)
            except _Again as fault:
                reason = str(fault)
                continue
            wrong = _wrong(want)
            if not wrong:
                _finish(want)
                return
            _forget(want)
            reason = wrong
            if not resumed:
                raise DownloadError(
                    f"{want.url}: what arrived is not the published file ({wrong}); it was removed. The "
                    "publisher may have "
                    "replaced it, or something between changed it: try another network"
                )
    have = want.part.stat().st_size if want.part.exists() else 0
    kept = f"{have} bytes are kept and the next call goes on from there" if have else "nothing is kept; try again later"
    raise DownloadError(f"{want.url}: it could not be fetched in {tries} tries ({reason}); {kept}")


def _continue(want: _Want, show: Callable[[int, int | None], None]) -> bool:
    """Ask for what is missing and write it; True if it went on from an earlier part."""
    note = _read_note(want)
    have = want.part.stat().st_size if want.part.exists() else 0
    # Without a validator only a hash can tell afterwards that two halves are of one file.
    if have and (note.url != want.url or not (note.validator or want.hashed)):
        _forget(want)
        have, note = 0, _Note()
    headers = {"User-Agent": f"maskwright/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.validator:
            headers["If-Range"] = note.validator
    try:
        with urllib.request.urlopen(urllib.request.Request(want.url, headers=headers), timeout=want.timeout) as answer:
            return _take(want, answer, have, note, show)
    except urllib.error.HTTPError as error:
        with error:
            return _refused(want, error, have)
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            host = urllib.parse.urlsplit(want.url).hostname
            raise DownloadError(
                f"{want.url}: {host} cannot be found; there is no network, or a proxy is needed (https_proxy). "
                f"Or put the file at {want.target} yourself"
            ) from None
        raise _Again(f"no connection: {error.reason}") from None
    except (TimeoutError, http.client.HTTPException, ConnectionError) as error:
        raise _Again(f"the connection broke: {error or type(error).__name__}") from None


def _refused(want: _Want, error: urllib.error.HTTPError, have: int) -> bool:
    if error.code == 416 and have:  # nothing beyond what is here: it is whole, or not a part of this file
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return True
        _forget(want)
        raise _Again("the server has another file than the part that was here; begun anew")
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _Again(f"the server answers {error.code} {error.reason}")
    hint = {
        404: "it is no longer there",
        410: "it was taken down",
        403: "access is refused",
        401: "it asks for a login",
    }
    raise DownloadError(
        f"{want.url}: {hint.get(error.code, 'the server does not give it')} ({error.code} {error.reason}); "
        "look for it at "
        f"its publisher and put it at {want.target}"
    )


def _take(want: _Want, answer: Any, have: int, note: _Note, show: Callable[[int, int | None], None]) -> bool:
    headers = answer.headers
    if want.url.startswith("https://") and answer.geturl().startswith("http://"):
        raise DownloadError(
            f"{want.url}: the server sends on to an unprotected address, {answer.geturl()}; not fetched"
        )
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{want.url}: the server answered with a web page instead of weights; a login page or a proxy "
            "stands between"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _Again(f"the server packs the file as {headers['Content-Encoding']} though asked not to")
    validator = headers.get("ETag", "")
    if not validator or validator.startswith("W/"):
        validator = headers.get("Last-Modified", "")
    length = headers.get("Content-Length", "")
    length = int(length) if length.isdigit() else None

    resumed = False
    if answer.status == 206:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        total = int(span[3]) if span and span[3] != "*" else None
        same = span and int(span[1]) == have and total in (None, note.total or total)
        if not same or (note.validator and validator and validator != note.validator):
            _forget(want)
            raise _Again("the file at the server has changed since the first part arrived; begun anew")
        resumed = True
        total = total if total is not None else (have + length if length is not None else None)
    else:
        have, total = 0, length  # the server does not resume, or has another file by now: from the start
    if want.size is not None and total is not None and total != want.size:
        _forget(want)
        raise DownloadError(f"{want.url}: the server has {total} bytes, {want.size} were published; not fetched")
    if total is not None and total > LARGEST:
        raise DownloadError(f"{want.url}: the server announces {total} bytes, which no weights have; not fetched")
    _room(want, (total or 0) - have)
    _write_note(want, _Note(want.url, validator, total))

    with want.part.open("r+b" if resumed else "wb") as file:
        file.seek(have)
        have = _pour(answer, file, have, total, show)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise _Again(f"the connection ended after {have} of {total} bytes")
    return resumed


def _pour(answer: Any, file: Any, have: int, total: int | None, show: Callable[[int, int | None], None]) -> int:
    show(have, total)
    while True:
        try:
            data = answer.read(CHUNK)
        except http.client.IncompleteRead as error:
            data, broken = error.partial, True
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise _Again(f"the connection broke after {have} bytes: {error or type(error).__name__}") from None
        else:
            broken = False
        file.write(data)
        have += len(data)
        if have > LARGEST:
            raise DownloadError(f"{file.name}: the server sends without end; stopped after {have} bytes")
        show(have, total)
        if broken or not data:
            return have


def _wrong(want: _Want) -> str:
    """Why the part is not the published file; empty if it is."""
    length = want.part.stat().st_size
    if want.size is not None and length != want.size:
        return f"{length} bytes, {want.size} expected"
    hashes = {"sha256": want.sha256, "md5": want.md5}
    with want.part.open("rb") as file:
        for kind, digits in hashes.items():
            if digits:
                file.seek(0)
                found = hashlib.file_digest(
                    file, lambda kind=kind: hashlib.new(kind, usedforsecurity=False)
                ).hexdigest()
                if not found.startswith(digits):
                    return f"{kind} {found[: max(len(digits), 8)]}, {digits} expected"
        file.seek(0)
        if not want.hashed and file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "a web page"
    return "" if length else "an empty file"


def _finish(want: _Want) -> None:
    want.part.replace(want.target)
    want.note.unlink(missing_ok=True)


def _forget(want: _Want) -> None:
    want.part.unlink(missing_ok=True)
    want.note.unlink(missing_ok=True)


def _read_note(want: _Want) -> _Note:
    try:
        return _Note(**json.loads(want.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Note()


def _write_note(want: _Want, note: _Note) -> None:
    beside = want.note.with_name(want.note.name + ".new")
    beside.write_text(json.dumps(asdict(note)), encoding="utf-8")
    beside.replace(want.note)


def _room(want: _Want, need: int) -> None:
    free = shutil.disk_usage(want.target.parent).free
    if need > free:
        raise DownloadError(
            f"{want.target}: {need / 1e6:.0f} MB are still to come and {free / 1e6:.0f} MB are free on its "
            "disk; free some, "
            "or set MASKWRIGHT_CACHE to a folder on another"
        )


def _full_or(error: OSError, target: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"{target}: the disk is full; free some space, or set MASKWRIGHT_CACHE to a folder on another. "
            "What arrived is "
            "kept and the next call goes on from there"
        )
    return DownloadError(
        f"{target}: it cannot be written ({error.strerror or error}); set MASKWRIGHT_CACHE to a folder of yours"
    )


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of this target; whoever comes second waits, and then finds the file there."""
    with target.with_name(target.name + ".lock").open("a+b") as file:
        waited = False
        while not _lock(file):
            if not waited:
                _console().print(f"waiting for another process that fetches {target.name}", markup=False)
            waited = True
            time.sleep(0.1)
        try:
            yield
        finally:
            _unlock(file)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: Any) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: Any) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: Any) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Anything else is a file system without locks (some network folders): go on alone.
            return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR)
        return True

    def _unlock(file: Any) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextlib.contextmanager
def _bar(name: str, progress: bool) -> Iterator[Callable[[int, int | None], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = _console()
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)
