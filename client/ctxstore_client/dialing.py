"""How connections are made: TCP or unix socket, hello, descriptors, and which way leads to a node.

Owns the first exchange on each connection and the choice between shared memory and sockets. It
blocks the calling thread, never longer than it is told; it must not keep connections.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from ctxstore import __version__, limits
from ctxstore.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    CtxStoreError,
    DeadlineExceeded,
    RemoteProtocolError,
    TransportError,
)
from ctxstore.wire.connection import ControlConnection, Side
from ctxstore.wire.messages import (
    CAPABILITIES_KNOWN,
    VERSION_MAX,
    VERSION_MIN,
    Failure,
    Hello,
    HelloOk,
    Role,
    error_from_failure,
)
from ctxstore_client.discovery import (
    Endpoint,
    SharedMemory,
    Target,
    TcpEndpoint,
    UnixEndpoint,
    split_host_port,
)
from ctxstore_client.links import LinkKind, SocketLink
from ctxstore_client.memory import ArenaMap, StagingMap

HELLO_FDS_MAX: Final = 2
CONNECT_SHARE: Final = 0.5
"""Of the time left, what one of several hosts may use up before the next one is tried."""

ArenaOf = Callable[[bytes, int, int], ArenaMap]
"""(boot id, descriptor, bytes) -> the map of that arena, shared with other connections."""


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach a node: through its unix socket with shared memory, or over TCP."""

    control: Endpoint
    shared: bool
    node_id: bytes
    data: tuple[str, int] | None
    anchor: SocketLink
    """The control connection whose session data connections join; closed with the route."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a control connection is asked for in its hello."""

    kind: LinkKind
    shm: bool
    staging_bytes: int = 0


class Dialer:
    """Makes connections to the nodes of one target. Any thread may use it."""

    def __init__(self, target: Target, *, arena_of: ArenaOf) -> None:
        self._target = target
        self._arena_of = arena_of
        self._shared_once = False

    def find_route(self, timeout_s: float) -> Route:
        """Try the endpoints in order. Raises TransportError or DeadlineExceeded when none answers.

        Errors of authentication, protocol or namespace are raised at once: another host of the same
        cluster would say the same.
        """
        until = monotonic() + timeout_s
        problem: TransportError | DeadlineExceeded | None = None
        for position, endpoint in enumerate(self._target.endpoints):
            remaining = until - monotonic()
            last = position == len(self._target.endpoints) - 1
            try:
                return self._route_to(endpoint, remaining if last else remaining * CONNECT_SHARE)
            except (TransportError, DeadlineExceeded) as error:
                problem = error
        assert problem is not None, "a target has at least one endpoint"
        raise problem

    def _route_to(self, endpoint: Endpoint, timeout_s: float) -> Route:
        until = monotonic() + timeout_s
        mode = self._target.shm
        by_unix = isinstance(endpoint, UnixEndpoint)
        share = by_unix and mode is not SharedMemory.OFF
        kind = LinkKind.READER if share else LinkKind.CONTROL
        link = self._open(endpoint, _Wish(kind, shm=share), timeout_s)
        if share and link.arena is not None:
            self._shared_once = True
            return Route(
                endpoint, True, link.hello.node_id, self._data_of(endpoint, link.hello), link
            )
        if not by_unix and mode is not SharedMemory.OFF and link.hello.unix_path:
            try:
                shared = self._shared_route(link.hello, until - monotonic())
            except BaseException:
                link.close()
                raise
            if shared is not None:
                link.close()
                self._shared_once = True
                return shared
        if mode is SharedMemory.REQUIRE:
            link.close()
            problem = f"shm='require', but {endpoint} shares no memory with this process"
            # What worked before is no misconfiguration: the node is coming or going.
            raise TransportError(problem) if self._shared_once else ConfigError(problem)
        return Route(endpoint, False, link.hello.node_id, self._data_of(endpoint, link.hello), link)

    def _shared_route(self, hello: HelloOk, timeout_s: float) -> Route | None:
        """The way through the node's unix socket, if that socket is here and leads to that node."""
        if not os.path.exists(hello.unix_path):
            return None
        endpoint = UnixEndpoint(hello.unix_path)
        try:
            link = self._open(endpoint, _Wish(LinkKind.READER, shm=True), timeout_s)
        except (TransportError, RemoteProtocolError):
            return None
        if link.hello.node_id == hello.node_id and link.arena is not None:
            return Route(endpoint, True, hello.node_id, self._data_of(endpoint, hello), link)
        link.close()
        return None

    def _data_of(self, endpoint: Endpoint, hello: HelloOk) -> tuple[str, int] | None:
        if not hello.data_address:
            return None
        host, port = split_host_port(hello.data_address)
        if host in ("0.0.0.0", "::") and isinstance(endpoint, TcpEndpoint):
            return endpoint.host, port
        return host, port

    def open_link(
        self, route: Route, kind: LinkKind, *, staging_bytes: int, timeout_s: float
    ) -> SocketLink:
        """One more connection on a route. Raises TransportError, DeadlineExceeded, ..."""
        wish = _Wish(kind, shm=route.shared, staging_bytes=staging_bytes)
        link = self._open(route.control, wish, timeout_s)
        if link.hello.node_id != route.node_id or (route.shared and link.arena is None):
            link.close()
            raise TransportError(f"another node answers at {route.control} now")
        return link

    def _open(self, endpoint: Endpoint, wish: _Wish, timeout_s: float) -> SocketLink:
        until = monotonic() + timeout_s
        sock = _connect(endpoint, timeout_s)
        fds: list[int] = []
        try:
            wire = ControlConnection(Side.CLIENT)
            hello = self._hello(wire, wish)
            answer = _exchange_hello(sock, wire, hello, fds, until)
            arena, staging = self._map(answer, fds)
        except BaseException:
            sock.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return SocketLink(
            sock,
            wire,
            answer,
            kind=wish.kind,
            arena=arena,
            staging=staging,
            asked_staging_bytes=wish.staging_bytes,
        )

    def _hello(self, wire: ControlConnection, wish: _Wish, session: bytes = b"") -> Hello:
        return Hello(
            rid=wire.next_rid(),
            version_min=VERSION_MIN,
            version_max=VERSION_MAX,
            role=Role.DATA if session else Role.CONTROL,
            cluster_id=self._target.cluster_id,
            namespace=self._target.namespace,
            token=self._target.token,
            client=f"ctxstore-python/{__version__} pid {os.getpid()}",
            capabilities=int(CAPABILITIES_KNOWN),
            shm=wish.shm,
            staging_bytes=wish.staging_bytes,
            session=session,
        )

    def _map(self, answer: HelloOk, fds: list[int]) -> tuple[ArenaMap | None, StagingMap | None]:
        wanted = (answer.arena_bytes > 0) + (answer.staging_bytes > 0)
        if len(fds) != wanted:
            raise RemoteProtocolError(f"hello came with {len(fds)} descriptors, not {wanted}")
        if answer.arena_bytes == 0:
            return None, None
        staging = None
        if answer.staging_bytes:
            staging = StagingMap(fds[1], answer.staging_bytes)
        return self._arena_of(answer.boot_id, fds[0], answer.arena_bytes), staging

    def open_stream(self, route: Route, session: bytes, *, timeout_s: float) -> SocketLink:
        """A data connection that joins a session. Raises like `open_link`."""
        if route.data is None:
            raise TransportError(f"{route.control} offers no data connections")
        until = monotonic() + timeout_s
        sock = _connect(TcpEndpoint(*route.data), timeout_s)
        try:
            wire = ControlConnection(Side.CLIENT)
            wish = _Wish(LinkKind.STREAM, shm=False)
            hello = self._hello(wire, wish, session)
            answer = _exchange_hello(sock, wire, hello, [], until)
            if wire.take_rest_copy():
                raise RemoteProtocolError("data before the first request of a data connection")
            if answer.node_id != route.node_id:
                raise TransportError(f"another node answers at {route.control} now")
        except AuthenticationError as error:
            sock.close()
            # The credentials were good for the control connection: its session has ended.
            raise TransportError(f"data connection refused: {error}") from error
        except BaseException:
            sock.close()
            raise
        return SocketLink(sock, wire, answer, kind=LinkKind.STREAM)


