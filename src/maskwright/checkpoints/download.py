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
import ssl
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from maskwright._version import __version__
from maskwright.checkpoints import web
from maskwright.checkpoints.budget import shown
from maskwright.checkpoints.catalogue import Entry
from maskwright.checkpoints.web import Retryable, TooSlow
from maskwright.errors import CheckpointError, DownloadError
from maskwright.files import write_json
from maskwright.text import printable

LARGEST = 1 << 36  # maximum size of a download: 64 GiB


def cache_folder() -> Path:
    """The folder for downloaded files: $MASKWRIGHT_CACHE, or a folder in the platform's cache folder.

    Raises:
        DownloadError: If the home folder is not known.
    """
    chosen = os.environ.get("MASKWRIGHT_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else _platform_cache()
    except RuntimeError:
        raise DownloadError(
            f"the cache folder {chosen or '~/.cache'} is in a home folder that does not exist; set MASKWRIGHT_CACHE to "
            "another folder"
        ) from None


def _platform_cache() -> Path:
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
    if _is_there(target):
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

    Redirects are followed to http and https only, and not to http once https was asked for. A server that sends less
    than 1 kB per second is given up. Where neither size nor hash is known, the file must be readable as a checkpoint.
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
    if _is_there(target):
        return target
    web.check_address(url)
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


def _is_there(target: Path) -> bool:
    """Whether a file has been downloaded; DownloadError if its path cannot be used."""
    try:
        if target.is_file():
            return True
        if target.exists():
            raise DownloadError(f"{target}: is not a file, but is in the place of one; remove it")
        if "\0" in str(target):
            raise DownloadError(f"{shown(target)!r}: not a valid path; set MASKWRIGHT_CACHE to another folder")
    except OSError as error:
        raise _write_error(error, target) from None
    return False


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


def _retry(want: _Want, tries: int, pause: float, progress: bool) -> None:
    """Attempt the download up to `tries` times, then verify it and move it into place."""
    address, reason, slow, attempt = printable(want.url), "", 0, 0
    with _bar(want.target.name, progress) as show:
        for attempt in range(max(1, tries)):
            if attempt:
                time.sleep(min(pause * 2 ** (attempt - 1), 60.0))
            try:
                resumed = _request(want, show)
                _check_readable(want)
            except TooSlow as failure:
                reason, slow = str(failure), slow + 1
                if slow > 1:
                    break
                continue
            except Retryable as failure:
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
                    f"{address}: the download is not the published file ({wrong}) and was removed; the file may have "
                    "been replaced on the server or altered by a proxy. Try another network or report it"
                )
    have = want.part.stat().st_size if want.part.exists() else 0
    kept = f"{have} bytes are kept, the next call resumes from there" if have else "nothing was received; try later"
    raise DownloadError(f"{address}: the download failed after {attempt + 1} attempts ({printable(reason)}); {kept}")


