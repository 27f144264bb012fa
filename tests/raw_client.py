"""A client of nothing but wire messages and blocking sockets, for tests of the daemon alone.

Owns one control connection with its mappings, or one data connection. It must not know pools,
retries or deadlines: tests want to see what the daemon itself does.
"""

from __future__ import annotations

import mmap
import os
import socket
from typing import TYPE_CHECKING, Final, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ctxstore.checksum import checksum, seed
from ctxstore.errors import TransportError
from ctxstore.limits import KEY_BYTES, MIB
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tests.daemon_process import DaemonProcess

TIMEOUT_US: Final = 10_000_000
M = TypeVar("M", bound=wire.Message)
Bytes = npt.NDArray[np.uint8]


def hello(
    *,
    role: wire.Role = wire.Role.CONTROL,
    namespace: str = "default",
    cluster_id: str = "",
    token: str = "",
    shm: bool = False,
    staging_bytes: int = 0,
    session: bytes = b"",
) -> wire.Hello:
    """A hello that a daemon with default settings accepts."""
    return wire.Hello(
        rid=1,
        version_min=wire.VERSION_MIN,
        version_max=wire.VERSION_MAX,
        role=role,
        cluster_id=cluster_id,
        namespace=namespace,
        token=token,
        client="test",
        capabilities=int(wire.CAPABILITIES_KNOWN),
        shm=shm,
        staging_bytes=staging_bytes,
        session=session,
    )


