"""A real daemon and clients that break rules, die, stall, or come in crowds."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.errors import (
    AuthenticationError,
    LeaseExpired,
    Overloaded,
    RemoteProtocolError,
    TransportError,
    UnknownNamespace,
    VersionMismatch,
    WrongCluster,
)
from ctxstore.limits import KIB, MIB
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side
from tests.daemon_process import ROOT, DaemonProcess, daemon_process
from tests.raw_client import (
    TIMEOUT_US,
    RawClient,
    RawData,
    connect_tcp,
    connect_unix,
    hello,
    put_message,
    some_keys,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMITTED = wire.PutResult.COMMITTED


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    # One daemon for the whole module: it has to outlive everything that is done to it here.
    arguments = ["--set", "limits.lease_s_max=0.6", "--set", "limits.lease_check_s=0.1"]
    directory = tmp_path_factory.mktemp("hardship") / "data"
    with daemon_process(directory, arguments=arguments) as running:
        yield running
        assert running.stop() == 0, running.log
        assert "Traceback" not in running.log


@pytest.fixture(autouse=True)
def _still_serves(daemon: DaemonProcess) -> Iterator[None]:
    """After each outrage somebody else is served as before, and nothing is left behind."""
    yield
    key = os.urandom(16)
    with _connect_with_staging(daemon) as client:
        assert client.put([key], [b"x" * 5000]) == [COMMITTED]
        assert client.get([key]) == [b"x" * 5000]
        until = time.monotonic() + 5
        while time.monotonic() < until:
            stats = client.stats()
            if _rest(stats) == (1, 0, 0, 0):
                break
            time.sleep(0.02)
        assert _rest(stats) == (1, 0, 0, 0)


def _connect_with_staging(daemon: DaemonProcess) -> RawClient:
    """Staging of a thousand connections that have just ended comes back one by one."""
    until = time.monotonic() + 10
    while True:
        client = connect_unix(daemon)
        if len(client.staging) or time.monotonic() > until:
            return client
        client.close()
        time.sleep(0.02)


def _rest(stats: dict[str, object]) -> tuple[int, int, int, int]:
    engine, server = stats["engine"], stats["server"]
    assert isinstance(engine, dict)
    assert isinstance(server, dict)
    return (
        server["control_connections"],
        server["data_connections"],
        engine["leases"],
        engine["waiting_puts"],
    )


def _failure(client: RawClient) -> wire.Failure:
    assert isinstance(client.greeting, wire.Failure), client.greeting
    return client.greeting


# ---------------------------------------------------------------------------- hello


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize(
    ("greeting", "code"),
    [
        (hello(namespace="other"), UnknownNamespace.code),
        (hello(cluster_id="other"), WrongCluster.code),
        (hello(token="secret"), AuthenticationError.code),
        (hello(role=wire.Role.DATA, session=bytes(16)), AuthenticationError.code),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(
    daemon: DaemonProcess, greeting: wire.Hello, code: int, unix: bool
) -> None:
    with RawClient(daemon.connect(unix=unix), greeting) as client:
        assert _failure(client).code == code
        with pytest.raises(TransportError):
            client.receive()


def test_a_version_of_the_future_is_told_ours(daemon: DaemonProcess) -> None:
    with daemon.connect() as bare:
        import msgpack

        payload = msgpack.packb([int(wire.Op.HELLO), 1, 7, 9, "a new field", {"and": 1}])
        bare.sendall(struct.pack("<I", len(payload)) + payload)
        reader = ControlConnection(Side.CLIENT)
        reader.send(hello())
        (answer,) = reader.receive(_all_of(bare))
        assert isinstance(answer, wire.Failure)
        assert answer.code in (VersionMismatch.code, RemoteProtocolError.code)


def _all_of(bare: socket.socket) -> bytes:
    parts = bytearray()
    while part := bare.recv(65536):
        parts += part
    return bytes(parts)


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 4,
        b"\xff" * 4,
        struct.pack("<Q", 2**63),
        struct.pack("<I", limits.HELLO_BYTES_MAX + 1),
        os.urandom(100_000),
        struct.pack("<I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
        struct.pack("<I", 3) + b"\x93\x01\x01",
    ],
    ids=["http", "zeros", "ones", "2^63", "big", "noise", "no-msgpack", "short"],
)
def test_garbage_is_answered_and_ended(daemon: DaemonProcess, garbage: bytes, unix: bool) -> None:
    with daemon.connect(unix=unix) as bare:
        with contextlib.suppress(ConnectionError):
            bare.sendall(garbage)
            bare.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            answer = _all_of(bare)
            assert len(answer) < 4096


def test_garbage_on_the_data_port(daemon: DaemonProcess) -> None:
    with connect_tcp(daemon) as client:
        host, _, port = client.ok.data_address.rpartition(":")
        for garbage in (b"\xff" * 64, wire_data.pack_get(1, b"k" * 16, bytes(4), timeout_us=1)):
            with socket.create_connection((host, int(port)), timeout=10) as bare:
                bare.sendall(garbage)
                bare.shutdown(socket.SHUT_WR)
                _all_of(bare)
        with RawData(client) as data:
            data.socket.sendall(b"\xff" * 32)
            answer = _all_of(data.socket)
            header = wire_data.unpack_header(answer[: wire_data.DATA_HEADER_BYTES])
            failure = wire_data.unpack_failure(header, answer[wire_data.DATA_HEADER_BYTES :])
            assert failure.code == RemoteProtocolError.code


def test_silent_connections_are_ended(daemon: DaemonProcess) -> None:
    began = time.monotonic()
    silent = [daemon.connect(), daemon.connect(unix=True)]
    for bare in silent:
        with bare:
            assert bare.recv(1) == b""
    assert time.monotonic() - began > limits.HELLO_TIMEOUT_S - 1


def test_a_crowd_of_silent_connections_keeps_nobody_out(daemon: DaemonProcess) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(daemon.connect()) for _ in range(300)]
        with connect_tcp(daemon) as client:
            assert client.ask(wire.Ping(client.rid()), wire.CountReply).count == 0
        assert silent[0].recv(1) == b"", "the oldest had to go"


def test_a_role_at_the_wrong_port_is_refused(daemon: DaemonProcess) -> None:
    with connect_tcp(daemon) as client:
        host, _, port = client.ok.data_address.rpartition(":")
        bare = socket.create_connection((host, int(port)), timeout=10)
        with RawClient(bare, hello()) as wrong:
            assert _failure(wrong).code == RemoteProtocolError.code
        with RawClient(
            daemon.connect(), hello(role=wire.Role.DATA, session=client.ok.session)
        ) as wrong:
            assert _failure(wrong).code == RemoteProtocolError.code


# ---------------------------------------------------------------------------- broken clients


def test_frames_that_break_the_protocol_end_the_connection(daemon: DaemonProcess) -> None:
    for frame in (
        b"\xff\xff\xff\xff",
        struct.pack("<I", 4) + b"\x92\xcc\xff\x01",
        struct.pack("<I", 3) + b"\x92\x10\x01",
    ):
        with connect_tcp(daemon) as client:
            client.socket.sendall(frame)
            answer = client.receive()
            assert isinstance(answer, wire.Failure)
            assert answer.rid == 0
            assert answer.code == RemoteProtocolError.code
            with pytest.raises(TransportError):
                client.receive()


def test_a_frame_cut_short_changes_nothing(daemon: DaemonProcess) -> None:
    with connect_unix(daemon) as client:
        key = os.urandom(16)
        frame = client.wire.send(client.put_message([key], [b"y" * 5000]))
        client.socket.sendall(frame[:-3])
    with connect_unix(daemon) as client:
        assert client.exists([key]) == [False]


def test_ranges_outside_the_staging_are_refused(daemon: DaemonProcess) -> None:
    size = 2 * MIB  # a quarter of an eighth of 64 MiB
    for offset, length in ((0, size + 1), (size, 1), (2**64 - 1, 2), (2**63, 5)):
        with connect_unix(daemon) as client:
            assert len(client.staging) == size
            client.send(put_message(client.rid(), some_keys(1), [length], offsets=[offset]))
            answer = client.receive()
            assert isinstance(answer, wire.Failure)
            assert answer.code == RemoteProtocolError.code
    with connect_tcp(daemon) as client:
        client.send(put_message(client.rid(), some_keys(1), [10]))
        assert isinstance(client.receive(), wire.Failure)


def test_too_many_requests_at_once_end_the_connection(daemon: DaemonProcess) -> None:
    with connect_unix(daemon) as client:
        # Sent as one piece and not through our own bound, which would stop it.
        flush = wire.Flush(1, 60_000_000)
        from ctxstore.wire.codec import encode_frame

        frames = b"".join(
            encode_frame(wire.Flush(rid, flush.timeout_us))
            for rid in range(1, limits.OUTSTANDING_REQUESTS_MAX + 2)
        )
        client.socket.sendall(frames)
        with contextlib.suppress(TransportError, RemoteProtocolError):
            while True:
                client.receive()


def test_staging_cannot_be_truncated_by_its_client(daemon: DaemonProcess) -> None:
    with connect_unix(daemon) as client:
        for size in (0, 4096, 8 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(client.fds[1], size)
        with pytest.raises(PermissionError):
            os.ftruncate(client.fds[0], 0)
        # Holes can be punched: the daemon reads zeros, and does not fall over.
        keep_size_and_punch_hole = 0x01 | 0x02
        message = client.put_message([key := os.urandom(16)], [b"z" * 100_000])
        whole = (ctypes.c_long(0), ctypes.c_long(len(client.staging)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(client.fds[1], keep_size_and_punch_hole, *whole) == 0
        assert client.ask(message, wire.PutReply).results == bytes([COMMITTED])
        assert client.get([key]) == [bytes(100_000)]


def test_leases_of_a_killed_client_are_freed(daemon: DaemonProcess) -> None:
    keys = [os.urandom(16) for _ in range(20)]
    with connect_unix(daemon) as client:
        client.put(keys, [b"k" * 10_000] * 20)
    script = (
        "import sys, socket, time\n"
        "from ctxstore.wire import messages as wire\n"
        "from tests.raw_client import RawClient, hello\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "client = RawClient(s, hello(shm=True, staging_bytes=1048576))\n"
        "keys = [bytes.fromhex(k) for k in sys.argv[2].split(',')]\n"
        "client.get(keys, release=False)\n"
        "sys.stdout.write('leased\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    assert daemon.endpoints is not None
    arguments = [str(daemon.endpoints.unix), ",".join(key.hex() for key in keys)]
    with (
        connect_unix(daemon) as watcher,
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"leased\n"
        assert watcher.stats()["engine"]["leases"] == 1  # type: ignore[index]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        until = time.monotonic() + 2
        while watcher.stats()["engine"]["leases"]:  # type: ignore[index]
            assert time.monotonic() < until, "leases outlive their client"


def test_a_view_kept_too_long_ends_its_connection(daemon: DaemonProcess) -> None:
    key = os.urandom(16)
    with connect_unix(daemon) as client:
        client.put([key], [b"v" * 10_000])
        client.get([key], release=False)
        client.socket.settimeout(5)
        answer = client.receive()
        assert isinstance(answer, wire.Failure)
        assert answer.code == LeaseExpired.code
        with pytest.raises(TransportError):
            client.receive()


def test_a_client_that_dies_in_the_middle_of_a_put(daemon: DaemonProcess) -> None:
    key = os.urandom(16)
    with connect_tcp(daemon) as client, RawData(client) as data:
        data.socket.sendall(wire_data.pack_put(put_message(7, [key], [MIB])))
        header, meta = data._reply()
        assert meta == bytes([wire.WANTED]), header
        data.socket.sendall(bytes(500_000))
    with connect_unix(daemon) as client:
        assert client.exists([key]) == [False]
        assert client.put([key], [b"own"]) == [COMMITTED], "its claim on the key ended with it"


def _ask_for_ever(client: RawClient, keys: bytes) -> None:
    while True:  # replies of half a MiB each
        client.wire._pending.clear()
        client.send(wire.Get(client.rid(), TIMEOUT_US, keys))


def test_a_client_that_reads_nothing_is_cut_off(daemon: DaemonProcess) -> None:
    keys = [os.urandom(16) for _ in range(500)]
    with connect_unix(daemon) as client:
        client.put(keys, [b"r" * 1000] * 500)
    with connect_unix(daemon) as client:
        client.socket.settimeout(1)
        with pytest.raises((TimeoutError, ConnectionError)):
            _ask_for_ever(client, b"".join(keys))
        with connect_tcp(daemon) as other:  # and others do not notice
            assert other.ask(wire.Ping(other.rid()), wire.CountReply).count == 0


def test_a_thousand_connections_hold(daemon: DaemonProcess) -> None:
    key = os.urandom(16)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                RawClient(daemon.connect(unix=True), hello(shm=True, staging_bytes=64 * KIB))
            )
            for _ in range(1000)
        ]
        assert all(isinstance(client.greeting, wire.HelloOk) for client in clients)
        clients[0].put([key], [b"t" * 3000])
        for client in clients:
            client.send(wire.Get(client.rid(), TIMEOUT_US, key))
        for client in clients:
            reply = client.receive()
            assert isinstance(reply, wire.GetReply)
            assert reply.rows["status"][0] == wire.Lookup.HIT


def test_data_connections_are_bounded(daemon: DaemonProcess) -> None:
    with connect_tcp(daemon) as client, contextlib.ExitStack() as stack:
        host, _, port = client.ok.data_address.rpartition(":")
        refused = None
        for _ in range(80):
            bare = socket.create_connection((host, int(port)), timeout=10)
            greeting = hello(role=wire.Role.DATA, session=client.ok.session)
            found = stack.enter_context(RawClient(bare, greeting))
            if isinstance(found.greeting, wire.Failure):
                refused = found.greeting
                break
        assert refused is not None
        assert refused.code == Overloaded.code
        assert refused.retry_after_ms > 0


def test_many_clients_at_once_see_only_right_bytes(daemon: DaemonProcess) -> None:
    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        with connect_unix(daemon, staging_bytes=MIB) as client:
            for round_ in range(15):
                keys = some_keys(8, space=round_)
                payloads = [key * int(rng.integers(1, 1000)) for key in keys]
                client.put(keys, payloads)
                for key, found in zip(keys, client.get(keys), strict=True):
                    if isinstance(found, bytes):
                        assert found == key * (len(found) // 16)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, number) for number in range(6)]:
            done.result()


def test_segments_deleted_under_the_daemon(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as running:
        keys = some_keys(10)
        with connect_unix(running) as client:
            client.put(keys, [b"s" * 20_000] * 10, durability=wire.Durability.GROUP)
            for segment in (tmp_path / "data").glob("segment-*"):
                segment.unlink()
            assert client.get(keys) == [b"s" * 20_000] * 10, "memory still has them"
            more = some_keys(4, space=8)
            results = client.put(more, [b"t" * 20_000] * 4, durability=wire.Durability.GROUP)
            assert set(results) <= {COMMITTED, wire.PutResult.REFUSED}
        code = running.stop()
        assert code in (0, 1)
        running.start()
        with connect_unix(running) as client:
            for key, result in zip(more, results, strict=True):
                if result is COMMITTED:
                    assert client.get([key]) == [b"t" * 20_000]
