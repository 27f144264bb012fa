"""Control connections without sockets: the hello, then requests in and replies out.

Owns what a client may ask and who may ask. It must not wait or move payload: bytes come in through
`receive`, leave through an `Outlet`, and requests go to the engine as events.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np

from ctxstore import __version__
from ctxstore.errors import (
    AuthenticationError,
    ClosedError,
    CtxStoreError,
    LeaseExpired,
    LocalProtocolError,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    UnknownNamespace,
    WrongCluster,
)
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side
from ctxstore_daemon.engine import events
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.seams import Clock
    from ctxstore_daemon.executor import Executor
    from ctxstore_daemon.server.shm import StagingBudgetState, StagingGrant

STREAMS_MAX: Final = 64
"""Data connections of a node: each has a thread of its own."""

_log = event_log(__name__)


class Outlet(Protocol):
    """The way out to one client. Calls do not block and never call back into the session."""

    def write(self, frame: bytes) -> None:
        """Queue bytes; nothing happens on a closed connection."""
        ...

    def end(self) -> None:
        """Close once what is queued has left, or soon after if the client does not read."""
        ...


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What every hello is answered with."""

    node_id: bytes
    boot_id: bytes
    cluster_id: str
    arena_bytes: int
    shard_bytes_max: int
    lease_bytes_max: int
    lease_s_max: float
    batch_keys_max: int


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    """A namespace that clients may name: its place in the configuration and its ids."""

    index: int
    ns_id: int
    incarnation: int


class ServerState:
    """What the sessions of one node share. Changed on the loop's thread only."""

    __slots__ = (
        "_empty",
        "accepting",
        "address_data",
        "clock",
        "closed_total",
        "connections_max",
        "executor",
        "facts",
        "hellos_refused",
        "namespaces",
        "next_conn",
        "on_stats",
        "opened_total",
        "protocol_errors",
        "reply_errors",
        "requests",
        "sessions",
        "staging",
        "streams",
        "token_bytes",
        "unix_path",
    )

    def __init__(
        self,
        facts: NodeFacts,
        namespaces: dict[str, NamespaceFacts],
        *,
        executor: Executor,
        clock: Clock,
        staging: StagingBudgetState,
        token_bytes: Callable[[int], bytes],
        connections_max: int,
    ) -> None:
        self.facts = facts
        self.namespaces = namespaces
        self.executor = executor
        self.clock = clock
        self.staging = staging
        self.token_bytes = token_bytes
        self.connections_max = connections_max
        self.on_stats: Callable[[], str] = lambda: "{}"
        self.accepting = True
        self._empty: asyncio.Event | None = None
        self.unix_path = ""
        self.address_data = ""
        self.next_conn = 1
        self.sessions: dict[bytes, ControlSession] = {}
        """Open control sessions by the token that lets data connections join."""
        self.streams: dict[int, NamespaceFacts] = {}
        """Open data connections."""
        self.requests: dict[type, int] = {}
        self.opened_total = 0
        self.closed_total = 0
        self.hellos_refused = 0
        self.protocol_errors = 0
        self.reply_errors = 0
        """Replies of ours that the protocol forbids: always a defect."""

    @property
    def open_connections(self) -> int:
        """Control and data connections that have said hello."""
        return len(self.sessions) + len(self.streams)

    def figures(self) -> dict[str, Any]:
        """For statistics and metrics."""
        return {
            "control_connections": len(self.sessions),
            "data_connections": len(self.streams),
            "connections_max": self.connections_max,
            "staging_bytes": self.staging.used_bytes,
            "staging_bytes_max": self.staging.total_bytes,
            "requests": {kind.__name__.lower(): count for kind, count in self.requests.items()},
            "counters": {
                "opened": self.opened_total,
                "closed": self.closed_total,
                "hellos_refused": self.hellos_refused,
                "protocol_errors": self.protocol_errors,
                "internal_errors": self.reply_errors,
            },
        }

    def stream_closed(self, conn: int) -> None:
        """A data connection is gone, its thread out of every slot."""
        del self.streams[conn]
        self.closed_total += 1
        self.executor.close_conn(conn)
        self.note_gone()

    async def wait_empty(self) -> None:
        """Until no connection is open and all staging was returned; for the end of a node."""
        self._empty = asyncio.Event()
        self.note_gone()
        await self._empty.wait()

    def note_gone(self) -> None:
        """A connection or its staging went."""
        if self._empty is not None and not (self.open_connections or self.staging.used_bytes):
            self._empty.set()