class RawClient:
    """A control connection. `greeting` is the answer to the hello, or the failure instead."""

    def __init__(self, connected: socket.socket, greeting: wire.Hello) -> None:
        self.socket = connected
        self.wire = ControlConnection(Side.CLIENT)
        self.fds: list[int] = []
        self.inbox: list[wire.Message] = []
        self.arena: Bytes = np.zeros(0, np.uint8)
        self.staging: Bytes = np.zeros(0, np.uint8)
        try:
            self.socket.sendall(self.wire.send(greeting))
            self.greeting = self.receive()
        except BaseException:
            connected.close()
            raise
        if isinstance(self.greeting, wire.HelloOk):
            self._map(self.greeting)

    @property
    def ok(self) -> wire.HelloOk:
        """The hello's answer, which was not a failure."""
        assert isinstance(self.greeting, wire.HelloOk), self.greeting
        return self.greeting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket and unmap."""
        self.socket.close()
        self.arena = self.staging = np.zeros(0, np.uint8)
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def receive(self) -> wire.Message:
        """The next message. Raises TransportError at the end of the connection."""
        while not self.inbox:
            data, fds, _, _ = socket.recv_fds(self.socket, 65536, 2)
            self.fds += fds
            if not data:
                raise TransportError("the daemon closed the connection")
            self.inbox += self.wire.receive(data)
        return self.inbox.pop(0)

    def send(self, message: wire.Message) -> None:
        """Send without waiting for anything."""
        self.socket.sendall(self.wire.send(message))

    def ask(self, message: wire.Message, kind: type[M]) -> M:
        """Send and return the reply, which has to be of this kind."""
        self.send(message)
        reply = self.receive()
        assert isinstance(reply, kind), reply
        return reply

    def rid(self) -> int:
        """A fresh request id."""
        return self.wire.next_rid()

    # ------------------------------------------------------------------- operations

    def put(
        self,
        keys: Sequence[bytes],
        payloads: Sequence[bytes | Bytes],
        *,
        durability: wire.Durability = wire.Durability.DEFAULT,
        ttl_ms: int = 0,
        timeout_us: int = TIMEOUT_US,
    ) -> list[wire.PutResult]:
        """Put through staging, one after another in it from its start."""
        self.send(self.put_message(keys, payloads, durability=durability, ttl_ms=ttl_ms))
        reply = self.receive()
        assert isinstance(reply, wire.PutReply), reply
        return [wire.PutResult(result) for result in reply.result_column.tolist()]

    def put_message(
        self,
        keys: Sequence[bytes],
        payloads: Sequence[bytes | Bytes],
        *,
        durability: wire.Durability = wire.Durability.DEFAULT,
        ttl_ms: int = 0,
        timeout_us: int = TIMEOUT_US,
    ) -> wire.Put:
        """The message, its payloads already in the staging."""
        offsets: list[int] = []
        at = 0
        for payload in payloads:
            offsets.append(at)
            self.staging[at : at + len(payload)] = np.frombuffer(payload, np.uint8)
            at += len(payload)
        return put_message(
            self.rid(),
            keys,
            [len(payload) for payload in payloads],
            offsets=offsets,
            durability=durability,
            ttl_ms=ttl_ms,
            timeout_us=timeout_us,
        )

    def get(self, keys: Sequence[bytes], *, release: bool = True) -> list[bytes | wire.Lookup]:
        """Payloads read out of the arena; the status where there is none."""
        reply = self.ask(wire.Get(self.rid(), TIMEOUT_US, b"".join(keys)), wire.GetReply)
        found = [self._payload(reply, row) for row in range(len(keys))]
        if release and reply.lease:
            self.send(wire.Release(0, np.array([reply.lease], "<u8").tobytes()))
        return found

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Visible or not."""
        request = wire.Exists(self.rid(), TIMEOUT_US, b"".join(keys))
        return self.ask(request, wire.MaskReply).mask_column.astype(bool).tolist()

    def stats(self) -> dict[str, object]:
        """The daemon's statistics."""
        import json

        found: dict[str, object] = json.loads(
            self.ask(wire.Stats(self.rid(), TIMEOUT_US), wire.TextReply).text
        )
        return found

    def _payload(self, reply: wire.GetReply, row: int) -> bytes | wire.Lookup:
        entry = reply.rows[row]
        status = wire.Lookup(int(entry["status"]))
        if status is not wire.Lookup.HIT:
            return status
        source = self.arena
        if entry["flags"] & wire.EntryFlag.INLINE:
            source = np.frombuffer(reply.inline, np.uint8)
        start = int(entry["offset"])
        return source[start : start + int(entry["length"])].tobytes()

    def _map(self, ok: wire.HelloOk) -> None:
        assert len(self.fds) == bool(ok.arena_bytes) + bool(ok.staging_bytes)
        if ok.arena_bytes:
            mapped = mmap.mmap(self.fds[0], ok.arena_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            self.arena = np.frombuffer(mapped, np.uint8)
        if ok.staging_bytes:
            self.staging = np.frombuffer(mmap.mmap(self.fds[1], ok.staging_bytes), np.uint8)


def put_message(
    rid: int,
    keys: Sequence[bytes],
    lengths: Sequence[int],
    *,
    offsets: Sequence[int] = (),
    durability: wire.Durability = wire.Durability.DEFAULT,
    ttl_ms: int = 0,
    timeout_us: int = TIMEOUT_US,
) -> wire.Put:
    """A Put with one option value for all keys."""
    return wire.Put(
        rid=rid,
        timeout_us=timeout_us,
        durability=durability,
        keys=b"".join(keys),
        lengths=np.array(lengths, "<u4").tobytes(),
        offsets=np.array(offsets, "<u8").tobytes(),
        ttl_ms=np.array([ttl_ms], "<u8").tobytes(),
        priority=np.zeros(1, "<i2").tobytes(),
        depth=np.zeros(1, "<u4").tobytes(),
        cost=np.array([np.nan], "<f4").tobytes(),
    )


def connect_unix(daemon: DaemonProcess, *, staging_bytes: int = 4 * MIB) -> RawClient:
    """With arena and staging."""
    return RawClient(daemon.connect(unix=True), hello(shm=True, staging_bytes=staging_bytes))


def connect_tcp(daemon: DaemonProcess) -> RawClient:
    """Without shared memory."""
    return RawClient(daemon.connect(), hello())


class RawData:
    """A data connection that joins the session of an open control connection."""

    def __init__(self, control: RawClient) -> None:
        self.ok = control.ok
        name, _, port = self.ok.data_address.rpartition(":")
        self.socket = socket.create_connection((name, int(port)), timeout=10)
        self.client = RawClient(self.socket, hello(role=wire.Role.DATA, session=self.ok.session))
        assert isinstance(self.client.greeting, wire.HelloOk), self.client.greeting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def get(
        self, keys: Sequence[bytes], *, capacity: int = 64 * MIB, exact: bool = False
    ) -> list[bytes | wire.Lookup]:
        """Payloads, their sums checked; the status where there is none."""
        capacities = np.full(len(keys), capacity, "<u4")
        self.socket.sendall(
            wire_data.pack_get(
                1, b"".join(keys), capacities.tobytes(), timeout_us=TIMEOUT_US, exact=exact
            )
        )
        header, meta = self._reply()
        entries = wire_data.unpack_entries(header, meta, capacities, exact=exact)
        found: list[bytes | wire.Lookup] = []
        for key, entry in zip(keys, entries, strict=True):
            status = wire.Lookup(int(entry["status"]))
            if status is not wire.Lookup.HIT:
                found.append(status)
                continue
            payload = self._exactly(int(entry["length"]))
            assert checksum(payload, self._seed(key, len(payload))) == int(entry["sum"])
            found.append(payload)
        return found

    def put(
        self, keys: Sequence[bytes], payloads: Sequence[bytes], *, spoil: int = 0
    ) -> list[wire.PutResult]:
        """Offer and send; the first `spoil` sums sent are wrong."""
        offer = put_message(7, keys, [len(payload) for payload in payloads])
        self.socket.sendall(wire_data.pack_put(offer))
        header, meta = self._reply()
        verdicts = wire_data.unpack_verdicts(
            header, meta, count=len(keys), phase=wire_data.VerdictPhase.OFFER
        )
        wanted = np.flatnonzero(verdicts == wire.WANTED).tolist()
        phase = wire_data.VerdictPhase.RESULT
        while wanted:
            for index in wanted:
                sent = checksum(payloads[index], self._seed(keys[index], len(payloads[index])))
                spoil, sent = (spoil - 1, sent ^ 1) if spoil else (0, sent)
                self.socket.sendall(payloads[index] + wire_data.pack_sum(sent))
            header, meta = self._reply()
            verdicts = wire_data.unpack_verdicts(header, meta, count=len(keys), phase=phase)
            wanted = np.flatnonzero(verdicts == wire.RESEND).tolist()
            phase = wire_data.VerdictPhase.LAST
        return [wire.PutResult(verdict) for verdict in verdicts.tolist()]

    def _seed(self, key: bytes, length: int) -> int:
        return seed(key, ns_id=self.ok.ns_id, incarnation=self.ok.incarnation, length=length)

    def _reply(self) -> tuple[wire_data.DataHeader, bytes]:
        header = wire_data.unpack_header(self._exactly(wire_data.DATA_HEADER_BYTES))
        return header, self._exactly(header.meta_bytes)

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise TransportError("the daemon closed the connection")
            parts += part
        return bytes(parts)


def some_keys(count: int, *, space: int = 0) -> list[bytes]:
    """Distinct keys."""
    return [
        bytes((space % 256, index % 256, index // 256, 1)).ljust(KEY_BYTES, b"k")
        for index in range(count)
    ]
