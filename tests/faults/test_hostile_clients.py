"""Strangers, liars and mumblers on every port: refused with a reason, nobody else disturbed.

After each test the daemon has the descriptors, threads and leases it had before, and serves.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.errors import (
    AuthenticationError,
    RemoteProtocolError,
    StaleView,
    UnknownNamespace,
    VersionMismatch,
    WrongCluster,
)
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore_client import connect
from tests.daemon_process import DaemonProcess, daemon_process
from tests.faults.nodes import Outside, figure, hits, make_keys, put_all, until
from tests.faults.raw import (
    data_socket,
    failure_in,
    frame,
    hello_fields,
    raw_client,
    raw_stream,
    until_closed,
)
from tests.shards import payload_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONNECTIONS_MAX: Final = 300
LENGTH: Final = 1_000_000
KEYS: Final = make_keys(1, 10, LENGTH)
SMALL: Final = make_keys(2, 100, 1000)
QUICK_S: Final = 2.0
POOL_THREADS_MAX: Final = 13
"""Threads for disk, copies and staging, which start when they are first needed."""

MEMORY_SLACK_KIB: Final = 64 * 1024


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("hostile") / "data"
    connections = ["--set", f"limits.connections_max={CONNECTIONS_MAX}"]
    with daemon_process(directory, memory="64MiB", arguments=connections) as daemon:
        with connect(daemon.url) as store:
            assert set(put_all(store, [*KEYS, *SMALL], durability="group")) == {
                wire.PutResult.COMMITTED
            }
        yield daemon


@pytest.fixture
def bystander(daemon: DaemonProcess) -> Iterator[Any]:
    """A well-behaved store; afterwards nothing of what the test did may be left."""
    outside = Outside(daemon)
    with connect(daemon.url) as store, connect(daemon.url, shm="off") as remote:
        for each in (store, remote):
            assert all(hits(each, KEYS[:1]))
            put_all(each, KEYS[:1])
        base = outside.descriptors()
        threads = sum(outside.threads().values())
        streams = figure(store, "data_connections")
        resident_kib = _resident_kib(daemon)
        yield store
        assert outside.alive(), daemon.log
        for each in (store, remote):
            assert all(hits(each, [*KEYS, *SMALL]))
        until(lambda: figure(store, "leases") == 0, what="no lease is left")

        until(lambda: figure(store, "data_connections") <= streams, what="data connections end")
        until(
            lambda: not outside.descriptors() - base,
            what=lambda: f"descriptors as before: {outside.descriptors() - base}",
        )
        assert sum(outside.threads().values()) <= threads + POOL_THREADS_MAX
        grown_kib = _resident_kib(daemon) - resident_kib
        assert grown_kib < MEMORY_SLACK_KIB, f"{grown_kib} KiB more than before"
        assert "Traceback" not in daemon.log


def _resident_kib(daemon: DaemonProcess) -> int:
    """Memory of the process without what it shares: arena and staging have their own cap."""
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def every_port(daemon: DaemonProcess) -> list[Callable[[], socket.socket]]:
    assert daemon.endpoints is not None, "started"
    host, _, port = daemon.endpoints.http.rpartition(":")
    return [
        daemon.connect,
        lambda: daemon.connect(unix=True),
        lambda: data_socket(daemon),
        lambda: socket.create_connection((host, int(port)), timeout=10),
    ]


def test_connections_that_say_nothing_are_closed(daemon: DaemonProcess, bystander: Any) -> None:
    began = time.monotonic()
    with ExitStack() as stack:
        silent = [stack.enter_context(port()) for port in every_port(daemon) for _ in range(5)]
        assert all(hits(bystander, KEYS[:2])), "others are served meanwhile"
        for sock in silent:
            until_closed(sock, limits.HELLO_TIMEOUT_S + 3)
    assert time.monotonic() - began < limits.HELLO_TIMEOUT_S + 3


def test_half_a_hello_is_no_hello(daemon: DaemonProcess, bystander: Any) -> None:
    whole = frame(*hello_fields())
    for port in every_port(daemon)[:3]:
        for cut in (1, 4, len(whole) - 1):
            with port() as sock:
                sock.sendall(whole[:cut])
                sock.shutdown(socket.SHUT_WR)
                until_closed(sock, QUICK_S)


def test_garbage_on_every_port(daemon: DaemonProcess, bystander: Any) -> None:
    rng = random.Random(7)
    for port in every_port(daemon):
        for length in (1, 5, 100, 5000, 200_000):
            with port() as sock:
                sock.settimeout(QUICK_S)
                try:
                    sock.sendall(rng.randbytes(length))
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    continue  # closed already
                until_closed(sock, QUICK_S)


@pytest.mark.parametrize("claimed", [0, 16 * 1024 + 1, 2**31, 2**32 - 1])
def test_a_first_frame_of_an_impossible_length(
    daemon: DaemonProcess, bystander: Any, claimed: int
) -> None:
    for port in every_port(daemon)[:3]:
        with port() as sock:
            sock.sendall(struct.pack("<I", claimed) + bytes(100))
            code, text = failure_in(until_closed(sock, QUICK_S))
            assert code == RemoteProtocolError.code
            assert str(claimed) in text


@pytest.mark.parametrize("claimed", [0, limits.FRAME_BYTES_MAX + 1, 2**32 - 1])
def test_a_later_frame_of_an_impossible_length(
    daemon: DaemonProcess, bystander: Any, claimed: int
) -> None:
    with raw_client(daemon) as client:
        client.greet()
        client.sock.sendall(struct.pack("<I", claimed) + bytes(100))
        code, _ = failure_in(until_closed(client.sock, QUICK_S))
        assert code == RemoteProtocolError.code


@pytest.mark.parametrize(
    ("meta_bytes", "body_bytes", "count", "op"),
    [
        (2**32 - 1, 0, 1, 1),
        (28, 2**63, 1, 1),
        (28, 0, 2**32 - 1, 1),
        (2**32 - 1, 0, 1, 3),
        (100, 2**63, 1, 3),
        (28, 0, 1, 2),
        (28, 0, 1, 77),
    ],
)
def test_a_data_header_that_claims_the_impossible(
    daemon: DaemonProcess,
    bystander: Any,
    meta_bytes: int,
    body_bytes: int,
    count: int,
    op: int,
) -> None:
    with raw_client(daemon) as client:
        session = client.greet().session
        with raw_stream(daemon, session) as sock:
            header = struct.pack(
                *("<IBBHQIIQ", wire_data.DATA_MAGIC, 1, op, 0, 1),
                *(count, meta_bytes, body_bytes),
            )
            sock.sendall(header)
            received = until_closed(sock, QUICK_S)
    assert wire_data.unpack_header(received[:32]).op is wire_data.DataOp.FAILURE


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version_min": 9, "version_max": 12}, VersionMismatch),
        ({"version_min": 0, "version_max": 0}, VersionMismatch),
        ({"namespace": "nobody"}, UnknownNamespace),
        ({"cluster_id": "elsewhere"}, WrongCluster),
        ({"token": "let me in"}, AuthenticationError),
        ({"role": 1, "session": bytes(16)}, AuthenticationError),
        ({"role": 7}, RemoteProtocolError),
        ({"op": 17}, RemoteProtocolError),
        ({"op": 64}, RemoteProtocolError),
        ({"rid": -1}, RemoteProtocolError),
        ({"staging_bytes": 2**70 % 2**64 - 1}, None),
        ({"client": "x" * 100_000}, RemoteProtocolError),
    ],
)
def test_a_hello_that_cannot_be(
    daemon: DaemonProcess, bystander: Any, changes: dict[str, Any], error: Any
) -> None:
    with daemon.connect(unix=True) as sock:
        sock.sendall(frame(*hello_fields(**changes)))
        if error is None:
            assert sock.recv(1 << 16)[4:], "answered"
            return
        code, text = failure_in(until_closed(sock, QUICK_S))
        assert code == error.code, text
        assert text


def test_what_the_client_library_makes_of_refusals(daemon: DaemonProcess, bystander: Any) -> None:
    for options, error in (
        ({"namespace": "nobody"}, UnknownNamespace),
        ({"cluster_id": "elsewhere"}, WrongCluster),
        ({"token": "let me in"}, AuthenticationError),
    ):
        for shm in ("auto", "off"):
            with pytest.raises(error):
                connect(daemon.url, shm=shm, **options)  # type: ignore[arg-type]


def test_a_newer_client_that_speaks_our_version_too(daemon: DaemonProcess, bystander: Any) -> None:
    with daemon.connect() as sock:
        fields = hello_fields(version_max=40, capabilities=2**63)
        sock.sendall(frame(*fields))
        (length,) = struct.unpack("<I", sock.recv(4))
        assert length > 50, "HelloOk, not a failure"


def test_a_data_connection_with_a_stolen_or_no_session(
    daemon: DaemonProcess, bystander: Any
) -> None:
    with raw_client(daemon) as client:
        ended = client.greet().session
    for session in (bytes(16), b"", ended):
        with data_socket(daemon) as sock:
            until(lambda: figure(bystander, "data_connections") >= 0, what="stats")
            sock.sendall(frame(*hello_fields(role=1, session=session)))
            code, _ = failure_in(until_closed(sock, QUICK_S))
            assert code in (AuthenticationError.code, RemoteProtocolError.code)


def bad_requests(granted: int) -> list[bytes]:
    key = KEYS[0]
    word = struct.Struct("<Q").pack
    nan = struct.pack("<f", float("nan"))

    def put(lengths: bytes, offsets: bytes, keys: bytes = key) -> bytes:
        return frame(
            *(18, 5, 1000, 0, keys, lengths, offsets),
            *(word(0), b"\0\0", b"\0\0\0\0", nan),
        )

    return [
        frame(1, 2, 1, 1, 0, "", "default", "", "again", 0, False, 0, b""),
        frame(16, 5, 1000, key[:15]),
        frame(16, 5, 1000, b""),
        frame(16, 5, 1000, key * (limits.BATCH_KEYS_MAX + 1)),
        frame(16, 0, 1000, key),
        frame(16, 5, 1000),
        frame(16, 5, 1000, key, key),
        frame(16, 5, -1, key),
        frame(16, 5, "soon", key),
        frame("get", 5, 1000, key),
        frame(64, 5, 1, b"", b""),
        frame(99, 5),
        frame(),
        b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1",
        b"\x05\x00\x00\x00\xdd\xff\xff\xff\xff",
        put(struct.pack("<I", 10), word(granted)),
        put(struct.pack("<I", granted), word(1)),
        put(struct.pack("<I", 10), word(2**64 - 5)),
        put(struct.pack("<I", 2**32 - 1), word(0)),
        put(struct.pack("<I", 10), b""),
        put(b"", word(0)),
        frame(30, 0, key, b"\0"),
        frame(17, 0, b"\0\0\0"),
    ]


@pytest.mark.parametrize("number", range(23))
def test_requests_that_break_the_protocol(
    daemon: DaemonProcess, bystander: Any, number: int
) -> None:
    with raw_client(daemon, unix=True) as client:
        hello = client.greet(shm=True, staging_bytes=limits.MIB)
        for fd in client.fds:
            socket.close(fd)
        request = bad_requests(hello.staging_bytes)[number]
        client.sock.sendall(request)
        code, text = failure_in(until_closed(client.sock, QUICK_S))
        assert code == RemoteProtocolError.code, text


def test_requests_that_are_odd_and_allowed(daemon: DaemonProcess, bystander: Any) -> None:
    with raw_client(daemon, unix=True) as client:
        client.greet(shm=True)
        for fd in client.fds:
            socket.close(fd)
        client.send(wire.Release(rid=0, leases=struct.pack("<3Q", 1, 2, 2**64 - 1)))
        client.send(wire.Report(0, KEYS[0] + bytes(16), struct.pack("<2Q", 1, 2)))
        client.send(wire.Ping(client.wire.next_rid()))
        assert isinstance(client.reply(), wire.CountReply)
        client.send(wire.Get(client.wire.next_rid(), 0, KEYS[0]))
        client.reply()
    assert all(hits(bystander, KEYS))


def test_more_requests_than_may_be_outstanding(daemon: DaemonProcess, bystander: Any) -> None:
    with raw_client(daemon) as client:
        client.greet()
        client.sock.sendall(b"".join(frame(29, rid) for rid in range(1, 3000)))
        until_closed(client.sock, QUICK_S)
    with raw_client(daemon) as client:
        client.greet()
        for rid in range(1, 3000, limits.OUTSTANDING_REQUESTS_MAX):
            some = range(rid, min(3000, rid + limits.OUTSTANDING_REQUESTS_MAX))
            client.sock.sendall(b"".join(frame(29, number) for number in some))
            for _ in some:
                length = struct.unpack("<I", _read(client.sock, 4))[0]
                _read(client.sock, length)


def test_a_client_that_asks_much_and_reads_nothing(daemon: DaemonProcess, bystander: Any) -> None:
    with raw_client(daemon) as client:
        client.greet()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sock.settimeout(0.5)
        before_kib = _resident_kib(daemon)
        inline = b"".join(SMALL)
        many = b"".join(frame(16, rid, 60_000_000, inline) for rid in range(1, 10_000))
        with pytest.raises((TimeoutError, ConnectionError)):
            client.sock.sendall(many)
        kept_kib = _resident_kib(daemon) - before_kib
        assert kept_kib < 2 * limits.OUTBOX_BYTES_MAX // 1024, "a GB of replies was asked for"
        for _ in range(10):
            assert all(hits(bystander, KEYS)), "others are served"


def test_a_data_connection_that_reads_nothing(daemon: DaemonProcess, bystander: Any) -> None:
    keys = b"".join(KEYS)
    room = np.full(len(KEYS), LENGTH, "<u4").tobytes()
    with raw_client(daemon) as client, ExitStack() as stack:
        session = client.greet().session
        for _ in range(4):
            sock = stack.enter_context(raw_stream(daemon, session))
            sock.sendall(wire_data.pack_get(1, keys, room, timeout_us=10_000_000))
        time.sleep(0.3)
        began = time.monotonic()
        for _ in range(10):
            assert all(hits(bystander, KEYS))
        assert time.monotonic() - began < QUICK_S


def test_a_put_that_stops_in_the_middle_of_its_payload(
    daemon: DaemonProcess, bystander: Any
) -> None:
    fresh = make_keys(3, 3, LENGTH)
    before = figure(bystander, "arena_used_bytes")
    for cut in (0, 10, LENGTH - 1, LENGTH, LENGTH + 8, 2 * LENGTH):
        with raw_client(daemon) as client:
            session = client.greet().session
            with raw_stream(daemon, session) as sock:
                sock.sendall(wire_data.pack_put(_offer(fresh)))
                assert sock.recv(32 + len(fresh)), "an offer"
                sock.sendall(bytes(cut))
        assert not any(hits(bystander, fresh)), "never committed"
    until(lambda: figure(bystander, "arena_used_bytes") <= before, what="slots are given back")
    assert set(put_all(bystander, fresh)) == {wire.PutResult.COMMITTED}
    assert bystander.remove(fresh).all()


def _offer(keys: list[bytes]) -> wire.Put:
    return wire.Put(
        rid=1,
        timeout_us=5_000_000,
        durability=wire.Durability.MEMORY,
        keys=b"".join(keys),
        lengths=np.full(len(keys), LENGTH, "<u4").tobytes(),
        offsets=b"",
        ttl_ms=struct.pack("<Q", 0),
        priority=struct.pack("<h", 0),
        depth=struct.pack("<I", 0),
        cost=struct.pack("<f", float("nan")),
    )


def test_a_payload_that_is_not_what_its_sum_says(daemon: DaemonProcess, bystander: Any) -> None:
    """Asked for once more, then refused: wrong bytes are never committed."""
    fresh = make_keys(4, 1, LENGTH)
    with raw_client(daemon) as client:
        session = client.greet().session
        with raw_stream(daemon, session) as sock:
            sock.sendall(wire_data.pack_put(_offer(fresh)))
            assert _read(sock, 33)[-1] == wire.WANTED
            for expected in (wire.RESEND, int(wire.PutResult.REFUSED)):
                sock.sendall(payload_of(fresh[0]).tobytes() + struct.pack("<Q", 12345))
                assert _read(sock, 33)[-1] == expected
    assert not any(hits(bystander, fresh))


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, "closed"
        data += more
    return data


def test_a_thousand_connections(daemon: DaemonProcess, bystander: Any) -> None:
    """Those above the bound are told so; the others, and those already there, work."""
    refused = good = 0
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        hello = frame(*hello_fields())
        for _ in range(1000):
            sock = stack.enter_context(daemon.connect())
            try:
                sock.sendall(hello)
            except ConnectionError:
                refused += 1
                continue
            sockets.append(sock)
        assert all(hits(bystander, KEYS))
        for sock in sockets:
            sock.settimeout(10)
            try:
                data = sock.recv(1 << 14)
            except ConnectionError:
                data = b""
            good += len(data) > 150
            refused += len(data) <= 150
        assert good + refused == 1000
        assert CONNECTIONS_MAX - 20 <= good <= CONNECTIONS_MAX
        assert all(hits(bystander, [*KEYS, *SMALL]))


def test_a_million_keys(daemon: DaemonProcess, bystander: Any) -> None:
    keys = np.zeros((1_000_000, 16), np.uint8)
    keys[:, 8:12] = np.arange(1_000_000, dtype="<u4").view(np.uint8).reshape(-1, 4)
    keys[:, 15] = 0xEE
    known = np.frombuffer(b"".join(SMALL), np.uint8).reshape(-1, 16)
    keys[-len(SMALL) :] = known
    for shm in ("auto", "off"):
        with connect(daemon.url, shm=shm, timeout_s=20) as store:
            began = time.monotonic()
            found = store.exists(keys)
            assert not found[: -len(SMALL)].any()
            assert found[-len(SMALL) :].all()
            assert store.match(keys) == 0
            assert store.match(np.tile(known, (10_000, 1))) == 1_000_000
            assert time.monotonic() - began < 15
            assert all(hits(bystander, KEYS))


def test_a_stop_does_not_wait_for_clients_that_do_nothing(tmp_path: Path) -> None:
    """Mute, deaf and half-finished ones, and one that reads a view: SIGTERM ends all in time."""
    soon = ["--set", "node.shutdown_deadline_s=1.5"]
    with daemon_process(tmp_path / "data", arguments=soon) as daemon, ExitStack() as stack:
        store = stack.enter_context(connect(daemon.url))
        put_all(store, KEYS, durability="group")
        views = store.view(KEYS)
        views.__enter__()
        for port in every_port(daemon):
            stack.enter_context(port())
        client = stack.enter_context(raw_client(daemon))
        session = client.greet().session
        deaf = stack.enter_context(raw_stream(daemon, session))
        room = np.full(len(KEYS), LENGTH, "<u4").tobytes()
        deaf.sendall(wire_data.pack_get(1, b"".join(KEYS), room, timeout_us=60_000_000))
        half = stack.enter_context(raw_stream(daemon, session))
        half.sendall(wire_data.pack_put(_offer(make_keys(3, 3, LENGTH))))
        half.sendall(bytes(LENGTH + 100))
        time.sleep(0.2)
        began = time.monotonic()
        assert daemon.stop(timeout_s=20) == 0, daemon.log
        assert time.monotonic() - began < 1.5 + 3
        assert "Traceback" not in daemon.log, daemon.log
        assert not (daemon.directory / "endpoints.json").exists()
        with pytest.raises(StaleView):
            views.__exit__(None, None, None)
        daemon.start()
        until(lambda: store.exists(KEYS).all(), what="the store answers again")
        assert all(hits(store, KEYS))
