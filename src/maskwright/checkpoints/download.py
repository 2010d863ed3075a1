"""Downloads that resume, are verified, and appear under their final name only when complete."""

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
from maskwright.files import write_json

CHUNK = 1 << 18  # bytes per read
LARGEST = 1 << 36  # maximum size of a download: 64 GiB


def cache_folder() -> Path:
    """The folder for downloaded files: $MASKWRIGHT_CACHE, or a folder in the platform's cache folder."""
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
    """Whether $MASKWRIGHT_OFFLINE disables downloads."""
    return os.environ.get("MASKWRIGHT_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def fetch(entry: Entry, *, commercial_ok: bool = False, folder: Path | None = None, progress: bool = True) -> Path:
    """Download an entry of the catalogue into the cache, unless it is there. Its terms are printed first.

    Args:
        entry: The entry.
        commercial_ok: Refuse weights whose licence does not allow commercial use.
        folder: The cache; default: `cache_folder()`.
        progress: Show a progress bar in terminals.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: If the licence is refused.
        DownloadError: If the download fails.
    """
    if commercial_ok and entry.commercial == "no":
        raise CheckpointError(
            f"{entry.name}: the weights are licensed {entry.weights_licence}, which does not allow commercial use; "
            "nothing was downloaded. Omit commercial_ok or choose other weights"
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
    """Download `url` to the file `target`, which appears only when it is complete and verified.

    After a failure the received part is kept beside the target (.part), and the next call resumes from it unless the
    content on the server has changed. A file with a wrong hash is removed. Processes that download the same file wait
    for each other.

    Args:
        url: An http or https address.
        target: The file. If it exists, nothing is downloaded.
        sha256: Hexadecimal digits of the hash, or the first ones if only these are known; "" to skip the check.
        md5: Likewise.
        size: Exact size in bytes, if known.
        tries: Number of attempts.
        timeout: Timeout of the connection in seconds.
        pause: Seconds before the second attempt; doubled for each further one.
        progress: Show a progress bar in terminals.

    Returns:
        Path of the file.

    Raises:
        DownloadError: If the file cannot be downloaded completely, has a wrong hash or size, or cannot be written.
    """
    target = Path(target)
    if target.is_file():
        return target
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: only http and https addresses are supported")
    if offline():
        raise DownloadError(
            f"{url}: not downloaded, because MASKWRIGHT_OFFLINE is set; unset it, or save the file as {target} yourself"
        )
    want = _Want(url, target, sha256.lower(), md5.lower(), size, timeout)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not target.is_file():
                _retry(want, tries, pause, progress)
    except OSError as error:
        raise _write_error(error, target) from None
    return target


@dataclass(frozen=True)
class _Want:
    """A requested file, its checks, and the temporary files beside it."""

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
    """What a partial download belongs to; it is resumed only if this is unchanged."""

    url: str = ""
    validator: str = ""  # a strong ETag, or Last-Modified
    total: int | None = None


class _Retryable(Exception):
    """A failure after which another attempt may succeed."""


def _retry(want: _Want, tries: int, pause: float, progress: bool) -> None:
    """Attempt the download up to `tries` times, then verify it and move it into place."""
    reason = ""
    with _bar(want.target.name, progress) as show:
        for attempt in range(tries):
            if attempt:
                time.sleep(min(pause * 2 ** (attempt - 1), 60.0))
            try:
                resumed = _request(want, show)
            except _Retryable as failure:
                reason = str(failure)
                continue
            wrong = _mismatch(want)
            if not wrong:
                _finish(want)
                return
            _discard(want)
            reason = wrong
            if not resumed:
                raise DownloadError(
                    f"{want.url}: the download is not the published file ({wrong}) and was removed; the file may have "
                    "been replaced on the server or altered by a proxy. Try another network or report it"
                )
    have = want.part.stat().st_size if want.part.exists() else 0
    kept = f"{have} bytes are kept, the next call resumes from there" if have else "nothing was received; try later"
    raise DownloadError(f"{want.url}: the download failed after {tries} attempts ({reason}); {kept}")


def _request(want: _Want, show: Callable[[int, int | None], None]) -> bool:
    """Request the missing bytes and write them; True if an earlier part was resumed."""
    note = _read_note(want)
    have = want.part.stat().st_size if want.part.exists() else 0
    # Without a validator, only a hash can verify that two parts belong to the same file.
    if have and (note.url != want.url or not (note.validator or want.hashed)):
        _discard(want)
        have, note = 0, _Note()
    headers = {"User-Agent": f"maskwright/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.validator:
            headers["If-Range"] = note.validator
    try:
        with urllib.request.urlopen(urllib.request.Request(want.url, headers=headers), timeout=want.timeout) as answer:
            return _receive(want, answer, have, note, show)
    except urllib.error.HTTPError as error:
        with error:
            return _handle_status(want, error, have)
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            host = urllib.parse.urlsplit(want.url).hostname
            raise DownloadError(
                f"{want.url}: the host {host} cannot be resolved; check the network, or set https_proxy if a proxy is "
                f"needed. The file can also be saved as {want.target} by hand"
            ) from None
        raise _Retryable(f"no connection: {error.reason}") from None
    except (TimeoutError, http.client.HTTPException, ConnectionError) as error:
        raise _Retryable(f"the connection was lost: {error or type(error).__name__}") from None


def _handle_status(want: _Want, error: urllib.error.HTTPError, have: int) -> bool:
    """Handle an HTTP error; True if it means that the part is complete."""
    if error.code == 416 and have:  # no bytes after the part: it is complete, or part of another file
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return True
        _discard(want)
        raise _Retryable("the file on the server does not match the earlier part; restarted")
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _Retryable(f"the server responded {error.code} {error.reason}")
    hint = {
        404: "the file was not found",
        410: "the file was removed by the server",
        403: "access denied",
        401: "login required",
    }
    raise DownloadError(
        f"{want.url}: {hint.get(error.code, 'the server refused the request')} ({error.code} {error.reason}); get the "
        f"file from its publisher and save it as {want.target}"
    )


def _receive(want: _Want, answer: Any, have: int, note: _Note, show: Callable[[int, int | None], None]) -> bool:
    """Check the response and write its content; True if an earlier part was resumed."""
    headers = answer.headers
    if want.url.startswith("https://") and answer.geturl().startswith("http://"):
        raise DownloadError(
            f"{want.url}: the server redirects to an unencrypted address, {answer.geturl()}; not downloaded"
        )
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{want.url}: the server sent a web page instead of weights; it may require a login, or a proxy intervened"
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _Retryable(f"the server compressed the file with {headers['Content-Encoding']}, which was not requested")
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
            _discard(want)
            raise _Retryable("the file on the server has changed since the first part was received; restarted")
        resumed = True
        total = total if total is not None else (have + length if length is not None else None)
    else:
        have, total = 0, length  # the server does not support ranges, or the file has changed
    if want.size is not None and total is not None and total != want.size:
        _discard(want)
        raise DownloadError(f"{want.url}: expected {want.size} bytes, the server has {total}; not downloaded")
    if total is not None and total > LARGEST:
        raise DownloadError(
            f"{want.url}: the server announces {total} bytes, more than the limit of {LARGEST}; not downloaded"
        )
    _check_space(want, (total or 0) - have)
    _write_note(want, _Note(want.url, validator, total))

    with want.part.open("r+b" if resumed else "wb") as file:
        file.seek(have)
        have = _copy(answer, file, have, total, show)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have < total:
        raise _Retryable(f"the connection ended after {have} of {total} bytes")
    return resumed


def _copy(answer: Any, file: Any, have: int, total: int | None, show: Callable[[int, int | None], None]) -> int:
    """Write the response to the file; returns the number of bytes that it has then."""
    show(have, total)
    while True:
        try:
            data = answer.read(CHUNK)
        except http.client.IncompleteRead as error:
            data, broken = error.partial, True
        except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise _Retryable(f"the connection was lost after {have} bytes: {error or type(error).__name__}") from None
        else:
            broken = False
        file.write(data)
        have += len(data)
        if have > LARGEST:
            raise DownloadError(f"{file.name}: the server sent more than {LARGEST} bytes; stopped after {have}")
        show(have, total)
        if broken or not data:
            return have


def _mismatch(want: _Want) -> str:
    """How the part differs from the published file; empty if it does not."""
    length = want.part.stat().st_size
    if want.size is not None and length != want.size:
        return f"{length} bytes, expected {want.size}"
    hashes = {"sha256": want.sha256, "md5": want.md5}
    with want.part.open("rb") as file:
        for kind, digits in hashes.items():
            if digits:
                file.seek(0)
                found = hashlib.file_digest(
                    file, lambda kind=kind: hashlib.new(kind, usedforsecurity=False)
                ).hexdigest()
                if not found.startswith(digits):
                    return f"{kind} {found[: max(len(digits), 8)]}, expected {digits}"
        file.seek(0)
        if not want.hashed and file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "a web page"
    return "" if length else "an empty file"


def _finish(want: _Want) -> None:
    want.part.replace(want.target)
    want.note.unlink(missing_ok=True)


def _discard(want: _Want) -> None:
    want.part.unlink(missing_ok=True)
    want.note.unlink(missing_ok=True)


def _read_note(want: _Want) -> _Note:
    try:
        return _Note(**json.loads(want.note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Note()


def _write_note(want: _Want, note: _Note) -> None:
    write_json(want.note, asdict(note), DownloadError, sync=False)


def _check_space(want: _Want, need: int) -> None:
    free = shutil.disk_usage(want.target.parent).free
    if need > free:
        raise DownloadError(
            f"{want.target}: needs {need / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free on its disk; free some "
            "space, or set MASKWRIGHT_CACHE to a folder on another disk"
        )


def _write_error(error: OSError, target: Path) -> DownloadError:
    """The error for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"{target}: the disk is full; free some space, or set MASKWRIGHT_CACHE to a folder on another disk. The "
            "received part is kept, and the next call resumes from it"
        )
    return DownloadError(
        f"{target}: cannot be written ({error.strerror or error}); set MASKWRIGHT_CACHE to a folder that is writable"
    )


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of this target, after waiting for other processes that hold it."""
    with target.with_name(target.name + ".lock").open("a+b") as file:
        waited = False
        while not _lock(file):
            if not waited:
                _console().print(f"waiting for another process that downloads {target.name}", markup=False)
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
            # Other errors: the file system has no locks (some network folders); continue without one.
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