def _request(want: _Want, show: Callable[[int, int | None], None]) -> bool:
    """Request the missing bytes and write them; True if an earlier part was resumed."""
    if want.part.is_symlink() or (want.part.exists() and not want.part.is_file()):
        want.part.unlink()  # not ours; an OSError for a folder
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
        answer = web.open_address(want.url, headers, want.timeout)
    except urllib.error.HTTPError as error:
        with error:
            return _handle_status(want, error, have)
    except urllib.error.URLError as error:
        host = urllib.parse.urlsplit(want.url).hostname
        if isinstance(error.reason, socket.gaierror):
            raise DownloadError(
                f"{want.url}: the host {host} cannot be resolved; check the network, or set https_proxy if a proxy is "
                f"needed. The file can also be saved as {want.target} by hand"
            ) from None
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{want.url}: the certificate of {host} is not valid ({shown(error.reason.verify_message)}); a proxy "
                "may have intervened. Not downloaded"
            ) from None
        raise Retryable(f"no connection: {shown(error.reason)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Retryable(f"the connection was lost: {shown(error) or type(error).__name__}") from None
    with answer:
        return _receive(want, answer, have, note, show)


def _handle_status(want: _Want, error: urllib.error.HTTPError, have: int) -> bool:
    """Handle an HTTP error; True if it means that the part is complete."""
    if error.code == 416 and have:  # no bytes after the part: it is complete, or part of another file
        total = re.fullmatch(r"bytes \*/([0-9]{1,18})", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return True
        _discard(want)
        raise Retryable("the file on the server does not match the earlier part; restarted")
    if error.code in (408, 425, 429) or error.code >= 500:
        raise Retryable(f"the server responded {error.code} {shown(error.reason)}")
    hint = {
        404: "the file was not found",
        410: "the file was removed by the server",
        403: "access denied",
        401: "login required",
    }
    raise DownloadError(
        f"{want.url}: {hint.get(error.code, 'the server refused the request')} ({error.code} {shown(error.reason)}); "
        f"get the file from its publisher and save it as {want.target}"
    )


def _receive(want: _Want, answer: Any, have: int, note: _Note, show: Callable[[int, int | None], None]) -> bool:
    """Check the response and write its content; True if an earlier part was resumed."""
    headers = answer.headers
    if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(
            f"{want.url}: the server sent a web page instead of weights; it may require a login, or a proxy intervened"
        )
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise Retryable(f"the server compressed the file with {shown(encoding)}, which was not requested")
    validator = _validator(headers.get("ETag", ""))
    if not validator or validator.startswith("W/"):
        validator = _validator(headers.get("Last-Modified", ""))
    length = web.number(headers.get("Content-Length"))

    resumed = False
    if answer.status == 206:
        span = web.content_range(headers.get("Content-Range"))
        first, total = span if span is not None else (-1, None)
        fits = total is None or length is None or have + length <= total
        same = first == have and total in (None, note.total or total) and fits
        if not same or (note.validator and validator and validator != note.validator):
            _discard(want)
            raise Retryable("the file on the server has changed since the first part was received; restarted")
        resumed = have > 0
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
        try:
            have = _copy(want, answer, file, have, total, show)
        finally:
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise Retryable(f"the connection ended after {have} of {total} bytes")
    return resumed


def _validator(text: str) -> str:
    """A header that identifies the content, if it can be sent back."""
    return text if re.fullmatch(r"[\x20-\x7e]{1,500}", text) else ""


def _copy(
    want: _Want, answer: Any, file: Any, have: int, total: int | None, show: Callable[[int, int | None], None]
) -> int:
    """Write the response to the file; returns the number of bytes that it has then."""
    show(have, total)
    for data in web.parts_of(answer, want.timeout):
        file.write(data)
        have += len(data)
        if have > LARGEST:
            raise DownloadError(f"{want.url}: the server sent more than {LARGEST} bytes; stopped after {have}")
        show(have, total)
    return have


def _check_readable(want: _Want) -> None:
    """Where nothing else tells whether the file is whole, it must be readable as a checkpoint."""
    if want.hashed or want.size is not None or _read_note(want).total is not None:
        return
    from maskwright.checkpoints.reading import check_readable

    try:
        check_readable(want.part, want.target.suffix)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{want.part}: ")
        if not _mismatch(want):
            _discard(want)
            raise Retryable(f"the size is not known, and what was received is no whole checkpoint: {reason}") from None


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
    """What is known of the part; an empty note if there is none, or it is damaged."""
    try:
        values = json.loads(want.note.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return _Note()
    if not isinstance(values, dict):
        return _Note()
    entries = cast(dict[str, Any], values)
    url, validator, total = (entries.get(name) for name in ("url", "validator", "total"))
    if not isinstance(url, str) or not isinstance(validator, str):
        return _Note()
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or not 0 <= total <= LARGEST):
        return _Note()
    return _Note(url, _validator(validator), total)


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
def _locked(target: Path) -> Generator[None, None, None]:
    """Hold the lock of this target, after waiting for other processes that hold it."""
    with target.with_name(target.name + ".lock").open("a+b") as file:
        waited = False
        while not _lock(file):
            if not waited:
                _console().print(f"waiting for another process that downloads {printable(target.name)}", markup=False)
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
def _bar(name: str, progress: bool) -> Generator[Callable[[int, int | None], None], None, None]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = _console()
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(printable(name), total=None)
        yield lambda have, total: bar.update(task, completed=have, total=total)