class Greeting:
    """The hello of one connection: `receive` until a hello is there, then `accept` or close.

    Every error out of `receive` and `accept_stream` ends the connection; `failure` gives the last
    frame to send. `local` says that descriptors can be passed: only on a unix socket.
    """

    __slots__ = ("_namespace", "_server", "granted_bytes", "hello", "local", "wire")

    def __init__(self, server: ServerState, *, local: bool) -> None:
        self._server = server
        self.local = local
        self.wire = ControlConnection(Side.SERVER)
        self.hello: wire.Hello | None = None
        self.granted_bytes = 0
        """Staging to be created before `accept_control`; taken from the budget already."""
        self._namespace = NamespaceFacts(0, 0, 0)

    def receive(self, data: bytes) -> bool:
        """Whether the hello is complete and good. Raises CtxStoreError where it is not."""
        try:
            messages = self.wire.receive(data)
            if not messages:
                return False
            hello = messages[0]
            if len(messages) > 1 or not isinstance(hello, wire.Hello):
                raise RemoteProtocolError("requests before the hello was answered")
            self._check(hello)
        except CtxStoreError:
            self._server.hellos_refused += 1
            raise
        self.hello = hello
        if self.local and hello.shm and hello.role is wire.Role.CONTROL:
            self.granted_bytes = self._server.staging.grant(hello.staging_bytes)
        return True

    def failure(self, error: CtxStoreError) -> bytes:
        """The frame that tells the client why its connection closes."""
        return self.wire.fail(error)

    def abandon(self) -> None:
        """The connection goes without `accept_control`: return what was granted."""
        self._server.staging.give_back(self.granted_bytes)
        self.granted_bytes = 0

    def accept_control(
        self, outlet: Outlet, staging: StagingGrant | None
    ) -> tuple[ControlSession, bytes]:
        """The session and the frame that answers the hello. `staging` holds what was granted."""
        assert self.hello is not None, "accepted before its hello"
        assert (len(staging.data) if staging else 0) == self.granted_bytes, "staging as granted"
        session = ControlSession(
            self._server, self.wire, self._namespace, outlet=outlet, staging=staging
        )
        self.granted_bytes = 0
        return session, session.open(self.hello, shm=self.local and self.hello.shm)

    def accept_stream(self) -> bytes:
        """The frame that answers the hello of a data connection."""
        assert self.hello is not None, "accepted before its hello"
        hello = self.hello
        return self.wire.send(
            _hello_ok(
                self._server, hello, self._namespace, session=hello.session, shm=False, staging=0
            )
        )

    def enter_stream(self) -> int:
        """The hello of a data connection was answered: its number. `ServerState.stream_closed`
        ends what begins here."""
        server = self._server
        conn = server.next_conn
        server.next_conn += 1
        server.streams[conn] = self._namespace
        server.opened_total += 1
        server.executor.submit(events.ConnOpened(conn, self._namespace.index))
        return conn

    def _check(self, hello: wire.Hello) -> None:
        server = self._server
        if hello.cluster_id not in ("", server.facts.cluster_id):
            raise WrongCluster(
                f"this node belongs to cluster {server.facts.cluster_id!r}, "
                f"not to {hello.cluster_id!r}"
            )
        if hello.token:
            raise AuthenticationError("this node has no credentials and accepts no token")
        namespace = server.namespaces.get(hello.namespace)
        if namespace is None:
            raise UnknownNamespace(f"no namespace {hello.namespace!r} is configured on this node")
        if not server.accepting:
            raise ClosedError("this node is shutting down")
        if server.open_connections >= server.connections_max:
            raise Overloaded(
                f"{server.connections_max} connections are open already", retry_after_s=1.0
            )
        if hello.role is wire.Role.DATA:
            if len(server.streams) >= STREAMS_MAX:
                raise Overloaded(f"{STREAMS_MAX} data connections are open", retry_after_s=1.0)
            session = server.sessions.get(hello.session)
            if session is None or session.namespace != namespace:
                raise AuthenticationError("no open control connection has this session token")
        self._namespace = namespace


