"""A node that follows a script: real sockets, a real arena, and whatever answers a test wants.

Owns a unix socket, a TCP control port and a data port, each connection on a thread of its own. It
stores shards in a dict; it must not be mistaken for the daemon: tests use it for answers that a
healthy daemon never gives.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxstore import limits
from ctxstore.checksum import namespace_id, shard_checksum
from ctxstore.errors import CtxStoreError
from ctxstore.wire import data as wired
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARENA_BYTES = 8 * limits.MIB
TABLE_BYTES = 2 * limits.MIB
STAGING_BYTES = 1 * limits.MIB
NS_ID = namespace_id("default")

Answer = "wire.Reply | wire.Failure | None"


def memory_file(size: int) -> tuple[int, np.ndarray]:
    """Descriptor of a memory file, and its bytes; the mapping ends with the array."""
    fd = os.memfd_create("scripted", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd, np.frombuffer(mmap.mmap(fd, size), np.uint8)


class ScriptedNode:
    """Answers like a node; `hooks[type of message]` may answer instead, or raise to close."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "node.sock")
        self.node_id = os.urandom(16)
        self.boot_id = os.urandom(16)
        self.session = os.urandom(16)
        self.arena_fd, self.arena = memory_file(ARENA_BYTES)
        self.generations = self.arena[: ARENA_BYTES // 1024].view("<u4")
        self.free_at = TABLE_BYTES
        self.slots: dict[bytes, tuple[int, int]] = {}
        self.inline: dict[bytes, bytes] = {}
        self.hooks: dict[type, Callable[[Any, Any], Any]] = {}
        self.data_hook: Callable[[socket.socket, Any, bytes], bool] | None = None
        self.hello_hook: Callable[[wire.Hello], Any] | None = None
        self.seen: Counter[str] = Counter()
        self.released: list[int] = []
        self.reported: list[bytes] = []
        self.shared = True
        self.grants_staging = True
        self.staging_bytes = STAGING_BYTES
        self.batch_keys_max = limits.BATCH_KEYS_MAX
        self.lease_bytes_max = ARENA_BYTES
        self.next_lease = 1
        self.stopping = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.unix = self._listen(socket.AF_UNIX, self.path, self._control)
        self.control = self._listen(socket.AF_INET, ("127.0.0.1", 0), self._control)
        self.data = self._listen(socket.AF_INET, ("127.0.0.1", 0), self._data)

    @property
    def tcp_url(self) -> str:
        return f"ctxstore://127.0.0.1:{self.control[1]}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.path}"

    def store(self, key: bytes, payload: bytes) -> None:
        """Put a shard in directly."""
        if len(payload) <= limits.INLINE_BYTES_MAX:
            self.inline[key] = payload
            return
        offset = self.free_at
        self.free_at += -(-len(payload) // limits.PAGE_BYTES) * limits.PAGE_BYTES
        self.arena[offset : offset + len(payload)] = np.frombuffer(payload, np.uint8)
        self.slots[key] = (offset, len(payload))

    def payload(self, key: bytes) -> bytes | None:
        if key in self.inline:
            return self.inline[key]
        if key not in self.slots:
            return None
        offset, length = self.slots[key]
        return self.arena[offset : offset + length].tobytes()

    def cut_connections(self) -> None:
        """Close every connection, as a node does that dies; the listeners stay."""
        with self._lock:
            for sock in self._sockets[3:]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stopping = True
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()
        if self.arena.size:
            os.close(self.arena_fd)
        self.arena = np.empty(0, np.uint8)
        self.generations = np.empty(0, np.uint32)
        self.hooks.clear()
        self.data_hook = self.hello_hook = None

    def _listen(self, family: int, address: Any, serve: Any) -> Any:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(16)
        with self._lock:
            self._sockets.append(listener)
        self._start(self._accept, listener, serve)
        return listener.getsockname()

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, serve: Any) -> None:
        while not self.stopping:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._sockets.append(sock)
            self._start(self._serve, serve, sock)

    def _serve(self, serve: Any, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, CtxStoreError, ConnectionError):
            serve(sock)
        sock.close()

    # ------------------------------------------------------------ control

    def _control(self, sock: socket.socket) -> None:
        server = ControlConnection(Side.SERVER)
        staging: np.ndarray | None = None
        while chunk := sock.recv(1 << 16):
            for message in server.receive(chunk):
                self.seen[type(message).__name__] += 1
                if isinstance(message, wire.Hello):
                    staging = self._greet(sock, server, message)
                    continue
                hook = self.hooks.get(type(message))
                answer = hook(self, message) if hook else self._answer(message, staging)
                if isinstance(answer, bytes):
                    sock.sendall(answer)
                elif answer is not None:
                    sock.sendall(server.send(answer))

    def _greet(
        self, sock: socket.socket, server: ControlConnection, hello: wire.Hello
    ) -> np.ndarray | None:
        if self.hello_hook is not None and (refusal := self.hello_hook(hello)) is not None:
            sock.sendall(server.fail(refusal))
            raise ConnectionError("refused")
        local = sock.family == socket.AF_UNIX and hello.shm and self.shared
        fds = [self.arena_fd] if local else []
        staging = None
        granted = 0
        if local and hello.staging_bytes and self.grants_staging:
            granted = min(self.staging_bytes, hello.staging_bytes)
            staging_fd, staging = memory_file(granted)
            fds.append(staging_fd)
        frame = server.send(self._hello_ok(hello, local, granted))
        socket.send_fds(sock, [frame], fds)
        if staging is not None:
            os.close(fds[1])
        return staging

    def _hello_ok(self, hello: wire.Hello, local: bool, granted: int) -> wire.HelloOk:
        return wire.HelloOk(
            rid=hello.rid,
            version=1,
            capabilities=int(wire.CAPABILITIES_KNOWN),
            node_id=self.node_id,
            boot_id=self.boot_id,
            cluster_id="",
            session=hello.session or self.session,
            ns_id=NS_ID,
            incarnation=0,
            arena_bytes=ARENA_BYTES if local else 0,
            staging_bytes=granted,
            shard_bytes_max=STAGING_BYTES,
            lease_bytes_max=self.lease_bytes_max,
            lease_s_max=60.0,
            batch_keys_max=self.batch_keys_max,
            unix_path=self.path if self.shared else "",
            data_address=f"127.0.0.1:{self.data[1]}",
            server="scripted",
        )

    def get_reply(self, message: wire.Get) -> wire.GetReply:
        rows = np.zeros(message.count, wire.ENTRY_DTYPE)
        rows["status"] = wire.Lookup.MISS
        inline = b""
        for row, key_row in zip(rows, message.key_rows, strict=True):
            key = key_row.tobytes()
            if key in self.inline:
                payload = self.inline[key]
                total = shard_checksum(payload, key=key, ns_id=NS_ID, incarnation=0)
                row["offset"], row["length"], row["sum"] = len(inline), len(payload), total
                row["flags"], row["status"] = wire.EntryFlag.INLINE, wire.Lookup.HIT
                inline += payload
            elif key in self.slots:
                row["offset"], row["length"] = self.slots[key]
                row["generation"] = self.generations[int(row["offset"]) // limits.PAGE_BYTES]
                row["status"] = wire.Lookup.HIT
        lease = self.next_lease
        self.next_lease += 1
        return wire.GetReply(message.rid, lease, rows.tobytes(), inline)

    def _answer(self, message: Any, staging: np.ndarray | None) -> Any:
        if isinstance(message, wire.Get):
            return self.get_reply(message)
        if isinstance(message, wire.Release):
            self.released.extend(message.lease_column.tolist())
            return None
        if isinstance(message, wire.Report):
            self.reported.extend(row.tobytes() for row in message.key_rows)
            return None
        if isinstance(message, wire.Put):
            assert staging is not None
            return self._put(message, staging)
        if isinstance(message, (wire.Exists, wire.Hold, wire.Touch, wire.Remove)):
            there = [self.payload(row.tobytes()) is not None for row in message.key_rows]
            return wire.MaskReply(message.rid, bytes(there))
        if isinstance(message, wire.Match):
            there = [self.payload(row.tobytes()) is not None for row in message.key_rows]
            return wire.CountReply(message.rid, [*there, False].index(False))
        if isinstance(message, (wire.Ping, wire.Flush, wire.Prefetch)):
            return wire.CountReply(message.rid, 0)
        if isinstance(message, (wire.Stats, wire.Explain)):
            return wire.TextReply(message.rid, "{}")
        raise AssertionError(f"no answer to {message}")

    def _put(self, message: wire.Put, staging: np.ndarray) -> wire.PutReply:
        results = bytearray()
        columns = zip(
            message.key_rows,
            message.offset_column.tolist(),
            message.length_column.tolist(),
            strict=True,
        )
        for row, offset, length in columns:
            key = row.tobytes()
            known = self.payload(key) is not None
            results.append(wire.PutResult.EXISTS if known else wire.PutResult.COMMITTED)
            if not known:
                self.store(key, staging[offset : offset + length].tobytes())
        return wire.PutReply(message.rid, bytes(results))

    # ------------------------------------------------------------ data

    def _data(self, sock: socket.socket) -> None:
        server = ControlConnection(Side.SERVER)
        while server.hello_ok is None:
            for message in server.receive(sock.recv(1 << 16)):
                assert isinstance(message, wire.Hello)
                assert message.session == self.session, message
                sock.sendall(server.send(self._hello_ok(message, False, 0)))
        while head := _exactly(sock, wired.DATA_HEADER_BYTES):
            header = wired.unpack_header(head)
            meta = _exactly(sock, header.meta_bytes)
            self.seen[header.op.name] += 1
            if self.data_hook is not None and self.data_hook(sock, header, meta):
                continue
            if header.op is wired.DataOp.GET:
                self.send_shards(sock, header, meta)
            else:
                self._receive_shards(sock, header, meta)

    def send_shards(
        self, sock: socket.socket, header: Any, meta: bytes, *, damage: bool = False
    ) -> None:
        asked = wired.unpack_get_meta(header, meta)
        entries = np.zeros(header.count, wire.DATA_ENTRY_DTYPE)
        payloads: list[bytes] = []
        for entry, row, room in zip(
            entries, asked.key_rows, asked.capacity_column.tolist(), strict=True
        ):
            key = row.tobytes()
            payload = self.payload(key)
            entry["status"] = wire.Lookup.MISS
            if payload is None:
                continue
            entry["length"] = len(payload)
            entry["status"] = wire.Lookup.HIT if len(payload) <= room else wire.Lookup.TOO_SMALL
            entry["sum"] = shard_checksum(payload, key=key, ns_id=NS_ID, incarnation=0)
            if len(payload) <= room:
                payloads.append(payload)
        if damage:
            payloads[0] = bytes(len(payloads[0]))
        sock.sendall(wired.pack_get_reply(header.rid, entries))
        for payload in payloads:
            sock.sendall(payload)

    def _receive_shards(self, sock: socket.socket, header: Any, meta: bytes) -> None:
        put = wired.unpack_put_meta(header, meta)
        keys = [row.tobytes() for row in put.key_rows]
        verdicts = np.array(
            [wire.PutResult.EXISTS if self.payload(k) is not None else wire.WANTED for k in keys],
            np.uint8,
        )
        sock.sendall(wired.pack_verdicts(wired.DataOp.OFFER, header.rid, verdicts))
        wanted = np.flatnonzero(verdicts == wire.WANTED).tolist()
        for index in wanted:
            payload = _exactly(sock, int(put.length_column[index]))
            total = wired.unpack_sum(_exactly(sock, wired.DATA_SUM_BYTES))
            key = keys[index]
            good = total == shard_checksum(payload, key=key, ns_id=NS_ID, incarnation=0)
            verdicts[index] = wire.PutResult.COMMITTED if good else wire.PutResult.REFUSED
            if good and self.payload(key) is None:
                self.store(key, payload)
        if wanted:
            sock.sendall(wired.pack_verdicts(wired.DataOp.RESULT, header.rid, verdicts))


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)


@contextlib.contextmanager
def scripted_node() -> Iterator[ScriptedNode]:
    """A node in a short path (unix socket names are short), closed at the end."""
    with tempfile.TemporaryDirectory(prefix="ctx-") as directory:
        node = ScriptedNode(Path(directory))
        try:
            yield node
        finally:
            node.close()