def _connect(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    if timeout_s <= 0:
        raise DeadlineExceeded(f"no time left to connect to {endpoint}")
    try:
        if isinstance(endpoint, TcpEndpoint):
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(endpoint.path)
        except BaseException:
            sock.close()
            raise
        return sock
    except TimeoutError as error:
        raise DeadlineExceeded(f"no connection to {endpoint} in time") from error
    except OSError as error:
        raise TransportError(f"cannot connect to {endpoint}: {error}") from error


def _exchange_hello(
    sock: socket.socket, wire: ControlConnection, hello: Hello, fds: list[int], until: float
) -> HelloOk:
    """Say hello and wait for the answer; descriptors that come with it are appended to `fds`."""
    try:
        _limit(sock, until)
        sock.sendall(wire.send(hello))
        while True:
            _limit(sock, until)
            data, found, _, _ = socket.recv_fds(
                sock, limits.HELLO_BYTES_MAX, HELLO_FDS_MAX, socket.MSG_CMSG_CLOEXEC
            )
            fds.extend(found)
            if not data:
                wire.receive_eof()
                raise TransportError("the daemon closed the connection during the hello")
            for message in wire.receive(data):
                if isinstance(message, Failure):
                    raise _refusal(message)
                if isinstance(message, HelloOk):
                    return message
    except TimeoutError as error:
        raise DeadlineExceeded("the daemon did not answer the hello in time") from error
    except OSError as error:
        raise TransportError(f"connection lost during the hello: {error}") from error


def _refusal(failure: Failure) -> CtxStoreError:
    error = error_from_failure(failure)
    # A node that is shutting down cannot be reached; other refusals will not pass by waiting.
    return TransportError(str(error)) if isinstance(error, ClosedError) else error


def _limit(sock: socket.socket, until: float) -> None:
    remaining = until - monotonic()
    if remaining <= 0:
        raise DeadlineExceeded("the daemon did not answer the hello in time")
    sock.settimeout(remaining)
