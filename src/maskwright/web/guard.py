"""Who may talk to a server: checks of host, origin and token before an application sees a request."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from maskwright.errors import MissingExtraError

try:
    from starlette.requests import HTTPConnection
    from starlette.responses import JSONResponse, Response
except ImportError:
    raise MissingExtraError("the server", "web") from None

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True)
class Rules:
    """What a request must have.

    Attributes:
        token: Value that requests carry as `Authorization: Bearer TOKEN`; None: none.
        hosts: Allowed values of the Host header without the port, against DNS rebinding; None: any.
        public: Paths that need no token.
        cookie: Name of a cookie that may carry the token instead of the header; None: none may.
    """

    token: str | None = None
    hosts: frozenset[str] | None = LOCAL_HOSTS
    public: frozenset[str] = frozenset()
    cookie: str | None = None

    def refusal(self, connection: HTTPConnection) -> Response | None:
        """Return the answer to a request that is refused; None for one that is allowed.

        Requests of pages of other origins are refused, also those without the header Origin that a browser marks as
        coming from elsewhere, except that a person may follow a link to the server.

        Args:
            connection: A request, or the request that opens a WebSocket.
        """
        headers = connection.headers
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name.lower() not in self.hosts:
            return JSONResponse({"error": f"this server does not answer for host {name!r}"}, 421)
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            return JSONResponse({"error": f"requests from pages of {origin!r} are refused"}, 403)
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if origin is None and elsewhere and headers.get("sec-fetch-mode") != "navigate":
            return JSONResponse({"error": "requests from pages of other sites are refused"}, 403)
        # Not the path of `connection.url`: some versions of Starlette compose it from the header Host.
        if self.token is not None and connection.scope["path"] not in self.public and not self.knows(connection):
            answer = {"error": "the request needs the header 'Authorization: Bearer TOKEN' with the server's token"}
            return JSONResponse(answer, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def knows(self, connection: HTTPConnection) -> bool:
        """Return whether a request has the token."""
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        given = given.strip().encode("latin-1", "replace").decode(errors="replace")  # headers are decoded as Latin-1
        if self.matches(given) and scheme.lower() == "bearer":
            return True
        return self.cookie is not None and any(
            self.matches(value) for value in cookie_values(connection.headers.getlist("cookie"), self.cookie)
        )

    def matches(self, given: str) -> bool:
        """Return whether `given` is the token, in a time that does not depend on where they differ."""
        return self.token is None or hmac.compare_digest(given.encode(errors="replace"), self.token.encode())


class Guard:
    """An application of which only allowed requests reach the inner one; every answer gets some headers.

    Args:
        inner: The application.
        rules: What requests must have.
        headers: Headers of every answer.
    """

    def __init__(self, inner: ASGIApp, rules: Rules, headers: dict[str, str] | None = None):
        self._inner, self.rules = inner, rules
        self._headers = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._inner(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        refused = self.rules.refusal(HTTPConnection(scope))
        if refused is None:
            await self._inner(scope, receive, with_headers)
        elif scope["type"] == "websocket":  # before it is accepted: the client sees status 403
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refused(scope, receive, with_headers)


def cookie_values(headers: list[str], name: str) -> list[str]:
    """Return the values of a cookie; a browser may send several with the same name, and invalid ones."""
    found: list[str] = []
    for pair in "; ".join(headers).split(";"):
        try:
            cookie: SimpleCookie = SimpleCookie(pair.strip())
        except CookieError:
            continue
        if name in cookie:
            found.append(cookie[name].value)
    return found


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
