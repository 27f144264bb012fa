"""A very small HTTP/1.1 server for health and metrics.

Owns parsing and bounds of GET requests. It must not know what a page says: it gets a table of
pages. One request a connection, answered with `Connection: close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, cast

REQUEST_BYTES_MAX: Final = 8 * 1024
REQUEST_TIMEOUT_S: Final = 5.0
CONNECTIONS_MAX: Final = 64

_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One answer. `body` is sent as it is."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]
"""From path to what makes the page; called on the loop's thread, so it must be quick."""


class HttpServerState:
    """Open connections of one server, so that they can be bounded and ended."""

    __slots__ = ("open", "pages")

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.open: dict[HttpConnection, None] = {}

    def protocol(self) -> HttpConnection:
        """Factory for `loop.create_server`."""
        return HttpConnection(self)

    def close(self) -> None:
        """End every connection."""
        for connection in list(self.open):
            connection.abort()


class HttpConnection(asyncio.Protocol):
    """Reads one request head, writes one page, closes."""

    __slots__ = ("_buffer", "_server", "_timer", "_transport")

    def __init__(self, server: HttpServerState) -> None:
        self._server = server
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came; strangers above the bound are turned away at once."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        if len(self._server.open) >= CONNECTIONS_MAX:
            self._transport.abort()
            return
        self._server.open[self] = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(REQUEST_TIMEOUT_S, self.abort)

    def data_received(self, data: bytes) -> None:
        """Answer as soon as the head is complete; the body of a request is not waited for."""
        if self._transport is None or self._transport.is_closing():
            return
        self._buffer += data
        if b"\r\n\r\n" in self._buffer:
            self._answer(respond(bytes(self._buffer), self._server.pages))
        elif len(self._buffer) > REQUEST_BYTES_MAX:
            self._answer(_encode(_plain(431), with_body=True))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._server.open.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """End the connection without another word."""
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, response: bytes) -> None:
        assert self._transport is not None, "answered before connection_made"
        self._transport.write(response)
        self._transport.close()


def respond(request: bytes, pages: Pages) -> bytes:
    """The whole response to a request head."""
    parts = request.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
        return _encode(_plain(400), with_body=True)
    method, target, _ = parts
    if method not in (b"GET", b"HEAD"):
        return _encode(_plain(405), with_body=True)
    make = pages.get(target.split(b"?", 1)[0].decode("latin-1"))
    return _encode(make() if make else _plain(404), with_body=method == b"GET")


def _plain(status: int) -> Page:
    return Page(status, f"{_REASONS[status]}\n".encode())


def _encode(page: Page, *, with_body: bool) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if page.status == 405 else ""
    head = (
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\n"
        f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (page.body if with_body else b"")
