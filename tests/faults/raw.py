"""A client without manners: bare sockets and hand-made frames.

Owns talking to a daemon below the client library. It uses the wire vocabulary only.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

import msgpack

from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.daemon_process import DaemonProcess


def frame(*fields: Any) -> bytes:
    """A control frame with any content."""
    payload: bytes = msgpack.packb(fields)
    return struct.pack("<I", len(payload)) + payload


def hello_fields(**changes: Any) -> list[Any]:
    """The fields of a good hello, in wire order, some of them changed."""
    fields: dict[str, Any] = {
        "op": 1,
        "rid": 1,
        "version_min": 1,
        "version_max": 1,
        "role": 0,
        "cluster_id": "",
        "namespace": "default",
        "token": "",
        "client": "test",
        "capabilities": 0,
        "shm": False,
        "staging_bytes": 0,
        "session": b"",
    }
    assert set(changes) <= set(fields), changes
    return list((fields | changes).values())


class RawClient:
    """One control connection. `greet` says hello; afterwards `send` and `reply`."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.wire = ControlConnection(Side.CLIENT)
        self.fds: list[int] = []
        self._waiting: list[wire.Message] = []

    def greet(self, **changes: Any) -> wire.HelloOk:
        """Say hello and return the answer; descriptors are kept in `fds`."""
        _, _, low, high, role, *rest = hello_fields(**changes)
        rid = self.wire.next_rid()
        self.sock.sendall(self.wire.send(wire.Hello(rid, low, high, wire.Role(role), *rest)))
        answer = self.reply()
        assert isinstance(answer, wire.HelloOk), answer
        return answer

    def send(self, message: wire.Message) -> None:
        """One frame."""
        self.sock.sendall(self.wire.send(message))

    def reply(self) -> wire.Message:
        """The next message. Raises ConnectionError when the daemon closes."""
        while not self._waiting:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 4)
            self.fds += fds
            if not data:
                raise ConnectionError("closed by the daemon")
            self._waiting += self.wire.receive(data)
        return self._waiting.pop(0)


def until_closed(sock: socket.socket, timeout_s: float) -> bytes:
    """Everything the daemon sends until it closes. Raises TimeoutError when it does not."""
    sock.settimeout(timeout_s)
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(1 << 16):
            received += data
    return received


def failure_in(received: bytes) -> tuple[int, str]:
    """Code and text of the failure that is the only frame in these bytes."""
    (length,) = struct.unpack_from("<I", received)
    assert len(received) == 4 + length, "one whole frame"
    op, _, code, text, _ = msgpack.unpackb(received[4:])
    assert op == 3, "a failure"
    return code, text


def data_socket(daemon: DaemonProcess) -> socket.socket:
    """A bare connection to the data port."""
    assert daemon.endpoints is not None, "not started"
    host, _, port = daemon.endpoints.data.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@contextlib.contextmanager
def raw_client(daemon: DaemonProcess, *, unix: bool = False) -> Iterator[RawClient]:
    """A connection that has not said hello yet."""
    with daemon.connect(unix=unix) as sock:
        yield RawClient(sock)


@contextlib.contextmanager
def raw_stream(daemon: DaemonProcess, session: bytes) -> Iterator[socket.socket]:
    """A data connection that has been greeted."""
    with data_socket(daemon) as sock:
        client = RawClient(sock)
        client.greet(role=1, session=session)
        yield sock
