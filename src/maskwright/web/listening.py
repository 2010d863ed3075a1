"""Where servers listen: sockets with errors in sentences, and connections that must send their requests in time."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

from maskwright.errors import MissingExtraError, UsageError
from maskwright.files import describe_os_error

try:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise MissingExtraError("the server", "web") from None


def bound(host: str, *ports: int, listen: bool = True) -> socket.socket:
    """Return a socket at an address.

    Args:
        host: The host.
        *ports: The port; further ones are taken if those before are in use. 0: a free one.
        listen: Whether clients can connect at once; otherwise they are refused until a server begins to listen.

    Raises:
        UsageError: If the address is not available.
    """
    for number in ports:
        try:
            found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
            family = min((each[0] for each in found), key=lambda each: each != socket.AF_INET)
            # With the protocol: asyncio sets TCP_NODELAY only then, without which a small answer takes 40 ms longer.
            opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen on {host}:{number} ({error}); give another --host or --port") from None
        if os.name == "posix":
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, number))
            if listen:
                opened.listen(128)
            return opened
        except (OSError, OverflowError) as error:
            opened.close()
            if number != ports[-1] and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            raise UsageError(f"cannot listen on {host}:{number} ({reason}); give another --host or --port") from None
    raise UsageError(f"cannot listen on {host}: no port is given")


def timed_protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol, with connections closed whose clients are too slow.

    Args:
        seconds: From the first moment of a connection, or the first byte of a further request, to the last header. And
            for the client to take what waits to be sent.
    """

    class Timed(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - as uvicorn's
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:  # no request has begun whose head is complete
                self._wait()
            else:
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self._moved()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._stalled is None:
                self._stalled = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._moved()
            super().resume_writing()

        def _moved(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _wait(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Timed
