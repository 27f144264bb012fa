"""Accepts connections, greets them on the raw socket, and hands them on.

Owns listening sockets, the hello's time limit and the passing of descriptors: those go with the
hello's answer in one sendmsg, before the event loop takes the socket. It must not look at requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from ctxstore import limits
from ctxstore.errors import CtxStoreError, RemoteProtocolError, StorageError, TransportError
from ctxstore.wire import messages as wire
from ctxstore_daemon.server.flow import STALL_S_MAX, Flow, flow_of
from ctxstore_daemon.server.session import ControlSession, Greeting, ServerState
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore_daemon.runtime.memfd import MemoryFile
    from ctxstore_daemon.runtime.staging import StagingPool
    from ctxstore_daemon.server.shm import StagingGrant

BACKLOG: Final = 1024
"""Connections the kernel holds for us; a cluster that restarts connects all at once."""

GREETINGS_MAX: Final = 256
"""Connections that have not said hello yet; one more ends the oldest of them."""

READ_BYTES: Final = 16 * 1024
HIGH_WATER_BYTES: Final = limits.MIB
END_GRACE_S: Final = 1.0
"""How long a connection that is being closed may take to read its last words."""

ACCEPT_PAUSE_S: Final = 0.1
"""After running out of descriptors."""

_log = event_log(__name__)


class ControlProtocol(asyncio.Protocol):
    """Carries bytes between a transport and a session. Implements `Outlet`."""

    __slots__ = ("_loop", "_paused", "_session", "_stalled", "_transport")

    def __init__(self, session: ControlSession, loop: asyncio.AbstractEventLoop) -> None:
        self._session = session
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Replies can leave from here on."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._session.attach(self)
        if self._session.ended:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Requests, cut anywhere."""
        self._session.receive(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we ended it."""
        if self._stalled is not None:
            self._stalled.cancel()
        self._session.closed()

    def pause_writing(self) -> None:
        """The client does not keep up with our replies: take no more requests meanwhile."""
        assert self._transport is not None, "paused before it was connected"
        self._paused = True
        self._transport.pause_reading()
        self._abort_in(STALL_S_MAX)

    def resume_writing(self) -> None:
        """The client has read."""
        assert self._transport is not None, "resumed before it was connected"
        self._paused = False
        if self._transport.is_closing():
            return  # the timer that runs now is the one that ends it
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        self._transport.resume_reading()

    def write(self, frame: bytes) -> None:
        """Queue a frame; a client that lets too many pile up is cut off."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(frame)
        if self._paused:
            queued = transport.get_write_buffer_size()
            if flow_of(queued, paused=True) is Flow.END:
                _log.warning("client_reads_nothing", conn=self._session.conn, queued_bytes=queued)
                transport.abort()

    def end(self) -> None:
        """Close when the last frame has left, or after a moment without it."""
        if self._transport is not None:
            self._transport.close()
            self._abort_in(END_GRACE_S)

    def _abort_in(self, delay_s: float) -> None:
        assert self._transport is not None, "ended before it was connected"
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = self._loop.call_later(delay_s, self._transport.abort)


class _Nowhere:
    """Outlet of a session whose transport is being made."""

    __slots__ = ()

    def write(self, frame: bytes) -> None:
        """Nobody has asked anything yet."""

    def end(self) -> None:
        """The protocol sees it in `ended` when it is connected."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What the listeners need to let connections in."""

    server: ServerState
    staging: StagingPool
    arena_fd: int
    open_stream: Callable[[int, socket.socket], None]
    """Serve a data connection that has been greeted; takes the socket over."""


class Listener:
    """One listening socket: control connections, or data connections with `role` DATA.

    Call order: construct on a bound socket, which makes clients wait in line; `run` as a task lets
    them in; cancel it to stop accepting: that closes the socket and every connection that has not
    said hello. Open connections stay.
    """

    def __init__(self, bound: socket.socket, gate: Gate, *, role: wire.Role) -> None:
        self._socket = bound
        self._gate = gate
        self._role = role
        self._local = bound.family == socket.AF_UNIX
        bound.setblocking(False)
        bound.listen(BACKLOG)
        self._greetings: dict[asyncio.Task[None], None] = {}

    async def run(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        accepted, _ = await loop.sock_accept(self._socket)
                    except OSError as error:
                        _log.error("accept_failed", error=str(error))
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                        continue
                    if len(self._greetings) >= GREETINGS_MAX:
                        # Whoever is silent longest, else silent ones would keep all others out.
                        oldest = next(iter(self._greetings))
                        del self._greetings[oldest]
                        oldest.cancel()
                    greeting = tasks.create_task(self._greet(accepted))
                    self._greetings[greeting] = None
                    greeting.add_done_callback(lambda done: self._greetings.pop(done, None))
        finally:
            self._socket.close()

    async def _greet(self, accepted: socket.socket) -> None:
        greeting = Greeting(self._gate.server, local=self._local)
        handed_on = False
        try:
            if not self._local:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._read_hello(accepted, greeting)
                await self._hand_on(accepted, greeting)
                handed_on = True
            except CtxStoreError as error:
                _log.warning("hello_refused", error=str(error), client=_client(greeting))
                await _say_farewell(accepted, greeting.failure(error))
        except (OSError, TimeoutError) as error:
            _log.debug("greeting_broke", error=str(error) or type(error).__name__)
        finally:
            if not handed_on:
                greeting.abandon()
                accepted.close()

    async def _read_hello(self, accepted: socket.socket, greeting: Greeting) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limits.HELLO_TIMEOUT_S):
            while True:
                data = await loop.sock_recv(accepted, READ_BYTES)
                if not data:
                    raise ConnectionResetError("closed before its hello")
                if greeting.receive(data):
                    break
        assert greeting.hello is not None, "receive() said so"
        if greeting.hello.role is not self._role:
            raise RemoteProtocolError(f"HELLO.role: this address takes {self._role.name} only")

    async def _hand_on(self, accepted: socket.socket, greeting: Greeting) -> None:
        if self._role is wire.Role.DATA:
            # Small, and the socket's buffer is empty: it leaves at once or the peer is broken.
            _send_all(accepted, greeting.accept_stream(), [])
            self._gate.open_stream(greeting.enter_stream(), accepted)
            return
        assert greeting.hello is not None, "handed on before its hello"
        loop = asyncio.get_running_loop()
        file, grant = await self._make_staging(greeting)
        session, frame = greeting.accept_control(_Nowhere(), grant)
        protocol = ControlProtocol(session, loop)
        connected = False
        try:
            fds = [self._gate.arena_fd] if greeting.local and greeting.hello.shm else []
            if file is not None:
                fds.append(file.fd)
            _send_all(accepted, frame, fds)
            await loop.connect_accepted_socket(lambda: protocol, accepted)
            connected = True
        finally:
            if file is not None:
                file.close_descriptor()
            if not connected:
                session.closed()

    async def _make_staging(
        self, greeting: Greeting
    ) -> tuple[MemoryFile, StagingGrant] | tuple[None, None]:
        """What was granted; nothing when memory is short, since the client can do without."""
        if not greeting.granted_bytes:
            return None, None
        try:
            return await self._gate.staging.create(greeting.granted_bytes)
        except StorageError as error:
            _log.warning("no_staging", wanted=greeting.granted_bytes, error=str(error))
            greeting.abandon()
            return None, None


def _send_all(accepted: socket.socket, frame: bytes, fds: list[int]) -> None:
    sent = socket.send_fds(accepted, [frame], fds) if fds else accepted.send(frame)
    if sent != len(frame):
        raise TransportError(f"the client took {sent} of {len(frame)} bytes of the hello's answer")


def _client(greeting: Greeting) -> str:
    return "" if greeting.hello is None else greeting.hello.client


async def _say_farewell(accepted: socket.socket, frame: bytes) -> None:
    """Send the last frame so that it arrives: closing over unread bytes would reset it away."""
    if not frame:
        return
    accepted.send(frame)
    accepted.shutdown(socket.SHUT_WR)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_GRACE_S):
            while await loop.sock_recv(accepted, READ_BYTES):
                pass
