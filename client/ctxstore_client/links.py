"""A connection to a daemon: its socket, its protocol state, its maps.

Owns what belongs to one connection and how it ends. It must not decide who uses it (the pool) nor
how to wait on it (the drivers). One operation at a time uses a link.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

from ctxstore.errors import TransportError
from ctxstore.wire.connection import Phase

if TYPE_CHECKING:
    from ctxstore.wire.connection import ControlConnection
    from ctxstore.wire.messages import HelloOk, Message
    from ctxstore_client.memory import ArenaMap, StagingMap
    from ctxstore_client.ops.requests import ByteArray

RECEIVE_BYTES: Final = 256 * 1024
"""Largest read of control frames: a reply of 4096 rows arrives in one."""


class LinkKind(Enum):
    """What a connection was opened for."""

    READER = "reader"
    """Unix socket with the arena mapped."""
    WRITER = "writer"
    """Unix socket with a staging."""
    CONTROL = "control"
    """Control messages only."""
    STREAM = "stream"
    """Data connection."""


class SocketLink:
    """See `ops.requests.Link`; what is not there is for pool and drivers only."""

    __slots__ = (
        "_closed",
        "_staging",
        "arena",
        "armed_s",
        "asked_staging_bytes",
        "deferred",
        "held",
        "hello",
        "idle_since_s",
        "inbox",
        "kind",
        "parked",
        "process",
        "scratch",
        "sock",
        "uses",
        "wire",
    )

    def __init__(
        self,
        sock: socket.socket,
        wire: ControlConnection,
        hello: HelloOk,
        *,
        kind: LinkKind,
        arena: ArenaMap | None = None,
        staging: StagingMap | None = None,
        asked_staging_bytes: int = 0,
    ) -> None:
        self.sock = sock
        self.wire = wire
        self.hello = hello
        self.kind = kind
        self.arena = arena
        self._staging = staging
        self.asked_staging_bytes = asked_staging_bytes
        self.inbox: deque[Message] = deque()
        self.parked: dict[int, Message] = {}
        self.deferred: list[bytes] = []
        self.scratch = bytearray(0 if kind is LinkKind.STREAM else RECEIVE_BYTES)
        self.uses = 0
        self.armed_s: dict[int, float] = {}
        self.held = False
        self.idle_since_s = 0.0
        self.process = os.getpid()
        self._closed = False

    @property
    def staging(self) -> ByteArray | None:
        """Memory shared with the daemon, writable."""
        return None if self._staging is None else self._staging.data

    @property
    def streams(self) -> bool:
        """Whether this is a data connection."""
        return self.kind is LinkKind.STREAM

    @property
    def fresh(self) -> bool:
        """Whether no operation used it before the present one."""
        return self.uses <= 1

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way to this side."""
        return not self.streams and not self.wire.outstanding

    @property
    def closed(self) -> bool:
        """Whether `close` or `abandon` was called."""
        return self._closed

    @property
    def alive(self) -> bool:
        """False once closed by either side, and when something arrived that nobody asked for."""
        if self._closed:
            return False
        poller = select.poll()
        poller.register(self.sock, select.POLLIN | select.POLLRDHUP)
        return not poller.poll(0)

    def next_rid(self) -> int:
        """A request id that is not in use here."""
        return self.wire.next_rid()

    def encode(self, message: Message) -> bytes:
        """A control frame. Raises TransportError once the daemon has announced the end."""
        if self.wire.phase is Phase.CLOSED:
            raise TransportError("the daemon has ended this connection")
        return self.wire.send(message)

    def defer(self, frame: bytes) -> None:
        """Keep a one-way frame for the next send."""
        self.deferred.append(frame)

    def take_deferred(self) -> bytes:
        """What has to go first, given up by the link."""
        frames = b"".join(self.deferred)
        self.deferred.clear()
        return frames

    def send_deferred(self) -> None:
        """Send what waits, as far as it goes without waiting. For a link that nobody uses."""
        frames = self.take_deferred()
        if not frames or self._closed:
            return
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self.sock.send(frames, socket.MSG_DONTWAIT)
        if sent < len(frames):
            self.deferred.insert(0, frames[sent:])

    def close(self) -> None:
        """Shut down and close; afterwards the kernel delivers nothing to this side."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        if self._staging is not None:
            self._staging.close()
        if self.arena is not None:
            self.arena.release()

    def shut_down(self) -> None:
        """End the connection under an operation of another thread, which then closes it."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Close this process's copy of a connection that its parent goes on using."""
        self._closed = True
        self.sock.close()
