"""One request of a download: redirects are checked at every hop, and slow or damaged answers are given up."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from maskwright.checkpoints.budget import shown
from maskwright.errors import DownloadError

CHUNK = 1 << 18  # bytes per read
LEAST_RATE = 1024.0  # bytes per second, on average over `timeout` seconds, below which a server is given up


class Retryable(Exception):
    """A failure after which another attempt may succeed."""


class TooSlow(Retryable):
    """The server sent fewer bytes per second than the minimum."""


def check_address(url: str) -> None:
    """Raise a DownloadError unless `url` is an http or https address with a host."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise DownloadError(f"{shown(url, 200)}: not a valid address ({shown(error)}); check it") from None
    if parts.scheme not in ("http", "https"):
        raise DownloadError(f"{shown(url, 200)}: only http and https addresses are supported")
    if not valid or re.search(r"[\x00-\x20\x7f]", url):
        raise DownloadError(f"{shown(url, 200)}: not a valid address; check it")


def open_address(url: str, headers: dict[str, str], timeout: float) -> Any:
    """Request an address and return the response after its headers.

    Redirects are followed to http and https only, and not to http once https was asked for.

    Args:
        url: The address.
        headers: Headers of the request.
        timeout: Seconds for connecting, for each read, and for all headers together.

    Raises:
        DownloadError: If the address, or that of a redirect, is invalid or not followed.
        OSError: As `urllib.request.urlopen` raises it.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _HTTP(),
        _HTTPS(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(url),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    # Headers and path must be ASCII.
    quoted = urllib.parse.quote(url, safe="!#$%&'()*+,/:;=?@[]~")
    try:
        return opener.open(urllib.request.Request(quoted, headers=headers), timeout=timeout)
    except (ValueError, OverflowError, http.client.InvalidURL) as error:  # UnicodeError for hosts
        raise DownloadError(f"{url}: the address, or that of a redirect, is invalid ({shown(error)})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, url: str):
        self.url = url
        self.encrypted = urllib.parse.urlsplit(url).scheme == "https"

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_redirect(self.url, newurl, self.encrypted)
        self.encrypted = self.encrypted or urllib.parse.urlsplit(newurl).scheme == "https"
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # urllib refuses other schemes with an error that does not say so.
        where = headers.get("location") or headers.get("uri") or ""
        target = urllib.parse.urljoin(req.full_url, where)
        if where:
            check_redirect(self.url, target, self.encrypted)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def check_redirect(url: str, target: str, encrypted: bool) -> None:
    """Raise a DownloadError for a redirect that is not followed.

    Args:
        url: The address that was asked for.
        target: The address of the redirect.
        encrypted: Whether an address before it was https.
    """
    scheme = urllib.parse.urlsplit(target).scheme
    if scheme not in ("http", "https"):
        raise DownloadError(
            f"{url}: the server redirects to {shown(target, 200)}, which is not an http or https address; not "
            "downloaded"
        )
    if encrypted and scheme != "https":
        raise DownloadError(
            f"{url}: the server redirects to an unencrypted address, {shown(target, 200)}; not downloaded"
        )


class _Response(http.client.HTTPResponse):
    """A response whose headers must arrive within the timeout of the socket, not only each part of them."""

    def __init__(self, sock: socket.socket, *arguments: Any, **keywords: Any):
        super().__init__(sock, *arguments, **keywords)
        self._socket = sock

    def begin(self) -> None:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            _shut(self._socket)

        timer = threading.Timer(self._socket.gettimeout() or 30.0, give_up)
        timer.daemon = True
        timer.start()
        try:
            super().begin()
        finally:
            timer.cancel()
        if late.is_set():  # the end of the connection looks like the end of the headers
            raise TimeoutError("the headers of the response took too long")


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_Connection, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_SecureConnection, req)


class _Watch:
    """Shuts a connection down when bytes arrive, but fewer than `LEAST_RATE` per second.

    A thread, because one read can take for ever if each byte arrives within the timeout.
    """

    def __init__(self, sock: socket.socket, window: float):
        self.sock, self.window = sock, window
        self.received, self.slow = 0, False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        before, idle = 0, 0
        while not self._done.wait(self.window):
            now = self.received
            idle = idle + 1 if now == before else 0
            # Without any byte, the timeout of the socket ends the read, unless the bytes are those of a chunk's header.
            if idle != 1 and now - before < LEAST_RATE * self.window:
                self.slow = True
                _shut(self.sock)
                return
            before = now

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()


def parts_of(answer: Any, window: float) -> Iterator[bytes]:
    """The content of a response, in parts as they arrive.

    Args:
        answer: What `open_address` returned.
        window: Seconds over which the rate is measured.

    Raises:
        TooSlow: If fewer than `LEAST_RATE` bytes per second arrive.
        Retryable: If the connection ends before the content does.
    """
    slow = f"the server sends less than {LEAST_RATE:.0f} bytes per second"
    with _Watch(answer._socket, window) as watch:
        while True:
            try:
                data = answer.read1(CHUNK)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if watch.slow and not isinstance(error, TimeoutError):
                    raise TooSlow(slow) from None
                if isinstance(error, http.client.IncompleteRead):
                    raise Retryable("the connection ended before the content did") from None
                raise Retryable(f"the connection was lost: {shown(error) or type(error).__name__}") from None
            if not data:
                if watch.slow:
                    raise TooSlow(slow)
                return
            watch.received += len(data)
            yield data


def number(text: str | None) -> int | None:
    """A number of bytes in a header; None if it is not one."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def content_range(text: str | None) -> tuple[int, int | None] | None:
    """The first byte and the whole length of the header Content-Range; None if it is invalid."""
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", text or "")
    if found is None:
        return None
    first, last, total = int(found[1]), int(found[2]), number(found[3])
    return None if last < first or (total is not None and last >= total) else (first, total)