def _hello_ok(
    server: ServerState,
    hello: wire.Hello,
    namespace: NamespaceFacts,
    *,
    session: bytes,
    shm: bool,
    staging: int,
) -> wire.HelloOk:
    facts = server.facts
    return wire.HelloOk(
        rid=hello.rid,
        version=min(hello.version_max, wire.VERSION_MAX),
        capabilities=int(wire.CAPABILITIES_KNOWN),
        node_id=facts.node_id,
        boot_id=facts.boot_id,
        cluster_id=facts.cluster_id,
        session=session,
        ns_id=namespace.ns_id,
        incarnation=namespace.incarnation,
        arena_bytes=facts.arena_bytes if shm else 0,
        staging_bytes=staging,
        shard_bytes_max=facts.shard_bytes_max,
        lease_bytes_max=facts.lease_bytes_max,
        lease_s_max=facts.lease_s_max,
        batch_keys_max=facts.batch_keys_max,
        unix_path=server.unix_path,
        data_address=server.address_data,
        server=f"ctxstore {__version__}",
    )


class ControlSession:
    """One open control connection. Implements `ControlSink` for the executor.

    `receive` what arrives; `closed` when the connection is gone (idempotent).
    """

    __slots__ = (
        "_outlet",
        "_server",
        "_staging",
        "_token",
        "_wire",
        "conn",
        "ended",
        "mapped",
        "namespace",
        "staging_bytes",
    )

    def __init__(
        self,
        server: ServerState,
        connection: ControlConnection,
        namespace: NamespaceFacts,
        *,
        outlet: Outlet,
        staging: StagingGrant | None,
    ) -> None:
        self._server = server
        self._wire = connection
        self._outlet = outlet
        self._staging = staging
        self._token = server.token_bytes(wire.ID_BYTES)
        self.namespace = namespace
        self.staging_bytes = 0 if staging is None else len(staging.data)
        self.conn = server.next_conn
        self.ended = False
        self.mapped = False
        server.next_conn += 1

    def open(self, hello: wire.Hello, *, shm: bool) -> bytes:
        """Enter the session everywhere; the frame that answers the hello."""
        server = self._server
        staging = self._staging
        self.mapped = shm
        server.sessions[self._token] = self
        server.opened_total += 1
        _log.debug("opened", conn=self.conn, client=hello.client, namespace=hello.namespace)
        server.executor.open_control(self.conn, self, staging.data if staging else None)
        server.executor.submit(events.ConnOpened(self.conn, self.namespace.index))
        return self._wire.send(
            _hello_ok(
                server,
                hello,
                self.namespace,
                session=self._token,
                shm=shm,
                staging=self.staging_bytes,
            )
        )

    def attach(self, outlet: Outlet) -> None:
        """Replies leave here from now on."""
        self._outlet = outlet

    def receive(self, data: bytes) -> None:
        """Take requests out of the bytes and start them."""
        if self.ended:
            return
        try:
            for message in self._wire.receive(data):
                self._take(message)
        except ProtocolError as error:
            self._server.protocol_errors += 1
            _log.warning("protocol_error", conn=self.conn, error=str(error))
            self.fail(error)

    def closed(self) -> None:
        """The connection is gone: leases end, staging is returned when the last copy is through."""
        self.ended = True
        server = self._server
        if server.sessions.pop(self._token, None) is None:
            return
        server.closed_total += 1
        _log.debug("closed", conn=self.conn)
        server.executor.close_conn(self.conn, when_idle=self._return_staging)
        server.note_gone()

    def deliver(self, message: wire.Reply) -> None:
        """Send a reply of the engine."""
        if self.ended:
            return
        try:
            frame = self._wire.send(message)
        except LocalProtocolError as error:
            # The engine answered what nobody asked, or too much: this client cannot go on.
            self._server.reply_errors += 1
            _log.error("reply_refused", conn=self.conn, error=str(error))
            self.fail(error)
            return
        self._outlet.write(frame)

    def end(self, reason: str) -> None:
        """The engine wants the connection gone."""
        _log.warning("connection_ended", conn=self.conn, reason=reason)
        self.fail(LeaseExpired(reason))

    def fail(self, error: CtxStoreError) -> None:
        """Tell the client why, and close. Idempotent."""
        if self.ended:
            return
        self.ended = True
        frame = self._wire.fail(error)
        if frame:
            self._outlet.write(frame)
        self._outlet.end()

    def _take(self, message: wire.Message) -> None:
        server = self._server
        kind = type(message)
        server.requests[kind] = server.requests.get(kind, 0) + 1
        if kind is wire.Put:
            self._check_put(cast("wire.Put", message))
        elif kind is wire.Get and not self.mapped:
            raise RemoteProtocolError(
                "GET: this connection maps no arena; ask on a data connection"
            )
        elif kind is wire.Ping:
            self.deliver(wire.CountReply(message.rid, 0))
            return
        elif kind is wire.Stats:
            self.deliver(wire.TextReply(message.rid, server.on_stats()))
            return
        now = server.clock.now()
        if isinstance(message, wire.OneWay):
            server.executor.submit(events.RequestArrived(self.conn, message, 0), now)
            return
        assert not isinstance(message, wire.Reply | wire.Hello | wire.Ping), "seen to above"
        deadline_ns = now.mono_ns + message.timeout_us * 1000
        server.executor.submit(events.RequestArrived(self.conn, message, deadline_ns), now)

    def _check_put(self, message: wire.Put) -> None:
        """Every range must lie inside this connection's staging."""
        offsets = message.offset_column
        if not len(offsets):
            raise RemoteProtocolError(
                "PUT.offsets: a put on a control connection names its staging"
            )
        # Offsets are bounded first, so that the sum cannot wrap.
        beyond = np.maximum.reduce(offsets) > self.staging_bytes
        if beyond or np.maximum.reduce(offsets + message.length_column) > self.staging_bytes:
            raise RemoteProtocolError(
                f"PUT.offsets: a range outside the {self.staging_bytes} bytes of staging"
            )

    def _return_staging(self) -> None:
        if self._staging is not None:
            staging, self._staging = self._staging, None
            size = len(staging.data)
            server = self._server

            def returned() -> None:
                server.staging.give_back(size)
                server.note_gone()

            staging.release(returned)


class PlainConnection:
    """A whole connection, hello included, for bytes that come without a raw socket.

    `shm` creates staging of a given size where the client asks for shared memory (in one process
    it simply is memory); None: the client is on another machine. Same calls as `ControlSession`.
    """

    __slots__ = ("_greeting", "_outlet", "_shm", "session")

    def __init__(
        self,
        server: ServerState,
        outlet: Outlet,
        *,
        shm: Callable[[int], StagingGrant] | None = None,
    ) -> None:
        self._outlet = outlet
        self._shm = shm
        self._greeting: Greeting | None = Greeting(server, local=shm is not None)
        self.session: ControlSession | None = None

    def receive(self, data: bytes) -> None:
        """Bytes of the client, cut anywhere."""
        if self.session is not None:
            self.session.receive(data)
            return
        greeting = self._greeting
        if greeting is None:
            return
        try:
            if not greeting.receive(data):
                return
            if greeting.hello is None or greeting.hello.role is not wire.Role.CONTROL:
                raise RemoteProtocolError("HELLO.role: no data connection here")
        except CtxStoreError as error:
            self._greeting = None
            self._outlet.write(greeting.failure(error))
            self._outlet.end()
            return
        self._greeting = None
        size = greeting.granted_bytes
        staging = self._shm(size) if self._shm is not None and size else None
        self.session, frame = greeting.accept_control(self._outlet, staging)
        self._outlet.write(frame)

    def closed(self) -> None:
        """The connection is gone."""
        self._greeting = None
        if self.session is not None:
            self.session.closed()
